"""Other models of the low-latency kernels' times, through the same published points: would one foretell more?

None has a parameter more than a latency and a bandwidth between nodes. They were tried knowing the held-out times, so
what they show is that the choice hardly matters, and where none of them gets.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from statistics import NormalDist

from ...placement.cluster.links import Link, fit
from ..screen import lines as table
from .published import DIRECTIONS, EXPERTS, FITTED, HELD_OUT, PER_NODE, TOP_K, fitted, low_latency, low_latency_s


def busiest(ranks: int) -> float:
    """Rows between nodes of the rank that gets most, of T (G - g) tokens that choose it or not: the mean, and as many
    standard deviations as the largest of G normal numbers is expected to have (Blom, 1958)."""
    expected = mean(ranks)
    spread = expected * (1 - 1 / ranks) * (EXPERTS - TOP_K) / (EXPERTS - 1)
    return expected + NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25)) * sqrt(spread)


def mean(ranks: int) -> float:
    return low_latency(ranks).rows("plain").across


def variants() -> dict[str, tuple[list[float], Link]]:
    """name and direction -> errors on the held-out ranks, and the link found."""
    found = {}
    for i, name in enumerate(DIRECTIONS):
        inside = fitted()[i].inside

        def beside(ranks: int, i: int = i, inside: Link = inside) -> float:
            return inside.transfer_s(low_latency(ranks).rows("plain").inside * _bytes(i))

        found[f"at once, {name}"] = _held_out([i], mean)
        found[f"one after the other, {name}"] = _held_out([i], mean, beside)
        found[f"the busiest rank, {name}"] = _held_out([i], busiest)
    found["one line for both directions"] = _held_out([0, 1], mean)
    return found


def _bytes(direction: int) -> float:
    case = low_latency(PER_NODE)
    return (case.dispatch_bytes, case.combine_bytes)[direction]


def _held_out(
    directions: list[int], rows: Callable[[int], float], beside: Callable[[int], float] = lambda ranks: 0.0
) -> tuple[list[float], Link]:
    """Errors of a line through the fitted points, of times without what is spent `beside` it."""
    points = [(rows(r) * _bytes(i), low_latency_s(r, i) - beside(r)) for i in directions for r in FITTED]
    link = fit(points)
    modelled = {
        (r, i): link.latency_s + link.transfer_s(rows(r) * _bytes(i)) + beside(r) for r in HELD_OUT for i in (0, 1)
    }
    return [modelled[r, i] / low_latency_s(r, i) - 1 for i in directions for r in HELD_OUT], link


def variant_lines() -> list[str]:
    """One line each."""
    rows = [("", "errors", "link")]
    for name, (errors, link) in variants().items():
        said = " ".join(f"{100 * e:>+5.1f}%" for e in errors)
        rows.append((name, said, f"{link.latency_us:.1f} us + bytes / {link.bandwidth_GBps:.1f} GB/s"))
    title = f"errors on {', '.join(map(str, HELD_OUT))} ranks, held out, of this model and of others"
    return [title, *table(rows, left=(0, 1, 2))]
