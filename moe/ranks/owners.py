"""Which ranks hold a parameter of a parallelized module, and what becomes of its gradient; those that come later."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from ...dispatch import Fold, collectives
from ..adapters import Factor, Own, factors_of, wrappers_in
from ..lora.tuned import tuned_of
from ..shards import shards_of
from .sync import GradientSync, Share


@dataclass(eq=False)
class Parallel:
    """What a parallelized module remembers: its fold, its experts by name, and how gradients are made right."""

    fold: Fold
    experts: dict[str, nn.Module]
    sync: GradientSync = field(repr=False)
    shared: dict[str, nn.Module] = field(default_factory=dict)  # shared experts that are cut over tp
    replicated: bool = False
    fsdp: bool = False
    sharded: set[tuple[nn.Module, str]] = field(default_factory=set, repr=False)  # whose parameters FSDP2 exchanges
    seen: set[nn.Parameter] = field(default_factory=set, repr=False)  # those whose gradients are made right

    def cut(self) -> Iterator[tuple[nn.Module, Fold]]:
        """The modules that are cut, and over which fold each: not that of rows, whose groups may be a schedule's."""
        yield from ((module, self.fold) for module in self.experts.values())
        for module in self.shared.values():
            shards = shards_of(module)
            assert shards is not None
            yield module, shards.fold

    def cut_parameters(self) -> dict[nn.Parameter, Fold]:
        return {p: fold for module, fold in self.cut() for p in module.parameters(recurse=False)}

    def factors(self, module: nn.Module) -> dict[nn.Parameter, tuple[Factor, Fold]]:
        """The parameters of LoRA adapters on what is cut."""
        folds, found = {id(part): fold for part, fold in self.cut()}, dict[nn.Parameter, tuple[Factor, Fold]]()
        for _, wrapper, inside in wrappers_in(module):
            if id(inside) in folds:
                shards: Any = shards_of(inside)
                found |= {f.parameter: (f, folds[id(inside)]) for f in factors_of(wrapper, shards.cuts)}
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
    f, cut, factors = parallel.fold, parallel.cut_parameters(), parallel.factors(module)
    average, stage = f.size("dp", "cp"), f.group("dp", "cp", "tp")

    def of(parameter: nn.Parameter) -> Owner:
        if parameter in factors or parameter in cut:
            factor, over = factors.get(parameter) or (None, cut[parameter])
            names = ("edp", "etp") if factor is not None and factor.cut.everywhere else ("edp",)
            return Owner(Share(over.group(*names), over.size(*names) / average), over.group(*names))
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
    average, factors = f.size("dp", "cp"), parallel.factors(module)
    for experts, over in parallel.cut():
        if over.size("edp") > 1:
            _divide(fully_shard(experts, mesh=over.experts["edp"]), average)
        else:
            for parameter in experts.parameters(recurse=False):
                parallel.sync.add(parameter, of[parameter].share)
    for parameter in factors:
        parallel.sync.add(parameter, of[parameter].share)
    cut = parallel.cut_parameters().keys() | factors.keys()
    if set(module.parameters()) - cut:
        mesh = f.flat(*(("dp", "cp") if parallel.replicated else ("dp", "cp", "tp")))
        _divide(fully_shard(module, mesh=mesh, ignored_params=cut), average)
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
    for parameter, (_, over) in parallel.factors(module).items() if parallel.fsdp else ():
        if parameter in new and over.size("edp") > 1:
            raise ValueError(_sharded_experts(new[parameter]))
    of = owners(module, parallel)
    _same_values([(parameter, of[parameter].ranks) for parameter in new])
    for parameter in new:
        parallel.sync.add(parameter, of[parameter].share)
    parallel.seen |= new.keys()


def check_adapters(module: nn.Module, found: Mapping[str, nn.Module], sharded: bool) -> None:
    """Raises ValueError for LoRA on experts `found` that cannot be cut, or where FSDP2 has `sharded` the experts."""
    experts = {id(each): name for name, each in found.items()}
    for name, each in found.items():
        if tuned_of(each) is not None:
            raise ValueError(
                f"parallelize: experts must not learn apart (tune_only), got some of {name}: finish() first"
            )
    for name, wrapper, inside in wrappers_in(module):
        if id(inside) not in experts:
            continue
        if sharded:
            raise ValueError(_sharded_experts(name))
        weight = getattr(inside, wrapper.parameter_name)
        if isinstance(wrapper, Own) and wrapper.lora.chosen is not None:
            raise ValueError(
                f"parallelize: LoRA on experts must be on all of a layer, got {len(wrapper.lora.chosen)} of "
                f"{experts[id(inside)]}"
            )
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
