"""grouped_linear as one matmul per live expert, written where its result belongs."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def _mm(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
    """out = a @ b (+ bias). fp16 goes through fp32: torch's fp16 matmul on CPU is slower than the two conversions."""
    if a.dtype == torch.float16:
        y = a.float() @ b.float()
        out.copy_(y if bias is None else y + bias.float())
    elif bias is None:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(bias, a, b, out=out)


def _live(offsets: Tensor) -> list[tuple[int, int, int]]:
    bounds = offsets.tolist()
    return [(e, lo, hi) for e, (lo, hi) in enumerate(pairwise(bounds)) if hi > lo]


def forward(x: Tensor, offsets: Tensor, w: Tensor, b: Tensor | None, transposed: bool) -> Tensor:
    right = w if transposed else w.transpose(1, 2)
    y = x.new_zeros(x.shape[0], right.shape[2])
    for e, lo, hi in _live(offsets):
        _mm(x[lo:hi], right[e], y[lo:hi], None if b is None else b[e])
    return y


def backward(
    grad: Tensor, x: Tensor, offsets: Tensor, w: Tensor, b: Tensor | None, transposed: bool, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    left = w.transpose(1, 2) if transposed else w
    dx = torch.zeros(x.shape, dtype=x.dtype, device=x.device) if needs[0] else x.new_empty(0)
    dw = torch.zeros(w.shape, dtype=w.dtype, device=w.device) if needs[1] else x.new_empty(0)
    db = torch.zeros(b.shape, dtype=b.dtype, device=b.device) if b is not None and needs[2] else x.new_empty(0)
    for e, lo, hi in _live(offsets):
        g = grad[lo:hi]
        if needs[0]:
            _mm(g, left[e], dx[lo:hi])
        if needs[1]:
            _mm(*((x[lo:hi].T, g) if transposed else (g.T, x[lo:hi])), out=dw[e])
        if b is not None and needs[2]:
            db[e] = g.sum(0, dtype=torch.float64 if g.dtype == torch.float64 else torch.float32)
    return dx, dw, db
