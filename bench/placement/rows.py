"""The rows of the table, one function each: what is compared, on which topology, by which figures."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...placement.bounds import crossing_bound
from ...placement.cluster.topology import Topology, Workload
from ...placement.live.rebalance import Rebalancer, simulate
from ...placement.place import place, problem_of
from ...placement.placement import Placement
from ...placement.problem import Objective
from ...placement.search.assign import assign
from ...placement.search.state import to_slots
from ...placement.traces.drift import drift
from ...placement.traces.generate import generate
from ...placement.traces.statistics import statistics
from ...placement.traces.steady import steady_load
from ...placement.traces.trace import Trace
from ...placement.walk import Foretold
from . import choice
from .case import Case, judged, timed

ONE, TWO, LARGE = Topology(1, 8), Topology(2, 8), Topology(8, 8)
FOUND = "placed"


@dataclass(frozen=True)
class Row:
    """A row of the table: a line of figures for each contestant, and all of it for JSON."""

    title: str
    head: tuple[str, ...]
    lines: Sequence[tuple[str, ...]]
    figures: dict[str, Any] = field(default_factory=dict)


def calm(max_load: float, node: float = 0.0) -> Objective:
    """Few crossings while the load stays near the mean."""
    return Objective(gpu=1.0, node=node, load=0.01, max_load=max_load)


def made(trace: Trace, topology: Topology, objective: Objective, **more: Any) -> tuple[Placement, float]:
    """A placement without a bound, and its processor seconds."""
    return timed(lambda: place(trace, topology, objective=objective, bound=False, time_limit=600, **more))


def steady(case: Case) -> NDArray[np.float64]:
    """The load that is expected of tokens to come: long sequences cut short."""
    return steady_load(case.fit, case.fit_domain)


def contest(
    case: Case, topology: Topology, ours: dict[str, Objective], effort: float, others: Sequence[str] = ("eplb",)
) -> dict[str, dict[str, float]]:
    """Figures on the judging half of other methods' placements and of ours, by name."""
    how: dict[str, tuple[Objective, dict[str, Any]]] = {
        method: (Objective(load=1.0), {"method": method}) for method in others
    }
    how |= {name: (objective, {"load": steady(case), "effort": effort}) for name, objective in ours.items()}
    found = {}
    for name, (objective, more) in how.items():
        placement, seconds = made(case.fit, topology, objective, **more)
        found[name] = judged(case.judge, placement) | {"fitted_load": placement.cost["imbalance"], "cpu_s": seconds}
    return found


def crossings(case: Case, effort: float) -> Row:
    """8 GPUs: transitions across GPUs while the load stays near the mean."""
    ours = {FOUND: calm(1.06), "placed, load 1.085 on the fit": calm(1.085)}
    found = contest(case, ONE, ours, 1.5 * effort, ("eplb", "balance"))
    exact, seconds = timed(lambda: assign(problem_of(case.fit, ONE, None, Objective(gpu=1))))
    found["exact layers in turn"] = _crossed(case.judge, exact, ONE) | {"cpu_s": seconds}
    lines = [(name, _share(row["gpu"]), f"{row['load']:.3f}", f"{row['cpu_s']:.1f}") for name, row in found.items()]
    return Row("8 GPUs: transitions across GPUs", ("", "across GPUs", "load", "CPU s"), lines, found)


def certified(case: Case, effort: float) -> Row:
    """8 GPUs, affinity alone: how far from the best possible, proved."""
    placement, search_s = made(case.fit, ONE, Objective(gpu=1.0), effort=effort)
    counts = statistics(case.fit).transitions
    limit_s = max(30 * effort, 1.0)
    bound, bound_s = timed(
        lambda: crossing_bound(counts, placement.slots_of_gpu, time_limit=limit_s, clock=time.process_time)
    )
    total = int(sum(matrix.sum() for matrix in counts))
    reached, gap = placement.cost["cross_gpu"] / total, bound.gap(placement.cost["cross_gpu"])
    line = (FOUND, _share(reached), _share(bound.value / total), f"{gap:.2%}", f"{search_s:.1f} + {bound_s:.1f}")
    figures = {"reached": reached, "bound": bound.value / total, "gap": gap, "cpu_s": [search_s, bound_s]}
    return Row("8 GPUs: proved distance from the best", ("", "across GPUs", "bound", "gap", "CPU s"), [line], figures)


def nodes(case: Case, effort: float) -> Row:
    """16 GPUs on 2 nodes."""
    ours = {FOUND: calm(1.075, node=3.0), "placed, load 1.12 on the fit": calm(1.12, node=3.0)}
    found = contest(case, TWO, ours, 2 * effort)
    lines = [
        (name, _share(row["gpu"]), _share(row["node"]), f"{row['load']:.3f}", f"{row['cpu_s']:.1f}")
        for name, row in found.items()
    ]
    head = ("", "across GPUs", "across nodes", "load", "CPU s")
    return Row("16 GPUs on 2 nodes: transitions", head, lines, found)


def copies(case: Case, effort: float) -> Row:
    """8 GPUs: rows that leave their GPU, there and back, per token and layer, over EPLB's with fixed homes."""
    objective = Objective(copies=1.0, load=0.1, max_load=1.06, home="most")
    ours = {"load": steady(case), "effort": 3 * effort}
    found = {}
    for name, how in (("eplb", {"method": "eplb"}), (FOUND, ours)):
        placement, seconds = made(case.fit, ONE, objective, **how)
        tell = Foretold.of(statistics(case.fit).transitions, placement)
        found[name] = judged(case.judge, placement) | {
            "most": judged(case.judge, placement, home="most")["copies"],
            "foretold": judged(case.judge, placement, home="foretold", foretold=tell)["copies"],
            "cpu_s": seconds,
        }
    base = found["eplb"]["copies"]
    lines = [
        (name, *(f"{row[home]:.2f} ({row[home] / base - 1:+.1%})" for home in ("copies", "most", "foretold")),
         f"{row['load']:.3f}", f"{row['cpu_s']:.1f}")
        for name, row in found.items()
    ]  # fmt: skip
    head = ("", "home fixed", "home moves to most", "home foretold", "load", "CPU s")
    return Row("8 GPUs: rows that leave their GPU, a token and layer", head, lines, found)


def replicas(case: Case, effort: float) -> Row:
    """8 GPUs with one more slot each."""
    found = {}
    ways: tuple[tuple[str, int | None, Objective], ...] = (
        ("no replicas", None, calm(1.06)),
        ("one more slot", case.fit.num_experts // 8 + 1, Objective(gpu=1.0, load=0.3, max_load=1.03)),
    )
    for name, per_gpu, objective in ways:
        more = {"slots_per_gpu": per_gpu, "load": steady(case), "effort": (4 if per_gpu else 1.5) * effort}
        placement, seconds = made(case.fit, ONE, objective, **more)
        found[name] = judged(case.judge, placement, replica="follow") | {"cpu_s": seconds}
    points = 100 * (found["no replicas"]["gpu"] - found["one more slot"]["gpu"])
    lines = [(name, _share(row["gpu"]), f"{row['load']:.3f}", f"{row['cpu_s']:.1f}") for name, row in found.items()]
    lines.append(("points less", f"{points:.1f}", "", ""))
    return Row("8 GPUs, one more slot each", ("", "across GPUs", "load", "CPU s"), lines, found | {"points": points})


def shift(case: Case, effort: float) -> Row:
    """Fitted on one domain, judged on another."""
    found: dict[str, Any] = {}
    domains = np.unique(case.fit_domain)
    ways: tuple[tuple[str, float, dict[str, Any]], ...] = (
        ("eplb", 1.06, {"method": "eplb"}),
        (FOUND, 1.06, {"effort": effort}),
        ("placed, robust", 1.06, {"effort": effort, "scenarios": 12}),
    )
    for a in domains:
        fit = case.fit.select(case.fit_domain == a)
        for name, max_load, more in ways:
            placement, _ = made(fit, ONE, calm(max_load), **more)
            for b in domains:
                figures = judged(case.judge.select(case.judge_domain == b), placement)
                found.setdefault(f"{a} -> {b}", {})[name] = figures
    lines = [
        (pair, name, _share(row["gpu"]), f"{row['load']:.3f}")
        for pair, rows in found.items()
        for name, row in rows.items()
    ]
    if len(domains) > 1:
        first, second = (case.fit.select(case.fit_domain == d) for d in domains[:2])
        found["drift"] = str(drift(first, second))
    head = ("domains", "", "across GPUs", "load")
    return Row("8 GPUs: fitted on one domain, judged on another", head, lines, found)


def large(case: Case, effort: float) -> Row:
    """60 layers of 256 experts, top-8, on 64 GPUs in 8 nodes: generated, whatever the trace."""
    trace, objective = large_trace(), Objective(gpu=1.0, node=7.0)
    problem, counting_s = timed(lambda: problem_of(trace, LARGE, None, objective))
    first, first_s = timed(lambda: assign(problem, sweeps=0))
    fixed, fixed_s = timed(lambda: assign(problem))
    placement, search_s = made(trace, LARGE, objective, effort=2 * effort)
    limit_s = max(60 * effort, 1.0)
    bound, bound_s = timed(
        lambda: crossing_bound(
            problem.transitions,
            problem.slots_of_gpu,
            LARGE.node_of_gpu,
            node_weight=objective.node,
            time_limit=limit_s,
            clock=time.process_time,
        )
    )
    found = {
        "layers in turn, once": _crossed(trace, first, LARGE) | {"cpu_s": first_s},
        "to a fixpoint": _crossed(trace, fixed, LARGE) | {"cpu_s": fixed_s},
        FOUND: judged(trace, placement) | {"cpu_s": search_s},
        "bound": {level.name: level.crossing / level.total for level in bound.levels} | {"cpu_s": bound_s},
    }
    for row in found.values():
        row["score"] = row["gpu"] + 7 * row["node"]
    gap = 1 - found["bound"]["score"] / found[FOUND]["score"]
    lines = [
        (name, _share(row["gpu"]), _share(row["node"]), f"{row['score']:.5f}", f"{row['cpu_s']:.1f}")
        for name, row in found.items()
    ]
    lines.append(("proved gap", "", "", f"{gap:.1%}", ""))
    head = ("", "across GPUs", "across nodes", "GPUs + 7 nodes", "CPU s")
    return Row(
        "60 layers x 256 experts x 64 GPUs on 8 nodes", head, lines, {**found, "gap": gap, "counting_s": counting_s}
    )


def large_trace() -> Trace:
    """Zipf 0.5, 70 % of choices inside a token's topic, 32 topics, kept from layer to layer in 97 of 100 cases."""
    return generate(60, 256, 8, 20_000, skew=0.5, affinity=0.7, topics=32, hold=0.97, seed=0)


def _crossed(trace: Trace, gpu_of_expert: np.ndarray, topology: Topology) -> dict[str, float]:
    return judged(trace, Placement(to_slots(gpu_of_expert), trace.num_experts, topology))


def rebalanced(case: Case, effort: float) -> Row:
    """A generated trace whose experts' popularity drifts, served window by window: when to migrate."""
    trace = generate(8, 64, 6, 24_000, skew=0.9, affinity=0.6, drift=1.0, seed=0)
    first = trace.select(slice(2_000))
    objective = Objective.time(ONE, Workload(), trace.shape[0], trace.shape[2])
    placement, _ = made(first, ONE, objective, effort=0.2 * effort)

    def propose(window: Trace, now: Placement) -> Placement:
        return made(window, ONE, objective, start=now, effort=0.1 * effort)[0]

    found = {}
    for steps in (10, 100, 10_000):
        rule = Rebalancer(propose, expert_bytes=6.0 * 7168 * 2048, steps=steps)
        for outcome in simulate(trace, placement, rule, 2_000):
            found[f"{steps} steps a window, {outcome.policy}"] = {
                "seconds": outcome.seconds,
                "migrations": outcome.migrations,
                "moved": outcome.moved,
            }
    lines = [(name, f"{row['seconds']:.3f}", str(row["migrations"]), str(row["moved"])) for name, row in found.items()]
    head = ("", "predicted s", "migrations", "experts moved")
    return Row("8 GPUs, a drifting trace: never, always, or where it pays", head, lines, found)


def batches(case: Case, effort: float) -> Row:
    """Replica choice per batch of 128 tokens, EPLB's plan with 8 spare slots."""
    found, lines = {}, []
    for name, seed in (("tokens in random order", 0), ("consecutive tokens", None)):
        row = found[name] = choice.measure(case.fit, case.judge, seed=seed)
        lines.append(
            (name, *(f"{row[key]:.3f}" for key in ("even", "program", "whole_rows")), f"{row['median_us']:.0f}")
        )
    head = ("", "equal split", "program", "whole rows", "us a layer")
    return Row("replica choice per batch of 128, 8 spare slots: load", head, lines, found)


ROWS: dict[str, Callable[[Case, float], Row]] = {
    "crossings": crossings,
    "certified": certified,
    "nodes": nodes,
    "copies": copies,
    "replicas": replicas,
    "shift": shift,
    "batches": batches,
    "rebalanced": rebalanced,
    "large": large,
}


def _share(value: float) -> str:
    return f"{100 * value:.2f} %"
