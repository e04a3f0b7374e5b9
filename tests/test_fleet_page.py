"""The fleet page of the example WFM, in a real browser: Debian's chromium, headless.

The devices are real agents on engines of files.  MARGO_TEST_PICTURE=FILE keeps the screenshot (examples/fleet.png is one).
"""
import html.parser
import http.client
import json
import os
import shutil
import ssl
import subprocess
import sys
import unittest

from tests import support
from tests.support import HELLO

HOSTILE = "<script>document.title='mine'</script><img src=x onerror=alert(1)>\"'&"
GATEWAY = "hall-7"


class Table(html.parser.HTMLParser):
    """The rows of the page's table, as lists of text by columns, cells that span rows repeated; and every tag there is."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.rows, self.spans, self.cell = [], [], {}, None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.fill()
            self.cell, self.count = [], int(dict(attrs).get("rowspan", 1))

    def fill(self):
        """Cells of rows above that reach down to here."""
        row = self.rows[-1]
        while self.spans.get(len(row), (0, ""))[0]:
            count, text = self.spans[len(row)]
            self.spans[len(row)] = (count - 1, text)
            row.append(text)

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            text = "".join(self.cell)
            self.spans[len(self.rows[-1])] = (self.count - 1, text)
            self.rows[-1].append(text)
            self.cell = None
        if tag == "tr":
            self.fill()

    def handle_data(self, data):
        if self.cell is not None:
            self.cell.append(data)


class FleetPage(unittest.TestCase):
    def setUp(self):
        support.require("openssl")
        self.pki = support.Pki(self)
        self.start()
        self.wfm.add_package(support.make_compose())
        self.wfm.add_package(support.make_compose(), tag="1.1.0")

    def start(self, folder=None, *options):
        """The WFM with its page."""
        self.wfm = support.Wfm(self, self.pki, "--page", "127.0.0.1:0", *options, folder=folder)
        self.page = self.wfm.wait_for_line("page ")

    def make_device(self, client, **device):
        """A device with an SVID, an engine and a folder of its own."""
        certificate, key = self.pki.issue(client, [f"{support.WFM_ID}/client/{client}"])
        device = dict({"id": client, "vendor": "Example Industries", "modelNumber": "EG-100", "serialNumber": "0042",
                       "properties": {"cpus": [{"cores": 4, "architecture": "arm64"}], "memory": "4Gi", "storage": "32Gi"}},
                      **device)
        return support.Device(self, self.pki, self.wfm, support.FakeEngine(self), {
            "identity.certificate": certificate, "identity.key": key, "device": device})

    def make_child(self):
        """The settings of a child device with an engine of its own."""
        return {"id": "press", "vendor": "Press & Sons", "modelNumber": "P-9", "serialNumber": "7",
                "properties": {"cpus": [{"cores": 1, "architecture": "arm"}], "memory": "256Mi", "storage": "2Gi"},
                "connection": {"CONTAINER_HOST": "unix:///press", "FAKE_PODMAN": support.FakeEngine(self).folder}}

    def publish(self, client, number, name, revision="1.0.0", package="web", device=None):
        """A deployment for a client."""
        deployment_id = HELLO[:-1] + str(number)
        text = support.make_deployment(deployment_id, name, ((package, revision),), registry=self.wfm.registry,
                                       device=device or client)
        support.write(self.wfm.path("deployments", client, f"{number}.yaml"), text)

    def browse(self, *options):
        """What the browser says after it has opened the page."""
        support.require("chromium")
        done = subprocess.run(
            [shutil.which("chromium"), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
             "--disable-background-networking", "--window-size=1280,500", f"--user-data-dir={support.make_folder(self)}"]
            + list(options) + [self.page + "/"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=support.LIMIT)
        self.assertEqual(done.returncode, 0, done.stderr.decode()[-2000:])
        return done.stdout.decode()

    def ask(self, method="GET", path="/", **headers):
        """(status, headers, text) without a browser."""
        connection = http.client.HTTPConnection(self.page.partition("//")[2], timeout=support.LIMIT)
        self.addCleanup(connection.close)
        connection.request(method, path, headers=headers)
        with connection.getresponse() as answer:
            return answer.status, dict(answer.getheaders()), answer.read().decode()

    def test_a_browser_shows_what_each_device_should_run_and_what_it_said(self):
        for number, name, package in ((1, "hello", "web"), (2, "collector", "not-there")):
            self.publish("line-4-cell-2", number, name, package=package)
        self.make_device("line-4-cell-2").cycle(1)
        self.publish("line-4-cell-2", 1, "hello", "1.1.0")                      # not asked for yet
        self.make_device(GATEWAY, serialNumber=HOSTILE, children=[self.make_child()]).cycle()
        rows = Table(self.browse("--dump-dom"))
        self.assertEqual(rows.rows[0], ["Device", "Hardware", "Manifest", "Deployment", "Wanted", "Reported", "Error",
                                        "Last seen"])
        found = {row[0] + " " + row[3].split("\n")[0]: row for row in rows.rows[1:]}
        self.assertEqual(set(found), {"line-4-cell-2 hello", "line-4-cell-2 collector", "hall-7 nothing", "hall-7/press nothing"})
        hello, collector = found["line-4-cell-2 hello"], found["line-4-cell-2 collector"]
        self.assertEqual(hello[1:6], ["Example Industries EG-100 0042\n4 arm64, memory 4Gi, storage 32Gi", "2\n1 adopted",
                                      f"hello\n{HELLO[:-1]}1", "installed\nweb 1.1.0", "installed"])
        self.assertEqual((hello[6], collector[5]), ("", "failed"))
        self.assertRegex(collector[6], "^not-there: PULL_FAILED: .*: HTTP 404")
        self.assertRegex(hello[7], "^[0-9]{1,2} s ago$")
        self.assertIn(HOSTILE, found["hall-7 nothing"][1])                      # as text
        self.assertIn("Press & Sons P-9 7", found["hall-7/press nothing"][1])
        self.assertEqual({tag for tag, _ in rows.tags} & {"script", "img", "a", "form", "input", "button", "iframe"}, set())
        self.assertIn(("meta", {"http-equiv": "refresh", "content": "5"}), rows.tags)

    def test_a_picture_of_it(self):
        """The one in the README: an update on its way, a failure, a child device, a device that is silent."""
        self.publish("line-4-cell-3", 1, "hello")
        self.make_device("line-4-cell-3", serialNumber="0043").cycle()
        folder = self.wfm.folder
        self.wfm.stop()
        self.start(folder)
        for number, name, package in ((2, "hello", "web"), (3, "collector", "web")):
            self.publish("line-4-cell-2", number, name, package=package)
        device = self.make_device("line-4-cell-2")
        device.cycle()
        self.publish("line-4-cell-2", 3, "collector", "2.0.0")
        device.cycle(1)
        self.make_device(GATEWAY, modelNumber="EG-200", serialNumber="0107", children=[self.make_child()]).cycle()
        self.publish(GATEWAY, 4, "counter", device=f"{GATEWAY}/press")
        path = os.path.join(support.make_folder(self), "fleet.png")
        self.browse(f"--screenshot={path}", "--hide-scrollbars")
        with open(path, "rb") as file:
            picture = file.read()
        self.assertTrue(picture.startswith(b"\x89PNG"))
        self.assertEqual((int.from_bytes(picture[16:20], "big"), len(picture) > 10000), (1280, True))
        if os.environ.get("MARGO_TEST_PICTURE"):
            shutil.copy(path, os.environ["MARGO_TEST_PICTURE"])

    def test_a_refusal_is_shown_in_words_until_the_same_is_taken(self):
        self.wfm.fault({"method": "PUT", "problem": "semantic-error", "times": 1})
        device = self.make_device("line-4-cell-2")
        device.run("enroll")
        last = Table(self.ask()[2]).rows[1][7]
        self.assertRegex(last, r"^[0-9]+ s ago\nrefused:\nPUT /api/v1/capabilities/line-4-cell-2: 422 Semantic Error$")
        os.remove(os.path.join(device.state_dir, "state.json"))
        device.run("enroll")
        self.assertRegex(Table(self.ask()[2]).rows[1][7], r"^[0-9]+ s ago$")

    def test_it_can_only_be_read_and_only_from_this_machine(self):
        status, headers, _ = self.ask()
        self.assertEqual((status, headers["Cache-Control"]), (200, "no-store"))
        self.assertIn("default-src 'none'", headers["Content-Security-Policy"])
        for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
            self.assertEqual(self.ask(method)[0], 405)
        self.assertEqual([self.ask("GET", path)[0] for path in ("/state", "/../state", "/?x", "/api/v1/deployments")],
                         [404, 404, 200, 404])
        self.assertEqual(self.ask(Host="fleet.example")[0], 403)                # a name that a stranger's DNS leads here
        self.assertEqual([self.ask(Host=host)[0] for host in ("localhost:80", "[::1]:80", "127.0.0.1")], [200] * 3)
        for address in ("0.0.0.0:0", "192.0.2.1:0", ":0", "example.com:0"):
            done = subprocess.run(
                [sys.executable, os.path.join(support.EXAMPLES, "wfm.py"), "--page", address, "--certificate",
                 self.pki.path("wfm.pem"), "--key", self.pki.path("wfm.key"), "--trust-bundle", self.pki.path("bundle.json"),
                 "--deployments", self.wfm.path("deployments"), "--state", support.make_folder(self)],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, timeout=support.LIMIT)
            self.assertEqual((done.returncode, done.stdout), (2, ""), address)
            self.assertIn("for this machine alone", done.stderr)

    def test_looking_changes_nothing(self):
        self.publish("line-4-cell-2", 1, "hello")
        self.make_device("line-4-cell-2").cycle()
        requests, statuses = len(self.wfm.requests()), len(self.wfm.lines("statuses.jsonl"))
        with open(self.wfm.path("state", "clients", "line-4-cell-2", "desired.json")) as file:
            before = file.read()
        for _ in range(3):
            self.ask()
        with open(self.wfm.path("state", "clients", "line-4-cell-2", "desired.json")) as file:
            self.assertEqual(file.read(), before)
        self.assertEqual((len(self.wfm.requests()), len(self.wfm.lines("statuses.jsonl"))), (requests, statuses))


class Start(unittest.TestCase):
    def test_a_refusal_is_told_in_words(self):
        """On the console as to the client: what a value has to look like, without a regular expression."""
        support.require("openssl")
        pki = support.Pki(self)
        wfm = support.Wfm(self, pki)
        wfm.wait_for_line("listening ")
        device = support.Device(self, pki, wfm, settings={"runtime": {"compose": "off"}})
        self.assertEqual(device.run("enroll").returncode, 0)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.load_verify_locations(pki.path("ca.pem"))
        context.load_cert_chain(pki.path("client.pem"), pki.path("client.key"))
        connection = http.client.HTTPSConnection(wfm.url.partition("//")[2], context=context, timeout=support.LIMIT)
        self.addCleanup(connection.close)
        properties = {"id": support.DEVICE, "vendor": "v", "modelNumber": "m", "serialNumber": "s", "memory": "8GB"}
        connection.request("PUT", f"/api/v1/capabilities/{support.DEVICE}", json.dumps({"properties": properties}),
                           {"Content-Type": "application/json"})
        with connection.getresponse() as answer:
            self.assertIn(b"must be a size such as 512Mi or 8Gi", answer.read())
        line = next(line for line in wfm.read_output().split("\n") if "PUT" in line)
        self.assertRegex(line, f"{support.DEVICE} PUT /api/v1/capabilities/{support.DEVICE}: 422 The capabilities were understood"
                               ' but not accepted; .*; properties.memory must be a size such as 512Mi or 8Gi, not "8GB"')

    def test_an_address_that_is_taken_is_named(self):
        support.require("openssl")
        pki = support.Pki(self)
        wfm = support.Wfm(self, pki)
        address = wfm.url.partition("//")[2]
        done = subprocess.run(
            [sys.executable, os.path.join(support.EXAMPLES, "wfm.py"), "--listen", address, "--certificate", pki.path("wfm.pem"),
             "--key", pki.path("wfm.key"), "--trust-bundle", pki.path("bundle.json"), "--deployments", wfm.path("deployments"),
             "--state", support.make_folder(self)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
        self.assertEqual(done.returncode, 2)
        self.assertIn(f"cannot start: {address}: ", done.stderr)

    def test_the_configuration_that_is_printed_at_the_start_works(self):
        """With what pki.sh made beside the trust bundle; copied as it stands."""
        support.require("openssl")
        pki = support.Pki(self)
        for profile in ("mtls", "signed-a"):
            with self.subTest(profile):
                wfm = support.Wfm(self, pki, profile=profile)
                lines = [line[4:] for line in wfm.read_output().split("\n") if line.startswith("    ")]
                device = support.Device(self, pki, wfm, support.FakeEngine(self))
                device.config_file = support.write(os.path.join(device.folder, "copied.yaml"), "\n".join(lines) + "\n")
                wfm.add_package(support.make_compose())
                wfm.publish(support.make_signed_deployment("a", registry=wfm.registry) if wfm.dialect
                            else support.make_deployment(registry=wfm.registry))
                device.cycle()
                self.assertEqual(wfm.statuses()[-1], "installed")
                self.assertEqual(json.loads(device.run("status", "--json").stdout)["outbox"], 0)


if __name__ == "__main__":
    unittest.main()
