"""Docker Compose as the oracle of what a compose file means: its `config` beside our Project, field by field, in compose's own words.

Both are brought into one form: {service: {field: value}}; see read_agent and read_compose.  `config` needs no engine.
"""
import csv
import json
import os
import re
import subprocess

import margo_agent
from tests import support

ABSENT = object()


def start_config(folder, variables, project, name="compose.yaml"):
    """`docker-compose config` of a file on its way."""
    environ = dict({key: os.environ[key] for key in os.environ if key in ("PATH", "HOME") or key.startswith("PYENV")},
                   **variables)
    argv = [support.find_compose(), "--project-name", project, "--file", os.path.join(folder, name), "config", "--format", "json"]
    return subprocess.Popen(argv, env=environ, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def end_config(process):
    """The value that it printed; raises AssertionError where it refuses the file."""
    stdout, stderr = process.communicate()
    if not stdout.strip():
        raise AssertionError(f"Docker Compose refuses the file: {stderr.decode('utf-8', 'replace')}")
    return json.loads(stdout.decode())


def unescape(value):
    """What `config` prints, with its `$$` made `$` again."""
    if isinstance(value, dict):
        return {unescape(key): unescape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [unescape(item) for item in value]
    return value.replace("$$", "$") if isinstance(value, str) else value


# Values of one kind in one form

def to_bytes(text):
    """A size such as 64m or 67108864 in bytes."""
    number, unit = re.fullmatch(r"(-?[0-9.]+) ?([bkmgt]?)i?b?", str(text).lower()).groups()
    return int(float(number) * {"": 1, "b": 1, "k": 2 ** 10, "m": 2 ** 20, "g": 2 ** 30, "t": 2 ** 40}[unit])


def to_time(text):
    """A duration such as 1m30s in seconds."""
    units = {"h": 3600, "m": 60, "s": 1, "ms": 0.001, "us": 0.000001}
    return sum(float(number) * units[unit] for number, unit in re.findall(r"([0-9.]+)(ms|us|h|m|s)", text))


def to_grace(text):
    """A duration in whole seconds, at least one, as engines take it."""
    return max(1, round(to_time(text))) if re.search("[a-z]", text) else int(text)


def to_list(value):
    """Texts in an order that does not matter."""
    return sorted(map(str, [value] if isinstance(value, str) else value))


def to_search(text):
    """A search domain; none at all is a dot to engines."""
    return text or "."


def to_host(text):
    """HOST=ADDRESS or HOST:ADDRESS."""
    return re.sub("[=:]", "=", text, count=1)


def to_device(item):
    """A device, given as a mapping or as HOST[:CONTAINER[:RIGHTS]]."""
    if isinstance(item, dict):
        return item["source"], item["target"], item.get("permissions", "rwm")
    parts = item.split(":")
    return parts[0], (parts[1:] or parts)[0], (parts[2:] or ["rwm"])[0]


def to_image(name):
    """An image's whole name; one without a registry is Docker Hub's (K4)."""
    host, slash, rest = name.partition("/")
    if slash and re.search(r"[.:]|^localhost$", host):
        return name
    return f"docker.io/{name}" if slash else f"docker.io/library/{name}"


def join_lines(words):
    """Words without line ends: of a backslash at the end of a line compose drops the backslash alone, a shell both (K8)."""
    return [word.replace("\n", "") for word in words if word != "\n"]


# {compose's key: (our option, the form of its value)}
SCALARS = {
    "user": ("--user", str), "hostname": ("--hostname", str), "working_dir": ("--workdir", str), "stop_signal": ("--stop-signal", str),
    "restart": ("--restart", str), "platform": ("--platform", str), "cpuset": ("--cpuset-cpus", str), "mac_address": ("--mac-address", str),
    "ipc": ("--ipc", str), "pid": ("--pid", str), "userns_mode": ("--userns", str), "mem_limit": ("--memory", to_bytes),
    "memswap_limit": ("--memory-swap", to_bytes), "mem_reservation": ("--memory-reservation", to_bytes), "shm_size": ("--shm-size", to_bytes),
    "mem_swappiness": ("--memory-swappiness", float), "cpus": ("--cpus", float), "cpu_period": ("--cpu-period", float),
    "cpu_quota": ("--cpu-quota", float), "cpu_shares": ("--cpu-shares", float), "pids_limit": ("--pids-limit", float),
    "oom_score_adj": ("--oom-score-adj", float), "stop_grace_period": ("--stop-timeout", to_grace)}
LISTS = {
    "cap_add": ("--cap-add", str), "cap_drop": ("--cap-drop", str), "group_add": ("--group-add", str), "dns": ("--dns", str),
    "dns_opt": ("--dns-option", str), "dns_search": ("--dns-search", to_search), "security_opt": ("--security-opt", str),
    "device_cgroup_rules": ("--device-cgroup-rule", str), "devices": ("--device", to_device), "extra_hosts": ("--add-host", to_host)}
PAIRS = {"labels": "--label", "sysctls": "--sysctl", "ulimits": "--ulimit"}
FLAGS = {"init": "--init", "read_only": "--read-only", "tty": "--tty", "stdin_open": "--interactive", "privileged": "--privileged"}
HEALTH = {"interval": "--health-interval", "timeout": "--health-timeout", "retries": "--health-retries", "start_period": "--health-start-period"}
RESTARTS = {"none": "no", "on-failure": "on-failure"}


# What we make of a file

def split_value(option, value):
    """What an argument says: podman takes some as a line of comma-separated values, of which we give one."""
    return next(csv.reader([value]))[0] if option in margo_agent.LISTED and value.startswith('"') else value


def read_agent(project, folder):
    """{service: {field: value}} of a Project for podman."""
    return {service.name: read_service(service, folder, {item.name for item in project.services}) for service in project.services}


def read_service(service, folder, started):
    """The fields of one Service."""
    options = {}
    for argument in service.arguments:
        option, _, value = argument.partition("=")
        options.setdefault(option, []).append(split_value(option, value))
    fields = {"image": to_image(service.image), "environment": service.environment,
              "entrypoint": options.get("--entrypoint", [ABSENT])[0], "words": join_lines(service.command)}
    for key, (option, form) in SCALARS.items():
        fields[key] = form(options[option][0]) if option in options else ABSENT
    for key, (option, form) in LISTS.items():
        fields[key] = sorted(map(form, options.get(option, ())))
    for key, option in PAIRS.items():
        fields[key] = dict(item.split("=", 1) for item in options.get(option, ()))
    for key, option in FLAGS.items():
        fields[key] = option in options
    fields["blkio_config.weight"] = float(options.get("--blkio-weight", ["0"])[0])
    fields["logging"] = (options.get("--log-driver", [ABSENT])[0], dict(item.split("=", 1) for item in options.get("--log-opt", ())))
    fields["healthcheck"] = read_health(options)
    fields["ports"] = read_ports(options.get("--publish", ()))
    fields["tmpfs"] = sorted([mount.target.rstrip("/"), *sorted(mount.options)] for mount in service.mounts if mount.kind == "tmpfs")
    fields["volumes"] = sorted(
        [mount.kind, os.path.relpath(mount.found.real, folder) if mount.found else mount.source, mount.target.rstrip("/"),
         *sorted(set(mount.options) - {"rw", "cached", "delegated", "consistent"} - ({"ro"} if mount.found and mount.found.own else set()))]
        for mount in service.mounts if mount.kind != "tmpfs")
    fields["files"] = {path: (item.text, item.mode, item.uid, item.gid) for path, item in service.files.items()}
    fields["networks"] = sorted([item.network] if item.aliases is None else
                                [item.network, *sorted(set(item.aliases)), *sorted(item.options)] for item in service.networks)
    fields["depends_on"] = {name: facts for name, facts in service.depends_on.items() if name in started}
    fields["pull_policy"] = {"if_not_present": "missing"}.get(service.pull, service.pull)
    return fields


def read_health(options):
    """A health check of ours."""
    if "--no-healthcheck" in options:
        return {"disable": True}
    found = {key: float(value[0]) if key == "retries" else to_time(value[0])
             for key, option in HEALTH.items() for value in [options.get(option)] if value}
    for value in options.get("--health-cmd", ()):
        try:
            found["test"] = ["CMD"] + json.loads(value)
        except ValueError:
            first, _, rest = value.partition(" ")
            found["test"] = [first, rest] if first in ("CMD", "CMD-SHELL") else ["CMD-SHELL", value]
    return found


def read_ports(arguments):
    """[(address, published, target, protocol)]: a range of the container's side is one port each, as in `config`."""
    found = []
    for text in arguments:
        address, published, target, protocol = re.fullmatch(
            r"(?:(?:\[?([0-9a-f.:]+?)\]?:(?=[0-9-]*:))?([0-9-]*):)?([0-9-]+)(?:/(\w+))?", text).groups("")
        first, _, last = target.partition("-")
        for offset in range(int(last or first) - int(first) + 1):
            start = str(int(published.split("-")[0]) + offset) if last and published else published
            found.append((address, start, int(first) + offset, protocol or "tcp"))
    return sorted(found)


# What Docker Compose makes of it

def read_compose(answer, project, folder, variables):
    """{service: {field: value}} of what `config` printed; project, variables: what it was given."""
    answer = unescape(answer)
    owners = {f"container:{facts['container_name']}": f"service:{name}" for name, facts in answer["services"].items() if "container_name" in facts}
    for facts in answer["services"].values():       # our containers have other names than theirs
        facts.update({key: owners.get(facts[key], facts[key]) for key in ("network_mode", "pid", "ipc") if key in facts})
    aliases = {name: {facts["container_name"]} if "container_name" in facts else set() for name, facts in answer["services"].items()}
    for facts in answer["services"].values():
        for owner, _, alias in (link.partition(":") for link in facts.get("links") or ()):
            aliases[owner].update([alias] if alias else [])
    return {name: read_compose_service(facts, answer, project, folder, aliases[name], variables) for name, facts in answer["services"].items()}


def read_compose_service(service, answer, project, folder, aliases, variables):
    """The fields of one service."""
    deploy = service.get("deploy") or {}
    resources = deploy.get("resources") or {}
    limits = resources.get("limits") or {}
    service = dict({"cpus": limits.get("cpus"), "mem_limit": limits.get("memory"), "pids_limit": limits.get("pids"),
                    "mem_reservation": (resources.get("reservations") or {}).get("memory")}, **service)
    policy = deploy.get("restart_policy")
    if policy:
        word = RESTARTS.get(policy.get("condition"), "always")
        service["restart"] = f"{word}:{policy['max_attempts']}" if word == "on-failure" and policy.get("max_attempts") else word
    entrypoint = service.get("entrypoint")
    fields = {"image": to_image(service["image"]),
              "environment": {name: value for name, value in (service.get("environment") or {}).items() if value is not None},
              "entrypoint": ABSENT if entrypoint is None else (entrypoint or [""])[0],
              "words": join_lines((entrypoint or [])[1:] + (service.get("command") or []))}
    for key, (_, form) in SCALARS.items():
        value = service.get(key)
        value = f"container:{project}-{value[8:]}-1" if str(value).startswith("service:") else value
        fields[key] = ABSENT if value is None or value in (0, "0") and key not in ("user", "oom_score_adj") else form(str(value))
    for key, (_, form) in LISTS.items():
        fields[key] = sorted(map(form, service.get(key) or ()))
    for key in PAIRS:
        fields[key] = {name: f"{item['soft']}:{item['hard']}" if isinstance(item, dict) else str(item)
                       for name, item in (service.get(key) or {}).items()}
    for key in FLAGS:
        fields[key] = bool(service.get(key))
    fields["blkio_config.weight"] = float((service.get("blkio_config") or {}).get("weight", 0))
    logging = service.get("logging") or {}
    fields["logging"] = (logging.get("driver", ABSENT), {key: str(item) for key, item in (logging.get("options") or {}).items()})
    fields["healthcheck"] = read_compose_health(service.get("healthcheck") or {})
    # Of a range for one port podman gets the first.
    fields["ports"] = sorted((item.get("host_ip", ""), re.sub(r"\A0\Z|-.*", "", item.get("published", "")), item["target"], item["protocol"])
                             for item in service.get("ports") or ())
    mounts = [read_compose_mount(item, answer, folder) for item in service.get("volumes") or ()]
    fields["tmpfs"] = sorted([text.partition(":")[0].rstrip("/"), *sorted(filter(None, text.partition(":")[2].split(",")))] for text in service.get("tmpfs") or ())
    fields["tmpfs"] = sorted(fields["tmpfs"] + [item[2:] for item in mounts if item[0] == "tmpfs"])
    fields["volumes"] = sorted(item for item in mounts if item[0] != "tmpfs")
    fields["files"] = dict(read_compose_file(item, answer[section], root, variables) for section, root in (("configs", "/"), ("secrets", "/run/secrets/"))
                           for item in service.get(section) or ())
    fields["networks"] = read_compose_networks(service, answer, project, aliases)
    fields["depends_on"] = {name: (item["condition"], item["required"]) for name, item in (service.get("depends_on") or {}).items()
                            if name in answer["services"]}
    fields["pull_policy"] = service.get("pull_policy", "missing")
    return fields


def read_compose_mount(mount, answer, folder):
    """[kind, source, target, option …] of one of `volumes`."""
    bind, tmpfs = mount.get("bind") or {}, mount.get("tmpfs") or {}
    source = mount.get("source", "")
    if mount["type"] == "bind":
        source = os.path.relpath(os.path.realpath(source), folder)
    elif mount["type"] == "volume" and source:
        source = answer["volumes"][source]["name"]
    own = mount["type"] == "bind" and not source.startswith("..")
    words = ["ro"] if mount.get("read_only") and not own else []         # what is the package's own is read-only anyway
    words += [bind[key] for key in ("propagation", "selinux") if key in bind]
    words += ["nocopy"] if (mount.get("volume") or {}).get("nocopy") else []
    words += [f"size={tmpfs['size']}"] if "size" in tmpfs else []
    words += [f"mode={int(tmpfs['mode']):o}"] if tmpfs.get("mode") else []
    head = [mount["type"], source, mount["target"].rstrip("/")]
    return head + sorted(words)


def read_compose_health(health):
    """A health check."""
    if health.get("disable") or health.get("test") == ["NONE"]:
        return {"disable": True}
    found = {key: float(health[key]) if key == "retries" else to_time(health[key]) for key in HEALTH if key in health}
    return dict(found, test=health["test"]) if "test" in health else found


def read_compose_file(item, section, root, variables):
    """(target, (text, mode, uid, gid)) of one of `configs` or `secrets`."""
    facts = section[item["source"]]
    if "file" in facts:
        with open(facts["file"], "rb") as file:
            text = file.read().decode("utf-8", "surrogateescape")
    else:
        text = facts["content"] if "content" in facts else variables.get(facts["environment"], ABSENT)
    owner = [int(item[key]) if key in item else -1 for key in ("uid", "gid")]
    return os.path.join(root, item.get("target", item["source"])), (text, int(item["mode"], 8) if "mode" in item else 0o644, *owner)


def read_compose_networks(service, answer, project, aliases):
    """[[engine's name, alias …, address …]], or the mode."""
    if "network_mode" in service:
        mode = service["network_mode"]
        return [[f"container:{project}-{mode[8:]}-1" if mode.startswith("service:") else mode]]
    networks = []
    for name, facts in service["networks"].items():
        facts = facts or {}
        options = [f"{option}={facts[key]}" for key, option in (
            ("ipv4_address", "--ip"), ("ipv6_address", "--ip6"), ("mac_address", "--mac-address")) if key in facts]
        networks.append([answer["networks"][name]["name"], *sorted(aliases.union(facts.get("aliases") or ())), *sorted(options)])
    return sorted(networks)


# Both beside each other

def parse_go_number(text):
    """A plain number as Go's YAML reads and prints it; None for what is none."""
    plain = text.replace("_", "")
    for pattern, base in (("0x[0-9a-fA-F]+", 16), ("0o?[0-7]+", 8), ("0b[01]+", 2), ("[-+]?[0-9]+", 10)):
        if re.fullmatch(pattern, plain):
            return float(int(plain.replace("o", ""), base))
    return float(plain) if re.fullmatch(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?", plain) else None


def is_same(ours, theirs):
    """Whether two values mean the same.  A number keeps its spelling here, and compose prints what Go makes of it (K22)."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(is_same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, (list, tuple)) and isinstance(theirs, (list, tuple)):
        return len(ours) == len(theirs) and all(map(is_same, ours, theirs))
    if isinstance(ours, str) and isinstance(theirs, str) and ours != theirs:
        if ours.startswith("size=") and theirs.startswith("size="):
            return to_bytes(ours[5:]) == to_bytes(theirs[5:])
        numbers = parse_go_number(ours), parse_go_number(theirs)
        return None not in numbers and numbers[0] == numbers[1]
    return ours == theirs or ABSENT in (ours, theirs) and ours is theirs


def find_differences(ours, theirs):
    """[(service, field, our value, theirs)] of what is misread."""
    found = [] if ours.keys() == theirs.keys() else [("", "services", sorted(ours), sorted(theirs))]
    for name in sorted(ours.keys() & theirs.keys()):
        found += [(name, field, ours[name][field], theirs[name][field]) for field in theirs[name]
                  if not is_same(ours[name][field], theirs[name][field])]
    return found
