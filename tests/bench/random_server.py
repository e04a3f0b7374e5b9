"""The whole agent behind servers that answer at random, and whether it is none the worse for it.

    python3 -m tests.bench.random_server KIND CYCLES [SEED]         # KIND: mtls, signed-a, signed-b or est

Every request of a cycle goes to the real example servers (WFM, registry, identity service). Every other answer is spoilt on the way back: another
status, odd headers, changed, cut or missing bytes, the answer of another endpoint; the agent reads it from a socket like any other.
After each such cycle: no exit code but 0 to 5 and no traceback; what runs is what ran before or what the servers have wanted since, or nothing where
a manifest that the agent could not know to be spoilt says so.  After every few cycles the answers are left alone, and all has to be well again.
Exit code 1 where something was found.
"""
import contextlib
import io
import json
import os
import random
import socket
import sys
import traceback
from unittest import mock

import margo_agent
from tests import support
from tests.bench import fuzz
from tests.bench.poll import Cleanups

KINDS = ("mtls", "signed-a", "signed-b", "est")
STATUSES = [100, 101, 103, 200, 201, 202, 204, 206, 226, 300, 301, 302, 304, 307, 308, 400, 401, 403, 404, 405, 406, 408, 409, 410, 412, 413, 415, 416,
            418, 422, 425, 426, 429, 431, 451, 500, 501, 502, 503, 504, 507, 511, 599, 600, 999]
HEADERS = [(name, value) for name, values in {
    "ETag": ["", '"', '"a"', 'W/"a"', "x" * 5000, "a\r\n b", "\xff"], "Retry-After": ["0", "-1", "1", "1e9", "9" * 40, "Fri, 31 Dec 9999 23:59:59 GMT", "x"],
    "Location": ["", "/", "http://127.0.0.1:1/", "//", "https://[", "\xff", "x" * 5000], "Content-Encoding": ["gzip", "br"],
    "Docker-Content-Digest": ["sha256:" + "a" * 64, "sha256:", "x"], "Content-Type": ["", "text/html", "application/problem+json", "\xff"],
    "WWW-Authenticate": ["Basic", "Bearer", 'Bearer realm="', 'Bearer realm="http://127.0.0.1:1/t"', "Negotiate x", ","],
    "Content-Length": ["0", "-1", "5", "99999999999999999999", "x"], "Transfer-Encoding": ["chunked", "x"], "Connection": ["keep-alive", "upgrade"],
}.items() for value in values]
BODIES = [b"", b"\0", b"{}", b"[]", b"null", b"0", b'""', b"<html>", b"\xff\xfe", b"{" * 2000, b'{"type": 5}', b'{"token": "a\\nb"}', b'{"manifests": []}',
          b'{"type": "https://docs.margo.org/specification/x#device-unknown", "retryAfterSeconds": 1e12}', b'{"errors": [null, {}]}']
RECOVER = 5                         # cycles between two in which the answers are left alone


class Site:
    """The servers, an engine of files and a device of one kind, and what is wanted now."""

    def __init__(self, test, kind):
        self.kind = kind
        self.pki = support.Pki(test)
        self.mis = support.Mis(test, self.pki) if kind in ("mtls", "est") else None
        self.wfm = support.Wfm(test, self.pki, profile=kind if "signed" in kind else "mtls")
        self.engine = support.FakeEngine(test)
        self.device = support.Device(test, self.pki, self.wfm, self.engine)
        for tag in ("1.0.0", "1.1.0"):
            self.wfm.add_package(support.make_compose({"main": {"image": support.IMAGE, "environment": ["GREETING"]}}), tag=tag)
        self.wanted, self.tokens = 0, 0
        if self.mis:
            identity = dict(self.device.settings["identity"], discovery=self.mis.url + "/.well-known/margo", ca=self.pki.path("site-ca.pem"))
            identity.pop("trust_bundle")
            if kind == "est":
                folder = os.path.join(self.device.folder, "identity")
                identity.update(certificate=os.path.join(folder, "client.pem"), key=os.path.join(folder, "client.key"), enrollment="est",
                                est={"token_file": os.path.join(folder, "token")})
            self.device.settings["identity"] = identity
            self.device.save()
        self.change()

    def change(self):
        """Another desired state; every other time another package, and a device that has to enroll anew."""
        self.wanted += 1
        tag = "1.1.0" if self.wanted % 2 else "1.0.0"
        options = {"registry": self.wfm.registry, "components": (("web", tag),), "parameters": {"GREETING": str(self.wanted)}}
        dialect = self.wfm.dialect
        self.wfm.publish(support.make_signed_deployment(dialect, **options) if dialect else support.make_deployment(**options))
        if self.kind == "est":
            self.tokens += 1
            token = f"cell-{self.tokens}:s3cr:et"
            self.mis.add_token(token)
            identity = self.device.settings["identity"]
            support.write(identity["est"]["token_file"], token + "\n", 0o600)
            for name in ("certificate", "key"):
                with contextlib.suppress(OSError):
                    os.remove(identity[name])

    def run(self, *arguments):
        """(exit code, log) of a command of the agent in this process."""
        output = io.TextIOWrapper(io.BytesIO(), "utf-8", "surrogateescape")
        with mock.patch.dict(os.environ, self.device.env), contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            try:
                code = margo_agent.main(["-v", "-c", self.device.config_file, *arguments])
            except BaseException:
                traceback.print_exc()
                code = 70
        output.flush()
        return code, output.buffer.getvalue().decode("utf-8", "replace")

    def running(self):
        """The values of GREETING of the containers that run."""
        return [int(container["env"][0].partition("=")[2]) for container in self.engine.containers().values()]

    def load(self):
        """The files of the state: {path: bytes or None}."""
        return {path: margo_agent.read_file(path, 1 << 28) for path in (os.path.join(self.device.state_dir, name) for name in ("state.json", "state.json.old"))}


class Run:
    """Cycles of one kind and seed: how many, with which codes, and what was found."""

    def __init__(self, test, kind, seed):
        self.site, self.seed, self.chance = Site(test, kind), seed, random.Random(f"{kind} {seed}")
        self.request, self.connect = margo_agent.request, margo_agent.open_connection
        self.answers, self.codes, self.findings = [b"HTTP/1.1 200 OK\r\n\r\n"], {}, []
        self.spoilt = self.believed = 0

    def render(self, response):
        """An answer as bytes, spoilt in one or two ways."""
        chance = self.chance
        status, body = response.status, response.body
        headers = [(name, value) for name, value in response.headers.items() if name.lower() not in ("content-length", "transfer-encoding")]
        lies = False
        for _ in range(chance.choice((1, 1, 2))):
            kind = chance.randrange(8)
            if kind == 0:
                status = chance.choice(STATUSES)
            elif kind == 1:
                headers.append(chance.choice(HEADERS))
            elif kind == 2 and headers:
                del headers[chance.randrange(len(headers))]
            elif kind == 3:
                body = (fuzz.mutate_json if body[:1] == b"{" else fuzz.mutate_bytes)(chance, body, [b"x"], fuzz.MEMBERS)
            elif kind == 4:
                body, lies = body[:chance.randrange(len(body) + 1)], chance.random() < 0.5
            elif kind == 5:
                body = chance.choice(BODIES)
            elif kind == 6:
                return chance.choice(self.answers)
            else:
                data = b"HTTP/1.1 %d X\r\n\r\n" % status + body
                return fuzz.mutate_bytes(chance, data, self.answers, fuzz.HTTP_TOKENS)
        head = "".join(f"{name}: {value}\r\n" for name, value in headers).encode("latin-1", "replace")
        length = len(response.body) if lies else len(body)
        return b"HTTP/1.1 %d X\r\n%sContent-Length: %d\r\n\r\n" % (status, head, length) + body

    def answer(self, method, url, headers, body, context, timeout, limit, check_peer=None):
        """Takes the place of the agent's one door to HTTP."""
        response = self.request(method, url, headers, body, context, timeout, limit, check_peer)
        whole = b"HTTP/1.1 %d X\r\n\r\n" % response.status + response.body
        if len(self.answers) < 100:
            self.answers.append(whole)
        else:
            self.answers[self.chance.randrange(100)] = whole
        if self.chance.random() < 0.5:
            return response
        self.spoilt += 1
        ours, theirs = socket.socketpair()
        ours = fuzz.Local(fileno=ours.detach())
        ours.settimeout(5)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)
        theirs.setblocking(False)
        with theirs, ours, mock.patch.object(margo_agent, "open_connection", lambda *_: ours):
            theirs.send(self.render(response))
            theirs.shutdown(socket.SHUT_WR)
            return self.request(method, "http" + url[url.index(":"):], headers, body, None, 5, limit)

    def note(self, words, log):
        """Keeps a finding."""
        self.findings.append(f"cycle {sum(self.codes.values())}: {words}\n{log[-700:]}")

    def spoil(self):
        """One cycle in which answers are spoilt."""
        site, before = self.site, self.site.running()
        if self.chance.random() < 0.3:
            site.change()
        with mock.patch.object(margo_agent, "request", self.answer):
            code, log = site.run("run", "--once")
        self.codes[code] = self.codes.get(code, 0) + 1
        if code not in range(6) or "Traceback" in log:
            self.note(f"exit code {code}", log)
        now = site.running()
        if len(now) > 1 or now and not min(before, default=0) <= now[0] <= site.wanted:
            self.note(f"{before} ran, {site.wanted} is wanted, and {now} runs", log)
        state = json.loads(site.load()[os.path.join(site.device.state_dir, "state.json")] or b"{}")
        if before and not now and any(item["deploymentId"] == support.HELLO for item in (state["accepted"] or {}).get("deployments", ())):
            self.note("what ran was removed although it is in the accepted manifest", log)
        site.run("retry")

    def recover(self, files, members):
        """Cycles in which the answers are left alone, until all is well; what the agent was made to believe is taken back where it has to be."""
        site = self.site
        for attempt in range(8):
            code, log = site.run("run", "--once")
            if code == 0 and site.running() == [site.wanted]:
                return
            site.run("retry")
            if attempt == 3:
                state = json.loads(site.load()[os.path.join(site.device.state_dir, "state.json")] or b"{}")
                if members == [state.get(name) for name in ("client", "accepted", "enrollment", "trust", "est")]:
                    break
                self.believed += 1
                for path, data in files.items():
                    if data is None:
                        with contextlib.suppress(OSError):
                            os.remove(path)
                    else:
                        margo_agent.write_file(path, data)
        self.note(f"it does not come back to rights: exit code {code}, {site.running()} runs", log)

    def go(self, cycles):
        """So many cycles with spoilt answers."""
        while sum(self.codes.values()) < cycles and len(self.findings) < 20:
            files = self.site.load()
            state = json.loads(files[os.path.join(self.site.device.state_dir, "state.json")] or b"{}")
            for _ in range(RECOVER):
                self.spoil()
            self.recover(files, [state.get(name) for name in ("client", "accepted", "enrollment", "trust", "est")])
        return self


def main(arguments):
    """See the module's docstring."""
    kind, cycles, seed = arguments[0], int(arguments[1]), int(arguments[2]) if arguments[2:] else 1
    test = Cleanups()
    try:
        run = Run(test, kind, seed).go(cycles)
    finally:
        test.close()
    print(f"{kind}: {sum(run.codes.values())} cycles of seed {seed}, {run.spoilt} answers spoilt, exit codes {dict(sorted(run.codes.items()))},"
          f" {run.believed} times something false was believed and taken back, {len(run.findings)} findings")
    print("\n".join(run.findings))
    return 1 if run.findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
