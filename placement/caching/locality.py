"""How local a routing is, without a cache's details: SRP and SCH of the LRC study of MoE models ("local routing
consistency").

SRP(s), the segment routing best performance: if one set of experts had to serve s tokens in a row, chosen with the
tokens in sight, how well could it fit? SCH(s, m), the segment cache best hit rate: what a cache of m experts would hit
that sees s tokens ahead.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..compiled import njit
from ..traces.trace import Trace

LEVELS = ("model", "layer", "expert")


@dataclass(frozen=True)
class Srp:
    """Arrays of shape (), [L] or [L, E] by level: `value`; `theta`, the least count that selects a window and an
    expert; `rho`, the best group's size: experts selected for a token, over those that it uses. `low`, `high`: the 95%
    interval of the value over resampled sequences, NaN where it was not asked for."""

    value: NDArray[np.float64]
    theta: NDArray[np.int64]
    rho: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


def srp(trace: Trace, s: int, level: str = "model", *, resamples: int = 0, seed: int = 0) -> Srp:
    """SRP over all windows of s tokens (stride 1, none across sequences).

    A window and an expert with at least theta activations count as selected. With `matches` the activations selected,
    `preds` s for each pair selected and `acts` all activations, SRP is the largest 2 matches / (preds + acts) over
    theta, an F1 score. One theta for the whole model, for each layer or for each expert, by `level`; without a window
    or an activation the value is 0. Intervals are for sequences: `resamples` draws with replacement. Memory: 8 s bytes
    for a layer and sequence, or for a layer and expert.

    Raises ValueError for s below 1 or above 65535, another level, or resamples of a level "expert" or of one sequence.
    """
    if not 1 <= s <= 65535:
        raise ValueError(f"srp: s must be 1 .. 65535, got {s}")
    if level not in LEVELS:
        raise ValueError(f"srp: level must be one of {', '.join(LEVELS)}, got {level!r}")
    tokens = trace.shape[1]
    part = np.zeros(tokens, np.int64) if trace.sequence is None else _numbered(trace.sequence)
    parts = int(part[-1]) + 1 if tokens else 0
    if resamples and (level == "expert" or parts < 2):
        raise ValueError(f"srp: resamples must come with several sequences and a level of model or layer, got {level}")
    alone = level == "expert"
    axes: tuple[int, ...] = {"model": (0, 1), "layer": (1,), "expert": ()}[level]
    counts = _windows(trace.expert_ids, trace.none, trace.num_experts, alone, part, s).sum(axes)
    value, theta, rho = _best(counts, s)
    low, high = np.full(value.shape, np.nan), np.full(value.shape, np.nan)
    if resamples:
        each = np.stack([_of_part(trace, part == p, s, axes) for p in range(parts)])
        draws = np.random.default_rng(seed).multinomial(parts, np.full(parts, 1 / parts), resamples)
        drawn = np.tensordot(draws, each, 1)
        low, high = np.quantile(_best(drawn, s)[0], (0.025, 0.975), axis=0)
    return Srp(value, theta, rho, low, high)


def _numbered(sequence: NDArray[np.int32]) -> NDArray[np.int64]:
    return np.cumsum(np.diff(sequence, prepend=sequence[:1]) != 0)


def _of_part(trace: Trace, tokens: NDArray[np.bool_], s: int, axes: tuple[int, ...]) -> NDArray[np.int64]:
    ids = np.ascontiguousarray(trace.expert_ids[:, tokens])
    return _windows(ids, trace.none, trace.num_experts, False, np.zeros(ids.shape[1], np.int64), s).sum(axes)


@njit
def _windows(expert_ids, none, experts, alone, part, s):
    """[L, E, s + 1]: how many windows inside one part have so many activations of each expert; where not each `alone`,
    of all together, [L, 1, s + 1]."""
    layers, tokens, top_k = expert_ids.shape
    found = np.zeros((layers, experts if alone else 1, s + 1), np.int64)
    for layer in range(layers):
        count = np.zeros(experts, np.int64)
        first = 0
        for t in range(tokens):
            if part[t] != part[first]:
                count[:] = 0
                first = t
            if t - first == s:
                for k in range(top_k):
                    if expert_ids[layer, first, k] != none:
                        count[expert_ids[layer, first, k]] -= 1
                first += 1
            for k in range(top_k):
                if expert_ids[layer, t, k] != none:
                    count[expert_ids[layer, t, k]] += 1
            if t - first == s - 1:
                for e in range(experts):
                    found[layer, e if alone else 0, count[e]] += 1
    return found


def _best(counts: NDArray[np.int64], s: int) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]:
    """(value, theta, rho) of numbers of windows by their activations, [..., s + 1]."""
    size = np.arange(s + 1)

    def at_least(x: NDArray) -> NDArray:
        return np.flip(np.cumsum(np.flip(x, -1), -1), -1)[..., 1:]  # theta 1 .. s

    matches, preds = at_least(counts * size), s * at_least(counts)
    acts = (counts * size).sum(-1, keepdims=True)
    score = 2 * matches / np.maximum(preds + acts, 1)
    best = score.argmax(-1)[..., None]
    value, chosen = np.take_along_axis(score, best, -1)[..., 0], np.take_along_axis(preds, best, -1)
    return value, best[..., 0] + 1, (chosen / np.maximum(acts, 1))[..., 0]


@dataclass(frozen=True)
class Sch:
    """hits int64 [L, E + 1]: how many activations a cache of m experts finds, at m; uses int64 [L]: of how many."""

    hits: NDArray[np.int64]
    uses: NDArray[np.int64]

    def recall(self, m: int) -> float:
        """The share found by m slots in every layer; 1 where there was nothing to find."""
        return float(self.hits[:, m].sum() / self.uses.sum()) if self.uses.any() else 1.0


def sch(trace: Trace, s: int) -> Sch:
    """SCH for every cache size in one pass: a stack of experts, the first m of which are what m slots hold.

    A token's experts are looked up at once, and then hold the first places. Among the others, the one that leaves a
    cache is that with the fewest uses in the next s tokens; of these, the least recently used; of these, the lowest.
    s = 0 is LRU. Each layer has a cache of its own, of at least K slots to mean anything. The tokens ahead go on over
    the ends of sequences, as the cache does. Raises ValueError for a negative s.
    """
    if s < 0:
        raise ValueError(f"sch: s must not be negative, got {s}")
    return Sch(*_stacks(trace.expert_ids, trace.none, trace.num_experts, s))


@njit
def _stacks(expert_ids, none, experts, s):
    layers, tokens, top_k = expert_ids.shape
    hits, uses = np.zeros((layers, experts + 1), np.int64), np.zeros(layers, np.int64)
    for layer in range(layers):
        stack, height = np.empty(experts, np.int64), 0
        ahead, last = np.zeros(experts, np.int64), np.full(experts, -1, np.int64)
        for t in range(min(s, tokens)):
            for k in range(top_k):
                if expert_ids[layer, t, k] != none:
                    ahead[expert_ids[layer, t, k]] += 1
        for t in range(tokens):
            for k in range(top_k):  # the window is now t + 1 .. t + s
                e = expert_ids[layer, t, k]
                if e != none:
                    if s:
                        ahead[e] -= 1
                    last[e] = t
                if s and t + s < tokens and expert_ids[layer, t + s, k] != none:
                    ahead[expert_ids[layer, t + s, k]] += 1
            for d in range(height):
                hits[layer, d + 1] += last[stack[d]] == t
            for k in range(top_k):
                if expert_ids[layer, t, k] != none:
                    height = _to_the_top(stack, height, expert_ids[layer, t, k], ahead, last, t)
            for d in range(height):
                uses[layer] += last[stack[d]] == t
        for m in range(experts):
            hits[layer, m + 1] += hits[layer, m]
    return hits, uses


@njit
def _to_the_top(stack, height, e, ahead, last, now):
    """Mattson et al. (1970): e takes the first place, and on the way down to where it stood the less worthy of two goes
    on. Returns the new height."""
    carried = e
    for d in range(height):
        other = stack[d]
        if d == 0 or other == e:
            stack[d] = carried
            carried = other
            if other == e:
                return height
            continue
        mine, its = (last[carried] == now), (last[other] == now)
        if (mine, ahead[carried], last[carried], carried) > (its, ahead[other], last[other], other):
            stack[d] = carried
            carried = other
    stack[height] = carried
    return height + 1
