"""examples/packaging: each way to pack and start the agent, tried as its README says."""
import os
import re
import shutil
import subprocess
import sys
import unittest
import zipfile

from tests import support

PACKAGING = os.path.join(support.EXAMPLES, "packaging")


def run(*command, **options):
    """The CompletedProcess of a command, its output as text; fails unless it ends with 0."""
    done = subprocess.run(list(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                          universal_newlines=True, **options)
    if done.returncode:
        raise AssertionError(f"{' '.join(command)} ended with {done.returncode}: {done.stdout[-4000:]}")
    return done


class DebianPackage(unittest.TestCase):
    def setUp(self):
        support.require("dpkg-deb")
        self.folder = support.make_folder(self)

    def build(self, name="one"):
        """Builds it; its path."""
        folder = os.path.join(self.folder, name)
        run("sh", os.path.join(PACKAGING, "debian.sh"), folder)
        (file,) = os.listdir(folder)
        return os.path.join(folder, file)

    def test_lintian_finds_no_error(self):
        support.require("lintian")
        done = run("lintian", "--no-cfg", "--allow-root", "--fail-on", "error", self.build())
        self.assertNotRegex(done.stdout, "(?m)^E:")

    def test_it_is_the_same_each_time_it_is_built(self):
        paths = [self.build("one"), self.build("two")]
        contents = []
        for path in paths:
            with open(path, "rb") as file:
                contents.append(file.read())
        self.assertEqual(contents[0], contents[1])

    def test_all_in_it_is_roots_and_its_command_is_that_of_the_agent(self):
        path = self.build()
        version = run(sys.executable, support.AGENT, "version").stdout.split()[1]
        self.assertIn(f"margo-agent_{version}-1_all.deb", path)
        listing = run("dpkg-deb", "--contents", path).stdout
        self.assertEqual({line.split()[1] for line in listing.splitlines()}, {"root/root"})
        self.assertEqual(set(re.findall(r"^-rwx\S+ .* \./(\S+)$", listing, re.M)), {"usr/bin/margo-agent"})
        root = os.path.join(self.folder, "root")
        run("dpkg-deb", "--extract", path, root)
        with open(os.path.join(root, "usr/bin/margo-agent")) as file:
            self.assertIn('"/usr/share/margo-agent"', file.read())
        for name in ("margo-agent.service", "margo-agent-poll.service"):
            with open(os.path.join(root, "lib/systemd/system", name)) as file:
                self.assertRegex(file.read(), r"(?m)^ExecStart=/usr/bin/margo-agent -c /etc/margo/agent.yaml run")


class InASystem(unittest.TestCase):
    def test_service_update_timer_cron_and_removal(self):
        """Installed by dpkg in a system of its own with its own systemd."""
        support.require("systemd", "dpkg-deb", "podman")
        run(sys.executable, "-m", "tests.environments", "package", cwd=support.ROOT, timeout=400)


class Units(unittest.TestCase):
    def read(self, name):
        """{key: [values]} of a unit."""
        found = {}
        with open(os.path.join(support.EXAMPLES, name)) as file:
            for key, value in re.findall(r"^([A-Za-z]+)=(.*)$", file.read(), re.M):
                found.setdefault(key, []).append(value)
        return found

    def test_a_poll_may_do_what_the_service_may_do(self):
        """One is made of the other: what is dropped and kept is the same."""
        service, poll = self.read("margo-agent.service"), self.read("packaging/margo-agent-poll.service")
        for key in ("CapabilityBoundingSet", "LockPersonality", "SystemCallFilter", "KillMode", "StateDirectory", "UMask",
                    "StateDirectoryMode", "RuntimeDirectory", "LimitCORE", "TimeoutStopSec"):
            self.assertEqual(service[key], poll[key], key)
        self.assertEqual(poll["ExecStart"], [service["ExecStart"][0] + " --once"])


class Cron(unittest.TestCase):
    def setUp(self):
        with open(os.path.join(PACKAGING, "margo-agent.cron")) as file:
            lines = [line for line in file.read().splitlines() if line and not line.startswith("#")]
        self.variables = dict(line.split("=", 1) for line in lines if re.match("[A-Z]+=", line))
        (self.line,) = [line for line in lines if line.startswith("*")]

    def test_every_device_waits_its_own_time_below_a_minute(self):
        """The wait comes from the machine id alone."""
        command = self.line.split("root ", 1)[1].replace(r"\%", "%")
        self.assertNotRegex(self.line, r"[^\\]%")                               # cron takes a bare % for a line break
        folder, waits = support.make_folder(self), set()
        for number in range(40):
            identity = support.write(os.path.join(folder, "machine-id"), f"{number:032x}\n")
            script = command.replace("/etc/machine-id", identity).split(";")[0].replace("sleep", "echo")
            said = {run(self.variables["SHELL"], "-c", script, env={"PATH": self.variables["PATH"]}).stdout for _ in range(2)}
            self.assertEqual(len(said), 1)
            waits.add(int(said.pop()))
        self.assertGreater(len(waits), 15)
        self.assertLess(max(waits), 50)

    def test_the_path_has_what_podman_needs(self):
        self.assertTrue({"/usr/sbin", "/sbin", "/usr/bin"} <= set(self.variables["PATH"].split(":")))


class Zipapp(support.DeviceCase):
    def test_one_file_does_the_job_compiled(self):
        path = os.path.join(support.make_folder(self), "margo-agent.pyz")
        run("sh", os.path.join(PACKAGING, "zipapp.sh"), path, support.AGENT)
        with zipfile.ZipFile(path) as archive:
            self.assertEqual(set(archive.namelist()), {"__main__.py", "margo_agent.py", "margo_agent.pyc"})
        self.assertEqual(run(path, "version").stdout, run(sys.executable, support.AGENT, "version").stdout)
        self.wfm.publish(support.make_deployment(registry=self.wfm.registry))
        run(path, "-c", self.device.config_file, "run", "--once", env=self.device.env)
        self.assertEqual(len(self.engine.containers()), 1)
        script = f"import sys; sys.path.insert(0, {path!r}); import margo_agent; print(margo_agent.__file__)"
        self.assertRegex(run(sys.executable, "-I", "-S", "-c", script).stdout, r"margo-agent\.pyz/margo_agent\.pyc$")


class Container(support.EngineCase):
    """The agent in a container, which drives the engine that it runs on by its socket."""

    def make_base(self):
        """An image with this machine's own Python, podman, openssl and a shell, instead of a Debian from elsewhere."""
        folder = support.make_folder(self)
        python = os.path.realpath("/usr/bin/python3")
        library = f"/usr/lib/{os.path.basename(python)}"
        programs = [python, shutil.which("podman"), shutil.which("openssl")]
        needed = set(programs)
        for item in programs + [os.path.join(library, "lib-dynload", name) for name in os.listdir(library + "/lib-dynload")]:
            listed = subprocess.run(["ldd", item], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, universal_newlines=True)
            needed.update(re.findall(r"(/\S+) \(0x", listed.stdout))
        for path in sorted(needed):
            target = folder + path
            os.makedirs(os.path.dirname(target), exist_ok=True)
            shutil.copy(path, target)
        shutil.copytree(library, folder + library, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "test", "idlelib"))
        for name in ("tmp", "etc", "proc", "sys", "dev", "run", "bin", "root"):
            os.makedirs(os.path.join(folder, name), exist_ok=True)
        shutil.copy("/bin/busybox", os.path.join(folder, "bin", "sh"))
        os.symlink(os.path.basename(python), os.path.join(folder, "usr", "bin", "python3"))
        support.write(os.path.join(folder, "etc", "passwd"), "root:x:0:0:root:/root:/bin/sh\n")
        archive = os.path.join(support.make_folder(self), "base.tar")
        run("tar", "-C", folder, "-cf", archive, ".")
        self.engine.podman("import", archive, "localhost/base:1")

    def test_it_installs_updates_and_removes_by_the_socket(self):
        if not os.path.exists("/usr/bin/python3"):
            self.skipTest("Debian's own Python is not here")
        self.make_base()
        context = support.make_folder(self)
        shutil.copy(support.AGENT, os.path.join(context, "margo_agent.py"))
        self.engine.podman("build", "--network=none", "--build-arg=BASE=localhost/base:1", "--build-arg=PACKAGES=", "-t",
                           "margo-agent", "-f", os.path.join(PACKAGING, "Containerfile"), context)
        socket = os.path.join(self.engine.folder, "podman.sock")
        support.Service(self, ["podman", "system", "service", "--time=0", f"unix://{socket}"], self.engine.env)
        support.wait_for(lambda: os.path.exists(socket), what="podman's socket")
        self.wfm.add_package(support.make_compose())
        folder, pki = self.device.folder, self.pki.folder
        os.makedirs(self.device.state_dir)

        def cycle():
            return self.engine.podman(
                "run", "--rm", "--network=host", f"--volume={socket}:/run/podman/podman.sock", f"--volume={pki}:{pki}:ro",
                f"--volume={folder}:{folder}", "margo-agent", "-c", self.device.config_file, "run", "--once")

        for greeting in ("one", "two"):
            self.wfm.publish(support.make_deployment(registry=self.wfm.registry, parameters={"GREETING": greeting}))
            cycle()
            (name,) = [name for name in self.engine.containers() if name.startswith("web-")]
            self.assertIn(f"GREETING={greeting}", self.engine.podman("exec", name, "env"))
        self.wfm.withdraw()
        cycle()
        self.assertEqual(self.engine.containers(), {})
        self.assertEqual(self.wfm.statuses()[-1], "removed")


if __name__ == "__main__":
    unittest.main()
