"""A middle tier: a cache in host memory of experts that lie further down."""

from __future__ import annotations

import errno
import threading
from collections.abc import Mapping

import torch
from torch import Tensor

from ...placement.caching.cache import Cache
from ...placement.caching.policies import Setting
from ...placement.caching.policies import policy as start_policy
from ...placement.traces.trace import Trace
from .arena import Arena, plan_slots
from .host import Store, fill
from .loads import LOOK_S


class HostCache:
    """A Store over a slower `store`: what was read from it stands in host memory that a `budget` pays for, page-locked
    where there is a CUDA device. Its accesses are the misses of the cache above; `policy`, `scope`, `trace` and
    `options` are its own, as an Engine's are."""

    def __init__(
        self,
        store: Store,
        budget: str | int | float,
        *,
        policy: str = "lru",
        scope: str = "shared",
        trace: Trace | None = None,
        options: Mapping[str, float] | None = None,
    ) -> None:
        layout = plan_slots(store.layers, budget, 1, scope)
        shape = layout.places.of.shape
        setting = Setting(shape[0], shape[1], layout.places.slots, trace, options or {})
        self.layers, self.store, self.places = store.layers, store, layout.places
        self.cache = Cache(layout.places, start_policy(policy, setting))
        self.arena = Arena(layout.kinds, layout.slots, "cpu", pinned=torch.cuda.is_available())
        self.hits, self.loads, self.closed = 0, 0, False
        self._free = threading.Condition()
        self._filling = [threading.Lock() for _ in range(layout.places.slots)]
        self._holds: list[tuple[int, int] | None] = [None] * layout.places.slots  # whose bytes are there, whole

    def read(self, layer: int, expert: int, into: Mapping[str, Tensor]) -> None:
        """See Store. Waits while other reads hold every slot."""
        if self.closed:
            raise OSError(errno.EBADF, "the cache of offloaded experts is closed")
        key, busy = (layer, expert), self.cache.table.busy
        with self._free:
            while not self.cache.ready(layer, [expert]):
                self._free.wait(LOOK_S)
            step = self.cache.step(layer, [expert])
            slot = int(step.slots[0])
            self.hits += step.hits
            busy[slot] += 1
        try:
            parts = self.arena.slot(slot)
            with self._filling[slot]:
                if self._holds[slot] != key:
                    self._holds[slot] = None
                    self.store.read(layer, expert, parts)
                    self._holds[slot] = key
                    self.loads += 1
            fill(into, parts)
        finally:
            with self._free:
                busy[slot] -= 1
                if self._holds[slot] != key:
                    self.cache.lose(layer, expert)
                self._free.notify_all()

    def whole(self, layer: int) -> dict[str, Tensor]:
        return self.store.whole(layer)

    def close(self) -> None:
        self.closed = True
        self.store.close()
        self.arena.close()
