"""The example identity service as other clients see it: strongSwan's `pki --est`, openssl, cryptography and asn1crypto.

Nothing of the agent is used here.
"""
import base64
import json
import os
import ssl
import subprocess
import time
import unittest
import urllib.error
import urllib.request
import warnings

from tests import support

EST_TYPE = "application/pkcs7-mime; smime-type=certs-only"


class MisCase(unittest.TestCase):
    """A test with certificates, a service and a key."""

    options = ()

    def setUp(self):
        support.require("openssl")
        self.pki = support.Pki(self)
        self.mis = support.Mis(self, self.pki, *self.options)
        self.mis.add_token("line-4:secret")
        self.key = self.make_key("device.key")

    def make_key(self, name):
        """A P-256 key."""
        self.pki.run("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", name)
        return self.pki.path(name)

    def make_request(self, key="device.key", subject="/", config=""):
        """A signing request as DER."""
        support.write(self.pki.path("req.cnf"), "[req]\ndistinguished_name = dn\n[dn]\n[ext]\nsubjectAltName = URI:" + (config or "x:y") + "\n")
        self.pki.run("req", "-new", "-sha256", "-subj", subject, "-key", key, "-out", "req.der", "-outform", "DER", "-config", "req.cnf",
                     *(["-reqexts", "ext"] if config else []))
        with open(self.pki.path("req.der"), "rb") as file:
            return file.read()

    def ask(self, path, body=None, token=None, certificate=None, headers=None, kind="application/pkcs10"):
        """(status, headers, body) of one request; a body is sent as base64."""
        context = ssl.create_default_context(cafile=self.pki.path("site-ca.pem"))
        if certificate:
            context.load_cert_chain(*certificate)
        headers = dict(headers or {})
        if body is not None:
            headers["Content-Type"] = kind
        if token:
            headers["Authorization"] = "Basic " + base64.b64encode(token.encode()).decode()
        body = base64.encodebytes(body) if isinstance(body, bytes) else None if body is None else body.encode()
        message = urllib.request.Request(self.mis.url + path, data=body, headers=headers)
        try:
            with urllib.request.urlopen(message, context=context, timeout=support.LIMIT) as answer:
                return answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers, error.read()

    def enroll(self, token="line-4:secret", **options):
        """The status of an enrollment."""
        return self.ask("/.well-known/est/factory.example/simpleenroll", self.make_request(**options), token)

    def certificates(self, body):
        """What a certs-only answer holds, read by cryptography."""
        support.require("cryptography")
        from cryptography.hazmat.primitives.serialization import pkcs7
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")         # of a SET out of order, where a test asked for that
            return pkcs7.load_der_pkcs7_certificates(base64.b64decode(body))


class Read(MisCase):
    def test_discovery_names_bundle_endpoint_and_lists(self):
        document = json.loads(self.ask("/.well-known/margo")[2].decode())
        self.assertEqual(document["trustDomain"], support.TRUST_DOMAIN)
        for url in (document["trustBundleUri"], document["crlUris"][0], document["crlUris"][1], document["estBaseUri"] + "/cacerts"):
            self.assertEqual(self.ask(url[len(self.mis.url):])[0], 200, url)

    def test_a_list_is_signed_numbered_and_lists_what_is_revoked(self):
        support.require("cryptography", "asn1crypto")
        from asn1crypto import crl
        from cryptography import x509
        self.mis.revoke("issuing", 0x1234, 0xFFFFFFFFFFFFFFFFFFFF)
        body = self.ask("/crl/issuing.crl")[2]
        read = x509.load_der_x509_crl(body)
        with open(self.mis.path("issuing.pem"), "rb") as file:
            issuer = x509.load_pem_x509_certificate(file.read())
        self.assertTrue(read.is_signature_valid(issuer.public_key()))
        self.assertEqual(sorted(entry.serial_number for entry in read), [0x1234, 0xFFFFFFFFFFFFFFFFFFFF])
        self.assertEqual(read.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number, 1)
        self.assertEqual(crl.CertificateList.load(body, strict=True).native["tbs_cert_list"]["version"], "v2")
        self.mis.revoke("issuing")
        again = x509.load_der_x509_crl(self.ask("/crl/issuing.crl")[2])
        self.assertEqual((list(again), again.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number), ([], 2))

    def test_an_unchanged_list_is_304(self):
        tag = self.ask("/crl/anchor.crl")[1]["ETag"]
        self.assertEqual(self.ask("/crl/anchor.crl", headers={"If-None-Match": tag})[0], 304)


class Enroll(MisCase):
    options = ("--replay", "600")

    def test_an_svid_is_what_spiffe_asks_for(self):
        support.require("cryptography")
        from cryptography import x509
        status, headers, body = self.enroll()
        self.assertEqual((status, headers["Content-Type"]), (200, EST_TYPE))
        leaf, = self.certificates(body)
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        self.assertEqual(names.get_values_for_type(x509.UniformResourceIdentifier), [support.CLIENT_ID])
        self.assertFalse(leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca)
        usage = leaf.extensions.get_extension_for_class(x509.KeyUsage).value
        self.assertEqual((usage.digital_signature, usage.key_cert_sign, usage.crl_sign), (True, False, False))
        chain = self.certificates(self.ask("/.well-known/est/factory.example/cacerts")[2])
        issuing = next(item for item in chain if item.subject == leaf.issuer)
        leaf.verify_directly_issued_by(issuing)

    def test_a_token_serves_one_key_for_a_while(self):
        self.make_key("other.key")
        self.assertEqual(self.enroll()[0], 200)
        self.assertEqual(self.enroll()[0], 200)
        self.assertEqual(self.enroll(key="other.key")[0], 401)
        used = {token: dict(record, first=record["first"] - 601) for token, record in support.read_json(self.mis.path("used.json")).items()}
        support.write(self.mis.path("used.json"), json.dumps(used))
        self.assertEqual(self.enroll()[0], 401)
        self.assertEqual(self.enroll("nobody:knows")[0], 401)
        self.assertEqual([item["how"] for item in self.mis.issued()], ["token", "token"])

    def test_review_takes_its_time_and_the_same_request(self):
        self.mis.add_token("slow:s", client="slow", review=1.5)
        status, headers, _ = self.enroll("slow:s")
        self.assertEqual((status, headers["Retry-After"]), (202, "2"))
        support.wait_for(lambda: self.enroll("slow:s")[0] == 200, what="an SVID after review")

    def test_what_is_not_as_est_wants_it_is_refused(self):
        good = self.make_request()
        path = "/.well-known/est/factory.example/simpleenroll"
        self.assertEqual(self.ask(path, good, "line-4:secret", kind="application/json")[0], 415)
        for body in ("", "garbage!", "-----BEGIN CERTIFICATE REQUEST-----", base64.b64encode(good[:-3]).decode(),
                     base64.b64encode(good[:-3] + b"\0\0\0").decode()):
            self.assertEqual(self.ask(path, body, "line-4:secret")[0], 400, body[:40])
        self.pki.run("genrsa", "-out", "weak.key", "2048")
        self.assertEqual(self.enroll(key="weak.key")[0], 400)
        support.write(self.pki.path("challenge.cnf"), "[req]\ndistinguished_name = dn\nattributes = at\nprompt = no\n[dn]\nCN = x\n[at]\n"
                      "challengePassword = 12345\n")
        self.pki.run("req", "-new", "-key", "device.key", "-out", "c.der", "-outform", "DER", "-config", "challenge.cnf")
        with open(self.pki.path("c.der"), "rb") as file:
            self.assertIn(b"challengePassword", self.ask(path, file.read(), "line-4:secret")[2])
        self.assertEqual(self.mis.issued(), [])

    def test_it_can_be_told_to_issue_what_is_wrong(self):
        support.require("cryptography")
        from cryptography import x509
        self.mis.misissue(id=[support.WFM_ID, "spiffe://other/x"], end=-5, start=-10, extra=3, last=True)
        found = self.certificates(self.enroll()[2])
        names = found[-1].extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        self.assertEqual((len(found), list(names.get_values_for_type(x509.UniformResourceIdentifier))), (4, [support.WFM_ID, "spiffe://other/x"]))
        self.assertLess(found[-1].not_valid_after_utc.timestamp(), time.time())
        self.mis.misissue(form="ber")
        body = base64.b64decode(self.enroll()[2])
        self.assertEqual(body[:2], b"\x30\x80")
        done = subprocess.run(["openssl", "pkcs7", "-inform", "DER", "-print_certs", "-noout"], input=body, stdout=subprocess.PIPE)
        self.assertIn(b"line-4-cell-2", done.stdout)


class Renew(MisCase):
    def setUp(self):
        super().setUp()
        self.leaf = self.certificates(self.enroll()[2])[0]
        from cryptography.hazmat.primitives.serialization import Encoding
        with open(self.mis.path("issuing.pem"), "rb") as file:
            support.write(self.pki.path("svid.pem"), self.leaf.public_bytes(Encoding.PEM) + file.read())
        self.svid = (self.pki.path("svid.pem"), self.key)

    def renew(self, subject="/O=Example Industries/CN=line-4-cell-2", config=support.CLIENT_ID, **options):
        """The status of a renewal."""
        return self.ask("/.well-known/est/factory.example/simplereenroll", self.make_request(subject=subject, config=config), **options)[0]

    def test_the_svid_renews_itself_with_its_own_names(self):
        """The request was made by openssl with UTF8String names, so it happens to be the same byte for byte."""
        self.assertEqual(self.renew(certificate=self.svid), 200)
        self.assertEqual(self.renew(subject="/O=Else/CN=line-4-cell-2", certificate=self.svid), 400)
        self.assertEqual(self.renew(config="spiffe://factory.example/else", certificate=self.svid), 400)
        self.assertEqual(self.renew(certificate=self.svid, token="line-4:secret"), 400)
        self.assertEqual(self.renew(), 401)
        self.mis.revoke("issuing", self.leaf.serial_number)
        self.assertEqual(self.renew(certificate=self.svid), 401)

    def test_an_svid_authorizes_no_enrollment(self):
        self.assertEqual(self.ask("/.well-known/est/factory.example/simpleenroll", self.make_request(), certificate=self.svid)[0], 403)


class Certificates(MisCase):
    def setUp(self):
        support.require("openssl")
        pki = support.Pki(self)
        pki.issue("vendor-ca", ca=True, usage="keyCertSign, cRLSign", signer=None)
        pki.issue("line-9", signer="vendor-ca")
        self.options = ("--authorization-ca", pki.path("vendor-ca.pem"))
        super().setUp()
        self.vendor = (pki.path("line-9.pem"), pki.path("line-9.key"))

    def test_a_certificate_authorizes_the_client_it_names(self):
        path = "/.well-known/est/factory.example/simpleenroll"
        self.assertEqual(self.ask(path, self.make_request(), certificate=self.vendor)[0], 200)
        self.assertEqual([(item["client"], item["how"]) for item in self.mis.issued()], [("line-9", "certificate")])
        self.assertEqual(self.ask(path, self.make_request(), "line-4:secret", self.vendor)[0], 400)


class StrongSwan(MisCase):
    """The EST client of strongSwan, which speaks TLS 1.2 by default and puts /.well-known/est after the URL itself."""

    options = ("--tls", "1.2")

    def run_pki(self, *arguments):
        """One `pki` command: (exit code, stdout bytes, stderr text)."""
        done = subprocess.run(["pki"] + list(arguments), cwd=self.pki.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=support.LIMIT)
        return done.returncode, done.stdout, done.stderr.decode()

    def test_it_fetches_authorities_enrolls_and_renews(self):
        support.require("pki")
        code, _, words = self.run_pki("--estca", "--url", self.mis.url, "--cacert", "site-ca.pem", "--caout", "est-ca.pem", "--outform", "pem")
        self.assertEqual(code, 0, words)
        self.assertTrue(os.path.exists(self.pki.path("est-ca.pem")), words)
        trust = [word for name in ("site-ca.pem", "ca.pem", self.mis.path("issuing.pem")) for word in ("--cacert", name)]
        self.make_request()
        code, leaf, words = self.run_pki("--est", "--url", self.mis.url, "--in", "req.der", "--userpass", "line-4:secret", "--outform", "pem", *trust)
        self.assertEqual(code, 0, words)
        support.write(self.pki.path("leaf.pem"), leaf)
        self.make_request(subject="/O=Example Industries/CN=line-4-cell-2", config=support.CLIENT_ID)
        code, renewed, words = self.run_pki("--est", "--url", self.mis.url, "--in", "req.der", "--cert", "leaf.pem", "--key", "device.key",
                                            "--outform", "pem", *trust)
        self.assertEqual(code, 0, words)
        self.assertNotEqual(leaf, renewed)
        self.assertEqual([item["how"] for item in self.mis.issued()], ["token", "renewal"])
        self.assertIn(("POST", "simplereenroll", 200), self.mis.requests())

    def test_it_waits_for_review_and_is_told_of_a_refusal(self):
        support.require("pki")
        self.mis.add_token("slow:s", client="slow", review=1)
        self.make_request()
        trust = [word for name in ("site-ca.pem", "ca.pem", self.mis.path("issuing.pem")) for word in ("--cacert", name)]
        common = ["--est", "--url", self.mis.url, "--in", "req.der", "--interval", "1"] + trust
        self.assertNotEqual(self.run_pki(*common, "--userpass", "wrong:token")[0], 0)
        code, _, words = self.run_pki(*common, "--userpass", "slow:s")
        self.assertEqual(code, 0, words)
        self.assertEqual([status for _, name, status in self.mis.requests() if name == "simpleenroll"][-2:], [202, 200])


if __name__ == "__main__":
    unittest.main()
