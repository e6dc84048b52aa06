"""How placements are found: a name, a function of a Problem and a Run, and what it has proved on the way, if anything."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .balance import balance
from .copies import improve_copies
from .eplb import eplb
from .ilp import ilp
from .placement import Placement
from .problem import Problem
from .replicate import replicate
from .search import search
from .simple import linear, random
from .state import from_slots, to_slots

EXACT = 130  # binaries up to which HiGHS, too, is asked: beyond, it proves nothing in a minute


@dataclass
class Run:
    """What a method may spend, and whom it tells. `interrupted`: an event that Ctrl-C sets."""

    deadline: float
    interrupted: Any
    seed: int
    effort: float
    start: Placement | None
    say: Callable[[str], None]

    def stop(self) -> bool:
        """Whether it is time to hand over what there is."""
        return self.interrupted.is_set() or time.perf_counter() > self.deadline

    def proposals(self, usual: int) -> int:
        return max(1, round(usual * self.effort))


@dataclass(frozen=True)
class Proof:
    """A score that no placement of the problem is below, and whether the answer is the best there is."""

    score: float
    proved: bool


Found = tuple[NDArray[np.integer], Proof | None]
