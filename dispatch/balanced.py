"""Replicas chosen for the batch of all ranks at once, so that the busiest GPU has as few rows as can be."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from ..kernels.uncompiled import uncompiled
from ..placement.live.allot import allot
from ..placement.live.choice import Choice
from ..placement.placement import Placement
from . import collectives
from .replicas import times_before


@dataclass(frozen=True, eq=False)
class Balanced:
    """Like Replicas, but by the numbers of a batch: rows per slot by an exact linear program
    (placement/live/choice.py), then each rank's as near as they can be had (placement/live/allot.py).

    In each call the ranks of `group`, the placement's GPUs, tell each other how often their tokens chose each expert:
    one all-gather of E numbers, one wait for the device, and one program for the CPU, which every rank solves alike. A
    slot takes the first choices of an expert that a rank makes, slots rising, until it has its number.
    """

    group: dist.ProcessGroup = field(repr=False)
    choice: Choice = field(repr=False)
    expert_of_slot: NDArray[np.int32] = field(repr=False)
    gpu_of_slot: NDArray[np.int32] = field(repr=False)
    node_of_gpu: NDArray[np.int32] = field(repr=False)
    order: NDArray[np.int64] = field(repr=False)  # [S]: slots by expert, rising
    first: NDArray[np.int64] = field(repr=False)  # [E]: where an expert's begin
    num_experts: int

    @classmethod
    def of(cls, placement: Placement, layer: int, group: dist.ProcessGroup) -> Balanced:
        """Of one layer of a placement whose GPUs are the ranks of `group`."""
        topology, experts = placement.topology, placement.expert_of_slot[layer]
        if topology.gpus != group.size():
            raise ValueError(
                f"Balanced: group must have the placement's {topology.gpus} GPUs, got {group.size()} ranks"
            )
        gpu = placement.gpu_of_slot
        order = np.argsort(experts, kind="stable")
        first = np.searchsorted(experts[order], np.arange(placement.num_experts))
        choice = Choice(experts, gpu, topology.speed)
        return cls(group, choice, experts, gpu, topology.node_of_gpu, order, first, placement.num_experts)

    @property
    def num_slots(self) -> int:
        """S."""
        return len(self.expert_of_slot)

    @uncompiled
    def slots(self, expert_ids: Tensor) -> Tensor:
        """Expert ids [T, K] -> slots int32 [T, K], -1 for no expert. Every rank of the group must come by."""
        flat, experts = expert_ids.flatten().long(), self.num_experts
        expert = torch.where((flat >= 0) & (flat < experts), flat, experts)
        mine = torch.bincount(expert, minlength=experts + 1)[:experts]
        counts = collectives.all_gather(mine[None], self.group).cpu().numpy()
        rows = self.choice.rows(counts.sum(0))
        sent = allot(counts, rows, self.expert_of_slot, self.gpu_of_slot, self.node_of_gpu)[self.group.rank()]
        ends = sent[self.order].cumsum()
        before = np.concatenate([[0], ends])[self.first]  # rows of this rank for experts before
        tables = (
            torch.from_numpy(t).to(flat.device) for t in (ends, np.append(before, 0), self.order.astype(np.int32))
        )
        until, start, order = tables
        place = torch.searchsorted(until, start[expert] + times_before(expert), right=True)
        return torch.where(expert < experts, order[place.clamp_max(len(order) - 1)], -1).view(expert_ids.shape)
