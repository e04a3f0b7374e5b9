#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# A userland of busybox' applets: the quickstart finds nothing else on PATH but what README asks for.
set -eu
folder=/srv/applets
mkdir -p $folder
cp /bin/busybox $folder/busybox
$folder/busybox --install -s $folder
rm -f $folder/ip                                    # iproute2 is no applet, and the agent needs none of it
for name in python3 openssl podman curl; do ln -sf "$(command -v $name)" "$folder/$name"; done
readlink -f "$folder/sh" "$folder/cp" "$folder/sed"
export PATH=$folder
sh examples/quickstart.sh
sh examples/quickstart.sh --enroll
