"""A predictor from token ids: what the experts of a layer were after the same last words.

The longest of the last N tokens that the trace knows decides, shorter ones fill in: with c the number of times it came,
p_n = (uses + STRENGTH * p_(n-1)) / (c + STRENGTH), from p_0, how often the expert is used at all (interpolated back-off
as in Witten and Bell, 1991). Only the last MOST occurrences are counted. What is learned is the trace itself and, for
each n, its places sorted by the hash of the n tokens that end there; a place counts only if its tokens are the same.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...compiled import njit
from ...traces.trace import Trace
from .curve import Curve, follow, straight
from .fitting import beginnings, experts_of, ids_of

MOST = 64
STRENGTH = 1.0
LEARNED = ("ids", "tokens", "share", "keys", "places", "sizes")


@njit
def _hash(tokens, at, n):
    """Of the n tokens that end at `at`."""
    h = np.uint64(n)
    for t in tokens[at - n + 1 : at + 1]:
        h = (h ^ np.uint64(t)) * np.uint64(0x9E3779B97F4A7C15)
        h ^= h >> np.uint64(29)
    return h


@njit
def hashes(tokens, first, n):
    """(uint64 [m], int64 [m]): the hash of every n tokens of one sequence, and where they end; n runs do not cross
    where a sequence is `first`."""
    h, place = np.empty(len(tokens), np.uint64), np.empty(len(tokens), np.int64)
    m, run = 0, 0
    for t in range(len(tokens)):
        run = 1 if first[t] else run + 1
        if run >= n:
            h[m], place[m] = _hash(tokens, t, n), t
            m += 1
    return h[:m], place[:m]


@njit
def find(keys, places, tokens, recent, n, found):
    """Fills `found` with the latest places of the trace where the last n of `recent` stand; returns how many."""
    h = _hash(recent, len(recent) - 1, n)
    end = np.searchsorted(keys, h, side="right")
    m = 0
    while end > 0 and keys[end - 1] == h and m < len(found):
        end -= 1
        at = places[end]
        same = True
        for i in range(n):
            same = same and tokens[at - i] == recent[len(recent) - 1 - i]
        if same:
            found[m] = at
            m += 1
    return m


@njit
def chances(ids, share, found, counts, layer, out):
    """Fills out [E] from found [N, MOST], counts [N]: places in the trace, by n."""
    out[:] = share[layer]
    for n in range(len(counts)):
        if counts[n] == 0:
            break
        out *= np.float32(STRENGTH / (counts[n] + STRENGTH))
        for i in range(counts[n]):
            for e in ids[layer, found[n, i]]:
                if e >= 0:
                    out[e] += np.float32(1 / (counts[n] + STRENGTH))


class Ngram:
    """A predictor that is told each token before its layers run: `token(id)`."""

    kind = "ngram"
    horizon = 0  # knows no layer of the token: its first layer is foretold like its last

    def __init__(
        self,
        ids: NDArray[np.int32],
        tokens: NDArray[np.int64],
        share: NDArray[np.float32],
        keys: NDArray[np.uint64],
        places: NDArray[np.int64],
        sizes: NDArray[np.int64],
        curve: Curve,
    ) -> None:
        self._ids, self._tokens, self._share, self.curve = ids, tokens, share, curve
        self._keys, self._places, self._sizes = keys, places, sizes
        ends = np.cumsum(sizes)
        self._lists = [(keys[e - s : e], places[e - s : e]) for e, s in zip(ends, sizes, strict=True)]
        self._found = np.zeros((len(sizes), MOST), np.int64)
        self._counts = np.zeros(len(sizes), np.int64)
        self._recent = np.zeros(0, np.int64)

    @classmethod
    def fit(cls, trace: Trace, tokens: NDArray[np.int64], longest: int) -> Ngram:
        first, lists = beginnings(trace), []
        for n in range(1, longest + 1):
            keys, places = hashes(tokens, first, n)
            order = np.argsort(keys, kind="stable")
            lists.append((keys[order], places[order]))
        ids = ids_of(trace)
        share = [np.bincount(row[row >= 0], minlength=trace.num_experts) / trace.shape[1] for row in ids]
        return cls(
            ids,
            tokens,
            np.array(share, np.float32),
            np.concatenate([keys for keys, _ in lists]),
            np.concatenate([places for _, places in lists]),
            np.array([len(keys) for keys, _ in lists], np.int64),
            straight(experts_of(trace)),
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(L, E)."""
        return self._share.shape  # type: ignore[return-value]

    @property
    def bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays().values())

    def twin(self) -> Ngram:
        return self.of(self.arrays())

    def start(self) -> None:
        self._recent = self._recent[:0]
        self._counts[:] = 0

    def token(self, token: int) -> None:
        """The next token of the sequence, before its layers run."""
        self._recent = np.append(self._recent, token)[-len(self._sizes) :].astype(np.int64)
        self._counts[:] = 0
        for n in range(1, len(self._recent) + 1):
            keys, places = self._lists[n - 1]
            self._counts[n - 1] = find(keys, places, self._tokens, self._recent, n, self._found[n - 1])

    def observe(self, layer: int, ids: NDArray[np.int32]) -> None:
        """Experts tell it nothing."""

    def scores(self, layer: int) -> NDArray[np.float32]:
        out = np.empty(self.shape[1], np.float32)
        chances(self._ids, self._share, self._found, self._counts, layer, out)
        follow(self.curve, layer, out)
        return out

    def walk(self, ids: NDArray[np.int32], first: NDArray[np.bool_], tokens: NDArray | None) -> NDArray[np.float32]:
        if tokens is None:
            raise ValueError("predict: tokens must be the token ids [T] for ngram, got None")
        found = np.empty((*ids.shape[:2], self.shape[1]), np.float32)
        for t, token in enumerate(tokens.tolist()):
            if first[t]:
                self.start()
            self.token(token)
            for layer in range(len(ids)):
                chances(self._ids, self._share, self._found, self._counts, layer, found[layer, t])
                follow(self.curve, layer, found[layer, t])
        return found

    def arrays(self) -> dict[str, NDArray]:
        return {name: getattr(self, "_" + name) for name in LEARNED} | self.curve._asdict()

    @classmethod
    def of(cls, arrays: dict[str, NDArray]) -> Ngram:
        ids, tokens, share, keys, places, sizes = (arrays[name] for name in LEARNED)
        curve = Curve(arrays["score"], arrays["chance"], arrays["experts"])
        return cls(ids, tokens, share, keys, places, sizes, curve)
