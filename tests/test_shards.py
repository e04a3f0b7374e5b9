"""The runner of the suite: what several processes say of their tests is what one would say."""
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import unittest
from unittest import mock

from tests import support

MIXED = '''
import unittest

class Mixed(unittest.TestCase):
    def test_good(self):
        print("noise")

    def test_bad(self):
        print("the last words of the bad one")
        self.assertEqual(1, 2)

    def test_worse(self):
        raise ValueError("worse")

    @unittest.skip("not here")
    def test_skipped(self):
        pass

    @unittest.expectedFailure
    def test_expected(self):
        self.fail("as known")

    def test_parts(self):
        for number in range(3):
            with self.subTest(number=number):
                self.assertEqual(number, 1)

class Broken(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        raise OSError("no ground")

    def test_never(self):
        pass
'''
GOOD = '''
import socket, unittest

class Good(unittest.TestCase):
    def test_loopback_is_up(self):
        with socket.socket() as door:
            door.bind(("127.0.0.1", 0))
            door.listen()
            socket.create_connection(door.getsockname(), 5).close()
'''
DEADLY = '''
import os, unittest

class Deadly(unittest.TestCase):
    def test_dies(self):
        os._exit(7)
'''
SLOW = '''
import os, time, unittest

class Slow(unittest.TestCase):
    def test_takes_long(self):
        with open("started", "w"):
            time.sleep(600)
'''


class Shards(unittest.TestCase):
    def setUp(self):
        self.folder = support.make_folder(self)
        os.mkdir(os.path.join(self.folder, "tests"))
        for name in ("__init__.py", "shards.py"):
            shutil.copy(os.path.join(support.ROOT, "tests", name), os.path.join(self.folder, "tests"))

    def start(self, shards, *options, **modules):
        """`python3 -m unittest` in a folder with these modules of tests."""
        for name, text in modules.items():
            support.write(os.path.join(self.folder, "tests", f"test_{name}.py"), text)
        process = subprocess.Popen([sys.executable, "-m", "unittest"] + list(options), cwd=self.folder, stdin=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, universal_newlines=True, start_new_session=True,
                                   env=dict(os.environ, MARGO_TEST_SHARDS=str(shards)))
        self.addCleanup(process.stderr.close)
        self.addCleanup(support.end, process)
        return process

    def run_suite(self, shards, *options, **modules):
        """(exit code, everything said) of the whole run."""
        process = self.start(shards, *options, **modules)
        _, words = process.communicate(timeout=120)
        return process.returncode, words

    def test_two_processes_say_what_one_says(self):
        outcomes = []
        for shards in (1, 2):
            code, words = self.run_suite(shards, mixed=MIXED, good=GOOD)
            self.assertEqual(words.strip().split("\n")[-1], "3 passed, 4 failed, 1 skipped")
            heads = sorted(re.findall(r"^(?:FAIL|ERROR): (.+)$", words, re.M))
            outcomes.append((code, heads, re.findall(r"^(Ran \d+ tests|FAILED.*)", words, re.M)))
            for part in ("AssertionError: 1 != 2", "ValueError: worse", "OSError: no ground"):
                self.assertEqual(words.count(part), 1, words)
        self.assertEqual(len(outcomes[0][1]), 5)    # two of the subtests
        self.assertEqual(outcomes[0], outcomes[1])
        self.assertIn("the last words of the bad one", words)
        self.assertNotIn("noise", words)

    def test_a_process_that_dies_fails_its_test_and_no_other(self):
        code, words = self.run_suite(2, deadly=DEADLY, good=GOOD)
        self.assertEqual((code, words.strip().split("\n")[-1]), (1, "1 passed, 1 failed, 0 skipped"))
        self.assertIn("the process of this test ended with 7", words)

    def test_a_module_that_cannot_be_imported_fails(self):
        code, words = self.run_suite(2, astray="import nothing_of_this_name\n", good=GOOD)
        self.assertEqual((code, words.strip().split("\n")[-1]), (1, "1 passed, 1 failed, 0 skipped"))

    def test_only_what_is_asked_for_runs(self):
        code, words = self.run_suite(2, "-k", "test_good", "-k", "test_loopback*", mixed=MIXED, good=GOOD)
        self.assertEqual((code, words.strip().split("\n")[-1]), (0, "2 passed, 0 failed, 0 skipped"), words)

    def test_what_each_test_took_is_written_where_it_is_asked_for(self):
        """Also what is set up for a class, from its own beginning."""
        path, began = os.path.join(self.folder, "times"), time.monotonic()
        with mock.patch.dict(os.environ, MARGO_TEST_TIMES=path):
            self.run_suite(2, mixed=MIXED, good=GOOD)
        took = time.monotonic() - began
        with open(path) as file:
            rows = [line.split(None, 2) for line in file]
        self.assertIn("tests.test_good.Good.test_loopback_is_up", [name.strip() for _, _, name in rows])
        self.assertTrue(any(name.startswith("setUpClass (") for _, _, name in rows), rows)
        for seconds, _, name in rows:
            self.assertTrue(0 <= float(seconds) <= took, name)

    def test_ctrl_c_ends_all(self):
        process = self.start(2, slow=SLOW, good=GOOD)
        support.wait_for(lambda: os.path.exists(os.path.join(self.folder, "started")), what="the slow test")
        os.killpg(process.pid, signal.SIGINT)       # as a terminal does
        _, words = process.communicate(timeout=support.LIMIT)
        self.assertNotEqual(process.returncode, 0)
        self.assertIn("KeyboardInterrupt", words)
        with self.assertRaises(ProcessLookupError):
            os.killpg(process.pid, 0)


if __name__ == "__main__":
    unittest.main()
