#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The manual page and the completion for bash, made of what the agent says of itself.

    python3 examples/packaging/manual.py man > margo-agent.1                # /usr/share/man/man1
    python3 examples/packaging/manual.py completion > margo-agent           # /usr/share/bash-completion/completions
"""
import os
import re
import sys

sys.path.insert(1, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
import margo_agent                                  # noqa: E402

GLOBAL = {"-c": "FILE", "--config": "FILE", "-v": "", "--verbose": "", "-q": "", "--quiet": "", "--log-format": "text|json", "--help": ""}


def escape(text):
    """Text for troff: its own marks escaped, `words` in bold."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    text = re.sub(r"`([^`]+)`", r"\\fB\1\\fR", text)
    return re.sub(r"(?m)^([.'])", r"\\&\1", text)


def make_usage(name):
    """A command with its operands and options."""
    _, options, operands = margo_agent.COMMANDS[name]
    words = [f"[{option} {value}".rstrip() + "]" for option, value in options.items()]
    return " ".join(filter(None, [name, operands, *words]))


def make_man():
    """The manual page."""
    lines = [f'.TH MARGO\\-AGENT 1 "" "margo-agent {margo_agent.__version__}"', ".SH NAME",
             "margo\\-agent \\- Margo workload fleet client", ".SH SYNOPSIS",
             ".B margo\\-agent\n[\\-c FILE] [\\-v|\\-q] [\\-\\-log\\-format text|json] COMMAND", ".SH DESCRIPTION"]
    paragraphs = margo_agent.__doc__.split("\n\n")
    lines += [escape(paragraphs[1].replace("What it is.  ", "")), ".SH COMMANDS"]
    for name in margo_agent.COMMANDS:
        text = re.sub(r"\n +", "\n", margo_agent.COMMANDS[name][0].__doc__.strip())
        lines += [".TP", f".B {escape(make_usage(name))}", escape(text).replace("\n\n", "\n.sp\n")]
    lines += [".SH EXIT STATUS"]
    codes = " ".join(paragraphs[2].partition("Exit codes.")[2].split()).rstrip(".")
    for code, words in re.findall(r"(\d+) (.*?)(?:, (?=\d)|$)", codes):
        lines += [".TP", f".B {code}", escape(words)]
    lines += [".SH FILES", ".TP", ".I /etc/margo/agent.yaml",
              escape("The configuration; `margo-agent config --example` prints one with every setting."),
              ".TP", ".I /var/lib/margo\\-agent", "The state directory.",
              ".SH ENVIRONMENT", ".TP", ".B MARGO_CONFIG", "Another configuration, where \\-c names none.",
              ".TP", ".B https_proxy, no_proxy", "The proxy for all connections, and the hosts that are reached without it."]
    return "\n".join(lines)


def make_completion():
    """The completion for bash: commands, options, names of deployments, files."""
    cases = "\n".join(f'    {name}) words="{" ".join(row[1])}" ;;' for name, row in margo_agent.COMMANDS.items())
    named = "|".join(name for name, row in margo_agent.COMMANDS.items() if "NAME" in row[2])
    return f"""# bash completion for margo-agent
_margo_agent() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} command= words= index
    for ((index = 1; index < COMP_CWORD; index++)); do
        case ${{COMP_WORDS[index]}} in
        {"|".join(margo_agent.COMMANDS)}) command=${{COMP_WORDS[index]}}; break ;;
        esac
    done
    case $before in
    -c|--config|--out|--fetch-ca) COMPREPLY=($(compgen -f -- "$word")); return ;;
    --log-format) COMPREPLY=($(compgen -W "text json" -- "$word")); return ;;
    esac
    case $command in
    "") words="{" ".join(margo_agent.COMMANDS)} {" ".join(GLOBAL)}" ;;
{cases}
    esac
    case $command in
    {named}) words="$words $(margo-agent status --json 2>/dev/null | sed -n 's/^      "name": "\\(.*\\)",$/\\1/p')" ;;
    esac
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -F _margo_agent margo-agent
"""


if __name__ == "__main__":
    print({"man": make_man, "completion": make_completion}[sys.argv[1]]())
