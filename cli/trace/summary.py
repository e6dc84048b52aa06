"""What a trace says, as figures and on the screen. Traces are streamed: their size does not matter."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...bench.screen import Screen
from ...placement.traces.affinity import affinity, imbalance
from ...placement.traces.drift import drift
from ...placement.traces.file import TraceFile
from ...placement.traces.statistics import Statistics, statistics

GPUS = 8


def summary(trace: TraceFile, seed: int = 0, against: TraceFile | None = None) -> dict[str, Any]:
    """Everything that `show` tells, for JSON."""
    layers, tokens, top_k = trace.shape
    found = statistics(trace, co_activation=True)
    pairs = affinity(trace, seed=seed)
    sequence = trace.sequence
    out = {
        "trace": str(trace.path),
        "layers": layers,
        "tokens": tokens,
        "top_k": top_k,
        "experts": trace.num_experts,
        "sequences": None if sequence is None else int((np.diff(sequence, prepend=-1) != 0).sum()),
        "load": _load(found),
        "affinity": [
            {"layer": p.layer, "predicted": p.predicted, "shuffled": p.shuffled, "lift": p.lift} for p in pairs
        ],
        "companions": _companions(found),
        "gpus_of_a_token": _spread(trace, seed),
    }
    if against is not None:
        far = drift(trace, against, seed=seed)
        out["drift"] = {
            "against": str(against.path),
            "load": far.load.tolist(),
            "load_by_chance": far.load_by_chance.tolist(),
            "transitions": far.transitions.tolist(),
            "transitions_by_chance": far.transitions_by_chance.tolist(),
            "report": str(far),
        }
    return out


def loads(found: Statistics, source: str) -> dict[str, Any]:
    """The same of a recording that holds loads only."""
    layers, experts = found.load.shape
    return {"trace": source, "layers": layers, "experts": experts, "load": _load(found)}


def show(found: dict[str, Any], screen: Screen) -> None:
    """The figures in words."""
    size = f"{found['layers']} layers of {found['experts']} experts"
    if "tokens" in found:
        parts = f" in {found['sequences']:,} sequences" if found["sequences"] is not None else ""
        size = f"{found['tokens']:,} tokens{parts}, {size}, {found['top_k']} to a token"
    screen.say(f"{found['trace']}: {size}")
    for line in found.get("told", ()):
        screen.say(f"  {line}")
    screen.table(_table(found))
    screen.say(f"load, max / mean, mean of the layers: {_mean(found['load'], 'max_over_mean'):.2f}")
    if found.get("affinity"):
        predicted, shuffled, gain = (_mean(found["affinity"], k) for k in ("predicted", "shuffled", "lift"))
        screen.say(
            f"{found['top_k']} best successors: {100 * predicted:.1f}% of the transitions, "
            f"{100 * shuffled:.1f}% with tokens shuffled, lift {gain:.2f}"
        )
    if found.get("companions") is not None:
        screen.say(f"{found['top_k']} best companions: {100 * found['companions']:.1f}% of the pairs inside a layer")
    if found.get("gpus_of_a_token") is not None:
        screen.say(f"GPUs of a token and layer, experts dealt out over {GPUS}: {found['gpus_of_a_token']:.2f}")
    if "drift" in found:
        screen.say(f"drift to {found['drift']['against']}: {found['drift']['report']}")


def _table(found: dict[str, Any]) -> list[tuple[str, ...]]:
    lift = {a["layer"]: f"{a['lift']:.2f}" for a in found.get("affinity", ())}
    head = ("layer", "max / mean", "busiest", "unused", "lift to the next")
    rows = [
        (load["name"], f"{load['max_over_mean']:.2f}", str(load["busiest"]), str(load["unused"]), lift.get(number, ""))
        for number, load in enumerate(found["load"])
    ]
    return [head, *rows]


def _mean(rows: list[dict[str, Any]], key: str) -> float:
    return float(np.mean([row[key] for row in rows]))


def _load(found: Statistics) -> list[dict[str, Any]]:
    names = found.layer_names or tuple(map(str, range(found.layers)))
    worst = imbalance(found.load)
    of_layer = found.experts_of_layer
    sizes = np.full(found.layers, found.num_experts) if of_layer is None else of_layer
    return [
        {
            "name": names[layer],
            "max_over_mean": float(worst[layer] * sizes[layer] / found.num_experts),
            "busiest": int(load.argmax()),
            "unused": int((load[: sizes[layer]] == 0).sum()),
        }
        for layer, load in enumerate(found.load)
    ]


def _companions(found: Statistics) -> float | None:
    """The share of the pairs of one layer that an expert has with its K most frequent companions; None for K = 1."""
    shares = []
    for matrix in found.co_activation or ():
        pairs = matrix.toarray()
        np.fill_diagonal(pairs, 0)
        if pairs.any():
            shares.append(np.sort(pairs, axis=1)[:, -found.top_k :].sum() / pairs.sum())
    return float(np.mean(shares)) if shares else None


def _spread(trace: TraceFile, seed: int) -> float | None:
    """Distinct GPUs that a token's experts of one layer are on, were they dealt out at random; None without tokens."""
    rng, total, count = np.random.default_rng(seed), 0, 0
    for layer in range(trace.shape[0]):
        gpu = np.append(rng.permutation(np.arange(trace.num_experts) % GPUS), GPUS)
        for ids in trace.chunks(layer):
            on = np.sort(gpu[np.where(ids == trace.none, trace.num_experts, ids)], axis=1)
            fresh = np.diff(on, axis=1, prepend=-1) != 0
            total += int((fresh & (on < GPUS)).sum())
            count += int((on[:, :1] < GPUS).sum())
    return total / count if count else None
