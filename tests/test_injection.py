"""Nothing from outside steers a terminal, whatever it stands in (issue: No injection; security 2.1)."""
import contextlib
import io
import json
import os
import pty
import subprocess
import sys
import unittest
from unittest import mock

import margo_agent
from tests import support

ODD = "\x1b[2J\x9b2J\u202e\u2028\x07\x7f\n--option\r"
# What shows texts that came from outside, or were made of them.
SHOWN = (["status"], ["status", "--json"], ["status", "hello"], ["history"], ["history", "--json"], ["doctor"], ["doctor", "--json"])


def list_texts(value, path=()):
    """The paths of all texts below a value of JSON."""
    if isinstance(value, str):
        return [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, item in items for found in list_texts(item, path + (key,))]


def spoil(value, path):
    """A copy of a value with the text at a path made odd."""
    value = json.loads(json.dumps(value))
    home = value
    for key in path[:-1]:
        home = home[key]
    home[path[-1]] += ODD
    return value


class Terminal(support.DeviceCase):
    def show(self, *arguments):
        """(exit code, what a command prints) in this process."""
        output = io.TextIOWrapper(io.BytesIO(), "utf-8")
        with mock.patch.dict(os.environ, self.device.env), contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            code = margo_agent.main(["-c", self.device.config_file, *arguments])
        output.flush()
        return code, output.buffer.getvalue().decode("utf-8", "surrogateescape")

    def assert_calm(self, *arguments):
        """Fails unless a command ends without a bug, and prints nothing but printable lines."""
        code, text = self.show(*arguments)
        self.assertNotEqual(code, 70, text)
        odd = {character for character in text if not character.isprintable()} - {"\n"}
        self.assertEqual(odd, set(), text)
        return text

    def test_no_text_of_the_state_reaches_a_terminal_raw(self):
        self.wfm.publish(support.make_deployment(components=(("web", "9.9.9"),), registry=self.wfm.registry))
        self.device.cycle(1)
        whole = self.device.state()
        self.assertIn("failed", self.device.run("status").stdout)
        store = margo_agent.Store(self.device.state_dir)
        seen = 0
        for path in list_texts(whole):
            if path[0] in ("trust", "crls", "est"):         # checked as they are read
                continue
            store.saved = None
            data = margo_agent.make_json(spoil(whole, path))
            support.write(store.path("state.json"), data.decode("utf-8"))
            for arguments in SHOWN[:5]:
                with self.subTest(path=path, command=arguments):
                    seen += "\\x1b[2J" in self.assert_calm(*arguments)
        self.assertGreater(seen, 10)
        support.write(store.path("state.json"), json.dumps(whole))
        for arguments in SHOWN:
            self.assert_calm(*arguments)

    def test_no_text_of_the_memo_reaches_a_terminal_raw(self):
        self.device.cycle()
        with mock.patch.dict(os.environ, self.device.env):
            path = margo_agent.Store(self.device.state_dir).memo_path()
        support.write(path, json.dumps({"lastPoll": {"at": ODD, "result": ODD, "detail": ODD}}))
        for arguments in SHOWN:
            with self.subTest(arguments):
                self.assert_calm(*arguments)

    def test_what_containers_write_is_shown_without_what_steers(self):
        """`logs` at a terminal; into a file or a pipe it is the engine's own output."""
        script = os.path.join(support.make_folder(self), "podman")
        support.write(script, "#!/bin/sh\nprintf 'a\\033[2J\\302\\2332J\\tb\\n\\377c'\nexit 3\n", 0o755)
        main, terminal = pty.openpty()
        code = ("import os, sys; sys.path.insert(0, sys.argv[1]); import margo_agent as m\n"
                "reader, writer = os.pipe()\n"
                "if not os.fork():\n    os.dup2(writer, 1)\n    os.execv(sys.argv[2], ['podman'])\n"
                "os.close(writer)\nsys.exit(m.show_lines(reader))")
        done = subprocess.run([sys.executable, "-c", code, support.ROOT, script], stdout=terminal, timeout=support.LIMIT)
        os.close(terminal)
        text = os.read(main, 4096).decode()
        os.close(main)
        self.assertEqual((done.returncode, text), (3, "a\\x1b[2J\\x9b2J\tb\r\n\ufffdc\r\n"))


if __name__ == "__main__":
    unittest.main()
