"""What an offload is compared with: experts loaded when they are asked for, one by one, before anything runs."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

from ...kernels.expert_outputs import combine_outputs, expert_outputs
from ...kernels.routing import Routing
from ...moe.offload.arena import Arena
from ...moe.offload.host import Store


class OnDemand:
    """Least recently used experts in `slots` a layer; a miss is read by the calling thread. What most scripts do."""

    def __init__(self, store: Store, slots: int, device: torch.device | str = "cpu") -> None:
        kind = store.layers[0].kind(0)
        self._store, self._slots = store, slots
        self._arena = Arena([kind], [slots * len(store.layers)], device)
        self._resident: list[OrderedDict[int, int]] = [OrderedDict() for _ in store.layers]
        self._free = [list(range(layer * slots, (layer + 1) * slots)) for layer in range(len(store.layers))]
        self.accesses = self.loads = 0

    def compute(self, layer: int, rows: Tensor, routing: Routing, **form) -> Tensor:
        resident, free = self._resident[layer], self._free[layer]
        ids = sorted({e for e in routing.expert_ids.flatten().tolist() if e >= 0})
        if len(ids) > len(resident) + len(free):
            raise ValueError(
                f"OnDemand: slots must be at least the step's experts, {len(ids)}, got {len(resident) + len(free)}"
            )
        for e in ids:
            if e in resident:
                resident.move_to_end(e)
        for e in ids:
            if e not in resident:
                slot = free.pop() if free else resident.popitem(last=False)[1]
                self._store.read(layer, e, self._arena.slot(slot))
                resident[e] = slot
                self.loads += 1
        self.accesses += len(ids)
        slot_of = torch.full((routing.num_experts,), -1, dtype=torch.int32)
        slot_of[ids] = torch.tensor([resident[e] for e in ids], dtype=torch.int32)
        w = self._arena.weights(0, len(self._free) * self._slots)
        out = rows.new_empty(routing.expert_ids.numel(), rows.shape[1], dtype=torch.float32)
        expert_outputs(rows, routing, w["w_gate_up"], w["w_down"], slot_of.to(rows.device), out, **form)
        return combine_outputs(out, routing, rows.dtype)
