"""What each expert is made of, and the tensors of the MoE model that follow from it, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .dense import FFN, Dense, mlp
from .families import Target


@dataclass(frozen=True)
class Expert:
    """Of which model's FFN, which neurons (None: all) in which order, and what their weights are multiplied with."""

    model: int = 0
    neurons: Tensor | None = None
    up: float = 1.0
    down: float = 1.0


@dataclass(frozen=True)
class Recipe:
    """experts    layer -> its experts
    gate       layer -> the router's weight [E, D]
    width      F of an expert
    noise      standard deviation of what is added to an expert's weights, in those of each matrix
    """

    experts: Callable[[int], Sequence[Expert]]
    gate: Callable[[int], Tensor]
    width: int
    noise: float = 0.0
    seed: int = 0


class Made(NamedTuple):
    """A tensor to be: its key in the checkpoint, and what makes it."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


def tensors(models: Sequence[Dense], recipe: Recipe, target: Target, sparse: Sequence[int], experts: int) -> list[Made]:
    """All tensors of the MoE model in its order. One layer's FFN of one model is kept between two calls, no more."""
    first, made = models[0], list[Made]()
    kitchen = _Kitchen(models, recipe)
    for name, shape in first.shapes.items():
        layer = next((i for i in sparse if name.startswith(f"{mlp(i)}.")), None)
        if layer is None:
            made.append(Made(name, tuple(shape), first.dtypes[name], lambda name=name: mean_of(models, name)))  # type: ignore[misc]
        elif name.endswith(f".{FFN[0]}.weight"):
            made += _block(first, kitchen, target, layer, experts)
    return made


def _block(dense: Dense, kitchen: _Kitchen, target: Target, layer: int, experts: int) -> Iterator[Made]:
    """Router and experts of a layer."""
    block, hidden, width = f"model.layers.{layer}.{target.block}", dense.config.hidden_size, kitchen.recipe.width
    dtype = dense.dtypes[f"{mlp(layer)}.{FFN[0]}.weight"]
    yield Made(
        f"{block}.gate.weight", (experts, hidden), dtype, lambda: kitchen.recipe.gate(layer).to(dense.device, dtype)
    )
    for e in range(experts):
        for part, name in enumerate(target.parts):
            shape = (hidden, width) if part == 2 else (width, hidden)

            def make(e: int = e, part: int = part) -> Tensor:
                return kitchen.weight(layer, e, part).to(dense.device, dtype)

            yield Made(f"{block}.experts.{e}.{name}.weight", shape, dtype, make)
    if target.shared:  # without a neuron: its output is 0
        for part, name in enumerate(target.parts):
            shape = (hidden, 0) if part == 2 else (0, hidden)
            yield _zeros(f"{block}.shared_expert.{name}.weight", shape, dtype, dense.device)
        yield _zeros(f"{block}.shared_expert_gate.weight", (1, hidden), dtype, dense.device)


def _zeros(key: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Made:
    return Made(key, shape, dtype, lambda: torch.zeros(shape, dtype=dtype, device=device))


def mean_of(models: Sequence[Dense], name: str) -> Tensor:
    """A parameter, averaged over the models (fp32 sums, fp64 where it is stored so)."""
    first = models[0].read(name)
    if len(models) == 1:
        return first
    total = first.to(torch.promote_types(first.dtype, torch.float32), copy=True)
    for model in models[1:]:
        total += model.read(name).to(total.device)
    return (total / len(models)).to(first.dtype)


class _Kitchen:
    """Weights of experts. The FFN that was read last stays."""

    def __init__(self, models: Sequence[Dense], recipe: Recipe) -> None:
        self.models, self.recipe = models, recipe
        self._last: tuple[tuple[int, int], tuple[Tensor, Tensor, Tensor]] | None = None

    def weight(self, layer: int, expert: int, part: int) -> Tensor:
        """Gate (0), up (1) or down (2) of an expert."""
        how = self.recipe.experts(layer)[expert]
        w = self._ffn(how.model, layer)[part]
        if how.neurons is not None:
            w = w.index_select(1 if part == 2 else 0, how.neurons.to(w.device))
        scale = how.down if part == 2 else how.up
        if scale != 1.0:
            w = (w * scale).to(w.dtype)
        if self.recipe.noise:
            draw = torch.Generator().manual_seed(hash((self.recipe.seed, layer, expert, part)) % 2**63)
            std = w.float().std().item() * self.recipe.noise
            w = (w + torch.randn(w.shape, generator=draw).to(w.device) * std).to(w.dtype)
        return w

    def _ffn(self, model: int, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        if self._last is None or self._last[0] != (model, layer):
            self._last = None  # two are never there at once
            self._last = (model, layer), self.models[model].ffn(layer)
        return self._last[1]
