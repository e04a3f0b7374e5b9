"""The documents: what README and the examples' own pages say is true, and what they show can be done."""
import contextlib
import glob
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import unittest

import margo_agent
from tests import support

README = os.path.join(support.ROOT, "README.md")
PAGES = [README, os.path.join(support.ROOT, "tests", "README.md")] + sorted(glob.glob(os.path.join(support.EXAMPLES, "*", "README.md")))
LIMIT = 14000                       # bytes


def read(path=README):
    """A page as text."""
    with open(path, encoding="utf-8") as file:
        return file.read()


def find_blocks(text, language):
    """The code blocks of a language, without what they are indented by."""
    found = re.findall(rf"(?ms)^( *)```{language}\n(.*?)^ *```", text)
    return [re.sub(rf"(?m)^{indent}", "", block) for indent, block in found]


def find_rows(text, head):
    """The cells of a table's rows, by the words of its first line."""
    lines = text[text.index(head):].split("\n")[2:]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines[:lines.index("")]]


def find_settings(schema, before=""):
    """The full names of all settings and of what holds them."""
    for key, entry in schema.items():
        yield before + key
        if isinstance(entry, dict):
            yield from find_settings(entry, f"{before}{key}.")


class Pages(unittest.TestCase):
    def test_the_readme_is_short(self):
        self.assertLessEqual(len(read().encode()), LIMIT)

    def test_every_link_leads_somewhere(self):
        for page in PAGES:
            for target in re.findall(r"\]\(([^)#]+)", read(page)):
                path = os.path.normpath(os.path.join(os.path.dirname(page), target))
                if not target.startswith("https:"):
                    self.assertTrue(os.path.exists(path), f"{page}: {target}")

    def test_every_folder_of_examples_has_a_page_and_the_readme_leads_to_it(self):
        text = read()
        for folder in glob.glob(os.path.join(support.EXAMPLES, "*", "")):
            if os.path.basename(folder[:-1]) != "__pycache__":
                self.assertIn(f"](examples/{os.path.basename(folder[:-1])}/README.md)", text)

    def test_the_commands_are_those_that_there_are(self):
        rows = find_rows(read(), "| command | does |")
        self.assertEqual({row[0].strip("`").split()[0] for row in rows}, set(margo_agent.COMMANDS))
        for name, words in rows:
            operands, options = margo_agent.parse_usage(margo_agent.COMMANDS[name.strip("`").split()[0]][1])
            for option in re.findall(r"--?[a-z]+", name) + re.findall(r"`(--?[a-z]+)", words):
                self.assertIn(option, dict(options, **{"--once": ""}))
            self.assertEqual(re.findall(r"\[?[A-Z]+\]?", name), operands)

    def test_the_exit_codes_are_those_that_there_are(self):
        codes = {int(row[0]) for row in find_rows(read(), "| exit code | means |")}
        faults = [item for item in vars(margo_agent).values() if isinstance(item, type) and issubclass(item, margo_agent.MargoError)]
        self.assertEqual(codes, {fault.exit for fault in faults} | {0})

    def test_every_code_of_a_failure_is_explained(self):
        told = set(re.findall(r"`([A-Z_]{4,})`", "".join(row[0] for row in find_rows(read(), "| code | means |"))))
        with open(support.AGENT, encoding="utf-8") as file:
            source = file.read()
        raised = set(re.findall(r'(?:ComponentError|fail_record|deny|refuse)\(\s*"([A-Z][A-Z_]+)"', source))
        self.assertEqual(raised - told - {"INTERNAL"}, set())
        self.assertEqual({code for code in told if f'"{code}"' not in source}, set())

    def test_settings_that_are_named_are_there(self):
        known = set(find_settings(margo_agent.SCHEMA)) | {"policy.images"} | {f"registries.HOST.{key}" for key in margo_agent.REGISTRY_SCHEMA}
        sections = "|".join(key for key, entry in margo_agent.SCHEMA.items() if isinstance(entry, dict))
        for page in PAGES:
            named = set(re.findall(rf"`((?:{sections}|registries\.HOST)\.\w+)", read(page)))
            self.assertEqual(named - known - {"git.factory", "identity.svid"}, set(), page)

    def test_configurations_that_are_shown_can_be_used(self):
        """Each yaml block of settings, beside what every configuration needs."""
        count = 0
        for page in PAGES:
            for block in find_blocks(read(page), "yaml"):
                shown = margo_agent.load_yaml(block)
                if set(shown) <= set(margo_agent.SCHEMA):
                    base = {"wfm": {"url": "https://wfm.example"}, "identity": {"certificate": "c", "key": "k", "trust_bundle": "b"}}
                    for key, value in shown.items():
                        base[key] = dict(base.get(key, {}), **value)
                    if shown.get("identity", {}).get("discovery") or shown.get("wfm", {}).get("profile"):
                        base["identity"].pop("trust_bundle")
                    if base["wfm"].get("profile") == "git":
                        base["identity"] = shown.get("identity", {})
                    margo_agent.make_config(base, "/etc/margo", {})
                    count += 1
        self.assertGreater(count, 5)


class Embedding(support.DeviceCase):
    """examples/embedding: what a vendor copies."""

    def setUp(self):
        super().setUp()
        self.wfm.publish(support.make_deployment(registry=self.wfm.registry))
        before = dict(os.environ)
        self.addCleanup(lambda: (os.environ.clear(), os.environ.update(before)))
        os.environ.update(self.device.env)

    def test_the_lines_of_the_page_do_what_they_say(self):
        (code,) = find_blocks(read(os.path.join(support.EXAMPLES, "embedding", "README.md")), "python")
        heard = []
        self.addCleanup(setattr, margo_agent.log, "callback", None)
        margo_agent.log.callback = lambda *event: heard.append(event)
        with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(io.StringIO()) as errors:
            exec(code.replace("/etc/margo/agent.yaml", self.device.config_file), {})
        first, delay, deployments = output.getvalue().strip().split("\n")
        self.assertEqual(first, "0 applied ")
        self.assertGreater(float(delay), 0)
        self.assertIn("'state': 'installed'", deployments)
        self.assertEqual(errors.getvalue(), "")
        self.assertIn(("info", "installed", {"deployment": support.HELLO, "name": "hello"}), heard)

    def test_what_is_told_of_hooks_is_what_they_are_told(self):
        (block,) = find_blocks(read(os.path.join(support.EXAMPLES, "embedding", "README.md")), "json")
        deployment = margo_agent.Deployment(support.HELLO, "hello", "n", "x", "compose", [], [], None, {})
        record = {"deploymentId": support.HELLO, "name": "hello", "deviceId": "x"}
        change = margo_agent.Change("update", "web", record, deployment, False, "compose")
        self.assertEqual(list(json.loads(block)), list(margo_agent.make_facts(change, "before-update", None)))

    def test_the_supervisor_polls_and_tells_what_changes(self):
        program = os.path.join(support.EXAMPLES, "embedding", "supervisor.py")
        done = subprocess.run([sys.executable, program, self.device.config_file, "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              env=dict(self.device.env), universal_newlines=True, timeout=support.LIMIT)
        self.assertEqual((done.returncode, done.stdout), (0, "hello installed \n"), done.stderr)
        self.assertRegex(done.stderr, r"(?m)^INFO desired state accepted version=1 deployments=1$")
        self.device.set("poll.intervall", "1s")
        done = subprocess.run([sys.executable, program, self.device.config_file, "1"], stderr=subprocess.PIPE, universal_newlines=True, timeout=support.LIMIT)
        self.assertEqual(done.returncode, 2)
        self.assertIn("did you mean poll.interval?", done.stderr)


class Tools(support.DeviceCase):
    """What stands beside the agent: figures for alarms, a bundle for a ticket."""

    def setUp(self):
        super().setUp()
        self.wfm.publish(support.make_deployment(registry=self.wfm.registry, parameters={"GREETING": "s3cret-1"}))
        self.device.set("runtime.environment", {"TOKEN": "s3cret-2"})

    def test_metrics_tell_what_alarms_need(self):
        program = [sys.executable, os.path.join(support.EXAMPLES, "metrics.py")]
        before = subprocess.run(program, input=self.device.run("status", "--json").stdout, stdout=subprocess.PIPE, universal_newlines=True, check=True)
        self.assertIn("\nmargo_last_poll_seconds 0\n", before.stdout)
        self.engine.change(exits={"main": 4})
        self.device.cycle(1)
        text = subprocess.run(program, input=self.device.run("status", "--json").stdout, stdout=subprocess.PIPE, universal_newlines=True).stdout
        for words in ('margo_deployments{state="failed"} 1', 'margo_deployment_failed{name="hello",code="INSTALL_FAILED"} 1', "margo_last_poll_ok 0",
                      "margo_desired_version 1", "margo_outbox 0"):
            self.assertIn(f"\n{words}\n", text)
        (end,) = re.findall(r"\nmargo_certificate_end_seconds (\d+)\n", text)
        self.assertGreater(int(end), time.time())
        for line in text.strip().split("\n"):
            self.assertRegex(line, r'\A(# (HELP|TYPE) margo_\w+ .+|margo_\w+(\{(\w+="[^"]*",?)+\})? \d+)\Z')

    def test_a_bundle_for_a_ticket_holds_no_secret(self):
        self.device.cycle()
        path = os.path.join(self.device.folder, "bundle.tar.gz")
        env = dict(self.device.env, MARGO_AGENT=f"{sys.executable} {support.AGENT}", MARGO_CONFIG=self.device.config_file)
        done = subprocess.run(["sh", os.path.join(support.EXAMPLES, "support.sh"), path], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              universal_newlines=True, timeout=120)
        self.assertEqual((done.returncode, done.stdout), (0, f"{path}\n"))
        with tarfile.open(path) as archive:
            held = {item.name: archive.extractfile(item).read().decode() for item in archive if item.isfile()}
        self.assertIn(support.CLIENT_ID, held["margo-support/status.json"])
        self.assertIn("\nok   ", "\n" + held["margo-support/doctor.txt"])
        text = "".join(held.values())
        with open(self.pki.path("client.key")) as key:
            for secret in ("s3cret", "PRIVATE KEY", key.read().split("\n")[1]):
                self.assertNotIn(secret, text)


class Newcomer(unittest.TestCase):
    """What the README tells a newcomer to type, and nothing else, from an empty folder to an application with a parameter."""

    def test_the_way_of_the_readme(self):
        support.require("podman")
        engine = support.Engine(type(self))
        self.addCleanup(engine.close)
        engine.make_image("docker.io/library/busybox:1.36")
        folder = support.make_folder(self)
        shutil.copytree(support.EXAMPLES, os.path.join(folder, "examples"), ignore=shutil.ignore_patterns("__pycache__"))
        with open(support.AGENT, encoding="utf-8") as file:
            support.write(os.path.join(folder, "margo_agent.py"), file.read().replace("/var/lib/margo-agent", f"{folder}/var"))
        os.mkdir(os.path.join(folder, "bin"))
        blocks = [block.replace("/usr/local/lib", f"{folder}/lib").replace("/usr/local/bin", f"{folder}/bin").replace("/etc/margo", f"{folder}/etc")
                  for block in find_blocks(read(), "sh")]
        script = "set -eu\ntrap 'kill $wfm 2>/dev/null' EXIT\n" + "\n".join(blocks).replace("2>&1 &\n", "2>&1 &\nwfm=$!\nsleep 3\n")
        env = dict(os.environ, **engine.env, PATH=f"{folder}/bin:{os.environ['PATH']}", MARGO_CONFIG=f"{folder}/etc/agent.yaml",
                   RUNTIME_DIRECTORY=f"{folder}/run", PYTHONDONTWRITEBYTECODE="")
        start = time.monotonic()
        done = subprocess.run(["sh", "-c", script], cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              universal_newlines=True, timeout=300)
        self.assertEqual(done.returncode, 0, done.stdout)
        self.assertRegex(done.stdout, r"(?s)\nok +wfm .*\nenrolled: .*\nHello line 4\n.*\nupdate +5c6c2d8e")
        page = support.fetch(8080)
        self.assertEqual(page, "Good evening")
        for command, words in (("status tally", r"(?m)^running +tally-\S+-web-1 since 20\S+Z  docker.io/library/busybox:1.36  ports 127.0.0.1:8080/tcp$"),
                               ("history", r"\A20\S+Z  version 3  changed tally  applied\n20\S+Z  version 2  added tally  applied\n")):
            shown = subprocess.run([f"{folder}/bin/margo-agent", *command.split()], env=env, stdout=subprocess.PIPE, universal_newlines=True, timeout=support.LIMIT).stdout
            self.assertRegex(shown, words)
        sys.__stderr__.write(f"\nnewcomer: {time.monotonic() - start:.0f} s from an empty folder to an application with a parameter\n")


if __name__ == "__main__":
    unittest.main()
