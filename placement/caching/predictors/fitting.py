"""How the tables of placement/caching/predictors/linear.py are learned: popularity, transitions, ridge regression.

Each function takes a trace and which tokens are held back, and gives the tables of the others and those of all: the
first so that a curve can be fitted on tokens that the tables have not seen.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...compiled import njit
from ...traces.trace import Trace
from .linear import Tables, blocks, move

CHUNK = 4096  # tokens at a time


def ids_of(trace: Trace) -> NDArray[np.int32]:
    """int32 [L, T, K], -1: no expert. In C order, also of selected tokens: what reads it is compiled for one order."""
    return np.ascontiguousarray(np.where(trace.live, trace.expert_ids.astype(np.int32), np.int32(-1)))


def experts_of(trace: Trace) -> NDArray[np.int32]:
    """int32 [L]: E of each layer."""
    return np.array([trace.experts(layer) for layer in range(trace.shape[0])], np.int32)


def beginnings(trace: Trace) -> NDArray[np.bool_]:
    """bool [T]: the first token of each sequence."""
    first = np.zeros(trace.shape[1], np.bool_)
    first[:1] = True
    if trace.sequence is not None:
        first[1:] = np.diff(trace.sequence) != 0
    return first


def held_back(trace: Trace, share: int = 5) -> NDArray[np.bool_]:
    """bool [T]: every fifth sequence; the last fifth of the tokens where there are fewer than five sequences."""
    number = np.cumsum(beginnings(trace)) - 1
    if number[-1] + 1 >= share:
        return number % share == share - 1
    return np.arange(len(number)) >= len(number) - len(number) // share


@njit
def used(ids, experts):
    """float32 [T, E]: 1 for each expert that a token of ids [T, K] uses."""
    out = np.zeros((len(ids), experts), np.float32)
    for t in range(len(ids)):
        for e in ids[t]:
            if 0 <= e < experts:
                out[t, e] = 1
    return out


@njit
def means_before(ids, first, rates, experts):
    """float32 [T, A, E]: the means over the past of each token of ids [T, K], itself left out."""
    out = np.zeros((len(ids), len(rates), experts), np.float32)
    state, tokens = np.zeros((len(rates), experts), np.float32), 0
    for t in range(len(ids)):
        if first[t]:
            state[:] = 0
            tokens = 0
        out[t] = state
        move(state, rates, tokens, ids[t], experts)
        tokens += 1
    return out


def before(ids: NDArray[np.int32], first: NDArray[np.bool_], source: int) -> NDArray[np.int32]:
    """What Tables' blocks read for `source`: ids [T, K] of that layer; below 0 of the layer so far from the end, of the
    token before; -1 where a sequence is `first`."""
    if source >= 0:
        return ids[source]
    return np.where(first[:, None], np.int32(-1), np.roll(ids[source], 1, 0))


def _no_tables(trace: Trace, horizon: int, reach: int, rates: tuple[float, ...]) -> Tables:
    layers, experts = trace.shape[0], trace.num_experts
    first = blocks(layers, horizon, reach)
    return Tables(
        first,
        np.zeros((first[-1], experts, experts), np.float32),
        np.zeros((first[-1], experts), np.float32),
        np.zeros((layers, len(rates), experts, experts), np.float32),
        np.array(rates, np.float64),
        np.zeros((layers, experts), np.float32),
        horizon,
    )


def popular(trace: Trace, held: NDArray[np.bool_], horizon: int) -> tuple[Tables, Tables]:
    """How often each expert was used, whatever went before."""
    found = []
    for part in (trace.select(~held), trace):
        tables = _no_tables(trace, horizon, 0, ())
        for layer, ids in enumerate(ids_of(part)):
            tables.bias[layer] = used(ids, trace.num_experts).mean(0)
        found.append(tables)
    return found[0], found[1]


def transition(trace: Trace, held: NDArray[np.bool_], horizon: int) -> tuple[Tables, Tables]:
    """log P(f) + the sum over the experts e seen `horizon` layers before of log P(f | e) / P(f), with as much weight
    for P(f) as for one token that used e: facts of the layer before alone, as if experts were independent."""
    found = []
    for part in (trace.select(~held), trace):
        tables = _no_tables(trace, horizon, 1, ())
        ids, first, tokens = ids_of(part), beginnings(part), part.shape[1]
        for layer in range(len(ids)):
            now = used(ids[layer], trace.num_experts)
            share = (now.sum(0) + 1) / (tokens + trace.num_experts)
            tables.bias[layer] = np.log(share)
            for block in range(*tables.first[layer : layer + 2]):
                seen = used(before(ids, first, layer - horizon), trace.num_experts)
                given = (seen.T @ now + share) / (seen.sum(0)[:, None] + 1)
                tables.path[block] = np.log(given / share)
                tables.offset[block] = seen.mean(0) @ tables.path[block]
                tables.bias[layer] += tables.offset[block]
        found.append(tables)
    return found[0], found[1]


def reach_of(trace: Trace, rates: int, most: int = 2048) -> int:
    """How many earlier layers keep a regression at `most` unknowns for each expert: at least one."""
    return max(1, min(trace.shape[0], most // trace.num_experts - rates))


def ridge(
    trace: Trace,
    held: NDArray[np.bool_],
    horizon: int,
    reach: int,
    rates: tuple[float, ...],
    penalties: tuple[float, ...],
) -> tuple[Tables, Tables]:
    """Least squares of whether a token uses an expert on which experts it used up to `reach` layers before, and on the
    means over its past at the layer, with a penalty on squared weights: for each layer the one of `penalties` that is
    best on the tokens held back. By normal equations, on centred columns; the constant is free."""
    part, full = (_no_tables(trace, horizon, reach, rates) for _ in range(2))
    ids, first, experts = ids_of(trace), beginnings(trace), trace.num_experts
    first = first | (held & ~np.roll(held, 1)) | (~held & np.roll(held, 1))
    for layer in range(len(ids)):
        count = int(part.first[layer + 1] - part.first[layer])
        sources = [before(ids, first, layer - horizon - r) for r in range(count)]
        past = means_before(ids[layer], first, part.rates, experts).reshape(len(first), -1)
        sums = [Sums.of(sources, past, ids[layer], np.flatnonzero(which), experts) for which in (~held, held)]
        tries = [sums[0].solve(penalty) for penalty in penalties]
        best = int(np.argmin([sums[1].error(*answer) for answer in tries]))
        both = sums[0] + sums[1]
        for tables, total, answer in ((part, sums[0], tries[best]), (full, both, both.solve(penalties[best]))):
            _fill(tables, layer, total, *answer)
    return part, full


def _fill(tables: Tables, layer: int, total: Sums, weights: NDArray, constant: NDArray) -> None:
    """Writes one layer's answer into its tables; what path blocks add on average goes into `offset`."""
    first, last = tables.first[layer : layer + 2]
    experts = tables.bias.shape[1]
    rows = (last - first) * experts
    tables.path[first:last] = weights[:rows].reshape(-1, experts, experts)
    mean = total.mean[:rows].reshape(-1, 1, experts)
    tables.offset[first:last] = (mean @ tables.path[first:last])[:, 0]
    tables.past[layer] = weights[rows:].reshape(-1, experts, experts)
    tables.bias[layer] = constant + tables.offset[first:last].sum(0)


class Sums:
    """The sums of normal equations: tokens n, features f [D], targets y [E], f f' [D, D], f y' [D, E], y y."""

    def __init__(self, tokens: int, f: NDArray, y: NDArray, ff: NDArray, fy: NDArray, yy: float) -> None:
        self.tokens, self.f, self.y, self.ff, self.fy, self.yy = tokens, f, y, ff, fy, yy
        self.mean = f / max(tokens, 1)

    @classmethod
    def of(cls, sources: list[NDArray], past: NDArray, ids: NDArray, which: NDArray, experts: int) -> Sums:
        """Over the tokens `which`, a chunk at a time; products in float32, sums of chunks in float64."""
        size = len(sources) * experts + past.shape[1]
        total = cls(0, np.zeros(size), np.zeros(experts), np.zeros((size, size)), np.zeros((size, experts)), 0.0)
        for begin in range(0, len(which), CHUNK):
            some = which[begin : begin + CHUNK]
            f = np.concatenate([*(used(source[some], experts) for source in sources), past[some]], 1)
            y = used(ids[some], experts)
            total += cls(len(some), f.sum(0, np.float64), y.sum(0, np.float64), f.T @ f, f.T @ y, float(y.sum()))
        return total

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.tokens + other.tokens,
            self.f + other.f,
            self.y + other.y,
            self.ff + other.ff,
            self.fy + other.fy,
            self.yy + other.yy,
        )

    def solve(self, penalty: float) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """(weights [D, E], constant [E]) of least squares + penalty * squared weights."""
        from scipy.linalg import cho_factor, cho_solve  # 20 MB, which only those pay who fit

        left = self.ff - np.outer(self.f, self.mean)
        left[np.diag_indices(len(left))] += penalty
        right = self.fy - np.outer(self.mean, self.y)
        weights = cho_solve(cho_factor(left.astype(np.float32), overwrite_a=True), right.astype(np.float32))
        return weights, self.y / max(self.tokens, 1) - self.mean @ weights

    def error(self, weights: NDArray, constant: NDArray) -> float:
        """The sum of squares that an answer leaves."""
        ones = float((weights * (self.ff @ weights)).sum() - 2 * (weights * self.fy).sum() + self.yy)
        return ones + float(constant @ (self.tokens * constant + 2 * (self.f @ weights) - 2 * self.y))
