"""The picture of a GPU report: rates in training, bandwidth in decoding, each beside its ceiling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .figures import flops, median

_COLOURS = {
    "headgate": "#1f4e99", "cublas": "#bbbbbb", "torch": "#e08a00", "hf-grouped": "#7a4fa3", "hf-batched": "#a98bc7",
    "hf-eager": "#cdb7e0", "scattermoe": "#2a9d8f", "liger": "#c8553d", "sonicmoe": "#d4a017",
}  # fmt: skip


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Writes a PNG. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    train = [c for c in found["cases"] if c["pass"] == "train" and median(c, "headgate", "forward")]
    decode = [c for c in found["cases"] if c["pass"] == "decode" and median(c, "headgate", "forward")]
    figure, axes = pyplot.subplots(3, 1, figsize=(max(9, 0.75 * max(len(train), len(decode), 1) + 3), 13))
    for axis, step in zip(axes, ("forward", "backward"), strict=False):
        _bars(axis, train, step, lambda c, us, step=step: flops(c, step) / us / 1e6)
        axis.axhline(found["ceilings"]["matmul_TFLOPs"], color="black", linewidth=0.8, linestyle="--")
        axis.set_ylabel("TFLOP/s")
        axis.set_title(f"training, {step} (dashed: cuBLAS 8192 x 8192 x 8192)")
    _bars(axes[2], decode, "forward", lambda c, us: c["weight_bytes"] / us / 1e3)
    axes[2].axhline(found["ceilings"]["copy_GBps"], color="black", linewidth=0.8, linestyle="--")
    axes[2].set_ylabel("GB/s of weights")
    axes[2].set_title("decoding (dashed: the rate of a device copy)")
    device = found["device"].get("name", "cpu")
    figure.suptitle(f"{device}, {found['date'][:10]}, commit {found['commit'][:12]}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _bars(axis: Any, cases: Sequence[Mapping[str, Any]], step: str, rate: Any) -> None:
    names = [
        n for n in dict.fromkeys(n for c in cases for n in c["contestants"]) if any(median(c, n, step) for c in cases)
    ]
    width = 0.85 / max(1, len(names))
    for i, name in enumerate(names):
        at = [j + i * width for j, c in enumerate(cases) if median(c, name, step)]
        high = [rate(c, median(c, name, step)) for c in cases if median(c, name, step)]
        axis.bar(at, high, width, label=name, color=_COLOURS.get(name))
    axis.set_xticks([j + 0.4 for j in range(len(cases))])
    labels = [f"{c['shape']}\nT {c['tokens']}" for c in cases]
    axis.set_xticklabels(labels, rotation=45, ha="right", fontsize=7)
    if names:
        axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axis.margins(x=0.01)
