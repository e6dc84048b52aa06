"""How far two traces of one model lie apart: between domains, or between yesterday and today.

A difference of two samples is never zero, so each figure stands beside what chance would make of it: the same tokens,
their sequences dealt out anew into two traces of these sizes. That is what a placement fitted on the one trace must
expect on more of the same; what goes beyond it is drift.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from .statistics import Source, Statistics, count_load, count_pairs, same_model, statistics

BLOCK = 128  # tokens that are dealt out together where a trace has no sequences


@dataclass(frozen=True)
class Mover:
    """An expert whose share of its layer's choices changed."""

    layer: int
    expert: int
    before: float
    after: float

    @property
    def change(self) -> float:
        return self.after - self.before


@dataclass(frozen=True, eq=False)
class Drift:
    """Total variations, half the sum of the differences between shares: 0 the same .. 1 nothing in common.

    tokens              T of either trace
    load                float64 [L]: of the experts' loads;  load_by_chance  what dealing out sequences makes of it
    transitions         float64 [L - 1]: of the pairs (expert, next layer's expert);  transitions_by_chance
    movers              the experts that gained or lost most, over all layers, the largest change first

    `str()` gives a report of a few lines.
    """

    tokens: tuple[int, int]
    load: NDArray[np.float64]
    load_by_chance: NDArray[np.float64]
    transitions: NDArray[np.float64]
    transitions_by_chance: NDArray[np.float64]
    movers: tuple[Mover, ...]

    def __str__(self) -> str:
        lines = [f"{self.tokens[0]:,} and {self.tokens[1]:,} tokens; total variation, mean of the layers (0 same .. 1)"]
        for name, found, chance in (
            ("load", self.load, self.load_by_chance),
            ("transitions", self.transitions, self.transitions_by_chance),
        ):
            if len(found):
                worst = int(np.argmax(found - chance))
                lines.append(
                    f"  {name:<12} {found.mean():.3f}, by chance {chance.mean():.3f}; most in layer {worst}: "
                    f"{found[worst]:.3f}, by chance {chance[worst]:.3f}"
                )
        lines += [
            f"  layer {m.layer}, expert {m.expert}: {100 * m.before:.2f}% -> {100 * m.after:.2f}% of the choices"
            for m in self.movers
        ]
        return "\n".join(lines)


def drift(a: Source, b: Source, *, movers: int = 5, seed: int = 0) -> Drift:
    """The Drift from trace (file) `a` to `b`. `seed` deals out the sequences. Files are gone through twice; some 30
    bytes a token are in memory.

    Raises ValueError where the traces are of different models or without tokens.
    """
    before, after = statistics(a), statistics(b)
    same_model(before, after, "both traces")
    for name, found in (("a", before), ("b", after)):
        if not found.tokens:
            raise ValueError(f"drift: {name} must have tokens, got none")
    load, transitions = _distances(before, after)
    by_chance = _distances(*_dealt_out((a, b), seed))
    return Drift(
        (before.tokens, after.tokens), load, by_chance[0], transitions, by_chance[1], _movers(before, after, movers)
    )


def total_variation(p: NDArray, q: NDArray) -> float:
    """Half the sum of the differences of two arrays of counts, each as shares of its total."""
    shares = [x / total if (total := x.sum()) else np.zeros(x.shape) for x in (p, q)]
    return float(abs(shares[0] - shares[1]).sum() / 2)


def _distances(a: Statistics, b: Statistics) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    load = np.array([total_variation(x, y) for x, y in zip(a.load, b.load, strict=True)])
    pairs = zip(a.transitions, b.transitions, strict=True)
    return load, np.array([total_variation(x.toarray(), y.toarray()) for x, y in pairs])


def _movers(a: Statistics, b: Statistics, count: int) -> tuple[Mover, ...]:
    before, after = (x.load / np.maximum(x.load.sum(1, keepdims=True), 1) for x in (a, b))
    largest = np.argsort(-abs(after - before), axis=None, kind="stable")[:count]
    at = zip(*np.unravel_index(largest, before.shape), strict=True)
    return tuple(Mover(int(m), int(e), float(before[m, e]), float(after[m, e])) for m, e in at)


def _dealt_out(sources: tuple[Source, Source], seed: int) -> tuple[Statistics, Statistics]:
    """The statistics of two parts of about the traces' sizes, each sequence of both in one part at random."""
    rng = np.random.default_rng(seed)
    share = sources[0].shape[1] / (sources[0].shape[1] + sources[1].shape[1])
    parts = []
    for source in sources:
        found = source.sequence
        sequence = np.arange(source.shape[1], dtype=np.int32) // BLOCK if found is None else found
        number = np.cumsum(np.diff(sequence, prepend=sequence[:1]) != 0)
        parts.append((rng.random(int(number[-1]) + 1) < share)[number])
    first, second = (_part(sources, [part == which for part in parts]) for which in (True, False))
    return first, second


def _part(sources: tuple[Source, Source], kept: list[NDArray[np.bool_]]) -> Statistics:
    """The statistics of the tokens kept [T] of each source."""
    layers, _, top_k = sources[0].shape
    experts = sources[0].num_experts
    load, transitions = np.zeros((layers, experts), np.int64), []
    for layer in range(layers):
        moves = np.zeros((experts, experts), np.int64)
        for source, mask in zip(sources, kept, strict=True):
            for ids, following in _kept(source, layer, mask):
                count_load(ids, source.none, load[layer])
                if following is not None:
                    count_pairs(ids, following, source.none, moves)
        if layer < layers - 1:
            transitions.append(csr_array(moves))
    return Statistics(experts, sum(int(mask.sum()) for mask in kept), top_k, load, tuple(transitions))


def _kept(source: Source, layer: int, mask: NDArray[np.bool_]) -> Iterator[tuple[NDArray, NDArray | None]]:
    at = 0
    if layer < source.shape[0] - 1:
        for ids, following in source.pairs(layer):
            here = mask[at : at + len(ids)]
            at += len(ids)
            yield ids[here], following[here]
    else:
        for ids in source.chunks(layer):
            here = mask[at : at + len(ids)]
            at += len(ids)
            yield ids[here], None
