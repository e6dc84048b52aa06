"""From the command line to the placement file."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...bench.arguments import input_file, limit, number, seed, whole
from ...bench.machine import need
from ...bench.output import write_text
from ...bench.screen import Screen
from ...placement.careful import opened
from ...placement.cluster.topology import Topology
from ...placement.formats import EXPORTS, export, import_map
from ...placement.live.migrate import Migration, migrate
from ...placement.place import open_source, place, sampled
from ...placement.placement import Placement
from ...placement.problem import Objective
from ...placement.search.methods import METHODS
from ...placement.traces.file import TraceFile
from ...placement.traces.trace import Trace
from ...placement.walk import walk
from . import explain, page

OTHERS = ("linear", "eplb", "balance")
OBJECTIVES = ("time", "transitions", "copies", "load")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `headgate place`."""
    add = parser.add_argument
    add("trace", type=input_file, metavar="TRACE", help="a routing trace (.npz), as `headgate trace` writes it")
    add("--nodes", type=whole, required=True, metavar="N")
    add("--gpus-per-node", type=whole, required=True, metavar="M")
    add("--slots-per-gpu", type=whole, metavar="S", help="in a layer; more than the experts need hold replicas")
    add("--slots", type=whole, nargs="+", metavar="S", help="slots of each GPU, where they differ")
    add("--speed", type=number, nargs="+", metavar="X", help="speed of each GPU, where they differ")
    add("--links", default="h800-cx7", metavar="MACHINE", help="a preset of links (default: %(default)s)")
    add("--method", choices=list(METHODS), default="auto", help="default: %(default)s")
    add("--objective", choices=OBJECTIVES, default="time", help="what is to be small (default: %(default)s)")
    add("--max-load", type=number, metavar="X", help="busiest GPU over the mean at most, averaged over layers")
    add("--scenarios", type=whole, metavar="Q", help="also stand the loads of Q kinds of sequences in the trace")
    add("--groups", type=whole, default=1, metavar="n", help="groups of experts that stay on one node each")
    add("--pin", type=whole, nargs=3, action="append", metavar=("LAYER", "EXPERT", "GPU"), help="again for more")
    add("--time-limit", type=limit, default=60.0, metavar="s", help="default: %(default)s")
    add("--seed", type=seed, default=0, metavar="S", help="default: %(default)s")
    add("--hold-out", type=number, default=0.0, metavar="X", help="fit without this share of sequences, judge on it")
    add("--compare", action="store_true", help=f"beside {', '.join(OTHERS)} at the same slots")
    add("--explain", action="store_true", help="where the cost is, layer by layer and GPU by GPU")
    add("--plot", type=Path, metavar="FILE", help="draw it into an HTML page")
    add(
        "--migrate-from",
        type=input_file,
        metavar="FILE",
        help="a placement, ours or another system's: what must move",
    )
    add("--relabel", action="store_true", help="GPUs may change names to move less")
    add("--expert-bytes", type=number, default=6.0 * 7168 * 2048, metavar="B", help="of one expert, for the migration")
    add(
        "--output",
        type=Path,
        metavar="FILE",
        help="the placement, as JSON; may be left out with --compare or --explain",
    )
    add("--export", nargs=2, metavar=("SYSTEM", "FILE"), help=f"also for one of {', '.join(EXPORTS)}")
    add("--json", action="store_true", help="print the figures as JSON on standard output")


def run(args: argparse.Namespace) -> int:
    """Exit status: 0; 130 where Ctrl-C ended the search (what it had is written all the same)."""
    screen = Screen(out=sys.stderr if args.json else sys.stdout)
    topology = topology_of(args)
    _check(args)
    before = None if args.migrate_from is None else _earlier(args.migrate_from, topology)
    source = open_source(args.trace)
    if before is not None:
        _same_model(before, source, topology, args)
    fit, judge = _split(source, args.hold_out, args.seed)
    placement, migration = _placed(fit, topology, before, args, lambda line: screen.say(f"  {line}"))
    if args.output is not None:
        placement.save(args.output)
    if args.export:
        export(placement, args.export[1], args.export[0])
    shown = judge or sampled(fit)
    rows, notes = compared(placement, fit, shown, args) if args.compare or args.plot else ({}, {})
    output = None if args.output is None else str(args.output)
    found: dict[str, Any] = {"output": output, "cost": dict(placement.cost), "bound": dict(placement.bound)}
    found |= {"method": dict(placement.method), "compare": rows, "notes": notes}
    _show(placement, rows if args.compare else {}, judge is not None, screen)
    for name, note in notes.items() if args.compare else ():
        screen.say(f"{name}: {note}")
    if migration is not None:
        found["migration"] = _migration(migration, args)
        screen.say(_migration_line(found["migration"]))
    if args.explain:
        explain.show(placement, shown, screen)
    if args.plot:
        page.write(args.plot, placement, shown, rows)
        screen.say(f"pictures: {args.plot}")
    if args.output is not None:
        screen.say(f"placement: {args.output}")
    if args.json:
        print(json.dumps(found))
    if placement.method["interrupted"]:
        print("headgate: interrupted; what was found by then is kept", file=sys.stderr)
        return 130
    return 0


def topology_of(args: argparse.Namespace) -> Topology:
    """The topology that the options describe."""
    return replace(
        Topology.preset(args.links, args.nodes, args.gpus_per_node),
        slots=None if args.slots is None else tuple(args.slots),
        speed=None if args.speed is None else tuple(args.speed),
    )


def _check(args: argparse.Namespace) -> None:
    """What can be refused before the work is done."""
    if args.output is None:
        if not (args.compare or args.explain or args.plot):
            raise ValueError(
                "place: --output must be given, or one of --compare, --explain and --plot, got none of them"
            )
        if args.migrate_from is not None:
            raise ValueError("place: --output must be given with --migrate-from, got none")
    if args.export and args.export[0] not in EXPORTS:
        raise ValueError(f"place: --export must name one of {', '.join(EXPORTS)}, got {args.export[0]}")
    if not 0 <= args.hold_out < 1:
        raise ValueError(f"place: --hold-out must be 0 or more and below 1, got {args.hold_out}")
    if args.max_load is not None and args.objective not in ("transitions", "copies"):
        raise ValueError(f"place: --max-load goes with --objective transitions or copies, got {args.objective}")
    if args.relabel and (args.pin or args.slots or args.speed):
        raise ValueError("place: --relabel must be left out with --pin, --slots and --speed, got both")
    if args.export and args.slots and len(set(args.slots)) > 1:
        raise ValueError(f"place: --slots must be alike on every GPU for {args.export[0]}, got {args.slots}")
    if (
        args.migrate_from is not None
        and args.output is not None
        and args.migrate_from.absolute() == args.output.absolute()
    ):
        raise ValueError(f"place: --output must be another file than --migrate-from, got {args.output}")
    if args.plot is not None:
        need("place: --plot", "matplotlib", "plot")
    for path in (args.output, args.plot, args.export and Path(args.export[1])):
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"place: the folder of {path} must exist, got none")
        if path is not None and path.is_dir():
            raise ValueError(f"place: outputs must be files, got the folder {path}")


def _same_model(before: Placement, source: Trace | TraceFile, topology: Topology, args: argparse.Namespace) -> None:
    """Refuses, before the search, an earlier placement that no migration can start from."""
    slots = topology.slots_of_gpu(source.num_experts, args.slots_per_gpu).tolist()
    here = (source.shape[0], source.num_experts, topology.nodes, topology.gpus_per_node, slots)
    there = (len(before.expert_of_slot), before.num_experts, before.topology.nodes, before.topology.gpus_per_node,
             before.slots_of_gpu.tolist())  # fmt: skip
    names = ("layers", "experts", "nodes", "GPUs a node", "slots of GPUs")
    for name, wanted, given in zip(names, here, there, strict=True):
        if wanted != given:
            raise ValueError(f"place: --migrate-from must have {name} as asked for now, {wanted}, got {given}")


def _earlier(path: Path, topology: Topology) -> Placement:
    """Our own file, or another system's."""
    with opened(path, "place") as file:
        text = file.stream.read()
    ours = path.suffix == ".json" and b"physical_to_logical_map" not in text and text.lstrip()[:1] != b"["
    return Placement.load(path) if ours else import_map(path, topology)


def _split(source: Trace | TraceFile, share: float, seed: int) -> tuple[Trace | TraceFile, Trace | None]:
    """What to fit on, and what to judge by: whole sequences, or runs of 256 tokens where there are none."""
    if not share:
        return source, None
    trace = sampled(source)
    tokens = trace.shape[1]
    part = np.arange(tokens) // 256 if trace.sequence is None else trace.sequence
    names = np.random.default_rng(seed).permutation(np.unique(part))
    away = np.isin(part, names[: max(1, round(share * len(names)))])
    if away.all():
        raise ValueError(f"place: --hold-out must leave something to fit on, got {share} of {len(names)} sequences")
    return trace.select(~away), trace.select(away)


def _objective(args: argparse.Namespace, topology: Topology) -> str | Objective:
    if args.objective == "transitions":
        return Objective.transitions(topology, args.max_load)
    if args.objective == "copies":
        return Objective.copied(topology, max_load=args.max_load)
    return args.objective


def _placed(
    fit: Trace | TraceFile,
    topology: Topology,
    before: Placement | None,
    args: argparse.Namespace,
    say: Callable[[str], None],
    method: str | None = None,
) -> tuple[Placement, Migration | None]:
    """The placement that the options ask for, or the one of another method, with no bound."""
    found = place(
        fit,
        topology,
        args.slots_per_gpu,
        method or args.method,
        objective=_objective(args, topology),
        scenarios=args.scenarios,
        pins=None if method else args.pin,
        groups=1 if method else args.groups,
        time_limit=args.time_limit,
        seed=args.seed,
        bound=method is None,
        progress=say,
    )
    if before is None:
        return found, None
    migration = migrate(before, found, relabel=args.relabel)
    return replace(migration.target, cost=found.cost, bound=found.bound, method=found.method), migration


def compared(
    placement: Placement, fit: Trace | TraceFile, judge: Trace, args: argparse.Namespace
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """(figures on `judge` of this placement and of the others at the same slots, what is to be said of some). Those
    that cannot be made have no figures, and a note that says why."""
    rows, notes = {}, {}
    for name in OTHERS:
        try:
            other, _ = _placed(fit, placement.topology, None, args, lambda line: None, name)
            rows[name] = walk(judge, other).summary()
        except ValueError as error:  # such as EPLB, which wants slots alike on all GPUs
            notes[name] = f"not compared: {error}"
            continue
        if other.method.get("copies_replaced"):
            count = other.method["copies_replaced"]
            notes[name] = f"{count} copies, which it wants beside another of the same expert, gave way to other experts"
        if other.method["interrupted"]:
            raise KeyboardInterrupt
    rows["this"] = walk(judge, placement).summary()
    return rows, notes


def _show(placement: Placement, rows: dict[str, dict[str, Any]], held_out: bool, screen: Screen) -> None:
    cost, bound = placement.cost, placement.bound
    gap = f", the best possible is at most {bound['gap']:.1%} lower" if bound else ""
    screen.say(f"score {cost['score']:.6g}{' (proved optimal)' if bound.get('proved') else gap}")
    head = ["", "load", "GPUs", "copies", "node copies", "cross GPU", "cross node", "ms"]
    table = [head] + [
        [
            name,
            f"{found['imbalance']:.3f}",
            f"{found['gpus_per_token']:.2f}",
            f"{found['copies']:.3f}",
            f"{found['node_copies']:.3f}",
            f"{found['cross_gpu_share']:.1%}",
            f"{found['cross_node_share']:.1%}",
            f"{1e3 * found['seconds']:.2f}",
        ]
        for name, found in (rows or {"this": dict(cost)}).items()
    ]
    screen.say("on tokens held out:" if rows and held_out else "on the trace:")
    screen.table(table)
    screen.say(
        "load: busiest GPU / mean; GPUs a token reaches; copies: rows that leave a GPU or node, a token and layer;"
    )
    screen.say("cross: share of transitions; ms: predicted for a step of the workload")


def _migration(migration: Migration, args: argparse.Namespace) -> dict[str, Any]:
    """The figures; the steps go to a file of their own beside the placement."""
    path = args.output.with_name(args.output.stem + ".migration.json")
    steps = [asdict(step) for step in migration.steps]
    text = json.dumps({"version": 1, "from": str(args.migrate_from), "to": str(args.output), "steps": steps})
    write_text(path, text)
    return {
        "steps": str(path),
        "moved": migration.moved,
        "across_nodes": migration.across,
        "bytes": migration.moved * args.expert_bytes,
        "seconds": migration.seconds(args.expert_bytes),
    }


def _migration_line(found: dict[str, Any]) -> str:
    return (
        f"migration: {found['moved']} experts move, {found['across_nodes']} of them between nodes, "
        f"{found['bytes'] / 1e9:.2f} GB, predicted {1e3 * found['seconds']:.1f} ms; steps: {found['steps']}"
    )
