"""Makes tests/CONFORMANCE.md from tests/data/rules.txt and from what the tests cite.

    python3 -m tests.conformance            # writes it
"""
import os
import re
from collections import namedtuple

from tests import support

PAGE = os.path.join(support.ROOT, "tests", "CONFORMANCE.md")
HEAD = """# Conformance

Made by `python3 -m tests.conformance`, and checked by a test.

The rules (C-…) are those of Margo's Management Interface 1.0.0-rc.3 and of the generations before it as a client has to keep them, and (E-…) of
the drafts that are implemented. They are numbered in [data/rules.txt](data/rules.txt). Tests cite the numbers, and one of them fails when a
MUST is shown by none. (P-…) and (D-…) are mistakes that users of other agents have suffered from, each kept out by the tests that cite it.
"""

Rule = namedtuple("Rule", "number strength profiles words open")


def load_rules():
    """[Rule] of tests/data/rules.txt."""
    rules = []
    with open(os.path.join(support.DATA, "rules.txt"), encoding="utf-8") as file:
        for line in file:
            if not line.startswith("#"):
                parts = [part.strip() for part in line.split(" | ")]
                reason = parts[4][len("open: "):] if len(parts) > 4 else ""
                rules.append(Rule(parts[0], parts[1], parts[2].split(","), parts[3], reason))
    return rules


def find_citations():
    """{rule number: {test module}} of what the tests' docstrings cite; C-156 to C-162 cites all between."""
    cited = {}
    folder = os.path.join(support.ROOT, "tests")
    for name in sorted(os.listdir(folder)):
        if re.match(r"test_.*\.py\Z", name) and name not in ("test_rules.py", "test_example_wfm.py", "test_example_wfm_signed.py", "test_example_mis.py"):
            with open(os.path.join(folder, name), encoding="utf-8") as file:
                text = " ".join(re.findall(r'"""(.*?)"""', file.read(), re.S))
            for first, last in re.findall(r"\b([A-Z]-\d+)(?: to ([A-Z]-\d+))?", text):
                letter, start = first.split("-")
                for number in range(int(start), int((last or first).split("-")[1]) + 1):
                    cited.setdefault(f"{letter}-{number:0{len(start)}d}", set()).add(name[:-3])
    return cited


def find_implemented():
    """The profiles that the agent supports."""
    import margo_agent
    return set(margo_agent.PROFILES) | {"all"}


def make_page():
    """The page as text."""
    rules, cited, profiles = load_rules(), find_citations(), find_implemented()
    ours = [rule for rule in rules if profiles & set(rule.profiles)]
    shown = [rule for rule in ours if rule.number in cited]
    musts = [rule for rule in ours if rule.strength.startswith("MUST")]
    proven = [rule for rule in musts if rule.number in cited]
    names = ", ".join(f"`{name}`" for name in sorted(profiles - {"all"}))
    lines = [HEAD, f"Of {len(musts)} MUST rules for what is implemented ({names}), {len(proven)} are shown by tests; of all {len(ours)} rules,"
             f" {len(shown)}. Open are:", ""]
    lines += [f"- {rule.number} ({rule.strength}): {rule.words}. {('Open: ' + rule.open) if rule.open else 'No test shows it.'}"
              for rule in ours if rule.number not in cited]
    lines += ["", "| rule | strength | in short | shown by |", "| --- | --- | --- | --- |"]
    lines += [f"| {rule.number} | {rule.strength} | {rule.words} | {', '.join(sorted(cited[rule.number]))} |" for rule in shown]
    return "\n".join(lines) + "\n"


def main():
    """Writes the page."""
    with open(PAGE, "w", encoding="utf-8") as file:
        file.write(make_page())


if __name__ == "__main__":
    main()
