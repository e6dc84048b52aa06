"""Policies that know the order of layers: how soon each layer reuses its experts, and whose turn comes next."""

from __future__ import annotations

import numpy as np

from ...compiled import njit
from .recency import TIE
from .state import LAYER, RING, Setting, State, options, state

AGES = 48  # classes of ages: 1 .. 15 each, then four to a factor of two, and the last: never used yet


def layer(setting: Setting) -> State:
    """How likely an expert is used at its layer's next turn: the share of experts of its layer and age (steps of the
    layer since the last use) that were, counted as it goes. Layers that reuse soon keep more of a shared pool."""
    options("layer", setting)
    found = state(LAYER, setting, memory=1, notes=np.zeros((2 * setting.layers, AGES)))
    found.memory[0] = np.inf
    return found


@njit
def _class_of(age):
    if age < 16:
        return int(age)
    if age == np.inf:
        return AGES - 1
    return min(16 + int(4 * np.log2(age / 16)), AGES - 2)


@njit
def layer_step(policy, layer, ids):
    layers, experts = policy.value.shape
    ages, seen, used = policy.memory[0, layer], policy.notes[layer], policy.notes[layers + layer]
    for e in range(experts):
        ages[e] += 1
        seen[_class_of(ages[e])] += 1
    for e in ids:
        used[_class_of(ages[e])] += 1
        ages[e] = 0
    for e in range(experts):
        c = _class_of(ages[e] + 1)
        policy.value[layer, e] = (used[c] + 0.5) / (seen[c] + 1)


def ring(setting: Setting) -> State:
    """A ring of layers (SE-MoE): those whose turn comes last go first; inside a layer, the least recently used."""
    options("ring", setting)
    return state(RING, setting, memory=1)


@njit
def ring_step(policy, layer, ids, now):
    layers, experts = policy.value.shape
    last = policy.memory[0]
    for e in ids:
        last[layer, e] = now
    for l in range(layers):
        away = (l - layer - 1) % layers + 1
        for e in range(experts):
            policy.value[l, e] = TIE * last[l, e] - away
