"""Compose file: what a compose file means; test_policy has what it may not ask for.

tests/data/compose/valid: files that make_project must read as Docker Compose reads them; their head holds
`# parameters: {JSON}` and `# files: {JSON of path: text}`.
tests/data/compose/invalid: files to be refused; their first line is `# expected: CODE part of message`.
"""
import atexit
import csv
import functools
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
from unittest import mock

import margo_agent
from tests import oracle, support

CORPUS = os.path.join(support.DATA, "compose")
PROJECT = f"web-{support.HELLO}"
IMAGE = support.IMAGE
MARGO_LABELS = ("org.margo.deployment", "org.margo.component", "org.margo.project", "org.margo.service",
                "org.margo.hash", "org.margo.device", "org.margo.owner")
OWNER = "spiffe://factory.example/margo/wfm/main/client/a#a"
MARKS = [f"--label=org.margo.deployment={support.HELLO}", f"--label=org.margo.owner={OWNER}", f"--label=org.margo.project={PROJECT}"]


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


class FileCase(unittest.TestCase):
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

    def settle(self, document, parameters=None, environment=None, engine="podman"):
        """The Project of a compose file's text or value."""
        if not isinstance(document, str):
            document = json.dumps(document)
        return margo_agent.make_project(margo_agent.load_yaml(document), self.make_workload(parameters, environment),
                                        self.config.policy, engine)

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

class Interpolation(FileCase):
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
        ("${UNSET:-\\}", "\\"), ("$", "$"), ("a$ b", "a$ b"), ("^x$", "^x$"), ("$(id) $1", "$(id) $1"), ("$2a$14$b", "$2a$14"),
        ("${UNSET:-$2a$1}", "$2a$1"), ('${SET:-{"k":"v"}}.', "value."), ('${UNSET:-{"k":{"v":1}}}.', '{"k":{"v":1}}.'),
        ("${EMPTY:+{q}}", ""), ("${UNSET:-{}", "{"), ("${SET:-{{.Name}}}", "value}"), ("${UNSET:-{{.Name}}}", "{{.Name}}"),
        ("${UNSET:-{ {x} }", "{ {x} "), ("${UNSET:-{}\n}", "{\n}"), ('${UNSET:-{"k":"${SET}"}}', '{"k":"value"}'),
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
                self.assertEqual(oracle.unescape(answer["services"]["main"]["environment"][f"F{index}"]), expected)

    def test_a_form_that_is_unknown_is_refused_at_its_place(self):
        for text in ("${}", "${1}", "${SET", "${SET:-${UNSET}", "${SET!x}", "${ SET}", "${SET }", "a${", "${SET:x}",
                     "${\u00c9}"):
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
                                 ("${A:-{}}", 5, 7), ("${A:-{}", 5, 6),
                                 ("${A:-{{x}y}z}", 5, 10), ("${A:-{}\n}", 5, 6), ("${A:-${B}", 5, 8)):
            with self.subTest(text=text):
                self.assertEqual(margo_agent.find_brace(text, start, self.VARIABLES, "here"), end)
        with self.assertRaises(margo_agent.ComponentError) as caught:
            margo_agent.find_brace("${A:-x\n}", 5, self.VARIABLES, "services.main.image")
        self.assertIn("services.main.image: a ${ that is not closed on its line", caught.exception.message)

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

    def test_a_number_and_its_text_are_one_key(self):
        """To YAML they are two; to whoever reads them as names one would hide the other."""
        self.assertRefused(f'services: {{main: {{image: {IMAGE}, labels: {{1: a, "1": b}}}}}}', "services.main.labels: a key occurs twice")

    def test_a_service_may_be_called_x_something(self):
        """A service's name is no key of the format: Docker Compose starts x-ray too; none is left out in silence."""
        project = self.settle({"services": {"x-ray": {"image": IMAGE}, "main": {"image": IMAGE}}})
        self.assertEqual(sorted(service.name for service in project.services), ["main", "x-ray"])


    def test_no_name_of_a_service_keeps_extensions(self):
        """podman-compose runs the host's own files by `x-podman.rootfs`: what is dropped goes by where it stands, not by how that is spelt."""
        for name in ("web.labels", "networks", "a.environment"):
            services = self.settle({"services": {
                name: {"image": IMAGE, "x-podman.rootfs": "/", "labels": {"x-mine": "1"},
                       "networks": {"labels": {"x-podman.mac_address": "1"}}}}, "networks": {"labels": None}}, engine="podman").services
            self.assertEqual((services[0].arguments, services[0].networks[0].options), (["--label=x-mine=1"], []))

    def test_variables_are_no_bomb(self):
        """A few lines that double each other, or one long value that is named again and again, would take all the memory there is."""
        laughs = "A0=aaaaaaaaaa\n" + "".join(f"A{n}=" + f"$A{n - 1}" * 10 + "\n" for n in range(1, 12))
        self.add_file(".env", laughs)
        self.assertRefused(make_document({}), "characters into the file")
        self.add_file(".env", "BIG=" + "x" * 50000)
        self.assertRefused(make_document({"command": ["$BIG"] * 2000}), "characters into the file")
        self.add_file("a.env", "x=" + "y" * 500000)
        self.assertRefused(make_document({"env_file": ["a.env"] * 20}), "characters into the file")
        self.assertEqual(self.settle_service({"command": ["$BIG"]}).command, ["x" * 50000])

    def test_braces_and_ports_are_no_bomb(self):
        """4, rule (d): each `${` could look through all that follow, and ranges of ports are many ports."""
        for keys in ({"hostname": "${A:-{}}" * 20000 + "${A:-{}" * 60000},
                     {"ports": [f"127.0.{number}.1:1-65535:1-65535" for number in range(200)]}):
            self.assertRefused(make_document(keys), "bring more than 8388608 characters")
        self.settle(make_document({"ports": ["10000-20000:10000-20000/udp"]}))

    def test_many_links_cost_as_much_as_they_are(self):
        def settle(count):
            links = [f"a:x{number}" for number in range(count)]
            self.settle({"services": {"a": {"image": IMAGE}, "main": {"image": IMAGE, "links": links}}})

        support.check_growth(self, settle, 3000)

    def test_what_an_engine_shows_of_a_service_has_an_end(self):
        """A list of containers with long labels or commands is more than the agent takes from an engine: it would be blind."""
        long = "x" * 40000
        for keys in ({"command": [long, long]}, {"labels": {"a": long, "b": long}}, {"entrypoint": ["a", long], "command": [long]}):
            self.assertRefused(make_document(keys), "services.main: its settings, labels and command together")


class EnvFiles(FileCase):
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
        ("X: a b", {"X": "a b"}), ("\ufeffX=1", {"X": "1"}), ("X='C:\\dir'", {"X": "C:\\dir"}), ("X='it\\'s'", {"X": "it's"}),
        ('X="q"#c', {"X": "q"}), ("X=^a$\nY=$(b)", {"X": "^a$", "Y": "$(b)"}), ('X="one\ntwo"\nY=1', {"X": "one\ntwo", "Y": "1"}),
        ("X='one\ntwo' # c", {"X": "one\ntwo"}), ("1A=x", {"1A": "x"}), ("# a\n\n  # b\nX=1\n#", {"X": "1"}), ("X=1 #c", {"X": "1"}),
        ("X : 'a'", {"X": "a"}), ("X='a\\nb'", {"X": "a\\nb"}),
        ("X=a\t#b", {"X": "a\t#b"}), ("X= # b", {"X": "# b"}), ("X=\t#b #c", {"X": "#b"}),       # only " #" begins a comment
        ('X="\\a\\b\\f\\v\\r\\q"', {"X": "\a\b\f\v\r\\q"}), ('X="a\r\nb"\r\nY=1', {"X": "a\r\nb", "Y": "1"}),
        ("X='\\\\\\''", {"X": "\\\\'"}), ("X=\u2028 a\u3000", {"X": "\u2028 a"}),
        ("X=a\x1d", {"X": "a\x1d"}), ("X=\x1e", {"X": "\x1e"}), ("X=\r'a'", {"X": "a"}), ('X="a\\\\0"', {"X": "a\\0"}),
        ("X=a\u2028Y=b", {"X": "a\u2028Y=b"}), ("X=a\x0cY=b", {"X": "a\x0cY=b"}),
        ("X=\v'a'", {"X": "a"}), ("X\x85=\xa0\"a\"\f#b", {"X": "a"}), ("X=\xa0a", {"X": "a"})]

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
                self.assertEqual({name: oracle.unescape(value) for name, value in found.items()}, expected)

    def test_a_bare_name_takes_the_parameter_of_its_name(self):
        self.assertEqual(margo_agent.parse_env_file("GIVEN\nUNSET\nEMPTY\n", self.VARIABLES, "app.env"),
                         {"GIVEN": "parameter", "EMPTY": ""})

    def test_what_is_not_supported_is_refused_with_its_line(self):
        for text, line in (("no name", 1), ("A=1\n=2", 2), ("A=1\n\n+X=2", 3), ("A='1'\n'B'=2", 2),
                           ('A=1\nB="open', 2),
                           ("A='it''s'", 1), ("A[0]=1", 1), ("A=1\n\x1cB=2", 2), ('A=1\nB="a\\0101"', 2)):
            with self.subTest(text=text):
                with self.assertRaises(margo_agent.ComponentError) as caught:
                    margo_agent.parse_env_file(text, margo_agent.Variables(), "app.env")
                self.assertIn(f"app.env, line {line}: ", caught.exception.message)
        for text in ("A=${", "B=1\nA=${}", 'A="${1}"'):
            with self.assertRaises(margo_agent.ComponentError) as caught:
                margo_agent.parse_env_file(text, margo_agent.Variables(), "app.env")
            self.assertIn("app.env, A: a ${ that is not", caught.exception.message)

    def test_a_long_line_is_read_as_fast_as_many_lines(self):
        """Neither blanks before what could be a comment nor names that each line could refer to make the time grow by the square."""
        self.assertEqual(self.read("X=a" + " " * 200000 + "b"), {"X": "a" + " " * 200000 + "b"})
        self.assertEqual(len(self.read("".join(f"X{n}=$GIVEN\n" for n in range(60000)))), 60000)

    def read(self, text):
        return margo_agent.parse_env_file(text, margo_agent.Variables({"GIVEN": "1"}), "app.env")

    def test_a_parameter_stands_above_the_files_own_default(self):
        """The .env file gives defaults; what the WFM sends wins, also where a later line of .env refers to it."""
        self.add_file(".env", "A=default\nB=default\nC=${A}\n")
        service = self.settle_service({"environment": ["A", "B", "C"]}, {"A": "sent"})
        self.assertEqual(service.environment, {"A": "sent", "B": "default", "C": "sent"})


# What Docker Compose makes of the same file

def ask_compose(folder, variables):
    """What Docker Compose makes of compose.yaml in a folder, the variables given by its environment."""
    return oracle.end_config(oracle.start_config(folder, variables, PROJECT))


@functools.lru_cache(maxsize=None)
def ask_about_corpus():
    """({name: folder}, {name: (what Docker Compose prints, its complaint)}), all asked at once."""
    holder = FileCase()
    holder.folder = os.path.realpath(tempfile.mkdtemp(prefix="margo-corpus-"))
    atexit.register(shutil.rmtree, holder.folder, True)
    folders, asked = {}, {}
    for name in list_corpus("valid"):
        text, head = read_corpus("valid", name)
        holder.archive = folders[name] = os.path.join(holder.folder, name, "archive")
        holder.add_file("compose.yaml", text)
        for path, content in head.get("files", {}).items():
            holder.add_file(path, content)
        asked[name] = oracle.start_config(folders[name], head.get("parameters", {}), PROJECT)
    return folders, {name: process.communicate() for name, process in asked.items()}


class ValidCorpus(FileCase):
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
        folders, answers = ask_about_corpus()
        self.config = make_config(policy__host_network="allow", policy__privileged="allow")
        for name, folder in folders.items():
            with self.subTest(file=name):
                answer = self.read_answer(answers[name])
                text, head = read_corpus("valid", name)
                self.archive = folder
                project = self.settle(text, head.get("parameters"))
                expected = oracle.read_compose(answer, PROJECT, folder, head.get("parameters", {}))
                self.assertEqual(oracle.find_differences(oracle.read_agent(project, folder), expected), [])
                own = {facts["name"] for facts in (answer.get("volumes") or {}).values() if not facts.get("external")}
                made = {name for name, arguments in project.volumes.items() if arguments is not None}
                self.assertEqual(made, own)

    def test_the_corpus_has_every_key_of_a_service(self):
        """So that what is accepted is held against Docker Compose, whatever is added."""
        found = set()
        for name in list_corpus("valid"):
            document = margo_agent.load_yaml(read_corpus("valid", name)[0])
            found.update(*document["services"].values())
        self.assertEqual(set(margo_agent.SERVICE_FORM) - found, set())


class Bench(FileCase):
    """tests/bench/compose.py, which reads any folder of files."""

    def test_each_file_is_counted_by_what_becomes_of_it(self):
        support.require("docker-compose")
        from tests.bench import compose
        for name, keys in {"good": {"environment": ["A=1"], "env_file": "absent.env"}, "keys": {"runtime": "x", "gpus": "all"}, "denied": {"privileged": True},
                           "lacks": {"volumes": ["./absent:/x"]}, "form": {"deploy": {"replicas": 2}}, "theirs": {"imagee": "x"}}.items():
            self.add_file(f"{name}/docker-compose.yml", json.dumps(make_document(keys)))
        self.add_file("built/compose.yaml", json.dumps({"services": {"main": {"build": "."}}}))
        kinds, keys, misread, lines = compose.measure(self.archive)
        default = {"accepted": 1, "refused for a key": 1, "refused by policy": 1, "refused for a file that is not there": 1, "refused for a form": 1}
        apart = {"readable": 3, "refused for a key": 1, "refused for a form": 1, "to be built first": 1}
        expected = {"valid": 6, "refused by docker-compose": 1, "  misread": 0}
        expected.update({f"  by default: {kind}": count for kind, count in dict(default, **{"refused for a key": 2}).items()},
                        **{f"  apart from policy: {kind}": count for kind, count in apart.items()})
        self.assertEqual(dict(kinds), expected)
        self.assertEqual((dict(keys), dict(misread), len(lines)), ({"runtime": 1, "gpus": 1, "build": 1}, {}, 2))

    def test_what_is_misread_is_told_with_both_values(self):
        support.require("docker-compose")
        from tests.bench import compose
        self.add_file("compose.yaml", json.dumps(make_document({"user": "1000"})))
        with mock.patch.dict(margo_agent.RENAMED, {"user": "hostname"}):
            _, _, misread, lines = compose.measure(self.archive)
        self.assertEqual(dict(misread), {"user": 1, "hostname": 1})
        self.assertIn("right is 1000", " ".join(lines))


class InvalidCorpus(FileCase):
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
                driver = margo_agent.ComposeDriver("podman", self.config, {"PATH": "/no-engine-is-asked"})
                with self.assertRaises(margo_agent.ComponentError) as caught:
                    driver.resolve(self.make_workload(), 60)
                self.assertIn(words, caught.exception.message)
                self.assertEqual(caught.exception.code, code, caught.exception.message)


# Keys of a service

class ServiceKeys(FileCase):
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
        ("dns", ["10.0.0.1", "10.0.0.2"], ["--dns=10.0.0.1", "--dns=10.0.0.2"]), 
        ("labels", {"b": "2", "a": None}, ["--label=a=", "--label=b=2"]),
        ("labels", ["a=b=c", "d"], ["--label=a=b=c", "--label=d="]),
        ("sysctls", {"net.core.somaxconn": 1024}, ["--sysctl=net.core.somaxconn=1024"]),
        ("sysctls", ["net.core.somaxconn=1024"], ["--sysctl=net.core.somaxconn=1024"]),
        ("extra_hosts", ["plc:10.0.0.5"], ["--add-host=plc:10.0.0.5"]),
        ("extra_hosts", {"plc": "10.0.0.5"}, ["--add-host=plc:10.0.0.5"]),
        ("extra_hosts", ["six:::1"], ["--add-host=six:::1"]),
        ("restart", "always", ["--restart=always"]), ("restart", "no", ["--restart=no"]),
        ("restart", False, ["--restart=no"]),
        ("restart", "on-failure:5", ["--restart=on-failure:5"]),
        ("restart", "unless-stopped", ["--restart=unless-stopped"]),
        ("ulimits", {"nproc": 5, "nofile": {"soft": 1, "hard": 2}}, ["--ulimit=nofile=1:2", "--ulimit=nproc=5"]),
        ("deploy", {"replicas": 1, "resources": {"limits": {"memory": "64M", "cpus": "0.5", "pids": 5}}},
         ["--cpus=0.5", "--memory=64M", "--pids-limit=5"]), ("deploy", {}, []),
        ("logging", {"driver": "journald"}, ["--log-driver=journald"]),
        ("logging", {"driver": "k8s-file", "options": {"max-size": "10m", "mode": "x"}},
         ["--log-driver=k8s-file", "--log-opt=max-size=10m", "--log-opt=mode=x"]),
        ("logging", {"driver": "journald", "options": {"tag": 1}}, ["--log-driver=journald", "--log-opt=tag=1"]),
        ("memswap_limit", "128m", ["--memory-swap=128m"]), ("mem_reservation", "8m", ["--memory-reservation=8m"]),
        ("mem_swappiness", 10, ["--memory-swappiness=10"]), ("cpu_period", 100000, ["--cpu-period=100000"]),
        ("cpu_quota", 50000, ["--cpu-quota=50000"]), ("cpu_shares", 512, ["--cpu-shares=512"]),
        ("cpuset", "0,1", ["--cpuset-cpus=0,1"]), ("blkio_config", {"weight": 300}, ["--blkio-weight=300"]),
        ("oom_score_adj", 500, ["--oom-score-adj=500"]), ("dns_opt", ["ndots:1"], ["--dns-option=ndots:1"]),
        ("dns_search", "plant.example", ["--dns-search=plant.example"]),
        ("mac_address", "02:42:ac:11:65:43", ["--mac-address=02:42:ac:11:65:43"]),
        ("deploy", {"mode": "replicated", "resources": {"reservations": {"memory": "8M", "cpus": "0.1"}},
                    "restart_policy": {"condition": "on-failure", "max_attempts": 3, "delay": "5s"}},
         ["--memory-reservation=8M", "--restart=on-failure:3"]),
        ("deploy", {"restart_policy": {"condition": "none"}}, ["--restart=no"]), ("deploy", {"restart_policy": {"window": "1s"}},
                                                                                 ["--restart=always"]),
        ("extra_hosts", ["six=[fd00::1]"], ["--add-host=six:fd00::1"]), ("init", "yes", ["--init"]), ("tty", "True", ["--tty"]),
        ("read_only", "on", ["--read-only"]), ("stdin_open", "No", []), ("cap_add", ["CHOWN", "cap_setuid"],
                                                                         ["--cap-add=CHOWN", "--cap-add=cap_setuid"]),
        ("logging", {"options": {"max-size": "10m"}}, ["--log-opt=max-size=10m"]),
        ("stop_grace_period", "1m30s", ["--stop-timeout=90"]), ("stop_grace_period", "500ms", ["--stop-timeout=1"])]
    ALLOWED = [
        ("privileged", True, ["--privileged"]), ("cap_add", ["NET_ADMIN"], ["--cap-add=NET_ADMIN"]),
        ("pid", "host", ["--pid=host"]),
        ("ipc", "host", ["--ipc=host"]), ("userns_mode", "host", ["--userns=host"]),
        ("devices", ["/dev/a:/dev/b:r"], ["--device=/dev/a:/dev/b:r"]),
        ("device_cgroup_rules", ["c 189:* rmw"], ["--device-cgroup-rule=c 189:* rmw"]),
        ("security_opt", ["seccomp=unconfined"], ["--security-opt=seccomp=unconfined"])]
    OTHERS = [                                      # keys with an option, or several, that are read with more than themselves
        ("tmpfs", ["/run:size=1m,mode=0755", "/tmp"], ["--tmpfs=/run:size=1m,mode=0755", "--tmpfs=/tmp"]),
        ("tmpfs", "/run", ["--tmpfs=/run"]), ("tmpfs", ["/run", "/run/"], ["--tmpfs=/run/"]),
        ("ports", ["80", 81, "8080:80/udp"], ["--publish=80", "--publish=81", "--publish=8080:80/udp"]),
        ("ports", [{"target": 80, "published": "8080", "host_ip": "127.0.0.1", "protocol": "udp"}],
         ["--publish=127.0.0.1:8080:80/udp"]), ("attach", False, []), ("expose", ["80"], []), ("scale", 1, [])]
    UNSUPPORTED = (
        "annotations cgroup cgroup_parent cpu_count cpu_percent cpu_rt_period cpu_rt_runtime credential_spec develop"
        " domainname extends external_links gpus isolation label_file models oom_kill_disable post_start"
        " pre_stop provider pull_refresh_after runtime storage_opt use_api_socket uts volumes_from").split()

    def test_every_key_becomes_its_option(self):
        for key, value, expected in self.OPTIONS + self.OTHERS:
            with self.subTest(key=key, value=value):
                self.assertEqual(self.settle_service({key: value}).arguments, expected)

    def test_what_the_operator_allows_becomes_an_option_too(self):
        self.config = make_config(policy__privileged="allow")
        for key, value, expected in self.ALLOWED:
            with self.subTest(key=key):
                self.assertEqual(self.settle_service({key: value}).arguments, expected)

    def test_no_key_with_an_option_is_left_out_here(self):
        self.assertEqual({key for key, _, _ in self.OPTIONS + self.ALLOWED}, {
            *margo_agent.SERVICE_OPTIONS, "blkio_config", "deploy", "logging", "ulimits"})

    def test_a_key_of_nothing_says_nothing(self):
        for key in sorted(margo_agent.SERVICE_OPTIONS):
            with self.subTest(key=key):
                self.assertEqual(self.settle_service({key: None}).arguments, [])

    def test_every_other_key_is_refused_and_named(self):
        """Contract, Compose keys: none is ever ignored."""
        for key in self.UNSUPPORTED + ["imagee", "Command", "x_note", ""]:
            with self.subTest(key=key):
                self.assertNotIn(key, margo_agent.SERVICE_FORM)
                self.assertRefused(make_document({key: "x"}), f"services.main.{key}", ": this key is not supported")

    def test_all_that_is_not_supported_is_told_at_once(self):
        """Contract, Compose keys: whoever moves a file here sees the whole list, each with the nearest known key or a way out."""
        document = {"services": {"a": {"imagee": "x", "build": ".", "gpus": "all"}, "b": {"image": IMAGE, "gpus": "all"}}, "include": ["x"]}
        words = ("these keys are not supported: services.a.imagee (did you mean image?), services.a.build (nothing is built on a"
                 " device; name what was built by `image`), services.a.gpus (name device files by `devices`), services.b.gpus,"
                 " include (put everything into compose.yaml)")
        self.assertRefused(document, words)
        self.assertRefused(make_document({"volumes": [{"type": "bind", "source": ".", "target": "/x", "bin": {}, "bind": {"selinus": "z"}}]}),
                           "services.main.volumes[0].bin (did you mean bind?), services.main.volumes[0].bind.selinus (did you mean selinux?)")

    def test_a_hundred_keys_that_are_not_supported_are_told_and_no_more(self):
        """A file may have hundreds of thousands, and to look for the nearest known one takes a device half a millisecond and more each."""
        with self.assertRaises(margo_agent.ComponentError) as caught:
            self.settle(make_document({f"ZZ{number}": 1 for number in range(300)}))
        self.assertTrue(caught.exception.message.endswith(", services.main.ZZ99"), caught.exception.message)

    def test_a_name_of_the_applications_own_is_no_key(self):
        for name in ("each", "build", "None", "x-y"):
            project = self.settle({"services": {name: {"image": IMAGE, "networks": {name: None}, "depends_on": {}}}, "networks": {name: {}}})
            self.assertEqual([service.name for service in project.services], [name])

    def test_what_an_image_was_built_from_is_noted(self):
        project = self.settle(make_document({"build": {"context": ".", "args": {"A": "${B:-}"}}}))
        self.assertEqual((project.notes, project.services[0].arguments), (["services.main.build is not used: the image is pulled"], []))

    def test_what_is_for_many_devices_is_noted(self):
        project = self.settle(make_document({"deploy": {"placement": {"constraints": ["a"]}, "update_config": {}}}))
        self.assertEqual(project.notes, [f"services.main.deploy.{key} is not used: there is one device" for key in ("placement", "update_config")])

    def test_every_other_key_of_the_file_is_refused_and_named(self):
        for key in ("include", "models", "service"):
            with self.subTest(key=key):
                self.assertRefused(make_document({}, **{key: {}}), key, "this key is not supported")

    def test_every_other_key_inside_a_key_is_refused_and_named(self):
        cases = [
            ({"deploy": {"placements": {}}}, {}, "services.main.deploy.placements"),
            ({"deploy": {"resources": {"reservations": {"devices": []}}}}, {}, "services.main.deploy.resources.reservations.devices"),
            ({"deploy": {"resources": {"limits": {"devices": []}}}}, {},
             "services.main.deploy.resources.limits.devices"),
            ({"logging": {"level": "x"}}, {}, "services.main.logging.level"),
            ({"healthcheck": {"tests": "x"}}, {}, "services.main.healthcheck.tests"),
            ({"ulimits": {"nofile": {"soft": 1, "hard": 2, "more": 3}}}, {}, "services.main.ulimits.nofile.more"),
            ({"ports": [{"target": 80, "to": 1}]}, {}, "services.main.ports[0].to"),
            ({"volumes": [{"type": "tmpfs", "target": "/t", "consistencies": "x"}]}, {},
             "services.main.volumes[0].consistencies"),
            ({"volumes": [{"type": "tmpfs", "target": "/t", "tmpfs": {"sizes": 1}}]}, {},
             "services.main.volumes[0].tmpfs.sizes"),
            ({"depends_on": {"main": {"when": "x"}}}, {}, "services.main.depends_on.main.when"),
            ({"networks": {"default": {"link_local_ips": "x"}}}, {}, "services.main.networks.default.link_local_ips"),
            ({"env_file": [{"path": "a", "format": "raw"}]}, {}, "services.main.env_file[0].format"),
            ({"configs": [{"source": "a", "path": "x"}]}, {"configs": {"a": {"content": ""}}},
             "services.main.configs[0].path"),
            ({}, {"configs": {"a": {"external": True}}}, "configs.a.external"),
            ({}, {"networks": {"a": {"ipam": {"options": {}}}}}, "networks.a.ipam.options"),
            ({}, {"networks": {"a": {"ipam": {"config": [{"aux_addresses": {}}]}}}},
             "networks.a.ipam.config[0].aux_addresses")]
        for keys, members, place in cases:
            with self.subTest(place=place):
                self.assertRefused(make_document(keys, **members), place, ": this key is not supported")

    def test_a_value_of_the_wrong_form_is_refused_and_named(self):
        """What an archive holds fails its own component, and is never a bug of the agent (exit code 70)."""
        cases = [
            ({"volumes": 5}, {}, "services.main.volumes"), ({"volumes": ["/a", []]}, {}, "services.main.volumes[1]"),
            ({"volumes": [{"type": "bind", "target": "/x"}]}, {}, "services.main.volumes[0]"),
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
            ({"healthcheck": {"test": ["CMD-SHELL", "a", "b"]}}, {}, "services.main.healthcheck"),
            ({"healthcheck": {"test": ["NONE", "a"]}}, {}, "services.main.healthcheck"),
            ({"healthcheck": {"test": ""}}, {}, "services.main.healthcheck"), ({"healthcheck": {"test": ["CMD-SHELL", ""]}}, {}, "services.main.healthcheck"),
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
            ({}, {"volumes": {"a": {"external": {"name": []}}}}, "volumes.a"), ({}, {"networks": 5}, "networks"),
            ({"mem_limit": "much"}, {}, "services.main.mem_limit"), ({"cpus": "nan"}, {}, "services.main.cpus"),
            ({"deploy": {"mode": "global"}}, {}, "services.main.deploy.mode"), ({"scale": 2}, {}, "services.main.scale"),
            ({"deploy": {"restart_policy": {"condition": "x"}}}, {}, "services.main.deploy.restart_policy.condition"),
            ({"blkio_config": {"weight_device": []}}, {}, "services.main.blkio_config.weight_device"),
            ({"secrets": ["a"]}, {"secrets": {"a": {}}}, "secrets.a"), ({"links": {}}, {}, "services.main.links"),
            ({"configs": ["a"]}, {"configs": {"a": {"content": "", "file": "x"}}}, "configs.a"),
            ({"configs": [{"source": "a", "mode": "rw"}]}, {"configs": {"a": {"content": ""}}}, "services.main.configs[0].mode"),
            ({"container_name": "a b"}, {}, "services.main"),
            ({"container_name": "caf\u00e9"}, {}, "services.main.container_name"), ({}, {"networks": {"a": {"ipam": {"driver": "dhcp"}}}}, "networks.a.ipam.driver"),
            ({}, {"networks": {"a": {"driver_opts": {"parent": "eth0"}}}}, "networks.a.driver_opts"),
            ({}, {"networks": ["a"]}, "networks"), ({}, {"networks": {"a": 5}}, "networks.a"),
            ({}, {"networks": {"a": {"ipam": 5}}}, "networks.a.ipam"),
            ({}, {"networks": {"a": {"ipam": {"config": 5}}}}, "networks.a.ipam"),
            ({}, {"networks": {"a": {"ipam": {"config": [5]}}}}, "networks.a.ipam"),
            ({}, {"services": {"main": 5}}, "services.main"), ({}, {"services": 5}, "no services")]
        for keys, members, place in cases:
            with self.subTest(keys=keys, members=members):
                self.assertRefused(make_document(keys, **members), place)

    def test_a_name_that_is_no_text_is_a_name_all_the_same_or_refused(self):
        for document in ("services: {1: {image: a}, b: {image: a, depends_on: [1]}}",
                         "services: {a: {image: a}}\nnetworks: {1: }",
                         "services: {a: {image: a, networks: {1: }}}\nnetworks: {1: }",
                         "services: {a: {image: a, labels: {1: x, b: y}}}",
                         "services: {a: {image: a, sysctls: {1: x, b: y}}}",
                         "services: {a: {image: a}}\nvolumes: {1: , b: }",
                         "services: {a: {image: a}}\n1: 2\n", "services: {a: {image: a, 1: 2}}"):
            with self.subTest(document=document):
                try:
                    project = self.settle(document)
                    self.assertIn("a" if "{a:" in document else "b", [service.name for service in project.services])
                except margo_agent.ComponentError as error:
                    self.assertIn("1", error.message)

    def test_a_number_that_is_none_is_a_wrong_value(self):
        """`.nan` was once an error of the agent, with exit code 70."""
        for key in sorted(margo_agent.SERVICE_FORM):
            for text in (".nan", "-.inf", "[.nan]", "{.nan: .nan}"):
                with self.subTest(key=key, text=text):
                    try:
                        self.settle("services: {main: {%s%s: %s}}" % ("" if key == "image" else f"image: {IMAGE}, ", key, text))
                    except margo_agent.ComponentError as error:
                        self.assertTrue(error.message.startswith("compose.yaml: services.main"), error.message)

    def test_random_files_are_settled_or_refused(self):
        """Whatever stands in a file: a Project or a ComponentError, and never a bug of the agent."""
        support.require("hypothesis")
        from hypothesis import HealthCheck, given, settings, strategies
        failures = {}

        @settings(max_examples=150, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(make_documents(strategies), strategies.sampled_from(["podman", "docker"]))
        def check(document, engine):
            try:
                project = margo_agent.make_project(document, self.make_workload({"P": "1"}), self.config.policy, engine)
                self.assertIsInstance(project, margo_agent.Project)
            except margo_agent.ComponentError as error:
                self.assertTrue(error.message.startswith("compose.yaml: "), error.message)
            except Exception as error:              # gathered, so that one run shows every kind
                failures.setdefault(f"{type(error).__name__}: {error}"[:80], document)
        check()
        self.assertEqual(failures, {})


def make_documents(strategies):
    """A strategy of compose files: mostly of the right form with wrong values here and there, sometimes of no form at all."""
    texts = ("", "CMD", "a:/b", "./x:/y", "/a:/b:ro", "${A:-b}", "$P", "${P:?}", "${", "5s", "1m", "x=1", "service:main", "service:s", "container:c", "~/a:/b",
             "bind", "volume", "tmpfs", "host", "none", "80", "8080:80", "1-3:80", "[::1]:1:2/udp", "data", "front", "10.0.0.1", "fd00::/64", "true", "0644",
             "on-failure:3", "json-file", "service_healthy", "64m", "NONE", "/t:size=1m", "h:host-gateway", "a\0b", "x" * 300)
    scalars = strategies.one_of(strategies.none(), strategies.booleans(), strategies.integers(-5, 70000), strategies.floats(),
                                strategies.sampled_from(texts), strategies.text(max_size=6))
    keys = strategies.sampled_from(["main", "s", "data", "front", "x-y", "labels", 1, None, True]) | strategies.text(max_size=3)
    anything = strategies.recursive(scalars, lambda inner: strategies.one_of(
        strategies.lists(inner, max_size=3), strategies.dictionaries(keys, inner, max_size=3)), max_leaves=6)

    def make_values(form):
        """Values for a form of margo_agent."""
        if isinstance(form, tuple):
            return strategies.one_of(make_values(form[0]), scalars)
        if isinstance(form, list):
            return strategies.lists(make_values(form[0]), max_size=3) | scalars
        if not isinstance(form, dict):
            return scalars | strategies.lists(scalars, max_size=2) | anything
        if None in form or list in form:
            return strategies.dictionaries(keys, make_values(form.get(None) or form[list]), max_size=3) | strategies.lists(scalars, max_size=2)
        members = {key: strategies.deferred(lambda part=part: make_values(part)) for key, part in form.items()}
        return strategies.lists(strategies.sampled_from(sorted(members)), max_size=4, unique=True).flatmap(
            lambda chosen: strategies.fixed_dictionaries({key: members[key] for key in chosen})) | anything
    service = make_values(margo_agent.SERVICE_FORM).map(lambda item: dict({"image": IMAGE}, **item) if isinstance(item, dict) and all(
        isinstance(key, str) for key in item) else item)
    parts = {key: make_values(form) for key, form in margo_agent.FILE_FORM.items() if key != "services"}
    return strategies.fixed_dictionaries({"services": strategies.dictionaries(keys, service, min_size=1, max_size=3)}, optional=parts) | anything


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
        for value, expected in ((True, True), (False, False), ("true", True), ("false", False), ("yes", True), ("No", False),
                                ("ON", True), ("off", False), ("y", True), ("n", False), ("True", True)):
            self.assertIs(margo_agent.to_flag(value, "here"), expected)
        for value in ("maybe", 1, 0, None, "", "truee", [], "ye\u017f", "fal\u017fe"):
            self.assertFault(lambda: margo_agent.to_flag(value, "services.main.init"), "services.main.init: ")

    def test_one_text_is_a_list_too(self):
        self.assertEqual(margo_agent.to_list("a", "here"), ["a"])
        self.assertEqual(margo_agent.to_list(["a", 1, True], "here"), ["a", "1", "true"])
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
                                ("a # b", ["a", "#", "b"]), ("a ''", ["a", ""]), (" a\n b ", ["a", "b"]), ("a'b'\"c\"d", ["abcd"]),
                                ("a\u00a0b\u2028c\x0bd e", ["a\u00a0b\u2028c\x0bd", "e"]),
                                (r"""sh -c "echo \$HOME \`id\` \"q\" \\ \d" """, ["sh", "-c", r"""echo $HOME `id` "q" \ \d"""]),
                                ('"a\\\nb" c\\\nd', ["ab", "cd"]), ('"&& \\ x"', ["&&  x"])):
            with self.subTest(value=value):
                self.assertEqual(margo_agent.to_words(value, "here"), expected)
        self.assertFault(lambda: margo_agent.to_words("a 'b", "services.main.command"),
                         "services.main.command: a quotation or a \\ that is not closed")
        self.assertFault(lambda: margo_agent.to_words("a \\", "services.main.command"), "not closed")

    def test_durations_are_seconds(self):
        for text, expected in (("30s", 30), ("1m30s", 90), ("1h", 3600), ("500ms", 0.5), ("1.5s", 1.5),
                               ("1h0m10s", 3610), ("250us", 0.00025)):
            self.assertAlmostEqual(margo_agent.parse_period(margo_agent.to_period(text, "here")), expected)
        for text in ("", "30", "s", "1 s", "1s ", "-1s", "1x", "1m30", 5, None):
            self.assertFault(lambda: margo_agent.to_period(text, "services.main.healthcheck"),
                             "services.main.healthcheck")

    def make_ports(self, *items):
        place = "services.main.ports"
        return margo_agent.read_value(list(items), margo_agent.SERVICE_FORM["ports"], place)

    def make_health(self, value, engine="podman"):
        return margo_agent.make_health(margo_agent.read_value(value, margo_agent.SERVICE_FORM["healthcheck"], "here", margo_agent.Variables()), engine)

    def test_ports_in_both_syntaxes(self):
        for value, expected in (
                (80, "80"), ("8080:80", "8080:80"), ("1.2.3.4:8080:80/udp", "1.2.3.4:8080:80/udp"), ("127.0.0.1::80", "127.0.0.1::80"),
                ("[::1]:80:80", "[::1]:80:80"), ("::1:80:80", "[::1]:80:80"), (":8080:80", "8080:80"), ("0:80", "80"),
                ("80-82:80-82", "80-82:80-82"), ("80:80/SCTP", "80:80/sctp"), ("80:80/TCP", "80:80"), ({"target": 80}, "80"),
                ({"target": 80, "published": 90}, "90:80"), ({"target": 80, "published": "90", "host_ip": "::1"}, "[::1]:90:80"),
                ({"target": 80, "host_ip": "127.0.0.1"}, "127.0.0.1::80"), ({"target": 80, "mode": "host", "name": "x"}, "80")):
            with self.subTest(value=value):
                self.assertEqual([port.argument for port in self.make_ports(value)], [expected])
        for value in ("http", "80:", ":", "80:80:80", "80:80/icmp", "80:80/\u017fctp", "80 :80", "-80:80", {"published": 80}, "65536:80", "80:65536",
                      "80-81:80-82", "80\n:80", "localhost:80:80", "", None, "9" * 5000, "80:0", "[::1:80:80"):
            with self.subTest(value=value):
                self.assertFault(lambda: self.make_ports("1:1", value), "services.main.ports[1]")

    def test_a_restart_policy_is_the_engines_own_word(self):
        for value in ("sometimes", "on-failure:", "on-failure:x", "always:3", " ", "no\n", True):
            self.assertFault(lambda: margo_agent.to_restart(value, "services.main.restart"),
                             "services.main.restart: ", "is not a restart policy")

    def test_health_checks(self):
        cases = [
            ({"test": "a || b"}, ["--health-cmd=a || b"]),
            ({"test": ["CMD-SHELL", "a | b"]}, ["--health-cmd=a | b"]),
            ({"test": ["CMD", "a", "b c"]}, ['--health-cmd=["a","b c"]']),
            ({"test": ["NONE"]}, ["--no-healthcheck"]),
            ({"disable": True, "test": "x"}, ["--no-healthcheck"]),
            ({"disable": "true"}, ["--no-healthcheck"]),
            ({"test": "a", "interval": "1m", "timeout": "5s", "retries": 7, "start_period": "500ms"},
             ["--health-cmd=a", "--health-interval=1m", "--health-timeout=5s", "--health-retries=7",
              "--health-start-period=500ms"]),
            ({"interval": "10s"}, ["--health-interval=10s"]), ({}, [])]
        for value, arguments in cases:
            with self.subTest(value=value):
                self.assertEqual(self.make_health(value), arguments)

    def test_docker_takes_the_words_of_a_health_check_quoted(self):
        arguments = self.make_health({"test": ["CMD", "a", "b c", "$$d"]}, "docker")
        self.assertEqual(arguments, ["--health-cmd=a 'b c' '$d'"])

    def test_one_word_needs_no_shell(self):
        """K5: there may be none in the image; podman takes a word behind CMD, unless a blank is in it."""
        for word, expected in (("/true", "CMD /true"), ("/opt/a b", "'/opt/a b'")):
            arguments = self.make_health({"test": ["CMD", word]})
            self.assertEqual(arguments, [f"--health-cmd={expected}"])

    def test_a_text_that_podman_would_take_for_its_own_words_stays_one(self):
        """It takes a JSON list for words, and CMD and NONE at the beginning for a list's first word, in any case."""
        for text in ('["a", "b"]', "cmd --status", "NONE of it", "CMD x", "[ -f /x ]"):
            self.assertEqual(self.make_health({"test": text}), [f"--health-cmd=CMD-SHELL {text}"])
            self.assertEqual(self.make_health({"test": text}, "docker"), [f"--health-cmd={text}"])

    def test_the_mode_of_a_file_is_octal_as_it_is_usually_written(self):
        for text, expected in (("0440", 0o440), ("'440'", 0o440), ("0o555", 0o555), ("292", 0o444), ("'0o17'", 0o17)):
            self.assertEqual(margo_agent.to_mode(margo_agent.load_yaml(text), "here"), expected)
        for text in ("rw", "0999", "'9'", "77777", "-1"):
            self.assertFault(lambda: margo_agent.to_mode(margo_agent.load_yaml(text), "here"), "here")


class Ports(FileCase):
    """What a service holds of the host, as data: who goes first when a port changes hands is decided from it (F-28)."""

    CASES = [("80", []), ("8080:80", [["", 8080, "tcp"]]), ("127.0.0.1:8080:80/udp", [["127.0.0.1", 8080, "udp"]]),
             ("0.0.0.0:8080:80", [["0.0.0.0", 8080, "tcp"]]), ("[0::0]:8080:80", [["::", 8080, "tcp"]]),
             ("[0:0::1]:53:53/udp", [["::1", 53, "udp"]]), ("127.0.0.1::80", []),
             ("8080-8081:80-81", [["", 8080, "tcp"], ["", 8081, "tcp"]]), ("8080-8090:80", [["", 8080, "tcp"]]),
             ({"target": 80, "published": 8080, "host_ip": "10.0.0.1", "protocol": "sctp"}, [["10.0.0.1", 8080, "sctp"]]),
             ({"target": 80}, [])]

    def test_the_ports_of_a_service_are_known_from_its_file(self):
        for item, expected in self.CASES:
            with self.subTest(item=item):
                self.assertEqual(self.settle_service({"ports": [item]}).ports, expected)


    def test_podman_takes_the_first_of_a_range_for_one_port(self):
        """Docker chooses one that is free; podman refuses ranges of different lengths."""
        document = make_document({"ports": ["127.0.0.1:8100-8110:84/udp"]})
        for engine, argument, held in (("podman", "127.0.0.1:8100:84/udp", [["127.0.0.1", 8100, "udp"]]),
                                       ("docker", "127.0.0.1:8100-8110:84/udp", [])):
            service = self.settle(document, engine=engine).services[0]
            self.assertEqual((service.arguments, service.ports), ([f"--publish={argument}"], held))

    def test_a_port_that_is_listed_twice_is_one(self):
        """The engine is asked for a port once: the second time it is in use."""
        service = self.settle_service({"ports": ["80:80", "80:80/tcp", {"target": 80, "published": 80}, "81:80", "0.0.0.0:80:80"]})
        self.assertEqual(service.arguments, ["--publish=0.0.0.0:80:80", "--publish=81:80"])
        for ports in (["0.0.0.0:80:80", "[::]:80:80"], ["10.0.0.0:80:80", "80:81"], ["10.0.0.0:80:80", "1.10.0.0:80:80"]):
            service = self.settle_service({"ports": ports})
            self.assertEqual(service.arguments, [f"--publish={port}" for port in ports])


class InsideTheArchive(FileCase):
    def test_files_are_read_below_the_archive_alone(self):
        self.add_file("conf/a.txt", "inside")
        support.write(os.path.join(self.folder, "outside.txt"), "outside")
        os.symlink("../outside.txt", os.path.join(self.archive, "leaves"))
        os.symlink("conf/a.txt", os.path.join(self.archive, "stays"))
        folder = margo_agent.Folder(self.archive)
        for name in ("conf/a.txt", "./conf/../conf/a.txt", "stays"):
            self.assertEqual(folder.read(name), b"inside")
        for name in ("../outside.txt", "/etc/passwd", "leaves", "conf", "absent", "conf/a.txt/x", "",
                     os.path.join(self.folder, "outside.txt")):
            with self.subTest(name=name):
                self.assertIsNone(folder.read(name))
                with self.assertRaises(margo_agent.ComponentError) as caught:
                    margo_agent.read_inside(folder, name, "configs.app.file")
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
            self.assertEqual(files["/cert"].text.encode("utf-8", "surrogateescape"), b"\x30\x82\xff\xfe\x00")

    def test_a_compose_file_that_is_no_utf8_is_refused(self):
        """Contract, As a module: bytes that are no text are refused, never read as something else."""
        self.add_file("compose.yaml", b"services: {main: {image: localhost/x:1, command: [\"\xff\"]}}\n")
        with self.assertRaises(margo_agent.ComponentError) as caught:
            margo_agent.ComposeDriver("podman", self.config, {"PATH": "/no-engine-is-asked"}).resolve(self.make_workload(), 60)
        self.assertIn("compose.yaml: ", caught.exception.message)
        self.assertIn("UTF-8", caught.exception.message)


# The environment of a container

class Environment(FileCase):
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

    def test_a_number_keeps_its_spelling(self):
        """C-183: 1.10 is a version, not a number."""
        text = ("services: {main: {image: a, environment: {A: 1.10, B: 0440, C: 1e3, D: 0x1F, E: true, F: 1.0},"
                " labels: {v: 1.10}, command: [1.10]}}")
        service = self.settle(text).services[0]
        self.assertEqual(service.environment, {"A": "1.10", "B": "0440", "C": "1e3", "D": "0x1F", "E": "true",
                                               "F": "1.0"})
        self.assertEqual((service.arguments, service.command), (["--label=v=1.10"], ["1.10"]))

    def test_an_optional_file_may_be_missing_and_not_outside(self):
        service = self.settle_service({"env_file": [{"path": "absent.env", "required": False}]})
        self.assertEqual(service.environment, {})
        self.assertRefused(make_document({"env_file": [{"path": "/etc/passwd", "required": False}]}),
                           "services.main.env_file: '/etc/passwd'")

    def test_names_and_values_that_no_environment_can_hold_are_refused(self):
        for name in ("A B", "", "A\n", "-A", "A$", "A="):
            with self.subTest(name=name):
                self.assertRefused(make_document({"environment": {name: "x"}}), "services.main.environment: ",
                                   "is not a variable name")
        self.assertRefused(make_document({"environment": {"A": "a\0b"}}), "services.main.environment.A: holds a NUL")
        self.assertEqual(self.settle_service({"environment": {"1A": "x", "a.b-c": "y"}}).environment, {"1A": "x", "a.b-c": "y"})
        self.assertRefused(make_document({"environment": ["A"]}), "services.main.environment.A: holds a NUL",
                           parameters={"A": "\0"})


class LongValues(FileCase):
    """K15, F-34: values that no line of an env file holds."""

    def test_a_value_of_several_lines_or_of_many_characters_is_handed_over(self):
        for text in ("one\ntwo\n", "a\rb", "x" * 70000, "\u00e9" * 40000):
            service = self.settle_service({"environment": ["TEXT", "PLAIN=1"]}, {"TEXT": text})
            self.assertEqual(service.environment["TEXT"], text)
            self.assertEqual(margo_agent.find_handed(service.environment), {"TEXT": text})
        self.assertEqual(margo_agent.find_handed({"A": "", "B": "x" * 50000}), {})

    def test_a_value_that_no_process_can_be_given_fails_before_anything_is_made(self):
        self.assertRefused(make_document({"environment": ["TEXT"]}), "services.main.environment.TEXT: a variable has less than 128 KiB",
                           parameters={"TEXT": "x" * 131072}, code="PARAMETER_INVALID")
        self.settle(make_document({"environment": ["TEXT"]}), parameters={"TEXT": "x" * 131066})

    def test_what_the_engines_own_command_obeys_is_not_handed_over(self):
        """D-18: a value in the environment of that command must not change how it, or what it starts, is run."""
        for name in ("PATH", "LD_PRELOAD", "LD_LIBRARY_PATH", "ld_audit", "HOME", "TMPDIR", "XDG_RUNTIME_DIR", "CONTAINERS_CONF",
                     "CONTAINER_HOST", "DOCKER_HOST", "DOCKER_CONFIG", "STORAGE_DRIVER", "REGISTRY_AUTH_FILE", "GODEBUG", "GLIBC_TUNABLES",
                     "SSL_CERT_FILE", "HTTPS_PROXY", "no_proxy", "_CONTAINERS_ROOTLESS_UID", "NOTIFY_SOCKET", "LISTEN_FDS", "BASH_ENV",
                     "GCONV_PATH", "LOCPATH", "NETAVARK_FW", "DBUS_SESSION_BUS_ADDRESS", "OPENSSL_CONF", "SSH_AUTH_SOCK", "LC_ALL"):
            with self.subTest(name=name):
                self.assertRefused({"services": {"main": {"image": IMAGE, "environment": {name: "a\nb"}}}},
                                   f"services.main.environment.{name}: ", "use a file from `configs`", code="PARAMETER_INVALID")
                self.assertEqual(self.settle_service({"environment": {name: "a"}}).environment, {name: "a"})
        for name in ("TLS_CERT", "SSH_PRIVATE_KEY", "SSL_CERTIFICATE", "GOOGLE_APPLICATION_CREDENTIALS_JSON", "JSON", "PATHS", "DB_HOME"):
            self.settle(make_document({"environment": {name: "a\nb"}}))


# Order, networks, volumes, mounts, configs

class Order(FileCase):
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

    def test_who_shares_a_network_starts_after_its_owner(self):
        """Docker Compose takes network_mode: service:x for a dependency: what is joined must be there."""
        project = self.settle({"services": {"beside": {"image": IMAGE, "network_mode": "service:main"},
                                            "main": {"image": IMAGE}}})
        self.assertEqual([service.name for service in project.services], ["main", "beside"])

    def test_who_depends_with_restart_is_made_anew_with_what_it_depends_on(self):
        def hashes(tag, restart):
            services = {"main": {"image": f"localhost/a:{tag}"}, "beside": {"image": IMAGE, "depends_on": {
                "main": {"condition": "service_started", "restart": restart}, "absent": {"required": False, "restart": True}}}}
            return {service.name: service.hash for service in self.settle({"services": services}).services}
        self.assertNotEqual(hashes(1, True)["beside"], hashes(2, True)["beside"])
        self.assertEqual(hashes(1, False)["beside"], hashes(2, False)["beside"])

    def test_who_shares_a_network_is_made_anew_with_its_owner(self):
        """A container that joined one that is gone has no network any more."""
        def hashes(tag):
            project = self.settle({"services": {"main": {"image": f"localhost/a:{tag}"},
                                                "beside": {"image": IMAGE, "network_mode": "service:main"}}})
            return {service.name: service.hash for service in project.services}
        self.assertNotEqual(hashes(1)["beside"], hashes(2)["beside"])
        self.assertEqual(hashes(1), hashes(1))


class Shared(FileCase):
    def make_shared(self, make, document):
        return make(margo_agent.read_value(document, margo_agent.FILE_FORM, ""), self.make_workload())

    def test_volumes_and_how_they_are_made(self):
        document = {"volumes": {"plain": None, "labelled": {"labels": {"a": "b"}}, "named": {"name": "own"},
                                "foreign": {"external": True},
                                "both": {"external": "true", "name": "theirs"}, "older": {"external": {"name": "plant"}},
                                "memory": {"driver_opts": {"type": "tmpfs", "device": "tmpfs", "o": "size=8m,noexec"}},
                                "empty": {"driver": "local", "driver_opts": {}}}}
        self.assertEqual(self.make_shared(margo_agent.make_volumes, document), {
            "plain": (f"{PROJECT}_plain", MARKS), "labelled": (f"{PROJECT}_labelled", ["--label=a=b"] + MARKS),
            "named": ("own", MARKS), "foreign": ("foreign", None),
            "both": ("theirs", None), "older": ("plant", None), "empty": (f"{PROJECT}_empty", MARKS),
            "memory": (f"{PROJECT}_memory", MARKS + ["--opt=device=tmpfs", "--opt=o=size=8m,noexec", "--opt=type=tmpfs"])})
        project = self.settle(make_document({"volumes": ["plain:/p", "named:/n", "foreign:/f"]}, **document))
        self.assertEqual({name: arguments is None for name, arguments in project.volumes.items()},
                         {"own": False, f"{PROJECT}_plain": False, "foreign": True})

    def test_what_no_service_uses_is_not_made(self):
        """As in Docker Compose: an address range of the engine, or a name of somebody else's, is taken for nothing."""
        members = {"networks": {"default": None, "front": None, "back": {"name": "plant"}}, "volumes": {"data": None, "more": None}}
        for keys, networks, volumes in (
                ({"network_mode": "none"}, [], []), ({}, ["default"], []), ({"networks": ["front"], "volumes": ["data:/d"]}, ["front"], ["data"])):
            project = self.settle(make_document(keys, **members))
            self.assertEqual(list(project.networks), [f"{PROJECT}_{name}" for name in networks])
            self.assertEqual(list(project.volumes), [f"{PROJECT}_{name}" for name in volumes])

    def test_networks_and_how_they_are_made(self):
        document = {"networks": {"plain": None, "inner": {"internal": True, "labels": ["a=b"]},
                                 "foreign": {"external": True, "name": "plant"}, "older": {"external": {"name": "site"}},
                                 "six": {"enable_ipv6": True, "attachable": True, "ipam": {
                                     "driver": "default", "config": [{"subnet": "fd00::/64", "ip_range": "fd00::/80"}]}},
                                 "fixed": {"driver": "bridge",
                                           "ipam": {"config": [{"subnet": "10.1.0.0/24", "gateway": "10.1.0.1"}]}}}}
        networks = self.make_shared(margo_agent.make_networks, document)
        digests = {name: arguments.pop() for name, (_, arguments) in networks.items() if arguments}
        self.assertEqual(digests["plain"], digests["default"])
        self.assertEqual(len(set(digests.values())), 4)
        self.assertEqual(networks, {
            "default": (f"{PROJECT}_default", MARKS), "plain": (f"{PROJECT}_plain", MARKS),
            "inner": (f"{PROJECT}_inner", ["--label=a=b"] + MARKS + ["--internal"]), "foreign": ("plant", None),
            "older": ("site", None), "six": (f"{PROJECT}_six", MARKS + ["--ipv6", "--subnet=fd00::/64", "--ip-range=fd00::/80"]),
            "fixed": (f"{PROJECT}_fixed", MARKS + ["--subnet=10.1.0.0/24", "--gateway=10.1.0.1"])})

    def test_what_podman_would_split_at_commas_stays_one_value(self):
        """1: a second device, a file of the host for the log, or the groups of the agent would come behind a comma."""
        self.config = make_config(policy__devices=["/dev/ttyUSB0"])
        for keys, option, value in (
                ({"devices": ["/dev/ttyUSB0:/dev/x,/dev/sda"]}, "--device", "/dev/ttyUSB0:/dev/x,/dev/sda"),
                ({"group_add": ['"keep-groups"']}, "--group-add", '"keep-groups"'),
                ({"logging": {"options": {"max-size": "1m,path=/etc/cron.d/x"}}}, "--log-opt", "max-size=1m,path=/etc/cron.d/x"),
                ({"logging": {"options": {"labels": "a,b"}}}, "--log-opt", "labels=a,b"),
                ({"sysctls": {"net.a": "1\n2,x=3"}}, "--sysctl", "net.a=1\n2,x=3"),
                ({"extra_hosts": {"a": "10.0.0.1,b:10.0.0.2"}}, "--add-host", "a:10.0.0.1,b:10.0.0.2")):
            with self.subTest(keys=keys):
                self.assertIn(f"{option}={value}", self.settle(make_document(keys), engine="docker").services[0].arguments)
                found = [argument[len(option) + 1:] for argument in self.settle_service(keys).arguments
                         if argument.startswith(option + "=")]
                self.assertEqual([list(csv.reader(io.StringIO(text, newline=""))) for text in found], [[[value]]])

    def test_names_that_an_engine_would_take_for_something_else_are_refused(self):
        for name in ("../x", "a b", "-x", "a/b", "x" * 300, "ns:/proc/1/ns/net"):
            for section in ("volumes", "networks"):
                with self.subTest(name=name, section=section):
                    self.assertRefused(make_document({}, **{section: {"a": {"name": name}}}), f"{section}.a: ", "is not a name here")

    def test_a_network_is_never_a_mode_of_the_engine(self):
        """The host's network would come by the name of a network, past policy.host_network."""
        for mode in ("host", "none", "bridge", "private", "default", "slirp4netns", "pasta", "pod", "ns"):
            for value in ({"name": mode}, {"external": True, "name": mode}, {"external": {"name": mode}}):
                self.assertRefused(make_document({"networks": ["a"]}, networks={"a": value}), "networks.a: ", "`network_mode`")
        self.settle(make_document({"networks": ["host"]}, networks={"host": {}}))

    def test_what_the_agent_made_for_another_deployment_is_not_reached_by_its_name(self):
        """Data, and a network by which it would answer, are that application's; components of one deployment may share."""
        theirs, own = f"db-{support.HELLO[:-1]}1_data", f"db-{support.HELLO}_data"
        for kind in ("volumes", "networks"):
            for value, name in (({"name": theirs}, "a"), ({"external": True, "name": theirs}, "a"), ({"external": True}, theirs)):
                self.assertRefused(make_document({}, **{kind: {name: value}}), f"{kind}.{name}", "of another deployment",
                                   code="POLICY_DENIED")
            for value in ({"external": True, "name": own}, {"name": "shared"}, {"name": "of-" + support.HELLO[:-1] + "1"}):
                self.settle(make_document({}, **{kind: {"a": value}}))

    def test_the_networks_of_a_service(self):
        networks = {"front": None, "back": None}
        for value, expected in (
                (None, [(f"{PROJECT}_default", [], [])]), (["front"], [(f"{PROJECT}_front", [], [])]),
                (["back", "front"], [(f"{PROJECT}_back", [], []), (f"{PROJECT}_front", [], [])]),
                ({"front": {"aliases": ["a", "b"], "ipv4_address": "10.1.0.5", "ipv6_address": "fd00::5"},
                  "back": None},
                 [(f"{PROJECT}_front", ["a", "b"], ["--ip=10.1.0.5", "--ip6=fd00::5"]), (f"{PROJECT}_back", [], [])]),
                ({"front": {"priority": 1}, "back": {"priority": 10, "mac_address": "02:42:ac:11:65:43"}},
                 [(f"{PROJECT}_back", [], ["--mac-address=02:42:ac:11:65:43"]), (f"{PROJECT}_front", [], [])])):
            with self.subTest(value=value):
                self.assertEqual(self.settle_service({"networks": value}, networks=networks).networks, expected)

    def test_an_address_that_a_network_cannot_give_is_found_before(self):
        """An engine says so at the start, when the old container has stopped already."""
        networks = {"n": {"ipam": {"config": [{"subnet": "10.1.0.0/24"}, {"subnet": "fd00::/64"}]}}, "other": {"external": True}, "own": None,
                    "gated": {"ipam": {"config": [{"subnet": "10.1.0.0/24", "gateway": "10.1.0.9"}, {"subnet": "fd00::/64"}]}},
                    "ranged": {"ipam": {"config": [{"subnet": "10.1.0.0/24", "ip_range": "10.1.0.128/25"}]}}}

        def settle(network, engine="podman", **addresses):
            project = self.settle(make_document({"networks": {network: addresses}}, networks=networks), engine=engine)
            margo_agent.check_addresses(project.services, project, engine)
        settle("n", ipv4_address="10.1.0.7", ipv6_address="fd00::7")
        settle("other", "docker", ipv4_address="10.9.9.9")
        settle("own", ipv4_address="10.9.9.9")
        settle("gated", ipv4_address="10.1.0.1")
        for text, address, expected in (("--subnet=255.255.255.255/32", "255.255.255.255", False), ("--subnet=0.0.0.0/0\n--gateway=x", "1.1.1.1", False),
                                        ("--subnet=10.1.0.0/24\n--label=gateway=x", "10.1.0.7", True)):
            self.assertIs(margo_agent.may_have_address(text, address), expected, text)
        facts = {"labels": {"subnet": "x", "gateway": "y"}, "ipam": {"Config": [{"Subnet": "10.1.0.0/24", "Gateway": "10.1.0.9"}]}}
        self.assertEqual([margo_agent.may_have_address(margo_agent.make_ranges(facts), address) for address in ("10.1.0.9", "10.1.0.1")], [False, True])
        settle("ranged", "docker", ipv4_address="10.1.0.1")     # its gateway is the first of the range
        for network, engine, address in (("n", "podman", "10.1.1.7"), ("n", "docker", "fd01::1"), ("n", "podman", "x"), ("own", "docker", "10.1.0.7"),
                ("n", "docker", "10.1.0.1"), ("n", "docker", "10.1.0.0"), ("n", "podman", "10.1.0.255"), ("n", "docker", "fd00::1"),
                ("gated", "docker", "10.1.0.9"), ("gated", "podman", "fd00::1")):
            with self.subTest(network=network, engine=engine, address=address):
                with self.assertRaises(margo_agent.ComponentError) as caught:
                    settle(network, engine, ipv4_address=address)
                self.assertIn(f"services.main.networks: '{address}' lies in no `subnet` of network {PROJECT}_{network}", caught.exception.message)
        for subnet in ("10.1.0.0/99", "plant", "10.1.0.0/24/24"):
            self.assertRefused(make_document({}, networks={"n": {"ipam": {"config": [{"subnet": subnet}]}}}), "networks.n.ipam: ")

    def test_the_network_of_a_container_of_this_file_is_its_services(self):
        """Our containers have other names than theirs; one that is not of this file is not shared."""
        services = {"a": {"image": IMAGE, "container_name": "vpn"},
                    "b": {"image": IMAGE, "network_mode": "container:vpn", "pid": "container:vpn", "ipc": "container:vpn"}}
        found = self.settle({"services": services}).services[1]
        self.assertEqual((found.networks[0].network, found.shares, found.arguments), (f"container:{PROJECT}-a-1", ["a", "a", "a"], [
            f"--ipc=container:{PROJECT}-a-1", f"--pid=container:{PROJECT}-a-1"]))

    def test_network_modes(self):
        self.config = make_config(policy__host_network="allow")
        for mode in ("none", "host", "bridge"):
            self.assertEqual(self.settle_service({"network_mode": mode}).networks, [margo_agent.Attachment(mode, None)])
        project = self.settle({"services": {"main": {"image": IMAGE},
                                            "beside": {"image": IMAGE, "network_mode": "service:main"}}})
        self.assertEqual([s.networks for s in project.services if s.name == "beside"],
                         [[margo_agent.Attachment(f"container:{PROJECT}-main-1", None)]])
        for mode in ("slirp4netns", "ns:/proc/1/ns/net", "pasta", "other"):
            self.assertRefused(make_document({"network_mode": mode}), f"services.main.network_mode: '{mode}' is not supported",
                               code="POLICY_DENIED" if mode.startswith("ns:") else "INVALID_DEPLOYMENT")

    def test_namespaces_of_another_service(self):
        """K30: an engine knows containers, not services; who shares comes after, and is made anew with it."""
        def settle(tag):
            return self.settle({"services": {"beside": {"image": IMAGE, "pid": "service:main", "ipc": "service:main"},
                                             "main": {"image": f"localhost/a:{tag}", "ipc": "shareable"}}}).services
        services = settle(1)
        self.assertEqual([service.name for service in services], ["main", "beside"])
        self.assertEqual(services[1].arguments, [f"--ipc=container:{PROJECT}-main-1", f"--pid=container:{PROJECT}-main-1"])
        self.assertNotEqual(services[1].hash, settle(2)[1].hash)
        self.assertRefused(make_document({"pid": "service:nobody"}), "there is no service 'nobody'")

    def test_a_container_name_is_one_more_name_in_the_networks(self):
        """K13: the container keeps a name of ours; other services find it by theirs."""
        services = {"a": {"image": IMAGE, "container_name": "broker", "networks": {"n": {"aliases": ["x"]}, "default": None}},
                    "b": {"image": IMAGE, "container_name": "b", "network_mode": "none"}}
        project = self.settle({"services": services, "networks": {"n": None}})
        found = {service.name: [item.aliases for item in service.networks] for service in project.services}
        self.assertEqual(found, {"a": [["x", "broker"], ["broker"]], "b": [None]})
        self.assertEqual(project.notes, [])

    def test_a_name_that_is_taken_is_told(self):
        services = {"a": {"image": IMAGE, "container_name": "b"}, "b": {"image": IMAGE, "container_name": "c"},
                    "d": {"image": IMAGE, "container_name": "c"}}
        self.assertEqual(self.settle({"services": services}).notes, ["services.a: the name b also leads to service b",
                                                                     "services.d: the name c also leads to service b"])

    def test_an_alias_that_another_service_has_is_told(self):
        """Each gets a part of what is meant for the other; compose says nothing."""
        services = {"a": {"image": IMAGE, "networks": {"default": {"aliases": ["b", "own"]}}}, "b": {"image": IMAGE},
                    "c": {"image": IMAGE, "networks": {"default": {"aliases": ["own"]}}}}
        self.assertEqual(self.settle({"services": services}).notes, ["services.a: the name b also leads to service b",
                                                                     "services.c: the name own also leads to service a"])

    def test_nobody_answers_to_the_name_of_another_deployments_container(self):
        """In a network that both join, its peers would talk to this one."""
        theirs = f"web-{support.HELLO[:-1]}1-main-1"
        for keys, members in (({"container_name": theirs}, {}), ({"networks": {"default": {"aliases": [theirs]}}}, {}),
                              ({}, {"services": {"main": {"image": IMAGE}, "b": {"image": IMAGE, "links": [f"main:{theirs}"]}}})):
            self.assertRefused(make_document(keys, **members), "services.main.networks.default", "of another deployment", code="POLICY_DENIED")
        self.settle(make_document({"container_name": f"web-{support.HELLO}-main-1"}))

    def test_a_link_is_a_dependency_and_a_name(self):
        services = {"app": {"image": IMAGE, "links": ["db:database", "cache"]}, "db": {"image": IMAGE}, "cache": {"image": IMAGE}}
        project = self.settle({"services": services})
        self.assertEqual([(service.name, service.networks[0].aliases) for service in project.services],
                         [("db", ["database"]), ("cache", []), ("app", [])])
        self.assertRefused(make_document({"links": ["nobody:x"]}), "there is no service 'nobody'")

    def test_an_image_without_a_registry_is_docker_hubs(self):
        """K4: podman as Debian ships it knows no other registry, and may be told of several."""
        for image, expected in (("nginx", "docker.io/library/nginx"), ("nginx:1.2", "docker.io/library/nginx:1.2"),
                                ("user/app:1", "docker.io/user/app:1"), ("a/b/c", "docker.io/a/b/c"), ("localhost/a", "localhost/a"),
                                ("registry:5000/a:1", "registry:5000/a:1"), ("ghcr.io/a/b", "ghcr.io/a/b"),
                                ("nginx@sha256:" + "0" * 64, "docker.io/library/nginx@sha256:" + "0" * 64),
                                ("a:1@sha256:" + "0" * 64, "docker.io/library/a:1@sha256:" + "0" * 64)):
            with self.subTest(image=image):
                self.assertEqual(self.settle_service({"image": image}).image, expected)
        for image in ("--help", "", "a b", "Nginx", "a:", "a@sha256:0", "a//b", "/a", "a:1:2", "a" * 600, "a" + ":" * 100000,
                      "a" + "." * 100000, "$", "a\n"):
            self.assertRefused(make_document({"image": image.replace("$", "$$")}), "services.main.image: ")

    def test_two_variables_are_composes_own(self):
        self.add_file("conf/x", "1")
        self.add_file(".env", "COMPOSE_PROJECT_NAME=other\n")
        service = self.settle_service({"environment": {"P": "$COMPOSE_PROJECT_NAME"}, "volumes": ["${PWD}/conf:/conf"]})
        self.assertEqual(service.environment, {"P": PROJECT})
        self.assertEqual(service.mounts[0].found.real, f"{self.archive}/conf")

    def test_what_this_engine_would_refuse_is_found_before(self):
        """K23: at the start of the new container the old one has stopped already."""
        for driver, engine in (("local", "podman"), ("syslog", "podman"), ("k8s-file", "docker"), ("fluentd", "docker")):
            self.assertRefused(make_document({"logging": {"driver": driver}}), f"services.main.logging.driver: {engine} has no '{driver}'",
                               engine=engine)

    def test_a_host_name_has_an_end(self):
        self.assertRefused(make_document({"hostname": "x" * 65}), "services.main.hostname: ", "at most 64 characters")

    def test_mounts_in_both_syntaxes(self):
        cases = [
            ("data:/d", f"--volume={PROJECT}_data:/d"), ("data:/d:ro", f"--volume={PROJECT}_data:/d:ro"),
            ("data:/d:ro,z", f"--volume={PROJECT}_data:/d:ro,z"),
            ("/d", "--volume=/d"), ("data:/d:nocopy,rw", f"--volume={PROJECT}_data:/d:nocopy,rw"),
            ({"type": "volume", "source": "data", "target": "/d"}, f"--volume={PROJECT}_data:/d"),
            ({"type": "volume", "target": "/d"}, "--volume=/d"),
            ({"type": "volume", "source": "data", "target": "/d", "read_only": True}, f"--volume={PROJECT}_data:/d:ro"),
            ({"type": "tmpfs", "target": "/t"}, "--tmpfs=/t"), ("data:/d:consistent", f"--volume={PROJECT}_data:/d"),
            ({"type": "volume", "source": "data", "target": "/d", "volume": {"nocopy": True}}, f"--volume={PROJECT}_data:/d:nocopy"),
            ({"type": "tmpfs", "target": "/t", "tmpfs": {"size": "1m"}}, "--tmpfs=/t:size=1m"),
            ({"type": "tmpfs", "target": "/t", "tmpfs": {"mode": 0o1777}}, "--tmpfs=/t:mode=1777")]
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
        self.assertEqual(service.files, {
            "/short": margo_agent.Content("price=$A"), "/etc/a.ini": margo_agent.Content("price=$A", 0o440),
            "/inline": margo_agent.Content("a=x")})

    def test_secrets_are_files_below_run_secrets(self):
        """From a file of the package, or from a parameter; never from what the agent itself was started with."""
        self.add_file("token", "t0ken")
        secrets = {"token": {"file": "token"}, "key": {"environment": "KEY"}}
        keys = {"secrets": ["token", {"source": "key", "target": "/etc/key", "mode": 0o400, "uid": "5", "gid": "6"},
                            {"source": "key", "target": "short"}]}
        self.assertEqual(self.settle_service(keys, {"KEY": "k"}, secrets=secrets).files, {
            "/run/secrets/token": margo_agent.Content("t0ken"), "/etc/key": margo_agent.Content("k", 0o400, 5, 6),
            "/run/secrets/short": margo_agent.Content("k")})
        for section in ("secrets", "configs"):
            self.assertRefused(make_document({section: ["a"]}, **{section: {"a": {"environment": "HOME"}}}),
                               f"{section}.a.environment: there is no parameter 'HOME'", code="PARAMETER_INVALID")

    def test_the_target_of_a_config_is_absolute(self):
        """P-20: an engine would refuse `app.ini` when the running container is gone already."""
        try:
            files = self.settle_service({"configs": [{"source": "a", "target": "app.ini"}]},
                                        configs={"a": {"content": "x"}}).files
        except margo_agent.ComponentError as error:
            self.assertIn("services.main.configs", error.message)
        else:
            self.assertEqual(files, {"/app.ini": margo_agent.Content("x")})

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
            self.assertRefused(make_document({"labels": labels}), "services.main.labels: org.margo.")
            for kind in ("networks", "volumes"):
                self.assertRefused(make_document({}, **{kind: {"a": {"labels": labels}}}), f"{kind}.a.labels: org.margo.")

    def test_the_owner_is_no_part_of_the_hash(self):
        """What an older agent made keeps running when the agent is updated."""
        document, workload = make_document({"volumes": ["data:/d"]}, volumes={"data": None}), self.make_workload()
        hashes = {margo_agent.make_project(document, workload._replace(owner=owner), self.config.policy, "podman").services[0].hash
                  for owner in ("", OWNER)}
        self.assertEqual(len(hashes), 1)
class Hashes(FileCase):
    BASE = {"image": "localhost/a:1", "command": ["a"], "environment": {"A": "1"}, "ports": ["80:80"],
            "volumes": ["data:/d", "./a:/a"],
            "labels": {"l": "1"}, "networks": ["front"], "healthcheck": {"test": "true"}, "configs": ["app"]}
    MEMBERS = {"volumes": {"data": None}, "networks": {"front": None, "back": None},
               "configs": {"app": {"content": "x"}}}

    def setUp(self):
        super().setUp()
        self.add_file("a/x", "1")
        self.add_file("b/x", "2")

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


class PackageFiles(FileCase):
    """K16: what a container mounts of its package goes by its content, so that the next package changes only what it changes."""

    def settle_in(self, name, files, item="./conf:/conf"):
        """The Service `main` with a mount, of a package in a folder of its own; laid where it is mounted from."""
        self.archive = os.path.join(self.folder, name)
        for path, content in files.items():
            self.add_file(path, content)
        service = self.settle_service({"volumes": [item]})
        margo_agent.Folder(self.archive).keep([mount.found for mount in service.mounts])
        return service

    def test_another_package_with_the_same_files_has_the_same_hash(self):
        first = self.settle_in("one", {"conf/a": "1", "conf/in/b": "2", "compose.yaml": "x"})
        second = self.settle_in("two", {"conf/a": "1", "conf/in/b": "2", "compose.yaml": "y"})
        self.assertEqual((first.hash, first.arguments), (second.hash, second.arguments))
        source = first.arguments[0][len("--volume="):].split(":")[0]
        for path, text in (("a", "1"), ("in/b", "2")):
            with open(os.path.join(source, path)) as file:
                self.assertEqual(file.read(), text)
        self.assertTrue(first.arguments[0].endswith("/conf:/conf:ro"))

    def test_every_change_of_a_file_changes_it(self):
        seen = {self.settle_in("base", {"conf/a": "1"}).hash}
        for number, files in enumerate(({"conf/a": "2"}, {"conf/b": "1"}, {"conf/a": "1", "conf/b": ""}, {"conf/in/a": "1"})):
            seen.add(self.settle_in(str(number), files).hash)
        support.write(os.path.join(self.folder, "run", "conf", "a"), "1", 0o755)
        seen.add(self.settle_in("run", {}).hash)
        os.makedirs(os.path.join(self.folder, "link", "conf"))
        os.symlink("1", os.path.join(self.folder, "link", "conf", "a"))
        seen.add(self.settle_in("link", {}).hash)
        self.assertEqual(len(seen), 7)

    def test_two_files_of_one_content_lie_side_by_side(self):
        """Each has its own name; the second one once took the place of the first."""
        for name in ("a.ini", "b.ini", "c/a.ini"):
            self.add_file(name, "")
        mounts = self.settle_service({"volumes": ["./a.ini:/a", "./b.ini:/b", "./c/a.ini:/c"]}).mounts
        margo_agent.Folder(self.archive).keep([mount.found for mount in mounts])
        for mount in mounts:
            self.assertTrue(os.path.isfile(mount.found.path), mount.source)

    def test_a_folder_that_is_mounted_a_hundred_times_is_read_once(self):
        with open(os.path.join(self.archive, "big"), "wb") as file:
            file.truncate(64 * 1024 * 1024)
        with mock.patch.object(margo_agent, "load_digest", wraps=margo_agent.load_digest) as load:
            self.settle_service({"volumes": [f"./:/{number}" for number in range(100)]})
        self.assertEqual(load.call_count, 1)

    def test_a_single_file_is_mounted_by_its_content_too(self):
        source = self.settle_in("one", {"app.ini": "x"}, "./app.ini:/etc/app.ini").arguments[0][len("--volume="):].split(":")[0]
        with open(source) as file:
            self.assertEqual((file.read(), os.path.basename(source)), ("x", "app.ini"))

    def test_what_was_spoilt_is_laid_anew(self):
        service = self.settle_in("one", {"conf/a": "1"})
        source = service.mounts[0].found
        os.remove(os.path.join(source.path, "a"))
        support.write(os.path.join(source.path, "a"), "2")
        margo_agent.Folder(self.archive).keep([source])
        with open(os.path.join(source.path, "a")) as file:
            self.assertEqual(file.read(), "1")

    def test_what_the_package_lacks_is_said_with_a_way_out(self):
        """K27: an engine would say statfs, and compose would make an empty folder that the next update loses."""
        for item in ("./data:/data", {"type": "bind", "source": "./data", "target": "/data"}):
            self.assertRefused(make_document({"volumes": [item]}), "services.main.volumes[0]: the package has no ./data; use a named volume")
