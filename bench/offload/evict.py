"""Eviction without prefetch, measured on a trace: hit rates, and how much of the way from LRU to Belady they go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from time import process_time

import numpy as np
from numpy.typing import NDArray

from ...placement.caching.policies import Learned, Setting
from ...placement.caching.simulate import simulate
from ...placement.caching.steps import Steps, steps_of
from ...placement.traces.trace import Trace

SLOTS = (8, 12, 16, 32)
RIVALS = ("lru", "lfru", "lfu-cached", "belady")


def measure(
    train: Trace,
    test: Trace,
    domains: tuple[NDArray, NDArray] | None = None,
    slots: Sequence[int] = SLOTS,
    seed: int = 0,
) -> dict[int, dict[str, float]]:
    """By slots a layer, hit rates on `test` one token at a time, the cache empty at first: of RIVALS; `adaptive`, which
    starts from nothing; `learned`, taught by `train`; and the shares of the gap from LRU to Belady that are closed,
    `lfru_gap`, `lfu-cached_gap`, `adaptive_gap`, `learned_gap`. `us`: processor microseconds that adaptive's step takes
    beyond LRU's.

    Where nothing can be foretold, `test` in random order, as shares of that gap: `shuffled_lfru`, `shuffled` (adaptive)
    and `shuffled_bare` without the guard. What false teaching costs: `renamed`, taught by `train` with the experts of
    every layer renamed at random, and `renamed_bare` without the guard. With `domains`, the domain [T] of each token of
    both, `crossed`: taught by one domain and judged on another, `crossed_bare` without the guard, `home`: taught by its
    own, `crossed_adaptive`: taught by none; means over ordered pairs of domains.
    """
    steps, lie = steps_of(test), renamed(train, seed)
    found: dict[int, dict[str, float]] = {}
    for each in slots:
        rates = {name: simulate(steps, name, each).hit_rate for name in RIVALS}
        start = process_time()
        simulate(steps, "lru", each)
        middle = process_time()
        rates["adaptive"] = simulate(steps, "adaptive", each).hit_rate
        spent = (process_time() - middle) - (middle - start)
        rates["us"] = 1e6 * spent / max(len(steps), 1)
        rates["learned"] = judged(taught(train, each), steps, each)
        for name in ("lfru", "lfu-cached", "adaptive", "learned"):
            rates[f"{name}_gap"] = closed(rates[name], rates)
        lied = taught(lie, each)
        rates["renamed"] = closed(judged(lied, steps, each), rates)
        rates["renamed_bare"] = closed(judged(lied, steps, each, guard=0), rates)
        rates |= shuffled(test, each, seed)
        if domains is not None:
            rates |= crossed(train, test, domains, each)
        found[each] = rates
    return found


def closed(rate: float, rates: dict[str, float]) -> float:
    """The share of the gap from LRU's hit rate to Belady's; 0 where there is none."""
    gap = rates["belady"] - rates["lru"]
    return (rate - rates["lru"]) / gap if gap else 0.0


def shuffled(test: Trace, slots: int, seed: int = 0) -> dict[str, float]:
    """`measure`'s figures of tokens in random order."""
    steps = steps_of(replace(test, sequence=None).select(np.random.default_rng(seed).permutation(test.shape[1])))
    rates = {name: simulate(steps, name, slots).hit_rate for name in ("lru", "lfru", "adaptive", "belady")}
    rates["bare"] = simulate(steps, "adaptive", slots, options={"guard": 0}).hit_rate
    names = {"shuffled_lfru": "lfru", "shuffled": "adaptive", "shuffled_bare": "bare"}
    return {name: closed(rates[of], rates) for name, of in names.items()}


def crossed(train: Trace, test: Trace, domains: tuple[NDArray, NDArray], slots: int) -> dict[str, float]:
    """`measure`'s figures of teaching by another domain."""
    known = {one: taught(train.select(domains[0] == one), slots) for one in np.unique(domains[0])}
    sums: dict[str, list[float]] = {}
    for own in np.unique(domains[1]):
        steps = steps_of(test.select(domains[1] == own))
        rates = {name: simulate(steps, name, slots).hit_rate for name in ("lru", "adaptive", "belady")}
        sums.setdefault("crossed_adaptive", []).append(closed(rates["adaptive"], rates))
        for other, what in known.items():
            if other == own:
                sums.setdefault("home", []).append(closed(judged(what, steps, slots), rates))
                continue
            sums.setdefault("crossed", []).append(closed(judged(what, steps, slots), rates))
            sums.setdefault("crossed_bare", []).append(closed(judged(what, steps, slots, guard=0), rates))
    return {name: float(np.mean(each)) for name, each in sums.items()}


def renamed(trace: Trace, seed: int = 0) -> Trace:
    """The trace with each layer's experts renamed at random: a model that it says nothing about."""
    rng = np.random.default_rng(seed)
    ids = trace.expert_ids.copy()
    for layer in range(trace.shape[0]):
        names = np.arange(trace.none + 1, dtype=ids.dtype)
        names[: trace.num_experts] = rng.permutation(trace.num_experts)
        ids[layer] = names[ids[layer]]
    return replace(trace, expert_ids=ids, experts_of_layer=None)


def taught(trace: Trace, slots: int) -> Learned:
    """What a trace teaches for `slots` a layer."""
    return Learned.fit(trace, slots * trace.shape[0])


def judged(known: Learned, steps: Steps, slots: int, **options: float) -> float:
    """The hit rate on `steps` of a policy that begins with what is known."""
    setting = Setting(steps.layers, steps.experts, slots * steps.layers, options=options)
    return simulate(steps, known.begin(setting), slots).hit_rate
