"""What a policy is made of: arrays that compiled code reads, and what it may know when it begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...traces.trace import Trace

# which branch of step.py; numba takes them for constants
LRU, LFU, LFU_CACHED, LFRU, SEQUENCE, LAYER, AFFINITY, STATIC, STATISTICS, RING, BELADY, RANDOM, LEARNED = range(13)


class State(NamedTuple):
    """A policy at work, as compiled code reads it."""

    kind: int  # which branch of step.advance
    numbers: NDArray[np.float64]  # [*] parameters
    tables: NDArray[np.float32]  # [A, B, C] what was learned beforehand; foresight learns on in it
    memory: NDArray[np.float64]  # [M, L, E] what it remembers
    notes: NDArray[np.float64]  # [*, *] what it remembers in another shape
    value: NDArray[np.float64]  # [L, E] the worth of keeping each expert
    frank: bool  # the values of what a step has just used are to be believed: it may go at once, for the next miss


@dataclass(frozen=True)
class Setting:
    """What a policy may know when it begins: sizes, the slots of the cache in all, and a trace to learn from."""

    layers: int
    experts: int
    slots: int
    trace: Trace | None = None
    options: Mapping[str, float] = field(default_factory=dict)


def state(
    kind: int,
    setting: Setting,
    *,
    numbers: tuple[float, ...] = (),
    tables: NDArray[np.floating] | None = None,
    memory: int = 0,
    notes: NDArray[np.floating] | None = None,
    frank: bool = False,
) -> State:
    """A State that has seen nothing: `memory` tables [L, E] of zeros, all values zero."""
    shape = (setting.layers, setting.experts)
    return State(
        kind,
        np.array(numbers, np.float64),
        np.zeros((0, 0, 0), np.float32) if tables is None else np.ascontiguousarray(tables, np.float32),
        np.zeros((memory, *shape)),
        np.zeros((0, 0)) if notes is None else np.array(notes, np.float64),
        np.zeros(shape),
        frank,
    )


def options(name: str, setting: Setting, **known: float) -> dict[str, float]:
    """The setting's options over the defaults `known`. Raises ValueError for one that the policy does not have."""
    odd = sorted(set(setting.options) - set(known))
    if odd:
        raise ValueError(f"policy: options of {name} must be among {sorted(known)}, got {odd}")
    return known | dict(setting.options)


def learned_from(name: str, setting: Setting) -> Trace:
    """The trace to learn from. Raises ValueError where there is none, or it is of another model."""
    trace, wanted = setting.trace, (setting.layers, setting.experts)
    if trace is None:
        raise ValueError(f"policy: {name} must be given a trace to learn from, got none")
    if (trace.shape[0], trace.num_experts) != wanted:
        raise ValueError(
            f"policy: the trace of {name} must have L, E = {wanted}, got {(trace.shape[0], trace.num_experts)}"
        )
    return trace
