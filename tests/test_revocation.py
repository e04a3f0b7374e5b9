"""Revocation: lists of the draft, and pins of Identity and trust, against examples/mis.py and examples/wfm.py."""
import datetime
import base64
import hashlib
import os
import shutil
import ssl
import subprocess
import sys
import time
import tracemalloc
import unittest
from unittest import mock

import margo_agent
from margo_agent import Untrusted
from tests import support
from tests.support import CLIENT_ID
from tests.test_enrollment import Site, read


def make_list(pki, issuer, *revoked):
    """A revocation list in PEM by a CA of the folder, made by openssl; one that revokes something is newer."""
    folder = os.path.join(pki.folder, f"list-{len(revoked)}")
    os.makedirs(folder)
    support.write(os.path.join(folder, "index.txt"), "")
    support.write(os.path.join(folder, "crlnumber"), f"{0x10 + len(revoked):X}")
    support.write(os.path.join(folder, "crl.cnf"), f"[ca]\ndefault_ca = x\n[x]\ndatabase = {folder}/index.txt\ncrlnumber = {folder}/crlnumber\n"
                  "default_md = sha256\ndefault_crl_days = 3\ncrl_extensions = e\n[e]\nauthorityKeyIdentifier = keyid\n")
    common = ("ca", "-config", os.path.join(folder, "crl.cnf"), "-keyfile", f"{issuer}.key", "-cert", f"{issuer}.pem")
    for name in revoked:
        pki.run(*common, "-revoke", f"{name}.pem")
    pki.run(*common, "-gencrl", "-out", os.path.join(folder, "list.pem"))
    return read(os.path.join(folder, "list.pem")).decode()


class RevocationCase(Site):
    """A device with an SVID by the issuing CA; the WFM's is by the anchor."""

    def setUp(self):
        super().setUp()
        self.device.cycle()
        self.wfm_leaf = margo_agent.parse_certificate(self.pki.der("wfm.pem"))
        self.start = len(self.mis.issued()), len(self.mis.requests()), len(self.wfm.requests())

    def let_due(self):
        """Makes every list due again, and the discovery document too."""
        state = self.device.state()
        for record in state["crls"].values():
            record["delay"] = 0
        state["patience"], state["trust"]["refreshedAt"] = {}, 0
        support.write(os.path.join(self.device.state_dir, "state.json"), margo_agent.make_json(state))
        for name in os.listdir(os.path.join(self.device.folder, "run")):
            os.remove(os.path.join(self.device.folder, "run", name))

    def cycle_due(self, expected=0):
        """A cycle in which everything is due."""
        self.let_due()
        return self.device.cycle(expected)

    def list_files(self):
        """{path: time of its last change} of the state directory and of the own identity."""
        return {os.path.join(folder, name): os.stat(os.path.join(folder, name)).st_mtime_ns for top in ("state", "identity")
                for folder, _, names in os.walk(os.path.join(self.device.folder, top)) for name in names if name != "lock"}

    def held(self):
        """{name of the list: (number, digest)} as the state has it."""
        return {url.split("/")[-1]: (record.get("number"), record.get("digest")) for url, record in self.device.state()["crls"].items()}


class Lists(RevocationCase):
    def test_every_list_is_fetched_after_the_poll_and_kept(self):
        """E-080, E-081, E-084: told as a draft, once; the status of the WFM is known from then on."""
        self.assertEqual(self.device.state()["drafts"], ["enrollment over EST", "revocation lists"])
        self.assertEqual(set(self.held()), {"anchor.crl", "issuing.crl"})
        self.assertTrue(all(digest for _, digest in self.held().values()), self.held())
        self.device.cycle()
        before = self.list_files()
        self.assertNotIn("status", self.device.cycle())
        self.assertEqual(self.asked(), [])
        self.assertEqual(self.list_files(), before)             # P-16: nothing is written where nothing is new

    def test_a_due_list_is_asked_for_conditionally(self):
        """E-082: 304 keeps what is held."""
        before = self.held()
        self.cycle_due()
        self.assertEqual(self.asked("anchor.crl", "issuing.crl"), [("anchor.crl", 304), ("issuing.crl", 304)])
        self.assertEqual(self.held(), before)

    def test_a_list_that_the_disk_lost_is_fetched_whole(self):
        """E-082, E-086: unchanged at the service is no reason to go on without it."""
        folder = os.path.join(self.device.state_dir, "crls")
        before = self.list_files()
        self.assertEqual(len(os.listdir(folder)), 2)
        for name in os.listdir(folder):
            os.remove(os.path.join(folder, name))
        self.cycle_due()
        self.assertEqual(self.asked("anchor.crl", "issuing.crl"), [("anchor.crl", 200), ("issuing.crl", 200)])
        self.assertEqual(sorted(self.list_files()), sorted(before))

    def test_a_revoked_wfm_gets_no_request(self):
        """E-083, C-013: refused before a request, exit code 5, also by a list that has ended."""
        self.mis.revoke("anchor", self.wfm_leaf.serial)
        self.mis.misissue(crl={"validity": 2})
        self.cycle_due()                            # this poll was before the list came
        before = len(self.wfm.requests())
        self.assertIn("the peer's certificate is revoked", self.device.cycle(5))
        time.sleep(2.1)
        self.mis.fault({"path": "/crl/*", "status": 503, "body": ""})
        self.assertIn("the peer's certificate is revoked", self.device.cycle(5))
        self.assertEqual(len(self.wfm.requests()), before)
        self.assertEqual(self.device.status()["lastPoll"]["result"], "untrusted")
        self.mis.fault()
        self.mis.revoke("anchor")
        self.mis.misissue()
        self.cycle_due(5)
        self.device.cycle(0)                        # taken back

    def test_a_renewed_svid_is_proven_to_no_revoked_wfm(self):
        """E-083, E-060: the connection that proves it is one to a peer, too."""
        self.mis.revoke("anchor", self.wfm_leaf.serial)
        self.cycle_due()
        before, old = len(self.wfm.requests()), self.leaf()
        time.sleep(1.1)                             # times in certificates are whole seconds, and the new one has to end later
        state = self.device.state()
        state["trust"]["strays"] = support.digest(old.der)
        support.write(os.path.join(self.device.state_dir, "state.json"), margo_agent.make_json(state))
        self.let_retry()
        log = self.device.cycle(5)
        self.assertRegex(log, "is not renewed yet: the peer's certificate is revoked")
        self.assertEqual((len(self.wfm.requests()), self.leaf()), (before, old))

    def test_a_list_by_another_issuer_at_the_same_address_displaces_none(self):
        """E-085, E-086: what counts is who signed it, not where it lay; who can change an http answer cannot unrevoke."""
        self.mis.revoke("anchor", self.wfm_leaf.serial)
        self.cycle_due()
        other = margo_agent.fetch_from_mis(self.mis.url + "/crl/issuing.crl", margo_agent.load_config(self.device.config_file), {"Accept": "*/*"})
        data = margo_agent.make_base64(other.body)
        pem = f"-----BEGIN X509 CRL-----\n{data}\n-----END X509 CRL-----\n"
        self.mis.fault({"path": "/crl/anchor.crl", "status": 200, "body": pem})
        self.cycle_due(5)
        self.assertIn("the peer's certificate is revoked", self.device.cycle(5))
        self.assertEqual(len(self.held()), 3)

    def test_the_issuer_of_a_list_may_be_known_by_the_wfm_alone(self):
        """E-081, E-084: the WFM's is an intermediate CA that only its chain shows; by `require` that chain is seen before anything is said."""
        name, odd = "/crl/anchor.crl", [support.WFM_ID]
        self.pki.issue("line-ca", ca=True, usage="keyCertSign, cRLSign", extra="subjectKeyIdentifier = hash")
        self.pki.issue("below", odd, signer="line-ca")
        pair = read(self.pki.path("wfm.pem")), read(self.pki.path("wfm.key"))
        self.addCleanup(lambda: [support.write(self.pki.path(f"wfm.{end}"), data) for end, data in zip(("pem", "key"), pair)])
        support.write(self.pki.path("wfm.pem"), read(self.pki.path("below.pem")) + read(self.pki.path("line-ca.pem")))
        support.write(self.pki.path("wfm.key"), read(self.pki.path("below.key")))
        self.mis.fault({"path": name, "status": 200, "body": make_list(self.pki, "line-ca")})
        for mode in ("soft", "require"):
            device = self.make_device()
            device.set("identity.revocation", mode)
            with self.subTest(mode):
                device.cycle()
                self.assertNotIn("revocation", device.cycle())
        self.mis.fault({"path": name, "status": 200, "body": make_list(self.pki, "line-ca", "below")})
        self.device = device
        self.cycle_due(5)
        before = len(self.wfm.requests())
        self.assertIn("the peer's certificate is revoked", device.cycle(5))
        self.assertEqual(len(self.wfm.requests()), before)

    def test_a_list_that_ended_is_logged_and_refuses_nothing(self):
        """E-087, E-088: soft; by `require` it does, and only by that."""
        self.mis.misissue(crl={"age": 100, "validity": 50})
        log = self.cycle_due()
        self.assertNotIn("ended", log)
        self.mis.fault({"path": "/crl/*", "status": 404, "body": ""})
        self.assertIn("the revocation list ended at", self.device.cycle())
        self.assertRegex(self.device.status()["identity"]["warning"], r"^the revocation list https\S+/crl/\w+\.crl ended at 20")
        self.assertRegex(self.device.run("doctor").stdout, r"warn +lists .*\.crl ended at 20")
        self.device.set("identity.revocation", "require")
        self.assertIn("identity.revocation is require: the revocation list ended", self.device.cycle(5))
        self.device.set("identity.revocation", "off")
        before = len(self.mis.requests())
        self.assertNotIn("list", self.device.cycle())
        self.assertEqual(len(self.mis.requests()), before)

    def test_what_may_not_be_applied_replaces_nothing(self):
        """E-084, E-085, E-086: unsigned, by a stranger, of another issuer, without number, delta, indirect, unknown, older, huge, garbage."""
        self.cycle_due()
        before = self.held()
        for odd, fault, words in (
                ({"unsigned": True}, {}, "has signed it"), ({"stranger": True}, {}, "has signed it"), ({"other": True}, {}, "has signed it"),
                ({"number": None}, {}, "no revocation list with a CRL number"), ({"delta": True}, {}, "a kind that is not understood"),
                ({"indirect": True}, {}, "a kind that is not understood"), ({"critical": True}, {}, "a kind that is not understood"),
                ({"number": 0}, {}, "security: its number went back from"), ({"age": -4000}, {}, "is the clock of this device right?"),
                ({}, {"body": "<html>"}, "no revocation list"), ({}, {"body": ""}, "no revocation list"), ({}, {"status": 307, "body": ""}, "HTTP 307"),
                ({}, {"body": "x" * 9000000}, "longer than")):
            self.mis.misissue(crl=odd)
            self.mis.fault(*([dict(fault, path="/crl/*")] if fault else []))
            with self.subTest(words):
                self.assertIn(words, self.cycle_due())
                self.assertEqual(self.held(), before)
        self.assertNotIn("status", self.device.cycle())

    def test_a_long_list_costs_little(self):
        """E-083: 40,000 entries, one of them ours."""
        self.mis.revoke("anchor", self.wfm_leaf.serial)
        self.mis.misissue(crl={"padding": 40000})
        self.cycle_due()
        self.assertIn("is revoked", self.device.cycle(5))

    def test_the_own_svid_on_a_list_is_reported(self):
        """E-066: in log and status; it renews nothing."""
        self.mis.revoke("issuing", self.leaf().serial)
        self.cycle_due()
        self.assertIn("the own SVID is revoked", self.device.cycle(5))
        self.assertIn("revoked", self.device.status()["identity"]["warning"])
        self.assertEqual(self.asked("simplereenroll"), [])

    def test_lists_that_vanish_from_discovery_count_until_they_end(self):
        """E-091: told at once; `require` is not weakened by that; a failed refresh is no removal."""
        self.mis.fault({"path": "/.well-known/margo", "status": 503, "body": ""})
        self.assertNotIn("any more", self.cycle_due())
        self.mis.fault()
        self.mis.misissue(discovery={"crlUris": None}, crl={"validity": 2})
        self.assertIn("names no revocation lists any more", self.cycle_due())
        self.assertEqual(len(self.held()), 2)
        state = self.device.state()
        for record in state["crls"].values():
            record["validity"] = 0
        support.write(os.path.join(self.device.state_dir, "state.json"), margo_agent.make_json(state))
        self.device.cycle()
        self.assertEqual((self.held(), os.listdir(os.path.join(self.device.state_dir, "crls"))), ({}, []))
        self.device.set("identity.revocation", "require")
        self.assertIn("names no revocation list", self.device.cycle(5))

    def test_what_is_no_address_of_a_list_is_told_and_others_count(self):
        """E-080, E-081: one that nobody can ask for costs nothing but a warning."""
        good = f"{self.mis.url}/crl/anchor.crl"
        self.mis.misissue(discovery={"crlUris": [7, "ftp://x/y", "file:///etc/passwd", "http://user@host/x", good]})
        self.cycle_due()
        log = self.cycle_due()
        for url in ("7", "ftp://x/y", "file:///etc/passwd", "http://user@host/x"):
            self.assertRegex(log, rf"cannot be had.* url={url} reason=.*no http or https URL")
        self.assertIn(("anchor.crl", 304), self.asked("anchor.crl"))
        self.assertRegex(self.device.status()["identity"]["warning"], "revocation list 7 could not be had yet")

    def test_discovery_is_asked_as_often_as_the_shortest_list_lives(self):
        """E-090: though the bundle itself would be good for an hour."""
        self.mis.misissue(crl={"validity": 2})
        self.cycle_due()
        time.sleep(2.1)
        before = len(self.asked())
        self.device.cycle()
        self.assertIn(("margo", 200), self.asked()[before:])

    def test_a_switch_that_is_new_needs_no_wait(self):
        """E-080: what discovery said of it before was not kept; it is asked at once."""
        self.device.set("identity.revocation", "off")
        device = self.make_device()
        device.settings["identity"].update(enrollment="off", est={}, revocation="off", certificate=self.device.certificate, key=self.device.key)
        device.save()
        device.cycle()
        self.assertNotIn("crls", device.state()["trust"])
        device.set("identity.revocation", "require")
        device.cycle()

    def test_require_gets_its_lists_before_it_connects(self):
        """E-087: one that has nothing at hand fetches first, and where that fails says nothing to the WFM."""
        device = self.make_device()
        device.set("identity.revocation", "require")
        self.mis.fault({"path": "/crl/*", "status": 503, "body": ""})
        before = len(self.wfm.requests())
        self.assertIn("could not be had yet", device.cycle(5))
        self.assertIn("could not be had yet", device.status()["identity"]["warning"])
        self.assertEqual(len(self.wfm.requests()), before)
        self.mis.fault()
        other = self.make_device()
        other.set("identity.revocation", "require")
        other.cycle()

    def test_a_lost_cache_is_a_security_event(self):
        for name in os.listdir(os.path.join(self.device.state_dir, "crls")):
            support.write(os.path.join(self.device.state_dir, "crls", name), b"spoilt")
        self.assertIn("security: a revocation list at hand is lost", self.device.cycle())

    def test_a_folder_that_cannot_be_made_is_a_fault_of_storage(self):
        folder = os.path.join(self.device.state_dir, "crls")
        shutil.rmtree(folder)
        support.write(folder, "in its place")
        self.assertIn(f"{folder} failed", self.cycle_due(3))

    def test_nothing_in_a_certificate_leads_to_a_list(self):
        """E-089, C-008: distribution points are not followed."""
        extra = f"crlDistributionPoints = URI:{self.mis.url}/crl/never.crl\nauthorityInfoAccess = caIssuers;URI:{self.mis.url}/never"
        self.pki.issue("pointing", [support.WFM_ID], extra=extra)
        pair = read(self.pki.path("wfm.pem")), read(self.pki.path("wfm.key"))
        self.addCleanup(lambda: [support.write(self.pki.path(f"wfm.{end}"), data) for end, data in zip(("pem", "key"), pair)])
        for end in ("pem", "key"):
            support.write(self.pki.path(f"wfm.{end}"), read(self.pki.path(f"pointing.{end}")))
        self.device.cycle()
        self.assertEqual(self.asked(), [])


class Reading(unittest.TestCase):
    """The pure part, beside the cryptography library."""

    def test_lists_are_read_as_the_cryptography_library_reads_them(self):
        """E-085: numbers, times, entries, issuer, also in PEM; one cut anywhere is refused."""
        support.require("openssl", "cryptography")
        from cryptography import x509
        pki = support.Pki(self)
        pki.issue("one", [CLIENT_ID])
        support.write(pki.path("index.txt"), "")
        support.write(pki.path("crlnumber"), "1F")
        support.write(pki.path("crl.cnf"), "[ca]\ndefault_ca = x\n[x]\ndatabase = index.txt\ncrlnumber = crlnumber\ndefault_md = sha256\n"
                      "default_crl_days = 3\ncrl_extensions = e\n[e]\nauthorityKeyIdentifier = keyid\n")
        common = ("ca", "-config", "crl.cnf", "-keyfile", "ca.key", "-cert", "ca.pem")
        pki.run(*common, "-revoke", "one.pem")
        pki.run(*common, "-gencrl", "-out", "list.pem")
        der, crl = margo_agent.parse_crl(read(pki.path("list.pem")))
        other = x509.load_pem_x509_crl(read(pki.path("list.pem")))
        self.assertEqual((crl.number, crl.issuer), (0x1F, other.issuer.public_bytes()))
        times = [getattr(other, f"{name}_utc", None) or getattr(other, name).replace(tzinfo=datetime.timezone.utc)
                 for name in ("last_update", "next_update")]          # older releases of the library have no …_utc
        self.assertEqual((crl.this_update, crl.next_update), tuple(moment.timestamp() for moment in times))
        self.assertEqual({entry.serial_number for entry in other}, crl.serials)
        leaf = margo_agent.parse_certificate(pki.der("one.pem"))
        self.assertEqual((crl.serials, margo_agent.is_revoked(leaf, [crl])), ({leaf.serial}, True))
        self.assertFalse(margo_agent.is_revoked(leaf._replace(serial=leaf.serial + 1), [crl]))
        self.assertFalse(margo_agent.is_revoked(leaf._replace(issuer_key=b"another"), [crl]))
        self.assertEqual(margo_agent.parse_crl(der)[1], crl)
        for size in range(0, len(der) - 1, 7):
            with self.assertRaises(ValueError):
                margo_agent.parse_crl(der[:size])

    def test_what_is_no_list_costs_little_memory(self):
        """Case 4.18: 8 MiB of tiny elements where a list has ten fields, by whoever stands on the path of an http address."""
        head = [margo_agent.make_der(2, b"\1"), margo_agent.make_der(0x30), margo_agent.make_der(0x30)] + [margo_agent.make_der(0x17, b"260101000000Z")] * 2
        fields = b"".join(head) + b"\x05\0" * (4 * 1024 * 1024)
        data = margo_agent.make_der(0x30, margo_agent.make_der(0x30, fields))
        del fields
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        with self.assertRaises(ValueError):
            margo_agent.parse_crl(data)
        self.assertLess(tracemalloc.get_traced_memory()[1], 4 * len(data))

    def test_an_entry_that_cannot_be_read_spoils_the_list(self):
        """E-085: before it is stored, and not when somebody is looked up in it."""
        name, start = margo_agent.make_der(0x30), margo_agent.make_der(0x17, b"260101000000Z")
        number = margo_agent.make_der(0x30, margo_agent.make_der(6, margo_agent.OID_CRL_NUMBER), margo_agent.make_der(4, b"\2\1\1"))
        for entry, good in ((margo_agent.make_der(0x30, b"\2\1\5", start), True), (margo_agent.make_der(0x30), False), (b"\x30\x05\x02", False),
                            (margo_agent.make_der(0x30, b"\x02\x7f"), False)):
            fields = (b"\2\1\1", name, name, start, start, margo_agent.make_der(0x30, entry), margo_agent.make_der(0xA0, margo_agent.make_der(0x30, number)))
            data = margo_agent.make_der(0x30, margo_agent.make_der(0x30, *fields), name)
            with self.subTest(entry):
                if good:
                    self.assertEqual(margo_agent.parse_crl(data)[1].serials, {5})
                else:
                    self.assertRaises(ValueError, margo_agent.parse_crl, data)

    def test_a_number_has_twenty_octets_at_most(self):
        """E-085: RFC 5280, 5.2.3; one of thousands of digits would be a state that nobody can read."""
        make = margo_agent.make_der
        name, start = make(0x30), make(0x17, b"260101000000Z")
        for size, good in ((20, True), (22, False), (3000, False)):
            number = make(0x30, make(6, margo_agent.OID_CRL_NUMBER), make(4, make(2, b"\1" * size)))
            fields = (b"\2\1\1", name, name, start, start, make(0xA0, make(0x30, number)))
            data = make(0x30, make(0x30, *fields), name)
            if good:
                self.assertEqual(margo_agent.parse_crl(data)[1].number, int.from_bytes(b"\1" * size, "big"))
            else:
                self.assertRaisesRegex(ValueError, "more than 20 octets", margo_agent.parse_crl, data)

    def test_der_is_written_as_it_is_read(self):
        for size in (0, 1, 127, 128, 255, 256, 65535, 65536):
            data = margo_agent.make_der(0x04, b"x" * size)
            self.assertEqual(margo_agent.parse_der(data), [(0x04, b"x" * size, data)])


class Pins(Site):
    """identity.pins beside and instead of identity.ca."""

    def pin(self, name):
        """The pin of a certificate, made by openssl and hashlib."""
        key = subprocess.run(["openssl", "x509", "-in", self.pki.path(name), "-noout", "-pubkey"], stdout=subprocess.PIPE, check=True).stdout
        der = subprocess.run(["openssl", "pkey", "-pubin", "-outform", "DER"], input=key, stdout=subprocess.PIPE, check=True).stdout
        return base64.b64encode(hashlib.sha256(der).digest()).decode()

    def trust(self, pins, ca=None, url=None):
        """Whether the identity service is trusted so: an error, or ""."""
        identity = self.device.settings["identity"]
        identity.update(pins=pins, ca=ca, discovery=(url or self.mis.url) + "/.well-known/margo")
        self.device.save()
        config = margo_agent.load_config(self.device.config_file)
        with mock.patch.dict(os.environ, self.device.env):
            try:
                margo_agent.fetch_discovery(config, None, time.time())
            except (Untrusted, margo_agent.Unreachable) as error:
                return error.message
        return ""

    def test_a_pin_is_the_digest_of_a_public_key(self):
        """E-006: as RFC 7469 has it; the reader takes nothing else."""
        self.assertEqual(margo_agent.make_pin(self.pki.der("site.pem")), self.pin("site.pem"))
        self.assertEqual(margo_agent.make_pin(b"junk"), "")
        for value in ("x", ["x"], [7], [self.pin("site.pem")[:-1]], [self.pin("site.pem")[:-2] + "B="], ["sha256//" + self.pin("site.pem")]):
            with self.assertRaises(ValueError):
                margo_agent.read_pins(value, "")

    def test_any_certificate_of_the_chain_may_be_pinned(self):
        """C-030, E-005, E-016: the leaf, or the CA where it is presented; one of several pins will do; another key never."""
        other = self.pin("ca.pem")
        self.assertEqual(self.trust([other, self.pin("site.pem")]), "")
        self.assertIn("no certificate whose key is in identity.pins", self.trust([other]))
        self.assertIn("no certificate whose key is in identity.pins", self.trust([self.pin("site-ca.pem")]))      # not presented, so not known
        chain = read(self.pki.path("site.pem"))
        self.addCleanup(support.write, self.pki.path("site.pem"), chain)
        support.write(self.pki.path("site.pem"), chain + read(self.pki.path("site-ca.pem")))
        self.assertEqual(self.trust([self.pin("site-ca.pem")]), "")

    def test_a_presented_certificate_that_signed_nothing_helps_nobody(self):
        """C-031: who shows the pinned certificate without its key beneath his own leaf is refused."""
        pki = support.Pki(self)
        pki.issue("evil-ca", ca=True, usage="keyCertSign", signer=None)
        pki.issue("evil", signer="evil-ca", extra="subjectAltName = DNS:localhost")
        support.write(pki.path("site.pem"), read(pki.path("evil.pem")) + read(self.pki.path("site-ca.pem")) + read(self.pki.path("site.pem")))
        support.write(pki.path("site.key"), read(pki.path("evil.key")))
        mis = support.Mis(self, pki)
        self.assertIn("certificate is refused", self.trust([self.pin("site-ca.pem"), self.pin("site.pem")], url=mis.url))
        self.assertEqual(mis.requests(), [])

    def test_beside_anchors_both_have_to_hold(self):
        """E-005: pins narrow what identity.ca allows, also one that only identity.ca knows."""
        ca = self.pki.path("site-ca.pem")
        self.assertEqual(self.trust([self.pin("site.pem")], ca), "")
        self.assertEqual(self.trust([self.pin("site-ca.pem")], ca), "")
        self.assertIn("identity.pins", self.trust([self.pin("ca.pem")], ca))
        self.assertIn("certificate is refused", self.trust([self.pin("site.pem")], self.pki.path("ca.pem")))
        self.trust([self.pin("site.pem")], ca)
        _, check_peer = margo_agent.obtain_mis_context(margo_agent.load_config(self.device.config_file), self.mis.url)
        check_peer([self.pki.der("site.pem")])
        with self.assertRaises(Untrusted):          # another one of the same CA, met only on the second connection
            check_peer([self.pki.der("site-ca.pem")])

    def test_the_name_counts_where_there_is_one(self):
        """E-016, C-032: by an address a pin is enough."""
        pki = support.Pki(self)
        pki.issue("site", signer="site-ca", extra="subjectAltName = DNS:elsewhere.example")
        mis = support.Mis(self, pki)
        pin = margo_agent.make_pin(pki.der("site.pem"))
        self.assertIn("certificate is refused", self.trust([pin], url=mis.url))
        address = support.Mis(self, pki, "--listen", "127.0.0.1:0")
        url = address.url.replace("localhost", "127.0.0.1")
        self.assertEqual(self.trust([pin], url=url), "")

    def test_an_expired_service_is_refused_though_it_is_pinned(self):
        """C-007."""
        pki = support.Pki(self)
        pki.issue("site", signer="site-ca", start="-2d", end="-1d", extra="subjectAltName = DNS:localhost")
        mis = support.Mis(self, pki)
        self.assertIn("certificate is refused", self.trust([margo_agent.make_pin(pki.der("site.pem"))], url=mis.url))

    def test_enrollment_works_by_pins_alone(self):
        self.trust([self.pin("site.pem")])
        self.device.cycle()
        self.assertEqual(self.leaf().uris, [CLIENT_ID])

    def test_the_chain_is_seen_whole_where_python_shows_it(self):
        """From Python 3.10; before, the leaf alone."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        support.write(self.pki.path("site.pem"), read(os.path.join(support.make_pki(), "site.pem")) + read(self.pki.path("site-ca.pem")))
        self.addCleanup(support.write, self.pki.path("site.pem"), read(os.path.join(support.make_pki(), "site.pem")))
        seen = []

        def look(chain):
            seen.extend(chain)
            raise margo_agent.Silence("seen")
        with self.assertRaises(margo_agent.Silence):
            margo_agent.request("GET", self.mis.url, {}, None, context, 10, 0, look)
        self.assertEqual(len(seen), 2 if sys.version_info >= (3, 10) else 1)
        self.assertEqual(margo_agent.fetch_chain(self.mis.url, context, 10), seen)
        shown = margo_agent.ask_chain(self.mis.url, context, 10)
        self.assertEqual((shown[:len(seen)], len(set(shown))), (seen, 2))


if __name__ == "__main__":
    unittest.main()
