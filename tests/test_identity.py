"""Identity and trust: who this device is, whom it trusts, and that nothing is said to anybody else."""
import base64
import contextlib
import io
import json
import os
import socket
import stat
import subprocess
import time
import unittest
from unittest import mock

import margo_agent
from margo_agent import Certificate, Refused, TrustBundle, Unreachable, Untrusted
from tests import support
from tests.support import CLIENT_ID, TRUST_DOMAIN, WFM_ID

NOW = 1790000000
DISCOVERY = "/.well-known/margo"
BUNDLE = "/.well-known/spiffe/bundle.json"


def read(path):
    """The bytes of a file."""
    with open(path, "rb") as file:
        return file.read()


def make_leaf(uris=(CLIENT_ID,), is_ca=False, usage=frozenset({0}), start=NOW - 100, end=NOW + 100):
    """A Certificate record as parse_certificate makes it; bit 0 of keyUsage is digitalSignature."""
    return Certificate(b"", b"", b"", 1, start, end, b"", list(uris), is_ca, None if usage is None else set(usage))


def change_environment(test, **values):
    """Environment variables for one test, without those that name a proxy."""
    keep = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    patch = mock.patch.dict(os.environ, dict(keep, **values), clear=True)
    patch.start()
    test.addCleanup(patch.stop)


def call(device, *arguments, **env):
    """The command line by margo_agent.main, as a process of its own would see it: (exit code, stdout, stderr)."""
    with contextlib.redirect_stderr(io.StringIO()) as errors, contextlib.redirect_stdout(io.StringIO()) as output:
        with mock.patch.dict(os.environ, dict(device.env, **env), clear=True):
            code = margo_agent.main(["-c", device.config_file] + list(arguments))
    return code, output.getvalue(), errors.getvalue()


class Ids(unittest.TestCase):
    def test_spiffe_ids_are_taken_apart(self):
        """C-012: protocol 1.1."""
        for text, domain, path in (
                (WFM_ID, TRUST_DOMAIN, "/margo/wfm/main"), ("spiffe://a/b", "a", "/b"),
                ("spiffe://a_b-c.9/X.y~z_-/0", "a_b-c.9", "/X.y~z_-/0"),
                ("spiffe://a/...", "a", "/..."), ("spiffe://a/" + "x" * 2037, "a", "/" + "x" * 2037)):
            with self.subTest(text[:40]):
                self.assertEqual(tuple(margo_agent.parse_spiffe_id(text)), (text, domain, path))

    def test_what_is_no_spiffe_id_with_a_path_is_refused(self):
        """C-011: other schemes, the root path, ports, users, queries, fragments, empty and dotted segments, length."""
        for text in ("", "spiffe://", "spiffe://a", "spiffe://a/", "spiffe:///b", "https://a/b", "SPIFFE://a/b",
                     "spiffe:/a/b", "spiffe://A/b",
                     "spiffe://a:1/b", "spiffe://u@a/b", "spiffe://a/b?", "spiffe://a/b?c", "spiffe://a/b#c",
                     "spiffe://a/b/", "spiffe://a//b",
                     "spiffe://a/./b", "spiffe://a/b/..", "spiffe://a/../b", "spiffe://a/b%20", "spiffe://a/b c",
                     " spiffe://a/b", "spiffe://a/b\n",
                     "spiffe://a/\u00e4", "spiffe://\u00e4/b", "spiffe://a/b\x00", "spiffe://a/" + "x" * 2038):
            with self.subTest(text[:40]), self.assertRaises(ValueError) as caught:
                margo_agent.parse_spiffe_id(text)
            self.assertIn("is not a SPIFFE ID with a path", str(caught.exception))

    def test_a_leaf_names_one_id_and_signs_nothing(self):
        """C-011: each fault names the field; keyUsage may be absent."""
        for usage in (None, set(), {0}, {0, 2, 4}):
            self.assertEqual(margo_agent.check_leaf(make_leaf(usage=usage)).text, CLIENT_ID)
        for leaf, words in (
                (make_leaf([]), "subjectAltName holds 0 URIs"),
                (make_leaf([WFM_ID, CLIENT_ID]), "subjectAltName holds 2 URIs"),
                (make_leaf([WFM_ID, WFM_ID]), "subjectAltName holds 2 URIs"),
                (make_leaf(["https://x.example/y", WFM_ID]), "holds 2 URIs"),
                (make_leaf(is_ca=True), "basicConstraints"), (make_leaf(usage={0, 5}), "keyUsage"),
                (make_leaf(usage={6}), "keyUsage"),
                (make_leaf(["spiffe://a"]), "'spiffe://a' is not"),
                (make_leaf(["https://a/b"]), "'https://a/b' is not")):
            with self.subTest(words), self.assertRaises(ValueError) as caught:
                margo_agent.check_leaf(leaf)
            self.assertIn(words, str(caught.exception))

    def test_a_certificate_is_valid_from_its_first_to_its_last_second(self):
        """C-007, C-019, P-2: outside of it the message tells both times and suspects the clock."""
        leaf = make_leaf()
        for now in (NOW - 100, NOW, NOW + 100):
            margo_agent.check_validity(leaf, now)
        for now, words in ((NOW - 101, "not valid before"), (0, "1970-01-01T00:00:00Z; set the clock"),
                           (NOW + 101, "expired at")):
            with self.subTest(words), self.assertRaises(ValueError) as caught:
                margo_agent.check_validity(leaf, now)
            for word in (words, "the clock of this device says", margo_agent.make_time(now)):
                self.assertIn(word, str(caught.exception))


class OwnIdentity(unittest.TestCase):
    def setUp(self):
        self.pki = support.Pki(self)

    def issue(self, name, *uris, **options):
        self.pki.issue(name, uris, **options)
        return self.pki.der(f"{name}.pem")

    def test_the_wfm_follows_from_the_own_id(self):
        """C-009, C-015, E-015: exact and case-sensitive, nothing is read into the names."""
        for index, (domain, wfm, client) in enumerate((
                (TRUST_DOMAIN, "main", "line-4-cell-2"), ("a", "A.b_c-1", "0"), ("x.y", "client", "client"),
                ("x", "wfm", "WFM"), ("x", "a~", "b~"))):
            with self.subTest(wfm):
                der = self.issue(f"c{index}", f"spiffe://{domain}/margo/wfm/{wfm}/client/{client}")
                identity = margo_agent.make_identity(margo_agent.parse_certificate(der))
                self.assertEqual(identity.wfm_id, f"spiffe://{domain}/margo/wfm/{wfm}")
                self.assertEqual(identity.spiffe_id.text, f"spiffe://{domain}/margo/wfm/{wfm}/client/{client}")
                self.assertEqual(identity.leaf.der, der)

    def test_only_a_clients_id_makes_an_identity(self):
        """C-009: protocol 1.1."""
        for index, path in enumerate(("margo/wfm/main", "margo/wfm/main/client", "margo/wfm/main/client/a/b",
                                      "margo/wfm/a/b/client/c", "x/main/client/a",
                                      "margo/wfm/client/a", "Margo/wfm/main/client/a", "a/margo/wfm/main/client/a")):
            der = self.issue(f"c{index}", f"spiffe://{TRUST_DOMAIN}/{path}")
            with self.subTest(path), self.assertRaises(ValueError) as caught:
                margo_agent.make_identity(margo_agent.parse_certificate(der))
            self.assertIn(f"{path} is not a WFM client's id", str(caught.exception))

    def test_a_damaged_peer_certificate_is_untrusted_and_nothing_else(self):
        """C-011, C-013: wherever a byte is missing or another one; no damage of the id passes."""
        identity = margo_agent.make_identity(margo_agent.parse_certificate(self.pki.der("client.pem")))
        der = self.pki.der("wfm.pem")
        margo_agent.check_wfm(der, identity)
        for damaged in [None, b"", b"\x30", b"garbage"] + [der[:length] for length in range(len(der))]:
            with self.assertRaises(Untrusted) as caught:
                margo_agent.check_wfm(damaged, identity)
            self.assertIn("the WFM's certificate is no X.509-SVID", caught.exception.message)
        place = der.index(WFM_ID.encode())
        for index in range(len(der)):
            for bit in (0x01, 0x80):
                damaged = der[:index] + bytes([der[index] ^ bit]) + der[index + 1:]
                try:
                    margo_agent.check_wfm(damaged, identity)       # the signature is checked by OpenSSL before
                    self.assertNotIn(index, range(place, place + len(WFM_ID)))
                except Untrusted:
                    pass


class Bundles(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        folder = support.make_pki()
        with open(os.path.join(folder, "ca.pem")) as file:
            cls.pem = file.read()
        cls.der = base64.b64decode(cls.pem.split("-----")[2])
        with open(os.path.join(folder, "site-ca.pem")) as file:
            cls.other_pem = file.read()
        cls.other = base64.b64decode(cls.other_pem.split("-----")[2])

    def key(self, der=None, **members):
        return dict({"use": "x509-svid", "kty": "EC",
                     "x5c": [base64.b64encode(self.der if der is None else der).decode()]}, **members)

    def parse(self, *keys, **members):
        return margo_agent.parse_trust_bundle(json.dumps(dict({"keys": list(keys)}, **members)).encode())

    def test_the_anchors_are_the_x509_keys_and_unknown_members_are_ignored(self):
        """C-034, C-036: jwt-svid and keys of no known use are no anchors; the first of several x5c counts."""
        bundle = self.parse(
            self.key(), {"use": "jwt-svid", "kid": "a", "x5c": [base64.b64encode(self.other).decode()]}, {"x5c": ["!"]},
            {"use": "sig"}, "text",
            None, self.key(self.other, x5c=[base64.b64encode(self.other).decode(), "another"], vendor={}),
            spiffe_sequence=2 ** 60,
            spiffe_refresh_hint=600, vendor=[1])
        self.assertEqual(bundle, TrustBundle([self.der, self.other], 2 ** 60, 600))

    def test_pem_is_a_bundle_too(self):
        """C-006: every certificate in it is an anchor; text between them does not matter, nor the kind of line end."""
        for text in (self.pem + self.other_pem, "# Anlage S\u00fcd\n" + self.pem + "\nand\n" + self.other_pem,
                     (self.pem + self.other_pem).replace("\n", "\r\n")):
            self.assertEqual(margo_agent.parse_trust_bundle(text.encode()),
                             TrustBundle([self.der, self.other], None, None))

    def test_pem_within_json_is_a_member_that_nobody_knows(self):
        """C-034"""
        self.assertEqual(self.parse(self.key(), self.key(pem=self.pem), note=self.pem).anchors, [self.der, self.der])

    def test_numbers_that_make_no_sense_count_as_absent(self):
        """C-034."""
        for value in (None, True, False, -1, 1.5, "7", [], {}, 10 ** 400):
            self.assertEqual(self.parse(self.key(), spiffe_sequence=value, spiffe_refresh_hint=value)[1:], (None, None))
        self.assertEqual(self.parse(self.key(), spiffe_sequence=0, spiffe_refresh_hint=0)[1:], (0, 0))

    def test_a_bundle_without_anchors_is_rejected(self):
        """C-037: fail closed."""
        for keys in ([], [{"use": "jwt-svid"}], [self.key(use="X509-SVID")], [self.key(use=None)], [{}]):
            with self.subTest(keys), self.assertRaises(ValueError) as caught:
                self.parse(*keys)
            self.assertIn("no X.509 anchor", str(caught.exception))

    def test_one_bad_anchor_spoils_the_bundle(self):
        """C-037: half a bundle is none; the message says which key."""
        x5c = base64.b64encode(self.der).decode()
        for key in (self.key(x5c=None), self.key(x5c=[]), self.key(x5c=x5c), self.key(x5c=[7]), {"use": "x509-svid"}):
            with self.subTest(key), self.assertRaises(ValueError) as caught:
                self.parse(self.key(), key)
            self.assertIn("keys[1]", str(caught.exception))
        for text in ("", "!!!!", x5c[:-3], x5c[:100], x5c.replace("+", "-").replace("/", "_") + "_-",
                     x5c[:8] + "\n" + x5c[8:], x5c[:8] + "\u2028" + x5c[8:], "\u00e4" * 4,
                     base64.b64encode(b"no certificate").decode(), base64.b64encode(self.der + b"\x00").decode()):
            with self.subTest(text[:20]), self.assertRaises(ValueError):
                self.parse(self.key(), self.key(x5c=[text]))

    def test_what_is_no_bundle_is_rejected(self):
        """C-037."""
        for data in (b"", b"{", b"[]", b"null", b"{}", b'{"keys": {}}', b'{"keys": null}', b"<html>Log in</html>",
                     b"\xff\xfe", b'{"keys": [], "keys": []}',
                     b'{"keys": [], "x": NaN}', b"[" * 100000, b"-----BEGIN CERTIFICATE-----\nabc\n",
                     self.pem.replace("MI", "!!").encode(),
                     b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"):
            with self.subTest(data[:30]), self.assertRaises(ValueError):
                margo_agent.parse_trust_bundle(data)

    def test_a_sequence_never_goes_back_within_a_trust_domain(self):
        """C-043: the same number is no regression, no number is none either, and each trust domain has its own."""
        for known, domain, new, accepted in (
                (None, TRUST_DOMAIN, 1, True), (5, TRUST_DOMAIN, 6, True), (5, TRUST_DOMAIN, 5, True),
                (5, TRUST_DOMAIN, 4, False), (5, TRUST_DOMAIN, 0, False),
                (0, TRUST_DOMAIN, 0, True), (5, TRUST_DOMAIN, None, True), (None, TRUST_DOMAIN, None, True),
                (5, "other.example", 4, True),
                (2 ** 53 + 1, TRUST_DOMAIN, 2 ** 53, False)):
            data = json.dumps({"keys": [self.key()], "spiffe_sequence": new}).encode()
            with self.subTest(known=known, new=new, domain=domain):
                trust = {"sequence": known, "trustDomain": domain}
                if accepted:
                    margo_agent.check_sequence(margo_agent.parse_trust_bundle(data), trust, TRUST_DOMAIN)
                else:
                    with self.assertRaises(ValueError) as caught:
                        margo_agent.check_sequence(margo_agent.parse_trust_bundle(data), trust, TRUST_DOMAIN)
                    self.assertIn(f"spiffe_sequence went back from {known} to {new}", str(caught.exception))
        margo_agent.check_sequence(margo_agent.parse_trust_bundle(data), {}, TRUST_DOMAIN)


class Discovery(unittest.TestCase):
    URL = "https://mis.factory.example/.well-known/margo"

    def parse(self, document, public=True, url=URL):
        data = document if isinstance(document, bytes) else json.dumps(document).encode()
        return margo_agent.parse_discovery(data, url, TRUST_DOMAIN, public).bundle_uri

    def test_the_bundles_address_is_read_and_unknown_members_are_ignored(self):
        """C-034."""
        uri = "https://mis.factory.example/bundle"
        self.assertEqual(self.parse({"trustDomain": TRUST_DOMAIN, "trustBundleUri": uri, "estUri": 7, "crls": [{}]}),
                         uri)

    def test_an_absolute_https_url_is_taken_as_it_is(self):
        """C-033: a final slash and a query are part of it."""
        for uri in ("https://mis.factory.example/bundle/",
                    "https://mis.factory.example/bundle?domain=factory.example&format=spiffe",
                    "https://mis.factory.example"):
            with self.subTest(uri):
                self.assertEqual(self.parse({"trustDomain": TRUST_DOMAIN, "trustBundleUri": uri}), uri)

    def test_what_is_no_absolute_https_url_is_rejected(self):
        """C-033."""
        for uri in ("http://mis.factory.example/bundle", "/bundle", "//mis.factory.example/bundle", "bundle",
                    "file:///etc/passwd", "", "https://",
                    "https:///bundle", "ftp://mis.factory.example/", "https://user:word@mis.factory.example/",
                    "https://mis.factory.example/a b", "https://mis.factory.example/b\u00fcndel", "https://mis.factory.example/\x7f",
                    "https://mis.factory.example/#b", "https://mis.factory.example/a@b",
                    "https://mis.factory.example/\nHost: x", None, 7, True, ["https://mis.factory.example/"]):
            with self.subTest(uri), self.assertRaises(ValueError) as caught:
                self.parse({"trustDomain": TRUST_DOMAIN, "trustBundleUri": uri})
            self.assertIn("trustBundleUri", str(caught.exception))
        with self.assertRaises(ValueError) as caught:
            self.parse({"trustDomain": TRUST_DOMAIN})
        self.assertIn("trustBundleUri", str(caught.exception))

    def test_another_trust_domain_is_a_configuration_error(self):
        """C-035: both are named."""
        for domain in ("other.example", TRUST_DOMAIN.upper(), TRUST_DOMAIN + ".", "", "x\n"):
            with self.subTest(domain), self.assertRaises(ValueError) as caught:
                self.parse({"trustDomain": domain, "trustBundleUri": "https://mis.factory.example/bundle"})
            self.assertIn(f"the own SVID is of {TRUST_DOMAIN}", str(caught.exception))
            self.assertTrue(str(caught.exception).isprintable())

    def test_what_is_no_discovery_document_is_rejected(self):
        for data in (b"", b"<html>", b"[]", b"null", b"{}", b'{"trustDomain": 7}',
                     b'{"trustDomain": "a", "trustDomain": "b"}', b"\xff", b"[" * 100000):
            with self.subTest(data[:30]), self.assertRaises(ValueError) as caught:
                self.parse(data)
            self.assertIn("the discovery document", str(caught.exception))

    def test_under_the_systems_store_the_bundle_has_the_documents_origin(self):
        """C-033: scheme, host and port; with anchors of one's own it may lie elsewhere."""
        for document, uri, same in (
                (self.URL, "https://mis.factory.example:443/x", True),
                (self.URL, "https://MIS.factory.example/x", True),
                ("https://mis.factory.example:8443/d", "https://mis.factory.example:8443/x", True),
                (self.URL, "https://mis.factory.example:8443/x", False),
                (self.URL, "https://bundle.factory.example/x", False),
                (self.URL, "https://mis.factory.example.evil.example/x", False),
                ("https://mis.factory.example:8443/d", "https://mis.factory.example/x", False)):
            with self.subTest(uri=uri, document=document):
                value = {"trustDomain": TRUST_DOMAIN, "trustBundleUri": uri}
                self.assertEqual(self.parse(value, public=False, url=document), uri)
                if same:
                    self.assertEqual(self.parse(value, url=document), uri)
                else:
                    with self.assertRaises(ValueError) as caught:
                        self.parse(value, url=document)
                    self.assertIn("another origin", str(caught.exception))


class LiveCase(support.SharedCase):
    """One example WFM for all tests of a class: it reads certificates for each connection, so tests bring their own."""

    options = ()

    @classmethod
    def start_services(cls):
        cls.wfm = support.Wfm(cls.shared, cls.pki, *cls.options)

    def setUp(self):
        for name in ("wfm.pem", "wfm.key", "bundle.json", "client.pem", "client.key"):
            support.write(self.pki.path(name), read(os.path.join(support.make_pki(), name)))
        with contextlib.suppress(FileNotFoundError):
            os.remove(self.wfm.path("state", "faults.json"))
        self.device = support.Device(self, self.pki, self.wfm, settings={"runtime.compose": "off"})
        change_environment(self, **self.device.env)
        self.folder, self.issued = support.make_folder(self), 0
        self.start = len(self.wfm.lines("requests.jsonl"))

    def issue(self, *uris, **options):
        """A new certificate's name; see Pki.issue."""
        type(self).count = getattr(type(self), "count", 0) + 1
        name = f"made-{self.count}"
        self.pki.issue(name, uris, **options)
        return name

    def install(self, *names):
        """The WFM's certificate chain from now on; the first is the leaf, whose key goes with it."""
        support.write(self.pki.path("wfm.key"), read(self.pki.path(f"{names[0]}.key")))
        support.write(self.pki.path("wfm.pem"), b"".join(read(self.pki.path(f"{name}.pem")) for name in names))

    def carry(self, *names):
        """The device's own certificate chain from now on."""
        self.device.set("identity.key", self.pki.path(f"{names[0]}.key"))
        chain = b"".join(read(self.pki.path(f"{name}.pem")) for name in names)
        self.device.set("identity.certificate", support.write(os.path.join(self.folder, f"{names[0]}.pem"), chain))

    def requests(self, listener="listening"):
        """Requests of this test."""
        return [item for item in self.wfm.lines("requests.jsonl")[self.start:] if item["listener"] == listener]

    def enroll(self, expected=0, *words, process=False, **env):
        """`enroll` with the exit code expected and every word on stderr; the same as a process where that is wanted."""
        if process:
            done = self.device.run("enroll", env=env)
            code, output = done.returncode, done.stderr
        else:
            code, _, output = call(self.device, "enroll", **env)
        self.assertEqual(code, expected, output)
        self.assertNotIn("bug:", output)
        for word in words:
            self.assertIn(word, output)

    def cycle(self, expected=0):
        """One cycle with the exit code expected; returns its log."""
        with contextlib.redirect_stderr(io.StringIO()) as output:
            outcome = margo_agent.Agent(margo_agent.load_config(self.device.config_file)).cycle()
        self.assertEqual(outcome.code, expected, output.getvalue())
        return output.getvalue()

    def status(self):
        """`status --json`."""
        return json.loads(call(self.device, "status", "--json")[1])

    def assert_refused(self, *words, **options):
        """`enroll` ends with 5 and says why, and the WFM never gets a request."""
        self.enroll(5, *words, **options)
        self.assertEqual(self.requests(), [])

    def assert_accepted(self, client=CLIENT_ID, process=False):
        """`enroll` reports the capabilities, as the client that the SVID says."""
        before = len(self.requests())
        self.enroll(process=process)
        self.assertEqual([(item["method"], item["client"]) for item in self.requests()[before:]],
                         [("PUT", client.split("/")[-1])])


class Peers(LiveCase):
    def test_the_expected_wfm_is_accepted(self):
        """C-005, C-020: ECDSA P-256 on both sides; the SVID alone says who asks."""
        self.assert_accepted(process=True)
        headers = {name.lower() for name in self.requests()[0]["headers"]}
        self.assertEqual(headers, {"host", "user-agent", "connection", "accept-encoding", "content-type",
                                   "content-length"})
        self.assertNotIn(CLIENT_ID, json.dumps(self.requests()[0]["headers"]))

    def test_a_peer_that_is_not_the_own_wfm_gets_no_request(self):
        """C-009, C-010, C-012, C-013, C-015: by its id alone, though the trust anchor vouches for it."""
        for uri, words in (
                (f"spiffe://{TRUST_DOMAIN}/margo/wfm/other",
                 f"the peer is spiffe://{TRUST_DOMAIN}/margo/wfm/other, this client's WFM is {WFM_ID}"),
                (WFM_ID + "2", f"the peer is {WFM_ID}2"), (WFM_ID + "/x", f"the peer is {WFM_ID}/x"),
                (WFM_ID.replace("main", "Main"), "this client's WFM is " + WFM_ID),
                (CLIENT_ID, f"the peer is {CLIENT_ID}"),
                ("spiffe://other.example/margo/wfm/main",
                 f"the peer is spiffe://other.example/margo/wfm/main, this client's WFM is {WFM_ID}"),
                (f"spiffe://{TRUST_DOMAIN}", "is not a SPIFFE ID with a path"),
                (f"https://{TRUST_DOMAIN}/margo/wfm/main", "is not a SPIFFE ID")):
            with self.subTest(uri):
                self.install(self.issue(uri))
                self.assert_refused(words, process=uri == CLIENT_ID)

    def test_a_peer_whose_leaf_is_no_svid_gets_no_request(self):
        """C-011, C-013: one URI, no CA, no right to sign."""
        for uris, options, words in (
                ([], {}, "subjectAltName holds 0 URIs"),
                ([WFM_ID, "https://wfm.factory.example/"], {}, "subjectAltName holds 2 URIs"),
                ([WFM_ID, WFM_ID], {}, "subjectAltName holds 2 URIs"), ([WFM_ID], {"ca": True}, "basicConstraints"),
                ([WFM_ID], {"usage": "digitalSignature, keyCertSign"}, "keyUsage"),
                ([WFM_ID], {"usage": "digitalSignature, cRLSign"}, "keyUsage")):
            with self.subTest(words, options=options):
                self.install(self.issue(*uris, **options))
                self.assert_refused("the WFM's certificate is no X.509-SVID", words)

    def test_a_peer_out_of_its_time_gets_no_request(self):
        """C-007, C-019, P-2: and the message asks for the clock."""
        for start, end, words in (("-3d", "-1d", "expired"), ("+1d", "+3d", "not yet valid")):
            with self.subTest(words):
                self.install(self.issue(WFM_ID, start=start, end=end))
                self.assert_refused(words, "clock of this device", process=True)

    def test_a_peer_of_no_known_anchor_gets_no_request(self):
        """C-006, C-031: another authority's, a self-signed one with the right id, one whose intermediate is missing."""
        middle = self.issue(ca=True, usage="keyCertSign")
        for signer in ("site-ca", None, middle):
            with self.subTest(signer):
                self.install(self.issue(WFM_ID, signer=signer))
                self.assert_refused("the peer's certificate is refused")

    def test_the_systems_store_is_not_asked(self):
        """C-006: a bundle that does not know the WFM's authority is not helped by a system that does."""
        self.device.set("identity.trust_bundle", self.pki.path("site-ca.pem"))
        self.carry(self.issue(CLIENT_ID, signer="site-ca"))
        self.assert_refused("the peer's certificate is refused", process=True,
                            SSL_CERT_FILE=self.pki.path("ca.pem"), SSL_CERT_DIR=self.pki.folder)

    def test_a_matching_host_name_is_no_identity(self):
        """C-014: neither beside a wrong id nor in place of one."""
        names = "subjectAltName = DNS:localhost, DNS:wfm.factory.example, IP:127.0.0.1"
        for extra, words in ((f"{names}, URI:{WFM_ID}2", f"the peer is {WFM_ID}2"),
                             (names, "subjectAltName holds 0 URIs")):
            self.install(self.issue(extra=extra))
            self.assert_refused(words)
        self.install(self.issue(extra=f"subjectAltName = DNS:elsewhere.example, URI:{WFM_ID}"))
        self.assert_accepted()

    def test_nothing_is_fetched_to_validate_a_peer(self):
        """C-008: neither an intermediate by AIA, nor a CRL, nor OCSP."""
        listener = socket.socket()
        self.addCleanup(listener.close)
        listener.bind(("127.0.0.1", 0))
        listener.listen(5)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        middle = self.issue(ca=True, usage="keyCertSign")
        extra = (f"authorityInfoAccess = caIssuers;URI:{url}/a.cer, OCSP;URI:{url}/ocsp\n"
                 f"crlDistributionPoints = URI:{url}/a.crl")
        leaf = self.issue(WFM_ID, signer=middle, extra=extra)
        self.install(leaf)
        self.assert_refused("the peer's certificate is refused")
        self.install(leaf, middle)
        self.assert_accepted()
        listener.setblocking(False)
        self.assertRaises(BlockingIOError, listener.accept)

    def test_chains_with_an_intermediate_are_accepted_on_both_sides(self):
        """C-004, C-006: leaf first, then what leads to the anchor, all in identity.certificate."""
        middle = self.issue(ca=True, usage="keyCertSign")
        self.install(self.issue(WFM_ID, signer=middle), middle)
        self.assert_accepted()
        client = self.issue(CLIENT_ID, signer=middle)
        self.carry(client, middle)
        self.assert_accepted()

    def test_other_key_types_are_accepted_on_both_sides(self):
        """C-005: beside P-256 what protocol 1.2 allows."""
        for key in ("P-384", "RSA", "Ed25519"):
            with self.subTest(key):
                name = self.issue(WFM_ID, key=key)
                self.install(name)
                support.write(self.pki.path("san.cnf"),
                              f"subjectAltName = URI:{CLIENT_ID}\nkeyUsage = critical, digitalSignature\n")
                self.pki.run("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-set_serial",
                             "77", "-days", "9", "-extfile", "san.cnf", "-out", f"{name}.pem")    # of the same key
                self.carry(name)
                self.assert_accepted()

    def test_an_anchor_need_not_be_self_signed(self):
        """C-006: a bundle whose anchor is an intermediate; what it did not sign is refused all the same."""
        middle = self.issue(ca=True, usage="keyCertSign")
        support.write(os.path.join(self.folder, "bundle.json"), json.dumps({"keys": [
            {"use": "x509-svid", "x5c": [base64.b64encode(self.pki.der(f"{middle}.pem")).decode()]}]}))
        self.device.set("identity.trust_bundle", os.path.join(self.folder, "bundle.json"))
        self.carry(self.issue(CLIENT_ID, signer=middle), middle)
        self.assert_refused("the peer's certificate is refused")
        self.install(self.issue(WFM_ID, signer=middle))
        self.assert_accepted()

    def test_any_anchor_of_the_bundle_will_do_also_in_pem(self):
        """C-006: as while an authority is exchanged for the next."""
        bundle = support.write(os.path.join(self.folder, "anchors.pem"),
                               read(self.pki.path("site-ca.pem")) + read(self.pki.path("ca.pem")))
        self.device.set("identity.trust_bundle", bundle)
        self.assert_accepted()
        self.install(self.issue(WFM_ID, signer="site-ca"))
        self.assert_accepted()

    def test_another_client_id_needs_an_unenrollment(self):
        """C-052: one relationship at a time; the message names both ids."""
        self.assert_accepted()
        self.carry(self.issue(CLIENT_ID + "x"))
        self.start = len(self.wfm.lines("requests.jsonl"))
        self.assert_refused(CLIENT_ID + "x", f"enrolled as {CLIENT_ID};", "unenroll first")

    def test_a_renewed_svid_is_used_without_a_restart(self):
        """C-017, P-3, D-32: one process, first with an expired SVID, then with its successor in the same files."""
        self.carry(self.issue(CLIENT_ID, start="-3d", end="-1d"))
        agent = margo_agent.Agent(margo_agent.load_config(self.device.config_file))
        files = self.device.settings["identity"]
        with contextlib.redirect_stderr(io.StringIO()) as output:
            self.assertEqual(agent.cycle().code, 5)
            self.assertIn("expired at", output.getvalue())
            self.assertEqual(self.requests(), [])
            new = self.issue(CLIENT_ID)
            for kind, path in (("pem", files["certificate"]), ("key", files["key"])):
                support.write(path, read(self.pki.path(f"{new}.{kind}")))
            self.assertEqual(agent.cycle().code, 0, output.getvalue())
        self.assertEqual([item["method"] for item in self.requests()], ["PUT", "GET"])


class OldTls(LiveCase):
    options = ("--tls", "1.2")

    def test_tls_1_2_is_refused_unless_it_is_configured(self):
        """C-001, C-002: the fallback is the operator's choice, and the same checks hold."""
        self.assert_refused("TLS failed", process=True)
        self.device.set("wfm.min_tls", "1.2")
        self.assert_accepted(process=True)
        self.start = len(self.wfm.lines("requests.jsonl"))
        self.install(self.issue(WFM_ID + "2"))
        self.assert_refused(f"the peer is {WFM_ID}2")


class OwnFiles(LiveCase):
    def fault(self, *words, key="certificate", process=False):
        """`enroll` ends with 5 and names the setting, the file and what is wrong with it."""
        self.assert_refused(f"identity.{key} {self.device.settings['identity'][key]}", *words, process=process)

    def put(self, key, data):
        """Another file for a setting."""
        self.device.set(f"identity.{key}", support.write(os.path.join(self.folder, key), data))

    def test_a_missing_certificate_tells_how_to_come_by_one(self):
        self.device.set("identity.certificate", os.path.join(self.folder, "none.pem"))
        self.fault("there is no such file", "csr", process=True)

    def test_a_file_that_holds_no_certificate_is_named(self):
        pem = read(self.pki.path("client.pem")).decode()
        for data, words in (
                (b"", "it holds no certificate in PEM"), (b"hello", "it holds no certificate in PEM"),
                (read(self.pki.path("client.key")), "it holds a private key and no certificate in PEM"),
                (pem.split("-----END")[0], "not closed"), (b"\xff\xfe\x00" * 99, "it holds no certificate in PEM"),
                ("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "not a readable X.509 certificate"),
                (pem.replace("MII", "AAA", 1), "not a readable X.509 certificate")):
            with self.subTest(data[:30]):
                self.put("certificate", data)
                self.fault(words)

    def test_an_svid_out_of_its_time_is_named_with_the_clock(self):
        """C-007, C-019, P-2, P-3."""
        for start, end, words in (("-3d", "-1d", "expired at"), ("+1d", "+3d", "not valid before")):
            with self.subTest(words):
                self.carry(self.issue(CLIENT_ID, start=start, end=end))
                self.fault(words, "the clock of this device says", process=True)

    def test_a_certificate_that_is_no_clients_svid_is_named(self):
        """C-004, C-009, C-011."""
        for uris, options, words in (
                ([WFM_ID], {}, f"{WFM_ID} is not a WFM client's id"), ([], {}, "subjectAltName holds 0 URIs"),
                ([CLIENT_ID, WFM_ID], {}, "subjectAltName holds 2 URIs"),
                ([CLIENT_ID], {"ca": True}, "basicConstraints"),
                ([CLIENT_ID], {"usage": "digitalSignature, keyCertSign"}, "keyUsage")):
            with self.subTest(words):
                self.carry(self.issue(*uris, **options))
                self.fault(words)

    def test_a_key_that_cannot_be_used_is_named(self):
        """C-018: no password is asked for, and no key is shown."""
        self.pki.run("pkey", "-in", "client.key", "-aes256", "-passout", "pass:secret", "-out", "encrypted.key")
        for data, words in (
                (read(self.pki.path("wfm.key")), "not the key of identity.certificate"),
                (read(self.pki.path("encrypted.key")), "is encrypted"),
                (b"garbage", "no private key in PEM"), (b"", "no private key in PEM"), (read(self.pki.path("client.pem")), "no private key in PEM")):
            with self.subTest(words):
                self.put("key", data)
                self.fault(words, key="key", process="encrypted" in words)
        self.device.set("identity.key", os.path.join(self.folder, "none.key"))
        self.fault("there is no such file", key="key")
        self.device.set("identity.key", self.folder)
        self.fault("or is unreadable", key="key")

    def test_a_trust_bundle_file_that_cannot_be_used_is_named(self):
        """C-037: fail closed, and the mend is not a look into a traceback."""
        for data, words in ((b'{"keys": []}', "no X.509 anchor"), (b"<html>", "JSON"), (b"", "JSON")):
            with self.subTest(data):
                self.put("trust_bundle", data)
                self.fault(words, key="trust_bundle")
        self.device.set("identity.trust_bundle", os.path.join(self.folder, "none.json"))
        self.fault("there is no such file", key="trust_bundle")

    def test_workloads_run_on_with_an_expired_svid(self):
        """P-2, P-3: nothing is stopped or removed, and one that died meanwhile is started again."""
        engine = support.FakeEngine(self)
        self.wfm.add_package(support.make_compose())
        self.wfm.publish(support.make_deployment(registry=self.wfm.registry))
        self.addCleanup(self.wfm.withdraw)
        self.device = support.Device(self, self.pki, self.wfm, engine, {"runtime.compose": "builtin"})
        self.device.cycle()
        before = engine.containers()
        self.assertEqual(len(before), 1)
        for start, end in (("-3d", "-1d"), ("+1d", "+3d")):
            engine.forget_calls()
            self.carry(self.issue(CLIENT_ID, start=start, end=end))
            self.assertIn("identity.certificate", self.device.cycle(5))
            self.assertEqual(engine.containers(), before)
            self.assertEqual([call for call in engine.calls()
                              if {"rm", "stop", "kill", "create", "run"} & set(call[:2])], [])
        self.assertEqual(self.device.status()["lastPoll"]["result"], "untrusted")


class Expiry(LiveCase):
    def find_warnings(self):
        """What one cycle logs about the own certificate."""
        return [line for line in self.cycle().splitlines() if "own certificate" in line]

    def test_a_fifth_of_the_lifetime_before_the_end_is_told_once_a_day(self):
        """P-3: in the log and in `status --json`."""
        self.carry(self.issue(CLIENT_ID, start="-30d", end="+5d"))
        lines = self.find_warnings()
        self.assertEqual(len(lines), 1, lines)
        self.assertIn("warning", lines[0])
        self.assertRegex(lines[0], "expires in [45] days, at 20")
        self.assertEqual(self.find_warnings(), [])
        identity = self.status()["identity"]
        self.assertRegex(identity["warning"], "expires in [45] days")
        self.assertIn(identity["notAfter"], lines[0])
        self.assertEqual(identity["id"], CLIENT_ID)

    def test_a_key_that_others_can_read_is_told_once_a_day(self):
        """By name and mode; with 0600 nothing is said."""
        name = self.issue(CLIENT_ID)
        self.carry(name)
        os.chmod(self.pki.path(f"{name}.key"), 0o600)
        self.assertNotIn("chmod", self.cycle())
        os.chmod(self.pki.path(f"{name}.key"), 0o640)
        self.assertIn(f"warning identity.key {self.pki.path(name + '.key')} has mode 0640; chmod 0600 it", self.cycle())
        self.assertNotIn("chmod", self.cycle())

    def test_before_that_there_is_no_warning(self):
        self.carry(self.issue(CLIENT_ID, start="-30d", end="+11d"))
        self.assertEqual(self.find_warnings(), [])
        self.assertEqual(self.status()["identity"]["warning"], "")

    def test_the_share_counts_not_the_days(self):
        """P-3: certificates of a day and of ten years are warned of in time alike."""
        config = margo_agent.load_config(self.device.config_file)
        for lifetime in (86400, 90 * 86400, 3650 * 86400):
            name = self.issue(CLIENT_ID, start="-60", end=str(lifetime - 60))
            config.identity["certificate"] = self.pki.path(f"{name}.pem")
            end = margo_agent.load_identity(config).leaf.not_after
            for left, words in ((0.21, ""), (0.19, "expires in"), (-0.01, "expired")):
                with self.subTest(lifetime=lifetime, left=left):
                    profile = margo_agent.PROFILES["mtls"](config, margo_agent.Store(config.state_dir), margo_agent.make_state())
                    self.assertEqual(profile.describe(end - left * lifetime)["warning"][:len(words) or None], words)

    def test_status_tells_what_is_wrong_with_the_own_svid(self):
        """P-3: without network and without failing."""
        self.device.set("identity.certificate", "/no/such.pem")
        self.assertIn("/no/such.pem: there is no such file", self.status()["identity"]["warning"])


class RemoteCase(LiveCase):
    """A trust bundle from the example's identity service; `refresh` is one look at it at a time of choice."""

    options = ("--mis", "127.0.0.1:0")

    def setUp(self):
        super().setUp()
        self.mis = self.wfm.wait_for_line("mis ").replace("127.0.0.1", "localhost")
        self.device.set("identity.trust_bundle", self.mis + BUNDLE)
        self.device.set("identity.ca", self.pki.path("site-ca.pem"))
        self.store = margo_agent.Store(self.device.state_dir)
        self.store.create()
        self.state = margo_agent.make_state()

    def refresh(self, now=NOW):
        """What refresh_trust_bundle returns, and what it logs."""
        config = margo_agent.load_config(self.device.config_file)
        with contextlib.redirect_stderr(io.StringIO()) as output:
            bundle = margo_agent.obtain_trust_bundle(config, self.store, self.state, TRUST_DOMAIN, now)
        return bundle, output.getvalue()

    def refuse(self, *kinds, now=NOW):
        """The exception of a refresh, which is of one of these kinds."""
        with self.assertRaises(margo_agent.MargoError) as caught:
            self.refresh(now)
        self.assertIn(type(caught.exception), kinds, caught.exception.message)
        return caught.exception.message

    def cached(self):
        """The bytes of trust-bundle.json, None where there is none."""
        return margo_agent.read_file(self.store.path("trust-bundle.json"), 10 ** 6)

    def asked(self):
        """[(path, status)] of the requests to the identity service since the last call."""
        found = [(item["path"], item["status"]) for item in self.requests("mis")]
        self.start = len(self.wfm.lines("requests.jsonl"))
        return found

    def anchors(self, *names):
        return [self.pki.der(name) for name in names]


ANSWERS = {                     # answers of an identity service that are no bundle, and what the reason mentions
    "no anchors": ({"body": '{"keys": []}'}, "no X.509 anchor"), "no JSON": ({"body": "{"}, "JSON"),
    "nothing": ({"body": ""}, "JSON"),
    "a portal": ({"body": "<html>Log in</html>", "headers": {"Content-Type": "text/html"}}, "JSON"),
    "404": ({"problem": "spiffe-bundle-not-found"}, "404"),
    "404, again later": ({"problem": {"status": 404, "retryable": True}}, "404"),
    "403": ({"status": 403}, "403"), "401": ({"status": 401}, "401"), "500": ({"status": 500}, "500"),
    "503": ({"status": 503}, "503"),
    "a redirect": ({"status": 302, "headers": {"Location": "https://localhost/"}}, "302"),
    "a cut": ({"truncate": 20}, "cut short"),
    "silence": ({"close": True}, "closed connection"), "too long": ({"body": " " * (1024 * 1024 + 1)}, "longer than")}


class RemoteBundle(RemoteCase):
    def test_it_is_fetched_once_and_cached_for_its_owner(self):
        """E-004, C-040, C-042, C-045: until the hint has passed nothing is asked, whatever identity.refresh says."""
        self.device.set("identity.refresh", "1m")
        bundle, output = self.refresh()
        self.assertEqual(bundle, TrustBundle(self.anchors("ca.pem"), 1, 3600))
        self.assertIn(f"new trust bundle source={self.mis}{BUNDLE} anchors=1 sequence=1", output)
        self.assertEqual(self.cached(), read(self.pki.path("bundle.json")))
        self.assertEqual(stat.S_IMODE(os.stat(self.store.path("trust-bundle.json")).st_mode), 0o600)
        self.assertEqual(self.requests("mis")[0]["headers"]["Accept"], "application/json")
        self.assertEqual(self.asked(), [(BUNDLE, 200)])
        for later in (0, 1, 3599):
            self.assertEqual(self.refresh(NOW + later), (bundle, ""))
        self.assertEqual(self.asked(), [])

    def test_it_is_asked_for_again_when_the_hint_has_passed(self):
        """C-040: where it is the same, the cache stays as it is."""
        self.device.set("identity.refresh", "1d")
        bundle = self.refresh()[0]
        before = os.stat(self.store.path("trust-bundle.json"))
        self.asked()
        self.assertEqual(self.refresh(NOW + 3600), (bundle, ""))
        self.assertEqual(self.asked(), [(BUNDLE, 200)])
        self.assertEqual(os.stat(self.store.path("trust-bundle.json")), before)

    def test_without_a_hint_the_configuration_says_when(self):
        """C-040: identity.refresh."""
        self.pki.write_bundle("ca.pem")
        self.device.set("identity.refresh", "5m")
        self.refresh()
        self.refresh(NOW + 299)
        self.assertEqual(self.asked(), [(BUNDLE, 200)])
        self.refresh(NOW + 300)
        self.assertEqual(self.asked(), [(BUNDLE, 200)])

    def test_a_hint_counts_for_a_day_at_most(self):
        """C-040, case 4.13: one of years would keep an anchor that was withdrawn; what the configuration says counts whole."""
        self.device.set("identity.refresh", "3d")
        for start, hint, period in ((NOW, 10 ** 9, 86400), (NOW + 10 ** 7, None, 3 * 86400)):
            self.pki.write_bundle("ca.pem", **{"spiffe_refresh_hint": hint} if hint else {})
            self.refresh(start)
            self.asked()
            for later, asked in ((period - 1, 0), (period, 1)):
                self.refresh(start + later)
                self.assertEqual(len(self.asked()), asked)

    def test_http_caching_does_not_defer_a_refresh(self):
        """C-041."""
        self.wfm.fault({"path": BUNDLE, "headers": {"Cache-Control": "max-age=86400, immutable",
                                                    "Expires": "Fri, 31 Dec 2100 23:59:59 GMT"}})
        self.refresh()
        self.pki.write_bundle("ca.pem", spiffe_sequence=2)
        self.assertEqual(self.refresh(NOW + 3600)[0].sequence, 2)
        self.assertEqual(self.asked(), [(BUNDLE, 200), (BUNDLE, 200)])

    def test_a_clock_set_back_asks_again(self):
        """C-040, P-2: a device that once was in the future is not bound to it."""
        self.refresh(NOW + 10 ** 8)
        self.refresh()
        self.assertEqual(self.asked(), [(BUNDLE, 200), (BUNDLE, 200)])

    def test_a_new_bundle_replaces_all_anchors(self):
        """C-038, C-039: never old and new together."""
        self.refresh()
        self.pki.write_bundle("site-ca.pem", spiffe_sequence=2)
        bundle, output = self.refresh(NOW + 3600)
        self.assertEqual(bundle.anchors, self.anchors("site-ca.pem"))
        self.assertIn("new trust bundle", output)
        self.assertEqual(self.cached(), read(self.pki.path("bundle.json")))
        self.assertEqual(self.refresh(NOW + 3700)[0].anchors, self.anchors("site-ca.pem"))

    def test_a_lower_sequence_keeps_the_bundle_at_hand(self):
        """C-043: it is logged with both numbers, and a higher one is accepted afterwards."""
        self.pki.write_bundle("ca.pem", spiffe_sequence=7)
        self.refresh()
        old = self.cached()
        self.pki.write_bundle("site-ca.pem", spiffe_sequence=6)
        bundle, output = self.refresh(NOW + 3600)
        self.assertEqual(bundle.anchors, self.anchors("ca.pem"))
        self.assertIn("spiffe_sequence went back from 7 to 6", output)
        self.assertEqual((self.cached(), self.state["trust"]["sequence"]), (old, 7))
        self.pki.write_bundle("site-ca.pem", spiffe_sequence=8)
        self.assertEqual(self.refresh(NOW + 7200)[0].anchors, self.anchors("site-ca.pem"))

    def test_whatever_is_no_bundle_keeps_the_one_at_hand(self):
        """C-037, C-038, C-042: with a warning that says why; the next good answer is taken."""
        bundle = self.refresh()[0]
        old = self.cached()
        for number, (name, (fault, word)) in enumerate(ANSWERS.items(), 1):
            with self.subTest(name):
                # else the answer would be 304
                self.pki.write_bundle("ca.pem", "site-ca.pem", spiffe_sequence=1 + number)
                self.wfm.fault(dict(fault, path=BUNDLE))
                kept, output = self.refresh(NOW + 3600 * number)
                self.assertEqual((kept, self.cached()), (bundle, old))
                self.assertIn("the one at hand stays in use", output)
                self.assertIn(word, output)
        self.wfm.fault()
        self.assertEqual(len(self.refresh(NOW + 10 ** 6)[0].anchors), 2)

    def test_without_a_bundle_at_hand_all_of_that_ends_in_3_or_5(self):
        """C-031, C-037: fail closed; it is no refusal of a desired state, and nothing is cached."""
        for name, (fault, word) in ANSWERS.items():
            with self.subTest(name):
                self.wfm.fault(dict(fault, path=BUNDLE))
                self.assertIn(word, self.refuse(Unreachable, Untrusted))
                self.assertIsNone(self.cached())
                self.assertEqual({"source", "sequence", "refreshedAt"} & set(self.state["trust"]), set())

    def test_a_304_that_nobody_asked_for_is_no_bundle(self):
        """C-037: without a bundle at hand there is nothing that could be unchanged."""
        self.wfm.fault({"path": BUNDLE, "status": 304})
        self.assertIn("HTTP 304", self.refuse(Untrusted))
        self.assertIsNone(self.cached())

    def test_an_identity_service_that_is_away_keeps_the_bundle_at_hand(self):
        """C-038, C-042, D-29: an offline device validates with what it has."""
        bundle = self.refresh()[0]
        self.device.set("identity.trust_bundle", f"https://localhost:{support.free_port()}/bundle")
        kept, output = self.refresh(NOW + 3600)
        self.assertEqual(kept, bundle)
        self.assertIn("refused", output)

    def test_a_service_that_asks_for_patience_gets_it(self):
        """C-056: by its header or its problem document, over restarts; `retry` asks again, and so does a clock that was far ahead."""
        bundle = self.refresh()[0]
        for fault in ({"status": 503, "headers": {"Retry-After": "7200"}},
                      {"problem": {"status": 404, "retryable": True, "retryAfterSeconds": 7200}}):
            self.wfm.fault(dict(fault, path=BUNDLE))
            self.asked()
            for later in (3600, 3601, 10799):
                self.assertEqual(self.refresh(NOW + later)[0], bundle)
            self.assertEqual(len(self.asked()), 1)
            for later in (10800, -10 ** 6):
                self.refresh(NOW + later)
                self.assertEqual(len(self.asked()), 1)
            self.store.save_state(self.state)
            self.assertGreater(self.store.load_state()["trust"]["quiet"], NOW - 10 ** 6)
            self.device.run("retry")
            self.state = self.store.load_state()
            self.assertNotIn("quiet", self.state["trust"])

    def test_without_a_bundle_at_hand_an_absent_service_is_unreachable(self):
        url = f"https://localhost:{support.free_port()}/bundle"
        self.device.set("identity.trust_bundle", url)
        self.assertIn(url, self.refuse(Unreachable))
        self.enroll(3, url)

    def test_a_service_that_stalls_is_unreachable_within_the_time_out(self):
        """D-32: fetching the bundle has a deadline."""
        self.wfm.fault({"path": BUNDLE, "delay": 30})
        self.device.set("wfm.timeout", "0.3s")
        self.assertIn("timed out", self.refuse(Unreachable))

    def test_a_cache_that_the_disk_spoilt_is_fetched_anew_and_whole(self):
        """C-042."""
        for data in (None, b"", b"garbage", b'{"keys": []}'):
            with self.subTest(data):
                self.refresh()
                if data is None:
                    os.remove(self.store.path("trust-bundle.json"))
                else:
                    support.write(self.store.path("trust-bundle.json"), data)
                self.asked()
                self.assertEqual(self.refresh(NOW + 1)[0].anchors, self.anchors("ca.pem"))
                self.assertEqual(self.asked(), [(BUNDLE, 200)])
                self.assertEqual(self.cached(), read(self.pki.path("bundle.json")))

    def test_the_same_bundle_from_another_address_is_kept_with_that(self):
        """C-043: what is remembered of a service names it."""
        self.refresh()
        url = self.mis.replace("localhost", "127.0.0.1") + BUNDLE
        self.device.set("identity.trust_bundle", url)
        self.asked()
        self.refresh(NOW + 3600)
        self.assertEqual((self.asked(), self.state["trust"]["source"]), ([(BUNDLE, 200)], url))

    def test_the_service_is_authenticated_by_its_own_anchors_each_time(self):
        """C-030, C-031, C-032, C-044: another authority, another name, or one that only the bundle knows is refused."""
        server = {name: read(self.pki.path(name)) for name in ("site.pem", "site.key")}
        self.addCleanup(lambda: [support.write(self.pki.path(name), data) for name, data in server.items()])
        wrong = [self.issue(signer="site-ca", extra="subjectAltName = DNS:mis.factory.example"),
                 self.issue(signer=None, extra="subjectAltName = DNS:localhost"),
                 self.issue(signer="ca", extra="subjectAltName = DNS:localhost"),
                 self.issue(signer="site-ca", extra="subjectAltName = DNS:localhost", start="-3d", end="-1d")]
        for known in (False, True):
            if known:
                for name, data in server.items():
                    support.write(self.pki.path(name), data)
                bundle = self.refresh()[0]
            self.asked()
            for number, name in enumerate(wrong, 1):
                with self.subTest(name, known=known):
                    for kind in ("pem", "key"):
                        support.write(self.pki.path(f"site.{kind}"), read(self.pki.path(f"{name}.{kind}")))
                    if known:
                        kept, output = self.refresh(NOW + 3600 * number)
                        self.assertEqual(kept, bundle)
                    else:
                        output = self.refuse(Untrusted)
                    self.assertIn("certificate is refused", output)
            self.assertEqual(self.asked(), [])

    def test_without_identity_ca_the_systems_store_decides(self):
        """C-030: for the identity service; the WFM is still a matter of the bundle."""
        self.device.set("identity.ca", None)
        self.assertIn("certificate is refused", self.refuse(Untrusted))
        with mock.patch.dict(os.environ, {"SSL_CERT_FILE": self.pki.path("site-ca.pem")}):
            self.assertEqual(self.refresh()[0].anchors, self.anchors("ca.pem"))

    def test_an_anchors_file_that_is_missing_is_named(self):
        self.device.set("identity.ca", "/no/such-ca.pem")
        self.assertIn("/no/such-ca.pem", self.refuse(Untrusted))


class RemoteDiscovery(RemoteCase):
    def setUp(self):
        super().setUp()
        self.device.set("identity.trust_bundle", None)
        self.device.set("identity.discovery", self.mis + DISCOVERY)

    def document(self, uri=None, domain=TRUST_DOMAIN, **fault):
        """Another discovery document from now on."""
        body = json.dumps({"trustDomain": domain, "trustBundleUri": uri or self.mis + BUNDLE})
        self.wfm.fault(dict({"path": DISCOVERY, "body": body}, **fault))

    def test_the_document_leads_to_the_bundle(self):
        """C-045: both are asked for as JSON, and asked again when due."""
        self.assertEqual(self.refresh()[0].anchors, self.anchors("ca.pem"))
        self.assertEqual([item["headers"]["Accept"] for item in self.requests("mis")], ["application/json"] * 2)
        self.assertEqual(self.asked(), [(DISCOVERY, 200), (BUNDLE, 200)])
        self.refresh(NOW + 3600)
        self.assertEqual(self.asked(), [(DISCOVERY, 200), (BUNDLE, 200)])

    def test_a_document_that_is_refused_leads_nowhere(self):
        """C-033, C-035: fail closed without a bundle, else keep it; the bundle's address is not visited."""
        table = ((f"http://localhost:{support.free_port()}/b", TRUST_DOMAIN, "trustBundleUri"),
                 ("/b", TRUST_DOMAIN, "trustBundleUri"),
                 (None, "other.example", "it is for trust domain other.example"))
        for uri, domain, words in table:
            with self.subTest(words):
                self.document(uri, domain)
                message = self.refuse(Untrusted)
                self.assertIn(words, message)
                self.assertIn(f"identity.discovery {self.mis}{DISCOVERY}", message)
        self.assertEqual({path for path, _ in self.asked()}, {DISCOVERY})
        self.wfm.fault()
        bundle = self.refresh()[0]
        for number, (uri, domain, words) in enumerate(table, 1):
            self.document(uri, domain)
            kept, output = self.refresh(NOW + 3600 * number)
            self.assertEqual(kept, bundle)
            self.assertIn(words, output)

    def test_under_the_systems_store_the_bundle_has_the_documents_origin(self):
        """C-033: localhost and 127.0.0.1 are the same server, but not the same origin."""
        elsewhere = self.mis.replace("localhost", "127.0.0.1") + BUNDLE
        self.document(elsewhere)
        self.assertEqual(self.refresh()[0].anchors, self.anchors("ca.pem"))
        os.remove(self.store.path("trust-bundle.json"))
        self.device.set("identity.ca", None)
        self.asked()
        with mock.patch.dict(os.environ, {"SSL_CERT_FILE": self.pki.path("site-ca.pem")}):
            self.assertIn(f"{elsewhere} is of another origin", self.refuse(Untrusted))
            self.assertEqual(self.asked(), [(DISCOVERY, 200)])
            self.wfm.fault()
            self.assertEqual(self.refresh()[0].anchors, self.anchors("ca.pem"))

    def test_the_bundles_origin_is_authenticated_too(self):
        """C-030: the document's word is not enough, even for a server of the own trust domain."""
        self.document(self.wfm.url + "/bundle")
        self.assertIn("certificate is refused", self.refuse(Untrusted))
        self.assertEqual(self.requests(), [])

    def test_a_missing_document_falls_back_to_the_configured_address(self):
        """C-046: on 404 and on nothing else."""
        self.device.set("identity.trust_bundle", self.mis + BUNDLE)
        self.wfm.fault({"path": DISCOVERY, "problem": "discovery-document-not-found"})
        self.assertEqual(self.refresh()[0].anchors, self.anchors("ca.pem"))
        self.assertEqual(self.asked(), [(DISCOVERY, 404), (BUNDLE, 200)])
        os.remove(self.store.path("trust-bundle.json"))
        for status in (403, 410, 500, 503):
            self.wfm.fault({"path": DISCOVERY, "status": status})
            with self.subTest(status):
                self.assertIn(str(status), self.refuse(Unreachable, Untrusted, Refused))
                self.assertEqual(self.asked(), [(DISCOVERY, status)])

    def test_a_missing_document_without_another_address_is_no_refusal_of_a_desired_state(self):
        """C-031, C-046: nobody is trusted, so the exit code is 3 or 5; the message names the address."""
        self.wfm.fault({"path": DISCOVERY, "problem": "discovery-document-not-found"})
        message = self.refuse(Unreachable, Untrusted)
        self.assertIn(self.mis + DISCOVERY, message)
        self.assertIn("404", message)

    def test_the_document_wins_over_a_configured_address(self):
        """C-046: protocol 1.3, the order of sources."""
        self.device.set("identity.trust_bundle", f"https://localhost:{support.free_port()}/never")
        self.assertEqual(self.refresh()[0].anchors, self.anchors("ca.pem"))


class RemoteProcess(RemoteCase):
    def test_an_enrollment_and_its_cycles_ask_the_service_once(self):
        """C-040, C-042, P-16: what the first cycle fetched serves the next ones, and those write nothing."""
        self.device.cycle()
        self.assertEqual(self.asked(), [(BUNDLE, 200)])
        before = read(self.store.path("state.json"))
        self.device.cycle()
        self.assertEqual((self.asked(), read(self.store.path("state.json"))), ([], before))

    def test_an_unchanged_bundle_is_not_asked_for_before_the_hint_has_passed_again(self):
        """C-040, P-16: the same bundle counts as a refresh, is kept in memory and writes nothing."""
        self.cycle()
        before = read(self.store.path("state.json"))
        self.store.load_memo().update(trust=time.time() - 3601)
        self.store.save_memo()
        self.asked()
        self.cycle()
        self.cycle()
        self.assertEqual((self.asked(), read(self.store.path("state.json"))), ([(BUNDLE, 200)], before))

    def test_the_fetched_bundle_decides_about_the_wfm(self):
        """C-006, C-039: one that does not know the WFM's authority ends it, before a request."""
        self.wfm.fault({"path": BUNDLE, "body": json.dumps({"keys": [
            {"use": "x509-svid", "x5c": [base64.b64encode(self.pki.der("site-ca.pem")).decode()]}]})})
        self.carry(self.issue(CLIENT_ID, signer="site-ca"))
        self.assert_refused("the peer's certificate is refused")

    def test_a_sequence_is_remembered_though_the_enrollment_failed(self):
        """C-043: what was accepted counts, whatever came after it."""
        self.pki.write_bundle("ca.pem", spiffe_sequence=7)
        url = self.device.settings["wfm"]["url"]
        self.device.set("wfm.url", f"https://127.0.0.1:{support.free_port()}")
        self.enroll(3)
        self.assertEqual(json.loads(self.cached().decode())["spiffe_sequence"], 7)
        self.pki.write_bundle("ca.pem", spiffe_sequence=6)
        self.device.set("wfm.url", url)
        self.enroll(0, "went back from 7 to 6")
        self.assertEqual(json.loads(self.cached().decode())["spiffe_sequence"], 7)

    def test_a_rebuilt_service_is_accepted_after_unenroll_and_enroll(self):
        """C-043: the reset that the message of a regression names, and it takes effect at once."""
        self.pki.write_bundle("ca.pem", spiffe_sequence=7, spiffe_refresh_hint=3600)
        self.cycle()
        self.pki.write_bundle("ca.pem", "site-ca.pem", spiffe_sequence=1)
        self.assertEqual(call(self.device, "unenroll")[0], 0)
        self.enroll()
        self.assertEqual(self.cached(), read(self.pki.path("bundle.json")))

    def test_unenroll_forgets_a_sequence_also_where_no_enrollment_came_about(self):
        """C-043: the same reset, for a device whose WFM never answered."""
        self.pki.write_bundle("ca.pem", spiffe_sequence=7)
        url = self.device.settings["wfm"]["url"]
        self.device.set("wfm.url", f"https://127.0.0.1:{support.free_port()}")
        self.cycle(3)
        self.pki.write_bundle("ca.pem", spiffe_sequence=1)
        self.enroll(3, "unenroll and enroll again")
        self.assertEqual(call(self.device, "unenroll")[0], 0)
        self.device.set("wfm.url", url)
        self.enroll()
        self.assertEqual(self.cached(), read(self.pki.path("bundle.json")))

    def test_plan_asks_but_keeps_nothing(self):
        """C-042: plan changes nothing on the device."""
        self.device.plan()
        self.assertEqual((self.asked(), self.cached()), ([(BUNDLE, 200)], None))


class Requests(unittest.TestCase):
    """`csr`."""

    def setUp(self):
        support.require("openssl")
        self.device = support.Device(self, support.Pki(self), url="https://wfm.factory.example")
        self.key = os.path.join(self.device.folder, "own.key")
        self.device.set("identity.key", self.key)
        self.device.set("identity.certificate", os.path.join(self.device.folder, "none-yet.pem"))

    def openssl(self, *arguments, data=b""):
        done = subprocess.run(("openssl",) + arguments, input=data, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.assertEqual(done.returncode, 0, done.stdout)
        return done.stdout

    def test_a_key_is_made_once_and_the_request_is_for_it(self):
        """C-018, C-005: ECDSA P-256, PKCS#8, mode 0600 whatever the umask; an existing key is never touched."""
        old = os.umask(0)
        self.addCleanup(os.umask, old)
        done = self.device.run("csr")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn(self.key, done.stderr)
        self.assertEqual(stat.S_IMODE(os.stat(self.key).st_mode), 0o600)
        key = read(self.key)
        self.assertTrue(key.startswith(b"-----BEGIN PRIVATE KEY-----"))
        self.assertIn(b"prime256v1", self.openssl("pkey", "-in", self.key, "-noout", "-text"))
        again = self.device.run("csr")
        self.assertEqual((again.returncode, read(self.key)), (0, key))
        self.assertNotIn("new private key", again.stderr)
        public = self.openssl("pkey", "-in", self.key, "-pubout")
        for text in (done.stdout, again.stdout):
            self.openssl("req", "-verify", "-noout", data=text.encode())
            self.assertEqual(self.openssl("req", "-pubkey", "-noout", data=text.encode()), public)
            self.assertNotIn("PRIVATE KEY", text)

    def test_the_key_is_shown_nowhere(self):
        """C-018."""
        done = self.device.run("-v", "csr")
        secret = read(self.key).decode().split("\n")[1]
        self.assertNotIn(secret, done.stdout + done.stderr)

    def test_two_devices_have_two_keys(self):
        """C-018."""
        call(self.device, "csr")
        first = read(self.key)
        os.remove(self.key)
        call(self.device, "csr")
        self.assertNotEqual(read(self.key), first)

    def test_the_request_goes_to_a_file_where_that_is_wanted(self):
        path = os.path.join(self.device.folder, "own.csr")
        self.assertEqual(call(self.device, "csr", "--out", path)[:2], (0, ""))
        self.openssl("req", "-verify", "-noout", "-in", path)

    def test_the_request_leaves_the_names_to_the_issuer(self):
        """C-009: which client this is, the operator says."""
        text = self.openssl("req", "-noout", "-text", data=call(self.device, "csr")[1].encode()).decode()
        self.assertNotIn("URI:", text)
        self.assertNotIn("CN", text.split("Subject:")[1].split("\n")[0])

    def test_a_key_that_is_none_is_named_and_kept(self):
        support.write(self.key, "garbage")
        code, output, errors = call(self.device, "csr")
        self.assertNotEqual(code, 0)
        self.assertIn(self.key, errors)
        self.assertEqual((read(self.key), output), (b"garbage", ""))

    def test_without_openssl_it_is_said_in_one_line(self):
        done = self.device.run("csr", env={"PATH": self.device.folder})
        self.assertNotEqual(done.returncode, 0)
        self.assertIn("openssl", done.stderr)
        self.assertEqual((done.stderr.count("\n"), os.path.exists(self.key)), (1, False))
