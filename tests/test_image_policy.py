"""Image policy: policy.images decides which images may be pulled, before one is pulled or stopped.

Signature objects are made here by openssl, in the form that cosign gives them, and lie in Debian's docker-registry.
"""
import base64
import json
import os
import subprocess
import unittest
from unittest import mock

import margo_agent
from margo_agent import ComponentError
from tests import support
from tests.support import IMAGE, make_folder, require, write
from tests.test_engines import EngineCase, service
from tests.test_packages import DockerRegistry, MANIFEST, RegistryCase, digest, make_config

DIGEST = "sha256:" + "5" * 64
SIGNATURE = "dev.cosignproject.cosign/signature"
PAYLOAD_TYPE = "application/vnd.dev.cosign.simplesigning.v1+json"


def make_payload(image_digest, kind="cosign container image signature"):
    """What cosign signs."""
    return json.dumps({"critical": {"identity": {"docker-reference": "registry.example/app"}, "image": {"docker-manifest-digest": image_digest},
                                    "type": kind}, "optional": None}).encode()


def run_tool(*argv):
    """One command that has to succeed."""
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


class Keys:
    """Key pairs, made by openssl as cosign makes its own."""

    def make_key(self, name="cosign", *options):
        """The path of a public key; the private one lies beside it."""
        path = os.path.join(self.keys, name)
        run_tool("openssl", "genpkey", *(options or ("-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256")), "-out", path + ".key")
        run_tool("openssl", "pkey", "-in", path + ".key", "-pubout", "-out", path + ".pub")
        return path + ".pub"

    def sign(self, payload, name="cosign"):
        """The signature of a payload, as the annotation has it."""
        path = write(os.path.join(self.keys, "payload"), payload)
        out = os.path.join(self.keys, "signature")
        run_tool("openssl", "dgst", "-sha256", "-sign", os.path.join(self.keys, name + ".key"), "-out", out, path)
        with open(out, "rb") as file:
            return base64.b64encode(file.read()).decode()


def push_signature(registry, image_digest, layers, name="app"):
    """Puts a signature object with these (payload, annotation) beside an image."""
    def push_blob(data):
        place = registry.send("POST", f"/v2/{name}/blobs/uploads/", b"").headers["Location"]
        registry.send("PUT", f"{place}{'&' if '?' in place else '?'}digest={digest(data)}", data)
        return {"digest": digest(data), "size": len(data)}
    manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "config": dict(push_blob(b"{}"), mediaType="application/vnd.oci.image.config.v1+json"),
                "layers": [dict(push_blob(payload), mediaType=PAYLOAD_TYPE, annotations={SIGNATURE: text} if text else {})
                           for payload, text in layers]}
    registry.send("PUT", f"/v2/{name}/manifests/{image_digest.replace(':', '-')}.sig", json.dumps(manifest).encode(), MANIFEST)


class Judging(RegistryCase):
    """What needs no registry."""

    def judge(self, image, **images):
        return margo_agent.judge_image(image, make_config({}, self.folder, images=images))

    def test_pins_and_registries(self):
        pinned = f"registry.example:5000/team/app@{DIGEST}"
        cases = [
            (pinned, {}, ""), ("docker.io/library/redis:7", {}, ""), (pinned, {"pinned": True}, ""),
            (f"docker.io/library/redis:7@{DIGEST}", {"pinned": True}, ""),
            ("docker.io/library/redis:7", {"pinned": True}, "policy.images.pinned"),
            ("docker.io/library/redis", {"pinned": True}, "policy.images.pinned"),
            (pinned, {"registries": ["registry.example:5000"]}, ""), (pinned, {"registries": ["other", "registry.example:5000/"]}, ""),
            (pinned, {"registries": ["registry.example:5000/team"]}, ""), (pinned, {"registries": ["registry.example:5000/team/app"]}, ""),
            (pinned, {"registries": ["registry.example"]}, "policy.images.registries"),
            (pinned, {"registries": ["registry.example:5000/tea"]}, "policy.images.registries"),
            (pinned, {"registries": ["registry.example:5000/team/app/x"]}, "policy.images.registries"),
            ("registry.example.evil/app:1", {"registries": ["registry.example"]}, "policy.images.registries"),
            ("localhost/app:1", {"registries": ["docker.io"]}, "policy.images.registries"),
            ("docker.io/library/redis:7", {"registries": ["docker.io/library"]}, "")]
        for image, images, words in cases:
            with self.subTest(image=image, images=images):
                if not words:
                    self.assertEqual(self.judge(image, **images), image)
                    continue
                with self.assertRaises(ComponentError) as caught:
                    self.judge(image, **images)
                self.assertEqual(caught.exception.code, "POLICY_DENIED")
                self.assertIn(words, caught.exception.message)

    def test_objects_of_another_form_are_no_signatures(self):
        layer = {"digest": DIGEST, "annotations": {SIGNATURE: "YQ=="}}
        def parse(data):
            return margo_agent.parse_shaped(data, margo_agent.SIGNATURES)
        self.assertEqual(parse(json.dumps({"layers": [layer]}).encode()), {"layers": [layer]})
        for value in (None, [], {}, {"layers": None}, {"layers": [None]}, {"layers": [dict(layer, annotations=None)]}, {"layers": [dict(layer, digest=5)]},
                      {"layers": [dict(layer, digest="sha256:5")]}, {"layers": [dict(layer, annotations={})]}, {"layers": {"a": 1}}, {"layers": 5}):
            self.assertEqual(parse(json.dumps(value).encode()), {}, value)
        for data in (b"", b"{", b"\xff"):
            self.assertEqual(parse(data), {})

    def test_payloads_of_another_form_are_about_nothing(self):
        def is_about(data, digest=DIGEST):
            return bool(margo_agent.parse_shaped(data, margo_agent.make_payload_shape(digest)))
        self.assertTrue(is_about(make_payload(DIGEST)))
        self.assertFalse(is_about(make_payload(DIGEST), DIGEST[:-1] + "e"))
        for data in (b"", b"{}", b"[]", b"\xff", make_payload(DIGEST, "atomic container signature"), b'{"critical": {"type": 5}}', b'{"critical": 5}',
                     json.dumps({"critical": {"type": "cosign container image signature", "image": None}}).encode()):
            self.assertFalse(is_about(data), data)


class Signed(Keys, RegistryCase):
    """Against a real registry; what is signed is any manifest, as cosign has it."""

    def setUp(self):
        super().setUp()
        require("docker-registry", "openssl")
        self.keys = make_folder(self)
        self.key = self.make_key()
        self.registry = DockerRegistry(self)
        self.digest = self.registry.push(name="app")
        self.image = f"{self.registry.host}/app"

    def judge(self, image=None, key=None, registries=None):
        config = make_config(registries or {self.registry.host: {"insecure": True}}, self.folder, images={"cosign_key": key or self.key})
        return margo_agent.judge_image(image or self.image + ":1.0.0", config)

    def refuse(self, **options):
        with self.assertRaises(ComponentError) as caught:
            self.judge(**options)
        self.assertEqual(caught.exception.code, "POLICY_DENIED", caught.exception.message)
        self.assertIn("is not signed by policy.images.cosign_key", caught.exception.message)

    def put(self, *layers):
        push_signature(self.registry, self.digest, layers)

    def test_a_signed_image_is_pulled_by_the_digest_that_is_signed(self):
        payload = make_payload(self.digest)
        self.put((payload, self.sign(payload)))
        for image in (f"{self.image}:1.0.0", f"{self.image}@{self.digest}", f"{self.image}:other@{self.digest}"):
            self.assertEqual(self.judge(image), f"{self.image}@{self.digest}")

    def test_keys_of_both_kinds(self):
        payload = make_payload(self.digest)
        key = self.make_key("rsa", "-algorithm", "RSA")
        self.put((payload, self.sign(payload, "rsa")))
        self.assertEqual(self.judge(key=key), f"{self.image}@{self.digest}")
        self.refuse()

    def test_what_is_not_signed_by_the_key_is_denied(self):
        """Missing, by another key, for another image, of another kind, tampered with, no base64."""
        self.refuse()
        payload, other = make_payload(self.digest), make_payload(DIGEST)
        self.make_key("wrong")
        good = self.sign(payload)
        for layer in ((payload, self.sign(payload, "wrong")), (other, self.sign(other)), (payload.replace(b"null", b"true"), good),
                      (other, good), (payload, "no base64!"), (payload, None), (payload, ""), (payload, good[:-8] + "AAAA" + good[-4:]),
                      (make_payload(self.digest, "x"), self.sign(make_payload(self.digest, "x")))):
            with self.subTest(layer=layer):
                self.put(layer)
                self.refuse()
        self.put((payload, self.sign(payload, "wrong")), (other, self.sign(other)), (payload, good))
        self.assertEqual(self.judge(), f"{self.image}@{self.digest}", "one good signature among others will do")

    def test_a_tag_that_moves_needs_a_signature_of_its_own(self):
        payload = make_payload(self.digest)
        self.put((payload, self.sign(payload)))
        self.judge()
        self.registry.push(support.make_archive({"compose.yaml": "{}"}), name="app")
        self.refuse()

    def test_a_registry_that_is_away_is_no_verdict(self):
        self.registry.stop()
        with self.assertRaises(ComponentError) as caught:
            self.judge()
        self.assertEqual(caught.exception.code, "PULL_FAILED")

    def test_a_key_that_is_none_denies_and_doctor_says_so(self):
        payload = make_payload(self.digest)
        self.put((payload, self.sign(payload)))
        for path in (os.path.join(self.keys, "absent"), os.path.join(self.keys, "cosign.key"), write(os.path.join(self.keys, "text"), "x")):
            self.refuse(key=path)
            agent = mock.Mock(config=make_config({}, self.folder, images={"cosign_key": path}))
            with self.assertRaises(margo_agent.ConfigError):
                margo_agent.examine_images(agent)
        agent = mock.Mock(config=make_config({}, self.folder, images={"cosign_key": self.key}))
        self.assertEqual(margo_agent.examine_images(agent)[0], "ok")
        self.assertEqual(margo_agent.examine_images(mock.Mock(config=make_config({}, self.folder))), ("ok", ""))

    def test_a_mirror_brings_image_and_signature(self):
        payload = make_payload(self.digest)
        self.put((payload, self.sign(payload)))
        registries = {"plant.example": {"mirror": self.registry.host}, self.registry.host: {"insecure": True}}
        self.assertEqual(self.judge("plant.example/app:1.0.0", registries=registries), f"plant.example/app@{self.digest}")


class OnPodman(Keys, EngineCase):
    """The whole way: what is denied is not pulled and stops nothing; what is signed runs by its digest."""

    def test_only_what_is_signed_is_pulled_and_it_heals_without_its_registry(self):
        require("docker-registry", "openssl")
        self.keys = make_folder(self)
        registry = DockerRegistry(self)
        image = f"{registry.host}/app"
        self.engine.podman("push", "--tls-verify=false", IMAGE, f"{image}:1")
        policy = {"cosign_key": self.make_key()}
        self.device.settings["registries"][registry.host] = {"insecure": True}
        self.device.settings.setdefault("policy", {})["images"] = policy
        self.device.save()
        self.publish({"main": service(image=f"{image}:1")})
        self.device.cycle(1)
        error = self.wfm.reports()[-1]["body"]["components"][0]["error"]
        self.assertEqual((error["code"], image in error["message"]), ("POLICY_DENIED", True))
        self.assertNotIn(image, self.engine.podman("images", "--format={{.Repository}}"))

        config = make_config({registry.host: {"insecure": True}}, self.keys)
        found = digest(margo_agent.Registry(registry.host, config).get("app", "manifests/1", margo_agent.IMAGE_TYPES, 1 << 20).body)
        payload = make_payload(found)
        push_signature(registry, found, [(payload, self.sign(payload))])
        self.device.run("retry")
        self.device.cycle(0)
        self.assertEqual(self.engine.facts(self.name(), "{{.ImageName}}"), f"{image}@{found}")

        before = self.engine.containers()
        registry.push(name="other", tag="1")
        self.publish({"main": service(image=f"{registry.host}/other:1")}, tag="2.0.0")
        self.assertIn("POLICY_DENIED", self.device.cycle(1))
        self.assertEqual(self.engine.containers(), before)

        self.publish({"main": service(image=f"{image}:1")})
        self.device.run("retry")
        self.device.cycle(0)
        registry.stop()
        self.engine.podman("rm", "--force", "--time=0", self.name())
        self.assertIn("the image that is here is used", self.device.cycle(0))
        self.assertEqual(len(self.engine.containers()), 1)

        self.wfm.withdraw(self.deployment_id)
        self.device.cycle(0)
        self.assertNotIn(image, self.engine.podman("images", "--format={{.Repository}}"), "what the agent pulled is pruned")


class Settings(unittest.TestCase):
    def test_they_are_read(self):
        folder = make_folder(self)
        config = make_config({}, folder, images={"pinned": True, "registries": ["a.example"], "cosign_key": "key.pub"})
        self.assertTrue(config.policy.images.pinned)
        self.assertTrue(os.path.isabs(config.policy.images.cosign_key))


if __name__ == "__main__":
    unittest.main()
