# SPDX-License-Identifier: Apache-2.0
# For the scripts beside it: an engine, certificates and a WFM in $work, the application of examples/hello, and looks at it.
# shellcheck disable=SC2154
deployment=$(cat /proc/sys/kernel/random/uuid)
. examples/engine.sh

say() {
    echo "== $*"
}

# until_so SECONDS COMMAND...: waits until a command succeeds
until_so() {
    left=$1
    shift
    until "$@" > /dev/null 2>&1; do
        left=$((left - 1))
        if [ $left -le 0 ]; then
            echo "not within its time: $*" >&2
            journalctl --no-pager -n 60 >&2
            journalctl --no-pager -n 40 -u margo-agent >&2
            exit 1
        fi
        sleep 1
    done
}

page_says() {
    curl --silent --fail --max-time 2 http://127.0.0.1:18080/ | grep -q "$1"
}

is_silent() {
    ! curl --silent --max-time 2 http://127.0.0.1:18080/
}

# prepare FOLDER: all that the agent needs; its configuration is FOLDER/etc/agent.yaml, its engine FOLDER/engine
prepare() {
    work=$1
    mkdir -p "$work/image/bin" "$work/image/www" "$work/image/tmp" "$work/deployments" "$work/packages/hello/1.0.0" "$work/wfm" "$work/etc"
    cp /bin/busybox "$work/image/bin/busybox"
    for name in sh echo httpd wget sleep true; do ln -sf busybox "$work/image/bin/$name"; done
    make_engine "$work/engine" "$work/image" localhost/margo-hello:1
    sh examples/pki.sh "$work/pki" > /dev/null
    cp examples/hello/compose.yaml "$work/packages/hello/1.0.0/"
    systemd-run --quiet --unit=example-wfm --property="StandardOutput=file:$work/wfm.log" --working-directory="$(pwd)" \
        python3 examples/wfm.py --listen localhost:0 --certificate "$work/pki/wfm.pem" --key "$work/pki/wfm.key" \
        --trust-bundle "$work/pki/bundle.json" --deployments "$work/deployments" --state "$work/wfm" --registry localhost:0 \
        --packages "$work/packages" --site-certificate "$work/pki/site.pem" --site-key "$work/pki/site.key"
    until_so 30 grep -q ^registry "$work/wfm.log"
    registry=$(sed -n 's,^registry https://,,p' "$work/wfm.log")
    cp "$work/pki/client.pem" "$work/pki/client.key" "$work/pki/bundle.json" "$work/pki/site-ca.pem" "$work/etc/"
    cat > "$work/etc/agent.yaml" <<END
wfm: {url: "$(sed -n 's/^listening //p' "$work/wfm.log")"}
identity: {certificate: client.pem, key: client.key, trust_bundle: bundle.json}
device: {id: line-4-cell-2, vendor: Example Industries, modelNumber: EG-100, serialNumber: "0042"}
poll: {interval: 2s}
runtime: {settle: 1s}
registries: {"$registry": {ca: site-ca.pem}}
END
}

# install_agent: the file where README puts it, and what was prepared in /etc/margo
install_agent() {
    install -D -m 0755 margo_agent.py /usr/local/lib/margo/margo_agent.py
    configure_agent
}

# configure_agent: what was prepared, in /etc/margo
configure_agent() {
    mkdir -p /etc/margo
    cp "$work"/etc/* /etc/margo/
}

# lend_engine UNIT...: the engine that was prepared, to what these units start
lend_engine() {
    for unit in "$@"; do
        mkdir -p "/etc/systemd/system/$unit.service.d"
        printf '[Service]\nEnvironment=CONTAINERS_CONF=%s CONTAINERS_STORAGE_CONF=%s\n' "$work/engine/containers.conf" \
            "$work/engine/storage.conf" > "/etc/systemd/system/$unit.service.d/engine.conf"
    done
}

# publish GREETING: the deployment as the WFM shows it
publish() {
    sed -e "s,localhost:5000,$registry," -e "s,value: 8080,value: 18080," -e "s,Hello from the edge,$1," \
        -e "s,3f1d6f0e-5c35-4c9f-9b43-2f6f6c1f7a10,$deployment," examples/hello/deployment.yaml > "$work/deployment.new"
    mv "$work/deployment.new" "$work/deployments/hello.yaml"
}

withdraw() {
    rm "$work/deployments/hello.yaml"
}

# live SECONDS: installs, updates and removes the application, each within its time; something runs the agent meanwhile
live() {
    publish "Hello from the edge"
    until_so "$1" page_says "Hello from the edge"
    publish "Good evening from line 4"
    until_so "$1" page_says "Good evening"
    withdraw
    until_so "$1" grep -q 'web removed' "$work/wfm.log"
    is_silent
}
