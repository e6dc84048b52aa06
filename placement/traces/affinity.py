"""What a trace says about its experts: how loaded they are, and how well one layer's choice foretells the next one's.

Source: inter-layer expert affinity after Yao et al., "Exploiting Inter-Layer Expert Affinity for Accelerating
Mixture-of-Experts Model Inference" (ExFlow, 2024), section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .statistics import Source, count_load, count_pairs
from .trace import Trace


def expert_load(trace: Trace) -> NDArray[np.int64]:
    """int64 [L, E]: how many tokens chose each expert. Layers with fewer than E experts have zeros at the end."""
    load = np.zeros((len(trace.expert_ids), trace.num_experts), np.int64)
    for ids, found in zip(trace.expert_ids, load, strict=True):
        count_load(ids, trace.none, found)
    return load


def imbalance(load: NDArray[np.integer]) -> NDArray[np.float64]:
    """float64 [L]: load [L, E] of the busiest expert over the mean load; 1 is perfect balance, 0 an unused layer."""
    mean = load.mean(axis=-1)
    return np.divide(load.max(axis=-1), mean, out=np.zeros(len(load)), where=mean > 0)


def transition_counts(trace: Trace, layer: int, step: int = 1) -> NDArray[np.int64]:
    """int64 [E, E]: entry (a, b) counts the tokens that use expert a in `layer` and expert b in `layer + step`.

    A token with K experts on both sides counts K * K times. Raises IndexError where one of the layers is not there.
    """
    layers = trace.expert_ids.shape[0]
    if not (0 <= layer < layers and 0 <= layer + step < layers):
        raise IndexError(f"transition_counts: layer and layer + step must be in 0 .. {layers - 1}, got {layer}, {step}")
    return _pairs(trace.expert_ids[layer], trace.expert_ids[layer + step], trace)


def co_activation(trace: Trace, layer: int) -> NDArray[np.int64]:
    """int64 [E, E], symmetric: tokens that use both experts in `layer`; the diagonal is the load."""
    ids = trace.expert_ids[layer]
    return _pairs(ids, ids, trace)


def _pairs(before: NDArray, after: NDArray, trace: Trace) -> NDArray[np.int64]:
    counts = np.zeros((trace.num_experts, trace.num_experts), np.int64)
    count_pairs(before, after, trace.none, counts)
    return counts


@dataclass(frozen=True)
class Affinity:
    """How far the expert used in one layer foretells the expert used in the next.

    `predicted`: the share of transitions that go to one of the `best` most frequent successors of the expert they
    come from. `independent`: the share that the same rule catches when the next layer's choice ignores the expert
    before it, that is, the share of its `best` busiest experts. Both in 0 .. 1; predicted >= independent. On few
    tokens `predicted` is flattered by chance: compare with the same trace, tokens shuffled (`shuffled`).
    """

    layer: int
    best: int
    predicted: float
    independent: float
    shuffled: float

    @property
    def lift(self) -> float:
        """predicted / shuffled: 1 where the layers know nothing of each other, 0 without transitions."""
        return self.predicted / self.shuffled if self.shuffled else 0.0


def affinity(trace: Source, best: int | None = None, seed: int = 0) -> list[Affinity]:
    """One `Affinity` for each pair of consecutive layers, L - 1 in all; `best` is K unless given.

    `seed` draws the one permutation of the tokens behind `shuffled` (of a TraceFile: of each chunk's).
    """
    layers, _, top_k = trace.shape
    best = top_k if best is None else best
    if not 0 < best <= trace.num_experts:
        raise ValueError(f"affinity: best must be 1 .. E={trace.num_experts}, got {best}")
    size = (trace.num_experts, trace.num_experts)
    found = []
    for layer in range(layers - 1):
        rng, counts, chance = np.random.default_rng(seed), np.zeros(size, np.int64), np.zeros(size, np.int64)
        for before, after in trace.pairs(layer):
            count_pairs(before, after, trace.none, counts)
            count_pairs(before, after[rng.permutation(len(after))], trace.none, chance)
        found.append(
            Affinity(
                layer,
                best,
                predicted=_caught(counts, best),
                independent=_share(np.sort(counts.sum(0))[-best:].sum(), counts.sum()),
                shuffled=_caught(chance, best),
            )
        )
    return found


def _caught(counts: NDArray[np.int64], best: int) -> float:
    return _share(np.sort(counts, axis=1)[:, -best:].sum(), counts.sum())


def _share(part: np.integer, whole: np.integer) -> float:
    return float(part / whole) if whole else 0.0
