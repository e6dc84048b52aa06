"""What an engine counts: accesses, and how long copies and computation took, alone and at once."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch

Span = tuple[float, float]
_Events = tuple[torch.cuda.Event, torch.cuda.Event]
_MANY = 256


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
    steps waited `wait_s`; something was copied `copy_s`, computed `compute_s`, both at once `both_s`. Where a GPU
    copies by itself the last three are by its clock, without what the host computes; `wait_s` is the host's time."""

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
    """Seconds of the wall clock in which something was copied, something was computed, or both. On a GPU computation
    counts here while it is handed over, not while it runs."""

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

    def end_computing(self, begun: None = None) -> None:
        self._turn(0, -1)

    def seconds(self) -> tuple[float, float, float]:
        """(copying, computing, both at once) so far."""
        self._turn(0, 0)
        return self._copy_s, self._compute_s, self._both_s


class DeviceTiming:
    """The same by a GPU's own clock: when it does what is handed over between two marks on the current stream, which on
    a GPU that waits for the host includes the handing over."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._lock = device, threading.Lock()
        self._running: tuple[deque[_Events], deque[_Events]] = deque(), deque()  # copies, computations
        self._over: list[list[Span]] = [[], []]  # of those what has ended, as far as it has not been summed
        self._ended = [0.0, 0.0]  # the last end seen
        self._sums = [0.0, 0.0, 0.0]
        self._origin, self._origin_s = self._mark(), 0.0

    def _mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    @contextmanager
    def copying(self) -> Iterator[None]:
        begin = self._mark()
        yield
        self._add(0, begin)

    def begin_computing(self) -> torch.cuda.Event:
        return self._mark()

    def end_computing(self, begun: torch.cuda.Event) -> None:
        self._add(1, begun)

    def _add(self, kind: int, begin: torch.cuda.Event) -> None:
        with self._lock:
            self._running[kind].append((begin, self._mark()))
            if len(self._running[kind]) > _MANY:  # nobody may ever ask
                self._look()

    def seconds(self) -> tuple[float, float, float]:
        """(copying, computing, both at once) of what is over."""
        with self._lock:
            self._look()
            more = _times(*self._over)
            return self._sums[0] + more[0], self._sums[1] + more[1], self._sums[2] + more[2]

    def _look(self) -> None:
        """Notes what has ended, and sums up the time of which all is known: that before the last end of a kind of which
        more is running. Times count from the last end seen: a float holds no hours to the microsecond."""
        known = math.inf
        for kind, running in enumerate(self._running):
            while running and running[0][1].query():
                begin, end = running.popleft()
                begin_s = self._origin_s + self._origin.elapsed_time(begin) / 1e3
                self._over[kind].append((begin_s, begin_s + begin.elapsed_time(end) / 1e3))
                self._origin, self._origin_s = end, self._over[kind][-1][1]
                self._ended[kind] = max(self._ended[kind], self._origin_s)
            if running:
                known = min(known, self._ended[kind])
        before = [[(a, min(b, known)) for a, b in spans if a < known] for spans in self._over]
        self._over = [[(max(a, known), b) for a, b in spans if b > known] for spans in self._over]
        self._sums = [s + more for s, more in zip(self._sums, _times(*before), strict=True)]


def _times(copies: Sequence[Span], computations: Sequence[Span]) -> tuple[float, float, float]:
    a, b = merged(copies), merged(computations)
    return length(a), length(b), common(a, b)


def merged(spans: Sequence[Span]) -> list[Span]:
    """The same time in spans that do not touch, rising."""
    out: list[Span] = []
    for begin, end in sorted(spans):
        if out and begin <= out[-1][1]:
            out[-1] = out[-1][0], max(out[-1][1], end)
        else:
            out.append((begin, end))
    return out


def common(a: Sequence[Span], b: Sequence[Span]) -> float:
    """Time in both, each `merged`."""
    i, j, total = 0, 0, 0.0
    while i < len(a) and j < len(b):
        total += max(0.0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return total


def length(spans: Sequence[Span]) -> float:
    return sum(end - begin for begin, end in spans)
