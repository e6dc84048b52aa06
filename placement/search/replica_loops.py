"""The inner loops of replicate.py: which replica each choice takes, and what another slot's expert changes.

Every change is carried out on the tokens, with all that follows from it in later layers, and noted; what does not
please is undone from the notes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..compiled import njit
from .token_loops import _uniform


class Replicas(NamedTuple):
    """A placement with replicas in work, and what the tokens do with it.

    slot       int32 [L, S]: the expert of each slot; gpu_of_slot  int32 [S]; node_of_gpu  int32 [G]
    fixed      bool [L, S]: slots that keep their expert; grouped: experts stay on their node
    held       bool [L, E, G]: where experts stand; copies  int32 [L, E]: how often
    ids        int16 [L, T, K]; home  int32 [T]; turn  int32 [T]: which of its home's tokens it is, plus the home
    on         int16 [L, T, K]: the GPU of each choice, -1 for none
    begin      int32 [L, E+1], choice  int32 [L, T*K]: the choices t * K + k of each expert
    gpu_count  uint8 [L, T, G], node_count  uint8 [L, T, N]: choices of a token on each GPU, and node
    load       float64 [L, G]: expert time of each GPU over the mean; pair  float64 [L, G]: what one choice adds to it
    heaviest   float64 [L]: the largest load
    note       int32 [M, 4]: layer, t, k and GPU before of every change not yet decided on; noted  int64 [1]: how many
    weight     float64 [5]: of a transition that crosses GPUs, or nodes; of a row that leaves its GPU, or node; of a
               layer's load
    rule       the number of the replicas' rule in `walk`'s REPLICA
    ahead      float64 [L, T, G]: with rule 2, how many of the token's next choices are foretold for a GPU and its node
    random     uint64 [1]
    """

    slot: NDArray
    gpu_of_slot: NDArray
    node_of_gpu: NDArray
    fixed: NDArray
    grouped: bool
    held: NDArray
    copies: NDArray
    ids: NDArray
    home: NDArray
    turn: NDArray
    on: NDArray
    begin: NDArray
    choice: NDArray
    gpu_count: NDArray
    node_count: NDArray
    load: NDArray
    pair: NDArray
    heaviest: NDArray
    note: NDArray
    noted: NDArray
    weight: NDArray
    rule: int
    ahead: NDArray
    random: NDArray


@njit(inline="always")
def _rank(count, node_count, node_of_gpu, rule, ahead, top_k, layer, t, g):
    """What a replica on GPU g is worth to token t."""
    found = 0.0
    if rule > 0 and layer > 0:
        here, near = count[layer - 1, t, g], node_count[layer - 1, t, node_of_gpu[g]]
        found = here * (top_k + 1.0 if rule == 1 else 1.0) + near
    if rule == 2:
        found += ahead[layer, t, g]
    return found


@njit(inline="always")
def _pick(held, count, node_count, node_of_gpu, rule, ahead, top_k, home, turns, layer, t, e):
    """The GPU where token t takes expert e: the rules of `walk`, with `turns` of the token for the turn."""
    gpus = held.shape[2]
    best, among, near = -1.0, 0, 0
    for g in range(gpus):
        if held[layer, e, g]:
            rank = _rank(count, node_count, node_of_gpu, rule, ahead, top_k, layer, t, g)
            if rank > best:
                best, among, near = rank, 0, 0
            if rank == best:
                among += 1
                near += node_of_gpu[g] == node_of_gpu[home]
    turn = turns[t] % (near if near > 0 else among)
    found = -1
    for g in range(gpus):
        if held[layer, e, g]:
            rank = _rank(count, node_count, node_of_gpu, rule, ahead, top_k, layer, t, g)
            if rank == best and g == home:
                found = g
                break
            if rank == best and (near == 0 or node_of_gpu[g] == node_of_gpu[home]):
                if turn == 0:
                    found = g
                turn -= 1
    return found


@njit(inline="always")
def _put(on, count, node_count, node_of_gpu, load, pair, weight, home, layer, t, k, h):
    """One choice goes to GPU h. Returns the change of the score, but for the load's."""
    g = on[layer, t, k]
    m, n, near, found = node_of_gpu[g], node_of_gpu[h], node_of_gpu[home], 0.0
    for beside in (layer - 1, layer + 1):
        if 0 <= beside < len(on):
            found += weight[0] * (np.int64(count[beside, t, g]) - np.int64(count[beside, t, h]))
            found += weight[1] * (np.int64(node_count[beside, t, m]) - np.int64(node_count[beside, t, n]))
    count[layer, t, g] -= 1
    found -= weight[2] * (count[layer, t, g] == 0 and g != home)
    found += weight[2] * (count[layer, t, h] == 0 and h != home)
    count[layer, t, h] += 1
    node_count[layer, t, m] -= 1
    found -= weight[3] * (node_count[layer, t, m] == 0 and m != near)
    found += weight[3] * (node_count[layer, t, n] == 0 and n != near)
    node_count[layer, t, n] += 1
    on[layer, t, k] = h
    load[layer, g] -= pair[layer, g]
    load[layer, h] += pair[layer, h]
    return found


@njit
def _again(s, layer, e):
    """All choices of an expert, after it has come to stand elsewhere."""
    on, count, node_count, node_of_gpu, held = s.on, s.gpu_count, s.node_count, s.node_of_gpu, s.held
    load, pair, weight, homes, note, chosen = s.load, s.pair, s.weight, s.home, s.note, s.choice
    rule, ahead, turns, found, top_k, i, only = s.rule, s.ahead, s.turn, 0.0, on.shape[2], s.noted[0], -1
    if s.copies[layer, e] == 1:
        only = int(np.argmax(held[layer, e]))
    for j in range(s.begin[layer, e], s.begin[layer, e + 1]):
        t, k, h = chosen[layer, j] // top_k, chosen[layer, j] % top_k, only
        if only < 0:
            h = _pick(held, count, node_count, node_of_gpu, rule, ahead, top_k, homes[t], turns, layer, t, e)
        if h != on[layer, t, k]:
            note[i, 0], note[i, 1], note[i, 2], note[i, 3] = layer, t, k, on[layer, t, k]
            i += 1
            found += _put(on, count, node_count, node_of_gpu, load, pair, weight, homes[t], layer, t, k, h)
    s.noted[0] = i
    return found


@njit
def _follow(s):
    """Choices of later layers that go elsewhere because of the changes noted."""
    on, count, node_count, node_of_gpu, held = s.on, s.gpu_count, s.node_count, s.node_of_gpu, s.held
    load, pair, weight, homes, note, ids = s.load, s.pair, s.weight, s.home, s.note, s.ids
    rule, ahead, turns, copies, found, top_k, i, end = (
        s.rule,
        s.ahead,
        s.turn,
        s.copies,
        0.0,
        on.shape[2],
        0,
        s.noted[0],
    )
    while i < end:
        layer, t = note[i, 0] + 1, note[i, 1]
        i += 1
        if layer == len(on):
            continue
        for k in range(top_k):
            e = ids[layer, t, k]
            if e < 0 or copies[layer, e] == 1:
                continue
            h = _pick(held, count, node_count, node_of_gpu, rule, ahead, top_k, homes[t], turns, layer, t, e)
            if h != on[layer, t, k]:
                note[end, 0], note[end, 1], note[end, 2], note[end, 3] = layer, t, k, on[layer, t, k]
                end += 1
                found += _put(on, count, node_count, node_of_gpu, load, pair, weight, homes[t], layer, t, k, h)
    s.noted[0] = end
    return found


@njit
def _weigh(s):
    """Change of the score by the loads of the layers in the notes."""
    found, last = 0.0, -1
    for i in range(s.noted[0]):
        layer = s.note[i, 0]
        if layer != last:
            last = layer
            worst = s.load[layer].max()
            found += s.weight[4] * (worst - s.heaviest[layer])
            s.heaviest[layer] = worst
    return found


@njit
def exchange(s, layer, a, b, e, f):
    """Slot a comes to hold f, and slot b e (b < 0: no other slot). Returns the change of the score; notes it."""
    s.noted[0] = 0
    _stand(s, layer, a, f)
    if b >= 0:
        _stand(s, layer, b, e)
    found = _again(s, layer, e) + _again(s, layer, f)
    if s.rule > 0:
        found += _follow(s)
    return found + _weigh(s)


@njit
def guess(s, layer, a, b, e, f):
    """About what `exchange` would return, with nothing changed: later layers' choices stay, as does each token's
    other expert."""
    _stand(s, layer, a, f)
    if b >= 0:
        _stand(s, layer, b, e)
    on, count, node_count, node_of_gpu, held = s.on, s.gpu_count, s.node_count, s.node_of_gpu, s.held
    weight, homes, chosen, top_k, found = s.weight, s.home, s.choice, s.on.shape[2], 0.0
    rule, ahead, turns = s.rule, s.ahead, s.turn
    moved = np.zeros(held.shape[2], np.int64)
    for x in (e, f):
        only, stay, near = -1, np.int64(0), np.int64(0)
        if s.copies[layer, x] == 1:
            only = int(np.argmax(held[layer, x]))
        for j in range(s.begin[layer, x], s.begin[layer, x + 1]):
            t, k, h = chosen[layer, j] // top_k, chosen[layer, j] % top_k, only
            g = on[layer, t, k]
            if only < 0:
                h = _pick(held, count, node_count, node_of_gpu, rule, ahead, top_k, homes[t], turns, layer, t, x)
            if g == h:
                continue
            moved[g] -= 1
            moved[h] += 1
            m, n = node_of_gpu[g], node_of_gpu[h]
            for beside in (layer - 1, layer + 1):
                if 0 <= beside < len(on):
                    stay += np.int64(count[beside, t, h]) - np.int64(count[beside, t, g])
                    if m != n:
                        near += np.int64(node_count[beside, t, n]) - np.int64(node_count[beside, t, m])
            found += weight[2] * (
                (count[layer, t, h] == 0 and h != homes[t]) - np.int64(count[layer, t, g] == 1 and g != homes[t])
            )
            if m != n:
                home = node_of_gpu[homes[t]]
                found += weight[3] * (
                    (node_count[layer, t, n] == 0 and n != home) - np.int64(node_count[layer, t, m] == 1 and m != home)
                )
        found -= weight[0] * stay + weight[1] * near
    _stand(s, layer, a, e)
    if b >= 0:
        _stand(s, layer, b, f)
    worst = 0.0
    for g in range(len(moved)):
        worst = max(worst, s.load[layer, g] + moved[g] * s.pair[layer, g])
    return found + weight[4] * (worst - s.heaviest[layer])


@njit
def _stand(s, layer, slot, e):
    old, g = s.slot[layer, slot], s.gpu_of_slot[slot]
    s.held[layer, old, g] = False
    s.copies[layer, old] -= 1
    s.held[layer, e, g] = True
    s.copies[layer, e] += 1
    s.slot[layer, slot] = e


@njit
def undo(s, layer, a, b, e, f):
    """What `exchange` did last."""
    on, count, node_count, node_of_gpu = s.on, s.gpu_count, s.node_count, s.node_of_gpu
    load, pair, weight, homes, note = s.load, s.pair, s.weight, s.home, s.note
    for i in range(s.noted[0] - 1, -1, -1):
        t, k, h = note[i, 1], note[i, 2], note[i, 3]
        _put(on, count, node_count, node_of_gpu, load, pair, weight, homes[t], note[i, 0], t, k, h)
    _stand(s, layer, a, e)
    if b >= 0:
        _stand(s, layer, b, f)
    _weigh(s)


@njit
def draw(s, layer):
    """(a, b, e, f) of a change that is allowed, or a = -1: a spare replica gives way to another expert, or two slots
    change their experts."""
    slots, experts = s.slot.shape[1], s.held.shape[1]
    a = int(_uniform(s.random) * slots)
    e, g = s.slot[layer, a], s.gpu_of_slot[a]
    if s.fixed[layer, a]:
        return -1, -1, 0, 0
    if s.copies[layer, e] > 1 and _uniform(s.random) < 0.7:
        f = int(_uniform(s.random) * experts)
        if s.held[layer, f, g]:
            return -1, -1, 0, 0
        if s.grouped and s.node_of_gpu[np.argmax(s.held[layer, f])] != s.node_of_gpu[g]:
            return -1, -1, 0, 0
        return a, -1, e, f
    b = int(_uniform(s.random) * slots)
    f, h = s.slot[layer, b], s.gpu_of_slot[b]
    if s.fixed[layer, b] or g == h or s.held[layer, f, g] or s.held[layer, e, h]:
        return -1, -1, 0, 0
    if s.grouped and s.node_of_gpu[g] != s.node_of_gpu[h]:
        return -1, -1, 0, 0
    return a, b, e, f


@njit
def anneal(s, layer, temperature, slack, proposals):
    """`proposals` changes in a layer are tried and kept by Metropolis' rule; those whose guess is worse than what is
    allowed by more than `slack` are not carried out. Returns the size of all guesses, and how many there were."""
    size, tried = 0.0, 0
    for _ in range(proposals):
        a, b, e, f = draw(s, layer)
        allowed = -temperature * np.log(_uniform(s.random))
        if a < 0:
            continue
        found = guess(s, layer, a, b, e, f)
        size, tried = size + abs(found), tried + 1
        if found <= allowed + slack:
            found = exchange(s, layer, a, b, e, f)
            if found > allowed or (found == 0 and temperature == 0):
                undo(s, layer, a, b, e, f)
    return size, tried


@njit
def fill(s):
    """What follows from `slot` and `ahead`."""
    on, count, node_count, node_of_gpu, held, homes = s.on, s.gpu_count, s.node_count, s.node_of_gpu, s.held, s.home
    (layers, tokens, top_k), rule, ahead, turns = s.ids.shape, s.rule, s.ahead, s.turn
    held[:] = False
    s.copies[:] = 0
    count[:] = 0
    node_count[:] = 0
    s.load[:] = 0
    for layer in range(layers):
        for slot in range(s.slot.shape[1]):
            e = s.slot[layer, slot]
            held[layer, e, s.gpu_of_slot[slot]] = True
            s.copies[layer, e] += 1
        for t in range(tokens):
            for k in range(top_k):
                e = s.ids[layer, t, k]
                if e >= 0:
                    g = int(np.argmax(held[layer, e]))
                    if s.copies[layer, e] > 1:
                        g = _pick(
                            held, count, node_count, node_of_gpu, rule, ahead, top_k, homes[t], turns, layer, t, e
                        )
                    on[layer, t, k] = g
                    count[layer, t, g] += 1
                    node_count[layer, t, node_of_gpu[g]] += 1
                    s.load[layer, g] += s.pair[layer, g]
        s.heaviest[layer] = s.load[layer].max()


@njit
def look_ahead(s, tell):
    """`ahead` by tell [L-1, E, G], for GPU and node together."""
    layers, tokens, top_k = s.ids.shape
    node = np.zeros(s.node_count.shape[2])
    for layer in range(layers - 1):
        for t in range(tokens):
            ahead = s.ahead[layer, t]
            ahead[:] = 0
            for k in range(top_k):
                if s.ids[layer, t, k] >= 0:
                    ahead += tell[layer, s.ids[layer, t, k]]
            node[:] = 0
            for g in range(len(ahead)):
                node[s.node_of_gpu[g]] += ahead[g]
            for g in range(len(ahead)):
                ahead[g] += node[s.node_of_gpu[g]]


@njit
def counts(s):
    """int64 [5]: transitions in all; those that stay on their GPU, on their node; rows that leave home's GPU, node."""
    found = np.zeros(5, np.int64)
    count, node_count = s.gpu_count, s.node_count
    layers, tokens, gpus = count.shape
    for layer in range(layers):
        for t in range(tokens):
            now, before = np.int64(0), np.int64(0)
            for g in range(gpus):
                c = np.int64(count[layer, t, g])
                found[3] += c > 0 and g != s.home[t]
                now += c
                if layer > 0:
                    found[1] += c * count[layer - 1, t, g]
                    before += count[layer - 1, t, g]
            found[0] += now * before
            for n in range(node_count.shape[2]):
                c = np.int64(node_count[layer, t, n])
                found[4] += c > 0 and n != s.node_of_gpu[s.home[t]]
                if layer > 0:
                    found[2] += c * node_count[layer - 1, t, n]
    return found
