"""The picture of a GPU report: rates in training, bandwidth in decoding, each beside its ceiling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import draw as pictures
from .figures import flops, median

_COLOURS = {
    "headgate": "#1f4e99", "cublas": "#bbbbbb", "torch": "#e08a00", "hf-grouped": "#7a4fa3", "hf-batched": "#a98bc7",
    "hf-eager": "#cdb7e0", "scattermoe": "#2a9d8f", "liger": "#c8553d", "sonicmoe": "#d4a017",
}  # fmt: skip


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Writes a .png or .svg."""
    train = [c for c in found["cases"] if c["pass"] == "train" and median(c, "headgate", "forward")]
    decode = [c for c in found["cases"] if c["pass"] == "decode" and median(c, "headgate", "forward")]
    wide = max(900, 60 * max(len(train), len(decode)) + 240)
    pictures.write(path, wide, 1200, lambda figure: _fill(figure, found, train, decode))


def _fill(
    figure: Any, found: Mapping[str, Any], train: Sequence[Mapping[str, Any]], decode: Sequence[Mapping[str, Any]]
) -> None:
    axes = figure.subplots(3, 1)
    for axis, step in zip(axes, ("forward", "backward"), strict=False):
        _bars(axis, train, step, lambda c, us, step=step: flops(c, step) / us / 1e6)
        pictures.ceiling(axis, found["ceilings"]["matmul_TFLOPs"])
        axis.set_ylabel("TFLOP/s")
        axis.set_title(f"training, {step} (dashed: cuBLAS 8192 x 8192 x 8192)")
    _bars(axes[2], decode, "forward", lambda c, us: c["weight_bytes"] / us / 1e3)
    pictures.ceiling(axes[2], found["ceilings"]["copy_GBps"])
    axes[2].set_ylabel("GB/s of weights")
    axes[2].set_title("decoding (dashed: the rate of a device copy)")
    device = found["device"].get("name", "cpu")
    figure.suptitle(f"{device}, {found['date'][:10]}, commit {found['commit'][:12]}")


def _bars(axis: Any, cases: Sequence[Mapping[str, Any]], step: str, rate: Any) -> None:
    names = dict.fromkeys(n for c in cases for n in c["contestants"])
    series = {}
    for name in names:
        times = [median(c, name, step) for c in cases]
        if any(times):
            series[name] = [rate(c, us) if us else None for c, us in zip(cases, times, strict=True)]
    pictures.columns(axis, [f"{c['shape']}\nT {c['tokens']}" for c in cases], series, _COLOURS)
