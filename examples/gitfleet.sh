#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# A fleet of two devices that is driven by Git alone, on real parts, leaving nothing behind:
#
#   sh examples/gitfleet.sh
#
# makes a bare repository, commits an application, lets the agents of two devices follow, and shows what each says on its own branch;
# then changes the application, reverts that, and both follow again.  Each device has a container engine of its own.  Needs what
# examples/quickstart.sh needs, and git; all happens in a temporary folder, beside what runs on this machine and without touching it.
set -eu
cd "$(dirname "$0")/.."
repository=$(pwd)
for name in git podman openssl python3 /bin/busybox; do
    command -v "$name" >/dev/null 2>&1 || { echo "$name is missing; sh examples/quickstart.sh --install installs all but git" >&2; exit 2; }
done

bold='' plain=''
if [ -t 1 ] && [ "${TERM:-dumb}" != dumb ]; then bold=$(printf '\033[1m') plain=$(printf '\033[0m'); fi
say() {
    printf '\n%s== %s%s\n' "$bold" "$*" "$plain"
}

devices="press-1 press-2"
deployment=$(cat /proc/sys/kernel/random/uuid)
work=$(mktemp -d)
wfm=
finish() {
    code=$?
    trap - EXIT INT TERM
    [ -z "$wfm" ] || kill "$wfm" 2>/dev/null || true
    for device in $devices; do
        [ ! -d "$work/$device/engine" ] || remove_engine "$work/$device/engine"
    done
    rm -rf "$work"
    if [ $code = 0 ]; then say "Done, and nothing is left behind"; else say "Failed (exit $code)" >&2; fi
    exit $code
}
# shellcheck source=examples/engine.sh
. examples/engine.sh
trap finish EXIT
trap 'exit 130' INT TERM

say "Two devices, each with an engine and an image from busybox"
mkdir -p "$work/image/bin" "$work/image/tmp"
cp /bin/busybox "$work/image/bin/busybox"
for name in sh echo sleep true; do ln -s busybox "$work/image/bin/$name"; done
for device in $devices; do
    make_engine "$work/$device/engine" "$work/image" localhost/margo-greeter:1
    echo "$device"
done

say "A registry with the application's Compose Archive: the example WFM has one, and is asked for nothing else"
sh examples/pki.sh "$work/pki" >/dev/null
mkdir -p "$work/packages/greeter/1.0.0" "$work/deployments" "$work/wfm"
cat > "$work/packages/greeter/1.0.0/compose.yaml" <<'END'
services:
  greeter:
    image: localhost/margo-greeter:1
    init: true
    network_mode: none
    environment: [GREETING]
    command: [sh, -c, 'echo "$$GREETING"; exec sleep 100000']
END
: > "$work/wfm.log"
python3 examples/wfm.py --listen localhost:0 --certificate "$work/pki/wfm.pem" --key "$work/pki/wfm.key" --trust-bundle "$work/pki/bundle.json" \
    --deployments "$work/deployments" --state "$work/wfm" --registry localhost:0 --packages "$work/packages" \
    --site-certificate "$work/pki/site.pem" --site-key "$work/pki/site.key" > "$work/wfm.log" 2>&1 &
wfm=$!
for _ in 1 2 3 4 5 6 7 8 9 10; do
    registry=$(sed -n 's,^registry https://,,p' "$work/wfm.log")
    [ -n "$registry" ] && break
    sleep 1
done
echo "https://$registry"

say "The fleet's repository, and the application's first commit"
git init --quiet --bare "$work/fleet.git"
git -C "$work/fleet.git" symbolic-ref HEAD refs/heads/main
git init --quiet "$work/operator"
cd "$work/operator"
git symbolic-ref HEAD refs/heads/main
git config user.name "Plant operator"
git config user.email operator@plant.example
git config commit.gpgSign false
git remote add origin "$work/fleet.git"

# publish GREETING: commits the deployment, which every device of this folder runs, because it names none
publish() {
    mkdir -p press-shop
    cat > press-shop/greeter.yaml <<END
apiVersion: application.margo.org/v1alpha1
kind: ApplicationDeployment
metadata:
  annotations: {applicationId: greeter, id: $deployment}
  name: greeter
  namespace: press-shop
spec:
  deploymentProfile:
    type: docker-compose
    components:
      - name: web
        properties: {repository: "oci://$registry/greeter", revision: 1.0.0}
  parameters:
    greeting: {value: "$1", targets: [{pointer: ENV.GREETING, components: [web]}]}
END
    git add press-shop
    git commit --quiet -m "Greet with: $1"
    git push --quiet origin main
    git log --oneline -1
}
publish "Hello from the press shop"

for device in $devices; do
    cat > "$work/$device/agent.yaml" <<END
state_dir: $work/$device/state
wfm: {profile: git, url: "file://$work/fleet.git"}
git: {branch: main, path: press-shop}
device: {id: $device, vendor: Example Industries, modelNumber: P-7, serialNumber: "$device"}
runtime: {compose: builtin, engine: podman, settle: 1s}
registries: {"$registry": {ca: $work/pki/site-ca.pem}}
END
done

# follow GREETING: one cycle of each device; what runs there has to say GREETING, and the device's branch that it does
follow() {
    head=$(git rev-parse HEAD)
    for device in $devices; do
        echo "\$ margo_agent.py -c $device/agent.yaml run --once"
        RUNTIME_DIRECTORY="$work/$device/memory" on_engine "$work/$device/engine" \
            python3 "$repository/margo_agent.py" -c "$work/$device/agent.yaml" run --once
        container=$(on_engine "$work/$device/engine" podman ps --quiet --filter "label=org.margo.deployment=$deployment")
        heard=$(on_engine "$work/$device/engine" podman logs "$container")
        echo "$device runs: $heard"
        [ "$heard" = "$1" ]
    done
    git fetch --quiet origin
    for device in $devices; do
        echo "\$ git show origin/status/$device:deployments/$deployment.json"
        git show "origin/status/$device:deployments/$deployment.json" | tee "$work/report"
        grep -q "\"commit\": \"$head\"" "$work/report"
    done
}

say "Both devices install it, and say so on their branches"
follow "Hello from the press shop"

say "The application changes"
publish "Good evening, press shop"
follow "Good evening, press shop"

say "The change is reverted: a new commit, so both devices follow"
git revert --no-edit HEAD >/dev/null
git push --quiet origin main
follow "Hello from the press shop"

say "The history of one device, as Git keeps it for free"
git log --oneline "origin/status/press-1"
