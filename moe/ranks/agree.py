"""Ranks that are about to cut one module between them compare it first."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ...dispatch import collectives


def same_on_every_rank(
    module: nn.Module, options: Mapping[str, object], group: dist.ProcessGroup, device: torch.device
) -> None:
    """Raises ValueError, on every rank of the group, where options, parameters or buffers differ: in name, shape,
    dtype or bits.

    One all-gather of a number, and of the names where that differs. Of what is on the meta device or a DTensor only
    shape and dtype are compared. `device`: what the group works on.
    """
    found: dict[str, object] = {name: repr(option) for name, option in options.items()}
    found |= {name: _digest(t) for name, t in (*module.named_parameters(), *module.named_buffers())}
    whole = int.from_bytes(hashlib.sha256(repr(found).encode()).digest()[:7], "big")
    mine = torch.tensor([whole], device=device)
    if len(set(collectives.all_gather(mine, group).tolist())) == 1:
        return
    tables = collectives.all_gather_objects(found, group)
    ranks = dist.get_process_group_ranks(group)
    first = tables[0]
    for rank, table in zip(ranks, tables, strict=True):
        for name in (*first, *table):
            here, there = first.get(name), table.get(name)
            if here != there:
                advice = "" if name in options else ": build the module from the same seed on every rank, or load it"
                raise ValueError(
                    f"parallelize: {name} must be the same on every rank, "
                    f"got {_shown(there)} on rank {rank} and {_shown(here)} on rank {ranks[0]}{advice}"
                )


def _digest(t: Tensor) -> tuple:
    said = (tuple(t.shape), str(t.dtype) + ("" if t.requires_grad else ", frozen"))
    if isinstance(t, DTensor) or t.device.type == "meta" or not t.numel():
        return said
    bits = t.detach().contiguous().flatten().view(torch.uint8 if t.element_size() == 1 else torch.int16)
    return (*said, checksum(bits))


def checksum(bits: Tensor) -> int:
    """A number of integers [n] and of their order, without a copy of them: weighted sums of rows and of columns."""
    width = min(bits.numel(), 1024)
    table = bits[: bits.numel() // width * width].view(-1, width)
    total = 0
    for sums in (table.sum(0, dtype=torch.int64), table.sum(1, dtype=torch.int64), bits[table.numel() :].long()):
        total = total * 31 + int((sums * torch.arange(1, len(sums) + 1, device=bits.device)).sum())
    return total


def _shown(digest: Any) -> str:
    if digest is None or isinstance(digest, str):
        return digest or "none"
    shape, dtype, *bits = digest
    return f"{shape} {dtype}" + (f" with checksum {bits[0] & 0xFFFFFFFF:x}" if bits else "")
