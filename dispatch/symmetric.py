"""All-to-all by one-sided copies: each rank lays its rows out in memory that the others read, and fetches its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.routing import Routing
from ..kernels.uncompiled import uncompiled
from .agreement import Agreement, held_experts, localised
from .all_to_all import Exchange, Ticket, checked, destinations, tokens_of_places
from .linear import back, send
from .window import Window, open_window
from .wire import Wires

Counts = list[list[int]]  # [i][j]: rows from rank i to rank j


def fetches(counts: Counts, rank: int) -> Iterator[tuple[int, int, int, int]]:
    """What `rank` copies: (peer, first row there, first row here, rows), from itself first, then from the ranks after.

    Each rank lays its rows out in the order of their receivers and takes in rows in the order of their senders. Every
    rank begins with another peer, so that no two read from one at once while all keep pace.
    """
    for step in range(len(counts)):
        peer = (rank + step) % len(counts)
        if counts[peer][rank]:
            here = sum(row[rank] for row in counts[:peer])
            yield peer, sum(counts[peer][:rank]), here, counts[peer][rank]


class Shelf:
    """The window of a group, opened at the first rows and anew for larger ones, in step on every rank."""

    def __init__(self, who: str, group: dist.ProcessGroup) -> None:
        self.who, self.group, self.rank = who, group, dist.get_rank(group)
        self.window: Window | None = None

    def __deepcopy__(self, memo: object) -> Shelf:
        return Shelf(self.who, self.group)

    def exchange(self, x: Tensor, counts: Counts) -> Tensor:
        """x uint8 [rows to all ranks, B] in rank order -> [rows from all ranks, B] in rank order."""
        width = x.shape[1]
        out = x.new_empty(sum(row[self.rank] for row in counts), width)
        most = width * max(map(sum, counts))
        if not most:
            return out
        window = self.opened(most, x.device)
        window.parts[self.rank][: x.numel()].copy_(x.flatten())
        window.barrier()
        for peer, there, here, rows in fetches(counts, self.rank):
            part = window.parts[peer][there * width : (there + rows) * width]
            out[here : here + rows].copy_(part.view(rows, width))
        window.barrier()  # nobody writes before all have read
        return out

    def opened(self, nbytes: int, device: torch.device) -> Window:
        """The window, with room for `nbytes`, which all ranks ask for alike."""
        if self.window is None or self.window.device != device:
            self.window = self._open(nbytes, device)
        elif self.window.nbytes < nbytes:
            self.window = self._open(max(nbytes, 2 * self.window.nbytes), device)
        return self.window

    def _open(self, nbytes: int, device: torch.device) -> Window:
        self.window = None  # two at once would be more memory than either
        try:
            return open_window(self.group, nbytes, device)
        except ValueError as error:
            raise ValueError(f"{self.who}: {error}") from error


@dataclass(frozen=True)
class Fetch(Exchange):
    """An Exchange whose rows are fetched from the shelves of their senders. `counts`: the whole group's."""

    counts: Counts = field(repr=False)
    shelf: Shelf = field(repr=False)

    def move(self, x: Tensor, home: bool) -> Tensor:
        return self.shelf.exchange(x, [list(row) for row in zip(*self.counts, strict=True)] if home else self.counts)


class Symmetric:
    """What AllToAll does, on ranks that read each other's memory: GPUs of one NVLink domain, or CPUs of one machine.

    Arguments as for AllToAll. The memory is chosen by x's device: torch's symmetric memory for CUDA tensors, files in
    /dev/shm for CPU tensors. It is a window of the largest message so far on every rank, so let one Symmetric serve all
    layers; its calls must follow one another on one stream.

    A dispatch is one all-gather of all ranks' row counts and the agreement (one wait for the device), a copy of this
    rank's rows into its window, a barrier, one copy from the window of each rank that has rows for this one, and a
    barrier. Combine, and the backward pass of each, are the same without the all-gather. The volumes are AllToAll's and
    so are the results, to the bit.

    The CPU's form runs in the test suite, on processes. The GPU's differs in three calls (dispatch/window.py): to
    allocate, to see a peer's buffer, and the barrier. It has not run on a GPU yet; tests/dispatch/test_gpu.py would.

    Raises ValueError, on every rank and before rows move, where the ranks disagree or do not reach each other's memory.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        wire: str | tuple[str, str] = "exact",
        backward_wire: str | tuple[str, str] = "exact",
        name: str = "",
    ) -> None:
        self.wires = Wires.of("Symmetric", wire, backward_wire)
        self.agreement = Agreement("Symmetric", group, name, self.wires)
        self.shelf = Shelf("Symmetric", self.agreement.group)

    def local_experts(self, num_experts: int) -> range:
        return held_experts("Symmetric", num_experts, self.agreement.rank, self.agreement.size)

    @uncompiled
    def dispatch(self, x: Tensor, routing: Routing) -> tuple[Tensor, Routing, Ticket]:
        header = self.agreement.header(x, routing)
        rank, size = self.agreement.rank, self.agreement.size
        to_each, place = destinations(routing.expert_ids, range(routing.num_experts), size)
        counts, complaint = self.agreement.table(header, to_each)
        self.agreement.enforce(complaint)
        held = self.local_experts(routing.num_experts)
        sent, received = counts[rank], [row[rank] for row in counts]
        token_of_row = tokens_of_places(place, sum(sent))
        route = Fetch(token_of_row, place, sent, received, self.agreement.group, counts, self.shelf)
        wires = (self.wires.dispatch, self.wires.dispatch_backward)
        rows, ids, weights = send(x, routing.expert_ids, routing.weights, route, wires)
        ticket = Ticket((route,), x.shape[0], rows.shape, x.dtype)
        return rows, Routing(localised(ids, held), weights, len(held)), ticket

    @uncompiled
    def combine(self, rows: Tensor, ticket: Ticket) -> Tensor:
        rows = checked("Symmetric", rows, ticket.shape, ticket.dtype)
        return back(rows, ticket.routes[0], (self.wires.combine, self.wires.combine_backward))

    def __repr__(self) -> str:
        return f"Symmetric({self.agreement})"
