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
import time

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


class Cleanups:
    """Stands in for a test case: what it started is ended when it is closed."""

    def __init__(self):
        self.calls = []

    def addCleanup(self, function, *arguments, **options):
        self.calls.append((function, arguments, options))

    def close(self):
        for function, arguments, options in reversed(self.calls):
            function(*arguments, **options)


def measure(argv, env, expected=0):
    """(CPU milliseconds, peak memory MiB) of one run of a command that has to end with the expected code."""
    with open(os.devnull, "wb") as nowhere:
        process = subprocess.Popen(argv, env=env, stdout=nowhere, stderr=nowhere)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = status
    if os.WEXITSTATUS(status) != expected or not os.WIFEXITED(status):
        raise SystemExit(f"{argv} ended with {status}")
    return (usage.ru_utime + usage.ru_stime) * 1000, usage.ru_maxrss / 1024


def measure_memory(pid):
    """PSS of a process in MiB."""
    with open(f"/proc/{pid}/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Pss:")) / 1024


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

        python, folder = shutil.which("python3"), support.make_folder(test)
        shutil.copy(support.AGENT, folder)
        subprocess.run([python, "-m", "compileall", "-q", folder], check=True)
        etag = device.state()["accepted"]["etag"]
        agent = ["-c", device.config_file, "run", "--once"]
        cached = f"import sys; sys.path.insert(0, {folder!r}); import margo_agent; sys.exit(margo_agent.main(sys.argv[1:]))"
        identity = [pki.path("client.pem"), pki.path("client.key"), pki.path("ca.pem")]
        commands = {
            "bare script, -I -S": [python, "-I", "-S", "-c", BARE] + identity + [wfm.url, etag],
            "agent, bytecode at hand, -I -S": [python, "-I", "-S", "-c", cached] + agent,
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
        base = statistics.median(cpu for cpu, _ in figures["bare script, -I -S"])
        print(f"{sys.version.split()[0]}, {os.uname().machine}, {rounds} rounds, median (minimum to maximum)")
        for name, values in figures.items():
            cpu, memory = ([value[index] for value in values] for index in (0, 1))
            print(f"{name:32} {statistics.median(cpu):6.1f} ms ({min(cpu):.1f} to {max(cpu):.1f})  {statistics.median(cpu) / base:4.2f} x bare"
                  f"  peak {statistics.median(memory):5.1f} MiB")

        daemon = subprocess.Popen([python, support.AGENT, "-c", device.config_file, "run"], env=env, stderr=subprocess.DEVNULL)
        bare = subprocess.Popen([python, "-I", "-S", "-c", "import time; time.sleep(60)"])
        time.sleep(3)
        print(f"the daemon's parent between polls  {measure_memory(daemon.pid):.2f} MiB PSS; a bare interpreter that sleeps "
              f"{measure_memory(bare.pid):.2f} MiB")
        for process in (daemon, bare):
            process.terminate()
            process.wait()
    finally:
        test.close()


if __name__ == "__main__":
    main()
