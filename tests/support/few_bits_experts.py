"""Weights of experts in few bits, quantized once for all tests that take any of them."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headgate.kernels import Quantized, quantize

Weights = tuple[Quantized | tuple[Quantized, Quantized], Quantized]


@dataclass(frozen=True)
class FewBits:
    """Gate and up [E, 2 F, D], or a `pair` of tensors [E, F, D], and down [E, D, F]: the same numbers in every test."""

    experts: int
    d: int
    f: int
    pair: bool
    format: str
    block: tuple[int, int] | None = None

    def of(self, part: Tensor) -> Weights:
        """Those of the experts `part` [n], in this order, in memory of their own."""
        cut = [replace(w, data=w.data[part], scale=w.scale[part]) for w in _quantized(self)]
        return ((cut[0], cut[1]) if self.pair else cut[0]), cut[-1]


@functools.cache
def _quantized(few: FewBits) -> list[Quantized]:
    numbers = torch.Generator().manual_seed(0)
    up, down = (few.f, few.d), (few.d, few.f)
    shapes = [up, up, down] if few.pair else [(2 * few.f, few.d), down]
    dense = [torch.randn(few.experts, *s, generator=numbers) / s[1] ** 0.5 for s in shapes]
    return [quantize(w, few.format, block=few.block) for w in dense]
