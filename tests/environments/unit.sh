#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# The unit of examples, installed as its first lines say, with podman: install, reload, stop, start, remove.
#
#   sh tests/environments/unit.sh [DROP-IN...]        # *.conf files that are added to the unit
set -eu
. tests/environments/scenario.sh

say "an engine, certificates, a WFM"
prepare /srv/test

say "the unit"
install_agent
cp examples/margo-agent.service /etc/systemd/system/
lend_engine margo-agent podman                      # one engine, whoever starts it
for file in "$@"; do cp "$file" /etc/systemd/system/margo-agent.service.d/; done
systemctl daemon-reload
systemctl stop podman.service                       # the system has started it, with an engine of its own
[ $# = 0 ] || systemctl start podman.socket
systemd-analyze verify margo-agent.service
systemd-analyze security --no-pager margo-agent.service | tail -n 1
systemctl start margo-agent

say "install, update by a reload, stop and start, remove"
publish "Hello from the edge"
until_so 150 page_says "Hello from the edge"
publish "Good evening from line 4"
systemctl reload margo-agent
until_so 30 page_says "Good evening"
systemctl stop margo-agent
page_says "Good evening"
systemctl start margo-agent
withdraw
until_so 150 grep -q 'web removed' "$work/wfm.log"
is_silent
systemctl is-active margo-agent
python3 /usr/local/lib/margo/margo_agent.py status
systemctl stop margo-agent
[ "$(systemctl show --property=Result --value margo-agent)" = success ]
say "all is well"
