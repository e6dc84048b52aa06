"""Results as text: one block per case."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..report import seconds
from ..screen import lines as table
from .contestants import CONTESTANTS, find

ALL, SHARED = "all_to_all", "slice_all_reduce"  # whose time the others' is divided by
CAUTION = [
    "gloo on one machine: this measures correctness and bytes, and what a step costs beside its transport; it says",
    "nothing of the speed of a network. Ranks take turns on the cores there are.",
]


def legend() -> list[str]:
    return [f"  {name:<21} {who.about}" for name, who in CONTESTANTS.items()]


def load_note(machine: Mapping[str, Any]) -> list[str]:
    load = machine["load_1min"]
    if load is None or load <= 0.5:
        return []
    return [f"note      other work runs on this machine (load {load:.1f} on {machine['cpus']} CPUs): times vary"]


def ratios(case: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Each one's time over that of all_to_all (same batch, same experts) and, where the ranks share one batch, over
    that of slice_all_reduce."""
    times = {n: i["median_s"] for n, i in case["implementations"].items() if "median_s" in i}
    shared = {n for n in times if case["implementations"][n]["shared"]}
    found = {}
    if ALL in times:
        found["times_all_to_all"] = {n: t / times[ALL] for n, t in times.items()}
    if SHARED in times:
        found["times_slice_all_reduce"] = {n: times[n] / times[SHARED] for n in times if n in shared}
    return found


def case_lines(case: Mapping[str, Any]) -> list[str]:
    """One block: step, ratio and bytes of each: those of rows per token of the batch, beside what the formula says of
    an even router; those of row counts per rank; the collectives that carried them."""
    s, nodes = case["shape"], case["ranks"] // case["ranks_per_node"]
    lines = [
        f"{s['name']}  T {case['tokens_per_rank']} on each of {case['ranks']} ranks, {nodes} nodes  {case['dtype']}  "
        f"{case['pass']}   D {s['hidden']}, F {s['intermediate']}, E {s['experts']}, K {s['top_k']}; "
        f"{case['rounds']} rounds{', processor time' if case['clock'] == 'cpu' else ''}",
    ]
    rows = [("", "step", "ratio", "bytes/token that leave a rank", "(even)", "its node", "(even)", "counts", "by")]
    for name, i in case["implementations"].items():
        if "refused" in i:
            rows.append((name, "refused", *[""] * 6, i["refused"]))
            continue
        b, times = i["bytes"], case["ratios"].get("times_all_to_all", {}).get(name)
        beside = case["ratios"].get("times_slice_all_reduce", {}).get(name)
        sent = [
            f"{b[f'{even}leave_{what}_bytes_per_token']:,.0f}" for what in ("rank", "node") for even in ("", "even_")
        ]
        said = "" if beside is None or name == SHARED else f"  ({beside:.2f}x {SHARED})"
        rows.append(
            (name, seconds(i["median_s"]), "" if times is None else f"{times:.2f}x", *sent,
             f"{b['counts_bytes_per_rank']:,.0f}", f"{', '.join(b['by_collective_bytes'])}{said}")
        )  # fmt: skip
    return lines + table(rows, left=(0, 8))


def any_refused(cases: list[dict[str, Any]]) -> bool:
    """Whether Headgate itself was refused anywhere."""
    return any(
        "refused" in i and find(name).about.startswith("headgate")
        for case in cases
        for name, i in case["implementations"].items()
        if name.partition("/")[0] in CONTESTANTS
    )
