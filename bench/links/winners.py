"""Which dispatcher the model expects to win where, and how both halves of the report read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ...placement.cluster.links import Case, Link, Links, message_bytes, predict
from ..screen import lines as table
from .published import DIRECTIONS, LOW_LATENCY, Point, at_the_card, low_latency_GBps

OURS = ("all_to_all", "hierarchical", "all_gather")
BESIDE = ("plain", "pipelined")


@dataclass(frozen=True)
class Sizes:
    """What the cases have in common; DeepSeek-V3's by default: FP8 there, bf16 back, 4 of the nodes."""

    hidden_size: int = 7168
    num_experts: int = 256
    top_k: int = 8
    dispatch_bytes: float = 1.0
    combine_bytes: float = 2.0
    ranks_per_node: int = 8
    at_most_nodes: int | None = 4

    def case(self, ranks: int, tokens: int) -> Case:
        """Beyond one rank per expert there are as many experts as ranks."""
        return Case(
            ranks,
            min(self.ranks_per_node, ranks),
            tokens,
            max(self.num_experts, ranks),
            self.top_k,
            message_bytes(self.hidden_size, self.top_k, self.dispatch_bytes),
            self.hidden_size * self.combine_bytes,
            self.at_most_nodes,
        )


def row(sizes: Sizes, ranks: int, tokens: int, dispatch: Links, combine: Links) -> dict[str, Any]:
    """One line of the table as JSON has it: modelled us of dispatch and combine, and why the winner needs its time."""
    case = sizes.case(ranks, tokens)
    found = {name: predict(name, case, dispatch, combine) for name in (*OURS, *BESIDE)}
    wins = min(OURS, key=lambda name: found[name].seconds)
    return {
        "ranks": ranks,
        "tokens": tokens,
        "experts": case.num_experts,
        "modelled_us": {name: 1e6 * p.seconds for name, p in found.items()},
        "rows_per_token": {name: asdict(case.rows(name)) for name in found},
        "wins": wins,
        "why": found[wins].why(),
    }


def link_lines(dispatch: Links, combine: Links) -> list[str]:
    """The links: latency and bandwidth of each class, there and back."""

    def said(link: Link) -> str:
        return f"{link.latency_us:5.1f} us + bytes / {link.bandwidth_GBps:5.1f} GB/s"

    both = zip(DIRECTIONS, (dispatch, combine), strict=True)
    rows = [(name, said(links.inside), said(links.across)) for name, links in both]
    return table([("", "inside a node", "between nodes"), *rows], left=(0, 1, 2))


def fit_lines(points: Iterable[Point]) -> list[str]:
    """Published beside modelled times."""
    rows = [("kernels", "ranks", "", "published", "modelled", "error", "")]
    for p in points:
        times = (f"{1e6 * p.published_s:,.0f} us", f"{1e6 * p.modelled_s:,.0f} us")
        rows.append((p.kernels, str(p.ranks), p.direction, *times, f"{100 * round(p.error, 4) + 0.0:+.1f}%", p.use))
    return table(rows, left=(0, 2, 6))


def check_lines() -> list[str]:
    """What the tables say apart from times: our bytes against theirs, and the rate at the card."""
    rows = [("ranks", *(f"{name}, {what}" for name in DIRECTIONS for what in ("published", "from our bytes")))]
    for ranks, row in LOW_LATENCY.items():
        ours = [f"{low_latency_GBps(ranks, i):.1f}" for i in range(2)]
        rows.append((str(ranks), str(row[1]), ours[0], str(row[3]), ours[1]))
    card = [("kernels", "ranks", "", "published", "leaves the node")]
    for kernels, ranks, name, logical, leaves in at_the_card():
        card.append((kernels, str(ranks), name, f"{logical:g}", f"{leaves:.1f}"))
    return [
        "bytes over time of the low-latency kernels, GB/s",
        *table(rows, left=()),
        "",
        "GB/s through the card of 50: published (own node's rows included), and what of it leaves the node",
        *table(card, left=(0, 2)),
    ]


def winner_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table of who wins; times in us, dispatch and combine together."""
    lines = []
    for tokens in dict.fromkeys(r["tokens"] for r in rows):
        lines += ["", f"{tokens} tokens per rank, modelled us of dispatch + combine"]
        shown: list[tuple[str, ...]] = [("ranks", *OURS, *BESIDE, "wins")]
        for r in (r for r in rows if r["tokens"] == tokens):
            times = (f"{r['modelled_us'][name]:,.0f}" for name in (*OURS, *BESIDE))
            best = r["modelled_us"][r["wins"]]
            rest = min((us for name in OURS if (us := r["modelled_us"][name]) > best), default=best)
            times_as_long = rest / best if best else 1.0  # one rank sends nothing
            shown.append((str(r["ranks"]), *times, f"{r['wins']}, {times_as_long:.2f}x"))
        lines += table(shown, left=(len(shown[0]) - 1,))
    return lines
