"""What a placement needs to know of a trace, counted exactly: loads, transitions between layers, pairs inside one.

Counting is one pass over the choices, K * K additions for a token and a pair of layers, and needs 8 E^2 bytes beside
the result, however long the trace is: a `TraceFile` is streamed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numba
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from .file import TraceFile
from .trace import Trace

Source = Trace | TraceFile


@dataclass(frozen=True, eq=False)
class Statistics:
    """Counts over T tokens of L layers.

    num_experts       E, the largest over the layers
    tokens            T
    top_k             K, the most choices of a token in a layer
    load              int64 [L, E]: how many tokens chose each expert; zeros where a layer has fewer than E
    transitions       L - 1 scipy csr_array int64 [E, E]: entry (a, b) of the l-th counts the tokens that use a in layer
                      l and b in layer l + 1, so a token with K experts on both sides counts K * K times. Empty where
                      only loads are known
    co_activation     L csr_array int64 [E, E], symmetric, or None: tokens that use both experts in one layer; the
                      diagonal is the load
    layer_names       L names, or empty
    experts_of_layer  int32 [L] or None: E of each layer, where they differ

    `a + b` adds what two traces of one model counted. Raises ValueError / TypeError naming field, rule and value.

    >>> ids = np.array([[[0, 2], [1, 2]], [[1, 0], [1, 255]]], dtype=np.uint8)
    >>> found = statistics(Trace(ids, num_experts=3))
    >>> found.load.tolist(), found.transitions[0].toarray().tolist()
    ([[1, 1, 2], [1, 2, 0]], [[1, 1, 0], [0, 1, 0], [1, 2, 0]])
    """

    num_experts: int
    tokens: int
    top_k: int
    load: NDArray[np.int64]
    transitions: tuple[csr_array, ...]
    co_activation: tuple[csr_array, ...] | None = None
    layer_names: tuple[str, ...] = ()
    experts_of_layer: NDArray[np.int32] | None = None

    def __post_init__(self) -> None:
        for name, value, least in (("num_experts", self.num_experts, 1), ("tokens", self.tokens, 0)):
            _rule(value >= least, name, f"at least {least}", value)
        _rule(1 <= self.top_k <= self.num_experts, "top_k", f"1 .. num_experts={self.num_experts}", self.top_k)
        load = self.load
        _rule(load.dtype == np.int64, "load", "int64", load.dtype, TypeError)
        _rule(load.ndim == 2 and load.shape[1] == self.num_experts, "load", f"[L, E={self.num_experts}]", load.shape)
        layers = len(load)
        _rule(not load.size or int(load.min()) >= 0, "load", "not negative", load.min(initial=0))
        most = load.sum(1).max(initial=0)
        _rule(
            most <= self.tokens * self.top_k, "load", f"at most tokens * top_k={self.tokens * self.top_k} a layer", most
        )
        count = len(self.transitions)
        _rule(count in (0, max(layers - 1, 0)), "transitions", f"L - 1={layers - 1} matrices, or none", count)
        for layer, matrix in enumerate(self.transitions):
            self._check(matrix, f"transitions[{layer}]")
        if self.co_activation is not None:
            count = len(self.co_activation)
            _rule(count == layers, "co_activation", f"L={layers} matrices, or None", count)
            for layer, matrix in enumerate(self.co_activation):
                self._check(matrix, f"co_activation[{layer}]")
        _rule(len(self.layer_names) in (0, layers), "layer_names", f"{layers} names or none", len(self.layer_names))
        of_layer = self.experts_of_layer
        _rule(of_layer is None or of_layer.shape == (layers,), "experts_of_layer", f"[L={layers}]", of_layer)

    def _check(self, matrix: csr_array, name: str) -> None:
        shape, most = (self.num_experts, self.num_experts), self.tokens * self.top_k**2
        _rule(matrix.format == "csr", name, "a csr_array", matrix.format, TypeError)
        _rule(matrix.dtype == np.int64, name, "int64", matrix.dtype, TypeError)
        _rule(matrix.shape == shape, name, f"[E, E]={list(shape)}", matrix.shape)
        _rule(not matrix.nnz or int(matrix.data.min()) >= 0, name, "not negative", matrix.data.min(initial=0))
        total = int(matrix.data.sum())
        _rule(total <= most, name, f"at most tokens * top_k^2={most} in all", total)

    @property
    def layers(self) -> int:
        """L."""
        return len(self.load)

    def __add__(self, other: Statistics) -> Statistics:
        """The counts of both; names and co-activation stay where both have them."""
        same_model(self, other, "both terms of a sum")
        both = self.co_activation is not None and other.co_activation is not None
        return Statistics(
            self.num_experts,
            self.tokens + other.tokens,
            self.top_k,
            self.load + other.load,
            _added(self.transitions, other.transitions),
            _added(self.co_activation, other.co_activation) if both else None,  # type: ignore[arg-type]
            self.layer_names if self.layer_names == other.layer_names else (),
            self.experts_of_layer,
        )


def same_model(a: Statistics, b: Statistics, where: str) -> None:
    """Raises ValueError where the sizes differ. `where`: what both are of, for the message."""
    for name in ("num_experts", "top_k", "layers"):
        _rule(getattr(a, name) == getattr(b, name), name, f"{getattr(a, name)} in {where}", getattr(b, name))
    counts = len(a.transitions), len(b.transitions)
    _rule(counts[0] == counts[1], "transitions", f"{counts[0]} matrices in {where}", counts[1])


def _added(a: tuple[csr_array, ...], b: tuple[csr_array, ...]) -> tuple[csr_array, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def statistics(source: Source | Sequence[Source], co_activation: bool = False) -> Statistics:
    """The Statistics of a trace, of a trace file as it streams by, or of several of one model together.

    `co_activation`: count pairs inside a layer too. Raises ValueError where the list is empty, its traces are of
    different models, or a file turns out broken.
    """
    sources = [source] if isinstance(source, Trace | TraceFile) else list(source)
    _rule(bool(sources), "source", "a trace, a trace file or some of them", "an empty list")
    total = _of_one(sources[0], co_activation)
    for more in sources[1:]:
        total = total + _of_one(more, co_activation)
    return total


def _of_one(source: Source, co_activation: bool) -> Statistics:
    layers, tokens, top_k = source.shape
    experts, none = source.num_experts, source.none
    load = np.zeros((layers, experts), np.int64)
    transitions, inside = [], []
    for layer in range(layers):
        moves = np.zeros((experts, experts), np.int64)
        pairs = np.zeros((experts, experts), np.int64)
        last = layer == layers - 1
        for before, after in ((ids, ids) for ids in source.chunks(layer)) if last else source.pairs(layer):
            count_load(before, none, load[layer])
            if not last:
                count_pairs(before, after, none, moves)
            if co_activation:
                count_pairs(before, before, none, pairs)
        if not last:
            transitions.append(csr_array(moves))
        inside.append(csr_array(pairs))
    return Statistics(
        experts,
        tokens,
        top_k,
        load,
        tuple(transitions),
        tuple(inside) if co_activation else None,
        source.layer_names,
        source.experts_of_layer,
    )


@numba.njit(cache=True, nogil=True)
def count_load(ids, none, load):
    """Adds ids [t, K], all below E or `none`, to load [E]."""
    for t in range(ids.shape[0]):
        for k in range(ids.shape[1]):
            if ids[t, k] != none:
                load[ids[t, k]] += 1


@numba.njit(cache=True, nogil=True)
def count_pairs(before, after, none, counts):
    """Adds the pairs (a, b) of before [t, K] and after [t, K'] to counts [E, E]."""
    for t in range(before.shape[0]):
        for i in range(before.shape[1]):
            a = before[t, i]
            if a != none:
                for j in range(after.shape[1]):
                    b = after[t, j]
                    if b != none:
                        counts[a, b] += 1


@numba.njit(cache=True, nogil=True)
def _count_labelled(ids, labels, none, load):
    for t in range(ids.shape[0]):
        for k in range(ids.shape[1]):
            if ids[t, k] != none:
                load[labels[t], ids[t, k]] += 1


def loads_of(source: Source, labels: NDArray[np.integer] | None = None) -> NDArray[np.int64]:
    """int64 [Q, L, E]: the load of each group of tokens.

    labels [T], 0 .. Q - 1, says which group a token is of (a domain, a user); None: the sequences, in the order in
    which they come. 8 Q L E bytes. Raises ValueError where the trace has no sequences and no labels are given, or
    these do not fit.
    """
    layers, tokens, _ = source.shape
    if labels is None:
        found = source.sequence
        if found is None:
            raise ValueError("loads_of: labels must be given for a trace without sequences, got None")
        labels = np.cumsum(np.diff(found, prepend=found[:1]) != 0)
    labels = np.asarray(labels)
    _rule(labels.shape == (tokens,), "labels", f"[T={tokens}]", labels.shape)
    _rule(labels.dtype.kind in "iu", "labels", "whole numbers", labels.dtype, TypeError)
    _rule(not tokens or int(labels.min()) >= 0, "labels", "not negative", labels.min(initial=0))
    groups, labels = int(labels.max()) + 1 if tokens else 0, labels.astype(np.int64)
    load = np.zeros((groups, layers, source.num_experts), np.int64)
    for layer in range(layers):
        at = 0
        for ids in source.chunks(layer):
            _count_labelled(ids, labels[at : at + len(ids)], source.none, load[:, layer])
            at += len(ids)
    return load


class Moving:
    """Statistics that forget: each update weighs what came before by `decay`, for rebalancing while a model serves.

    >>> moving = Moving(decay=0.5)
    >>> for batch in batches:
    ...     moving.update(batch)
    >>> plan = place(moving.statistics(), ...)
    """

    UNIT = 1024  # counts come out in such parts of a token: rounding to whole numbers loses nothing that matters

    def __init__(self, decay: float = 0.9) -> None:
        """Decay in 0 .. 1: 1 forgets nothing, 0 everything but the last update. Raises ValueError."""
        if not 0 <= decay <= 1:  # NaN too
            raise ValueError(f"Moving: decay must be 0 .. 1, got {decay}")
        self.decay = decay
        self.updates = 0
        self.tokens = 0.0
        self.load = np.zeros((0, 0))
        self.transitions: list[csr_array] = []
        self._last: Statistics | None = None

    def update(self, source: Source | Statistics) -> None:
        """Takes in one batch. Raises ValueError where it is of another model; what was counted then stays."""
        new = source if isinstance(source, Statistics) else statistics(source)
        if self._last is None:
            self.load = np.zeros(new.load.shape)
            self.transitions = [csr_array(more.shape) for more in new.transitions]
        else:
            same_model(self._last, new, "an update as in those before")
        self.tokens = self.decay * self.tokens + new.tokens
        self.load = self.decay * self.load + new.load
        both = zip(self.transitions, new.transitions, strict=True)
        self.transitions = [(self.decay * old + more).tocsr() for old, more in both]
        self._last, self.updates = new, self.updates + 1

    def statistics(self) -> Statistics:
        """What is remembered, `tokens` and every count in 1/1024 of a token. Raises ValueError before any update."""
        last = self._last
        if last is None:
            raise ValueError("Moving: updates must be at least 1 before statistics are asked for, got 0")
        transitions = []
        for matrix in self.transitions:
            whole = csr_array(((matrix.data * self.UNIT).astype(np.int64), matrix.indices, matrix.indptr), matrix.shape)
            whole.eliminate_zeros()
            transitions.append(whole)
        return Statistics(
            last.num_experts,
            int(np.ceil(self.tokens * self.UNIT)),
            last.top_k,
            (self.load * self.UNIT).astype(np.int64),
            tuple(transitions),
            None,
            last.layer_names,
            last.experts_of_layer,
        )


def _rule(holds: bool, field: str, rule: str, value: object, kind: type[Exception] = ValueError) -> None:
    if not holds:
        raise kind(f"Statistics: {field} must be {rule}, got {value}")
