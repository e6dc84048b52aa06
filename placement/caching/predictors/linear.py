"""A predictor that adds up tables: for each expert seen at earlier layers of the token a row, for what past tokens of
the sequence used at the layer a product; then a curve per layer makes it a probability.

One compiled function serves the live step and the whole trace, so that both have the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...compiled import njit
from .curve import Curve, follow

ROUND = 4  # the first layers have few before them; more of the token before tell later ones nothing


class Tables(NamedTuple):
    """What was learned. Layer l's block b = first[l] + r reads layer l - horizon - r of the same token; below 0 these
    are the last layers of the token before.

    first    int64 [L + 1]
    path     float32 [B, E, E]: what each expert there adds to the score of each expert here
    offset   float32 [B, E]: what a block adds on average; it is taken off where the layer was seen
    past     float32 [L, A, E, E]: the same for the means over past tokens
    rates    float64 [A]: how much of a mean each token leaves; 1: the plain mean of the sequence so far
    bias     float32 [L, E]
    horizon  how many layers ahead
    """

    first: NDArray[np.int64]
    path: NDArray[np.float32]
    offset: NDArray[np.float32]
    past: NDArray[np.float32]
    rates: NDArray[np.float64]
    bias: NDArray[np.float32]
    horizon: int


class Memory(NamedTuple):
    """What was seen of a sequence."""

    seen: NDArray[np.float32]  # [L, E] the share of the pass's tokens that used each expert
    means: NDArray[np.float32]  # [L, A, E] over past tokens, by rate
    tokens: NDArray[np.int64]  # [L] how many
    last: NDArray[np.int64]  # [L + 1] the pass in which each layer was seen, -2: none; the last layer seen
    now: NDArray[np.int64]  # [1] the pass


def blocks(layers: int, horizon: int, reach: int) -> NDArray[np.int64]:
    """`first` of Tables: each layer reads up to `reach` layers, `horizon` and more before it, at most ROUND of them of
    the token before, and none that this token has overtaken."""
    layer = np.arange(layers)
    held = np.clip(layer - horizon + 1 + np.minimum(ROUND, layers - layer), 0, reach)
    return np.concatenate([[0], np.cumsum(held)]).astype(np.int64)


def memory(tables: Tables) -> Memory:
    layers, means, experts = tables.past.shape[:3]
    found = Memory(
        np.zeros((layers, experts), np.float32),
        np.zeros((layers, means, experts), np.float32),
        np.zeros(layers, np.int64),
        np.zeros(layers + 1, np.int64),
        np.zeros(1, np.int64),
    )
    start(found)
    return found


@njit
def start(memory):
    """A sequence begins."""
    memory.means[:] = 0
    memory.tokens[:] = 0
    memory.last[:-1] = -2
    memory.last[-1] = -1
    memory.now[0] = 0


@njit
def move(means, rates, tokens, ids, experts):
    """Takes one token's ids [K] into means [A, E], of `tokens` before it."""
    for a in range(len(rates)):
        keep = np.float32(rates[a]) if rates[a] < 1 else np.float32(tokens / (tokens + 1))
        means[a] *= keep
        for e in ids:
            if 0 <= e < experts:
                means[a, e] += np.float32(1) - keep


@njit
def observe(tables, memory, layer, ids):
    """Takes notice of what the tokens of a pass used at `layer`: ids [T, K]; outside 0 .. E - 1: no expert."""
    experts = memory.seen.shape[1]
    if layer <= memory.last[-1]:  # the next pass has begun
        memory.now[0] += 1
    memory.last[-1] = layer
    memory.last[layer] = memory.now[0]
    seen = memory.seen[layer]
    seen[:] = 0
    for t in range(len(ids)):
        for e in ids[t]:
            if 0 <= e < experts:
                seen[e] += np.float32(1 / len(ids))
        move(memory.means[layer], tables.rates, memory.tokens[layer], ids[t], experts)
        memory.tokens[layer] += 1


@njit
def add_rows(out, weights, table):
    """out [E] += weights [E] table [E, E]; most weights are 0."""
    for e in range(len(weights)):
        if weights[e] != 0:
            for f in range(len(out)):
                out[f] += weights[e] * table[e, f]


@njit
def scores(tables, memory, layer, out):
    """Fills out [E] with the sums for the next tokens at `layer`."""
    out[:] = tables.bias[layer]
    come = memory.now[0] if layer > memory.last[-1] else memory.now[0] + 1  # the pass that these tokens are of
    for b in range(tables.first[layer], tables.first[layer + 1]):
        source = layer - tables.horizon - (b - tables.first[layer])
        wanted = come
        if source < 0:
            source, wanted = source + len(tables.bias), come - 1
        if memory.last[source] == wanted:
            add_rows(out, memory.seen[source], tables.path[b])
            out -= tables.offset[b]
    for a in range(len(tables.rates)):
        add_rows(out, memory.means[layer, a], tables.past[layer, a])


@njit
def walk(tables, memory, curve, ids, first, found):
    """Step by step through ids [L, t, K]: found [L, t, E] is what `scores` says before each step. first bool [t]: where
    sequences begin."""
    for t in range(ids.shape[1]):
        if first[t]:
            start(memory)
        for layer in range(len(ids)):
            scores(tables, memory, layer, found[layer, t])
            follow(curve, layer, found[layer, t])
            observe(tables, memory, layer, ids[layer, t : t + 1])


# Python pays for a tuple of arrays at each call, ten times as much as for the arrays: these two take them one by one.


@njit
def tell_now(first, path, offset, past, rates, bias, horizon, seen, means, tokens, last, now, score, chance, experts,
             layer, out):  # fmt: skip
    """`scores`, bent by the curve."""
    tables = Tables(first, path, offset, past, rates, bias, horizon)
    scores(tables, Memory(seen, means, tokens, last, now), layer, out)
    follow(Curve(score, chance, experts), layer, out)


@njit
def observe_now(first, path, offset, past, rates, bias, horizon, seen, means, tokens, last, now, layer, ids):
    """`observe`."""
    tables = Tables(first, path, offset, past, rates, bias, horizon)
    observe(tables, Memory(seen, means, tokens, last, now), layer, ids)


class Linear:
    """A predictor from Tables and a Curve. `twin` shares both: one for each sequence that is generated at once."""

    kind = "linear"

    def __init__(self, tables: Tables, curve: Curve) -> None:
        self.tables, self.curve = tables, curve
        self._memory = memory(tables)

    @property
    def shape(self) -> tuple[int, int]:
        """(L, E)."""
        return self.tables.bias.shape  # type: ignore[return-value]

    @property
    def horizon(self) -> int:
        return self.tables.horizon

    @property
    def bytes(self) -> int:
        """Memory of what was learned."""
        return sum(a.nbytes for a in (*self.tables, *self.curve) if isinstance(a, np.ndarray))

    def twin(self) -> Linear:
        return Linear(self.tables, self.curve)

    def token(self, token: int) -> None:
        """Token ids tell it nothing."""

    def start(self) -> None:
        start(self._memory)

    def observe(self, layer: int, ids: NDArray[np.int32]) -> None:
        observe_now(*self.tables, *self._memory, layer, ids)

    def scores(self, layer: int) -> NDArray[np.float32]:
        out = np.empty(self.shape[1], np.float32)
        tell_now(*self.tables, *self._memory, *self.curve, layer, out)
        return out

    def walk(self, ids: NDArray[np.int32], first: NDArray[np.bool_], tokens: NDArray | None) -> NDArray[np.float32]:
        found = np.empty((*ids.shape[:2], self.shape[1]), np.float32)
        walk(self.tables, self._memory, self.curve, ids, first, found)
        return found

    def arrays(self) -> dict[str, NDArray]:
        tables = {name: np.asarray(value) for name, value in self.tables._asdict().items()}
        return tables | self.curve._asdict()

    @classmethod
    def of(cls, arrays: dict[str, NDArray]) -> Linear:
        first, path, offset, past, rates, bias, horizon = (arrays[name] for name in Tables._fields)
        tables = Tables(first, path, offset, past, rates, bias, int(horizon))
        return cls(tables, Curve(arrays["score"], arrays["chance"], arrays["experts"]))
