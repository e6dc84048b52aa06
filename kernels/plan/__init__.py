"""plan: the order in which (row, k) pairs are worked on, expert by expert."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..chip import say_once, why_not
from ..transforms import implement, register_composite
from .on_cpu import plan_on_cpu
from .reference import plan_reference

__all__ = ["Plan", "plan", "plan_reference"]


@dataclass(frozen=True)
class Plan:
    """Pairs (row t, choice k), numbered t*K + k, sorted by expert; equal experts keep their order (stable).

    `pair_of_row` int32 [T*K]: the pair at each place of the expert order; pairs without an expert come last, so that
    shapes do not depend on data. `offsets` int32 [E+1]: expert e owns the places offsets[e] .. offsets[e+1]-1, and
    offsets[E] = N is the number of live pairs. `row_of_pair` int32 [T*K]: the inverse map.
    """

    pair_of_row: Tensor
    offsets: Tensor
    row_of_pair: Tensor


def _plan_on_cuda(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    why = why_not(expert_ids.device.index)
    if why is None:
        from .on_triton import MOST_EXPERTS, plan_on_triton

        if num_experts <= MOST_EXPERTS:
            return plan_on_triton(expert_ids, num_experts)
        why = f"num_experts must be at most {MOST_EXPERTS} for the Triton kernel, got {num_experts}"
    say_once("plan", why, "a stable sort in torch")
    return plan_reference(expert_ids, num_experts)


torch.library.define("headgate::plan", "(Tensor expert_ids, int num_experts) -> (Tensor, Tensor, Tensor)")
implement("plan", "CompositeExplicitAutograd", plan_reference)
implement("plan", "cpu", plan_on_cpu)
implement("plan", "cuda", _plan_on_cuda)
register_composite("plan", plan_reference)


@torch.library.register_fake("headgate::plan")
def _(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    n = expert_ids.numel()
    return (
        expert_ids.new_empty(n, dtype=torch.int32),
        expert_ids.new_empty(num_experts + 1, dtype=torch.int32),
        expert_ids.new_empty(n, dtype=torch.int32),
    )


def plan(expert_ids: Tensor, num_experts: int) -> Plan:
    """Sorts the pairs of `expert_ids` [T, K] (integers; < 0 or >= num_experts: no expert) by expert.

    >>> plan(torch.tensor([[1, 0], [-1, 1]]), 2)  # pairs 0..3
    Plan(pair_of_row=[1, 0, 3, 2], offsets=[0, 1, 3], row_of_pair=[1, 0, 3, 2])

    Cost: O(T*K). Raises TypeError for ids that are not integers, ValueError for a shape that is not [T, K].
    """
    if expert_ids.dtype.is_floating_point or expert_ids.dtype.is_complex or expert_ids.dtype == torch.bool:
        raise TypeError(f"plan: expert_ids must be integers, got {expert_ids.dtype}")
    if expert_ids.dim() != 2:
        raise ValueError(f"plan: expert_ids must be [T, K], got {tuple(expert_ids.shape)}")
    if num_experts < 1:
        raise ValueError(f"plan: num_experts must be at least 1, got {num_experts}")
    return Plan(*torch.ops.headgate.plan(expert_ids, num_experts))
