"""Loads that a placement has to stand, beside the trace's own: those of its domains, or of the kinds of text in it.

A load that is even over a whole trace can be far from it on each of its parts, and traffic is never the whole trace. A
plan that keeps the worst of the parts even has no two experts on one GPU that are busy at the same time, and stands a
domain that it has not seen better than one that knows the mean alone.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2

from .affinity import expert_load
from .statistics import loads_of
from .trace import Trace

MOST = 20_000_000  # shares that kinds of text are told by: k-means then takes seconds
RUN = 32  # tokens of a sequence that are about one thing: whole sequences would be too few, and too alike


def scenario_loads(trace: Trace, scenarios: int | NDArray[np.integer] | None, seed: int = 0) -> NDArray[np.float64]:
    """float64 [1 + Q, L, E]: the load of all tokens and of each scenario, each layer adding up to 1 (0 if unused).

    `scenarios`: labels [T], 0 .. Q - 1, such as a token's domain; or a number Q >= 2: runs of 32 tokens of a sequence
    fall into at most so many kinds by which experts they use (k-means of their shares). None or 1: no scenario. The
    load of a scenario of few tokens is drawn towards that of all: n tokens count n to E.

    Raises ValueError naming the rule.
    """
    tokens = trace.shape[1]
    whole = _shares(expert_load(trace)[None])
    if scenarios is None or (np.ndim(scenarios) == 0 and scenarios == 1) or not tokens:
        return whole
    labels = _kinds(trace, scenarios, seed) if np.ndim(scenarios) == 0 else np.asarray(scenarios)
    counts = loads_of(trace, labels)
    weight = np.bincount(labels, minlength=len(counts))[:, None, None]
    drawn = (counts / np.maximum(weight, 1)) * weight + whole * trace.num_experts * counts.sum((0, 2))[:, None] / tokens
    return np.concatenate([whole, _shares(drawn[weight[:, 0, 0] > 0])])


def _kinds(trace: Trace, number: object, seed: int) -> NDArray[np.int64]:
    if not hasattr(number, "__index__") or int(number) < 1:  # type: ignore[call-overload]
        raise ValueError(f"scenarios: must be labels [T] or a number of at least 1, got {number!r}")
    tokens = trace.shape[1]
    at = np.arange(tokens)
    starts = at == 0 if trace.sequence is None else np.diff(trace.sequence, prepend=trace.sequence[0] - 1) != 0
    since = at - np.maximum.accumulate(np.where(starts, at, 0))
    part = np.cumsum(since % RUN == 0) - 1
    every = -(-(part[-1] + 1) * trace.shape[0] * trace.num_experts // MOST)  # of so many layers, one is looked at
    some = replace(trace, expert_ids=trace.expert_ids[::every], weights=None, layer_names=(), experts_of_layer=None)
    loads = _shares(loads_of(some, part)).reshape(part.max() + 1, -1)
    count = min(int(number), len(np.unique(loads, axis=0)))  # type: ignore[call-overload]
    if count < 2:
        return np.zeros(tokens, np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a kind may end up empty
        _, kind = kmeans2(np.sqrt(loads), count, iter=25, minit="++", rng=seed, missing="warn")
    return np.unique(kind, return_inverse=True)[1][part]


def _shares(loads: NDArray) -> NDArray[np.float64]:
    total = loads.sum(-1, keepdims=True)
    return np.divide(loads, total, out=np.zeros(loads.shape), where=total > 0)
