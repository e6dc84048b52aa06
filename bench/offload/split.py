"""The split between host and device, measured on a trace: beside the optimum, Fiddler's rule and the fixed choices."""

from __future__ import annotations

from dataclasses import replace
from time import process_time_ns

import numpy as np
import torch
from numpy.typing import NDArray

from ...moe.offload.costs import measure_costs
from ...placement.caching.costs import Costs
from ...placement.caching.split import DEVICE, HOST, johnson, makespan_of, split
from ...placement.cluster.links import Link
from ...placement.traces.trace import Trace

FIDDLER_HOST, FIDDLER_FETCH = 7, 70  # its constants: a row on the host, an expert fetched


def measure(
    trace: Trace,
    costs: Costs,
    *,
    resident: float = 0.25,
    batches: tuple[int, ...] = (1, 4, 16, 64),
    steps: int = 400,
    seed: int = 0,
) -> dict[int, dict[str, float]]:
    """By tokens in a batch, drawn from the trace at random, `steps` of (batch, layer) each. A share `resident` of every
    layer's experts, those with most tokens, is on the device, the others in host memory.

    Sums of makespans over that of the optimum: `split` (as it comes), `fiddler` (each expert where its published
    constants are less), `each` (the same by `costs`), `fetch` and `host` (all that is not on the device); `worst`, of
    `split` over what is proved to be the least, in any step; the share of steps in which that is the optimum,
    `proved`; in how many `split` was slower than the better fixed choice, `slower`; processor microseconds of a call,
    checks included, `median_us` and `p99_us`; and the mean number of experts in a step, `experts`, of which `away` are
    to be placed.
    """
    hot = _hot(trace, resident)
    found = {}
    for batch in batches:
        rng = np.random.default_rng(seed)
        sums: dict[str, float] = {}
        spent, worst, proved, slower, experts, away = [], 1.0, 0, 0, 0, 0
        split([1], [HOST], costs)  # compiled, or loaded
        for step in range(steps):
            layer = step % trace.shape[0]
            ids = trace.expert_ids[layer, rng.integers(0, trace.shape[1], batch)]
            need, rows = np.unique(ids[ids < trace.num_experts], return_counts=True)
            where = np.where(hot[layer, need], DEVICE, HOST)
            begin = process_time_ns()
            ours = split(rows, where, costs)
            spent.append((process_time_ns() - begin) / 1e3)
            best = split(rows, where, costs, tolerance=0.0, states=1 << 13)
            times = {"optimum": best.makespan_s, "split": ours.makespan_s} | rivals(rows, where, costs)
            for name, seconds in times.items():
                sums[name] = sums.get(name, 0.0) + seconds
            worst = max(worst, ours.makespan_s / best.bound_s)
            proved += best.bound_s >= best.makespan_s * (1 - 1e-12)
            slower += ours.makespan_s > min(times["fetch"], times["host"]) * (1 + 1e-12)
            experts, away = experts + len(need), away + int((where == HOST).sum())
        found[batch] = {name: seconds / sums["optimum"] for name, seconds in sums.items() if name != "optimum"} | {
            "worst": worst,
            "proved": proved / steps,
            "slower": float(slower),
            "median_us": float(np.median(spent)),
            "p99_us": float(np.percentile(spent, 99)),
            "experts": experts / steps,
            "away": away / steps,
        }
    return found


def rivals(rows: NDArray[np.int64], where: NDArray[np.int64], costs: Costs) -> dict[str, float]:
    """Makespans of other rules for one step, what is fetched in the best order."""
    there = where == DEVICE
    n = rows[~there]
    device, host, fetch = costs.on_device(n), costs.on_host(n), np.full(len(n), costs.copy_s())
    busy = float(costs.on_device(rows[there]).sum())
    order = johnson(fetch, device)
    rules = {
        "fiddler": n * FIDDLER_HOST < FIDDLER_FETCH,
        "each": host < fetch + device,
        "fetch": np.zeros(len(n), bool),
        "host": np.ones(len(n), bool),
    }
    return {
        name: makespan_of(rule[order], fetch[order], device[order], host[order], busy, costs.start_s)
        for name, rule in rules.items()
    }


def costs_with(copy_GBps: float, device_speed: float, hidden: int = 2048, intermediate: int = 1408) -> Costs:
    """What the host's part costs here, in bf16, measured; the device `device_speed` times as fast, behind a link of
    `copy_GBps` and 10 us: assumed, for machines without one."""
    experts = 4
    weights = {
        "w_gate_up": torch.randn(experts, 2 * intermediate, hidden, dtype=torch.bfloat16),
        "w_down": torch.randn(experts, hidden, intermediate, dtype=torch.bfloat16),
    }
    here = measure_costs(weights)
    device = tuple(s / device_speed for s in here.device_s)
    return replace(here, device_s=device, host_s=here.device_s, copy=Link(10.0, copy_GBps), start_s=20e-6)


def _hot(trace: Trace, share: float) -> NDArray[np.bool_]:
    """bool [L, E]: the share of each layer's experts that have most tokens."""
    layers, _, _ = trace.shape
    kept = round(share * trace.num_experts)
    hot = np.zeros((layers, trace.num_experts), bool)
    for layer in range(layers):
        ids = trace.expert_ids[layer]
        load = np.bincount(ids[ids < trace.num_experts].ravel(), minlength=trace.num_experts)
        hot[layer, np.argsort(-load, kind="stable")[:kept]] = True
    return hot
