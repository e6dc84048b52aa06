"""Results as text: one block per case, and the table of figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .rivals import ABOUT
from .screen import lines as table

BOUNDS = ("matmuls", "dense", "read")


def seconds(s: float) -> str:
    for unit, size in (("s ", 1.0), ("ms", 1e-3)):
        if s >= size:
            return f"{s / size:7.2f} {unit}" if s / size < 1000 else f"{s / size:7.0f} {unit}"
    return f"{s * 1e6:7.1f} us"


def mega(n: float) -> str:
    return f"{n / 1e6:,.1f} MB"


def machine_lines(about: Mapping[str, Any]) -> list[str]:
    cache = about["last_level_cache_bytes"]
    lines = [
        f"machine   {about['cpu']}; {about['threads']} threads used; "
        f"last-level cache {'unknown' if cache is None else f'{cache / 2**20:.0f} MiB'}",
        f"          {' '.join(about['isa']) or 'instruction sets unknown'}; huge pages "
        f"{about['transparent_hugepages'] or 'unknown'}",
        f"versions  headgate {about['headgate']}, torch {about['torch']}, transformers "
        f"{about['transformers'] or 'not installed'}",
        f"headgate  {about['headgate_form']}",
    ]
    if "gpu" in about:
        lines.insert(0, f"device    {about['gpu']}")
    load = about["load_1min"]
    if load is not None and load > 0.5:
        lines.append(
            f"note      other work runs on this machine (load {load:.1f} on {about['cpus']} CPUs): the times are not "
            "its own, and with more threads than free cores neither are the ratios; --threads 1 --clock cpu bears it"
        )
    return lines


def case_lines(result: Mapping[str, Any]) -> list[str]:
    """One block: each implementation's median, range and ratio, the bounds, the memory."""
    s = result["shape"]
    head = (
        f"{s['name']}  T {result['tokens']}  {result['dtype']}  {result['pass']}   "
        f"D {s['hidden']}, F {s['intermediate']}, E {s['experts']}, K {s['top_k']}"
    )
    if "skipped" in result:
        return [head, f"  skipped: {result['skipped']}"]
    lines = [f"{head}; {result['pairs']:,} pairs on {result['experts_hit']} experts"]
    ratios = result["ratios"]
    times = ratios.get("times_headgate", {})
    rows = [("", "median", "beside headgate", "range")]
    for name, i in result["implementations"].items():
        if "median_s" not in i:
            kind = "refused" if "refused" in i else "skipped"
            rows.append((name, kind, "", i[kind]))
            continue
        note = f"  ({i['note']})" if "note" in i else ""
        span = f"{seconds(i['min_s']).strip()} .. {seconds(i['max_s']).strip()}{note}"
        rows.append((name, seconds(i["median_s"]), _beside(name, ratios, times), span))
    lines += table(rows, left=(0, 3))
    lines += _bounds(result, ratios)
    if result["memory"]:
        lines += _memory(result["memory"])
    return lines


def _beside(name: str, ratios: Mapping[str, Any], times: Mapping[str, float]) -> str:
    """A rival's time over Headgate's; of a bound, the share of it that Headgate reaches."""
    if name == "read":
        return f"{ratios['read_GBps']:.1f} GB/s"
    if name not in times:
        return ""
    return f"bound, {times[name]:.2f} of it reached" if name in BOUNDS else f"{times[name]:.2f}x its time"


def _bounds(result: Mapping[str, Any], ratios: Mapping[str, Any]) -> list[str]:
    said = []
    if "best" in ratios:
        said.append(f"{ratios['best']['times_headgate']:.2f}x transformers' best ({ratios['best']['name']})")
    if "share_of_matmuls" in ratios:
        said.append(f"{ratios['share_of_matmuls']:.2f} of the bare matmuls")
    if "share_of_dense" in ratios:
        said.append(f"{ratios['share_of_dense']:.2f} of the dense ones")
    if "share_of_read" in ratios:
        said.append(
            f"{ratios['share_of_read']:.2f} of the read bound ({mega(result['bytes_hit'])} of weights: "
            f"{seconds(ratios['read_s']).strip()})"
        )
    return [f"  headgate is {', '.join(said)}"] if said else []


def _memory(memory: Mapping[str, Any]) -> list[str]:
    kept, expected = memory["kept_bytes"], memory["expected_kept_bytes"]
    named = ", ".join(f"{name} {mega(n)}" for name, n in kept.items())
    lines = [
        f"  kept for backward: {named}; rows + H + routing = {expected:,} bytes, headgate {kept.get('headgate', 0):,}"
    ]
    for name, peak in memory["peak"].items():
        if "skipped" in peak:
            lines.append(f"  peak of {name} skipped: {peak['skipped']}")
            continue
        lines.append(
            f"  peak of {name:<11} {mega(peak['backward_bytes'])} in backward above weights and inputs, of it "
            f"{mega(peak['gradient_bytes'])} gradients; {mega(peak['step_bytes'])} over the step"
        )
    return lines


def figure_lines(figures: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table of figures to reach."""
    rows = [("case", "measured", "reach", "stretch", "verdict")]
    for f in figures:
        cells = (_cell(f[name], f["unit"]) for name in ("value", "reach", "stretch"))
        rows.append((f["case"], *cells, f"{f['verdict']}{_aside(f)}"))
    return table(rows, left=(0, 4), rule=True)


def _aside(figure: Mapping[str, Any]) -> str:
    return f"  ({figure['aside']})" if figure["aside"] else ""


def _cell(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}{unit}"


def legend() -> list[str]:
    return [f"  {name:<11} {about}" for name, about in ABOUT.items()]
