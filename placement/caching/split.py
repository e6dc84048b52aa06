"""Which of a step's experts the host computes where their weights are, and which are fetched for the device.

Three machines work at once, each on one thing at a time: the link, the device, the host. An expert on the device is
computed there; any other is computed by the host, or travels and is computed by the device once it is there. So with
the host's part chosen, link and device are a flow shop of two machines, and Johnson's order (1954) is the best there
is: first what takes the device longer than the link, shortest transfer first, then the rest, longest computation first.
The order of a part is the part of the order, so one pass over all experts in Johnson's order decides each of them:

    state (link busy until a, device until c, host until b) -> (a, c, b + h)  or  (a + f, max(c, a + f) + d, b)

Of two states the one that is nowhere earlier is dropped. So is one whose rest, cut into fractions, cannot beat the best
split known: the rest shared between host and link, and between host and device, each a fractional knapsack (Dantzig,
1957). What is left after the last expert is the optimum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from .costs import Costs

DEVICE, HOST, DISK = 0, 1, 2


@dataclass(frozen=True)
class Split:
    """Positions among the experts that were asked about, int64: `host`, rising, which the host computes, and
    `fetch_order`, which travel, in that order, for the device; the rest is on the device already.

    `makespan_s` is when the last of it is done; no split is faster than `bound_s`."""

    host: NDArray[np.int64]
    fetch_order: NDArray[np.int64]
    makespan_s: float
    bound_s: float


def split(
    rows: ArrayLike,
    where: ArrayLike,
    costs: Costs,
    *,
    size_bytes: ArrayLike | None = None,
    tolerance: float = 3e-3,
    states: int = 256,
) -> Split:
    """The Split of least makespan for one step of one layer.

    rows        whole numbers [M]: rows of each expert that the step needs, at least 1
    where       [M] of DEVICE, HOST, DISK. What is on disk is read first: the link is taken for the read and the copy,
                the host for the read and the computation; reads of both sides at once are taken as independent
    size_bytes  [M] of each expert; by default that of `costs`
    tolerance   the share of the makespan that is not worth searching for; 0: the optimum
    states      how many states are kept after each expert: beyond them the search is thinned out

    `bound_s` says what was proved: it is `makespan_s` where the split is the optimum, at least (1 - tolerance) of it
    unless `states` did not suffice. Never slower than fetching everything, nor than the host for everything that is not
    on the device. Deterministic. Cost: at most 6 * M * states steps of some 50 ns. Raises ValueError / TypeError.

    >>> from .links import Link
    >>> costs = Costs((1, 8), (1e-3, 1e-3), (4e-3, 20e-3), Link(0, 10), Link(0, 1), 6 * 10**7)
    >>> split([1, 1, 8], [DEVICE, HOST, HOST], costs)  # 6 ms to fetch one
    Split(host=array([1]), fetch_order=array([2]), makespan_s=0.007, bound_s=0.007)
    """
    n, at, sizes = _checked(rows, where, costs, size_bytes, tolerance, states)
    links = np.array([costs.copy.latency_s, 1e-9 / costs.copy.bandwidth_GBps])
    disk = np.array([costs.read.latency_s, 1e-9 / costs.read.bandwidth_GBps])
    host, order, makespan, bound = _split(n, at, sizes, *costs.tables, links, disk, costs.start_s, tolerance, states)
    return Split(host, order, makespan, bound)


def _checked(rows, where, costs, size_bytes, tolerance, states) -> tuple[NDArray, NDArray, NDArray]:
    n, at = np.asarray(rows), np.asarray(where)
    sizes = np.full(n.shape, float(costs.expert_bytes)) if size_bytes is None else np.asarray(size_bytes, np.float64)
    for name, given in (("rows", n), ("where", at)):
        if given.dtype.kind not in "iu" and given.size:
            raise TypeError(f"split: {name} must be whole numbers, got {given.dtype}")
    if n.ndim != 1 or at.shape != n.shape or sizes.shape != n.shape:
        raise ValueError(
            f"split: rows, where and size_bytes must be [M] each, got shapes {n.shape}, {at.shape}, {sizes.shape}"
        )
    if n.size:
        if n.min() < 1:
            raise ValueError(f"split: rows must be at least 1, got {n.min()}")
        if at.min() < DEVICE or at.max() > DISK:
            raise ValueError(f"split: where must be DEVICE, HOST or DISK (0, 1, 2), got {at.tolist()}")
        if not (np.isfinite(sizes).all() and sizes.min() >= 0):
            raise ValueError(f"split: size_bytes must be finite and not negative, got {sizes.tolist()}")
    if not 0 <= tolerance < 1:
        raise ValueError(f"split: tolerance must be in 0 .. 1, got {tolerance}")
    if states < 1:
        raise ValueError(f"split: states must be at least 1, got {states}")
    return n.astype(np.float64), at.astype(np.int64), sizes


@njit(cache=True)
def _split(n, at, sizes, table, device_s, host_s, link, disk, start, tolerance, states):
    """(host, fetch order, makespan, bound). `link` and `disk`: latency and seconds per byte."""
    busy = 0.0
    away = np.flatnonzero(at != 0)
    f, d, h = np.empty(len(away)), np.empty(len(away)), np.empty(len(away))
    for i in range(len(n)):
        if at[i] == 0:
            busy += _seconds(n[i], table, device_s)
    for i in range(len(away)):
        e = away[i]
        read = disk[0] + sizes[e] * disk[1] if at[e] == 2 else 0.0
        f[i] = read + link[0] + sizes[e] * link[1]
        d[i] = _seconds(n[e], table, device_s)
        h[i] = read + _seconds(n[e], table, host_s)
    order = johnson(f, d)
    f, d, h, away = f[order], d[order], h[order], away[order]
    host, makespan, bound = least_makespan(f, d, h, busy, start, tolerance, states)
    return np.sort(away[host]), away[~host], makespan, bound


@njit(cache=True)
def _seconds(n, rows, seconds):
    """As Costs has it."""
    last = len(rows) - 1
    if n <= rows[0]:
        return seconds[0]
    if n >= rows[last]:
        if last == 0:
            return seconds[0] * n / rows[0]
        slope = (seconds[last] - seconds[last - 1]) / (rows[last] - rows[last - 1])
        return seconds[last] + (n - rows[last]) * slope
    i = np.searchsorted(rows, n, "right")
    return seconds[i - 1] + (seconds[i] - seconds[i - 1]) * (n - rows[i - 1]) / (rows[i] - rows[i - 1])


@njit(cache=True)
def johnson(f, d):
    """int64 [M]: the order in which transfers of f seconds, each before d seconds of the device, are done soonest."""
    first, last = np.flatnonzero(f <= d), np.flatnonzero(f > d)
    first = first[np.argsort(f[first], kind="mergesort")]
    last = last[np.argsort(-d[last], kind="mergesort")]
    return np.concatenate((first, last))


@njit(cache=True)
def makespan_of(host, f, d, h, busy, start):
    """Seconds until all is done: host bool [M], the rest fetched in the order given; the device has work until `busy`
    without it, and the host begins at `start`."""
    link, device, used = 0.0, busy, 0.0
    for j in range(len(f)):
        if host[j]:
            used += h[j] + (start if used == 0 else 0.0)
        else:
            link += f[j]
            device = max(device, link) + d[j]
    return max(device, used)


@njit(cache=True)
def least_makespan(f, d, h, busy, start, tolerance, states):
    """(host bool [M], makespan, bound) over experts in Johnson's order."""
    m = len(f)
    host = np.zeros(m, np.bool_)
    best = makespan_of(host, f, d, h, busy, start)
    if m == 0 or np.isinf(h).any():  # the host is the device
        return host, best, best
    for key in (h / np.maximum(f, 1e-300), h / d):
        best = _cheapest_first(np.argsort(key, kind="mergesort"), f, d, h, busy, start, best, host)
    by_link, by_device = _suffixes(f, h), _suffixes(d, h)
    shortest = np.zeros(m + 1)
    for i in range(m - 1, -1, -1):
        shortest[i] = d[i] if i == m - 1 else min(d[i], shortest[i + 1])
    bound = min(best, _relaxed(by_link, by_device, shortest, busy, start, best))
    if bound < best * (1 - tolerance):
        best = _exchanged(f, d, h, busy, start, best, host)
    for part in (1 / 16, 1 / 4, 1.0):  # a low limit is soon tried, and where nothing is below it, it is a bound
        if bound >= best * (1 - tolerance):
            break
        limit = best if part == 1 else bound + part * (best - bound)
        found, value, whole = _pass(f, d, h, busy, start, by_link, by_device, shortest, limit, states)
        if value < best:
            best, host = value, found
            if whole:
                return host, best, best
        if not whole:
            break
        bound = limit
    return host, best, min(best, bound)


@njit(cache=True)
def _cheapest_first(by, f, d, h, busy, start, best, host):
    """The best of the splits that give the host a beginning of the order `by`, if better than `best`: into host."""
    trial = np.zeros(len(f), np.bool_)
    for e in by:
        trial[e] = True
        value = makespan_of(trial, f, d, h, busy, start)
        if value < best:
            best = value
            host[:] = trial
    return best


@njit(cache=True)
def _exchanged(f, d, h, busy, start, best, host):
    """Moves an expert to the other side, or exchanges two, as long as that helps: into host; the makespan."""
    m, better = len(f), True
    while better:
        better = False
        by_host, by_device = start + h[host].sum(), busy + d[~host].sum()
        for i in range(m):
            for j in range(i, m):  # j == i: one alone
                if i != j and host[i] == host[j]:
                    continue
                side = 1.0 if host[i] else -1.0
                more_host = side * ((h[j] if i != j else 0.0) - h[i])
                more_device = side * (d[i] - (d[j] if i != j else 0.0))
                if by_host + more_host >= best or by_device + more_device >= best:
                    continue
                host[i], host[j] = not host[i], host[i] if i != j else not host[i]
                value = makespan_of(host, f, d, h, busy, start)
                if value < best:
                    best, better = value, True
                    by_host, by_device = by_host + more_host, by_device + more_device
                else:
                    host[i], host[j] = not host[i], host[i] if i != j else not host[i]
    return best


@njit(cache=True)
def _suffixes(w, h):
    """float64 [M + 1, 2, M + 1]: for the experts from i on, those first that spare the host most for each second of w:
    sums of w, and of h. Row i has M - i + 1 entries, the first 0."""
    m = len(w)
    by = np.argsort(-h / np.maximum(w, 1e-300), kind="mergesort")
    sums = np.zeros((m + 1, 2, m + 1))
    for i in range(m):
        k = 0
        for e in by:
            if e >= i:
                sums[i, 0, k + 1] = sums[i, 0, k] + w[e]
                sums[i, 1, k + 1] = sums[i, 1, k] + h[e]
                k += 1
    return sums


@njit(cache=True)
def _least_host(sums, count, y):
    """The least that is left to the host of `count` experts, in fractions, where the others take y seconds of w."""
    w, h = sums[0], sums[1]
    if y < 0:
        return h[count]
    if y >= w[count]:
        return 0.0
    low, high = 0, count
    while high - low > 1:
        middle = (low + high) // 2
        if w[middle] <= y:
            low = middle
        else:
            high = middle
    return h[count] - h[low] - (h[high] - h[low]) * (y - w[low]) / (w[high] - w[low])


@njit(cache=True)
def _hopeless(i, a, b, c, by_link, by_device, shortest, limit):
    """Whether a state before expert i cannot end before `limit`."""
    left = len(shortest) - 1 - i
    return (
        b >= limit
        or c >= limit
        or b + _least_host(by_link[i], left, limit - a - shortest[i]) >= limit
        or b + _least_host(by_device[i], left, limit - c) >= limit
    )


@njit(cache=True)
def _pass(f, d, h, busy, start, by_link, by_device, shortest, limit, kept):
    """(host, makespan, whole): the best split below `limit` (infinity: none), if `whole` the best of all, because no
    state was left out."""
    m, whole = len(f), True
    a, b, c = np.empty(2 * kept), np.empty(2 * kept), np.empty(2 * kept)
    a[0], b[0], c[0] = 0.0, start, busy
    to_a, to_b, to_c = np.empty(2 * kept), np.empty(2 * kept), np.empty(2 * kept)
    came = np.empty((m, 2 * kept), np.int32)  # twice the state before, and one for the host
    stairs_a, stairs_c = np.empty(2 * kept), np.empty(2 * kept)
    states = 1
    for i in range(m):
        by_host, by_fetch, stairs, made = 0, 0, 0, 0
        while by_host < states or by_fetch < states:  # states are sorted by b: two sorted lists, merged
            if by_host == states or (by_fetch < states and b[by_fetch] <= b[by_host] + h[i]):
                s = by_fetch
                by_fetch += 1
                mark, next_a, next_b = 2 * s, a[s] + f[i], b[s]
                next_c = max(c[s], next_a) + d[i]
            else:
                s = by_host
                by_host += 1
                mark, next_a, next_b, next_c = 2 * s + 1, a[s], b[s] + h[i], c[s]
            if _hopeless(i + 1, next_a, next_b, next_c, by_link, by_device, shortest, limit):
                continue
            at = np.searchsorted(stairs_a[:stairs], next_a, "right")
            if at > 0 and stairs_c[at - 1] <= next_c:  # somebody with less for the host is no later elsewhere either
                continue
            stairs = _step(stairs_a, stairs_c, stairs, at, next_a, next_c)
            to_a[made], to_b[made], to_c[made], came[i, made] = next_a, next_b, next_c, mark
            made += 1
        if made > kept:
            whole = False
            for s in range(kept):
                t = s * made // kept
                to_a[s], to_b[s], to_c[s], came[i, s] = to_a[t], to_b[t], to_c[t], came[i, t]
        states = min(made, kept)
        a, b, c, to_a, to_b, to_c = to_a, to_b, to_c, a, b, c
    host = np.zeros(m, np.bool_)
    if states == 0:
        return host, np.inf, whole
    s = int(np.argmin(np.maximum(b[:states], c[:states])))
    for i in range(m - 1, -1, -1):
        host[i] = came[i, s] % 2 == 1
        s = int(came[i, s] // 2)
    return host, makespan_of(host, f, d, h, busy, start), whole


@njit(cache=True)
def _step(stairs_a, stairs_c, stairs, at, a, c):
    """Puts (a, c) on the stairs, a rising and c falling, for those that are nowhere earlier; the number of stairs."""
    first, last = at, at
    if at > 0 and stairs_a[at - 1] == a:
        first -= 1
    while last < stairs and stairs_c[last] >= c:
        last += 1
    moved = first + 1 - last
    if moved > 0:
        for s in range(stairs - 1, last - 1, -1):
            stairs_a[s + moved], stairs_c[s + moved] = stairs_a[s], stairs_c[s]
    elif moved < 0:
        for s in range(last, stairs):
            stairs_a[s + moved], stairs_c[s + moved] = stairs_a[s], stairs_c[s]
    stairs_a[first], stairs_c[first] = a, c
    return stairs + moved


@njit(cache=True)
def _relaxed(by_link, by_device, shortest, busy, start, best):
    """A makespan that no split with work for the host goes below: experts cut into fractions, by bisection."""
    low, high = 0.0, best
    for _ in range(40):
        middle = (low + high) / 2
        if _hopeless(0, 0.0, start, busy, by_link, by_device, shortest, middle):
            low = middle
        else:
            high = middle
    return low
