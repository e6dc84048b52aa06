"""Picks among the dispatchers, by the rows that the routing makes each of them move and the links they go by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.routing import Routing
from ..kernels.uncompiled import uncompiled
from ..placement.cluster.links import Case, Link, Links, Prediction, predict
from ..placement.cluster.volume import Rows
from . import collectives
from .agreement import Agreement, held_experts
from .all_gather import AllGather
from .all_to_all import AllToAll, destinations
from .hierarchical import Hierarchical
from .measure import measure
from .pending import Pending
from .protocol import Dispatcher
from .wire import Wires, message

# Of two that are as fast the first is taken: an all-gather sorts and copies no row.
CANDIDATES = ("all_gather", "all_to_all", "hierarchical")


@dataclass(frozen=True)
class Ticket:
    """What combine needs of a dispatch: who did it, and that one's ticket."""

    choice: str
    ticket: Any


@dataclass(frozen=True)
class Found:
    """What a count brought: for each candidate the rows of the busiest rank, and the time that the model expects."""

    call: int
    tokens: int  # of the rank with most
    links: Links
    rows: dict[str, Rows]
    predicted: dict[str, Prediction]

    @property
    def choice(self) -> str:
        return min(self.predicted, key=lambda c: self.predicted[c].seconds)

    def table(self) -> str:
        lines = [
            f"Auto: {self.choice}, chosen in call {self.call} for {self.tokens} tokens a rank at most",
            f"links: inside a node {_said(self.links.inside)}, between nodes {_said(self.links.across)}",
            f"{'':<14} {'rows inside':>12} {'rows across':>12} {'modelled us':>12}   (rows per token, busiest rank)",
        ]
        each = max(self.tokens, 1)
        for c, p in self.predicted.items():
            rows = f"{self.rows[c].inside / each:>12.2f} {self.rows[c].across / each:>12.2f}"
            lines.append(f"{c:<14} {rows} {1e6 * p.seconds:>12.1f}{'  chosen' if c == self.choice else ''}")
        return "\n".join([*lines, *(p.why() for p in self.predicted.values())])


class Auto:
    """AllGather, AllToAll or Hierarchical, whichever the model of placement/cluster/links.py expects to be fastest.

    In the first call, and then in one of `every`, the ranks count the rows that each candidate would move for the
    routing of that call: tokens once per rank, once per node; the busiest rank counts. That is one all-reduce of 16 G
    numbers and one wait for the device. In all other calls it is the chosen dispatcher. `choice` is its name, `why()`
    says why.

    `ranks_per_node`: ranks n * ranks_per_node .. are node n. `links`: times of the links inside a node and between
    nodes; None: measured in the first call (dispatch/measure.py), which is better done once for all layers:
    `measure(Hierarchical(group, 8), device="cuda")`. `candidates`: names, where some are left out; Hierarchical takes
    part where there are several nodes of several ranks. `group`, `wire`, `backward_wire`, `name`: see AllToAll. All of
    these must be the same on every rank; of the links those of the group's first rank are used.

    The choice is the same on every rank, and a function of the counted routing, the links and the formats. It does not
    change while the backward pass of an earlier call is to come (pending.py); then the ranks count again in the next.

    Memory and the time to sort, copy and sum rows are not weighed: AllGather makes R = G * max T rows.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        ranks_per_node: int = 1,
        links: Links | None = None,
        every: int = 100,
        candidates: Sequence[str] = CANDIDATES,
        wire: str | tuple[str, str] = "exact",
        backward_wire: str | tuple[str, str] = "exact",
        name: str = "",
    ) -> None:
        self.wires = Wires.of("Auto", wire, backward_wire)
        if not candidates or any(c not in CANDIDATES for c in candidates):
            raise ValueError(f"Auto: candidates must be some of {', '.join(CANDIDATES)}, got {candidates!r}")
        if every < 1:
            raise ValueError(f"Auto: every must be at least 1, got {every}")
        self.agreement = Agreement("Auto", group, name, self.wires)
        size = self.agreement.size
        if ranks_per_node < 1 or size % ranks_per_node:
            raise ValueError(f"Auto: ranks_per_node must divide the group's {size} ranks, got {ranks_per_node}")
        formats: dict[str, Any] = {"wire": wire, "backward_wire": backward_wire, "name": name}
        self.levels = Hierarchical(group, ranks_per_node, **formats)
        made: dict[str, Dispatcher] = {
            "all_gather": AllGather(group, **formats),
            "all_to_all": AllToAll(group, **formats),
        }
        if 1 < ranks_per_node < size:
            made["hierarchical"] = self.levels
        self.dispatchers = {c: made[c] for c in CANDIDATES if c in candidates and c in made}
        if not self.dispatchers:
            raise ValueError(
                f"Auto: candidates must have one besides hierarchical where ranks_per_node is 1 or the group's "
                f"{size} ranks, got {candidates!r}"
            )
        self.ranks_per_node, self.links, self.every = ranks_per_node, links, every
        self.found: Found | None = None
        self._due = False
        self._pending = Pending()

    def local_experts(self, num_experts: int) -> range:
        return held_experts("Auto", num_experts, self.agreement.rank, self.agreement.size)

    @uncompiled
    def dispatch(self, x: Tensor, routing: Routing) -> tuple[Tensor, Routing, Ticket]:
        self.agreement.header(x, routing)  # checks what this rank can see alone, and counts the calls
        if self._due or (self.agreement.calls - 1) % self.every == 0:
            self._choose(x, routing)
        choice = self.choice
        assert choice is not None
        rows, local, ticket = self.dispatchers[choice].dispatch(x, routing)
        self._pending.note(rows)
        return rows, local, Ticket(choice, ticket)

    @uncompiled
    def combine(self, rows: Tensor, ticket: Ticket) -> Tensor:
        return self.dispatchers[ticket.choice].combine(rows, ticket.ticket)

    def _choose(self, x: Tensor, routing: Routing) -> None:
        """Counts, and sets `found` from what all ranks have: the sum of their tables, and the first rank's sizes."""
        if self.links is None:
            self.links = measure(self.levels, device=x.device)
        size, per_node, ids = self.agreement.size, self.ranks_per_node, routing.expert_ids
        none = slice(0, 0)  # the bytes of a message show in one of no rows
        there = message(x[none], [ids[none], routing.weights[none]], self.wires.dispatch)[0].shape[1]
        back = message(x[none], [], self.wires.combine)[0].shape[1]
        own: list[float] = [len(x), bool(self._pending), there, back]
        own += [v for link in (self.links.inside, self.links.across) for v in (link.latency_us, link.bandwidth_GBps)]
        flows = traffic(ids, routing.num_experts, self.agreement.rank, size, per_node)
        mine = flows.new_zeros(len(own), size)
        mine[:, self.agreement.rank] = torch.tensor(own, dtype=mine.dtype, device=mine.device)
        table = collectives.all_reduce(torch.cat([flows, mine]), self.agreement.group).tolist()
        *moved, tokens, waiting = table[: len(flows) + 2]
        self._due = self.found is not None and max(waiting) > 0
        if self._due:
            return
        there, back, *link = (row[0] for row in table[len(flows) + 2 :])  # of the first rank, for everybody
        links = Links(Link(*link[:2]), Link(*link[2:]))
        case = Case(size, per_node, int(max(tokens)), routing.num_experts, ids.shape[1], there, back)
        self.found = weigh(self.agreement.calls, moved, case, links, list(self.dispatchers))

    @property
    def choice(self) -> str | None:
        """The name of the dispatcher in use; None before the first call."""
        return self.found.choice if self.found else None

    def why(self) -> str:
        """The last choice and its reasons, as a table: rows of the busiest rank, modelled times and their parts."""
        return self.found.table() if self.found else "Auto: no call yet, nothing chosen"

    def __repr__(self) -> str:
        return f"Auto({self.agreement}, candidates={list(self.dispatchers)}, choice={self.choice!r})"


def _said(link: Link) -> str:
    return "free" if link.bandwidth_GBps == inf else f"{link.latency_us:.1f} us + {link.bandwidth_GBps:.3g} GB/s"


def traffic(ids: Tensor, num_experts: int, rank: int, size: int, per_node: int) -> Tensor:
    """float64 [8, G]: what this rank's tokens make every rank receive and send, to be summed over ranks.

    Four lines for one row per rank, four for one per node: received inside, sent inside, received across, sent across.
    Exact: whole numbers below 2^53.
    """
    everything = range(num_experts)
    copies, nodes = destinations(ids, everything, size)[0], destinations(ids, everything, size // per_node)[0]
    ranks = torch.arange(size, device=ids.device)
    near = copies.masked_fill((ranks // per_node != rank // per_node) | (ranks == rank), 0)
    far = copies.masked_fill(ranks // per_node == rank // per_node, 0)
    # two levels: to the rank with this one's number in each node, which passes on what is not for itself
    number = rank % per_node
    peers = torch.arange(size // per_node, device=ids.device) * per_node + number
    zeros = torch.zeros_like(copies)
    over = zeros.index_copy(0, peers, nodes.masked_fill(peers == rank, 0))
    passed = copies.masked_fill(ranks % per_node == number, 0)
    passing = zeros.index_add(0, ranks // per_node * per_node + number, passed)

    def sent(rows: Tensor) -> Tensor:
        return torch.where(ranks == rank, rows.sum(), 0)

    return torch.stack([near, sent(near), far, sent(far), passed, passing, over, sent(over)]).double()


def weigh(call: int, flows: Sequence[Sequence[float]], case: Case, links: Links, candidates: Sequence[str]) -> Found:
    """The sum of the ranks' `traffic`, weighed. `case.tokens`: those of the rank with most."""
    nodes = case.ranks // case.ranks_per_node
    near, far, passed, over = (max(max(flows[i]), max(flows[i + 1])) for i in range(0, 8, 2))
    rows = {
        "all_gather": Rows(case.tokens * (case.ranks - nodes), case.tokens * (nodes - 1)),
        "all_to_all": Rows(near, far),
        "hierarchical": Rows(passed, over),
    }
    predicted = {c: predict(c, case, links, rows=rows[c]) for c in candidates}
    return Found(call, case.tokens, links, rows, predicted)
