"""Section 10, Desired-state sources: profile git, with real git over https, ssh and files; every road, every refusal, every accident."""
import getpass
import json
import os
import shutil
import subprocess
import types
import unittest

import margo_agent
from tests import git_server, support
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
        self.assertEqual([line.split()[1] for line in tell().splitlines() if line.startswith("--git-dir")], ["ls-remote"])
        second = self.publish("two")
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
        self.assertIn("Host key verification failed", device.cycle(3))

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
        for device_id, path in [("line-4-cell-2", "line-4-cell-2"), ("gw/~x", "gw/%7Ex"), (".a..b.", "%2Ea%2E.b%2E"), ("x.lock", "x%2Elock"),
                                ("a.lock/b", "a%2Elock/b"), ("1.2", "1.2")]:
            self.assertEqual(margo_agent.make_ref_path(device_id), path)
            self.assertEqual(subprocess.run(["git", "check-ref-format", f"refs/heads/status/{path}"]).returncode, 0)


if __name__ == "__main__":
    unittest.main()
