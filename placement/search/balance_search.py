"""The inner loops of `balance.py`: one layer, or one node of it, compiled.

State: `held` [S] the expert of each slot (GPU g has slots first[g] .. first[g + 1] - 1), `on` bool [E, G] its inverse,
`copies` [E], `time` [G] what each GPU has to do over its speed. Every step makes the busiest GPU, or one of several
that are equally busy, less busy and no other as busy as it was, so that a descent ends.
"""

from __future__ import annotations

import numpy as np
from numba import njit

SLACK = 1e-12  # of the largest time: what counts as less
PATIENCE = 20
MANY = 10  # changes of a strong kick


@njit(cache=True)
def search(load, first, speed, pinned, start, beat, goal, kicks, seed):
    """(held int64 [S], its largest time) for load float64 [E], first int64 [G + 1], speed [G], pinned bool [E, G].

    start   int64 [S], a plan to be not worse than, or empty; replicas that share a GPU are parted first
    beat    a largest time to reach: while the best is above it, kicks go on, up to PATIENCE times their number
    goal    a largest time that is good enough: the search ends there
    kicks   random disturbances, a descent after each; below 0: not even a first descent
    """
    np.random.seed(seed)
    held, on, copies, time = _greedy(load, first, speed, pinned)
    if kicks < 0:
        return held, time.max()
    _descend(load, first, speed, pinned, held, on, copies, time)
    if len(start):
        other = _adopted(load, first, speed, start)
        _descend(load, first, speed, pinned, other[0], other[1], other[2], other[3])
        if other[3].max() < time.max():
            held, on, copies, time = other
    best = held.copy(), on.copy(), copies.copy(), time.copy()
    for kick in range(PATIENCE * kicks):
        if best[3].max() <= beat and (kick >= kicks or best[3].max() <= goal):
            break
        _kick(load, first, speed, pinned, held, on, copies, time)
        _descend(load, first, speed, pinned, held, on, copies, time)
        if time.max() <= best[3].max():
            _copy((held, on, copies, time), best)
        else:
            _copy(best, (held, on, copies, time))
    return best[0], best[3].max()


@njit(cache=True)
def _copy(state, into):
    for slot in range(len(state[0])):
        into[0][slot] = state[0][slot]
    for e in range(len(state[1])):
        into[2][e] = state[2][e]
        for g in range(len(state[3])):
            into[1][e, g] = state[1][e, g]
    for g in range(len(state[3])):
        into[3][g] = state[3][g]


@njit(cache=True)
def _time(load, first, speed, held, copies, gpu):
    total = 0.0
    for slot in range(first[gpu], first[gpu + 1]):
        total += load[held[slot]] / copies[held[slot]]
    return total / speed[gpu]


@njit(cache=True)
def _times(load, first, speed, held, copies):
    time = np.empty(len(speed))
    for gpu in range(len(speed)):
        time[gpu] = _time(load, first, speed, held, copies, gpu)
    return time


@njit(cache=True)
def _counted(on):
    """The copies [E] of each expert. A loop, because numba takes seconds to compile a sum over one axis."""
    copies = np.zeros(len(on), np.int64)
    for e in range(len(on)):
        for there in on[e]:
            copies[e] += there
    return copies


@njit(cache=True)
def _replicas(load, pinned, slots):
    """Copies [E], `slots` in all: always one more of the expert with most load per copy, which makes the largest load
    per copy as small as can be."""
    gpus = pinned.shape[1]
    copies = np.maximum(_counted(pinned), 1)
    for _ in range(slots - copies.sum()):
        expert, most = -1, -1.0
        for e in range(len(load)):
            if copies[e] < gpus and load[e] / copies[e] > most:
                expert, most = e, load[e] / copies[e]
        copies[expert] += 1
    return copies


@njit(cache=True)
def _greedy(load, first, speed, pinned):
    """The state after: pins; then the heaviest replica to the GPU that would finish it first; then what is left over.

    A first replica always finds a slot, since there are as many slots as replicas. A later one does not where every GPU
    with room has the expert: its slot is left over.
    """
    experts, gpus = pinned.shape
    copies = _replicas(load, pinned, first[gpus])
    held, on, used = np.full(first[gpus], -1), np.zeros(pinned.shape, np.bool_), first[:gpus].copy()
    work = np.zeros(gpus)
    for e in range(experts):
        for g in range(gpus):
            if pinned[e, g]:
                held[used[g]], on[e, g] = e, True
                used[g] += 1
                work[g] += load[e] / copies[e]
    share_of = load / copies
    for _ in range(experts):
        e = share_of.argmax()
        share, share_of[e] = share_of[e], -1.0
        for _ in range(copies[e] - on[e].sum()):
            to, least = -1, np.inf
            for g in range(gpus):
                if used[g] < first[g + 1] and not on[e, g] and (work[g] + share) / speed[g] < least:
                    to, least = g, (work[g] + share) / speed[g]
            if to < 0:
                break
            held[used[to]], on[e, to] = e, True
            used[to] += 1
            work[to] += share
    return _filled(load, first, speed, held, on)


@njit(cache=True)
def _adopted(load, first, speed, start):
    """The state of a plan. The second replica of an expert on a GPU changes places with one of another GPU, so that the
    busier of the two is least busy; if there is none, its slot is left over."""
    held, there = start.copy(), np.zeros((len(load), len(speed)), np.int64)
    copies = np.zeros(len(load), np.int64)
    for g in range(len(speed)):
        for s in range(first[g], first[g + 1]):
            there[held[s], g] += 1
            copies[held[s]] += 1
    time = _times(load, first, speed, held, copies)
    for g in range(len(speed)):
        for s in range(first[g], first[g + 1]):
            a, least, other, to = held[s], np.inf, -1, -1
            if there[a, g] == 1:
                continue
            for h in range(len(speed)):
                for p in range(first[h], first[h + 1]):
                    b = held[p]
                    if there[a, h] or there[b, g] or there[b, h] > 1:
                        continue
                    less = load[a] / copies[a] - load[b] / copies[b]
                    after = max(time[g] - less / speed[g], time[h] + less / speed[h])
                    if after < least:
                        least, other, to = after, p, h
            if other < 0:
                continue
            there[a, g] -= 1
            there[held[other], to], there[held[other], g], there[a, to] = 0, 1, 1
            held[s], held[other] = held[other], a
            time[g] = _time(load, first, speed, held, copies, g)
            time[to] = _time(load, first, speed, held, copies, to)
    return _filled(load, first, speed, _without_seconds(held, first, there.shape), there > 0)


@njit(cache=True)
def _without_seconds(held, first, shape):
    """`held` with -1 for an expert that its GPU has in a slot before."""
    seen = np.zeros(shape, np.bool_)
    for g in range(shape[1]):
        for s in range(first[g], first[g + 1]):
            if seen[held[s], g]:
                held[s] = -1
            else:
                seen[held[s], g] = True
    return held


@njit(cache=True)
def _filled(load, first, speed, held, on):
    """The state with slots left over (-1) given to the expert, of those not on the GPU, with most load per copy."""
    copies = _counted(on)
    for g in range(len(speed)):
        for slot in range(first[g], first[g + 1]):
            if held[slot] < 0:
                expert, most = -1, -1.0
                for e in range(len(load)):
                    if not on[e, g] and load[e] / copies[e] > most:
                        expert, most = e, load[e] / copies[e]
                held[slot], on[expert, g] = expert, True
                copies[expert] += 1
    return held, on, copies, _times(load, first, speed, held, copies)


@njit(cache=True)
def _descend(load, first, speed, pinned, held, on, copies, time):
    while _swap(load, first, speed, pinned, held, on, copies, time) or _recount(
        load, first, speed, pinned, held, on, copies, time
    ):
        pass


@njit(cache=True)
def _swap(load, first, speed, pinned, held, on, copies, time):
    """Exchanges a replica of the busiest GPU with one of another, so that the busier of the two is least busy."""
    g = time.argmax()
    least = time[g] * (1 - SLACK)
    mine, theirs, other = -1, -1, -1
    for s in range(first[g], first[g + 1]):
        a = held[s]
        if pinned[a, g]:
            continue
        for h in range(len(speed)):
            if h == g or on[a, h]:
                continue
            for p in range(first[h], first[h + 1]):
                b = held[p]
                less = load[a] / copies[a] - load[b] / copies[b]
                if less <= 0 or on[b, g] or pinned[b, h]:
                    continue
                after = max(time[g] - less / speed[g], time[h] + less / speed[h])
                if after < least:
                    least, mine, theirs, other = after, s, p, h
    if mine < 0:
        return False
    _exchange(load, first, speed, held, on, copies, time, mine, g, theirs, other)
    return True


@njit(cache=True)
def _exchange(load, first, speed, held, on, copies, time, s, g, p, h):
    a, b = held[s], held[p]
    on[a, g], on[b, h], on[a, h], on[b, g] = False, False, True, True
    held[s], held[p] = b, a
    time[g] = _time(load, first, speed, held, copies, g)
    time[h] = _time(load, first, speed, held, copies, h)


@njit(cache=True)
def _recount(load, first, speed, pinned, held, on, copies, time):
    """Gives the slot of one replica to another expert, so that the busiest GPU touched is least busy: on the busiest
    GPU any expert for one of its own, elsewhere one more replica of an expert of the busiest GPU."""
    g = time.argmax()
    least = time[g] * (1 - SLACK)
    where, new, at = -1, -1, -1
    for h in range(len(speed)):
        for s in range(first[h], first[h + 1]):
            x = held[s]
            if copies[x] < 2 or pinned[x, h] or (h != g and on[x, g]):
                continue
            if h == g:
                for b in range(len(load)):
                    if not on[b, h]:
                        after = _after(load, speed, on, copies, time, g, h, x, b, least)
                        if after < least:
                            least, where, new, at = after, s, b, h
            else:
                for p in range(first[g], first[g + 1]):
                    b = held[p]
                    if not on[b, h]:
                        after = _after(load, speed, on, copies, time, g, h, x, b, least)
                        if after < least:
                            least, where, new, at = after, s, b, h
    if where < 0:
        return False
    _give(load, first, speed, held, on, copies, time, where, at, new)
    return True


@njit(cache=True)
def _after(load, speed, on, copies, time, g, h, x, b, least):
    """The largest time of GPUs that have x or b, and of g, after a slot of h went from x to b; inf from `least` on."""
    more = load[x] / (copies[x] - 1) - load[x] / copies[x]
    less = load[b] / copies[b] - load[b] / (copies[b] + 1)
    worst = time[h] + (load[b] / (copies[b] + 1) - load[x] / copies[x]) / speed[h]
    if worst >= least:
        return np.inf
    for k in range(len(speed)):
        if k != h and (on[x, k] or k == g):
            change = (more if on[x, k] else 0.0) - (less if on[b, k] else 0.0)
            worst = max(worst, time[k] + change / speed[k])
            if worst >= least:
                return np.inf
    return worst


@njit(cache=True)
def _give(load, first, speed, held, on, copies, time, slot, h, b):
    x = held[slot]
    held[slot] = b
    copies[x] -= 1
    copies[b] += 1
    on[x, h], on[b, h] = False, True
    for k in range(len(speed)):
        if k == h or on[x, k] or on[b, k]:
            time[k] = _time(load, first, speed, held, copies, k)


@njit(cache=True)
def _kick(load, first, speed, pinned, held, on, copies, time):
    """A few random changes, one time in eight many, whatever they cost: a slot goes to another expert, often one of
    the busiest GPU, or two GPUs, often the busiest among them, exchange a replica."""
    slots, gpus = len(held), len(speed)
    for _ in range(1 + np.random.randint(3 if np.random.randint(8) else MANY)):
        g = time.argmax() if np.random.randint(2) else np.random.randint(gpus)
        p = np.random.randint(slots)
        h = np.searchsorted(first, p, side="right") - 1
        a = held[p]
        if pinned[a, h] or first[g] == first[g + 1]:
            continue
        s = first[g] + np.random.randint(first[g + 1] - first[g])
        b = held[s]
        if on[b, h]:
            continue
        if copies[a] > 1 and np.random.randint(2):
            _give(load, first, speed, held, on, copies, time, p, h, b)
        elif not pinned[b, g] and not on[a, g]:
            _exchange(load, first, speed, held, on, copies, time, s, g, p, h)
