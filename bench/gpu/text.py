"""A GPU report as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..screen import lines as table
from .figures import flops, median

_STEPS = ("forward", "backward", "step")
_HEAD = ("", "", "us", "quartiles", "TFLOP/s", "GB/s", "of the floor", "of cublas", "beside headgate", "")


def heading(found: Mapping[str, Any]) -> list[str]:
    """The device, the ceilings, who takes part and who does not."""
    d, c, v = found["device"], found["ceilings"], found["versions"]
    lines = [
        f"device     {d.get('name', d['device'])}, {d.get('processors', '?')} multiprocessors; commit {found['commit']}"
    ]
    lines.append("versions   " + ", ".join(f"{n} {x}" for n, x in v.items() if x))
    lines.append(
        f"ceilings   copy {c['copy_GBps']:.0f} GB/s (read and written), bf16 matmul {c['matmul_TFLOPs']:.0f} TFLOP/s"
    )
    lines.append("present    " + ", ".join(f"{n} ({x})" for n, x in d["present"].items()))
    lines += [f"absent     {n}: {why}" for n, why in d["absent"].items()]
    return lines


def case_lines(result: Mapping[str, Any]) -> list[str]:
    """One case: every contestant's median, quartiles, rate, share of the floor, ratio to Headgate and to cuBLAS."""
    s = result.get("sizes", {})
    sizes = ", ".join(f"{k} {v}" for k, v in s.items())
    lines = [
        f"\n{result['shape']}  T {result['tokens']}  {result['pass']}   {sizes}   {result.get('seconds', 0):.1f} s"
    ]
    if "failed" in result:
        lines.append(f"  failed: {result['failed']}")
    rows: list[tuple[str, ...]] = [_HEAD]
    for name, c in result["contestants"].items():
        rows += [_row(result, name, step) for step in _STEPS if step in c]
        kind = next((k for k in ("refused", "failed", "skipped") if k in c), None)
        if kind:
            rows.append((name, kind, *[""] * (len(_HEAD) - 3), c[kind]))
    return lines + table(rows, left=(0, 1, len(_HEAD) - 1)) + _memory(result)


def _row(result: Mapping[str, Any], name: str, step: str) -> tuple[str, ...]:
    """One line of the table. cuBLAS is a bound: beside it stands the share that Headgate reaches, no factor."""
    c = result["contestants"][name][step]
    us = c["median_us"]
    spread = f"{c['lower_quartile_us']:.1f} .. {c['upper_quartile_us']:.1f}"
    size = result["contestants"][name].get("weight_bytes", result.get("weight_bytes")) if step == "forward" else None
    rate = f"{size / us / 1e3:.0f}" if size and result["pass"] in ("decode", "packed") else ""
    floor, dense, ours = floor_us(result, step), median(result, "cublas", step), median(result, "headgate", step)
    of_floor = "" if floor is None else f"{floor / us:.2f}"
    of_cublas = f"{dense / us:.2f}" if dense and name != "cublas" else ""
    beside = "" if not ours or name == "headgate" else f"{us / ours:.2f}x its time"
    if beside and name == "cublas":
        beside = f"bound, {us / ours:.2f} of it reached"
    tflops = f"{flops(result, step) / us / 1e6:.0f}"
    note = result["contestants"][name].get("note", "")
    return (name, step, f"{us:.1f}", spread, tflops, rate, of_floor, of_cublas, beside, note)


def floor_us(result: Mapping[str, Any], step: str) -> float | None:
    """The sum of the launches' floors at the ceilings measured in the same run."""
    roofs = result.get("roofline", {})
    names = {"forward": ("forward",), "backward": ("backward",), "step": ("forward", "backward")}[step]
    if "decode" in roofs:
        launches = roofs["decode"]["launches"]
        skip = ("router", "topk") if result["pass"] == "decode" else ()  # decode is given its routing
        return sum(x["floor_us"] for x in launches if x["name"] not in skip)
    return sum(roofs[n]["floor_us"] for n in names) if all(n in roofs for n in names) else None


def _memory(result: Mapping[str, Any]) -> list[str]:
    lines = []
    if result.get("saved_bytes"):
        named = ", ".join(f"{n} {b / 1e6:,.1f} MB" for n, b in result["saved_bytes"].items())
        expected = result.get("expected_saved_bytes")
        ours = result["saved_bytes"].get("headgate", 0)
        lines.append(f"  saved for backward: {named}; rows + H + routing = {expected:,} bytes, headgate {ours:,}")
    if result.get("peak_bytes"):
        named = ", ".join(f"{n} {b['step_bytes'] / 1e6:,.0f} MB" for n, b in result["peak_bytes"].items())
        lines.append(f"  peak of a step, gradients included: {named}")
    return lines
