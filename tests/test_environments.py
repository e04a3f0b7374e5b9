"""The threat model of examples names tests that exist, and the unit of examples runs on a real systemd (contract: Shape)."""
import importlib
import os
import re
import subprocess
import sys
import unittest

from tests import support

PAGE = os.path.join(support.ROOT, "examples", "security", "README.md")


class ThreatModel(unittest.TestCase):
    def test_every_check_names_a_test_that_exists(self):
        with open(PAGE, encoding="utf-8") as file:
            names = re.findall(r"`(test_\w+)\.(\w+)\.(test_\w+)`", file.read())
        self.assertGreater(len(names), 30)
        for module, case, test in names:
            with self.subTest(f"{module}.{case}.{test}"):
                self.assertTrue(hasattr(getattr(importlib.import_module(f"tests.{module}"), case), test))

    def test_every_line_of_the_table_has_one(self):
        with open(PAGE, encoding="utf-8") as file:
            table = file.read().split("## What each check stops")[1].split("\n## ")[0]
        rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
        self.assertEqual([row for row in rows[1:] if not re.search(r"`test_\w+\.\w+\.test_\w+` \|$", row)], [])


class Unit(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        support.require("systemd")

    def test_the_unit_of_examples_runs_on_a_real_systemd(self):
        done = subprocess.run([sys.executable, "-m", "tests.environments", "unit"], cwd=support.ROOT, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True, timeout=400)
        self.assertEqual(done.returncode, 0, done.stdout[-4000:])
        levels = [float(level) for level in re.findall(r"exposure level for \S+ ([0-9.]+)", done.stdout)]
        self.assertEqual(len(levels), 2, done.stdout)
        self.assertLess(levels[0], 8.5)
        self.assertLess(levels[1], 2.5)
