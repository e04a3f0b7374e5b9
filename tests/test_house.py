"""The house itself: layering, purity, doors, budgets; what house rules say of margo_agent.py is checked on its syntax tree."""
import ast
import builtins
import os
import re
import subprocess
import sys
import unittest

from tests import support

PURE = ("Records", "Encodings", "Desired state", "Plan", "Deployment status")
WORLD = {"os", "random", "socket", "subprocess", "logging", "shutil", "fcntl", "select", "signal", "tempfile", "ssl", "urllib.request", "http.client"}
BUDGET = 8600                       # lines of the whole file, blank ones and comments included
LONGEST = 60                        # lines of one function

with open(support.AGENT, encoding="utf-8") as file:
    SOURCE = file.read()
TREE = ast.parse(SOURCE)


def find_sections():
    """[(number, name, first line)] by the banners."""
    found = re.finditer(r"^# -{126}\n# (\d+)\. (.+)\n# -{126}\n", SOURCE, re.M)
    return [(int(match.group(1)), match.group(2), SOURCE.count("\n", 0, match.start()) + 1) for match in found]


SECTIONS = find_sections()


def section_of(line):
    """The name of the section a line lies in, "Header" above the first."""
    return next((name for _, name, start in reversed(SECTIONS) if line >= start), "Header")


def order_of(name):
    """A section's place from top to bottom."""
    return [item for _, item, _ in SECTIONS].index(name) + 1 if name != "Header" else 0


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
        listed = dict((int(number), name.strip()) for number, name in re.findall(r"(\d+) ([A-Z][A-Za-z-]+(?: [a-z-]+| \(optional\))*)", ast.get_docstring(TREE)
                                                                                 .split("A section uses only")[1].split('"C-nnn"')[0]))
        self.assertEqual({number: name for number, name, _ in SECTIONS}, listed)
        self.assertEqual([number for number, _, _ in SECTIONS], sorted(listed))

    def test_a_section_uses_only_sections_above_it(self):
        defined = definitions()
        wrong = []
        for node in TREE.body:
            here = order_of(section_of(node.lineno))
            for name in {item.id for item in ast.walk(node) if isinstance(item, ast.Name)} & set(defined):
                if order_of(section_of(defined[name])) > here:
                    wrong.append(f"line {node.lineno} ({section_of(node.lineno)}) uses {name} of {section_of(defined[name])}")
        self.assertEqual(wrong, [])

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

    def test_the_file_keeps_its_budget(self):
        self.assertLessEqual(SOURCE.count("\n"), BUDGET)

    def test_functions_are_short(self):
        lengths = sorted(node.end_lineno - node.lineno + 1 for node in functions()) if sys.version_info >= (3, 8) else [1]
        self.assertLessEqual(lengths[-1], LONGEST)
        self.assertLessEqual(lengths[len(lengths) // 2], 14)

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
        for name in ("gitfleet.sh", "pki.sh", "quickstart.sh"):
            self.assertEqual(subprocess.run(["sh", "-n", os.path.join(support.EXAMPLES, name)]).returncode, 0)

    def test_the_service_unit_fits_the_agent(self):
        with open(os.path.join(support.EXAMPLES, "margo-agent.service")) as file:
            text = file.read()
        for words in ("Type=notify", "RestartPreventExitStatus=2", "RuntimeDirectory=margo-agent", " run\n"):
            self.assertIn(words, text)


if __name__ == "__main__":
    unittest.main()
