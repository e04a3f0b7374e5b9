"""How big the file is, and what an unchanged poll passes through and costs, beside another checkout where one is given.

    python3 -m tests.bench.house [--against FOLDER] [ROUNDS]

Prints one table, a column for each checkout.  Sizes: tokens (see tests/gauge.py), kB, kB compressed by gzip -9; of the whole file,
without its optional rooms (mtls and Compose), and bare; a file that knows no optional rooms stays whole there.  A poll: medians of ROUNDS
(default 15), all commands in turn, CPU and peak memory beside those of a bare script that makes the same request.  Like is compared with
like: all are run by the interpreter that this environment was made from, because a virtual environment's own `site` may take 20 ms, and what
runs with `site` has the bare script with `site` beside it; in brackets the same beside the bare script by `-I -S`.  Then how many functions of
the file `Agent.cycle` passes and how often it goes from one section to another, without the insides of YAML, of the log and of records (an
older file leaves those to collections.namedtuple); memory (PSS) of the daemon's parent between polls.  It takes three minutes on a quiet machine; figures of a busy one are worth nothing.
"""
import gzip
import json
import os
import re
import statistics
import subprocess
import sys

from tests import gauge, support
from tests.bench.poll import BARE, PYTHON, Cleanups, make_cached, measure, measure_daemon

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
quiet = {name for _, name in ranges if "yaml" in name.lower() or name.lower() in ("log", "logger", "format_log", "record")}
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

cycle = margo_agent.Agent.cycle

def watch(*arguments, **options):
    sys.setprofile(look)
    try:
        return cycle(*arguments, **options)
    finally:
        sys.setprofile(None)

margo_agent.Agent.cycle = watch
code = margo_agent.main(sys.argv[1:])
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
        return ["env", "-C", os.path.dirname(self.forms[form]), PYTHON, "-m", "margo_agent"] + self.words

    def make_commands(self):
        """{name: command line} of what is measured; those by -I -S are named so."""
        scripts = {"as a script": "whole", "stripped, as a script": "mtls alone", "stripped and bare, as a script": "mtls alone, bare"}
        commands = {f"{name}by -I -S, bytecode at hand": make_cached(os.path.dirname(self.forms[form])) + self.words
                    for name, form in (("", "whole"), ("stripped, ", "mtls alone"))}
        commands.update({"by -m": self.make_module("whole"), "stripped, by -m": self.make_module("mtls alone")})
        commands.update((name, [PYTHON, self.forms[form]] + self.words) for name, form in scripts.items())
        return commands

    def measure_sizes(self):
        """{form: its size in words}."""
        found = {}
        for name, path in self.forms.items():
            source = self.read(path)
            data = source.encode()
            found[name] = f"{gauge.count_tokens(source):6,} tokens, {len(data) / 1000:.0f} kB, {len(gzip.compress(data, 9)) / 1000:.0f} compressed"
        return found

    def trace(self):
        """(functions, changes of section) that one unchanged poll passes."""
        output = os.path.join(self.folder, "passed.json")
        argv = [sys.executable, "-I", "-S", "-c", TRACE, os.path.dirname(self.forms["whole"]), output] + self.words
        subprocess.run(argv, env=self.device.env, check=True, stderr=subprocess.DEVNULL)
        return support.read_json(output)

    def measure_daemon(self, wfm):
        """PSS of the daemon's parent between polls, in MiB."""
        argv = [sys.executable, self.forms["whole"], "-c", self.device.config_file, "run"]
        return measure_daemon(argv, self.device.env, wfm)


def measure_polls(houses, bare, rounds):
    """({whether with `site`: CPU and peak memory of the bare script}, {(house, command): the same}): medians of so many rounds."""
    env = houses["here"].device.env
    commands = {("", True): ([PYTHON] + bare, env), ("", False): ([PYTHON, "-I", "-S"] + bare, env)}
    for where, house in houses.items():
        commands.update(((where, name), (argv, house.device.env)) for name, argv in house.make_commands().items())
    figures = {key: [] for key in commands}
    for _ in range(rounds):
        for key, (argv, env) in commands.items():
            figures[key].append(measure(argv, env))
    medians = {key: tuple(map(statistics.median, zip(*values))) for key, values in figures.items()}
    return {site: medians.pop(("", site)) for site in (True, False)}, medians


def make_table(house, wfm, polls, bare):
    """{figure: words} of one checkout."""
    rows = dict(house.measure_sizes())
    for name, (cpu, _) in polls.items():
        rows[f"poll {name}"] = f"{cpu:6.1f} ms, {cpu / bare['-I -S' not in name][0]:.2f} x bare"
        if "-I -S" not in name:
            rows[f"poll {name}"] += f" ({cpu / bare[False][0]:.2f})"
    peak = polls["by -m"][1]
    rows["its peak memory by -m"] = f"{peak:6.1f} MiB, {peak / bare[True][1]:.2f} x bare"
    functions, hops = house.trace()
    rows["it passes"] = f"{functions:6} functions, {hops} changes of section"
    rows["the daemon's parent"] = f"{house.measure_daemon(wfm):6.2f} MiB PSS"
    return rows


def main():
    arguments, roots = sys.argv[1:], {"here": support.ROOT}
    if "--against" in arguments:
        index = arguments.index("--against")
        roots["there"] = os.path.abspath(arguments[index + 1])
        del arguments[index:index + 2]
    rounds, test = int(arguments[0]) if arguments else 15, Cleanups()
    try:
        pki = support.Pki(test)
        wfm = support.Wfm(test, pki)
        wfm.add_package(support.make_compose())
        wfm.publish(support.make_deployment(registry=wfm.registry))
        houses = {name: House(test, root, pki, wfm) for name, root in roots.items()}
        script = ["-c", BARE] + [pki.path(name) for name in ("client.pem", "client.key", "ca.pem")]
        etag = houses["here"].device.state()["accepted"]["etag"]
        bare, polls = measure_polls(houses, script + [wfm.url, etag], rounds)
        tables = {where: make_table(house, wfm, {name: value for (owner, name), value in polls.items() if owner == where}, bare)
                  for where, house in houses.items()}
        print(f"{sys.version.split()[0]}, {os.uname().machine}, medians of {rounds} rounds; the bare script takes {bare[False][0]:.1f} ms"
              f" and {bare[False][1]:.1f} MiB by -I -S, {bare[True][0]:.1f} ms and {bare[True][1]:.1f} MiB with site")
        columns = sorted(tables, reverse=True)
        print(f"{'':36}" + "".join(f"{where:44}" for where in columns).rstrip())
        for name in tables["here"]:
            print(f"{name:36}" + "".join(f"{tables[where][name]:44}" for where in columns).rstrip())
    finally:
        test.close()


if __name__ == "__main__":
    main()
