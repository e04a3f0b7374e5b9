"""Servers that are public but cannot be had here, by what is known of them: tests/stand_ins.py has their oddities.

Each goes through the same life: deploy, change a parameter, remove, and every run ends with 0.  Documents are spelt as each
server spells them.
"""
import json
import os
import unittest

from tests import support
from tests.support import DEVICE, HELLO

PREFIX = "/v1alpha2/margo"


def make_suite_deployment(greeting, properties):
    """A document as the conformance suite has it: the id is the name, the application is a reference to its package."""
    return json.dumps({
        "apiVersion": "margo.org/v1alpha1", "kind": "ApplicationDeployment",
        "metadata": {"name": HELLO, "namespace": "default", "deviceId": DEVICE},
        "spec": {"appPackageRef": {"id": "hello"},
                 "deploymentProfile": {"type": "compose", "components": [{"name": "web", "properties": properties}]},
                 "parameters": {"greeting": {"value": greeting, "targets": [{"pointer": "GREETING", "components": ["web"]}]}}}})


def make_open_deployment(greeting, location):
    """A document as the open WFM of 2025 has it: a kind of its own, the id in the metadata, no application."""
    return json.dumps({
        "apiVersion": "application.margo.org/v1alpha1", "kind": "ApplicationDeploymentManifest",
        "metadata": {"id": HELLO, "name": "hello", "namespace": "default"},
        "spec": {"deploymentProfile": {"type": "compose", "components": [
            {"name": "web", "properties": {"packageLocation": location, "wait": True}}]},
            "parameters": {"greeting": {"value": greeting, "targets": [{"pointer": "GREETING", "components": ["web"]}]}}}})


class Life:
    """A server's stand-in, and the life of a deployment on it; `kind` and `profile` say which."""

    kind, profile, settings = None, "mtls", {}

    def setUp(self):
        self.pki = support.Pki(self)
        self.wfm = support.Wfm(self, self.pki, "--lenient", "--prefix", PREFIX, profile=self.profile, stand_in=self.kind)
        self.wfm.add_package(support.make_compose())
        self.engine = support.FakeEngine(self)
        self.device = support.Device(self, self.pki, self.wfm, self.engine, settings=self.settings, url=self.wfm.url + PREFIX)

    def make(self, greeting):
        """The document of the one deployment."""
        return support.make_deployment(parameters={"GREETING": greeting}, registry=self.wfm.registry)

    def greetings(self):
        """The environments of the containers that run."""
        return [container["env"] for container in self.engine.containers().values() if container["state"] == "running"]

    def test_deploy_change_a_parameter_remove(self):
        for greeting in ("one", "two"):
            self.wfm.publish(self.make(greeting))
            self.device.cycle()
            self.assertEqual(self.greetings(), [[f"GREETING={greeting}"]])
            self.device.cycle()
        self.wfm.withdraw()
        for _ in range(2):
            self.device.cycle()
        self.assertEqual(self.engine.containers(), {})
        self.assertEqual(self.wfm.statuses(), ["pending", "installing", "installed"] * 2 + ["removing", "removed"])
        self.assertEqual((self.device.status()["outbox"], self.device.run("doctor").returncode), (0, 0))


class Suite(Life, unittest.TestCase):
    """The conformance suite for device suppliers."""

    kind = "suite"

    def make(self, greeting):
        return make_suite_deployment(greeting, {"repository": f"oci://{self.wfm.registry}/web", "revision": "1.0.0"})

    def spoil(self, fixture):
        """Sets what the suite does wrong on purpose."""
        support.write(os.path.join(self.wfm.state, "fixture.json"), json.dumps({"negativeFixture": fixture}))

    def test_what_it_does_wrong_on_purpose_changes_nothing(self):
        """Its negative cases (C-105, C-106, C-107); a wrong size is nobody's business (C-110)."""
        self.wfm.publish(Life.make(self, "one"))
        self.device.cycle()
        self.wfm.publish(Life.make(self, "two"))
        for fixture, words in (("digestAlgorithm", "sha512"), ("deploymentDigest", "digest"), ("version", "version")):
            with self.subTest(fixture):
                self.spoil(fixture)
                self.assertIn(words, self.device.cycle(4))
                self.assertEqual(self.greetings(), [["GREETING=one"]])
        for fixture, greeting in (("sizeBytes", "two"), ("bundleDigest", "three")):
            with self.subTest(fixture):
                self.spoil(fixture)
                self.wfm.publish(Life.make(self, greeting))
                self.device.cycle()
                self.assertEqual(self.greetings(), [[f"GREETING={greeting}"]])


class SignedSuite(Life, unittest.TestCase):
    """The same over signed requests: a device is called by its client's id, a package is a file."""

    kind, profile, settings = "suite-signed", "signed-a", {"wfm.reported_id": "client"}

    def make(self, greeting):
        return make_suite_deployment(greeting, {"packageLocation": f"https://{self.wfm.registry}/files/web/1.0.0.tar.gz"})


class Open2025(Life, unittest.TestCase):
    """The open WFM of the first preview release: names of its own, and only its bundle can be had."""

    kind, profile, settings = "open-2025", "signed-a", {"wfm.reported_id": "client"}
    location = "files/web/1.0.0.tar.gz"

    def setUp(self):
        super().setUp()
        self.device.set("wfm.dialect", "a-2025")

    def make(self, greeting):
        return make_open_deployment(greeting, f"https://{self.wfm.registry}/{self.location}")


class Open2025Bare(Open2025):
    """A package there is as often the compose file itself."""

    location = "bare/web/1.0.0"


class Open2026(Life, unittest.TestCase):
    """The open WFM over mutual TLS."""

    kind = "open-2026"

    def test_what_it_never_heard_of_is_removed_and_holds_up_no_poll(self):
        """After a move from another WFM: the report of the removal is answered by 500, for ever."""
        self.wfm.publish(self.make("one"))
        self.device.cycle()
        self.assertEqual(self.device.run("unenroll").returncode, 0)
        self.wfm.stop()
        folder = support.make_folder(self)
        self.wfm = support.Wfm(self, self.pki, "--lenient", "--prefix", PREFIX, folder=folder, stand_in=self.kind)
        self.device.set("wfm.url", self.wfm.url + PREFIX)
        for _ in range(3):
            self.device.cycle(3)
            self.assertEqual(self.engine.containers(), {})
        self.assertEqual(len([item for item in self.wfm.requests() if item[:2] == ("GET", f"{PREFIX}/api/v1/deployments")]), 3)
        self.assertEqual({status for method, _, status in self.wfm.requests() if method == "POST"}, {500})
        self.wfm.add_package(support.make_compose())
        other = HELLO[:-1] + "1"
        self.wfm.publish(support.make_deployment(other, registry=self.wfm.registry), other)
        self.device.settings["registries"] = {self.wfm.registry: {"ca": self.pki.path("site-ca.pem")}}
        self.device.save()
        self.device.cycle(3)
        self.assertEqual(self.wfm.statuses(other)[-1], "installed")


if __name__ == "__main__":
    unittest.main()
