"""What the checks of parallelize share: a layer, folds, and one process to compare with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from ranks_compare import TOLERANCE, close
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import headgate
from headgate.dispatch import Fold
from headgate.moe import MoE
from headgate.moe.ranks.sync import local
from headgate.moe.shards import shards_of

CHECKS: dict[str, Callable[[], None]] = {}
D, F, E, K = 8, 16, 16, 3
FIRST: list[Fold] = []  # its groups serve all folds: making them is most of the time


def make_fold(sizes) -> Fold:
    fold = Fold.of(sizes, like=FIRST[0] if FIRST else None)
    FIRST[:] = FIRST or [fold]
    return fold


def check(function):
    CHECKS[function.__name__] = function
    return function


def layer(dtype=torch.float32, seed=3, **options) -> MoE:
    torch.manual_seed(seed)
    form = dict(shared_intermediate_size=8, bias=True, router_options={"renormalize": True}, dtype=dtype)
    form |= dict(load_balancing_coef=0.1, z_loss_coef=0.01)
    made = MoE(D, F, E, K, **{**form, **options})
    with torch.no_grad():
        for b in (made.experts.b_gate_up, made.experts.b_down):
            if b is not None:
                b.normal_()
    return made


def parts(tokens: list[int]) -> list[slice]:
    ends = torch.tensor(tokens).cumsum(0).tolist()
    return [slice(e - n, e) for e, n in zip(ends, tokens, strict=True)]


def compare(whole: nn.Module, mine: nn.Module, of, what: str, tolerance=TOLERANCE) -> None:
    """`of(parameter)` of every parameter: this rank's part of one process's."""
    ours = dict(mine.named_parameters())
    for name, p in whole.named_parameters():
        owner, _, leaf = name.rpartition(".")
        shards, part = shards_of(mine.get_submodule(owner)), of(p)
        if shards is not None:
            part = shards.cuts[leaf].of(part, shards.held, shards.etp, shards.fold.rank("etp"))
        found = of(ours[name])
        if isinstance(ours[name], DTensor):  # FSDP2 cuts what a rank would hold once more
            mesh = ours[name].device_mesh
            chunks, at = part.chunk(mesh.size()), mesh.get_local_rank()
            part, found = (chunks[at] if at < len(chunks) else part[:0]), local(found)
        close(found, part, f"{what}: {name}", tolerance)


@dataclass
class Reference:
    """What one process has: outputs, gradients, losses, and the layer with its gradients and after a step."""

    y: Tensor
    dx: Tensor
    losses: dict[str, Tensor]
    dropped: int | None
    norm: Tensor
    graded: MoE
    stepped: MoE


def batch() -> tuple[list[int], Tensor, Tensor]:
    """Tokens of each rank, all rows, and what the outputs are multiplied by."""
    tokens = [5, 0, 9, 1, 4, 3, 6, 2][: dist.get_world_size()]
    torch.manual_seed(11)
    return tokens, torch.randn(sum(tokens), D), torch.randn(sum(tokens), D)


def step_of(module: nn.Module) -> None:
    torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1).step()


REFERENCES: dict[tuple[str, int], Reference] = {}  # many folds are compared with the same


def reference(options: dict, average: int) -> Reference:
    key = repr(sorted(options.items(), key=str)), average
    if key in REFERENCES:
        return REFERENCES[key]
    _, x, g = batch()
    graded, stepped = layer(**options), layer(**options)
    x.requires_grad_()
    y = graded(x)
    ((y * g).sum() / average).backward()
    for p, q in zip(graded.parameters(), stepped.parameters(), strict=True):
        q.grad = p.grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(stepped.parameters(), 0.5)
    step_of(stepped)
    losses = {name: loss.detach() for name, loss in graded.aux_losses.items()}
    dropped = graded.last_overflow.dropped if graded.capacity is not None else None
    REFERENCES[key] = Reference(y.detach(), x.grad, losses, dropped, norm, graded, stepped)
    return REFERENCES[key]


def once(fold: Fold, options=None, *, prepare=None, also=None, **how) -> None:
    """Layer, its gradients, their norm and one optimizer step under `fold`, against one process.

    `prepare(mine)`: what is done to the parallelized layer first; `also(whole, mine, part, what, of)`: what else holds
    of gradients and weights, `of(parameter)`, where this rank has the rows `part`; `whole` has made no step.
    """
    options, average = options or {}, fold.size("dp", "cp")
    one, (tokens, x, g) = reference(options, average), batch()
    mine = headgate.parallelize(layer(**options), fold, **how)
    if prepare is not None:
        prepare(mine)
    part = parts(tokens)[dist.get_rank()]
    x2 = x[part].clone().requires_grad_()
    y2 = mine(x2)
    (y2 * g[part]).sum().backward()
    what = f"{fold} {how}"
    close(y2, one.y[part], f"{what}: y")
    close(x2.grad / average, one.dx[part], f"{what}: dx")
    for name, loss in one.losses.items():
        close(mine.aux_losses[name], loss, f"{what}: {name}")
    if one.dropped is not None:
        assert mine.last_overflow.dropped_total == one.dropped > 0, what

    def same(whole: MoE, of, when: str) -> None:
        compare(whole, mine, of, f"{what}: {when}")
        if also is not None:
            also(one.graded, mine, part, f"{what}: {when}", of)

    same(one.graded, lambda p: p.grad, "gradient")
    close(headgate.clip_grad_norm_(mine, 0.5).float(), one.norm, f"{what}: norm")
    step_of(mine)
    same(one.stepped, lambda p: p.detach(), "after a step")


def some_folds() -> list[Fold]:
    """A few of all: each degree larger than one somewhere, experts and attention cut differently."""
    every = list(Fold.possible(dist.get_world_size()))
    mixed = [s for s in every if s.attention != s.experts]
    return [make_fold(s) for s in (every[0], every[-1], *mixed[:: max(len(mixed) // 4, 1)])]


def optimizer_of(module: nn.Module, lr: float) -> torch.optim.AdamW:
    """Two groups with rates of their own."""
    rest = [p for n, p in module.named_parameters() if "router" not in n]
    return torch.optim.AdamW([{"params": list(module.router.parameters()), "lr": lr / 10}, {"params": rest}], lr=lr)


def trained(fold: Fold | None, **how) -> tuple[MoE, torch.optim.AdamW]:
    """A layer with an optimizer that has made two steps, the same under every fold; in fp64."""
    mine = layer(torch.float64)
    if fold is not None:
        headgate.parallelize(mine, fold, **how)
    optimizer = optimizer_of(mine, 1e-2)
    for step in range(2):
        train(mine, optimizer, fold, step)
    return mine, optimizer


def train(mine: MoE, optimizer: torch.optim.Optimizer, fold: Fold | None, step: int) -> None:
    torch.manual_seed(100 + step)
    size, rank = (1, 0) if fold is None else (dist.get_world_size(), dist.get_rank())
    x, g = torch.randn(16, D, dtype=torch.float64), torch.randn(16, D, dtype=torch.float64)
    part = parts([16 // size] * size)[rank]
    optimizer.zero_grad()
    ((mine(x[part]) * g[part]).sum() * (1 if fold is None else fold.size("dp", "cp"))).backward()
    optimizer.step()


def folder(name: str) -> Path:
    return Path.cwd() / name
