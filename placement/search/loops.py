"""The inner loops of the swap search, compiled: two experts of a layer change places, and every number follows.

A swap costs two rows of counts in each neighbouring layer; to know beforehand what it would change takes eight
look-ups.
Crossings are kept as integers, so that nothing drifts.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray


class State(NamedTuple):
    """A placement without replicas and what the loops know of it; arrays, all changed in place but where said so.

    at         int32 [L, E]     the GPU of each expert
    near       int [L, G, E]    transitions between an expert and the neighbouring layers' experts on a GPU
    near_node  int [L, N, E]    the same for nodes
    after      int [L-1, E, E]  counts of (expert, next layer's expert), never changed;  before: transposed
    node       int32 [G];  pace  float64 [G]: 1 / speed, never changed
    held       bool [L, E]      pinned experts, which stay, never changed
    load       float64 [Q, L, E]  of the mean GPU's load, never changed;  time  float64 [Q, L, G]: summed, times pace
    peak       float64 [L]      the largest time over scenarios and GPUs
    steep      float64 [L]      how steeply `heat` rises with time, never changed
    heat       float64 [Q, L, G]  exp(steep * (time - 1)): log(sum) / steep is a smooth peak;  sum  float64 [L]
    random     uint64 [1]       the state of the random numbers
    group      int: experts of a group that has to stay on one node, 1 where there are none
    """

    at: NDArray
    near: NDArray
    near_node: NDArray
    after: NDArray
    before: NDArray
    node: NDArray
    pace: NDArray
    held: NDArray
    load: NDArray
    time: NDArray
    peak: NDArray
    steep: NDArray
    heat: NDArray
    sum: NDArray
    random: NDArray
    group: int


class Price(NamedTuple):
    """What is paid for: one transition that crosses GPUs, one that crosses nodes, one more of peak in one layer."""

    gpu: float
    node: float
    load: float


@njit(cache=True)
def add_rows(counts, at, into):
    """into [G, E] += counts [E', E], each row on the GPU at [E'] of its expert."""
    for f in range(len(at)):
        row = into[at[f]]
        for e in range(counts.shape[1]):
            row[e] += counts[f, e]


@njit(cache=True)
def crossings(after, at, node_of):
    """(GPU, node) crossings of a placement at [L, E], counted anew from `after` [L-1, E, E]."""
    gpu, node = np.int64(0), np.int64(0)
    for layer in range(len(after)):
        for e in range(at.shape[1]):
            a = at[layer, e]
            for f in range(at.shape[1]):
                b = at[layer + 1, f]
                if a != b:
                    gpu += after[layer, e, f]
                    if node_of[a] != node_of[b]:
                        node += after[layer, e, f]
    return gpu, node


@njit(cache=True, inline="always")
def _draw(random):
    """The next 64 random bits (xorshift, Marsaglia 2003)."""
    x = random[0]
    x ^= x << np.uint64(13)
    x ^= x >> np.uint64(7)
    x ^= x << np.uint64(17)
    random[0] = x
    return x


@njit(cache=True, inline="always")
def _below(random, n):
    return np.int64(((_draw(random) >> np.uint64(32)) * np.uint64(n)) >> np.uint64(32))


@njit(cache=True, inline="always")
def _patience(random, temperature):
    """How much worse an accepted move may be: exponential with mean `temperature`."""
    return -temperature * np.log((np.float64(_draw(random) >> np.uint64(11)) + 0.5) * (1.0 / 9007199254740992.0))


@njit(cache=True, inline="always")
def crossings_saved(state, layer, e, f):
    """(GPU, node) crossings that end if experts e and f of `layer` change places; negative where more begin."""
    a, b = state.at[layer, e], state.at[layer, f]
    near = state.near  # indexed at once: a view of one layer would cost more than the look-up
    gpu = near[layer, b, e] - near[layer, a, e] + near[layer, a, f] - near[layer, b, f]
    m, n = state.node[a], state.node[b]
    if m == n:
        return np.int64(gpu), np.int64(0)
    near = state.near_node
    return np.int64(gpu), np.int64(near[layer, n, e] - near[layer, m, e] + near[layer, m, f] - near[layer, n, f])


@njit(cache=True, inline="always")
def _on_peak(state, layer, gpu):
    found = False
    for q in range(state.load.shape[0]):
        found |= state.time[q, layer, gpu] == state.peak[layer]
    return found


@njit(cache=True)
def peak_after(state, layer, e, f):
    """The layer's peak once e and f have changed places."""
    a, b = state.at[layer, e], state.at[layer, f]
    peak = 0.0
    for q in range(state.load.shape[0]):
        more = state.load[q, layer, f] - state.load[q, layer, e]
        peak = max(peak, state.time[q, layer, a] + more * state.pace[a])
        peak = max(peak, state.time[q, layer, b] - more * state.pace[b])
    if peak >= state.peak[layer] or not (_on_peak(state, layer, a) or _on_peak(state, layer, b)):
        return max(peak, state.peak[layer])
    for q in range(state.load.shape[0]):
        for g in range(state.time.shape[2]):
            if g != a and g != b:
                peak = max(peak, state.time[q, layer, g])
    return peak


@njit(cache=True)
def heat_of(steep, time):
    return np.exp(min(steep * (time - 1), 600.0))


@njit(cache=True)
def _smooth_change(state, layer, e, f, a, b):
    """How much the layer's smooth peak rises if e on a and f on b change places."""
    steep, after = state.steep[layer], 0.0
    for q in range(state.load.shape[0]):
        more = state.load[q, layer, f] - state.load[q, layer, e]
        for g in range(state.heat.shape[2]):  # all of them: the two may be all that counts
            if g != a and g != b:
                after += state.heat[q, layer, g]
        after += heat_of(steep, state.time[q, layer, a] + more * state.pace[a])
        after += heat_of(steep, state.time[q, layer, b] - more * state.pace[b])
    return np.log(after / state.sum[layer]) / steep


@njit(cache=True, inline="always")
def _smooth_most(state, layer, a, b):
    """No swap between a and b lowers the smooth peak by more."""
    part = 0.0
    for q in range(state.load.shape[0]):
        part += state.heat[q, layer, a] + state.heat[q, layer, b]
    rest = state.sum[layer] - part
    return part / (rest * state.steep[layer]) if rest > 0.01 * part else np.inf  # log(1 + x) <= x


@njit(cache=True)
def _shift(counts, a, b, gone, come):
    """Moves rows of counts: what was `gone` from a is now on b, what has `come` to a was on b."""
    row_a, row_b = counts[a], counts[b]
    for x in range(len(gone)):
        d = come[x] - gone[x]
        row_a[x] += d
        row_b[x] -= d


@njit(cache=True)
def swap(state, layer, e, f):
    """Experts e and f of `layer`, on different GPUs, change places."""
    a, b = state.at[layer, e], state.at[layer, f]
    for q in range(state.load.shape[0]):
        more = state.load[q, layer, f] - state.load[q, layer, e]
        state.time[q, layer, a] += more * state.pace[a]
        state.time[q, layer, b] -= more * state.pace[b]
        for g in (a, b):
            state.heat[q, layer, g] = heat_of(state.steep[layer], state.time[q, layer, g])
    state.peak[layer] = state.time[:, layer].max()
    state.sum[layer] = state.heat[:, layer].sum()
    state.at[layer, e], state.at[layer, f] = b, a
    m, n = state.node[a], state.node[b]
    if layer > 0:
        gone, come = state.before[layer - 1, e], state.before[layer - 1, f]
        _shift(state.near[layer - 1], a, b, gone, come)
        if m != n:
            _shift(state.near_node[layer - 1], m, n, gone, come)
    if layer + 1 < state.at.shape[0]:
        gone, come = state.after[layer, e], state.after[layer, f]
        _shift(state.near[layer + 1], a, b, gone, come)
        if m != n:
            _shift(state.near_node[layer + 1], m, n, gone, come)


@njit(cache=True)
def anneal(state, price, temperature, sweeps):
    """`sweeps` times L layers, drawn at random, with E proposals each: two experts change places where that is better,
    or no worse than chance allows (Metropolis). A layer at a time, so that its counts stay in the cache.

    The load is paid for by the smooth peak, whose slope tells of every busy GPU and not of the busiest alone; that
    anneals better than the peak itself, and holds better on tokens that were not counted.
    """
    layers, experts = state.at.shape
    random, free = state.random, state.group == 1
    for _ in range(sweeps * layers):
        layer = _below(random, layers)
        at = state.at[layer]
        for _ in range(experts):
            e, f = _below(random, experts), _below(random, experts)
            a, b = at[e], at[f]
            if a == b or not (free or state.node[a] == state.node[b]):
                continue
            gpu, node = crossings_saved(state, layer, e, f)
            worse = -price.gpu * gpu - price.node * node
            least = worse
            if price.load > 0 and worse > 0:
                least -= price.load * _smooth_most(state, layer, a, b)
            if least > 30 * temperature:
                continue
            patience = _patience(random, temperature)
            if least > patience or state.held[layer, e] or state.held[layer, f]:
                continue
            if price.load > 0:
                worse += price.load * _smooth_change(state, layer, e, f, a, b)
            if worse <= patience:
                swap(state, layer, e, f)


@njit(cache=True)
def _change_groups(state, layer, p, q):
    """Members of groups p and q change places one by one; gives back the crossings saved. Its own inverse."""
    gpu, node = np.int64(0), np.int64(0)
    for i in range(state.group):
        e, f = p * state.group + i, q * state.group + i
        saved = crossings_saved(state, layer, e, f)
        gpu += saved[0]
        node += saved[1]
        swap(state, layer, e, f)
    return gpu, node


@njit(cache=True)
def anneal_groups(state, price, temperature, sweeps):
    """As `anneal`, with whole groups that change nodes."""
    layers, experts = state.at.shape
    groups = experts // state.group
    for _ in range(sweeps * layers):
        layer = _below(state.random, layers)
        for _ in range(groups):
            p, q = _below(state.random, groups), _below(state.random, groups)
            if state.node[state.at[layer, p * state.group]] == state.node[state.at[layer, q * state.group]]:
                continue
            first, second = p * state.group, q * state.group
            if state.held[layer, first : first + state.group].any():
                continue
            if state.held[layer, second : second + state.group].any():
                continue
            before = state.sum[layer]
            gpu, node = _change_groups(state, layer, p, q)
            worse = price.load * np.log(state.sum[layer] / before) / state.steep[layer]
            worse -= price.gpu * gpu + price.node * node
            if worse > _patience(state.random, temperature):
                _change_groups(state, layer, p, q)


@njit(cache=True, inline="always")
def _may(state, layer, e, f):
    """Whether e, which is not held, may change places with f."""
    a, b = state.at[layer, e], state.at[layer, f]
    return a != b and not state.held[layer, f] and (state.group == 1 or state.node[a] == state.node[b])


@njit(cache=True)
def descend(state, price, budget, sweeps):
    """The best swap of each expert in turn, as long as any makes the price less, at most `sweeps` times through.

    The sum of the layers' peaks stays at most `budget`. Gives back how many swaps were made.
    """
    layers, experts = state.at.shape
    made = 0
    for _ in range(sweeps):
        before = made
        for layer in range(layers):
            for e in range(experts):
                if state.held[layer, e]:
                    continue
                room = budget - state.peak.sum()
                best, partner = -1e-12, -1
                for f in range(experts):
                    if not _may(state, layer, e, f):
                        continue
                    gpu, node = crossings_saved(state, layer, e, f)
                    worse = -price.gpu * gpu - price.node * node
                    least = worse
                    if _on_peak(state, layer, state.at[layer, e]) or _on_peak(state, layer, state.at[layer, f]):
                        least -= price.load * max(0.0, state.peak[layer] - 1)
                    if least >= best:
                        continue
                    more = peak_after(state, layer, e, f) - state.peak[layer]
                    worse += price.load * more
                    if worse < best and more <= room:
                        best, partner = worse, f
                if partner >= 0:
                    swap(state, layer, e, partner)
                    made += 1
        if made == before:
            break
    return made


@njit(cache=True)
def relieve(state, price, budget, most):
    """Swaps that lower a peak, each time the one that costs least for what is needed of it, until the sum of the peaks
    is `budget`, no swap lowers any, or `most` were made. Gives back how many."""
    layers, experts = state.at.shape
    for made in range(most):
        over = state.peak.sum() - budget
        if over <= 0:
            return made
        best, where, first, second = 1e300, -1, -1, -1
        for layer in range(layers):
            for e in range(experts):
                if state.held[layer, e] or state.time[:, layer, state.at[layer, e]].max() < state.peak[layer] - 1e-9:
                    continue
                for f in range(experts):
                    if not _may(state, layer, e, f):
                        continue
                    less = state.peak[layer] - peak_after(state, layer, e, f)
                    if less < 1e-9:
                        continue
                    gpu, node = crossings_saved(state, layer, e, f)
                    each = (-price.gpu * gpu - price.node * node) / min(less, over)
                    if each < best:
                        best, where, first, second = each, layer, e, f
        if where < 0:
            return made
        swap(state, where, first, second)
    return most
