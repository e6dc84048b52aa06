"""Which experts to fetch ahead: those whose expected gain is worth their bytes.

Fetching expert e in place of v before a step, where e is needed with chance p and v with chance q, saves p - q loads in
front of the step and costs 1 - p + q bytes more than fetching on demand (in loads: one now; p fewer then; q more). With
`price` for a load's bytes, in loads waited for, it is admitted where

    p - q > price * (1 - p + q),    that is    p - q > price / (1 + price).

v is whom the policy would give up first among those for whom this holds; a free slot has q = 0. At a price of 1 a load
fetched in vain costs as much as one waited for: on a link that is never idle nothing is lost by fetching ahead. Where
it is idle while a layer computes, bytes cost less, but only as many loads as it has `room` for are hidden: the n-th is
late by n - room of its time, gains less if right and holds up others if wrong, so that p - q must be above that, too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..compiled import njit
from ..traces.trace import Trace
from .cache import Ahead, Cache, put, serve
from .policies.step import new_sequence
from .predict import Predictor
from .predictors.fitting import beginnings, ids_of


@njit
def _cheapest(table, policy, chance, most, pool):
    """The slot to take for an expert ahead: a free one, else that of the lowest value among experts with a chance below
    `most`; -1: there is none. What the step in hand uses stays, and so does what was fetched ahead or is as likely."""
    experts = table.slot_of.shape[1]
    best = -1
    for s in range(table.first[pool], table.first[pool + 1]):
        if table.busy[s] or table.step[s] == table.clock[0]:
            continue
        h = table.holder[s]
        if h < 0:
            return s
        l, e = h // experts, h % experts
        if table.promised[l, e] or chance[l, e] >= most:
            continue
        v, b = policy.value[l, e], table.holder[best] if best >= 0 else h
        low = policy.value[b // experts, b % experts]
        if best < 0 or v < low or (v == low and h < b):
            best = s
    return best


@njit
def admit(table, policy, layer, chance, margin, room, who, slot, gone):
    """Fetches experts ahead of the next step of `layer` by chance [L, E], likeliest first (of equal ones, the lowest),
    where p - q is above `margin`. Fills `who`, `slot`, `gone` [E] as Ahead has them; returns how many."""
    order = np.argsort(-chance[layer], kind="mergesort")
    n = 0
    for e in order:
        least = max(margin, min(n + 1 - room, 1.0))
        if chance[layer, e] <= least:
            break
        if table.slot_of[layer, e] >= 0:
            table.promised[layer, e] = True
            continue
        s = _cheapest(table, policy, chance, chance[layer, e] - least, table.pool[layer, e])
        if s >= 0:
            who[n], slot[n], gone[n] = e, s, put(table, policy, s, layer, e)
            table.promised[layer, e] = True
            n += 1
    return n


def _margin(price: float, room: float) -> float:
    for name, value in (("price", price), ("room", room)):
        if not value >= 0:
            raise ValueError(f"prefetch: {name} must be a number and not negative, got {value}")
    return price / (1 + price) if price < np.inf else 1.0


def prefetch(cache: Cache, layer: int, chance: NDArray[np.floating], price: float = 1.0, room: float = np.inf) -> Ahead:
    """Fetches ahead of the next step of `layer` what is worth its bytes; see above.

    chance  [L, E]: how likely the next step of each layer needs each expert. Rows of other layers matter where layers
            share slots; what was told last is good enough
    price   of a load's bytes, in loads waited for, not negative
    room    how many loads the link can take until the step, not negative

    Raises ValueError naming argument, rule and value.
    """
    chance = np.ascontiguousarray(chance, np.float32)
    if chance.shape != cache.table.slot_of.shape:
        raise ValueError(f"prefetch: chance must be [L, E] = {cache.table.slot_of.shape}, got {chance.shape}")
    if not 0 <= layer < len(chance):
        raise ValueError(f"prefetch: layer must be 0 .. {len(chance) - 1}, got {layer}")
    margin = _margin(price, room)
    experts = chance.shape[1]
    who, slot, gone = np.empty(experts, np.int32), np.empty(experts, np.int32), np.empty(experts, np.int64)
    n = admit(cache.table, cache.policy, layer, chance, margin, float(room), who, slot, gone)
    return Ahead(who[:n], slot[:n], gone[:n])


def needed(chance: NDArray[np.float32], tokens: int) -> NDArray[np.float32]:
    """The chance that any of `tokens` tokens uses an expert, each with `chance`, as if they chose by themselves."""
    return 1 - (1 - chance) ** tokens


class Prefetcher:
    """A predictor that fetches ahead for a cache: `fetch(layer)` before the layer's step, `observe(layer, ids)` after
    its router. As the cache, not safe for threads.

    >>> from .cache import Cache
    >>> from .pools import per_layer
    >>> from .policies import Setting, policy
    >>> from .predict import fit
    >>> ids = np.tile(np.array([[0], [1]], np.uint8), (2, 8, 1))               # two layers; experts 0, 1, 0, 1, ..
    >>> cache = Cache(per_layer(2, 2, 1), policy("lru", Setting(2, 2, 2)))
    >>> ahead = Prefetcher(cache, fit(Trace(ids, num_experts=2)), price=0.5)
    >>> ahead.observe(0, [1])
    >>> ahead.fetch(1).experts
    array([1], dtype=int32)
    """

    def __init__(self, cache: Cache, predictor: Predictor, price: float = 1.0, room: float = np.inf) -> None:
        shape = cache.table.slot_of.shape
        if predictor.shape != shape:
            raise ValueError(f"Prefetcher: predictor must be for [L, E] = {shape}, got {predictor.shape}")
        self.cache, self.predictor, self.price, self.room = cache, predictor, price, room
        self._chance = np.zeros(shape, np.float32)

    def start(self) -> None:
        """A sequence begins."""
        self.predictor.start()

    def observe(self, layer: int, ids) -> None:
        """What the tokens of a pass use at `layer`, ids [K] or [T, K]."""
        self.predictor.observe(layer, ids)

    def fetch(self, layer: int, tokens: int = 1) -> Ahead:
        """Fetches ahead of the next step of `layer`, of so many tokens."""
        self._chance[layer] = needed(self.predictor.scores(layer), tokens)
        return prefetch(self.cache, layer, self._chance, self.price, self.room)


@dataclass(frozen=True)
class Served:
    """What a trace met: of `accesses` experts asked for, `hits` were there; `fetched` were loaded ahead; `waited` is
    the time that steps stood still, in units of a step's own time."""

    accesses: int
    hits: int
    fetched: int
    steps: int
    waited: float

    @property
    def hit_rate(self) -> float:
        return self.hits / max(self.accesses, 1)

    @property
    def loads(self) -> int:
        """Ahead and on demand."""
        return self.accesses - self.hits + self.fetched


def serve_trace(
    cache: Cache,
    trace: Trace,
    chance: NDArray[np.float32] | None,
    *,
    price: float = 1.0,
    room: float = np.inf,
    load: float = 0.0,
) -> Served:
    """Serves a trace token by token, with fetches ahead of each step by chance [L, T, E] (of `foretell`), or without
    any (None). The cache goes on from where it is.

    Time is a model of one link and one device: a step computes for 1 once all its experts are there; a load takes
    `load` of that; the link takes one load at a time, in the order in which they were asked for, none is called back.
    Fetches ahead of a step are asked for when the step before it begins to compute.
    """
    shape = (*trace.shape[:2], trace.num_experts)
    if chance is not None and np.shape(chance) != shape:
        raise ValueError(f"serve_trace: chance must be [L, T, E] = {shape}, got {np.shape(chance)}")
    told = np.zeros((shape[0], 0, shape[2]), np.float32) if chance is None else chance
    ids, margin = ids_of(trace), _margin(price, room)
    accesses, hits, fetched, waited = _serve(
        cache.table, cache.policy, ids, beginnings(trace), told, margin, float(room), float(load)
    )
    return Served(accesses, hits, fetched, ids.shape[0] * ids.shape[1], waited)


@njit
def _serve(table, policy, ids, first, told, margin, room, load):
    layers, experts = table.slot_of.shape
    chance, ready = np.zeros((layers, experts), np.float32), np.zeros((layers, experts))
    who, order = np.empty(experts, np.int32), np.empty(experts, np.int32)
    slot, wave = np.empty(experts, np.int32), np.empty(experts, np.int32)
    gone = np.empty(experts, np.int64)
    accesses, hits, fetched = 0, 0, 0
    now, link, waited = 0.0, 0.0, 0.0  # `now`: the step before begins to compute
    for t in range(ids.shape[1]):
        if first[t]:
            new_sequence(policy)
        for layer in range(layers):
            if told.shape[1]:
                chance[layer] = told[layer, t]
                n = admit(table, policy, layer, chance, margin, room, who, slot, gone)
                for i in range(n):
                    link = max(link, now) + load
                    ready[layer, who[i]] = link
                fetched += n
            now += 1
            needs = np.unique(ids[layer, t])
            needs = needs[needs >= 0]
            there = serve(table, policy, layer, needs, needs, order, slot, gone, wave)
            begin = now
            for i in range(len(needs)):
                if i >= there:
                    link = max(link, now) + load
                    ready[layer, order[i]] = link
                begin = max(begin, ready[layer, order[i]])
            waited += begin - now
            now = begin
            hits += there
            accesses += len(needs)
    return accesses, hits, fetched, waited
