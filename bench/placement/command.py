"""From the command line to the table."""

from __future__ import annotations

import argparse
from html import escape
from pathlib import Path

from .. import html, machine
from ..arguments import effort, input_file, output, output_file
from ..output import write_text
from . import table
from .case import Case, case_of
from .rows import ROWS, Row

EXAMPLE = """examples:
  headgate bench placement
  headgate bench placement trace.npz --rows crossings copies --json figures.json --plot figures.html
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `headgate bench placement`."""
    parser.epilog = EXAMPLE
    add = parser.add_argument
    add(
        "trace",
        nargs="?",
        type=input_file,
        metavar="TRACE",
        help="a file (default: generated like DeepSeek-V2-Lite)",
    )
    add("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW", help=f"some of {', '.join(ROWS)}")
    add("--effort", type=effort, default=1.0, metavar="X", help="of every search, and of the bounds (default: 1)")
    add("--plot", type=output_file, metavar="FILE", help="the table as an HTML page")
    add("--json", type=output, metavar="FILE", help="write everything to FILE; - for standard output")


def run(args: argparse.Namespace) -> int:
    """Prints the rows as they are done; always 0."""
    case = case_of(args.trace)
    screen = table.screen_for(case, args.json)
    screen.say("load: busiest GPU / mean, averaged over layers. CPU s: processor seconds, compiled beforehand.")
    _compile(case, args.rows)
    found = table.fill(case, args.rows, ROWS, args.effort, screen)
    if args.plot:
        _draw(args.plot, case, found)
    table.write(case, found, args.json)
    return 0


def _compile(case: Case, names: list[str]) -> None:
    """Runs everything once on next to nothing, so that compiling is in no figure."""
    small = Case(
        "",
        case.fit.select(slice(64)),
        case.judge.select(slice(256)),
        case.fit_domain[:64],
        case.judge_domain[:256],
        case.whole,
    )
    for name in names:
        if name not in ("large", "certified", "rebalanced"):
            ROWS[name](small, 1e-6)


def _draw(path: Path, case: Case, found: dict[str, Row]) -> None:
    parts = "".join(
        f"<section><h2>{escape(row.title)}</h2>{html.table([row.head, *row.lines])}</section>" for row in found.values()
    )
    about = f"{escape(case.name)}; {escape(machine.processor())}"
    write_text(path, html.page("headgate bench placement", "Placements, side by side", about, parts))
