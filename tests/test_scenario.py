"""Section 14 on real engines: the whole life of a deployment by the builtin driver, the same on podman and on a Docker daemon.

What is asserted is what the engine shows and what the applications keep; the cases (E-n, F-n, K-n) are those that were found in use.
"""
import os
import re
import unittest
import uuid

from tests import support
from tests.support import IMAGE


def service(**members):
    return dict({"image": IMAGE, "init": True, "command": ["sleep", "100000"]}, **members)


def serve(port, text):
    """A service that answers with a text on a port of loopback."""
    return service(command=["sh", "-c", f"mkdir -p /tmp/w && echo {text} > /tmp/w/index.html && exec httpd -f -p 80 -h /tmp/w"],
                   ports=[f"127.0.0.1:{port}:80"])


class Scenario:
    """The tests; what is below says on which engine."""

    def setUp(self):
        super().setUp()
        self.device.set("runtime.compose", "builtin")
        self.deployment_id = str(uuid.uuid4())
        self.revision = 0

    def publish(self, services, parameters=None, **members):
        """Makes these services the next revision of the one component `web`."""
        self.revision += 1
        tag = f"{self.revision}.0.0"
        self.wfm.add_package(support.make_compose(services, **members), tag=tag)
        self.wfm.publish(support.make_deployment(self.deployment_id, components=(("web", tag),), registry=self.wfm.registry, parameters=parameters), self.deployment_id)

    def update(self, services, expected=0, parameters=None, **members):
        """Publishes and runs a cycle; returns its log."""
        self.publish(services, parameters, **members)
        return self.device.cycle(expected)

    def name(self, name):
        return f"web-{self.deployment_id}-{name}-1"

    def shell(self, name, line):
        """What a shell says in a container."""
        return self.engine.podman("exec", self.name(name), "sh", "-c", line).strip()

    def states(self):
        """{service: state}; fails for a container of another name than that of a service."""
        states = {}
        for name, (_, state) in self.engine.containers().items():
            self.assertRegex(name, f"^web-{self.deployment_id}-[a-z]+-1$")
            states[name.split("-")[-2]] = state
        return states

    def ids(self):
        return {name: container_id for name, (container_id, _) in self.engine.containers().items()}

    def volumes(self):
        return set(self.engine.podman("volume", "ls", "--quiet").split())

    def test_from_the_first_day_to_the_last(self):
        """E3, E17, K-1, D-10, D-23, P-7, P-8, P-17"""
        check = {"test": ["CMD-SHELL", "test -e /tmp/up"], "interval": "1s", "retries": 30}
        start = "sleep 1; touch /tmp/up; exec sleep 100000"
        waits = {"db": {"condition": "service_healthy"}, "setup": {"condition": "service_completed_successfully"}}

        def make(value, **db):
            return {"setup": service(command=["true"], init=False, environment={"V": value}),
                    "web": service(depends_on=waits, environment={"V": value}, volumes=["/cache", "named:/named"]),
                    "db": service(**dict({"command": ["sh", "-c", start], "healthcheck": check, "environment": {"V": value},
                                          "volumes": ["/data"]}, **db)), "side": service()}

        settled = {"setup": "exited", "web": "running", "db": "running", "side": "running"}
        self.update(make("1"), volumes={"named": None})
        self.assertEqual(self.states(), settled)
        before, volumes = self.ids(), self.volumes()
        for path, name in (("/cache/x", "web"), ("/named/x", "web"), ("/data/x", "db")):
            self.shell(name, f"echo kept > {path}")
        self.assertNotIn("drift", self.device.cycle())
        self.assertEqual(self.ids(), before)

        self.update(make("2"), volumes={"named": None})                             # who waits, and whom it waits for, at once
        self.assertEqual((self.states(), self.volumes()), (settled, volumes))
        after = self.ids()
        self.assertEqual([name for name in before if before[name] == after[name]], [self.name("side")])
        times = [self.engine.facts(self.name(name), "{{.State.StartedAt}}") for name in ("db", "web")]
        self.assertLess(*times)
        kept = [self.shell(name, f"cat {path}") for path, name in (("/cache/x", "web"), ("/named/x", "web"), ("/data/x", "db"))]
        self.assertEqual(kept, ["kept"] * 3)

        for _ in range(2):                                                          # and no attempt leaves anything behind
            log = self.update(make("3", command=["sh", "-c", "exit 3"], init=False), 1, volumes={"named": None})
            self.assertRegex(log, "service db exited with code 3")
            self.assertIn("the version before runs again", log)
            self.assertEqual((self.states(), self.ids(), self.volumes()), (settled, after, volumes))
        self.assertEqual(self.shell("db", "cat /data/x"), "kept")
        self.update(make("2"), volumes={"named": None})
        self.assertEqual(self.states(), settled)

        for harm in (["kill", self.name("db")], ["pause", self.name("web")], ["rm", "--force", self.name("db")], ["stop", "--time=1", self.name("web")]):
            self.engine.podman(*harm)
            self.assertIn("drift", self.device.cycle(), harm)
            self.assertEqual((self.states(), self.volumes()), (settled, volumes), harm)
        self.assertEqual(self.ids()[self.name("side")], after[self.name("side")])
        self.assertEqual([self.shell(name, f"cat {path}") for path, name in (("/cache/x", "web"), ("/data/x", "db"))], ["kept"] * 2)

        self.wfm.withdraw(self.deployment_id)
        self.device.cycle()
        self.assertEqual((self.states(), self.volumes()), ({}, volumes))
        self.assertNotIn(self.deployment_id, self.engine.podman("network", "ls", "--format={{.Name}}"))

    def test_ports_and_volumes_change_hands(self):
        """K-2: a service is renamed, a port moves to one that stands first, two swap theirs; never two writers."""
        one, two = support.free_port(), support.free_port()
        self.update({"app": serve(one, "a")})
        self.update({"caddy": serve(one, "b")})
        self.assertEqual((support.fetch(one), self.states()), ("b", {"caddy": "running"}))
        self.update({"alpha": serve(one, "c"), "caddy": serve(two, "d")})
        self.assertEqual((support.fetch(one), support.fetch(two)), ("c", "d"))
        self.update({"alpha": serve(two, "e"), "caddy": serve(one, "f")})
        self.assertEqual((support.fetch(one), support.fetch(two), set(self.states().values())), ("f", "e", {"running"}))
        lock = "test -e /d/lock && echo two writers >> /d/faults; trap 'rm /d/lock; exit' TERM; touch /d/lock; while :; do sleep 0.1; done"
        for name in ("one", "two", "three"):
            self.update({name: service(command=["sh", "-c", lock], init=False, volumes=["d:/d"])}, volumes={"d": None})
        self.assertEqual(self.shell("three", "cat /d/faults 2>/dev/null || echo none"), "none")

    def test_a_network_is_part_of_what_its_services_are(self):
        """K-3: internal, addresses; what is not in it stays."""
        app, side = service(), service(networks=["other"])
        network = f"web-{self.deployment_id}_default"
        form = "{{.Internal}}"
        self.update({"app": app, "side": side}, networks={"other": None})
        before = self.ids()
        self.update({"app": app, "side": side}, networks={"other": None, "default": {"internal": True}})
        self.assertEqual(self.engine.podman("network", "inspect", network, "--format", form).strip(), "true")
        self.assertEqual([name for name, container_id in self.ids().items() if before[name] == container_id], [self.name("side")])
        fixed = {"ipam": {"config": [{"subnet": "10.214.5.0/24"}]}}
        app = service(networks={"default": {"ipv4_address": "10.214.5.5"}})
        for networks in ({"default": fixed}, {"plant": fixed}):                     # then the same addresses by another name
            app = service(networks={name: {"ipv4_address": "10.214.5.5"} for name in networks})
            self.update({"app": app, "side": side}, networks=dict(networks, other=None))
            self.assertIn("10.214.5.5", self.engine.facts(self.name("app"), "{{json .NetworkSettings.Networks}}"))
        failing = service(networks=["plant"], command=["sh", "-c", "exit 4"], init=False)
        self.update({"app": failing, "side": side}, 1, networks={"plant": {"internal": True}, "other": None})
        self.assertIn("10.214.5.5", self.engine.facts(self.name("app"), "{{json .NetworkSettings.Networks}}"))
        self.assertEqual(self.states(), {"app": "running", "side": "running"})
        self.assertEqual(self.ids()[self.name("side")], before[self.name("side")])

    def make_checked_image(self):
        """The name of an image that has a health check of its own."""
        name, line = "localhost/checked:1", "HEALTHCHECK --interval=1s --retries=2 CMD test -e /tmp/ok"
        if self.engine.kind == "docker":
            self.engine.podman("commit", f"--change={line}", self.engine.podman("create", IMAGE, "true").strip(), name)
        else:
            folder = support.make_folder(self)
            support.write(os.path.join(folder, "Dockerfile"), f"FROM {IMAGE}\n{line}\n")
            self.engine.podman("build", "--format=docker", "--isolation=chroot", f"--tag={name}", folder)
        self.engine.clean()
        return name

    def test_a_health_check_of_an_image_counts(self):
        """K5: as if the file had said it; who awaits it waits, and one that is turned off is none."""
        image = self.make_checked_image()
        self.assertIn("UNHEALTHY", self.update({"app": service(image=image)}, 1))
        waits = {"db": {"condition": "service_healthy"}}
        self.assertIn("service db is unhealthy", self.update({"app": service(depends_on=waits), "db": service(image=image)}, 1))
        well = ["sh", "-c", "sleep 1; touch /tmp/ok; exec sleep 100000"]
        self.update({"app": service(depends_on=waits), "db": service(image=image, command=well)})
        self.assertEqual(self.states(), {"app": "running", "db": "running"})
        before = self.ids()
        off = service(image=image, healthcheck={"disable": True})
        self.assertIn("no health check that could be awaited", self.update({"app": service(depends_on=waits), "db": off}, 1))
        self.assertEqual(self.ids(), before, "what runs stays")
        self.update({"app": service(depends_on=["db"]), "db": off})

    def test_modes_and_owners_of_configs_are_what_the_file_says(self):
        """K10: an entrypoint that is a config can be run, whoever runs it."""
        script = "#!/bin/sh\nexec sleep 100000\n"
        configs = [{"source": "run", "target": "/run.sh", "mode": 0o555}, {"source": "run", "target": "/own", "uid": "7", "gid": "8", "mode": "0400"}]
        self.update({"app": service(configs=configs, user="1000", init=False, entrypoint=["/run.sh"], command=[])}, configs={"run": {"content": script}})
        self.assertEqual(self.states(), {"app": "running"})
        for path, expected in (("/run.sh", "-r-xr-xr-x 1 0 0"), ("/own", "-r-------- 1 7 8")):
            with self.subTest(path=path):
                self.assertEqual(" ".join(self.shell("app", f"ls -ln {path}").split()[:4]), expected)

    def test_an_error_tells_the_end_of_the_log_however_much_was_said(self):
        """Engines read each stream by itself, in pieces: what was said last is in the report and in the agent's own log."""
        self.device.set("runtime.settle", "60s")            # however slow the machine is: it fails as soon as it ends
        talk = "i=0; while [ $$i -lt 3000 ]; do echo \"out $$i\"; echo \"err $$i\" >&2; i=$$((i+1)); done; "
        for end in ("echo last words >&2; exit 3", "echo last words; exit 3", "s=xxxxxxxx; for n in 1 2 3 4 5 6 7 8 9 10 11 12; do s=$$s$$s; done; echo $$s; echo last words; exit 3"):
            with self.subTest(end=end):
                log = self.update({"app": service(command=["sh", "-c", talk + end], init=False)}, 1)
                self.assertRegex(log, r"reason=\"?component web failed: service app exited with code 3; its log ends: .*last words")
                (component,) = self.wfm.reports(self.deployment_id)[-1]["body"]["components"]
                self.assertIn("last words", component["error"]["message"])

    def test_what_the_agent_before_made_stays(self):
        """K-3: a network without a mark of its definition that has not changed."""
        networks = {"default": {"internal": True, "labels": {"a": "b"}, "ipam": {"config": [{"subnet": "10.215.5.0/24"}]}}}
        self.publish({"app": service()}, networks=networks)
        self.engine.podman("network", "create", "--internal", "--label=a=b", f"--label=org.margo.project=web-{self.deployment_id}", "--subnet=10.215.5.0/24",
                           f"web-{self.deployment_id}_default")
        form = ["network", "inspect", "--format={{.Id}}" if self.engine.kind == "docker" else "--format={{.ID}}", f"web-{self.deployment_id}_default"]
        before = self.engine.podman(*form)
        self.device.cycle()
        self.assertEqual(self.engine.podman(*form), before)

    def test_a_crash_loop_that_begins_later_is_seen(self):
        """E13, P-6: it runs whenever it is looked at."""
        self.device.set("runtime.settle", "4s")
        self.update({"main": service(command=["sh", "-c", "while [ ! -e /broken ]; do sleep 0.2; done; sleep 3; exit 1"], restart="always")})
        self.shell("main", "touch /broken")

        def count():
            return int(self.engine.facts(self.name("main"), "{{.RestartCount}}"))
        support.wait_for(lambda: count() > 0, what="a restart")
        before = count()
        support.wait_for(lambda: count() > before, what="another restart")
        (reason,) = [reason for _, reason in self.device.plan().values()]
        self.assertRegex(reason, "web/main is (being restarted over and over|restarting|initialized)")

    def test_what_somebody_removes_while_it_starts_is_a_failure_that_heals(self):
        """E3 and its kind: no bug, whatever vanishes."""
        import threading
        check = {"test": ["CMD-SHELL", "test -e /nowhere"], "interval": "1s", "retries": 100}
        self.publish({"main": service(healthcheck=check)})

        def harm():
            support.wait_for(lambda: self.states().get("main") == "running", what="the start")
            self.engine.podman("rm", "--force", self.name("main"))
        thread = threading.Thread(target=harm)
        thread.start()
        log = self.device.cycle(1)
        thread.join()
        self.assertRegex(log, "the container of service main is gone|service main exited with code")
        self.update({"main": service()})
        self.assertEqual(self.states(), {"main": "running"})

    def test_purge_leaves_nothing_but_volumes(self):
        self.update({"main": service(volumes=["/data"])})
        done = self.device.run("unenroll", "--purge")
        self.assertEqual(done.returncode, 0)
        self.assertEqual((self.states(), len(self.volumes())), ({}, 1))
        command = re.search(r"volumes are kept; `(.*)` removes them\n", done.stdout).group(1).split()
        self.engine.podman(*command[1:])            # as somebody would who reads that
        self.assertEqual(self.volumes(), set())


class OnPodman(Scenario, support.EngineCase):
    pass


class OnDocker(Scenario, support.EngineCase):
    engine_class = support.Docker


if __name__ == "__main__":
    unittest.main()
