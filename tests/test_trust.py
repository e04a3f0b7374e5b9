"""Trust: wrong chains and wrong peers, each beside a right one that differs in nothing else.

A case is what is wrong and its right neighbour.  The right one has to be accepted, so that the wrong one can fail for that reason
alone.  Peers are TLS servers in this process; "accepted" means that the first byte of a request reached one.
"""
import contextlib
import datetime
import functools
import ipaddress
import os
import socket
import ssl
import subprocess
import tempfile
import threading
import time
import unittest
from unittest import mock

import margo_agent
from margo_agent import MargoError, Untrusted
from tests import support

DOMAIN = "factory.example"
WFM = f"spiffe://{DOMAIN}/margo/wfm/main"
CLIENT = f"{WFM}/client/cell-2"
DAY = 86400
LINE = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"
SAN = b"\x55\x1d\x11"


@functools.lru_cache(None)
def make_key(kind="P-256", number=0):
    """A private key; the same one for the same number."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
    if kind.startswith("RSA-"):
        return rsa.generate_private_key(65537, int(kind[4:]))
    curves = {"P-256": ec.SECP256R1, "P-384": ec.SECP384R1, "P-224": ec.SECP224R1, "secp256k1": ec.SECP256K1}
    return ed25519.Ed25519PrivateKey.generate() if kind == "Ed25519" else ec.generate_private_key(curves[kind]())


class Certificate:
    """A certificate and its key, made as the keywords say.

    issuer: a Certificate, None for one signed by itself.  uris, names, addresses: the subjectAltName.  raw: its value instead, DER.
    ca, length: basicConstraints, None for none.  usage, purposes: keyUsage and extendedKeyUsage, None for none.
    permitted, excluded: name constraints.  start, end: seconds from now.  signer: a key to sign by that is not the issuer's.
    odd: whether an unknown extension is critical; None for none.  more: [(OID, whether it is critical, DER)] of further extensions.
    twice: the OID (DER) of an extension that occurs twice.  plain: whether it is of version 1, without extensions.
    """

    def __init__(self, name, issuer=None, uris=(), names=(), addresses=(), raw=None, ca=None, length=None, usage=("digital_signature",),
                 purposes=None, permitted=None, excluded=None, start=-DAY, end=DAY, kind="P-256", number=0, digest="SHA256", signer=None,
                 odd=None, damaged=False, subject=None, mails=(), more=(), twice=None, plain=False):
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
        self.key = make_key(kind, (name, number))
        self.subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, subject or name)])
        now = datetime.datetime.now(datetime.timezone.utc).replace(tzinfo=None, microsecond=0)
        builder = x509.CertificateBuilder(
            issuer_name=issuer.subject if issuer else self.subject, subject_name=self.subject, public_key=self.key.public_key(),
            serial_number=x509.random_serial_number(), not_valid_before=now + datetime.timedelta(seconds=start),
            not_valid_after=now + datetime.timedelta(seconds=end))
        for value, critical in self.make_extensions(x509, uris, names, addresses, mails, ca, length, usage, purposes, permitted, excluded):
            builder = builder.add_extension(value, critical)
        if raw is not None:
            builder = builder.add_extension(x509.UnrecognizedExtension(x509.ObjectIdentifier("2.5.29.17"), raw), False)
        if odd is not None:
            builder = builder.add_extension(x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.55555.1"), b"\x05\0"), odd)
        for oid, critical, value in more:
            builder = builder.add_extension(x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), value), critical)
        by = signer or (issuer.key if issuer else self.key)
        if issuer:
            builder = builder.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key()), False)
        algorithm = None if "25519" in type(by).__name__ else getattr(hashes, digest.replace("SHA1", "SHA256"))()
        self.der = builder.sign(by, algorithm).public_bytes(Encoding.DER)
        self.key_pem = self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
        private = by.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        if digest == "SHA1":
            self.der = sign_anew(self.der, private, "-sha1", bytes.fromhex("06072a8648ce3d0401"))
        if twice or plain:
            self.der = sign_anew(self.der, private, "-sha256", bytes.fromhex("06082a8648ce3d040302"), twice, plain)
        if damaged:
            self.der = self.der[:-1] + bytes([self.der[-1] ^ 1])
        self.pem = margo_agent.make_pem([self.der])

    def make_extensions(self, x509, uris, names, addresses, mails, ca, length, usage, purposes, permitted, excluded):
        """[(extension, whether it is critical)] of the usual kinds."""
        kinds = ((x509.UniformResourceIdentifier, uris), (x509.DNSName, names), (x509.RFC822Name, mails))
        general = [kind(value) for kind, values in kinds for value in values]
        general += [x509.IPAddress(ipaddress.ip_address(value)) for value in addresses]
        if general:
            yield x509.SubjectAlternativeName(general), False
        if ca is not None:
            yield x509.BasicConstraints(ca, length), True
        if usage is not None:
            bits = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "key_cert_sign",
                    "crl_sign", "encipher_only", "decipher_only")
            yield x509.KeyUsage(**{bit: bit in usage for bit in bits}), True
        if purposes is not None:
            oids = x509.ExtendedKeyUsageOID
            yield x509.ExtendedKeyUsage([getattr(oids, purpose) for purpose in purposes]), False
        if permitted or excluded:
            yield x509.NameConstraints(permitted, excluded), True
        yield x509.SubjectKeyIdentifier.from_public_key(self.key.public_key()), False


def sign_anew(der, key, digest, algorithm, twice=None, plain=False):
    """A certificate signed by ECDSA once more: by another digest, with an extension that occurs twice, or of version 1 without extensions.

    Libraries refuse to make such ones.
    """
    make, parse = margo_agent.make_der, margo_agent.parse_der
    algorithm = make(0x30, algorithm)
    parts = [part[2] for part in parse(parse(parse(der)[0][1])[0][1])]
    parts[2] = algorithm
    if plain:
        parts = [part for part in parts if part[0] not in (0xA0, 0xA3)]
    if twice:
        extensions = [item[2] for item in parse(parse(parse(parts[-1])[0][1])[0][1])]
        parts[-1] = make(0xA3, make(0x30, *extensions, *[item for item in extensions if twice in item]))
    content = make(0x30, *parts)
    with tempfile.NamedTemporaryFile() as file:
        file.write(key)
        file.flush()
        done = subprocess.run(["openssl", "dgst", digest, "-sign", file.name], input=content, stdout=subprocess.PIPE, check=True)
    return make(0x30, content, algorithm, make(0x03, b"\0", done.stdout))


SIGNS = ("key_cert_sign", "crl_sign")


def make_ca(name, issuer=None, **options):
    """An authority."""
    return Certificate(name, issuer, **dict({"ca": True, "usage": SIGNS}, **options))


class Peer:
    """A TLS server that presents a chain and answers every request alike; `heard` is what it was told."""

    def __init__(self, test, chain, answer=LINE, newest=None):
        folder = support.make_folder(test)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.set_ciphers("ALL:@SECLEVEL=0")
        if newest:
            context.maximum_version = newest
        path = support.write(os.path.join(folder, "chain.pem"), "".join(item.pem for item in chain) + chain[0].key_pem)
        context.load_cert_chain(path)
        self.heard, self.answer, self.context = [], answer, context
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=10)
        self.port = self.socket.getsockname()[1]
        test.addCleanup(self.socket.close)
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def serve(self):
        """Until its socket is closed."""
        while True:
            try:
                plain = self.socket.accept()[0]
            except OSError:
                return
            with plain, contextlib.suppress(OSError):
                plain.settimeout(5)
                with self.context.wrap_socket(plain, server_side=True) as connection:
                    data = connection.recv(65536)
                    if data:
                        self.heard.append(data)
                        connection.sendall(self.answer(data) if callable(self.answer) else self.answer)


class TrustCase(unittest.TestCase):
    def setUp(self):
        support.require("cryptography")
        self.folder = support.make_folder(self)
        names = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        patch = mock.patch.dict(os.environ, names, clear=True)
        patch.start()
        self.addCleanup(patch.stop)
        silent = mock.patch.object(margo_agent, "log", lambda *_, **__: None)
        silent.start()
        self.addCleanup(silent.stop)

    def write(self, name, text):
        return support.write(os.path.join(self.folder, name), text, 0o600)

    def ask(self, peer, anchors):
        """One request to a peer by what is tried here; raises MargoError."""
        raise NotImplementedError

    def is_accepted(self, case):
        """Whether a request reaches a peer of this kind; see build."""
        self.chain, anchors = self.build(**case)
        with support.Lifetime() as lifetime:
            try:
                peer = Peer(lifetime, self.chain, newest=case.get("newest"))
            except ssl.SSLError as error:
                raise AssertionError(f"{case} cannot be served: {error}") from None
            try:
                self.ask(peer, anchors)
            except MargoError as error:
                self.assertEqual(peer.heard, [], error.message)
                self.assertNotIsInstance(error, margo_agent.ConfigError)
                self.words = error.message
                return False
            self.assertTrue(peer.heard)
            return True

    leaf = {}

    def build(self, leaf=None, via=(), root=None, send=None, anchors=None, newest=None):
        """(chain as it is sent, anchors) of a peer.

        via: the authorities between root and leaf, from above.  send: of [leaf, ..., root] and more what is sent, all but the root by
        default.  anchors: likewise, the root alone by default.
        """
        made = [make_ca("root", **dict(root or {}))]
        for number, options in enumerate(via):
            made.append(make_ca(f"issuer-{number}", made[-1], **options))
        made.append(Certificate("leaf", made[-1], **dict(self.leaf, **leaf or {})))
        made.reverse()
        return send(made) if send else made[:-1], anchors(made) if anchors else made[-1:]

    def try_all(self, cases):
        """Tries [(name, wrong, right)]: each right one is accepted, no wrong one is."""
        accepted, refused = [], []
        for name, wrong, right in cases:
            if not self.is_accepted(right):
                refused.append(f"{name}: {self.words}")
            if self.is_accepted(wrong):
                accepted.append(name)
        self.assertEqual((accepted, refused), ([], []), "wrong ones that were accepted, right ones that were refused")


def name_constraint(*uris, dns=()):
    """General names of name constraints."""
    support.require("cryptography")
    from cryptography import x509
    return [x509.UniformResourceIdentifier(uri) for uri in uris] + [x509.DNSName(name) for name in dns]


def raw_names(*pairs):
    """The value of a subjectAltName of (tag, bytes)."""
    return margo_agent.make_der(0x30, *(margo_agent.make_der(tag, value) for tag, value in pairs))


class WfmIds(TrustCase):
    """Names of the WFM: C-009 to C-012, C-014."""

    leaf = {"uris": [WFM]}

    def ask(self, peer, anchors):
        own_ca = make_ca("own")
        own = Certificate("own leaf", own_ca, uris=[CLIENT])
        files = self.write("own.pem", own.pem), self.write("own.key", own.key_pem)
        config = margo_agent.make_config({"wfm": {"url": f"https://localhost:{peer.port}", "timeout": "5s"}, "identity": {
            "certificate": files[0], "key": files[1], "trust_bundle": "none"}}, self.folder, {})
        identity = margo_agent.load_identity(config)
        source = margo_agent.MtlsSource(config, identity, margo_agent.TrustBundle([item.der for item in anchors], None, None), {})
        return source.ask("GET", config.wfm.url, {}, None, 1000)

    def test_only_the_wfm_that_the_own_id_names_is_spoken_to(self):
        right = {}
        wrong = [
            WFM + "2", WFM[:-1], WFM + "/x", WFM.replace("main", "Main"), WFM.replace("margo", "Margo"), CLIENT, WFM + "/", WFM.replace("/wfm", "//wfm"),
            WFM.replace("main", "%6Dain"), WFM + "?x", WFM + "#x", WFM.replace(DOMAIN, DOMAIN + ":443"), WFM.replace(DOMAIN, "x@" + DOMAIN),
            WFM.replace("main", "x/../main"), WFM.replace("main", "./main"), WFM.replace("spiffe", "https"), WFM.replace("spiffe", "SPIFFE"),
            WFM.replace("spiffe", "spiffes"), f"spiffe://{DOMAIN}", f"spiffe://{DOMAIN}/", WFM.replace(DOMAIN, DOMAIN.upper()),
            WFM.replace(DOMAIN, "Factory.example"), WFM.replace(DOMAIN, "other.example"), WFM.replace(DOMAIN, "x." + DOMAIN),
            WFM.replace(DOMAIN, DOMAIN + ".evil"), WFM.replace(DOMAIN, DOMAIN + "."), WFM.replace(DOMAIN, ""), "spiffe:" + WFM[9:],
            " " + WFM, WFM + " ", WFM + "\n", WFM + "\t", WFM.replace("main", "ma" + "in" * 1500), "urn:" + WFM, "x" + WFM]
        cases = [(repr(uri[:80]), {"leaf": {"uris": [uri]}}, right) for uri in wrong]
        self.assertGreater(len(cases), 30)
        self.try_all(cases)

    def test_the_id_is_the_one_uri_of_the_leaf(self):
        good = (0x86, WFM.encode())
        more = {"names": ["localhost"], "addresses": ["127.0.0.1"], "mails": ["a@b.example"]}
        cases = [
            ("two ids", {"leaf": {"uris": [WFM, WFM + "2"]}}, {"leaf": more}),
            ("the same id twice", {"leaf": {"uris": [WFM, WFM]}}, {}),
            ("the id behind another URI", {"leaf": {"uris": ["https://x.example/", WFM]}}, {"leaf": dict(more, subject=WFM + "2")}),
            ("no name at all", {"leaf": {"uris": []}}, {}),
            ("a host name alone", {"leaf": {"uris": [], "names": ["localhost"]}}, {"leaf": more}),
            ("the id as the subject", {"leaf": {"uris": [], "subject": WFM}}, {"leaf": {"subject": "another"}}),
            ("the id as a DNS name", {"leaf": {"uris": [], "raw": raw_names((0x82, WFM.encode()))}}, {"leaf": {"uris": [], "raw": raw_names(good)}}),
            ("the id as a mail address", {"leaf": {"uris": [], "raw": raw_names((0x81, WFM.encode()))}}, {"leaf": {"uris": [], "raw": raw_names(good)}}),
            ("NUL in the id", {"leaf": {"uris": [], "raw": raw_names((0x86, WFM.encode() + b"\0.evil"))}}, {"leaf": {"uris": [], "raw": raw_names(good)}}),
            ("NUL behind the id", {"leaf": {"uris": [], "raw": raw_names((0x86, WFM.encode() + b"\0"))}}, {"leaf": {"uris": [], "raw": raw_names(good)}}),
            ("a letter that looks alike", {"leaf": {"uris": [], "raw": raw_names((0x86, WFM.replace("a", "\u0430").encode()))}},
             {"leaf": {"uris": [], "raw": raw_names(good)}}),
            ("the id with its high bits set", {"leaf": {"uris": [], "raw": raw_names((0x86, bytes(byte | 0x80 for byte in WFM.encode())))}},
             {"leaf": {"uris": [], "raw": raw_names(good, (0x82, b"localhost"))}}),
            ("the id as text of two bytes a letter", {"leaf": {"uris": [], "raw": raw_names((0x86, WFM.encode("utf-16-be")))}}, {}),
            ("a second id of another tag length", {"leaf": {"uris": [], "raw": raw_names(good, (0x86, b""))}}, {}),
            ("the id of the authority above", {"leaf": {"uris": []}, "via": [{"uris": [WFM]}]}, {"via": [{"uris": [WFM]}]})]
        self.try_all(cases)


    def test_an_id_in_an_odd_spelling_is_another_id(self):
        encoded, fullwidth = WFM.replace(DOMAIN, "factory%2Eexample"), WFM.replace(DOMAIN, "factory\uff0eexample")
        wrong = [encoded, WFM.replace(DOMAIN, DOMAIN + ":"), WFM.replace(DOMAIN, "@" + DOMAIN), WFM.replace(DOMAIN, "factory_example"),
                 WFM.replace(DOMAIN, "xn--factory-9ta.example"), WFM.replace(DOMAIN, "." + DOMAIN), WFM.replace(DOMAIN, "factory..example"),
                 WFM.replace(DOMAIN, f"[{DOMAIN}]"), WFM.replace("/margo", "\\margo"), WFM.replace("://", ":\\\\"), WFM.replace("main", "%2e%2e/main"),
                 WFM + ";x=y", WFM + ",x", WFM.replace("main", "main\r\n"), WFM.replace("main", "ma in"), WFM.replace("main", "main%00"),
                 WFM.replace("main", "main+"), WFM.replace("main", "*"), WFM.replace("/wfm/main", "/wfm/"), WFM.replace("/wfm/main", "/wfm"),
                 WFM.replace("/main", "/main/client"), WFM.replace("spiffe", "spiffe+x"), WFM.replace("spiffe://", "spiffe:/"), WFM.replace("spiffe:", "")]
        cases = [(repr(uri), {"leaf": {"uris": [uri]}}, {}) for uri in wrong]
        cases.append((fullwidth, {"leaf": {"uris": [], "raw": raw_names((0x86, fullwidth.encode()))}}, {}))
        self.try_all(cases)

    def test_the_names_of_a_leaf_are_read_whole(self):
        """What is read here is all that stands there: no second id hides behind an odd encoding."""
        good = (0x86, WFM.encode())
        right = {"leaf": {"uris": [], "raw": raw_names(good)}}
        make = margo_agent.make_der
        self.try_all([
            ("bytes behind the names", {"leaf": {"uris": [], "raw": raw_names(good) + raw_names((0x86, b"spiffe://x/y"))}}, right),
            ("no names", {"leaf": {"uris": [], "raw": raw_names()}}, right),
            ("an id of several parts", {"leaf": {"uris": [], "raw": make(0x30, make(0xA6, make(0x16, good[1])))}}, right),
            ("a second id of several parts", {"leaf": {"uris": [], "raw": raw_names(good, (0xA6, make(0x16, good[1])))}}, right),
            ("no extensions at all", {"leaf": {"plain": True}}, {})])


class WfmChains(WfmIds):
    """Chains of the WFM: C-005 to C-008, C-011."""

    test_only_the_wfm_that_the_own_id_names_is_spoken_to = test_the_id_is_the_one_uri_of_the_leaf = None
    test_an_id_in_an_odd_spelling_is_another_id = test_the_names_of_a_leaf_are_read_whole = None

    def test_odd_ends_of_a_chain(self):
        good = {"via": [{}]}
        self.try_all([
            ("for anything, by the word for that", {"leaf": {"purposes": ["ANY_EXTENDED_KEY_USAGE"]}},
             {"leaf": {"purposes": ["ANY_EXTENDED_KEY_USAGE", "SERVER_AUTH"]}}),
            ("for timestamps", {"leaf": {"purposes": ["TIME_STAMPING"]}}, {"leaf": {"purposes": ["SERVER_AUTH", "TIME_STAMPING"]}}),
            ("for clients by Netscape's word", {"leaf": {"more": [("2.16.840.1.113730.1.1", False, b"\x03\x02\x07\x80")]}},
             {"leaf": {"more": [("2.16.840.1.113730.1.1", False, b"\x03\x02\x06\x40")]}}),
            ("it begins in a minute", {"leaf": {"start": 60}}, {"leaf": {"start": -1}}),
            ("it ended a second ago", {"leaf": {"end": -1}}, {"leaf": {"end": 60}}),
            ("a time that never was", {"leaf": {"start": -DAY, "end": -DAY + 1}}, {"leaf": {"end": 250 * 366 * DAY}}),
            ("a short RSA key of the anchor", {"root": {"kind": "RSA-1024"}}, {"root": {"kind": "RSA-3072"}}),
            ("an authority of version 1", {"via": [{"plain": True}]}, good),
            ("an authority whose constraints come twice", {"via": [{"twice": b"\x55\x1d\x13"}]}, good),
            ("a critical extension at the anchor", dict(good, root={"odd": True}), dict(good, root={"odd": False})),
            ("the identifier of another key above it", {"send": lambda made: [self.misname(made)]}, {}),
            ("nine authorities, and one of them is none", {"via": [{}] * 4 + [{"ca": False}] + [{}] * 4}, {"via": [{}] * 9}),
            ("only its namesake's key is an anchor", dict(good, anchors=lambda made: [make_ca("issuer-0", number=3)]), good),
            ("a path of none below the anchor that issues", dict(good, root={"length": 0}), {"root": {"length": 0}})])

    def misname(self, made):
        """The leaf with the key identifier of a stranger as its issuer's."""
        stranger = make_ca("root", number=11)
        other = Certificate("leaf", stranger, uris=[WFM], signer=made[-1].key)
        return other

    def test_what_a_leaf_may_be(self):
        self.try_all([
            ("an authority", {"leaf": {"ca": True}}, {"leaf": {"ca": False}}),
            ("it may sign certificates", {"leaf": {"usage": ("digital_signature", "key_cert_sign")}}, {"leaf": {"usage": ("digital_signature",)}}),
            ("it may sign lists", {"leaf": {"usage": ("digital_signature", "crl_sign")}}, {"leaf": {"usage": ("digital_signature", "key_agreement")}}),
            ("for clients alone", {"leaf": {"purposes": ["CLIENT_AUTH"]}}, {"leaf": {"purposes": ["SERVER_AUTH", "CLIENT_AUTH"]}}),
            ("for mail alone", {"leaf": {"purposes": ["EMAIL_PROTECTION"]}}, {"leaf": {"purposes": None}}),
            ("for code alone", {"leaf": {"purposes": ["CODE_SIGNING"]}}, {"leaf": {"purposes": ["SERVER_AUTH", "CODE_SIGNING"]}}),
            ("a critical extension that nobody knows", {"leaf": {"odd": True}}, {"leaf": {"odd": False}}),
            ("it has ended", {"leaf": {"end": -60}}, {"leaf": {"end": 60}}),
            ("it has not begun", {"leaf": {"start": 600}}, {"leaf": {"start": -60}}),
            ("a damaged signature", {"leaf": {"damaged": True}}, {}),
            ("signed by another key", {"leaf": {"signer": make_key("P-256", "stranger")}}, {}),
            ("a short RSA key", {"leaf": {"kind": "RSA-1024"}}, {"leaf": {"kind": "RSA-3072"}}),
            ("SHA-1", {"leaf": {"digest": "SHA1"}}, {"leaf": {"digest": "SHA384"}}),
            ("a curve that TLS 1.3 does not know", {"leaf": {"kind": "P-224"}}, {"leaf": {"kind": "P-384"}}),
            ("a curve of another use", {"leaf": {"kind": "secp256k1"}}, {"leaf": {"kind": "Ed25519"}}),
            ("TLS 1.2", {"newest": ssl.TLSVersion.TLSv1_2}, {"newest": ssl.TLSVersion.TLSv1_3})])

    def test_what_stands_above_a_leaf(self):
        good, two = {"via": [{}]}, {"via": [{}, {}]}
        self.try_all([
            ("no authority", {"via": [{"ca": False}]}, good),
            ("nothing says that it is an authority", {"via": [{"ca": None}]}, good),
            ("it may not sign certificates", {"via": [{"usage": ("crl_sign",)}]}, {"via": [{"usage": ("key_cert_sign",)}]}),
            ("a path that is too long", {"via": [{"length": 0}, {}]}, {"via": [{"length": 1}, {}]}),
            ("a path that is too long below the anchor", dict(good, root={"length": 0}), dict(good, root={"length": 1})),
            ("it is for clients alone", {"via": [{"purposes": ["CLIENT_AUTH"]}]}, {"via": [{"purposes": ["CLIENT_AUTH", "SERVER_AUTH"]}]}),
            ("another domain is permitted to it", {"via": [{"permitted": name_constraint("other.example")}]},
             {"via": [{"permitted": name_constraint(DOMAIN)}]}),
            ("a domain below is permitted to it", {"via": [{"permitted": name_constraint("." + DOMAIN)}]},
             {"via": [{"permitted": name_constraint(DOMAIN, "other.example")}]}),
            ("the domain is excluded", {"via": [{"excluded": name_constraint(DOMAIN)}]}, {"via": [{"excluded": name_constraint("other.example")}]}),
            ("a name of another kind is not permitted", {"via": [{"permitted": name_constraint(dns=["x.example"])}], "leaf": {"names": ["y.example"]}},
             {"via": [{"permitted": name_constraint(dns=["x.example"])}], "leaf": {"names": ["x.example"]}}),
            ("the constraint stands at the anchor", dict(good, root={"permitted": name_constraint("other.example")}),
             dict(good, root={"permitted": name_constraint(DOMAIN)})),
            ("it has ended", {"via": [{"end": -60}]}, good),
            ("it has not begun", {"via": [{"start": 600}]}, good),
            ("one further up has ended", {"via": [{"end": -60}, {}]}, two),
            ("the anchor has ended", {"root": {"end": -60}}, {"root": {"end": 60}}),
            ("a critical extension that nobody knows", {"via": [{"odd": True}]}, {"via": [{"odd": False}]}),
            ("a short RSA key", {"via": [{"kind": "RSA-1024"}]}, {"via": [{"kind": "RSA-3072"}]}),
            ("SHA-1", {"via": [{"digest": "SHA1"}]}, {"via": [{"digest": "SHA512"}]}),
            ("a damaged signature", {"via": [{"damaged": True}]}, good),
            ("signed by another key", {"via": [{"signer": make_key("P-256", "stranger")}]}, good)])

    def test_which_certificates_are_sent_and_which_are_trusted(self):
        good = {"via": [{}]}
        stranger = make_ca("stranger")
        twin = make_ca("root", number=7)                        # its name, and another key
        ended = functools.partial(make_ca, "root", start=-2 * DAY, end=-DAY)    # its name and key, of another time

        def cross(made, issuer, **options):
            """The intermediate as another authority certifies it."""
            return make_ca("issuer-0", issuer, **options)
        self.try_all([
            ("a root that is not known", {"anchors": lambda made: [stranger]}, {"anchors": lambda made: [stranger, made[-1]]}),
            ("a root of the same name", {"anchors": lambda made: [twin]}, {"anchors": lambda made: [twin, made[-1]]}),
            ("the root comes along and is not known", {"send": lambda made: made, "anchors": lambda made: [stranger]}, {"send": lambda made: made}),
            ("a leaf signed by itself", {"send": lambda made: [Certificate("leaf", uris=[WFM])]}, {"send": lambda made: made[:1]}),
            ("a leaf that has the root's name", {"send": lambda made: [Certificate("root", uris=[WFM], number=9)]}, {}),
            ("the authority between is missing", dict(good, send=lambda made: made[:1]), good),
            ("another authority of its name comes instead", dict(good, send=lambda made: [made[0], make_ca("issuer-0", made[-1], number=5)]), good),
            ("the authority between is by nobody known", dict(good, send=lambda made: [made[0], cross(made, stranger)]),
             dict(good, send=lambda made: [made[0], made[1], cross(made, stranger)])),
            ("it has ended, and a foreign copy has not", dict(good, send=lambda made: [made[0], cross(made, stranger), cross(made, made[-1], end=-60)]),
             dict(good, send=lambda made: [made[0], cross(made, made[-1], end=-60), made[1]])),
            ("a client of the domain has signed it", {"send": lambda made: self.sign_by_leaf(made, CLIENT)}, good),
            ("the anchor is a sister", dict(good, anchors=lambda made: [make_ca("issuer-0", made[-1], number=5)]),
             dict(good, anchors=lambda made: [made[1]])),
            ("the authority between comes in place of the anchor", {"via": [{}, {}], "send": lambda made: made[:1], "anchors": lambda made: [made[2]]},
             {"via": [{}, {}], "send": lambda made: made[:2], "anchors": lambda made: [made[2]]}),
            ("the anchor has ended, its twin of the same key has not begun", {"anchors": lambda made: [ended(), make_ca("root", start=600)]},
             {"anchors": lambda made: [ended(), made[-1]]}),
            ("the order is another, and one is missing", {"via": [{}, {}], "send": lambda made: [made[0], made[2]]},
             {"via": [{}, {}], "send": lambda made: [made[0], made[2], made[1]]})])

    def sign_by_leaf(self, made, uri):
        """A WFM's leaf that another leaf has signed, with the chain of that."""
        other = Certificate("client", made[-1], uris=[uri])
        return [Certificate("leaf", other, uris=[WFM]), other]

    def test_what_the_system_trusts_is_not_asked(self):
        """C-006: neither its store nor what the environment names."""
        stranger = make_ca("stranger")
        path = self.write("system.pem", stranger.pem)
        with mock.patch.dict(os.environ, SSL_CERT_FILE=path, SSL_CERT_DIR=self.folder):
            self.assertFalse(self.is_accepted({"send": lambda made: [Certificate("leaf", stranger, uris=[WFM])]}))
            self.assertTrue(self.is_accepted({}))


class Hosts(TrustCase):
    """Servers that are known by their host name: registries (C-169), the identity service (C-030 to C-032), the WFM of profile signed (C-060)."""

    leaf = {"names": ["localhost"]}
    host = "localhost"

    def make_config(self, peer, anchors, **settings):
        """A configuration that trusts the anchors for everything that is known by a host name."""
        anchor = self.write("anchors.pem", "".join(item.pem for item in anchors))
        address = f"{self.host}:{peer.port}"
        return margo_agent.make_config({
            "wfm": dict({"url": f"https://{address}", "timeout": "5s", "min_tls": "1.2"}, **settings),
            "identity": {"certificate": "c", "key": "k", "ca": anchor, "trust_bundle": f"https://{address}/b"},
            "registries": {address: {"ca": anchor}}, "state_dir": self.folder}, self.folder, {})

    def ask(self, peer, anchors):
        config = self.make_config(peer, anchors)
        margo_agent.Registry(f"{self.host}:{peer.port}", config).get("app", "manifests/1", "*/*", 1000)

    def list_cases(self):
        """The table."""
        spiffe = make_ca("bundle")
        return [
            ("the name as the subject alone", {"leaf": {"names": [], "subject": "localhost"}}, {"leaf": {"subject": "another"}}),
            ("the name as the subject, beside an address", {"leaf": {"names": [], "addresses": ["127.0.0.2"], "subject": "localhost"}}, {}),
            ("another name", {"leaf": {"names": ["elsewhere"]}}, {"leaf": {"names": ["elsewhere", "localhost"]}}),
            ("a name below", {"leaf": {"names": ["x.localhost"]}}, {"leaf": {"names": ["LOCALHOST"]}}),
            ("a name that goes on", {"leaf": {"names": ["localhost.evil.example"]}}, {}),
            ("a wildcard for everything", {"leaf": {"names": ["*"]}}, {}),
            ("a wildcard within the name", {"leaf": {"names": ["local*"]}}, {}),
            ("NUL in the name", {"leaf": {"names": [], "raw": raw_names((0x82, b"localhost\0.evil.example"))}},
             {"leaf": {"names": [], "raw": raw_names((0x82, b"localhost"))}}),
            ("the name as a URI", {"leaf": {"names": [], "uris": ["https://localhost/"]}}, {"leaf": {"uris": ["https://elsewhere/"]}}),
            ("the name as a mail address", {"leaf": {"names": [], "mails": ["root@localhost"]}}, {"leaf": {"mails": ["root@elsewhere"]}}),
            ("an id of the trust domain, by an authority of the trust bundle",
             {"send": lambda made: [Certificate("leaf", spiffe, uris=[WFM], names=["localhost"])]}, {"leaf": {"uris": [WFM]}}),
            ("a root that is not known", {"anchors": lambda made: [make_ca("stranger")]}, {"anchors": lambda made: [make_ca("stranger"), made[-1]]}),
            ("a root of the same name", {"anchors": lambda made: [make_ca("root", number=7)]}, {}),
            ("a leaf signed by itself", {"send": lambda made: [Certificate("leaf", names=["localhost"])]}, {"send": lambda made: made}),
            ("the authority between is missing", {"via": [{}], "send": lambda made: made[:1]}, {"via": [{}]}),
            ("no authority between", {"via": [{"ca": False}]}, {"via": [{}]}),
            ("it may not sign certificates", {"via": [{"usage": ("crl_sign",)}]}, {"via": [{"usage": ("key_cert_sign",)}]}),
            ("a path that is too long", {"via": [{"length": 0}, {}]}, {"via": [{"length": 1}, {}]}),
            ("another name is permitted to it", {"via": [{"permitted": name_constraint(dns=["elsewhere"])}]},
             {"via": [{"permitted": name_constraint(dns=["localhost"])}]}),
            ("the name is excluded", {"via": [{"excluded": name_constraint(dns=["localhost"])}]}, {"via": [{"excluded": name_constraint(dns=["elsewhere"])}]}),
            ("for clients alone", {"leaf": {"purposes": ["CLIENT_AUTH"]}}, {"leaf": {"purposes": ["SERVER_AUTH"]}}),
            ("it has ended", {"leaf": {"end": -60}}, {"leaf": {"end": 60}}),
            ("it has not begun", {"leaf": {"start": 600}}, {"leaf": {"start": -60}}),
            ("the authority between has ended", {"via": [{"end": -60}]}, {"via": [{}]}),
            ("a short RSA key", {"leaf": {"kind": "RSA-1024"}}, {"leaf": {"kind": "RSA-3072"}}),
            ("SHA-1", {"leaf": {"digest": "SHA1"}}, {"leaf": {"digest": "SHA256"}}),
            ("a damaged signature", {"leaf": {"damaged": True}}, {}),
            ("a critical extension that nobody knows", {"leaf": {"odd": True}}, {"leaf": {"odd": False}})]

    def test_only_the_host_that_was_meant_is_spoken_to(self):
        self.try_all(self.list_cases())


class Services(Hosts):
    """The identity service."""

    def ask(self, peer, anchors):
        config = self.make_config(peer, anchors)
        margo_agent.fetch_from_mis(config.identity.trust_bundle, config)


class Signed(Hosts):
    """The WFM of profile signed."""

    def ask(self, peer, anchors):
        config = self.make_config(peer, anchors)
        context = margo_agent.make_tls_context(ca_file=config.identity.ca, min_tls=config.wfm.min_tls)
        margo_agent.request("GET", config.wfm.url, {}, None, context, 5, 1000)


class Addresses(Hosts):
    """A server that is known by its address: a name that reads like one does not count."""

    leaf = {"addresses": ["127.0.0.1"]}
    host = "127.0.0.1"

    def list_cases(self):
        return [
            ("the address as the subject", {"leaf": {"addresses": [], "subject": "127.0.0.1"}}, {"leaf": {"subject": "another"}}),
            ("the address as a name", {"leaf": {"addresses": [], "names": ["127.0.0.1"]}}, {"leaf": {"names": ["elsewhere"]}}),
            ("another address", {"leaf": {"addresses": ["127.0.0.2"]}}, {"leaf": {"addresses": ["127.0.0.2", "127.0.0.1"]}}),
            ("the address as one of the other family", {"leaf": {"addresses": ["::ffff:127.0.0.1"]}}, {"leaf": {"addresses": ["127.0.0.1", "::1"]}}),
            ("a wildcard", {"leaf": {"addresses": [], "names": ["*.0.0.1"]}}, {})]


class Wildcards(Hosts):
    """C-032: a name with a star stands for one label, at the front, and never for a whole domain's; resolved to loopback here."""

    leaf = {"names": ["registry.factory.example"]}
    host = "registry.factory.example"

    def setUp(self):
        super().setUp()
        resolve = socket.getaddrinfo
        patch = mock.patch("socket.getaddrinfo", lambda host, *rest, **options: resolve("127.0.0.1", *rest, **options))
        patch.start()
        self.addCleanup(patch.stop)

    def list_cases(self):
        wrong = ["*.example", "*", "*.", "registry.*.example", "reg*.factory.example", "*istry.factory.example", "*.*.example", "**.factory.example",
                 "*.registry.factory.example", "*factory.example", "registry.factory.*", ".factory.example", "factory.example", "registry",
                 "registry.factory.example.", "registry.factory.example.evil.example", "xn--*.factory.example", "registry%2Efactory.example"]
        return [(name, {"leaf": {"names": [name]}}, {"leaf": {"names": ["*.factory.example"]}}) for name in wrong]


class Repositories(Hosts):
    """Git over https: its own library takes more, so the agent looks at the server's certificate first."""

    def ask(self, peer, anchors):
        support.require("git")
        config = self.make_config(peer, anchors, profile="git", min_tls="1.3")
        home = os.path.join(self.folder, "home")
        os.makedirs(home, exist_ok=True)
        with open(os.path.join(home, ".gitconfig"), "wb") as file:
            file.write(margo_agent.make_git_config(config, home))
        source = margo_agent.GitSource(config, home, "", None)
        try:
            source.fetch_head("refs/heads/main")
        except MargoError:
            if not peer.heard:                      # what was heard is no repository, which is another matter
                raise


class Redirects(Hosts):
    """C-058, C-169, E-044: whatever sends the agent elsewhere gets no credentials there, and nothing leaves https."""

    test_only_the_host_that_was_meant_is_spoken_to = None

    def setUp(self):
        super().setUp()
        self.chain, self.anchors = self.build(leaf={"uris": [WFM]})
        own = Certificate("own leaf", self.anchors[0], uris=[CLIENT])
        self.files = self.write("own.pem", own.pem), self.write("own.key", own.key_pem)

    def listen(self):
        """A server without TLS: (port, [what it was told])."""
        heard, server = [], socket.create_server(("127.0.0.1", 0))
        self.addCleanup(server.close)

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    with server.accept()[0] as connection:
                        connection.settimeout(5)
                        heard.append(connection.recv(65536))
                        connection.sendall(LINE)
        threading.Thread(target=serve, daemon=True).start()
        return server.getsockname()[1], heard

    def follow(self, ask):
        """[(what https elsewhere heard, what http elsewhere heard)] for every status that redirects; ask(config, host)."""
        found = []
        for status in (301, 302, 303, 307, 308):
            elsewhere = Peer(self, self.chain)
            port, plain = self.listen()
            for target in (f"https://localhost:{elsewhere.port}/x", f"http://localhost:{port}/x", f"//localhost:{elsewhere.port}/x"):
                def answer(data, target=target):
                    if b"registry" in data and b"Authorization" not in data:
                        head = 'HTTP/1.1 401 Who\r\nWWW-Authenticate: Basic realm="r"\r\n'
                    else:
                        head = f"HTTP/1.1 {status} Moved\r\nLocation: {target}\r\n"
                    return f"{head}Content-Length: 0\r\nConnection: close\r\n\r\n".encode()
                site = Peer(self, self.chain, answer)
                with contextlib.suppress(MargoError):
                    ask(self.make_config(site, self.anchors), f"localhost:{site.port}")
                self.assertTrue(site.heard, status)
            found.append((elsewhere.heard, plain))
        return found

    def test_nothing_follows_a_redirect_of_the_wfm_or_an_identity_service(self):
        def ask_wfm(config, host):
            config.identity.update(certificate=self.files[0], key=self.files[1])
            bundle = margo_agent.TrustBundle([item.der for item in self.anchors], None, None)
            source = margo_agent.MtlsSource(config, margo_agent.load_identity(config), bundle, {})
            source.send("GET", "/deployments", (200,))

        def ask_signed(config, host):
            context = margo_agent.make_tls_context(ca_file=config.identity.ca, min_tls=config.wfm.min_tls)
            headers = {"Signature": "secret"}
            margo_agent.check_response(margo_agent.request("GET", config.wfm.url, headers, None, context, 5, 1000), "x", 0)

        def ask_service(config, host):
            margo_agent.check_response(margo_agent.fetch_from_mis(config.identity.trust_bundle, config), "x", 0)

        def ask_est(config, host):
            token = self.write("token", "user:secret\n")
            config.identity["est"] = margo_agent.Settings({"url": f"https://{host}/est", "token_file": token, "certificate": None, "key": None})
            config.identity.update(key=os.path.join(self.folder, "est.key"))
            store = margo_agent.Store(os.path.join(self.folder, "state"))
            store.create()
            margo_agent.Enrollment(config, store, margo_agent.make_state(), True).post_request(None, "mark")
        for ask in (ask_wfm, ask_signed, ask_service, ask_est):
            with self.subTest(ask.__name__):
                self.assertEqual(self.follow(ask), [([], [])] * 5)

    def test_a_registry_may_lead_elsewhere_but_its_login_stays(self):
        password = self.write("password", "s3cret\n")

        def ask(config, host):
            config.registries[host].update(username="user", password_file=password)
            margo_agent.Registry(host, config).get("registry", "manifests/1", "*/*", 1000)
        for secure, plain in self.follow(ask):
            self.assertEqual(plain, [])
            self.assertEqual(len(secure), 2)
            self.assertNotIn(b"uthorization", b"".join(secure))

    def test_git_follows_none(self):
        support.require("git")

        def ask(config, host):
            config.wfm.update(profile="git", min_tls="1.3")
            home = os.path.join(self.folder, "home")
            os.makedirs(home, exist_ok=True)
            with open(os.path.join(home, ".gitconfig"), "wb") as file:
                file.write(margo_agent.make_git_config(config, home))
            margo_agent.GitSource(config, home, "Bearer s3cret", None).git("ls-remote", config.wfm.url)
        self.assertEqual(self.follow(ask), [([], [])] * 5)


class Order(WfmIds):
    """Where a certificate is read more laxly here than by OpenSSL, OpenSSL has judged the same bytes before they count.

    `lax` is such a certificate: it lacks algorithm and signature, which parse_certificate does not look at.
    """

    test_only_the_wfm_that_the_own_id_names_is_spoken_to = test_the_id_is_the_one_uri_of_the_leaf = None
    test_an_id_in_an_odd_spelling_is_another_id = test_the_names_of_a_leaf_are_read_whole = None

    def setUp(self):
        super().setUp()
        self.root = make_ca("root")
        self.own = Certificate("own leaf", self.root, uris=[CLIENT])
        self.lax = self.cut(self.own.der)
        self.assertEqual(margo_agent.parse_certificate(self.lax).uris, [CLIENT])

    def cut(self, der):
        """A signed thing without its signature."""
        return margo_agent.make_der(0x30, margo_agent.parse_der(margo_agent.parse_der(der)[0][1])[0][2])

    def load(self, **identity):
        """A configuration and a store."""
        files = {"certificate": self.write("own.pem", self.own.pem), "key": self.write("own.key", self.own.key_pem), "trust_bundle": "https://localhost/b"}
        config = margo_agent.make_config({"wfm": {"url": "https://localhost"}, "identity": dict(files, **identity),
                                          "state_dir": os.path.join(self.folder, "state")}, self.folder, {})
        store = margo_agent.Store(config.state_dir)
        store.create()
        return config, store

    def test_a_peers_leaf(self):
        """It is not even read before its chain was found to be good."""
        read = []
        with mock.patch.object(margo_agent, "parse_certificate", lambda der, parse=margo_agent.parse_certificate: read.append(der) or parse(der)):
            for case, expected in (({"anchors": lambda made: [make_ca("stranger")]}, 0), ({"leaf": {"end": -60}}, 0), ({"leaf": {"damaged": True}}, 0), ({}, 1)):
                self.assertEqual(self.is_accepted(case), bool(expected))
                self.assertEqual(read.count(self.chain[0].der), expected, case)

    def test_the_own_certificate(self):
        config, _ = self.load(certificate=self.write("lax.pem", margo_agent.make_pem([self.lax])))
        with self.assertRaises(Untrusted):
            margo_agent.load_wfm_context(config, [self.root.der])
        with self.assertRaises(Untrusted):
            margo_agent.run_own_handshake(config.identity.certificate, config.identity.key, [self.root.der])

    def test_a_stranger_whose_certificate_is_unreadable_is_shown_by_doctor_all_the_same(self):
        peer = Peer(self, [Certificate("leaf", self.root, raw=raw_names((0x86, b"\xff")))])
        self.assertIn("nobody (not a readable X.509", margo_agent.ask_peer(f"https://localhost:{peer.port}", 5))

    def test_an_anchor_of_a_new_bundle(self):
        """C-038: the bundle at hand stays, also on the disk."""
        config, store = self.load()
        good, bad = (margo_agent.make_pem([der]).encode() for der in (self.root.der, self.lax))
        for data, anchors in ((good, [self.root.der]), (bad, [self.root.der])):
            answer = margo_agent.Response(200, {}, data)
            with mock.patch.object(margo_agent, "request", lambda *_, **__: answer):
                found = margo_agent.obtain_trust_bundle(config, store, margo_agent.make_state(), DOMAIN, time.time(), anew=True)
            self.assertEqual(found.anchors, anchors)
            self.assertEqual(margo_agent.load_trust_bundle(config, store).anchors, anchors)

    def test_an_anchor_of_a_file(self):
        with self.assertRaises(Untrusted):
            margo_agent.load_wfm_context(self.load()[0], [self.lax])

    def test_what_est_issued(self):
        """E-012: openssl takes the message apart, and a handshake with oneself judges the chain."""
        key = self.write("own.key", self.own.key_pem)
        parse = margo_agent.parse_certificate
        with self.assertRaises((ValueError, Untrusted)):
            margo_agent.run_paths(parse(self.lax), [], key, [self.root.der])
        self.assertTrue(margo_agent.run_paths(parse(self.own.der), [], key, [self.root.der]))
        signed = margo_agent.make_der(0xA0, margo_agent.make_der(0x30, b"\x02\x01\x01", b"1\0", b"0\x0b\x06\t*\x86H\x86\xf7\r\x01\x07\x01",
                                                                 margo_agent.make_der(0xA0, self.lax), b"1\0"))
        with self.assertRaises(ValueError):
            margo_agent.load_certificates(margo_agent.make_der(0x30, b"\x06\t*\x86H\x86\xf7\r\x01\x07\x02", signed))

    def test_a_pinned_certificate(self):
        """E-005: whoever shows the pinned key in a certificate of his own making, and does not hold it, is refused."""
        pinned, stranger = Certificate("site", make_ca("site-ca"), names=["localhost"]), make_ca("stranger")
        forged = Certificate("site", stranger, ca=True, usage=SIGNS)            # the pinned key, by a stranger
        forged.key, forged.key_pem = pinned.key, pinned.key_pem
        fake = Certificate("fake", forged, names=["localhost"], signer=stranger.key)
        pin = margo_agent.make_pin(pinned.der)
        for chain, accepted in (([fake, pinned], False), ([fake, forged, pinned], False), ([pinned], True)):
            peer = Peer(self, chain)
            config, _ = self.load(pins=[pin], trust_bundle=f"https://localhost:{peer.port}/b")
            with contextlib.suppress(Untrusted):
                margo_agent.fetch_from_mis(config.identity.trust_bundle, config)
            self.assertEqual(bool(peer.heard), accepted)

    def test_a_revocation_list(self):
        """E-084: openssl verifies it before it is stored."""
        from tests.bench import fuzz
        from cryptography import x509
        builder = x509.CertificateRevocationListBuilder(self.root.subject, fuzz.MOMENT, fuzz.MOMENT + datetime.timedelta(7))
        builder = builder.add_extension(x509.CRLNumber(1), False)
        der = fuzz.sign(builder, self.root.key)
        issuers = [margo_agent.parse_certificate(self.root.der)]
        self.assertEqual(margo_agent.ask_signer(*margo_agent.parse_crl(der), issuers), issuers[0])
        for bad in (self.cut(der), der[:-1] + bytes([der[-1] ^ 1]), fuzz.sign(builder, make_key("P-256", "stranger"))):
            parsed = margo_agent.parse_crl(bad)
            with self.assertRaises(ValueError):
                margo_agent.ask_signer(*parsed, issuers)


if __name__ == "__main__":
    unittest.main()
