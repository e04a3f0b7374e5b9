"""Desired state: bytes to manifest and deployments, each rule of the wire checked, each refusal naming the field."""
import gzip
import io
import json
import os
import tarfile
import unittest
from unittest import mock

import margo_agent
from tests import support
from tests.support import HELLO, digest

BASE = "https://wfm.example:8443/margo"
OTHER = "9c1d6f0e-5c35-4c9f-9b43-2f6f6c1f7a11"


def make_manifest(**changes):
    """A valid manifest with one deployment as a value, and some members changed (None as a word: dropped)."""
    document, bundle = digest(b"document"), digest(b"bundle")
    manifest = {"manifestVersion": 7,
                "bundle": {"mediaType": "application/vnd.margo.bundle.v1+tar+gzip", "digest": bundle, "sizeBytes": 900,
                           "url": f"/api/v1/bundles/{bundle}"},
                "deployments": [{"deploymentId": HELLO, "digest": document, "sizeBytes": 300,
                                 "url": f"/api/v1/deployments/{HELLO}/{document}"}]}
    manifest.update(changes)
    return {key: value for key, value in manifest.items() if value != "dropped"}


def parse(manifest):
    return margo_agent.parse_manifest(json.dumps(manifest).encode(), BASE)


def entry(**changes):
    return [dict(make_manifest()["deployments"][0], **changes)]


def bundle(**changes):
    return dict(make_manifest()["bundle"], **changes)


class Manifest(unittest.TestCase):
    def test_a_manifest_is_read_whole(self):
        manifest = parse(make_manifest())
        self.assertEqual((manifest.version, manifest.bundle_digest, manifest.bundle_size), (7, digest(b"bundle"), 900))
        self.assertEqual(manifest.entries, [margo_agent.ManifestEntry(HELLO, digest(b"document"), 300)])

    def test_no_deployments_and_no_bundle_mean_that_nothing_should_run(self):
        """C-114: an empty desired state is a desired state."""
        manifest = parse(make_manifest(deployments=[], bundle=None))
        self.assertEqual((manifest.entries, manifest.bundle_digest), ([], None))

    def test_unknown_members_are_ignored(self):
        """C-116: a newer WFM may say more."""
        manifest = parse(make_manifest(comment="later", deployments=entry(note=1), bundle=bundle(note=2)))
        self.assertEqual(len(manifest.entries), 1)

    def test_versions_keep_their_full_precision(self):
        """D-5: no version passes through a float."""
        for version in (1, 2 ** 24 + 1, 2 ** 53 + 1, 2 ** 64 - 1):
            self.assertEqual(parse(make_manifest(manifestVersion=version)).version, version)

    def test_a_float_is_a_version_as_long_as_it_tells_which(self):
        """C-103, D-5: 2^53 + 1 with a fraction of zero reads as 2^53, so from there on a float says nothing."""
        whole = json.dumps(make_manifest())
        for text, version in (("7.0", 7), ("1e2", 100), ("9007199254740991.0", 2 ** 53 - 1)):
            manifest = margo_agent.parse_manifest(whole.replace(": 7", f": {text}", 1).encode(), BASE)
            self.assertEqual((manifest.version, type(manifest.version)), (version, int))
        for text in ("9007199254740993.0", "9007199254740992.0", "1e19", "1e400", "-0.0", "1" + "0" * 5000):
            with self.assertRaises(margo_agent.Refused):
                margo_agent.parse_manifest(whole.replace(": 7", f": {text}", 1).encode(), BASE)

    def test_every_fault_of_a_manifest_refuses_it_and_is_named(self):
        """C-107, C-109, C-058: exit code 4, with the field."""
        sha512 = "sha512:" + "a" * 128
        table = (
            ("manifestVersion", make_manifest(manifestVersion=0)), ("manifestVersion", make_manifest(manifestVersion=-1)),
            ("manifestVersion", make_manifest(manifestVersion=2 ** 64)), ("manifestVersion", make_manifest(manifestVersion=1.5)),
            ("manifestVersion", make_manifest(manifestVersion="7")), ("manifestVersion", make_manifest(manifestVersion=True)),
            ("manifestVersion", make_manifest(manifestVersion="dropped")), ("deployments", make_manifest(deployments="dropped")),
            ("deployments", make_manifest(deployments={})), ("deployments[0]", make_manifest(deployments=[7])),
            ("deployments[0].deploymentId", make_manifest(deployments=entry(deploymentId="../../etc"))),
            ("deployments[0].deploymentId", make_manifest(deployments=entry(deploymentId=None))),
            ("deployments[0].digest", make_manifest(deployments=entry(digest=sha512))),
            ("deployments[0].digest", make_manifest(deployments=entry(digest=digest(b"document").upper()))),
            ("deployments[0].digest", make_manifest(deployments=entry(digest=digest(b"document") + "\n"))),
            ("deployments[0].digest", make_manifest(deployments=entry(digest=" " + digest(b"document")))),
            ("occurs twice", make_manifest(deployments=entry() + entry(deploymentId=HELLO.upper()))),
            ("deployments[0].url", make_manifest(deployments=entry(url=7))),
            ("deployments[0].url", make_manifest(deployments=entry(url="https://[evil.example/x"))),
            ("deployments[0].url", make_manifest(deployments=entry(url="https://evil.example:none/x"))),
            ("does not end with", make_manifest(deployments=entry(url=f"/api/v1/deployments/{HELLO}/{digest(b'other')}"))),
            ("does not end with", make_manifest(deployments=entry(url=f"/../api/v1/deployments/{HELLO}/{digest(b'document')}"))),
            ("bundle: found 'None'", make_manifest(bundle="dropped")), ("if and only if", make_manifest(bundle=None)),
            ("if and only if", make_manifest(deployments=[])), ("bundle", make_manifest(bundle=[])),
            ("bundle.mediaType", make_manifest(bundle=bundle(mediaType="application/gzip"))),
            ("bundle.digest", make_manifest(bundle=bundle(digest=sha512))),
            ("bundle.url", make_manifest(bundle=bundle(url="/api/v1/bundles/" + digest(b"document")))))
        for expected, manifest in table:
            with self.subTest(expected=expected, manifest=manifest):
                with self.assertRaises(margo_agent.Refused) as caught:
                    parse(manifest)
                self.assertIn(expected, caught.exception.message)
                self.assertEqual(caught.exception.exit, 4)

    def test_json_that_leaves_doubt_is_refused(self):
        valid = json.dumps(make_manifest())
        for text in (b"", b"[]", b"null", b"\xff\xfe", valid.encode("utf-16"), valid.replace("{", '{"manifestVersion": 9, ', 1).encode(),
                     valid.replace("900", "NaN").encode(), b"[" * 100000, b"<html>Please sign in</html>"):
            with self.subTest(text=text[:30]):
                with self.assertRaises(margo_agent.Refused):
                    margo_agent.parse_manifest(text, BASE)

    def test_sizes_are_advice(self):
        """C-110: a wrong or odd size never refuses anything."""
        for size, known in ((None, None), ("many", None), (-1, None), (True, None), (1e9, 10 ** 9), (5, 5)):
            self.assertEqual(parse(make_manifest(deployments=entry(sizeBytes=size))).entries[0].size, known)

    def test_urls_of_another_origin_are_told_and_refuse_nothing(self):
        """C-058: a WFM behind a proxy names itself otherwise; what is never fetched does no harm."""
        document, known = digest(b"document"), (HELLO, digest(b"bundle"))
        for url in ("https://evil.example/x", f"http://wfm.example:8443/api/v1/deployments/{HELLO}/{document}", "ftp://x/y",
                    f"https://wfm.example/margo/api/v1/deployments/{HELLO}/{document}", "//[::1]:99/", "urn:x\x1b"):
            with self.subTest(url):
                manifest = parse(make_manifest(deployments=entry(url=url)))
                self.assertEqual(((manifest.entries[0].deployment_id, manifest.bundle_digest), manifest.foreign),
                                 (known, url.replace("\x1b", "\\x1b")))
        self.assertEqual(parse(make_manifest(bundle=bundle(url="https://wfm.example/b"))).foreign, "https://wfm.example/b")
        self.assertEqual(parse(make_manifest()).foreign, "")

    def test_urls_may_be_absolute_relative_or_escaped(self):
        document = digest(b"document")
        for url in (f"{BASE}/api/v1/deployments/{HELLO}/{document}", f"/api/v1/deployments/{HELLO}/{document.replace(':', '%3A')}",
                    f"/margo/api/v1/deployments/{HELLO}/{document}"):
            self.assertEqual(len(parse(make_manifest(deployments=entry(url=url))).entries), 1)


class Version(unittest.TestCase):
    ACCEPTED = {"version": 7, "digest": digest(b"seven")}

    def check(self, version, content, accepted=ACCEPTED):
        return margo_agent.check_version(margo_agent.Manifest(version, None, None, []), digest(content), accepted)

    def test_the_first_and_any_higher_version_is_new(self):
        self.assertTrue(self.check(1, b"one", None))
        self.assertTrue(self.check(8, b"eight"))

    def test_the_same_bytes_again_are_no_news(self):
        """C-119: equal version, equal bytes."""
        self.assertFalse(self.check(7, b"seven"))

    def test_an_older_version_and_the_same_with_other_content_are_refused(self):
        """C-103, C-104, D-5: a replay names both versions and what an operator can do."""
        for version, content in ((6, b"six"), (7, b"other"), (6, b"seven")):
            with self.assertRaises(margo_agent.Refused) as caught:
                self.check(version, content)
            for word in ("security: ", f"version {version}", "accepted: 7", "unenroll"):
                self.assertIn(word, caught.exception.message)


def load(text):
    return margo_agent.parse_deployment(text.encode(), HELLO)


def change(path, value, text=None):
    """A valid deployment with the member at a dotted path changed, or dropped where value is `...`."""
    document = json.loads(text or support.make_deployment(parameters={"GREETING": "hi"}))
    place, names = document, path.split(".")
    for name in names[:-1]:
        place = place[int(name) if name.isdigit() else name]
    if value is ...:
        place.pop(names[-1])
    else:
        place[int(names[-1]) if names[-1].isdigit() else names[-1]] = value
    return json.dumps(document)


PROFILE = "spec.deploymentProfile"
FIRST = f"{PROFILE}.components.0"


class Deployment(unittest.TestCase):
    def test_a_deployment_is_read_whole(self):
        deployment = load(support.make_deployment(parameters={"GREETING": "hi"}, timeout="2m5s", wait=False))
        self.assertEqual((deployment.name, deployment.namespace, deployment.device_id, deployment.type),
                         ("hello", "margo-demo", support.DEVICE, "compose"))
        self.assertEqual(deployment.components, [margo_agent.Component("web", "oci://localhost:5000/web", "1.0.0", False, 125)])
        self.assertEqual(deployment.parameters, [margo_agent.Parameter("greeting", "hi", [("GREETING", ["web"])])])

    def test_wait_is_true_by_default_and_may_be_spelt_as_text(self):
        """C-151"""
        for value, expected in ((..., True), (True, True), ("True", True), ("false", False)):
            text = support.make_deployment() if value is ... else support.make_deployment(wait=value)
            self.assertIs(load(text).components[0].wait, expected)

    def test_unknown_members_and_extensions_are_ignored_wherever_they_stand(self):
        """C-116"""
        for path in ("x-acme-extensions", "metadata.x-acme-extensions", "spec.x-acme-extensions", f"{PROFILE}.x-acme-extensions",
                     f"{FIRST}.x-acme-extensions", f"{FIRST}.properties.x-acme-extensions", "spec.parameters.greeting.x-acme-extensions"):
            self.assertEqual(load(change(path, {"anything": [1, {"b": None}]})).name, "hello")

    def test_a_document_of_another_deployment_is_refused(self):
        """C-115: a swapped document never runs under another's name."""
        with self.assertRaises(margo_agent.ComponentError) as caught:
            load(support.make_deployment(deployment_id=OTHER))
        self.assertIn(OTHER, caught.exception.message)
        self.assertEqual(caught.exception.code, "INVALID_DEPLOYMENT")

    def test_every_fault_fails_the_deployment_and_is_named(self):
        """D-20, D-26: the code is INVALID_DEPLOYMENT, the message names the field."""
        table = (
            ("id:", "id", "short"), ("metadata:", "metadata", []), ("spec:", "spec", ...), ("metadata.name", "metadata.name", "Not A Name"),
            ("metadata.namespace", "metadata.namespace", ...), ("metadata.deviceId", "metadata.deviceId", "a/*/b"),
            ("spec.applicationId", "spec.applicationId", "Upper"), (f"{PROFILE}:", PROFILE, "compose"),
            ("components:", f"{PROFILE}.components", []), ("components:", f"{PROFILE}.components", {}), ("components[0]:", FIRST, "web"),
            ("components[0].name", f"{FIRST}.name", "-web"), ("components[0].properties", f"{FIRST}.properties", ...),
            ("repository", f"{FIRST}.properties.repository", "https://example.com/web"), ("revision", f"{FIRST}.properties.revision", "v1.0"),
            ("revision", f"{FIRST}.properties.revision", "1.0.0+build"), ("timeout", f"{FIRST}.properties.timeout", "90s"),
            ("revision", f"{FIRST}.properties.revision", "1.0.1\u0663"), ("timeout", f"{FIRST}.properties.timeout", "\u0663m0s"),
            ("wait", f"{FIRST}.properties.wait", "perhaps"), ("spec.parameters:", "spec.parameters", []),
            ("spec.parameters.greeting.targets", "spec.parameters.greeting", {"value": 1}),
            ("spec.parameters.greeting.value", "spec.parameters.greeting.value", {"a": 1}),
            ("spec.parameters.greeting.targets", "spec.parameters.greeting.targets.0", {"pointer": "X"}),
            ("deviceConstraints:", f"{PROFILE}.deviceConstraints", []),
            ("memory", f"{PROFILE}.deviceConstraints", {"capacityRequirements": {"memory": "1 Gi"}}),
            ("cpu.cores", f"{PROFILE}.deviceConstraints", {"capacityRequirements": {"cpu": {"cores": "two"}}}),
            ("cpu.cores", f"{PROFILE}.deviceConstraints", {"capacityRequirements": {"cpu": {"cores": True}}}),
            ("cpu.cores", f"{PROFILE}.deviceConstraints", {"capacityRequirements": {"cpu": {"cores": -1}}}),
            ("cpu.cores", f"{PROFILE}.deviceConstraints", {"capacityRequirements": {"cpu": {}}}),
            ("architectures", f"{PROFILE}.deviceConstraints", {"capacityRequirements": {"cpu": {"cores": 1, "architectures": False}}}),
            ("architectures", f"{PROFILE}.deviceConstraints", {"capacityRequirements": {"cpu": {"cores": 1, "architectures": "arm64"}}}),
            ("capacityRequirements:", f"{PROFILE}.deviceConstraints", {"capacityRequirements": []}),
            ("capacityRequirements:", f"{PROFILE}.deviceConstraints", {"capacityRequirements": 0}),
            ("eligibilityRules:", f"{PROFILE}.deviceConstraints", {"eligibilityRules": {}}),
            ("eligibilityRules:", f"{PROFILE}.deviceConstraints", {"eligibilityRules": False}),
            ("memory", f"{PROFILE}.deviceConstraints", {"capacityRequirements": {"memory": "9" * 5000 + "Gi"}}),
            ("spec.parameters.greeting.value", "spec.parameters.greeting.value", [["a"]]),
            ("spec.parameters.greeting.value", "spec.parameters.greeting.value", [{"a": 1}]))
        for expected, path, value in table:
            with self.subTest(path=path, value=value):
                with self.assertRaises(margo_agent.ComponentError) as caught:
                    load(change(path, value))
                self.assertIn(expected, caught.exception.message)
                self.assertEqual(caught.exception.code, "INVALID_DEPLOYMENT")

    def test_conditions_that_say_nothing_are_none(self):
        """C-200"""
        for value in (None, {}, {"capacityRequirements": None, "eligibilityRules": None}, {"capacityRequirements": {}, "eligibilityRules": []},
                      {"capacityRequirements": {"cpu": None, "memory": None}, "later": 1},
                      {"capacityRequirements": {"cpu": {"cores": 0.5, "architectures": None}, "gpu": 1}}):
            with self.subTest(value):
                self.assertEqual(load(change(f"{PROFILE}.deviceConstraints", value)).constraints, value)

    def test_cores_that_are_no_number_are_refused(self):
        """C-200: what compares as false with everything would be met by every device."""
        with self.assertRaises(margo_agent.ComponentError) as caught:
            load("id: " + HELLO + """
metadata: {name: n, namespace: s, deviceId: d}
spec:
  applicationId: a
  deploymentProfile:
    type: compose
    components: [{name: c, properties: {repository: "oci://h/x", revision: "1.0.0"}}]
    deviceConstraints: {capacityRequirements: {cpu: {cores: .nan}}}
""")
        self.assertIn("cpu.cores", caught.exception.message)

    def test_a_value_that_the_device_has_to_find_is_not_taken_for_none(self):
        """C-182: the draft's valueFrom without a value to fall back on fails the deployment; with one, that counts."""
        with self.assertRaises(margo_agent.ComponentError) as caught:
            load(change("spec.parameters.greeting", {"valueFrom": {"device": {"key": "k"}}, "targets": []}))
        self.assertEqual(caught.exception.code, "PARAMETER_INVALID")
        self.assertIn("greeting", caught.exception.message)
        self.assertEqual(load(change("spec.parameters.greeting.valueFrom", {"device": {"key": "k"}})).parameters[0].name, "greeting")

    def test_a_value_that_the_device_has_comes_before_the_documents_own(self):
        """C-182, draft: a device-supplied value; what it does not have, or what is asked for in another form, falls back on `value`."""
        def value(source, values):
            text = change("spec.parameters.greeting.valueFrom", source)
            return margo_agent.parse_deployment(text.encode(), HELLO, values).parameters[0].value

        for source, expected in (({"device": {"key": "margo.device.dataPath"}}, "/data"), ({"device": {"key": "other"}}, "hi"), ({"device": {}}, "hi"),
                                 ({"device": "margo.device.dataPath"}, "hi"), ({"secret": {"key": "margo.device.dataPath"}}, "hi"), (None, "hi"),
                                 ({"device": {"key": ["margo.device.dataPath"]}}, "hi"), ("device", "hi"), ({"device": {"key": "list"}}, ["a", "b"])):
            with self.subTest(source):
                self.assertEqual(value(source, {"margo.device.dataPath": "/data", "list": ["a", "b"]}), expected)
                self.assertEqual(value(source, {}), "hi")
        alone = change("spec.parameters.greeting", {"valueFrom": {"device": {"key": "k"}}, "targets": []}).encode()
        self.assertEqual(margo_agent.parse_deployment(alone, HELLO, {"k": False}).parameters[0].value, False)
        with self.assertRaises(margo_agent.ComponentError) as caught:
            margo_agent.parse_deployment(alone, HELLO, {"K": 1})
        self.assertIn("device.parameter_values", caught.exception.message)

    def test_a_type_that_nothing_here_runs_has_a_code_of_its_own(self):
        """C-168"""
        with self.assertRaises(margo_agent.ComponentError) as caught:
            load(change(f"{PROFILE}.type", "wasm"))
        self.assertEqual(caught.exception.code, "UNSUPPORTED_TYPE")
        self.assertIn("'wasm'", caught.exception.message)

    def test_no_component_holds_its_device_back_for_ever(self):
        """P-9: while one is waited for, nobody can take it back."""
        for text, seconds in (("0m7s", 7), ("90m0s", 5400), ("999999m999999s", margo_agent.MAX_TIMEOUT)):
            self.assertEqual(load(support.make_deployment(timeout=text)).components[0].timeout, seconds)

    def test_a_component_whose_name_no_folder_can_have_is_refused(self):
        with self.assertRaises(margo_agent.ComponentError) as caught:
            load(support.make_deployment(components=(("w" * 250, "1.0.0"),)))
        self.assertEqual(caught.exception.code, "INVALID_DEPLOYMENT")
        self.assertIn("components[0].name", caught.exception.message)

    def test_two_components_of_one_name_are_refused(self):
        with self.assertRaises(margo_agent.ComponentError) as caught:
            load(support.make_deployment(components=(("web", "1.0.0"), ("web", "1.1.0"))))
        self.assertIn("occurs twice", caught.exception.message)

    def test_yaml_that_is_no_single_document_names_the_line(self):
        for text, place in (("id: 1\nid: 2\n", "line 2"), ("a: 1\n---\nb: 2\n", "line 2"), ("a: [1\n", "line"), ("- 1\n", "not a mapping")):
            with self.assertRaises(margo_agent.ComponentError) as caught:
                load(text)
            self.assertIn(place, caught.exception.message)


def read_example(*path):
    """The text of an example document of another generation."""
    with open(os.path.join(support.DATA, "dialects", *path)) as file:
        return file.read()


FILES = "https://files.plant.example"


def make_older(*, api="margo.org/v1alpha1", kind="ApplicationDeployment", metadata=None, spec=None, properties=None, type="compose", **members):
    """A document of an older generation as a value, in the shapes that public servers send; None: left out."""
    component = {"name": "collector", "properties": properties or {"packageLocation": f"{FILES}/collector.tar.gz"}}
    value = {"apiVersion": api, "kind": kind, "metadata": metadata or {"name": "monitor", "annotations": {"id": HELLO}},
             "spec": dict({"deploymentProfile": {"type": type, "components": [component]}}, **spec or {}), **members}
    return {key: item for key, item in value.items() if item is not None}


def make_current(**changes):
    """One of the current generation as a value, with members at dotted paths changed (`...`: dropped)."""
    text = support.make_deployment(parameters={"GREETING": "hi"})
    for path, value in changes.items():
        text = change(path.replace("__", "."), value, text)
    return json.loads(text)


HELM = {"repository": "oci://registry.plant.example/charts/collector", "revision": "2.4.0"}
REFERENCE = {"appPackageRef": {"id": "com-plant-collector", "version": "1.0"}}
# Documents of public repositories by their shapes: what became of each, "" where it is read.
PUBLIC = {
    "specification, first": (make_current(), ""),
    "specification, second": (make_current(metadata__x_note="a"), ""),
    "data model, compose": (make_current(spec__deploymentProfile__deviceConstraints={"capacityRequirements": {"cpu": {"cores": 1}}}), ""),
    "data model, helm": (make_current(spec__deploymentProfile__type="helm"), ""),
    "data model, 001": (make_current(**{"x-note-extensions": {}}), ""),
    "a gateway places it": (make_current(metadata__deviceId="cell-gw/*"), ""),
    "a server of rc.3": (make_current(spec__parameters={}), ""),
    "parameters and a bare file at a registry": (make_older(
        id=HELLO, properties={"packageLocation": "https://registry.plant.example/v2/web/blobs/sha256:" + "0" * 64},
        spec={"parameters": {"greeting": {"value": "hi", "targets": [{"pointer": "ENV.GREETING", "components": ["collector"]}]}}}), ""),
    "conformance suite, an application": (make_older(metadata={"name": HELLO}, spec=REFERENCE), ""),
    "conformance suite, generic": (make_older(metadata={"name": HELLO, "namespace": "x"}, spec=REFERENCE, type="helm", properties=HELM), ""),
    "conformance suite, many components": (make_older(
        metadata={"name": HELLO}, spec=REFERENCE, properties={"packageLocation": "oci://registry.plant.example/collector"}), "properties.packageLocation"),
    "its mock server, a path": (make_older(metadata={"name": HELLO}, properties={"packageLocation": "./collector.tar.gz"}), "properties.packageLocation"),
    "open WFM of 2025, compose": (make_older(
        kind="ApplicationDeploymentManifest", metadata={"id": HELLO, "name": "monitor"}, properties={
            "packageLocation": f"{FILES}/compose.yaml", "timeout": "5m"}), "properties.timeout"),
    "open WFM of 2025, helm": (make_older(
        kind="ApplicationDeploymentManifest", metadata={"id": HELLO, "name": "monitor"}, type="helm.v3", properties=dict(HELM, timeout="5m")),
        "properties.timeout"),
    "a client that knows its id by the name": (make_older(metadata={"name": HELLO, "namespace": "x"}), ""),
    "a component without properties": (make_older(
        metadata={"name": HELLO}, spec={"deploymentProfile": {"type": "compose", "components": [{"name": "collector"}]}}), "components[0].properties"),
    "a draft, the device has to know": (make_current(spec__parameters__greeting={"valueFrom": {"device": {"key": "k"}}, "targets": []}), "valueFrom"),
    "a draft, dots in the application": (make_current(metadata__targetName="x", spec__applicationId="com.plant.collector"), "spec.applicationId"),
}


class Public(unittest.TestCase):
    """What public servers and repositories hold: eighteen documents, and what stands in the way of those that are refused."""

    def test_each_is_read_or_refused_with_the_place(self):
        self.assertEqual(len(PUBLIC), 18)
        for name, (value, words) in PUBLIC.items():
            with self.subTest(name):
                if not words:
                    self.assertEqual(load(json.dumps(value)).deployment_id, HELLO)
                    continue
                with self.assertRaises(margo_agent.ComponentError) as caught:
                    load(json.dumps(value))
                self.assertIn(words, caught.exception.message)

    def test_an_id_is_found_where_servers_put_it(self):
        """F1: at the top, in the annotations, in metadata, or as a name; the first of these that is a UUID counts."""
        for metadata, top in (({"id": HELLO, "name": "n"}, None), ({"name": "n", "annotations": {"id": HELLO}}, None), ({"name": HELLO}, None),
                              ({"name": OTHER, "id": OTHER}, HELLO), ({"name": OTHER, "id": OTHER, "annotations": {"id": HELLO}}, None),
                              ({"name": "n", "id": HELLO, "annotations": None}, None), ({"id": HELLO, "annotations": {"id": None}}, None),
                              ({"name": HELLO, "id": "an-application"}, "its-name")):
            with self.subTest(metadata=metadata, top=top):
                self.assertEqual(load(json.dumps(make_older(metadata=metadata, id=top))).namespace, "default")
        self.assertEqual(load(json.dumps(make_older(metadata={"id": HELLO.upper()}))).name, HELLO)

    def test_the_current_generation_stays_as_strict_as_it_is(self):
        """Without `kind` and `apiVersion` nothing of this holds: an id in metadata is none, and the application is named."""
        for changes, words in (({"id": ..., "metadata__id": HELLO}, "id: found 'None'"), ({"id": ..., "metadata__name": HELLO}, "id: found 'None'"),
                               ({"spec__applicationId": ..., "spec__appPackageRef": {"id": "a"}}, "spec.applicationId: found 'None'"),
                               ({f"{FIRST.replace('.', '__')}__properties": {"packageLocation": f"{FILES}/x.tar.gz"}}, "properties.repository"),
                               ({"metadata__deviceId": ...}, "metadata.deviceId: found 'None'")):
            with self.subTest(words), self.assertRaises(margo_agent.ComponentError) as caught:
                load(json.dumps(make_current(**changes)))
            self.assertIn(words, caught.exception.message)

    def test_an_application_that_is_named_wrongly_is_refused_all_the_same(self):
        with self.assertRaises(margo_agent.ComponentError) as caught:
            load(json.dumps(make_older(spec={"applicationId": "Not A Name"})))
        self.assertIn("spec.applicationId: found 'Not A Name'", caught.exception.message)


class Dialects(unittest.TestCase):
    """Every generation's spelling of the same (protocol 0 and 3.3); tests/data/dialects has a document of each."""

    TABLE = {
        "mtls.yaml": ("monitor", "plant-7", "press-12", "compose", "oci://registry.plant.example/collector", "2.4.0"),
        "signed-b.yaml": ("monitor", "plant-7", "press-12", "compose", "https://files.plant.example/collector-2.4.0.tar.gz", ""),
        "signed-a-late.yaml": ("monitor", "plant-7", "", "compose", "https://files.plant.example/collector-2.4.0.tar.gz", ""),
        "signed-a-early.yaml": ("monitor", "plant-7", "", "helm", "oci://registry.plant.example/collector", "2.4.0"),
        "git-october-2024.yaml": ("monitor", "plant-7", "", "compose", "https://files.plant.example/collector-2.4.0.tar.gz", ""),
        "git-mid-2024.yaml": ("line-monitor", "default", "", "helm", "oci://registry.plant.example/collector", "2.4.0")}

    def test_each_generation_is_read_into_one_form(self):
        self.assertEqual(sorted(os.listdir(os.path.join(support.DATA, "dialects"))), sorted(self.TABLE))
        for name, expected in self.TABLE.items():
            with self.subTest(name):
                deployment = load(read_example(name))
                component, = deployment.components
                self.assertEqual((deployment.name, deployment.namespace, deployment.device_id, deployment.type, component.repository,
                                  component.revision), expected)
                self.assertEqual((component.name, component.wait, component.timeout), ("collector", True, 510))
                self.assertEqual(deployment.parameters, [margo_agent.Parameter("sampleSeconds", "15", [
                    ("SAMPLE_SECONDS" if deployment.type == "compose" else "sample.seconds", ["collector"])])])

    def test_the_current_form_is_left_as_it_is(self):
        value = json.loads(support.make_deployment())
        self.assertIs(margo_agent.parse_document(value)[0], value)

    def test_without_their_room_older_documents_are_refused_by_name(self):
        """A file from which the room was left out says why it does not take what a fleet manager sends."""
        with mock.patch.object(margo_agent, "DIALECTS", []), self.assertRaises(margo_agent.ComponentError) as caught:
            load(read_example("signed-b.yaml"))
        self.assertIn("of an older generation, which this agent was made without", caught.exception.message)

    def test_what_older_generations_may_leave_out_the_current_one_may_not(self):
        for path in ("metadata.deviceId", "metadata.namespace", "metadata.name", "spec.applicationId"):
            with self.assertRaises(margo_agent.ComponentError) as caught:
                load(change(path, ...))
            self.assertIn(path, caught.exception.message)

    def test_a_key_and_a_prefix_are_read_only_where_they_mean_something(self):
        text = read_example("signed-b.yaml")
        self.assertEqual(load(text).components[0].key_location, "https://files.plant.example/collector.asc")
        self.assertIsNone(load(read_example("signed-a-late.yaml")).components[0].key_location)
        current = load(change("spec.parameters.greeting.targets.0.pointer", "ENV.GREETING"))
        self.assertEqual(current.parameters[0].targets, [("ENV.GREETING", ["web"])])

    def test_every_fault_of_an_older_document_is_named(self):
        text = read_example("git-october-2024.yaml")
        for old, new, words in (("kind: ApplicationDeployment", "kind: Application", "kind: found 'Application'"),
                                (f"id: {HELLO}", "id: 7", "id: found '7'"), (f"    id: {HELLO}\n", "", "id: found 'None'"),
                                ("applicationId: line-monitor", "applicationId: Line", "spec.applicationId"),
                                ("https://files", "http://files", "packageLocation"), ("https://files", "file://files", "packageLocation"),
                                ("https://files", "https://user:secret@files", "packageLocation"), ("metadata:", "meta:", "metadata: found 'None', expected")):
            with self.subTest(new=new):
                self.assertIn(old, text)
                with self.assertRaises(margo_agent.ComponentError) as caught:
                    load(text.replace(old, new))
                self.assertIn(words, caught.exception.message)
                self.assertEqual(caught.exception.code, "INVALID_DEPLOYMENT")

    def test_the_names_of_a_refused_document_are_known_all_the_same(self):
        outline = margo_agent.make_outline(read_example("git-mid-2024.yaml").encode(), HELLO)
        self.assertEqual((outline.name, [component.name for component in outline.components]), ("line-monitor", ["collector"]))

    def test_a_document_without_names_has_no_outline(self):
        for text in ("", "[1", "[]", "{}", "metadata: {name: x}", "{metadata: {name: x}, spec: 5}", "{metadata: 5, spec: {}}"):
            self.assertIsNone(margo_agent.make_outline(text.encode(), HELLO), text)


def parameters(*items):
    """A Deployment with (name, value, pointer, components) as its parameters."""
    return margo_agent.Deployment(HELLO, "hello", "x", support.DEVICE, "compose", [], [
        margo_agent.Parameter(name, value, [(pointer, list(names))]) for name, value, pointer, names in items], None)


class Variables(unittest.TestCase):
    def test_a_parameter_reaches_the_components_it_names_and_no_other(self):
        """C-180, C-182"""
        deployment = parameters(("a", "1", "A", ["web"]), ("b", "2", "B", ["db", "web"]), ("c", "3", "C", ["db"]))
        self.assertEqual(margo_agent.make_variables(deployment, "web"), {"A": "1", "B": "2"})
        self.assertEqual(margo_agent.make_variables(deployment, "db"), {"B": "2", "C": "3"})

    def test_values_become_text_as_they_were_spelt(self):
        """C-183: 1.10 stays 1.10."""
        for spelt, expected in (("1.10", "1.10"), ("007", "007"), ("0x1F", "0x1F"), ("true", "true"), ("1e3", "1e3"), ("[1, a]", '[1,"a"]'),
                                ("'quoted'", "quoted"), ('"two\\nlines"', "two\nlines")):
            value = margo_agent.load_yaml(f"value: {spelt}\n")["value"]
            self.assertEqual(margo_agent.make_variables(parameters(("p", value, "P", ["web"])), "web"), {"P": expected})

    def test_null_is_not_set_and_the_later_parameter_wins(self):
        deployment = parameters(("a", None, "A", ["web"]), ("b", "1", "B", ["web"]), ("c", "2", "B", ["web"]))
        self.assertEqual(margo_agent.make_variables(deployment, "web"), {"B": "2"})

    def test_names_that_would_steer_a_tool_are_refused(self):
        """C-184, D-18"""
        for pointer in ("COMPOSE_FILE", "docker_host", "CONTAINERS_CONF", "Podman_X", "CONTAINER_HOST", "A-B", "1A", "", "A=B", "A\nB"):
            with self.subTest(pointer=pointer):
                with self.assertRaises(margo_agent.ComponentError) as caught:
                    margo_agent.make_variables(parameters(("p", "v", pointer, ["web"])), "web")
                self.assertEqual(caught.exception.code, "PARAMETER_INVALID")
                self.assertNotIn("'v'", caught.exception.message)

    def test_names_that_differ_only_in_case_are_refused(self):
        """D-18"""
        with self.assertRaises(margo_agent.ComponentError) as caught:
            margo_agent.make_variables(parameters(("a", "1", "Name", ["web"]), ("b", "2", "NAME", ["web"])), "web")
        self.assertIn("differ only in case", caught.exception.message)


class ProjectName(unittest.TestCase):
    def test_a_name_holds_component_and_deployment(self):
        self.assertEqual(margo_agent.make_project_name("web", HELLO), f"web-{HELLO}")

    def test_no_two_deployments_meet_in_one_name(self):
        """D-19, D-20: also where the beginning is equal, or the tool's limit cuts the name."""
        ids = [HELLO, HELLO[:-1] + "1", HELLO[:-1] + "2", OTHER]
        names = [margo_agent.make_project_name(component, item) for item in ids for component in ("web", "web-", "w" * 60, "w" * 61, "web.a")]
        self.assertEqual(len(set(names)), len(names))
        self.assertTrue(all(len(name) <= 63 and name == name.lower() for name in names))

    def test_the_case_of_an_id_changes_nothing(self):
        self.assertEqual(margo_agent.make_project_name("web", HELLO.upper()), margo_agent.make_project_name("web", HELLO))


def make_bundle(files):
    """tar+gzip of {name: bytes or TarInfo}."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
            archive.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return buffer.getvalue()


ENTRIES = [margo_agent.ManifestEntry(HELLO, digest(b"one"), 3), margo_agent.ManifestEntry(OTHER, digest(b"two"), 3)]


class Bundle(unittest.TestCase):
    def refuse(self, data, expected, limit=10 ** 6):
        with self.assertRaises(margo_agent.Refused) as caught:
            margo_agent.parse_bundle(data, ENTRIES, limit)
        self.assertIn(expected, caught.exception.message)

    def test_entries_are_matched_by_digest_whatever_their_names(self):
        """C-117"""
        found = margo_agent.parse_bundle(make_bundle({"x/y": b"two", "../../etc/passwd": b"one"}), ENTRIES, 10 ** 6)
        self.assertEqual(found, {digest(b"one"): b"one", digest(b"two"): b"two"})

    def test_more_or_less_than_the_manifest_names_is_refused(self):
        """C-106"""
        self.refuse(make_bundle({"a": b"one"}), digest(b"two"))
        self.refuse(make_bundle({"a": b"one", "b": b"two", "c": b"three"}), digest(b"three"))

    def test_odd_entries_are_refused(self):
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        self.refuse(make_bundle({"a": b"one", "b": b"two", "link": link}), "link")

    def test_a_sparse_entry_is_refused_before_it_is_blown_up(self):
        """D-8: a header of 512 bytes may claim a file of 8 GiB that holds nothing but holes."""
        sparse = tarfile.TarInfo("sparse")
        sparse.type = tarfile.GNUTYPE_SPARSE
        header = bytearray(sparse.tobuf(tarfile.GNU_FORMAT))
        header[483:495] = b"100000000000"           # the real size, in octal
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        self.refuse(gzip.compress(bytes(header) + bytes(1024)), "sparse is not a regular file")

    def test_what_is_no_archive_is_refused(self):
        whole = make_bundle({"a": b"one", "b": b"two"})
        for data, words in ((b"", "cut short"), (b"garbage", "tar+gzip"), (whole[:-9], "cut short"), (whole + b"x", "follows"),
                            (gzip.compress(b"no tar at all" * 100), "")):
            self.refuse(data, words)

    def test_headers_that_say_more_than_there_is_are_refused_at_once(self):
        """A sparse file of a terabyte, and a size below zero by which CPython's reader comes back to the same header again and again."""
        for kind, size, real in ((tarfile.GNUTYPE_SPARSE, 0, 1 << 40), (tarfile.XHDTYPE, -512, 0), (tarfile.GNUTYPE_LONGNAME, -512, 0),
                                 (tarfile.REGTYPE, -512, 0), (tarfile.REGTYPE, -1024, 0)):
            info = tarfile.TarInfo("x")
            info.type = kind
            header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
            header[124:136] = b"\xff" + (256 ** 11 + size).to_bytes(11, "big") if size else header[124:136]
            if real:
                header[386:410], header[483:495] = b"00000000000\0" * 2, b"\x80" + real.to_bytes(11, "big")
            header[148:156] = b" " * 8
            header[148:156] = b"%06o\0 " % sum(header)
            with self.subTest(kind=kind), self.assertRaises(margo_agent.Refused) as caught:
                margo_agent.parse_bundle(gzip.compress(bytes(header) + bytes(4096)), [margo_agent.ManifestEntry(HELLO, digest(b"x"), 1)], 1 << 20)
            self.assertRegex(caught.exception.message, "regular file|negative size|invalid offset|does not name")   # newer ones take it for empty, or refuse it

    def test_what_unpacks_to_too_much_is_refused_before_it_is_unpacked(self):
        """D-8"""
        self.refuse(gzip.compress(b"\0" * 5000000), "more than 1000000")


class Edges(unittest.TestCase):
    """What lies just at a limit, on either side of it."""

    def test_a_manifest_has_at_most_ten_thousand_deployments(self):
        def make(count):
            return make_manifest(deployments=[dict(make_manifest()["deployments"][0], deploymentId=f"{number:08x}{HELLO[8:]}") for number in range(count)])

        with mock.patch.object(margo_agent, "MAX_DEPLOYMENTS", 3), mock.patch.object(margo_agent, "check_url", lambda *arguments: ""):
            self.assertEqual(len(parse(make(3)).entries), 3)
            with self.assertRaisesRegex(margo_agent.Refused, "deployments: expected a list of at most 3"):
                parse(make(4))

    def test_a_size_is_advice_where_it_is_a_size(self):
        """C-110"""
        for size, expected in ((0, 0), (1, 1), (2 ** 53 - 1, 2 ** 53 - 1), (2 ** 53, None), (-1, None), (1.0, 1), (True, None), ("1", None), (None, None)):
            self.assertEqual(margo_agent.parse_advice({"sizeBytes": size}), expected, size)

    def test_a_refusal_says_which_relation_a_version_has(self):
        """C-119"""
        accepted = {"version": 7, "digest": digest(b"one")}
        for version, words in ((7, "version 7 is the same version with other content (accepted: 7)"), (6, "version 6 is an older version (accepted: 7)")):
            with self.assertRaises(margo_agent.Refused) as caught:
                margo_agent.check_version(margo_agent.Manifest(version, None, None, [], ""), digest(b"two"), accepted)
            self.assertIn(words, caught.exception.message)
        self.assertIs(margo_agent.check_version(margo_agent.Manifest(7, None, None, [], ""), digest(b"one"), accepted), False)

    def test_one_word_of_an_older_document_is_enough_to_be_one(self):
        """Protocol 0: `kind` or `apiVersion`, whichever a server writes."""
        for key in ("kind", "apiVersion"):
            with mock.patch.object(margo_agent, "DIALECTS", []), self.assertRaisesRegex(ValueError, "older generation"):
                margo_agent.parse_document({key: "x"})

    def test_an_extension_that_json_cannot_write_is_left_out(self):
        """C-116: none ever fails, and none of them reaches a hook half."""
        value = {"x-good-extensions": {"a": 1}, "x-text-extensions": "t", 5: {}, "x-half-extensions": {"a": "\ud800"},
                 "x-endless-extensions": {"a": float("inf")}, "x-set-extensions": {"a": {1}}, "y": {}}
        self.assertEqual(margo_agent.find_extensions(value), {"x-good-extensions": {"a": 1}})

    def test_a_bundle_may_name_its_folder_and_has_its_limits(self):
        """C-117, P-15: one document by policy.max_document, all together by a share of policy.max_unpacked."""
        entries = [margo_agent.ManifestEntry(HELLO, digest(content), None) for content in (b"x" * 100, b"y" * 100)]
        folder, other = tarfile.TarInfo("./"), tarfile.TarInfo("other/")
        folder.type = other.type = tarfile.DIRTYPE

        def make(*members):
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
                for member in members:
                    archive.addfile(member)
                for name in "xy":
                    info = tarfile.TarInfo(name)
                    info.size = 100
                    archive.addfile(info, io.BytesIO(name.encode() * 100))
            return buffer.getvalue()

        unpack, total = margo_agent.unpack_tar, margo_agent.DOCUMENTS * 200
        self.assertEqual(len(margo_agent.parse_bundle(make(folder), entries, max(total, 20000), 100)), 2)
        with self.assertRaisesRegex(margo_agent.Refused, "is not a regular file"):
            margo_agent.parse_bundle(make(other), entries, 20000, 100)
        for most, document in ((20000, 99), (total - 8, 100)):
            with mock.patch.object(margo_agent, "unpack_tar", lambda data, most, count: unpack(data, 20000, count)), \
                    self.assertRaisesRegex(margo_agent.Refused, "longer than policy.max_document"):
                margo_agent.parse_bundle(make(folder), entries, most, document)
        with mock.patch.object(margo_agent, "unpack_tar", lambda data, most, count: unpack(data, 20000, count)):
            self.assertEqual(len(margo_agent.parse_bundle(make(), entries, total, 100)), 2)


if __name__ == "__main__":
    unittest.main()
