"""A bounded share of tests/bench/fuzz.py: each parser of its table, always the same inputs."""
import unittest
import warnings
from unittest import mock

import margo_agent
from tests import support
from tests.bench import fuzz

SHARE = 1500                        # inputs of each parser
SLOW = {"certs-only": 60}           # where each input starts a program


class Share(unittest.TestCase):
    def test_no_parser_fails_or_reads_otherwise_than_its_judge(self):
        """Whatever comes in, a parser reads it as others do or refuses it; each row reads some and refuses some."""
        support.require("cryptography", "asn1crypto", "openssl")
        with mock.patch.object(margo_agent, "log", lambda *_, **__: None), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in fuzz.PARSERS:
                with self.subTest(name):
                    run = fuzz.Run(name, 1).go(SLOW.get(name, SHARE))
                    self.assertEqual(run.findings, {})
                    self.assertGreater(run.accepted, 0)
                    self.assertGreater(run.count, run.accepted)

    def test_what_is_wrong_is_found(self):
        """The program itself: an exception of another kind, a value that a judge does not share, and a hang are findings."""
        def read(data):
            if data[:1] == b"x":
                raise KeyError("x")
            return data[:5]
        parser = fuzz.Parser(lambda: [b"abcdef"], read, lambda data, found: "" if found == data else "cut", fuzz.REFUSALS, (b"x",), fuzz.mutate_bytes)
        with mock.patch.dict(fuzz.PARSERS, {"odd": parser}), mock.patch.object(fuzz, "SLOW", -1.0):
            run = fuzz.Run("odd", 1).go(500)
        self.assertEqual({kind.split(" ")[0] for kind in run.findings}, {"KeyError", "read", "slow"})


if __name__ == "__main__":
    unittest.main()
