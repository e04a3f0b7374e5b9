"""What an unchanged poll costs with 1, 20 and 200 deployments, beside `docker-compose up --detach` once per project.

    python3 -m tests.bench.scale [ROUNDS [COUNT ...]]

The agent: user+system CPU and peak memory with its bytecode at hand, as `tests.bench.poll` measures them; a shell that prints what
`podman ps` shows of so many containers takes the engine's place, and counts how often it is asked.  Then both on a real podman of its own, where
it is there: the CPU of the agent with all its children, and of Docker Compose v2 for as many projects of the same content (`up --detach`,
nothing changed), up to 20 of them.
"""
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
import uuid

from tests import support
from tests.bench.poll import Cleanups, measure

PYTHON = "/usr/bin/python3" if os.path.exists("/usr/bin/python3") else sys.executable
LIMIT = 20                                          # real containers


def make_world(test, count, engine, settings=None):
    """(device, {deployment id}) with so many deployments installed."""
    pki = support.Pki(test)
    wfm = support.Wfm(test, pki)
    wfm.add_package(support.make_compose())
    ids = [str(uuid.uuid5(uuid.NAMESPACE_DNS, str(number))) for number in range(count)]
    for deployment_id in ids:
        wfm.publish(support.make_deployment(deployment_id, registry=wfm.registry), deployment_id)
    device = support.Device(test, pki, wfm, engine, settings)
    done = device.run("run", "--once", timeout=1800)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return device, ids


def make_command(device, folder):
    """An unchanged poll, by the compiled form of the file."""
    cached = f"import sys; sys.path.insert(0, {folder!r}); import margo_agent; sys.exit(margo_agent.main(sys.argv[1:]))"
    return [PYTHON, "-I", "-S", "-c", cached, "-c", device.config_file, "run", "--once"]


def make_listing(containers):
    """What podman 4.3.1 prints of them, as long as it prints it."""
    more = {"AutoRemove": False, "Command": ["sleep", "100000"], "CreatedAt": "2 hours ago", "Exited": False, "ExitedAt": -62135596800, "Image":
            support.IMAGE, "ImageID": "c" * 64, "IsInfra": False, "Mounts": [], "Namespaces": {}, "Networks": ["x" * 50], "Pid": 26075, "Pod": "",
            "PodName": "", "Ports": None, "Size": None, "StartedAt": 0, "Status": "Up 2 hours ago", "Created": 1795546932}
    return json.dumps([dict(more, Id=item["id"], Names=[name], Labels=item["labels"], State="running", ExitCode=0)
                       for name, item in containers.items()], indent=4)


def measure_all(argv, env, times=1):
    """CPU milliseconds of a command and all its children, run one after the other."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    for _ in range(times):
        subprocess.run(argv, env=env, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) * 1000


def show_agent(folder, counts, rounds):
    """The agent's own part, all counts in turn."""
    test, worlds = Cleanups(), {}
    try:
        for count in counts:
            engine = support.FakeEngine(test)
            device, _ = make_world(test, count, engine)
            listing = support.write(os.path.join(engine.folder, "listing"), make_listing(engine.containers()))
            asked = os.path.join(engine.folder, "asked")
            support.write(os.path.join(engine.folder, "bin", "podman"), f"#!/bin/sh\necho \"$1\" >> {asked}\nexec cat {listing}\n", 0o755)
            worlds[count] = device, asked, []
        for _ in range(rounds):
            for device, _, values in worlds.values():
                values.append(measure(make_command(device, folder), device.env))
        base = statistics.median(cpu for cpu, _ in worlds[counts[0]][2])
        for count, (device, asked, values) in worlds.items():
            with open(asked) as file:
                queries = len(file.readlines()) / rounds
            cpu = [value for value, _ in values]
            print(f"agent, {count:3} deployments  {statistics.median(cpu):6.1f} ms ({min(cpu):.1f} to {max(cpu):.1f})  {statistics.median(cpu) / base:4.2f} x"
                  f"  peak {statistics.median(memory for _, memory in values):5.1f} MiB  {queries:.1f} engine commands,"
                  f" state {os.path.getsize(os.path.join(device.state_dir, 'state.json')) // 1024} KiB")
    finally:
        test.close()


def show_real(folder, counts, rounds):
    """Agent and Docker Compose side by side on one podman."""
    test, engine = Cleanups(), support.Engine(type("Holder", (), {}))
    try:
        for count in counts:
            device, ids = make_world(test, count, engine, {"runtime.settle": "0s"})
            path = os.path.join(support.make_folder(test), "podman.sock")
            service = support.Service(test, ["podman", "system", "service", "--time=0", f"unix://{path}"], engine.env)
            support.wait_for(lambda: os.path.exists(path))                          # noqa: B023
            compose = support.write(os.path.join(device.folder, "compose.json"), support.make_compose())
            env = dict(device.env, DOCKER_HOST=f"unix://{path}")
            projects = [[support.find_compose(), "-p", f"side-{name}", "-f", compose, "up", "--detach"] for name in ids]
            for argv in projects:
                measure_all(argv, env)
            agent, others = [], []
            for _ in range(rounds):
                start = time.monotonic()
                cpu = measure_all(make_command(device, folder), device.env)
                agent.append((cpu, time.monotonic() - start))
                start, server = time.monotonic(), read_cpu(service.process.pid)
                cpu = sum(measure_all(argv, env) for argv in projects) + read_cpu(service.process.pid) - server
                others.append((cpu, time.monotonic() - start))
            for name, values in (("agent with its engine's query", agent), ("docker-compose up --detach, each", others)):
                print(f"{name:34} {count:3} deployments  {statistics.median(cpu for cpu, _ in values):8.0f} ms CPU"
                      f"  {statistics.median(span for _, span in values):6.2f} s")
            service.stop()
            engine.clean()
    finally:
        test.close()
        engine.close()


def read_cpu(pid):
    """CPU milliseconds of a process so far, its children included that have ended."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) * 1000 / os.sysconf("SC_CLK_TCK")


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    counts = [int(word) for word in sys.argv[2:]] or [1, 20, 200]
    test = Cleanups()
    try:
        folder = support.make_folder(test)
        shutil.copy(support.AGENT, folder)
        subprocess.run([PYTHON, "-m", "compileall", "-q", folder], check=True)
        print(f"{subprocess.check_output([PYTHON, '--version']).decode().strip()}, {os.uname().machine}, {rounds} rounds, median (minimum to maximum)")
        show_agent(folder, counts, rounds)
        if support.CHECKS["podman"]() and support.find_compose():
            show_real(folder, [count for count in counts if count <= LIMIT], max(1, rounds // 3))
    finally:
        test.close()


if __name__ == "__main__":
    main()
