"""From the command line to the table: one file for each router and seed, so that a run goes on where it was ended."""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import draw, machine
from ..arguments import input_file, output, output_file, positive, seed, workers
from ..output import write_json
from ..screen import Screen

EXAMPLE = """examples:
  headgate bench routers --steps 20 --only softmax moepp --seeds 0
  headgate bench routers --folder runs --threads 1 --json routers.json --plot routers.png
"""
SIZES = ("demo", "small")  # of cases.SHAPES, which loads torch
BEST = 0.2  # of the coefficient of variation: what balances should stay below
Runs = Mapping[str, Sequence[Mapping[str, Any]]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `headgate bench routers`."""
    parser.epilog = EXAMPLE
    add = parser.add_argument
    add("--only", nargs="+", metavar="ROUTER", help="some of headgate.moe.ROUTERS (default: all)")
    add("--seeds", nargs="+", type=seed, default=[0, 1, 2], metavar="S", help="default: 0 1 2")
    add("--steps", type=positive, default=300, metavar="N", help="training steps (default: 300)")
    add("--size", choices=SIZES, default="demo", help="of the model: the demo's, or a tenth of it (default: demo)")
    add("--text", type=input_file, metavar="FILE", help="train on this file (default: Python's own library)")
    add("--folder", type=Path, metavar="DIR", help="keeps each run in a file, and runs none that is there already")
    add("--threads", type=workers, metavar="N", help="of torch (default: torch's choice)")
    add("--plot", type=output_file, metavar="FILE", help="draw loss, load and rows of each; .png or .svg")
    add("--json", type=output, metavar="FILE", help="write everything to FILE; - for standard output")


def run(args: argparse.Namespace) -> int:
    """Prints one table; always 0."""
    machine.need("bench routers", "transformers", "hf")
    if args.plot:
        draw.check(args.plot, "bench routers")
    import sys

    import torch

    from ...moe import ROUTERS

    names = list(ROUTERS) if args.only is None else list(dict.fromkeys(args.only))
    for name in names:
        if name not in ROUTERS:
            raise ValueError(f"bench routers: --only must be some of {', '.join(ROUTERS)}, got {name!r}")
    if args.folder is not None:
        args.folder.mkdir(parents=True, exist_ok=True)
    if args.threads:
        torch.set_num_threads(args.threads)
    screen = Screen(out=sys.stderr if args.json == "-" else sys.stdout)
    runs = _runs(args, names, screen)
    screen.table(_table(runs))
    if args.plot:
        draw.write(args.plot, 1160, 120 + 22 * len(runs), lambda figure: _draw(figure, runs))
    about = {"command": "headgate bench routers", "machine": machine.processor(), "size": args.size}
    write_json(args.json, about | {"steps": args.steps, "runs": runs})
    return 0


def _runs(args: argparse.Namespace, names: Sequence[str], screen: Screen) -> dict[str, list[dict[str, Any]]]:
    from ..corpus import read_corpus
    from .cases import SHAPES
    from .train import train

    shape = SHAPES[args.size]
    corpus = read_corpus(args.text, shape.length, "bench routers")
    text = {"text": hashlib.sha256(corpus.train.tobytes() + corpus.held_out.tobytes()).hexdigest()[:16]}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with screen.bar(len(names) * len(args.seeds)) as bar:
        for i, (chosen, name) in enumerate((s, n) for s in args.seeds for n in names):
            bar.update(i, f"{name}, seed {chosen}")
            kept = None if args.folder is None else args.folder / f"{args.size}-{args.steps}-{name}-{chosen}.json"
            if kept is not None and kept.exists():
                found[name].append(json.loads(kept.read_text()))
                if found[name][-1].get("text") != text["text"]:
                    raise ValueError(f"bench routers: --folder must hold runs on this text, got {kept} on another")
                continue
            found[name].append(train(name, shape, chosen, args.steps, corpus) | text)
            if kept is not None:
                write_json(str(kept), found[name][-1])
    return found


def mean(runs: Sequence[Mapping[str, Any]], *path: str) -> float:
    """Of one figure over the seeds."""

    def at(run: Any) -> float:
        for part in path:
            run = run[part]
        return float(run)

    return statistics.mean(map(at, runs))


def _table(runs: Runs) -> list[list[str]]:
    head = ["router", "bits a byte", "+-", "load CV", "held-out CV", "rows a token", "dropped", "uncovered", "local",
            "crossings", "MFLOP a token", "tokens/CPU s"]  # fmt: skip
    rows = [head]
    for name, those in sorted(runs.items(), key=lambda item: mean(item[1], "bits")):
        spread = statistics.pstdev([run["bits"] for run in those])
        slots = name == "soft"
        rows.append([
            name, f"{mean(those, 'bits'):.3f}", f"{spread:.3f}", f"{mean(those, 'training', 'variation'):.2f}",
            f"{mean(those, 'held_out', 'variation'):.2f}", f"{mean(those, 'held_out', 'rows_per_token'):.2f}",
            f"{mean(those, 'training', 'dropped'):.1%}", f"{mean(those, 'held_out', 'uncovered'):.1%}",
            "" if slots else f"{mean(those, 'held_out', 'local'):.0%}",
            "" if slots else f"{mean(those, 'held_out', 'crossings_per_token'):.2f}",
            f"{mean(those, 'flops_per_token') / 1e6:.2f}", f"{mean(those, 'tokens_per_cpu_second'):,.0f}",
        ])  # fmt: skip
    return rows


def _draw(figure: Any, runs: Runs) -> None:
    """A line for each router, the best loss on top; each panel is one figure. One far from the others is cut off."""
    names = sorted(runs, key=lambda name: -mean(runs[name], "bits"))
    panels = (
        (("bits",), "bits per byte, held-out text"),
        (("training", "variation"), "coefficient of variation of the load"),
        (("held_out", "rows_per_token"), "rows of expert products a token"),
    )
    axes = figure.subplots(1, len(panels), sharey=True)
    for axis, (path, words) in zip(axes, panels, strict=True):
        draw.plain(axis, "both")
        values = [mean(runs[name], *path) for name in names]
        middle = statistics.median(values)
        far = middle + 8 * (statistics.median(abs(v - middle) for v in values) or max(values))
        for y, (name, value) in enumerate(zip(names, values, strict=True)):
            colour = draw.WARM if name == "softmax" else draw.ACCENT
            axis.plot(min(value, far), y, "o", color=colour, markersize=7)
            if value > far:
                axis.annotate(f"{value:.2f}", (far, y), xytext=(-34, -4), textcoords="offset points", fontsize=10)
        axis.set_xlabel(words)
    axes[1].axvline(BEST, color=draw.SOFT, linewidth=1, linestyle=(0, (4, 5)))
    axes[0].set_yticks(range(len(names)), names)
