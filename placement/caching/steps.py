"""A trace as a cache sees it: one step after the other, the distinct experts that a layer needs at once."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..compiled import njit
from ..traces.file import TraceFile
from ..traces.trace import Trace


class Steps(NamedTuple):
    """N steps with A accesses in all."""

    layer: NDArray[np.int32]  # [N]
    offsets: NDArray[np.int64]  # [N + 1] where each step's experts begin
    ids: NDArray[np.int32]  # [A] distinct and rising inside a step
    begins: NDArray[np.bool_]  # [N] another sequence begins here
    tokens: NDArray[np.int32]  # [N] tokens of the forward pass
    layers: int
    experts: int

    def __len__(self) -> int:  # type: ignore[override]  # of steps, not of fields
        return len(self.layer)

    def of(self, n: int) -> NDArray[np.int32]:
        """The experts of one step."""
        return self.ids[self.offsets[n] : self.offsets[n + 1]]


def steps_of(source: Trace | TraceFile, batch: int = 1) -> Steps:
    """The steps of forward passes over `batch` consecutive tokens of one sequence (its last pass may have fewer), every
    layer in turn. A TraceFile is read into memory, a byte or two a choice. Raises ValueError where batch is below 1."""
    if batch < 1:
        raise ValueError(f"steps_of: batch must be at least 1, got {batch}")
    trace = source.trace() if isinstance(source, TraceFile) else source
    layers, tokens, top_k = trace.shape
    first = np.ones(tokens, np.bool_)  # of a sequence
    if tokens:
        first[1:] = False if trace.sequence is None else np.diff(trace.sequence) != 0
    starts = _starts(first, batch)
    sizes = np.diff(starts)
    offsets = np.zeros(len(sizes) * layers + 1, np.int64)
    ids = np.empty(int(np.minimum(sizes * top_k, trace.num_experts).sum()) * layers, np.int32)
    _gather(trace.expert_ids, trace.none, trace.num_experts, starts, offsets, ids)
    begins = np.zeros(len(sizes) * layers, np.bool_)
    begins[::layers] = first[starts[:-1]]
    layer = np.tile(np.arange(layers, dtype=np.int32), len(sizes))
    of_step = np.repeat(sizes, layers).astype(np.int32)
    return Steps(layer, offsets, ids[: offsets[-1]], begins, of_step, layers, trace.num_experts)


@njit
def _starts(first, batch):
    """Where passes begin among the tokens, and the number of tokens."""
    found = np.empty(len(first) + 1, np.int64)
    n, size = 0, batch
    for t in range(len(first)):
        if first[t] or size == batch:
            found[n] = t
            n += 1
            size = 0
        size += 1
    found[n] = len(first)
    return found[: n + 1]


@njit
def _gather(expert_ids, none, experts, starts, offsets, ids):
    layers, _, top_k = expert_ids.shape
    seen = np.full(experts, -1, np.int64)
    step, n = 0, 0
    for g in range(len(starts) - 1):
        for layer in range(layers):
            start = n
            for t in range(starts[g], starts[g + 1]):
                for k in range(top_k):
                    e = expert_ids[layer, t, k]
                    if e != none and seen[e] != step:
                        seen[e] = step
                        ids[n] = e
                        n += 1
            ids[start:n].sort()
            step += 1
            offsets[step] = n


NEVER = np.iinfo(np.int64).max // 2


@njit
def next_use(steps):
    """For each access, the number of the next step that needs the same expert (NEVER: none), [A], and the first step
    that needs each expert, [L, E]."""
    first = np.full((steps.layers, steps.experts), NEVER, np.int64)
    found = np.empty(len(steps.ids), np.int64)
    for n in range(len(steps.layer) - 1, -1, -1):
        for i in range(steps.offsets[n], steps.offsets[n + 1]):
            e = steps.ids[i]
            found[i] = first[steps.layer[n], e]
            first[steps.layer[n], e] = n
    return found, first
