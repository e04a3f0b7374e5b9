#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Prints a manual page or a completion for bash, made of the agent's own table of commands.

    python3 examples/packaging/manual.py man [AGENT] > margo-agent.8
    python3 examples/packaging/manual.py bash [AGENT] > margo-agent

The second belongs into /usr/share/bash-completion/completions.

AGENT is a margo_agent.py, such as one of examples/firmware/strip.py: what it lacks is not in its manual.
"""
import importlib.util
import os
import re
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
PAGE = r""".TH MARGO-AGENT 8 "" "margo-agent {version}" "Margo workload fleet client"
.SH NAME
margo-agent \- Margo workload fleet client for small devices
.SH SYNOPSIS
.B margo-agent
{options}
.I COMMAND
.RI [ argument ...]
.SH DESCRIPTION
The agent asks a Margo Workload Fleet Manager what this device should run, verifies it, has a container engine run it,
and reports what came of it.
It never listens: every connection starts at the device.
.B run
does so for ever,
.B run \-\-once
a single time, for cron or a timer.
.SH COMMANDS
{commands}
.SH EXIT STATUS
{codes}
.SH ENVIRONMENT
.TP
.B MARGO_CONFIG
the configuration file where
.B \-c
names none
.SH FILES
.TP
.I /etc/margo/agent.yaml
the configuration; an example with every setting is in
.I /usr/share/doc/margo-agent/examples
.TP
.I /var/lib/margo-agent
the state: what was accepted, what runs, what is still to be reported
"""
COMPLETION = """# bash completion for margo-agent; made by examples/packaging/manual.py
_margo_agent() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} command='' known='' index
    for ((index = 1; index < COMP_CWORD; index++)); do
        case ${{COMP_WORDS[index]}} in
            {valued}) ((index++)) ;;
            -*) ;;
            *) command=${{COMP_WORDS[index]}}; break ;;
        esac
    done
    case $before in
        {files}) mapfile -t COMPREPLY < <(compgen -f -- "$word"); return ;;
        --log-format) mapfile -t COMPREPLY < <(compgen -W 'text json' -- "$word"); return ;;
    esac
    case $command in
        '') known='{top}' ;;
{cases}
    esac
    mapfile -t COMPREPLY < <(compgen -W "$known" -- "$word")
}}
complete -F _margo_agent margo-agent
"""


def load_agent(path):
    """The agent as a module; reading it does nothing."""
    spec = importlib.util.spec_from_file_location("margo_agent", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def quote(text):
    """Text for troff: nothing in it is an instruction."""
    text = text.replace("margo_agent.py", "margo-agent")
    for character, spelt in (("\\", r"\e"), ("-", r"\-"), ("'", r"\(aq"), ("`", r"\(ga")):
        text = text.replace(character, spelt)
    return re.sub(r"(?m)^\.", r"\&.", text)


def make_page(agent):
    """The manual page's text."""
    commands = []
    for name, (function, usage) in agent.COMMANDS.items():
        paragraphs = [" ".join(part.split()) for part in (function.__doc__ or "").split("\n\n")]
        meaning = "\n.IP\n".join(quote(part) for part in paragraphs if part)
        commands.append(f".TP\n.B {quote(f'{name} {usage}'.strip())}\n{meaning}")
    found = re.search(r"Exit codes\.\s+(.*?)\.\n", agent.__doc__ or "", re.S)
    codes = [item.split(None, 1) for item in " ".join(found.group(1).split()).split(", ")] if found else []
    meanings = "\n".join(f".TP\n.B {code}\n{quote(words)}" for code, words in codes)
    return PAGE.format(version=agent.__version__, options=quote(agent.USAGE), commands="\n".join(commands), codes=meanings)


def make_completion(agent):
    """The completion's text."""
    _, globals_ = agent.parse_usage(agent.USAGE)
    rows = {name: agent.parse_usage(usage)[1] for name, (_, usage) in agent.COMMANDS.items()}
    every = dict(globals_)
    for options in rows.values():
        every.update(options)
    offered = {name: " ".join([*options, "--help"]) for name, options in rows.items()}
    cases = [f"        {name}) known='{words}' ;;" for name, words in offered.items()]
    return COMPLETION.format(
        valued="|".join(sorted(name for name, value in globals_.items() if value)),
        files="|".join(sorted(name for name, value in every.items() if value == "FILE")),
        top=" ".join(list(rows) + list(globals_)), cases="\n".join(cases))


def main():
    """Prints what is asked for."""
    if not 2 <= len(sys.argv) <= 3 or sys.argv[1] not in ("man", "bash"):
        sys.exit("usage: python3 examples/packaging/manual.py man|bash [AGENT]")
    path = sys.argv[2] if len(sys.argv) > 2 else os.path.join(HERE, os.pardir, os.pardir, "margo_agent.py")
    print({"man": make_page, "bash": make_completion}[sys.argv[1]](load_agent(path)), end="")


if __name__ == "__main__":
    main()
