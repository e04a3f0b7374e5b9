"""Git repositories that are small on the wire and large in memory, for the tests and tests/bench/costs.py.

BOMBS: {name: what makes a Bomb}.  BombServer speaks protocol version 2 of git over https and serves one; the client is the real git.
"""
import collections
import hashlib
import zlib

from tests import git_server

KIB, MIB = 1 << 10, 1 << 20
REF = b"refs/heads/main"
AUTHOR = b"author a <a@b> 1 +0000\ncommitter a <a@b> 1 +0000\n"
KINDS = {b"commit": 1, b"tree": 2, b"blob": 3}
Bomb = collections.namedtuple("Bomb", "head objects refs count")
Bomb.__doc__ = """head: id of the commit.  objects: pieces of a pack, one each.  refs: pieces of pkt-lines, or None for the head alone.
count: of the objects, as the pack's head has it."""


def name_object(kind, data):
    """The id of an object."""
    return hashlib.sha1(b"%s %d\0" % (kind, len(data)) + data).hexdigest()


def make_head(kind, size):
    """The head of an object in a pack: its kind and size."""
    found, size = [kind << 4 | size & 15], size >> 4
    while size:
        found[-1] |= 0x80
        found.append(size & 0x7f)
        size >>= 7
    return bytes(found)


def pack_object(kind, data):
    """An object as it stands in a pack."""
    return make_head(KINDS[kind], len(data)) + zlib.compress(data, 1)


def make_size(size):
    """A size as it stands in a delta."""
    found = bytearray()
    while size > 0x7f:
        found.append(size & 0x7f | 0x80)
        size >>= 7
    return bytes(found) + bytes([size])


def pack_repeat(base, size, times):
    """A delta that repeats an object of `size` bytes, at most 65,535."""
    copy = bytes([0x80 | 0x10 | 0x20, size & 255, size >> 8])
    delta = make_size(size) + make_size(size * times) + copy * times
    return make_head(7, len(delta)) + bytes.fromhex(base) + zlib.compress(delta, 9)


def make_entry(mode, name, item):
    """An entry of a tree."""
    return mode + b" " + name + b"\0" + bytes.fromhex(item)


def make_commit(tree, message=b"x"):
    """(id, bytes in a pack) of a commit."""
    data = b"tree %s\n%s\n%s" % (tree.encode(), AUTHOR, message)
    return name_object(b"commit", data), pack_object(b"commit", data)


def make_bomb(entries, objects, message=b"x", refs=None, count=None):
    """A Bomb of one commit with a tree of those entries, beside other objects."""
    tree = b"".join(make_entry(*entry) for entry in entries)
    head, commit = make_commit(name_object(b"tree", tree), message)
    objects = [commit, pack_object(b"tree", tree), *objects]
    return Bomb(head, objects, refs, len(objects) if count is None else count)


def make_delta(size):
    """One delta that makes a blob of that size."""
    base = b"\0" * 65535
    times = size // len(base)
    name = name_object(b"blob", base)
    whole = hashlib.sha1(b"blob %d\0" % (times * len(base)))
    for _ in range(times):
        whole.update(base)
    return make_bomb([(b"100644", b"a", whole.hexdigest())], [pack_object(b"blob", base), pack_repeat(name, len(base), times)])


def make_blob(size, name):
    """One blob of zeros."""
    data = bytes(size)
    return make_bomb([(b"100644", name, name_object(b"blob", data))], [pack_object(b"blob", data)])


def make_entries(count, name):
    """A tree of many entries, all of one blob."""
    blob = name_object(b"blob", b"a: 1\n")
    return make_bomb([(b"100644", name % number, blob) for number in range(count)], [pack_object(b"blob", b"a: 1\n")])


def make_shared(levels, width):
    """Trees that hold the same tree many times, so that the paths are width ** levels."""
    data = b"a: 1\n"
    objects, mode, item = [pack_object(b"blob", data)], b"100644", name_object(b"blob", data)
    for _ in range(levels):
        tree = b"".join(make_entry(mode, b"%06d.yaml" % number, item) for number in range(width))
        objects.append(pack_object(b"tree", tree))
        mode, item = b"40000", name_object(b"tree", tree)
    return make_bomb([(mode, b"a", item)], objects)


def make_deep(levels):
    """Trees below trees."""
    data = b"a: 1\n"
    objects, mode, item = [pack_object(b"blob", data)], b"100644", name_object(b"blob", data)
    for _ in range(levels):
        tree = make_entry(mode, b"a", item)
        objects.append(pack_object(b"tree", tree))
        mode, item = b"40000", name_object(b"tree", tree)
    return make_bomb([(mode, b"a", item)], objects)


def make_objects(count):
    """Many blobs that nothing needs."""
    return make_bomb([], (pack_object(b"blob", b"%d" % number) for number in range(count)), count=count + 2)


def make_pieces(line, count):
    """That many pkt-lines, made of `line` and a number."""
    for start in range(0, count, 1000):
        texts = (line % number for number in range(start, min(count, start + 1000)))
        yield b"".join(b"%04x" % (len(text) + 4) + text for text in texts)


def make_refs(count, name):
    """Many refs beside the branch."""
    bomb = make_bomb([], [])
    return bomb._replace(refs=make_pieces(bomb.head.encode() + b" " + name + b"\n", count))


BOMBS = {
    "one delta of 64 MiB": lambda: make_delta(64 * MIB),
    "one delta of 255 MiB": lambda: make_delta(255 * MIB),
    "one blob of 255 MiB": lambda: make_blob(255 * MIB, b"a"),
    "one document of 255 MiB": lambda: make_blob(255 * MIB, b"a.yaml"),
    "a message of 200 MiB": lambda: make_bomb([], [], b"x" * (200 * MIB)),
    "a message of 30 MiB": lambda: make_bomb([], [], b"x" * (30 * MIB)),
    "a tree of 1,000,000": lambda: make_entries(1000000, b"%07d"),
    "a tree of 100,000": lambda: make_entries(100000, b"%07d"),
    "a tree of 10,000 documents": lambda: make_entries(10000, b"%07d.yaml"),
    "trees of 10 ** 12 paths": lambda: make_shared(6, 100),
    "100,000 levels": lambda: make_deep(100000),
    "3,000 levels": lambda: make_deep(3000),
    "1,000,000 objects": lambda: make_objects(1000000),
    "100,000 objects": lambda: make_objects(100000),
    "a pack that says 4 billion objects": lambda: make_bomb([], [], count=0xffffffff),
    "1,000,000 refs": lambda: make_refs(1000000, b"refs/heads/%07d"),
    "1,000,000 refs that match": lambda: make_refs(1000000, b"refs/heads/%07d/" + REF),
    "endless refs": lambda: make_refs(10 ** 9, b"refs/heads/%09d"),
}


def make_pack(bomb):
    """The pieces of a pack."""
    whole = hashlib.sha1()
    pieces = iter(bomb.objects)
    piece = b"PACK\0\0\0\2" + bomb.count.to_bytes(4, "big")
    while piece:
        whole.update(piece)
        yield piece
        piece = next(pieces, b"")
    yield whole.digest()


class BombServer(git_server.GitServer):
    """Answers git with a bomb, as long as there is one, instead of a repository."""

    bomb = None

    def answer_git(self, path, body):
        """The pieces of the answer to one request."""
        if path.endswith("/info/refs"):
            yield b"001e# service=git-upload-pack\n0000000eversion 2\n000cls-refs\n0012fetch=shallow\n0000"
        elif b"command=ls-refs" in body:
            line = self.bomb.head.encode() + b" " + REF + b"\n"
            yield b"%04x" % (len(line) + 4) + line
            yield from self.bomb.refs or ()
            yield b"0000"
        else:
            yield b"000dpackfile\n"
            for piece in make_pack(self.bomb):
                for start in range(0, len(piece), 65000):
                    part = piece[start:start + 65000]
                    yield b"%04x\x01" % (len(part) + 5) + part
            yield b"0000"

    def serve(self, handler):
        if self.bomb is None:
            super().serve(handler)
            return
        body = self.read_body(handler)
        path, _, query = handler.path.partition("?")
        kind = "advertisement" if query else "result"
        handler.send_response(200)
        handler.send_header("Content-Type", f"application/x-git-upload-pack-{kind}")
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        try:
            for piece in self.answer_git(path, body):
                handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            handler.wfile.write(b"0\r\n\r\n")
        except OSError:
            handler.close_connection = True         # the client has had enough
