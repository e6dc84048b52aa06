"""One step of a migration on a live layer: rows of weights and optimizer state travel, and the layer is whole again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ...dispatch import collectives
from ...dispatch.wire import pack, unpack
from ...placement.live.migrate import Move
from ...placement.placement import Placement
from ..experts import Experts
from ..shards import Shards, shards_of
from .copies import Copies
from .parallel import Parallel

Optimizer = torch.optim.Optimizer


@dataclass(frozen=True)
class Moved:
    """A step that was made: the layer's name, its moves, and the bytes that left this rank and that reached it."""

    layer: str
    moves: tuple[Move, ...]
    sent_bytes: int
    received_bytes: int


@torch.no_grad()
def make_step(
    parallel: Parallel,
    name: str,
    moves: tuple[Move, ...],
    goal: Placement | None,
    optimizer: Optimizer | None,
    replica: str | None,
) -> Moved:
    """The moves of one layer: afterwards its experts stand as `goal` says."""
    experts = parallel.experts[name]
    shards = shards_in(experts)
    before, held = shards.slots, {key: getattr(experts, key) for key in shards.cuts}
    states = {key: states_of(p, optimizer) for key, p in held.items()}
    tensors = [t for key, p in held.items() for t in (p.detach(), *states[key].values())]
    arrived, sent, received = _travel(tensors, moves, before, shards)
    shards.place(goal, replica or shards.replica)
    targets = [move.target_slot - shards.slots.start for move in _into(moves, shards)]
    if len(before) != len(shards.slots):
        tensors = [_resized(t, len(shards.slots), targets) for t in tensors]
    for t, rows in zip(tensors, arrived, strict=True):
        t.index_copy_(0, _index(targets, t), rows.view(-1, *t.shape[1:]))
    group, device = shards.fold.group("ep"), next(iter(held.values())).device
    copies = None if goal is None else Copies.of(goal, group, device)
    written = iter(tensors)
    for key, old in held.items():
        data, fields = next(written), {field: next(written) for field in states[key]}
        new = old if len(before) == len(shards.slots) else nn.Parameter(data, requires_grad=old.requires_grad)
        if new is not old:
            setattr(experts, key, new)
            torch.autograd.graph.increment_version(old)  # a backward pass to come would leave its gradient there
            _hand_over(parallel, optimizer, old, new, fields)
        share = parallel.sync.drop(old)
        if share is not None:
            parallel.sync.add(new, replace(share, copies=copies))
    shards.weight_bytes = sum(getattr(experts, key).nbytes for key in held)
    if isinstance(experts, Experts):
        experts.local_experts = shards.held
    return Moved(name, moves, sent, received)


def _into(moves: Sequence[Move], shards: Shards) -> list[Move]:
    """The moves that end on this rank: from other ranks, these rising, then from itself."""
    gpu = shards.fold.rank("ep")
    return sorted((m for m in moves if m.target_gpu == gpu), key=lambda m: (m.source_gpu == gpu, m.source_gpu))


def _travel(
    tensors: Sequence[Tensor], moves: Sequence[Move], slots: range, shards: Shards
) -> tuple[list[Tensor], int, int]:
    """(for each of the tensors [slots, ...] the rows [n, .] that this rank gets, in the order of `_into`; bytes sent;
    bytes received): all of an expert's rows in one message."""
    fold, gpu = shards.fold, shards.fold.rank("ep")
    into = _into(moves, shards)
    here = [move for move in into if move.source_gpu == gpu]
    out = sorted((m for m in moves if m.source_gpu == gpu != m.target_gpu), key=lambda m: m.target_gpu)

    def rows(chosen: Sequence[Move]) -> list[Tensor]:
        sources = [move.source_slot - slots.start for move in chosen]
        return [t.index_select(0, _index(sources, t)).flatten(1) for t in tensors]

    own = rows(here)
    if all(move.source_gpu == move.target_gpu for move in moves):
        return own, 0, 0
    outgoing = rows(out)
    message = pack(outgoing)
    ranks = range(fold.size("ep"))
    sent = [sum(move.target_gpu == rank for move in out) for rank in ranks]
    received = [sum(move.source_gpu == rank != gpu for move in into) for rank in ranks]
    arrived = unpack(collectives.all_to_all(message, received, sent, fold.group("ep")), outgoing)
    each = message.shape[1]
    return [torch.cat(both) for both in zip(arrived, own, strict=True)], sum(sent) * each, sum(received) * each


def _resized(t: Tensor, slots: int, targets: list[int]) -> Tensor:
    """t [slots before, ...] with another number of slots: what is no target stays where it is."""
    new = t.new_empty(slots, *t.shape[1:])
    stay = _index([i for i in range(slots) if i not in targets], t)
    return new.index_copy_(0, stay, t.index_select(0, stay))


def _hand_over(
    parallel: Parallel, optimizer: Optimizer | None, old: nn.Parameter, new: nn.Parameter, fields: dict[str, Tensor]
) -> None:
    """`new` instead of `old` to whoever knows parameters."""
    if old in parallel.seen:
        parallel.seen.discard(old)
        parallel.seen.add(new)
    if optimizer is None:
        return
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    if old in optimizer.state:
        optimizer.state[new] = {**optimizer.state.pop(old), **fields}


def shards_in(experts: nn.Module) -> Shards:
    shards = shards_of(experts)
    assert shards is not None
    return shards


def states_of(parameter: nn.Parameter, optimizer: Optimizer | None) -> dict[str, Tensor]:
    """What the optimizer keeps for each number of the parameter."""
    kept = {} if optimizer is None else optimizer.state.get(parameter, {})
    return {field: t for field, t in sorted(kept.items()) if isinstance(t, Tensor) and t.dim()}


def _index(numbers: list[int], like: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=like.device)
