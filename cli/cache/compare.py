"""Policies on the part of a trace that they did not learn from: hits, copies, waiting, and what bounds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...placement.caching.locality import sch, srp
from ...placement.caching.policies import NEED_TRACE
from ...placement.caching.predict import fit as fit_predictor
from ...placement.caching.predict import foretell
from ...placement.caching.simulate import Prefetch, Simulation, foreseen, perfect, simulate
from ...placement.caching.steps import Steps, steps_of
from ...placement.caching.tiers import Times, loads_of, stall
from ...placement.place import open_source
from ...placement.traces.trace import Trace, domain_of

AHEAD = ("perfect", "next", "popular", "transition", "ridge", "path")  # what --prefetch may name
SEGMENTS = (4, 16, 64, 256)


@dataclass(frozen=True)
class Case:
    """`fit` to learn from (None: nothing), `judge` to be judged on."""

    fit: Trace | None
    judge: Trace


def case_of(path: Path, share: float) -> Case:
    """The first `share` of each domain's tokens to learn from, the rest to judge; the file's array `domain` [T], where
    it holds one, says which domain a token is of. Raises as Trace.load, and ValueError where nothing is left to judge.
    """
    source = open_source(path)
    trace = source if isinstance(source, Trace) else source.trace()
    tokens = trace.shape[1]
    domain = domain_of(path, tokens)
    if domain is None:
        domain = np.zeros(tokens, np.int64)
    first = np.zeros(tokens, bool)
    for one in np.unique(domain):
        where = np.flatnonzero(domain == one)
        first[where[: int(len(where) * share)]] = True
    if first.all():
        raise ValueError(f"cache: --fit-share must leave tokens to judge on, got {share} of {tokens}")
    return Case(trace.select(first) if first.any() else None, trace.select(~first))


def candidates(case: Case, steps: Steps, kind: str, horizon: int, most: int) -> Prefetch:
    """What is fetched ahead of every step: the experts that it will need, all of its layer in order, or those that a
    predictor names."""
    if kind == "perfect":
        return perfect(steps, horizon, most)
    if kind == "next":
        every = np.broadcast_to(np.arange(steps.experts, dtype=np.int32), (len(steps), steps.experts))
        return Prefetch(every, None, horizon, most)
    if case.fit is None:
        raise ValueError(f"cache: --prefetch {kind} must have tokens to learn from, got --fit-share 0")
    chances = foretell(fit_predictor(case.fit, kind, horizon=horizon), case.judge)
    found = foreseen(steps, chances, min(steps.experts, 2 * most), horizon, most)
    return Prefetch(found.ids, None, horizon, most)  # policies' values are no chances to compare with


@dataclass(frozen=True)
class Plan:
    """What the table is asked for."""

    policies: Sequence[str]
    slots: int
    scope: str
    batch: int
    times: Times
    host_slots: int | None
    prefetch: str | None
    horizon: int
    most: int


def compare(case: Case, plan: Plan) -> dict[str, Any]:
    """Figures for JSON: a row for each policy and Belady, and of the trace itself."""
    steps = steps_of(case.judge, plan.batch)
    ahead = () if plan.prefetch is None else (candidates(case, steps, plan.prefetch, plan.horizon, plan.most),)
    lru, best = (simulate(steps, name, plan.slots, scope=plan.scope) for name in ("lru", "belady"))
    rows, left_out = {}, {}
    for name in (*plan.policies, "belady"):
        try:
            found = simulate(steps, name, plan.slots, scope=plan.scope, fit=case.fit, prefetch=ahead, log=True)
        except ValueError as error:
            if name not in NEED_TRACE:
                raise
            left_out[name] = str(error)
            continue
        rows[name] = _row(found, lru, best, plan)
    layers, _, top_k = case.judge.shape
    return {
        "tokens": case.judge.shape[1],
        "learned_from": 0 if case.fit is None else case.fit.shape[1],
        "layers": layers,
        "experts": steps.experts,
        "top_k": top_k,
        "slots": plan.slots,
        "scope": plan.scope,
        "batch": plan.batch,
        "prefetch": plan.prefetch,
        "accesses": int(lru.accesses.sum()),
        "policies": rows,
        "left_out": left_out,
        "locality": locality(case.judge, top_k),
    }


def _row(found: Simulation, lru: Simulation, best: Simulation, plan: Plan) -> dict[str, Any]:
    host = None
    if plan.host_slots is not None:
        host = simulate(loads_of(found), "lru", plan.host_slots, scope=plan.scope, log=True)
    waits = stall(found, plan.times, host)
    gap = best.hit_rate - lru.hit_rate
    tokens = int(found.steps.tokens[:: found.steps.layers].sum())
    return {
        "hit_rate": found.hit_rate,
        "gap_closed": (found.hit_rate - lru.hit_rate) / gap if gap > 0 else 0.0,
        "loads_per_token": found.loads / tokens,
        "ahead_per_token": int(found.prefetched.sum()) / tokens,
        "ahead_used": float(found.used.sum() / max(1, found.prefetched.sum())),
        "copies_of_lru": found.transfers / max(1, lru.loads),
        "waves": found.waves,
        "reads_per_token": 0.0 if host is None else host.loads / tokens,
        "compute_ms": 1e3 * waits.compute_s / tokens,
        "stall_ms": 1e3 * waits.stall_s / tokens,
        "bound_ms": 1e3 * waits.bound_s / tokens,
    }


def locality(trace: Trace, top_k: int) -> dict[str, Any]:
    """SRP for segments of 4 to 256 tokens with its best group size, and SCH for 1, 2 and 4 times K slots."""
    several = trace.sequence is not None and len(np.unique(trace.sequence)) > 1
    segments = {s: srp(trace, s, resamples=200 if several else 0) for s in SEGMENTS}
    ahead = {s: sch(trace, s) for s in (0, *SEGMENTS)}
    sizes = [m for m in (top_k, 2 * top_k, 4 * top_k) if m <= trace.num_experts]
    return {
        "srp": {s: {"value": float(x.value), "rho": float(x.rho), "low": float(x.low), "high": float(x.high)}
                for s, x in segments.items()},
        "sch": {s: {m: x.recall(m) for m in sizes} for s, x in ahead.items()},
    }  # fmt: skip


def curves(case: Case, plan: Plan) -> tuple[list[int], dict[str, list[float]]]:
    """(slots a layer, hit rates of each policy and Belady at them), without prefetch."""
    steps = steps_of(case.judge, plan.batch)
    slots = sizes(steps.experts, case.judge.shape[2])
    found: dict[str, list[float]] = {}
    for name in (*plan.policies, "belady"):
        try:
            found[name] = [simulate(steps, name, m, scope=plan.scope, fit=case.fit).hit_rate for m in slots]
        except ValueError:
            if name not in NEED_TRACE:
                raise
    return slots, found


def sizes(experts: int, top_k: int) -> list[int]:
    """The numbers of slots that a picture of hit rates shows: from a sixteenth of the experts to three quarters."""
    shares = (0.0625, 0.125, 0.1875, 0.25, 0.375, 0.5, 0.75)
    return sorted({max(top_k, round(share * experts)) for share in shares})
