"""How experts are made of a dense model's FFN: METHODS, a name and a class each.

A method is a frozen dataclass of its options with `recipe(models, experts, top_k, sparse, seed, router_std)`, which
raises ValueError naming argument, rule and value before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .dense import Dense
from .recipe import Expert, Recipe

_WHO = "convert"


@dataclass(frozen=True)
class Order:
    """What is asked for: E, K, the layers with experts, the seed, the standard deviation of new router weights (None:
    the config's initializer_range)."""

    experts: int
    top_k: int
    sparse: Sequence[int]
    seed: int
    router_std: float | None


class Method(Protocol):
    def recipe(self, models: Sequence[Dense], order: Order) -> Recipe: ...


@dataclass(frozen=True)
class Copy:
    """Every expert is the dense FFN. Router weights of a token sum to 1, so the first forward is the dense model's, up
    to rounding: of the same products in another order, and of the weights. With top_k=1 the one weight is always 1, and
    the language loss does not train the router.

    noise   standard deviation of what is added to each expert's matrices, in those of the matrix; 0: nothing

    Source: Komatsuzaki et al., Sparse Upcycling (2022).
    """

    noise: float = 0.0

    def recipe(self, models: Sequence[Dense], order: Order) -> Recipe:
        only_one(models, "copy")
        check_number("noise", self.noise)
        same = [Expert()] * order.experts
        gate = new_router(models[0], order, order.experts)
        return Recipe(lambda layer: same, gate, models[0].width, self.noise, order.seed)


@dataclass(frozen=True)
class Granular:
    """F is cut into `shards` G, and each shard is copied E / G times: expert g * E/G + c is copy c of shard g. The G
    experts of a copy have the same router row, so a token whose K is a multiple of G takes whole copies.

    scaling   "down": the down projection times G, which gives the dense model's output where K is a multiple of G.
              "nvidia": every matrix times the cube root of G, as published for softmax after top-k: not exact with a
              gated activation (14% off with G = 4, 20% with G = 8, measured on random weights). For parity
    noise     as in Copy

    Source: He et al., Upcycling Large Language Models into Mixture of Experts (2024), with virtual groups.
    """

    shards: int = 8
    scaling: str = "down"
    noise: float = 0.0

    def recipe(self, models: Sequence[Dense], order: Order) -> Recipe:
        only_one(models, "granular")
        check_number("noise", self.noise)
        g, width = self.shards, models[0].width
        if type(g) is not int or g < 1 or width % g:
            raise ValueError(f"{_WHO}: shards must divide the intermediate size {width}, got {g!r}")
        if order.experts % g:
            raise ValueError(f"{_WHO}: experts must be a multiple of shards ({g}), got {order.experts}")
        if order.top_k % g:
            rule = f"a multiple of shards ({g}), or a token would miss parts of the FFN"
            raise ValueError(f"{_WHO}: top_k must be {rule}, got {order.top_k}")
        if self.scaling not in ("down", "nvidia"):
            raise ValueError(f"{_WHO}: scaling must be 'down' or 'nvidia', got {self.scaling!r}")
        up, down = (1.0, float(g)) if self.scaling == "down" else (g ** (1 / 3), g ** (1 / 3))
        copies = order.experts // g
        cuts = torch.arange(width).view(g, -1)
        made = [Expert(0, cuts[e // copies], up, down) for e in range(order.experts)]
        gate = new_router(models[0], order, copies, times=g)
        return Recipe(lambda layer: made, gate, width // g, self.noise, order.seed)


@dataclass(frozen=True)
class Merge:
    """Several models of one shape, trained apart from one seed: the FFN of each is an expert, the rest is averaged.
    Routers are new: `train_routers` trains them, or the whole.

    Source: Sukhbaatar et al., Branch-Train-MiX (2024).
    """

    def recipe(self, models: Sequence[Dense], order: Order) -> Recipe:
        if len(models) < 2:
            raise ValueError(f"{_WHO}: dense must be at least two models for method 'merge', got {len(models)}")
        if order.experts != len(models):
            rule = f"the number of models ({len(models)}) for method 'merge'"
            raise ValueError(f"{_WHO}: experts must be {rule}, got {order.experts}")
        _check_alike(models)
        made = [Expert(e) for e in range(len(models))]
        return Recipe(lambda layer: made, new_router(models[0], order, len(models)), models[0].width)


_MUST_EQUAL = (  # of a config: what changes what weights mean
    "model_type", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps",
    "rope_parameters", "tie_word_embeddings", "sliding_window", "layer_types",
)  # fmt: skip


def _check_alike(models: Sequence[Dense]) -> None:
    first = models[0]
    for number, other in enumerate(models[1:], 1):
        for name in _MUST_EQUAL:
            a, b = (getattr(model.config, name, None) for model in (first, other))
            if a != b:
                raise ValueError(f"{_WHO}: dense must agree in {name}, got {a!r} and {b!r} in model {number}")
        for name in sorted(first.shapes.keys() | other.shapes.keys()):
            a, b = (model.shapes.get(name) for model in (first, other))
            if a != b:
                said = " and ".join("none" if shape is None else str(list(shape)) for shape in (a, b))
                raise ValueError(f"{_WHO}: dense must have the same shapes, got {said} of {name} in model {number}")
            if first.dtypes[name] != other.dtypes[name]:
                said = f"{first.dtypes[name]} and {other.dtypes[name]} of {name} in model {number}"
                raise ValueError(f"{_WHO}: dense must have the same dtypes, got {said}")


def only_one(models: Sequence[Dense], method: str) -> None:
    if len(models) != 1:
        raise ValueError(f"{_WHO}: dense must be one model for method {method!r}, got {len(models)}")


def check_number(name: str, value: Any, most: float = float("inf")) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most or value == float("inf"):
        rule = "at least 0 and finite" if most == float("inf") else f"in 0 .. {most}"
        raise ValueError(f"{_WHO}: {name} must be {rule}, got {value!r}")


def new_router(dense: Dense, order: Order, rows: int, times: int = 1) -> Callable[[int], Tensor]:
    """Router weights [rows * times, D] of a layer: normal, drawn by seed and layer, `times` over."""
    std = dense.config.initializer_range if order.router_std is None else order.router_std

    def gate(layer: int) -> Tensor:
        draw = torch.Generator().manual_seed(hash((order.seed, layer)) % 2**63)
        return (torch.randn(rows, dense.config.hidden_size, generator=draw) * std).repeat(times, 1)

    return gate
