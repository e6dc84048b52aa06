"""The same iterations on the m x m matrix X X^T alone: fewer FLOPs where m x n matrices are not square.

With S_k = X_k X_k^T each step multiplies X by a polynomial of S, B_k = a + b S_k + c S_k^2. All of these commute, so

    S_{k+1} = S_k B_k^2,   Q_{k+1} = Q_k B_k,   X_n = Q_n X_0

and every product but the first and the last is one of symmetric matrices with a symmetric result, of which the part on
and below the diagonal is computed, by strips of rows, and the rest is copied.

In units of 2 m^3 FLOPs, r = n / m: 5 steps take 10 r + 5 as written, 2 r + 17 so, with four strips about 1.6 r + 11.
It takes fp32: S has the squares of the singular values, and in bf16 the small ones would be lost. For the same reason a
run of more than LONGEST steps begins anew from X.
"""

from __future__ import annotations

import torch
from torch import Tensor

LONGEST = 5  # steps between two products with X
STRIP = 128  # rows; a narrower product is slower than the copy that it saves
CACHE = 1 << 20  # elements of all m x m matrices that are worked on together


def worthwhile(m: int, n: int, steps: int) -> bool:
    """Whether it takes fewer FLOPs than the iterations as written, for m x n matrices, m <= n."""
    r, strips = n / m, 0.625 if m >= 4 * STRIP else 1.0
    return strips * (4 * steps - 3) + 2 * r < steps * (2 * r + 1)


def by_gram(x: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """`steps` iterations from x [B, m, n], m <= n, fp32 or fp64, of norm at most 1."""
    each = max(1, CACHE // (5 * x.shape[1] ** 2))
    out = torch.empty_like(x)
    for part, there in zip(x.split(each), out.split(each), strict=True):
        for done in range(0, steps, LONGEST):
            q = _polynomial(part, coefficients, min(LONGEST, steps - done))
            part = torch.bmm(q, part)
        there.copy_(part)
    return out


def _polynomial(x: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """Q [B, m, m] with X_steps = Q x."""
    a, b, c = coefficients
    s, q = symmetric_product(x, x.mT), None
    for step in range(steps):
        factor = symmetric_product(s, s).mul_(c).add_(s, alpha=b)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        q = factor if q is None else symmetric_product(q, factor)
        if step + 1 < steps:
            s = symmetric_product(symmetric_product(s, factor), factor)
    assert q is not None
    return q


def symmetric_product(left: Tensor, right: Tensor) -> Tensor:
    """left right [B, m, m], of which it is known that it is symmetric."""
    m = left.shape[1]
    strips = min(4, m // STRIP)
    if strips < 2:
        return torch.bmm(left, right)
    out = left.new_empty(left.shape[0], m, m)
    ends = [m * (i + 1) // strips for i in range(strips)]
    for begin, end in zip([0, *ends], ends, strict=False):
        out[:, begin:end, :end] = torch.bmm(left[:, begin:end], right[:, :, :end])
        out[:, :begin, begin:end] = out[:, begin:end, :begin].mT
    return out
