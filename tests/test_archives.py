"""Hostile archives, made by a generator: refused before anything is written, or unpacked to files, folders and inner links alone."""
import gzip
import io
import os
import stat
import tarfile
import unittest

import margo_agent
from tests import support

MIB = 1 << 20
COMPOSE = "services: {}\n"


def make_entry(name="app/x", kind=tarfile.REGTYPE, data=b"x", link="", **members):
    """(TarInfo, bytes) of one entry."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(data) if kind in (tarfile.REGTYPE, tarfile.CONTTYPE) else 0
    for key, value in members.items():
        setattr(info, key, value)
    return info, data[:info.size]


def make_archive(*entries, compose=True, form=tarfile.PAX_FORMAT):
    """A Compose Archive with further entries, [(TarInfo, bytes)]."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz", format=form, compresslevel=1) as archive:
        for info, data in ([make_entry("app/compose.yaml", data=COMPOSE.encode())] if compose else []) + list(entries):
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def change_header(place, value, data=b"x"):
    """An archive whose second header has other bytes at a place, with its sum put right."""
    plain = bytearray(gzip.decompress(make_archive(make_entry(data=data), form=tarfile.GNU_FORMAT)))
    start = 1024
    plain[start + place:start + place + len(value)] = value
    plain[start + 148:start + 156] = b" " * 8
    plain[start + 148:start + 156] = b"%06o\0 " % sum(plain[start:start + 512])
    return gzip.compress(bytes(plain), 1)


def make_digits(count):
    """An archive with a pax header of so many digits, which CPython looks at again and again (security 3.1)."""
    header, entry = tarfile.TarInfo("././@PaxHeader"), tarfile.TarInfo("app/compose.yaml")
    header.type, header.size, entry.size = b"x", count, 1
    parts = [header.tobuf(tarfile.USTAR_FORMAT), b"1" * count, bytes(-count % 512), entry.tobuf(tarfile.USTAR_FORMAT), b"x", bytes(1535)]
    return gzip.compress(b"".join(parts))


def make_pax(**headers):
    """An archive with an entry that has these pax headers."""
    info, data = make_entry()
    info.pax_headers = {key.replace("_", "."): value for key, value in headers.items()}
    return make_archive((info, data))


def make_kinds():
    """{name: (archive, whether it is harmless and may be unpacked)}."""
    kinds = {}
    for name in ("../x", "app/../x", "app/../../x", "/x", "/app/x", "//app/x", "app//../x", "..", "app/..", "other/x", "app/a/../../x", "app/./../x",
                 "app\n/x", "app/\x1b[2J", "app/a\nb", "app/\u202e", "app/" + "n" * 256, "app/" + "a/" * 600 + "x", ".", "x", "app/\udcff", "app/a\\\x01b"):
        kinds[f"name {name[:30]!r}"] = make_archive(make_entry(name)), False
    for name in ("app/..x", "app/...", "app/a b", "app/-rf", "app/é", "app/a\\b", "app/C:", "./app/x", "app/.git/config", "app/" + "n" * 255, "app/~", "app/$x"):
        kinds[f"name {name[:30]!r}"] = make_archive(make_entry(name)), True
    for link in ("/etc/passwd", "..", "../x", "../../etc", "a/../../x", "/", "", "\x1b", "x" * 2000):
        kinds[f"link to {link[:20]!r}"] = make_archive(make_entry(kind=tarfile.SYMTYPE, link=link)), False
    for link in ("compose.yaml", "./compose.yaml", "gone", "a/../compose.yaml"):
        kinds[f"link to {link!r}"] = make_archive(make_entry(kind=tarfile.SYMTYPE, link=link)), True
    for link in ("/etc/passwd", "../x", "app/gone", "app/../compose.yaml", "other/compose.yaml", "app", ""):
        kinds[f"hard link to {link!r}"] = make_archive(make_entry(kind=tarfile.LNKTYPE, link=link)), False
    kinds["hard link to a file"] = make_archive(make_entry(kind=tarfile.LNKTYPE, link="app/compose.yaml")), True
    for kind in (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, b"S", b"D", b"M", b"V", b"N", b"Z", b"\xff"):
        kinds[f"type {kind!r}"] = change_header(156, kind), False
    kinds["type '7'"] = change_header(156, b"7"), None
    for mode in (0o4755, 0o2755, 0o1777, 0o6777, 0o777, 0o000, 0o7777):
        kinds[f"mode {mode:o}"] = make_archive(make_entry(mode=mode)), True
        kinds[f"folder of mode {mode:o}"] = make_archive(make_entry("app/d", tarfile.DIRTYPE, mode=mode)), True
    kinds["owner"] = make_archive(make_entry(uid=0, gid=12345, uname="root")), True
    kinds["time before the epoch"] = make_archive(make_entry(mtime=-5)), True
    for number, (first, second) in enumerate((
            ((tarfile.SYMTYPE, "."), "app/x/y"), ((tarfile.SYMTYPE, ".."), "app/x/y"), ((tarfile.REGTYPE, ""), "app/x/y"),
            ((tarfile.REGTYPE, ""), "app/x"), ((tarfile.SYMTYPE, "compose.yaml"), "app/x"), ((tarfile.DIRTYPE, ""), "app/x"))):
        kinds[f"two of one place {number}"] = make_archive(make_entry(kind=first[0], link=first[1]), make_entry(second)), False
    kinds["the same folder twice"] = make_archive(make_entry("app/d", tarfile.DIRTYPE), make_entry("app/d", tarfile.DIRTYPE)), True
    kinds["links in a circle"] = make_archive(make_entry("app/a", tarfile.SYMTYPE, link="b"), make_entry("app/b", tarfile.SYMTYPE, link="a")), False
    kinds["links that lead out together"] = make_archive(
        make_entry("app/d/e", tarfile.DIRTYPE), make_entry("app/a", tarfile.SYMTYPE, link="d/e"), make_entry("app/b", tarfile.SYMTYPE, link="a/../../..")), False
    kinds["compose.yaml is a link out"] = make_archive(make_entry("app/compose.yaml", tarfile.SYMTYPE, link="/etc/passwd"), compose=False), False
    kinds["compose.yaml is a folder"] = make_archive(make_entry("app/compose.yaml", tarfile.DIRTYPE), compose=False), False
    kinds["nothing"] = make_archive(compose=False), False
    kinds["no compose.yaml"] = make_archive(make_entry(), compose=False), False
    for size in (b"\x80" + b"\xff" * 11, b"\xff" * 12, b"77777777777\0", b"99999999999\0", b"-0000000001\0", b"\x80" + b"\0" * 3 + b"\x7f" * 8):
        kinds[f"size {size[:4]!r}"] = change_header(124, size), False
    for key, value in (("path", "../x"), ("path", "/x"), ("linkpath", "/etc"), ("size", "-1"), ("size", "9" * 30), ("GNU_sparse_size", "9" * 12),
                       ("GNU_sparse_map", "0,1,2"), ("hdrcharset", "BINARY"), ("x" * 300, "y" * 5000)):
        kinds[f"pax {key[:20]}={value[:10]}"] = make_pax(**{key: value}), None
    kinds["pax of digits"] = make_digits(200000), False
    good = make_archive(make_entry())
    plain = gzip.decompress(good)
    kinds["cut gzip"] = good[:-9], False
    kinds["two gzips"] = good + good, False
    kinds["more behind it"] = good + b"x", False
    kinds["cut tar"] = gzip.compress(plain[:1500]), False
    kinds["bytes behind the end"] = gzip.compress(plain + b"x" * 512), False
    kinds["wrong sum"] = gzip.compress(plain[:148] + b"0000000\0" + plain[156:]), False
    kinds["no gzip"] = plain, False
    kinds["empty"] = b"", False
    kinds["zeros"] = gzip.compress(bytes(MIB // 2)), False
    kinds["bomb"] = gzip.compress(bytes(64 * MIB), 1), False
    kinds["many entries"] = make_archive(*[make_entry(f"app/{number}", data=b"") for number in range(margo_agent.MAX_ENTRIES + 1)]), False
    kinds["many hard links"] = make_archive(make_entry(data=b"x" * 9000), *[
        make_entry(f"app/{number}", tarfile.LNKTYPE, link="app/x") for number in range(60)]), True
    kinds["hard links that fill the disk"] = make_archive(make_entry(data=b"x" * 9000), *[
        make_entry(f"app/{number}", tarfile.LNKTYPE, link="app/x") for number in range(200)]), False
    return kinds


class Archives(unittest.TestCase):
    """Protocol 4, C-156 to C-162; security 3."""

    def setUp(self):
        self.folder = support.make_folder(self)
        self.home = os.path.join(self.folder, "a", "home")
        os.makedirs(self.home)

    def look(self):
        """Everything below the folder that is not the private one, and what is in that."""
        return sorted(os.listdir(self.folder)), sorted(os.listdir(os.path.dirname(self.home))), sorted(os.listdir(self.home))

    def check_tree(self, top):
        """Fails unless all below is a file, a folder or a link that stays inside, without rights that nobody should have."""
        for path, folders, files in os.walk(top):
            for name in folders + files:
                full = os.path.join(path, name)
                mode = os.lstat(full).st_mode
                if stat.S_ISLNK(mode):
                    self.assertTrue(os.path.realpath(full).startswith(os.path.realpath(top) + "/"), full)
                else:
                    self.assertTrue(stat.S_ISREG(mode) or stat.S_ISDIR(mode), full)
                    self.assertIn(stat.S_IMODE(mode), (0o644, 0o755), full)
                    self.assertEqual(os.lstat(full).st_uid, os.getuid())

    def test_each_kind_is_refused_before_anything_is_written_or_is_harmless(self):
        kinds = make_kinds()
        self.assertGreater(len(kinds), 110)
        before = self.look()
        for name, (data, harmless) in kinds.items():
            with self.subTest(name):
                try:
                    top = margo_agent.unpack_package(data, margo_agent.sha256_digest(data), self.home, MIB)
                except margo_agent.ComponentError as error:
                    self.assertEqual(error.code, "ARCHIVE_INVALID")
                    self.assertIsNot(harmless, True, error.message)
                else:
                    self.assertIsNot(harmless, False)
                    self.assertEqual(self.look(), (before[0], before[1], [os.path.basename(top)]))
                    self.check_tree(top)
                    self.assertEqual(margo_agent.unpack_package(data, margo_agent.sha256_digest(data), self.home, MIB), top)
                    margo_agent.remove_folder(top)
                self.assertEqual(self.look(), before)


if __name__ == "__main__":
    unittest.main()
