"""A publisher that nobody here wrote: margot (PyPI margo-tooling) makes and pushes an application, the agent runs it.

margot needs Python 3.12, so .ci/run gives it an environment of its own.  The registry is Debian's docker-registry, the engine a
real podman.  The WFM's part is done by the test: it makes the deployment out of the application description that was pushed.
"""
import json
import os
import subprocess
import unittest

import margo_agent
from tests import support
from tests.support import DEVICE, HELLO, IMAGE
from tests.test_packages import DockerRegistry

PROJECT = """
apiVersion: v1
id: com-example-press
name: press
version: "{version}"
description: the counter of a press
repository: {host}/apps
compose:
  directory: compose
  version: "{version}"
  repository: {host}/components/press
"""
DESCRIPTION = """
apiVersion: margo.org/v1-alpha1
kind: ApplicationDescription
id: com-example-press
metadata:
  name: press
  version: "{version}"
  description: the counter of a press
  catalog: {{organization: [{{name: Example Industries, site: "https://example.com"}}]}}
deploymentProfiles:
  - type: compose
    id: com-example-press-compose
    components:
      - name: counter
        properties: {{repository: "oci://{host}/components/press", revision: "{version}", wait: true}}
parameters:
  greeting: {{value: "{greeting}", targets: [{{pointer: GREETING, components: [counter]}}]}}
  port: {{value: {port}, targets: [{{pointer: PORT, components: [counter]}}]}}
"""
COMPOSE = """
services:
  main:
    image: %s
    init: true
    command: [sh, -c, 'cat /etc/motd > /www/index.html; echo " $$GREETING" >> /www/index.html; exec httpd -f -p 80 -h /www']
    environment: [GREETING]
    ports: ["127.0.0.1:${PORT}:80"]
    volumes: ["./motd:/etc/motd:ro"]
""" % IMAGE


class Publisher(support.EngineCase):
    def setUp(self):
        support.require("margot", "docker-registry", "openssl")
        super().setUp()
        registry = DockerRegistry(self, self.pki)
        self.host = registry.host.replace("127.0.0.1", "localhost")
        self.port = support.free_port()
        self.project = support.make_folder(self)
        ca = self.pki.path("site-ca.pem")
        self.env = dict(os.environ, REQUESTS_CA_BUNDLE=ca, HOME=self.project, NO_COLOR="1", COLUMNS="200")
        self.device.settings["registries"][self.host] = {"ca": ca}
        self.device.save()

    def margot(self, *arguments):
        """One command of margot in the project; its output."""
        done = subprocess.run([support.find_margot()] + list(arguments), cwd=self.project, env=self.env, timeout=120,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
        self.assertEqual(done.returncode, 0, done.stdout)
        return done.stdout

    def publish(self, version, greeting):
        """Builds, checks and pushes a version; returns the description as it lies in what was built."""
        values = {"host": self.host, "version": version, "greeting": greeting, "port": self.port}
        for path, text in (("margo.yaml", PROJECT.format(**values)), ("margo/app.yaml", DESCRIPTION.format(**values)),
                           ("compose/compose.yaml", COMPOSE), ("compose/motd", f"press {version}")):
            support.write(os.path.join(self.project, path), text)
        self.margot("build", "--type", "all")
        self.margot("verify")
        self.margot("push", "--type", "all")
        with open(os.path.join(self.project, ".dist", version, "margo", "app.yaml")) as file:
            return margo_agent.load_yaml(file.read())

    def deploy(self, description):
        """What a WFM makes of an application description."""
        profile = description["deploymentProfiles"][0]
        self.wfm.publish(json.dumps({
            "id": HELLO, "metadata": {"name": description["metadata"]["name"], "namespace": "plant", "deviceId": DEVICE},
            "spec": {"applicationId": description["id"], "parameters": description["parameters"],
                     "deploymentProfile": {"type": profile["type"], "components": profile["components"]}}}))

    def test_an_application_of_margot_runs_is_updated_and_goes(self):
        """C-153, C-155, C-156: its archive has no entry for the folder at its top, its annotations lie on the manifest."""
        self.deploy(self.publish("1.0.0", "good morning"))
        self.device.cycle()
        self.assertEqual(support.fetch(self.port), "press 1.0.0 good morning")
        manifest = json.loads(self.margot("fetch", f"{self.host}/components/press:1.0.0"))
        self.assertEqual(manifest["artifactType"], "application/vnd.org.margo.component.compose+json")
        self.deploy(self.publish("1.1.0", "good evening"))
        self.device.cycle()
        self.assertEqual(support.fetch(self.port), "press 1.1.0 good evening")
        self.wfm.withdraw()
        self.device.cycle()
        self.assertEqual(self.engine.containers(), {})
        self.assertEqual(self.wfm.statuses(), ["pending", "installing", "installed"] * 2 + ["removing", "removed"])


if __name__ == "__main__":
    unittest.main()
