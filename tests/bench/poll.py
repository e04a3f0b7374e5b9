"""What an unchanged poll costs, beside a bare script that makes the same request and beside curl.

    python3 -m tests.bench.poll [ROUNDS]

One deployment runs, the WFM answers 304.  Every command is started ROUNDS times (default 15) in turn, so that noise hits all alike;
medians of user+system CPU (the engine's query excepted: a shell that prints one container takes its place) and of peak memory.
Then the memory of the daemon's parent while it sleeps: PSS from /proc, beside a bare interpreter that sleeps.
"""
import json
import os
import shutil
import statistics
import subprocess
import sys

from tests import support

BARE = """
import ssl, sys, urllib.request
certificate, key, anchor, url, etag = sys.argv[1:]
context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
context.check_hostname = False
context.load_verify_locations(anchor)
context.load_cert_chain(certificate, key)
request = urllib.request.Request(url + "/api/v1/deployments", headers={"If-None-Match": etag})
opener = urllib.request.OpenerDirector()
opener.add_handler(urllib.request.HTTPSHandler(context=context))
assert opener.open(request, timeout=10).status == 304
"""

# The interpreter that this environment was made from: a virtual environment's own `site` may take 20 ms.
PYTHON = getattr(sys, "_base_executable", None) or sys.executable


def make_cached(folder):
    """The start of a command line that runs the agent of a folder by -I -S, from its bytecode if that is at hand."""
    words = f"import sys; sys.path.insert(0, {folder!r}); import margo_agent; sys.exit(margo_agent.main(sys.argv[1:]))"
    return [PYTHON, "-I", "-S", "-c", words]


class Cleanups:
    """Stands in for a test case: what it started is ended when it is closed."""

    def __init__(self):
        self.calls = []

    def addCleanup(self, function, *arguments, **options):
        self.calls.append((function, arguments, options))

    def close(self):
        for function, arguments, options in reversed(self.calls):
            function(*arguments, **options)


# Starts a program and says what it took.  A program's peak, as the kernel tells it, begins with what the process was before it became
# that program; so nothing larger than this one, 9 MiB, may stand between.
START = """
import json, os, resource, sys
report, space = os.dup(1), int(sys.argv[1])
os.dup2(os.open(os.devnull, os.O_RDWR), 1)
os.dup2(1, 2)
child = os.fork()
if not child:
    if space:
        resource.setrlimit(resource.RLIMIT_AS, (space, space))
    os.execvp(sys.argv[2], sys.argv[2:])
_, status, usage = os.wait4(child, 0)
code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)
os.write(report, json.dumps([code, (usage.ru_utime + usage.ru_stime) * 1000, usage.ru_maxrss / 1024]).encode())
"""


def run(argv, env, space=0):
    """(exit code, CPU milliseconds, peak memory MiB) of one run of a command, in so many bytes of address space where that is given."""
    done = subprocess.run([sys.executable, "-I", "-S", "-c", START, str(space)] + argv, env=env, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.decode())


def measure(argv, env, expected=0):
    """(CPU milliseconds, peak memory MiB) of one run of a command that has to end with the expected code."""
    code, cpu, peak = run(argv, env)
    if code != expected:
        raise SystemExit(f"{argv} ended with {code}")
    return cpu, peak


def measure_memory(pid):
    """PSS of a process in MiB."""
    with open(f"/proc/{pid}/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Pss:")) / 1024


def measure_daemon(argv, env, wfm):
    """PSS in MiB of `run` once it has polled and sleeps."""
    before = len(wfm.requests())
    daemon = subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        support.wait_for(lambda: len(wfm.requests()) > before and not has_children(daemon.pid), what="the end of the first cycle")
        return measure_memory(daemon.pid)
    finally:
        daemon.terminate()
        daemon.wait()


def has_children(pid):
    """Whether a process waits for another one."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return bool(file.read())


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    test = Cleanups()
    try:
        pki = support.Pki(test)
        wfm, engine = support.Wfm(test, pki), support.FakeEngine(test)
        wfm.add_package(support.make_compose())
        wfm.publish(support.make_deployment(registry=wfm.registry))
        device = support.Device(test, pki, wfm, engine)
        device.cycle()
        (name, container), = engine.containers().items()
        listing = json.dumps([{"Id": container["id"], "Names": [name], "Labels": container["labels"], "State": "running", "ExitCode": 0}])
        support.write(os.path.join(engine.folder, "bin", "podman"), f"#!/bin/sh\necho '{listing}'\n", 0o755)

        python, folder = PYTHON, support.make_folder(test)
        shutil.copy(support.AGENT, folder)
        subprocess.run([python, "-m", "compileall", "-q", folder], check=True)
        etag = device.state()["accepted"]["etag"]
        agent = ["-c", device.config_file, "run", "--once"]
        identity = [pki.path("client.pem"), pki.path("client.key"), pki.path("ca.pem")]
        commands = {
            "bare script, -I -S": [python, "-I", "-S", "-c", BARE] + identity + [wfm.url, etag],
            "agent, bytecode at hand, -I -S": make_cached(folder) + agent,
            "bare script": [python, "-c", BARE] + identity + [wfm.url, etag],
            "agent by -m": ["env", f"PYTHONPATH={folder}", python, "-m", "margo_agent"] + agent,
            "agent as a script, -I -S": [python, "-I", "-S", support.AGENT] + agent,
            "agent as a script": [python, support.AGENT] + agent,
            "curl": ["curl", "-sf", "--cert", identity[0], "--key", identity[1], "--insecure", "-H", f"If-None-Match: {etag}",
                     wfm.url + "/api/v1/deployments"]}
        env = dict(device.env)
        figures = {name: [] for name in commands}
        for _ in range(rounds):
            for name, argv in commands.items():
                figures[name].append(measure(argv, env))
        base, sited = (statistics.median(cpu for cpu, _ in figures[name]) for name in ("bare script, -I -S", "bare script"))
        print(f"{sys.version.split()[0]}, {os.uname().machine}, {rounds} rounds, median (minimum to maximum)")
        for name, values in figures.items():
            cpu, memory = ([value[index] for value in values] for index in (0, 1))
            print(f"{name:32} {statistics.median(cpu):6.1f} ms ({min(cpu):.1f} to {max(cpu):.1f})  {statistics.median(cpu) / base:4.2f} x bare -I -S"
                  f"  {statistics.median(cpu) / sited:4.2f} x bare  peak {statistics.median(memory):5.1f} MiB")

        parent = measure_daemon([python, support.AGENT, "-c", device.config_file, "run"], env, wfm)
        bare = subprocess.Popen([python, "-I", "-S", "-c", "import time; print(flush=True); time.sleep(600)"], stdout=subprocess.PIPE)
        bare.stdout.readline()
        print(f"the daemon's parent between polls  {parent:.2f} MiB PSS; a bare interpreter that sleeps {measure_memory(bare.pid):.2f} MiB")
        bare.terminate()
        bare.wait()
    finally:
        test.close()


if __name__ == "__main__":
    main()
