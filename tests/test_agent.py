"""Agent: enrollment, cycles, the daemon, and everything around them, as processes against the example WFM."""
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest
from unittest import mock

import margo_agent
from tests import support
from tests.support import DEVICE, HELLO


class AgentCase(support.DeviceCase):
    def publish(self, **options):
        self.wfm.publish(support.make_deployment(registry=self.wfm.registry, **options))

    def running(self):
        return [container["state"] for container in self.engine.containers().values()]


class Enrollment(AgentCase):
    def test_enroll_reports_capabilities_and_may_be_repeated(self):
        """C-080, C-081"""
        for _ in range(2):
            done = self.device.run("enroll")
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertIn(support.CLIENT_ID, done.stdout)
        self.assertEqual(self.wfm.requests(), [("PUT", f"/api/v1/capabilities/{DEVICE}", 201), ("PUT", f"/api/v1/capabilities/{DEVICE}", 200)])
        self.assertTrue(self.device.status()["enrolled"])

    def test_unenroll_forgets_and_leaves_workloads_running(self):
        self.publish()
        self.device.cycle()
        done = self.device.run("unenroll")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(self.wfm.requests()[-1][0], "DELETE")
        self.assertEqual(self.running(), ["running"])
        self.assertFalse(self.device.status()["enrolled"])
        self.assertIn("not enrolled", self.device.run("status").stdout)

    def test_enrolling_again_takes_over_what_runs(self):
        """P-16: running containers are adopted, not made anew; the version may start again."""
        self.publish()
        self.device.cycle()
        before = self.engine.containers()
        self.device.run("unenroll")
        self.device.cycle()
        self.assertEqual(self.engine.containers(), before)
        self.assertEqual(self.wfm.statuses()[-1], "installed")

    def test_purge_removes_the_workloads_first_and_reports_it(self):
        self.publish()
        self.device.cycle()
        done = self.device.run("unenroll", "--purge")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual((self.engine.containers(), self.wfm.statuses()[-1]), ({}, "removed"))
        self.assertEqual([method for method, _, _ in self.wfm.requests()][-2:], ["POST", "DELETE"])

    def test_purge_that_cannot_remove_forgets_nothing(self):
        self.publish()
        self.device.cycle()
        self.engine.change(stubborn=True)
        done = self.device.run("unenroll", "--purge")
        self.assertEqual(done.returncode, 3)
        self.assertIn("nothing was forgotten", done.stderr)
        self.assertTrue(self.device.status()["enrolled"])

    def test_a_wfm_that_is_gone_is_told_and_nothing_is_forgotten(self):
        """The workloads are removed all the same; who wants to leave for good is told how."""
        self.publish()
        self.device.cycle()
        self.device.set("wfm.url", f"https://localhost:{support.free_port()}")
        done = self.device.run("unenroll", "--purge")
        self.assertEqual((done.returncode, self.engine.containers(), self.device.status()["enrolled"]), (3, {}, True))
        self.assertRegex(done.stderr, f"nothing is forgotten until .*gone for good, remove {self.device.state_dir} instead")

    def test_an_svid_of_another_relationship_is_not_used(self):
        """C-052: one WFM at a time."""
        self.device.cycle()
        certificate, key = self.pki.issue("other", [f"spiffe://{support.TRUST_DOMAIN}/margo/wfm/second/client/{DEVICE}"])
        self.device.set("identity.certificate", certificate)
        self.device.set("identity.key", key)
        log = self.device.cycle(5)
        for words in ("wfm/second", support.CLIENT_ID, "unenroll"):
            self.assertIn(words, log)


class Cycle(AgentCase):
    def test_a_reboot_without_network_brings_the_last_state_up(self):
        """P-1, D-29, D-30, C-232: exit 3 says that the WFM was not there, and everything runs."""
        self.publish()
        self.device.cycle()
        self.wfm.stop()
        with self.engine.open() as held:
            held["containers"] = {}
        self.assertIn("Connection refused", self.device.cycle(3))
        self.assertEqual(self.running(), ["running"])
        self.assertEqual(self.device.status()["lastPoll"]["result"], "unreachable")

    def test_a_device_that_regains_power_brings_its_workloads_up_before_it_speaks(self):
        """P-1, P-19: its first contact comes within one interval, another device's at another instant; once, not with each run."""
        self.publish()
        self.device.cycle()
        with self.engine.open() as held:
            held["containers"] = {}
        shutil.rmtree(os.path.join(self.device.folder, "run"), ignore_errors=True)
        old, count = dict(os.environ), len(self.wfm.requests())
        self.addCleanup(lambda: (os.environ.clear(), os.environ.update(old)))
        os.environ.update(self.device.env)
        config, expected = margo_agent.load_config(self.device.config_file), []
        for uptime, asked in ((20.0, False), (49.0, False), (51.0, True), (52.0, True)):
            with mock.patch.object(margo_agent, "get_uptime", lambda: ("this boot", uptime)), mock.patch.object(margo_agent, "get_random", lambda: 0.5):
                agent = margo_agent.Agent(config)
                outcome = agent.cycle()
            self.assertEqual(self.running(), ["running"])
            self.assertEqual((agent.starting > 0, len(self.wfm.requests()) > count), (not asked, asked), uptime)
            expected.append(outcome.delay)
        self.assertEqual(expected[:2], [30, 1])

    def test_an_expired_own_certificate_stops_no_workload(self):
        """P-2, P-3: exit 5 names the date, and drift is mended all the same."""
        self.publish()
        self.device.cycle()
        certificate, key = self.pki.issue("late", [support.CLIENT_ID], start="-9d", end="-1d")
        self.device.set("identity.certificate", certificate)
        self.device.set("identity.key", key)
        with self.engine.open() as held:
            held["containers"] = {}
        log = self.device.cycle(5)
        self.assertIn("expired at", log)
        self.assertIn("clock", log)
        self.assertEqual(self.running(), ["running"])

    def test_a_clock_that_stands_too_early_is_named_as_the_fault(self):
        """P-2, C-019: the last known time is that of the state; workloads are left alone, status and doctor say the same."""
        self.publish()
        self.device.cycle()
        certificate, key = self.pki.issue("young", [support.CLIENT_ID], start="+1d", end="+9d")
        self.device.set("identity.certificate", certificate)
        self.device.set("identity.key", key)
        path, later = os.path.join(self.device.state_dir, "state.json"), time.time() + 86400
        os.utime(path, (later, later))
        before = self.engine.containers()
        log = self.device.cycle(5)
        self.assertIn("code=CLOCK", log)
        self.assertIn("set the clock", self.device.status()["lastPoll"]["detail"])
        self.assertEqual(self.engine.containers(), before)
        os.utime(path, (later, later))
        if "doctor" in margo_agent.COMMANDS:        # an optional room
            self.assertRegex(self.device.run("doctor").stdout, r"warn\s+clock .*set the clock(.*\n)*FAIL identity")

    def test_a_renewed_certificate_is_taken_up_by_the_next_cycle(self):
        """C-017, D-32, P-3"""
        certificate, key = self.pki.issue("late", [support.CLIENT_ID], start="-9d", end="-1d")
        self.device.set("identity.certificate", certificate)
        self.device.set("identity.key", key)
        self.device.cycle(5)
        for source, target in (("client.pem", certificate), ("client.key", key)):
            os.replace(self.pki.path(source), target)
        self.device.cycle(0)

    def test_the_highest_exit_code_that_is_true_is_the_answer(self):
        """Contract: of 5, 4, 3, 1."""
        self.publish(components=(("missing", "1.0.0"),))
        self.device.cycle(1)
        self.wfm.fault({"path": "/api/v1/deployments", "status": 200, "body": "{}"})
        self.device.cycle(4)
        self.wfm.fault({"path": "/api/v1/deployments", "problem": "not-authorized"})
        self.device.cycle(5)

    def test_a_report_that_is_refused_while_applying_counts_at_once(self):
        """Exit codes: 401 and 403 are 5, also those of the status that an installation sends."""
        self.publish()
        self.wfm.fault({"path": "*/status", "status": 403})
        self.device.cycle(5)
        self.assertEqual((self.device.status()["lastPoll"]["result"], self.device.status()["outbox"]), ("untrusted", 1))
        self.assertEqual(self.device.status()["deployments"][0]["state"], "installed")
        self.wfm.fault({"path": "*/status", "status": 503, "times": 1})
        self.device.cycle(3)

    def test_a_state_directory_that_cannot_be_written_is_three(self):
        """P-4: named, with the mend, and nothing is started that could not be remembered."""
        self.device.settings["state_dir"] = "/proc/margo"
        self.device.save()
        log = self.device.cycle(3)
        self.assertIn("state_dir /proc/margo", log)

    def test_a_folder_for_credentials_that_cannot_be_made_fails_the_deployment_and_is_a_bug_of_nobody(self):
        host = self.wfm.registry
        password = support.write(os.path.join(self.device.folder, "password"), "secret", 0o600)
        self.device.settings["registries"][host].update(username="device", password_file=password)
        self.device.save()
        self.wfm.add_package(support.make_compose({"main": {"image": f"{host}/missing:1"}}))
        self.wfm.publish(support.make_deployment(registry=host))
        folder = support.write(os.path.join(self.device.state_dir, "registries"), "in its place")
        self.assertIn(f"{folder} failed (File exists); something else lies in its place", self.device.cycle(1))

    def test_a_full_disk_stops_no_workload_and_is_mended_by_itself(self):
        """P-4: what runs stays, what drifts is brought back by the reserve, an update waits with 3; with space again all goes on."""
        mount = support.make_folder(self)
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", mount], stderr=subprocess.DEVNULL).returncode:
            support.give_up("a small file system cannot be mounted here")
        self.addCleanup(subprocess.run, ["umount", mount])
        self.device.settings["state_dir"] = self.device.state_dir = os.path.join(mount, "state")
        self.device.save()
        self.publish()
        self.device.cycle()
        with self.assertRaises(OSError), open(os.path.join(mount, "filler"), "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        with self.engine.open() as held:
            held["containers"] = {}
        self.device.cycle(0)
        self.assertEqual(self.running(), ["running"])
        self.wfm.add_package(support.make_archive(
            {"compose.yaml": support.make_compose(), "data": os.urandom(400000)}), tag="2.0.0")
        self.publish(components=(("web", "2.0.0"),))
        self.assertIn("free space", self.device.cycle(3))
        self.assertEqual((self.running(), self.wfm.statuses()[-1]), (["running"], "installed"))
        os.remove(os.path.join(mount, "filler"))
        self.device.cycle(0)
        self.assertEqual(self.wfm.statuses()[-1], "installed")

    def test_a_deployment_for_another_device_is_not_started(self):
        """Contract, Rules; C-138: WRONG_DEVICE, whose source is the deployment; the codes of gateways are not for others."""
        for device in ("line-5", f"{DEVICE}/cell", f"{DEVICE}-2", "line-5/*"):
            self.publish(device=device)
            self.assertEqual(self.device.plan()[HELLO][0], "refuse")
            self.device.cycle(1)
            error = self.wfm.reports()[-1]["body"]["status"]["error"]
            self.assertEqual((error["code"], error["source"]), ("WRONG_DEVICE", "hello"))
            self.assertIn(f"{device}, this device is {DEVICE}", error["message"])
        self.assertEqual(self.engine.containers(), {})
        self.assertFalse(self.wfm.requests("registry"))

    def test_a_document_that_is_invalid_fails_alone_and_says_where(self):
        """D-2, D-26: a failure of a deployment never seen before is reported too."""
        wfm = support.Wfm(self, self.pki, "--lenient")
        device = support.Device(self, self.pki, wfm, self.engine)
        wfm.publish(support.make_deployment(registry=wfm.registry).replace("com-example", "Com-Example"))
        device.cycle(1)
        body = wfm.reports()[-1]["body"]
        self.assertEqual([entry["name"] for entry in body["components"]], ["web"])
        self.assertEqual(body["status"]["error"]["code"], "INVALID_DEPLOYMENT")
        self.assertIn("spec.applicationId", body["status"]["error"]["message"])
        count = len(wfm.requests())
        device.cycle(1)
        self.assertEqual(len(wfm.requests()), count + 1)

    def test_two_at_once_are_one(self):
        """Exit 6: the other one is left to its work; readers are not held up."""
        store = margo_agent.Store(self.device.state_dir)
        store.create()
        store.lock()
        self.addCleanup(store.unlock)
        self.assertIn("code=LOCKED", self.device.cycle(6))
        self.assertEqual(self.device.run("status").returncode, 0)
        self.assertEqual(self.device.run("plan").returncode, 0)

    def test_plan_changes_nothing_anywhere(self):
        """Neither on the device nor at the WFM, enrolled or not."""
        self.publish()
        self.assertEqual(self.device.plan(), {HELLO: ("install", "new")})
        self.assertFalse(os.path.exists(self.device.state_dir))
        self.device.cycle()
        before = self.device.state()
        self.publish(parameters={"GREETING": "x"})
        self.engine.forget_calls()
        count = len(self.wfm.requests())
        self.assertEqual(self.device.plan(), {HELLO: ("update", "another revision")})
        self.assertEqual({method for method, _, _ in self.wfm.requests()[count:]}, {"GET"})
        self.assertEqual(self.device.state(), before)
        self.assertEqual([call[0] for call in self.engine.calls()], ["ps"])

    def test_plan_in_downtime_is_that_of_what_was_accepted(self):
        self.publish()
        self.device.cycle()
        self.wfm.withdraw()
        self.device.set("poll.downtime", ["00:00-24:00"])
        done = self.device.run("plan", "--json")
        self.assertEqual([(item["deploymentId"], item["action"]) for item in json.loads(done.stdout)["actions"]], [(HELLO, "keep")])
        self.assertIn("warning downtime: the WFM is not asked", done.stderr)

    def test_plan_tells_that_removals_will_wait(self):
        """Contract, Guard."""
        self.publish()
        self.device.set("policy.max_removals", 0)
        self.device.cycle()
        self.wfm.withdraw()
        done = self.device.run("plan")
        self.assertEqual((done.returncode, "remove" in done.stdout), (0, True))
        self.assertIn("nothing is done until the next poll confirms it", done.stderr)
        self.assertIn("REMOVALS_UNCONFIRMED", self.device.cycle(3))
        self.assertEqual(self.device.run("plan").stderr, "")

    def test_plan_and_run_agree(self):
        self.publish()
        for expected in ("install", "keep"):
            self.assertEqual(self.device.plan()[HELLO][0], expected)
            self.device.cycle()
        self.wfm.withdraw()
        self.assertEqual(self.device.plan()[HELLO][0], "remove")

    def test_a_module_has_the_same_cycle(self):
        """Contract, As a module: Agent(config).cycle() returns its outcome."""
        self.publish()
        code = ("import margo_agent; a = margo_agent.Agent(margo_agent.load_config(%r)); "
                "print(a.cycle().code, a.cycle().result)" % self.device.config_file)
        done = subprocess.run([sys.executable, "-c", code], env=dict(self.device.env, PYTHONPATH=support.ROOT), stdout=subprocess.PIPE,
                              timeout=support.LIMIT)
        self.assertEqual(done.stdout, b"0 unchanged\n")

    def test_a_poll_needs_no_thread(self):
        """A device at its limit of tasks installs and reports all the same (P-15: reads are paced, not watched)."""
        code = ("import sys, threading\ndef start(thread): raise RuntimeError(\"can't start new thread\")\n"
                "threading.Thread.start = start\nimport margo_agent\nsys.exit(margo_agent.main(sys.argv[1:]))")
        self.publish()
        done = subprocess.run([sys.executable, "-c", code, "-c", self.device.config_file, "run", "--once"], cwd=support.ROOT,
                              env=self.device.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120)
        self.assertEqual(done.returncode, 0, done.stdout)

    def test_the_file_works_alone_in_an_empty_folder(self):
        folder = support.make_folder(self)
        with open(support.AGENT, "rb") as file:
            path = support.write(os.path.join(folder, "margo_agent.py"), file.read())
        self.publish()
        done = subprocess.run([sys.executable, "-I", "-S", path, "-c", self.device.config_file, "run", "--once"], cwd=folder,
                              env=self.device.env, stderr=subprocess.PIPE, timeout=support.LIMIT)
        self.assertEqual((done.returncode, self.running()), (0, ["running"]), done.stderr)
        self.assertEqual(os.listdir(folder), ["margo_agent.py"])

    def test_the_module_form_runs_from_its_folder_as_cron_does(self):
        self.publish()
        done = subprocess.run([sys.executable, "-m", "margo_agent", "-c", self.device.config_file, "run", "--once"],
                              cwd=os.path.dirname(support.AGENT), env=self.device.env, stderr=subprocess.PIPE, timeout=support.LIMIT)
        self.assertEqual((done.returncode, self.running()), (0, ["running"]), done.stderr)


class Embedded(AgentCase):
    def test_a_state_that_cannot_be_read_leaves_no_lock_behind(self):
        """Whoever embeds the agent tries again in the same process, once there is memory."""
        self.publish()
        self.device.cycle()
        config = margo_agent.load_config(self.device.config_file)
        with mock.patch.dict(os.environ, self.device.env), mock.patch("margo_agent.parse_state", side_effect=MemoryError):
            self.assertRaises(MemoryError, margo_agent.Agent(config).cycle)
        self.device.cycle(0)


class Reports(AgentCase):
    """What the WFM does not take holds up nothing else, and has a back-off of its own."""

    SECOND = HELLO[:-1] + "1"

    def sent(self, kind="/status"):
        return [path.split("/")[-2] for method, path, _ in self.wfm.requests() if method != "GET" and kind in path]

    def polls(self):
        return [path for method, path, _ in self.wfm.requests() if path.endswith("/deployments")]

    def test_a_status_that_is_not_taken_slows_nothing_down(self):
        """P-9: neither the polls nor what is told of others; it is not sent again before its time."""
        for fault in ({"status": 500}, {"close": True}, {"status": 503, "headers": {"Retry-After": "3600"}}):
            with self.subTest(fault):
                self.wfm.fault(dict(fault, method="POST", path=f"*/{HELLO}/status"))
                value = str(fault)
                for deployment_id, name in ((HELLO, "hello"), (self.SECOND, "second")):
                    self.wfm.publish(support.make_deployment(deployment_id, name, registry=self.wfm.registry,
                                                             parameters={"GREETING": value}), deployment_id)
                self.device.cycle(3)
                state = self.device.state()
                (name,) = state["waits"]
                self.assertEqual((name, state["patience"]), (HELLO, {}))
                count, polls = self.sent().count(HELLO), len(self.polls())
                state["waits"][name].update(delay=600)
                support.write(os.path.join(self.device.state_dir, "state.json"), json.dumps(state))
                for _ in range(2):
                    self.device.cycle(3)
                self.assertEqual((self.sent().count(HELLO), len(self.polls())), (count, polls + 2))
                (wait,) = self.device.status()["waits"]
                self.assertEqual(wait["reason"], f"{HELLO} is not reported again")
                self.assertGreater(wait["until"], margo_agent.make_time(time.time() + 300))
                self.assertIn(f"waits      until {wait['until']} {wait['reason']}", self.device.run("status").stdout)
                self.assertIn(wait["reason"], self.device.run("doctor").stdout)
                self.assertEqual(self.device.status()["outbox"], 1)
                self.wfm.fault()
                self.assertEqual(self.device.run("retry").returncode, 0)
                self.device.cycle(0)
                self.assertEqual((self.wfm.statuses()[-1], self.wfm.statuses(self.SECOND)[-1]), ("installed", "installed"))

    def test_a_removed_that_the_wfm_never_takes_is_given_up_after_a_day(self):
        """One that does not know the deployment answers by 500 for ever."""
        self.publish()
        self.device.cycle()
        self.wfm.withdraw()
        self.wfm.fault({"method": "POST", "status": 500})
        self.device.cycle(3)
        state = self.device.state()
        state["waits"][HELLO].update(since=time.time() - 86401, at=0)
        state["waits"][HELLO].pop("boot")
        support.write(os.path.join(self.device.state_dir, "state.json"), json.dumps(state))
        self.assertIn("has not taken a `removed` for a day; it is dropped", self.device.cycle(0))
        status = self.device.status()
        self.assertEqual([(item["deploymentId"], item["state"]) for item in status["dropped"]], [(HELLO, "removed")])
        self.assertEqual((status["outbox"], status["deployments"]), (0, []))

    def test_capabilities_that_are_not_taken_slow_nothing_down_either(self):
        """C-082: they are sent again after a back-off, and `enroll` sends them at once."""
        self.publish()
        self.device.cycle()
        self.device.set("device.labels", {"hall": 4})
        self.wfm.fault({"method": "PUT", "status": 503, "headers": {"Retry-After": "3600"}})
        self.publish(parameters={"GREETING": "x"})
        for _ in range(2):
            self.device.cycle(3)
        self.assertEqual(self.wfm.statuses().count("installed"), 2)
        self.assertEqual(len(self.sent("/capabilities/")), 2)
        self.assertEqual(self.device.run("enroll").returncode, 3)
        self.wfm.fault()
        self.assertEqual(self.device.run("enroll").returncode, 0)
        self.device.cycle(0)
        self.assertEqual((len(self.sent("/capabilities/")), self.device.state()["waits"]), (4, {}))
        self.device.set("device.labels", {"hall": 5})           # a proxy that drops what is too long for it
        self.wfm.fault({"method": "PUT", "close": True})
        count = len(self.polls())
        self.device.cycle(3)
        self.assertEqual(len(self.polls()), count + 1)

    def test_what_waits_of_a_device_that_is_named_otherwise_by_now_is_forgotten(self):
        self.device.cycle()
        state = self.device.state()
        state["waits"]["capabilities gone"] = {"failures": 1, "at": time.time(), "delay": 600}
        support.write(os.path.join(self.device.state_dir, "state.json"), json.dumps(state))
        self.device.cycle(0)
        self.assertEqual(self.device.state()["waits"], {})

    def test_capabilities_of_a_device_that_is_not_enrolled_come_first(self):
        """C-080"""
        self.wfm.fault({"method": "PUT", "status": 500})
        self.device.cycle(3)
        self.assertEqual(self.polls(), [])


class Windows(unittest.TestCase):
    """F-25: windows of device-local time on the days on which the clocks change."""

    def setUp(self):
        patch = mock.patch.dict(os.environ, TZ="Europe/Berlin")
        patch.start()
        self.addCleanup(time.tzset)
        self.addCleanup(patch.stop)
        time.tzset()

    def minutes(self, window, day):
        """The minutes of a day that lie in a window: how many, and the first as clock time."""
        start = int(time.mktime(time.strptime(day, "%Y-%m-%d")))
        read = margo_agent.read_windows([window], "")
        found = [moment for moment in range(start, start + 86400, 60) if margo_agent.is_within(read, time.localtime(moment))]
        return len(found), time.strftime("%H:%M", time.localtime(found[0])) if found else None

    def test_what_the_clock_skips_is_made_up_for_right_after_it(self):
        """On 28 March 2027 the clocks go from 02:00 to 03:00."""
        for window, expected in (("02:00-03:00", (60, "03:00")), ("02:30-02:45", (15, "03:00")), ("Sun 02:00-03:00", (60, "03:00")),
                                 ("2027-03-28T02:00/2027-03-28T03:00", (60, "03:00")), ("01:00-03:00", (120, "01:00")),
                                 ("03:00-04:00", (60, "03:00")), ("02:00-04:00", (60, "03:00")), ("04:00-05:00", (60, "04:00")),
                                 ("Sat 02:00-03:00", (0, None)), ("Sat 23:00-02:30", (150, "00:00"))):
            with self.subTest(window):
                self.assertEqual(self.minutes(window, "2027-03-28"), expected)

    def test_on_other_days_nothing_is_added(self):
        for day in ("2027-03-27", "2027-03-29", "2027-06-01"):
            self.assertEqual(self.minutes("02:30-02:45", day), (15, "02:30"))

    def test_an_hour_that_comes_twice_lies_in_its_window_twice(self):
        """31 October 2027"""
        self.assertEqual(self.minutes("02:00-03:00", "2027-10-31"), (120, "02:00"))

    def test_half_an_hour_is_skipped_elsewhere(self):
        with mock.patch.dict(os.environ, TZ="Australia/Lord_Howe"):
            time.tzset()
            self.assertEqual(self.minutes("02:00-02:30", "2026-10-04"), (30, "02:30"))


class Times(unittest.TestCase):
    CONFIG = margo_agent.make_config({"wfm": {"url": "https://x"}, "identity": {"certificate": "c", "key": "k", "trust_bundle": "b"}}, "/", {})

    def delay(self, fault=None, jitter=0.5, **state):
        return margo_agent.make_delay(self.CONFIG, dict(margo_agent.make_state(), **state), fault, margo_agent.Clock(1000, "", 0), jitter)

    def test_the_interval_has_jitter(self):
        """P-19, D-7"""
        self.assertEqual([self.delay(jitter=jitter) for jitter in (0, 0.5, 1)], [54, 60, 66])

    def test_a_failed_deployment_is_tried_when_it_is_due(self):
        self.assertEqual(self.delay(deployments={"a": {"state": "failed", "refused": False, "retry": {"failures": 1, "at": 990, "delay": 30}}}), 20)
        self.assertEqual(self.delay(deployments={"a": {"state": "failed", "refused": False, "retry": {"failures": 1, "at": 0, "delay": 10}}}), 1)
        self.assertEqual(self.delay(deployments={"a": {"state": "failed", "refused": True, "retry": {"failures": 1, "at": 0, "delay": 10}}}), 60)

    def test_patience_and_refusals_slow_the_daemon_down(self):
        """C-056, C-057"""
        patience = {"failures": 3, "at": 1000, "delay": 500}
        self.assertEqual(self.delay(margo_agent.Unreachable("x"), patience=patience), 60)
        self.assertEqual(self.delay(margo_agent.Unreachable("x"), patience=dict(patience, delay=20)), 20)
        self.assertEqual(self.delay(margo_agent.Refused("x"), patience={"failures": 2, "at": 1000, "delay": 0}), 240)
        self.assertLessEqual(self.delay(margo_agent.Untrusted("x"), patience={"failures": 30, "at": 1000, "delay": 0}), 900)

    def test_back_off_is_exponential_with_full_jitter_and_never_less_than_asked(self):
        """C-056, C-057: also exponential where it was asked for a time to start at, exactly that where it is to be fixed."""
        def backoff(failures, asked, strategy, jitter):
            return margo_agent.make_backoff(failures, asked, strategy, jitter)

        self.assertEqual([backoff(n, None, "", 1) for n in (1, 2, 3, 20)], [2, 4, 8, 900])
        self.assertEqual(backoff(5, None, "", 0), 0)
        self.assertEqual([backoff(n, 3600, "exponential", 0.9) for n in (1, 9)], [3600, 3600])
        self.assertEqual([backoff(n, 10, "exponential", 1) for n in (1, 2, 3, 9)], [10, 20, 40, 900])
        self.assertEqual([backoff(n, 10, "exponential", 0) for n in (1, 2, 3, 9)], [10] * 4)
        self.assertEqual([backoff(n, 10, "fixed", 1) for n in (1, 5)], [10, 10])
        self.assertEqual(backoff(3, 7, "none", 1), 7)
        self.assertEqual(backoff(2, None, "fixed", 1), 4)

    def test_patience_goes_by_the_clock_that_nobody_sets(self):
        """P-2, C-056: a jump of the wall clock neither cuts an hour short nor makes it a year."""
        patience = {"failures": 1, "at": 1000, "delay": 3600, "boot": "a", "uptime": 50}

        def left(now, boot="a", uptime=60):
            return margo_agent.find_wait(patience, margo_agent.Clock(now, boot, uptime))

        self.assertEqual([left(1010), left(10 ** 9), left(-10 ** 9)], [3590] * 3)
        self.assertEqual(left(1010, uptime=3650), 0)
        self.assertEqual(left(1010, boot="b", uptime=1), 3590)
        self.assertEqual([left(10 ** 9, boot="b"), left(0, boot="b")], [0, 0])
        self.assertEqual(margo_agent.find_wait({}, margo_agent.Clock(0, "", 0)), 0)
        self.assertEqual(margo_agent.find_wait({"failures": 1, "at": 1000, "delay": 60}, margo_agent.Clock(1010, "a", 1)), 50)

    def test_a_fleet_that_regains_power_arrives_spread_over_one_interval(self):
        """P-19; 100,000 devices are simulated by tests/bench/fleet.py."""
        def start(uptime, known=True, jitter=0.5):
            return margo_agent.make_start(uptime, self.CONFIG.poll, known, jitter)

        self.assertEqual([start(20, jitter=jitter) for jitter in (0, 0.25, 0.75)], [20, 35, 65])
        self.assertEqual(start(20, known=False), 0)
        late = margo_agent.Clock(0, "boot", margo_agent.START_WINDOW)           # it has not just started
        self.assertEqual(margo_agent.load_start(None, self.CONFIG.poll, True, late, 0.5), 0)
        hourly = margo_agent.Settings({"interval": 3600, "jitter": 0.1})        # on for 90 s at a time (F-27)
        self.assertLess(margo_agent.make_start(20, hourly, True, 0.99), 80)
        self.assertEqual(margo_agent.make_start(20, margo_agent.Settings({"interval": 60, "jitter": 0}), True, 0.5), 0)


class Spread(AgentCase):
    def test_each_device_has_a_moment_of_its_own_and_keeps_it(self):
        """P-19: what cron starts everywhere at the same second arrives spread over the time that is given."""
        found = [margo_agent.make_spread(f"device-{number}", 50) for number in range(1000)]
        self.assertTrue(0 <= min(found) < 1 and 49 < max(found) < 50)
        self.assertTrue(all(150 < sum(low <= item < low + 10 for item in found) < 250 for low in range(0, 50, 10)))
        self.assertEqual(found[7], margo_agent.make_spread("device-7", 50))

    def test_a_run_waits_for_its_moment_and_ends_when_it_is_asked_to(self):
        share = margo_agent.make_spread(DEVICE, 1)
        start = time.monotonic()
        self.assertEqual(self.device.run("run", "--once", f"--spread={3 / share:.0f}s").returncode, 0)
        self.assertGreater(time.monotonic() - start, 2.5)
        process = subprocess.Popen(self.device.command("run", "--once", "--spread", "1h"), env=self.device.env, stderr=subprocess.DEVNULL)
        self.addCleanup(support.end, process)
        support.wait_for_handler(process, signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.wait(support.LIMIT), 0)

    def test_what_is_no_time_is_said(self):
        for options, words in ((("--once", "--spread", "soon"), "--spread: found 'soon', expected"), (("--spread", "50s"), "run --once")):
            done = self.device.run("run", *options)
            self.assertEqual(done.returncode, 2)
            self.assertIn(words, done.stderr)


class Terminal(AgentCase):
    def test_why_nothing_is_asked_is_said_to_a_person_and_not_to_a_log(self):
        self.device.set("poll.window", ["2000-01-01T00:00/2000-01-02T00:00"])
        self.assertNotIn("outside poll.window", self.device.cycle())
        leader, follower = os.openpty()
        with os.fdopen(leader, "rb", 0) as screen:
            process = subprocess.Popen(self.device.command("run", "--once"), env=self.device.env, stderr=follower)
            os.close(follower)
            self.assertEqual(process.wait(support.LIMIT), 0)
            self.assertIn(b"outside poll.window", screen.read(10000))


class Daemon(AgentCase):
    def start(self, *options, **env):
        """`run` as a process of its own; options: those before the command."""
        self.log = tempfile.TemporaryFile()
        self.addCleanup(self.log.close)
        process = subprocess.Popen(self.device.command(*options, "run"), env=dict(self.device.env, **env), stderr=self.log, stdin=subprocess.DEVNULL)
        self.addCleanup(support.end, process)
        return process

    def polls(self):
        return [status for _, path, status in self.wfm.requests() if path == "/api/v1/deployments"]

    def test_it_polls_at_the_interval_and_ends_on_sigterm(self):
        """C-231, D-7: the first poll comes at once."""
        self.device.set("poll.interval", "1s")
        self.publish()
        process = self.start()
        support.wait_for(lambda: len(self.polls()) >= 3, what="a third poll")
        self.assertEqual(self.wfm.statuses()[-1], "installed")
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.wait(support.LIMIT), 0)
        self.assertEqual(self.running(), ["running"])

    def test_sighup_reads_the_configuration_anew_at_once(self):
        process = self.start()
        support.wait_for(self.polls, what="the first poll")
        self.device.set("device.labels", {"hall": 9})
        process.send_signal(signal.SIGHUP)
        support.wait_for(lambda: [m for m, _, _ in self.wfm.requests()].count("PUT") == 2, what="another report of capabilities")
        self.assertIsNone(process.poll())

    def test_systemd_hears_that_it_is_ready_alive_and_stopping(self):
        self.publish()
        path = os.path.join(self.device.folder, "notify")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as peer:
            peer.bind(path)
            peer.settimeout(support.LIMIT)
            process = self.start(NOTIFY_SOCKET=path, WATCHDOG_USEC="200000")
            self.assertEqual(peer.recv(200), b"READY=1")
            words = [peer.recv(200)]
            while not words[-1].startswith(b"STATUS="):
                words.append(peer.recv(200))
            self.assertEqual(set(words[:-1]), {b"WATCHDOG=1"})
            self.assertRegex(words[-1].decode(), "^STATUS=applied, 1 of 1 deployments installed; next cycle in [0-9]+ s$")
            self.assertEqual(peer.recv(200), b"WATCHDOG=1")
            process.send_signal(signal.SIGINT)
            while b"STOPPING=1" not in words:
                words.append(peer.recv(200))
        self.assertEqual(process.wait(support.LIMIT), 0)

    def test_a_configuration_that_never_worked_ends_it(self):
        self.device.set("poll.interval", "soon")
        self.assertEqual(self.start().wait(support.LIMIT), 2)

    def test_a_configuration_that_breaks_later_does_not(self):
        """P-12: the next good one is taken up; workloads run on."""
        self.device.set("poll.interval", "1s")
        process = self.start()
        support.wait_for(self.polls, what="the first poll")
        good = dict(self.device.settings)
        self.device.settings = {"nonsense": 1}
        self.device.save()
        process.send_signal(signal.SIGHUP)
        self.log_holds("nonsense: unknown key")
        self.device.settings = good
        self.device.save()
        count = len(self.polls())
        process.send_signal(signal.SIGHUP)
        support.wait_for(lambda: len(self.polls()) > count, what="another poll")

    def test_its_log_has_a_line_when_it_starts_and_when_it_ends(self):
        """In the form that was asked for, and none where only errors are wanted."""
        process = self.start()
        self.log_holds(f"the daemon has started version={margo_agent.__version__} profile=mtls wfm={self.wfm.url} interval=\"60 s\"")
        support.wait_for(self.polls, what="the first poll")
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.wait(support.LIMIT), 0)
        self.log_holds("Z info    the daemon has ended\n")
        for options, expected in ((["--log-format", "json"], True), (["-q"], False)):
            count = len(self.polls())
            process = self.start(*options)
            support.wait_for(lambda: len(self.polls()) > count, what="a poll")
            process.send_signal(signal.SIGTERM)
            self.assertEqual(process.wait(support.LIMIT), 0)
            lines = os.pread(self.log.fileno(), 10 ** 6, 0).decode().splitlines()
            if expected:
                documents = [json.loads(line) for line in lines]
                self.assertEqual([item["message"] for item in (documents[0], documents[-1])],
                                 ["the daemon has started", "the daemon has ended"])
                self.assertEqual(documents[-1]["level"], "info")
            else:
                self.assertEqual(lines, [])

    def log_holds(self, words):
        def read():
            return words in os.pread(self.log.fileno(), 10 ** 6, 0).decode()
        support.wait_for(read, what=f"a log line with {words!r}")

    def test_between_polls_only_a_bare_interpreter_sleeps(self):
        """P-10: no module of the agent is in the parent; the figure itself is measured under tests/bench."""
        process = self.start()
        support.wait_for(self.polls, what="the first poll")
        with open(f"/proc/{process.pid}/cmdline", "rb") as file:
            words = file.read().split(b"\0")
        self.assertEqual(words[1:5], [b"-I", b"-S", b"-", b"margo-agent"])
        with open(f"/proc/{process.pid}/maps") as file:
            self.assertNotIn("libssl", file.read())


if __name__ == "__main__":
    unittest.main()
