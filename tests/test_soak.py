"""Soak: thousands of cycles with random faults by a seed, a clock that jumps, and nothing that grows.

The first kind has a source and a driver of its own behind the agent's interfaces, and a clock that is set; all that is between them is
real: state, store, plan, apply, outbox, back-off.  The second kind is the agent in this process against examples/wfm.py and its faults.
"""
import contextlib
import gc
import io
import json
import os
import random
import shutil
import sys
import time
import types
import unittest
import uuid

import margo_agent
from margo_agent import CommandError, ComponentError, Container, Desired, ManifestEntry, Refused, StorageError, Unreachable, Untrusted
from tests import support
from tests.bench import costs
from tests.support import DEVICE

SLOW = float(os.environ.get("MARGO_TEST_SLOW") or 0) == 1
SEED = int(os.environ.get("MARGO_TEST_SEED", "1"))


class Clock:
    """Stands in for the time module: sleeping takes no time but this clock's, and `now` can be set."""

    def __init__(self):
        self.now, self.up = 1.8e9, 1000.0
        self.CLOCK_BOOTTIME = time.CLOCK_BOOTTIME

    def __getattr__(self, name):
        return getattr(time, name)

    def time(self):
        return self.now

    def monotonic(self):
        return self.up

    def clock_gettime(self, _):
        return self.up

    def localtime(self, seconds=None):
        return time.gmtime(self.now if seconds is None else seconds)

    def sleep(self, seconds):
        self.now, self.up = self.now + seconds, self.up + seconds


class Fleet:
    """A WFM behind the interface of a source: what should run, what was reported, and how often it fails."""

    def __init__(self, rng):
        self.rng, self.version, self.wanted, self.reports, self.asked = rng, 0, {}, {}, 0
        self.ids = [str(uuid.UUID(int=rng.getrandbits(128))) for _ in range(6)]
        self.client_id = self.peer = "spiffe://x/margo/wfm/main/client/x"
        self.faulty, self.known = True, set()
        self.change()

    def change(self):
        """Another desired state."""
        self.version += 1
        self.wanted = {item: f"r{self.rng.randrange(4)}" for item in self.ids if self.rng.random() < 0.6}

    def fail(self):
        """Now and then what a WFM or a link does."""
        self.asked += 1
        chance = self.rng.random() if self.faulty else 1
        if chance < 0.05:
            error = Unreachable("HTTP 503")
            error.status, error.retry_after, error.strategy = 503, self.rng.choice([None, 5.0, 120.0]), self.rng.choice(["", "fixed", "exponential"])
            raise error
        if chance < 0.10:
            raise Unreachable("the line broke off")
        if chance < 0.12:
            raise self.rng.choice([Refused("digest mismatch"), Untrusted("a certificate")])

    def fetch_desired(self, accepted, _):
        self.fail()
        documents = {item: json.dumps({"id": item, "metadata": {"name": "a", "namespace": "n", "deviceId": DEVICE}, "spec": {
            "applicationId": "a", "deploymentProfile": {"type": "compose", "components": [
                {"name": "web", "properties": {"repository": "oci://r/a", "revision": f"1.0.{revision[1:]}"}}]}}}).encode()
            for item, revision in self.wanted.items()}
        digest = support.digest(repr(sorted(documents.items())).encode())
        if accepted and accepted["digest"] == digest and accepted["version"] == self.version and not accepted.get("incomplete"):
            return None
        if accepted and accepted["version"] > self.version:
            raise AssertionError("the agent accepted what was never served")
        entries = [ManifestEntry(item, support.digest(data), None) for item, data in documents.items()]
        return Desired(self.version, f'"{digest}"', digest, entries, {support.digest(data): data for data in documents.values()})

    def put_capabilities(self, *_):
        self.fail()

    def post_status(self, deployment_id, document):
        self.fail()
        if document["adoptedManifestVersion"] > self.version:
            raise AssertionError("a version that was never served")
        self.reports[deployment_id] = document["status"]["state"]


class Machine:
    """An engine behind the interface of a driver."""

    def __init__(self, rng):
        self.rng, self.running, self.faulty = rng, {}, True

    def fail(self, code):
        if self.faulty and self.rng.random() < 0.05:
            raise self.rng.choice([ComponentError(code, "it did not come up"), CommandError("the engine does not answer")])

    def observe(self, *_):
        if self.faulty and self.rng.random() < 0.03:
            raise CommandError("the engine does not answer")
        if self.faulty and self.running and self.rng.random() < 0.05:
            self.running.pop(self.rng.choice(sorted(self.running)))
        return [Container(item[:8], item[:8], item, "web", "main", mark, "running", "compose") for item, mark in sorted(self.running.items())]

    def ask_strangers(self):
        return []

    def tail_log(self, *_):
        return "; its log ends: last words"

    def tend(self, *_):
        pass                                        # nothing of it has a health check

    def prepare(self, deployment, component, known, store, fetched):
        self.fail("PULL_FAILED")
        store.save_artifact(support.digest(component.revision.encode()), component.revision.encode())
        return (deployment.deployment_id, component.revision), {"reference": "x", "digest": support.digest(component.revision.encode())}

    def apply(self, prepared, *_):
        self.fail("INSTALL_FAILED")
        self.running[prepared[0]] = prepared[1]
        return {"main": {"hash": prepared[1], "finished": False, "image": "x"}}

    def list_ports(self, prepared):
        return []

    def remove(self, deployment_id, *_):
        self.fail("REMOVE_FAILED")
        self.running.pop(deployment_id, None)

    def remove_image(self, _):
        return True


class Soak(unittest.TestCase):
    """P-7, P-9, P-10, P-16, P-19, D-13"""

    CONFIG = {"wfm": {"url": "https://x"}, "identity": {"certificate": "c", "key": "k", "trust_bundle": "b"}, "device": {"id": DEVICE}}

    def make(self, folder, seed):
        """(agent, fleet, machine, clock, rng), all from one seed."""
        rng, clock = random.Random(seed), Clock()
        fleet, machine = Fleet(rng), Machine(rng)
        config = margo_agent.make_config(dict(self.CONFIG, state_dir=os.path.join(folder, "state")), "/", {})
        agent = margo_agent.Agent(config)
        agent.devices = [agent.devices[0]._replace(drivers={"compose": machine})]
        agent.make_capabilities = lambda place: {"properties": {"id": DEVICE}}
        real = margo_agent.write_file

        def write_file(path, data, *rest):
            if fleet.faulty and rng.random() < 0.01:
                raise StorageError(f"{os.path.basename(path)} cannot be written (No space left on device)")
            real(path, data, *rest)

        find_time = margo_agent.Store.find_time     # a file's own time is the true clock's
        self.addCleanup(setattr, margo_agent.Store, "find_time", find_time)
        margo_agent.Store.find_time = lambda store: 0
        class Served(margo_agent.PROFILES["mtls"]):
            def connect(self, keep=True, client_id=None):
                return fleet

        for name, value in (("time", clock), ("get_random", rng.random), ("PROFILES", dict(margo_agent.PROFILES, mtls=Served)), ("write_file", write_file),
                            ("sync_folder", lambda folder: None), ("get_uptime", lambda: ("boot", clock.up)),
                            ("os", self.make_os())):
            self.patch(name, value)
        return agent, fleet, machine, clock, rng

    @staticmethod
    def make_os():
        """The os module without fsync, which is not what is tried here."""
        fake = types.ModuleType("os")
        fake.__dict__.update({name: value for name, value in vars(os).items() if not name.startswith("__")}, fsync=lambda descriptor: None)
        return fake

    def patch(self, name, value):
        """Replaces a name of the agent for this test."""
        self.addCleanup(setattr, margo_agent, name, getattr(margo_agent, name))
        setattr(margo_agent, name, value)

    def run_cycles(self, folder, seed, count):
        """The log of so many cycles; checks on the way that nothing grows and at the end that all is as it should be."""
        shutil.rmtree(os.path.join(folder, "state"), ignore_errors=True)
        agent, fleet, machine, clock, rng = self.make(folder, seed)
        before = os.environ.get("RUNTIME_DIRECTORY")
        os.environ["RUNTIME_DIRECTORY"] = os.path.join(folder, "run")
        self.addCleanup(lambda: os.environ.pop("RUNTIME_DIRECTORY", None) if before is None else os.environ.update(RUNTIME_DIRECTORY=before))
        sizes, log = [], io.StringIO()
        with contextlib.redirect_stderr(log):
            for number in range(count):
                if rng.random() < 0.1:
                    fleet.change()
                if rng.random() < 0.01:
                    clock.now = rng.choice([0.0, 1.8e9, 4.0e9])
                asked = fleet.asked
                outcome = self.cycle(agent)
                if not 0 < outcome.delay <= 3600:
                    raise AssertionError(f"cycle {number}: the next one is due in {outcome.delay} s")
                if fleet.asked - asked > 60:
                    raise AssertionError(f"cycle {number}: {fleet.asked - asked} requests")
                clock.sleep(outcome.delay)
                if number % max(1, count // 20) == 0:
                    gc.collect()
                    sizes.append((len(gc.get_objects()), len(os.listdir("/proc/self/fd")), sum(
                        os.path.getsize(os.path.join(path, name)) for path, _, names in os.walk(folder) for name in names)))
            fleet.faulty = machine.faulty = False
            for _ in range(40):
                clock.sleep(4000)
                outcome = self.cycle(agent)
        self.check_end(agent, fleet, machine, outcome)
        return log.getvalue(), sizes

    @staticmethod
    def cycle(agent):
        """One cycle; a state that cannot be stored at all ends it as it ends the process."""
        return agent.cycle()

    def check_end(self, agent, fleet, machine, outcome):
        """All is as desired, and the WFM knows."""
        self.assertEqual(outcome.code, 0, outcome)
        self.assertEqual(machine.running, {item: f"1.0.{revision[1:]}" for item, revision in fleet.wanted.items()})
        state = margo_agent.Store(agent.config.state_dir).load_state()
        self.assertEqual((state["outbox"], set(state["deployments"])), ({}, set(fleet.wanted)))
        for item in fleet.ids:
            if item in fleet.reports:
                self.assertEqual(fleet.reports[item], "installed" if item in fleet.wanted else "removed")
        self.assertLessEqual(len(state["history"]), margo_agent.HISTORY)

    def test_thousands_of_cycles_with_faults_and_clock_jumps(self):
        """P-2, P-4: WFM, engine, disk and clock fail at random; in the end all is as desired, every last status told, nothing grown."""
        folder, count = support.make_folder(self), 10000 if SLOW else 400
        start, peak = time.monotonic(), costs.read_peak()
        log, sizes = self.run_cycles(folder, SEED, count)
        grown = round((costs.read_peak() - peak) * 1024)
        middle, end = sizes[len(sizes) // 2], sizes[-1]
        for name, early, late, slack in zip(("objects", "file descriptors", "bytes on the disk"), middle, end, (2000, 1, 60000)):
            self.assertLessEqual(late, early + slack, name)
        sys.__stderr__.write(f"\nsoak: {count} cycles by seed {SEED} in {time.monotonic() - start:.0f} s: objects {middle[0]} to {end[0]}, descriptors "
                         f"{middle[1]} to {end[1]}, disk {middle[2]} to {end[2]} bytes, {grown} KiB more at the peak, {log.count(chr(10))} log lines\n")

    def test_the_log_of_a_run_reproduces_from_its_seed(self):
        folder = support.make_folder(self)
        logs = [self.run_cycles(folder, SEED + 1, 200)[0] for _ in range(2)]
        self.assertEqual(logs[0].splitlines(), logs[1].splitlines())
        self.assertGreater(len(logs[0]), 10000)


class AgainstTheExample(support.DeviceCase):
    def test_cycles_against_the_example_wfm_and_its_faults(self):
        """P-9, P-10, P-12: TLS, HTTP and an engine of files; every few cycles something else is spoilt, and in the end all is right."""
        rng, count = random.Random(SEED), 300 if SLOW else 25
        ids = [str(uuid.UUID(int=rng.getrandbits(128))) for _ in range(3)]
        faults = [{"status": 503, "headers": {"Retry-After": "1"}}, {"close": True}, {"truncate": 10}, {"corrupt": True}, {"status": 500},
                  {"problem": "not-authorized"}, {"problem": "semantic-error"}, {"close": True, "late": True}, {"status": 200, "body": "<html>"}]
        old = dict(os.environ)
        self.addCleanup(lambda: (os.environ.clear(), os.environ.update(old)))
        os.environ.update(self.device.env)
        config, wanted, sizes = margo_agent.load_config(self.device.config_file), set(), []
        for number in range(count):
            for item in ids:
                if rng.random() < 0.2:
                    self.publish(item, rng, wanted)
            self.wfm.fault(*[dict(fault, times=1) for fault in rng.sample(faults, rng.randrange(3))])
            self.cycle(config)
            if number % 5 == 0:
                gc.collect()
                sizes.append((len(gc.get_objects()), len(os.listdir("/proc/self/fd")), len(os.listdir(self.device.state_dir))))
        self.wfm.fault()
        for _ in range(3):
            outcome = self.cycle(config)
        self.assertEqual((outcome.code, self.device.status()["outbox"]), (0, 0))
        self.assertEqual({item["labels"]["org.margo.deployment"] for item in self.engine.containers().values()}, wanted)
        for early, late, slack in zip(sizes[len(sizes) // 2], sizes[-1], (3000, 1, 1)):
            self.assertLessEqual(late, early + slack, sizes)
        sys.__stderr__.write(f"\nsoak: {count} cycles against the example WFM by seed {SEED}: {sizes[len(sizes) // 2]} to {sizes[-1]} objects, descriptors, files\n")

    def publish(self, item, rng, wanted):
        """Adds, changes or takes away a deployment."""
        if item in wanted and rng.random() < 0.4:
            self.wfm.withdraw(item)
            wanted.discard(item)
        else:
            self.wfm.publish(support.make_deployment(item, "app", registry=self.wfm.registry, parameters={"GREETING": str(rng.random())}), item)
            wanted.add(item)

    def cycle(self, config):
        """One cycle, with every back-off ended first; its log is nobody's here."""
        store = margo_agent.Store(config.state_dir)
        if os.path.exists(store.path("state.json")):
            state = store.load_state()
            for record in state["deployments"].values():
                record["retry"] = {}
            store.save_state(dict(state, patience={}, waits={}))
        with contextlib.redirect_stderr(io.StringIO()):
            return margo_agent.Agent(config).cycle()


if __name__ == "__main__":
    unittest.main()
