"""Which experts the next layer will need, said while this one still computes; and which of them to fetch."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...placement.predict import Predictor

_MOST = 2  # candidates, times K


@dataclass(frozen=True)
class Guess:
    """Experts of a layer to come, the likeliest first. `rank` [m]: an expert's best place among the choices foreseen for
    any one token, 0 the first. `chance` [m]: how likely each is needed, where the guess can say so itself."""

    layer: int
    experts: NDArray[np.int32]
    rank: NDArray[np.int32]
    chance: NDArray[np.float64] | None = None


class Foresight(Protocol):
    def start(self) -> None:
        """Another text begins."""

    def guess(self, layer: int, rows: Tensor, expert_ids: NDArray[np.int32]) -> Guess | None:
        """At `layer`, whose rows [R, D] go to expert_ids [R, K] (-1: none); None: nothing can be said."""


def ranked(scores: Tensor, most: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """(experts, rank) of scores [R, E]: all that are among the `most` highest of any row, by rank and then by how many
    rows and how much they say for them."""
    most = min(most, scores.shape[1])
    order = scores.topk(most, dim=1).indices.cpu().numpy()
    if len(order) == 1:
        return order[0].astype(np.int32), np.arange(most, dtype=np.int32)
    rank = np.full(scores.shape[1], most, np.int32)
    for place in range(most - 1, -1, -1):
        rank[order[:, place]] = place
    total = scores.sum(0).cpu().numpy()
    votes = np.bincount(order.ravel(), minlength=len(rank))
    found = np.flatnonzero(rank < most)
    found = found[np.lexsort((found, -total[found], -votes[found], rank[found]))]
    return found.astype(np.int32), rank[found]


@dataclass(frozen=True)
class Router:
    """What a router multiplies rows with: weight [E, D]; `bias` [E] on the logits; `correction` [E] on their sigmoids
    (DeepSeek-V3), which decides the choice."""

    weight: Tensor
    bias: Tensor | None
    correction: Tensor | None

    def scores(self, rows: Tensor) -> Tensor:
        """[R, E], larger for what the router would rather choose."""
        logits = rows.to(self.weight.dtype) @ self.weight.T
        if self.bias is not None:
            logits = logits + self.bias
        return logits.float() if self.correction is None else logits.float().sigmoid() + self.correction


def router_of(model: nn.Module, experts_name: str, num_experts: int) -> Router | None:
    """The router beside an experts module, in its block or the block around that: the one module with a matrix [E, D]
    of its own outside the experts. None where there is not exactly one."""
    path = experts_name.split(".")
    for up in range(1, min(3, len(path) + 1)):
        block = model.get_submodule(".".join(path[:-up]))
        experts = model.get_submodule(experts_name)
        inside = set(experts.modules())
        found = [m for m in block.modules() if m not in inside and _matrix(m, num_experts) is not None]
        if len(found) == 1:
            weight = _matrix(found[0], num_experts)
            assert weight is not None
            return Router(weight, *_vectors(block, found[0], inside, num_experts))
        if found:
            return None
    return None


def _matrix(module: nn.Module, num_experts: int) -> Tensor | None:
    own = [p for _, p in module.named_parameters(recurse=False) if p.dim() == 2 and p.shape[0] == num_experts]
    return own[0].detach() if len(own) == 1 else None


def _vectors(block: nn.Module, router: nn.Module, inside: set[nn.Module], num_experts: int) -> tuple[Any, Any]:
    """(bias, correction) [E]: the correction may stand in the router or beside it."""
    bias = correction = None
    for module in block.modules():
        if module in inside:
            continue
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, value in own:
            if value.dim() != 1 or len(value) != num_experts:
                continue
            if "correction" in name:
                correction = value.detach().float()
            elif name == "bias" and module is router:
                bias = value.detach()
    return bias, correction


class Gate:
    """The next layer's router applied to this layer's rows (Eliseev and Mazur, 2023; Fate, 2025): a residual stream
    changes little from one layer to the next. Says nothing about the layer that follows the last."""

    def __init__(self, routers: Sequence[Router | None]) -> None:
        self.routers = routers

    def start(self) -> None:
        pass

    def guess(self, layer: int, rows: Tensor, expert_ids: NDArray[np.int32]) -> Guess | None:
        if layer + 1 == len(self.routers) or not len(rows):
            return None
        router = self.routers[layer + 1]
        if router is None:
            return None
        with torch.no_grad():
            return Guess(layer + 1, *ranked(router.scores(rows), _MOST * expert_ids.shape[1]))


class Path:
    """A predictor by expert ids alone (placement/predict.py); each thread's text is followed by a twin of its own. After
    the last layer it foresees the first of the next token."""

    def __init__(self, predictor: Predictor, layers: int) -> None:
        self._predictor, self._layers = predictor, layers
        self._twins: dict[int, Predictor] = {}

    def start(self) -> None:
        self._twin().start()

    def guess(self, layer: int, rows: Tensor, expert_ids: NDArray[np.int32]) -> Guess | None:
        if not len(expert_ids):
            return None
        twin, to = self._twin(), (layer + 1) % self._layers
        twin.observe(layer, expert_ids)
        chance = twin.scores(to)
        best = np.argsort(-chance, kind="stable")[: _MOST * expert_ids.shape[1]].astype(np.int32)
        return Guess(to, best, np.arange(len(best), dtype=np.int32), chance[best].astype(np.float64))

    def _twin(self) -> Predictor:
        return self._twins.setdefault(threading.get_ident(), self._predictor.twin())
