"""The house itself: layering, purity, doors, the gauge; what house rules say of margo_agent.py is checked on its syntax tree.

Names and order of the sections come from the file's banners; what has to be known of some of them is in the tables below.
"""
import ast
import builtins
import os
import re
import subprocess
import sys
import unittest
import warnings

from tests import gauge, support

VOCABULARY = ("Constants and errors", "Records")                # what every section may use
PURE = ("Records", "Compose file", "YAML", "Small encodings", "X.509", "Desired state", "Eligibility", "Plan", "Deployment status", "Turns")
DOOR = "Command line"
WORLD = {"os", "random", "socket", "subprocess", "logging", "shutil", "fcntl", "select", "signal", "tempfile", "ssl", "urllib.request", "http.client"}
LONGEST = 60                        # lines of one function
MEDIAN = 14

# The gauge: what is counted (see tests/gauge.py), how much of it there may be, and how far below that it may fall before this table has
# to follow.  Figures only go down; the aim is 60,000 tokens and none of the rest.
GAUGE = {
    "tokens": (90450, 400),
    "lines wider than 110 columns": (0, 1),
    "conditional expressions inside another": (0, 1),
    "comprehensions with two loops and a condition": (0, 1),
    "packed assignments": (0, 1),
}
# Functions named parse_, make_, check_, is_ or find_ that are not pure.  It only gets shorter: such a function is to be split into what
# looks and what decides, or named for what it does (load_ save_ fetch_ post_ run_ ask_ obtain_).
LYING = """
Agent.check_patience Agent.is_downtime Agent.make_capabilities
ComposeDriver.check_space ComposeDriver.make_access MtlsSource.check_peer Store.find_time
check_space find_engine find_program is_within is_within_whole make_child make_compose_driver make_drivers
make_git_environment make_helm_driver make_opener
""".split()

with open(support.AGENT, encoding="utf-8") as file:
    SOURCE = file.read()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    TREE = ast.parse(SOURCE)


def find_sections():
    """[(number, name without "(optional)", whether it is optional, first line)] by the banners."""
    found = re.finditer(r"^# -{60,}\n# (\d+)\. (.+?)( \(optional\))?\n# -{60,}\n", SOURCE, re.M)
    return [(int(match.group(1)), match.group(2), bool(match.group(3)), SOURCE.count("\n", 0, match.start()) + 1) for match in found]


SECTIONS = find_sections()
OPTIONAL = {name for _, name, is_optional, _ in SECTIONS if is_optional}


def section_of(line):
    """The name of the section a line lies in, "Header" above the first."""
    return next((name for _, name, _, start in reversed(SECTIONS) if line >= start), "Header")


def order_of(name):
    """A section's place from top to bottom."""
    return [item for _, item, _, _ in SECTIONS].index(name) + 1 if name != "Header" else 0


def definitions():
    """{top-level name: its first line}."""
    found = {}
    for node in TREE.body:
        names = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else [
            target.id for item in getattr(node, "targets", []) for target in ast.walk(item)
            if isinstance(target, ast.Name) and isinstance(target.ctx, ast.Store)]
        found.update((name, node.lineno) for name in names)
    return found


def functions():
    """Every function of the file, nested ones and methods included."""
    return [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef)]


def calls(*names):
    """Lines on which one of these is called, spelt with dots."""
    return [node.lineno for node in ast.walk(TREE) if isinstance(node, ast.Call) and dotted(node.func) in names]


def dotted(node):
    """os.path.join and the like as text."""
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else getattr(node, "id", "")


class Rooms(unittest.TestCase):
    def test_sections_are_numbered_in_order_and_the_docstring_lists_them(self):
        text = ast.get_docstring(TREE).split("A section uses only")[1].split('"C-nnn"')[0]
        listed = dict((int(number), name.strip()) for number, name in re.findall(r"(\d+) ([A-Z][\w.-]*(?: [\w.-]+)*)", text))
        self.assertEqual({number: name for number, name, _, _ in SECTIONS}, listed)
        self.assertEqual([number for number, _, _, _ in SECTIONS], list(range(1, len(SECTIONS) + 1)))

    def test_tables_of_this_test_name_sections_of_the_file(self):
        self.assertEqual(set(PURE + VOCABULARY) - {name for _, name, _, _ in SECTIONS}, set())

    def find_uses(self):
        """[(line, section, name it uses, section of that)], where these are two sections."""
        defined, found = definitions(), []
        for node in TREE.body:
            here = section_of(node.lineno)
            if isinstance(node, ast.If) and "__main__" in ast.dump(node.test):
                continue                            # the file's last lines, of no section
            names = {item.id for item in ast.walk(node) if isinstance(item, ast.Name)} - gauge.find_locals(node)
            for name in sorted(names & set(defined)):
                there = section_of(defined[name])
                if there != here:
                    found.append((node.lineno, here, name, there))
        return found

    def test_a_section_uses_only_the_vocabulary_and_sections_below_it(self):
        """So the story comes first.  Optional rooms and the door stand at the end, use all of it, and nobody uses them."""
        wrong = [f"line {line} ({here}) uses {name} of {there}" for line, here, name, there in self.find_uses()
                 if there not in VOCABULARY + ("Header",) and here not in OPTIONAL | {DOOR}
                 and (there == DOOR or order_of(there) < order_of(here))]
        self.assertEqual(wrong, [])

    def test_nobody_names_what_is_in_an_optional_room(self):
        self.assertEqual([f"line {line} ({here}) uses {name} of {there}" for line, here, name, there in self.find_uses()
                          if there in OPTIONAL], [])

    def test_pure_sections_do_not_touch_the_world(self):
        wrong = []
        for node in ast.walk(TREE):
            if getattr(node, "lineno", 0) and section_of(node.lineno) in PURE:
                modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(
                    node, ast.ImportFrom) else []
                wrong += [f"line {node.lineno}: imports {name}" for name in modules if name in WORLD]
                if isinstance(node, ast.Call) and dotted(node.func) in ("open", "print", "log", "time.time", "time.monotonic", "time.sleep",
                                                                        "run_command", "request", "write_file", "read_file", "input"):
                    wrong.append(f"line {node.lineno}: calls {dotted(node.func)}")
                if isinstance(node, ast.Attribute) and dotted(node).split(".")[0] in ("os", "sys"):
                    wrong.append(f"line {node.lineno}: uses {dotted(node)}")
        self.assertEqual(wrong, [])

    def test_there_is_one_door_to_each_outside_thing(self):
        self.assertEqual({section_of(line) for line in calls("subprocess.Popen", "subprocess.run", "subprocess.call", "subprocess.check_output",
                                                             "os.system", "os.popen")}, {"Commands"})
        self.assertEqual(len(calls("subprocess.Popen")), 1)
        self.assertEqual({section_of(line) for line in calls("urllib.request.Request", "urllib.request.OpenerDirector")}, {"Transport"})
        self.assertEqual(calls("urllib.request.urlopen", "urllib.request.build_opener", "ssl.create_default_context"), [])
        self.assertEqual({section_of(line) for line in calls("os.fsync", "os.replace")}, {"Store"})
        self.assertEqual(calls("os.open") and {section_of(line) for line in calls("os.open")} - {"Store", "Command line"}, set())

    def test_only_main_ends_the_process(self):
        self.assertEqual([section_of(line) for line in calls("sys.exit", "exit", "quit")], ["Command line"])
        self.assertEqual([node.lineno for node in ast.walk(TREE) if isinstance(node, ast.Assert)], [])
        self.assertEqual([node.lineno for node in ast.walk(TREE) if isinstance(node, ast.ExceptHandler) and node.type is None], [])

    def test_no_command_goes_through_a_shell(self):
        self.assertEqual([node.lineno for node in ast.walk(TREE) if isinstance(node, ast.keyword) and node.arg == "shell"], [])


class Walls(unittest.TestCase):
    def test_only_the_standard_library_is_imported(self):
        names = {alias.name.split(".")[0] for node in ast.walk(TREE) if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module.split(".")[0] for node in ast.walk(TREE) if isinstance(node, ast.ImportFrom)}
        known = getattr(sys, "stdlib_module_names", None)
        if known is None:
            known = {name.split(".")[0] for name in os.listdir(os.path.dirname(os.__file__))} | set(sys.builtin_module_names)
            known = {re.sub(r"\.py$", "", name) for name in known} | {"select", "fcntl", "zlib", "resource"}
        self.assertEqual(names - set(known), set())

    def test_it_runs_on_the_floor(self):
        """requires-python is 3.7; the real proof is .ci/run, which runs these tests there."""
        with open(os.path.join(support.ROOT, "pyproject.toml")) as file:
            self.assertIn('requires-python = ">=3.7"', file.read())
        support.require("vermin")
        done = subprocess.run([sys.executable, "-c", "from vermin import main; main()", "--no-tips", "-t=3.7-", "--violations",
                               support.AGENT], stdout=subprocess.PIPE,
                              universal_newlines=True)
        self.assertEqual(done.returncode, 0, done.stdout)

    def test_pyflakes_finds_nothing(self):
        support.require("pyflakes")
        files = [support.AGENT, os.path.join(support.EXAMPLES, "wfm.py"), os.path.join(support.EXAMPLES, "mis.py")] + [
            os.path.join(folder, name) for folder, _, names in os.walk(os.path.join(support.ROOT, "tests")) for name in names if name.endswith(".py")]
        done = subprocess.run([sys.executable, "-m", "pyflakes"] + files, stdout=subprocess.PIPE, universal_newlines=True)
        self.assertEqual(done.stdout, "")

    def test_functions_are_short(self):
        lengths = sorted(node.end_lineno - node.lineno + 1 for node in functions()) if sys.version_info >= (3, 8) else [1]
        self.assertLessEqual(lengths[-1], LONGEST)
        self.assertLessEqual(lengths[len(lengths) // 2], MEDIAN)

    def test_what_is_public_says_what_it_is(self):
        silent = [node.name for node in TREE.body if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not ast.get_docstring(node)]
        self.assertEqual(silent, [])

    def test_no_name_hides_a_builtin(self):
        hidden = [name for name in definitions() if hasattr(builtins, name)]
        self.assertEqual(hidden, [])

    def test_there_is_nothing_else_at_the_top(self):
        support.require("git")
        done = subprocess.run(["git", "ls-files"], cwd=support.ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, universal_newlines=True)
        if done.returncode:
            self.skipTest("not a git checkout")
        top = {path.split("/")[0] for path in done.stdout.split()}
        self.assertEqual(top - {".ci", ".github", ".gitignore", "LICENSE", "README.md", "examples", "margo_agent.py", "pyproject.toml", "tests"},
                         set())


class Gauge(unittest.TestCase):
    """How big and how hard to read the file is; figures only go down."""

    def measure(self):
        """{what is counted: how often, and where}."""
        found = {"lines wider than 110 columns": gauge.find_wide_lines(SOURCE),
                 "conditional expressions inside another": gauge.find_nested_conditions(TREE),
                 "comprehensions with two loops and a condition": gauge.find_crowded_comprehensions(TREE),
                 "packed assignments": gauge.find_packed_assignments(TREE)}
        counts = {name: (len(lines), lines[:30]) for name, lines in found.items()}
        return dict(counts, tokens=(gauge.count_tokens(SOURCE), []))

    def test_no_figure_grows_and_limits_follow_what_is_reached(self):
        figures = self.measure()
        self.assertEqual(set(figures), set(GAUGE))
        for name, (limit, slack) in GAUGE.items():
            count, lines = figures[name]
            with self.subTest(name):
                self.assertLessEqual(count, limit, f"{name}: what arrives is paid for by what leaves; lines {lines}")
                self.assertLess(limit - count, slack, f"{name}: lower the limit to {count}")

    def test_verbs_keep_their_promise(self):
        lying = gauge.find_lying_verbs(TREE)
        new = {name: words for name, words in lying.items() if name not in LYING}
        self.assertEqual(new, {}, "these are named as if they touched nothing")
        gone = [name for name in LYING if name not in lying]
        self.assertLess(len(gone), 5, f"take these off the list: {' '.join(gone)}")

    def test_the_gauge_counts_what_it_says(self):
        """Comments, docstrings, blank lines and f-strings' insides are no tokens."""
        source = '"""Doc."""\n\n# note\ndef f(a):\n    """Doc."""\n    return f"{a} {a!r:>{4}}" + "x"\n'
        self.assertEqual(gauge.count_tokens(source), 10)
        tree = ast.parse("a = 1 if b else 2 if c else 3\nd = [e for f in g for e in f if e]\nh, i = 1, j()\nk, l = l, k\n")
        self.assertEqual([find(tree) for find in (gauge.find_nested_conditions, gauge.find_crowded_comprehensions,
                                                  gauge.find_packed_assignments)], [[1], [2], [3]])
        tree = ast.parse("def load(a):\n    return open(a)\ndef make_a(b):\n    return load(b)\n"
                         "def make_b(os):\n    return os.path.join(os.O_RDONLY)\n")
        self.assertEqual(gauge.find_lying_verbs(tree), {"make_a": "load: open"})


class Examples(unittest.TestCase):
    """Examples get copied, so they are loaded and run, and have secure defaults."""

    def test_the_configuration_is_valid_and_safe(self):
        import margo_agent
        config = margo_agent.load_config(os.path.join(support.EXAMPLES, "agent.yaml"), {})
        self.assertEqual((config.wfm.profile, config.wfm.min_tls, config.policy.privileged), ("mtls", "1.3", "deny"))
        self.assertFalse(any(entry.insecure for entry in config.registries.values()))

    def test_the_deployment_and_its_compose_file_are_valid(self):
        import margo_agent
        folder = os.path.join(support.EXAMPLES, "hello")
        with open(os.path.join(folder, "deployment.yaml"), "rb") as file:
            deployment = margo_agent.parse_deployment(file.read(), support.HELLO)
        variables = margo_agent.make_variables(deployment, "web")
        workload = margo_agent.Workload(support.HELLO, "web", "web-x", folder, variables, {}, True)
        with open(os.path.join(folder, "compose.yaml"), "rb") as file:
            policy = margo_agent.load_config(os.path.join(support.EXAMPLES, "agent.yaml"), {}).policy
            project = margo_agent.make_project(margo_agent.load_yaml(file.read()), workload, policy, "podman")
        self.assertEqual(project.services[0].environment, {"GREETING": "Hello from the edge"})
        self.assertIn("--publish=127.0.0.1:8080:8080", project.services[0].arguments)

    def test_scripts_are_well_formed(self):
        for name in ("engine.sh", "gitfleet.sh", "pki.sh", "quickstart.sh"):
            self.assertEqual(subprocess.run(["sh", "-n", os.path.join(support.EXAMPLES, name)]).returncode, 0)

    def test_the_service_unit_fits_the_agent(self):
        with open(os.path.join(support.EXAMPLES, "margo-agent.service")) as file:
            text = file.read()
        for words in ("Type=notify", "RestartPreventExitStatus=2", "RuntimeDirectory=margo-agent", " run\n"):
            self.assertIn(words, text)


if __name__ == "__main__":
    unittest.main()
