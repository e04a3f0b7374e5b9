#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# A bundle for a ticket: what the agent knows, what is wrong, what the engine says.  Secrets are not in it: the configuration is printed with
# secrets masked, and neither keys, tokens, parameters nor environments of containers are read.
#
#   sh examples/support.sh [FILE.tar.gz]          # the agent is $MARGO_AGENT (default: margo-agent), its configuration $MARGO_CONFIG
#
# Containers' logs are added only with MARGO_SUPPORT_LOGS=1: what applications write may be secret.
set -u
umask 077
out=${1:-margo-support-$(date -u +%Y%m%dT%H%M%SZ).tar.gz}
agent=${MARGO_AGENT:-margo-agent}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/margo-support"
cd "$work/margo-support" || exit 1

# keep NAME COMMAND...: what it prints, and the exit code where that is not 0
keep() {
    name=$1
    shift
    # shellcheck disable=SC2086
    "$@" > "$name" 2>&1 || echo "exit code $?" >> "$name"
}
# shellcheck disable=SC2086
{
    keep version.txt $agent version --json
    keep config.txt $agent config
    keep doctor.txt $agent doctor
    keep status.json $agent status --json
    keep history.txt $agent history
    keep plan.txt $agent plan
    keep capabilities.json $agent capabilities
}
keep system.txt uname -a
keep space.txt df -h
keep memory.txt cat /proc/meminfo
keep python.txt python3 --version
for engine in podman docker; do
    if command -v $engine >/dev/null 2>&1; then
        keep "$engine.txt" $engine --version
        keep "$engine-ps.txt" $engine ps --all --filter label=org.margo.deployment --format '{{.Names}} {{.Image}} {{.Status}} {{.Ports}}'
    fi
done
if command -v journalctl >/dev/null 2>&1; then keep journal.txt journalctl --no-pager --unit margo-agent --since -1d; fi
if [ "${MARGO_SUPPORT_LOGS:-}" = 1 ]; then
    sed -n 's/.*"deploymentId": "\(.*\)".*/\1/p' status.json | while read -r name; do
        # shellcheck disable=SC2086
        keep "logs-$name.txt" $agent logs "$name" --tail 200 < /dev/null
    done
fi
cd "$OLDPWD" || exit 1
tar -czf "$out" -C "$work" margo-support
echo "$out"
