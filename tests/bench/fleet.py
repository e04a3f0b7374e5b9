"""When 100,000 simulated devices come to their WFM after a power failure: the agent's own rules, a power cut for all at one instant.

    python3 -m tests.bench.fleet [DEVICES]

The daemons boot within 20 to 40 s and are asked by margo_agent.make_start when to arrive first, then by make_delay; cron starts a run each
minute.  Then the same fleet against a WFM that is down for ten minutes: make_backoff.  Printed is the number of requests in each ten seconds.
"""
import random
import sys

import margo_agent

CONFIG = margo_agent.make_config({"wfm": {"url": "https://x"}, "identity": {"certificate": "c", "key": "k", "trust_bundle": "b"}}, "/", {})
BIN, SPAN = 10, 300


def arrive(rng, spread):
    """The instants at which one daemon polls after a power failure."""
    boot = 20 + 20 * rng.random()
    now = margo_agent.make_start(boot, CONFIG.poll, spread, rng.random()) or boot
    while now < SPAN:
        yield now
        now += margo_agent.make_delay(CONFIG, margo_agent.make_state(), None, margo_agent.Clock(0, "", 0), rng.random())


def arrive_by_cron(rng, spread):
    """The same by a cron line every minute: what it starts waits once, later runs come with the minute."""
    boot = 20 + 20 * rng.random()
    first = 60.0
    start = margo_agent.make_start(first, CONFIG.poll, spread, rng.random()) if boot < first else 0
    yield max(first, start)
    for now in range(180 if start > 120 else 120, SPAN, 60):
        yield float(now)


def come_back(rng):
    """One daemon's requests to a WFM that is down until `600`."""
    now, failures = 60 * rng.random(), 0
    while now < 1200:
        yield now
        failures = failures + 1 if now < 600 else 0
        delay = margo_agent.make_backoff(failures, None, "", rng.random()) if failures else 0
        now += max(1.0, delay) if failures else CONFIG.poll.interval * (0.9 + 0.2 * rng.random())


def draw(title, curves, devices, span, width):
    """A line for each bin, as many marks as its share of the busiest one."""
    counts = [0] * (span // width)
    for curve in curves:
        for now in curve:
            if now < span:
                counts[int(now // width)] += 1
    print(f"{title}: {devices} devices, the busiest {width} s have {max(counts)} requests, {max(counts) / width:.0f} a second")
    for index, count in enumerate(counts):
        print(f"{index * width:5} s {count:7} {'#' * (60 * count // max(counts))}")


def main():
    devices, rng = int(sys.argv[1]) if len(sys.argv) > 1 else 100000, random.Random(1)
    for title, curve in (("daemon", arrive), ("cron", arrive_by_cron)):
        draw(f"{title}, all at once", [curve(rng, False) for _ in range(devices)], devices, SPAN, BIN)
        draw(f"{title}, spread", [curve(rng, True) for _ in range(devices)], devices, SPAN, BIN)
    draw("a WFM that is down for 600 s", [come_back(rng) for _ in range(devices)], devices, 1200, 60)


if __name__ == "__main__":
    main()
