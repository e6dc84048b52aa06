"""Predictors: which experts a layer will need, told a layer or more ahead from the experts seen so far.

    predictor = fit(trace)                  # learned from a recorded trace
    predictor.start()                       # a sequence begins
    chance = predictor.scores(layer)        # float32 [E]: how likely the next token at `layer` uses each expert
    predictor.observe(layer, ids)           # what it did use

The chances are calibrated (on every fifth sequence of the trace, which the weights had not seen), because prefetching
weighs them against bytes (placement/caching/prefetch.py). PREDICTORS lists the kinds:

popular     how often each expert is used
transition  log-probabilities given each expert of the layer before, added up
ridge       least squares on the experts of three earlier layers and a mean over the last tokens at the layer
path        least squares on all earlier layers of the token and the last four of the token before, and on means over
            past tokens at five rates
ngram       from token ids: what followed the same last words; wants `tokens`, and `token` before each token
gate        the next layer's router applied to this layer's input: only a live model has it; `recall` takes its logits
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..careful import opened
from ..files import write_whole
from ..traces.trace import Trace
from .predictors.checks import CURVE, checked
from .predictors.curve import Curve, fit_curve
from .predictors.curve import none as unbent
from .predictors.fitting import (
    beginnings,
    experts_of,
    held_back,
    ids_of,
    popular,
    reach_of,
    ridge,
    transition,
    used,
)
from .predictors.linear import Linear
from .predictors.ngram import Ngram

VERSION = 1
RATES = (0.0, 0.5, 0.8, 0.95, 1.0)  # of means over past tokens; 1: over the whole sequence
PENALTIES = (20.0, 60.0, 200.0)


class Predictor:
    """Tells experts ahead, for one sequence at a time; `twin` gives another for the next. Not safe for threads."""

    def __init__(self, model: Linear | Ngram) -> None:
        self._model = model

    @property
    def shape(self) -> tuple[int, int]:
        """(L, E)."""
        return self._model.shape

    @property
    def horizon(self) -> int:
        """Layers of the same token up to `layer - horizon` are used for `layer`."""
        return self._model.horizon

    @property
    def bytes(self) -> int:
        """Memory of what was learned, which twins share."""
        return self._model.bytes

    def twin(self) -> Predictor:
        """Another one of the same knowledge, which has seen nothing."""
        return Predictor(self._model.twin())

    def start(self) -> None:
        """A sequence begins: what was seen is forgotten."""
        self._model.start()

    def token(self, token: int) -> None:
        """The next token's id, before its layers run. Only `ngram` takes notice."""
        self._model.token(token)

    def observe(self, layer: int, ids: Any) -> None:
        """What the tokens of this pass used at `layer`: ids [K] of one, or [T, K], in the order of the sequence where
        they are of one; -1, or any number from E: no expert. A layer not above the last one begins the next pass.

        Raises ValueError for another shape or layer, TypeError for ids that are not integers.
        """
        ids = np.asarray(ids)
        if ids.dtype.kind not in "iu":
            raise TypeError(f"Predictor: ids must be integers, got {ids.dtype}")
        if ids.ndim not in (1, 2):
            raise ValueError(f"Predictor: ids must be [K] or [T, K], got {ids.shape}")
        self._check(layer)
        self._model.observe(layer, np.ascontiguousarray(np.atleast_2d(ids), np.int32))

    def scores(self, layer: int) -> NDArray[np.float32]:
        """float32 [E]: the chance that the next token at `layer` uses each expert; with several tokens in the pass,
        the chance of any one of them. Layers that were not seen in this pass tell nothing. Raises ValueError for a
        layer that is not there."""
        self._check(layer)
        return self._model.scores(layer)

    def _check(self, layer: int) -> None:
        if not 0 <= layer < self.shape[0]:
            raise ValueError(f"Predictor: layer must be 0 .. {self.shape[0] - 1}, got {layer}")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes an `.npz` of arrays at exactly `path`, whole or not at all. Raises OSError where it cannot."""
        fields: dict[str, Any] = {"version": np.int64(VERSION), "kind": np.str_(self._model.kind)}
        fields |= self._model.arrays()
        write_whole(Path(path), lambda file: np.savez_compressed(file, **fields))


def load(path: str | os.PathLike[str], *, max_bytes: int | None = None) -> Predictor:
    """Reads what `Predictor.save` wrote; it may fill `max_bytes` of memory (None: four times the file, or 64 MB).

    Raises OSError where it is missing or may not be read, or ValueError naming the file and what is wrong.
    """
    with opened(path, "predict", max_bytes) as file:
        arrays = file.npz(required={"version", "kind", *CURVE})
        file.integers(arrays.pop("version"), "version", shape=(), low=VERSION, high=VERSION)
        kind = str(arrays.pop("kind"))
        file.rule(kind in MODELS, "kind", f"one of {', '.join(MODELS)}", kind)
        return Predictor(MODELS[kind].of(checked(file, kind, arrays)))


MODELS: dict[str, type[Linear] | type[Ngram]] = {model.kind: model for model in (Linear, Ngram)}


@dataclass(frozen=True)
class Options:
    """What a kind of predictor may ask for; see `fit`."""

    horizon: int
    reach: int | None
    tokens: NDArray[np.int64] | None


def fit(
    trace: Trace,
    method: str = "path",
    *,
    horizon: int = 1,
    reach: int | None = None,
    tokens: NDArray[np.integer] | None = None,
) -> Predictor:
    """A predictor learned from `trace`; same trace, same predictor.

    method   a name of PREDICTORS
    horizon  how many layers ahead: for layer l, layers up to l - horizon are known; before the first come the last ones
             of the token before
    reach    how many of those a regression looks at; None: 3 for ridge; for path all, or as many as keep it at about
             2,000 unknowns for each expert
    tokens   ngram: integers [T], the token ids

    Raises ValueError / TypeError naming argument, rule and value.
    """
    if method not in PREDICTORS:
        raise ValueError(f"fit: method must be one of {', '.join(PREDICTORS)}, got {method!r}")
    layers, count, _ = trace.shape
    if count < 2:
        raise ValueError(f"fit: trace must have at least 2 tokens, got {count}")
    if not 1 <= horizon <= layers:
        raise ValueError(f"fit: horizon must be 1 .. {layers} layers, got {horizon}")
    if reach is not None and reach < 1:
        raise ValueError(f"fit: reach must be at least 1, got {reach}")
    return Predictor(PREDICTORS[method](trace, Options(horizon, reach, _token_ids(tokens, trace))))


def _token_ids(tokens: Any, trace: Trace) -> NDArray[np.int64] | None:
    if tokens is None:
        return None
    tokens = np.asarray(tokens)
    if tokens.dtype.kind not in "iu":
        raise TypeError(f"predict: tokens must be integers, got {tokens.dtype}")
    if tokens.shape != (trace.shape[1],):
        raise ValueError(f"predict: tokens must be [T={trace.shape[1]}], got {tokens.shape}")
    return tokens.astype(np.int64)


def _linear(trace: Trace, learn: Callable[[NDArray[np.bool_]], tuple]) -> Linear:
    """Tables of all tokens, with the curve that made chances of the scores of those held back."""
    held = held_back(trace)
    part, full = learn(held)
    if not held.any():
        held = ~held
    apart = trace.select(held)
    ids, experts = ids_of(apart), experts_of(trace)
    raw = Linear(part, unbent(experts)).walk(ids, beginnings(apart), None)
    knots = [
        fit_curve(raw[layer, :, :e].ravel(), used(ids[layer], e).ravel() > 0)
        for layer, e in enumerate(experts.tolist())
    ]
    score, chance = (np.array(rows, np.float32) for rows in zip(*knots, strict=True))
    return Linear(full, Curve(score, chance, experts))


def _popular(trace: Trace, options: Options) -> Linear:
    return _linear(trace, lambda held: popular(trace, held, options.horizon))


def _transition(trace: Trace, options: Options) -> Linear:
    return _linear(trace, lambda held: transition(trace, held, options.horizon))


def _ridge(trace: Trace, options: Options) -> Linear:
    reach = options.reach or 3
    return _linear(trace, lambda held: ridge(trace, held, options.horizon, reach, (0.8,), PENALTIES))


def _path(trace: Trace, options: Options) -> Linear:
    reach = options.reach or reach_of(trace, len(RATES))
    return _linear(trace, lambda held: ridge(trace, held, options.horizon, reach, RATES, PENALTIES))


def _ngram(trace: Trace, options: Options) -> Ngram:
    if options.tokens is None:
        raise ValueError("fit: tokens must be the token ids [T] for ngram, got None")
    return Ngram.fit(trace, options.tokens, longest=3)


def _gate(trace: Trace, options: Options) -> Linear:
    raise ValueError("fit: method must not be gate, which only a live model has (its routers), got a trace")


PREDICTORS: dict[str, Callable[[Trace, Options], Linear | Ngram]] = {
    "popular": _popular,
    "transition": _transition,
    "ridge": _ridge,
    "path": _path,
    "ngram": _ngram,
    "gate": _gate,
}


def foretell(predictor: Predictor, trace: Trace, tokens: NDArray[np.integer] | None = None) -> NDArray[np.float32]:
    """float32 [L, T, E]: what the predictor says before each layer of each token, walking through the trace one token
    at a time with `start`, `scores` and `observe`. `tokens` as in `fit`. Raises ValueError for a trace of other sizes.
    """
    if (trace.shape[0], trace.num_experts) != predictor.shape:
        found = (trace.shape[0], trace.num_experts)
        raise ValueError(f"foretell: trace must have [L, E] = {predictor.shape}, got {found}")
    return predictor.twin()._model.walk(ids_of(trace), beginnings(trace), _token_ids(tokens, trace))


def recall(scores: NDArray[np.floating], trace: Trace, fetched: tuple[int, ...] = (6, 12)) -> NDArray[np.float64]:
    """float64 [len(fetched), L]: the share of the experts used at each layer that are among the `fetched` with the
    highest scores (of equal ones, the lowest numbers). scores [L, T, E]: of `foretell`, or a router's logits.

    >>> trace = Trace(np.array([[[0], [2]]], dtype=np.uint8), num_experts=3)
    >>> recall(np.array([[[0.9, 0.1, 0.0], [0.5, 0.2, 0.3]]]), trace, (1, 2))
    array([[0.5],
           [1. ]])
    """
    experts = _matching(scores, trace)
    if not all(1 <= m <= experts for m in fetched):
        raise ValueError(f"recall: fetched must be 1 .. {experts}, got {fetched}")
    found = np.zeros((len(fetched), len(scores)))
    for layer, ids in enumerate(ids_of(trace)):
        hit = used(ids, experts)
        ranked = np.take_along_axis(hit, np.argsort(-scores[layer], 1, kind="stable"), 1).cumsum(1, np.float64).sum(0)
        for i, m in enumerate(fetched):
            found[i, layer] = ranked[m - 1] / max(ranked[-1], 1)
    return found


def reliability(scores: NDArray[np.floating], trace: Trace, bins: int = 10) -> NDArray[np.float64]:
    """float64 [bins, 3]: of the pairs (token, expert) with a chance in each of `bins` equal parts of 0 .. 1, how many,
    their mean chance, the share that came true. Calibrated chances have the last two equal. 0 where there are none."""
    experts, found = _matching(scores, trace), np.zeros((bins, 3))
    for layer, ids in enumerate(ids_of(trace)):
        part = np.clip((scores[layer] * bins).astype(np.int64), 0, bins - 1).ravel()
        found[:, 0] += np.bincount(part, minlength=bins)
        found[:, 1] += np.bincount(part, scores[layer].ravel(), bins)
        found[:, 2] += np.bincount(part, used(ids, experts).ravel(), bins)
    found[:, 1:] /= np.maximum(found[:, :1], 1)
    return found


def _matching(scores: NDArray[np.floating], trace: Trace) -> int:
    """E, after a check that scores [L, T, E] are of the trace."""
    wanted = (*trace.shape[:2], trace.num_experts)
    if np.shape(scores) != wanted:
        raise ValueError(f"predict: scores must be [L, T, E] = {wanted}, got {np.shape(scores)}")
    return trace.num_experts
