"""Which foreseen experts to fetch ahead: those whose expected gain is worth their bytes."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .ahead import Guess

_FADE = 0.98  # of what was counted, with each guess
_FLOOR = 0.3  # the chance that who must go would have been needed: below it a fetch cannot pay


class Admission:
    """Knows how often a guess of each rank was right, whether it was fetched or not, and how long a layer leaves the
    link idle before the next begins.

    A fetch takes `t` seconds of the link, `window` of which are idle. If it is right it saves min(t, window) of waiting;
    if it is wrong it makes what is really needed wait for max(0, t - window). So it is admitted where

        p min(t, window) >= (1 - p) max(0, t - window),    that is    p >= 1 - window / t,

    and p is at least the chance that the expert which must go would have been needed. Each fetch takes its time off the
    window of those after it. `least`: a fixed threshold instead, for runs that must not depend on time.
    """

    def __init__(self, layers: int, least: float | None = None) -> None:
        self._right, self._seen = np.ones((layers, 1)), np.full((layers, 1), 2.0)
        self._pending: dict[tuple[int, int], Guess] = {}  # (thread, layer)
        self._window, self._issued = np.zeros(layers), dict[tuple[int, int], tuple[float, float]]()
        self._least = least

    def came(self, layer: int, experts: NDArray[np.int32]) -> None:
        """A layer's step has come, with these experts."""
        key = threading.get_ident(), layer
        guess, issued = self._pending.pop(key, None), self._issued.pop(key, None)
        if issued is not None:
            idle = max(0.0, time.perf_counter() - issued[0] - issued[1])
            self._window[layer] += 0.1 * (idle - self._window[layer])
        if guess is None or not len(guess.experts):
            return
        self._widen(int(guess.rank.max()) + 1)
        right = np.isin(guess.experts, experts)
        ranks, places = np.unique(guess.rank, return_inverse=True)
        share = np.bincount(places, right) / np.bincount(places)
        self._right[layer, ranks] = _FADE * self._right[layer, ranks] + share
        self._seen[layer, ranks] = _FADE * self._seen[layer, ranks] + 1

    def chance(self, layer: int, rank: Sequence[int] | NDArray[np.int32]) -> NDArray[np.float64]:
        """How likely guesses of these ranks are to be right."""
        rank = np.asarray(rank)
        self._widen(int(rank.max(initial=0)) + 1)
        return self._right[layer, rank] / self._seen[layer, rank]

    def choose(self, guess: Guess, waiting: int, load_s: float) -> NDArray[np.int32]:
        """The experts of a guess to fetch, in its order, with `waiting` loads before them that take `load_s` each."""
        key = threading.get_ident(), guess.layer
        self._pending[key] = guess
        self._issued[key] = time.perf_counter(), waiting * load_s
        p = self.chance(guess.layer, guess.rank) if guess.chance is None else guess.chance
        if self._least is not None:
            return guess.experts[p >= self._least]
        chosen, window = [], float(self._window[guess.layer])
        for e, chance in zip(guess.experts.tolist(), p.tolist(), strict=True):
            need = max(_FLOOR, 1 - window / load_s if load_s > 0 else 0.0)
            if chance >= need:
                chosen.append(e)
                window = max(0.0, window - load_s)
        return np.array(chosen, np.int32)

    def _widen(self, ranks: int) -> None:
        more = ranks - self._right.shape[1]
        if more > 0:
            self._right = np.pad(self._right, ((0, 0), (0, more)), constant_values=1.0)
            self._seen = np.pad(self._seen, ((0, 0), (0, more)), constant_values=2.0)
