"""Placements on live models: weights, optimizer state and rows go where a placement says, at once or step by step."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ...dispatch import collectives
from ...dispatch.agreement import disagreement, together
from ...placement.cluster.topology import Topology
from ...placement.live.migrate import Migration, Step
from ...placement.live.migrate import migrate as planned
from ...placement.live.rearrange import rearrange
from ...placement.placement import Placement
from ..adapters import wrappers_in
from ..shards import Shards
from .moving import Moved, Optimizer, make_step, shards_in, states_of
from .parallel import Parallel, parallel_of

REPLICA = ("home", "balanced")
_Plan = list[tuple[Step, Placement | None]]  # each with the placement of its layer that it leaves; None: the plain one


def place_experts(
    module: nn.Module, placement: Placement | None, *, optimizer: Optimizer | None = None, replica: str = "home"
) -> nn.Module:
    """Puts the experts of a parallelized layer or model where `placement` says, in place; weights travel, rows follow.

    module     what `parallelize` was given: its layers of experts are the placement's, in the order of their names
    placement  of ep GPUs, ranks of an ep group in order, with as many slots each; an expert may stand on several. None:
               E/ep in a row on each rank, as parallelize left them
    optimizer  the one made after parallelize, whose state of experts travels too
    replica    "home": a rank takes a replicated expert on itself, else on its node, else anywhere, in turn (Replicas).
               "balanced": all ranks of an ep group count, in each call, and the busiest has as few rows as can be
               (Balanced): for speed where replicas are there for balance, at the price of a wait for the device

    Outputs and gradients stay those of one process. Replicas' gradients are summed, so that equal replicas stay equal
    under any optimizer that goes element by element. Router, losses and checkpoints know experts, not slots.

    Where slots per rank change, expert parameters are new ones: hand the optimizer over, or make it afterwards, and
    hooks set on them are gone. Otherwise they stay the same objects. A layer travels in one all-to-all, and each rank
    gets each expert that it lacks once.

    Every rank must call it, between optimizer.step() and the next forward pass, gradients being None (zero_grad); the
    backward pass of an earlier forward would raise. Raises ValueError / TypeError, on every rank and before anything
    moves: a module that is not parallelized, fsdp over edp, another number of layers, experts or GPUs, unequal slots,
    replicas where activations are replicated, an optimizer that lacks experts or keeps state of another shape for them
    (Adafactor), ranks that disagree.

    >>> placement = headgate.Placement.load("placement.json")
    >>> headgate.place_experts(headgate.parallelize(model, fold), placement)
    """

    def plan() -> tuple[_Plan, object]:
        _check_adapters(module, parallel)
        if replica not in REPLICA:
            raise ValueError(f"place_experts: replica must be one of {', '.join(REPLICA)}, got {replica!r}")
        if placement is not None and not isinstance(placement, Placement):
            raise TypeError(f"place_experts: placement must be a Placement or None, got {type(placement).__name__}")
        now = placement_of(module, None if placement is None else placement.topology)
        then = _plain(now) if placement is None else placement
        _check_fits(parallel, now, then)
        goals = [None if placement is None else _layer_of(then, layer) for layer in range(len(then.expert_of_slot))]
        return list(zip(rearrange(now, then), goals, strict=True)), (_said(then), replica)

    parallel = parallel_of(module)
    for _ in _made(parallel, _agreed(parallel, optimizer, plan), optimizer, replica):
        pass
    return module


def migrate(
    module: nn.Module,
    target: Placement | Migration,
    *,
    optimizer: Optimizer | None = None,
    max_bytes: int | None = None,
) -> Iterator[Moved]:
    """The same step by step: each `next` makes one, after which the module is whole and answers as before.

    target     a placement with as many slots per rank as there are now, reached with the fewest bytes (experts keep
               their slots where they stay on their rank), or a plan that starts where the experts stand
    max_bytes  weights and optimizer state that the ranks of an ep group may send in one step, together; experts that
               wait for each other's slots move together even so. None: a step for each layer

    In between the module may serve and train; every rank must make the steps at the same points, with gradients None.
    All is checked here, before the first step; see `place_experts`.

    >>> for moved in headgate.migrate(model, placement, optimizer=optimizer):
    ...     train_one_step()
    """

    def plan() -> tuple[_Plan, object]:
        _check_adapters(module, parallel)
        if not isinstance(target, Placement | Migration):
            raise TypeError(f"migrate: target must be a Placement or a Migration, got {type(target).__name__}")
        then = target if isinstance(target, Placement) else target.target
        most = None if max_bytes is None else _most_moves(parallel, optimizer, max_bytes)
        placed = any(shards_in(experts).placement is not None for experts in parallel.experts.values())
        now = placement_of(module, None if placed else then.topology)
        _check_fits(parallel, now, then)
        migration = target if isinstance(target, Migration) else planned(now, target, most_moves=most)
        return _checked(now, migration), (_said(migration.target), migration.steps)

    parallel = parallel_of(module)
    return _made(parallel, _agreed(parallel, optimizer, plan), optimizer)


def placement_of(module: nn.Module, topology: Topology | None = None) -> Placement:
    """Where the experts of a parallelized module stand now, on `topology`; None: that of the placement they have, or
    one node. Raises ValueError where the module is not parallelized or its layers differ in experts or slots."""
    parallel = parallel_of(module)
    layers, sizes = [], set()
    for shards in map(shards_in, parallel.experts.values()):
        layers.append(_standing(shards))
        topology = topology or (None if shards.placement is None else shards.placement.topology)
        sizes.add((shards.num_experts, len(layers[-1])))
    if len(sizes) > 1:
        raise ValueError(f"place_experts: layers must be alike in experts and slots, got {sorted(sizes)}")
    ep = parallel.fold.size("ep")
    if topology is None or topology.gpus != ep:
        topology = Topology(1, ep)
    return Placement(np.stack(layers), sizes.pop()[0], topology)


def _plain(now: Placement) -> Placement:
    layers, experts = len(now.expert_of_slot), now.num_experts
    return Placement(np.tile(np.arange(experts), (layers, 1)), experts, now.topology)


def _layer_of(placement: Placement, layer: int) -> Placement:
    slots = placement.expert_of_slot[layer : layer + 1]
    return Placement(slots, placement.num_experts, placement.topology, placement.slots_of_gpu)


# --- checks ----------------------------------------------------------------------------------------------------------


def _check_adapters(module: nn.Module, parallel: Parallel) -> None:
    mine = {id(experts) for experts in parallel.experts.values()}
    for name, _, inside in wrappers_in(module):
        if id(inside) in mine:
            raise ValueError(
                f"place_experts: module must have no LoRA on its experts, got one on {name}: merge and unload it first"
            )


def _check_module(parallel: Parallel, optimizer: Optimizer | None) -> None:
    for name, parameter in _parameters(parallel):
        if isinstance(parameter, DTensor):
            raise ValueError(f"place_experts: experts must not be sharded by fsdp over edp, got {name} that is")
        if parameter.requires_grad and parameter not in parallel.seen:
            raise ValueError(f"place_experts: module must have the parameters that parallelize saw, got a new {name}")
        if parameter.grad is not None:
            raise ValueError(f"place_experts: gradients must be None (zero_grad), got one of {name}")
    if optimizer is None:
        return
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"place_experts: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    held = {p for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in _parameters(parallel):
        if parameter.requires_grad and parameter not in held:
            raise ValueError(f"place_experts: optimizer must hold the module's experts, got one without {name}")
        for field, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape:
                raise ValueError(
                    "place_experts: optimizer must keep numbers or tensors of the parameter's shape for experts, got "
                    f"{field} {tuple(value.shape)} for {name} {tuple(parameter.shape)}"
                )


def _check_fits(parallel: Parallel, now: Placement, then: Placement) -> None:
    layers, ep = len(now.expert_of_slot), parallel.fold.size("ep")
    if len(then.expert_of_slot) != layers:
        raise ValueError(
            f"place_experts: placement must have the module's {layers} layers of experts, "
            f"got {len(then.expert_of_slot)}"
        )
    if then.num_experts != now.num_experts:
        raise ValueError(f"place_experts: placement must have {now.num_experts} experts, got {then.num_experts}")
    if then.topology.gpus != ep:
        raise ValueError(f"place_experts: placement must have ep = {ep} GPUs, got {then.topology.gpus}")
    if len(set(then.slots_of_gpu.tolist())) > 1:
        raise ValueError(
            f"place_experts: placement must have as many slots on each GPU, got {then.slots_of_gpu.tolist()}"
        )
    if then.replicas.max() > 1 and any(shards_in(e).replicated for e in parallel.experts.values()):
        raise ValueError(
            "place_experts: placement must have no replicas where activations are replicated, got some of "
            f"expert {int(then.replicas.max(0).argmax())}"
        )


def _checked(now: Placement, migration: Migration) -> _Plan:
    """The steps of a migration that starts at `now`, each with the placement of its layer that it leaves."""
    if not np.array_equal(migration.source.expert_of_slot, now.expert_of_slot):
        raise ValueError("migrate: target must be a plan that starts where the experts stand, got one from elsewhere")
    found: _Plan = []
    gpus, states = now.gpu_of_slot, list(migration.placements())
    for step, before, after in zip(migration.steps, states, states[1:], strict=False):
        for move in step.moves:
            sides = ((move.source_gpu, move.source_slot), (move.target_gpu, move.target_slot))
            if any(gpus[slot] != gpu for gpu, slot in sides) or before[step.layer, move.source_slot] != move.expert:
                raise ValueError(f"migrate: moves must take experts from where they stand to slots of GPUs, got {move}")
        whole = Placement(after, now.num_experts, migration.target.topology, now.slots_of_gpu)
        found.append((step, _layer_of(whole, step.layer)))
    if not np.array_equal(states[-1], migration.target.expert_of_slot):
        raise ValueError("migrate: steps must lead to the plan's target, got others")
    return found


def _most_moves(parallel: Parallel, optimizer: Optimizer | None, max_bytes: int) -> int:
    """How many experts of any layer have no more than max_bytes together."""
    largest = 0
    for experts in parallel.experts.values():
        held = [getattr(experts, key) for key in shards_in(experts).cuts]
        largest = max(largest, sum(t[0].nbytes for p in held for t in (p, *states_of(p, optimizer).values())))
    if not isinstance(max_bytes, int) or max_bytes < largest:
        raise ValueError(f"migrate: max_bytes must be at least an expert's {largest}, got {max_bytes!r}")
    return max_bytes // largest


def _said(placement: Placement) -> object:
    """What ranks must say alike of a placement."""
    return placement.expert_of_slot.tolist(), placement.num_experts, placement.topology.to_json()


def _agreed(parallel: Parallel, optimizer: Optimizer | None, plan: Callable[[], tuple[_Plan, object]]) -> _Plan:
    """plan() of every rank, all alike; ValueError / TypeError, on every rank, names what is amiss or differs."""
    ranks = parallel.fold.group("dp", "cp", "tp")

    def work() -> tuple[_Plan, object]:
        _check_module(parallel, optimizer)
        return plan()

    steps, said = together(work, ranks)
    things = {"placement": said, "optimizer": _fields(parallel, optimizer)}
    mine = [int.from_bytes(hashlib.sha256(repr(thing).encode()).digest()[:7], "big") for thing in things.values()]
    heard = collectives.all_gather_objects(mine, ranks)
    field, odd, _, other, _ = disagreement(heard, torch.distributed.get_process_group_ranks(ranks))
    if field:
        name = list(things)[field - 1]
        raise ValueError(
            f"place_experts: {name} must be the same on every rank, got another on rank {odd} than on rank {other}"
        )
    return steps


# --- steps -----------------------------------------------------------------------------------------------------------


def _made(parallel: Parallel, steps: _Plan, optimizer: Optimizer | None, replica: str | None = None) -> Iterator[Moved]:
    """Makes the steps. `replica`: how replicas are chosen from now on; None: as they were."""
    names = list(parallel.experts)
    for step, goal in steps:

        def check(name: str = names[step.layer], step: Step = step) -> None:  # the caller may have done anything since
            _check_module(parallel, optimizer)
            stand = _standing(shards_in(parallel.experts[name]))
            if any(stand[move.source_slot] != move.expert for move in step.moves):
                raise ValueError(f"migrate: experts must stand where the step before left them, got others in {name}")

        together(check, parallel.fold.group("dp", "cp", "tp"))
        yield make_step(parallel, names[step.layer], step.moves, goal, optimizer, replica)


# --- what a module has ----------------------------------------------------------------------------------------------


def _standing(shards: Shards) -> NDArray[np.int32]:
    """int32 [S]: the expert of each slot of a layer."""
    plain = np.arange(shards.num_experts, dtype=np.int32)
    return plain if shards.placement is None else shards.placement.expert_of_slot[0]


def _parameters(parallel: Parallel) -> Iterator[tuple[str, nn.Parameter]]:
    for name, experts in parallel.experts.items():
        for key in shards_in(experts).cuts:
            yield f"{name}.{key}" if name else key, getattr(experts, key)


def _fields(parallel: Parallel, optimizer: Optimizer | None) -> list[tuple[str, list[tuple[str, str]]]]:
    """What will travel beside each parameter: the ranks must have the same."""
    states = ((name, states_of(p, optimizer)) for name, p in _parameters(parallel))
    return [(name, [(field, str(t.dtype)) for field, t in kept.items()]) for name, kept in states]
