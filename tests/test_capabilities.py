"""Capabilities: what the running system says, under what the operator says."""
import json
import os
import re
import unittest
from unittest import mock

import margo_agent
from tests import support

DETECTED = {"vendor": "v", "modelNumber": "m", "serialNumber": "s", "cpus": [{"cores": 4, "architecture": "amd64"}], "memory": "512Mi",
            "storage": "4096Mi", "peripherals": [], "interfaces": [{"type": "ethernet"}]}


def make_device(**members):
    return margo_agent.make_config({
        "wfm": {"url": "https://wfm.example"}, "identity": {"certificate": "c", "key": "k", "trust_bundle": "b"}, "device": members},
        "/", {}).device


class Document(unittest.TestCase):
    def test_a_hosting_device_says_what_it_can_do(self):
        """C-083, C-085, C-091: quantities without a space; at least one runtime and one deployment type."""
        document = margo_agent.make_capabilities(DETECTED, make_device(), "line-4", ["compose"])
        self.assertEqual(document, {"properties": dict(DETECTED, id="line-4", supportedRuntimes=["oci"], supportedDeploymentTypes=["compose"],
                                                       otelCollector=True)})

    def test_a_device_on_which_nothing_runs_workloads_says_nothing_of_hosting(self):
        """C-084"""
        document = margo_agent.make_capabilities(DETECTED, make_device(), "line-4", [])
        self.assertEqual(document, {"properties": {"id": "line-4", "vendor": "v", "modelNumber": "m", "serialNumber": "s"}})

    def test_the_operator_overrides_what_was_detected(self):
        """C-087: labels of every kind; names of one's own beside Margo's."""
        labels = {"hall": 4, "zone": "west", "clean": True, "tags": ["a", "b"], "slots": [1, 2]}
        device = make_device(vendor="Example", properties={"memory": "256Mi", "x-acme-extensions": {"plc": 1}}, labels=labels)
        document = margo_agent.make_capabilities(DETECTED, device, "line-4", ["compose"])
        self.assertEqual((document["properties"]["vendor"], document["properties"]["memory"], document["labels"]), ("Example", "256Mi", labels))
        self.assertEqual(document["x-acme-extensions"], {"plc": 1})

    def test_extensions_of_other_forms_are_refused_by_the_configuration(self):
        """C-090"""
        for properties in ({"x-acme": {}}, {"x-Acme-extensions": {}}, {"x-acme-extensions": 1}, {"x-": {}}):
            with self.assertRaises(margo_agent.ConfigError) as caught:
                make_device(properties=properties)
            self.assertIn("device.properties", caught.exception.message)

    def test_labels_of_other_kinds_are_refused_by_the_configuration(self):
        """C-087"""
        for value in ({"a": 1}, None, [True], [1, "a"], [[1]], float("nan"), [float("inf")]):
            with self.assertRaises(margo_agent.ConfigError) as caught:
                make_device(labels={"bad": value})
            self.assertIn("device.labels", caught.exception.message)


    def test_what_a_wfm_has_to_refuse_is_refused_by_the_configuration(self):
        """C-083, C-091: a fault of Margo's own properties is found where it was made, not at the WFM."""
        for name, values in {"otelCollector": (False, "true", None), "supportedRuntimes": ([], ["docker"], "oci", [7]),
                             "supportedDeploymentTypes": ([], ["helm.v3"], {}), "memory": ("59 Gi", "4Ti", 4, "Gi", "9" * 30 + "Gi"),
                             "storage": ("1 Ti", "1T"), "vendor": (5, "", None), "serialNumber": ([],),
                             "cpus": ([], {}, [4], [{}], [{"cores": 0}], [{"cores": True}], [{"cores": float("inf")}], [{"cores": "4"}],
                                      [{"cores": 4, "architecture": "x86_64"}], [{"cores": 4, "architecture": None}]),
                             "peripherals": ("gpu", ["gpu"], [{}], [{"type": "GPU"}], [{"type": "gpu", "model": 7}]),
                             "interfaces": ({}, [{"type": "Ethernet"}], [None]), "own": (float("nan"), {1: "a", "b": 2})}.items():
            for value in values:
                with self.subTest(name=name, value=value):
                    with self.assertRaises(margo_agent.ConfigError) as caught:
                        make_device(properties={name: value})
                    self.assertIn("device.properties", caught.exception.message)
        good = {"cpus": [{"cores": 0.5, "architecture": "arm"}, {"cores": 4}], "memory": "8Gi", "storage": "1Ei", "peripherals": [],
                "interfaces": [{"type": "rs232"}], "otelCollector": True, "supportedRuntimes": ["oci"], "vendor": "v", "own": {"deep": [None, 1.5]}}
        self.assertEqual(make_device(properties=good).properties, good)

    def test_custom_comes_with_labels(self):
        """C-089: an application has to select on something."""
        child = {"id": "c", "vendor": "v", "modelNumber": "m", "serialNumber": "s", "connection": {"CONTAINER_HOST": "unix:///c"},
                 "properties": {"cpus": [{"cores": 1}], "memory": "1Gi", "storage": "1Gi", "supportedRuntimes": ["oci", "custom"]}}
        for properties in ({"supportedRuntimes": ["oci", "custom"]}, {"supportedDeploymentTypes": ["custom"]}):
            with self.assertRaises(margo_agent.ConfigError) as caught:
                make_device(properties=properties)
            self.assertIn("device.labels", caught.exception.message)
            self.assertEqual(make_device(properties=properties, labels={"acme.example/vm": "2"}).properties, properties)
        with self.assertRaises(margo_agent.ConfigError) as caught:
            make_device(children=[child])
        self.assertIn("device.children[0].labels", caught.exception.message)
        make_device(children=[dict(child, labels={"acme.example/vm": "2"})])

    def test_labels_are_the_operators_own_to_the_letter(self):
        """C-088: the same names in every report, told apart by case; the agent makes up none."""
        labels = {"plant.example/zone": "north", "Plant.example/zone": "south", "a b": 1, "/x~1": True}
        first, second = (margo_agent.make_capabilities(DETECTED, make_device(labels=labels), "line-4", ["compose"]) for _ in range(2))
        self.assertEqual((first["labels"], list(second["labels"])), (labels, list(labels)))
        self.assertNotIn("labels", margo_agent.make_capabilities(DETECTED, make_device(), "line-4", ["compose"]))

    def test_doctor_tells_of_labels_that_may_meet_another_ones(self):
        """C-088: Margo recommends a domain before a label's name."""
        class Place:
            settings = make_device(labels={"zone": "west", "plant.example/zone": "west", "example.com/": 1})
        level, words = margo_agent.examine_labels(mock.Mock(devices=[Place]))
        self.assertEqual(level, "warn")
        self.assertIn("device.labels example.com/, zone: ", words)
        Place.settings = make_device(labels={"plant.example/zone": "west"})
        self.assertFalse(margo_agent.examine_labels(mock.Mock(devices=[Place]))[1])


class Identifier(unittest.TestCase):
    def test_it_is_configured_or_taken_from_the_hardware(self):
        """C-086: URL-unreserved characters only."""
        root = support.make_folder(self)
        self.assertEqual(margo_agent.get_device_id(make_device(id="gw/a.b~c_1"), root), "gw/a.b~c_1")
        self.assertEqual(margo_agent.get_device_id(make_device(serialNumber="AB 12/3"), root), "AB-12-3")
        support.write(os.path.join(root, "etc/machine-id"), "0123456789abcdef\n")
        self.assertEqual(margo_agent.get_device_id(make_device(), root), "0123456789abcdef")
        support.write(os.path.join(root, "sys/class/dmi/id/product_serial"), "SN-77\n")
        self.assertEqual(margo_agent.get_device_id(make_device(), root), "SN-77")

    def test_an_image_that_has_not_booted_yet_has_no_machine_id(self):
        """F-18"""
        root = support.make_folder(self)
        for text in ("uninitialized", "0" * 32, ""):
            support.write(os.path.join(root, "etc/machine-id"), text + "\n")
            with self.assertRaises(margo_agent.ConfigError, msg=text):
                margo_agent.get_device_id(make_device(), root)

    def test_serial_numbers_that_only_look_like_placeholders_are_kept(self):
        """F-18"""
        root = support.make_folder(self)
        for text in ("1234", "0042", "NA-0042", "12345-7", "OEM-123", "System7", "77", "Unknown5", "1234567891", "TEST-4711", "10000000abcdef01"):
            support.write(os.path.join(root, "sys/class/dmi/id/product_serial"), text)
            self.assertEqual(margo_agent.get_device_id(make_device(), root), text)

    def test_placeholders_of_careless_makers_count_as_nothing(self):
        """F-18: all boards of a make would be one device."""
        root = support.make_folder(self)
        for text in ("To be filled by O.E.M.", "Default string", "None", "0000", "System Serial Number", "Not Specified",
                     "0123456789", "123456789", "1234567890", "12345", "0123456789ABCDEF", "INVALID", "Not Applicable",
                     "OEM", "O.E.M.", "Unknown", "xxxxxxxxxxxx", "Chassis Serial Number", "empty", "Standard",
                     "........", "--", "11111111", "N/A", "NA", "No Asset Tag", "SerialNumber", "(none)", "Not Provided", "9876543210", "TBD", "Serial",
                     "Type2 - Board Serial Number", "ffffffff-ffff-ffff-ffff-ffffffffffff", "00000000-0000-0000-0000-000000000000"):
            support.write(os.path.join(root, "sys/class/dmi/id/product_serial"), text)
            with self.assertRaises(margo_agent.ConfigError) as caught:
                margo_agent.get_device_id(make_device(), root)
            self.assertIn("device.id", caught.exception.message)

    def test_bad_ids_are_refused_by_the_configuration(self):
        for value in ("a b", "a//b", "/a", "a/", "..", "a/../b", "ä", ""):
            with self.assertRaises(margo_agent.ConfigError):
                make_device(id=value)


class Detection(unittest.TestCase):
    def make_root(self, files):
        root = support.make_folder(self)
        for path, text in files.items():
            support.write(os.path.join(root, path), text)
        return root

    def test_this_machine_is_described_in_margo_s_words(self):
        """D-31: detected, not a file that somebody has to write."""
        found = margo_agent.detect_properties("/")
        self.assertEqual(set(found), set(DETECTED))
        self.assertEqual(found["cpus"][0]["cores"], len(os.sched_getaffinity(0)))
        for key in ("memory", "storage"):
            self.assertTrue(re.match(r"[1-9][0-9]*Mi\Z", found[key]), found[key])

    def test_interfaces_that_come_and_go_with_containers_are_left_out(self):
        """C-082: or the capabilities would change with each container."""
        root = self.make_root({f"sys/class/net/{name}/type": "1" for name in ("eth0", "veth1a", "docker0", "podman1", "br-77", "cni0")})
        support.write(os.path.join(root, "sys/class/net/lo/type"), "772")
        support.write(os.path.join(root, "sys/class/net/br0/bridge/x"), "")
        support.write(os.path.join(root, "sys/class/net/br0/type"), "1")
        self.assertEqual({item["type"] for item in margo_agent.detect_properties(root, root)["interfaces"]}, {"ethernet"})

    def test_interfaces_are_told_apart(self):
        root = self.make_root({"sys/class/net/wlan0/wireless/x": "", "sys/class/net/can0/type": "280", "sys/class/net/wwan0/type": "1",
                               "sys/class/bluetooth/hci0/x": "", "sys/bus/usb/devices/usb1/x": "", "sys/class/tty/ttyS0/type": "4",
                               "sys/class/tty/ttyS1/type": "0"})
        self.assertEqual({item["type"] for item in margo_agent.detect_properties(root, root)["interfaces"]}, {"wifi", "canbus", "cellular", "bluetooth", "usb", "rs232"})

    def test_peripherals_are_what_sys_shows(self):
        root = self.make_root({"sys/class/drm/card0/x": "", "sys/class/drm/card0-HDMI-A-1/status": "connected",
                               "sys/class/video4linux/video0/name": "USB Camera", "sys/class/sound/pcmC0D0c/x": "",
                               "sys/class/sound/pcmC0D0p/x": ""})
        kinds = [item["type"] for item in margo_agent.detect_peripherals(root)]
        self.assertEqual(kinds, ["gpu", "display", "camera", "microphone", "speaker"])
        self.assertEqual(margo_agent.detect_peripherals(self.make_root({})), [])

    def test_the_name_of_the_host_is_told_only_where_that_is_asked_for(self):
        """Draft: one label as RFC 1123 has it, whatever the host is called; one that is none is left out."""
        self.assertNotIn("hostname", margo_agent.detect_properties("/"))
        for name, label in (("plc-4", "plc-4"), ("plc-4.plant.example", "plc-4"), ("plc_4", "plc"), ("x" * 70, "x" * 63), ("a" * 62 + "-b", "a" * 62),
                            ("_", None), ("", None), ("-", None), ("localhost", "localhost")):
            with self.subTest(name), mock.patch.object(margo_agent.os, "uname", return_value=mock.Mock(nodename=name, machine="x86_64")):
                self.assertEqual(margo_agent.detect_properties("/", hostname=True).get("hostname"), label)

    def test_two_looks_make_the_same_document(self):
        """P-19: a document that changed by itself would be reported at every poll."""
        self.assertEqual(margo_agent.detect_properties("/"), margo_agent.detect_properties("/"))


class Command(unittest.TestCase):
    def test_it_prints_the_document_that_the_wfm_accepts(self):
        pki = support.Pki(self)
        wfm, engine = support.Wfm(self, pki), support.FakeEngine(self)
        device = support.Device(self, pki, wfm, engine, {"device.properties": {"x-acme-extensions": {"plc": 1}}, "device.labels": {"hall": 4}})
        device.cycle()
        printed = json.loads(device.run("capabilities").stdout)
        held = support.read_json(wfm.path("state", "clients", support.DEVICE, "capabilities.json"))
        self.assertEqual(list(held.values()), [printed])
        self.assertEqual(json.loads(device.run("capabilities", "--json").stdout), printed)

    def test_a_draft_is_followed_where_a_setting_says_so(self):
        """The host's name is sent, and sent anew when it changes; values that the device has reach a container by the document's asking."""
        pki = support.Pki(self)
        wfm, engine = support.Wfm(self, pki), support.FakeEngine(self)
        wfm.add_package(support.make_compose())
        device = support.Device(self, pki, wfm, engine, {"device.hostname": True, "device.parameter_values": {"margo.device.dataPath": "/data"}})
        document = json.loads(support.make_deployment(parameters={"GREETING": "hi"}, registry=wfm.registry))
        document["spec"]["parameters"]["greeting"]["valueFrom"] = {"device": {"key": "margo.device.dataPath"}}
        wfm.publish(json.dumps(document))
        device.cycle()
        held = support.read_json(wfm.path("state", "clients", support.DEVICE, "capabilities.json"))
        self.assertEqual(held[support.DEVICE]["properties"]["hostname"], os.uname().nodename.partition(".")[0])
        self.assertEqual([container["env"] for container in engine.containers().values()], [["GREETING=/data"]])
        device.set("device.properties", {"hostname": "another"})
        device.cycle()
        held = support.read_json(wfm.path("state", "clients", support.DEVICE, "capabilities.json"))
        self.assertEqual(held[support.DEVICE]["properties"]["hostname"], "another")

    def test_without_an_engine_nothing_is_claimed(self):
        """Deployment types are those that are really there."""
        pki = support.Pki(self)
        device = support.Device(self, pki, url="https://localhost:1", settings={"runtime.compose": "off"})
        self.assertNotIn("supportedDeploymentTypes", json.loads(device.run("capabilities").stdout)["properties"])


if __name__ == "__main__":
    unittest.main()
