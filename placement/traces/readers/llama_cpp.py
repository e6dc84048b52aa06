"""The CSV of llama.cpp's llama-moe-trace (examples/moe-trace, ggml-org/llama.cpp pull request 28544).

Without a header: a row "layer,expert" for each choice, written pass by pass, in a pass layer by layer, in a layer token
by token. The K choices of a token follow each other; K is what a pass of one token (decoding) writes for a layer, or
`top_k`. The last layer runs for those tokens of a pass only whose logits are asked for, the last ones: the others get
no expert there.

With the header "phase,token,layer,rank,expert", as forks write it, a row says all that itself.
"""

from __future__ import annotations

from itertools import pairwise
from math import gcd

import numpy as np
from numpy.typing import NDArray

from ...careful import opened
from ..trace import Trace
from .common import Found, Options, trace_of

HEADER = "phase,token,layer,rank,expert"


def fits(found: Found) -> bool:
    return found.path.suffix.lower() == ".csv"


def read(found: Found, options: Options) -> Trace:
    if _first(found) == HEADER:
        return _named(found, options)
    rows = _numbers(found, options, ("layer", "expert"), (0, 1))
    starts = np.flatnonzero(np.diff(rows[:, 0], prepend=-1) != 0)
    lengths = np.diff(np.append(starts, len(rows)))
    top_k = options.top_k or _top_k(found, rows[:, 1], lengths)
    odd = lengths % top_k != 0
    found.rule(not odd.any(), "rows of a layer in one pass", f"a multiple of K={top_k}", lengths[odd][:1])
    layers = np.unique(rows[:, 0])
    place = np.searchsorted(layers, rows[starts, 0])
    begins = np.append(np.flatnonzero(np.diff(place, prepend=place[0] + 1) <= 0), len(place))  # runs that begin a pass
    runs = list(pairwise(begins))
    tokens_of = [int(lengths[begin:end].max()) // top_k for begin, end in runs]
    # a pass leaves out no layer but those of whom no logits are asked for
    found.file.take(8 * len(layers) * sum(tokens_of) * top_k, "passes that leave out layers")
    chunks = []
    for (begin, end), tokens in zip(runs, tokens_of, strict=True):
        ids = np.full((len(layers), tokens, top_k), -1, np.int64)
        for run in range(begin, end):
            chosen = rows[starts[run] : starts[run] + lengths[run], 1].reshape(-1, top_k)
            ids[place[run], tokens - len(chosen) :] = chosen
        chunks.append(ids)
    return trace_of(found, np.concatenate(chunks, axis=1), options, layers=layers.tolist())


def _top_k(found: Found, experts: NDArray[np.int64], lengths: NDArray[np.int64]) -> int:
    """The largest number that divides all runs; a token's choices are distinct, or it was not K."""
    top_k = gcd(*lengths.tolist())
    groups = np.sort(experts.reshape(-1, top_k), axis=1)
    said = f"given: every pass has several tokens, {top_k} choices at least, and K cannot be told"
    found.rule(bool((np.diff(groups, axis=1) > 0).all()), "top_k", said, None)
    return top_k


def _named(found: Found, options: Options) -> Trace:
    rows = _numbers(found, options, tuple(HEADER.split(",")[1:]), (1, 2, 3, 4))
    token, layer, rank, expert = rows.T
    layers, places = np.unique(layer, return_inverse=True)
    shape = (len(layers), int(token.max()) + 1, int(rank.max()) + 1)
    most = 64 * len(rows)  # a file with holes that large is none of these
    found.rule(shape[0] * shape[1] * shape[2] <= most, "token and rank", f"dense, {most} choices at most", shape)
    ids = np.full(shape, -1, np.int64)
    ids[places, token, rank] = expert
    found.rule(int((ids >= 0).sum()) == len(rows), "rows", "one for each token, layer and rank", "two of one")
    return trace_of(found, ids, options, layers=layers.tolist())


def _first(found: Found) -> str:
    with opened(found.path, "read") as file:
        return next(file.lines("replace"), "").strip()


def _numbers(found: Found, options: Options, names: tuple[str, ...], columns: tuple[int, ...]) -> NDArray[np.int64]:
    first, width = _first(found), max(columns) + 1
    rule = f"rows of {width} columns, {'layer,expert' if width == 2 else HEADER} (or layer,expert,count: counts)"
    found.rule(first.count(",") == width - 1, "content", rule, repr(first[:80]))
    with opened(found.path, "read", options.max_bytes) as file:
        return file.table(names, columns, 0 if width == 2 else 1)
