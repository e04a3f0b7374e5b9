"""Parsers under fire: inputs made from good ones by mutation, each parser beside an independent reader.

    python3 -m tests.bench.fuzz                             # names the parsers
    python3 -m tests.bench.fuzz PARSER COUNT [SEED]         # that many inputs; SEED (1 by default) makes the same ones again
    python3 -m tests.bench.fuzz --atheris PARSER COUNT [SEED]       # guided by coverage, where the package atheris is installed

A parser is a row of PARSERS (see Parser).  It may return something, or raise what its row allows; everything else is a bug.
What it returns goes to the row's judge, which says "" or in which way an independent reader reads the same bytes otherwise.
Inputs whose outcome is of a new kind (where in the agent's source it was refused) join those that the next ones are made from; half of
the next ones are made from inputs that were read.
SIGTERM ends a run with what it has.  Exit code 1 where something was found; each finding is printed in base64, with what is wrong with it, once for each kind.
tests/test_fuzz.py runs a bounded share of each row; to add a parser, add a row.
"""
import base64
import collections
import datetime
import functools
import json
import os
import random
import re
import signal
import socket
import sys
import tempfile
import time
import warnings
from unittest import mock

if "--atheris" in sys.argv:
    import atheris
    with atheris.instrument_imports(include=["margo_agent"]):
        import margo_agent
else:
    import margo_agent

SLOW = 2.0                          # seconds that one input may take
KEPT = 2000                         # inputs that mutation starts from, at most
BATCH = 400                         # what is read before a judge of many is asked
Parser = collections.namedtuple("Parser", "seeds read judge refusals tokens mutate judge_all", defaults=(None,))
Parser.__doc__ = """How one parser is tried.

seeds: a function that makes good inputs, [bytes].  read: bytes to what the agent reads in them.
judge: (bytes, what was read) to words of what is wrong with it, or "".  refusals: exceptions that `read` may raise.
tokens: [bytes] that mutation puts in.  mutate: (chance, bytes, [bytes] of other inputs, tokens) to new bytes.
judge_all: None, or a judge that takes long to ask: [(bytes, what was read)] to [(bytes, words)] of those that are wrong.
"""
PARSERS = {}
REFUSALS = (margo_agent.MargoError, margo_agent.YAMLError)


def add(name, seeds, read, judge=lambda data, found: "", refusals=REFUSALS, tokens=(), mutate=None, judge_all=None):
    """Adds a row to PARSERS."""
    PARSERS[name] = Parser(functools.lru_cache(None)(seeds), read, judge, refusals, tuple(tokens), mutate or mutate_bytes, judge_all)


# Mutation.

ODD_BYTES = [b"", b"\0", b"\xff", b"\x7f", b"\x80", b"\n", b"\r\n", b" ", b"\t", b'"', b"'", b"\\", b"{", b"}", b"[", b"]", b":", b",", b"$",
             b"-", b"0", b"1e999", b"-1", b"18446744073709551616", b"null", b"true", b"NaN", b"\xc3\xa9", b"\xed\xa0\x80", b"\xe2\x80\xa8", b"\x1b[2J"]


def mutate_bytes(chance, data, others, tokens):
    """A few changes by bytes: flip, set, insert, delete, repeat, put in a token or a piece of another input."""
    data = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 6))):
        place = chance.randrange(len(data) + 1)
        end = min(len(data), place + chance.choice((1, 1, 2, 4, 16, 64)))
        kind = chance.randrange(8)
        if kind == 0 and place < len(data):
            data[place] ^= 1 << chance.randrange(8)
        elif kind == 1 and place < len(data):
            data[place] = chance.randrange(256)
        elif kind == 2:
            data[place:place] = bytes(chance.randrange(256) for _ in range(chance.choice((1, 2, 4))))
        elif kind == 3:
            del data[place:end]
        elif kind == 4:
            data[place:place] = data[place:end] * chance.choice((1, 1, 2, 8, 100))
        elif kind == 5 and tokens:
            data[place:end if chance.random() < 0.5 else place] = chance.choice(tokens)
        elif kind == 6:
            data[place:end if chance.random() < 0.5 else place] = chance.choice(ODD_BYTES)
        else:
            other = chance.choice(others)
            start = chance.randrange(len(other) + 1)
            data[place:end] = other[start:start + chance.choice((1, 4, 16, 64, 1000))]
    return bytes(data)


def mutate_words(chance, data, others, tokens):
    """A text made of tokens alone, of tokens in another text, or changed by bytes."""
    words = b"".join(chance.choice(tokens) for _ in range(chance.randrange(1, 14)))
    kind = chance.randrange(4)
    if kind == 0:
        return mutate_bytes(chance, data, others, tokens)
    if kind == 1:
        place = chance.randrange(len(data) + 1)
        return (data[:place] + words + data[place:])[:400]
    return words


def split_der(data, depth=0):
    """DER as a tree, [tag, [trees] or bytes]; None where it is none."""
    try:
        found = [[tag, value] for tag, value, _ in margo_agent.parse_der(data)]
    except ValueError:
        return None
    for item in found:
        constructed, hides = item[0] & 0x20, item[0] == 0x04
        inner = split_der(item[1], depth + 1) if (constructed or hides) and depth < 20 else None
        item[1] = inner if inner else item[1]
    return found


def join_der(trees):
    """The DER of trees."""
    return b"".join(margo_agent.make_der(tag, value if isinstance(value, bytes) else join_der(value)) for tag, value in trees)


def list_places(trees):
    """[(list, index)] of every element of trees."""
    return [place for index, item in enumerate(trees) for place in
            [(trees, index)] + (list_places(item[1]) if isinstance(item[1], list) else [])]


def mutate_der(chance, data, others, tokens):
    """Changes of the tree, whose lengths are then right again; every fourth input is changed by bytes, too."""
    trees = split_der(data)
    if not trees or chance.random() < 0.25:
        return mutate_bytes(chance, data, others, tokens)
    for _ in range(chance.choice((1, 1, 2, 3))):
        places = list_places(trees)
        if not places:
            break
        home, index = chance.choice(places)
        kind = chance.randrange(8)
        if kind == 0:
            home[index][0] = chance.choice((chance.randrange(256), 0x30, 0x31, 2, 3, 4, 6, 1, 0xA0, 0xA3, 0x86, 0x82, 0x80, 0x17, 0x18, 5))
        elif kind == 1:
            del home[index]
        elif kind == 2:
            home.insert(chance.randrange(len(home) + 1), home[index])
        elif kind == 3 and len(home) > 1:
            other = chance.randrange(len(home))
            home[index], home[other] = home[other], home[index]
        elif kind == 4:
            donor, at = chance.choice(list_places(split_der(chance.choice(others)) or [[5, b""]]))
            home[index] = donor[at]
        elif kind == 5:
            home[index][1] = chance.choice(tokens or ODD_BYTES)
        elif kind == 6:
            home[index] = [home[index][0] | 0x20, [home[index]]]
        elif isinstance(home[index][1], bytes):
            home[index][1] = mutate_bytes(chance, home[index][1], others, tokens)
    return join_der(trees)


ODD_VALUES = [json.dumps(value) for value in (None, True, False, 0, -1, 1.5, 1e300, 2 ** 64, 10 ** 30, "", "a", "\0", "\u2028", "x" * 300,
                                              [], {}, [[]], [None], {"": ""})]


def list_members(value):
    """[(mapping or list, key)] of every place below a value of JSON."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in [(value, key)] + list_members(value[key])]


def mutate_json(chance, data, others, tokens):
    """Changes of the tree of a JSON document; every third input is changed by bytes instead."""
    try:
        value = json.loads(data)
        places = list_members(value)
    except (ValueError, RecursionError):
        places = []
    if not places or chance.random() < 0.3:
        return mutate_bytes(chance, data, others, tokens)
    for _ in range(chance.choice((1, 1, 2, 3))):
        home, key = chance.choice(list_members(value) or [({"": 0}, "")])
        kind = chance.randrange(6)
        if kind == 0:
            home[key] = json.loads(chance.choice(ODD_VALUES))
        elif kind == 1:
            del home[key]
        elif kind == 2 and isinstance(home[key], str):
            home[key] = mutate_bytes(chance, home[key].encode("utf-8", "replace"), others, tokens).decode("utf-8", "replace")
        elif kind == 3:
            other, name = chance.choice(list_members(value) or [(home, key)])
            home[key] = other[name] if other is not home and not isinstance(other[name], (dict, list)) else json.loads(chance.choice(ODD_VALUES))
        elif kind == 4 and isinstance(home, dict):
            home[chance.choice(tokens or [b"x"]).decode("utf-8", "replace").strip('"')] = json.loads(chance.choice(ODD_VALUES))
        elif isinstance(home, list):
            home.insert(chance.randrange(len(home) + 1), json.loads(json.dumps(home[key])))
    return json.dumps(value).encode()


# Runs.

def find_place(error):
    """Where in the agent an exception was raised, with who called that, and those that it was made of: "Refused 60 812, ValueError 70 9144"."""
    found = []
    while error is not None and len(found) < 5:
        places, trace = [], error.__traceback__
        while trace:
            places.append(f"{os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno}")
            trace = trace.tb_next
        found.append(" ".join([type(error).__name__, *places[-4:]]).replace("margo_agent.py:", ""))
        error = error.__context__
    return ", ".join(found)


class Run:
    """Inputs to one parser: how many were read and refused, how long the slowest took, and what was found."""

    def __init__(self, name, seed):
        self.name, self.parser, self.seed = name, PARSERS[name], seed
        self.chance = random.Random(f"{name} {seed}")
        self.kept = list(self.parser.seeds())
        self.good = []                              # of what is kept, what was read
        self.count = self.accepted = 0
        self.slowest, self.kinds, self.findings = 0.0, collections.Counter(), {}
        self.waiting, self.judged = [], 0           # what was read and is still to be judged with others

    def ask(self):
        """Asks the judge of many about what waits."""
        for data, words in self.parser.judge_all(self.waiting) if self.waiting else ():
            self.note("read otherwise: " + re.sub(r"[0-9]+", "#", words)[:60], data, words)
        self.judged += len(self.waiting)
        self.waiting = []

    def note(self, kind, data, words):
        """Keeps one finding of each kind."""
        self.findings.setdefault(kind, (data, words))

    def find_kind(self, data):
        """Reads one input; the kind of its outcome."""
        try:
            found = self.parser.read(data)
        except self.parser.refusals as error:
            return find_place(error)
        except Exception as error:              # a bug by definition
            kind = find_place(error)
            self.note(kind, data, str(error))
            return kind
        self.accepted += 1
        try:
            words = self.parser.judge(data, found)
        except Exception as error:              # it read what the judge cannot even look at
            words = f"its judge ended with {error!r}"
        if words:
            self.note("read otherwise: " + re.sub(r"[0-9]+", "#", words)[:60], data, words)
        if self.parser.judge_all:
            self.waiting.append((data, found))
        return "read"

    def try_one(self, data):
        """Tries one input."""
        start = time.monotonic()
        kind = self.find_kind(data)
        self.slowest = max(self.slowest, time.monotonic() - start)
        if self.slowest > SLOW:
            self.note("slow", data, f"{self.slowest:.1f} s for {len(data)} bytes")
        if len(self.waiting) == BATCH:
            self.ask()
        self.count += 1
        self.kinds[kind] += 1
        if len(data) < 100000 and (self.kinds[kind] == 1 or kind == "read" and self.chance.random() < 0.05):
            kept = self.good if kind == "read" else self.kept
            if len(kept) < KEPT:
                kept.append(data)
            else:
                kept[self.chance.randrange(KEPT)] = data

    def choose(self):
        """An input to make the next one from: mostly one that was read, for most changes of the others are refused again."""
        return self.chance.choice(self.good if self.good and self.chance.random() < 0.75 else self.kept)

    def go(self, count):
        """Tries the seeds, then so many mutations."""
        for data in self.parser.seeds():
            self.try_one(data)
        while self.count < count:
            self.try_one(self.parser.mutate(self.chance, self.choose(), self.kept, self.parser.tokens))
        self.ask()
        return self

    def go_guided(self, count):
        """The same by atheris, which ends the process."""
        with tempfile.TemporaryDirectory() as folder:
            for index, data in enumerate(self.kept):
                with open(os.path.join(folder, str(index)), "wb") as file:
                    file.write(data)

            def custom(data, size, seed):
                return self.parser.mutate(random.Random(seed), bytes(data), self.kept, self.parser.tokens)[:size]

            def look(data):
                self.try_one(data)
                if self.count >= count:
                    code = tell(self, time.monotonic() - start)
                    sys.stdout.flush()
                    os._exit(code)                  # libFuzzer has no other end that leaves words behind
            start = time.monotonic()
            arguments = [sys.argv[0], f"-seed={self.seed}", "-max_len=20000", "-verbosity=0", folder]
            atheris.Setup(arguments, look, custom_mutator=custom)
            atheris.Fuzz()


def tell(run, seconds):
    """Prints how a run went; its exit code."""
    print(f"{run.name}: {run.count} inputs of seed {run.seed}, {run.count / seconds:.0f} a second, {run.accepted} read,"
          f" {run.judged} of them judged together, {len(run.kinds)} kinds of outcome, slowest {1000 * run.slowest:.0f} ms, {len(run.findings)} findings")
    for kind, (data, words) in run.findings.items():
        print(f"  {kind}: {words}\n    {base64.b64encode(data[:3000]).decode()}")
    return 1 if run.findings else 0


def main(arguments):
    """See the module's docstring."""
    guided = "--atheris" in arguments
    arguments = [item for item in arguments if item != "--atheris"]
    if not arguments:
        print("\n".join(PARSERS))
        return 0
    name, count, seed = arguments[0], int(arguments[1]), int(arguments[2]) if arguments[2:] else 1
    warnings.simplefilter("ignore")
    margo_agent.log = lambda *_, **__: None
    run = Run(name, seed)
    if guided:
        return run.go_guided(count)
    start = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run.go(count)
    except KeyboardInterrupt:
        print("ended before its time")
    return tell(run, time.monotonic() - start)


# Identity: certificates, revocation lists, what an identity service answers.  Judges: the packages cryptography and asn1crypto.

MOMENT = datetime.datetime(2026, 1, 1)
DER_TOKENS = [bytes.fromhex(text) for text in (
    "0603551d13", "0603551d0f", "0603551d11", "0603551d0e", "0603551d23", "0603551d14", "0603551d1c", "0603551d1b", "0603551d15", "0101ff",
    "010100", "30030101ff", "03020106", "03020780", "0500", "3080", "0000", "30818080", "020100", "0201ff", "180f32303236303130313030303030305a",
    "170d3236303130313030303030305a", "170b323630313031303030305a", "3000", "2480", "a000", "a300")] + [
    b"spiffe://factory.example/margo/wfm/main", b"spiffe://factory.example/margo/wfm/main/client/a", b"https://x/y", b"Z", b"+0000", b".5Z"]


@functools.lru_cache(None)
def make_keys():
    """Private keys of several kinds."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
    return [ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP384R1()), ed25519.Ed25519PrivateKey.generate(),
            rsa.generate_private_key(65537, 2048)]


def make_name(*words):
    """An X.509 name of some common names."""
    from cryptography import x509
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, word) for word in words])


def sign(builder, key):
    """The DER of a certificate or revocation list that a builder makes."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ed25519
    from cryptography.hazmat.primitives.serialization import Encoding
    return builder.sign(key, None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()).public_bytes(Encoding.DER)


@functools.lru_cache(None)
def make_certificates():
    """Certificates of many shapes (DER)."""
    import ipaddress
    from cryptography import x509
    usage = dict.fromkeys(("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "key_cert_sign",
                           "crl_sign", "encipher_only", "decipher_only"), False)
    uri, names = x509.UniformResourceIdentifier, x509.SubjectAlternativeName
    shapes = [
        [], [names([uri("spiffe://factory.example/margo/wfm/main")])],
        [names([x509.DNSName("localhost"), uri("spiffe://a/b"), uri("https://x/y"), x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
                x509.DirectoryName(make_name("x")), x509.RFC822Name("a@b.example"), x509.RegisteredID(x509.ObjectIdentifier("1.2.3"))])],
        [x509.BasicConstraints(True, 3), x509.KeyUsage(**dict(usage, key_cert_sign=True, crl_sign=True))],
        [x509.BasicConstraints(False, None), x509.KeyUsage(**dict(usage, digital_signature=True, key_agreement=True, decipher_only=True)),
         names([uri("spiffe://factory.example/margo/wfm/main/client/a")]), x509.SubjectKeyIdentifier(b"\x01" * 20),
         x509.AuthorityKeyIdentifier(b"\x02" * 20, None, None), x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.CLIENT_AUTH])],
        [x509.AuthorityKeyIdentifier(b"\x02" * 8, [x509.DirectoryName(make_name("y"))], 7),
         x509.NameConstraints([uri("factory.example")], None), x509.PolicyConstraints(0, None)]]
    found = []
    for index, extensions in enumerate(shapes):
        for key in make_keys():
            start = (MOMENT, datetime.datetime(1950, 1, 1), datetime.datetime(2050, 1, 1))[index % 3]
            builder = x509.CertificateBuilder(issuer_name=make_name("Prüfung", "ca"), subject_name=make_name(*"ab"[:index % 3]),
                                              public_key=key.public_key(), serial_number=(1, 2 ** 158 + 5, 255)[index % 3],
                                              not_valid_before=start, not_valid_after=start + datetime.timedelta(365))
            for extension in extensions:
                builder = builder.add_extension(extension, critical=index % 2 == 0)
            found.append(sign(builder, key))
    return found


def load_certificate(data):
    """The cryptography library's reading of a certificate, with all of its extensions; ValueError where it has none."""
    from cryptography import x509
    found = x509.load_der_x509_certificate(data)
    return found, {extension.oid.dotted_string: extension.value for extension in found.extensions}


def to_seconds(item, name):
    """A time of a certificate or list of the cryptography library as Unix seconds."""
    moment = getattr(item, f"{name}_utc", None) or getattr(item, name).replace(tzinfo=datetime.timezone.utc)
    return int(moment.timestamp())


def judge_certificate(data, own):
    """In which field a certificate is read otherwise than by the cryptography library, where that reads it at all."""
    from cryptography import x509
    try:
        other, extensions = load_certificate(data)
        names = extensions.get("2.5.29.17")
        constraints, usage = extensions.get("2.5.29.19"), extensions.get("2.5.29.15")
        key_id, issuer_key = extensions.get("2.5.29.14"), extensions.get("2.5.29.35")
        pairs = {
            "subject": (own.subject, other.subject.public_bytes()), "issuer": (own.issuer, other.issuer.public_bytes()),
            "serial": (own.serial, other.serial_number),
            "not_before": (own.not_before, to_seconds(other, "not_valid_before")),
            "not_after": (own.not_after, to_seconds(other, "not_valid_after")),
            "uris": (own.uris, names.get_values_for_type(x509.UniformResourceIdentifier) if names else []),
            "is_ca": (own.is_ca, bool(constraints and constraints.ca)),
            "sign": (None if own.key_usage is None else [bit in own.key_usage for bit in (0, 5, 6)],
                     usage and [usage.digital_signature, usage.key_cert_sign, usage.crl_sign]),
            "key": (own.key, key_id and key_id.digest), "issuer_key": (own.issuer_key, issuer_key and issuer_key.key_identifier)}
    except Exception:                               # laxer than that library; OpenSSL has judged by then (tests/test_trust.py)
        return ""
    return "; ".join(f"{name} is {mine!r} and not {theirs!r}" for name, (mine, theirs) in pairs.items() if mine != theirs)


@functools.lru_cache(None)
def make_lists():
    """Revocation lists of many shapes (DER and PEM)."""
    from cryptography import x509
    found = []
    for index, key in enumerate(make_keys()):
        for count in (0, 1, 5):
            builder = x509.CertificateRevocationListBuilder(make_name("Prüfung", "ca"), MOMENT, MOMENT + datetime.timedelta(7))
            builder = builder.add_extension(x509.CRLNumber((1, 2 ** 100, 0)[count % 3]), critical=False)
            if index % 2:
                builder = builder.add_extension(x509.AuthorityKeyIdentifier(b"\x02" * 20, None, None), critical=False)
            if count == 5:
                where = [x509.UniformResourceIdentifier("http://x/a.crl")]
                builder = builder.add_extension(x509.IssuingDistributionPoint(where, None, index > 1, False, None, False, False), critical=True)
            for number in range(count):
                entry = x509.RevokedCertificateBuilder(2 ** (8 * number) + 127, MOMENT)
                if number % 2:
                    entry = entry.add_extension(x509.CRLReason(x509.ReasonFlags.key_compromise), critical=False)
                builder = builder.add_revoked_certificate(entry.build())
            found.append(sign(builder, key))
    return found + [b"-----BEGIN X509 CRL-----\n" + base64.encodebytes(item) + b"-----END X509 CRL-----\n" for item in found[:3]]


def judge_list(data, found):
    """In which way a revocation list is read otherwise than by the cryptography library."""
    from cryptography import x509
    der, own = found
    try:
        other = x509.load_der_x509_crl(der)
        extensions = {item.oid.dotted_string: item.value for item in other.extensions}
        key = extensions.get("2.5.29.35")
        pairs = {"issuer": (own.issuer, other.issuer.public_bytes()), "number": (own.number, extensions["2.5.29.20"].crl_number),
                 "this_update": (own.this_update, to_seconds(other, "last_update")),
                 "next_update": (own.next_update, to_seconds(other, "next_update")),
                 "serials": (own.serials, {entry.serial_number for entry in other}),
                 "issuer_key": (own.issuer_key, key and key.key_identifier)}
        scope = extensions.get("2.5.29.28")
        if scope and (scope.indirect_crl or scope.only_contains_ca_certs or scope.only_contains_attribute_certs or scope.only_some_reasons):
            return "a list of a narrow kind is taken for a whole one"
        if "2.5.29.27" in extensions:
            return "a delta list is taken for a whole one"
    except Exception:
        return ""
    return "; ".join(f"{name} is {mine!r} and not {theirs!r}" for name, (mine, theirs) in pairs.items() if mine != theirs)


def make_answers():
    """Certs-only answers in base64, DER and PEM."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding, pkcs7
    good = [x509.load_der_x509_certificate(der) for der in make_certificates()[:12]]
    found = []
    for count in (1, 2, 5):
        der = pkcs7.serialize_certificates(good[:count], Encoding.DER)
        found += [der, base64.encodebytes(der), pkcs7.serialize_certificates(good[:count], Encoding.PEM)]
    return found


def mutate_answer(chance, data, others, tokens):
    """Changes of the DER within, or of what is around it."""
    if chance.random() < 0.3 or data[:1] == b"-":
        return mutate_bytes(chance, data, others, [b"-----BEGIN PKCS7-----", b"-----END PKCS7-----", b"=", b"AAAA"])
    try:
        return base64.encodebytes(mutate_der(chance, base64.b64decode(data), [item for item in others if item[:1] == b"0"] or [data], tokens))
    except ValueError:
        return mutate_der(chance, data, others, tokens)


def judge_answer(data, own):
    """Whether other certificates are found than by asn1crypto, where that reads the answer at all."""
    from asn1crypto import cms
    try:
        der = data if data[:1] == b"0" else base64.b64decode(re.sub(rb"-----(BEGIN|END) PKCS7-----", b"", data))
        theirs = [item.chosen["tbs_certificate"].dump() for item in cms.ContentInfo.load(der)["content"]["certificates"]]
    except Exception:
        return ""
    ours = [margo_agent.parse_der(margo_agent.parse_der(item.der)[0][1])[0][2] for item in own]     # openssl writes what is around it anew
    return "" if set(ours) <= set(theirs) else f"certificates that are not in it: {ours} and {theirs}"


def make_bundles():
    """SPIFFE bundles and PEM files."""
    good = [base64.b64encode(der).decode() for der in make_certificates()[:12]]

    def bundle(*keys, **members):
        return json.dumps(dict({"keys": list(keys)}, **members)).encode()
    key = {"use": "x509-svid", "kty": "EC", "crv": "P-256", "x": "a", "y": "b"}
    return [bundle(dict(key, x5c=[good[0]]), spiffe_sequence=1, spiffe_refresh_hint=300),
            bundle({"use": "jwt-svid", "kid": "a"}, dict(key, x5c=[good[1], good[2]]), dict(key, x5c=[good[3]])),
            margo_agent.make_pem(make_certificates()[:3]).encode(), b"# site\r\n" + margo_agent.make_pem(make_certificates()[3:5]).encode()]


def is_plain_pem(data):
    """Whether dashes stand in whole lines of PEM alone: the agent and openssl see a block there only, other readers are laxer."""
    lines = data.replace(b"\r\n", b"\n").split(b"\n")
    return all(re.fullmatch(rb"-----(BEGIN|END) [A-Z0-9 ]+-----", line) for line in lines if b"-----" in line)


def judge_bundle(data, own):
    """Whether other anchors or numbers are found than by json and the cryptography library."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding
    for der in own.anchors:
        if not der:
            return "an anchor without bytes"
    try:
        if b"-----BEGIN CERTIFICATE-----" in data and data.lstrip()[:1] != b"{":
            theirs = [item.public_bytes(Encoding.DER) for item in x509.load_pem_x509_certificates(data)]
            return "" if theirs == own.anchors or not is_plain_pem(data) else "other certificates"
        value = json.loads(data)
    except Exception:
        return ""
    theirs = [base64.b64decode(key["x5c"][0]) for key in value["keys"] if isinstance(key, dict) and key.get("use") == "x509-svid"]
    if theirs != own.anchors:
        return "other anchors"
    for name, mine in (("spiffe_sequence", own.sequence), ("spiffe_refresh_hint", own.refresh_hint)):
        if mine is not None and value.get(name) != mine:
            return f"{name} is {mine!r} and not {value.get(name)!r}"
    return ""


def make_pems():
    """PEM texts."""
    good = make_certificates()
    key = b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"
    return [margo_agent.make_pem(good[:1]).encode(), margo_agent.make_pem(good[:4]).encode(), key + margo_agent.make_pem(good[4:6]).encode() + b"x\n",
            margo_agent.make_pem(good[:2]).replace("\n", "\r\n").encode()]


def judge_pem(data, own):
    """Whether other blocks are found than by asn1crypto, in texts of plain lines."""
    from asn1crypto import pem
    if not is_plain_pem(data):
        return ""
    try:
        theirs = [der for kind, headers, der in pem.unarmor(data, multiple=True) if kind == "CERTIFICATE" and not headers]
    except Exception:
        return ""
    return "" if own == theirs else f"{len(own)} blocks and not {len(theirs)}"


def judge_discovery(data, own):
    """Whether the document says otherwise to json."""
    value = json.loads(data)
    return "" if (own.trust_domain, own.bundle_uri) == (value["trustDomain"], value["trustBundleUri"]) else "other members"


IDENTITY = REFUSALS + (ValueError,)                 # what these functions say they raise; their callers make it Untrusted
DISCOVERY = {"trustDomain": "factory.example", "trustBundleUri": "https://m/b", "estBaseUri": "https://m/est", "crlUris": ["http://m/a.crl"]}
PEM_TOKENS = [b"-----BEGIN CERTIFICATE-----", b"-----END CERTIFICATE-----", b"-----", b"\n", b"\r\n", b"=", b"=="]
JSON_TOKENS = [b'"x509-svid"', b'"jwt-svid"', b'"x5c"', b'"use"', b'"keys"', b'"spiffe_sequence"', b"[]", b"{}", b"https://", b"http://", b"@",
               b"?", b"#", b'"trustDomain"', b'"trustBundleUri"', b'"estBaseUri"', b'"crlUris"', b"1e3", b"-0"]
add("certificate", make_certificates, margo_agent.parse_certificate, judge_certificate, IDENTITY, DER_TOKENS, mutate_der)
add("crl", make_lists, margo_agent.parse_crl, judge_list, IDENTITY, DER_TOKENS, mutate_der)
add("certs-only", make_answers, margo_agent.load_certificates, judge_answer, IDENTITY, DER_TOKENS, mutate_answer)
add("bundle", make_bundles, margo_agent.parse_trust_bundle, judge_bundle, IDENTITY, JSON_TOKENS + PEM_TOKENS, mutate_json)
add("pem", make_pems, margo_agent.parse_pem, judge_pem, IDENTITY, PEM_TOKENS)
add("discovery", lambda: [json.dumps(DISCOVERY).encode()],
    lambda data: margo_agent.parse_discovery(data, "https://m/d", None, True), judge_discovery, IDENTITY, JSON_TOKENS, mutate_json)
add("spiffe-id", lambda: [b"spiffe://factory.example/margo/wfm/main/client/a", b"spiffe://a-b.c_d/x/y~z"],
    lambda data: margo_agent.parse_spiffe_id(data.decode("latin-1")),
    lambda data, own: "" if own.text.encode() == data and own.trust_domain == own.trust_domain.lower() else "changed", IDENTITY)


# Documents, packages and answers.

YAML_TOKENS = [b"\n", b" ", b"  ", b"\t", b"- ", b"? ", b": ", b":", b"# c", b"#", b"&a ", b"*a", b"!!str ", b"!!int ", b"! ", b"|\n", b">\n", b"|2",
               b">+\n", b"[", b"]", b"{", b"}", b",", b"'", b'"', b"\\", b"\\x41", b"<<: ", b"b: c", b"---", b"...", b"\n---\n", b"%YAML 1.2\n", b"0x1f",
               b"~", b"null", b" #x\n", b"\\\n", b"''", b'""', b".nan", b".inf", b"1e3", b"07"]
MEMBERS = [b'"deployments"', b'"bundle"', b'"url"', b'"digest"', b'"sizeBytes"', b'"layers"', b'"mediaType"', b'"components"', b'"parameters"',
           b'"targets"', b'"pointer"', b'"timeout"', b'"5m0s"', b"https://", b"sha256:", b"../", b"{}", b"[]"]
BASE = "https://wfm.example/m"
UUID = "3f1d6f0e-5c35-4c9f-9b43-2f6f6c1f7a10"
SHA = "sha256:" + "a" * 64


def make_yamls():
    """The public suite, where it is installed, and documents of the corpus."""
    from tests import test_encodings as encodings
    texts = [text.encode() for _, text, _, _, _ in encodings.load_suite()] if os.path.isdir(encodings.SUITE) else []
    for kind in ("valid", "invalid"):
        folder = os.path.join(encodings.CORPUS, kind)
        for name in sorted(os.listdir(folder)):
            if name.endswith(".yaml"):
                with open(os.path.join(folder, name), "rb") as file:
                    texts.append(file.read())
    return [text for text in texts if len(text) < 2000]


def judge_yaml(data, own):
    """Whether ruamel.yaml, where it can be a judge, reads another value."""
    import contextlib
    import io
    from tests import test_encodings as encodings
    try:
        text = data.decode()
        if encodings.ruamel_deviates(text + "\n"):
            return ""
        with contextlib.redirect_stdout(io.StringIO()):
            other = encodings.load_with_ruamel(text)
    except Exception:
        return ""                                   # it refuses, or does not know
    return "" if not encodings.is_plain(other) or encodings.is_same(own, other) else f"{own!r} and not {other!r}"


def make_manifests():
    """State manifests, one of them empty."""
    item = {"deploymentId": UUID, "digest": SHA, "sizeBytes": 3, "url": f"/api/v1/deployments/{UUID}/{SHA}"}
    bundle = {"mediaType": margo_agent.BUNDLE_TYPE, "digest": SHA, "url": f"{BASE}/api/v1/bundles/{SHA}"}
    return [json.dumps({"manifestVersion": version, "bundle": items and bundle or None, "deployments": items}).encode()
            for version, items in ((7, [item]), (2 ** 64 - 1, []), (1.0, [item, dict(item, deploymentId=UUID[:-1] + "1", url=item["url"].replace(
                UUID, UUID[:-1] + "1"))]))]


def judge_manifest(data, own):
    """Whether json reads other versions, ids or digests."""
    value = json.loads(data)
    theirs = [(item["deploymentId"], item["digest"]) for item in value["deployments"]]
    mine = [(entry.deployment_id, entry.digest) for entry in own.entries]
    return "" if (own.version, mine) == (value["manifestVersion"], theirs) else "another version, or other entries"


def read_deployment(data):
    """An ApplicationDeployment with what compose and Helm make of its parameters."""
    deployment = margo_agent.parse_deployment(data, UUID)
    for component in deployment.components:
        margo_agent.make_variables(deployment, component.name)
    return deployment


def make_deployments():
    """ApplicationDeployments of two types."""
    from tests import support
    return [support.make_deployment(parameters={"A": 1, "B": [1, "x"], "C": {"d": None}}).encode(),
            support.make_deployment(timeout="5m0s", wait=True).replace('"compose"', '"helm"').encode()]


def judge_deployment(data, own):
    """Whether the same members are read by load_yaml, which a row of its own holds against another reader."""
    value = margo_agent.load_yaml(data)
    names = [item["name"] for item in value["spec"]["deploymentProfile"]["components"]]
    return "" if (own.name, [item.name for item in own.components]) == (value["metadata"]["name"], names) else "other names"


def make_oci_manifests():
    """The OCI manifest of a Compose Archive."""
    layer = {"mediaType": margo_agent.COMPOSE_LAYER, "digest": SHA, "size": 3}
    return [json.dumps({"schemaVersion": 2, "artifactType": margo_agent.COMPOSE_ARTIFACT, "layers": [layer]}).encode()]


def judge_oci_manifest(data, own):
    """Whether json reads another layer."""
    layer = json.loads(data)["layers"][0]
    return "" if own == (layer["digest"], layer["size"]) else "another layer"


def make_archives():
    """Compose Archives with files, folders and links."""
    import tarfile
    from tests import support
    link, hard = tarfile.TarInfo(), tarfile.TarInfo()
    link.type, link.linkname = tarfile.SYMTYPE, "compose.yaml"
    hard.type, hard.linkname = tarfile.LNKTYPE, "app/compose.yaml"
    return [support.make_archive({"compose.yaml": "services: {}", "sub/a": "b" * 600, "link": link, "hard": hard}),
            support.make_archive({"compose.yaml": "services: {}", "n" * 120 + "/" + "m" * 120: "x"})]


def mutate_archive(chance, data, others, tokens):
    """Changes of the tar inside, with the sums of its headers put right; every fourth of the gzip outside."""
    import gzip
    if chance.random() < 0.25:
        return mutate_bytes(chance, data, others, tokens)
    try:
        plain = bytearray(mutate_bytes(chance, gzip.decompress(data), others, tokens))
    except Exception:                               # what was changed outside before
        return mutate_bytes(chance, data, others, tokens)
    for start in range(0, len(plain) - 511, 512):
        if plain[start + 257:start + 262] == b"ustar":
            plain[start + 148:start + 156] = b" " * 8
            plain[start + 148:start + 156] = b"%06o\0 " % sum(plain[start:start + 512])
    return gzip.compress(bytes(plain), 1)


def read_archive(data):
    """A package unpacked to a folder: {path: what lies there}."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        home = os.path.join(folder, "home")
        os.mkdir(home)
        try:
            top = margo_agent.unpack_package(data, margo_agent.sha256_digest(data), home, 1 << 20)
        finally:
            found[".."] = sorted(os.listdir(folder)), sorted(os.listdir(home))
            if not found[".."][1] == [] and found[".."] != (["home"], [margo_agent.sha256_digest(data)[7:23]]):
                raise AssertionError(f"left behind: {found['..']}")
        for path, folders, files in os.walk(top):
            for name in folders + files:
                state = os.lstat(os.path.join(path, name))
                found[os.path.relpath(os.path.join(path, name), top)] = state.st_mode
    return found


def judge_archive(data, own):
    """Whether a file has odd rights or kind, or tarfile knows nothing of it."""
    import io
    import stat
    import tarfile
    for name, mode in own.items():
        if name != ".." and (mode & 0o7022 and not stat.S_ISLNK(mode) or not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode))):
            return f"{name} has mode {mode:o}"
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        theirs = {item.name.split("/", 1)[1].strip("/") for item in archive if item.isfile() and "/" in item.name and "./" not in item.name}
    return "" if theirs <= set(own) else f"without {sorted(theirs - set(own))}"


def read_gzip(data):
    margo_agent.check_gzip(data, 1 << 20)


def judge_gzip(data, own):
    """Whether gzip cannot unpack it."""
    import gzip
    try:
        gzip.decompress(data)
    except Exception as error:
        return f"gzip says {type(error).__name__}"
    return ""


def make_gzips():
    import gzip
    return [gzip.compress(b"x" * 5000), gzip.compress(b""), gzip.compress(os.urandom(100))]


def make_states():
    """A state with a deployment and a report."""
    state = margo_agent.make_state()
    fault = {"code": "x", "source": "y", "message": "z"}
    wait = margo_agent.make_wait({}, 60, margo_agent.Clock(1e9, "boot", 5.0))
    services = {"main": {"hash": "h", "finished": False, "image": "i", "id": "1", "started": 1.0, "ports": [["", 80, "tcp"]]}}
    record = margo_agent.make_record(margo_agent.Target(UUID, SHA, 1), "device")
    running = {"digest": SHA, "packages": {"web": {"reference": "r", "digest": SHA}}, "images": ["i"], "services": {"web": services}}
    component = {"name": "web", "state": "failed", "error": fault, "services": services, "package": None}
    state["deployments"][UUID] = dict(record, state="failed", error=fault, running=running, components=[component], retry=wait)
    state["outbox"][UUID] = margo_agent.make_status(state["deployments"][UUID])
    state["accepted"] = {"version": 1, "etag": None, "digest": SHA, "acceptedAt": "", "deployments": [{"deploymentId": UUID, "digest": SHA}]}
    state["history"] = margo_agent.make_history(state, margo_agent.Desired(2, None, SHA, [], {}), "")
    state.update(patience=wait, waits={UUID: wait}, lastPoll={"at": "", "result": "", "detail": ""})
    return [margo_agent.make_state_data(state), margo_agent.make_json(dict(state, schema=1))]


def read_state(data):
    """What is read of a state whose digest is right, whatever was done to it, and used by what touches nobody."""
    body, found, _ = data.rpartition(margo_agent.SUM)
    if found:
        data = body + found + margo_agent.sha256_digest(body + b"}").encode() + b'"}'
    state = margo_agent.parse_state(data, "x")
    copy = json.loads(margo_agent.make_json(state))
    config = margo_agent.Settings(poll=margo_agent.Settings(interval=60, jitter=0.1))
    clock = margo_agent.Clock(1e9, "boot", 5.0)
    margo_agent.list_waits(copy, clock, *copy["deployments"].values())
    margo_agent.make_delay(config, copy, None, clock, 0.5)
    margo_agent.note_outcome(copy, margo_agent.Refused("x"))
    margo_agent.shorten_errors(copy)
    list(map(margo_agent.find_held_ports, copy["deployments"].values()))
    list(map(margo_agent.make_deployment_report, copy["deployments"].values()))
    margo_agent.find_needed(copy)
    for record in copy["deployments"].values():
        for digest in (record["adopted"]["digest"], "another"):
            for containers in (None, [], [margo_agent.Container("1", "c", UUID, "web", "main", "h", "running", "compose")]):
                margo_agent.find_action(margo_agent.Target(UUID, digest, 1), record, containers, clock, 10, "", False)
    return state


def judge_state(data, own):
    """Whether what was read cannot be written, or reads otherwise then."""
    again = margo_agent.parse_state(margo_agent.make_state_data(own), "x")
    return "" if again == own else "another state once it was written"


def read_listing(data):
    """What git prints of a tree, and the YAML files in it."""
    return margo_agent.parse_listing(data), margo_agent.find_blobs(data, 1 << 20)


def judge_listing(data, own):
    """Whether a name is not one that stands there."""
    names = {line.partition(b"\t")[2].decode("utf-8", "surrogateescape") for line in data.split(b"\0")}
    return "" if {item[0] for item in own[0]} <= names else "other names"


def read_text(parse):
    """A parser of texts as one of bytes, which a header or a file brings."""
    return lambda data: parse(data.decode("utf-8", "surrogateescape"))


def needed(parse):
    """A parser that refuses where another one finds nothing, which it says by None or an empty list."""
    def read(data):
        found = parse(data)
        if not found:
            raise ValueError("nothing in it")
        return found
    return read


def read_variables(data):
    """A text of a compose file and an env file with the same content."""
    text = data.decode("utf-8", "replace")
    variables = margo_agent.Variables({"A": "a", "EMPTY": ""})
    return margo_agent.interpolate(text, variables, "x")


def judge_variables(data, own):
    """Whether string.Template, which knows the short forms alone, puts something else in."""
    import string
    text = data.decode("utf-8", "replace")
    if re.search(r"\$\{(?![A-Za-z_]\w*\})", text, re.A) or not text.isascii():
        return ""
    names = collections.defaultdict(str, {"A": "a", "EMPTY": ""})
    other = string.Template(re.sub(r"\$\$|\$(?![A-Za-z_{])", "$$", text)).safe_substitute(names)
    return "" if own == other else f"{own!r} and not {other!r}"


def join_surrogates(match):
    """What JSON writes as two escapes, as YAML has it."""
    high, low = (int(text, 16) for text in match.groups())
    return "\\U%08x" % (0x10000 + ((high & 0x3FF) << 10) + (low & 0x3FF))


def ask_compose(texts, make):
    """[the environment that Docker Compose gives to the service of each text, or None where it refuses that one], many in one file.

    make: (folder, index, text) to the keys of its service.  Without Docker Compose nothing is judged, and the run ends with those words.
    """
    from tests import oracle, support
    support.require("docker-compose")
    answers = [None] * len(texts)
    left = set(range(len(texts)))
    with tempfile.TemporaryDirectory() as folder:
        while left:
            services = {f"s{index}": dict({"image": "x"}, **make(folder, index, texts[index])) for index in sorted(left)}
            text = re.sub(r"\\u(d[89ab]..)\\u(d[c-f]..)", join_surrogates, json.dumps({"services": services}))
            with open(os.path.join(folder, "compose.yaml"), "w") as file:
                file.write(text)
            try:
                found = oracle.end_config(oracle.start_config(folder, {"A": "a", "EMPTY": ""}, "fuzz"))["services"]
            except AssertionError as error:
                named = re.search(r"services\.s([0-9]+)\.|/([0-9]+)\.env", str(error))
                if not named:
                    raise
                left.remove(int(named.group(1) or named.group(2)))      # it complains about one at a time
                continue
            for index in left:
                answers[index] = {name: text for name, text in oracle.unescape(found[f"s{index}"].get("environment") or {}).items() if text is not None}
            break
    return answers


def judge_texts(found):
    """Those texts for which Docker Compose puts something else in; what it refuses is no text of its own."""
    answers = ask_compose([data.decode("utf-8", "replace") for data, _ in found], lambda folder, index, text: {"environment": {"T": text}})
    return [(data, f"{own!r} and not {answer['T']!r}") for (data, own), answer in zip(found, answers)
            if answer is not None and answer["T"] != own]


def make_env_service(folder, index, data):
    """The keys of a service with an env file of these bytes, which is written."""
    with open(os.path.join(folder, f"{index}.env"), "wb") as file:
        file.write(data)
    return {"env_file": [f"{index}.env"]}


def judge_env_files(found):
    """Those env files that give other variables in Docker Compose; it makes one without a name of what it does not understand."""
    answers = ask_compose([data for data, _ in found], make_env_service)
    return [(data, f"{own!r} and not {answer!r}") for (data, own), answer in zip(found, answers)
            if answer is not None and "" not in answer and answer != own]


class Local(socket.socket):
    """A socket that has no options of TCP."""

    def setsockopt(self, *_):
        pass


def read_answer(data):
    """An answer of HTTP by the agent's own request, on a pair of sockets whose other end has said it all."""
    ours, theirs = socket.socketpair()
    ours = Local(fileno=ours.detach())
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)
    theirs.setblocking(False)
    sent = theirs.send(data[:100000]) if data else 0
    theirs.shutdown(socket.SHUT_WR)
    ours.settimeout(2)
    with ours, theirs, mock.patch.object(margo_agent, "open_connection", lambda *_: ours):
        return data[:sent], margo_agent.request("GET", "http://wfm.example/x", {}, None, None, 2, 1 << 20)


def judge_http(data, found):
    """Whether the package h11, where it reads the answer, finds another status, body or header."""
    import h11
    data, own = found
    client = h11.Connection(h11.CLIENT)
    try:
        client.send(h11.Request(method="GET", target="/x", headers=[("Host", "wfm.example"), ("Connection", "close")]))
        client.send(h11.EndOfMessage())
        client.receive_data(data)
        client.receive_data(b"")
        head, body, event = None, b"", None
        while not isinstance(event, (h11.EndOfMessage, h11.ConnectionClosed)):
            event = client.next_event()
            head = event if isinstance(event, h11.Response) else head
            body += bytes(event.data) if isinstance(event, h11.Data) else b""
    except (h11.ProtocolError, RuntimeError):
        return ""                                   # it refuses, or does not go on after 101
    names = {name for name, _ in head.headers}
    theirs = head.status_code, own.body if head.status_code in (204, 304) else body         # which nobody looks at
    if (own.status, own.body) != theirs:
        return f"{own.status} with {own.body[:40]!r} and not {head.status_code} with {body[:40]!r}"
    for name in (b"etag", b"retry-after", b"location", b"content-type"):
        values = [value.decode("latin-1") for item, value in head.headers if item == name]
        mine = [value.strip(" \t") for value in own.headers.get_all(name.decode()) or ()] if name in names else values
        if mine != values and not any("\x80" <= letter or letter in "\x0b\x0c\x1c\x1d\x1e" for value in values + mine for letter in value):
            return f"{name.decode()} is {mine} and not {values}"
    return ""


def judge_challenge(data, own):
    """Whether werkzeug, where a header holds one challenge of plain form, reads other parameters."""
    from werkzeug.datastructures import WWWAuthenticate
    text = data.decode("utf-8", "surrogateescape")
    pair = r'[a-z]+="[a-zA-Z0-9:/.-]+"'
    if not re.fullmatch(rf"(Bearer|Basic) {pair}( *, *{pair})*", text):
        return ""                                   # several challenges, for which it has no grammar
    theirs = WWWAuthenticate.from_header(text)
    return "" if own == [(theirs.type, theirs.parameters)] else f"{own} and not {(theirs.type, theirs.parameters)}"


PROBLEM = {"type": "object", "properties": {"type": {"type": "string"}, "title": {"type": "string"}, "detail": {"type": "string"}}}


def judge_problem(data, own):
    """Whether what jsonschema takes for a problem of RFC 9457 says something else to json."""
    import jsonschema
    try:
        value = json.loads(data)
        jsonschema.validate(value, PROBLEM)
    except (ValueError, RecursionError, jsonschema.ValidationError):
        return "" if isinstance(data, bytes) and data.lstrip()[:1] == b"{" else "a problem that is no object"
    wait = value.get("retryAfterSeconds")
    wait = float(wait) if type(wait) in (int, float) and 0 <= wait < 1e20 else None
    title = value.get("title") or next((value[key] for key in ("error", "Error") if isinstance(value.get(key), str) and value[key]), "")
    return "" if (own.title, own.retry_after) == (margo_agent.make_printable(title), wait) else f"{own} and not {value}"


ANSWERS = [b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nETag: \"a\"\r\n\r\nabc", b"HTTP/1.1 304 Not Modified\r\n\r\n",
           b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\nHTTP/1.1 429 X\r\nRetry-After: 5\r\nContent-Length: 0\r\n\r\n",
           b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", b"HTTP/1.0 301 X\r\nLocation: http://x/\r\n\r\n"]
HTTP_TOKENS = [b"\r\n", b"Content-Length: ", b"Transfer-Encoding: chunked\r\n", b"Content-Encoding: gzip\r\n", b"Location: ", b"Retry-After: ", b"HTTP/1.1 ",
               b"-1", b"ffffffff\r\n", b": ", b"\r", b" ", b"100 Continue\r\n\r\n"]
GIT_LISTING = (b"100644 blob " + b"a" * 40 + b"      12\tapp.yaml\0" + b"120000 blob " + b"b" * 40 + b"       5\tlink.yaml\0" +
               b"160000 commit " + b"c" * 40 + b"       -\tsub/module.yml\0")
CHALLENGES = [b'Bearer realm="https://a/token",service="r",scope="repository:x:pull"', b'Basic realm="x", Bearer realm=y', b"Negotiate"]
PROBLEMS = [b'{"type": "https://docs.margo.org/specification/x#invalid-request", "title": "t", "retryAfterSeconds": 5, "errors": [{"field": "a"}]}']
add("yaml", make_yamls, margo_agent.load_yaml, judge_yaml, tokens=YAML_TOKENS)
add("manifest", make_manifests, lambda data: margo_agent.parse_manifest(data, BASE), judge_manifest, tokens=MEMBERS, mutate=mutate_json)
add("deployment", make_deployments, read_deployment, judge_deployment, tokens=MEMBERS, mutate=mutate_json)
add("oci-manifest", make_oci_manifests, lambda data: margo_agent.parse_package_manifest(data, "x", 1 << 20), judge_oci_manifest, tokens=MEMBERS,
    mutate=mutate_json)
add("challenge", lambda: CHALLENGES, needed(read_text(margo_agent.parse_challenge)), judge_challenge, IDENTITY,
    tokens=[b"Bearer ", b"realm=", b'"', b",", b"=", b" "])
add("retry-after", lambda: [b"120", b"Fri, 27 Nov 2026 10:00:00 GMT", b"Friday, 27-Nov-26 10:00:00 GMT"],
    needed(read_text(lambda text: margo_agent.parse_retry_after(text, 1e9))),
    lambda data, own: "" if own is None or 0 <= own <= 86400 else f"{own} seconds", IDENTITY, [b"GMT", b"+9999", b"Nov", b"9" * 30])
add("problem", lambda: PROBLEMS, needed(margo_agent.parse_problem), judge_problem, IDENTITY, mutate=mutate_json)
add("package", make_archives, read_archive, judge_archive, mutate=mutate_archive,
    tokens=[b"../", b"/", b"\0", b"0000777\0", b"0004755\0", b"\x80" + b"\0" * 11, b"\xff" * 12, b"1", b"2", b"3", b"x", b"L", b"ustar\x0000", b"9 path=x\n"])
add("gzip", make_gzips, read_gzip, judge_gzip, IDENTITY)
add("state", make_states, read_state, judge_state, IDENTITY, [b'"schema"', b'"outbox"', b'"deployments"', b',"sum":"'],
    mutate_json)
add("git-listing", lambda: [GIT_LISTING], read_listing, judge_listing, tokens=[b"\0", b"\t", b"100644 ", b"040000 tree ", b" - "])
add("env-file", lambda: [b"A=1\nB=\"x\\n${A:-y}\"\nexport C='d'\nD: $A # c\n"],
    lambda data: margo_agent.parse_env_file(data.decode("utf-8"), margo_agent.Variables({"A": "a"}), "x"),
    refusals=REFUSALS + (UnicodeDecodeError,), mutate=mutate_words, judge_all=judge_env_files,
    tokens=[b"${", b"}", b"$", b"=", b":", b"'", b'"', b"\\", b"#", b"\n", b"\n", b"export ", b"B", b"A", b"C=", b"D='", b"E=\"", b" ", b"\\n",
            b"x", b" #", b"$A", b"${A", b":-", b"-", b"\r\n", b"\t", b"\n\n", b".", b"1", b"\\'", b'\\"', b"\\$", b"\\\\"])
add("interpolation", lambda: [b"a $A ${A} ${B:-c} ${C-$A} $$ ${D:+e} ${EMPTY:-${A}}"], read_variables, judge_variables, mutate=mutate_words,
    judge_all=judge_texts, tokens=[b"${", b"}", b"}", b"$", b"$$", b":-", b":?", b":+", b"-", b"?", b"+", b"A", b"B", b"EMPTY", b"{", b"${A", b"${B:-",
                                   b"${A:+", b"${B-", b" ", b'"', b"'", b":", b"x", b"\\", b"\n", b"1", b"_", b"\xc3\xa9"])
add("http-answer", lambda: ANSWERS, read_answer, judge_http, tokens=HTTP_TOKENS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
