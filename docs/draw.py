"""Draws the pictures of the pages into docs/pictures: `python docs/draw.py`, about a minute. All data is seeded.

demo.png is not among them: it is the picture that `headgate demo` makes of its report.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

import headgate
from headgate.placement.caching.simulate import simulate
from headgate.placement.caching.steps import steps_of
from headgate.placement.traces.affinity import expert_load
from headgate.placement.traces.generate import generate, like_deepseek_v2_lite

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).parent / "pictures"
POLICIES = ("belady", "adaptive", "lfru", "lru", "random")


def figure(width: float = 6.4, height: float = 3.4) -> tuple[Any, Any]:
    made, axes = plt.subplots(figsize=(width, height), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    return made, axes


def save(made: Any, name: str) -> None:
    made.savefig(FOLDER / f"{name}.png", dpi=110, metadata={"Software": None})
    plt.close(made)


def balance() -> None:
    """The busiest expert's share of the pairs, with and without the load-balancing loss, from a router that leans."""
    made, axes = figure()
    for coef, name in ((0.0, "no loss"), (0.01, "load_balancing_coef=0.01")):
        torch.manual_seed(0)
        layer = headgate.MoE(32, 32, num_experts=8, top_k=2, load_balancing_coef=coef)
        with torch.no_grad():
            layer.router.weight[:2] += 0.3
        target = torch.nn.Linear(32, 32)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=3e-3)
        shares = []
        for _ in range(300):
            x = torch.randn(256, 32) + 0.5
            (layer(x) - target(x).detach()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            shares.append(layer.last_routing.counts.max().item() / 512)
        axes.plot(shares, label=name)
    axes.axhline(1 / 8, color="grey", linestyle=":", label="even load")
    axes.set(xlabel="step", ylabel="busiest expert's share of pairs", ylim=(0, None))
    axes.legend(frameon=False)
    save(made, "balance")


def fold() -> None:
    """Eight ranks as dp 2 x tp 4 and as edp 1 x ep 4 x etp 2."""
    made, rows = plt.subplots(2, 1, figsize=(6.4, 2.3), layout="constrained")
    rank = np.arange(8)
    seen = (
        ("attention: dp=2, tp=4", [f"dp {r // 4}\ntp {r % 4}" for r in rank], rank // 4),
        ("experts: ep=4, etp=2", [f"ep {r // 2}\netp {r % 2}" for r in rank], rank // 2),
    )
    for axes, (title, words, group) in zip(rows, seen, strict=True):
        axes.set_title(title, loc="left", fontsize=9)
        for r in rank:
            axes.add_patch(plt.Rectangle((r, 0), 0.94, 1, color=plt.cm.Set2(group[r])))
            axes.text(r + 0.47, 0.5, f"rank {r}\n{words[r]}", ha="center", va="center", fontsize=7)
        axes.set(xlim=(0, 8), ylim=(0, 1))
        axes.axis("off")
    save(made, "fold")


def loads() -> None:
    """Tokens of each expert in each layer of a generated trace."""
    made, axes = figure(height=3.0)
    load = expert_load(like_deepseek_v2_lite(tokens=2000))
    shown = axes.imshow(load, aspect="auto", cmap="viridis")
    axes.set(xlabel="expert", ylabel="layer")
    made.colorbar(shown, label="tokens")
    save(made, "loads")


def placement() -> None:
    """Transitions that cross GPUs and nodes, for three placements of the page's trace."""
    trace = generate(layers=4, experts=16, top_k=2, tokens=2000, seed=0)
    topology = headgate.Topology(nodes=2, gpus_per_node=2)
    made, axes = figure(height=2.6)
    for i, method in enumerate(("linear", "eplb", "auto")):
        found = headgate.place(trace, topology, method=method, objective="transitions", bound=False)
        for row, key in enumerate(("cross_gpu_share", "cross_node_share")):
            share = 100 * found.cost[key]
            axes.barh(i - 0.2 + 0.4 * row, share, 0.36, color=("tab:blue", "tab:orange")[row])
            axes.text(share + 0.5, i - 0.2 + 0.4 * row, f"{share:.0f} %", va="center", fontsize=8)
    axes.set(yticks=range(3), yticklabels=("linear", "EPLB", "place"), xlabel="% of transitions that cross", xlim=(0, 100))
    axes.legend(["GPUs", "nodes"], frameon=False, loc="lower right")
    axes.invert_yaxis()
    save(made, "placement")


def cache() -> None:
    """Hit rates over slots, by policy."""
    steps = steps_of(like_deepseek_v2_lite(tokens=600))
    slots = (8, 12, 16, 24, 32, 48)
    made, axes = figure()
    for name in POLICIES:
        rates = [simulate(steps, name, slots=count).hit_rate for count in slots]
        axes.plot(slots, rates, marker=".", label=name, linestyle="--" if name == "belady" else "-")
    axes.set(xlabel="slots of each layer (of 64 experts)", ylabel="hit rate", ylim=(0, 1))
    axes.legend(frameon=False)
    save(made, "cache")


if __name__ == "__main__":
    for draw in (balance, fold, loads, placement, cache):
        draw()
        print(f"{FOLDER.name}/{draw.__name__}.png")
