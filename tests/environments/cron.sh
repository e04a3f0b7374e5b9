#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# The file of examples in /etc/cron.d: a poll a minute.
set -eu
. tests/environments/scenario.sh

say "an engine, certificates, a WFM"
prepare /srv/test

say "cron: install, update, remove, a minute each"
install_agent
{
    echo "CONTAINERS_CONF=$work/engine/containers.conf"
    echo "CONTAINERS_STORAGE_CONF=$work/engine/storage.conf"
    cat examples/packaging/margo-agent.cron
} > /etc/cron.d/margo-agent
systemctl start cron
live 150
say "all is well"
