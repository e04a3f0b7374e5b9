"""How long an HTTP service is away during an update, beside `docker-compose pull && docker-compose up --detach`.

    python3 -m tests.bench.downtime [ROUNDS]

One service on a real podman answers with its revision.  A client asks it over and over, a new connection each time; the downtime is the time
from the last good answer of the old revision to the first of the new one.  Agent and Docker Compose v2 (on podman's API socket) in turn.
Two updates: another environment on the same image, and another image, which is on the device already for both.
"""
import http.client
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
import urllib.request

from tests import support
from tests.bench.poll import Cleanups

SERVE = "mkdir -p /tmp/www && echo $$REVISION > /tmp/www/index.html && exec httpd -f -p 8080 -h /tmp/www"
OTHER = "localhost/margo-test:2"


class Client(threading.Thread):
    """Asks a port over and over; `seen`: [(time, answer)] of the good answers."""

    def __init__(self, port):
        super().__init__(daemon=True)
        self.url, self.seen, self.done = f"http://127.0.0.1:{port}/", [], False
        self.start()

    def run(self):
        while not self.done:
            try:
                with urllib.request.urlopen(self.url, timeout=0.5) as answer:
                    self.seen.append((time.monotonic(), answer.read().decode().strip()))
            except (OSError, http.client.HTTPException):
                pass
            time.sleep(0.005)

    def wait_for(self, revision):
        """Waits for an answer of this revision; milliseconds since the last one of another, and since `start`."""
        support.wait_for(lambda: self.seen and self.seen[-1][1] == revision, 60, revision)
        first = next(at for at, answer in self.seen if answer == revision)
        before = [at for at, answer in self.seen if answer != revision and at < first]
        return (first - before[-1]) * 1000 if before else 0.0


def make_file(port, revision, image):
    """The compose file of a revision."""
    return support.make_compose({"main": {"image": image, "init": True, "command": ["sh", "-c", SERVE], "environment": {"REVISION": revision},
                                          "ports": [f"127.0.0.1:{port}:8080"], "stop_signal": "SIGKILL", "pull_policy": "missing"}})


def measure(update, port, rounds):
    """[downtime in milliseconds] of several updates; update: a function of (revision, image)."""
    values, client = [], Client(port)
    for number in range(rounds + 1):
        revision = f"1.0.{number}"
        update(revision, (support.IMAGE, OTHER)[number % 2])
        span = client.wait_for(revision)
        if number:
            values.append(span)
    client.done = True
    client.join()
    return values


def main():
    support.require("podman", "docker-compose")
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    test, engine = Cleanups(), support.Engine(type("Holder", (), {}))
    try:
        engine.make_image(OTHER)
        pki = support.Pki(test)
        wfm = support.Wfm(test, pki)
        device = support.Device(test, pki, wfm, engine, {"runtime.settle": "0s"})
        path = os.path.join(support.make_folder(test), "podman.sock")
        support.Service(test, ["podman", "system", "service", "--time=0", f"unix://{path}"], engine.env)
        support.wait_for(lambda: os.path.exists(path))
        ports = [support.free_port(), support.free_port()]
        compose = [support.find_compose(), "-p", "side", "-f", os.path.join(device.folder, "compose.json")]
        env = dict(device.env, DOCKER_HOST=f"unix://{path}", PATH=os.environ["PATH"])

        def by_agent(revision, image):
            wfm.add_package(make_file(ports[0], revision, image), tag=revision)
            wfm.publish(support.make_deployment(components=(("web", revision),), registry=wfm.registry))
            device.cycle()

        def by_compose(revision, image):
            support.write(compose[-1], make_file(ports[1], revision, image))
            for words in (["pull", "--quiet"], ["up", "--detach"]):
                subprocess.run(compose + words, env=env, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        for name, update, port in (("the agent, builtin", by_agent, ports[0]), ("docker-compose pull && up --detach", by_compose, ports[1])):
            values = measure(update, port, rounds)
            print(f"{name:36} {statistics.median(values):6.0f} ms ({min(values):.0f} to {max(values):.0f}), {rounds} updates")
        shutil.rmtree(os.path.dirname(path), ignore_errors=True)
    finally:
        test.close()
        engine.close()


if __name__ == "__main__":
    main()
