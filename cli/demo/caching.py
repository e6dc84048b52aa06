"""Chapter: the trained model's experts on disk, a quarter of them in memory at a time; the same text, to the byte."""

from __future__ import annotations

import tempfile
import time
from functools import partial

from ...bench import draw, html
from ...moe.offload.offload import offload
from ...placement.caching.simulate import simulate
from ...placement.caching.steps import steps_of
from ..cache.compare import sizes
from .model import generate
from .tour import Tour

BUDGET = 0.25
POLICIES = ("lru", "lfu", "lfru", "adaptive", "belady")
PROMPT = b"\nclass "
LENGTH = 64


def run(tour: Tour) -> None:
    """Policies on the recorded trace, then the model itself beside what it was with everything in memory."""
    assert tour.trace is not None
    steps = steps_of(tour.trace)
    shown = sizes(steps.experts, tour.trace.shape[2])
    curves = {name: [simulate(steps, name, size).hit_rate for size in shown] for name in POLICIES}
    at_hand = {name: simulate(steps, name, BUDGET).hit_rate for name in POLICIES}
    prompt = PROMPT if tour.options.text is None else bytes(tour.corpus.held_out[:32])
    length, seed = min(LENGTH, tour.options.shape.length), tour.options.seed
    start = time.perf_counter()
    want = generate(tour.model, prompt, length, seed)
    resident_s = time.perf_counter() - start
    with (
        tempfile.TemporaryDirectory(prefix="headgate-demo-") as disk,
        offload(tour.model, BUDGET, "adaptive", "gate", disk) as offloaded,
    ):
        start = time.perf_counter()
        got = generate(tour.model, prompt, length, seed)
        offloaded_s = time.perf_counter() - start
        stats = offloaded.stats()
        slots, experts = offloaded.engine.arena.nbytes, sum(layer.nbytes for layer in offloaded.engine.layers)
    tour.metrics["cache"] = {
        "budget": BUDGET,
        "hit_rates": at_hand,
        "experts": steps.experts,
        "curves": {"slots": shown, "hit_rates": curves},
        "same": got == want,
        "slots_bytes": slots,
        "experts_bytes": experts,
        "hits": stats.hits / max(1, stats.accesses),
        "loads": stats.loads,
        "ahead": stats.ahead,
        "used": stats.used,
        "read_bytes": stats.bytes,
        "tokens": len(got) - len(prompt),
        "seconds": offloaded_s,
        "resident_seconds": resident_s,
    }
    _say(tour)


def _say(tour: Tour) -> None:
    found, screen = tour.metrics["cache"], tour.screen
    screen.say("  hit rates of the recorded trace, a quarter of each layer's experts in memory, one token at a time:")
    screen.table([("", "hit rate"), *((name, f"{rate:.1%}") for name, rate in found["hit_rates"].items())])
    same = "the same bytes" if found["same"] else "OTHER bytes"
    screen.say(
        f"  experts on disk, {found['slots_bytes'] / 1e6:.0f} of {found['experts_bytes'] / 1e6:.0f} MB in memory: "
        f"{same} written; {found['hits']:.1%} of the experts were there, {found['loads']:,} loads "
        f"({found['ahead']:,} ahead); {found['seconds']:.1f} s against {found['resident_seconds']:.1f}"
    )


def section(tour: Tour) -> str:
    found = tour.metrics["cache"]
    words = (
        f"The experts were written to a file and only {found['slots_bytes'] / 1e6:.0f} of their "
        f"{found['experts_bytes'] / 1e6:.0f} MB kept in memory. The model then wrote "
        f"{'the same bytes as before' if found['same'] else '<b>other bytes than before</b>'}: what a layer needed was "
        f"there in {found['hits']:.1%} of all cases, the rest was read. The picture shows, on the recorded trace, "
        "how often a policy has the expert that is asked for. Without reading ahead nobody can do better than Belady, "
        "who knows the future."
    )
    return html.prose(words) + draw.inline(partial(rates, found=found), "hit rate over slots", 860, 300)


def rates(axis: draw.Axes, found: dict) -> None:
    """Picture: hit rates over slots."""
    draw.hit_rates(axis, found["curves"]["slots"], found["curves"]["hit_rates"], found["experts"])
