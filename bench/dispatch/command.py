"""`headgate bench dispatch`: Headgate's dispatchers beside rivals on gloo ranks of this machine."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from ...dispatch.wire import FORMATS
from .. import report as plain
from ..arguments import number, output, positive, workers
from ..hardware import describe
from ..output import write_json
from ..screen import Bar, Screen
from ..shapes import DTYPES, PASSES, Case
from .contestants import CONTESTANTS, TRANSFORMERS, with_wires
from .launch import RANK, launch
from .overhead import SHAPE, run_overhead
from .overhead import TOKENS as LARGE
from .report import CAUTION, any_refused, case_lines, legend, load_note, ratios
from .world import SHAPES

TOKENS = 256
EXAMPLE = """examples:
  headgate bench dispatch --quick                       a first look, about half a minute
  headgate bench dispatch                               three shapes, fp32 and bf16, 4 ranks on 2 nodes: minutes
  headgate bench dispatch --shapes fine --contestants all_to_all plain --wires fp8 int8 --json out.json
  headgate bench dispatch --overhead                    one rank: Experts with Local beside grouped_ffn
  headgate bench dispatch --overhead --threads 1 --clock cpu      the same on a machine that does other work
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `headgate bench dispatch`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLE
    add = parser.add_argument
    add("--overhead", action="store_true", help="measure the overhead of one rank's dispatcher and nothing else")
    add("--quick", action="store_true", help="one shape, fp32, two seconds a case")
    add("--ranks", type=positive, default=4, metavar="G", help="processes, one thread each (default: 4)")
    add("--ranks-per-node", type=positive, default=2, metavar="g", help="which count as one node (default: 2)")
    add("--shapes", nargs="+", choices=list(SHAPES), metavar="SHAPE", help=f"of {', '.join(SHAPES)} (default: all)")
    add("--tokens", type=positive, metavar="T", help=f"of each rank (default: {TOKENS}; {LARGE} with --overhead)")
    add("--dtypes", nargs="+", choices=list(DTYPES), metavar="DTYPE", help="of fp32, bf16, fp16 (default: fp32 bf16)")
    add("--passes", nargs="+", choices=PASSES, metavar="PASS", help="of forward, train (default: both)")
    add("--contestants", nargs="+", choices=list(CONTESTANTS), metavar="NAME", help=f"of {', '.join(CONTESTANTS)}")
    add(
        "--wires",
        nargs="*",
        choices=FORMATS[1:],
        metavar="WIRE",
        help="of bf16, fp8, int8, as rows more (default: bf16)",
    )
    add(
        "--skew",
        type=number,
        default=0.0,
        metavar="S",
        help="deviation of the experts' log-popularities (default: 0, even)",
    )
    add(
        "--budget",
        type=number,
        metavar="S",
        help="seconds of timing per case (default: 8; 2 with --quick; 20 with --overhead)",
    )
    add(
        "--timeout",
        type=number,
        default=120.0,
        metavar="S",
        help="end the run after this long without news (default: 120)",
    )
    add("--threads", type=workers, metavar="N", help="with --overhead: threads (default: torch's choice)")
    add(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: a process's own time, for a machine that does other work",
    )
    add(
        "--json",
        type=output,
        metavar="FILE",
        help="write everything, all samples too, to FILE; - for standard output",
    )


def run(args: argparse.Namespace, command: Sequence[str] = RANK) -> int:
    """Measures, prints, writes; 0, or 1 where Headgate's own numbers were refused or a rank failed, 2 for options that
    do not go together, 130 after Ctrl-C, which keeps what was measured, as does a rank's failure. `command` starts
    a rank."""
    problem = _refuse(args)
    if problem:
        print(f"headgate bench dispatch: {problem}", file=sys.stderr)
        return 2
    screen = Screen(out=sys.stderr if args.json == "-" else sys.stdout)

    def show(lines: list[str]) -> None:
        screen.say("\n".join([*lines, ""]))

    if args.threads:
        torch.set_num_threads(args.threads)
    machine = describe() | ({} if args.overhead else {"threads": 1, "ranks": args.ranks})
    report: dict[str, Any] = {"version": 1, "machine": machine, "settings": _plain(args), "cases": []}
    show([*plain.machine_lines(machine | {"load_1min": None}), *load_note(machine)])
    began, failed, interrupted = time.monotonic(), "", False
    try:
        if args.overhead:
            failed = "; ".join(_overhead(args, report, show))
        else:
            show([f"ranks     {args.ranks}, {args.ranks_per_node} a node, one thread each", *CAUTION, "", *legend()])
            _ranks(args, report, show, screen, command)
    except (KeyboardInterrupt, RuntimeError) as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        failed = "bench dispatch: interrupted" if interrupted else str(error)
        print(f"headgate: {failed}; what was measured is kept", file=sys.stderr)
    report["seconds"] = time.monotonic() - began
    write_json(args.json, report)
    return 130 if interrupted else 1 if failed or (not args.overhead and any_refused(report["cases"])) else 0


def _ranks(args: argparse.Namespace, report: dict[str, Any], show, screen: Screen, command: Sequence[str]) -> None:
    asked = job(args)

    def tell(news: dict[str, Any], bar: Bar) -> None:
        if "progress" in news:
            bar.update(len(report["cases"]), news["progress"])
            return
        case = news["case"]
        case["ratios"] = ratios(case)
        report["cases"].append(case)
        show(case_lines(case))

    with screen.bar(len(asked["worlds"]) * len(asked["passes"])) as bar:
        launch(asked, partial(tell, bar=bar), command)


def job(args: argparse.Namespace) -> dict[str, Any]:
    """What the ranks are told to do, as JSON."""
    shapes = args.shapes or (["fine"] if args.quick else list(SHAPES))
    dtypes = args.dtypes or (["fp32"] if args.quick else ["fp32", "bf16"])
    wires = ["bf16"] if args.wires is None else args.wires
    names = args.contestants or list(CONTESTANTS)
    return {
        "ranks": args.ranks,
        "ranks_per_node": args.ranks_per_node,
        "passes": list(args.passes or PASSES),
        "skew": args.skew,
        "budget_s": args.budget or (2.0 if args.quick else 8.0),
        "timeout_s": args.timeout,
        "clock": args.clock,
        "worlds": [
            {
                "shape": asdict(SHAPES[shape]),
                "tokens": args.tokens or TOKENS,
                "dtype": dtype,
                # rows of bf16 travel in it as they are
                "contestants": with_wires(names, [w for w in wires if w != dtype]),
            }
            for shape, dtype in itertools.product(shapes, dtypes)
        ],
    }


def _overhead(args: argparse.Namespace, report: dict[str, Any], show) -> list[str]:
    """Why cases were left out, if any were."""
    cases = [
        Case(SHAPE, args.tokens or LARGE, dtype, kind)
        for dtype, kind in itertools.product(args.dtypes or ["fp32", "bf16"], args.passes or PASSES)
    ]
    budget = args.budget or (4.0 if args.quick else 20.0)
    left_out = run_overhead(cases, budget, args.clock, lambda case: show(plain.case_lines(case)), report)
    show([*left_out, *(plain.figure_lines(report["figures"]) if report["figures"] else [])])
    return left_out


def _refuse(args: argparse.Namespace) -> str | None:
    """Why these options cannot be served, before anything is started."""
    if args.budget is not None and not args.budget > 0:
        return f"--budget must be positive, got {args.budget}"
    if not 0 < args.timeout < 1e6:
        return f"--timeout must be positive and below 1e6, got {args.timeout}"
    if not 0 <= args.skew < 10:
        return f"--skew must be between 0 and 10, got {args.skew}"
    if args.overhead:
        if args.clock == "cpu" and args.threads != 1:
            return f"--clock cpu must come with --threads 1 here, got --threads {args.threads}"
        return None
    if args.threads:
        return "--threads must come with --overhead: a rank has one thread"
    if args.ranks < 2:
        return f"--ranks must be at least 2, got {args.ranks}"
    if args.ranks % args.ranks_per_node:
        return f"--ranks-per-node must divide the {args.ranks} ranks, got {args.ranks_per_node}"
    for name in args.shapes or SHAPES:
        if SHAPES[name].experts % args.ranks:
            return f"--ranks must divide the {SHAPES[name].experts} experts of {name}, got {args.ranks}"
    if not (dist.is_available() and dist.is_gloo_available()):
        return f"torch must have gloo, got {torch.__version__} without it"
    if importlib.util.find_spec("transformers") is None and set(TRANSFORMERS) & set(args.contestants or CONTESTANTS):
        needy = ", ".join(TRANSFORMERS)
        return f"{needy} need transformers (pip install 'headgate[hf]'); or --contestants all_to_all plain"
    return None


def _plain(args: argparse.Namespace) -> dict[str, Any]:
    kept = (
        *("overhead", "quick", "ranks", "ranks_per_node", "shapes", "tokens", "dtypes", "passes", "contestants"),
        *("wires", "skew", "budget", "timeout", "threads", "clock"),
    )
    return {k: getattr(args, k) for k in kept}
