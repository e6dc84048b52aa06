"""Predictors and prefetching, measured on a trace: recall, chances that come true, hits against bytes, waiting."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...placement.caching.cache import Cache
from ...placement.caching.policies import Setting, policy
from ...placement.caching.pools import per_layer
from ...placement.caching.predict import Predictor, fit, foretell, recall, reliability
from ...placement.caching.prefetch import Served, serve_trace
from ...placement.traces.trace import Trace

PARTS = ("recall", "ahead", "curve", "waiting")
METHODS = ("popular", "transition", "ridge", "path")
PRICES = (0.5, 1.0, 2.0)
LOADS = (0.25, 1.0, 4.0)


def measure(
    train: Trace,
    test: Trace,
    slots: tuple[int, ...] = (16, 8),
    policies: tuple[str, ...] = ("lru", "adaptive"),
    parts: tuple[str, ...] = PARTS,
) -> dict[str, Any]:
    """All fitted on `train` and judged on `test`: `recall` of each method, `ahead` by two and three layers, `curve` of
    hit rate and loads by price, `waiting` by load time. `parts` picks among them."""
    chance = foretell(fit(train), test) if {"curve", "waiting"} & set(parts) else np.empty(0)
    made: dict[str, Callable[[], Any]] = {
        "recall": lambda: {method: recalled(train, test, method) for method in METHODS},
        "ahead": lambda: {str(horizon): recalled(train, test, "path", horizon) for horizon in (2, 3)},
        "curve": lambda: [r for name in policies for size in slots for r in curve(train, test, chance, size, name)],
        "waiting": lambda: [row for size in slots for row in waiting(train, test, chance, size)],
    }
    return {part: made[part]() for part in parts}


def recalled(train: Trace, test: Trace, method: str, horizon: int = 1) -> dict[str, Any]:
    """Recall at K and 2K fetched: the mean of layers that have one `horizon` before them, of all layers, and by layer;
    the largest and the mean distance of chances from what came true; bytes; CPU seconds of fitting; microseconds of a
    live step (`scores` and `observe`, each the median of all steps of some tokens)."""
    start = time.process_time()
    predictor = fit(train, method, horizon=horizon)
    fit_s = time.process_time() - start
    chance = foretell(predictor, test)
    k = test.shape[2]
    by_layer = recall(chance, test, (k, 2 * k))
    table = reliability(chance, test)
    gap, weight = np.abs(table[:, 1] - table[:, 2]), table[:, 0] / table[:, 0].sum()
    return {
        "from_layers": by_layer[:, horizon:].mean(1).tolist(),
        "all_layers": by_layer.mean(1).tolist(),
        "by_layer": by_layer.tolist(),
        "calibration_largest": float(gap[weight > 1e-4].max()),
        "calibration_mean": float((gap * weight).sum()),
        "bytes": predictor.bytes,
        "fit_cpu_s": fit_s,
        "step_us": step_us(predictor, test),
    }


def step_us(predictor: Predictor, trace: Trace, tokens: int = 40) -> list[float]:
    """Microseconds of `scores` and of `observe`, the medians over the steps of some tokens."""
    live, ids = predictor.twin(), trace.expert_ids[:, :tokens].astype(np.int32)
    spent: tuple[list[int], list[int]] = ([], [])
    for t in range(ids.shape[1]):
        for layer in range(len(ids)):
            begin = time.perf_counter_ns()
            live.scores(layer)
            between = time.perf_counter_ns()
            live.observe(layer, ids[layer, t])
            spent[0].append(between - begin)
            spent[1].append(time.perf_counter_ns() - between)
    return [float(np.median(part)) / 1e3 for part in spent]


def served(train: Trace, test: Trace, chance: NDArray | None, slots: int, name: str = "lru", **rules: float) -> Served:
    """The test trace through an empty cache of `slots` a layer, under the named policy."""
    layers, experts = test.shape[0], test.num_experts
    places = per_layer(layers, experts, slots)
    cache = Cache(places, policy(name, Setting(layers, experts, places.slots, train)))
    return serve_trace(cache, test, chance, **rules)


def curve(train: Trace, test: Trace, chance: NDArray, slots: int, name: str) -> list[dict[str, Any]]:
    """Hit rate, and loads over those of LRU that fetches nothing ahead, without prefetching and by price."""
    base = served(train, test, None, slots).loads
    rows = []
    for price in (None, *PRICES):
        one = served(train, test, None if price is None else chance, slots, name, price=price or 0.0)
        rows.append(
            {"policy": name, "slots": slots, "price": price, "hit_rate": one.hit_rate, "loads": one.loads / base}
        )
    return rows


def waiting(train: Trace, test: Trace, chance: NDArray, slots: int) -> list[dict[str, Any]]:
    """Time that LRU's steps stand still with prefetching over that without, by a load's time in units of a step's and
    by price; the link's room is what one step hides."""
    rows = []
    for load in LOADS:
        alone = served(train, test, None, slots, load=load).waited
        shares = {
            str(price): served(train, test, chance, slots, price=price, room=1 / load, load=load).waited / alone
            for price in (0.0, *PRICES)
        }
        rows.append({"slots": slots, "load": load, "waiting": shares})
    return rows


def by_sequence(trace: Trace) -> tuple[Trace, Trace]:
    """Two parts of whole sequences, one by one in turn. Raises ValueError for a trace of one sequence."""
    if trace.sequence is None or len(np.unique(trace.sequence)) < 2:
        raise ValueError("by_sequence: trace must have two sequences or more, got one")
    _, number = np.unique(trace.sequence, return_inverse=True)
    return trace.select(number % 2 == 0), trace.select(number % 2 == 1)
