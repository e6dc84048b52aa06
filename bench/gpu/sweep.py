"""`headgate bench sweep`: is the chosen tile a good one? The nearest others, timed beside it on this GPU.

Nothing is written that the library reads: the choice stays a pure function (kernels/tiles.py). This says
how far from the best of its candidates it lies.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...kernels.chip import H200, Chip, chip_of
from ...kernels.quantized import FORMATS
from .. import machine, screen
from ..arguments import device, number, output, whole
from ..check import TOLERANCE
from ..output import write_json
from ..shapes import DTYPES
from .build import Builder
from .compile import fault
from .products import GEMMS, Problem, Real, gemms_of, serves, weights_of
from .shapes import STANDARD
from .timing import Clock, captured

EXAMPLE = """examples:
  headgate bench sweep --shapes qwen3 --tokens 1 8 64 4096 32768 --minutes 3
  headgate bench sweep --shapes sonic-4096-1024-128-8 --tokens 32768 --gemms dw back --limit 60 --json sweep.json
  headgate bench sweep --shapes qwen3 gpt-oss --tokens 1 4 --formats none int4 mxfp4 fp8
"""
FAR = 1.25  # times the chosen tile's time: a candidate that takes so long twice is not timed more closely


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `headgate bench sweep`."""
    parser.epilog = EXAMPLE
    add = parser.add_argument
    add("--shapes", nargs="+", choices=list(STANDARD), metavar="SHAPE", default=["qwen3"], help="default: qwen3")
    add("--tokens", nargs="+", type=whole, metavar="T", default=[4096], help="tokens per call (default: 4096)")
    add(
        "--gemms", nargs="+", choices=list(GEMMS), metavar="GEMM",
        help=f"of {', '.join(GEMMS)} (default: those that a model runs with T tokens)",
    )  # fmt: skip
    formats = ("none", *FORMATS)
    add(
        "--formats", nargs="+", choices=formats, default=["none"], metavar="FORMAT",
        help=f"of the weights: {', '.join(formats)}; but for none, forward products only (default: none)",
    )  # fmt: skip
    add("--limit", type=whole, default=24, metavar="N", help="tiles of each, the nearest first (default: %(default)s)")
    add("--samples", type=whole, default=8, metavar="N", help="times each is timed (default: %(default)s)")
    add("--minutes", type=number, metavar="M", help="of all together: fewer tiles, the farthest first (default: any)")
    add("--dtype", choices=list(DTYPES), default="bf16", help="default: %(default)s")
    add("--json", type=output, metavar="FILE", help="write everything to FILE; - for standard output")
    add("--device", type=device, default="cuda", help=argparse.SUPPRESS)


class Sweep:
    """Times the products of one problem in a device's memory."""

    def __init__(self, problem: Problem, device: str, weights: dict[str, Any]) -> None:
        self.problem, self.clock = problem, Clock(device)
        calls = problem.calls if self.clock.cuda else min(2, problem.calls)
        self.real = Real(problem, device, weights, calls)

    def measure(
        self, gemm: str, limit: int, samples: int, builder: Builder | None = None, until: float | None = None
    ) -> dict[str, Any]:
        """Every candidate of one product beside the chosen tile: microseconds, and times the chosen one's, or why it
        has none. After `until` (time.monotonic) no other is begun."""
        tiles = self.problem.candidates(gemm, limit)
        found: list[dict[str, Any]] = []
        chosen: Callable[[], object] | None = None
        want: Sequence[Tensor] = ()
        for i, tile in enumerate(tiles):
            if i and (chosen is None or not _built(self.problem, gemm, tile, builder, until)):
                break
            entry: dict[str, Any] = {"tile": str(tile)}
            try:
                if builder is not None:
                    _check_builds(self.problem, gemm, tile, builder, spills=i == 0)
                got, run = self.real.with_tile(gemm, tile)
                want = want or got
                if not _close(got, want, TOLERANCE[self.problem.dtype]):
                    raise ArithmeticError("its numbers are not those of the chosen tile")
                del got
                if self.clock.cuda and self.problem.calls > 1:
                    run = captured(run)  # type: ignore[assignment]
                run()
                chosen = chosen or run
                us, ratio = beside(self.clock, chosen, run, samples)
                entry |= {"us": 1e6 * us / len(self.real.calls), "ratio": ratio}
            except Exception as error:
                entry["failed"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            found.append(entry)
        return _rank(self.problem, gemm, found, len(tiles), self.real.hit)


def beside(
    clock: Clock, chosen: Callable[[], object], other: Callable[[], object], samples: int
) -> tuple[float, float]:
    """Medians of the other's seconds, and of its times over the mean of the chosen one's just before and just after."""
    before, times, ratios = _seconds(clock, chosen), [], []
    for _ in range(samples):
        t, after = _seconds(clock, other), _seconds(clock, chosen)
        times.append(t)
        ratios.append(2 * t / (before + after))
        before = after
        if len(ratios) == 2 and min(ratios) > FAR:
            break
    return statistics.median(times), statistics.median(ratios)


def _seconds(clock: Clock, run: Callable[[], object]) -> float:
    clock.wait()
    clock.lead(3e-4)
    begin = clock.mark()
    run()
    end = clock.mark()
    clock.wait()
    return clock.between(begin, end)


def _built(problem: Problem, gemm: str, tile: Any, builder: Builder | None, until: float | None) -> bool:
    """Whether there is still time for a tile, its builds awaited."""
    for job in problem.jobs(gemm, tile) if builder is not None and until is not None else ():
        if builder.wait(job, max(0.0, until - time.monotonic())) is None:  # type: ignore[union-attr, operator]
            return False
    return until is None or time.monotonic() < until


def _check_builds(problem: Problem, gemm: str, tile: Any, builder: Builder, spills: bool) -> None:
    """Raises where the compiler could make nothing good of a tile; `spills`: which are no reason."""
    for job in problem.jobs(gemm, tile):
        result = builder.wait(job)
        assert result is not None
        why = fault(result | {"spill_bytes": 0} if spills else result)
        if why is not None:
            raise RuntimeError(why)


def _rank(problem: Problem, gemm: str, found: list[dict[str, Any]], of: int, hit: float) -> dict[str, Any]:
    """The chosen tile among the others. `noise`: by how much it differs from itself, timed as they are."""
    result: dict[str, Any] = {
        "shape": problem.shape.name, "tokens": problem.tokens, "dtype": problem.dtype, "format": problem.format,
        "gemm": gemm, "candidates": found, "of": of, "untried": of - len(found),
        "experts_hit": hit,
    }  # fmt: skip
    if "us" not in found[0]:
        return result | {"rank": None, "ratio": None, "failed": found[0]["failed"]}
    noise, found[0]["ratio"] = abs(found[0]["ratio"] - 1), 1.0
    timed = [f for f in found if "us" in f]
    best = min(timed, key=lambda f: f["ratio"])
    flops, size = problem.amounts(gemm, hit)
    return result | {
        "chosen": found[0]["tile"], "chosen_us": found[0]["us"], "best": best["tile"], "best_us": best["us"],
        "rank": 1 + sum(f["ratio"] < 1 for f in timed), "timed": len(timed), "ratio": 1 / best["ratio"],
        "noise": noise, "flops": flops, "bytes": size, "rate": problem.rate(flops, size, found[0]["us"]),
    }  # fmt: skip


def _close(got: Sequence[Tensor], want: Sequence[Tensor], tolerance: float) -> bool:
    for a, b in zip(got, want, strict=True):
        if a.numel():
            error = (a.float() - b.float()).abs().max() / b.float().abs().max().clamp_min(1e-30)
            if not float(error) <= tolerance:
                return False
    return True


def run(args: argparse.Namespace) -> int:
    """Times, prints, writes; 0, or 1 where a chosen tile has no time."""
    if min(args.limit, args.samples, *args.tokens) < 1:
        given = f"{args.limit}, {args.samples} and {args.tokens}"
        raise ValueError(f"sweep: --limit, --samples and --tokens must be at least 1, got {given}")
    if args.minutes is not None and not args.minutes > 0:
        raise ValueError(f"sweep: --minutes must be positive, got {args.minutes}")
    cuda = args.device.startswith("cuda")
    if cuda and not torch.cuda.is_available():
        raise RuntimeError("sweep: needs a GPU, and torch sees none; headgate bench compile looks at tiles without one")
    chip = chip_of(0) if cuda else H200
    cases = cases_of(args, chip)
    seen = screen.Screen(out=sys.stderr if args.json == "-" else sys.stdout)
    builder = Builder(max(1, machine.cores() - 1)) if cuda else None
    try:
        results = _sweep(args, cases, builder, seen)
    finally:
        if builder is not None:
            builder.close()
    seen.say("\n".join(table(results)))
    report = {"version": 2, "chip": chip.name, "torch": torch.__version__, "triton": machine.version("triton")}
    write_json(args.json, report | {"sweeps": results})
    return 1 if any(r["rank"] is None for r in results) else 0


def cases_of(args: argparse.Namespace, chip: Chip) -> list[tuple[Problem, list[str]]]:
    """The problems asked for, each with its products."""
    found = []
    for name in args.shapes:
        for format in args.formats:
            for t in args.tokens:
                gemms = [g for g in args.gemms or gemms_of(t, format) if serves(g, t, format)]
                if gemms:
                    found.append((Problem(STANDARD[name], t, args.dtype, format, chip), gemms))
    if not found:
        raise ValueError(f"sweep: --gemms must be some that these tokens and formats have, got {' '.join(args.gemms)}")
    return found


def _sweep(
    args: argparse.Namespace, cases: list[tuple[Problem, list[str]]], builder: Builder | None, seen: screen.Screen
) -> list[dict[str, Any]]:
    """Every product of every case. While one case is timed, the next one's kernels are built; what time is left is
    shared evenly among the products that are left."""
    end = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    results: list[dict[str, Any]] = []
    left, kept = sum(len(gemms) for _, gemms in cases), None
    weights: dict[str, Any] = {}
    _ask(builder, cases[:1], args.limit)
    for i, (problem, gemms) in enumerate(cases):
        _ask(builder, cases[i + 1 : i + 2], args.limit)
        if kept != (problem.shape, problem.format):
            weights.clear()
            kept, weights = (problem.shape, problem.format), weights_of(problem, args.device)
        sweep = Sweep(problem, args.device, weights)
        for gemm in gemms:
            now = time.monotonic()
            until = None if end is None else now + max(0.0, end - now) / left
            results.append(sweep.measure(gemm, args.limit, args.samples, builder, until))
            seen.say("\n".join(lines(results[-1])))
            left -= 1
        del sweep
        gc.collect()
        if builder is not None:
            torch.cuda.empty_cache()
            builder.forget()
            _ask(builder, cases[i + 1 : i + 2], args.limit)
    return results


def _ask(builder: Builder | None, cases: list[tuple[Problem, list[str]]], limit: int) -> None:
    """Has the kernels of these cases built: each product's chosen tile and its nearest before the far ones."""
    for problem, gemms in cases if builder is not None else ():
        for gemm in gemms:
            for tile in problem.candidates(gemm, limit):
                builder.ask(problem.jobs(gemm, tile))  # type: ignore[union-attr]


def lines(result: dict[str, Any], most: int = 5) -> list[str]:
    """The chosen tile's rank, and the fastest candidates."""
    head = _head(result)
    failed = [c for c in result["candidates"] if "failed" in c]
    if result["rank"] is None:
        return [f"{head} the chosen tile failed: {result['failed']}"]
    found = [
        f"{head} rank {result['rank']} of {result['timed']}, {result['ratio']:.3f} times the best's time, "
        f"{100 * result['noise']:.1f}% from itself; {result['untried']} untried"
    ]
    found.append(f"    chosen {result['chosen_us']:>9.1f} us  {result['chosen']}")
    ranked = sorted((c for c in result["candidates"] if "us" in c), key=lambda c: c["ratio"])
    found += [f"     {c['ratio']:.3f} {c['us']:>9.1f} us  {c['tile']}" for c in ranked[:most]]
    if failed:
        found.append(f"    {len(failed)} have no time; the first: {failed[0]['tile']}: {failed[0]['failed']}")
    return found


def _head(result: dict[str, Any]) -> str:
    stored = result["dtype"] if result["format"] == "none" else result["format"]
    return f"{result['shape']:<22} T {result['tokens']:>6}  {stored:<5}  {result['gemm']:<9}"


def table(results: Sequence[dict[str, Any]]) -> list[str]:
    """One line for each product: the chosen tile, and the best of those tried."""
    found = [("", "chosen us", "best us", "ratio", "noise", "tried", "rate", "best")]
    for r in results:
        if r["rank"] is None:
            found.append((_head(r), "failed", *[""] * 5, r["failed"]))
            continue
        times = (f"{r['chosen_us']:.1f}", f"{r['best_us']:.1f}", f"{r['ratio']:.3f}", f"{r['noise']:.3f}")
        best = "the chosen" if r["best"] == r["chosen"] else str(r["best"])
        found.append((_head(r), *times, f"{r['timed']} of {r['of']}", r["rate"], best))
    return screen.lines(found, left=(0, 7))
