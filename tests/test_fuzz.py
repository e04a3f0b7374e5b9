"""A bounded share of tests/bench/fuzz.py: each parser of its table, always the same inputs but for the keys and signatures of certificates."""
import unittest
import warnings
from unittest import mock

import margo_agent
from tests import support
from tests.bench import fuzz
from tests.test_encodings import for_all

SHARE = 1500                        # inputs of each parser
SLOW = {"certs-only": 60}           # where each input starts a program
JUDGES = {"http-answer": "h11", "challenge": "werkzeug", "problem": "jsonschema", "env-file": "docker-compose",
          "interpolation": "docker-compose"}           # parts of which one row has need


class Share(unittest.TestCase):
    def test_no_parser_fails_or_reads_otherwise_than_its_judge(self):
        """Whatever comes in, a parser reads it as others do or refuses it; each row reads some."""
        support.require("cryptography", "asn1crypto", "openssl")
        with mock.patch.object(margo_agent, "log", lambda *_, **__: None), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in fuzz.PARSERS:
                with self.subTest(name):
                    support.require(*filter(None, [JUDGES.get(name)]))
                    run = fuzz.Run(name, 1).go(SLOW.get(name, SHARE))
                    self.assertEqual(run.findings, {})
                    self.assertGreater(run.accepted, 0)

    def test_any_certificate_is_read_as_the_cryptography_library_reads_it(self):
        """C-011: whatever names, times, numbers and extensions it has, in any order."""
        support.require("cryptography", "hypothesis")
        import datetime
        from cryptography import x509

        def make(st):
            words = st.text(st.characters(codec="ascii", exclude_characters="\0"), min_size=1, max_size=20)
            uris = st.lists(words.map(lambda word: x509.UniformResourceIdentifier("spiffe://" + word)), max_size=3)
            usage = st.lists(st.booleans(), min_size=7, max_size=7).map(lambda bits: x509.KeyUsage(*bits, False, False))
            kinds = [uris.filter(bool).map(x509.SubjectAlternativeName), usage, st.booleans().map(lambda ca: x509.BasicConstraints(ca, None)),
                     st.binary(min_size=1, max_size=30).map(x509.SubjectKeyIdentifier),
                     st.binary(min_size=1, max_size=30).map(lambda key: x509.AuthorityKeyIdentifier(key, None, None)),
                     st.just(x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.SERVER_AUTH]))]
            extensions = st.permutations(kinds).flatmap(lambda some: st.tuples(*(st.tuples(kind, st.booleans()) for kind in some))).flatmap(
                lambda whole: st.integers(0, len(whole)).map(lambda count: whole[:count]))
            moments = st.datetimes(datetime.datetime(1950, 1, 1), datetime.datetime(2090, 1, 1)).map(lambda item: item.replace(microsecond=0))
            return st.tuples(st.integers(1, 2 ** 159 - 1), words, words, moments, st.integers(0, 10 ** 9), st.integers(0, 2), extensions)

        def check(facts):
            serial, subject, issuer, start, seconds, key, extensions = facts
            builder = x509.CertificateBuilder(
                serial_number=serial, subject_name=fuzz.make_name(subject), issuer_name=fuzz.make_name(issuer), not_valid_before=start,
                not_valid_after=start + datetime.timedelta(seconds=seconds), public_key=fuzz.make_keys()[key].public_key())
            for extension, critical in extensions:
                builder = builder.add_extension(extension, critical)
            der = fuzz.sign(builder, fuzz.make_keys()[key])
            self.assertEqual(len(fuzz.load_certificate(der)[1]), len(extensions))
            self.assertEqual(fuzz.judge_certificate(der, margo_agent.parse_certificate(der)), "")
        for_all(make, check, 150)

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
