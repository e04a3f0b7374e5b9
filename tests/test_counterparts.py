"""Servers that are public but cannot be had here, by what is known of them: tests/stand_ins.py has their oddities.

Each goes through the same life: deploy, change a parameter, remove, and every run ends with 0.
"""
import json
import os
import unittest

from tests import support

PREFIX = "/v1alpha2/margo"


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

    def spoil(self, fixture):
        """Sets what the suite does wrong on purpose."""
        support.write(os.path.join(self.wfm.state, "fixture.json"), json.dumps({"negativeFixture": fixture}))

    def test_what_it_does_wrong_on_purpose_changes_nothing(self):
        """Its negative cases; a wrong size is nobody's business."""
        self.wfm.publish(self.make("one"))
        self.device.cycle()
        self.wfm.publish(self.make("two"))
        for fixture, words in (("digestAlgorithm", "sha512"), ("deploymentDigest", "digest"), ("version", "version")):
            with self.subTest(fixture):
                self.spoil(fixture)
                self.assertIn(words, self.device.cycle(4))
                self.assertEqual(self.greetings(), [["GREETING=one"]])
        for fixture, greeting in (("sizeBytes", "two"), ("bundleDigest", "three")):
            with self.subTest(fixture):
                self.spoil(fixture)
                self.wfm.publish(self.make(greeting))
                self.device.cycle()
                self.assertEqual(self.greetings(), [[f"GREETING={greeting}"]])


class Open2026(Life, unittest.TestCase):
    """The open WFM over mutual TLS."""

    kind = "open-2026"


if __name__ == "__main__":
    unittest.main()
