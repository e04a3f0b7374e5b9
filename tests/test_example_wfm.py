"""The example WFM as a device vendor's client sees it: urllib or http.client with a client certificate.

Nothing of the agent is used here.  One server is shared by most tests.  Every test has a client of its own on it, with
a folder of its own for its desired state, so none sees what another left behind; tests of other options or of a restart
start a server for themselves.
"""
import base64
import collections
import contextlib
import copy
import http.client
import io
import itertools
import json
import os
import re
import socket
import ssl
import subprocess
import sys
import tarfile
import time
import unittest
import urllib.error
import urllib.parse
import urllib.request

from tests import support

MANIFEST_TYPE = "application/vnd.margo.manifest.v1+json"
BUNDLE_TYPE = "application/vnd.margo.bundle.v1+tar+gzip"
LAYER_TYPE = "application/vnd.org.margo.component.compose.tar+gzip"
OCI_TYPE = "application/vnd.oci.image.manifest.v1+json"
PROBLEMS = {"invalid-request": 400, "not-authorized": 403, "gateway-not-found": 404, "device-not-found": 404,
            "deployment-not-found": 404, "invalid-bundle": 404, "spiffe-bundle-not-found": 404,
            "server-cannot-generate-response": 406, "semantic-error": 422}
STATES = ("failed", "removing", "installing", "pending", "removed", "installed")
LIMIT = 1024 * 1024
ONE, TWO, THREE = ("%08x-0000-4000-8000-00000000000a" % number for number in (1, 2, 3))
NOWHERE = "sha256:" + "0" * 64
MISSING = object()
SHARED = {}
NUMBERS = itertools.count(1)


class Lifetime(contextlib.ExitStack):
    """Stands for a test in the helpers of support.py where something lives as long as this module's run."""

    addCleanup = contextlib.ExitStack.callback


def setUpModule():
    support.require("openssl")
    life = SHARED["life"] = Lifetime()
    try:
        SHARED["pki"] = support.Pki(life)
        SHARED["wfm"] = support.Wfm(life, SHARED["pki"], "--mis", "127.0.0.1:0")
    except BaseException:
        life.close()
        raise


def tearDownModule():
    SHARED["life"].close()
    SHARED.clear()


class Answer(collections.namedtuple("Answer", "status headers body")):
    """What came back."""

    def json(self):
        """The body's value."""
        return json.loads(self.body.decode("utf-8"))


class Client:
    """Sends requests with urllib; identity: (certificate, key) or None."""

    def __init__(self, url, anchors, identity=None, version=None):
        self.url = url
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.context.check_hostname = False
        if version:
            self.context.minimum_version = self.context.maximum_version = version
        self.context.load_verify_locations(cadata=anchors)
        if identity:
            self.context.load_cert_chain(*identity)
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}),
                                                  urllib.request.HTTPSHandler(context=self.context))
        self.kept = None

    def keep_alive(self):
        """From now on all goes over one connection, which urllib cannot do; returns what to close in the end."""
        self.kept = http.client.HTTPSConnection(urllib.parse.urlsplit(self.url).netloc, context=self.context,
                                                timeout=support.LIMIT)
        return self.kept

    def call(self, method, path, body=None, **headers):
        """The Answer to one request; a dict goes as JSON; header names are written with _ for -."""
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        if isinstance(body, dict):
            body = json.dumps(body).encode()
        if body is not None:
            headers.setdefault("Content-Type", "application/json")
        if self.kept:
            self.kept.request(method, path, body, headers)
            with self.kept.getresponse() as reply:
                return Answer(reply.status, reply.headers, reply.read())
        url = path if path.startswith("https://") else self.url + path
        try:
            reply = self.opener.open(urllib.request.Request(url, body, headers, method=method), timeout=support.LIMIT)
        except urllib.error.HTTPError as error:         # urllib's view of 304, 4xx and 5xx
            reply = error
        with reply:
            return Answer(reply.code, reply.headers, reply.read())

    def get(self, path, **headers):
        """The Answer to a GET."""
        return self.call("GET", path, **headers)

    def connect(self):
        """A TLS connection to write on by hand."""
        address = urllib.parse.urlsplit(self.url)
        return self.context.wrap_socket(socket.create_connection((address.hostname, address.port), timeout=support.LIMIT))

    def talk(self, text):
        """What the server says to this text up to the end of the first JSON object, or at all."""
        said = b""
        with self.connect() as connection:
            connection.sendall(text.encode())
            while not said.endswith(b"}"):
                piece = connection.recv(65536)
                if not piece:
                    break
                said += piece
        return said.decode()


def anchors_of(pki):
    """The anchor of the trust bundle in PEM."""
    with open(pki.path("bundle.json")) as file:
        return ssl.DER_cert_to_PEM_cert(base64.b64decode(json.load(file)["keys"][0]["x5c"][0]))


def make_client(wfm, pki, client_id):
    """A client of this WFM with a certificate of its own, for the one key that all of them have."""
    if not os.path.exists(pki.path("many.csr")):
        pki.issue("many")
    support.write(pki.path("many.ext"),
                  f"subjectAltName = URI:{support.WFM_ID}/client/{client_id}\nkeyUsage = digitalSignature\n")
    pki.run("x509", "-req", "-in", "many.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-set_serial", str(next(NUMBERS)),
            "-days", "2", "-sha256",
            "-extfile", "many.ext", "-out", f"{client_id}.pem")
    return Client(wfm.url, anchors_of(pki), (pki.path(f"{client_id}.pem"), pki.path("many.key")))


def change(document, path, value):
    """A copy of a document in which the member at a path of keys and indexes is another, or MISSING."""
    document = copy.deepcopy(document)
    holder = document
    for key in path[:-1]:
        holder = holder[key]
    if value is MISSING:
        del holder[path[-1]]
    else:
        holder[path[-1]] = value
    return document


def make_capabilities(device, **properties):
    """The capabilities of a device that hosts workloads."""
    return {"properties": dict({
        "id": device, "vendor": "Example Industries", "modelNumber": "EG-100", "serialNumber": "0042",
        "cpus": [{"cores": 4, "architecture": "amd64"}], "memory": "16Gi", "storage": "59Gi",
        "peripherals": [{"type": "gpu", "manufacturer": "Example", "model": "G1"}],
        "interfaces": [{"type": "ethernet"}],
        "otelCollector": True, "supportedRuntimes": ["oci"], "supportedDeploymentTypes": ["compose"]}, **properties),
        "labels": {"example.com/line": "4"}}


def make_gateway(device):
    """The capabilities of a gateway that hosts nothing itself."""
    return {"properties": {"id": device, "vendor": "Example Industries", "modelNumber": "GW-1", "serialNumber": "0043"}}


def make_error(source, code="INSTALL_FAILED"):
    return {"code": code, "source": source, "message": "the disk is full"}


def make_status(deployment_id=ONE, version=1, states=(("web", "installed"), ("db", "installed")), name="shop",
                **members):
    """A deployment status whose overall state fits the components' states."""
    def make_part(source, state, **part):
        part["state"] = state
        if state == "failed":
            part["error"] = make_error(source)
        return part
    worst = min((state for _, state in states), key=STATES.index)
    return dict({"deploymentId": deployment_id, "adoptedManifestVersion": version, "status": make_part(name, worst),
                 "components": [make_part(source, state, name=source) for source, state in states]}, **members)


class WfmCase(unittest.TestCase):
    """A test with a client of its own on the shared server, and no deployments yet; ALIVE: it keeps its connection."""

    ALIVE = False

    def setUp(self):
        self.wfm, self.pki = SHARED["wfm"], SHARED["pki"]
        self.client_id = f"cell-{next(NUMBERS)}"
        self.said = len(self.wfm.read_output())
        os.makedirs(self.folder())

    @property
    def client(self):
        """The test's client, whose certificate is issued at its first use."""
        if "made" not in vars(self):
            self.made = make_client(self.wfm, self.pki, self.client_id)
            if self.ALIVE:
                self.addCleanup(self.made.keep_alive().close)
        return self.made

    def folder(self, *names):
        return self.wfm.path("deployments", self.client_id, *names)

    def tearDown(self):
        """Whatever a test does, the server never meets a case that it does not know."""
        self.assertNotIn("Traceback", self.wfm.read_output()[self.said:][-3000:])

    def publish(self, text, deployment_id=ONE, ending="yaml"):
        support.write(self.folder(f"{deployment_id}.{ending}"), text)

    def withdraw(self, deployment_id=ONE):
        os.remove(self.folder(f"{deployment_id}.yaml"))

    def manifest(self):
        """The state manifest's value; everything that must hold for each one is checked on the way."""
        answer = self.client.get("/api/v1/deployments")
        self.assertEqual(answer.status, 200, answer.body)
        return answer.json()

    def fault(self, *entries):
        self.wfm.fault(*entries)
        self.addCleanup(self.wfm.fault)

    def assert_problem(self, answer, kind, *words):
        """The document of an answer, which must be a problem of this type or status and say these words."""
        status, uri = ((kind, "about:blank") if isinstance(kind, int)
                       else (PROBLEMS[kind], f"https://docs.margo.org/specification/problem-types#{kind}"))
        self.assertEqual((answer.status, answer.headers["Content-Type"]), (status, "application/problem+json"),
                         answer.body)
        document = answer.json()
        self.assertEqual((document["type"], document["status"]), (uri, status))
        self.assertTrue(document["title"])
        for word in words:
            self.assertIn(word, answer.body.decode())
        return document

    def assert_fields(self, answer, fields, *words):
        """The answer is a semantic error about exactly these fields."""
        document = self.assert_problem(answer, "semantic-error", *words)
        self.assertEqual({error["field"] for error in document["errors"]}, set(fields), document["errors"])
        self.assertTrue(all(error["message"] for error in document["errors"]))

    def assert_etag(self, answer):
        self.assertEqual(answer.headers["ETag"], f'"{support.digest(answer.body)}"')


class Identities(WfmCase):
    """Who is let in."""

    def assert_no_connection(self, wfm, client):
        """The handshake fails, the server says so, and no request arrives."""
        seen, said = len(wfm.requests()), len(wfm.read_output())
        with self.assertRaises(OSError):
            client.get("/api/v1/deployments")
        support.wait_for(lambda: "no TLS connection" in wfm.read_output()[said:],
                         what="a line about the refused connection")
        self.assertEqual(wfm.requests()[seen:], [])

    def test_nobody_gets_in_without_a_certificate(self):
        """C-004: the SVID is demanded, not only asked for."""
        self.assert_no_connection(self.wfm, Client(self.wfm.url, anchors_of(self.pki)))

    def test_certificates_that_lead_to_no_anchor_are_refused(self):
        """C-006, C-007: another authority, the same names signed by nobody, or out of its time."""
        self.pki.issue("foreign-ca", signer=None, ca=True, usage="keyCertSign, cRLSign")
        for name, options in {"foreign": {"signer": "foreign-ca"}, "alone": {"signer": None}, "expired": {"end": "-60"},
                              "early": {"start": "+1d"}}.items():
            with self.subTest(name):
                identity = self.pki.issue(name, [support.CLIENT_ID], **options)
                self.assert_no_connection(self.wfm, Client(self.wfm.url, anchors_of(self.pki), identity))

    def test_tls_1_2_is_not_spoken(self):
        """C-001, C-002: 1.3 only, unless the operator says otherwise."""
        old = Client(self.wfm.url, anchors_of(self.pki), (self.pki.path("client.pem"), self.pki.path("client.key")),
                     ssl.TLSVersion.TLSv1_2)
        self.assert_no_connection(self.wfm, old)

    def test_whoever_is_no_client_of_this_wfm_gets_403(self):
        """C-020, C-011: the one URI of the certificate is the identity, compared exactly."""
        wfm = support.WFM_ID
        table = {
            "another trust domain": [support.CLIENT_ID.replace("factory.example", "other.example")],
            "a client of another WFM": [f"spiffe://{support.TRUST_DOMAIN}/margo/wfm/second/client/x"],
            "a WFM whose name begins alike": [f"{wfm}2/client/x"],
            "other letters": [support.CLIENT_ID.replace("main", "Main")],
            "the WFM itself": [wfm], "no name": [f"{wfm}/client/"], "two parts": [f"{wfm}/client/a/b"],
            "a way out": [f"{wfm}/client/.."], "this folder": [f"{wfm}/client/."],
            "two identities": [support.CLIENT_ID, support.CLIENT_ID + "2"],
            "not SPIFFE": ["https://factory.example/margo/wfm/main/client/x"], "none at all": []}
        for name, uris in table.items():
            with self.subTest(name):
                stranger = Client(self.wfm.url, anchors_of(self.pki), self.pki.issue("stranger", uris))
                self.assert_problem(stranger.get("/api/v1/deployments"), "not-authorized", wfm)

    def test_a_stranger_can_neither_read_nor_write_anything(self):
        stranger = Client(self.wfm.url, anchors_of(self.pki), self.pki.issue("stranger", [support.WFM_ID]))
        self.assertEqual(self.client.get("/api/v1/deployments").status, 200)
        before = sorted(os.listdir(self.wfm.path("state", "clients")))
        for method, path, body in (("GET", "/api/v1/deployments", None),
                                   ("GET", f"/api/v1/deployments/{ONE}/{NOWHERE}", None),
                                   ("GET", f"/api/v1/bundles/{NOWHERE}", None),
                                   ("PUT", "/api/v1/capabilities/x", make_capabilities("x")),
                                   ("DELETE", "/api/v1/capabilities/x", None),
                                   ("POST", f"/api/v1/deployments/{ONE}/status", make_status()),
                                   ("GET", "/", None)):
            with self.subTest(path):
                self.assert_problem(stranger.call(method, path, body), "not-authorized")
        self.assertEqual(sorted(os.listdir(self.wfm.path("state", "clients"))), before)

    def test_a_client_below_an_intermediate_authority_gets_in_with_its_chain(self):
        """C-004: leaf first, then what leads to the anchor; without it the chain has a hole."""
        self.pki.issue("middle", ca=True, usage="keyCertSign, cRLSign")
        leaf, key = self.pki.issue("below", [f"{support.WFM_ID}/client/below"], signer="middle")
        self.assert_no_connection(self.wfm, Client(self.wfm.url, anchors_of(self.pki), (leaf, key)))
        with open(leaf, "a") as chain, open(self.pki.path("middle.pem")) as middle:
            chain.write(middle.read())
        self.assertEqual(Client(self.wfm.url, anchors_of(self.pki), (leaf, key)).get("/api/v1/deployments").status, 200)

    def test_a_new_trust_bundle_replaces_the_old_anchors_at_once(self):
        """C-038, C-039: read anew for each connection, never merged; an unusable bundle lets nobody in.

        An anchor need not be self-signed.
        """
        pki, wfm = self.pki, self.wfm
        trusted, bundle = anchors_of(pki), open_text(pki.path("bundle.json"))
        self.addCleanup(support.write, pki.path("bundle.json"), bundle)
        old = Client(wfm.url, trusted, (pki.path("client.pem"), pki.path("client.key")))
        pki.issue("middle", ca=True, usage="keyCertSign, cRLSign")
        new = Client(wfm.url, trusted, pki.issue("new", [f"{support.WFM_ID}/client/new"], signer="middle"))
        self.assertEqual(old.get("/api/v1/deployments").status, 200)
        self.assert_no_connection(wfm, new)
        pki.write_bundle("middle.pem")
        self.assertEqual(new.get("/api/v1/deployments").status, 200)
        self.assert_no_connection(wfm, old)
        for text in ("", "{}", '{"keys": []}', '{"keys": [{"use": "jwt-svid"}]}', "[]",
                     '{"keys": [{"use": "x509-svid"}]}'):
            with self.subTest(text):
                support.write(pki.path("bundle.json"), text)
                self.assert_no_connection(wfm, new)
        support.write(pki.path("bundle.json"), open_text(pki.path("middle.pem")))
        self.assertEqual(new.get("/api/v1/deployments").status, 200, "a PEM file is a trust bundle too")

    def test_two_clients_see_their_own_sets(self):
        """C-020: what a client sees follows from its certificate; the common folder is for those without their own."""
        wfm = self.wfm
        a, b, other = (make_client(wfm, self.pki, name) for name in ("cell-a", "cell-b", "cell-c"))
        self.addCleanup(wfm.withdraw, THREE)
        support.write(wfm.path("deployments", "cell-a", "x.yaml"), support.make_deployment(ONE))
        support.write(wfm.path("deployments", "cell-b", "x.yaml"), support.make_deployment(TWO))
        wfm.publish(support.make_deployment(THREE), THREE)
        sets = [client.get("/api/v1/deployments").json() for client in (a, b, other)]
        self.assertEqual([[item["deploymentId"] for item in found["deployments"]] for found in sets],
                         [[ONE], [TWO], [THREE]])
        for kind, url in (("deployment-not-found", sets[0]["deployments"][0]["url"]),
                          ("invalid-bundle", sets[0]["bundle"]["url"])):
            self.assertEqual(a.get(url).status, 200)
            self.assert_problem(b.get(url), kind)
        a.call("PUT", "/api/v1/capabilities/plc", make_capabilities("plc"))
        self.assert_problem(b.call("DELETE", "/api/v1/capabilities/plc"), "device-not-found", "plc")
        wfm.publish(support.make_deployment(THREE, "other"), THREE)
        self.assertEqual([client.get("/api/v1/deployments").json()["manifestVersion"] for client in (a, b, other)],
                         [1, 1, 2])


def open_text(path):
    with open(path, encoding="utf-8") as file:
        return file.read()


class Manifests(WfmCase):
    """GET /api/v1/deployments."""

    ALIVE = True

    def test_an_empty_set_has_no_bundle(self):
        """C-114: null, not absent."""
        self.assertEqual(self.manifest(), {"manifestVersion": 1, "bundle": None, "deployments": []})

    def test_headers_are_those_of_the_specification(self):
        """C-100, C-101: the ETag is the digest of the very bytes."""
        self.publish(support.make_deployment(ONE))
        answer = self.client.get("/api/v1/deployments")
        self.assertEqual((answer.headers["Content-Type"], answer.headers["Cache-Control"]), (MANIFEST_TYPE, "private"))
        self.assertEqual(answer.headers["Content-Length"], str(len(answer.body)))
        self.assert_etag(answer)

    def test_entries_come_in_the_order_of_their_ids_and_tell_the_truth(self):
        """C-105, C-108: digest, size and URL of each document and of the bundle."""
        texts = {ONE: support.make_deployment(ONE), TWO: support.make_deployment(TWO, "two"),
                 THREE: support.make_deployment(THREE, "three")}
        for name, deployment_id in (("a", THREE), ("b", ONE), ("c", TWO)):
            self.publish(texts[deployment_id], name)
        manifest = self.manifest()
        wanted = [{"deploymentId": key, "digest": support.digest(text.encode()), "sizeBytes": len(text),
                   "url": f"/api/v1/deployments/{key}/{support.digest(text.encode())}"}
                  for key, text in sorted(texts.items())]
        self.assertEqual(manifest["deployments"], wanted)
        packed = self.client.get(manifest["bundle"]["url"]).body
        self.assertEqual(manifest["bundle"], {"mediaType": BUNDLE_TYPE, "digest": support.digest(packed),
                                              "sizeBytes": len(packed),
                                              "url": f"/api/v1/bundles/{support.digest(packed)}"})

    def test_the_version_grows_with_each_change_of_the_set_and_only_then(self):
        """C-103: also a way back is a step ahead."""
        first, second = support.make_deployment(ONE), support.make_deployment(ONE, components=(("web", "1.0.1"),))
        steps = [("nothing", lambda: None, 1), ("one", lambda: self.publish(first), 2),
                 ("the same bytes again", lambda: self.publish(first), 2),
                 ("a new time", lambda: os.utime(self.folder(f"{ONE}.yaml"), (1, 1)), 2),
                 ("another name", lambda: os.rename(self.folder(f"{ONE}.yaml"), self.folder("a.yml")), 2),
                 ("a file of no concern", lambda: self.publish(second, "note", "txt"), 2),
                 ("a hidden file", lambda: self.publish(second, ".hidden"), 2),
                 ("a folder", lambda: os.mkdir(self.folder("b.yaml")), 2),
                 ("another revision", lambda: self.publish(second, "a", "yml"), 3),
                 ("one space", lambda: self.publish(second + " ", "a", "yml"), 4),
                 ("back", lambda: self.publish(first, "a", "yml"), 5),
                 ("two", lambda: self.publish(support.make_deployment(TWO), TWO), 6),
                 ("one less", lambda: self.withdraw(TWO), 7), ("none", lambda: os.remove(self.folder("a.yml")), 8)]
        for name, step, version in steps:
            with self.subTest(name):
                step()
                self.assertEqual(self.manifest()["manifestVersion"], version)

    def test_an_unchanged_set_is_the_same_bytes(self):
        """C-119."""
        self.publish(support.make_deployment(ONE))
        self.assertEqual(len({self.client.get("/api/v1/deployments").body for _ in range(3)}), 1)

    def test_if_none_match_gives_304_without_a_body(self):
        """C-102."""
        self.publish(support.make_deployment(ONE))
        etag = self.client.get("/api/v1/deployments").headers["ETag"]
        for known, status in ((etag, 304), (f'"x", {etag}', 304), ("W/" + etag, 304), ("*", 304),
                              (etag.strip('"'), 200), ('"x"', 200),
                              (etag.upper(), 200), ("", 200)):
            with self.subTest(known):
                answer = self.client.get("/api/v1/deployments", If_None_Match=known)
                self.assertEqual((answer.status, answer.headers["ETag"]), (status, etag))
                self.assertEqual(answer.body == b"", status == 304)
        self.publish(support.make_deployment(TWO), TWO)
        self.assertEqual(self.client.get("/api/v1/deployments", If_None_Match=etag).status, 200)

    def test_another_media_type_is_not_acceptable(self):
        """C-100: the manifest has one type, which is also the default."""
        for accept, good in (("", True), (MANIFEST_TYPE, True), (MANIFEST_TYPE.upper(), True), ("*/*", True),
                             ("application/*;q=0.1", True),
                             ("application/json, */*;q=0.5", True), (f"text/html, {MANIFEST_TYPE};q=0.001", True),
                             ("application/json", False), ("text/*", False), (f"{MANIFEST_TYPE};q=0", False),
                             ("*/*;q=0.0", False),
                             (f"{MANIFEST_TYPE};q=0, */*", False), (BUNDLE_TYPE, False)):
            with self.subTest(accept):
                answer = self.client.get("/api/v1/deployments", Accept=accept)
                if good:
                    self.assertEqual((answer.status, answer.headers["Content-Type"]), (200, MANIFEST_TYPE))
                else:
                    self.assert_problem(answer, "server-cannot-generate-response", MANIFEST_TYPE)

    def test_head_has_the_headers_of_get(self):
        self.publish(support.make_deployment(ONE))
        get, head = (self.client.call(method, "/api/v1/deployments") for method in ("GET", "HEAD"))
        self.assertEqual((head.status, head.body), (200, b""))
        for name in ("ETag", "Content-Type", "Content-Length", "Cache-Control"):
            self.assertEqual(head.headers[name], get.headers[name])


class Artifacts(WfmCase):
    """Single deployments and bundles."""

    ALIVE = True
    TEXTS = {"plain": "{}", "CRLF": "{}\r\n", "no end of line": "# last\n{}", "spaces": "{}  \n\n\n",
             "UTF-8": "# gr\u00fc\u00dfe \u2603 \U0001f600\n{}\n"}

    def test_documents_are_served_byte_for_byte(self):
        """C-105, C-108: no newline is changed, nothing is written anew."""
        for name, frame in self.TEXTS.items():
            with self.subTest(name):
                data = frame.format(support.make_deployment(ONE)).encode()
                self.publish(data)
                entry = self.manifest()["deployments"][0]
                answer = self.client.get(entry["url"])
                self.assertEqual((answer.body, support.digest(answer.body)), (data, entry["digest"]))
                self.assertEqual(answer.headers["Content-Type"], "application/yaml")
                self.assertEqual(answer.headers["Cache-Control"], "private, max-age=31536000, immutable")
                self.assert_etag(answer)
                self.assertEqual(self.client.get(entry["url"], If_None_Match=answer.headers["ETag"]).status, 304)

    def test_the_bundle_holds_exactly_the_set_as_files_at_its_root(self):
        """C-117, C-108."""
        texts = {ONE: support.make_deployment(ONE) + "\r\n", TWO: support.make_deployment(TWO, "two")}
        for key, text in texts.items():
            self.publish(text, key)
        bundle = self.manifest()["bundle"]
        answer = self.client.get(bundle["url"])
        self.assertEqual((answer.headers["Content-Type"], support.digest(answer.body)), (BUNDLE_TYPE, bundle["digest"]))
        self.assertEqual(answer.headers["Cache-Control"], "private, max-age=31536000, immutable")
        self.assertIsNone(answer.headers["Content-Encoding"], "its gzip is content")
        self.assertEqual(answer.body[4:8], bytes(4), "gzip notes no time, so the same set is the same bytes later")
        self.assert_etag(answer)
        self.assertEqual(self.client.get(bundle["url"], If_None_Match=answer.headers["ETag"]).status, 304)
        with tarfile.open(fileobj=io.BytesIO(answer.body), mode="r:gz") as archive:
            found = {entry.name: archive.extractfile(entry).read().decode() for entry in archive if entry.isfile()}
        self.assertEqual(found, {f"{key}.yaml": text for key, text in texts.items()})

    def test_a_percent_encoded_colon_is_a_colon(self):
        self.publish(support.make_deployment(ONE))
        manifest = self.manifest()
        for url in (manifest["deployments"][0]["url"], manifest["bundle"]["url"]):
            self.assertEqual(self.client.get(url.replace(":", "%3A")).status, 200)

    def test_what_is_not_there_is_a_404_of_its_own_type(self):
        """C-112, C-053: by type a client knows what is missing."""
        self.publish(support.make_deployment(ONE))
        self.publish(support.make_deployment(TWO, "two"), TWO)
        manifest = self.manifest()
        digests = [item["digest"] for item in manifest["deployments"]] + [manifest["bundle"]["digest"]]
        for kind, path in (("deployment-not-found", f"deployments/{ONE}/{NOWHERE}"),
                           ("deployment-not-found", f"deployments/{ONE}/{digests[1]}"),
                           ("deployment-not-found", f"deployments/{THREE}/{digests[0]}"),
                           ("deployment-not-found", f"deployments/{ONE}/latest"),
                           ("deployment-not-found", f"deployments/{ONE}/{digests[0].upper()}"),
                           ("deployment-not-found", f"deployments/x/{digests[0]}"),
                           ("invalid-bundle", f"bundles/{NOWHERE}"), ("invalid-bundle", f"bundles/{digests[0]}"),
                           ("invalid-bundle", "bundles/latest"),
                           (404, "bundles"), (404, f"deployments/{ONE}"), (404, f"deployments/{ONE}/{digests[0]}/x"),
                           (404, "onboarding")):
            with self.subTest(path):
                document = self.assert_problem(self.client.get(f"/api/v1/{path}"), kind)
                self.assertEqual((document["instance"], document["retryable"]), (f"/api/v1/{path}", False))

    def test_the_last_sets_stay_fetchable_for_a_while(self):
        """C-112: whoever reads the manifest just before a change can still fetch what it names."""
        urls = []
        for number in range(9):
            self.publish(support.make_deployment(ONE, components=(("web", f"1.0.{number}"),)))
            manifest = self.manifest()
            urls.append((manifest["deployments"][0]["url"], manifest["bundle"]["url"]))
        self.assertEqual([self.client.get(url).status for pair in urls[1:] for url in pair], [200] * 16)
        self.assert_problem(self.client.get(urls[0][0]), "deployment-not-found")
        self.assert_problem(self.client.get(urls[0][1]), "invalid-bundle")

    def test_other_media_types_are_not_acceptable(self):
        self.publish(support.make_deployment(ONE))
        manifest = self.manifest()
        self.assert_problem(self.client.get(manifest["deployments"][0]["url"], Accept="application/json"),
                            "server-cannot-generate-response", "yaml")
        self.assert_problem(self.client.get(manifest["bundle"]["url"], Accept=MANIFEST_TYPE),
                            "server-cannot-generate-response", BUNDLE_TYPE)


class DeploymentFiles(WfmCase):
    """Files that cannot be served."""

    ALIVE = True
    GOOD = json.loads(support.make_deployment(TWO, components=(("web", "1.0.0"), ("db", "1.0.0")), parameters={"X": 1}))
    PROFILE = ("spec", "deploymentProfile")
    WEB = PROFILE + ("components", 0)
    FAULTS = (
        (("id",), MISSING, "id"), (("id",), "hello", "id"), (("metadata",), MISSING, "metadata"),
        (("metadata", "name"), "Bad_Name", "metadata.name"),
        (("metadata", "namespace"), MISSING, "metadata.namespace"),
        (("metadata", "deviceId"), "a b", "metadata.deviceId"),
        (("spec",), [], "spec"), (("spec", "applicationId"), "Com.Example", "spec.applicationId"),
        (PROFILE, MISSING, "spec.deploymentProfile"),
        (PROFILE + ("type",), "docker", "spec.deploymentProfile.type"),
        (PROFILE + ("components",), [], "spec.deploymentProfile.components"),
        (WEB + ("name",), "db", "spec.deploymentProfile.components"), (WEB + ("name",), "Web", "components[0].name"),
        (WEB + ("properties",), MISSING, "components[0].properties"),
        (WEB + ("properties", "repository"), "https://localhost/web", "components[0].properties.repository"),
        (WEB + ("properties", "revision"), "latest", "components[0].properties.revision"),
        (WEB + ("properties", "revision"), "v1.0.0", "components[0].properties.revision"),
        (WEB + ("properties", "wait"), "yes", "components[0].properties.wait"),
        (WEB + ("properties", "timeout"), "90s", "components[0].properties.timeout"),
        (("spec", "parameters", "x"), 7, "spec.parameters.x"),
        (("spec", "parameters", "x", "value"), MISSING, "spec.parameters.x.value"),
        (("spec", "parameters", "x", "targets"), MISSING, "spec.parameters.x.targets"),
        (("spec", "parameters", "x", "targets", 0, "pointer"), 7, "spec.parameters.x.targets[0].pointer"),
        (("spec", "parameters", "x", "targets", 0, "components"), ["web", 7],
         "spec.parameters.x.targets[0].components[1]"))

    def assert_sets_stay(self, table):
        """With a second file of such text the first one is served as before, and the console says once why."""
        self.publish(support.make_deployment(ONE))
        good = self.client.get("/api/v1/deployments")
        for number, (text, word) in enumerate(table):
            with self.subTest(word=word, text=text):
                said = len(self.wfm.read_output())
                self.publish(text, f"two-{number}")
                answers = [self.client.get("/api/v1/deployments") for _ in range(2)]
                self.withdraw(f"two-{number}")
                self.assertEqual([(answer.status, answer.body) for answer in answers], [(200, good.body)] * 2)
                told = self.wfm.read_output()[said:]
                for words in (word, self.folder(f"two-{number}.yaml: "), "the set served before stays"):
                    self.assertIn(words, told)
                self.assertEqual(told.count("\n"), 1, told)

    def test_a_wrong_field_keeps_the_set_and_is_named(self):
        """P-20: what is wrong is refused before anything is changed."""
        self.assert_sets_stay((json.dumps(change(self.GOOD, *fault)), field + " ") for *fault, field in self.FAULTS)

    def test_text_that_is_no_document_keeps_the_set_and_is_named(self):
        self.assert_sets_stay((
            ("", "no YAML mapping"), ("- a\n", "no YAML mapping"), ("id: a\nid: b\n", "line 2"),
            (b"id: \xff\n", "utf-8"), ("a: [\n", "line"),
                           (support.make_deployment(ONE), f"the same id as {ONE}.yaml"), ("a: b: c\n", "line 1")))

    def test_nothing_else_changes_until_it_is_mended(self):
        self.publish(support.make_deployment(ONE))
        self.manifest()
        self.publish("id: [", TWO)
        self.withdraw(ONE)
        self.assertEqual([item["deploymentId"] for item in self.manifest()["deployments"]], [ONE])
        self.publish(support.make_deployment(TWO), TWO)
        manifest = self.manifest()
        self.assertEqual((manifest["manifestVersion"], [item["deploymentId"] for item in manifest["deployments"]]),
                         (2, [TWO]))

    def test_where_nothing_was_served_before_only_the_bad_file_is_left_out(self):
        self.publish(support.make_deployment(ONE))
        self.publish("id: [", TWO)
        self.assertEqual([item["deploymentId"] for item in self.manifest()["deployments"]], [ONE])
        self.assertRegex(self.wfm.read_output(), re.escape(self.folder(f"{TWO}.yaml")) + ".*left out")
        self.publish(support.make_deployment(TWO), TWO)
        self.assertEqual(self.manifest()["manifestVersion"], 2)


class Capabilities(WfmCase):
    """PUT and DELETE /api/v1/capabilities/{deviceId}."""

    ALIVE = True
    FAULTS = (
        [((key,), value, [key])
           for key, value in (("apiVersion", "v1"), ("kind", "DeviceCapabilitiesManifest"), ("x-acme-extensions", 7),
                              ("x-Acme-extensions", {}), ("x-acme", {}), ("labels", []), ("labels", None))]
        + [(("properties",), value, ["properties"]) for value in (MISSING, [], None, "x")]
        + [(("properties", key), value, [f"properties.{key}"])
           for key in ("id", "vendor", "modelNumber", "serialNumber")
           for value in (MISSING, 7, None)]
        + [(("properties", "id"), value, ["properties.id"]) for value in ("", "other", "a b", "plc/", "PLC")]
        + [(("properties", key), value, [f"properties.{key}"])
           for key in ("cpus", "peripherals", "interfaces", "supportedRuntimes", "supportedDeploymentTypes")
           for value in (MISSING, {}, "x", None)]
        + [(("properties", key), value, [f"properties.{key}"]) for key in ("memory", "storage")
           for value in (MISSING, 16, "16", "16GB", "1.5Gi", "")]
        + [(("properties", "memory"), "1Ti", ["properties.memory"])]
        + [(("properties", "otelCollector"), value, ["properties.otelCollector"])
           for value in (MISSING, False, "true", 1)]
        + [(("properties", key), [], [f"properties.{key}"])
           for key in ("cpus", "supportedRuntimes", "supportedDeploymentTypes")]
        + [(("properties", "cpus", 0), 4, ["properties.cpus[0]"])]
        + [(("properties", "cpus", 0, "cores"), value, ["properties.cpus[0].cores"])
           for value in (MISSING, 0, -1, "4", True)]
        + [(("properties", "cpus", 0, "architecture"), value, ["properties.cpus[0].architecture"])
           for value in ("x86_64", "AMD64", 7)]
        + [(("properties", key, 0), value, [f"properties.{key}[0]"]) for key in ("peripherals", "interfaces")
           for value in ("usb", None)]
        + [(("properties", key, 0, "type"), value, [f"properties.{key}[0].type"])
           for key in ("peripherals", "interfaces")
           for value in (MISSING, "GPU", "lora", 7)]
        + [(("properties", "peripherals", 0, key), 7, [f"properties.peripherals[0].{key}"])
           for key in ("manufacturer", "model")]
        + [(("properties", key, 0), value, [f"properties.{key}[0]"])
           for key in ("supportedRuntimes", "supportedDeploymentTypes")
           for value in ("docker", "OCI", 7)]
        + [(("labels", "site"), value, ["labels.site"]) for value in (None, {}, [1, "a"], [True], [[1]], [None])])

    def put(self, document, device="plc"):
        return self.client.call("PUT", f"/api/v1/capabilities/{device}", document)

    def kept(self, name="capabilities.json"):
        return support.read_json(self.wfm.path("state", "clients", self.client_id, name))

    def test_the_first_report_creates_and_the_next_ones_update(self):
        """C-080, C-082."""
        for status, serial in ((201, "1"), (200, "1"), (200, "2")):
            document = make_capabilities("plc", serialNumber=serial)
            answer = self.put(document)
            self.assertEqual((answer.status, answer.body), (status, b""))
            self.assertEqual(self.kept(), {"plc": document})
        self.assertEqual(self.client.call("DELETE", "/api/v1/capabilities/plc").status, 204)
        self.assertEqual(self.kept(), {})
        self.assertEqual(self.put(make_capabilities("plc")).status, 201)

    def test_every_missing_or_wrong_field_is_named(self):
        """C-083 to C-090, C-053."""
        for path, value, fields in self.FAULTS:
            with self.subTest(path=path, value="missing" if value is MISSING else value):
                self.assert_fields(self.put(change(make_capabilities("plc"), path, value)), fields)
        self.assertIsNone(self.kept(), "nothing of it was kept")

    def test_several_faults_are_told_at_once(self):
        document = make_capabilities("plc", memory="lots", cpus=[{"cores": 2}, {"cores": 0}],
                                     interfaces=[{"type": "usb"}, {}])
        document["kind"] = "x"
        self.assert_fields(self.put(document), ["kind", "properties.memory", "properties.cpus[1].cores",
                                                "properties.interfaces[1].type"])

    def test_one_hosting_field_demands_all_the_others(self):
        """C-083, C-084: all or none."""
        hosting = set(make_capabilities("plc")["properties"]) - set(make_gateway("plc")["properties"])
        self.assertEqual(len(hosting), 8)
        for key in sorted(hosting):
            with self.subTest(key):
                document = make_gateway("plc")
                document["properties"][key] = make_capabilities("plc")["properties"][key]
                self.assert_fields(self.put(document), [f"properties.{other}" for other in hosting - {key}])

    def test_what_the_specification_allows_is_accepted(self):
        """C-084, C-087, C-089, C-090."""
        def with_labels(**labels):
            return dict(make_capabilities("plc", supportedRuntimes=["custom"]), labels=labels)
        for name, document in {
                "a gateway that hosts nothing": make_gateway("plc"),
                "every kind of label": with_labels(a="x", b=1.5, c=True, d=["x"], e=[1, 2.5], f=[]),
                "nothing connected": make_capabilities("plc", peripherals=[], interfaces=[]),
                "a space": make_capabilities("plc", memory="16 Gi"),
                "half a core": make_capabilities("plc", cpus=[{"cores": 0.5}, {"cores": 8, "architecture": "arm64"}]),
                "an extension": dict(make_capabilities("plc"), **{"x-acme-2-extensions": {"a": [None]}}),
                "all types": make_capabilities("plc", supportedDeploymentTypes=["helm", "compose", "custom"],
                                               supportedRuntimes=["oci", "custom"]),
                "a member from the future": make_capabilities("plc", colour="red")}.items():
            with self.subTest(name):
                self.assertIn(self.put(document).status, (200, 201))
                self.assertEqual(self.kept()["plc"], document)

    def test_custom_needs_labels(self):
        """C-089."""
        for key in ("supportedRuntimes", "supportedDeploymentTypes"):
            for labels in (MISSING, {}):
                with self.subTest(key, labels=labels):
                    document = change(make_capabilities("plc", **{key: ["custom"]}), ("labels",), labels)
                    self.assert_fields(self.put(document), ["labels"], "custom")

    def test_children_come_after_their_gateway_and_go_with_it(self):
        """C-220, C-223."""
        self.assert_problem(self.put(make_capabilities("gw/line/plc"), "gw/line/plc"), "gateway-not-found", "gw/line")
        for device in ("gw", "gw/line", "gw/line/plc", "gw2"):
            self.assertEqual(self.put(make_gateway(device), device).status, 201)
        self.assertEqual(self.put(make_gateway("gw/line"), "gw%2Fline").status, 200, "generated clients write %2F")
        self.assert_fields(self.put(make_gateway("plc"), "gw/plc"), ["properties.id"])
        self.assertEqual(self.client.call("DELETE", "/api/v1/capabilities/gw").status, 204)
        self.assertEqual(list(self.kept()), ["gw2"])

    def test_deleting_what_is_not_there_is_a_404_of_its_own_type(self):
        """C-223: and a second time."""
        self.put(make_gateway("gw"), "gw")
        for device in ("plc", "gw/plc", "g", "GW", "a%0Ab"):
            with self.subTest(device):
                self.assert_problem(self.client.call("DELETE", f"/api/v1/capabilities/{device}"), "device-not-found",
                                    urllib.parse.unquote(device)[:1])
        self.assertEqual([self.client.call("DELETE", "/api/v1/capabilities/gw").status for _ in range(2)], [204, 404])

    def test_a_path_that_is_no_device_id_is_refused(self):
        """C-086."""
        for device in ("a%20b", "a//b", "/a", "a/", "gr%C3%BCn", "a%00", "%FF", "a:b"):
            with self.subTest(device):
                self.assert_problem(self.put(make_capabilities("a"), device), "invalid-request", "device id")


class Statuses(WfmCase):
    """POST /api/v1/deployments/{deploymentId}/status."""

    ALIVE = True
    FAULTS = (
        [(("deploymentId",), value, ["deploymentId"]) for value in (MISSING, TWO, 7, "", None)]
        + [(("deviceId",), value, ["deviceId"]) for value in (7, "", "a b", "/a", "a//b", None)]
        + [(("adoptedManifestVersion",), value, ["adoptedManifestVersion"])
           for value in (MISSING, 0, -1, 2 ** 64, "1", 1.5, True, None)]
        + [(("status",), value, ["status"]) for value in (MISSING, [], "installed", None)]
        + [(("status", "state"), value, ["status.state"])
           for value in (MISSING, "Installed", "running", 7, None, "pending")]
        + [(("status", "error"), value, ["status.error"]) for value in ("broken", None, [])]
        + [(("status", "error"), {}, ["status.error.code", "status.error.source", "status.error.message"])]
        + [(("status", "error"), dict(make_error("shop"), **{key: value}), [f"status.error.{key}"])
           for key in ("code", "source", "message")
           for value in (7, "")]
        + [(("status", "error"), make_error(source), ["status.error.source"])
           for source in ("web", "SHOP", "line-4-cell-2")]
        + [(("status", "error"), make_error("shop", code), ["status.error.source"]) for code in ("101", "102", "103")]
        + [(("components",), value, ["components"]) for value in (MISSING, {}, [], None)]
        + [(("components", 0), value, ["components", "components[0]"]) for value in (7, "web", None)]
        + [(("components", 0, "name"), value, ["components", "components[0].name"]) for value in (MISSING, 7)]
        + [(("components", 0, "name"), "cache", ["components"]),
           (("components", 0, "name"), "db", ["components", "components[1].name"])]
        + [(("components", 1, "state"), value, ["components[1].state"])
           for value in (MISSING, "Installed", "running", None)]
        + [(("components", 1, "state"), "failed", ["components[1].error", "status.state"])]
        + [(("components", 1, "error"), {}, [f"components[1].error.{key}" for key in ("code", "source", "message")])]
        + [(("components", 1, "error"), make_error(source), ["components[1].error.source"])
           for source in ("web", "shop")])

    def setUp(self):
        super().setUp()
        self.publish(support.make_deployment(ONE, "shop", (("web", "1.0.0"), ("db", "1.0.0"))))
        self.manifest()

    def post(self, document, deployment_id=ONE):
        return self.client.call("POST", f"/api/v1/deployments/{deployment_id}/status", document)

    def reports(self):
        return [item for item in self.wfm.lines("statuses.jsonl") if item["client"] == self.client_id]

    def test_reports_are_kept_in_order_with_time_and_client(self):
        """C-130: 201 for the first of a deployment, 200 for each later one."""
        documents = [make_status(states=(("web", state), ("db", "pending")))
                     for state in ("pending", "installing", "failed")]
        self.assertEqual([self.post(document).status for document in documents], [201, 200, 200])
        self.assertEqual(self.post(make_status(ONE.upper()), ONE.upper()).status, 200, "ids are compared as UUIDs")
        reports = self.reports()
        self.assertEqual([item["body"] for item in reports], documents + [make_status(ONE.upper())])
        self.assertEqual({item["deploymentId"].lower() for item in reports}, {ONE})
        for item in reports:
            self.assertRegex(item["time"], r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$")
        latest = support.read_json(self.wfm.path("state", "clients", self.client_id, "statuses.json"))
        self.assertEqual(latest, {ONE: make_status(ONE.upper())})

    def test_every_missing_or_wrong_field_is_named(self):
        """C-131 to C-140, C-053."""
        for path, value, fields in self.FAULTS:
            with self.subTest(path=path, value="missing" if value is MISSING else value):
                self.assert_fields(self.post(change(make_status(), path, value)), fields)
        self.assertEqual(self.reports(), [], "nothing of it was kept")

    def test_the_overall_state_is_the_most_severe_one(self):
        """C-133: failed, removing, installing, pending, removed, installed."""
        for web, db in itertools.product(STATES, STATES):
            with self.subTest(web=web, db=db):
                self.assertIn(self.post(make_status(states=(("web", web), ("db", db)))).status, (200, 201))
        for overall, right in itertools.permutations(STATES, 2):
            with self.subTest(overall=overall, right=right):
                document = make_status(states=(("web", right), ("db", right)))
                document["status"] = {"state": overall, "error": make_error("shop")}
                self.assert_fields(self.post(document), ["status.state"], f"must be {right},")

    def test_components_that_are_missing_or_unknown_are_named(self):
        """C-131: one entry for each component of the deployment."""
        self.assert_fields(self.post(make_status(states=(("web", "installed"),))), ["components"],
                           "no entry for the component db")
        more = make_status(states=tuple((name, "installed") for name in ("web", "db", "cache")))
        self.assert_fields(self.post(more), ["components"], "cache is no component")

    def test_components_are_those_of_the_adopted_revision(self):
        """C-131, C-134: and those that it no longer has may be told of while they go."""
        self.publish(support.make_deployment(ONE, "shop", (("web", "1.0.0"), ("cache", "1.0.0"))))
        self.assertEqual(self.manifest()["manifestVersion"], 2)
        old, new = (("web", "installed"), ("db", "installed")), (("web", "installed"), ("cache", "installed"))
        self.assertEqual(self.post(make_status(version=1, states=old)).status, 201)
        self.assert_fields(self.post(make_status(version=2, states=old)), ["components"],
                           "no entry for the component cache")
        self.assert_fields(self.post(make_status(version=1, states=new)), ["components"],
                           "no entry for the component db")
        self.assertEqual(self.post(make_status(version=2, states=new)).status, 200)
        self.assertEqual(self.post(make_status(version=2, states=new + (("db", "removing"),))).status, 200)

    def test_a_removed_deployment_is_still_reported_on(self):
        """C-130: its last state is `removed`."""
        self.withdraw()
        self.assertEqual(self.manifest()["deployments"], [])
        for state in ("removing", "removed"):
            self.assertIn(self.post(make_status(states=(("web", state), ("db", state)))).status, (200, 201))
        self.assert_fields(self.post(make_status(states=(("web", "removed"),))), ["components"], "db")

    def test_a_deployment_that_nobody_knows_any_more_is_reported_on_freely(self):
        """C-139: what a device sends late, or to a WFM that lost its state, is taken; its form is checked anyway."""
        document = make_status(TWO, 2 ** 64 - 1, (("some", "removed"),), "other")
        self.assertEqual(self.post(document, TWO).status, 201)
        self.assert_fields(self.post(change(document, ("status", "state"), "installed"), TWO), ["status.state"])

    def test_a_path_that_is_no_deployment_id_is_refused(self):
        for deployment_id in ("hello", ONE + "0", ONE.replace("-", ""), "%2E%2E"):
            with self.subTest(deployment_id):
                self.assert_problem(self.post(make_status(deployment_id), deployment_id), "invalid-request", "UUID")

    def test_a_child_device_is_named(self):
        """C-135, C-137, C-138: deviceId for a child; gateways on its way may be the source beside the deployment."""
        self.publish(support.make_deployment(TWO, "shop", (("web", "1.0.0"),), device="gw/line/plc"), TWO)
        self.manifest()
        good = make_status(TWO, 2, (("web", "failed"),), deviceId="gw/line/plc")
        self.assertEqual(self.post(good, TWO).status, 201)
        self.assert_fields(self.post(change(good, ("deviceId",), MISSING), TWO), ["deviceId"], "gw/line/plc")
        for code, source, allowed in (("101", "gw", True), ("102", "gw/line", True), ("103", "gw/line/plc", True),
                                      ("102", "gw/other", False),
                                      ("101", "shop", False), ("OTHER", "gw", True), ("OTHER", "gw/other", False),
                                      ("OTHER", "gw/li", False)):
            with self.subTest(code=code, source=source):
                document = change(good, ("status", "error"), make_error(source, code))
                if allowed:
                    self.assertEqual(self.post(document, TWO).status, 200)
                else:
                    self.assert_fields(self.post(document, TWO), ["status.error.source"])

    def test_the_console_has_one_line_for_a_report_whatever_it_says(self):
        said = len(self.wfm.read_output())
        document = make_status(states=(("web", "failed"), ("db", "pending")))
        document["components"][0]["error"]["message"] = "two\nlines\x1b[31m\ud800"
        self.assertEqual(self.post(document).status, 201)
        told = self.wfm.read_output()[said:]
        self.assertEqual(told.count("\n"), 1, told)
        self.assertNotIn("\x1b", told)
        for word in (self.client_id, ONE, "failed", "two\\nlines"):
            self.assertIn(word, told)


class Bodies(WfmCase):
    """What is no JSON document, too large, or no proper HTTP."""

    ALIVE = True

    def test_a_body_that_is_no_json_object_is_refused(self):
        """C-050: each with the reason."""
        for body, word in ((b"", "JSON"), (b"{", "JSON"), (b"[]", "object"), (b"null", "object"), (b'"x"', "object"),
                           (b"{} {}", "JSON"), (b"{'a': 1}", "JSON"),
                           (b'{"kind": 1, "kind": 2}', "kind"), (b'{"labels": {"x": 1, "x": 2}}', "twice"),
                           (b'{"a": NaN}', "NaN"),
                           (b'{"a": -Infinity}', "Infinity"), (b'{"a": 1e999}', "1e999"), (b'{"a": -1e999}', "1e999"),
                           (b'{"a": "\xff"}', "utf-8"), (b"\xef\xbb\xbf{}", "BOM"),
                           ('{"a": 1}'.encode("utf-16"), "utf-8")):
            for method, path in (("PUT", "/api/v1/capabilities/plc"), ("POST", f"/api/v1/deployments/{ONE}/status")):
                with self.subTest(body=body, method=method):
                    self.assert_problem(self.client.call(method, path, body), "invalid-request", word)

    def test_deep_nesting_is_accepted_or_refused_but_breaks_nothing(self):
        for depth, good in ((50, True), (100, False), (970, False), (990, False), (2000, False), (200000, False)):
            with self.subTest(depth):
                body = json.dumps(dict(make_capabilities("plc"), **{"x-a-extensions": {"a": 0}}))
                body = body.replace('{"a": 0}', '{"a": ' + "[" * depth + "]" * depth + "}").encode()
                answer = self.client.call("PUT", "/api/v1/capabilities/plc", body)
                if good:
                    self.assertEqual(answer.status, 201)
                else:
                    self.assert_problem(answer, "invalid-request", "JSON")

    def test_only_json_in_utf_8_without_coding_is_taken(self):
        body = json.dumps(make_capabilities("plc")).encode()
        for headers, good in (({"Content_Type": "application/json; charset=UTF-8"}, True),
                              ({"Content_Type": "Application/JSON"}, True),
                              ({"Content_Type": "text/plain"}, False), ({"Content_Type": ""}, False),
                              ({"Content_Type": "application/json; charset=latin-1"}, False),
                              ({"Content_Type": "application/merge-patch+json"}, False),
                              ({"Content_Encoding": "gzip"}, False)):
            with self.subTest(headers):
                answer = self.client.call("PUT", "/api/v1/capabilities/plc", body, **headers)
                if good:
                    self.assertIn(answer.status, (200, 201))
                else:
                    self.assert_problem(answer, "invalid-request", "Content-")

    def test_a_body_may_have_one_mebibyte_and_no_byte_more(self):
        document = json.dumps(make_capabilities("plc")).encode()
        self.assertEqual(self.client.call("PUT", "/api/v1/capabilities/plc", document.ljust(LIMIT)).status, 201)
        for size in (LIMIT + 1, 8 * LIMIT):
            with self.subTest(size):
                self.assert_problem(self.client.call("PUT", "/api/v1/capabilities/plc", document.ljust(size)), 413,
                                    str(LIMIT))

    def test_chunked_bodies_are_read_and_limited_too(self):
        pieces = [json.dumps(make_capabilities("plc")).encode()[start:start + 50] for start in range(0, 1000, 50)]
        self.assertEqual(self.client.call("PUT", "/api/v1/capabilities/plc", filter(None, pieces)).status, 201)
        answer = self.client.call("PUT", "/api/v1/capabilities/plc", itertools.repeat(b" " * 16384, 65))
        self.assert_problem(answer, 413, str(LIMIT))

    def test_broken_requests_get_an_answer_and_no_stack_trace(self):
        head = "PUT /api/v1/capabilities/plc HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        for name, text, status in (("no HTTP", "what\r\n\r\n", "400"),
                                   ("no length", head + "Content-Length: -1\r\n\r\n", "400"),
                                   ("another length", head + "Content-Length: 1x\r\n\r\n", "400"),
                                   ("length", head + "Content-Length: 9999999\r\n\r\n", "413"),
                                   ("chunk", head + "Transfer-Encoding: chunked\r\n\r\nx\r\n", "400"),
                                   ("target", "GET https://[x/api HTTP/1.1\r\nHost: x\r\n\r\n", "400"),
                                   ("method", "BREW /api/v1/deployments HTTP/1.1\r\nHost: x\r\n\r\n", "501"),
                                   ("version", "GET / HTTP/9.9\r\n\r\n", "505"),
                                   ("header", f"GET / HTTP/1.1\r\nX: {'x' * 70000}\r\n\r\n", "431")):
            with self.subTest(name):
                said = self.client.talk(text)
                self.assertIn('"type":"about:blank"', said)
                self.assertIn(f'"status":{status}', said)

    def test_other_methods_are_refused_with_those_that_are_allowed(self):
        for method, path, allowed in (("POST", "/api/v1/deployments", "GET, HEAD"),
                                      ("GET", "/api/v1/capabilities/plc", "DELETE, PUT"),
                                      ("GET", f"/api/v1/deployments/{ONE}/status", "POST"),
                                      ("DELETE", f"/api/v1/bundles/{NOWHERE}", "GET, HEAD")):
            with self.subTest(path):
                answer = self.client.call(method, path)
                self.assert_problem(answer, 405, method)
                self.assertEqual(answer.headers["Allow"], allowed)

    def test_one_connection_carries_several_requests_also_after_a_refusal(self):
        """C-051: HTTP/1.1."""
        address = urllib.parse.urlsplit(self.wfm.url).netloc
        connection = http.client.HTTPSConnection(address, context=self.client.context, timeout=support.LIMIT)
        self.addCleanup(connection.close)
        answers, sockets = [], set()
        for method, path in (("GET", "/api/v1/deployments"), ("PUT", "/api/v1/capabilities/plc"), ("GET", "/nothing"),
                             ("GET", "/api/v1/deployments")):
            connection.request(method, path, b"[]" if method == "PUT" else None)
            sockets.add(connection.sock)
            with connection.getresponse() as answer:
                answers.append(answer.status)
                answer.read()
        self.assertEqual((answers, len(sockets)), ([200, 400, 404, 200], 1))

    def test_a_connection_ends_with_the_goodbye_of_tls(self):
        """C-013: without close_notify a peer cannot tell the end from an attack."""
        address = urllib.parse.urlsplit(self.wfm.url)
        plain = socket.create_connection((address.hostname, address.port), timeout=support.LIMIT)
        with self.client.context.wrap_socket(plain, suppress_ragged_eofs=False) as connection:
            connection.sendall(b"GET /api/v1/deployments HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            said = b"".join(iter(lambda: connection.recv(65536), b""))
        self.assertTrue(said.startswith(b"HTTP/1.1 200 "), said)

    def test_a_peer_that_says_nothing_holds_up_nobody(self):
        address = urllib.parse.urlsplit(self.wfm.url)
        with socket.create_connection((address.hostname, address.port)), self.client.connect():
            self.assertEqual(self.manifest()["manifestVersion"], 1)


class Faults(WfmCase):
    """faults.json: answers that are spoilt on purpose."""

    PATH = "/api/v1/deployments"

    def setUp(self):
        super().setUp()
        self.publish(support.make_deployment(ONE))
        self.true = self.client.get(self.PATH).body

    def test_a_status_with_headers_as_often_as_was_said(self):
        """C-056, C-057."""
        self.fault({"path": self.PATH, "status": 503, "headers": {"Retry-After": "120"}, "times": 2},
                   {"path": self.PATH, "status": 429, "times": 1})
        answers = [self.client.get(self.PATH) for _ in range(5)]
        self.assertEqual([answer.status for answer in answers], [503, 503, 429, 200, 200])
        document = self.assert_problem(answers[0], 503)
        self.assertEqual((answers[0].headers["Retry-After"], document["retryable"], document["backoffStrategy"]),
                         ("120", True, "exponential"))
        self.assertEqual(answers[4].body, self.true)
        self.wfm.fault({"path": self.PATH, "status": 503, "headers": {"Retry-After": "120"}, "times": 1})
        self.assertEqual([self.client.get(self.PATH).status for _ in range(2)], [503, 200],
                         "a changed file counts from the start")

    def test_an_entry_fits_by_method_path_and_client(self):
        other = make_client(self.wfm, self.pki, self.client_id + "-b")
        self.fault({"method": "GET", "path": "/api/v1/deploy*", "client": self.client_id, "status": 500})
        for client, method, path, status in ((self.client, "GET", self.PATH, 500),
                                             (self.client, "GET", f"{self.PATH}/{ONE}/{NOWHERE}", 500),
                                             (other, "GET", self.PATH, 200), (self.client, "HEAD", self.PATH, 200),
                                             (self.client, "DELETE", "/api/v1/capabilities/plc", 404)):
            with self.subTest(method=method, path=path):
                self.assertEqual(client.call(method, path).status, status)

    def test_problems_by_name_or_whole(self):
        """C-053, C-054."""
        self.fault({"problem": "not-authorized", "times": 1},
                   {"problem": {"type": "https://example.com/odd", "title": "Odd", "status": 418}, "times": 1},
                   {"problem": {"title": "Odd"}, "status": 409, "times": 1})
        self.assert_problem(self.client.get(self.PATH), "not-authorized")
        odd, nameless = self.client.get(self.PATH), self.client.get(self.PATH)
        self.assertEqual((odd.status, odd.json()["type"], odd.headers["Content-Type"]),
                         (418, "https://example.com/odd", "application/problem+json"))
        self.assertEqual((nameless.status, nameless.json()), (409, {"title": "Odd"}))

    def test_a_body_and_headers_take_the_place_of_the_true_ones(self):
        self.fault({"status": 502, "body": "<html>", "headers": {"Content-Type": "text/html"}, "times": 1},
                   {"headers": {"ETag": '"x"'}, "times": 1},
                   {"body": "{}", "times": 1})
        proxy, etag, empty = (self.client.get(self.PATH) for _ in range(3))
        self.assertEqual((proxy.status, proxy.body, proxy.headers["Content-Type"]), (502, b"<html>", "text/html"))
        self.assertEqual((etag.status, etag.body, etag.headers["ETag"]), (200, self.true, '"x"'))
        self.assertEqual((empty.status, empty.body, empty.headers["Content-Type"]), (200, b"{}", MANIFEST_TYPE))

    def test_corrupt_flips_one_bit(self):
        """C-105, C-106."""
        self.fault({"corrupt": True})
        body = self.client.get(self.PATH).body
        self.assertEqual(len(body), len(self.true))
        self.assertEqual(sum(bin(a ^ b).count("1") for a, b in zip(body, self.true)), 1)

    def test_truncate_keeps_the_announced_length(self):
        self.fault({"truncate": 10})
        with self.assertRaises(http.client.IncompleteRead) as caught:
            self.client.get(self.PATH)
        self.assertEqual((caught.exception.partial, caught.exception.expected), (self.true[:10], len(self.true) - 10))

    def test_close_gives_no_answer_and_late_does_the_work_nevertheless(self):
        """C-139: the client cannot know whether it was carried out."""
        path = "/api/v1/capabilities/plc"
        for late, status in ((False, 201), (True, 200)):
            with self.subTest(late=late):
                self.fault({"close": True, "late": late, "times": 1})
                with self.assertRaises(http.client.RemoteDisconnected):
                    self.client.call("PUT", path, make_capabilities("plc"))
                self.assertEqual(self.client.call("PUT", path, make_capabilities("plc")).status, status)
                self.client.call("DELETE", path)
        self.assertIn(("PUT", path, None), self.wfm.requests())

    def test_a_status_means_not_carried_out_unless_it_is_late(self):
        path = "/api/v1/capabilities/plc"
        self.fault({"status": 500, "times": 1}, {"status": 500, "late": True, "times": 1})
        self.assertEqual(self.client.call("PUT", path, make_capabilities("plc")).status, 500)
        self.assertEqual(self.client.call("DELETE", path).status, 500)
        self.assertEqual(self.client.call("PUT", path, make_capabilities("plc")).status, 201)
        self.fault({"status": 500, "late": True, "times": 1})
        self.assertEqual([self.client.call("DELETE", path).status for _ in range(2)], [500, 404])

    def test_a_delay_holds_the_answer_back(self):
        self.fault({"delay": 0.3})
        start = time.monotonic()
        self.assertEqual(self.client.get(self.PATH).body, self.true)
        self.assertGreaterEqual(time.monotonic() - start, 0.3)

    def test_a_file_that_is_not_usable_is_named_and_spoils_nothing(self):
        self.addCleanup(self.wfm.fault)
        for text, word in (("{", "faults.json"), ("{}", "list of objects"), ("[7]", "list of objects"),
                           (b"\xff", "utf-8"),
                           ('[{"staus": 500}]', "staus"), ('[{"status": "500"}]', "status"),
                           ('[{"times": "2"}]', "times"), ('[{"delay": "1s"}]', "delay"),
                           ('[{"problem": "nobody-home"}]', "problem"), ('[{"path": 7}]', "path"),
                           ('[{"headers": []}]', "headers"),
                           ('[{"headers": {"Retry-After": 120}}]', "headers.Retry-After"), ('[{"body": {}}]', "body"),
                           ('[{"truncate": "all"}]', "truncate")):
            with self.subTest(text):
                said = len(self.wfm.read_output())
                support.write(self.wfm.path("state", "faults.json"), text)
                self.assertEqual([self.client.get(self.PATH).body for _ in range(2)], [self.true] * 2)
                told = self.wfm.read_output()[said:]
                self.assertIn("faults.json", told)
                self.assertIn(word, told)
                self.assertEqual(told.count("\n"), 1, told)


class RegistryCase(WfmCase):
    """A test with a visitor to the registry."""

    def setUp(self):
        super().setUp()
        self.registry = Client(f"https://{self.wfm.registry}", open_text(self.pki.path("site-ca.pem")))
        self.name = f"shop{next(NUMBERS)}"

    def assert_oci_error(self, answer, status, code, *words):
        self.assertEqual((answer.status, answer.headers["Content-Type"]), (status, "application/json"), answer.body)
        error = answer.json()["errors"][0]
        self.assertEqual(error["code"], code)
        for word in words:
            self.assertIn(word, error["message"])

    def pull(self, name, tag="1.0.0"):
        """(manifest's answer, its value, the layer's bytes)."""
        answer = self.registry.get(f"/v2/{name}/manifests/{tag}", Accept=OCI_TYPE)
        self.assertEqual(answer.status, 200, answer.body)
        manifest = answer.json()
        return answer, manifest, self.registry.get(f"/v2/{name}/blobs/{manifest['layers'][0]['digest']}").body


class Registry(RegistryCase):
    """The Compose Archives."""

    def test_a_package_comes_by_tag_and_by_digest(self):
        """C-153, C-154, C-155."""
        self.wfm.add_package(support.make_compose(), self.name)
        answer, manifest, layer = self.pull(self.name)
        digest = support.digest(answer.body)
        self.assertEqual((answer.headers["Content-Type"], answer.headers["Docker-Content-Digest"]), (OCI_TYPE, digest))
        self.assertEqual(self.registry.get(f"/v2/{self.name}/manifests/{digest}").body, answer.body)
        self.assertEqual((manifest["schemaVersion"], manifest["mediaType"], manifest["artifactType"]),
                         (2, OCI_TYPE, "application/vnd.org.margo.component.compose+json"))
        entry = manifest["layers"][0]
        self.assertEqual((len(manifest["layers"]), entry["mediaType"], entry["digest"], entry["size"]),
                         (1, LAYER_TYPE, support.digest(layer), len(layer)))
        for holder in (manifest, entry):
            self.assertEqual((holder["annotations"]["org.margo.component.type"],
                              holder["annotations"]["org.margo.component.version"]), ("compose", "1.0.0"))
        config = self.registry.get(f"/v2/{self.name}/blobs/{manifest['config']['digest']}")
        self.assertEqual((config.body, manifest["config"]["size"], config.headers["Docker-Content-Digest"]),
                         (b"{}", 2, support.digest(b"{}")))

    def test_the_archive_holds_the_folder_below_one_directory(self):
        """C-156, C-157."""
        self.wfm.add_package("services: {}\n", f"a/{self.name}",
                             **{"conf/b.txt": "b\r\n", "conf/a.txt": "a", "run.sh": "#!/bin/sh\n"})
        os.chmod(self.wfm.path("packages", "a", self.name, "1.0.0", "run.sh"), 0o700)
        os.chmod(self.wfm.path("packages", "a", self.name, "1.0.0", "compose.yaml"), 0o600)
        layer = self.pull(f"a/{self.name}")[2]
        with tarfile.open(fileobj=io.BytesIO(layer), mode="r:gz") as archive:
            found = {entry.name: (entry.mode, archive.extractfile(entry).read() if entry.isfile() else None)
                     for entry in archive}
        top = self.name
        self.assertEqual(found, {top: (0o755, None), f"{top}/compose.yaml": (0o644, b"services: {}\n"),
                                 f"{top}/run.sh": (0o755, b"#!/bin/sh\n"),
                                 f"{top}/conf": (0o755, None), f"{top}/conf/a.txt": (0o644, b"a"),
                                 f"{top}/conf/b.txt": (0o644, b"b\r\n")})

    def test_a_made_archive_is_the_same_bytes_each_time(self):
        """C-154: the same folder copied elsewhere at another time has the same digest; another byte has another."""
        self.wfm.add_package(support.make_compose(), f"x/{self.name}", **{"z.txt": "z", "a/b.txt": "b"})
        self.wfm.add_package(support.make_compose(), f"y/{self.name}", **{"a/b.txt": "b", "z.txt": "z"})
        os.utime(self.wfm.path("packages", "y", self.name, "1.0.0", "z.txt"), (1, 1))
        first, second = self.pull(f"x/{self.name}"), self.pull(f"y/{self.name}")
        self.assertEqual((first[0].body, first[2]), (second[0].body, second[2]))
        self.assertEqual(self.pull(f"x/{self.name}")[2], first[2])
        self.assertEqual(first[2][4:8], bytes(4), "gzip notes no time")
        self.wfm.add_package(support.make_compose(), f"y/{self.name}", **{"z.txt": "Z"})
        self.assertNotEqual(self.pull(f"y/{self.name}")[2], first[2])
        self.assertEqual(self.registry.get(f"/v2/y/{self.name}/blobs/{support.digest(first[2])}").status, 200,
                         "what a client is fetching stays")

    def test_an_archive_of_ones_own_is_served_as_it_is(self):
        self.wfm.add_package(b"no archive at all", self.name)
        manifest, layer = self.pull(self.name)[1:]
        self.assertEqual((layer, manifest["layers"][0]["size"]), (b"no archive at all", 17))

    def test_tags_are_listed_in_order(self):
        for tag in ("1.0.0", "1.10.0-rc.1_build", "0.9.0"):
            self.wfm.add_package(support.make_compose(), self.name, tag)
        self.wfm.add_package(b"x", self.name, "2.0.0")
        os.makedirs(self.wfm.path("packages", self.name, "3.0.0"))              # without compose.yaml it is no package
        answer = self.registry.get(f"/v2/{self.name}/tags/list")
        self.assertEqual((answer.headers["Content-Type"], answer.json()),
                         ("application/json",
                          {"name": self.name, "tags": ["0.9.0", "1.0.0", "1.10.0-rc.1_build", "2.0.0"]}))

    def test_what_is_not_there_is_a_404_that_says_what(self):
        self.wfm.add_package(support.make_compose(), self.name)
        self.wfm.add_package(support.make_compose(), self.name + "b", **{"other": "x"})
        layer = self.pull(self.name + "b")[1]["layers"][0]["digest"]
        for path, code, word in ((f"{self.name}/manifests/2.0.0", "MANIFEST_UNKNOWN", "2.0.0"),
                                 (f"{self.name}/manifests/{NOWHERE}", "MANIFEST_UNKNOWN", NOWHERE),
                                 (f"{self.name}/blobs/{NOWHERE}", "BLOB_UNKNOWN", NOWHERE),
                                 (f"{self.name}/blobs/{layer}", "BLOB_UNKNOWN", layer),
                                 (f"{self.name}b/manifests/{layer}", "MANIFEST_UNKNOWN", layer),
                                 ("nobody/manifests/1.0.0", "NAME_UNKNOWN", "nobody"),
                                 ("nobody/tags/list", "NAME_UNKNOWN", "nobody"),
                                 (f"nobody/blobs/{layer}", "NAME_UNKNOWN", "nobody"),
                                 ("../state/tags/list", "NAME_UNKNOWN", "state"),
                                 ("%2e%2e/state/tags/list", "NAME_UNKNOWN", "state"),
                                 (f"{self.name}/../{self.name}/tags/list", "NAME_UNKNOWN", self.name),
                                 (f"{self.name.upper()}/tags/list", "NAME_UNKNOWN", "SHOP"),
                                 (f"{self.name}/manifests/..", "MANIFEST_UNKNOWN", "..")):
            with self.subTest(path):
                self.assert_oci_error(self.registry.get(f"/v2/{path}"), 404, code, word)
        self.assertEqual(self.registry.get("/v2/").status, 200)
        self.assertEqual(self.registry.call("PUT", f"/v2/{self.name}/manifests/1.0.0", b"{}").status, 405)
        self.assert_oci_error(self.registry.get("/token"), 404, "UNSUPPORTED", "no tokens")

    def test_another_server_finds_by_digest_what_this_one_gave(self):
        """C-154: as after a restart; the digest depends on nothing but the folder."""
        self.wfm.add_package(support.make_compose(), self.name)
        answer, manifest, layer = self.pull(self.name)
        self.wfm, self.said = support.Wfm(self, self.pki), 0
        self.wfm.add_package(support.make_compose(), self.name)
        self.registry.url = f"https://{self.wfm.registry}"
        self.assertEqual(self.registry.get(f"/v2/{self.name}/blobs/{manifest['layers'][0]['digest']}").body, layer)
        self.assertEqual(self.registry.get(f"/v2/{self.name}/manifests/{support.digest(answer.body)}").body,
                         answer.body)

    def test_answers_of_the_registry_can_be_spoilt_too(self):
        self.wfm.add_package(support.make_compose(), self.name)
        digest = self.pull(self.name)[1]["layers"][0]["digest"]
        self.fault({"path": f"/v2/{self.name}/blobs/*", "corrupt": True})
        self.assertNotEqual(support.digest(self.registry.get(f"/v2/{self.name}/blobs/{digest}").body), digest)


class Tokens(RegistryCase):
    """A registry that demands tokens: the challenge, the exchange, the scope."""

    def start(self, *options):
        folder = support.make_folder(self)
        secret = support.write(os.path.join(folder, "secret"), "s3cr3t:x\n")
        self.wfm, self.said = support.Wfm(self, self.pki, "--registry-token", f"margo:{secret}", *options), 0
        self.registry.url = f"https://{self.wfm.registry}"
        for name in ("shop", "other"):
            self.wfm.add_package(support.make_compose(), name)

    def read_challenge(self, path="/v2/shop/manifests/1.0.0", **headers):
        """The parts of the challenge that a request meets."""
        answer = self.registry.get(path, **headers)
        self.assert_oci_error(answer, 401, "UNAUTHORIZED", "token")
        scheme, _, rest = answer.headers["WWW-Authenticate"].partition(" ")
        self.assertEqual(scheme, "Bearer")
        return dict(re.findall(r'(\w+)="([^"]*)"', rest))

    def ask(self, challenge, user=None, **changes):
        """The token endpoint's answer."""
        query = urllib.parse.urlencode(dict({key: challenge[key] for key in ("service", "scope")}, **changes))
        headers = {"Authorization": "Basic " + base64.b64encode(user.encode()).decode()} if user else {}
        return self.registry.get(f"{challenge['realm']}?{query}", **headers)

    def test_a_token_is_for_the_known_user_and_for_one_repository(self):
        """C-153."""
        self.start()
        challenge = self.read_challenge()
        self.assertEqual(challenge, {"realm": f"https://{self.wfm.registry}/token", "service": "wfm.py",
                                     "scope": "repository:shop:pull"})
        for user in (None, "margo:wrong", "margo:s3cr3t", "other:s3cr3t:x", "margo", ":", "MARGO:s3cr3t:x"):
            with self.subTest(user):
                answer = self.ask(challenge, user)
                self.assert_oci_error(answer, 401, "UNAUTHORIZED", "user or password")
                self.assertTrue(answer.headers["WWW-Authenticate"].startswith("Basic "))
        answer = self.ask(challenge, "margo:s3cr3t:x")
        self.assertEqual((answer.status, answer.headers["Cache-Control"], answer.json()["expires_in"]),
                         (200, "no-store", 300))
        token = answer.json()["token"]
        self.assertEqual(self.registry.get("/v2/shop/manifests/1.0.0", Authorization=f"Bearer {token}").status, 200)
        self.assertEqual(self.registry.get("/v2/shop/tags/list", Authorization=f"bearer {token}").status, 200)
        self.assertEqual(self.registry.get("/v2/", Authorization=f"Bearer {token}").status, 200)
        self.assertEqual(self.read_challenge("/v2/other/tags/list", Authorization=f"Bearer {token}")["scope"],
                         "repository:other:pull")
        for wrong in ("Bearer x", "Bearer", f"Basic {token}", "Basic bWFyZ286czNjcjN0Ong=", token, ""):
            with self.subTest(wrong):
                self.read_challenge(Authorization=wrong)
        self.assertNotIn("scope", self.read_challenge("/v2/"))
        pushing = self.ask(challenge, "margo:s3cr3t:x", scope="repository:shop:push").json()["token"]
        self.read_challenge(Authorization=f"Bearer {pushing}")
        journal = open_text(self.wfm.path("state", "requests.jsonl"))
        for secret in (token, "bWFyZ286czNjcjN0Ong=", "s3cr3t"):
            self.assertNotIn(secret, journal)

    def test_anonymous_tokens_are_given_where_that_was_asked_for(self):
        """C-153: the same flow without a user; a wrong password is refused nevertheless."""
        self.start("--registry-anonymous")
        challenge = self.read_challenge()
        self.assert_oci_error(self.ask(challenge, "margo:wrong"), 401, "UNAUTHORIZED", "user or password")
        token = self.ask(challenge).json()["token"]
        self.assertEqual(self.registry.get("/v2/shop/manifests/1.0.0", Authorization=f"Bearer {token}").status, 200)


class IdentityService(WfmCase):
    """--mis: where a client learns the trust bundle."""

    def test_discovery_leads_to_the_trust_bundle(self):
        """C-030, C-032, C-045: over ordinary TLS with a name that is checked."""
        url = self.wfm.wait_for_line("mis ")
        visitor = Client(url, open_text(self.pki.path("site-ca.pem")))
        visitor.context.check_hostname = True
        found = visitor.get("/.well-known/margo", Accept="application/json")
        self.assertEqual((found.status, found.headers["Content-Type"]), (200, "application/json"))
        self.assertEqual(found.json(),
                         {"trustDomain": support.TRUST_DOMAIN,
                          "trustBundleUri": f"{url}/.well-known/spiffe/bundle.json"})
        bundle = visitor.get(found.json()["trustBundleUri"], Accept="application/json")
        self.assertEqual(bundle.body.decode(), open_text(self.pki.path("bundle.json")))
        for path, answer in (("/.well-known/margo", found), ("/.well-known/spiffe/bundle.json", bundle)):
            self.assert_etag(answer)
            again = visitor.get(path, If_None_Match=answer.headers["ETag"])
            self.assertEqual((again.status, again.body), (304, b""))
            self.assert_problem(visitor.get(path, Accept="text/html"), "server-cannot-generate-response",
                                "application/json")
        self.assert_problem(visitor.get("/api/v1/deployments"), 404)
        self.assert_problem(visitor.call("POST", "/.well-known/margo", b"{}"), 405, "POST")

    def test_a_trust_bundle_that_is_not_there_is_worth_another_try(self):
        """C-038, C-057."""
        path = self.pki.path("bundle.json")
        visitor = Client(self.wfm.wait_for_line("mis "), open_text(self.pki.path("site-ca.pem")))
        self.addCleanup(support.write, path, open_text(path))
        os.remove(path)
        document = self.assert_problem(visitor.get("/.well-known/spiffe/bundle.json"), "spiffe-bundle-not-found")
        self.assertEqual((document["retryable"], document["retryAfterSeconds"], document["backoffStrategy"]),
                         (True, 30, "exponential"))
        self.pki.write_bundle("ca.pem", spiffe_sequence=2)
        self.assertEqual(visitor.get("/.well-known/spiffe/bundle.json").json()["spiffe_sequence"], 2)


class Restarts(unittest.TestCase):
    """What a server knows after it was ended and started again: four clients whose files changed meanwhile, or not."""

    CLIENTS = ("same", "changed", "emptied", "broken")

    @classmethod
    def setUpClass(cls):
        cls.life = Lifetime()
        try:
            wfm = support.Wfm(cls.life, SHARED["pki"])
            cls.clients = {name: make_client(wfm, SHARED["pki"], name) for name in cls.CLIENTS}
            cls.before = {name: cls.prepare(wfm, name, client) for name, client in cls.clients.items()}
            wfm.stop()
            cls.ended = wfm.process.returncode
            support.write(wfm.path("deployments", "changed", "x.yaml"), support.make_deployment(ONE))
            os.remove(wfm.path("deployments", "emptied", "x.yaml"))
            support.write(wfm.path("deployments", "broken", "x.yaml"), "id: [")
            cls.wfm = support.Wfm(cls.life, SHARED["pki"], folder=wfm.folder)
            for client in cls.clients.values():
                client.url = cls.wfm.url
        except BaseException:
            cls.life.close()
            raise

    @classmethod
    def tearDownClass(cls):
        cls.life.close()

    @staticmethod
    def prepare(wfm, name, client):
        """Brings a client to manifest version 2, and returns that manifest's Answer."""
        for text in (support.make_deployment(ONE), support.make_deployment(ONE, "two") + "\r\n# \u2603"):
            support.write(wfm.path("deployments", name, "x.yaml"), text)
            answer = client.get("/api/v1/deployments")
        return answer

    def test_a_server_that_is_asked_to_end_ends_well(self):
        self.assertEqual(self.ended, 0)

    def test_an_unchanged_set_keeps_its_version_and_its_bytes(self):
        """C-101, C-111."""
        client, before = self.clients["same"], self.before["same"]
        self.assertEqual(client.get("/api/v1/deployments", If_None_Match=before.headers["ETag"]).status, 304)
        self.assertEqual(client.get("/api/v1/deployments").body, before.body)
        for entry in before.json()["deployments"] + [before.json()["bundle"]]:
            self.assertEqual(support.digest(client.get(entry["url"]).body), entry["digest"])

    def test_versions_go_on_growing(self):
        """C-103: also where the set is as it once was, or empty."""
        changed, emptied = (self.clients[name].get("/api/v1/deployments").json() for name in ("changed", "emptied"))
        self.assertEqual([self.before[name].json()["manifestVersion"] for name in self.CLIENTS], [2] * 4)
        self.assertEqual((changed["manifestVersion"], len(changed["deployments"])), (3, 1))
        self.assertEqual(emptied, {"manifestVersion": 3, "bundle": None, "deployments": []})
        for entry in self.before["emptied"].json()["deployments"] + [self.before["emptied"].json()["bundle"]]:
            self.assertEqual(self.clients["emptied"].get(entry["url"]).status, 200, "the set before stays fetchable")

    def test_a_file_that_broke_meanwhile_keeps_the_set_too(self):
        self.assertEqual(self.clients["broken"].get("/api/v1/deployments").body, self.before["broken"].body)
        self.assertIn(self.wfm.path("deployments", "broken", "x.yaml"), self.wfm.read_output())

    def test_capabilities_and_statuses_are_known_to_the_next_server(self):
        client = self.clients["same"]
        paths = {"/api/v1/capabilities/gw": make_gateway("gw"), "/api/v1/capabilities/gw/plc": make_gateway("gw/plc")}
        self.assertEqual([client.call("PUT", path, body).status for path, body in paths.items()], [201, 201])
        self.assertEqual(client.call("POST", f"/api/v1/deployments/{TWO}/status", make_status(TWO)).status, 201)
        next_one = support.Wfm(self, SHARED["pki"], folder=self.wfm.folder)
        client.url = next_one.url
        self.addCleanup(setattr, client, "url", self.wfm.url)
        self.assertEqual([client.call("PUT", path, body).status for path, body in paths.items()], [200, 200])
        self.assertEqual(client.call("POST", f"/api/v1/deployments/{TWO}/status", make_status(TWO)).status, 200)
        self.assertEqual([item["client"] for item in next_one.reports(TWO)], ["same", "same"])


class Options(unittest.TestCase):
    """--prefix, --tls 1.2 and --lenient."""

    @classmethod
    def setUpClass(cls):
        cls.life = Lifetime()
        try:
            cls.wfm = support.Wfm(cls.life, SHARED["pki"], "--prefix", "/v1alpha2/margo/", "--tls", "1.2", "--lenient")
        except BaseException:
            cls.life.close()
            raise

    @classmethod
    def tearDownClass(cls):
        cls.life.close()

    def setUp(self):
        self.client = self.make_client()
        for name in ("named", THREE, ONE):
            with contextlib.suppress(FileNotFoundError):
                self.wfm.withdraw(name)

    def make_client(self, version=None):
        pki = SHARED["pki"]
        return Client(self.wfm.url + "/v1alpha2/margo", anchors_of(pki),
                      (pki.path("client.pem"), pki.path("client.key")), version)

    def test_a_prefix_stands_before_the_interface_and_not_in_the_manifest(self):
        """C-058: URLs in the manifest begin at /api/v1 whatever the base URL."""
        self.wfm.publish(support.make_deployment(THREE), THREE)
        url = self.client.get("/api/v1/deployments").json()["deployments"][0]["url"]
        self.assertTrue(url.startswith(f"/api/v1/deployments/{THREE}/"))
        self.assertEqual(self.client.get(url).status, 200)
        answer = self.client.get(f"{self.wfm.url}/api/v1/deployments")
        self.assertEqual((answer.status, answer.json()["type"]), (404, "about:blank"))
        self.assertIn("/v1alpha2/margo/", answer.json()["detail"])

    def test_tls_1_2_is_the_only_version_then(self):
        """C-002: so that a client can be tried with it."""
        self.assertEqual(self.make_client(ssl.TLSVersion.TLSv1_2).get("/api/v1/deployments").status, 200)
        with self.assertRaises(urllib.error.URLError) as caught:
            self.make_client(ssl.TLSVersion.TLSv1_3).get("/api/v1/deployments")
        self.assertIn("PROTOCOL_VERSION", str(caught.exception))

    def test_lenient_serves_files_as_they_are(self):
        """C-115: so that a client can be shown what it must refuse; a status about such a file is taken as it comes."""
        files = {ONE: b"id: [\xff\n", "named": f"id: '{TWO}'  # text\nmetadata: {{}}\n".encode(),
                 "nameless": b"metadata: {}\n"}
        for name, data in files.items():
            self.wfm.publish(data, name)
        self.client.get("/api/v1/deployments")
        os.remove(self.wfm.path("deployments", "nameless.yaml"))
        self.assertIn("nameless.yaml: neither its name", self.wfm.read_output())
        entries = {item["deploymentId"]: item["url"]
                   for item in self.client.get("/api/v1/deployments").json()["deployments"]}
        self.assertEqual(sorted(entries), [ONE, TWO])
        self.assertEqual([self.client.get(entries[key]).body for key in (ONE, TWO)], [files[ONE], files["named"]])
        status = make_status(states=(("web", "failed"),), name=ONE)
        self.assertEqual(self.client.call("POST", f"/api/v1/deployments/{ONE}/status", status).status, 201)


class Running(WfmCase):
    """The journal of requests, and command lines that make no sense."""

    def test_every_request_is_noted_when_that_was_asked_for(self):
        self.client.get("/api/v1/deployments?x=1", X_Test="y")
        self.client.get("/nothing")
        noted = [item for item in self.wfm.lines("requests.jsonl") if item["client"] == self.client_id]
        self.assertEqual([(item["listener"], item["method"], item["path"], item["status"]) for item in noted],
                         [("listening", "GET", "/api/v1/deployments?x=1", 200), ("listening", "GET", "/nothing", 404)])
        self.assertEqual({name.lower(): value for name, value in noted[0]["headers"].items()}["x-test"], "y")

    def test_a_command_line_that_makes_no_sense_is_refused_with_the_reason(self):
        folder = support.make_folder(self)
        stranger = self.pki.issue("not-a-wfm", [support.CLIENT_ID])
        usual = {"--listen": "127.0.0.1:0", "--certificate": self.pki.path("wfm.pem"),
                 "--key": self.pki.path("wfm.key"), "--deployments": folder,
                 "--trust-bundle": self.pki.path("bundle.json"), "--state": os.path.join(folder, "state")}
        table = (({"--certificate": stranger[0], "--key": stranger[1]}, support.CLIENT_ID),
                 ({"--key": stranger[1]}, "cannot start"),
                 ({"--trust-bundle": os.path.join(folder, "none")}, os.path.join(folder, "none")),
                 ({"--deployments": os.path.join(folder, "none")}, "--deployments"),
                 ({"--mis": "127.0.0.1:0"}, "--site-certificate"))
        command = [sys.executable, os.path.join(support.EXAMPLES, "wfm.py")]
        processes = [subprocess.Popen(command + [text for pair in dict(usual, **options).items() for text in pair],
                                      stdout=subprocess.PIPE,
                                      stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, universal_newlines=True)
                     for options, _ in table]
        for process in processes:
            self.addCleanup(support.end, process)
        for process, (options, word) in zip(processes, table):
            with self.subTest(options):
                output, errors = process.communicate(timeout=support.LIMIT)
                self.assertEqual((process.returncode, output), (2, ""))
                self.assertIn(word, errors)
                self.assertNotIn("Traceback", errors)
