"""Desired-state source: the agent as a process against the example WFM; what is fetched, what is refused, what is kept."""
import json
import os
import time
import unittest
from email.utils import formatdate

import margo_agent
from tests import support
from tests.support import DEVICE, HELLO, digest

IDS = [HELLO[:-2] + f"{number:02d}" for number in range(40)]
MANIFEST = ("GET", "/api/v1/deployments")


class SourceCase(support.DeviceCase):
    def publish(self, count=1, **options):
        for index, item in enumerate(IDS[:count]):
            self.wfm.publish(support.make_deployment(item, f"app-{index}", registry=self.wfm.registry, **options), item)

    def fetched(self):
        """The GET requests of the last cycle, without the manifest's."""
        return [path for method, path, _ in self.wfm.requests() if method == "GET" and path != MANIFEST[1]]


class Poll(SourceCase):
    def test_capabilities_come_first_then_the_manifest_and_its_documents(self):
        """C-050, C-080, C-081, C-100: the order of the first exchange."""
        self.publish()
        self.device.cycle()
        requests = self.wfm.requests()
        self.assertEqual(requests[0][:2], ("PUT", f"/api/v1/capabilities/{DEVICE}"))
        self.assertEqual(requests[1][:2], MANIFEST)
        self.assertTrue(requests[2][1].startswith(f"/api/v1/deployments/{HELLO[:-2]}00/sha256:"))
        headers = self.wfm.lines("requests.jsonl")[1]["headers"]
        self.assertEqual(headers["Accept"], "application/vnd.margo.manifest.v1+json")
        self.assertFalse([name for name in headers if name.lower() in ("authorization", "client-cert", "x-client-id")])

    def test_an_unchanged_poll_is_one_request_and_writes_nothing(self):
        """C-020, C-101, C-102, P-16, P-19: one GET with the ETag, no file touched, one engine query."""
        self.publish()
        self.device.cycle()
        before = self.snapshot()
        self.engine.forget_calls()
        count = len(self.wfm.lines("requests.jsonl"))
        self.device.cycle()
        new = self.wfm.lines("requests.jsonl")[count:]
        self.assertEqual([(item["method"], item["status"]) for item in new], [("GET", 304)])
        self.assertEqual(new[0]["headers"]["If-None-Match"], self.device.state()["accepted"]["etag"])
        self.assertEqual([call[0] for call in self.engine.calls()], ["ps"])
        self.assertEqual(self.snapshot(), before)
        self.assertEqual(self.device.status()["lastPoll"]["result"], "unchanged")

    def test_an_etag_is_taken_as_it_comes(self):
        """C-118: one that is not the manifest's digest is said once, and sent back with the next poll as it came."""
        self.publish()
        self.wfm.fault({"method": "GET", "path": "/api/v1/deployments", "headers": {"ETag": '"a-counter-7"'}, "times": 1})
        self.assertIn("the ETag is not the digest of the manifest", self.device.cycle())
        self.assertEqual(self.device.state()["accepted"]["etag"], '"a-counter-7"')
        self.assertNotIn("ETag", self.device.cycle())
        polls = [item for item in self.wfm.lines("requests.jsonl") if (item["method"], item["path"]) == MANIFEST]
        self.assertEqual(polls[-1]["headers"]["If-None-Match"], '"a-counter-7"')

    def test_an_etag_that_alone_is_new_is_sent_back_and_writes_nothing(self):
        """C-101, P-16, F-14: two nodes behind one name may give one manifest different ones."""
        before = None
        self.publish()
        for name in ("two", "one", "two", "one", "two"):
            self.wfm.fault({"method": "GET", "path": MANIFEST[1], "headers": {"ETag": f'"{name}"'}})
            log = self.device.cycle()
            before = before or self.snapshot()
        polls = [item for item in self.wfm.lines("requests.jsonl") if (item["method"], item["path"]) == MANIFEST]
        self.assertEqual([item["headers"]["If-None-Match"] for item in polls[-3:]], ['"one"', '"two"', '"one"'])
        self.assertEqual(log, "")
        self.assertEqual(self.snapshot(), before)

    def test_an_etag_that_never_brings_a_304_costs_no_writes_and_no_words(self):
        """F-14, P-16: a weak one that a proxy makes anew, or none at all: all of the manifest comes each time, and nothing else happens."""
        self.publish()
        self.device.cycle()
        before = self.snapshot()
        for number in range(3):
            for etag in (f'W/"{number}"', ""):
                self.wfm.fault({"method": "GET", "path": MANIFEST[1], "status": 200, "headers": {"ETag": etag} if etag else {}, "body": self.manifest()})
                self.assertEqual(self.device.cycle(0), "")
                self.assertEqual(self.device.status()["lastPoll"]["result"], "unchanged")
        self.assertEqual(self.snapshot(), before)

    def manifest(self):
        """The manifest as the WFM gives it out."""
        config = margo_agent.load_config(self.device.config_file)
        source = margo_agent.MtlsSource(config, margo_agent.load_identity(config), margo_agent.load_trust_bundle(config, margo_agent.Store(config.state_dir)), {})
        return source.fetch_manifest(None).body.decode()

    def test_a_coding_that_nobody_asked_for_is_named(self):
        """F-10: a proxy that packs what it hands on is told of by name; what runs stays."""
        self.publish()
        self.device.cycle()
        self.publish(parameters={"GREETING": "x"})
        for coding in ("gzip", "br", "deflate"):
            self.wfm.fault({"method": "GET", "path": MANIFEST[1], "headers": {"Content-Encoding": coding}, "corrupt": True})
            self.assertIn(f"coding={coding}", self.device.cycle(4))
        self.assertEqual([container["env"] for container in self.engine.containers().values()], [[]])

    def snapshot(self):
        """{path: (inode, size, mtime)} of the state directory."""
        found = {}
        for folder, _, names in os.walk(self.device.state_dir):
            for name in [""] + names:
                facts = os.stat(os.path.join(folder, name))
                found[os.path.join(folder, name)] = facts.st_ino, facts.st_size, facts.st_mtime_ns
        return found

    def test_only_what_changed_is_fetched(self):
        """C-105"""
        self.publish(3)
        self.device.cycle()
        count = len(self.fetched())
        self.wfm.publish(support.make_deployment(IDS[1], "app-1", registry=self.wfm.registry, parameters={"GREETING": "x"}), IDS[1])
        self.device.cycle()
        new = self.fetched()[count:]
        self.assertEqual(len(new), 1)
        self.assertIn(IDS[1], new[0])

    def test_many_documents_come_as_one_bundle(self):
        self.publish(12)
        self.device.cycle()
        self.assertEqual([path.split("/")[3] for path in self.fetched()], ["bundles"])
        self.assertEqual(len(self.device.status()["deployments"]), 12)

    def test_a_bundle_that_is_not_there_is_replaced_by_single_documents(self):
        """C-112: a 404 means neither deletion nor refusal."""
        self.publish(8)
        self.wfm.fault({"path": "/api/v1/bundles/*", "problem": "invalid-bundle"})
        self.device.cycle()
        self.assertEqual(len(self.fetched()), 9)

    def test_a_bundle_refused_in_words_of_the_wfms_own_is_replaced_too(self):
        """C-054: a type that is not Margo's leaves the status, and that is 404."""
        self.publish(8)
        self.wfm.fault({"path": "/api/v1/bundles/*", "status": 404, "headers": {"Content-Type": "application/problem+json; charset=utf-8"},
                        "body": json.dumps({"type": "https://wfm.example/problems/no-bundles-here", "title": "No bundles here"})})
        self.device.cycle(0)
        self.assertEqual(len(self.fetched()), 9)

    def test_a_304_that_nobody_asked_for_is_refused(self):
        """C-102: without an ETag it is no answer; a device that never had a desired state is not as desired."""
        self.publish()
        self.wfm.fault({"method": "GET", "path": "/api/v1/deployments", "status": 304})
        self.assertIn("HTTP 304", self.device.cycle(4))
        self.wfm.fault()
        self.device.cycle(0)
        self.assertEqual(len(self.engine.containers()), 1)

    def test_a_document_that_the_disk_lost_is_fetched_again(self):
        """D-9: unchanged at the WFM is no reason to leave it missing here."""
        self.publish()
        self.device.cycle()
        folder = os.path.join(self.device.state_dir, "artifacts")
        for name in os.listdir(folder):
            os.remove(os.path.join(folder, name))
        with self.engine.open() as held:
            held["containers"] = {}
        self.assertIn("its document is missing", self.device.cycle(1))
        self.device.cycle(0)
        self.assertEqual(len(self.engine.containers()), 1)
        self.assertEqual(self.wfm.requests()[-1][0], "POST")
        self.device.cycle(0)
        self.assertEqual(self.wfm.requests()[-1][2], 304)

    def test_a_wfm_below_a_path_is_asked_below_it(self):
        """C-051: any port, any prefix."""
        wfm = support.Wfm(self, self.pki, "--prefix", "/site/margo")
        device = support.Device(self, self.pki, wfm, self.engine, url=wfm.url.split("/site")[0] + "/site/margo")
        device.cycle()
        self.assertEqual([status for _, _, status in wfm.requests()], [201, 200])


class Refusal(SourceCase):
    """What does not verify refuses the whole manifest, keeps the previous state, and is asked for again."""

    def setUp(self):
        super().setUp()
        self.publish()
        self.device.cycle()
        self.wfm.publish(support.make_deployment(IDS[0], "app-0", registry=self.wfm.registry, parameters={"GREETING": "new"}), IDS[0])

    def check(self, code, words, *faults):
        """One cycle under faults ends with `code` and words, changes nothing that runs; without the faults the next one does it all."""
        before, containers = self.device.state(), self.engine.containers()
        self.wfm.fault(*faults)
        log = self.device.cycle(code)
        for word in words:
            self.assertIn(word, log)
        state = self.device.state()
        for part in ("accepted", "deployments", "outbox"):
            self.assertEqual(state[part], before[part])
        self.assertEqual(self.engine.containers(), containers)
        self.wfm.fault()
        state["patience"] = {}
        support.write(os.path.join(self.device.state_dir, "state.json"), json.dumps(state))
        self.device.cycle(0)
        (container,) = self.engine.containers().values()
        self.assertEqual(container["env"], ["GREETING=new"])

    NO_BUNDLE = {"path": "/api/v1/bundles/*", "status": 404}

    def test_a_flipped_bit_in_a_document(self):
        """C-105, C-106, C-108, D-1: never half an update, and never lost for good."""
        fault = {"method": "GET", "path": f"/api/v1/deployments/{IDS[0]}/*", "corrupt": True}
        self.check(4, ["digest mismatch", IDS[0], "HTTP 404"], fault, self.NO_BUNDLE)

    def test_a_document_that_is_not_there(self):
        """C-112, D-1"""
        fault = {"method": "GET", "path": f"/api/v1/deployments/{IDS[0]}/*", "status": 404}
        self.check(4, ["HTTP 404", IDS[0], "bundle: digest mismatch"], fault, dict(self.NO_BUNDLE, status=200, corrupt=True))

    def test_documents_that_cannot_be_had_one_by_one_come_as_a_bundle(self):
        """C-105: a WFM whose single documents are missing, or other bytes than the manifest names, is no dead end."""
        for number, fault in enumerate(({"status": 404}, {"corrupt": True})):
            self.publish(parameters={"GREETING": f"new {number}"})
            self.wfm.fault(dict(fault, method="GET", path=f"/api/v1/deployments/{IDS[0]}/*"))
            self.device.cycle(0)
            (container,) = self.engine.containers().values()
            self.assertEqual(container["env"], [f"GREETING=new {number}"])

    def test_a_flipped_bit_in_a_bundle(self):
        for index in range(1, 9):
            self.wfm.publish(support.make_deployment(IDS[index], f"app-{index}", registry=self.wfm.registry), IDS[index])
        single = {"method": "GET", "path": f"/api/v1/deployments/{IDS[3]}/*", "status": 404}
        self.wfm.fault({"path": "/api/v1/bundles/*", "corrupt": True}, single)
        self.assertIn("bundle: digest mismatch", self.device.cycle(4))
        self.assertEqual(len(self.engine.containers()), 1)
        self.wfm.fault()
        self.device.cycle(0)
        self.assertEqual(len(self.engine.containers()), 9)

    def test_a_document_cut_short(self):
        self.check(3, ["cut short"], {"method": "GET", "path": f"/api/v1/deployments/{IDS[0]}/*", "truncate": 10})

    def test_a_connection_closed_in_the_middle(self):
        self.check(3, ["GET"], {"method": "GET", "path": f"/api/v1/deployments/{IDS[0]}/*", "close": True})

    def test_a_manifest_that_is_no_json(self):
        """Captive portals answer 200 with HTML."""
        self.check(4, [" refused: "], {"path": MANIFEST[1], "status": 200, "body": "<html>Please sign in</html>"})

    def test_an_answer_over_the_limit(self):
        """D-8"""
        self.check(4, ["longer than"], {"path": MANIFEST[1], "status": 200, "body": "x" * (9 * 1024 * 1024)})

    def test_documents_that_are_too_much_together(self):
        """D-8: each within its limit, ten thousand of them would still be more than there is memory."""
        self.device.set("policy.max_unpacked", "1Ki")
        for index in range(1, 3):
            self.wfm.publish(support.make_deployment(IDS[index], f"app-{index}", registry=self.wfm.registry), IDS[index])
        self.wfm.fault({"path": "/api/v1/bundles/*", "status": 404})
        self.assertIn("more than 1/8 of policy.max_unpacked", self.device.cycle(4))
        self.assertEqual(len(self.engine.containers()), 1)

    def test_an_older_manifest_is_a_rollback(self):
        """C-103, C-104, D-5"""
        old = {"manifestVersion": 1, "deployments": [], "bundle": None}
        fault = {"path": MANIFEST[1], "status": 200, "body": json.dumps(old)}
        self.check(4, ["security: ", "the same version with other content", "accepted: 1"], fault)
        self.check(4, ["security: ", "an older version", "accepted: 2"], fault)

    def test_a_redirect_is_not_followed(self):
        """C-058"""
        self.check(4, ["HTTP 302", "redirects are not followed"],
                   {"path": MANIFEST[1], "status": 302, "headers": {"Location": "https://localhost:1/"}})

    def test_refused_access_leaves_everything_running(self):
        """Protocol 2.2: a retired relationship."""
        self.check(5, ["does not accept this client"], {"path": MANIFEST[1], "problem": "not-authorized"})

    def test_an_empty_manifest_that_does_not_verify_removes_nothing(self):
        """D-4: nothing is removed before all was verified."""
        bundle = {"mediaType": "application/vnd.margo.bundle.v1+tar+gzip", "digest": support.digest(b""), "url": "/x"}
        for content, words in ((bundle, "if and only if"), ({"mediaType": "x"}, "bundle.digest")):
            self.check(4, [words], {"path": MANIFEST[1], "status": 200, "body": json.dumps(
                {"manifestVersion": 99, "deployments": [], "bundle": content})})


class Patience(SourceCase):
    def test_retry_after_is_obeyed_by_the_next_run_too(self):
        """C-056, C-057, D-7: cron every minute does not hammer a WFM that asked for an hour."""
        self.device.cycle()
        self.wfm.fault({"path": MANIFEST[1], "status": 503, "headers": {"Retry-After": "3600"}})
        self.device.cycle(3)
        self.wfm.fault({"path": MANIFEST[1], "status": 503, "headers": {"Retry-After": "3601"}})
        support.write(os.path.join(self.device.state_dir, "state.json"), json.dumps(dict(self.device.state(), patience={}, waits={})))
        self.assertRegex(self.device.cycle(3), r"HTTP 503 \(Service Unavailable\); .*alone until 20\S+Z; .* code=UNREACHABLE\n")
        count = len(self.wfm.requests())
        self.device.cycle(3)
        self.device.cycle(3)
        self.assertEqual(len(self.wfm.requests()), count)
        patience = self.device.state()["patience"]
        self.assertGreaterEqual(patience["delay"], 3600)

    def test_doctor_tells_of_the_wait_and_retry_ends_it(self):
        """F-08"""
        self.device.cycle()
        self.wfm.fault({"path": MANIFEST[1], "status": 503, "headers": {"Retry-After": "3600"}})
        self.device.cycle(3)
        self.assertRegex(self.device.run("doctor").stdout, "FAIL wait +until .* asks to wait; `retry` ends that")
        self.assertEqual(self.device.run("retry").returncode, 0)
        self.assertNotIn("asks to wait", self.device.run("doctor").stdout)
        self.wfm.fault()
        self.device.cycle()

    def test_every_form_of_asking_for_patience_is_obeyed_over_runs(self):
        """C-056, C-057: seconds, date, the problem's own members; also beside a refusal; the header beats the body."""
        self.device.cycle()
        late = formatdate(time.time() + 7000, usegmt=True)
        problem = {"type": "about:blank", "title": "t", "status": 503, "retryable": True, "retryAfterSeconds": 5000}
        for code, fault, least, most in (
                (3, {"status": 429, "headers": {"Retry-After": "4000"}}, 4000, 4000),
                (3, {"status": 503, "headers": {"Retry-After": late}}, 6900, 7001),
                (3, {"problem": dict(problem, backoffStrategy="fixed")}, 5000, 5000),
                (3, {"problem": dict(problem, backoffStrategy="exponential")}, 5000, 5000),
                (3, {"problem": problem, "headers": {"Retry-After": "6000"}}, 6000, 6000),
                (3, {"problem": dict(problem, status=404), "headers": {"Retry-After": "6000"}}, 6000, 6000),
                (5, {"status": 403, "headers": {"Retry-After": "900"}}, 900, 900),
                (4, {"status": 400, "headers": {"Retry-After": "800"}}, 800, 800)):
            self.wfm.fault(dict(fault, path=MANIFEST[1]))
            self.device.cycle(code)
            count = len(self.wfm.requests())
            self.assertTrue(least <= self.device.state()["patience"]["delay"] <= most, (fault, self.device.state()["patience"]))
            self.assertIn("waiting until", self.device.cycle(3, "-v"))
            self.assertEqual(len(self.wfm.requests()), count)
            self.be_patient()

    def be_patient(self):
        """As if the time had passed."""
        support.write(os.path.join(self.device.state_dir, "state.json"), json.dumps(dict(self.device.state(), patience={}, waits={})))

    def test_a_clock_that_jumps_changes_nothing_about_patience(self):
        """P-2, C-056: the wall clock is set back and forth between two runs of one boot."""
        self.device.cycle()
        self.wfm.fault({"path": MANIFEST[1], "status": 503, "headers": {"Retry-After": "3600"}})
        self.device.cycle(3)
        count, state = len(self.wfm.requests()), self.device.state()
        for at in (0, 4 * 10 ** 9):                 # as if the clock had said so then
            support.write(os.path.join(self.device.state_dir, "state.json"), json.dumps(dict(state, patience=dict(state["patience"], at=at))))
            self.device.cycle(3)
        self.assertEqual(len(self.wfm.requests()), count)

    def test_downtime_waits_with_what_would_have_to_be_fetched_and_mends_the_rest(self):
        """C-230, protocol 10: pulls are communication; drift is mended all the same."""
        self.publish(1)
        self.wfm.fault({"path": "/v2/*", "status": 503})
        self.device.cycle(1)
        self.wfm.fault()
        self.device.run("retry")
        count = len(self.wfm.requests("registry"))
        self.device.set("poll.downtime", ["2000-01-01T00:00/2100-01-01T00:00"])
        self.device.cycle(1)
        self.assertEqual((len(self.wfm.requests("registry")), self.engine.containers()), (count, {}))
        self.device.set("poll.downtime", [])
        self.device.cycle(0)
        self.device.set("poll.downtime", ["2000-01-01T00:00/2100-01-01T00:00"])
        with self.engine.open() as held:
            held["containers"] = {}
        self.device.cycle(0)
        self.assertEqual(len(self.engine.containers()), 1)

    def test_errors_do_not_count_in_downtime(self):
        """C-230: an unreachable WFM, a status that waits, a back-off: downtime is 0 all the same."""
        self.publish()
        self.wfm.fault({"method": "POST", "status": 503, "headers": {"Retry-After": "600"}})
        self.device.cycle(3)
        self.device.set("poll.downtime", ["2000-01-01T00:00/2100-01-01T00:00"])
        self.device.cycle(0)

    def test_a_refused_manifest_is_asked_for_again_by_each_run(self):
        self.wfm.fault({"path": MANIFEST[1], "problem": "invalid-request", "times": 3})
        for _ in range(3):
            self.device.cycle(4)
        self.device.cycle(0)

    def test_downtime_is_silent_and_no_fault(self):
        """C-230"""
        self.device.set("poll.downtime", ["2000-01-01T00:00/2100-01-01T00:00"])
        self.publish()
        self.device.cycle(0)
        self.assertEqual(self.wfm.requests(), [])

    def test_outside_of_the_polling_window_nothing_is_polled(self):
        """C-231: capabilities and waiting reports still go out."""
        self.device.set("poll.window", ["2000-01-01T00:00/2000-01-02T00:00"])
        self.publish()
        self.device.cycle(0)
        self.assertEqual([method for method, _, _ in self.wfm.requests()], ["PUT"])


class Sinks(SourceCase):
    def test_capabilities_are_reported_when_they_change_and_not_again(self):
        """C-082"""
        self.device.cycle()
        self.device.cycle()
        self.device.set("device.labels", {"hall": 4})
        self.device.cycle()
        self.device.cycle()
        puts = [request for request in self.wfm.requests() if request[0] == "PUT"]
        self.assertEqual([status for _, _, status in puts], [201, 200])
        held = support.read_json(self.wfm.path("state", "clients", DEVICE, "capabilities.json"))
        self.assertIn({"hall": 4}, [document.get("labels") for document in held.values()])

    def test_refused_capabilities_end_the_first_exchange(self):
        self.wfm.fault({"method": "PUT", "problem": "semantic-error"})
        self.device.cycle(4)
        self.assertEqual(len(self.wfm.requests()), 1)

    def test_changed_capabilities_that_are_refused_are_not_sent_again_and_polling_goes_on(self):
        """Protocol 2.2: do not retry unchanged."""
        self.device.cycle()
        self.wfm.fault({"method": "PUT", "problem": "semantic-error"})
        self.device.set("device.labels", {"hall": 5})
        self.device.cycle()
        self.device.cycle()
        self.assertEqual([method for method, _, _ in self.wfm.requests()].count("PUT"), 2)

    def test_changed_capabilities_that_nobody_judged_are_sent_again(self):
        """C-082: a redirect, a proxy's 404 or 405 says nothing about the document; polling goes on meanwhile."""
        self.publish()
        self.device.cycle()
        for status, memory in ((302, "1Gi"), (404, "2Gi"), (405, "3Gi")):
            self.device.set("device.properties", {"memory": memory})
            self.wfm.fault({"method": "PUT", "status": status})
            self.assertIn("does not take the capabilities", self.device.cycle(3))
            self.assertEqual(self.wfm.requests()[-1][:2], MANIFEST)
            self.wfm.fault()
            self.device.run("retry")
            self.device.cycle()
            self.assertEqual([item[0] for item in self.wfm.requests()[-2:]], ["PUT", "GET"])
            self.device.cycle()
            self.assertEqual([item[0] for item in self.wfm.requests()[-2:]], ["GET", "GET"])

    def test_a_status_waits_until_the_wfm_has_taken_it(self):
        """C-130, C-139, D-26, P-9: the last status of each deployment is never lost; exit 3 says that one waits."""
        self.publish()
        self.wfm.fault({"method": "POST", "status": 503})
        self.device.cycle(3)
        self.assertEqual(self.device.status()["outbox"], 1)
        self.assertEqual(self.wfm.statuses(IDS[0]), [])
        self.wfm.fault()
        self.device.run("retry")
        self.device.cycle(0)
        self.assertEqual(self.wfm.statuses(IDS[0]), ["installed"])
        self.assertEqual(self.device.status()["outbox"], 0)

    def test_a_status_that_is_refused_for_good_is_dropped_and_logged(self):
        self.publish()
        self.wfm.fault({"method": "POST", "problem": "semantic-error"})
        self.assertIn("refuses a status for good", self.device.cycle())
        status = self.device.status()
        self.assertEqual((status["outbox"], [item["deploymentId"] for item in status["dropped"]]), (0, [IDS[0]]))
        self.assertIn("dropped", self.device.run("status").stdout)
        self.wfm.fault()
        self.publish(1, parameters={"GREETING": "x"})
        self.device.cycle()
        self.assertEqual(self.device.status()["dropped"], [])

    def test_every_kind_of_success_takes_a_report(self):
        """C-050, C-139: HTTP lets a server say 202 or 205 for what the interface calls 200 and 201; it is not sent for ever."""
        self.publish()
        self.wfm.fault({"method": "PUT", "status": 202, "late": True}, {"method": "POST", "status": 205, "late": True})
        self.device.cycle(0)
        self.assertEqual(self.device.status()["outbox"], 0)
        count = len(self.wfm.requests())
        self.device.cycle(0)
        self.assertEqual([item[0] for item in self.wfm.requests()[count:]], ["GET"])

    def test_a_status_that_meets_a_redirect_is_kept(self):
        """P-9: only 400 and above is a verdict on the status itself."""
        self.publish()
        self.wfm.fault({"method": "POST", "status": 302, "headers": {"Location": "https://localhost:1/"}})
        self.device.cycle(4)
        self.assertEqual(self.device.status()["outbox"], 1)
        self.wfm.fault()
        self.device.run("retry")
        self.device.cycle(0)
        self.assertEqual(self.wfm.statuses(IDS[0])[-1], "installed")

    def test_a_wfm_that_takes_no_status_is_polled_all_the_same(self):
        """P-9, D-1: one report that cannot be delivered blocks neither the next desired state nor the other reports for ever."""
        self.publish()
        self.wfm.fault({"method": "POST", "path": f"/api/v1/deployments/{IDS[0]}/status", "status": 500})
        for count in (1, 2, 3, 3, 3):
            self.publish(count)
            self.device.cycle(3)
            self.device.run("retry")
        self.assertEqual(len(self.engine.containers()), 3)
        self.assertIn("installed", self.wfm.statuses(IDS[1]))
        self.wfm.fault()
        self.device.run("retry")
        self.device.cycle(0)
        self.assertEqual([self.wfm.statuses(item)[-1] for item in IDS[:3]], ["installed"] * 3)

    def test_a_removal_that_waits_to_be_told_is_not_done_again(self):
        """P-16, P-9: the link is down for long; each run leaves the engine and the disk alone, the last word is told when it is back."""
        self.publish()
        self.device.cycle()
        self.wfm.withdraw(IDS[0])
        self.wfm.fault({"method": "POST", "close": True})
        self.device.cycle(3)
        self.engine.forget_calls()
        self.device.cycle(3)
        self.assertEqual([call[0] for call in self.engine.calls()], ["ps"])
        self.wfm.fault()
        self.device.run("retry")
        self.device.cycle(0)
        self.assertEqual((self.wfm.statuses(IDS[0])[-1], self.device.state()["deployments"]), ("removed", {}))

    def test_the_answer_that_was_lost_is_asked_for_again(self):
        """C-140: a status that arrived although its answer did not is repeated, which is harmless."""
        self.publish()
        self.wfm.fault({"method": "POST", "late": True, "close": True, "times": 1})
        self.device.cycle(3)
        self.device.run("retry")
        self.device.cycle(0)
        self.assertEqual(self.wfm.statuses(IDS[0])[-1], "installed")


class Adoption(SourceCase):
    """Which manifest version a report carries (rc.3; protocol-drafts 7)."""

    def enter(self):
        """The device's environment for this process, as long as the test runs."""
        old = dict(os.environ)
        self.addCleanup(lambda: (os.environ.clear(), os.environ.update(old)))
        os.environ.update(self.device.env)

    def reported(self):
        """[(state, version)] reported for the first deployment since the last call."""
        found = [(item["body"]["status"]["state"], item["body"]["adoptedManifestVersion"]) for item in self.wfm.reports(IDS[0])]
        start, self.start = getattr(self, "start", 0), len(found)
        return found[start:]

    def test_a_report_carries_the_version_of_the_revision_that_is_worked_on(self):
        """E-110 to E-114, C-134: from the first word on; a newer manifest that leaves it alone is told once; a removal has the remover's."""
        self.publish()
        self.device.cycle()
        self.assertEqual(self.reported(), [("pending", 1), ("installing", 1), ("installed", 1)])
        self.publish(2)
        self.device.cycle()
        self.assertEqual(self.reported(), [("installed", 2)])
        self.device.cycle()
        self.assertEqual(self.reported(), [])
        self.publish(1, parameters={"GREETING": "x"})
        self.device.cycle()
        self.assertEqual({version for _, version in self.reported()}, {3})
        self.wfm.withdraw(IDS[0])
        self.device.cycle()
        found = self.reported()
        self.assertEqual((found[-1], {version for _, version in found}), (("removed", 4), {4}))

    def test_a_revision_that_fails_is_reported_with_its_own_version(self):
        """E-111, E-114: also where the version before was brought back, for it is the newer one that was taken up."""
        self.publish()
        self.device.cycle()
        self.reported()
        text = support.make_deployment(IDS[0], "app-0", (("web", "9.9.9"),), registry=self.wfm.registry)
        self.wfm.publish(text, IDS[0])
        self.device.cycle(1)
        found = self.reported()
        self.assertEqual((found[-1], {version for _, version in found}), (("failed", 2), {2}))
        self.assertEqual([container["state"] for container in self.engine.containers().values()], ["running"])

    def test_what_is_fetched_and_waits_is_not_reported_as_taken_up(self):
        """E-112: accepted in front of a removal limit, a window or a stop, the old report stands until work begins."""
        self.publish()
        self.device.cycle()
        self.reported()
        self.publish(1, parameters={"GREETING": "x"})
        self.enter()
        with margo_agent.Agent(margo_agent.load_config(self.device.config_file), lambda: True) as agent:
            agent.exchange()
            self.assertTrue(agent.changed)
            with self.assertRaises(margo_agent.Interrupted):
                agent.reconcile()
            agent.flush_outbox()
        self.assertEqual((self.reported(), agent.state["accepted"]["version"]), ([], 2))
        self.device.cycle()
        self.assertEqual({version for _, version in self.reported()}, {2})

    def test_a_removal_that_is_taken_back_is_not_told_of_the_newer_manifest(self):
        """E-112: `removed` belongs to the version that removed it, though the next one lists the same content again."""
        self.publish()
        self.device.cycle()
        self.reported()
        self.wfm.withdraw(IDS[0])
        self.wfm.fault({"method": "POST", "status": 500, "headers": {"Retry-After": "0"}})
        self.device.cycle(3)
        self.wfm.fault()
        self.publish()
        self.enter()
        with margo_agent.Agent(margo_agent.load_config(self.device.config_file)) as agent:
            agent.state["patience"] = {}
            agent.flush_outbox = lambda: True
            agent.exchange()
            self.assertTrue(agent.changed)
            waiting = [(item["status"]["state"], item["adoptedManifestVersion"]) for item in agent.state["outbox"].values()]
        self.assertEqual(waiting, [("removed", 2)])
        self.device.run("retry")
        self.device.cycle()
        self.assertEqual(self.reported()[-1], ("installed", 3))


class Cost(unittest.TestCase):
    def test_the_bundle_is_taken_where_it_costs_less(self):
        def cheaper(sizes, bundle_size, missing):
            entries = [margo_agent.ManifestEntry(item, digest(item.encode()), size) for item, size in zip(IDS, sizes)]
            manifest = margo_agent.Manifest(1, digest(b""), bundle_size, entries)
            return margo_agent.is_bundle_cheaper(manifest, entries[:missing])

        self.assertFalse(cheaper([1000], 500, 1))
        self.assertTrue(cheaper([1000] * 10, 2500, 10))
        self.assertFalse(cheaper([1000] * 40, 100000, 2))
        self.assertTrue(cheaper([None] * 9, None, 4))
        self.assertFalse(cheaper([None] * 9, None, 3))
        self.assertFalse(cheaper([1000] * 9, 500, 0))


if __name__ == "__main__":
    unittest.main()
