"""The Compose driver and Apply on real parts: podman.

The agent runs as a process against the example WFM; what is asserted is what the engine shows and what the applications answer.
"""
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
import unittest
import urllib.request
import uuid

import margo_agent
from tests import support
from tests.support import HELLO, IMAGE

SERVE = "mkdir -p /tmp/www && echo \"$$GREETING\" > /tmp/www/index.html && exec httpd -f -p 8080 -h /tmp/www"


def service(**members):
    return dict({"image": IMAGE, "init": True, "command": ["sleep", "100000"]}, **members)


def web(port, **members):
    """A service that answers with its GREETING."""
    return service(**dict({"command": ["sh", "-c", SERVE], "environment": ["GREETING"], "ports": [f"127.0.0.1:{port}:8080"]}, **members))


class EngineCase(support.EngineCase):
    compose, separator, deployment_id = "builtin", "-", HELLO

    def setUp(self):
        super().setUp()
        self.device.set("runtime.compose", self.compose)
        self.device.set("runtime.settle", "1s")

    def publish(self, services, tag="1.0.0", parameters=None, files=None, members=None, **options):
        """Makes a compose file of these services the one component `web` of the desired state."""
        self.wfm.add_package(support.make_compose(services, **(members or {})), tag=tag, **(files or {}))
        self.wfm.publish(support.make_deployment(self.deployment_id, components=(("web", tag),), registry=self.wfm.registry, parameters=parameters,
                                                 **options), self.deployment_id)

    def name(self, service_name="main"):
        return self.separator.join((f"web-{self.deployment_id}", service_name, "1"))

    def nothing_is_left(self):
        networks = [line for line in self.engine.podman("network", "ls", "--format", "{{.Name}}").split() if line != "podman"]
        return (self.engine.containers(), networks) == ({}, [])


class Cron(EngineCase):
    """F-20, E2: as cron runs it, by its own few variables and with no folder of administration on PATH."""

    def run_bare(self, expected=0, *arguments, **env):
        """The agent with nothing in its environment but what is given and where this test's engine lies."""
        bare = dict(self.engine.env, RUNTIME_DIRECTORY=self.device.env["RUNTIME_DIRECTORY"], **env)
        done = subprocess.run(self.device.command(*(arguments or ("run", "--once"))), env=bare, stdin=subprocess.DEVNULL, timeout=180,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
        self.assertEqual(done.returncode, expected, done.stdout)
        return done.stdout

    def test_install_update_and_roll_back_by_cron_s_path(self):
        """Debian's cron, busybox crond with and without PATH; netavark looks for iptables on PATH."""
        for env in ({"PATH": "/usr/bin:/bin", "HOME": "/root", "SHELL": "/bin/sh", "LOGNAME": "root"}, {"PATH": "/bin:/usr/bin"}, {}):
            with self.subTest(env):
                port = support.free_port()
                self.publish({"main": web(port)}, parameters={"GREETING": "first"})
                self.assertIn("ok   engine", self.run_bare(0, "doctor", **env))
                self.run_bare(**env)
                self.assertEqual(support.fetch(port), "first")
                self.publish({"main": web(port)}, parameters={"GREETING": "second"})
                self.run_bare(**env)
                self.assertEqual(support.fetch(port), "second")
                self.publish({"main": web(port, command=["false"])}, tag="1.0.1", parameters={"GREETING": "third"})
                self.assertIn("the version before runs again", self.run_bare(1, **env))
                self.assertEqual(support.fetch(port), "second")
                self.wfm.withdraw()
                self.run_bare(**env)
                self.assertTrue(self.nothing_is_left())

    def test_a_container_learns_nothing_of_systemd_s_socket(self):
        """E12: podman would hand it on, mount and all, and tell systemd that conmon is the agent."""
        path = os.path.join(self.device.folder, "notify")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as peer:
            peer.bind(path)
            peer.setblocking(False)
            self.publish({"main": service()})
            self.run_bare(PATH=os.environ["PATH"], HOME="/root", NOTIFY_SOCKET=path, WATCHDOG_USEC="1000000", WATCHDOG_PID="1", LISTEN_FDS="1")
            with self.assertRaises(BlockingIOError):
                peer.recv(100)
        seen = self.engine.podman("exec", self.name(), "env")
        for word in ("NOTIFY", "WATCHDOG", "LISTEN"):
            self.assertNotIn(word, seen)
        self.assertNotIn("notify", self.engine.podman("inspect", self.name(), "--format", "{{.Mounts}} {{.HostConfig.Binds}}"))


class Life(EngineCase):
    """One application from its first day to its last."""

    def test_install_unchanged_update_drift_and_removal(self):
        """C-113, C-130, C-163, C-180, D-3, D-10, D-23"""
        port = support.free_port()
        self.publish({"main": web(port), "side": service()}, parameters={"GREETING": "first"})
        self.device.cycle()
        self.assertEqual(support.fetch(port), "first")
        before = self.engine.containers()
        self.assertEqual(set(before), {self.name(), self.name("side")})
        self.device.cycle()
        self.assertEqual(self.engine.containers(), before)

        self.publish({"main": web(port), "side": service()}, parameters={"GREETING": "$second `two` \"x\""})
        self.device.cycle()
        self.assertEqual(support.fetch(port), "$second `two` \"x\"")
        after = self.engine.containers()
        self.assertNotEqual(after[self.name()], before[self.name()])
        self.assertEqual(after[self.name("side")], before[self.name("side")])

        self.engine.podman("stop", "--time=1", self.name())
        self.assertIn("drift", self.device.cycle())
        self.assertEqual(support.fetch(port), "$second `two` \"x\"")
        self.engine.podman("rm", "--force", "--time=1", self.name())
        self.device.cycle()
        self.assertEqual(support.fetch(port), "$second `two` \"x\"")

        self.wfm.withdraw()
        self.device.cycle()
        self.assertTrue(self.nothing_is_left())
        self.assertEqual(self.wfm.statuses()[-2:], ["removing", "removed"])

    def test_whatever_somebody_did_to_a_container_is_undone(self):
        """D-23, P-7, P-11, P-12: paused, made anew by hand with the same labels, doubled, killed; its neighbour is left alone."""
        self.publish({"main": service(), "side": service()})
        self.device.cycle()
        before = self.engine.containers()
        labels = [f"--label={key}={item}" for key, item in json.loads(self.engine.podman("inspect", self.name()))[0]["Config"]["Labels"].items()]
        for number, commands in enumerate((
                [("pause", self.name())], [("rm", "--force", "--time=0", self.name()), ("run", "--detach", "--name", self.name(), *labels, IMAGE, "sleep", "9999")],
                [("create", "--name", "copy", *labels, IMAGE, "sleep", "1")], [("kill", self.name())])):
            for command in commands:
                self.engine.podman(*command)
            self.assertIn("drift", self.device.cycle(), commands)
            after = self.engine.containers()
            self.assertEqual({name: state for name, (_, state) in after.items()}, {self.name(): "running", self.name("side"): "running"}, commands)
            self.assertEqual(after[self.name("side")], before[self.name("side")])
            self.assertIn("100000", json.loads(self.engine.podman("inspect", self.name()))[0]["Config"]["Cmd"])
        self.device.cycle()
        self.assertEqual(self.engine.containers(), after)

    def test_labels_and_names_are_the_contract_s(self):
        self.publish({"main": service()})
        self.device.cycle()
        (item,) = json.loads(self.engine.podman("ps", "--format", "json"))
        self.assertEqual((item["Labels"]["org.margo.deployment"], item["Labels"]["org.margo.component"]), (HELLO, "web"))
        self.assertTrue(item["Names"][0].startswith(f"web-{HELLO}"))

    def test_a_named_volume_keeps_its_data_over_updates(self):
        """D-10"""
        for round_number in ("1", "2"):
            command = f"echo {round_number} >> /data/log; cat /data/log > /data/seen; exec sleep 100000"
            self.publish({"main": service(command=["sh", "-c", command], volumes=["data:/data"])}, tag=f"{round_number}.0.0",
                         members={"volumes": {"data": {}}})
            self.device.cycle()
        self.assertEqual(self.engine.podman("exec", self.name(), "cat", "/data/seen").split(), ["1", "2"])

    def test_a_crash_is_a_failure_with_the_last_words_and_a_way_back(self):
        """C-164, D-12, P-6, P-8"""
        port = support.free_port()
        self.publish({"main": web(port)}, parameters={"GREETING": "good"})
        self.device.cycle()
        crash = service(command=["sh", "-c", "echo cannot find the valve; sleep 0.3; exit 3"], restart="always")
        self.publish({"main": crash}, tag="2.0.0", parameters={"GREETING": "good"})
        self.device.cycle(1)
        error = self.wfm.reports()[-1]["body"]["components"][0]["error"]["message"]
        for words in ("service main exited", "cannot find the valve", "the version before runs again"):
            self.assertIn(words, error)
        self.assertEqual(support.fetch(port), "good")

    def test_a_one_shot_that_ends_well_is_done(self):
        """P-17"""
        self.publish({"setup": service(command=["true"], init=False), "main": service(
            depends_on={"setup": {"condition": "service_completed_successfully"}})})
        self.device.cycle()
        before = self.engine.containers()
        self.device.cycle()
        self.assertEqual(self.engine.containers(), before)

    def test_parameters_do_not_steer_the_tools(self):
        """C-184, D-18: PATH and LD_PRELOAD are the container's alone."""
        self.publish({"main": service(environment=["LD_PRELOAD", "GREETING"])}, parameters={"LD_PRELOAD": "/nowhere.so", "GREETING": "x"})
        self.device.cycle()
        self.assertIn("/nowhere.so", json.dumps(json.loads(self.engine.podman("inspect", self.name()))[0]["Config"]["Env"]))


class Builtin(EngineCase):
    def inside(self, *command, service_name="main"):
        return self.engine.podman("exec", self.name(service_name), *command).strip()

    def test_settings_of_a_service_take_effect_in_the_container(self):
        main = service(environment={"A": "1.10", "B": "two words", "C": None}, env_file=["more.env"], user="1000:1000", working_dir="/tmp",
                       hostname="cell", read_only=True, tmpfs=["/scratch"], cap_drop=["ALL"], ulimits={"nofile": {"soft": 100, "hard": 200}, "nproc": 1024},
                       extra_hosts=["valve:10.1.2.3"], labels={"com.example.x": "y"}, stop_signal="SIGINT", stop_grace_period="3s",
                       volumes=["./page.html:/page.html:ro", {"type": "tmpfs", "target": "/t2"}], configs=[{"source": "c", "target": "/etc/app.conf"}],
                       mem_limit="64m", entrypoint=["sh", "-c"], command=["exec sleep 100000"])
        self.publish({"main": main}, files={"more.env": "D=from file\nE='quoted $x'\n", "page.html": "hi"},
                     members={"configs": {"c": {"content": "key = value"}}})
        self.device.cycle()
        env = dict(line.split("=", 1) for line in self.inside("env").split("\n"))
        self.assertEqual({key: env.get(key) for key in "ABCDE"}, {"A": "1.10", "B": "two words", "C": None, "D": "from file", "E": "quoted $x"})
        self.assertEqual(self.inside("sh", "-c", "id -u; id -g; pwd; cat /etc/hostname /page.html /etc/app.conf").split("\n"),
                         ["1000", "1000", "/tmp", "cellhikey = value"])
        self.assertEqual(self.inside("sh", "-c", "touch /x 2>/dev/null || echo ro"), "ro")
        self.assertRegex(self.inside("cat", "/proc/1/limits"), r"Max open files +100 +200")
        self.assertIn("10.1.2.3", self.inside("cat", "/etc/hosts"))
        facts = json.loads(self.engine.podman("inspect", self.name()))[0]
        self.assertEqual((facts["Config"]["Labels"]["com.example.x"], facts["HostConfig"]["Memory"]), ("y", 64 * 1024 * 1024))
        self.assertEqual(facts["EffectiveCaps"] or [], [])
        self.assertTrue(facts["HostConfig"]["Init"])

    def test_a_health_check_is_run_although_no_systemd_runs_it(self):
        """C-165: healthy, and then what waits for it."""
        check = {"test": ["CMD-SHELL", "test -e /tmp/ready"], "interval": "1s", "retries": 30}
        self.publish({"main": service(command=["sh", "-c", "sleep 1; touch /tmp/ready; exec sleep 100000"], healthcheck=check),
                      "after": service(depends_on={"main": {"condition": "service_healthy"}})})
        self.device.cycle()
        facts = {name: json.loads(self.engine.podman("inspect", self.name(name)))[0]["State"]["StartedAt"] for name in ("main", "after")}
        self.assertLess(facts["main"], facts["after"])

    def test_one_that_gets_unwell_later_is_made_anew(self):
        """Issue, Drift: the engine's list shows it, once somebody ran the check; here that is the agent."""
        check = {"test": ["CMD-SHELL", "test ! -e /tmp/unwell"], "interval": "1h", "retries": 1}
        self.publish({"main": service(healthcheck=check)})
        self.device.cycle()
        before = self.engine.containers()
        self.device.cycle()
        self.assertEqual(self.engine.containers(), before)
        self.inside("touch", "/tmp/unwell")
        if os.path.isdir("/run/systemd/system"):
            self.engine.podman("healthcheck", "run", self.name(), check=False)
        else:
            self.device.cycle()
        self.assertIn("web/main is unhealthy", self.device.cycle())
        self.assertNotEqual(self.engine.containers(), before)
        self.assertEqual(self.wfm.statuses()[-1], "installed")

    def test_a_crash_loop_that_begins_later_is_a_failure(self):
        """P-6: the engine starts it over and over, so that it always seems to run; the last words are told."""
        loop = "while [ ! -e /tmp/broken ]; do sleep 0.1; done; echo the valve is stuck; sleep 0.2; exit 3"
        self.publish({"main": service(command=["sh", "-c", loop], restart="always"), "side": service()})
        self.device.cycle()
        neighbour = self.engine.containers()[self.name("side")]
        time.sleep(2.5)                             # a start that is less than 2 s after the known one counts as that
        self.inside("touch", "/tmp/broken")
        restarts = support.wait_for(lambda: json.loads(self.engine.podman("inspect", self.name()))[0]["RestartCount"] > 1, what="the loop")
        self.assertTrue(restarts)
        self.device.cycle(1)
        error = self.wfm.reports()[-1]["body"]["components"][0]["error"]
        self.assertEqual(error["code"], "INSTALL_FAILED")
        self.assertIn("the valve is stuck", error["message"])
        self.assertEqual(self.engine.containers()[self.name("side")], neighbour)

    def test_one_restart_long_ago_fails_no_repair(self):
        """P-7: of its neighbour, either."""
        main = service(command=["sh", "-c", "test -e /tmp/once || { touch /tmp/once; sleep 2; exit 1; }; exec sleep 100000"], restart="always")
        self.publish({"main": main, "side": service()}, wait=False)
        self.device.cycle()
        support.wait_for(lambda: json.loads(self.engine.podman("inspect", self.name()))[0]["RestartCount"], what="the restart")
        self.engine.podman("rm", "--force", "--time=0", self.name("side"))
        self.publish({"main": main, "side": service()})
        self.device.cycle()
        self.assertEqual({name: state for name, (_, state) in self.engine.containers().items()}, {self.name(): "running", self.name("side"): "running"})

    def test_services_that_share_a_network_are_updated_together(self):
        """The one whose network the other has can go only after that one."""
        for revision in ("1", "2"):
            self.publish({"a": service(environment={"X": revision}), "d": service(network_mode="service:a", depends_on=["a"])}, tag=f"{revision}.0.0")
            self.device.cycle()
        containers = self.engine.containers()
        self.assertEqual({name: state for name, (_, state) in containers.items()}, {self.name("a"): "running", self.name("d"): "running"})
        mode = json.loads(self.engine.podman("inspect", self.name("d")))[0]["HostConfig"]["NetworkMode"]
        self.assertIn(containers[self.name("a")][0], mode)

    def test_a_service_that_never_gets_well_is_unhealthy(self):
        check = {"test": ["CMD", "false"], "interval": "1s", "retries": 2}
        self.publish({"main": service(healthcheck=check)})
        self.device.cycle(1)
        error = self.wfm.reports()[-1]["body"]["components"][0]["error"]
        self.assertEqual(error["code"], "UNHEALTHY")
        self.assertIn("main is unhealthy", error["message"])

    def test_networks_are_made_joined_and_removed(self):
        self.publish({"a": service(networks=["front", "back"]), "b": service(networks={"back": {"aliases": ["db"]}}),
                      "c": service(network_mode="none"), "d": service(network_mode="service:a", depends_on=["a"])},
                     members={"networks": {"front": {}, "back": {"internal": True}}})
        self.device.cycle()
        joined = json.loads(self.engine.podman("inspect", self.name("a")))[0]["NetworkSettings"]["Networks"]
        self.assertEqual(set(joined), {f"web-{HELLO}_front", f"web-{HELLO}_back"})
        links = [self.inside("ls", "/sys/class/net", service_name=name).split() for name in "acd"]
        self.assertEqual((links[1], links[2]), (["lo"], links[0]))
        self.wfm.withdraw()
        self.device.cycle()
        self.assertTrue(self.nothing_is_left())

    def test_services_find_each_other_by_name(self):
        """What everybody expects of a compose file: the name of a service, and its aliases, are host names for the others."""
        support.require("netavark")
        port, self.deployment_id = support.free_port(), str(uuid.uuid4())           # netavark keeps names by network, whichever engine it is for
        self.publish({"api": web(port, networks={"default": {"aliases": ["backend"]}}), "asks": service(depends_on=["api"])},
                     parameters={"GREETING": "found"})
        self.device.cycle()
        support.fetch(port)
        for name in ("api", "backend"):
            self.assertEqual(self.inside("wget", "-q", "-O", "-", f"http://{name}:8080/", service_name="asks"), "found")

    def test_what_the_policy_denies_is_never_started(self):
        for member, value in (("privileged", True), ("pid", "host"), ("cap_add", ["SYS_ADMIN"]), ("devices", ["/dev/null"]),
                              ("volumes", ["/etc:/host"])):
            self.publish({"main": service(**{member: value})}, tag="1.0.0" if member == "privileged" else f"1.0.{len(member)}")
            self.device.cycle(1)
            self.assertEqual(self.wfm.reports()[-1]["body"]["components"][0]["error"]["code"], "POLICY_DENIED")
            self.assertEqual(self.engine.containers(), {})

    def test_downtime_of_an_update_is_only_that_of_the_changed_service(self):
        """P-20: the new image and container are settled before the old one stops; the neighbour never does."""
        ports = [support.free_port(), support.free_port()]
        self.publish({"main": web(ports[0]), "neighbour": web(ports[1], environment={"GREETING": "still here"})}, parameters={"GREETING": "a"})
        self.device.cycle()
        started = json.loads(self.engine.podman("inspect", self.name("neighbour")))[0]["State"]["StartedAt"]
        self.publish({"main": web(ports[0]), "neighbour": web(ports[1], environment={"GREETING": "still here"})}, parameters={"GREETING": "b"})
        self.device.cycle()
        self.assertEqual((support.fetch(ports[0]), support.fetch(ports[1])), ("b", "still here"))
        self.assertEqual(json.loads(self.engine.podman("inspect", self.name("neighbour")))[0]["State"]["StartedAt"], started)

    def test_secrets_lie_in_files_of_mode_0600(self):
        """C-018, D-35"""
        self.publish({"main": service(environment=["GREETING"])}, parameters={"GREETING": "s3cret"})
        self.device.cycle()
        found = []
        for folder, _, names in os.walk(self.device.state_dir):
            for path in (os.path.join(folder, name) for name in names):
                with open(path, "rb") as file:
                    if b"s3cret" in file.read():
                        found.append((os.path.basename(path), oct(os.stat(path).st_mode & 0o777)))
        self.assertTrue(found)
        self.assertEqual({mode for _, mode in found}, {"0o600"})


class PrivateImages(EngineCase):
    """Images from a registry that asks for a name and a password over TLS of its own authority."""

    def test_credentials_and_ca_of_the_configuration_serve_the_engine_too(self):
        support.require("docker-registry", "openssl")
        folder, port = support.make_folder(self), support.free_port()
        host = f"localhost:{port}"
        support.write(os.path.join(folder, "htpasswd"), "device:$2b$05$t6yDJSrc/1BDmHKYmeLOb.hZocZS1CUEg71V.qXZEjMk5U1QP22W6\n")
        support.write(os.path.join(folder, "password"), "s3cret\n", 0o600)
        support.write(os.path.join(folder, "config.yml"), json.dumps({
            "version": 0.1, "storage": {"filesystem": {"rootdirectory": folder}}, "auth": {"htpasswd": {
                "realm": "test", "path": os.path.join(folder, "htpasswd")}},
            "http": {"addr": f"127.0.0.1:{port}", "tls": {"certificate": self.pki.path("site.pem"), "key": self.pki.path("site.key")}}}))
        registry = support.Service(self, ["docker-registry", "serve", os.path.join(folder, "config.yml")])
        support.wait_for(lambda: "listening on" in registry.read_output(), what="the registry")
        os.mkdir(os.path.join(folder, "certs"))
        shutil.copy(self.pki.path("site-ca.pem"), os.path.join(folder, "certs", "ca.crt"))
        self.engine.podman("push", "--creds=device:s3cret", f"--cert-dir={folder}/certs", IMAGE, f"{host}/app:1")

        self.publish({"main": service(image=f"{host}/app:1")})
        self.assertIn("PULL_FAILED", self.device.cycle(1))
        settings = {"ca": self.pki.path("site-ca.pem"), "username": "device", "password_file": os.path.join(folder, "password")}
        self.device.settings["registries"] = {self.wfm.registry: {"ca": self.pki.path("site-ca.pem")}, host: settings}
        self.device.save()
        self.device.run("retry")
        self.device.cycle(0)
        self.assertEqual(len(self.engine.containers()), 1)
        self.engine.podman("rmi", "--force", f"{host}/app:1", check=False)


class SlowPull(EngineCase):
    """A link of 1 MiB a second, and somebody before a terminal."""

    def slow_down(self, port):
        """The number of a port that leads to another one slowly."""
        door = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(door.close)

        def carry(source, target, pause):
            with contextlib.suppress(OSError):
                for piece in iter(lambda: source.recv(65536), b""):
                    target.sendall(piece)
                    time.sleep(pause * len(piece) / 65536)
                target.shutdown(socket.SHUT_WR)

        def attend():
            with contextlib.suppress(OSError):
                while True:
                    near, _ = door.accept()
                    far = socket.create_connection(("127.0.0.1", port))
                    self.addCleanup(near.close)
                    self.addCleanup(far.close)
                    for words in ((near, far, 0), (far, near, 1 / 16)):
                        threading.Thread(target=carry, args=words, daemon=True).start()

        threading.Thread(target=attend, daemon=True).start()
        return door.getsockname()[1]

    def test_a_terminal_shows_every_few_seconds_how_far_a_pull_is(self):
        support.require("docker-registry")
        folder, port = support.make_folder(self), support.free_port()
        support.write(os.path.join(folder, "config.yml"), json.dumps({
            "version": 0.1, "storage": {"filesystem": {"rootdirectory": folder}}, "http": {"addr": f"127.0.0.1:{port}"}}))
        registry = support.Service(self, ["docker-registry", "serve", os.path.join(folder, "config.yml")])
        support.wait_for(lambda: "listening on" in registry.read_output(), what="the registry")
        support.write(os.path.join(folder, "Containerfile"), f"FROM {IMAGE}\nCOPY data /data\n")
        support.write(os.path.join(folder, "data"), os.urandom(10 << 20))
        self.engine.podman("build", "--network=none", "--tag", f"127.0.0.1:{port}/app:1", folder)
        self.engine.podman("push", "--tls-verify=false", f"127.0.0.1:{port}/app:1")
        self.engine.podman("rmi", f"127.0.0.1:{port}/app:1")
        host = f"127.0.0.1:{self.slow_down(port)}"
        self.device.settings["registries"][host] = {"insecure": True}
        self.device.save()
        self.publish({"main": service(image=f"{host}/app:1", network_mode="none")})
        leader, follower = os.openpty()
        with os.fdopen(leader, "rb", 0) as screen:
            process = subprocess.Popen(self.device.command("run", "--once"), env=self.device.env, stderr=follower)
            os.close(follower)
            shown = b""
            with contextlib.suppress(OSError):      # so a terminal ends
                for piece in iter(lambda: screen.read(65536), b""):
                    shown += piece
            self.assertEqual(process.wait(60), 0, shown)
        sizes = [int(size) for size in re.findall(rb"an image is being pulled image=\S+ seconds=\d+ fetched=(\d+)", shown)]
        self.assertGreaterEqual(len(sizes), 2, shown)
        self.assertEqual(sizes, sorted(sizes))
        self.assertGreater(sizes[-1], 1 << 20)


class Mirrored:
    """F-31: a plant without a way out; what a registry's mirror has runs under the name that the file gives it."""

    def setUp(self):
        super().setUp()
        support.require("docker-registry")
        self.folder, port = support.make_folder(self), support.free_port()
        self.mirror = f"127.0.0.1:{port}"
        support.write(os.path.join(self.folder, "config.yml"), json.dumps({
            "version": 0.1, "storage": {"filesystem": {"rootdirectory": self.folder}}, "http": {"addr": self.mirror}}))
        self.registry = support.Service(self, ["docker-registry", "serve", os.path.join(self.folder, "config.yml")])
        support.wait_for(lambda: "listening on" in self.registry.read_output(), what="the registry")
        for name in ("plant/app:1", "library/tool:2"):
            self.engine.make_image(f"{self.mirror}/{name}")         # made anew, it has an id of its own
            self.engine.podman("push", *(["--tls-verify=false"] if self.engine.kind == "podman" else []), f"{self.mirror}/{name}")
            self.engine.podman("rmi", f"{self.mirror}/{name}")
        self.device.settings["registries"].update({self.mirror: {"insecure": True}, "127.0.0.1:9": {"mirror": self.mirror, "insecure": True},
                                                   "docker.io": {"mirror": f"http://{self.mirror}/"}})
        self.device.save()

    def find_names(self):
        """The names by which the engine knows images, but that of the tests' own."""
        return {line for line in self.engine.podman("images", "--format={{.Repository}}:{{.Tag}}").split() if "margo-test" not in line}

    def test_images_come_from_the_mirror_under_their_own_names(self):
        self.publish({"main": service(image="127.0.0.1:9/plant/app:1"), "tool": service(image="tool:2")})
        self.device.cycle(0)
        hub = "docker.io/library/tool:2" if self.engine.kind == "podman" else "tool:2"
        self.assertEqual(self.find_names(), {"127.0.0.1:9/plant/app:1", hub})
        self.registry.stop()
        self.engine.podman("rm", "--force", self.name(), self.name("tool"))
        self.device.cycle(0)
        self.assertEqual({state for _, state in self.engine.containers().values()}, {"running"})
        self.wfm.withdraw(self.deployment_id)
        self.device.cycle(0)
        self.assertEqual(self.find_names(), set(), "what the agent pulled is pruned")

    def test_an_image_that_the_mirror_lacks_is_asked_of_its_registry(self):
        self.publish({"main": service(image="127.0.0.1:9/plant/other:1")})
        words = self.device.cycle(1)
        self.assertIn("the mirror does not serve it; the registry itself is asked", words)
        self.assertIn("PULL_FAILED", words)

    def test_by_digest(self):
        address = f"http://{self.mirror}/v2/plant/app/manifests/1"
        kinds = ("application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json")
        with urllib.request.urlopen(urllib.request.Request(address, headers={"Accept": ", ".join(kinds)})) as answer:
            digest = answer.headers["Docker-Content-Digest"]
        image = f"127.0.0.1:9/plant/app@{digest}"
        self.publish({"main": service(image=image)})
        if self.engine.kind == "docker":
            self.assertIn("give the daemon this mirror instead", self.device.cycle(1))
            return
        self.device.cycle(0)
        self.assertEqual(self.engine.facts(self.name(), "{{.ImageName}}"), image)
        self.registry.stop()
        self.engine.podman("rm", "--force", self.name())
        self.device.cycle(0)
        self.wfm.withdraw(self.deployment_id)
        self.device.cycle(0)
        self.assertEqual(self.find_names(), set(), "what the agent pulled is pruned")


class Memory(EngineCase):
    """F-02: what the engine remembers is not what is; nobody has to come."""

    def test_a_container_whose_runtime_went_away_with_an_upgrade_is_made_anew(self):
        conf, old = self.engine.env["CONTAINERS_CONF"], os.path.join(support.make_folder(self), "oldruntime")
        with open(conf) as file:
            text = file.read()
        shutil.copy(shutil.which("runc") or shutil.which("crun"), old)
        self.addCleanup(support.write, conf, text)
        support.write(conf, re.sub('runtime = "[a-z]+"', 'runtime = "oldruntime"', text) + f'[engine.runtimes]\noldruntime = ["{old}"]\n')
        self.publish({"main": service()})
        self.device.cycle(0)
        before = self.engine.containers()
        self.engine.podman("stop", "--time=0", self.name())
        support.write(conf, text)
        os.remove(old)
        self.assertIn("a container that cannot be started is made anew", self.device.cycle(0))
        self.assertNotEqual(self.engine.containers(), before)

    def test_names_that_storage_alone_holds_are_freed_and_no_other(self):
        """F-01: a killed `podman create` leaves one; here another podman that has the same storage has made them."""
        conf = self.engine.env["CONTAINERS_CONF"]
        with open(conf) as file:
            text = file.read()
        self.addCleanup(support.write, conf, text)
        other = text.replace("[engine]\n", f'[engine]\nstatic_dir = "{support.make_folder(self)}"\n')

        def hold(*names):
            support.write(conf, other)
            for name in names:
                self.engine.podman("create", "--network=none", f"--name={name}", IMAGE, "true")
            support.write(conf, text)

        def find_held():
            found = json.loads(self.engine.podman("ps", "--all", "--external", "--format=json"))
            return [item["Names"][0] for item in found if item["State"] == "storage"]
        hold(self.name(), self.name() + "-try-0a1b2c3d", self.name() + "-new-0a1b2c3d", "somebody-else")
        self.publish({"main": service()})
        self.device.cycle(0)
        self.assertEqual((len(self.engine.containers()), find_held()), (1, ["somebody-else"]))
        hold(self.name() + "-try-4e5f6a7b")
        self.wfm.withdraw(HELLO)
        self.device.cycle(0)
        self.assertEqual((self.engine.containers(), find_held()), ({}, ["somebody-else"]))
        self.engine.podman("rm", "--force", "somebody-else")

    def test_an_image_of_ours_with_a_damaged_layer_is_pulled_anew(self):
        support.require("docker-registry")
        folder, port = support.make_folder(self), support.free_port()
        image = f"127.0.0.1:{port}/app:1"
        support.write(os.path.join(folder, "config.yml"), json.dumps({
            "version": 0.1, "storage": {"filesystem": {"rootdirectory": folder}}, "http": {"addr": f"127.0.0.1:{port}"}}))
        registry = support.Service(self, ["docker-registry", "serve", os.path.join(folder, "config.yml")])
        support.wait_for(lambda: "listening on" in registry.read_output(), what="the registry")
        self.engine.podman("run", "--network=none", "--name=x", IMAGE, "sh", "-c", "echo unique > /tmp/u")
        self.engine.podman("commit", "--quiet", "x", image)
        self.engine.podman("rm", "x")
        self.engine.podman("push", "--tls-verify=false", image)
        self.engine.podman("rmi", image)
        self.device.settings["registries"][image.split("/")[0]] = {"insecure": True}
        self.device.save()
        self.publish({"main": service(image=image)})
        self.device.cycle(0)
        with open(os.path.join(self.engine.folder, "graph", "vfs-images", "images.json")) as file:
            layer = next(item["layer"] for item in json.load(file) if image in (item.get("names") or ()))
        self.engine.podman("rm", "--force", "--time=0", self.name())
        shutil.rmtree(os.path.join(self.engine.folder, "graph", "vfs", "dir", layer))
        self.assertIn("a damaged image is pulled anew", self.device.cycle(0))
        self.assertEqual(self.inside("cat", "/tmp/u"), "unique")

    def inside(self, *command):
        return self.engine.podman("exec", self.name(), *command).strip()


class MirroredPodman(Mirrored, EngineCase):
    pass


class MirroredDocker(Mirrored, EngineCase):
    engine_class = support.Docker


class FullDisk(EngineCase):
    """A storage of 60 MiB and an image of 40 MiB in a registry."""

    def setUp(self):
        super().setUp()
        support.require("docker-registry")
        self.folder, port = support.make_folder(self), support.free_port()
        self.image = f"localhost:{port}/big:1"
        support.write(os.path.join(self.folder, "config.yml"), json.dumps({
            "version": 0.1, "storage": {"filesystem": {"rootdirectory": self.folder}}, "http": {"addr": f"127.0.0.1:{port}"}}))
        self.registry = support.Service(self, ["docker-registry", "serve", os.path.join(self.folder, "config.yml")])
        support.wait_for(lambda: "listening on" in self.registry.read_output(), what="the registry")
        support.write(os.path.join(self.folder, "context", "random"), os.urandom(40 << 20))
        support.write(os.path.join(self.folder, "context", "Dockerfile"), f"FROM {IMAGE}\nCOPY random /random\n")
        self.engine.podman("build", "--isolation=chroot", "--tag", self.image, os.path.join(self.folder, "context"))
        self.engine.podman("push", "--tls-verify=false", self.image)
        self.layer = max((size, name) for name, size in self.blobs())[1]
        self.engine.podman("rmi", self.image)
        self.disk = os.path.join(self.folder, "disk")
        os.mkdir(self.disk)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", self.disk], check=True)
        self.addCleanup(subprocess.run, ["umount", "--lazy", self.disk])
        storage = support.write(os.path.join(self.folder, "storage.conf"), f"[storage]\ndriver = \"vfs\"\ngraphroot = \"{self.disk}/graph\"\n"
                                f"runroot = \"{self.disk}/run\"\n")
        self.device.env["CONTAINERS_STORAGE_CONF"] = storage
        self.addCleanup(self.podman, "rm", "--all", "--force", "--time=0")
        self.device.settings["registries"][self.image.split("/")[0]] = {"insecure": True}
        self.device.save()

    def blobs(self):
        """[(digest, size)] of what the registry holds."""
        root = os.path.join(self.folder, "docker", "registry", "v2", "blobs", "sha256")
        return [(os.path.basename(path), os.path.getsize(os.path.join(path, "data"))) for path, _, names in os.walk(root) if "data" in names]

    def is_fetched(self):
        return any(self.layer in line and "GET" in line for line in self.registry.read_output().splitlines())

    def podman(self, *arguments):
        return subprocess.run(["podman"] + list(arguments), env=self.device.env, stdout=subprocess.PIPE, check=True).stdout.decode()

    def test_it_is_found_before_the_pull(self):
        """P-4: on a disk that is as good as full nothing is fetched; the error says how much is free, and where."""
        self.publish({"main": service(image=self.image)})
        with open(os.path.join(self.disk, "filler"), "wb") as file:
            file.write(bytes(os.statvfs(self.disk).f_bavail * os.statvfs(self.disk).f_frsize - (1 << 20)))
        self.device.cycle(1)
        error = self.wfm.reports()[-1]["body"]["components"][0]["error"]
        self.assertEqual(error["code"], "DISK_FULL")
        self.assertRegex(error["message"], f"image {self.image} takes about [0-9]+ KiB, and of the [0-9]+ KiB that are free at {self.disk}/graph")
        self.assertFalse(self.is_fetched())
        os.remove(os.path.join(self.disk, "filler"))
        subprocess.run(["mount", "-o", "remount,size=200m", self.disk], check=True)
        self.device.run("retry")
        self.device.cycle()
        self.assertTrue(self.is_fetched())

    def test_a_pull_that_fills_it_is_told_as_such(self):
        """P-4: where the registry does not tell sizes."""
        driver = margo_agent.ComposeDriver("podman", margo_agent.load_config(self.device.config_file), self.device.env)
        driver.check_space = lambda image: ""
        subprocess.run(["mount", "-o", "remount,size=20m", self.disk], check=True)
        with self.assertRaises(margo_agent.ComponentError) as caught:
            driver.pull(margo_agent.Service("main", self.image, [], [], {}, {}, [], {}, "missing", "", []), 60)
        self.assertEqual(caught.exception.code, "DISK_FULL")


class Quickstart(unittest.TestCase):
    """The README's first command, as a newcomer runs it."""

    def test_it_does_the_main_job_and_leaves_nothing_behind(self):
        support.require("podman")
        before = subprocess.run(["podman", "ps", "--all", "--quiet"], stdout=subprocess.PIPE).stdout
        done = subprocess.run(["sh", os.path.join(support.EXAMPLES, "quickstart.sh"), "--no-install"], stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, universal_newlines=True, timeout=300)
        self.assertEqual(done.returncode, 0, done.stdout)
        for words in ("\nHello from the edge\n", "\nGood evening from line 4\n", "removed; web removed", "nothing is left behind"):
            self.assertIn(words, done.stdout)
        self.assertEqual(subprocess.run(["podman", "ps", "--all", "--quiet"], stdout=subprocess.PIPE).stdout, before)


if __name__ == "__main__":
    unittest.main()
