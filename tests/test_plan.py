"""Plan: a pure comparison of what should run, what is known and what is there."""
import itertools
import unittest

import margo_agent
from tests.support import HELLO, digest

OTHER = "9c1d6f0e-5c35-4c9f-9b43-2f6f6c1f7a11"
NOW = 1000000
WAIT = {"failures": 9, "at": NOW, "delay": 600}


def make_target(digest_of=b"one", deployment_id=HELLO, error=None):
    return margo_agent.Target(deployment_id, digest(digest_of), 1, None, error, "device")


def make_plan(targets, records, containers, now=NOW, **runtime):
    """The plan for one device; containers: None where its engine does not answer."""
    deaf = {"compose": margo_agent.CommandError("deaf")} if containers is None else {}
    seen = {"device": margo_agent.Seen(containers or [], {}, deaf)}
    return margo_agent.make_plan(targets, records, [margo_agent.Device("device", None, {})], seen, margo_agent.Clock(now, "", 0), **runtime)


def make_record(digest_of=b"one", state="installed", deployment_id=HELLO, **changes):
    record = margo_agent.make_record(make_target(digest_of, deployment_id), "device")
    services = {"main": {"hash": "h", "finished": False, "image": "i"}}
    record.update(state=state, running={"digest": digest(digest_of), "packages": {}, "images": [], "services": {"web": services}},
                  components=[{"name": "web", "state": state, "error": None, "services": services, "package": None}])
    record.update(changes)
    return record


def make_container(deployment_id=HELLO, component="web", service="main", label="h", state="running"):
    return margo_agent.Container("id", "name", deployment_id, component, service, label, state, "compose")


def plan(targets, records, containers, now=NOW, **runtime):
    records = {record["deploymentId"].lower(): record for record in records}
    actions = make_plan(targets, records, containers, now, **runtime)
    return [(action.deployment_id, margo_agent.PRINTED.get(action.verb, action.verb)) for action in actions], [action.reason for action in actions]


class Actions(unittest.TestCase):
    def one(self, target, record, containers, **options):
        steps, (reason,) = plan([target], [record] if record else [], containers, **options)
        return steps[0][1], reason

    def test_new_same_and_other_revision(self):
        """D-3: a changed digest under the same id is an update."""
        self.assertEqual(self.one(make_target(), None, []), ("install", "new"))
        self.assertEqual(self.one(make_target(), make_record(), [make_container()]), ("keep", "as desired"))
        self.assertEqual(self.one(make_target(b"two"), make_record(), [make_container()]), ("update", "another revision"))
        self.assertEqual(self.one(make_target(b"two"), make_record(running=None), [])[0], "install")

    def test_what_is_not_desired_is_removed_and_removals_come_first(self):
        """C-113, P-11: also containers that no record knows, whatever their state."""
        steps, _ = plan([make_target()], [make_record(deployment_id=OTHER)], [make_container("aaaaaaaa-0000-4000-8000-000000000000", state="exited")])
        self.assertEqual(steps, [(OTHER, "remove"), ("aaaaaaaa-0000-4000-8000-000000000000", "remove"), (HELLO, "install")])

    def test_a_removal_that_failed_waits_and_one_that_was_cut_off_goes_on(self):
        wait = {"failures": 1, "at": NOW, "delay": 60, "leaving": True}
        failed = make_record(state="failed", error={"code": "REMOVE_FAILED"}, retry=wait)
        steps, reasons = plan([], [failed], [make_container()])
        self.assertEqual((steps, reasons[0][:34]), ([(HELLO, "keep")], "cannot be removed (REMOVE_FAILED);"))
        for record, now in ((failed, NOW + 60), (dict(failed, retry=dict(WAIT)), NOW), (dict(failed, state="removing", error=None), NOW)):
            self.assertEqual(plan([], [record], [make_container()], now)[0], [(HELLO, "remove")])

    def test_drift_is_an_update_with_its_reason(self):
        """P-12, D-23: a container that is gone, stopped, foreign or left over."""
        for containers, word in (([], "no container"), ([make_container(state="exited")], "exited"), ([make_container(label="x")], "not the container"),
                                 ([make_container(), make_container(service="old")], "does not belong"),
                                 ([make_container(state="paused")], "paused"), ([make_container(state="unhealthy")], "unhealthy"),
                                 ([make_container(), make_container()], "has 2 containers")):
            action, reason = self.one(make_target(), make_record(), containers)
            self.assertEqual(action, "update")
            self.assertIn(word, reason)

    def test_a_finished_one_shot_is_no_drift_and_a_changed_one_is(self):
        """P-17: exit 0 at install is done, not broken."""
        record = make_record()
        record["components"][0]["services"]["main"]["finished"] = True
        for containers in ([], [make_container(state="exited")]):
            self.assertEqual(self.one(make_target(), record, containers)[0], "keep")
        self.assertEqual(self.one(make_target(), record, [make_container(label="x", state="exited")])[0], "update")

    def test_an_engine_that_does_not_answer_is_no_drift(self):
        """D-16"""
        self.assertEqual(self.one(make_target(), make_record(), None)[0], "keep")

    def test_ids_are_compared_without_regard_to_case(self):
        self.assertEqual(self.one(make_target(deployment_id=HELLO.upper()), make_record(), [make_container(HELLO.upper())])[0], "keep")

    def test_a_failed_revision_waits_for_its_time_and_another_does_not(self):
        """D-13, P-15: no hot loop; a new digest is tried at once."""
        record = make_record(state="failed", error={"code": "X", "source": "", "message": ""}, retry={"failures": 2, "at": NOW, "delay": 60})
        action, reason = self.one(make_target(), record, [])
        self.assertEqual(action, "keep")
        self.assertIn("X", reason)
        self.assertIn(margo_agent.make_time(NOW + 60), reason)
        self.assertEqual(self.one(make_target(), dict(record, retry={"failures": 2, "at": NOW - 60, "delay": 60}), [])[0], "update")
        self.assertIn("attempt 3", self.one(make_target(), dict(record, retry={"failures": 2, "at": NOW - 60, "delay": 60}), [])[1])
        self.assertEqual(self.one(make_target(b"two"), record, [])[0], "update")

    def test_what_was_interrupted_goes_on(self):
        """P-9: every phase that is not an end is taken up again."""
        for state in ("pending", "installing", "removing", "removed"):
            action, reason = self.one(make_target(), make_record(state=state), [make_container()])
            self.assertEqual(action, "update")
            self.assertIn(state, reason)

    def test_what_cannot_be_carried_out_is_refused_with_its_reason(self):
        error = margo_agent.ComponentError("INVALID_DEPLOYMENT", "spec: expected a mapping")
        self.assertEqual(self.one(make_target(error=error), None, []), ("refuse", "INVALID_DEPLOYMENT: spec: expected a mapping"))

    def test_documents_are_read_only_where_deciding_takes_them(self):
        entry = margo_agent.ManifestEntry(HELLO, digest(b"one"), None)
        for record, expected in ((None, True), (make_record(), False), (make_record(b"two"), True), (make_record(state="failed"), False),
                                 (make_record(state="installing"), True), (make_record(refused=True), True), (make_record(state="failed", refused=True), True)):
            self.assertIs(margo_agent.needs_document(entry, record), expected)


class Stability(unittest.TestCase):
    """What is repaired again and again, and what waits beside a revision that failed."""

    def act(self, record, containers=(), now=NOW, error=None, **runtime):
        content = b"two" if record["adopted"]["digest"] == digest(b"two") else b"one"
        (action,) = make_plan([make_target(content, error=error)], {HELLO: record}, list(containers), now, **runtime)
        return action

    def test_another_container_under_the_same_labels_is_drift(self):
        """D-23, P-12: changed behind the agent's back, however well it was copied."""
        record = make_record()
        record["components"][0]["services"]["main"]["id"] = "id"
        self.assertEqual(self.act(record, [make_container()]).verb, "keep")
        record["components"][0]["services"]["main"]["id"] = "other"
        self.assertIn("not the container that was made for it", self.act(record, [make_container()]).reason)

    def test_one_restart_is_no_drift_and_one_just_now_is(self):
        """P-6: `running` at the moment of the look is not enough where the engine starts it over and over."""
        record = make_record()
        record["components"][0]["services"]["main"]["started"] = 100
        for started, settle, expected in ((100, 10, "keep"), (NOW - 11, 10, "keep"), (NOW - 3, 10, "update"), (NOW - 3, 0, "keep"),
                                          (NOW + 5, 10, "keep")):
            action = self.act(record, [make_container()._replace(started=started)], settle=settle)
            self.assertEqual(action.verb, expected, started)
        record["components"][0]["services"]["main"]["started"] = NOW - 3               # started by the agent itself
        self.assertEqual(self.act(record, [make_container()._replace(started=NOW - 3)], settle=10).verb, "keep")

    def test_a_repair_that_does_not_last_is_not_repeated_for_ever(self):
        """P-7: five in an hour, then with growing pauses, in which the deployment counts as failed."""
        record, now, pauses = make_record(), NOW, []
        for count in range(1, 15):
            record = margo_agent.count_repair(record, margo_agent.Clock(now, "", 0))
            self.assertEqual(record["repair"]["failures"], count)
            pause = record["repair"]["delay"]
            pauses.append(pause)
            action = self.act(record, [], now + 1)
            self.assertEqual((action.verb, action.culprit), ("give_up", ("web", "main")) if pause else ("update", None))
            self.assertEqual(self.act(record, [], now + pause).verb, "update")
            now += pause
        self.assertEqual(pauses, [0, 0, 0, 0, 30, 60, 120, 240, 480, 960, 1920, 3600, 3600, 3600])
        self.assertEqual(margo_agent.count_repair(record, margo_agent.Clock(now + 3600, "", 0))["repair"]["failures"], 1)      # an hour of rest after the pause
        self.assertEqual(self.act(record, [make_container()], now - 1).verb, "keep")

    def test_a_first_repair_is_counted_by_any_clock(self):
        """P-2: also in the first hour of 1970."""
        for now in (0, 100, 10 ** 10):
            self.assertEqual(margo_agent.count_repair(make_record(), margo_agent.Clock(now, "", 0))["repair"]["failures"], 1)

    def test_a_new_revision_starts_with_a_clean_sheet(self):
        record = dict(make_record(), repair=WAIT, retry=WAIT)
        begun = margo_agent.begin_record(record, make_target(b"two"))
        self.assertEqual((begun["repair"], begun["retry"], begun["fallback"]), ({}, {}, True))
        self.assertEqual(margo_agent.begin_record(record, make_target())["repair"], WAIT)

    def test_a_clock_that_was_wrong_holds_nothing_up(self):
        """P-2: a next attempt noted in a wrong year does not wait for that year."""
        record = make_record(state="failed", error={"code": "X", "source": "", "message": ""}, retry=dict(WAIT, at=NOW + 10 ** 8))
        self.assertEqual(self.act(record).verb, "update")
        self.assertEqual(self.act(dict(make_record(), repair=dict(WAIT, at=NOW + 10 ** 8))).verb, "update")

    def make_failed(self, **changes):
        record = make_record(state="failed", error={"code": "X", "source": "", "message": "m"}, retry={"failures": 1, "at": NOW, "delay": 60}, fallback=True)
        return dict(record, adopted={"digest": digest(b"two"), "version": 2}, **changes)

    def test_the_version_before_is_mended_while_a_failed_one_waits(self):
        """P-1, P-12: also where the new one was refused; what is kept for inspection is not touched."""
        action = self.act(self.make_failed())
        self.assertEqual(action.verb, "restore")
        self.assertIn("version before", action.reason)
        self.assertEqual(self.act(self.make_failed(), [make_container()]).verb, "keep")
        self.assertEqual(self.act(self.make_failed(), now=NOW + 60).verb, "update")
        self.assertEqual(self.act(dict(self.make_failed(), fallback=False)).verb, "keep")
        self.assertEqual(self.act(dict(self.make_failed(), repair=WAIT)).verb, "keep")
        error = margo_agent.ComponentError("NOT_ELIGIBLE", "m")
        self.assertEqual(self.act(self.make_failed(refused=True), error=error).verb, "restore")
        self.assertEqual(self.act(self.make_failed(refused=True), [make_container()], error=error).verb, "refuse")

    def test_another_environment_of_the_device_is_an_update(self):
        """C-185: contract, Workloads: a change of runtime.environment replaces the containers it concerns."""
        record, mark = make_record(), margo_agent.make_mark({"A": "1"})
        record["running"]["mark"] = mark
        self.assertEqual(self.act(record, [make_container()], mark=mark).verb, "keep")
        action = self.act(record, [make_container()], mark="")
        self.assertEqual((action.verb, action.reason), ("update", "runtime.environment has changed"))
        self.assertEqual(self.act(dict(record, type="helm"), [make_container()], mark="").verb, "keep")
        action = self.act(record, [make_container(state="exited")], mark="")
        self.assertEqual(action.reason, "drift: web/main is exited")                 # what is broken is said first

    def test_the_words_say_what_is_done_and_why(self):
        restless = make_record()
        restless["components"][0]["services"]["main"]["started"] = 100
        seen = make_container()._replace(started=NOW - 3)
        vain = f"web/main has no container although it was repaired 9 times; next attempt at {margo_agent.make_time(NOW + 600)}"
        for record, containers, reason in (
                (dict(make_record(), repair=WAIT), [], vain), (restless, [seen], "drift: web/main is being restarted over and over"),
                (make_record(state="pending", running=None), [], "new"), (make_record(state="removed", running=None), [], "new"),
                (make_record(state="installing", running=None), [], "was interrupted while installing"),
                (make_record(state="failed", refused=True, running=None), [], "was refused before, and can be carried out now")):
            self.assertEqual(self.act(record, containers, settle=10).reason, reason)

    def test_a_look_at_the_very_moment_of_a_start_sees_a_restart(self):
        record = make_record()
        record["components"][0]["services"]["main"]["started"] = 100
        for started, verb in ((NOW, "update"), (NOW - 10, "keep"), (NOW + 1, "keep")):
            self.assertEqual(self.act(record, [make_container()._replace(started=started)], settle=10).verb, verb)
        for started, verb in ((98, "keep"), (102, "keep"), (97, "update"), (103, "update")):       # docker rounds it by a second or two
            self.assertEqual(self.act(record, [make_container()._replace(started=started)], now=104, settle=10).verb, verb)

    def test_only_a_failed_one_is_restored_and_only_while_nothing_else_is_done(self):
        failed = self.make_failed()
        self.assertEqual(self.act(dict(failed, state="installing")).verb, "update")
        self.assertEqual(self.act(dict(failed, adopted={"digest": digest(b"three"), "version": 3})).verb, "update")
        error = margo_agent.ComponentError("NOT_ELIGIBLE", "m")
        self.assertEqual(self.act(dict(failed, retry={}), error=error).verb, "restore")


class Downtime(unittest.TestCase):
    """What is done of a plan while nobody may be asked: nothing that has to be fetched (protocol 10)."""

    def hold(self, record, target, containers=()):
        (action,) = make_plan([target], {HELLO: record} if record else {}, list(containers), quiet=True)
        return action.verb

    def test_what_is_at_hand_is_done(self):
        """Drift is mended, a version that is or was there started; what is not there waits."""
        before = {"digest": digest(b"two"), "packages": {}, "images": [], "services": {}}
        record = make_record(previous=before)
        for content, verb in ((b"one", "update"), (b"two", "update")):
            self.assertEqual(self.hold(record, make_target(content)), verb)
        self.assertEqual(self.hold(record, make_target(b"three"), [make_container()]), "keep")
        self.assertEqual(self.hold(None, make_target()), "keep")
        self.assertEqual(self.hold(None, make_target(error=margo_agent.ComponentError("X", "m"))), "refuse")

    def test_another_revision_waits_and_the_version_before_goes_on(self):
        """Where the version before is broken, it is mended."""
        self.assertEqual(self.hold(make_record(previous=None), make_target(b"two"), [make_container()]), "keep")
        for containers in ([], [make_container(state="exited")]):
            self.assertEqual(self.hold(make_record(previous=None), make_target(b"two"), containers), "restore")

    def test_what_is_mended_in_vain_and_what_never_ran_is_left_alone(self):
        waits = make_record(b"two", state="failed", repair=WAIT, previous=None, fallback=True, error={"code": "X"})
        waits["running"]["digest"] = digest(b"one")
        self.assertEqual(self.hold(waits, make_target(b"three")), "restore")              # another revision, another count
        self.assertEqual(self.hold(waits, make_target(b"two")), "keep")
        self.assertEqual(self.hold(dict(waits, repair={}), make_target(b"two")), "restore")
        self.assertEqual(self.hold(make_record(running=None, previous=None), make_target(b"two"), [make_container(label="x")]), "keep")


class Places(unittest.TestCase):
    """One plan for a gateway and its children: where each deployment is at home, and what is left of it elsewhere."""

    def plan(self, targets, records, containers):
        """[(verb as it is carried out, device, reason)]; containers: {device: [deployment id]}."""
        records = {record["deploymentId"]: record for record in records}
        devices = [margo_agent.Device(name, None, {}) for name in ("gw", "gw/a")]
        there = {name: margo_agent.Seen([make_container(item) for item in containers.get(name, ())], {}, {}) for name in ("gw", "gw/a")}
        actions = margo_agent.make_plan(targets, records, devices, there, margo_agent.Clock(NOW, "", 0))
        return [(action.verb, action.device_id, action.reason) for action in actions]

    def test_what_moves_is_made_at_its_new_home_by_the_step_that_clears_the_old_one(self):
        target, record = make_target()._replace(device_id="gw/a"), make_record(deviceId="gw")
        self.assertEqual(self.plan([target], [record], {"gw": [HELLO]}),
                         [("install", "gw/a", "moves here from gw")])
        self.assertEqual(self.plan([target], [], {"gw": [HELLO]}), [("install", "gw/a", "new")])    # a lost state
        self.assertEqual(self.plan([make_target(b"two")._replace(device_id="gw")], [record], {}), [("update", "gw", "another revision")])
        never = dict(record, running=None, state="failed")
        self.assertEqual(self.plan([target], [never], {}), [("install", "gw/a", "new")])

    def test_what_is_left_elsewhere_stays_until_its_home_is_sure(self):
        """Nothing is taken away for what cannot be carried out where it belongs."""
        target = make_target()._replace(device_id="gw/a")
        refused = target._replace(error=margo_agent.ComponentError("NOT_ELIGIBLE", "m"))
        self.assertEqual([step[:2] for step in self.plan([refused], [make_record(deviceId="gw/a")], {"gw": [HELLO]})], [("refuse", "gw/a")])
        failed = make_record(deviceId="gw/a", state="failed", retry={"failures": 1, "at": NOW, "delay": 60}, error={"code": "X"})
        self.assertEqual([step[:2] for step in self.plan([target], [failed], {"gw": [HELLO]})], [("keep", "gw/a")])
        installed = make_record(deviceId="gw/a")
        self.assertEqual([step[:2] for step in self.plan([target], [installed], {"gw": [HELLO], "gw/a": [HELLO]})],
                         [("clear", "gw"), ("keep", "gw/a")])

    def test_what_nobody_wants_is_removed_at_home_and_cleared_elsewhere(self):
        found = self.plan([], [make_record(deviceId="gw")], {"gw": [HELLO], "gw/a": [HELLO, OTHER]})
        self.assertEqual(sorted(step[:2] for step in found), [("clear", "gw/a"), ("remove", "gw"), ("remove", "gw/a")])
        self.assertEqual({step[2] for step in found}, {"not in the desired state"})

    def test_removals_come_before_all_else_on_every_device(self):
        target = make_target()._replace(device_id="gw")
        self.assertEqual([step[:2] for step in self.plan([target], [], {"gw/a": [OTHER]})], [("remove", "gw/a"), ("install", "gw")])


class Turns(unittest.TestCase):
    """F-28: the host's ports change hands between deployments of one plan; the order in the manifest is of no account."""

    @staticmethod
    def ports(*numbers, device="gw", address="", protocol="tcp"):
        return {(device, address, number, protocol) for number in numbers}

    def run_all(self, held=(), **waiting):
        """[(verb, id)] until nobody waits; waiting: {id: (ports it takes, ports it holds)}; what is done holds what it took."""
        held, done = dict(held), []
        while waiting:
            key, verb, words = margo_agent.find_turn(waiting, held)
            done.append((verb, key))
            self.assertEqual(bool(words), verb == "fail")
            takes, holds = waiting[key]
            if verb == "stop":
                self.assertTrue(holds, "what holds nothing has nothing to free")
                waiting[key] = takes, set()
                continue
            waiting.pop(key)
            held[key] = takes if verb == "go" else holds
        return done

    def test_who_gives_a_port_up_goes_before_who_takes_it(self):
        one, two, three = self.ports(1), self.ports(2), self.ports(3)
        for order in itertools.permutations((("a", (two, one)), ("b", (three, two)), ("c", (self.ports(4), three)))):
            self.assertEqual(self.run_all(**dict(order)), [("go", "c"), ("go", "b"), ("go", "a")])

    def test_what_is_independent_keeps_the_order_of_the_manifest(self):
        self.assertEqual(self.run_all(b=(self.ports(1), set()), a=(self.ports(2), self.ports(2)), c=(set(), set())),
                         [("go", "b"), ("go", "a"), ("go", "c")])

    def test_in_a_circle_one_is_stopped_first_and_each_is_changed_once(self):
        one, two, three = self.ports(1), self.ports(2), self.ports(3)
        for items in itertools.permutations((("a", (two, one)), ("b", (three, two)), ("c", (one, three)))):
            done = self.run_all(**dict(items))
            self.assertEqual([verb for verb, _ in done].count("stop"), 1)
            self.assertEqual(sorted(key for verb, key in done if verb == "go"), ["a", "b", "c"])
        self.assertEqual(self.run_all(a=(two, one), b=(one, two)), [("stop", "b"), ("go", "a"), ("go", "b")])

    def test_a_port_that_its_holder_keeps_is_not_taken(self):
        """Whoever wants it fails, and so does who waits for what that one would have given up; the holder goes on."""
        one, two, three = self.ports(1), self.ports(2), self.ports(3)
        self.assertEqual(self.run_all(held={"b": one}, a=(one, set())), [("fail", "a")])
        self.assertEqual(self.run_all(a=(two, one), b=(self.ports(2, 3), two)), [("fail", "a"), ("go", "b")])
        self.assertEqual(self.run_all(c=(one, three), a=(two, one), b=(two, two)), [("fail", "a"), ("fail", "c"), ("go", "b")])
        self.assertEqual(self.run_all(a=(one, set()), b=(one, set())), [("go", "a"), ("fail", "b")])

    def test_one_that_runs_is_not_barred_by_one_that_only_would_go_back_to_its_port(self):
        """The last of a circle that failed cannot go back: its old port is the first one's, who may be repaired and updated."""
        one, two = self.ports(1), self.ports(2)
        self.assertEqual(self.run_all(held={"b": one}, a=(one, one)), [("go", "a")])
        self.assertEqual(self.run_all(b=(one, one), a=(two, one)), [("go", "a"), ("go", "b")])

    def test_the_words_name_the_port_and_its_holder(self):
        _, _, words = margo_agent.find_turn({"a": (self.ports(53, protocol="udp"), set())}, {OTHER: self.ports(53, protocol="udp")})
        self.assertIn("*:53/udp", words)
        self.assertIn(OTHER, words)

    def test_ports_are_the_same_on_one_device_by_one_protocol_and_at_addresses_that_meet(self):
        for held, meets in (({"address": "10.0.0.1"}, True), ({}, True), ({"device": "gw/a"}, False), ({"protocol": "udp"}, False)):
            self.assertEqual(self.run_all(held={"b": self.ports(1, **held)}, a=(self.ports(1), set())),
                             [("fail" if meets else "go", "a")], held)
        self.assertEqual(self.run_all(held={"b": self.ports(1, address="10.0.0.1")}, a=(self.ports(1, address="10.0.0.2"), set())),
                         [("go", "a")])

    def test_what_holds_a_port_is_the_version_that_runs(self):
        record = make_record()
        self.assertEqual(margo_agent.find_held_ports(record), set())
        record["components"][0]["services"]["main"]["ports"] = [["", 80, "tcp"]]
        self.assertEqual(margo_agent.find_held_ports(record), {("device", "", 80, "tcp")})
        record["components"][0]["services"]["once"] = {"finished": True, "image": "i", "ports": [["", 90, "tcp"]]}
        self.assertEqual(margo_agent.find_held_ports(record), {("device", "", 80, "tcp")})      # what has ended holds nothing
        begun = margo_agent.begin_record(record, make_target(b"two"))
        self.assertEqual(margo_agent.find_held_ports(begun), {("device", "", 80, "tcp")})
        begun["components"][0]["services"] = {"main": {"hash": "h", "finished": False, "image": "i", "ports": [["", 81, "tcp"]]}}
        self.assertEqual(margo_agent.find_held_ports(begun), {("device", "", 80, "tcp")})          # it is not done yet
        self.assertEqual(margo_agent.find_held_ports(dict(begun, fallback=False)), {("device", "", 81, "tcp")})
        self.assertEqual(margo_agent.find_held_ports(dict(record, state="removed")), set())

    def test_what_frees_comes_before_what_takes(self):
        """Removals, repairs, then all updates as one group, then what is new."""
        ids = [f"{number}" for number in range(6)]
        running = dict(make_record(), deviceId="gw")
        records = {key: running for key in ids[1:]}
        actions = [margo_agent.Action(key, verb, "", make_target(content), "gw") for key, verb, content in (
            ("5", "remove", b"one"), ("0", "install", b"one"), ("1", "update", b"two"), ("2", "update", b"one"), ("3", "update", b"two"),
            ("4", "keep", b"one"))]
        groups = [[action.deployment_id for action in group] for group in margo_agent.make_groups(actions, records)]
        self.assertEqual(groups, [["5"], ["2"], ["4"], ["1", "3"], ["0"]])

    def test_the_way_back_from_an_update_that_has_failed_takes_its_turn_with_the_others(self):
        """F-28: what it held before may be another one's by now, and given up only in this manifest."""
        running = dict(make_record(), deviceId="gw")
        records = {HELLO: dict(running, fallback=True), OTHER: running}
        actions = [margo_agent.Action(HELLO, "update", "", make_target(b"one"), "gw"),
                   margo_agent.Action(OTHER, "update", "", make_target(b"two"), "gw")]
        self.assertEqual(margo_agent.make_groups(actions, records), [actions])

    def test_what_changes_nothing_is_a_group_of_its_own(self):
        actions = [margo_agent.Action(HELLO, verb, "", make_target(), "gw") for verb in ("refuse", "clear", "remove")]
        self.assertEqual(margo_agent.make_groups(actions, {}), [[action] for action in actions] + [[]])


class Convergence(unittest.TestCase):
    def test_every_combination_has_exactly_one_action_a_deployment_and_a_reason(self):
        """P-12: whatever was interrupted, nothing wanted is left out and nothing unwanted kept."""
        records = [None] + [make_record(content, state, retry=wait, error={"code": "X"}) for content in (b"one", b"two")
                            for state in margo_agent.STATES for wait in ({}, WAIT)]
        observed = [None, [], [make_container()], [make_container(state="exited")], [make_container(), make_container(OTHER)]]
        count = 0
        for target, record, containers in itertools.product([None, make_target(), make_target(error=margo_agent.ComponentError("E", "m"))],
                                                            records, observed):
            steps, reasons = plan([target] if target else [], [record] if record else [], containers)
            found = dict(steps)
            self.assertEqual(len(found), len(steps))
            self.assertTrue(all(reasons))
            if target:
                self.assertIn(found[HELLO], ("install", "update", "keep", "refuse"))
            elif record or containers:
                there = any(c.deployment_id == HELLO for c in containers or ())      # what is removed already is only still to be reported
                removal = "keep" if containers is None else "remove"                # it waits until the engine answers
                self.assertEqual(found.get(HELLO), removal if record and record["state"] != "removed" or there else None)
            if containers and any(c.deployment_id == OTHER for c in containers):
                self.assertEqual(found[OTHER], "remove")
            count += 1
        self.assertEqual(count, 3 * 25 * 5)

    def test_what_is_as_desired_stays_so(self):
        """P-7: the plan for what the plan has made is to keep it."""
        self.assertEqual(plan([make_target()], [make_record()], [make_container()])[0], [(HELLO, "keep")])


if __name__ == "__main__":
    unittest.main()
