"""What profile git costs: an unchanged poll beside a plain `git ls-remote`, `git fetch` and the poll over mutual TLS; a first sync.

    python3 -m tests.bench.git [ROUNDS]

One deployment runs; the repository is served by `git http-backend` over https with a token.  CPU is that of the process with all that
it starts on this side (the engine's query excepted: a shell that prints one container takes its place), processes are what a shim
counts, bytes those that the server sent in the bodies of its answers.  Then the first sync and the next small change of a repository
of 200 deployments that are ineligible here, so that nothing but the source is measured, beside the same from the example WFM.
"""
import json
import os
import shutil
import statistics
import subprocess
import sys
import time

from tests import git_server, support
from tests.bench.poll import Cleanups, measure

COUNT = 200


def make_unfit(index):
    """A deployment that no device of ours has room for."""
    document = json.loads(support.make_deployment(support.HELLO[:-3] + f"{index:03x}", f"app-{index}"))
    document["spec"]["deploymentProfile"]["deviceConstraints"] = {"capacityRequirements": {"memory": "900000Gi"}}
    return json.dumps(document, indent=1)


def make_git_device(test, pki, repository, engine, wfm=None):
    """(server, device, token file) of a repository behind https."""
    server = git_server.GitServer(test, pki, repository.served, "Bearer token")
    token = support.write(os.path.join(repository.folder, "token"), "token", 0o600)
    return server, support.Device(test, pki, wfm, engine, url=f"{server.url}/fleet.git", settings={
        "wfm.profile": "git", "identity": {"ca": pki.path("site-ca.pem")}, "git.token_file": token})


def show_polls(test, pki, rounds):
    """The unchanged poll."""
    repository, wfm, engine = git_server.Repository(test), support.Wfm(test, pki), support.FakeEngine(test)
    wfm.add_package(support.make_compose())
    text = support.make_deployment(registry=wfm.registry)
    repository.commit({"hello.yaml": text})
    wfm.publish(text)
    server, device = make_git_device(test, pki, repository, engine, wfm)
    mutual = support.Device(test, pki, wfm, engine)
    for item in (mutual, device):
        item.cycle()
    (name, container), = engine.containers().items()
    listing = json.dumps([{"Id": container["id"], "Names": [name], "Labels": container["labels"], "State": "running", "ExitCode": 0}])
    support.write(os.path.join(engine.folder, "bin", "podman"), f"#!/bin/sh\necho '{listing}'\n", 0o755)

    clone, python = os.path.join(repository.folder, "clone"), shutil.which("python3")
    home = os.path.join(device.state_dir, "git")
    env = dict(device.env, HOME=home, GIT_CONFIG_NOSYSTEM="1")
    subprocess.run(["git", "clone", "--quiet", "--bare", f"{server.url}/fleet.git", clone], env=env, check=True)
    folder = support.make_folder(test)
    shutil.copy(support.AGENT, folder)
    subprocess.run([python, "-m", "compileall", "-q", folder], check=True)
    cached = [python, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {folder!r}); import margo_agent; sys.exit(margo_agent.main(sys.argv[1:]))"]
    commands = {
        "git ls-remote": (["git", "ls-remote", f"{server.url}/fleet.git", "refs/heads/main"], env),
        "git fetch, nothing new": (["git", "-C", clone, "fetch", "--quiet", "origin", "main"], env),
        "agent, profile git": (cached + ["-c", device.config_file, "run", "--once"], device.env),
        "agent, profile mtls": (cached + ["-c", mutual.config_file, "run", "--once"], mutual.env)}
    figures, sent = {name: [] for name in commands}, {}
    for _ in range(rounds):
        for name, (argv, environment) in commands.items():
            count = len(server.requests)
            figures[name].append(measure(argv, environment)[0])
            sent[name] = len(server.requests) - count, sum(item[3] for item in server.requests[count:])
    for name, (argv, environment) in commands.items():
        values = figures[name]
        print(f"{name:24} {statistics.median(values):6.1f} ms ({min(values):.1f} to {max(values):.1f})  {count_processes(test, argv, environment)} processes"
              f"  {sent[name][0]} requests, {sent[name][1]} bytes of answers from the Git server")


def count_processes(test, argv, env):
    """How many programs a command starts, itself included."""
    notes = os.path.join(support.make_folder(test), "trace")
    subprocess.run(["strace", "-f", "-qq", "-e", "trace=execve", "-e", "signal=none", "-o", notes] + argv, env=env, check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with open(notes) as file:
        return sum(line.rstrip().endswith("= 0") for line in file)


def show_sync(test, pki):
    """The first sync of many deployments, and one change in it."""
    for profile in ("git", "mtls"):
        engine, files = support.FakeEngine(test), {f"app-{index}.yaml": make_unfit(index) for index in range(COUNT)}
        if profile == "git":
            repository = git_server.Repository(test)
            repository.commit(files)
            server, device = make_git_device(test, pki, repository, engine)
        else:
            wfm = support.Wfm(test, pki)
            for index in range(COUNT):
                wfm.publish(files[f"app-{index}.yaml"], support.HELLO[:-3] + f"{index:03x}")
            device = support.Device(test, pki, wfm, engine)
        began = time.monotonic()
        device.run("plan", timeout=600)
        planned = time.monotonic() - began
        began = time.monotonic()
        device.run("run", "--once", timeout=600)
        print(f"{COUNT} deployments, {profile}: plan {planned:.1f} s, first run with {COUNT} reports {time.monotonic() - began:.1f} s")


def main():
    test = Cleanups()
    try:
        pki = support.Pki(test)
        show_polls(test, pki, int(sys.argv[1]) if len(sys.argv) > 1 else 15)
        show_sync(test, pki)
    finally:
        test.close()


if __name__ == "__main__":
    main()
