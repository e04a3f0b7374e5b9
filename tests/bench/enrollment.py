"""What an enrollment and a renewal cost on the wire, and when a fleet comes back to renew.

    python3 -m tests.bench.enrollment
"""
import os
import socket
import threading
import unittest

import margo_agent
from tests import support

DEVICES, HOUR, LIFETIME = 10000, 3600, 7 * 86400


class Relay:
    """Hands TCP connections on to a port of loopback and counts connections and bytes in both directions."""

    def __init__(self, port):
        self.port, self.connections, self.sent, self.received = port, 0, 0, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = self.listener.getsockname()[1]
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        """Takes connections until the listener is closed."""
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            self.connections += 1
            server = socket.create_connection(("127.0.0.1", self.port))
            for pair, name in (((client, server), "sent"), ((server, client), "received")):
                threading.Thread(target=self.carry, args=(*pair, name), daemon=True).start()

    def carry(self, source, sink, name):
        """One direction of one connection."""
        while True:
            try:
                data = source.recv(65536)
                setattr(self, name, getattr(self, name) + len(data))
                sink.sendall(data) if data else sink.shutdown(socket.SHUT_WR)
            except OSError:
                return
            if not data:
                return


def measure_wire():
    """Prints requests and bytes of an enrollment and of a renewal, all parties on loopback."""
    case = unittest.TestCase()
    try:
        pki = support.Pki(case)
        mis, wfm = support.Mis(case, pki), support.Wfm(case, pki)
        mis.add_token("a:b")
        relays = {"identity service": Relay(int(mis.url.rsplit(":")[-1])), "WFM": Relay(int(wfm.url.rsplit(":")[-1]))}
        url = f"https://localhost:{relays['identity service'].address}"
        device = support.Device(case, pki, url=f"https://localhost:{relays['WFM'].address}", settings={"runtime.compose": "off"})
        token = support.write(os.path.join(device.folder, "token"), "a:b", 0o600)
        device.settings["identity"] = {
            "certificate": os.path.join(device.folder, "svid.pem"), "key": os.path.join(device.folder, "svid.key"), "discovery": url + "/.well-known/margo",
            "ca": pki.path("site-ca.pem"), "enrollment": "est", "est": {"token_file": token, "url": url + "/.well-known/est/factory.example"},
            "revocation": "off"}
        device.save()

        def step(words):
            for relay in relays.values():
                relay.connections = relay.sent = relay.received = 0
            device.cycle()
            for name, relay in relays.items():
                print(f"{words:22}{name:18}{relay.connections:3} requests{relay.sent:8} bytes up{relay.received:8} bytes down")

        mis.misissue(start=-70000, end=30000)
        step("enrollment, first poll")
        mis.misissue()
        step("renewal, poll")
        step("an unchanged poll")
    finally:
        case.doCleanups()


def make_curve():
    """{hour since the first certificate: renewals that begin in it} of a fleet whose certificates were issued within one hour."""
    times = []
    for number in range(DEVICES):
        start = number * HOUR // DEVICES
        leaf = margo_agent.Certificate(os.urandom(64), b"", b"", 1, start, start + LIFETIME, b"", [], False, None)
        times.append(margo_agent.make_renewal_time(leaf))
    return times


def count_peak(times, width):
    """The most arrivals in any window of so many seconds."""
    counts = {}
    for item in times:
        counts[int(item // width)] = counts.get(int(item // width), 0) + 1
    return max(counts.values()), counts


def main():
    """Prints both."""
    measure_wire()
    times = make_curve()
    naive = [number * HOUR // DEVICES + LIFETIME / 2 for number in range(DEVICES)]
    hours = count_peak(times, HOUR)[1]
    print(f"{DEVICES} devices, certificates of {LIFETIME // 86400} days issued within one hour: renewals from hour {min(hours)} to hour {max(hours)}")
    for first in range(min(hours), max(hours) + 1, 4):
        mean = sum(hours.get(hour, 0) for hour in range(first, first + 4)) / 4
        print(f"  hour {first:3}  {mean:6.0f} an hour  {'#' * int(mean / 6)}")
    print(f"busiest minute: {count_peak(times, 60)[0]} renewals; at half of the lifetime without a draw: {count_peak(naive, 60)[0]}")


if __name__ == "__main__":
    main()
