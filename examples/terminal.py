#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Draws what a terminal showed: reads a session's text and prints an SVG picture.

    sh examples/quickstart.sh > session.txt && python3 examples/terminal.py --from '== First poll' < session.txt > examples/terminal.svg

--from and --to are the beginnings of the first line that is drawn and of the first one that is not any more.
"""
import argparse
import html
import sys

WIDTH, LINE, LETTER, EDGE = 118, 18, 7.82, 14       # letters a line; pixels


def draw(lines):
    """An SVG of a dark terminal with these lines; commands (`$ …`) and headings (`== …`) stand out."""
    rows = [line[start:start + WIDTH] for line in lines for start in range(0, max(len(line), 1), WIDTH)]
    width, height = int(WIDTH * LETTER) + 2 * EDGE, len(rows) * LINE + 2 * EDGE
    colours = {"$ ": "#9ece6a", "==": "#7aa2f7"}
    texts = [f'<text x="{EDGE}" y="{EDGE + LINE * number + 13}" fill="{colours.get(row[:2], "#c8d0e0")}">{html.escape(row)}</text>'
             for number, row in enumerate(rows) if row]
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="monospace" font-size="13"'
                      ' style="white-space: pre">', '<rect width="100%" height="100%" rx="8" fill="#1a1b26"/>', *texts, "</svg>"])


def main():
    """Reads stdin, prints the picture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--from", dest="first", default="", help="beginning of the first line that is drawn")
    parser.add_argument("--to", dest="last", default="\0", help="beginning of the first line that is not any more")
    options = parser.parse_args()
    lines = sys.stdin.read().split("\n")
    start = next(index for index, line in enumerate(lines) if line.startswith(options.first))
    end = next((index for index, line in enumerate(lines) if index > start and line.startswith(options.last)), len(lines))
    print(draw("\n".join(lines[start:end]).rstrip().split("\n")))


if __name__ == "__main__":
    main()
