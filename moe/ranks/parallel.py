"""parallelize: a layer or a model over the ranks of a Fold, in place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ...dispatch import AllToAll, Fold, Local, Overlap
from ...dispatch.agreement import together
from ...dispatch.deep_ep import check_sizes
from ..adapters import cut_adapters, unwrapped
from ..experts import Experts
from ..hf.experts import cuts_of_experts, flags
from ..hf.swap import is_swapped, replace, restore, swapped_experts
from ..layer import MoE
from ..shards import Cut, Shards, cut_experts, shards_of
from ..shared import SharedExpert
from ..sized import SizedExperts
from .agree import same_on_every_rank
from .choice import ADAPT_EVERY, Choice, Make
from .owners import Parallel, adopt, check_adapters, newcomers, owners, shard_fully, synchronise, watch
from .sync import GradientSync, gradient_of, norm_of

_PARALLEL = "_headgate_parallel"


def parallelize(
    module: nn.Module,
    fold: Fold,
    *,
    dispatcher: str | Make | None = None,
    activations: str = "sharded",
    wire: str | tuple[str, str] = "exact",
    backward_wire: str | tuple[str, str] = "exact",
    ranks_per_node: int | None = None,
    max_tokens: int | None = None,
    fsdp: bool = False,
    cut_shared: bool = False,
    overlap: Overlap | int | None = None,
) -> nn.Module:
    """Spreads the experts of a layer or model over the ranks of `fold`, in place, and makes its gradients right.

    Every rank has built the same module from the same seed (compared here) and goes on to pass its own tokens; an
    optimizer is made afterwards, since expert parameters are new ones. Each rank keeps E/ep experts and F/etp of each.

    module       an MoE, Experts, any module with those inside, or a transformers model whose experts `headgate.replace`
                 takes (it is swapped where it is not yet). Its attention is the caller's: see parallelize_module
    dispatcher   a name in DISPATCHERS ("auto" measures and decides), "deep_ep" where DeepEP can run, a function from a
                 process group to a dispatcher, or None: AllToAll; Hierarchical where ep spans nodes; AllGather where
                 K > ep; SliceAllReduce for replicated activations
    activations  "sharded": every rank of the stage passes tokens of its own; with cp or tp > 1 its part of each
                 sequence. "replicated": the ranks of tp pass the same ones; needs ep * etp == tp
    wire, backward_wire  formats of rows on the way, see AllToAll
    ranks_per_node  for "hierarchical" and the default; None: torchrun's LOCAL_WORLD_SIZE, or one node
    max_tokens   for "deep_ep": the most tokens of a rank in one call. Layers of the same width share one buffer
    fsdp         shards parameters and their optimizer state over the ranks that hold the same: experts over edp, the
                 rest over the stage (FSDP2), instead of averaging their gradients; not beside attention cut over tp
    cut_shared   cuts the shared experts of MoE layers over tp, F / tp to a rank, where else every rank has them whole:
                 rows are gathered over tp and summed back, or with replicated activations only summed
    overlap      an Overlap or its degree: experts compute while rows of other tokens travel, over groups of their own;
                 None: they wait. Not with dispatcher="auto" or "deep_ep"

    After backward() gradients follow DDP's convention: the average over the dp * cp data-parallel ranks of the gradient
    of each rank's loss, where the tp ranks of one have one loss together. So expert gradients are summed over all ranks
    that sent rows and over edp, all others (router, shared expert) over the stage, and divided by dp * cp. Several
    backward passes to a step: see `no_sync`. The norm over all ranks: `clip_grad_norm_`. The losses and the capacity of
    MoE layers go by the whole batch of the stage. LoRA on experts is cut with them. Parameters that come later, on
    every rank alike, get the values of their first rank and are synchronised from the next forward pass on.

    Every rank must call it. Raises ValueError / TypeError, on every rank and before anything is changed: a module
    without experts or parallelized already; E not divisible by ep, or F (with biases D too) by etp, or by tp with
    `cut_shared`, by name; experts that share parameters; ranks whose options or parameters differ.

    >>> fold = headgate.Fold(attention=dict(dp=4), experts=dict(ep=4))
    >>> layer = headgate.parallelize(headgate.MoE(64, 32, num_experts=16, top_k=2), fold)
    """
    if not isinstance(fold, Fold):
        raise TypeError(f"parallelize: fold must be a headgate.Fold, got {type(fold).__name__}")
    overlap = Overlap(overlap) if isinstance(overlap, int) else overlap
    choose = Choice(fold, dispatcher, activations, wire, backward_wire, ranks_per_node, max_tokens, overlap)
    stage, foreign = fold.group("dp", "cp", "tp"), _is_foreign(module)
    try:
        found, plans = together(lambda: _survey(module, choose, fsdp), stage)
        shared = together(lambda: _survey_shared(module, fold, fsdp) if cut_shared else {}, stage)
        options = {**choose.options(), "fsdp": fsdp, "cut_shared": cut_shared}
        same_on_every_rank(module, options, stage, torch.device(fold.device_type))
    except (ValueError, TypeError):
        if foreign and is_swapped(module):
            restore(module)
        raise
    layers = _layers(module)
    links, carries = choose.links(), fold if overlap is None else fold.apart()
    for name, experts in found.items():
        around = layers.get(id(experts), [])
        num_experts, cuts = plans[name]
        make = choose.of(name, _hidden_size(experts), _top_k(module, around), links)
        how: dict[str, Any] = {"replicated": choose.replicated, "every": ADAPT_EVERY if dispatcher == "auto" else 0}
        shards = Shards(carries, num_experts, cuts, make, choose.inner(name), overlap=overlap, **how)
        experts.spread(shards) if isinstance(experts, Experts) else cut_experts(experts, shards)
        for layer in around:
            layer.token_ranks = choose.token_ranks()
    over_tp = fold.over_tp() if shared else fold
    for name, experts in shared.items():
        how = {"replicated": choose.replicated, "shared": True}
        experts.spread(Shards(over_tp, 1, experts.cuts(), AllToAll, choose.inner(name), **how))
    cut_adapters(module, [*found.values(), *shared.values()])
    parallel = Parallel(fold, found, GradientSync(), dict(shared), choose.replicated, fsdp)
    vars(module)[_PARALLEL] = parallel
    (shard_fully if fsdp else synchronise)(module, parallel)
    parallel.seen |= {p for p in module.parameters() if p.requires_grad}
    watch(module, parallel)
    return module


def _is_foreign(module: nn.Module) -> bool:
    """Whether it is somebody else's model that nobody has swapped yet."""
    return isinstance(module, nn.Module) and not is_swapped(module) and not any(_ours(module))


def _ours(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    shared = {id(part) for m in module.modules() if isinstance(m, SharedExpert) for part in m.modules()}
    yield from ((n, m) for n, m in module.named_modules() if isinstance(m, Experts) and id(m) not in shared)


def _survey(
    module: nn.Module, choose: Choice, fsdp: bool
) -> tuple[dict[str, nn.Module], dict[str, tuple[int, dict[str, Cut]]]]:
    """The routed experts by name, and E and the cuts of each; a transformers model is swapped here. Raises ValueError /
    TypeError for what this rank can see by itself."""
    choose.check()
    _check(module, choose.fold, fsdp)
    nothing = (
        "parallelize: module must hold experts (MoE, Experts, or a transformers MoE model), "
        f"got a {type(module).__name__} without any"
    )
    if _is_foreign(module):
        try:
            replace(module)
        except ValueError as error:
            raise ValueError(nothing) from error
    found = dict([*_ours(module), *swapped_experts(module)])
    if not found:
        raise ValueError(nothing)
    check_adapters(module, found, fsdp and choose.fold.size("edp") > 1)
    owner: dict[nn.Parameter, str] = {}
    for name, experts in found.items():
        for parameter in experts.parameters(recurse=False):
            if owner.setdefault(parameter, name) != name:
                raise ValueError(f"parallelize: experts must not share parameters, got {owner[parameter]} and {name}")
    if choose.engine is not None:
        layers = _layers(module)
        for experts in found.values():
            top_k = _top_k(module, layers.get(id(experts), []))
            check_sizes(choose.max_tokens or 0, _hidden_size(experts), top_k)
    return found, {name: _plan(name, experts, choose.fold) for name, experts in found.items()}


def _survey_shared(module: nn.Module, fold: Fold, fsdp: bool) -> dict[str, Experts]:
    """The shared experts by name. Raises ValueError where there are none, or they cannot be cut over tp."""
    parts = ((f"{n}.ffn" if n else "ffn", m) for n, m in module.named_modules() if isinstance(m, SharedExpert))
    found: dict[str, Any] = {name: unwrapped(part.ffn) for name, part in parts}
    if not found:
        rule = "come with shared experts"
        raise ValueError(f"parallelize: cut_shared must {rule}, got a {type(module).__name__} without any")
    check_adapters(module, found, fsdp and fold.size("dp", "cp") > 1)
    for name, experts in found.items():
        _check_cuts(name, experts, experts.cuts(), "tp", fold.size("tp"))
    return found


def _check(module: nn.Module, fold: Fold, fsdp: bool) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"parallelize: module must be a torch.nn.Module, got {type(module).__name__}")
    for name, part in module.named_modules():
        if is_parallel(part) or shards_of(part) is not None:
            raise ValueError(f"parallelize: module must not be parallelized already, got one whose {name or 'root'} is")
    tp = dist.get_process_group_ranks(fold.group("tp"))
    for name, parameter in module.named_parameters():
        if not isinstance(parameter, DTensor):
            continue
        if fsdp:
            raise ValueError(f"parallelize: fsdp must be False where parameters are DTensors, got True with {name}")
        if sorted(parameter.device_mesh.mesh.flatten().tolist()) != sorted(tp):
            raise ValueError(
                f"parallelize: module must have DTensors over the tp ranks {tp} only, got {name} over "
                f"{parameter.device_mesh}; for FSDP2 see fsdp"
            )


def _layers(module: nn.Module) -> dict[int, list[MoE]]:
    """The layers around each experts module, by its id: several share a pool, of which each size is a module."""
    found: dict[int, list[MoE]] = {}
    for layer in module.modules():
        if isinstance(layer, MoE):
            for experts in layer.experts.groups if isinstance(layer.experts, SizedExperts) else (layer.experts,):
                found.setdefault(id(unwrapped(experts)), []).append(layer)
    return found


def _top_k(module: nn.Module, around: list[MoE]) -> int:
    """K of a layer, or as the config of a transformers model says; 1 where nothing does."""
    said = (
        max(layer.top_k for layer in around)
        if around
        else getattr(getattr(module, "config", None), "num_experts_per_tok", 1)
    )
    return said if isinstance(said, int) else 1


def _hidden_size(experts: nn.Module) -> int:
    """D of the rows that an experts module takes."""
    if isinstance(experts, Experts):
        return experts.hidden_size
    transposed, down = flags(experts)[2], experts.down_proj
    return down.shape[2] if transposed else down.shape[1]  # type: ignore[union-attr, index, return-value]


def _plan(name: str, experts: nn.Module, fold: Fold) -> tuple[int, dict[str, Cut]]:
    """E and the cuts of an experts module; raises ValueError where they do not fit the fold."""
    what, s = name or type(experts).__name__, fold.sizes
    if isinstance(experts, Experts) and not isinstance(experts.dispatcher, Local):
        raise ValueError(f"parallelize: {what} must have no dispatcher of its own, got {experts.dispatcher}")
    if isinstance(experts, Experts):
        num_experts, cuts = experts.num_experts, experts.cuts()
    else:
        num_experts, cuts = cuts_of_experts(what, experts, s.etp)
    if num_experts % s.ep:
        raise ValueError(f"parallelize: ep must divide the {num_experts} experts of {what}, got ep={s.ep}")
    _check_cuts(what, experts, cuts, "etp", s.etp)
    return num_experts, cuts


def _check_cuts(what: str, experts: nn.Module, cuts: dict[str, Cut], ranks: str, size: int) -> None:
    for parameter, cut in cuts.items():
        each = getattr(experts, parameter).shape[cut.ffn] // cut.blocks
        if each % size:
            raise ValueError(
                f"parallelize: {ranks} must divide {each}, a size of {what}.{parameter}, got {ranks}={size}"
            )


def is_parallel(module: nn.Module) -> bool:
    return _PARALLEL in vars(module)


def parallel_of(module: nn.Module) -> Parallel:
    """What parallelize left at the module, or at the one inside it (a PeftModel's). Raises ValueError where it has not
    been parallelized."""
    inside = [part for part in module.modules() if is_parallel(part)]
    if not is_parallel(module) and len(inside) != 1:
        raise ValueError(f"{type(module).__name__} must be parallelized (headgate.parallelize), got one that is not")
    return vars(inside[0])[_PARALLEL]


@contextmanager
def no_sync(module: nn.Module) -> Iterator[None]:
    """No exchange of gradients inside: for all but the last of several backward passes to one optimizer step.

    Every rank must come by: parameters that are new or unfrozen are synchronised from here on."""
    parallel = parallel_of(module)
    adopt(module, parallel)
    if not parallel.sync.on:  # inside another
        yield
        return
    sharded = [m for m in module.modules() if isinstance(m, FSDPModule)]
    for m in sharded:
        m.set_requires_gradient_sync(False, recurse=False)
    try:
        with parallel.sync.paused():
            yield
    finally:
        for m in sharded:
            m.set_requires_gradient_sync(True, recurse=False)


@torch.no_grad()
def clip_grad_norm_(module: nn.Module, max_norm: float) -> Tensor:
    """The 2-norm of the gradients of the whole module over all ranks, each piece counted once: fp64 scalar.

    Where it is larger than `max_norm` all gradients are multiplied by max_norm / norm (float("inf") only measures).
    The same on every rank, which must all come by; torch's function of this name would see this rank's pieces only.
    Raises ValueError where `max_norm` is not positive, or parameters came after parallelize.
    """
    if not isinstance(max_norm, int | float) or not max_norm > 0:
        raise ValueError(f"clip_grad_norm_: max_norm must be a positive number, got {max_norm!r}")
    parallel = parallel_of(module)
    for name in newcomers(module, parallel).values():
        raise ValueError(
            f"clip_grad_norm_: module must have the parameters that parallelize saw, got a new or unfrozen one, {name}"
            ": run a forward pass first, from which on its gradients are made right"
        )
    gradients = {p: gradient_of(p) for p in module.parameters() if p.grad is not None}
    of = owners(module, parallel)
    pieces = [piece for p, grad in gradients.items() for piece in parallel.sync.pieces(p, grad, of[p].ranks.size())]
    device = next((grad.device for grad in gradients.values()), torch.device(parallel.fold.device_type))
    norm = norm_of(pieces, device)
    if norm > max_norm:
        for grad in gradients.values():
            grad.mul_(max_norm / norm)
    return norm


def set_degree(module: nn.Module, degree: int) -> None:
    """What travels to the experts of a parallelized module, rows or weights: see Shards. No weight moves here."""
    for experts in parallel_of(module).experts.values():
        shards = shards_of(experts)
        assert shards is not None
        shards.set_degree(degree)
