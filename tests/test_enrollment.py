"""Enrollment: SVIDs obtained and renewed over the draft's EST, against examples/mis.py and examples/wfm.py."""
import base64
import os
import re
import shutil
import stat
import subprocess
import time
import unittest
from unittest import mock

import margo_agent
from margo_agent import Untrusted
from tests import support
from tests.support import CLIENT_ID, WFM_ID

TOKEN = "line-4:s3cr:et"
DAY = 86400


def read(path):
    """The bytes of a file, None where there is none."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None


class Site(support.SharedCase):
    """A device without an SVID, an identity service and a WFM, shared by the tests of a class; each test has a token of its own."""

    options = ("--lifetime", "3600")

    @classmethod
    def start_services(cls):
        cls.mis = support.Mis(cls.shared, cls.pki, *cls.options)
        cls.wfm = support.Wfm(cls.shared, cls.pki)

    def setUp(self):
        for name in ("faults.json", "misissue.json", "revoked.json", "tokens.json", "used.json"):
            if os.path.exists(self.mis.path(name)):
                os.remove(self.mis.path(name))
        self.wfm.fault()
        self.device = self.make_device(TOKEN)
        self.start = len(self.mis.issued()), len(self.mis.requests()), len(self.wfm.requests())

    def make_device(self, token=None):
        """A device with a token, by default one of its own, that has enrolled nowhere yet."""
        type(self).count = getattr(type(self), "count", 0) + 1
        token = token or f"cell-{self.count}:s3cr:et"
        self.mis.add_token(token)
        device = support.Device(self, self.pki, url=self.wfm.url, settings={"runtime.compose": "off"})
        folder = os.path.join(device.folder, "identity")
        device.token = support.write(os.path.join(folder, "token"), token + "\n", 0o600)
        device.certificate, device.key = os.path.join(folder, "client.pem"), os.path.join(folder, "client.key")
        device.settings["identity"] = {
            "certificate": device.certificate, "key": device.key, "discovery": self.mis.url + "/.well-known/margo", "ca": self.pki.path("site-ca.pem"),
            "enrollment": "est", "est": {"token_file": device.token}}
        device.save()
        return device

    def issued(self):
        """What was issued in this test."""
        return self.mis.issued()[self.start[0]:]

    def asked(self, *names):
        """[(last part of the path, status)] of requests to the identity service in this test."""
        return [(name, status) for _, name, status in self.mis.requests()[self.start[1]:] if not names or name in names]

    def leaf(self, device=None):
        """The device's leaf."""
        return margo_agent.parse_certificate(margo_agent.parse_pem(read((device or self.device).certificate))[0])

    def outlive(self):
        """Waits for the end of the device's SVID."""
        time.sleep(max(0, self.leaf().not_after - time.time()) + 0.1)

    def age(self, share=0.7, lifetime=3600, device=None, **members):
        """Replaces the device's SVID by one of the same names and issuer of which a share of the lifetime is over, as the service knows it."""
        device = device or self.device
        start = -int(share * lifetime)
        self.mis.misissue(start=start, end=start + lifetime, **members)
        try:
            done = device.run("enroll")
            if done.returncode:
                raise AssertionError(done.stderr)
        finally:
            self.mis.misissue()
        return self.leaf(device)


    def let_retry(self, **est):
        """Lets the back-off pass, and changes what the state knows of enrollment."""
        state = self.device.state()
        state["est"].update(est, delay=0)
        state["patience"] = {}
        support.write(os.path.join(self.device.state_dir, "state.json"), margo_agent.make_json(state))


class Enrollment(Site):
    def test_a_token_becomes_an_svid_by_itself(self):
        """E-002, E-007, E-030, E-033, E-034, E-039, E-043, E-044: `run --once` does it when there is none; the token goes, the key stays here."""
        log = self.device.cycle()
        self.assertIn("draft", log)
        self.assertNotIn("s3cr", log)
        self.assertEqual(self.leaf().uris, [CLIENT_ID])
        self.assertEqual(self.asked("simpleenroll", "cacerts"), [("simpleenroll", 200), ("cacerts", 200)])
        self.assertEqual(read(self.device.token), None)
        self.assertEqual(stat.S_IMODE(os.stat(self.device.key).st_mode), 0o600)
        self.assertEqual([item["how"] for item in self.issued()], ["token"])
        chain = margo_agent.parse_pem(read(self.device.certificate))
        self.assertEqual(len(chain), 2)
        self.assertNotIn("draft", self.device.cycle())
        self.assertEqual(self.device.status()["identity"]["id"], CLIENT_ID)
        self.assertEqual([name for name in os.listdir(self.device.state_dir) if name.startswith("issued")], [])


    def test_enroll_does_it_too_and_is_safe_to_repeat(self):
        """E-032: the endpoint may be given directly; a token file without line end is a token as well."""
        self.device.set("identity.est", {"token_file": support.write(self.device.token, TOKEN, 0o600), "url": self.mis.est})
        done = self.device.run("enroll")
        self.assertEqual((done.returncode, done.stdout.split(" with ")[0]), (0, f"enrolled: {CLIENT_ID}"), done.stderr)
        self.assertEqual(self.device.run("enroll").returncode, 0)
        self.assertEqual(len(self.issued()), 1)

    def test_a_review_is_waited_for_with_the_same_key(self):
        """E-037, E-042: 202 is no failure; not before Retry-After, then the same request."""
        self.mis.add_token(TOKEN, review=600)
        self.assertIn("has not decided yet", self.device.cycle(3))
        key = read(self.device.key)
        self.assertNotIn("asking", self.device.cycle(3))
        self.assertEqual(self.asked("simpleenroll"), [("simpleenroll", 202)])
        self.mis.add_token(TOKEN)                   # decided early
        self.let_retry()
        self.device.cycle()
        self.assertEqual((read(self.device.key), self.asked("simpleenroll")[1:]), (key, [("simpleenroll", 200)]))

    def test_a_refusal_is_named_and_waits_for_another_token(self):
        """E-045: 401 ends in 5 without guessing why; not asked again until an hour has passed or the token is another one."""
        support.write(self.device.token, "line-4:wrong\n", 0o600)
        log = self.device.cycle(5)
        self.assertIn("enrollment authorization refused", log)
        self.assertNotIn("wrong", log)
        self.assertIn("or at once with another token", self.device.cycle(5))
        self.assertIn("enrollment authorization refused", self.device.status()["identity"]["warning"])
        self.assertEqual(len(self.asked("simpleenroll")), 1)
        self.assertEqual(self.device.run("enroll").returncode, 5)
        self.assertEqual(len(self.asked("simpleenroll")), 2)        # somebody asked for it
        key = read(self.device.key)
        support.write(self.device.token, TOKEN + "\n", 0o600)
        self.device.cycle()
        self.assertEqual(read(self.device.key), key)

    def test_a_lost_answer_is_asked_for_again_with_the_same_key(self):
        """E-042: the service issued, the answer never came."""
        self.mis.fault({"path": "*/simpleenroll", "late": True, "close": True, "times": 1})
        self.device.cycle(3)
        done = self.device.run("enroll")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(len({item["key"] for item in self.issued()}), 1)
        self.assertEqual(len(self.issued()), 2)
        self.assertEqual(self.leaf().uris, [CLIENT_ID])

    def test_waiting_answers_are_waited_for(self):
        """E-062: 503 and 429 with Retry-After, also as a problem document."""
        for fault in ({"status": 503, "headers": {"Retry-After": "120"}, "body": "busy"}, {"problem": {"status": 429, "retryAfterSeconds": 120}}):
            device = self.make_device()
            self.mis.fault(dict(fault, path="*/simpleenroll"))
            device.cycle(3)
            self.assertGreaterEqual(device.state()["est"]["delay"], 120)
            device.cycle(3)
        self.assertEqual(len(self.asked("simpleenroll")), 2)

    def test_the_token_follows_no_redirect(self):
        """E-044: and stands in no log, whatever the answer says."""
        self.mis.fault({"path": "*/simpleenroll", "status": 307, "headers": {"Location": self.mis.url + "/.well-known/est/x/simpleenroll"}, "body": ""})
        self.assertIn("HTTP 307", self.device.cycle(5))
        self.assertEqual(self.asked("simpleenroll"), [("simpleenroll", 307)])

    def test_what_is_issued_wrongly_is_never_used(self):
        """E-012, E-038: another key, name, domain, kind, time or issuer, and answers that are none; each is told apart, nothing is installed."""
        other = "spiffe://other.example/margo/wfm/main/client/x"
        for odd, fault, words in (
                ({"key": True}, {}, "none of the 1 certificates issued is for the own key"),
                ({"id": WFM_ID}, {}, "not a WFM client's id"), ({"id": "https://x/y"}, {}, "is not a SPIFFE ID"),
                ({"id": []}, {}, "holds 0 URIs"), ({"id": [CLIENT_ID, CLIENT_ID + "x"]}, {}, "holds 2 URIs"),
                ({"id": other}, {}, "trust domain other.example, the discovery document says factory.example"),
                ({"ca": True}, {}, "basicConstraints"), ({"start": -20, "end": -10}, {}, "expired"),
                ({"stranger": True}, {}, "does not lead to the trust bundle"), ({"extra": 40}, {}, "more than 32 certificates"),
                ({"start": 4000, "end": 8000}, {}, "set the clock"),
                ({}, {"headers": {"Content-Type": "text/html"}, "body": "<html>Welcome"}, "something else than certificates: '<html>Welcome'"),
                ({}, {"body": "MIIB"}, "something else than certificates: 'MIIB'"), ({}, {"body": ""}, "something else"),
                ({}, {"body": base64.b64encode(b"0" * 3000).decode()}, "something else"), ({}, {"body": "A" * 2000000}, "longer than")):
            device = self.make_device()
            self.mis.misissue(**odd)
            self.mis.fault(*([dict(fault, path="*/simpleenroll")] if fault else []))
            done = device.run("run", "--once")
            with self.subTest(words):
                self.assertIn(words, done.stderr)
                self.assertIn(done.returncode, (4, 5))
                self.assertIsNone(read(device.certificate))
                self.assertIn(b"s3cr:et", read(device.token))
        self.assertEqual(self.wfm.requests()[self.start[2]:], [])

    def test_an_svid_by_a_clock_that_is_ahead_is_waited_for(self):
        """P-2, E-043: it is good in a moment; neither thrown away nor asked for again."""
        self.mis.misissue(start=250, end=4000)
        self.assertIn("by a clock that is ahead of ours", self.device.cycle(3))
        record = self.device.state()["est"]
        self.assertTrue(record["answer"] and 0 < record["delay"] < 252, record)
        self.let_retry()
        self.assertIn("by a clock that is ahead of ours", self.device.cycle(3))
        self.assertEqual(len(self.issued()), 1)

    def test_downtime_without_an_svid_is_waited_out_quietly(self):
        """The draft's 4: also where the last attempt is long past, a daemon's next cycle is due after an interval and not at once."""
        self.mis.fault({"path": "*/simpleenroll", "status": 503, "times": 1})
        self.device.cycle(3)
        state = self.device.state()
        for clock in ("at", "uptime"):
            state["est"][clock] -= 10000
        support.write(os.path.join(self.device.state_dir, "state.json"), margo_agent.make_json(state))
        self.device.set("poll.downtime", ["00:00-24:00"])
        agent = margo_agent.Agent(margo_agent.load_config(self.device.config_file))
        with mock.patch.dict(os.environ, self.device.env), mock.patch.object(margo_agent, "log", lambda *_, **__: None):
            outcome = agent.cycle()
        self.assertEqual((outcome.code, outcome.delay > 50), (0, True))

    def test_certs_only_in_every_form_and_order(self):
        """E-038: base64, DER, PEM and BER; the leaf last and among others."""
        for odd in ({"form": "der"}, {"form": "pem"}, {"form": "ber"}, {"extra": 5, "last": True}, {"extra": 2, "form": "ber", "cacerts": "none"}):
            device = self.make_device()
            self.mis.misissue(**odd)
            with self.subTest(odd):
                device.cycle()
                self.assertEqual(len(margo_agent.parse_pem(read(device.certificate))), 2)

    def test_without_discovery_an_endpoint_and_a_bundle_are_enough(self):
        """E-003, E-032: both provided as they are; nothing else of the identity service is asked."""
        self.device.settings["identity"].update(discovery=None, trust_bundle=self.pki.path("bundle.json"), est={"token_file": self.device.token,
                                                                                                               "url": self.mis.est})
        self.device.save()
        self.device.cycle()
        self.assertEqual(self.asked(), [("simpleenroll", 200), ("cacerts", 200)])

    def test_intermediates_that_cannot_be_had_are_no_refusal_of_the_token(self):
        """E-039, E-043: what was issued is kept, and the chain is asked for again."""
        self.mis.fault({"path": "*/cacerts", "status": 404, "body": "", "times": 1})
        log = self.device.cycle(5)
        self.assertIn("cacerts: HTTP 404", log)
        self.assertNotIn("authorization refused", log)
        self.assertEqual(self.device.run("enroll").returncode, 0)
        self.assertEqual(self.asked("simpleenroll"), [("simpleenroll", 200)])

    def test_a_chain_that_cannot_be_built_is_kept_aside(self):
        """E-039, E-040: anchors never come from cacerts; once that is mended the SVID is used, without another request."""
        for kind in ("none", "stranger", "root"):
            device = self.make_device()
            before = len(self.issued())
            self.mis.misissue(cacerts=kind)
            self.assertIn("does not lead to the trust bundle", device.cycle(5))
            self.mis.misissue()
            done = device.run("enroll")
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertEqual(len(self.issued()) - before, 1)

    def certify_issuer(self, signer, start, end):
        """Another certificate of the issuing CA, with its name and its key; the path."""
        current, again = self.mis.path("issuing.pem"), f"again-{signer}"
        support.write(self.pki.path(f"{again}.cnf"), "\n".join((
            "[ca]", "default_ca = x", "[x]", "new_certs_dir = .", f"database = {again}.db", f"serial = {again}.serial",
            "default_md = sha256", "policy = any", "unique_subject = no", "preserve = yes", "[any]",
            "organizationName = optional", "commonName = optional", "[ext]", "basicConstraints = critical, CA:TRUE",
            "keyUsage = critical, keyCertSign, cRLSign", "subjectKeyIdentifier = hash", "")))
        support.write(self.pki.path(f"{again}.db"), "")
        support.write(self.pki.path(f"{again}.serial"), os.urandom(8).hex())
        self.pki.run("x509", "-x509toreq", "-in", current, "-signkey", self.mis.path("issuing.key"), "-out", f"{again}.csr")
        self.pki.run("ca", "-batch", "-config", f"{again}.cnf", "-extensions", "ext", "-startdate", support.moment(start),
                     "-enddate", support.moment(end), "-notext", "-in", f"{again}.csr", "-out", f"{again}.pem",
                     "-cert", f"{signer}.pem", "-keyfile", f"{signer}.key")
        return self.pki.path(f"{again}.pem")

    def test_every_certificate_of_the_issuer_is_tried(self):
        """E-039, F-15: one that has ended, or is by a CA that the bundle does not know, may come first."""
        for signer, start, end in (("ca", "-400d", "-1d"), ("site-ca", "-10d", "+100d")):
            other, current = self.certify_issuer(signer, start, end), self.mis.path("issuing.pem")
            for order in ([other, current], [current, other]):
                device = self.make_device()
                files = [word for path in order for word in ("-certfile", path)]
                body = subprocess.run(["openssl", "crl2pkcs7", "-nocrl", "-outform", "DER", *files], check=True,
                                      stdout=subprocess.PIPE).stdout
                self.mis.fault({"path": "*/cacerts", "status": 200, "body": base64.encodebytes(body).decode()})
                with self.subTest((signer, order[0] == other)):
                    device.cycle()
                    chain = margo_agent.parse_pem(read(device.certificate))
                    self.assertEqual(chain[1:], margo_agent.parse_pem(read(current)))

    def test_enroll_uses_a_fresh_token_although_the_svid_is_good(self):
        """F-35: a WFM that does not take the SVID any more; `run` goes on with it, doctor and `enroll` help."""
        self.device.cycle()
        first = self.leaf()
        self.mis.add_token("line-4:new")
        support.write(self.device.token, "line-4:new\n", 0o600)
        self.device.cycle()
        self.assertEqual(self.leaf(), first)
        self.assertRegex(self.device.run("doctor").stdout, r"warn renewal .*has not served, `enroll` uses it")
        done = self.device.run("enroll")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertNotEqual(self.leaf(), first)
        self.assertEqual((read(self.device.token), self.leaf().spki), (None, first.spki))

    def test_a_fresh_token_that_is_refused_is_told_and_the_svid_stays(self):
        """F-35: also where the service takes its time; `run` then goes on asking."""
        self.device.cycle()
        first = self.leaf()
        support.write(self.device.token, "line-4:wrong\n", 0o600)
        done = self.device.run("enroll")
        self.assertEqual((done.returncode, self.leaf()), (0, first), done.stderr)
        self.assertIn("is not renewed yet: enrollment authorization refused", done.stderr)
        self.mis.add_token("line-4:slow", review=1)
        support.write(self.device.token, "line-4:slow\n", 0o600)
        self.assertIn("has not decided yet", self.device.run("enroll").stderr)
        time.sleep(1.1)
        self.let_retry()
        self.device.cycle()
        self.assertNotEqual(self.leaf(), first)

    def test_an_enrollment_that_an_older_agent_began_goes_on(self):
        """E-042: a record of a request that was never answered."""
        self.mis.fault({"path": "*/simpleenroll", "status": 503, "times": 1})
        self.device.cycle(3)
        state = self.device.state()
        state.update(est={"token": state["est"]["token"], "key": "none yet", "used": None}, patience={})
        support.write(os.path.join(self.device.state_dir, "state.json"), margo_agent.make_json(state))
        key = read(self.device.key)
        self.device.cycle()
        self.assertEqual((len(self.issued()), list(self.device.state()["est"]), read(self.device.key)), (1, ["used"], key))

    def test_a_token_that_served_is_never_sent_again(self):
        """E-044: also if it comes back from a backup and the SVID is gone."""
        self.device.cycle()
        support.write(self.device.token, TOKEN + "\n", 0o600)
        self.device.cycle()
        os.remove(self.device.certificate)
        before = len(self.asked("simpleenroll"))
        self.assertIn("a fresh enrollment token", self.device.cycle(5))
        self.assertEqual(len(self.asked("simpleenroll")), before)

    def test_a_token_serves_no_second_key(self):
        """E-042: the key was lost between request and answer."""
        self.mis.add_token(TOKEN, review=60)
        self.device.cycle(3)
        os.remove(self.device.key)
        done = self.device.run("enroll")
        self.device.state()["est"]["delay"] = 0
        state = self.device.state()
        state["est"]["delay"] = 0
        support.write(os.path.join(self.device.state_dir, "state.json"), margo_agent.make_json(state))
        done = self.device.run("run", "--once")
        self.assertEqual(done.returncode, 5)
        self.assertIn("a key that is lost; a fresh token is needed", done.stderr)
        self.assertEqual([len(item["keys"]) for item in support.read_json(self.mis.path("used.json")).values()], [1])

    def test_a_lost_key_takes_a_fresh_token(self):
        """E-066: the certificate alone is worth nothing; a new key is made for the new token only."""
        self.device.cycle()
        first = self.leaf()
        os.remove(self.device.key)
        self.assertIn("the key is lost; a fresh enrollment token", self.device.cycle(5))
        self.assertIsNone(read(self.device.key))
        self.mis.add_token("line-4:again")
        support.write(self.device.token, "line-4:again\n", 0o600)
        self.device.cycle()
        self.assertNotEqual(self.leaf().spki, first.spki)

    def test_an_answer_whose_key_is_lost_is_none(self):
        """E-042, E-066: a renewal waited for its chain; nothing of it stands in the way of a fresh token."""
        self.age()
        self.mis.misissue(cacerts="none")
        self.device.cycle(3)
        self.mis.misissue()
        os.remove(self.device.key)
        self.let_retry()
        self.assertIn("the key is lost; a fresh enrollment token", self.device.cycle(5))
        self.mis.add_token("line-4:once more")
        support.write(self.device.token, "line-4:once more", 0o600)
        self.device.cycle()
        self.assertEqual([item["how"] for item in self.issued()], ["token", "renewal", "token"])

    def test_unenroll_gives_up_an_enrollment_under_way(self):
        """C-052: whoever enrolls this device next gets nothing of it."""
        self.mis.misissue(cacerts="none")
        self.device.cycle(5)
        self.assertIn("answer", self.device.state()["est"])
        support.write(os.path.join(self.device.state_dir, "issued.p7"), b"of an older agent")
        self.device.run("unenroll")
        self.assertEqual((self.device.state()["est"], os.path.exists(os.path.join(self.device.state_dir, "issued.p7"))), ({}, False))

    def test_a_token_file_is_one_line_with_a_secret(self):
        """E-008, E-033: what cannot be a token is a fault of the identity, what others can read a warning."""
        for data in ("", "user", "user:", ":\n\nx", "a:b\nc:d\n"):
            support.write(self.device.token, data, 0o600)
            self.assertIn("expected one line, user:secret", self.device.run("enroll").stderr)
        support.write(self.device.token, TOKEN, 0o644)
        done = self.device.run("enroll")
        self.assertEqual(done.returncode, 0)
        self.assertIn("others can read the enrollment token", done.stderr)

    def test_the_user_of_a_token_may_have_no_name(self):
        """E-033: it goes as Basic all the same."""
        device = self.make_device(":s3cr:et")
        self.assertEqual(device.run("enroll").returncode, 0)
        self.assertEqual(self.asked("simpleenroll"), [("simpleenroll", 200)])

    def test_without_token_or_chain_one_message_says_what_is_needed(self):
        """E-011: the request by hand stays possible: what `csr` prints, an operator signs, and the chain is put into place."""
        os.remove(self.device.token)
        self.assertIn("or a chain for the request of `margo_agent.py csr`", self.device.cycle(5))
        done = self.device.run("csr")
        support.write(self.pki.path("hand.csr"), done.stdout)
        support.write(self.pki.path("hand.ext"), f"basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\nsubjectAltName=URI:{CLIENT_ID}\n")
        self.pki.run("x509", "-req", "-in", "hand.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "hand.ext", "-out",
                     "hand.pem", "-days", "1")
        support.write(self.device.certificate, read(self.pki.path("hand.pem")))
        self.device.cycle()
        self.assertEqual(self.asked("simpleenroll"), [])

    def test_the_service_is_known_by_the_bootstrap_anchor_alone(self):
        """E-041: a server that the trust bundle would vouch for gets neither request nor token."""
        self.pki.issue("fake", extra="subjectAltName = DNS:localhost")
        fake = type("P", (), {"path": lambda _, name: self.pki.path({"site.pem": "fake.pem", "site.key": "fake.key"}.get(name, name))})()
        mis = support.Mis(self, fake)
        self.device.set("identity.est", {"token_file": self.device.token, "url": mis.est})
        self.assertIn("certificate is refused", self.device.cycle(5))
        self.assertEqual(mis.requests(), [])

    def test_off_leaves_no_trace(self):
        """The draft's switch: without it nothing is asked, said or kept."""
        self.device.cycle()
        device = self.make_device()
        for path in ("certificate", "key"):
            support.write(getattr(device, path), read(getattr(self.device, path)), 0o600)
        device.settings["identity"].update(enrollment="off", est={}, revocation="off")
        device.save()
        before = len(self.mis.requests())
        self.assertNotIn("draft", device.cycle())
        self.assertEqual([path for _, path, _ in self.mis.requests()[before:]], ["margo", "bundle.json"])
        state = device.state()
        self.assertEqual((state["est"], state["crls"], state["drafts"], sorted(state["trust"])), (
            {}, {}, [], ["refreshedAt", "sequence", "source", "trustDomain"]))

    def test_doctor_foresees_the_end_of_an_svid_that_is_not_renewed(self):
        """Less than a quarter of its lifetime left means that renewals fail."""
        for share, level in ((0.7, "ok"), (0.8, "warn")):
            device = self.make_device()
            self.age(share, device=device)
            self.assertRegex(device.run("doctor").stdout, level + r" +identity ")

    def test_doctor_says_draft_and_when_it_will_be_renewed(self):
        self.assertIn("`margo_agent.py enroll` obtains one", self.device.run("doctor").stdout)
        self.device.cycle()
        self.assertRegex(self.device.run("doctor").stdout, r"ok +renewal +renewed over EST \(draft\) after 20.*\nok +lists +2 revocation lists \(draft\)\n")


class Authorized(Site):
    """The form by certificate."""

    @classmethod
    def setUpClass(cls):
        support.require("openssl")
        holder = unittest.TestCase()
        pki = support.Pki(holder)
        pki.issue("vendor-ca", ca=True, usage="keyCertSign, cRLSign", signer=None)
        pki.issue("line-4-cell-2", signer="vendor-ca")
        cls.vendor, cls.options = pki, ("--authorization-ca", pki.path("vendor-ca.pem"))
        super().setUpClass()
        cls.shared.addCleanup(holder.doCleanups)

    def test_a_certificate_authorizes_instead_of_a_token(self):
        """E-034, E-066: presented at simpleenroll and nowhere else; after a lapse it enrolls again without an operator."""
        self.device.set("identity.est", {"certificate": self.vendor.path("line-4-cell-2.pem"), "key": self.vendor.path("line-4-cell-2.key")})
        self.mis.misissue(end=6)
        self.device.cycle()
        self.assertEqual([item["how"] for item in self.issued()], ["certificate"])
        self.mis.misissue()
        self.outlive()
        self.device.cycle()
        self.assertEqual([item["how"] for item in self.issued()], ["certificate", "certificate"])
        self.assertEqual(len({item["key"] for item in self.issued()}), 1)

    def test_a_certificate_that_authorizes_nothing_is_refused(self):
        self.pki.issue("stranger", signer="site-ca")
        self.device.set("identity.est", {"certificate": self.pki.path("stranger.pem"), "key": self.pki.path("stranger.key")})
        self.device.cycle(5)
        self.assertEqual(self.issued(), [])


class Requests(unittest.TestCase):
    def setUp(self):
        self.pki = support.Pki(self)

    def make_renewal(self, name):
        """The renewal request for a certificate of the folder."""
        leaf = margo_agent.parse_certificate(self.pki.der(f"{name}.pem"))
        return leaf, margo_agent.run_renewal_csr(leaf, self.pki.path(f"{name}.key"))

    def test_the_first_request_carries_no_claim(self):
        """E-031, E-035: empty subject, no names, no challengePassword, ECDSA with SHA-256; asn1crypto and cryptography read it."""
        support.require("asn1crypto", "cryptography")
        from asn1crypto import csr
        from cryptography import x509
        margo_agent.obtain_key(self.pki.path("new.key"))
        data = margo_agent.run_csr(self.pki.path("new.key"), "DER")
        read = csr.CertificationRequest.load(data, strict=True)
        info = read["certification_request_info"]
        self.assertEqual((info["subject"].native, info["attributes"].native or []), ({}, []))
        self.assertEqual(read["signature_algorithm"]["algorithm"].native, "sha256_ecdsa")
        self.assertTrue(x509.load_der_x509_csr(data).is_signature_valid)

    def test_a_renewal_repeats_subject_and_names_byte_for_byte(self):
        """E-063: odd string types and a critical extension too; openssl, cryptography and asn1crypto accept it, for ECDSA and RSA."""
        support.require("asn1crypto", "cryptography")
        from asn1crypto import csr, x509 as asn1
        from cryptography import x509
        for name, options in (("plain", {}), ("critical", {"extra": f"subjectAltName = critical, URI:{CLIENT_ID}"}), ("rsa", {"key": "RSA"}),
                              ("p384", {"key": "P-384"})):
            self.pki.issue(name, [] if "extra" in options else [CLIENT_ID], **options)
            leaf, data = self.make_renewal(name)
            with self.subTest(name):
                other = x509.load_der_x509_csr(data)
                self.assertTrue(other.is_signature_valid)
                info = csr.CertificationRequest.load(data, strict=True)["certification_request_info"]
                self.assertEqual(info["subject"].dump(), leaf.subject)
                self.assertEqual(info["subject_pk_info"].dump(), leaf.spki)
                attribute, = info["attributes"]
                self.assertEqual(attribute["type"].native, "extension_request")
                wanted = next(item for item in asn1.Certificate.load(leaf.der)["tbs_certificate"]["extensions"] if item["extn_id"].native == "subject_alt_name")
                self.assertEqual(attribute["values"][0][0].dump(), wanted.dump())
                done = subprocess.run(["openssl", "req", "-inform", "DER", "-verify", "-noout"], input=data, stderr=subprocess.PIPE)
                self.assertIn(b"verify OK", done.stderr)


class Decisions(unittest.TestCase):
    """The pure part."""

    def test_many_certificates_of_one_name_make_no_endless_search(self):
        """F-15: paths are found one after the other, each at most ten long."""
        many = [margo_agent.Certificate(b"%d" % number, b"a", b"b", number, 0, 9, b"", [], True, None)
                for number in range(16)]
        loop = many + [item._replace(der=item.der + b"b", subject=b"b", issuer=b"a") for item in many]
        leaf = margo_agent.Certificate(b"leaf", b"c", b"a", 1, 0, 9, b"", [], False, None)
        paths = [path for path, _ in zip(margo_agent.find_paths([leaf], loop), range(16))]
        self.assertEqual((len(paths), {len(path) for path in paths}), (16, {10}))

    def make(self, der=b"x", start=0, end=1000):
        return margo_agent.Certificate(der, b"", b"", 1, start, end, b"", [CLIENT_ID], False, {0})

    def test_renewal_is_drawn_between_40_and_60_percent_once_per_svid(self):
        """E-061, E-065: evenly, and the same however often it is asked."""
        times = [margo_agent.make_renewal_time(self.make(str(number).encode())) for number in range(2000)]
        self.assertGreaterEqual(min(times), 400)
        self.assertLessEqual(max(times), 600)
        counts = [sum(start <= item < start + 20 for item in times) for start in range(400, 600, 20)]
        self.assertGreater(min(counts), 140)
        self.assertLess(max(counts), 260)
        self.assertEqual(times[7], margo_agent.make_renewal_time(self.make(b"7")))

    def test_what_is_to_be_done_follows_from_what_is_known(self):
        """E-045, E-060, E-065, E-066: nothing before it is due, at once when that passed, never by an SVID that lapsed."""
        leaf = self.make()
        due = margo_agent.make_renewal_time(leaf)
        for now, fault, est, token, issued, expected in (
                (due - 1, "", {}, None, False, ""), (due, "", {}, None, False, "renew"), (999, "", {}, None, False, "renew"),
                (due, "", {"at": due - 10, "delay": 60}, None, False, ""), (due, "", {"at": due - 60, "delay": 60}, None, False, "renew"),
                (due, "", {"at": due + 500, "delay": 60}, None, False, "renew"),             # the clock jumped back
                (due, "", {"at": due - 10, "delay": 60, "used": "a"}, None, False, ""),
                (1001, "expired", {}, "a", False, "enroll"), (1001, "expired", {"used": "a"}, "b", False, "enroll"), (1001, "expired", {}, "", False, "enroll"),
                (1001, "expired", {"used": "a", "answer": "x"}, "a", True, "enroll"),
                (1001, "expired", {"at": 1000, "delay": 60, "token": "a"}, "b", False, "enroll"),
                (due - 1, "", {"answer": "x"}, None, True, "renew"),                         # an earlier run ended here
                (due - 1, "not the key", {"key": "x", "token": "a"}, "a", False, "enroll")):
            with self.subTest((now, fault, est, token)):
                self.assertEqual(margo_agent.find_est_step(est, leaf, fault, token, margo_agent.Clock(now, "", 0)), expected)
        for now, fault, est, token in ((1001, "expired", {}, None), (1001, "expired", {"used": "a"}, "a"), (-5, "not valid before", {}, "a")):
            with self.subTest((now, fault)), self.assertRaises(Untrusted) as caught:
                margo_agent.find_est_step(est, leaf, fault, token, margo_agent.Clock(now, "", 0))
            self.assertIn(fault, caught.exception.message)
        clock = margo_agent.Clock(1001, "", 0)
        for token in ("a", ""):
            with self.subTest(token), self.assertRaises(margo_agent.Silence) as caught:
                margo_agent.find_est_step({"at": 1000, "delay": 60, "token": token}, leaf, "expired", token, clock)
            self.assertEqual((caught.exception.retry_after, caught.exception.exit), (59, 3))

    def test_downtime_is_kept(self):
        """The draft's 4: without an SVID quietly; one that is good is then renewed later, also by a fresh token."""
        leaf = self.make()
        clock = margo_agent.Clock(900, "", 0)
        with self.assertRaises(margo_agent.Silence) as caught:
            margo_agent.find_est_step({}, leaf, "the key is lost", "a", clock, True)
        self.assertEqual(caught.exception.exit, 0)
        for asked in (False, True):
            self.assertEqual(margo_agent.find_est_step({}, leaf, "", "a", clock, True, asked), "")
        self.assertEqual(margo_agent.find_est_step({}, leaf, "", "a", clock, False), "renew")

    def test_enrollment_settings_are_checked_together(self):
        """E-032: somewhere to ask and one form of authorization; both forms at once would be neither."""
        base = {"wfm": {"url": "https://x"}, "identity": {"certificate": "c", "key": "k", "trust_bundle": "b", "enrollment": "est"}}
        for est, word in (({}, "either token_file"), ({"url": "https://x/y", "token_file": "t", "certificate": "c", "key": "k"}, "either"),
                          ({"url": "https://x/y", "certificate": "c"}, "either"), ({"url": "http://x/y", "token_file": "t"}, "https URL"),
                          ({"url": "https://u@x/y", "token_file": "t"}, "https URL"), ({"url": "https://x/y?z", "token_file": "t"}, "without query"),
                          ({"token_file": "t"}, "identity.est.url: not set"), ({"tokenfile": "t"}, "did you mean identity.est.token_file")):
            document = dict(base, identity=dict(base["identity"], est=est))
            with self.subTest(est), self.assertRaises(margo_agent.ConfigError) as caught:
                margo_agent.make_config(document, "/", {})
            self.assertIn(word, caught.exception.message)
        good = dict(base, identity=dict(base["identity"], est={"url": "https://x/est/a/", "token_file": "t"}))
        self.assertEqual(margo_agent.make_config(good, "/", {}).identity.est.url, "https://x/est/a")

    def test_discovery_names_the_endpoint_and_lists(self):
        """E-080, E-092: another origin under a public trust store is refused, what is malformed in the lists is kept to be told of."""
        import json
        base = {"trustDomain": "a", "trustBundleUri": "https://m/b"}

        def parse(public=False, **members):
            return margo_agent.parse_discovery(json.dumps(dict(base, **members)).encode(), "https://m/d", None, public)
        self.assertEqual(parse(estBaseUri="https://m:443/est/x", public=True).parts["est"], "https://m:443/est/x")
        self.assertEqual(parse(estBaseUri="https://other/est").parts["est"], "https://other/est")
        for uri, public in (("https://other/est", True), ("http://m/est", False), ("https://m/est?x", False), ("https://u@m/est", False),
                            ("https://m/est#f", False), (7, False), (None, False)):
            with self.subTest(uri), self.assertRaises(ValueError):
                parse(estBaseUri=uri, public=public)
        self.assertEqual(parse(crlUris=["http://c/a.crl", 7, "https://c/b?c=d"] + ["x"] * 99).parts["crls"][:4], ["http://c/a.crl", "7", "https://c/b?c=d", "x"])
        self.assertEqual(len(parse(crlUris=["x"] * 99).parts["crls"]), margo_agent.MAX_LISTS)
        self.assertEqual([parse(crlUris=item).parts["crls"] for item in ("http://c", {}, None)], [["'http://c'"], [], []])


class Renewal(Site):
    def test_a_due_svid_renews_itself(self):
        """E-060, E-063, E-064, E-068, C-017: by mutual TLS, without a token, with the same key, and the WFM is asked before the switch."""
        old = self.age()
        support.write(self.device.token, "line-4:other\n", 0o600)
        self.mis.add_token("line-4:other")
        before = len(self.wfm.requests())
        self.device.cycle()
        new = self.leaf()
        self.assertEqual([item["how"] for item in self.issued()], ["token", "renewal"])
        self.assertEqual((new.spki, new.uris), (old.spki, old.uris))
        self.assertGreater(new.not_after, old.not_after)
        self.assertEqual(self.wfm.requests()[before:][0][:2], ("GET", "/api/v1/deployments"))
        self.assertEqual(read(self.device.token), b"line-4:other\n")
        self.assertEqual(self.asked("simpleenroll", "simplereenroll", "cacerts")[-2:], [("simplereenroll", 200), ("cacerts", 200)])
        self.device.cycle()
        self.assertEqual(len(self.issued()), 2)

    def test_the_old_svid_stays_until_the_wfm_accepts_the_new_one(self):
        """The renewed one waits aside and is not asked for again."""
        self.age()
        old = read(self.device.certificate)
        self.wfm.fault({"path": "/api/v1/deployments", "status": 403, "times": 1})
        self.assertIn("is not renewed yet", self.device.cycle(3))
        self.assertEqual(read(self.device.certificate), old)
        self.assertEqual(self.device.status()["identity"]["id"], CLIENT_ID)
        self.assertEqual(self.device.run("enroll").returncode, 0)
        self.assertNotEqual(read(self.device.certificate), old)
        self.assertEqual(len(self.issued()), 2)

    def test_a_bundle_that_rotates_meanwhile_is_asked_for_at_once(self):
        """E-039, E-060: the draft's 3.4, check 7: refreshed once, then validated again, within the same run."""
        self.mis.misissue(stranger=True)
        self.device.cycle(5)                        # makes the CA that will be next
        bundle = read(self.pki.path("bundle.json"))
        self.addCleanup(support.write, self.pki.path("bundle.json"), bundle)
        self.device = self.make_device()
        self.age()
        shutil.copy(self.mis.path("stranger.pem"), self.pki.path("rotated.pem"))
        self.pki.write_bundle("ca.pem", "rotated.pem", spiffe_sequence=9)
        self.mis.misissue(stranger=True)
        before = len(self.asked("simplereenroll"))
        self.assertNotIn("not renewed", self.device.cycle())
        self.assertEqual(len(self.asked("simplereenroll")), before + 1)
        self.assertEqual(self.leaf().issuer, margo_agent.parse_certificate(self.pki.der("rotated.pem")).subject)

    def test_what_waits_for_its_proof_is_given_up_where_the_own_svid_became_another(self):
        """E-012, E-067: an operator replaced key and certificate; an SVID for the old key is of no use."""
        other = self.make_device()
        self.age(device=other)
        self.age()
        self.wfm.fault({"path": "/api/v1/deployments", "status": 403, "times": 1})
        self.device.cycle(3)
        for path in ("key", "certificate"):
            support.write(getattr(self.device, path), read(getattr(other, path)), 0o600)
        self.let_retry()
        self.assertIn("is refused: none of the 1 certificates issued is for the own key", self.device.cycle(3))
        self.let_retry()
        self.device.cycle()
        self.assertEqual(self.leaf().spki, self.leaf(other).spki)
        self.assertEqual([item["how"] for item in self.issued()], ["token", "token", "renewal", "renewal"])

    def test_a_renewal_that_fails_costs_nothing_while_the_svid_is_good(self):
        """E-062: exit code 3, the poll goes on with the old one; the next attempt waits, over restarts."""
        for fault in ({"status": 503, "body": "busy"}, {"status": 401, "body": "no"}, {"close": True}, {"body": "<html>"}):
            device = self.make_device()
            old = self.age(device=device)
            self.mis.fault(dict(fault, path="*/simplereenroll"))
            before, start = len(self.asked("simplereenroll")), len(self.wfm.requests())
            with self.subTest(fault):
                self.assertIn("is not renewed yet", device.cycle(3))
                device.cycle(0)
                self.assertEqual(len(self.asked("simplereenroll")), before + 1)
                self.assertEqual([status for _, _, status in self.wfm.requests()[start:]], [200, 304])
                self.assertEqual(self.leaf(device), old)
                self.assertGreater(device.state()["est"]["delay"], 0)
            self.mis.fault()

    def test_a_renewal_changes_neither_name_nor_end_for_the_worse(self):
        """E-012, E-067: another id, an earlier end, another key; the old one stays."""
        for odd, words in (({"id": CLIENT_ID + "x"}, "the one to be renewed is " + CLIENT_ID), ({"end": 60}, "ends no later"),
                           ({"key": True}, "is for the own key"), ({"stranger": True}, "does not lead to the trust bundle")):
            device = self.make_device()
            old = self.age(device=device)
            self.mis.misissue(**odd)
            with self.subTest(words):
                self.assertIn(words, device.cycle(3))
                self.assertEqual(self.leaf(device), old)
            self.mis.misissue()

    def test_a_service_that_asks_for_more_time_than_is_left_is_asked_again_in_time(self):
        """Case 4.14: half of what is left at most; without an SVID it has its day."""
        self.age()
        self.mis.fault({"path": "*/simplereenroll", "status": 503, "headers": {"Retry-After": "999999999"}, "body": ""})
        self.device.cycle(3)
        left = self.leaf().not_after - time.time()
        self.assertAlmostEqual(self.device.state()["est"]["delay"], left / 2, delta=20)
        self.assertGreater(left, 600)

    def test_an_svid_that_lapsed_renews_nothing(self):
        """E-066, P-3: it is offered to nobody, workloads go on; a fresh token mends it."""
        self.mis.misissue(end=6)
        self.device.cycle()
        self.mis.misissue()
        self.device.settings["identity"]["discovery"] = self.mis.url + "/.well-known/margo"
        self.outlive()
        log = self.device.cycle(5)
        self.assertIn("expired at", log)
        self.assertIn("a fresh enrollment token", log)
        self.assertEqual(self.asked("simplereenroll"), [])
        self.mis.add_token("line-4:fresh")
        support.write(self.device.token, "line-4:fresh\n", 0o600)
        self.device.cycle()
        self.assertEqual([item["how"] for item in self.issued()], ["token", "token"])

    def test_a_wrong_clock_is_called_one(self):
        """P-2, E-065: before the SVID's time nothing is asked; no new certificate would help."""
        self.device.cycle()
        log = []
        config = margo_agent.load_config(self.device.config_file)
        agent = margo_agent.Agent(config)
        with mock.patch.dict(os.environ, self.device.env), mock.patch.object(margo_agent.time, "time", lambda: 1000.0), \
                mock.patch.object(margo_agent, "log", lambda level, message, **_: log.append(message)):
            self.assertEqual(agent.cycle().code, 5)
        self.assertIn("set the clock", " ".join(log))
        self.assertEqual(len(self.issued()), 1)

    def test_downtime_holds_a_renewal_back_unless_the_svid_would_end_in_it(self):
        """The draft's 4: the operator's silence is kept where that can be."""
        self.age()
        self.device.env["TZ"] = "UTC"               # on the days on which clocks change a window is longer or shorter (F-25)
        now = time.gmtime()
        ends = time.strftime("%Y-%m-%dT%H:%M", time.gmtime(time.time() + 600))
        self.device.set("poll.downtime", [f"{now.tm_year - 1}-01-01T00:00/{ends}"])
        self.device.cycle()
        self.assertEqual(len(self.issued()), 1)
        self.device.set("poll.downtime", ["00:00-24:00"])
        self.device.cycle()
        self.assertEqual([item["how"] for item in self.issued()], ["token", "renewal"])

    def test_a_bundle_without_the_own_anchor_is_reported(self):
        """C-039, E-010: the new bundle counts, the WFM decides about the old SVID; a new chain that misses the bundle is not used."""
        self.device.cycle()
        self.pki.issue("next", ca=True, usage="keyCertSign, cRLSign", signer=None)
        bundle = read(self.pki.path("bundle.json"))
        self.addCleanup(support.write, self.pki.path("bundle.json"), bundle)
        self.pki.write_bundle("next.pem", spiffe_sequence=2)
        done = self.device.run("enroll")
        self.assertIn("its chain does not lead to the trust bundle", done.stderr)
        self.assertEqual(done.returncode, 5)
        time.sleep(2.1)                             # times in certificates are whole seconds, and the new one has to end later
        self.assertIn("the SVID issued does not lead to the trust bundle", self.device.cycle(5))
        self.assertEqual(self.asked("simplereenroll"), [("simplereenroll", 200)])       # at once, long before it would be due


class Files(unittest.TestCase):
    """What the settings of an identity have to name."""

    def check(self, **identity):
        """The words of the faults of a configuration."""
        base = {"certificate": "c", "key": "k", "trust_bundle": "b", "enrollment": "est",
                "est": {"url": "https://x/y", "token_file": "t"}}
        with self.assertRaises(margo_agent.ConfigError) as caught:
            margo_agent.make_config({"wfm": {"url": "https://x"}, "identity": dict(base, **identity)}, "/", {})
        return caught.exception.message

    def test_a_renewal_needs_certificate_and_key_in_two_files(self):
        """E-042: else the rename of the chain would lose the key beside it."""
        self.assertRegex(self.check(key="./c"), "^identity.key: found the file of identity.certificate, expected one of its own")


class Quickstart(unittest.TestCase):
    def test_the_life_of_an_identity_in_a_minute(self):
        """The example runs as it stands, and every chapter of it comes about."""
        support.require("openssl")
        if not shutil.which("curl"):
            support.give_up("curl is not installed")
        done = subprocess.run(["sh", os.path.join(support.EXAMPLES, "quickstart.sh"), "--no-install", "--enroll"], stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, universal_newlines=True, timeout=240)
        self.assertEqual(done.returncode, 0, done.stdout)
        for words in ("the token is gone", "the peer's certificate is revoked", "is not renewed yet", "expired at", "nothing is left behind"):
            self.assertIn(words, done.stdout)
        self.assertEqual(len(set(re.findall('"key": "([0-9a-f]+)"', done.stdout))), 1)


class Installed(Site):
    """Files that an operator provides and replaces."""

    def setUp(self):
        super().setUp()
        self.device.settings["identity"].update(enrollment="off", est={}, trust_bundle=self.pki.path("bundle.json"))
        del self.device.settings["identity"]["discovery"]
        self.device.save()
        self.count = 0

    def provide(self, *names, key=True):
        """Puts certificate and key of a new SVID into place."""
        self.count += 1
        self.pki.issue(f"svid-{self.count}", names or [CLIENT_ID])
        support.write(self.device.certificate, read(self.pki.path(f"svid-{self.count}.pem")))
        if key:
            support.write(self.device.key, read(self.pki.path(f"svid-{self.count}.key")), 0o600)

    def test_files_that_are_replaced_are_taken_up(self):
        """E-001, E-003, E-010, E-014: the next cycle has the new SVID, that no identity service has seen."""
        for _ in range(2):
            self.provide()
            self.device.cycle()
        log = [item["headers"] for item in self.wfm.lines("requests.jsonl")]
        self.assertTrue(log)

    def test_a_replacement_that_is_half_done_is_no_pair_and_the_next_cycle_has_one(self):
        """E-010: an operator replaces two files one after the other; a cycle between the two changes nothing."""
        self.provide()
        self.device.cycle()
        self.provide(key=False)
        self.assertIn("not the key of identity.certificate", self.device.cycle(5))
        support.write(self.device.key, read(self.pki.path(f"svid-{self.count}.key")), 0o600)
        self.device.cycle()

    def test_a_new_chain_has_to_reach_the_bundle(self):
        """E-006, E-008, E-012: the cause is told apart from a refusal by the WFM, before a connection."""
        self.pki.issue("odd-ca", ca=True, usage="keyCertSign", signer=None)
        self.pki.issue("odd", [CLIENT_ID], signer="odd-ca")
        support.write(self.device.certificate, read(self.pki.path("odd.pem")))
        support.write(self.device.key, read(self.pki.path("odd.key")), 0o600)
        self.assertIn("its chain does not lead to the trust bundle (unable to get local issuer certificate)", self.device.cycle(5))
        self.assertEqual(self.wfm.requests()[self.start[2]:], [])


if __name__ == "__main__":
    unittest.main()
