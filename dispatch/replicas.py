"""Experts in slots: which slot each choice of an expert goes to, and a dispatcher that sends rows there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..kernels.routing import Routing
from ..placement.placement import Placement
from .protocol import Dispatcher


@dataclass(frozen=True, eq=False)
class Replicas:
    """The slots of one layer's experts as one rank takes them: the rule replica="home" of placement/walk.py.

    An expert is taken on the rank's own GPU, if it stands there; else from those on its node, else from all, in turn:
    of M slots, GPUs rising, the n-th choice of an expert in a call takes number (n + gpu) mod M.

    table      int32 [E + 1, M]  the slots that an expert is taken from, -1 behind them; the last line stands for none
    candidates int64 [E + 1]     how many they are
    gpu        this rank's number among the G of the placement
    num_slots  S
    in_turn    whether any expert has more than one candidate
    """

    table: Tensor = field(repr=False)
    candidates: Tensor = field(repr=False)
    gpu: int
    num_slots: int
    in_turn: bool

    @classmethod
    def of(cls, placement: Placement, layer: int, gpu: int, device: torch.device | str | None = None) -> Replicas:
        """Of one layer of a placement, for GPU number `gpu`, on `device`."""
        gpus = placement.topology.gpus
        if not 0 <= gpu < gpus:
            raise ValueError(f"Replicas: gpu must be in 0 .. {gpus - 1}, got {gpu}")
        layers = len(placement.expert_of_slot)
        if not 0 <= layer < layers:
            raise ValueError(f"Replicas: layer must be in 0 .. {layers - 1}, got {layer}")
        experts, gpu_of_slot = placement.expert_of_slot[layer], placement.gpu_of_slot
        node = placement.topology.node_of_gpu
        away = np.where(gpu_of_slot == gpu, 0, np.where(node[gpu_of_slot] == node[gpu], 1, 2))
        nearest = np.full(placement.num_experts, 2)
        np.minimum.at(nearest, experts, away)
        taken = [
            np.flatnonzero((experts == expert) & (away == nearest[expert])) for expert in range(placement.num_experts)
        ]
        table = np.full((len(taken) + 1, max(map(len, taken))), -1, np.int32)
        for line, slots in zip(table, taken, strict=False):
            line[: len(slots)] = slots
        candidates = torch.tensor([*map(len, taken), 1], device=device)
        return cls(torch.from_numpy(table).to(device), candidates, gpu, len(experts), table.shape[1] > 1)

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.table) - 1

    def slots(self, expert_ids: Tensor) -> Tensor:
        """Expert ids [T, K] -> slots int32 [T, K], -1 for no expert. Nothing waits for the device; no atomics."""
        flat = expert_ids.flatten().long()
        expert = torch.where((flat >= 0) & (flat < self.num_experts), flat, self.num_experts)
        if not self.in_turn:
            return self.table[expert, 0].view(expert_ids.shape)
        turn = (times_before(expert) + self.gpu) % self.candidates[expert]
        return self.table[expert, turn].view(expert_ids.shape)


def times_before(ids: Tensor) -> Tensor:
    """For each of ids int64 [n] how often it stands before: int64 [n]."""
    order = ids.argsort(stable=True)
    ordered = ids[order]
    first = torch.searchsorted(ordered, ordered)
    times = torch.arange(len(ids), device=ids.device) - first
    return torch.empty_like(times).scatter_(0, order, times)


class Chooser(Protocol):
    """Which slots the choices of a layer's experts go to."""

    @property
    def num_experts(self) -> int: ...

    @property
    def num_slots(self) -> int: ...

    def slots(self, expert_ids: Tensor) -> Tensor:
        """Expert ids [T, K] -> slots int32 [T, K], -1 for no expert."""
        ...


@dataclass(frozen=True)
class Placed:
    """A dispatcher that knows slots, given experts: `inner` shares S slots over its ranks as it does experts.

    The weights of a rank are those of its slots, and `local_experts` are numbers of slots. `replicas`: a Replicas, or
    a Balanced (dispatch/balanced.py).
    """

    replicas: Chooser
    inner: Dispatcher

    def local_experts(self, num_experts: int) -> range:
        """The slots of this rank, S/G in a row."""
        if num_experts != self.replicas.num_experts:
            raise ValueError(
                f"Placed: num_experts must be the placement's {self.replicas.num_experts}, got {num_experts}"
            )
        return self.inner.local_experts(self.replicas.num_slots)

    def dispatch(self, x: Tensor, routing: Routing) -> tuple[Tensor, Routing, Any]:
        slots, experts = self.replicas, self.replicas.num_experts
        if routing.num_experts != experts:
            raise ValueError(
                f"Placed: routing must be over the placement's {experts} experts, got {routing.num_experts}"
            )
        ids = slots.slots(routing.expert_ids)
        # What the losses go by stays behind: it is the experts'.
        placed = Routing(ids, routing.weights, slots.num_slots, capacity=routing.capacity)
        return self.inner.dispatch(x, placed)

    def combine(self, rows: Tensor, ticket: Any) -> Tensor:
        return self.inner.combine(rows, ticket)
