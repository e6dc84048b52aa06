"""newton_schulz: stacks of matrices made almost orthogonal, the step of the Muon optimizer."""

from __future__ import annotations

import torch
from torch import Tensor

from .gram import by_gram, worthwhile
from .reference import COEFFICIENTS, newton_schulz_reference

__all__ = ["COEFFICIENTS", "newton_schulz", "newton_schulz_reference"]

_DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def newton_schulz(
    g: Tensor,
    coefficients: tuple[float, float, float] = COEFFICIENTS,
    steps: int = 5,
    eps: float = 1e-7,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """U S' V^T for each matrix U S V^T of `g` [B, m, n], with the entries of S' near 1 (0.7 to 1.2): [B, m, n].

        X_0 = G / max(|G|_F, eps);   X <- a X + (b X X^T + c (X X^T)^2) X,   `steps` times

    `dtype`: what it is computed in, and of the result. None: bf16 on CUDA, as torch.optim.Muon everywhere; on other
    devices fp32 (fp64 for fp64), in which the iterations run on X X^T alone where that is less work (see gram.py). No
    autograd: it is a step of an optimizer. A matrix of zeros gives zeros; NaN gives NaN in its own matrix only.

    Raises ValueError / TypeError naming argument, rule and value. Cost for 5 steps, m <= n: 2 B (5 m^3 + 10 m^2 n)
    FLOPs in bf16, about 2 B (11 m^3 + 1.6 m^2 n) in fp32. Source: Jordan et al., Muon (2024).

    >>> u = newton_schulz(torch.eye(3)[None] * 7, dtype=torch.float32)[0]
    >>> bool((u.diagonal() > 0.6).all()), u[0, 1].item()
    (True, 0.0)
    """
    if not isinstance(g, Tensor) or not g.is_floating_point():
        raise TypeError(
            f"newton_schulz: g must be a floating point tensor, got {getattr(g, 'dtype', type(g).__name__)}"
        )
    if g.dim() != 3:
        raise ValueError(f"newton_schulz: g must be [B, m, n], got {tuple(g.shape)}")
    if not (isinstance(steps, int) and 0 < steps < 100):
        raise ValueError(f"newton_schulz: steps must be between 1 and 99, got {steps!r}")
    if dtype is None:
        dtype = torch.bfloat16 if g.is_cuda else torch.promote_types(g.dtype, torch.float32)
    if dtype not in _DTYPES:
        raise TypeError(f"newton_schulz: dtype must be torch.float64, float32 or bfloat16, got {dtype}")
    if not g.numel():
        return torch.empty_like(g, dtype=dtype)
    with torch.no_grad():
        x = g.to(dtype)
        x = x.mT if g.shape[1] > g.shape[2] else x
        x = (x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=eps)).contiguous()
        gram = dtype != torch.bfloat16 and worthwhile(x.shape[1], x.shape[2], steps)
        x = (by_gram if gram else _directly)(x, coefficients, steps)
        return x.mT if g.shape[1] > g.shape[2] else x


def _directly(x: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """As torch.optim.Muon writes it, all matrices at once."""
    a, b, c = coefficients
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
