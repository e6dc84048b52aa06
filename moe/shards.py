"""Experts cut over ranks: which part of each weight a rank holds, and what a step computes with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..dispatch import Auto, Compose, Dispatcher, Fold, Local, Overlap, collectives
from ..dispatch.all_to_all import destinations
from ..dispatch.pending import Pending
from ..dispatch.replicas import Chooser, Placed, Replicas
from ..kernels.routing import Routing
from ..kernels.transforms import refuse_transforms
from ..placement.placement import Placement

_SHARDS = "_headgate_shards"
Make = Callable[[dist.ProcessGroup], Dispatcher]


@dataclass(frozen=True)
class Cut:
    """How a parameter of E experts is cut: dimension 0 over ep, dimension `ffn` over etp.

    `blocks`: how many parts of that dimension, one after the other, are each cut for itself (2 for gate and up rows).
    `whole`: a bias of the experts' outputs, cut over D, that each rank of etp adds in its own columns.
    `everywhere`: each rank of etp has all of it.
    """

    ffn: int
    blocks: int = 1
    whole: bool = False
    everywhere: bool = False

    def of(self, full: Tensor, held: Sequence[int], etp: int, rank: int) -> Tensor:
        """The part [len(held), ...] of `full` [E, ...] that is this rank's, as a new contiguous tensor."""
        experts = full[held.start : held.stop] if isinstance(held, range) else full[list(held)]
        if self.everywhere:
            return experts.clone(memory_format=torch.contiguous_format)
        part = experts.unflatten(self.ffn, (self.blocks, etp, -1))
        return (
            part.select(self.ffn + 1, rank).flatten(self.ffn, self.ffn + 1).clone(memory_format=torch.contiguous_format)
        )


class _Gather(torch.autograd.Function):
    """[.., blocks * f, ..] -> [.., blocks * G * f, ..] along `dim`, the parts of each block in rank order.

    Backward: the sum over ranks of the gradient's part for this one, taken in fp32 or better.
    """

    @staticmethod
    def forward(ctx, w: Tensor, dim: int, blocks: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.blocks, ctx.group = dim, blocks, group
        ctx.save_for_backward(w)  # for nothing but autograd's eye on it: a weight that has moved since is an error
        parts = collectives.all_gather(w.unflatten(dim, (blocks, -1))[None], group)
        return parts.movedim(0, dim + 1).flatten(dim, dim + 2)

    @staticmethod
    def backward(ctx, grad: Tensor):
        _ = ctx.saved_tensors
        dim, size = ctx.dim, ctx.group.size()
        parts = grad.unflatten(dim, (ctx.blocks, size, -1)).movedim(dim + 1, 0)
        wide = parts if grad.dtype == torch.float64 else parts.float()
        mine = collectives.reduce_scatter(wide, ctx.group)[0]
        return mine.flatten(dim, dim + 1).to(grad.dtype), None, None, None


class Shards:
    """The dispatcher of experts that are cut over a fold: it knows the cuts, and the degree r.

    One layout serves several ways of computing (Hwang et al., Tutel, 2023): each rank keeps E/ep experts and F/etp of
    each, and `degree` says what travels,

        r = etp     rows: they are gathered over etp, and each rank computes its slice of F for all of them
        r = 1       weights: they are gathered over etp, and rows stay with their rank
        1 < r < etp rows inside neighbouring r ranks, weights among the etp / r ranks with the same place in those
        r = 0       weights over etp and ep: no row travels at all

    A change of degree moves no weight and changes no gradient: the parts are the same. `outer` makes the dispatcher of
    an ep group, `inner` that of ranks with slices of the same experts; with `replicated` rows only r = etp makes sense.
    With `every` > 0 the degree that moves fewest bytes for the rows of the moment is taken anew every so many calls, by
    an all-reduce of one number; `why()` says by which figures. `shared`: a shared expert, which every token goes to.
    `overlap`: the schedule of rows that travel; the fold's groups are then for these alone.

    `held`: the experts of this rank, those of `slots`, its slots out of S. By `place` they are what a placement says;
    before they are E/ep in a row, and a slot is an expert.
    """

    def __init__(
        self,
        fold: Fold,
        num_experts: int,
        cuts: Mapping[str, Cut],
        outer: Make,
        inner: Make,
        *,
        replicated: bool = False,
        every: int = 0,
        shared: bool = False,
        overlap: Overlap | None = None,
    ) -> None:
        self.etp, self.overlap = fold.size("etp"), overlap
        self.fold, self.num_experts, self.cuts, self.shared = fold, num_experts, dict(cuts), shared
        self._outer, self._inner, self.replicated, self._every = outer, inner, replicated, every
        self.weight_bytes, self._calls, self._bytes = 0, 0, dict[int, float]()
        self._due, self._pending = False, Pending()
        self.place(None)
        self._dispatchers: dict[int, Dispatcher] = {}
        self.set_degree(self.etp)

    def place(self, placement: Placement | None, replica: str = "home") -> None:
        """Rows go where the one layer of `placement` says, or E/ep experts in a row are each rank's; no weight moves.

        Every rank must come by. The placement has ep GPUs, alike in slots. `replica`: see `place_experts`.
        """
        self.placement, self.replica = placement, replica
        gpu, ep = self.fold.rank("ep"), self.fold.size("ep")
        self.num_slots = self.num_experts if placement is None else placement.expert_of_slot.shape[1]
        each = self.num_slots // ep
        self.slots = range(gpu * each, (gpu + 1) * each)
        self.held: Sequence[int] = self.slots
        self.replicas: Chooser | None = None
        if placement is None:
            return
        self.held = placement.expert_of_slot[0, self.slots.start : self.slots.stop].tolist()
        if replica == "balanced":
            from ..dispatch.balanced import Balanced  # numba, for those who ask for it

            self.replicas = Balanced.of(placement, 0, self.fold.group("ep"))
        else:
            self.replicas = Replicas.of(placement, 0, gpu, self.fold.device_type)

    def set_degree(self, degree: int) -> None:
        """Every rank must come by, in the same order of layers. Raises ValueError where r does not divide etp."""
        if degree != 0 and (degree < 0 or self.etp % degree):
            raise ValueError(f"set_degree: degree must be 0 or divide etp = {self.etp}, got {degree}")
        if self.replicated and degree != self.etp:
            raise ValueError(f"set_degree: degree must be etp = {self.etp} for replicated activations, got {degree}")
        self.degree = degree
        if degree not in self._dispatchers:
            self._dispatchers[degree] = self._dispatcher_of(degree)
        self._weights = self.fold.strided("etp", max(degree, 1)) if degree < self.etp > 1 else None

    @property
    def dispatcher(self) -> Dispatcher:
        inner = self._dispatchers[self.degree]
        return inner if self.replicas is None else Placed(self.replicas, inner)

    def local_experts(self, num_experts: int) -> range:
        return self.slots

    def dispatch(self, x: Tensor, routing: Routing) -> tuple[Tensor, Routing, Any]:
        if self._every and not self.replicated:
            self._due = self._due or self._calls % self._every == 0
            self._calls += 1
            if self._due:
                self._adapt(x, routing)
        rows, local, ticket = self.dispatcher.dispatch(x, routing)
        if self._every:
            self._pending.note(rows if rows is not x else local.weights)
        return rows, local, (self.dispatcher, ticket)

    def combine(self, rows: Tensor, ticket: Any) -> Tensor:
        dispatcher, ticket = ticket
        return dispatcher.combine(rows, ticket)

    def _dispatcher_of(self, degree: int) -> Dispatcher:
        if degree == 0:
            return Local()
        outer = self._outer(self.fold.group("ep")) if self.fold.size("ep") > 1 else None
        inner = self._inner(self.fold.blocks("etp", degree)) if degree > 1 else None
        for made in (outer, inner):
            if made is not None and not isinstance(made, Dispatcher):
                raise TypeError(f"parallelize: dispatcher must make a dispatcher such as AllToAll(group), got {made!r}")
        return Compose(outer, inner) if outer and inner else outer or inner or Local()

    def _adapt(self, x: Tensor, routing: Routing) -> None:
        """Takes the degree with the fewest bytes for these rows: the same on all ranks, which make groups together."""
        ep = self.fold.size("ep")
        ids = routing.expert_ids if self.replicas is None else self.replicas.slots(routing.expert_ids)
        copies, _ = destinations(ids, range(self.num_slots), ep)
        mine = torch.stack([copies.sum(), copies.new_tensor(bool(self._pending))])
        total, pending = collectives.all_reduce(mine, self.fold.group("dp", "cp", "tp")).tolist()
        self._due = bool(pending)
        if pending:  # a backward pass that may call forward again must find what it found
            return
        rows = total / self.fold.sizes.stage
        passes = 2 if torch.is_grad_enabled() else 1
        self._bytes = degree_bytes(rows * x.shape[1] * x.element_size(), self.weight_bytes, ep, self.etp, passes)
        self.set_degree(min(self._bytes, key=lambda r: (self._bytes[r], -r)))

    def why(self) -> str:
        """What each degree would move, which was taken, and what its dispatcher says of itself."""
        lines = [f"r = {r}: {b / 1e6:.3f} MB a rank" for r, b in self._bytes.items()]
        lines.append(f"taken: r = {self.degree}, by {self.dispatcher}")
        inner = self._dispatchers[self.degree]
        outer = getattr(inner, "outer", inner)
        return "\n".join([*lines, outer.why()] if isinstance(outer, Auto) else lines)

    def gathered(self, name: str, w: Tensor) -> Tensor:
        """The parameter `name`, of which w is this rank's part, as this degree computes with it; differentiable."""
        refuse_transforms("parallelize", "weights move between ranks: take them on one rank", w)
        return self.gathered_as(self.cuts[name], w)

    def gathered_as(self, cut: Cut, w: Tensor) -> Tensor:
        """The same of anything that is cut so."""
        if cut.whole:
            return self._padded(w)
        if self._weights is not None and not cut.everywhere:
            w = _Gather.apply(w, cut.ffn, cut.blocks, self._weights)
        return self._all_experts(w)

    def _all_experts(self, w: Tensor) -> Tensor:
        return _Gather.apply(w, 0, 1, self.fold.group("ep")) if self.degree == 0 and self.fold.size("ep") > 1 else w

    def _padded(self, bias: Tensor) -> Tensor:
        """[E, D / etp] -> [E, D]: this rank's columns, and zeros where another rank of its rows adds its own."""
        r, rank = max(self.degree, 1), self.fold.rank("etp")
        if self._weights is not None:
            bias = _Gather.apply(bias, 1, 1, self._weights)
        spread = bias.unflatten(1, (self.etp // r, 1, -1))
        zeros = nn.functional.pad(spread, (0, 0, rank % r, r - 1 - rank % r))
        return self._all_experts(zeros.flatten(1))

    def __repr__(self) -> str:
        return f"Shards(1/{self.etp} of F, degree={self.degree}, {self.dispatcher})"


def degree_bytes(row_bytes: float, weight_bytes: float, ep: int, etp: int, passes: int) -> dict[int, float]:
    """Bytes that leave a rank in a step for each degree r: rows there and back, weights there and gradients back.

    `row_bytes` of the rows that a rank gets from its ep group, `weight_bytes` of the parameters that it keeps, `passes`
    1 forward, 2 forward and backward. Hwang et al., Tutel (2023), section 3.2.1, with r = 0 their data parallelism.

    >>> degree_bytes(row_bytes=1.0, weight_bytes=10.0, ep=1, etp=2, passes=2)  # few rows: let them travel
    {0: 20.0, 1: 20.0, 2: 4.0}
    """
    found = {0: passes * (ep * etp - 1) * weight_bytes}
    for r in (r for r in range(1, etp + 1) if etp % r == 0):
        rows = 2 * passes * row_bytes * ((ep - 1) / ep + r - 1)
        found[r] = rows + passes * (etp // r - 1) * weight_bytes
    return found


def shards_of(module: nn.Module) -> Shards | None:
    """The Shards of an experts module, or None where it is whole."""
    return vars(module).get(_SHARDS)


def weight_of(module: nn.Module, name: str) -> Tensor | None:
    """A parameter of an experts module as its next product takes it; None where the module has none of that name."""
    w, shards = getattr(module, name), shards_of(module)
    return w if w is None or shards is None else shards.gathered(name, w)


def cut_experts(module: nn.Module, shards: Shards) -> None:
    """Leaves the module its own part of each weight; the parameters are new ones."""
    etp, rank = shards.etp, shards.fold.rank("etp")
    for name, cut in shards.cuts.items():
        full = getattr(module, name)
        part = cut.of(full.detach(), shards.held, etp, rank)
        setattr(module, name, nn.Parameter(part, requires_grad=full.requires_grad))
        shards.weight_bytes += part.numel() * part.element_size()
    vars(module)[_SHARDS] = shards
