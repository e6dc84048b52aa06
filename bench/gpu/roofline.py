"""`headgate bench roofline`: FLOPs, bytes and the floor time of every launch, by arithmetic alone.

A launch reads each of its inputs once and writes each of its outputs once; its floor is the larger of its FLOPs at the
chip's matrix rate and its bytes at the chip's bandwidth. Weights count for the experts that T tokens are expected to
reach under uniform routing. FLOPs are those of matrix products: 6NDF forward and 12NDF backward.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ...kernels.chip import CHIPS, H200, Chip
from ...kernels.grouped_ffn.thin_tiles import MAX_ROWS
from ..arguments import number, output, whole
from ..output import write_json
from ..screen import Screen
from ..shapes import Shape
from .shapes import STANDARD, choice_of, experts_hit, tokens_of

EXAMPLE = """examples:
  headgate bench roofline --shapes qwen3 --tokens 1 64 4096
  headgate bench roofline --sums --bandwidth 4300 --tflops 790      with ceilings that were measured
"""
PASSES = ("forward", "backward", "decode", "slots")
DECODE = 64  # most tokens of a decoding step


@dataclass(frozen=True)
class Stage:
    """One launch: matrix FLOPs, and the bytes it must read and write."""

    name: str
    flops: float
    read: float
    written: float

    @property
    def bytes(self) -> float:
        return self.read + self.written

    def floor_s(self, bytes_per_s: float, flops_per_s: float) -> float:
        return max(self.bytes / bytes_per_s, self.flops / flops_per_s)


@dataclass(frozen=True)
class Roof:
    """The two ceilings."""

    bandwidth_GBps: float
    tflops: float

    def floor_s(self, stage: Stage) -> float:
        return stage.floor_s(self.bandwidth_GBps * 1e9, self.tflops * 1e12)

    @classmethod
    def of(cls, chip: Chip, bandwidth: float | None = None, tflops: float | None = None) -> Roof:
        bandwidth, tflops = bandwidth or chip.bandwidth_GBps, tflops or chip.bf16_TFLOPs
        if bandwidth is None or tflops is None:
            raise ValueError(f"roofline: --bandwidth and --tflops must be given, nothing is known of {chip.name}")
        return cls(bandwidth, tflops)


def stages(shape: Shape, tokens: int, kind: str, itemsize: int = 2, columns: int = 128) -> list[Stage]:
    """The launches of one pass: `forward` keeps H for backward, `decode` is the whole layer with its router and keeps
    nothing, `slots` is a forward pass in two steps with every expert here, and keeps nothing. Routing is int32 and
    fp32. `columns`: those of one tile of the backward pass, which leaves one partial sum of the router-weight gradient
    per tile."""
    return {"forward": _forward, "backward": _backward, "decode": _decode, "slots": _slots}[kind](
        _Sizes(shape, tokens, itemsize, columns)
    )


class _Sizes:
    """Bytes of everything that flows."""

    def __init__(self, shape: Shape, tokens: int, itemsize: int, columns: int) -> None:
        d, f, e, k, s = shape.hidden, shape.intermediate, shape.experts, shape.top_k, itemsize
        self.shape, self.tokens, self.itemsize = shape, tokens, s
        n = self.pairs = tokens * k
        hit = self.hit = experts_hit(shape, tokens)
        self.product = 2.0 * n * d * f  # FLOPs of one projection's worth
        self.x, self.y_rows = s * tokens * d, s * n * d
        self.a, self.h = s * n * f, 2 * s * n * f
        self.w_down, self.w_up = hit * s * d * f, hit * 2 * s * d * f
        self.b_down, self.b_up = (hit * s * d, hit * 2 * s * f) if shape.bias else (0.0, 0.0)
        self.dw_down, self.dw_up = float(e * s * d * f), float(e * 2 * s * d * f)
        self.ids = self.weights = self.places = 4 * n  # one int32 or fp32 a pair
        self.offsets = 4 * (e + 1)
        self.parts = 4 * n * -(-f // columns)


def _plan(z: _Sizes) -> Stage:
    return Stage("plan", 0, z.ids, 2 * z.places + z.offsets)


def _down(z: _Sizes) -> list[Stage]:
    return [
        Stage("down", z.product, z.a + z.w_down + z.b_down, z.y_rows),
        Stage("combine", 0, z.y_rows + z.places + z.weights, z.x),
    ]


def _forward(z: _Sizes, keep: bool = True) -> list[Stage]:
    up = Stage("up", 2 * z.product, z.x + z.w_up + z.b_up + z.places, z.a + (z.h if keep else 0))
    return [_plan(z), up, *_down(z)]


def _slots(z: _Sizes) -> list[Stage]:
    outputs = 4 * z.pairs * z.shape.hidden  # of pairs, in fp32
    combine = Stage("combine", 0, outputs + z.places + z.weights, z.x)
    return [*_forward(z, keep=False)[:-1], Stage("spread", 0, z.y_rows + z.places, outputs), combine]


def _decode(z: _Sizes) -> list[Stage]:
    s, t, e, d = z.itemsize, z.tokens, z.shape.experts, z.shape.hidden
    bias = 4 * e if choice_of(z.shape).bias else 0
    gate = Stage("router", 2.0 * t * d * e, z.x + s * d * e, 4 * t * e)
    choose = Stage("topk", 0, 4 * t * e + bias, z.ids + z.weights + 4 * t * e + 4 * e)
    return [gate, choose, *(_thin(z) if t <= MAX_ROWS else _forward(z, keep=False))]


def _thin(z: _Sizes) -> list[Stage]:
    """Few rows need no order of pairs, and the sum over a token's experts is part of the second product."""
    return [
        Stage("up", 2 * z.product, z.x + z.w_up + z.b_up + z.ids, z.a),
        Stage("down", z.product, z.a + z.w_down + z.b_down + z.ids + z.weights, z.x),
    ]


def _backward(z: _Sizes) -> list[Stage]:
    p = z.product
    found = [
        _plan(z),
        Stage("back", p, z.x + z.w_down + z.h + z.weights + z.places, z.h + z.a + z.parts),
        Stage("router_grad", 0, z.parts + z.places + ((z.x + z.b_down + z.ids) if z.shape.bias else 0), z.weights),
        Stage("dw_down", p, z.x + z.a + z.places, z.dw_down),
        Stage("dw_up", 2 * p, z.x + z.h + z.places, z.dw_up),
        Stage("dx", 2 * p, z.h + z.w_up, z.y_rows),
        Stage("dx_sum", 0, z.y_rows + z.places, z.x),
    ]
    if z.shape.bias:
        e, s = z.shape.experts, z.itemsize
        found += [
            Stage("db_down", 0, z.x + z.places + z.weights, e * s * z.shape.hidden),
            Stage("db_up", 0, z.h, 2 * e * s * z.shape.intermediate),
        ]
    return found


def saved_bytes(shape: Shape, tokens: int, itemsize: int = 2, weight_itemsize: int = 4) -> int:
    """What is kept for backward: rows + H + routing (int32 ids, and weights)."""
    pairs = tokens * shape.top_k
    return itemsize * (tokens * shape.hidden + 2 * pairs * shape.intermediate) + (4 + weight_itemsize) * pairs


def least(shape: Shape, tokens: int, kind: str, itemsize: int = 2) -> Stage:
    """The pass as one launch that could keep everything else on the chip: what any implementation must do."""
    z = _Sizes(shape, tokens, itemsize, 128)
    routing = z.ids + z.weights
    if kind == "backward":
        read = 2 * z.x + z.w_up + z.w_down + z.h + routing
        return Stage("least", 6 * z.product, read, z.x + z.weights + z.dw_up + z.dw_down)
    kept = z.h if kind == "forward" else 0
    return Stage("least", 3 * z.product, z.x + z.w_up + z.w_down + z.b_up + z.b_down + routing, z.x + kept)


def summary(shape: Shape, tokens: int, kind: str, roof: Roof) -> dict[str, Any]:
    """One pass as JSON has it: every launch, the sums, and the floor of one launch that did it all."""
    found = stages(shape, tokens, kind)
    total = sum(map(roof.floor_s, found))
    whole = least(shape, tokens, kind)
    flops = sum(s.flops for s in found)
    return {
        "shape": shape.name,
        "tokens": tokens,
        "pass": kind,
        "experts_hit": experts_hit(shape, tokens),
        "launches": [
            {
                "name": s.name, "flops": s.flops, "read_bytes": s.read, "written_bytes": s.written,
                "floor_us": 1e6 * roof.floor_s(s), "share": roof.floor_s(s) / total,
                "bound": "flops" if s.flops / roof.tflops / 1e12 > s.bytes / roof.bandwidth_GBps / 1e9 else "bytes",
            }
            for s in found
        ],
        "flops": flops,
        "bytes": sum(s.bytes for s in found),
        "floor_us": 1e6 * total,
        "floor_TFLOPs": flops / total / 1e12,
        "least_floor_us": 1e6 * roof.floor_s(whole),
        "least_bytes": whole.bytes,
        "saved_bytes": saved_bytes(shape, tokens) if kind == "forward" else None,
    }  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `headgate bench roofline`."""
    parser.epilog = EXAMPLE
    add = parser.add_argument
    add("--chip", choices=list(CHIPS), default="H200", help=f"of {', '.join(CHIPS)} (default: %(default)s)")
    add("--shapes", nargs="+", choices=list(STANDARD), metavar="SHAPE", help=f"of {', '.join(STANDARD)} (default: all)")
    add("--tokens", nargs="+", type=whole, metavar="T", help="tokens per call (default: 1 to 65536)")
    add("--passes", nargs="+", choices=PASSES, metavar="PASS", help=f"of {', '.join(PASSES)} (default: all)")
    add("--bandwidth", type=number, metavar="GB/s", help="a measured ceiling in place of the datasheet's")
    add("--tflops", type=number, metavar="N", help="a measured ceiling in place of the datasheet's")
    add("--sums", action="store_true", help="print the passes only, not their launches")
    add("--json", type=output, metavar="FILE", help="write everything to FILE; - for standard output")


def cases(
    names: Iterable[str] | None, tokens: Sequence[int] | None, passes: Sequence[str] | None
) -> Iterator[tuple[Shape, int, str]]:
    """(shape, T, pass) asked for; decoding ends at DECODE tokens."""
    for name in names or STANDARD:
        for t in tokens or tokens_of(STANDARD[name]):
            for kind in passes or PASSES:
                if kind != "decode" or t <= DECODE:
                    yield STANDARD[name], t, kind


def run(args: argparse.Namespace) -> int:
    """Prints and writes; always 0."""
    chip = CHIPS.get(args.chip, H200)
    for name in ("bandwidth", "tflops"):
        if (ceiling := getattr(args, name)) is not None and not ceiling > 0:
            raise ValueError(f"roofline: --{name} must be above 0, got {ceiling}")
    roof = Roof.of(chip, args.bandwidth, args.tflops)
    if min(args.tokens or [1]) < 1:
        raise ValueError(f"roofline: --tokens must be at least 1, got {min(args.tokens)}")
    found = [summary(*case, roof) for case in cases(args.shapes, args.tokens, args.passes)]
    screen = Screen(out=sys.stderr if args.json == "-" else sys.stdout)
    screen.say(f"{chip.name}: {roof.bandwidth_GBps:.0f} GB/s, {roof.tflops:.0f} TFLOP/s, bf16")
    for case in found:
        screen.say("\n".join(lines(case, args.sums)))
    report = {"version": 1, "chip": chip.name, "bandwidth_GBps": roof.bandwidth_GBps, "tflops": roof.tflops}
    write_json(args.json, report | {"passes": found})
    return 0


def lines(case: dict[str, Any], sums: bool) -> list[str]:
    """One pass as text."""
    hit = f"{case['experts_hit']:.1f} of {STANDARD[case['shape']].experts} experts"
    found = [
        f"{case['shape']:<20} T {case['tokens']:>6}  {case['pass']:<9}{_amounts(case)} {case['floor_us']:>11.1f} us  "
        f"{case['floor_TFLOPs']:>5.0f} TFLOP/s; on one chip at least {case['least_floor_us']:.1f} us; {hit}"
    ]
    for s in () if sums else case["launches"]:
        both = {"flops": s["flops"], "bytes": s["read_bytes"] + s["written_bytes"]}
        rest = f"{_amounts(both)} {s['floor_us']:>11.1f} us  {100 * s['share']:>4.0f}%  {s['bound']}"
        found.append(f"    {s['name']:<35}{rest}")
    return found


def _amounts(case: dict[str, Any]) -> str:
    return f"{case['flops'] / 1e9:>12.2f} GFLOP {case['bytes'] / 1e6:>11.2f} MB"
