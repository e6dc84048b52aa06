"""What an exchange costs: a latency and a bandwidth for each class of link, and the rows of volume.py.

A collective takes   rounds * latency + max(bytes inside / bandwidth inside, bytes across / bandwidth across):

| dispatcher | one way | rounds |
|---|---|---|
| plain, all_to_all | one collective over both links at once | 1: across, where there are several nodes |
| hierarchical | two, one after the other: across, inside | 1 of each link |
| pipelined | both levels at once | 1: across, where there are several nodes |
| all_gather | one over both links at once | log2 N across + log2 g inside, rounded up |
| slice_all_reduce | nothing there, all of it back | twice those of all_gather |

Bytes are what one rank sends, by an even router: the busiest rank of an uneven one takes longer. The collectives count
with the least rows and rounds that any algorithm needs (Thakur et al., 2005): where they lose, they lose. With `counts`
the row counts travel first, in as many rounds. Not in it: packing, summing, waits of the host, and the experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite

from .volume import VOLUMES, Rows, rows_per_token


@dataclass(frozen=True)
class Link:
    """alpha and beta of one class of link: latency of a collective in us, bytes per second of one rank in GB/s."""

    latency_us: float
    bandwidth_GBps: float

    def __post_init__(self) -> None:
        if not (isfinite(self.latency_us) and self.latency_us >= 0):
            raise ValueError(f"Link: latency_us must be finite and not negative, got {self.latency_us}")
        if not self.bandwidth_GBps > 0:
            raise ValueError(f"Link: bandwidth_GBps must be positive, got {self.bandwidth_GBps}")

    @property
    def latency_s(self) -> float:
        return self.latency_us * 1e-6

    def transfer_s(self, size_bytes: float) -> float:
        return size_bytes / (self.bandwidth_GBps * 1e9)


@dataclass(frozen=True)
class Links:
    """The two classes: between the ranks of a node, and between nodes (a rank's share of the card)."""

    inside: Link
    across: Link


@dataclass(frozen=True)
class Machine:
    """Links as somebody measured them, fitted for each direction, and where the figures stand."""

    name: str
    dispatch: Links
    combine: Links
    source: str


H800_CX7 = Machine(
    "H800, one ConnectX-7 of 400 Gb/s each",
    dispatch=Links(Link(28.7, 137.6), Link(36.9, 46.8)),
    combine=Links(Link(22.2, 139.8), Link(19.0, 41.7)),
    source="fitted on DeepEP's published tables by `headgate bench links`, which prints the fit and its errors",
)
MACHINES = {"h800-cx7": H800_CX7}


def fit(points: Sequence[tuple[float, float]]) -> Link:
    """The Link whose latency + bytes / bandwidth is nearest to points (bytes, seconds), by least squares of the
    relative error: exact through two. Where times do not rise with bytes the bandwidth is infinite; a latency that
    comes out negative is 0, with the bandwidth fitted again.

    Raises ValueError where there are not two different sizes, or a time that is not positive.

    >>> fit([(0, 20e-6), (1e6, 40e-6)])
    Link(latency_us=20.0, bandwidth_GBps=50.0)
    """
    if len({size for size, _ in points}) < 2:
        raise ValueError(f"fit: points must have two different sizes, got {[size for size, _ in points]}")
    if any(not (isfinite(t) and t > 0) for _, t in points):
        raise ValueError(f"fit: seconds must be positive, got {[t for _, t in points]}")
    # alpha / t + beta x / t = 1 for each point: the normal equations of two unknowns
    a = [1 / t for _, t in points]
    b = [x / t for x, t in points]
    aa, ab, bb = _dot(a, a), _dot(a, b), _dot(b, b)
    determinant = aa * bb - ab * ab
    alpha, beta = (bb * sum(a) - ab * sum(b)) / determinant, (aa * sum(b) - ab * sum(a)) / determinant
    if beta <= 0:
        alpha, beta = sum(a) / aa, 0.0
    elif alpha < 0:
        alpha, beta = 0.0, sum(b) / bb
    return Link(round(alpha * 1e6, 9), round(1e-9 / beta, 9) if beta else inf)


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


@dataclass(frozen=True)
class Case:
    """The exchange of one layer, alike on every rank: `tokens` of each, and the bytes of one row on its way.

    `dispatch_bytes` and `combine_bytes` are those of a whole message (see `message_bytes`). `at_most_nodes`: the router
    first takes so many nodes.
    """

    ranks: int
    ranks_per_node: int
    tokens: int
    num_experts: int
    top_k: int
    dispatch_bytes: float
    combine_bytes: float
    at_most_nodes: int | None = None

    def rows(self, dispatcher: str) -> Rows:
        """Rows of one rank, one direction."""
        each = rows_per_token(
            dispatcher,
            ranks=self.ranks,
            ranks_per_node=self.ranks_per_node,
            num_experts=self.num_experts,
            top_k=self.top_k,
            at_most_nodes=self.at_most_nodes,
        )
        return Rows(self.tokens * each.inside, self.tokens * each.across)


def message_bytes(hidden_size: int, top_k: int, number_bytes: float, weight_bytes: int = 4) -> float:
    """Bytes of a dispatched row with its ids and router weights, as Headgate's dispatchers pack it."""
    return hidden_size * number_bytes + top_k * (4 + weight_bytes)


@dataclass(frozen=True)
class Step:
    """One collective, in seconds: its rounds, and the transfers on both links, which run at the same time."""

    latency_s: float
    inside_s: float = 0.0
    across_s: float = 0.0

    @property
    def seconds(self) -> float:
        return self.latency_s + max(self.inside_s, self.across_s)


def steps(dispatcher: str, rows: Rows, row_bytes: float, nodes: int, per_node: int, links: Links) -> tuple[Step, ...]:
    """The collectives of one direction, in their order. `rows`: what a rank sends."""
    if dispatcher not in VOLUMES:
        raise ValueError(f"steps: dispatcher must be one of {', '.join(VOLUMES)}, got {dispatcher!r}")
    inside, across = (
        link.transfer_s(n * row_bytes) for link, n in ((links.inside, rows.inside), (links.across, rows.across))
    )
    near = links.inside.latency_s if per_node > 1 else 0.0
    far = links.across.latency_s if nodes > 1 else 0.0
    if dispatcher in ("all_gather", "slice_all_reduce"):
        rounds = _rounds(nodes) * far + _rounds(per_node) * near
        return (Step(rounds * (1 if dispatcher == "all_gather" else 2), inside, across),)
    if dispatcher == "hierarchical":
        return Step(far, across_s=across), Step(near, inside_s=inside)
    return (Step(far or near, inside, across),)


def _rounds(parts: int) -> int:
    return (parts - 1).bit_length()


@dataclass(frozen=True)
class Prediction:
    """A modelled time, never a measured one, with its parts."""

    dispatcher: str
    counts: tuple[Step, ...]
    dispatch: tuple[Step, ...]
    combine: tuple[Step, ...]

    @property
    def dispatch_s(self) -> float:
        return sum(step.seconds for step in (*self.counts, *self.dispatch))

    @property
    def combine_s(self) -> float:
        return sum(step.seconds for step in self.combine)

    @property
    def seconds(self) -> float:
        return self.dispatch_s + self.combine_s

    def why(self) -> str:
        """One line: what of the time is latency, and which link the rest is spent on."""
        everything = (*self.counts, *self.dispatch, *self.combine)
        latency = sum(step.latency_s for step in everything)
        on = {"inside the node": 0.0, "between nodes": 0.0}
        for step in everything:
            on["inside the node" if step.inside_s > step.across_s else "between nodes"] += step.seconds - step.latency_s
        parts = [f"{1e6 * latency:,.0f} us of latency"]
        parts += [f"{1e6 * s:,.0f} us {where}" for where, s in on.items() if s]
        return f"{self.dispatcher}: {1e6 * self.seconds:,.0f} us modelled = " + " + ".join(parts)


def predict(
    dispatcher: str,
    case: Case,
    links: Links,
    back: Links | None = None,
    *,
    rows: Rows | None = None,
    counts: bool = True,
) -> Prediction:
    """Seconds of dispatch and of combine. `back`: the links as combine uses them, where they differ.

    `rows`: what a rank sends, where it was counted; None: what an even router makes it send, and then ValueError where
    the case cannot be (see rows_per_token). `counts`: the row counts travel first, as Headgate's dispatchers need it;
    DeepEP's low-latency kernels do not.
    """
    rows, nothing = case.rows(dispatcher) if rows is None else rows, Rows(0.0, 0.0)
    nodes, per_node = case.ranks // case.ranks_per_node, case.ranks_per_node
    back = links if back is None else back
    ahead: tuple[Step, ...] = ()
    if counts:  # slice_all_reduce only compares what ranks have in common, by an all-gather
        kind = "all_gather" if dispatcher == "slice_all_reduce" else dispatcher
        ahead = steps(kind, nothing, 0.0, nodes, per_node, links)
    there: tuple[Step, ...] = ()
    if dispatcher != "slice_all_reduce":
        there = steps(dispatcher, rows, case.dispatch_bytes, nodes, per_node, links)
    return Prediction(dispatcher, ahead, there, steps(dispatcher, rows, case.combine_bytes, nodes, per_node, back))
