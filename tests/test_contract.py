"""The contract: what the agent sends, judged by two validators that nobody here wrote, over a whole life of a device.

tests/data/openapi holds the interface of 1.0.0-rc.3 as schemas.  A front with mutual TLS stands between the agent and the
example servers.  It shows each request to prism (npm) and keeps it for openapi-core (PyPI), which also judges the answers.
What no schema knows is refused as a strict WFM would: with a 404 that is of no Margo type.
"""
import collections
import functools
import http.client
import http.server
import json
import os
import shutil
import socketserver
import ssl
import threading
import unittest
import urllib.parse

from tests import support
from tests.support import DEVICE, HELLO

OTHERS = [HELLO[:-1] + digit for digit in "123456"]
Exchange = collections.namedtuple("Exchange", "method path headers body verdict status answer_headers answer")


def require_validators():
    """Skips or fails the test unless both validators are there."""
    support.require("prism", "openapi_core", "yaml")


class Prism(support.Service):
    """prism's mock of one document: it answers 4xx to a request that breaks the contract."""

    def __init__(self, test, name):
        self.port = support.free_port()
        with open(os.path.join(support.DATA, "openapi", name + ".yaml"), encoding="utf-8") as file:
            text = file.read()                                          # it writes no YAML: there any text will do
        text = text.replace("application/yaml: {schema: {$ref: '#/components/schemas/Deployment'}}",
                            "application/yaml: {schema: {type: string}}")
        document = support.write(os.path.join(support.make_folder(test), name + ".yaml"), text)
        super().__init__(test, [shutil.which("node"), support.find_prism(), "mock", "--errors", "--verboseLevel", "warn",
                                "--host", "127.0.0.1", "--port", str(self.port), document])

    def judge(self, method, path, headers, body):
        """(status, text) that prism gives a request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=support.LIMIT)
        try:
            connection.request(method, path, body or None, headers)
            with connection.getresponse() as answer:
                return answer.status, answer.read().decode(errors="replace")
        finally:
            connection.close()

    def is_up(self):
        """Whether it answers by now; fails where it has ended."""
        if self.process.poll() is not None:
            raise AssertionError(f"prism ended: {self.read_output()}")
        try:
            return self.judge("GET", "/", {}, b"")
        except OSError:
            return None


class Front(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """Stands before an example server and notes each exchange; `url` is where it listens."""

    daemon_threads = True

    def __init__(self, test, pki, prism, upstream, identity, anchors=None):
        """identity: of this front, and with `anchors` the agent has to show one, too."""
        super().__init__(("127.0.0.1", 0), Handler)
        self.prism, self.exchanges, self.anchors = prism, [], anchors
        self.upstream = urllib.parse.urlsplit(upstream).netloc
        self.inside = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.inside.check_hostname = False
        self.inside.load_verify_locations(pki.path("ca.pem"))
        self.inside.load_verify_locations(pki.path("site-ca.pem"))
        self.inside.load_cert_chain(pki.path("client.pem"), pki.path("client.key"))
        self.outside = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.outside.load_cert_chain(pki.path(f"{identity}.pem"), pki.path(f"{identity}.key"))
        if anchors:
            self.outside.verify_mode = ssl.CERT_REQUIRED
            self.outside.load_verify_locations(pki.path(anchors))
        self.url = f"https://localhost:{self.server_address[1]}"
        thread = threading.Thread(target=self.serve_forever, daemon=True)
        thread.start()
        test.addCleanup(self.server_close)
        test.addCleanup(self.shutdown)

    def finish_request(self, request, client_address):
        request.settimeout(30)
        try:
            connection = self.outside.wrap_socket(request, server_side=True)
        except OSError:
            return
        with connection:
            self.RequestHandlerClass(connection, client_address, self)

    def ask(self, method, path, headers, body):
        """(status, [(name, value)], bytes) of the server behind."""
        connection = http.client.HTTPSConnection(self.upstream, context=self.inside, timeout=support.LIMIT)
        try:
            connection.request(method, path, body or None, headers)
            with connection.getresponse() as answer:
                return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()


class Handler(http.server.BaseHTTPRequestHandler):
    """One request: judged, passed on, noted."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def handle_exchange(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = dict(self.headers.items())
        verdict = self.server.prism.judge(self.command, self.path, headers, body)
        if verdict[0] == 404:
            answer = (404, [("Content-Type", "application/problem+json")], verdict[1].encode())
        else:
            answer = self.server.ask(self.command, self.path, headers, body)
        self.server.exchanges.append(Exchange(self.command, self.path, headers, body, verdict, *answer))
        status, answer_headers, content = answer
        self.send_response_only(status)
        for name, value in answer_headers:
            if name.lower() not in ("content-length", "connection"):
                self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_POST = do_DELETE = handle_exchange

    def log_message(self, *_):
        """The exchanges are kept elsewhere."""


class Validator:
    """openapi-core with one document."""

    def __init__(self, name):
        from openapi_core import Config, OpenAPI
        from openapi_core.testing import MockRequest, MockResponse
        import yaml
        with open(os.path.join(support.DATA, "openapi", name + ".yaml"), encoding="utf-8") as file:
            document = yaml.safe_load(file)
        self.contract = OpenAPI.from_dict(document, config=Config(extra_media_type_deserializers={
            "application/vnd.margo.manifest.v1+json": json.loads, "application/yaml": yaml.safe_load}))
        self.make_request, self.make_response = MockRequest, MockResponse

    def request(self, exchange):
        """The request of an exchange, as openapi-core takes it."""
        split = urllib.parse.urlsplit(exchange.path)
        kind = exchange.headers.get("Content-Type", "")
        return self.make_request("https://wfm.example", exchange.method, split.path, headers=exchange.headers,
                                 data=exchange.body, content_type=kind)

    def find_errors(self, exchange):
        """What is wrong with a request."""
        return [explain(error) for error in self.contract.iter_request_errors(self.request(exchange))]

    def find_answer_errors(self, exchange):
        """What is wrong with the answer."""
        headers = dict(exchange.answer_headers)
        answer = self.make_response(exchange.answer, exchange.status, headers, headers.get("Content-Type", ""))
        return [explain(error) for error in self.contract.iter_response_errors(self.request(exchange), answer)]


@functools.lru_cache(maxsize=None)
def find_validator(name):
    """The Validator of a document, made once: that takes a second."""
    return Validator(name)


def explain(error):
    """An error of openapi-core with what lies behind it."""
    behind = [str(item) for item in getattr(error.__cause__, "schema_errors", ())]
    return "; ".join([f"{type(error).__name__}: {error}"] + behind)


def find_invalid(exchanges, name):
    """What either validator finds wrong: one line for each request."""
    validator = find_validator(name)
    found = []
    for exchange in exchanges:
        faults = validator.find_errors(exchange)
        if exchange.verdict[0] >= 400:
            faults.append(f"prism: {exchange.verdict}")
        found += [f"{exchange.method} {exchange.path} {exchange.body!r}: {fault}" for fault in faults]
    return found


class ContractCase(support.SharedCase):
    """Both validators, the example servers behind fronts, a device with an engine of files."""

    @classmethod
    def start_services(cls):
        require_validators()
        cls.prisms = {name: Prism(cls.shared, name) for name in ("workload-management", "trust-bundle")}
        for name, prism in cls.prisms.items():
            support.wait_for(prism.is_up, what=f"prism with {name}")

    def setUp(self):
        self.wfm = support.Wfm(self, self.pki, "--mis", "127.0.0.1:0")
        self.front = Front(self, self.pki, self.prisms["workload-management"], self.wfm.url, "wfm", "ca.pem")
        mis = self.wfm.wait_for_line("mis ")
        self.mis_front = Front(self, self.pki, self.prisms["trust-bundle"], mis, "site")
        self.engine = support.FakeEngine(self)
        self.device = support.Device(self, self.pki, self.wfm, self.engine, url=self.front.url, settings={
            "identity.discovery": self.mis_front.url + "/.well-known/margo", "identity.ca": self.pki.path("site-ca.pem")})
        del self.device.settings["identity"]["trust_bundle"]
        self.device.save()
        self.wfm.add_package(support.make_compose())

    def publish(self, deployment_id=HELLO, package="web", **options):
        name = "hello" if deployment_id == HELLO else f"app-{deployment_id[-1]}"
        self.wfm.publish(support.make_deployment(deployment_id, name, ((package, "1.0.0"),), registry=self.wfm.registry,
                                                 **options), deployment_id)

    def count(self):
        """How often each kind of request was sent: its method and the words of its path, a status by its state."""
        kinds = collections.Counter()
        for exchange in self.front.exchanges:
            words = exchange.path.split("/")[3:]
            kind = f"{exchange.method} {words[0]}" + (" of one" if len(words) > 2 else "")
            if exchange.method == "POST":
                kind = "status " + json.loads(exchange.body.decode())["status"]["state"]
            kinds[kind] += 1
        return kinds


class Life(ContractCase):
    """C-050: every request is one that the interface knows."""

    def test_a_whole_life_is_valid_for_both(self):
        """C-080, C-100, C-101, C-130, C-134, C-136: capabilities, every state, receipts, documents, a bundle, leaving."""
        self.device.cycle()                                             # nothing should run
        self.publish(parameters={"GREETING": "one"})
        self.device.cycle()
        self.device.cycle()                                             # 304
        self.publish(parameters={"GREETING": "two"})
        self.device.cycle()
        self.publish(OTHERS[0], package="not-there")                    # fails, and HELLO's receipt of the manifest is sent
        self.device.cycle(1)
        for deployment_id in OTHERS[1:5]:                               # many at once come as a bundle
            self.publish(deployment_id)
        self.publish(OTHERS[5], device="somebody-else")
        self.device.cycle(1)
        self.device.set("device.labels", {"example.com/hall": 4, "example.com/shifts": ["early", "late"], "fanless": True})
        self.device.cycle(1)
        for deployment_id in [HELLO] + OTHERS:
            self.wfm.withdraw(deployment_id)
        self.device.cycle()
        self.assertEqual(self.device.run("unenroll").returncode, 0)

        self.assertEqual(find_invalid(self.front.exchanges, "workload-management"), [])
        self.assertEqual(find_invalid(self.mis_front.exchanges, "trust-bundle"), [])
        kinds = self.count()
        self.assertEqual(set(kinds), {"PUT capabilities", "DELETE capabilities", "GET deployments", "GET deployments of one",
                                      "GET bundles", "status pending", "status installing", "status installed",
                                      "status failed", "status removing", "status removed"})
        self.assertEqual((kinds["PUT capabilities"], kinds["DELETE capabilities"]), (2, 1), kinds)
        self.assertGreaterEqual(sum(kinds.values()) + len(self.mis_front.exchanges), 50)
        receipts = [json.loads(exchange.body.decode())["adoptedManifestVersion"] for exchange in self.front.exchanges
                    if exchange.method == "POST" and HELLO in exchange.path]
        self.assertEqual(sorted(set(receipts)), [2, 3, 4, 5, 6])        # of HELLO: its two revisions, and what came after

        validator = find_validator("workload-management")                    # the example WFM is held to the same
        faults = [fault for exchange in self.front.exchanges for fault in validator.find_answer_errors(exchange)]
        validator = find_validator("trust-bundle")
        faults += [fault for exchange in self.mis_front.exchanges for fault in validator.find_answer_errors(exchange)]
        self.assertEqual(faults, [])


class Children(ContractCase):
    """A see-thru gateway; the interface has one segment for a device id, so a child's id goes as gateway%2Fchild there."""

    def setUp(self):
        super().setUp()
        child = support.FakeEngine(self)
        self.device.set("device.children", [
            {"id": name, "vendor": "Example Industries", "modelNumber": "C-1", "serialNumber": name,
             "properties": {"cpus": [{"cores": 2, "architecture": "arm64"}], "memory": "512Mi", "storage": "8Gi"},
             "connection": {"CONTAINER_HOST": f"unix:///{name}", "FAKE_PODMAN": child.folder}} for name in ("press", "saw")])

    def test_children_are_reported_and_withdrawn_validly_once_the_form_is_known(self):
        """The literal form is tried first, once: this server answers 404, of no type of Margo's."""
        self.publish(device=f"{DEVICE}/press")
        self.device.cycle()
        self.publish(OTHERS[0], device=f"{DEVICE}/nobody")                      # 101
        self.device.cycle(1)
        self.wfm.withdraw()
        self.wfm.withdraw(OTHERS[0])
        self.device.settings["device"]["children"].pop()
        self.device.save()
        self.device.cycle()
        self.assertEqual(self.device.run("unenroll").returncode, 0)
        reports = [exchange for exchange in self.front.exchanges if "/capabilities/" in exchange.path]
        literal = [exchange for exchange in reports if exchange.path.count("/") > 4]
        self.assertEqual([(exchange.method, exchange.status) for exchange in literal], [("PUT", 404)])
        rest = [exchange for exchange in self.front.exchanges if exchange not in literal]
        self.assertEqual(find_invalid(rest, "workload-management"), [])
        sent = [(exchange.method, exchange.path.rpartition("/")[2]) for exchange in reports if exchange not in literal]
        press, saw = f"{DEVICE}%2Fpress", f"{DEVICE}%2Fsaw"
        self.assertEqual(sent, [("PUT", DEVICE), ("PUT", press), ("PUT", saw), ("DELETE", saw), ("DELETE", press), ("DELETE", DEVICE)])
        self.assertEqual({json.loads(exchange.body.decode())["deviceId"] for exchange in rest if exchange.method == "POST"},
                         {DEVICE, f"{DEVICE}/press"})


GOOD = {"properties": {"id": DEVICE, "vendor": "v", "modelNumber": "m", "serialNumber": "s"}}
REPORT = {"deploymentId": HELLO, "adoptedManifestVersion": 1, "status": {"state": "installed"},
          "components": [{"name": "web", "state": "installed"}]}
BROKEN = [                                                              # what, method, path, document, headers
    ("a device without a vendor", "PUT", f"capabilities/{DEVICE}",
     {"properties": {"id": DEVICE, "modelNumber": "m", "serialNumber": "s"}}, {}),
    ("memory as a number", "PUT", f"capabilities/{DEVICE}", {"properties": dict(GOOD["properties"], memory=512)}, {}),
    ("an architecture as uname says it", "PUT", f"capabilities/{DEVICE}",
     {"properties": dict(GOOD["properties"], cpus=[{"cores": 4, "architecture": "x86_64"}])}, {}),
    ("a document of the generation before", "PUT", f"capabilities/{DEVICE}",
     dict(GOOD, apiVersion="device.margo.org/v1alpha1", kind="DeviceCapabilitiesManifest"), {}),
    ("a label that is an object", "PUT", f"capabilities/{DEVICE}", dict(GOOD, labels={"a": {}}), {}),
    ("no device id", "PUT", "capabilities/", GOOD, {}),
    ("a child's id as two segments", "PUT", f"capabilities/{DEVICE}/press", GOOD, {}),
    ("the body as text", "PUT", f"capabilities/{DEVICE}", GOOD, {"Content-Type": "text/plain"}),
    ("a report without the version", "POST", f"deployments/{HELLO}/status",
     {key: value for key, value in REPORT.items() if key != "adoptedManifestVersion"}, {}),
    ("version 0", "POST", f"deployments/{HELLO}/status", dict(REPORT, adoptedManifestVersion=0), {}),
    ("a state in capitals", "POST", f"deployments/{HELLO}/status", dict(REPORT, status={"state": "Installed"}), {}),
    ("an error without its source", "POST", f"deployments/{HELLO}/status",
     dict(REPORT, status={"state": "failed", "error": {"code": "X", "message": "y"}}), {}),
    ("a component without a state", "POST", f"deployments/{HELLO}/status", dict(REPORT, components=[{"name": "web"}]), {}),
    ("an id that is no UUID", "POST", "deployments/hello/status", dict(REPORT, deploymentId="hello"), {}),
    ("a digest of another kind", "GET", "bundles/sha512:abc", None, {}),
    ("an ETag without quotes", "GET", "deployments", None, {"If-None-Match": "sha256:" + "0" * 64}),
    ("a method that is not there", "DELETE", "deployments", None, {}),
]


class Broken(ContractCase):
    def judge(self, method, path, document, headers):
        """What each validator finds: (openapi-core's errors, prism's status)."""
        body = b"" if document is None else json.dumps(document).encode()
        headers = dict({"Accept": "*/*"}, **headers)
        if body:
            headers.setdefault("Content-Type", "application/json")
        verdict = self.prisms["workload-management"].judge(method, "/api/v1/" + path, headers, body)
        exchange = Exchange(method, "/api/v1/" + path, headers, body, verdict, 0, [], b"")
        return find_validator("workload-management").find_errors(exchange), verdict

    def test_what_is_wrong_is_found_by_both(self):
        """A validator that lets everything pass proves nothing."""
        for what, method, path, document, headers in BROKEN:
            with self.subTest(what):
                errors, verdict = self.judge(method, path, document, headers)
                self.assertNotEqual(errors, [])
                self.assertGreaterEqual(verdict[0], 400)
        for method, path, document in (("PUT", f"capabilities/{DEVICE}", GOOD), ("POST", f"deployments/{HELLO}/status", REPORT)):
            errors, verdict = self.judge(method, path, document, {})
            self.assertEqual((errors, verdict[0] < 300), ([], True), verdict)


if __name__ == "__main__":
    unittest.main()
