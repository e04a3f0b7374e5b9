"""Transport: one request and one answer, whatever the network does; and what each answer means."""
import contextlib
import email.message
import email.utils
import errno
import json
import os
import select
import socket
import ssl
import struct
import threading
import time
import unittest
from unittest import mock

import margo_agent
from margo_agent import Refused, Response, Unreachable, Untrusted
from tests import support

NOW = 1790000000
ROOT = "https://docs.margo.org/specification/"
TYPES = ROOT + "problem-types#"


class Server:
    """A loopback server: it reads the request of each connection, then sends bytes or calls `serve(connection, over)`.

    context: for TLS.  rude: nothing is read.  heads, bodies: of the requests that came.  connections: how many came at
    all.  over: set when the test ends.
    """

    def __init__(self, test, serve, context=None, rude=False):
        self.serve, self.context, self.rude, self.over = serve, context, rude, threading.Event()
        self.heads, self.bodies, self.connections = [], [], 0
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(16)
        self.port = self.listener.getsockname()[1]
        self.url = f"http{'s' if context else ''}://{'localhost' if context else '127.0.0.1'}:{self.port}"
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()
        test.addCleanup(self.finish)

    def run(self):
        """Takes one connection after the other."""
        while True:
            try:
                connection = self.listener.accept()[0]
            except OSError:
                return
            self.connections += 1
            connection.settimeout(support.LIMIT)
            with contextlib.suppress(OSError), connection:          # what the client breaks off is its own affair
                self.talk(connection)

    def talk(self, connection):
        """One connection: TLS where wanted, the request, the answer."""
        if self.context:
            connection = self.context.wrap_socket(connection, server_side=True)
        with connection, connection.makefile("rb") as file:
            head = "" if self.rude else self.read_head(file)
            if head:
                self.heads.append(head)
                length = [line for line in head.split("\r\n") if line.lower().startswith("content-length:")]
                self.bodies.append(file.read(int(length[0].split(":")[1])) if length else b"")
            if callable(self.serve):
                self.serve(connection, self.over)
            else:
                connection.sendall(self.serve)

    @staticmethod
    def read_head(file):
        """The lines up to the empty one, as text; "" where the client sends none."""
        lines = []
        while True:
            line = file.readline().decode("latin-1")
            if not line.strip():
                return "".join(lines)
            lines.append(line)

    def finish(self):
        """Ends the server; afterwards nothing is on its way any more."""
        self.over.set()
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join(20)


def answer(status, body=b"", **headers):
    """An answer as bytes; header names are spelled with _ for -."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines + ["", ""]).encode() + body


def chunked(*pieces, end=b"0\r\n\r\n"):
    """An answer in chunks."""
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"".join(
        b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + end


def stall_after(data):
    """Serves some bytes, then nothing; a client that waits for ever would get a good answer in the end."""
    def serve(connection, over):
        connection.sendall(data)
        over.wait(10)
        connection.sendall(answer("200 OK", b"late")[len(data):])
    return serve


def reset_after(data):
    """Serves some bytes, then resets the connection."""
    def serve(connection, over):
        connection.sendall(data)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    return serve


class TransportCase(unittest.TestCase):
    def setUp(self):
        keep = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        patch = mock.patch.dict(os.environ, keep, clear=True)
        patch.start()
        self.addCleanup(patch.stop)

    def get(self, server, path="/x", method="GET", headers=None, body=None, context=None, timeout=10, limit=1000,
            check_peer=None):
        url = getattr(server, "url", server) + path
        return margo_agent.request(method, url, headers or {}, body, context, timeout, limit, check_peer)

    def fetch(self, serve, **options):
        """One GET to a server that serves so."""
        return self.get(Server(self, serve), **options)

    def refuse(self, kind, serve, *words, **options):
        """One GET that fails with just this kind of error, which names the request and the words."""
        server = serve if isinstance(serve, (Server, str)) else Server(self, serve)
        with self.assertRaises(margo_agent.MargoError) as caught:
            self.get(server, **options)
        self.assertIs(type(caught.exception), kind, caught.exception.message)
        for word in ("GET " + getattr(server, "url", server) + "/x",) + words:
            self.assertIn(word, caught.exception.message)


class Answers(TransportCase):
    def test_every_status_is_an_answer(self):
        """C-050: what a status means is decided later, by the caller's table; here none is an error."""
        for status in (200, 201, 202, 204, 206, 300, 304, 400, 401, 403, 404, 407, 418, 422, 429, 500, 503, 511, 599):
            with self.subTest(status):
                body = b"" if status in (204, 304) else b"why"
                response = self.fetch(answer(f"{status} Whatever", body, X_Name="value"))
                self.assertEqual((response.status, response.body, response.headers.get("x-name")),
                                 (status, body, "value"))

    def test_a_304_that_tells_the_length_of_what_it_leaves_out_has_no_body(self):
        """C-102: Content-Length in a 304 is that of the answer not sent (RFC 9110, 8.6); it is not waited for."""
        response = self.fetch(b'HTTP/1.1 304 Not Modified\r\nETag: "e"\r\nContent-Length: 500\r\n\r\n')
        self.assertEqual((response.status, response.body, response.headers.get("ETag")), (304, b"", '"e"'))

    def test_a_redirect_is_an_answer_and_goes_nowhere(self):
        """C-058: what identifies this device is not carried to another address, nor does a method turn into GET."""
        target = Server(self, answer("200 OK", b"elsewhere"))
        for status in (301, 302, 303, 307, 308):
            for method in ("GET", "PUT", "POST", "DELETE"):
                with self.subTest(status=status, method=method):
                    server = Server(self, answer(f"{status} Moved", b"", Location=target.url + "/y",
                                                 Refresh=f"0; url={target.url}"))
                    self.assertEqual(self.get(server, method=method, body=b"{}" if method[0] == "P" else None).status,
                                     status)
                    server.finish()
                    self.assertEqual(len(server.heads), 1)
        target.finish()
        self.assertEqual(target.connections, 0)

    def test_a_captive_portal_is_just_an_answer(self):
        """C-106: its page is 200 and HTML; that it is no manifest is found by whoever reads it."""
        page = b"<html><head><meta http-equiv=refresh content='0; url=http://portal.example/'></head>Log in</html>"
        response = self.fetch(answer("200 OK", page, Content_Type="text/html"))
        self.assertEqual((response.status, response.body), (200, page))
        self.assertIsNone(margo_agent.parse_problem(response.body))
        with self.assertRaises(Refused) as caught:
            margo_agent.parse_manifest(response.body, "https://wfm.factory.example")
        self.assertIn("JSON", caught.exception.message)

    def test_bodies_come_whole_however_they_are_framed(self):
        content = bytes(range(256)) * 3
        frames = {
            "length": answer("200 OK", content), "chunks": chunked(content[:7], content[7:500], content[500:]),
            "trailer": chunked(content, end=b"0\r\nX-Trailer: x\r\n\r\n"),
            "to the end, 1.0": b"HTTP/1.0 200 OK\r\n\r\n" + content,
            "to the end, 1.1": b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + content,
            "after 100 Continue": b"HTTP/1.1 100 Continue\r\n\r\n" + answer("200 OK", content),
            "after 102": b"HTTP/1.1 102 Processing\r\n\r\n" + answer("200 OK", content),
            "after 103 twice": b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" * 2 + answer("200 OK", content)}
        for name, data in frames.items():
            with self.subTest(name):
                self.assertEqual(self.fetch(data).body, content)

    def test_an_answer_that_is_nearly_all_frame_is_refused(self):
        """15.3: a byte of content in each 60 KiB goes on for hours at full speed, and is never too long by its content."""
        with self.assertRaisesRegex(Refused, "longer than 1000 bytes"):
            self.fetch(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + (b"1;" + b"x" * 61440 + b"\r\nx\r\n") * 100 + b"0\r\n\r\n")

    def test_a_coded_body_is_not_decoded(self):
        """C-105: digests cover what was asked for with Accept-Encoding: identity; gzip may be the content itself."""
        body = support.make_archive({"compose.yaml": "services: {}"})
        server = Server(self, answer("200 OK", body, Content_Encoding="gzip"))
        self.assertEqual(self.get(server).body, body)
        self.assertIn("Accept-Encoding: identity", server.heads[0])


class Requests(TransportCase):
    def test_a_request_is_http_1_1_with_what_was_given(self):
        """C-051, C-020: method, path, headers and body as given, and nothing that names the client."""
        server = Server(self, answer("201 Created"))
        self.get(server, "/prefix/api/v1/capabilities/gw1/deviceA", "PUT", {"Content-Type": "application/json"},
                 b'{"a":1}')
        lines = server.heads[0].split("\r\n")
        self.assertEqual(lines[0], "PUT /prefix/api/v1/capabilities/gw1/deviceA HTTP/1.1")
        self.assertEqual(server.bodies, [b'{"a":1}'])
        fields = [line.partition(":") for line in lines[1:] if line]
        headers = {name.lower(): value.strip() for name, _, value in fields}
        self.assertEqual(headers, {
            "host": f"127.0.0.1:{server.port}", "content-type": "application/json", "content-length": "7",
            "connection": "close",
            "accept-encoding": "identity", "user-agent": f"margo-agent/{margo_agent.__version__}"})

    def test_a_colon_in_a_path_stays_literal(self):
        """C-050: the digest in a path as the protocol's examples have it."""
        server = Server(self, answer("200 OK"))
        self.get(server, "/api/v1/bundles/sha256:" + "0" * 64)
        self.assertTrue(server.heads[0].startswith("GET /api/v1/bundles/sha256:" + "0" * 64 + " HTTP/1.1"))

    def test_no_cookie_is_kept_and_no_connection_either(self):
        """C-016, C-020: each request stands for itself, on a connection of its own."""
        server = Server(self, answer("200 OK", b"", Set_Cookie="client=1; Path=/", Connection="keep-alive"))
        for _ in range(2):
            self.get(server)
        server.finish()
        self.assertEqual(server.connections, 2)
        self.assertNotIn("cookie", server.heads[1].lower())

    def test_a_proxy_of_the_environment_is_used_and_its_exceptions_hold(self):
        proxy, server = Server(self, answer("200 OK", b"by proxy")), Server(self, answer("200 OK", b"direct"))
        with mock.patch.dict(os.environ, {"http_proxy": proxy.url}):
            self.assertEqual(self.get("http://wfm.invalid:8080").body, b"by proxy")
            self.assertTrue(proxy.heads[0].startswith("GET http://wfm.invalid:8080/x HTTP/1.1"))
            with mock.patch.dict(os.environ, {"no_proxy": "127.0.0.1"}):
                self.assertEqual(self.get(server).body, b"direct")

    def test_a_proxy_whose_address_is_spoilt_is_named(self):
        for proxy in ("http://[::1:3128/", "http://me:secret@[::1:3128", "[::1:3128"):
            with mock.patch.dict(os.environ, {"https_proxy": proxy}):
                self.refuse(Unreachable, "https://wfm.invalid", "through the proxy [::1:3128 (", context=margo_agent.make_tls_context())

    def test_https_goes_through_a_proxy_as_a_tunnel_only(self):
        """C-013: a proxy sees a host and a port, never a request; one that refuses is trouble of the network."""
        proxy, server = Server(self, answer("407 Log in first")), Server(self, answer("200 OK"))
        with mock.patch.dict(os.environ, {"https_proxy": proxy.url}):
            context = margo_agent.make_tls_context()
            self.refuse(Unreachable, f"https://127.0.0.1:{server.port}", "407", context=context,
                        headers={"X-Secret": "token"})
        for one in (proxy, server):
            one.finish()
        self.assertTrue(proxy.heads[0].startswith(f"CONNECT 127.0.0.1:{server.port} HTTP/1."), proxy.heads)
        self.assertNotIn("X-Secret", proxy.heads[0])
        self.assertEqual((len(proxy.heads), server.connections), (1, 0))


class Limits(TransportCase):
    def test_a_body_at_the_limit_passes_and_one_byte_more_is_refused(self):
        """D-8: nothing is read without a bound."""
        for frame in (lambda body: answer("200 OK", body), chunked, lambda body: b"HTTP/1.0 200 OK\r\n\r\n" + body):
            self.assertEqual(len(self.fetch(frame(bytes(1000)), limit=1000).body), 1000)
            self.refuse(Refused, frame(bytes(1001)), "longer than 1000 bytes", limit=1000)

    def test_a_body_without_end_is_refused_at_the_limit(self):
        """D-8: it is not read to its end before it is judged; the server goes on until the client closes."""
        for head in (b"HTTP/1.0 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 999999999999\r\n\r\n"):
            sent = []

            def serve(connection, over):
                connection.sendall(head)
                while not over.is_set():
                    sent.append(connection.send(bytes(65536)))
            self.refuse(Refused, serve, "longer than 100000 bytes", limit=100000)
            self.assertLess(sum(sent), 64 * 1024 * 1024)

    def test_a_slow_drip_is_given_up(self):
        """D-6: no deadline for a large body on a slow link, but less than 1 KiB/s over four time-outs is given up."""
        def serve(connection, over):
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 400\r\n\r\n")
            for _ in range(300):
                if over.wait(0.01):
                    return
                connection.sendall(b"x")
            connection.sendall(bytes(100))                 # a client that is still there has it all
        self.refuse(Unreachable, serve, "given up at", "bytes after", timeout=0.5)

    def test_folded_lines_of_a_head_are_one(self):
        """RFC 9112, 5.2: no header has a line's end in it, so none can be kept and sent back with one."""
        response = self.fetch(b"HTTP/1.1 200 OK\r\nETag: \"a\r\n b\"\r\nX: 1\r\nX: 2\r\nContent-Length: 0\r\n\r\n")
        self.assertEqual((response.headers.get("ETag"), response.headers.get_all("X")), ('"a b"', ["1", "2"]))

    def test_a_transfer_encoding_that_is_not_known_is_no_body(self):
        """Its frame would be read as content: also `chunked` with something beside it."""
        for value in (b"gzip", b"gzip, chunked", b"chunked\t", b"x"):
            self.refuse(Unreachable, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: " + value + b"\r\n\r\n3\r\nabc\r\n0\r\n\r\n", "Transfer-Encoding")

    def test_a_head_that_breaks_off_is_no_empty_answer(self):
        """P-12: the length was still to come; nothing half is accepted, and nothing refused that was never said."""
        for head in (b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nETag: \"x\"\r\n", b"HTTP/1.1 200 OK\r\nContent-Le"):
            with self.assertRaises(Unreachable):
                self.get(Server(self, head).url)

    def test_a_head_that_drips_is_given_up(self):
        """P-15: byte by byte a head could take for ever, each wait for data being short."""
        def drip(connection, over):
            connection.sendall(b"HTTP/1.1 200 OK\r\n")
            with contextlib.suppress(OSError):
                while not over.wait(0.1):
                    connection.sendall(b"X")

        pki = support.Pki(self)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pki.path("site.pem"), pki.path("site.key"))
        server = Server(self, drip, context)
        ours = margo_agent.make_tls_context(ca_file=pki.path("site-ca.pem"))
        with self.assertRaises(Unreachable):
            margo_agent.request("GET", server.url + "/x", {}, None, ours, 0.5, 1000)

    def test_interim_answers_without_end_are_given_up(self):
        """F-10, P-15: each is passed over, fast or slowly, but not for ever; 101 would change the protocol and is an answer."""
        for code, pause in ((100, 0), (103, 0), (102, 0.05), (199, 0.05)):
            def serve(connection, over, code=code, pause=pause):
                end = time.monotonic() + 60
                with contextlib.suppress(OSError):
                    while time.monotonic() < end:
                        if over.wait(pause):
                            return
                        connection.sendall(f"HTTP/1.1 {code} Not yet\r\nLink: <x>\r\n\r\n".encode())
                    connection.sendall(answer("200 OK", b"late"))       # for a client that is still there
            with self.subTest(code=code):
                self.refuse(Unreachable, serve, timeout=0.2)
        self.assertEqual(self.fetch(b"HTTP/1.1 101 Switching Protocols\r\n\r\n").status, 101)

    def test_interim_answers_to_every_method_are_passed_over(self):
        """F-10: with a body that is sent, and before every kind of answer; what they say is not mixed with the answer's head."""
        hint = b"HTTP/1.1 103 Early Hints\r\nETag: \"hint\"\r\nContent-Length: 7\r\n\r\n"
        for method, status in (("PUT", "201 Created"), ("POST", "200 OK"), ("DELETE", "204 No Content"), ("GET", "304 Not Modified"), ("GET", "503 Later")):
            server = Server(self, b"HTTP/1.1 100 Continue\r\n\r\n" + hint + answer(status, b"" if status[:3] in ("204", "304") else b"{}"))
            with self.subTest(method=method, status=status):
                response = self.get(server, method=method, body=b"{}" if method[0] == "P" else None)
                self.assertEqual((response.status, response.headers.get("ETag")), (int(status[:3]), None))

    def test_what_stands_between_the_pieces_of_a_body_neither_drips_nor_goes_on_for_ever(self):
        """P-15: the length of a chunk byte by byte, or trailers without end, are no pieces whose speed could be counted; plain HTTP drips, too."""
        head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        for start, word in ((head + b"3\r\nabc\r\n", b"0"), (head + b"3\r\nabc\r\n0\r\n", b"A: b\r\n" * 1000), (b"HTTP/1.1 200 OK\r\n", b"X")):
            def serve(connection, over, start=start, word=word):
                connection.sendall(start)
                with contextlib.suppress(OSError):
                    while not over.wait(0.02):
                        connection.sendall(word)
            with self.subTest(word=word[:8]):
                self.refuse(Unreachable, serve, "timed out", timeout=0.1)

    def test_the_speed_that_counts_is_that_of_four_time_outs(self):
        """D-6: a link that is slow but moves may take as long as it needs."""
        for rate, seconds, given_up in ((1100, 1000, False), (900, 1000, True), (10, 39, False), (10, 42, True)):
            with self.subTest(rate=rate, seconds=seconds):
                pieces = [bytes(rate)] * seconds + [b""]
                with mock.patch.object(margo_agent.time, "monotonic", lambda: float(seconds + 1 - len(pieces))):
                    source = mock.Mock(length=0, paced=mock.Mock(count=0), read1=lambda size: pieces.pop(0))
                    if given_up:
                        with self.assertRaises(Unreachable) as caught:
                            margo_agent.read_body(source, 10 ** 9, 10, "GET it")
                        self.assertIn("GET it: given up at", caught.exception.message)
                    else:
                        self.assertEqual(len(margo_agent.read_body(source, 10 ** 9, 10, "GET it")), rate * seconds)


class Network(TransportCase):
    def test_no_thread_is_needed(self):
        """A device at its limit of tasks polls all the same: pacing does without a thread."""
        def start(thread):
            raise RuntimeError("can't start new thread")

        server = Server(self, answer("200 OK", b"here"))
        with mock.patch.object(threading.Thread, "start", start):
            self.assertEqual(self.get(server).body, b"here")

    def resolve(self, *places):
        """A name that has these addresses, in this order."""
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", place) for place in places]
        patch = mock.patch.object(socket, "getaddrinfo", lambda *arguments, **options: found)
        patch.start()
        self.addCleanup(patch.stop)

    def make_silence(self):
        """A place that answers no attempt to connect: the queue of its listener is full."""
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        place = listener.getsockname()
        for peer in (listener, socket.create_connection(place), socket.socket()):
            self.addCleanup(peer.close)
        peer.setblocking(False)
        peer.connect_ex(place)
        return place

    def test_a_dead_address_before_a_good_one_takes_a_quarter_of_a_second(self):
        """F-12: the next address of a name is tried before the one before has used up the time-out; a refused one at once."""
        server = Server(self, answer("200 OK", b"here"))
        good, closed = server.listener.getsockname(), ("127.0.0.1", support.free_port())
        for first in (self.make_silence(), closed):
            self.resolve(first, good)
            start = time.monotonic()
            self.assertEqual(self.get("http://wfm.test:1", timeout=support.LIMIT).body, b"here")
            self.assertLess(time.monotonic() - start, support.LIMIT / 2)

    def test_an_address_of_a_family_that_the_kernel_lacks_is_passed_over(self):
        """F-12: as IPv6 is, where it is not built in."""
        good = Server(self, answer("200 OK", b"here"))
        places = [(9999, socket.SOCK_STREAM, 6, "", ("::1", 1, 0, 0)), (socket.AF_INET, socket.SOCK_STREAM, 6, "", good.listener.getsockname())]
        with mock.patch.object(socket, "getaddrinfo", lambda *arguments, **options: places):
            self.assertEqual(self.get("http://wfm.test:1").body, b"here")
            places.pop()
            self.refuse(Unreachable, "http://wfm.test:1", os.strerror(errno.EAFNOSUPPORT))

    def test_only_dead_addresses_are_unreachable_within_one_time_out(self):
        """F-12: however many there are, and the words are those of the last."""
        silent, closed = self.make_silence(), ("127.0.0.1", support.free_port())
        self.resolve(*[silent] * 100)
        start = time.monotonic()
        self.refuse(Unreachable, "http://wfm.test:1", "timed out", timeout=1)
        self.assertLess(time.monotonic() - start, 90)
        self.resolve(closed, closed)
        self.refuse(Unreachable, "http://wfm.test:1", "refused")

    def test_nobody_there_is_unreachable(self):
        self.refuse(Unreachable, f"http://127.0.0.1:{support.free_port()}", "refused")

    def test_an_answer_that_breaks_off_is_unreachable(self):
        """C-106: half an answer is no answer."""
        table = {
            "closed without a word": (b"", "closed connection without response"),
            "cut body": (answer("200 OK", bytes(100))[:-40], "cut short, 40 bytes are missing"),
            "no body at all": (b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n", "cut short, 7 bytes are missing"),
            "cut in a chunk": (chunked(b"half", end=b"8\r\nhalf"), "IncompleteRead"),
            "no last chunk": (chunked(b"half", end=b""), "IncompleteRead"),
            "a chunk of unknown length": (chunked(b"half", end=b"zz\r\nhalf\r\n0\r\n\r\n"), "IncompleteRead")}
        for name, (data, word) in table.items():
            with self.subTest(name):
                self.refuse(Unreachable, data, word)

    def test_what_is_no_http_is_unreachable(self):
        table = {
            "another protocol": (b"SSH-2.0-OpenSSH_9.6\r\n", "SSH-2.0"),
            "a status that is no number": (b"HTTP/1.1 OK\r\n\r\n", "OK"),
            "a header line without end": (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70000 + b"\r\n\r\n", "65536"),
            "headers without end": (b"HTTP/1.1 200 OK\r\n" + b"X: x\r\n" * 200 + b"\r\n", "100 headers")}
        for name, (data, word) in table.items():
            with self.subTest(name):
                self.refuse(Unreachable, data, word)

    def test_what_the_server_says_cannot_forge_a_log_line(self):
        with self.assertRaises(Unreachable) as caught:
            self.fetch(b"HTTP\x1b[31m\rerror forged\r\n\r\n")
        self.assertEqual([c for c in caught.exception.message if not c.isprintable()], [])

    def test_a_reset_is_unreachable_wherever_it_comes(self):
        for data in (b"", b"HTTP/1.1 200 OK\r\nContent-", answer("200 OK", bytes(100))[:-40],
                     chunked(b"half", end=b"")):
            with self.subTest(data):
                self.refuse(Unreachable, reset_after(data), "reset")

    def test_a_stalled_server_is_unreachable_after_the_time_out(self):
        """D-32: every wait has a bound, also the one in the middle of an answer."""
        for data in (b"", b"HTTP/1.1 200", b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n", answer("200 OK", b"late")[:-2]):
            with self.subTest(data):
                self.refuse(Unreachable, stall_after(data), "timed out", timeout=0.2)

    def test_a_server_that_stalls_in_the_tls_handshake_is_unreachable(self):
        """D-32: the handshake is within the time-out too."""
        server = Server(self, stall_after(b""), rude=True)
        self.refuse(Unreachable, f"https://127.0.0.1:{server.port}", "timed out",
                    context=margo_agent.make_tls_context(), timeout=0.2)
        server.finish()
        self.assertEqual(server.connections, 1)


class Tls(TransportCase):
    def setUp(self):
        super().setUp()
        support.require("openssl")
        self.folder = support.make_pki()

    def path(self, name):
        return os.path.join(self.folder, name)

    def serve(self, name="site", versions=("TLSv1_2", "TLSv1_3")):
        """A TLS server with a certificate of the folder."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version, context.maximum_version = (getattr(ssl.TLSVersion, version) for version in versions)
        context.load_cert_chain(self.path(f"{name}.pem"), self.path(f"{name}.key"))
        return Server(self, answer("200 OK", b"secret"), context)

    def test_an_end_that_tls_does_not_tell_of_is_none(self):
        """F-10: a body without a length that ends with the connection alone was cut by the wire: it is no refused manifest."""
        head, context = b"HTTP/1.0 200 OK\r\n\r\n", margo_agent.make_tls_context(ca_file=self.path("site-ca.pem"))
        for told in (True, False):
            server = self.serve()

            def end(connection, over, told=told):
                connection.sendall(head + b"half")
                if told:
                    connection.unwrap()
                connection.shutdown(socket.SHUT_RDWR)

            server.serve = end
            if told:
                self.assertEqual(self.get(server, context=context).body, b"half")
            else:
                self.refuse(Unreachable, server, context=context)

    def test_what_is_damaged_on_its_way_is_unreachable(self):
        """A bit that a bad line turns, there or here, is no verdict on the peer."""
        context = margo_agent.make_tls_context(ca_file=self.path("site-ca.pem"))
        for there in (False, True):
            server = self.serve()

            def relay(connection, over, there=there, server=server):
                with socket.create_connection(("127.0.0.1", server.port)) as onward:
                    ends, seen = {connection: onward, onward: connection}, set()
                    while True:
                        for source in select.select(list(ends), [], [], 10)[0]:
                            data = bytearray(source.recv(65536))
                            if not data:
                                return
                            if source in seen and (source is connection) == there:      # behind the hello
                                data[-1] ^= 1
                            seen.add(source)
                            ends[source].sendall(data)
            damaged = Server(self, relay, rude=True)
            with self.subTest(there=there):
                self.refuse(Unreachable, f"https://localhost:{damaged.port}", "damaged on its way", context=context)

    def der(self, name):
        with open(self.path(f"{name}.pem")) as file:
            return ssl.PEM_cert_to_DER_cert(file.read())

    def assert_nothing_was_asked(self, server):
        server.finish()
        self.assertEqual((server.connections, server.heads), (1, []))

    def test_a_server_of_the_configured_authority_is_trusted(self):
        """C-030, C-032."""
        context = margo_agent.make_tls_context(ca_file=self.path("site-ca.pem"))
        self.assertEqual(self.get(self.serve(), context=context).body, b"secret")

    def test_a_server_of_another_authority_is_untrusted_before_a_request(self):
        """C-031, C-013: no trust on first use, and nothing is sent."""
        server = self.serve()
        self.refuse(Untrusted, server, "certificate is refused",
                    context=margo_agent.make_tls_context(ca_file=self.path("ca.pem")))
        self.assert_nothing_was_asked(server)

    def test_a_wrong_host_name_is_untrusted_before_a_request(self):
        """C-032: under PKI anchors the name counts."""
        server = self.serve("wfm")
        self.refuse(Untrusted, server, "certificate is refused", "localhost", context=margo_agent.make_tls_context(
            ca_file=self.path("ca.pem")))
        self.assert_nothing_was_asked(server)

    def test_an_svid_needs_no_host_name(self):
        """C-014: under the trust bundle's anchors the name does not count; check_peer decides who it is."""
        seen = []
        context = margo_agent.make_tls_context([self.der("ca")])
        self.assertEqual(self.get(self.serve("wfm"), context=context, check_peer=seen.append).body, b"secret")
        self.assertEqual(seen[0][0], self.der("wfm"))

    def test_an_address_that_shakes_no_hands_is_passed_over_once_it_is_known(self):
        """F-12: the next one is asked in its place, this time and the next; where there is no other, it is asked anew each time."""
        good, context = self.serve("wfm"), margo_agent.make_tls_context([self.der("ca")])
        mute = socket.socket()                      # its kernel takes connections, and nobody reads them
        mute.bind(("127.0.0.1", 0))
        mute.listen(16)
        self.addCleanup(mute.close)
        self.addCleanup(margo_agent.MUTE.clear)
        places = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", listener.getsockname()) for listener in (mute, good.listener)]
        with mock.patch.object(socket, "getaddrinfo", lambda *arguments, **options: places):
            for _ in range(2):
                self.assertEqual(self.get("https://wfm.test:1", context=context, timeout=2).body, b"secret")
            mute.setblocking(False)
            mute.accept()[0].close()
            self.assertRaises(BlockingIOError, mute.accept)
            places.pop()
            margo_agent.MUTE.clear()
            for _ in range(2):
                start = time.monotonic()
                self.refuse(Unreachable, "https://wfm.test:1", "timed out", context=context, timeout=1)
                self.assertLess(time.monotonic() - start, 60)
            for _ in range(2):
                mute.accept()[0].close()

    def test_the_next_process_knows_who_shakes_no_hands(self):
        """F-12: each poll is a process of its own; a note that is spoilt is none."""
        folder, place = support.make_folder(self), ("192.0.2.7", 443)
        config = margo_agent.make_config({"state_dir": f"{folder}/state", "wfm": {"url": "https://wfm.test"}, "identity": {
            "certificate": "c", "key": "k", "trust_bundle": "b"}}, folder, {})
        self.addCleanup(margo_agent.MUTE.clear)
        with mock.patch.dict(os.environ, {"RUNTIME_DIRECTORY": folder}):
            for before, after in (([], [place]), ([place], [place, ("::1", 443, 0, 0)]), ([place, ("::1", 443, 0, 0)], []), ([], [])):
                with margo_agent.Agent(config) as agent:
                    self.assertEqual(sorted(margo_agent.MUTE), before)
                    margo_agent.MUTE.clear()
                    margo_agent.MUTE.update(after)
                margo_agent.MUTE.clear()
            for spoilt in ([[{}, 1]], ["x"], 7, [["::1"]]):
                support.write(agent.store.memo_path(), json.dumps({"mute": spoilt}))
                with margo_agent.Agent(config):
                    self.assertEqual(margo_agent.MUTE, set())

    def test_a_peer_that_is_refused_gets_no_request(self):
        """C-013: check_peer comes before the first byte of the request, and what it raises comes out as it is."""
        fault = Untrusted("the peer is somebody else")

        def refuse(der):
            raise fault
        server = self.serve("wfm")
        with self.assertRaises(Untrusted) as caught:
            self.get(server, context=margo_agent.make_tls_context([self.der("ca")]), check_peer=refuse)
        self.assertIs(caught.exception, fault)
        self.assert_nothing_was_asked(server)

    def test_the_systems_store_does_not_help_where_anchors_are_given(self):
        """C-006, C-044: neither the trust bundle's anchors nor identity.ca are added to what the system trusts."""
        with mock.patch.dict(os.environ, {"SSL_CERT_FILE": self.path("site-ca.pem")}):
            self.assertEqual(self.get(self.serve(), context=margo_agent.make_tls_context()).body, b"secret")
            for context in (margo_agent.make_tls_context([self.der("ca")]),
                            margo_agent.make_tls_context(ca_file=self.path("ca.pem"))):
                server = self.serve()
                self.refuse(Untrusted, server, "certificate is refused", context=context)
                self.assert_nothing_was_asked(server)

    def test_tls_1_2_is_spoken_only_where_it_is_configured(self):
        """C-001, C-002, C-003: 1.3 by default, 1.2 as a fallback, nothing older at all."""
        server = self.serve(versions=("TLSv1_2", "TLSv1_2"))
        self.refuse(Untrusted, server, "TLS failed",
                    context=margo_agent.make_tls_context(ca_file=self.path("site-ca.pem")))
        self.assert_nothing_was_asked(server)
        for versions in (("TLSv1_2", "TLSv1_2"), ("TLSv1_3", "TLSv1_3")):
            context = margo_agent.make_tls_context(ca_file=self.path("site-ca.pem"), min_tls="1.2")
            self.assertEqual(self.get(self.serve(versions=versions), context=context).status, 200)
        self.assertEqual([margo_agent.make_tls_context(min_tls=least).minimum_version for least in ("1.3", "1.2")],
                         [ssl.TLSVersion.TLSv1_3, ssl.TLSVersion.TLSv1_2])

    def test_a_server_that_speaks_no_tls_is_not_asked_in_clear(self):
        """C-013."""
        received = []

        def serve(connection, over):
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            received.extend(iter(lambda: connection.recv(65536), b""))
        server = Server(self, serve, rude=True)
        self.refuse(Untrusted, f"https://127.0.0.1:{server.port}", "TLS failed", context=margo_agent.make_tls_context())
        server.finish()
        self.assertNotIn(b"GET", b"".join(received))

    def test_anchors_that_cannot_be_used_are_named(self):
        garbage = support.write(os.path.join(support.make_folder(self), "garbage.pem"), "no certificate")
        for options, word in (({"ca_file": garbage}, garbage), ({"ca_file": "/no/such.pem"}, "/no/such.pem"),
                              ({"anchors": [b"\x30\x03abc"]}, "of the trust bundle")):
            with self.subTest(word), self.assertRaises(Untrusted) as caught:
                margo_agent.make_tls_context(**options)
            self.assertIn(f"trust anchors {word}", caught.exception.message)


class Problems(unittest.TestCase):
    def parse(self, document):
        return margo_agent.parse_problem(document if isinstance(document, bytes) else json.dumps(document).encode())

    def test_what_is_no_problem_document_explains_nothing_and_breaks_nothing(self):
        """C-054: a missing or unreadable body leaves the status."""
        for body in (b"", b"<html>502 Bad Gateway</html>", b"null", b"[]", b'"text"', b"42", b"{", b"\xff\xfe{}",
                     b'{"title": NaN}',
                     b'{"type": "a", "type": "b"}', b"[" * 100000, b'{"title": "\xff"}'):
            with self.subTest(body[:30]):
                self.assertIsNone(self.parse(body))

    def test_a_whole_document_is_read(self):
        """C-050: protocol 3.7."""
        problem = self.parse({
            "type": TYPES + "semantic-error", "title": "Semantic Error", "status": 422, "detail": "see errors",
            "instance": "/api/v1/x",
            "retryable": False, "retryAfterSeconds": 30, "backoffStrategy": "exponential", "vendor": {"any": 1},
            "errors": [{"field": "properties.id", "message": "is missing"},
                       {"field": "labels", "message": "must be an object"}]})
        self.assertEqual(problem, margo_agent.Problem(
            "semantic-error", "Semantic Error", "see errors", False, 30.0, "exponential",
            ["properties.id: is missing", "labels: must be an object"]))

    def test_an_empty_object_says_nothing(self):
        self.assertEqual(self.parse({}), margo_agent.Problem(errors=[]))

    def test_the_older_error_object_is_read(self):
        """C-054: protocol 2.1, error and message."""
        problem = self.parse({"error": "Invalid certificate", "message": "expired"})
        self.assertEqual((problem.title, problem.detail), ("Invalid certificate", "expired"))

    def test_an_error_with_a_capital_is_read(self):
        """C-054, F7: what the open WFM of the signed generation says."""
        self.assertEqual(self.parse({"Error": "device ID mismatch"}).title, "device ID mismatch")
        self.assertEqual(self.parse({"Error": {"code": 7}}).title, "")

    def test_types_are_names_cut_to_their_last_part_for_margos_own(self):
        """C-053, C-054: both catalogues; what is not Margo's is left as it is."""
        for kind, name in (
                (TYPES + "invalid-bundle", "invalid-bundle"), (ROOT + "problems/invalid-client", "invalid-client"),
                ("about:blank", "about:blank"),
                ("https://vendor.example/problem-types#invalid-bundle",
                 "https://vendor.example/problem-types#invalid-bundle"),
                ("http://docs.margo.org/specification/problem-types#x",
                 "http://docs.margo.org/specification/problem-types#x"),
                ("https://docs.margo.org.evil.example/specification/#x",
                 "https://docs.margo.org.evil.example/specification/#x"), ("", "")):
            with self.subTest(kind):
                self.assertEqual(self.parse({"type": kind}).type, name)

    def test_members_of_a_wrong_type_are_left_out(self):
        """C-054: an odd document still explains what it can."""
        for value in (None, 7, True, [], {}, ["x"], {"a": "b"}):
            with self.subTest(value):
                problem = self.parse({"type": value, "title": value, "detail": value, "backoffStrategy": value})
                self.assertEqual((problem.type, problem.title, problem.detail, problem.strategy), ("", "", "", ""))
        for seconds in (None, "30", -1, True, -0.5, [], 10 ** 400):
            with self.subTest(seconds):
                self.assertIsNone(self.parse({"retryAfterSeconds": seconds}).retry_after)
        for errors in (None, "text", {"field": "x"}, 7, [], ["text", 7, None, []]):
            with self.subTest(errors):
                self.assertEqual(self.parse({"errors": errors}).errors, [])

    def test_foreign_text_cannot_forge_a_log_line_or_fill_the_log(self):
        problem = self.parse({"title": "a\nb\x1b[31m", "detail": "x" * 10000,
                              "errors": [{"field": "f\n", "message": "m\u2028" + "y" * 9000}]})
        for text in [problem.title, problem.detail] + problem.errors:
            self.assertTrue(text.isprintable(), text)
            self.assertLess(len(text), 600)
        self.assertEqual(problem.title, "a\\nb\\x1b[31m")


class Verdicts(unittest.TestCase):
    def judge(self, status, document=None, accepted=(200,), **headers):
        """What check_response makes of an answer: the exception, or the response."""
        message = email.message.Message()
        for name, value in headers.items():
            message[name.replace("_", "-")] = value
        body = document if isinstance(document, bytes) else b"" if document is None else json.dumps(document).encode()
        try:
            return margo_agent.check_response(Response(status, message, body), "GET it", NOW, accepted=accepted)
        except margo_agent.MargoError as error:
            self.assertTrue(error.message.startswith(f"GET it: HTTP {status}"), error.message)
            return error

    def test_what_is_accepted_comes_back(self):
        """C-102: 304 is success where the caller says so, and only there."""
        for status, accepted in ((200, (200,)), (304, (200, 304)), (404, (200, 404)), (201, (200, 201, 204))):
            self.assertEqual(self.judge(status, {"type": TYPES + "not-authorized"}, accepted).status, status)

    def test_the_status_decides_where_there_is_no_body(self):
        """C-054, C-057: protocol 10, and the contract's exit codes."""
        table = {
            Refused: (202, 206, 300, 301, 302, 304, 307, 308, 400, 404, 405, 406, 409, 410, 411, 413, 415, 422, 451),
            Untrusted: (401, 403), Unreachable: (408, 429, 500, 501, 502, 503, 504, 507, 511, 599)}
        for kind, statuses in table.items():
            for status in statuses:
                for body in (None, b"<html>", {}, {"type": "about:blank"}):
                    with self.subTest(status=status, body=body):
                        error = self.judge(status, body)
                        self.assertIs(type(error), kind)
                        self.assertEqual(error.exit, {Refused: 4, Untrusted: 5, Unreachable: 3}[kind])
                        if kind is Refused:
                            self.assertEqual(error.code, f"HTTP {status}")

    def test_a_redirect_names_what_to_set(self):
        """C-058."""
        for status in (301, 302, 303, 307, 308):
            self.assertIn("set wfm.url", self.judge(status, Location="https://elsewhere.example").message)
        self.assertNotIn("wfm.url", self.judge(400).message)

    def test_the_type_decides_over_the_status(self):
        """C-053: #not-authorized is that whatever the status, and other types are the code of the refusal."""
        for status in (400, 404, 406, 409, 422, 500, 503):
            for kind in (TYPES + "not-authorized", ROOT + "problems/not-authorized"):
                with self.subTest(status=status, kind=kind):
                    self.assertIs(type(self.judge(status, {"type": kind, "title": "Invalid Bundle"})), Untrusted)
        for name in ("invalid-request", "semantic-error", "gateway-not-found", "device-not-found",
                     "deployment-not-found", "invalid-bundle",
                     "server-cannot-generate-response"):
            for status in (400, 404, 406, 422):
                with self.subTest(status=status, name=name):
                    error = self.judge(status, {"type": TYPES + name, "title": "Not Authorized", "status": 403})
                    self.assertEqual((type(error), error.code), (Refused, name))

    def test_an_unknown_type_falls_back_to_the_status_and_is_told(self):
        """C-054."""
        kind = "https://vendor.example/quota"
        error = self.judge(409, {"type": kind, "title": "Quota", "detail": "used up"})
        self.assertEqual((type(error), error.code), (Refused, "HTTP 409"))
        self.assertIn(f"({kind}; Quota; used up)", error.message)
        self.assertEqual(self.judge(404, {"type": TYPES + "later-invention"}).code, "HTTP 404")
        self.assertIs(type(self.judge(503, {"type": kind})), Unreachable)
        self.assertIs(type(self.judge(403, {"type": kind})), Untrusted)

    def test_the_status_in_the_body_is_not_the_status(self):
        """C-053: the member `status` is advisory (RFC 9457, 3.1.2)."""
        self.assertIs(type(self.judge(503, {"status": 400})), Unreachable)
        self.assertIs(type(self.judge(400, {"status": 503})), Refused)

    def test_what_the_body_says_of_retrying_beats_the_table(self):
        """C-057: protocol 10, the 404 of the trust bundle says retryable."""
        for status, retryable, kind in (
                (404, True, Unreachable), (400, True, Unreachable), (302, True, Unreachable), (503, False, Refused),
                (429, False, Refused),
                (500, False, Refused), (403, True, Untrusted), (401, True, Untrusted), (404, "true", Refused),
                (404, 1, Refused),
                (503, "false", Unreachable), (503, 0, Unreachable), (503, None, Unreachable)):
            with self.subTest(status=status, retryable=retryable):
                self.assertIs(type(self.judge(status, {"retryable": retryable})), kind)

    def test_the_type_decides_over_401_and_403_too(self):
        """C-053: what is known not to be about this client's rights is not taken for it."""
        for status in (401, 403):
            self.assertEqual(self.judge(status, {"type": TYPES + "deployment-not-found"}).code, "deployment-not-found")
            for name in ("not-authorized", "certificate-not-trusted", "signature-verification-failed", "wfm-client-relationship-retired"):
                self.assertIs(type(self.judge(status, {"type": TYPES + name})), Untrusted)

    def test_a_number_of_seconds_may_have_a_fraction(self):
        """C-056: a server that writes 30.0 means it as much as one that writes 30."""
        for seconds in (30, 30.0, 1.5, 3e1):
            self.assertEqual(self.judge(503, {"retryAfterSeconds": seconds}).retry_after, float(seconds))

    def test_a_wait_beyond_all_measure_is_a_day(self):
        """C-056, F-08: a number too long to be meant is not taken for none, in the header or in the problem."""
        self.assertEqual(self.judge(503, Retry_After="99999999999999999999").retry_after, 86400)
        for seconds in (86401, 10 ** 9 - 1, 10 ** 14):
            self.assertEqual(self.judge(503, {"retryAfterSeconds": seconds}).retry_after, 86400)
        for parts in (1, 10 ** 3, 10 ** 6, 10 ** 9):                                # a clock of milliseconds, microseconds, nanoseconds
            moment = (NOW + 60) * parts
            self.assertAlmostEqual(self.judge(503, {"retryAfterSeconds": moment}).retry_after, 60, 3)
            self.assertAlmostEqual(self.judge(503, Retry_After=str(moment)).retry_after, 60, 3)

    def test_retry_after_is_read_in_both_forms_and_beats_the_body(self):
        """C-056: never earlier than the server says."""
        later = email.utils.formatdate(NOW + 90, usegmt=True)
        for status in (429, 503, 500, 408):
            for header, body, seconds in (
                    ("120", None, 120.0), (" 0 ", None, 0.0), (later, None, 90.0),
                    (email.utils.formatdate(NOW - 90, usegmt=True), None, 0.0),
                    (None, 5, 5.0), ("120", 5, 120.0), ("0", 5, 0.0), (later, 5, 90.0), ("soon", 5, 5.0),
                    ("soon", None, None),
                    ("-5", None, None), ("1.5", None, 1.5), ("1.5s", None, None), ("", 5, 5.0), (None, None, None), ("\u0663", 5, 5.0)):
                with self.subTest(status=status, header=header, body=body):
                    headers = {} if header is None else {"Retry_After": header}
                    error = self.judge(status, {} if body is None else {"retryAfterSeconds": body}, **headers)
                    self.assertIs(type(error), Unreachable)
                    self.assertEqual(error.retry_after, seconds)

    def test_a_date_that_no_calendar_has_is_unreadable(self):
        """C-056: such a Retry-After is none; it is neither a bug of the agent nor a wait of a million years."""
        for text in ("Wed, 21 Oct 10000 07:28:00 GMT", "Wed, 21 Oct 99999 07:28:00 GMT",
                     "Wed, 99999999999999999999 Oct 2026 07:28:00 GMT",
                     "Wed, 21 Oct 2026 07:28:00 -9999999999999999999999999999999999"):
            with self.subTest(text):
                self.assertEqual(self.judge(503, {"retryAfterSeconds": 7}, Retry_After=text).retry_after, 7.0)

    def test_the_message_tells_what_the_server_says(self):
        """C-054: title, detail and the first errors."""
        document = {"type": TYPES + "semantic-error", "title": "Semantic Error", "detail": "see errors",
                    "errors": [{"field": f"f{number}", "message": "is wrong"} for number in range(9)]}
        message = self.judge(422, document).message
        errors = "; ".join(f"f{number}: is wrong" for number in range(5))
        self.assertIn(f"(Semantic Error; see errors; {errors})", message)
        self.assertIn("Not Authorized); it is not for this device", self.judge(403, {"title": "Not Authorized"}).message)

    def test_a_problem_type_is_never_fetched(self):
        """C-055: neither it nor any other address in the document."""
        server = Server(self, answer("200 OK"))
        uri = server.url + "/problem"
        document = {"type": uri, "instance": uri, "title": uri, "detail": uri, "about": uri}
        for status in (400, 404, 503):
            self.judge(status, document, Location=uri, Link=f"<{uri}>; rel=help", Content_Location=uri)
        server.finish()
        self.assertEqual(server.connections, 0)
