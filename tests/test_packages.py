"""Packages: OCI manifests, hostile archives, unpacking, and registries from the example's to a real one."""
import base64
import contextlib
import gzip
import http.server
import io
import json
import os
import resource
import shutil
import ssl
import stat
import subprocess
import tarfile
import threading
import tracemalloc
import unittest
import urllib.error
import urllib.request
from unittest import mock

import margo_agent
from margo_agent import ComponentError
from tests import support
from tests.support import digest, make_archive, make_folder, require, write

ARTIFACT = "application/vnd.org.margo.component.compose+json"
LAYER = "application/vnd.org.margo.component.compose.tar+gzip"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
EMPTY = "application/vnd.oci.empty.v1+json"
MIB = 1024 * 1024
COMPOSE = '{"services": {"main": {"image": "localhost/margo-test:1"}}}'
PACKAGE = make_archive({"compose.yaml": COMPOSE, "conf/settings.ini": "[a]\nb = 1\n"})
SECRET = "open sesame"
COMPOSE_NAMES = ("compose.yaml", "compose.yml", "docker-compose.yaml", "docker-compose.yml")


# ----------------------------------------------------------------------------------------------------------------------
# OCI manifests
# ----------------------------------------------------------------------------------------------------------------------

def make_manifest(layer=PACKAGE, layer_members=None, **members):
    """The OCI manifest of a Compose Archive as bytes; a member given as the word "dropped" is left out."""
    descriptor = dict({"mediaType": LAYER, "digest": digest(layer), "size": len(layer)}, **(layer_members or {}))
    manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "artifactType": ARTIFACT,
                "config": {"mediaType": EMPTY, "digest": digest(b"{}"), "size": 2},
                "layers": [{key: value for key, value in descriptor.items() if value != "dropped"}]}
    manifest.update(members)
    return json.dumps({key: value for key, value in manifest.items() if value != "dropped"}).encode()


ONE_LAYER = {"mediaType": LAYER, "digest": digest(PACKAGE), "size": len(PACKAGE)}
VALID_MANIFESTS = [
    ("plain", make_manifest()),
    ("without its own mediaType", make_manifest(mediaType="dropped")),
    ("with annotations", make_manifest(annotations={"org.margo.component.type": "compose"},
                                       layer_members={"annotations": {"a": "b"}})),
    ("with a title that is a path",
     make_manifest(layer_members={"annotations": {"org.opencontainers.image.title": "../../etc/x"}})),
    ("with members nobody knows", make_manifest(future={"a": [1]}, layer_members={"future": True})),
    ("with another config", make_manifest(config={"mediaType": "application/json", "digest": digest(b"x"), "size": 1})),
]
INVALID_MANIFESTS = [
    ("no JSON", b"<html>", "not usable JSON"),
    ("nothing at all", b"", "not usable JSON"),
    ("not UTF-8", b"\xff\xfe{}", "not usable JSON"),
    ("a member twice", make_manifest()[:-1] + b', "schemaVersion": 2}', "a member occurs twice"),
    ("a list", b"[]", "schemaVersion 2"),
    ("schema 1", make_manifest(schemaVersion=1), "schemaVersion 2"),
    ("schema as text", make_manifest(schemaVersion="2"), "schemaVersion 2"),
    ("no schema", make_manifest(schemaVersion="dropped"), "schemaVersion 2"),
    ("an index", json.dumps({"schemaVersion": 2, "manifests": [ONE_LAYER]}).encode(), "an index of several images"),
    ("an index with layers", make_manifest(manifests=[]), "an index of several images"),
    ("no artifactType", make_manifest(artifactType="dropped"), "artifactType is None, expected " + ARTIFACT),
    ("a container image", make_manifest(artifactType="application/vnd.oci.image.config.v1+json"),
     "artifactType is application/vnd.oci.image"),
    ("artifactType with a parameter", make_manifest(artifactType=ARTIFACT + ";v=1"), "expected " + ARTIFACT),
    ("artifactType in capitals", make_manifest(artifactType=ARTIFACT.upper()), "expected " + ARTIFACT),
    ("docker compose publish", make_manifest(artifactType="application/vnd.docker.compose.project"),
     "made by `docker compose publish`"),
    ("no layers", make_manifest(layers="dropped"), "expected exactly one layer"),
    ("an empty list of layers", make_manifest(layers=[]), "expected exactly one layer"),
    ("two layers", make_manifest(layers=[ONE_LAYER, ONE_LAYER]), "expected exactly one layer"),
    ("layers as a mapping", make_manifest(layers={"0": ONE_LAYER}), "expected exactly one layer"),
    ("a layer that is text", make_manifest(layers=["x"]), "expected exactly one layer"),
    ("a tar without gzip", make_manifest(layer_members={"mediaType": LAYER.replace("+gzip", "")}),
     "the layer's mediaType is application/vnd"),
    ("an image's layer", make_manifest(layer_members={"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip"}),
     "expected " + LAYER),
    ("no mediaType", make_manifest(layer_members={"mediaType": "dropped"}), "the layer's mediaType is None"),
    ("no digest", make_manifest(layer_members={"digest": "dropped"}), "the layer's digest"),
    ("a short digest", make_manifest(layer_members={"digest": digest(b"")[:-1]}), "the layer's digest"),
    ("a long digest", make_manifest(layer_members={"digest": digest(b"") + "0"}), "the layer's digest"),
    ("a digest in capitals", make_manifest(layer_members={"digest": "sha256:" + "AB" * 32}), "the layer's digest"),
    ("sha512", make_manifest(layer_members={"digest": "sha512:" + "ab" * 64}), "the layer's digest"),
    ("a digest that is a path", make_manifest(layer_members={"digest": "sha256:../../" + "a" * 58}),
     "the layer's digest"),
    ("a digest and a line end", make_manifest(layer_members={"digest": digest(b"") + "\n"}), "the layer's digest"),
    ("the layer's size", make_manifest(layer_members={"size": "dropped"}), "the layer's size"),
    ("size 0", make_manifest(layer_members={"size": 0}), "the layer's size"),
    ("a negative size", make_manifest(layer_members={"size": -1}), "the layer's size"),
    ("a broken size", make_manifest(layer_members={"size": 10.0}), "the layer's size"),
    ("size as text", make_manifest(layer_members={"size": "10"}), "the layer's size"),
    ("size as a truth value", make_manifest(layer_members={"size": True}), "the layer's size"),
    ("over the limit", make_manifest(layer_members={"size": MIB + 1}), "1048577 bytes, policy.max_artifact is 1048576"),
    ("nested without end", b'{"a":' * 100000, "not usable JSON"),
]


class Manifests(unittest.TestCase):
    def test_manifests_of_compose_archives_are_read(self):
        """C-155: one layer of the Compose type; annotations and unknown members change nothing."""
        for name, data in VALID_MANIFESTS:
            with self.subTest(name):
                self.assertEqual(margo_agent.parse_package_manifest(data, "r/web:1", MIB),
                                 (digest(PACKAGE), len(PACKAGE)))

    def test_a_layer_may_have_just_the_size_that_is_allowed(self):
        data = make_manifest(layer_members={"size": MIB})
        self.assertEqual(margo_agent.parse_package_manifest(data, "r/web:1", MIB)[1], MIB)

    def test_every_other_manifest_is_refused_with_its_reason_and_its_place(self):
        """C-155, D-8: exactly one layer of exactly this type, its size known and allowed before it is fetched."""
        for name, data, reason in INVALID_MANIFESTS:
            with self.subTest(name):
                with self.assertRaises(ComponentError) as caught:
                    margo_agent.parse_package_manifest(data, "r.example/web:1", MIB)
                self.assertEqual(caught.exception.code, "ARCHIVE_INVALID")
                self.assertTrue(caught.exception.message.startswith("r.example/web:1: "), caught.exception.message)
                self.assertIn(reason, caught.exception.message)

    def test_a_foreign_text_in_the_reason_is_printable(self):
        with self.assertRaises(ComponentError) as caught:
            margo_agent.parse_package_manifest(make_manifest(artifactType="\x1b[2J" + "x" * 5000), "w", MIB)
        self.assertIn("\\x1b[2J", caught.exception.message)
        self.assertTrue(caught.exception.message.isprintable())
        self.assertLess(len(caught.exception.message), 400)


class References(unittest.TestCase):
    def test_references_are_host_name_and_tag(self):
        """C-153: a component's repository and revision say where its package lies."""
        for repository, revision, expected in [
                ("oci://registry.example/web", "1.0.0", ("registry.example", "web", "1.0.0")),
                ("oci://registry.example:5000/a/b/c", "v1", ("registry.example:5000", "a/b/c", "v1")),
                ("oci://localhost:5000/com_example-app.web__x", "1.0.0-rc.1_build.7",
                 ("localhost:5000", "com_example-app.web__x", "1.0.0-rc.1_build.7")),
                ("oci://127.0.0.1:5000/a--b", "_", ("127.0.0.1:5000", "a--b", "_")),
                ("oci://[::1]:5000/web", "1" * 128, ("[::1]:5000", "web", "1" * 128))]:
            with self.subTest(repository):
                self.assertEqual(tuple(margo_agent.parse_reference(repository, revision)), expected)

    def test_what_is_no_reference_is_refused_by_its_name(self):
        """C-153, C-169: no other scheme, no credentials, no path tricks, no digest in place of a tag."""
        host = "oci://registry.example"
        for repository, revision in [
                ("registry.example/web", "1"), ("https://registry.example/web", "1"), (host, "1"), ("oci:///web", "1"),
                (host + "/", "1"), (host + "/Web", "1"), (host + "/a//b", "1"), (host + "/../b", "1"),
            (host + "/a/", "1"),
                ("oci://user:pw@registry.example/web", "1"), (host + "/web?x=1", "1"), (host + "/web#x", "1"),
                (host + "/web\n", "1"), (host + "/web:1", "1"), (host + ":port/web", "1"), (host + "/a_._b", "1"),
                (host + "/-a", "1"), ("oci://reg istry/web", "1"), (host + "/w%65b", "1"), (host + "/web", ""),
                (host + "/web", ".1"), (host + "/web", "1/2"), (host + "/web", "1.0.0+b"), (host + "/web", digest(b"")),
                (host + "/web", "1" * 129), (host + "/web", "1\n"), (host + ":65536/web", "1"),
                (host + ":99999/web", "1")]:
            with self.subTest(repository=repository, revision=revision):
                with self.assertRaises(ComponentError) as caught:
                    margo_agent.parse_reference(repository, revision)
                self.assertEqual(caught.exception.code, "INVALID_DEPLOYMENT")
                self.assertIn(f"{margo_agent.make_printable(repository)}:{margo_agent.make_printable(revision)}",
                              caught.exception.message)

    def test_a_host_that_is_none_fails_its_component_only(self):
        """C-153: a deployment can name any host; what comes of the name is an answer, never an accident."""
        store = margo_agent.Store(make_folder(self))
        store.create()
        for host in ("[1]", "[::::]", "[:]:5000", "..", "-", "a..b", "x" * 300):
            with self.subTest(host):
                with self.assertRaises(ComponentError) as caught:
                    reference = margo_agent.parse_reference(f"oci://{host}/web", "1")
                    margo_agent.fetch_package(reference, make_config({}), store)
                self.assertIn(caught.exception.code, ("INVALID_DEPLOYMENT", "PULL_FAILED"))
                self.assertIn(host, caught.exception.message)


class Challenges(unittest.TestCase):
    def test_challenges_are_read(self):
        """Protocol 6.2, RFC 9110, 11.6.1: schemes in any case, quoted values with commas and escapes, several."""
        for header, expected in [
                (None, []), ("", []), ("Basic", [("basic", {})]),
                ('Basic realm="Registry Realm"', [("basic", {"realm": "Registry Realm"})]),
                ("BEARER Realm=https://a/t,Service=s", [("bearer", {"realm": "https://a/t", "service": "s"})]),
                ('Bearer realm="https://a/t",service="s",scope="repository:w:pull,push"',
                 [("bearer", {"realm": "https://a/t", "service": "s", "scope": "repository:w:pull,push"})]),
                ('Bearer realm="a \\"b\\" \\\\c" , scope=""', [("bearer", {"realm": 'a "b" \\c', "scope": ""})]),
                ('Basic realm="a, Bearer realm=b", Bearer realm="c", error="invalid_token"',
                 [("basic", {"realm": "a, Bearer realm=b"}), ("bearer", {"realm": "c", "error": "invalid_token"})]),
                ('Negotiate, Basic realm="a"', None)]:
            with self.subTest(header):
                found = margo_agent.parse_challenge(header)
                if expected is None:
                    self.assertIn(("basic", {"realm": "a"}), found)
                else:
                    self.assertEqual(found, expected)


# ----------------------------------------------------------------------------------------------------------------------
# Archives
# ----------------------------------------------------------------------------------------------------------------------

def entry(name, content=b"", kind=tarfile.REGTYPE, link="", mode=0o644, **fields):
    """One entry for `pack`: a TarInfo and its bytes."""
    info = tarfile.TarInfo(name)
    content = content.encode() if isinstance(content, str) else content
    if kind not in tarfile.REGULAR_TYPES:
        content = b""                               # as every archiver has it
    info.type, info.linkname, info.mode, info.size = kind, link, mode, len(content)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, content


def folder(name, **fields):
    return entry(name, kind=tarfile.DIRTYPE, **fields)


def symlink(name, target, **fields):
    return entry(name, kind=tarfile.SYMTYPE, link=target, **fields)


def hardlink(name, target, **fields):
    return entry(name, kind=tarfile.LNKTYPE, link=target, **fields)


def pack_plain(*entries, form=tarfile.PAX_FORMAT):
    """A tar of these entries, whatever they are."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for info, content in entries:
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def pack(*entries, form=tarfile.PAX_FORMAT):
    """The same, compressed."""
    return gzip.compress(pack_plain(*entries, form=form), 1)


def start():
    """The one entry that each archive needs."""
    return entry("app/compose.yaml", COMPOSE)


def list_tree(top):
    """{path: what it is} of all below a folder; links are not followed."""
    found = {}
    for root, folders, files in os.walk(top):
        for name in folders + files:
            path = os.path.join(root, name)
            status = os.lstat(path)
            if stat.S_ISLNK(status.st_mode):
                value = ("link", os.readlink(path))
            elif stat.S_ISREG(status.st_mode):
                with open(path, "rb") as file:
                    value = ("file", file.read(), stat.S_IMODE(status.st_mode))
            else:
                value = ("folder" if stat.S_ISDIR(status.st_mode) else "other", stat.S_IMODE(status.st_mode))
            found[os.path.relpath(path, top)] = value
    return found


# name, archive, what the reason says
HOSTILE = [
    # paths (C-158)
    ("an absolute path", pack(start(), entry("/etc/x")), "'/etc/x' is not a path inside the archive"),
    ("an absolute folder", pack(start(), folder("/app")), "'/app' is not a path inside the archive"),
    ("two slashes", pack(start(), entry("//etc/x")), "'//etc/x' is not a path inside"),
    ("a step up", pack(start(), entry("app/../x")), "'app/../x' is not a path inside"),
    ("steps up at the start", pack(start(), entry("../../etc/x")), "'../../etc/x' is not a path inside"),
    ("a step up at the end", pack(start(), folder("app/..")), "'app/..' is not a path inside"),
    ("a step up behind ./", pack(start(), entry("./../x")), "is not a path inside"),
    ("a step up in a PAX path", pack(start(), entry("app/x", pax_headers={"path": "../x"})),
     "'../x' is not a path inside"),
    ("a step up in a GNU long name", pack(start(), entry("../" + "x" * 150), form=tarfile.GNU_FORMAT),
     "is not a path inside"),
    ("a step up as a link's name", pack(start(), symlink("app/../l", "x")), "'app/../l' is not a path inside"),
    ("an empty part", pack(start(), entry("app//x")), "'app//x' is not a path inside"),
    ("a dot within", pack(start(), entry("app/./x")), "'app/./x' is not a path inside"),
    ("a line end in a name", pack(start(), entry("app/a\nb")), "is not a path inside"),
    ("an escape sequence in a name", pack(start(), entry("app/\x1b[2J")), "is not a path inside"),
    ("a name that is no UTF-8", pack(start(), entry("app/\udcff"), form=tarfile.GNU_FORMAT), "is not a path inside"),
    ("a name of 2000 characters", pack(start(), entry("app/" + "x/" * 1000 + "y")), "'app/x/x/x/"),
    ("a NUL in a PAX path", pack(start(), entry("app/x", pax_headers={"path": "app/a\0b"})), "is not a path inside"),
    ("a name that no file system takes", pack(start(), entry("app/" + "n" * 256)), "nnn"),
    ("a name too long in bytes alone", pack(start(), entry("app/" + "\u20ac" * 90)), "\u20ac\u20ac"),
    # one folder at the top (C-156)
    ("two folders at the top", pack(start(), entry("other/x")), "more than one top-level entry (app, other)"),
    ("an empty second folder", pack(start(), folder("other")), "more than one top-level entry (app, other)"),
    ("a file beside the folder", pack(start(), entry("README")), "more than one top-level entry (README, app)"),
    ("a file at the top", pack(entry("compose.yaml", COMPOSE)), "'compose.yaml' stands at the top"),
    ("a link at the top", pack(symlink("app", "x")), "'app' stands at the top"),
    ("a device at the top", pack(entry("app", kind=tarfile.CHRTYPE)), "'app' stands at the top"),
    ("a file in place of the folder", pack(start(), entry("app")), "'app' stands at the top"),
    ("a folder in each of many others", pack(start(), *(entry(f"app/{n}" + "/a" * 200 + "/f") for n in range(60))), "more than 10000 folders"),
    # compose.yaml (C-157)
    ("no compose.yaml", pack(entry("app/README")), "no compose.yaml in the top-level folder"),
    ("compose.yml", pack(entry("app/compose.yml")), "(compose.yml is not taken for it)"),
    ("docker-compose.yaml", pack(entry("app/docker-compose.yaml")), "(docker-compose.yaml is not taken for it)"),
    ("docker-compose.yml", pack(entry("app/docker-compose.yml")), "(docker-compose.yml is not taken for it)"),
    ("Compose.yaml", pack(entry("app/Compose.yaml")), "no compose.yaml in the top-level folder"),
    ("compose.yaml further down", pack(entry("app/sub/compose.yaml")), "no compose.yaml in the top-level folder"),
    ("compose.yaml as a folder", pack(folder("app/compose.yaml")), "no compose.yaml in the top-level folder"),
    ("compose.yaml as a link", pack(entry("app/c"), symlink("app/compose.yaml", "c")),
     "no compose.yaml in the top-level folder"),
    ("a folder and nothing in it", pack(folder("app")), "no compose.yaml in the top-level folder"),
    ("an empty tar", pack(), "it is empty"),
    ("./ alone", pack(folder("./")), "it is empty"),
    # symbolic links (C-159)
    ("an absolute link", pack(start(), symlink("app/l", "/etc/passwd")), "'l' leads out of the top-level folder"),
    ("a link to the root", pack(start(), symlink("app/l", "/")), "'l' leads out of the top-level folder"),
    ("a link to the folder above", pack(start(), symlink("app/l", "..")), "'l' leads out of the top-level folder"),
    ("a link that comes back by name", pack(start(), symlink("app/l", "../app/compose.yaml")), "'l' leads out"),
    ("a link two steps up", pack(start(), symlink("app/s/l", "../../x")), "'s/l' leads out of the top-level folder"),
    ("a link up behind folders", pack(start(), symlink("app/l", "s/../../x")), "'l' leads out of the top-level folder"),
    ("a link that leaves by another", pack(start(), symlink("app/a/b/up", "../.."), symlink("app/l", "a/b/up/../x")),
     "'l' leads out"),
    ("the same, seen the other way round", pack(start(), symlink("app/l", "a/b/up/../x"),
                                                symlink("app/a/b/up", "../..")), "'l' leads out"),
    ("a chain with an absolute end", pack(start(), symlink("app/a", "b"), symlink("app/b", "c"),
                                          symlink("app/c", "/etc")), "leads out"),
    ("a circle", pack(start(), symlink("app/a", "b"), symlink("app/b", "a")), "in a circle"),
    ("a link to itself", pack(start(), symlink("app/a", "a")), "'a' leads out of the top-level folder, or in a circle"),
    ("a PAX link path", pack(start(), symlink("app/l", "x", pax_headers={"linkpath": "../../x"})), "'l' leads out"),
    ("a link to nothing", pack(start(), symlink("app/empty-link", "")), "empty-link"),
    ("a NUL in a link", pack(start(), symlink("app/nul-link", "x", pax_headers={"linkpath": "a\0b"})), "nul-link"),
    ("a link that no file system takes", pack(start(), symlink("app/long-link", "x" * 5000)), "long-link"),
    # hard links (C-159)
    ("an absolute hard link", pack(start(), hardlink("app/h", "/etc/passwd")),
     "the hard link 'app/h' leads to '/etc/passwd'"),
    ("a hard link up", pack(start(), hardlink("app/h", "app/../../etc/passwd")),
     "the hard link 'app/h' leads to 'app/../../etc/passwd'"),
    ("a hard link to another top", pack(start(), hardlink("app/h", "other/compose.yaml")),
     "leads to 'other/compose.yaml'"),
    ("a hard link to nothing there", pack(start(), hardlink("app/h", "app/missing")), "which is no earlier file"),
    ("a hard link to a later file", pack(start(), hardlink("app/h", "app/x"), entry("app/x")),
     "which is no earlier file"),
    ("a hard link to a folder", pack(start(), folder("app/d"), hardlink("app/h", "app/d")), "which is no earlier file"),
    ("a hard link to the top", pack(start(), hardlink("app/h", "app")), "which is no earlier file"),
    ("a hard link to a link", pack(start(), symlink("app/s", "compose.yaml"), hardlink("app/h", "app/s")),
     "which is no earlier file"),
    ("a hard link to itself", pack(start(), hardlink("app/h", "app/h")), "which is no earlier file"),
    # other kinds
    ("a character device", pack(start(), entry("app/null", kind=tarfile.CHRTYPE, devmajor=1, devminor=3)),
     "'app/null' is neither"),
    ("a block device", pack(start(), entry("app/sda", kind=tarfile.BLKTYPE, devmajor=8)),
     "'app/sda' is neither file, folder nor link"),
    ("a fifo", pack(start(), entry("app/pipe", kind=tarfile.FIFOTYPE)), "'app/pipe' is neither file, folder nor link"),
    ("a kind nobody knows", pack(start(), entry("app/z", kind=b"Z")), "'app/z' is neither file, folder nor link"),
    ("a sparse file", pack(start(), entry("app/sparse", b"12345",
                                          pax_headers={"GNU.sparse.map": "0,5", "GNU.sparse.size": "900"})), "sparse"),
    # the same place twice
    ("a file twice", pack(start(), entry("app/x", "1"), entry("app/x", "2")), "'app/x' occurs twice"),
    ("compose.yaml twice", pack(start(), start()), "'app/compose.yaml' occurs twice"),
    ("a file twice, once with ./", pack(start(), entry("app/x"), entry("./app/x")), "'app/x' occurs twice"),
    ("a file and a folder", pack(start(), entry("app/x"), folder("app/x")), "'app/x' occurs twice"),
    ("a folder and a file", pack(start(), folder("app/x"), entry("app/x")), "'app/x' occurs twice"),
    ("a folder and a link", pack(start(), folder("app/x"), symlink("app/x", "compose.yaml")), "'app/x' occurs twice"),
    ("a link and a file", pack(start(), symlink("app/x", "y"), entry("app/x")), "'app/x' occurs twice"),
    ("a link and a folder", pack(start(), symlink("app/x", "y"), folder("app/x")), "'app/x' occurs twice"),
    ("a link twice", pack(start(), symlink("app/x", "y"), symlink("app/x", "y")), "'app/x' occurs twice"),
    ("a file and a hard link", pack(start(), entry("app/x"), hardlink("app/x", "app/compose.yaml")),
     "'app/x' occurs twice"),
    # below what is no folder
    ("a file below a file", pack(start(), entry("app/x"), entry("app/x/y")),
     "'x/y' lies below 'x', which is no folder"),
    ("a file below a later file", pack(start(), entry("app/x/y/z"), entry("app/x")),
     "'x/y/z' lies below 'x', which is no folder"),
    ("a folder below a file", pack(start(), folder("app/compose.yaml/d")),
     "lies below 'compose.yaml', which is no folder"),
    ("a file below a link", pack(start(), folder("app/d"), symlink("app/s", "d"), entry("app/s/x")),
     "'s/x' lies below 's'"),
    ("a file below a later link", pack(start(), entry("app/s/x"), symlink("app/s", "/etc")), "'s/x' lies below 's'"),
    ("a file below a hard link", pack(start(), hardlink("app/h", "app/compose.yaml"), entry("app/h/x")),
     "'h/x' lies below 'h'"),
    # no gzip, no tar, not whole
    ("nothing", b"", "it is cut short"),
    ("a tar without gzip", pack_plain(start()), "incorrect header check"),
    ("zeros", bytes(4096), "incorrect header check"),
    ("no tar in it", gzip.compress(b"<html>no tar</html>" * 100), "Compose Archive refused: "),
    ("nothing in it", gzip.compress(b""), "Compose Archive refused: "),
    ("garbage behind it", pack(start()) + b"garbage", "something follows it"),
    ("a second member behind it", pack(start()) + pack(entry("app/x")), "something follows it"),
    ("a tar that ends within a file", gzip.compress(pack_plain(start(), entry("app/x", "y" * 5000))[:4096]),
     "Compose Archive refused: "),
    ("a tar that is damaged in the middle",
     gzip.compress(pack_plain(start())[:1024] + b"\1" * 512 + pack_plain(entry("app/x"))),
     "Compose Archive refused: "),
    ("headers without end", gzip.compress(pack_plain(entry("app/" + "n" * 150),
                                                     form=tarfile.GNU_FORMAT)[:1024] * 700 + pack_plain(start())),
     "Compose Archive refused: "),
    # more than allowed
    ("a bomb", gzip.compress(pack_plain(start(), entry("app/zero", bytes(2 * MIB)))),
     "more than 1048576 bytes (policy.max_unpacked)"),
    ("a bomb of hard links", pack(start(), entry("app/x", bytes(MIB // 2)),
                                  *[hardlink(f"app/h{n}", "app/x") for n in range(9)]),
     "more than 1048576 bytes (policy.max_unpacked)"),
]

VALID = [
    ("a folder of any name", pack(entry("x y-1.0 \u00e4/compose.yaml", COMPOSE)), {"compose.yaml"}),
    ("with an entry for each folder", pack(folder("app"), folder("app/d"), start(), entry("app/d/x")),
     {"compose.yaml", "d", "d/x"}),
    ("with a leading ./", pack(folder("./"), folder("./app"), entry("./app/compose.yaml")), {"compose.yaml"}),
    ("with ./ in a hard link", pack(entry("./app/compose.yaml"), hardlink("./app/h", "./app/compose.yaml")),
     {"compose.yaml", "h"}),
    ("a folder named twice", pack(start(), folder("app/d"), folder("app/d/")), {"compose.yaml", "d"}),
    ("a folder after what is in it", pack(start(), entry("app/d/x"), folder("app/d", mode=0)),
     {"compose.yaml", "d", "d/x"}),
    ("GNU long names", pack(start(), entry("app/" + "d/" * 60 + "x" * 120), form=tarfile.GNU_FORMAT), None),
    ("PAX long names", pack(start(), entry("app/" + "d/" * 160 + "x" * 200)), None),
    ("names in the ustar prefix", pack(start(), entry("app/" + "d" * 90 + "/" + "x" * 90), form=tarfile.USTAR_FORMAT),
     None),
    ("a PAX global header",
     gzip.compress(tarfile.TarInfo.create_pax_global_header({"comment": "x"}) + pack_plain(start())), {"compose.yaml"}),
    ("names as editors leave them", pack(entry("app/a.tmp", "1"), entry("app/a", "2"), start()),
     {"a.tmp", "a", "compose.yaml"}),
    ("a folder where a temporary file would be", pack(folder("app/a.tmp"), entry("app/a", "2"), start()),
     {"a.tmp", "a", "compose.yaml"}),
    ("links that stay inside", pack(start(), entry("app/d/x"), symlink("app/l", "d/x"), symlink("app/d/up", ".."),
                                    symlink("app/m", "d/up/l"), symlink("app/n", "./d//x")),
     {"compose.yaml", "d", "d/x", "l", "d/up", "m", "n"}),
    ("a link that only seems to leave", pack(start(), folder("app/a/b"), symlink("app/s", "a/b"),
                                             symlink("app/l", "s/../../compose.yaml")),
     {"compose.yaml", "a", "a/b", "s", "l"}),
    ("a link to nothing there", pack(start(), symlink("app/l", "missing")), {"compose.yaml", "l"}),
]


class ArchiveCase(unittest.TestCase):
    def setUp(self):
        self.top = make_folder(self)
        self.parent = os.path.join(self.top, "deployments", "web")

    def unpack(self, data, limit=MIB):
        return margo_agent.unpack_package(data, digest(data), self.parent, limit)

    def refuse(self, data, limit=MIB):
        """The message of the refusal, of which nothing may be left on the disk."""
        before = list_tree(self.top)
        with self.assertRaises(ComponentError) as caught:
            self.unpack(data, limit)
        self.assertEqual(caught.exception.code, "ARCHIVE_INVALID")
        self.assertEqual(list_tree(self.top), before)
        return caught.exception.message


class HostileArchives(ArchiveCase):
    def test_hostile_archives_are_refused_with_their_reason_and_nothing_is_written(self):
        """C-156, C-157, C-158, C-159, C-162, D-8: all of an archive is judged before any of it is unpacked."""
        for name, data, reason in HOSTILE:
            with self.subTest(name):
                message = self.refuse(data)
                self.assertIn(reason, message)
                self.assertTrue(message.isprintable())

    def test_an_archive_cut_anywhere_is_refused(self):
        """C-162: half an archive is none."""
        for length in range(0, len(PACKAGE), 5):
            with self.subTest(length):
                self.assertIn("Compose Archive refused: ", self.refuse(PACKAGE[:length]))

    def test_a_flipped_bit_is_refused(self):
        """C-162: the checksum of gzip is looked at."""
        data = gzip.compress(gzip.decompress(PACKAGE), 0)
        for position in list(range(10, len(data) - 8, 151)) + list(range(len(data) - 8, len(data))):
            with self.subTest(position):
                changed = data[:position] + bytes([data[position] ^ 4]) + data[position + 1:]
                self.assertIn("Compose Archive refused: ", self.refuse(changed))

    def test_the_limit_is_exact(self):
        """D-8: as much as policy.max_unpacked unpacks, one byte more does not."""
        plain = len(gzip.decompress(PACKAGE))
        self.assertIn(f"more than {plain - 1} bytes (policy.max_unpacked)", self.refuse(PACKAGE, plain - 1))
        self.assertTrue(os.path.isdir(self.unpack(PACKAGE, plain)))

    def test_a_bomb_takes_no_more_memory_than_is_allowed(self):
        """D-8: what is over the limit is never in memory."""
        bomb = gzip.compress(bytes(32 * MIB), 1)
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        self.assertIn("policy.max_unpacked", self.refuse(bomb))
        self.assertLess(tracemalloc.get_traced_memory()[1], 8 * MIB)

    def test_entries_are_counted(self):
        """D-8: as many entries as are allowed, and no more."""
        with mock.patch.object(margo_agent, "MAX_ENTRIES", 20):
            many = [entry(f"app/{number}") for number in range(20)]
            self.assertIn("more than 20 entries", self.refuse(pack(start(), *many)))
            self.assertEqual(len(os.listdir(self.unpack(pack(start(), *many[:19])))), 20)


class Unpacking(ArchiveCase):
    def test_valid_archives_are_unpacked_whole(self):
        """C-156: the folder's name does not matter; leading ./, long names and inner links are as good as any."""
        for name, data, paths in VALID:
            with self.subTest(name):
                found = set(list_tree(self.unpack(data)))
                if paths is None:
                    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
                        paths = {item.name.partition("/")[2] for item in archive}
                    self.assertLessEqual(paths, found)
                else:
                    self.assertEqual(found, paths)

    def test_contents_are_those_of_the_archive(self):
        top = self.unpack(pack(start(), entry("app/bin", bytes(range(256)) * 9), entry("app/empty"),
                               hardlink("app/d/h", "app/bin"), entry("app/a.tmp", "of a.tmp"), entry("app/a", "of a"),
                               symlink("app/l", "d/h")))
        tree = {path: value[1] for path, value in list_tree(top).items() if value[0] != "folder"}
        self.assertEqual(tree, {"compose.yaml": COMPOSE.encode(), "bin": bytes(range(256)) * 9, "empty": b"",
                                "d/h": bytes(range(256)) * 9, "a.tmp": b"of a.tmp", "a": b"of a", "l": "d/h"})

    def test_a_hard_link_becomes_a_file_of_its_own(self):
        top = self.unpack(pack(start(), hardlink("app/h", "app/compose.yaml")))
        self.assertEqual(os.stat(os.path.join(top, "h")).st_nlink, 1)

    def test_modes_are_normalised_whatever_archive_and_umask_say(self):
        """C-160, C-161: no setuid, setgid or sticky bit; files 0644 or 0755, folders 0755, all the agent's own."""
        modes = (0o4755, 0o2644, 0o1777, 0o7777, 0o6000, 0o000, 0o666, 0o100, 0o401)
        data = pack(start(), *[entry(f"app/{mode:o}", mode=mode, uid=12345, gid=12345) for mode in modes],
                    folder("app/d", mode=0o7777, uid=12345), entry("app/implied/x", mode=0o600))
        for umask in (0o077, 0o022, 0o000):
            old = os.umask(umask)
            try:
                top = self.unpack(data)
            finally:
                os.umask(old)
            tree = list_tree(top)
            for mode in modes:
                with self.subTest(umask=oct(umask), mode=oct(mode)):
                    self.assertEqual(oct(tree[f"{mode:o}"][2]), oct(0o755 if mode & 0o111 else 0o644))
            for name in ("d", "implied"):
                with self.subTest(umask=oct(umask), folder=name):
                    self.assertEqual((tree[name][0], oct(tree[name][1])), ("folder", oct(0o755)))
            with self.subTest(umask=oct(umask)):
                self.assertEqual(oct(stat.S_IMODE(os.stat(top).st_mode)), oct(0o755))
                self.assertEqual({os.lstat(os.path.join(top, name)).st_uid for name in tree}, {os.geteuid()})
            shutil.rmtree(top)

    def test_a_leftover_of_an_earlier_try_is_replaced(self):
        """C-162: what was half unpacked is never taken for the whole, and no link in it is followed."""
        outside = os.path.join(self.top, "outside")
        write(os.path.join(outside, "kept"), "kept")
        leftover = os.path.join(self.parent, digest(PACKAGE)[7:23] + ".tmp")
        write(os.path.join(leftover, "compose.yaml"), "half")
        write(os.path.join(leftover, "old"), "old")
        os.symlink(outside, os.path.join(leftover, "conf"))
        top = self.unpack(PACKAGE)
        self.assertEqual(os.listdir(self.parent), [os.path.basename(top)])
        self.assertEqual(set(list_tree(top)), {"compose.yaml", "conf", "conf/settings.ini"})
        self.assertEqual(os.listdir(outside), ["kept"])

    def test_an_unpacking_that_fails_leaves_nothing_that_counts(self):
        """P-13, P-4: a full disk in the middle; the next try starts anew and succeeds."""
        data = pack(entry("app/a"), entry("app/big", bytes(100000)), start())
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50000, hard))
        try:
            with self.assertRaises(margo_agent.StorageError) as caught:
                self.unpack(data)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        self.assertIn(self.parent, caught.exception.message)
        self.assertIn("let this service write larger files", caught.exception.message)
        self.assertFalse(os.path.exists(os.path.join(self.parent, digest(data)[7:23])))
        self.assertEqual(set(list_tree(self.unpack(data))), {"a", "big", "compose.yaml"})
        self.assertEqual(os.listdir(self.parent), [digest(data)[7:23]])

    def test_a_package_that_is_there_is_not_unpacked_again(self):
        """P-16: no write where nothing changed."""
        top = self.unpack(PACKAGE)
        before = os.stat(os.path.join(top, "compose.yaml"))
        self.assertEqual(self.unpack(PACKAGE), top)
        self.assertEqual(os.stat(os.path.join(top, "compose.yaml")), before)

    def test_a_package_that_was_spoilt_where_it_lies_is_unpacked_anew(self):
        """Contract, Files: what is unpacked is held against its archive before each use."""
        data = make_archive({"compose.yaml": "{}", "conf/a": "1"})
        top = self.unpack(data)
        path = os.path.join(top, "conf", "a")

        def fill(text):
            with open(path, "w") as file:
                file.write(text)
        for spoil in (lambda: fill("2"), lambda: fill(""), lambda: fill("1" * 9), lambda: os.remove(path), lambda: os.chmod(path, 0o755),
                      lambda: (os.remove(path), os.symlink("../compose.yaml", path))):
            spoil()
            self.assertEqual(self.unpack(data), top)
            with open(path) as file:
                self.assertEqual((file.read(), os.stat(path).st_mode & 0o777, os.path.islink(path)), ("1", 0o644, False))

    def test_versions_lie_beside_one_another(self):
        other = make_archive({"compose.yaml": "{}"})
        self.assertEqual({os.path.basename(self.unpack(PACKAGE)), os.path.basename(self.unpack(other))},
                         set(os.listdir(self.parent)))
        self.assertEqual(len(os.listdir(self.parent)), 2)

    def test_remove_folder_never_follows_links(self):
        write(os.path.join(self.top, "outside", "kept"), "kept")
        write(os.path.join(self.top, "gone", "d", "x"), "x")
        os.symlink(os.path.join(self.top, "outside"), os.path.join(self.top, "gone", "d", "l"))
        margo_agent.remove_folder(os.path.join(self.top, "gone"))
        margo_agent.remove_folder(os.path.join(self.top, "gone"))
        self.assertEqual(set(list_tree(self.top)), {"outside", "outside/kept"})

    def test_what_lies_in_the_place_of_a_folder_is_removed_too(self):
        """F-19: a file that fsck has left there, a link; what that leads to stays."""
        write(os.path.join(self.top, "outside", "kept"), "kept")
        for path in (write(os.path.join(self.top, "file"), "x"), os.path.join(self.top, "link")):
            if not os.path.exists(path):
                os.symlink(os.path.join(self.top, "outside"), path)
            margo_agent.remove_folder(path)
        self.assertEqual(set(list_tree(self.top)), {"outside", "outside/kept"})

    def test_what_cannot_be_removed_is_named(self):
        path = "/proc/self/task"
        with self.assertRaises(margo_agent.FAULTS) as caught:
            margo_agent.remove_folder(path)
        fault = margo_agent.to_fault(caught.exception)
        self.assertEqual(fault.exit, 3)
        self.assertIn(path, fault.message)


class AnyArchive(unittest.TestCase):
    """Properties that hold for every archive there is."""

    def setUp(self):
        self.top = os.path.join(make_folder(self), "any")

    def check(self, data):
        """Unpacks in a folder with neighbours: it may refuse, or fill its own folder and nothing else."""
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, self.top, True)
            write(os.path.join(self.top, "outside", "kept"), "kept")
            parent = os.path.join(self.top, "in", "web")
            write(os.path.join(parent, "neighbour"), "kept")
            before = list_tree(self.top)
            try:
                top = margo_agent.unpack_package(data, digest(data), parent, MIB)
            except ComponentError as error:
                self.assertEqual(error.code, "ARCHIVE_INVALID")
                self.assertEqual(list_tree(self.top), before)
                return
            own = os.path.relpath(top, self.top)
            self.assertEqual(top, os.path.join(parent, digest(data)[7:23]))
            after = list_tree(self.top)
            self.assertEqual({path: after[path] for path in after if path != own and not path.startswith(own + "/")},
                             before)
            for path, value in list_tree(top).items():
                self.assertEqual(os.path.commonpath([os.path.realpath(os.path.join(top, path)), os.path.realpath(top)]),
                                 os.path.realpath(top), path)
                self.assertIn(value[0], ("file", "folder", "link"))
                if value[0] != "link":
                    self.assertIn(value[-1], (0o644, 0o755))
            self.assertTrue(os.path.isfile(os.path.join(top, "compose.yaml")))

    def test_no_archive_whatever_writes_outside_its_folder(self):
        """C-158, C-159, C-160, C-162: any entries of any kind in any order."""
        require("hypothesis")
        from hypothesis import given, settings, strategies as st
        outside = os.path.join(self.top, "outside")
        content, mode = st.binary(max_size=20), st.integers(0, 0o7777)
        place = st.builds("app/{}/{}".format, st.sampled_from("ab"), st.sampled_from("xyz"))
        way = st.lists(st.sampled_from(["a", "b", "x", "..", ".."]), min_size=1, max_size=5).map("/".join)
        target = st.one_of(way, st.sampled_from([outside, "../../outside", "../../../../outside", "/", ".."]))
        kind = st.sampled_from([tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE,
                                tarfile.CHRTYPE, tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE])
        tame = st.builds(entry, place, content, st.sampled_from([tarfile.REGTYPE, tarfile.SYMTYPE]),
                         st.sampled_from(["x", "../b/y", "../a", "./z", ".."]), mode)
        up = st.sampled_from(["app/..", "app/a/../..", "app/a/b/../../../..", "..", "../..", "app/./..", outside])
        away = st.builds(entry, up.map("{}/new".format), content, st.sampled_from([tarfile.REGTYPE, tarfile.DIRTYPE]),
                         st.just(""), mode)
        odd = st.builds(entry, st.one_of(place, st.text(max_size=5)), content, kind,
                        st.one_of(target, st.text(max_size=5)), mode)
        through = st.builds(lambda place, target: (symlink(place, target), entry(place + "/new")), place, target)
        leaving = st.tuples(st.builds(symlink, place, target))
        bad = st.sampled_from([leaving, leaving, st.tuples(away), through, st.tuples(odd)])

        @settings(max_examples=120, deadline=None, database=None, derandomize=True)
        @given(st.lists(tame, max_size=3, unique_by=lambda item: item[0].name),
               bad.flatmap(lambda chosen: chosen.map(list)), st.booleans(),
               st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))
        def check(good, bad, bad_first, form):
            self.check(pack(start(), *(bad + good if bad_first else good + bad), form=form))

        check()

    def test_no_damage_to_the_tar_writes_outside_its_folder(self):
        """C-158, C-162: bytes changed behind tarfile's back, with a checksum that fits or not."""
        require("hypothesis")
        from hypothesis import given, settings, strategies as st
        plain = pack_plain(start(), entry("app/d/x", "x" * 600), symlink("app/l", "d/x"), hardlink("app/h", "app/d/x"),
                           entry("app/" + "n" * 120, "y", mtime=1.5))
        size = len(plain.rstrip(b"\0"))
        pieces = st.sampled_from([b"..", b"/", b"\0", b"0", b"7", b"\xff" * 8, b"\x80" + b"\0" * 7])
        change = st.tuples(st.integers(0, size - 1), st.one_of(pieces, st.binary(min_size=1, max_size=12)))

        @settings(max_examples=60, deadline=None, database=None, derandomize=True)
        @given(st.lists(change, min_size=1, max_size=3), st.booleans())
        def check(changes, mend):
            data = bytearray(plain)
            for position, piece in changes:
                data[position:position + len(piece)] = piece
            for header in range(0, len(data) - 511, 512) if mend else ():
                if data[header + 257:header + 262] == b"ustar":
                    data[header + 148:header + 156] = b" " * 8
                    data[header + 148:header + 156] = b"%06o\0 " % sum(data[header:header + 512])
            self.check(gzip.compress(bytes(data), 1))

        check()


# ----------------------------------------------------------------------------------------------------------------------
# Registries
# ----------------------------------------------------------------------------------------------------------------------

def make_config(registries, base="/nonexistent", **policy):
    """A configuration with these registries and policies."""
    return margo_agent.make_config({"wfm": {"url": "https://wfm.example", "timeout": "5s"}, "policy": policy,
                                    "registries": registries,
                                    "identity": {"certificate": "c", "key": "k", "trust_bundle": "b"}}, base, {})


class Site:
    """A small HTTP server on loopback.

    `answers` is {path: (status, headers, body), or a function of the request's headers that gives this};
    `seen` has the path with its query and the headers of each request.
    """

    def __init__(self, test, answers=None, pki=None):
        self.answers, self.seen = answers or {}, []
        site = self

        class Handler(http.server.BaseHTTPRequestHandler):
            """Answers out of the table."""

            def do_GET(self):
                site.seen.append((self.path, self.headers))
                answer = site.answers.get(self.path.partition("?")[0], (404, {}, b"not here"))
                status, headers, body = answer(self.headers) if callable(answer) else answer
                self.send_response(status)
                for name, value in headers if isinstance(headers, list) else headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                with contextlib.suppress(ConnectionError, ssl.SSLError):    # a client that has read enough
                    self.wfile.write(body)

            def log_message(self, *_):
                """Nothing is printed."""

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        if pki:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(pki.path("site.pem"), pki.path("site.key"))
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.port = self.server.server_address[1]
        self.host = f"127.0.0.1:{self.port}"
        self.url = f"{'https' if pki else 'http'}://{self.host}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()
        test.addCleanup(self.stop)

    def stop(self):
        """Ends the server."""
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def paths(self):
        """The paths asked for, in order."""
        return [path for path, _ in self.seen]

    def authorizations(self):
        """What each request said in Authorization."""
        return [headers.get("Authorization") for _, headers in self.seen]


BLOB = "/v2/web/blobs/" + digest(PACKAGE)
TAG = "/v2/web/manifests/1.0.0"


def make_answers(package=PACKAGE, manifest=None, headers=None):
    """What a registry answers that has this package as web:1.0.0."""
    manifest = manifest or make_manifest(package)
    return {TAG: (200, headers or {"Docker-Content-Digest": digest(manifest)}, manifest),
            "/v2/web/blobs/" + digest(package): (200, {}, package)}


def guard(answers, wanted, challenge):
    """The same answers for who shows the wanted Authorization; the challenge for all others."""
    def protect(answer):
        refusal = (401, {"WWW-Authenticate": challenge}, b"{}")
        return lambda headers: answer if headers.get("Authorization") == wanted else refusal
    return {path: protect(answer) for path, answer in answers.items()}


def basic(user="line4", secret=SECRET):
    return "Basic " + base64.b64encode(f"{user}:{secret}".encode()).decode()


class RegistryCase(unittest.TestCase):
    def setUp(self):
        environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        patch = mock.patch.dict(os.environ, environment, clear=True)
        patch.start()
        self.addCleanup(patch.stop)
        self.folder = make_folder(self)
        self.store = margo_agent.Store(os.path.join(self.folder, "state"))
        self.store.create()
        self.log = ""
        self.password_file = write(os.path.join(self.folder, "password"), SECRET + "\n")
        self.login = {"username": "line4", "password_file": self.password_file}

    def fetch(self, host, registries=None, name="web", tag="1.0.0", **policy):
        """fetch_package; by default the registry is an insecure one."""
        registries = {host: {"insecure": True}} if registries is None else registries
        output = io.StringIO()
        try:
            with contextlib.redirect_stderr(output):
                return margo_agent.fetch_package(margo_agent.Reference(host, name, tag),
                                                 make_config(registries, self.folder, **policy), self.store)
        finally:
            self.log = output.getvalue()

    def forget(self):
        """Takes what was fetched out of the store."""
        self.store.prune_artifacts([])

    def refuse(self, code, host, registries=None, **options):
        """The message with which a fetch is refused; nothing may have been kept."""
        with self.assertRaises(ComponentError) as caught:
            self.fetch(host, registries, **options)
        self.assertEqual(caught.exception.code, code, caught.exception.message)
        self.assertEqual(os.listdir(self.store.path("artifacts")), [])
        self.assertNotIn(SECRET, caught.exception.message + self.log)
        self.assertNotIn(basic()[6:], caught.exception.message + self.log)
        return caught.exception.message


class Fetching(RegistryCase):
    def test_a_package_is_fetched_and_kept_by_its_digest(self):
        """C-153, C-154: manifest by tag, then the blob by digest."""
        site = Site(self, make_answers())
        self.assertEqual(self.fetch(site.host), (digest(PACKAGE), PACKAGE))
        self.assertEqual(site.paths(), [TAG, BLOB])
        self.assertIn(MANIFEST, site.seen[0][1]["Accept"])
        self.assertEqual(self.store.load_artifact(digest(PACKAGE)), PACKAGE)

    def test_a_package_that_is_there_is_not_fetched_again(self):
        """P-1: only the tag is asked for, what the digest names is on the disk."""
        site = Site(self, make_answers())
        self.fetch(site.host)
        self.assertEqual(self.fetch(site.host), (digest(PACKAGE), PACKAGE))
        self.assertEqual(site.paths(), [TAG, BLOB, TAG])

    def test_a_package_that_the_disk_has_spoilt_is_fetched_again(self):
        """C-154: what does not match its digest does not count."""
        site = Site(self, make_answers())
        self.fetch(site.host)
        write(self.store.path("artifacts", digest(PACKAGE).replace(":", "-")), PACKAGE[:-1] + b"!")
        self.assertEqual(self.fetch(site.host), (digest(PACKAGE), PACKAGE))
        self.assertEqual(site.paths()[2:], [TAG, BLOB])
        self.assertEqual(self.store.load_artifact(digest(PACKAGE)), PACKAGE)

    def test_a_flipped_blob_is_refused(self):
        """C-154, D-17: the digest decides, before anything is unpacked."""
        site = Site(self, make_answers())
        flipped = PACKAGE[:40] + bytes([PACKAGE[40] ^ 1]) + PACKAGE[41:]
        site.answers[BLOB] = (200, {}, flipped)
        message = self.refuse("DIGEST_MISMATCH", site.host)
        self.assertIn(f"{site.host}/web:1.0.0: the layer should be {digest(PACKAGE)}", message)
        self.assertIn(digest(flipped), message)

    def test_a_blob_of_another_size_is_refused(self):
        """C-154: with the right digest and the wrong size, shorter, longer."""
        for name, size, body in [("size too large", len(PACKAGE) + 1, PACKAGE),
                                 ("size too small", len(PACKAGE) - 1, PACKAGE),
                                 ("cut", len(PACKAGE), PACKAGE[:-1]), ("longer", len(PACKAGE), PACKAGE + b"x"),
                                 ("empty", len(PACKAGE), b"")]:
            with self.subTest(name):
                site = Site(self, make_answers(manifest=make_manifest(layer_members={"size": size})))
                site.answers[BLOB] = (200, {}, body)
                message = self.refuse("DIGEST_MISMATCH", site.host)
                self.assertIn(f"should be {digest(PACKAGE)} of {size} bytes", message)
                self.assertIn(f"of {len(body)}", message)

    def test_a_much_longer_blob_is_not_taken_in(self):
        """D-8: what the manifest did not announce is not read to its end."""
        site = Site(self, make_answers())
        site.answers[BLOB] = (200, {}, bytes(2 * MIB))
        self.assertIn("longer than", self.refuse("PULL_FAILED", site.host))

    def test_a_blob_that_is_cut_on_the_wire_can_be_tried_again(self):
        site = Site(self, make_answers())
        site.answers[BLOB] = lambda headers: (200, [("Content-Length", str(len(PACKAGE)))], PACKAGE[:-9])
        self.assertIn(f"GET {site.url}{BLOB}: ", self.refuse("PULL_FAILED", site.host))

    def test_a_lying_digest_header_is_refused(self):
        """Protocol 6.2: the manifest that came is not the one that the registry says it sent."""
        for case in ("Docker-Content-Digest", "docker-content-digest"):
            with self.subTest(case):
                site = Site(self, make_answers(headers={case: digest(b"another")}))
                message = self.refuse("DIGEST_MISMATCH", site.host)
                self.assertIn(f"the registry names {digest(b'another')}", message)
                self.assertIn(digest(make_manifest()), message)
                self.assertEqual(site.paths(), [TAG])

    def test_no_digest_header_or_one_of_another_kind_is_no_fault(self):
        for headers in ({"X": "y"}, {"Docker-Content-Digest": "sha512:" + "ab" * 64}):
            with self.subTest(headers):
                self.assertEqual(self.fetch(Site(self, make_answers(headers=headers)).host)[1], PACKAGE)

    def test_a_package_over_the_limit_is_not_fetched(self):
        """D-8: the manifest's size is judged before the blob is asked for."""
        site = Site(self, make_answers())
        self.assertIn("policy.max_artifact is 100", self.refuse("ARCHIVE_INVALID", site.host, max_artifact="100"))
        self.assertEqual(site.paths(), [TAG])

    def test_a_package_of_just_the_limit_is_fetched(self):
        self.assertEqual(self.fetch(Site(self, make_answers()).host, max_artifact=str(len(PACKAGE)))[1], PACKAGE)

    def test_a_manifest_over_the_limit_is_not_read(self):
        """D-8: policy.max_document bounds it."""
        site = Site(self, make_answers(manifest=make_manifest(annotations={"a": "x" * 5000})))
        self.assertIn("longer than 4096 bytes", self.refuse("PULL_FAILED", site.host, max_document="4Ki"))

    def test_an_image_is_not_taken_for_a_package(self):
        """C-155: its layers are not even asked for."""
        site = Site(self, make_answers(manifest=make_manifest(artifactType="dropped")))
        self.assertIn(f"{site.host}/web:1.0.0: artifactType is None", self.refuse("ARCHIVE_INVALID", site.host))
        self.assertEqual(site.paths(), [TAG])

    def test_what_is_missing_or_broken_there_is_named(self):
        """Protocol 6.2: status, address, and whether another try can help."""
        for path in (TAG, BLOB):
            for status, code, words in [(404, "PULL_FAILED", "there is no such package"),
                                        (500, "PULL_FAILED", "tried again later"),
                                        (429, "PULL_FAILED", "tried again later"),
                                        (503, "PULL_FAILED", "tried again later"),
                                        (403, "PULL_UNAUTHORIZED", "username and password_file"),
                                        (204, "PULL_FAILED", "HTTP 204")]:
                with self.subTest(path=path, status=status):
                    site = Site(self, make_answers())
                    site.answers[path] = (status, {}, b"")
                    message = self.refuse(code, site.host)
                    self.assertIn(f"{site.url}{path}: HTTP {status}", message)
                    self.assertIn(words, message)

    def test_a_registry_that_asks_for_patience_gets_it(self):
        """C-056, protocol 6.2: the time goes with the error, on a package's address as on an image's."""
        for path in (TAG, BLOB):
            for status in (429, 503):
                site = Site(self, make_answers())
                site.answers[path] = (status, {"Retry-After": "120"}, b"")
                with self.assertRaises(margo_agent.ComponentError) as caught:
                    self.fetch(site.host)
                self.assertEqual(caught.exception.retry_after, 120.0)

    def test_a_long_error_page_does_not_hide_its_status(self):
        """Protocol 6.2: an answer that is no blob may be longer than the blob."""
        site = Site(self, make_answers())
        site.answers[BLOB] = (404, {}, b"<p>not here</p>" * 1000)
        self.assertIn("HTTP 404; there is no such package", self.refuse("PULL_FAILED", site.host))

    def test_a_registry_that_is_not_there_is_named(self):
        host = f"127.0.0.1:{support.free_port()}"
        self.assertIn(f"http://{host}{TAG}", self.refuse("PULL_FAILED", host))


class Transport(RegistryCase):
    def setUp(self):
        super().setUp()
        self.pki = support.Pki(self)

    def test_the_examples_registry_is_trusted_by_the_sites_ca(self):
        """D-17, C-153: TLS with the configured CA; what the example serves is a package that unpacks."""
        wfm = support.Wfm(self, self.pki)
        wfm.add_package(support.make_compose(), **{"conf/x.ini": "x"})
        found, data = self.fetch(wfm.registry, {wfm.registry: {"ca": self.pki.path("site-ca.pem")}})
        self.assertEqual(found, digest(data))
        top = margo_agent.unpack_package(data, found, os.path.join(self.folder, "web"), MIB)
        self.assertEqual(set(list_tree(top)), {"compose.yaml", "conf", "conf/x.ini"})
        self.assertEqual([path for _, path, _ in wfm.requests("registry")], [TAG, f"/v2/web/blobs/{found}"])

    def test_what_the_examples_registry_does_not_have_is_named(self):
        wfm = support.Wfm(self, self.pki)
        wfm.add_package(support.make_compose())
        trust = {wfm.registry: {"ca": self.pki.path("site-ca.pem")}}
        self.assertIn(f"https://{wfm.registry}/v2/web/manifests/2.0.0: HTTP 404; there is no such package",
                      self.refuse("PULL_FAILED", wfm.registry, trust, tag="2.0.0"))
        self.assertIn("/v2/other/manifests/1.0.0: HTTP 404",
                      self.refuse("PULL_FAILED", wfm.registry, trust, name="other"))

    def test_blobs_and_digests_spoilt_by_the_examples_registry_are_refused(self):
        """C-154: one bit of the blob, the digest header, the connection."""
        wfm = support.Wfm(self, self.pki)
        wfm.add_package(support.make_compose())
        trust = {wfm.registry: {"ca": self.pki.path("site-ca.pem")}}
        for fault, code, words in [({"path": "/v2/web/blobs/*", "corrupt": True}, "DIGEST_MISMATCH",
                                    "the layer should be sha256:"),
                                   ({"path": "/v2/web/manifests/*", "corrupt": True}, "DIGEST_MISMATCH",
                                    "the registry names sha256:"),
                                   ({"path": "/v2/web/blobs/*", "truncate": 50}, "PULL_FAILED", "bytes are missing"),
                                   ({"path": "/v2/web/blobs/*", "close": True}, "PULL_FAILED", "/v2/web/blobs/"),
                                   ({"path": "/v2/*", "status": 503}, "PULL_FAILED", "HTTP 503")]:
            with self.subTest(fault):
                wfm.fault(fault)
                self.assertIn(words, self.refuse(code, wfm.registry, trust))
        wfm.fault()
        self.assertEqual(len(self.fetch(wfm.registry, trust)), 2)

    def test_a_registry_of_an_unknown_ca_is_refused(self):
        """D-17: verification is never off: not without a CA, not with another one."""
        site = Site(self, make_answers(), self.pki)
        for registries in ({}, {site.host: {}}, {site.host: {"ca": self.pki.path("ca.pem")}},
                           {"other": {"ca": self.pki.path("site-ca.pem")}}):
            with self.subTest(registries):
                self.assertIn("the peer's certificate is refused", self.refuse("PULL_FAILED", site.host, registries))
        self.assertEqual(site.seen, [])

    def test_a_certificate_for_another_name_is_refused(self):
        """D-17: the host's name is checked, not the CA alone."""
        self.pki.issue("other", extra="subjectAltName = DNS:registry.example", signer="site-ca")
        for kind in ("pem", "key"):
            shutil.copy(self.pki.path(f"other.{kind}"), self.pki.path(f"site.{kind}"))
        site = Site(self, make_answers(), self.pki)
        message = self.refuse("PULL_FAILED", site.host, {site.host: {"ca": self.pki.path("site-ca.pem")}})
        self.assertIn("127.0.0.1", message.partition("refused:")[2])
        self.assertEqual(site.seen, [])

    def test_http_is_spoken_only_where_insecure_is_set(self):
        """D-17: plain HTTP by explicit configuration of this very registry."""
        site = Site(self, make_answers())
        for registries in ({}, {site.host: {}}, {site.host: {"insecure": False}}, {"127.0.0.1": {"insecure": True}},
                           {site.host.replace("127.0.0.1", "localhost"): {"insecure": True}}):
            with self.subTest(registries):
                self.assertIn(f"https://{site.host}/", self.refuse("PULL_FAILED", site.host, registries))
        self.assertEqual(site.seen, [])
        self.assertEqual(self.fetch(site.host, {site.host: {"insecure": True}})[1], PACKAGE)

    def test_a_ca_that_cannot_be_read_fails_the_component_and_names_the_file(self):
        """D-17: the other registries, and the WFM, have nothing to do with it."""
        site = Site(self, make_answers(), self.pki)
        for path in (self.pki.path("missing.pem"), write(self.pki.path("broken.pem"), "no certificate")):
            with self.subTest(path):
                self.assertIn(path, self.refuse("PULL_FAILED", site.host, {site.host: {"ca": path}}))
        self.assertEqual(site.seen, [])


class Login(RegistryCase):
    """Who the agent says it is, and to whom."""

    def make_wfm(self, *options):
        """The example's registry that demands tokens, and how to trust it."""
        self.pki = support.Pki(self)
        wfm = support.Wfm(self, self.pki, "--registry-token", f"line4:{self.password_file}", *options)
        wfm.add_package(support.make_compose())
        return wfm, {"ca": self.pki.path("site-ca.pem")}

    def test_an_anonymous_token_is_fetched(self):
        """Protocol 6.2: a Bearer challenge without any credentials configured."""
        wfm, trust = self.make_wfm("--registry-anonymous")
        self.assertEqual(digest(self.fetch(wfm.registry, {wfm.registry: trust})[1]),
                         self.fetch(wfm.registry, {wfm.registry: trust})[0])
        self.assertEqual([(path.partition("?")[0], status) for _, path, status in wfm.requests("registry")][:3],
                         [(TAG, 401), ("/token", 200), (TAG, 200)])

    def test_a_token_is_fetched_with_the_password_of_the_file(self):
        """Protocol 6.2: Basic credentials on the request for the token, the token on all others."""
        wfm, trust = self.make_wfm()
        self.assertEqual(len(self.fetch(wfm.registry, {wfm.registry: dict(trust, **self.login)})), 2)
        said = [(item["path"].partition("?")[0], item["headers"].get("Authorization"), item["status"])
                for item in wfm.lines("requests.jsonl")]
        self.assertEqual(said[:3], [(TAG, None, 401), ("/token", "Basic", 200), (TAG, "Bearer", 200)])
        self.assertEqual([(scheme, status) for _, scheme, status in said[3:]], [("Bearer", 200)])

    def test_a_wrong_or_missing_password_names_the_settings(self):
        """Protocol 6.2: PULL_UNAUTHORIZED says what to set."""
        wfm, trust = self.make_wfm()
        wrong = write(os.path.join(self.folder, "wrong"), "guess")
        for login in ({}, {"username": "line4"}, {"username": "line4", "password_file": wrong},
                      {"username": "other", "password_file": self.password_file},
                      {"password_file": self.password_file}):
            with self.subTest(login):
                message = self.refuse("PULL_UNAUTHORIZED", wfm.registry, {wfm.registry: dict(trust, **login)})
                self.assertIn(f"registries.{wfm.registry}.username and password_file", message)
                self.assertNotIn("guess", message + self.log)

    def test_a_password_file_that_cannot_be_read_is_named(self):
        """Protocol 6.2: one registry's file fails what needs it, not the whole device."""
        site = Site(self, guard(make_answers(), basic(), 'Basic realm="r"'))
        for path in (os.path.join(self.folder, "missing"), self.folder):
            with self.subTest(path):
                login = {"insecure": True, "username": "line4", "password_file": path}
                message = self.refuse("PULL_UNAUTHORIZED", site.host, {site.host: login})
                self.assertIn("password_file", message)
                self.assertIn(path, message)

    def test_a_basic_challenge_is_answered_with_the_credentials(self):
        site = Site(self, guard(make_answers(), basic(), 'Basic realm="r"'))
        self.assertEqual(self.fetch(site.host, {site.host: dict(self.login, insecure=True)})[1], PACKAGE)
        self.assertEqual(site.authorizations(), [None, basic(), basic()])

    def test_a_password_keeps_all_but_its_line_end(self):
        for text, secret in [("s p\u00e4 ce ", "s p\u00e4 ce "), ("x:y\r\n", "x:y"), ("x", "x")]:
            with self.subTest(text):
                write(self.password_file, text)
                site = Site(self, guard(make_answers(), basic("li\u00efe", secret), 'Basic realm="r"'))
                self.assertEqual(self.fetch(site.host,
                                            {site.host: dict(self.login, username="li\u00efe", insecure=True)})[1],
                                 PACKAGE)
                self.forget()

    def test_nobody_gets_credentials_unasked(self):
        """C-169: a registry that does not ask is not told."""
        site = Site(self, make_answers())
        self.fetch(site.host, {site.host: dict(self.login, insecure=True)})
        self.assertEqual(site.authorizations(), [None, None])

    def test_credentials_that_do_not_help_are_not_sent_for_ever(self):
        site = Site(self, guard(make_answers(), "never", 'Basic realm="r"'))
        message = self.refuse("PULL_UNAUTHORIZED", site.host, {site.host: dict(self.login, insecure=True)})
        self.assertIn(f"{TAG}: HTTP 401; registry {site.host} refuses the login of line4; mend registries.{site.host}.username and password_file", message)
        self.assertEqual(site.authorizations(), [None, basic()])

    def test_a_challenge_that_nobody_knows_names_the_settings(self):
        for challenge in ("Negotiate", 'Digest realm="r"', "", 'Bearer realm="ftp://x/token"', "Bearer"):
            with self.subTest(challenge):
                site = Site(self, guard(make_answers(), "never", challenge))
                self.assertIn(f"registries.{site.host}.username and password_file",
                              self.refuse("PULL_UNAUTHORIZED", site.host, {site.host: dict(self.login, insecure=True)}))
                self.assertEqual(site.authorizations(), [None])

    def test_challenges_on_lines_of_their_own_are_all_looked_at(self):
        """RFC 9110, 11.6.1: a list may come in several header lines."""
        site = Site(self, make_answers())
        answer = site.answers[TAG]
        site.answers[TAG] = lambda headers: answer if headers.get("Authorization") == basic() else (
            401, [("WWW-Authenticate", "Negotiate"), ("WWW-Authenticate", 'Basic realm="r"')], b"")
        self.assertEqual(self.fetch(site.host, {site.host: dict(self.login, insecure=True)})[1], PACKAGE)

    def test_a_token_is_asked_for_as_the_challenge_says(self):
        """Protocol 6.2: service and scope of the challenge, else the pull of this repository; token or access_token."""
        default = "repository%3Aweb%3Apull"
        for facts, key, query in [('service="reg.example",scope="repository:x:pull,push"', "token",
                                   "?service=reg.example&scope=repository%3Ax%3Apull%2Cpush"),
                                  ("", "access_token", f"?scope={default}"),
                                  ('service="a b&c"', "token", f"?service=a+b%26c&scope={default}")]:
            with self.subTest(facts):
                site = Site(self)
                challenge = f'Bearer realm="{site.url}/token"' + ("," + facts if facts else "")
                site.answers = guard(make_answers(), "Bearer t0.k-e_n=", challenge)
                site.answers["/token"] = (200, {}, json.dumps({key: "t0.k-e_n="}).encode())
                self.assertEqual(self.fetch(site.host)[1], PACKAGE)
                self.assertEqual(site.paths()[1], "/token" + query)
                self.forget()

    def test_a_realm_keeps_its_own_query(self):
        site = Site(self)
        site.answers = dict(guard(make_answers(), "Bearer t", f'Bearer realm="{site.url}/token?a=b"'),
                            **{"/token": (200, {}, b'{"token": "t"}')})
        self.fetch(site.host)
        self.assertEqual(site.paths()[1], "/token?a=b&scope=repository%3Aweb%3Apull")

    def test_what_is_no_token_is_not_used(self):
        """C-169: nothing that could smuggle a header; the reason is in the log."""
        for body in (b"", b"<html>", b"[]", b"{}", b'{"token": 7}', b'{"token": ""}', b'{"token": "a\\r\\nX: y"}',
                     b'{"token": "a b"}', b"[" * 99999):
            with self.subTest(body[:20]):
                site = Site(self)
                site.answers = dict(guard(make_answers(), "never", f'Bearer realm="{site.url}/token"'),
                                    **{"/token": (200, {}, body)})
                self.refuse("PULL_UNAUTHORIZED", site.host)
                self.assertEqual(site.authorizations(), [None, None])

    def test_a_token_is_not_fetched_in_the_clear(self):
        """D-17, C-169: the realm of a TLS registry is https, or the credentials stay at home."""
        self.pki = support.Pki(self)
        listener = Site(self, {"/token": (200, {}, b'{"token": "t"}')})
        site = Site(self, guard(make_answers(), "Bearer t", f'Bearer realm="{listener.url}/token"'), self.pki)
        self.refuse("PULL_UNAUTHORIZED", site.host, {site.host: dict(self.login, ca=self.pki.path("site-ca.pem"))})
        self.assertEqual(listener.seen, [])

    def test_an_insecure_registry_may_have_its_tokens_from_a_secure_service(self):
        """Protocol 6.2: the realm is judged by itself; its certificate by the system's store."""
        self.pki = support.Pki(self)
        tokens = Site(self, {"/token": (200, {}, b'{"token": "t"}')}, self.pki)
        site = Site(self, guard(make_answers(), "Bearer t", f'Bearer realm="{tokens.url}/token"'))
        with mock.patch.dict(os.environ, {"SSL_CERT_FILE": self.pki.path("site-ca.pem")}):
            self.assertEqual(self.fetch(site.host)[1], PACKAGE)
        self.assertEqual(len(tokens.seen), 1)


class Mirrors(RegistryCase):
    def test_the_mirror_is_asked_and_the_registry_is_not(self):
        """Protocol 6.2: the tag and the blob come from the mirror alone, however its address is written."""
        for form in ("{}", "http://{}", "http://{}/"):
            with self.subTest(form):
                mirror, site = Site(self, make_answers()), Site(self, make_answers())
                registries = {site.host: {"insecure": True, "mirror": form.format(mirror.host)},
                              mirror.host: {"insecure": True}}
                self.assertEqual(self.fetch(site.host, registries), (digest(PACKAGE), PACKAGE))
                self.assertEqual((mirror.paths(), site.paths()), ([TAG, BLOB], []))
                self.forget()

    def test_the_registry_is_asked_where_its_mirror_fails(self):
        """C-154: a mirror that lies is as good as none; what failed is in the log."""
        empty, broken = {}, dict(make_answers(), **{BLOB: (500, {}, b"")})
        lying = dict(make_answers(), **{BLOB: (200, {}, PACKAGE[::-1])})
        foreign = make_answers(manifest=make_manifest(artifactType="dropped"))
        closed = guard(make_answers(), "never", 'Basic realm="r"')
        for name, answers, words in [("empty", empty, "HTTP 404"), ("broken", broken, "HTTP 500"),
                                     ("lying", lying, "the layer should be"),
                                     ("foreign", foreign, "artifactType"), ("closed", closed, "asks for a login")]:
            with self.subTest(name):
                mirror, site = Site(self, answers), Site(self, make_answers())
                registries = {site.host: {"insecure": True, "mirror": mirror.host}, mirror.host: {"insecure": True}}
                self.assertEqual(self.fetch(site.host, registries), (digest(PACKAGE), PACKAGE))
                self.assertTrue(mirror.seen)
                self.assertEqual(site.paths(), [TAG, BLOB])
                self.assertIn(f"mirror={mirror.host}", self.log)
                self.assertIn(words, self.log)
                self.forget()

    def test_the_registry_is_asked_where_its_mirror_is_gone(self):
        site, gone = Site(self, make_answers()), f"127.0.0.1:{support.free_port()}"
        self.assertEqual(self.fetch(site.host, {site.host: {"insecure": True, "mirror": gone},
                                                gone: {"insecure": True}})[1], PACKAGE)
        self.assertIn(f"mirror={gone}", self.log)

    def test_http_to_a_mirror_needs_insecure_of_its_own(self):
        """D-17: neither the registry's setting nor the scheme in `mirror` opens the mirror."""
        mirror, site = Site(self, make_answers()), Site(self, make_answers())
        self.fetch(site.host, {site.host: {"insecure": True, "mirror": "http://" + mirror.host}})
        self.assertEqual((mirror.seen, site.paths()), ([], [TAG, BLOB]))

    def test_an_insecure_mirror_does_not_make_its_registry_insecure(self):
        """D-17: where the mirror fails, the registry itself is asked by TLS or not at all."""
        mirror, site = Site(self), Site(self, make_answers())
        self.refuse("PULL_FAILED", site.host, {site.host: {"mirror": mirror.host}, mirror.host: {"insecure": True}})
        self.assertEqual((mirror.paths(), site.seen), ([TAG], []))

    def test_the_mirror_does_not_get_the_registrys_credentials(self):
        """C-169: each host has its own."""
        other = write(os.path.join(self.folder, "other"), "mirror secret")
        for own, said in [({}, [None]), ({"username": "m", "password_file": other},
                                         [None, basic("m", "mirror secret")])]:
            with self.subTest(own):
                mirror = Site(self, guard(make_answers(), "never", 'Basic realm="r"'))
                site = Site(self, guard(make_answers(), basic(), 'Basic realm="r"'))
                registries = {site.host: dict(self.login, insecure=True, mirror=mirror.host),
                              mirror.host: dict(own, insecure=True)}
                self.assertEqual(self.fetch(site.host, registries)[1], PACKAGE)
                self.assertEqual(mirror.authorizations(), said)
                self.assertIn(basic(), site.authorizations())
                self.forget()

    def test_the_registrys_own_fault_is_told_where_both_fail(self):
        mirror, site = Site(self), Site(self)
        registries = {site.host: {"insecure": True, "mirror": mirror.host}, mirror.host: {"insecure": True}}
        self.assertIn(f"{site.url}{TAG}: HTTP 404", self.refuse("PULL_FAILED", site.host, registries))
        self.assertIn(f"{mirror.url}{TAG}: HTTP 404", self.log)


class Redirects(RegistryCase):
    """C-169: a registry may send the agent elsewhere for a blob; it goes there with empty hands."""

    def make_store(self, answer=None):
        """A registry that wants credentials and has its blobs elsewhere: (registry, where they are, settings)."""
        elsewhere = Site(self, {"/blob": answer or (200, {}, PACKAGE)})
        site = Site(self, guard(dict(make_answers(), **{BLOB: (307, {"Location": elsewhere.url + "/blob"}, b"")}),
                                basic(), 'Basic realm="r"'))
        return site, elsewhere, {site.host: dict(self.login, insecure=True)}

    def test_a_blob_is_fetched_from_where_the_registry_sends_the_agent(self):
        for status in (301, 302, 303, 307, 308):
            with self.subTest(status):
                site = Site(self, dict(make_answers(), **{BLOB: (status, {"Location": "/elsewhere?sig=a%2Fb"}, b""),
                                                          "/elsewhere": (200, {}, PACKAGE)}))
                self.assertEqual(self.fetch(site.host)[1], PACKAGE)
                self.assertEqual(site.paths(), [TAG, BLOB, "/elsewhere?sig=a%2Fb"])
                self.forget()

    def test_the_page_that_comes_with_a_redirect_may_be_longer_than_the_blob(self):
        """Protocol 6.2: registries send a page with the signed address in it, a small package is smaller than that."""
        site = Site(self, dict(make_answers(), **{BLOB: (307, {"Location": "/elsewhere"},
                                                         b'<a href="/elsewhere">moved</a>' * 100),
                                                  "/elsewhere": (200, {}, PACKAGE)}))
        self.assertEqual(self.fetch(site.host)[1], PACKAGE)

    def test_credentials_stay_with_their_host(self):
        """C-169: another port is another host."""
        site, elsewhere, registries = self.make_store()
        self.assertEqual(self.fetch(site.host, registries)[1], PACKAGE)
        self.assertEqual(elsewhere.authorizations(), [None])
        self.assertEqual(site.authorizations(), [None, basic(), basic()])

    def test_credentials_stay_where_the_name_differs_or_a_user_is_in_the_address(self):
        """C-169: the same machine by another name is another host."""
        for form in ("http://localhost:{port}/blob", "//localhost:{port}/blob", "http://x@127.0.0.1:{port}/blob"):
            with self.subTest(form):
                site = Site(self)
                target = form.format(port=site.port)
                site.answers = dict(guard(dict(make_answers(), **{BLOB: (307, {"Location": target}, b"")}), basic(),
                                          'Basic realm="r"'),
                                    **{"/blob": (200, {}, PACKAGE)})
                registries = {site.host: dict(self.login, insecure=True)}
                if "@" in form:
                    self.refuse("PULL_FAILED", site.host, registries)
                else:
                    self.fetch(site.host, registries)
                    self.assertEqual(site.paths(), [TAG, TAG, BLOB, "/blob"])
                    self.forget()
                self.assertEqual(site.authorizations()[:3], [None, basic(), basic()])
                self.assertLessEqual(set(site.authorizations()[3:]), {None})

    def test_credentials_come_along_on_the_same_host(self):
        site = Site(self)
        answers = dict(make_answers(), **{BLOB: (302, {"Location": "/real"}, b""), "/real": (200, {}, PACKAGE)})
        site.answers = guard(answers, basic(), 'Basic realm="r"')
        self.assertEqual(self.fetch(site.host, {site.host: dict(self.login, insecure=True)})[1], PACKAGE)
        self.assertEqual(site.authorizations(), [None, basic(), basic(), basic()])

    def test_another_host_cannot_ask_for_the_registrys_credentials(self):
        """C-169: a challenge from where a redirect led is not the registry's."""
        for form in ('Basic realm="r"', 'Bearer realm="{url}/token",service="s"',
                     'Bearer realm="{url}/token", Basic realm="r"'):
            with self.subTest(form):
                site, elsewhere, registries = self.make_store()
                elsewhere.answers = {"/blob": (401, {"WWW-Authenticate": form.format(url=elsewhere.url)}, b""),
                                     "/token": (200, {}, b'{"token": "t"}')}
                message = self.refuse("PULL_UNAUTHORIZED", site.host, registries)
                self.assertIn("HTTP 401", message)
                self.assertEqual(set(elsewhere.authorizations()), {None})
                self.assertNotIn("/token", [path.partition("?")[0] for path in elsewhere.paths()])

    def test_a_token_stays_with_its_host(self):
        """C-169: a Bearer token is a credential too."""
        elsewhere, site = Site(self, {"/blob": (200, {}, PACKAGE)}), Site(self)
        answers = dict(make_answers(), **{BLOB: (307, {"Location": elsewhere.url + "/blob"}, b"")})
        site.answers = dict(guard(answers, "Bearer t", f'Bearer realm="{site.url}/token"'),
                            **{"/token": (200, {}, b'{"token": "t"}')})
        self.assertEqual(self.fetch(site.host)[1], PACKAGE)
        self.assertEqual(elsewhere.authorizations(), [None])

    def test_what_comes_from_elsewhere_is_verified_as_well(self):
        """C-154: the digest decides, wherever the bytes were."""
        site, _, registries = self.make_store((200, {}, PACKAGE[::-1]))
        self.assertIn(f"should be {digest(PACKAGE)}", self.refuse("DIGEST_MISMATCH", site.host, registries))

    def test_circles_end(self):
        """Protocol 6.2: to itself, in a pair, ever further, without an address."""
        for name, steps in [("itself", [BLOB]), ("a pair", ["/a", BLOB]),
                            ("ever further", [f"/{n}" for n in range(30)]), ("nowhere", [None])]:
            with self.subTest(name):
                site = Site(self, make_answers())
                for path, target in zip([BLOB] + steps, steps):
                    site.answers[path] = (302, {"Location": target} if target else {}, b"")
                message = self.refuse("PULL_FAILED", site.host)
                self.assertIn("redirect", message)
                self.assertIn(site.url, message)
                self.assertLessEqual(len(site.seen), 8)

    def test_a_tls_registry_cannot_lead_to_plain_http(self):
        """D-17: not even where the way there was safe."""
        pki = support.Pki(self)
        plain = Site(self, {"/blob": (200, {}, PACKAGE)})
        site = Site(self, dict(make_answers(), **{BLOB: (307, {"Location": plain.url + "/blob"}, b"")}), pki)
        message = self.refuse("PULL_FAILED", site.host,
                              {site.host: {"ca": pki.path("site-ca.pem")}, plain.host: {"insecure": True}})
        self.assertIn(f"{plain.url}/blob: redirected to a scheme that is not allowed", message)
        self.assertEqual(plain.seen, [])

    def test_addresses_that_are_none_are_refused(self):
        """C-169: no files, no other schemes, nothing that ends the cycle."""
        for target in ("file:///etc/passwd", "ftp://127.0.0.1/x", "data:,x", "http://[::1", "https://[1]/x",
                       "http://127.0.0.1:port/", "http:///x",
                       "http://127.0.0.1:99999999/x", "http://a b/", "http://x\u00e9.invalid/"):
            with self.subTest(target):
                site = Site(self, dict(make_answers(), **{BLOB: (307, {"Location": target}, b"")}))
                self.assertTrue(self.refuse("PULL_FAILED", site.host))


# ----------------------------------------------------------------------------------------------------------------------
# A real registry
# ----------------------------------------------------------------------------------------------------------------------

# the bcrypt hash of "open sesame", as htpasswd -B makes it
HTPASSWD = "line4:$2y$04$abcdefghijklmnopqrstuu/LVz6MZlItEy42I2juLihZ66HnQx/cy\n"


# ----------------------------------------------------------------------------------------------------------------------
# Packages of older generations, by URL
# ----------------------------------------------------------------------------------------------------------------------

class Located(RegistryCase):
    """packageLocation and keyLocation (protocol 6.5): https, the host's own trust and credentials, a gpg signature where there is one."""

    def setUp(self):
        super().setUp()
        self.pki = support.Pki(self)
        self.site = Site(self, {"/web.tar.gz": (200, {}, PACKAGE)}, self.pki)

    def fetch_located(self, key=None, path="/web.tar.gz", profile="signed", kind="compose", revision="", **entry):
        config = make_config({self.site.host: dict({"ca": self.pki.path("site-ca.pem")}, **entry)}, self.folder)
        config.wfm["profile"] = profile
        output = io.StringIO()
        try:
            with contextlib.redirect_stderr(output):
                component = margo_agent.Component("web", self.site.url + path, revision, True, 0, {}, key and self.site.url + key)
                return margo_agent.fetch_older(component, config, self.store, kind)
        finally:
            self.log = output.getvalue()

    def refuse_located(self, code, **options):
        with self.assertRaises(ComponentError) as caught:
            self.fetch_located(**options)
        self.assertEqual(caught.exception.code, code, caught.exception.message)
        self.assertEqual(os.listdir(self.store.path("artifacts")), [])
        return caught.exception.message

    def test_it_is_fetched_by_the_trust_of_its_host_and_kept_by_its_digest(self):
        self.assertEqual(self.fetch_located(), (digest(PACKAGE), PACKAGE))
        self.assertEqual(self.store.load_artifact(digest(PACKAGE)), PACKAGE)

    def test_whom_nobody_vouches_for_is_not_asked(self):
        self.assertIn("certificate", self.refuse_located("PULL_FAILED", ca=self.pki.path("ca.pem")))
        self.assertEqual(self.site.seen, [])

    def test_the_current_generation_takes_none(self):
        """C-153: from OCI registries only."""
        self.assertIn("OCI registries only", self.refuse_located("INVALID_DEPLOYMENT", profile="mtls"))
        self.assertEqual(self.site.seen, [])

    def test_credentials_go_to_their_host_and_not_on(self):
        """C-169"""
        other = Site(self, {"/web.tar.gz": (200, {}, PACKAGE)}, self.pki)
        self.site.answers = {"/web.tar.gz": (302, {"Location": f"{other.url}/web.tar.gz"}, b"")}
        config = dict(self.login)
        self.fetch_located(**config)
        self.assertEqual((self.site.authorizations(), other.authorizations()), ([basic()], [None]))

    def test_what_is_not_there_or_too_long_fails_the_component(self):
        self.assertIn("HTTP 404", self.refuse_located("PULL_FAILED", path="/no.tar.gz"))
        self.site.answers = {"/web.tar.gz": (403, {}, b"")}
        self.assertIn("password_file", self.refuse_located("PULL_UNAUTHORIZED"))

    BARE = b"services: {web: {image: localhost/x}}\n"

    def test_a_bare_compose_file_is_a_package_too(self):
        """Protocol 6.5, F2: what stands for it is the same archive each time, and holds the file as it came."""
        self.site.answers["/compose.yaml"] = (200, {"Content-Type": "text/html"}, self.BARE)
        first, data = self.fetch_located(path="/compose.yaml")
        self.assertEqual(self.fetch_located(path="/compose.yaml"), (first, data))
        folder = margo_agent.unpack_package(self.store.load_artifact(first), first, self.folder, MIB, relaxed=True)
        with open(os.path.join(folder, "compose.yaml"), "rb") as file:
            self.assertEqual(file.read(), self.BARE)
        self.site.answers["/compose.yaml"] = (200, {}, self.BARE + b"x-a: 1\n")
        self.assertNotEqual(self.fetch_located(path="/compose.yaml")[0], first)

    def test_what_is_neither_an_archive_nor_a_compose_file_says_so(self):
        """F2: a page to sign in at, an empty answer, another document, a zip file, a file beyond all measure."""
        for content, words in ((b"<html><body>Please sign in</body></html>", "the document: found '<html>"), (b"", "the document: found 'None'"),
                               (b"id: 7\n", "services: found 'None', expected a mapping"), (b"services: []\n", "services: found '[]'"),
                               (b"- services\n", "expected a mapping"), (b"PK\3\4\0\0", "line 1"), (b"services: {\n", "line"), (b"\xff\xfe\0", "UTF-8"),
                               (self.BARE + b"#" * (9 * MIB), "more than policy.max_document")):
            with self.subTest(content[:20]):
                self.site.answers["/compose.yaml"] = (200, {}, content)
                message = self.refuse_located("ARCHIVE_INVALID", path="/compose.yaml")
                for word in (words, "neither a tar+gzip nor a compose file", "/compose.yaml"):
                    self.assertIn(word, message)

    def test_a_file_of_a_hundred_mebibytes_is_not_read_to_its_end(self):
        self.site.answers["/compose.yaml"] = (200, {}, self.BARE + b"#" * (100 * MIB))
        self.assertIn("longer than 67108864 bytes", self.refuse_located("PULL_FAILED", path="/compose.yaml"))

    def test_a_chart_comes_by_the_index_of_its_repository(self):
        """C-166, protocol 6.5: the version with `_` for `+`, a URL that is relative or not, the digest that the index names."""
        chart = {"kind": "helm", "path": "/charts/web", "revision": "1.0.0_b1"}
        entry = {"version": "1.0.0+b1", "urls": ["web.tar.gz"], "digest": digest(PACKAGE)[7:]}
        self.site.answers["/charts/web.tar.gz"] = (200, {}, PACKAGE)
        for change in ({}, {"digest": None}, {"digest": digest(PACKAGE)}, {"urls": [self.site.url + "/web.tar.gz"]}):
            self.index(dict(entry, **change))
            self.assertEqual(self.fetch_located(**chart), (digest(PACKAGE), PACKAGE))
        self.forget()
        self.index(dict(entry, digest="0" * 64))
        self.assertIn("the index names 000", self.refuse_located("DIGEST_MISMATCH", **chart))
        for change in ({"version": "1.0.0"}, {"urls": []}, {"urls": ["http://x/y"]}, {"urls": [7]}):
            self.index(dict(entry, **change))
            self.assertIn("names no chart web 1.0.0_b1", self.refuse_located("PULL_FAILED", **chart))
        for content in (b"[]", b"entries: {web: 7}", b"entries: {", b"entries: {web: [7]}"):
            self.site.answers["/charts/index.yaml"] = (200, {}, content)
            self.assertIn("index.yaml", self.refuse_located("PULL_FAILED", **chart))

    def index(self, *entries):
        self.site.answers["/charts/index.yaml"] = (200, {}, json.dumps({"entries": {"web": entries}}).encode())

    def test_a_key_without_a_signature_is_a_warning(self):
        self.site.answers["/key.asc"] = (200, {}, b"a key")
        for status in (404, 403):
            self.site.answers.update({f"/web.tar.gz.{end}": (status, {}, b"") for end in ("asc", "sig")})
            self.fetch_located(key="/key.asc")
            self.assertIn("there is no signature", self.log)

    def test_a_signature_counts_where_there_is_one(self):
        require("gpg")
        home = os.path.join(self.folder, "gpg")
        os.makedirs(home, 0o700)

        def gpg(*arguments, data=None):
            done = subprocess.run(["gpg", "--batch", "--homedir", home, "--passphrase", "", "--pinentry-mode", "loopback"] + list(arguments),
                                  input=data, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            self.assertEqual(done.returncode, 0, done.stderr)
            return done.stdout

        self.addCleanup(subprocess.run, ["gpgconf", "--homedir", home, "--kill", "all"])
        for name in ("vendor", "other"):
            gpg("--quick-generate-key", f"{name}@example.com", "ed25519", "sign", "never")
        keys = {name: gpg("--armor", "--export", f"{name}@example.com") for name in ("vendor", "other")}
        signature = gpg("--armor", "--detach-sign", "--local-user", "vendor@example.com", data=PACKAGE)
        self.site.answers.update({"/vendor.asc": (200, {}, keys["vendor"]), "/other.asc": (200, {}, keys["other"]),
                                  "/web.tar.gz.asc": (200, {}, signature)})
        with mock.patch.dict(os.environ, {"PATH": self.folder}):
            self.assertRegex(self.refuse_located("PULL_FAILED", key="/vendor.asc"), "is signed, and that cannot be checked: gpg .*not")
        self.assertEqual(self.fetch_located(key="/vendor.asc")[0], digest(PACKAGE))
        self.forget()
        self.assertIn("did not sign this package", self.refuse_located("DIGEST_MISMATCH", key="/other.asc"))
        self.site.answers["/web.tar.gz"] = (200, {}, PACKAGE[:-1] + b"!")
        self.assertIn("did not sign this package", self.refuse_located("DIGEST_MISMATCH", key="/vendor.asc"))
        self.site.answers["/web.tar.gz"] = (200, {}, PACKAGE)
        folder = os.path.join(home, "openpgp-revocs.d")
        for name in os.listdir(folder):             # gpg writes them at once, with a colon that keeps them from being used by mistake
            with open(os.path.join(folder, name), "rb") as file:
                gpg("--import", data=file.read().replace(b"\n:-----", b"\n-----"))
        self.site.answers["/vendor.asc"] = (200, {}, gpg("--armor", "--export", "vendor@example.com"))
        self.assertIn("is revoked", self.refuse_located("DIGEST_MISMATCH", key="/vendor.asc"))


class LooseArchives(ArchiveCase):
    """How older generations packed: no folder at the top, other names of the compose file; all else is as strict."""

    def unpack(self, data, limit=MIB):
        return margo_agent.unpack_package(data, digest(data), self.parent, limit, relaxed=True)

    def test_any_name_of_the_compose_file_with_or_without_a_folder(self):
        for top in ("app", ""):
            for name in COMPOSE_NAMES:
                with self.subTest(top=top, name=name):
                    folder = self.unpack(make_archive({name: COMPOSE, "conf/a": "1"}, top))
                    for path, content in (("compose.yaml", COMPOSE), (name, COMPOSE), ("conf/a", "1")):
                        with open(os.path.join(folder, path)) as file:
                            self.assertEqual(file.read(), content)

    def test_the_proper_name_wins(self):
        folder = self.unpack(make_archive({"docker-compose.yml": "old", "compose.yaml": COMPOSE}, ""))
        with open(os.path.join(folder, "compose.yaml")) as file:
            self.assertEqual(file.read(), COMPOSE)

    def test_it_is_as_strict_about_everything_else(self):
        """C-158, C-159, C-162"""
        for name, data, reason in HOSTILE:
            if name not in COMPOSE_NAMES and not any(words in reason for words in ("top-level entry", "compose.yaml", "at the top")):
                with self.subTest(name):
                    self.refuse(data)
        for name in ("../compose.yaml", "/compose.yaml"):
            self.assertIn("not a path inside", self.refuse(make_archive({"compose.yaml": COMPOSE, name: "x"}, "")))
        link = tarfile.TarInfo()
        link.type, link.linkname = tarfile.SYMTYPE, "../outside"
        self.assertIn("leads out", self.refuse(make_archive({"compose.yaml": COMPOSE, "l": link}, "")))


class DockerRegistry(support.Service):
    """Debian's docker-registry on loopback with a storage of its own; `url` is where it listens."""

    def __init__(self, test, pki=None, **settings):
        require("docker-registry")
        self.folder, self.host = make_folder(test), f"127.0.0.1:{support.free_port()}"
        http_settings = {"addr": self.host, "secret": "of this test", "relativeurls": True}
        if pki:
            http_settings["tls"] = {"certificate": pki.path("site.pem"), "key": pki.path("site.key")}
        config = dict({"version": 0.1, "log": {"level": "error"}, "http": http_settings,
                       "storage": {"filesystem": {"rootdirectory": os.path.join(self.folder, "content")}}}, **settings)
        path = write(os.path.join(self.folder, "config.yml"), json.dumps(config))
        super().__init__(test, ["docker-registry", "serve", path])
        self.url = f"{'https' if pki else 'http'}://{self.host}"
        self.context = ssl.create_default_context(cafile=pki.path("site-ca.pem")) if pki else None
        self.authorization = basic()
        support.wait_for(self.is_ready, what="docker-registry")

    def is_ready(self):
        """Whether it answers."""
        if self.process.poll() is not None:
            raise AssertionError(f"docker-registry ended: {self.read_output()}")
        try:
            return self.send("GET", "/v2/").status == 200
        except urllib.error.HTTPError:
            return True
        except (OSError, urllib.error.URLError):
            return False

    def send(self, method, address, data=None, kind="application/octet-stream"):
        """One request of a publisher."""
        address = self.url + address if address.startswith("/") else address
        message = urllib.request.Request(address, data=data, method=method,
                                         headers={"Content-Type": kind, "Authorization": self.authorization})
        handlers = [urllib.request.ProxyHandler({})]
        if self.context:
            handlers.append(urllib.request.HTTPSHandler(context=self.context))
        with urllib.request.build_opener(*handlers).open(message, timeout=support.LIMIT) as response:
            response.read()
            return response

    def push(self, package=PACKAGE, name="web", tag="1.0.0", manifest=None):
        """Uploads a Compose Archive by the OCI distribution API; returns the manifest's digest as it is told."""
        for blob in (b"{}", package):
            place = self.send("POST", f"/v2/{name}/blobs/uploads/", b"").headers["Location"]
            self.send("PUT", f"{place}{'&' if '?' in place else '?'}digest={digest(blob)}", blob)
        return self.send("PUT", f"/v2/{name}/manifests/{tag}", manifest or make_manifest(package),
                         MANIFEST).headers["Docker-Content-Digest"]


class RealRegistry(RegistryCase):
    def test_a_package_comes_from_a_real_registry_over_tls(self):
        """C-153, C-154, C-155: pushed by plain OCI uploads, fetched, unpacked."""
        require("docker-registry")
        pki = support.Pki(self)
        registry = DockerRegistry(self, pki)
        self.assertEqual(registry.push(), digest(make_manifest()))
        trust = {registry.host: {"ca": pki.path("site-ca.pem")}}
        self.assertEqual(self.fetch(registry.host, trust), (digest(PACKAGE), PACKAGE))
        self.assertIn("HTTP 404; there is no such package", self.refuse_missing(registry.host, trust))
        newer = make_archive({"compose.yaml": "{}"})
        registry.push(newer, "a/b_c", "2.0.0_build.7")
        self.assertEqual(self.fetch(registry.host, trust, name="a/b_c", tag="2.0.0_build.7"), (digest(newer), newer))

    def refuse_missing(self, host, trust):
        with self.assertRaises(ComponentError) as caught:
            self.fetch(host, trust, tag="9.9.9")
        self.assertEqual(caught.exception.code, "PULL_FAILED")
        return caught.exception.message

    def test_a_real_registry_with_passwords_is_answered(self):
        """Protocol 6.2: its Basic challenge, with the right password, a wrong one, none."""
        require("docker-registry")
        path = write(os.path.join(self.folder, "htpasswd"), HTPASSWD)
        registry = DockerRegistry(self, auth={"htpasswd": {"realm": "of this test", "path": path}})
        registry.push()
        wrong = write(os.path.join(self.folder, "wrong"), "guess")
        for login in ({}, {"username": "line4", "password_file": wrong}):
            with self.subTest(login):
                self.assertIn(f"registries.{registry.host}.username and password_file",
                              self.refuse("PULL_UNAUTHORIZED", registry.host,
                                          {registry.host: dict(login, insecure=True)}))
        self.assertEqual(self.fetch(registry.host, {registry.host: dict(self.login, insecure=True)})[1], PACKAGE)

    def test_a_real_registry_with_tokens_is_answered(self):
        """Protocol 6.2: a token service gets the credentials, the registry gets the token."""
        require("docker-registry")
        tokens = Site(self, {"/token": lambda headers: (200, {}, b'{"token": "t"}')
                             if headers.get("Authorization") == basic() else (401, {}, b"{}")})
        registry = DockerRegistry(self, auth={"silly": {"realm": tokens.url + "/token", "service": "of-this-test"}})
        registry.push()
        self.assertEqual(self.fetch(registry.host, {registry.host: dict(self.login, insecure=True)})[1], PACKAGE)
        self.assertEqual(tokens.paths(), ["/token?service=of-this-test&scope=repository%3Aweb%3Apull"])

    def test_an_artifact_pushed_by_oras_is_fetched(self):
        """C-155: the manifest as a publisher's tool writes it; without the artifactType it is refused."""
        require("docker-registry", "oras")
        import oras.client
        import oras.oci
        registry = DockerRegistry(self)
        client = oras.client.OrasClient(hostname=registry.host, insecure=True)
        path = write(os.path.join(self.folder, "web.tar.gz"), PACKAGE)
        with contextlib.redirect_stdout(io.StringIO()):
            client.push(target=f"{registry.host}/web:0.9.0", files=[f"{path}:{LAYER}"], disable_path_validation=True,
                        manifest_annotations={"org.margo.component.type": "compose"})
        self.assertIn("artifactType is None", self.refuse("ARCHIVE_INVALID", registry.host, tag="0.9.0"))
        manifest = client.get_manifest(f"{registry.host}/web:0.9.0")
        self.assertEqual(manifest["layers"][0]["annotations"]["org.opencontainers.image.title"], "web.tar.gz")
        manifest["artifactType"] = ARTIFACT
        client.upload_manifest(manifest, client.get_container(f"{registry.host}/web:1.0.0"))
        self.assertEqual(self.fetch(registry.host), (digest(PACKAGE), PACKAGE))

    def test_an_artifact_copied_by_skopeo_is_fetched(self):
        """C-154: from an OCI layout on the disk by way of a registry, every digest stays what it was."""
        require("docker-registry", "skopeo")
        registry = DockerRegistry(self)
        layout, manifest = os.path.join(self.folder, "layout"), make_manifest()
        for blob in (b"{}", PACKAGE, manifest):
            write(os.path.join(layout, "blobs", "sha256", digest(blob)[7:]), blob)
        write(os.path.join(layout, "oci-layout"), '{"imageLayoutVersion": "1.0.0"}')
        write(os.path.join(layout, "index.json"), json.dumps({"schemaVersion": 2, "manifests": [
            {"mediaType": MANIFEST, "digest": digest(manifest), "size": len(manifest),
             "annotations": {"org.opencontainers.image.ref.name": "1.0.0"}}]}))
        done = subprocess.run(
            ["skopeo", "--insecure-policy", "copy", "--preserve-digests", "--dest-tls-verify=false",
             f"oci:{layout}:1.0.0",
             f"docker://{registry.host}/web:1.0.0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=support.LIMIT)
        self.assertEqual(done.returncode, 0, done.stdout.decode())
        self.assertEqual(self.fetch(registry.host), (digest(PACKAGE), PACKAGE))

    def test_a_blob_that_rots_in_a_real_registry_is_refused(self):
        """C-154: the registry serves what its disk gives; the digest decides."""
        require("docker-registry")
        registry = DockerRegistry(self)
        registry.push()
        for root, _, files in os.walk(os.path.join(registry.folder, "content")):
            if files == ["data"] and os.path.basename(root) == digest(PACKAGE)[7:]:
                write(os.path.join(root, "data"), PACKAGE[:-1] + b"!")
        self.assertIn(f"should be {digest(PACKAGE)} of {len(PACKAGE)} bytes",
                      self.refuse("DIGEST_MISMATCH", registry.host))


if __name__ == "__main__":
    unittest.main()
