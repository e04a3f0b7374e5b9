"""Two agents on one engine: whose a workload is, and that nobody else's is ever touched (contract, On the engine)."""
import json
import os
import re
import shutil
import subprocess
import unittest

import margo_agent
from tests import support
from tests.support import DEVICE, HELLO, IMAGE, WFM_ID

SECOND = "00000000-0000-4000-8000-000000000002"
THIRD = "00000000-0000-4000-8000-000000000003"
OWNER = f"{WFM_ID}/client/{DEVICE}#{DEVICE}"
NAME = f"web-{HELLO}-main-1"


def make_config(profile="mtls", url="https://wfm.example", device=DEVICE, **sections):
    """Settings of a profile, without files that are not needed."""
    identity = dict({"certificate": "/c", "key": "/k", "trust_bundle": "/b", "ca": "/ca"}, **sections.pop("identity", {}))
    document = {"wfm": {"profile": profile, "url": url}, "identity": identity, "device": {"id": device}}
    return margo_agent.make_config(dict(document, **sections), "/", {})


def make_owner(config):
    """The owner's text of a configuration, as the agent finds it."""
    return margo_agent.make_owner(margo_agent.PROFILES[config.wfm.profile](config, None, None).identify(), config.device.id)


class Texts(unittest.TestCase):
    """What an owner's text is made of: what is configured, and neither state nor network."""

    def test_a_repository_is_named_without_any_login(self):
        texts = [make_owner(make_config("git", url, git={"branch": branch, "path": path})) for url, branch, path in (
            ("https://git.example/fleet.git", "main", ""), ("https://git.example/fleet.git", "main", "cells/4"),
            ("ssh://git@git.example:22/fleet.git", "stable", ""))]
        self.assertEqual(texts, [f"https://git.example/fleet.git#main:#{DEVICE}", f"https://git.example/fleet.git#main:cells/4#{DEVICE}",
                                 f"ssh://git.example:22/fleet.git#stable:#{DEVICE}"])
        self.assertEqual(margo_agent.make_owner("https://me:s3c@ret@git.example/x@y", "gw"), "https://git.example/x@y#gw")

    def test_a_certificate_is_asked_for_its_name_even_once_it_has_expired(self):
        pki = support.Pki(self)
        certificate, key = pki.issue("old", [f"{WFM_ID}/client/old"], start="-9d", end="-2d")
        config = make_config(identity={"certificate": certificate, "key": key})
        self.assertEqual(make_owner(config), f"{WFM_ID}/client/old#{DEVICE}")
        self.assertNotEqual(make_owner(config), make_owner(make_config(device="other", identity=config.identity)))

    def test_a_key_that_signs_is_named_by_its_digest_and_its_wfm(self):
        pki = support.Pki(self)
        texts = set()
        for name, url in (("client", "https://one.example"), ("client", "https://two.example"), ("again", "https://one.example")):
            if name == "again":
                pki.issue(name)
            identity = {"certificate": pki.path(f"{name}.pem"), "key": pki.path(f"{name}.key")}
            texts.add(make_owner(make_config("signed", url, identity=identity)))
        self.assertEqual(len(texts), 3)
        for text in texts:
            self.assertRegex(text, rf"\Ahttps://(one|two)\.example/?#sha256:[0-9a-f]{{64}}#{DEVICE}\Z")

    def test_kubernetes_has_room_for_it(self):
        values = {margo_agent.make_owner_value(text) for text in (OWNER, OWNER + "x", "é" * 300)}
        self.assertEqual(len(values), 3)
        for value in values:
            self.assertRegex(value, r"\A[A-Za-z0-9]{1,63}\Z")


class Pair:
    """A second agent, with an identity and a state directory of its own, and another WFM or the same one."""

    def make_second(self, wfm, client="second"):
        certificate, key = self.pki.issue(client, [f"{WFM_ID}/client/{client}"])
        device = support.Device(self, self.pki, wfm, self.engine, {
            "identity.certificate": certificate, "identity.key": key, "device.id": client, "runtime.settle": "0s"})
        return device

    def publish(self, wfm, deployment_id, client=None, tag="1.0.0", device=DEVICE, **members):
        """A deployment of the package `web`, for one client of a WFM or for all."""
        text = support.make_deployment(deployment_id, components=(("web", tag),), registry=wfm.registry, device=device, **members)
        if client:
            support.write(wfm.path("deployments", client, f"{deployment_id}.yaml"), text)
        else:
            wfm.publish(text, deployment_id)

    def others(self, device):
        """What `plan`, `status` and `doctor` name: [(owner, deployment id, name)], which has to be the same."""
        plan, status = (json.loads(device.run(command, "--json").stdout)["others"] for command in ("plan", "status"))
        self.assertEqual(plan, status)
        doctor, texts = device.run("doctor").stdout, device.run("plan").stdout + device.run("status").stdout
        for item in plan:
            words = f"{item['deploymentId']}  {item['name']} of {item['owner'] or 'no owner that is known'}"
            self.assertIn(words, doctor)
            self.assertEqual(texts.count(words + "; it is left alone"), 2)
        self.assertEqual(bool(plan), " are left alone: " in doctor)
        return [(item["owner"], item["deploymentId"], item["name"]) for item in plan]


class Labels(Pair, support.DeviceCase):
    """Whatever labels say, on an engine of files."""

    def install(self):
        self.publish(self.wfm, HELLO)
        self.device.cycle()
        return self.engine.containers()[NAME]

    def copy(self, name, remove=(), **labels):
        """A container beside ours, with its labels but for some."""
        with self.engine.open() as held:
            container = next(iter(held["containers"].values()))
            labels = {f"org.margo.{key}": value for key, value in labels.items()}
            labels = {key: value for key, value in dict(container["labels"], **labels).items() if key not in remove}
            held["containers"][name] = dict(container, id=name * 4, labels=labels, argv=[])        # in no network of ours

    def change(self, **labels):
        """Ours with other labels; None: without."""
        with self.engine.open() as held:
            found = held["containers"][NAME]["labels"]
            found.update({f"org.margo.{key}": value for key, value in labels.items()})
            held["containers"][NAME]["labels"] = {key: value for key, value in found.items() if value is not None}

    def lose_state(self):
        shutil.rmtree(self.device.state_dir)

    def test_everything_that_is_made_says_whose_it_is(self):
        self.wfm.add_package(support.make_compose({"main": {"image": IMAGE, "volumes": ["data:/d"]}}, volumes={"data": None}))
        container = self.install()
        self.assertEqual(container["labels"]["org.margo.owner"], OWNER)
        with self.engine.open() as held:
            for kind in ("networks", "volumes"):
                for name, labels in held[kind].items():
                    self.assertIn(f"org.margo.owner={OWNER}", labels, name)
        self.assertEqual(self.device.state()["owners"], [OWNER])

    def test_an_unchanged_poll_beside_another_agent_writes_nothing(self):
        """P-16: what `status` names of others is kept in memory."""
        self.install()
        self.copy("theirs", owner="spiffe://x/y#z", deployment=SECOND)
        path = os.path.join(self.device.state_dir, "state.json")
        before = os.stat(path).st_mtime_ns
        self.engine.forget_calls()
        self.device.cycle()
        self.assertEqual([call[0] for call in self.engine.calls()], ["ps"])
        self.assertEqual(os.stat(path).st_mtime_ns, before)
        self.assertEqual(self.others(self.device), [("spiffe://x/y#z", SECOND, "theirs")])

    def test_after_the_state_was_lost_our_own_are_taken_on_and_nothing_else_is_removed(self):
        before = self.install()
        self.copy("orphan", deployment=SECOND)
        self.copy("theirs", deployment=THIRD, owner="stranger")
        self.copy("older", deployment=THIRD, remove=["org.margo.owner"])
        self.lose_state()
        self.device.cycle()
        self.assertEqual(set(self.engine.containers()), {NAME, "theirs", "older"})
        self.assertEqual(self.engine.containers()[NAME], before)
        self.assertEqual(self.others(self.device), [("stranger", THIRD, "theirs"), ("", THIRD, "older")])

    def test_a_container_of_an_older_agent_is_ours_while_its_deployment_is(self):
        before = self.install()
        for lost in (False, True):
            self.change(owner=None)
            if lost:
                self.lose_state()
            self.assertNotIn("drift", self.device.cycle())
            self.assertEqual(self.engine.containers()[NAME]["id"], before["id"])
        self.wfm.withdraw()
        self.device.cycle()
        self.assertEqual(self.engine.containers(), {})

    def test_without_state_and_unwanted_a_container_of_an_older_agent_is_nobody_s(self):
        self.install()
        self.change(owner=None)
        self.wfm.withdraw()
        self.lose_state()
        self.device.cycle()
        self.assertEqual(set(self.engine.containers()), {NAME})

    def test_a_forged_label_of_ours_makes_an_orphan_and_one_that_is_no_id_makes_nothing(self):
        before = self.install()
        self.copy("forged", deployment=SECOND)
        self.copy("odd", deployment="/etc")
        self.device.cycle()
        self.assertEqual(set(self.engine.containers()), {NAME, "odd"})
        self.assertEqual(self.engine.containers()[NAME], before)

    def test_a_stranger_with_our_deployment_s_id_is_neither_removed_nor_taken_for_ours(self):
        before = self.install()
        self.copy("theirs", owner="stranger")
        self.assertNotIn("drift", self.device.cycle())
        self.assertEqual(self.engine.containers()[NAME], before)
        self.wfm.withdraw()
        self.device.cycle()
        self.assertEqual(set(self.engine.containers()), {"theirs"})

    def test_our_own_that_is_made_to_look_like_a_stranger_s_is_known_by_its_id(self):
        before = self.install()
        self.change(owner="stranger")
        self.assertNotIn("drift", self.device.cycle())
        self.assertEqual(self.engine.containers()[NAME]["id"], before["id"])
        self.wfm.withdraw()
        self.device.cycle()
        self.assertEqual(self.engine.containers(), {})

    def test_a_name_that_a_stranger_holds_fails_the_deployment_and_nothing_is_touched(self):
        self.install()
        self.change(owner="stranger")
        self.lose_state()
        before = self.engine.containers()
        self.assertIn("NAME_TAKEN", self.device.cycle(1))
        (component,) = self.device.status()["deployments"][0]["components"]
        self.assertIn(f"container {NAME} belongs to another agent, stranger", component["error"]["message"])
        self.assertEqual(self.engine.containers(), before)
        with self.engine.open() as held:
            del held["containers"][NAME]
        self.device.run("retry")
        self.device.cycle()
        self.assertEqual(self.engine.containers()[NAME]["labels"]["org.margo.owner"], OWNER)

    def test_another_device_id_makes_another_owner_that_still_knows_its_own(self):
        before = self.install()
        self.device.set("device.id", "press-7")
        self.publish(self.wfm, HELLO, device="press-7", parameters={"GREETING": "x"})
        self.device.cycle()
        after = self.engine.containers()
        self.assertEqual(set(after), {NAME})
        self.assertNotEqual(after[NAME]["id"], before["id"])
        self.assertEqual(after[NAME]["labels"]["org.margo.owner"], OWNER.replace(f"#{DEVICE}", "#press-7"))
        self.assertEqual(self.device.state()["owners"], [OWNER, OWNER.replace(f"#{DEVICE}", "#press-7")])

    def test_what_an_earlier_identity_made_is_removed_and_not_what_that_identity_makes_now(self):
        """Its old name may be another agent's by now: only what the state tells of is ours by it."""
        self.install()
        self.device.set("device.id", "press-7")
        self.copy("theirs-now", deployment=SECOND)
        self.wfm.withdraw()
        self.device.cycle()
        self.assertEqual(set(self.engine.containers()), {"theirs-now"})

    def test_a_deployment_that_was_left_running_is_removed_under_another_wfm(self):
        self.install()
        self.copy("theirs", owner="stranger", deployment=SECOND)
        self.assertEqual(self.device.run("unenroll").returncode, 0)
        certificate, key = self.pki.issue("new", [f"{WFM_ID}/client/new"])
        self.device.settings["identity"].update(certificate=certificate, key=key)
        self.device.save()
        self.wfm.withdraw()
        self.device.cycle()
        self.assertEqual(set(self.engine.containers()), {"theirs"})
        with self.engine.open() as held:
            self.assertEqual(held["networks"], {})

    def test_without_its_certificate_an_agent_still_mends_its_own(self):
        self.install()
        os.remove(self.device.settings["identity"]["certificate"])
        with self.engine.open() as held:
            held["containers"][NAME]["state"] = "exited"
        self.copy("theirs", owner="stranger", deployment=SECOND)
        self.assertIn("drift", self.device.cycle(5))
        self.assertEqual({name: item["state"] for name, item in self.engine.containers().items()}, {NAME: "running", "theirs": "exited"})

    def test_purge_leaves_strangers_alone(self):
        self.install()
        self.copy("theirs", owner="stranger")
        self.assertEqual(self.device.run("unenroll", "--purge").returncode, 0)
        self.assertEqual(set(self.engine.containers()), {"theirs"})

    def test_the_lock_s_message_does_not_advise_what_does_harm(self):
        store = margo_agent.Store(self.device.state_dir)
        store.create()
        store.lock()
        self.addCleanup(store.unlock)
        done = self.device.run("run", "--once")
        self.assertEqual(done.returncode, 6)
        self.assertIn("Never run a second one beside it with the same identity", done.stderr)
        self.assertNotIn("use another state_dir", done.stderr)

    def test_two_agents_of_one_wfm_that_want_the_same_names_do_not_fight(self):
        second = self.make_second(self.wfm)
        self.publish(self.wfm, HELLO)
        self.publish(self.wfm, HELLO, "second", device="second")
        self.device.cycle()
        before = self.engine.containers()
        for _ in range(2):
            second.cycle(1)
            second.run("retry")
            self.device.cycle()
            self.assertEqual(self.engine.containers(), before)
        os.remove(self.wfm.path("deployments", "second", f"{HELLO}.yaml"))
        second.cycle()
        self.assertEqual(self.engine.containers(), before)


class Beside(Pair, support.EngineCase):
    """The lives of two agents side by side, on a real engine."""

    def setUp(self):
        super().setUp()
        self.other = support.Wfm(self, self.pki)
        self.second = self.make_second(self.other)
        for wfm in (self.wfm, self.other):
            self.add_package(wfm, "1.0.0")

    def add_package(self, wfm, tag):
        service = {"image": IMAGE, "init": True, "command": ["sleep", "100000"], "volumes": ["data:/d"], "environment": [f"TAG={tag}"]}
        wfm.add_package(support.make_compose({"main": service}, volumes={"data": None}), tag=tag)

    def look(self, deployment_id):
        """What there is of a deployment: containers with their states, networks and volumes."""
        containers = {name: item for name, item in self.engine.containers().items() if deployment_id in name}
        shared = [name for kind in ("network", "volume") for name in self.engine.podman(kind, "ls", "--format={{.Name}}").split()]
        return containers, sorted(name for name in shared if deployment_id in name)

    def test_each_lives_its_life_and_never_sees_the_other_s_harmed(self):
        self.publish(self.wfm, HELLO)
        self.publish(self.other, SECOND, device="second")
        processes = [subprocess.Popen(device.command("run", "--once"), env=device.env, stderr=subprocess.PIPE, universal_newlines=True)
                     for device in (self.device, self.second)]              # at the same moment
        for process in processes:
            _, words = process.communicate(timeout=120)
            self.assertEqual(process.returncode, 0, words)
        first, second = self.look(HELLO), self.look(SECOND)
        self.assertEqual([len(part) for part in first + second], [1, 2, 1, 2])
        for kind, name in (("network", f"web-{HELLO}_default"), ("volume", f"web-{HELLO}_data")):
            self.assertIn(OWNER, self.engine.podman(kind, "inspect", name))
        for device in (self.device, self.second, self.device):
            device.cycle()
        self.assertEqual((self.look(HELLO), self.look(SECOND)), (first, second))
        theirs = OWNER.replace(DEVICE, "second")
        self.assertEqual(self.others(self.device), [(theirs, SECOND, f"web-{SECOND}-main-1")])
        self.assertEqual(self.others(self.second), [(OWNER, HELLO, NAME)])

        self.add_package(self.other, "2.0.0")
        self.publish(self.other, SECOND, tag="2.0.0", device="second")
        self.second.cycle()
        self.assertNotEqual(self.look(SECOND)[0], second[0])
        second = self.look(SECOND)
        self.device.cycle()
        self.assertEqual((self.look(HELLO), self.look(SECOND)), (first, second))

        shutil.rmtree(self.device.state_dir)        # and a deployment was withdrawn meanwhile
        self.wfm.withdraw()
        self.publish(self.wfm, THIRD)
        self.device.cycle()
        self.assertEqual((self.look(HELLO)[0], self.look(SECOND)), ({}, second))
        self.assertEqual(len(self.look(THIRD)[0]), 1)

        os.remove(self.other.path("deployments", f"{SECOND}.yaml"))
        third = self.look(THIRD)
        self.second.cycle()
        self.assertEqual((self.look(SECOND), self.look(THIRD)), (({}, [f"web-{SECOND}_data"]), third))

    def test_after_the_state_was_lost_no_container_is_made_anew(self):
        self.publish(self.wfm, HELLO)
        self.device.cycle()
        before = self.look(HELLO)
        shutil.rmtree(self.device.state_dir)
        self.device.cycle()
        self.assertEqual(self.look(HELLO), before)
        self.assertEqual(self.wfm.statuses()[-1], "installed")

    def test_forged_labels_both_ways(self):
        self.publish(self.wfm, HELLO)
        self.device.cycle()
        before = self.look(HELLO)
        for name, deployment_id, owner in (("orphan", SECOND, OWNER), ("odd", "x", OWNER), ("theirs", HELLO, "stranger")):
            self.engine.podman("run", "--detach", "--net=none", f"--name={name}", f"--label=org.margo.deployment={deployment_id}",
                               f"--label=org.margo.owner={owner}", IMAGE, "sleep", "100000")
        self.assertNotIn("drift", self.device.cycle())
        self.assertEqual(set(self.engine.containers()), {NAME, "odd", "theirs"})
        self.assertEqual(self.look(HELLO), before)

    def test_networks_and_volumes_of_a_stranger_are_not_joined(self):
        self.publish(self.wfm, HELLO)
        for kind, name in (("network", f"web-{HELLO}_default"), ("volume", f"web-{HELLO}_data")):
            self.engine.podman(kind, "create", "--label=org.margo.owner=stranger", name)
            self.assertIn("NAME_TAKEN", self.device.cycle(1))
            (component,) = self.device.status()["deployments"][0]["components"]
            self.assertIn(f"{kind} {name} belongs to another agent, stranger", component["error"]["message"])
            self.assertEqual(self.engine.containers(), {})
            self.engine.podman(kind, "rm", name)
            self.device.run("retry")
        self.device.cycle()

    def test_two_of_one_wfm_at_the_same_moment_end_with_one_holder_of_each_name(self):
        second = self.make_second(self.wfm, "third")
        self.publish(self.wfm, HELLO)
        self.publish(self.wfm, HELLO, "third", device="third")
        processes = [subprocess.Popen(device.command("run", "--once"), env=device.env, stderr=subprocess.PIPE, universal_newlines=True)
                     for device in (self.device, second)]
        ended = [(process.communicate(timeout=120)[1], process.returncode) for process in processes]
        codes = [code for _, code in ended]
        for device, code in zip((self.device, second), codes):
            if code:
                device.run("retry")
        codes = [device.run("run", "--once").returncode for device in (self.device, second)]
        self.assertEqual(sorted(codes), [0, 1], ended)
        (container,) = self.engine.containers().values()
        self.assertEqual(container[1], "running")
        for device, code in zip((self.device, second), codes):
            if code:
                device.run("retry")
            self.assertEqual(device.run("run", "--once").returncode, code)
        self.assertEqual(list(self.engine.containers().values()), [container])


class Examples(Pair, support.EngineCase):
    """The examples on a machine in use: its engine is as it was before."""

    def list_all(self):
        kinds = (("ps", "--all", "--no-trunc"), ("network", "ls"), ("volume", "ls"), ("images", "--no-trunc"))
        return [sorted(self.engine.podman(*kind, "--format={{.ID}}" if kind[0] in ("ps", "images") else "--format={{.Name}}").split())
                for kind in kinds]

    def try_example(self, *command):
        support.require("netavark")
        self.publish(self.wfm, HELLO)
        self.wfm.add_package(support.make_compose({"main": {"image": IMAGE, "init": True, "command": ["sleep", "100000"],
                                                            "volumes": ["data:/d"]}}, volumes={"data": None}))
        self.device.cycle()
        before, containers = self.list_all(), self.engine.containers()
        folder = support.make_folder(self)
        done = subprocess.run(["sh", os.path.join(support.EXAMPLES, command[0]), *command[1:]], stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, universal_newlines=True, timeout=300,
                              env=dict(os.environ, TMPDIR=folder, **self.engine.env))
        self.assertEqual(done.returncode, 0, done.stdout)
        self.assertIn("nothing is left behind", done.stdout)
        self.assertNotIn("\33", done.stdout)       # a pipe is no terminal
        self.assertEqual((self.list_all(), self.engine.containers()), (before, containers))
        self.assertEqual(os.listdir(folder), [])
        with open("/proc/mounts") as file:
            self.assertNotIn(folder, file.read())
        self.device.cycle()
        self.assertEqual(self.engine.containers(), containers)
        return done.stdout

    def test_the_quickstart_beside_an_agent_at_work(self):
        output = self.try_example("quickstart.sh", "--no-install")
        self.assertTrue(re.search("removed; web removed", output))

    def test_the_fleet_of_two_devices_beside_an_agent_at_work(self):
        support.require("git")
        self.try_example("gitfleet.sh")


if __name__ == "__main__":
    unittest.main()
