"""`headgate bench sweep`: is the chosen tile a good one? Every candidate of every GEMM kernel, timed on this GPU.

Nothing is written that the library reads: the choice stays a pure function (kernels/tiles.py). This says
how far from the best of its candidates it lies.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...kernels.chip import H200, Chip, chip_of
from ...kernels.launch import launch
from .. import machine
from ..check import TOLERANCE
from ..shapes import DTYPES, Problem, Shape
from .record import Launched, Meta, Recorder
from .shapes import STANDARD, problem_on
from .timing import Clock

EXAMPLE = """examples:
  headgate bench sweep --shapes qwen3 --tokens 32768
  headgate bench sweep --shapes sonic-4096-1024-128-8 --gemms dw back --limit 60 --json sweep.json
"""
# the product of kernels/tiles.py -> (pass, kernel)
GEMMS = {
    "up": ("forward", "up_kernel"),
    "down": ("forward", "rows_kernel"),
    "back": ("backward", "back_kernel"),
    "dx": ("backward", "rows_kernel"),
    "dw": ("backward", "dw_kernel"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `headgate bench sweep`."""
    parser.epilog = EXAMPLE
    add = parser.add_argument
    add("--shapes", nargs="+", choices=list(STANDARD), metavar="SHAPE", default=["qwen3"], help="default: qwen3")
    add("--tokens", nargs="+", type=int, metavar="T", default=[4096], help="tokens per call (default: 4096)")
    add("--gemms", nargs="+", choices=list(GEMMS), metavar="GEMM", help=f"of {', '.join(GEMMS)} (default: all)")
    add("--limit", type=int, default=24, metavar="N", help="candidates of each, spread evenly (default: %(default)s)")
    add("--samples", type=int, default=10, metavar="N", help="launches timed of each (default: %(default)s)")
    add("--dtype", choices=list(DTYPES), default="bf16", help="default: %(default)s")
    add("--json", metavar="FILE", help="write everything to FILE; - for standard output")
    add("--device", default="cuda", help=argparse.SUPPRESS)


class _Keeping:
    """A `Launch` that runs everything and keeps the launches of one kernel, to run them again alone."""

    def __init__(self, kernel: str) -> None:
        self.kernel, self.kept = kernel, []  # type: ignore[var-annotated]

    def __call__(self, kernel: Any, grid: Sequence[int], *, warps: int = 4, stages: int = 2, **arguments: Any) -> None:
        launch(kernel, grid, warps=warps, stages=stages, **arguments)
        if kernel.fn.__name__ == self.kernel:
            self.kept.append(Launched(kernel, tuple(grid), warps, stages, arguments))

    def again(self) -> None:
        for k in self.kept:
            launch(k.kernel, k.grid, warps=k.warps, stages=k.stages, **k.arguments)


class Sweep:
    """One problem: the pass that a product belongs to, run with any tiles."""

    def __init__(self, shape: Shape, tokens: int, device: str, dtype: str) -> None:
        from ...kernels import tiles

        self.shape, self.tokens, self.dtype = shape, tokens, dtype
        self.chip: Chip = chip_of(0) if device.startswith("cuda") else H200
        self.clock = Clock(device)
        self.problem: Problem = problem_on(device, shape, tokens, dtype=DTYPES[dtype])
        pairs, size = tokens * shape.top_k, DTYPES[dtype].itemsize
        form = shape.form
        self.size = tiles.Size(
            pairs, shape.hidden, shape.intermediate, shape.experts, size, form.gated, shape.interleaved
        )
        self.chosen = tiles.choose(self.size, self.chip)
        self.candidates = tiles.candidates(self.size, self.chip)

    def candidates_of(self, gemm: str, limit: int) -> list[Any]:
        """The chosen tile first, then others."""
        chosen = getattr(self.chosen, gemm)
        others = [t for t in self.candidates[gemm] if t != chosen]
        n = min(limit - 1, len(others))
        return [chosen, *(others[i * len(others) // n] for i in range(n))]

    def launches(self, gemm: str, tile: Any) -> list[Launched]:
        """Those of this product with this tile, noted without running."""
        recorder, (kind, kernel) = Recorder(), GEMMS[gemm]
        self._pass(kind, Meta(self.shape, self.tokens, DTYPES[self.dtype]), recorder, gemm, tile)
        return [found for found in recorder.launches if found.name == kernel]

    def _pass(self, kind: str, m: Any, through: Callable, gemm: str, tile: Any) -> Any:
        from ...kernels.grouped_ffn import on_triton

        tiles = self.chosen.using(gemm, tile)
        if kind == "forward":
            return on_triton.forward(*m.forward(keep=True), chip=self.chip, launch=through, tiles=tiles)
        return on_triton.backward(*m.backward(), chip=self.chip, launch=through, tiles=tiles)

    def real(self) -> Meta:
        """The problem's own tensors as the operators receive them."""
        m = Meta(self.shape, self.tokens, DTYPES[self.dtype])
        ids, weights = self.problem.routings[0]
        p = {n: w.detach() for n, w in self.problem.parameters.items()}
        m.rows, m.grad, m.ids = self.problem.x.detach(), self.problem.grad, ids.to(torch.int32)
        m.weights, m.w1, m.w2 = weights.detach().float(), p["gate_up_proj"], p["down_proj"]
        m.b1, m.b2 = p.get("gate_up_proj_bias"), p.get("down_proj_bias")
        m.h = self._pass("forward", m, launch, "up", self.chosen.up)[1]
        return m

    def measure(self, gemm: str, limit: int, samples: int) -> dict[str, Any]:
        """Every candidate of one product: microseconds, or why it has none; the chosen one's rank and ratio."""
        kind, kernel = GEMMS[gemm]
        m, want = self.real(), None
        found: list[dict[str, Any]] = []
        for tile in self.candidates_of(gemm, limit):
            entry: dict[str, Any] = {"tile": str(tile)}
            try:
                keeping = _Keeping(kernel)
                got = self._pass(kind, m, keeping, gemm, tile)
                want = want or got
                if not _close(got, want, TOLERANCE[self.dtype]):
                    raise ArithmeticError("its numbers are not those of the chosen tile")
                entry["us"] = self._time(keeping, samples)
            except Exception as error:
                entry["failed"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            found.append(entry)
        return _rank(self.shape, self.tokens, gemm, found)

    def _time(self, keeping: _Keeping, samples: int) -> float:
        times = []
        keeping.again()
        for _ in range(samples):
            self.clock.wait()
            self.clock.lead(1e-4)
            begin = self.clock.mark()
            keeping.again()
            end = self.clock.mark()
            self.clock.wait()
            times.append(1e6 * self.clock.between(begin, end))
        return statistics.median(times)


def _rank(shape: Shape, tokens: int, gemm: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    times = [f["us"] for f in found if "us" in f]
    result: dict[str, Any] = {"shape": shape.name, "tokens": tokens, "gemm": gemm, "candidates": found}
    if "us" not in found[0]:
        return result | {"rank": None, "ratio": None, "failed": found[0]["failed"]}
    chosen = found[0]["us"]
    best = min(found, key=lambda f: f.get("us", float("inf")))
    return result | {
        "chosen": found[0]["tile"], "chosen_us": chosen, "best": best["tile"], "best_us": best["us"],
        "rank": 1 + sum(t < chosen for t in times), "of": len(times), "ratio": chosen / best["us"],
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
    cuda = args.device.startswith("cuda")
    if cuda and not torch.cuda.is_available():
        raise RuntimeError("sweep: needs a GPU, and torch sees none; headgate bench compile looks at tiles without one")
    if min(args.limit, args.samples, *args.tokens) < 1:
        raise ValueError("sweep: --limit, --samples and --tokens must be at least 1")
    results = []
    out = sys.stderr if args.json == "-" else sys.stdout
    for name in args.shapes:
        for t in args.tokens:
            sweep = Sweep(STANDARD[name], t, args.device, args.dtype)
            gemms = args.gemms or list(GEMMS)
            if cuda:
                _build(sweep, gemms, args.limit)
            for gemm in gemms:
                results.append(sweep.measure(gemm, args.limit, args.samples))
                print("\n".join(lines(results[-1])), file=out, flush=True)
    report = {"version": 1, "chip": sweep.chip.name, "torch": torch.__version__, "triton": machine.version("triton")}
    text = json.dumps(report | {"sweeps": results}, indent=1) + "\n"
    if args.json == "-":
        sys.stdout.write(text)
    elif args.json:
        Path(args.json).write_text(text)
    return 1 if any(r["rank"] is None for r in results) else 0


def _build(sweep: Sweep, gemms: Sequence[str], limit: int) -> None:
    """Fills Triton's cache on all cores."""
    from .build import build_all, job_of

    found = [x for g in gemms for t in sweep.candidates_of(g, limit) for x in sweep.launches(g, t)]
    jobs = list(dict.fromkeys(job_of(x, sweep.chip) for x in found))
    for _ in build_all(jobs, min(16, machine.cores())):
        pass


def lines(result: dict[str, Any], most: int = 5) -> list[str]:
    """The chosen tile's rank, and the fastest candidates."""
    head = f"{result['shape']}  T {result['tokens']}  {result['gemm']:<5}"
    failed = [c for c in result["candidates"] if "failed" in c]
    if result["rank"] is None:
        return [f"{head} the chosen tile failed: {result['failed']}"]
    found = [f"{head} rank {result['rank']} of {result['of']}, {result['ratio']:.3f} times the best's time"]
    found.append(f"    chosen {result['chosen_us']:>9.1f} us  {result['chosen']}")
    ranked = sorted((c for c in result["candidates"] if "us" in c), key=lambda c: c["us"])
    found += [f"           {c['us']:>9.1f} us  {c['tile']}" for c in ranked[:most]]
    if failed:
        found.append(f"    {len(failed)} have no time; the first: {failed[0]['tile']}: {failed[0]['failed']}")
    return found
