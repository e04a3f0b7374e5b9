"""Dead ends on the wire: the whole agent against a link that breaks off at every byte, stalls in every phase, or leads somewhere else.

Each ends within the configured time, with the contract's exit code; workloads are untouched and nothing is half accepted.  What one
request makes of each fault is in test_transport.
"""
import contextlib
import os
import random
import socket
import ssl
import struct
import sys
import threading
import unittest

import margo_agent
from tests import support

SLOW = float(os.environ.get("MARGO_TEST_SLOW") or 0) == 1


class Relay:
    """Hands bytes to and fro between a client and `target` (host, port), until something is to go wrong.

    stall: stop handing on what the server sends, after so many bytes, and keep the line open; cut: break off there, with a reset or, with
    `gently`, as if the server had ended the connection.  counts: bytes of the server in each connection so far.
    """

    def __init__(self, test, target, family=socket.AF_INET, greet=None):
        self.target, self.greet = target, greet
        self.cut = self.stall = None
        self.gently, self.counts, self.connections = False, [], 0
        self.over = threading.Event()
        self.listener = socket.socket(family)
        self.listener.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
        self.listener.listen(16)
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.run, daemon=True).start()
        test.addCleanup(self.close)

    def close(self):
        """Ends it all."""
        self.over.set()
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def run(self):
        """Takes one connection after the other."""
        while not self.over.is_set():
            try:
                client = self.listener.accept()[0]
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self.talk, args=(client,), daemon=True).start()

    def talk(self, client):
        """One connection."""
        with contextlib.suppress(OSError), client:
            if self.greet and not self.greet(client):
                return
            with socket.create_connection(self.target, timeout=support.LIMIT) as server:
                pump = threading.Thread(target=self.pump, args=(client, server), daemon=True)
                pump.start()
                self.serve(client, server)
                client.shutdown(socket.SHUT_RDWR if self.gently else socket.SHUT_RD)
                pump.join(10)                       # a socket that another thread reads is not closed before that ends

    @staticmethod
    def pump(source, target):
        """Client to server."""
        with contextlib.suppress(OSError):
            while True:
                data = source.recv(65536)
                if not data:
                    target.shutdown(socket.SHUT_WR)
                    return
                target.sendall(data)

    def serve(self, client, server):
        """Server to client, as far as it is to go."""
        self.counts.append(0)
        place = len(self.counts) - 1
        while True:
            limit = min([edge for edge in (self.cut, self.stall) if edge is not None] or [1 << 60])
            data = server.recv(65536)
            if not data:
                return
            client.sendall(data[:limit - self.counts[place]])
            self.counts[place] += len(data)
            if self.counts[place] >= limit:
                if self.cut is None:
                    self.over.wait(support.LIMIT)
                if not self.gently:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return


class WireCase(support.DeviceCase):
    """A device that runs one deployment and reaches its WFM by a relay."""

    def setUp(self):
        super().setUp()
        self.relay = Relay(self, ("127.0.0.1", int(self.wfm.url.rpartition(":")[2])))
        self.device.set("wfm.url", f"https://127.0.0.1:{self.relay.port}")
        self.device.set("wfm.timeout", "1s")
        self.wfm.publish(support.make_deployment(registry=self.wfm.registry))
        self.device.cycle()
        self.held = self.look()
        self.wfm.publish(support.make_deployment(registry=self.wfm.registry, parameters={"GREETING": "new"}))

    def look(self):
        """What no dead end may change."""
        state = self.device.state()
        return self.engine.containers(), state["accepted"], state["deployments"], state["outbox"]

    def measure(self):
        """How many bytes the WFM sends when it is asked for a manifest that has changed."""
        del self.relay.counts[:]
        self.assertEqual(self.device.run("plan").returncode, 0)
        return self.relay.counts[0]

    def forget(self):
        """As if the back-off were over."""
        path = os.path.join(self.device.state_dir, "state.json")
        with open(path, "rb") as file:
            state = margo_agent.parse_state(file.read(), path)
        support.write(path, margo_agent.make_state_data(dict(state, patience={}, waits={})), 0o600)

    def check(self, code, *words, env=None):
        """One cycle ends with the code and the words, and changed nothing."""
        done = self.device.run("run", "--once", env=env)
        self.assertEqual(done.returncode, code, done.stderr)
        self.assertNotIn("bug:", done.stderr)
        for word in words:
            self.assertIn(word, done.stderr)
        self.assertEqual(self.look(), self.held)
        self.forget()


class EveryByte(WireCase):
    def test_a_link_that_breaks_off_at_every_byte(self):
        """C-106, D-1: by a reset or an early end, in handshake, head and body; never half a manifest, and never anything but unreachable."""
        config = margo_agent.load_config(self.device.config_file)
        identity = margo_agent.load_identity(config)
        source = margo_agent.MtlsSource(config, identity, margo_agent.load_trust_bundle(config, margo_agent.Store(config.state_dir)), {})
        headers = {"Accept": margo_agent.MANIFEST_TYPE}
        whole = source.send("GET", "/deployments", (200,), headers).body
        needed = self.relay.counts[-1]
        points = [(cut, cut % 2 == 0) for cut in range(needed + 1)]
        chosen = points if SLOW else random.Random(int(os.environ.get("MARGO_TEST_SEED", "1"))).sample(points, 60)
        outcomes, words = {"unreachable": 0, "whole": 0}, set()
        for self.relay.cut, self.relay.gently in chosen:
            try:
                self.assertEqual(source.send("GET", "/deployments", (200,), headers).body, whole)
                outcomes["whole"] += 1
            except margo_agent.Unreachable as error:
                outcomes["unreachable"] += 1
                words.add("timed out" in error.message)
        self.assertLess(outcomes["whole"], 150)     # only the server's goodbye may be missing
        self.assertEqual(words, {False})            # a link that breaks off is noticed when it does
        sys.__stderr__.write(f"\nwire: broken off at {len(chosen)} of {len(points)} points: {outcomes}\n")

    def test_the_agent_over_links_that_break_off(self):
        """P-12: whole cycles; then the link is whole again, and one cycle does it all."""
        needed = self.measure()
        for self.relay.cut in (0, 1, needed // 2, needed * 3 // 4):
            self.check(3)
        self.relay.cut = None
        self.device.cycle(0)
        (container,) = self.engine.containers().values()
        self.assertEqual(container["env"], ["GREETING=new"])


class Stalls(WireCase):
    def test_a_server_that_falls_silent_in_each_phase(self):
        """P-1, P-15: TLS handshake, head, body; each within wfm.timeout."""
        needed = self.measure()
        for self.relay.stall in (0, 100, needed // 2, needed - 150):
            self.check(3, "timed out")

    def test_a_server_that_never_answers_the_call(self):
        """Connecting: the queue of the listener is full, its kernel drops what comes."""
        with socket.socket() as listener, contextlib.ExitStack() as stack:
            listener.bind(("127.0.0.1", 0))
            listener.listen(0)
            for _ in range(4):
                one = stack.enter_context(socket.socket())
                one.setblocking(False)
                one.connect_ex(listener.getsockname())
            self.device.set("wfm.url", f"https://127.0.0.1:{listener.getsockname()[1]}")
            self.check(3, "timed out")


class Elsewhere(WireCase):
    def test_a_name_that_does_not_exist(self):
        self.device.set("wfm.url", "https://wfm.invalid:8443")
        self.check(3, "wfm.invalid")

    def test_nobody_listens(self):
        self.device.set("wfm.url", f"https://127.0.0.1:{support.free_port()}")
        self.check(3, "refused")

    def test_a_captive_portal(self):
        """C-006, C-013: its certificate is not the WFM's, so not even the request is sent to it."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.pki.path("site.pem"), self.pki.path("site.key"))
        self.device.set("wfm.url", f"https://127.0.0.1:{self.serve(b'HTTP/1.1 200 OK', context)}")
        self.check(5, "certificate")
        self.device.set("wfm.url", f"https://127.0.0.1:{self.serve(b'HTTP/1.1 200 OK' + bytes([13, 10, 13, 10]) + b'<html>', None)}")
        self.check(5, "TLS failed")

    def serve(self, answer, context):
        """A listener that answers everything so; its port."""
        def run():
            while True:
                try:
                    connection = listener.accept()[0]
                    with contextlib.suppress(OSError), connection:
                        connection = context.wrap_socket(connection, server_side=True) if context else connection
                        connection.recv(65536)
                        connection.sendall(answer)
                        connection.recv(65536)
                except OSError:
                    return

        listener = socket.socket()
        self.addCleanup(listener.close)
        listener.bind(("127.0.0.1", 0))
        listener.listen(8)
        threading.Thread(target=run, daemon=True).start()
        return listener.getsockname()[1]

    def test_answers_that_are_none(self):
        """Wrong length, broken chunks, nothing at all: from the true WFM's own address, by the example's faults."""
        path = "/api/v1/deployments"
        for code, fault in ((3, {"close": True}), (3, {"truncate": 5}), (4, {"status": 200, "body": ""}), (4, {"status": 200, "body": "<html>"}),
                            (3, {"headers": {"Transfer-Encoding": "chunked"}}), (4, {"corrupt": True}), (4, {"status": 204, "body": ""}),
                            (4, {"status": 301, "headers": {"Location": "https://elsewhere.invalid/"}}), (3, {"status": 502, "body": ""}), (4, {"status": 404})):
            self.wfm.fault(dict(fault, path=path))
            self.check(code)

    def test_a_wfm_that_speaks_ipv6_only(self):
        try:
            relay = Relay(self, self.relay.target, socket.AF_INET6)
        except OSError:
            self.skipTest("no IPv6 on this machine's loopback")
        self.device.set("wfm.url", f"https://[::1]:{relay.port}")
        self.device.cycle(0)
        self.assertGreater(relay.connections, 0)


class Proxies(WireCase):
    def test_a_proxy_is_used_passed_by_and_survived(self):
        """HTTPS_PROXY with NO_PROXY; one that refuses, hangs, or is not there is trouble of the network: 3."""
        def greet(client):
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += client.recv(1)
            asked.append(head.split()[1].decode())
            if answer[0]:
                client.sendall(answer[0] + b"\r\n\r\n")
            elif answer[0] is None:
                proxy.over.wait(support.LIMIT)
            return answer[0].startswith(b"HTTP/1.1 200") if answer[0] else False

        asked, answer = [], [b"HTTP/1.1 407 Proxy Authentication Required"]
        proxy = Relay(self, self.relay.target, greet=greet)
        env = {"HTTPS_PROXY": f"http://127.0.0.1:{proxy.port}", "NO_PROXY": "localhost"}
        self.check(3, "407", env=env)
        answer[0] = b""
        self.check(3, env=env)
        answer[0] = None
        self.check(3, "timed out", env=env)
        self.check(3, env=dict(env, HTTPS_PROXY=f"http://127.0.0.1:{support.free_port()}"))
        self.assertEqual(set(asked), {f"127.0.0.1:{self.relay.port}"})
        answer[0] = b"HTTP/1.1 200 Connection established"
        count, direct = len(asked), self.relay.connections
        self.device.env.update(env)
        self.device.run("plan")
        self.assertGreater(len(asked), count)
        self.assertEqual(self.relay.connections, direct)
        count = len(asked)
        self.device.env["NO_PROXY"] = "127.0.0.1"
        self.device.run("plan")
        self.assertEqual(len(asked), count)
        self.assertGreater(self.relay.connections, direct)


if __name__ == "__main__":
    unittest.main()
