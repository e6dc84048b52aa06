"""Replica choice per batch, measured on a trace: an even split beside the linear program, and what a call costs."""

from __future__ import annotations

from time import perf_counter_ns

import numpy as np

from ...placement.live.choice import Choice
from ...placement.search.eplb import eplb
from ...placement.slots import gpu_load, gpu_of_slot
from ...placement.traces.affinity import expert_load
from ...placement.traces.trace import Trace


def measure(
    fit: Trace, judge: Trace, gpus: int = 8, spare: int = 8, batch: int = 128, seed: int | None = None
) -> dict[str, float]:
    """EPLB's plan for the load of `fit`, on E + `spare` slots, under batches of tokens of `judge`: consecutive ones, as
    a long prompt brings them, or with `seed` ones in random order, as many sequences at once do.

    Means over batches and layers of the largest GPU load over the mean: `even` (each replica the same part), `program`
    (the linear program), `whole_rows` (as `Choice.rows` gives them); microseconds of a call for one layer, checks of
    its arguments included, `median_us` and `p99_us`; and the number of `calls`. Raises ValueError where the slots are
    not a multiple of `gpus`, or `judge` has no whole batch.
    """
    experts = fit.num_experts
    if (experts + spare) % gpus:
        raise ValueError(f"measure: spare must make E + spare a multiple of {gpus} GPUs, got {experts} + {spare}")
    layers, tokens, _ = judge.expert_ids.shape
    if tokens < batch:
        raise ValueError(f"measure: batch must be at most the {tokens} tokens, got {batch}")
    slots = [(experts + spare) // gpus] * gpus
    order = np.arange(tokens) if seed is None else np.random.default_rng(seed).permutation(tokens)
    owner, plan = gpu_of_slot(slots), eplb(expert_load(fit), slots)
    every, single = Choice(plan, owner), [Choice(row, owner) for row in plan]
    peaks: dict[str, list[np.ndarray]] = {"even": [], "program": [], "whole_rows": []}
    spent = []
    for start in range(0, tokens - batch + 1, batch):
        counts = expert_load(Trace(judge.expert_ids[:, order[start : start + batch]], experts))
        mean = counts.sum(1) / gpus
        rows = np.empty(plan.shape, np.int64)
        for layer in range(layers):
            begin = perf_counter_ns()
            rows[layer] = single[layer].rows(counts[layer])
            spent.append((perf_counter_ns() - begin) / 1e3)
        busiest = np.stack([np.bincount(owner, row, gpus) for row in rows]).max(1)
        peaks["even"].append(gpu_load(counts, plan, owner, gpus).max(1) / mean)
        peaks["program"].append(every.least_time(counts) / mean)
        peaks["whole_rows"].append(busiest / mean)
    found = {name: float(np.mean(values)) for name, values in peaks.items()}
    spent = spent[layers:]  # the first batch also compiles, or loads what was compiled
    return found | {
        "median_us": float(np.median(spent)),
        "p99_us": float(np.percentile(spent, 99)),
        "calls": len(spent),
    }
