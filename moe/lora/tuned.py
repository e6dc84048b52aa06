"""Some of a layer's experts that learn, apart from the rest, which are frozen and may be elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.grouped_ffn import grouped_ffn
from ...kernels.routing import Routing

CHILD = "tuned"  # its name in an experts module


class TunedExperts(nn.Module):
    """Copies [n, ...] of the experts `chosen` of an experts module, parameters under the module's own names; `names`:
    what the operation calls a weight -> that name. `form`: activation, gated, transposed, interleaved."""

    def __init__(self, module: nn.Module, chosen: Sequence[int], names: dict[str, str], form: dict[str, Any]) -> None:
        super().__init__()
        self.chosen, self.names, self.form = sorted(chosen), names, form
        self.experts = getattr(module, names["w_down"]).shape[0]
        for name in names.values():
            weight = getattr(module, name).detach()
            self.register_parameter(name, nn.Parameter(weight[self.chosen].clone()))

    def parted(self, routing: Routing) -> tuple[Routing, Routing]:
        """(the pairs of all other experts, those of the experts here by their place among them)."""
        ids = routing.expert_ids.long()
        there = (ids >= 0) & (ids < self.experts)
        place = torch.full((self.experts,), -1, device=ids.device)
        place[self.chosen] = torch.arange(len(self.chosen), device=ids.device)
        mine = torch.where(there, place[ids.clamp(0, self.experts - 1)], -1).int()
        rest = torch.where(mine >= 0, -1, routing.expert_ids)
        others = replace(routing, expert_ids=rest, counts=None, capacity=None)
        return others, Routing(mine, routing.weights, len(self.chosen))

    def compute(self, rows: Tensor, routing: Routing) -> Tensor:
        """y [R, D] of the experts here."""
        w: dict[str, Any] = {ours: getattr(self, name).to(rows.dtype) for ours, name in self.names.items()}
        return grouped_ffn(rows, routing, w.pop("w_gate_up"), w.pop("w_down"), **w, **self.form)

    def extra_repr(self) -> str:
        return f"{len(self.chosen)} of {self.experts} experts"


def tuned_of(module: nn.Module) -> TunedExperts | None:
    found = module._modules.get(CHILD)
    return found if isinstance(found, TunedExperts) else None


def tuned_in(model: nn.Module) -> Iterator[tuple[str, nn.Module, TunedExperts]]:
    for name, module in model.named_modules():
        found = tuned_of(module)
        if found is not None:
            yield name, module, found


def with_tuned(
    module: nn.Module, rows: Tensor, routing: Routing, compute: Callable[[Tensor, Routing], Tensor]
) -> Tensor:
    """compute(rows, routing), of which the experts that learn are computed apart."""
    tuned = tuned_of(module)
    if tuned is None:
        return compute(rows, routing)
    others, mine = tuned.parted(routing)
    return compute(rows, others) + tuned.compute(rows, mine)
