"""Deployment status: the state machine, its precedence, the documents and the durable outbox."""
import itertools
import unittest

import margo_agent
from tests.support import DEVICE, HELLO, digest


def make_record(*names, **changes):
    components = [margo_agent.Component(name, "oci://r/x", "1.0.0", True, 1) for name in names]
    deployment = margo_agent.Deployment(HELLO, "hello", "ns", DEVICE, "compose", components, [], None)
    target = margo_agent.Target(HELLO, digest(b"one"), 5, deployment, None)
    return dict(margo_agent.begin_record(margo_agent.make_record(target, DEVICE), target), **changes)


def status(record):
    return margo_agent.make_status(record)


CLOCK = margo_agent.Clock(1000, "", 0)
ERROR = margo_agent.ComponentError("PULL_FAILED", "image x: connection refused")


class Precedence(unittest.TestCase):
    def test_the_most_severe_component_decides(self):
        """C-132, C-133: failed, removing, installing, pending, removed, installed."""
        order = ["failed", "removing", "installing", "pending", "removed", "installed"]
        for states in itertools.product(order, repeat=3):
            components = [{"name": f"{number}", "state": state} for number, state in enumerate(states)]
            record = margo_agent.set_component({"components": components}, "none of these", "installed")
            self.assertEqual(record["state"], order[min(order.index(state) for state in states)])

    def test_the_overall_state_follows_each_component(self):
        record = make_record("db", "web")
        self.assertEqual(record["state"], "pending")
        seen = []
        for name, state in (("db", "installing"), ("db", "installed"), ("web", "installing"), ("web", "installed")):
            record = margo_agent.set_component(record, name, state)
            seen.append(record["state"])
        self.assertEqual(seen, ["installing", "pending", "installing", "installed"])


class Documents(unittest.TestCase):
    def test_one_entry_a_component_and_the_adopted_version(self):
        """C-131, C-134"""
        document = status(margo_agent.set_component(make_record("db", "web"), "db", "installed"))
        self.assertEqual(document, {
            "deploymentId": HELLO, "deviceId": DEVICE, "adoptedManifestVersion": 5, "status": {"state": "pending"},
            "components": [{"name": "db", "state": "installed"}, {"name": "web", "state": "pending"}]})

    def test_an_error_says_which_component_and_why(self):
        """C-136, C-137, D-28: code, source and message, at the component and above."""
        record = margo_agent.set_component(make_record("db", "web", "ui"), "db", "installed")
        document = status(margo_agent.fail_record(record, "web", ERROR, CLOCK, 0.5))
        self.assertEqual([entry["state"] for entry in document["components"]], ["installed", "failed", "pending"])
        self.assertEqual(document["components"][1]["error"], {"code": "PULL_FAILED", "source": "web", "message": ERROR.message})
        self.assertEqual(document["status"]["state"], "failed")
        self.assertEqual((document["status"]["error"]["code"], document["status"]["error"]["source"]), ("PULL_FAILED", "hello"))
        self.assertIn("component web failed", document["status"]["error"]["message"])
        self.assertNotIn("error", document["components"][0])

    def test_a_deployment_that_fails_as_a_whole_has_no_component_left_in_doubt(self):
        document = status(margo_agent.fail_record(make_record("db", "web"), None, ERROR, CLOCK, 0.5))
        self.assertEqual({entry["state"] for entry in document["components"]}, {"failed"})
        self.assertEqual(document["status"]["error"]["source"], "hello")

    def test_an_error_goes_away_with_the_next_attempt(self):
        record = margo_agent.fail_record(make_record("web"), "web", ERROR, CLOCK, 0.5)
        target = margo_agent.Target(HELLO, digest(b"one"), 6, None, None)
        again = margo_agent.begin_record(record, target)
        self.assertEqual((status(again)["components"], again["retry"]["failures"]), ([{"name": "web", "state": "pending"}], 1))
        other = margo_agent.begin_record(record, target._replace(digest=digest(b"two")))
        self.assertEqual(other["retry"], {})


class Attempts(unittest.TestCase):
    def test_delays_grow_to_an_hour_with_jitter(self):
        """D-13, P-15: 30 s, doubling up to 1 h."""
        record, delays = make_record("web"), []
        for _ in range(12):
            record = margo_agent.fail_record(record, "web", ERROR, CLOCK, 0.5)
            delays.append(record["retry"]["delay"])
        self.assertEqual(delays[:4], [30, 60, 120, 240])
        self.assertEqual(delays[-1], 3600)
        low, high = (margo_agent.fail_record(make_record("web"), "web", ERROR, CLOCK, jitter)["retry"]["delay"] for jitter in (0, 0.999))
        self.assertTrue(low < 30 < high)

    def test_a_registry_that_asks_for_patience_is_not_asked_before(self):
        """C-056: as far as a moment ahead is not taken for the work of a wrong clock."""
        for asked, least in ((10, 22), (700, 700), (10 ** 9, 2 * 3600)):
            error = margo_agent.ComponentError("PULL_FAILED", "HTTP 429", retry_after=asked)
            record = margo_agent.fail_record(make_record("web"), "web", error, CLOCK, 0)
            self.assertEqual(record["retry"]["delay"], max(least, 22.5) if asked == 10 else least)


class Outbox(unittest.TestCase):
    def setUp(self):
        self.state = margo_agent.make_state()
        self.record = make_record("web")
        self.state["deployments"][HELLO] = self.record

    def test_a_newer_status_replaces_an_older_one_and_goes_to_the_end(self):
        """C-139: one a deployment, the newest, in a true order."""
        margo_agent.enqueue_status(self.state, self.record)
        margo_agent.enqueue_status(self.state, dict(make_record("web"), deploymentId="b"))
        margo_agent.enqueue_status(self.state, margo_agent.set_component(self.record, "web", "installed"))
        self.assertEqual(list(self.state["outbox"]), ["b", HELLO])
        self.assertEqual(self.state["outbox"][HELLO]["status"]["state"], "installed")

    def test_what_the_wfm_has_acknowledged_is_not_sent_again(self):
        """P-19: status only on change."""
        margo_agent.enqueue_status(self.state, self.record)
        margo_agent.acknowledge_status(self.state, HELLO)
        self.assertEqual(self.state["outbox"], {})
        margo_agent.enqueue_status(self.state, self.record)
        self.assertEqual(self.state["outbox"], {})
        margo_agent.enqueue_status(self.state, margo_agent.set_component(self.record, "web", "installing"))
        self.assertEqual(list(self.state["outbox"]), [HELLO])

    def test_going_back_to_what_was_acknowledged_withdraws_what_was_not(self):
        margo_agent.enqueue_status(self.state, self.record)
        margo_agent.acknowledge_status(self.state, HELLO)
        margo_agent.enqueue_status(self.state, margo_agent.set_component(self.record, "web", "installing"))
        margo_agent.enqueue_status(self.state, self.record)
        self.assertEqual(self.state["outbox"], {})

    def test_a_removed_deployment_is_forgotten_with_its_last_report_and_not_before(self):
        """D-21, D-26"""
        record = margo_agent.set_component(self.record, "web", "removed")
        self.state["deployments"][HELLO] = record
        margo_agent.enqueue_status(self.state, record)
        self.assertIn(HELLO, self.state["deployments"])
        margo_agent.acknowledge_status(self.state, HELLO)
        self.assertEqual((self.state["deployments"], self.state["reported"], self.state["outbox"]), ({}, {}, {}))


class Untaken(unittest.TestCase):
    """A status that the WFM does not take holds up nothing but itself."""

    def setUp(self):
        self.state = margo_agent.make_state()
        for name, state in (("a", "installed"), ("b", "removed")):
            record = dict(make_record("web"), deploymentId=name)
            margo_agent.enqueue_status(self.state, margo_agent.set_component(record, "web", state))

    def put_off(self, key, now=1000.0, kind=margo_agent.Unreachable, **facts):
        error = kind("POST: no", **dict({"status": 500}, **facts))
        return margo_agent.put_off_status(self.state, key, error, margo_agent.Clock(now, "", 0), 1)

    def left(self, key, now=1000.0):
        return margo_agent.find_wait(self.state["waits"].get(key, {}), margo_agent.Clock(now, "", 0))

    def test_each_has_a_back_off_of_its_own(self):
        """C-056: as for everything else."""
        found = []
        for _ in range(4):
            self.put_off("a")
            found.append((self.left("a"), self.left("b")))
        self.assertEqual(found, [(2, 0), (4, 0), (8, 0), (16, 0)])
        margo_agent.acknowledge_status(self.state, "a")
        self.assertEqual((self.left("a"), self.state["waits"]), (0, {}))

    def test_a_newer_status_waits_as_the_older_one_did(self):
        self.put_off("a")
        record = dict(make_record("web"), deploymentId="a")
        margo_agent.enqueue_status(self.state, margo_agent.set_component(record, "web", "installing"))
        self.assertEqual((self.left("a"), self.state["outbox"]["a"]["status"]["state"]), (2, "installing"))

    def test_who_asks_for_patience_gets_it(self):
        self.put_off("a", retry_after=90, status=429)
        self.assertEqual((self.left("a"), self.left("b")), (90, 0))

    def test_a_removed_that_is_answered_by_faults_for_a_day_is_dropped(self):
        """Others wait for as long as it takes."""
        day = 86400
        for now in (1000.0, 1000.0 + day - 1):
            self.put_off("a", now)
            self.put_off("b", now)
        self.assertEqual(list(self.state["outbox"]), ["a", "b"])
        self.put_off("a", 1000.0 + day)
        words = self.put_off("b", 1000.0 + day)
        self.assertIn("for a day", words)
        self.assertEqual((list(self.state["outbox"]), list(self.state["waits"])), (["a"], ["a"]))
        self.assertEqual(self.state["dropped"], {"b": {"state": "removed", "at": margo_agent.make_time(1000 + day), "reason": "POST: no"}})

    def test_a_wfm_that_cannot_be_reached_for_days_is_told_of_the_removal_all_the_same(self):
        """Nor does the first fault after an outage count as a day of them."""
        for now in (1000.0, 10.0 ** 6):
            self.put_off("b", now, status=0)
        self.put_off("b", 10.0 ** 6 + 1)
        self.assertIn("b", self.state["outbox"])

    def test_what_is_refused_for_good_is_dropped_at_once_and_a_redirect_is_not(self):
        self.put_off("a", kind=margo_agent.Refused, status=302)
        self.assertEqual(self.left("a"), 2)
        self.put_off("a", kind=margo_agent.Refused, status=422)
        self.assertEqual((list(self.state["outbox"]), list(self.state["dropped"])), (["b"], ["a"]))


class Versions(unittest.TestCase):
    PACKAGE = {"reference": "oci://r/web:1.0.0", "digest": digest(b"package")}

    def finish(self, record, content, image):
        services = {"main": {"hash": "h", "finished": False, "image": image}}
        record = dict(record, adopted={"digest": digest(content), "version": 1})
        return margo_agent.finish_record(margo_agent.set_component(record, "web", "installed", services=services, package=self.PACKAGE))

    def test_what_runs_and_what_ran_before_are_needed_and_nothing_else(self):
        """P-5"""
        record = make_record("web")
        for content, image in ((b"one", "a:1"), (b"two", "a:2"), (b"two", "a:2"), (b"three", "a:3")):
            record = self.finish(record, content, image)
        self.assertEqual((record["running"]["digest"], record["previous"]["digest"]), (digest(b"three"), digest(b"two")))
        state = dict(margo_agent.make_state(), deployments={HELLO: record},
                     accepted={"deployments": [{"deploymentId": HELLO, "digest": digest(b"four")}]})
        digests = {digest(b"four"), digest(b"three"), digest(b"two"), digest(b"package")}
        self.assertEqual(margo_agent.find_needed(state), digests | {"a:2", "a:3"})


if __name__ == "__main__":
    unittest.main()
