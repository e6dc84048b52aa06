"""Newton-Schulz iterations in plain torch: the truth that the fast form is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def newton_schulz_reference(
    g: Tensor, coefficients: tuple[float, float, float] = COEFFICIENTS, steps: int = 5, eps: float = 1e-7
) -> Tensor:
    """X_0 = G / max(|G|_F, eps);   X <- a X + (b X X^T + c (X X^T)^2) X.   g [B, m, n] -> [B, m, n], in g's dtype.

    Of a tall G the transpose is taken, so that X X^T is the smaller of the two products.
    """
    a, b, c = coefficients
    x = g.mT if g.shape[1] > g.shape[2] else g
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if g.shape[1] > g.shape[2] else x
