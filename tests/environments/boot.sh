#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Boots systemd from a root folder (`/` for this machine's own) in namespaces of its own: processes, mounts, network, names.  What it
# writes is kept in memory, and gone when its init ends.  Prints nothing; the caller finds its init as the child of this process.
#
#   sh tests/environments/boot.sh ROOT FOLDER CHECKOUT        # FOLDER for mount points; CHECKOUT becomes /srv/margo
set -eu
mkdir -p "$2/work" "$2/root"
# a cgroup of its own in every hierarchy, so that two systems do not meet in the names of their units
hierarchies=$(sed -n "s,^cgroup /sys/fs/cgroup/\([a-z_]*\) .*,\1,p" /proc/mounts)
for folder in $(for name in $hierarchies; do echo "/sys/fs/cgroup/$name"; done | grep . || echo /sys/fs/cgroup); do
    own="$folder/$(basename "$2")"
    mkdir "$own"
    for name in cpuset.cpus cpuset.mems; do         # a new cpuset has none
        [ ! -e "$own/$name" ] || cat "$folder/$name" > "$own/$name"
    done
    echo $$ > "$own/cgroup.procs"
done
exec unshare --pid --fork --mount --net --uts --ipc --cgroup --kill-child sh -c '
set -eu
mount --make-rprivate /
mount -t tmpfs tmpfs "$2/work"
mkdir "$2/work/upper" "$2/work/work"
mount -t overlay overlay -o "lowerdir=$1,upperdir=$2/work/upper,workdir=$2/work/work" "$2/root"
cd "$2/root"
mount -t proc proc proc
mount -t sysfs sysfs sys
if [ -e /sys/fs/cgroup/cgroup.controllers ]; then
    mount -t cgroup2 cgroup2 sys/fs/cgroup
else
    mount -t tmpfs tmpfs sys/fs/cgroup
    for name in $4; do
        mkdir "sys/fs/cgroup/$name"
        case $name in
            systemd) mount -t cgroup -o none,name=systemd cgroup sys/fs/cgroup/systemd ;;
            *) mount -t cgroup -o "$name" cgroup "sys/fs/cgroup/$name" ;;
        esac
    done
fi
mount -t tmpfs -o mode=755 tmpfs dev
for name in null zero full random urandom tty; do
    touch "dev/$name"
    mount --bind "/dev/$name" "dev/$name"
done
mkdir dev/pts dev/shm dev/net
mknod -m 666 dev/net/tun c 10 200
mknod -m 666 dev/fuse c 10 229
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
mount -t tmpfs tmpfs dev/shm
mount -t tmpfs tmpfs run
mkdir -p var/lib/containers
mount -t tmpfs tmpfs var/lib/containers              # engines have storage of their own
mount -t tmpfs tmpfs tmp
mkdir -p srv/margo
cp -a "$3/." srv/margo/
ip link set lo up
mkdir -p oldroot
pivot_root . oldroot
umount -l oldroot
mount --make-rshared /
exec env -i container=margo PATH=/usr/sbin:/usr/bin:/sbin:/bin /sbin/init
' sh "$1" "$2" "$3" "$hierarchies"
