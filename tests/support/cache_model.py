"""The cache and its policies written out in plain Python, with dictionaries: what the compiled code must agree with."""

from __future__ import annotations

import math
from collections import defaultdict


class Model:
    """The rules of placement/caching/cache.py. `value(layer, e)` gives the worth of a resident, `saw(layer, ids, now)`
    takes notice of a step, `left(layer, e)` of an expert that has gone."""

    def __init__(self, pool_of, slots, saw, value, left=lambda layer, e: None, frank=False):
        self.frank, self.pool_of = frank, pool_of
        self.saw, self.value, self.left = saw, value, left
        self.free, first = [], 0
        for n in slots:
            self.free.append(list(range(first, first + n)))
            first += n
        self.where: dict[tuple[int, int], int] = {}
        self.promised: set[tuple[int, int]] = set()
        self.held: set[int] = set()  # slots that others hold
        self.of_step: set[tuple[int, int]] = set()
        self.now = 0

    def step(self, layer, ids, apart=()):
        """Returns [(expert, slot, gone, wave)] and the number of hits."""
        self.now += 1
        self.saw(layer, list(ids), self.now)
        ids = [e for e in ids if e not in apart]
        present = [e for e in ids if (layer, e) in self.where]
        self.promised = {key for key in self.promised if key[0] != layer}
        self.of_step = {(layer, e) for e in ids}
        served = [(e, self.where[layer, e], -2, 0) for e in present]
        in_wave, wave = {(layer, e) for e in present}, 0
        missing = [e for e in ids if e not in present]
        if self.frank:
            missing.sort(key=lambda e: self.value(layer, e))
        for e in missing:
            pool = self.pool_of[layer][e]
            slot, gone = self.take(pool, set() if self.frank else in_wave, spare_promised=False)
            if slot is None or divmod(gone, len(self.pool_of[0])) in in_wave:
                wave, in_wave = wave + 1, set()
            if slot is None:
                slot, gone = self.take(pool, in_wave, spare_promised=False)
            self.where[layer, e] = slot
            in_wave.add((layer, e))
            served.append((e, slot, gone, wave))
        return served, len(present)

    def prefetch(self, layer, ids, worth, most):
        fetched = []
        for e, w in zip(ids, worth, strict=True):
            if (layer, e) in self.where:
                self.promised.add((layer, e))
            elif len(fetched) < most:
                slot, gone = self.take(self.pool_of[layer][e], self.of_step, spare_promised=True, below=w)
                if slot is not None:
                    self.where[layer, e] = slot
                    self.promised.add((layer, e))
                    fetched.append((e, slot, gone))
        return fetched

    def take(self, pool, must_stay, spare_promised, below=math.inf):
        """A slot of the pool, and who had to go."""
        for slot in self.free[pool]:
            if slot not in self.held:
                self.free[pool].remove(slot)
                return slot, -1
        may_go = [
            key
            for key, slot in self.where.items()
            if self.pool_of[key[0]][key[1]] == pool and slot not in self.held and key not in must_stay
        ]
        if spare_promised:
            may_go = [key for key in may_go if key not in self.promised]
        if not may_go:
            return None, None
        key = min(may_go, key=lambda key: (key in self.promised, self.value(*key), key in self.of_step, key))
        if spare_promised and below != math.inf and not below > self.value(*key):
            return None, None
        self.promised.discard(key)
        self.left(*key)
        return self.where.pop(key), key[0] * len(self.pool_of[0]) + key[1]


def rules(name, layers, experts):
    """(saw, value, left, begins) of a policy that needs no trace."""
    uses, last, cached = defaultdict(int), {}, defaultdict(int)
    turns, history = defaultdict(int), defaultdict(list)

    def saw(layer, ids, now):
        turns[layer] += 1
        for e in ids:
            uses[layer, e] += 1
            cached[layer, e] += 1
            last[layer, e] = now
            history[layer, e].append(turns[layer])
        saw.at, saw.now[layer] = layer, now

    saw.at, saw.now = 0, defaultdict(int)

    def begins():
        cached.clear()

    def value(layer, e):
        key = (layer, e)
        if name == "lru":
            return last.get(key, 0)
        if name in ("lfu", "lfu frank"):
            return (uses[key], last.get(key, 0))
        if name == "lfu decayed":  # 0.5 a step of the layer
            if not history[key]:
                return 0.0
            at = history[key][-1]  # of equally frequent ones the last
            return 0.5 ** (turns[layer] - at) * (
                sum(0.5 ** (at - turn) for turn in history[key]) + 2.0**-40 * last[key]
            )
        if name == "lfu-cached":
            return (cached[key], last.get(key, 0))
        if name == "lfru":  # as of the layer's last step
            return uses[key] / ((saw.now[layer] - last.get(key, 0)) / layers + 4) if uses[key] else 0.0
        if name == "ring":
            return (-((layer - saw.at - 1) % layers + 1), last.get(key, 0))
        raise KeyError(name)

    def left(layer, e):
        cached[layer, e] = 0

    return saw, value, left, begins
