#!/usr/bin/env python3
"""How fast load_yaml reads beside PyYAML's SafeLoader in pure Python, and what each makes of the public YAML suite.

    python3 tests/bench/yaml_speed.py [SECONDS]

SECONDS is how long each reader reads each document (default 1).  tests/support.py says where the suite is looked for.
"""
import glob
import os
import sys
import time
import warnings

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import margo_agent  # noqa: E402
from tests import test_encodings as encodings  # noqa: E402

CORPUS = os.path.join(encodings.CORPUS, "valid")


def make_documents():
    """{name: text}: a deployment, a compose file, a large block document, the same as JSON-like flow, long texts."""
    documents = {}
    for name in ("deployment", "compose"):
        with open(os.path.join(CORPUS, f"{name}.yaml"), encoding="utf-8") as file:
            documents[name] = file.read()
    items = [(number, f"component-{number}") for number in range(500)]
    documents["500 blocks"] = "".join(f"- name: {name}\n  properties:\n    repository: oci://registry.example/{name}\n"
                                      f"    revision: \"1.{number}\"\n    ports: [80, {number}]\n" for number,
                                      name in items)
    documents["500 in flow"] = "[" + ",\n ".join(
        f'{{"name": "{name}", "revision": "1.{number}", "ports": [80, {number}]}}' for number, name in items) + "]\n"
    documents["long texts"] = "".join(f"text-{number}: |\n" + "  a line of some length, as in a script or a file\n" * 50
                                      for number in range(20))
    return documents


def measure(load, text, seconds):
    """Mean seconds of one reading."""
    load(text)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        load(text)
        count += 1
    return (time.perf_counter() - start) / count


def judge(load):
    """(read, misread, refused) of the suite's valid single documents, and (accepted, all) of its invalid ones."""
    read = misread = refused = accepted = invalid_all = 0
    for _, text, tree, _, invalid in encodings.load_suite():
        was_read, value = encodings.read_case(text, load, Exception)
        events = encodings.Events(tree)
        if invalid:
            invalid_all += 1
            accepted += was_read
        elif events.count == 1:
            try:
                expected = events.read()
            except encodings.NotSupported:
                refused += not was_read                     # no JSON-like value: foreign tags, keys that are no scalars
                continue
            read += was_read
            refused += not was_read
            misread += was_read and not (encodings.is_plain(value) and encodings.is_same(value, expected))
    return read, misread, refused, accepted, invalid_all


def main():
    """Prints both tables."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
    readers = {"load_yaml": margo_agent.load_yaml}
    try:
        import yaml
        readers["PyYAML"] = lambda text: yaml.load(text, Loader=yaml.SafeLoader)
    except ImportError:
        print("PyYAML is not installed; load_yaml alone\n")
    warnings.simplefilter("ignore")

    print(f"{'document':14}{'bytes':>8}" + "".join(f"{name + ' ms':>16}"
                                                   for name in readers) + f"{'times as fast':>16}")
    for name, text in make_documents().items():
        times = [measure(load, text, seconds) for load in readers.values()]
        columns = "".join(f"{each * 1000:16.3f}" for each in times)
        print(f"{name:14}{len(text.encode()):8}{columns}{times[-1] / times[0]:16.1f}")

    if not glob.glob(os.path.join(encodings.SUITE, "*.js")):
        print("\nThe YAML suite is not installed (see .ci/run)")
        return
    print(f"\n{'suite':14}{'read':>8}{'misread':>10}{'refused':>10}{'invalid ones accepted':>24}")
    for name, load in readers.items():
        read, misread, refused, accepted, invalid_all = judge(load)
        print(f"{name:14}{read:8}{misread:10}{refused:10}{f'{accepted} of {invalid_all}':>24}")
    print("Misread is a value other than the one that YAML 1.2's core schema gives; PyYAML reads by YAML 1.1.")


if __name__ == "__main__":
    main()
