"""Compose file: what a compose file may not ask for, however it is spelt (contract, Policy)."""
import os
import socket
import unittest

import margo_agent
from tests import support
from tests.test_compose_file import IMAGE, FileCase, make_config, make_document

# An engine's socket on one disk, which has a second name there, and a file of the same inode on another disk.
TWINS = """
import socket
place = os.path.join(first, "engine")
socket.socket(socket.AF_UNIX).bind(place)
os.makedirs(os.path.join(first, "data"))
os.link(place, os.path.join(first, "data", "plain"))
twin = make_twin(place)
folder = margo_agent.Folder(second, {"CONTAINER_HOST": "unix://" + place})
print(os.stat(twin).st_ino == os.stat(place).st_ino, folder.leads_to_engine(os.path.join(first, "data")), folder.leads_to_engine(second))
"""


class PolicyCase(FileCase):
    def assertDenied(self, keys, place, **options):
        with self.subTest(keys=keys):
            self.assertRefused(make_document(keys, **options.pop("members", {})), f"services.main.{place}", code="POLICY_DENIED", **options)


class Policy(PolicyCase):
    DENIED = [
        ("privileged", True), ("privileged", "true"), ("privileged", "${YES}"), ("privileged", "yes"), ("privileged", "On"), ("pid", "host"),
        ("ipc", "host"), ("userns_mode", "host"), ("pid", "${HOST}"), ("cap_add", ["SYS_ADMIN"]), ("cap_add", "ALL"),
        ("cap_add", ["CHOWN", "CAP_NET_RAW"]), ("devices", ["/dev/mem"]), ("devices", "/dev/mem"), ("device_cgroup_rules", ["c 1:1 rwm"]),
        ("security_opt", ["seccomp=unconfined"]), ("security_opt", "label=disable"),
        ("security_opt", ["no-new-privileges:false"]), ("security_opt", ["apparmor:unconfined"]),
        ("security_opt", ["no-new-privileges:true", "label:disable"]), ("oom_score_adj", -1), ("oom_score_adj", "-1000"),
        ("group_add", ["keep-groups"])]

    def test_what_loosens_the_container_is_denied(self):
        """Contract, Policy: privileged, host namespaces, capabilities, devices, security; also by a parameter."""
        for key, value in self.DENIED:
            self.assertDenied({key: value}, key, parameters={"YES": "true", "HOST": "host"})

    def test_what_loosens_the_container_is_done_where_the_operator_allows_it(self):
        self.config = make_config(policy__privileged="allow")
        for key, value in self.DENIED:
            with self.subTest(key=key, value=value):
                self.assertTrue(self.settle_service({key: value}, {"YES": "true", "HOST": "host"}).arguments)

    def test_what_tightens_the_container_is_never_denied(self):
        for key, value in (("privileged", False), ("privileged", "false"), ("privileged", "${P:-false}"), ("cap_drop", ["ALL"]),
                           ("security_opt", ["no-new-privileges"]),
                           ("security_opt", ["no-new-privileges=true"]), ("pid", "private"), ("ipc", "none"),
                           ("cap_add", []), ("devices", None), ("oom_score_adj", 0)):
            with self.subTest(key=key):
                self.assertNotIn("--privileged", self.settle_service({key: value}).arguments)

    def test_a_capability_that_every_container_has_may_be_asked_for(self):
        """K28: `cap_drop: [ALL]` and a few of the usual ones ask for less than nothing."""
        usual = ["CHOWN", "SETUID", "cap_setgid", "NET_BIND_SERVICE"]
        found = self.settle_service({"cap_drop": ["ALL"], "cap_add": usual}).arguments
        self.assertEqual(found, [f"--cap-add={item}" for item in usual] + ["--cap-drop=ALL"])

    def test_single_devices_may_be_allowed(self):
        self.config = make_config(policy__devices=["/dev/ttyUSB0", "/dev/serial/by-id/*"])
        for item in ("/dev/ttyUSB0", "/dev/ttyUSB0:/dev/plc:rw", "/dev/serial/by-id/usb-x"):
            self.assertEqual(self.settle_service({"devices": [item]}).arguments, [f"--device={item}"])
        for item in ("/dev/ttyUSB1", "/dev/ttyUSB00", "/dev/serial/by-id/../../mem", "/dev/serial/by-id/a/b", "/dev", "vendor.com/gpu=all",
                     "/dev/serial/by-id/.."):
            self.assertDenied({"devices": ["/dev/ttyUSB0", item]}, f"devices: '{item}'")

    def test_the_hosts_network_is_the_operators_to_give(self):
        self.assertDenied({"network_mode": "host"}, "network_mode: the host's network is denied by policy.host_network")
        self.config = make_config(policy__host_network="allow")
        self.assertEqual(self.settle_service({"network_mode": "host"}).networks[0].network, "host")

    def test_a_namespace_by_its_path_or_its_container_is_never_shared(self):
        """podman takes ns:/proc/1/ns/pid, which is the host's by another name; nothing without our labels is touched."""
        for self.config in (make_config(), make_config(policy__privileged="allow", policy__host_network="allow")):
            for key in ("pid", "ipc", "network_mode"):
                for value in ("ns:/proc/1/ns/x", "container:other"):
                    self.assertDenied({key: value}, key)
            for key, value in (("userns_mode", "ns:/proc/1/ns/user"), ("userns_mode", "container:x"), ("pid", "Host"), ("pid", " host"),
                               ("ipc", "other"), ("network_mode", "web_default"), ("userns_mode", "keep-id:uid=0,x")):
                self.assertRefused(make_document({key: value}), f"services.main.{key}")

    def test_options_of_an_engine_do_not_go_round_the_policy(self):
        """podman mounts over any folder of the host by `O,upperdir=`, and writes a log to any `path` of it."""
        os.mkdir(os.path.join(self.archive, "a"))
        allowed = os.path.join(self.folder, "allowed")
        os.mkdir(allowed)
        for self.config in (make_config(policy__host_paths=[allowed]), make_config(policy__privileged="allow", policy__host_paths=[allowed])):
            for source in ("data", allowed, "./a"):
                for options in ("O,upperdir=/etc/cron.d,workdir=/var/tmp", "ro,U", "shared", "rshared", "suid", "dev", "idmap", "RO"):
                    self.assertDenied({"volumes": [f"{source}:/x:{options}"]}, "volumes[0]: the mount option", members={"volumes": {"data": None}})
            for options in ("bind", "rbind", "size=1m,dev", "suid", "tmpcopyup", "size=/etc"):
                self.assertDenied({"tmpfs": f"/x:{options}"}, "tmpfs[0]: the mount option")
            for bind in ({"propagation": "rshared"}, {"selinux": "O,upperdir=/etc"}):
                self.assertDenied({"volumes": [{"type": "bind", "source": allowed, "target": "/x", "bind": bind}]}, "volumes[0]: the mount option")
            for name in ("path", "syslog-address"):
                self.assertDenied({"logging": {"driver": "k8s-file", "options": {name: "/etc/cron.d/x"}}}, f"logging.options.{name}")

    def test_an_image_comes_from_a_registry(self):
        """A transport's name makes podman open a file of the device, or of the agent's own folder."""
        for image in ("dir:/etc/images", "docker-archive:/srv/other.tar", "oci:x/y:tag", "containers-storage:[vfs@/x]a", "docker-archive:a.tar",
                      "dir:x", "oci:x", "oci-archive:x", "sif:x", "tarball:x", "docker-daemon:a:b", "containers-storage:a",
                      "docker-archive:80/etc/x", "dir:1/x", "docker://a/b", "http://a/b"):
            self.assertDenied({"image": image}, "image")

    def test_only_known_keys_are_read_at_any_depth(self):
        """A key that one reader ignores is one that another obeys: `$` in it, other mounts, other sections."""
        for keys, members, word in (
                ({"volumes": [{"type": "bind", "source": ".", "target": "/x", "bin${X:-d}": {"propagation": "O"}}]}, {}, "volumes[0].bin${X:-d}"),
                ({"deploy": {"resources": {"reservation${X:-s}": {}}}}, {}, "deploy.resources.reservation${X:-s}"),
                ({"deploy": {"resources": {"reservations": {"devices": []}}}}, {}, "reservations.devices"),
                ({"volumes": [{"type": "volume", "source": "data", "target": "/x", "volume": {"propagation": "O"}}]}, {},
                 "volumes[0].volume.propagation"),
                ({"volumes": [{"type": "glob", "source": "/etc/*", "target": "/x"}]}, {}, "volumes[0].type"),
                ({"volumes": [{"type": "bind", "source": ".", "target": "/x:O,upperdir=/etc"}]}, {}, "volumes[0]"),
                ({"configs": ["a"]}, {"configs": {"a": {"file": "/etc/shadow"}}}, "configs.a"),
                ({"configs": ["a"]}, {"configs": {"a": {"file": 5}}}, "configs.a.file"),
                ({"secrets": ["a"]}, {"secrets": {"a": {"file": "../../secret"}}}, "secrets.a"),
                ({}, {"volumes": {"a": {"driver_opts": {"device": "/"}}}}, "volumes.a.driver_opts"),
                ({}, {"volumes": {"a": {"driver_opts": {"type": "none", "o": "bind", "device": "/etc"}}}}, "volumes.a.driver_opts"),
                ({}, {"volumes": {"a": {"driver_opts": {"type": "tmpfs", "o": "size=1m,upperdir=/etc"}}}}, "volumes.a.driver_opts"),
                ({"labels": {"com.docker.compose.project": "other"}}, {}, "labels"), ({"labels": {"org.margo.x": "1"}}, {}, "labels"),
                ({}, {"volumes": {"a": {"labels": {"org.margo.owner": "x"}}}}, "volumes.a.labels"),
                ({}, {"networks": {"a": {"labels": ["org.margo.project=x"]}}}, "networks.a.labels")):
            with self.subTest(word=word):
                with self.assertRaises(margo_agent.ComponentError) as caught:
                    self.settle(make_document(keys, **dict({"volumes": {"data": None}}, **members)))
                self.assertIn(word, caught.exception.message)


class HostPaths(PolicyCase):
    def test_an_engines_socket_is_never_handed_out(self):
        self.config = make_config(policy__privileged="allow", policy__host_paths=["/"])
        os.symlink("/var/run/docker.sock", os.path.join(self.archive, "innocent"))
        for source in ("/var/run/docker.sock", "/run/podman/podman.sock", "/run/containerd/containerd.sock",
                       "/var/run/crio/crio.sock",
                       "/var/run/../run/docker.sock", "/var/run//docker.sock", "./innocent"):
            self.assertDenied({"volumes": [f"{source}:/engine.sock"]}, "volumes")
            self.assertDenied({"volumes": [{"type": "bind", "source": source, "target": "/engine.sock"}]}, "volumes")

    def test_an_engines_socket_is_found_by_what_it_is(self):
        """By the folder it lies in, at any depth, and by a hard link of another name."""
        run = os.path.join(self.folder, "run")
        os.makedirs(os.path.join(run, "podman"))
        os.makedirs(os.path.join(self.folder, "other", "deep"))
        listener = socket.socket(socket.AF_UNIX)
        self.addCleanup(listener.close)
        listener.bind(os.path.join(run, "podman", "podman.sock"))
        os.link(os.path.join(run, "podman", "podman.sock"), os.path.join(self.folder, "other", "deep", "plain"))
        os.mkdir(os.path.join(self.folder, "data"))
        self.config = make_config(policy__host_paths=[self.folder])
        environ = {"CONTAINER_HOST": f"unix://{run}/podman/podman.sock"}
        for name, bad in (("run", True), ("run/podman", True), ("run/podman/podman.sock", True), ("other", True), ("other/deep/plain", True),
                          ("data", False)):
            with self.subTest(name=name):
                folder = margo_agent.Folder(self.archive, environ)
                self.assertIs(folder.look(os.path.join(self.folder, name)).socket, bad)
        self.assertDenied({"volumes": [f"{run}:/s"]}, "volumes[0]: ", )
        self.assertDenied({"volumes": [f"{self.folder}/other/deep/plain:/s"]}, "volumes[0]: ")

    def test_a_file_of_another_disk_is_not_taken_for_a_socket_by_its_number(self):
        """Small disks give the same few inodes: a mount of data was denied now and then."""
        self.assertEqual(support.run_on_two_disks(self, TWINS), "True True False\n")

    def test_bind_mounts_are_held_to_the_host_paths(self):
        """Contract, Policy: only below policy.host_paths, after normalising and resolving links."""
        allowed, secret = os.path.join(self.folder, "allowed"), os.path.join(self.folder, "secret")
        for path in (allowed, secret, allowed + "-not", os.path.join(allowed, "in"), os.path.join(self.archive, "sub")):
            os.mkdir(path)
        os.symlink(secret, os.path.join(allowed, "link"))
        os.symlink(secret, os.path.join(self.archive, "link"))
        os.symlink(os.path.join(allowed, "in"), os.path.join(self.archive, "good"))
        self.config = make_config(policy__host_paths=[allowed])
        for source in (allowed, allowed + "/in", allowed + "/in/..", "./sub", "./good", ".", "./sub/../sub"):
            with self.subTest(source=source):
                for options, kept in (("", []), (":ro", ["ro"]), (":rw,z", ["rw", "z"])):
                    mount = self.settle_service({"volumes": [f"{source}:/x{options}"]}).mounts[0]
                    self.assertEqual(mount.found.real, os.path.realpath(os.path.join(self.archive, source)))
                    own = margo_agent.is_below(mount.found.real, self.archive)              # what was verified is never written to
                    self.assertEqual(mount.options, ["ro"] + [item for item in kept if item == "z"] if own else kept)
                mount = self.settle_service({"volumes": [{"type": "bind", "source": source, "target": "/x"}]}).mounts[0]
                self.assertEqual(mount.options, ["ro"] if own else [])
        for source in (secret, "/", "/etc", allowed + "-not", allowed + "/../secret", allowed + "/link", "./link",
                       "./link/deeper", "..", "./../secret", "./sub/../../secret", os.path.dirname(allowed), "/absent"):
            for item in (f"{source}:/x", {"type": "bind", "source": source, "target": "/x"}):
                self.assertRefused(make_document({"volumes": [item]}), f"services.main.volumes[0]: {source}", "outside of policy.host_paths",
                                   code="POLICY_DENIED")
        self.assertRefused(make_document({"volumes": [f"{allowed}/absent:/x"]}), "services.main.volumes[0]: this device has no ")

    def test_host_paths_may_be_links_themselves(self):
        real, link = os.path.join(self.folder, "real"), os.path.join(self.folder, "link")
        os.makedirs(os.path.join(real, "data"))
        os.symlink(real, link)
        self.config = make_config(policy__host_paths=[link])
        self.assertEqual(self.settle_service({"volumes": [f"{link}/data:/x"]}).arguments, [f"--volume={real}/data:/x"])

    def test_a_link_that_the_agent_may_not_follow_is_denied(self):
        """Without root, or in a container, these cannot even be looked up: one file would have ended the agent with a traceback."""
        os.symlink("/proc/1/root", os.path.join(self.archive, "root"))
        for name in ("/proc/1/root", "/proc/1/cwd/etc", "/proc/1/exe", "./root", "./root/etc"):
            for keys in ({"volumes": [f"{name}:/x"]}, {"volumes": [{"type": "bind", "source": name, "target": "/x"}]}):
                self.assertRefused(make_document(keys), name, code="POLICY_DENIED")
            for document in (make_document({"env_file": [name]}), make_document({"env_file": [{"path": name, "required": False}]}),
                             make_document({"secrets": ["a"]}, secrets={"a": {"file": name}})):
                with self.assertRaises(margo_agent.ComponentError):
                    self.settle(document)

    def test_the_home_folder_is_not_part_of_the_archive(self):
        """Docker Compose mounts $HOME for `~`, so it is never taken for a folder of that name in the archive."""
        for item in ("~/.ssh:/keys", "~:/home", {"type": "bind", "source": "~/.ssh", "target": "/keys"}):
            self.assertDenied({"volumes": [item]}, "volumes")

    def test_nobody_can_put_a_link_on_the_way_to_a_mount(self):
        """It would be followed when the other service is made, or the same one is started again: any folder of the host."""
        allowed = os.path.join(self.folder, "allowed")
        os.makedirs(os.path.join(allowed, "x", "y"))
        for self.config in (make_config(policy__host_paths=[allowed]), make_config(policy__host_paths=[allowed, allowed + "/x"])):
            for volumes in ([[f"{allowed}:/d"], [f"{allowed}/x:/host"]], [[f"{allowed}:/d", f"{allowed}/x:/host"], []],
                            [[f"{allowed}/x/y:/d:ro"], [f"{allowed}/x:/host"]]):
                services = {name: {"image": IMAGE, "volumes": items} for name, items in zip("ab", volumes)}
                self.assertRefused({"services": services}, "it could put a link there", code="POLICY_DENIED")
        for volumes in ([[f"{allowed}:/d:ro"], [f"{allowed}/x:/host"]], [[f"{allowed}/x:/d"], [f"{allowed}/x:/host"]],
                        [[f"{allowed}/x:/d"], [f"{allowed}:/host:ro"]]):
            self.settle({"services": {name: {"image": IMAGE, "volumes": items} for name, items in zip("ab", volumes)}})

    def test_a_mount_that_is_no_text_fails_its_component_alone(self):
        """What YAML reads as a number or a flag is refused, or a path spelt so; never more than that."""
        for item in (0.5, 5, True, {"type": "bind", "source": 5, "target": "/x"}, {"type": "bind", "source": True, "target": "/x"}):
            self.assertRefused(make_document({"volumes": [item]}), "services.main.volumes")
        self.assertRefused('services: {main: {image: a, volumes: [.5]}}', "services.main.volumes")

    def test_a_name_that_no_file_can_have_fails_its_component_alone(self):
        self.assertRefused({"services": {"a" * 250: {"image": IMAGE}}}, "is not a service name")
        self.assertDenied({"volumes": ["/" + "a" * 5000 + ":/x"]}, "volumes")

    def test_is_below_does_not_take_a_prefix_for_a_folder(self):
        for path, root, expected in (("/a", "/a", True), ("/a/b", "/a", True), ("/ab", "/a", False),
                                     ("/a", "/a/b", False), ("/x", "/", True),
                                     ("/a/b", "/a/", True)):
            self.assertIs(margo_agent.is_below(path, root), expected)


if __name__ == "__main__":
    unittest.main()
