"""What every policy does when a step comes: one compiled function with a branch for each."""

from __future__ import annotations

from ...compiled import njit
from .foresight import foresight_step
from .layers import layer_step, ring_step
from .recency import lfru_step, lfu_cached_step, lfu_step, lru_step, random_step
from .state import AFFINITY, LAYER, LEARNED, LFRU, LFU, LFU_CACHED, LRU, RANDOM, RING, SEQUENCE, STATISTICS
from .taught import affinity_step, sequence_begins, sequence_step, statistics_step

# (policy: State, layer, ids [n] distinct and rising, now: the number of the step)


@njit
def advance(policy, layer, ids, now):
    """Takes notice of a step, before victims are chosen: brings policy.value up to date."""
    kind = policy.kind
    if kind == LRU:
        lru_step(policy, layer, ids, now)
    elif kind == LFU:
        lfu_step(policy, layer, ids, now)
    elif kind == LFU_CACHED:
        lfu_cached_step(policy, layer, ids, now)
    elif kind == LFRU:
        lfru_step(policy, layer, ids, now)
    elif kind == SEQUENCE:
        sequence_step(policy, layer, ids)
    elif kind == LAYER:
        layer_step(policy, layer, ids)
    elif kind == AFFINITY:
        affinity_step(policy, layer, ids)
    elif kind == STATISTICS:
        statistics_step(policy, layer)
    elif kind == RING:
        ring_step(policy, layer, ids, now)
    elif kind == LEARNED:
        foresight_step(policy, layer, ids)
    elif kind == RANDOM:
        random_step(policy, layer, ids)


@njit
def evicted(policy, layer, expert):
    """Takes notice of an expert that has left."""
    if policy.kind == LFU_CACHED:
        policy.value[layer, expert] %= 1  # the count goes, the order of last uses stays


@njit
def new_sequence(policy):
    """Takes notice that another sequence begins."""
    if policy.kind == LFU_CACHED:
        policy.value[:] %= 1
    elif policy.kind == SEQUENCE:
        sequence_begins(policy)
