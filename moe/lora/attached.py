"""The low-rank changes that an experts module carries, and what it computes with them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.grouped_ffn import grouped_ffn
from ...kernels.lora_ffn import Delta, lora_ffn
from ...kernels.routing import Routing
from ..shards import Cut, Shards, shards_of

TARGETS = ("gate_up", "down")
Changes = tuple[Delta | None, Delta | None]  # of the two projections
Gathered = tuple[Sequence[Tensor | None], Changes | None]  # weights and biases, as a call computes with them
CHILD = "lora"  # its name in an experts module


@dataclass(frozen=True)
class Target:
    """One weight [E, out, in] that is changed: the module's `parameter`, its sizes, and whether the module has it as
    [E, in, out]."""

    parameter: str
    experts: int
    fan_in: int
    fan_out: int
    transposed: bool = False


class ExpertLora(nn.Module):
    """scale * B_e A_e for each expert e of a module, scale = alpha / rank (rslora: alpha / sqrt(rank)).

    a_gate_up [E, r, D], b_gate_up [E, 2F, r], a_down [E, r, F], b_down [E, D, r], those of `targets` only; rows of B in
    the order of the weight's own outputs. `chosen`: the experts that are changed, of which alone there are matrices;
    None: all. A starts as nn.Linear's weights do (PEFT's start), B at zero.
    """

    def __init__(
        self,
        targets: Mapping[str, Target],
        rank: int,
        alpha: float,
        *,
        rslora: bool = False,
        dropout: float = 0.0,
        chosen: Sequence[int] | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.targets, self.rank, self.alpha, self.rslora = dict(targets), rank, alpha, rslora
        self.dropout, self.on = dropout, True
        self.hook: Any = None  # on the experts module, while it is there
        self.chosen = None if chosen is None else sorted(chosen)
        for name, t in targets.items():
            n = t.experts if self.chosen is None else len(self.chosen)
            a, b = (torch.empty(n, *s, device=device, dtype=dtype) for s in ((rank, t.fan_in), (t.fan_out, rank)))
            nn.init.uniform_(a, -(t.fan_in**-0.5), t.fan_in**-0.5)
            setattr(self, f"a_{name}", nn.Parameter(a))
            setattr(self, f"b_{name}", nn.Parameter(nn.init.zeros_(b)))

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """(A [E, r, in], B [E, out, r]) of a target, those of experts that are not chosen zero."""
        a, b = getattr(self, f"a_{name}"), getattr(self, f"b_{name}")
        if self.chosen is None:
            return a, b
        where = torch.tensor(self.chosen, device=a.device)
        experts = self.targets[name].experts
        return tuple(t.new_zeros(experts, *t.shape[1:]).index_copy(0, where, t) for t in (a, b))  # type: ignore[return-value]

    def deltas(self, shards: Shards | None = None, apart: bool = False) -> Changes:
        """The changes of the two projections, as a call computes with them. `apart`: gate rows above up rows, where the
        module's own weights have them in turn."""
        found: list[Delta | None] = []
        for name in TARGETS:
            if name not in self.targets:
                found.append(None)
                continue
            a, b = self.factors(name)
            if shards is not None:
                cuts = factor_cuts(shards.cuts, self.targets[name].parameter)
                a, b = (shards.gathered_as(cut, t) for cut, t in zip(cuts, (a, b), strict=True))
            if apart and name == "gate_up":
                b = torch.cat((b[:, ::2], b[:, 1::2]), 1)
            found.append(Delta(a, b, self.scale))
        return found[0], found[1]

    def extra_repr(self) -> str:
        chosen = "" if self.chosen is None else f", {len(self.chosen)} experts"
        return f"rank={self.rank}, alpha={self.alpha}, {'+'.join(self.targets)}{chosen}" + ("" if self.on else ", off")


def factor_cuts(cuts: Mapping[str, Cut], parameter: str) -> tuple[Cut, Cut]:
    """How A [E, r, in] and B [E, out, r] are cut where their weight is cut: over F the one that has it, and neither
    over r. A weight is cut along its outputs where that is the gate and up projection."""
    cut = cuts[parameter]
    of_outputs = not parameter.endswith(("down_proj", "w_down"))
    whole = Cut(2, everywhere=True)
    return (whole, Cut(1, cut.blocks)) if of_outputs else (Cut(2), whole)


def lora_of(module: nn.Module) -> ExpertLora | None:
    """What an experts module carries, or None."""
    found = module._modules.get(CHILD)
    return found if isinstance(found, ExpertLora) else None


def at_work(module: nn.Module) -> ExpertLora | None:
    found = lora_of(module)
    return found if found is not None and found.on else None


def loras_in(model: nn.Module) -> Iterator[tuple[str, nn.Module, ExpertLora]]:
    for name, module in model.named_modules():
        found = lora_of(module)
        if found is not None:
            yield name, module, found


def changes_of(module: nn.Module) -> Changes | None:
    """What a call of an experts module computes with, gathered as its weights are; None where nothing is changed."""
    lora = at_work(module)
    return None if lora is None else lora.deltas(shards_of(module))


def expert_ffn(
    module: nn.Module,
    rows: Tensor,
    routing: Routing,
    w_gate_up: Any,
    w_down: Any,
    changes: Changes | None = None,
    **form: Any,
) -> Tensor:
    """grouped_ffn on an experts module's weights, with what the module carries. `changes`: gathered before."""
    lora = at_work(module)
    if lora is None:
        return grouped_ffn(rows, routing, w_gate_up, w_down, **form)
    up, down = lora.deltas(shards_of(module)) if changes is None else changes
    return lora_ffn(rows, routing, w_gate_up, w_down, up, down, dropout=lora.dropout if lora.training else 0.0, **form)


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """The model without its changes, inside."""
    before = [(lora, lora.on) for _, _, lora in loras_in(model)]
    try:
        for lora, _ in before:
            lora.on = False
        yield
    finally:
        for lora, on in before:
            lora.on = on
