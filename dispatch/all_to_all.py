"""All-to-all: each row goes at most once to each rank that holds one of its experts, and comes back reduced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..kernels.routing import Routing
from ..kernels.uncompiled import uncompiled
from . import collectives
from .agreement import Agreement, Complaint, held_experts, localised
from .linear import back, send
from .wire import Wires, message, sum_dtype


@dataclass(frozen=True)
class Exchange:
    """A Route: rows to the ranks of a group and back. `sent` and `received`: rows for and from each rank.

    `token_of_row` int64 [N]: whose copy stands at each place of the outgoing rows: rank by rank, tokens rising.
    `place` int64 [T, min(K, G)]: the places of a token's copies, rising, then -1.
    """

    token_of_row: Tensor = field(repr=False)
    place: Tensor = field(repr=False)
    sent: list[int]
    received: list[int]
    group: dist.ProcessGroup = field(repr=False)

    def send(self, rows: Tensor | None, beside: Sequence[Tensor], wire: str) -> tuple[Tensor | None, list[Tensor]]:
        outgoing, inverse = message(rows, beside, wire)
        copies = outgoing.index_select(0, self.token_of_row)
        return inverse(self.move(copies, home=False), None)

    def back(self, rows: Tensor | None, beside: Sequence[Tensor], wire: str) -> tuple[Tensor | None, list[Tensor]]:
        outgoing, inverse = message(rows, beside, wire)
        wide = None if rows is None or wire == "exact" else sum_dtype(rows.dtype)
        home, moved = inverse(self.move(outgoing, home=True), wide)
        y = None if home is None or rows is None else sum_at_places(home, self.place, rows.dtype)
        return y, [sum_at_places(t, self.place, t.dtype) for t in moved]

    def move(self, x: Tensor, home: bool) -> Tensor:
        """x uint8 [N, B] in the order of their receivers -> [M, B] in that of their senders; `home`: the way back."""
        received, sent = (self.sent, self.received) if home else (self.received, self.sent)
        return collectives.all_to_all(x, received, sent, self.group)


def destinations(ids: Tensor, held: range, group_size: int, room: int | None = None) -> tuple[Tensor, Tensor]:
    """Who needs which token: (counts int64 [G], places int64 [T, min(K, G)] of its copies, -1 for none).

    Each of the G members holds its part of the experts `held`, in a row. A token is copied once to each member that
    holds one of its experts; the copies stand member by member, tokens rising: one after the other, or each member's
    from a multiple of `room` on. Needs a [T, G] table of booleans here, and no wait for the device.
    """
    tokens, k = ids.shape
    each = max(len(held) // group_size, 1)
    valid = (ids >= held.start) & (ids < held.stop)
    member = torch.where(valid, (ids.long() - held.start) // each, group_size).clamp_max(group_size)
    member = member.sort(1).values
    repeated = torch.zeros_like(member, dtype=torch.bool)
    repeated[:, 1:] = member[:, 1:] == member[:, :-1]
    member = member.masked_fill(repeated, group_size).sort(1).values[:, : min(k, group_size)]
    hit = torch.zeros(tokens, group_size + 1, dtype=torch.bool, device=ids.device).scatter_(1, member, True)
    hit = hit[:, :group_size].t()  # [G, T]
    if room is None:
        position = hit.flatten().cumsum(0).view(group_size, tokens) - 1
    else:
        position = hit.cumsum(1) - 1 + torch.arange(group_size, device=ids.device)[:, None] * room
    token = torch.arange(tokens, device=ids.device)[:, None]
    place = torch.where(member < group_size, position[member.clamp_max(group_size - 1), token], -1)
    return hit.sum(1), place


def tokens_of_places(place: Tensor, rows: int, nobody: int = 0) -> Tensor:
    """The token at each of the `rows` places, `nobody` where there is none: int64 [rows]."""
    tokens = torch.arange(place.shape[0], device=place.device)[:, None].expand_as(place)
    where = torch.where(place >= 0, place, rows)
    return place.new_full((rows + 1,), nobody).scatter_(0, where.flatten(), tokens.flatten())[:rows]


def sum_at_places(rows: Tensor, place: Tensor, dtype: torch.dtype) -> Tensor:
    """For each token the sum of the rows at its places, ranks rising: no atomics, the same bits on every run."""
    total = rows.new_zeros(place.shape[0], rows.shape[1], dtype=sum_dtype(dtype))
    if rows.shape[0]:
        for at in place.unbind(1):
            total += torch.where(at[:, None] >= 0, rows.index_select(0, at.clamp_min(0)), 0)
    return total.to(dtype)


def exchange(
    agreement: Agreement, header: list[int], ids: Tensor, held: range, complaint: Complaint
) -> tuple[Exchange | None, Complaint]:
    """The route of a token's copies to the members of a group that share the experts `held`; None on a complaint."""
    counts, place = destinations(ids, held, agreement.size)
    sent, received, complaint = agreement.exchange(header, counts, complaint)
    if complaint[0]:
        return None, complaint
    return Exchange(tokens_of_places(place, sum(sent)), place, sent, received, agreement.group), complaint


@dataclass(frozen=True)
class Ticket:
    """What combine needs of a dispatch: the routes, outermost first, the tokens of this rank, what came and left."""

    routes: tuple[Exchange, ...]
    tokens: int
    shape: torch.Size
    dtype: torch.dtype


def checked(who: str, rows: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The rows for combine in the dtype that came: a wrong number of them must not reach the collective."""
    if rows.shape != shape:
        rule = f"rows must be [R, D] as this dispatch gave them, {tuple(shape)}"
        raise ValueError(f"{who}: {rule}, got {tuple(rows.shape)}")
    return rows.to(dtype)


def padded_exchange(agreement: Agreement, ids: Tensor, experts: int, room: int) -> Exchange:
    """The route of as many rows, `room`, to and from every member, whoever chose what: the shapes are known beforehand.

    The last row of `ids` [T + 1, K] chooses no expert and fills the places that nobody needs.
    """
    _, place = destinations(ids, range(experts), agreement.size, room)
    token = tokens_of_places(place, agreement.size * room, nobody=ids.shape[0] - 1)
    return Exchange(token, place, [room] * agreement.size, [room] * agreement.size, agreement.group)


class AllToAll:
    """Experts E/G to a rank, in rank order; a row travels at most once to each rank, and one reduced row back.

    `group`: the ranks that share the experts; None: all. `wire` and `backward_wire`: formats of rows on the way
    ("exact", "bf16", "fp8", "int8", see dispatch/wire.py), or a pair of them for dispatch and combine; router weights
    always travel exact, sums are taken in fp32 (fp64 for fp64 rows). `name` is part of what ranks agree on: with one
    for each layer, an order of layers that differs between ranks is an error.

    A dispatch is two collectives: an all-to-all of the row counts and the agreement (one wait for the device), and one
    message per row with its ids and weights. Combine, and the backward pass of each, are one more. With a token's
    experts spread evenly each token makes d = G (1 - C(E - E/G, K) / C(E, K)) copies, of which d (G - 1) / G leave the
    rank (placement/cluster/volume.py); a message has D * b + K * (4 + w) bytes, with b and w the sizes of a row's and
    of a weight's number, a returning row D * b.

    Where the routing is limited to C pairs an expert (`Capacity(pad=True)`), each rank sends every rank n = min(T, C *
    E/G) rows, filled up with rows of zeros that choose no expert: shapes depend on T and C alone, R = G * n. With
    `check` "first" the ranks then compare notes in the first such call only, so that later ones have one collective
    less and wait for nothing; T and C must then stay the same on every rank, or change on all of them together.

    Every rank of the group must take part in every call and in its backward pass, with no tokens too. It does not
    trace: torch.compile breaks the graph around it.

    Raises ValueError, on every rank and before rows move, where the ranks disagree: the error names rank and field.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        wire: str | tuple[str, str] = "exact",
        backward_wire: str | tuple[str, str] = "exact",
        check: str = "always",
        name: str = "",
    ) -> None:
        if check not in ("always", "first"):
            raise ValueError(f"AllToAll: check must be 'always' or 'first', got {check!r}")
        self.wires, self.check, self._checked = Wires.of("AllToAll", wire, backward_wire), check, False
        self.agreement = Agreement("AllToAll", group, name, self.wires)

    def local_experts(self, num_experts: int) -> range:
        return held_experts("AllToAll", num_experts, self.agreement.rank, self.agreement.size)

    @uncompiled
    def dispatch(self, x: Tensor, routing: Routing) -> tuple[Tensor, Routing, Ticket]:
        if routing.capacity is not None:
            return self._dispatch_padded(x, routing, routing.capacity)
        header = self.agreement.header(x, routing)
        everything = range(routing.num_experts)
        route, complaint = exchange(self.agreement, header, routing.expert_ids, everything, (0, 0, 0, 0, 0))
        self.agreement.enforce(complaint)
        assert route is not None
        return self._send(x, routing.expert_ids, routing.weights, routing.num_experts, route, x.shape[0])

    def _dispatch_padded(self, x: Tensor, routing: Routing, capacity: int) -> tuple[Tensor, Routing, Ticket]:
        held = self.local_experts(routing.num_experts)
        room = min(x.shape[0], capacity * len(held))
        header = self.agreement.header(x, routing, tokens=x.shape[0], capacity=capacity)
        if self.check == "always" or not self._checked:
            self.agreement.enforce(self.agreement.gather(header, x.shape[0], x.device)[1])
            self._checked = True
        x, weights = (F.pad(t, (0, 0, 0, 1)) for t in (x, routing.weights))
        ids = F.pad(routing.expert_ids, (0, 0, 0, 1), value=-1)
        route = padded_exchange(self.agreement, ids, routing.num_experts, room)
        return self._send(x, ids, weights, routing.num_experts, route, len(routing.expert_ids))

    def _send(self, x: Tensor, ids: Tensor, weights: Tensor, experts: int, route: Exchange, tokens: int):
        held = self.local_experts(experts)
        rows, ids, weights = send(x, ids, weights, route, (self.wires.dispatch, self.wires.dispatch_backward))
        ticket = Ticket((route,), tokens, rows.shape, x.dtype)
        return rows, Routing(localised(ids, held), weights, len(held)), ticket

    @uncompiled
    def combine(self, rows: Tensor, ticket: Ticket) -> Tensor:
        rows = checked("AllToAll", rows, ticket.shape, ticket.dtype)
        y = back(rows, ticket.routes[0], (self.wires.combine, self.wires.combine_backward))
        return y[: ticket.tokens]

    def __repr__(self) -> str:
        return f"AllToAll({self.agreement})"
