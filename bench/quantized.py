"""`headgate bench quantized`: decoding with expert weights in few bits beside the same weights in bf16 and fp32."""

from __future__ import annotations

import argparse
import sys

import torch
from torch import Tensor

from ..kernels import Quantized, Routing, grouped_ffn, quantize
from ..kernels.quantized import BLOCKS
from .arguments import number, output, whole, workers
from .hardware import headgate_form
from .machine import must_fit, processor
from .measure import CLOCKS, Contestant, interleave, threads
from .output import write_json
from .screen import Screen

FORMATS = ("int8", "int4", "uint4", "mxfp4", *BLOCKS)
READ = "read"  # torch.sum over the fp32 weights
EXAMPLE = """examples:
  headgate bench quantized --rows 1 4 16 --threads 1 --clock cpu
  headgate bench quantized --formats int4 Q4_K Q6_K Q4_K+Q6_K --experts 128
"""
Weights = tuple[Tensor, Tensor] | tuple[Quantized, Quantized]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `headgate bench quantized`."""
    parser.epilog = EXAMPLE
    add = parser.add_argument
    add("--rows", nargs="+", type=whole, default=[1, 2, 4], metavar="R", help="tokens per call (default: 1 2 4)")
    add("--experts", type=whole, default=64, metavar="E", help="default: %(default)s")
    add("--top-k", type=whole, default=8, metavar="K", help="default: %(default)s")
    add("--hidden", type=whole, default=2048, metavar="D", help="default: %(default)s")
    add("--intermediate", type=whole, default=768, metavar="F", help="default: %(default)s")
    add(
        "--formats", nargs="+", metavar="FORMAT",
        help=f"of {', '.join(FORMATS)}, or A+B for gate and up in A, down in B (default: all that fit the sizes)",
    )  # fmt: skip
    add("--threads", type=workers, metavar="N", help="for everybody (default: torch's choice)")
    add(
        "--budget",
        type=number,
        default=10.0,
        metavar="S",
        help="seconds of sampling for each row (default: 10)",
    )
    add("--clock", choices=tuple(CLOCKS), default="wall", help="cpu: the process's own time, with --threads 1 only")
    add("--json", type=output, metavar="FILE", help="write the figures to FILE; - for standard output")


def run(args: argparse.Namespace) -> int:
    """Measures and prints; returns the exit status."""
    for name in ("experts", "top_k", "hidden", "intermediate"):
        if getattr(args, name) < 1:
            raise ValueError(
                f"bench quantized: --{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}"
            )
    if min(args.rows) < 1 or args.top_k > args.experts or args.hidden % 2 or args.intermediate % 2:
        raise ValueError("bench quantized: rows must be at least 1, top-k at most experts, and sizes even")
    args.formats = _formats(args)
    weights = 3.0 * args.experts * args.hidden * args.intermediate
    need = (6 + len(args.formats)) * weights + 4 * max(args.rows) * (args.hidden + 80 * args.experts)
    must_fit("bench quantized: --experts, --hidden, --intermediate and --rows", need)
    with threads("bench quantized", args.threads, args.clock):
        found = measure(args, Screen(out=sys.stderr if args.json == "-" else sys.stdout))
    write_json(args.json, found)
    return 0


def _formats(args: argparse.Namespace) -> list[str]:
    """Those asked for, or all that fit the sizes; each "A" is "A+A"."""
    sizes = {0: args.hidden, 1: args.intermediate}

    def misfit(name: str) -> str | None:
        pair = name.split("+") if "+" in name else [name, name]
        if len(pair) != 2 or any(f not in FORMATS for f in pair):
            return f"--formats must be of {', '.join(FORMATS)}, or two of them as A+B, got {name!r}"
        for i, f in enumerate(pair):
            step = BLOCKS[f][0] if f in BLOCKS else 2
            if sizes[i] % step:
                return f"--formats {name} must go with --{('hidden', 'intermediate')[i]} a multiple of {step}"
        return None

    if args.formats is None:
        return [f for f in FORMATS if misfit(f) is None]
    for name in args.formats:
        if why := misfit(name):
            raise ValueError(f"bench quantized: {why}")
    return list(dict.fromkeys(args.formats))


def measure(args: argparse.Namespace, screen: Screen) -> dict[str, dict[str, dict[str, float]]]:
    """rows -> form -> median and least time in ms, GB/s of weights read, how much that is of what torch.sum reads, and
    how many times as fast as bf16."""
    sizes = f"D={args.hidden}, F={args.intermediate}, {args.top_k} of {args.experts} experts, drawn for each call"
    screen.say(f"{processor()}; {torch.get_num_threads()} threads; {headgate_form()}")
    screen.say(f"grouped_ffn, {sizes}; rows in bf16 (fp32: fp32); {args.clock} time, the least of the samples")
    table = [("rows", "weights", "ms", "median", "GB/s", "of read", "x bf16", "x fp32")]
    forms = _forms(args)
    found = {}
    with screen.bar(len(args.rows)) as bar:
        for rows in args.rows:
            found[str(rows)] = _row(args, rows, forms)
            bar.update(len(found), f"{rows} rows")
            for name, f in found[str(rows)].items():
                times = (f"{f['ms']:.2f}", f"{f['median_ms']:.2f}", f"{f['GBps']:.1f}", f"{f['of_read']:.2f}")
                over = (f"{f['over_bf16']:.2f}", f"{f['over_fp32']:.2f}") if "over_bf16" in f else ("", "")
                table.append((str(rows), name, *times, *over))
    screen.table(table, left=(1,))
    return found


def _forms(args: argparse.Namespace) -> dict[str, Weights]:
    """A few experts' random weights, each many times over in memory of its own."""
    few, shapes = 4, ((2 * args.intermediate, args.hidden), (args.hidden, args.intermediate))
    wide = [torch.randn(few, *shape) / shape[1] ** 0.5 for shape in shapes]

    def copies(t: Tensor) -> Tensor:
        return t.repeat(-(-args.experts // few), 1, 1)[: args.experts]

    def stored(which: int, name: str) -> Quantized:
        q = quantize(wide[which], name.split("+")[which if "+" in name else 0])
        return Quantized(copies(q.data), copies(q.scale), q.format, q.block)

    return {
        "fp32": (copies(wide[0]), copies(wide[1])),
        "bf16": (copies(wide[0].bfloat16()), copies(wide[1].bfloat16())),
        **{name: (stored(0, name), stored(1, name)) for name in args.formats},
    }


def _row(args: argparse.Namespace, rows: int, forms: dict[str, Weights]) -> dict[str, dict[str, float]]:
    ids = [torch.rand(rows, args.experts).argsort(1)[:, : args.top_k] for _ in range(40)]  # weights are cold
    routings = [Routing.from_topk(i, torch.rand(i.shape), args.experts) for i in ids]
    x = torch.randn(rows, args.hidden)

    some = next(w for w in forms["fp32"] if isinstance(w, Tensor))[: max(1, args.experts // 8)]

    def contestant(name: str, weights: Weights | None = None) -> Contestant:
        mine = x if name == "fp32" else x.bfloat16()
        if weights is None:
            who = Contestant(lambda _: some.sum())
        else:
            who = Contestant(lambda turn: grouped_ffn(mine, routings[turn], *weights), rotate=len(routings))
        begin = CLOCKS[args.clock]()
        who.run(0)
        who.first_s = CLOCKS[args.clock]() - begin
        return who

    with torch.no_grad():
        contestants = {READ: contestant(READ), **{name: contestant(name, weights) for name, weights in forms.items()}}
        interleave(contestants, args.budget, args.clock)
    hit = sum(len(i.unique()) for i in ids) / len(ids) / args.experts
    least = {name: min(who.samples_s) for name, who in contestants.items()}
    read = some.nbytes / least[READ]
    found: dict[str, dict[str, float]] = {}
    for name, who in contestants.items():
        rate = read if name == READ else sum(w.nbytes for w in forms[name]) * hit / least[name]
        median = sorted(who.samples_s)[len(who.samples_s) // 2]
        found[name] = {"ms": 1e3 * least[name], "median_ms": 1e3 * median, "GBps": rate / 1e9, "of_read": rate / read}
        if name != READ:
            found[name] |= {f"over_{wide}": least[wide] / least[name] for wide in ("bf16", "fp32")}
    return found
