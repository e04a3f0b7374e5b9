"""Policy: hostile compose files on real engines, each judged by what the engine shows of the container (contract, Policy).

A sample by MARGO_TEST_SEED in each run, of the share that MARGO_TEST_SLOW says; MARGO_TEST_SLOW=1 tries all.
"""
import json
import os
import random
import time
import unittest

import margo_agent
from tests import hostile, support
from tests.test_compose_file import OWNER, PROJECT, make_config

SHARE = float(os.environ.get("MARGO_TEST_SLOW") or 0) or 0.02
SEED = os.environ.get("MARGO_TEST_SEED", "1")
# What every container has: podman's own choice, docker's has three more.
USUAL = {"CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "NET_BIND_SERVICE", "SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT",
         "MKNOD", "AUDIT_WRITE", "NET_RAW"}


def find_gains(shown, allowed, archive):
    """What a container has beyond the others, in words, by what `inspect` shows of it."""
    host = shown["HostConfig"]
    gains = [key for key in ("Privileged", "Devices", "DeviceRequests", "DeviceCgroupRules", "VolumesFrom", "OomKillDisable") if host.get(key)]
    gains += [f"{key} {host.get(key)}" for key in ("PidMode", "IpcMode", "UTSMode", "UsernsMode", "CgroupMode", "CgroupnsMode")
              if str(host.get(key) or "").startswith(("host", "ns:", "path:", "container:"))]
    # podman 4.3 tells no IpcMode before the start, but how the container was made
    gains += [f"IpcMode {word[6:]}" for word in shown["Config"].get("CreateCommand") or () if word.startswith(("--ipc=host", "--ipc=ns", "--ipc=c"))]
    if host["NetworkMode"] in ("host", "none:") or host["NetworkMode"].startswith(("ns:", "container:", "slirp4netns:", "pasta")):
        gains.append(f"NetworkMode {host['NetworkMode']}")
    added = {name.upper().replace("CAP_", "") for name in host.get("CapAdd") or []}
    gains += [f"CapAdd {name}" for name in sorted(added - USUAL)]
    gains += [f"SecurityOpt {item}" for item in host.get("SecurityOpt") or [] if item.split(":")[0].split("=")[0] != "no-new-privileges"
              or "false" in item]
    for mount in shown["Mounts"]:
        source = mount.get("Source", "")
        if mount["Type"] == "bind" and not any(
                margo_agent.is_below(os.path.realpath(source), folder) for folder in (allowed, archive)):
            gains.append(f"mount of {source}")
        if mount.get("Propagation") not in (None, "", "rprivate", "private", "rslave", "slave"):    # of these none leads out
            gains.append(f"propagation {mount['Propagation']}")
        gains += [f"mount option {item}" for item in mount.get("Options") or () if item in ("suid", "dev", "idmap", "O")]
    gains += ["OomScoreAdj"] if (host.get("OomScoreAdj") or 0) < 0 else []
    gains += [f"CgroupParent {host['CgroupParent']}"] if host.get("CgroupParent") else []
    gains += ["annotations"] if any("privileged" in key or "run.oci" in key for key in host.get("Annotations") or {}) else []
    gains += ["the agent's environment"] if "LEAK=1" in (shown["Config"]["Env"] or ()) else []
    return gains


class Matrix(support.SharesEngine):
    """The documents on one engine; a subclass says which."""

    def setUp(self):
        self.folder = os.path.realpath(support.make_folder(self))
        self.allowed, self.outside, self.archive = (os.path.join(self.folder, name) for name in ("allowed", "outside", "state/web"))
        for folder in (self.allowed, self.outside, self.archive):
            os.makedirs(folder)
        os.symlink(self.outside, os.path.join(self.allowed, "link"))
        os.symlink(self.outside, os.path.join(self.archive, "link"))
        support.write(os.path.join(self.outside, "x"), "")
        environ = dict(os.environ, LEAK="1", **self.engine.env)
        config = make_config(policy__host_paths=[self.allowed])
        config["state_dir"] = os.path.join(self.folder, "state")
        self.driver = margo_agent.ComposeDriver(self.engine.kind, config, environ)
        self.driver.observe(claim=margo_agent.Claim(OWNER, (OWNER,), (support.HELLO,), (), ()))
        self.usual = self.find_gains({})            # what every container has on this machine, such as the host's cgroups before v2
        self.addCleanup(self.engine.clean)

    def make(self, document):
        """What the engine shows of the container of a document; raises ComponentError where it is refused."""
        support.write(os.path.join(self.archive, "compose.yaml"), json.dumps(document))
        workload = margo_agent.Workload(support.HELLO, "web", PROJECT, self.archive, hostile.PARAMETERS, {}, False, owner=OWNER)
        project = self.driver.load_project(workload)
        volumes = margo_agent.make_volume_names(project, PROJECT, {}, [], {})
        job = margo_agent.Job(workload, project, os.path.join(self.folder, "state"), {}, time.monotonic() + 120, {}, {}, volumes)
        self.driver.ask_names(workload, project)
        networks = self.driver.list_networks(support.HELLO, PROJECT, "INSTALL_FAILED", project.networks)
        margo_agent.check_external(project, networks, self.driver.create_volumes(job), project.services)
        for name, arguments in margo_agent.plan_networks(project.networks, networks, PROJECT)[0].items():
            self.driver.carry_out(job, ["network", "create", *arguments, name])
        service = next((service for service in project.services if service.name == "main"), None)
        if service is None:                         # it has a profile, which nobody asked for
            raise margo_agent.ComponentError("INVALID_DEPLOYMENT", "there is no such service")
        container_id = self.driver.create(service, job, "matrix")
        shown = json.loads(self.engine.podman("inspect", container_id))[0]
        self.engine.podman("rm", "--force", container_id)
        return shown

    def find_gains(self, keys):
        """What the container of a service with these keys has beyond a plain one, in words."""
        shown = self.make({"services": {"main": dict({"image": hostile.IMAGE, "command": ["sleep", "60"]}, **keys)}})
        return find_gains(shown, self.allowed, self.archive)

    def test_no_container_gains_more_than_the_policy_gives(self):
        documents = hostile.make_documents(self.allowed, self.outside)
        self.assertGreater(len(documents), 800)
        made = 0
        chosen = random.Random(SEED).sample(sorted(documents), round(len(documents) * SHARE))
        for name in chosen:
            with self.subTest(name):
                try:
                    shown = self.make(documents[name])
                except margo_agent.ComponentError:
                    continue
                made += 1
                gains = find_gains(shown, self.allowed, self.archive)
                self.assertEqual([gain for gain in gains if gain not in self.usual], [])
        if SHARE == 1:
            print(f"{self.engine.kind}: {len(chosen)} documents, {made} accepted and made", flush=True)

    def test_the_judge_sees_what_is_allowed(self):
        """Else the test above could not fail: the same with everything allowed."""
        self.driver.config.policy.update(privileged="allow", host_network="allow", host_paths=["/"])
        for keys, word in (({"privileged": True}, "Privileged"), ({"pid": "host"}, "PidMode host"), ({"ipc": "host"}, "IpcMode host"),
                           ({"network_mode": "host"}, "NetworkMode host"), ({"cap_add": ["SYS_ADMIN"]}, "CapAdd SYS_ADMIN"),
                           ({"security_opt": ["seccomp=unconfined"]}, "SecurityOpt seccomp=unconfined"), ({"devices": ["/dev/null:/dev/x"]}, "Devices"),
                           ({"volumes": ["/etc:/mnt"]}, "mount of /etc"), ({"oom_score_adj": -5}, "OomScoreAdj")):
            with self.subTest(word):
                self.assertNotIn(word, self.usual)
                self.assertIn(word, self.find_gains(keys))


class Podman(Matrix, unittest.TestCase):
    engine_class = support.Engine


class Docker(Matrix, unittest.TestCase):
    engine_class = support.Docker
