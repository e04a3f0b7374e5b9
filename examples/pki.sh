#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Makes certificates for trying things out: nobody should trust a device with them.
#
#   sh examples/pki.sh DIR [CLIENT_ID]
#
#   ca.pem, ca.key          the trust anchor of the trust domain factory.example
#   bundle.json             the SPIFFE trust bundle that holds it
#   wfm.pem, wfm.key        the SVID of the Workload Fleet Manager spiffe://factory.example/margo/wfm/main
#   client.pem, client.key  the SVID of its client CLIENT_ID (default: line-4-cell-2)
#   site-ca.pem, site.pem, site.key   an ordinary server certificate for localhost, for a registry or an identity service
#
# What is there already stays.  To add a client, move client.pem and client.key away and call this again with its CLIENT_ID.
# At the end it says which setting of the agent, or which option of examples/wfm.py, takes what.
set -eu
umask 077
dir=${1:?usage: sh examples/pki.sh DIR [CLIENT_ID]}
client=${2:-line-4-cell-2}
wfm=spiffe://factory.example/margo/wfm/main
mkdir -p "$dir"
cd "$dir"
had=$(ls)

new_key() {
    openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$1" 2>/dev/null
}

# authority NAME SUBJECT: a self-signed CA certificate
authority() {
    [ -e "$1.pem" ] && return
    new_key "$1.key"
    openssl req -new -x509 -sha256 -days 3650 -subj "$2" -key "$1.key" -out "$1.pem.tmp" -config /dev/stdin -extensions ext <<END
[req]
distinguished_name = dn
[dn]
[ext]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
$3
END
    mv "$1.pem.tmp" "$1.pem"
}

# leaf NAME AUTHORITY SUBJECT ALTERNATIVE_NAME: a certificate for a server or client, valid for 90 days
leaf() {
    [ -e "$1.pem" ] && return
    new_key "$1.key"
    openssl req -new -sha256 -subj "$3" -key "$1.key" -out "$1.csr" -config /dev/stdin <<END
[req]
distinguished_name = dn
[dn]
END
    cat > "$1.ext" <<END
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth, clientAuth
authorityKeyIdentifier = keyid
subjectAltName = $4
END
    openssl x509 -req -sha256 -days 90 -in "$1.csr" -CA "$2.pem" -CAkey "$2.key" -set_serial "0x$(openssl rand -hex 16)" \
        -extfile "$1.ext" -out "$1.pem.tmp" 2>/dev/null
    rm -f "$1.csr" "$1.ext"
    mv "$1.pem.tmp" "$1.pem"
}

# coordinate FROM TO: a part of the anchor's public point, as JSON Web Keys spell it
coordinate() {
    openssl x509 -in ca.pem -noout -pubkey | openssl pkey -pubin -outform DER | tail -c 64 | tail -c "+$1" | head -c 32 \
        | base64 | tr '+/' '-_' | tr -d '=\n'
}

authority ca "/O=Example Industries/CN=Test anchor" "subjectAltName = URI:spiffe://factory.example"
authority site-ca "/O=Example Industries/CN=Test site CA" ""
leaf wfm ca "/O=Example Industries" "URI:$wfm"
leaf client ca "/O=Example Industries" "URI:$wfm/client/$client"
leaf site site-ca "/CN=localhost" "DNS:localhost, IP:127.0.0.1"
found=$(openssl x509 -in client.pem -noout -ext subjectAltName | sed -n 's/.*URI://p')
if [ $# -gt 1 ] && [ "$found" != "$wfm/client/$client" ]; then
    echo "$PWD/client.pem is there already, and it is another client's: $found" >&2
    echo "move client.pem and client.key away to make one for $client" >&2
    exit 1
fi
if [ ! -e bundle.json ]; then
    cat > bundle.json.tmp <<END
{"keys": [{"use": "x509-svid", "kty": "EC", "crv": "P-256", "x": "$(coordinate 1)", "y": "$(coordinate 33)",
  "x5c": ["$(openssl x509 -in ca.pem -outform DER | base64 | tr -d '\n')"]}],
 "spiffe_sequence": 1, "spiffe_refresh_hint": 3600}
END
    mv bundle.json.tmp bundle.json
fi

tell() {
    case "
$had
" in *"
$1
"*) made="was there" ;; *) made=made ;; esac
    printf '  %-14s %-10s %s\n' "$1" "$made" "$2"
}
echo "in $PWD, for trying things out:"
tell client.pem   "device: identity.certificate, the client ${found##*/}"
tell client.key   "device: identity.key"
tell bundle.json  "device: identity.trust_bundle; wfm.py --trust-bundle"
tell site-ca.pem  "device: registries.HOST.ca for a registry with site.pem; identity.ca with the profile signed"
tell wfm.pem      "wfm.py --certificate: $wfm"
tell wfm.key      "wfm.py --key"
tell site.pem     "wfm.py --site-certificate: a server called localhost"
tell site.key     "wfm.py --site-key"
tell ca.key       "signs clients and WFMs: keep it off devices; ca.pem is its certificate"
tell site-ca.key  "signs servers: keep it off devices"
