"""The protocol's example documents, every one of them: what is valid is taken, what is invalid is refused for its reason.

tests/data/examples holds valid documents of each generation, and invalid ones whose names say what is wrong.  What comes from a WFM goes
through a source whose wire is a folder; what goes to one is held against the checks of examples/wfm.py.
"""
import email.message
import importlib.util
import json
import os
import unittest

import margo_agent
from tests import support
from tests.support import digest

FOLDER = os.path.join(support.DATA, "examples")
COMPOSE, HELM, VIBRATION = ("5d3f0c1a-7b52-4c7e-9a44-0f6d2c9be101", "c2b7a9e4-1d0f-4e63-8f2b-6a5d4c3b2a02",
                            "0b9d6e71-3c48-4a5b-b0de-91f2a3c4d503")


def read(*path):
    """The bytes of an example."""
    with open(os.path.join(FOLDER, *path), "rb") as file:
        return file.read()


def load(*path):
    """The JSON value of an example."""
    return json.loads(read(*path).decode())


def load_wfm():
    """examples/wfm.py as a module: its checks are pure functions."""
    spec = importlib.util.spec_from_file_location("example_wfm", os.path.join(support.EXAMPLES, "wfm.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


WFM = load_wfm()


class Folder(margo_agent.HttpSource):
    """A source whose wire is a folder of examples: `answers` may change what a path gives, `asked` notes what was asked for."""

    def __init__(self, profile, base="https://wfm.plant.example", answers=None):
        super().__init__(margo_agent.make_config({
            "wfm": {"url": base}, "identity": {"certificate": "c", "key": "k", "trust_bundle": "b"}}, "/", {}))
        self.root = "/api/v1" if profile == "mtls" else "/api/v1/clients/c-31f0"
        documents = [read(profile, name) for name in os.listdir(os.path.join(FOLDER, profile)) if name.endswith(".yaml")]
        self.answers, self.asked = {digest(data): data for data in documents + [read(profile, "bundle.tar.gz")]}, []
        self.answers["deployments"] = read(profile, "state-manifest.json")
        self.answers.update(answers or {})

    def ask(self, method, url, headers, body, limit):
        self.asked.append((method, url, dict(headers)))
        answer = self.answers.get(url.rsplit("/", 1)[1], (404, {}, b""))
        status, fields, data = answer if isinstance(answer, tuple) else (200, {}, answer)
        message = email.message.Message()
        for name, value in fields.items():
            message[name] = value
        return margo_agent.Response(status, message, data)

    def fetch(self, accepted=None):
        """(the Desired or None, what was logged)"""
        lines = []
        old, margo_agent.log = margo_agent.log, lambda level, message, **facts: lines.append((level, message))
        try:
            return self.fetch_desired(accepted, lambda _: None), lines
        finally:
            margo_agent.log = old


def refuse(test, document):
    """The message with which a state manifest is refused, before anything else is asked for."""
    source = Folder("mtls", answers={"deployments": document})
    with test.assertRaises(margo_agent.Refused) as caught:
        source.fetch()
    test.assertEqual([url for _, url, _ in source.asked], ["https://wfm.plant.example/api/v1/deployments"])
    test.assertEqual(caught.exception.exit, 4)
    return caught.exception.message


class Valid(unittest.TestCase):
    def test_a_desired_state_is_taken_with_all_its_documents(self):
        """C-050, C-105, C-115, C-117: by the bundle where that is cheaper and one by one where there is none, the same bytes."""
        for profile, ids in (("mtls", [COMPOSE, HELM, VIBRATION]), ("signed", [COMPOSE, HELM])):
            manifest = load(profile, "state-manifest.json")
            for answers in ({}, {manifest["bundle"]["digest"]: (404, {}, b"")}):
                source = Folder(profile, answers=answers)
                desired, lines = source.fetch()
                self.assertEqual((desired.version, [entry.deployment_id for entry in desired.entries]), (manifest["manifestVersion"], ids))
                self.assertEqual([line for line in lines if line[0] == "warning"], [])
                for entry in desired.entries:
                    self.assertEqual(margo_agent.parse_deployment(desired.documents[entry.digest], entry.deployment_id).deployment_id, entry.deployment_id)
        data = margo_agent.parse_bundle(read("mtls", "bundle.tar.gz"), desired.entries[:0] + [
            margo_agent.ManifestEntry(item["deploymentId"], item["digest"], None) for item in load("mtls", "state-manifest.json")["deployments"]], 2 ** 20)
        self.assertEqual(sorted(data), sorted(item["digest"] for item in load("mtls", "state-manifest.json")["deployments"]))

    def test_addresses_of_another_origin_are_logged_once_and_never_asked(self):
        """C-058: whatever the manifest says, requests go to wfm.url alone; an unchanged poll says nothing of it again."""
        manifest = read("mtls", "state-manifest-other-origin.json")
        for name in ("deployments", load("mtls", "state-manifest.json")["bundle"]["digest"]):
            source = Folder("mtls", answers={"deployments": manifest, name: manifest if name == "deployments" else (404, {}, b"")})
            desired, lines = source.fetch()
            self.assertEqual(len(desired.documents), 3)
            self.assertEqual([words for level, words in lines if level == "warning" and "another origin" in words], [lines[-1][1]])
            self.assertEqual({url.split("/api")[0] for _, url, _ in source.asked}, {"https://wfm.plant.example"})
            accepted = {"version": desired.version, "digest": desired.digest, "etag": None}
            self.assertEqual(source.fetch(accepted), (None, []))

    def test_nothing_should_run_is_a_desired_state(self):
        """C-114"""
        desired, _ = Folder("mtls", answers={"deployments": read("mtls", "state-manifest-empty.json")}).fetch({"version": 42, "digest": "", "etag": None})
        self.assertEqual((desired.version, desired.entries, desired.documents), (43, [], {}))

    def test_deployments_of_every_generation_say_what_they_mean(self):
        """C-180, C-181, C-183, C-200: names, places, parameters, conditions."""
        deployment = margo_agent.parse_deployment(read("mtls", "application-deployment-compose.yaml"), COMPOSE)
        self.assertEqual((deployment.name, deployment.device_id, [(c.name, c.revision, c.wait, c.timeout) for c in deployment.components]),
                         ("line-monitor", "press-12", [("collector", "2.4.0", True, 270), ("dashboard", "1.0.3-rc.1_build.7", True, 300)]))
        self.assertEqual(margo_agent.make_variables(deployment, "collector"), {"SAMPLE_SECONDS": "15", "SITE_NAME": "Plant 7"})
        self.assertEqual(margo_agent.make_variables(deployment, "dashboard"), {"SITE_NAME": "Plant 7", "VERBOSE": "false"})
        margo_agent.check_eligibility(deployment.constraints, load("mtls", "device-capabilities.json"))
        helm = margo_agent.parse_deployment(read("mtls", "application-deployment-helm.yaml"), HELM)
        self.assertEqual([margo_agent.make_values(helm, name) for name in ("vision-db", "vision-api")],
                         [{"storage": {"retention": {"days": 30}}}, {"ingress": {"hosts": [{"name": "vision.plant.example"}]}}])
        for path, deployment_id, kind, device in (
                ("mtls/application-deployment-gateway-autonomous.yaml", VIBRATION, "compose", "cell-gw/*"),
                ("signed/application-deployment-a-compose.yaml", COMPOSE, "compose", ""), ("signed/application-deployment-a-helm.yaml", HELM, "helm", ""),
                ("signed/application-deployment-b-compose.yaml", VIBRATION, "compose", "cell-gw/drive-1"),
                ("git/application-deployment-compose.yaml", COMPOSE, "compose", ""), ("git/application-deployment-helm-mid-2024.yaml", HELM, "helm", "")):
            with self.subTest(path):
                deployment = margo_agent.parse_deployment(read(*path.split("/")), deployment_id)
                self.assertEqual((deployment.type, deployment.device_id, deployment.components[0].wait), (kind, device, True))
                if "SAMPLE" in read(*path.split("/")).decode():
                    self.assertEqual(margo_agent.make_variables(deployment, "collector"), {"SAMPLE_SECONDS": "15"})
        entries, _, ignored = margo_agent.parse_files([(name, read("git", name)) for name in sorted(os.listdir(os.path.join(FOLDER, "git")))
                                                       if name.endswith(".yaml")])
        self.assertEqual(([entry.deployment_id for entry in entries], ignored), ([COMPOSE, HELM], []))

    def test_trust_documents_are_taken(self):
        """C-034, C-036: unknown members and keys for other uses are passed over."""
        found = margo_agent.parse_discovery(read("mtls", "discovery.json"), "https://mis.plant.example/.well-known/margo", "plant.example", True)
        self.assertEqual(found.bundle_uri, "https://mis.plant.example/.well-known/spiffe/bundle.json")
        bundle = margo_agent.parse_trust_bundle(read("mtls", "trust-bundle.json"))
        self.assertEqual((len(bundle.anchors), bundle.sequence, bundle.refresh_hint), (1, 7, 3600))
        self.assertEqual(margo_agent.parse_ca(load("signed", "ca-certificate-response.json")["certificate"]), bundle.anchors)

    def test_problems_mean_what_they_say(self):
        """C-053, C-056, C-057: of both generations."""
        for path, status, kind, words, wait in (
                ("mtls/problem-semantic-error.json", 422, margo_agent.Refused, "properties.supportedRuntimes: at least one entry is needed", None),
                ("mtls/problem-too-many-requests.json", 429, margo_agent.Unreachable, "Too Many Requests", 20.0),
                ("signed/error-onboarding-rejected.json", 403, margo_agent.Untrusted, "Client rejected", None)):
            response = margo_agent.Response(status, email.message.Message(), read(*path.split("/")))
            with self.assertRaises(kind) as caught:
                margo_agent.check_response(response, "PUT it", 0)
            self.assertIn(words, caught.exception.message)
            self.assertEqual(caught.exception.retry_after, wait)

    def test_what_the_agent_sends_has_the_shape_of_the_examples(self):
        """C-131 to C-137, C-083, C-084: the same document from the same facts, and the example WFM takes both."""
        def record(deployment_id, name, device, *components):
            target = margo_agent.Target(deployment_id, digest(b"x"), 42, margo_agent.Deployment(
                deployment_id, name, "n", device, "compose", [margo_agent.Component(c, "", "", True, 0) for c in components], [], None), None)
            return margo_agent.begin_record(margo_agent.make_record(target, device), target)

        line = margo_agent.set_component(record(COMPOSE, "line-monitor", "press-12", "collector", "dashboard"), "collector", "installed")
        installing = margo_agent.set_component(line, "dashboard", "installing")
        self.assertEqual(margo_agent.make_status(installing), load("mtls", "deployment-status-installing.json"))
        failed = margo_agent.fail_record(line, "dashboard", margo_agent.ComponentError("INSTALL_TIMEOUT", "not running after 4m30s"), margo_agent.Clock(0, "", 0), 0)
        example = load("mtls", "deployment-status-failed.json")
        example["status"]["error"].update(code="INSTALL_TIMEOUT", message="component dashboard failed: not running after 4m30s")
        self.assertEqual(margo_agent.make_status(failed), example)
        error = margo_agent.ComponentError("103", "Autonomous placement not supported", source="cell-gw")
        refused = margo_agent.fail_record(record(VIBRATION, "vibration-watch", "cell-gw", "vibration"), None, error, margo_agent.Clock(0, "", 0), 0)
        self.assertEqual(margo_agent.make_status(refused), load("mtls", "deployment-status-gateway-103.json"))
        older = dict(load("signed", "deployment-status.json"), deviceId="press-12", adoptedManifestVersion=9)
        self.assertEqual(margo_agent.make_older_status({key: older[key] for key in older if key not in ("apiVersion", "kind")}, "a"),
                         load("signed", "deployment-status.json"))
        for name, text in (("installing", "compose"), ("failed", "compose"), ("gateway-103", "gateway-autonomous")):
            status = load("mtls", f"deployment-status-{name}.json")
            WFM.check_status(status, status["deploymentId"], [WFM.parse_deployment(read("mtls", f"application-deployment-{text}.yaml").decode())], None)
        WFM.check_status(load("signed", "deployment-status.json"), COMPOSE, [], "a")
        for profile, name, device_id, dialect in (("mtls", "", "press-12", None), ("mtls", "-child", "cell-gw/drive-1", None),
                                                  ("mtls", "-gateway-not-hosting", "cell-gw", None), ("signed", "-a", None, "a"),
                                                  ("signed", "-b", "press-12", "b")):
            WFM.check_capabilities(load(profile, f"device-capabilities{name}.json"), device_id, dialect)
        request = load("signed", "onboarding-request.json")
        self.assertEqual((request["apiVersion"], request["kind"]), ("onboarding.margo.org/v1alpha1", "OnboardingRequest"))
        margo_agent.parse_certificate(margo_agent.parse_ca(request["certificate"])[0])
        self.assertRegex(load("signed", "onboarding-response.json")["clientId"], r"^[^/\\]+$")


class Roads(unittest.TestCase):
    """C-105, C-106, C-112: documents come by a bundle or one by one; where one road fails the other is taken, and digests decide."""

    BUNDLE = load("mtls", "state-manifest.json")["bundle"]["digest"]
    ONE = load("mtls", "state-manifest.json")["deployments"][0]["digest"]

    def make_source(self, small, answers):
        """A source whose manifest makes the bundle, or single documents, the cheaper road."""
        manifest = load("mtls", "state-manifest.json")
        manifest["bundle"]["sizeBytes"] = 1 if small == "bundle" else 10 ** 6
        return Folder("mtls", answers=dict(answers, deployments=json.dumps(manifest).encode()))

    def roads(self, source):
        """The roads that were taken, in their order."""
        found = [url.split("/")[-2] for _, url, _ in source.asked[1:]]
        return ["bundles" if part == "bundles" else "single" for index, part in enumerate(found)
                if index == 0 or (part == "bundles") != (found[index - 1] == "bundles")]

    FAULTS = {"not there": (404, {}, b""), "a type of Margo's": (404, {}, b'{"type": "https://docs.margo.org/specification/problem-types#invalid-bundle"}'),
              "gone": (410, {}, b""), "unknown": (400, {}, b""), "moved": (302, {"Location": "https://elsewhere.example/"}, b""),
              "a part": (206, {}, b"x"), "other bytes": b"stale", "nothing": b"", "a page": b"<html>Please sign in</html>"}

    def test_where_the_first_road_fails_the_other_one_is_taken(self):
        for small, broken in (("bundle", self.BUNDLE), ("single", self.ONE)):
            for name, fault in self.FAULTS.items():
                with self.subTest(small=small, fault=name):
                    source = self.make_source(small, {broken: fault})
                    desired, lines = source.fetch()
                    self.assertEqual(sorted(desired.documents), sorted(entry.digest for entry in desired.entries))
                    self.assertEqual(self.roads(source), ["bundles", "single"] if small == "bundle" else ["single", "bundles"])
                    self.assertEqual([words for level, words in lines if level == "info"], ["documents are fetched the other way"])

    def test_a_bundle_whose_documents_are_others_is_no_road_either(self):
        """C-117: its digest is what the manifest says, but what is in it is not."""
        for content in (b"other", None):
            data = support.make_archive({"x.yaml": content} if content else {})
            source = self.make_source("bundle", {digest(data): data})
            manifest = json.loads(source.answers["deployments"].decode())
            manifest["bundle"].update(digest=digest(data), url=f"/api/v1/bundles/{digest(data)}")
            source.answers["deployments"] = json.dumps(manifest).encode()
            self.assertEqual(len(source.fetch()[0].documents), 3)

    def test_only_where_both_roads_fail_the_state_is_refused(self):
        for small in ("bundle", "single"):
            for name, fault in self.FAULTS.items():
                with self.subTest(small=small, fault=name):
                    source = self.make_source(small, {self.BUNDLE: fault, self.ONE: b"changed"})
                    with self.assertRaises(margo_agent.Refused) as caught:
                        source.fetch()
                    for words in ("; and before: ", COMPOSE, self.BUNDLE if isinstance(fault, tuple) else "bundle: digest mismatch"):
                        self.assertIn(words, caught.exception.message)
                    self.assertEqual(caught.exception.exit, 4)

    def test_what_asks_for_patience_or_is_denied_takes_no_other_road(self):
        for status, kind in ((503, margo_agent.Unreachable), (429, margo_agent.Unreachable), (403, margo_agent.Untrusted)):
            for small, broken in (("bundle", self.BUNDLE), ("single", self.ONE)):
                source = self.make_source(small, {broken: (status, {}, b"")})
                with self.subTest(status=status, small=small), self.assertRaises(kind):
                    source.fetch()
                self.assertEqual(len(self.roads(source)), 1)


class Answers(unittest.TestCase):
    """The forms in which HTTP may bring a valid manifest."""

    def test_an_etag_comes_back_as_it_came_whatever_its_form(self):
        """C-101, C-118: weak, without quotes, with odd characters, or none; what is not the digest only warns."""
        manifest = read("mtls", "state-manifest.json")
        for etag, warned in ((f'"{digest(manifest)}"', False), (f'W/"{digest(manifest)}"', True), (digest(manifest), True), ('"é;,"', True),
                             ("*", True), ('"' + "x" * 8000 + '"', True), ("", False), (None, False)):
            with self.subTest(etag and etag[:40]):
                source = Folder("mtls", answers={"deployments": (200, {} if etag is None else {"ETag": etag}, manifest)})
                desired, lines = source.fetch()
                self.assertEqual((desired.etag, any("ETag" in words for _, words in lines)), (etag, warned))
                accepted = {"version": desired.version, "digest": desired.digest, "etag": desired.etag}
                source.answers["deployments"] = (304, {}, b"") if etag else manifest
                self.assertIsNone(source.fetch(accepted)[0])
                self.assertEqual(source.asked[-1][2].get("If-None-Match"), etag or None)

    def test_the_last_etag_counts_also_where_the_manifest_is_the_same(self):
        """C-101, C-119: else a WFM that gives another one would send all of it with each poll, for ever."""
        source = Folder("mtls", answers={"deployments": (200, {"ETag": '"first"'}, read("mtls", "state-manifest.json"))})
        desired, _ = source.fetch()
        accepted = {"version": desired.version, "digest": desired.digest, "etag": desired.etag}
        for etag in ('"second"', None, '"third"'):
            source.answers["deployments"] = (200, {"ETag": etag} if etag else {}, read("mtls", "state-manifest.json"))
            self.assertIsNone(source.fetch(accepted)[0])
            self.assertEqual(accepted["etag"], etag)

    def test_no_content_type_changes_what_the_bytes_are(self):
        """C-105, C-108: it is digests that decide."""
        for kind in ("application/vnd.margo.manifest.v1+json; charset=utf-8", "APPLICATION/JSON", "text/html", "application/octet-stream", "", ";;"):
            source = Folder("mtls", answers={"deployments": (200, {"Content-Type": kind}, read("mtls", "state-manifest.json"))})
            self.assertEqual(source.fetch()[0].version, 42)

    def test_other_answers_are_no_desired_state(self):
        """C-102, C-106: neither another kind of success nor a part of the document; a wrong coding is a wrong digest."""
        manifest = read("mtls", "state-manifest.json")
        for status in (201, 202, 203, 204, 205, 206, 226):
            self.assertIn(f"HTTP {status}", refuse(self, (status, {}, manifest)))
        whole = digest(read("mtls", "application-deployment-helm.yaml"))
        for answer in ((206, {}, read("mtls", "application-deployment-helm.yaml")), (404, {}, b""), b"", read("mtls", "application-deployment-helm.yaml")[:-1],
                       read("mtls", "application-deployment-helm.yaml").replace(b"\n", b"\r\n")):
            source = Folder("mtls", answers={whole: answer, load("mtls", "state-manifest.json")["bundle"]["digest"]: (404, {}, b"")})
            with self.assertRaises(margo_agent.Refused):
                source.fetch()


MANIFESTS = {"bundle-missing": "bundle: found 'None'", "bundle-null-with-deployments": "if and only if", "bundle-present-without-deployments": "if and only if",
             "digest-algorithm-sha512": "deployments[0].digest", "digest-uppercase-hex": "deployments[0].digest", "duplicate-deployment-id": "occurs twice",
             "url-digest-differs": "deployments[0].url", "version-above-u64": "manifestVersion",
             "version-fractional": "manifestVersion", "version-zero": "manifestVersion"}
DEPLOYMENTS = {"application-id-uppercase": "spec.applicationId", "device-id-star-in-the-middle": "metadata.deviceId", "duplicate-yaml-key": "namespace",
               "id-not-uuid": "id: found", "memory-with-space": "capacityRequirements.memory", "repository-not-oci": "properties.repository",
               "revision-leading-v": "properties.revision", "revision-plus-build": "properties.revision", "timeout-in-seconds": "properties.timeout",
               "type-unknown": "deploymentProfile.type", "exists-with-values": None}
CAPABILITIES = {"mtls-capabilities-apiversion-not-allowed": "apiVersion", "mtls-capabilities-empty-runtimes": "properties.supportedRuntimes",
                "mtls-capabilities-extension-key-pattern": "x-Bad_Name-extensions", "mtls-capabilities-label-value-object": "labels.plant.example/nested",
                "signed-capabilities-kind-missing": "kind"}
STATUSES = {"adopted-version-missing": "adoptedManifestVersion", "component-entry-missing-for-dashboard": "components",
            "overall-not-most-severe": "status.state", "state-unknown": "status.state"}


class Invalid(unittest.TestCase):
    def test_every_invalid_example_is_driven_by_a_test_here(self):
        names = [f"mtls-manifest-{name}.json" for name in MANIFESTS] + [f"mtls-deployment-{name}.yaml" for name in DEPLOYMENTS]
        names += [f"{name}.json" for name in CAPABILITIES] + [f"mtls-status-{name}.json" for name in STATUSES]
        names += ["git-deployment-kind-wrong.yaml", "mtls-discovery-bundle-uri-not-https.json", "mtls-trust-bundle-no-x509-anchor.json"]
        self.assertEqual(sorted(names), sorted(os.listdir(os.path.join(FOLDER, "invalid"))))

    def test_manifests_are_refused_whole_and_nothing_else_is_asked_for(self):
        """C-058, C-103, C-106, C-107, C-109, C-114"""
        for name, words in MANIFESTS.items():
            with self.subTest(name):
                self.assertIn(words, refuse(self, read("invalid", f"mtls-manifest-{name}.json")))

    def test_deployments_fail_alone_with_the_field_named(self):
        """C-115, C-168, C-200, C-209: INVALID_DEPLOYMENT, UNSUPPORTED_TYPE, or not eligible."""
        for name, words in DEPLOYMENTS.items():
            with self.subTest(name):
                with self.assertRaises(margo_agent.ComponentError) as caught:
                    deployment = margo_agent.parse_deployment(read("invalid", f"mtls-deployment-{name}.yaml"), COMPOSE)
                    margo_agent.check_eligibility(deployment.constraints, load("mtls", "device-capabilities.json"))
                self.assertEqual(caught.exception.code, {"type-unknown": "UNSUPPORTED_TYPE", "exists-with-values": "NOT_ELIGIBLE"}.get(name, "INVALID_DEPLOYMENT"))
                self.assertIn(words or "takes no values", caught.exception.message)

    def test_what_is_no_applicationdeployment_is_ignored_in_git(self):
        entries, documents, ignored = margo_agent.parse_files([("a.yaml", read("invalid", "git-deployment-kind-wrong.yaml"))])
        self.assertEqual((entries, documents, ignored), ([], {}, ["a.yaml"]))

    def test_trust_documents_are_rejected(self):
        """C-033, C-037"""
        with self.assertRaises(ValueError) as caught:
            margo_agent.parse_discovery(read("invalid", "mtls-discovery-bundle-uri-not-https.json"), "https://mis.plant.example/", None, False)
        self.assertIn("trustBundleUri", str(caught.exception))
        with self.assertRaises(ValueError) as caught:
            margo_agent.parse_trust_bundle(read("invalid", "mtls-trust-bundle-no-x509-anchor.json"))
        self.assertIn("no X.509 anchor", str(caught.exception))

    def test_what_must_never_be_sent_the_example_wfm_refuses(self):
        """C-083, C-087, C-090, C-131 to C-134"""
        for name, field in CAPABILITIES.items():
            dialect = "a" if name.startswith("signed") else None
            with self.assertRaises(WFM.Problem) as caught:
                WFM.check_capabilities(load("invalid", f"{name}.json"), "press-12", dialect)
            found = [error["field"] for error in caught.exception.document["errors"]]
            self.assertEqual((found[0], set(found) - {field, "kind"}), (field, set()), name)        # the first one has a kind as well
        known = [WFM.parse_deployment(read("mtls", "application-deployment-compose.yaml").decode())]
        for name, field in STATUSES.items():
            with self.assertRaises(WFM.Problem) as caught:
                WFM.check_status(load("invalid", f"mtls-status-{name}.json"), COMPOSE, known, None)
            self.assertIn(field, [error["field"] for error in caught.exception.document["errors"]], name)


if __name__ == "__main__":
    unittest.main()
