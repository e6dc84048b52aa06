"""Policies that look back: how long ago, how often, or both. None needs a trace."""

from __future__ import annotations

import numpy as np

from ...compiled import njit
from .state import LFRU, LFU, LFU_CACHED, LRU, RANDOM, Setting, State, options, state

# Of equally frequent experts the one used later is worth more: a step weighs less than any difference of counts.
TIE = 2.0**-40


def lru(setting: Setting) -> State:
    """Least recently used: the value is the number of the last step that used it."""
    options("lru", setting)
    return state(LRU, setting)


@njit
def lru_step(policy, layer, ids, now):
    for e in ids:
        policy.value[layer, e] = now


def lfu(setting: Setting) -> State:
    """Least frequently used: the value is the number of steps that used it, of equal ones the last. Option `decay`:
    what a use still counts after one more step of its layer; 1: the same for ever."""
    found = options("lfu", setting, decay=1.0)
    if not 0 < found["decay"] <= 1:
        raise ValueError(f"policy: decay of lfu must be above 0 and at most 1, got {found['decay']}")
    return state(LFU, setting, numbers=(found["decay"],), memory=1)


@njit
def lfu_step(policy, layer, ids, now):
    decay, counts, value = policy.numbers[0], policy.memory[0], policy.value
    if decay < 1:
        for e in range(counts.shape[1]):
            counts[layer, e] *= decay
            value[layer, e] *= decay
    for e in ids:
        counts[layer, e] += 1
        value[layer, e] = counts[layer, e] + TIE * now


def lfu_cached(setting: Setting) -> State:
    """Uses counted only while the expert stands in the cache, and anew in each sequence: what MoE-Infinity's code does
    (`incache_visit_count`), with the reset that it intends."""
    options("lfu-cached", setting)
    return state(LFU_CACHED, setting)


@njit
def lfu_cached_step(policy, layer, ids, now):
    for e in ids:
        policy.value[layer, e] = np.floor(policy.value[layer, e]) + 1 + TIE * now


def lfru(setting: Setting) -> State:
    """Frequency over recency (the idea of vLLM's pull request 37190): uses, over 4 plus the layer's steps since the
    last one. With less than 4, a single use just now outweighs many a little longer ago."""
    options("lfru", setting)
    return state(LFRU, setting, memory=2)


@njit
def lfru_step(policy, layer, ids, now):
    counts, last, value = policy.memory[0], policy.memory[1], policy.value
    layers, experts = value.shape
    for e in ids:
        counts[layer, e] += 1
        last[layer, e] = now
    for e in range(experts):
        value[layer, e] = counts[layer, e] / ((now - last[layer, e]) / layers + 4)


def random(setting: Setting) -> State:
    """Values by chance, drawn anew at each use: what any policy must beat. Option `seed`."""
    found = options("random", setting, seed=0.0)
    return state(RANDOM, setting, notes=np.array([[found["seed"]]]))


@njit
def random_step(policy, layer, ids):
    """A linear congruence modulo 2**31 - 1 (Park and Miller, 1988), exact in floats."""
    for e in ids:
        policy.notes[0, 0] = (policy.notes[0, 0] * 48271.0 + 11.0) % 2147483647.0
        policy.value[layer, e] = policy.notes[0, 0]
