"""Nothing from outside steers a terminal, whatever it stands in (issue: No injection; security 2.1)."""
import contextlib
import io
import itertools
import json
import os
import pty
import subprocess
import sys
import unittest
from unittest import mock

import margo_agent
from tests import support
from tests.test_gateway import make_child
from tests.test_packages import Site

ODD = "\x1b[2J\x9b2J\u202e\u2028\x07\x7f\n--option\r"
# What shows texts that came from outside, or were made of them.
SHOWN = (["status"], ["status", "--json"], ["status", "hello"], ["history"], ["history", "--json"], ["doctor"], ["doctor", "--json"])


def list_texts(value, path=()):
    """The paths of all texts below a value of JSON."""
    if isinstance(value, str):
        return [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, item in items for found in list_texts(item, path + (key,))]


def spoil(value, path):
    """A copy of a value with the text at a path made odd."""
    value = json.loads(json.dumps(value))
    home = value
    for key in path[:-1]:
        home = home[key]
    home[path[-1]] += ODD
    return value


class Terminal(support.DeviceCase):
    def show(self, *arguments):
        """(exit code, what a command prints) in this process."""
        output = io.TextIOWrapper(io.BytesIO(), "utf-8")
        with mock.patch.dict(os.environ, self.device.env), contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            code = margo_agent.main(["-c", self.device.config_file, *arguments])
        output.flush()
        return code, output.buffer.getvalue().decode("utf-8", "surrogateescape")

    def assert_calm(self, *arguments):
        """Fails unless a command ends without a bug, and prints nothing but printable lines."""
        code, text = self.show(*arguments)
        self.assertNotEqual(code, 70, text)
        odd = {character for character in text if not character.isprintable()} - {"\n"}
        self.assertEqual(odd, set(), text)
        return text

    def test_no_text_of_the_state_reaches_a_terminal_raw(self):
        self.wfm.publish(support.make_deployment(components=(("web", "9.9.9"),), registry=self.wfm.registry))
        self.device.cycle(1)
        whole = self.device.state()
        self.assertIn("failed", self.device.run("status").stdout)
        store = margo_agent.Store(self.device.state_dir)
        seen = 0
        for path in list_texts(whole):
            if path[0] in ("trust", "crls", "est"):         # checked as they are read
                continue
            store.saved = None
            data = margo_agent.make_json(spoil(whole, path))
            support.write(store.path("state.json"), data.decode("utf-8"))
            for arguments in SHOWN[:5]:
                with self.subTest(path=path, command=arguments):
                    seen += "\\x1b[2J" in self.assert_calm(*arguments)
        self.assertGreater(seen, 10)
        support.write(store.path("state.json"), json.dumps(whole))
        for arguments in SHOWN:
            self.assert_calm(*arguments)

    def test_no_text_of_the_memo_reaches_a_terminal_raw(self):
        self.device.cycle()
        with mock.patch.dict(os.environ, self.device.env):
            path = margo_agent.Store(self.device.state_dir).memo_path()
        support.write(path, json.dumps({"lastPoll": {"at": ODD, "result": ODD, "detail": ODD}}))
        for arguments in SHOWN:
            with self.subTest(arguments):
                self.assert_calm(*arguments)

    def test_what_containers_write_is_shown_without_what_steers(self):
        """`logs` at a terminal; into a file or a pipe it is the engine's own output."""
        script = os.path.join(support.make_folder(self), "podman")
        support.write(script, "#!/bin/sh\nprintf 'a\\033[2J\\302\\2332J\\tb\\n\\377c'\nexit 3\n", 0o755)
        main, terminal = pty.openpty()
        code = ("import os, sys; sys.path.insert(0, sys.argv[1]); import margo_agent as m\n"
                "reader, writer = os.pipe()\n"
                "if not os.fork():\n    os.dup2(writer, 1)\n    os.execv(sys.argv[2], ['podman'])\n"
                "os.close(writer)\nsys.exit(m.show_lines(reader))")
        done = subprocess.run([sys.executable, "-c", code, support.ROOT, script], stdout=terminal, timeout=support.LIMIT)
        os.close(terminal)
        text = os.read(main, 4096).decode()
        os.close(main)
        self.assertEqual((done.returncode, text), (3, "a\\x1b[2J\\x9b2J\tb\r\n\ufffdc\r\n"))


VALUES = ["-x", "--privileged", "a\nb: c", "a\0b", "\x1b[2Jx", "../../../x", "%0d%0aX-Odd: y", "$(touch x)", "x" * (1 << 20)]
# What an author writes into a compose file: {name: function of the odd value to keys of the service}.
KEYS = {
    "image": lambda odd: {"image": odd}, "image's tag": lambda odd: {"image": f"localhost/a:{odd}"}, "hostname": lambda odd: {"hostname": odd},
    "user": lambda odd: {"user": odd}, "working_dir": lambda odd: {"working_dir": odd}, "command": lambda odd: {"command": [odd, "x"]},
    "entrypoint": lambda odd: {"entrypoint": [odd, "x"]}, "environment": lambda odd: {"environment": {"A": odd}},
    "a variable's name": lambda odd: {"environment": {odd: "x"}}, "a label": lambda odd: {"labels": {"x": odd}}, "a label's name": lambda odd: {"labels": {odd: "x"}},
    "stop_signal": lambda odd: {"stop_signal": odd}, "platform": lambda odd: {"platform": odd}, "dns": lambda odd: {"dns": [odd]},
    "extra_hosts": lambda odd: {"extra_hosts": [f"{odd}:1.2.3.4"]}, "tmpfs": lambda odd: {"tmpfs": [odd]}, "ports": lambda odd: {"ports": [odd]},
    "a volume": lambda odd: {"volumes": [f"{odd}:/x"]}, "a mount's target": lambda odd: {"volumes": [{"type": "tmpfs", "target": odd}]},
    "a health check": lambda odd: {"healthcheck": {"test": ["CMD", odd]}}, "an alias": lambda odd: {"networks": {"default": {"aliases": [odd]}}},
    "restart": lambda odd: {"restart": odd}, "pull_policy": lambda odd: {"pull_policy": odd}, "group_add": lambda odd: {"group_add": [odd]},
    "cap_drop": lambda odd: {"cap_drop": [odd]}, "logging": lambda odd: {"logging": {"driver": odd}}, "a limit": lambda odd: {"ulimits": {odd: 5}},
    "sysctls": lambda odd: {"sysctls": {"net.core.somaxconn": odd}}, "network_mode": lambda odd: {"network_mode": odd}, "mem_limit": lambda odd: {"mem_limit": odd}}
# Where a WFM writes one: the path in the document.
MEMBERS = [("id",), ("metadata", "name"), ("metadata", "namespace"), ("metadata", "deviceId"), ("spec", "applicationId"),
           ("spec", "deploymentProfile", "type"), ("spec", "deploymentProfile", "components", 0, "name"),
           ("spec", "deploymentProfile", "components", 0, "properties", "repository"),
           ("spec", "deploymentProfile", "components", 0, "properties", "revision"), ("spec", "parameters", "greeting", "value"),
           ("spec", "parameters", "greeting", "targets", 0, "pointer"), ("spec", "parameters", "greeting", "targets", 0, "components", 0)]
WHOLE = os.environ.get("MARGO_TEST_SLOW") == "1"


class Table(support.DeviceCase):
    """Issue: No injection. Every place where a value comes from outside, with each spelling that somebody could take for something else."""

    def setUp(self):
        super().setUp()
        self.count = 0
        self.try_value("good", "x", {}, None)
        self.known = self.options()
        self.assertLessEqual({"--label", "--network"}, self.known)

    def options(self):
        """The options in the command lines of the engine since they were last forgotten, each up to its value: none takes the word after it."""
        found = set()
        for call in self.engine.calls():
            own = itertools.takewhile(lambda word: word[:1] == "-", call[1:]) if call[0] == "create" else call
            found |= {word.partition("=")[0] for word in own if word[:1] == "-"}
        return found

    def try_value(self, place, odd, keys, path):
        """One cycle with an odd value in one place: the log, once it is known to be one of printable lines of our own."""
        self.count += 1
        service = dict({"image": support.IMAGE, "command": ["sleep", "100"], "environment": ["GREETING"]}, **keys)
        self.wfm.add_package(support.make_compose({"main": service}), tag=f"2.0.{self.count}")
        text = support.make_deployment(components=(("web", f"2.0.{self.count}"),), registry=self.wfm.registry, parameters={"GREETING": "x"})
        if path:
            value = json.loads(text)
            home = value
            for key in path[:-1]:
                home = home[key]
            home[path[-1]] = odd
            text = json.dumps(value)
        self.wfm.publish(text)
        self.engine.forget_calls()
        self.device.run("retry")
        output = io.TextIOWrapper(io.BytesIO(), "utf-8", "surrogateescape")
        with mock.patch.dict(os.environ, self.device.env), contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            code = margo_agent.main(["-c", self.device.config_file, "run", "--once"])
        output.flush()
        log = output.buffer.getvalue().decode("utf-8", "surrogateescape")
        self.assertIn(code, (0, 1, 3, 4), log[-2000:])
        for line in log.splitlines():
            self.assertRegex(line[:60], r"^(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ (info|warning|error) )", place)
            self.assertTrue(line.isprintable(), (place, line))
            self.assertLess(len(line), 20000, place)
        return log

    def check(self, place, odd, keys, path=None):
        """The engine gets no option, and the WFM and the registry no request, that a good value would not have brought."""
        with self.subTest(place=place, odd=odd[:20]):
            asked = len(self.wfm.requests("listening")) + len(self.wfm.requests("registry"))
            self.try_value(place, odd, keys, path)
            self.assertLessEqual(self.options(), self.known | self.OWN, place)
            for call in self.engine.calls():
                self.assertFalse([word for word in call if "\0" in word or len(word) > 200000])
            requests = (self.wfm.requests("listening") + self.wfm.requests("registry"))[asked:]
            self.assertFalse([path for _, path, _ in requests if "X-Odd" in path or "\n" in path or "/../" in path or len(path) > 1000])
            self.assertFalse(os.path.exists("x"))

    # Options that some key brings whatever its value.
    OWN = {f"--{name}" for name in (
        "hostname user workdir entrypoint stop-signal platform dns add-host tmpfs publish volume mount health-cmd restart group-add cap-drop ulimit"
        " log-driver sysctl network network-alias memory memory-swap format time force volumes ignore filter quiet policy").split()}

    def test_what_an_author_writes(self):
        rows = [(place, odd, make(odd)) for place, make in KEYS.items() for odd in VALUES]
        for place, odd, keys in rows if WHOLE else rows[::7]:
            self.check(place, odd, keys)

    def test_what_a_wfm_writes(self):
        rows = [(path, odd) for path in MEMBERS for odd in VALUES]
        for path, odd in rows if WHOLE else rows[::5]:
            self.check(".".join(map(str, path)), odd, {}, path)

    def test_what_servers_answer(self):
        """Texts of problems, and headers."""
        for odd in VALUES[:-1]:
            for entry in ({"method": "GET", "path": "/api/v1/deployments", "status": 400, "problem": {"type": odd, "title": odd, "detail": odd, "status": 400}},
                          {"method": "PUT", "path": "/api/v1/*", "status": 503, "body": odd}):
                self.wfm.fault(entry)
                self.try_value("problem", odd, {}, None)
        self.wfm.fault()

    def test_what_a_registry_says_of_its_login(self):
        """The realm, the service and the scope of a challenge: a request goes to the realm alone, and is one request."""
        registry, elsewhere = Site(self), Site(self)
        config = margo_agent.make_config({"state_dir": self.device.folder, "wfm": {"url": "https://x"}, "registries": {registry.host: {"insecure": True}},
                                          "identity": {"certificate": "c", "key": "k", "trust_bundle": "b"}}, "/", {})
        for odd in VALUES[:-1] + ["x" * 10000, "\xe9", "\r\nX-Odd: y"]:
            for realm in (odd, registry.url + odd, f"{registry.url}/{odd}", f"http://{odd}@{elsewhere.host}/", f"http://{elsewhere.host}/#{odd}", f"file:///{odd}"):
                challenge = [("bearer", {"realm": realm, "service": odd, "scope": odd})]
                log = io.StringIO()
                with self.subTest(realm=realm[:60]), contextlib.redirect_stderr(log):
                    with self.assertRaises(margo_agent.ComponentError) as caught:
                        margo_agent.Registry(registry.host, config).authenticate(challenge, "web")
                    self.assertEqual(caught.exception.code, "PULL_UNAUTHORIZED")
                    self.assertTrue(log.getvalue().replace("\n", "").isprintable() and log.getvalue().count("\n") < 2, log.getvalue())
        for path, headers in registry.seen + elsewhere.seen:
            self.assertRegex(path, r"\A/[!-~]*\Z")
            self.assertEqual((headers.get("X-Odd"), headers.get("Authorization")), (None, None))

    def test_what_becomes_the_id_of_a_child_device(self):
        """In the configuration of a gateway, and behind the gateway's own id in a document."""
        child = support.FakeEngine(self)
        connection = {"CONTAINER_HOST": "unix:///a", "FAKE_PODMAN": child.folder}
        for odd in VALUES[:-1] + ["..", "a/../b", "a//b", "a b", "*"]:
            self.device.set("device.children", [make_child(odd, connection)])
            taken = odd in ("-x", "--privileged")   # which are paths, labels and refs like any other
            for command in (["run", "--once"], ["capabilities"], ["status"]):
                code, text = Terminal.show(self, *command)
                self.assertEqual(code, 0 if taken else 2, (odd, text))
                self.assertTrue(text.replace("\n", "").isprintable(), text)
        for call in child.calls():
            self.assertFalse([word for word in call if word.startswith(("-x", "--privileged"))], call)
        self.device.set("device.children", [make_child("a", connection)])
        for odd in VALUES if WHOLE else VALUES[::3]:
            for wanted in (f"{support.DEVICE}/{odd}", f"{support.DEVICE}/a/{odd}", f"{support.DEVICE}/*{odd}", f"{odd}/a"):
                self.check("metadata.deviceId", wanted, {}, ("metadata", "deviceId"))
        self.assertEqual(child.containers(), {})

    def test_what_becomes_a_ref_or_a_path_of_git(self):
        """Device ids and settings: what git would take for an option, a refspec or another ref is spelt otherwise or refused."""
        support.require("git")
        for odd in ["-x", "..", "a..b", "a.lock", ".a", "a/.b", "~", "a~1", "@", "a.", "x" * 200]:
            if margo_agent.re.fullmatch(margo_agent.DEVICE_ID_PATTERN, odd):
                ref = f"refs/heads/status/{margo_agent.make_ref_path(odd)}"
                self.assertEqual(subprocess.run(["git", "check-ref-format", ref]).returncode, 0, odd)
        for odd in VALUES:
            for key in ("git.branch", "git.path", "wfm.url"):
                if (key, odd) in {("git.branch", "x" * (1 << 20)), ("git.path", "-x"), ("git.path", "--privileged"), ("git.path", "\x1b[2Jx")}:
                    continue
                section, _, name = key.partition(".")
                settings = {"state_dir": "s", "wfm": {"profile": "git", "url": "https://g.example/r.git"}, section: {name: odd}}
                settings["wfm"] = dict({"profile": "git", "url": "https://g.example/r.git"}, **settings["wfm"])
                path = support.write(os.path.join(self.device.folder, "odd.yaml"), json.dumps(settings))
                try:
                    value = margo_agent.load_config(path, {})[section][name]
                except margo_agent.ConfigError:
                    continue
                self.assertFalse(value[:1] == "-" or "\n" in value or "\0" in value or ".." in value.split("/"), (key, odd))


class Charts(support.DeviceCase):
    """What a WFM writes into a deployment of Helm: no value becomes an option, a command or another chart."""

    HELM = ("#!/bin/sh\nprintf '%s\\0' \"$@\" >> {folder}/calls\nprintf '\\n\\0' >> {folder}/calls\n"
            "case $1 in list) echo '[]' ;; upgrade) echo '{{\"version\": 1}}' ;; esac\n")
    MEMBERS = [("metadata", "name"), ("metadata", "namespace"), ("spec", "deploymentProfile", "components", 0, "name"),
               ("spec", "deploymentProfile", "components", 0, "properties", "repository"),
               ("spec", "deploymentProfile", "components", 0, "properties", "revision"), ("spec", "parameters", "greeting", "value"),
               ("spec", "parameters", "greeting", "targets", 0, "pointer")]

    def setUp(self):
        super().setUp()
        self.folder = support.make_folder(self)
        support.write(os.path.join(self.folder, "helm"), self.HELM.format(folder=self.folder), 0o755)
        chart = b"a chart"
        layer = {"mediaType": margo_agent.CHART_LAYER, "digest": support.digest(chart), "size": len(chart)}
        manifest = json.dumps({"schemaVersion": 2, "config": {"mediaType": margo_agent.CHART_CONFIG}, "layers": [layer]}).encode()
        self.site = Site(self, {"/v2/charts/web/manifests/1.0.0": (200, {"Docker-Content-Digest": support.digest(manifest)}, manifest),
                                f"/v2/charts/web/blobs/{layer['digest']}": (200, {}, chart)})
        self.device.settings["registries"][self.site.host] = {"insecure": True}
        self.device.settings["runtime"].update(helm=os.path.join(self.folder, "helm"), kubeconfig=os.path.join(self.folder, "kubeconfig"))
        self.device.save()

    def try_value(self, path=(), odd=None):
        """The command lines of helm in one cycle with an odd value at a path of the document."""
        value = json.loads(support.make_deployment(registry=self.wfm.registry, parameters={"GREETING": "x"}))
        profile = value["spec"]["deploymentProfile"]
        profile["type"] = "helm"
        profile["components"][0]["properties"].update(repository=f"oci://{self.site.host}/charts/web", revision="1.0.0")
        home = value
        for key in path[:-1]:
            home = home[key]
        if path:
            home[path[-1]] = odd
        self.wfm.publish(json.dumps(value))
        self.device.run("retry")
        open(os.path.join(self.folder, "calls"), "w").close()
        code, text = Terminal.show(self, "run", "--once")
        self.assertIn(code, (0, 1, 3, 4), text[-2000:])
        for line in text.splitlines():
            self.assertTrue(line.isprintable() and len(line) < 20000, (path, line[:500]))
        with open(os.path.join(self.folder, "calls")) as file:
            return [call.split("\0")[:-1] for call in file.read().split("\n\0")[:-1]]

    def test_what_a_wfm_writes(self):
        names = lambda calls: {(call[0], word.partition("=")[0]) for call in calls for word in call if word[:1] == "-"}
        good = self.try_value()
        self.assertEqual([call[0] for call in good if call[0] != "list"], ["upgrade"])
        known = names(good) | {("uninstall", "--namespace"), ("uninstall", "--wait"), ("uninstall", "--timeout"), ("list", "--filter")}
        rows = [(path, odd) for path in self.MEMBERS for odd in VALUES]
        made = 0
        for path, odd in rows if WHOLE else rows[::4]:
            with self.subTest(path=path, odd=odd[:20]):
                calls = self.try_value(path, odd)
                self.assertLessEqual(names(calls), known)
                for call in calls:
                    plain = [word for word in call[1:] if word[:1] != "-"]
                    made += call[0] == "upgrade"
                    self.assertLessEqual(len(plain), 2, call)
                    for word in plain:
                        self.assertRegex(word, r"\A([a-z0-9][a-z0-9-]*|/\S+/artifacts/sha256-[0-9a-f]{64})\Z")
                    self.assertFalse([word for word in call if "greeting" in word or "touch" in word or ".." in word], call)
        self.assertGreater(made, 2)
        for path, _ in self.site.seen:
            self.assertRegex(path, r"\A/v2/[!-~]*\Z")
            self.assertNotIn("..", path)


if __name__ == "__main__":
    unittest.main()
