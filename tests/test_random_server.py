"""A bounded share of tests/bench/random_server.py: each kind of server, always the same answers."""
import os
import unittest

from tests import support
from tests.bench import random_server

CYCLES = 400 if os.environ.get("MARGO_TEST_SLOW") == "1" else 15


class Share(unittest.TestCase):
    def check(self, kind):
        """No answer whatever is a bug, or runs what was never wanted; and all is well as soon as the answers are."""
        support.require("cryptography", "openssl")
        run = random_server.Run(self, kind, os.environ.get("MARGO_TEST_SEED", "1")).go(CYCLES)
        self.assertEqual(run.findings, [])
        self.assertGreater(run.spoilt, CYCLES // 3)
        self.assertGreater(len(run.codes), 1)

    def test_mutual_tls_with_discovery(self):
        self.check("mtls")

    def test_signed_requests(self):
        self.check("signed-a")

    def test_signed_requests_per_device(self):
        self.check("signed-b")

    def test_enrollment(self):
        self.check("est")

    def test_what_is_wrong_is_found(self):
        """The program itself: an agent that runs what nobody wanted, or ends with a bug, is a finding."""
        run = random_server.Run(self, "mtls", "1")
        run.recover({}, [])
        run.site.run = lambda *arguments: (70, "Traceback")
        run.spoil()
        self.assertIn("exit code 70", run.findings[0])
        run.site.running = lambda: [7]
        run.spoil()
        self.assertIn("[7] runs", run.findings[-1])


if __name__ == "__main__":
    unittest.main()
