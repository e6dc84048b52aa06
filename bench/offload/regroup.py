"""Request regrouping, measured on a trace: distinct experts in a batch, against the order of arrival and a bound."""

from __future__ import annotations

from time import process_time

import numpy as np
from numpy.typing import NDArray

from ...placement.caching.regroup import regroup, touched
from ...placement.traces.trace import Trace


def measure(trace: Trace, *, requests: int = 128, tokens: int = 16, batch: int = 8, seed: int = 0) -> dict[str, float]:
    """Requests are runs of 2 * `tokens` tokens, each from a place drawn at random. What the first half of a run used,
    as shares of its tokens, is taken for the path that a token of the second half takes.

    Means over batches of distinct experts in a layer: expected by these paths, as they arrive (`arrival`), `regrouped`,
    and the least that any grouping can reach, `bound`; and counted, for the first tokens of the second halves, one of
    each request in a batch (one decode step): `judged`, against `judged_arrival`. `cpu_s`: processor seconds of one
    call. Raises ValueError where the trace has not `requests` runs.
    """
    layers, total, _ = trace.shape
    runs = total // (2 * tokens)
    if runs < requests:
        raise ValueError(f"measure: requests must be at most {runs}, the runs of {2 * tokens} tokens, got {requests}")
    first = np.sort(np.random.default_rng(seed).permutation(runs)[:requests]) * 2 * tokens
    first = np.random.default_rng(seed + 1).permutation(first)  # requests arrive in no order
    paths = np.stack([_shares(trace, at, tokens) for at in first])
    steps = [np.stack([_shares(trace, at + tokens + t, 1) for at in first]) for t in range(tokens)]
    arrival = [np.arange(i, min(i + batch, requests)) for i in range(0, requests, batch)]
    begin = process_time()
    found = regroup(paths, batch)
    spent = process_time() - begin
    each = len(arrival) * layers
    return {
        "arrival": touched(paths, arrival) / each,
        "regrouped": found.touched / each,
        "bound": found.bound / each,
        "judged_arrival": float(np.mean([touched(s, arrival) for s in steps])) / each,
        "judged": float(np.mean([touched(s, found.batches) for s in steps])) / each,
        "cpu_s": spent,
    }


def _shares(trace: Trace, at: int, tokens: int) -> NDArray[np.float64]:
    """float64 [L, E]: the share of `tokens` tokens from `at` on that use each expert."""
    layers, experts = trace.shape[0], trace.num_experts
    shares = np.zeros((layers, experts))
    for layer in range(layers):
        ids = trace.expert_ids[layer, at : at + tokens]
        shares[layer] = np.bincount(ids[ids < experts].ravel(), minlength=experts)[:experts] / tokens
    return shares
