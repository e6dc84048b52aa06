"""Gradients of experts that stand on several ranks: the same mean over the replicas, to the bit, on all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from ...dispatch import collectives
from ...dispatch.wire import sum_dtype
from ...placement.placement import Placement


@dataclass(frozen=True, eq=False)
class Copies:
    """Which of a rank's slots hold experts that stand on other ranks of `group` too, in one layer.

    number  how often the expert of each slot of this rank stands
    times   int64 [slots]: the same, on the device
    rows    int64 [n]: the slots of this rank, counted on it, with number > 1, experts rising
    shared  for each rank of the group the places in `rows` of experts that it holds as well, int64, experts rising
    """

    group: dist.ProcessGroup = field(repr=False)
    number: tuple[int, ...]
    times: Tensor = field(repr=False)
    rows: Tensor = field(repr=False)
    shared: tuple[Tensor, ...] = field(repr=False)

    @classmethod
    def of(cls, placement: Placement, group: dist.ProcessGroup, device: torch.device | str) -> Copies | None:
        """Of a placement of one layer, its GPUs being the ranks of `group`; None where no expert has a replica."""
        times = placement.replicas[0]
        if times.max() == 1:
            return None
        experts, gpus = placement.expert_of_slot[0], placement.gpu_of_slot
        held = [experts[gpus == gpu].tolist() for gpu in range(group.size())]
        mine = held[group.rank()]
        several = sorted(e for e in mine if times[e] > 1)
        shared = [[i for i, e in enumerate(several) if e in there] for there in map(set, held)]
        shared[group.rank()] = []

        def index(numbers: list[int]) -> Tensor:
            return torch.tensor(numbers, dtype=torch.int64, device=device)

        number = [int(times[e]) for e in mine]
        rows = index([mine.index(e) for e in several])
        return cls(group, tuple(number), index(number), rows, tuple(map(index, shared)))

    def times_number(self, grad: Tensor) -> Tensor:
        """A gradient [slots, ...] times the number of replicas, so that a mean over them is their sum."""
        return grad * self.times.to(grad.dtype).view(-1, *[1] * (grad.dim() - 1))

    def by_number(self, t: Tensor) -> Iterator[tuple[Tensor, int]]:
        """The rows of t [slots, ...] whose experts stand as often: (rows, how often)."""
        for number in sorted(set(self.number)):
            yield t[[i for i, n in enumerate(self.number) if n == number]], number


def average_copies(gradients: Sequence[tuple[Tensor, Copies]]) -> None:
    """Replaces the rows of replicated experts, in gradients [slots, ...], by the mean over their replicas, in place.

    One all-to-all for each group and dtype: a row goes to each rank with a replica, and all add up in the same order,
    GPUs rising, in fp32 or better. Every rank of the groups must come by, with the same parameters.
    """
    alike: dict[tuple[dist.ProcessGroup, torch.dtype], list[tuple[Tensor, Copies]]] = {}
    for grad, copies in gradients:
        alike.setdefault((copies.group, grad.dtype), []).append((grad, copies))
    for (group, dtype), entries in alike.items():
        ranks = range(group.size())
        own = [grad.index_select(0, copies.rows) for grad, copies in entries]
        parts = [[rows.index_select(0, copies.shared[r]) for rows, (_, copies) in zip(own, entries, strict=True)]
                 for r in ranks]  # fmt: skip
        sizes = [[part.numel() for part in to] for to in parts]
        splits = [sum(to) for to in sizes]
        arrived = collectives.all_to_all(torch.cat([p.flatten() for to in parts for p in to]), splits, splits, group)
        chunks = arrived.split([n for to in sizes for n in to])
        for i, (grad, copies) in enumerate(entries):
            total = torch.zeros_like(own[i], dtype=sum_dtype(dtype))
            for r in ranks:
                if r == group.rank():
                    total += own[i]
                else:
                    found = chunks[r * len(entries) + i].view(parts[r][i].shape)
                    total.index_add_(0, copies.shared[r], found.to(total.dtype))
            total /= copies.times[copies.rows].view(-1, *[1] * (grad.dim() - 1))
            grad.index_copy_(0, copies.rows, total.to(dtype))
