"""examples/packaging: each way to pack and start the agent, tried as its README says."""
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import unittest
import zipfile

import margo_agent
from tests import support

PACKAGING = os.path.join(support.EXAMPLES, "packaging")


def run(*command, **options):
    """The CompletedProcess of a command, its output as text; fails unless it ends with 0."""
    done = subprocess.run(list(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                          universal_newlines=True, **options)
    if done.returncode:
        raise AssertionError(f"{' '.join(command)} ended with {done.returncode}: {done.stdout[-4000:]}")
    return done


def open_text(path):
    """A file of the repository, or of anywhere, as text."""
    with open(os.path.join(support.ROOT, path), encoding="utf-8") as file:
        return file.read()


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
        self.assertNotIn("manual-page", done.stdout)

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


class Manual(unittest.TestCase):
    """Both are made of the agent's table of commands."""

    def make(self, what):
        text = run(sys.executable, os.path.join(PACKAGING, "manual.py"), what, support.AGENT).stdout
        return support.write(os.path.join(support.make_folder(self), "margo-agent.8"), text)

    def test_the_manual_page_has_every_command_and_no_mistake(self):
        support.require("man")
        page = self.make("man")
        done = subprocess.run(["man", "--warnings", "-E", "UTF-8", "-l", page], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              universal_newlines=True, env=dict(os.environ, LC_ALL="C.UTF-8", MANWIDTH="100", MANPAGER="cat"))
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        for name, (_, usage) in margo_agent.COMMANDS.items():
            self.assertRegex(done.stdout, f"(?m)^       {name}\\b.*" + ".*".join(re.escape(option) for option in margo_agent.parse_usage(usage)[1]))
        self.assertNotIn("margo_agent.py", done.stdout)
        self.assertRegex(done.stdout, r"(?m)^       70 ")

    def complete(self, script, *words):
        """What bash offers for the last of some words."""
        ask = (f". {script}; COMP_WORDS=({' '.join(shlex.quote(word) for word in words)}); "
               f"COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 )); _margo_agent; echo \"${{COMPREPLY[*]}}\"")
        return run("bash", "-uec", ask, cwd=os.path.dirname(script)).stdout.split()

    def test_bash_offers_commands_their_options_and_files(self):
        support.require("bash")
        script = self.make("bash")
        self.assertEqual(set(self.complete(script, "margo-agent", "c")), {name for name in margo_agent.COMMANDS if name[0] == "c"})
        self.assertIn("--once", self.complete(script, "margo-agent", "-c", "x", "run", "--o"))
        self.assertEqual(self.complete(script, "margo-agent", "-c", "margo"), ["margo-agent.8"])
        self.assertEqual(self.complete(script, "margo-agent", "--log-format", "j"), ["json"])
        self.assertTrue(set(margo_agent.COMMANDS) <= set(self.complete(script, "margo-agent", "-q", "")))


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

    def test_it_is_a_line_that_cron_and_the_agent_understand(self):
        self.assertNotIn("%", self.line)                                        # cron takes it for a line break
        words = self.line.split(" && exec python3 -m margo_agent ")
        self.assertEqual(words[0], "* * * * * root cd /usr/local/lib/margo")
        self.assertEqual(words[1], "-q run --once --spread 50s")
        done = subprocess.run([sys.executable, support.AGENT, "-c", "/nowhere/agent.yaml"] + words[1].split(),
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
        self.assertEqual(done.returncode, 2)                                    # for the file that is not there
        self.assertIn("/nowhere/agent.yaml", done.stderr)

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


PROCD = """
procd_open_instance() { :; }
procd_close_instance() { :; }
procd_set_param() { echo "$@"; }
procd_send_signal() { echo "signal $*"; }
mkdir() { :; }
"""


class Yocto(unittest.TestCase):
    """The recipe, by the linter of recipes and by bitbake's own parser; no image was ever built of it."""

    def setUp(self):
        self.folder = support.make_folder(self)
        self.recipe = os.path.join(self.folder, f"margo-agent_{margo_agent.__version__}.bb")
        shutil.copy(os.path.join(PACKAGING, "margo-agent.bb"), self.recipe)

    def test_its_licence_is_the_one_that_is_there(self):
        with open(os.path.join(support.ROOT, "LICENSE"), "rb") as file, open(self.recipe) as recipe:
            self.assertIn(f"LICENSE;md5={hashlib.md5(file.read()).hexdigest()}", recipe.read())

    def test_the_linter_has_nothing_against_it_and_what_bitbake_makes_of_it_can_be_run(self):
        support.require("yocto")
        tools = os.path.join(support.PARTS, "yocto", "bin")
        done = subprocess.run([os.path.join(tools, "oelint-adv"), "--quiet", self.recipe], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              universal_newlines=True)
        found = [line for line in done.stdout.splitlines() if re.search(":(error|warning):", line) and "homepageping" not in line]
        self.assertEqual(found, [])
        for name in ("base", "python3native", "systemd"):
            support.write(os.path.join(self.folder, "classes", f"{name}.bbclass"), "")
        for path in ("margo_agent.py", "LICENSE", "examples/margo-agent.service"):
            support.write(os.path.join(self.folder, "src", os.path.basename(path)), open_text(path))
        image = os.path.join(self.folder, "image")
        settings = {"PN": "margo-agent", "D": image, "UNPACKDIR": os.path.join(self.folder, "src"), "PYTHON": sys.executable, "bindir": "/usr/bin",
                    "libdir": "/usr/lib", "sysconfdir": "/etc", "systemd_system_unitdir": "/usr/lib/systemd/system"}
        known = json.loads(run(os.path.join(tools, "python"), os.path.join(support.ROOT, "tests", "yocto.py"), self.recipe, self.folder,
                               *(f"{key}={value}" for key, value in settings.items())).stdout)
        files = {name[len("file://"):] for name in known["SRC_URI"].split()}
        self.assertEqual(files, set(os.listdir(os.path.join(self.folder, "src"))))
        run("sh", "-euc", known["do_install"])
        unit = open_text(os.path.join(image, "usr/lib/systemd/system", known["SYSTEMD_SERVICE:margo-agent"]))
        self.assertIn("ExecStart=/usr/bin/margo-agent -c /etc/margo/agent.yaml run\n", unit)
        command = os.path.join(image, "usr/bin/margo-agent")
        text = open_text(command)
        self.assertTrue(text.startswith("#!/usr/bin/python3 -I\n") and os.access(command, os.X_OK))
        os.remove(os.path.join(image, "usr/lib/margo/margo_agent.py"))         # its compiled form alone has to do
        (compiled,) = os.listdir(os.path.join(image, "usr/lib/margo/__pycache__"))
        os.rename(os.path.join(image, "usr/lib/margo/__pycache__", compiled), os.path.join(image, "usr/lib/margo/margo_agent.pyc"))
        said = run(sys.executable, "-I", "-c", text.replace('"/usr/lib/margo"', repr(image + "/usr/lib/margo"))
                   .replace("main()", "main(['version'])")).stdout
        self.assertIn(margo_agent.__version__, said)


class OpenWrt(support.DeviceCase):
    """Its package and its init script, without an OpenWrt: procd's part is done by the test."""

    def setUp(self):
        super().setUp()
        folder = support.make_folder(self)
        run("sh", os.path.join(PACKAGING, "openwrt.sh"), folder, support.AGENT, env=dict(os.environ, PYTHON=sys.executable))
        (self.package,) = [os.path.join(folder, name) for name in os.listdir(folder)]
        self.root = os.path.join(folder, "root")
        with tarfile.open(self.package) as package:
            self.assertEqual(sorted(package.getnames()), [".", "./control.tar.gz", "./data.tar.gz", "./debian-binary"])
            for name in ("data", "control"):
                with tarfile.open(fileobj=package.extractfile(f"./{name}.tar.gz")) as inner:
                    self.assertEqual({(entry.uid, entry.gid) for entry in inner}, {(0, 0)})
                    inner.extractall(os.path.join(folder, "root" if name == "data" else name))
        with open(os.path.join(folder, "control", "control")) as file:
            self.control = dict(re.findall(r"^([A-Za-z-]+): (.*)$", file.read(), re.M))

    def ask_init(self, function):
        """{parameter: its values} that a function of the init script tells procd."""
        script = f"{PROCD}\n. {self.root}/etc/init.d/margo-agent\n{function}\n"
        return {line.split()[0]: line.split()[1:] for line in run("sh", "-euc", script).stdout.splitlines()}

    def test_the_daemon_runs_from_bytecode_as_procd_starts_it(self):
        told = self.ask_init("start_service")
        program, *arguments = told["command"]
        self.assertEqual((program, arguments), ("/usr/bin/margo-agent", ["-c", "/etc/margo/agent.yaml", "run"]))
        self.assertEqual((told["stdout"], told["stderr"], told["respawn"]), (["1"], ["1"], ["3600", "30", "0"]))
        with open(self.root + program) as file:
            line = file.read().splitlines()[1].replace("/usr/lib", f"{self.root}/usr/lib").replace("python3", sys.executable)
        self.assertEqual(os.listdir(os.path.join(self.root, "usr/lib/margo")), ["margo_agent.pyc"])
        self.wfm.publish(support.make_deployment(registry=self.wfm.registry))
        self.device.set("poll.interval", "5s")
        words = [word.replace("/etc/margo/agent.yaml", self.device.config_file) for word in arguments]
        process = subprocess.Popen(["sh", "-c", line, "sh"] + words, env=self.device.env, stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.addCleanup(process.stdout.close)
        self.addCleanup(support.end, process)
        support.wait_for(lambda: "installed" in self.wfm.statuses(), what="the installation")
        process.terminate()
        self.assertEqual(process.wait(support.LIMIT), 0, process.stdout.read())

    def test_its_control_file_names_the_agents_version_and_pythons(self):
        version = run(sys.executable, support.AGENT, "version").stdout.split()[1]
        self.assertEqual((self.control["Version"], self.control["Architecture"]), (f"{version}-r1", "all"))
        self.assertTrue(self.control["Description"].endswith("Python %d.%d" % sys.version_info[:2]))
        self.assertEqual(self.ask_init("reload_service"), {"signal": ["margo-agent", "*", "HUP"]})


class Container(support.EngineCase):
    """C-233: the agent in a container, which drives the engine that it runs on by its socket."""

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
            support.give_up("Debian's own Python is not here")
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
