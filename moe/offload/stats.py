"""What an engine counts: accesses, and how long copies and computation took, alone and at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple


class Access(NamedTuple):
    """One decision of the cache, in order. `how`: "hit" or "miss" of a step, or "host", computed there without a slot;
    "ahead" or (there already) "kept" of a prefetch; `gone`: layer * E + expert that was displaced, -1: nobody; `step`
    counts steps and prefetches.
    """

    step: int
    layer: int
    expert: int
    how: str
    gone: int


@dataclass(frozen=True)
class Stats:
    """What an engine has done so far. Experts: `hits` of `accesses`, others of them computed by the `host`; `loads`
    copied in, `ahead` of them ordered by prefetches, of which steps have `used` some. Seconds of the wall clock:
    steps waited `wait_s`; something was copied `copy_s`, computed `compute_s`, both at once `both_s`."""

    accesses: int
    hits: int
    host: int
    loads: int
    ahead: int
    used: int
    bytes: int
    wait_s: float
    copy_s: float
    compute_s: float
    both_s: float
    restarts: int

    @property
    def overlap(self) -> float:
        """Share of the shorter of copying and computing that went on beside the other."""
        shorter = min(self.copy_s, self.compute_s)
        return self.both_s / shorter if shorter else 0.0


class Timing:
    """Seconds of the wall clock in which something was copied, something was computed, or both. On CUDA devices
    computation counts while it is handed over, not while it runs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._copies = self._computations = 0
        self._last = time.perf_counter()
        self._copy_s = self._compute_s = self._both_s = 0.0

    def _turn(self, copies: int, computations: int) -> None:
        with self._lock:
            now = time.perf_counter()
            passed, self._last = now - self._last, now
            self._copy_s += passed * (self._copies > 0)
            self._compute_s += passed * (self._computations > 0)
            self._both_s += passed * (self._copies > 0 and self._computations > 0)
            self._copies += copies
            self._computations += computations

    @contextmanager
    def copying(self) -> Iterator[None]:
        self._turn(1, 0)
        try:
            yield
        finally:
            self._turn(-1, 0)

    def begin_computing(self) -> None:
        self._turn(0, 1)

    def end_computing(self) -> None:
        self._turn(0, -1)

    def seconds(self) -> tuple[float, float, float]:
        """(copying, computing, both at once) so far."""
        self._turn(0, 0)
        return self._copy_s, self._compute_s, self._both_s
