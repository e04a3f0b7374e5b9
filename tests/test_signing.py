"""Room Signed: signatures held against an independent implementation of RFC 9421, and what is said by whom to whom."""
import base64
import datetime
import hashlib
import json
import os
import re
import shutil
import ssl
import subprocess
import time
import unittest
import unittest.mock
from types import SimpleNamespace
from urllib.parse import quote

import margo_agent
from tests import support
from tests.support import DEVICE, HELLO

URL = "https://wfm.plant.example:8443/margo/api/v1/clients/c-31f0/deployments"
KINDS = {"ecdsa-p256-sha256": "EC", "ecdsa-p384-sha384": "P-384", "rsa-v1_5-sha256": "RSA", "rsa-pss-sha256": "RSA", "rsa-pss-sha512": "RSA",
         "ed25519": "Ed25519"}
PKI = {}


def setUpModule():
    support.require("openssl")
    life = PKI["life"] = support.Lifetime()
    PKI["pki"] = support.Pki(life)
    for kind in sorted(set(KINDS.values())):
        PKI["pki"].issue(kind, key=kind)


def tearDownModule():
    PKI["life"].close()
    PKI.clear()


def make_config(algorithm=None, key="EC", ca="site-ca.pem", **signature):
    """A configuration of profile signed by the certificates of this module."""
    pki = PKI["pki"]
    return margo_agent.make_config({
        "wfm": {"profile": "signed", "url": "https://wfm.plant.example"},
        "identity": {"certificate": pki.path(f"{key}.pem"), "key": pki.path(f"{key}.key"), "ca": pki.path(ca), "algorithm": algorithm,
                     "signature": signature}}, "/", {})


def make_signer(algorithm=None, key=None, **signature):
    """The Signer of such a configuration."""
    config = make_config(algorithm, key or KINDS[algorithm or "ecdsa-p256-sha256"], **signature)
    return margo_agent.load_own(config, lambda leaf: margo_agent.make_signer(leaf, config))


class Base(unittest.TestCase):
    def test_the_vectors(self):
        """C-062, C-063, C-064, C-066: the bytes to sign are those of the vectors, and their signatures verify over them."""
        vectors = support.read_example("signed/http-signature-vectors.json")
        folder = support.make_folder(self)
        key = support.write(os.path.join(folder, "key.pem"), vectors["publicKeyPem"])
        signer = make_signer(keyid=vectors["keyid"])
        for vector in vectors["vectors"]:
            with self.subTest(vector["name"]):
                body = base64.b64decode(vector["bodyBase64"])
                headers = {"Content-Digest": vector["headers"]["Content-Digest"]} if body else {}
                if body:
                    self.assertEqual(headers["Content-Digest"], f"sha-256=:{base64.b64encode(hashlib.sha256(body).digest()).decode()}:")
                parameters, base = margo_agent.make_signature_base(vector["method"], vector["targetUri"], headers, signer, 1760000000)
                self.assertEqual(base.decode(), vector["signatureBase"])
                self.assertEqual(f"sig1={parameters}", vector["headers"]["Signature-Input"])
                raw = base64.b64decode(vector["headers"]["Signature"][6:-1])
                der = support.write(os.path.join(folder, "signature"), encode(raw))
                data = support.write(os.path.join(folder, "base"), base)
                done = subprocess.run(["openssl", "dgst", "-sha256", "-verify", key, "-signature", der, data], stdout=subprocess.PIPE)
                self.assertEqual(done.returncode, 0)
                self.assertEqual(margo_agent.parse_ecdsa(encode(raw), 32), raw)

    def test_what_a_request_does_not_carry_is_not_covered(self):
        signer = make_signer(components=["@target-uri", "@method", "@path", "accept", "Content-Digest"], label="sig", keyid="me", alg="x")
        parameters, base = margo_agent.make_signature_base("GET", URL + "?a=1", {"Accept": "text/plain"}, signer, 7)
        self.assertEqual(parameters, '("@target-uri" "@method" "@path" "accept");created=7;keyid="me";alg="x"')
        self.assertEqual(base.decode().split("\n")[:4], [f'"@target-uri": {URL}?a=1', '"@method": GET',
                                                         '"@path": /margo/api/v1/clients/c-31f0/deployments', '"accept": text/plain'])
        parameters, _ = margo_agent.make_signature_base("POST", URL, {"Content-Digest": "x"}, signer, 7)
        self.assertIn('"Content-Digest")', parameters)

    def test_short_and_negative_looking_numbers_keep_their_place(self):
        """C-066: DER drops zeros and adds them; r and s have their full width here."""
        for r, s in ((1, 2 ** 255 + 5), (2 ** 256 - 1, 3), (2 ** 128, 2 ** 247)):
            self.assertEqual(margo_agent.parse_ecdsa(encode(r.to_bytes(32, "big") + s.to_bytes(32, "big")), 32),
                             r.to_bytes(32, "big") + s.to_bytes(32, "big"))
        for broken in (b"", b"\x30\x00", b"\x30\x03\x02\x01\x01", encode(b"\1" * 96)):
            with self.assertRaises((ValueError, OverflowError)):
                margo_agent.parse_ecdsa(broken, 32)


def encode(raw):
    """r and s side by side to DER, made here independently."""
    half, out = len(raw) // 2, b""
    for value in (int.from_bytes(raw[:half], "big"), int.from_bytes(raw[half:], "big")):
        number = value.to_bytes(value.bit_length() // 8 + 1, "big")
        out += bytes([2, len(number)]) + number
    return b"\x30" + bytes([len(out)]) + out


class Algorithms(unittest.TestCase):
    def sign(self, signer, method="POST", url=URL, body=b'{"a":1}'):
        """The message that SignedSource would send, as the independent implementation takes it."""
        headers = {"Content-Digest": f"sha-256=:{base64.b64encode(hashlib.sha256(body).digest()).decode()}:"} if body else {}
        parameters, base = margo_agent.make_signature_base(method, url, headers, signer, int(time.time()))
        signature = base64.b64encode(margo_agent.run_signature(base, signer)).decode()
        headers.update({"Signature-Input": f"{signer.label}={parameters}", "Signature": f"{signer.label}=:{signature}:"})
        return SimpleNamespace(method=method, url=url, headers=headers)

    def verify(self, algorithm, message, body, keyid=None):
        """What the independent implementation makes of it; raises where it does not verify."""
        from http_message_signatures import HTTPMessageVerifier, HTTPSignatureKeyResolver
        from tests.test_example_wfm_signed import get_algorithm
        pem = subprocess.run(["openssl", "x509", "-in", PKI["pki"].path(f"{KINDS[algorithm]}.pem"), "-pubkey", "-noout"], stdout=subprocess.PIPE,
                             check=True).stdout
        resolver = type("Resolver", (HTTPSignatureKeyResolver,), {"resolve_public_key": lambda _, key_id: pem if keyid in (None, key_id) else None})()
        verifier = HTTPMessageVerifier(signature_algorithm=get_algorithm(algorithm), key_resolver=resolver)
        required = ["@method", "@target-uri"] + (["content-digest"] if body else [])
        return verifier.verify(message, max_age=datetime.timedelta(seconds=60), require_components=required, body=body)

    def test_every_algorithm_verifies_elsewhere_with_and_without_a_body(self):
        """C-061 to C-066: and neither another method, nor another target, nor another body does."""
        support.require("http_message_signatures", "cryptography")
        from http_message_signatures import HTTPMessageSignaturesException, InvalidSignature
        for algorithm in KINDS:
            signer = make_signer(algorithm)
            for method, body in (("GET", b""), ("POST", b'{"a":1}')):
                with self.subTest(algorithm=algorithm, method=method):
                    message = self.sign(signer, method, body=body)
                    result, = self.verify(algorithm, message, body, keyid=signer.keyid)
                    self.assertEqual(result.parameters["keyid"], signer.keyid)
                    self.assertEqual(result.parameters.get("alg"), algorithm if algorithm in ("rsa-v1_5-sha256", "rsa-pss-sha256") else None)
                    for change in ({"method": "PUT"}, {"url": URL + "/x"}, {"url": URL.replace("8443", "8444")}):
                        with self.assertRaises(InvalidSignature):
                            self.verify(algorithm, SimpleNamespace(**dict(vars(message), **change)), body)
                    with self.assertRaises(HTTPMessageSignaturesException):
                        self.verify(algorithm, message, body + b" ")

    def test_the_lengths_of_ecdsa_signatures(self):
        """C-066"""
        for algorithm, size in (("ecdsa-p256-sha256", 64), ("ecdsa-p384-sha384", 96)):
            signer = make_signer(algorithm)
            self.assertEqual({len(margo_agent.run_signature(b"x", signer)) for _ in range(5)}, {size})

    def test_the_key_decides_where_nothing_is_configured(self):
        """Contract, Profile signed; C-065"""
        for key, expected in (("EC", "ecdsa-p256-sha256"), ("P-384", "ecdsa-p384-sha384"), ("RSA", "rsa-pss-sha512"), ("Ed25519", "ed25519")):
            self.assertEqual(make_signer(None, key).algorithm, expected)
        for key, wanted in (("EC", "ed25519"), ("RSA", "ecdsa-p256-sha256"), ("P-384", "ecdsa-p256-sha256")):
            with self.assertRaises(margo_agent.Untrusted) as caught:
                make_signer(wanted, key)
            self.assertIn(f"identity.algorithm {wanted}", caught.exception.message)
            self.assertIn("only by", caught.exception.message)

    def test_a_key_of_no_kind_that_signs_requests_is_told(self):
        """C-065"""
        key = subprocess.run(["openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-521"], stdout=subprocess.PIPE, check=True)
        spki = subprocess.run(["openssl", "pkey", "-pubout", "-outform", "DER"], input=key.stdout, stdout=subprocess.PIPE, check=True).stdout
        for wanted in (None, "ecdsa-p256-sha256"):
            with self.assertRaisesRegex(ValueError, "its key is of no kind that signs requests"):
                margo_agent.choose_algorithm(spki, wanted)

    def test_the_alg_parameter_follows_the_setting(self):
        """Contract, Profile signed: sent for two algorithms, else as configured."""
        for algorithm, alg, expected in (("rsa-pss-sha512", None, ""), ("rsa-v1_5-sha256", None, "rsa-v1_5-sha256"), ("rsa-v1_5-sha256", "", ""),
                                         ("ed25519", "ed25519", "ed25519")):
            self.assertEqual(make_signer(algorithm, alg=alg).alg, expected)

    def test_keyid_is_the_hash_of_the_public_key_unless_configured(self):
        """C-064"""
        self.assertEqual(make_signer(keyid="line 4").keyid, "line 4")
        der = subprocess.run(["openssl", "pkey", "-in", PKI["pki"].path("EC.key"), "-pubout", "-outform", "DER"], stdout=subprocess.PIPE).stdout
        self.assertEqual(make_signer().keyid, hashlib.sha256(der).hexdigest())

    def test_settings_that_would_spoil_a_signature_are_refused(self):
        """C-062, C-063: a signature always covers method, target and content."""
        for signature, words in (({"components": ["@method", "content-digest"]}, "identity.signature.components"), ({"components": "all"}, "components"),
                                 ({"components": ["@method", "@method", "@target-uri", "content-digest"]}, "components"),
                                 ({"keyid": 'a"b'}, "identity.signature.keyid"), ({"label": "a\nb"}, "identity.signature.label"), ({"nonce": 1}, "nonce: unknown")):
            with self.assertRaises(margo_agent.ConfigError) as caught:
                make_config(**signature)
            self.assertIn(words, caught.exception.message)

    def test_a_key_that_cannot_be_used_says_so(self):
        signer = make_signer()
        folder = support.make_folder(self)
        locked = os.path.join(folder, "locked.key")
        subprocess.run(["openssl", "pkey", "-in", signer.key, "-aes256", "-passout", "pass:x", "-out", locked], check=True)
        for key in (locked, os.path.join(folder, "none"), PKI["pki"].path("RSA.pem")):
            with self.assertRaises(margo_agent.Untrusted) as caught:
                margo_agent.run_signature(b"x", signer._replace(key=key))
            self.assertIn(f"identity.key {key}", caught.exception.message)

    def test_a_key_may_be_a_uri(self):
        """C-018: the key stays where openssl finds it; a path stays a path."""
        read = margo_agent.read_key
        self.assertEqual(read("pkcs11:token=margo;object=client", "/etc"), "pkcs11:token=margo;object=client")
        self.assertEqual((read("client.key", "/etc"), read("/run/client.key", "/etc")), ("/etc/client.key", "/run/client.key"))
        signer = make_signer()
        margo_agent.run_signature(b"x", signer._replace(key="file:" + signer.key))
        pki = PKI["pki"]
        for identity, words in (({"key": "pkcs11:object=a?pin-value=4711"}, "pin-source"), ({"key": "pkcs11:object=a", "trust_bundle": "b"}, "a URI")):
            with self.assertRaises(margo_agent.ConfigError) as caught:
                margo_agent.make_config({"wfm": {"url": "https://x"}, "identity": dict(identity, certificate=pki.path("EC.pem"))}, "/", {})
            self.assertIn(words, caught.exception.message)
            self.assertNotIn("4711", caught.exception.message)

    def test_a_key_in_a_token_signs(self):
        """C-018: SoftHSM behind openssl's PKCS#11 engine, by a URI; the key is never a file here."""
        support.require("softhsm2-util", "http_message_signatures")
        folder, pki = support.make_folder(self), PKI["pki"]
        os.makedirs(os.path.join(folder, "tokens"))
        env = {"SOFTHSM2_CONF": support.write(os.path.join(folder, "softhsm2.conf"), f"directories.tokendir = {folder}/tokens\n")}
        module = next(path for path in ("/usr/lib/softhsm/libsofthsm2.so", "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so",
                                        "/usr/lib/aarch64-linux-gnu/softhsm/libsofthsm2.so") if os.path.exists(path))
        env["PKCS11_MODULE_PATH"] = module
        for argv in (["--init-token", "--free", "--label", "margo", "--pin", "1234", "--so-pin", "1234"],
                     ["--import", pki.path("EC.key"), "--token", "margo", "--label", "client", "--id", "01", "--pin", "1234"]):
            subprocess.run(["softhsm2-util"] + argv, env=dict(os.environ, **env), check=True, stdout=subprocess.DEVNULL)
        pin = support.write(os.path.join(folder, "pin"), "1234", 0o600)
        uri = f"org.openssl.engine:pkcs11:pkcs11:token=margo;object=client;type=private?pin-source=file:{pin}"
        with unittest.mock.patch.dict(os.environ, env):
            message = self.sign(make_signer()._replace(key=margo_agent.read_key(uri, "/etc")))
        self.verify("ecdsa-p256-sha256", message, b'{"a":1}')


class Documents(unittest.TestCase):
    RC3 = {"properties": {"id": "a", "vendor": "v", "modelNumber": "m", "serialNumber": "s", "memory": "8Gi", "storage": "64Gi",
                          "cpus": [{"cores": 2, "architecture": "arm"}, {"cores": 4, "architecture": "arm64"}], "peripherals": [],
                          "interfaces": [{"type": "ethernet"}], "otelCollector": True, "supportedRuntimes": ["oci"],
                          "supportedDeploymentTypes": ["compose"]}, "labels": {"hall": 4}, "x-acme-extensions": {"a": 1}}

    def test_capabilities_with_roles_and_resources(self):
        """Protocol 3.5, dialect a; C-203: the largest set of cores, never the sum."""
        self.assertEqual(margo_agent.make_older_capabilities(self.RC3, "a"), {
            "apiVersion": "device.margo.org/v1alpha1", "kind": "DeviceCapabilitiesManifest", "properties": {
                "id": "a", "vendor": "v", "modelNumber": "m", "serialNumber": "s", "roles": ["Standalone Device"], "resources": {
                    "cpu": {"cores": 4, "architecture": "arm64"}, "memory": "8Gi", "storage": "64Gi", "peripherals": [],
                    "interfaces": [{"type": "ethernet"}]}}})

    def test_roles_follow_what_runs_here_unless_the_operator_says(self):
        properties = dict(self.RC3["properties"], supportedDeploymentTypes=["compose", "helm"])
        self.assertEqual(margo_agent.make_older_capabilities({"properties": properties}, "a")["properties"]["roles"],
                         ["Standalone Cluster", "Standalone Device"])
        properties["roles"] = ["Cluster Leader"]
        self.assertEqual(margo_agent.make_older_capabilities({"properties": properties}, "a")["properties"]["roles"], ["Cluster Leader"])
        bare = {key: properties[key] for key in ("id", "vendor", "modelNumber", "serialNumber")}
        self.assertEqual(margo_agent.make_older_capabilities({"properties": bare}, "a")["properties"], dict(bare, roles=["Gateway"]))
        self.assertEqual(margo_agent.make_older_capabilities({"properties": bare}, "b")["properties"], bare)

    def test_flat_capabilities(self):
        """Protocol 3.5, dialect b: `cpu`, no labels."""
        flat = margo_agent.make_older_capabilities(self.RC3, "b")
        self.assertEqual(flat["properties"], dict({key: value for key, value in self.RC3["properties"].items() if key != "cpus"},
                                                  cpu=self.RC3["properties"]["cpus"]))
        self.assertEqual(sorted(flat), ["apiVersion", "kind", "properties", "x-acme-extensions"])

    def test_status(self):
        """Protocol 3.6, C-136: neither has a manifest version, a has no source and no deviceId."""
        error = {"code": "PULL_FAILED", "source": "web", "message": "no"}
        document = {"deploymentId": HELLO, "deviceId": DEVICE, "adoptedManifestVersion": 7, "status": {"state": "failed", "error": error},
                    "components": [{"name": "web", "state": "failed", "error": error}]}
        heading = {"apiVersion": "deployment.margo.org/v1alpha1", "kind": "DeploymentStatusManifest", "deploymentId": HELLO}
        short = {"code": "PULL_FAILED", "message": "no"}
        self.assertEqual(margo_agent.make_older_status(document, "b"), dict(
            heading, deviceId=DEVICE, status=document["status"], components=document["components"]))
        self.assertEqual(margo_agent.make_older_status(document, "a"), dict(
            heading, status={"state": "failed", "error": short}, components=[{"name": "web", "state": "failed", "error": short}]))


class Speech(unittest.TestCase):
    """Rows of the table of dialects: what is sent where, over a wire that only notes it."""

    def talk(self, dialect, answer):
        """[(method, path, document)] of an onboarding, capabilities and a status."""
        config = make_config()
        config.wfm.update(dialect=dialect, reported_id="client")
        config.device["id"] = DEVICE
        state, said = margo_agent.make_state(), []

        class Source(margo_agent.SignedSource):
            def ask(self, method, url, headers, body, limit):
                said.append((method, url.partition("/api/v1")[2], json.loads(body.decode())))
                return margo_agent.Response(201, {}, json.dumps(answer).encode())

        source = Source(config, make_signer(), state)
        patch = unittest.mock.patch.object(margo_agent, "log")
        patch.start()
        self.addCleanup(patch.stop)
        state["client"] = {"id": source.onboard(), "key": ""}
        source.adopt(state["client"]["id"])
        source.put_capabilities(DEVICE, {"properties": {"id": DEVICE}})
        source.post_status(HELLO, {"deploymentId": HELLO, "deviceId": DEVICE, "status": {"state": "installed"}, "components": []})
        return said

    def test_the_open_wfm_of_2025(self):
        """F1: other names at the onboarding, another path for a status; all else is dialect a."""
        leaf = base64.b64encode(make_signer().leaf.der).decode()
        onboarding, capabilities, status = self.talk("a-2025", {"client_id": "c-7"})
        self.assertEqual((onboarding[:2], onboarding[2]["public_certificate"]), (("POST", "/onboarding"), leaf))
        self.assertEqual((capabilities[:2], capabilities[2]["properties"]["id"]), (("POST", "/clients/c-7/capabilities"), "c-7"))
        self.assertEqual((status[1], sorted(status[2])), (f"/clients/c-7/deployment/{HELLO}/status",
                                                         ["apiVersion", "components", "deploymentId", "kind", "status"]))

    def test_the_others_are_what_they_were(self):
        for dialect in ("a", "b"):
            onboarding, _, status = self.talk(dialect, {"clientId": "c-7"})
            self.assertIn("certificate", onboarding[2])
            self.assertEqual(status[1], f"/clients/c-7/deployments/{HELLO}/status")
        with self.assertRaises(margo_agent.Untrusted) as caught:
            self.talk("a", {"client_id": "c-7"})
        self.assertIn("clientId: found 'None'", caught.exception.message)


class SignedCase(unittest.TestCase):
    dialect = "a"

    def setUp(self):
        self.pki = support.Pki(self)
        self.wfm = support.Wfm(self, self.pki, profile="signed-" + self.dialect)
        self.wfm.add_package(support.make_compose())
        self.engine = support.FakeEngine(self)
        self.device = support.Device(self, self.pki, self.wfm, self.engine)

    def publish(self, **options):
        self.wfm.publish(support.make_signed_deployment(self.dialect, registry=self.wfm.registry, **options))

    def answer_onboarding(self, value, status=201):
        self.wfm.fault({"path": "/api/v1/onboarding", "status": status, "body": json.dumps(value)})

    def asked(self, start=0):
        """[(method, path below the client, status)]"""
        return [(method, re.sub("/api/v1/clients/[^/]+", "", path), status) for method, path, status in self.wfm.requests()][start:]


class Onboarding(SignedCase):
    def test_onboarding_comes_first_then_capabilities_then_the_manifest(self):
        """C-061, C-068, C-080: and the client id serves for everything after it."""
        self.publish()
        self.device.cycle()
        asked = self.asked()
        self.assertEqual(asked[:3], [("POST", "/api/v1/onboarding", 201), ("POST", "/capabilities", 201), ("GET", "/deployments", 200)])
        own_id = self.device.state()["client"]["id"]
        self.assertTrue(all(path.startswith(f"/api/v1/clients/{own_id}/") for _, path, _ in self.wfm.requests()[1:]))
        self.assertEqual(self.device.status()["identity"]["id"], own_id)
        self.assertTrue(all("Signature" in item["headers"] for item in self.wfm.lines("requests.jsonl") if item["listener"] == "listening"))

    def test_it_is_done_once(self):
        """C-068: a stored id is used again, whatever else happens."""
        self.device.run("enroll")
        self.device.run("enroll")
        self.device.cycle()
        self.assertEqual([method for method, path, _ in self.asked() if "onboarding" in path], ["POST"])

    def test_it_is_stored_before_anything_else(self):
        """A power cut after onboarding does not lose the id: it lies on the disk while the next request still waits for its answer."""
        self.wfm.fault({"path": "/api/v1/clients/*", "delay": 20, "close": True})
        process = subprocess.Popen(self.device.command("run", "--once"), env=self.device.env, stderr=subprocess.DEVNULL)
        self.addCleanup(support.end, process)
        support.wait_for(lambda: os.path.exists(os.path.join(self.device.state_dir, "state.json")), what="a state on the disk")
        self.assertIsNone(process.poll())
        support.end(process)
        self.assertTrue(self.device.state()["client"]["id"])
        self.assertFalse(self.device.status()["enrolled"])

    def test_a_renewed_certificate_of_the_same_key_changes_nothing_and_a_new_key_is_onboarded(self):
        self.device.cycle()
        self.pki.run("req", "-new", "-subj", "/CN=again", "-key", "client.key", "-out", "again.csr")
        self.pki.run("x509", "-req", "-in", "again.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-set_serial", "77", "-out", "client.pem")
        self.device.cycle()
        self.assertEqual([path for _, path, _ in self.asked() if "onboarding" in path], ["/api/v1/onboarding"])
        certificate, key = self.pki.issue("second")
        self.device.set("identity.certificate", certificate)
        self.device.set("identity.key", key)
        self.assertIn("unenroll first", self.device.cycle(5))

    def test_a_device_of_another_wfm_is_not_onboarded(self):
        """C-052: as after a change of wfm.profile; it is said before anything is asked."""
        self.device.cycle()
        state = dict(self.device.state(), client=None, patience={})
        state["enrollment"]["id"] = support.CLIENT_ID
        support.write(os.path.join(self.device.state_dir, "state.json"), margo_agent.make_json(state))
        count = len(self.wfm.requests())
        self.assertIn(f"enrolled as {support.CLIENT_ID}; unenroll first", self.device.cycle(5))
        self.assertEqual(len(self.wfm.requests()), count)

    def test_a_client_id_that_is_no_segment_of_a_path_is_refused(self):
        """C-068: nothing is sent to a path that somebody else made up (5)."""
        for odd in ("../../x", "a/b", "a\\b", "..", ".", "", "a\nb", 7, None, "x" * 300):
            with self.subTest(odd=odd):
                self.answer_onboarding({"clientId": odd})
                log = self.device.cycle(5)
                self.assertIn("onboarding refused", log)
                self.assertIsNone(self.device.state()["client"])
        self.answer_onboarding(["c-1"])
        self.device.cycle(5)
        self.assertEqual({path for _, path, _ in self.wfm.requests()}, {"/api/v1/onboarding"})

    def test_an_odd_client_id_is_one_segment_all_the_same(self):
        for odd in ("a+b==", "50%2F", "ä ö", "a?b#c"):
            with self.subTest(odd=odd):
                self.answer_onboarding({"clientId": odd})
                self.device.run("unenroll")
                self.device.cycle(5)                                    # the server knows nobody of that name
                self.assertIn(f"/api/v1/clients/{quote(odd, safe='')}/capabilities", self.wfm.requests()[-1][1])

    def test_a_refused_onboarding_is_five_and_asked_for_slowly(self):
        """Contract, Profile signed: 400 and 403; somebody may have to approve it first."""
        for status in (400, 403):
            with self.subTest(status):
                self.answer_onboarding({"error": "Client rejected", "message": "not approved yet"}, status)
                log = self.device.cycle(5)
                for words in (f"HTTP {status}", "Client rejected", "not approved yet", "approval"):
                    self.assertIn(words, log)
        self.assertEqual(self.device.state()["patience"]["failures"], 2)
        self.wfm.fault()
        self.device.cycle()

    def test_plan_and_doctor_do_not_onboard_in_passing(self):
        """Contract, Profile signed: `plan` before onboarding is 5 without a request."""
        done = self.device.run("plan")
        self.assertEqual((done.returncode, self.wfm.requests()), (5, []), done.stderr)
        self.assertIn("`enroll` does that", done.stderr)
        done = self.device.run("doctor")            # a run would onboard, so that nothing fails yet
        self.assertEqual((done.returncode, self.wfm.requests()), (0, []))
        self.assertIn("warn wfm ", done.stdout)
        self.assertIn("ok   identity", done.stdout)

    def test_unenroll_only_forgets(self):
        """Contract: dialect a has nothing to delete."""
        self.device.cycle()
        count = len(self.wfm.requests())
        self.assertEqual(self.device.run("unenroll").returncode, 0)
        self.assertEqual((len(self.wfm.requests()), self.device.state()["client"]), (count, None))
        self.assertIn("not enrolled", self.device.run("unenroll").stdout)

    def test_the_state_names_no_key(self):
        self.device.cycle()
        with open(os.path.join(self.device.state_dir, "state.json")) as file:
            self.assertNotIn("PRIVATE", file.read())


class Trust(SignedCase):
    def test_key_and_certificate_may_be_one_file(self):
        """C-061, E-010: openssl finds the key on either side of the chain; the one file is replaced at once."""
        both = [margo_agent.read_file(self.pki.path(name), 10000) for name in ("client.key", "client.pem")]
        path = os.path.join(self.device.folder, "own.pem")
        self.device.set("identity.certificate", path)
        self.device.set("identity.key", path)
        for parts in (both, both[::-1]):
            support.write(path, b"".join(parts), 0o600)
            self.device.cycle()
        self.assertRegex(self.device.run("doctor").stdout, "ok +identity +signs by")
        self.assertIn("CERTIFICATE REQUEST", self.device.run("csr").stdout)

    def test_a_server_that_identity_ca_does_not_vouch_for_gets_no_request(self):
        """C-060: and the trust bundle or the system's store do not help it."""
        self.device.set("identity.ca", self.pki.path("ca.pem"))
        self.assertIn("certificate", self.device.run("enroll", env={"SSL_CERT_FILE": self.pki.path("site-ca.pem")}).stderr)
        self.assertEqual(self.wfm.requests(), [])
        self.device.set("identity.ca", os.path.join(self.device.folder, "none.pem"))
        self.assertIn("none.pem", self.device.cycle(5))

    def test_the_name_of_the_server_counts(self):
        """C-060: ordinary host-name checking."""
        certificate, key = self.pki.issue("elsewhere", signer="site-ca", extra="subjectAltName = DNS:elsewhere.example")
        for name in ("pem", "key"):
            shutil.copy(certificate if name == "pem" else key, self.pki.path(f"site.{name}"))
        self.assertIn("IP address mismatch", self.device.cycle(5))

    def test_no_ca_is_no_configuration(self):
        """C-060, C-069: no trust on first use."""
        del self.device.settings["identity"]["ca"]
        self.device.save()
        self.assertIn("identity.ca: not set, and needed for profile signed", self.device.run("enroll").stderr)

    def test_tls_below_1_3_takes_a_setting(self):
        """C-003, C-060"""
        self.wfm.stop()
        self.wfm = support.Wfm(self, self.pki, "--tls", "1.2", profile="signed-a")
        self.device.set("wfm.url", self.wfm.url)
        self.device.cycle(5)
        self.device.set("wfm.min_tls", "1.2")
        self.device.cycle()

    def test_the_ca_is_fetched_over_a_trusted_channel_only(self):
        """C-069: by the system's store; the fingerprint is for a person, and what is there already is not replaced."""
        path = os.path.join(self.device.folder, "fetched.pem")
        self.device.set("identity.ca", path)
        done = self.device.run("enroll", "--fetch-ca", path)
        self.assertEqual((done.returncode, os.path.exists(path), self.wfm.requests()), (5, False, []), done.stderr)
        trusting = {"SSL_CERT_FILE": self.pki.path("site-ca.pem")}
        done = self.device.run("enroll", "--fetch-ca", path, env=trusting)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn(hashlib.sha256(self.pki.der("site-ca.pem")).hexdigest(), done.stdout)
        self.assertNotIn("Signature", self.wfm.lines("requests.jsonl")[0]["headers"])
        with open(path) as file:
            self.assertEqual(ssl.PEM_cert_to_DER_cert(file.read()), self.pki.der("site-ca.pem"))
        self.assertEqual(self.device.run("enroll", "--fetch-ca", path, env=trusting).returncode, 0)
        self.wfm.fault({"path": "*/certificate", "status": 200, "body": '{"certificate": "AAAA"}'})
        done = self.device.run("enroll", "--fetch-ca", path + ".new", env=trusting)
        self.assertEqual((done.returncode, os.path.exists(path + ".new")), (5, False), done.stderr)
        self.wfm.fault()
        with open(self.pki.path("ca.pem"), "rb") as file:
            support.write(path, file.read())
        done = self.device.run("enroll", "--fetch-ca", path, env=trusting)
        self.assertEqual(done.returncode, 5)
        self.assertIn("another CA", done.stderr)

    def test_every_spelling_of_a_certificate_is_read(self):
        """Protocol 2.7: base64 of DER or of PEM, and PEM."""
        der, pem = self.pki.der("ca.pem"), ssl.DER_cert_to_PEM_cert(self.pki.der("ca.pem"))
        whole = [pem, base64.b64encode(pem.encode()).decode(), base64.b64encode(der).decode(), base64.encodebytes(der).decode()]
        for text in whole + [base64.urlsafe_b64encode(item).decode().rstrip("=") for item in (der, pem.encode())]:              # F8
            self.assertEqual(margo_agent.parse_ca(text), [der])
        for size in range(1, 5):                    # whatever is missing at the end
            with self.assertRaises(ValueError):
                margo_agent.parse_ca(base64.urlsafe_b64encode(b"\xff" * size).decode().rstrip("="))
        for text in ("", "AAAA", "?", "-----BEGIN CERTIFICATE-----", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "ä", whole[2][:8] + "\x1c" + whole[2][8:]):
            with self.assertRaises(ValueError):
                margo_agent.parse_ca(text)
        with self.assertRaises(margo_agent.ConfigError):
            margo_agent.command_enroll_signed(margo_agent.make_config({"wfm": {"url": "https://x"}, "identity": {
                "certificate": "c", "key": "k", "trust_bundle": "b"}}, "/", {}), {"--fetch-ca": "x"})


class Requests(SignedCase):
    def test_a_bare_compose_file_is_deployed(self):
        """F2: packageLocation names the file itself; parameters reach it as they reach one in an archive."""
        self.wfm.fault({"path": "/files/*", "status": 200, "body": support.make_compose()})
        self.publish(parameters={"GREETING": "bare"})
        self.device.cycle()
        (container,) = self.engine.containers().values()
        self.assertEqual((container["env"], self.wfm.statuses()[-1]), (["GREETING=bare"], "installed"))
        self.device.cycle()
        self.assertEqual(self.wfm.requests()[-1][2], 304)
        self.wfm.fault({"path": "/files/*", "status": 200, "body": "<html>Please sign in</html>"})
        self.publish(parameters={"GREETING": "new"}, components=(("web", "1.1.0"),))
        self.assertIn("neither a tar+gzip nor a compose file", self.device.cycle(1))
        self.assertEqual([container["env"] for container in self.engine.containers().values()], [["GREETING=bare"]])

    def test_every_attempt_has_a_signature_of_its_own(self):
        """C-067: what is sent again after a lost answer is signed again."""
        self.publish()
        self.wfm.fault({"method": "POST", "path": "*/status", "late": True, "close": True, "times": 1})
        self.device.cycle(3)
        state = self.device.state()
        support.write(os.path.join(self.device.state_dir, "state.json"), json.dumps(dict(state, patience={}, waits={})))
        self.device.cycle(0)
        signatures = [item["headers"]["Signature"] for item in self.wfm.lines("requests.jsonl") if item["listener"] == "listening"]
        self.assertEqual(len(set(signatures)), len(signatures))
        self.assertEqual(self.wfm.statuses()[-1], "installed")

    def test_what_is_covered(self):
        """C-062, C-063, C-064"""
        self.device.cycle()
        for item in self.wfm.lines("requests.jsonl"):
            covered = '"@method" "@target-uri" "@authority"' + (' "content-digest"' if item["method"] == "POST" else "")
            self.assertRegex(item["headers"]["Signature-Input"], rf'^sig1=\({covered}\);created=[0-9]+;keyid="[0-9a-f]{{64}}"$')
            self.assertEqual("Content-Digest" in item["headers"], item["method"] == "POST")

    def test_every_algorithm_against_the_example(self):
        """C-065"""
        for algorithm, kind in KINDS.items():
            with self.subTest(algorithm):
                certificate, key = self.pki.issue(algorithm, key=kind)
                for name, value in (("certificate", certificate), ("key", key), ("algorithm", algorithm)):
                    self.device.set(f"identity.{name}", value)
                self.device.run("unenroll")
                time.sleep(1.05 - time.time() % 1)  # the same request in the same second has the same signature by some of them: a replay
                self.device.cycle()
                done = self.device.run("doctor")
                self.assertIn(f"signs by {algorithm}", done.stdout)

    def test_a_port_and_a_prefix_and_odd_letters_in_the_url(self):
        """C-051: the target is signed as the server sees it."""
        wfm = support.Wfm(self, self.pki, "--prefix", "/site/margo", profile="signed-a")
        port = wfm.url.rpartition(":")[2]
        device = support.Device(self, self.pki, wfm, self.engine, url=f"https://LocalHost:{port}/site/margo")
        device.cycle()
        config = make_config()
        for url, expected in (("https://WFM.Example:443/Margo", "https://wfm.example/Margo"), ("https://wfm.example:4433", "https://wfm.example:4433")):
            config.wfm["url"] = url
            self.assertEqual(margo_agent.SignedSource(config, make_signer(), margo_agent.make_state()).url, expected)

    def test_a_signature_that_is_not_accepted_is_explained(self):
        """Protocol 2.9: method, target, what was signed, and how far the clocks are apart."""
        self.device.cycle()
        self.wfm.fault({"method": "GET", "status": 401, "headers": {"Date": "Thu, 01 Jan 2026 00:00:00 GMT"}, "body": '{"error": "x", "message": "y"}'})
        log = self.device.cycle(5)
        for words in ("does not accept a signature", "method=GET", f"target={self.wfm.url}/api/v1/clients/", "@signature-params", 'clockOffset="+', "x; y"):
            self.assertIn(words, log)

    def test_a_wfm_that_forgot_the_client_is_told_of_with_the_mend(self):
        self.device.cycle()
        self.wfm.fault({"method": "GET", "status": 404, "body": '{"error": "Not Found", "message": "no such client"}'})
        log = self.device.cycle(4)
        for words in ("no such client", "`unenroll`, then `enroll`", self.device.state()["client"]["id"]):
            self.assertIn(words, log)

    def test_errors_of_that_generation_are_read(self):
        """C-053: {error, message}."""
        self.wfm.fault({"method": "POST", "path": "*/capabilities", "status": 422, "body": '{"error": "Semantic Error", "message": "roles is missing"}'})
        self.assertIn("Semantic Error; roles is missing", self.device.cycle(4))

    def test_a_redirect_is_not_followed(self):
        """C-058: a signature goes nowhere else."""
        self.device.cycle()
        self.wfm.fault({"method": "GET", "status": 307, "headers": {"Location": "https://localhost:1/"}, "body": ""})
        self.assertIn("redirects are not followed", self.device.cycle(4))

    def test_without_openssl_it_is_one_clear_line(self):
        env = dict(self.device.env, PATH=os.path.join(self.engine.folder, "bin"))
        done = self.device.run("enroll", env=env)
        self.assertEqual(done.returncode, 2, done.stderr)
        self.assertIn("openssl is not installed", done.stderr)
        self.assertEqual(len(done.stderr.strip().split("\n")), 1)

    def test_a_wrong_key_is_found_by_doctor(self):
        self.device.set("identity.key", self.pki.path("wfm.key"))
        done = self.device.run("doctor")
        self.assertIn("is not the key of identity.certificate", done.stdout)
        self.device.cycle(5)

    def test_an_expired_certificate_stops_no_workload(self):
        """P-2"""
        self.publish()
        self.device.cycle()
        certificate, _ = self.pki.issue("late", start="-9d", end="-1d")
        self.device.set("identity.certificate", certificate)
        with self.engine.open() as held:
            held["containers"] = {}
        self.assertIn("expired at", self.device.cycle(5))
        self.assertEqual(len(self.engine.containers()), 1)

    def test_csr_makes_a_key_for_the_algorithm(self):
        """C-018"""
        for algorithm, words in (("ed25519", "ED25519"), ("ecdsa-p384-sha384", "384 bit"), ("rsa-pss-sha256", "3072 bit"), (None, "256 bit")):
            with self.subTest(algorithm):
                self.device.set("identity.algorithm", algorithm)
                self.device.set("identity.key", os.path.join(self.device.folder, f"new-{algorithm}.key"))
                done = self.device.run("csr")
                self.assertEqual(done.returncode, 0, done.stderr)
                text = subprocess.run(["openssl", "req", "-noout", "-text", "-verify"], input=done.stdout, stdout=subprocess.PIPE,
                                      stderr=subprocess.STDOUT, universal_newlines=True).stdout
                self.assertIn(words, text)


class Capabilities(SignedCase):
    def kept(self):
        own_id = self.device.state()["client"]["id"]
        return support.read_json(self.wfm.path("state", "clients", own_id, "capabilities.json"))

    def test_post_first_put_afterwards(self):
        """C-080, C-082"""
        self.device.cycle()
        self.device.set("device.properties", {"memory": "1Gi"})
        self.device.cycle()
        self.device.cycle()
        self.assertEqual([request for request in self.asked() if "capabilities" in request[1]],
                         [("POST", "/capabilities", 201), ("PUT", "/capabilities", 201)])
        self.assertEqual(self.kept()[DEVICE]["properties"]["resources"]["memory"], "1Gi")

    def printed(self):
        return json.loads(self.device.run("capabilities").stdout)

    def test_the_command_prints_what_is_sent(self):
        """Contract, Commands: in the dialect of the WFM, to the letter."""
        before = self.printed()
        self.device.cycle()
        (sent,) = self.kept().values()
        self.assertEqual((before, self.printed()), (sent, sent))
        self.assertEqual(sent["kind"], "DeviceCapabilitiesManifest")

    def test_a_device_may_be_called_by_its_client_id(self):
        """F1: a WFM that knows no other name refuses all others; the command prints the one that is sent."""
        self.device.set("wfm.reported_id", "client")
        self.assertEqual(self.printed()["properties"]["id"], DEVICE)
        self.publish()
        self.device.cycle()
        own_id = self.device.state()["client"]["id"]
        self.assertEqual((list(self.kept()), self.printed()), ([own_id], self.kept()[own_id]))
        self.assertEqual(self.printed()["properties"]["id"], own_id)
        self.assertEqual({item["body"].get("deviceId") for item in self.wfm.reports()}, {own_id if self.dialect == "b" else None})
        self.device.cycle()
        self.assertEqual([path.rpartition("/")[2] for _, path, _ in self.asked() if "capabilities" in path],
                         ["capabilities" if self.dialect == "a" else own_id])

    def test_a_wfm_that_forgot_them_is_told_by_post(self):
        self.device.cycle()
        os.remove(self.wfm.path("state", "clients", self.device.state()["client"]["id"], "capabilities.json"))
        self.device.run("enroll")
        self.assertEqual([status for _, path, status in self.asked() if "capabilities" in path], [201, 404, 201])


class DialectB(Capabilities):
    dialect = "b"

    def test_post_first_put_afterwards(self):
        """C-080, C-082"""
        self.device.cycle()
        self.device.set("device.properties", {"memory": "1Gi"})
        self.device.cycle()
        self.assertEqual([request for request in self.asked() if "capabilities" in request[1]],
                         [("POST", f"/capabilities/{DEVICE}", 201), ("PUT", f"/capabilities/{DEVICE}", 201)])
        self.assertEqual(self.kept()[DEVICE]["properties"]["memory"], "1Gi")
        self.assertIn("cpu", self.kept()[DEVICE]["properties"])

    def test_unenroll_deletes(self):
        self.device.cycle()
        self.assertEqual(self.device.run("unenroll").returncode, 0)
        self.assertEqual(self.asked()[-1], ("DELETE", f"/capabilities/{DEVICE}", 204))

    def test_a_gateway_speaks_for_its_children(self):
        """C-220, C-222, C-135: the gateway first, each child below it, and a status with the child's id."""
        child = support.FakeEngine(self)
        self.device.set("device.children", [{
            "id": "drive", "vendor": "v", "modelNumber": "m", "serialNumber": "7", "connection": {"CONTAINER_HOST": "unix:///x", "FAKE_PODMAN": child.folder},
            "properties": {"cpus": [{"cores": 2}], "memory": "512Mi", "storage": "8Gi"}}])
        self.publish(device=f"{DEVICE}/drive")
        self.device.cycle()
        self.assertEqual((len(child.containers()), self.engine.containers()), (1, {}))
        self.assertEqual([(method, path) for method, path, _ in self.asked() if "capabilities" in path],
                         [("POST", f"/capabilities/{DEVICE}"), ("POST", f"/capabilities/{DEVICE}/drive")])
        self.assertEqual(self.kept()[f"{DEVICE}/drive"]["properties"]["cpu"], [{"cores": 2}])
        self.assertEqual((self.wfm.reports()[-1]["body"]["deviceId"], self.wfm.statuses()[-1]), (f"{DEVICE}/drive", "installed"))
        self.assertEqual(self.device.run("unenroll").returncode, 0)
        self.assertEqual([(method, path) for method, path, _ in self.asked()][-2:],
                         [("DELETE", f"/capabilities/{DEVICE}/drive"), ("DELETE", f"/capabilities/{DEVICE}")])

    def test_a_deployment_for_another_device_fails_alone(self):
        self.publish(device="elsewhere")
        self.device.cycle(1)
        report = self.wfm.reports()[-1]["body"]
        self.assertEqual((report["status"]["error"]["code"], report["status"]["error"]["source"], report["deviceId"]), ("WRONG_DEVICE", "hello", DEVICE))


if __name__ == "__main__":
    unittest.main()
