"""Measures of a Python file, as house rules count them; each a function of its text or its syntax tree.  Also a program:

    python3 -m tests.gauge [FILE]        # prints them, margo_agent.py's by default
"""
import ast
import io
import re
import sys
import tokenize

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.Lambda)
WIDTH = 110
VERBS = ("parse_", "make_", "check_", "is_", "find_")
# What touches the world, spelt with dots: whole modules, single functions, and what of `os` does not.
WORLD = {"fcntl", "os", "random", "secrets", "select", "shutil", "signal", "socket", "subprocess", "tempfile", "threading"}
DOORS = {"open", "print", "input", "log", "time.time", "time.monotonic", "time.sleep", "time.clock_gettime", "time.localtime",
         "uuid.uuid4", "sys.stdin.read", "sys.stdout.write", "sys.stderr.write", "sys.exit"}
HARMLESS = {"os.path", "os.path.join", "os.path.basename", "os.path.dirname", "os.path.normpath", "os.path.split",
            "os.path.splitext", "os.path.isabs", "os.path.commonpath", "os.path.relpath", "os.fsencode", "os.fsdecode", "os.fspath",
            "os.strerror", "os.defpath", "socket.timeout", "socket.gaierror"}


def dotted(node):
    """os.path.join and the like as text, "" for what is no plain name."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return getattr(node, "id", "")


def find_tokens(source):
    """The tokens that count: names, numbers, strings and operators.

    No comment, no blank or broken line, no indentation, no docstring (a string that is a statement of its own); an f-string is one
    token in every Python, though 3.12 takes it to pieces.
    """
    found, depth, fresh, waiting = [], 0, True, None
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = tokenize.tok_name[token.type]
        if kind.endswith("STRING_START"):
            depth += 1
        elif kind.endswith("STRING_END"):
            depth -= 1
            kind = "STRING"
        if depth or kind in ("COMMENT", "NL"):
            continue
        if waiting is not None and kind != "NEWLINE":
            found.append(waiting)
        waiting = None
        if kind == "STRING" and fresh:
            waiting = token                         # a docstring, unless its statement goes on
        elif kind in ("NAME", "NUMBER", "STRING", "OP"):
            found.append(token)
        fresh = kind in ("NEWLINE", "INDENT", "DEDENT") or fresh and kind == "ENCODING"
    return found


def count_tokens(source):
    """How many tokens count."""
    return len(find_tokens(source))


def find_wide_lines(source):
    """Numbers of the lines that are wider than 110 columns."""
    return [number for number, line in enumerate(source.split("\n"), 1) if len(line) > WIDTH]


def find_nested_conditions(tree):
    """Lines of conditional expressions inside another."""
    inner = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.IfExp):
            inner.update(item for item in ast.walk(node) if isinstance(item, ast.IfExp) and item is not node)
    return sorted({node.lineno for node in inner})


def find_crowded_comprehensions(tree):
    """Lines of comprehensions with two loops and a condition."""
    return [node.lineno for node in ast.walk(tree) if isinstance(node, COMPREHENSIONS)
            and len(node.generators) > 1 and any(loop.ifs for loop in node.generators)]


def find_packed_assignments(tree):
    """Lines that give several names a value each, where one of these is more than a name or a constant: not a swap, not a start."""
    return [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)
            and isinstance(node.targets[0], ast.Tuple) and not all(is_plain(value) for value in node.value.elts)]


def is_plain(node):
    """Whether an expression is a name, an attribute, a constant or an empty list, dict or tuple."""
    if isinstance(node, (ast.List, ast.Tuple, ast.Dict)):
        return not (node.keys if isinstance(node, ast.Dict) else node.elts)
    old = ("Num", "Str", "Bytes", "NameConstant")               # constants before Python 3.8
    return isinstance(node, (ast.Name, ast.Attribute, ast.Constant)) or type(node).__name__ in old


def find_locals(node):
    """The names that a function, or the methods of a class, bind themselves: these are none of the file's."""
    found = {item.arg for item in ast.walk(node) if isinstance(item, ast.arg)}
    outer = {name for item in ast.walk(node) if isinstance(item, ast.Global) for name in item.names}
    stored = {item.id for item in ast.walk(node) if isinstance(item, ast.Name) and isinstance(item.ctx, ast.Store)}
    return (found | stored if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else set()) - outer


# What functions touch

def find_effects(tree):
    """{function: what of the world it touches by itself or by what it calls, as text}; methods are spelt Class.method.

    Calls are followed by name: functions of the file, methods of self, and what a class does as it is made.
    """
    functions, touched, called = {}, {}, {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            functions[node.name] = (node, "")
        elif isinstance(node, ast.ClassDef):
            for item in node.body:
                if isinstance(item, ast.FunctionDef):
                    functions[f"{node.name}.{item.name}"] = (item, node.name)
    for name, (node, owner) in functions.items():
        words = {dotted(item) for item in ast.walk(node) if isinstance(item, (ast.Attribute, ast.Name))} - find_locals(node)
        touched[name] = next((word for word in sorted(words) if is_world(word)), "")
        called[name] = {target for word in words for target in find_targets(word, owner, functions)} - {name}
    changed = True
    while changed:
        changed = False
        for name, targets in called.items():
            target = next((item for item in sorted(targets) if touched[item]), None)
            if target and not touched[name]:
                touched[name] = changed = f"{target}: {touched[target]}"
    return {name: words for name, words in touched.items() if words}


def is_world(word):
    """Whether a dotted name is a door to the world."""
    first, _, rest = word.partition(".")
    if word in DOORS:
        return True
    constant = re.match(r"[A-Z][A-Z0-9_]+(\.|$)", rest)
    return first in WORLD and bool(rest) and not constant and word not in HARMLESS


def find_targets(word, owner, functions):
    """The functions of the file that a name may stand for."""
    first, _, rest = word.partition(".")
    own = f"{owner}.{rest}" if first == "self" else word
    return [name for name in (own, f"{own}.__init__") if name in functions]


def find_lying_verbs(tree):
    """{function: what it touches} of those whose name promises that they touch nothing."""
    return {name: words for name, words in find_effects(tree).items() if name.rpartition(".")[2].startswith(VERBS)}


def main():
    path = sys.argv[1] if len(sys.argv) > 1 else "margo_agent.py"
    with open(path, encoding="utf-8") as file:
        source = file.read()
    tree = ast.parse(source)
    print(f"{count_tokens(source)} tokens, {len(find_wide_lines(source))} lines over {WIDTH}")
    for find in (find_nested_conditions, find_crowded_comprehensions, find_packed_assignments):
        lines = find(tree)
        print(f"{find.__name__}: {len(lines)}: {' '.join(map(str, lines))}")
    for name, words in sorted(find_lying_verbs(tree).items()):
        print(f"{name}: {words}")


if __name__ == "__main__":
    main()
