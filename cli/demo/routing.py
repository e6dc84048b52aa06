"""Chapter: record the routing on held-out text and read it: load, affinity between layers, and what experts like."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...bench import draw, html
from ...bench.corpus import VOCABULARY
from ...moe.record import record
from ...placement.traces.affinity import Affinity, affinity, expert_load, imbalance, transition_counts
from ...placement.traces.trace import Trace
from .tour import Tour

BATCHES = 16
SPECIALISTS = 8
LETTERS = 6


def run(tour: Tour) -> None:
    options = tour.options
    batches = tour.corpus.held_out_batches(options.rows, options.shape.length, BATCHES)
    trace = tour.trace = record(tour.model, batches, weights=True)
    text = np.concatenate([batch.numpy().ravel() for batch in batches])
    load = expert_load(trace)
    pairs = affinity(trace)
    specialists = _specialists(trace, text)
    tour.metrics["routing"] = {
        "tokens": trace.expert_ids.shape[1],
        "load": load.tolist(),
        "busiest_over_mean": imbalance(load).tolist(),
        "affinity": [{**vars(pair), "lift": pair.lift} for pair in pairs],
        "specialists": specialists,
    }
    _say(tour, trace, load, pairs, specialists)


def _specialists(trace: Trace, text: NDArray[np.integer]) -> list[dict[str, Any]]:
    """The experts whose tokens tell the most about the byte they are: largest Kullback-Leibler divergence, in bits, of
    the bytes that an expert sees from the bytes of the text, one expert per layer at first, experts with a quarter
    of their fair share or more only."""
    overall = np.bincount(text, minlength=VOCABULARY) / len(text)
    found: list[dict[str, Any]] = []
    for layer, ids in enumerate(trace.expert_ids):
        byte_of = np.broadcast_to(text[:, None], ids.shape)
        live = ids != trace.none
        flat = ids[live].astype(np.int64) * VOCABULARY + byte_of[live]
        counts = np.bincount(flat, minlength=trace.num_experts * VOCABULARY).reshape(-1, VOCABULARY)
        for expert, seen in enumerate(counts):
            if seen.sum() < 0.25 * counts.sum() / trace.experts(layer) or not seen.sum():
                continue
            share = seen / seen.sum()
            there = share > 0
            divergence = float((share[there] * np.log2(share[there] / overall[there])).sum())
            top = np.argsort(-share, kind="stable")[:LETTERS]
            letters = [[int(byte), float(share[byte])] for byte in top if share[byte] > 0]
            found.append({"layer": layer, "expert": expert, "bits": divergence, "bytes": letters})
    found.sort(key=lambda one: -one["bits"])
    first = {one["layer"]: one for one in reversed(found)}
    return sorted(first.values(), key=lambda one: one["layer"])[:SPECIALISTS]


def _say(tour: Tour, trace: Trace, load: NDArray, pairs: list[Affinity], specialists: list[dict]) -> None:
    screen = tour.screen
    layers, tokens, top_k = trace.expert_ids.shape
    screen.say(f"  {tokens:,} held-out tokens, {layers} layers, {top_k} of {trace.num_experts} experts each")
    ratios = imbalance(load)
    rows: list[tuple[str, ...]] = [("layer", "busiest / mean", "unused", "next layer foretold", "if unrelated", "load")]
    for layer in range(layers):
        pair = pairs[layer] if layer < len(pairs) else None
        rows.append(
            (
                str(layer),
                f"{ratios[layer]:.2f}",
                str(int((load[layer, : trace.experts(layer)] == 0).sum())),
                f"{pair.predicted:.0%}" if pair else "",
                f"{pair.shuffled:.0%}" if pair else "",
                sparkline(load[layer]),
            )
        )
    screen.table(rows)
    if pairs:
        mean = np.mean([pair.lift for pair in pairs])
        screen.say(
            f"  knowing a token's expert, its next expert is among {pairs[0].best} guesses {mean:.1f} times as often "
            "as by chance: what placement and prefetching live on"
        )
    if specialists:
        one = max(specialists, key=lambda s: s["bits"])
        liked = "  ".join(f"{show(byte)} {share:.0%}" for byte, share in one["bytes"])
        screen.say(f"  a specialist: layer {one['layer']}, expert {one['expert']} sees {liked}")


def sparkline(load: NDArray[np.integer]) -> str:
    steps = "▁▂▃▄▅▆▇█"
    most = max(int(load.max()), 1)
    return "".join(steps[min(7, int(8 * value / most))] for value in load[:64].tolist())


def show(byte: int) -> str:
    """A byte as a reader can see it."""
    return {32: "␣", 10: "⏎", 9: "⇥"}.get(byte) or (chr(byte) if 32 < byte < 127 else f"\\x{byte:02x}")


def section(tour: Tour) -> str:
    found = tour.metrics["routing"]
    assert tour.trace is not None
    load = np.array(found["load"])
    pairs = found["affinity"]
    parts = [
        html.prose(
            f"The routing of {found['tokens']:,} held-out tokens, kept in <code>trace.npz</code>. Each cell is an "
            "expert; full colour is twice its fair share of tokens or more. "
            f"The busiest expert of a layer carries {max(found['busiest_over_mean']):.1f} times the mean at worst."
        ),
        draw.inline(
            partial(load_map, load=load), "load of every expert, full colour: twice the mean or more", 860, 250
        ),
    ]
    if pairs:
        parts.append(_affinity_section(tour.trace, pairs))
    parts.append(_specialist_section(found["specialists"]))
    return "".join(parts)


def load_map(axis: draw.Axes, load: NDArray) -> None:
    """Picture: the load of every expert over the mean of its layer."""
    draw.heat(axis, load / load.mean(1, keepdims=True).clip(1e-9), "layer", "expert", top=2.0, unit="× mean load")


def foretold(axis: draw.Axes, pairs: list[dict]) -> None:
    """Picture: how well an expert foretells the next one, layer by layer."""
    rows = [(f"{p['layer']} → {p['layer'] + 1}", p["shuffled"], p["predicted"]) for p in pairs]
    draw.dumbbells(axis, rows, "unrelated", "measured")


def _affinity_section(trace: Trace, pairs: list[dict]) -> str:
    best = max(pairs, key=lambda pair: pair["lift"])
    layer = best["layer"]
    counts = transition_counts(trace, layer).astype(float)
    expected = counts.sum(1, keepdims=True) * counts.sum(0, keepdims=True) / max(counts.sum(), 1)
    lift = np.divide(counts, expected, out=np.zeros_like(counts), where=expected > 0)
    words = html.prose(
        "How well does a token's expert foretell its expert in the next layer? Of the transitions out of an expert, "
        f"{best['predicted']:.0%} go to its {best['best']} favourite successors from layer {layer} to {layer + 1}, "
        f"where the tie is strongest; with the tokens shuffled it would be {best['shuffled']:.0%}. What can be "
        "foretold can be placed together and fetched ahead of time. The matrix shows those two layers: how many times "
        "more often than by chance each pair of experts occurs."
    )
    order = np.argsort(lift.argmax(1), kind="stable").tolist()
    ends = (f"expert in layer {layer}, sorted", f"expert in layer {layer + 1}")
    matrix = draw.inline(
        lambda axis: draw.matrix(axis, lift, order, *ends, top=4.0, unit="× chance"),
        "transitions, full colour: four times chance or more", 420, 420,
    )  # fmt: skip
    shares = draw.inline(
        partial(foretold, pairs=pairs), "share of transitions to the favourite successors", 420, 60 + 34 * len(pairs)
    )
    return html.subtitle("Affinity between layers") + words + html.grid([shares, matrix])


def _specialist_section(specialists: list[dict]) -> str:
    rows = [["layer", "expert", "bytes it sees most"]]
    for one in specialists:
        liked = " ".join(html.key(show(byte), f"{share:.0%}") for byte, share in one["bytes"])
        rows.append([str(one["layer"]), str(one["expert"]), liked])
    return (
        html.subtitle("Specialists")
        + html.prose(
            "The expert of each layer whose tokens differ most from the text as a whole. Nobody told them what to like."
        )
        + html.table(rows, raw=True)
    )
