"""`headgate bench moe`: Headgate's expert layer beside everything else that computes it, in one run."""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from typing import Any

import torch

from .arguments import device, limit, number, output, positive, workers
from .case import Bench, GiB, Settings
from .figures import FIGURES, PEAKS, run_figures
from .hardware import describe
from .output import write_json
from .report import case_lines, figure_lines, legend, machine_lines
from .rivals import ABOUT, IMPLEMENTATIONS
from .screen import Screen
from .shapes import DTYPES, PASSES, SHAPES, UNSCALED, Case

TOKENS = (1, 16, 256, 2048, 8192)
RIVALS = tuple(n for n in IMPLEMENTATIONS if n not in ("headgate", "plain"))
EXAMPLE = """examples:
  headgate bench moe --figures                          the figures Headgate sets itself, about five minutes
  headgate bench moe --quick                            a first look, about a minute
  headgate bench moe --shapes qwen3 --tokens 1 16 --dtypes bf16 --passes forward --json out.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `headgate bench moe`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLE
    add = parser.add_argument
    add("--figures", action="store_true", help="measure the project's table of figures and nothing else")
    add("--quick", action="store_true", help="two shapes, up to 256 tokens, bf16, two seconds a case")
    add("--shapes", nargs="+", choices=list(SHAPES), metavar="SHAPE", help=f"of {', '.join(SHAPES)} (default: all)")
    add("--unscaled", action="store_true", help="the models' own sizes, where memory allows")
    add(
        "--tokens",
        nargs="+",
        type=positive,
        metavar="T",
        help=f"tokens per call (default: {' '.join(map(str, TOKENS))})",
    )
    add("--dtypes", nargs="+", choices=list(DTYPES), metavar="DTYPE", help="of fp32, bf16, fp16 (default: fp32 bf16)")
    add("--passes", nargs="+", choices=PASSES, metavar="PASS", help="of forward, train (default: both)")
    add("--rivals", nargs="*", choices=[*RIVALS, "plain"], metavar="RIVAL", help=f"of {', '.join([*RIVALS, 'plain'])}")
    add("--threads", type=workers, metavar="N", help="threads for everybody (default: torch's choice)")
    add("--budget", type=number, metavar="S", help="seconds of sampling per case (default: 10; 2 with --quick)")
    add("--limit", type=limit, default=20.0, metavar="S", help="skip what would take longer per call (default: 20)")
    add("--memory-limit", type=limit, default=4.0, metavar="GiB", help="skip what would need more memory (default: 4)")
    add("--no-peak", action="store_true", help="leave out the peak memory of training (a process for each)")
    add("--device", type=device, default="cpu", help="cpu (default) or cuda")
    add("--clock", choices=("wall", "cpu"), default="wall", help="cpu: the process's own time, with --threads 1 only")
    add(
        "--json",
        type=output,
        metavar="FILE",
        help="write everything, all samples too, to FILE; - for standard output",
    )


def cases(args: argparse.Namespace) -> list[Case]:
    """The cases asked for, by shape and dtype first, so that weights are made once for each."""
    quick = args.quick
    names = args.shapes or (["qwen3", "mixtral"] if quick else list(SHAPES))
    tokens = args.tokens or ([1, 16, 256] if quick else list(TOKENS))
    dtypes = args.dtypes or (["bf16"] if quick else ["fp32", "bf16"])
    shapes = [(UNSCALED if args.unscaled else SHAPES)[n] for n in names]
    product = itertools.product(shapes, dtypes, tokens, args.passes or PASSES)
    return [Case(shape, t, dtype, kind) for shape, dtype, t, kind in product]


def run(args: argparse.Namespace) -> int:
    """Measures, prints, writes; 0, or 1 where Headgate's own numbers were refused or nothing could be written, 2 for
    options that do not go together, 130 after Ctrl-C, which keeps what was measured."""
    problem = _refuse(args)
    if problem:
        print(f"headgate bench moe: {problem}", file=sys.stderr)
        return 2
    if args.threads:
        torch.set_num_threads(args.threads)
    screen = Screen(out=sys.stderr if args.json == "-" else sys.stdout)

    def show(lines: list[str]) -> None:
        screen.say("\n".join([*lines, ""]))

    report: dict[str, Any] = {"version": 1, "machine": describe(args.device), "settings": _plain(args), "cases": []}
    show([*machine_lines(report["machine"]), "", *legend()])
    began = time.monotonic()
    interrupted = False
    try:
        _measure(args, report, show, screen)
    except KeyboardInterrupt:
        interrupted = True
        print("headgate: bench moe: interrupted; what was measured is kept", file=sys.stderr)
    report["seconds"] = time.monotonic() - began
    if "figures" in report:
        show(figure_lines(report["figures"]))
    write_json(args.json, report)
    wrong = [c for c in report["cases"] if "refused" in c["implementations"].get("headgate", {})]
    return 130 if interrupted else 1 if wrong else 0


def _measure(args: argparse.Namespace, report: dict[str, Any], show, screen: Screen) -> None:
    budget = args.budget or (2.0 if args.quick else 6.0 if args.figures else 10.0)
    settings = Settings(
        rivals=RIVALS if args.rivals is None else tuple(args.rivals),
        bounds=("matmuls", "read") if args.figures else ("matmuls", "dense", "read"),
        budget_s=budget,
        limit_s=args.limit,
        memory_bytes=int(min(args.memory_limit, 2**20) * GiB),
        device=args.device,
        clock=args.clock,
        peaks=() if args.no_peak or args.quick else PEAKS,
    )
    done = report["cases"]
    todo = cases(args)
    total = len({figure.case for figure in FIGURES}) if args.figures else len(todo)
    with screen.bar(total) as bar:
        bench = Bench(settings, lambda what: bar.update(len(done), what))
        if args.figures:
            report["figures"] = run_figures(bench, lambda result: show(case_lines(result)), done)
            return
        show([f"  {name:<11} {said}" for name, said in {c.shape.name: c.shape.scaling for c in todo}.items()])
        for case in todo:
            done.append(bench.run(case))
            show(case_lines(done[-1]))


def _refuse(args: argparse.Namespace) -> str | None:
    """Why these options cannot be served, before anything is measured."""
    if args.clock == "cpu" and (args.threads != 1 or args.device != "cpu"):
        return f"--clock cpu must come with --threads 1 on the CPU, got --threads {args.threads} --device {args.device}"
    if args.budget is not None and not args.budget > 0:
        return f"--budget must be positive, got {args.budget}"
    if args.device != "cpu" and not (args.device.startswith("cuda") and torch.cuda.is_available()):
        return f"--device must be cpu, or cuda where torch sees a GPU, got {args.device}"
    rivals = RIVALS if args.rivals is None else args.rivals
    if any("transformers" in ABOUT[name] for name in rivals):
        try:
            import transformers  # noqa: F401
        except ImportError:
            return "eager, batched_mm and grouped_mm need transformers (pip install 'headgate[hf]'); or --rivals sorted"
    return None


def _plain(args: argparse.Namespace) -> dict[str, Any]:
    kept = {f.strip("-").replace("-", "_") for f in (
        "figures", "quick", "shapes", "unscaled", "tokens", "dtypes", "passes", "rivals", "threads", "budget", "limit",
        "memory_limit", "no_peak", "device", "clock",
    )}  # fmt: skip
    return {k: v for k, v in vars(args).items() if k in kept}
