"""The daemon and its neighbours: asked to end in any phase, hung helpers, a full watchdog, cron beside it, readers during a run."""
import json
import os
import py_compile
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from unittest import mock

import margo_agent
from tests import death, support
from tests.support import HELLO

SLOW = float(os.environ.get("MARGO_TEST_SLOW") or 0) == 1
HASTY = ("import sys; sys.path.insert(0, {root!r}); import margo_agent; margo_agent.STOP_GRACE = 1; margo_agent.CYCLE_RETRY = 0.2; "
         "margo_agent.HUNG, margo_agent.STOP_LIMIT = {hung}, 2; sys.exit(margo_agent.main(sys.argv[1:]))")


class DaemonCase(support.DeviceCase):
    def setUp(self):
        super().setUp()
        self.wfm.publish(support.make_deployment(registry=self.wfm.registry))

    def start(self, *arguments, hasty=False, hung=60, python=sys.executable, **env):
        """The agent as a process of its own; hasty: with short limits, `hung` for a cycle that does not move."""
        self.log = tempfile.TemporaryFile()
        self.addCleanup(self.log.close)
        argv = self.device.command(*arguments)
        if hasty:
            argv = [python, "-c", HASTY.format(root=support.ROOT, hung=hung)] + argv[argv.index(support.AGENT) + 1:]
        process = subprocess.Popen(argv, env=dict(self.device.env, **env), stderr=self.log, stdin=subprocess.DEVNULL)
        self.addCleanup(support.end, process)
        return process

    def hang(self, *commands):
        """Lets commands of the engine hang."""
        support.write(os.path.join(self.engine.folder, "slow"), " ".join(commands))

    def helpers(self):
        """The engine's commands that run, with what they have started."""
        mark, found = f"FAKE_PODMAN={self.engine.folder}\0".encode(), []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{pid}/environ", "rb") as environ, open(f"/proc/{pid}/cmdline", "rb") as words:
                    line = words.read()
                    if mark in environ.read() and (b"sleep\x00600" in line or b"bin/podman" in line):
                        found.append(int(pid))
            except OSError:
                continue
        return found

    def errors(self):
        """What the process has logged."""
        return os.pread(self.log.fileno(), 10 ** 6, 0).decode()


class Stop(DaemonCase):
    def test_a_helper_that_hangs_is_ended_with_its_children_when_the_daemon_is_asked_to_end(self):
        """P-9, D-26: within the grace, whatever it is in the middle of; the next run goes on from there."""
        for command in ("ps", "create", "start"):
            self.hang(command)
            process = self.start("run", "--once", hasty=True)
            support.wait_for(lambda: len(self.helpers()) > 1, what=f"podman {command}")
            process.send_signal(signal.SIGTERM)
            self.assertEqual(process.wait(support.LIMIT), 3, self.errors())
            self.assertNotIn("bug:", self.errors())
            support.wait_for(lambda: not self.helpers(), what="the end of the helpers")
            self.hang()
        self.device.cycle(0)
        self.assertEqual((len(self.engine.containers()), self.wfm.statuses()[-1]), (1, "installed"))

    def test_a_removal_that_is_cut_off_has_not_failed(self):
        self.device.cycle(0)
        self.wfm.withdraw()
        self.hang("rm")
        process = self.start("run", "--once", hasty=True)
        support.wait_for(lambda: len(self.helpers()) > 1, what="podman rm")
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.wait(support.LIMIT), 3, self.errors())
        self.hang()
        self.device.cycle(0)
        self.assertEqual(self.wfm.statuses()[-2:], ["removing", "removed"])

    def test_one_that_is_asked_to_end_and_has_nothing_left_to_do_is_done(self):
        """Contract, exit code 0: every deployment is as desired; a service that is restarted logs no error for it."""
        self.device.cycle()
        self.wfm.fault({"path": "/api/v1/deployments", "delay": 2})
        process = self.start("run", "--once")
        support.wait_for_handler(process, signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        self.assertEqual((process.wait(support.LIMIT), self.errors()), (0, ""))

    def test_the_parent_ends_when_its_child_has(self):
        self.hang("create")
        process = self.start("run", hasty=True)
        support.wait_for(lambda: len(self.helpers()) > 1, what="podman create")
        (child,) = [int(pid) for pid in filter(str.isdigit, os.listdir("/proc")) if parent_of(pid) == process.pid]
        process.send_signal(signal.SIGTERM)
        os.kill(child, signal.SIGALRM)              # the grace is over
        self.assertEqual(process.wait(support.LIMIT), 0)
        self.hang()
        self.device.cycle(0)

    def test_sigterm_at_every_call_that_changes_something(self):
        """P-13: asked to end anywhere, it ends with what is true, and one ordinary run does the rest."""
        support.require("strace")
        world = death.World(self, "update")
        points = [point for point in world.find_points() if point[0] in ("write", "rename", "vfork", "connect")]
        chosen = points if SLOW else points[::len(points) // 5]
        for call, number, path, _ in chosen:
            world.restore()
            code, errors = world.strike((call, number, path, ""), "signal=TERM")
            self.assertIn(code, (0, 3), errors)
            world.check(f"SIGTERM at {call} {number} {path}")
        sys.__stderr__.write(f"\ndaemon: SIGTERM at {len(chosen)} of {len(points)} points survived\n")

    def test_a_time_limit_ends_a_hung_helper_without_being_asked(self):
        """P-9: every phase has a deadline, and its helper's whole group goes with it."""
        self.device.cycle()
        self.hang("ps")
        old = dict(os.environ)
        self.addCleanup(lambda: (os.environ.clear(), os.environ.update(old)))
        os.environ.update(self.device.env)
        driver = margo_agent.Agent(margo_agent.load_config(self.device.config_file)).devices[0].drivers["compose"]
        run = driver.run
        driver.run = lambda arguments, timeout, *rest: run(arguments, 1, *rest)
        with self.assertRaises(margo_agent.CommandTimeout):
            driver.observe(True)
        support.wait_for(lambda: not self.helpers(), what="the end of the helpers")


def parent_of(pid):
    """The parent of a process, None where it has gone."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[1])
    except OSError:
        return None


class Systemd(DaemonCase):
    def test_a_notify_socket_that_goes_away_ends_nothing(self):
        path = os.path.join(self.device.folder, "notify")
        self.device.set("poll.interval", "1s")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as peer:
            peer.bind(path)
            process = self.start("run", NOTIFY_SOCKET=path)
            support.wait_for(self.wfm.statuses, what="the first status")
        os.remove(path)
        count = len(self.wfm.requests())
        support.wait_for(lambda: len(self.wfm.requests()) > count + 1, what="more polls")
        self.assertIsNone(process.poll())

    def test_a_cycle_that_is_killed_is_followed_by_another(self):
        """D-30: the parent outlives its child, whatever ended that."""
        self.device.set("poll.interval", "1s")
        self.hang("create")
        process = self.start("run")
        support.wait_for(lambda: len(self.helpers()) > 1, what="podman create")
        (child,) = [int(pid) for pid in filter(str.isdigit, os.listdir("/proc")) if parent_of(pid) == process.pid]
        os.kill(child, signal.SIGKILL)
        self.hang()
        for pid in self.helpers():
            os.kill(pid, signal.SIGKILL)
        process.send_signal(signal.SIGHUP)
        support.wait_for(lambda: "installed" in self.wfm.statuses(), what="the next cycle's work")


class Parent(DaemonCase):
    """What the daemon's parent does about cycles that do not end, and about such as cannot begin."""

    def setUp(self):
        super().setUp()
        self.peer = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.addCleanup(self.peer.close)
        self.peer.bind(os.path.join(self.device.folder, "notify"))
        self.peer.setblocking(False)
        self.addCleanup(lambda: [os.kill(pid, signal.SIGKILL) for pid in self.helpers()])
        self.systemd = {"NOTIFY_SOCKET": os.path.join(self.device.folder, "notify"), "WATCHDOG_USEC": "400000"}

    def count_beats(self, seconds=0.0):
        """How often the watchdog was fed within some seconds from now."""
        self.read()
        time.sleep(seconds)
        return self.read().count(b"WATCHDOG=1")

    def read(self):
        """What systemd was told since the last time."""
        words = []
        try:
            while True:
                words.append(self.peer.recv(100))
        except BlockingIOError:
            return words

    def find_child(self, process):
        """The cycle of a daemon."""
        return support.wait_for(lambda: [int(pid) for pid in filter(str.isdigit, os.listdir("/proc")) if parent_of(pid) == process.pid])[0]

    def test_the_watchdog_is_fed_while_a_cycle_moves_and_between_cycles(self):
        """A component may take six hours: a helper that hangs is waited for, and the waiting itself moves."""
        self.hang("create")
        process = self.start("run", hasty=True, hung=12, **self.systemd)
        support.wait_for(lambda: len(self.helpers()) > 1, what="podman create")
        child = self.find_child(process)
        self.assertGreater(self.count_beats(15), 5)
        self.assertEqual(self.find_child(process), child)
        self.hang()
        os.kill(child, signal.SIGKILL)
        for pid in self.helpers():
            os.kill(pid, signal.SIGKILL)
        process.send_signal(signal.SIGHUP)
        support.wait_for(lambda: "installed" in self.wfm.statuses(), what="the next cycle's work")
        self.assertGreater(self.count_beats(3), 1)

    def test_a_cycle_that_does_not_move_is_killed_and_followed_by_another(self):
        """F-04: what waits for a dead disk shows no sign of life; here it is stopped."""
        self.hang("create")
        process = self.start("run", hasty=True, hung=12, **self.systemd)
        support.wait_for(lambda: len(self.helpers()) > 1, what="podman create")
        child = self.find_child(process)
        os.kill(child, signal.SIGSTOP)
        self.hang()
        for pid in self.helpers():
            os.kill(pid, signal.SIGKILL)
        support.wait_for(lambda: "installed" in self.wfm.statuses(), what="the next cycle's work")
        self.assertIn("the cycle has not moved for 12 s, and is killed", self.errors())
        self.assertIsNone(process.poll())

    def test_as_process_1_of_a_container_it_keeps_no_corpses(self):
        """FU-3: whatever an engine's command leaves behind becomes a child of process 1, and is reaped when it ends."""
        path = os.path.join(self.engine.folder, "bin", "podman")
        left = support.write(os.path.join(self.engine.folder, "left"), "")
        script = f"#!/bin/sh\n(sleep 0.1; echo >> {left}) > /dev/null 2>&1 &\nexec {path}.real \"$@\"\n"
        os.rename(path, path + ".real")
        support.write(path, script, 0o755)
        process = subprocess.Popen(["unshare", "--pid", "--fork", "--kill-child"] + self.device.command("run"), env=dict(self.device.env),
                                   stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.addCleanup(support.end, process)
        support.wait_for(lambda: self.device.state() and self.device.state()["lastPoll"], what="a cycle")
        daemon = self.find_child(process)
        os.kill(daemon, signal.SIGHUP)              # so that there is one cycle more
        support.wait_for(lambda: os.path.getsize(left) > 5, what="things that are left behind")

        def find_corpses():
            with open(f"/proc/{daemon}/task/{daemon}/children") as file:
                children = file.read().split()
            return [child for child in children if margo_agent.read_file(f"/proc/{child}/stat", 4096).rsplit(b")", 1)[1].split()[0] == b"Z"]

        time.sleep(1)
        support.wait_for(lambda: not find_corpses(), what="the end of all corpses")
        os.kill(daemon, signal.SIGTERM)
        self.assertEqual(process.wait(30), 0)

    def test_a_cycle_that_does_not_end_does_not_keep_the_parent(self):
        """It is asked to end, and then it is killed."""
        self.hang("create")
        process = self.start("run", hasty=True)
        support.wait_for(lambda: len(self.helpers()) > 1, what="podman create")
        os.kill(self.find_child(process), signal.SIGSTOP)
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.wait(support.LIMIT), 1)
        self.assertIn("did not end within 2 s, and is killed", self.errors())

    def test_one_that_can_start_no_cycle_says_why_and_ends(self):
        """F-22: the interpreter's path went away under the daemon; and the agent's own file."""
        python = os.path.join(self.device.folder, "python")
        os.symlink(os.path.realpath(sys.executable), python)
        self.device.set("poll.interval", "1s")
        process = self.start("run", hasty=True, python=python, PYTHONHOME=sys.base_prefix, **self.systemd)
        support.wait_for(lambda: "installed" in self.wfm.statuses(), what="the first installation")
        os.remove(python)
        support.wait_for(lambda: "cannot be started" in self.errors(), what="a cycle that cannot be started")
        self.assertLess(self.count_beats(0.5), 2)
        self.assertEqual(process.wait(support.LIMIT), 1, self.errors())
        self.assertEqual(self.errors().count("python cannot be started (No such file or directory)"), 5)
        self.assertIn("five cycles in a row could not be started", self.errors())

    def test_an_agent_that_was_removed_is_noticed_too(self):
        folder = support.make_folder(self)
        shutil.copy(support.AGENT, folder)
        with mock.patch.object(support, "ROOT", folder):
            process = self.start("run", hasty=True, **self.systemd)
        support.wait_for(lambda: "installed" in self.wfm.statuses(), what="the first installation")
        os.remove(os.path.join(folder, "margo_agent.py"))
        process.send_signal(signal.SIGHUP)
        self.assertEqual(process.wait(support.LIMIT), 1, self.errors())
        self.assertIn("No module named 'margo_agent'", self.errors())

    def test_the_compiled_form_alone_is_enough(self):
        """F-23, E10: OpenWrt and many images ship no source; optimised, there are no docstrings either."""
        folder = support.make_folder(self)
        for level in (-1, 2):
            with self.subTest(level):
                compiled = os.path.join(folder, "margo_agent.pyc")
                py_compile.compile(support.AGENT, cfile=compiled, dfile="/usr/lib/margo/margo_agent.py", optimize=level)
                with mock.patch.object(support, "ROOT", folder):
                    process = self.start("run", hasty=True)
                count = len(self.wfm.requests())
                support.wait_for(lambda: len(self.wfm.requests()) > count, what="a poll")
                process.send_signal(signal.SIGTERM)
                self.assertEqual(process.wait(support.LIMIT), 0, self.errors())
                for command in ("help", "version"):
                    done = subprocess.run([sys.executable, compiled, command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
                    self.assertEqual(done.returncode, 0, done.stdout)


class Terminal(DaemonCase):
    """ctrl-C: a terminal sends SIGINT to all that it has started."""

    def setUp(self):
        super().setUp()
        # what a shell starts in the background ignores it, and so would all that is started here
        self.addCleanup(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, signal.default_int_handler))

    def test_it_ends_a_daemon_with_its_cycle_whatever_they_do(self):
        for pause in (0, 0.05, 0.2, 0.5, 2):
            self.log = tempfile.TemporaryFile()
            self.addCleanup(self.log.close)
            process = subprocess.Popen(self.device.command("run"), env=self.device.env, stderr=self.log, stdin=subprocess.DEVNULL, start_new_session=True)
            self.addCleanup(support.end, process)
            support.wait_for(lambda: "the daemon has started" in self.errors(), what="the daemon")
            time.sleep(pause)
            os.killpg(process.pid, signal.SIGINT)
            self.assertEqual(process.wait(support.LIMIT), 0, (pause, self.errors()))
            self.assertNotIn("Traceback", self.errors(), pause)
            self.assertTrue(self.errors().endswith("info    the daemon has ended\n"), (pause, self.errors()))
            self.assertRaises(ProcessLookupError, os.killpg, process.pid, 0)
        self.device.cycle(0)

    def test_a_helper_that_it_meets_before_that_has_its_session_is_no_failed_attempt(self):
        """Seen once: the next run waited for a deployment that had not failed."""
        support.require("strace")
        world = death.World(self, "update")
        inject = ["-f", "-e", "trace=setsid", "-e", "inject=setsid:signal=INT"]
        code, errors = world.run(*inject)
        self.assertEqual(code, 3, errors)
        self.assertIn("podman was ended by ctrl-C", errors)
        self.assertEqual(world.device.state()["deployments"][HELLO]["state"], "installed")
        self.assertEqual(world.device.run("run", "--once").returncode, 0)

    def test_it_ends_the_agent_while_that_is_read(self):
        """By the signal itself, as a shell expects, and without a word."""
        code = ("import os, runpy, signal, sys\n"
                "def look(frame, event, _):\n"
                "    if frame.f_code.co_filename == sys.argv[1] and frame.f_code.co_name == '<module>' and frame.f_lineno > int(sys.argv[2]):\n"
                "        sys.settrace(None)\n        os.kill(os.getpid(), signal.SIGINT)\n"
                "    return look\n"
                "sys.settrace(look)\n"
                "runpy.run_path(sys.argv[1], run_name='__main__')\n")
        for line in (60, 1000, 9000, 13000):
            done = subprocess.run([sys.executable, "-c", code, support.AGENT, str(line)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=support.LIMIT)
            self.assertEqual((done.returncode, done.stdout, done.stderr), (-signal.SIGINT, b"", b""), line)

    def test_it_ends_every_command_at_any_call(self):
        """130 as from any program; `run --once` ends after its step. No word of a bug, and the next run does the rest."""
        support.require("strace")
        world = death.World(self, "update")
        world.find_points()
        ran = world.command
        commands = ("enroll", "status", "status hello", "logs hello", "plan", "doctor", "history", "capabilities", "retry", "csr", "config", "config --example",
                    "version", "unenroll", "unenroll --purge", "run --once")
        for command in commands:
            world.command = tuple(command.split())
            world.restore()
            world.run("-s", "0", "-e", f"trace={death.CHANGES}")
            points = death.read_trace(world.trace, world.device.state_dir)
            for point in points if SLOW else points[::len(points) // 2 or 1]:
                world.restore()
                code, errors = world.strike(point, "signal=INT")
                with self.subTest(command=command, point=point[:3]):
                    # `logs` has become the engine's own command by then
                    self.assertIn(code, {"run --once": (0, 3), "logs hello": (0, 130, -signal.SIGINT)}.get(command, (0, 130)), errors)
                    self.assertNotRegex(errors, "Traceback|bug:")
            if not command.startswith("unenroll"):
                world.command = ran
                world.check(f"SIGINT in {command}", told=True)


class Two(DaemonCase):
    def test_cron_beside_a_daemon_and_beside_itself(self):
        """D-33: exactly one acts, the others say 6 and touch nothing; a lock whose holder died is no lock."""
        self.hang("create")
        first = self.start("run", "--once")
        support.wait_for(lambda: len(self.helpers()) > 1, what="podman create")
        self.engine.forget_calls()
        for command in (("run", "--once"), ("enroll",), ("unenroll", "--purge"), ("retry",)):
            self.assertEqual(self.device.run(*command).returncode, 6, command)
        self.assertEqual(self.engine.calls(), [])
        first.kill()
        first.wait()
        self.hang()
        for pid in self.helpers():
            os.kill(pid, signal.SIGKILL)
        self.device.cycle(0)

    def test_readers_see_a_whole_state_while_it_is_written(self):
        """D-33, D-34: `status` and `history` during a hundred writes a second, each answer whole."""
        self.device.cycle()
        over, store = threading.Event(), margo_agent.Store(self.device.state_dir)
        state = store.load_state()

        def write():
            number = 0
            while not over.is_set():
                number += 1
                store.save_state(dict(state, pulled=["x" * (number % 5000)], accepted=dict(state["accepted"], version=number)))

        writer = threading.Thread(target=write)
        writer.start()
        try:
            versions = [self.device.status()["desiredState"]["version"] for _ in range(5)]
            end = time.monotonic() + 1
            while time.monotonic() < end:
                self.assertIn("accepted", margo_agent.Store(self.device.state_dir).load_state())
        finally:
            over.set()
            writer.join()
        self.assertEqual(versions, sorted(versions))
        self.assertEqual(json.loads(self.device.run("history", "--json").stdout)["history"][0]["version"], 1)
        self.assertIn(HELLO, state["deployments"])


if __name__ == "__main__":
    unittest.main()
