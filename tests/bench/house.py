"""How big the file is, and what an unchanged poll passes through and costs, beside another checkout where one is given.

    python3 -m tests.bench.house [--against FOLDER] [ROUNDS]

Sizes: tokens (see tests/gauge.py), kB, kB compressed by gzip -9; of the whole file, without its optional rooms, and bare.
A poll: medians of ROUNDS (default 11) in turn, beside a bare script that makes the same request; how many functions of the file one poll
passes and how often it goes from one section to another, without the insides of YAML and of the log; memory of the daemon's parent.
"""
import gzip
import json
import os
import re
import statistics
import subprocess
import sys
import time

from tests import gauge, support
from tests.bench.poll import BARE, Cleanups, measure, measure_memory

STRIP = os.path.join(support.EXAMPLES, "firmware", "strip.py")
TRACE = """
import ast, json, re, sys
folder, output = sys.argv.pop(1), sys.argv.pop(1)
sys.path.insert(0, folder)
import margo_agent
path = margo_agent.__file__
source = open(path, encoding="utf-8").read()
sections = [source.count("\\n", 0, match.start()) for match in re.finditer(r"^# \\d+\\. ", source, re.M)]
ranges = [(node.lineno, node.name) for node in ast.parse(source).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
quiet = {name for _, name in ranges if "yaml" in name.lower() or name.lower() in ("log", "logger", "format_log")}
passed, hops, last, depth = set(), 0, None, 0

def find(line):
    return max((item for item in ranges if item[0] <= line), default=(0, ""))[1]

def look(frame, event, _):
    global hops, last, depth
    code = frame.f_code
    if event not in ("call", "return") or code.co_filename != path:
        return
    if find(code.co_firstlineno) in quiet:
        depth += 1 if event == "call" else -1
        return
    if event == "call" and not depth and code.co_name[0] != "<":
        section = sum(line < code.co_firstlineno for line in sections)
        passed.add((code.co_name, code.co_firstlineno))
        hops += last is not None and section != last
        last = section

sys.setprofile(look)
code = margo_agent.main(sys.argv[1:])
sys.setprofile(None)
with open(output, "w") as file:
    json.dump([len(passed), hops], file)
sys.exit(code)
"""


class House:
    """One checkout's file in its forms, and a device of its own on which it runs."""

    def __init__(self, test, root, pki, wfm):
        self.source = os.path.join(root, "margo_agent.py")
        self.folder = support.make_folder(test)
        self.forms = {"whole": self.source}
        for name, options in (("mtls alone", ["--only", "mtls"]), ("bare", ["--bare"]), ("mtls alone, bare", ["--only", "mtls", "--bare"])):
            path = os.path.join(self.folder, re.sub("[^a-z]+", "-", name), "margo_agent.py")
            os.makedirs(os.path.dirname(path))
            subprocess.run([sys.executable, STRIP] + options + ["--source", self.source, path], check=True, stdout=subprocess.DEVNULL)
            self.forms[name] = path
        self.forms["whole"] = support.write(os.path.join(self.folder, "whole", "margo_agent.py"), self.read(self.source))
        subprocess.run([sys.executable, "-m", "compileall", "-q", self.folder], check=True)
        self.engine = support.FakeEngine(test)
        self.device = support.Device(test, pki, wfm, self.engine)
        self.words = ["-c", self.device.config_file, "run", "--once"]
        measure(self.make_module("whole"), self.device.env)
        (name, container), = self.engine.containers().items()
        listing = json.dumps([{"Id": container["id"], "Names": [name], "Labels": container["labels"], "State": "running", "ExitCode": 0}])
        support.write(os.path.join(self.engine.folder, "bin", "podman"), f"#!/bin/sh\necho '{listing}'\n", 0o755)

    @staticmethod
    def read(path):
        with open(path, encoding="utf-8") as file:
            return file.read()

    def make_module(self, form):
        """The command line of one cycle by -m."""
        return ["env", "-C", os.path.dirname(self.forms[form]), sys.executable, "-m", "margo_agent"] + self.words

    def make_commands(self):
        """{name: command line} of what is measured."""
        return {"by -m": self.make_module("whole"), "as a script": [sys.executable, self.forms["whole"]] + self.words,
                "mtls alone, bare, by -m": self.make_module("mtls alone, bare")}

    def print_sizes(self):
        for name, path in self.forms.items():
            source = self.read(path)
            data = source.encode()
            print(f"  {name:20} {gauge.count_tokens(source):6} tokens {len(data) / 1000:6.1f} kB {len(gzip.compress(data, 9)) / 1000:6.1f} kB by gzip -9")

    def trace(self):
        """(functions, changes of section) that one unchanged poll passes."""
        output = os.path.join(self.folder, "passed.json")
        argv = [sys.executable, "-I", "-S", "-c", TRACE, os.path.dirname(self.forms["whole"]), output] + self.words
        subprocess.run(argv, env=self.device.env, check=True, stderr=subprocess.DEVNULL)
        return support.read_json(output)

    def measure_daemon(self):
        """PSS of the daemon's parent between polls, in MiB."""
        argv = [sys.executable, self.forms["whole"], "-c", self.device.config_file, "run"]
        daemon = subprocess.Popen(argv, env=self.device.env, stderr=subprocess.DEVNULL)
        time.sleep(3)
        try:
            return measure_memory(daemon.pid)
        finally:
            daemon.terminate()
            daemon.wait()


def main():
    arguments, roots = sys.argv[1:], {"here": support.ROOT}
    if "--against" in arguments:
        index = arguments.index("--against")
        roots["there"] = os.path.abspath(arguments[index + 1])
        del arguments[index:index + 2]
    rounds, test = int(arguments[0]) if arguments else 11, Cleanups()
    try:
        pki = support.Pki(test)
        wfm = support.Wfm(test, pki)
        wfm.add_package(support.make_compose())
        wfm.publish(support.make_deployment(registry=wfm.registry))
        houses = {name: House(test, root, pki, wfm) for name, root in roots.items()}
        device = houses["here"].device
        identity = [pki.path("client.pem"), pki.path("client.key"), pki.path("ca.pem")]
        commands = {("", "bare script, -I -S"): ([sys.executable, "-I", "-S", "-c", BARE] + identity + [
            wfm.url, device.state()["accepted"]["etag"]], device.env)}
        for where, house in houses.items():
            for name, argv in house.make_commands().items():
                commands[where, name] = (argv, house.device.env)
        figures = {key: [] for key in commands}
        for _ in range(rounds):
            for key, (argv, env) in commands.items():
                figures[key].append(measure(argv, env))
        base = statistics.median(cpu for cpu, _ in figures["", "bare script, -I -S"])
        print(f"{sys.version.split()[0]}, {os.uname().machine}, {rounds} rounds, medians")
        print(f"  bare script, -I -S {base:26.1f} ms")
        for where, house in houses.items():
            print(where)
            house.print_sizes()
            for (owner, name), values in figures.items():
                if owner == where:
                    cpu, memory = (statistics.median(value[index] for value in values) for index in (0, 1))
                    print(f"  poll {name:26} {cpu:12.1f} ms  {cpu / base:4.2f} x bare  peak {memory:5.1f} MiB")
            functions, hops = house.trace()
            print(f"  poll passes {functions} functions and changes section {hops} times")
            print(f"  the daemon's parent between polls has {house.measure_daemon():.2f} MiB PSS")
    finally:
        test.close()


if __name__ == "__main__":
    main()
