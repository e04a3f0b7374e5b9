#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes margo_agent.py without the rooms that a device does not need: see README.md beside this file.

  strip.py [--without ROOM,...] [--only ROOM,...] [--bare] [--source FILE] OUTPUT

  --without ROOM,...   leaves these optional rooms out
  --only ROOM,...      leaves all optional rooms out but these; mtls stands for what is always there
  --bare               drops comments and docstrings, but those that --help prints
  --source FILE        another file than the margo_agent.py of this repository

Rooms are found by the banners of the file, "# N. Name (optional)".  What only rooms that are left out have used goes with them.
"""
import ast
import builtins
import io
import os
import re
import symtable
import sys
import tokenize

SOURCE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "margo_agent.py")
BANNER = re.compile(r"^# -{60,}\n# \d+\. (.+?)( \(optional\))?\n# -{60,}\n", re.M)
MARK = "# SPDX-License-Identifier: Apache-2.0\n"
ALWAYS = "mtls"


class Fault(Exception):
    """Why nothing is written."""


def find_rooms(source):
    """[(name or None for what is no optional room, text)] of the whole file, in order; a name is a word such as older-documents."""
    banners = list(BANNER.finditer(source))
    starts = [0] + [banner.start() for banner in banners]
    ends = starts[1:] + [len(source)]
    names = [None] + [make_word(banner.group(1)) if banner.group(2) else None for banner in banners]
    return [(name, source[start:end]) for name, start, end in zip(names, starts, ends)]


def make_word(name):
    """A room's name as one word: `Older documents` to older-documents."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def choose(rooms, without, only):
    """The names of the rooms to leave out; raises Fault for a word that is no optional room."""
    known = [name for name, _ in rooms if name]
    for word in (without or []) + (only or []):
        if word not in known and not (only and word == ALWAYS):
            raise Fault(f"{word}: no optional room of this file; there are {', '.join(known) or 'none'}")
    if only:
        return [name for name in known if name not in only]
    return [name for name in known if name in (without or [])]


def strip(source, left_out):
    """The source without these rooms and without what only they have used; raises Fault where something still needs them."""
    rooms = find_rooms(source)
    kept = "".join(text for name, text in rooms if name not in left_out)
    gone = "".join(text for name, text in rooms if name in left_out)
    candidates = find_names(ast.parse(gone))
    while True:
        used = find_names(ast.parse(kept))
        spare = [lines for names, lines in find_statements(kept) if names and not names & used and names <= candidates]
        if not spare:
            break
        lines = kept.splitlines(True)
        candidates |= find_names(ast.parse("".join("".join(lines[first:last]) for first, last in spare)))
        for first, last in reversed(spare):
            del lines[first:last]
        kept = "".join(lines)
    dangling = find_dangling(kept)
    if dangling:
        raise Fault(f"what is left still names {', '.join(dangling)}; leave more rooms out, or fewer")
    return kept


def find_names(tree):
    """Every name that is looked up in a tree."""
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}


def find_statements(source):
    """[(names that a top-level function, class or assignment makes, (first line, line after it))], in order."""
    body, lines, found = ast.parse(source).body, source.split("\n"), []
    starts = [min([node.lineno] + [item.lineno for item in getattr(node, "decorator_list", [])]) - 1 for node in body]
    for index, node in enumerate(body[:-1]):
        first, last = starts[index], starts[index + 1]
        while lines[last - 1].startswith("#") or not lines[last - 1].strip():
            last -= 1                               # comments and banners belong to what follows
        while not lines[last].strip():
            last += 1
        while lines[first - 1].startswith("#") and not lines[first - 1].startswith("# ---"):
            first -= 1
        names = set()
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names = {node.name}
        elif isinstance(node, ast.Assign):
            targets = [item for target in node.targets for item in ast.walk(target)]
            if all(isinstance(item, (ast.Name, ast.Tuple, ast.expr_context)) for item in targets):
                names = {item.id for item in targets if isinstance(item, ast.Name)}
        found.append((names, (first, last)))
    return found


def find_dangling(source):
    """Names that are looked up and defined nowhere, sorted."""
    module = symtable.symtable(source, "margo_agent.py", "exec")
    defined = {symbol.get_name() for symbol in module.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    defined |= set(dir(builtins)) | {"__file__", "__name__", "__doc__"}
    missing, tables = set(), [module]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        missing |= {symbol.get_name() for symbol in table.get_symbols()
                    if symbol.is_referenced() and (symbol.is_global() or table is module)}
    return sorted(missing - defined)


def make_bare(source):
    """The source without comments, blank lines and docstrings; the file's head and the docstrings that --help prints stay."""
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(source).readline)
              if token.type not in (tokenize.COMMENT, tokenize.NL)]
    lines, texts = source.split("\n"), find_docstrings(tokens)
    head = [line for line in lines[:tokens[0].start[0] - 1] if line.startswith("#")]
    pieces, row, column = ["\n".join(head + [""])], 1, 0
    for token in tokens:
        text = texts.get(token.start, token.string)
        if token.type in (tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER) or not text:
            continue
        if token.type == tokenize.NEWLINE:
            if not pieces[-1].endswith("\n"):
                pieces.append("\n")
            continue
        if token.start[0] != row:                   # on a new line; one that was broken stays so
            if not pieces[-1].endswith("\n"):
                pieces.append(" \\\n" if lines[row - 1].rstrip().endswith("\\") else "\n")
            row, column = token.start[0], 0
        pieces.append(lines[row - 1][column:token.start[1]] + text)
        row, column = token.end
    return "".join(pieces)


def find_docstrings(tokens):
    """{where a docstring begins: what stands there instead}: nothing, or `pass` in a function that is nothing else."""
    texts, fresh, name = {}, True, "command_"       # the file's own stays, as those of commands do
    for index, token in enumerate(tokens[:-2]):
        if token.string in ("def", "class"):
            name = tokens[index + 1].string
        if token.type == tokenize.STRING and fresh and not name.startswith("command_"):
            if tokens[index + 1].type == tokenize.NEWLINE:
                texts[token.start] = "pass" if tokens[index + 2].type == tokenize.DEDENT else ""
        if token.type not in (tokenize.INDENT, tokenize.DEDENT):
            fresh = token.type == tokenize.NEWLINE
    return texts


def count_tokens(source):
    """How many names, numbers, strings and operators there are, docstrings apart; an f-string counts as one."""
    count, depth, fresh = 0, 0, True
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = tokenize.tok_name[token.type]
        depth += kind.endswith("STRING_START")
        if kind.endswith("STRING_END"):
            depth, kind = depth - 1, "STRING"
        if depth or kind in ("COMMENT", "NL"):
            continue
        count += kind in ("NAME", "NUMBER", "OP") or kind == "STRING" and not fresh
        fresh = kind in ("NEWLINE", "INDENT", "DEDENT", "ENCODING")
    return count


def parse_arguments(arguments):
    """{option: value}, `output` among them; raises Fault."""
    options, rest = {}, list(arguments)
    while rest:
        word, equals, value = rest.pop(0).partition("=")
        if word == "--bare":
            options[word] = True
        elif word in ("--without", "--only", "--source") and (equals or rest):
            value = value if equals else rest.pop(0)
            options[word] = value if word == "--source" else [name.strip() for name in value.split(",") if name.strip()]
        elif word.startswith("-") or "output" in options:
            raise Fault(f"{word}: not understood; --help says what there is")
        else:
            options["output"] = word
    if "output" not in options or "--without" in options and "--only" in options:
        raise Fault("give the file to write, and one of --without and --only; --help says more")
    return options


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0 if arguments else 2
    try:
        options = parse_arguments(arguments)
        with open(options.get("--source", SOURCE), encoding="utf-8") as file:
            source = file.read()
        left_out = choose(find_rooms(source), options.get("--without"), options.get("--only"))
        text = strip(source, left_out)
        if "--bare" in options:
            text = make_bare(text)
        if left_out:
            text = text.replace(MARK, f"{MARK}# Without {', '.join(left_out)}: made by examples/firmware/strip.py.\n", 1)
        compile(text, options["output"], "exec")
        os.makedirs(os.path.dirname(os.path.abspath(options["output"])), exist_ok=True)
        with open(options["output"] + ".new", "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(options["output"] + ".new", 0o755)
        os.replace(options["output"] + ".new", options["output"])
    except (Fault, OSError) as error:
        print(f"strip.py: {error}", file=sys.stderr)
        return 2
    print(f"{options['output']}: without {', '.join(left_out) or 'nothing'}{', bare' if '--bare' in options else ''}; "
          f"{len(text.encode())} bytes of {len(source.encode())}, {count_tokens(text)} tokens of {count_tokens(source)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
