"""From a score to a probability: a rising curve for each layer, fitted on tokens that the scores were not fitted on.

Isotonic regression by pooling adjacent violators (Ayer et al., 1955; for probabilities Zadrozny and Elkan, 2002), on
bins of scores, then straight lines between the bins.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...compiled import njit

KNOTS = 64


class Curve(NamedTuple):
    """score float32 [L, KNOTS], rising; chance float32 [L, KNOTS], never falling; experts int32 [L]: those above have
    no chance."""

    score: NDArray[np.float32]
    chance: NDArray[np.float32]
    experts: NDArray[np.int32]


def straight(experts: NDArray[np.int32]) -> Curve:
    """The curve of scores that are chances already."""
    line = np.tile(np.linspace(0, 1, KNOTS, dtype=np.float32), (len(experts), 1))
    return Curve(line, line, experts)


def none(experts: NDArray[np.int32]) -> Curve:
    """The curve that leaves scores as they are."""
    nothing = np.zeros((len(experts), 0), np.float32)
    return Curve(nothing, nothing, experts)


def fit_curve(scores: NDArray[np.float32], used: NDArray[np.bool_]) -> tuple[NDArray, NDArray]:
    """The knots and their chances, [KNOTS] each, from scores [n] and whether each was `used`.

    Half of the bins hold equally many scores, half equally many of those used: these are few, and matter most.
    """
    from scipy.optimize import isotonic_regression  # 21 MB, which only those pay who fit

    cuts = [np.quantile(part, np.linspace(0, 1, KNOTS // 2 + 1)) for part in (scores, scores[used]) if len(part)]
    edges = np.unique(np.concatenate(cuts).astype(np.float32))
    bins = np.searchsorted(edges[1:-1], scores, side="right")
    count = np.bincount(bins).astype(np.float64)
    held = np.flatnonzero(count)
    score = np.bincount(bins, scores)[held] / count[held]
    chance = isotonic_regression(np.bincount(bins, used)[held] / count[held], weights=count[held]).x
    spread = np.minimum(np.arange(KNOTS), len(held) - 1)  # the last again where there are fewer
    if len(held) > KNOTS:
        spread = np.linspace(0, len(held) - 1, KNOTS).round().astype(np.int64)
    return score[spread].astype(np.float32), chance[spread].astype(np.float32)


@njit
def follow(curve, layer, values):
    """Scores [E] become chances, in place."""
    score, chance = curve.score[layer], curve.chance[layer]
    top = len(score) - 1
    if top < 0:
        return
    for e in range(len(values)):
        v = values[e]
        if e >= curve.experts[layer]:
            values[e] = 0
        elif not v > score[0]:
            values[e] = chance[0]
        elif v >= score[top]:
            values[e] = chance[top]
        else:
            high = np.searchsorted(score, v, side="right")
            low = high - 1
            share = (v - score[low]) / (score[high] - score[low])
            values[e] = chance[low] + share * (chance[high] - chance[low])
