"""Small devices: whole commands with little memory, real small disks, any umask, a Python that is not whole."""
import json
import os
import resource
import shutil
import stat
import subprocess
import sys
import unittest
from unittest import mock

import margo_agent
from tests import git_server, support
from tests.bench import costs
from tests.support import HELLO

MIB = 1 << 20
OTHER = "11111111-1111-4111-8111-111111111111"


def limit_memory(size):
    """A function that bounds the address space of the process that calls it."""
    return lambda: resource.setrlimit(resource.RLIMIT_AS, (size, size))


class SmallCase(support.DeviceCase):
    def run_with(self, prepare, *arguments):
        """The agent in a process that calls `prepare` first: (exit code, all it printed)."""
        done = subprocess.run(self.device.command(*arguments), env=self.device.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, universal_newlines=True, timeout=120, preexec_fn=prepare)
        return done.returncode, done.stdout

    def publish(self, tag="1.0.0", deployment_id=HELLO, name="hello", package="web"):
        """Makes a deployment of one package the desired state."""
        self.wfm.publish(support.make_deployment(deployment_id, name, ((package, tag),), registry=self.wfm.registry), deployment_id)


class Memory(SmallCase):
    """E1: what is asked of the kernel is what there is to be read, never what might be there at most."""

    def test_every_command_has_enough_in_128_MiB(self):
        self.publish()
        for code, words, *arguments in ((0, "ok   wfm", "doctor"), (0, "install", "plan"), (0, "installed", "run", "--once"), (0, "", "run", "--once"),
                                        (0, "installed", "status"), (0, "installed", "status", "--json"), (0, "version 1", "history"),
                                        (0, "ok   engine", "doctor"), (0, "enrolled", "enroll"), (0, "EG-100", "capabilities"), (0, "", "retry"),
                                        (0, "unenrolled", "unenroll", "--purge")):
            with self.subTest(" ".join(arguments)):
                found = self.run_with(limit_memory(128 * MIB), *arguments)
                self.assertEqual(found[0], code, found[1])
                self.assertIn(words, found[1])

    def test_a_file_is_read_as_far_as_it_goes(self):
        path = os.path.join(support.make_folder(self), "file")
        for size, limit in ((0, 10), (1, 1 << 40), (70000, 1 << 40), (70000, 70000)):
            support.write(path, bytes(size))
            self.assertEqual(len(margo_agent.read_file(path, limit)), size)
        for path, limit in ((path, 69999), ("/dev/zero", 1 << 40)):
            with self.assertRaises(margo_agent.StorageError):
                margo_agent.read_file(path, limit)
        self.assertIn(b"Linux", margo_agent.read_file("/proc/version", 1 << 40))

    def test_a_package_that_takes_too_much_fails_alone(self):
        """No lack of memory is a bug: the others go on, the fleet manager is told, and there is a next attempt."""
        self.publish()
        files = {"compose.yaml": support.make_compose(), "noise": os.urandom(60 * MIB)}
        self.wfm.add_package(support.make_archive(files), "large")
        self.publish(deployment_id=OTHER, name="large", package="large")
        code, text = self.run_with(limit_memory(96 * MIB), "run", "--once")
        self.assertEqual(code, 1, text)
        self.assertNotIn("bug", text)
        self.assertEqual((self.wfm.statuses()[-1], self.wfm.statuses(OTHER)[-1]), ("installed", "failed"))
        self.assertEqual(self.device.status()["deployments"][0]["error"]["code"], "OUT_OF_MEMORY")
        self.due()
        self.device.cycle()
        self.assertEqual(len(self.engine.containers()), 2)

    def test_a_package_larger_than_the_memory_is_unpacked(self):
        """It is unpacked as it is read (security 3.4)."""
        files = {"compose.yaml": support.make_compose(), "zeros": bytes(150 * MIB)}
        self.wfm.add_package(support.make_archive(files), "large")
        self.publish(package="large", name="large")
        code, text = self.run_with(limit_memory(128 * MIB), "run", "--once")
        self.assertEqual((code, self.wfm.statuses()[-1]), (0, "installed"), text)

    def due(self):
        """Failed deployments are tried at once."""
        self.assertEqual(self.device.run("retry").returncode, 0)

    def test_a_command_that_has_too_little_says_so(self):
        self.device.cycle()
        path = os.path.join(self.device.state_dir, "state.json")
        with open(path, "wb") as file:
            file.write(b'{"schema":1,"pulled":["' + b"x" * (140 * MIB) + b'"]}')
        code, text = self.run_with(limit_memory(128 * MIB), "status")
        self.assertEqual(code, 3, text)
        self.assertIn("not enough memory", text)

    def test_a_step_that_has_too_little_does_not_keep_the_others(self):
        """What was accepted is mended although what is new cannot be read."""
        self.publish()
        self.device.cycle()
        with self.engine.open() as held:
            held["containers"] = {}
        with mock.patch.dict(os.environ, self.device.env):
            agent = margo_agent.Agent(margo_agent.load_config(self.device.config_file))
            with mock.patch.object(margo_agent, "STEPS", [lambda _: bytearray(1 << 60)] + margo_agent.STEPS[2:]):
                outcome = agent.cycle()
        self.assertEqual((outcome.code, len(self.engine.containers())), (3, 1), outcome)


class Costs(unittest.TestCase):
    """What a peer may send takes bounded memory (security 3.4, 3.7, 4.1 to 4.3); tests.bench.costs prints the time, too."""

    WORST = ("YAML: line ends", "YAML: escapes", "YAML: words in quotes", "YAML: pairs", "YAML: long plain lines", "YAML: long text and aliases",
             "manifest: 10,000, long", "manifest: empty lists", "manifest: members", "bundle: zeros", "bundle: entries", "package: zeros",
             "package: more zeros", "state.json: 10,000 long errors",
             "state.json: the same, of a wrong form in its copy, too", "HTTP: 98 headers of 64 KiB", "HTTP: chunk extensions without end",
             "HTTP: redirects with large heads", "HTTP: chunks with extensions of 60 KiB", "git: a message of 200 MiB", "git: 1,000,000 objects")

    def test_no_input_takes_more_than_128_MiB(self):
        for kind in [*costs.KINDS, *costs.SERVED] if os.environ.get("MARGO_TEST_SLOW") == "1" else self.WORST:
            with self.subTest(kind):
                _, _, peak, _, words = costs.run(kind)
                self.assertLess(peak, costs.LIMIT, words)


class Disk(SmallCase):
    """Margins of free space fit the disk, on real file systems of that size."""

    def mount(self, size):
        """A file system of so many bytes that holds the state directory."""
        folder = support.make_folder(self)
        if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], stderr=subprocess.DEVNULL).returncode:
            support.give_up("a small file system cannot be mounted here")
        self.addCleanup(subprocess.run, ["umount", folder])
        self.device.settings["state_dir"] = self.device.state_dir = os.path.join(folder, "state")
        self.device.save()

    def test_three_MiB_take_a_first_deployment_and_its_updates(self):
        self.mount(3 * MIB)
        self.publish()
        self.device.cycle()
        for number in range(1, 4):
            self.wfm.add_package(support.make_compose(), tag=f"1.0.{number}", notes=os.urandom(4000).hex())
            self.publish(f"1.0.{number}")
            self.device.cycle()
        self.assertEqual((len(self.engine.containers()), self.wfm.statuses()[-1]), (1, "installed"))
        self.assertIn("state", self.device.run("doctor").stdout)

    def test_sixteen_MiB_take_a_package_of_one_MiB_and_its_update(self):
        self.mount(16 * MIB)
        for number in range(3):
            files = {"compose.yaml": support.make_compose(), "noise": os.urandom(MIB)}
            self.wfm.add_package(support.make_archive(files), tag=f"2.0.{number}")
            self.publish(f"2.0.{number}")
            self.device.cycle()
        self.assertEqual(self.wfm.statuses()[-1], "installed")

    def test_what_does_not_fit_is_refused_before_it_is_fetched(self):
        """P-4, with words that fit such disks."""
        self.mount(3 * MIB)
        self.wfm.add_package(support.make_archive({"compose.yaml": support.make_compose(), "noise": os.urandom(MIB)}), tag="2.0.0")
        self.publish("2.0.0")
        self.assertIn("DISK_FULL", self.device.cycle(1))
        self.assertFalse([path for _, path, _ in self.wfm.requests("registry") if "/blobs/" in path])

    def test_margins_of_a_large_disk_are_what_they_were(self):
        free, margin = margo_agent.get_space("/", margo_agent.FREE_SPACE)
        whole = os.statvfs("/").f_blocks * os.statvfs("/").f_frsize
        self.assertEqual(margin, min(32 * MIB, whole // 16))
        self.assertLessEqual(free, whole)


class Temporary(SmallCase):
    """F-05, P-5: what helpers leave behind for temporary files is below the state directory, and goes."""

    def setUp(self):
        super().setUp()
        self.folder = os.path.join(self.device.state_dir, "tmp")
        note = os.path.join(self.engine.folder, "notes")
        self.note, podman = note, os.path.join(self.engine.folder, "bin", "podman")
        os.rename(podman, podman + ".real")
        support.write(podman, f'#!/bin/sh\necho "$1 $TMPDIR $(ls "$TMPDIR" | wc -l)" >> {note}\n[ "$1" = pull ] && echo x > "$TMPDIR/left"\n'
                      f'exec {podman}.real "$@"\n', 0o755)

    def notes(self, command):
        """[(TMPDIR, how many files were in it)] as a command of the engine saw them."""
        with open(self.note) as file:
            return [tuple(line.split()[1:]) for line in file if line.split()[0] == command]

    def test_each_helper_gets_it_and_it_is_empty_at_the_start_and_before_a_pull(self):
        self.engine.change(images=[])
        self.wfm.add_package(support.make_compose({"a": {"image": "localhost/a:1"}, "b": {"image": "localhost/b:1"}}))
        self.publish()
        self.device.cycle()
        self.assertEqual(self.notes("pull"), [(self.folder, "0"), (self.folder, "0")])
        self.assertEqual({folder for folder, _ in self.notes("create")}, {self.folder})
        self.assertEqual(stat.S_IMODE(os.stat(self.folder).st_mode), 0o700)
        os.makedirs(os.path.join(self.folder, "storage123", "sub"))
        os.symlink(self.engine.folder, os.path.join(self.folder, "link"))
        self.device.cycle()
        self.assertEqual((os.listdir(self.folder), os.path.isdir(self.engine.folder)), ([], True))

    def test_where_the_store_of_images_has_more_room_the_engine_uses_its_own_folder(self):
        """A state directory on small flash beside a large store of images."""
        self.device.cycle()
        config = margo_agent.load_config(self.device.config_file, self.device.env)
        driver = margo_agent.make_compose_driver(config, environ=self.device.env)
        self.assertEqual(driver.clear_temporary(self.device.state_dir)["TMPDIR"], self.folder)
        with mock.patch.object(margo_agent, "get_space", lambda folder: ((1 if folder == self.folder else 2), 0)):
            self.assertNotIn("TMPDIR", driver.clear_temporary("/images"))

    def test_a_folder_of_somebody_else_is_never_emptied(self):
        folder = support.make_folder(self)
        support.write(os.path.join(folder, "file"), "")
        config = margo_agent.load_config(self.device.config_file, self.device.env)
        margo_agent.ComposeDriver("podman", config, dict(self.device.env, TMPDIR=folder)).clear_temporary(folder)
        self.assertEqual(os.listdir(folder), ["file"])


class Modes(SmallCase):
    """Whatever the umask, nobody else reads or writes what is below the state directory but what containers read."""

    def check_modes(self, device):
        """Every folder and file has the mode that it should; returns how many are there for containers to read."""
        seen = []
        for folder, names, files in os.walk(device.state_dir):
            for path in [folder] + [os.path.join(folder, name) for name in names + files]:
                facts = os.lstat(path)
                parts = os.path.relpath(path, device.state_dir).split(os.sep)
                if stat.S_ISLNK(facts.st_mode):
                    continue
                public = parts[0] == "deployments" and len(parts) > 3 and (
                    len(parts[3]) == 16 or parts[3].startswith(("config-", "content-")))
                mode = stat.S_IMODE(facts.st_mode)
                wanted = (0o755, 0o644) if public else (0o700, 0o600, 0o400)
                self.assertIn(mode, wanted, f"{path} has mode {mode:04o}")
                seen.append(public)
        self.assertIn(False, seen)
        return sum(seen)

    def test_a_whole_life_under_any_umask(self):
        compose = support.make_compose({"main": {"image": support.IMAGE, "command": ["x"], "volumes": ["./files:/x:ro"], "environment": ["A"],
                                                 "configs": [{"source": "c", "target": "/c"}]}}, configs={"c": {"content": "text"}})
        for umask in (0, 0o077, 0o777):
            with self.subTest(f"{umask:04o}"):
                shutil.rmtree(self.device.state_dir, ignore_errors=True)
                self.device.settings["state_dir"] = self.device.state_dir = os.path.join(self.device.folder, f"new{umask}", "sub", "state")
                self.device.save()
                for tag in ("1.0.0", "1.0.1"):
                    self.wfm.add_package(compose, tag=tag, **{"files/a": "a", "files/sub/b": tag})
                    self.publish(tag)
                    code, text = self.run_with(lambda: os.umask(umask), "run", "--once")
                    self.assertEqual(code, 0, text)
                    self.assertGreater(self.check_modes(self.device), 5)
                self.wfm.withdraw()
                self.assertEqual(self.run_with(lambda: os.umask(umask), "run", "--once")[0], 0)
                self.check_modes(self.device)
                memo = os.path.join(self.device.env["RUNTIME_DIRECTORY"], os.listdir(self.device.env["RUNTIME_DIRECTORY"])[0])
                self.assertEqual([stat.S_IMODE(os.stat(path).st_mode) for path in (memo, os.path.dirname(memo), os.path.join(self.device.folder, f"new{umask}"))],
                                 [0o600, 0o755, 0o755])

    def test_a_copy_of_a_repository_under_any_umask(self):
        support.require("git")
        repository = git_server.Repository(self)
        for umask in (0, 0o077, 0o777):
            device = support.Device(self, self.pki, self.wfm, self.engine, {"wfm.profile": "git", "identity": {}}, url=repository.url)
            self.device = device
            for text in ("one", "two"):
                repository.commit({"a.yaml": support.make_deployment(registry=self.wfm.registry, parameters={"GREETING": text})})
                code, output = self.run_with(lambda: os.umask(umask), "run", "--once")
                self.assertEqual(code, 0, output)
            self.check_modes(device)


class Library(unittest.TestCase):
    """E9: Python as Debian's minimal package, OpenWrt's and Yocto's have it, without a part of its library."""

    def test_a_module_that_is_missing_is_named_with_what_to_do(self):
        config = support.write(os.path.join(support.make_folder(self), "agent.yaml"), json.dumps(
            {"state_dir": "/nonexistent", "wfm": {"url": "https://127.0.0.1:1"}, "identity": {"certificate": "/x", "key": "/y", "trust_bundle": "/z"}}))
        code = "import sys; sys.modules[sys.argv.pop(1)] = None; sys.path.insert(0, {!r}); import margo_agent; sys.exit(margo_agent.main(sys.argv[1:]))"
        for form in ("text", "json"):
            done = subprocess.run([sys.executable, "-c", code.format(support.ROOT), "json", "-c", config, "--log-format", form, "status", "--json"],
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
            self.assertEqual(done.returncode, 2, done.stderr)
            self.assertIn("json", done.stderr)
            self.assertIn("this Python lacks a part of its standard library", done.stderr)
            self.assertNotIn("bug", done.stderr)


if __name__ == "__main__":
    unittest.main()
