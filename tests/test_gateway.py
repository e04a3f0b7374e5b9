"""See-thru gateways, protocol section 9: children, placement, connections, one device after the other.

One agent, one engine of files for itself and one for each child; a connection is an environment, so FAKE_PODMAN in it leads the way.
"""
import json
import os
import signal
import subprocess
import time
import unittest
import unittest.mock

import margo_agent
from tests import support
from tests.support import DEVICE, HELLO, IMAGE

SECOND, THIRD = HELLO[:-1] + "1", HELLO[:-1] + "2"
A, B = f"{DEVICE}/a", f"{DEVICE}/b"
CONTAINER = f"web-{HELLO}-main-1"


def make_child(name, connection, labels=None, memory="512Mi", **members):
    return dict({"id": name, "vendor": "Example Industries", "modelNumber": "C-1", "serialNumber": f"s-{name}", "labels": labels or {},
                 "properties": {"cpus": [{"cores": 2, "architecture": "arm64"}], "memory": memory, "storage": "8Gi"},
                 "connection": connection}, **members)


class FindPlace(unittest.TestCase):
    """Plan: which device a deployment is for."""

    def find(self, wanted, held=None, children=None, unfit=None, loads=None):
        children = {"gw/a": True, "gw/b": True} if children is None else children
        deployment = margo_agent.Deployment(HELLO, "hello", "n", wanted, "compose", [], [], None)
        reasons = {child: (unfit or {}).get(child) for child in children}
        others = [child for child, count in (loads or {}).items() for _ in range(count)]
        return margo_agent.find_place(deployment, held, "gw", children, reasons, others)

    def assertRefused(self, code, words, *args, **options):
        with self.assertRaises(margo_agent.ComponentError) as caught:
            self.find(*args, **options)
        self.assertEqual(caught.exception.code, code)
        self.assertIn(words, caught.exception.message)
        self.assertEqual(caught.exception.source, None if code == "WRONG_DEVICE" else "gw")         # C-138

    def test_a_device_that_is_named_is_the_one(self):
        """Protocol 9: the own id deploys here; a document without one is always local."""
        self.assertEqual([self.find(wanted) for wanted in ("gw", "gw/a", "gw/b", "", None)], ["gw", "gw/a", "gw/b", "gw", "gw"])
        self.assertEqual(self.find("gw/a", held="gw/b", children={"gw/a": False, "gw/b": True}), "gw/a")
        self.assertEqual(self.find("gw/hall/2", children={"gw/hall/2": True}), "gw/hall/2")

    def test_what_is_not_known_is_101(self):
        """C-222: of a gateway only; another gateway's child is a wrong device."""
        self.assertRefused("101", "gw/c is not known; known are gw/a, gw/b", "gw/c")
        self.assertRefused("101", "gw/c", "gw/c/*")
        self.assertRefused("101", "gw/a/x", "gw/a/x")
        for wanted in ("gw2", "gw2/a", "gw2/*", "g", "g/*", "GW/a"):
            self.assertRefused("WRONG_DEVICE", f"{wanted}, this device is gw", wanted)

    def test_one_that_is_no_gateway_knows_no_children(self):
        """C-221, protocol 9: own-id/* is 103 even there, all else is WRONG_DEVICE."""
        self.assertRefused("WRONG_DEVICE", "gw/a, this device is gw", "gw/a", children={})
        self.assertRefused("WRONG_DEVICE", "gw/a/*, this device is gw", "gw/a/*", children={})
        self.assertRefused("103", "no gateway", "gw/*", children={})
        self.assertRefused("103", "gw/a is no gateway", "gw/a/*")

    def test_a_free_choice_falls_on_the_least_loaded_that_fits_and_answers(self):
        self.assertEqual(self.find("gw/*"), "gw/a")
        self.assertEqual(self.find("gw/*", loads={"gw/a": 1}), "gw/b")
        self.assertEqual(self.find("gw/*", loads={"gw/a": 1, "gw/b": 1}), "gw/a")
        self.assertEqual(self.find("gw/*", unfit={"gw/a": "too small"}), "gw/b")
        self.assertEqual(self.find("gw/*", children={"gw/a": False, "gw/b": True}, loads={"gw/b": 9}), "gw/b")

    def test_a_choice_once_made_stays(self):
        """Sticky: neither load nor a dead link moves what has its place; only what no longer fits there goes elsewhere."""
        self.assertEqual(self.find("gw/*", held="gw/b", loads={"gw/b": 9}), "gw/b")
        self.assertEqual(self.find("gw/*", held="gw/b", children={"gw/a": True, "gw/b": False}), "gw/b")
        self.assertEqual(self.find("gw/*", held="gw/b", unfit={"gw/b": "too small"}), "gw/a")
        self.assertEqual(self.find("gw/*", held="gw"), "gw/a")
        self.assertEqual(self.find("gw/*", held="gw/gone"), "gw/a")

    def test_where_nothing_fits_each_child_says_why(self):
        """C-221, C-222: 103 where none fits, 102 where those that fit do not answer."""
        self.assertRefused("103", "gw/a: too small; gw/b: no gpu", "gw/*", unfit={"gw/a": "too small", "gw/b": "no gpu"})
        self.assertRefused("102", "none of the child devices that could take it answers: gw/b", "gw/*", unfit={"gw/a": "too small"},
                           children={"gw/a": True, "gw/b": False})


class Settings(unittest.TestCase):
    """Configuration: `device.children` (contract, Children)."""

    def faults(self, *children, **sections):
        from tests.test_configuration import faults
        return faults(device={"children": list(children)}, **sections)

    def test_a_good_child_is_taken_as_it_is(self):
        from tests.test_configuration import make
        child = make_child("a", {"CONTAINER_HOST": "unix:///run/a.sock"}, {"hall": 4})
        self.assertEqual(make(device={"children": [child]}).device.children, [child])
        self.assertEqual(make(device={"children": None}).device.children, [])

    def test_every_fault_of_every_child_is_named(self):
        words = self.faults({"id": "a b", "vendr": "x", "connection": {"CONTAINERS_HOST": "x"}}, make_child("b", {"DOCKER_HOST": 7}),
                            make_child("b", {"DOCKER_HOST": "7"}), "c", make_child("d", {}, memory="much"), make_child("e", {"DOCKER_HOST": []}))
        for fault in (
                "device.children[0].vendr: unknown key; did you mean device.children[0].vendor?", "device.children[0].id: found 'a b'",
                "device.children[0].vendor: not set", "device.children[0].properties.cpus: not set",
                "device.children[0].connection: names no engine; expected one of CONTAINER_HOST, ", "device.children[2].id: another child has the same",
                "device.children[2].connection: another child has the same", "device.children[3]: found 'c', expected a mapping",
                "device.children[4].properties: found", "memory is a size", "device.children[4].connection: names no engine",
                "device.children[5].connection: found"):
            self.assertIn(fault, words)
        self.assertNotIn("children[1]", words)
        self.assertEqual(words.count("device.children[0].id"), 1)

    def test_the_readmes_example_is_one(self):
        with open(os.path.join(support.EXAMPLES, "gateway", "README.md"), encoding="utf-8") as file:
            text = file.read().split("# A gateway with child devices")[1].split("```yaml\n")[1].split("```")[0]
        from tests.test_configuration import make
        self.assertEqual(make(**margo_agent.load_yaml(text)).device.children[0].id, "press")

    def test_a_protocol_without_child_devices_is_said(self):
        """Protocol 3.5: one document for one client in the earlier generations."""
        config = margo_agent.SCHEMA["wfm"]
        with unittest.mock.patch.dict(config, profile=(margo_agent.read_text, "mtls", ""), dialect=(margo_agent.read_text, "a", "")):
            child = make_child("a", {"DOCKER_HOST": "x"})
            for profile, dialect, fine in (("mtls", "a", True), ("signed", "b", True), ("signed", "a", False), ("git", "a", False)):
                words = self.faults(child, wfm={"url": "https://w", "profile": profile, "dialect": dialect})
                self.assertEqual("knows no child devices" not in words, fine, (profile, words))

    def test_what_is_no_list_is_refused(self):
        from tests.test_configuration import faults
        self.assertIn("device.children: found a mapping, expected a list", faults(device={"children": {}}))


class Connections(unittest.TestCase):
    """Runtimes: how the commands for a child find its engine."""

    CONFIG = None

    def driver(self, connection, others=(), **runtime):
        from tests.test_configuration import make
        folder = support.make_folder(self)
        for name in ("podman", "docker", "docker-compose"):
            support.write(os.path.join(folder, name), "#!/bin/sh\n", 0o755)
        environ = {"PATH": folder, "HOME": folder, "CONTAINER_HOST": "unix:///the/gateways/own.sock", "LANG": "C"}
        return margo_agent.make_compose_driver(make(runtime=runtime), (A, connection), others, environ=environ)

    def test_the_connection_says_which_engine_and_nothing_of_the_gateways_own_leaks_in(self):
        driver = self.driver({"DOCKER_HOST": "ssh://a"})
        self.assertEqual((driver.engine, driver.environ["DOCKER_HOST"], driver.environ.get("CONTAINER_HOST")), ("docker", "ssh://a", None))
        driver = self.driver({"CONTAINERS_STORAGE_CONF": "/a/storage.conf"})
        self.assertEqual((driver.engine, driver.environ.get("CONTAINER_HOST"), driver.environ["LANG"]), ("podman", None, "C"))
        self.assertFalse(driver.remote)
        driver = self.driver({"CONTAINER_HOST": "ssh://a", "DOCKER_HOST": "ssh://a"})
        self.assertEqual((driver.engine, driver.remote), ("podman", True))

    def test_a_child_that_is_a_cluster_has_no_engine_and_the_gateways_is_not_taken_for_it(self):
        self.assertIsNone(self.driver({"KUBECONFIG": "/a/kubeconfig"}))
        from tests.test_configuration import make
        folder = support.make_folder(self)
        support.write(os.path.join(folder, "helm"), "#!/bin/sh\n", 0o755)
        environ = {"PATH": folder, "KUBECONFIG": "/the/gateways/own", "CONTAINER_HOST": "unix:///own"}
        config = make(runtime={"helm": "off", "kubeconfig": "/the/gateways/own"})
        with unittest.mock.patch.dict(os.environ, environ, clear=True):
            driver = margo_agent.make_helm_driver(config, (A, {"KUBECONFIG": "/a/kubeconfig"}))
            self.assertEqual((driver.environ["KUBECONFIG"], "CONTAINER_HOST" in driver.environ), ("/a/kubeconfig", False))
            self.assertIsNone(margo_agent.make_helm_driver(config, (A, {"CONTAINER_HOST": "unix:///a"})))

    def test_what_the_gateway_does_not_host_its_children_may(self):
        """runtime.compose and runtime.engine speak of this device; `off` makes a gateway that hosts nothing itself."""
        driver = self.driver({"CONTAINER_HOST": "ssh://a"}, compose="off", engine="docker")
        self.assertEqual(driver.engine, "podman")

    def test_files_of_the_gateway_are_not_mounted_on_a_child(self):
        """Bad input: a clear failure before anything is fetched or touched, not an empty folder that an engine makes."""
        driver = self.driver({"CONTAINER_HOST": "ssh://a"})
        folder = support.make_folder(self)
        os.mkdir(os.path.join(folder, "data"))
        workload = margo_agent.Workload(HELLO, "web", "p", folder, {}, {}, True)
        for services, members in (({"main": {"image": IMAGE, "volumes": ["./data:/data"]}}, {}),
                                  ({"main": {"image": IMAGE, "volumes": [{"type": "bind", "source": "./data", "target": "/data"}]}}, {}),
                                  ({"main": {"image": IMAGE, "configs": ["c"]}}, {"configs": {"c": {"content": "x"}}})):
            support.write(os.path.join(folder, "compose.yaml"), support.make_compose(services, **members))
            with self.assertRaises(margo_agent.ComponentError) as caught:
                driver.resolve(workload, 10)
            self.assertEqual(caught.exception.code, "INVALID_DEPLOYMENT")
            self.assertIn("services.main: configs, secrets and bind mounts are files of the gateway", caught.exception.message)


class Looks(unittest.TestCase):
    def test_a_child_whose_engine_has_no_command_here_is_one_that_does_not_answer(self):
        """C-222: of whatever type, so that nothing is changed blindfold."""
        silence = margo_agent.ComponentError("102", "it does not answer")
        seen = margo_agent.observe_devices([margo_agent.Device("gw/a", None, {}, silence)], [], margo_agent.NOBODY)
        self.assertEqual(set(seen["gw/a"].silent), {"compose", "helm"})
        self.assertIn("is not installed here", seen["gw/a"].silent["compose"].message)


class GatewayCase(support.DeviceCase):
    settings = {}

    def setUp(self):
        super().setUp()
        self.engines = {DEVICE: self.engine}
        children = []
        for name, labels, memory in (("a", {"hall": 4}, "512Mi"), ("b", {"hall": 5}, "2Gi")):
            engine = self.engines[f"{DEVICE}/{name}"] = support.FakeEngine(self)
            children.append(make_child(name, {"CONTAINER_HOST": f"unix:///{name}", "FAKE_PODMAN": engine.folder}, labels, memory))
        self.device.set("device.children", children)
        for key, value in self.settings.items():
            self.device.set(key, value)

    def publish(self, device, deployment_id=HELLO, constraints=None, greeting="one", **options):
        value = json.loads(support.make_deployment(deployment_id, device=device, registry=self.wfm.registry, parameters={"GREETING": greeting}, **options))
        if constraints:
            value["spec"]["deploymentProfile"]["deviceConstraints"] = constraints
        self.wfm.publish(json.dumps(value), deployment_id)

    def where(self, deployment_id=HELLO):
        """The devices that have a container of a deployment, and what it was given."""
        return {device: container["env"][0].split("=")[1] for device, engine in self.engines.items()
                for container in engine.containers().values() if container["labels"]["org.margo.deployment"] == deployment_id}

    def report(self, deployment_id=HELLO):
        """(deviceId, state, code, source, component's source) as last reported."""
        body = self.wfm.reports(deployment_id)[-1]["body"]
        error, component = body["status"].get("error", {}), body["components"][0].get("error", {})
        return body["deviceId"], body["status"]["state"], error.get("code"), error.get("source"), component.get("source")

    def message(self, deployment_id=HELLO):
        return self.wfm.reports(deployment_id)[-1]["body"]["status"]["error"]["message"]

    def exchanges(self):
        return [(method, path.split("capabilities/")[1]) for method, path, _ in self.wfm.requests() if "/capabilities/" in path]

    def without(self, *names):
        """The children of the configuration without some."""
        self.device.set("device.children", [child for child in self.device.settings["device"]["children"] if child["id"] not in names])

    def written(self):
        """When the state was written last, and as which file."""
        facts = os.stat(os.path.join(self.device.state_dir, "state.json"))
        return facts.st_ino, facts.st_mtime_ns

    def calls(self, engine):
        calls = [call[0] for call in engine.calls()]
        engine.forget_calls()
        return calls


class Reporting(GatewayCase):
    def test_the_gateway_reports_itself_first_and_each_child_once(self):
        """C-220, C-082: again only what changed."""
        for _ in range(2):
            self.device.cycle()
        self.assertEqual(self.exchanges(), [("PUT", DEVICE), ("PUT", A), ("PUT", B)])
        self.device.settings["device"]["children"][1]["labels"] = {"hall": 6}
        self.device.save()
        self.device.cycle()
        self.assertEqual(self.exchanges()[3:], [("PUT", B)])

    def test_a_childs_document_is_what_the_configuration_says(self):
        """C-083, C-086: the full hierarchy is its id; nothing that was detected here is taken for its own."""
        documents = json.loads(self.device.run("capabilities").stdout)
        self.assertEqual([document["properties"]["id"] for document in documents], [DEVICE, A, B])
        self.assertEqual(documents[1], {"labels": {"hall": 4}, "properties": {
            "id": A, "vendor": "Example Industries", "modelNumber": "C-1", "serialNumber": "s-a", "memory": "512Mi", "storage": "8Gi",
            "cpus": [{"cores": 2, "architecture": "arm64"}], "peripherals": [], "interfaces": [], "otelCollector": True,
            "supportedRuntimes": ["oci"], "supportedDeploymentTypes": ["compose"]}})

    def test_a_gateway_that_hosts_nothing_says_nothing_of_hosting(self):
        """C-084: and runs its children all the same."""
        self.device.set("runtime.compose", "off")
        self.device.set("device.properties", {"memory": "4Gi"})
        own = json.loads(self.device.run("capabilities").stdout)[0]
        self.assertEqual(set(own["properties"]), {"id", "vendor", "modelNumber", "serialNumber"})
        self.publish(A)
        self.device.cycle()
        self.assertEqual(self.where(), {A: "one"})
        self.assertEqual(self.engine.calls(), [])
        self.assertIn("they run on child devices", self.device.run("doctor").stdout)

    def test_a_wfm_that_does_not_know_the_gateway_is_told_of_it_again_first(self):
        """Protocol 2.2: 404 gateway-not-found."""
        self.device.cycle()
        self.wfm.fault({"path": f"/api/v1/capabilities/{A}", "problem": "gateway-not-found", "times": 1})
        self.device.settings["device"]["children"][0]["labels"] = {"hall": 9}
        self.device.save()
        self.device.cycle()
        self.assertEqual(self.exchanges()[3:], [("PUT", A), ("PUT", DEVICE), ("PUT", A)])

    def test_a_child_stands_in_the_path_as_the_wfm_knows_it(self):
        """F4: by segments, or as one segment; what worked is tried first from then on, also where it is withdrawn."""
        quoted = {name: f"{DEVICE}%2F{name}" for name in "ab"}
        for form, first, later in (("segment", [A, quoted["a"], quoted["b"]], quoted["b"]), ("segments", [A, B], B)):
            with self.subTest(form), unittest.mock.patch.dict(self.device.env, RUNTIME_DIRECTORY=support.make_folder(self)):
                wfm = support.Wfm(self, self.pki, "--child-path", form)
                self.wfm = wfm
                self.device.settings["state_dir"] = os.path.join(support.make_folder(self), "state")
                self.device.set("wfm.url", wfm.url)
                self.device.cycle()
                self.assertEqual(self.exchanges(), [("PUT", DEVICE)] + [("PUT", path) for path in first])
                held = support.read_json(wfm.path("state", "clients", DEVICE, "capabilities.json"))
                self.assertEqual(set(held), {DEVICE, A, B})
                children = self.device.settings["device"]["children"]
                self.without("b")
                self.device.cycle()
                self.assertEqual(self.exchanges()[len(first) + 1:], [("DELETE", later)])
                self.device.set("device.children", children)

    def test_a_child_that_is_known_by_neither_form_waits_and_holds_nobody_up(self):
        self.wfm.fault({"path": f"*/capabilities/{DEVICE}/a", "status": 404}, {"path": f"*/capabilities/{DEVICE}%2Fa", "status": 404})
        self.publish(B)
        self.device.cycle(3)
        self.assertEqual(self.where(), {B: "one"})
        self.assertIn(f"capabilities {A}", self.device.state()["waits"])

    def test_a_child_that_the_wfm_refuses_holds_nobody_up(self):
        self.wfm.fault({"path": f"/api/v1/capabilities/{A}", "problem": "semantic-error"})
        self.publish(B)
        for _ in range(2):
            log = self.device.cycle()
        self.assertEqual(self.where(), {B: "one"})
        self.assertNotIn("refuses the capabilities", log)
        self.assertEqual(self.exchanges(), [("PUT", DEVICE), ("PUT", A), ("PUT", B)])

    def test_a_child_that_has_gone_is_withdrawn_and_unenroll_withdraws_all(self):
        """C-223: children before their gateway."""
        self.device.cycle()
        self.without("a")
        self.wfm.fault({"method": "DELETE", "status": 302, "times": 1})         # nobody judged that: it is asked for again
        for expected in (3, 0, 0):
            self.device.cycle(expected)
            self.device.run("retry")
        self.assertEqual(self.exchanges()[3:], [("DELETE", A), ("DELETE", A)])
        self.assertEqual(self.device.run("unenroll").returncode, 0)
        self.assertEqual(self.exchanges()[5:], [("DELETE", B), ("DELETE", DEVICE)])


class Alone(support.DeviceCase):
    def test_a_device_without_children_asks_its_one_engine_without_threads(self):
        """P-16: an unchanged poll loads no pool of threads, though helm is installed too."""
        support.write(os.path.join(self.engine.folder, "bin", "helm"), "#!/bin/sh\nexit 1\n", 0o755)
        self.device.set("runtime.kubeconfig", "/nowhere")
        self.wfm.publish(support.make_deployment(registry=self.wfm.registry))
        self.device.cycle()
        self.engine.forget_calls()
        argv = self.device.command("run", "--once")
        done = subprocess.run([argv[0], "-X", "importtime"] + argv[1:], env=self.device.env, stderr=subprocess.PIPE, universal_newlines=True)
        self.assertEqual((done.returncode, [call[0] for call in self.engine.calls()]), (0, ["ps"]))
        self.assertIn("subprocess", done.stderr)
        self.assertNotIn("concurrent", done.stderr)


class Routing(GatewayCase):
    def test_each_deployment_runs_where_it_is_directed(self):
        """C-135: status carries the child's full id from the first word to the last."""
        for device, deployment_id in ((DEVICE, HELLO), (A, SECOND), (B, THIRD)):
            self.publish(device, deployment_id)
        self.assertEqual({key: item[0] for key, item in self.device.plan().items()}, {HELLO: "install", SECOND: "install", THIRD: "install"})
        self.device.cycle()
        self.assertEqual([self.where(name) for name in (HELLO, SECOND, THIRD)], [{DEVICE: "one"}, {A: "one"}, {B: "one"}])
        for device, deployment_id in ((DEVICE, HELLO), (A, SECOND), (B, THIRD)):
            self.assertEqual({item["body"]["deviceId"] for item in self.wfm.reports(deployment_id)}, {device})
        self.assertEqual({item["deploymentId"]: item["deviceId"] for item in self.device.status()["deployments"]}, {HELLO: DEVICE, SECOND: A, THIRD: B})
        self.assertIn(f"hello  on {A}", self.device.run("status").stdout)

    def test_an_unchanged_poll_asks_each_engine_once(self):
        """Issue 3, figures, P-16: one engine query per place, one request, nothing written."""
        for device, deployment_id in ((DEVICE, HELLO), (A, SECOND)):
            self.publish(device, deployment_id)
        self.device.cycle()
        for engine in self.engines.values():
            engine.forget_calls()
        before, count = self.written(), len(self.wfm.requests())
        self.device.cycle()
        self.assertEqual([self.calls(engine) for engine in self.engines.values()], [["ps"]] * 3)
        self.assertEqual(self.written(), before)
        self.assertEqual(len(self.wfm.requests()), count + 1)

    def test_updates_drift_and_removal_reach_the_child(self):
        """C-113, D-23: what holds for a device holds for a child."""
        self.publish(A)
        self.device.cycle()
        self.publish(A, greeting="two")
        self.device.cycle()
        self.assertEqual(self.where(), {A: "two"})
        with self.engines[A].open() as held:
            held["containers"][CONTAINER]["state"] = "exited"
        self.device.cycle()
        self.assertEqual(self.engines[A].containers()[CONTAINER]["state"], "running")
        self.wfm.withdraw()
        self.device.cycle()
        self.assertEqual((self.where(), self.report()[:2], self.device.state()["deployments"]), ({}, (A, "removed"), {}))

    def test_an_unknown_child_is_101(self):
        """C-222, C-137, C-138: the gateway is the source, in the status and in each component; it is said once."""
        self.publish(f"{DEVICE}/c")
        for _ in range(2):
            self.device.cycle(1)
        self.assertEqual(self.report(), (DEVICE, "failed", "101", DEVICE, DEVICE))
        self.assertEqual(len(self.wfm.reports()), 1)
        self.assertEqual(self.device.plan()[HELLO][0], "refuse")
        self.assertFalse(self.wfm.requests("registry"))

    def test_what_does_not_fit_on_its_child_is_not_started_there(self):
        """C-200 to C-202: against the child's own document."""
        self.publish(A, constraints={"capacityRequirements": {"memory": "1Gi"}})
        self.publish(B, SECOND, constraints={"capacityRequirements": {"memory": "1Gi"}})
        self.device.cycle(1)
        self.assertEqual(self.report(), (A, "failed", "INSUFFICIENT_CAPACITY", "hello", "web"))
        self.assertEqual((self.where(), self.where(SECOND)), ({}, {B: "one"}))

    def test_a_deployment_that_moves_is_removed_there_and_installed_here(self):
        """Never in two places: first there, then here, and not reported as removed, because it is still wanted; plan says from where."""
        self.publish(B)
        self.device.cycle()
        for target in (A, DEVICE, B):
            self.publish(target, greeting=target)
            count, (source,) = len(self.wfm.reports()), self.where()
            self.assertEqual(self.device.plan(), {HELLO: ("install", f"moves here from {source}")})
            for engine in self.engines.values():
                engine.forget_calls()
            self.assertNotIn("error", self.device.cycle())
            self.assertIn("rm", self.calls(self.engines[source]))
            self.assertEqual(self.where(), {target: target})
            self.assertEqual([(item["body"]["deviceId"], item["body"]["status"]["state"]) for item in self.wfm.reports()[count:]],
                             [(target, "pending"), (target, "installing"), (target, "installed")])
            self.assertEqual(self.device.plan()[HELLO][0], "keep")

    def test_a_move_that_cannot_be_made_ready_leaves_what_runs_alone(self):
        """D-11: everything is fetched where it goes before anything is touched where it is."""
        self.publish(A)
        self.device.cycle()
        self.wfm.add_package(support.make_compose({"main": {"image": "localhost/new:2", "environment": ["GREETING"]}}), tag="2.0.0")
        self.publish(B, components=(("web", "2.0.0"),), greeting="two")
        self.engines[B].change(unpullable=["localhost/new:2"])
        for _ in range(2):
            self.device.cycle(1)
        self.assertEqual((self.where(), self.report()[:3]), ({A: "one"}, (B, "failed", "PULL_FAILED")))
        self.engines[B].change(unpullable=[])
        self.device.run("retry")
        self.device.cycle(0)
        self.assertEqual((self.where(), self.report()[:2]), ({B: "two"}, (B, "installed")))

    def test_a_move_that_fails_leaves_it_running_where_it_was(self):
        """P-8, contract, Failure: at each attempt anew, and never in two places; hooks are told that it stays."""
        self.publish(A)
        self.device.cycle()
        before = self.engines[A].containers()
        told = os.path.join(self.device.folder, "told")
        hook = os.path.join(self.device.folder, "hook")
        support.write(hook, f"#!/bin/sh\necho $1 $(grep -o 'state\":\"[a-z]*') >> {told}\n", 0o755)
        self.device.set("hooks.run", [hook])
        self.publish(B, greeting="two")
        self.engines[B].change(exits={"main": 3})
        for _ in range(2):
            self.device.run("retry")
            self.device.cycle(1)
            after = self.engines[A].containers()
            self.assertEqual([(item["id"], item["state"]) for item in after.values()],
                             [(item["id"], "running") for item in before.values()])
            self.assertEqual((self.engines[B].containers(), self.report()[:2]), ({}, (B, "failed")))
            words = self.wfm.reports()[-1]["body"]["status"]["error"]["message"]
            self.assertIn("what ran before runs again", words)
            with open(told) as file:
                self.assertEqual(file.read().split("\n")[-7:-1], [
                    "before-install", "before-removal", 'after-install state":"failed', "before-removal",
                    'after-removal state":"removed', 'after-removal state":"failed'])
        self.engines[B].change(exits={})
        self.device.run("retry")
        self.device.cycle(0)
        self.assertEqual((self.where(), self.engines[A].containers()), ({B: "two"}, {}))

    def test_a_move_that_a_hook_forbids_leaves_what_runs_alone(self):
        """P-20, D-11: whether it is asked of the new place, for the last component there, or of the old one; and then it is made."""
        for name in ("db", "web"):
            self.wfm.add_package(support.make_compose(), name)
        both = (("db", "1.0.0"), ("web", "1.0.0"))
        self.publish(A, components=both)
        self.device.cycle()
        before, path = self.engines[A].containers(), os.path.join(self.device.folder, "hook")
        self.device.set("hooks.run", [path])
        self.publish(B, components=both, greeting="two")
        for forbidden in ("before-install web", "before-removal db", "before-removal web", ""):
            support.write(path, "#!/bin/sh\n[ \"$1 $(grep -o '\"component\":\"[a-z]*' | cut -d '\"' -f 4)\" != '%s' ]\n" % forbidden, 0o755)
            self.device.run("retry")
            self.device.cycle(1 if forbidden else 0)
            if forbidden:
                self.assertEqual((self.engines[A].containers(), self.engines[B].containers(), self.report()[:3]), (before, {}, (B, "failed", "HOOK_FAILED")))
        self.assertEqual((self.where(), self.engines[A].containers(), self.report()[:2]), ({B: "two"}, {}, (B, "installed")))

    def test_what_nobody_knows_on_a_child_is_removed_and_what_is_not_ours_stays(self):
        """P-11, D-22"""
        self.publish(A)
        self.device.cycle()
        with self.engines[A].open() as held:
            labels = dict(held["containers"][CONTAINER]["labels"], **{"org.margo.deployment": SECOND})
            held["containers"]["stray"] = dict(held["containers"][CONTAINER], id="e" * 64, labels=labels)
            held["containers"]["theirs"] = dict(held["containers"][CONTAINER], id="f" * 64, labels={})
        self.device.cycle()
        self.assertEqual(set(self.engines[A].containers()), {CONTAINER, "theirs"})

    def test_devices_that_share_an_engine_leave_each_others_containers_alone(self):
        """A connection that leads back to the gateway's own engine, by mistake or by design, removes nothing."""
        for child in self.device.settings["device"]["children"]:
            child["connection"]["FAKE_PODMAN"] = self.engine.folder
        self.device.save()
        for device, deployment_id in ((DEVICE, HELLO), (A, SECOND), (B, THIRD)):
            self.publish(device, deployment_id)
        self.device.cycle()
        self.engine.forget_calls()
        self.device.cycle()
        self.assertEqual(self.calls(self.engine), ["ps"] * 3)
        self.assertEqual(len(self.engine.containers()), 3)
        self.publish(B, SECOND)
        self.device.cycle()
        self.device.cycle()
        self.assertEqual({c["labels"]["org.margo.deployment"]: c["labels"]["org.margo.device"] or None for c in self.engine.containers().values()},
                         {HELLO: None, SECOND: B, THIRD: B})
        self.without("b")
        self.device.cycle(1)
        self.assertEqual((len(self.engine.containers()), self.report(SECOND)[2]), (3, "101"))
        self.wfm.withdraw(SECOND)
        self.wfm.withdraw(THIRD)
        self.device.cycle(0)
        self.assertEqual(len(self.engine.containers()), 1)


class Placement(GatewayCase):
    ANY = f"{DEVICE}/*"

    def test_the_first_that_fits_and_a_choice_that_stays(self):
        """Issue 3: by eligibility and capacity; spread, stable over polls and revisions, and where plan says."""
        for deployment_id in (HELLO, SECOND, THIRD):
            self.publish(self.ANY, deployment_id)
        planned = json.loads(self.device.run("plan", "--json").stdout)["actions"]
        self.assertNotIn("remove", self.device.cycle())
        self.assertEqual({item["deploymentId"]: {item["deviceId"]: "one"} for item in planned}, {key: self.where(key) for key in (HELLO, SECOND, THIRD)})
        places = [list(self.where(key)) for key in (HELLO, SECOND, THIRD)]
        self.assertEqual(sorted(places), [[A], [A], [B]])
        self.wfm.withdraw(SECOND)
        self.publish(self.ANY, THIRD, greeting="two")
        for _ in range(2):
            self.device.cycle()
        self.assertEqual([list(self.where(key)) for key in (HELLO, SECOND, THIRD)], [places[0], [], places[2]])
        self.assertEqual({item["body"]["deviceId"] for item in self.wfm.reports()}, set(places[0]))

    def test_rules_and_capacity_choose(self):
        """C-200: each child is held against what it reported."""
        self.publish(self.ANY, constraints={"capacityRequirements": {"memory": "1Gi"}})
        self.publish(self.ANY, SECOND, constraints={"eligibilityRules": [{"labelSelector": {"matchExpressions": [
            {"key": "hall", "operator": "In", "values": [4]}]}}]})
        self.device.cycle()
        self.assertEqual((self.where(), self.where(SECOND)), ({B: "one"}, {A: "one"}))

    def test_where_no_child_fits_it_is_103_with_each_reason(self):
        """C-221, C-138"""
        self.publish(self.ANY, constraints={"capacityRequirements": {"memory": "4Gi"}})
        for _ in range(2):
            self.device.cycle(1)
        self.assertEqual(self.report(), (DEVICE, "failed", "103", DEVICE, DEVICE))
        for words in (f"{A}: memory: 4Gi are needed, there are 512Mi", f"{B}: memory: 4Gi are needed, there are 2Gi"):
            self.assertIn(words, self.message())
        self.assertEqual(len(self.wfm.reports()), 1)
        self.device.settings["device"]["children"][0]["properties"]["memory"] = "8Gi"
        self.device.save()
        self.device.cycle(0)
        self.assertEqual(self.where(), {A: "one"})

    def test_a_new_revision_that_no_longer_fits_moves(self):
        self.publish(self.ANY)
        self.device.cycle()
        self.assertEqual(self.where(), {A: "one"})
        self.publish(self.ANY, greeting="two", constraints={"capacityRequirements": {"memory": "1Gi"}})
        self.device.cycle()
        self.assertEqual((self.where(), self.report()[:2]), ({B: "two"}, (B, "installed")))

    def test_without_children_it_is_103_too(self):
        """C-221, protocol 9: own-id/* on a device that is no gateway."""
        self.without("a", "b")
        self.publish(self.ANY)
        self.device.cycle(1)
        self.assertEqual(self.report(), (DEVICE, "failed", "103", DEVICE, DEVICE))


class Unreachable(GatewayCase):
    def lose(self, device, lost=True):
        self.engines[device].change(deaf=lost)

    def test_an_unreachable_child_is_102_and_holds_nobody_up(self):
        """C-222: said once; installed when it is there again, without waiting for a back-off."""
        self.lose(A)
        self.publish(A)
        self.publish(B, SECOND)
        self.assertEqual(self.device.plan(1)[HELLO][0], "refuse")
        for _ in range(2):
            self.assertIn(f"child device {A}: the container engine does not answer", self.device.cycle(1))
        self.assertEqual((self.where(), self.where(SECOND)), ({}, {B: "one"}))
        self.assertEqual(self.report(), (A, "failed", "102", DEVICE, DEVICE))
        self.assertEqual([item["body"]["status"]["state"] for item in self.wfm.reports()], ["failed"])
        self.lose(A, False)
        self.device.cycle(0)
        self.assertEqual((self.where(), self.report()[:3]), ({A: "one"}, (A, "installed", None)))

    def wait_for_install(self, *devices):
        """Lets some engines hang until the next hook is told that something has been installed; the hooks' journal."""
        path = os.path.join(self.device.folder, "installed")
        support.write(os.path.join(self.device.folder, "hook"), f"#!/bin/sh\necho $1 $(cat) >> {path}.journal\ncase $1 in after-install) : > {path};; esac\n", 0o755)
        self.device.set("hooks.run", ["hook"])
        for device in devices:
            support.write(os.path.join(self.engines[device].folder, "gate"), path)
        return path + ".journal"

    def test_one_that_hangs_is_waited_for_no_longer_than_its_limit_and_the_others_are_served(self):
        """Issue 3, C-222: all are asked at once; what answers only once something runs elsewhere is attended to by the next cycle."""
        self.wait_for_install(A)
        for device, deployment_id in ((DEVICE, HELLO), (A, SECOND), (B, THIRD)):
            self.publish(device, deployment_id)
        self.device.cycle(1)
        self.assertEqual([self.where(name) for name in (HELLO, SECOND, THIRD)], [{DEVICE: "one"}, {}, {B: "one"}])
        self.assertEqual(self.report(SECOND)[:3], (A, "failed", "102"))
        self.device.cycle(0)
        self.assertEqual(self.where(SECOND), {A: "one"})

    def test_what_runs_there_is_not_taken_for_drift(self):
        """D-16: no answer is no container that is missing; nothing new is reported of it."""
        self.publish(A)
        self.device.cycle()
        count = len(self.wfm.reports())
        self.lose(A)
        self.device.cycle(1)
        self.assertEqual((len(self.wfm.reports()), self.device.plan(1)[HELLO][0]), (count, "keep"))        # and says so
        self.assertEqual(self.device.status()["deployments"][0]["state"], "installed")
        self.lose(A, False)
        self.engines[A].forget_calls()
        self.device.cycle(0)
        self.assertEqual(self.calls(self.engines[A]), ["ps"])

    def test_updates_and_removals_wait_for_it(self):
        """C-222, D-21: each is 102 until the child is there again, then carried out."""
        self.publish(A)
        self.device.cycle()
        self.lose(A)
        self.publish(A, greeting="two")
        self.device.cycle(1)
        self.assertEqual((self.report(), self.where()), ((A, "failed", "102", DEVICE, DEVICE), {A: "one"}))
        self.lose(A, False)
        self.device.cycle(0)
        self.assertEqual((self.report()[:2], self.where()), ((A, "installed"), {A: "two"}))
        self.lose(A)
        self.wfm.withdraw()
        for _ in range(2):
            self.device.cycle(1)
        self.assertEqual((self.report(), self.where()), ((A, "failed", "102", DEVICE, DEVICE), {A: "two"}))
        self.lose(A, False)
        self.device.cycle(0)
        self.assertEqual((self.report()[:2], self.where()), ((A, "removed"), {}))

    def test_a_new_choice_avoids_it_and_an_old_one_waits(self):
        any_child = f"{DEVICE}/*"
        self.lose(A)
        self.publish(any_child)
        self.device.cycle(1)
        self.assertEqual(self.where(), {B: "one"})
        self.lose(B)
        self.publish(any_child, SECOND)
        self.publish(any_child, greeting="two")
        self.device.cycle(1)
        self.assertEqual(self.report(), (B, "failed", "102", DEVICE, DEVICE))
        self.assertEqual(self.report(SECOND), (DEVICE, "failed", "102", DEVICE, DEVICE))
        self.lose(A, False)
        self.device.cycle(1)
        self.assertEqual((self.where(), self.where(SECOND)), ({B: "one"}, {A: "one"}))

    def test_what_moved_away_from_it_is_removed_when_it_is_back(self):
        self.publish(A)
        self.device.cycle()
        self.lose(A)
        self.publish(B, greeting="two")
        self.device.cycle(1)
        self.assertEqual(self.where(), {A: "one", B: "two"})
        self.lose(A, False)
        self.device.cycle(0)
        self.assertEqual((self.where(), self.report()[:2]), ({B: "two"}, (B, "installed")))
        self.device.cycle(0)
        self.assertEqual(self.engines[B].containers()[CONTAINER]["state"], "running")

    def test_what_is_withdrawn_when_it_is_back_is_removed_in_both_places_and_said_once(self):
        self.publish(A)
        self.device.cycle()
        self.lose(A)
        self.publish(B, greeting="two")
        self.device.cycle(1)
        self.lose(A, False)
        self.wfm.withdraw()
        count = len(self.wfm.reports())
        self.assertNotIn("error", self.device.cycle(0))
        self.assertEqual(self.where(), {})
        self.assertEqual([(item["body"]["deviceId"], item["body"]["status"]["state"]) for item in self.wfm.reports()[count:]],
                         [(B, "removing"), (B, "removed")])

    def test_a_leftover_that_cannot_be_removed_fails_nobody_but_is_said(self):
        """D-21: the deployment is installed where it belongs; the run ends with 1 until nothing is left where it was."""
        self.publish(A)
        self.device.cycle()
        self.engines[A].change(stubborn=True)
        self.publish(B, greeting="two")
        self.publish(B, SECOND)
        for _ in range(2):
            self.assertIn("busy", self.device.cycle(1))
        self.assertEqual((self.where(), self.where(SECOND), self.report()[:2]), ({A: "one", B: "two"}, {B: "one"}, (B, "installed")))
        self.engines[A].change(stubborn=False)
        self.device.cycle(0)
        self.assertEqual(self.where(), {B: "two"})

    def test_an_own_engine_that_is_deaf_does_not_hold_the_children_up(self):
        self.lose(DEVICE)
        self.publish(DEVICE)
        self.publish(A, SECOND)
        self.device.cycle(1)
        self.assertEqual((self.where(), self.where(SECOND)), ({}, {A: "one"}))
        self.assertEqual(self.report()[:3], (DEVICE, "pending", None))

    def test_doctor_names_it(self):
        self.lose(A)
        done = self.device.run("doctor")
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stdout, f"FAIL children .*{A} does not answer.*device.children")
        self.lose(A, False)
        self.assertRegex(self.device.run("doctor").stdout, "ok   children +2 answer")

    def test_purge_removes_from_children_or_forgets_nothing(self):
        self.publish(A)
        self.publish(B, SECOND)
        self.device.cycle()
        self.lose(A)
        done = self.device.run("unenroll", "--purge")
        self.assertEqual(done.returncode, 1, done.stderr)
        self.assertTrue(self.device.status()["enrolled"])
        self.lose(A, False)
        done = self.device.run("unenroll", "--purge")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual((self.where(), self.where(SECOND)), ({}, {}))
        self.assertEqual(self.exchanges()[3:], [("DELETE", B), ("DELETE", A), ("DELETE", DEVICE)])


class Interrupted(GatewayCase):
    def find_helpers(self):
        """The engines' commands that run."""
        found = []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{pid}/environ", "rb") as environ:
                    words = environ.read()
            except OSError:
                continue
            found += [pid for engine in self.engines.values() if f"FAKE_PODMAN={engine.folder}\0".encode() in words]
        return found

    def test_ctrl_c_waits_for_no_device_that_hangs_and_leaves_nothing_behind(self):
        self.addCleanup(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, signal.default_int_handler))
        for engine in self.engines.values():
            support.write(os.path.join(engine.folder, "slow"), "ps")
        self.publish(A)
        for count in (2, 3, 5, 7):                  # the agent itself is one: while it begins to ask, and once it has asked all
            process = subprocess.Popen(self.device.command("plan"), env=self.device.env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            self.addCleanup(support.end, process)
            support.wait_for(lambda: len(self.find_helpers()) >= count, what="commands that hang")
            process.send_signal(signal.SIGINT)
            began = time.monotonic()
            errors = process.communicate(timeout=support.LIMIT)[1]
            self.assertEqual((process.returncode, errors), (130, b""), count)
            self.assertLess(time.monotonic() - began, 15, count)
            support.wait_for(lambda: not self.find_helpers(), what="the end of the engines' commands")


class Gone(GatewayCase):
    """A child that has left the configuration cannot be reached: what ran there is forgotten, and said so."""

    def test_directed_deployments_become_101_and_come_back_with_the_child(self):
        """C-222, P-16: running containers are adopted, not made anew."""
        children = self.device.settings["device"]["children"]
        self.publish(A)
        self.device.cycle()
        before = self.engines[A].containers()
        self.without("a")
        self.assertIn("no longer configured", self.device.cycle(1))
        self.assertEqual(self.report(), (DEVICE, "failed", "101", DEVICE, DEVICE))
        self.device.cycle(1)
        self.assertEqual((self.engines[A].containers(), self.where()), (before, {A: "one"}))
        self.device.set("device.children", children)
        self.device.cycle(0)
        self.assertEqual((self.engines[A].containers(), self.report()[:2]), (before, (A, "installed")))

    def test_new_names_for_gateway_and_child_remove_nothing(self):
        """Bad input never changes what runs: the old names are refused until the WFM uses the new ones, then containers are adopted."""
        self.publish(A)
        self.publish(DEVICE, SECOND)
        self.device.cycle()
        before = {device: engine.containers() for device, engine in self.engines.items()}
        self.device.set("device.id", "line-9")
        self.device.settings["device"]["children"][0]["id"] = "press"
        self.device.save()
        for _ in range(2):
            self.device.cycle(1)
        self.assertEqual((self.report()[2], self.report(SECOND)[2]), ("WRONG_DEVICE", "WRONG_DEVICE"))
        self.assertEqual({device: engine.containers() for device, engine in self.engines.items()}, before)
        self.assertEqual(self.exchanges()[3:], [("PUT", "line-9"), ("PUT", "line-9/press"), ("PUT", "line-9/b"),
                                                ("DELETE", B), ("DELETE", A), ("DELETE", DEVICE)])
        self.publish("line-9/press")
        self.publish("line-9", SECOND)
        self.device.cycle(0)
        self.assertEqual((self.report()[:2], self.report(SECOND)[:2]), (("line-9/press", "installed"), ("line-9", "installed")))
        self.assertEqual({device: engine.containers() for device, engine in self.engines.items()}, before)

    def test_a_free_choice_is_made_anew(self):
        self.publish(f"{DEVICE}/*")
        self.device.cycle()
        self.without("a")
        self.device.cycle(0)
        self.assertEqual(self.where(), {A: "one", B: "one"})
        self.assertEqual(self.report()[:2], (B, "installed"))

    def test_a_withdrawn_deployment_is_reported_as_removed(self):
        self.publish(A)
        self.device.cycle()
        self.without("a")
        self.wfm.withdraw()
        self.assertIn("no longer configured", self.device.cycle(0))
        self.assertEqual((self.report()[:2], self.device.state()["deployments"]), ((A, "removed"), {}))


class Housekeeping(GatewayCase):
    def test_images_are_pruned_where_they_were_pulled(self):
        """P-5: and nowhere else."""
        for version in range(1, 5):
            self.wfm.add_package(support.make_compose({"main": {"image": f"localhost/app:{version}", "environment": ["GREETING"]}}), tag=f"{version}.0.0")
            self.publish(A, components=(("web", f"{version}.0.0"),))
            self.device.cycle()
        for device, expected in ((A, ["localhost/app:3", "localhost/app:4", IMAGE]), (B, [IMAGE]), (DEVICE, [IMAGE])):
            with self.engines[device].open() as held:
                self.assertEqual(sorted(held["images"]), expected)
        self.assertEqual([call for call in self.engine.calls() if call[:2] == ["image", "rm"]], [])

    def test_hooks_are_told_which_device_it_is(self):
        journal = os.path.join(self.device.folder, "journal")
        support.write(os.path.join(self.device.folder, "hook"), f"#!/bin/sh\ncat >> {journal}; echo >> {journal}\n", 0o755)
        self.device.set("hooks.run", ["hook"])
        self.publish(f"{DEVICE}/*")
        self.device.cycle()
        with open(journal) as file:
            self.assertEqual([json.loads(line)["deviceId"] for line in file], [A, A])


class RealChildren(unittest.TestCase):
    """Two podmans with storages of their own behind API sockets, as `podman system service` serves them on child devices."""

    @classmethod
    def setUpClass(cls):
        cls.engines = {A: support.Engine(cls), B: support.Engine(cls)}

    @classmethod
    def tearDownClass(cls):
        for engine in cls.engines.values():
            engine.close()

    def setUp(self):
        self.pki = support.Pki(self)
        self.wfm = support.Wfm(self, self.pki)
        self.sockets = {device: os.path.join(support.make_folder(self), "podman.sock") for device in self.engines}
        for engine in self.engines.values():
            self.addCleanup(engine.clean)
        self.services = {device: self.serve(device) for device in self.engines}
        children = [make_child(device.split("/")[1], {"CONTAINER_HOST": f"unix://{path}", "DOCKER_HOST": f"unix://{path}"})
                    for device, path in self.sockets.items()]
        self.device = support.Device(self, self.pki, self.wfm, None, {"runtime.compose": "off", "runtime.settle": "1s", "device.children": children})

    def serve(self, device):
        """The engine's API on its socket."""
        service = support.Service(self, ["podman", "system", "service", "--time=0", f"unix://{self.sockets[device]}"], self.engines[device].env)
        support.wait_for(lambda: os.path.exists(self.sockets[device]), what="the socket")
        return service

    def publish(self, greeting, device=A, deployment_id=HELLO, tag="1.0.0", **options):
        script = "echo $$GREETING; exec sleep 100000"
        check = {"test": ["CMD", "true"], "interval": "1s"}
        self.wfm.add_package(support.make_compose({"main": {"image": IMAGE, "init": True, "command": ["sh", "-c", script], "environment": ["GREETING"],
                                                           "volumes": ["data:/data"], "healthcheck": check}}, volumes={"data": None}), tag=tag)
        self.wfm.publish(support.make_deployment(deployment_id, device=device, registry=self.wfm.registry, components=(("web", tag),),
                                                 parameters={"GREETING": greeting}, **options), deployment_id)

    def logs(self, device, deployment_id=HELLO):
        return self.engines[device].podman("logs", "--tail=1", f"web-{deployment_id}-main-1").strip()

    def holds(self):
        return {device: len(engine.containers()) for device, engine in self.engines.items()}

    def test_the_life_of_a_deployment_on_children(self):
        """Issue 3, item 4, on real engines: install, update, drift, a dead link, a move, removal, nothing left on either."""
        self.publish("first")
        self.publish("side", f"{DEVICE}/*", SECOND)
        self.device.cycle()
        self.assertEqual((self.logs(A), self.logs(B, SECOND)), ("first", "side"))
        before = self.engines[A].containers()
        self.device.cycle()
        self.assertEqual(self.engines[A].containers(), before)
        self.publish("second")
        self.device.cycle()
        self.assertEqual(self.logs(A), "second")
        self.engines[A].podman("stop", "--time=0", CONTAINER)
        self.device.cycle()
        self.assertEqual(self.engines[A].containers()[CONTAINER][1], "running")
        self.services[A].stop()
        self.publish("third")
        self.publish("aside", f"{DEVICE}/*", SECOND)
        self.assertIn(f"child device {A}: the container engine does not answer", self.device.cycle(1))
        self.assertEqual((self.logs(A), self.logs(B, SECOND)), ("second", "aside"))
        self.assertEqual(self.wfm.reports()[-1]["body"]["status"]["error"]["code"], "102")
        self.services[A] = self.serve(A)
        self.device.cycle()
        self.assertEqual(self.logs(A), "third")
        before = self.engines[A].containers()[CONTAINER][0]
        self.wfm.add_package(support.make_compose({"main": {"image": IMAGE, "command": ["false"]}}), tag="9.0.0")
        self.wfm.publish(support.make_deployment(device=B, registry=self.wfm.registry, components=(("web", "9.0.0"),)), HELLO)
        self.device.cycle(1)
        self.assertEqual((self.engines[A].containers()[CONTAINER][:2], self.holds()), ((before, "running"), {A: 1, B: 1}))
        self.publish("moved", B)
        self.device.cycle()
        self.assertEqual((self.holds(), self.logs(B)), ({A: 0, B: 2}, "moved"))
        self.assertEqual(self.device.run("doctor").returncode, 0)
        self.assertEqual(self.device.run("unenroll", "--purge").returncode, 0)
        self.assertEqual(self.holds(), {A: 0, B: 0})

    def test_a_failed_update_goes_back_on_the_child(self):
        """P-8: with the end of the log that was fetched over the wire."""
        self.publish("first")
        self.device.cycle()
        self.wfm.add_package(support.make_compose({"main": {"image": IMAGE, "command": ["sh", "-c", "echo broken by design; exit 3"]}}), tag="2.0.0")
        self.wfm.publish(support.make_deployment(device=A, registry=self.wfm.registry, components=(("web", "2.0.0"),)))
        self.device.cycle(1)
        message = self.wfm.reports()[-1]["body"]["components"][0]["error"]["message"]
        for words in ("broken by design", "the version before runs again"):
            self.assertIn(words, message)
        self.assertEqual(self.logs(A), "first")

    def test_the_child_pulls_with_the_gateways_credentials(self):
        """What `registries` says goes over the wire, but for the CA, which podman only takes from the child's own disk."""
        support.require("docker-registry")
        folder, port = support.make_folder(self), support.free_port()
        image = f"localhost:{port}/app:1"
        support.write(os.path.join(folder, "htpasswd"), "device:$2b$05$t6yDJSrc/1BDmHKYmeLOb.hZocZS1CUEg71V.qXZEjMk5U1QP22W6\n")
        support.write(os.path.join(folder, "password"), "s3cret\n", 0o600)
        support.write(os.path.join(folder, "config.yml"), json.dumps({
            "version": 0.1, "storage": {"filesystem": {"rootdirectory": folder}}, "http": {"addr": f"127.0.0.1:{port}"},
            "auth": {"htpasswd": {"realm": "test", "path": os.path.join(folder, "htpasswd")}}}))
        registry = support.Service(self, ["docker-registry", "serve", os.path.join(folder, "config.yml")])
        support.wait_for(lambda: "listening on" in registry.read_output(), what="the registry")
        self.engines[B].podman("push", "--creds=device:s3cret", "--tls-verify=false", IMAGE, image)
        self.wfm.add_package(support.make_compose({"main": {"image": image, "init": True, "command": ["sleep", "100000"]}}))
        self.wfm.publish(support.make_deployment(device=A, registry=self.wfm.registry))
        self.device.settings["registries"][f"localhost:{port}"] = {"insecure": True}
        self.device.save()
        self.assertIn("PULL_FAILED", self.device.cycle(1))
        self.device.settings["registries"][f"localhost:{port}"].update(username="device", password_file=os.path.join(folder, "password"))
        self.device.save()
        self.device.run("retry")
        self.device.cycle()
        self.assertEqual(self.holds(), {A: 1, B: 0})
        self.wfm.withdraw()
        self.device.cycle()
        self.assertNotIn(image, self.engines[A].podman("images", "--format", "{{.Repository}}:{{.Tag}}"))


if __name__ == "__main__":
    unittest.main()
