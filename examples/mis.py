#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""mis.py: an example Margo Identity Service (MIS), for development and demonstration.

It is the server that automatic enrollment needs, in one file beside wfm.py, whose HTTP it uses: discovery document, trust bundle, EST
(RFC 7030: simpleenroll, simplereenroll, cacerts) and revocation lists, by the Python standard library and the openssl command.  It is strict
about what a client may send.  Its keys lie in plain files: nobody should trust a device with what it issues.

    sh examples/pki.sh pki                                   # the anchor of the trust domain, and the site's certificate
    mkdir -p mis
    echo '{"line-4:secret": {"client": "line-4-cell-2"}}' > mis/tokens.json
    python3 examples/mis.py --listen localhost:8444 --anchor pki/ca.pem --anchor-key pki/ca.key --trust-bundle pki/bundle.json \\
        --site-certificate pki/site.pem --site-key pki/site.key --state mis --lifetime 300

SVIDs come from an intermediate CA that is made at the first start, so a chain has to be built from what cacerts says.  The identity
spiffe://<trust domain>/margo/wfm/<wfm id>/client/<client> follows from the token or the authorization certificate alone; names in a
request are ignored at enrollment and must be those of the SVID, byte for byte, at renewal.  An SVID that was renewed stays valid.

Authorization is by a token (HTTP Basic, no client certificate), or by a certificate under --authorization-ca, whose common name is
the client.  A token serves one key: until --replay seconds after its first request that key may ask again, no other ever.

The state directory holds
    tokens.json        written by you, read on each request: {"<user>:<secret>": {"client": ID, "review": SECONDS}}; with review the answer is
                       202 until so many seconds after the first request
    revoked.json       written by you: {"anchor": [serial in hex, ...], "issuing": [...]}, what the two revocation lists list
    misissue.json      written by you, to see what a client makes of it: what is wrong with the next answers, see `Odd`
    used.json          which token served which key (hashes), when
    issued.jsonl       every SVID issued: time, client, serial, key (hash), leaf (hash), how it was authorized
    faults.json, requests.jsonl    as wfm.py describes them
"""
import argparse
import base64
import hashlib
import json
import os
import re
import secrets
import signal
import ssl
import subprocess
import sys
import threading
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from wfm import PARTIAL_CHAIN, Faults, Handler, Problem, Reply, Server, append_json, dispatch, load_anchors, make_json, make_log, \
    read_json, serve_content, write_json                    # noqa: E402

# ------------------------------------------------------------------------------------------------------------------------------
# 1. DER
# ------------------------------------------------------------------------------------------------------------------------------

SEQUENCE, SET, INTEGER, BITS, OCTETS, OID, TEXT = 0x30, 0x31, 0x02, 0x03, 0x04, 0x06, 0x0C


def der(tag, *parts):
    """One element."""
    body = b"".join(parts)
    size = len(body)
    length = bytes([size]) if size < 128 else (lambda raw: bytes([0x80 | len(raw)]) + raw)(size.to_bytes((size.bit_length() + 7) // 8, "big"))
    return bytes([tag]) + length + body


def read_der(data):
    """[(tag, value, whole element)]; raises ValueError."""
    found, position = [], 0
    while position < len(data):
        start, tag = position, data[position]
        length, position = (data[position + 1:position + 2] or b"\xff")[0], position + 2
        if length & 0x80:
            count = length & 0x7F
            length, position = int.from_bytes(data[position:position + count], "big"), position + count
            if not 1 <= count <= 4:
                raise ValueError("a bad length")
        if position + length > len(data):
            raise ValueError("cut short")
        position += length
        found.append((tag, data[position - length:position], data[start:position]))
    return found


def oid(text):
    """An object identifier."""
    numbers = [int(part) for part in text.split(".")]
    body = b""
    for number in [40 * numbers[0] + numbers[1]] + numbers[2:]:
        piece = [number & 0x7F]
        while number > 0x7F:
            number >>= 7
            piece.insert(0, 0x80 | number & 0x7F)
        body += bytes(piece)
    return der(OID, body)


def integer(number):
    """A whole number that is not negative."""
    return der(INTEGER, number.to_bytes(number.bit_length() // 8 + 1, "big"))


def moment(seconds):
    """Unix seconds as UTCTime."""
    return der(0x17, time.strftime("%y%m%d%H%M%SZ", time.gmtime(seconds)).encode())


def name(**parts):
    """A distinguished name of O, CN."""
    numbers = {"O": "2.5.4.10", "CN": "2.5.4.3"}
    return der(SEQUENCE, *[der(SET, der(SEQUENCE, oid(numbers[key]), der(TEXT, value.encode()))) for key, value in parts.items()])


def extension(number, value, critical=False):
    """A certificate extension."""
    return der(SEQUENCE, oid(number), der(0x01, b"\xff") if critical else b"", der(OCTETS, value))


ECDSA = der(SEQUENCE, oid("1.2.840.10045.4.3.2"))
SAN, CHALLENGE_PASSWORD, EXTENSION_REQUEST = oid("2.5.29.17"), oid("1.2.840.113549.1.9.7"), oid("1.2.840.113549.1.9.14")


# ------------------------------------------------------------------------------------------------------------------------------
# 2. Certificates, requests, lists
# ------------------------------------------------------------------------------------------------------------------------------

def run_openssl(*arguments, data=b""):
    """One openssl command's output; raises ValueError."""
    done = subprocess.run(["openssl"] + list(arguments), input=data, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
    words = done.stdout + done.stderr               # OpenSSL 3.0 says a failure by words alone, 3.5 on the other stream
    if done.returncode or "-verify" in arguments and b"verify OK" not in words:
        raise ValueError(f"openssl {arguments[0]}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


class Certificate:
    """What is used of a certificate: raw names, serial, public key, subjectAltName extension (raw)."""

    def __init__(self, data):
        self.der = data
        fields = read_der(read_der(read_der(data)[0][1])[0][1])
        self.serial, self.issuer, self.subject, self.spki = int.from_bytes(fields[1][1], "big"), fields[3][2], fields[5][2], fields[6][2]
        lists = [value for tag, value, _ in fields if tag == 0xA3]
        self.san = next((whole for _, value, whole in (read_der(read_der(lists[0])[0][1]) if lists else ()) if value.startswith(SAN)), None)

    def common_name(self):
        """The last CN of the subject, or ""."""
        found = [read_der(read_der(rdn)[0][1]) for _, rdn, _ in read_der(read_der(self.subject)[0][1])]
        return next((value.decode() for (_, _, kind), (_, value, _) in found[::-1] if kind == oid("2.5.4.3")), "")


def key_id(spki):
    """The key identifier that openssl's `hash` makes: SHA-1 of the public key's bits."""
    return hashlib.sha1(read_der(read_der(spki)[0][1])[1][1][1:]).digest()


def digest(data):
    return hashlib.sha256(data).hexdigest()


class Authority:
    """A certification authority: a PEM certificate and its key, which never leaves its file."""

    def __init__(self, certificate_file, key_file):
        with open(certificate_file, encoding="ascii") as file:
            self.certificate = Certificate(ssl.PEM_cert_to_DER_cert(file.read().strip()))
        self.key_file = key_file
        self.key_id = key_id(self.certificate.spki)

    @classmethod
    def load(cls, folder, stem, parent, words):
        """The authority of a folder, made at the first call; parent None: a self-signed one."""
        certificate_file, key_file = os.path.join(folder, f"{stem}.pem"), os.path.join(folder, f"{stem}.key")
        if not os.path.exists(certificate_file):
            spki = make_key(key_file)
            authority = cls.__new__(cls)
            authority.key_file, authority.key_id = key_file, key_id(spki)
            subject = name(O="Example Industries", CN=words)
            authority.certificate = type("Name", (), {"subject": subject})
            data = (parent or authority).issue(spki, subject, time.time() - 60, time.time() + 3650 * 86400, [
                extension("2.5.29.19", der(SEQUENCE, der(0x01, b"\xff")), True), extension("2.5.29.15", der(BITS, b"\x01\x06"), True)])
            with open(certificate_file + ".new", "w", encoding="ascii") as file:
                file.write(ssl.DER_cert_to_PEM_cert(data))
            os.replace(certificate_file + ".new", certificate_file)
        return cls(certificate_file, key_file)

    def sign(self, data):
        """A signed structure around its content."""
        signature = run_openssl("dgst", "-sha256", "-sign", self.key_file, data=data)
        return der(SEQUENCE, data, ECDSA, der(BITS, b"\0", signature))

    def issue(self, spki, subject, start, end, extensions):
        """A certificate with a random serial; identifiers of both keys are added."""
        serial = integer(int.from_bytes(secrets.token_bytes(16), "big") | 1 << 120)
        extensions = extensions + [extension("2.5.29.14", der(OCTETS, key_id(spki))),
                                   extension("2.5.29.35", der(SEQUENCE, der(0x80, self.key_id)))]
        return self.sign(der(SEQUENCE, der(0xA0, integer(2)), serial, ECDSA, self.certificate.subject, der(SEQUENCE, moment(start), moment(end)),
                             subject, spki, der(0xA3, der(SEQUENCE, *extensions))))

    def make_crl(self, serials, number, start, end, odd):
        """A revocation list; `odd`: see Odd."""
        entries = [der(SEQUENCE, integer(serial), moment(start)) for serial in serials]
        entries += [der(SEQUENCE, integer(1 << 100 | index), moment(start)) for index in range(odd.get("padding", 0))]
        extensions = [extension("2.5.29.35", der(SEQUENCE, der(0x80, self.key_id)))]
        if number is not None:
            extensions.append(extension("2.5.29.20", integer(number)))
        if odd.get("delta"):
            extensions.append(extension("2.5.29.27", integer(1), True))
        if odd.get("indirect"):
            extensions.append(extension("2.5.29.28", der(SEQUENCE, der(0x84, b"\xff")), True))
        if odd.get("critical"):
            extensions.append(extension("1.3.6.1.4.1.99999.1", der(0x05), True))
        content = der(SEQUENCE, integer(1), ECDSA, self.certificate.subject, moment(start), moment(end),
                      der(SEQUENCE, *entries) if entries else b"", der(0xA0, der(SEQUENCE, *extensions)))
        return der(SEQUENCE, content, ECDSA, der(BITS, b"\0", b"\0" * 70)) if odd.get("unsigned") else self.sign(content)


def make_key(path):
    """Makes an ECDSA P-256 key unless there is one; returns its public half."""
    if not os.path.exists(path):
        with open(os.open(path + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(run_openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"))
        os.replace(path + ".new", path)
    return run_openssl("pkey", "-in", path, "-pubout", "-outform", "DER")


def make_certs_only(certificates, ber=False):
    """CMS SignedData without signers; ber: with indefinite lengths, as some servers write it."""
    if ber:
        def wrap(tag, *parts):
            return bytes([tag, 0x80]) + b"".join(parts) + b"\0\0"
    else:
        wrap = der
    inner = wrap(SEQUENCE, integer(1), der(SET), der(SEQUENCE, oid("1.2.840.113549.1.7.1")), wrap(0xA0, *certificates), der(SET))
    return wrap(SEQUENCE, oid("1.2.840.113549.1.7.2"), wrap(0xA0, inner))


class SigningRequest:
    """A PKCS#10 request as EST carries it; raises a Problem for one that is not as it should be."""

    def __init__(self, request):
        if request.headers.get("Content-Type", "").split(";")[0].strip().lower() != "application/pkcs10":
            raise Problem(415, "Content-Type must be application/pkcs10")
        try:
            text = b"".join(request.body.split())
            self.der = base64.b64decode(text, validate=True)
            if len(text) % 4 or not self.der:
                raise ValueError("it is not padded base64")
            content = read_der(read_der(self.der)[0][1])[0]
            version, subject, spki, attributes = read_der(content[1])
            self.subject, self.spki = subject[2], spki[2]
            found = {read_der(value)[0][2]: read_der(value)[1][1] for _, value, _ in read_der(attributes[1])}
            if version[1] != b"\0" or attributes[0] != 0xA0:
                raise ValueError("it is no PKCS#10 request of version 1")
            extensions = read_der(read_der(found[EXTENSION_REQUEST])[0][1]) if EXTENSION_REQUEST in found else []
            self.san = next((whole for _, value, whole in extensions if value.startswith(SAN)), None)
        except (ValueError, IndexError) as error:
            raise Problem(400, f"the body is no base64 of a DER signing request: {error}") from None
        if CHALLENGE_PASSWORD in found:
            raise Problem(400, "challengePassword is not allowed")
        self.check_key()

    def check_key(self):
        """The proof of possession, and a key that the profile allows."""
        try:
            algorithm = read_der(read_der(self.spki)[0][1])[0][1]
            if oid("1.2.840.113549.1.1.1") in algorithm and len(self.spki) < 400:
                raise ValueError("an RSA key needs 3072 bits")
            run_openssl("req", "-inform", "DER", "-verify", "-noout", data=self.der)
        except ValueError as error:
            raise Problem(400, f"the signing request is not accepted: {error}") from None


# ------------------------------------------------------------------------------------------------------------------------------
# 3. The service
# ------------------------------------------------------------------------------------------------------------------------------

class Odd(dict):
    """What misissue.json asks for; every member may be left out.

    key       true: the leaf certifies another key            id        the SPIFFE ID (a list: several URIs) instead of the right one
    start     seconds from now at which the leaf begins       end       seconds from now at which it ends
    ca        true: the leaf says that it is a CA             stranger  true: the leaf is issued by a CA outside the trust bundle
    extra     so many certificates more in the answer         last      true: the leaf comes last in it
    form      "der", "pem" or "ber" instead of base64 of DER  cacerts   "none", "stranger" or "root" instead of the intermediate and the root
    discovery members of the discovery document to replace; null removes one
    crl       of the lists: number (null: none), age, validity (seconds), stranger (signed by one), other (issued by one), unsigned, delta,
              indirect, critical (an unknown extension), padding (so many entries more)
    """

    MEMBERS = ("key", "id", "start", "end", "ca", "stranger", "extra", "last", "form", "cacerts", "discovery", "crl")

    def __init__(self, path):
        super().__init__(read_json(path, {}))
        for member in set(self) - set(self.MEMBERS):
            print(f"{path}: {member} is not known", file=sys.stderr, flush=True)


class Mis:
    """The identity service of one trust domain and one WFM; `answer` takes a Request and returns a Reply or raises a Problem."""

    ROUTES = (
        (r"/\.well-known/margo", {"GET": "get_discovery"}),
        (r"/\.well-known/spiffe/bundle\.json", {"GET": "get_bundle"}),
        (r"/crl/(anchor|issuing)\.crl", {"GET": "get_crl"}),
        (r"/\.well-known/est/(?:[^/]+/)?cacerts", {"GET": "get_cacerts"}),
        (r"/\.well-known/est/(?:[^/]+/)?simpleenroll", {"POST": "enroll"}),
        (r"/\.well-known/est/(?:[^/]+/)?simplereenroll", {"POST": "renew"}),
    )

    def __init__(self, options, log):
        self.options, self.log, self.lock = options, log, threading.RLock()
        self.authorities = {"anchor": Authority(options.anchor, options.anchor_key)}
        self.authorities["issuing"] = Authority.load(options.state, "issuing", self.authorities["anchor"], "Test issuing CA")
        self.crls = {}

    def path(self, *names):
        return os.path.join(self.options.state, *names)

    def answer(self, request):
        with self.lock:
            return dispatch(self, self.ROUTES, request, request.path)

    def odd(self):
        return Odd(self.path("misissue.json"))

    def stranger(self):
        """A CA that nobody knows."""
        return Authority.load(self.options.state, "stranger", None, "Stranger")

    # What everybody may read

    def get_discovery(self, request):
        root = f"https://{request.headers.get('Host')}"
        document = {"trustDomain": self.options.trust_domain, "trustBundleUri": f"{root}/.well-known/spiffe/bundle.json",
                    "estBaseUri": f"{root}/.well-known/est/{self.options.trust_domain}",
                    "crlUris": [f"{root}/crl/anchor.crl", f"{root}/crl/issuing.crl"]}
        document.update(self.odd().get("discovery", {}))
        document = {key: value for key, value in document.items() if value is not None}
        return serve_content(request, make_json(document), "application/json", "no-cache")

    def get_bundle(self, request):
        with open(self.options.trust_bundle, "rb") as file:
            return serve_content(request, file.read(), "application/json", "no-cache")

    def get_cacerts(self, request):
        kind, root = self.odd().get("cacerts"), self.authorities["anchor"].certificate.der
        chain = {"none": [], "stranger": [self.stranger().certificate.der] if kind == "stranger" else [], "root": [root]}.get(
            kind, [root, self.authorities["issuing"].certificate.der])
        return self.make_reply(sorted(chain))       # DER sorts a SET

    def get_crl(self, request, which):
        """A list is signed anew when what it lists has changed or half of its life is over; its number then rises."""
        serials = [int(text, 16) for text in read_json(self.path("revoked.json"), {}).get(which, [])]
        odd, now = self.odd().get("crl", {}), time.time()
        look = (serials, sorted(odd.items()))
        held = self.crls.get(which)
        if not held or held[0] != look or now > held[1] + self.options.crl_validity / 2:
            numbers = read_json(self.path("crl-numbers.json"), {})
            numbers[which] = numbers.get(which, 0) + 1
            write_json(self.path("crl-numbers.json"), numbers)
            authority = self.stranger() if odd.get("other") else self.authorities[which]
            if odd.get("stranger"):
                authority, stranger = Authority.__new__(Authority), self.stranger()
                authority.key_file, authority.key_id = stranger.key_file, stranger.key_id
                authority.certificate = self.authorities[which].certificate
            start = now - odd.get("age", 0)
            data = authority.make_crl(serials, odd.get("number", numbers[which]), start, start + odd.get("validity", self.options.crl_validity), odd)
            held = self.crls[which] = (look, now, data)
        return serve_content(request, held[2], "application/pkix-crl", "no-cache")

    # Enrollment and renewal

    def enroll(self, request):
        """simpleenroll, authorized by a token or by a certificate under --authorization-ca."""
        wanted = SigningRequest(request)
        if request.client is not None:
            if request.headers.get("Authorization"):
                raise Problem(400, "a token and a client certificate are two forms of authorization; use one")
            return self.make_svid(self.find_authorized(Certificate(request.client)), wanted, "certificate")
        scheme, _, value = request.headers.get("Authorization", "").partition(" ")
        try:
            token = base64.b64decode(value, validate=True).decode() if scheme.lower() == "basic" else ""
        except ValueError:
            token = ""
        entry = read_json(self.path("tokens.json"), {}).get(token)
        if not entry:
            raise self.refusal()
        used, now, key = read_json(self.path("used.json"), {}), time.time(), digest(wanted.spki)
        record = used.setdefault(digest(token.encode()), {"key": key, "first": now, "keys": []})
        record["keys"] = sorted(set(record["keys"]) | {key})
        write_json(self.path("used.json"), used)
        left = record["first"] + entry.get("review", 0) - now
        if record["key"] != key or left <= 0 and now > record["first"] + entry.get("review", 0) + self.options.replay:
            raise self.refusal()
        if left > 0:
            return Reply(202, {"Retry-After": str(max(1, int(left + 0.999)))}, b"")
        return self.make_svid(entry["client"], wanted, "token")

    def refusal(self):
        """One answer for every cause: who guesses learns nothing."""
        return Problem(401, "not authorized", {"WWW-Authenticate": 'Basic realm="enrollment"'})

    def find_authorized(self, certificate):
        """The client that an authorization certificate is for."""
        if not self.options.authorization_ca or certificate.issuer != Certificate(
                ssl.PEM_cert_to_DER_cert(open(self.options.authorization_ca).read().strip())).subject:
            raise Problem(403, "this certificate authorizes no enrollment")
        client = certificate.common_name()
        if not re.fullmatch(r"[A-Za-z0-9._-]+", client):
            raise Problem(403, "the common name of this certificate is no client id")
        return client

    def renew(self, request):
        """simplereenroll: by the SVID that is to be renewed, with its names in the request."""
        wanted = SigningRequest(request)
        if request.headers.get("Authorization"):
            raise Problem(400, "a renewal is authorized by the SVID alone")
        current = Certificate(request.client) if request.client else None
        issued = [json.loads(line) for line in open(self.path("issued.jsonl"))] if os.path.exists(self.path("issued.jsonl")) else []
        record = next((item for item in issued if current and item["leaf"] == digest(current.der)), None)
        if not record or current.serial in [int(text, 16) for text in read_json(self.path("revoked.json"), {}).get("issuing", [])]:
            raise self.refusal()
        if (wanted.subject, wanted.san) != (current.subject, current.san):
            raise Problem(400, "subject and subjectAltName must be those of the SVID, byte for byte")
        return self.make_svid(record["client"], wanted, "renewal")

    def make_svid(self, client, wanted, how):
        """Issues an SVID and answers with it."""
        odd, now, spki = self.odd(), time.time(), wanted.spki
        if odd.get("key"):
            spki = make_key(self.path("other.key"))
        uris = odd.get("id", f"spiffe://{self.options.trust_domain}/margo/wfm/{self.options.wfm_id}/client/{client}")
        names = [der(0x86, uri.encode()) for uri in ([uris] if isinstance(uris, str) else uris)]
        authority = self.stranger() if odd.get("stranger") else self.authorities["issuing"]
        extensions = [extension("2.5.29.19", der(SEQUENCE, der(0x01, b"\xff")) if odd.get("ca") else der(SEQUENCE), True),
                      extension("2.5.29.15", der(BITS, b"\x07\x80"), True),
                      extension("2.5.29.37", der(SEQUENCE, oid("1.3.6.1.5.5.7.3.1"), oid("1.3.6.1.5.5.7.3.2")))]
        extensions += [extension("2.5.29.17", der(SEQUENCE, *names))] if names else []
        leaf = authority.issue(spki, name(O="Example Industries", CN=client), now + odd.get("start", 0),
                               now + odd.get("end", self.options.lifetime), extensions)
        record = {"time": now, "client": client, "serial": f"{Certificate(leaf).serial:x}", "key": digest(wanted.spki), "leaf": digest(leaf), "how": how}
        append_json(self.path("issued.jsonl"), record)
        self.log(client, f"SVID {record['serial']} issued by {how}, for {odd.get('end', self.options.lifetime)} s")
        others = [self.authorities["issuing"].certificate.der, self.authorities["anchor"].certificate.der, self.stranger().certificate.der][:odd["extra"]] \
            if odd.get("extra") else []
        others += [self.authorities["issuing"].issue(make_key(self.path("other.key")), name(CN=f"extra {index}"), now, now + 3600, [])
                   for index in range(odd.get("extra", 0) - 3)]
        return self.make_reply(others + [leaf] if odd.get("last") else [leaf] + others)

    def make_reply(self, certificates):
        """certs-only, in the form that misissue.json wants."""
        form = self.odd().get("form")
        data = make_certs_only(certificates, ber=form == "ber")
        body = data if form == "der" else base64.b64encode(data)           # no line ends: strongSwan's pki skips none
        if form == "pem":
            body = b"-----BEGIN PKCS7-----\n" + base64.encodebytes(data) + b"-----END PKCS7-----\n"
        return Reply(200, {"Content-Type": "application/pkcs7-mime; smime-type=certs-only"}, body)


class MisHandler(Handler):
    """The handler of wfm.py; the client is the certificate that it presented (DER), or None."""

    server_version = "mis.py"

    def find_reply(self, request, fault):
        return super().find_reply(request._replace(client=self.connection.getpeercert(binary_form=True)), fault)


# ------------------------------------------------------------------------------------------------------------------------------
# 4. Command line
# ------------------------------------------------------------------------------------------------------------------------------

def make_context(options):
    """Server-side TLS that takes a client certificate where one is presented: an SVID, or one that authorizes an enrollment."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3 if options.tls == "1.3" else ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(options.site_certificate, options.site_key)
    context.verify_mode = ssl.CERT_OPTIONAL
    context.verify_flags |= PARTIAL_CHAIN
    context.load_verify_locations(cadata=load_anchors(options.anchor))
    if options.authorization_ca:
        context.load_verify_locations(cafile=options.authorization_ca)
    return context


def make_parser():
    summary, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--listen", metavar="HOST:PORT", default="127.0.0.1:8444", help="port 0: any free one (default %(default)s)")
    add("--anchor", metavar="FILE", required=True, help="the trust domain's CA certificate")
    add("--anchor-key", metavar="FILE", required=True, help="its private key")
    add("--trust-bundle", metavar="FILE", required=True, help="the SPIFFE trust bundle to serve")
    add("--site-certificate", metavar="FILE", required=True, help="ordinary server certificate of this service")
    add("--site-key", metavar="FILE", required=True, help="its private key")
    add("--state", metavar="DIR", required=True, help="where tokens, records and the issuing CA lie")
    add("--trust-domain", default="factory.example", help="(default %(default)s)")
    add("--wfm-id", default="main", help="the WFM whose clients are enrolled (default %(default)s)")
    add("--lifetime", metavar="SECONDS", type=float, default=7 * 86400, help="of an SVID (default: a week)")
    add("--crl-validity", metavar="SECONDS", type=float, default=2 * 86400, help="of a revocation list (default: two days)")
    add("--replay", metavar="SECONDS", type=float, default=600, help="how long a token serves its key (default %(default)s)")
    add("--authorization-ca", metavar="FILE", help="CA of the certificates that authorize an enrollment")
    add("--tls", choices=("1.3", "1.2"), default="1.3", help="the lowest version (default %(default)s)")
    add("--log-requests", action="store_true", help="keep requests.jsonl in the state directory")
    return parser


def main(arguments=None):
    parser = make_parser()
    options = parser.parse_args(arguments)
    os.makedirs(options.state, exist_ok=True)
    log = make_log()
    try:
        make_context(options)
        site = Mis(options, log)
        server = Server("listening", options.listen, lambda: make_context(options), site, Faults(os.path.join(options.state, "faults.json")), log,
                        os.path.join(options.state, "requests.jsonl") if options.log_requests else None)
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"cannot start: {error}")
    server.RequestHandlerClass = MisHandler
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"{server.name} {server.url}", flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    with site.lock:                         # no file is left half-written
        os._exit(0)


if __name__ == "__main__":
    main()
