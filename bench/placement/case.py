"""What the rows of the table share: the trace in two halves, and how a placement is judged."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...placement.place import open_source
from ...placement.placement import Placement
from ...placement.traces.generate import like_deepseek_v2_lite
from ...placement.traces.trace import Trace, domain_of
from ...placement.walk import walk

TOKENS = 16_000


@dataclass(frozen=True)
class Case:
    """`fit`: the first half of each domain's tokens; `judge`: the second; of the `whole`. `domain` int [T] of each
    half; `name`."""

    name: str
    fit: Trace
    judge: Trace
    fit_domain: NDArray[np.int64]
    judge_domain: NDArray[np.int64]
    whole: Trace


def case_of(path: Path | None, seed: int = 0) -> Case:
    """A trace file's case; its array `domain` [T], where it holds one, says where a domain begins. None: a generated
    trace of two domains. Raises as Trace.load."""
    if path is None:
        trace = like_deepseek_v2_lite(TOKENS, seed)
        domain = (np.arange(TOKENS) >= TOKENS // 2).astype(np.int64)
    else:
        source = open_source(path)
        trace = source if isinstance(source, Trace) else source.trace()
        found = domain_of(path, trace.shape[1])
        domain = np.zeros(trace.shape[1], np.int64) if found is None else found
    first = np.zeros(len(domain), bool)
    for one in np.unique(domain):
        where = np.flatnonzero(domain == one)
        first[where[: len(where) // 2]] = True
    name = "generated like DeepSeek-V2-Lite" if path is None else path.stem
    return Case(name, trace.select(first), trace.select(~first), domain[first], domain[~first], trace)


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What `work` gives, and the processor seconds of this process that it took."""
    start = time.process_time()
    found = work()
    return found, time.process_time() - start


def judged(trace: Trace, placement: Placement, **rules: Any) -> dict[str, float]:
    """The figures that rows print: shares of crossings, load, copies."""
    cost = walk(trace, placement, **rules)
    return {
        "gpu": cost.cross_gpu_share,
        "node": cost.cross_node_share,
        "load": cost.imbalance,
        "copies": cost.copies,
        "node_copies": cost.node_copies,
    }
