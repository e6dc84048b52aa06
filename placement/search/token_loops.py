"""The inner loops of copies.py: what a swap of two experts of a layer changes, and the annealing of swaps.

Tokens are bits: those that use an expert, and those with exactly one choice on a GPU, or any, are rows of 64-bit words.
A swap's distinct GPUs are then counted in a few passes over T / 64 words.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

_ONE, _TWO, _FOUR, _TOP = (np.uint64(n) for n in (1, 2, 4, 56))
_M1, _M2, _M4, _M8 = (np.uint64(n * 0x0101010101010101) for n in (0x55, 0x33, 0x0F, 0x01))


class State(NamedTuple):
    """A placement in work, one GPU for each expert, and all that follows from it. W = T / 64 words, rounded up.

    gpu        int32 [L, E]; slot  int32 [L, E]: the experts by GPU, GPU g's from start[g]; place  int32 [L, E]: where
    free       int32 [L, E]: the experts that may be swapped, `movable` [L] of them; `grouped`: swaps stay on the node
    member     uint64 [L, E, W]: the tokens of each expert
    home       uint64 [G, W]: those whose fixed home a GPU is, which counts as one more choice on it; node_home  [N, W]
    one, any   uint64 [L, G, W]: those with exactly one choice, or any, on a GPU; node_one, node_any  [L, N, W]
    share      float64 [Q, L, E]: expert loads;  load  float64 [Q, L, G]: the GPUs', over their share of the speed
    scale      float64 [G]: one over that share
    after      float64 [L-1, E, E]: transition counts; on_gpu  float64 [L, E, G], on_node  float64 [L, E, N]: the
               transitions of each expert, to and from its layer, whose other end is there
    weight     float64 [5]: of a transition that stays on its GPU, or node; of a token's distinct GPU, or node; of a
               layer's load
    random     uint64 [1]
    """

    gpu: NDArray
    slot: NDArray
    place: NDArray
    start: NDArray
    node_of_gpu: NDArray
    free: NDArray
    movable: NDArray
    grouped: bool
    member: NDArray
    home: NDArray
    node_home: NDArray
    one: NDArray
    any: NDArray
    node_one: NDArray
    node_any: NDArray
    share: NDArray
    load: NDArray
    scale: NDArray
    after: NDArray
    on_gpu: NDArray
    on_node: NDArray
    weight: NDArray
    random: NDArray


@njit(cache=True, inline="always")
def _bits(x):
    """The number of ones; compilers know this form and take the machine's instruction."""
    x = x - ((x >> _ONE) & _M1)
    x = (x & _M2) + ((x >> _TWO) & _M2)
    x = (x + (x >> _FOUR)) & _M4
    return np.int64((x * _M8) >> _TOP)


@njit(cache=True)
def _uniform(random):
    """xorshift64*: in 0 .. 1, without 0."""
    x = random[0]
    x ^= x >> np.uint64(12)
    x ^= x << np.uint64(25)
    x ^= x >> np.uint64(27)
    random[0] = x
    return (np.float64((x * np.uint64(2685821657736338717)) >> np.uint64(11)) + 0.5) / 9007199254740992.0


@njit(cache=True)
def _distinct(e, f, one_g, any_g, one_h, any_h):
    """Change of the tokens' distinct places when expert e goes from g to h and f from h to g."""
    found = 0
    for w in range(len(e)):
        a, b = e[w] & ~f[w], f[w] & ~e[w]
        found += _bits(a & ~any_h[w]) + _bits(b & ~any_g[w]) - _bits(a & one_g[w]) - _bits(b & one_h[w])
    return found


@njit(cache=True)
def delta(s, layer, e, f):
    """Change of the score when e and f of a layer change places."""
    g, h = s.gpu[layer, e], s.gpu[layer, f]
    m, n = s.node_of_gpu[g], s.node_of_gpu[h]
    weight, found = s.weight, 0.0
    if weight[0] > 0:
        near = s.on_gpu[layer]
        found -= weight[0] * (near[e, h] - near[e, g] + near[f, g] - near[f, h])
    if weight[1] > 0 and m != n:
        near = s.on_node[layer]
        found -= weight[1] * (near[e, n] - near[e, m] + near[f, m] - near[f, n])
    if weight[4] > 0:
        found += weight[4] * (_heaviest(s, layer, e, f) - _heaviest(s, layer, e, e))
    ex, fx, one, any_ = s.member[layer, e], s.member[layer, f], s.one[layer], s.any[layer]
    if weight[2] > 0:
        found += weight[2] * _distinct(ex, fx, one[g], any_[g], one[h], any_[h])
    if m != n:
        one, any_ = s.node_one[layer], s.node_any[layer]
        if weight[3] > 0:
            found += weight[3] * _distinct(ex, fx, one[m], any_[m], one[n], any_[n])
    return found


@njit(cache=True)
def _heaviest(s, layer, e, f):
    """The largest load of a GPU in any scenario after the swap, over the mean. e == f: as it is."""
    g, h = s.gpu[layer, e], s.gpu[layer, f]
    worst = 0.0
    for q in range(len(s.load)):
        more = s.share[q, layer, f] - s.share[q, layer, e]
        for i in range(s.load.shape[2]):
            found = s.load[q, layer, i]
            if e != f:
                if i == g:
                    found += more * s.scale[g]
                elif i == h:
                    found -= more * s.scale[h]
            worst = max(worst, found)
    return worst


@njit(cache=True)
def swap(s, layer, e, f):
    """e and f of a layer change places."""
    g, h = s.gpu[layer, e], s.gpu[layer, f]
    m, n = s.node_of_gpu[g], s.node_of_gpu[h]
    for q in range(len(s.load)):
        more = s.share[q, layer, f] - s.share[q, layer, e]
        s.load[q, layer, g] += more * s.scale[g]
        s.load[q, layer, h] -= more * s.scale[h]
    for beside in (layer - 1, layer + 1):
        if 0 <= beside < len(s.gpu):
            for i in range(s.gpu.shape[1]):
                if beside > layer:
                    more = s.after[layer, e, i] - s.after[layer, f, i]
                else:
                    more = s.after[beside, i, e] - s.after[beside, i, f]
                s.on_gpu[beside, i, g] -= more
                s.on_gpu[beside, i, h] += more
                s.on_node[beside, i, m] -= more
                s.on_node[beside, i, n] += more
    a, b = s.place[layer, e], s.place[layer, f]
    s.slot[layer, a], s.slot[layer, b] = f, e
    s.place[layer, e], s.place[layer, f] = b, a
    s.gpu[layer, e], s.gpu[layer, f] = h, g
    for i in (g, h):
        held = s.slot[layer, s.start[i] : s.start[i + 1]]
        occupy(s.member[layer], held, s.home[i], s.one[layer, i], s.any[layer, i])
    if m != n:
        per = len(s.node_of_gpu) // s.node_any.shape[1]
        for i in (m, n):
            held = s.slot[layer, s.start[i * per] : s.start[(i + 1) * per]]
            occupy(s.member[layer], held, s.node_home[i], s.node_one[layer, i], s.node_any[layer, i])


@njit(cache=True)
def occupy(member, held, home, one, any_):
    """one, any [W] of a place with the experts `held`."""
    any_[:] = home
    one[:] = 0
    for e in held:  # `one` takes those that have two or more, until the end
        for w in range(len(any_)):
            one[w] |= any_[w] & member[e, w]
            any_[w] |= member[e, w]
    for w in range(len(any_)):
        one[w] = any_[w] & ~one[w]


@njit(cache=True)
def anneal(s, layer, temperature, proposals):
    """`proposals` swaps in a layer are tried and taken by Metropolis' rule. Returns the change of the score."""
    total, movable = 0.0, s.movable[layer]
    if movable < 2:
        return total
    for _ in range(proposals):
        e = s.free[layer, int(_uniform(s.random) * movable)]
        f = s.free[layer, int(_uniform(s.random) * movable)]
        g, h = s.gpu[layer, e], s.gpu[layer, f]
        allowed = -temperature * np.log(_uniform(s.random))
        if g == h or (s.grouped and s.node_of_gpu[g] != s.node_of_gpu[h]):
            continue
        found = delta(s, layer, e, f)
        if found <= allowed and (found < 0 or temperature > 0):
            swap(s, layer, e, f)
            total += found
    return total


@njit(cache=True)
def mean_change(s, tries):
    """Mean size of the changes of the score that `tries` swaps in each layer would make; of those inside nodes, where
    there are any: what holds nodes together must not melt."""
    total, seen = np.zeros(2), np.zeros(2)
    for layer in range(len(s.gpu)):
        movable = s.movable[layer]
        for _ in range(tries if movable > 1 else 0):
            e = s.free[layer, int(_uniform(s.random) * movable)]
            f = s.free[layer, int(_uniform(s.random) * movable)]
            g, h = s.gpu[layer, e], s.gpu[layer, f]
            if g != h:
                across = int(s.node_of_gpu[g] != s.node_of_gpu[h])
                total[across] += abs(delta(s, layer, e, f))
                seen[across] += 1
    return total[0] / seen[0] if seen[0] > 0 else total[1] / max(1.0, seen[1])


@njit(cache=True)
def ones(words):
    """The number of bits that are set."""
    found = 0
    for word in words.flat:
        found += _bits(word)
    return found


@njit(cache=True)
def fill(s):
    """What follows from the placement in `gpu` and `slot`, everything else being empty."""
    layers, experts = s.gpu.shape
    per = len(s.node_of_gpu) // s.node_any.shape[1]
    for layer in range(layers):
        for g in range(s.any.shape[1]):
            held = s.slot[layer, s.start[g] : s.start[g + 1]]
            occupy(s.member[layer], held, s.home[g], s.one[layer, g], s.any[layer, g])
            for e in held:
                for q in range(len(s.load)):
                    s.load[q, layer, g] += s.share[q, layer, e] * s.scale[g]
        for n in range(s.node_any.shape[1]):
            held = s.slot[layer, s.start[n * per] : s.start[(n + 1) * per]]
            occupy(s.member[layer], held, s.node_home[n], s.node_one[layer, n], s.node_any[layer, n])
    for layer in range(layers - 1):
        for e in range(experts):
            g = s.gpu[layer, e]
            for f in range(experts):
                h, found = s.gpu[layer + 1, f], s.after[layer, e, f]
                s.on_gpu[layer, e, h] += found
                s.on_node[layer, e, s.node_of_gpu[h]] += found
                s.on_gpu[layer + 1, f, g] += found
                s.on_node[layer + 1, f, s.node_of_gpu[g]] += found
