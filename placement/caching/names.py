"""The names of the eviction policies, for those who offer them: policies/, which says what they do, takes numba."""

from __future__ import annotations

NAMES = (
    *("lru", "lfu", "lfu-cached", "lfru", "layer", "ring", "random"),
    *("static", "statistics", "sequence", "affinity", "adaptive", "learned"),
)
NEED_TRACE = ("static", "statistics", "sequence", "affinity", "learned")  # to learn from; the others start from nothing
