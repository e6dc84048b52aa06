"""What every policy does when a step comes: one compiled function with a branch for each."""

from __future__ import annotations

import numba

from . import LRU

# (policy: State, layer, ids [n] distinct and rising, now: the number of the step)


@numba.njit(cache=True)
def advance(policy, layer, ids, now):
    """Takes notice of a step, before victims are chosen: brings policy.value up to date."""
    if policy.kind == LRU:
        for e in ids:
            policy.value[layer, e] = now


@numba.njit(cache=True)
def evicted(policy, layer, expert):
    """Takes notice of an expert that has left."""


@numba.njit(cache=True)
def new_sequence(policy):
    """Takes notice that another sequence begins."""
