"""How much memory a poll and a first installation take, and the least address space in which each works.

    python3 -m tests.bench.memory [AGENT ...]

Each AGENT is a margo_agent.py, this checkout's by default; several are measured in turn within each round.  One deployment of one package
of 300 KiB on an engine of files.  Peak memory (RSS) is the median of five rounds; the address space is what `ulimit -v` grants, in steps
of 2 MiB, found by halving.  With its bytecode at hand, `-I -S`, as a daemon's cycle is run.
"""
import os
import shutil
import statistics
import subprocess
import sys

from tests import support
from tests.bench.poll import Cleanups, run

MIB = 1 << 20
RUN = "import sys; sys.path.insert(0, {!r}); import margo_agent; sys.exit(margo_agent.main(sys.argv[1:]))"


class World:
    """A WFM with one deployment, and a device for each agent."""

    def __init__(self, test, agents):
        self.test, self.pki = test, support.Pki(test)
        self.wfm, self.engine = support.Wfm(test, self.pki), support.FakeEngine(test)
        self.wfm.add_package(support.make_archive({"compose.yaml": support.make_compose(), "noise": os.urandom(300 << 10)}), tag="2.0.0")
        self.wfm.publish(support.make_deployment(components=(("web", "2.0.0"),), registry=self.wfm.registry))
        self.folders = {}
        for agent in agents:
            self.folders[agent] = folder = support.make_folder(test)
            shutil.copy(agent, os.path.join(folder, "margo_agent.py"))
            subprocess.run([sys.executable, "-m", "compileall", "-q", folder], check=True)

    def make_device(self, done):
        """A device that has never polled, or one on which the deployment runs."""
        self.engine.change(containers={}, networks={})
        device = support.Device(self.test, self.pki, self.wfm, self.engine)
        if done:
            device.cycle()
        return device

    def run(self, agent, device, command, space=0):
        """(exit code, peak memory in MiB) of a command, in so much address space."""
        argv = [sys.executable, "-I", "-S", "-c", RUN.format(self.folders[agent]), "-c", device.config_file, *command]
        code, _, peak = run(argv, device.env, space)
        return code, peak

    def find_least(self, agent, command, done):
        """The least address space in MiB in which a command works."""
        low, high = 16, 2048
        while high - low > 2:
            middle = (low + high) // 2
            works = self.run(agent, self.make_device(done), command, middle * MIB)[0] == 0
            low, high = (low, middle) if works else (middle, high)
        return high


def main():
    agents = [os.path.abspath(path) for path in sys.argv[1:]] or [support.AGENT]
    test = Cleanups()
    try:
        world = World(test, agents)
        print(f"{sys.version.split()[0]}, {os.uname().machine}")
        for name, command, done in (("status", ["status"], True), ("unchanged poll", ["run", "--once"], True), ("doctor", ["doctor"], True),
                                    ("first installation", ["run", "--once"], False)):
            peaks = {agent: [] for agent in agents}
            for _ in range(5):
                for agent in agents:
                    code, peak = world.run(agent, world.make_device(done), command)
                    peaks[agent].append(peak)
                    if code:
                        print(f"{agent}: {name} ended with {code}")
            for agent in agents:
                print(f"{name:20} peak {statistics.median(peaks[agent]):5.1f} MiB, works in {world.find_least(agent, command, done):4} MiB"
                      f" of address space  {agent}", flush=True)
    finally:
        test.close()


if __name__ == "__main__":
    main()
