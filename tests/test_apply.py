"""Apply: what is done to the engine and in which order, by the agent as a process on an engine of files."""
import errno
import json
import os
import shutil
import time
import unittest
from unittest import mock

import margo_agent
from tests import support
from tests.support import HELLO, IMAGE

SECOND = HELLO[:-1] + "1"


def service(**members):
    return dict({"image": IMAGE, "command": ["sleep", "1000"], "environment": ["GREETING"]}, **members)


class ApplyCase(unittest.TestCase):
    def setUp(self):
        self.pki = support.Pki(self)
        self.wfm = support.Wfm(self, self.pki)
        self.engine = support.FakeEngine(self)
        self.device = support.Device(self, self.pki, self.wfm, self.engine)

    def publish(self, greeting="one", components=(("web", "1.0.0"),), deployment_id=HELLO, **options):
        self.wfm.publish(support.make_deployment(deployment_id, components=components, registry=self.wfm.registry,
                                                 parameters={"GREETING": greeting}, **options), deployment_id)

    def commands(self, *verbs):
        """The engine's commands of these kinds since the last look, as (verb, last operand)."""
        calls = [(call[0], call[-1]) for call in self.engine.calls() if call[0] in verbs]
        self.engine.forget_calls()
        return calls

    def environments(self):
        return {name: container["env"] for name, container in self.engine.containers().items()}

    def state_of(self, deployment_id=HELLO):
        return self.device.state()["deployments"][deployment_id]

    def try_again_now(self):
        self.device.run("retry")


class Install(ApplyCase):
    def test_components_are_installed_in_order_and_removed_in_reverse(self):
        """C-113, C-130, C-150, D-27: and every change is reported in a true order."""
        for name in ("db", "web"):
            self.wfm.add_package(support.make_compose(), name)
        self.publish(components=(("db", "1.0.0"), ("web", "1.0.0")))
        self.device.cycle()
        names = {container["id"]: name for name, container in self.engine.containers().items()}
        self.assertEqual([names[container_id].split("-")[0] for _, container_id in self.commands("start")], ["db", "web"])
        reported = [[entry["state"] for entry in item["body"]["components"]] for item in self.wfm.reports()]
        self.assertEqual(reported, [["pending", "pending"], ["installing", "pending"], ["installed", "pending"], ["installed", "installing"],
                                    ["installed", "installed"]])
        self.wfm.withdraw()
        self.device.cycle()
        self.assertEqual([len(call) for call in self.commands("rm")], [2, 2])
        reported = [[entry["state"] for entry in item["body"]["components"]] for item in self.wfm.reports()[5:]]
        self.assertEqual(reported, [["removing", "removing"], ["removing", "removed"], ["removed", "removed"]])
        self.assertEqual((self.engine.containers(), self.device.state()["deployments"]), ({}, {}))

    def test_images_are_pulled_before_the_old_container_stops(self):
        """D-11, P-20: and with a pull that fails the old version goes on running."""
        self.wfm.add_package(support.make_compose())
        self.publish()
        self.device.cycle()
        before = self.engine.containers()
        self.wfm.add_package(support.make_compose({"main": service(image="localhost/new:2")}), tag="2.0.0")
        self.publish(components=(("web", "2.0.0"),))
        self.engine.change(unpullable=["localhost/new:2"])
        self.engine.forget_calls()
        self.assertIn("PULL_FAILED", self.device.cycle(1))
        self.assertEqual(self.commands("stop", "rm", "create"), [])
        self.assertEqual(self.engine.containers(), before)
        self.engine.change(unpullable=[])
        self.try_again_now()
        self.engine.forget_calls()
        self.device.cycle()
        verbs = [verb for verb, _ in self.commands("pull", "stop", "create", "start")]
        self.assertEqual(verbs, ["pull", "create", "create", "stop", "start"])         # the first is tried only

    def test_a_present_image_is_never_pulled_again(self):
        """P-1"""
        self.wfm.add_package(support.make_compose())
        self.publish()
        self.device.cycle()
        self.assertEqual(self.commands("pull"), [])

    def test_an_unchanged_service_keeps_its_container(self):
        """P-16: only what changed is made anew."""
        compose = {"api": service(), "cache": service(environment={})}
        self.wfm.add_package(support.make_compose(compose))
        self.publish()
        self.device.cycle()
        ids = {name: container["id"] for name, container in self.engine.containers().items()}
        self.publish("two")
        self.device.cycle()
        changed = {name for name, container in self.engine.containers().items() if container["id"] != ids[name]}
        self.assertEqual(changed, {f"web-{HELLO}-api-1"})
        self.assertEqual(self.environments()[f"web-{HELLO}-api-1"], ["GREETING=two"])

    def test_an_image_comes_from_the_mirror_of_its_registry_and_goes_by_its_own_name(self):
        """F-31: as packages do; what the mirror lacks is asked of the registry itself."""
        self.wfm.add_package(support.make_compose({"main": service(image="plant.example/app:1")}))
        self.publish()
        self.engine.change(unpullable=["plant.example/app:1"])
        self.device.settings["registries"]["plant.example"] = {"mirror": "mirror.example"}
        self.device.save()
        self.device.cycle()
        self.assertEqual([call[-1] for call in self.engine.calls() if call[0] == "pull"], ["mirror.example/app:1"])
        self.assertEqual(self.engine.containers()[f"web-{HELLO}-main-1"]["image"], "plant.example/app:1")
        self.engine.change(unpullable=["mirror.example/app:2"])
        self.wfm.add_package(support.make_compose({"main": service(image="plant.example/app:2")}), tag="2.0.0")
        self.publish("two", (("web", "2.0.0"),))
        self.assertIn("the mirror does not serve it; the registry itself is asked", self.device.cycle())

    def test_no_value_of_a_parameter_stands_on_a_command_line_or_in_the_log(self):
        """D-35"""
        self.wfm.add_package(support.make_compose({"main": service(image="localhost/none:1")}))
        self.publish("s3cret-value")
        self.engine.change(unpullable=["localhost/none:1"])
        log = self.device.run("-v", "run", "--once").stderr
        self.engine.change(unpullable=[], exits={"main": 3})
        self.try_again_now()
        log += self.device.run("-v", "run", "--once").stderr
        self.assertIn("exited with code 3", log)
        self.assertIn("last words", log)
        for text in (log, str(self.engine.calls()), str(self.wfm.lines("statuses.jsonl")), self.device.run("status").stdout):
            self.assertNotIn("s3cret-value", text)

    def test_runtime_environment_reaches_every_container(self):
        """C-185: and a change of it replaces the containers it concerns."""
        self.wfm.add_package(support.make_compose())
        self.publish()
        self.device.set("runtime.environment", {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://10.0.0.1:4318"})
        self.device.cycle()
        self.assertIn("OTEL_EXPORTER_OTLP_ENDPOINT=http://10.0.0.1:4318", self.environments()[f"web-{HELLO}-main-1"])
        self.device.set("runtime.environment", {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://10.0.0.2:4318"})
        self.assertIn("runtime.environment has changed", self.device.cycle())
        self.assertIn("OTEL_EXPORTER_OTLP_ENDPOINT=http://10.0.0.2:4318", self.environments()[f"web-{HELLO}-main-1"])
        self.commands("create")
        self.device.cycle()
        self.assertEqual(self.commands("create", "stop", "rm"), [])

    def test_volumes_survive_updates_and_removal(self):
        """D-10: no update, no removal ever removes one."""
        self.wfm.add_package(support.make_compose({"main": service(volumes=["data:/data"])}, volumes={"data": None}))
        self.publish()
        self.device.cycle()
        self.publish("two")
        self.device.cycle()
        self.wfm.withdraw()
        self.device.cycle()
        self.assertFalse([call for call in self.engine.calls() if call[:2] == ["volume", "rm"] or "--volumes" in call])
        self.assertEqual(len([call for call in self.engine.calls() if call[:2] == ["volume", "create"]]), 1)

    def test_what_is_removed_after_the_state_was_lost_is_reported_with_its_components(self):
        """C-131, F-32: a WFM that knows the components refuses a report without them for good."""
        for name in ("db", "web"):
            self.wfm.add_package(support.make_compose(), name)
        self.publish(components=(("db", "1.0.0"), ("web", "1.0.0")))
        self.device.cycle()
        shutil.rmtree(self.device.state_dir)
        self.wfm.withdraw()
        self.assertNotIn("refuses a status", self.device.cycle())
        self.assertEqual(self.engine.containers(), {})
        report = self.wfm.reports()[-1]["body"]
        self.assertEqual(report["status"]["state"], "removed")
        self.assertEqual([(item["name"], item["state"]) for item in report["components"]],
                         [("db", "removed"), ("web", "removed")])

    def test_a_component_that_is_dropped_is_torn_down(self):
        """D-19"""
        for name in ("db", "web"):
            self.wfm.add_package(support.make_compose(), name)
        self.publish(components=(("db", "1.0.0"), ("web", "1.0.0")))
        self.device.cycle()
        self.publish(components=(("web", "1.0.0"),))
        self.device.cycle()
        self.assertEqual(list(self.engine.containers()), [f"web-{HELLO}-main-1"])

    def test_only_one_deployment_fails_and_the_others_proceed(self):
        self.wfm.add_package(support.make_compose())
        self.publish(components=(("missing", "1.0.0"),))
        self.publish(deployment_id=SECOND)
        log = self.device.cycle(1)
        self.assertIn("PULL_FAILED", log)
        self.assertEqual((self.wfm.statuses()[-1], self.wfm.statuses(SECOND)[-1]), ("failed", "installed"))


class Failure(ApplyCase):
    def test_a_service_that_exits_fails_at_once_with_its_last_words(self):
        """C-164, D-12, P-6"""
        self.wfm.add_package(support.make_compose())
        self.publish()
        self.engine.change(exits={"main": 7})
        self.device.cycle(1)
        error = self.wfm.reports()[-1]["body"]["components"][0]["error"]
        self.assertEqual((error["code"], error["source"]), ("INSTALL_FAILED", "web"))
        for words in ("service main exited with code 7", "last words"):
            self.assertIn(words, error["message"])

    def test_a_one_shot_that_ends_well_is_done_and_not_run_again(self):
        """P-17"""
        self.wfm.add_package(support.make_compose({"migrate": service(), "main": service(depends_on={
            "migrate": {"condition": "service_completed_successfully"}})}))
        self.publish()
        self.engine.change(exits={"migrate": 0})
        self.device.cycle()
        self.commands("start")
        self.device.cycle()
        self.assertEqual(self.commands("start"), [])
        self.assertEqual(self.wfm.statuses()[-1], "installed")

    def test_a_health_check_that_never_passes_times_out(self):
        """C-152, C-163, C-165"""
        check = {"test": ["CMD", "true"], "interval": "100s", "retries": 3}
        self.wfm.add_package(support.make_compose({"main": service(healthcheck=check)}))
        self.publish(timeout="0m1s")
        self.engine.change(unhealthy=["main"])
        self.device.cycle(1)
        error = self.wfm.reports()[-1]["body"]["components"][0]["error"]
        self.assertEqual(error["code"], "INSTALL_TIMEOUT")
        self.assertIn("main is not healthy yet", error["message"])

    def test_a_first_installation_that_fails_is_taken_back(self):
        """P-6: nothing is left to crash on and on, of no component; volumes stay, and the next attempt begins anew."""
        for name in ("db", "web"):
            self.wfm.add_package(support.make_compose({name: service(volumes=["data:/data"])}, volumes={"data": None}), name)
        self.publish(components=(("db", "1.0.0"), ("web", "1.0.0")))
        self.engine.change(exits={"web": 7})
        self.device.cycle(1)
        self.assertEqual(self.engine.containers(), {})
        with self.engine.open() as held:
            self.assertEqual(len(held["volumes"]), 2)
        report = self.wfm.reports()[-1]["body"]
        self.assertEqual([entry["state"] for entry in report["components"]], ["pending", "failed"])
        self.assertIn("taken back", report["components"][1]["error"]["message"])
        self.engine.change(exits={})
        self.try_again_now()
        self.device.cycle(0)
        self.assertEqual(len(self.engine.containers()), 2)

    def test_what_ran_before_the_state_was_lost_runs_again_where_another_revision_fails(self):
        """P-8, P-13: a state that was lost is no reason to take down what worked, however often the new one is tried."""
        self.wfm.add_package(support.make_compose())
        self.publish()
        self.device.cycle()
        before = {item["id"] for item in self.engine.containers().values()}
        for name in ("state.json", "state.json.old"):
            os.remove(os.path.join(self.device.state_dir, name))
        self.wfm.add_package(support.make_compose({"main": service(), "broken": service()}), "web", "2.0.0")
        self.publish("two", (("web", "2.0.0"),))
        self.engine.change(exits={"broken": 7})
        for _ in range(2):
            self.device.cycle(1)
            self.assertEqual({(item["id"], item["state"]) for item in self.engine.containers().values()},
                             {(found, "running") for found in before})
            self.assertIn("what ran before runs again", self.wfm.reports()[-1]["body"]["status"]["error"]["message"])
            self.try_again_now()
        self.engine.change(exits={})
        self.device.cycle(0)
        self.assertEqual(len(self.engine.containers()), 2)

    def test_what_ran_before_the_state_was_lost_keeps_its_files_until_its_package_is_had_again(self):
        """P-13: housekeeping knows nothing of them; the container may be started again at any moment."""
        self.wfm.add_package(support.make_compose({"main": {"image": support.IMAGE, "volumes": ["./a.ini:/app.ini"]}}), **{"a.ini": "1"})
        self.wfm.add_package(support.make_compose(), "other")
        self.publish()
        self.device.cycle()
        for name in ("state.json", "state.json.old"):
            os.remove(os.path.join(self.device.state_dir, name))
        os.rename(self.wfm.path("packages", "web"), self.wfm.path("packages", "away"))
        self.publish(components=(("other", "1.0.0"),), deployment_id="a" + HELLO[1:])
        self.device.cycle(1)
        (path,) = [item[len("--volume="):].partition(":")[0] for container in self.engine.containers().values()
                   for item in container["argv"] if item.startswith("--volume=")]
        self.assertTrue(os.path.isfile(path))
        os.rename(self.wfm.path("packages", "away"), self.wfm.path("packages", "web"))
        self.try_again_now()
        self.device.cycle()
        self.publish("two", components=(("other", "1.0.0"),))       # which mounts nothing
        self.device.cycle()
        self.publish("three", components=(("other", "1.0.0"),))
        self.device.cycle()
        self.assertFalse(os.path.exists(path))

    def test_a_first_installation_that_fails_is_kept_where_that_is_wished(self):
        self.wfm.add_package(support.make_compose())
        self.device.set("runtime.on_failure", "keep")
        self.publish()
        self.engine.change(exits={"main": 7})
        self.device.cycle(1)
        self.assertEqual(self.engine.containers()[f"web-{HELLO}-main-1"]["state"], "exited")

    def test_a_container_that_cannot_be_made_costs_no_running_one(self):
        """P-20: and no roll-back has to bring it back: it is the same container."""
        self.wfm.add_package(support.make_compose())
        self.publish()
        self.device.cycle()
        before = self.engine.containers()
        self.publish("two")
        self.engine.change(uncreatable=True)
        self.device.cycle(1)
        self.assertEqual(self.engine.containers(), before)
        self.assertIn("the version before runs again", self.wfm.reports()[-1]["body"]["components"][0]["error"]["message"])

    def test_what_runs_keeps_its_files_of_a_package_where_the_same_with_other_parameters_fails(self):
        """Its container may be started again at any moment, and an engine would even make an empty folder in the place of a lost file."""
        service = {"image": "${PICTURE}", "volumes": ["./${SITE}.ini:/app.ini"]}
        self.wfm.add_package(support.make_compose({"main": service}), **{"a.ini": "\"a\"", "b.ini": "\"b\""})

        def publish(site, image):
            self.wfm.publish(support.make_deployment(registry=self.wfm.registry, parameters={"SITE": site, "PICTURE": image}))
        publish("a", support.IMAGE)
        self.device.cycle()
        self.engine.change(unpullable=["localhost/absent:1"])
        publish("b", "localhost/absent:1")
        self.device.cycle(1)
        (container,) = self.engine.containers().values()
        (mount,) = [item for item in container["argv"] if item.startswith("--volume=")]
        self.assertEqual(support.read_json(mount[len("--volume="):].partition(":")[0], "gone"), "a")

    def test_an_update_that_was_cut_off_between_two_commands_goes_on(self):
        """P-11, P-13: whatever names and containers it left."""
        self.wfm.add_package(support.make_compose())
        name = f"web-{HELLO}-main-1"
        for greeting, cut in (("a", "rename"), ("b", "stop"), ("c", "start"), ("d", "rm")):
            self.engine.change(lethal="")
            self.publish("good " + greeting)
            self.device.cycle()
            self.publish(greeting)
            self.engine.change(lethal=cut)
            self.device.run("run", "--once")
            self.engine.change(lethal="")
            self.try_again_now()
            self.device.cycle()
            self.assertEqual(self.environments(), {name: [f"GREETING={greeting}"]}, cut)

    def test_parameters_for_nobody_cycles_and_denied_wishes_fail_alone(self):
        """Issue, Bad input: each a clear failure of that deployment; the others proceed."""
        self.wfm.add_package(support.make_compose())
        self.wfm.add_package(support.make_compose({"a": service(depends_on=["b"]), "b": service(depends_on=["a"])}), "cycle")
        self.wfm.add_package(support.make_compose({"main": service(privileged=True)}), "denied")
        ids = {word: HELLO[:-1] + str(number) for number, word in enumerate(("nobody", "cycle", "denied", "fold", "good"))}
        document = json.loads(support.make_deployment(ids["nobody"], registry=self.wfm.registry, parameters={"GREETING": "x"}))
        document["spec"]["parameters"]["greeting"]["targets"][0]["components"] = ["elsewhere"]
        self.wfm.publish(json.dumps(document), ids["nobody"])
        for word in ("cycle", "denied"):
            self.publish(deployment_id=ids[word], components=((word, "1.0.0"),))
        document = json.loads(support.make_deployment(ids["fold"], registry=self.wfm.registry, parameters={"GREETING": "x"}))
        document["spec"]["parameters"]["other"] = {"value": "y", "targets": [{"pointer": "Greeting", "components": ["web"]}]}
        self.wfm.publish(json.dumps(document), ids["fold"])
        self.publish(deployment_id=ids["good"])
        self.device.cycle(1)
        for word, code, text in (("nobody", "INVALID_DEPLOYMENT", "'elsewhere' is not among the components web"), ("cycle", "INVALID_DEPLOYMENT", "depends_on"),
                                 ("denied", "POLICY_DENIED", "privileged"), ("fold", "PARAMETER_INVALID", "differ only in case")):
            error = self.wfm.reports(ids[word])[-1]["body"]["components"][0]["error"]
            self.assertEqual(error["code"], code)
            self.assertIn(text, error["message"])
        self.assertEqual(self.wfm.statuses(ids["good"])[-1], "installed")

    def test_without_wait_a_start_is_enough(self):
        """C-151"""
        check = {"test": ["CMD", "true"], "interval": "100s"}
        self.wfm.add_package(support.make_compose({"main": service(healthcheck=check)}))
        self.publish(wait=False)
        self.engine.change(unhealthy=["main"])
        self.device.cycle(0)

    def test_a_failed_deployment_waits_for_its_time_and_retry_ends_the_wait(self):
        """D-13, P-15"""
        self.wfm.add_package(support.make_compose())
        self.publish()
        self.engine.change(exits={"main": 7})
        self.device.cycle(1)
        self.commands("create")
        self.device.cycle(1)
        self.assertEqual(self.commands("create"), [])
        record = self.state_of()
        self.assertGreater(record["retry"]["at"] + record["retry"]["delay"], time.time())
        self.engine.change(exits={})
        self.assertIn("1 failed", self.device.run("retry", HELLO).stdout)
        self.device.cycle(0)
        self.assertEqual(self.wfm.statuses()[-1], "installed")

    def fail_removal(self):
        """Installs a deployment whose removal then fails."""
        self.wfm.add_package(support.make_compose())
        self.publish()
        self.device.cycle()
        self.wfm.withdraw()
        self.engine.change(stubborn=True)
        self.device.cycle(1)

    def test_a_removal_that_fails_is_not_reported_as_removed(self):
        """D-21, P-11"""
        self.fail_removal()
        self.assertEqual(self.wfm.statuses()[-2:], ["removing", "failed"])
        self.assertIn("busy", self.wfm.reports()[-1]["body"]["status"]["error"]["message"])
        self.engine.change(stubborn=False)
        self.device.run("retry")
        self.device.cycle(0)
        self.assertEqual((self.wfm.statuses()[-1], self.engine.containers()), ("removed", {}))

    def test_a_removal_that_fails_waits_before_it_is_tried_again(self):
        """Contract, Failure: next attempts after 30 s, doubling; `status`, `plan` and `retry` know it, `unenroll --purge` does not wait."""
        self.fail_removal()
        self.engine.forget_calls()
        self.device.cycle(1)
        self.assertEqual([call[0] for call in self.engine.calls()], ["ps"])
        self.assertEqual(self.device.plan()[HELLO][0], "keep")
        self.assertIn("cannot be removed (REMOVE_FAILED); next attempt at", self.device.plan()[HELLO][1])
        self.engine.change(stubborn=False)
        self.assertIn("unenrolled", self.device.run("unenroll", "--purge").stdout)
        self.assertEqual(self.engine.containers(), {})

    def test_what_is_wanted_again_after_its_removal_failed_is_there_at_once(self):
        """Contract, Failure: attempts wait until the digest changes; a removal was never an attempt at it."""
        self.fail_removal()
        self.engine.change(stubborn=False)
        self.publish()
        self.device.cycle(0)
        self.assertEqual([container["state"] for container in self.engine.containers().values()], ["running"])
        self.engine.change(stubborn=True)
        self.device.run("unenroll", "--purge")                          # and nothing new was accepted
        self.device.cycle(0)
        self.assertEqual(self.wfm.statuses()[-1], "installed")

    def test_an_engine_that_does_not_answer_changes_nothing_and_loses_nothing(self):
        """D-16, D-30"""
        self.wfm.add_package(support.make_compose())
        self.publish()
        self.device.cycle()
        self.wfm.withdraw()
        self.publish(deployment_id=SECOND)
        self.engine.change(deaf=True)
        self.assertIn("does not answer", self.device.cycle(1))
        self.assertEqual(self.wfm.statuses(), ["pending", "installing", "installed"])
        self.engine.change(deaf=False)
        self.device.cycle(0)
        self.assertEqual((self.wfm.statuses()[-1], self.wfm.statuses(SECOND)[-1]), ("removed", "installed"))


class Disk(ApplyCase):
    """P-4: a disk that denies one deployment something is no fault of the others."""

    def setUp(self):
        super().setUp()
        self.wfm.add_package(support.make_compose())

    def test_what_cannot_be_written_fails_its_own_deployment_alone(self):
        place = os.path.join(self.device.state_dir, "deployments", HELLO)
        support.write(place, "")
        self.publish()
        self.publish(deployment_id=SECOND)
        self.device.cycle(1)
        error = self.state_of()["error"]
        self.assertEqual((error["code"], self.wfm.statuses(SECOND)[-1]), ("INSTALL_FAILED", "installed"))
        self.assertIn(place, error["message"])
        os.remove(place)
        self.try_again_now()
        self.device.cycle(0)

    def test_what_cannot_be_removed_keeps_nothing_else_from_being_done(self):
        """Neither the folder of what is withdrawn, nor what is left of an earlier run."""
        self.publish()
        self.device.cycle()
        left = os.path.join(self.device.state_dir, "deployments", "left.tmp")
        os.mkdir(left)
        self.wfm.withdraw()
        self.publish(deployment_id=SECOND)
        remove = shutil.rmtree

        def deny(path, *args, **options):
            if path == left or HELLO in path:
                raise OSError(errno.EIO, os.strerror(errno.EIO), path)
            remove(path, *args, **options)

        config = margo_agent.load_config(self.device.config_file)
        with mock.patch.dict(os.environ, self.engine.env), mock.patch("shutil.rmtree", deny):
            outcome = margo_agent.Agent(config).cycle()
        self.assertEqual((outcome.code, self.wfm.statuses()[-1]), (3, "failed"))
        self.assertEqual(self.wfm.statuses(SECOND)[-1], "installed")
        self.try_again_now()
        self.device.cycle(0)
        self.assertEqual((self.wfm.statuses()[-1], os.path.exists(left)), ("removed", False))


class RollBack(ApplyCase):
    def setUp(self):
        super().setUp()
        for name in ("db", "web"):
            self.wfm.add_package(support.make_compose(), name)
            self.wfm.add_package(support.make_compose({"main": service(), "broken": service()}), name, "2.0.0")
        self.publish(components=(("db", "1.0.0"), ("web", "1.0.0")))
        self.device.cycle()
        self.engine.change(exits={"broken": 1})
        self.publish("two", components=(("db", "1.0.0"), ("web", "2.0.0")))

    def test_a_failed_update_goes_back_as_a_whole_and_says_both(self):
        """P-8: the first component too, and the error tells what runs."""
        self.assertIn("rolled back", self.device.cycle(1))
        self.assertEqual(self.environments(), {f"db-{HELLO}-main-1": ["GREETING=one"], f"web-{HELLO}-main-1": ["GREETING=one"]})
        report = self.wfm.reports()[-1]["body"]
        self.assertEqual([entry["state"] for entry in report["components"]], ["installed", "failed"])
        for words in ("broken exited with code 1", "the version before runs again"):
            self.assertIn(words, report["components"][1]["error"]["message"])
        self.assertEqual(self.device.plan()[HELLO][0], "keep")

    def test_the_way_back_needs_no_network(self):
        """P-1: what a roll-back needs is on the device."""
        self.wfm.fault({"path": "/v2/*/manifests/1.0.0", "status": 404})
        self.device.cycle(1)
        self.assertEqual(set(self.environments()), {f"db-{HELLO}-main-1", f"web-{HELLO}-main-1"})

    def test_the_version_before_is_kept_running_while_the_new_one_waits(self):
        """P-1, P-12: after a reboot without network, with the new one failed or not even fetched; the error stays as it is."""
        self.device.cycle(1)
        error = self.state_of()["error"]
        for _ in range(2):
            with self.engine.open() as held:
                for container in held["containers"].values():
                    container["state"] = "exited"
            self.wfm.stop()
            self.device.cycle(3)
            self.assertEqual({name: item["state"] for name, item in self.engine.containers().items()},
                             {f"db-{HELLO}-main-1": "running", f"web-{HELLO}-main-1": "running"})
            self.assertEqual((self.state_of()["state"], self.state_of()["error"]), ("failed", error))
        self.assertEqual(self.environments()[f"web-{HELLO}-main-1"], ["GREETING=one"])

    def test_a_version_that_cannot_be_fetched_does_not_leave_the_old_one_down(self):
        self.wfm.fault({"path": "/v2/*", "status": 404})
        self.device.cycle(1)
        with self.engine.open() as held:
            held["containers"][f"web-{HELLO}-main-1"]["state"] = "exited"
        self.device.cycle(1)
        self.assertEqual(self.engine.containers()[f"web-{HELLO}-main-1"]["state"], "running")

    def test_what_a_failed_version_fetched_is_there_for_its_next_attempt(self):
        """P-15: nothing is fetched again at each attempt; with another revision it goes (P-5)."""
        self.wfm.add_package(support.make_compose({"broken": service(image="localhost/app:3")}), "web", "3.0.0")
        self.publish("three", components=(("db", "1.0.0"), ("web", "3.0.0")))
        self.device.cycle(1)
        self.try_again_now()
        self.device.cycle(1)
        self.assertEqual(self.commands("pull"), [("pull", "localhost/app:3")])
        blobs = [path for _, path, _ in self.wfm.requests("registry") if "/blobs/" in path]
        self.assertEqual(len(blobs), len(set(blobs)))
        self.publish("four", components=(("db", "1.0.0"), ("web", "1.0.0")))
        self.device.cycle(0)
        with self.engine.open() as held:
            self.assertNotIn("localhost/app:3", held["images"])

    def test_keep_leaves_the_new_version_for_inspection(self):
        self.device.set("runtime.on_failure", "keep")
        self.device.cycle(1)
        self.assertEqual(self.environments()[f"web-{HELLO}-main-1"], ["GREETING=two"])
        self.assertNotIn("version before", self.wfm.reports()[-1]["body"]["components"][1]["error"]["message"])

    def test_a_good_version_after_a_failed_one_is_installed(self):
        self.device.cycle(1)
        self.publish("three", components=(("db", "1.0.0"), ("web", "1.0.0")))
        self.device.cycle(0)
        self.assertEqual(self.environments(), {f"db-{HELLO}-main-1": ["GREETING=three"], f"web-{HELLO}-main-1": ["GREETING=three"]})


class Drift(ApplyCase):
    def setUp(self):
        super().setUp()
        self.wfm.add_package(support.make_compose())
        self.publish()
        self.device.cycle()
        self.name = f"web-{HELLO}-main-1"

    def test_what_stopped_is_started_and_what_is_gone_is_made_without_a_network(self):
        """D-23, D-24, D-29, P-1, P-12: from the last accepted state, before and without any answer of the WFM."""
        self.wfm.stop()
        for change in ("exited", None):
            with self.engine.open() as held:
                if change:
                    held["containers"][self.name]["state"] = change
                else:
                    del held["containers"][self.name]
            self.device.cycle(3)
            self.assertEqual(self.engine.containers()[self.name]["state"], "running")

    def test_a_repair_that_does_not_last_ends_as_a_failure(self):
        """P-6, P-7, D-35: the WFM hears that the deployment failed, and the container's last words, instead of an endless row of successes;
        `retry` begins anew.
        """
        self.publish("s3cret-value")
        self.device.cycle()
        for count in range(6):
            with self.engine.open() as held:
                held["containers"][self.name]["state"] = "exited"
            self.device.cycle(0 if count < 5 else 1)
        error = self.wfm.reports()[-1]["body"]["components"][0]["error"]
        self.assertEqual(error["code"], "UNSTABLE")
        self.assertRegex(error["message"], r"(?s)web/main is exited although it was repaired 5 times.*log ends: first line.*GREETING=\*\*\*.*last words\Z")
        self.assertNotIn("s3cret-value", str(self.wfm.lines("statuses.jsonl")))
        self.assertEqual(self.device.plan()[HELLO][0], "keep")
        self.commands("start")
        self.device.cycle(1)
        self.assertEqual(self.commands("start"), [])
        self.try_again_now()
        self.device.cycle(0)
        self.assertEqual(self.engine.containers()[self.name]["state"], "running")

    def test_a_log_that_cannot_be_had_or_masked_holds_no_failure_up(self):
        """P-6, D-35: the engine has none, or the document that says what is secret is gone: the failure is told without it."""
        for damage in (lambda: self.engine.change(logless=True), lambda: shutil.rmtree(os.path.join(self.device.state_dir, "artifacts"))):
            state = self.device.state()
            state["deployments"][HELLO].update(repair={"failures": 5, "at": time.time(), "delay": 30})
            support.write(os.path.join(self.device.state_dir, "state.json"), json.dumps(state), 0o600)
            with self.engine.open() as held:
                held["containers"][self.name]["state"] = "exited"
            damage()
            self.device.cycle(1)
            error = self.wfm.reports()[-1]["body"]["components"][0]["error"]
            self.assertEqual(error["code"], "UNSTABLE")
            self.assertNotIn("log ends", error["message"])
            self.engine.change(logless=False)
            self.try_again_now()
            self.device.run("run", "--once")

    def test_what_got_unwell_is_made_anew(self):
        """Issue, Drift: unhealthy behind the agent's back, as the engine shows it."""
        with self.engine.open() as held:
            held["containers"][self.name]["shown"] = {"Status": "Up 2 hours (unhealthy)"}
            old = held["containers"][self.name]["id"]
        self.assertIn("web/main is unhealthy", self.device.cycle())
        self.assertNotEqual(self.engine.containers()[self.name]["id"], old)

    def test_where_nobody_runs_health_checks_one_is_run_a_cycle(self):
        """One command more, however many there are, so that what gets unwell is seen; the plan and a deaf engine run none."""
        with self.engine.open() as held:
            held["containers"][self.name]["shown"] = {"Status": "Up 2 hours (healthy)"}
        self.device.run("plan")
        self.assertEqual(self.commands("healthcheck"), [])
        self.device.cycle()
        expected = [] if os.path.isdir("/run/systemd/system") else [("healthcheck", self.engine.containers()[self.name]["id"])]
        self.assertEqual(self.commands("healthcheck"), expected)

    def test_a_repair_takes_the_image_that_is_here_whatever_the_pull_policy(self):
        """P-1: after a reboot without network; another revision does ask."""
        self.wfm.add_package(support.make_compose({"main": service(pull_policy="always")}), tag="2.0.0")
        self.publish(components=(("web", "2.0.0"),))
        self.device.cycle()
        self.engine.change(unpullable=[IMAGE])
        with self.engine.open() as held:
            held["containers"][self.name]["state"] = "exited"
        self.assertIn("the image that is here is used", self.device.cycle())
        self.assertEqual(self.engine.containers()[self.name]["state"], "running")
        self.wfm.add_package(support.make_compose({"main": service(pull_policy="always", command=["sleep", "1"])}), tag="3.0.0")
        self.publish(components=(("web", "3.0.0"),))
        self.assertIn("PULL_FAILED", self.device.cycle(1))

    def test_what_is_not_ours_is_left_alone(self):
        """D-22: a name alone makes nothing ours."""
        with self.engine.open() as held:
            held["containers"][f"web-{SECOND}-main-1"] = dict(held["containers"][self.name], id="f" * 64, labels={}, argv=[])
        self.wfm.withdraw()
        self.device.cycle()
        self.assertEqual(list(self.engine.containers()), [f"web-{SECOND}-main-1"])

    def test_a_container_of_a_deployment_that_nobody_knows_is_removed(self):
        """P-11"""
        with self.engine.open() as held:
            labels = dict(held["containers"][self.name]["labels"], **{"org.margo.deployment": SECOND})
            held["containers"]["stray"] = dict(held["containers"][self.name], id="e" * 64, labels=labels, state="created")
        self.device.cycle()
        self.assertEqual(list(self.engine.containers()), [self.name])


class Downtime(ApplyCase):
    """Protocol 10: nothing is fetched in it, and what is here runs all the same."""

    def setUp(self):
        super().setUp()
        self.wfm.add_package(support.make_compose())
        self.publish()
        self.device.cycle()
        self.before = self.engine.containers()

    def check_before_runs(self):
        self.device.set("poll.downtime", ["00:00-24:00"])
        for _ in range(2):
            self.device.cycle()
            found = {name: (item["state"], item["env"]) for name, item in self.engine.containers().items()}
            self.assertEqual(found, {name: ("running", item["env"]) for name, item in self.before.items()})
        self.device.set("poll.downtime", [])
        self.device.cycle()
        self.assertEqual([item["env"] for item in self.engine.containers().values()], [["GREETING=two"]])
        self.assertEqual(self.state_of()["state"], "installed")

    def test_an_update_that_was_cut_off_gives_way_to_the_version_before(self):
        self.publish("two")
        self.engine.change(lethal="start")
        self.device.run("run", "--once")
        self.assertIn("exited", [item["state"] for item in self.engine.containers().values()])
        self.engine.change(lethal=None)
        self.check_before_runs()

    def test_what_runs_is_repaired_although_its_update_waits(self):
        self.publish("two")
        with mock.patch.dict(os.environ, self.engine.env):
            margo_agent.Agent(margo_agent.load_config(self.device.config_file), lambda: True).cycle()
        with self.engine.open() as held:
            for item in held["containers"].values():
                item["state"] = "exited"
        self.check_before_runs()


class NoDriver(ApplyCase):
    def test_what_nothing_can_remove_any_more_is_not_said_to_be_removed(self):
        """D-21: the engine was uninstalled, or switched off, and what it runs may run still."""
        self.wfm.add_package(support.make_compose())
        self.publish()
        self.device.cycle()
        self.wfm.withdraw()
        self.device.set("runtime.compose", "off")
        self.assertIn("UNSUPPORTED_TYPE", json.dumps(self.device.cycle(1) and self.state_of()))
        self.assertEqual(self.wfm.statuses(HELLO)[-1], "failed")
        self.device.set("runtime.compose", "builtin")
        self.device.run("retry")
        self.device.cycle()
        self.assertEqual((self.wfm.statuses(HELLO)[-1], self.engine.containers()), ("removed", {}))

    def test_what_never_ran_is_removed_without_a_driver(self):
        self.device.set("runtime.compose", "off")
        self.wfm.add_package(support.make_compose())
        self.publish()
        self.device.cycle(1)
        self.wfm.withdraw()
        self.device.cycle()
        self.assertEqual(self.wfm.statuses(HELLO)[-1], "removed")


class Ports(ApplyCase):
    """F-28: a host's port that one deployment gives up and another takes, in one manifest, whatever the order in it."""

    NAMES = {HELLO: f"web-{HELLO}-main-1", SECOND: f"web-{SECOND}-main-1"}

    def setUp(self):
        super().setUp()
        self.wfm.add_package(support.make_compose({"main": service(ports=["${PORT}:8080"])}))

    def publish_ports(self, **ports):
        """Deployments by name; those that have other parameters than before are new revisions."""
        for name, port in ports.items():
            deployment_id = {"one": HELLO, "two": SECOND}[name]
            self.wfm.publish(support.make_deployment(deployment_id, name, registry=self.wfm.registry, parameters={"PORT": str(port)}),
                             deployment_id)

    def outages(self):
        """[(start or stop, deployment)] since the last look, without what was made and started under another name."""
        ids = {container["id"]: name for seen in (self.known, self.engine.containers()) for name, container in seen.items()}
        found = []
        for verb, operand in self.commands("stop", "start"):
            name = ids.get(operand, operand)
            found.append((verb, next(key for key, item in self.NAMES.items() if name.startswith(item))))
        return found

    def cycle(self, expected=0):
        self.known = self.engine.containers()
        self.commands()
        return self.device.cycle(expected)

    def test_each_gets_the_others_port_with_one_outage(self):
        self.publish_ports(one=7001, two=7002)
        self.cycle()
        for ports in ({"one": 7002, "two": 7001}, {"one": 7001, "two": 7002}):
            self.publish_ports(**ports)
            self.assertNotIn("error", self.cycle())
            self.assertEqual(self.outages(), [("stop", SECOND), ("stop", HELLO), ("start", HELLO), ("start", SECOND)])
        self.assertEqual([self.wfm.statuses(key)[-4:] for key in (HELLO, SECOND)], [["installed", "pending", "installing", "installed"]] * 2)
        self.assertEqual({key: item[0] for key, item in self.device.plan().items()}, {HELLO: "keep", SECOND: "keep"})

    def test_who_gives_it_up_goes_first(self):
        self.publish_ports(one=7001, two=7002)
        self.cycle()
        for ports, first, second in (({"one": 7002, "two": 7003}, SECOND, HELLO), ({"one": 7004, "two": 7002}, HELLO, SECOND)):
            self.publish_ports(**ports)
            self.assertNotIn("error", self.cycle())
            self.assertEqual(self.outages(), [("stop", first), ("start", first), ("stop", second), ("start", second)])

    def test_a_new_deployment_takes_what_an_update_or_a_removal_frees(self):
        self.publish_ports(two=7001)
        self.cycle()
        self.publish_ports(one=7001, two=7002)
        self.assertNotIn("error", self.cycle())
        self.assertEqual(self.outages(), [("stop", SECOND), ("start", SECOND), ("start", HELLO)])
        self.wfm.withdraw(HELLO)
        self.publish_ports(two=7001)
        self.assertNotIn("error", self.cycle())

    def test_one_that_its_holder_keeps_is_PORT_IN_USE_and_nobody_is_touched(self):
        """Whether it is new or runs; with the holder's id, at the component and above, and the next attempt comes as after any failure."""
        self.publish_ports(one=7001)
        self.cycle()
        self.publish_ports(two=7001)
        self.cycle(1)
        error = self.wfm.reports(SECOND)[-1]["body"]["status"]["error"]
        self.assertEqual((error["code"], self.outages()), ("PORT_IN_USE", []))
        self.assertIn(f"7001/tcp is held by deployment {HELLO}", error["message"])
        self.assertEqual(list(self.engine.containers()), [self.NAMES[HELLO]])
        self.publish_ports(two=7002)
        self.cycle(0)
        before = self.engine.containers()
        self.publish_ports(two=7001)
        self.assertNotIn("rolled back", self.cycle(1))
        self.assertEqual((self.outages(), self.engine.containers()), ([], before))
        self.publish_ports(one=7003)
        self.try_again_now()
        self.cycle(0)
        self.assertEqual(self.wfm.statuses(SECOND)[-1], "installed")

    def test_a_circle_in_which_one_fails_leaves_both_as_they_were(self):
        """P-8: the first goes back to its port, and so does the other one, which was stopped for it."""
        self.publish_ports(one=7001, two=7002)
        self.cycle()
        before = {name: item["env"] for name, item in self.engine.containers().items()}
        self.wfm.add_package(support.make_compose({"main": service(ports=["${PORT}:8080"]), "broken": service()}), tag="2.0.0")
        self.wfm.publish(support.make_deployment(HELLO, "one", registry=self.wfm.registry, components=(("web", "2.0.0"),),
                                                 parameters={"PORT": "7002"}), HELLO)
        self.publish_ports(two=7001)
        self.engine.change(exits={"broken": 3})
        self.cycle(1)
        self.assertEqual({name: item["env"] for name, item in self.engine.containers().items()}, before)
        self.assertEqual({item["state"] for item in self.engine.containers().values()}, {"running"})
        self.assertEqual(self.wfm.reports(SECOND)[-1]["body"]["status"]["error"]["code"], "PORT_IN_USE")
        self.assertEqual({key: item[0] for key, item in self.device.plan().items()}, {HELLO: "keep", SECOND: "keep"})

    def test_what_waits_for_a_port_is_tried_again_with_whatever_changes(self):
        """The members of a circle in which one has failed would never be due at one time; nor is a port that gets free left for an hour."""
        self.publish_ports(one=7001, two=7002)
        self.cycle()
        self.publish_ports(one=7002, two=7001)
        self.engine.change(exits={"main": 3})
        self.cycle(1)
        self.engine.change(exits={})
        self.assertEqual(self.state_of(SECOND)["error"]["code"], "PORT_IN_USE")
        self.device.run("retry", HELLO)
        self.assertNotIn("error", self.cycle())
        third = HELLO[:-1] + "2"
        self.wfm.publish(support.make_deployment(third, "three", registry=self.wfm.registry,
                                                 parameters={"PORT": "7001"}), third)
        self.cycle(1)
        self.wfm.withdraw(SECOND)
        self.cycle(0)

    def test_what_has_only_freed_its_ports_runs_again_although_a_failed_update_is_kept(self):
        """P-8: on_failure keep is for what failed, not for what stood aside."""
        self.device.set("runtime.on_failure", "keep")
        self.publish_ports(one=7001, two=7002)
        self.cycle()
        before = self.engine.containers()[self.NAMES[SECOND]]
        two = {"main": service(ports=["${PORT}:8080"]), "broken": service()}
        self.wfm.add_package(support.make_compose(two), tag="2.0.0")
        self.wfm.publish(support.make_deployment(
            HELLO, "one", registry=self.wfm.registry, components=(("web", "2.0.0"),),
            parameters={"PORT": "7002"}), HELLO)
        self.publish_ports(two=7001)
        self.engine.change(exits={"broken": 3})
        self.cycle(1)
        self.assertIn(("stop", before["id"]), self.commands("stop"))
        after = self.engine.containers()[self.NAMES[SECOND]]
        self.assertEqual((after["id"], after["state"]), (before["id"], "running"))

    def test_a_circle_that_was_begun_is_ended_before_the_process_is(self):
        """What was stopped for another deployment is not left to the next start of the agent."""
        self.publish_ports(one=7001, two=7002)
        self.cycle()
        before = self.engine.containers()[self.NAMES[SECOND]]
        self.publish_ports(one=7002, two=7001)

        def stopping():
            return "exited" in {item["state"] for item in self.engine.containers().values()}

        with mock.patch.dict(os.environ, self.engine.env):
            config = margo_agent.load_config(self.device.config_file)
            margo_agent.Agent(config, stopping).cycle()
        self.assertIn(("stop", before["id"]), self.commands("stop"))
        found = self.engine.containers().values()
        self.assertEqual({item["state"] for item in found}, {"running"})


class Prune(ApplyCase):
    def test_what_neither_the_current_nor_the_previous_version_needs_goes(self):
        """P-4, P-5: images that the agent pulled, and artifacts; nothing else."""
        with self.engine.open() as held:
            held["images"].append("localhost/not-ours:1")
        for version in range(1, 5):
            self.wfm.add_package(support.make_compose({"main": service(image=f"localhost/app:{version}")}), tag=f"{version}.0.0")
            self.publish(components=(("web", f"{version}.0.0"),))
            self.device.cycle()
        with self.engine.open() as held:
            self.assertEqual(sorted(held["images"]), ["localhost/app:3", "localhost/app:4", IMAGE, "localhost/not-ours:1"])
        self.assertEqual(len(os.listdir(os.path.join(self.device.state_dir, "artifacts"))), 4)
        self.assertEqual(len([name for name in os.listdir(os.path.join(self.device.state_dir, "deployments", HELLO, "web"))
                              if len(name) == 16]), 2)
        self.wfm.withdraw()
        self.device.cycle()
        with self.engine.open() as held:
            self.assertEqual(sorted(held["images"]), [IMAGE, "localhost/not-ours:1"])
        self.assertEqual(os.listdir(os.path.join(self.device.state_dir, "artifacts")), [])

    def test_an_image_whose_removal_hangs_keeps_nothing_from_being_done(self):
        self.device.set("runtime.prune", False)
        for version in ("1", "2", "3"):
            compose = support.make_compose({"main": service(image=f"localhost/app:{version}")})
            self.wfm.add_package(compose, tag=f"{version}.0.0")
            self.publish(components=(("web", f"{version}.0.0"),))
            self.device.cycle()
        self.device.set("runtime.prune", True)
        self.wfm.withdraw()
        self.wfm.add_package(support.make_compose())
        self.publish(deployment_id=SECOND)
        hangs = mock.Mock(side_effect=margo_agent.CommandTimeout("podman image did not end within 600 s"))
        config = margo_agent.load_config(self.device.config_file)
        with mock.patch.dict(os.environ, self.engine.env), mock.patch("margo_agent.ComposeDriver.remove_image", hangs):
            outcome = margo_agent.Agent(config).cycle()
        self.assertEqual((outcome.code, self.wfm.statuses(HELLO)[-1]), (1, "removed"))
        self.assertEqual(self.wfm.statuses(SECOND)[-1], "installed")

    def test_without_prune_everything_stays(self):
        self.device.set("runtime.prune", False)
        for version in range(1, 5):
            self.wfm.add_package(support.make_compose({"main": service(image=f"localhost/app:{version}")}), tag=f"{version}.0.0")
            self.publish(components=(("web", f"{version}.0.0"),))
            self.device.cycle()
        with self.engine.open() as held:
            self.assertEqual(len(held["images"]), 5)


class Guard(ApplyCase):
    """A deployment that runs, and no removal that is not confirmed."""

    def setUp(self):
        super().setUp()
        self.device.set("policy.max_removals", 0)
        self.wfm.add_package(support.make_compose())
        self.publish()
        self.device.cycle()

    def test_many_removals_wait_for_a_second_poll(self):
        """Contract, Guard: the waiting poll exits 3 and does nothing at all; the next one confirms."""
        self.wfm.withdraw()
        self.assertIn("policy.max_removals is 0", self.device.cycle(3))
        self.assertEqual(len(self.engine.containers()), 1)
        self.assertEqual(self.device.status()["lastPoll"]["result"], "refused")
        self.device.cycle(0)
        self.assertEqual(self.engine.containers(), {})

    def test_what_is_only_on_the_engine_counts_and_waits_too(self):
        """F-32: the state was lost, and a WFM that knows nothing of this device offers an empty manifest; a poll has to confirm it."""
        shutil.rmtree(self.device.state_dir)
        self.wfm.withdraw()
        self.assertIn("would remove 1 deployments", self.device.cycle(3))
        self.wfm.fault({"path": "*/deployments", "status": 503, "headers": {"Retry-After": "0"}})
        self.device.cycle(3)
        self.assertEqual(len(self.engine.containers()), 1)
        self.wfm.fault()
        self.device.run("retry")
        self.device.cycle(0)
        self.assertEqual(self.engine.containers(), {})

    def test_what_is_gone_already_and_only_to_be_reported_is_not_counted_again(self):
        self.wfm.withdraw()
        self.device.cycle(3)
        self.wfm.fault({"method": "POST", "status": 500})
        self.device.cycle(3)
        self.assertEqual((self.engine.containers(), self.state_of()["state"]), ({}, "removed"))
        self.publish(deployment_id=SECOND)
        self.device.cycle(3)
        self.assertEqual(self.state_of(SECOND)["state"], "installed")

    def test_a_wfm_that_thinks_better_of_it_removes_nothing(self):
        self.wfm.withdraw()
        self.device.cycle(3)
        self.publish("two")
        self.device.cycle(0)
        self.assertEqual(len(self.engine.containers()), 1)


if __name__ == "__main__":
    unittest.main()
