"""What to keep: eviction policies by name.

A policy keeps `value` [L, E] up to date, the worth of keeping each expert; the cache gives up the resident with the
lowest. It is arrays (State) and one compiled function, `advance`, which sees every step before victims are chosen, so
that the simulator and a live model run the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..trace import Trace

LRU = 0


class State(NamedTuple):
    """A policy at work, as compiled code reads it."""

    kind: int  # which branch of step.advance
    numbers: NDArray[np.float64]  # [*] parameters
    tables: NDArray[np.float32]  # [A, B, C] what was learned beforehand; not changed
    memory: NDArray[np.float64]  # [M, L, E] what it remembers
    value: NDArray[np.float64]  # [L, E] the worth of keeping each expert


@dataclass(frozen=True)
class Setting:
    """What a policy may know when it begins: sizes, the slots of the cache in all, and a trace to learn from."""

    layers: int
    experts: int
    slots: int
    trace: Trace | None = None
    options: Mapping[str, float] = field(default_factory=dict)


def state(
    kind: int,
    setting: Setting,
    *,
    numbers: tuple[float, ...] = (),
    tables: NDArray[np.float32] | None = None,
    memory: int = 0,
) -> State:
    """A State that has seen nothing: `memory` tables [L, E] of zeros, all values zero."""
    shape = (setting.layers, setting.experts)
    return State(
        kind,
        np.array(numbers, np.float64),
        np.zeros((0, 0, 0), np.float32) if tables is None else np.ascontiguousarray(tables, np.float32),
        np.zeros((memory, *shape)),
        np.zeros(shape),
    )


def lru(setting: Setting) -> State:
    """Least recently used: the value is the number of the last step that used it."""
    return state(LRU, setting)


POLICIES: dict[str, Callable[[Setting], State]] = {
    "lru": lru,
}


def policy(name: str, setting: Setting) -> State:
    """The named policy at its beginning. Raises ValueError for an unknown name, or one that needs a trace without."""
    if name not in POLICIES:
        raise ValueError(f"policy: name must be one of {', '.join(POLICIES)}, got {name!r}")
    return POLICIES[name](setting)
