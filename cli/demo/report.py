"""report.html, the whole report as one page, and report.png, its main pictures on one sheet."""

from __future__ import annotations

from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from ...bench import draw, html
from . import caching, placement, routing, speed, train
from .tour import Chapter, Tour, spoken


def page(tour: Tour, chapters: list[Chapter]) -> str:
    """The whole page; a chapter without figures (the tour was cut short) is left out."""
    about = tour.metrics["about"]
    there = [chapter for chapter in chapters if chapter.name in tour.metrics]
    sections = "".join(
        f'<section id="{chapter.name}"><h2><span>{number}</span>{escape(chapter.title)}</h2>\n'
        f"{chapter.section(tour)}</section>\n"
        for number, chapter in enumerate(there, 1)
    )
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    lead = (
        f"What <code>headgate demo</code> found on this machine in {spoken(about['seconds'])}: a small MoE language "
        "model, swapped, measured, trained on real text and looked into."
    )
    footer = f"""<footer><p>{escape(about["machine"])}; {escape(versions)}; seed {about["seed"]}.</p>
<p>Beside this page: <code>model/</code> (transformers, safetensors), <code>trace.npz</code>,
<code>placement.json</code>, <code>report.png</code>, <code>metrics.json</code> with every figure above.
Run it again: <code>headgate demo --seed {about["seed"]}</code></p></footer>
"""
    body = f"{_note(about)}{_tiles(tour)}\n{sections}{footer}"
    return html.page("headgate demo", "A mixture of experts, end to end", lead, body)


def _note(about: dict) -> str:
    if about["interrupted"] is None:
        return ""
    return f'<p class="note">Interrupted in: {escape(about["interrupted"])}. What was done by then is here.</p>\n'


def _tiles(tour: Tour) -> str:
    found = tour.metrics
    tiles = []
    if "swap" in found:
        tiles.append((f"{found['swap']['headgate_against_eager']['output']:.0e}", "largest change of the output"))
    if "speed" in found and speed.reliable(found["speed"]):
        rates = found["speed"]["tokens_per_second"]["training_step"]
        tiles.append((f"{speed.ratio(rates):.2f}×", "tokens per second in training, against transformers' best"))
    if "final_bits_per_byte" in found.get("train", {}):
        tiles.append(
            (f"{found['train']['final_bits_per_byte']:.2f}", "bits per byte on text it never saw (8 untrained)")
        )
    if found.get("routing", {}).get("affinity"):
        lifts = [pair["lift"] for pair in found["routing"]["affinity"]]
        tiles.append((f"{sum(lifts) / len(lifts):.1f}×", "better than chance: foretelling a token's next expert"))
    if "placement" in found:
        rows = found["placement"]["judged"]
        less = 1 - rows["auto"]["cross_node_share"] / max(rows["eplb"]["cross_node_share"], 1e-9)
        tiles.append((f"{less:.0%}", "fewer transitions between nodes than with EPLB, by placement"))
    inner = "".join(
        f'<div class="tile"><b>{escape(big)}</b><small>{escape(small)}</small></div>' for big, small in tiles
    )
    return f'<div class="tiles">{inner}</div>' if inner else ""


def write_sheet(path: Path, found: dict[str, Any]) -> None:
    """The main pictures of `found`, a demo's metrics, on one sheet: .png or .svg. What is not there is left out."""
    shown = _panels(found)
    down = max(1, -(-len(shown) // 2))

    def fill(figure: Any) -> None:
        figure.get_layout_engine().set(w_pad=0.2, h_pad=0.2)
        figure.suptitle("headgate demo", color=draw.INK, fontsize=18, weight="bold", x=0.01, ha="left")
        axes = figure.subplots(down, 2, squeeze=False).ravel()
        for axis, (title, picture) in zip(axes, shown.items(), strict=False):
            axis.set_title(title, loc="left", pad=10)
            picture(axis)
        for axis in axes[len(shown) :]:
            axis.set_axis_off()

    draw.write(path, 1100, 60 + 290 * down, fill)


def _panels(found: dict[str, Any]) -> dict[str, draw.Picture]:
    """title -> picture, in the order of the report."""
    panels: dict[str, draw.Picture] = {}
    if "train" in found:
        panels["Training on real text: bits per byte"] = partial(train.curve, found=found["train"])
    if "speed" in found:
        kept = found["speed"]["kept_by_experts_bytes"]
        title = f"MB that the experts keep for the backward pass: {speed.fewer(kept):.1f}× less"
        panels[title] = partial(speed.kept_bars, kept=kept)
    if "speed" in found and speed.reliable(found["speed"]):
        rates = found["speed"]["tokens_per_second"]["training_step"]
        panels["A training step, tokens per second"] = partial(speed.rate_bars, rates=rates)
    if "routing" in found:
        load = np.array(found["routing"]["load"])
        panels["Load of every expert, full colour: twice the mean"] = partial(routing.load_map, load=load)
    if found.get("routing", {}).get("affinity"):
        title = "How well an expert foretells the next layer's"
        panels[title] = partial(routing.foretold, pairs=found["routing"]["affinity"])
    if "placement" in found:
        title = "Placement on GPUs: transitions across nodes, %"
        panels[title] = partial(placement.crossings, rows=found["placement"]["judged"])
    if "cache" in found:
        panels["Experts larger than memory: hits by policy"] = partial(caching.rates, found=found["cache"])
    return panels
