"""The inner loops of exact.py: placements judged by walking all tokens, with the very loops of `walk`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..compiled import njit
from ..walk import _choose, _count, _crossings, _move
from .token_loops import _uniform

SAME = 1e-9  # loads this near are equally far above what is wished for


class Walked(NamedTuple):
    """What a walk needs to know of a problem, and what its counts are worth.

    ids       uint16 [L, T, K], `none` for no expert; home  int32 [T]; experts  E
    after     float64 [L-1, E, E]: transition counts where the rules foretell, else [0, E, E]
    share     float64 [Q, L, E]: loads that replicas share evenly;  own: whether the walk's own load counts too
    used      bool [L]: layers that have any load;  pace  float64 [G]: one over the speed
    weight    float64 [5]: of a transition that crosses GPUs, or nodes; of a row that leaves its GPU, or node; of the
              mean of the layers' loads;  most: the load that is wished for at most
    rule      the replicas' number in REPLICA;  move  the home's in HOME
    pin       int32 [L, E]: the GPU that an expert must be on, or -1;  grouped: experts stay on their node
    """

    ids: NDArray
    none: int
    home: NDArray
    experts: int
    gpu_of_slot: NDArray
    node_of_gpu: NDArray
    after: NDArray
    share: NDArray
    own: bool
    used: NDArray
    pace: NDArray
    weight: NDArray
    most: float
    rule: int
    move: int
    pin: NDArray
    grouped: bool


class Track(NamedTuple):
    """A walk of one placement: at  int32 [L+1, T], homes before each layer; on  int32 [L+1, T, K], the choices' GPUs in
    the layer before; rest, load  float64 [L]: each layer's crossings and rows, weighed, and its load."""

    at: NDArray
    on: NDArray
    rest: NDArray
    load: NDArray


@njit
def track(w):
    layers, tokens, top_k = w.ids.shape
    at, on = np.zeros((layers + 1, tokens), np.int32), np.full((layers + 1, tokens, top_k), -1, np.int32)
    at[0] = w.home
    return Track(at, on, np.zeros(layers), np.zeros(layers))


@njit
def _foretold(w, slots, layer):
    """[E, G] of `Foretold`, for a layer, with the next layer's slots."""
    counts = w.after[layer]
    found, many = np.zeros((w.experts, len(w.node_of_gpu))), np.zeros(w.experts)
    for e in range(w.experts):
        many[e] = max(1.0, counts[e].sum())
        for s in range(len(slots)):
            found[e, w.gpu_of_slot[s]] += counts[e, slots[s]]
        found[e] /= many[e]
    return found


@njit
def _by_expert(slots, experts):
    """The slots by expert, GPUs rising, and where each expert's begin [E+1]."""
    first, order, n = np.zeros(experts + 1, np.int32), np.empty(len(slots), np.int32), 0
    for e in range(experts):
        first[e] = n
        for s in range(len(slots)):
            if slots[s] == e:
                order[n] = s
                n += 1
    first[experts] = n
    return first, order


@njit
def step(w, slots, layer, t):
    """Walks one layer of slots [L, S] into the track t."""
    ids, gpus = w.ids[layer], len(w.node_of_gpu)
    first, order = _by_expert(slots[layer], w.experts)
    none_told = np.zeros((0, gpus))
    tell = none_told
    if len(w.after) > layer:
        tell = _foretold(w, slots[layer + 1], layer)
    at, on, then = t.at[layer], t.on[layer + 1], t.at[layer + 1]
    picked, turns = np.full(ids.shape, -1, np.int32), np.zeros((gpus, w.experts), np.int64)
    _choose(ids, w.none, first, order, w.gpu_of_slot, w.node_of_gpu, at, t.on[layer], w.rule, tell, turns, picked)
    for i in range(on.shape[0]):
        for k in range(on.shape[1]):
            on[i, k] = w.gpu_of_slot[picked[i, k]] if picked[i, k] >= 0 else -1
    then[:] = at
    if w.move > 0:
        _move(ids, on, tell if w.move == 2 else none_told, then)
    t.rest[layer], t.load[layer] = _weighed(w, layer, t.on[layer], on, at, then, slots[layer])


@njit
def _weighed(w, layer, before, on, at, then, slots):
    gpus, nodes, found, worst = len(w.node_of_gpu), w.node_of_gpu.max() + 1, 0.0, 0.0
    load, rows, back = np.zeros(gpus, np.int64), np.zeros((gpus, gpus), np.int64), np.zeros((gpus, gpus), np.int64)
    node_rows, node_back = np.zeros((gpus, nodes), np.int64), np.zeros((nodes, gpus), np.int64)
    _count(on, at, then, w.node_of_gpu, load, rows, node_rows, back, node_back)
    for g in range(gpus):
        for h in range(gpus):
            if g != h:
                found += w.weight[2] * (rows[g, h] + back[g, h])
        for n in range(nodes):
            if n != w.node_of_gpu[g]:
                found += w.weight[3] * (node_rows[g, n] + node_back[n, g])
    if layer > 0 and (w.weight[0] > 0 or w.weight[1] > 0):
        _, gpu, node = _crossings(before, on, w.node_of_gpu)
        found += w.weight[0] * gpu + w.weight[1] * node
    if not w.used[layer]:
        return found, 0.0
    if w.own:
        total = max(1, load.sum())
        for g in range(gpus):
            worst = max(worst, load[g] * w.pace[g] * gpus / total)
    copies = np.zeros(w.experts)
    for e in slots:
        copies[e] += 1
    for q in range(len(w.share)):
        shared = np.zeros(gpus)
        for s in range(len(slots)):
            shared[w.gpu_of_slot[s]] += w.share[q, layer, slots[s]] / copies[slots[s]]
        worst = max(worst, (shared * w.pace).max() * gpus)
    return found, worst


@njit
def rank(w, t, layers):
    """(load beyond what is wished for, score) of the first layers of a track."""
    used = w.used.sum()
    load = t.load[:layers].sum() / used if used else 1.0
    return max(0.0, load - w.most), t.rest[:layers].sum() + w.weight[4] * load


@njit
def better(a, b):
    return a[0] < b[0] - SAME or (a[0] <= b[0] + SAME and a[1] < b[1] * (1 - 1e-12))


@njit
def enumerate_all(w, states, number, low, high, best, found):
    """Tries out states [L, N, S], `number` [L] of each layer, the first layer's from low to high. `best` (a rank) and
    `found` [L, S] are replaced by what is better."""
    layers = len(w.ids)
    ahead = len(w.after) > 0  # a layer then waits for the next one's slots
    t, slots, pick, d = track(w), found.copy(), np.zeros(layers, np.int64), 0
    pick[0] = low - 1
    while d >= 0:
        pick[d] += 1
        if pick[d] == (high if d == 0 else number[d]):
            d -= 1
            continue
        slots[d] = states[d, pick[d]]
        done = d + 1
        if not ahead:
            step(w, slots, d, t)
        else:
            if d > 0:
                step(w, slots, d - 1, t)
            if d == layers - 1:
                step(w, slots, d, t)
            else:
                done = d
        now = rank(w, t, done)
        if w.most == np.inf and now[1] >= best[1]:  # more layers only add to it
            continue
        if d < layers - 1:
            d += 1
            pick[d] = -1
        elif better(now, best):
            best[0], best[1] = now
            found[:] = slots


@njit
def draw(w, slots, layer, random):
    """(a, b) of a change that is allowed in slots [S] of a layer: slot a's expert gives way to expert -1 - b where
    b < 0, as others hold it too, else the experts of slots a and b change places. a = -1: nothing."""
    a = int(_uniform(random) * len(slots))
    e, g, copies = slots[a], w.gpu_of_slot[a], 0
    if w.pin[layer, e] == g:
        return -1, 0
    for s in range(len(slots)):
        copies += slots[s] == e
    if copies > 1 and _uniform(random) < 0.6:
        f, near = int(_uniform(random) * w.experts), False
        for s in range(len(slots)):
            if slots[s] == f:
                if w.gpu_of_slot[s] == g:
                    return -1, 0
                near = near or w.node_of_gpu[w.gpu_of_slot[s]] == w.node_of_gpu[g]
        return (-1, 0) if w.grouped and not near else (a, -1 - f)
    b = int(_uniform(random) * len(slots))
    f, h = slots[b], w.gpu_of_slot[b]
    if g == h or w.pin[layer, f] == h or (w.grouped and w.node_of_gpu[g] != w.node_of_gpu[h]):
        return -1, 0
    for s in range(len(slots)):
        if (slots[s] == f and w.gpu_of_slot[s] == g) or (slots[s] == e and w.gpu_of_slot[s] == h):
            return -1, 0
    return a, b


@njit
def _change(slots, a, b):
    if b < 0:
        slots[a] = -1 - b
    else:
        slots[a], slots[b] = slots[b], slots[a]


@njit
def descend(w, slots, kicks, idle, patience, coupled, most, random):
    """Slots [L, S] after `kicks` changes by chance and then all that make it no worse, until `patience` in turn, of
    which `idle` are already done, make it no better, or some `most` layers have been walked. Returns the rank, the new
    `idle`, and how many layers were walked. `coupled`: later layers depend on earlier ones."""
    layers, done = len(w.ids), 0
    for _ in range(kicks):
        layer = int(_uniform(random) * layers)
        a, b = draw(w, slots[layer], layer, random)
        if a >= 0:
            _change(slots[layer], a, b)
    now, other, back = track(w), track(w), np.zeros(slots.shape[1], slots.dtype)
    for layer in range(layers):
        step(w, slots, layer, now)
    best = rank(w, now, layers)
    while idle < patience and done < most:
        idle += 1
        layer = int(_uniform(random) * layers)
        a, b = draw(w, slots[layer], layer, random)
        if a < 0:
            continue
        back[:] = slots[layer]
        _change(slots[layer], a, b)
        first = max(0, layer - 1) if len(w.after) else layer
        last = layers if coupled else layer + 1
        other.at[first], other.on[first] = now.at[first], now.on[first]
        other.rest[:], other.load[:] = now.rest, now.load
        for i in range(first, last):
            step(w, slots, i, other)
        done += last - first
        found = rank(w, other, layers)
        if better(best, found):
            slots[layer] = back
            continue
        if better(found, best):
            best, idle = found, 0
        now.at[first + 1 : last + 1], now.on[first + 1 : last + 1] = (
            other.at[first + 1 : last + 1],
            other.on[first + 1 : last + 1],
        )
        now.rest[:], now.load[:] = other.rest, other.load
    return best, idle, done + layers
