"""`headgate bench optimizer`: a step of headgate.Muon on experts beside torch.optim.Muon, expert by expert."""

from __future__ import annotations

import argparse
import sys

import torch
from torch import Tensor, nn

from ..moe.muon import Muon
from .arguments import number, output, whole, workers
from .machine import must_fit, processor
from .measure import CLOCKS, Contestant, interleave, threads
from .output import write_json
from .screen import Screen

EXAMPLE = """examples:
  headgate bench optimizer --threads 1 --clock cpu
  headgate bench optimizer --experts 64 --hidden 512 1024 --intermediate 128 256 --split-gate-up
"""
WITHIN = 0.05  # of the largest change of a weight: what torch's bf16 leaves


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `headgate bench optimizer`."""
    parser.epilog = EXAMPLE
    add = parser.add_argument
    add("--experts", type=whole, default=64, metavar="E", help="default: %(default)s")
    add("--hidden", nargs="+", type=whole, default=[128, 256, 512], metavar="D", help="default: 128 256 512")
    add("--intermediate", nargs="+", type=whole, default=[32, 64, 128], metavar="F", help="as many as --hidden")
    add("--split-gate-up", action="store_true", help="gate and up are two matrices, for both")
    add("--threads", type=workers, metavar="N", help="for everybody (default: torch's choice)")
    add("--budget", type=number, default=5.0, metavar="S", help="seconds of sampling for each size (default: 5)")
    add("--clock", choices=tuple(CLOCKS), default="wall", help="cpu: the process's own time, with --threads 1 only")
    add("--json", type=output, metavar="FILE", help="write the figures to FILE; - for standard output")


def run(args: argparse.Namespace) -> int:
    """Measures and prints; returns the exit status: 1 where the two do not agree."""
    if len(args.hidden) != len(args.intermediate):
        raise ValueError("bench optimizer: --intermediate must have as many sizes as --hidden")
    if min(args.experts, *args.hidden, *args.intermediate) < 1:
        raise ValueError("bench optimizer: --experts, --hidden and --intermediate must be at least 1")
    most = max(3 * args.experts * d * f for d, f in zip(args.hidden, args.intermediate, strict=True))
    must_fit("bench optimizer: --experts, --hidden and --intermediate", 4.0 * 10 * most)
    with threads("bench optimizer", args.threads, args.clock):
        screen = Screen(out=sys.stderr if args.json == "-" else sys.stdout)
        screen.say(f"{processor()}; {torch.get_num_threads()} threads; torch {torch.__version__}; {args.clock} time")
        found = measure(args, screen)
    write_json(args.json, found)
    return 0 if all(row["error"] <= WITHIN for row in found["rows"]) else 1


def measure(args: argparse.Namespace, screen: Screen) -> dict:
    """A row for each size: median and least milliseconds of a step, how many times as fast, and the largest error."""
    rows = []
    table = [("D", "F", "torch.optim.Muon ms", "headgate ms", "times as fast", "error")]
    for hidden, intermediate in zip(args.hidden, args.intermediate, strict=True):
        row = _row(args, hidden, intermediate)
        rows.append(row)
        times = (f"{row['loop_ms']:.1f}", f"{row['headgate_ms']:.1f}", f"{row['times']:.2f}")
        table.append((str(hidden), str(intermediate), *times, f"{row['error']:.4f}"))
    screen.table(table)
    return {"version": 1, "experts": args.experts, "split_gate_up": args.split_gate_up, "rows": rows}


def _row(args: argparse.Namespace, hidden: int, intermediate: int) -> dict[str, float]:
    torch.manual_seed(0)
    blocks = 3 if args.split_gate_up else 2
    shapes = [(2 * intermediate, hidden), (hidden, intermediate)]
    if blocks == 3:
        shapes = [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]
    stacks = [nn.Parameter(torch.randn(args.experts, *s) / s[1] ** 0.5) for s in shapes]
    for p in stacks:
        p.grad = torch.randn_like(p)
    each = [[nn.Parameter(w.detach().clone()) for w in p] for p in stacks]
    for some, p in zip(each, stacks, strict=True):
        assert p.grad is not None
        for one, grad in zip(some, p.grad, strict=True):
            one.grad = grad.clone()
    start = [p.detach().clone() for p in stacks]
    ours = Muon(stacks, lr=0.01)
    loop = torch.optim.Muon([w for some in each for w in some], lr=0.01, adjust_lr_fn="match_rms_adamw")
    contestants = {"loop": Contestant(lambda _: loop.step()), "headgate": Contestant(lambda _: ours.step())}
    for who in contestants.values():
        begin = CLOCKS[args.clock]()
        who.run(0)
        who.first_s = CLOCKS[args.clock]() - begin
    error = max(map(_error, stacks, each, start))
    interleave(contestants, args.budget, args.clock)
    median = {name: sorted(who.samples_s)[len(who.samples_s) // 2] for name, who in contestants.items()}
    found = {f"{name}_ms": 1e3 * s for name, s in median.items()}
    found |= {f"{name}_least_ms": 1e3 * min(who.samples_s) for name, who in contestants.items()}
    times = median["loop"] / median["headgate"]
    return {"hidden": hidden, "intermediate": intermediate, **found, "times": times, "error": error}


def _error(stack: Tensor, each: list[nn.Parameter], start: Tensor) -> float:
    """The largest difference after one step, as a part of the largest change of a weight."""
    theirs = torch.stack([w.detach() for w in each])
    return ((stack.detach() - theirs).abs().max() / (theirs - start).abs().max()).item()
