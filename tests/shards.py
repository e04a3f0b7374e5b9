"""Runs the tests in several processes, a class at a time, and reports them as if they had run in this one.

`python3 -m unittest` comes here by tests/__init__.py; single tests or modules that are named on the command line run as ever.
MARGO_TEST_SHARDS says how many processes (default: two for each core, because tests wait as long as they work; 1: none but this);
MARGO_TEST_TIMES names a file that gets what each test has taken, in seconds and in seconds of work.  As root, each process has a network of its own, so that ports and
bridges of real engines cannot meet.
"""
import atexit
import fcntl
import json
import os
import queue
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
import unittest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FIRST = ("tests.test_death", "tests.test_enrollment_death", "tests.test_engines")       # the longest


class Remote(Exception):
    """What went wrong in another process; its text is the traceback there."""

    def __str__(self):
        return "in another process\n\n" + self.args[0].rstrip()


class Part(unittest.suite._ErrorHolder):
    """Stands for a subtest, or for what is set up for a whole class, in another process."""

    def __init__(self, name, title):
        super().__init__(name)
        self.title = title

    def __str__(self):
        return self.title


def count_shards():
    """How many processes to use."""
    wanted = os.environ.get("MARGO_TEST_SHARDS")
    return int(wanted) if wanted else 2 * len(os.sched_getaffinity(0))


def make_prefix():
    """The command that gives the one after it a network of its own; None where root may not have any.

    podman's DNS server keeps one process and its names in this folder, whichever network it is in, so that is each one's own, too.
    """
    if os.geteuid():
        return []                                   # no real engine without root
    folder = "/run/containers/networks"
    script = f'mkdir -p {folder} && mount -t tmpfs tmpfs {folder} && exec "$@"'
    prefix = ["unshare", "--net", "--mount", "sh", "-c", script, "sh"]
    works = shutil.which("unshare") and subprocess.call(prefix + ["true"], stderr=subprocess.DEVNULL) == 0
    return prefix if works else None


def flatten(suite):
    """The tests of a suite of suites."""
    for item in suite:
        if isinstance(item, unittest.TestSuite):
            yield from flatten(item)
        else:
            yield item


def is_shared(case):
    """Whether tests of a class need each other's company: something is set up for all of them."""
    own = case.setUpClass.__func__ is not unittest.TestCase.setUpClass.__func__
    return own or hasattr(sys.modules[case.__module__], "setUpModule")


def group(tests):
    """[[test]]: those of a class together where they share something, each alone otherwise; the long ones first."""
    groups = {}
    for test in tests:
        groups.setdefault(type(test) if is_shared(type(test)) else test, []).append(test)
    return sorted(groups.values(), key=lambda found: (type(found[0]).__module__ not in FIRST, -len(found)))


class Shards(unittest.TestSuite):
    """Tests that run in other processes where that helps."""

    def run(self, result, debug=False):
        tests, own = [], []
        for test in flatten(self):
            (tests if type(test).__module__.startswith("tests.") else own).append(test)
        start, count, passed = time.monotonic(), min(count_shards(), len(tests)), []
        for kind in ("addSuccess", "addExpectedFailure"):
            setattr(result, kind, make_counter(getattr(result, kind), passed))
        prefix = make_prefix() if count > 1 else None
        if prefix is None or debug:
            super().run(result, debug)
        else:
            unittest.TestSuite(own).run(result)     # modules that cannot be imported
            Run(result, tests, prefix).work(count)
        atexit.register(tell, result, len(passed), time.monotonic() - start)
        return result


def make_counter(act, told):
    """What does the same as `act`, and notes the test in a list; unittest's own count differs from version to version."""
    def count(test, *rest):
        told.append(test)
        return act(test, *rest)
    return count


def tell(result, passed, seconds):
    """The last line of a run, for people and for programs; a test fails once, with however many of its subtests."""
    faults = [test for test, _ in result.failures + result.errors] + result.unexpectedSuccesses
    failed = {test.id().split(" (")[0] if test.id().startswith("tests.") else test.id() for test in faults}
    sys.stderr.write(f"in {seconds / 60:.1f} minutes:\n{passed} passed, {len(failed)} failed, {len(result.skipped)} skipped\n")


class Run:
    """One run: classes wait in a queue for a process that is free, and what is heard of them is told to the result."""

    def __init__(self, result, tests, prefix):
        self.result, self.prefix, self.processes = result, prefix, []
        self.tests = {test.id(): test for test in tests}
        self.groups, self.heard = queue.Queue(), queue.Queue()
        for found in group(tests):
            self.groups.put([test.id() for test in found])

    def work(self, count):
        """Everything, in so many processes."""
        threads = [threading.Thread(target=self.attend, daemon=True) for _ in range(count)]
        for thread in threads:
            thread.start()
        try:
            while count and not self.result.shouldStop:
                event = self.heard.get()
                if event is None:
                    count -= 1
                else:
                    self.tell(**event)
        finally:
            self.stop(count == 0)

    def stop(self, is_done):
        """Ends all processes: those that have nothing to do by themselves, others as Ctrl-C does, and at last anyhow."""
        while not self.groups.empty():
            self.groups.get()
        for process in self.processes:
            process.stdin.close()
            if not is_done:
                process.send_signal(signal.SIGINT)
        for process in self.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()

    def attend(self):
        """Gives classes to a process, and to a new one where that has died, until there are no more."""
        try:
            process = None
            while True:
                try:
                    names = self.groups.get_nowait()
                except queue.Empty:
                    break
                process = process or self.start()
                if not self.give(process, names):
                    process = None
        finally:
            self.heard.put(None)

    def start(self):
        """A process that waits for tests."""
        python = [sys.executable] + [f"-W{option}" for option in sys.warnoptions]
        process = subprocess.Popen(self.prefix + python + ["-m", "tests.shards"], cwd=ROOT, stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, env=dict(os.environ, MARGO_TEST_SHARDS="1"))
        self.processes.append(process)
        return process

    def give(self, process, names):
        """Lets a process run these tests, passes on what it says of them; False where it dies of them."""
        process.stdin.write(json.dumps(names).encode() + b"\n")
        process.stdin.flush()
        left = dict.fromkeys(names)
        for line in process.stdout:
            event = json.loads(line.decode())
            if not event:
                return True
            left.pop(event["name"], None)
            self.heard.put(event)
        for name in left:
            self.heard.put({"kind": "addError", "name": name, "title": name, "seconds": 0, "work": 0,
                            "text": f"the process of this test ended with {process.wait()}"})
        return False

    def tell(self, kind, name, title, text, seconds, work):
        """One outcome, in the words of unittest."""
        test = self.tests.get(name) or Part(name, title)
        if name in self.tests:
            self.result.startTest(test)
        fault = (Remote, Remote(text), None)
        if kind in ("addFailure", "addError", "addExpectedFailure"):
            getattr(self.result, kind)(test, fault)
        elif kind == "addSkip":
            self.result.addSkip(test, text)
        elif kind:
            getattr(self.result, kind)(test)
        if name in self.tests:
            self.result.stopTest(test)
            if hasattr(self.result, "addDuration"):
                self.result.addDuration(test, seconds)
        if os.environ.get("MARGO_TEST_TIMES"):
            with open(os.environ["MARGO_TEST_TIMES"], "a") as file:
                file.write(f"{seconds:8.2f} {work:8.2f} {name}\n")


# In the other process

class Teller(unittest.TestResult):
    """Says what came of each test as a line of JSON."""

    def __init__(self, stream):
        super().__init__()
        self.stream, self.known = stream, True
        self.begin()

    def begin(self):
        """Starts the count of seconds; before the first test this is what is set up for the class."""
        self.since, self.work = time.monotonic(), sum(os.times()[:4])

    def startTest(self, test):
        super().startTest(test)
        self.begin()
        self.known = False

    def send(self, kind, test, text=""):
        """One outcome; what is no test, such as setUpClass, has a description instead of a name."""
        self.known = True
        event = {"kind": kind, "name": test.id(), "title": str(test), "text": text,
                 "seconds": time.monotonic() - self.since, "work": sum(os.times()[:4]) - self.work}
        self.stream.write(json.dumps(event).encode() + b"\n")
        self.stream.flush()

    def addSuccess(self, test):
        self.send("addSuccess", test)

    def addFailure(self, test, err):
        self.send("addFailure", test, self._exc_info_to_string(err, test))

    def addError(self, test, err):
        self.send("addError", test, self._exc_info_to_string(err, test))

    def addSkip(self, test, reason):
        self.send("addSkip", test, reason)

    def addExpectedFailure(self, test, err):
        self.send("addExpectedFailure", test, self._exc_info_to_string(err, test))

    def addUnexpectedSuccess(self, test):
        self.send("addUnexpectedSuccess", test)

    def addSubTest(self, test, subtest, err):
        if err is not None:
            kind = "addFailure" if issubclass(err[0], test.failureException) else "addError"
            self.send(kind, subtest, self._exc_info_to_string(err, test))
            self.known = False                      # the test itself goes on

    def stopTest(self, test):
        if not self.known:                          # its subtests have failed, itself has nothing to say
            self.send("", test)
        super().stopTest(test)


def raise_loopback():
    """Brings the loopback of a new network up: SIOCGIFFLAGS, SIOCSIFFLAGS."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(sock, 0x8913, request))[1]
        if not flags & 1:
            fcntl.ioctl(sock, 0x8914, struct.pack("16sh14x", b"lo", flags | 1))


def main():
    """Runs the tests whose names come in, a list a line, and says what came of them; what they print goes to stderr."""
    raise_loopback()
    stream = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    for line in sys.stdin:
        teller = Teller(stream)
        teller.buffer = True                        # what a test prints is shown where it fails
        try:
            unittest.defaultTestLoader.loadTestsFromNames(json.loads(line)).run(teller)
        except Exception:
            traceback.print_exc()
            return 1
        stream.write(b"{}\n")
        stream.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
