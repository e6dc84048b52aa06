"""No speed is printed for wrong numbers: every implementation is compared with the fp32 reference first."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..kernels.grouped_ffn import grouped_ffn_reference
from .rivals import Builder
from .shapes import DTYPES, Problem, Shape, make_parameters, make_problem

# Largest difference allowed, relative to the largest entry of what is compared.
TOLERANCE = {"fp32": 2e-5, "bf16": 2e-2, "fp16": 4e-3}


class WrongNumbers(RuntimeError):
    """An implementation disagrees with the reference."""


def _compare(what: str, got: Tensor | None, want: Tensor, tolerance: float) -> None:
    if got is None:
        raise WrongNumbers(f"{what} is missing")
    error = float((got.float() - want.float()).abs().max() / want.float().abs().max().clamp_min(1e-30))
    if not error <= tolerance:
        raise WrongNumbers(f"{what} is off by {error:.1e} of its largest entry, allowed {tolerance:.0e}")


def _reference(shape: Shape, x: Tensor, ids: Tensor, weights: Tensor, p: dict[str, Tensor]) -> Tensor:
    return grouped_ffn_reference(
        x,
        ids,
        weights,
        p["gate_up_proj"],
        p["down_proj"],
        p.get("gate_up_proj_bias"),
        p.get("down_proj_bias"),
        activation=shape.form,
        transposed=shape.transposed,
        interleaved=shape.interleaved,
    )


def check_small(builder: Builder, shape: Shape, dtype: str, device: str = "cpu") -> None:
    """Output and every gradient of the family at a small size. Raises WrongNumbers."""
    small = replace(shape, hidden=64, intermediate=48, experts=min(shape.experts, 8), top_k=min(shape.top_k, 3))
    problem = make_problem(small, 37, DTYPES[dtype], make_parameters(small, DTYPES[dtype], device), device)
    ids, weights = problem.routings[0]
    y = builder(problem)(problem.x, ids, weights)
    y.backward(problem.grad)

    wide = {name: p.detach().float().requires_grad_() for name, p in problem.parameters.items()}
    x, w = problem.x.detach().float().requires_grad_(), weights.detach().float().requires_grad_()
    want = _reference(small, x, ids, w, wide)
    want.backward(problem.grad.float())
    tolerance = TOLERANCE[dtype]
    _compare("output", y.detach(), want.detach(), tolerance)
    pairs = [("input", problem.x, x), ("routing weights", weights, w)]
    pairs += [(name, p, wide[name]) for name, p in problem.parameters.items()]
    for name, got, truth in pairs:
        assert truth.grad is not None
        _compare(f"gradient of {name}", got.grad, truth.grad, tolerance)


def check_measured(problem: Problem, call: int, y: Tensor, dtype: str, train: bool, tokens: int = 4) -> None:
    """The very case that is measured, on its first few tokens: output and, in training, their gradients (a token's
    gradient depends on no other token). Reads `.grad` of the problem's leaves. Raises WrongNumbers."""
    ids, weights = (t[:tokens] for t in problem.routings[call])
    hit, local = torch.unique(ids, return_inverse=True)
    p = {name: w.detach()[hit].float() for name, w in problem.parameters.items()}
    x = problem.x.detach()[:tokens].float().requires_grad_(train)
    w = weights.detach().float().requires_grad_(train)
    want = _reference(problem.shape, x, local, w, p)
    _compare("output", y.detach()[:tokens], want.detach(), TOLERANCE[dtype])
    if train:
        want.backward(problem.grad[:tokens].float())
        for name, got, truth in (("input", problem.x, x), ("routing weights", problem.routings[call][1], w)):
            assert truth.grad is not None
            grad = None if got.grad is None else got.grad[:tokens]
            _compare(f"gradient of {name}", grad, truth.grad, TOLERANCE[dtype])
