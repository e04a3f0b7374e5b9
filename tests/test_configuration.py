"""Configuration: every fault at once, each with its key, what was found and what is allowed."""
import os
import tempfile
import time
import unittest

import margo_agent

MINIMAL = {"wfm": {"url": "https://wfm.example"},
           "identity": {"certificate": "client.pem", "key": "client.key", "trust_bundle": "bundle.json"}}


def make(document=None, environ=None, **sections):
    """A configuration from the minimal one with sections replaced."""
    return margo_agent.make_config(dict(MINIMAL, **sections) if document is None else document, "/etc/margo", environ or {})


def faults(**sections):
    """The text of the ConfigError that the sections cause."""
    try:
        make(**sections)
    except margo_agent.ConfigError as error:
        return error.message
    return ""


class Reading(unittest.TestCase):
    def test_defaults_are_the_contracts(self):
        config = make()
        self.assertEqual(config.state_dir, "/var/lib/margo-agent")
        self.assertEqual(config.wfm.min_tls, "1.3")
        self.assertEqual(config.wfm.timeout, 30.0)
        self.assertEqual((config.poll.interval, config.poll.jitter), (60.0, 0.1))
        self.assertEqual(config.policy.max_document, 8 << 20)
        self.assertEqual(config.policy.max_artifact, 64 << 20)
        self.assertEqual(config.policy.privileged, "deny")
        self.assertEqual(config.identity.refresh, 3600.0)

    def test_a_compose_provider_is_refused(self):
        for name in ("docker compose", "docker-compose", "podman-compose", "nerdctl"):
            self.assertIn("expected one of auto, builtin, off", faults(runtime={"compose": name}))
        self.assertEqual([make(runtime={"compose": name}).runtime.compose for name in ("auto", "builtin", "off")], ["auto", "builtin", "off"])

    def test_what_of_the_host_applications_may_have_is_read(self):
        self.assertEqual((make().policy.host_network, make().policy.devices), ("deny", []))
        config = make(policy={"host_network": "allow", "devices": ["/dev/ttyUSB0", "/dev/serial/by-id/*"]})
        self.assertEqual((config.policy.host_network, config.policy.devices), ("allow", ["/dev/ttyUSB0", "/dev/serial/by-id/*"]))
        self.assertIn("policy.devices", faults(policy={"devices": ["/etc/passwd"]}))

    def test_relative_paths_are_relative_to_the_file(self):
        config = make(state_dir="state")
        self.assertEqual(config.state_dir, "/etc/margo/state")
        self.assertEqual(config.identity.key, "/etc/margo/client.key")

    def test_urls_stay_urls(self):
        identity = dict(MINIMAL["identity"], trust_bundle="https://mis.example/bundle")
        self.assertEqual(make(identity=identity).identity.trust_bundle, "https://mis.example/bundle")

    def test_a_url_that_no_request_can_carry_is_told_before_one_is_made(self):
        for url in ("https://wfm.example/stra\u00dfe", "https://wfm.example/\u2028", "https://wfm.example/a?b", "https://wfm.example/#"):
            with self.assertRaisesRegex(margo_agent.ConfigError, "wfm.url: .*expected an absolute https URL", msg=url):
                make(wfm={"url": url})

    def test_any_port_and_a_path_prefix_are_accepted(self):
        """C-051: port 443 is the default, any other is configuration, as is a path prefix."""
        self.assertEqual(make(wfm={"url": "https://[::1]:8082/v1alpha2/margo/"}).wfm.url, "https://[::1]:8082/v1alpha2/margo")

    def test_a_port_is_one_that_there_is(self):
        """Contract, exit code 2: a port beyond 65535 would be dialled modulo 65536."""
        for port, fits in (("1", True), ("443", True), ("59999", True), ("65535", True), ("65536", False), ("65600", False),
                           ("66000", False), ("70000", False), ("99999", False)):
            found = faults(wfm={"url": f"https://w:{port}"}, registries={f"r:{port}": {"mirror": f"m:{port}"}})
            for key in ("wfm.url", f"registries.r:{port}:", "mirror"):
                self.assertEqual(key in found, not fits, found)
        for mirror in ("m", "https://m:5000/", "[::1]:5000"):
            self.assertEqual(faults(registries={"r": {"mirror": mirror}}), "")
        self.assertIn("registries.r.mirror: found 'm/p', expected a host", faults(registries={"r": {"mirror": "m/p"}}))

    def test_numbers_keep_their_spelling_where_text_is_meant(self):
        document = margo_agent.load_yaml("wfm: {url: 'https://w', min_tls: 1.3}\nidentity: {certificate: c, key: k, trust_bundle: b}\n"
                                         "device: {serialNumber: 0042, modelNumber: 1.10}\n")
        config = make(document)
        self.assertEqual((config.device.serialNumber, config.device.modelNumber), ("0042", "1.10"))

    def test_environment_is_expanded_and_an_unset_name_is_an_error(self):
        self.assertEqual(make(environ={"HOST": "w"}, wfm={"url": "https://${HOST}.example"}).wfm.url, "https://w.example")
        self.assertIn("wfm.url: the environment variable 'HOST' is not set", faults(wfm={"url": "https://${HOST}.example"}))

    def test_the_environment_gives_switches_and_numbers_too(self):
        config = make(environ={"ON": "false", "N": "3"}, runtime={"prune": "${ON}"}, policy={"max_removals": "${N}"})
        self.assertEqual((config.runtime.prune, config.policy.max_removals), (False, 3))

    def test_registries_are_read_per_host(self):
        config = make(registries={"r.example:5000": {"insecure": True, "password_file": "pw"}})
        self.assertTrue(config.registries["r.example:5000"].insecure)
        self.assertEqual(config.registries["r.example:5000"].password_file, "/etc/margo/pw")

    def test_the_file_may_be_json(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "agent.json")
            with open(path, "wb") as file:
                file.write(margo_agent.make_json(MINIMAL))
            self.assertEqual(margo_agent.load_config(path).identity.key, os.path.join(folder, "client.key"))


    def test_every_setting_says_what_it_is_for_in_one_line(self):
        def check(schema, where):
            for key, row in schema.items():
                if isinstance(row, dict):
                    check(row, f"{where}{key}.")
                else:
                    self.assertRegex(row[2], r"\A[A-Za-z][ -~]{9,80}\Z", where + key)

        for schema in (margo_agent.SCHEMA, margo_agent.CHILD_SCHEMA, margo_agent.REGISTRY_SCHEMA):
            check(schema, "")


class Refusals(unittest.TestCase):
    def test_an_unknown_key_names_the_nearest_known_one(self):
        self.assertIn("poll.intervall: unknown key; did you mean poll.interval?", faults(poll={"intervall": "5s"}))
        self.assertIn("registries.r.mirorr: unknown key; did you mean registries.r.mirror?", faults(registries={"r": {"mirorr": "x"}}))

    def test_an_unknown_key_like_no_other_tells_what_there_is(self):
        self.assertIn("log.format: unknown key; known are level", faults(log={"format": "json"}))

    def test_a_word_of_another_type_is_told_the_words(self):
        """Writers of YAML 1.1 make false of off."""
        self.assertIn("identity.revocation: found 'False', expected one of off, soft, require",
                      faults(identity=dict(MINIMAL["identity"], revocation=False)))

    def test_no_secret_is_shown(self):
        for sections in ({"wfm": {"url": "https://bob:hunter2@wfm.example"}}, {"runtime": {"environment": {"TOKEN": ["hunter2"]}}},
                         {"runtime": {"environment": ["TOKEN=hunter2"]}}, {"runtime": {"environment": {"A-B": "hunter2"}}},
                         {"identity": dict(MINIMAL["identity"], key="pkcs11:object=k?pin-value=hunter2")}):
            text = faults(**sections)
            self.assertIn(": found ", text)
            self.assertNotIn("hunter2", text)
        self.assertIn("to text, which TOKEN is not", faults(runtime={"environment": {"TOKEN": None}}))

    def test_an_empty_file_name_is_none(self):
        """It would be the folder of the configuration, which would become the state directory."""
        for section in ({"state_dir": ""}, {"identity": dict(MINIMAL["identity"], key="")}, {"git": {"token_file": "a\0b"}}):
            self.assertIn(", expected a file name", faults(**section))

    def test_no_duration_is_longer_than_clocks_can_count(self):
        for text in ("3651d", 10 ** 30, "9" * 13):
            self.assertIn("poll.interval: found ", faults(poll={"interval": text}))
        self.assertEqual(make(poll={"interval": "3650d"}).poll.interval, 3650 * 86400.0)

    def test_a_registry_that_no_package_can_name_is_refused(self):
        for host in ("https://r.example", "r.example/team", ""):
            self.assertIn(f"registries.{host}: no registry; expected its host", faults(registries={host: {}}))
        make(registries={"r.example": {}, "[::1]:5000": None, "r:1": {}})

    def test_every_fault_is_reported_at_once(self):
        text = faults(poll={"interval": "soon", "jitter": "much"}, wfm={"url": "http://wfm.example"}, log={"level": "loud"})
        for part in ("poll.interval: found 'soon', expected a duration", "poll.jitter: found 'much'", "wfm.url: found 'http://wfm.example'",
                     "log.level: found 'loud', expected one of debug, info, warning, error"):
            self.assertIn(part, text)

    def test_what_is_needed_and_missing_is_named(self):
        with self.assertRaises(margo_agent.ConfigError) as caught:
            make({})
        for key in ("wfm.url", "identity.certificate", "identity.key", "identity.trust_bundle"):
            self.assertIn(key, caught.exception.message)

    def test_wrong_shapes_are_refused_by_the_name_of_the_section(self):
        for value in (1, "x", [], [1], {"a": {}}, None, True, {"1": None}, 1.5):
            for section in margo_agent.SCHEMA:
                fits = value is None and section not in ("wfm", "identity")
                fits |= section == "state_dir" and type(value) in (int, float, str) or section == "registries" and isinstance(value, dict)
                self.assertEqual(section in faults(**{section: value}), not fits, (section, value))

    def test_labels_have_the_types_of_the_capabilities(self):
        """C-087: label values are string, number, boolean, or a list of strings or numbers."""
        make(device={"labels": {"a": "x", "b": 1, "c": True, "d": ["x"], "e": [1, 2.5], "f": []}})
        for bad in ({"a": {}}, {"a": None}, {"a": [True]}, {"a": [1, "x"]}, {"a": [[1]]}):
            self.assertIn("device.labels", faults(device={"labels": bad}), bad)

    def test_device_ids_use_unreserved_characters(self):
        """C-086: device ids use only unreserved characters and `/`."""
        self.assertEqual(make(device={"id": "gw_1/dev~2.a"}).device.id, "gw_1/dev~2.a")
        for bad in ("a b", "a//b", "/a", "ä", "a%20", ".."):
            self.assertIn("device.id", faults(device={"id": bad}), bad)

    def test_a_missing_or_broken_file_is_a_configuration_error(self):
        with self.assertRaises(margo_agent.ConfigError) as caught:
            margo_agent.load_config("/nonexistent/agent.yaml")
        self.assertIn("/nonexistent/agent.yaml", caught.exception.message)


class Windows(unittest.TestCase):
    """Polling windows and downtime, device-local (C-230, C-231)."""

    def inside(self, window, moment):
        return margo_agent.covers(margo_agent.read_windows([window], ""), time.strptime(moment, "%Y-%m-%d %H:%M"))

    def test_weekdays(self):
        for moment, expected in (("2026-11-23 06:00", True), ("2026-11-23 05:59", False), ("2026-11-27 21:59", True),
                                 ("2026-11-27 22:00", False), ("2026-11-28 12:00", False)):
            self.assertEqual(self.inside("Mon-Fri 06:00-22:00", moment), expected, moment)

    def test_over_midnight(self):
        for moment, expected in (("2026-11-29 23:30", True), ("2026-11-30 01:59", True), ("2026-11-30 02:00", False),
                                 ("2026-11-29 01:00", False)):
            self.assertEqual(self.inside("Sun 22:00-02:00", moment), expected, moment)

    def test_weekdays_over_the_end_of_the_week(self):
        self.assertTrue(self.inside("Sat-Mon 00:00-24:00", "2026-11-23 12:00"))
        self.assertFalse(self.inside("Sat-Mon 00:00-24:00", "2026-11-24 12:00"))

    def test_absolute(self):
        for moment, expected in (("2026-12-24 00:00", True), ("2026-12-26 23:59", True), ("2026-12-27 00:00", False)):
            self.assertEqual(self.inside("2026-12-24T00:00/2026-12-27T00:00", moment), expected, moment)

    def test_what_is_no_window_is_refused(self):
        for bad in ("", "Mon", "06:00", "06:00-25:00", "Foo 06:00-07:00", "06:61-07:00", "2026-12-24T00:00/2026-12-23T00:00",
                    "2026-13-24T00:00/2026-14-23T00:00", "2027-02-29T00:00/2027-03-01T00:00",      # F-26
                    "2028-02-30T10:00/2028-02-30T11:00", "2027-01-01T00:00/2027-04-31T00:00"):
            with self.assertRaisesRegex(ValueError, "a window such as", msg=bad):
                margo_agent.read_windows([bad], "")


class Edges(unittest.TestCase):
    """Values just inside and just outside of what a setting takes."""

    def test_a_flag_is_a_boolean_or_its_word(self):
        for value, expected in ((True, True), (False, False), ("true", True), ("false", False)):
            self.assertIs(margo_agent.read_flag(value, ""), expected)
        for value in ("yes", "True", 1, 0, "", None):
            with self.assertRaisesRegex(ValueError, "true or false"):
                margo_agent.read_flag(value, "")

    def test_a_cpu_has_cores_and_one_of_three_architectures(self):
        for item, expected in (({"cores": 1}, True), ({"cores": 0.5, "architecture": "arm64"}, True), ({"cores": 4, "architecture": "amd64"}, True),
                               ({"cores": 4, "architecture": "arm"}, True), ({"cores": 0}, False), ({"cores": -1}, False), ({"cores": True}, False),
                               ({"cores": "4"}, False), ({"cores": 4, "architecture": "x86"}, False), ({}, False), ([], False)):
            self.assertIs(margo_agent.is_cpu(item), expected, item)

    def test_a_key_is_a_file_or_a_uri(self):
        """A path with a colon in it is a file, unless it begins as a URI does."""
        for key, expected in (("pkcs11:object=x", True), ("file:/x", True), ("/etc/a:b.key", False), ("client.key", False), ("C:key", False), ("", False)):
            self.assertIs(margo_agent.is_uri(key), expected, key)

    def test_equipment_has_a_known_type_and_texts(self):
        read = margo_agent.PROPERTIES["interfaces"]
        self.assertEqual(read([{"type": "wifi", "model": "x"}, {"type": "usb"}], ""), [{"type": "wifi", "model": "x"}, {"type": "usb"}])
        for value in ([{"type": "gpu"}], [{"model": "x"}], [{"type": "wifi", "speed": 5}], ["wifi"], {"type": "wifi"}, [{5: "wifi"}]):
            with self.assertRaisesRegex(ValueError, "a list with the types ethernet"):
                read(value, "")

    def test_what_a_fault_shows_of_a_value_keeps_secrets(self):
        for value, secret, shown in (("https://user:pass@host/x", False, "'https://...@host/x'"), ("pkcs11:x?pin-value=1234&y", False, "'pkcs11:x?pin-value=...&y'"),
                                     ({"a": 1}, False, "a mapping"), (["a"], True, "a list"), ("s3cret", True, "text"), (5, False, "'5'")):
            self.assertEqual(margo_agent.make_quote(value, secret), shown)

    def test_variables_are_put_into_lists_too(self):
        faults = []
        self.assertEqual(margo_agent.expand_environment({"a": ["${X}", ["${X}y"], 5, None]}, {"X": "v"}, "", faults), {"a": ["v", ["vy"], 5, None]})
        self.assertEqual(margo_agent.expand_environment(["${Z}"], {}, "top.list.", faults), [""])
        (key, words), = faults
        self.assertEqual(key, "top.list")
        self.assertIn("the environment variable 'Z' is not set", words)

    def test_a_shape_that_does_not_fit_is_named_by_its_place(self):
        """Text, numbers, lists and mappings; `?` may be missing or null."""
        shape = {"a": [{"b": "x+"}], "c?": float, "d": dict}
        margo_agent.check_shape({"a": [{"b": "x"}, {"b": "xx", "z": 1}], "d": {}, "c": None}, shape, "")
        for value, words in (([], "the document: found '[]', expected a mapping"), ({}, "a: found 'None', expected a list"),
                             ({"a": [1]}, "a[0]: found '1', expected a mapping"), ({"a": [{"b": "x"}, {"b": "y"}]}, "a[1].b: found 'y', expected text of the form x+"),
                             ({"a": [], "c": -1}, "c: found '-1', expected a number"), ({"a": [], "c": True}, "c: found 'True', expected a number"),
                             ({"a": [], "c": 0, "d": "t"}, "d: found 't', expected a mapping")):
            with self.assertRaises(ValueError) as caught:
                margo_agent.check_shape(value, shape, "")
            self.assertEqual(str(caught.exception), words)

    def test_a_file_that_cannot_be_read_is_named(self):
        with self.assertRaises(margo_agent.ConfigError) as caught:
            margo_agent.load_config("/nonexistent/agent.yaml")
        for words in ("configuration /nonexistent/agent.yaml cannot be read (No such file or directory)", "-c or $MARGO_CONFIG"):
            self.assertIn(words, caught.exception.message)
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "agent.yaml")
            for text, words in (("a: [", "line 2, column 1"), ("nonsense: 1", "nonsense: unknown key")):
                with open(path, "w") as file:
                    file.write(text)
                with self.assertRaises(margo_agent.ConfigError) as caught:
                    margo_agent.load_config(path)
                self.assertIn(f"configuration {path}: ", caught.exception.message)
                self.assertIn(words, caught.exception.message)
