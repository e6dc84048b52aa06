"""The rivals: a plain all-to-all as torchtitan writes it, and transformers' own expert parallelism, its real code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd, wait_tensor

from ..rivals import _GroupedLinear, experts_module
from .volume import Movement
from .world import World


@dataclass
class Step:
    """`forward(x, ids, weights)` -> y, and the weights of this rank's experts, which get the gradients."""

    forward: Callable[[Tensor, Tensor, Tensor], Tensor]
    gate_up: nn.Parameter
    down: nn.Parameter

    def gradients(self) -> dict[str, Tensor | None]:
        """Those of this rank's experts, as plain tensors."""
        named = {"gate_up_proj": self.gate_up.grad, "down_proj": self.down.grad}
        return {n: g.to_local() if hasattr(g, "to_local") else g for n, g in named.items()}  # type: ignore[union-attr]

    def clear(self) -> None:
        self.gate_up.grad = self.down.grad = None


def plain(world: World, wire: str) -> Step:
    """One row per (token, expert) pair to the expert's rank and one back; sorted by expert here, weighted at home."""
    shape, size, k = world.shape, world.layout.ranks, world.shape.top_k
    each, group = shape.experts // size, dist.group.WORLD
    w_gate_up, w_down = (nn.Parameter(p.detach()[world.held]) for p in world.problem.parameters.values())
    local = torch.arange(each).repeat(size)

    def exchange(rows: Tensor, received: list[int], sent: list[int]) -> Tensor:
        return wait_tensor(all_to_all_single_autograd(rows, received, sent, group))  # type: ignore[arg-type]

    def experts(rows: Tensor, counts: Tensor) -> Tensor:
        """counts [G, E/G]: the rows came rank by rank, inside in the order of experts."""
        order = local.repeat_interleave(counts.flatten(), output_size=rows.shape[0]).argsort(stable=True)
        offsets = [0, *counts.sum(0).cumsum(0).tolist()]
        h = _GroupedLinear.apply(rows[order], w_gate_up, offsets, False)
        out = _GroupedLinear.apply(shape.form(*h.chunk(2, dim=1)), w_down, offsets, False)
        return out[_inverse(order)]

    def forward(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        order = flat.argsort(stable=True)
        mine = torch.bincount(flat, minlength=shape.experts).view(size, each)
        theirs = torch.empty_like(mine)
        dist.all_to_all_single(theirs, mine)
        sent, received = torch.stack([mine.sum(1), theirs.sum(1)]).tolist()
        out = experts(exchange(x[order // k], received, sent), theirs)
        home = exchange(out, sent, received)[_inverse(order)].view(x.shape[0], k, -1)
        return (home * weights[..., None]).sum(1)

    return Step(forward, w_gate_up, w_down)


def _inverse(order: Tensor) -> Tensor:
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel())
    return inverse


def transformers(implementation: str, shared: bool) -> Callable[[World, str], Step]:
    """transformers' `apply_expert_parallelism`, by the family's own plan, on the family's own experts module with its
    default grouped matmul. `shared`: all ranks hold one batch (ep_size = tp_size = G); else each its own (tp_size 1).
    """

    def build(world: World, wire: str) -> Step:
        module: Any = experts_module(world.problem)
        module.config._experts_implementation = "grouped_mm"
        plan = {key.removeprefix("layers.*.mlp."): style for key, style in module.config.base_model_ep_plan.items()}
        size = world.layout.ranks
        if shared:
            ep = tp = dist.init_device_mesh("cpu", (size,), mesh_dim_names=("ep",))
        else:
            mesh = dist.init_device_mesh("cpu", (size, 1), mesh_dim_names=("ep", "tp"))
            ep, tp = mesh["ep"], mesh["tp"]
        block = nn.Module()
        block.experts = module
        apply = import_module("transformers.distributed.expert_parallel").apply_expert_parallelism
        apply(block, ep, tp, plan, implementation)
        return Step(module, module.gate_up_proj, module.down_proj)

    return build


def pairs(world: World, wire: str) -> list[Movement]:
    row = _row(world)
    return [Movement("pairs", (row, row), (row, row))]


def reduced(world: World, wire: str) -> list[Movement]:
    """An all-reduce of y, then one of x's gradient and one of the weights'."""
    both = (_row(world), _row(world) + world.shape.top_k * world.problem.x.element_size())
    return [Movement("everyone", both, both)]


def sliced(world: World, wire: str) -> list[Movement]:
    """Pairs of this rank's slice of the batch, and an all-gather of y, of x's gradient and of the weights'."""
    gathered = (_row(world), _row(world) + world.shape.top_k * world.problem.x.element_size())
    return [*pairs(world, wire), Movement("everyone", gathered, (0, 0))]


def _row(world: World) -> int:
    return world.shape.hidden * world.problem.x.element_size()
