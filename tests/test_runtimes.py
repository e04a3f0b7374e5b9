"""Runtimes: what a compose file means, what it may not ask for, and what the engine is told.

tests/data/compose/valid: files that make_project must read as Docker Compose reads them; their head holds
`# parameters: {JSON}` and `# files: {JSON of path: text}`.
tests/data/compose/invalid: files to be refused; their first line is `# expected: CODE part of message`.
"""
import atexit
import functools
import itertools
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import unittest
from unittest import mock

import margo_agent
from tests import fake_podman, support

CORPUS = os.path.join(support.DATA, "compose")
PROJECT = f"web-{support.HELLO}"
IMAGE = support.IMAGE
MARGO_LABELS = ("org.margo.deployment", "org.margo.component", "org.margo.project", "org.margo.service",
                "org.margo.hash", "org.margo.device", "org.margo.owner")
OWNER = "spiffe://factory.example/margo/wfm/main/client/a#a"
MARKS = [f"--label=org.margo.owner={OWNER}", "--label=org.margo.project=web-3f1d6f0e-5c35-4c9f-9b43-2f6f6c1f7a10"]


def list_corpus(kind):
    """The names of the files of a corpus."""
    return sorted(name[:-len(".yaml")] for name in os.listdir(os.path.join(CORPUS, kind)) if name.endswith(".yaml"))


def read_corpus(kind, name):
    """(text, {what stands in the head: value}) of a corpus file."""
    with open(os.path.join(CORPUS, kind, name + ".yaml"), encoding="utf-8", newline="") as file:
        text = file.read()
    head = dict(re.findall(r"^# (parameters|files|expected): (.*)$", text, re.MULTILINE))
    return text, {key: value if key == "expected" else json.loads(value) for key, value in head.items()}


def make_config(**settings):
    """The configuration; runtime__engine="podman" sets runtime.engine."""
    document = {"wfm": {"url": "https://wfm.factory.example"},
                "identity": {"certificate": "/c", "key": "/k", "trust_bundle": "/b"},
                "runtime": {"settle": "0s"}, "policy": {}}
    for key, value in settings.items():
        section, name = key.split("__")
        document[section][name] = value
    return margo_agent.make_config(document, "/", {})


class RuntimeCase(unittest.TestCase):
    def setUp(self):
        self.folder = os.path.realpath(support.make_folder(self))
        self.archive = os.path.join(self.folder, "archive")
        os.mkdir(self.archive)
        self.config = make_config()

    def add_file(self, path, content):
        """A file of the archive."""
        return support.write(os.path.join(self.archive, path), content)

    def make_workload(self, parameters=None, environment=None, wait=False, component="web"):
        return margo_agent.Workload(support.HELLO, component, PROJECT, self.archive, parameters or {},
                                    environment or {}, wait, owner=OWNER)

    def settle(self, document, parameters=None, strict=True, environment=None, engine="podman"):
        """The Project of a compose file's text or value."""
        if not isinstance(document, str):
            document = json.dumps(document)
        return margo_agent.make_project(margo_agent.load_yaml(document), self.make_workload(parameters, environment),
                                        self.config.policy,
                                        engine, strict)

    def settle_service(self, keys, parameters=None, **members):
        """The Service `main` with these keys."""
        project = self.settle(make_document(keys, **members), parameters)
        return next(service for service in project.services if service.name == "main")

    def assertRefused(self, document, *words, **options):
        """Asserts that make_project raises ComponentError whose message has all the words, each naming a fault."""
        code = options.pop("code", "INVALID_DEPLOYMENT")
        with self.assertRaises(margo_agent.ComponentError, msg=repr(document)) as caught:
            self.settle(document, **options)
        for word in words:
            self.assertIn(word, caught.exception.message)
        self.assertEqual(caught.exception.code, code, caught.exception.message)
        self.assertTrue(caught.exception.message.startswith("compose.yaml: "), caught.exception.message)


def make_document(keys, **members):
    """A compose file's value with one service `main` of these keys."""
    return dict({"services": {"main": dict({"image": IMAGE}, **keys)}}, **members)


# Interpolation

class Interpolation(RuntimeCase):
    VARIABLES = margo_agent.Variables({"SET": "value", "EMPTY": "", "PRICE": "5$SET", "_under": "u", "A1": "one"})
    FORMS = [                                       # also given to Docker Compose, see below
        ("plain", "plain"), ("", ""), ("$SET", "value"), ("${SET}", "value"), ("<$SET>", "<value>"),
        ("$SET.x", "value.x"), ("$SETx", ""),
        ("$_under$A1", "uone"), ("$$", "$"), ("$$SET", "$SET"), ("$$$SET", "$value"), ("$$$$", "$$"),
        ("$PRICE", "5$SET"), ("${PRICE}", "5$SET"),
        ("${UNSET}", ""), ("$UNSET", ""), ("${SET:-d}", "value"), ("${EMPTY:-d}", "d"), ("${UNSET:-d}", "d"),
        ("${SET-d}", "value"),
        ("${EMPTY-d}", ""), ("${UNSET-d}", "d"), ("${SET:+o}", "o"), ("${EMPTY:+o}", ""), ("${UNSET:+o}", ""),
        ("${SET+o}", "o"),
        ("${EMPTY+o}", "o"), ("${UNSET+o}", ""), ("${SET:?m}", "value"), ("${SET?m}", "value"), ("${EMPTY?m}", ""),
        ("${UNSET:-}", ""),
        ("${UNSET:-${SET}}", "value"), ("${UNSET:-$SET}", "value"), ("${UNSET:-${EMPTY:-${ALSO-deep}}}", "deep"),
        ("${SET:+<${SET}>}", "<value>"),
        ("${UNSET:-a}b}", "ab}"), ("${UNSET:-{x}}", "{x}"), ("${UNSET:-a:-b}", "a:-b"), ("${UNSET:-$$}", "$"),
        ("${UNSET:-$${SET}}", "${SET}"),
        ("${UNSET:-${SET}-${SET}}", "value-value"), ("${SET}}", "value}"), ("${UNSET:-\"q\" 'r'}", "\"q\" 'r'"),
        ("${UNSET:-\\}", "\\"),
        ("a${UNSET:-}${SET}", "avalue"), ("${SET+x}${UNSET-y}", "xy"), ("${EMPTY:-${PRICE}}", "5$SET")]

    def test_every_form_gives_its_text(self):
        """C-180: parameters feed ${NAME} and all forms of Compose; a value is never interpolated again."""
        for text, expected in self.FORMS:
            with self.subTest(text=text):
                self.assertEqual(margo_agent.interpolate(text, self.VARIABLES, "here"), expected)

    def test_docker_compose_gives_the_same_texts(self):
        support.require("docker-compose")
        document = make_document({"environment": {f"F{index}": text for index, (text, _) in enumerate(self.FORMS)}})
        self.add_file("compose.yaml", json.dumps(document))
        answer = ask_compose(self.archive, self.VARIABLES)
        for index, (text, expected) in enumerate(self.FORMS):
            with self.subTest(text=text):
                self.assertEqual(unescape(answer["services"]["main"]["environment"][f"F{index}"]), expected)

    def test_a_form_that_is_unknown_is_refused_at_its_place(self):
        for text in ("${}", "${1}", "${SET", "${SET:-${UNSET}", "${SET!x}", "${ SET}", "${SET }", "a${", "${SET:x}",
                     "${\u00c9}", "$", "a$ b", "$1"):
            with self.subTest(text=text):
                self.assertRefused(make_document({"command": ["echo", text]}), "services.main.command[1]: a $")

    def test_a_needed_name_that_is_missing_is_a_fault_of_the_parameters(self):
        for text, words in (("${T:?}", "T is needed"), ("${T?set T}", "T is needed: set T"),
                            ("${EMPTY:?set it}", "EMPTY is needed: set it"),
                            ("${T:?ask ${SET}}", "T is needed: ask value"),
                            ("${UNSET:-${T:?inner}}", "T is needed: inner")):
            with self.subTest(text=text):
                self.assertRefused(make_document({"environment": {"TOKEN": text}}),
                                   f"services.main.environment.TOKEN: {words}",
                                   code="PARAMETER_INVALID", parameters=self.VARIABLES)

    def test_the_branch_that_is_not_taken_asks_for_nothing(self):
        for text, expected in (("${SET:-${T:?no}}", "value"), ("${UNSET:+${T:?no}}", "")):
            self.assertEqual(margo_agent.interpolate(text, self.VARIABLES, "here"), expected)

    def test_find_brace_skips_the_braces_of_inner_names(self):
        for text, start, end in (("${A}", 2, 3), ("${A:-${B}}", 5, 9), ("${A:-${B:-${C}}}x}", 5, 15),
                                 ("${A:-{}}", 5, 6)):
            with self.subTest(text=text):
                self.assertEqual(margo_agent.find_brace(text, start, "here"), end)
        with self.assertRaises(margo_agent.ComponentError) as caught:
            margo_agent.find_brace("${A:-${B}", 5, "services.main.image")
        self.assertIn("services.main.image: a ${ that is not closed", caught.exception.message)

    def test_defaults_nested_without_end_are_refused(self):
        """What an archive holds never takes the agent down."""
        text = "${A:-" * 1200 + "x" + "}" * 1200
        self.assertRefused(make_document({"command": [text]}), "services.main.command[0]")

    def test_values_at_any_depth_are_interpolated_and_keys_are_not(self):
        value = {"$SET": ["$SET", {"deep": "${SET}"}], "number": 7, "none": None, "flag": True}
        self.assertEqual(margo_agent.interpolate_all(value, self.VARIABLES),
                         {"$SET": ["value", {"deep": "value"}], "number": 7, "none": None, "flag": True})

    def test_extension_keys_are_dropped_unread(self):
        """Contract, Compose keys: x-… keys are ignored, even where nothing could make sense of them."""
        service = self.settle_service({"x-a": "${", "healthcheck": {"test": "true", "x-b": "${"},
                                       "deploy": {"x-c": []}},
                                      **{"x-d": {"services": "${UNSET:?}"}})
        self.assertEqual(service.hash, self.settle_service({"healthcheck": {"test": "true"}, "deploy": {}}).hash)

    def test_a_service_may_be_called_x_something(self):
        """A service's name is no key of the format: Docker Compose starts x-ray too; none is left out in silence."""
        project = self.settle({"services": {"x-ray": {"image": IMAGE}, "main": {"image": IMAGE}}})
        self.assertEqual(sorted(service.name for service in project.services), ["main", "x-ray"])


    def test_no_name_of_a_service_keeps_extensions(self):
        """podman-compose runs the host's own files by `x-podman.rootfs`: what is dropped goes by where it stands, not by how that is spelt."""
        for name in ("web.labels", "networks", "a.environment"):
            services = self.settle({"services": {name: {"image": IMAGE, "x-podman.rootfs": "/", "labels": {"x-mine": "1"}, "networks": {
                "labels": {"x-podman.mac_address": "1"}}}}, "networks": {"labels": None}}, strict=False).document["services"]
            self.assertNotIn("x-podman.rootfs", services[name])
            self.assertEqual(services[name]["labels"]["x-mine"], "1")
            self.assertEqual(services[name]["networks"], {"labels": {}})

    def test_variables_are_no_bomb(self):
        """A few lines that double each other, or one long value that is named again and again, would take all the memory there is."""
        laughs = "A0=aaaaaaaaaa\n" + "".join(f"A{n}=" + f"$A{n - 1}" * 10 + "\n" for n in range(1, 12))
        self.add_file(".env", laughs)
        self.assertRefused(make_document({}), "characters into the file")
        self.add_file(".env", "BIG=" + "x" * 50000)
        self.assertRefused(make_document({"command": ["$BIG"] * 2000}), "characters into the file")
        self.add_file("a.env", "x=" + "y" * 500000)
        self.assertRefused(make_document({"env_file": ["a.env"] * 20}), "characters into the file")
        self.assertEqual(self.settle_service({"command": ["$BIG"] * 10}).command, ["x" * 50000] * 10)


class EnvFiles(RuntimeCase):
    VARIABLES = margo_agent.Variables({"GIVEN": "parameter", "EMPTY": "", "BOTH": "parameter"})
    LINES = [                                       # also given to Docker Compose, see below
        ("X=1", {"X": "1"}), ("X=", {"X": ""}), ("  X=1  ", {"X": "1"}), ("X = 1", {"X": "1"}), ("X=a b", {"X": "a b"}),
        ("# X=1", {}), ("", {}),
        ("export X=1", {"X": "1"}), ("export   X=1", {"X": "1"}), ("X=a # c", {"X": "a"}), ("X=a#c", {"X": "a#c"}),
        ("X=#c", {"X": "#c"}),
        ("X==", {"X": "="}), ("X=a=b", {"X": "a=b"}), ("X=1\nX=2", {"X": "2"}), ("A.b-C=1", {"A.b-C": "1"}),
        ("X=a\r\nY=b\r\n", {"X": "a", "Y": "b"}),
        ('X="a b"', {"X": "a b"}), ('X="a" # c', {"X": "a"}), ("X='a' # c", {"X": "a"}), ('X="a # b"', {"X": "a # b"}),
        ('X=""', {"X": ""}),
        ("X=''", {"X": ""}), ('X="a\\nb"', {"X": "a\nb"}), ('X="a\\tb"', {"X": "a\tb"}), ('X="a\\\\b"', {"X": "a\\b"}),
        ('X="a\\"b"', {"X": 'a"b'}),
        ('X="a\' b"', {"X": "a' b"}), ("X=a'b'", {"X": "a'b'"}), ('X=a"b', {"X": 'a"b'}), ("X=a\\nb", {"X": "a\\nb"}),
        ("X=$GIVEN", {"X": "parameter"}), ('X="${GIVEN}"', {"X": "parameter"}), ("X='$GIVEN'", {"X": "$GIVEN"}),
        ("X=a$$GIVEN", {"X": "a$GIVEN"}),
        ("X=${UNSET:-d e}", {"X": "d e"}), ("A=file\nX=$A", {"A": "file", "X": "file"}),
        ("X=\u00e9\u20ac", {"X": "\u00e9\u20ac"}),
        ('X="a\\$GIVEN"', {"X": "a$GIVEN"}),        # a password with an escaped $ stays as it was written
        ('X="a\\d"', {"X": "a\\d"}),
        ("BOTH=file\nX=$BOTH", {"BOTH": "file", "X": "parameter"}),
        ("X=a\u2028Y=b", {"X": "a\u2028Y=b"}), ("X=a\x0cY=b", {"X": "a\x0cY=b"})]

    def test_every_line_is_read(self):
        for text, expected in self.LINES:
            with self.subTest(text=text):
                self.assertEqual(margo_agent.parse_env_file(text, self.VARIABLES, "app.env"), expected)

    def test_docker_compose_reads_the_same(self):
        support.require("docker-compose")
        services = {}
        for index, (text, _) in enumerate(self.LINES):
            self.add_file(f"{index}.env", text)
            services[f"s{index}"] = {"image": IMAGE, "env_file": f"{index}.env"}
        self.add_file("compose.yaml", json.dumps({"services": services}))
        answer = ask_compose(self.archive, self.VARIABLES)["services"]
        for index, (text, expected) in enumerate(self.LINES):
            with self.subTest(text=text):
                found = answer[f"s{index}"].get("environment") or {}
                self.assertEqual({name: unescape(value) for name, value in found.items()}, expected)

    def test_a_bare_name_takes_the_parameter_of_its_name(self):
        self.assertEqual(margo_agent.parse_env_file("GIVEN\nUNSET\nEMPTY\n", self.VARIABLES, "app.env"),
                         {"GIVEN": "parameter", "EMPTY": ""})

    def test_what_is_not_supported_is_refused_with_its_line(self):
        for text, line in (("no name", 1), ("A=1\n=2", 2), ("A=1\n\n-X=2", 3), ("1A=x", 1), ("A=${", 1),
                           ("A=1\nB=${}", 2), ('A=1\nB="open', 2),
                           ("A='it''s'", 1), ("A[0]=1", 1)):
            with self.subTest(text=text):
                with self.assertRaises(margo_agent.ComponentError) as caught:
                    margo_agent.parse_env_file(text, margo_agent.Variables(), "app.env")
                self.assertIn(f"app.env, line {line}: ", caught.exception.message)

    def test_a_long_line_is_read_as_fast_as_many_lines(self):
        """Neither blanks before what could be a comment nor names that each line could refer to make the time grow by the square."""
        self.assertEqual(self.read("X=a" + " " * 200000 + "b"), {"X": "a" + " " * 200000 + "b"})
        self.assertEqual(len(self.read("".join(f"X{n}=$GIVEN\n" for n in range(60000)))), 60000)

    def read(self, text):
        return margo_agent.parse_env_file(text, margo_agent.Variables(GIVEN="1"), "app.env")

    def test_quotes_over_several_lines_are_read_whole_or_refused(self):
        for text, expected in (('X="one\ntwo"', {"X": "one\ntwo"}), ('X="one\nB=2"', {"X": "one\nB=2"}),
                               ("X='one\nB=2'", {"X": "one\nB=2"}),
                               ("X='it\\'s'", {"X": "it's"})):
            with self.subTest(text=text):
                try:
                    self.assertEqual(margo_agent.parse_env_file(text, margo_agent.Variables(), "app.env"), expected)
                except margo_agent.ComponentError as error:
                    self.assertIn("app.env, line 1: ", error.message)

    def test_a_parameter_stands_above_the_files_own_default(self):
        """The .env file gives defaults; what the WFM sends wins, also where a later line of .env refers to it."""
        self.add_file(".env", "A=default\nB=default\nC=${A}\n")
        service = self.settle_service({"environment": ["A", "B", "C"]}, {"A": "sent"})
        self.assertEqual(service.environment, {"A": "sent", "B": "default", "C": "sent"})


# What Docker Compose makes of the same file

def start_compose(folder, variables, *options):
    """`docker-compose config` on its way; it needs no engine."""
    environ = dict({key: os.environ[key] for key in os.environ if key in ("PATH", "HOME") or key.startswith("PYENV")},
                   **variables)
    argv = [support.find_compose(), "--project-name", PROJECT] + list(options or ("--file",
        os.path.join(folder, "compose.yaml")))
    return subprocess.Popen(argv + ["config", "--format", "json"], env=environ, cwd=folder, stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def end_compose(process):
    """The value that `docker-compose config` printed."""
    stdout, stderr = process.communicate()
    if not stdout.strip():
        raise AssertionError(f"Docker Compose refuses the file: {stderr.decode()}")
    return json.loads(stdout.decode())


def ask_compose(folder, variables):
    """What Docker Compose makes of compose.yaml in a folder, the variables given by its environment."""
    return end_compose(start_compose(folder, variables))


def unescape(value):
    """What `config` prints, with its `$$` made `$` again."""
    if isinstance(value, dict):
        return {key: unescape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [unescape(item) for item in value]
    return value.replace("$$", "$") if isinstance(value, str) else value


def to_bytes(text):
    """A size such as 64m or 67108864 in bytes."""
    number, unit = re.fullmatch(r"([0-9.]+)([bkmg]?)b?", str(text).lower()).groups()
    return int(float(number) * {"": 1, "b": 1, "k": 2 ** 10, "m": 2 ** 20, "g": 2 ** 30}[unit])


def to_time(text):
    """A duration such as 1m30s in seconds."""
    units = {"h": 3600, "m": 60, "s": 1, "ms": 0.001}
    return sum(float(number) * units[unit] for number, unit in re.findall(r"([0-9.]+)(ms|h|m|s)", text))


NORMAL = {"--memory": to_bytes, "--shm-size": to_bytes, "--cpus": float, "--pids-limit": int, "--stop-timeout": int}
HEALTH = {"interval": "--health-interval", "timeout": "--health-timeout", "retries": "--health-retries",
          "start_period": "--health-start-period"}
SCALARS = {"user": "--user", "hostname": "--hostname", "working_dir": "--workdir", "stop_signal": "--stop-signal",
           "restart": "--restart",
           "platform": "--platform", "mem_limit": "--memory", "cpus": "--cpus", "pids_limit": "--pids-limit",
           "shm_size": "--shm-size",
           "ipc": "--ipc"}
LISTS = {"cap_drop": "--cap-drop", "group_add": "--group-add", "dns": "--dns", "security_opt": "--security-opt",
         "tmpfs": "--tmpfs"}
FLAGS = {"init": "--init", "read_only": "--read-only", "tty": "--tty", "stdin_open": "--interactive"}
ABSENT = object()


class Meaning:
    """What a service means, in terms that do not depend on who says it; see read_agent and read_compose."""

    def __init__(self):
        self.facts = {"options": [], "ports": [], "mounts": [], "entrypoint": None, "health": {}}

    def add_option(self, name, value=""):
        """One option of the engine, its value in a normal form."""
        self.facts["options"].append((name, str(NORMAL.get(name, str)(value))))

    def add_port(self, host, published, target, protocol):
        """One published port; ranges of the container's side are one port each, as Docker Compose has them."""
        first, _, last = str(target).partition("-")
        for offset in range(int(last or first) - int(first) + 1):
            start = str(int(published.split("-")[0]) + offset) if last and published else published
            self.facts["ports"].append((host, start, int(first) + offset, protocol))

    def finish(self):
        """The facts, in an order that does not matter."""
        return dict(self.facts, options=sorted(self.facts["options"]), ports=sorted(self.facts["ports"]),
                    mounts=sorted(self.facts["mounts"]))


def read_agent(service, names):
    """The meaning of a Service of margo_agent; names: the services that are started."""
    meaning = Meaning()
    for argument in service.arguments:
        name, _, value = argument.partition("=")
        if name == "--publish":
            host, published, target, protocol = re.fullmatch(
                r"(?:(?:\[?([0-9a-f.:]+?)\]?:(?=[0-9-]*:))?([0-9-]*):)?([0-9-]+)(?:/(\w+))?", value).groups()
            meaning.add_port(host or "", published or "", target, protocol or "tcp")
        elif name == "--volume":
            parts = value.split(":")
            meaning.facts["mounts"].append((parts[0], parts[1], "ro" in parts[2:]) if len(parts) > 1 else ("", parts[0],
                False))
        elif name == "--entrypoint":
            meaning.facts["entrypoint"] = value
        elif name == "--health-cmd":
            meaning.facts["health"]["test"] = ["CMD"] + json.loads(value) if value.startswith("[") else ["CMD-SHELL",
                value]
        elif name == "--no-healthcheck":
            meaning.facts["health"]["disable"] = True
        elif name in HEALTH.values():
            meaning.facts["health"][name] = to_time(value) if name != "--health-retries" else int(value)
        else:
            meaning.add_option(name, value)
    networks = [(item[0], sorted(item[1]), item[2]) if item[1] is not None else (item[0], None,
        None) for item in service.networks]
    return dict(meaning.finish(), image=service.image, argv=service.command, environment=service.environment,
                files=service.files,
                networks=sorted(networks), depends_on={name: facts for name,
                    facts in service.depends_on.items() if name in names})


def read_compose(service, answer):
    """The meaning of a service in the answer of Docker Compose."""
    service, meaning = unescape(service), Meaning()
    for key, name in SCALARS.items():
        if service.get(key) not in (None, 0):
            meaning.add_option(name, service[key])
    for key, name in LISTS.items():
        for value in service.get(key) or ():
            meaning.add_option(name, value)
    for key, name in FLAGS.items():
        if service.get(key):
            meaning.add_option(name)
    read_compose_options(service, meaning)
    for port in service.get("ports") or ():
        meaning.add_port(port.get("host_ip", ""), port.get("published", ""), port["target"], port["protocol"])
    for mount in service.get("volumes") or ():
        read_compose_mount(mount, answer, meaning)
    read_compose_health(service.get("healthcheck") or {}, meaning)
    entrypoint = service.get("entrypoint")
    if entrypoint is not None:
        meaning.facts["entrypoint"] = entrypoint[0] if entrypoint else ""
    return dict(
        meaning.finish(), image=service["image"], argv=(entrypoint or [])[1:] + (service.get("command") or []),
        environment={name: value for name, value in (service.get("environment") or {}).items() if value is not None},
        files=dict(read_compose_config(item, answer) for item in service.get("configs") or ()),
        networks=read_compose_networks(service, answer),
        depends_on={name: (facts["condition"], facts["required"]) for name,
                    facts in (service.get("depends_on") or {}).items()
                    if name in answer["services"]})


def read_compose_options(service, meaning):
    """What is an option for each of several names, and the limits of `deploy`."""
    for name, value in (service.get("labels") or {}).items():
        if name not in MARGO_LABELS:
            meaning.add_option("--label", f"{name}={value}")
    for name, value in (service.get("sysctls") or {}).items():
        meaning.add_option("--sysctl", f"{name}={value}")
    for value in service.get("extra_hosts") or ():
        meaning.add_option("--add-host", value.replace("=", ":", 1))
    for name, value in (service.get("ulimits") or {}).items():
        value = f"{value['soft']}:{value['hard']}" if isinstance(value, dict) else value
        meaning.add_option("--ulimit", f"{name}={value}")
    logging = service.get("logging") or {}
    if "driver" in logging:
        meaning.add_option("--log-driver", logging["driver"])
    for name, value in (logging.get("options") or {}).items():
        meaning.add_option("--log-opt", f"{name}={value}")
    limits = ((service.get("deploy") or {}).get("resources") or {}).get("limits") or {}
    for key, name in (("cpus", "--cpus"), ("memory", "--memory"), ("pids", "--pids-limit")):
        if key in limits:
            meaning.add_option(name, limits[key])
    if "stop_grace_period" in service:
        meaning.add_option("--stop-timeout", to_time(service["stop_grace_period"]))


def read_compose_mount(mount, answer, meaning):
    """One entry of `volumes`."""
    if mount["type"] == "tmpfs":
        size = (mount.get("tmpfs") or {}).get("size")
        meaning.add_option("--tmpfs", mount["target"] + (f":size={size}" if size else ""))
        return
    source = mount.get("source", "")
    if mount["type"] == "volume" and source:
        source = answer["volumes"][source]["name"]
    meaning.facts["mounts"].append((source, mount["target"], bool(mount.get("read_only"))))


def read_compose_health(health, meaning):
    """A health check."""
    if health.get("disable"):
        meaning.facts["health"]["disable"] = True
        return
    if "test" in health:
        meaning.facts["health"]["test"] = health["test"]
    for key, name in HEALTH.items():
        if key in health:
            meaning.facts["health"][name] = health[key] if key == "retries" else to_time(health[key])


def read_compose_config(item, answer):
    """(target, text) of one entry of `configs`."""
    config = unescape(answer["configs"][item["source"]])
    if "content" in config:
        return item.get("target", "/" + item["source"]), config["content"]
    with open(config["file"], encoding="utf-8") as file:
        return item.get("target", "/" + item["source"]), file.read()


def read_compose_networks(service, answer):
    """[(engine's name, aliases, address options)], or the mode."""
    if "network_mode" in service:
        mode = service["network_mode"]
        return [(f"container:{PROJECT}-{mode[8:]}-1" if mode.startswith("service:") else mode, None, None)]
    networks = []
    for name, facts in service["networks"].items():
        facts = facts or {}
        addresses = [f"{option}={facts[key]}" for key, option in (("ipv4_address", "--ip"),
            ("ipv6_address", "--ip6")) if key in facts]
        networks.append((answer["networks"][name]["name"], sorted(facts.get("aliases") or ()), addresses))
    return sorted(networks)


@functools.lru_cache(maxsize=None)
def ask_about_corpus():
    """({name: folder}, {name: answer to the file}, {name: answer to the file for a provider}), all asked at once."""
    holder = RuntimeCase()
    holder.folder = os.path.realpath(tempfile.mkdtemp(prefix="margo-corpus-"))
    atexit.register(shutil.rmtree, holder.folder, True)
    holder.config, folders, first, second = make_config(), {}, {}, {}
    for name in list_corpus("valid"):
        text, head = read_corpus("valid", name)
        holder.archive = folders[name] = os.path.join(holder.folder, name, "archive")
        holder.add_file("compose.yaml", text)
        for path, content in head.get("files", {}).items():
            holder.add_file(path, content)
        parameters = head.get("parameters", {})
        first[name] = start_compose(folders[name], parameters)
        document = holder.settle(text, parameters, strict=False).document
        path = support.write(os.path.join(holder.folder, name, "resolved.json"),
                             margo_agent.make_json(margo_agent.escape_dollars(document)))
        hostile = dict({key: "hostile" for key in parameters}, SET="hostile", UNSET="hostile", HOST="hostile")
        second[name] = start_compose(folders[name], hostile, "--file", path, "--project-directory", folders[name])
    return tuple([folders] + [{name: process.communicate() for name, process in asked.items()} for asked in (first,
        second)])


class ValidCorpus(RuntimeCase):
    maxDiff = None

    def read_answer(self, answer):
        """What Docker Compose printed, as a value."""
        stdout, stderr = answer
        self.assertTrue(stdout.strip(), stderr.decode())
        return json.loads(stdout.decode())

    def test_there_are_files(self):
        self.assertGreater(len(list_corpus("valid")), 15)

    def test_docker_compose_means_the_same_by_each_file(self):
        """C-180: what the builtin driver tells the engine is what Docker Compose resolves, fed the same variables."""
        support.require("docker-compose")
        folders, answers, _ = ask_about_corpus()
        for name, folder in folders.items():
            with self.subTest(file=name):
                answer = self.read_answer(answers[name])
                text, head = read_corpus("valid", name)
                self.archive = folder
                project = self.settle(text, head.get("parameters"))
                self.assertEqual({service.name for service in project.services}, set(answer["services"]))
                for service in project.services:
                    expected = read_compose(answer["services"][service.name], answer)
                    self.assertEqual(read_agent(service, answer["services"]), expected, service.name)
                own = {facts["name"] for facts in (answer.get("volumes") or {}).values() if not facts.get("external")}
                self.assertEqual(set(project.volumes), own)

    def test_what_a_provider_is_given_means_the_same_whatever_its_environment(self):
        """C-180, D-18: all that parameters mean is settled before; the provider's environment has no say."""
        support.require("docker-compose")
        folders, firsts, seconds = ask_about_corpus()
        for name in folders:
            with self.subTest(file=name):
                first, second = self.read_answer(firsts[name]), self.read_answer(seconds[name])
                self.assertEqual(set(first["services"]), set(second["services"]))
                for key in first["services"]:
                    self.assertEqual(read_compose(second["services"][key], second),
                                     read_compose(first["services"][key], first), key)


class InvalidCorpus(RuntimeCase):
    def test_there_are_files(self):
        self.assertGreater(len(list_corpus("invalid")), 60)

    def test_each_file_is_refused_and_says_why(self):
        for name in list_corpus("invalid"):
            with self.subTest(file=name):
                text, head = read_corpus("invalid", name)
                self.archive = os.path.join(self.folder, name)
                self.add_file("compose.yaml", text)
                for path, content in head.get("files", {}).items():
                    self.add_file(path, content)
                code, _, words = head["expected"].partition(" ")
                driver = margo_agent.ComposeDriver("no-engine-is-asked", None, self.config)
                with self.assertRaises(margo_agent.ComponentError) as caught:
                    driver.resolve(self.make_workload(), 60)
                self.assertIn(words, caught.exception.message)
                self.assertEqual(caught.exception.code, code, caught.exception.message)


# Keys of a service

class ServiceKeys(RuntimeCase):
    OPTIONS = [
        ("user", "1000:1000", ["--user=1000:1000"]), ("user", 1000, ["--user=1000"]),
        ("hostname", "box", ["--hostname=box"]),
        ("working_dir", "/srv", ["--workdir=/srv"]), ("stop_signal", "SIGINT", ["--stop-signal=SIGINT"]),
        ("mem_limit", "64m", ["--memory=64m"]),
        ("mem_limit", 67108864, ["--memory=67108864"]), ("cpus", 0.5, ["--cpus=0.5"]), ("cpus", "1.5", ["--cpus=1.5"]),
        ("shm_size", "64m", ["--shm-size=64m"]), ("platform", "linux/arm64", ["--platform=linux/arm64"]),
        ("pid", "private", ["--pid=private"]),
        ("ipc", "shareable", ["--ipc=shareable"]), ("userns_mode", "keep-id", ["--userns=keep-id"]),
        ("pids_limit", 100, ["--pids-limit=100"]),
        ("init", True, ["--init"]), ("init", "true", ["--init"]), ("init", False, []), ("init", "false", []),
        ("read_only", True, ["--read-only"]),
        ("tty", True, ["--tty"]), ("stdin_open", True, ["--interactive"]), ("privileged", False, []),
        ("cap_drop", ["ALL", "KILL"], ["--cap-drop=ALL", "--cap-drop=KILL"]),
        ("cap_add", [], []), ("devices", [], []), ("security_opt", ["no-new-privileges"],
            ["--security-opt=no-new-privileges"]),
        ("security_opt", ["no-new-privileges:true"], ["--security-opt=no-new-privileges:true"]),
        ("group_add", ["audio", 7], ["--group-add=audio", "--group-add=7"]), ("dns", "10.0.0.1", ["--dns=10.0.0.1"]),
        ("dns", ["10.0.0.1", "10.0.0.2"], ["--dns=10.0.0.1", "--dns=10.0.0.2"]), ("tmpfs", "/run", ["--tmpfs=/run"]),
        ("tmpfs", ["/run:size=1m", "/tmp"], ["--tmpfs=/run:size=1m", "--tmpfs=/tmp"]),
        ("labels", {"b": "2", "a": None}, ["--label=a=", "--label=b=2"]),
        ("labels", ["a=b=c", "d"], ["--label=a=b=c", "--label=d="]),
        ("sysctls", {"net.core.somaxconn": 1024}, ["--sysctl=net.core.somaxconn=1024"]),
        ("sysctls", ["net.core.somaxconn=1024"], ["--sysctl=net.core.somaxconn=1024"]),
        ("extra_hosts", ["plc:10.0.0.5"], ["--add-host=plc:10.0.0.5"]),
        ("extra_hosts", {"plc": "10.0.0.5"}, ["--add-host=plc:10.0.0.5"]),
        ("extra_hosts", ["six:::1"], ["--add-host=six:::1"]),
        ("ports", ["80", 81, "8080:80/udp"], ["--publish=80", "--publish=81", "--publish=8080:80/udp"]),
        ("ports", [{"target": 80, "published": "8080", "host_ip": "127.0.0.1", "protocol": "udp"}],
         ["--publish=127.0.0.1:8080:80/udp"]),
        ("restart", "always", ["--restart=always"]), ("restart", "no", ["--restart=no"]),
        ("restart", False, ["--restart=no"]),
        ("restart", "on-failure:5", ["--restart=on-failure:5"]),
        ("restart", "unless-stopped", ["--restart=unless-stopped"]),
        ("ulimits", {"nproc": 5, "nofile": {"soft": 1, "hard": 2}}, ["--ulimit=nofile=1:2", "--ulimit=nproc=5"]),
        ("deploy", {"replicas": 1, "resources": {"limits": {"memory": "64M", "cpus": "0.5", "pids": 5}}},
         ["--cpus=0.5", "--memory=64M", "--pids-limit=5"]), ("deploy", {}, []),
        ("logging", {"driver": "journald"}, ["--log-driver=journald"]),
        ("logging", {"driver": "k8s-file", "options": {"max-size": "10m", "mode": "x", "tag": 1}},
         ["--log-driver=k8s-file", "--log-opt=max-size=10m", "--log-opt=mode=x", "--log-opt=tag=1"]),
        ("logging", {"options": {"max-size": "10m"}}, ["--log-opt=max-size=10m"]),
        ("stop_grace_period", "1m30s", ["--stop-timeout=90"]), ("stop_grace_period", "500ms", ["--stop-timeout=1"])]
    ALLOWED = [
        ("privileged", True, ["--privileged"]), ("cap_add", ["NET_ADMIN"], ["--cap-add=NET_ADMIN"]),
        ("pid", "host", ["--pid=host"]),
        ("ipc", "host", ["--ipc=host"]), ("userns_mode", "host", ["--userns=host"]),
        ("devices", ["/dev/a:/dev/b:r"], ["--device=/dev/a:/dev/b:r"]),
        ("security_opt", ["seccomp=unconfined"], ["--security-opt=seccomp=unconfined"])]
    UNSUPPORTED = (
        "annotations attach blkio_config build cgroup cgroup_parent container_name cpu_count cpu_percent cpu_period"
        " cpu_quota cpu_rt_period cpu_rt_runtime cpu_shares cpuset credential_spec develop device_cgroup_rules dns_opt"
        " dns_search domainname extends external_links gpus isolation label_file links mac_address mem_reservation"
        " mem_swappiness memswap_limit models oom_kill_disable oom_score_adj post_start pre_stop provider"
        " pull_refresh_after runtime scale secrets storage_opt use_api_socket uts volumes_from").split()

    def test_every_key_becomes_its_option(self):
        for key, value, expected in self.OPTIONS:
            with self.subTest(key=key, value=value):
                self.assertEqual(self.settle_service({key: value}).arguments, expected)

    def test_what_the_operator_allows_becomes_an_option_too(self):
        self.config = make_config(policy__privileged="allow")
        for key, value, expected in self.ALLOWED:
            with self.subTest(key=key):
                self.assertEqual(self.settle_service({key: value}).arguments, expected)

    def test_no_key_with_an_option_is_left_out_here(self):
        self.assertEqual({key for key, _, _ in self.OPTIONS + self.ALLOWED}, set(margo_agent.SERVICE_OPTIONS))

    def test_a_key_of_nothing_says_nothing(self):
        for key in sorted(margo_agent.SERVICE_OPTIONS):
            with self.subTest(key=key):
                self.assertEqual(self.settle_service({key: None}).arguments, [])

    def test_every_other_key_is_refused_and_named(self):
        """Contract, Compose keys: none is ever ignored."""
        for key in self.UNSUPPORTED + ["imagee", "Command", "x_note", ""]:
            with self.subTest(key=key):
                self.assertNotIn(key, margo_agent.SERVICE_KEYS)
                self.assertRefused(make_document({key: "x"}), f"services.main.{key}: this key is not supported")

    def test_every_other_key_of_the_file_is_refused_and_named(self):
        for key in ("include", "secrets", "models", "service"):
            with self.subTest(key=key):
                self.assertRefused(make_document({}, **{key: {}}), f"{key}: this key is not supported")

    def test_every_other_key_inside_a_key_is_refused_and_named(self):
        cases = [
            ({"deploy": {"mode": "global"}}, {}, "services.main.deploy.mode"),
            ({"deploy": {"resources": {"reservations": {}}}}, {}, "services.main.deploy.resources.reservations"),
            ({"deploy": {"resources": {"limits": {"devices": []}}}}, {},
             "services.main.deploy.resources.limits.devices"),
            ({"logging": {"level": "x"}}, {}, "services.main.logging.level"),
            ({"healthcheck": {"tests": "x"}}, {}, "services.main.healthcheck.tests"),
            ({"ulimits": {"nofile": {"soft": 1, "hard": 2, "more": 3}}}, {}, "services.main.ulimits.nofile.more"),
            ({"ports": [{"target": 80, "to": 1}]}, {}, "services.main.ports[0].to"),
            ({"volumes": [{"type": "tmpfs", "target": "/t", "consistency": "x"}]}, {},
             "services.main.volumes[0].consistency"),
            ({"volumes": [{"type": "tmpfs", "target": "/t", "tmpfs": {"sizes": 1}}]}, {},
             "services.main.volumes[0].tmpfs.sizes"),
            ({"depends_on": {"main": {"when": "x"}}}, {}, "services.main.depends_on.main.when"),
            ({"networks": {"default": {"mac_address": "x"}}}, {}, "services.main.networks.default.mac_address"),
            ({"configs": [{"source": "a", "path": "x"}]}, {"configs": {"a": {"content": ""}}},
             "services.main.configs.path"),
            ({"configs": ["a"]}, {"configs": {"a": {"environment": "PATH"}}}, "configs.a.environment"),
            ({}, {"volumes": {"a": {"driver_opts": {}}}}, "volumes.a.driver_opts"),
            ({}, {"networks": {"a": {"attachable": True}}}, "networks.a.attachable"),
            ({}, {"networks": {"a": {"ipam": {"driver": "dhcp"}}}}, "networks.a.ipam.driver"),
            ({}, {"networks": {"a": {"ipam": {"config": [{"aux_addresses": {}}]}}}},
             "networks.a.ipam.config.aux_addresses")]
        for keys, members, place in cases:
            with self.subTest(place=place):
                self.assertRefused(make_document(keys, **members), f"{place}: this key is not supported")

    def test_a_value_of_the_wrong_form_is_refused_and_named(self):
        """What an archive holds fails its own component, and is never a bug of the agent (exit code 70)."""
        cases = [
            ({"volumes": 5}, {}, "services.main.volumes"), ({"volumes": [5, []]}, {}, "services.main.volumes[1]"),
            ({"volumes": [{"type": "bind", "target": "/x"}]}, {}, "services.main.volumes[0].source"),
            ({"volumes": [{"type": "tmpfs", "target": "/x", "tmpfs": "big"}]}, {}, "services.main.volumes[0]"),
            ({"networks": 5}, {}, "services.main.networks"), ({"networks": [{"a": 1}]}, {}, "services.main.networks"),
            ({"networks": {"default": 5}}, {}, "services.main.networks.default"),
            ({"depends_on": 5}, {}, "services.main.depends_on"),
            ({"depends_on": {"main": 5}}, {}, "services.main.depends_on.main"),
            ({"depends_on": {"main": {"condition": []}}}, {}, "services.main.depends_on.main.condition"),
            ({"configs": 5}, {}, "services.main.configs"), ({"configs": ["a"]}, {"configs": 5}, "configs"),
            ({"configs": ["a"]}, {"configs": {"a": None}}, "configs.a"),
            ({"configs": ["a"]}, {"configs": {"a": {"content": []}}}, "configs.a"),
            ({"environment": [[]]}, {}, "services.main.environment"),
            ({"env_file": {"path": {}}}, {}, "services.main.env_file"),
            ({"env_file": [[]]}, {}, "services.main.env_file"),
            ({"labels": [{}]}, {}, "services.main.labels"), ({"logging": []}, {}, "services.main.logging"),
            ({"deploy": 1}, {}, "services.main.deploy"),
            ({"deploy": {"resources": [1]}}, {}, "services.main.deploy.resources"),
            ({"ulimits": 5}, {}, "services.main.ulimits"),
            ({"healthcheck": 5}, {}, "services.main.healthcheck"),
            ({"healthcheck": {"retries": "x"}}, {}, "services.main.healthcheck"),
            ({"healthcheck": {"retries": 1.5}}, {}, "services.main.healthcheck"),
            ({"healthcheck": {"test": {}}}, {}, "services.main.healthcheck"),
            ({"healthcheck": {"test": ["CMD"]}}, {}, "services.main.healthcheck"),
            ({"healthcheck": {"test": []}}, {}, "services.main.healthcheck"),
            ({"command": {}}, {}, "services.main.command"), ({"command": [None]}, {}, "services.main.command"),
            ({"command": "a\0b"}, {}, "services.main.command"), ({"hostname": "a\0b"}, {}, "services.main.hostname"),
            ({"labels": {"a": "b\0"}}, {}, "services.main.labels"),
            ({"volumes": ["./a\0:/b"]}, {}, "services.main.volumes"),
            ({"env_file": "a\0"}, {}, "services.main.env_file"),
            ({"configs": ["a"]}, {"configs": {"a": {"file": "a\0"}}}, "configs.a.file"),
            ({"image": ["a"]}, {}, "services.main.image"), ({"pull_policy": []}, {}, "services.main.pull_policy"),
            ({"security_opt": [{}]}, {}, "services.main.security_opt"),
            ({}, {"volumes": 5}, "volumes"), ({}, {"volumes": ["a"]}, "volumes"),
            ({}, {"volumes": {"a": 5}}, "volumes.a"),
            ({}, {"volumes": {"a": {"external": {"name": "b"}}}}, "volumes.a"), ({}, {"networks": 5}, "networks"),
            ({}, {"networks": ["a"]}, "networks"), ({}, {"networks": {"a": 5}}, "networks.a"),
            ({}, {"networks": {"a": {"ipam": 5}}}, "networks.a.ipam"),
            ({}, {"networks": {"a": {"ipam": {"config": 5}}}}, "networks.a.ipam"),
            ({}, {"networks": {"a": {"ipam": {"config": [5]}}}}, "networks.a.ipam"),
            ({}, {"services": {"main": 5}}, "services.main"), ({}, {"services": 5}, "no services")]
        for keys, members, place in cases:
            for strict in (True, False):
                with self.subTest(keys=keys, members=members, strict=strict):
                    try:
                        self.assertRefused(make_document(keys, **members), place, strict=strict)
                    except AssertionError as error:
                        if strict or "ComponentError not raised" not in str(error):
                            raise                   # a provider may be left to judge a value

    def test_a_name_that_is_no_text_is_a_name_all_the_same_or_refused(self):
        for document in ("services: {1: {image: a}, b: {image: a, depends_on: [1]}}",
                         "services: {a: {image: a}}\nnetworks: {1: }",
                         "services: {a: {image: a, networks: {1: }}}\nnetworks: {1: }",
                         "services: {a: {image: a, labels: {1: x, b: y}}}",
                         "services: {a: {image: a, sysctls: {1: x, b: y}}}",
                         "services: {a: {image: a}}\nvolumes: {1: , b: }",
                         "services: {a: {image: a}}\n1: 2\n", "services: {a: {image: a, 1: 2}}"):
            for strict in (True, False):
                with self.subTest(document=document, strict=strict):
                    try:
                        project = self.settle(document, strict=strict)
                        self.assertIn("a" if "{a:" in document else "b", [service.name for service in project.services])
                    except margo_agent.ComponentError as error:
                        self.assertIn("1", error.message)

    def test_random_values_are_settled_or_refused(self):
        """Whatever stands in a file: a Project or a ComponentError, from the builtin driver and for a provider."""
        support.require("hypothesis")
        from hypothesis import HealthCheck, given, settings, strategies
        words = ("driver options test retries interval disable source target type bind volume tmpfs file content name"
                 " external labels ipam config subnet limits resources replicas condition required soft hard published"
                 " host_ip protocol path").split()
        texts = ["", "CMD", "a:/b", "./x:/y", "${A:-b}", "5s", "x=1", "service:main", "~/a:/b"]
        scalars = strategies.one_of(
            strategies.none(), strategies.booleans(), strategies.integers(-5, 70000), strategies.floats(),
            strategies.sampled_from(words + texts), strategies.text(max_size=6))
        keys = strategies.sampled_from(words) | strategies.integers(0, 3) | strategies.text(max_size=3)
        values = strategies.recursive(scalars, lambda inner: strategies.one_of(
            strategies.lists(inner, max_size=3), strategies.dictionaries(keys, inner, max_size=3)), max_leaves=6)
        sections = strategies.dictionaries(strategies.sampled_from(sorted(margo_agent.PROJECT_KEYS)), values,
                                           max_size=2)
        services = strategies.dictionaries(strategies.sampled_from(sorted(margo_agent.SERVICE_KEYS)), values,
                                           max_size=2)
        failures = {}

        @settings(max_examples=120, deadline=None, database=None, derandomize=True,
                  suppress_health_check=list(HealthCheck))
        @given(services, sections, strategies.booleans())
        def check(service, section, strict):
            document = dict({"services": {"main": dict({"image": IMAGE}, **service)}}, **section)
            try:
                project = margo_agent.make_project(document, self.make_workload(), self.config.policy, "podman", strict)
                self.assertIsInstance(project, margo_agent.Project)
            except margo_agent.ComponentError as error:
                self.assertTrue(error.message.startswith("compose.yaml: "), error.message)
            except Exception as error:              # gathered, so that one run shows every kind
                failures.setdefault(f"{type(error).__name__}: {error}"[:80], (document, strict))
        check()
        self.assertEqual(failures, {})


class Readers(unittest.TestCase):
    def assertFault(self, call, *words):
        with self.assertRaises(margo_agent.ComponentError) as caught:
            call()
        for word in words:
            self.assertIn(word, caught.exception.message)

    def test_a_scalar_is_its_text(self):
        """C-183: a number keeps its spelling, a flag is true or false."""
        for text, expected in (("1.10", "1.10"), ("007", "007"), ("0x1F", "0x1F"), ("1e3", "1e3"), ("true", "true"),
                               ("'1.10'", "1.10"), ("''", "")):
            self.assertEqual(margo_agent.to_text(margo_agent.load_yaml(text), "here"), expected)
        for value in (None, [], {}):
            self.assertFault(lambda: margo_agent.to_text(value, "services.main.user"),
                             "services.main.user: expected a single value")

    def test_a_flag_is_true_or_false_and_nothing_like_it(self):
        for value, expected in ((True, True), (False, False), ("true", True), ("false", False)):
            self.assertIs(margo_agent.to_flag(value, "here"), expected)
        for value in ("yes", "no", 1, 0, None, "", "True", []):
            self.assertFault(lambda: margo_agent.to_flag(value, "services.main.init"),
                             "services.main.init: expected true or false")

    def test_one_text_is_a_list_too(self):
        self.assertEqual(margo_agent.to_list("a", "here"), ["a"])
        self.assertEqual(margo_agent.to_list(["a", 1, True], "here"), ["a", "1", "true"])
        self.assertEqual(margo_agent.to_list(None, "here"), [])
        self.assertFault(lambda: margo_agent.to_list([["a"]], "services.main.dns"), "services.main.dns")

    def test_pairs_come_as_a_mapping_or_as_a_list(self):
        self.assertEqual(margo_agent.to_pairs({"A": 1, "B": None, "C": ""}, "here"), {"A": "1", "B": None, "C": ""})
        self.assertEqual(margo_agent.to_pairs(["A=1", "B", "C=", "D=x=y"], "here"),
                         {"A": "1", "B": None, "C": "", "D": "x=y"})
        self.assertFault(lambda: margo_agent.to_pairs({"A": []}, "services.main.labels"),
                         "services.main.labels.A: expected a single value")

    def test_a_command_is_split_as_a_shell_splits_it(self):
        for value, expected in (("a b", ["a", "b"]), ("a 'b c' \"d e\" f\\ g", ["a", "b c", "d e", "f g"]), ("", []),
                                (["a b", 1], ["a b", "1"]),
                                (None, []), ("a # b", ["a", "#", "b"])):
            with self.subTest(value=value):
                self.assertEqual(margo_agent.to_words(value, "here"), expected)
        self.assertFault(lambda: margo_agent.to_words("a 'b", "services.main.command"),
                         "services.main.command: No closing quotation")

    def test_durations_are_seconds(self):
        for text, expected in (("30s", 30), ("1m30s", 90), ("1h", 3600), ("500ms", 0.5), ("1.5s", 1.5),
                               ("1h0m10s", 3610), ("250us", 0.00025)):
            self.assertAlmostEqual(margo_agent.to_seconds(text, "here"), expected)
        for text in ("", "30", "s", "1 s", "1s ", "-1s", "1x", "1m30", 5, None):
            self.assertFault(lambda: margo_agent.to_seconds(text, "services.main.healthcheck"),
                             "services.main.healthcheck")

    def test_ports_in_both_syntaxes(self):
        for value, expected in (([80], ["80"]), (["8080:80"], ["8080:80"]),
                                (["1.2.3.4:8080:80/udp"], ["1.2.3.4:8080:80/udp"]),
                                (["127.0.0.1::80"], ["127.0.0.1::80"]), (["[::1]:80:80"], ["[::1]:80:80"]),
                                (["80-82:80-82"], ["80-82:80-82"]),
                                (["80:80/sctp"], ["80:80/sctp"]), ([{"target": 80}], ["80"]),
                                ([{"target": 80, "published": 90}], ["90:80"]),
                                ([{"target": 80, "published": "90", "host_ip": "::1"}], ["[::1]:90:80"]),
                                ([{"target": 80, "host_ip": "127.0.0.1"}], ["127.0.0.1::80"])):
            with self.subTest(value=value):
                self.assertEqual(margo_agent.make_ports(value, "here"), [f"--publish={text}" for text in expected])
        for value in (["http"], ["80:"], [":"], ["80:80:80"], ["80:80/icmp"], ["80 :80"], ["-80:80"],
                      [{"published": 80}], ["65536:80"], ["80:65536"],
                      ["80-81:80-82"], ["80\n:80"], ["localhost:80:80"], [""], [None]):
            with self.subTest(value=value):
                self.assertFault(lambda: margo_agent.make_ports(["1:1"] + value, "services.main.ports"),
                                 "services.main.ports[1]")

    def test_a_restart_policy_is_the_engines_own_word(self):
        for value in ("sometimes", "on-failure:", "on-failure:x", "always:3", "", "no\n", True):
            self.assertFault(lambda: margo_agent.make_restart(value, "services.main.restart"),
                             "services.main.restart: ", "is not a restart policy")

    def test_health_checks(self):
        cases = [
            ({"test": "a || b"}, ["--health-cmd=a || b"], (30, 3, 0)),
            ({"test": ["CMD-SHELL", "a | b"]}, ["--health-cmd=a | b"], (30, 3, 0)),
            ({"test": ["CMD", "a", "b c"]}, ['--health-cmd=["a","b c"]'], (30, 3, 0)),
            ({"test": ["NONE"]}, ["--no-healthcheck"], None),
            ({"disable": True, "test": "x"}, ["--no-healthcheck"], None),
            ({"disable": "true"}, ["--no-healthcheck"], None),
            ({"test": "a", "interval": "1m", "timeout": "5s", "retries": 7, "start_period": "500ms"},
             ["--health-interval=1m", "--health-timeout=5s", "--health-retries=7", "--health-start-period=500ms",
              "--health-cmd=a"], (60, 7, 0.5)),
            ({"interval": "10s"}, ["--health-interval=10s"], (10, 3, 0))]
        for value, arguments, health in cases:
            with self.subTest(value=value):
                self.assertEqual(margo_agent.make_health(value, "here", "podman"), (arguments, health))

    def test_a_health_check_without_retries_has_the_usual_three(self):
        """An engine takes 0 as not said; taken literally, the service would be unhealthy before its first check."""
        _, health = margo_agent.make_health({"test": "a", "retries": 0}, "here", "podman")
        self.assertEqual(health[1], 3)

    def test_docker_takes_the_words_of_a_health_check_quoted(self):
        arguments, _ = margo_agent.make_health({"test": ["CMD", "a", "b c", "$d"]}, "here", "docker")
        self.assertEqual(arguments, ["--health-cmd=a 'b c' '$d'"])

    def test_one_word_that_needs_quoting_is_quoted_for_podman(self):
        arguments, _ = margo_agent.make_health({"test": ["CMD", "/opt/a b"]}, "here", "podman")
        self.assertEqual(arguments, ["--health-cmd='/opt/a b'"])

    def test_check_keys_names_the_key(self):
        self.assertIsNone(margo_agent.check_keys({"a": 1}, ("a", "b"), "here"))
        self.assertFault(lambda: margo_agent.check_keys({"a": 1, "c": 2}, ("a", "b"), "services.main"),
                         "services.main.c: this key is not supported")
        for value in (None, [], "a", 5):
            self.assertFault(lambda: margo_agent.check_keys(value, ("a",), "services.main"),
                             "services.main: expected a mapping")


# Policy

class Policy(RuntimeCase):
    DENIED = [
        ("privileged", True), ("privileged", "true"), ("privileged", "${YES}"), ("pid", "host"), ("ipc", "host"),
        ("userns_mode", "host"),
        ("pid", "${HOST}"), ("cap_add", ["SYS_ADMIN"]), ("cap_add", "ALL"), ("devices", ["/dev/mem"]),
        ("devices", "/dev/mem"),
        ("security_opt", ["seccomp=unconfined"]), ("security_opt", "label=disable"),
        ("security_opt", ["no-new-privileges:false"]),
        ("security_opt", ["apparmor:unconfined"]), ("security_opt", ["no-new-privileges:true", "label:disable"])]

    def assertDenied(self, keys, place, **options):
        for strict in (True, False):                # a provider's file is held against the same policy
            with self.subTest(keys=keys, strict=strict):
                self.assertRefused(make_document(keys), f"services.main.{place}", code="POLICY_DENIED", strict=strict,
                                   **options)

    def test_what_loosens_the_container_is_denied(self):
        """Contract, Policy: privileged, host namespaces, capabilities, devices, security; also by a parameter."""
        for key, value in self.DENIED:
            self.assertDenied({key: value}, key, parameters={"YES": "true", "HOST": "host"})

    def test_what_loosens_the_container_is_done_where_the_operator_allows_it(self):
        self.config = make_config(policy__privileged="allow")
        for key, value in self.DENIED:
            with self.subTest(key=key, value=value):
                self.assertTrue(self.settle_service({key: value}, {"YES": "true", "HOST": "host"}).arguments)

    def test_what_tightens_the_container_is_never_denied(self):
        for key, value in (("privileged", False), ("privileged", "false"), ("cap_drop", ["ALL"]),
                           ("security_opt", ["no-new-privileges"]),
                           ("security_opt", ["no-new-privileges=true"]), ("pid", "private"), ("ipc", "none"),
                           ("cap_add", []), ("devices", None)):
            with self.subTest(key=key):
                self.assertIsNotNone(self.settle_service({key: value}))

    def test_a_namespace_given_by_its_path_is_a_host_namespace_too(self):
        """podman takes ns:/proc/1/ns/pid, which is the host's by another name."""
        for key in ("pid", "ipc", "userns_mode"):
            self.assertDenied({key: "ns:/proc/1/ns/x"}, key)

    def test_a_container_of_its_own_choice_is_never_shared(self):
        """Nothing without our labels is touched, not even with policy.privileged."""
        for self.config in (make_config(), make_config(policy__privileged="allow")):
            for key in ("pid", "ipc", "userns_mode", "network_mode"):
                self.assertDenied({key: "container:other"}, key)

    def test_an_engines_socket_is_never_handed_out(self):
        self.config = make_config(policy__privileged="allow", policy__host_paths=["/"])
        os.symlink("/var/run/docker.sock", os.path.join(self.archive, "innocent"))
        for source in ("/var/run/docker.sock", "/run/podman/podman.sock", "/run/containerd/containerd.sock",
                       "/var/run/crio/crio.sock",
                       "/var/run/../run/docker.sock", "/var/run//docker.sock", "./innocent"):
            self.assertDenied({"volumes": [f"{source}:/engine.sock"]}, "volumes")
            self.assertDenied({"volumes": [{"type": "bind", "source": source, "target": "/engine.sock"}]}, "volumes")

    def test_bind_mounts_are_held_to_the_host_paths(self):
        """Contract, Policy: only below policy.host_paths, after normalising and resolving links."""
        allowed, secret = os.path.join(self.folder, "allowed"), os.path.join(self.folder, "secret")
        for path in (allowed, secret, allowed + "-not", os.path.join(allowed, "in")):
            os.mkdir(path)
        os.symlink(secret, os.path.join(allowed, "link"))
        os.symlink(secret, os.path.join(self.archive, "link"))
        os.symlink(os.path.join(allowed, "in"), os.path.join(self.archive, "good"))
        self.config = make_config(policy__host_paths=[allowed])
        for source in (allowed, allowed + "/in", allowed + "/new", allowed + "/in/..", "./sub", "./good", ".",
                       "./sub/../other"):
            with self.subTest(source=source):
                real = os.path.realpath(os.path.join(self.archive, source))
                own = ":ro" if margo_agent.is_below(real, self.archive) else ""         # what was verified is never written to
                for options in ("", ":ro", ":rw,z"):
                    found = self.settle_service({"volumes": [f"{source}:/x{options}"]}).arguments
                    self.assertEqual(found, [f"--volume={real}:/x" + (own + options[3:] if own else options)])
                self.assertEqual(self.settle_service({"volumes": [{"type": "bind", "source": source,
                    "target": "/x"}]}).arguments,
                                 [f"--volume={real}:/x{own}"])
        for source in (secret, "/", "/etc", allowed + "-not", allowed + "/../secret", allowed + "/link", "./link",
                       "./link/deeper", "..",
                       "./../secret", "./sub/../../secret", os.path.dirname(allowed)):
            self.assertDenied({"volumes": [f"{source}:/x"]}, f"volumes: {source} (in truth ")
            self.assertDenied({"volumes": [{"type": "bind", "source": source, "target": "/x"}]},
                              f"volumes: {source} (in truth ")

    def test_host_paths_may_be_links_themselves(self):
        real, link = os.path.join(self.folder, "real"), os.path.join(self.folder, "link")
        os.mkdir(real)
        os.symlink(real, link)
        self.config = make_config(policy__host_paths=[link])
        self.assertEqual(self.settle_service({"volumes": [f"{link}/data:/x"]}).arguments, [f"--volume={real}/data:/x"])

    def test_the_home_folder_is_not_part_of_the_archive(self):
        """Docker Compose mounts $HOME for `~`, so it is never taken for a folder of that name in the archive."""
        for item in ("~/.ssh:/keys", "~:/home", {"type": "bind", "source": "~/.ssh", "target": "/keys"}):
            self.assertDenied({"volumes": [item]}, "volumes")

    def test_an_engines_own_options_do_not_go_round_the_policy(self):
        """podman mounts over any folder of the host by `O,upperdir=`, and writes a log to any `path` of it."""
        for self.config in (make_config(policy__host_paths=["/srv"]), make_config(policy__privileged="allow", policy__host_paths=["/srv"])):
            for strict in (True, False):
                for source in ("data", "/srv/x", "./a"):
                    for options in ("O,upperdir=/etc/cron.d,workdir=/var/tmp", "ro,U", "shared", "rshared", "suid", "dev", "idmap"):
                        self.assertRefused(make_document({"volumes": [f"{source}:/x:{options}"]}, volumes={"data": None}),
                                           "services.main.volumes[0]: the mount option", code="POLICY_DENIED", strict=strict)
                self.assertRefused(make_document({"volumes": [{"type": "bind", "source": "/srv", "target": "/x", "bind": {
                    "propagation": "rshared"}}]}), "the mount option 'rshared'", code="POLICY_DENIED", strict=strict)
                for name in ("path", "syslog-address"):
                    self.assertRefused(make_document({"logging": {"driver": "k8s-file", "options": {name: "/etc/cron.d/x"}}}),
                                       f"services.main.logging.options.{name}", code="POLICY_DENIED", strict=strict)
                for image in ("dir:/etc/images", "docker-archive:/srv/other.tar", "oci:x/y:tag", "containers-storage:[vfs@/x]a"):
                    self.assertRefused(make_document({"image": image}), "services.main.image", code="POLICY_DENIED", strict=strict)
        for image in ("localhost:5000/a/b:1", "a:1", "docker.io/library/a@sha256:" + "0" * 64, "host.example/a:1.0-x"):
            self.assertEqual(self.settle_service({"image": image}).image, image)

    def test_find_binds_sees_every_spelling(self):
        volumes = ["./a:/x", "/b:/x:ro", "../c:/x", "data:/x", "/anonymous",
                   {"type": "bind", "source": "/d", "target": "/x"},
                   {"type": "volume", "source": "e", "target": "/x"}, {"type": "tmpfs", "target": "/x"}]
        self.assertEqual(list(margo_agent.find_binds(volumes, "here")), ["./a", "/b", "../c", "/d"])
        self.assertEqual(list(margo_agent.find_binds(None, "here")), [])

    def test_what_a_provider_would_read_or_hand_out_is_refused_as_well(self):
        """A provider that is given the file goes round no check: files and devices of the host stay the host's."""
        for document, word in (
                (make_document({"configs": ["a"]}, configs={"a": {"file": "/etc/shadow"}}), "configs.a"),
                (make_document({"configs": ["a"]}, configs={"a": {"file": "../../secret"}}), "configs.a"),
                (make_document({"label_file": "/etc/passwd"}), "services.main.label_file"),
                (make_document({"deploy": {"resources": {"reservations": {"devices": [{"capabilities": ["gpu"]}]}}}}),
                 "services.main.deploy"),
                (make_document({"extends": {"file": "/x", "service": "y"}}), "services.main.extends"),
                (make_document({"build": "."}), "services.main.build"),
            (make_document({"volumes_from": ["container:x"]}), "volumes_from"),
                (make_document({"secrets": ["a"]}), "services.main.secrets"),
            (make_document({}, secrets={"a": {"file": "/x"}}), "secrets"),
                (make_document({}, include=["/x"]), "include"),
            (make_document({"container_name": "x"}), "container_name"),
                (make_document({"provider": {"type": "x"}}), "provider"), (make_document({"gpus": "all"}), "gpus"),
                (make_document({"use_api_socket": True}), "use_api_socket"),
            (make_document({"post_start": []}), "post_start"),
                (make_document({}, volumes={"a": {"driver_opts": {"device": "/"}}}), "volumes.a.driver_opts")):
            with self.subTest(document=document):
                with self.assertRaises(margo_agent.ComponentError) as caught:
                    self.settle(document, strict=False)
                self.assertIn(word, caught.exception.message)

    def test_a_provider_is_given_known_keys_alone(self):
        """podman-compose binds any file of the host by `init-path` and `glob` mounts, and puts what stands in a target among the options."""
        for keys, word in (({"init-path": "/etc/shadow"}, "init-path"), ({"pod": "other"}, "pod"), ({"annotations": {"run.oci.x": "1"}}, "annotations"),
                           ({"external_links": ["other"]}, "external_links"), ({"publishall": True}, "publishall"),
                           ({"volumes": [{"type": "glob", "source": "/etc/*", "target": "/x"}]}, "volumes[0].type"),
                           ({"volumes": [{"type": "bind", "source": "./a", "target": "/x:O,upperdir=/etc"}]}, "volumes[0].target"),
                           ({"volumes": [{"type": "volume", "source": "data", "target": "/x,volume-opt=o=bind"}]}, "volumes[0].target"),
                           ({"image": "--help"}, "services.main.image"), ({"image": ""}, "services.main.image")):
            for strict in (False, True):
                self.assertRefused(make_document(keys, volumes={"data": None}), word, strict=strict)
        self.assertRefused(make_document({}, models={"a": {"model": "x"}}), "models", strict=False)

    def test_a_name_that_no_file_can_have_fails_its_component_alone(self):
        self.assertRefused({"services": {"a" * 250: {"image": IMAGE}}}, "is not a service name")

    def test_a_mount_that_is_no_text_fails_its_component_alone(self):
        """What YAML reads as a number or a flag is refused, or a path spelt so; never more than that."""
        for item in (0.5, 5, True, {"type": "bind", "source": 5, "target": "/x"}, {"type": "bind", "source": True, "target": "/x"}):
            for strict in (True, False):
                with self.subTest(item=item, strict=strict):
                    try:
                        self.settle(make_document({"volumes": [item]}), strict=strict)
                    except margo_agent.ComponentError:
                        pass
        self.assertRefused('services: {main: {image: a, volumes: [.5]}}', "services.main.volumes")

    def test_is_below_does_not_take_a_prefix_for_a_folder(self):
        for path, root, expected in (("/a", "/a", True), ("/a/b", "/a", True), ("/ab", "/a", False),
                                     ("/a", "/a/b", False), ("/x", "/", True),
                                     ("/a/b", "/a/", True)):
            self.assertIs(margo_agent.is_below(path, root), expected)


class InsideTheArchive(RuntimeCase):
    def test_files_are_read_below_the_archive_alone(self):
        self.add_file("conf/a.txt", "inside")
        support.write(os.path.join(self.folder, "outside.txt"), "outside")
        os.symlink("../outside.txt", os.path.join(self.archive, "leaves"))
        os.symlink("conf/a.txt", os.path.join(self.archive, "stays"))
        for name in ("conf/a.txt", "./conf/../conf/a.txt", "stays"):
            self.assertEqual(margo_agent.read_inside(self.archive, name, "here"), "inside")
        for name in ("../outside.txt", "/etc/passwd", "leaves", "conf", "absent", "conf/a.txt/x", "",
                     os.path.join(self.folder, "outside.txt")):
            with self.subTest(name=name):
                with self.assertRaises(margo_agent.ComponentError) as caught:
                    margo_agent.read_inside(self.archive, name, "configs.app.file")
                self.assertIn("configs.app.file: ", caught.exception.message)
                self.assertIn("is not a file of the archive", caught.exception.message)

    def test_a_file_that_is_too_long_fails_its_component_alone(self):
        """Contract, exit codes: what an archive holds concerns one component; a StorageError ends the cycle."""
        self.add_file("big.env", "A=1\n" * 300000)
        self.assertRefused(make_document({"env_file": "big.env"}), "services.main.env_file: ", "big.env")

    def test_a_config_file_arrives_byte_for_byte_or_not_at_all(self):
        """C-183: certificates and firmware are files too; a byte that is no UTF-8 is never replaced in silence."""
        self.add_file("cert.der", b"\x30\x82\xff\xfe\x00")
        document = make_document({"configs": ["cert"]}, configs={"cert": {"file": "cert.der"}})
        try:
            files = self.settle(document).services[0].files
        except margo_agent.ComponentError as error:
            self.assertIn("configs.cert.file", error.message)
        else:
            content = files["/cert"]
            self.assertEqual(content if isinstance(content, bytes) else content.encode("utf-8", "surrogateescape"),
                             b"\x30\x82\xff\xfe\x00")

    def test_a_compose_file_that_is_no_utf8_is_refused(self):
        """Contract, As a module: bytes that are no text are refused, never read as something else."""
        self.add_file("compose.yaml", b"services: {main: {image: localhost/x:1, command: [\"\xff\"]}}\n")
        with self.assertRaises(margo_agent.ComponentError) as caught:
            margo_agent.ComposeDriver("no-engine-is-asked", None, self.config).resolve(self.make_workload(), 60)
        self.assertIn("compose.yaml: ", caught.exception.message)
        self.assertIn("UTF-8", caught.exception.message)


# The environment of a container

class Environment(RuntimeCase):
    def test_a_container_that_does_not_mention_a_parameter_does_not_get_it(self):
        """C-180, contract, Parameters: they feed interpolation and pass-through entries, nothing else."""
        project = self.settle({"services": {"asks": {"image": IMAGE, "environment": ["SECRET"]},
                                            "renames": {"image": IMAGE, "environment": {
            "OTHER": "${SECRET}"}}, "silent": {"image": IMAGE, "environment": {"A": "b"}}}},
                              {"SECRET": "s3cret", "MORE": "x"})
        self.assertEqual({service.name: service.environment for service in project.services},
                         {"asks": {"SECRET": "s3cret"}, "renames": {"OTHER": "s3cret"}, "silent": {"A": "b"}})

    def test_a_parameter_that_is_not_mentioned_changes_nothing(self):
        first, second = (self.settle_service({"environment": ["A"]}, {"A": "1", "B": value}) for value in "xy")
        self.assertEqual(first, second)

    def test_what_is_nearer_to_the_container_wins(self):
        self.add_file("a.env", "A=file\nB=file\nC=file\nD=file\n")
        self.add_file("b.env", "B=second\n")
        workload = self.make_workload({"C": "parameter"}, {"D": "device"})
        document = make_document({"env_file": ["a.env", "b.env"], "environment": {"C": "${C}", "D": "service"}})
        project = margo_agent.make_project(document, workload, self.config.policy, "podman")
        self.assertEqual(project.services[0].environment, {"A": "file", "B": "second", "C": "parameter", "D": "device"})

    def test_the_devices_own_variables_reach_every_container_and_change_its_hash(self):
        """C-185: OTEL_EXPORTER_OTLP_ENDPOINT and its like are injected by the device."""
        document = {"services": {"a": {"image": IMAGE}, "b": {"image": IMAGE, "environment": ["X=1"]}}}
        before = self.settle(document)
        after = self.settle(document, environment={"OTEL_EXPORTER_OTLP_ENDPOINT": "http://10.0.0.1:4318"})
        for old, new in zip(before.services, after.services):
            self.assertEqual(new.environment, dict(old.environment, OTEL_EXPORTER_OTLP_ENDPOINT="http://10.0.0.1:4318"))
            self.assertNotEqual(old.hash, new.hash)

    def test_the_devices_own_variables_are_in_a_providers_file_too(self):
        document = self.settle(make_document({"environment": ["X=1"]}), strict=False,
                               environment={"OTEL": "x"}).document
        self.assertEqual(document["services"]["main"]["environment"], {"X": "1", "OTEL": "x"})

    def test_a_number_keeps_its_spelling(self):
        """C-183: 1.10 is a version, not a number."""
        text = ("services: {main: {image: a, environment: {A: 1.10, B: 0440, C: 1e3, D: 0x1F, E: true, F: 1.0},"
                " labels: {v: 1.10}, command: [1.10]}}")
        service = self.settle(text).services[0]
        self.assertEqual(service.environment, {"A": "1.10", "B": "0440", "C": "1e3", "D": "0x1F", "E": "true",
                                               "F": "1.0"})
        self.assertEqual((service.arguments, service.command), (["--label=v=1.10"], ["1.10"]))
        provided = self.settle(text, strict=False).document["services"]["main"]
        self.assertEqual(provided["environment"]["A"], "1.10")
        self.assertEqual(provided["labels"]["v"], "1.10")

    def test_an_optional_file_may_be_missing_and_not_outside(self):
        service = self.settle_service({"env_file": [{"path": "absent.env", "required": False}]})
        self.assertEqual(service.environment, {})
        self.assertRefused(make_document({"env_file": [{"path": "/etc/passwd", "required": False}]}),
                           "services.main.env_file: '/etc/passwd'")

    def test_names_and_values_that_no_environment_can_hold_are_refused(self):
        for name in ("1A", "A B", "", "A\n", "-A", "A$"):
            with self.subTest(name=name):
                self.assertRefused(make_document({"environment": {name: "x"}}), "services.main.environment: ",
                                   "is not a variable name")
        self.assertRefused(make_document({"environment": {"A": "a\0b"}}), "services.main.environment.A: holds a NUL")
        self.assertRefused(make_document({"environment": ["A"]}), "services.main.environment.A: holds a NUL",
                           parameters={"A": "\0"})


# Order, networks, volumes, mounts, configs

class Order(RuntimeCase):
    def order(self, **depends):
        return [service.name for service in self.settle({"services": {
            name: {"image": IMAGE, "depends_on": value} for name, value in depends.items()}}).services]

    def test_each_comes_after_what_it_depends_on(self):
        self.assertEqual(self.order(web=["api"], api=["db", "cache"], cache=[], db=[]), ["db", "cache", "api", "web"])
        for names in itertools.permutations("abcd"):
            order = self.order(**{name: [other for other in "abcd" if other < name] for name in names})
            self.assertEqual(order, ["a", "b", "c", "d"])

    def test_a_circle_is_shown(self):
        for depends, words in (({"a": ["a"]}, "a -> a"), ({"a": ["b"], "b": ["a"]}, "a -> b -> a"),
                               ({"x": ["a"], "a": ["b"], "b": ["c"], "c": ["a"]}, "a -> b -> c -> a")):
            with self.subTest(depends=depends):
                with self.assertRaises(margo_agent.ComponentError) as caught:
                    self.order(**depends)
                self.assertTrue(caught.exception.message.endswith(f"depends_on goes in a circle: {words}"),
                                caught.exception.message)

    def test_a_long_chain_is_ordered(self):
        """What an archive holds never takes the agent down."""
        names = [f"s{index}" for index in range(1500)]
        self.assertEqual(self.order(**{name: names[index + 1:index + 2] for index, name in enumerate(names)}),
                         names[::-1])

    def test_conditions(self):
        service = self.settle_service({"depends_on": {}}, services={"main": {"image": IMAGE, "depends_on": {
            "a": None, "b": {"condition": "service_healthy"},
            "c": {"condition": "service_completed_successfully", "required": False},
            "d": {"required": False}}}, "a": {"image": IMAGE}, "b": {"image": IMAGE}, "c": {"image": IMAGE}})
        self.assertEqual(service.depends_on, {"a": ("service_started", True), "b": ("service_healthy", True),
                                              "c": ("service_completed_successfully", False),
                                              "d": ("service_started", False)})

    def test_what_is_not_required_may_be_absent(self):
        self.assertEqual(self.order(main={"ghost": {"required": False}}), ["main"])
        for depends in (["ghost"], {"ghost": {"condition": "service_started"}}, {"ghost": {"required": True}}):
            self.assertRefused(make_document({"depends_on": depends}),
                               "services.main.depends_on: there is no service 'ghost'")

    def test_a_service_of_a_profile_is_not_started_and_not_judged(self):
        project = self.settle({"services": {"main": {"image": IMAGE},
                                            "debug": {"image": IMAGE, "profiles": ["debug"], "privileged": True}}})
        self.assertEqual([service.name for service in project.services], ["main"])
        self.assertNotIn("debug", project.document["services"])

    def test_who_shares_a_network_starts_after_its_owner(self):
        """Docker Compose takes network_mode: service:x for a dependency: what is joined must be there."""
        project = self.settle({"services": {"beside": {"image": IMAGE, "network_mode": "service:main"},
                                            "main": {"image": IMAGE}}})
        self.assertEqual([service.name for service in project.services], ["main", "beside"])

    def test_who_shares_a_network_is_made_anew_with_its_owner(self):
        """A container that joined one that is gone has no network any more."""
        def hashes(tag):
            project = self.settle({"services": {"main": {"image": f"localhost/a:{tag}"},
                                                "beside": {"image": IMAGE, "network_mode": "service:main"}}})
            return {service.name: service.hash for service in project.services}
        self.assertNotEqual(hashes(1)["beside"], hashes(2)["beside"])
        self.assertEqual(hashes(1), hashes(1))


class Shared(RuntimeCase):
    def test_volumes_and_how_they_are_made(self):
        document = {"volumes": {"plain": None, "labelled": {"labels": {"a": "b"}}, "named": {"name": "own"},
                                "foreign": {"external": True},
                                "both": {"external": "true", "name": "theirs"}}}
        self.assertEqual(margo_agent.make_volumes(document, self.make_workload()), {
            "plain": (f"{PROJECT}_plain", MARKS[:1]), "labelled": (f"{PROJECT}_labelled", ["--label=a=b"] + MARKS[:1]),
            "named": ("own", MARKS[:1]), "foreign": ("foreign", None),
            "both": ("theirs", None)})
        project = self.settle(make_document({}, **document))
        self.assertEqual(set(project.volumes), {f"{PROJECT}_plain", f"{PROJECT}_labelled", "own"})

    def test_networks_and_how_they_are_made(self):
        document = {"networks": {"plain": None, "inner": {"internal": True, "labels": ["a=b"]},
                                 "foreign": {"external": True, "name": "plant"},
                                 "fixed": {"driver": "bridge",
                                           "ipam": {"config": [{"subnet": "10.1.0.0/24", "gateway": "10.1.0.1"}]}}}}
        networks = margo_agent.make_networks(document, self.make_workload())
        digests = {name: arguments.pop() for name, (_, arguments) in networks.items() if arguments}
        self.assertEqual(networks, {
            "default": (f"{PROJECT}_default", MARKS), "plain": (f"{PROJECT}_plain", MARKS),
            "inner": (f"{PROJECT}_inner", ["--label=a=b"] + MARKS + ["--internal"]), "foreign": ("plant", None),
            "fixed": (f"{PROJECT}_fixed", MARKS + ["--subnet=10.1.0.0/24", "--gateway=10.1.0.1"])})
        self.assertEqual(digests["plain"], digests["default"])
        self.assertEqual(len(set(digests.values())), 3)

    def test_names_that_an_engine_would_take_for_something_else_are_refused(self):
        for name in ("../x", "a b", "-x", "a/b", "", "ns:/proc/1/ns/net"):
            for section, word in (("volumes", "volume"), ("networks", "network")):
                with self.subTest(name=name, section=section):
                    self.assertRefused(make_document({}, **{section: {"a": {"name": name}}}), f"{section}.a: ",
                                       f"is not a {word} name")

    def test_what_the_agent_made_for_another_deployment_is_not_reached_by_its_name(self):
        """Data, and a network by which it would answer, are that application's; components of one deployment may share."""
        theirs, own = f"db-{support.HELLO[:-1]}1_data", f"db-{support.HELLO}_data"
        for kind in ("volumes", "networks"):
            for value, name in (({"name": theirs}, "a"), ({"external": True, "name": theirs}, "a"), ({"external": True}, theirs)):
                for strict in (True, False):
                    self.assertRefused(make_document({}, **{kind: {name: value}}), f"{kind}.{name}", "of another deployment",
                                       code="POLICY_DENIED", strict=strict)
            for value in ({"external": True, "name": own}, {"name": "shared"}, {"name": "of-" + support.HELLO[:-1] + "1"}):
                self.settle(make_document({}, **{kind: {"a": value}}))

    def test_the_networks_of_a_service(self):
        networks = {"front": None, "back": None}
        for value, expected in (
                (None, [(f"{PROJECT}_default", [], [])]), (["front"], [(f"{PROJECT}_front", [], [])]),
                (["back", "front"], [(f"{PROJECT}_back", [], []), (f"{PROJECT}_front", [], [])]),
                ({"front": {"aliases": ["a", "b"], "ipv4_address": "10.1.0.5", "ipv6_address": "fd00::5"},
                  "back": None},
                 [(f"{PROJECT}_front", ["a", "b"], ["--ip=10.1.0.5", "--ip6=fd00::5"]), (f"{PROJECT}_back", [], [])])):
            with self.subTest(value=value):
                self.assertEqual(self.settle_service({"networks": value}, networks=networks).networks, expected)

    def test_network_modes(self):
        for mode in ("none", "host", "bridge"):
            self.assertEqual(self.settle_service({"network_mode": mode}).networks, [(mode, None)])
        project = self.settle({"services": {"main": {"image": IMAGE},
                                            "beside": {"image": IMAGE, "network_mode": "service:main"}}})
        self.assertEqual([s.networks for s in project.services if s.name == "beside"],
                         [[(f"container:{PROJECT}-main-1", None)]])
        for mode in ("slirp4netns", "ns:/proc/1/ns/net", "pasta", "other"):
            self.assertRefused(make_document({"network_mode": mode}),
                               f"services.main.network_mode: '{mode}' is not supported")

    def test_mounts_in_both_syntaxes(self):
        cases = [
            ("data:/d", f"--volume={PROJECT}_data:/d"), ("data:/d:ro", f"--volume={PROJECT}_data:/d:ro"),
            ("data:/d:ro,z", f"--volume={PROJECT}_data:/d:ro,z"),
            ("/d", "--volume=/d"), ("./a:/d", f"--volume={self.archive}/a:/d:ro"),
            ({"type": "volume", "source": "data", "target": "/d"}, f"--volume={PROJECT}_data:/d"),
            ({"type": "volume", "target": "/d"}, "--volume=/d"),
            ({"type": "volume", "source": "data", "target": "/d", "read_only": True}, f"--volume={PROJECT}_data:/d:ro"),
            ({"type": "tmpfs", "target": "/t"}, "--tmpfs=/t"),
            ({"type": "tmpfs", "target": "/t", "tmpfs": {"size": "1m"}}, "--tmpfs=/t:size=1m")]
        for item, expected in cases:
            with self.subTest(item=item):
                self.assertEqual(self.settle_service({"volumes": [item]}, volumes={"data": None}).arguments, [expected])

    def test_mounts_that_make_no_sense_are_refused_with_their_number(self):
        for item in ("data:d", "data:/d:ro:x", "other:/d", "data:", ":/d", "data::/d", "data", "", "sub/dir:/d",
                     {"type": "volume", "source": "data"},
                     {"type": "bind", "source": "./a:b", "target": "/d"}, {"source": "data", "target": "/d"},
                     {"type": "volume", "source": "/etc", "target": "/d"},
                     {"type": "image", "source": "a", "target": "/d"},
                     {"type": "tmpfs", "target": "d"}):
            with self.subTest(item=item):
                self.assertRefused(make_document({"volumes": ["data:/ok", item]}, volumes={"data": None}),
                                   "services.main.volumes[1]")

    def test_configs_are_texts_by_their_target(self):
        self.add_file("a.ini", "price=$A")
        service = self.settle_service({"configs": ["short", {"source": "short", "target": "/etc/a.ini", "mode": 0o440},
            "inline"]}, {"A": "x"},
                                      configs={"short": {"file": "./a.ini"}, "inline": {"content": "a=${A}"}})
        self.assertEqual(service.files, {"/short": "price=$A", "/etc/a.ini": "price=$A", "/inline": "a=x"})

    def test_the_target_of_a_config_is_absolute(self):
        """P-20: an engine would refuse `app.ini` when the running container is gone already."""
        try:
            files = self.settle_service({"configs": [{"source": "a", "target": "app.ini"}]},
                                        configs={"a": {"content": "x"}}).files
        except margo_agent.ComponentError as error:
            self.assertIn("services.main.configs", error.message)
        else:
            self.assertEqual(files, {"/app.ini": "x"})

    def test_entrypoint_and_command(self):
        for keys, arguments, command in (
                ({"command": "a 'b c'"}, [], ["a", "b c"]), ({"entrypoint": ["/e", "-x"], "command": ["y"]},
                    ["--entrypoint=/e"], ["-x", "y"]),
                ({"entrypoint": "/e -x"}, ["--entrypoint=/e"], ["-x"]), ({"entrypoint": []}, ["--entrypoint="], []),
                ({"entrypoint": "", "command": "a"}, ["--entrypoint="], ["a"]),
            ({"entrypoint": None, "command": None}, [], [])):
            with self.subTest(keys=keys):
                service = self.settle_service(keys)
                self.assertEqual((service.arguments, service.command), (arguments, command))

    def test_the_labels_of_the_agent_are_its_own(self):
        for labels in ({"org.margo.deployment": "x"}, ["org.margo.service=x"], {"org.margo.anything": None}):
            for strict in (True, False):
                self.assertRefused(make_document({"labels": labels}), "services.main.labels: org.margo.", strict=strict)
                for kind in ("networks", "volumes"):
                    self.assertRefused(make_document({}, **{kind: {"a": {"labels": labels}}}), f"{kind}.a.labels: org.margo.",
                                       strict=strict)

    def test_a_providers_file_has_the_labels_by_which_containers_are_found(self):
        project = self.settle(make_document({"labels": ["a=b"]}), strict=False)
        self.assertEqual(project.document["services"]["main"]["labels"], {
            "a": "b", "org.margo.deployment": support.HELLO, "org.margo.component": "web", "org.margo.project": PROJECT,
            "org.margo.service": "main",
            "org.margo.hash": project.services[0].hash, "org.margo.device": "", "org.margo.owner": OWNER})

    def test_networks_and_volumes_of_a_providers_file_say_whose_they_are(self):
        """Contract, On the engine.  What is external is another's, and stays as it is written."""
        shared = {"data": {"labels": ["a=b"]}, "plant": {"external": True}}
        document = self.settle(make_document({}, networks=shared, volumes=shared), strict=False).document
        mark, project = {"org.margo.owner": OWNER}, {"org.margo.project": PROJECT}
        self.assertEqual(document["volumes"], {"data": {"labels": dict(mark, a="b")}, "plant": {"external": True}})
        self.assertEqual(document["networks"], {"data": {"labels": dict(mark, a="b", **project)}, "plant": {"external": True},
                                                "default": {"labels": dict(mark, **project)}})

    def test_the_owner_is_no_part_of_the_hash(self):
        """What an older agent made keeps running when the agent is updated."""
        document, workload = make_document({"volumes": ["data:/d"]}, volumes={"data": None}), self.make_workload()
        for strict in (True, False):
            hashes = {margo_agent.make_project(document, workload._replace(owner=owner), self.config.policy, "podman",
                                               strict).services[0].hash for owner in ("", OWNER)}
            self.assertEqual(len(hashes), 1, strict)

    def test_relative_paths_are_settled_for_every_provider(self):
        """podman-compose takes paths from beside its file, Docker Compose from --project-directory: none is left."""
        self.add_file("a.ini", "x")
        document = self.settle(make_document({"volumes": ["./data:/d",
            {"type": "bind", "source": "data", "target": "/e"}], "configs": ["a"]},
                                             configs={"a": {"file": "a.ini"}}), strict=False).document
        short, long = document["services"]["main"]["volumes"]
        short = short.split(":")[0] if isinstance(short, str) else short["source"]
        self.assertEqual([short, long["source"]], [os.path.join(self.archive, "data")] * 2)
        config = document["configs"]["a"]
        self.assertIn(config, ({"content": "x"}, {"file": os.path.join(self.archive, "a.ini")}))

    def test_escape_dollars_reaches_every_text(self):
        value = {"a": "$A", "b": ["$$", {"c": "x${Y}"}], "n": 1, "f": True, "none": None}
        self.assertEqual(margo_agent.escape_dollars(value), {"a": "$$A", "b": ["$$$$", {"c": "x$${Y}"}], "n": 1,
            "f": True, "none": None})
        self.assertEqual(margo_agent.escape_dollars(margo_agent.load_yaml("[0440, 0o440, 0x10, 0, 10, 0.5]")),
                         ["0440", 288, 16, 0, 10, 0.5])


class Hashes(RuntimeCase):
    BASE = {"image": "localhost/a:1", "command": ["a"], "environment": {"A": "1"}, "ports": ["80:80"],
            "volumes": ["data:/d", "./a:/a"],
            "labels": {"l": "1"}, "networks": ["front"], "healthcheck": {"test": "true"}, "configs": ["app"]}
    MEMBERS = {"volumes": {"data": None}, "networks": {"front": None, "back": None},
               "configs": {"app": {"content": "x"}}}

    def hash(self, *removed, **changes):
        keys = {key: value for key, value in dict(self.BASE, **changes).items() if key not in removed}
        return self.settle_service(keys, **self.MEMBERS).hash

    def test_the_same_file_has_the_same_hash(self):
        self.assertEqual(self.hash(), self.hash())
        self.assertRegex(self.hash(), r"\A[0-9a-f]{32}\Z")

    def test_it_does_not_depend_on_this_process(self):
        """P-16: a restart of the agent adopts what runs."""
        code = ("import sys; sys.path.insert(0, sys.argv[1]); import margo_agent as m\n"
                "w = m.Workload('i', 'web', 'p', sys.argv[2], {}, {}, True)\n"
                "s = {'image': 'a', 'labels': {'b': '1', 'a': '2'}, 'environment': {'Y': '1', 'X': '2'}}\n"
                "d = {'services': {'main': s}}\n"
                "print(m.make_project(d, w, m.Settings(privileged='deny', host_paths=[]), 'podman').services[0].hash)")
        here = os.path.dirname(os.path.abspath(margo_agent.__file__))
        found = {subprocess.check_output([sys.executable, "-S", "-c", code, here, self.archive],
                                         env={"PYTHONHASHSEED": seed}) for seed in "12"}
        self.assertEqual(len(found), 1)
        self.assertRegex(found.pop().decode(), r"\A[0-9a-f]{32}\n\Z")

    def test_order_and_spelling_that_mean_nothing_do_not_change_it(self):
        keys = dict(reversed(list(self.BASE.items())))
        self.assertEqual(self.settle_service(keys, **self.MEMBERS).hash, self.hash())
        for changes in ({"environment": ["A=1"]}, {"labels": ["l=1"]}, {"x-note": "n"}, {"depends_on": {}},
                        {"command": "a"},
                        {"networks": {"front": None}}):
            with self.subTest(changes=changes):
                self.assertEqual(self.hash(**changes), self.hash())

    def test_every_change_changes_it(self):
        cases = [
            {"image": "localhost/a:2"}, {"command": ["b"]}, {"command": ["a", "b"]}, {"entrypoint": ["a"]},
            {"environment": {"A": "2"}},
            {"environment": {"A": "1", "B": ""}}, {"environment": {}}, {"ports": ["81:80"]}, {"ports": ["80:80/udp"]},
            {"volumes": ["data:/e", "./a:/a"]},
            {"volumes": ["data:/d", "./b:/a"]}, {"volumes": ["data:/d:ro", "./a:/a"]}, {"labels": {"l": "2"}},
            {"networks": ["back"]},
            {"networks": ["front", "back"]}, {"networks": {"front": {"aliases": ["x"]}}},
            {"healthcheck": {"test": "false"}},
            {"healthcheck": {"test": "true", "interval": "5s"}}, {"init": True}, {"user": "1"}, {"restart": "always"},
            {"mem_limit": "1g"},
            {"configs": [{"source": "app", "target": "/elsewhere"}]}, {"configs": []}]
        seen = {self.hash(): "nothing"}
        for changes in cases:
            with self.subTest(changes=changes):
                digest = self.hash(**changes)
                self.assertNotIn(digest, seen)
                seen[digest] = changes

    def test_the_content_of_a_config_changes_it(self):
        first = self.hash()
        self.assertNotEqual(first, self.settle_service(self.BASE,
            **dict(self.MEMBERS, configs={"app": {"content": "y"}})).hash)

    def test_only_the_service_that_changed_has_another_one(self):
        def hashes(value):
            return {s.name: s.hash for s in self.settle({"services": {
                "a": {"image": IMAGE, "environment": ["A"]}, "b": {"image": IMAGE, "depends_on": ["a"]}}},
                {"A": value}).services}
        first, second = hashes("1"), hashes("2")
        self.assertNotEqual(first["a"], second["a"])
        self.assertEqual(first["b"], second["b"])


# Judging a start

class JudgeStartup(unittest.TestCase):
    def make(self, name, health=None):
        return margo_agent.Service(name, IMAGE, [], [], {}, {}, [], {}, health, "missing", "h")

    def test_where_a_start_stands(self):
        """C-163, C-164, C-165, P-6, P-17: decided from what the engine shows, once-only services included.

        E17: a code is told only of what has ended.
        """
        checked, unwell = (30, 3, 0), {"one": "one is not healthy yet"}
        cases = [
            # what is seen of `one`, its health check, healthy, failure, what is waited for, finished
            (("running",), None, (), None, {}, set()),
            (("running",), checked, (), None, unwell, set()),
            (("running",), checked, ("one",), None, {}, set()),
            (("running",), checked, ("other",), None, unwell, set()),
            (("exited",), None, (), None, {}, {"one"}),
            (("exited",), checked, (), None, {}, {"one"}),
            (("stopped",), None, (), None, {}, {"one"}),
            (("exited", 3), None, (), "service one exited with code 3", {}, set()),
            (("exited", 137), checked, ("one",), "service one exited with code 137", {}, set()),
            (("stopped", 1), None, (), "service one exited with code 1", {}, set()),
            (("dead", 1), None, (), "service one exited with code 1", {}, set()),
            (("running", 0, 2), None, (), "service one exited (2 restarts)", {}, set()),
            (("running", 0, 1), checked, ("one",), "service one exited (1 restarts)", {}, set()),
            (("restarting", 1, 1), None, (), "service one exited (1 restarts)", {}, set()),
            (("exited", 3, 1), None, (), "service one exited with code 3 (1 restarts)", {}, set()),
            (("created",), None, (), None, {"one": "one is created"}, set()),
            (("initialized",), None, (), None, {"one": "one is initialized"}, set()),
            (("configured",), None, (), None, {"one": "one is configured"}, set()),
            (("paused",), None, (), None, {"one": "one is paused"}, set()),
            (None, None, (), "the container of service one is gone: somebody removed it", {}, set())]
        for facts, health, healthy, words, waiting, finished in cases:
            with self.subTest(facts=facts, health=health, healthy=healthy):
                found = margo_agent.judge_startup([self.make("one", health)], {"one": margo_agent.Shown(*facts)} if facts else {},
                    set(healthy))
                self.assertEqual(found, (("one", words) if words else None, waiting, finished))

    def judge(self, services, **states):
        """judge_startup where nothing is healthy yet."""
        return margo_agent.judge_startup(services, {name: margo_agent.Shown(*facts) for name, facts in states.items()}, set())

    def test_one_failure_is_enough(self):
        services = [self.make("a"), self.make("b"), self.make("c")]
        failure, _, _ = self.judge(services, a=("running",), b=("created",), c=("exited", 5))
        self.assertEqual(failure, ("c", "service c exited with code 5"))

    def test_every_service_is_waited_for(self):
        services = [self.make("a"), self.make("b", (1, 1, 0)), self.make("c")]
        found = self.judge(services, a=("created",), b=("running",), c=("exited", 0))
        self.assertEqual(found, (None, {"a": "a is created", "b": "b is not healthy yet"}, {"c"}))

    def test_containers_of_others_do_not_count(self):
        self.assertEqual(self.judge([self.make("a")], a=("running",), b=("exited", 1)), (None, {}, set()))


class Masking(unittest.TestCase):
    def test_a_value_is_masked_however_it_is_spelt(self):
        """D-35: a tool's words come with control characters escaped, and tools quote a text of several lines line by line."""
        secret = "first line\n\tsecond"
        for text in (secret, margo_agent.make_printable(secret), "error at:\n  first line\n\tsecond"):
            masked = margo_agent.mask(text, [secret])
            self.assertFalse("first" in masked or "second" in masked, masked)
        self.assertEqual(margo_agent.mask("a word", ["a"]), "a word")


class IsSettled(unittest.TestCase):
    def test_exactly_one_container_that_is_as_it_should_be(self):
        """P-7, P-12: told from what the engine shows, and from what finished before."""
        service = margo_agent.Service("a", IMAGE, [], [], {}, {}, [], {}, None, "missing", "h")
        done, other = {"hash": "h", "finished": True}, {"hash": "g", "finished": True}
        for containers, known, expected in (
                ([("h", "running")], None, True), ([("g", "running")], None, False), ([], done, False),
            ([("h", "exited")], None, False),
                ([("h", "exited")], done, True), ([("h", "exited")], other, False),
            ([("h", "exited")], dict(done, finished=False), False),
                ([("h", "running"), ("h", "running")], None, False), ([("g", "exited")], done, False)):
            with self.subTest(containers=containers, known=known):
                items = [margo_agent.Container("i", "n", "d", "c", "a", digest, state, "compose") for digest,
                         state in containers]
                self.assertIs(margo_agent.is_settled(service, items, known), expected)


# Finding engines

class Finding(RuntimeCase):
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

    def test_the_provider_is_what_the_setting_says(self):
        environ = self.make_environ("docker-compose")
        for setting, engine, expected in (
                ("builtin", "docker", None), ("docker compose", "docker", ["docker", "compose"]),
            ("docker-compose", "podman", ["docker-compose"]),
                ("podman-compose", "podman", ["podman-compose"]), ("auto", "podman", None),
            ("auto", "docker", ["docker-compose"])):
            with self.subTest(setting=setting, engine=engine):
                self.assertEqual(margo_agent.find_provider(setting, engine, dict(environ, DOCKER_CONFIG=self.folder)),
                                 expected)

    def test_the_plugin_of_docker_is_found_where_docker_looks_for_it(self):
        support.write(os.path.join(self.folder, "config", "cli-plugins", "docker-compose"), "", 0o755)
        support.write(os.path.join(self.folder, ".docker", "cli-plugins", "docker-compose"), "", 0o755)
        for environ in ({"DOCKER_CONFIG": os.path.join(self.folder, "config"), "HOME": "/nowhere"},
                        {"HOME": self.folder}):
            self.assertEqual(margo_agent.find_provider("auto", "docker", dict(environ, PATH="/nowhere")),
                             ["docker", "compose"])

    def test_the_engine_is_the_one_that_the_provider_works_with(self):
        """P-12: asked of podman, what `docker compose` has started would never be there."""
        environ = self.make_environ("podman", "docker", DOCKER_HOST="unix:///x")
        driver = margo_agent.make_compose_driver(make_config(runtime__compose="docker compose"), environ)
        self.assertEqual((driver.engine, driver.provider), ("docker", ["docker", "compose"]))

    def test_no_driver_where_nothing_runs_compose(self):
        environ = self.make_environ("podman")
        self.assertIsNone(margo_agent.make_compose_driver(make_config(runtime__compose="off"), environ))
        self.assertIsNone(margo_agent.make_compose_driver(make_config(runtime__engine="docker"), environ))
        driver = margo_agent.make_compose_driver(make_config(), environ)
        self.assertEqual((driver.engine, driver.provider), ("podman", None))


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
        line = json.dumps(["abc", "web-1", support.HELLO, "c", "s", "h", "gw/a", "us", "exited", "Exited (1) 3 seconds ago"])
        expected = margo_agent.Container("abc", "web-1", support.HELLO, "c", "s", "h", "exited", "compose", "gw/a", owner="us")
        self.assertEqual(margo_agent.parse_containers(f"{line}\n{line}\n".encode(), "docker"), [expected, expected])
        self.assertEqual(margo_agent.parse_containers(b"", "docker"), [])

    def test_a_label_of_somebody_else_is_no_deployment(self):
        """Any image may have such a label.  Its value becomes a folder that is removed: only an id is one."""
        for name in ("/etc", "../../..", "", "d", support.HELLO + "\n", support.HELLO + "/.."):
            item = dict(self.GOOD, Labels=dict(self.GOOD["Labels"], **{"org.margo.deployment": name}))
            self.assertEqual(margo_agent.parse_containers(json.dumps([item]).encode(), "podman"), [])
            self.assertEqual(margo_agent.parse_containers(json.dumps(["a", "b", name, "", "", "", "", "", "exited", ""]).encode(), "docker"), [])

    def test_the_state_of_health_is_in_the_words_of_the_status(self):
        """Drift of a service that runs and is not well is seen without a further command."""
        for state, status, expected in (
                ("running", "Up 4 seconds ago (unhealthy)", ("unhealthy", "unhealthy")), ("running", "Up 4 minutes (healthy)", ("running", "healthy")),
                ("running", "Up 1 second (health: starting)", ("running", "starting")), ("exited", "Exited (1) 2 days ago", ("exited", "")),
                ("exited", "Exited (1) 2 days ago (unhealthy)", ("exited", "unhealthy")), ("running", None, ("running", ""))):
            item = dict(self.GOOD, State=state, Status=status, StartedAt=17)
            (container,) = margo_agent.parse_containers(json.dumps([item]).encode(), "podman")
            self.assertEqual((container.state, container.health, container.started), expected + (17,))
            (container,) = margo_agent.parse_containers(json.dumps(
                ["i", "n", support.HELLO, "c", "s", "h", "", "", state, str(status)]).encode(), "docker")
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
        for data in (b"abc\n", b'["a"]\n', b'["a","b","c","d","e","f","g","h","i","j","k"]\n', b"\n", b"Error: no\n"):
            with self.subTest(data=data):
                with self.assertRaises(margo_agent.CommandError) as caught:
                    margo_agent.parse_containers(data, "docker")
                self.assertIn("docker ps answered in an unknown form", caught.exception.message)


class Ports(RuntimeCase):
    """What a service holds of the host, as data: who goes first when a port changes hands is decided from it (F-28)."""

    CASES = [("80", []), ("8080:80", [["", 8080, "tcp"]]), ("127.0.0.1:8080:80/udp", [["127.0.0.1", 8080, "udp"]]),
             ("0.0.0.0:8080:80", [["", 8080, "tcp"]]), ("[::]:8080:80", [["", 8080, "tcp"]]),
             ("[0:0::1]:53:53/udp", [["::1", 53, "udp"]]), ("127.0.0.1::80", []),
             ("8080-8081:80-81", [["", 8080, "tcp"], ["", 8081, "tcp"]]), ("8080-8090:80", []),
             ({"target": 80, "published": 8080, "host_ip": "10.0.0.1", "protocol": "sctp"}, [["10.0.0.1", 8080, "sctp"]]),
             ({"target": 80}, [])]

    def test_the_ports_of_a_service_are_known_from_its_file(self):
        for item, expected in self.CASES:
            with self.subTest(item=item):
                self.assertEqual(self.settle_service({"ports": [item]}).ports, expected)


# The driver against an engine of files

class DriverCase(RuntimeCase):
    provider = None
    starts_processes = False
    claim = margo_agent.Claim(OWNER, frozenset(), frozenset([support.HELLO]), frozenset())

    def setUp(self):
        super().setUp()
        self.engine, self.fetched = support.FakeEngine(self), []
        self.start_patch(mock.patch.dict(os.environ, self.engine.env))
        if not self.starts_processes:
            self.start_patch(mock.patch.object(margo_agent, "run_command", self.run_here))
        self.driver = margo_agent.ComposeDriver("podman", self.provider, self.config, claim=lambda: self.claim)

    def start_patch(self, patch):
        patch.start()
        self.addCleanup(patch.stop)

    def run_here(self, argv, timeout, env=None):
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
        config = next(argument for argument in calls[4] if re.match("--volume=.*:/app:ro$", argument))
        mark = f"--label=org.margo.project={PROJECT}"
        for call in calls[:3]:
            self.assertRegex(call.pop(-2), "^--label=org.margo.hash=[0-9a-f]{32}$")
        self.assertEqual(calls, [
            ["network", "create", *MARKS, f"{PROJECT}_default"], ["network", "create", *MARKS, f"{PROJECT}_front"],
            ["network", "create", *MARKS, "--internal", f"{PROJECT}_back"],
            ["volume", "create", "--label=a=b", MARKS[0], f"{PROJECT}_data"],
            ["create", f"--name={name}", f"--label=org.margo.deployment={support.HELLO}",
             "--label=org.margo.component=web", mark,
             "--label=org.margo.service=main", f"--label=org.margo.hash={service.hash}", "--label=org.margo.device=",
             f"--label=org.margo.owner={OWNER}", "--http-proxy=false", f"--env-file={self.folder}/main.env", config, "--init",
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

    def test_a_network_mode_has_no_alias(self):
        self.apply(make_document({"network_mode": "host"}))
        create = next(call for call in self.changes() if call[0] == "create")
        self.assertIn("--network=host", create)
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
        self.apply(make_document({"environment": ["A"]}), parameters={"A": "1"})
        before = self.ids()
        self.engine.forget_calls()
        self.assertFails("PARAMETER_INVALID", lambda: self.apply(make_document({"environment": ["A"]}),
            parameters={"A": "two\nlines"}),
                         "services.main.environment.A: holds a line end")
        self.assertEqual(self.ids(), before)
        self.assertEqual(self.changes(), [])

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

    def test_what_a_provider_made_before_is_in_its_file_as_it_was_made(self):
        """docker compose would stop everything for a network or volume that has another label now."""
        self.claim, self.driver.provider = self.claim._replace(owners={"earlier"}), ["docker-compose"]
        with self.engine.open() as held:
            held["volumes"] = {f"{PROJECT}_data": [], "named": ["org.margo.owner=earlier"]}
            held["networks"] = {f"{PROJECT}_default": [f"org.margo.project={PROJECT}"]}
        prepared = self.prepare(make_document({}, volumes={"data": None, "named": {"name": "named"}, "new": None},
                                              networks={"plant": {"external": True}}))
        self.driver.keep_owners(*prepared)
        found = {name: item.get("labels", {}).get("org.margo.owner") for kind in ("volumes", "networks")
                 for name, item in prepared[1].document[kind].items()}
        self.assertEqual(found, {"data": None, "named": "earlier", "new": OWNER, "plant": None, "default": None})

    def test_what_an_earlier_identity_made_is_still_ours(self):
        self.apply(make_document({}))
        self.claim = self.claim._replace(owner="another now", owners={OWNER})
        self.check_names(make_document({}))
        self.assertEqual(len(self.driver.observe()), 1)


class Handover(DriverCase):
    """K-2: one outage, and nothing of the old runs beside the new."""

    def test_all_is_made_then_the_old_stops_then_the_new_starts_then_the_old_goes(self):
        self.apply({"services": {"a": {"image": IMAGE}, "b": {"image": IMAGE}, "c": {"image": IMAGE}}})
        before = self.ids()
        self.engine.forget_calls()
        self.apply({"services": {"new": {"image": IMAGE}, "b": {"image": IMAGE, "command": ["x"]}, "c": {"image": IMAGE}}})
        calls = [call for call in self.changes() if call[0] in ("create", "stop", "start", "rm")]
        self.assertEqual([call[0] for call in calls], ["create", "create", "stop", "start", "start", "rm"])
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
        """F-01: left by a create that was killed; also where an update needs it."""
        name = f"{PROJECT}-main-1"
        for held in (name, f"{name}-new"):
            with self.subTest(held=held):
                self.engine.change(external={held: "e" * 64})
                self.apply(make_document({"command": [held]}))
                self.assertEqual(set(self.engine.containers()), {name})

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
                self.driver.claim = lambda images=images: self.claim._replace(images=images)
                self.engine.forget_calls()
                if expected:
                    self.apply(document)
                else:
                    self.assertFails("INSTALL_FAILED", lambda: self.apply(document), "no such file or directory")
                self.assertEqual(["image", "rm", "registry.example/app:1"] in self.changes(), expected)

    def test_an_image_that_is_well_is_not_pulled_for_an_option_that_is_not(self):
        self.driver.claim = lambda: self.claim._replace(images=frozenset([IMAGE]))
        self.engine.change(external={f"{PROJECT}-main-1": "e" * 64})
        self.apply(make_document({}))
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
            self.assertEqual((held["networks"], held["volumes"]), ({}, {f"{PROJECT}_data": [f"org.margo.owner={OWNER}"]}))

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

    def test_a_start_that_takes_too_long_says_what_is_waited_for(self):
        """C-152: and the log's end."""
        self.engine.change(unhealthy=["main"])
        document = make_document({"healthcheck": {"test": "true", "interval": "1h"}})
        self.assertFails("INSTALL_TIMEOUT", lambda: self.apply(document, wait=True, patience=1),
                         "not up in time: main is not healthy yet", "last words")

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


class Providers(DriverCase):
    provider = ["docker-compose"]
    starts_processes = True
    SCRIPT = """#!/bin/sh
printf '%s\\n' "$@" > {0}/arguments
env > {0}/environment
test ! -e {0}/fault || {{ cat {0}/fault >&2; exit 17; }}
"""

    def setUp(self):
        super().setUp()
        self.seen = os.path.join(self.folder, "seen")
        for name in ("docker-compose", "podman-compose"):
            support.write(os.path.join(self.seen, name), self.SCRIPT.format(self.seen), 0o755)
        self.start_patch(mock.patch.dict(os.environ, PATH=self.seen + ":" + os.environ["PATH"], SECRET="of-the-agent",
                                         COMPOSE_FILE="/hostile.yaml"))

    def read(self, name):
        with open(os.path.join(self.seen, name)) as file:
            return file.read().splitlines()

    def test_the_command_line_word_by_word(self):
        self.apply(make_document({}))
        self.assertEqual(self.read("arguments"), ["--project-name", PROJECT, "--file", f"{self.folder}/resolved.json",
            "--project-directory",
                                                  self.archive, "--env-file", "/dev/null", "up", "--detach", "--remove-orphans"])
        self.driver.provider = ["podman-compose"]
        self.apply(make_document({}))
        self.assertEqual(self.read("arguments"), ["--project-name", PROJECT, "--file", f"{self.folder}/resolved.json",
            "up", "--detach",
                                                  "--remove-orphans"])

    def test_only_what_changed_is_named_to_it(self):
        """P-7, P-16: left to itself a provider makes the others anew too."""
        def make(command):
            return {"services": {"a": {"image": IMAGE}, "b": {"image": IMAGE, "command": [command]}}}
        services = self.prepare(make("x"))[1].services
        with self.engine.open() as held:                # what the provider has made, as the engine shows it
            for number, service in enumerate(services):
                labels = margo_agent.make_labels(self.make_workload(), service.name, service.hash)
                held["containers"][f"{PROJECT}-{service.name}-1"] = {
                    "id": str(number) * 64, "image": IMAGE, "labels": labels, "state": "running", "code": 0,
                    "restarts": 0, "argv": [], "env": []}
        self.apply(make("x"))
        self.assertFalse(os.path.exists(os.path.join(self.seen, "arguments")))
        self.apply(make("y"))
        self.assertEqual(self.read("arguments")[-4:], ["up", "--detach", "--no-deps", "b"])

    def test_its_environment_holds_nothing_of_the_application(self):
        """D-18, contract, Parameters: they change nothing of it, and the agent's own COMPOSE_FILE has no say."""
        parameters = {"PATH": "/hostile", "LD_PRELOAD": "/hostile.so", "DOCKER_HOST": "tcp://hostile",
                      "PLAIN": "hostile"}
        self.apply(make_document({"environment": sorted(parameters)}), parameters=parameters,
                   environment={"OTEL": "hostile"})
        lines = self.read("environment")
        self.assertIn("PATH=" + os.environ["PATH"], lines)
        self.assertFalse([line for line in lines if "hostile" in line or line.startswith("SECRET=")])

    def test_the_file_is_settled_private_and_escaped(self):
        """C-180: values reach the provider by a file of mode 0600, and it finds nothing left to interpolate."""
        old = os.umask(0)
        self.addCleanup(os.umask, old)
        self.apply(make_document({"environment": ["PASS"], "command": ["echo", "${PASS}", "$$HOME"]}),
                   parameters={"PASS": "s3cret$x"})
        path = os.path.join(self.folder, "resolved.json")
        self.assertEqual(stat.S_IMODE(os.stat(path).st_mode), 0o600)
        service = support.read_json(path)["services"]["main"]
        self.assertEqual((service["environment"], service["command"]),
                         ({"PASS": "s3cret$$x"}, ["echo", "s3cret$$x", "$$HOME"]))
        self.assertNotIn("s3cret", "".join(self.read("arguments")) + json.dumps(self.engine.calls()))

    def test_a_line_end_reaches_the_container(self):
        self.apply(make_document({"environment": ["TEXT"]}), parameters={"TEXT": "two\nlines"})
        service = support.read_json(os.path.join(self.folder, "resolved.json"))["services"]["main"]
        self.assertEqual(service["environment"], {"TEXT": "two\nlines"})

    def test_its_failure_carries_its_words(self):
        support.write(os.path.join(self.seen, "fault"), "port is already allocated for s3cret\n")
        self.assertFails("INSTALL_FAILED", lambda: self.apply(make_document({}), parameters={"PASS": "s3cret"}), "docker-compose up failed",
                         "port is already allocated for ***")

    def test_images_are_pulled_before_anything_is_touched(self):
        """P-20, D-11: also where a provider could pull by itself."""
        self.prepare(make_document({"image": "localhost/new:1"}))
        self.assertEqual(self.changes(), [["pull", "--quiet", "localhost/new:1"]])
        self.assertFalse(os.path.exists(os.path.join(self.seen, "arguments")))

    def test_keys_that_only_the_provider_knows_are_handed_on(self):
        self.apply(make_document({"oom_score_adj": 5, "dns_search": ["example"]}))
        service = support.read_json(os.path.join(self.folder, "resolved.json"))["services"]["main"]
        self.assertEqual((service["oom_score_adj"], service["dns_search"]), (5, ["example"]))


if __name__ == "__main__":
    unittest.main()
