"""Compose files that ask for more than the policy gives, in as many spellings as their authors thought of.

`make_documents(allowed, outside)` gives {name: compose document}; each is made of one row below.  Test_policy reads them, a real engine
makes what was accepted, and what it shows of the container is the verdict: not what the file says.
"""
from tests import support

IMAGE = support.IMAGE
PARAMETERS = {"YES": "true", "HOST": "host", "ALL": "ALL", "MEM": "/dev/mem", "ROOT": "/", "LOOSE": "seccomp=unconfined",
              "LESS": "-1000", "PROC": "ns:/proc/1/ns/pid"}

FLAGS = [True, "true", "True", "TRUE", "yes", "Yes", "on", "On", "y", "1", 1, " true", "true ", "t", [True], {"a": True}, "${YES}",
         "${NO:-true}", "$YES", "${YES:+true}", "false", False, "no", "off", None, "", 0, "${NO:-}"]
NAMESPACES = ["host", "Host", "HOST", " host", "host ", "host:", "host:x", "${HOST}", "$HOST", "${NO:-host}", "h${NO:-ost}", ["host"],
              {"host": None}, "ns:/proc/1/ns/pid", "ns:/proc/1/ns/net", "${PROC}", "container:x", "container:margo", "service:main",
              "service:other", "service:nobody", "shareable", "private", "none", "", None, "auto", "keep-id", "nomap", "ns:",
              "path:/proc/1/ns/pid", "host,private", "private,host", "pod", "slirp4netns", "slirp4netns:allow_host_loopback=true", "pasta",
              "bridge", "bridge:mode=host", "default", "web_default"]
NAMESPACE_KEYS = ["pid", "ipc", "userns_mode", "network_mode", "uts", "cgroup"]
CAPABILITIES = ["ALL", "all", "All", "SYS_ADMIN", "CAP_SYS_ADMIN", "sys_admin", "cap_sys_admin", "Cap_Sys_Admin", "NET_ADMIN", "NET_RAW",
                "SYS_PTRACE", "SYS_MODULE", "SYS_RAWIO", "DAC_READ_SEARCH", "MKNOD", "BPF", "${ALL}", "SYS${NO:-_ADMIN}", "CHOWN,SYS_ADMIN",
                "CHOWN SYS_ADMIN", " SYS_ADMIN", "SYS_ADMIN ", "SYS_TIME", "AUDIT_CONTROL", "PERFMON", "SYSLOG", "-SYS_ADMIN", "+SYS_ADMIN"]
DEVICES = ["/dev/mem", "/dev/mem:/dev/x", "/dev/mem:/dev/x:rwm", "/dev", "/dev/", "/dev/../dev/mem", "/dev//mem", "${MEM}", "/dev/fuse",
           "/dev/null:/dev/x", "/etc/shadow", "vendor.com/device=all", "nvidia.com/gpu=all", "/proc/kcore", "c 1:1 rwm", "/dev/mem,/dev/sda",
           "./x", "/dev/shm", "/dev/disk", {"source": "/dev/mem", "target": "/dev/x"}]
SECURITY = ["seccomp=unconfined", "seccomp:unconfined", "seccomp=/etc/passwd", "apparmor=unconfined", "apparmor:unconfined", "label=disable",
            "label:disable", "label=type:spc_t", "label=user:root", "label=nested", "unmask=ALL", "unmask=/proc/kcore", "mask=/x",
            "systempaths=unconfined", "systempaths:unconfined", "proc-opts=hidepid=0", "no-new-privileges:false", "no-new-privileges=false",
            "no-new-privileges", "no-new-privileges:true", "${LOOSE}", "credentialspec=file://x", "writable-cgroups=true", "SECCOMP=unconfined",
            "no-new-privileges:true,seccomp=unconfined", " seccomp=unconfined"]
OPTIONS = ["O", "O,upperdir=/etc,workdir=/var/tmp", "ro,U", "U", "z", "Z", "shared", "rshared", "slave", "rslave", "suid", "dev", "exec", "idmap",
           "idmap=uids=0-0-1", "copy", "nocopy", "ro", "rw", "RO", "ro,rw", "bind", "rbind", "noexec,suid", "upperdir=/etc", "chown", ""]
SCALARS = [("runtime", "runc"), ("runtime", "crun"), ("runtime", "/bin/sh"), ("runtime", "kata"), ("gpus", "all"), ("gpus", 1), ("isolation", "default"),
           ("isolation", "hyperv"), ("cgroup_parent", "/"), ("cgroup_parent", "/system.slice"), ("cgroup_parent", "../.."),
           ("credential_spec", {"file": "x"}), ("volumes_from", ["container:x"]), ("volumes_from", ["other"]), ("storage_opt", {"size": "1g"}),
           ("device_cgroup_rules", ["a *:* rwm"]), ("device_cgroup_rules", ["c 1:1 rwm"]), ("oom_score_adj", -1), ("oom_score_adj", "-1000"),
           ("oom_score_adj", "${LESS}"), ("oom_score_adj", -0.5), ("oom_score_adj", 500), ("oom_kill_disable", True), ("use_api_socket", True),
           ("use_api_socket", "true"), ("provider", {"type": "x"}), ("models", ["x"]), ("develop", {"watch": []}), ("post_start", [{"command": "x",
           "privileged": True}]), ("pre_stop", [{"command": "x"}]), ("extends", {"file": "/etc/passwd", "service": "x"}), ("extends", "other"),
           ("annotations", {"run.oci.keep_original_groups": "1"}), ("annotations", ["io.podman.annotations.privileged=TRUE"]),
           ("labels", {"org.margo.owner": "x"}), ("labels", ["org.margo.deployment=x"]), ("labels", {"io.containers.autoupdate": "registry"}),
           ("labels", {"PODMAN_SYSTEMD_UNIT": "sshd.service"}), ("label_file", "/etc/passwd"), ("env_file", "/etc/shadow"), ("env_file", "../../x"),
           ("env_file", [{"path": "/etc/passwd", "required": False}]), ("env_file", ["${ROOT}etc/passwd"]), ("group_add", ["keep-groups"]),
           ("group_add", ["root"]), ("group_add", [0]), ("user", "0:0"), ("user", "--privileged"), ("hostname", "--privileged"),
           ("entrypoint", ["--privileged"]), ("command", ["--privileged"]), ("working_dir", "--privileged"), ("domainname", "--privileged"),
           ("stop_signal", "--privileged"), ("platform", "--privileged"), ("image", "--privileged"), ("image", "docker-archive:/etc/x"),
           ("image", "dir:/etc"), ("image", "oci:x"), ("image", "containers-storage:x"), ("mac_address", "--privileged"), ("dns", ["--privileged"]),
           ("dns_opt", ["--privileged"]), ("dns_search", ["--privileged"]), ("extra_hosts", ["--privileged:1.2.3.4"]), ("expose", ["--privileged"]),
           ("ports", ["--privileged"]), ("ports", ["0.0.0.0:0-70000:1"]), ("sysctls", {"kernel.core_pattern": "|/bin/sh"}),
           ("sysctls", ["kernel.panic=1"]), ("sysctls", {"vm.overcommit_memory": 1}), ("sysctls", {"net.ipv4.ip_forward": 1}),
           ("sysctls", {"fs.mqueue.msg_max": 10}), ("ulimits", {"nofile": 1 << 30}), ("ulimits", {"memlock": -1}), ("ulimits", {"core": -1}),
           ("pids_limit", -1), ("shm_size", "1t"), ("mem_swappiness", 101), ("memswap_limit", -1), ("blkio_config", {"device_read_bps": [{"path":
           "/dev/sda", "rate": "1k"}]}), ("cpu_rt_runtime", 950000), ("cpuset", "0-999"), ("init", "/bin/sh"), ("tty", "host"), ("stdin_open", "x"),
           ("logging", {"driver": "k8s-file", "options": {"path": "/etc/cron.d/x"}}), ("logging", {"driver": "journald", "options": {"env": "X"}}),
           ("logging", {"driver": "syslog", "options": {"syslog-address": "unix:///run/x"}}), ("logging", {"driver": "/bin/sh"}),
           ("logging", {"driver": "fluentd"}), ("scale", 8), ("deploy", {"replicas": 8}), ("deploy", {"resources": {"reservations": {"devices": [
           {"capabilities": ["gpu"], "device_ids": ["0"]}]}}}), ("deploy", {"placement": {}}), ("deploy", {"privileged": True}),
           ("healthcheck", {"test": ["CMD", "--privileged"]}), ("healthcheck", {"test": "--privileged"}), ("x-privileged", True),
           ("priviledged", True), ("Privileged", True), ("privileged ", True), ("privi${NO:-leged}", True), ("security-opt", ["label=disable"]),
           ("restart", "--privileged"), ("pull_policy", "--privileged"), ("container_name", "--privileged"), ("container_name", "../x"),
           ("attach", "x"), ("secrets", ["nobody"]), ("configs", ["nobody"]), ("profiles", ["--privileged"]), ("links", ["nobody:x"]),
           ("external_links", ["x"]), ("build", {"context": "/", "privileged": True}), ("cpu_count", "x"), ("userns", "host"), ("net", "host"),
           ("cgroupns_mode", "host"), ("no_new_privileges", False), ("environment", {"NOTIFY_SOCKET": "/run/x"}),
           ("environment", ["DOCKER_HOST", "PATH", "HOME"]), ("environment", {"CONTAINER_HOST": None})]
SECTIONS = [{"volumes": {"data": {"driver_opts": {"type": "none", "o": "bind", "device": "/"}}}},
            {"volumes": {"data": {"driver_opts": {"type": "none", "o": "bind", "device": "${ROOT}"}}}},
            {"volumes": {"data": {"driver_opts": {"type": "ext4", "device": "/dev/sda"}}}},
            {"volumes": {"data": {"driver_opts": {"type": "overlay", "o": "lowerdir=/,upperdir=/tmp/u,workdir=/tmp/w", "device": "overlay"}}}},
            {"volumes": {"data": {"driver_opts": {"type": "nfs", "o": "addr=127.0.0.1", "device": ":/"}}}},
            {"volumes": {"data": {"driver_opts": {"type": "tmpfs", "o": "size=1m,suid,dev", "device": "tmpfs"}}}},
            {"volumes": {"data": {"driver_opts": {"copy": "x", "o": "uid=0,bind", "device": "/etc"}}}},
            {"volumes": {"data": {"driver": "image", "driver_opts": {"image": "x"}}}}, {"volumes": {"data": {"driver": "local-persist"}}},
            {"volumes": {"data": {"external": True}}}, {"volumes": {"data": {"name": "/etc"}}}, {"volumes": {"data": {"name": "../../x"}}},
            {"volumes": {"data": {"external": {"name": "/etc"}}}}, {"volumes": {"data": {"labels": {"org.margo.owner": "x"}}}},
            {"networks": {"default": {"external": {"name": "host"}}}}, {"networks": {"default": {"name": "host", "external": True}}},
            {"networks": {"default": {"driver": "host"}}}, {"networks": {"default": {"driver": "macvlan", "driver_opts": {"parent": "eth0"}}}},
            {"networks": {"default": {"driver": "ipvlan"}}}, {"networks": {"default": {"driver": "null"}}},
            {"networks": {"default": {"driver_opts": {"com.docker.network.bridge.name": "eth0"}}}},
            {"networks": {"default": {"driver_opts": {"mode": "unmanaged"}}}}, {"networks": {"default": {"name": "--driver=host"}}},
            {"networks": {"default": {"name": "ns:/proc/1/ns/net", "external": True}}},
            {"networks": {"default": {"name": "container:x", "external": True}}}, {"networks": {"default": {"name": "none", "external": True}}},
            {"configs": {"c": {"file": "/etc/shadow"}}}, {"configs": {"c": {"file": "../../etc/shadow"}}}, {"configs": {"c": {"environment": "PATH"}}},
            {"configs": {"c": {"external": True}}}, {"configs": {"c": {"file": 5}}}, {"configs": {"c": {"file": "."}}},
            {"secrets": {"c": {"file": "/etc/shadow"}}}, {"secrets": {"c": {"file": "~/.ssh/id_rsa"}}}, {"secrets": {"c": {"environment": "HOME"}}},
            {"secrets": {"c": {"external": True}}}, {"include": ["/etc/passwd"]}, {"include": [{"path": "../x"}]},
            {"x-privileged": {"privileged": True}}, {"name": "--privileged"}, {"name": "../x"}, {"version": "--privileged"}]


def find_sources(allowed, outside):
    """Places of the disk that a mount may name, and ways to write them."""
    return ["/", "//", "/.", "/etc", "/etc/", "/etc/shadow", "/proc", "/sys", "/dev", "/run", "/var/run/docker.sock", "/run/podman/podman.sock",
            "/var/lib/containers", "~", "~root", "~/x", "..", "../..", "./../..", "${ROOT}", "$ROOT", "${NO:-/}", "${ROOT}etc", outside,
            f"{allowed}/../{outside.rpartition('/')[2]}", f"{allowed}/link", f"{allowed}/..", f"{allowed}x", allowed.upper(), f"{allowed}/./..//",
            "C:\\", "\\\\host\\share", "file:///etc", "./link", "./..", "link"]


def make_documents(allowed, outside):
    """{name: compose document}: each asks for something in one place; allowed: the folder that `policy.host_paths` names."""
    documents = {}

    def add(title, keys, **members):
        documents[f"{len(documents)}: {title}"] = dict({"services": {"main": dict({"image": IMAGE, "command": ["sleep", "60"]}, **keys)}}, **members)

    for value in FLAGS:
        add(f"privileged {value!r}", {"privileged": value})
    for key in NAMESPACE_KEYS:
        for value in NAMESPACES:
            add(f"{key} {value!r}", {key: value})
    for value in CAPABILITIES:
        add(f"cap_add [{value!r}]", {"cap_add": [value]})
        add(f"cap_add [CHOWN, {value!r}] after cap_drop", {"cap_drop": ["ALL"], "cap_add": ["CHOWN", value]})
    add("cap_add as text", {"cap_add": "SYS_ADMIN"})
    add("cap_add as mapping", {"cap_add": {"SYS_ADMIN": None}})
    for value in DEVICES:
        add(f"devices {value!r}", {"devices": [value]})
    for value in SECURITY:
        add(f"security_opt {value!r}", {"security_opt": [value]})
    for source in find_sources(allowed, outside):
        add(f"short mount {source!r}", {"volumes": [f"{source}:/mnt"]})
        add(f"short mount {source!r}, read-only", {"volumes": [f"{source}:/mnt:ro"]})
        add(f"bind {source!r}", {"volumes": [{"type": "bind", "source": source, "target": "/mnt"}]})
        add(f"volume {source!r}", {"volumes": [{"type": "volume", "source": source, "target": "/mnt"}]})
    for options in OPTIONS:
        for source in ("data", allowed):
            add(f"mount {source} with {options!r}", {"volumes": [f"{source}:/mnt:{options}"]}, volumes={"data": None})
        add(f"tmpfs with {options!r}", {"tmpfs": [f"/mnt:{options}"]})
        add(f"propagation {options!r}", {"volumes": [{"type": "bind", "source": allowed, "target": "/mnt", "bind": {"propagation": options}}]})
        add(f"selinux {options!r}", {"volumes": [{"type": "bind", "source": allowed, "target": "/mnt", "bind": {"selinux": options}}]})
    for target in ("/", "/proc", "/sys", "/dev", "relative", "", "/mnt:O", "/a,b", "..", "/../x"):
        add(f"target {target!r}", {"volumes": [{"type": "volume", "source": "data", "target": target}]}, volumes={"data": None})
    for kind in ("npipe", "cluster", "image", "glob", "tmpfs", "bind", "volume", "devpts", "ramfs"):
        add(f"type {kind}", {"volumes": [{"type": kind, "source": "/etc", "target": "/mnt"}]})
    for key, value in SCALARS:
        add(f"{key} {value!r}", {key: value})
    for members in SECTIONS:
        use = {"volumes": ["data:/mnt"]} if "volumes" in members else {}
        use = {kind: ["c"] for kind in ("configs", "secrets") if kind in members} or use
        add(f"section {members!r}", use, **members)
    return documents
