#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# The Debian package of examples: installed, run by its service and by its timer, updated, removed, forgotten.
set -eu
. tests/environments/scenario.sh

say "an engine, certificates, a WFM"
prepare /srv/test

say "the package"
rm -f /usr/sbin/policy-rc.d                         # of machines on which packages may start nothing; gone with this system
sh examples/packaging/debian.sh "$work/debs"
dpkg --install "$work"/debs/margo-agent_*_all.deb
margo-agent version
ls /usr/share/margo-agent/__pycache__/
! systemctl is-active margo-agent                   # it starts nothing by itself
configure_agent
lend_engine margo-agent margo-agent-poll
systemctl daemon-reload
systemd-analyze verify margo-agent.service margo-agent-poll.service margo-agent-poll.timer

say "the service: install; a newer package restarts it, the workload stays up"
systemctl enable --now margo-agent
publish "Hello from the edge"
until_so 150 page_says "Hello from the edge"
before=$(systemctl show --property=MainPID --value margo-agent)
sed 's/^__version__ = "\(.*\)"/__version__ = "\1.1"/' margo_agent.py > "$work/margo_agent.py"
sh examples/packaging/debian.sh "$work/debs" "$work/margo_agent.py"
dpkg --install "$work"/debs/margo-agent_*.1-1_all.deb
[ "$(systemctl show --property=MainPID --value margo-agent)" != "$before" ]
page_says "Hello from the edge"
systemctl disable --now margo-agent

say "the timer: update"
publish "Good evening from line 4"
mkdir -p /etc/systemd/system/margo-agent-poll.timer.d       # sooner than in a plant
printf '[Timer]\nOnBootSec=\nOnUnitInactiveSec=\nOnActiveSec=1s\nOnUnitInactiveSec=2s\nRandomizedDelaySec=0\n' \
    > /etc/systemd/system/margo-agent-poll.timer.d/sooner.conf
systemctl daemon-reload
systemctl enable --now margo-agent-poll.timer
until_so 60 page_says "Good evening"
systemctl stop margo-agent-poll.timer
page_says "Good evening"

say "cron's file: remove"
systemctl stop margo-agent-poll.service
withdraw
# as cron reads it: lines of variables, the command by sh; the wait is cut short
line=$(sed -n 's/^\* \* \* \* \* root //p' /usr/share/doc/margo-agent/examples/margo-agent.cron | sed 's/--spread 50s/--spread 2s/')
variables=$(sed -n '/^[A-Z]*=/p' /usr/share/doc/margo-agent/examples/margo-agent.cron)
# shellcheck disable=SC2086
env -i $variables HOME=/root CONTAINERS_CONF="$work/engine/containers.conf" CONTAINERS_STORAGE_CONF="$work/engine/storage.conf" \
    sh -c "$line"
grep -q 'web removed' "$work/wfm.log"
is_silent

say "removed, and forgotten"
dpkg --remove margo-agent
[ ! -e /usr/bin/margo-agent ]
[ ! -e /usr/share/margo-agent ]
[ -e /var/lib/margo-agent/state.json ]
dpkg --purge margo-agent
[ ! -e /var/lib/margo-agent ]
[ -e /etc/margo/agent.yaml ]
say "all is well"
