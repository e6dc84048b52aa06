"""Expert weights in few bits beside the same in full: each format checked against what its bytes mean, then timed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...kernels import Quantized, grouped_ffn
from ...kernels.grouped_ffn import grouped_ffn_reference
from ...kernels.quantized import BLOCKS, FORMATS
from ..check import TOLERANCE, _compare
from ..rivals import Forward
from ..shapes import Shape, as_routing
from .products import Problem, weights_of
from .rivals import NotServed

CONTESTANTS = ("headgate", *FORMATS)  # the first in the case's dtype
_TOKENS = 4  # that are compared


def few_bits(name: str, shape: Shape, tokens: int, dtype: str, device: str) -> tuple[Forward, Mapping[str, Any]]:
    """A contestant's form of the layer, as contestants are called, and its weights. Raises NotServed."""
    step = BLOCKS[name][0] if name in BLOCKS else 2
    if shape.hidden % step or shape.intermediate % step:
        raise NotServed(f"{name} needs sizes that are multiples of {step}, not {shape.name}'s")
    problem = Problem(shape, tokens, dtype, "none" if name == "headgate" else name)
    p, stored = weights_of(problem, device), problem.stored
    p = {n: t if isinstance(t, Quantized) else t.detach() for n, t in p.items()}

    def forward(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return grouped_ffn(
            x, as_routing(stored, ids, weights), p["gate_up_proj"], p["down_proj"],
            b_gate_up=p.get("gate_up_proj_bias"), b_down=p.get("down_proj_bias"), activation=stored.form,
            transposed=stored.transposed, interleaved=stored.interleaved,
        )  # fmt: skip

    return forward, p


def check(
    forward: Forward, p: Mapping[str, Any], shape: Shape, x: Tensor, routing: tuple[Tensor, Tensor], dtype: str,
    grad: Tensor | None = None,
) -> None:  # fmt: skip
    """Compares the output of some tokens and, for a `grad` of y, the gradient of their rows with the reference on the
    weights that the bytes mean, in fp32. Raises WrongNumbers."""
    ids, weights = routing
    tokens = torch.randperm(len(x), device=x.device)[:_TOKENS]
    hit, local = torch.unique(ids[tokens], return_inverse=True)
    few = {n: _widened(t, hit) for n, t in p.items()}
    stored = replace(shape, transposed=shape.transposed and not isinstance(p["down_proj"], Quantized))
    leaf, rows = x.detach()[tokens].float().requires_grad_(), x.detach().requires_grad_(grad is not None)
    want = grouped_ffn_reference(
        leaf, local, weights.detach()[tokens].float(), few["gate_up_proj"], few["down_proj"],
        few.get("gate_up_proj_bias"), few.get("down_proj_bias"), activation=stored.form, transposed=stored.transposed,
        interleaved=stored.interleaved,
    )  # fmt: skip
    with torch.set_grad_enabled(grad is not None):
        y = forward(rows, ids, weights.detach())
    _compare("output", y.detach()[tokens], want.detach(), TOLERANCE[dtype])
    if grad is not None:
        (got,), (should,) = (
            torch.autograd.grad(*pair) for pair in ((y, rows, grad), (want, leaf, grad[tokens].float()))
        )
        _compare("gradient of the input", got[tokens], should, TOLERANCE[dtype])


def bytes_of(p: Mapping[str, Any], hit: float, experts: int) -> float:
    """Bytes of the weights of so many experts."""
    return sum(t.nbytes for n, t in p.items() if not n.endswith("bias")) * hit / experts


def _widened(t: Any, hit: Tensor) -> Tensor:
    if isinstance(t, Quantized):
        return torch.stack([t.expert(int(e), torch.float32) for e in hit])
    return t[hit].float()
