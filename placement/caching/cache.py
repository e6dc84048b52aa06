"""Which experts stand in a cache of slots: decided step by step, by one piece of code for simulator and live model.

A step is a layer's turn in a forward pass: the distinct experts that its tokens need. The policy takes notice of it,
what is there is a hit, and each miss takes a free slot or that of the resident with the lowest value that this step
does not need (of equal ones, the lowest layer, then the lowest expert). Decisions are taken when they are asked for; an
expert on its way counts as there, so that nothing depends on how fast copies are.

Where a step needs more experts than there are slots it is served in waves: first what is there and as many misses, by
rising number, as find a slot; then the rest, over slots of waves before. A policy whose values can be believed (State's
`frank`) has its misses served by rising value, each in the slot of the lowest of all: what this step has just used
goes, in a wave of its own, if it is worth less than what waits for later steps, so that few slots are not filled with
what passes by.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..compiled import njit
from .policies import State
from .policies.step import advance, evicted, new_sequence
from .pools import Pools


class Table(NamedTuple):
    """Who stands where, as compiled code reads it."""

    pool: NDArray[np.int32]  # [L, E]
    first: NDArray[np.int32]  # [P + 1]
    slot_of: NDArray[np.int32]  # [L, E], -1: not here
    holder: NDArray[np.int64]  # [S], layer * E + expert, -1: free
    wave: NDArray[np.int64]  # [S], the wave that a slot last served
    step: NDArray[np.int64]  # [S], the step that a slot last served
    busy: NDArray[np.int32]  # [S], how many others hold on to it
    promised: NDArray[np.bool_]  # [L, E], fetched ahead of a step that has not come yet
    clock: NDArray[np.int64]  # [2]: steps, waves


def empty(places: Pools) -> Table:
    """Nobody stands anywhere."""
    shape, slots = places.of.shape, places.slots
    return Table(
        places.of,
        places.first,
        np.full(shape, -1, np.int32),
        np.full(slots, -1, np.int64),
        np.full(slots, -1, np.int64),
        np.full(slots, -1, np.int64),
        np.zeros(slots, np.int32),
        np.zeros(shape, np.bool_),
        np.zeros(2, np.int64),
    )


@njit
def victim(table, policy, pool, ahead):
    """The slot to take in `pool`: a free one, else the cheapest that may go; -1: there is none. For a fetch `ahead`
    what the step in hand uses must stay, and so must what was fetched ahead before; a miss takes the latter last. What
    the wave in hand uses must stay for a miss, unless the policy is frank; of equals it goes last."""
    values, promised = policy.value.reshape(-1), table.promised.reshape(-1)
    best, lowest, kept, used = -1, 0.0, False, False
    for s in range(table.first[pool], table.first[pool + 1]):
        if table.busy[s]:
            continue
        h = table.holder[s]
        if h < 0:
            return s
        keep, v, now = promised[h], values[h], table.step[s] == table.clock[0]
        if (keep or now) if ahead else (table.wave[s] == table.clock[1] and not policy.frank):
            continue
        better = best < 0 or keep < kept
        if not better and keep == kept:
            better = v < lowest or (v == lowest and (now < used or (now == used and h < table.holder[best])))
        if better:
            best, lowest, kept, used = s, v, keep, now
    return best


@njit
def put(table, policy, slot, layer, e):
    """Expert e takes `slot`; returns who was there (layer * E + expert) or -1."""
    experts = table.slot_of.shape[1]
    old = table.holder[slot]
    if old >= 0:
        table.slot_of[old // experts, old % experts] = -1
        table.promised[old // experts, old % experts] = False
        evicted(policy, old // experts, old % experts)
    table.holder[slot] = layer * experts + e
    table.slot_of[layer, e] = slot
    return old


@njit
def serve(table, policy, layer, needs, ids, order, slot, gone, wave):
    """One step, which `needs` experts and is served `ids` of them here, both rising. Fills `order` (ids as they are
    served), their `slot`, who was `gone` for them (layer * E + expert, -1: nobody, -2: it was a hit) and their `wave`;
    returns the number of hits."""
    table.clock[0] += 1
    table.clock[1] += 1
    advance(policy, layer, needs, table.clock[0])
    hits = 0
    for e in ids:
        s = table.slot_of[layer, e]
        if s >= 0:
            table.wave[s], table.step[s] = table.clock[1], table.clock[0]
            order[hits], slot[hits], gone[hits], wave[hits] = e, s, -2, 0
            hits += 1
    table.promised[layer] = False
    n = hits
    for e in ids:
        if table.slot_of[layer, e] < 0:
            order[n] = e
            n += 1
    if policy.frank:  # the least worth first: the next may take its slot
        _by_worth(order[hits:n], policy.value[layer])
    now = 0
    for i in range(hits, n):
        e = order[i]
        s = victim(table, policy, table.pool[layer, e], False)
        if s < 0 or table.wave[s] == table.clock[1]:  # this wave needs it, or all of them: the next may take it
            table.clock[1] += 1
            now += 1
        if s < 0:
            s = victim(table, policy, table.pool[layer, e], False)
        slot[i], gone[i], wave[i] = s, put(table, policy, s, layer, e), now
        table.wave[s], table.step[s] = table.clock[1], table.clock[0]
    return hits


@njit
def _by_worth(experts, worth):
    """Sorts a few experts by their worth, rising, those of equal worth as they stand."""
    for i in range(1, len(experts)):
        e, at = experts[i], i
        while at > 0 and worth[experts[at - 1]] > worth[e]:
            experts[at] = experts[at - 1]
            at -= 1
        experts[at] = e


@njit
def fetch_ahead(table, policy, layer, ids, worth, most, slot, gone):
    """Experts `ids` of a step to come, in this order, where they are not there yet and `worth` more than who must go,
    `most` of them; what is there is kept. Fills `slot` (-1: not fetched) and `gone`; returns how many are fetched."""
    experts, n = table.slot_of.shape[1], 0
    for i in range(len(ids)):
        e = ids[i]
        slot[i], gone[i] = -1, -1
        if table.slot_of[layer, e] >= 0:
            table.promised[layer, e] = True
            continue
        if n == most:
            continue
        s = victim(table, policy, table.pool[layer, e], True)
        if s < 0:
            continue
        h = table.holder[s]
        if h >= 0 and policy.value[h // experts, h % experts] >= worth[i]:
            continue
        slot[i], gone[i] = s, put(table, policy, s, layer, e)
        table.promised[layer, e] = True
        n += 1
    return n


@dataclass(frozen=True)
class Step:
    """How one step is served; arrays [n] in the order of service, hits first."""

    experts: NDArray[np.int32]
    slots: NDArray[np.int32]
    gone: NDArray[np.int64]  # layer * E + expert that each displaced; -1: none; -2: a hit
    waves: NDArray[np.int32]
    hits: int


@dataclass(frozen=True)
class Ahead:
    """What is fetched ahead: experts, their slots, and whom they displaced (layer * E + expert, -1: nobody)."""

    experts: NDArray[np.int32]
    slots: NDArray[np.int32]
    gone: NDArray[np.int64]


class Cache:
    """A cache of slots at work. Not safe for threads: the caller holds a lock.

    >>> cache = Cache(per_layer(layers=1, experts=4, slots=2), policy("lru", Setting(1, 4, 2)))
    >>> cache.step(0, [0, 1]).hits, cache.step(0, [1, 2]).hits, cache.step(0, [0, 2]).experts.tolist()
    (0, 1, [2, 0])
    """

    def __init__(self, places: Pools, policy: State) -> None:
        shape = places.of.shape
        if policy.value.shape != shape:
            raise ValueError(f"Cache: policy must be for [L, E] = {shape}, got {policy.value.shape}")
        self.policy = policy
        self.table = empty(places)

    def step(self, layer: int, ids, apart=()) -> Step:
        """Serves the experts `ids` of `layer`, distinct and rising, but for those of them that are computed `apart`,
        without a slot: of these the policy takes notice, and nothing else changes.

        Raises ValueError where they are not, or where others hold every slot of a pool that must take a miss: `ready`
        says so beforehand.
        """
        needs = ids = np.ascontiguousarray(ids, np.int32)
        self._check(layer, ids)
        if (ids[1:] <= ids[:-1]).any():
            raise ValueError(f"Cache: ids must be distinct and rising, got {ids.tolist()}")
        if len(apart):
            ids = needs[~np.isin(needs, apart)]
            if len(ids) + len(apart) != len(needs):
                raise ValueError(f"Cache: apart must be some of ids {needs.tolist()}, got {np.asarray(apart).tolist()}")
        if not self.ready(layer, ids):
            raise ValueError("Cache: a pool must have a slot that nobody holds, got none for a miss")
        n = len(ids)
        order, slot, wave = (np.empty(n, np.int32) for _ in range(3))
        gone = np.empty(n, np.int64)
        hits = serve(self.table, self.policy, layer, needs, ids, order, slot, gone, wave)
        return Step(order, slot, gone, wave, hits)

    def ready(self, layer: int, ids) -> bool:
        """Whether a step can be served now: every pool with a miss has a slot that nobody holds."""
        table = self.table
        if not table.busy.any():
            return True
        missing = [e for e in ids if table.slot_of[layer, e] < 0]
        return all(
            (table.busy[table.first[p] : table.first[p + 1]] == 0).any()
            for p in {int(table.pool[layer, e]) for e in missing}
        )

    def prefetch(self, layer: int, ids, worth=None, most: int | None = None) -> Ahead:
        """Fetches experts ahead of the next step of `layer`: `ids` in the order of their importance, each where it is
        worth more than the value of the one that must go (None: always), `most` of them (None: all). What the last step
        served stays, and so does what is fetched ahead, or was there, until its layer has had its step."""
        ids = np.ascontiguousarray(ids, np.int32)
        self._check(layer, ids)
        worth = np.full(len(ids), np.inf) if worth is None else np.ascontiguousarray(worth, np.float64)
        if worth.shape != ids.shape:
            raise ValueError(f"Cache: worth must have one number for each of {len(ids)} ids, got {worth.shape}")
        slot, gone = np.empty(len(ids), np.int32), np.empty(len(ids), np.int64)
        fetch_ahead(self.table, self.policy, layer, ids, worth, len(ids) if most is None else most, slot, gone)
        taken = slot >= 0
        return Ahead(ids[taken], slot[taken], gone[taken])

    def new_sequence(self) -> None:
        """Tells the policy that another sequence begins."""
        new_sequence(self.policy)

    def lose(self, layer: int, expert: int) -> None:
        """Empties the slot of an expert that could not be fetched; nothing where it is not there."""
        slot = self.table.slot_of[layer, expert]
        if slot >= 0:
            self.table.holder[slot] = self.table.slot_of[layer, expert] = -1
            self.table.promised[layer, expert] = False
            evicted(self.policy, layer, expert)

    def _check(self, layer: int, ids: NDArray[np.int32]) -> None:
        layers, experts = self.table.slot_of.shape
        if not 0 <= layer < layers:
            raise ValueError(f"Cache: layer must be 0 .. {layers - 1}, got {layer}")
        if ids.ndim != 1 or (len(ids) and (ids.min() < 0 or ids.max() >= experts)):
            raise ValueError(f"Cache: ids must be [n], 0 .. {experts - 1}, got {ids.tolist()}")
