"""Secrets: a canary for each, and a search for it wherever a whole life of a device leaves something.

The device enrolls with a token, installs a package from a registry that wants a password, with parameters, updates, fails, is asked
about everything, and is unenrolled; all under umask 000 and strace.  What any program was started with, what was written and where, what
was printed, what the WFM was told, and what lies on the disk is looked through.
"""
import base64
import json
import os
import re
import stat
import subprocess
import unittest

from tests import support
from tests.test_enrollment import Site, read

PARAMETERS = ("canary-parameter-1", "canary-parameter-2")
TOKEN = "cell:canary-token"
PASSWORD = "canary-password"
CALLS = "execve,openat,write,writev,pwrite64"


def encode(text):
    """Base64 as it would stand in a header."""
    return base64.b64encode(text.encode()).decode().rstrip("=")


class Life(Site):
    @classmethod
    def start_services(cls):
        support.require("strace", "openssl")
        cls.password = support.write(cls.pki.path("password"), PASSWORD + "\n", 0o600)
        cls.mis = support.Mis(cls.shared, cls.pki, *cls.options)
        cls.wfm = support.Wfm(cls.shared, cls.pki, "--registry-token", f"robot:{cls.password}")

    def setUp(self):
        super().setUp()
        self.engine = support.FakeEngine(self)
        self.device = self.make_device(TOKEN)
        self.device.env.update(self.engine.env, TMPDIR=os.path.join(self.device.folder, "tmp"))
        os.mkdir(self.device.env["TMPDIR"])
        self.device.settings["runtime"] = {"engine": "podman", "settle": "0s", "on_failure": "keep"}
        self.device.settings["registries"] = {self.wfm.registry: {"ca": self.pki.path("site-ca.pem"), "username": "robot",
                                                                 "password_file": self.password}}
        self.device.save()
        self.printed, self.traces = [], []

    def run_traced(self, *arguments, expected=(0,)):
        """One command of the agent under strace; its output goes to files, so that writes to them are told from others."""
        number = len(self.traces)
        paths = [os.path.join(self.device.folder, f"{kind}-{number}") for kind in ("trace", "stdout", "stderr")]
        argv = ["strace", "-f", "-qq", "-y", "-v", "-s", "100000", "-e", f"trace={CALLS}", "-o", paths[0]] + self.device.command(*arguments)
        with open(paths[1], "wb") as stdout, open(paths[2], "wb") as stderr:
            done = subprocess.run(argv, env=self.device.env, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, timeout=300,
                                  preexec_fn=lambda: os.umask(0))
        self.assertIn(done.returncode, expected, read(paths[2]).decode())
        self.traces.append((arguments, read(paths[0]).decode("utf-8", "replace")))
        self.printed += [(arguments, read(path).decode("utf-8", "replace")) for path in paths[1:]]
        for path in paths:
            os.remove(path)

    def publish(self, value, **service):
        """A revision of the package and of the deployment that gives it a parameter."""
        self.count = getattr(self, "count", 0) + 1
        compose = {"services": {"main": dict({"image": f"{self.wfm.registry}/app:{self.count}", "environment": ["SECRET"],
                                              "labels": {"x": "y"}}, **service)}}
        self.wfm.add_package(json.dumps(compose), tag=f"{self.count}.0.0")
        self.wfm.publish(support.make_deployment(components=[("web", f"{self.count}.0.0")], registry=self.wfm.registry, parameters={"SECRET": value}))

    def find_written(self, canaries):
        """{path: its mode when it was made or None} of what a canary was written to, apart from pipes and what was printed."""
        found = {}
        for _, trace in self.traces:
            modes = dict(re.findall(r'openat\([^,]+, "([^"]+)", [A-Z_|]*O_CREAT[A-Z_|]*, (0[0-7]*)', trace))
            for line in trace.splitlines():
                match = re.search(r" (?:write|writev|pwrite64)\(\d+<(/[^>]*)>", line)
                if match and any(canary in line for canary in canaries):
                    path = match.group(1).replace(" (deleted)", "")
                    if os.path.basename(path).startswith(("stdout-", "stderr-")):
                        continue                    # what is printed is looked at by itself
                    mode = modes.get(path, modes.get(os.path.basename(path)))
                    found[path] = None if mode is None else int(mode, 8)
        return found

    def find_files(self, *canaries):
        """{path: mode} of files of the device, and of temporary ones, that hold a canary."""
        found = {}
        for top in (self.device.folder, "/dev/shm"):
            for folder, _, names in os.walk(top):
                for path in [os.path.join(folder, name) for name in names]:
                    with open(path, "rb") if os.path.isfile(path) and (top != "/dev/shm" or "margo" in path) else open(os.devnull, "rb") as file:
                        data = file.read()
                    if any(canary.encode() in data for canary in canaries):
                        found[path] = stat.S_IMODE(os.stat(path).st_mode)
        return found

    def live(self):
        """The whole life; ends where nothing is left to remove."""
        self.publish(PARAMETERS[0])
        self.run_traced("-v", "enroll")
        self.run_traced("-v", "run", "--once")
        self.key = [line for line in read(self.device.key).decode().splitlines() if not line.startswith("-")][1]
        self.held = self.find_files(*PARAMETERS)
        self.logins = self.find_files(PASSWORD, encode(f"robot:{PASSWORD}"), "canary-token")
        self.publish(PARAMETERS[1])
        self.run_traced("-v", "--log-format", "json", "run", "--once")
        self.publish(PARAMETERS[1], ports=["${SECRET}"])                        # a fault that names the value
        self.run_traced("-v", "run", "--once", expected=(1,))
        self.publish(PARAMETERS[0], restart="${SECRET}", depends_on=["${SECRET}"])
        self.run_traced("-v", "run", "--once", expected=(1,))
        self.engine.change(uncreatable=True)
        self.publish(PARAMETERS[0])
        self.run_traced("-v", "run", "--once", expected=(0, 1))
        self.engine.change(uncreatable=False)
        for arguments in (["status"], ["status", "--json"], ["status", support.HELLO], ["history", "--json"], ["plan"], ["config"], ["doctor"], ["retry"],
                          ["capabilities"], ["logs", support.HELLO]):
            self.run_traced("-v", *arguments, expected=(0, 1, 2, 3, 4, 5))
        self.wfm.withdraw()
        self.run_traced("-v", "run", "--once")
        self.run_traced("-v", "unenroll", "--purge")

    def test_no_secret_goes_astray_in_a_whole_life(self):
        """C-018, C-169, E-044; cases 7.1 to 7.5."""
        self.live()
        secrets = {"token": ["canary-token", encode(TOKEN)], "password": [PASSWORD, encode(f"robot:{PASSWORD}")],
                   "key": [self.key], "parameter": list(PARAMETERS)}
        for name, canaries in secrets.items():
            with self.subTest(name):
                self.check(name, canaries)

    def check(self, name, canaries):
        """Nothing of a secret is where it may not be."""
        own = {"token": [self.device.token], "password": [self.password], "key": [self.device.key]}.get(name, [])
        started = [line[:300] for _, trace in self.traces for line in trace.splitlines()
                   if "execve(" in line and any(canary in line for canary in canaries)]
        self.assertEqual(started, [], "in the arguments or the environment of a program")
        for arguments, text in self.printed:
            if "logs" in arguments:
                text = text.replace(f"SECRET={PARAMETERS[1]}", "")      # what the application itself has printed
            self.assertFalse([canary for canary in canaries if canary in text], f"printed by {arguments}: {text[:2000]}")
        told = json.dumps([[item.get("body") for item in self.wfm.lines("requests.jsonl")], self.wfm.lines("statuses.jsonl"),
                           self.mis.lines("requests.jsonl")])
        self.assertFalse([canary for canary in canaries if canary in told], "told to the WFM or the identity service")
        for path, mode in self.find_written(canaries).items():
            inside = path.startswith(self.device.state_dir + "/") or path.startswith(self.engine.folder) or path in own
            self.assertTrue(inside or path.rpartition(".")[0] in own, f"written to {path}")
            if mode is not None and not path.startswith(self.engine.folder):
                self.assertEqual(mode & 0o077, 0, f"{path} is made with mode {mode:o}")
        self.assertEqual({path: mode for path, mode in self.find_files(*canaries).items() if path not in own}, {}, "left behind")
        self.assertEqual(self.logins, {}, "kept between two cycles")
        if name == "parameter":
            self.assertTrue(self.held)
            self.assertEqual([path for path, mode in self.held.items() if mode & 0o077], [])

    def test_what_is_astray_is_found(self):
        """The search itself."""
        self.traces = [((), '1 execve("/x", ["x", "canary-token"], ["A=b"]) = 0\n'
                        '1 openat(AT_FDCWD, "/elsewhere", O_WRONLY|O_CREAT|O_CLOEXEC, 0644) = 3</elsewhere>\n1 write(3</elsewhere>, "canary-token", 12) = 12\n')]
        self.assertEqual(self.find_written(["canary-token"]), {"/elsewhere": 0o644})
        with self.assertRaises(AssertionError):
            self.check("token", ["canary-token"])
        self.traces = []
        path = support.write(os.path.join(self.device.state_dir, "left"), "canary-token")
        self.assertEqual(self.find_files("canary-token"), {path: 0o644, self.device.token: 0o600})


class RealEngine(support.EngineCase):
    """The same on a real podman, whose own helpers are looked at, too."""

    def run_traced(self, *arguments):
        """One command of the agent, and every program that is started below it for as long as it lives: {(arguments, environment)}."""
        support.require("strace")
        path = os.path.join(self.device.folder, f"trace-{len(arguments)}-{self.revision}")
        argv = ["strace", "-D", "-f", "-qq", "-v", "-s", "100000", "-e", "trace=execve", "-o", path] + self.device.command(*arguments)
        with open(path + ".log", "w+b") as file:        # the tracer outlives the agent, as the container does
            done = subprocess.run(argv, env=self.device.env, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, timeout=120)
        log = read(path + ".log").decode("utf-8", "replace")
        self.assertEqual(done.returncode, 0, log)
        found = re.findall(r'execve\("([^"]*)", \[(.*)\], \[(.*)\]\)', read(path).decode("utf-8", "replace"))
        self.assertTrue(any(program.endswith("/podman") for program, _, _ in found))
        return found, log

    def test_parameters_reach_the_container_and_no_command_line(self):
        """Case 7.1: neither the engine nor what it starts is told a value by its arguments; the environment has it in the container alone."""
        own = ("sleep", "/bin/sleep")
        for self.revision, value in enumerate(PARAMETERS, 1):
            service = {"image": support.IMAGE, "init": False, "command": ["sleep", "100000"], "environment": ["SECRET"]}
            self.wfm.add_package(support.make_compose({"main": service}), tag=f"{self.revision}.0.0")
            self.wfm.publish(support.make_deployment(components=[("web", f"{self.revision}.0.0")], registry=self.wfm.registry,
                                                     parameters={"SECRET": value}))
            started, log = self.run_traced("-v", "run", "--once")
            self.assertNotIn("canary", log)
            self.assertEqual([program for program, words, _ in started if "canary" in words], [])
            self.assertEqual({program for program, words, environ in started if "canary" in environ and words.split('"')[1] not in own}, set())
            name, = self.engine.containers()
            self.assertIn(f"SECRET={value}", self.engine.podman("exec", name, "env"))
            self.assertNotIn("canary", self.engine.podman("inspect", "--format", "{{.Config.CreateCommand}}", name))
        self.wfm.withdraw()
        self.run_traced("run", "--once")
        left = subprocess.run(["grep", "-rl", "canary-parameter", self.engine.folder, self.device.state_dir], stdout=subprocess.PIPE)
        left = [path for path in left.stdout.decode().split() if os.stat(path).st_mode & 0o077]
        self.assertEqual(left, [])                  # podman's own database forgets by reuse alone, the last documents are kept: both 0600


if __name__ == "__main__":
    unittest.main()
