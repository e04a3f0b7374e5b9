"""The daemon and its neighbours: asked to end in any phase, hung helpers, a full watchdog, cron beside it, readers during a run."""
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest

import margo_agent
from tests import death, support
from tests.support import HELLO

SLOW = float(os.environ.get("MARGO_TEST_SLOW") or 0) == 1
HASTY = "import sys; sys.path.insert(0, {root!r}); import margo_agent; margo_agent.STOP_GRACE = 1; sys.exit(margo_agent.main(sys.argv[1:]))"


class DaemonCase(support.DeviceCase):
    def setUp(self):
        super().setUp()
        self.wfm.publish(support.make_deployment(registry=self.wfm.registry))

    def start(self, *arguments, hasty=False, **env):
        """The agent as a process of its own."""
        self.log = tempfile.TemporaryFile()
        self.addCleanup(self.log.close)
        argv = self.device.command(*arguments)
        if hasty:
            argv = [sys.executable, "-c", HASTY.format(root=support.ROOT)] + argv[argv.index(support.AGENT) + 1:]
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
            self.assertEqual(process.wait(30), 3, self.errors())
            self.assertNotIn("bug:", self.errors())
            support.wait_for(lambda: not self.helpers(), what="the end of the helpers")
            self.hang()
        self.device.cycle(0)
        self.assertEqual((len(self.engine.containers()), self.wfm.statuses()[-1]), (1, "installed"))

    def test_the_parent_ends_when_its_child_has(self):
        self.hang("create")
        process = self.start("run", hasty=True)
        support.wait_for(lambda: len(self.helpers()) > 1, what="podman create")
        (child,) = [int(pid) for pid in filter(str.isdigit, os.listdir("/proc")) if parent_of(pid) == process.pid]
        process.send_signal(signal.SIGTERM)
        os.kill(child, signal.SIGALRM)              # the grace is over
        self.assertEqual(process.wait(40), 0)
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
        driver = margo_agent.Agent(margo_agent.load_config(self.device.config_file)).places[0].drivers["compose"]
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
