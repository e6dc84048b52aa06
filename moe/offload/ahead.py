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

from ...placement.caching.predict import Predictor, fit
from ...placement.traces.trace import Trace
from .forms import Found

Guess = tuple[int, NDArray[np.float32]]  # a layer to come, and the chance [E] that each of its experts is needed
PREFETCH = ("gate", "path")
_RANKS = 2  # places of a token's ranking that are followed, times K
_FADE = 0.98  # of what was counted, with each guess


class Foresight(Protocol):
    def start(self) -> None:
        """Another text begins."""

    def came(self, layer: int, experts: NDArray[np.int32]) -> None:
        """What `layer` needs, now that its router has chosen."""

    def guess(self, layer: int, rows: Tensor, expert_ids: Tensor) -> Guess | None:
        """At `layer`, whose rows [R, D] go to expert_ids [R, K] (-1: none); None: nothing can be said."""


def ranks(scores: Tensor, most: int) -> NDArray[np.int64]:
    """Of scores [R, E], each expert's best place [E] among the `most` highest of any row, 0 the first; `most` where it
    is among none."""
    most = min(most, scores.shape[1])
    order = scores.topk(most, dim=1).indices.cpu().numpy()
    rank = np.full(scores.shape[1], most)
    for place in range(most - 1, -1, -1):
        rank[order[:, place]] = place
    return rank


@dataclass(frozen=True)
class Router:
    """Where a router keeps what it multiplies rows with, (module, name) each, read when it is asked: weight [E, D];
    `bias` [E] on the logits; `correction` [E] on their sigmoids (DeepSeek-V3), which decides the choice."""

    weight: tuple[nn.Module, str]
    bias: tuple[nn.Module, str] | None = None
    correction: tuple[nn.Module, str] | None = None

    def scores(self, rows: Tensor) -> Tensor:
        """[R, E], larger for what the router would rather choose."""
        weight = getattr(*self.weight)
        logits = rows.to(weight.dtype) @ weight.T
        if self.bias is not None:
            logits = logits + getattr(*self.bias)
        if self.correction is None:
            return logits.float()
        return logits.float().sigmoid() + getattr(*self.correction).float()


def router_of(model: nn.Module, experts_name: str, num_experts: int, width: int) -> Router | None:
    """The router beside an experts module, in its block or the block around that: the one module with a matrix
    [E, width] of its own outside the experts. None where there is not exactly one."""
    path = experts_name.split(".")
    inside = set(model.get_submodule(experts_name).modules())
    for up in range(1, min(3, len(path) + 1)):
        block = model.get_submodule(".".join(path[:-up]))
        found = [
            (module, name)
            for module in block.modules()
            if module not in inside
            for name, p in module.named_parameters(recurse=False)
            if tuple(p.shape) == (num_experts, width)
        ]
        if len(found) == 1:
            return Router(found[0], *_vectors(block, found[0][0], inside, num_experts))
        if found:
            return None
    return None


def _vectors(block: nn.Module, router: nn.Module, inside: set[nn.Module], num_experts: int) -> tuple[Any, Any]:
    """(bias, correction) [E]: the correction may stand in the router or beside it."""
    bias = correction = None
    for module in block.modules():
        if module in inside:
            continue
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, value in own:
            if tuple(value.shape) != (num_experts,):
                continue
            if "correction" in name:
                correction = module, name
            elif name == "bias" and module is router:
                bias = module, name
    return bias, correction


class Gate:
    """The next layer's router applied to this layer's rows (Eliseev and Mazur, 2023; Fate, 2025): a residual stream
    changes little from one layer to the next. How likely a place in that ranking is right is counted as it goes, by
    layer and place, for one token and for several apart. Says nothing about the layer that follows the last."""

    def __init__(self, routers: Sequence[Router | None]) -> None:
        self._routers = routers
        self._right: dict[tuple[int, bool], NDArray[np.float64]] = {}  # (layer, one token) -> by place, right and told
        self._told: dict[tuple[int, int], tuple[bool, NDArray[np.int64]]] = {}  # (thread, layer) -> the last ranking

    def start(self) -> None:
        pass

    def came(self, layer: int, experts: NDArray[np.int32]) -> None:
        one, rank = self._told.pop((threading.get_ident(), layer), (False, None))
        if rank is None:
            return
        count = self._right[layer, one]
        places = count.shape[1]
        foreseen = rank < places
        told = np.bincount(rank[foreseen], minlength=places)
        right = np.bincount(rank[experts[foreseen[experts]]], minlength=places)
        count *= _FADE
        count += right / np.maximum(told, 1), told > 0

    def guess(self, layer: int, rows: Tensor, expert_ids: Tensor) -> Guess | None:
        to = layer + 1
        router = self._routers[to] if to < len(self._routers) else None
        if router is None or not len(rows):
            return None
        with torch.no_grad():
            scores = router.scores(rows)
        most = min(_RANKS * expert_ids.shape[1], scores.shape[1])
        key = to, len(rows) == 1
        count = self._right.get(key)
        if count is None or count.shape[1] != most:
            count = self._right[key] = np.array([np.ones(most), np.full(most, 2.0)])
        rank = ranks(scores, most)
        self._told[threading.get_ident(), to] = len(rows) == 1, rank
        return to, np.append(count[0] / count[1], 0.0)[rank].astype(np.float32)


class Path:
    """A predictor by expert ids alone (placement/caching/predict.py); each thread's text is followed by a twin of its
    own. After the last layer it foresees the first of the next token."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self._twins: dict[int, Predictor] = {}

    def start(self) -> None:
        self._twin().start()

    def came(self, layer: int, experts: NDArray[np.int32]) -> None:
        pass

    def guess(self, layer: int, rows: Tensor, expert_ids: Tensor) -> Guess | None:
        if not len(expert_ids):
            return None
        twin, to = self._twin(), (layer + 1) % self._predictor.shape[0]
        twin.observe(layer, expert_ids.cpu().numpy())
        return to, twin.scores(to)

    def _twin(self) -> Predictor:
        me = threading.get_ident()
        if me not in self._twins:
            self._twins[me] = self._predictor.twin()
        return self._twins[me]


def foresight_of(prefetch: object, model: nn.Module, found: Found, trace: Trace | None) -> Foresight | None:
    """What `headgate.offload` calls `prefetch`, for the experts modules `found` in `model`; None: nothing is foreseen.

    Raises ValueError where there is no such way, where it needs a `trace` and gets none, or where a Predictor is of
    another [L, E].
    """
    if prefetch is None:
        return None
    if prefetch == "gate":
        routers = [
            router_of(model, name, len(form.weights(module)["w_down"]), form.width(module)) if name else None
            for name, module, form in found
        ]
        return Gate(routers)
    if prefetch == "path":
        if trace is None:
            raise ValueError("offload: trace must be given for prefetch='path', which learns from it, got None")
        prefetch = fit(trace)
    if not isinstance(prefetch, Predictor):
        raise ValueError(
            f"offload: prefetch must be one of {', '.join(PREFETCH)}, a Predictor or None, got {prefetch!r}"
        )
    shape = len(found), max(len(form.weights(module)["w_down"]) for _, module, form in found)
    if prefetch.shape != shape:
        raise ValueError(f"offload: prefetch must be of [L, E] = {shape}, got a predictor of {prefetch.shape}")
    return Path(prefetch)
