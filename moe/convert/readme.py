"""Read-ME's refactoring: experts are neurons that are active together, routers are distilled from what was active."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..clusters import kmeans
from ..routers.pregate import distillation_loss
from .dense import Dense
from .families import gates
from .methods import Order, check_number, only_one
from .recipe import Expert, Recipe
from .walk import Walk

_WHO = "convert"
_PROJECTED = 64  # numbers that clustering sees of a sequence and layer
_BATCH = 1024  # tokens of a step


@dataclass(frozen=True)
class Activations:
    """Experts by what is active together. The calibration sequences are clustered by their mean activations, over all
    layers at once; each cluster is an expert, with the `keep` neurons of each layer that contribute most there (mean
    |h| times the norm of its column of the down projection). Routers learn by distillation which expert holds most of
    a token's contribution.

    calibration  token ids [B, S], or several of them: at least as many sequences as experts. They run through the dense
                 model twice, layer by layer; hidden states and one number for each neuron and sequence are in memory
    keep         neurons of an expert: a share of F, or their number
    domains      the cluster of each sequence, where it is known; None: k-means
    pregate      the first router learns what is best for all layers together, to be used with `pregated(model)`
    steps        of training for each router

    Not the dense model's output: an expert has lost what it has not kept. Train on. Source: Cai et al., Read-ME (2024).
    """

    calibration: Tensor | Sequence[Tensor] | None = None
    keep: float | int = 0.5
    domains: Sequence[int] | None = None
    pregate: bool = False
    steps: int = 200

    def recipe(self, models: Sequence[Dense], order: Order) -> Recipe:
        only_one(models, "activations")
        dense = models[0]
        keep = self._kept(dense.width)
        if type(self.steps) is not int or self.steps < 0:
            raise ValueError(f"{_WHO}: steps must be a whole number of at least 0, got {self.steps!r}")
        walk = Walk(dense, self._sequences(dense, order.experts))
        seen = _seen(walk, order)
        of = self._clusters(walk.sequences, seen, order)
        neurons = {layer: _best(mass, of, order.experts, keep) for layer, mass in seen.items()}
        weights = self._routers(walk, neurons, order)
        made = {layer: [Expert(0, some) for some in chosen] for layer, chosen in neurons.items()}
        return Recipe(made.__getitem__, weights.__getitem__, keep)

    def _kept(self, width: int) -> int:
        check_number("keep", self.keep)
        share = isinstance(self.keep, float)
        found = round(self.keep * width) if share else int(self.keep)
        if not 1 <= found <= width or (share and self.keep > 1):
            raise ValueError(f"{_WHO}: keep must be a share or a number of {width} neurons, got {self.keep!r}")
        return found

    def _sequences(self, dense: Dense, experts: int) -> list[Tensor]:
        given = self.calibration
        some = [] if given is None else [given] if isinstance(given, Tensor) else list(given)
        for ids in some:
            if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
                got = list(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
                raise ValueError(f"{_WHO}: calibration must be token ids [B, S], got {got}")
            if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < dense.config.vocab_size:
                rule = f"token ids below {dense.config.vocab_size}"
                raise ValueError(f"{_WHO}: calibration must be {rule}, got {int(ids.min())} .. {int(ids.max())}")
        some = [ids for ids in some if ids.numel()]
        count = sum(len(ids) for ids in some)
        if count < experts:
            raise ValueError(f"{_WHO}: calibration must be at least {experts} sequences of tokens, got {count}")
        return some

    def _clusters(self, count: int, seen: dict[int, Tensor], order: Order) -> Tensor:
        if self.domains is not None:
            of = torch.as_tensor(list(self.domains))
            fine = of.dtype == torch.int64 and len(of) == count and sorted(set(of.tolist())) == [*range(order.experts)]
            if not fine:
                rule = f"one number in 0 .. {order.experts - 1} for each of {count} sequences, each of them used"
                raise ValueError(f"{_WHO}: domains must be {rule}, got {list(self.domains)[:8]}")
            return of
        draw = torch.Generator().manual_seed(order.seed)
        parts = []
        for mass in seen.values():  # distances stay, up to a few percent, in fewer numbers
            turn = torch.randn(mass.shape[1], min(_PROJECTED, mass.shape[1]), generator=draw) / _PROJECTED**0.5
            parts.append(mass.sqrt() @ turn.to(mass.device))
        return kmeans(torch.cat(parts, 1), order.experts, seed=order.seed)[1]

    def _routers(self, walk: Walk, neurons: dict[int, list[Tensor]], order: Order) -> dict[int, Tensor]:
        """Layer -> router weight [E, D]."""
        found, total, first = {}, None, None

        def held(layer: int, mass: Tensor) -> Tensor:
            """What each expert holds of each token [B * S, E]."""
            some = [mass[..., those].sum(2) for those in neurons.get(layer, [])]
            return torch.stack(some, 2).flatten(0, 1) if some else mass.new_empty(0)

        for layer, x, target in walk.layers(held):
            if layer not in neurons:
                continue
            found[layer] = fit_router(x, target, self.steps, order.seed + layer)
            if self.pregate:
                total = target if total is None else total + target
                first = x if first is None else first
        if self.pregate and first is not None and total is not None:
            found[order.sparse[0]] = fit_router(first, total / len(found), self.steps, order.seed)
        return found


def _seen(walk: Walk, order: Order) -> dict[int, Tensor]:
    """Layer -> mean contributions of each neuron in each sequence [N, F], which sum to 1."""
    layers = walk.layers(lambda _, mass: mass.mean(1))
    return {layer: mean for layer, _, mean in layers if layer in order.sparse}


def _best(mass: Tensor, of: Tensor, experts: int, keep: int) -> list[Tensor]:
    """The neurons of each expert, rising."""
    return [mass[of == e].mean(0).topk(keep).indices.sort().values for e in range(experts)]


def fit_router(x: Tensor, target: Tensor, steps: int, seed: int) -> Tensor:
    """A router weight [E, D] whose logits for x [T, D] say which expert is best by `target` [T, E]: distillation, with
    differences of a token's targets brought to a standard deviation of 2."""
    scale = x.float().square().mean().sqrt().clamp_min(1e-6)
    x, target = x.float() / scale, target.float()
    target = target - target.mean(1, keepdim=True)
    target = 2 * target / target.std().clamp_min(1e-6)
    weight = torch.zeros(target.shape[1], x.shape[1], device=x.device, requires_grad=True)
    adam = torch.optim.Adam([weight], lr=0.3 / x.shape[1] ** 0.5)
    draw = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        for _ in range(steps):
            rows = torch.randint(len(x), (min(_BATCH, len(x)),), generator=draw).to(x.device)
            adam.zero_grad()
            distillation_loss(F.linear(x[rows], weight), target[rows], smoothing=0.1).backward()
            adam.step()
    return weight.detach() / scale


@contextmanager
def pregated(model: nn.Module) -> Iterator[None]:
    """`with pregated(model):` the first layer's router chooses for all layers, so that the whole schedule is known
    before the first expert runs. For a transformers model whose routers return (logits, weights, ids), as those of
    `convert` do, of the same E and K; swapped or not. Gradients reach the first router from all layers.

    Raises ValueError where `model` has no such routers, or they differ in E or K.
    """
    found: list[Any] = gates(model)
    sizes = {(gate.weight.shape[0], gate.top_k) for gate in found}
    if len(sizes) != 1:
        raise ValueError(f"pregated: model must have routers of one E and K, got {sorted(sizes) or 'none'}")
    said: list[Any] = [None]

    def first(module: nn.Module, args: Any, output: Any) -> None:
        said[0] = output

    handles = [found[0].register_forward_hook(first)]
    handles += [gate.register_forward_hook(lambda module, args, output: said[0]) for gate in found[1:]]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
