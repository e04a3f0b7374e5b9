#!/usr/bin/env python3
"""What the builtin driver makes of a folder of compose files, beside Docker Compose.

    python3 -m tests.bench.compose FOLDER

Every *compose*.y(a)ml below FOLDER is read in a copy, in which files that it wants of its package and that are not there are made
empty; `${X:?}` has a value on both sides.  Those that `docker-compose config` takes are counted, each once:
under the default policy: accepted, refused by policy, for a key, for a form, for a file that is not there (what it mounts);
policy and what it mounts apart: readable, to be built first (a service with `build` and no `image`, and no other key refused),
refused for a key or form; and of the readable ones the misread, field by field.
"""
import collections
import os
import re
import shutil
import sys
import tempfile
import types

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import margo_agent  # noqa: E402
from tests import oracle  # noqa: E402

PROJECT = "bench"
STRICT = types.SimpleNamespace(privileged="deny", host_network="deny", host_paths=[], devices=[])
LENIENT = types.SimpleNamespace(privileged="allow", host_network="allow", host_paths=["/"], devices=[])
AT_ONCE = 4


def let_pass(*_):
    """What check_ways becomes where policy is judged apart."""


class Anything(margo_agent.Folder):
    """A folder in which, and a device on which, everything is there that may be mounted, and no engine's socket."""

    def look(self, name):
        found = super().look(name)
        return found if name == ".env" else found._replace(kind=found.kind or "folder", path=found.real, socket=False)


def find_files(folder):
    """Paths of compose files below a folder."""
    found = [os.path.join(place, name) for place, _, names in os.walk(folder) for name in names]
    return sorted(path for path in found if re.search(r"compose[^/]*\.ya?ml\Z", os.path.basename(path), re.I))


def prepare(path):
    """{variable: value} for what a file insists on; env files that it names and that are not there are made empty."""
    with open(path, "rb") as file:
        text = file.read()
    try:
        document = margo_agent.load_yaml(text)
        services = document["services"].values() if isinstance(document, dict) else ()
        items = [item for service in services for item in [service.get("env_file")] if item]
    except (margo_agent.YAMLError, AttributeError, KeyError):
        document, items = None, []
    items = [part for item in items for part in (item if isinstance(item, list) else [item])]
    names = [str(item.get("path") if isinstance(item, dict) else item) for item in items]
    for section in ("configs", "secrets"):
        facts = document.get(section) if isinstance(document, dict) else None
        names += [str(item.get("file")) for item in (facts.values() if isinstance(facts, dict) else ()) if isinstance(item, dict) and "file" in item]
    home = os.path.realpath(os.path.dirname(path))
    for name in names:
        place = os.path.normpath(os.path.join(home, name))
        if "$" not in name and place.startswith(home + "/") and not os.path.lexists(place):
            os.makedirs(os.path.dirname(place), exist_ok=True)
            open(place, "w").close()
    text = text.decode("utf-8", "replace")
    return dict.fromkeys(re.findall(r"\$\{(\w+):?\?", text) + re.findall(r"(?m)^ +environment: [\"']?(\w+)[\"']?$", text), "value")


def read(path, variables, policy, folder_class):
    """(Project or None, the fault or None, names of keys that are not supported)."""
    folder = os.path.realpath(os.path.dirname(path))
    workload = margo_agent.Workload("3f1d6f0e-5c35-4c9f-9b43-2f6f6c1f7a10", "bench", PROJECT, folder, variables, {}, True)
    unknown = []
    check_keys = margo_agent.check_keys
    margo_agent.check_keys = lambda found: (unknown.extend(found), check_keys(found))
    check_ways = margo_agent.check_ways
    margo_agent.check_ways = check_ways if policy is STRICT else let_pass
    try:
        with open(path, "rb") as file:
            document = margo_agent.load_yaml(file.read())
        return margo_agent.make_project(document, workload, policy, "podman", folder_class(folder)), None, unknown
    except (margo_agent.MargoError, margo_agent.YAMLError) as error:
        return None, error, unknown
    finally:
        margo_agent.check_keys, margo_agent.check_ways = check_keys, check_ways


def judge(fault, unknown):
    """The kind of a refusal."""
    if unknown:
        return "refused for a key"
    if getattr(fault, "code", "") == "POLICY_DENIED":
        return "refused by policy"
    return "refused for a file that is not there" if re.search("has no |is not a file of the archive", str(fault)) else "refused for a form"


def ask_all(paths, variables):
    """{path: what docker-compose prints, or None where it refuses the file}, a few at once."""
    answers = {}
    for start in range(0, len(paths), AT_ONCE):
        some = {path: oracle.start_config(os.path.dirname(path), variables[path], PROJECT, os.path.basename(path))
                for path in paths[start:start + AT_ONCE]}
        for path, process in some.items():
            try:
                answers[path] = oracle.end_config(process)
            except AssertionError:
                answers[path] = None
    return answers


def measure(folder):
    """(figures as Counters: kinds, keys in files, [lines about what is refused for a form or misread])."""
    paths = find_files(folder)
    variables = {path: prepare(path) for path in paths}
    answers = ask_all(paths, variables)
    kinds, keys, misread = (collections.Counter() for _ in range(3))
    lines = []
    for path in paths:
        name = os.path.relpath(path, folder)
        project, fault, unknown = read(path, variables[path], STRICT, margo_agent.Folder)
        if answers[path] is None or not answers[path].get("services"):
            kinds["refused by docker-compose" + (", not by us" if project else "")] += 1
            continue
        kinds["valid"] += 1
        kinds["  by default: " + ("accepted" if project else judge(fault, unknown))] += 1
        keys.update({key for _, key, _ in unknown})
        project, fault, unknown = read(path, variables[path], LENIENT, Anything)
        if fault:
            to_build = unknown and {key for _, key, _ in unknown} == {"build"}
            kinds["  apart from policy: " + ("to be built first" if to_build else judge(fault, unknown))] += 1
            lines += [] if to_build else [f"{name}: {str(fault)[:200]}"]
            continue
        kinds["  apart from policy: readable"] += 1
        home = os.path.realpath(os.path.dirname(path))
        wrong = oracle.find_differences(oracle.read_agent(project, home), oracle.read_compose(answers[path], PROJECT, home, variables[path]))
        kinds["  misread"] += bool(wrong)
        misread.update({field for _, field, _, _ in wrong})
        lines += [f"MISREAD {name}: {service}.{field}: {str(ours)[:150]}, right is {str(theirs)[:150]}" for service, field, ours, theirs in wrong]
    return kinds, keys, misread, lines


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    holder = tempfile.mkdtemp(prefix="margo-bench-")
    try:
        folder = os.path.join(holder, "files")
        shutil.copytree(sys.argv[1], folder, symlinks=True)
        kinds, keys, misread, lines = measure(folder)
    finally:
        shutil.rmtree(holder, ignore_errors=True)
    for kind, count in sorted(kinds.items()):
        print(f"{count:6} {100 * count / kinds['valid']:5.1f} % {kind}")
    print("keys that are not supported, by files:", ", ".join(f"{key} {count}" for key, count in keys.most_common()) or "none")
    print("misread fields, by files:", ", ".join(f"{key} {count}" for key, count in misread.most_common()) or "none")
    for line in lines:
        print(line)


if __name__ == "__main__":
    main()
