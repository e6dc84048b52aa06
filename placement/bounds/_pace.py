"""Whether a piece of work that nothing can interrupt still fits before a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

# seconds for one unit of work, before a piece has been timed: about twice what a core takes for large ones
FIRST_s = {
    "counts": 2e-8,
    "eigenvalues": 3e-10,
    "singular values": 5e-10,
    "partners": 2e-7,
    "sdp": 3e-10,
}


@dataclass
class Pace:
    """A deadline on a clock, how long the last piece of each kind took, and which kinds there was no time for."""

    deadline: float = float("inf")
    clock: Callable[[], float] = time.perf_counter
    unit_s: dict[str, float] = field(default_factory=lambda: dict(FIRST_s))
    missed: set[str] = field(default_factory=set)

    @property
    def left_s(self) -> float:
        return max(0.0, self.deadline - self.clock())

    def share(self, parts: int) -> Pace:
        """The same, with one of so many parts of the time that is left."""
        return Pace(self.clock() + self.left_s / parts, self.clock, self.unit_s, self.missed)

    def fits(self, kind: str, work: float) -> bool:
        """Whether `work` units would end in time."""
        fits = work * self.unit_s[kind] <= self.left_s
        if not fits:
            self.missed.add(kind)
        return fits

    @contextmanager
    def timed(self, kind: str, work: float) -> Iterator[None]:
        """Around a piece of `work` units."""
        start = self.clock()
        yield
        self.unit_s[kind] = max((self.clock() - start) / max(work, 1.0), 1e-15)
