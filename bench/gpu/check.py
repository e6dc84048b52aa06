"""No time is told of wrong numbers: what every contestant's results on the measured case itself are compared with.

The truth is the fp32 reference on a few tokens (output, input gradient, router-weight gradient) and on one expert with
all of its rows (both weight gradients). Before a contestant runs, freed memory is filled with NaN, so that what it
leaves unwritten shows.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.grouped_ffn import grouped_ffn_reference
from ..check import TOLERANCE, WrongNumbers, _compare
from ..rivals import Forward
from ..shapes import Problem

_TOKENS = 4


@dataclass
class Truth:
    """Of one routing: `tokens` int64 [n] those looked at; y, dx [n, D]; ds [n, K]; `expert` and its dw1, dw2."""

    tokens: Tensor
    y: Tensor
    dx: Tensor | None = None
    ds: Tensor | None = None
    expert: int = 0
    dw1: Tensor | None = None
    dw2: Tensor | None = None


def _reference(problem: Problem, x: Tensor, ids: Tensor, weights: Tensor, p: dict[str, Tensor]) -> Tensor:
    s = problem.shape
    return grouped_ffn_reference(
        x, ids, weights, p["gate_up_proj"], p["down_proj"], p.get("gate_up_proj_bias"), p.get("down_proj_bias"),
        activation=s.form, transposed=s.transposed, interleaved=s.interleaved,
    )  # fmt: skip


def truth_of(problem: Problem, call: int = 0, train: bool = False) -> Truth:
    """In fp32, on the problem's device."""
    ids, weights = problem.routings[call]
    tokens = torch.randperm(problem.tokens, device=ids.device)[:_TOKENS]
    hit, local = torch.unique(ids[tokens], return_inverse=True)
    p = {name: w.detach()[hit].float() for name, w in problem.parameters.items()}
    x = problem.x.detach()[tokens].float().requires_grad_(train)
    w = weights.detach()[tokens].float().requires_grad_(train)
    y = _reference(problem, x, local, w, p)
    if not train:
        return Truth(tokens, y)
    y.backward(problem.grad[tokens].float())
    counts = torch.bincount(ids.flatten(), minlength=problem.shape.experts)
    expert = int(counts.argsort()[len(counts) // 2])
    if counts[expert] == 0:
        expert = int(counts.argmax())
    rows, choice = torch.where(ids == expert)
    one = {n: w[expert : expert + 1].detach().float().requires_grad_() for n, w in problem.parameters.items()}
    s = weights.detach()[rows, choice][:, None].float()
    out = _reference(problem, problem.x.detach()[rows].float(), torch.zeros_like(rows)[:, None], s, one)
    out.backward(problem.grad[rows].float())
    return Truth(tokens, y.detach(), x.grad, w.grad, expert, one["gate_up_proj"].grad, one["down_proj"].grad)


def poison(device: str, size: int) -> None:
    """Fills `size` bytes of freed memory with NaN: whoever allocates next gets them."""
    with contextlib.suppress(torch.OutOfMemoryError):
        torch.full((size // 4,), torch.nan, device=device)


def check(
    problem: Problem, forward: Forward, truth: Truth, dtype: str = "bf16", call: int = 0, train: bool = False
) -> None:
    """Runs `forward` (and its backward pass) once and compares. Raises WrongNumbers."""
    s = problem.shape
    tolerance = TOLERANCE[dtype]
    poison(problem.x.device.type, min(2**31, problem.tokens * s.top_k * (2 * s.hidden + 3 * s.intermediate) * 4))
    ids, weights = problem.routings[call]
    if not train:
        with torch.no_grad():
            y = forward(problem.x, ids, weights)
        _compare("output", y[truth.tokens], truth.y, tolerance)
        return
    y = forward(problem.x, ids, weights)
    _compare("output", y.detach()[truth.tokens], truth.y, tolerance)
    p = problem.parameters
    leaves = [problem.x, weights, p["gate_up_proj"], p["down_proj"]]
    dx, ds, dw1, dw2 = torch.autograd.grad(y, leaves, problem.grad, allow_unused=True)
    if dx is None or ds is None or truth.dx is None or truth.ds is None or truth.dw1 is None or truth.dw2 is None:
        raise WrongNumbers("the gradient of the input or of the routing weights is missing")
    _compare("gradient of the input", dx[truth.tokens], truth.dx, tolerance)
    _compare("gradient of the routing weights", ds[truth.tokens], truth.ds, tolerance)
    for name, got, want in (("gate_up_proj", dw1, truth.dw1), ("down_proj", dw2, truth.dw2)):
        if got is not None:  # None where a rival works on a copy of its own layout
            _compare(f"gradient of {name}", got[truth.expert], want[0], tolerance)
