"""Tries the agent where its users run it: the life of an application in other systems than the one that the tests run in.

    python3 -m tests.environments NAME...       # as root on Linux; names are those of ENVIRONMENTS, `all` for every one

A system is a small Debian, made once by debootstrap below $MARGO_ENVIRONMENTS (/var/tmp/margo-environments), or this machine's own
root folder.  Each environment boots it with its own systemd in namespaces of its own (boot.sh); what it writes there is kept in
memory and gone when it ends.
"""
import contextlib
import glob
import os
import shutil
import subprocess
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
REPOSITORY = os.path.dirname(os.path.dirname(HERE))
STORE = os.environ.get("MARGO_ENVIRONMENTS", "/var/tmp/margo-environments")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PACKAGES = ("systemd systemd-sysv dbus procps iproute2 python3 openssl ca-certificates curl busybox-static"
            " podman runc netavark aardvark-dns catatonit iptables nftables cron"
            " uidmap slirp4netns dbus-user-session fuse-overlayfs").split()
BOOT_LIMIT = 90         # seconds
LIMIT = 900             # seconds of one command inside


class Broken(Exception):
    """An environment could not be made, or the agent failed in it."""


def make_system(suite, architecture="amd64"):
    """The root folder of a small Debian of a suite, made where it is not there yet."""
    root = os.path.join(STORE, f"{suite}-{architecture}")
    made = os.path.join(root, "made")
    if not os.path.exists(made):
        shutil.rmtree(root, ignore_errors=True)
        os.makedirs(root)
        done = subprocess.run(["debootstrap", "--variant=minbase", f"--arch={architecture}", f"--include={','.join(PACKAGES)}", suite, root],
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
        if done.returncode:
            raise Broken(f"debootstrap of {suite} for {architecture}: {done.stdout[-2000:]}")
        with open(made, "w"):
            pass
    return root


def make_foreign(suite, architecture):
    """The root folder of a Debian for another processor: its packages unpacked, none of them configured, because that takes an hour there."""
    root = os.path.join(STORE, f"{suite}-{architecture}")
    made = os.path.join(root, "made")
    if not os.path.exists(made):
        shutil.rmtree(root, ignore_errors=True)
        for folder in ("proc", "dev", "tmp", "etc", "root", "srv/margo", "usr/bin", "usr/sbin", "usr/lib"):
            os.makedirs(os.path.join(root, folder))
        for name in ("bin", "sbin", "lib"):
            os.symlink(f"usr/{name}", os.path.join(root, name))
        with tempfile.TemporaryDirectory(dir=STORE) as work:
            for command in ([["debootstrap", "--foreign", "--variant=minbase", f"--arch={architecture}", "--include=python3,openssl,git",
                              suite, work]], [["sh", "-c", f"for file in {work}/var/cache/apt/archives/*.deb; do dpkg-deb --fsys-tarfile $file |"
                                               f" tar -x -C {root} --keep-directory-symlink; done"]]):
                done = subprocess.run(command[0], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
                if done.returncode:
                    raise Broken(f"{suite} for {architecture}: {done.stdout[-2000:]}")
        for name, text in (("etc/passwd", "root:x:0:0:root:/root:/bin/sh\n"), ("etc/hosts", "127.0.0.1 localhost\n"), ("made", "")):
            with open(os.path.join(root, name), "w") as file:
                file.write(text)
    return root


def try_foreign(suite, architecture, program):
    """Runs foreign.sh in such a system; the kernel has to know how that processor's programs are run (package qemu-user-static)."""
    if not os.path.exists(f"/proc/sys/fs/binfmt_misc/{program}"):
        raise Broken(f"programs for {architecture} cannot be run here: install qemu-user-static, mount binfmt_misc, register {program}")
    root = make_foreign(suite, architecture)
    shutil.rmtree(os.path.join(root, "srv", "margo"))
    shutil.copytree(REPOSITORY, os.path.join(root, "srv", "margo"), ignore=shutil.ignore_patterns(".git", ".parts", "__pycache__"))
    script = ("ip link set lo up; mount -t proc proc {0}/proc; mount -t tmpfs tmpfs {0}/tmp; mount --rbind /dev {0}/dev; exec chroot {0}"
              " /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root sh -c 'cd /srv/margo && exec sh tests/environments/foreign.sh'")
    words = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", script.format(root)]
    if subprocess.run(words, stdin=subprocess.DEVNULL, timeout=2 * LIMIT).returncode:
        raise Broken("foreign.sh")


class System:
    """A running system; its `run` runs a command in it."""

    def __init__(self, init):
        self.init = init

    def run(self, *command, user="root", **environment):
        """Runs a command in the checkout's folder, its output to ours; raises Broken where it fails."""
        variables = dict({"PATH": PATH, "HOME": "/root", "TERM": "dumb"}, **environment)
        words = ["nsenter", "--target", str(self.init), "--all", "env", "--chdir=/srv/margo", "-i"]
        words += [f"{name}={value}" for name, value in variables.items()]
        if user != "root":
            words += ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups"]
        if subprocess.run(words + list(command), stdin=subprocess.DEVNULL, timeout=LIMIT).returncode:
            raise Broken(" ".join(command))


@contextlib.contextmanager
def booted(root):
    """A System booted from a root folder, with this checkout as /srv/margo."""
    with tempfile.TemporaryDirectory() as folder:
        checkout = os.path.join(folder, "checkout")
        shutil.copytree(REPOSITORY, checkout, ignore=shutil.ignore_patterns(".git", ".parts", "__pycache__", "*.egg-info"))
        with open(os.path.join(folder, "log"), "w+") as log:
            keeper = subprocess.Popen(["sh", os.path.join(HERE, "boot.sh"), root, folder, checkout], stdin=subprocess.DEVNULL,
                                      stdout=log, stderr=log)
            try:
                yield await_boot(keeper, log)
            finally:
                keeper.kill()                       # its init ends with it
                keeper.wait()
                remove_cgroups(os.path.basename(folder))


def remove_cgroups(name):
    """Removes what a system left in each hierarchy, from the leaves up; its processes have just been killed."""
    for top in glob.glob(f"/sys/fs/cgroup/*/{name}") + glob.glob(f"/sys/fs/cgroup/{name}"):
        for folder, _, _ in os.walk(top, topdown=False):
            for _ in range(50):
                try:
                    os.rmdir(folder)
                    break
                except OSError:
                    time.sleep(0.1)


def find_init(parent):
    """The process id of the systemd that is a process's child, or nothing."""
    try:
        with open(f"/proc/{parent}/task/{parent}/children") as file:
            children = file.read().split()
        return next((child for child in children if os.readlink(f"/proc/{child}/exe").endswith("/systemd")), None)
    except OSError:                                 # it has just ended
        return None


def await_boot(keeper, log):
    """The System that a process of boot.sh boots."""
    end = time.monotonic() + BOOT_LIMIT
    while time.monotonic() < end and keeper.poll() is None:
        init = find_init(keeper.pid)
        if init:
            system = System(init)
            answer = subprocess.run(["nsenter", "--target", system.init, "--all", "systemctl", "is-system-running"],
                                    stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, universal_newlines=True)
            if answer.stdout.strip() in ("running", "degraded"):
                return system
        time.sleep(0.3)
    log.seek(0)
    raise Broken(f"systemd does not come up: {log.read()[-2000:]}")


def try_unit():
    """The systemd unit of examples on this machine's own system, and the same with everything dropped that a socket lets it drop."""
    for drop_ins in ([], ["examples/security/engine-socket.conf"]):
        with booted("/") as system:
            system.run("sh", "tests/environments/unit.sh", *drop_ins)


def try_package():
    """The Debian package of examples on this machine's own system: its service, its timer, its file for cron."""
    with booted("/") as system:
        system.run("sh", "tests/environments/package.sh")


def try_cron():
    """A file in /etc/cron.d, with cron's own short PATH."""
    with booted(make_system("bookworm")) as system:
        system.run("sh", "tests/environments/cron.sh")


def try_debian_13():
    """The next Debian: podman 5, OpenSSL 3.5, Python 3.13, netavark by nftables."""
    with booted(make_system("trixie")) as system:
        system.run("sh", "examples/quickstart.sh")
        system.run("sh", "examples/quickstart.sh", "--enroll")
        system.run("sh", "tests/environments/unit.sh")


def try_rootless():
    """A user of no rights, with sub-ids and podman's rootless network."""
    with booted(make_system("bookworm")) as system:
        system.run("useradd", "--create-home", "margo")
        system.run("loginctl", "enable-linger", "margo")
        system.run("sh", "examples/quickstart.sh", user="margo", HOME="/home/margo", XDG_RUNTIME_DIR="/run/user/1000")


def try_i386():
    """A 32-bit system."""
    with booted(make_system("bookworm", "i386")) as system:
        system.run("sh", "examples/quickstart.sh")


def try_armhf():
    """32-bit ARM, emulated: no real engine there."""
    try_foreign("bookworm", "armhf", "qemu-arm")


def try_riscv64():
    """RISC-V, emulated: no real engine there."""
    try_foreign("trixie", "riscv64", "qemu-riscv64")


def try_busybox():
    """A userland of busybox' applets: no coreutils, no bash, no curl's friends."""
    with booted("/") as system:
        system.run("sh", "tests/environments/busybox.sh")


def try_frozen():
    """Read-only firmware: the agent as bytecode alone, on a root folder that nobody can write."""
    with booted("/") as system:
        system.run("sh", "tests/environments/frozen.sh")


ENVIRONMENTS = {"unit": try_unit, "package": try_package, "cron": try_cron, "debian-13": try_debian_13, "rootless": try_rootless, "i386": try_i386, "armhf": try_armhf, "riscv64": try_riscv64,
                "busybox": try_busybox, "frozen": try_frozen}
