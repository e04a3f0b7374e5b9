"""examples/firmware/strip.py: any optional room can be left out, and what remains is the same agent."""
import ast
import os
import subprocess
import sys
import unittest

from tests import gauge, support

STRIP = os.path.join(support.EXAMPLES, "firmware", "strip.py")
# What needs no optional room; it runs on a file that has none.
CORE = ("tests.test_plan", "tests.test_store", "tests.test_status", "tests.test_eligibility", "tests.test_desired_state.Manifest",
        "tests.test_desired_state.Version", "tests.test_desired_state.Deployment", "tests.test_desired_state.Variables",
        "tests.test_desired_state.ProjectName", "tests.test_desired_state.Bundle", "tests.test_commands", "tests.test_agent.Cycle")
SMALL = '''#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A small file.  Exit codes. 0"""
import os


# ----------------------------------------------------------------------
# 1. Ground
# ----------------------------------------------------------------------

COMMANDS = {}


def shared():
    """Used by all."""
    return "# no comment"


# what only the tower needs
LADDER = ("a", "b")


def climb():
    """Used by the tower alone."""
    return LADDER


# ----------------------------------------------------------------------
# 2. High tower (optional)
# ----------------------------------------------------------------------

def command_tower():
    """Looks far."""
    return climb(), shared(), os.sep


COMMANDS["tower"] = command_tower


# ----------------------------------------------------------------------
# 3. Cellar (optional)
# ----------------------------------------------------------------------

def find_wine():
    """Wine."""


# ----------------------------------------------------------------------
# 4. Door
# ----------------------------------------------------------------------

def command_open():
    """Opens.  # not a comment"""
    return {bottle}(), shared()     # a comment


class Empty:
    """Nothing else."""


if __name__ == "__main__":
    print(sorted(COMMANDS), command_open())
'''


def strip(*arguments):
    """One run of strip.py: (exit code, output with errors)."""
    done = subprocess.run([sys.executable, STRIP] + list(arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          universal_newlines=True, timeout=120)
    return done.returncode, done.stdout


def read(path):
    with open(path, encoding="utf-8") as file:
        return file.read()


def make_tree(source):
    """The syntax tree without docstrings, as text."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
            getattr(node, "__dict__", {}).pop("docstring", None)
    return ast.dump(tree)


class Small(unittest.TestCase):
    """What it does, on a small file."""

    def setUp(self):
        self.folder = support.make_folder(self)
        self.output = os.path.join(self.folder, "out.py")

    def strip(self, *arguments, bottle="str"):
        """The small file stripped: (exit code, what was said, the file, None where there is none)."""
        source = support.write(os.path.join(self.folder, "small.py"), SMALL.replace("{bottle}", bottle))
        code, words = strip(*arguments, "--source", source, self.output)
        return code, words, read(self.output) if os.path.exists(self.output) else None

    def run_output(self):
        """What the stripped file prints."""
        return subprocess.check_output([sys.executable, self.output], universal_newlines=True)

    def test_a_room_goes_with_what_only_it_has_used(self):
        code, words, text = self.strip("--without", "high-tower")
        self.assertEqual(code, 0, words)
        for name in ("command_tower", "climb", "LADDER", "what only the tower needs"):
            self.assertNotIn(name, text)
        for name in ("shared", "find_wine", "command_open"):
            self.assertIn(name, text)
        self.assertEqual(text.split("\n")[2], "# Without high-tower: made by examples/firmware/strip.py.")
        self.assertEqual(self.run_output(), "[] ('', '# no comment')\n")

    def test_only_keeps_what_it_names(self):
        self.assertNotIn("find_wine", self.strip("--only", "high-tower")[2])
        self.assertIn("command_tower", self.strip("--only", "mtls,high-tower")[2])
        _, words, text = self.strip("--only", "mtls")
        self.assertFalse("find_wine" in text or "command_tower" in text)
        self.assertRegex(words, r"without high-tower, cellar; \d+ bytes of \d+, \d+ tokens of \d+\n$")

    def test_the_folder_of_an_image_is_made_where_it_is_not_there_yet(self):
        """As its page has it typed; a place that cannot be written is named, not a bug."""
        self.output = os.path.join(os.path.dirname(self.output), "image", "usr", "agent.py")
        self.assertIn("command_open", self.strip("--without", "cellar")[2])
        place = self.output
        self.output = os.path.join(place, "agent.py")
        code, words, _ = self.strip("--without", "cellar")
        self.assertEqual((code, words.count("\n")), (2, 1), words)
        self.assertIn(place, words)

    def test_what_is_still_needed_is_not_left_out(self):
        code, words, text = self.strip("--without", "cellar", bottle="find_wine")
        self.assertEqual((code, text), (2, None))
        self.assertIn("find_wine", words)

    def test_an_unknown_room_is_refused_with_the_known_ones(self):
        for option in ("--without", "--only"):
            code, words, text = self.strip(option, "attic")
            self.assertEqual((code, text), (2, None))
            self.assertEqual(words, "strip.py: attic: no optional room of this file; there are high-tower, cellar\n")
        self.assertEqual(self.strip("--without", "mtls")[0], 2)
        self.assertEqual(self.strip("--sideways")[0], 2)
        self.assertEqual(self.strip("--without", "cellar", "--only", "mtls")[0], 2)

    def test_bare_drops_comments_and_docstrings_but_what_help_prints(self):
        _, words, text = self.strip("--bare")
        self.assertEqual(make_tree(text), make_tree(SMALL.replace("{bottle}", "str")))
        for phrase in ("Used by all", "a comment ", "only the tower needs", "\n\n"):
            self.assertNotIn(phrase, text)
        for phrase in ("#!/usr/bin/env python3\n# SPDX", "Exit codes", "Looks far.", '"# no comment"', "    pass\n"):
            self.assertIn(phrase, text)
        self.assertEqual(self.run_output(), "['tower'] ('', '# no comment')\n")
        count = gauge.count_tokens(SMALL.replace("{bottle}", "str"))
        self.assertIn(f"{count + 2} tokens of {count}", words)      # two times pass, where nothing else was


class Whole(unittest.TestCase):
    """What it makes of margo_agent.py, whatever optional rooms that has."""

    @classmethod
    def setUpClass(cls):
        cls.life = support.Lifetime()
        cls.folder = support.make_folder(cls.life)
        sys.path.insert(0, os.path.dirname(STRIP))
        cls.life.callback(sys.path.remove, os.path.dirname(STRIP))
        import strip as module
        cls.rooms = [name for name, _ in module.find_rooms(read(support.AGENT)) if name]

    @classmethod
    def tearDownClass(cls):
        cls.life.close()

    def make(self, name, *arguments):
        """The path of a stripped file."""
        path = os.path.join(self.folder, name, "margo_agent.py")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        code, words = strip(*arguments, "--source", support.AGENT, path)
        self.assertEqual(code, 0, words)
        return path

    def check(self, path):
        """It names nothing that is not there, and its first commands run."""
        if support.is_importable("pyflakes"):
            done = subprocess.run([sys.executable, "-m", "pyflakes", path], stdout=subprocess.PIPE, universal_newlines=True)
            self.assertEqual([line for line in done.stdout.split("\n") if "undefined" in line or "redefinition" in line], [])
        for arguments, word in ((["--help"], "run --once"), (["version"], "margo_agent ")):
            done = subprocess.run([sys.executable, "-I", "-S", path] + arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                  universal_newlines=True, timeout=support.LIMIT)
            self.assertEqual((done.returncode, word in done.stdout), (0, True), done.stdout)

    def run_tests(self, path, *names):
        """These tests on that file, in a process of their own."""
        done = subprocess.run([sys.executable, "-m", "unittest", "-q"] + list(names), cwd=support.ROOT, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, universal_newlines=True, timeout=600, env=dict(os.environ, MARGO_AGENT=path))
        self.assertEqual(done.returncode, 0, done.stdout[-4000:])

    def test_each_room_can_be_left_out_alone(self):
        self.assertTrue(self.rooms)
        for name in self.rooms:
            with self.subTest(name):
                path = self.make(name, "--without", name)
                self.check(path)
                self.run_tests(path, "tests.test_agent.Cycle.test_the_module_form_runs_from_its_folder_as_cron_does")

    def test_without_any_of_them_the_core_is_what_it_was(self):
        path = self.make("bare", "--only", "mtls", "--bare")
        self.check(path)
        self.run_tests(path, *CORE)

    def test_what_is_not_in_it_is_refused_by_name(self):
        path = self.make("none", "--only", "mtls")
        done = subprocess.run([sys.executable, "-I", "-S", path, "doctor"], stderr=subprocess.PIPE, universal_newlines=True, timeout=support.LIMIT)
        self.assertEqual(done.returncode, 2)
        self.assertIn("doctor: unknown command; known are", done.stderr)


if __name__ == "__main__":
    unittest.main()
