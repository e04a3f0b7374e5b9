"""The example WFM with --profile signed, as a client sees it that signs by an independent implementation of RFC 9421.

Nothing of the agent is used here.  Each test is one client, with a key of its own, on a server that most of them share.
"""
import base64
import contextlib
import datetime
import hashlib
import http.client
import json
import os
import ssl
import unittest
import urllib.parse
from types import SimpleNamespace

from tests import support

ONE = "00000001-0000-4000-8000-00000000000a"
KINDS = {"ecdsa-p256-sha256": "EC", "ecdsa-p384-sha384": "P-384", "rsa-v1_5-sha256": "RSA", "rsa-pss-sha256": "RSA", "rsa-pss-sha512": "RSA",
         "ed25519": "Ed25519"}
COVERED = ("@method", "@target-uri", "@authority")
SHARED = {}


def setUpModule():
    support.require("openssl", "http_message_signatures", "cryptography")
    life = SHARED["life"] = support.Lifetime()
    try:
        SHARED["pki"] = support.Pki(life)
        for dialect in "ab":
            SHARED[dialect] = support.Wfm(life, SHARED["pki"], profile="signed-" + dialect)
    except BaseException:
        life.close()
        raise


def tearDownModule():
    SHARED["life"].close()
    SHARED.clear()


def get_algorithm(name):
    """The independent implementation of an algorithm; rsa-pss-sha256, which is in no registry, is made of the same parts."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import padding
    from http_message_signatures import algorithms

    class PssSha256(algorithms.RSA_PSS_SHA512):
        """RSASSA-PSS with SHA-256 throughout and a salt of 32 bytes."""

        algorithm_id = "rsa-pss-sha256"

        def __init__(self, **options):
            super().__init__(**options)
            self.hash_algorithm = hashes.SHA256()
            self.padding = padding.PSS(mgf=padding.MGF1(hashes.SHA256()), salt_length=32)

    known = {item.algorithm_id: item for item in vars(algorithms).values() if hasattr(item, "algorithm_id")}
    return dict(known, **{"rsa-pss-sha256": PssSha256})[name]


class Client:
    """Sends signed requests; what `sign` is told can be wrong on purpose."""

    def __init__(self, wfm, pki, algorithm="ecdsa-p256-sha256", name=None, **issue):
        self.wfm, self.algorithm, self.name = wfm, algorithm, name or algorithm
        if not os.path.exists(pki.path(f"{self.name}.pem")):
            pki.issue(self.name, key=KINDS[algorithm], **issue)
        with open(pki.path(f"{self.name}.key"), "rb") as key, open(pki.path(f"{self.name}.pem")) as certificate:
            self.key, self.certificate = key.read(), certificate.read()
        self.context = ssl.create_default_context(cafile=pki.path("site-ca.pem"))
        self.id = None

    def prepare(self, method, path, body=b"", created=None, covered=COVERED, include_alg=None, digest=None, keyid="the-key", label="sig1", url=None):
        """The message of a request with its signature in the headers."""
        from http_message_signatures import HTTPMessageSigner, HTTPSignatureKeyResolver
        resolver = type("Resolver", (HTTPSignatureKeyResolver,), {"resolve_private_key": lambda _, key_id: self.key})()
        message = SimpleNamespace(method=method, url=url or self.wfm.url + path, headers={})
        if body:
            message.headers["Content-Type"] = "application/json"
        if body or digest:
            message.headers["Content-Digest"] = digest or f"sha-256=:{base64.b64encode(hashlib.sha256(body).digest()).decode()}:"
            covered = tuple(covered) + (("content-digest",) if "content-digest" not in covered else ())
        signer = HTTPMessageSigner(signature_algorithm=get_algorithm(self.algorithm), key_resolver=resolver)
        include_alg = self.algorithm in ("rsa-v1_5-sha256", "rsa-pss-sha256") if include_alg is None else include_alg
        signer.sign(message, key_id=keyid, created=created or datetime.datetime.now(), label=label, include_alg=include_alg,
                    covered_component_ids=list(covered), use_existing_digest="Content-Digest" in message.headers)
        return message

    def send(self, method, path, body=b"", headers=None):
        """(status, headers, body) of a request as it is."""
        address = urllib.parse.urlsplit(self.wfm.url)
        connection = http.client.HTTPSConnection(address.hostname, address.port, context=self.context, timeout=support.LIMIT)
        with contextlib.closing(connection):
            connection.request(method, path, body or None, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()

    def call(self, method, path, document=None, headers=None, **options):
        """The same of a signed request; path below the client's own, or from the root where it begins with /api."""
        path = path if path.startswith("/api") else f"/api/v1/clients/{self.id}/{path}"
        body = document if isinstance(document, bytes) else json.dumps(document).encode() if document is not None else b""
        message = self.prepare(method, path, body, **options)
        return self.send(method, path, body, dict(message.headers, **(headers or {})))

    def onboard(self, certificate=None, **options):
        """The status and value of an onboarding."""
        certificate = certificate or base64.b64encode(ssl.PEM_cert_to_DER_cert(self.certificate)).decode()
        status, _, body = self.call("POST", "/api/v1/onboarding", {
            "apiVersion": "onboarding.margo.org/v1alpha1", "kind": "OnboardingRequest", "certificate": certificate}, **options)
        value = json.loads(body.decode())
        self.id = value.get("clientId", self.id)
        return status, value


class SignedCase(unittest.TestCase):
    def client(self, algorithm="ecdsa-p256-sha256", dialect="a", onboard=True, **options):
        client = Client(SHARED[dialect], SHARED["pki"], algorithm, **options)
        if onboard:
            status, value = client.onboard()
            self.assertEqual(status, 201, value)
        return client

    def refuse(self, answer, status, words):
        """The answer has this status and these words in the errors of that generation."""
        value = json.loads(answer[2].decode())
        self.assertEqual(answer[0], status, value)
        self.assertEqual(sorted(value), ["error", "message"])
        self.assertIn(words, value["message"])


class Signatures(SignedCase):
    def test_every_algorithm_with_and_without_a_body(self):
        for algorithm in KINDS:
            with self.subTest(algorithm):
                client = self.client(algorithm)
                status, headers, _ = client.call("GET", "deployments")
                self.assertEqual(status, 200)
                self.assertEqual(client.call("GET", "deployments", headers={"If-None-Match": headers["ETag"]}, keyid="another")[0], 304)
                self.assertEqual(client.call("POST", "capabilities", support.read_example("signed/device-capabilities-a.json"))[0], 201)

    def test_variations_that_are_signed_right_are_accepted(self):
        client = self.client()
        for options in ({"label": "sig"}, {"include_alg": True}, {"covered": ("@method", "@target-uri")},
                        {"covered": ("@target-uri", "@method", "@scheme", "@path", "@request-target")}):
            with self.subTest(options):
                self.assertEqual(client.call("GET", "deployments", **options)[0], 200)

    def test_a_signature_counts_once(self):
        client = self.client()
        path = f"/api/v1/clients/{client.id}/deployments"
        message = client.prepare("GET", path)
        self.assertEqual(client.send("GET", path, headers=message.headers)[0], 200)
        self.refuse(client.send("GET", path, headers=message.headers), 401, "used before")

    def test_a_twin_of_an_ecdsa_signature_is_the_same_one(self):
        """n - s fits wherever s fits, so the bytes of a signature say little of its being new."""
        client = self.client()
        path = f"/api/v1/clients/{client.id}/deployments"
        message = client.prepare("GET", path)
        client.send("GET", path, headers=message.headers)
        order = 0xffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551
        raw = base64.b64decode(message.headers["Signature"].split(":")[1])
        twin = raw[:32] + (order - int.from_bytes(raw[32:], "big")).to_bytes(32, "big")
        headers = dict(message.headers, Signature=f"sig1=:{base64.b64encode(twin).decode()}:")
        self.refuse(client.send("GET", path, headers=headers), 401, "used before")

    def test_a_signature_for_another_request_does_not_count(self):
        client, other = self.client(), self.client("ed25519", name="second")
        path = f"/api/v1/clients/{client.id}/deployments"
        body = b"{}"
        for words, message, method, target, content in (
                ("does not verify", client.prepare("GET", path), "HEAD", path, b""),
                ("does not verify", client.prepare("GET", path + "/x"), "GET", path, b""),
                ("does not verify", client.prepare("GET", path), "GET", path + "?x=1", b""),
                ("does not verify", client.prepare("GET", path, url="https://wfm.example" + path), "GET", path, b""),
                ("does not verify", other.prepare("GET", path), "GET", path, b""),
                ("not the sha-256 digest", client.prepare("POST", path, body), "POST", path, b"[]")):
            with self.subTest(words=words, target=target, method=method):
                status, _, answer = client.send(method, target, content, message.headers)
                self.assertEqual(status, 400 if content else 401)
                if method != "HEAD":
                    self.assertIn(words if algorithm_of(message) == "ecdsa" else "ECDSA", json.loads(answer.decode())["message"])

    def test_what_has_to_be_covered_and_said(self):
        client = self.client()
        path = f"/api/v1/clients/{client.id}/capabilities"
        body = json.dumps(support.read_example("signed/device-capabilities-a.json")).encode()
        for words, options in (("does not cover @target-uri", {"covered": ("@method",)}), ("does not cover @method", {"covered": ("@target-uri",)}),
                               ("no keyid", {"keyid": ""}), ("ago", {"created": datetime.datetime.now() - datetime.timedelta(seconds=400)}),
                               ("in the future", {"created": datetime.datetime.now() + datetime.timedelta(seconds=100)})):
            with self.subTest(words):
                self.refuse(client.call("POST", path, body, **options), 401, words)
        bare = client.prepare("POST", path)
        self.refuse(client.send("POST", path, body, dict(bare.headers, **{"Content-Type": "application/json"})), 400, "Content-Digest is missing")
        digest = f"sha-256=:{base64.b64encode(hashlib.sha256(body).digest()).decode()}:"
        bare = client.prepare("POST", path)
        self.refuse(client.send("POST", path, body, dict(bare.headers, **{"Content-Digest": digest, "Content-Type": "application/json"})), 401,
                    "does not cover content-digest")
        self.refuse(client.call("POST", path, body, digest="sha-512=:" + "A" * 86 + "==:"), 400, "not the sha-256 digest")

    def test_headers_that_are_no_single_signature_are_refused(self):
        client = self.client()
        path = f"/api/v1/clients/{client.id}/deployments"
        good = client.prepare("GET", path).headers
        for words, changes in (("Signature-Input", {"Signature-Input": ""}), ("exactly the signature", {"Signature": ""}),
                               ("exactly the signature", {"Signature": good["Signature"].replace("sig1", "sig2")}),
                               ("exactly the signature", {"Signature": "sig1=abc"}),
                               ("one signature", {"Signature-Input": good["Signature-Input"] + ", " + good["Signature-Input"].replace("sig1", "b")}),
                               ("one signature", {"Signature-Input": good["Signature-Input"].replace("@method", "@METHOD")}),
                               ("one signature", {"Signature-Input": good["Signature-Input"].replace('"@method" ', "@method ")}),
                               ("twice", {"Signature-Input": good["Signature-Input"].replace('("@method"', '("@method" "@method"')}),
                               ("twice", {"Signature-Input": good["Signature-Input"] + ';keyid="x"'}),
                               ("not there", {"Signature-Input": good["Signature-Input"].replace('("@method"', '("x-none" "@method"')}),
                               ("does not go with", {"Signature-Input": good["Signature-Input"] + ';alg="ed25519"'}),
                               ("does not go with", {"Signature-Input": good["Signature-Input"] + ';alg="hmac-sha256"'}),
                               ("created", {"Signature-Input": good["Signature-Input"].replace(";created=", ";made=")}),
                               ("does not verify", {"Signature-Input": good["Signature-Input"].replace("the-key", "other-key")})):
            with self.subTest(words=words, changes=changes):
                self.refuse(client.send("GET", path, headers=dict(good, **changes)), 401, words)
        status, _, body = client.send("GET", path)
        self.assertEqual(status, 401, body)

    def test_a_signature_for_another_host_does_not_count(self):
        client = self.client()
        path = f"/api/v1/clients/{client.id}/deployments"
        message = client.prepare("GET", path, url="https://other.example" + path)
        self.refuse(client.send("GET", path, headers=dict(message.headers, Host="other.example")), 401, "this server is not other.example")


def algorithm_of(message):
    """ecdsa or another, by the length of the signature."""
    return "ecdsa" if len(base64.b64decode(message.headers["Signature"].split(":")[1])) == 64 else "other"


class Onboarding(SignedCase):
    def test_a_key_gets_the_same_id_each_time_and_in_each_spelling(self):
        client = self.client()
        first = client.id
        pem = base64.b64encode(client.certificate.encode()).decode()
        for spelling in (pem, client.certificate):
            self.assertEqual(client.onboard(spelling), (201, {"clientId": first}))

    def test_who_is_not_vouched_for_is_rejected(self):
        stranger = self.client(name="stranger", onboard=False, signer=None)
        status, value = stranger.onboard()
        self.assertEqual((status, value["message"][:15]), (403, "Client rejected"))
        late = self.client(name="late", onboard=False, start="-9d", end="-1d")
        self.assertEqual(late.onboard()[0], 403)

    def test_who_does_not_hold_the_key_is_refused(self):
        client, other = self.client(onboard=False), self.client("ed25519", name="third", onboard=False)
        self.assertEqual(client.onboard(base64.b64encode(ssl.PEM_cert_to_DER_cert(other.certificate)).decode())[0], 401)
        for text in ("", "AAAA", "no base64!", "é"):
            self.assertEqual(client.onboard(text or "AA==")[0], 400)

    def test_nobody_else_gets_in(self):
        client = self.client()
        for dialect, status in (("a", 403), ("b", 404)):
            client.wfm = SHARED[dialect]
            self.assertEqual(client.call("GET", "/api/v1/clients/c-0000000000000000/deployments")[0], status)
        other = self.client("ed25519", name="fourth")
        other.id = self.client().id
        self.assertEqual(other.call("GET", "deployments")[0], 401)

    def test_the_root_ca_is_given_out_unsigned(self):
        client = self.client(onboard=False)
        status, _, body = client.send("GET", "/api/v1/onboarding/certificate")
        with open(SHARED["pki"].path("site-ca.pem"), "rb") as file:
            self.assertEqual((status, base64.b64decode(json.loads(body.decode())["certificate"])), (200, file.read()))

    def test_it_is_remembered_over_a_restart(self):
        pki = SHARED["pki"]
        wfm = support.Wfm(self, pki, profile="signed-a")
        client = Client(wfm, pki)
        client.onboard()
        wfm.stop()
        client.wfm = support.Wfm(self, pki, profile="signed-a", folder=wfm.folder)
        self.assertEqual(client.call("GET", "deployments")[0], 200)


class Capabilities(SignedCase):
    def test_dialect_a_has_one_document_by_post_then_put(self):
        client = self.client(name="caps-a")
        document = support.read_example("signed/device-capabilities-a.json")
        self.refuse(client.call("PUT", "capabilities", document), 404, "POST it")
        self.assertEqual(client.call("POST", "capabilities", document)[0], 201)
        self.assertEqual(client.call("PUT", "capabilities", document)[0], 201)
        self.assertEqual(client.call("PUT", "capabilities/press-12", document)[0], 404)
        self.assertEqual(client.call("DELETE", "capabilities")[0], 405)

    def test_dialect_b_has_one_for_each_device(self):
        client = self.client(dialect="b", name="caps-b")
        document = support.read_example("signed/device-capabilities-b.json")
        child = dict(document, properties=dict(document["properties"], id="press-12/drive"))
        self.assertEqual(client.call("POST", "capabilities/press-12/drive", child)[0], 404)
        self.assertEqual(client.call("POST", "capabilities/press-12", document)[0], 201)
        self.assertEqual(client.call("POST", "capabilities/press-12/drive", child)[0], 201)
        self.assertEqual(client.call("PUT", "capabilities/press-12", document)[0], 201)
        self.refuse(client.call("POST", "capabilities/other", document), 422, "properties.id differs")
        self.assertEqual([client.call("DELETE", "capabilities/press-12", keyid=str(n))[0] for n in (1, 2)], [204, 404])

    def test_every_field_of_either_dialect_is_held_to_its_rule(self):
        cpu = {"cores": 4, "architecture": "arm64"}
        table = {
            "a": (("apiVersion is missing", "apiVersion", ...), ("kind must be", "kind", "DeviceCapabilities"), ("labels is not allowed", "labels", {}),
                  ("roles is missing", "properties.roles", ...), ("roles needs at least", "properties.roles", []),
                  ("roles[0] must be", "properties.roles", ["standalone device"]), ("resources is missing", "properties.resources", ...),
                  ("cpu must be of type object", "properties.resources.cpu", [cpu]), ("storage is missing", "properties.resources.storage", ...),
                  ("memory must be a size such as 512Mi or 8Gi, not", "properties.resources.memory", "8GB"), ("architecture must be", "properties.resources.cpu.architecture", "x86"),
                  ("properties.memory is not allowed", "properties.memory", "8Gi"), ("otelCollector is not allowed", "properties.otelCollector", True),
                  ("vendor is missing", "properties.vendor", ...), ("peripherals is missing", "properties.resources.peripherals", ...)),
            "b": (("apiVersion is missing", "apiVersion", ...), ("labels is not allowed", "labels", {}), ("cpu is missing", "properties.cpu", ...),
                  ("cpus is called cpu", "properties.cpus", [cpu]), ("cpu must be of type array", "properties.cpu", cpu),
                  ("supportedRuntimes[0] must be", "properties.supportedRuntimes", ["custom"]),
                  ("supportedDeploymentTypes[0] must be", "properties.supportedDeploymentTypes", ["custom"]),
                  ("otelCollector must be true", "properties.otelCollector", False), ("interfaces[0].type", "properties.interfaces", [{"type": "lan"}]))}
        for dialect, rows in table.items():
            client = self.client(dialect=dialect, name=f"fields-{dialect}")
            path = "capabilities" if dialect == "a" else "capabilities/press-12"
            for words, place, value in rows:
                with self.subTest(dialect=dialect, place=place):
                    document = support.read_example(f"signed/device-capabilities-{dialect}.json")
                    holder, names = document, place.split(".")
                    for name in names[:-1]:
                        holder = holder[name]
                    holder.pop(names[-1]) if value is ... else holder.update({names[-1]: value})
                    self.refuse(client.call("POST", path, document), 422, words)

    def test_a_mere_gateway_has_no_resources(self):
        client = self.client(name="gateway")
        document = support.read_example("signed/device-capabilities-a.json")
        document["properties"].update(roles=["Gateway"])
        document["properties"].pop("resources")
        self.assertEqual(client.call("POST", "capabilities", document)[0], 201)


class Desired(SignedCase):
    def setUp(self):
        self.wfms = {}

    def start(self, dialect):
        wfm = support.Wfm(self, SHARED["pki"], profile="signed-" + dialect)
        client = Client(wfm, SHARED["pki"])
        client.onboard()
        return wfm, client

    def test_the_manifest_its_documents_and_its_bundle_lie_below_the_client(self):
        for dialect in "ab":
            with self.subTest(dialect):
                wfm, client = self.start(dialect)
                wfm.publish(support.make_signed_deployment(dialect, ONE), ONE)
                status, headers, body = client.call("GET", "deployments")
                manifest = json.loads(body.decode())
                self.assertEqual((status, headers["ETag"]), (200, f'"{support.digest(body)}"'))
                entry, bundle = manifest["deployments"][0], manifest["bundle"]
                self.assertEqual(entry["url"], f"/api/v1/clients/{client.id}/deployments/{ONE}/{entry['digest']}")
                for item in (entry, bundle):
                    self.assertEqual(support.digest(client.call("GET", item["url"])[2]), item["digest"])

    def test_documents_of_another_generation_are_not_served(self):
        for dialect in "ab":
            for text in (support.make_deployment(ONE), support.make_signed_deployment("ba"["ab".index(dialect)], ONE)):
                with self.subTest(dialect=dialect, text=text[:60]):
                    wfm, client = self.start(dialect)
                    wfm.publish(text, ONE)
                    expected = 1 if dialect == "a" and '"deviceId"' in text and "apiVersion" in text else 0     # more than it asks for
                    self.assertEqual(len(json.loads(client.call("GET", "deployments")[2].decode())["deployments"]), expected)

    def test_the_status_has_the_fields_of_its_generation(self):
        error = {"code": "PULL_FAILED", "source": "web", "message": "no"}
        base = {"apiVersion": "deployment.margo.org/v1alpha1", "kind": "DeploymentStatusManifest", "deploymentId": ONE,
                "status": {"state": "installed"}, "components": [{"name": "web", "state": "installed"}]}
        for dialect in "ab":
            wfm, client = self.start(dialect)
            wfm.publish(support.make_signed_deployment(dialect, ONE), ONE)
            client.call("GET", "deployments")
            path = f"deployments/{ONE}/status"
            self.assertEqual([client.call("POST", path, base)[0] for _ in range(2)], [201, 200])
            for words, document in (("apiVersion is missing", {key: value for key, value in base.items() if key != "apiVersion"}),
                                    ("adoptedManifestVersion is not allowed", dict(base, adoptedManifestVersion=1)),
                                    ("no entry for the component web", dict(base, components=[]))):
                with self.subTest(dialect=dialect, words=words):
                    self.refuse(client.call("POST", path, document), 422, words)
            failed = dict(base, status={"state": "failed", "error": dict(error, source="hello")},
                          components=[{"name": "web", "state": "failed", "error": dict(error)}])
            self.assertEqual(client.call("POST", path, failed)[0], 200 if dialect == "b" else 422)
            for holder in (failed["status"], failed["components"][0]):
                holder["error"].pop("source", None)
            self.assertEqual(client.call("POST", path, failed)[0], 200 if dialect == "a" else 422)
            self.assertEqual(client.call("POST", path, dict(base, deviceId=support.DEVICE))[0], 200 if dialect == "b" else 422)


class Packages(unittest.TestCase):
    def test_a_package_is_there_as_a_plain_file_too(self):
        wfm, pki = SHARED["a"], SHARED["pki"]
        wfm.add_package(support.make_compose(), "web", "1.0.0")
        context = ssl.create_default_context(cafile=pki.path("site-ca.pem"))
        host, _, port = wfm.registry.partition(":")
        connection = http.client.HTTPSConnection(host, int(port), context=context, timeout=support.LIMIT)
        with contextlib.closing(connection):
            for path, expected in (("/files/web/1.0.0.tar.gz", 200), ("/files/web/2.0.0.tar.gz", 404), ("/files/../x/1.tar.gz", 404)):
                connection.request("GET", path)
                answer = connection.getresponse()
                body = answer.read()
                self.assertEqual((answer.status, body[:2] == b"\x1f\x8b"), (expected, expected == 200))


if __name__ == "__main__":
    unittest.main()
