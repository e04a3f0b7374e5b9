"""Compose driver: how a start is judged, and what the engine is told and when."""
import hashlib
import json
import os
import re
import socket
import stat
import time
import unittest
from unittest import mock

import margo_agent
from tests import fake_podman, support
from tests.oracle import ABSENT
from tests.test_compose_file import IMAGE, MARKS, OWNER, PROJECT, FileCase, make_config, make_document


# Judging a start

class JudgeStartup(unittest.TestCase):
    def test_where_a_start_stands(self):
        """C-163, C-164, C-165, P-6, P-17: decided from what the engine shows, once-only services included.

        E17: a code is told only of what has ended.
        """
        unwell = {"one": "one is not healthy yet"}
        cases = [
            # what is seen of `one`, its health, failure, what is waited for, finished
            (("running",), "", None, {}, set()),
            (("running",), "starting", None, unwell, set()),
            (("running",), "healthy", None, {}, set()),
            (("running",), "unhealthy", "service one is unhealthy", {}, set()),
            (("exited",), "", None, {}, {"one"}),
            (("exited",), "unhealthy", None, {}, {"one"}),
            (("stopped",), "", None, {}, {"one"}),
            (("exited", 3), "", "service one exited with code 3", {}, set()),
            (("exited", 137), "healthy", "service one exited with code 137", {}, set()),
            (("stopped", 1), "", "service one exited with code 1", {}, set()),
            (("dead", 1), "", "service one exited with code 1", {}, set()),
            (("running", 0, 2), "", "service one exited (2 restarts)", {}, set()),
            (("running", 0, 1), "unhealthy", "service one exited (1 restarts)", {}, set()),
            (("restarting", 1, 1), "", "service one exited (1 restarts)", {}, set()),
            (("exited", 3, 1), "", "service one exited with code 3 (1 restarts)", {}, set()),
            (("created",), "starting", None, {"one": "one is created"}, set()),
            (("initialized",), "", None, {"one": "one is initialized"}, set()),
            (("configured",), "", None, {"one": "one is configured"}, set()),
            (("paused",), "", None, {"one": "one is paused"}, set()),
            (None, "", "the container of service one is gone: somebody removed it", {}, set())]
        for facts, health, words, waiting, finished in cases:
            with self.subTest(facts=facts, health=health):
                failure, *found = margo_agent.judge_startup(
                    ["one"], {"one": margo_agent.Shown(*facts)._replace(health=health)} if facts else {})
                self.assertEqual(found, [waiting, finished])
                code = "UNHEALTHY" if words and words.endswith("unhealthy") else "INSTALL_FAILED"
                self.assertEqual(failure, ("one", code, words) if words else None)

    def judge(self, names, **states):
        return margo_agent.judge_startup(names, {name: margo_agent.Shown(*facts) for name, facts in states.items()})

    def test_one_failure_is_enough(self):
        failure, _, _ = self.judge("abc", a=("running",), b=("created",), c=("exited", 5))
        self.assertEqual(failure, ("c", "INSTALL_FAILED", "service c exited with code 5"))

    def test_every_service_is_waited_for(self):
        found = self.judge("abc", a=("created",), b=("running", 0, 0, "starting"), c=("exited", 0))
        self.assertEqual(found, (None, {"a": "a is created", "b": "b is not healthy yet"}, {"c"}))

    def test_what_has_to_end_is_waited_for_though_it_runs(self):
        facts = {"a": margo_agent.Shown("running"), "b": margo_agent.Shown("exited")}
        self.assertEqual(margo_agent.judge_startup("ab", facts, complete=True), (None, {"a": "a has not ended"}, {"b"}))

    def test_containers_of_others_do_not_count(self):
        self.assertEqual(self.judge("a", a=("running",), b=("exited", 1)), (None, {}, set()))


class Logs(unittest.TestCase):
    """The end of a log, as an error tells it."""

    def merge(self, said, errors):
        streams = ["".join(f"2026-11-28T10:00:{second:02}.000000000Z {text}\n" for second, text in lines) for lines in (said, errors)]
        return margo_agent.merge_logs(*(stream.encode() for stream in streams)).split("\n")

    def test_both_streams_are_told_in_their_order(self):
        self.assertEqual(self.merge([(1, "a"), (3, "c d")], [(2, "b"), (4, "e")]), ["a", "b", "c d", "e"])
        self.assertEqual(self.merge([], []), [""])
        self.assertEqual(self.merge([(1, "a"), (1, "b")], []), ["a", "b"])

    def test_twenty_lines_and_of_each_stream_the_last_ten(self):
        """A program that talks a lot on one stream and says on the other why it ends."""
        many = [(number, f"out {number}") for number in range(1, 51)]
        self.assertEqual(self.merge(many, []), [f"out {number}" for number in range(31, 51)])
        self.assertEqual(self.merge(many, [(3, "why")]), ["why"] + [f"out {number}" for number in range(32, 51)])
        found = self.merge(many, [(2, f"err {number}") for number in range(30)])
        self.assertEqual(found, [f"err {number}" for number in range(20, 30)] + [f"out {number}" for number in range(41, 51)])


class Masking(unittest.TestCase):
    def test_a_value_is_masked_however_it_is_spelt(self):
        """D-35: a tool's words come with control characters escaped, and tools quote a text of several lines line by line."""
        secret = "first line\n\tsecond"
        for text in (secret, margo_agent.make_printable(secret), "error at:\n  first line\n\tsecond"):
            masked = margo_agent.mask(text, [secret])
            self.assertFalse("first" in masked or "second" in masked, masked)
        self.assertEqual(margo_agent.mask("a word", ["a"]), "a word")


class Finding(FileCase):
    def make_environ(self, *names, **more):
        """An environment in whose PATH these programs are."""
        for name in names:
            support.write(os.path.join(self.folder, "-".join(names), name), "#!/bin/sh\n", 0o755)
        return dict({"PATH": os.path.join(self.folder, "-".join(names) or "none"), "HOME": self.folder}, **more)

    def test_the_engine_is_what_is_installed(self):
        socket = {"DOCKER_HOST": "unix:///x"}
        for setting, names, more, expected in (
                ("auto", ("podman",), {}, "podman"), ("auto", ("podman", "docker"), socket, "podman"),
            ("auto", ("docker",), socket, "docker"),
                ("auto", (), socket, None), ("podman", ("docker",), socket, None),
            ("docker", ("podman", "docker"), {}, "docker"),
                ("docker", ("podman",), socket, None), ("podman", ("podman",), {}, "podman")):
            with self.subTest(setting=setting, names=names):
                self.assertEqual(margo_agent.find_engine(setting, self.make_environ(*names, **more)), expected)

    def test_docker_without_a_daemon_is_not_taken_by_itself(self):
        if os.path.exists("/var/run/docker.sock"):
            self.skipTest("a Docker daemon runs here")
        self.assertIsNone(margo_agent.find_engine("auto", self.make_environ("docker")))

    def test_no_driver_where_nothing_runs_compose(self):
        environ = self.make_environ("podman")
        self.assertIsNone(margo_agent.make_compose_driver(make_config(runtime__compose="off"), environ=environ))
        self.assertIsNone(margo_agent.make_compose_driver(make_config(runtime__engine="docker"), environ=environ))
        driver = margo_agent.make_compose_driver(make_config(), environ=environ)
        self.assertEqual(driver.engine, "podman")


class ParseContainers(unittest.TestCase):
    GOOD = {"Id": "abc", "Names": ["web-1"], "State": "Running", "ExitCode": 3,
            "Labels": {"org.margo.deployment": support.HELLO, "org.margo.component": "c", "org.margo.service": "s",
                       "org.margo.hash": "h"}}

    def test_what_podman_shows(self):
        expected = margo_agent.Container("abc", "web-1", support.HELLO, "c", "s", "h", "running", "compose")
        self.assertEqual(margo_agent.parse_containers(json.dumps([self.GOOD]).encode(), "podman"), [expected])
        for data in (b"", b"[]", b"null", b"[]\n"):
            self.assertEqual(margo_agent.parse_containers(data, "podman"), [])

    def test_a_container_with_half_of_the_labels_is_still_ours(self):
        """P-11: what an older version left is found too, and can be removed."""
        item = dict(self.GOOD, Labels={"org.margo.deployment": support.HELLO})
        self.assertEqual(margo_agent.parse_containers(json.dumps([item]).encode(), "podman"),
                         [margo_agent.Container("abc", "web-1", support.HELLO, "", "", "", "running", "compose")])

    def test_what_docker_shows(self):
        line = json.dumps(dict(self.GOOD, State="exited", Status="Exited (1) 3 seconds ago", Labels=dict(
            self.GOOD["Labels"], **{"org.margo.device": "gw/a", "org.margo.owner": "us"})))
        expected = margo_agent.Container("abc", "web-1", support.HELLO, "c", "s", "h", "exited", "compose", "gw/a", owner="us")
        self.assertEqual(margo_agent.parse_containers(f"{line}\n{line}\n".encode(), "docker"), [expected, expected])
        self.assertEqual(margo_agent.parse_containers(b"", "docker"), [])

    def test_a_label_of_somebody_else_is_no_deployment(self):
        """Any image may have such a label.  Its value becomes a folder that is removed: only an id is one."""
        for name in ("/etc", "../../..", "", "d", support.HELLO + "\n", support.HELLO + "/.."):
            item = dict(self.GOOD, Labels=dict(self.GOOD["Labels"], **{"org.margo.deployment": name}))
            self.assertEqual(margo_agent.parse_containers(json.dumps([item]).encode(), "podman"), [])
            self.assertEqual(margo_agent.parse_containers(json.dumps(item).encode(), "docker"), [])

    def test_the_state_of_health_is_in_the_words_of_the_status(self):
        """Drift of a service that runs and is not well is seen without a further command."""
        for state, status, expected in (
                ("running", "Up 4 seconds ago (unhealthy)", ("unhealthy", "unhealthy")), ("running", "Up 4 minutes (healthy)", ("running", "healthy")),
                ("running", "Up 1 second (health: starting)", ("running", "starting")), ("exited", "Exited (1) 2 days ago", ("exited", "")),
                ("exited", "Exited (1) 2 days ago (unhealthy)", ("exited", "unhealthy")), ("running", None, ("running", ""))):
            item = dict(self.GOOD, State=state, Status=status, StartedAt=17)
            (container,) = margo_agent.parse_containers(json.dumps([item]).encode(), "podman")
            self.assertEqual((container.state, container.health, container.started), expected + (17,))
            (container,) = margo_agent.parse_containers(json.dumps(item).encode(), "docker")
            self.assertEqual((container.state, container.health), expected)

    def test_an_answer_of_another_form_is_not_taken_for_no_containers(self):
        """P-12: "nothing runs" must be what the engine said, not what could not be read."""
        items = [dict(self.GOOD, **change) for change in (
            {"Id": ABSENT}, {"Names": []}, {"Names": ABSENT}, {"Names": None}, {"Labels": {}}, {"Labels": None},
            {"Labels": ["x"]}, {"State": 5},
            {"State": None}, {"State": ABSENT})]
        texts = [json.dumps([{key: value for key, value in item.items() if value is not ABSENT}]) for item in items]
        texts += ["{", "[", "Error: no", "5", "[5]", "[null]", "[[]]", '{"Id": 1}', "{}", "0", '""', "false", "[{}]",
                  '[{"Id": "a", "Id": "b"}]', "NaN"]
        for data in [text.encode() for text in texts] + [b"\xff\xfe", b"\x00"]:
            with self.subTest(data=data):
                with self.assertRaises(margo_agent.CommandError) as caught:
                    margo_agent.parse_containers(data, "podman")
                self.assertIn("podman ps answered in an unknown form", caught.exception.message)
        for data in (b"abc\n", b'["a"]\n', b'["a","b","c","d","e","f","g","h","i","j","k"]\n', b"Error: no\n"):
            with self.subTest(data=data):
                with self.assertRaises(margo_agent.CommandError) as caught:
                    margo_agent.parse_containers(data, "docker")
                self.assertIn("docker ps answered in an unknown form", caught.exception.message)


# The driver against an engine of files

class DriverCase(FileCase):
    starts_processes = False
    claim = margo_agent.Claim(OWNER, frozenset(), frozenset([support.HELLO]), frozenset())

    def setUp(self):
        super().setUp()
        self.engine, self.fetched = support.FakeEngine(self), []
        self.start_patch(mock.patch.dict(os.environ, self.engine.env))
        if not self.starts_processes:
            self.start_patch(mock.patch.object(margo_agent, "run_command", self.run_here))
        self.driver = margo_agent.ComposeDriver("podman", self.config)
        self.driver.claim = self.claim

    def start_patch(self, patch):
        patch.start()
        self.addCleanup(patch.stop)

    def run_here(self, argv, timeout, env=None, limit=0, ends=False, watch=None):
        """The engine of files in this process: a process for each of hundreds of commands would take too long."""
        for argument in argv:
            self.assertNotIn(b"\0", os.fsencode(argument))
        code, stdout, stderr = fake_podman.answer(self.engine.folder, argv[1:], os.getpid())
        return margo_agent.Output(code, stdout.encode(), stderr.strip())

    def prepare(self, document, **options):
        self.add_file("compose.yaml", document if isinstance(document, str) else json.dumps(document))
        return self.driver.resolve(self.make_workload(**options), 60, fetched=self.fetched)

    def apply(self, document, known=None, patience=60, **options):
        """One apply as the agent does it; what it returns."""
        return self.driver.apply(self.prepare(document, **options), self.driver.observe(), known or {},
                                 time.monotonic() + patience)

    def changes(self):
        """The command lines so far that change something."""
        return [call for call in self.engine.calls() if call[0] not in ("ps", "inspect", "logs", "info",
            "healthcheck") and "inspect" not in call[:2] and call[:2] != ["network", "ls"]]

    def ids(self):
        """{service: id of its container}."""
        found = [(item["labels"].get("org.margo.service"), item["id"]) for item in self.engine.containers().values()]
        return {service: identifier for service, identifier in found if service}

    def assertFails(self, code, call, *words):
        with self.assertRaises(margo_agent.ComponentError) as caught:
            call()
        for word in words:
            self.assertIn(word, caught.exception.message)
        self.assertEqual(caught.exception.code, code, caught.exception.message)
        return caught.exception.message


class CommandLines(DriverCase):
    starts_processes = True

    def test_a_first_start_word_by_word(self):
        document = make_document(
            {"command": ["sleep", "5"], "environment": ["A=1"], "ports": ["80:80"], "volumes": ["data:/d"],
             "init": True, "configs": ["app"],
             "networks": {"front": {"aliases": ["www"]}, "back": {"ipv4_address": "10.1.0.5"}}},
            volumes={"data": {"labels": {"a": "b"}}, "foreign": {"external": True}},
            networks={"front": None, "back": {"internal": True}},
            configs={"app": {"content": "x"}})
        prepared = self.prepare(document)
        service, name = prepared[1].services[0], f"{PROJECT}-main-1"
        self.driver.apply(prepared, self.driver.observe(), {}, time.monotonic() + 60)
        calls, mine = self.changes(), self.ids()["main"]
        config = next(argument for argument in calls[3] if re.match("--volume=.*:/app:ro$", argument))
        mark = f"--label=org.margo.project={PROJECT}"
        for call in calls[1:3]:
            self.assertRegex(call.pop(-2), "^--label=org.margo.hash=[0-9a-f]{32}$")
        self.assertEqual(calls, [
            ["volume", "create", "--label=a=b", *MARKS, f"{PROJECT}_data"],
            ["network", "create", *MARKS, f"{PROJECT}_front"],
            ["network", "create", *MARKS, "--internal", f"{PROJECT}_back"],
            ["create", f"--name={name}", mark, f"--label=org.margo.deployment={support.HELLO}",
             f"--label=org.margo.owner={OWNER}", "--label=org.margo.component=web",
             "--label=org.margo.service=main", f"--label=org.margo.hash={service.hash}", "--label=org.margo.device=",
             f"--label=com.docker.compose.project={PROJECT}", "--label=com.docker.compose.service=main",
             "--label=com.docker.compose.container-number=1", f"--label=com.docker.compose.config-hash={service.hash}",
             "--label=com.docker.compose.oneoff=False", "--http-proxy=false", f"--env-file={self.folder}/main.env", config, "--init",
             "--publish=80:80", f"--volume={PROJECT}_data:/d", f"--network={PROJECT}_front", "--network-alias=main",
             "--network-alias=www", IMAGE,
             "sleep", "5"],
            ["network", "connect", "--alias=main", "--ip=10.1.0.5", f"{PROJECT}_back", name], ["start", mine]])
        with open(config[len("--volume="):-len(":/app:ro")]) as file:
            self.assertEqual(file.read(), "x")

    def test_what_the_engine_says_of_a_value_is_masked(self):
        """D-35, contract: no value of a parameter in a log or a status."""
        with self.engine.open() as held:
            held["uncreatable"] = True
        words = self.assertFails("INSTALL_FAILED", lambda: self.apply(make_document({}), parameters={"PASS": "localhost"}), "create failed")
        self.assertNotIn("localhost", words)

    def test_labels_by_which_podman_updates_by_itself_are_not_handed_on(self):
        """What runs is what was verified: `podman auto-update` would pull another image behind the agent's back."""
        self.apply(make_document({"labels": {"io.containers.autoupdate": "registry", "io.containers.autoupdate.authfile": "/x",
                                             "PODMAN_SYSTEMD_UNIT": "sshd.service", "io.containers": "kept"}}))
        labels = self.engine.containers()[f"{PROJECT}-main-1"]["labels"]
        self.assertEqual([name for name in labels if name.startswith(("io.", "PODMAN"))], ["io.containers"])

    def test_a_network_mode_has_no_alias(self):
        self.apply(make_document({"network_mode": "none"}))
        create = next(call for call in self.changes() if call[0] == "create")
        self.assertIn("--network=none", create)
        self.assertFalse([argument for argument in create if "alias" in argument])

    def test_values_stand_in_files_and_never_on_a_command_line(self):
        """Contract, On the engine: parameter values reach tools by files of mode 0600, never on a command line."""
        secrets = ["s3cret-pass", "s3cret-name", "s3cret-file", "s3cret-device", "s3cret-config"]
        self.add_file("app.env", "FILE=${FILE}\n")
        old = os.umask(0)
        self.addCleanup(os.umask, old)
        self.apply(make_document({"environment": ["PASS", "NAME=${GIVEN}"], "env_file": "app.env", "configs": ["app"]},
                                 configs={"app": {"content": "${CONFIG}"}}),
                   parameters={"PASS": secrets[0], "GIVEN": secrets[1], "FILE": secrets[2], "CONFIG": secrets[4]},
                   environment={"DEVICE": secrets[3]})
        lines = json.dumps(self.engine.calls())
        for secret in secrets:
            self.assertNotIn(secret, lines)
        path = os.path.join(self.folder, "main.env")
        self.assertEqual(stat.S_IMODE(os.stat(path).st_mode), 0o600)
        with open(path) as file:
            self.assertEqual(file.read(),
                             f"DEVICE={secrets[3]}\nFILE={secrets[2]}\nNAME={secrets[1]}\nPASS={secrets[0]}\n")

    def test_odd_values_reach_the_container_unchanged(self):
        values = {"A": "a b", "B": "'q' \"r\"", "C": "$HOME `id` $(id)", "D": "#x", "E": "a=b", "F": "", "G": " lead",
                  "H": "trail ", "I": "\\n", "J": "\u00e9"}
        self.apply(make_document({"environment": sorted(values)}), parameters=values)
        with open(os.path.join(self.folder, "main.env"), encoding="utf-8") as file:
            self.assertEqual(dict(line.split("=", 1) for line in file.read().split("\n") if line), values)

    def test_a_value_of_several_lines_is_only_named_on_the_command_line(self):
        """K15: podman and docker take `--env NAME` from their own environment; no other command is given it."""
        seen = os.path.join(self.folder, "environment")
        wrapper = support.write(os.path.join(self.folder, "first", "podman"),
                                f"#!/bin/sh\necho \"$1=$TEXT\" >> {seen}\nexec {self.engine.folder}/bin/podman \"$@\"\n", 0o755)
        with mock.patch.dict(os.environ, PATH=os.path.dirname(wrapper) + ":" + os.environ["PATH"]):
            self.apply(make_document({"environment": ["TEXT", "PLAIN=1"]}), parameters={"TEXT": "one\nlines"})
        with open(seen) as file:
            text = file.read()
        self.assertEqual([line for line in text.splitlines() if line.endswith("=one")], ["create=one"])
        create = next(call for call in self.changes() if call[0] == "create")
        self.assertIn("--env=TEXT", create)
        self.assertNotIn("lines", json.dumps(create))
        with open(os.path.join(self.folder, "main.env")) as file:
            self.assertEqual(file.read(), "PLAIN=1\n")

    def test_a_file_has_the_mode_that_was_asked_for(self):
        """K10: an entrypoint that is a config has to be executable."""
        self.apply(make_document({"configs": [{"source": "run", "target": "/run.sh", "mode": 0o555}], "secrets": ["key"]},
                                 configs={"run": {"content": "#!/bin/sh\n"}}, secrets={"key": {"environment": "KEY"}}),
                   parameters={"KEY": "s3cret"})
        create = next(call for call in self.changes() if call[0] == "create")
        self.assertNotIn("s3cret", json.dumps(self.engine.calls()))
        modes = {argument.split(":")[1]: stat.S_IMODE(os.stat(argument[len("--volume="):].split(":")[0]).st_mode)
                 for argument in create if argument.startswith("--volume=")}
        self.assertEqual(modes, {"/run.sh": 0o555, "/run/secrets/key": 0o644})

    def test_what_a_parameter_has_put_into_the_file_is_masked_in_its_faults(self):
        """D-35, contract: no value of a parameter in a log or a status."""
        for keys in ({"restart": "${SECRET}"}, {"image": "${SECRET} x"}, {"ports": ["${SECRET}"]}, {"depends_on": ["${SECRET}"]},
                     {"volumes": ["${SECRET}:/x"]}, {"user": "${U:?no ${SECRET}}"}, {"environment": {"A": "${SECRET} ${"}}):
            with self.subTest(keys=keys):
                with self.assertRaises(margo_agent.ComponentError) as caught:
                    self.prepare(make_document(keys), parameters={"SECRET": "s3cret-word"})
                self.assertNotIn("s3cret-word", caught.exception.message)

    def test_parameters_never_change_how_the_engine_is_run(self):
        """D-18: PATH and LD_PRELOAD go into the container, and nowhere else."""
        seen = os.path.join(self.folder, "environment")
        wrapper = support.write(os.path.join(self.folder, "first", "podman"),
                                f"#!/bin/sh\nenv >> {seen}\nexec {self.engine.folder}/bin/podman \"$@\"\n",
                                0o755)
        path = os.path.dirname(wrapper) + ":" + os.environ["PATH"]
        parameters = {"PATH": "/hostile", "LD_PRELOAD": "/hostile.so", "CONTAINER_HOST": "tcp://hostile",
                      "PLAIN": "hostile"}
        with mock.patch.dict(os.environ, PATH=path):
            self.apply(make_document({"environment": sorted(parameters)}), parameters=parameters)
        with open(seen) as file:
            lines = file.read().splitlines()
        self.assertEqual({line for line in lines if line.startswith("PATH=")}, {f"PATH={path}"})
        self.assertFalse([line for line in lines if "hostile" in line])
        container = self.engine.containers()[f"{PROJECT}-main-1"]
        self.assertEqual(container["env"], [f"{name}={value}" for name, value in sorted(parameters.items())])


class Trouble(DriverCase):
    """D-16: an engine that does not answer one question has not nothing."""

    def answer(self, command, code, output):
        """The engine's answer to one command from now on."""
        real = margo_agent.run_command

        def run(argv, timeout, **options):
            if argv[1:1 + len(command)] == command:
                return margo_agent.Output(code, output, "Error: cannot connect to the engine")
            return real(argv, timeout, **options)

        self.start_patch(mock.patch.object(margo_agent, "run_command", run))

    def test_networks_that_cannot_be_looked_at_are_not_made_anew(self):
        known = self.apply(make_document({}))
        before = self.engine.containers()
        for output in (b"", b"[]\n"):
            self.answer(["network", "inspect"], 1, output)
            with self.assertRaisesRegex(margo_agent.CommandError, "network inspect failed: .*cannot connect"):
                self.apply(make_document({}), known)
        self.assertEqual(self.engine.containers(), before)

    def test_a_container_that_docker_cannot_look_at_is_looked_for_in_the_list(self):
        """It prints an empty list, whether the container or the daemon is gone."""
        self.apply(make_document({}))
        ids = list(self.ids().values())
        self.answer(["inspect"], 1, b"[]\n")
        self.assertEqual(self.driver.inspect(ids), {})
        self.answer(["ps"], 1, b"")
        with self.assertRaises(margo_agent.CommandError):
            self.driver.inspect(ids)


    def test_one_damaged_container_hides_no_other(self):
        """F-02: podman shows none of those that it is asked for together where one cannot be looked at."""
        self.apply({"services": {"a": {"image": IMAGE}, "b": {"image": IMAGE}}})
        first, second = self.ids().values()
        for command in ([first, second], [first]):
            self.answer(["inspect", "--type=container", *command], 125, b"[]\n")
        self.assertEqual(list(self.driver.inspect([first, second])), [second])


class Preparation(DriverCase):
    def test_an_image_that_is_there_is_not_pulled(self):
        """P-1: a device without network starts what it has."""
        self.prepare(make_document({}))
        self.assertEqual(self.changes(), [])
        self.assertEqual(self.fetched, [])

    def test_pull_policies(self):
        for policy, image, expected in (("missing", "localhost/new:1", True),
                                        ("if_not_present", "localhost/new:2", True), ("always", IMAGE, True),
                                        ("always", "localhost/new:3", True), ("never", IMAGE, False)):
            with self.subTest(policy=policy, image=image):
                self.engine.forget_calls()
                self.fetched = []
                self.prepare(make_document({"image": image, "pull_policy": policy}))
                self.assertEqual(self.changes(), [["pull", "--quiet", image]] if expected else [])
                self.assertEqual(self.fetched, [image] if image != IMAGE else [])

    def test_a_name_of_the_mirror_that_was_there_before_stays(self):
        """F-31: it is somebody else's, who may run by it."""
        self.config["registries"] = {"plant.example": margo_agent.Settings(mirror="mirror.example")}
        for images in ([], ["mirror.example/app:1"]):
            self.engine.change(images=images)
            self.prepare(make_document({"image": "plant.example/app:1"}))
            with self.engine.open() as held:
                self.assertEqual(set(held["images"]), {"plant.example/app:1", *images})

    def test_the_platform_is_pulled_that_will_run(self):
        self.prepare(make_document({"image": "localhost/new:1", "platform": "linux/arm64"}))
        self.assertEqual(self.changes(), [["pull", "--quiet", "--platform=linux/arm64", "localhost/new:1"]])

    def test_an_image_that_cannot_be_had_says_which_and_why(self):
        self.engine.change(unpullable=["localhost/gone:1"])
        self.assertFails("PULL_FAILED", lambda: self.prepare(make_document({"image": "localhost/gone:1"})),
                         "localhost/gone:1", "connection refused")
        self.engine.forget_calls()
        self.assertFails("PULL_FAILED", lambda: self.prepare(make_document({"image": "localhost/new:1",
            "pull_policy": "never"})), "localhost/new:1",
                         "pull_policy is never")
        self.assertEqual(self.changes(), [])

    def test_an_image_of_another_architecture_is_found_before_anything_stops(self):
        """K18: on a device that runs it by an emulator, the file says so."""
        self.engine.change(images=["localhost/arm:1", "localhost/old:1", IMAGE], made_for={"localhost/arm:1": "arm64", "localhost/old:1": "386"})
        self.assertFails("INSTALL_FAILED", lambda: self.prepare(make_document({"image": "localhost/arm:1"})),
                         "localhost/arm:1 is made for arm64, and this device is amd64")
        for changes in ({"image": "localhost/arm:1", "platform": "linux/arm64"}, {"image": "localhost/old:1"}, {}):
            self.prepare(make_document(changes))

    def test_an_entrypoint_that_is_emptied_leaves_the_command_of_the_image(self):
        """As in Docker Compose; an engine itself would say that there is no command."""
        self.engine.change(commands={IMAGE: ["serve", "-x"]})
        for keys, expected in (({"entrypoint": []}, ["serve", "-x"]), ({"entrypoint": ""}, ["serve", "-x"]),
                               ({"entrypoint": [], "command": ["go"]}, ["go"]), ({"entrypoint": ["go"]}, []), ({}, [])):
            self.assertEqual(self.prepare(make_document(keys))[1].services[0].command, expected)

    def test_a_health_check_that_is_awaited_has_to_be_there(self):
        """K5: found out before anything stops, as is what turns it off."""
        def make(check=None):
            return {"services": {"main": {"image": IMAGE, "depends_on": {"db": {"condition": "service_healthy"}}},
                                 "db": dict({"image": "localhost/db:1"}, **({"healthcheck": check} if check else {}))}}
        self.engine.change(images=["localhost/db:1", IMAGE])
        for check in (None, {"disable": True}, {"interval": "5s"}):
            self.assertFails("INVALID_DEPLOYMENT", lambda: self.prepare(make(check)), "services.main.depends_on.db: it has no health check")
        self.prepare(make({"test": "true"}))
        self.engine.change(checked={"localhost/db:1": {"Test": ["CMD", "x"]}})
        self.prepare(make())
        self.assertFails("INVALID_DEPLOYMENT", lambda: self.prepare(make({"disable": True})), "no health check")

    def test_nothing_is_pulled_for_a_file_that_is_refused(self):
        self.assertFails("POLICY_DENIED", lambda: self.prepare({"services": {
            "a": {"image": "localhost/new:1"}, "b": {"image": IMAGE, "privileged": True}}}), "services.b.privileged")
        self.assertEqual(self.engine.calls(), [])

    def test_a_file_that_is_no_yaml_names_its_line(self):
        self.assertFails("INVALID_DEPLOYMENT", lambda: self.prepare("services:\n  main: [\n"), "compose.yaml: line 3")
        os.remove(os.path.join(self.archive, "compose.yaml"))
        self.assertFails("INVALID_DEPLOYMENT", lambda: self.driver.resolve(self.make_workload(), 60), "compose.yaml",
                         "is not a file of the archive")

    def test_a_file_that_is_too_long_fails_its_component_alone(self):
        """Contract, exit codes: what an archive holds concerns one component; a StorageError ends the cycle."""
        self.assertFails("INVALID_DEPLOYMENT", lambda: self.prepare("# " + "x" * 2 ** 20 + "\nservices: {}\n"),
                         "compose.yaml")

    def test_an_engine_that_does_not_answer_is_not_an_engine_without_containers(self):
        """P-2, P-12: no conclusion is drawn from a fault."""
        self.engine.change(deaf=True)
        with self.assertRaises(margo_agent.CommandError) as caught:
            self.driver.observe()
        self.assertIn("cannot connect to the engine", caught.exception.message)

    def test_containers_are_found_by_their_label_alone(self):
        self.apply(make_document({}))
        with self.engine.open() as held:
            held["containers"]["foreign"] = {"id": "f" * 64, "image": IMAGE, "labels": {"a": "b"}, "state": "running",
                                             "code": 0, "restarts": 0,
                                             "argv": [], "env": []}
        found = self.driver.observe()
        self.assertEqual([(c.name, c.deployment_id, c.component, c.service, c.state) for c in found],
                         [(f"{PROJECT}-main-1", support.HELLO, "web", "main", "running")])


class SlowPull(DriverCase):
    starts_processes = True

    def test_the_log_says_now_and_then_how_far_a_pull_is(self):
        """On a slow link nobody has to guess whether anything comes."""
        self.config["state_dir"] = self.folder
        temporary = os.path.join(self.folder, "tmp")
        os.mkdir(temporary)
        self.engine.change(images=[])
        podman = os.path.join(self.engine.folder, "bin", "podman")
        os.rename(podman, podman + ".real")
        support.write(podman, '#!/bin/sh\nif [ "$1" = pull ]; then mkdir "$TMPDIR/storage1"; head -c 3000000 /dev/zero > "$TMPDIR/storage1/1"; '
                      f'sleep 1.5; fi\nexec {podman}.real "$@"\n', 0o755)
        self.driver.environ = dict(os.environ, TMPDIR=temporary)
        with mock.patch.object(margo_agent, "PULL_NOTE", 0.5), mock.patch.object(margo_agent, "log") as log:
            self.prepare(make_document({}))
        notes = [call[1] for call in log.call_args_list if call[0][1] == "an image is being pulled"]
        self.assertIn((IMAGE, 3000000), [(note["image"], note["fetched"]) for note in notes])
        self.assertLess(len(notes), 5)


class Updates(DriverCase):
    def make(self, **changes):
        """Two services; changes: keys of `b`."""
        return {"services": {"a": {"image": IMAGE, "environment": ["A"]}, "b": dict({"image": IMAGE}, **changes)}}

    def test_what_it_returns_says_which_ports_are_held(self):
        facts = self.apply(self.make(ports=["80:80", "127.0.0.1:81:81/udp"]))
        self.assertEqual({name: item["ports"] for name, item in facts.items()},
                         {"a": [], "b": [["", 80, "tcp"], ["127.0.0.1", 81, "udp"]]})

    def test_the_same_again_touches_nothing(self):
        """P-16: applying is safe to repeat, and what runs is adopted."""
        self.apply(self.make())
        before = self.ids()
        self.engine.forget_calls()
        self.apply(self.make())
        self.assertEqual(self.changes(), [])
        self.assertEqual(self.ids(), before)

    def test_only_the_service_that_changed_is_made_anew(self):
        """P-7, P-16: a change concerns its own container."""
        self.apply(self.make())
        before = self.ids()
        for changes in ({"command": ["x"]}, {"command": ["x"], "environment": ["B=1"]},
                        {"command": ["x"], "ports": ["80:80"]}):
            with self.subTest(changes=changes):
                self.engine.forget_calls()
                self.apply(self.make(**changes))
                after = self.ids()
                self.assertEqual(after["a"], before["a"])
                self.assertNotEqual(after["b"], before["b"])
                self.assertEqual([call for call in self.changes() if call[0] == "stop"], [["stop", "--ignore", before["b"]]])
                self.assertNotIn(before["a"], json.dumps(self.changes()))
                before = after

    def test_a_change_of_the_devices_variables_replaces_the_containers(self):
        """C-185, contract: a change of runtime.environment replaces the containers it concerns."""
        self.apply(self.make(), environment={"OTEL": "1"})
        before = self.ids()
        self.apply(self.make(), environment={"OTEL": "2"})
        self.assertFalse(set(before.values()) & set(self.ids().values()))

    def test_a_parameter_replaces_only_who_mentions_it(self):
        self.apply(self.make(), parameters={"A": "1"})
        before = self.ids()
        self.apply(self.make(), parameters={"A": "2"})
        after = self.ids()
        self.assertNotEqual(before["a"], after["a"])
        self.assertEqual(before["b"], after["b"])

    def test_a_service_that_is_gone_from_the_file_is_removed(self):
        """D-19: and its volumes stay."""
        self.apply(self.make(volumes=["/data"]))
        self.apply(make_document({}, services={"a": {"image": IMAGE, "environment": ["A"]}}))
        self.assertEqual(set(self.ids()), {"a"})
        self.assertFalse([call for call in self.engine.calls() if call[:2] == ["volume", "rm"] or "--volumes" in call])

    def test_a_volume_or_network_that_is_there_is_left_as_it_is(self):
        """D-10: no update ever removes a volume."""
        document = make_document({"volumes": ["data:/d"]}, volumes={"data": None})
        self.apply(document)
        self.engine.forget_calls()
        self.apply(make_document({"volumes": ["data:/d"], "command": ["x"]}, volumes={"data": None}))
        self.assertEqual([call[0] for call in self.changes() if call[0] in ("volume", "network")], [])

    def test_a_stopped_container_is_started_again_and_kept(self):
        """P-1: what is there is healed from what is there."""
        self.apply(self.make())
        before = self.ids()
        with self.engine.open() as held:
            held["containers"][f"{PROJECT}-b-1"].update(state="exited", code=137)
        self.engine.forget_calls()
        self.apply(self.make())
        self.assertEqual(self.changes(), [["start", before["b"]]])

    def test_a_state_that_cannot_be_started_is_made_anew(self):
        self.apply(self.make())
        before = self.ids()
        with self.engine.open() as held:
            held["containers"][f"{PROJECT}-b-1"].update(state="dead")
        self.apply(self.make())
        self.assertNotEqual(self.ids()["b"], before["b"])
        self.assertEqual(self.ids()["a"], before["a"])

    def test_a_task_that_finished_is_not_run_again(self):
        """P-17, contract, Update: a service that exits 0 at install is a finished one-shot: kept, not run again."""
        self.engine.change(exits={"once": 0})
        document = {"services": {"once": {"image": IMAGE}, "main": {"image": IMAGE}}}
        known = self.apply(document, wait=True)
        self.assertEqual({name: facts["finished"] for name, facts in known.items()}, {"once": True, "main": False})
        self.assertEqual(known["main"]["image"], IMAGE)
        self.engine.forget_calls()
        self.assertEqual(self.apply(document, known, wait=True), known)
        self.assertEqual(self.changes(), [])

    def test_containers_of_another_deployment_or_component_are_not_ours(self):
        """Contract, On the engine: the same service name in another one is another service."""
        self.apply(self.make())
        for label in ("org.margo.deployment", "org.margo.component"):
            with self.subTest(label=label):
                with self.engine.open() as held:
                    mine = {name: item for name, item in held["containers"].items() if not name.startswith("other")}
                    for name, item in mine.items():
                        item["labels"][label] = "00000000-0000-4000-8000-000000000000"
                        held["containers"][f"other-{label}-{name}"] = held["containers"].pop(name)
                others = {item["id"] for item in self.engine.containers().values()}
                self.apply(self.make())
                present = {item["id"] for item in self.engine.containers().values()}
                self.assertTrue(others < present, "a container of another one was removed, or taken for ours")

    def test_a_container_without_our_labels_is_never_touched(self):
        """Contract, On the engine: nothing without these labels is ever touched, whatever its name."""
        name = f"{PROJECT}-main-1"
        with self.engine.open() as held:
            held["containers"] = {name: {"id": "f" * 64, "image": IMAGE, "labels": {"owner": "somebody"},
                                         "state": "running", "code": 0,
                                         "restarts": 0, "argv": [], "env": []}}
        self.assertFails("INSTALL_FAILED", lambda: self.apply(make_document({})), name)
        self.assertEqual(self.engine.containers()[name]["labels"], {"owner": "somebody"})
        self.assertEqual(self.engine.containers()[name]["state"], "running")

    def test_what_cannot_be_handed_over_is_refused_before_what_runs_is_touched(self):
        """P-20, D-11: the running version stays until the new one can be made."""
        self.apply(make_document({}))
        before = self.changes()
        os.environ["MARGO_TEST"] = "x"
        self.addCleanup(os.environ.pop, "MARGO_TEST")
        for name, text in (("A", "x" * 200000), ("LD_PRELOAD", "two\nlines"), ("MARGO_TEST", "two\nlines")):
            self.assertFails("PARAMETER_INVALID", lambda: self.apply(make_document({"environment": [name]}), parameters={name: text}),
                             f"services.main.environment.{name}")
        self.assertEqual(self.changes(), before)

    def test_a_service_whose_files_did_not_change_keeps_its_container(self):
        """K16: the next package lies in another folder; what is mounted of it goes by its content."""
        def apply(package, content, changes, known):
            self.archive = os.path.join(self.folder, package)
            self.add_file("app.ini", content)
            services = {"db": {"image": IMAGE, "volumes": ["./app.ini:/etc/app.ini"]}, "app": {"image": IMAGE, "command": [changes]}}
            return self.apply({"services": services}, known)
        known = apply("one", "x", "1", {})
        before = self.ids()
        known = apply("two", "x", "2", known)
        after = self.ids()
        self.assertEqual(after["db"], before["db"])
        self.assertNotEqual(after["app"], before["app"])
        apply("three", "y", "2", known)
        self.assertNotEqual(self.ids()["db"], before["db"])

    def test_what_cannot_be_removed_is_said(self):
        """P-11: a container that stays is never taken for removed."""
        self.apply(self.make())
        self.engine.change(stubborn=True)
        self.assertFails("REMOVE_FAILED", lambda: self.apply(self.make(command=["x"])), "device or resource busy")


class Owners(DriverCase):
    """Whose something on the engine is (contract, On the engine)."""

    def check_names(self, document):
        self.driver.ask_names(*self.prepare(document))

    def test_one_rule_says_what_is_ours(self):
        claim = margo_agent.Claim("me", {"me", "I-then"}, {support.HELLO}, {"recorded"})
        other = support.HELLO[:-1] + "1"
        for deployment_id, owner, container_id, expected in (
                (support.HELLO, "me", "x", True), (other, "me", "x", True),                     # state lost: by our owner alone
                (support.HELLO, "stranger", "x", False), (other, "stranger", "x", False),
                (support.HELLO.upper(), "I-then", "x", True), (other, "I-then", "x", False),
                (support.HELLO, "", "x", True), (other, "", "x", False),                        # before there was this label
                (other, "stranger", "recorded", True), (support.HELLO, "stranger", None, False)):
            with self.subTest(deployment_id=deployment_id, owner=owner, container_id=container_id):
                self.assertIs(margo_agent.is_ours(claim, deployment_id, owner, container_id), expected)
        self.assertFalse(margo_agent.is_ours(claim._replace(owner=""), other, ""), "an agent without identity owns what has no label")

    def test_the_look_keeps_strangers_aside(self):
        self.apply(make_document({}))
        with self.engine.open() as held:
            (mine,) = held["containers"].values()
            for name, owner in (("theirs", "stranger"), ("forged", OWNER)):
                labels = dict(mine["labels"], **{"org.margo.owner": owner})
                held["containers"][name] = dict(mine, id=name, labels=labels)
        self.assertEqual({item.name for item in self.driver.observe()}, {f"{PROJECT}-main-1", "forged"})
        self.assertEqual([(item.name, item.owner) for item in self.driver.ask_strangers()], [("theirs", "stranger")])

    def test_a_name_of_a_stranger_s_fails_the_component_before_anything_is_touched(self):
        document = make_document({"volumes": ["data:/d"]}, volumes={"data": None})
        self.apply(document)
        for kind, name in (("networks", f"{PROJECT}_default"), ("volumes", f"{PROJECT}_data"), ("containers", f"{PROJECT}-main-1")):
            with self.engine.open() as held:
                kept = json.dumps(held[kind][name])
                if kind == "containers":
                    held[kind][name]["labels"]["org.margo.owner"] = "stranger"
                else:
                    held[kind][name] = ["org.margo.owner=stranger"]
            self.engine.forget_calls()
            self.assertFails("NAME_TAKEN", lambda: self.check_names(document), f"{kind[:-1]} {name} belongs to another agent, stranger")
            self.assertEqual(self.changes(), [])
            with self.engine.open() as held:
                held[kind][name] = json.loads(kept)
            self.check_names(document)

    def test_what_has_no_owner_or_is_external_is_taken_as_it_is(self):
        with self.engine.open() as held:
            held["volumes"] = {f"{PROJECT}_data": [], "plant": ["org.margo.owner=stranger"]}
            held["networks"] = {"plant": ["org.margo.owner=stranger"]}
        self.check_names(make_document({"volumes": ["data:/d", "plant:/p"]}, volumes={"data": None, "plant": {"external": True}},
                                       networks={"plant": {"external": True}}))

    def test_what_an_engine_finds_by_a_part_of_its_name_is_not_what_was_named(self):
        """The beginning of a network's id led into any network, and a volume data was not made beside data2."""
        begun = hashlib.sha256(b"theirs").hexdigest()[:2]
        with self.engine.open() as held:
            held["networks"], held["volumes"] = {"theirs": []}, {"theirs2": []}
        for kind, name, keys in (("network", begun, {"networks": ["x"]}), ("volume", "theirs", {"volumes": ["x:/x"]})):
            document = make_document(keys, **{kind + "s": {"x": {"external": True, "name": name}}})
            self.assertFails("INSTALL_FAILED", lambda: self.apply(document), f"there is no {kind} {name} on this device")
            self.assertEqual(self.driver.observe(), [])
            del document["services"]["main"][kind + "s"]
            self.check_names(document)              # what no service uses needs not be there
        self.apply(make_document({"volumes": ["data2:/2", "data:/1"]}, volumes={"data2": None, "data": None}))
        with self.engine.open() as held:
            self.assertLess({f"{PROJECT}_data", f"{PROJECT}_data2"}, set(held["volumes"]))
            self.assertTrue(all(held["volumes"][f"{PROJECT}_{name}"] for name in ("data", "data2")))

    def test_what_was_made_for_another_deployment_is_not_reached_by_any_name(self):
        """A project's name may be cut, so that no id stands in it: the label says for whom something was made."""
        project = "a-component-of-a-long-name-that-is-cut-to-its-first-0123456789"
        labels = [f"org.margo.deployment={support.HELLO[:-1]}1", f"org.margo.owner={OWNER}", f"org.margo.project={project}"]
        for kind in ("networks", "volumes"):
            for name, denied in ((f"{project}_data", True), ("shared", False)):
                with self.engine.open() as held:
                    held[kind] = {name: labels}
                for value in ({"name": name}, {"external": True, "name": name}, {"external": {"name": name}}):
                    document = make_document({kind: {"networks": ["x"], "volumes": ["x:/x"]}[kind]}, **{kind: {"x": value}})
                    if denied:
                        self.assertFails("POLICY_DENIED", lambda: self.check_names(document), f"{name} is of another deployment")
                    else:
                        self.check_names(document)

    def test_what_an_earlier_identity_made_is_still_ours(self):
        self.apply(make_document({}))
        claim = self.claim._replace(owner="another now", owners={OWNER})
        self.assertEqual(len(self.driver.observe((), claim)), 1)
        self.check_names(make_document({}))


class Handover(DriverCase):
    """K-2: one outage, and nothing of the old runs beside the new."""

    def test_all_is_made_then_the_old_stops_then_the_new_starts_then_the_old_goes(self):
        self.apply({"services": {"a": {"image": IMAGE}, "b": {"image": IMAGE}, "c": {"image": IMAGE}}})
        before = self.ids()
        self.engine.forget_calls()
        self.apply({"services": {"new": {"image": IMAGE}, "b": {"image": IMAGE, "command": ["x"]}, "c": {"image": IMAGE}}})
        calls = [call for call in self.changes() if call[0] in ("create", "init", "stop", "start", "rm")]
        self.assertEqual([call[0] for call in calls[:6]], ["create", "init", "rm"] * 2, "K23: all that is new is tried")
        del calls[:6]
        self.assertEqual([call[0] for call in calls], ["create", "create", "stop", "start", "start", "rm"])
        kinds = [call[0] for call in self.changes()]
        self.assertLess(len(kinds) - 1 - kinds[::-1].index("rename"), kinds.index("stop"), "names change hands before the outage")
        self.assertEqual({*calls[2][2:]}, {before["a"], before["b"]})
        self.assertEqual(self.ids()["c"], before["c"])
        self.assertEqual(set(self.engine.containers()), {f"{PROJECT}-{name}-1" for name in ("new", "b", "c")})

    def test_who_depends_on_another_stops_first(self):
        def make(value):
            return {"services": {name: {"image": IMAGE, "environment": {"V": value}, "depends_on": needs}
                                 for name, needs in (("web", ["api"]), ("api", ["db"]), ("db", []), ("side", []))}}
        self.apply(make("1"))
        names = {container_id: name for name, container_id in self.ids().items()}
        self.engine.forget_calls()
        self.apply(make("2"))
        stops = [{names[container_id] for container_id in call[2:]} for call in self.changes() if call[0] == "stop"]
        order = {name: number for number, group in enumerate(stops) for name in group}
        self.assertLess(order["web"], order["api"])
        self.assertLess(order["api"], order["db"])

    def test_the_way_back_starts_the_containers_that_were_there(self):
        """K-1, P-8: their own layers and volumes are theirs again."""
        old = {"services": {"a": {"image": IMAGE}, "b": {"image": IMAGE}}}
        known = self.apply(old, wait=True)
        self.engine.change(exits={"b": 3})
        self.assertFails("INSTALL_FAILED", lambda: self.apply({"services": {name: {"image": IMAGE, "command": ["x"]} for name in "ab"}}, known, wait=True),
                         "service b exited with code 3")
        self.engine.change(exits={})
        again = self.apply(old, known, wait=True)
        self.assertEqual({name: facts["id"] for name, facts in again.items()}, {name: facts["id"] for name, facts in known.items()})
        self.assertEqual(set(self.engine.containers()), {f"{PROJECT}-a-1", f"{PROJECT}-b-1"})

    def test_without_a_way_back_the_old_does_not_stay(self):
        self.config.runtime["on_failure"] = "keep"
        self.apply(make_document({}))
        before = self.ids()
        self.engine.change(exits={"main": 3})
        self.assertFails("INSTALL_FAILED", lambda: self.apply(make_document({"command": ["x"]}), wait=True), "exited with code 3")
        self.assertNotIn(before["main"], {item["id"] for item in self.engine.containers().values()})

    def test_what_cannot_be_made_touches_nothing(self):
        """P-20"""
        document = {"services": {"a": {"image": IMAGE}, "b": {"image": IMAGE}}}
        self.apply(document)
        before = self.ids()
        self.engine.change(damaged=["localhost/bad:1"], images=[IMAGE, "localhost/bad:1"])
        self.engine.forget_calls()
        self.assertFails("INSTALL_FAILED", lambda: self.apply({"services": {
            "a": {"image": IMAGE, "command": ["x"]}, "b": {"image": "localhost/bad:1"}}}), "create failed")
        self.assertNotIn("stop", [call[0] for call in self.changes()])
        self.assertEqual({name for name, item in self.engine.containers().items() if item["state"] == "running"},
                         {f"{PROJECT}-a-1", f"{PROJECT}-b-1"})
        self.apply(document)
        self.assertEqual(self.ids(), before)

    def test_what_could_not_be_started_touches_nothing(self):
        """K23, D-35: it is tried without what belongs to others, and what the engine says of it is masked."""
        self.apply({"services": {"a": {"image": IMAGE}, "b": {"image": IMAGE}}})
        before = {name: item["state"] for name, item in self.engine.containers().items()}
        self.engine.change(unready=["b"])
        self.engine.forget_calls()
        document = {"services": {
            "a": {"image": IMAGE, "command": ["x"]},
            "b": {"image": IMAGE, "init": True, "restart": "always", "ports": ["18080:80"], "dns": ["10.0.0.1"],
                  "environment": ["PASS"], "healthcheck": {"test": "true"}, "pid": "service:a", "sysctls": {
                      "net.ipv4.conf.eth0.forwarding": "1", "net.core.somaxconn": "9"}, "volumes": ["x:/z:ro,Z", "y:/Z:z"]}},
            "volumes": {"x": {}, "y": {}}}
        for on_failure in ("rollback", "keep"):
            self.config.runtime["on_failure"] = on_failure
            words = self.assertFails("INSTALL_FAILED", lambda: self.apply(document, parameters={"PASS": "s3cret"}),
                                     "service b could not be started", "unable to find user ghost")
            self.assertNotIn("s3cret", words)
            self.assertEqual({name: item["state"] for name, item in self.engine.containers().items()}, before)
        tried = [call for call in self.engine.calls() if call[0] == "create"][1]
        self.assertIn("--label=org.margo.hash=", tried, "it is never taken for the service's container")
        self.assertEqual([item for item in tried if not item.startswith(("--label", "--env", "--name"))],
                         ["create", "--http-proxy=false", "--sysctl=net.core.somaxconn=9", f"--volume={PROJECT}_x:/z:ro",
                          f"--volume={PROJECT}_y:/Z", "--network=none", IMAGE])
        self.assertNotIn("stop", [call[0] for call in self.changes()])

    def test_what_runs_keeps_its_configs_and_secrets_whatever_becomes_of_the_next_version(self):
        """It may be started again at any moment, on the way back too: with what it was made with.  What nothing has any more goes."""
        def make(text):
            return make_document({"configs": ["c"], "secrets": ["s"]}, configs={"c": {"content": text}}, secrets={"s": {"environment": "S"}})

        def read():
            """What the containers would find, if they were started now."""
            found = []
            for item in self.engine.containers().values():
                for argument in item["argv"]:
                    if argument.startswith("--volume="):
                        with open(argument[len("--volume="):].partition(":")[0]) as file:
                            found.append(file.read())
            return found
        known = self.apply(make("one"), parameters={"S": "red"}, wait=True)
        self.engine.change(unready=["main"])
        self.assertFails("INSTALL_FAILED", lambda: self.apply(make("two"), known, parameters={"S": "blue"}), "could not be started")
        self.assertEqual(read(), ["one", "red"])
        self.engine.change(unready=[], exits={"main": 3})
        self.assertFails("INSTALL_FAILED", lambda: self.apply(make("two"), known, parameters={"S": "blue"}, wait=True), "exited with code 3")
        self.assertEqual(sorted(read()), ["blue", "one", "red", "two"])
        self.engine.change(exits={})
        known = self.apply(make("one"), known, parameters={"S": "red"}, wait=True)
        self.assertEqual(read(), ["one", "red"])
        stuck = os.path.join(self.folder, "config-" + 32 * "0")
        os.mkdir(stuck)                             # it cannot be removed as a file is: no reason to take an update back
        self.apply(make("four"), known, parameters={"S": "red"})
        self.assertEqual(read(), ["four", "red"])
        self.assertEqual(len([name for name in os.listdir(self.folder) if name.startswith("config-")]), 2 + 1)

    def test_a_trial_that_was_cut_off_is_cleared_away(self):
        """A power cut between its creation and its removal: it is no container of the service, and keeps nothing from going on."""
        document = make_document({})
        self.apply(document)
        before = self.ids()
        with self.engine.open() as held:
            (item,) = held["containers"].values()
            for number, state in enumerate(("created", "initialized")):
                labels = dict(item["labels"], **{"org.margo.hash": ""})
                held["containers"][f"{PROJECT}-main-1-try-{number}"] = dict(item, id=f"{number + 1}".ljust(64, "f"), state=state, labels=labels)
        self.apply(document)
        self.assertEqual((self.ids(), len(self.engine.containers())), (before, 1))

    def test_what_ran_before_is_not_tried_and_what_another_one_has_to_lay_out_first_is_left_out(self):
        """K23: the way back is short; a program, or a folder, that a task puts into a volume need not be there yet, all else has to."""
        def make(value, **members):
            main = {"image": IMAGE, "entrypoint": [f"/x/{value}"], "working_dir": "/x", "volumes": ["x:/x:ro", "y:/y"]}
            return {"services": {"setup": {"image": IMAGE, "command": [value], "volumes": ["x:/x"]}, "main": dict(main, **members)},
                    "volumes": {"x": {}, "y": {}}}

        def list_tried():
            """What each trial is told that the service itself is not."""
            made = [call for call in self.engine.calls() if call[0] == "create"]
            self.engine.forget_calls()
            return [[item for item in call if not item.startswith(("--label", "--env", "--http"))][2:] for call in made
                    if "-try-" in " ".join(call)]
        known = self.apply(make("1"))
        list_tried()
        self.apply(make("2"))
        self.assertEqual(list_tried()[1], ["--workdir=/x", "--entrypoint=/x/2", f"--volume={PROJECT}_y:/y", "--entrypoint=/proc/self/exe",
                                           "--workdir=/", "--network=none", IMAGE])
        known = self.apply(make("1"), known)
        self.assertEqual(list_tried(), [])
        self.apply(make("1", user="1"), known)      # of which the other one goes on: its part is there
        self.assertEqual(list_tried(), [["--user=1", "--workdir=/x", "--entrypoint=/x/1", f"--volume={PROJECT}_x:/x:ro",
                                         f"--volume={PROJECT}_y:/y", "--network=none", IMAGE]])
        self.engine.change(unready=["main"])
        self.assertFails("INSTALL_FAILED", lambda: self.apply(make("2")), "service main could not be started", "unable to find user ghost")

    def test_docker_tries_only_with_a_runtime_whose_words_are_known(self):
        """Another one, such as gVisor, might run what a trial makes unstartable."""
        project = self.settle(make_document({}), engine="docker")
        job = margo_agent.Job(self.make_workload(), project, self.folder, {}, time.monotonic() + 60, {}, {}, {"main": {}})
        driver = margo_agent.ComposeDriver("docker", self.config)
        for runtime, tried in (("runsc", []), ("runc", ["create", "start", "rm"])):
            driver.info = {"runtime": runtime}
            self.engine.forget_calls()
            driver.rehearse(project.services[0], job, set())
            self.assertEqual([call[0] for call in self.engine.calls()], tried)

    def test_a_port_that_cannot_be_had_is_found_before_anything_stops(self):
        """K23: not one that what runs will give up, nor one of somebody who will have ended."""
        service = margo_agent.Service("a", IMAGE, [], [], {}, {}, [], {}, "missing", "", [])

        def ask(*ports, held=(), depends_on=()):
            services = [service._replace(name=name, ports=[port]) for name, port in zip("abc", ports)]
            services[-1] = services[-1]._replace(depends_on=dict.fromkeys(depends_on, ("service_completed_successfully", True)))
            margo_agent.check_rivals(services)
            margo_agent.ask_ports(services, {"x": {"ports": [["", *port] for port in held]}})

        for protocol, kind in (("tcp", socket.SOCK_STREAM), ("udp", socket.SOCK_DGRAM)):
            with self.subTest(protocol), socket.socket(socket.AF_INET, kind) as taken:
                taken.bind(("127.0.0.1", 0))
                if protocol == "tcp":
                    taken.listen(1)
                number = taken.getsockname()[1]
                for address in ("", "127.0.0.1"):
                    port = [address, number, protocol]
                    self.assertFails("PORT_IN_USE", lambda: ask(port), f":{number}/{protocol}, which service a publishes")
                    ask(port, held=[(number, protocol)])
        ask(["", number, "sctp"])
        ask(["192.0.2.7", number, "tcp"])           # the engine may run elsewhere, where this is an address
        for first, second in (("", ""), ("", "127.0.0.1"), ("127.0.0.1", ""), ("127.0.0.1", "127.0.0.1")):
            ports = [[first, number, "tcp"], [second, number, "tcp"]]
            self.assertFails("INVALID_DEPLOYMENT", lambda: ask(*ports), f"services.b: it cannot have {number} tcp beside service a")
            ask(*ports, depends_on=["a"])
        ask(["127.0.0.1", number, "tcp"], ["127.0.0.2", number, "tcp"], ["", number, "udp"])
        ports = [["", number, "tcp"], ["", number + 1, "tcp"], ["", number, "tcp"]]
        self.assertFails("INVALID_DEPLOYMENT", lambda: ask(*ports, depends_on=["b"]), "services.c: it cannot have")
        task = ("service_completed_successfully", True)
        chain = [service._replace(name=name, ports=[port], depends_on=dict.fromkeys(needs, condition)) for name, port, needs, condition in zip(
            "abc", ports, ["", "a", "b"], [task, task, ("service_started", True)])]
        margo_agent.check_rivals(chain)             # a has ended before b starts, and so before c
        for first, second, met in (("0.0.0.0", "127.0.0.1", True), ("::1", "::", True), ("", "::1", True), ("0.0.0.0", "::", False),
                                   ("127.0.0.1", "::", False), ("0.0.0.0", "::1", False)):
            ports = [[first, number, "tcp"], [second, number, "tcp"]]
            services = [service._replace(ports=ports), service._replace(ports=ports[:1]), service._replace(name="b", ports=ports[1:])]
            for group in (services[:1], services[1:]):      # of one service, and of two
                with self.subTest(first=first, second=second):
                    if met:
                        self.assertFails("INVALID_DEPLOYMENT", lambda: margo_agent.check_rivals(group), "it cannot have")
                    else:
                        margo_agent.check_rivals(group)
        with socket.socket(socket.AF_INET) as taken:
            taken.bind(("0.0.0.0", 0))
            taken.listen(1)
            ask(["::", taken.getsockname()[1], "tcp"])      # each kind of addresses has its own
        network = margo_agent.Attachment("n", [], ["--ip=10.0.0.9"])
        services = [service._replace(name=name, networks=[network]) for name in "ab"]
        self.assertFails("INVALID_DEPLOYMENT", lambda: margo_agent.check_rivals(services), "services.b: it cannot have n ip=10.0.0.9 beside service a")

    def test_an_address_that_another_container_has_is_found_before_anything_stops(self):
        """This component's own addresses are free by then."""
        def make(**addresses):
            return make_document({"networks": {"n": addresses}}, networks={"n": {"external": True, "name": "plant"}})
        known = self.apply(make_document({}))
        with self.engine.open() as held:
            held["networks"]["plant"] = []
            held["containers"]["theirs"] = {"id": "f" * 64, "image": IMAGE, "labels": {"org.margo.service": ""}, "state": "running", "code": 0,
                                            "restarts": 0, "env": [], "argv": ["--network=plant"], "addresses": "10.1.0.9 fd00::9 "}
        known = self.apply(make(ipv4_address="10.1.0.7"), known)
        self.engine.forget_calls()
        self.assertFails("INSTALL_FAILED", lambda: self.apply(make(ipv4_address="10.1.0.9"), known),
                         "service main cannot have 10.1.0.9 in network plant: another container has it")
        self.assertNotIn("stop", [call[0] for call in self.changes()])
        self.apply(make(ipv4_address="10.1.0.8"), known)

    def test_a_network_that_somebody_else_uses_is_not_taken_away(self):
        """K3: nothing stops for a network that cannot be made anew; one that is not needed any more stays."""
        def make(**networks):
            return make_document({"networks": list(networks)}, networks=networks)
        known = self.apply(make(front={}, back={}))
        with self.engine.open() as held:
            held["containers"]["theirs"] = {"id": "f" * 64, "image": IMAGE, "labels": {"org.margo.service": ""}, "state": "running", "code": 0,
                                            "restarts": 0, "env": [], "argv": [f"--network={PROJECT}_front"]}
        before = {name: item["state"] for name, item in self.engine.containers().items()}
        self.engine.forget_calls()
        self.assertFails("INSTALL_FAILED", lambda: self.apply(make(front={"internal": True}, back={}), known),
                         f"network {PROJECT}_front is defined anew, and container {'f' * 12} is in it")
        self.assertNotIn("stop", [call[0] for call in self.changes()])
        self.assertEqual({name: item["state"] for name, item in self.engine.containers().items()}, before)
        for networks in ({"back": {}}, {"back": {"ipam": {"config": [{"subnet": "10.9.0.0/24"}]}}}):
            known = self.apply(make(**networks), known)
            with self.engine.open() as held:
                self.assertIn(f"{PROJECT}_front", held["networks"])

    def test_who_waits_for_a_task_that_takes_its_port_is_made_anew_after_it(self):
        """It did not change, but it runs, and the task that changed could not have its port, or its address."""
        def make(value, **members):
            return {"services": {"setup": dict({"image": IMAGE, "command": [value]}, **members),
                                 "main": {"image": IMAGE, "ports": ["18080:80"], "networks": {"default": {"ipv4_address": "10.1.0.7"}},
                                          "depends_on": {"setup": {"condition": "service_completed_successfully"}}}}}
        self.engine.change(exits={"setup": 0})
        for members in ({"ports": ["127.0.0.1:18080:80"]}, {"networks": {"default": {"ipv4_address": "10.1.0.7"}}}, {}):
            with self.subTest(members=members):
                known = self.apply(make("1"), wait=True)
                before = self.ids()
                self.engine.forget_calls()
                known = self.apply(make("2", **members), known, wait=True)
                after = self.ids()
                self.assertEqual(after["main"] != before["main"], bool(members))
                if members:                         # what holds the port stops before the task that takes it starts
                    calls = [call[-1] for call in self.changes() if call[0] in ("stop", "start") and "-try-" not in call[-1]]
                    self.assertLess(calls.index(before["main"]), calls.index(after["setup"]))
                    self.assertEqual(calls[-2:], [after["setup"], after["main"]])
                self.engine.forget_calls()
                self.apply(make("2", **members), known, wait=True)
                self.assertEqual(self.changes(), [], "a task that has ended is not run again")

    def test_an_address_that_is_known_to_be_wrong_only_here_is_found_before_anything_stops(self):
        """Of a network that is there already, or whose subnet the engine chooses: the fake one shows 10.1.0.0/24 of each."""
        known = self.apply(make_document({}))
        before = self.engine.containers()
        with self.engine.open() as held:
            held["networks"]["plant"] = []
        external, changed = {"n": {"external": True, "name": "plant"}}, {"n": None, "default": {"internal": True}}
        for networks in ({"n": None}, external, changed):
            for address, expected in (("10.1.0.7", networks != changed), ("10.2.0.7", False), ("10.1.0.1", False)):
                with self.subTest(networks=networks, address=address):
                    name = "default" if networks == changed else "n"        # one that goes first may come again with another one
                    document = make_document({"networks": {name: {"ipv4_address": address}}}, networks=networks)
                    if expected:
                        self.driver.remove(support.HELLO, "web", self.driver.observe(), time.monotonic() + 60)
                        self.apply(document)
                        self.driver.remove(support.HELLO, "web", self.driver.observe(), time.monotonic() + 60)
                        known = self.apply(make_document({}))
                        before = self.engine.containers()
                        continue
                    self.engine.forget_calls()
                    self.assertFails("INVALID_DEPLOYMENT", lambda: self.apply(document, known), f"'{address}' lies in no `subnet`")
                    self.assertNotIn("stop", [call[0] for call in self.changes()])
                    self.assertEqual({item["id"] for item in self.engine.containers().values() if item["state"] == "running"},
                                     {item["id"] for item in before.values()})

    def test_who_shares_a_namespace_gets_that_of_the_container_that_is_made(self):
        """K30: while it is made, another container still has the name."""
        def make(value):
            return {"services": {"a": {"image": IMAGE, "command": [value], "ipc": "shareable"},
                                 "b": {"image": IMAGE, "pid": "service:a", "ipc": "service:a", "network_mode": "service:a"}}}
        for value in "12":
            self.apply(make(value))
            made = self.engine.containers()[f"{PROJECT}-b-1"]["argv"]
            for key in ("network", "pid", "ipc"):
                self.assertIn(f"--{key}=container:{self.ids()['a']}", made)


class Volumes(DriverCase):
    """K-1: what nobody named has a name of the agent's."""

    def test_it_goes_on_with_whatever_is_made_in_its_place(self):
        self.engine.change(declared={IMAGE: ["/data", "/cache", "/both", "/tmpfs"]})
        document = make_document({"volumes": ["/own", "named:/cache"], "tmpfs": ["/tmpfs"]}, volumes={"named": None})
        facts = self.apply(document)
        volumes = facts["main"]["volumes"]
        self.assertEqual(set(volumes), {"/data", "/both", "/own"})
        with self.engine.open() as held:
            self.assertEqual(set(held["volumes"]), {f"{PROJECT}_named", *volumes.values()})
            for name in volumes.values():
                self.assertIn(f"org.margo.project={PROJECT}", held["volumes"][name])
        document["services"]["main"]["command"] = ["x"]
        self.assertEqual(self.apply(document, facts)["main"]["volumes"], volumes)
        with self.engine.open() as held:
            held["containers"] = {}
        self.assertEqual(self.apply(document)["main"]["volumes"], volumes)

    def test_one_whose_options_change_stays_as_it_is_and_that_is_said(self):
        """K10: no update removes a volume; what has no effect is in the log."""
        volatile = {"driver_opts": {"type": "tmpfs", "device": "tmpfs"}}
        with mock.patch.object(margo_agent, "log") as log:
            for options, told in ((None, 0), (None, 0), (volatile, 1), (volatile, 1), (None, 0)):
                log.reset_mock()
                self.apply(make_document({"volumes": ["x:/x"]}, volumes={"x": options}))
                self.assertEqual(sum("other driver_opts" in call[0][1] for call in log.call_args_list), told)

    def test_one_that_an_earlier_agent_left_to_the_engine_to_name_is_taken_over(self):
        self.engine.change(declared={IMAGE: ["/data"]})
        self.apply(make_document({}))
        with self.engine.open() as held:
            held["containers"][f"{PROJECT}-main-1"]["mounts"] = {"/data": "f" * 64}
        facts = self.apply(make_document({"command": ["x"]}))
        self.assertEqual(facts["main"]["volumes"], {"/data": "f" * 64})
        with self.engine.open() as held:
            held["containers"] = {}
        self.assertEqual(self.apply(make_document({"command": ["x"]}), facts)["main"]["volumes"], {"/data": "f" * 64})


class Memory(DriverCase):
    """What the engine remembers wrongly is put right, once an attempt."""

    def test_a_name_that_storage_alone_holds_is_freed(self):
        """F-01: left by a create that was killed, be it of a trial or of an earlier agent's; and nobody else's."""
        name = f"{PROJECT}-main-1"
        held = {name: "e" * 64, f"{name}-try-0a1b2c3d": "a" * 64, f"{name}-new-0a1b2c3d": "b" * 64, "else": "c" * 64, f"{PROJECT}2-main-1": "d" * 64}
        for value in "12":
            with self.subTest(value=value):
                self.engine.change(external=held)
                self.apply(make_document({"command": [value]}))
                self.assertEqual(set(self.engine.containers()), {name})
                with self.engine.open() as now:
                    self.assertEqual(set(now["external"].values()), {"c" * 64, "d" * 64})
        self.engine.change(external=held)
        self.driver.remove(support.HELLO, "web", self.driver.observe(), time.monotonic() + 60)
        with self.engine.open() as now:
            self.assertEqual(set(now["external"].values()), {"c" * 64, "d" * 64})

    def test_a_container_that_cannot_be_started_is_made_anew_with_those_in_its_network(self):
        """F-02"""
        document = {"services": {"a": {"image": IMAGE, "volumes": ["/data"]}, "b": {"image": IMAGE, "network_mode": "service:a"}, "c": {"image": IMAGE}}}
        facts = self.apply(document)
        with self.engine.open() as held:
            for item in held["containers"].values():
                item["state"] = "exited"
            held["unstartable"] = [facts["a"]["id"]]
        again = self.apply(document, facts)
        self.assertEqual([name for name in facts if facts[name]["id"] == again[name]["id"]], ["c"])
        self.assertEqual(again["a"]["volumes"], facts["a"]["volumes"])
        self.assertEqual({item["state"] for item in self.engine.containers().values()}, {"running"})
        self.assertIn(f"--network=container:{again['a']['id']}", self.engine.containers()[f"{PROJECT}-b-1"]["argv"])

    def test_a_damaged_image_of_ours_is_pulled_anew_and_no_other(self):
        """F-02"""
        document = make_document({"image": "registry.example/app:1"})
        for mine, served, expected in ((True, True, True), (False, True, False), (True, False, False)):
            with self.subTest(mine=mine, served=served):
                self.engine.change(unpullable=[] if served else ["registry.example/app:1"])
                self.engine.change(containers={}, images=["registry.example/app:1"], damaged=["registry.example/app:1"])
                images = frozenset(["registry.example/app:1"] if mine else [])
                self.driver.claim = self.claim._replace(images=images)
                self.engine.forget_calls()
                if expected:
                    self.apply(document)
                else:
                    self.assertFails("INSTALL_FAILED", lambda: self.apply(document), "no such file or directory")
                self.assertEqual(["image", "rm", "registry.example/app:1"] in self.changes(), expected)

    def test_an_image_that_is_well_is_not_pulled_for_an_option_that_is_not(self):
        self.driver.claim = self.claim._replace(images=frozenset([IMAGE]))
        self.engine.change(containers={f"{PROJECT}-main-1": {       # somebody else's, who has the name
            "id": "f" * 64, "image": IMAGE, "labels": {}, "state": "running", "code": 0, "restarts": 0, "argv": [], "env": []}})
        self.assertFails("INSTALL_FAILED", lambda: self.apply(make_document({})), "already in use")
        self.assertNotIn(["image", "rm", IMAGE], self.changes())

    def test_whatever_vanishes_at_whatever_moment_is_a_failure_that_heals(self):
        """E3 and its kind: somebody removes all containers before each command of an installation and of an update."""
        def make(value):
            return {"services": {"db": {"image": IMAGE, "environment": {"V": value}, "healthcheck": Startup.CHECKED},
                                 "web": {"image": IMAGE, "environment": {"V": value}, "depends_on": {"db": {"condition": "service_healthy"}}}}}

        for first in (None, make("1")):
            number, calls = 0, 1
            while number < calls:
                number += 1
                self.engine.change(containers={}, networks={}, thief=None)
                known = self.apply(first, wait=True) if first else {}
                self.engine.forget_calls()
                self.engine.change(thief=number)
                with self.subTest(first=bool(first), number=number):
                    try:
                        known = self.apply(make("2"), known, wait=True)
                    except (margo_agent.ComponentError, margo_agent.CommandError):
                        pass
                    calls = max(calls, len(self.engine.calls()))
                    self.engine.change(thief=None)
                    after = self.apply(make("2"), known, wait=True)
                    self.assertEqual({name: facts["id"] for name, facts in after.items()}, self.ids())
                    self.assertEqual({item["state"] for item in self.engine.containers().values()}, {"running"})
                    self.assertEqual(set(self.engine.containers()), {f"{PROJECT}-db-1", f"{PROJECT}-web-1"})
            self.assertGreater(calls, 10)


class Removal(DriverCase):
    def remove(self, component="web"):
        self.driver.remove(support.HELLO, component, self.driver.observe(), time.monotonic() + 60)

    def test_containers_in_any_state_and_networks_go_and_volumes_stay(self):
        """P-11, D-10: needs no compose file."""
        self.apply({"services": {"a": {"image": IMAGE, "volumes": ["data:/d"]}, "b": {"image": IMAGE},
                                 "c": {"image": IMAGE}}, "volumes": {"data": None}})
        with self.engine.open() as held:
            held["containers"][f"{PROJECT}-b-1"].update(state="created")
            held["containers"][f"{PROJECT}-c-1"].update(state="dead")
        os.remove(os.path.join(self.archive, "compose.yaml"))
        self.engine.forget_calls()
        self.remove()
        self.assertEqual(self.engine.containers(), {})
        with self.engine.open() as held:
            self.assertEqual((held["networks"], held["volumes"]), ({}, {f"{PROJECT}_data": [mark[len("--label="):] for mark in MARKS]}))

    def test_networks_of_another_owner_stay(self):
        """Contract, On the engine: whatever other labels something has, its owner says whose it is."""
        self.apply(make_document({}))
        project = f"org.margo.project={PROJECT}"
        with self.engine.open() as held:
            held["networks"].update(theirs=[project, "org.margo.owner=stranger"], older=[project], forged=[project, f"org.margo.owner={OWNER}"])
        self.remove()
        with self.engine.open() as held:
            self.assertEqual(list(held["networks"]), ["theirs"])

    def test_another_component_stays(self):
        self.apply(make_document({}))
        before = self.engine.containers()
        self.engine.forget_calls()
        self.driver.remove(support.HELLO, "other", self.driver.observe(), time.monotonic() + 60)
        self.assertEqual(self.engine.containers(), before)
        self.assertEqual([call for call in self.changes() if call[:2] != ["network", "ls"]], [])

    def test_the_id_of_a_deployment_has_no_case(self):
        self.apply(make_document({}))
        self.driver.remove(support.HELLO.upper(), "web", self.driver.observe(), time.monotonic() + 60)
        self.assertEqual(self.engine.containers(), {})

    def test_a_container_that_stays_is_a_failed_removal(self):
        """D-21: removed is only what the engine does not show any more."""
        self.apply(make_document({}))
        self.engine.change(stubborn=True)
        self.assertFails("REMOVE_FAILED", self.remove, "device or resource busy")
        self.assertIn(f"{PROJECT}-main-1", self.engine.containers())

    def test_a_removal_without_containers_is_done(self):
        self.remove()
        self.assertEqual(self.engine.containers(), {})
        self.assertEqual([call for call in self.changes() if call[:2] != ["network", "ls"]], [])

    def test_an_image_is_removed_or_kept_as_the_engine_says(self):
        self.assertTrue(self.driver.remove_image(IMAGE))
        self.assertFalse(self.driver.remove_image(IMAGE))
        self.assertEqual(self.changes(), [["image", "rm", IMAGE]] * 2)


class Unwilling(DriverCase):
    starts_processes = True

    def test_what_would_stop_for_ever_is_killed(self):
        """P-11: no grace period of an application is longer than the time that a removal has."""
        self.apply(make_document({"stop_grace_period": "9999h"}))
        support.write(os.path.join(self.engine.folder, "slow"), "stop")
        self.driver.remove(support.HELLO, "web", self.driver.observe(), time.monotonic() + 1)
        self.assertEqual(self.engine.containers(), {})
        self.assertIn("kill", [call[0] for call in self.changes()])


class Startup(DriverCase):
    CHECKED = {"test": ["CMD", "true"], "interval": "1ms", "retries": 2}

    def test_a_service_that_ends_with_a_code_fails_at_once(self):
        """C-164, contract, Failure: the error says which, the code, and the end of its log with the values masked."""
        self.engine.change(exits={"main": 3})
        message = self.assertFails("INSTALL_FAILED", lambda: self.apply(
            make_document({"environment": ["SECRET", "SHORT"]}), parameters={"SECRET": "s3cret", "SHORT": "x"},
            wait=True),
            "service main exited with code 3", "its log ends: ", "last words", "SECRET=***")
        self.assertNotIn("s3cret", message)

    def test_without_wait_the_start_is_the_end(self):
        """C-151: wait false is done once everything is started."""
        self.engine.change(exits={"main": 3})
        self.assertFalse(self.apply(make_document({}))["main"]["finished"])

    def test_a_restart_is_a_failure_though_it_runs_now(self):
        """P-6: the first lucky sample is no success."""
        self.engine.change(restless=["main"])
        self.assertFails("INSTALL_FAILED", lambda: self.apply(make_document({}), wait=True), "service main",
                         "1 restarts")

    def test_restarts_of_the_past_are_forgiven(self):
        """P-7: what was restarted once, long ago, does not fail the repair of its neighbour."""
        self.apply(make_document({}))
        with self.engine.open() as held:
            held["containers"][f"{PROJECT}-main-1"]["restarts"] = 2
        self.assertIn("main", self.apply(make_document({}), wait=True))

    def test_healthy_is_installed_and_unhealthy_is_not(self):
        """C-165: checked by the agent, because podman alone may have nobody who does."""
        document = make_document({"healthcheck": self.CHECKED})
        self.assertIn("main", self.apply(document, wait=True))
        self.assertIn(["healthcheck", "run", self.ids()["main"]], self.engine.calls())
        self.engine.change(unhealthy=["main"])
        self.assertFails("UNHEALTHY", lambda: self.apply(document, wait=True), "service main is unhealthy",
                         "last words")

    def test_a_health_check_of_no_retries_can_still_pass(self):
        self.assertIn("main", self.apply(make_document({"healthcheck": {"test": "true", "retries": 0}}), wait=True))

    def test_a_health_check_of_the_image_counts_unless_the_file_turns_it_off(self):
        """K5: wherever it was said."""
        self.engine.change(checked={IMAGE: {"Test": ["CMD", "/x"], "Interval": 1000000, "Retries": 2}}, unhealthy=["main"])
        self.assertFails("UNHEALTHY", lambda: self.apply(make_document({}), wait=True), "service main is unhealthy")
        self.assertIn("main", self.apply(make_document({"healthcheck": {"disable": True}}), wait=True))
        self.engine.change(unhealthy=[])
        self.assertIn("main", self.apply(make_document({}), wait=True))

    def test_times_of_a_health_check_are_what_the_engine_shows(self):
        for item, expected in (({"Test": ["CMD", "a"]}, (30, 3, 0)), ({"Test": ["NONE"]}, None), ({}, None), ({"Test": []}, None),
                ({"Test": ["CMD-SHELL", "a"], "Interval": 60 * 10 ** 9, "Retries": 7, "StartPeriod": 5 * 10 ** 8}, (60, 7, 0.5)),
                ({"Test": ["CMD", "a"], "Interval": 0, "Retries": 0}, (30, 3, 0))):
            self.assertEqual(margo_agent.parse_check(item), expected)

    def test_a_start_that_takes_too_long_says_what_is_waited_for(self):
        """C-152: and the log's end."""
        self.engine.change(unhealthy=["main"])
        document = make_document({"healthcheck": {"test": "true", "interval": "1h"}})
        self.assertFails("INSTALL_TIMEOUT", lambda: self.apply(document, wait=True, patience=1),
                         "not up within 1 s: main is not healthy yet", "last words")

    def starts(self):
        """The services whose containers were started, in order."""
        services = {item["id"]: item["labels"]["org.margo.service"] for item in self.engine.containers().values()}
        return [services[call[1]] for call in self.changes() if call[0] == "start"]

    def test_what_must_end_first_has_ended_before_the_next_is_started(self):
        self.engine.change(exits={"migrate": 0})
        document = {"services": {"main": {"image": IMAGE,
                                          "depends_on": {"migrate": {"condition": "service_completed_successfully"}}},
                                 "migrate": {"image": IMAGE}}}
        known = self.apply(document, wait=True)
        self.assertEqual({name: facts["finished"] for name, facts in known.items()}, {"migrate": True, "main": False})
        self.assertEqual(self.starts(), ["migrate", "main"])

    def test_what_fails_first_keeps_the_next_from_being_started(self):
        self.engine.change(exits={"migrate": 4})
        document = {"services": {"main": {"image": IMAGE,
                                          "depends_on": {"migrate": {"condition": "service_completed_successfully"}}},
                                 "migrate": {"image": IMAGE}}}
        self.assertFails("INSTALL_FAILED", lambda: self.apply(document), "service migrate exited with code 4")
        self.assertEqual(self.starts(), ["migrate"])

    def test_what_must_be_healthy_is_healthy_before_the_next_is_started(self):
        document = {"services": {"main": {"image": IMAGE, "depends_on": {"db": {"condition": "service_healthy"}}},
                                 "db": {"image": IMAGE, "healthcheck": self.CHECKED}}}
        self.apply(document)
        kinds = [call[0] for call in self.engine.calls()]
        self.assertLess(kinds.index("healthcheck"), len(kinds) - 1 - kinds[::-1].index("start"))
        self.assertEqual(self.starts(), ["db", "main"])
        self.engine.change(unhealthy=["db"])
        document["services"]["db"]["command"] = document["services"]["main"]["command"] = ["x"]
        before = set(self.ids().values())
        self.engine.forget_calls()
        self.assertFails("UNHEALTHY", lambda: self.apply(document), "service db is unhealthy")
        self.assertEqual(self.starts(), ["db"])
        self.assertLess(before, {item["id"] for item in self.engine.containers().values()}, "the way back is gone")


if __name__ == "__main__":
    unittest.main()
