"""Git: the profile, with real git over https, ssh and files; every road, every refusal, every accident."""
import errno
import getpass
import json
import os
import re
import shutil
import signal
import subprocess
import types
import unittest
from unittest import mock

import margo_agent
from tests import git_bombs, git_server, support
from tests.bench import costs
from tests.support import DEVICE, HELLO

IDS = [HELLO[:-2] + f"{number:02d}" for number in range(300)]
STATUS = f"status/{DEVICE}"


class GitCase(unittest.TestCase):
    """A repository of one fleet, a registry with a package, an engine of files, and devices on whichever road."""

    @classmethod
    def setUpClass(cls):
        support.require("git")
        owner = types.SimpleNamespace(addCleanup=cls.addClassCleanup)
        cls.pki = support.Pki(owner)
        cls.wfm = support.Wfm(owner, cls.pki)       # its registry serves the packages
        cls.wfm.add_package(support.make_compose())

    def setUp(self):
        self.repository, self.engine = git_server.Repository(self), support.FakeEngine(self)
        self.device = self.make_device(self.repository.url)

    def make_device(self, url, **settings):
        """A device of this profile; settings as git_path for `git.path`."""
        settings = {key.replace("_", ".", 1): value for key, value in settings.items()}
        return support.Device(self, self.pki, self.wfm, self.engine, url=url, settings=dict(
            {"wfm.profile": "git", "identity": {}, "git.path": "apps"}, **settings))

    def publish(self, *values, name="apps/hello.yaml", deployment_id=HELLO, **options):
        """Commits a deployment, with a value for GREETING where one is given; returns the commit."""
        text = support.make_deployment(deployment_id, registry=self.wfm.registry, parameters={"GREETING": values[0]} if values else None)
        return self.repository.commit({name: text}, **options)

    def running(self):
        """The environments of the containers that run."""
        return [container["env"] for container in self.engine.containers().values()]

    def report(self, deployment_id=HELLO, branch=STATUS):
        """The status document of a deployment on a device's branch."""
        return json.loads(self.repository.show(branch, f"deployments/{deployment_id}.json"))

    def snapshot(self, device):
        """{path: (inode, size, mtime)} of a state directory."""
        found = {}
        for folder, _, names in os.walk(device.state_dir):
            for name in [""] + names:
                facts = os.stat(os.path.join(folder, name))
                found[os.path.join(folder, name)] = facts.st_ino, facts.st_size, facts.st_mtime_ns
        return found

    def watch_git(self, device):
        """Has every git of a device note its command line and environment; returns a function that tells and forgets them."""
        folder, real = support.make_folder(self), shutil.which("git")
        notes = os.path.join(folder, "notes")
        support.write(os.path.join(folder, "git"), f"#!/bin/sh\n{{ echo \"$@\"; env; }} >> {notes}\nexec {real} \"$@\"\n", 0o755)
        device.env["PATH"] = f"{folder}:{device.env['PATH']}"

        def tell():
            with open(notes) as file:
                text = file.read()
            os.remove(notes)
            return text
        return tell


class Roads(GitCase):
    """The same story on every road: first sync, unchanged, update, removal."""

    def check(self, device):
        """C-250, C-251, C-252, C-255."""
        first = self.publish("one")
        self.assertEqual(device.plan(), {HELLO: ("install", "new")})
        device.cycle()
        self.assertEqual(self.running(), [["GREETING=one"]])
        self.assertEqual(device.status()["desiredState"]["version"], first)
        self.assertEqual((self.report()["status"]["state"], self.report()["commit"]), ("installed", first))
        self.assertEqual(json.loads(self.repository.show(STATUS, "capabilities.json"))["properties"]["id"], DEVICE)
        before, tell = self.snapshot(device), self.watch_git(device)
        device.cycle()
        self.assertEqual(self.snapshot(device), before)
        self.assertEqual(re.findall(r"(?m)^--git-dir=\S+ (?:-c include\S+ )?(\S+)", tell()), ["ls-remote"])
        second, told = self.publish("two"), self.repository.log(STATUS)
        self.assertEqual(device.plan(), {HELLO: ("update", "another revision")})
        self.assertEqual((self.snapshot(device), self.repository.log(STATUS)), (before, told))
        tell()
        device.cycle()
        self.assertEqual(self.running(), [["GREETING=two"]])
        self.assertEqual(self.report()["commit"], second)
        self.assertNotIn(" --depth", tell())        # incremental: from the accepted commit on
        self.repository.commit({"apps/hello.yaml": None, "apps/readme.txt": "nothing runs here"})
        device.cycle()
        self.assertEqual((self.running(), self.report()["status"]["state"]), ([], "removed"))
        self.assertEqual([item["version"] for item in json.loads(device.run("history", "--json").stdout)["history"]][:0:-1], [first, second])
        self.assertEqual(device.run("unenroll").returncode, 0)
        self.assertNotIn("capabilities.json", self.repository.show(STATUS))
        self.assertFalse(os.path.exists(os.path.join(device.state_dir, "git")))

    def serve(self, authorization):
        """An https server of the repository; its URL."""
        server = git_server.GitServer(self, self.pki, self.repository.served, authorization)
        return server.url + "/fleet.git"

    def make_token(self):
        """A token file."""
        return support.write(os.path.join(self.repository.folder, "token"), "s3cret-t0ken\n", 0o600)

    def test_file(self):
        self.check(self.device)

    def test_file_of_another_owner(self):
        """The operator names the repository; that is all the trust that git asks for."""
        if os.geteuid():
            support.give_up("only root can give files away")
        self.publish("one")
        for folder, _, names in os.walk(self.repository.bare):
            for name in [""] + names:
                os.chown(os.path.join(folder, name), 65534, 65534)
        for url in (self.repository.url, self.repository.url + "/"):
            device = self.make_device(url, git_path="")
            self.assertEqual(device.plan(), {HELLO: ("install", "new")})

    def test_https_with_a_bearer_token(self):
        """C-253"""
        self.check(self.make_device(self.serve("Bearer s3cret-t0ken"), git_token_file=self.make_token(),
                                    identity_ca=self.pki.path("site-ca.pem")))

    def test_https_with_a_name_and_a_password(self):
        self.check(self.make_device(self.serve(git_server.basic("line", "s3cret-t0ken")), git_token_file=self.make_token(),
                                    git_username="line", identity_ca=self.pki.path("site-ca.pem")))

    def test_ssh(self):
        """A host that is not in git.known_hosts gets nothing; the user's own keys and settings have no say."""
        server = Sshd(self)
        device = self.make_device(f"ssh://{getpass.getuser()}@127.0.0.1:{server.port}{self.repository.bare}", git_ssh_key=server.key,
                                  git_known_hosts=server.known_hosts)
        self.check(device)
        device.set("git.known_hosts", support.write(os.path.join(server.folder, "nobody"), ""))
        self.assertIn("Host key verification failed", device.cycle(5))
        device.set("git.known_hosts", server.known_hosts)
        device.set("git.ssh_key", server.make_key("stranger"))
        self.assertIn("Permission denied", device.cycle(5))
        server.service.stop()
        self.assertIn("UNREACHABLE", device.cycle(3))

    def test_a_repository_of_sha256(self):
        self.repository = git_server.Repository(self, object_format="sha256")
        self.check(self.make_device(self.repository.url))


class Sshd:
    """Debian's sshd on loopback, for one key."""

    def __init__(self, test):
        support.require("sshd")
        self.folder, self.port = support.make_folder(test), support.free_port()
        self.key = self.make_key("client")
        host = self.make_key("host")
        with open(host + ".pub") as file:
            self.known_hosts = support.write(os.path.join(self.folder, "known hosts"), f"[127.0.0.1]:{self.port} {file.read()}")
        config = support.write(os.path.join(self.folder, "sshd_config"), "\n".join([
            f"Port {self.port}", "ListenAddress 127.0.0.1", f"HostKey {host}", f"AuthorizedKeysFile {self.key}.pub", "UsePAM no",
            "StrictModes no", "PermitRootLogin yes", f"PidFile {self.folder}/pid", ""]))
        if os.geteuid() == 0:
            os.makedirs("/run/sshd", exist_ok=True)
        self.service = support.Service(test, [support.find_sshd(), "-D", "-e", "-f", config])
        support.wait_for(lambda: "listening on" in self.service.read_output(), what="sshd")

    def make_key(self, name):
        """A key pair; the private one's path."""
        path = os.path.join(self.folder, name)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", path], check=True)
        return path


class Refusal(GitCase):
    """What refuses a commit as a whole changes nothing that runs, and the next good commit is taken."""

    def setUp(self):
        super().setUp()
        self.first = self.publish("one")
        self.device.cycle()

    def check(self, code, *words):
        """A cycle ends with `code` and words and changes nothing."""
        before = self.device.state()
        log = self.device.cycle(code)
        for word in words:
            self.assertIn(word, log)
        self.assertEqual(self.device.state()["accepted"], before["accepted"])
        self.assertEqual(self.running(), [["GREETING=one"]])
        return log

    def test_history_that_was_rewritten(self):
        """C-256: an amended commit, an older one and an unrelated one are no successors; a revert is."""
        second = self.publish("two", push=False)
        self.repository.push()
        self.device.cycle()
        for commit in (self.first, self.publish("other", push=False, options=["--amend"])):
            self.repository.git("push", "--quiet", "--force", self.repository.bare, f"{commit}:main")
            log = self.device.cycle(4)
            self.assertIn("does not descend from the accepted " + second, log)
            self.assertIn("does not descend", self.device.run("history").stdout)
            self.assertEqual(self.running(), [["GREETING=two"]])
        self.repository.git("reset", "--quiet", "--hard", second)
        self.repository.git("revert", "--no-edit", "HEAD")
        self.repository.push("--force")
        self.device.cycle()
        self.assertEqual(self.running(), [["GREETING=one"]])

    def test_a_branch_that_was_deleted(self):
        self.repository.git("branch", "-m", "main", "other", cwd=self.repository.bare)
        self.check(4, "has no branch main")

    def test_a_folder_that_has_gone(self):
        self.repository.commit({"apps/hello.yaml": None, "elsewhere/hello.yaml": "a: 1"})
        self.check(4, "has no folder apps")

    def test_another_folder_counts_although_no_commit_came(self):
        """Contract, Profile git: the desired state is what is under `git.path`, not what was there at the last commit."""
        self.device.set("git.path", "nowhere")
        self.check(4, "has no folder nowhere")
        self.device.set("git.path", "apps")
        self.device.cycle()
        other = self.publish("other", name="others/hello.yaml")
        self.device.cycle()
        self.device.set("git.path", "others")
        self.device.cycle()
        self.assertEqual((self.running(), self.device.state()["accepted"]["version"]), ([["GREETING=other"]], other))
        self.assertEqual(self.device.cycle(), "")

    def test_documents_that_nobody_can_read(self):
        """C-116: YAML that is none, two documents, no id, an id twice, too long: the commit is refused and the file named."""
        good, document = support.make_deployment(registry=self.wfm.registry), json.loads(support.make_deployment())
        for index, (text, words) in enumerate([
                ("a: [1", "not closed"), ("a: 1\n---\nb: 2\n", "document"), (json.dumps(dict(document, id="../../etc")), "id: found"),
                (json.dumps({key: value for key, value in document.items() if key != "id"}), "id: found"), (good, "is in apps/hello.yaml, too"),
                ("a: " + "x" * 5000, "policy.max_document"), ("kind: ApplicationDeployment\napiVersion: margo.org/v1-alpha1\n", "metadata")]):
            self.device.set("policy.max_document", 4096)
            with self.subTest(words):
                self.repository.commit({f"apps/sub/x{index}.yml": text})
                self.check(4, f"apps/sub/x{index}.yml", words)
                self.repository.commit({f"apps/sub/x{index}.yml": None})
                self.device.cycle()

    def test_content_that_cannot_run_fails_alone(self):
        self.repository.commit({"apps/bad.yaml": support.make_deployment(IDS[1], registry=self.wfm.registry).replace('"compose"', '"custom"')})
        self.device.cycle(1)
        self.assertEqual(self.report(IDS[1])["status"]["error"]["code"], "UNSUPPORTED_TYPE")
        self.assertEqual(self.report()["status"]["state"], "installed")

    def test_a_first_sync_refuses_as_well(self):
        self.repository.commit({"apps/x.yaml": "a: [1"})
        device = self.make_device(self.repository.url)
        self.assertIn("apps/x.yaml", device.cycle(4))


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 1234\n" % ("4d" * 32)
SOPS = "id: ENC[AES256_GCM,data:a,iv:b,tag:c,type:str]\nspec: ENC[AES256_GCM,data:a,iv:b,tag:c,type:str]\nsops: {version: 3.8.1}\n"
VAULT = "$ANSIBLE_VAULT;1.1;AES256\n616263\n"


class Unreadable(GitCase):
    """F-06: nothing is ever removed because something could not be read; only a path that has gone is a removal."""

    def setUp(self):
        super().setUp()
        self.good = {name: support.make_deployment(item, f"app-{index}", registry=self.wfm.registry)
                     for index, (name, item) in enumerate(zip(("apps/a.yaml", "apps/hall/b.yaml", "apps/hall/line/c.yml"), IDS))}
        self.first = self.repository.commit(self.good)
        self.device.cycle()

    def check_refused(self, *words):
        """The newest commit is refused, all goes on running, and the next good one is taken."""
        log = self.device.cycle(4)
        for word in words:
            self.assertIn(word, log)
        self.assertEqual(len(self.engine.containers()), 3)
        self.assertEqual(self.device.state()["accepted"]["version"], self.first)
        self.first = self.repository.git("commit-tree", "-m", "back", "-p", "HEAD", self.first + "^{tree}")
        self.repository.git("reset", "--quiet", "--hard", self.first)
        self.repository.git("clean", "-ffdq")
        self.repository.push()
        self.device.cycle()

    def test_a_path_that_held_a_deployment_and_holds_something_else(self):
        good = json.loads(self.good["apps/a.yaml"])
        for words, text in [("Git LFS", LFS), ("held a deployment", "# switched off\n"), ("held a deployment", json.dumps([good])),
                            ("held a deployment", "kind: ConfigMap\napiVersion: v1\n")]:
            with self.subTest(text[:30]):
                self.repository.commit({"apps/a.yaml": text})
                self.check_refused("apps/a.yaml", words)
        self.repository.commit({"apps/a.yaml": "- 1\n"})
        self.assertIn("held a deployment", self.device.run("plan").stderr)

    def replace(self, path, mode, blob=None):
        """Commits a link, a submodule or a file in place of a path."""
        self.repository.git("rm", "-r", "--quiet", "--cached", path)
        blob = blob or self.repository.git("hash-object", "-w", "--stdin", data=b"a: 1\n")
        self.repository.git("update-index", "--add", "--cacheinfo", f"{mode},{blob},{path}")
        self.repository.git("commit", "--quiet", "-m", "replaced")
        self.repository.push()

    def test_a_path_that_became_a_link_a_submodule_or_a_folder(self):
        for path, held, mode, blob in (("apps/a.yaml", "apps/a.yaml", "120000", None), ("apps/hall", "apps/hall/b.yaml", "160000", "1" * 40)):
            with self.subTest(f"{path} {mode}"):
                self.replace(path, mode, blob)
                self.check_refused(held, "held a deployment")
        self.repository.git("rm", "--quiet", "apps/a.yaml")
        self.repository.commit({"apps/a.yaml/README": "now a folder"})
        self.check_refused("apps/a.yaml", "held a deployment")

    def test_what_git_calls_a_removal_is_one(self):
        """Renamed to another YAML file it goes on, to another kind of file or out of git.path it goes; another id is another deployment."""
        self.repository.commit({"apps/a.yaml": None, "apps/new/A.yml": self.good["apps/a.yaml"]})
        self.device.cycle()
        self.assertEqual((len(self.engine.containers()), self.report(IDS[0])["status"]["state"]), (3, "installed"))
        self.repository.commit({"apps/new/A.yml": self.good["apps/a.yaml"].replace(IDS[0], IDS[9])})
        self.device.cycle()
        self.assertEqual([self.report(IDS[item])["status"]["state"] for item in (0, 9)], ["removed", "installed"])
        self.repository.commit({"apps/hall/b.yaml": None, "apps/hall/b.yaml.txt": self.good["apps/hall/b.yaml"], "apps/hall/line/c.yml": None,
                                "elsewhere/c.yml": self.good["apps/hall/line/c.yml"]})
        self.device.cycle()
        self.assertEqual((len(self.engine.containers()), [self.report(IDS[item])["status"]["state"] for item in (1, 2)]), (1, ["removed", "removed"]))

    def test_it_is_known_after_the_copy_was_lost(self):
        """What held a deployment is read from the accepted commit itself, wherever that comes from; what never did may change as it likes."""
        for text in ("kind: Kustomization\napiVersion: x\n", "- 1\n"):
            self.first = self.repository.commit({"apps/kustomization.yaml": text})
            self.device.cycle()
        shutil.rmtree(os.path.join(self.device.state_dir, "git"))
        self.repository.commit({"apps/a.yaml": "- 1\n"})
        self.check_refused("apps/a.yaml", "held a deployment")


class Reading(unittest.TestCase):
    """F-06: what is refused wherever it lies, and what a place held before."""

    def test_what_nobody_can_have_meant_is_refused(self):
        """Also where its path is new: it may have been renamed and spoilt in one commit.  SOPS may leave id and kind in the clear."""
        text = support.make_deployment()
        good = json.loads(text)
        for data, words in [
                (LFS, "Git LFS"), (LFS.replace("\n", "\r\n"), "Git LFS"), (SOPS, "SOPS"), (json.dumps(dict(good, sops={})), "SOPS"), ("", "is empty"),
                (" \r\n\n", "is empty"), (VAULT, "encrypted file"), ("../real/a.yaml", "a link"), ("-----BEGIN AGE ENCRYPTED FILE-----\nYQ==\n", "encrypted"),
                (json.dumps(dict(good, kind="ApplicationDeploymnet")), "'ApplicationDeploymnet'"), (b"\0GITCRYPT\0a", "not allowed"),
                (json.dumps(dict(good, apiVersion="application.margo.org/v1alpha1")), "kind: found None"), (text.encode("utf-16"), "not UTF-8")]:
            with self.assertRaisesRegex(margo_agent.Refused, f"apps/x.yaml: .*{words}", msg=data):
                margo_agent.parse_files([("apps/x.yaml", data if isinstance(data, bytes) else data.encode())])

    def test_a_deployment_says_so_by_either_kind(self):
        """Contract, profile git: an ApplicationDeployment in the dialect of any generation."""
        value = dict(json.loads(support.make_deployment()), apiVersion="application.margo.org/v1alpha1")
        for kind in ("ApplicationDeployment", "ApplicationDeploymentManifest"):
            entries = margo_agent.parse_files([("a.yaml", json.dumps(dict(value, kind=kind)).encode())])[0]
            self.assertEqual([entry.deployment_id for entry in entries], [value["id"]])

    def test_what_says_something_else_is_ignored(self):
        for data in (b"# nothing\n", b"---\n", b"{}", b"- 1", b"kind: Kustomization", b"creation_rules: []", b"spec: {deploymentProfiles: []}"):
            self.assertEqual(margo_agent.parse_files([("x.yaml", data)]), ([], {}, ["x.yaml"]))

    def test_a_place_that_holds_something_else_now_is_suspect(self):
        def listing(*items):
            return b"".join(f"{mode} {kind} {'1' * 40} {size}\t{name}\0".encode() for mode, kind, size, name in items)

        def blob(name):
            return "100644", "blob", 5, name

        before, rest = listing(blob("a.yaml"), blob("h/b.yaml"), blob("h/l/c.yml"), blob("notes.md")), (blob("h/b.yaml"), blob("h/l/c.yml"))
        for after, others, found in [
                (listing(*rest), set(), []), (listing(blob("a.yaml"), *rest), set(), []), (listing(blob("a.yaml"), *rest), {"a.yaml"}, ["a.yaml"]),
                (listing(("120000", "blob", 5, "a.yaml"), *rest), set(), ["a.yaml"]), (listing(("160000", "commit", "-", "a.yaml"), *rest), set(), ["a.yaml"]),
                (listing(blob("a.yaml/README"), *rest), set(), ["a.yaml"]), (listing(blob("a.yaml.txt"), blob("A.YAML"), *rest), set(), []),
                (listing(("120000", "blob", 5, "h")), set(), ["h/b.yaml", "h/l/c.yml"]), (listing(("160000", "commit", "-", "h/l")), set(), ["h/l/c.yml"]),
                (listing(blob("h/l")), set(), ["h/l/c.yml"]), (listing(blob("h/lx"), blob("hx/l")), set(), [])]:
            self.assertEqual([name for name, _, _ in margo_agent.find_suspects(before, after, others)], found, after)


class Trust(GitCase):
    """Who may change the desired state, and who may read the credentials."""

    def make_signer(self, name="operator"):
        """An ssh key for commits and its line of an allowed-signers file."""
        path = os.path.join(self.repository.folder, name)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", path], check=True)
        with open(path + ".pub") as file:
            return path, f"plant@factory.example {file.read()}"

    def sign_by_ssh(self, key):
        """Has the commits to come signed by an ssh key; None: not at all."""
        for option, value in (("gpg.format", "ssh"), ("user.signingKey", key or ""), ("commit.gpgSign", "true" if key else "false")):
            self.repository.git("config", option, value)

    def test_only_signers_change_the_desired_state(self):
        """Unsigned, signed by somebody else, and changed after signing: 5; nothing of it is applied."""
        key, line = self.make_signer()
        stranger, _ = self.make_signer("stranger")
        signers = support.write(os.path.join(self.repository.folder, "signers"), line)
        device = self.make_device(self.repository.url, git_verify_signatures=True, git_allowed_signers=signers)
        self.publish("unsigned")
        self.assertIn("is not signed", device.cycle(5))
        self.sign_by_ssh(stranger)
        self.publish("stranger")
        self.assertIn("has no good signature of git.allowed_signers", device.cycle(5))
        self.sign_by_ssh(key)
        good = self.publish("signed")
        forged = self.repository.git("cat-file", "commit", good).replace("change", "forged")
        forged = self.repository.git("hash-object", "-t", "commit", "-w", "--stdin", data=forged.encode() + b"\n")
        self.repository.git("push", "--quiet", "--force", self.repository.bare, f"{forged}:main")
        self.assertIn("has no good signature", device.cycle(5))
        self.assertEqual(self.running(), [])
        self.repository.push("--force")
        device.cycle()
        self.assertEqual(self.running(), [["GREETING=signed"]])

    def test_a_head_that_was_accepted_unsigned_is_not_taken_for_a_signed_one(self):
        """Contract, Profile git: "an unsigned head with `verify_signatures` is 5", whenever that is set; what runs stays."""
        self.publish("unsigned")
        self.device.cycle()
        key, line = self.make_signer()
        self.device.set("git.verify_signatures", True)
        self.device.set("git.allowed_signers", support.write(os.path.join(self.repository.folder, "signers"), line))
        self.assertIn("is not signed", self.device.cycle(5))
        self.assertEqual(self.running(), [["GREETING=unsigned"]])
        self.sign_by_ssh(key)
        self.publish("signed")
        self.device.cycle()
        self.assertEqual(self.running(), [["GREETING=signed"]])

    def test_signers_may_rewrite_where_that_is_allowed(self):
        """C-256: an operator's signed force; an unsigned one stays refused."""
        key, line = self.make_signer()
        signers = support.write(os.path.join(self.repository.folder, "signers"), line)
        device = self.make_device(self.repository.url, git_verify_signatures=True, git_allowed_signers=signers)
        self.sign_by_ssh(key)
        self.publish("one")
        device.cycle()
        self.publish("two", push=False, options=["--amend"])
        self.repository.push("--force")
        self.assertIn("see git.allow_rewrite", device.cycle(4))
        device.set("git.allow_rewrite", True)
        self.assertIn("does not descend", device.cycle())
        self.assertEqual(self.running(), [["GREETING=two"]])
        self.sign_by_ssh(None)
        self.publish("three", push=False, options=["--amend"])
        self.repository.push("--force")
        self.assertIn("is not signed", device.cycle(5))

    def test_signatures_of_gpg(self):
        support.require("gpg")
        home = support.make_folder(self)
        os.chmod(home, 0o700)
        gpg = ["gpg", "--homedir", home, "--batch", "--quiet", "--passphrase", ""]
        for name in ("plant@factory.example", "stranger@factory.example"):
            subprocess.run(gpg + ["--quick-generate-key", name, "ed25519", "sign"], check=True, stderr=subprocess.DEVNULL)
        self.addCleanup(subprocess.run, ["gpgconf", "--homedir", home, "--kill", "all"])
        self.repository.env["GNUPGHOME"] = home
        for armor in (["--armor"], []):
            with self.subTest(armor):
                keyring = support.write(os.path.join(home, "keyring"), b"who may sign:\n" * len(armor) + subprocess.run(
                    gpg + armor + ["--export", "plant@factory.example"], check=True, stdout=subprocess.PIPE).stdout)
                device = self.make_device(self.repository.url, git_verify_signatures=True, git_allowed_signers=keyring)
                self.publish("stranger" + str(armor), options=["-Sstranger@factory.example"])
                self.assertIn("has no good signature", device.cycle(5))
                self.publish("signed" + str(armor), options=["-Splant@factory.example"])
                device.cycle()
                self.assertEqual(self.running(), [["GREETING=signed" + str(armor)]])
                device.run("unenroll", "--purge")

    def test_the_token_is_seen_by_nobody(self):
        """C-018, C-253: no command line, no environment, no log, no file of the state directory; read anew at each poll."""
        server = git_server.GitServer(self, self.pki, self.repository.served, "Bearer f1rst")
        token = support.write(os.path.join(self.repository.folder, "token"), "f1rst\n", 0o600)
        device = self.make_device(server.url + "/fleet.git", git_token_file=token, identity_ca=self.pki.path("site-ca.pem"))
        tell = self.watch_git(device)
        self.publish("one")
        heard = device.cycle(0, "-v") + tell()
        server.authorization = "Bearer s3cond"
        heard += device.cycle(5, "-v") + tell()
        self.assertIn("HTTP 401", heard)
        support.write(token, "s3cond", 0o600)
        heard += device.cycle(0, "-v") + tell()
        for secret in ("f1rst", "s3cond", "Bearer"):
            self.assertNotIn(secret, heard)
        kept = subprocess.run(["grep", "-rlE", "f1rst|s3cond", device.state_dir], stdout=subprocess.PIPE).stdout
        self.assertEqual(kept, b"")
        support.write(token, "two\nlines", 0o600)
        self.assertIn("git.token_file", device.cycle(5))
        os.remove(token)
        self.assertIn("FAIL identity  git.token_file", device.run("doctor").stdout)

    def test_doctor_warns_of_credentials_that_others_can_read(self):
        token = support.write(os.path.join(self.repository.folder, "token"), "x", 0o644)
        device = self.make_device(self.repository.url, git_token_file=token)
        self.publish("one")
        self.assertIn(f"warn identity  git.token_file {token} has mode 0644", device.run("doctor").stdout)

    def test_a_server_of_another_authority(self):
        server = git_server.GitServer(self, self.pki, self.repository.served)
        device = self.make_device(server.url + "/fleet.git", identity_ca=self.pki.path("ca.pem"))
        self.assertIn("the peer's certificate is refused", device.cycle(5))
        self.assertEqual(server.requests, [])

    def test_a_proxy_of_the_machine_has_no_say(self):
        """RFC 9525: git asks none, so neither does the look at the certificate before it, nor the question why it failed."""
        self.publish("one")
        server = git_server.GitServer(self, self.pki, self.repository.served)
        for name, code in (("site-ca.pem", 0), ("ca.pem", 5)):
            device = self.make_device(server.url + "/fleet.git", identity_ca=self.pki.path(name))
            device.env.update(https_proxy="http://127.0.0.1:1", no_proxy="")
            done = device.run("plan")
            self.assertEqual(done.returncode, code, done.stderr)
        self.assertIn("the peer's certificate is refused", done.stderr)


class Trouble(GitCase):
    """Servers that do not answer, or answer something else; a disk that spoils; a process that is killed."""

    def start(self):
        """An https server and a device of it that runs the first commit."""
        self.publish("one")
        self.server = git_server.GitServer(self, self.pki, self.repository.served)
        self.device = self.make_device(self.server.url + "/fleet.git", identity_ca=self.pki.path("site-ca.pem"))
        self.device.cycle()

    def forget_patience(self, device=None):
        """Lets the next run speak at once."""
        device = device or self.device
        support.write(os.path.join(device.state_dir, "state.json"), json.dumps(dict(device.state(), patience={}, waits={})))

    def test_what_the_server_answers_becomes_the_exit_code(self):
        """C-056: 401, 403: 5; 404 and redirects: 4, and not followed; busy: 3, for as long as it says."""
        self.start()
        for status, headers, code, words in [
                (401, {}, 5, "HTTP 401"), (403, {}, 5, "HTTP 403"), (404, {}, 4, "HTTP 404"),
                (302, {"Location": self.server.url + "/other.git"}, 4, "redirects are not followed"), (503, {"Retry-After": "77"}, 3, "HTTP 503")]:
            self.server.answer = status, headers
            self.assertIn(words, self.device.cycle(code))
        self.assertGreaterEqual(self.device.state()["patience"]["delay"], 77)
        self.assertFalse([path for _, path, _, _ in self.server.requests if "other.git" in path])
        self.assertEqual(self.running(), [["GREETING=one"]])

    def test_a_folder_that_cannot_be_made_is_a_fault_of_storage(self):
        self.publish("one")
        support.write(os.path.join(self.device.state_dir, "git"), "in its place")
        self.assertIn("git failed (File exists); something else lies in its place", self.device.cycle(3))

    def test_a_status_waits_until_the_server_is_back(self):
        """C-139, C-232: what runs is kept up without the server; the report follows, one commit, with the newest state."""
        self.start()
        with self.engine.open() as held:
            held["containers"] = {}
        self.server.answer = 503, {}
        self.device.cycle(3)
        self.assertEqual(self.running(), [["GREETING=one"]])
        self.server.answer = None
        self.forget_patience()
        self.device.cycle()
        self.assertEqual(self.device.status()["outbox"], 0)
        self.assertEqual(self.report()["status"]["state"], "installed")

    def test_a_repository_that_may_be_read_only(self):
        """A push that is refused is told as it is, and nothing is lost."""
        self.start()
        self.repository.git("config", "http.receivepack", "false", cwd=self.repository.bare)
        self.publish("two")
        self.assertIn("HTTP 403", self.device.cycle(5))
        # it waits in the outbox: 3 while its back-off of a second lasts, 5 once it was tried again
        self.assertIn(self.device.run("run", "--once").returncode, (3, 5))
        self.assertEqual(self.device.status()["outbox"], 1)
        self.repository.git("config", "http.receivepack", "true", cwd=self.repository.bare)
        self.forget_patience()
        self.device.cycle()
        self.assertEqual((self.running(), self.report()["status"]["state"]), ([["GREETING=two"]], "installed"))

    def test_a_server_that_has_lost_what_its_branch_names_is_unreachable(self):
        """P-14: it is asked once more from the beginning, and what runs is left as it is."""
        self.start()
        self.publish("two")
        blob = self.repository.git("rev-parse", "HEAD:apps/hello.yaml").strip()
        os.remove(os.path.join(self.repository.bare, "objects", blob[:2], blob[2:]))
        log = self.device.cycle(3)
        self.assertIn("the copy of the repository is made anew", log)
        self.assertIn(f"{self.server.url}/fleet.git: git fetch", log)
        self.assertEqual(self.running(), [["GREETING=one"]])

    def test_what_the_disk_has_spoilt_is_made_anew(self):
        """P-14: whatever is broken in the copy, an unchanged poll does not care and the next change is taken, rewrites still refused."""
        self.start()
        root = os.path.join(self.device.state_dir, "git", "repository")

        def spoil_objects():
            for folder, _, names in os.walk(os.path.join(root, "objects")):
                for name in names:
                    os.chmod(os.path.join(folder, name), 0o600)
                    support.write(os.path.join(folder, name), b"\0" * 100)

        def empty_refs():
            for name in ("base", "head"):
                support.write(os.path.join(root, "refs", "margo", name), "")

        accidents = [spoil_objects, empty_refs, lambda: support.write(os.path.join(root, "config"), "[core"),
                     lambda: support.write(os.path.join(root, "HEAD"), ""), lambda: support.write(os.path.join(root, "shallow.lock"), ""),
                     lambda: support.write(os.path.join(root, "shallow"), "x"), lambda: shutil.rmtree(os.path.join(root, "objects")),
                     lambda: support.write(os.path.join(root, "refs", "margo", "next.lock"), "")]
        for number, accident in enumerate(accidents):
            with self.subTest(number):
                accident()
                self.device.cycle()
                self.publish(str(number))
                self.device.cycle()
                self.assertEqual(self.running(), [[f"GREETING={number}"]])
        spoil_objects()
        self.publish("rewritten", push=False, options=["--amend"])
        self.repository.push("--force")
        self.assertIn("does not descend", self.device.cycle(4))

    def test_a_copy_that_has_grown_is_begun_anew(self):
        """P-21: nothing tidies the copy, so after many fetches it is thrown away."""
        self.publish("one")
        self.device.cycle()
        packs = os.path.join(self.device.state_dir, "git", "repository", "objects", "pack")
        for number in range(3 * margo_agent.MAX_PACKS):
            support.write(os.path.join(packs, f"tmp_pack_{number}"), "left behind by a fetch that was killed")
        self.publish("two")
        self.device.cycle()
        self.assertLess(len(os.listdir(packs)), 20)
        self.assertEqual(self.running(), [["GREETING=two"]])

    def test_a_document_that_the_disk_lost_is_read_again(self):
        """D-9: an unchanged head is no reason to leave it missing here."""
        self.publish("one")
        self.device.cycle()
        folder = os.path.join(self.device.state_dir, "artifacts")
        for name in os.listdir(folder):
            os.remove(os.path.join(folder, name))
        with self.engine.open() as held:
            held["containers"] = {}
        self.assertIn("its document is missing", self.device.cycle(1))
        self.device.cycle()
        self.assertEqual(self.running(), [["GREETING=one"]])

    def test_a_descent_is_proved_where_the_server_gives_no_single_commits(self):
        """C-256: over the old protocol a commit that no branch ends at cannot be asked for; then the branch's history tells."""
        self.publish("one")
        self.device.cycle()
        self.publish("two")
        self.publish("three")
        shutil.rmtree(os.path.join(self.device.state_dir, "git"))
        folder = support.make_folder(self)
        support.write(os.path.join(folder, "git"), f"#!/bin/sh\nexec {shutil.which('git')} -c protocol.version=0 \"$@\"\n", 0o755)
        self.device.env["PATH"] = f"{folder}:{self.device.env['PATH']}"
        self.device.cycle()
        self.assertEqual(self.running(), [["GREETING=three"]])

    def test_a_kill_in_the_middle_is_harmless(self):
        """Killed with -9 at any git command, the next run converges and every report is there."""
        self.publish("one")
        real, folder = shutil.which("git"), support.make_folder(self)
        self.device.env["PATH"] = f"{folder}:{self.device.env['PATH']}"
        for number, command in enumerate(("init", "fetch", "ls-tree", "fast-import", "push", "update-ref", "cat-file")):
            with self.subTest(command):
                support.write(os.path.join(folder, "git"), "\n".join([
                    "#!/bin/sh", f'if [ "$2" = {command} ] && [ ! -e {folder}/{command} ]; then : > {folder}/{command}; kill -9 $PPID; fi',
                    f'exec {real} "$@"', ""]), 0o755)
                if number:
                    self.publish(command)
                self.assertEqual(self.device.run("run", "--once").returncode, -signal.SIGKILL)
                self.device.cycle()
                self.assertEqual(self.running(), [[f"GREETING={command if number else 'one'}"]])
                self.assertEqual(self.report()["status"]["state"], "installed")

    def test_without_git(self):
        self.publish("one")
        self.device.env["PATH"] = os.path.dirname(self.engine.env["PATH"].split(":")[0]) + "/bin"
        for arguments in (("run", "--once"), ("plan",), ("doctor",)):
            done = subprocess.run([shutil.which("python3")] + self.device.command(*arguments)[1:], env=self.device.env, stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT, universal_newlines=True)
            self.assertIn("git is not installed", done.stdout)
            self.assertEqual(done.returncode, 2)


class Hostile(GitCase):
    """Repositories that mean harm, or look like it: nothing of them is run, followed or written outside the copy."""

    def check_links(self, *facts):
        """Commits links and submodules beside a good deployment, as plumbing makes them; facts: (mode, object, path)."""
        self.publish("good")
        for mode, blob, path in facts:
            self.repository.git("update-index", "--add", "--cacheinfo", f"{mode},{blob},{path}")
        self.repository.git("commit", "--quiet", "-m", "hostile")
        self.repository.push()
        log = self.device.cycle()
        self.assertEqual(self.running(), [["GREETING=good"]])
        return log

    def test_links_and_submodules_are_not_followed(self):
        target = self.repository.git("hash-object", "-w", "--stdin", data=b"/etc/passwd")
        log = self.check_links(("120000", target, "apps/link.yaml"), ("120000", target, "apps/folder"), ("160000", "1" * 40, "apps/module.yaml"))
        for name in ("apps/link.yaml", "apps/module.yaml"):
            self.assertIn(f"ignored: not a file name={name}", log)

    def test_a_module_file_that_fetches_from_elsewhere(self):
        marker = os.path.join(self.repository.folder, "fetched")
        self.repository.commit({".gitmodules": f'[submodule "x"]\n path = apps/m\n url = ext::sh -c "touch% {marker}"\n update = !touch {marker}\n'})
        self.check_links(("160000", "1" * 40, "apps/m"))
        self.assertFalse(os.path.exists(marker))

    def test_odd_names_are_names(self):
        """A name is an option, a newline, bytes that are no text, or leads elsewhere: each is read like any other."""
        text = [support.make_deployment(item, f"app-{index}", registry=self.wfm.registry) for index, item in enumerate(IDS[:5])]
        names = [b"-rf.yaml", b"--output=x\n100644 blob.yaml", b"\xff\xfe.yml", b"a b/\t$(touch x);`x`.yaml", b":(top).YAML"]
        blobs = [self.repository.git("hash-object", "-w", "--stdin", data=item.encode()) for item in text]
        lines = b"".join(b"100755 %s 0\tapps/%s\0" % (blob.encode(), name) for blob, name in zip(blobs, names))
        self.repository.git("update-index", "-z", "--index-info", data=lines)
        self.repository.git("commit", "--quiet", "-m", "odd")
        self.repository.push()
        self.device.cycle()
        self.assertEqual(len(self.engine.containers()), 5)

    def test_a_long_name_is_a_document_too(self):
        """What a log would cut is not cut where it decides: a deployment in a deep folder is not removed for that."""
        listing = b"100644 blob %s 5\t%s\0" % (b"1" * 40, b"sites/" * 50 + b"app.yaml")
        ((name, blob, size),), ignored = margo_agent.find_blobs(listing, 10)
        self.assertEqual((blob, size, ignored, name), ("1" * 40, 5, [], "sites/" * 50 + "app.yaml"))

    def test_attributes_and_hooks_have_no_say(self):
        """Neither those of the repository, nor a hook or a filter that the machine's or the user's configuration names."""
        marker = os.path.join(self.repository.folder, "ran")
        home = self.device.env["HOME"]
        hook = f"#!/bin/sh\ntouch {marker}\n"
        for folder in (os.path.join(home, "hooks"), os.path.join(self.repository.bare, "hooks")):
            for name in ("post-checkout", "reference-transaction", "pre-push", "post-merge", "fsmonitor", "pre-receive", "post-update"):
                support.write(os.path.join(folder, name), hook, 0o755)
        support.write(os.path.join(home, ".gitconfig"), f"[core]\n hooksPath = {home}/hooks\n fsmonitor = {home}/hooks/fsmonitor\n sshCommand = touch {marker}\n"
                      f"[filter \"x\"]\n smudge = touch {marker}\n clean = touch {marker}\n[credential]\n helper = !touch {marker}\n"
                      f"[url \"ext::touch {marker} \"]\n insteadOf = file://\n[protocol]\n allow = always\n")
        self.device.env.update(GIT_SSH_COMMAND=f"touch {marker}", GIT_ASKPASS=hook, GIT_TEMPLATE_DIR=home, GIT_DIR="/nowhere",
                               GIT_CONFIG_PARAMETERS=f"'core.hooksPath={home}/hooks'", GIT_TRACE=marker)
        self.repository.commit({".gitattributes": "* filter=x ident text eol=crlf export-subst\n"})
        first = self.publish("one $Id$ line")
        os.remove(marker)                           # those of the served repository ran for the operator who pushed
        self.device.cycle()
        data = self.repository.git("cat-file", "blob", "main:apps/hello.yaml", cwd=self.repository.bare)
        self.assertEqual(self.device.status()["deployments"][0]["digest"], support.digest(data.encode()))
        self.assertEqual(self.report()["commit"], first)
        self.assertFalse(os.path.exists(marker))

    def test_a_fetch_has_a_limit(self):
        """A repository that would fill the disk is refused, says what to do, and leaves nothing behind."""
        self.publish("one")
        self.device.cycle()
        support.write(os.path.join(self.repository.work, "blob"), os.urandom(600000))
        self.publish("two")
        self.device.set("policy.max_unpacked", "512Ki")
        self.assertIn("more than 524288 bytes to fetch", self.device.cycle(4))
        self.assertEqual(self.running(), [["GREETING=one"]])
        size = sum(os.path.getsize(os.path.join(folder, name)) for folder, _, names in os.walk(os.path.join(self.device.state_dir, "git"))
                   for name in names)
        self.assertLess(size, 100000)
        self.device.set("policy.max_unpacked", "1Mi")
        self.device.cycle()
        self.assertEqual(self.running(), [["GREETING=two"]])

    def test_many_documents_have_a_limit(self):
        """A small pack may hold a lot: the same bytes over and over count each time."""
        self.device.set("policy.max_unpacked", "64Ki")
        self.publish("one")
        self.repository.commit({f"apps/n{number}.yaml": "# " + "x" * 4000 for number in range(20)})
        self.assertIn("policy.max_unpacked", self.device.cycle(4))

    def test_documents_of_other_kinds_are_ignored_with_a_note(self):
        self.repository.commit({"apps/kustomization.yaml": "apiVersion: kustomize.config.k8s.io/v1\nkind: Kustomization\n", "apps/list.yaml": "- 1\n",
                                "apps/empty.yml": "# none yet\n", "apps/notes.md": "---\n---\n", "ci.yaml": "a: [1", "apps2/x.yaml": "a: [1"})
        self.publish("one")
        log = self.device.cycle()
        for name in ("apps/kustomization.yaml", "apps/list.yaml", "apps/empty.yml"):
            self.assertIn(f"ignored: not an ApplicationDeployment name={name}", log)
        self.assertEqual(self.running(), [["GREETING=one"]])

    def test_every_generation_is_read(self):
        """Protocol 3.3: the ids of documents of 2024 and of today, side by side."""
        folder = os.path.join(support.DATA, "dialects")
        files = []
        for index, name in enumerate(sorted(os.listdir(folder))):
            with open(os.path.join(folder, name), "rb") as file:
                files.append((name, file.read().replace(HELLO.encode(), IDS[index].encode())))
        entries, documents, ignored = margo_agent.parse_files(files)
        self.assertEqual([entry.deployment_id for entry in entries], IDS[:len(files)])
        self.assertEqual((documents, ignored), ({support.digest(data): data for _, data in files}, []))


class Bombs(GitCase):
    """Security 4.15, 4.16: what is small on the wire and large in memory ends a git, not the device."""

    def test_a_bomb_takes_no_more_memory_than_the_device_has(self):
        """Agent and helpers together; each row is refused by words, or read within the limit."""
        support.require("cryptography")
        for kind, words in (("git: one delta of 64 MiB", "git fetch takes more than 50331648 bytes of memory"), ("git: 1,000,000 refs", "git ls-remote takes"),
                            ("git: trees of 10 ** 12 paths", "git ls-tree prints more than 16777216 bytes"),
                            ("git: one blob of 255 MiB", "0 deployments")):
            with self.subTest(kind):
                _, _, peak, _, said = costs.run(kind)
                self.assertIn(words, said)
                self.assertLess(peak, costs.LIMIT)

    def test_a_refused_bomb_leaves_nothing_behind_and_what_runs_stays(self):
        """Poll by poll, pieces of packs would fill the disk."""
        self.publish("one")
        server = git_bombs.BombServer(self, self.pki, self.repository.served)
        device = self.make_device(server.url + "/fleet.git", identity_ca=self.pki.path("site-ca.pem"))
        device.cycle()
        server.bomb = git_bombs.BOMBS["one delta of 64 MiB"]()
        for _ in range(2):
            self.assertIn("bytes of memory", device.cycle(4))
        self.assertFalse(os.path.exists(os.path.join(device.state_dir, "git", "repository")))
        self.assertEqual(self.running(), [["GREETING=one"]])
        server.bomb = None
        self.publish("two")
        device.cycle()
        self.assertEqual(self.running(), [["GREETING=two"]])

    def test_every_git_has_bounds_of_memory_and_of_what_it_writes(self):
        """They hold for what git itself starts, and not for the agent."""
        folder = support.make_folder(self)
        support.write(os.path.join(folder, "git"), f"#!/bin/sh\necho $2 $3 $4 $(ulimit -d) $(ulimit -f) >> {folder}/notes\nexec {shutil.which('git')} \"$@\"\n", 0o755)
        self.device.env["PATH"] = f"{folder}:{self.device.env['PATH']}"
        self.publish("one")
        self.device.cycle()
        with open(os.path.join(folder, "notes")) as file:
            lines = [line.split() for line in file if not line.startswith("version")]
        self.assertLessEqual({"fetch", "ls-tree", "fast-import", "push"}, {line[0] for line in lines})
        self.assertEqual({tuple(line[-2:]) for line in lines}, {("49152", "524288")})

    def test_a_million_paths_that_lie_deep_are_compared_in_no_time(self):
        """Neither long paths nor many folders are taken apart for it."""
        def compare(count):
            deep = b"".join(b"100644 blob %s 5\t%d/%sx.yaml\0" % (b"1" * 40, number, b"f.yaml/" * 500) for number in range(count))
            self.assertEqual(margo_agent.find_suspects(deep, deep, set()), [])

        support.check_growth(self, compare, 500)
        long = b"100644 blob %s 5\t%sx.yaml\0" % (b"1" * 40, b"a/" * 3000)
        with self.assertRaisesRegex(margo_agent.Refused, "a path of more than 4096 characters"):
            margo_agent.find_blobs(long, 10)
        many = b"".join(b"120000 blob %s 5\t%d.yaml\0" % (b"1" * 40, number) for number in range(10001))
        with self.assertRaisesRegex(margo_agent.Refused, "more than 10000 YAML files"):
            margo_agent.find_blobs(many, 10)


class Reports(GitCase):
    """The branch of a device, and a WFM beside the repository."""

    def test_a_copy_that_the_disk_has_spoilt_keeps_no_workload_waiting(self):
        """P-4, P-14: what it is needed for waits, what runs is mended."""
        self.publish("one")
        self.device.cycle()
        copy = [folder for folder, names, _ in os.walk(self.device.state_dir) if "objects" in names][0]
        os.remove(os.path.join(copy, "HEAD"))
        self.engine.change(containers={})
        remove = shutil.rmtree

        def deny(path, *args, **options):
            if path.startswith(copy):
                raise OSError(errno.EIO, os.strerror(errno.EIO), path)
            remove(path, *args, **options)

        config = margo_agent.load_config(self.device.config_file)
        with mock.patch.dict(os.environ, self.engine.env), mock.patch("shutil.rmtree", deny):
            outcome = margo_agent.Agent(config).cycle()
        self.assertEqual((outcome.code, self.running()), (3, [["GREETING=one"]]))
        self.device.run("retry")                    # the report would wait its time
        self.device.cycle(0)

    def test_every_change_is_a_commit_and_a_race_is_lost_with_grace(self):
        """C-252: what somebody else pushes meanwhile stays, the report goes on top; nothing is ever forced."""
        self.publish("one")
        self.device.cycle()
        self.assertEqual(self.repository.log(STATUS), ["Capabilities"] + [f"{HELLO}: {state}" for state in ("pending", "installing", "installed")])
        folder, real = support.make_folder(self), shutil.which("git")
        other = self.repository.work + "-other"
        self.repository.git("clone", "--quiet", "-b", STATUS, self.repository.bare, other)
        support.write(os.path.join(folder, "git"), "\n".join([
            "#!/bin/sh", f'if [ "$2" = push ] && [ "$(ls {folder} | wc -l)" -lt 4 ]; then', f"  touch {folder}/$$; cd {other}",
            f"  env {' '.join(f'{key}={value}' for key, value in self.repository.env.items() if key != 'PATH')} sh -c '"
            f"{real} pull --quiet --rebase; echo note >> notes.txt; {real} add .; {real} commit --quiet -m note; {real} push --quiet' >&2", "fi",
            f'cd "$HOME"; exec {real} "$@"', ""]), 0o755)
        self.device.env["PATH"] = f"{folder}:{self.device.env['PATH']}"
        self.publish("two")
        self.device.cycle()
        self.assertEqual(self.repository.show(STATUS, "notes.txt"), "note\nnote\nnote")
        self.assertEqual(self.report()["status"]["state"], "installed")
        self.assertEqual(sorted(self.repository.log(STATUS)[4:]), sorted(["note"] * 3 + [f"{HELLO}: {x}" for x in ("pending", "installing", "installed")]))

    def test_a_race_that_never_ends_leaves_the_status_in_the_outbox(self):
        self.publish("one")
        self.device.cycle()
        folder, real = support.make_folder(self), shutil.which("git")
        support.write(os.path.join(folder, "git"), "\n".join([
            "#!/bin/sh", 'if [ "$2" = push ]; then', f"  cd {self.repository.bare}",
            f"  new=$(echo x | {real} -c user.name=x -c user.email=x@x commit-tree -p {STATUS} {STATUS}^{{tree}})",
            f"  {real} update-ref refs/heads/{STATUS} $new", "fi", f'cd "$HOME"; exec {real} "$@"', ""]), 0o755)
        path = self.device.env["PATH"]
        self.device.env["PATH"] = f"{folder}:{path}"
        self.publish("two")
        self.assertIn("was moved 5 times", self.device.cycle(3))
        self.assertEqual(self.running(), [["GREETING=two"]])
        self.device.env["PATH"] = path
        support.write(os.path.join(self.device.state_dir, "state.json"), json.dumps(dict(self.device.state(), patience={}, waits={})))
        self.device.cycle()
        self.assertEqual(self.report()["status"]["state"], "installed")

    def test_a_lost_answer_makes_no_second_commit(self):
        """A push that reached the server although its answer did not come back is found there."""
        folder, real = support.make_folder(self), shutil.which("git")
        support.write(os.path.join(folder, "git"), f'#!/bin/sh\n{real} "$@" || exit\n[ "$2" != push ] || exit 128\n', 0o755)
        self.device.env["PATH"] = f"{folder}:{self.device.env['PATH']}"
        self.publish("one")
        self.device.cycle()
        self.assertEqual(self.repository.log(STATUS), ["Capabilities"] + [f"{HELLO}: {state}" for state in ("pending", "installing", "installed")])

    def test_each_device_has_its_branch(self):
        device = self.make_device(self.repository.url, device_id="hall/~2..x")
        self.repository.commit({"apps/x.yaml": support.make_deployment(device="hall/~2..x", registry=self.wfm.registry)})
        device.cycle()
        self.assertEqual(self.report(branch="status/hall/%7E2%2E.x")["deviceId"], "hall/~2..x")

    def test_reports_to_a_wfm_beside_the_repository(self):
        """C-252, C-255: with wfm.status_url the mtls API is told, and the repository is only read."""
        device = self.make_device(self.repository.url, wfm_status_url=self.wfm.url)
        device.set("identity.certificate", self.pki.path("client.pem"))
        device.set("identity.key", self.pki.path("client.key"))
        device.set("identity.trust_bundle", self.pki.path("bundle.json"))
        commit = self.publish("one")
        device.cycle()
        self.assertEqual(self.wfm.statuses()[-1], "installed")
        body = self.wfm.reports()[-1]["body"]
        self.assertEqual((body["commit"], f"{body['adoptedManifestVersion']:012x}"), (commit, commit[:12]))
        self.assertEqual([path for _, path, _ in self.wfm.requests() if path == "/api/v1/deployments"], [])
        self.assertEqual(self.repository.git("branch", "--list", "status/*", cwd=self.repository.bare), "")
        count = len(self.wfm.requests())
        device.cycle()
        self.assertEqual(len(self.wfm.requests()), count)
        self.assertEqual(device.run("unenroll").returncode, 0)
        self.assertEqual(self.wfm.requests()[-1][0], "DELETE")


class Addresses(unittest.TestCase):
    """What a repository may be called by: no road that was not asked for, no option, no password."""

    def check(self, **settings):
        """The configuration, or the words of its faults."""
        document = {"wfm": {"profile": "git"}}
        for key, value in settings.items():
            section, _, name = key.partition("_")
            document.setdefault(section, {})[name] = value
        try:
            return margo_agent.make_config(document, "/etc/margo", {})
        except margo_agent.ConfigError as error:
            return error.message

    def test_every_road_is_taken_as_it_is(self):
        """C-254"""
        for url in ("https://git.factory.example:8443/line/4.git", "ssh://git@git.factory.example:2222/line/4.git", "git@git.factory.example:line/4.git",
                    "ssh://[fd00::7]/srv/4.git", "file:///srv/git/line 4.git"):
            self.assertEqual(getattr(self.check(wfm_url=url), "wfm", {}).get("url"), url)

    def test_what_is_no_address_is_refused(self):
        for url in ("ext::sh -c 'touch /tmp/x'", "ext::sh", "fd::17", "-uexec", "--upload-pack=touch", "ssh://-oProxyCommand=touch/x", "-o:x", "a:-x",
                    "ssh://git@host/a b", "git://host/x", "http://host/x", "ftp://host/x", "file://host/x", "file:///a\nb", "/srv/git", "../x",
                    "https://user:secret@host/x", "https://token@host/x", "ssh://git:secret@host/x", "transport::https://host/x", "a::b"):
            words = self.check(wfm_url=url)
            self.assertIn("wfm.url: found", words)
            self.assertIn("expected an ", words)

    def test_settings_that_need_one_another(self):
        url = "https://git.factory.example/x"
        for settings, words in [
                ({}, "wfm.url: not set, and needed for profile git"), ({"wfm_url": url, "wfm_status_url": url}, "identity.certificate: not set"),
                ({"wfm_url": url, "wfm_status_url": url}, "identity.trust_bundle: not set"),
                ({"wfm_url": url, "git_verify_signatures": True}, "git.allowed_signers: not set"),
                ({"wfm_url": url, "git_allow_rewrite": True}, "set git.verify_signatures"), ({"wfm_url": url, "git_username": "x"}, "git.token_file"),
                ({"wfm_url": url, "git_branch": "-x"}, "git.branch: found"), ({"wfm_url": url, "git_branch": "a..b"}, "git.branch: found"),
                ({"wfm_url": url, "git_branch": "a.lock"}, "git.branch: found"), ({"wfm_url": url, "git_path": "../x"}, "git.path: found"),
                ({"wfm_url": "ssh://host/x", "wfm_profile": "mtls"}, "expected an absolute https URL"),
                ({"wfm_url": url, "wfm_profile": "mtls", "wfm_status_url": url}, "wfm.status_url: only profile git")]:
            self.assertIn(words, str(self.check(**settings)))

    def test_a_folder_is_taken_with_or_without_slashes(self):
        self.assertEqual(self.check(wfm_url="https://host/x", git_path="/sites/line 4/").git.path, "sites/line 4")

    def test_a_branch_of_a_device_is_one_that_git_allows(self):
        support.require("git")
        for device_id, path in [("line-4-cell-2", "line-4-cell-2"), ("gw/~x", "gw/%7Ex"), (".a..b.", "%2Ea%2E.b%2E"), ("x.lock", "x%2Elock"),
                                ("a.lock/b", "a%2Elock/b"), ("1.2", "1.2")]:
            self.assertEqual(margo_agent.make_ref_path(device_id), path)
            self.assertEqual(subprocess.run(["git", "check-ref-format", f"refs/heads/status/{path}"]).returncode, 0)


class Example(unittest.TestCase):
    """examples/gitfleet.sh, on two real engines."""

    def test_two_devices_follow_one_branch_there_and_back(self):
        support.require("git", "podman")
        done = subprocess.run(["sh", os.path.join(support.EXAMPLES, "gitfleet.sh")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              universal_newlines=True, timeout=300)
        self.assertEqual(done.returncode, 0, done.stdout)
        for device in ("press-1", "press-2"):
            self.assertEqual(re.findall(rf"^{device} runs: (.*)$", done.stdout, re.M),
                             ["Hello from the press shop", "Good evening, press shop", "Hello from the press shop"])
        self.assertIn("nothing is left behind", done.stdout)


if __name__ == "__main__":
    unittest.main()
