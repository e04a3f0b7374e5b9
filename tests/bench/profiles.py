"""What the profiles cost beside each other: an unchanged poll, and the first sync of many deployments.

    python3 -m tests.bench.profiles [ROUNDS [DEPLOYMENTS]]

An unchanged poll, ROUNDS times in turn (default 11): median of user+system CPU with all helper programs (the engine excepted: a shell
that prints one container takes its place), bytes on the wire both ways, counted by a relay, and programs started, counted by strace.
Then the first sync of DEPLOYMENTS (default 200) that nothing here runs (runtime.compose: off), so that the source alone is measured, once it is
enrolled: `plan`, and the first run with its reports; wall time, CPU with all helper programs, connections and bytes.
"""
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
from urllib.parse import urlsplit

from tests import support, test_profiles
from tests.bench.poll import Cleanups, measure


class Relay:
    """A port of loopback that passes everything on to another, and counts it."""

    def __init__(self, target):
        self.target, self.bytes, self.connections = target, 0, 0
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        """Serves every connection by two threads."""
        while True:
            inner, _ = self.listener.accept()
            outer = socket.create_connection(self.target)
            self.connections += 1
            for source, sink in ((inner, outer), (outer, inner)):
                threading.Thread(target=self.pump, args=(source, sink), daemon=True).start()

    def pump(self, source, sink):
        """One direction of one connection."""
        try:
            while True:
                data = source.recv(65536)
                if not data:
                    break
                self.bytes += len(data)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass


def make_road(test, name):
    """(road, engine, relay), with the agent's own way to the other side through the relay."""
    engine = support.FakeEngine(test)
    road = test_profiles.ROADS[name](test, engine)
    url = urlsplit(road.device.settings["wfm"]["url"])
    relay = Relay((url.hostname, url.port))
    road.device.set("wfm.url", url._replace(netloc=f"{url.hostname}:{relay.port}").geturl())
    return road, engine, relay


def count_programs(argv, env, folder):
    """How many programs a command starts beside itself, the engine's not counted."""
    path = os.path.join(folder, "trace")
    subprocess.run(["strace", "-f", "-qq", "-e", "trace=execve", "-o", path] + argv, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    with open(path) as file:
        started = [line for line in file if "execve(" in line and line.rstrip().endswith("= 0")]
    return len([line for line in started if "podman" not in line]) - 1


def measure_polls(rounds):
    """Prints a line a profile."""
    test = Cleanups()
    try:
        roads = {}
        for name in test_profiles.ROADS:
            road, engine, relay = make_road(test, name)
            road.publish()
            road.device.cycle()
            (key, container), = engine.containers().items()
            listing = json.dumps([{"Id": container["id"], "Names": [key], "Labels": container["labels"], "State": "running", "ExitCode": 0}])
            support.write(os.path.join(engine.folder, "bin", "podman"), f"#!/bin/sh\necho '{listing}'\n", 0o755)
            folder = support.make_folder(test)
            shutil.copy(support.AGENT, folder)
            subprocess.run([sys.executable, "-m", "compileall", "-q", folder], check=True)
            start = f"import sys; sys.path.insert(0, {folder!r}); import margo_agent; sys.exit(margo_agent.main(sys.argv[1:]))"
            argv = [sys.executable, "-I", "-S", "-c", start, "-c", road.device.config_file, "run", "--once"]
            roads[name] = road, relay, argv, [], count_programs(argv, road.device.env, folder) if shutil.which("strace") else "?"
        sizes = {}
        for _ in range(rounds):
            for name, (road, relay, argv, figures, _) in roads.items():
                before = relay.bytes
                figures.append(measure(argv, road.device.env)[0])
                time.sleep(0.1)
                sizes[name] = relay.bytes - before
        base = statistics.median(roads["mtls"][3])
        print(f"an unchanged poll: {sys.version.split()[0]}, {os.uname().machine}, {rounds} rounds, median (minimum to maximum)")
        for name, (_, _, _, figures, programs) in roads.items():
            print(f"{name:10} {statistics.median(figures):6.1f} ms CPU ({min(figures):.1f} to {max(figures):.1f})  {statistics.median(figures) / base:4.2f} x mtls"
                  f"  {sizes[name]} bytes  {programs} programs")
    finally:
        test.close()


def measure_first_sync(count):
    """Prints two lines a profile."""
    print(f"first sync of {count} deployments that nothing here runs")
    for name in test_profiles.ROADS:
        test = Cleanups()
        try:
            road, _, relay = make_road(test, name)
            road.device.set("runtime.compose", "off")
            for number in range(count):
                road.publish(f"{number:08x}-0000-4000-8000-000000000000", name=f"app-{number}")
            road.device.run("enroll")
            for command, code in (("plan",), 0), (("run", "--once"), 1):
                relay.bytes = relay.connections = 0
                start = time.monotonic()
                cpu, memory = measure(road.device.command(*command), road.device.env, code)
                print(f"{name:10} {command[0]:5} {time.monotonic() - start:6.1f} s, {cpu / 1000:6.1f} s CPU, peak {memory:.0f} MiB, {relay.connections}"
                      f" connections, {relay.bytes / 1024:.0f} KiB")
        finally:
            test.close()


def main():
    numbers = [int(word) for word in sys.argv[1:]]
    measure_polls(numbers[0] if numbers else 11)
    measure_first_sync(numbers[1] if len(numbers) > 1 else 200)


if __name__ == "__main__":
    main()
