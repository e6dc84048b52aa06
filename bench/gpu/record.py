"""Which launches the operations make: their host code runs on tensors without memory, and no kernel does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...kernels.chip import Chip
from ...kernels.quantized import BLOCKS, FORMATS, quantize
from ..shapes import Shape
from .shapes import choice_of

PASSES = ("route", "forward", "inference", "slots", "quantized", "widened", "backward", "linear")


@dataclass(frozen=True)
class Launched:
    """One launch as the host code asked for it."""

    kernel: Any
    grid: tuple[int, ...]
    warps: int
    stages: int
    arguments: dict[str, Any] = field(repr=False)

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by argument, those behind tensor maps included."""
        found = {n: getattr(a, "base", a) for n, a in self.arguments.items()}
        return {n: t for n, t in found.items() if isinstance(t, Tensor)}


class Recorder:
    """A `Launch` that takes notes in place of running."""

    def __init__(self) -> None:
        self.launches: list[Launched] = []

    def __call__(self, kernel: Any, grid: Sequence[int], *, warps: int = 4, stages: int = 2, **arguments: Any) -> None:
        if min(grid) >= 1:
            self.launches.append(Launched(kernel, tuple(grid), warps, stages, arguments))


def record(
    shape: Shape, tokens: int, kind: str, chip: Chip, dtype: torch.dtype = torch.bfloat16,
    formats: Sequence[str] = FORMATS,
) -> list[Launched]:  # fmt: skip
    """The launches of one pass (of PASSES): `route` a router's choice and the plan, `forward` keeps what backward
    needs, `inference` does not, `slots` is that in two steps (expert_outputs and combine_outputs), `quantized` and
    `widened` are few rows on weights in few bits of these `formats`, and many with the gradient of rows, `linear` is
    grouped_linear both ways. Needs triton, and not as the interpreter where the
    kernels are to be built."""
    recorder = Recorder()
    _PASSES[kind](Meta(shape, tokens, dtype, formats), chip, recorder)
    return recorder.launches


class Meta:
    """The tensors of a case, without memory, as the operators receive them."""

    def __init__(self, shape: Shape, tokens: int, dtype: torch.dtype, formats: Sequence[str] = FORMATS) -> None:
        self.shape, self.tokens, self.dtype, self.formats = shape, tokens, dtype, formats
        d, f, e, k = shape.hidden, shape.intermediate, shape.experts, shape.top_k
        one, two = ((e, d, 2 * f), (e, f, d)) if shape.transposed else ((e, 2 * f, d), (e, d, f))
        self.rows, self.grad = self.new(tokens, d), self.new(tokens, d)
        self.ids = self.new(tokens, k, dtype=torch.int32)
        self.weights = self.new(tokens, k, dtype=torch.float32)
        self.w1, self.w2 = self.new(*one), self.new(*two)
        self.b1: Tensor | None
        self.b2: Tensor | None
        self.b1, self.b2 = (self.new(e, 2 * f), self.new(e, d)) if shape.bias else (None, None)
        self.h = self.new(tokens * k, 2 * f)

    def new(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(size, dtype=dtype or self.dtype, device="meta")

    @property
    def tensors(self) -> tuple[Any, ...]:
        return self.rows, self.ids, self.weights, self.w1, None, self.w2, self.b1, self.b2

    @property
    def form(self) -> tuple[Any, ...]:
        act = self.shape.form
        return act.kind, act.params, act.gated, self.shape.transposed, self.shape.interleaved

    def forward(self, keep: bool) -> tuple[Any, ...]:
        """The arguments of the operator."""
        return *self.tensors, *self.form, keep

    def backward(self) -> tuple[Any, ...]:
        """The arguments of its backward pass, with every gradient asked for."""
        needs = [True, True, True, False, True, self.b1 is not None, self.b2 is not None]
        return self.grad, *self.tensors, self.h, *self.form, needs


def _route(m: Meta, chip: Chip, recorder: Recorder) -> None:
    from ...kernels.plan.on_triton import plan_on_triton
    from ...kernels.router_logits.on_triton import router_logits_on_triton, serves
    from ...kernels.topk.on_triton import topk_on_triton

    if serves(m.rows):
        router_logits_on_triton(m.rows, m.new(m.shape.experts, m.shape.hidden), None, chip=chip, launch=recorder)
    choice = choice_of(m.shape)
    bias = m.new(m.shape.experts, dtype=torch.float32) if choice.bias else None
    o: dict[str, Any] = {
        "score": "softmax",
        "groups": 1,
        "topk_groups": 1,
        "group_score": "top2",
        "renormalize": False,
        "scale": 1.0,
    }
    rule = (o | dict(choice.options)).values()
    logits = m.new(m.tokens, m.shape.experts, dtype=torch.float32)
    topk_on_triton(logits, m.shape.top_k, bias, *rule, launch=recorder)
    plan_on_triton(m.ids, m.shape.experts, launch=recorder)


def _forward(keep: bool) -> Callable[[Meta, Chip, Recorder], None]:
    def run(m: Meta, chip: Chip, recorder: Recorder) -> None:
        from ...kernels.grouped_ffn import on_triton

        on_triton.forward(*m.forward(keep), chip=chip, launch=recorder)

    return run


def _slots(m: Meta, chip: Chip, recorder: Recorder) -> None:
    from ...kernels.expert_outputs import on_triton

    out, slots = m.new(m.tokens * m.shape.top_k, m.shape.hidden, dtype=torch.float32), m.new(m.shape.experts)
    weights = (m.w1, None, m.w2, m.b1, m.b2)
    on_triton.expert_outputs(m.rows, m.ids, *weights, slots.int(), out, *m.form, chip=chip, launch=recorder)
    on_triton.combine_outputs(out, m.ids, m.weights, m.shape.experts, m.dtype, launch=recorder)


def _backward(m: Meta, chip: Chip, recorder: Recorder) -> None:
    from ...kernels.grouped_ffn import on_triton

    on_triton.backward(*m.backward(), chip=chip, launch=recorder)


def _in_few_bits(m: Meta) -> Iterator[Meta]:
    """The case with weights of every format that has room for its sizes."""
    s = m.shape
    for kind in m.formats:
        step = BLOCKS[kind][0] if kind in BLOCKS else 2
        if s.hidden % step == 0 and s.intermediate % step == 0:
            case: Any = Meta(replace(s, transposed=False), m.tokens, m.dtype)
            case.w1, case.w2 = quantize(case.w1, kind), quantize(case.w2, kind)
            yield case


def _quantized(m: Meta, chip: Chip, recorder: Recorder) -> None:
    """`inference`, for as few rows as the kernels of few rows serve."""
    from ...kernels.grouped_ffn.thin import serves, thin_forward

    for case in _in_few_bits(m) if serves(m.rows) else ():
        form: Any = (*case.tensors, case.shape.form, False, case.shape.interleaved)
        thin_forward(*form, chip=chip, launch=recorder)


def _widened(m: Meta, chip: Chip, recorder: Recorder) -> None:
    """`forward` and `backward`, for which weights are widened in registers; the weights are frozen."""
    from ...kernels.grouped_ffn import on_triton

    for case in _in_few_bits(m):
        on_triton.forward(*case.forward(True), chip=chip, launch=recorder)
        needs = [True, True, False, False, False, case.b1 is not None, case.b2 is not None]
        asked: Any = (*case.backward()[:-1], needs)
        on_triton.backward(*asked, chip=chip, launch=recorder)


def _linear(m: Meta, chip: Chip, recorder: Recorder) -> None:
    """grouped_linear, forward and backward, with the first projection's weights on rows in expert order."""
    from ...kernels.grouped_linear import on_triton

    x, y = m.new(m.tokens * m.shape.top_k, m.shape.hidden), m.h
    offsets = m.new(m.shape.experts + 1, dtype=torch.int32)
    rest = (x, offsets, m.w1, m.b1, m.shape.transposed)
    on_triton.forward(*rest, chip=chip, launch=recorder)
    on_triton.backward(y, *rest, [True, True, m.b1 is not None], chip=chip, launch=recorder)


_PASSES = {
    "route": _route,
    "forward": _forward(True),
    "inference": _forward(False),
    "slots": _slots,
    "quantized": _quantized,
    "widened": _widened,
    "backward": _backward,
    "linear": _linear,
}
