"""What hostile inputs cost: peak memory and processor time of each parser at the largest input that the default policy lets in.

    python3 -m tests.bench.costs [KIND ...]

A kind is a row of KINDS: what makes the input, and what reads it.  Each is read in a process of its own.  `start` is the memory of a
process that has only imported the agent; the limit that tests/test_small_devices.py holds is LIMIT for each of them.
"""
import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
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
            "refused": False, "components": [component], "fetched": [], "fallback": False, "retry": {}, "repair": {}}
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
    """A state of 10,000 deployments, each of which failed with the longest message there is, is written and read again."""
    with tempfile.TemporaryDirectory() as folder:
        store = margo_agent.Store(folder)
        state = make_state()
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
    "state.json: 10,000 long errors": (lambda: b"", write_state),
    "containers: 32 MiB of labels": (lambda: json.dumps([{"Id": f"{number}", "Names": ["n"], "Labels": {"a": "x" * 1000}, "State": "running"}
                                                         for number in range(30000)]).encode(), read_containers),
})


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
    else:
        print(f"{'input':34} {'KiB':>8} {'start':>6} {'peak':>6} {'s':>6}")
        for kind in arguments or KINDS:
            size, start, peak, seconds, words = run(kind)
            print(f"{kind:34} {size // KIB:8} {start:6.0f} {peak:6.0f} {seconds:6.1f}{' !' if peak > LIMIT else '  '} {words}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
