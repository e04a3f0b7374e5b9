#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# The main job on real parts, in under two minutes, leaving nothing behind:
#
#   sh examples/quickstart.sh [--install] [--enroll]
#
# makes certificates, starts the example Workload Fleet Manager, publishes a small web server as a Compose Archive, lets the agent
# install, update and remove it, and asks the application itself each time.  What is missing (podman, a container runtime and
# network, openssl, curl, busybox) is told; --install has the system's package manager install it.  All else happens in a temporary
# folder: podman keeps its containers, images and networks there, so what runs on this machine is neither seen nor touched.
#
# --enroll shows something else: the whole life of an identity in a minute, by certificates that live for seconds.  It needs no podman.
set -eu
cd "$(dirname "$0")/.."
repository=$(pwd)
install=no
enroll=no
for word in "$@"; do
    case $word in
        --install) install=yes ;;
        --no-install) install=no ;;             # as it is without; it was called so once
        --enroll) enroll=yes ;;
        *) echo "usage: sh examples/quickstart.sh [--install] [--enroll]" >&2; exit 2 ;;
    esac
done

bold='' plain=''
if [ -t 1 ] && [ "${TERM:-dumb}" != dumb ]; then bold=$(printf '\033[1m') plain=$(printf '\033[0m'); fi
say() {
    printf '\n%s== %s%s\n' "$bold" "$*" "$plain"
}

# need COMMAND PACKAGE: adds the package to the list of what is missing
missing=
need() {
    command -v "$1" >/dev/null 2>&1 || [ -x "/usr/sbin/$1" ] || missing="$missing $2"
}

say "What this needs"
need python3 python3
need openssl openssl
need curl curl
if [ $enroll = no ]; then
    need podman podman
    if ! command -v runc >/dev/null 2>&1 && ! command -v crun >/dev/null 2>&1 && [ ! -x /usr/sbin/runc ]; then missing="$missing runc"; fi
    [ -x /bin/busybox ] || missing="$missing busybox-static"
    # Containers are joined by netavark, with aardvark-dns, which lets them find each other by name, or by an older podman's CNI plugins.
    [ -n "$(ls /usr/lib*/podman/netavark /usr/local/lib*/podman/netavark /usr/lib*/cni/bridge /opt/cni/bin/bridge 2>/dev/null)" ] ||
        missing="$missing netavark aardvark-dns"
    command -v iptables >/dev/null 2>&1 || [ -x /usr/sbin/iptables ] || missing="$missing iptables"
    # without root, a container's users and its way out are made by these
    [ "$(id -u)" = 0 ] || need newuidmap uidmap
    [ "$(id -u)" = 0 ] || command -v pasta >/dev/null 2>&1 || need slirp4netns slirp4netns
fi
if [ -n "$missing" ]; then
    echo "missing:$missing"
    if [ $install = no ]; then
        echo "install these yourself, or let me do it: sh examples/quickstart.sh --install" >&2
        exit 2
    fi
    sudo=
    [ "$(id -u)" = 0 ] || sudo=sudo
    if command -v apt-get >/dev/null 2>&1; then
        echo "installing by apt-get:$missing"
        $sudo apt-get update -qq
        # shellcheck disable=SC2086
        $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing ca-certificates >/dev/null
    elif command -v dnf >/dev/null 2>&1; then
        echo "installing by dnf:$missing"
        # shellcheck disable=SC2086
        $sudo dnf install -y -q $(echo "$missing" | sed 's/busybox-static/busybox/; s/uidmap/shadow-utils/')
    elif command -v apk >/dev/null 2>&1; then
        echo "installing by apk:$missing"
        # shellcheck disable=SC2086
        $sudo apk add -q $(echo "$missing" | sed 's/uidmap/shadow-uidmap/')
    else
        echo "no apt-get, dnf or apk here; install these by hand" >&2
        exit 2
    fi
else
    echo "everything is there"
fi

work=$(mktemp -d)
wfm=
mis=
finish() {
    code=$?
    trap - EXIT INT TERM
    if [ $code != 0 ] && [ $code -lt 128 ] && [ -e "$work/agent.yaml" ]; then
        say "It failed; what the agent makes of it" >&2
        agent doctor >&2 || true
        [ ! -e "$work/wfm.log" ] || { echo "and the last words of the WFM:"; tail -n 5 "$work/wfm.log"; } >&2
    fi
    [ -z "$wfm" ] || kill "$wfm" 2>/dev/null || true
    [ -z "$mis" ] || kill "$mis" 2>/dev/null || true
    [ ! -d "$work/engine" ] || remove_engine "$work/engine"
    rm -rf "$work"
    if [ $code = 0 ]; then say "Done, and nothing is left behind"; else say "Failed (exit $code)" >&2; fi
    exit $code
}
# shellcheck source=examples/engine.sh
. examples/engine.sh
deployment=$(cat /proc/sys/kernel/random/uuid)      # a new one each time: the kernel's names of networks come from it
trap finish EXIT
trap 'exit 130' INT TERM

# wait_for_line FILE WORD: the rest of the first line that begins with a word
wait_for_line() {
    for _ in 1 2 3 4 5 6 7 8 9 10; do
        if sed -n "s/^$2 //p" "$1" | grep . ; then return; fi
        sleep 1
    done
    cat "$1" >&2
    return 1
}
agent() {
    echo "\$ margo_agent.py $*"
    RUNTIME_DIRECTORY="$work/run" python3 "$repository/margo_agent.py" -c "$work/agent.yaml" "$@"
}

if [ $enroll = yes ]; then
    say "A test trust domain, its WFM, and no certificate for this device"
    sh examples/pki.sh "$work/pki"
    rm "$work/pki/client.pem" "$work/pki/client.key"
    mkdir -p "$work/mis" "$work/deployments" "$work/wfm"
    python3 examples/wfm.py --listen localhost:0 --certificate "$work/pki/wfm.pem" --key "$work/pki/wfm.key" \
        --trust-bundle "$work/pki/bundle.json" --deployments "$work/deployments" --state "$work/wfm" > "$work/wfm.log" 2>&1 &
    wfm=$!
    # start_mis ADDRESS: the identity service, whose certificates live for 20 seconds and whose revocation lists for 6
    start_mis() {
        python3 examples/mis.py --listen "$1" --anchor "$work/pki/ca.pem" --anchor-key "$work/pki/ca.key" --trust-bundle "$work/pki/bundle.json" \
            --site-certificate "$work/pki/site.pem" --site-key "$work/pki/site.key" --state "$work/mis" --lifetime 20 --crl-validity 6 \
            > "$work/mis.log" 2>&1 &
        mis=$!
        service=$(wait_for_line "$work/mis.log" listening)
    }
    start_mis localhost:0
    # token TOKEN REVIEW: makes a one-time token known to the service and puts it on the device
    token() {
        printf '{"%s": {"client": "line-4-cell-2", "review": %s}}' "$1" "$2" > "$work/mis/tokens.json"
        (umask 077; echo "$1" > "$work/token")
    }
    cat > "$work/agent.yaml" <<END
state_dir: $work/state
wfm: {url: "$(wait_for_line "$work/wfm.log" listening)"}
identity:
  {certificate: svid.pem, key: svid.key, discovery: "https://localhost:${service##*:}/.well-known/margo", ca: pki/site-ca.pem,
   enrollment: est, est: {token_file: token}}
device: {id: line-4-cell-2, vendor: Example Industries, modelNumber: EG-100, serialNumber: "0042"}
runtime: {compose: off}
END
    serial() {
        openssl x509 -in "$work/svid.pem" -noout -serial
    }

    say "A one-time token; an operator takes two seconds to approve"
    token first:time 2
    until agent enroll; do sleep 1; done
    openssl x509 -in "$work/svid.pem" -noout -serial -enddate -ext subjectAltName
    [ ! -e "$work/token" ] && echo "the token is gone"

    say "Between 40 and 60 % of its life it renews itself, with the same key"
    first=$(serial)
    while [ "$(serial)" = "$first" ]; do
        sleep 1
        agent -q run --once
    done
    serial

    say "The WFM's certificate is revoked: nothing is said to it any more, until that is taken back"
    printf '{"anchor": ["%s"]}' "$(openssl x509 -in "$work/pki/wfm.pem" -noout -serial | cut -d= -f2)" > "$work/mis/revoked.json"
    while agent run --once; do sleep 1; done
    rm "$work/mis/revoked.json"
    until agent -q run --once; do sleep 1; done

    say "The identity service is away until the certificate has ended"
    kill $mis
    while code=0; agent -q run --once || code=$?; [ $code != 5 ]; do sleep 2; done

    say "It is back; a lapsed certificate renews nothing, a fresh token does it"
    start_mis "localhost:${service##*:}"
    agent run --once && exit 1
    token second:time 0
    agent run --once
    agent status

    say "What the identity service issued"
    cut -c 1-200 "$work/mis/issued.jsonl"
    exit 0
fi

say "A container image from busybox, and a look whether containers run here"
mkdir -p "$work/image/bin" "$work/image/www" "$work/image/tmp"
cp /bin/busybox "$work/image/bin/busybox"
for name in sh echo httpd wget sleep true; do ln -s busybox "$work/image/bin/$name"; done
make_engine "$work/engine" "$work/image" localhost/margo-hello:1
use_engine "$work/engine"
podman --version

say "Certificates: a test trust domain, the WFM's SVID, this device's SVID"
sh examples/pki.sh "$work/pki"
openssl x509 -in "$work/pki/client.pem" -noout -ext subjectAltName | tail -n 1

say "The example Workload Fleet Manager, and the application as a Compose Archive in its registry"
mkdir -p "$work/deployments" "$work/packages/hello/1.0.0" "$work/wfm"
cp examples/hello/compose.yaml "$work/packages/hello/1.0.0/"
: > "$work/wfm.log"
python3 examples/wfm.py --listen localhost:0 --certificate "$work/pki/wfm.pem" --key "$work/pki/wfm.key" --trust-bundle "$work/pki/bundle.json" \
    --deployments "$work/deployments" --state "$work/wfm" --registry localhost:0 --packages "$work/packages" \
    --site-certificate "$work/pki/site.pem" --site-key "$work/pki/site.key" > "$work/wfm.log" 2>&1 &
wfm=$!
for _ in 1 2 3 4 5 6 7 8 9 10; do
    url=$(sed -n 's/^listening //p' "$work/wfm.log")
    [ -n "$url" ] && break
    sleep 1
done
registry=$(sed -n 's,^registry https://,,p' "$work/wfm.log")
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
cat "$work/wfm.log"

# publish GREETING: the deployment of examples/hello, for this registry and port
publish() {
    sed -e "s,localhost:5000,$registry," -e "s,value: 8080,value: $port," -e "s,Hello from the edge,$1," \
        -e "s,3f1d6f0e-5c35-4c9f-9b43-2f6f6c1f7a10,$deployment," examples/hello/deployment.yaml \
        > "$work/deployment.new"
    mv "$work/deployment.new" "$work/deployments/hello.yaml"
}

cat > "$work/agent.yaml" <<END
state_dir: $work/state
wfm: {url: "$url"}
identity: {certificate: pki/client.pem, key: pki/client.key, trust_bundle: pki/bundle.json}
device: {id: line-4-cell-2, vendor: Example Industries, modelNumber: EG-100, serialNumber: "0042"}
runtime: {compose: builtin, engine: podman, settle: 1s}
registries: {"$registry": {ca: pki/site-ca.pem}}
END
page() {
    echo "\$ curl http://127.0.0.1:$port/"
    curl --silent --show-error --fail --retry 20 --retry-delay 1 --retry-connrefused "http://127.0.0.1:$port/" | tee "$work/page"
    grep -q "$1" "$work/page"
}

say "First poll: the agent enrolls, installs and reports"
publish "Hello from the edge"
agent run --once
agent status
page "Hello from the edge"

say "A parameter changes at the WFM"
publish "Good evening from line 4"
agent plan
agent run --once
page "Good evening from line 4"

say "The deployment is withdrawn"
rm "$work/deployments/hello.yaml"
agent run --once
if curl --silent --max-time 2 "http://127.0.0.1:$port/"; then echo "it still answers" >&2; exit 1; fi

say "What the WFM was told"
grep -E 'capabilities|status' "$work/wfm.log" | cut -c 1-140
