"""Command line: commands, options, exit codes, output for people and for machines."""
import importlib
import io
import json
import os
import re
import subprocess
import sys
import unittest
from unittest import mock

import margo_agent
from tests import support
from tests.support import HELLO

COMMANDS = ("enroll", "run", "plan", "status", "logs", "history", "doctor", "capabilities", "config", "csr", "retry", "unenroll", "version")


def run(*arguments, **env):
    return subprocess.run([sys.executable, support.AGENT] + list(arguments), env=dict({"PATH": os.environ["PATH"]}, **env),
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, timeout=support.LIMIT, stdin=subprocess.DEVNULL)


class Arguments(unittest.TestCase):
    def test_help_names_every_command_and_exit_code(self):
        done = run("--help")
        self.assertEqual(done.returncode, 0)
        for word in COMMANDS + ("-c FILE", "$MARGO_CONFIG", "/etc/margo/agent.yaml", "70 a bug"):
            self.assertIn(word, done.stdout)
        self.assertEqual(run().returncode, 2)

    def test_what_is_not_understood_is_named_with_what_would_be(self):
        """Exit 2"""
        for arguments, words in ((["fly"], ["fly", "unknown command", "enroll"]), (["statsu"], ["did you mean status?"]), (["run", "--onc"], ["did you mean --once?"]), (["run", "--fast"], ["--fast", "--once"]),
                                 (["plan", "x"], ["x", "no such operand"]), (["-c"], ["-c", "needs a value"]), (["-v"], ["no command"]),
                                 (["--log-format", "xml", "version"], ["--log-format", "text or json"]), (["csr", "--out"], ["--out", "needs a value"]),
                                 (["run", "--once=yes"], ["--once=yes", "takes no value"]), (["-vq", "status"], ["-v and -q"]), (["status", "--quiet", "--verbose"], ["-v and -q"])):
            with self.subTest(arguments=arguments):
                done = run(*arguments)
                self.assertEqual(done.returncode, 2)
                for word in words:
                    self.assertIn(word, done.stderr)

    def test_what_was_typed_wrong_is_said_to_who_typed_it(self):
        """In a line of its own form, not as an event of the log; nobody needs to take it."""
        self.assertEqual(run("statsu").stderr, "margo-agent: statsu: unknown command; did you mean status?\n")
        self.assertEqual(json.loads(run("--log-format", "json", "plan", "x").stderr)["code"], "CONFIGURATION")
        done = subprocess.run(["sh", "-c", f"{sys.executable} {support.AGENT} statsu 2>/dev/full"], timeout=support.LIMIT,
                              env=dict(os.environ, PYTHONUNBUFFERED=""))
        self.assertEqual(done.returncode, 2)

    def test_all_options_of_a_command_at_once_are_no_bug(self):
        for name, (_, usage) in margo_agent.COMMANDS.items():
            operands, options = margo_agent.parse_usage(usage)
            given = [f"{option}=7" if value else option for option, value in options.items() if option.startswith("--")]
            self.assertIn(run(name, *operands, *given, MARGO_CONFIG="/nonexistent").returncode, (0, 2), given)

    def test_options_may_stand_on_either_side_of_the_command(self):
        folder = support.make_folder(self)
        for arguments in (["-c", f"{folder}/none.yaml", "status"], ["status", "-c", f"{folder}/none.yaml"], [f"-c={folder}/none.yaml", "status"]):
            done = run(*arguments)
            self.assertEqual(done.returncode, 2)
            self.assertIn(f"{folder}/none.yaml", done.stderr)

    def test_the_configuration_is_found_by_the_environment(self):
        done = run("status", MARGO_CONFIG="/nowhere/agent.yaml")
        self.assertIn("/nowhere/agent.yaml", done.stderr)
        self.assertIn("/etc/margo/agent.yaml", run("status").stderr)

    def test_help_says_what_follows_an_option(self):
        self.assertRegex(run("help").stdout, r"(?s)enroll +\[--fetch-ca FILE\] .*plan +\[--json\] .*csr +\[--out FILE\] .*retry +\[NAME\] ")

    def test_help_on_a_command_explains_it_alone(self):
        """`COMMAND --help`, `-h` and `help COMMAND` are the same; no line is wider than a terminal."""
        for arguments in (["unenroll", "--help"], ["unenroll", "-h"], ["help", "unenroll"]):
            text = run(*arguments).stdout
            self.assertRegex(text, r"unenroll \[--purge\] +Deregisters")
            self.assertIn("never their volumes", text)
            self.assertNotIn("capabilities [--json]", text)
        for command in ("help",) + COMMANDS:
            done = run("help", command)
            self.assertEqual((done.returncode, done.stderr), (0, ""))
            self.assertLess(max(map(len, done.stdout.split("\n"))), 111)
        for command in COMMANDS:                    # the contract: "explains one command, with an example"
            self.assertRegex(run(command, "--help").stdout, rf"\n\nExample: margo_agent.py {command}\b")
            self.assertLess(max(map(len, done.stdout.split("\n"))), 111)
        self.assertLess(max(map(len, run("help").stdout.split("\n"))), 80)

    def test_options_have_long_and_glued_forms(self):
        folder = support.make_folder(self)
        path = f"{folder}/none.yaml"
        for arguments in (["--config", path], [f"--config={path}"], [f"-c{path}"], ["-vv", "--verbose", "-c", path]):
            done = run(*arguments, "status")
            self.assertEqual(done.returncode, 2, done.stderr)
            self.assertIn(path, done.stderr)
        self.assertIn("unknown option", run("-vx", "status").stderr)

    def test_version_names_the_profiles(self):
        self.assertEqual(run("--version").stdout, run("version").stdout)
        self.assertEqual(run("version").stdout, f"margo_agent {margo_agent.__version__} (profiles: {', '.join(margo_agent.PROFILES)})\n")


class Output(support.DeviceCase):
    def setUp(self):
        super().setUp()
        self.wfm.publish(support.make_deployment(registry=self.wfm.registry))

    def test_status_json_is_the_contract_s_object(self):
        self.device.cycle()
        status = self.device.status()
        self.assertEqual(set(status), {"version", "profile", "enrolled", "identity", "desiredState", "lastPoll", "outbox", "deployments", "dropped",
                                       "others", "waits"})
        self.assertEqual((status["profile"], status["enrolled"], status["identity"]["id"]), ("mtls", True, support.CLIENT_ID))
        self.assertEqual(status["desiredState"]["version"], 1)
        for moment in (status["identity"]["notAfter"], status["desiredState"]["acceptedAt"], status["lastPoll"]["at"]):
            self.assertTrue(re.match(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ\Z", moment), moment)
        (deployment,) = status["deployments"]
        self.assertEqual((deployment["deploymentId"], deployment["name"], deployment["state"]), (HELLO, "hello", "installed"))
        self.assertEqual(deployment["components"], [{"name": "web", "state": "installed", "error": {"code": "", "source": "", "message": ""}}])
        self.assertTrue(deployment["digest"].startswith("sha256:"))

    def test_status_before_anything_happened(self):
        status = self.device.status()
        self.assertEqual((status["enrolled"], status["desiredState"]["version"], status["deployments"], status["outbox"]), (False, None, [], 0))
        self.assertIn("not enrolled", self.device.run("status").stdout)

    def test_status_and_plan_for_people(self):
        self.assertRegex(self.device.run("plan").stdout, rf"desired state: version 1\ninstall +{HELLO}  new\n")
        self.engine.change(exits={"main": 4})
        self.device.cycle(1)
        text = self.device.run("status").stdout
        for words in ("mtls, enrolled", support.CLIENT_ID, "version 1", "failed", "hello", "exited with code 4"):
            self.assertIn(words, text)

    def test_plan_names_what_an_update_changes_and_shows_no_value(self):
        self.device.cycle()
        self.wfm.publish(support.make_deployment(registry=self.wfm.registry, parameters={"GREETING": "s3cret"}))
        text = self.device.run("plan").stdout
        self.assertRegex(text, rf"update +{HELLO}  another revision: parameter greeting\n")
        self.assertNotIn("s3cret", text)
        self.assertEqual(json.loads(self.device.run("plan", "--json").stdout)["actions"][0]["changes"], ["parameter greeting"])

    def test_plan_json_is_the_contract_s_object(self):
        document = json.loads(self.device.run("plan", "--json").stdout)
        self.assertEqual(document, {"version": 1, "actions": [{"deploymentId": HELLO, "action": "install", "reason": "new",
                                                                "deviceId": support.DEVICE, "changes": []}], "others": []})

    def test_the_log_is_one_line_an_event_in_text_or_json(self):
        text = self.device.cycle()
        for line in text.strip().split("\n"):
            self.assertRegex(line, r"\A20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ (info|warning|error) ")
        self.device.run("unenroll")
        lines = [json.loads(line) for line in self.device.cycle(0, "--log-format", "json").strip().split("\n")]
        self.assertTrue(all({"time", "level", "message"} <= set(line) for line in lines))
        self.assertIn("desired state accepted", [line["message"] for line in lines])

    def test_no_form_of_the_log_holds_what_steers_a_terminal_or_cannot_be_written(self):
        """Half characters stand in file names that are no text; those from 80 to 9f are control characters of their own."""
        for form in ("text", "json"):
            log, heard = margo_agent.Log(), io.StringIO()
            log.form = form
            with mock.patch.object(sys, "stderr", heard):
                log("info", "a\x9b2J\u202eb\udcff", path="\x1b[2J\udcff")
            self.assertRegex(heard.getvalue(), r"\A[ -~]+\n\Z")

    def test_quiet_says_only_errors_and_verbose_more(self):
        self.assertEqual(self.device.cycle(0, "-q"), "")
        self.assertIn("debug", self.device.cycle(0, "-v"))

    def test_what_a_wfm_says_cannot_write_to_the_terminal(self):
        """Foreign text is escaped wherever it is shown."""
        self.wfm.fault({"path": "/api/v1/deployments", "problem": {"type": "about:blank", "title": "\x1b[2Jgone\nfake line", "status": 400},
                        "status": 400})
        log = self.device.cycle(4)
        self.assertNotIn("\x1b", log + self.device.run("status").stdout)
        self.assertIn("\\x1b[2Jgone", log)

    def test_a_reader_that_has_seen_enough_is_no_fault(self):
        argv = " ".join(self.device.command("capabilities"))
        done = subprocess.run(["sh", "-c", f"{argv} | true"], env=self.device.env, stderr=subprocess.PIPE, timeout=support.LIMIT)
        self.assertEqual(done.stderr, b"")

    def test_streams_that_are_closed_or_full_change_nothing_else(self):
        """No file of the agent is taken for a stream; an output that is lost is no bug."""
        argv = " ".join(self.device.command())
        env = dict(self.device.env, PYTHONUNBUFFERED="")        # Python makes 120 of what it cannot write at its end
        for command, redirect, code in (("status", "<&- >&- 2>&-", 0), ("run --once", "<&- >&- 2>&-", 0), ("status", ">&-", 0),
                                        ("status", ">/dev/full", 3), ("capabilities", ">/dev/full", 3), ("run --once -v", "2>/dev/full", 0)):
            done = subprocess.run(["sh", "-c", f"exec 3>&2; {argv} {command} {redirect}"], env=env, stderr=subprocess.PIPE, timeout=support.LIMIT)
            self.assertEqual((done.returncode, b"bug" in done.stderr), (code, False), (command, redirect, done.stderr))
        self.assertEqual(self.device.state()["deployments"][HELLO]["state"], "installed")

    def test_what_the_locale_lacks_is_escaped(self):
        self.device.set("device.vendor", "Ä-Werke")
        self.device.settings["state_dir"] = os.path.join(self.device.folder, "zustände")
        self.device.save()
        for encoding, shown in (("ascii", "\\u00c4-Werke"), ("utf-8", "Ä-Werke")):
            done = subprocess.run(self.device.command("capabilities"), env=dict(self.device.env, PYTHONIOENCODING=encoding), stdout=subprocess.PIPE)
            self.assertIn(shown, done.stdout.decode())
            self.assertEqual(json.loads(done.stdout.decode())["properties"]["vendor"], "Ä-Werke")
        self.assertIn("zust\\xe4nde", self.device.run("doctor", env={"PYTHONIOENCODING": "ascii"}).stdout)

    def test_a_request_for_a_certificate_that_cannot_be_made_says_why(self):
        """A missing helper is named with what needs it; a key that is none is the identity's fault."""
        self.device.set("identity.key", os.path.join(self.device.folder, "new.key"))
        done = self.device.run("csr", env={"PATH": "/nonexistent"})
        self.assertEqual(done.returncode, 2)
        self.assertIn("openssl is not installed, or not on PATH; install it: `csr`, wfm.profile signed", done.stderr)
        support.write(self.device.settings["identity"]["key"], "no key", 0o600)
        done = self.device.run("csr")
        self.assertEqual(done.returncode, 5)
        self.assertIn("identity.key", done.stderr)

    def test_retry_of_what_did_not_fail_says_so(self):
        self.device.cycle()
        self.assertIn("0 failed", self.device.run("retry").stdout)
        done = self.device.run("retry", HELLO)
        self.assertEqual(done.returncode, 2)
        self.assertIn("no failed deployment", done.stderr)

    def test_a_deployment_is_named_by_its_id_the_beginning_of_it_or_its_name(self):
        self.engine.change(exits={"main": 4})
        self.device.cycle(1)
        for word in (HELLO, HELLO[:5], HELLO.upper(), "hello"):
            self.assertIn("1 failed deployment will be", self.device.run("retry", word).stdout)
        done = self.device.run("retry", "tally")
        self.assertEqual(done.returncode, 2)
        self.assertIn("tally is no deployment of this device", done.stderr)
        other = HELLO[:-1] + "1"
        self.wfm.publish(support.make_deployment(other, "second", registry=self.wfm.registry), other)
        self.device.cycle(1)
        self.assertIn("may be several", self.device.run("retry", HELLO[:9]).stderr)
        self.assertEqual(self.device.run("retry", HELLO).returncode, 0)

    def test_a_state_of_a_newer_agent_is_refused_untouched(self):
        self.device.cycle()
        path = os.path.join(self.device.state_dir, "state.json")
        support.write(path, json.dumps(dict(self.device.state(), schema=3)))
        log = self.device.cycle(3)
        self.assertIn("schema 3", log)
        self.assertEqual(self.device.state()["schema"], 3)


class People(support.DeviceCase):
    """Commands that a device does not need, but who looks after it."""

    def setUp(self):
        super().setUp()
        self.service = {"image": support.IMAGE, "init": True, "command": ["sleep", "100000"], "ports": ["127.0.0.1:18080:80"]}
        self.wfm.add_package(support.make_compose({"front": self.service, "back": {"image": support.IMAGE, "command": ["sleep", "9"]}}))
        self.wfm.publish(support.make_deployment(registry=self.wfm.registry))

    def test_status_of_one_deployment_tells_everything(self):
        """Revision, images, containers, ports, since when."""
        self.device.cycle()
        text = self.device.run("status", "hello").stdout
        for words in (rf"\Ainstalled +{HELLO}  hello  on {support.DEVICE}\n", r"document +sha256:\w{64}, of manifest version 1\n",
                      rf" installed +web  oci://{self.wfm.registry}/web 1.0.0\n",
                      rf"running +web\S*-front-1( since 20\S+Z)?  {support.IMAGE}  ports 127.0.0.1:18080/tcp\n", r"running +web\S*-back-1( since|  )"):
            self.assertRegex(text, words)
        document = json.loads(self.device.run("status", HELLO[:8], "--json").stdout)
        self.assertEqual({item["service"]: item["ports"] for item in document["containers"]}, {"front": ["127.0.0.1:18080/tcp"], "back": []})
        self.assertEqual((document["attempts"], document["nextAttempt"], document["before"]), (0, None, None))

    def test_status_of_one_that_failed_tells_when_it_is_tried_again_and_what_runs_instead(self):
        self.device.cycle()
        before = self.device.status()["deployments"][0]["digest"]
        self.engine.change(exits={"front": 4})
        self.wfm.publish(support.make_deployment(registry=self.wfm.registry, parameters={"GREETING": "other"}))
        self.wfm.add_package(support.make_compose({"front": dict(self.service, environment=["GREETING"])}), tag="2.0.0")
        self.wfm.publish(support.make_deployment(registry=self.wfm.registry, components=(("web", "2.0.0"),), parameters={"GREETING": "other"}))
        self.device.cycle(1)
        text = self.device.run("status", "hello").stdout
        self.assertRegex(text, r"attempts +1 failed; next attempt at 20\S+Z, `retry hello` tries at once\n")
        self.assertRegex(text, rf"before +the version of document {before} runs in its place\n")
        self.assertIn("web 2.0.0", text)
        self.assertIn("exited with code 4", text)

    def test_status_names_every_wait_and_until_when(self):
        """Contract, `status`: "waits and until when"; what has failed waits, too."""
        self.engine.change(exits={"front": 4})
        self.wfm.publish(support.make_deployment(registry=self.wfm.registry, parameters={"GREETING": "other"}))
        self.device.cycle(1)
        (wait,) = self.device.status()["waits"]
        self.assertEqual(wait["reason"], f"{HELLO} has failed and is not tried again")
        self.assertIn(f"until {wait['until']}", self.device.run("status").stdout)

    def test_status_of_one_says_so_where_the_engine_does_not_answer(self):
        self.device.cycle()
        self.engine.change(deaf=True)
        done = self.device.run("status", "hello")
        self.assertEqual(done.returncode, 0)
        self.assertRegex(done.stdout, "containers +the container engine does not answer")

    def test_logs_are_shown_by_the_engine(self):
        """By its own command: all containers, or that of one service."""
        self.device.cycle()
        self.engine.forget_calls()
        self.assertEqual(self.device.run("logs", "hello", "front", "--tail", "5", "-f").returncode, 0)
        containers = {item["labels"]["org.margo.service"]: number for number, item in
                      ((item.get("id") or name, item) for name, item in self.engine.containers().items())}
        self.assertEqual(self.engine.calls()[-1], ["logs", "--tail=5", "--follow", containers["front"]])
        self.device.run("logs", HELLO)
        self.assertEqual(sorted(self.engine.calls()[-1]), sorted(["logs", "--names", *containers.values()]))
        for words, fault in ((["logs"], "needs NAME"), (["logs", "hello", "side"], "service side of hello has no container"),
                             (["logs", "hello", "front", "x"], "no such operand")):
            done = self.device.run(*words)
            self.assertEqual(done.returncode, 2)
            self.assertIn(fault, done.stderr)

    def test_the_configuration_in_force_can_be_used_as_it_is_printed(self):
        """With every setting, defaults marked, secrets masked."""
        self.device.set("runtime.environment", {"TOKEN": "s3cret"})
        self.device.set("device.serialNumber", "0042")
        self.device.set("device.parameter_values", {"plant.password": "s3cret"})
        text = self.device.run("config").stdout
        self.assertNotIn("s3cret", text)
        self.assertRegex(text, r'(?m)^  min_tls: "1.3"  # default$')
        self.assertRegex(text, r'(?m)^  timeout: 10s$')
        path = support.write(os.path.join(self.device.folder, "printed.yaml"), text)
        told, known = (margo_agent.load_config(name) for name in (path, self.device.config_file))
        self.assertEqual(told.runtime.environment, {"TOKEN": "..."})
        self.assertEqual(told.device.parameter_values, {"plant.password": "..."})
        told.runtime["environment"] = known.runtime["environment"]
        told.device["parameter_values"] = known.device["parameter_values"]
        self.assertEqual(told, known)

    def test_a_configuration_is_judged_without_anything_else(self):
        self.wfm.stop()
        self.assertEqual(self.device.run("config", "--check").stdout, f"{self.device.config_file} can be used\n")
        self.device.set("poll.intervall", "1s")
        done = self.device.run("config", "--check")
        self.assertEqual((done.returncode, done.stdout), (2, ""))
        self.assertIn("did you mean poll.interval?", done.stderr)

    def test_what_came_of_a_command_can_be_had_as_json(self):
        outcome = json.loads(self.device.run("run", "--once", "--json").stdout)
        self.assertEqual((outcome["code"], outcome["result"], outcome["detail"]), (0, "applied", ""))
        self.assertGreater(outcome["delay"], 0)
        self.assertEqual(json.loads(self.device.run("retry", "--json").stdout), {"retried": []})
        self.assertEqual(json.loads(self.device.run("version", "--json").stdout),
                         {"version": margo_agent.__version__, "profiles": list(margo_agent.PROFILES)})


class Example(unittest.TestCase):
    """The configuration reference: made of SCHEMA, by the agent itself."""

    def test_the_example_is_what_the_command_prints(self):
        with open(os.path.join(support.EXAMPLES, "agent.yaml"), encoding="utf-8") as file:
            self.assertEqual(file.read(), run("config", "--example").stdout, "margo_agent.py config --example > examples/agent.yaml")

    def test_it_has_every_setting_with_what_it_is_for_and_its_default(self):
        lines = run("config", "--example").stdout.split("\n")

        def check(schema, indent):
            for key, entry in schema.items():
                if isinstance(entry, dict):
                    self.assertIn(f"{indent}{key}:", lines)
                    check(entry, indent + "  ")
                elif entry[2]:
                    (place,) = [number for number, line in enumerate(lines) if re.match(rf"{indent}(# )?{key}:", line)
                                and lines[number - 1].startswith(f"{indent}# {entry[2]}")]
                    self.assertRegex(lines[place - 1], r"\(.+\)$")
                    value = margo_agent.load_yaml(lines[place].partition(f"{key}:")[2] or "null")
                    self.assertTrue(value == entry[1] or not lines[place].strip().startswith("#"), lines[place])

        check(margo_agent.SCHEMA, "")

    def test_every_line_that_is_commented_out_may_be_used(self):
        """With its default, where it has one."""
        text = run("config", "--example").stdout
        bare = re.sub(r"(?m)^( *)# (?!.*\)$)(\w+: *[^ ].*)$", r"\1\2", text)
        self.assertIn("\n  interval: 60s\n", bare)
        self.assertEqual(*(margo_agent.make_config(margo_agent.load_yaml(item), "/etc/margo", {}) for item in (bare, text)))


class Mistakes(support.DeviceCase):
    """What a stranger types."""

    def test_a_word_that_is_empty_names_nothing(self):
        """With one deployment alone, nothing is not the beginning of its id."""
        self.wfm.publish(support.make_deployment(registry=self.wfm.registry))
        self.device.cycle()
        for words in (("status", ""), ("retry", ""), ("logs", ""), ("--config=", "status"), ("-c", "", "status"), ("csr", "--out", ""),
                      ("run", "--once", "--spread=")):
            done = self.device.run(*words)
            self.assertEqual(done.returncode, 2, words)
            self.assertRegex(done.stderr, r"\Amargo-agent: (\w+: an empty word names nothing|-\S+: needs a value: write -\S+ [A-Z]+)\n\Z")

    def test_options_that_have_no_sense_are_refused(self):
        self.wfm.publish(support.make_deployment(registry=self.wfm.registry))
        self.device.cycle()
        for words, said in ((("run", "--json"), "--json: belongs to run --once"), (("run", "--spread", "5s"), "--spread: belongs to run --once"),
                            (("logs", "hello", "--tail", "-1"), "--tail: found '-1', expected a number of lines"),
                            (("logs", "hello", "--tail=few"), "--tail: found 'few', expected a number of lines")):
            done = self.device.run(*words)
            self.assertEqual(done.returncode, 2, words)
            self.assertIn(said, done.stderr)

    def test_json_is_json_in_failures_too(self):
        """One document each time, whatever happened; what `doctor` and `run --once` tell of is in theirs."""
        self.device.set("identity.certificate", "/nonexistent.pem")
        cases = [("plan", 5, "UNTRUSTED"), ("run --once", 5, None), ("doctor", 5, None), ("status", 0, None), ("history", 0, None),
                 ("status nobody", 2, "CONFIGURATION"), ("retry nobody", 2, "CONFIGURATION")]
        for command, code, fault in cases:
            done = self.device.run(*command.split(), "--json")
            self.assertEqual(done.returncode, code, command)
            self.assertEqual(json.loads(done.stdout).get("error", {}).get("code"), fault, command)
        support.write(os.path.join(self.device.state_dir, "state.json"), "{}")
        for name in os.listdir(self.device.state_dir):
            if name.startswith("state.json"):
                support.write(os.path.join(self.device.state_dir, name), "{}")
        for command in ("plan", "status", "history", "retry", "run --once", "doctor"):
            done = self.device.run(*command.split(), "--json")
            self.assertEqual(done.returncode, 3, command)
            self.assertIn("is not a state of this agent", json.dumps(json.loads(done.stdout)), command)
        support.write(self.device.config_file, "wfm: [")
        for command in ("plan", "status", "history", "retry", "run --once", "doctor"):
            done = self.device.run(*command.split(), "--json")
            self.assertEqual((done.returncode, json.loads(done.stdout)["error"]["code"]), (2, "CONFIGURATION"), command)

    def test_a_plan_in_json_is_one_document_where_the_engine_does_not_answer(self):
        self.wfm.publish(support.make_deployment(registry=self.wfm.registry))
        self.engine.change(deaf=True)
        done = self.device.run("plan", "--json")
        self.assertEqual(done.returncode, 1)
        self.assertIn("actions", json.loads(done.stdout))


class History(support.DeviceCase):
    def test_it_tells_what_was_accepted_and_what_came_of_it(self):
        """When, version, what changed, outcome; newest first, at most twenty."""
        self.assertEqual(self.device.run("history").stdout, "no desired state was accepted yet\n")
        text = support.make_deployment(registry=self.wfm.registry)
        self.wfm.publish(text)
        self.device.cycle()
        self.engine.change(exits={"main": 3})
        self.wfm.publish(support.make_deployment(registry=self.wfm.registry, parameters={"GREETING": "other"}))
        self.device.cycle(1)
        self.wfm.withdraw()
        self.device.cycle()
        newest, second, first = json.loads(self.device.run("history", "--json").stdout)["history"]
        self.assertEqual((first["version"], first["added"], first["outcome"]), (1, [HELLO], "applied"))
        self.assertEqual((second["changed"], second["outcome"]), ([HELLO], f"{HELLO} failed (INSTALL_FAILED)"))
        self.assertEqual((newest["removed"], newest["outcome"]), ([HELLO], "applied"))
        lines = self.device.run("history").stdout.split("\n")
        self.assertRegex(lines[0], r"\A20\S+Z  version 3  removed hello  applied")
        self.assertRegex(lines[1], r"\A20\S+Z  version 2  changed hello  hello failed \(INSTALL_FAILED\)")
        self.assertRegex(lines[2], r"\A20\S+Z  version 1  added hello  applied")

    def test_it_is_bounded(self):
        state = margo_agent.make_state()
        for version in range(50):
            state["history"] = margo_agent.make_history(state, margo_agent.Desired(version, None, "", [], {}), "")
        self.assertEqual([item["version"] for item in state["history"]], list(range(30, 50)))


class Doctor(support.DeviceCase):
    """P-18: everything a run needs, a line a check, and the mend."""

    def check(self, code, *lines):
        done = self.device.run("doctor")
        self.assertEqual(done.returncode, code, done.stdout + done.stderr)
        for line in lines:
            self.assertRegex(done.stdout, line)
        self.assertFalse(os.path.exists(self.device.state_dir))

    def test_all_is_well(self):
        self.wfm.publish(support.make_deployment(registry=self.wfm.registry))
        self.check(0, r"(?m)^ok   state .*MiB free", r"(?m)^ok   engine    podman answers", rf"(?m)^ok   identity  {support.CLIENT_ID}, \d+ days",
                   rf"(?m)^ok   wfm       {self.wfm.url} is {support.WFM_ID}; version 1")
        self.assertEqual({method for method, _, _ in self.wfm.requests()}, {"GET"})

    def test_each_fault_is_named_and_the_other_checks_go_on(self):
        self.engine.change(deaf=True)
        self.wfm.stop()
        self.check(3, "FAIL engine .*cannot connect to the engine", "ok   identity", "FAIL wfm .*refused")

    def test_a_certificate_that_ends_soon_and_an_open_key_are_warnings(self):
        os.chmod(self.pki.path("client.key"), 0o644)
        self.check(0, "warn identity .*mode 0644; chmod 0600")
        certificate, key = self.pki.issue("soon", [support.CLIENT_ID], start="-9d", end="+1d")
        os.chmod(key, 0o600)
        self.device.set("identity.certificate", certificate)
        self.device.set("identity.key", key)
        self.check(0, "warn identity .* expires in 0 days, at 20.*; have it renewed")

    def test_a_file_of_a_registry_that_is_not_there_is_a_warning_until_a_run_needs_it(self):
        self.device.settings["registries"][self.wfm.registry]["ca"] = "/nonexistent/ca.pem"
        self.device.save()
        self.check(0, f"warn registry  {self.wfm.registry}: trust anchors /nonexistent/ca.pem cannot be used", "ok   wfm")
        self.device.settings["registries"][self.wfm.registry].update(ca=self.pki.path("site-ca.pem"), username="me", password_file="/nonexistent")
        self.device.save()
        self.check(0, f"warn registry  {self.wfm.registry}: registries.{self.wfm.registry}.password_file /nonexistent: .*no such file")
        self.device.settings["registries"][self.wfm.registry].update(ca="/nonexistent/ca.pem", username=None, password_file=None)
        self.device.save()
        self.wfm.publish(support.make_deployment(registry=self.wfm.registry))
        self.device.cycle(1)
        self.assertEqual(self.device.run("doctor").returncode, 1)

    def test_a_wait_fails_because_a_run_would_end_with_it(self):
        """Contract, Commands: FAIL is what a run would fail by, and the exit code that run's."""
        self.wfm.fault({"path": "/api/v1/*", "status": 503, "headers": {"Retry-After": "600"}})
        self.device.cycle(3)
        self.wfm.fault()
        done = self.device.run("doctor")
        self.assertEqual((done.returncode, self.device.run("run", "--once").returncode), (3, 3), done.stdout)
        self.assertRegex(done.stdout, r"FAIL wait +until 20\S+Z .*`retry` ends that(.*\n)*ok   wfm ")
        self.device.set("wfm.url", f"https://localhost:{support.free_port()}")
        self.device.set("identity.certificate", "/nonexistent.pem")
        done = self.device.run("doctor")
        self.assertEqual((done.returncode, self.device.run("run", "--once").returncode), (3, 3), done.stdout)
        self.device.run("retry")
        self.assertEqual((self.device.run("doctor").returncode, self.device.run("run", "--once").returncode), (5, 5))

    def test_what_will_be_refused_fails_before_it_is_accepted(self):
        self.wfm.publish(support.make_deployment(registry=self.wfm.registry, device="another-device"))
        self.check(1, "FAIL wfm .*WRONG_DEVICE: metadata.deviceId is another-device")
        self.device.cycle(1)

    def test_what_a_changed_configuration_will_refuse_fails_although_the_wfm_has_nothing_new(self):
        """Contract, Commands: FAIL is what a run would fail by; it goes on with what was accepted before."""
        self.wfm.publish(support.make_deployment(registry=self.wfm.registry))
        self.device.cycle()
        self.device.set("device.id", "another-device")
        for counts in ((1, 0), (0, 1)):             # before and after the run that refuses it, told once
            done = self.device.run("doctor")
            self.assertEqual(done.returncode, 1, done.stdout)
            self.assertEqual((done.stdout.count("FAIL wfm       nothing new; "), done.stdout.count("FAIL failed")), counts)
            self.assertEqual(done.stdout.count("WRONG_DEVICE"), 1)
            self.device.cycle(1)

    def test_what_lies_in_the_way_of_the_state_fails(self):
        """What a run makes in the state directory, doctor looks at, each by itself."""
        self.device.cycle()
        for name, make in (("lock", os.mkdir), ("artifacts", support.write), ("deployments", support.write)):
            path = os.path.join(self.device.state_dir, name)
            os.rename(path, path + ".away")
            make(path, *[""] * (make is support.write))
            done = self.device.run("doctor")
            self.assertEqual((name, done.returncode, self.device.run("run", "--once").returncode), (name, 3, 3), done.stdout)
            self.assertRegex(done.stdout, f"FAIL (state|lock) .*{path}.*move it away")
            (os.rmdir if make is os.mkdir else os.remove)(path)
            os.rename(path + ".away", path)
        self.device.cycle()

    def test_in_downtime_nobody_is_asked(self):
        self.device.set("poll.downtime", ["00:00-24:00"])
        self.device.set("identity.certificate", "/nonexistent.pem")
        self.check(0, "warn wait +downtime: no request is made")
        self.assertEqual(self.wfm.requests(), [])
        self.device.cycle(0)

    def test_removals_that_wait_for_their_confirmation_fail(self):
        self.device.set("policy.max_removals", 0)
        self.wfm.publish(support.make_deployment(registry=self.wfm.registry))
        self.device.cycle()
        self.wfm.withdraw()
        done = self.device.run("doctor")
        self.assertEqual((done.returncode, self.device.run("run", "--once").returncode), (3, 3), done.stdout)
        self.assertIn("FAIL wfm       version 2 would remove 1 deployments", done.stdout)

    def test_a_state_directory_that_cannot_be_made_fails(self):
        path = support.write(os.path.join(self.device.folder, "file"), "")
        self.device.settings["state_dir"] = os.path.join(path, "state")
        self.device.save()
        self.check(3, f"FAIL state .*{path}", "ok   identity")


    def test_it_ends_as_a_run_would_and_says_so_to_machines(self):
        self.wfm.fault({"path": "/api/v1/*", "problem": "not-authorized"})
        document = json.loads(self.device.run("doctor", "--json").stdout)
        self.assertEqual(document["code"], 5)
        levels = {check["name"]: check["level"] for check in document["checks"]}
        self.assertEqual((levels["identity"], levels["engine"], levels["wfm"]), ("ok", "ok", "fail"))
        self.wfm.fault()
        self.assertEqual(json.loads(self.device.run("doctor", "--json").stdout)["code"], 0)

    def test_each_cause_is_told_once(self):
        self.device.set("identity.certificate", "/nonexistent/client.pem")
        done = self.device.run("doctor")
        self.assertEqual((done.returncode, done.stdout.count("/nonexistent/client.pem")), (5, 1))

    def test_what_failed_and_when_it_is_tried_again(self):
        self.wfm.publish(support.make_deployment(registry=self.wfm.registry))
        self.engine.change(exits={"main": 4})
        self.device.cycle(1)
        done = self.device.run("doctor")
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stdout, r"FAIL failed    hello \(INSTALL_FAILED\): .*code 4.*; next attempt at 20\S+Z, `retry hello` tries at once")

    def test_a_registry_that_does_not_answer_is_a_warning(self):
        """What is installed needs none."""
        port = support.free_port()
        self.device.settings["registries"][f"localhost:{port}"] = {}
        self.device.save()
        self.check(0, f"warn registry  localhost:{port}: GET https://localhost:{port}/v2/: Connection refused; nothing listens there")

    def test_who_answers_in_the_place_of_the_wfm_is_shown(self):
        self.device.set("wfm.url", f"https://{self.wfm.registry}")
        self.check(5, "FAIL wfm .*it leads to nothing in the trust bundle.*there answers localhost, certified by .*Test site CA")

    def test_the_proxy_that_is_used_is_named(self):
        self.device.env["https_proxy"] = f"http://me:s3cret@localhost:{support.free_port()}"
        done = self.device.run("doctor")
        self.assertRegex(done.stdout, r"FAIL wfm .*through the proxy localhost:\d+ \(\$https_proxy\): Connection refused")
        self.assertNotIn("s3cret", done.stdout)

    def test_hardware_that_has_no_name_of_its_own_is_doubted(self):
        del self.device.settings["device"]["id"]
        for serial, doubted in (("To be filled by O.E.M.", True), ("Default string", True), ("0000000000", True), ("PF3X9KLM", False),
                                ("0042", False), ("Xavier-7", False), ("0a3f5b7c9d1e4f60a1b2c3d4e5f60718", False), ("1234567-A", False)):
            self.device.set("device.serialNumber", serial)
            self.assertEqual("warn device    this hardware calls itself" in self.device.run("doctor").stdout, doubted, serial)


class Module(unittest.TestCase):
    def test_an_import_has_no_side_effect(self):
        """Contract, As a module: nothing printed, no file touched, no module imported that only a command needs."""
        code = ("import sys; before = set(sys.modules); import margo_agent; "
                "print(sorted(m for m in set(sys.modules) - before if m in ('ssl', 'subprocess', 'json', 'socket', 'logging', 'tarfile')))")
        done = subprocess.run([sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {support.ROOT!r}); {code}"],
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=support.LIMIT)
        self.assertEqual(done.stdout, b"[]\n")

    def test_what_is_stable_is_exported(self):
        self.assertEqual([name for name in margo_agent.__all__ if not hasattr(margo_agent, name)], [])

    def test_main_returns_its_exit_code(self):
        with open(os.devnull, "w") as nowhere:
            stdout, sys.stdout = sys.stdout, nowhere
            try:
                self.assertEqual(margo_agent.main(["version"]), 0)
            finally:
                sys.stdout = stdout

    def test_a_bug_is_one_line_and_seventy(self):
        """The traceback is for whoever mends it, at debug level."""
        code = f"import sys; sys.path.insert(0, {support.ROOT!r}); import margo_agent; margo_agent.load_config = None; " \
               "sys.exit(margo_agent.main(sys.argv[1:]))"
        for options, lines in (([], 1), (["-v"], None)):
            done = subprocess.run([sys.executable, "-c", code] + options + ["status"], stderr=subprocess.PIPE, timeout=support.LIMIT)
            self.assertEqual(done.returncode, 70)
            self.assertIn(b"bug: TypeError", done.stderr)
            if lines:
                self.assertEqual(done.stderr.count(b"\n"), lines)

    def test_it_is_installed_as_a_command(self):
        with open(os.path.join(support.ROOT, "pyproject.toml")) as file:
            text = file.read()
        self.assertIn('margo-agent = "margo_agent:main"', text)
        self.assertIn("dependencies = []", text)
        module, function = re.search(r'margo-agent = "(\w+):(\w+)"', text).groups()
        self.assertTrue(callable(getattr(importlib.import_module(module), function)))


if __name__ == "__main__":
    unittest.main()
