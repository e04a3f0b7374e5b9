"""Killed anywhere in an enrollment or renewal: never two keys for one token, never a device without the identity it had.

Every point is tried where MARGO_TEST_SLOW=1, otherwise a sample (see test_death.py); their number is read from an undisturbed run's trace.
"""
import os
import shutil
import signal
import subprocess

import margo_agent
from tests import death, support
from tests.test_death import choose, tell
from tests.test_enrollment import Site, read


class Death(Site):
    """E-042, E-043, E-044"""

    options = ("--lifetime", "200000")
    renewals = ("renewal",)

    def prepare(self, scenario):
        """Brings the device to where the scenario begins, and keeps it so."""
        self.kept = os.path.join(support.make_folder(self), "kept")
        if scenario != "enrollment":
            self.age(lifetime=100000 if scenario in self.renewals else 200000, share=0.7)
        if scenario == "lost key":
            os.remove(self.device.key)
        shutil.copytree(self.device.folder, self.kept, ignore=shutil.ignore_patterns("run"))
        self.scenario, self.old = scenario, read(self.device.certificate)

    def restore(self, number):
        """The device as it was kept, with a token of this trial's own where it takes one."""
        for name in ("state", "identity", "run"):
            shutil.rmtree(os.path.join(self.device.folder, name), ignore_errors=True)
            if os.path.isdir(os.path.join(self.kept, name)):
                shutil.copytree(os.path.join(self.kept, name), os.path.join(self.device.folder, name), symlinks=True)
        self.token, self.before = f"{self.scenario}:{number}", len(self.mis.issued())
        if self.scenario not in self.renewals:
            self.mis.add_token(self.token)
            support.write(self.device.token, self.token, 0o600)

    def trace(self, *options):
        """One `run --once` under strace, attached to the agent alone: its exit code, -9 where it was killed."""
        path = os.path.join(self.device.folder, "trace")
        argv = ["strace", "-qq", "-y", "-o", path] + list(options) + self.device.command("run", "--once")
        done = subprocess.run(argv, env=self.device.env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, timeout=120)
        return path, -signal.SIGKILL if done.returncode == 128 + signal.SIGKILL else done.returncode, done.stderr.decode()

    def find_points(self):
        """The calls of an undisturbed run that change something."""
        for number in ("compile", "count"):
            self.restore(number)
            path, code, errors = self.trace("-s", "0", "-e", f"trace={death.CHANGES}")
            self.assertEqual(code, 0, errors)
        self.assertNotEqual(read(self.device.certificate), self.old)
        return death.read_trace(path, self.device.folder)

    def check_pair(self, words):
        """The device's identity is whole: the key is that of the leaf, and the chain leads to the anchor."""
        anchors = [self.pki.der("ca.pem")]
        try:
            margo_agent.run_own_handshake(self.device.certificate, self.device.key, anchors)
        except (ValueError, margo_agent.MargoError) as error:
            raise AssertionError(f"{words}: {error}") from None

    def check(self, words):
        """One ordinary run puts all to rights, once the back-off is over."""
        if self.scenario in self.renewals:
            self.check_pair(f"{words}, before the next run")
        path = os.path.join(self.device.state_dir, "state.json")
        if os.path.exists(path):
            state = margo_agent.parse_state(read(path), path)
            support.write(path, margo_agent.make_state_data(dict(state, patience={}, est=dict(state["est"], delay=0))), 0o600)
        self.device.cycle()
        self.check_pair(words)
        self.assertNotEqual(read(self.device.certificate), self.old, words)
        self.assertFalse({"token", "answer"} & set(self.device.state()["est"]), words)
        self.assertEqual(len({item["key"] for item in self.mis.issued()[self.before:]}), 1, f"{words}: two new keys")
        if self.scenario not in self.renewals:
            self.assertIsNone(read(self.device.token), words)
            used = support.read_json(self.mis.path("used.json"))[support.digest(self.token.encode())[7:]]
            self.assertEqual(len(used["keys"]), 1, f"{words}: two keys for one token")

    def kill_everywhere(self, scenario):
        support.require("strace")
        self.prepare(scenario)
        points = self.find_points()
        chosen, missed = choose(points), 0
        for call, number, path, _ in chosen:
            words = f"{scenario}: killed at {call} {number} {path}"
            self.restore(f"{call}-{number}-{path}")
            _, code, errors = self.trace(*death.aim((call, number, path, ""), self.device.folder, "signal=KILL"))
            self.assertIn(code, (0, -signal.SIGKILL), f"{words}\n{errors}")
            missed += code == 0                     # no two runs open exactly as many files
            self.check(words)
        self.assertLessEqual(missed, len(points) // 20)
        tell(f"death: {scenario}: killed at {len(chosen) - missed} of {len(points)} points, survived {len(chosen) - missed}")

    def test_an_enrollment_killed_anywhere(self):
        self.kill_everywhere("enrollment")

    def test_a_renewal_killed_anywhere(self):
        """E-060: the old SVID stays whole until the rename that activates the new one."""
        self.kill_everywhere("renewal")

    def test_an_enrollment_after_the_key_was_lost_killed_anywhere(self):
        """E-066: an old certificate beside a new key is an enrollment under way, no broken pair."""
        self.kill_everywhere("lost key")
