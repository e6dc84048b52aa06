"""What to keep: eviction policies by name.

A policy keeps `value` [L, E] up to date, the worth of keeping each expert; the cache gives up the resident with the
lowest. It is arrays (State) and one compiled function, `advance` (step.py), which sees every step before victims are
chosen, so that the simulator and a live model run the same code.

| file | holds |
|---|---|
| state.py, step.py | what a policy is made of; `advance`, with a branch for each |
| recency.py | policies that look back: how long ago, how often |
| layers.py | policies that know the order of layers |
| foresight.py | values that foretell the next use, learning as they go |
| learned.py | the same with what a trace has taught them, kept in files |
| taught.py | policies that look up what a trace has taught |
"""

from __future__ import annotations

from collections.abc import Callable

from ..names import NEED_TRACE
from .layers import layer, ring
from .learned import Learned, adaptive, learned
from .recency import lfru, lfu, lfu_cached, lru, random
from .state import BELADY, Setting, State, options, state
from .taught import affinity, sequence, static, statistics

POLICIES: dict[str, Callable[[Setting], State]] = {
    "lru": lru,
    "lfu": lfu,
    "lfu-cached": lfu_cached,
    "lfru": lfru,
    "layer": layer,
    "ring": ring,
    "random": random,
    "static": static,
    "statistics": statistics,
    "sequence": sequence,
    "affinity": affinity,
    "adaptive": adaptive,
    "learned": learned,
}


def policy(name: str, setting: Setting) -> State:
    """The named policy at its beginning. Raises ValueError for an unknown name or option, or for one that needs a trace
    without."""
    if name not in POLICIES:
        raise ValueError(f"policy: name must be one of {', '.join(POLICIES)}, got {name!r}")
    return POLICIES[name](setting)


def belady(setting: Setting) -> State:
    """Belady's optimum: the value is the step of the next use, negative. Only a simulator knows it and writes it."""
    options("belady", setting)
    return state(BELADY, setting, frank=True)


__all__ = ["NEED_TRACE", "POLICIES", "Learned", "Setting", "State", "belady", "policy", "state"]
