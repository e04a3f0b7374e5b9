"""No bad moment: the agent dies, or a call fails, at every point where it changes something, and one ordinary run puts all to rights.

Every point is tried where MARGO_TEST_SLOW=1, a tenth of them where it is 0.1, otherwise few, by a seed that MARGO_TEST_SEED sets; what was
tried is printed.  The number of points is not guessed: it is read from the trace of an undisturbed run.
"""
import os
import random
import shutil
import signal
import subprocess
import sys
import unittest

from tests import death, git_server, support

SHARE = float(os.environ.get("MARGO_TEST_SLOW") or 0)
SEED = int(os.environ.get("MARGO_TEST_SEED", "1"))
SAMPLE = 4                          # points of each kind in each scenario, without MARGO_TEST_SLOW
SCENARIOS = ("first", "update", "rollback", "removal", "unenroll")


def choose(points, count=SAMPLE):
    """All points, or a sample of at least so many."""
    count = max(count, int(SHARE * len(points)))
    return points if len(points) <= count else random.Random(SEED).sample(points, count)


def tell(words):
    """What was covered, for the reader of the run's output."""
    sys.__stderr__.write(f"\n{words} (seed {SEED})\n")


class Death(unittest.TestCase):
    """P-9, P-11, P-12, P-13, D-1, D-26, D-27, D-34"""

    def setUp(self):
        support.require("strace", "openssl")

    def make_jobs(self, scenario, find, count):
        """([(world, its share of the trials)], trials chosen, trials there are); find: a world to all its trials."""
        count_worlds = min(2, os.cpu_count() or 1) if SHARE and os.environ.get("MARGO_TEST_SHARDS") != "1" else 1
        worlds = [death.World(self, scenario) for _ in range(count_worlds)]
        trials = [find(world) for world in worlds]                  # ports and digests, and so the names of files, are a world's own
        jobs = [(world, choose(found, count)[index::len(worlds)]) for index, (world, found) in enumerate(zip(worlds, trials))]
        return jobs, sum(len(mine) for _, mine in jobs), len(trials[0])

    def again(self, scenario, number):
        """What follows: an ordinary run; after unenroll also the same command again."""
        return ("unenroll", "--purge") if scenario == "unenroll" and number % 2 else ("run", "--once")

    def test_killed_at_every_call_that_changes_something(self):
        """C-111, E-112: SIGKILL on the way into each call in turn; no duplicate, no orphan, no lost and no invented status."""
        for scenario in SCENARIOS:
            jobs, chosen, there = self.make_jobs(scenario, lambda world: world.find_points(), SAMPLE)
            slipped = []

            def act(world, point, scenario=scenario):
                call, number, path, _ = point
                world.restore()
                code, _ = world.strike(point, "signal=KILL")
                if code != -signal.SIGKILL:         # this time an engine had to be asked less often
                    slipped.append(point)
                world.check(f"killed at {call} {number} {path}", again=self.again(scenario, number) if code < 0 else None)

            death.share(jobs, act)
            self.assertLessEqual(len(slipped), 3, slipped)
            tell(f"death: {scenario}: killed at {chosen - len(slipped)} of {there} points, survived {chosen - len(slipped)}")

    def test_every_call_failing(self):
        """P-4: each call on a file of the state directory fails by EIO, ENOSPC, EROFS, EMFILE in turn; then space is there again."""
        for index, scenario in enumerate(SCENARIOS):
            def find(world, index=index):
                points = [point for point in world.find_points() if point[0] in death.FILES and point[2]]
                return [(point, death.ERRORS[(number + index) % 4]) for number, point in enumerate(points)]

            def act(world, trial, scenario=scenario):
                (call, number, path, _), error = trial
                world.restore()
                code, errors = world.strike(trial[0], f"error={error}")
                what = f"{error} at {call} {number} {path}"
                self.assertIn(code, (0, 1, 3), f"{scenario}, {what}: {errors}")
                self.assertNotIn("bug:", errors, f"{scenario}, {what}")
                world.check(what, failures=True, again=self.again(scenario, number) if code else self.again("run", 0))

            jobs, chosen, there = self.make_jobs(scenario, find, SAMPLE // 2)
            death.share(jobs, act)
            tell(f"death: {scenario}: {chosen} of {there} calls failed by one of {', '.join(death.ERRORS)}, survived {chosen}")

    def test_every_command_of_the_engine_failing(self):
        """D-30: the engine is gone at each of its commands in turn, before or after it has done its work."""
        for scenario in SCENARIOS[:4]:
            def find(world):
                world.find_points()
                return [(number, sign) for number in range(1, len(world.engine.calls()) + 1) for sign in (1, -1)]

            def act(world, trial):
                number, sign = trial
                world.restore()
                world.engine.change(cut=sign * number)
                code, errors = world.run("-e", "trace=none")
                self.assertIn(code, (0, 1, 3), errors)
                world.engine.change(cut=None)
                world.check(f"command {number} cut {'before' if sign > 0 else 'after'} its work", failures=True)

            jobs, chosen, there = self.make_jobs(scenario, find, SAMPLE // 2)
            death.share(jobs, act)
            tell(f"death: {scenario}: {chosen} of {there} cuts of the engine survived")

    def test_a_power_cut_leaves_only_what_was_made_durable(self):
        """P-13, C-111: what was not fsynced is dropped, names and contents; each image that a cut can leave is run from."""
        for scenario in SCENARIOS:
            world = death.World(self, scenario)
            images = self.make_images(world)
            world.find_points()
            chosen = choose(images, SAMPLE // 2)
            for number, (folder, held) in chosen:
                world.restore(folder)
                support.write(os.path.join(world.engine.folder, "held.json"), held)
                if not os.path.exists(os.path.join(folder, "state.json")) and scenario != "first":
                    self.fail(f"{scenario}: state.json is gone after event {number}")
                world.check(f"power cut after event {number}", again=self.again(scenario, number), told=True)
            tell(f"death: {scenario}: {len(chosen)} of {len(images)} power cuts survived")

    def make_images(self, world):
        """[(number of the event, (folder, the engine's file))] that differ, from one undisturbed run."""
        world.restore()
        disk = death.Disk(world.device.state_dir)
        world.engine.change(history=True)
        code, errors = world.run("-xx", "-s", "10000000", "-e", f"trace={death.CHANGES}")
        self.assertEqual(code, world.code, errors)
        images, commands = [], 0
        for number, event in enumerate(death.read_events(world.trace, world.device.state_dir)):
            commands += event[0] == "vfork"
            if event[0] == "vfork" or disk.apply(*event):
                folder = os.path.join(world.kept, f"image-{number}")
                disk.write(folder)
                images.append((number, (folder, world.engine.past(commands))))
        world.engine.change(history=None)
        return images

    def test_what_a_change_costs_the_flash(self):
        """P-16: bytes written and fsyncs below the state directory; an unchanged poll: none."""
        world = death.World(self, "first")
        world.restore()
        for what in ("the first deployment", "an unchanged poll"):
            world.run("-s", "0", "-e", f"trace={death.CHANGES}")
            points = [point for point in death.read_trace(world.trace, world.device.state_dir) if point[2]]
            syncs = sum(call == "fsync" for call, _, _, _ in points)
            written = sum(int(line.rpartition(" = ")[2].split()[0]) for call, _, _, line in points if call == "write")
            tell(f"flash: {what}: {written} bytes, {syncs} fsyncs")
        self.assertEqual((syncs, written, [point for point in points if point[2] != "lock"]), (0, 0, []))


class Denied(unittest.TestCase):
    """Whatever the operating system denies, at whichever call, is a fault that says what to do, and never a bug."""

    ERRORS = ("ENOSPC", "EACCES", "EROFS", "EIO", "EMFILE")

    def try_all(self, device, command, restore):
        """Denies calls of a command one by one: a sample of them, each by the next error."""
        def run(number, error):
            restore()
            argv = [sys.executable, "-S", os.path.join(support.ROOT, "tests", "deny.py"), str(number), error, support.AGENT, "-c", device.config_file]
            done = subprocess.run(argv + command, env=device.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
                                  universal_newlines=True, timeout=120)
            *log, last = done.stderr.splitlines() or [""]
            return done.returncode, "\n".join(log), last

        code, log, last = run(0, "EIO")
        self.assertIn(code, (0, 1), log)
        chosen = choose(range(1, int(last) + 1), 2 * SAMPLE)
        for number in chosen:
            error = self.ERRORS[number % len(self.ERRORS)]
            code, log, last = run(number, error)
            self.assertIn(code, (0, 1, 2, 3, 5), f"{command}, {error} at call {last}: {log}")
            self.assertNotIn("bug:", log, f"{command}, {error} at call {last}")
        tell(f"denied: {' '.join(command)}: {len(chosen)} of {int(last.split()[0])} calls, no bug")

    def test_every_command_outlives_every_denial(self):
        """P-4"""
        world = death.World(self, "update")
        for command in ("run --once", "enroll", "status", "plan", "doctor", "history", "capabilities", "retry", "unenroll --purge"):
            self.try_all(world.device, command.split(), world.restore)

    def test_git_outlives_every_denial(self):
        support.require("git")
        engine, repository = support.FakeEngine(self), git_server.Repository(self)
        pki = support.Pki(self)
        repository.commit({"hello.yaml": support.make_deployment()})
        device = support.Device(self, pki, None, engine, url=repository.url, settings={"wfm.profile": "git", "identity": {}, "poll.jitter": "0%"})
        for command in ("enroll", "plan", "doctor"):
            self.try_all(device, [command], lambda: shutil.rmtree(device.state_dir, ignore_errors=True))


class OnPodman(support.EngineCase):
    """D-30, P-11, P-12: the same on a real engine, at each start of one of its commands; the engine ends what it has begun."""

    @classmethod
    def setUpClass(cls):
        support.require("strace", "openssl")
        super().setUpClass()

    def setUp(self):
        super().setUp()
        for revision in ("1.0.0", "2.0.0"):
            self.wfm.add_package(support.make_compose({"main": {"image": support.IMAGE, "command": ["sleep", revision[0] + "0000"]}}), tag=revision)

    def is_busy(self):
        """Whether a command of this engine still runs."""
        mark = f"CONTAINERS_CONF={self.engine.folder}/containers.conf\0".encode()
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{pid}/environ", "rb") as environ, open(f"/proc/{pid}/cmdline", "rb") as words:
                    if mark in environ.read() and words.read().startswith(b"podman\0"):
                        return True
            except OSError:
                continue
        return False

    def test_killed_in_the_middle_of_installing_and_updating(self):
        tried = 0
        for revision in ("1.0.0", "2.0.0"):
            self.wfm.publish(support.make_deployment(components=[("web", revision)], registry=self.wfm.registry))
            number = 0
            while True:
                number += 1
                argv = ["strace", "-qq", "-o", os.devnull, "-e", "trace=vfork", "-e", f"inject=vfork:signal=KILL:when={number}"]
                code = subprocess.run(argv + self.device.command("run", "--once"), env=self.device.env, stderr=subprocess.DEVNULL, timeout=120).returncode
                support.wait_for(lambda: not self.is_busy(), what="the end of podman's commands")
                if code == 0:
                    break
                tried += 1
        self.assertGreater(tried, 8)
        ((identity, state),) = self.engine.containers().values()
        argv = self.engine.podman("inspect", "--format={{.Config.Cmd}}", identity)
        self.assertEqual((state, argv.strip(), self.wfm.statuses()[-1]), ("running", "[sleep 20000]", "installed"))
        self.device.cycle(0)
        self.assertEqual(self.engine.containers(), {name: (identity, state) for name in self.engine.containers()})
        tell(f"death: killed at {tried} starts of podman's commands, survived {tried}")


if __name__ == "__main__":
    unittest.main()
