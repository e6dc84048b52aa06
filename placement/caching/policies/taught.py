"""Policies that look up what a trace has taught: hot sets, sequences seen before, who follows whom."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...compiled import njit
from ...traces.trace import Trace
from .state import AFFINITY, SEQUENCE, STATIC, STATISTICS, Setting, State, learned_from, options, state

LIBRARY = 128  # sequences at most


def loads(trace: Trace) -> NDArray[np.float64]:
    """The share of its tokens that chose each expert, [L, E]."""
    layers, tokens, _ = trace.shape
    found = np.empty((layers, trace.num_experts))
    for layer in range(layers):
        ids = trace.expert_ids[layer]
        found[layer] = np.bincount(ids[ids != trace.none], minlength=trace.num_experts)
    return found / max(tokens, 1)


def static(setting: Setting) -> State:
    """The hot set of a trace: the value is the share of its tokens that chose an expert, and never changes."""
    options("static", setting)
    found = state(STATIC, setting)
    found.value[:] = loads(learned_from("static", setting))
    return found


def statistics(setting: Setting) -> State:
    """Frequency in a trace, over the number of layers until the expert's turn comes (EdgeMoE: activation frequency
    and the order of layers together)."""
    options("statistics", setting)
    return state(STATISTICS, setting, tables=loads(learned_from("statistics", setting))[None])


@njit
def statistics_step(policy, layer):
    layers, experts = policy.value.shape
    for l in range(layers):
        away = (l - layer - 1) % layers + 1
        for e in range(experts):
            policy.value[l, e] = policy.tables[0, l, e] / away


def sequence(setting: Setting) -> State:
    """What the most similar sequence of a trace did (MoE-Infinity): a sequence is a matrix of counts [L, E], similar by
    the cosine of its layers' rows, averaged; the value is the expert's share of its row, in the nearest sequence and in
    this one so far, times 1 - layer / L. A trace longer than 128 sequences gives 128, evenly spaced. Option `own`: the
    weight of this sequence."""
    found = options("sequence", setting, own=0.5)
    if not 0 <= found["own"] <= 1:
        raise ValueError(f"policy: own of sequence must be 0 .. 1, got {found['own']}")
    trace = learned_from("sequence", setting)
    if trace.sequence is None or not trace.shape[1]:
        raise ValueError("policy: the trace of sequence must say where its sequences are, got none")
    names = np.unique(trace.sequence)
    names = names[np.linspace(0, len(names) - 1, min(LIBRARY, len(names))).astype(int)]
    library = np.stack([loads(trace.select(trace.sequence == name)) for name in names])
    library /= np.maximum(library.sum(2, keepdims=True), 1e-12)
    layers = setting.layers
    # a row for each sequence of the library, and one for this: [products with this, a layer each | norms | similarity]
    notes = np.zeros((len(names) + 1, 2 * layers + 1))
    notes[:-1, layers:-1] = np.sqrt((library**2).sum(2))
    return state(SEQUENCE, setting, numbers=(found["own"],), tables=library, memory=1, notes=notes)


@njit
def sequence_step(policy, layer, ids):
    library, counts, notes, own = policy.tables, policy.memory[0], policy.notes, policy.numbers[0]
    layers, experts = policy.value.shape
    size, mine = len(library), notes[len(library)]
    old = mine[layer]
    for e in ids:
        mine[layer] += 2 * counts[layer, e] + 1  # of the squared norm
        mine[layers + layer] += 1
        counts[layer, e] += 1
    best = 0
    for q in range(size):
        before = notes[q, layer]
        for e in ids:
            notes[q, layer] += library[q, layer, e]
        norm = notes[q, layers + layer]
        if norm > 0 and mine[layer] > 0:
            notes[q, 2 * layers] += notes[q, layer] / (norm * np.sqrt(mine[layer]))
            if old > 0:
                notes[q, 2 * layers] -= before / (norm * np.sqrt(old))
        if notes[q, 2 * layers] > notes[best, 2 * layers]:
            best = q
    total = max(mine[layers + layer], 1.0)
    for e in range(experts):
        share = (1 - own) * library[best, layer, e] + own * counts[layer, e] / total
        policy.value[layer, e] = share * (1 - layer / layers)


@njit
def sequence_begins(policy):
    layers, size = len(policy.value), len(policy.tables)
    policy.memory[0] = 0
    policy.notes[:, :layers] = 0
    policy.notes[:, 2 * layers] = 0
    policy.notes[size, :] = 0


def affinity(setting: Setting) -> State:
    """Who follows whom: the expected use of each expert given those of the layer before (the first layer: of the last
    layer, one token before), averaged over tokens with weights that fade by option `decay`."""
    found = options("affinity", setting, decay=0.9)
    if not 0 <= found["decay"] < 1:
        raise ValueError(f"policy: decay of affinity must be 0 or more and below 1, got {found['decay']}")
    tables = transitions(learned_from("affinity", setting))
    return state(AFFINITY, setting, numbers=(found["decay"],), tables=tables)


def transitions(trace: Trace) -> NDArray[np.float64]:
    """[L, E, E]: how likely a token that chose a in the layer before l chooses b in l, at [l, a, b]. Before the first
    layer comes the last one, of the token before."""
    layers, tokens, _ = trace.shape
    experts, none = trace.num_experts, trace.none
    found = np.zeros((layers, experts, experts))
    uses = np.zeros((layers, experts))
    for layer in range(layers):
        late = 1 if layer == 0 else 0
        before, after = trace.expert_ids[layer - 1, : tokens - late], trace.expert_ids[layer, late:]
        for k in range(trace.shape[2]):
            live = before[:, k] != none
            uses[layer] += np.bincount(before[live, k], minlength=experts)
            for j in range(trace.shape[2]):
                both = live & (after[:, j] != none)
                pair = before[both, k].astype(np.int64) * experts + after[both, j]
                found[layer] += np.bincount(pair, minlength=experts**2).reshape(experts, experts)
    prior = loads(trace)[:, None, :]  # as if each had been seen once more, with the usual followers
    return (found + prior) / (uses[:, :, None] + 1)


@njit
def affinity_step(policy, layer, ids):
    layers, experts = policy.value.shape
    after, decay = (layer + 1) % layers, policy.numbers[0]
    if not len(ids):
        return
    for f in range(experts):
        expected = 0.0
        for e in ids:
            expected += policy.tables[after, e, f]
        policy.value[after, f] = decay * policy.value[after, f] + (1 - decay) * expected / len(ids)
