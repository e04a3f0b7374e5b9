"""What hostile inputs cost: peak memory and processor time of each parser at the largest input that the default policy lets in.

    python3 -m tests.bench.costs [KIND ...]

A kind is a row of KINDS: what makes the input, and what reads it.  Each is read in a process of its own.  `start` is the memory of a
process that has only imported the agent; the limit that tests/test_small_devices.py holds is LIMIT for each of them.
A row of SERVED is a server and what asks it: the peak is that of the agent and its helpers together, each page counted once, `s` is the
time that passed.
"""
import contextlib
import gzip
import io
import json
import os
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time

import margo_agent

KIB, MIB = 1 << 10, 1 << 20
LIMIT = 128                         # MiB that reading one input may take in all
DOCUMENT, ARTIFACT, UNPACKED = 8 * MIB, 64 * MIB, 256 * MIB     # the default policy
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
ID = "3f1d6f0e-5c35-4c9f-9b43-{:012x}"
DIGEST = "sha256:" + "a" * 64


def fill(piece, size=DOCUMENT, before="", after=""):
    """As many copies of a piece as make a document of a size."""
    return (before + piece * ((size - len(before) - len(after)) // len(piece)) + after).encode()


def make_manifest(extra=""):
    """A state manifest of as many deployments as there may be."""
    items = [{"deploymentId": ID.format(number), "digest": DIGEST, "sizeBytes": 1, "extra": extra,
              "url": f"/api/v1/deployments/{ID.format(number)}/{DIGEST}"} for number in range(margo_agent.MAX_DEPLOYMENTS)]
    bundle = {"mediaType": margo_agent.BUNDLE_TYPE, "digest": DIGEST, "url": f"/api/v1/bundles/{DIGEST}"}
    return json.dumps({"manifestVersion": 1, "bundle": bundle, "deployments": items}).encode()


def make_tar(entries):
    """A tar+gzip of [(name, size, byte)]."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz", compresslevel=1) as archive:
        for name, size, byte in entries:
            info = tarfile.TarInfo(name)
            info.size = size
            archive.addfile(info, io.BytesIO(byte * size))
    return stream.getvalue()


def make_package(*entries):
    """A package with a compose file and [(name, size, byte)]."""
    return make_tar([("app/compose.yaml", 1, b"\n"), *entries])


def make_state():
    """A state of 10,000 deployments, each of which failed with the longest message there is."""
    state = margo_agent.make_state()
    for number in range(margo_agent.MAX_DEPLOYMENTS):
        key = ID.format(number)
        error = {"code": "INSTALL_FAILED", "source": "", "message": f"{number}" * 800}
        component = {"name": "web", "state": "failed", "error": error, "services": {}, "package": None}
        state["deployments"][key] = {
            "deploymentId": key, "name": f"app-{number}", "deviceId": "d", "type": "compose", "state": "failed",
            "adopted": {"digest": DIGEST, "version": 1}, "error": error, "running": None, "previous": None,
            "refused": False, "components": [component], "fetched": [], "fallback": False, "found": False, "retry": {},
            "repair": {}}
        state["outbox"][key] = margo_agent.make_status(state["deployments"][key])
    return state


def read_package(data):
    """A package, unpacked to a folder that goes again."""
    with tempfile.TemporaryDirectory() as folder:
        margo_agent.unpack_package(data, margo_agent.sha256_digest(data), folder, UNPACKED)


def read_bundle(data):
    """A bundle of documents that no manifest names."""
    margo_agent.parse_bundle(data, [margo_agent.ManifestEntry(ID, DIGEST, 1)], UNPACKED)


def read_manifest(data):
    margo_agent.parse_manifest(data, "https://wfm.example")


def read_deployment(data):
    margo_agent.parse_deployment(data, ID.format(0))


def write_state(data):
    """A state of 10,000 deployments, each of which failed with the longest message there is, is written and read again.

    data: the deviceId of all; one that is no text makes the state and its copy unreadable.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = margo_agent.Store(folder)
        state = make_state()
        for record in state["deployments"].values():
            record["deviceId"] = json.loads(data)
        store.save_state(state)
        del state, store
        margo_agent.Store(folder).load_state()


def read_containers(data):
    margo_agent.parse_containers(data, "podman")


YAML = {
    "line ends": lambda: fill("\n"), "comments": lambda: fill("#\n"), "quoted line ends": lambda: fill("\n ", before='a: "', after='"'),
    "escapes": lambda: fill("\\a", before='a: "', after='"'), "words in quotes": lambda: fill("a ", before='a: "', after='"'),
    "numbers": lambda: fill("1,", before="[", after="]"), "empty lists": lambda: fill("[],", before="[", after="]"),
    "pairs": lambda: fill("a: ,", before="[", after="]"), "a literal's lines": lambda: fill(" x\n", before="a: |\n"),
    "long literal": lambda: fill(" " + "x" * 98 + "\n", before="a: |\n"), "folded": lambda: fill(" " + "x y" * 16 + "\n", before="a: >\n"),
    "plain lines": lambda: fill("  b\n", before="a:\n"), "long plain lines": lambda: fill("  " + "bc " * 16 + "\n", before="a:\n"),
    "long text and aliases": lambda: fill("*a,", before="a: &a " + "x" * MIB + "\nb: [", after="]"),
    "anchors": lambda: "".join(f"- &k{number} v\n" for number in range(600000)).encode(),
    "keys": lambda: "".join(f"k{number}: v\n" for number in range(600000)).encode(),
    "merges": lambda: ("a: &a {" + ",".join(f"k{number}: 1" for number in range(9999)) + "}\n").encode() + fill("- {<<: *a}\n", before="b:\n"),
    "brackets": lambda: fill("["), "dashes": lambda: fill("- "), "astral": lambda: fill("\U0001f600", DOCUMENT // 4, before="a: "),
}
KINDS = {f"YAML: {name}": (make, margo_agent.load_yaml) for name, make in YAML.items()}
KINDS.update({
    "manifest: 10,000 deployments": (make_manifest, read_manifest),
    "manifest: 10,000, long": (lambda: make_manifest("x" * 500), read_manifest),
    "manifest: empty lists": (lambda: fill("[],", before='{"a": [', after="0]}"), read_manifest),
    "manifest: empty objects": (lambda: fill("{},", before='{"a": [', after="0]}"), read_manifest),
    "manifest: members": (lambda: ('{"a":1' + "".join(f',"{number}":{{}}' for number in range(500000)) + "}").encode(), read_manifest),
    "manifest: digits": (lambda: fill("1", before='{"manifestVersion": ', after="}"), read_manifest),
    "document: list of lists": (lambda: fill("[],", before="[", after="0]"), read_deployment),
    "bundle: zeros": (lambda: make_tar([("a", UNPACKED - 20 * KIB, b"\0")]), read_bundle),
    "bundle: entries": (lambda: make_tar([(f"{number}", 0, b"") for number in range(40000)]), read_bundle),
    "package: zeros": (lambda: make_package(("app/z", UNPACKED - 20 * KIB, b"\0")), read_package),
    "package: more zeros": (lambda: make_package(("app/z", 2 * UNPACKED, b"\0")), read_package),
    "package: files": (lambda: make_package(*[(f"app/{number}", 1, b"x") for number in range(9000)]), read_package),
    "gzip of gzip": (lambda: gzip.compress(gzip.compress(bytes(UNPACKED))), read_package),
    "state.json: 10,000 long errors": (lambda: b'"d"', write_state),
    "state.json: the same, of a wrong form in its copy, too": (lambda: b"0", write_state),
    "containers: 24 MiB of labels": (lambda: json.dumps([{"Id": f"{number}", "Names": ["n"], "Labels": {"a": "x" * 1000}, "State": "running"}
                                                         for number in range(23000)]).encode(), read_containers),
})


class Answers:
    """A plain HTTP server that sends the pieces which a function yields, and closes."""

    def __init__(self, test, pieces):
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(20)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.serve, args=(pieces,), daemon=True).start()
        test.addCleanup(self.listener.close)

    def serve(self, pieces):
        """Answers one after the other until it is closed."""
        with contextlib.suppress(OSError):
            while True:
                peer, _ = self.listener.accept()
                with peer, contextlib.suppress(OSError):
                    peer.recv(65536)
                    for piece in pieces():
                        peer.sendall(piece)


def repeat(start, piece, pause=0.0):
    """The pieces of an answer that never ends: its start, then the same over and over."""
    def pieces():
        yield start
        while True:
            time.sleep(pause)
            yield piece
    return pieces


def make_headers():
    """98 headers of nearly 64 KiB; made when they are served, for a process that reads must not hold them."""
    return b"".join(b"X-%03d: %s\r\n" % (number, b"x" * 65000) for number in range(98))


OK, CHUNKED = b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
ANSWERS = {
    "a head that drips": repeat(OK, b"X", 0.05), "headers that drip": repeat(OK, b"X: y\r\n", 0.05),
    "a status line without end": repeat(b"HTTP/1.1 200 ", b"x" * 65536), "a header without end": repeat(OK + b"X: ", b"x" * 65536),
    "headers without end": repeat(OK, b"X: y\r\n" * 1000), "98 headers of 64 KiB": lambda: [OK + make_headers() + b"\r\nabc"],
    "a body that drips": repeat(OK + b"\r\n", b"x" * 40, 0.05), "a body without end": repeat(OK + b"\r\n", b"x" * 65536),
    "a body of a length that lies": lambda: [OK + b"Content-Length: 999999999999\r\n\r\nabc"],
    "a body of the longest kind": lambda: [OK + b"Content-Length: %d\r\n\r\n" % DOCUMENT, bytes(DOCUMENT)],
    "chunks of 16 bytes": repeat(CHUNKED, (b"10\r\n" + b"x" * 16 + b"\r\n") * 3000), "chunks that drip": repeat(CHUNKED, b"0", 0.05),
    "chunk extensions without end": repeat(CHUNKED + b"1;", b"x" * 65536),
    "chunks with extensions of 60 KiB": repeat(CHUNKED, b"1;" + b"x" * 61440 + b"\r\nx\r\n"),
    "a chunk of 2 ** 64": repeat(CHUNKED + b"ffffffffffffffff\r\n", b"x" * 65536), "trailers without end": repeat(CHUNKED + b"0\r\n", b"A: b\r\n" * 1000),
    "interim answers without end": repeat(b"", b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n" * 100),
    "interim answers that drip": repeat(b"", b"HTTP/1.1 102 Processing\r\n\r\n", 0.05),
    "interim answers with large heads": lambda: repeat(b"", b"HTTP/1.1 103 Early Hints\r\n" + make_headers() + b"\r\n")(),
    "redirects in a circle": lambda: [b"HTTP/1.1 307 X\r\nLocation: /v2/x/manifests/1\r\nContent-Length: 0\r\n\r\n"],
    "redirects with large heads": lambda: [b"HTTP/1.1 307 X\r\nLocation: /v2/x/manifests/1\r\n" + make_headers() + b"\r\n"],
    "a login that is asked for again and again": lambda: [b"HTTP/1.1 401 X\r\nWWW-Authenticate: Bearer realm=\"http://127.0.0.1:1/\"\r\n\r\n"],
    "a challenge of 64 KiB": lambda: [b"HTTP/1.1 401 X\r\nWWW-Authenticate: " + b"a b=," * 13000 + b"\r\n\r\n"],
}
TIMEOUT = 1                         # seconds of wfm.timeout where an answer is measured


def ask_http(url, folder):
    """One answer, as of a WFM."""
    return f"HTTP {margo_agent.request('GET', url, {}, None, None, TIMEOUT, DOCUMENT).status}"


def make_config(folder, **settings):
    """A configuration of the agent in a folder."""
    path = os.path.join(folder, "agent.yaml")
    with open(path, "w") as file:
        json.dump(dict({"state_dir": os.path.join(folder, "state")}, **settings), file)
    return margo_agent.load_config(path, os.environ)


def ask_registry(url, folder):
    """One answer, as of a registry that may redirect and ask for a login."""
    host = url.split("/")[2]
    config = make_config(folder, wfm={"url": "https://wfm.example", "timeout": TIMEOUT}, registries={host: {"insecure": True}},
                         identity={"certificate": "a", "key": "b", "trust_bundle": "c"})
    return margo_agent.Registry(host, config).get("x", "manifests/1", "*/*", DOCUMENT).status


def ask_git(url, folder):
    """The desired state of a repository, for the first time."""
    config = make_config(folder, wfm={"url": url + "/fleet.git", "timeout": "10s", "profile": "git"}, identity={"ca": os.environ["MARGO_CA"]})
    store = margo_agent.Store(config.state_dir)
    desired = margo_agent.Git(config, store, margo_agent.make_state()).connect().fetch_desired(None, store.load_artifact)
    return f"{len(desired.entries)} deployments"


def serve_bomb(name):
    """A function that starts a server of a bomb; it needs a PKI."""
    def start(test, pki):
        from tests import git_bombs
        server = git_bombs.BombServer(test, pki, "/nonexistent")
        server.bomb = git_bombs.BOMBS[name]()
        return server.url
    return start


def serve_repository(fill):
    """A function that starts a server of a real repository, which `fill` has filled."""
    def start(test, pki):
        from tests import git_server
        repository = git_server.Repository(test)
        fill(repository)
        return git_server.GitServer(test, pki, repository.served).url
    return start


def make_documents(repository, size, piece, before, after, count=1):
    """Commits documents of a size."""
    data = fill(piece, size, before, after).decode()
    repository.commit({f"{number}.yaml": data + "\n" * number for number in range(count)})


def fill_packs(repository):
    """Many branches, each with a pack of its own."""
    head = repository.commit({"a.yaml": "a: 1\n"})
    from tests import support
    lines = [f"{head} refs/heads/{number:07}" for number in range(1000000)]
    support.write(os.path.join(repository.bare, "packed-refs"), "# pack-refs with: peeled fully-peeled sorted\n" + "\n".join(lines) + f"\n{head} refs/heads/main\n")


SERVED = {f"HTTP: {name}": (lambda test, pki, pieces=pieces: Answers(test, pieces).url,
                            ask_registry if "redirect" in name or "login" in name or "challenge" in name else ask_http)
          for name, pieces in ANSWERS.items()}
BOMBS = ["one delta of 64 MiB", "one delta of 255 MiB", "one blob of 255 MiB", "one document of 255 MiB", "a message of 200 MiB", "a message of 30 MiB",
         "a tree of 1,000,000", "a tree of 100,000", "a tree of 10,000 documents", "trees of 10 ** 12 paths", "100,000 levels", "3,000 levels",
         "1,000,000 objects", "100,000 objects", "a pack that says 4 billion objects", "1,000,000 refs", "1,000,000 refs that match", "endless refs"]
SERVED.update({f"git: {name}": (serve_bomb(name), ask_git) for name in BOMBS})
SERVED.update({
    "git: real, 4 documents of 8 MiB": (serve_repository(lambda home: make_documents(home, DOCUMENT - 10, "\\a", 'a: "', '"\n', 4)), ask_git),
    "git: real, 5 documents of 8 MiB": (serve_repository(lambda home: make_documents(home, DOCUMENT - 10, "\\a", 'a: "', '"\n', 5)), ask_git),
    "git: real, 1,000,000 refs": (serve_repository(fill_packs), ask_git),
})


def find_tree(root):
    """The process ids of a process and all below it."""
    below = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            with open(f"/proc/{name}/stat") as file:
                below.setdefault(int(file.read().rpartition(")")[2].split()[1]), []).append(int(name))
    found = [root]
    for item in found:
        found += below.get(item, [])
    return found


def read_share(process):
    """The memory of a process in MiB, a page that several have counted in parts; 0 where it has gone."""
    with contextlib.suppress(OSError, StopIteration):
        with open(f"/proc/{process}/smaps_rollup") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("Pss:")) / KIB
    return 0.0


def run_served(kind):
    """As `run`, of a row of SERVED."""
    from tests import support
    from tests.bench.poll import Cleanups
    test = Cleanups()
    try:
        pki = support.Pki(test)
        url = SERVED[kind][0](test, pki)
        peak = 0.0
        env = dict(os.environ, MARGO_CA=pki.path("site-ca.pem"), no_proxy="*")
        child = subprocess.Popen([sys.executable, "-m", "tests.bench.costs", "ask", kind, url], cwd=ROOT, env=env, stdout=subprocess.PIPE)
        while child.poll() is None:
            peak = max(peak, sum(map(read_share, find_tree(child.pid))))
            time.sleep(0.01)
        began, start, words = json.loads(child.communicate()[0])
        return 0, start, max(peak, start), time.time() - began, words
    finally:
        test.close()


def ask(kind, url):
    """Prints when a row of SERVED was begun, MiB at start, and what came of it."""
    began, start = time.time(), read_peak()
    with tempfile.TemporaryDirectory() as folder:
        try:
            words = SERVED[kind][1](url, folder)
        except margo_agent.MargoError as error:
            words = f"{error.code}: {error.message}"
    print(json.dumps([began, start, words.replace(url, "")[:110]]))


def read_peak():
    """The peak memory of this program in MiB.

    `getrusage` does not do: it counts what the process was before it became this program, and a test run is large.
    """
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM:")) / KIB


def measure(kind, path):
    """Prints what reading an input took: MiB at start, MiB at the peak, seconds, and what came of it."""
    with open(path, "rb") as file:
        data = file.read()
    start = read_peak() - len(data) / MIB
    before, held = time.process_time(), [data]
    del data
    try:
        KINDS[kind][1](held.pop())
        words = "read"
    except (margo_agent.MargoError, ValueError) as error:
        words = str(error)[:90]
    peak = read_peak()
    print(json.dumps([start, peak, time.process_time() - before, words]))


def run(kind):
    """(bytes of the input, MiB at start, MiB at the peak, seconds, words) of a kind, read in a process of its own."""
    if kind in SERVED:
        return run_served(kind)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "input")
        for step in ("make", "read"):
            done = subprocess.run([sys.executable, "-m", "tests.bench.costs", step, kind, path], cwd=ROOT, stdout=subprocess.PIPE, check=True)
        return (os.path.getsize(path), *json.loads(done.stdout))


def main(arguments):
    if arguments[:1] == ["make"]:
        with open(arguments[2], "wb") as file:
            file.write(KINDS[arguments[1]][0]())
    elif arguments[:1] == ["read"]:
        measure(*arguments[1:])
    elif arguments[:1] == ["ask"]:
        ask(*arguments[1:])
    else:
        print(f"{'input':40} {'KiB':>8} {'start':>6} {'peak':>6} {'s':>6}")
        for kind in arguments or [*KINDS, *SERVED]:
            size, start, peak, seconds, words = run(kind)
            print(f"{kind:40} {size // KIB:8} {start:6.0f} {peak:6.0f} {seconds:6.1f}{' !' if peak > LIMIT else '  '} {words}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
