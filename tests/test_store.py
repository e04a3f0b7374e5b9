"""Store: atomic, durable, only when something changed; an unreadable state is refused, never started afresh."""
import io
import json
import os
import stat
import subprocess
import sys
import tempfile
import unittest

import margo_agent
from tests import support


HOLD_LOCK = """
import sys, time
sys.path.insert(0, sys.argv[1])
import margo_agent
from tests import support
margo_agent.Store(sys.argv[2]).lock()
print("held", flush=True)
time.sleep(60)
"""


def make_report(deployment_id):
    """A status that waits in the outbox."""
    return margo_agent.make_status(margo_agent.make_record(margo_agent.Target(deployment_id, "d", 1), "device"))



# Two disks whose files have the same inode; of one of them somebody holds the lock.
TWINS = """
import fcntl
held = open(os.path.join(first, "lock"), "w")
twin = make_twin(held.name)
fcntl.flock(held, fcntl.LOCK_EX)
print(os.stat(twin).st_ino == os.stat(held.name).st_ino, bool(margo_agent.ask_holder(held.name)), bool(margo_agent.ask_holder(twin)))
"""


class Holder(unittest.TestCase):
    def test_a_lock_of_another_disk_is_not_taken_for_that_of_the_state(self):
        """Small disks give the same few inodes: nobody is sent to stop a process that holds something else."""
        self.assertEqual(support.run_on_two_disks(self, TWINS), "True True False\n")


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

    def test_the_lock_can_be_taken_again_whatever_the_umask(self):
        old = os.umask(0o777)
        self.addCleanup(os.umask, old)
        self.store.lock()
        self.assertEqual(stat.S_IMODE(os.stat(self.store.path("lock")).st_mode), 0o600)

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
        for text in ("", "{", "[]", "{}", '{"schema": "1"}', '{"schema": 1, "schema": 1}', "\x00" * 64, '{"schema": 3}'):
            with open(self.store.path("state.json"), "w") as file:
                file.write(text)
            with self.assertRaises(margo_agent.StorageError, msg=text) as caught:
                self.store.load_state()
            self.assertIn("state.json", caught.exception.message)
            with open(self.store.path("state.json")) as file:
                self.assertEqual(file.read(), text)

    def test_an_older_schema_is_migrated_and_what_failed_is_tried_again(self):
        """Contract, Files; P-2: what stands in a wrong year holds nothing up."""
        new = margo_agent.make_record(margo_agent.Target(support.HELLO, "sha256:a"), "d")
        older = dict(new, failures=3, retryAt=10 ** 9, repairs=6, repairedAt=900, left=[], fallback=True)
        for key in ("retry", "repair", "found"):
            del older[key]
        text = json.dumps({"schema": 1, "deployments": {"a": older}}).encode()
        state = margo_agent.parse_state(text, "state.json")
        self.assertEqual(state["schema"], 2)
        self.assertEqual(state["deployments"], {support.HELLO: new})

    def test_what_an_older_agent_installed_by_an_update_has_no_version_before_to_go_back_to(self):
        """Its `fallback` stood although `running` is what is installed, and without `services`."""
        digest = "sha256:" + "a" * 64
        facts = {"main": {"hash": "h", "finished": False, "image": "i"}}
        component = {"name": "web", "state": "installed", "error": None, "services": facts, "package": None}
        running = {"digest": digest, "packages": {}, "images": [], "mark": "", "type": "compose"}
        older = {"deploymentId": support.HELLO, "name": "x", "deviceId": "d", "type": "compose", "state": "installed",
                 "adopted": {"digest": digest, "version": 3}, "error": None, "running": running,
                 "previous": None, "refused": False, "failures": 0, "retryAt": 0, "components": [component],
                 "fetched": [], "fallback": True, "repairs": 0, "repairedAt": 0}
        text = json.dumps({"schema": 1, "deployments": {"x": older}}).encode()
        record = margo_agent.parse_state(text, "state.json")["deployments"][support.HELLO]
        now = margo_agent.Clock(1000, "boot", 5)
        record = margo_agent.fail_record(record, "web", margo_agent.ComponentError("C", "words"), now, 0)
        target = margo_agent.Target(support.HELLO, digest, 3, None, None)
        self.assertEqual(margo_agent.find_action(target, record, [], now, 0, "", False)[0], "keep")
        self.assertEqual(margo_agent.find_held_ports(record), set())

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
            support.give_up("no /dev/full on this system")
        os.symlink("/dev/full", self.store.path("full.tmp"))
        with self.assertRaises(margo_agent.StorageError) as caught:     # O_NOFOLLOW: a planted link is not written through either
            margo_agent.write_file(self.store.path("full"), b"x")
        self.assertEqual(caught.exception.exit, 3)
        self.assertFalse(os.path.exists(self.store.path("full")))


class Copy(StoreCase):
    """The previous good copy: what is accepted is never older there, so that no damage opens the door to a rollback (P-13, D-5)."""

    def make(self, version, **members):
        accepted = {"version": version, "etag": None, "digest": "d", "acceptedAt": "t", "deployments": []}
        return dict(margo_agent.make_state(), accepted=accepted, **members)

    def save(self, *states):
        for state in states:
            self.store.save_state(state)

    def damage(self, name, data=None, cut=None):
        path = self.store.path(name)
        with open(path, "rb") as file:
            held = file.read()
        with open(path, "wb") as file:
            file.write(held[:cut] if data is None else data)
        return held

    def load(self):
        return margo_agent.Store(self.folder).load_state()

    def test_it_is_written_only_when_something_was_accepted(self):
        """P-16: a change of a workload costs one file, what must not become older costs two."""
        self.save(self.make(5))
        before = os.stat(self.store.path("state.json.old"))
        self.save(self.make(5, pulled=["x"]))
        self.assertEqual(os.stat(self.store.path("state.json.old")), before)
        self.save(self.make(6))
        self.assertNotEqual(os.stat(self.store.path("state.json.old")), before)

    def test_every_truncation_and_every_flipped_byte_is_noticed_and_mended_by_the_copy(self):
        self.save(self.make(5), self.make(6, pulled=["x"]), self.make(6, pulled=["y"]))
        whole = self.damage("state.json")
        for cut in range(len(whole)):
            self.damage("state.json", whole[:cut])
            self.assertEqual(self.load()["accepted"]["version"], 6, cut)
        for position in range(len(whole)):
            self.damage("state.json", whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1:])
            try:
                self.assertEqual(self.load()["accepted"]["version"], 6, position)
            except margo_agent.StorageError as error:
                self.assertIn("schema", str(error))     # cannot be told from a newer agent's: refused and left alone

    def test_a_missing_state_is_taken_from_its_copy(self):
        self.save(self.make(6))
        os.remove(self.store.path("state.json"))
        self.assertEqual(self.load()["accepted"]["version"], 6)

    def test_a_state_that_the_disk_does_not_give_is_taken_from_its_copy_and_written_anew(self):
        """F-19: bad blocks answer with an error, not with damaged bytes; a link to itself cannot be read either, by anybody."""
        self.save(self.make(6))
        for name in ("state.json", "state.json.old"):
            os.remove(self.store.path(name))
            os.symlink(name, self.store.path(name))
            if name == "state.json":
                store = margo_agent.Store(self.folder)
                state = store.load_state()
                self.assertEqual(state["accepted"]["version"], 6)
                store.save_state(state)
                self.assertFalse(os.path.islink(self.store.path(name)))
                os.remove(self.store.path(name))
                os.symlink(name, self.store.path(name))
        with self.assertRaises(margo_agent.StorageError) as caught:     # somebody else's, perhaps: nobody is told to throw it away
            self.load()
        self.assertIn("state.json cannot be read", caught.exception.message)
        self.assertNotIn("afresh", caught.exception.message)

    def test_both_damaged_is_refused_with_the_mend(self):
        self.save(self.make(6))
        for name in ("state.json", "state.json.old"):
            self.damage(name, cut=-9)
        with self.assertRaises(margo_agent.StorageError) as caught:
            self.load()
        for words in ("damaged", "move it and its copy", "state.json.old"):
            self.assertIn(words, caught.exception.message)

    def test_a_newer_or_foreign_state_is_never_replaced_by_the_copy_or_taken_for_ours(self):
        self.save(self.make(6))
        self.damage("state.json", b'{"schema":7,"accepted":{"version":9}}')
        with self.assertRaises(margo_agent.StorageError) as caught:
            self.load()
        self.assertIn("newer agent", caught.exception.message)
        for text in (b'{"schema":true}', b'{"schema":0}', b'{"schema":1,"deployments":[]}', b'{"schema":1,"outbox":[1]}',
                     b'{"schema":1,"deployments":{"a":1}}', b'{"schema":1,"patience":"x"}', b'{"servers":[]}'):
            self.damage("state.json", text)
            self.assertEqual(self.load()["accepted"]["version"], 6, text)

    def test_one_that_was_written_by_an_older_agent_or_by_hand_is_read(self):
        """Without the digest, with the outbox as it was before."""
        state = dict(self.make(3), outbox={"a": make_report("A")})
        state.pop("dropped")
        with open(self.store.path("state.json"), "w") as file:
            json.dump(state, file)
        self.assertEqual((self.load()["outbox"], self.load()["dropped"]), ({"a": make_report("A")}, {}))

    def test_the_outbox_keeps_its_order(self):
        """P-9: what happened first is told first, also after a restart."""
        self.save(self.make(1, outbox={key: make_report(key.upper()) for key in ("c", "a", "b")}))
        self.assertEqual(list(self.load()["outbox"]), ["c", "a", "b"])

    def test_a_full_disk_gives_up_the_reserve_for_the_state(self):
        """P-4: the state survives what the workloads have filled; on a real full file system."""
        mount = tempfile.mkdtemp()
        self.addCleanup(os.rmdir, mount)
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", mount], stderr=subprocess.DEVNULL).returncode:
            support.give_up("a small file system cannot be mounted here")
        self.addCleanup(subprocess.run, ["umount", mount])
        store = margo_agent.Store(os.path.join(mount, "state"))
        store.create()
        store.save_state(self.make(1))
        with self.assertRaises(OSError), open(os.path.join(mount, "filler"), "wb") as file:
            while True:
                file.write(bytes(4096))
                file.flush()
        with self.assertRaises(margo_agent.StorageError):
            margo_agent.write_file(os.path.join(mount, "other"), bytes(65536))
        self.assertFalse(os.path.exists(os.path.join(mount, "other.tmp")))
        for number in range(2, 20):
            store.save_state(self.make(number, pulled=["x" * 20000]))
        self.assertEqual(store.load_state()["accepted"]["version"], 19)
        os.remove(os.path.join(mount, "filler"))
        store.create()
        self.assertEqual(os.path.getsize(store.path("reserve")), (1 << 20) // margo_agent.SHARE)


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
        path = self.store.path("artifacts", digest.replace(":", "-"))
        os.remove(path)
        os.symlink(path, path)                      # it cannot be read at all
        self.assertIsNone(self.store.load_artifact(digest))
        self.store.save_artifact(digest, b"content")
        self.assertEqual(self.store.load_artifact(digest), b"content")

    def test_what_lies_beside_them_stays(self):
        """P-5: a disk that is mounted there has a `lost+found`, and perhaps more."""
        os.mkdir(self.store.path("artifacts", "lost+found"))
        support.write(self.store.path("artifacts", "notes"), "somebody's")
        for name in ("sha256-" + "0" * 64, f"sha256-{'1' * 64}.tmp"):
            support.write(self.store.path("artifacts", name), "")
        self.store.prune_artifacts([])
        self.assertEqual(sorted(os.listdir(self.store.path("artifacts"))), ["lost+found", "notes"])


class Folders(StoreCase):
    def test_what_a_link_in_the_place_of_a_folder_of_ours_leads_to_is_not_emptied(self):
        """Somebody may want the temporary files on another disk."""
        folder = support.make_folder(self)
        support.write(os.path.join(folder, "notes"), "somebody's")
        os.rmdir(self.store.path("tmp"))
        os.symlink(folder, self.store.path("tmp"))
        self.store.create()
        margo_agent.empty_folder(self.store.path("tmp"))
        self.assertEqual(os.listdir(folder), ["notes"])

    def test_a_folder_that_cannot_be_made_is_named(self):
        """F-19: it was moved to a disk that is not there now."""
        os.rmdir(self.store.path("artifacts"))
        os.symlink("/nonexistent/artifacts", self.store.path("artifacts"))
        with self.assertRaises(margo_agent.StorageError) as caught:
            self.store.create()
        self.assertIn(self.store.path("artifacts"), caught.exception.message)

    def test_a_folder_that_was_removed_by_half_is_not_taken_for_the_whole(self):
        """P-13: whatever happens while it is removed, its name is free first."""
        path = self.store.path("deployments", "x", "web", "0123456789abcdef")
        os.makedirs(os.path.join(path, "sub"))
        seen, rmdir = [], os.rmdir

        def watch(name, *args, **options):
            seen.append(os.path.exists(path))
            rmdir(name, *args, **options)

        os.rmdir = watch
        self.addCleanup(setattr, os, "rmdir", rmdir)
        margo_agent.remove_folder(path)
        self.assertEqual((set(seen), os.listdir(os.path.dirname(path))), ({False}, []))
        margo_agent.remove_folder(path)

    def test_a_note_of_what_a_package_mounts_that_the_disk_has_spoilt_ends_no_run(self):
        folder = self.store.path("deployments", "3f1d6f0e-5c35-4c9f-9b43-2f6f6c1f7a10", "web")
        support.write(os.path.join(folder, "0123456789abcdef", "app.ini"), "x")
        support.write(os.path.join(folder, "0123456789abcdef.content"), b"\xff\xfe\0")
        self.store.prune_artifacts(["sha256:0123456789abcdef" + "0" * 48])
        package = margo_agent.Folder(os.path.join(folder, "0123456789abcdef"))
        source = package.look("app.ini")
        package.keep([source])
        self.store.prune_artifacts(["sha256:0123456789abcdef" + "0" * 48])
        self.assertTrue(os.path.isfile(source.path))

    def test_a_component_may_be_called_like_a_package(self):
        folder = self.store.path("deployments", "3f1d6f0e-5c35-4c9f-9b43-2f6f6c1f7a10", "deadbeefdeadbeef")
        os.makedirs(os.path.join(folder, "0123456789abcdef"))
        self.store.prune_artifacts([])
        self.assertEqual(os.listdir(folder), [])

    def test_what_was_left_of_a_removal_is_pruned(self):
        for name in ("x.tmp/web", "x/web/0123456789abcdef.tmp", "x/web/0123456789abcdef"):
            os.makedirs(self.store.path("deployments", name))
        self.store.prune_artifacts([])
        self.assertEqual(os.listdir(self.store.path("deployments")), ["x"])
        self.assertEqual(os.listdir(self.store.path("deployments", "x", "web")), [])


    def test_a_folder_that_cannot_be_made_says_what_is_in_its_place(self):
        """A file, a link to nowhere, a link to itself, a file above it."""
        top = self.store.path("made")
        with open(top + "-file", "w"):
            pass
        os.symlink(top + "-gone", top + "-link")
        os.symlink(top + "-loop", top + "-loop")
        for path in (top + "-file", top + "-link", top + "-loop", os.path.join(top + "-file", "below")):
            with self.assertRaises(margo_agent.StorageError) as caught:
                margo_agent.create_folder(path)
            self.assertIn(path.split("/below")[0], caught.exception.message)
            self.assertIn("something else lies in its place", caught.exception.message)
        margo_agent.create_folder(os.path.join(top, "a", "b"))
        margo_agent.create_folder(os.path.join(top, "a", "b"))


class Memo(StoreCase):
    def test_the_last_contact_is_kept_outside_the_state_directory(self):
        with tempfile.TemporaryDirectory() as runtime:
            old = os.environ.get("RUNTIME_DIRECTORY")
            os.environ["RUNTIME_DIRECTORY"] = runtime
            self.addCleanup(lambda: os.environ.pop("RUNTIME_DIRECTORY") if old is None else os.environ.update(RUNTIME_DIRECTORY=old))
            poll = {"at": "now", "result": "unchanged", "detail": ""}
            self.store.load_memo().update(lastPoll=poll)
            self.assertTrue(self.store.save_memo())
            self.assertEqual(margo_agent.Store(self.folder).load_memo(), {"lastPoll": poll})
            self.assertTrue(self.store.memo_path().startswith(runtime))
            with open(self.store.memo_path(), "w") as file:
                file.write("garbage")
            self.assertEqual(margo_agent.Store(self.folder).load_memo(), {})


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
