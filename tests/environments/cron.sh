#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# README's line in /etc/cron.d: a poll a minute, with the PATH that cron gives.
set -eu
. tests/environments/scenario.sh

say "an engine, certificates, a WFM"
prepare /srv/test

say "cron: install, update, remove, a minute each"
install -D -m 0755 margo_agent.py /usr/local/lib/margo/margo_agent.py
mkdir -p /etc/margo
cp "$work"/etc/* /etc/margo/
cat > /etc/cron.d/margo-agent <<END
CONTAINERS_CONF=$work/engine/containers.conf
CONTAINERS_STORAGE_CONF=$work/engine/storage.conf
* * * * * root cd /usr/local/lib/margo && python3 -m margo_agent run --once
END
systemctl start cron
live 150
say "all is well"
