"""Commands: lists only, bounded in time and output, ended with the whole process group."""
import json
import os
import re
import signal
import sys
import tempfile
import time
import unittest
from unittest import mock

import margo_agent
from tests import support


def python(code, *args):
    return [sys.executable, "-I", "-S", "-c", code] + list(args)


class RunCommand(unittest.TestCase):
    def test_output_and_exit_code_are_answers(self):
        output = margo_agent.run_command(python("import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"), 30)
        self.assertEqual(output, (3, b"out\n", "err", b"err\n"))

    def test_the_end_of_what_is_too_much_can_be_had(self):
        code = "import sys\nfor n in range(50000): print('out', n); print('err', n, file=sys.stderr)"
        output = margo_agent.run_command([sys.executable, "-c", code], 30, limit=1000, ends=True)
        self.assertEqual((len(output.stdout), len(output.errors)), (500, 500))
        self.assertTrue(output.stdout.endswith(b"out 49999\n") and output.errors.endswith(b"err 49999\n"))

    def test_arguments_are_never_seen_by_a_shell(self):
        output = margo_agent.run_command(python("import sys; print(sys.argv[1])", "$(id); `id` > x | y"), 30)
        self.assertEqual(output.stdout, b"$(id); `id` > x | y\n")

    def test_it_reads_nothing(self):
        self.assertEqual(margo_agent.run_command(python("import sys; print(len(sys.stdin.read()))"), 30).stdout, b"0\n")

    def test_it_reads_what_it_is_given_however_much_and_no_more(self):
        data = os.urandom(1 << 20)
        self.assertEqual(margo_agent.run_command(python("import sys; sys.stdout.buffer.write(sys.stdin.buffer.read())"), 30, data=data).stdout, data)

    def test_a_program_that_does_not_care_to_read_is_no_fault(self):
        for code in ("", "import os; os.close(0); print('done')", "import os; os.close(1); os.close(2); os.read(0, 9)"):
            output = margo_agent.run_command(python(code), 30, data=bytes(1 << 20))
            self.assertEqual(output.code, 0, output.stderr)

    def test_one_that_closes_its_output_is_still_given_its_time_and_no_more(self):
        with self.assertRaises(margo_agent.CommandTimeout):
            margo_agent.run_command(python("import os, time; os.close(1); os.close(2); time.sleep(60)"), 1, data=bytes(1 << 20))

    def test_a_missing_program_is_named_with_the_setting_that_needs_it(self):
        """Contract, Shape."""
        with self.assertRaises(margo_agent.CommandError) as caught:
            margo_agent.run_command(["no-such-program-here"], 30)
        self.assertIn("no-such-program-here", caught.exception.message)
        for path, setting in (("/nonexistent/helm", "see runtime.helm"), ("no-such-program-here", "correct the setting that names it")):
            with self.assertRaisesRegex((margo_agent.CommandError, margo_agent.ConfigError), setting):
                margo_agent.run_command([path], 30)

    def test_what_stands_in_the_way_of_a_start_is_told_with_its_mend(self):
        path = support.write(os.path.join(support.make_folder(self), "tool"), "#!/bin/sh\n", 0o755)
        with self.assertRaisesRegex(margo_agent.CommandError, "Argument list too long.*hand it less"):
            margo_agent.run_command([path, "x" * (1 << 20)], 30)
        os.chmod(path, 0o644)
        with self.assertRaisesRegex(margo_agent.CommandError, "Permission denied.*is it executable"):
            margo_agent.run_command([path], 30)

    def test_a_script_that_cannot_be_run_is_not_said_to_be_missing(self):
        """A hook that was written on Windows, or for a shell that the device lacks."""
        path = os.path.join(support.make_folder(self), "hook")
        for line in ("#!/bin/sh\r\n", "#!/nonexistent/bash\n"):
            support.write(path, line, 0o755)
            with self.assertRaisesRegex(margo_agent.CommandError, f"{path} cannot be started: what its first line"):
                margo_agent.run_command([path], 30)

    def test_one_that_ctrl_c_ends_has_not_failed(self):
        """Python 3.10 and newer start a program by vfork; until it has its session, ctrl-C ends it, too."""
        with self.assertRaisesRegex(margo_agent.Interrupted, "was ended by ctrl-C"):
            margo_agent.run_command(["sh", "-c", "kill -INT $$"], 30)
        self.assertEqual(margo_agent.run_command(["sh", "-c", "kill -TERM $$"], 30).code, -signal.SIGTERM)

    def test_a_hung_program_is_ended_with_all_its_children(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "pid")
            code = ("import os, sys, time\npid = os.fork()\n"
                    "if pid: open(sys.argv[1], 'w').write(str(pid))\ntime.sleep(600)")
            for limit in (1.5, 6, 60):              # on a busy machine it may not have come so far
                with self.assertRaises(margo_agent.CommandTimeout):
                    margo_agent.run_command(python(code, path), limit)
                if os.path.exists(path):
                    break
            with open(path) as file:
                child = int(file.read())
            support.wait_for(lambda: not is_alive(child), what="the end of a grandchild")

    def test_what_a_helper_leaves_behind_does_not_hold_us_up(self):
        code = "import os, time\nchild = os.fork()\nif not child:\n os.setsid()\n time.sleep(600)\nprint(child, flush=True)"
        child = int(margo_agent.run_command(python(code), support.LIMIT).stdout)
        self.addCleanup(os.kill, child, signal.SIGKILL)
        self.assertTrue(is_alive(child), "it was waited for, or ended")

    def test_output_is_bounded(self):
        with self.assertRaises(margo_agent.CommandError) as caught:
            margo_agent.run_command(python("while True: print('x' * 65536)"), 30, limit=1 << 20)
        self.assertIn("1048576", caught.exception.message)

    def test_large_output_on_both_pipes_arrives_whole(self):
        code = "import sys\nfor i in range(40): sys.stdout.write('o' * 65536); sys.stderr.write('e' * 65536)"
        output = margo_agent.run_command(python(code), 60)
        self.assertEqual(len(output.stdout), 40 * 65536)
        self.assertEqual(output.stderr, "e" * 8192)

    def test_stderr_cannot_forge_log_lines(self):
        output = margo_agent.run_command(python("import sys; sys.stderr.write('a\\nb\\x1b[2J')"), 30)
        self.assertEqual(output.stderr, "a\\nb\\x1b[2J")

    def test_the_environment_is_the_one_given(self):
        output = margo_agent.run_command(python("import os; print(sorted(k for k in os.environ if k != 'LC_CTYPE'))"), 30, env={"A": "b"})
        self.assertEqual(output.stdout, b"['A', 'PATH']\n")

    def test_the_system_s_folders_are_at_the_end_of_every_path(self):
        """F-20, E2: cron's PATH has none of them, busybox crond's is short, and none at all is the system's own."""
        for given, whole in (("/usr/bin:/bin", "/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"), ("/sbin:/bin:/usr/local/sbin",
                             "/sbin:/bin:/usr/local/sbin:/usr/sbin"), ("", f"{os.defpath}:/usr/local/sbin:/usr/sbin:/sbin")):
            for environ in ({"PATH": given}, {"PATH": given, "X": "y"}):
                output = margo_agent.run_command(python("import os; print(os.environ['PATH'])"), 30, env=environ)
                self.assertEqual(output.stdout.decode().strip(), whole)
        self.assertEqual(margo_agent.list_folders({}), margo_agent.list_folders({"PATH": ""}))

    def test_a_program_is_found_in_the_system_s_folders(self):
        """E2: an engine that was installed to /usr/local/sbin is as good as one on PATH."""
        name = next(name for name in sorted(os.listdir("/usr/sbin")) if os.access(f"/usr/sbin/{name}", os.X_OK)
                    and os.path.isfile(f"/usr/sbin/{name}") and not any(os.path.exists(f"{folder}/{name}") for folder in ("/bin", "/usr/local/sbin")))
        self.assertEqual(margo_agent.find_program(name, {"PATH": "/bin"}), f"/usr/sbin/{name}")

    def test_what_systemd_says_to_the_agent_is_told_to_no_other(self):
        """E12: podman hands NOTIFY_SOCKET on into the container, and speaks there in the agent's name."""
        own = {name: "1" for name in margo_agent.SYSTEMD_NAMES}
        code = "import os; print([name for name in os.environ if name.startswith(('NOTIFY', 'WATCHDOG', 'LISTEN'))])"
        self.assertEqual(margo_agent.run_command(python(code), 30, env=dict(os.environ, **own)).stdout, b"[]\n")
        with mock.patch.dict(os.environ, own):
            self.assertEqual(margo_agent.run_command(python(code), 30).stdout, b"[]\n")

    def test_a_folder_for_temporary_files_that_is_not_there_is_none(self):
        code = "import os; print(os.environ.get('TMPDIR'))"
        for folder, told in (("/no/such/folder", b"None"), ("/tmp", b"/tmp")):
            self.assertEqual(margo_agent.run_command(python(code), 30, env={"TMPDIR": folder}).stdout.strip(), told)

    def test_podman_without_root_keeps_its_own_state_where_it_did(self):
        """Without a folder of its session its containers' state lies below TMPDIR, which the agent empties."""
        with mock.patch.object(os, "geteuid", lambda: 54321):
            self.assertEqual(margo_agent.get_temporary("/s", {}), {})
            self.assertEqual(margo_agent.get_temporary("/s", {"XDG_RUNTIME_DIR": "/tmp"}), {"TMPDIR": "/s/tmp"})
        with mock.patch.object(os, "geteuid", lambda: 0):
            self.assertEqual(margo_agent.get_temporary("/s", {}), {"TMPDIR": "/s/tmp"})

    def test_what_podman_s_network_lacks_is_told_without_starting_anything(self):
        """E5, E16, F-20: netavark of Debian 12 wants iptables, that of Debian 13 wants nft; catatonit is a note."""
        with tempfile.TemporaryDirectory() as folder:
            def put(name, words="{}"):
                path = os.path.join(folder, name)
                with open(path, "w") as file:
                    file.write(f"#!/bin/sh\necho '{words}'\n")
                os.chmod(path, 0o755)

            def list_lacks():
                lacks, notes = margo_agent.ComposeDriver("podman", None, {"PATH": folder}).list_lacks()
                return [[words.replace("install ", "").split()[0].rstrip(":") for words in told] for told in (lacks, notes)]

            with mock.patch.multiple(margo_agent, HELPER_FOLDERS=(), SYSTEM_FOLDERS=()):
                put("podman", '{"host": {"networkBackend": "netavark"}}')
                self.assertEqual(list_lacks(), [["netavark", "aardvark-dns"], ["catatonit"]])
                put("netavark", '{"version": "1.4.0"}')
                self.assertEqual(list_lacks(), [["aardvark-dns", "iptables"], ["catatonit"]])
                put("netavark", '{"version": "1.14.0", "default_fw_driver": "nftables"}')
                for name in ("aardvark-dns", "iptables", "catatonit"):
                    put(name)
                self.assertEqual(list_lacks(), [["nft"], []])
                put("nft")
                self.assertEqual(list_lacks(), [[], []])
                for words in ("garbage", "[]"):
                    put("podman", words)
                    self.assertEqual(list_lacks(), [[], []])
                put("podman", '{"host": {"networkBackend": "cni"}, "version": {"Version": "3.4.4"}}')
                self.assertEqual(list_lacks(), [["podman"], ["podman", "podman"]])

    def test_what_an_engine_lacks_by_its_version_is_told(self):
        """K24: what a version cannot do is known before an application wants it."""
        with tempfile.TemporaryDirectory() as folder:
            for engine, version, notes in (("podman", "4.3.1", ["4.7", "4.8"]), ("podman", "4.7.2", ["4.8"]), ("podman", "5.4.0", []), ("podman", "10.0.0-dev", []),
                                           ("docker", "19.03.15", ["20.10"]), ("docker", "20.10.24+dfsg1", []), ("docker", "", [])):
                path = os.path.join(folder, engine)
                told = {"version": {"Version": version}} if engine == "podman" else {"ServerVersion": version}
                with open(path, "w") as file:
                    file.write(f"#!/bin/sh\necho '{json.dumps(told)}'\n")
                os.chmod(path, 0o755)
                lacks, found = margo_agent.ComposeDriver(engine, None, {"PATH": folder}).list_lacks()
                self.assertEqual((lacks, [re.findall("before ([0-9.]+):", words)[0] for words in found]), ([], notes), version)

    def test_one_that_cannot_be_killed_is_left_behind(self):
        """F-04: a program that hangs in the kernel at a dead disk; here frozen, which SIGKILL does not end either where cgroups are of version 1."""
        group = f"/sys/fs/cgroup/freezer/margo-test-{os.getpid()}"
        try:
            os.mkdir(group)
        except OSError:
            self.skipTest("nothing can be frozen here so that it cannot be killed")

        def thaw():
            with open(group + "/freezer.state", "w") as file:
                file.write("THAWED")
            for _ in range(100):
                with open(group + "/tasks") as file:
                    if not file.read():
                        return os.rmdir(group)
                time.sleep(0.05)

        self.addCleanup(thaw)
        code = f"echo $$ > {group}/tasks; echo FROZEN > {group}/freezer.state; sleep 600"
        for limit, seconds, kind in ((1 << 20, 2, margo_agent.CommandTimeout), (0, support.LIMIT, margo_agent.CommandError)):
            with mock.patch.object(margo_agent, "CORPSE_GRACE", 1), mock.patch.object(margo_agent, "log") as log:
                with self.assertRaises(kind):
                    margo_agent.run_command(["sh", "-c", "echo x; " + code], seconds, limit=limit)
                with open(group + "/tasks") as file:
                    self.assertTrue(file.read(), "it was waited for")
                if limit:
                    self.assertIn("is left behind", log.call_args[0][1])

    def test_the_last_words_of_a_program_are_heard_however_the_two_are_scheduled(self):
        """It writes and ends just after a look at its pipes, and leaves something behind that keeps them open."""
        import select
        look = select.select

        def slow(*arguments):
            found = look(*arguments)
            if not any(found):
                time.sleep(0.4)
            return found

        select.select = slow
        self.addCleanup(setattr, select, "select", look)
        done = margo_agent.run_command(["sh", "-c", "sleep 3 & sleep 0.4; echo last"], 20)
        self.assertEqual(done.stdout, b"last\n")


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
