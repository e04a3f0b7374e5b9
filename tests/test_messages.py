"""What goes wrong, and what is said of it: every line of tests/data/messages.txt is made to happen.

A situation is a function here, named by the line's first column; what it says has to hold the words of the line, end with its exit
code, and `doctor` has to end with the same code, unless the line says otherwise.  Some need root, a real podman or faketime.
"""
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
import unittest

from tests import support

TABLE = os.path.join(support.DATA, "messages.txt")
SITUATIONS = {}
LINE = re.compile(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ (debug|info|warning|error) ")


def situation(function):
    """Marks a situation; its name in the table has blanks."""
    SITUATIONS[function.__name__.replace("_", " ")] = function
    return function


def load_table():
    """{situation: (exit code, doctor's column, [words that say what], [where], [what to do])} of the table."""
    rows = {}
    with open(TABLE, encoding="utf-8") as file:
        for line in file:
            if line.strip() and not line.startswith("#"):
                name, code, doctor, *parts = line.rstrip("\n").split(" | ")
                rows[name] = (int(code), doctor, *([word.strip() for word in part.split(" ;; ") if word.strip()] for part in parts))
    return rows


class Site:
    """Where a situation happens: a device with its parts; `command` is what is run."""

    def __init__(self, test, shared):
        self.test, self.pki, self.wfm = test, support.Pki(test), shared
        self.engine = support.FakeEngine(test)
        self.device = support.Device(test, self.pki, self.wfm, self.engine)
        self.command, self.env, self.prefix = ["run", "--once"], {}, []

    def run(self, *arguments):
        """The agent as this site has it run: what it has said, and its exit code."""
        done = subprocess.run(self.prefix + self.device.command(*arguments), env=dict(self.device.env, **self.env), timeout=support.LIMIT,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
        return done.stdout + done.stderr, done.returncode

    def be_nobody(self, state=True):
        """The agent runs as a user who owns nothing here but (state) the state directory; what it names can be read."""
        support.require("root")
        for folder in (self.device.folder, self.pki.folder, os.path.dirname(self.pki.folder), self.engine.folder):
            os.chmod(folder, 0o755)
        for name in os.listdir(self.pki.folder):
            os.chmod(self.pki.path(name), 0o644)
        os.makedirs(self.device.state_dir, mode=0o700)
        if state:
            os.chown(self.device.state_dir, 65534, 65534)
        self.prefix = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]

    def mount(self, *commands):
        """The agent runs where some commands have changed what is mounted; $0 is its state directory."""
        support.require("root")
        os.makedirs(self.device.state_dir, exist_ok=True)
        script = " && ".join(commands) + " && echo ready && exec sleep 600"
        holder = support.Service(self.test, ["unshare", "--mount", "sh", "-c", script, self.device.state_dir])
        support.wait_for(lambda: "ready\n" in holder.read_output(), what=f"the mount: {holder.read_output()}")
        self.prefix = ["nsenter", f"--mount=/proc/{holder.process.pid}/ns/mnt"]

    def use_real_engine(self):
        """A real podman with a storage of its own, in place of the fake one."""
        self.engine = self.test.get_engine()
        self.device.env.update(self.engine.env, PATH=os.environ["PATH"])

    def text(self, text):
        """Another text of the configuration."""
        data = text if isinstance(text, bytes) else text.encode()
        support.write(self.device.config_file, data)
        self.command = ["config", "--check"]

    def yaml(self, old="", new=""):
        """The configuration as somebody would write it, with one thing changed."""
        base = ("state_dir: state\nwfm:\n  url: https://wfm.example\n  timeout: 30s\nidentity:\n  certificate: client.pem\n"
                "  key: client.key\n  trust_bundle: bundle.json\ndevice:\n  id: press-7\n  vendor: Example Industries\n")
        assert old in base
        self.text(base.replace(old, new) if old else base + new)

    def issue(self, *arguments, **options):
        """Another certificate for the device."""
        certificate, key = self.pki.issue(*arguments, **options)
        os.chmod(key, 0o600)
        self.device.set("identity.certificate", certificate)
        self.device.set("identity.key", key)

    def publish(self, compose=None, raw=None, **options):
        """A deployment with its package; the desired state is of this test alone."""
        self.wfm.add_package(raw or support.make_compose(compose), tag="9.9.9", name="hello")
        text = support.make_deployment(registry=self.wfm.registry, components=(("hello", "9.9.9"),), **options)
        self.wfm.publish(text)

    def serve(self, answer, context=None):
        """A port of loopback at which each connection gets an answer; its number."""
        door = socket.socket()
        self.test.addCleanup(door.close)
        door.bind(("127.0.0.1", 0))
        door.listen(8)

        def attend():
            while True:
                try:
                    caller, _ = door.accept()
                    with caller:
                        if context:
                            caller = context.wrap_socket(caller, server_side=True)
                        caller.recv(4096)
                        caller.sendall(answer)
                except OSError:
                    if door.fileno() < 0:
                        return

        if answer is not None:
            threading.Thread(target=attend, daemon=True).start()
        return door.getsockname()[1]


# Configuration

@situation
def no_configuration_file(site):
    os.remove(site.device.config_file)


@situation
def the_configuration_is_a_folder(site):
    os.remove(site.device.config_file)
    os.mkdir(site.device.config_file)


@situation
def configuration_of_another_user(site):
    site.be_nobody()
    os.chmod(site.device.config_file, 0o600)


@situation
def configuration_is_binary(site):
    with open(sys.executable, "rb") as file:
        site.text(file.read(4096))


@situation
def compose_provider_of_old(site):
    site.yaml(new="runtime: {compose: podman-compose}\n")


@situation
def empty_configuration(site):
    site.text("")


@situation
def tab_in_YAML(site):
    site.yaml("  timeout", "\ttimeout")


@situation
def four_misspelt_keys(site):
    site.yaml(new="pol:\n  intervall: 5s\npolicy:\n  priviledged: deny\nruntime:\n  setle: 5s\nlogg: {}\n")


@situation
def key_twice(site):
    site.yaml("  timeout: 30s", "  timeout: 30s\n  timeout: 20s")


@situation
def one_blank_too_many(site):
    site.yaml("  timeout", "   timeout")


@situation
def no_blank_after_the_colon(site):
    site.yaml("url: https", "url:https")


@situation
def a_colon_in_a_value(site):
    site.yaml("Example Industries", "Pressen: AG")


@situation
def http_URL(site):
    site.yaml("https://wfm.example", "http://wfm.example")


@situation
def URL_without_scheme(site):
    site.yaml("https://wfm.example", "wfm.example")


@situation
def odd_duration(site):
    site.yaml(new="poll:\n  interval: 1 min\n  jitter: 0.1\n")


@situation
def odd_window(site):
    site.yaml(new='poll:\n  window: ["Mo-Fr 06:00-22:00"]\n')


@situation
def text_where_a_list_belongs(site):
    site.yaml(new="policy:\n  host_paths: /srv\n")


@situation
def environment_variable_unset(site):
    site.yaml("https://wfm.example", "${PLANT_WFM}")


@situation
def byte_order_mark(site):
    site.yaml()
    with open(site.device.config_file, "rb") as file:
        site.text(b"\xef\xbb\xbf" + file.read().replace(b"\n", b"\r\n"))


@situation
def UTF_16(site):
    site.text("wfm: {}".encode("utf-16"))


@situation
def Latin_1(site):
    site.text("device: {vendor: Münchner Pressen}\n".encode("latin-1"))


@situation
def no_URL(site):
    site.yaml("  url: https://wfm.example\n", "")


@situation
def wrong_choice(site):
    site.yaml("  timeout", "  profile: mTLS\n  timeout")


@situation
def wrong_level(site):
    site.yaml(new="log: {level: warn}\n")


@situation
def device_id_with_blanks(site):
    site.yaml("press-7", "press 7")


@situation
def registry_with_a_scheme(site):
    site.yaml(new='registries: {"https://registry.example": {username: x}}\n')


@situation
def git_token_in_the_URL(site):
    site.yaml("  url: https://wfm.example", "  profile: git\n  url: https://me:s3cret@git.example/x.git")


@situation
def unknown_command(site):
    site.command = ["statsu"]


@situation
def unknown_option(site):
    site.command = ["run", "--onec"]


@situation
def value_of_an_option_missing(site):
    site.command = ["logs", "hello", "--tail"]


@situation
def unknown_deployment(site):
    site.command = ["status", "tally"]


# Identity

@situation
def certificate_file_missing(site):
    site.device.set("identity.certificate", "/nonexistent/client.pem")


@situation
def key_can_be_read_by_all(site):
    os.chmod(site.pki.path("client.key"), 0o644)


@situation
def key_of_another_certificate(site):
    site.device.set("identity.key", site.pki.path("wfm.key"))


@situation
def certificate_expired(site):
    site.issue("old", [support.CLIENT_ID], start="-9d", end="-1d")


@situation
def certificate_not_yet_valid(site):
    site.issue("new", [support.CLIENT_ID], start="+1d", end="+9d")


@situation
def certificate_ends_in_a_day(site):
    site.issue("soon", [support.CLIENT_ID], start="-9d", end="+1d")


@situation
def clock_before_the_last_write(site):
    site.device.cycle()
    path = os.path.join(site.device.state_dir, "state.json")
    os.utime(path, (time.time() + 9e6, time.time() + 9e6))
    site.issue("new", [support.CLIENT_ID], start="+1d", end="+9d")


@situation
def clock_far_ahead(site):
    """As a battery that was changed leaves it; the clock of this machine is left alone."""
    support.require("faketime")
    site.prefix = ["faketime", "-f", "+5y"]


@situation
def key_of_another_user(site):
    site.be_nobody()
    os.chmod(site.pki.path("client.key"), 0o600)


@situation
def web_certificate(site):
    site.device.set("identity.certificate", site.pki.path("site.pem"))
    site.device.set("identity.key", site.pki.path("site.key"))


@situation
def other_trust_domain(site):
    site.issue("other", ["spiffe://other.example/margo/wfm/main/client/x"])


@situation
def certificate_of_another_CA(site):
    site.issue("strange", [support.CLIENT_ID], signer="site-ca")


@situation
def other_WFM_id(site):
    site.issue("other", [f"spiffe://{support.TRUST_DOMAIN}/margo/wfm/second/client/x"])


@situation
def WFMs_certificate_as_the_clients(site):
    site.device.set("identity.certificate", site.pki.path("wfm.pem"))
    site.device.set("identity.key", site.pki.path("wfm.key"))


@situation
def key_file_holds_no_key(site):
    os.chmod(site.pki.path("bundle.json"), 0o600)
    site.device.set("identity.key", site.pki.path("bundle.json"))


@situation
def key_encrypted(site):
    site.pki.run("pkcs8", "-topk8", "-in", "client.key", "-out", "locked.key", "-passout", "pass:x")
    site.device.set("identity.key", site.pki.path("locked.key"))


@situation
def certificate_and_key_swapped(site):
    site.device.set("identity.certificate", site.pki.path("client.key"))
    site.device.set("identity.key", site.pki.path("client.pem"))


@situation
def CSR_instead_of_a_certificate(site):
    site.pki.run("req", "-new", "-subj", "/CN=x", "-key", "client.key", "-out", "client.csr")
    site.device.set("identity.certificate", site.pki.path("client.csr"))


@situation
def certificate_in_DER(site):
    site.device.set("identity.certificate", support.write(site.pki.path("client.der"), site.pki.der("client.pem")))


@situation
def certificate_in_PKCS_12(site):
    site.pki.run("pkcs12", "-export", "-in", "client.pem", "-inkey", "client.key", "-out", "client.p12", "-passout", "pass:")
    site.device.set("identity.certificate", site.pki.path("client.p12"))


@situation
def trust_bundle_is_HTML(site):
    support.write(site.pki.path("bundle.json"), "<!DOCTYPE html><html><body>Please sign in</body></html>")


@situation
def trust_bundle_is_empty(site):
    support.write(site.pki.path("bundle.json"), "")


@situation
def trust_bundle_missing(site):
    os.remove(site.pki.path("bundle.json"))


@situation
def trust_bundle_without_keys(site):
    support.write(site.pki.path("bundle.json"), '{"keys": []}')


# The network

@situation
def no_such_name(site):
    site.device.set("wfm.url", "https://wfm.invalid")


@situation
def port_closed(site):
    site.device.set("wfm.url", f"https://localhost:{support.free_port()}")


@situation
def peer_is_silent(site):
    site.device.set("wfm.timeout", "1s")
    site.device.set("wfm.url", f"https://localhost:{site.serve(None)}")


@situation
def plain_http_on_that_port(site):
    site.device.set("wfm.url", f"https://localhost:{site.serve(b'HTTP/1.1 400 Bad Request' + bytes(9))}")


@situation
def somebody_elses_certificate(site):
    """As a proxy that looks into TLS has one."""
    site.device.set("wfm.url", f"https://{site.wfm.registry}")


@situation
def peer_speaks_TLS_1_2_only(site):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(site.pki.path("wfm.pem"), site.pki.path("wfm.key"))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    site.device.set("wfm.url", f"https://localhost:{site.serve(b'', context)}")


@situation
def wrong_path(site):
    site.device.set("wfm.url", site.wfm.url + "/margo")
    site.wfm.fault({"path": "/margo/*", "status": 404, "body": "not found"})


@situation
def status_401(site):
    site.wfm.fault({"path": "/api/v1/*", "status": 401})


@situation
def status_403(site):
    site.wfm.fault({"path": "/api/v1/*", "problem": "not-authorized"})


@situation
def status_500(site):
    site.wfm.fault({"path": "/api/v1/*", "status": 500})


@situation
def status_503_with_Retry_After(site):
    site.wfm.fault({"path": "/api/v1/*", "status": 503, "headers": {"Retry-After": "600"}})


@situation
def status_503_again(site):
    status_503_with_Retry_After(site)
    site.device.cycle(3)
    site.command = ["-v", "run", "--once"]          # as at a terminal


@situation
def redirect(site):
    site.wfm.fault({"path": "/api/v1/*", "status": 302, "headers": {"Location": "https://elsewhere.example/"}})


@situation
def portal_of_a_hotel(site):
    site.device.cycle()
    site.wfm.fault({"path": "/api/v1/*", "status": 200, "headers": {"Content-Type": "text/html"}, "body": "<html>Please sign in</html>"})


@situation
def dead_proxy(site):
    site.env = {"https_proxy": f"http://127.0.0.1:{support.free_port()}"}


@situation
def proxy_without_a_name(site):
    site.env = {"https_proxy": "http://proxy.invalid:3128"}


@situation
def proxy_wants_a_login(site):
    answer = b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n"
    site.env = {"https_proxy": f"http://127.0.0.1:{site.serve(answer)}"}


@situation
def older_version(site):
    site.device.cycle()
    state = site.device.state()
    state["accepted"].update(version=99, etag='"x"', digest="sha256:" + "0" * 64)
    support.write(os.path.join(site.device.state_dir, "state.json"), json.dumps(state))


# Engine, disk, state

@situation
def no_engine(site):
    site.publish()
    site.device.set("runtime.engine", "auto")
    site.env = {"PATH": os.path.join(site.device.folder, "bin")}
    os.mkdir(os.path.join(site.device.folder, "bin"))
    for name in ("openssl", "perl", "sh"):
        os.symlink(shutil.which(name), os.path.join(site.device.folder, "bin", name))


@situation
def engine_does_not_answer(site):
    site.engine.change(deaf=True)


@situation
def named_engine_is_not_there(site):
    no_engine(site)
    site.device.set("runtime.engine", "docker")


@situation
def docker_daemon_is_off(site):
    support.require("docker")
    site.publish()
    site.device.set("runtime.engine", "docker")
    site.env = {"DOCKER_HOST": f"unix://{site.device.folder}/docker.sock"}


@situation
def OCI_runtime_missing(site):
    site.use_real_engine()
    path = os.path.join(site.device.folder, "containers.conf")
    with open(site.engine.env["CONTAINERS_CONF"]) as file:
        support.write(path, re.sub('runtime = ".*"', 'runtime = "kata"', file.read()))
    site.env = {"CONTAINERS_CONF": path}
    site.publish()


@situation
def podmans_network_lacks_iptables(site):
    """As with cron's PATH, or on a small image: netavark finds no program that sets rules."""
    site.use_real_engine()
    support.require("netavark")
    hidden = os.path.join(site.device.folder, "sbin")
    os.makedirs(hidden + "/all")
    site.mount(f"mount --bind /usr/sbin {hidden}/all", f"cp -as {hidden}/all {hidden}/some", f"rm -f {hidden}/some/*tables* {hidden}/some/nft",
               f"mount --bind {hidden}/some /usr/sbin")
    site.publish({"main": {"image": support.IMAGE, "command": ["sleep", "60"]}})


@situation
def user_without_podmans_set_up(site):
    """No subordinate ids and no home: as a service's user is made."""
    site.use_real_engine()
    site.be_nobody()
    site.device.env.update(HOME="/nonexistent")
    for name in site.engine.env:
        site.device.env.pop(name)
    site.publish()


@situation
def disk_is_full(site):
    site.publish()
    site.mount("mount -t tmpfs -o size=64k tmpfs $0", "(head -c 1M /dev/zero > $0/fill; true) 2> /dev/null")


@situation
def disk_is_full_since_the_last_run(site):
    """The reserve is the state's; something new is to be kept."""
    site.mount("mount -t tmpfs -o size=1m tmpfs $0")
    site.run("run", "--once")
    fill = f"head -c 2M /dev/zero > {site.device.state_dir}/fill"
    subprocess.run(site.prefix + ["sh", "-c", fill], stderr=subprocess.DEVNULL)
    site.publish()


@situation
def package_larger_than_the_disk(site):
    site.wfm.add_package(support.make_compose(), tag="9.9.9", name="hello", **{"data.bin": os.urandom(6 << 20).hex()})
    site.wfm.publish(support.make_deployment(registry=site.wfm.registry, components=(("hello", "9.9.9"),)))
    site.mount("mount -t tmpfs -o size=8m tmpfs $0")


@situation
def state_on_a_read_only_file_system(site):
    site.mount("mount -t tmpfs -o ro tmpfs $0")


@situation
def state_belongs_to_root(site):
    site.be_nobody(state=False)


@situation
def state_below_a_file(site):
    site.device.settings["state_dir"] = os.path.join(support.write(os.path.join(site.device.folder, "file"), ""), "state")
    site.device.save()


@situation
def lock_held(site):
    site.device.cycle()
    import fcntl
    file = open(os.path.join(site.device.state_dir, "lock"), "r+")
    site.test.addCleanup(file.close)
    fcntl.flock(file, fcntl.LOCK_EX)
    file.write(f"{os.getpid()}\n")
    file.flush()


@situation
def state_damaged_twice(site):
    site.device.cycle()
    for name in ("state.json", "state.json.old"):
        support.write(os.path.join(site.device.state_dir, name), "{}")


@situation
def state_of_a_newer_agent(site):
    site.device.cycle()
    support.write(os.path.join(site.device.state_dir, "state.json"), json.dumps(dict(site.device.state(), schema=99)))


@situation
def csr_into_a_folder_that_is_not_there(site):
    site.device.set("identity.key", os.path.join(site.device.folder, "keys", "client.key"))
    site.command = ["csr"]


@situation
def csr_without_openssl(site):
    site.device.set("identity.key", os.path.join(site.device.folder, "new.key"))
    site.command = ["csr"]
    site.env = {"PATH": "/nonexistent"}


# Applications

@situation
def registrys_CA_unknown(site):
    site.publish()
    site.device.settings["registries"] = {}
    site.device.save()


@situation
def registry_is_not_there(site):
    site.publish()
    port = support.free_port()
    site.wfm.publish(support.make_deployment(registry=f"localhost:{port}"))


@situation
def registry_has_no_name(site):
    site.wfm.publish(support.make_deployment(registry="registry.invalid:5000"))


@situation
def tag_missing(site):
    site.wfm.publish(support.make_deployment(registry=site.wfm.registry, components=(("hello", "7.7.7"),)))


@situation
def registry_wants_a_login(site):
    site.publish()
    site.wfm.fault({"path": "/v2/*", "status": 401, "headers": {"WWW-Authenticate": 'Basic realm="plant"'}})


@situation
def registrys_password_is_wrong(site):
    registry_wants_a_login(site)
    password = support.write(os.path.join(site.device.folder, "password"), "wr0ng", 0o600)
    site.device.settings["registries"][site.wfm.registry].update(username="device", password_file=password)
    site.device.save()


@situation
def password_file_missing(site):
    registrys_password_is_wrong(site)
    os.remove(os.path.join(site.device.folder, "password"))


@situation
def CA_file_of_a_registry_missing(site):
    site.publish()
    site.device.settings["registries"][site.wfm.registry]["ca"] = "/nonexistent/ca.pem"
    site.device.save()


@situation
def image_missing(site):
    site.publish({"main": {"image": "localhost/none:1"}})
    site.engine.change(unpullable=["localhost/none:1"])


@situation
def crash_at_the_start(site):
    site.publish()
    site.engine.change(exits={"main": 4})


@situation
def crash_loop(site):
    site.publish({"main": {"image": support.IMAGE, "restart": "always"}})
    site.engine.change(restless=["main"])


@situation
def health_check_fails(site):
    site.use_real_engine()
    site.publish({"main": {"image": support.IMAGE, "command": ["sleep", "60"], "network_mode": "none", "healthcheck": {
        "test": "echo no pressure in line 4; exit 1", "interval": "1s", "retries": 1}}})


@situation
def not_healthy_in_time(site):
    site.publish({"main": {"image": support.IMAGE, "healthcheck": {"test": "x", "interval": "30s", "start_period": "60s"}}}, timeout="0m2s")
    site.engine.change(unhealthy=["main"])


@situation
def command_not_found(site):
    site.use_real_engine()
    site.publish({"main": {"image": support.IMAGE, "command": ["/bin/tallly"], "network_mode": "none"}})


@situation
def port_in_use(site):
    site.use_real_engine()
    door = socket.socket()
    site.test.addCleanup(door.close)
    door.bind(("127.0.0.1", 0))
    door.listen()
    site.publish({"main": {"image": support.IMAGE, "command": ["sleep", "60"], "ports": [f"127.0.0.1:{door.getsockname()[1]}:80"]}})


@situation
def misspelt_compose_keys(site):
    site.publish({"main": {"image": support.IMAGE, "comand": ["x"], "enviroment": {}}})


@situation
def build_in_a_compose_file(site):
    site.publish({"main": {"build": "."}})


@situation
def compose_file_is_no_YAML(site):
    site.publish(raw="services:\n  main:\n    image: x\n   command: y\n")


@situation
def parameter_without_value(site):
    site.publish({"main": {"image": support.IMAGE, "command": ["sleep", "9"], "environment": ["A=${PORT}"]}})


@situation
def required_parameter(site):
    site.publish({"main": {"image": support.IMAGE, "command": ["sleep", "${PORT:?give a port}"]}})


@situation
def parameter_for_an_unknown_component(site):
    text = json.loads(support.make_deployment(registry=site.wfm.registry, components=(("hello", "9.9.9"),), parameters={"PORT": "80"}))
    text["spec"]["parameters"]["port"]["targets"][0]["components"] = ["tally"]
    site.publish()
    site.wfm.publish(json.dumps(text))


@situation
def too_little_capacity(site):
    require_of_device(site, {"capacityRequirements": {"memory": "900Gi"}})


@situation
def label_rule_is_false(site):
    site.device.set("device.labels", {"example.com/zone": "hall-2"})
    require_of_device(site, {"eligibilityRules": [{"labelSelector": {"matchExpressions": [
        {"key": "example.com/zone", "operator": "In", "values": ["hall-7"]}]}}]})


def require_of_device(site, wanted):
    """A deployment that not every device may run."""
    site.publish()
    text = json.loads(support.make_deployment(registry=site.wfm.registry, components=(("hello", "9.9.9"),)))
    text["spec"]["deploymentProfile"]["deviceConstraints"] = wanted
    site.wfm.publish(json.dumps(text))


@situation
def helm_is_missing(site):
    site.device.set("runtime.helm", "off")
    use_helm(site)


@situation
def path_of_helm_is_wrong(site):
    site.device.set("runtime.helm", "/nonexistent/helm")
    use_helm(site)


def use_helm(site):
    """A deployment of a chart."""
    text = json.loads(support.make_deployment(registry=site.wfm.registry, components=(("hello", "9.9.9"),)))
    text["spec"]["deploymentProfile"]["type"] = "helm"
    site.wfm.publish(json.dumps(text))


@situation
def wrong_device(site):
    site.publish(device="another-device")


@situation
def privileged_application(site):
    site.publish({"main": {"image": support.IMAGE, "privileged": True}})


@situation
def path_of_the_host(site):
    site.publish({"main": {"image": support.IMAGE, "volumes": ["/etc:/x"]}})


@situation
def device_file(site):
    site.publish({"main": {"image": support.IMAGE, "devices": ["/dev/null"]}})


@situation
def waits_after_a_failure(site):
    site.publish()
    site.engine.change(exits={"main": 4})
    site.device.cycle(1)
    site.command = ["-v", "run", "--once"]          # as at a terminal


@situation
def hook_cannot_be_run(site):
    site.publish()
    site.device.settings["hooks"] = {"run": [support.write(os.path.join(site.device.folder, "hook"), "x")]}
    site.device.save()


@situation
def hook_says_no(site):
    site.publish()
    hook = support.write(os.path.join(site.device.folder, "hook"), "#!/bin/sh\necho the line is producing >&2\nexit 3\n", 0o755)
    site.device.settings["hooks"] = {"run": [hook]}
    site.device.save()


# Git and enrollment

def use_git(site, **git):
    """The device follows a repository on the disk."""
    support.require("git")
    path = os.path.join(site.device.folder, "fleet")
    for words in (["init", "-q", "-b", "main", path], ["-C", path, "commit", "-q", "--allow-empty", "-m", "start"]):
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@example"] + words, check=True, env=dict(os.environ, HOME=site.device.folder))
    site.device.settings["wfm"] = {"profile": "git", "url": f"file://{path}"}
    site.device.settings["identity"] = {}
    site.device.settings["git"] = git
    site.device.save()


@situation
def wrong_branch(site):
    use_git(site, branch="stable")


@situation
def wrong_folder(site):
    use_git(site, path="sites/line-9")


@situation
def no_repository(site):
    use_git(site)
    shutil.rmtree(os.path.join(site.device.folder, "fleet"))


@situation
def git_token_refused(site):
    site.device.settings["wfm"] = {"profile": "git", "url": f"https://{site.wfm.registry}/x.git"}
    site.wfm.fault({"path": "/x.git*", "status": 401})
    token = support.write(os.path.join(site.device.folder, "token"), "t0ken", 0o600)
    site.device.settings["identity"] = {"ca": site.pki.path("site-ca.pem")}
    site.device.settings["git"] = {"token_file": token}
    site.device.save()


@situation
def git_token_missing(site):
    git_token_refused(site)
    site.device.settings["git"] = {}
    site.device.save()


@situation
def git_token_file_missing(site):
    git_token_refused(site)
    os.remove(os.path.join(site.device.folder, "token"))


@situation
def git_servers_CA_missing(site):
    git_token_refused(site)
    site.device.settings["identity"] = {}
    site.device.save()


@situation
def git_host_has_no_name(site):
    git_token_refused(site)
    site.device.set("wfm.url", "https://git.invalid/x.git")


@situation
def git_missing(site):
    use_git(site)
    site.env = {"PATH": "/nonexistent"}


def commit(site, **files):
    """One more commit of the repository that the device follows."""
    path = os.path.join(site.device.folder, "fleet")
    for name, text in files.items():
        support.write(os.path.join(path, name.replace("_", ".")), text)
    for words in (["add", "-A"], ["commit", "-q", "--allow-empty", "-m", "more"]):
        subprocess.run(["git", "-C", path, "-c", "user.name=x", "-c", "user.email=x@example"] + words, check=True,
                       env=dict(os.environ, HOME=site.device.folder))


@situation
def git_history_rewritten(site):
    use_git(site)
    commit(site)
    site.device.cycle()
    path = os.path.join(site.device.folder, "fleet")
    subprocess.run(["git", "-C", path, "reset", "-q", "--hard", "HEAD^"], check=True)


@situation
def git_id_twice(site):
    use_git(site)
    text = support.make_deployment(registry=site.wfm.registry)
    commit(site, a_yaml=text, b_yaml=text)


@situation
def git_bad_YAML(site):
    use_git(site)
    commit(site, hello_yaml="id: [\n")


@situation
def git_deployment_of_another_device(site):
    use_git(site)
    commit(site, hello_yaml=support.make_deployment(registry=site.wfm.registry, device="press-8"))


@situation
def enrollment_service_down(site):
    site.device.settings["identity"] = {
        "certificate": os.path.join(site.device.folder, "new.pem"), "key": os.path.join(site.device.folder, "new.key"),
        "trust_bundle": site.pki.path("bundle.json"), "ca": site.pki.path("site-ca.pem"), "enrollment": "est",
        "est": {"url": f"https://localhost:{support.free_port()}/.well-known/est",
                "token_file": support.write(os.path.join(site.device.folder, "token"), "a:b", 0o600)}}
    site.device.save()


@situation
def enrollment_token_missing(site):
    enrollment_service_down(site)
    os.remove(os.path.join(site.device.folder, "token"))


@situation
def enrollment_token_is_no_token(site):
    enrollment_service_down(site)
    support.write(os.path.join(site.device.folder, "token"), "", 0o600)


@situation
def enrollment_token_refused(site):
    mis = support.Mis(site.test, site.pki)
    enrollment_service_down(site)
    site.device.settings["identity"]["est"]["url"] = mis.est
    site.device.save()


@situation
def enrollment_CA_wrong(site):
    enrollment_service_down(site)
    site.device.settings["identity"]["est"]["url"] = f"https://{site.wfm.registry}/.well-known/est"
    site.device.settings["identity"]["ca"] = site.pki.path("ca.pem")
    site.device.save()


@situation
def signed_without_trust_in_the_WFM(site):
    site.device.settings["wfm"].update(profile="signed", url=f"https://{site.wfm.registry}")
    site.device.settings["identity"] = {"certificate": site.pki.path("client.pem"), "key": site.pki.path("client.key"), "ca": site.pki.path("ca.pem")}
    site.device.save()


class Messages(support.SharedCase):
    @classmethod
    def start_services(cls):
        cls.wfm = support.Wfm(cls.shared, cls.pki)
        cls.engine = None

    def get_engine(self):
        """The real engine of the situations that need one; they share it."""
        if not self.engine:
            type(self).engine = support.Engine(type(self))
            self.shared.callback(self.engine.close)
        self.addCleanup(self.engine.clean)
        return self.engine

    def setUp(self):
        self.wfm.fault()
        for name in os.listdir(self.wfm.path("deployments")):
            os.remove(self.wfm.path("deployments", name))

    def make(self, name):
        """A situation, made; (site, what was said, exit code)."""
        site = Site(self, self.wfm)
        SITUATIONS[name](site)
        return (site, *site.run(*site.command))

    def test_the_table_and_the_situations_are_the_same(self):
        self.assertEqual(set(load_table()), set(SITUATIONS))

    def test_every_message_says_what_and_where_and_what_to_do(self):
        """A point for each, as somebody reads it at three in the morning: nearly all have three, none has less than two."""
        scores = {name: sum(map(bool, parts)) for name, (_, _, *parts) in load_table().items()}
        self.assertGreaterEqual(min(scores.values()), 2, scores)
        self.assertGreaterEqual(sum(scores.values()) / len(scores), 2.8, scores)
        self.assertGreaterEqual(len(scores), 114)

    def test_without_an_identity_doctor_ends_as_a_run_does_also_once_the_wait_is_over(self):
        """An identity service that is down is unreachable (3); that there is no certificate to show the WFM comes of it."""
        site, _, ended = self.make("enrollment service down")
        self.assertEqual(ended, 3)
        self.assertEqual(site.run("retry")[1], 0)
        told, ended = site.run("doctor")
        self.assertEqual(ended, 3, told)
        self.assertRegex(told, "(?m)^FAIL +identity .*Connection refused")


def make_test(name, code, doctor, *parts):
    """A test of one line of the table."""
    def test(self):
        site, said, ended = self.make(name)
        self.assertEqual(ended, code, said)
        for word in sum(parts, []):
            self.assertIn(word, said)
        self.assertNotRegex(said, r"Errno|Traceback|bug:|_ssl\.c|codec can't|line 1 column 1")
        if doctor == "-":
            return
        told, ended = site.run("doctor")
        self.assertEqual(ended, code if doctor == "=" else int(doctor), told)
        self.assertEqual(ended != 0, code == 2 or "\nFAIL " in "\n" + told, told)
    return test


if os.path.exists(TABLE):
    for title, row in load_table().items():
        setattr(Messages, "test_" + title.replace(" ", "_"), make_test(title, *row))

if __name__ == "__main__":
    unittest.main()
