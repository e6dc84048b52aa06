"""From the command line to the table."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from .. import machine
from ..demo.screen import Screen
from ..placement.case import case_of
from .rows import ROWS

EXAMPLE = """examples:
  headgate bench offload
  headgate bench offload trace.npz --rows eviction recall prefetch --json figures.json
  headgate bench offload trace.npz --rows generation --threads 1
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `headgate bench offload`."""
    parser.epilog = EXAMPLE
    add = parser.add_argument
    add("trace", nargs="?", type=Path, metavar="TRACE", help="a trace file (default: generated like DeepSeek-V2-Lite)")
    add("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW", help=f"some of {', '.join(ROWS)}")
    add("--effort", type=float, default=1.0, metavar="X", help="of what is repeated (default: 1)")
    add("--threads", type=int, metavar="N", help="torch's threads in batching and generation (default: torch's choice)")
    add("--json", metavar="FILE", help="write everything to FILE; - for standard output")


def run(args: argparse.Namespace) -> int:
    """Prints the rows as they are done; always 0."""
    if not args.effort > 0:
        raise ValueError(f"offload: --effort must be above 0, got {args.effort}")
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"offload: --threads must be at least 1, got {args.threads}")
        import torch

        torch.set_num_threads(args.threads)
    screen = Screen(out=sys.stderr if args.json == "-" else sys.stdout)
    case = case_of(args.trace)
    screen.say(
        f"{case.name}: fitted on {case.fit.shape[1]:,} tokens, judged on {case.judge.shape[1]:,}; {machine.processor()}"
    )
    found = {}
    for name in args.rows:
        row = found[name] = ROWS[name](case, args.effort)
        screen.heading(row.title)
        screen.table([row.head, *row.lines])
    if args.json:
        text = json.dumps(
            {"case": case.name, "machine": machine.processor(), "rows": {k: asdict(r) for k, r in found.items()}}
        )
        if args.json == "-":
            print(text)
        else:
            Path(args.json).write_text(text + "\n")
    return 0
