"""What a predictor's file must hold before compiled code may index by it: every shape, type and range."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...careful import Guard
from .curve import KNOTS

CURVE = ("score", "chance", "experts")
Arrays = dict[str, NDArray]


def checked(file: Guard, kind: str, arrays: Arrays) -> dict[str, Any]:
    """The arrays of a saved predictor of such a kind, checked. Raises ValueError naming file, field, rule and value."""
    check, names = _CHECKS[kind]
    wanted = {*names, *CURVE}
    file.rule(arrays.keys() == wanted, "file", f"holding {', '.join(sorted(wanted))}", sorted(arrays))
    return check(file, arrays)


def _linear(file: Guard, arrays: Arrays) -> Arrays:
    layers, experts = _sizes(file, arrays["bias"], "bias")
    first = file.integers(arrays["first"], "first", shape=(layers + 1,), low=0, high=len(arrays["path"]))
    rising = first[0] == 0 and first[-1] == len(arrays["path"]) and (np.diff(first) >= 0).all()
    file.rule(rising, "first", f"rising from 0 to the {len(arrays['path'])} blocks of path", first)
    horizon = file.integers(arrays["horizon"], "horizon", shape=(), low=1, high=layers)
    # a block reads the layer `horizon + r` before its own; below 0 these are the last ones of the token before
    deepest = np.arange(layers) - int(horizon) - (np.diff(first) - 1)
    file.rule(deepest.min() >= -layers, "first", f"of blocks that reach at most {layers} layers back", first)
    means = arrays["rates"].size
    fractions: dict[str, tuple[tuple[int, ...], type]] = {
        "bias": ((layers, experts), np.float32),
        "path": ((int(first[-1]), experts, experts), np.float32),
        "offset": ((int(first[-1]), experts), np.float32),
        "past": ((layers, means, experts, experts), np.float32),
        "rates": ((means,), np.float64),
    }
    found = {name: file.numbers(arrays[name], name, shape=s, dtype=t) for name, (s, t) in fractions.items()}
    file.rule(bool(((found["rates"] >= 0) & (found["rates"] <= 1)).all()), "rates", "in 0 .. 1", found["rates"])
    # the running sums of a pass: as large as the tables, and not in the file
    file.take(4 * layers * experts * (means + 1), "bias and rates")
    return {**found, "first": first, "horizon": horizon} | _curve(file, arrays, layers, experts)


def _ngram(file: Guard, arrays: Arrays) -> Arrays:
    layers, experts = _sizes(file, arrays["share"], "share")
    tokens = file.integers(arrays["tokens"], "tokens", shape=(None,), low=-(2**63), high=2**63 - 1)
    count, most = len(tokens), len(arrays["keys"])
    ids = file.integers(arrays["ids"], "ids", shape=(layers, count, None), low=-(2**31), high=experts - 1)
    file.rule(
        arrays["keys"].dtype == np.uint64 and arrays["keys"].ndim == 1, "keys", "uint64 [m]", arrays["keys"].dtype
    )
    sizes = file.integers(arrays["sizes"], "sizes", shape=(None,), low=0, high=most)
    file.rule(0 < len(sizes) <= 64 and sum(sizes.tolist()) == most, "sizes", f"with the sum of {most} keys", sizes)
    places = file.integers(arrays["places"], "places", shape=(most,), low=0, high=count - 1)
    for n, (end, size) in enumerate(zip(np.cumsum(sizes).tolist(), sizes.tolist(), strict=True)):
        here = places[end - size : end]  # n tokens before each are compared
        file.rule(not size or int(here.min()) >= n, f"places of {n + 1} tokens", f"from {n} on", here.min(initial=0))
    share = file.numbers(arrays["share"], "share", shape=(layers, experts), dtype=np.float32)
    keys = np.ascontiguousarray(arrays["keys"])
    found = {
        "ids": ids.astype(np.int32), "tokens": tokens, "share": share, "keys": keys, "places": places, "sizes": sizes,
    }  # fmt: skip
    return found | _curve(file, arrays, layers, experts)


def _sizes(file: Guard, found: NDArray, name: str) -> tuple[int, int]:
    """(L, E)."""
    file.rule(found.ndim == 2 and found.size > 0, name, "[L, E], not empty", list(found.shape))
    return found.shape  # type: ignore[return-value]


def _curve(file: Guard, arrays: Arrays, layers: int, experts: int) -> Arrays:
    knots = arrays["score"].shape[-1:] if arrays["score"].ndim == 2 else (-1,)
    file.rule(knots[0] in (0, KNOTS), "score", f"[L, 0 or {KNOTS}]", list(arrays["score"].shape))
    found = {name: file.numbers(arrays[name], name, shape=(layers, *knots), dtype=np.float32) for name in CURVE[:2]}
    for name, values in found.items():
        file.rule(bool((np.diff(values) >= 0).all()), name, "rising", "numbers that fall")
    of_layer = file.integers(arrays["experts"], "experts", shape=(layers,), low=1, high=experts)
    return {**found, "experts": of_layer.astype(np.int32)}


_CHECKS: dict[str, tuple[Callable[[Guard, Arrays], Arrays], tuple[str, ...]]] = {
    "linear": (_linear, ("first", "path", "offset", "past", "rates", "bias", "horizon")),
    "ngram": (_ngram, ("ids", "tokens", "share", "keys", "places", "sizes")),
}
