"""What each router is given beside its sizes, and the model around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...moe import ROUTERS, MoE, balanced_table
from ..corpus import VOCABULARY, Corpus
from ..olmoe import Model, Shape, build

NODES = 2  # of two GPUs each
SHAPES = {
    "demo": Shape(),
    "small": Shape(layers=4, hidden=96, ffn=64, experts=16, top_k=2, heads=6, length=128),
}
BALANCE = 0.01  # each layer's coefficient of its router's balancing loss

Options = Callable[[Shape, Corpus, nn.Module], dict[str, Any]]


def _table(shape: Shape, corpus: Corpus, _shared: nn.Module) -> dict[str, Any]:
    counts = torch.from_numpy(np.bincount(corpus.train, minlength=VOCABULARY))
    return {"vocab_size": VOCABULARY, "table": balanced_table(counts, shape.experts, shape.top_k)}


# what a router must be given, or is given so that it does in some hundred steps what it does in many thousand
OPTIONS: dict[str, Options] = {
    "softmax": lambda *_: {"renormalize": True},
    "sigmoid": lambda *_: {"bias_rate": 0.01},
    "bilevel": lambda *_: {"nodes": NODES, "renormalize": True},
    "cosine": lambda *_: {"renormalize": True},
    "expert_choice": lambda *_: {"inference": "threshold", "rate": 0.1},
    "hash": _table,
    "longcat": lambda shape, *_: {"identity": shape.experts // 4, "bias_rate": 0.2},
    "locmoe": lambda *_: {"renormalize": True},
    "pregate": lambda *_: {"renormalize": True},
    "recurrent": lambda shape, _corpus, cell: {"cell": cell, "renormalize": True},
    "relu": lambda shape, *_: {"strength": 1e-4},
    "soft": lambda shape, *_: {
        "inference": "whole",
        "slots_per_expert": max(1, shape.length * shape.top_k // shape.experts),
    },
    "tile": lambda *_: {"tile": 16, "renormalize": True},
    "top_p": lambda *_: {"p": 0.4},
}
COEFFICIENT = {"relu": 1.0}
NOTES = {
    "expert_choice": "trained not causally",
    "soft": "not causal: a token sees those after it, so its loss compares with no other's",
}


@dataclass
class Told:
    """What the layers of one forward pass know of it beside the hidden states."""

    ids: Tensor | None = None
    state: Tensor | None = None


class Block(nn.Module):
    """A MoE layer in place of the model's own: what its router asks for comes from `told`."""

    def __init__(self, moe: MoE, told: Told) -> None:
        super().__init__()
        self.moe, self.told = moe, told

    def forward(self, x: Tensor) -> Tensor:
        router: Any = self.moe.router
        if router.needs_ids:
            return self.moe(x, ids=self.told.ids)
        if not router.carries_state:
            return self.moe(x)
        y, self.told.state = self.moe(x, state=self.told.state)
        return y


def made(name: str, shape: Shape, seed: int, corpus: Corpus) -> tuple[Model, list[MoE]]:
    """(the demo's model with that router in every layer, those layers). Attention and experts start from the same
    numbers for every router."""
    model, told = build(shape, seed), Told()
    cell = nn.GRUCell(shape.hidden, shape.hidden)
    layers = []
    for i, layer in enumerate(model.model.layers):
        torch.manual_seed(1000 * seed + i)
        options = OPTIONS[name](shape, corpus, cell) if name in OPTIONS else {}
        coefficient = COEFFICIENT.get(name, BALANCE) if ROUTERS[name].balances else 0.0
        moe: Any = MoE(
            shape.hidden, shape.ffn, shape.experts, shape.top_k, router=name, router_options=options,
            load_balancing_coef=coefficient,
        )  # fmt: skip
        with torch.no_grad():
            moe.experts.w_gate_up.copy_(layer.mlp.experts.gate_up_proj)
            moe.experts.w_down.copy_(layer.mlp.experts.down_proj)
        layer.mlp = Block(moe, told)
        layers.append(moe)

    def begin(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        told.ids, told.state = kwargs["input_ids"], None

    model.model.register_forward_pre_hook(begin, with_kwargs=True)
    return model, layers


@contextmanager
def evaluating(model: Model) -> Iterator[None]:
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train()
