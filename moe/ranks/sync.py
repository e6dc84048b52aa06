"""Gradients made right across ranks while the backward pass runs, and their norm."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.utils.hooks import RemovableHandle

from ...dispatch import collectives
from .copies import Copies, average_copies

SMALL = 1 << 18  # elements: gradients up to this size travel together at the end


@dataclass(frozen=True)
class Share:
    """What is to be done with a parameter's gradient: multiplied by `factor`, then averaged over `group`, then, where
    its experts have replicas, summed over these: multiplied by their number as well, then averaged over `copies`."""

    group: dist.ProcessGroup
    factor: float
    copies: Copies | None = None


class GradientSync:
    """Averages gradients over ranks as they are finished, so that after backward() they are right on every rank.

    Large gradients are reduced one by one while the backward pass goes on, small ones together at its end. With
    gradients that add up over several backward passes the result is the same whether each is synchronised or, inside
    `paused()`, only the last: what has been averaged already stays as it is.

    Every rank must use the same parameters in every backward pass, as under DistributedDataParallel.
    """

    def __init__(self) -> None:
        self.shares: dict[nn.Parameter, Share] = {}
        self.on = True
        self._hooks: dict[nn.Parameter, list[RemovableHandle]] = {}
        self._pending: list[tuple[dist.Work, dist.ProcessGroup, Tensor, Tensor]] = []
        self._small: list[nn.Parameter] = []
        self._copied: list[nn.Parameter] = []
        self._graph: int | None = None  # the backward pass that the two lists are of

    def add(self, parameter: nn.Parameter, share: Share) -> None:
        if not parameter.requires_grad:
            return
        self.shares[parameter] = share
        hooks = self._hooks[parameter] = []
        if isinstance(parameter, DTensor):
            # Norms under SequenceParallel leave a part of the sum on each rank; norms and clipping want it whole.
            hooks.append(parameter.register_hook(lambda grad: grad.redistribute(placements=parameter.placements)))
        # Before it is added to what stands in .grad: that has had its factor.
        if share.factor != 1:
            hooks.append(parameter.register_hook(lambda grad: grad * share.factor))
        if share.copies is not None:
            hooks.append(parameter.register_hook(share.copies.times_number))
        if share.group.size() > 1 or share.copies is not None:
            hooks.append(parameter.register_post_accumulate_grad_hook(self._finished))

    def drop(self, parameter: nn.Parameter) -> Share | None:
        """Forgets a parameter, and says what was done with its gradients; None where it had none."""
        for hook in self._hooks.pop(parameter, ()):
            hook.remove()
        return self.shares.pop(parameter, None)

    def pieces(self, parameter: nn.Parameter, grad: Tensor, ranks: int) -> list[tuple[Tensor, int]]:
        """The parts of a gradient that as many ranks hold: (part, how many of all ranks), where `ranks` hold each slot
        of it."""
        share = self.shares.get(parameter)
        if share is None or share.copies is None:
            return [(grad, copies_of(parameter, ranks))]
        return [(part, number * ranks) for part, number in share.copies.by_number(grad)]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No exchange inside: for all but the last of the backward passes whose gradients add up."""
        before, self.on = self.on, False
        try:
            yield
        finally:
            self.on = before

    def _finished(self, parameter: nn.Parameter) -> None:
        if not self.on:
            return
        graph = torch._C._current_graph_task_id()
        if graph != self._graph:  # the first of this backward pass; what one that failed has left is void
            self._graph, self._pending, self._small, self._copied = graph, [], [], []
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        share = self.shares[parameter]
        if share.copies is not None:
            self._copied.append(parameter)
        if share.group.size() == 1:
            return
        if parameter.numel() <= SMALL:
            self._small.append(parameter)
            return
        self._reduce(gradient_of(parameter), share.group)

    def _reduce(self, grad: Tensor, group: dist.ProcessGroup) -> None:
        dense = grad.contiguous()
        self._pending.append((collectives.start_average(dense, group), group, dense, grad))

    def _finish(self) -> None:
        try:
            buckets: dict[tuple[dist.ProcessGroup, torch.dtype], list[Tensor]] = {}
            for parameter in self._small:
                grad = gradient_of(parameter)
                buckets.setdefault((self.shares[parameter].group, grad.dtype), []).append(grad)
            flat = []
            for (group, _), grads in buckets.items():
                flat.append((torch.cat([g.reshape(-1) for g in grads]), grads))
                self._reduce(flat[-1][0], group)
            for work, group, dense, grad in self._pending:
                collectives.finish(work, group)
                if dense is not grad:
                    grad.copy_(dense)
            for whole, grads in flat:
                for grad, part in zip(grads, whole.split([g.numel() for g in grads]), strict=True):
                    grad.copy_(part.view_as(grad))
            average_copies([(gradient_of(p), self.shares[p].copies) for p in self._copied])  # type: ignore[misc]
        finally:
            self._graph, self._pending, self._small, self._copied = None, [], [], []


def local(t: Tensor) -> Tensor:
    """What this rank holds of t: its own part of a DTensor, or t."""
    return t.to_local() if isinstance(t, DTensor) else t


def gradient_of(parameter: Tensor) -> Tensor:
    """This rank's part of the gradient of a parameter that has one."""
    assert parameter.grad is not None
    return local(parameter.grad)


def copies_of(parameter: Tensor, ranks: int) -> int:
    """How many of `ranks` ranks hold the same piece of a parameter that all of them have, whole or as a DTensor."""
    if not isinstance(parameter, DTensor):
        return ranks
    mesh, placements = parameter.device_mesh, parameter.placements
    return ranks // prod(mesh.size(d) for d, p in enumerate(placements) if isinstance(p, Shard))


def norm_of(gradients: Iterable[tuple[Tensor, int]], device: torch.device) -> Tensor:
    """The 2-norm of all gradients of all ranks, each piece once: fp64 scalar, the same on every rank.

    gradients: (this rank's piece, how many ranks of the world hold the same). One all-reduce.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    for grad, copies in gradients:
        wide = grad if grad.dtype == torch.float64 else grad.float()
        total += wide.norm().double().square() / copies
    if dist.is_initialized():
        total = collectives.all_reduce(total, dist.group.WORLD)  # type: ignore[arg-type]
    return total.sqrt()
