"""Which ranks hold a parameter of a parallelized module, and what becomes of its gradient; those that come later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from ...dispatch import Fold, collectives
from ..adapters import Factor, factors_of, wrappers_in
from ..shards import shards_of
from .sync import GradientSync, Share


@dataclass(eq=False)
class Parallel:
    """What a parallelized module remembers: its fold, its experts by name, and how gradients are made right."""

    fold: Fold
    experts: dict[str, nn.Module]
    sync: GradientSync = field(repr=False)
    replicated: bool = False
    fsdp: bool = False
    sharded: set[tuple[nn.Module, str]] = field(default_factory=set, repr=False)  # whose parameters FSDP2 exchanges
    seen: set[nn.Parameter] = field(default_factory=set, repr=False)  # those whose gradients are made right

    def expert_parameters(self) -> set[nn.Parameter]:
        return {p for experts in self.experts.values() for p in experts.parameters(recurse=False)}

    def factors(self, module: nn.Module) -> dict[nn.Parameter, Factor]:
        """The parameters of LoRA adapters on experts."""
        mine, found = {id(experts) for experts in self.experts.values()}, dict[nn.Parameter, Factor]()
        for _, wrapper, inside in wrappers_in(module):
            if id(inside) in mine:
                shards: Any = shards_of(inside)
                found |= {factor.parameter: factor for factor in factors_of(wrapper, shards.cuts)}
        return found

    def __deepcopy__(self, memo: object) -> Parallel:
        raise TypeError("parallelize: a module must be copied before it is parallelized: its hooks stay behind")


@dataclass(frozen=True)
class Owner:
    """What is to be done with a parameter's gradient, and the ranks that hold the same of it."""

    share: Share
    ranks: dist.ProcessGroup


def owners(module: nn.Module, parallel: Parallel) -> dict[nn.Parameter, Owner]:
    """Experts are summed over edp, what an adapter has once for all slices of an expert over etp too, everything else
    over the ranks whose tokens it saw."""
    f, mine, factors = parallel.fold, parallel.expert_parameters(), parallel.factors(module)
    average, stage = f.size("dp", "cp"), f.group("dp", "cp", "tp")

    def of(parameter: nn.Parameter) -> Owner:
        factor = factors.get(parameter)
        if factor is not None or parameter in mine:
            names = ("edp", "etp") if factor is not None and factor.cut.everywhere else ("edp",)
            return Owner(Share(f.group(*names), f.size(*names) / average), f.group(*names))
        if parallel.replicated or isinstance(parameter, DTensor):
            return Owner(Share(f.group("dp", "cp"), 1.0), stage)
        return Owner(Share(stage, float(f.size("tp"))), stage)

    return {parameter: of(parameter) for parameter in module.parameters()}


def synchronise(module: nn.Module, parallel: Parallel) -> None:
    for parameter, owner in owners(module, parallel).items():
        parallel.sync.add(parameter, owner.share)


def shard_fully(module: nn.Module, parallel: Parallel) -> None:
    """FSDP2 over the ranks that hold the same, with the sums and averages of `synchronise`."""
    f, of = parallel.fold, owners(module, parallel)
    average, mine = f.size("dp", "cp"), parallel.expert_parameters() | parallel.factors(module).keys()
    if f.size("edp") > 1:
        for experts in parallel.experts.values():
            _divide(fully_shard(experts, mesh=f.experts["edp"]), average)
    else:
        for parameter in mine:
            parallel.sync.add(parameter, of[parameter].share)
    if set(module.parameters()) - mine:
        mesh = f.flat(*(("dp", "cp") if parallel.replicated else ("dp", "cp", "tp")))
        _divide(fully_shard(module, mesh=mesh, ignored_params=mine), average)
    parallel.sharded |= {
        (part, leaf)
        for part in module.modules()
        for leaf, p in part.named_parameters(recurse=False)
        if isinstance(p, DTensor)
    }


def _divide(module: FSDPModule, average: int) -> None:
    """Gradients become the sum over the mesh's ranks divided by `average`, not by how many they are."""
    module.set_force_sum_reduction_for_comms(True)  # or FSDP2 asks gloo for a sum that only NCCL has
    module.set_gradient_divide_factor(average)


def watch(module: nn.Module, parallel: Parallel) -> None:
    """Whatever forward pass begins with, it begins with a look for parameters that are new or unfrozen.

    PEFT's models call the forward method of what they wrap, not the module: so its children look too.
    """

    @torch.compiler.assume_constant_result  # looks while it is traced; with new parameters it is traced anew
    def look() -> None:
        if torch.is_grad_enabled():
            adopt(module, parallel)

    def before(_module: nn.Module, _args: tuple) -> None:
        look()

    for part in (module, *module.children()):
        part.register_forward_pre_hook(before)


def newcomers(module: nn.Module, parallel: Parallel) -> dict[nn.Parameter, str]:
    """The parameters, with their names, whose gradients nobody makes right."""
    return {
        parameter: f"{name}.{leaf}" if name else leaf
        for name, part in module.named_modules()
        for leaf, parameter in part.named_parameters(recurse=False)
        if parameter.requires_grad and parameter not in parallel.seen and (part, leaf) not in parallel.sharded
    }


def adopt(module: nn.Module, parallel: Parallel) -> None:
    """Parameters that parallelize did not see get the values that the first of their ranks has, as under DDP, and their
    gradients are made right from now on. Every rank must come by with the same ones."""
    new = newcomers(module, parallel)
    if not new:
        return
    if parallel.fsdp and parallel.fold.size("edp") > 1 and (factors := new.keys() & parallel.factors(module).keys()):
        raise ValueError(_sharded_experts(new[factors.pop()]))
    of = owners(module, parallel)
    _same_values([(parameter, of[parameter].ranks) for parameter in new])
    for parameter in new:
        parallel.sync.add(parameter, of[parameter].share)
    parallel.seen |= new.keys()


def check_adapters(module: nn.Module, found: Mapping[str, nn.Module], sharded: bool) -> None:
    """Raises ValueError for LoRA on experts `found` that cannot be cut, or where FSDP2 has `sharded` the experts."""
    experts = {id(each): name for name, each in found.items()}
    for name, wrapper, inside in wrappers_in(module):
        if id(inside) not in experts:
            continue
        if sharded:
            raise ValueError(_sharded_experts(name))
        weight = getattr(inside, wrapper.parameter_name)
        if weight.dim() != 3:
            raise ValueError(
                "parallelize: LoRA on experts must be on weights [E, ., .], got it on "
                f"{experts[id(inside)]}.{wrapper.parameter_name} {tuple(weight.shape)}"
            )


def _sharded_experts(name: str) -> str:
    return f"parallelize: fsdp must be False, or edp 1, where LoRA is on the experts, got True with {name}"


@torch.no_grad()
def _same_values(parameters: Sequence[tuple[nn.Parameter, dist.ProcessGroup]]) -> None:
    alike: dict[tuple[dist.ProcessGroup, torch.dtype], list[nn.Parameter]] = {}
    for parameter, ranks in parameters:
        if ranks.size() > 1 and not isinstance(parameter, DTensor):
            alike.setdefault((ranks, parameter.dtype), []).append(parameter)
    for (ranks, _), some in alike.items():
        flat = torch.cat([p.flatten() for p in some])
        collectives.broadcast(flat, ranks)
        for parameter, part in zip(some, flat.split([p.numel() for p in some]), strict=True):
            parameter.copy_(part.view_as(parameter))
