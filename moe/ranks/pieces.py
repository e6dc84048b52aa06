"""What a checkpoint keeps of a module: under which key, which part of a whole, whatever cut it in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from ..adapters import factors_of, wrappers_in
from ..experts import Experts
from ..hf.experts import cuts_of_experts, is_decorated
from ..hf.experts import refusal as refused
from ..shards import Cut, Shards, shards_of
from ..shared import SharedExpert
from .chunks import Chunks


def plain(name: str) -> str:
    """The name that a parameter has without torch.compile, which puts `_orig_mod` before what it has wrapped."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


@dataclass(frozen=True)
class Piece:
    """How a parameter with a dimension of experts is kept: `arrange` gives it, or a state of its shape, as [E, ...]."""

    cut: Cut
    shards: Shards | None
    arrange: Callable[[Tensor], Tensor] = lambda t: t


def cuts_in(module: nn.Module) -> Mapping[str, Piece]:
    """The parameters with a dimension of experts, by their full names: cut in this process or not."""
    shared = {id(part) for m in module.modules() if isinstance(m, SharedExpert) for part in m.modules()}
    found: dict[str, Piece] = {}
    of_module: dict[int, tuple[Mapping[str, Cut], Shards | None]] = {}
    for name, m in module.named_modules():
        shards = shards_of(m)
        if shards is not None:
            cuts = shards.cuts
        elif isinstance(m, Experts) and id(m) not in shared:
            if len(m.local_experts) != m.num_experts:
                raise ValueError(
                    f"checkpoint: {name or 'the module'} must be cut by parallelize where ranks share its experts, "
                    f"got {m.dispatcher} given to it by hand"
                )
            cuts = m.cuts()
        elif isinstance(m, Experts):  # a shared expert that is whole: its adapters alone are arranged, in one tensor
            of_module[id(m)] = {weight: replace(cut, blocks=1) for weight, cut in m.cuts().items()}, None
            continue
        elif is_decorated(m) and refused(m) is None:
            cuts = cuts_of_experts(name, m, 1)[1]
        else:
            continue
        whole, of_module[id(m)] = plain(name), (cuts, shards)
        here = {parameter: Piece(cut, shards) for parameter, cut in cuts.items()}
        found |= {f"{whole}.{parameter}" if whole else parameter: piece for parameter, piece in here.items()}
    names = {parameter: plain(name) for name, parameter in module.named_parameters()}
    for _, wrapper, inside in wrappers_in(module):
        of, shards = of_module.get(id(inside), ({}, None))
        for factor in factors_of(wrapper, of) if wrapper.parameter_name in of else ():
            found[names[factor.parameter]] = Piece(factor.cut, shards, factor.by_expert)
    return found


def pieces(name: str, t: Tensor, piece: Piece) -> Iterator[tuple[str, Tensor]]:
    """t, this rank's part of a parameter or of a state of its shape: (key, view of t with its place in the whole)."""
    cut, shards = piece.cut, piece.shards
    held = piece.arrange(t.to_local() if isinstance(t, DTensor) else t)
    if shards is not None and shards.shared:  # one tensor, as where nobody has cut it
        here = shards.held if len(held) else []  # FSDP2 leaves the one expert to one rank
        rank, etp = (0, 1) if cut.everywhere else (shards.fold.rank("etp"), shards.etp)
        yield name, Chunks(held, here, 1, cut.ffn, rank, etp, cut.blocks)
        return
    for block, view in enumerate(held.unflatten(cut.ffn, (cut.blocks, -1)).unbind(cut.ffn)):
        key = name if cut.blocks == 1 else f"{name}.{block}"
        if shards is None:
            yield key, view
            continue
        if view.device.type != shards.fold.device_type:  # a DTensor would be made of a copy
            raise ValueError(
                f"checkpoint: {name} must be on the fold's device, {shards.fold.device_type}, got {view.device.type}"
            )
        if shards.placement is not None:
            yield key, Chunks(view, shards.held, shards.num_experts, cut.ffn, shards.fold.rank("etp"), shards.etp)
            continue
        over_edp: Placement = Shard(0) if isinstance(t, DTensor) else Replicate()
        shape = list(view.shape)
        shape[0], shape[cut.ffn] = shards.num_experts, shape[cut.ffn] * (1 if cut.everywhere else shards.etp)
        whole = torch.empty(shape, device="meta")
        places = [Shard(0), over_edp, Replicate() if cut.everywhere else Shard(cut.ffn)]
        sizes: dict[str, Any] = {"shape": whole.shape, "stride": whole.stride()}
        yield key, DTensor.from_local(view, shards.fold.experts, places, run_check=False, **sizes)


def module_entries(module: nn.Module) -> Iterator[tuple[str, Any]]:
    cuts = cuts_in(module)
    for own, value in module.state_dict().items():
        name = plain(own)
        if name in cuts:
            yield from pieces(name, value.detach(), cuts[name])
        elif isinstance(value, Tensor):
            yield name, value
