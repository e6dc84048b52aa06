"""The rows of the table, one function each: what is compared, on which topology, by which figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...placement.assign import assign
from ...placement.bounds import crossing_bound
from ...placement.drift import drift
from ...placement.generate import generate
from ...placement.place import place, problem_of
from ...placement.placement import Placement
from ...placement.problem import Objective
from ...placement.state import to_slots
from ...placement.statistics import statistics
from ...placement.topology import Topology
from ...placement.trace import Trace
from ...placement.walk import Foretold
from . import choice
from .case import Case, judged, timed

ONE, TWO = Topology(1, 8), Topology(2, 8)
CALM = dict(gpu=1.0, load=0.01)


@dataclass(frozen=True)
class Row:
    """A row of the table: a line of figures for each contestant, and all of it for JSON."""

    title: str
    head: tuple[str, ...]
    lines: list[tuple[str, ...]]
    figures: dict[str, Any] = field(default_factory=dict)


def crossings(case: Case, effort: float) -> Row:
    """8 GPUs: transitions across GPUs while the load stays near the mean."""
    found, lines = {}, []
    objective = Objective(**CALM, max_load=1.055)
    for name, method in (("EPLB", "eplb"), ("load alone", "balance"), ("placed", "auto")):
        made, seconds = timed(
            lambda method=method: place(case.fit, ONE, method=method, objective=objective, bound=False, effort=effort)
        )
        found[name] = {**judged(case.judge, made), "seconds": seconds, "fitted_load": made.cost["imbalance"]}
    exact = assign(problem_of(case.fit, case.fit, ONE, None, Objective(gpu=1)))
    found["exact layers in turn"] = judged(case.judge, Placement(to_slots(exact), case.fit.num_experts, ONE))
    for name, row in found.items():
        lines.append((name, _share(row["gpu"]), f"{row['load']:.3f}", f"{row.get('seconds', 0):.1f}"))
    return Row("8 GPUs: transitions across GPUs", ("", "across GPUs", "load", "CPU s"), lines, found)


def certified(case: Case, effort: float) -> Row:
    """8 GPUs, affinity alone: how far from the best possible, proved."""
    objective = Objective(gpu=1.0)
    made, search_s = timed(lambda: place(case.fit, ONE, objective=objective, bound=False, effort=effort))
    counts = statistics(case.fit).transitions
    bound, bound_s = timed(lambda: crossing_bound(counts, made.slots_of_gpu, time_limit=max(30 * effort, 1.0)))
    total = int(sum(matrix.sum() for matrix in counts))
    reached = made.cost["cross_gpu"] / total
    gap = bound.gap(made.cost["cross_gpu"])
    line = ("placed", _share(reached), _share(bound.value / total), f"{gap:.2%}", f"{search_s:.1f} + {bound_s:.1f}")
    figures = {"reached": reached, "bound": bound.value / total, "gap": gap, "seconds": [search_s, bound_s]}
    return Row("8 GPUs: proved distance from the best", ("", "across GPUs", "bound", "gap", "CPU s"), [line], figures)


def nodes(case: Case, effort: float) -> Row:
    """16 GPUs on 2 nodes."""
    objective = Objective(gpu=1.0, node=3.0, load=0.01, max_load=1.085)
    found = {}
    for name, method in (("EPLB", "eplb"), ("placed", "auto")):
        made, seconds = timed(
            lambda method=method: place(case.fit, TWO, method=method, objective=objective, bound=False, effort=effort)
        )
        found[name] = {**judged(case.judge, made), "seconds": seconds}
    lines = [
        (name, _share(row["gpu"]), _share(row["node"]), f"{row['load']:.3f}", f"{row['seconds']:.1f}")
        for name, row in found.items()
    ]
    head = ("", "across GPUs", "across nodes", "load", "CPU s")
    return Row("16 GPUs on 2 nodes: transitions", head, lines, found)


def copies(case: Case, effort: float) -> Row:
    """8 GPUs: rows that leave their GPU, there and back, per token and layer."""
    found: dict[str, Any] = {}
    for home in ("fixed", "most"):
        for name, method in (("EPLB", "eplb"), ("placed", "auto")):
            objective = Objective(copies=1.0, load=0.1, max_load=1.065, home=home)
            made, seconds = timed(
                lambda method=method, objective=objective: place(
                    case.fit, ONE, method=method, objective=objective, bound=False, effort=effort
                )
            )
            moved = judged(case.judge, made, home=home)
            if home == "most":
                tell = Foretold.of(statistics(case.fit).transitions, made)
                moved["foretold"] = judged(case.judge, made, home="foretold", foretold=tell)["copies"]
            found[f"{name}, home {home}"] = {**moved, "seconds": seconds}
    lines = []
    for label, row in found.items():
        base = found["EPLB, home " + label.split("home ")[1]]
        better = [f"{row['copies']:.2f} ({row['copies'] / base['copies'] - 1:+.1%})"]
        better.append(
            f"{row['foretold']:.2f} ({row['foretold'] / base['copies'] - 1:+.1%})" if "foretold" in row else ""
        )
        lines.append((label, *better, f"{row['load']:.3f}", f"{row['seconds']:.1f}"))
    head = ("", "copies", "home foretold", "load", "CPU s")
    return Row("8 GPUs: rows that leave their GPU, a token and layer", head, lines, found)


def replicas(case: Case, effort: float) -> Row:
    """8 GPUs with one more slot each."""
    found = {}
    for name, per_gpu in (("no replicas", None), ("one more slot", case.fit.num_experts // 8 + 1)):
        objective = Objective(**CALM, max_load=1.055)
        made, seconds = timed(
            lambda per_gpu=per_gpu, objective=objective: place(
                case.fit, ONE, per_gpu, objective=objective, bound=False, effort=effort
            )
        )
        found[name] = {**judged(case.judge, made, replica="follow"), "seconds": seconds}
    points = 100 * (found["no replicas"]["gpu"] - found["one more slot"]["gpu"])
    lines = [(name, _share(row["gpu"]), f"{row['load']:.3f}", f"{row['seconds']:.1f}") for name, row in found.items()]
    lines.append(("points", f"{points:.1f}", "", ""))
    return Row("8 GPUs, one more slot each", ("", "across GPUs", "load", "CPU s"), lines, found)


def shift(case: Case, effort: float) -> Row:
    """Fitted on one domain, judged on another."""
    found: dict[str, Any] = {}
    domains = np.unique(case.fit_domain)
    for a in domains:
        fit = case.fit.select(case.fit_domain == a)
        for name, method, scenarios in (
            ("EPLB", "eplb", None),
            ("placed", "auto", None),
            ("placed, robust", "auto", 8),
        ):
            objective = Objective(**CALM, max_load=1.06 if scenarios is None else 1.12)
            made = place(fit, ONE, method=method, objective=objective, scenarios=scenarios, bound=False, effort=effort)
            for b in domains:
                key = f"{a} -> {b}"
                found.setdefault(key, {})[name] = judged(case.judge.select(case.judge_domain == b), made)
    lines = [
        (key, name, _share(row["gpu"]), f"{row['load']:.3f}")
        for key, rows in found.items()
        for name, row in rows.items()
    ]
    told = {}
    if len(domains) > 1:
        first, second = (case.fit.select(case.fit_domain == d) for d in domains[:2])
        told["drift"] = str(drift(first, second))
    head = ("domains", "", "across GPUs", "load")
    return Row("8 GPUs: fitted on one domain, judged on another", head, lines, found | told)


def large(case: Case, effort: float) -> Row:
    """60 layers of 256 experts, top-8, on 64 GPUs in 8 nodes: generated, whatever the trace."""
    trace = large_trace()
    topology, objective = Topology(8, 8), Objective(gpu=1.0, node=7.0)
    problem, counting = timed(lambda: problem_of(trace, trace, topology, None, objective))
    first, first_s = timed(lambda: assign(problem, sweeps=0))
    fixed, fixed_s = timed(lambda: assign(problem))
    made, search_s = timed(
        lambda: place(trace, topology, objective=objective, bound=False, effort=effort, time_limit=150)
    )
    counts = problem.transitions
    bound, bound_s = timed(
        lambda: crossing_bound(
            counts, made.slots_of_gpu, topology.node_of_gpu, gpu_weight=1, node_weight=7, time_limit=max(60 * effort, 5)
        )
    )
    total = int(sum(matrix.sum() for matrix in counts))
    found = {
        "layers in turn, once": {**_crossed(trace, first, topology), "seconds": first_s},
        "to a fixpoint": {**_crossed(trace, fixed, topology), "seconds": fixed_s},
        "placed": {**judged(trace, made), "seconds": search_s},
    }
    for row in found.values():
        row["score"] = row["gpu"] + 7 * row["node"]
    lines = [
        (name, _share(row["gpu"]), _share(row["node"]), f"{row['score']:.4f}", f"{row['seconds']:.1f}")
        for name, row in found.items()
    ]
    levels = {level.name: level.crossing / total for level in bound.levels}
    gap = 1 - bound.value / total / found["placed"]["score"]
    lines.append(
        ("bound", _share(levels["gpu"]), _share(levels["node"]), f"{bound.value / total:.4f}", f"{bound_s:.1f}")
    )
    lines.append(("proved gap", "", "", f"{gap:.1%}", ""))
    head = ("", "across GPUs", "across nodes", "GPUs + 7 nodes", "CPU s")
    figures = found | {"bound": levels, "gap": gap, "counting_s": counting}
    return Row("60 layers x 256 experts x 64 GPUs on 8 nodes", head, lines, figures)


def large_trace() -> Trace:
    """Zipf 0.5, 70 % of choices inside a token's topic, 32 topics, kept from layer to layer in 97 of 100 cases."""
    return generate(60, 256, 8, 20_000, skew=0.5, affinity=0.7, topics=32, hold=0.97, seed=0)


def _crossed(trace: Trace, gpu_of_expert: np.ndarray, topology: Topology) -> dict[str, float]:
    return judged(trace, Placement(to_slots(gpu_of_expert), trace.num_experts, topology))


def batches(case: Case, effort: float) -> Row:
    """Replica choice per batch of 128 tokens, EPLB's plan with 8 spare slots."""
    found, lines = {}, []
    for name, seed in (("tokens in random order", 0), ("consecutive tokens", None)):
        row = found[name] = choice.measure(case.fit, case.judge, seed=seed)
        lines.append((
            name, f"{row['even']:.3f}", f"{row['program']:.3f}", f"{row['whole_rows']:.3f}", f"{row['median_us']:.0f}",
        ))  # fmt: skip
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
    "large": large,
}


def _share(value: float) -> str:
    return f"{100 * value:.2f} %"
