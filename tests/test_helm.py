"""Runtimes with Helm: helm 3 and helm 4 against a Kubernetes API server in memory, charts in a real registry; the values as pure code."""
import base64
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import unittest
import urllib.request

import margo_agent
from tests import support
from tests.test_gateway import make_child
from tests.support import HELLO

CHART = os.path.join(support.DATA, "charts", "web")
OTHER, SECOND = HELLO[:-1] + "1", "00000000-0000-4000-8000-000000000002"
LONG = "a-component-with-a-name-longer-than-helm-takes"


def make_deployment(parameters, kind="helm", **changes):
    """The Deployment of a document with {pointer: value} for the component web."""
    document = json.loads(support.make_deployment(registry="registry.example"))
    document["spec"]["deploymentProfile"]["type"] = kind
    document["spec"]["parameters"] = {f"p{index}": {"value": value, "targets": [{"pointer": pointer, "components": ["web"]}]}
                                      for index, (pointer, value) in enumerate(parameters)}
    return margo_agent.parse_deployment(json.dumps(dict(document, **changes)).encode(), HELLO)


class Values(unittest.TestCase):
    def make(self, *parameters):
        return margo_agent.make_values(make_deployment(parameters), "web")

    def test_pointers_are_read_as_set_reads_them(self):
        """C-181: dots part names, a backslash takes a character as it is, brackets index lists."""
        for pointer, expected in (("a", {"a": 1}), ("a.b.c", {"a": {"b": {"c": 1}}}), (r"a\.b", {"a.b": 1}), (r"a\[0\].b", {"a[0]": {"b": 1}}),
                                  ("a[1]", {"a": [None, 1]}), ("a[0].b", {"a": [{"b": 1}]}), ("a[0][1]", {"a": [[None, 1]]}),
                                  (r"n.k\.example\.com/x", {"n": {"k.example.com/x": 1}}), ("ü-x y", {"ü-x y": 1})):
            self.assertEqual(self.make((pointer, 1)), expected, pointer)

    def test_one_object_takes_several_pointers(self):
        self.assertEqual(self.make(("h[0].name", "x"), ("h[0].port", 1), ("h[1].name", "y"), ("a.b", 1), ("a.c", 2), ("a.b", 3)),
                         {"h": [{"name": "x", "port": 1}, {"name": "y"}], "a": {"b": 3, "c": 2}})

    def test_types_are_kept(self):
        """C-183: text stays text, and what is not set is not there."""
        data = margo_agent.make_json(self.make(("s", "4"), ("i", 4), ("f", 1.5), ("b", True), ("l", ["a", "b"]), ("n", None)))
        self.assertEqual(json.loads(data), {"s": "4", "i": 4, "f": 1.5, "b": True, "l": ["a", "b"]})
        document = b"value: 1.10\n"
        self.assertEqual(margo_agent.make_json(margo_agent.load_yaml(document)), b'{"value":1.1}')

    def test_what_is_no_pointer_or_contradicts_another_fails_the_component(self):
        for parameters in ([("", 1)], [("a.", 1)], [(".a", 1)], [("a..b", 1)], [("a[x]", 1)], [("a[", 1)], [("a[0]b", 1)], [("[0]", 1)],
                           [("a[9999]", 1)], [("a\\", 1)], [("a", 1), ("a.b", 2)], [("a.b", 1), ("a", 2)], [("a[0]", 1), ("a.b", 2)],
                           [("a.b", 1), ("a[0]", 2)], [(".".join("a" * 5000), 1)], [("a" + "[0]" * 5000, 1)]):
            with self.assertRaises(margo_agent.ComponentError, msg=repr(parameters)) as caught:
                self.make(*parameters)
            self.assertEqual(caught.exception.code, "PARAMETER_INVALID")
            self.assertIn("parameter p", caught.exception.message)
        with self.assertRaises(margo_agent.ComponentError):
            margo_agent.set_value([], [0], 1)
            margo_agent.make_values(make_deployment([])._replace(parameters=[margo_agent.Parameter("x", float("inf"), [("a", ["web"])])]), "web")

    def test_any_pointer_is_taken_or_refused(self):
        """Never anything but a path of names and small indices, or ValueError."""
        support.require("hypothesis")
        from hypothesis import given, strategies

        @given(strategies.text(alphabet="ab.[]\\01 \n", max_size=12))
        def check(pointer):
            try:
                path = margo_agent.parse_value_path(pointer)
            except ValueError:
                return
            self.assertTrue(path and isinstance(path[0], str) and all(step != "" for step in path))
            values = {}
            margo_agent.set_value(values, path, 1)
            json.dumps(values)
        check()


class Names(unittest.TestCase):
    def test_release_names_end_with_the_id_and_never_meet(self):
        """D-20"""
        names = {margo_agent.make_release_name(component, deployment_id)
                 for component in ("web", "w", LONG, LONG + "r", "a" * 16, "a" * 17) for deployment_id in (HELLO, OTHER)}
        self.assertEqual(len(names), 12)
        for name in names:
            self.assertRegex(name, r"\A[a-z0-9]([a-z0-9-]*[a-z0-9])?\Z")
            self.assertLessEqual(len(name), 53)
            self.assertIn(name[-36:], (HELLO, OTHER))
        self.assertEqual(margo_agent.make_release_name("web", HELLO.upper()), f"web-{HELLO}")

    def test_releases_are_told_by_records_or_by_their_names(self):
        record = {"deploymentId": HELLO, "components": [{"name": LONG}]}
        items = [{"name": margo_agent.make_release_name(LONG, HELLO), "namespace": "n", "revision": "3", "status": "deployed"},
                 {"name": f"web-{OTHER}", "namespace": "n", "revision": 1, "status": "pending-install"}]
        found = margo_agent.parse_releases(json.dumps(items).encode(), [record])
        self.assertEqual([(c.deployment_id, c.component, c.hash, c.state) for c in found],
                         [(HELLO, LONG, "3", "running"), (OTHER, "web", "1", "pending-install")])
        for data in (b"{}}", b"[1]", b'[{"nome": "x"}]', b'[{"name": 5}]'):
            with self.assertRaises(margo_agent.CommandError):
                margo_agent.parse_releases(data, [])

    def test_a_release_of_another_name_is_somebody_elses(self):
        """Whoever may make a release may label it; that neither makes it ours nor the whole list unreadable."""
        item = {"namespace": "n", "revision": 1, "status": "deployed"}
        items = [dict(item, name=name) for name in ("web", f"web-{HELLO}", "x-1", "")]
        self.assertEqual([c.name for c in margo_agent.parse_releases(json.dumps(items).encode(), [])], [f"web-{HELLO}"])


class Charts(unittest.TestCase):
    def test_only_charts_are_taken_for_charts(self):
        """C-153, C-155: an OCI manifest with Helm's config and one chart layer; its provenance may lie beside it."""
        layer = {"mediaType": margo_agent.CHART_LAYER, "digest": support.digest(b"x"), "size": 1}
        good = {"schemaVersion": 2, "config": {"mediaType": margo_agent.CHART_CONFIG}, "layers": [
            layer, {"mediaType": "application/vnd.cncf.helm.chart.provenance.v1.prov", "digest": support.digest(b"y"), "size": 1}]}
        self.assertEqual(margo_agent.parse_package_manifest(json.dumps(good).encode(), "r", 100, "helm"), (support.digest(b"x"), 1))
        for change in ({"config": None}, {"config": {"mediaType": "application/vnd.oci.image.config.v1+json"}}, {"layers": []}, {"layers": None},
                       {"layers": [layer, layer]}, {"layers": [1]}, {"schemaVersion": 1}, {"layers": [dict(layer, size=101)]}):
            with self.assertRaises(margo_agent.ComponentError, msg=repr(change)) as caught:
                margo_agent.parse_package_manifest(json.dumps(dict(good, **change)).encode(), "r", 100, "helm")
            self.assertEqual(caught.exception.code, "ARCHIVE_INVALID")

    def test_only_older_generations_name_charts_by_https(self):
        document = json.loads(support.make_deployment())
        document["spec"]["deploymentProfile"]["type"] = "helm.v3"
        document["spec"]["deploymentProfile"]["components"][0]["properties"]["repository"] = "https://charts.example/stable/web"
        older = dict(document, apiVersion="margo.org/v1-alpha1", kind="ApplicationDeployment")
        self.assertEqual(margo_agent.parse_deployment(json.dumps(older).encode(), HELLO).components[0].repository, "https://charts.example/stable/web")
        document["spec"]["deploymentProfile"]["type"] = "helm"
        with self.assertRaises(margo_agent.ComponentError):
            margo_agent.parse_deployment(json.dumps(document).encode(), HELLO)


class CommandLine(unittest.TestCase):
    def test_charts_get_what_every_device_gives_and_no_more(self):
        """C-167: no flag for hooks, custom resources or look-ups; charts may not rely on them, and none are kept from using them."""
        folder = support.make_folder(self)
        helm = support.write(os.path.join(folder, "helm"), f"#!/bin/sh\nprintf '%s\\n' \"$@\" > {folder}/called; echo '{{\"version\": 3}}'\n", 0o755)
        release = margo_agent.Release(HELLO, "web", "web-x", "plant-7", "/chart", {}, "/values.json", True, "content")
        facts = margo_agent.HelmDriver(helm, None, dict(os.environ)).apply(release, [], {}, time.monotonic() + 100)
        self.assertEqual(facts["release"]["hash"], "3")
        with open(os.path.join(folder, "called")) as file:
            called = file.read().split()
        flags = {item.split("=")[0] for item in called if item.startswith("--")}
        self.assertEqual(called[:4], ["upgrade", "--install", "web-x", "/chart"])
        self.assertEqual(flags, {"--install", "--namespace", "--create-namespace", "--values", "--labels", "--reset-values", "--history-max", "--timeout",
                                 "--output", "--wait"})


class NoHelm(support.DeviceCase):
    def test_without_helm_its_components_are_not_supported(self):
        """Contract, configuration: and what the device reports does not name the type."""
        self.device.set("runtime.helm", "off")
        document = json.loads(support.make_deployment(registry=self.wfm.registry))
        document["spec"]["deploymentProfile"]["type"] = "helm"
        self.wfm.publish(json.dumps(document))
        self.assertIn("UNSUPPORTED_TYPE", self.device.cycle(1))
        self.assertEqual(json.loads(self.device.run("capabilities").stdout)["properties"]["supportedDeploymentTypes"], ["compose"])


class HelmCase:
    """The life of Helm deployments, by one version of helm; the test classes below say which."""

    version = ""

    @classmethod
    def setUpClass(cls):
        support.require("helm3", "helm4", "docker-registry", "openssl")

    def setUp(self):
        self.pki = support.Pki(self)
        self.wfm = support.Wfm(self, self.pki)
        self.engine = support.FakeEngine(self)
        self.device = support.Device(self, self.pki, self.wfm, self.engine)
        self.folder = support.make_folder(self)
        self.cluster, self.kubeconfig = self.start_cluster("kubeconfig")
        self.tool = os.path.join(support.find_helm(self.version), "helm")
        # a `helm` on PATH that notes its command lines
        support.write(os.path.join(self.folder, "bin", "helm"), f"#!/bin/sh\necho \"$*\" >> {self.folder}/calls\nexec {self.tool} \"$@\"\n", 0o755)
        self.device.env["PATH"] = f"{self.folder}/bin:{self.device.env['PATH']}"
        self.device.set("runtime.kubeconfig", self.kubeconfig)
        self.registry = self.start_registry()
        self.push("web", "1.0.0")

    def start_cluster(self, name):
        """(URL, kubeconfig file) of a cluster of its own."""
        server = support.Service(self, [sys.executable, "-m", "tests.fake_kubernetes"], {"PYTHONPATH": support.ROOT})
        url = server.wait_for_line("listening ")
        return url, support.write(os.path.join(self.folder, name), json.dumps({
            "apiVersion": "v1", "kind": "Config", "clusters": [{"name": "test", "cluster": {"server": url}}],
            "users": [{"name": "test", "user": {}}], "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
            "current-context": "test"}), 0o600)

    def start_registry(self):
        """A real registry that asks for a login, over TLS."""
        port = support.free_port()
        support.write(os.path.join(self.folder, "htpasswd"), "device:$2b$05$t6yDJSrc/1BDmHKYmeLOb.hZocZS1CUEg71V.qXZEjMk5U1QP22W6\n")
        support.write(os.path.join(self.folder, "password"), "s3cret\n", 0o600)
        config = support.write(os.path.join(self.folder, "registry.yml"), json.dumps({
            "version": 0.1, "storage": {"filesystem": {"rootdirectory": os.path.join(self.folder, "blobs")}},
            "auth": {"htpasswd": {"realm": "test", "path": os.path.join(self.folder, "htpasswd")}},
            "http": {"addr": f"127.0.0.1:{port}", "tls": {"certificate": self.pki.path("site.pem"), "key": self.pki.path("site.key")}}}))
        service = support.Service(self, ["docker-registry", "serve", config])
        support.wait_for(lambda: "listening on" in service.read_output(), what="the registry")
        self.device.settings["registries"][f"localhost:{port}"] = {
            "ca": self.pki.path("site-ca.pem"), "username": "device", "password_file": os.path.join(self.folder, "password")}
        self.device.save()
        return f"localhost:{port}"

    def helm(self, *arguments, tool=None):
        """One command of the tool itself; its output."""
        env = dict(os.environ, KUBECONFIG=self.kubeconfig, HOME=self.folder)
        done = subprocess.run([tool or self.tool] + list(arguments), env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=support.LIMIT,
                              universal_newlines=True)
        self.assertEqual(done.returncode, 0, done.stderr)
        return done.stdout

    def push(self, name, version):
        """The chart as NAME and VERSION, packaged and pushed by helm itself."""
        source = os.path.join(self.folder, "source", name)
        shutil.rmtree(source, ignore_errors=True)
        shutil.copytree(CHART, source)
        support.write(os.path.join(source, "Chart.yaml"), f"apiVersion: v2\nname: {name}\nversion: {version}\n")
        self.helm("package", source, "--destination", self.folder)
        self.helm("push", os.path.join(self.folder, f"{name}-{version}.tgz"), f"oci://{self.registry}/charts", "--ca-file",
                  self.pki.path("site-ca.pem"), "--username", "device", "--password", "s3cret",
                  tool=os.path.join(support.find_helm("4"), "helm"))           # helm 3 takes localhost for a registry without TLS

    def publish(self, revision="1.0.0", components=("web",), deployment_id=HELLO, namespace="plant-7", chart="web", values=None, **properties):
        document = json.loads(support.make_deployment(deployment_id, components=[(name, revision) for name in components],
                                                      registry=self.registry, **properties))
        document["metadata"]["namespace"] = namespace
        profile = document["spec"]["deploymentProfile"]
        profile["type"] = "helm"
        for component in profile["components"]:
            component["properties"]["repository"] = f"oci://{self.registry}/charts/{chart}"
        document["spec"]["parameters"] = {f"p{index}": {"value": value, "targets": [{"pointer": pointer, "components": list(components)}]}
                                          for index, (pointer, value) in enumerate((values or {}).items())}
        self.wfm.publish(json.dumps(document), deployment_id)

    def releases(self):
        """{name: (namespace, chart, status)} as helm itself lists them, ours or not."""
        items = json.loads(self.helm("list", "--all-namespaces", "--deployed", "--failed", "--pending", "--output", "json"))
        return {item["name"]: (item["namespace"], item["chart"], item["status"]) for item in items}

    def values(self, name=f"web-{HELLO}", namespace="plant-7"):
        """The values with which a release was made."""
        return json.loads(self.helm("get", "values", name, "--namespace", namespace, "--output", "json"))

    def calls(self):
        """The agent's helm commands since the last look."""
        path = os.path.join(self.folder, "calls")
        if not os.path.exists(path):
            return []
        with open(path) as file:
            lines = file.read().splitlines()
        os.remove(path)
        return [line.split() for line in lines]

    def test_install_unchanged_update_and_removal(self):
        """C-153, C-166, C-181, D-14, D-15: in a namespace of its own; one `helm list` and nothing else where nothing changed."""
        self.publish(values={"greeting": "s3cret-value", "hosts[0].name": "x.example"}, components=("web", "side"))
        log = self.device.cycle()
        both = {f"{name}-{HELLO}": ("plant-7", "web-1.0.0", "deployed") for name in ("web", "side")}
        self.assertEqual(self.releases(), both)
        self.assertEqual(self.values(), {"greeting": "s3cret-value", "hosts": [{"name": "x.example"}]})
        self.assertNotIn("s3cret-value", log + str(self.calls()))
        self.assertEqual(self.wfm.statuses()[-1], "installed")

        self.device.cycle()
        self.assertEqual([call[0] for call in self.calls()], ["list"])

        self.push("web", "1.1.0+build.5")
        self.publish("1.1.0_build.5", components=("web", "side"), values={"greeting": "b"})
        self.device.cycle()
        self.assertEqual(self.releases(), {name: (space, "web-1.1.0+build.5", state) for name, (space, _, state) in both.items()})
        self.assertEqual(self.values(), {"greeting": "b"})
        self.publish("1.1.0_build.5", values={"greeting": "b"})
        self.calls()
        self.device.cycle()
        commands = [call[0] for call in self.calls()]
        self.assertEqual((set(commands), commands.count("uninstall")), ({"list", "uninstall"}, 1))         # what did not change is left alone
        self.assertEqual(list(self.releases()), [f"web-{HELLO}"])

        self.wfm.withdraw()
        self.device.cycle()
        self.assertEqual(self.releases(), {})
        self.assertEqual(self.wfm.statuses()[-1], "removed")
        self.calls()
        self.device.cycle()
        self.assertEqual(self.calls(), [])                  # nothing of Helm is started when no deployment uses it

    def test_a_failed_update_is_rolled_back(self):
        """P-8, C-152, D-16: by the same rule as everything else, and the second component's failure concerns the first."""
        self.publish(values={"greeting": "good"})
        self.device.cycle()
        self.publish(values={"greeting": "secret-word", "ready": False}, timeout="0m3s")
        self.assertIn("INSTALL_TIMEOUT", self.device.cycle(1))
        error = self.wfm.reports()[-1]["body"]["components"][0]["error"]
        self.assertIn("the version before runs again", error["message"])
        self.assertNotIn("secret-word", json.dumps(self.wfm.reports()))
        self.assertEqual((self.releases()[f"web-{HELLO}"][2], self.values()), ("deployed", {"greeting": "good"}))
        self.publish(values={"greeting": "better"})
        self.device.cycle()
        self.assertEqual(self.values(), {"greeting": "better"})

    def test_a_failed_first_install_is_tried_again(self):
        """One that failed is taken back, and where it is kept for inspection the next attempt makes it good."""
        self.publish(values={"ready": False}, timeout="0m2s")
        self.device.cycle(1)
        self.assertEqual(self.releases(), {})
        self.device.set("runtime.on_failure", "keep")
        self.publish(values={"ready": False, "greeting": "again"}, timeout="0m2s")
        self.device.cycle(1)
        self.assertEqual(self.releases()[f"web-{HELLO}"][2], "failed")
        self.publish()
        self.device.cycle()
        self.assertEqual(self.releases()[f"web-{HELLO}"][2], "deployed")

    def test_without_wait_nothing_is_waited_for(self):
        """C-151"""
        self.publish(values={"ready": False}, wait=False, timeout="0m20s")
        self.device.cycle()
        self.assertEqual(self.releases()[f"web-{HELLO}"][2], "deployed")

    def test_drift_is_mended_and_strangers_are_left_alone(self):
        """P-11, P-12, D-22: gone, changed by hand, in the way; and nothing that is not labelled ours."""
        self.publish(values={"greeting": "a"})
        self.device.cycle()
        self.helm("install", f"web-{OTHER}", CHART, "--namespace", "default")
        self.helm("uninstall", f"web-{HELLO}", "--namespace", "plant-7")
        self.assertIn("drift", self.device.cycle())
        self.helm("upgrade", f"web-{HELLO}", CHART, "--namespace", "plant-7", "--set", "greeting=changed")
        self.assertIn("drift", self.device.cycle())
        self.assertEqual(self.values(), {"greeting": "a"})
        self.assertIn(f"web-{OTHER}", self.releases())

    def test_a_release_of_another_owner_is_never_touched(self):
        """Contract, On the engine: neither upgraded nor mended nor uninstalled, whatever else it has; and `plan` and `doctor` name it."""
        labels = ("--labels", f"org.margo.deployment={HELLO},org.margo.owner=stranger")
        for number, more in enumerate((labels, ())):                    # of another agent, and of somebody without any label
            self.helm("install", f"web-{HELLO}", CHART, "--namespace", "plant-7", "--create-namespace", *more)
            self.publish(values={"greeting": str(number)})
            self.assertIn("NAME_TAKEN", self.device.cycle(1))
            self.assertIn("was not made by this agent", self.wfm.reports()[-1]["body"]["components"][0]["error"]["message"])
            if more:
                (other,) = json.loads(self.device.run("plan", "--json").stdout)["others"]
                self.assertEqual((other["deploymentId"], other["name"], other["type"]), (HELLO, f"web-{HELLO}", "helm"))
                self.assertIn(f"web-{HELLO} of another agent", self.device.run("doctor").stdout)
                self.assertEqual([item["name"] for item in self.device.status()["others"]], [f"web-{HELLO}"])
            self.wfm.withdraw()
            self.device.cycle()
            (item,) = json.loads(self.helm("list", "--all-namespaces", "--output", "json"))
            self.assertEqual((item["revision"], item["status"]), ("1", "deployed"))
            self.helm("uninstall", f"web-{HELLO}", "--namespace", "plant-7")
        self.publish(values={"greeting": "2"})
        self.device.cycle()
        self.assertEqual(self.values(), {"greeting": "2"})

    def test_after_the_state_was_lost_its_own_releases_are_taken_on_and_removed(self):
        self.publish()
        self.publish(deployment_id=OTHER)
        self.device.cycle()
        shutil.rmtree(self.device.state_dir)
        self.wfm.withdraw(OTHER)
        self.helm("install", f"web-{SECOND}", CHART, "--namespace", "x", "--create-namespace", "--labels",
                  f"org.margo.deployment={SECOND},org.margo.owner=stranger")
        self.device.cycle()
        self.assertEqual(set(self.releases()), {f"web-{HELLO}", f"web-{SECOND}"})

    def test_a_release_of_an_older_agent_or_an_earlier_identity_is_known_by_the_state(self):
        for number, owner in enumerate(("", "earlier")):
            self.publish(values={"greeting": "a"})
            self.device.cycle()
            state = self.device.state()
            if owner:
                state["owners"].insert(0, owner)
            support.write(os.path.join(self.device.state_dir, "state.json"), json.dumps(state))
            mark = f"org.margo.owner={margo_agent.make_owner_value(owner)}" if owner else "org.margo.owner=null"
            self.helm("upgrade", f"web-{HELLO}", CHART, "--namespace", "plant-7", "--reuse-values", "--labels", mark)
            revision = json.loads(self.helm("list", "--all-namespaces", "--output", "json"))[0]["revision"]
            state["deployments"][HELLO]["components"][0]["services"]["release"]["hash"] = str(revision)
            support.write(os.path.join(self.device.state_dir, "state.json"), json.dumps(state))
            self.assertNotIn("drift", self.device.cycle())
            self.publish(values={"greeting": "b"})
            self.device.cycle()
            self.assertEqual(self.values(), {"greeting": "b"})
            self.helm("upgrade", f"web-{HELLO}", CHART, "--namespace", "plant-7", "--reuse-values", "--labels", mark)
            self.wfm.withdraw()
            self.device.cycle()
            self.assertEqual(self.releases(), {})

    def test_a_namespace_may_change(self):
        self.publish()
        self.device.cycle()
        self.publish(namespace="plant-8")
        self.device.cycle()
        self.assertEqual(self.releases(), {f"web-{HELLO}": ("plant-8", "web-1.0.0", "deployed")})

    def test_a_kill_in_the_middle_is_mended_by_the_next_run(self):
        """P-9: of the first install, and of an update; helm calls what is left pending, and would do nothing more by itself."""
        self.publish(values={"ready": False}, timeout="5m0s")
        for values in ({"greeting": "first"}, {"greeting": "second"}):
            self.kill_while_pending()
            self.publish(values=values)
            self.device.cycle()
            self.assertEqual((self.releases()[f"web-{HELLO}"][2], self.values()), ("deployed", values))
            self.publish(values={"ready": False}, timeout="5m0s")

    def kill_while_pending(self):
        """Ends a run and its helm hard while helm waits for what never comes."""
        process = subprocess.Popen(self.device.command("run", "--once"), env=self.device.env, stderr=subprocess.DEVNULL)
        support.wait_for(lambda: self.releases().get(f"web-{HELLO}", ("", "", ""))[2].startswith("pending"), what="a release that is pending")
        support.end(process)
        found = subprocess.run(["pgrep", "-f", f"^{self.tool} upgrade"], stdout=subprocess.PIPE).stdout.split()
        for pid in found:
            os.kill(int(pid), signal.SIGKILL)
        self.assertTrue(found)

    def test_an_unreachable_cluster_stops_nothing_else_and_is_no_empty_one(self):
        """D-16, D-30: nothing is installed blindfold, and doctor says what is wrong."""
        self.publish()
        self.device.cycle()
        with open(self.kubeconfig) as file:
            good = file.read()
        support.write(self.kubeconfig, good.replace(self.cluster, f"http://127.0.0.1:{support.free_port()}"))
        self.calls()
        self.assertIn("the cluster does not answer", self.device.cycle(1))
        self.assertEqual([call[0] for call in self.calls()], ["list"])
        self.assertIn("FAIL engine", self.device.run("doctor").stdout)
        support.write(self.kubeconfig, good)
        self.device.cycle()
        self.assertIn("releases of ours", self.device.run("doctor").stdout)

    def set_status(self, status):
        """Makes the newest revision of the release what a power cut leaves of helm in the middle of something."""
        path = f"{self.cluster}/api/v1/namespaces/plant-7/secrets"
        with urllib.request.urlopen(path) as answer:
            item = max((item for item in json.loads(answer.read().decode())["items"] if item["metadata"]["labels"].get("owner") == "helm"),
                       key=lambda item: int(item["metadata"]["labels"]["version"]))
        release = json.loads(gzip.decompress(base64.b64decode(base64.b64decode(item["data"]["release"]))).decode())
        release["info"]["status"] = item["metadata"]["labels"]["status"] = status
        item["data"]["release"] = base64.b64encode(base64.b64encode(gzip.compress(json.dumps(release).encode()))).decode()
        urllib.request.urlopen(urllib.request.Request(f"{path}/{item['metadata']['name']}", json.dumps(item).encode(), method="PUT")).close()

    def test_whatever_helm_was_in_the_middle_of_the_next_run_ends_it(self):
        """D-25, P-9: "another operation is in progress" is helm's last word otherwise; it goes back to what was made here, not to what failed."""
        self.publish(values={"greeting": "a"})
        self.device.cycle()
        for status in ("pending-rollback", "failed", "uninstalling", "superseded", "pending-install"):
            made = self.device.state()["deployments"][HELLO]["components"][0]["services"]["release"]["hash"]
            for _ in range(2):
                self.helm("upgrade", f"web-{HELLO}", CHART, "--namespace", "plant-7", "--set", "greeting=bad")
            self.set_status(status)
            self.assertIn("drift", self.device.cycle(0), status)
            self.assertEqual((self.releases()[f"web-{HELLO}"][2], self.values()), ("deployed", {"greeting": "a"}), status)
            words = [item["description"] for item in json.loads(self.helm("history", f"web-{HELLO}", "--namespace", "plant-7", "--output", "json"))]
            self.assertEqual(f"Rollback to {made}" in words, status in ("pending-rollback", "failed"), words)
        self.calls()
        self.device.cycle(0)
        self.assertEqual([call[0] for call in self.calls()], ["list"])

    def publish_compose(self, deployment_id, greeting):
        self.wfm.publish(support.make_deployment(deployment_id, components=(("app", "1.0.0"),), registry=self.wfm.registry,
                                                 parameters={"GREETING": greeting}), deployment_id)

    def greetings(self):
        """{deployment: what its container was given}."""
        return {item["labels"]["org.margo.deployment"]: item["env"][0] for item in self.engine.containers().values()}

    def test_a_silent_cluster_holds_back_only_what_needs_it_and_so_does_a_silent_engine(self):
        """D-16, D-30: the run ends with 1 and says what it is; what was one kind and becomes the other waits for both."""
        self.wfm.add_package(support.make_compose(), "app")
        self.publish(values={"greeting": "a"})
        self.publish_compose(OTHER, "a")
        self.device.cycle()
        with open(self.kubeconfig) as file:
            good = file.read()
        support.write(self.kubeconfig, good.replace(self.cluster, f"http://127.0.0.1:{support.free_port()}"))
        self.publish(values={"greeting": "b"})
        self.publish_compose(OTHER, "b")
        self.calls()
        log = self.device.cycle(1)
        self.assertIn("the cluster does not answer", log)
        self.assertEqual((self.greetings(), [call[0] for call in self.calls()]), ({OTHER: "GREETING=b"}, ["list"]))
        self.assertEqual((self.wfm.statuses()[-1], self.wfm.statuses(OTHER)[-1]), ("installed", "installed"))
        planned = self.device.run("plan", "--json")
        self.assertEqual((planned.returncode, [item["action"] for item in json.loads(planned.stdout)["actions"]]), (1, ["keep", "keep"]))
        self.assertIn("waits (another revision): the cluster does not answer", planned.stdout)
        self.publish_compose(HELLO, "c")
        self.publish(values={"greeting": "c"}, deployment_id=OTHER)
        self.device.cycle(1)
        self.assertEqual(self.greetings(), {OTHER: "GREETING=b"})
        support.write(self.kubeconfig, good)
        self.device.cycle(0)
        self.assertEqual((self.greetings(), list(self.releases())), ({HELLO: "GREETING=c"}, [f"web-{OTHER}"]))

        self.engine.change(deaf=True)
        self.publish(values={"greeting": "d"}, deployment_id=OTHER)
        self.publish_compose(HELLO, "d")
        self.assertIn("the container engine does not answer", self.device.cycle(1))
        self.assertEqual(self.values(f"web-{OTHER}"), {"greeting": "d"})
        self.publish(values={"ready": False}, deployment_id=OTHER, timeout="0m3s")
        self.device.cycle(1)                        # the way back does not take the engine either
        self.assertIn("the version before runs again", self.wfm.reports(OTHER)[-1]["body"]["status"]["error"]["message"])
        self.publish_compose(OTHER, "d")
        self.device.cycle(1)
        self.assertEqual(list(self.releases()), [f"web-{OTHER}"])
        self.engine.change(deaf=False)
        self.device.cycle(0)
        self.assertEqual((self.greetings(), self.releases()), ({HELLO: "GREETING=d", OTHER: "GREETING=d"}, {}))

    def test_charts_need_the_registry_s_password_and_are_used_again_without_a_network(self):
        """P-1, P-20"""
        self.device.settings["registries"][self.registry].pop("username")
        self.device.save()
        self.publish()
        self.assertIn("PULL_UNAUTHORIZED", self.device.cycle(1))
        self.assertEqual(self.releases(), {})
        self.device.settings["registries"][self.registry]["username"] = "device"
        self.device.save()
        self.device.run("retry")
        self.device.cycle()
        self.device.settings["registries"][self.registry]["ca"] = self.pki.path("bundle.json")      # the registry is out of reach now
        self.device.save()
        self.helm("uninstall", f"web-{HELLO}", "--namespace", "plant-7")
        self.device.cycle()
        self.assertEqual(self.releases()[f"web-{HELLO}"][2], "deployed")

    def test_a_bad_value_fails_that_deployment_alone(self):
        self.publish(values={"a": 1, "a.b": 2})
        self.publish(deployment_id=OTHER)
        self.assertIn("PARAMETER_INVALID", self.device.cycle(1))
        self.assertEqual(list(self.releases()), [f"web-{OTHER}"])

    def test_a_long_name_is_still_one_s_own(self):
        """D-20"""
        self.publish(components=(LONG,))
        self.device.cycle()
        (name,) = self.releases()
        self.device.cycle()
        self.wfm.withdraw()
        self.device.cycle()
        self.assertEqual((self.releases(), len(name)), ({}, 53))

    def test_values_lie_in_a_file_for_the_owner_alone(self):
        """C-018, D-35"""
        self.publish(values={"greeting": "s3cret"})
        self.device.cycle()
        folder = os.path.join(self.device.state_dir, "deployments", HELLO, "web")
        (name,) = os.listdir(folder)
        self.assertEqual(os.stat(os.path.join(folder, name)).st_mode & 0o777, 0o600)
        self.assertEqual(support.read_json(os.path.join(folder, name)), {"greeting": "s3cret"})
        self.assertEqual(self.device.status()["deployments"][0]["state"], "installed")
        self.assertEqual(json.loads(self.device.run("capabilities").stdout)["properties"]["supportedDeploymentTypes"], ["compose", "helm"])


    def test_a_child_device_may_be_a_cluster(self):
        """Protocol 9, issue 3, gateways: each by its own KUBECONFIG; what moves is uninstalled there, also where that had to wait."""
        own, there = self.kubeconfig, self.start_cluster("other")[1]
        self.device.settings["runtime"].update(helm="off", kubeconfig=None)
        self.device.set("device.children", [make_child("a", {"KUBECONFIG": own}), make_child("b", {"KUBECONFIG": there})])
        documents = json.loads(self.device.run("capabilities").stdout)
        self.assertEqual([document["properties"]["supportedDeploymentTypes"] for document in documents], [["compose"], ["helm"], ["helm"]])

        def names():
            found = []
            for self.kubeconfig in (own, there):
                found.append([item["name"] for item in json.loads(self.helm("list", "-A", "-o", "json"))])
            return found

        self.publish(device=f"{support.DEVICE}/a")
        self.device.cycle()
        self.assertEqual(names(), [[f"web-{HELLO}"], []])
        with open(own) as file:
            good = file.read()
        support.write(own, good.replace("127.0.0.1", "127.0.0.99"), 0o600)        # cut off
        self.publish(device=f"{support.DEVICE}/b")
        self.device.cycle(1)
        support.write(own, good, 0o600)
        self.assertEqual(names(), [[f"web-{HELLO}"], [f"web-{HELLO}"]])
        self.device.cycle(0)
        self.assertEqual(names(), [[], [f"web-{HELLO}"]])


class Helm3(HelmCase, unittest.TestCase):
    version = "3"


class Helm4(HelmCase, unittest.TestCase):
    version = "4"


if __name__ == "__main__":
    unittest.main()
