"""Apply, its hooks: executables of the device's maker around every change of a component, and the extensions they read."""
import json
import os
import unittest

import margo_agent
from tests import support
from tests.support import DEVICE, HELLO, IMAGE

OURS = {"x-example-industries-extensions": {"updateOnlyWhenIdle": True}}
NOTE = """#!/bin/sh
{ printf '%s ' "$1"; cat; echo; } >> %JOURNAL%
env > %JOURNAL%.env
[ ! -e %JOURNAL%.stop-"$1" ] || { echo "not now: $1" >&2; exit 3; }
"""


class HookCase(support.DeviceCase):
    def setUp(self):
        super().setUp()
        self.journal = os.path.join(self.device.folder, "journal")
        self.hook = support.write(os.path.join(self.device.folder, "hook"), NOTE.replace("%JOURNAL%", self.journal), 0o755)
        self.device.set("hooks.run", ["hook"])

    def publish(self, components=(("web", "1.0.0"),), spec=None, component=None, **options):
        value = json.loads(support.make_deployment(components=components, registry=self.wfm.registry, **options))
        value["spec"].update(spec or {})
        for item in value["spec"]["deploymentProfile"]["components"]:
            item.update(component or {})
        self.wfm.publish(json.dumps(value))

    def told(self):
        """[(event, facts)] since the last look."""
        try:
            with open(self.journal) as file:
                lines = [line.partition(" ") for line in file]
        except FileNotFoundError:
            return []
        os.remove(self.journal)
        return [(event, json.loads(facts)) for event, _, facts in lines]

    def events(self):
        return [f"{event} {facts['component']} {facts['revision']}" for event, facts in self.told()]

    def stop(self, event, on=True):
        (lambda path: support.write(path, "") if on else os.remove(path))(f"{self.journal}.stop-{event}")

    def last_error(self):
        return self.wfm.reports()[-1]["body"]["components"][-1].get("error")


class Events(HookCase):
    def test_each_change_of_a_component_is_told_before_and_after(self):
        """Issue 3, P-20: install, update and removal; all are asked before the first is made; a poll that finds nothing new calls nobody."""
        for name in ("db", "web"):
            self.wfm.add_package(support.make_compose(), name)
        self.publish((("db", "1.0.0"), ("web", "1.0.0")))
        self.device.cycle()
        self.assertEqual(self.events(), ["before-install db 1.0.0", "before-install web 1.0.0", "after-install db 1.0.0", "after-install web 1.0.0"])
        self.device.cycle()
        self.assertEqual(self.events(), [])
        self.wfm.add_package(support.make_compose(), "web", "2.0.0")
        self.publish((("web", "2.0.0"),))
        self.device.cycle()
        self.assertEqual(self.events(), ["before-update web 2.0.0", "before-removal db ", "after-update web 2.0.0", "after-removal db "])
        self.wfm.withdraw()
        self.device.cycle()
        self.assertEqual(self.events(), ["before-removal web 2.0.0", "after-removal web 2.0.0"])

    def test_the_facts_are_those_of_the_document_with_the_vendors_own_extensions(self):
        """C-116: extensions as read, wherever the specification has them."""
        self.publish(spec={"x-acme-extensions": {"light": ["green", 1, None]}}, component=OURS)
        self.device.cycle()
        (_, before), (_, after) = self.told()
        self.assertEqual(before, {
            "event": "before-install", "rollback": False, "deploymentId": HELLO, "name": "hello", "namespace": "margo-demo", "deviceId": DEVICE,
            "type": "compose", "component": "web", "repository": f"oci://{self.wfm.registry}/web", "revision": "1.0.0", "outcome": None,
            "extensions": {"spec": {"x-acme-extensions": {"light": ["green", 1, None]}}, "deploymentProfile": {}, "component": OURS}})
        self.assertEqual(after["outcome"], {"state": "installed", "code": "", "message": ""})
        self.wfm.withdraw()
        self.device.cycle()
        (_, before), (_, after) = self.told()
        self.assertEqual((before["extensions"]["component"], after["outcome"]["state"]), (OURS, "removed"))

    def test_no_value_of_a_parameter_reaches_a_hook_nor_does_the_agents_environment(self):
        """D-35, contract, Parameters: no other process gets one."""
        self.publish(parameters={"GREETING": "s3cret-value"})
        self.device.run("run", "--once", env={"MARGO_SECRET": "x"})
        self.assertIn("GREETING=s3cret-value", self.engine.containers()[f"web-{HELLO}-main-1"]["env"])
        with open(self.journal) as file, open(f"{self.journal}.env") as environment:
            text, names = file.read(), {line.split("=")[0] for line in environment}
        self.assertNotIn("s3cret-value", text)
        self.assertLessEqual(names, {"PATH", "HOME", "LANG", "TZ", "PWD", "OLDPWD", "SHLVL", "_"})

    def test_what_failed_is_told_too(self):
        self.publish()
        self.engine.change(exits={"main": 7})
        self.device.cycle(1)
        (_, _), (event, facts), *back = self.told()
        self.assertEqual([(name, told["rollback"]) for name, told in back], [("before-removal", True), ("after-removal", True)])
        self.assertEqual((event, facts["outcome"]["state"], facts["outcome"]["code"]), ("after-install", "failed", "INSTALL_FAILED"))
        self.assertIn("exited with code 7", facts["outcome"]["message"])


class Failure(HookCase):
    def test_a_failing_before_hook_fails_the_component_and_touches_nothing(self):
        """Issue 3: HOOK_FAILED, with the end of its stderr; the next attempt comes as after any failure."""
        self.stop("before-install")
        self.publish()
        self.assertIn("not now: before-install", self.device.cycle(1))
        self.assertEqual(self.last_error()["code"], "HOOK_FAILED")
        for words in (self.hook, "ended with 3", "not now: before-install"):
            self.assertIn(words, self.last_error()["message"])
        self.assertEqual(self.engine.containers(), {})
        self.assertEqual(self.events(), ["before-install web 1.0.0"])
        self.stop("before-install", False)
        self.device.run("retry")
        self.device.cycle()
        self.assertEqual(self.wfm.statuses()[-1], "installed")

    def test_an_update_that_a_hook_holds_up_leaves_the_old_version_alone(self):
        """P-8: nothing was touched, so there is no way back to go."""
        self.publish()
        self.device.cycle()
        before = self.engine.containers()
        self.told()
        self.stop("before-update")
        self.publish(parameters={"GREETING": "two"})
        self.assertNotIn("rolled back", self.device.cycle(1))
        self.assertEqual(self.engine.containers(), before)
        self.assertEqual(self.events(), ["before-update web 1.0.0"])

    def test_one_component_s_hook_that_says_no_keeps_all_others_as_they_are(self):
        """P-20, D-19: the last one's, and that of one that is to be dropped; who had agreed is told that nothing came of it."""
        for name in ("db", "web"):
            self.wfm.add_package(support.make_compose(), name)
        self.publish((("db", "1.0.0"), ("web", "1.0.0")))
        self.device.cycle()
        before = self.engine.containers()
        self.told()
        self.stop("before-removal")
        self.publish((("db", "1.0.0"),), parameters={"GREETING": "two"})
        self.assertNotIn("version before", self.device.cycle(1))
        self.assertEqual(self.engine.containers(), before)
        self.assertEqual([(event, facts["component"], facts["outcome"] and facts["outcome"]["code"]) for event, facts in self.told()],
                         [("before-update", "db", None), ("before-removal", "web", None), ("after-update", "db", "HOOK_FAILED")])
        self.wfm.withdraw()
        self.device.cycle(1)
        self.assertEqual(self.engine.containers(), before)

    def test_no_hook_bars_the_way_back(self):
        """P-8: the version before comes up, hooks are told of it, and one that says no is only logged."""
        self.publish()
        self.device.cycle()
        self.told()
        self.wfm.add_package(support.make_compose({"main": {"image": IMAGE}, "broken": {"image": IMAGE}}), "web", "2.0.0")
        self.publish((("web", "2.0.0"),))
        self.engine.change(exits={"broken": 1})
        support.write(self.hook, NOTE.replace("%JOURNAL%", self.journal) + "case $(tail -n 1 %s) in *'\"rollback\":true'*) exit 9; esac\n" % self.journal, 0o755)
        log = self.device.cycle(1)
        self.assertIn("the version before runs again", self.last_error()["message"])
        self.assertIn("ended with 9", log)
        told = self.told()
        self.assertEqual([(event, facts["revision"], facts["rollback"]) for event, facts in told if event.endswith("update")], [
            ("before-update", "2.0.0", False), ("after-update", "2.0.0", False), ("before-update", "1.0.0", True), ("after-update", "1.0.0", True)])

    def test_a_failing_after_hook_changes_nothing_and_is_logged(self):
        self.stop("after-install")
        self.publish()
        log = self.device.cycle(0)
        self.assertIn("not now: after-install", log)
        self.assertEqual(self.wfm.statuses()[-1], "installed")

    def test_a_failing_before_hook_holds_a_removal_up(self):
        """D-21: it is reported, nothing is removed, and the next attempt asks again."""
        self.publish()
        self.device.cycle()
        self.wfm.withdraw()
        self.stop("before-removal")
        self.device.cycle(1)
        self.assertEqual((self.last_error()["code"], len(self.engine.containers())), ("HOOK_FAILED", 1))
        self.stop("before-removal", False)
        self.device.run("retry")
        self.device.cycle(0)
        self.assertEqual((self.engine.containers(), self.wfm.statuses()[-1]), ({}, "removed"))

    def test_one_that_hangs_is_ended_with_all_it_started(self):
        """House, every door has a limit: time."""
        self.device.set("hooks.timeout", "1s")
        support.write(self.hook, f"#!/bin/sh\necho $$ > {self.journal}.pid\nsleep 600 &\nsleep 600\n", 0o755)
        self.publish()
        self.device.cycle(1)
        self.assertEqual(self.last_error()["code"], "HOOK_FAILED")
        self.assertIn("did not end within 1 s", self.last_error()["message"])
        with open(f"{self.journal}.pid") as file:
            self.assertFalse(os.path.exists(f"/proc/{file.read().strip()}/exe"))

    def test_one_that_is_not_there_is_named_by_doctor_too(self):
        self.device.set("hooks.run", ["hook", "no-such-hook"])
        self.publish()
        self.device.cycle(1)
        self.assertIn("no-such-hook", self.last_error()["message"])
        done = self.device.run("doctor")
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stdout, "warn hooks .*no-such-hook")
        self.device.set("hooks.run", ["hook"])
        self.assertRegex(self.device.run("doctor").stdout, "ok   hooks .*1")
        os.chmod(self.hook, 0o775)
        self.assertRegex(self.device.run("doctor").stdout, "warn hooks .*chmod go-w")


class Example(HookCase):
    def test_the_example_holds_updates_up_while_the_line_produces(self):
        with open(os.path.join(support.EXAMPLES, "hook.py")) as file:
            text = file.read()
        producing = os.path.join(self.device.folder, "producing")
        support.write(self.hook, text.replace('"/run/line/producing"', repr(producing)), 0o755)
        self.publish(component=OURS)
        self.device.cycle(0)
        support.write(producing, "")
        self.publish(component=OURS, parameters={"GREETING": "two"})
        self.device.cycle(1)
        self.assertIn("the line is producing; web 1.0.0 has to wait", self.last_error()["message"])
        os.remove(producing)
        self.device.run("retry")
        self.device.cycle(0)
        self.assertEqual(self.engine.containers()[f"web-{HELLO}-main-1"]["env"], ["GREETING=two"])


class Extensions(unittest.TestCase):
    def test_no_extension_ever_fails_wherever_it_stands_and_whatever_it_holds(self):
        """C-116: unknown ones are ignored; of what specification and hooks have no words for nothing is kept."""
        odd = ["x-odd-extensions: 7", "x-odd-extensions: {1: a, b: .nan}", "x-odd-extensions: {deep: [{a: .inf}]}", "x-odd-extensions: null",
               "x-Odd-extensions: {a: 1}", "x-other: {a: 1}", "unknown: {a: 1}"]
        for line in odd:
            text = f"""
id: {HELLO}
{line}
metadata: {{name: hello, namespace: n, deviceId: {DEVICE}, {line}}}
spec:
  {line}
  applicationId: a
  deploymentProfile:
    type: compose
    {line}
    deviceConstraints:
      {line}
      capacityRequirements: {{memory: 1Mi, {line}}}
    components:
    - name: web
      {line}
      properties: {{repository: 'oci://r/web', revision: 1.0.0, {line}}}
  parameters:
    greeting: {{value: hi, {line}, targets: [{{pointer: GREETING, components: [web], {line}}}]}}
"""
            with self.subTest(line=line):
                deployment = margo_agent.parse_deployment(text.encode(), HELLO)
                self.assertEqual((deployment.extensions, deployment.components[0].extensions), ({"spec": {}, "deploymentProfile": {}}, {}))

    def test_those_of_the_specification_are_kept_as_read(self):
        """Protocol 3.2: in spec, deploymentProfile and component."""
        value = json.loads(support.make_deployment())
        value["spec"]["x-a-extensions"] = value["spec"]["deploymentProfile"]["x-b-extensions"] = {"k": [1, 1.5, "x", None, True]}
        value["spec"]["deploymentProfile"]["components"][0]["x-c-extensions"] = {}
        deployment = margo_agent.parse_deployment(json.dumps(value).encode(), HELLO)
        self.assertEqual(deployment.extensions["spec"], {"x-a-extensions": {"k": [1, 1.5, "x", None, True]}})
        self.assertEqual(list(deployment.extensions["deploymentProfile"]), ["x-b-extensions"])
        self.assertEqual(deployment.components[0].extensions, {"x-c-extensions": {}})


class Settings(unittest.TestCase):
    def make(self, hooks):
        from tests.test_configuration import make
        return make(hooks=hooks).hooks

    def test_hooks_are_files_relative_to_the_configuration(self):
        self.assertEqual(self.make({"run": ["hook", "/usr/lib/x"], "timeout": "5s"}), {"run": ["/etc/margo/hook", "/usr/lib/x"], "timeout": 5.0})
        self.assertEqual(self.make({}), {"run": [], "timeout": 60.0})

    def test_everything_else_is_refused_by_name(self):
        for hooks, words in (({"run": "hook"}, "hooks.run: found 'hook', expected a list of file names"), ({"run": [{}]}, "hooks.run"),
                             ({"before": []}, "hooks.before: unknown key"), (["hook"], "hooks: found")):
            with self.subTest(hooks=hooks), self.assertRaises(margo_agent.ConfigError) as caught:
                self.make(hooks)
            self.assertIn(words, caught.exception.message)


if __name__ == "__main__":
    unittest.main()
