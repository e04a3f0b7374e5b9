#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Read-only firmware: the agent as bytecode alone, and nothing can be written but memory.
set -eu
. tests/environments/scenario.sh

say "the agent as bytecode"
mkdir -p /usr/local/lib/margo
python3 -c 'import py_compile; py_compile.compile("margo_agent.py", "/usr/local/lib/margo/margo_agent.pyc", doraise=True)'

say "an engine, certificates, a WFM, in memory"
prepare /run/test
echo "state_dir: /run/margo-state" >> "$work/etc/agent.yaml"

say "the daemon, for which all but /run and /tmp is read-only: install, update, remove"
systemd-run --quiet --unit=frozen-agent --property=ProtectSystem=strict --property="ReadWritePaths=/run /tmp" \
    --setenv=CONTAINERS_CONF="$work/engine/containers.conf" \
    --setenv=CONTAINERS_STORAGE_CONF="$work/engine/storage.conf" --working-directory=/usr/local/lib/margo \
    python3 -m margo_agent -c "$work/etc/agent.yaml" run
live 150
systemctl stop frozen-agent
[ "$(systemctl show --property=Result --value frozen-agent)" = success ]
say "all is well"
