"""The products of grouped_ffn as a sweep sees them: which tiles they may have, and each run alone with any of them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels import Quantized, quantize
from ...kernels.chip import H200, Chip
from ...kernels.grouped_ffn.thin_tiles import MAX_ROWS
from ...kernels.launch import Launch, launch
from ..shapes import DTYPES, Shape, make_parameters
from .build import Job, job_of
from .record import Launched, Meta, Recorder
from .roofline import DECODE, Roof, stages
from .shapes import experts_hit, problem_on

# product -> (pass, kernel, launches of bench/gpu/roofline.py)
GEMMS = {
    "thin_up": ("thin", "thin_up_kernel", ("up",)),
    "thin_down": ("thin", "thin_down_kernel", ("down",)),
    "up": ("forward", "up_kernel", ("up",)),
    "down": ("forward", "rows_kernel", ("down",)),
    "back": ("backward", "back_kernel", ("back",)),
    "dx": ("backward", "rows_kernel", ("dx",)),
    "dw": ("backward", "dw_kernel", ("dw_down", "dw_up")),
}
# the gradients (of rows, router weights, w1, w_up, w2, b1, b2) for which a product runs as in training
NEEDS = {
    "back": [True, True, False, False, True, False, False],
    "dx": [True, False, False, False, False, False, False],
    "dw": [False, False, True, False, True, False, False],
}
COLD_BYTES = 100e6  # twice what an L2 cache holds: what must be read before a weight is read again
_APART = 5  # calls before problem_on lets an expert come again
_FEW = 4  # experts that are quantized; the others are copies in memory of their own


def gemms_of(tokens: int, format: str = "none") -> list[str]:
    """The products that a model runs with so many tokens a call: none of the backward pass in decoding or on weights of
    few bits, and those for few rows alone where these serve."""
    if tokens <= MAX_ROWS:
        return ["thin_up", "thin_down"]
    return ["up", "down"] if tokens <= DECODE or format != "none" else ["up", "down", "back", "dx", "dw"]


def serves(gemm: str, tokens: int, format: str) -> bool:
    """Whether there is such a product."""
    kind = GEMMS[gemm][0]
    return not (kind == "thin" and tokens > MAX_ROWS) and not (kind == "backward" and format != "none")


@dataclass(frozen=True)
class Problem:
    """One shape, T `tokens`, weights in `dtype` (a key of bench.shapes.DTYPES) or of few bits (`format`); no memory."""

    shape: Shape
    tokens: int
    dtype: str = "bf16"
    format: str = "none"
    chip: Chip = H200

    @property
    def stored(self) -> Shape:
        """The shape as its weights lie: those of few bits are [E, out, in]."""
        return self.shape if self.format == "none" else replace(self.shape, transposed=False)

    @property
    def calls(self) -> int:
        """Launches timed together: as layers follow each other, so do calls on other experts, and L2 helps nobody."""
        return 1 if self.tokens > DECODE else 16 if self.tokens <= 8 else 8

    def meta(self) -> Meta:
        """The tensors of a call."""
        m: Any = Meta(self.stored, self.tokens, DTYPES[self.dtype])
        if self.format != "none":
            m.w1, m.w2 = quantize(m.w1, self.format), quantize(m.w2, self.format)
        return m

    @cached_property
    def tiles(self) -> tuple[Any, dict[str, list[Any]]]:
        """The chosen kernels.tiles.Tiles, and its candidates."""
        from ...kernels import tiles

        s, itemsize = self.shape, DTYPES[self.dtype].itemsize
        size = tiles.Size(
            self.tokens * s.top_k, s.hidden, s.intermediate, s.experts, itemsize, s.form.gated, s.interleaved,
            () if self.format == "none" else (self.format,),
        )  # fmt: skip
        return tiles.choose(size, self.chip), tiles.candidates(size, self.chip)

    @cached_property
    def thin_tiles(self) -> list[list[Any]]:
        """Candidates of the up and of the down projection for few rows, the chosen one first."""
        from ...kernels.grouped_ffn.thin import thin_sizes
        from ...kernels.grouped_ffn.thin_tiles import thin_candidates

        m: Any = self.meta()
        sizes = thin_sizes(m.rows, self.shape.top_k, m.w1, None, m.w2, self.shape.form, m.shape.transposed)
        return [thin_candidates(size, self.chip) for size in sizes]

    def candidates(self, gemm: str, limit: int) -> list[Any]:
        """The chosen tile first, then the nearest."""
        found = self.thin_tiles[gemm == "thin_down"] if GEMMS[gemm][0] == "thin" else self.tiles[1][gemm]
        return found[:limit]

    def run(self, gemm: str, tile: Any, m: Any, through: Launch) -> Sequence[Tensor]:
        """The pass of a product with this tile for it, on the tensors of a call; what it returns."""
        from ...kernels.grouped_ffn import on_triton
        from ...kernels.grouped_ffn.thin import thin_forward

        given: tuple[Any, ...]
        kind = GEMMS[gemm][0]
        if kind == "thin":
            both = [found[0] for found in self.thin_tiles]
            both[gemm == "thin_down"] = tile
            given = (*m.tensors, self.shape.form, m.shape.transposed, m.shape.interleaved)
            return [thin_forward(*given, chip=self.chip, launch=through, tiles=tuple(both))]
        tiles = self.tiles[0].using(gemm, tile)
        if kind == "forward":
            keep = self.tokens > DECODE and self.format == "none"
            return on_triton.forward(*m.forward(keep), chip=self.chip, launch=through, tiles=tiles)
        given = (*m.backward()[:-1], NEEDS[gemm])
        return on_triton.backward(*given, chip=self.chip, launch=through, tiles=tiles)

    @cached_property
    def _jobs(self) -> dict[tuple[str, Any], list[Job]]:
        return {}

    def jobs(self, gemm: str, tile: Any) -> list[Job]:
        """What must be built for that pass."""
        if (gemm, tile) not in self._jobs:
            self._jobs[gemm, tile] = self._recorded(gemm, tile)
        return self._jobs[gemm, tile]

    def _recorded(self, gemm: str, tile: Any) -> list[Job]:
        recorder = Recorder()
        self.run(gemm, tile, self.meta(), recorder)
        return list(dict.fromkeys(job_of(found, self.chip) for found in recorder.launches))

    def amounts(self, gemm: str, hit: float) -> tuple[float, float]:
        """FLOPs, and bytes to read and write, of one call that reaches so many experts."""
        kind, _, names = GEMMS[gemm]
        kind = "backward" if kind == "backward" else "decode" if self.tokens <= DECODE else "forward"
        itemsize = DTYPES[self.dtype].itemsize
        found = [s for s in stages(self.shape, self.tokens, kind, itemsize) if s.name in names]
        size = sum(s.bytes for s in found)
        if kind != "backward":  # whose weights are read whole
            m: Any = self.meta()
            w = m.w1 if names == ("up",) else m.w2
            expected = experts_hit(self.shape, self.tokens) * math.prod(w.shape) * itemsize
            size += (hit * w.nbytes - expected) / self.shape.experts
        return sum(s.flops for s in found), size

    def rate(self, flops: float, size: float, us: float) -> str:
        """What a time means, against the nearer ceiling of the chip."""
        roof = Roof.of(self.chip if self.chip.bandwidth_GBps and self.chip.bf16_TFLOPs else H200)
        if flops / roof.tflops / 1e12 > size / roof.bandwidth_GBps / 1e9:
            return f"{flops / us / 1e6:.0f} TFLOP/s"
        return f"{size / us / 1e3:.0f} GB/s"


def weights_of(problem: Problem, device: str) -> dict[str, Any]:
    """Random weights of a problem, those of few bits included; to be kept for its other T."""
    shape, dtype = problem.stored, DTYPES[problem.dtype]
    if problem.format == "none":
        return dict(make_parameters(shape, dtype, device))
    few = min(_FEW, shape.experts)
    made = make_parameters(replace(shape, experts=few), dtype, device)

    def copies(t: Tensor) -> Tensor:
        return t.view(torch.uint8).repeat(-(-shape.experts // few), *[1] * (t.dim() - 1))[: shape.experts].view(t.dtype)

    found: dict[str, Any] = {}
    for name, w in made.items():
        if name.endswith("bias"):
            found[name] = nn.Parameter(copies(w.detach()))
        else:
            q = quantize(w.detach(), problem.format)
            found[name] = Quantized(copies(q.data), copies(q.scale), q.format, q.block)
    return found


class Real:
    """A problem in a device's memory: its calls, each with a routing of its own."""

    def __init__(self, problem: Problem, device: str, weights: dict[str, Any], calls: int) -> None:
        self.problem = problem
        shape, tokens = problem.stored, problem.tokens
        drawn = problem_on(device, shape, tokens, weights, calls=calls, dtype=DTYPES[problem.dtype])
        m: Any = problem.meta()
        m.rows, m.grad = drawn.x.detach(), drawn.grad
        m.b1, m.b2 = (_bare(weights.get(f"{n}_bias")) for n in ("gate_up_proj", "down_proj"))
        w1, w2 = _bare(weights["gate_up_proj"]), _bare(weights["down_proj"])
        touched = w2.nbytes * min(1.0, tokens * shape.top_k / shape.experts)
        copied = min(calls, math.ceil(COLD_BYTES / touched)) if _APART * touched < COLD_BYTES else 1
        pairs = [(w1, w2), *((_copy(w1), _copy(w2)) for _ in range(copied - 1))]
        self.calls = []
        for i, (ids, router_weights) in enumerate(drawn.routings):
            call = copy.copy(m)
            call.ids, call.weights = ids.to(torch.int32), router_weights.detach().float()
            call.w1, call.w2 = pairs[i % copied]
            self.calls.append(call)
        self.hit = sum(len(c.ids.unique()) for c in self.calls) / calls

    def with_tile(self, gemm: str, tile: Any) -> tuple[Sequence[Tensor], Callable[[], None]]:
        """What the first call's pass returns, and a function that runs the product's launches of every call again."""
        from ...kernels.grouped_ffn import on_triton

        for call in self.calls if GEMMS[gemm][0] == "backward" else ():
            if call.h.device.type == "meta":
                call.h = on_triton.forward(*call.forward(True), chip=self.problem.chip)[1]
        keeping = Keeping(GEMMS[gemm][1])
        got = [self.problem.run(gemm, tile, call, keeping) for call in self.calls]
        return got[0], keeping.again


def _bare(t: Any) -> Any:
    return t.detach() if isinstance(t, Tensor) else t


def _copy(w: Any) -> Any:
    return w.copy() if isinstance(w, Quantized) else w.clone()


class Keeping:
    """A `Launch` that runs everything and keeps the launches of one kernel, to run them again alone."""

    def __init__(self, kernel: str) -> None:
        self.kernel = kernel
        self.kept: list[Launched] = []

    def __call__(self, kernel: Any, grid: Sequence[int], *, warps: int = 4, stages: int = 2, **arguments: Any) -> None:
        launch(kernel, grid, warps=warps, stages=stages, **arguments)
        if kernel.fn.__name__ == self.kernel:
            self.kept.append(Launched(kernel, tuple(grid), warps, stages, arguments))

    def again(self) -> None:
        for k in self.kept:
            launch(k.kernel, k.grid, warps=k.warps, stages=k.stages, **k.arguments)
