"""From the command line to the tour."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ...bench.arguments import seed, whole
from ...bench.machine import need
from ...bench.screen import Screen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `headgate demo`."""
    add = parser.add_argument
    add("--text", type=Path, metavar="FILE", help="train on this file (default: Python's own library)")
    add("--output", type=Path, metavar="DIR", default=Path("headgate-demo"), help="default: %(default)s")
    add("--steps", type=whole, metavar="N", help="training steps (default: what fits in about 90 s)")
    add("--seed", type=seed, default=0, metavar="S", help="default: %(default)s")
    add("--json", action="store_true", help="print the figures as JSON on standard output, all else on standard error")


def run(args: argparse.Namespace) -> int:
    """Exit status: 0, or 130 where Ctrl-C ended the tour. Raises ValueError on bad usage, RuntimeError where a package
    is not installed."""
    need("demo", "transformers", "hf,plot")
    need("demo", "matplotlib", "hf,plot")
    from . import chapters

    options = chapters.Options(text=args.text, output=args.output, steps=args.steps, seed=args.seed)
    tour = chapters.run(options, Screen(out=sys.stderr if args.json else sys.stdout))
    if args.json:
        print(json.dumps(tour.metrics))
    return 130 if tour.interrupted else 0
