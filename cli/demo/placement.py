"""Chapter: the experts spread over GPUs by the routing just recorded: what it saves, how far it is from the best."""

from __future__ import annotations

from functools import partial

from ...bench import draw, html
from ...placement.cluster.topology import Topology
from ...placement.place import place
from ...placement.placement import Placement
from ...placement.problem import Objective
from ...placement.walk import walk
from ..place import page
from .tour import Tour

MAX_LOAD = 1.1
SCENARIOS = 3
LIMIT_s = 8.0
KINDS = {
    "cross_node_share": "transitions across nodes, %",
    "node_copies": "rows between nodes for 100 tokens and a layer",
}
NAMES = {"linear": "in order", "eplb": "EPLB", "auto": "placed"}


def topology_of(tour: Tour) -> Topology:
    """Two nodes of four GPUs; of one, where experts are few."""
    return Topology(nodes=2, gpus_per_node=4 if tour.options.shape.experts >= 16 else 1)


def run(tour: Tour) -> None:
    """Fitted on every other sequence, judged on the rest."""
    assert tour.trace is not None
    assert tour.trace.sequence is not None
    odd = tour.trace.sequence % 2 == 1
    fit, judge = tour.trace.select(~odd), tour.trace.select(odd)
    topology = topology_of(tour)
    objective = Objective.transitions(topology, MAX_LOAD)
    found: dict[str, Placement] = {}
    for method in ("linear", "eplb", "auto"):
        ours = method == "auto"
        found[method] = place(
            fit,
            topology,
            method=method,
            objective=objective,
            scenarios=SCENARIOS,
            time_limit=LIMIT_s,
            effort=0.3,
            seed=tour.options.seed,
            bound=ours,
        )
    tour.placement = found["auto"]
    rows = {name: walk(judge, placement).summary() for name, placement in found.items()}
    tour.metrics["placement"] = {
        "topology": topology.to_json(),
        "tokens": {"fit": fit.shape[1], "judge": judge.shape[1]},
        "judged": rows,
        "fitted": dict(found["auto"].cost),
        "bound": dict(found["auto"].bound),
        "search": dict(found["auto"].method),
    }
    _say(tour)
    if any(
        placement.method["interrupted"] for placement in found.values()
    ):  # the search has kept its best; the tour ends here
        raise KeyboardInterrupt


def _say(tour: Tour) -> None:
    found, topology = tour.metrics["placement"], topology_of(tour)
    screen, rows = tour.screen, found["judged"]
    screen.say(
        f"  {topology.nodes} nodes of {topology.gpus_per_node} GPUs; judged by {found['tokens']['judge']:,} tokens"
    )
    table: list[tuple[str, ...]] = [
        ("", "busiest / mean", "across GPUs", "across nodes", "copies a token", "between nodes")
    ]
    for name, row in rows.items():
        table.append(
            (
                NAMES[name],
                f"{row['imbalance']:.2f}",
                f"{row['cross_gpu_share']:.1%}",
                f"{row['cross_node_share']:.1%}",
                f"{row['copies']:.2f}",
                f"{row['node_copies']:.2f}",
            )
        )
    screen.table(table)
    bound = found["bound"]
    reached = bound["reached"]
    screen.say(
        f"  fitted: {reached['node']:.1%} across nodes and {reached['gpu']:.1%} across GPUs; proved: none below "
        f"{bound['node']:.1%} and {bound['gpu']:.1%}; {found['search']['seconds']:.0f} s"
    )


def section(tour: Tour) -> str:
    assert tour.trace is not None
    assert tour.placement is not None
    found, topology = tour.metrics["placement"], topology_of(tour)
    rows = found["judged"]
    bound = found["bound"]
    assert tour.trace.sequence is not None
    odd = tour.trace.sequence % 2 == 1
    words = (
        f"The same experts on {topology.nodes} nodes of {topology.gpus_per_node} GPUs: which go where? A placement was "
        f"fitted to half of the sequences and is judged on the other half, {found['tokens']['judge']:,} tokens. "
        "Experts that follow each other move together, while the busiest GPU stays near the mean. "
        f"On the tokens it was fitted to {bound['reached']['node']:.1%} of transitions cross nodes, "
        f"{bound['reached']['gpu']:.1%} cross GPUs; it is proved that no placement has less than "
        f"{bound['node']:.1%} and {bound['gpu']:.1%}."
    )
    pictures = [
        draw.inline(
            partial(crossings, rows=rows, kind=kind), f"{what}: {_less(rows, kind):.2f}× less than the best other"
        )
        for kind, what in KINDS.items()
    ]
    named = {NAMES[name]: row for name, row in rows.items()}
    return html.prose(words) + html.grid(pictures) + page.pictures(tour.placement, tour.trace.select(odd), named)


def crossings(axis: draw.Axes, rows: dict[str, dict], kind: str = "cross_node_share") -> None:
    """Picture: what crosses nodes under each placement."""
    draw.bars(axis, {NAMES[name]: 100 * row[kind] for name, row in rows.items()}, NAMES["auto"])


def _less(rows: dict[str, dict], kind: str) -> float:
    return min(row[kind] for name, row in rows.items() if name != "auto") / max(rows["auto"][kind], 1e-9)
