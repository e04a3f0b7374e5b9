"""Section 5, Store: atomic, durable, only when something changed; an unreadable state is refused, never started afresh."""
import io
import json
import os
import stat
import subprocess
import sys
import tempfile
import unittest

import margo_agent


HOLD_LOCK = """
import sys, time
sys.path.insert(0, sys.argv[1])
import margo_agent
margo_agent.Store(sys.argv[2]).lock()
print("held", flush=True)
time.sleep(60)
"""


class StoreCase(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = os.path.join(folder.name, "state")
        self.store = margo_agent.Store(self.folder)
        self.store.create()


class Directory(StoreCase):
    def test_the_state_directory_is_for_the_owner_alone(self):
        """C-018: what lies beside keys and parameters is protected, also in a directory that was too open before."""
        os.chmod(self.folder, 0o755)
        self.store.create()
        self.assertEqual(stat.S_IMODE(os.stat(self.folder).st_mode), 0o700)

    def test_files_have_mode_0600_whatever_the_umask(self):
        old = os.umask(0)
        self.addCleanup(os.umask, old)
        self.store.save_state(margo_agent.make_state())
        self.assertEqual(stat.S_IMODE(os.stat(self.store.path("state.json")).st_mode), 0o600)

    def test_a_second_instance_is_locked_out_and_a_dead_one_is_not(self):
        here = os.path.dirname(os.path.abspath(margo_agent.__file__))
        other = subprocess.Popen([sys.executable, "-c", HOLD_LOCK, here, self.folder], stdout=subprocess.PIPE)
        self.addCleanup(other.stdout.close)
        self.assertEqual(other.stdout.readline(), b"held\n")
        with self.assertRaises(margo_agent.Locked) as caught:
            self.store.lock()
        self.assertEqual(caught.exception.exit, 6)
        other.kill()
        other.wait()
        self.store.lock()
        self.store.unlock()


class State(StoreCase):
    def test_a_state_comes_back_as_it_was_saved(self):
        """C-111: version and ETag survive a restart, at full precision."""
        state = margo_agent.make_state()
        state["accepted"] = {"version": 2 ** 64 - 1, "etag": '"sha256:x"', "digest": "d", "acceptedAt": "t", "deployments": []}
        self.store.save_state(state)
        self.assertEqual(margo_agent.Store(self.folder).load_state(), state)

    def test_an_unchanged_state_is_not_written(self):
        """P-16: no write where nothing changed."""
        self.store.save_state(margo_agent.make_state())
        before = os.stat(self.store.path("state.json"))
        store = margo_agent.Store(self.folder)
        store.save_state(store.load_state())
        self.assertEqual(before, os.stat(self.store.path("state.json")))

    def test_an_unreadable_state_is_refused_and_kept(self):
        """D-5, D-34: a broken state never turns into "no version accepted yet"."""
        for text in ("", "{", "[]", "{}", '{"schema": "1"}', '{"schema": 1, "schema": 1}', "\x00" * 64, '{"schema": 2}'):
            with open(self.store.path("state.json"), "w") as file:
                file.write(text)
            with self.assertRaises(margo_agent.StorageError, msg=text) as caught:
                self.store.load_state()
            self.assertIn("state.json", caught.exception.message)
            with open(self.store.path("state.json")) as file:
                self.assertEqual(file.read(), text)

    def test_a_newer_schema_says_so(self):
        with open(self.store.path("state.json"), "w") as file:
            json.dump({"schema": 7}, file)
        with self.assertRaises(margo_agent.StorageError) as caught:
            self.store.load_state()
        self.assertIn("schema 7", caught.exception.message)

    def test_a_full_disk_leaves_the_old_state(self):
        """P-4: a write that fails is an error that names the file, and the old bytes stay."""
        self.store.save_state(margo_agent.make_state())
        if not os.path.exists("/dev/full"):
            self.skipTest("no /dev/full on this system")
        os.symlink("/dev/full", self.store.path("full.tmp"))
        with self.assertRaises(margo_agent.StorageError) as caught:     # O_NOFOLLOW: a planted link is not written through either
            margo_agent.write_file(self.store.path("full"), b"x")
        self.assertEqual(caught.exception.exit, 3)
        self.assertFalse(os.path.exists(self.store.path("full")))


class Artifacts(StoreCase):
    def test_what_the_disk_spoilt_counts_as_absent(self):
        """C-105: content is held against its digest each time it is used."""
        digest = margo_agent.sha256_digest(b"content")
        self.assertIsNone(self.store.load_artifact(digest))
        self.store.save_artifact(digest, b"content")
        self.assertEqual(self.store.load_artifact(digest), b"content")
        with open(self.store.path("artifacts", digest.replace(":", "-")), "r+b") as file:
            file.write(b"X")
        self.assertIsNone(self.store.load_artifact(digest))


class Memo(StoreCase):
    def test_the_last_contact_is_kept_outside_the_state_directory(self):
        with tempfile.TemporaryDirectory() as runtime:
            old = os.environ.get("RUNTIME_DIRECTORY")
            os.environ["RUNTIME_DIRECTORY"] = runtime
            self.addCleanup(lambda: os.environ.pop("RUNTIME_DIRECTORY") if old is None else os.environ.update(RUNTIME_DIRECTORY=old))
            self.store.save_memo({"lastPoll": {"at": "now"}})
            self.assertEqual(margo_agent.Store(self.folder).load_memo(), {"lastPoll": {"at": "now"}})
            self.assertTrue(self.store.memo_path().startswith(runtime))
            with open(self.store.memo_path(), "w") as file:
                file.write("garbage")
            self.assertEqual(self.store.load_memo(), {})


class Logging(unittest.TestCase):
    def capture(self, form, *args, **fields):
        log = margo_agent.Log()
        log.form = form
        old, sys.stderr = sys.stderr, io.StringIO()
        try:
            log(*args, **fields)
            return sys.stderr.getvalue()
        finally:
            sys.stderr = old

    def test_one_line_an_event_whatever_the_text(self):
        text = self.capture("text", "error", "two\nlines\x1b[31m", field="x\ny")
        self.assertEqual(text.count("\n"), 1)
        self.assertNotIn("\x1b", text)
        event = json.loads(self.capture("json", "error", "two\nlines", field="x\ny"))
        self.assertEqual((event["level"], event["message"], event["field"]), ("error", "two\nlines", "x\ny"))

    def test_what_is_below_the_level_is_silent(self):
        self.assertEqual(self.capture("text", "debug", "x"), "")
