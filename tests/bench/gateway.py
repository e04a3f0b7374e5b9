"""What child devices add to an unchanged poll, and how long one that hangs holds the others up.

    python3 -m tests.bench.gateway [ROUNDS]

Every engine is a shell that prints no container, so what is measured is the agent's own; 0, 1, 5 and 20 children in turn, ROUNDS times
each (default 9).  Then one of two children hangs for ever while a deployment comes for the other: seconds until that one runs, and of
that cycle.
"""
import statistics
import subprocess
import sys
import time

from tests import support
from tests.bench.poll import Cleanups, measure
from tests.test_gateway import make_child


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    test = Cleanups()
    try:
        pki = support.Pki(test)
        wfm = support.Wfm(test, pki)
        wfm.add_package(support.make_compose())
        devices = {}
        for count in (0, 1, 5, 20):
            device = devices[count] = support.Device(test, pki, wfm, support.FakeEngine(test))
            support.write(device.env["PATH"].split(":")[0] + "/podman", "#!/bin/sh\necho '[]'\n", 0o755)
            device.set("device.children", [make_child(f"c{n}", {"CONTAINER_HOST": f"unix:///{n}"}) for n in range(count)])
            device.cycle()
        figures = {count: [] for count in devices}
        for _ in range(rounds):
            for count, device in devices.items():
                start = time.monotonic()
                cpu, memory = measure(device.command("run", "--once"), device.env)
                figures[count].append((cpu, memory, (time.monotonic() - start) * 1000))
        for count, values in figures.items():
            cpu, memory, wall = (statistics.median(value[index] for value in values) for index in range(3))
            print(f"{count:3} children  {cpu:6.1f} ms CPU  {wall:6.1f} ms  peak {memory:5.1f} MiB")

        engine = support.FakeEngine(test)
        device = support.Device(test, pki, wfm, engine)
        support.write(engine.folder + "/bin/podman", "#!/bin/sh\n[ -z \"$HANG\" ] || exec sleep 600\n"
                      f"exec {sys.executable} -S {support.ROOT}/tests/fake_podman.py \"$@\"\n", 0o755)
        device.set("device.children", [make_child("a", {"CONTAINER_HOST": "unix:///a", "HANG": "1"}), make_child("b", {"CONTAINER_HOST": "unix:///b"})])
        wfm.publish(support.make_deployment(device=f"{support.DEVICE}/b", registry=wfm.registry))
        start = time.monotonic()
        process = subprocess.Popen(device.command("run", "--once"), env=device.env, stderr=subprocess.DEVNULL)
        support.wait_for(lambda: "installed" in wfm.statuses(), 60)
        installed = time.monotonic() - start
        process.wait()
        print(f"one of two hangs: the other is installed after {installed:.1f} s, the cycle ends after {time.monotonic() - start:.1f} s")
    finally:
        test.close()


if __name__ == "__main__":
    main()
