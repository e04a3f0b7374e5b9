"""What the example scripts say and ask before they do anything: pki.sh, quickstart.sh."""
import os
import re
import shutil
import subprocess
import unittest

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


if __name__ == "__main__":
    unittest.main()
