"""What the example scripts say and ask before they do anything: pki.sh, quickstart.sh."""
import os
import re
import shutil
import socket
import subprocess
import sys
import unittest
from xml.etree import ElementTree

import margo_agent
from tests import support


def run_example(name, *arguments, env=None, timeout=120):
    """Runs a script of examples into a pipe; the CompletedProcess has all it said."""
    return subprocess.run(["sh", os.path.join(support.EXAMPLES, name)] + list(arguments), stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, universal_newlines=True, timeout=timeout,
                          env=dict(os.environ, **(env or {})))


class Pki(unittest.TestCase):
    def setUp(self):
        support.require("openssl")
        self.folder = os.path.join(support.make_folder(self), "pki")

    def test_it_says_what_it_made_and_what_takes_it(self):
        said = run_example("pki.sh", self.folder, "press-12").stdout
        named = re.findall(r"^  (\S+) +made ", said, re.M)
        self.assertEqual(set(os.listdir(self.folder)) - set(named), {"ca.pem"})
        self.assertIn("identity.certificate, the client press-12", said)
        settings = set(re.findall(r"\b(?:identity|registries)\.[\w.]+", said))
        self.assertEqual(settings, {"identity.certificate", "identity.key", "identity.trust_bundle", "identity.ca",
                                    "registries.HOST.ca"})
        with open(os.path.join(support.EXAMPLES, "wfm.py")) as file:
            options = file.read()
        for option in re.findall(r"--[a-z-]+", said):
            self.assertIn(f'add("{option}"', options)

    def test_what_is_there_stays_and_another_client_is_not_mistaken_for_it(self):
        self.assertEqual(run_example("pki.sh", self.folder, "press-12").returncode, 0)
        with open(os.path.join(self.folder, "client.pem")) as file:
            before = file.read()
        again = run_example("pki.sh", self.folder)
        self.assertIn("the client press-12", again.stdout)
        self.assertNotRegex(again.stdout, r"  made ")
        other = run_example("pki.sh", self.folder, "press-13")
        self.assertEqual(other.returncode, 1)
        self.assertIn("it is another client's: spiffe://factory.example/margo/wfm/main/client/press-12", other.stdout)
        with open(os.path.join(self.folder, "client.pem")) as file:
            self.assertEqual(file.read(), before)


class Quickstart(unittest.TestCase):
    def make_path(self, without, **programs):
        """A PATH with everything but some commands, and with programs of the test's own before it."""
        folder = support.make_folder(self)
        for place in reversed(os.environ["PATH"].split(":") + ["/usr/sbin", "/sbin"]):
            for name in os.listdir(place) if os.path.isdir(place) else ():
                if name not in without and not os.path.lexists(os.path.join(folder, name)):
                    os.symlink(os.path.join(place, name), os.path.join(folder, name))
        for name, text in programs.items():
            path = os.path.join(folder, name.replace("_", "-"))
            if os.path.lexists(path):
                os.remove(path)
            support.write(path, "#!/bin/sh\n" + text, 0o755)
        return folder

    def test_what_is_missing_is_told_and_nothing_is_installed_unasked(self):
        log = os.path.join(support.make_folder(self), "log")
        path = self.make_path({"podman", "curl"}, apt_get=f'echo "$@" >> {log}; exit 100')
        for arguments in ((), ("--no-install",)):
            done = run_example("quickstart.sh", *arguments, env={"PATH": path})
            self.assertEqual(done.returncode, 2, done.stdout)
            self.assertRegex(done.stdout, "(?m)^missing:.* curl podman")
            self.assertIn("sh examples/quickstart.sh --install", done.stdout)
            self.assertFalse(os.path.exists(log))
        done = run_example("quickstart.sh", "--install", env={"PATH": path})
        self.assertEqual(done.returncode, 100)
        with open(log) as file:
            self.assertIn("update", file.read())

    def test_what_a_user_needs_beside_root_is_told(self):
        """Without root podman makes a container's users by newuidmap, and its way out by pasta or slirp4netns."""
        support.require("root")
        path = self.make_path({"curl", "newuidmap", "pasta", "slirp4netns"})
        os.chmod(path, 0o755)
        for user, told in ((65534, True), (0, False)):
            done = subprocess.run(["setpriv", f"--reuid={user}", "sh", os.path.join(support.EXAMPLES, "quickstart.sh")], env={"PATH": path},
                                  stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, universal_newlines=True, timeout=support.LIMIT)
            self.assertRegex(done.stdout, "(?m)^missing:.* curl")
            self.assertEqual(" uidmap slirp4netns\n" in done.stdout, told, done.stdout)

    def test_a_failure_shows_what_doctor_says_and_no_escapes_go_into_a_pipe(self):
        """Here openssl fails once the device has its certificate."""
        support.require("openssl")
        openssl = f'case "$*" in *-enddate*) echo broken >&2; exit 1 ;; esac; exec {shutil.which("openssl")} "$@"'
        folder = support.make_folder(self)
        done = run_example("quickstart.sh", "--enroll", env={"PATH": self.make_path((), openssl=openssl), "TERM": "xterm",
                                                             "TMPDIR": folder})
        self.assertEqual(done.returncode, 1, done.stdout)
        self.assertRegex(done.stdout, r"(?s)broken\n.*== It failed.*\$ margo_agent.py doctor\n.*\nok .*== Failed \(exit 1\)")
        self.assertNotIn("\x1b", done.stdout)
        self.assertEqual(os.listdir(folder), [])


class Configuration(unittest.TestCase):
    """examples/agent.yaml, which nobody has to change before it can be tried."""

    def test_doctor_finds_nothing_wrong_with_it_as_it_is(self):
        """With what pki.sh made beside it, and the example WFM where the file has it."""
        with socket.socket() as door:
            door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                door.bind(("127.0.0.1", 8443))
            except OSError:
                self.skipTest("somebody else has port 8443")
        pki, engine = support.Pki(self), support.FakeEngine(self)
        support.Wfm(self, pki, "--listen", "localhost:8443")
        path = os.path.join(pki.folder, "agent.yaml")
        shutil.copy(os.path.join(support.EXAMPLES, "agent.yaml"), path)
        done = subprocess.run([sys.executable, support.AGENT, "-c", path, "doctor"], env=dict(os.environ, **engine.env), timeout=60,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
        self.assertEqual(done.returncode, 0, done.stdout)
        self.assertRegex(done.stdout, r"(?m)^ok   wfm       https://localhost:8443 is spiffe://factory.example/margo/wfm/main; version 1")
        self.assertNotIn("FAIL", done.stdout)

    def test_every_optional_setting_is_commented_out_with_its_default(self):
        with open(os.path.join(support.EXAMPLES, "agent.yaml"), encoding="utf-8") as file:
            text = file.read()
        self.assertEqual(re.findall(r"(?m)^ *(\w+): \S", text), ["url", "certificate", "key", "trust_bundle"])

        def check(schema):
            for key, row in schema.items():
                if isinstance(row, dict):
                    check(row)
                elif key not in ("url", "certificate", "key", "trust_bundle"):
                    default = margo_agent.make_yaml(row[1])
                    self.assertIn(f"# {key}: {default}".rstrip() + "\n", text)
                    if default:
                        row[0](margo_agent.load_yaml(f"{key}: {default}")[key], "")         # it can be used as it stands

        check(margo_agent.SCHEMA)


class Picture(unittest.TestCase):
    """The terminal in the README."""

    def test_a_session_is_drawn_as_it_was(self):
        session = "before\n== First <poll>\n$ margo_agent.py run\n" + "x" * 150 + "\n== Last\nafter\n"
        done = subprocess.run([sys.executable, os.path.join(support.EXAMPLES, "terminal.py"), "--from", "== First", "--to", "== Last"],
                              input=session, stdout=subprocess.PIPE, universal_newlines=True, timeout=60)
        rows = [item.text.replace("\xa0", " ") for item in ElementTree.fromstring(done.stdout) if item.tag.endswith("text")]
        self.assertEqual(rows, ["== First <poll>", "$ margo_agent.py run", "x" * 118, "x" * 32])

    def test_what_it_shows_is_what_the_quickstart_does(self):
        shown = "".join(ElementTree.parse(os.path.join(support.EXAMPLES, "terminal.svg")).getroot().itertext()).replace("\xa0", " ")
        with open(os.path.join(support.EXAMPLES, "quickstart.sh")) as file:
            script = file.read()
        headings = re.findall('(?m)^say "(.*)"', script)
        for heading in headings[headings.index("First poll: the agent enrolls, installs and reports"):headings.index("What the WFM was told")]:
            self.assertIn(f"== {heading}", shown)
        for words in ("info    installed deployment=", "another revision: parameter greeting", "Good evening from line 4"):
            self.assertIn(words, shown)


if __name__ == "__main__":
    unittest.main()
