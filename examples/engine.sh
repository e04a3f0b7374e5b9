# SPDX-License-Identifier: Apache-2.0
# For the shell scripts beside it: a podman that has everything it keeps (containers, images, networks, locks) below one folder, so that
# it neither sees nor touches what else runs on the machine.

# make_engine FOLDER ROOTFS IMAGE: makes it, with an image of what lies in ROOTFS, and looks whether containers run
make_engine() {
    mkdir -p "$1"
    printf '[storage]\ndriver = "vfs"\ngraphroot = "%s/graph"\nrunroot = "%s/run"\n' "$1" "$1" > "$1/storage.conf"
    configure_engine "$1" ""
    tar -C "$2" -c . | on_engine "$1" podman import --quiet - "$3" > /dev/null
    if ! on_engine "$1" podman run --rm --net=none "$3" true > /dev/null 2>&1; then
        # in some virtual machines and containers the default runtime, its limits or systemd's cgroups are refused
        configure_engine "$1" 'runtime = "runc"
cgroup_manager = "cgroupfs"
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]'
        on_engine "$1" podman run --rm --net=none "$3" true
    fi
}

# configure_engine FOLDER LINES: writes its containers.conf; LINES go on with [engine]
configure_engine() {
    # netavark where it is there: which one a new podman takes depends on what it finds of an old one
    backend=
    for folder in /usr/libexec/podman /usr/lib/podman /usr/local/libexec/podman /usr/local/lib/podman; do
        [ ! -x "$folder/netavark" ] || backend='network_backend = "netavark"'
    done
    # addresses that are not podman's own choice: a network of the machine may be defined and have no container at the moment
    cat > "$1/containers.conf" <<END
[network]
network_config_dir = "$1/networks"
default_subnet = "10.213.0.0/24"
default_subnet_pools = [{"base" = "10.213.64.0/18", "size" = 24}]
$backend
[engine]
tmp_dir = "$1/tmp"
lock_type = "file"
events_logger = "file"
$2
END
}

# use_engine FOLDER: from here on podman is that one
use_engine() {
    export CONTAINERS_CONF="$1/containers.conf" CONTAINERS_STORAGE_CONF="$1/storage.conf"
    unset CONTAINER_HOST CONTAINER_CONNECTION
}

# on_engine FOLDER COMMAND...: runs a command for which podman is that one
on_engine() {
    ( use_engine "$1"; shift; "$@" )
}

# remove_engine FOLDER: removes it with all that runs there
remove_engine() {
    on_engine "$1" podman rm --all --force --time 0 > /dev/null 2>&1 || true
    on_engine "$1" podman network prune --force > /dev/null 2>&1 || true
    for mount in $(cut -d ' ' -f 2 /proc/mounts | grep "^$1/" | sort -r); do
        umount --lazy "$mount" 2>/dev/null || true
    done
    rm -rf "$1" 2>/dev/null || on_engine "$1" podman unshare rm -rf "$1"        # without root, images hold files of other users
}
