"""Values that learn as they go: how soon each expert will be used again, foretold from what has just been used.

The value of expert e after a step of its layer is an estimate of E[gamma^(d - 1)], d the number of steps of this layer
until the next one that needs e: 1 for the next step, 0 for never; gamma says how far ahead a cache of this size has to
look. The estimate is what the expert's frequency p alone gives, p / (1 - gamma (1 - p)), and a linear function of the
layer's features x: which experts the latest steps used, here and at layers some way before and after, and running means
of this layer's uses. The step after says how good it was (temporal difference: Sutton, 1988),

    error = u + (1 - u) gamma v' - v      with u: used now, v the estimate of the step before, v' the one of now,

and moves the weights of the features that made the estimate, by gain x / (CALM + sum gain x^2) times the error. A
feature's gain falls with each lesson it gave (a Kalman filter's variance, the diagonal of it; NOISE keeps it alive), so
that few tokens teach much and many do not forget.

A guard runs two caches of names beside it, one by these values and one by frequency alone, and takes in each layer the
values of the one that has hit more of late.
"""

from __future__ import annotations

import numpy as np

from ...compiled import njit

REACH = (0, -1, 1, -3, 3, -8, 8)  # layers whose latest step is seen: those before are of this token, others of the last
RATES = (0.3, 0.05)  # of the running means
SLOW = 0.002  # of the frequency, once some hundred steps are seen
FIRST = 10  # steps unseen that the frequency begins with
CALM = 10.0
NOISE = 1e-5
WATCH = 0.005  # of the guard's memory
BLOCKS = len(REACH) + len(RATES)  # features, E each

# rows of State.memory, [L, E] each
LATEST = 0  # the latest step's experts, scaled
OFTEN = 1  # frequency
RECENT = 2  # running means
GAIN = RECENT + len(RATES)
SEEN = GAIN + BLOCKS  # the features of the latest step
FORETOLD = SEEN + BLOCKS  # the values by the weights, and by frequency alone
PLAIN = FORETOLD + 1
NAMES = PLAIN + 1  # who stands in the guard's two caches
ROWS = NAMES + 2
# State.notes: [0, L] how much more the plain values have hit of late, [1, L] steps seen
# State.numbers: slots of a layer, gamma (0: by slots and experts of a step), 1 with guard
# State.tables: [L, BLOCKS * E, E] the weights, which learn


@njit
def horizon(experts, slots):
    """gamma where a step needs so many `experts`: slots are replaced after 2 slots / experts steps, more or less."""
    return min(max(1 - experts / (2 * slots), 0.5), 0.95)


@njit
def foresight_step(policy, layer, ids):
    if not len(ids):
        return
    memory, notes = policy.memory, policy.notes
    experts = memory.shape[2]
    slots, gamma = policy.numbers[0], policy.numbers[1]
    if gamma == 0:
        gamma = horizon(len(ids), slots)
    used = np.zeros(experts)
    for e in ids:
        used[e] = 1
    x = _look(memory, notes, layer, used, len(ids))
    plain, now = memory[PLAIN, layer], np.empty(experts, np.float32)
    for e in range(experts):
        often = memory[OFTEN, layer, e]
        plain[e] = often / (1 - gamma * (1 - often))
        now[e] = plain[e]
    _foretell(policy.tables[layer], x, now)
    _learn(policy.tables[layer], memory, layer, used, now, gamma)
    memory[SEEN : SEEN + BLOCKS, layer] = x
    memory[FORETOLD, layer] = now
    if policy.numbers[2] > 0:
        ours = _hits(memory[NAMES, layer], memory[FORETOLD, layer], used, ids, slots)
        theirs = _hits(memory[NAMES + 1, layer], plain, used, ids, slots)
        notes[0, layer] += WATCH * ((theirs - ours) / len(ids) - notes[0, layer])
    policy.value[layer] = plain if notes[0, layer] > 0 else memory[FORETOLD, layer]


@njit
def _look(memory, notes, layer, used, n):
    """Brings frequency and means up to date; returns the features [BLOCKS, E]. What all experts share tells nothing:
    the more of them a step needs, the less it is heard."""
    layers, experts = memory.shape[1:]
    notes[1, layer] += 1
    slow = max(SLOW, 1 / (notes[1, layer] + FIRST))
    loud = np.sqrt((1 - n / experts) / n)
    x = np.zeros((BLOCKS, experts))
    for e in range(experts):
        memory[LATEST, layer, e] = loud * used[e]
        memory[OFTEN, layer, e] += slow * (used[e] - memory[OFTEN, layer, e])
    for b in range(len(REACH)):
        if 0 <= layer + REACH[b] < layers:
            x[b] = memory[LATEST, layer + REACH[b]]
    for r in range(len(RATES)):
        scale = loud * np.sqrt((2 - RATES[r]) / RATES[r])  # as much variance as a single step has
        for e in range(experts):
            memory[RECENT + r, layer, e] += RATES[r] * (used[e] - memory[RECENT + r, layer, e])
            x[len(REACH) + r, e] = scale * (memory[RECENT + r, layer, e] - memory[OFTEN, layer, e])
    return x


@njit
def _foretell(weights, x, value):
    """value [E] += x [BLOCKS, E] weights; most features are 0."""
    experts = len(value)
    for b in range(BLOCKS):
        for i in range(experts):
            if x[b, i] != 0:
                loud, row = np.float32(x[b, i]), weights[b * experts + i]
                for e in range(experts):
                    value[e] += loud * row[e]


@njit
def _learn(weights, memory, layer, used, now, gamma):
    """Moves the weights by the error of the latest step's values, which `used` and `now` tell."""
    experts = len(used)
    error = np.empty(experts, np.float32)
    for e in range(experts):
        later = gamma * min(max(now[e], np.float32(0)), np.float32(1))
        error[e] = (1 if used[e] > 0 else later) - memory[FORETOLD, layer, e]
    total = CALM
    for b in range(BLOCKS):
        for i in range(experts):
            total += memory[GAIN + b, layer, i] * memory[SEEN + b, layer, i] ** 2
    for b in range(BLOCKS):
        for i in range(experts):
            x, gain = memory[SEEN + b, layer, i], memory[GAIN + b, layer, i]
            if x != 0:
                step, row = np.float32(gain * x / total), weights[b * experts + i]
                for e in range(experts):
                    row[e] += step * error[e]
                gain -= (gain * x) ** 2 / total
            memory[GAIN + b, layer, i] = min(gain + NOISE, 1.0)


@njit
def _hits(here, value, used, ids, slots):
    """One step of a cache of names, here [E]: returns its hits, and takes the misses in."""
    hits, count = 0, 0
    for e in range(len(here)):
        count += here[e] > 0
        hits += here[e] > 0 and used[e] > 0
    for e in ids:
        if here[e] > 0:
            continue
        if count >= slots:
            out = -1
            for f in range(len(here)):
                if here[f] > 0 and used[f] == 0 and (out < 0 or value[f] < value[out]):
                    out = f
            if out < 0:  # all of it serves this step
                break
            here[out] = 0
        count += here[e] == 0 and count < slots
        here[e] = 1
    return hits


@njit
def fit_steps(policy, layer, offsets, ids):
    """Takes notice of steps [N], one after the other."""
    for n in range(len(layer)):
        foresight_step(policy, layer[n], ids[offsets[n] : offsets[n + 1]])
