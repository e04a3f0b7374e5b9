"""Desired-state sources: every profile goes through the same scenarios, on the engine of files.

A road is how a profile's other side is driven by a test: `publish`, `withdraw`, `spoil` (what comes next does not verify), `mend`, `stop`
(nobody answers any more), `states` (what was reported of a deployment). ROADS has one for each profile; a new one gets every scenario.
"""
import contextlib
import json
import os
import subprocess
import unittest

from tests import git_server, support
from tests.support import HELLO

OTHER = HELLO[:-2] + "99"


class HttpRoad:
    """The profiles with a WFM that serves manifests; name: mtls, signed-a or signed-b."""

    def __init__(self, name, test, engine):
        self.pki, self.dialect = support.Pki(test), name.partition("-")[2]
        self.wfm = support.Wfm(test, self.pki, profile=name)
        self.wfm.add_package(support.make_compose())
        self.device = support.Device(test, self.pki, self.wfm, engine)

    def publish(self, deployment_id=HELLO, **options):
        """Makes a deployment of one component part of the desired state."""
        make = (lambda *a, **o: support.make_signed_deployment(self.dialect, *a, **o)) if self.dialect else support.make_deployment
        self.wfm.publish(make(deployment_id, registry=self.wfm.registry, **options), deployment_id)

    def withdraw(self, deployment_id=HELLO):
        self.wfm.withdraw(deployment_id)

    def spoil(self):
        root = "/api/v1/clients/*" if self.dialect else "/api/v1"
        self.wfm.fault(*({"method": "GET", "path": f"{root}/{kind}", "corrupt": True} for kind in ("deployments/*/sha256:*", "bundles/*")))

    def mend(self):
        self.wfm.fault()

    def stop(self):
        self.wfm.stop()

    def states(self, deployment_id=HELLO):
        return self.wfm.statuses(deployment_id)


class GitRoad:
    """Profile git: a repository behind https with a token, which takes the reports, too."""

    def __init__(self, name, test, engine):
        support.require("git")
        self.pki, self.repository = support.Pki(test), git_server.Repository(test)
        self.wfm = support.Wfm(test, self.pki)      # its registry serves the packages
        self.wfm.add_package(support.make_compose())
        self.server = git_server.GitServer(test, self.pki, self.repository.served, "Bearer t0ken")
        token = support.write(os.path.join(self.repository.folder, "token"), "t0ken", 0o600)
        self.device = support.Device(test, self.pki, self.wfm, engine, url=f"{self.server.url}/fleet.git", settings={
            "wfm.profile": name, "identity": {"ca": self.pki.path("site-ca.pem")}, "git.token_file": token})
        self.repository.commit({"README": "the fleet"})

    def publish(self, deployment_id=HELLO, **options):
        self.repository.commit({f"{deployment_id}.yaml": support.make_deployment(deployment_id, registry=self.wfm.registry, **options)})

    def withdraw(self, deployment_id=HELLO):
        self.repository.commit({f"{deployment_id}.yaml": None})

    def spoil(self):
        self.repository.commit({"spoilt.yaml": "a: [1"})

    def mend(self):
        self.repository.commit({"spoilt.yaml": None})

    def stop(self):
        self.server.close()

    def states(self, deployment_id=HELLO):
        try:
            return [line.split(": ")[1] for line in self.repository.log(f"status/{support.DEVICE}") if line.startswith(deployment_id)]
        except AssertionError:                      # there is no such branch yet
            return []


ROADS = {name: (lambda test, engine, name=name: HttpRoad(name, test, engine)) for name in ("mtls", "signed-a", "signed-b")}
ROADS["git"] = lambda test, engine: GitRoad("git", test, engine)


class Scenarios:
    """What has to happen whatever the profile."""

    profile = None

    def setUp(self):
        support.require("openssl")
        self.engine = support.FakeEngine(self)
        self.road = ROADS[self.profile](self, self.engine)
        self.device = self.road.device

    def environments(self):
        """{deployment id: environment of its one container}, of those that run."""
        return {container["labels"]["org.margo.deployment"]: container["env"] for container in self.engine.containers().values()
                if container["state"] == "running"}

    def forget_patience(self):
        """The next cycle need not wait for a back-off."""
        path = os.path.join(self.device.state_dir, "state.json")
        support.write(path, json.dumps(dict(self.device.state(), patience={}, waits={})), 0o600)

    def test_first_sync(self):
        """C-050, C-080, C-105, C-130: from nothing to running and reported, with the parameters of the document."""
        self.road.publish(parameters={"GREETING": "hello"})
        self.road.publish(OTHER, name="other")
        self.device.cycle()
        self.assertEqual(self.environments(), {HELLO: ["GREETING=hello"], OTHER: []})
        self.assertEqual([self.road.states(item)[-1] for item in (HELLO, OTHER)], ["installed"] * 2)
        status = self.device.status()
        self.assertTrue(status["enrolled"])
        self.assertEqual((status["outbox"], sorted(item["state"] for item in status["deployments"])), (0, ["installed"] * 2))
        self.assertEqual(self.device.plan()[HELLO][0], "keep")

    def test_unchanged(self):
        """C-102, P-16: nothing is written, nothing is started, nothing is reported."""
        self.road.publish()
        self.device.cycle()
        self.device.cycle()
        reported, before = len(self.road.states()), self.snapshot()
        self.engine.forget_calls()
        self.device.cycle()
        self.assertEqual([call[0] for call in self.engine.calls()], ["ps"])
        self.assertEqual((self.snapshot(), len(self.road.states())), (before, reported))
        self.assertEqual(self.device.status()["lastPoll"]["result"], "unchanged")

    def snapshot(self):
        """{path: (inode, size, mtime)} of what the state directory keeps."""
        found = {}
        for folder, _, names in os.walk(self.device.state_dir):
            for name in names:
                facts = os.stat(os.path.join(folder, name))
                found[os.path.join(folder, name)] = facts.st_ino, facts.st_size, facts.st_mtime_ns
        return found

    def test_update(self):
        """C-103: the new revision replaces the old one; a neighbour keeps its container."""
        self.road.publish(parameters={"GREETING": "old"})
        self.road.publish(OTHER, name="other")
        self.device.cycle()
        kept = [container["id"] for container in self.engine.containers().values() if container["labels"]["org.margo.deployment"] == OTHER]
        self.road.publish(parameters={"GREETING": "new"})
        self.assertEqual({key: action for key, (action, _) in self.device.plan().items()}, {HELLO: "update", OTHER: "keep"})
        self.device.cycle()
        self.assertEqual(self.environments()[HELLO], ["GREETING=new"])
        self.assertEqual([c["id"] for c in self.engine.containers().values() if c["labels"]["org.margo.deployment"] == OTHER], kept)
        self.assertEqual(self.road.states()[-1], "installed")

    def test_remove(self):
        """C-113: what the desired state no longer names goes, and is reported as removed once."""
        self.road.publish()
        self.road.publish(OTHER, name="other")
        self.device.cycle()
        self.road.withdraw()
        self.device.cycle()
        self.assertEqual(set(self.environments()), {OTHER})
        self.assertEqual(self.road.states()[-1], "removed")
        self.road.withdraw(OTHER)
        self.device.cycle()
        self.assertEqual((self.engine.containers(), self.road.states(OTHER)[-1]), ({}, "removed"))
        self.device.cycle()
        self.assertEqual(self.device.status()["deployments"], [])

    def test_refuse(self):
        """C-106: what does not verify changes nothing (4), and is taken once it does."""
        self.road.publish(parameters={"GREETING": "old"})
        self.device.cycle()
        accepted = self.device.state()["accepted"]
        self.road.publish(parameters={"GREETING": "new"})
        self.road.spoil()
        self.device.cycle(4)
        self.assertEqual((self.environments(), self.device.state()["accepted"]), ({HELLO: ["GREETING=old"]}, accepted))
        self.road.mend()
        self.forget_patience()
        self.device.cycle()
        self.assertEqual(self.environments(), {HELLO: ["GREETING=new"]})

    def test_one_bad_document(self):
        """Contract, exit codes: a deployment that cannot be fails alone (1), and says why."""
        self.road.publish(OTHER, name="other")
        self.road.publish(components=(("missing", "1.0.0"),))
        self.device.cycle(1)
        self.assertEqual(set(self.environments()), {OTHER})
        self.assertEqual((self.road.states()[-1], self.road.states(OTHER)[-1]), ("failed", "installed"))

    def test_offline(self):
        """C-232, P-1: after a reboot with nobody to ask, the last accepted state is brought up (3)."""
        self.road.publish(parameters={"GREETING": "hello"})
        self.device.cycle()
        self.road.stop()
        with self.engine.open() as held:
            held["containers"] = {}
        self.device.cycle(3)
        self.assertEqual(self.environments(), {HELLO: ["GREETING=hello"]})
        self.assertEqual(self.device.status()["lastPoll"]["result"], "unreachable")

    def test_kill(self):
        """Contract, Files: a run that ends at any instant leaves a state from which the next one converges."""
        moments = (lambda: os.path.exists(os.path.join(self.device.state_dir, "state.json")), self.engine.calls, self.engine.containers,
                   self.road.states)
        for number, moment in enumerate(moments):
            deployment_id = HELLO[:-2] + f"{number:02d}"
            self.engine.forget_calls()
            with self.subTest(number):
                self.road.publish(deployment_id, name=f"app-{number}")
                process = subprocess.Popen(self.device.command("run", "--once"), env=self.device.env, stderr=subprocess.DEVNULL)
                with contextlib.suppress(AssertionError):               # a moment that is over already does as well
                    support.wait_for(lambda: process.poll() is not None or moment())
                support.end(process)
                self.forget_patience() if self.device.state() else None
                self.device.cycle()
                self.assertEqual(len(self.environments()), number + 1)
                self.assertEqual(self.road.states(deployment_id)[-1], "installed")
        self.assertEqual(len(self.engine.containers()), len(moments))

    def test_unenroll_and_enroll_again(self):
        """C-052: the relationship is forgotten, the workloads run on, and a new beginning takes them over."""
        self.road.publish()
        self.device.cycle()
        before = self.engine.containers()
        done = self.device.run("unenroll")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertFalse(self.device.status()["enrolled"])
        done = self.device.run("enroll")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.device.cycle()
        self.assertEqual(self.engine.containers(), before)

    def test_doctor(self):
        done = self.device.run("enroll")
        self.assertEqual(done.returncode, 0, done.stderr)
        done = self.device.run("doctor")
        self.assertEqual(done.returncode, 0, done.stdout)
        self.assertNotIn("FAIL", done.stdout)


for profile in ROADS:
    name = "".join(part.title() for part in profile.split("-"))
    globals()[name] = type(name, (Scenarios, unittest.TestCase), {"profile": profile, "__doc__": f"The scenarios by profile {profile}."})
del profile, name


if __name__ == "__main__":
    unittest.main()
