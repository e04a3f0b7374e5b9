"""The harness for moments of death: worlds to try them in, the agent's state-changing system calls, and what has to hold afterwards.

A world is a WFM, an engine of files, and a device in a known state, which is put back before each trial.  strace, attached to the agent
alone, numbers its system calls, kills it on the way into one, or lets one fail; what the agent has started goes on to its own end, as it
would on a device.
"""
import os
import re
import shutil
import signal
import subprocess
import threading

import margo_agent
from tests import support
from tests.support import HELLO

CHANGES = ("write,pwrite64,fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat,rmdir,symlink,symlinkat,link,linkat,chmod,"
           "fchmod,fchmodat,ftruncate,openat,sendto,connect,vfork,fork,clone,clone3,flock")
FILES = ("write", "fsync", "rename", "unlink", "unlinkat", "mkdir", "rmdir", "symlink", "chmod", "fchmod", "openat")
ERRORS = ("EIO", "ENOSPC", "EROFS", "EMFILE")
BROKEN = {"main": {"image": support.IMAGE, "command": ["sleep", "7"]}, "broken": {"image": support.IMAGE}}


def read_trace(path, root):
    """[(call, number, file, line)] of the calls of a trace that change something: all but reading, and writing to stderr.

    file: what it touched below `root`, relative to it (`.` is the root), else "".  number: which call of that name it was, from 1, on that
    file, or of all where it touched none: how often the agent asks an engine while it waits is a matter of time.
    """
    found, counts = [], {}
    with open(path, errors="replace") as file:
        for line in file:
            call = line.partition("(")[0]
            if not call.isidentifier():
                continue
            match = re.search(re.escape(root) + r"/?([^\">]*)", line)
            path = (match.group(1) or ".") if match else ""
            counts[call, ""] = counts.get((call, ""), 0) + 1
            if path:
                counts[call, path] = counts.get((call, path), 0) + 1
            if call == "openat" and "O_CREAT" not in line or call == "write" and line.startswith("write(2<"):
                continue
            found.append((call, counts[call, path], path, line))
    return found


def aim(point, root, what):
    """strace's options to do `what` at a point that read_trace gave."""
    call, number, path, _ = point
    where = ["-P", os.path.normpath(os.path.join(root, path))] if path else []
    return ["-e", f"trace={call}", "-e", f"inject={call}:{what}:when={number}"] + where


class World:
    """One scenario: `prepare` brings the device to where it begins, `command` is what is tried, `check` says what must hold at the end."""

    def __init__(self, test, scenario):
        self.test, self.scenario = test, scenario
        self.pki = support.Pki(test)
        self.wfm = support.Wfm(test, self.pki)
        self.engine = support.FakeEngine(test)
        self.device = support.Device(test, self.pki, self.wfm, self.engine, {"poll.jitter": "0%"})
        self.wfm.add_package(support.make_compose())
        self.wfm.add_package(support.make_compose({"main": {"image": support.IMAGE, "command": ["sleep", "6"]}}), tag="2.0.0")
        self.wfm.add_package(support.make_compose(BROKEN), tag="3.0.0")
        self.engine.change(exits={"broken": 3})
        getattr(self, "prepare_" + scenario)()
        self.kept = support.make_folder(test)
        self.save()

    # Scenarios

    def publish(self, revision):
        """Makes this revision the desired state."""
        self.wfm.publish(support.make_deployment(components=[("web", revision)], parameters={"GREETING": revision}, registry=self.wfm.registry))

    def prepare_first(self):
        self.publish("1.0.0")
        self.command, self.code, self.story = ("run", "--once"), 0, ["pending", "installing", "installed"]

    def prepare_update(self):
        self.publish("1.0.0")
        self.device.cycle()
        self.publish("2.0.0")
        self.command, self.code, self.story = ("run", "--once"), 0, ["pending", "installing", "installed"]

    def prepare_rollback(self):
        self.publish("1.0.0")
        self.device.cycle()
        self.publish("3.0.0")
        self.command, self.code, self.story = ("run", "--once"), 1, ["pending", "installing", "failed"]

    def prepare_removal(self):
        self.publish("1.0.0")
        self.device.cycle()
        self.wfm.withdraw()
        self.command, self.code, self.story = ("run", "--once"), 0, ["removing", "removed"]

    def prepare_unenroll(self):
        self.publish("1.0.0")
        self.device.cycle()
        self.command, self.code = ("unenroll", "--purge"), 0
        self.story = ["removing", "removed"]

    # Putting back

    def save(self):
        """Keeps the device as it is now."""
        if os.path.isdir(self.device.state_dir):
            shutil.copytree(self.device.state_dir, os.path.join(self.kept, "state"), symlinks=True)
        shutil.copy(os.path.join(self.engine.folder, "held.json"), self.kept)

    def restore(self, state=None):
        """Makes the device what it was when it was kept; state: another folder to take the state directory from."""
        shutil.rmtree(self.device.state_dir, ignore_errors=True)
        source = state or os.path.join(self.kept, "state")
        if os.path.isdir(source):
            shutil.copytree(source, self.device.state_dir, symlinks=True)
        shutil.copy(os.path.join(self.kept, "held.json"), self.engine.folder)
        shutil.rmtree(os.path.join(self.device.folder, "run"), ignore_errors=True)
        self.engine.forget_calls()
        self.before = len(self.wfm.reports())

    # Trials

    def run(self, *options):
        """The command under strace with these options, once all that it started has ended: (exit code or -9, stderr)."""
        self.trace = os.path.join(self.device.folder, "trace")
        argv = ["strace", "-qq", "-y", "-o", self.trace] + list(options) + self.device.command(*self.command)
        done = subprocess.run(argv, env=self.device.env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, timeout=120,
                              universal_newlines=True)
        support.wait_for(lambda: not self.find_children(), what="the end of the engine's commands")
        return (-signal.SIGKILL if done.returncode == 128 + signal.SIGKILL else done.returncode), done.stderr

    def strike(self, point, what):
        """The command, and at this point of it strace does `what`; like run."""
        return self.run(*aim(point, self.device.state_dir, what))

    def find_children(self):
        """What runs of this world's engine commands."""
        mark, found = f"FAKE_PODMAN={self.engine.folder}\0".encode(), []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{pid}/environ", "rb") as file:
                    if mark in file.read():
                        found.append(pid)
            except OSError:
                continue
        return found

    def find_points(self):
        """The undisturbed run's calls that change something, as read_trace gives them; it also says what the disk must hold afterwards."""
        for _ in range(2):                          # the first one may still have to compile the agent
            self.restore()
            code, errors = self.run("-s", "0", "-e", f"trace={CHANGES}")
        if code != self.code:
            raise AssertionError(f"{self.scenario} ended with {code}:\n{errors}")
        self.files = self.list_files()
        return read_trace(self.trace, self.device.state_dir)

    def list_files(self):
        """Every path of the state directory."""
        return {os.path.relpath(os.path.join(folder, name), self.device.state_dir) for folder, folders, names in os.walk(self.device.state_dir)
                for name in folders + names}

    def let_time_pass(self):
        """Ends every back-off, as an hour would; after damage to nothing else is this a change of the state."""
        path = os.path.join(self.device.state_dir, "state.json")
        if os.path.exists(path):
            with open(path, "rb") as file:
                state = margo_agent.parse_state(file.read(), path)
            for record in state["deployments"].values():
                record["retry"] = {}
            support.write(path, margo_agent.make_state_data(dict(state, patience={}, waits={})), 0o600)

    def check(self, what, failures=False, again=None, told=False):
        """One ordinary run (or `again`) converges; failures: whether the trial may have reported one truthfully; told: whether all may
        have been reported before.
        """
        before = self.wfm.statuses()[self.before:]
        self.let_time_pass()
        command = again or ("run", "--once")
        done = self.device.run(*command)
        converged = self.command[0] == "run" or command[0] == "unenroll"
        told = told or not converged                # it was killed before it began: nothing has changed, nothing is to be told
        expected = self.code if converged else 0
        words = f"{self.scenario}, {what}: "
        if done.returncode != expected or "Traceback" in done.stderr:
            raise AssertionError(f"{words}{command} ended with {done.returncode}, expected {expected}:\n{done.stderr}")
        self.check_containers(words, converged)
        state = self.device.state()
        if state["outbox"]:
            raise AssertionError(f"{words}the outbox holds {state['outbox']}")
        reported = before + self.wfm.statuses()[self.before + len(before):]
        allowed = set(self.story) | ({"failed"} if failures else set()) | (set() if converged else {"pending", "installing", "installed"})
        if not reported and not told or set(reported) - allowed:
            raise AssertionError(f"{words}reported was {reported}")
        end = self.story[-1] if converged else "installed"
        if reported and reported[-1] != end:
            raise AssertionError(f"{words}the last that was reported is {reported}, true is {end}")
        record = state["deployments"].get(HELLO)
        if (record["state"] if record else "removed") != end:
            raise AssertionError(f"{words}the state says {record}")
        extra = self.list_files() - self.files if converged else set()
        if {name for name in extra if name.endswith(".tmp") and not self.is_overwritten(name)}:
            raise AssertionError(f"{words}left behind is {sorted(extra)}")

    @staticmethod
    def is_overwritten(name):
        """Whether a temporary file's name is used again, so that it cannot pile up."""
        return "/" not in name or name.endswith(".env.tmp") or name.startswith("registries/")

    def check_containers(self, words, converged):
        """Exactly the desired containers run, of the right revision."""
        wanted = {"first": "1.0.0", "update": "2.0.0", "rollback": "1.0.0", "removal": None, "unenroll": None}[self.scenario]
        wanted = wanted if converged else "1.0.0"
        found = [(item["labels"]["org.margo.service"], item["state"], item["image"]) for item in self.engine.containers().values()]
        if found != ([("main", "running", support.IMAGE)] if wanted else []):
            raise AssertionError(f"{words}containers are {found}")
        argv = [item["argv"] for item in self.engine.containers().values()]
        sleep = {"1.0.0": "100000", "2.0.0": "6"}.get(wanted)
        if wanted and argv[0][-1] != sleep:
            raise AssertionError(f"{words}the container is not of revision {wanted}: {argv[0][-2:]}")


def share(jobs, act):
    """Does act(world, trial) for each trial of [(world, [trial])], the worlds side by side; raises the first failure."""
    failures = []

    def work(world, trials):
        try:
            for trial in trials:
                if not failures:
                    act(world, trial)
        except Exception as error:                  # the first one is raised below, in the test's own thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


# What a power cut leaves: only what was made durable by fsync, of contents and of names

class Disk:
    """A model of the state directory that remembers what a power cut would leave of it: what fsync made safe, of files and of folders."""

    def __init__(self, folder):
        self.held, self.safe, self.count = {0: {}}, {0: {}}, 0      # inode: contents, or {name: inode}; as seen by programs, and as made safe
        for path, folders, files in os.walk(folder):
            for name in folders + files:
                full = os.path.join(path, name)
                content = {}
                if os.path.isfile(full):
                    with open(full, "rb") as file:
                        content = file.read()
                self.add(os.path.relpath(full, folder), content)
        self.safe = {inode: dict(content) if isinstance(content, dict) else content for inode, content in self.held.items()}

    def find(self, path):
        """The inode of a path, None where there is none."""
        inode = 0
        for name in path.split("/") if path else ():
            inode = self.held.get(inode, {}).get(name)
        return inode

    def parent(self, path):
        """({name: inode} of the folder that a path is in, its name there)."""
        return self.held[self.find(os.path.dirname(path))], os.path.basename(path)

    def add(self, path, content):
        """A new file, or folder ({})."""
        self.count += 1
        self.held[self.count] = content
        names, name = self.parent(path)
        names[name] = self.count

    def apply(self, call, path, other, data):
        """One call on a path below the state directory; True where it made something safe."""
        inode = self.find(path)
        if call in ("fsync", "fdatasync"):
            content = self.held[inode]
            self.safe[inode] = dict(content) if isinstance(content, dict) else content
            return True
        if call in ("openat", "mkdir") and path and inode is None:
            self.add(path, b"" if call == "openat" else {})
        elif call == "openat" and path:
            self.held[inode] = b""
        elif call == "write":
            self.held[inode] += data
        elif call in ("rename", "renameat", "renameat2", "unlink", "unlinkat", "rmdir") and inode is not None:
            names, name = self.parent(path)
            del names[name]
            if other:
                names, name = self.parent(other)
                names[name] = inode
        return False

    def write(self, folder, inode=0):
        """Makes the folder as it would be found after the cut: names that were not made safe are gone, contents are empty."""
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder, 0o700)
        for name, child in self.safe.get(inode, {}).items():
            if isinstance(self.held[child], dict):
                self.write(os.path.join(folder, name), child)
            else:
                support.write(os.path.join(folder, name), self.safe.get(child, b""))


def read_events(path, root):
    """[(call, path, other path, data)] of a trace made with -xx, for Disk; "vfork" among them counts the engine's commands."""
    events = []
    with open(path, errors="replace") as file:
        for line in file:
            call, _, rest = line.partition("(")
            if call in ("vfork", "fork", "clone", "clone3"):
                events.append(("vfork", "", "", b""))
            if not call.isidentifier() or " = -1 " in line:
                continue
            texts = [decode(text) for text in re.findall(r'"((?:\\x[0-9a-f]{2})*)"', rest)]
            handle = re.match(r"[0-9]+<((?:\\x[0-9a-f]{2})+|[^>]*)>", rest)
            target = decode(handle.group(1)).decode(errors="replace") if handle else ""
            names = [text.decode(errors="replace") for text in texts]
            if call in ("write", "fsync", "fdatasync"):
                names = [target]
            if call == "unlinkat" and target:
                names = [os.path.join(target, names[0])]
            if call == "openat" and ("O_CREAT" not in rest or not names):
                continue
            names = [os.path.relpath(name, root) for name in names if name == root or name.startswith(root + "/")]
            if names and call in ("openat", "mkdir", "write", "rename", "renameat", "renameat2", "unlink", "unlinkat", "rmdir", "fsync", "fdatasync"):
                names = ["" if name == "." else name for name in names] + [""]
                events.append((call, names[0], names[1], texts[0] if call == "write" and texts else b""))
    return events


def decode(text):
    """Bytes of a text as strace -xx prints it."""
    return bytes.fromhex(text.replace("\\x", "")) if text.startswith("\\x") else text.encode()
