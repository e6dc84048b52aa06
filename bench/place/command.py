"""From the command line to the placement file."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...placement.files import write_whole
from ...placement.formats import EXPORTS, export, import_map
from ...placement.methods import METHODS
from ...placement.migrate import Migration, migrate
from ...placement.place import open_source, place
from ...placement.placement import Placement
from ...placement.problem import Objective
from ...placement.topology import Topology
from ...placement.trace import Trace
from ...placement.walk import walk
from ..demo.screen import Screen
from . import explain, page

EXAMPLE = """examples:
  headgate place trace.npz --nodes 2 --gpus-per-node 4 --output placement.json
  headgate place trace.npz --nodes 1 --gpus-per-node 8 --slots-per-gpu 9 --objective transitions --max-load 1.06 \\
      --compare --explain --plot placement.html --output placement.json
  headgate place trace.npz --nodes 1 --gpus-per-node 8 --migrate-from placement.json --output new.json
  headgate place trace.npz --nodes 1 --gpus-per-node 8 --output placement.json --export sglang experts.json
"""
OTHERS = ("linear", "eplb", "balance")
OBJECTIVES = ("time", "transitions", "copies", "load")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `headgate place`."""
    parser.epilog = EXAMPLE
    add = parser.add_argument
    add("trace", type=Path, metavar="TRACE", help="a routing trace (.npz), as `headgate trace` writes it")
    add("--nodes", type=int, required=True, metavar="N")
    add("--gpus-per-node", type=int, required=True, metavar="M")
    add("--slots-per-gpu", type=int, metavar="S", help="in a layer; more than the experts need hold replicas")
    add("--slots", type=int, nargs="+", metavar="S", help="slots of each GPU, where they differ")
    add("--speed", type=float, nargs="+", metavar="X", help="speed of each GPU, where they differ")
    add("--links", default="h800-cx7", metavar="MACHINE", help="a preset of links (default: %(default)s)")
    add("--method", choices=list(METHODS), default="auto", help="default: %(default)s")
    add("--objective", choices=OBJECTIVES, default="time", help="what is to be small (default: %(default)s)")
    add("--max-load", type=float, metavar="X", help="busiest GPU over the mean at most, averaged over layers")
    add("--scenarios", type=int, metavar="Q", help="also stand the loads of Q kinds of sequences in the trace")
    add("--groups", type=int, default=1, metavar="n", help="groups of experts that stay on one node each")
    add("--pin", type=int, nargs=3, action="append", metavar=("LAYER", "EXPERT", "GPU"), help="again for more")
    add("--time-limit", type=float, default=60.0, metavar="s", help="default: %(default)s")
    add("--seed", type=int, default=0, metavar="S", help="default: %(default)s")
    add("--hold-out", type=float, default=0.0, metavar="X", help="judge on this last share of each sequence's tokens")
    add("--compare", action="store_true", help=f"beside {', '.join(OTHERS)} at the same slots")
    add("--explain", action="store_true", help="where the cost is, layer by layer and GPU by GPU")
    add("--plot", type=Path, metavar="FILE", help="draw it into an HTML page")
    add("--migrate-from", type=Path, metavar="FILE", help="a placement, ours or another system's: what has to move")
    add("--expert-bytes", type=float, default=6.0 * 7168 * 2048, metavar="B", help="of one expert, for the migration")
    add("--output", type=Path, required=True, metavar="FILE", help="the placement, as JSON")
    add("--export", nargs=2, metavar=("SYSTEM", "FILE"), help=f"also for one of {', '.join(EXPORTS)}")
    add("--json", action="store_true", help="print the figures as JSON on standard output")


def run(args: argparse.Namespace) -> int:
    """Exit status: 0; 130 where Ctrl-C ended the search (what it had is written all the same)."""
    screen = Screen(out=sys.stderr if args.json else sys.stdout)
    topology = replace(
        Topology.preset(args.links, args.nodes, args.gpus_per_node),
        slots=None if args.slots is None else tuple(args.slots),
        speed=None if args.speed is None else tuple(args.speed),
    )
    before = _before(args.migrate_from, topology)
    if args.export and args.export[0] not in EXPORTS:
        raise ValueError(f"place: --export must name one of {', '.join(EXPORTS)}, got {args.export[0]}")
    _writable(args)
    with open_source(args.trace) as source:
        fit, judge = _split(source, args.hold_out)
        placement = place(
            fit,
            topology,
            args.slots_per_gpu,
            args.method,
            objective=_objective(args, topology),
            scenarios=args.scenarios,
            pins=args.pin,
            groups=args.groups,
            start=before
            if before is not None and args.method == "auto" and _fits(before, fit, args, topology)
            else None,
            time_limit=args.time_limit,
            seed=args.seed,
            progress=lambda line: screen.say(f"  {line}"),
        )
        migration = None
        if before is not None:
            migration = migrate(before, placement)
            placement = replace(placement, expert_of_slot=migration.target.expert_of_slot)
        placement.save(args.output)
        if args.export:
            export(placement, args.export[1], args.export[0])
        found = {"placement": str(args.output), **_figures(placement), "groups": args.groups}
        rows = compared(placement, fit, judge, topology, args) if args.compare or args.plot else {}
    _say(screen, placement, rows if args.compare else {}, args)
    if rows:
        found["compare"] = {name: row[1] for name, row in rows.items()}
    if migration is not None:
        found["migration"] = _migration(screen, migration, args)
    sample = judge if isinstance(judge, Trace) else judge.sample()
    if args.explain:
        for line in explain.lines(placement, sample):
            screen.say(line)
    if args.plot:
        page.write(args.plot, placement, sample, rows)
        screen.say(f"pictures: {args.plot}")
    screen.say(f"placement: {args.output}")
    if args.json:
        print(json.dumps(found))
    return 130 if placement.method["interrupted"] else 0
