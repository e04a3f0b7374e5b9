"""Compose file and Compose driver on a real engine, key by key: what is accepted does what compose says.

One file with many services is started once; each row of CHECKS asks a container, or the engine, for what one key has done.
"""
import glob
import json
import os
import re
import socket
import time
import unittest

import margo_agent
from tests import support
from tests.support import HELLO, IMAGE
from tests.test_compose_file import make_config

PROJECT = margo_agent.make_project_name("web", HELLO)
BOTH, PODMAN, DOCKER = ("podman", "docker"), ("podman",), ("docker",)
# What compose itself does not pass on to a container that it starts in the background.
EFFECTLESS = {"attach", "expose", "scale", "profiles"}
FILES = {"conf/a.ini": "from the package", "more.env": "FROM_FILE=one\nBOTH=file\n", "token": "s3cret"}
PARAMETERS = {"GREETING": "hello $you", "KEY": "k3y"}


def sleep(**keys):
    """A service that does nothing, with these keys."""
    return dict({"image": IMAGE, "command": ["sleep", "1000"], "stop_grace_period": "1s"}, **keys)


SERVICES = {
    "plain": sleep(
        container_name="the-plain", user="1000:1001", hostname="cell", working_dir="/tmp", init=True, read_only=True, tty=True, stdin_open=True,
        cap_drop=["ALL"], cap_add=["CHOWN"], security_opt=["no-new-privileges:true"], group_add=["1005"], oom_score_adj=500,
        environment={"GREETING": None, "BOTH": "file stands below", "VERSION": 1.10}, env_file=["more.env", {"path": "absent.env", "required": False}],
        labels={"com.example.kind": "test"}, sysctls={"net.core.somaxconn": 512}, ulimits={"nofile": {"soft": 500, "hard": 600}, "nproc": 1024, "core": 0},
        stop_signal="SIGINT", stop_grace_period="1m30s", restart="on-failure:3", mac_address="02:42:ac:11:65:43", shm_size="8m",
        extra_hosts={"valve": "10.1.2.3", "six": "fd00::1"}, dns=["10.0.0.1"], dns_opt=["ndots:3"], dns_search=["plant.example"],
        pull_policy="never", platform="linux/amd64", expose=["80"], attach=False, scale=1, logging={"driver": "json-file", "options": {"max-size": "1m"}},
        blkio_config={"weight": 300}, devices=["/dev/null:/dev/nought:rw"], device_cgroup_rules=["c 1:3 rw"], userns_mode="host",
        entrypoint=["/bin/busybox", "sleep"], command=["1000"]),
    "limited": sleep(mem_limit="64m", memswap_limit="128m", mem_reservation="8m", cpus=0.5, cpu_shares=512, cpuset="0", pids_limit=77, mem_swappiness=0),
    "timed": sleep(cpu_period=50000, cpu_quota=25000, pid="host"),
    "deployed": sleep(restart="always", deploy={
        "mode": "replicated", "replicas": 1, "restart_policy": {"condition": "none"},
        "resources": {"limits": {"memory": "32M", "cpus": "0.25", "pids": 55}, "reservations": {"memory": "16M"}}}),
    "files": sleep(
        configs=["short", {"source": "inline", "target": "/etc/inline.conf", "mode": 0o440, "uid": "1000", "gid": "1001"}],
        secrets=["token", {"source": "key", "target": "key", "mode": 0o400}], tmpfs=["/scratch:size=1m,mode=0700"],
        volumes=["data:/data", "data:/again:ro", "./conf:/conf", "/anonymous", {"type": "tmpfs", "target": "/small", "tmpfs": {"size": "2m"}},
                 {"type": "volume", "source": "memory", "target": "/memory"}, {"type": "bind", "source": "./conf/a.ini", "target": "/a.ini", "read_only": True}]),
    "near": sleep(ipc="shareable", networks={"front": {"aliases": ["nearby"], "ipv4_address": "SUBNET.7"}, "back": {"priority": 5}}),
    "beside": sleep(network_mode="service:near", pid="service:near", ipc="service:near"),
    "alone": sleep(network_mode="none"),
    "caller": sleep(networks=["front"], links=["near:linked"], depends_on={"once": {"condition": "service_completed_successfully"},
                                                                          "checked": {"condition": "service_healthy"}}),
    "named": sleep(container_name="the-one", networks=["front"]),
    "once": sleep(command="sh -c 'exit 0'", restart="no"),
    "checked": sleep(command=["sh", "-c", "sleep 1; touch /tmp/well; exec sleep 1000"], healthcheck={
        "test": ["CMD", "test", "-e", "/tmp/well"], "interval": "1s", "timeout": "5s", "retries": 30, "start_period": "1s", "start_interval": "1s"}),
    "built": sleep(build={"context": "."}),
    "debug": sleep(profiles=["debug"]),
}
MEMBERS = {
    "networks": {"front": {"ipam": {"config": [{"subnet": "SUBNET.0/24", "gateway": "SUBNET.1"}]}, "labels": {"com.example.n": "1"}},
                 "back": {"internal": True}},
    "volumes": {"data": {"labels": {"com.example.v": "1"}}, "memory": {"driver_opts": {"type": "tmpfs", "device": "tmpfs", "o": "mode=0750,noexec"}}},
    "configs": {"short": {"content": "say ${GREETING}"}, "inline": {"file": "./conf/a.ini"}},
    "secrets": {"token": {"file": "./token"}, "key": {"environment": "KEY"}}}
PRIVILEGED = {"privileged": sleep(privileged=True)}

SIZE = r"size=%s\b"
# (key, service, question, part of the answer as a pattern, engines).  A question that begins with a dot is a template of `inspect`, one
# with a colon a command with its service's container before it, all others are asked of a shell in the container.
CHECKS = [
    ("image", "plain", ".Config.Image", "margo-test:1", BOTH), ("user", "plain", "id -u; id -g", "^1000\n1001$", BOTH),
    ("group_add", "plain", "id -G", "1005", BOTH), ("hostname", "plain", "cat /etc/hostname", "^cell$", BOTH),
    ("working_dir", "plain", "busybox pwd", "^/tmp$", BOTH), ("init", "plain", "cat /proc/1/cmdline", "init|catatonit", BOTH),
    ("read_only", "plain", "touch /x 2>/dev/null || echo no", "^no$", BOTH), ("tty", "plain", ".Config.Tty", "true", BOTH),
    ("stdin_open", "plain", ".Config.OpenStdin", "true", BOTH), ("cap_drop", "plain", "busybox grep CapBnd /proc/self/status", "0000000000000001$", BOTH),
    ("cap_add", "plain", "busybox grep CapBnd /proc/self/status", "0000000000000001$", BOTH),
    ("security_opt", "plain", "busybox grep NoNewPrivs /proc/self/status", "1$", BOTH),
    ("oom_score_adj", "plain", "cat /proc/1/oom_score_adj", "^500$", BOTH),
    ("environment", "plain", "env", "(?m)^GREETING=hello \\$you$", BOTH), ("environment", "plain", "env", "(?m)^BOTH=file stands below$", BOTH),
    ("environment", "plain", "env", "(?m)^VERSION=1.1$", BOTH), ("env_file", "plain", "env", "(?m)^FROM_FILE=one$", BOTH),
    ("labels", "plain", ".Config.Labels", "com.example.kind:test", BOTH),
    ("sysctls", "plain", "cat /proc/sys/net/core/somaxconn", "^512$", BOTH),
    ("ulimits", "plain", "cat /proc/1/limits", r"Max open files +500 +600", BOTH), ("ulimits", "plain", "cat /proc/1/limits", r"Max core file size +0 +0", BOTH),
    ("stop_signal", "plain", ".Config.StopSignal", "SIGINT|^2$", BOTH), ("stop_grace_period", "plain", ".Config.StopTimeout", "90", BOTH),
    ("restart", "plain", ".HostConfig.RestartPolicy", "on-failure 3", BOTH),
    ("mac_address", "plain", "cat /sys/class/net/eth0/address", "^02:42:ac:11:65:43$", PODMAN),
    ("shm_size", "plain", "busybox grep /dev/shm /proc/mounts", SIZE % "(8192k|8388608)", BOTH),
    ("extra_hosts", "plain", "cat /etc/hosts", r"(?m)^10\.1\.2\.3\s+valve$", BOTH), ("extra_hosts", "plain", "cat /etc/hosts", r"(?m)^fd00::1\s+six$", BOTH),
    ("extra_hosts", "caller", "cat /etc/hosts", r"(?m)^SUBNET\.1\s+gate$", PODMAN), ("dns", "plain", ".HostConfig.Dns", r"10\.0\.0\.1", BOTH), ("dns_opt", "plain", "cat /etc/resolv.conf", "ndots:3", BOTH),
    ("dns_search", "plain", "cat /etc/resolv.conf", r"plant\.example", BOTH), ("platform", "plain", ".State.Status", "running", BOTH),
    ("pull_policy", "plain", ".State.Status", "running", BOTH), ("logging", "plain", ".HostConfig.LogConfig", "(json-file|k8s-file).*1(m|MB)", BOTH),
    ("blkio_config", "plain", ".HostConfig.BlkioWeight", "^300$", BOTH), ("devices", "plain", "echo x > /dev/nought && echo ok", "^ok$", BOTH),
    ("device_cgroup_rules", "plain", ".State.Status", "running", PODMAN), ("device_cgroup_rules", "plain", ".HostConfig.DeviceCgroupRules", "c 1:3 rw", DOCKER),
    ("userns_mode", "plain", "cat /proc/self/uid_map", r"^\s*0\s+0\s+\d+$", BOTH),
    ("entrypoint", "plain", "cat /proc/*/cmdline | busybox tr '\\0' ' '", "/bin/busybox sleep 1000", BOTH),
    ("command", "plain", "cat /proc/*/cmdline | busybox tr '\\0' ' '", "/bin/busybox sleep 1000", BOTH),
    ("mem_limit", "limited", ".HostConfig.Memory", "^67108864$", BOTH), ("memswap_limit", "limited", ".HostConfig.MemorySwap", "^134217728$", BOTH),
    ("mem_reservation", "limited", ".HostConfig.MemoryReservation", "^8388608$", BOTH), ("cpus", "limited", ".HostConfig.NanoCpus", "^500000000$", BOTH),
    ("mem_swappiness", "limited", ".HostConfig.MemorySwappiness", "^0$", BOTH), ("cpu_shares", "limited", ".HostConfig.CpuShares", "^512$", BOTH),
    ("cpuset", "limited", ".HostConfig.CpusetCpus", "^0$", BOTH), ("pids_limit", "limited", ".HostConfig.PidsLimit", "^77$", BOTH),
    ("cpu_period", "timed", ".HostConfig.CpuPeriod", "^50000$", BOTH), ("cpu_quota", "timed", ".HostConfig.CpuQuota", "^25000$", BOTH),
    ("pid", "timed", "cat /proc/1/cmdline", "^(?!sleep)", BOTH),
    ("deploy", "deployed", ".HostConfig.Memory", "^33554432$", BOTH), ("deploy", "deployed", ".HostConfig.NanoCpus", "^250000000$", BOTH),
    ("deploy", "deployed", ".HostConfig.PidsLimit", "^55$", BOTH), ("deploy", "deployed", ".HostConfig.MemoryReservation", "^16777216$", BOTH),
    ("deploy", "deployed", ".HostConfig.RestartPolicy.Name", "^(no)?$", BOTH),
    ("configs", "files", "cat /short", r"^say hello \$you$", BOTH), ("configs", "files", "busybox stat -c '%a %u %g' /etc/inline.conf", "^440 1000 1001$", BOTH),
    ("configs", "files", "cat /etc/inline.conf", "^from the package$", BOTH), ("configs", "files", "touch /short 2>&1", "Read-only", BOTH),
    ("secrets", "files", "cat /run/secrets/token", "^s3cret$", BOTH),
    ("secrets", "files", "cat /run/secrets/key; busybox stat -c ' %a' /run/secrets/key", "^k3y 400$", BOTH),
    ("tmpfs", "files", "busybox grep /scratch /proc/mounts", "tmpfs .*" + SIZE % "1024k", BOTH),
    ("tmpfs", "files", "busybox stat -c %a /scratch", "^700$", BOTH),
    ("volumes", "files", "touch /data/x && ls /again && touch /again/y 2>&1", "(?s)^x.*Read-only", BOTH),
    ("volumes", "files", "cat /conf/a.ini; touch /conf/x 2>&1", "from the package.*Read-only", BOTH),
    ("volumes", "files", "touch /anonymous/x && busybox grep /small /proc/mounts", "tmpfs .*" + SIZE % "2048k", BOTH),
    ("volumes", "files", "busybox grep /memory /proc/mounts", "tmpfs .*mode=750", BOTH),
    ("volumes", "files", "cat /a.ini; touch /a.ini 2>&1", "from the package.*Read-only", BOTH),
    ("networks", "near", "cat /proc/net/fib_trie", r"SUBNET\.7\b", BOTH), ("networks", "near", "ls /sys/class/net", "(?s)eth0.*eth1", BOTH),
    ("ipc", "beside", "near:readlink /proc/1/ns/ipc", "same", BOTH), ("pid", "beside", "near:readlink /proc/1/ns/pid", "same", BOTH),
    ("network_mode", "beside", "near:readlink /proc/1/ns/net", "same", BOTH), ("network_mode", "alone", "ls /sys/class/net", "^lo$", BOTH),
    ("networks", "caller", "busybox nslookup nearby", r"SUBNET\.7\b", PODMAN), ("links", "caller", "busybox nslookup linked", r"SUBNET\.7\b", PODMAN),
    ("container_name", "caller", "busybox nslookup the-one", r"SUBNET\.\d", PODMAN),
    ("networks", "near", ".NetworkSettings.Networks", "nearby", ()), ("depends_on", "caller", "after:once checked", "after", BOTH),
    ("healthcheck", "checked", ".Config.Healthcheck", "test -e /tmp/well.* 1000000000 .*5000000000|test -e /tmp/well", BOTH),
    ("ports", "served", ".HostConfig.PortBindings", "8080/tcp.*127.0.0.1.*PORT", BOTH), ("privileged", "privileged", ".HostConfig.Privileged", "true", BOTH)]


class OnPodman(unittest.TestCase):
    engine_class = support.Engine

    @classmethod
    def setUpClass(cls):
        cls.engine = cls.engine_class(cls)
        cls.holder = support.Lifetime()
        try:
            cls.start()
        except BaseException:
            cls.tearDownClass()
            raise

    @classmethod
    def tearDownClass(cls):
        cls.engine.close()
        cls.holder.close()

    @classmethod
    def start(cls):
        """Starts all services by the driver alone."""
        cls.subnet = f"10.{200 + os.getpid() % 50}.77"
        cls.port = str(support.free_port())
        services = dict(SERVICES, served=sleep(ports=[f"127.0.0.1:{cls.port}:8080"]))
        if cls.may_be_privileged():
            services.update(PRIVILEGED)
        if cls.engine.kind == "docker":             # its client wants a newer daemon for this one
            services["plain"] = {key: item for key, item in services["plain"].items() if key != "mac_address"}
        else:                                       # K24; the Docker of these tests has no bridge that it could name
            services["caller"] = dict(services["caller"], extra_hosts=["gate:host-gateway"])
        folder = support.make_folder(cls.holder)
        text = json.dumps(dict(MEMBERS, services=services)).replace("SUBNET", cls.subnet)
        for name, content in dict(FILES, **{"compose.yaml": text}).items():
            support.write(os.path.join(folder, "archive", name), content)
        config = make_config(policy__privileged="allow", policy__host_network="allow", policy__host_paths=["/etc"], runtime__engine=cls.engine.kind)
        cls.driver = driver = margo_agent.ComposeDriver(cls.engine.kind, config, dict(os.environ, **cls.engine.env))
        driver.claim = margo_agent.Claim("x#x", frozenset(), frozenset(), frozenset())
        workload = margo_agent.Workload(HELLO, "web", PROJECT, os.path.join(folder, "archive"), PARAMETERS, {}, True, owner="x#x")
        cls.prepared = driver.resolve(workload, 60)
        driver.apply(cls.prepared, [], {}, time.monotonic() + 120)

    @classmethod
    def may_be_privileged(cls):
        """Whether this machine lets anybody be privileged; a container that tests run in may not."""
        try:
            cls.engine.podman("run", "--rm", "--network=none", "--privileged", IMAGE, "true")
        except AssertionError:
            return False
        return True

    def name(self, service):
        return f"{PROJECT}-{service}-1"

    def ask(self, service, question):
        """What the container of a service, or the engine, answers."""
        if question.startswith("."):
            return self.engine.podman("inspect", "--format", f"{{{{{question}}}}}", self.name(service)).strip()
        other, colon, rest = question.partition(":")
        if other == "after" and colon:
            started = [self.ask(name, ".State.StartedAt") for name in [service, *rest.split()]]
            return "after" if started[0] == max(started) else str(started)
        if other in SERVICES and colon:
            found = {self.engine.podman("exec", self.name(name), "busybox", *rest.split()).strip() for name in (service, other)}
            return "same" if len(found) == 1 else str(found)
        return self.engine.podman("exec", self.name(service), "sh", "-c", question + "; true").strip()

    def test_every_key_does_what_compose_says(self):
        missing = [] if self.may_be_privileged() else ["privileged"]
        if not glob.glob("/sys/fs/cgroup/blkio/blkio*weight") + glob.glob("/sys/fs/cgroup/*/io.*weight"):   # nothing is weighed here
            missing.append("blkio_config")
        for key, service, question, pattern, engines in CHECKS:
            if self.engine.kind in engines and key not in missing:
                with self.subTest(key=key, question=question):
                    pattern = pattern.replace("SUBNET", re.escape(self.subnet)).replace("PORT", self.port)
                    self.assertRegex(self.ask(service, question), pattern)

    def test_what_is_not_wanted_is_not_there(self):
        self.assertNotIn(self.name("debug"), self.engine.containers())
        self.assertIn("services.built.build is not used: the image is pulled", self.prepared[1].notes)

    def test_networks_and_volumes_are_as_the_file_says(self):
        facts = json.loads(self.engine.podman("network", "inspect", f"{PROJECT}_front", f"{PROJECT}_back"))
        facts = [{key.lower(): value for key, value in item.items()} for item in facts]
        self.assertEqual([item["internal"] for item in facts], [False, True])
        self.assertEqual(facts[0]["labels"]["com.example.n"], "1")
        self.assertIn(f"{self.subnet}.0/24", json.dumps(facts[0]))
        self.assertEqual(json.loads(self.engine.podman("volume", "inspect", f"{PROJECT}_data"))[0]["Labels"]["com.example.v"], "1")


    def apply(self, known=None, **document):
        """A deployment of another name, by the driver alone; what it returns."""
        folder = support.make_folder(self)
        support.write(os.path.join(folder, "archive", "compose.yaml"), json.dumps(document))
        workload = margo_agent.Workload("2" + HELLO[1:], "web", "refusals", os.path.join(folder, "archive"), {}, {}, True, owner="x#x")
        return self.driver.apply(self.driver.resolve(workload, 60), [], known or {}, time.monotonic() + 120)

    def look(self):
        """[(id, since when it runs)] of what runs of that deployment."""
        ids = self.engine.podman("ps", "--quiet", "--no-trunc", "--filter=label=org.margo.project=refusals").split()
        return [(container_id, self.engine.facts(container_id, "{{.State.StartedAt}}")) for container_id in ids]

    def test_what_the_engine_will_refuse_is_found_out_before_anything_stops(self):
        """K23: with what only a start would show, and networks that are made anew."""
        known = self.apply(services={"main": sleep(init=True)})
        before, subnet = self.look(), f"{self.subnet}.0/25"
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen(1)
            cases = self.REFUSED + [
                (dict(ports=[f"127.0.0.1:{taken.getsockname()[1]}:80"]), {}, "another program holds"),
                (dict(networks={"default": {"ipv4_address": "10.9.9.9"}}), {}, "lies in no `subnet`"),
                (dict(networks={"default": {"ipv4_address": f"{self.subnet}.129"}}),
                 {"networks": {"default": {"ipam": {"config": [{"subnet": f"{self.subnet}.128/25"}]}}}}, "the host's own"),
                (dict(command=["/nothing"]), {}, "/nothing"), (dict(entrypoint=["nothing"]), {}, "nothing"),
                (dict(entrypoint=["/tmp"]), {}, "permission denied"), (dict(user="ghost"), {}, "unable to find user ghost"), (dict(group_add=["ghosts"]), {}, "(?i)unable to find group ghosts"),
                (dict(sysctls={"net.no.such": "1"}), {}, "/proc/sys/net/no/such"), (dict(volumes=["/etc/hostname:/bin"]), {}, "(?i)not a directory"),
                (dict(cap_add=["NO_SUCH"]), {}, "CAP_NO_SUCH"), ({}, {"networks": {"default": {"ipam": {"config": [{"subnet": "10.77.99.0/99"}]}}}}, "does not appear to be"),
                ({}, {"networks": {"default": {"ipam": {"config": [{"subnet": subnet}]}}}}, "(?i)already used|overlaps")]
            for settings, members, words in cases:
                with self.subTest(settings=settings, members=members):
                    with self.assertRaisesRegex(margo_agent.ComponentError, words):
                        self.apply(known, services={"main": sleep(init=True, **settings)}, **members)
                    self.assertEqual(self.look(), before)
        self.apply(known, services={"main": sleep(init=True, user="0:0", working_dir="/tmp")})
        self.assertEqual(len(self.look()), 1)
        self.assertNotEqual(self.look(), before)

    def test_a_task_takes_the_port_of_who_waits_for_it(self):
        """It runs unchanged from the version before, and the task is new: an engine has the port only once it has stopped."""
        port = f"127.0.0.1:{support.free_port()}:80"

        def make(value, **keys):
            return {"setup": sleep(command=["sh", "-c", f"exit 0 # {value}"], **keys),
                    "main": sleep(ports=[port], depends_on={"setup": {"condition": "service_completed_successfully"}})}
        known = self.apply(services=make("1"))
        before = self.look()
        again = self.apply(known, services=make("2", ports=[port]))
        self.assertEqual([facts["finished"] for facts in again.values()], [True, False])
        self.assertNotEqual(self.look(), before)
        self.apply(again, services={"main": sleep(init=True)})      # as the other test begins

    def test_a_trial_runs_nothing(self):
        """The version before is at work in the same volume, while it is tried whether the next one could be started."""
        def make(value):
            return {"services": {"main": sleep(command=["sh", "-c", f"echo {value} >> /v/log; exec sleep 1000"], volumes=["v:/v"])}, "volumes": {"v": {}}}
        self.apply(self.apply(**make("1")), **make("2"))
        self.assertEqual(self.engine.podman("exec", "refusals-main-1", "cat", "/v/log").split(), ["1", "2"])
        self.apply(services={"main": sleep(init=True)})             # as another test begins

    def test_what_a_task_lays_out_first_need_not_be_there_in_the_trial_of_who_waits_for_it(self):
        """Both start anew: the program comes with the task, and the user has to be there before anything stops."""
        def make(value, **keys):
            lay = f"busybox mkdir -p /x/{value} && busybox cp /bin/busybox /x/{value}/sleep"
            main = sleep(entrypoint=[f"/x/{value}/sleep"], command=["1000"], volumes=["x:/x:ro"], working_dir=f"/x/{value}",
                         depends_on={"setup": {"condition": "service_completed_successfully"}})
            return {"services": {"setup": sleep(command=["sh", "-c", lay], volumes=["x:/x"]), "main": dict(main, **keys)},
                    "volumes": {"x": {}}}
        known = self.apply(**make("1"))
        before = self.look()
        with self.assertRaisesRegex(margo_agent.ComponentError, "unable to find user ghost"):
            self.apply(known, **make("2", user="ghost"))
        self.assertEqual(self.look(), before)
        self.apply(known, **make("2"))
        self.assertNotEqual(self.look(), before)
        self.apply(services={"main": sleep(init=True)})             # as another test begins

    def test_an_address_that_somebody_else_has_is_found_before_anything_stops(self):
        """In a network that is there, be it external; what the version before has is free by then."""
        self.engine.podman("network", "create", "--subnet=10.99.7.0/24", "plant")
        self.addCleanup(self.engine.podman, "network", "rm", "plant")
        self.engine.podman("run", "--detach", "--name=theirs", "--network=plant", "--ip=10.99.7.9", support.IMAGE, "sleep", "1000")
        self.addCleanup(self.engine.podman, "rm", "--force", "theirs")

        def make(number, **keys):
            return {"services": {"main": sleep(networks={"plant": {"ipv4_address": f"10.99.7.{number}"}}, **keys)},
                    "networks": {"plant": {"external": True}}}
        known = self.apply(**make(10))
        before = self.look()
        with self.assertRaisesRegex(margo_agent.ComponentError, "service main cannot have 10.99.7.9 in network plant: another"):
            self.apply(known, **make(9))
        self.assertEqual(self.look(), before)
        known = self.apply(known, **make(10, init=True))
        self.engine.podman("stop", "--time=0", "theirs")
        self.apply(known, **make(9))
        self.assertNotEqual(self.look(), before)
        self.apply(services={"main": sleep(init=True)})             # as another test begins

    # Of this engine alone: docker makes a working_dir.
    REFUSED = [(dict(working_dir="/nowhere"), {}, "/nowhere"), (dict(mem_limit="1k"), {}, "memory limit"), (dict(ulimits={"nofile": 2073741816}), {}, "rlimit"),
               (dict(volumes=["t:/t"]), {"volumes": {"t": {"driver_opts": {"type": "tmpfs", "device": "tmpfs", "o": "size=1m"}}}}, "Project Quota")]


class OnDocker(OnPodman):
    engine_class = support.Docker
    REFUSED = [(dict(logging={"driver": "json-file", "options": {"compress": "true"}}), {}, "max-size"), (dict(logging={"driver": "syslog"}), {}, "syslog"),
               (dict(command=["nothing"], ulimits={"stack": 8388608}), {}, "nothing")]


class Complete(unittest.TestCase):
    def test_every_key_of_a_service_is_asked_for(self):
        asked = {key for key, *_ in CHECKS}
        self.assertEqual(set(margo_agent.SERVICE_FORM) - asked, EFFECTLESS)


if __name__ == "__main__":
    unittest.main()
