"""The checks of parallelize on many ranks, run by test_folds.py: one process's numbers under every fold."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

import headgate
from headgate.dispatch import Fold
from headgate.moe import MoE
from headgate.moe.shards import shards_of

CHECKS = {}
D, F, E, K = 8, 16, 16, 3
TOLERANCE = 1e-5


def check(function):
    CHECKS[function.__name__] = function
    return function


def layer(dtype=torch.float32, **options) -> MoE:
    torch.manual_seed(3)
    form = dict(shared_intermediate_size=8, bias=True, router_options={"renormalize": True}, dtype=dtype)
    made = MoE(D, F, E, K, **{**form, **options})
    with torch.no_grad():
        for b in (made.experts.b_gate_up, made.experts.b_down):
            b.normal_()
    return made


def close(actual, expected, what, tolerance=TOLERANCE):
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if expected.numel():
        error, size = (actual - expected).abs().max().item(), expected.abs().max().item()
        assert error <= tolerance * max(size, 1e-30), f"{what}: error {error:.3g} of {size:.3g}"


def parts(fold: Fold, tokens: list[int]) -> list[slice]:
    ends = torch.tensor(tokens).cumsum(0).tolist()
    return [slice(e - n, e) for e, n in zip(ends, tokens, strict=True)]


def expected_part(p_full: torch.Tensor, module: nn.Module, name: str) -> torch.Tensor:
    shards = shards_of(module)
    return shards.cuts[name].of(p_full, shards.held, shards.etp, shards.fold.rank("etp"))


def compare(whole: nn.Module, mine: nn.Module, of, what: str) -> None:
    """`of(parameter)` of every parameter: this rank's part of one process's."""
    ours = dict(mine.named_parameters())
    for name, p in whole.named_parameters():
        owner, _, leaf = name.rpartition(".")
        module = mine.get_submodule(owner)
        full = of(p)
        part = expected_part(full, module, leaf) if shards_of(module) is not None else full
        close(of(ours[name]), part, f"{what}: {name}")


def once(fold: Fold, options=None, **how) -> None:
    """Layer, its gradients, their norm and one optimizer step under `fold`, against one process."""
    size, rank = dist.get_world_size(), dist.get_rank()
    tokens = [5, 0, 9, 1, 4, 3, 6, 2][:size]
    torch.manual_seed(11)
    x, g = torch.randn(sum(tokens), D), torch.randn(sum(tokens), D)
    whole, mine = layer(**(options or {})), layer(**(options or {}))
    headgate.parallelize(mine, fold, **how)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1) for m in (whole, mine)]
    average = fold.size("dp", "cp")
    x1 = x.clone().requires_grad_()
    y1 = whole(x1)
    ((y1 * g).sum() / average).backward()
    part = parts(fold, tokens)[rank]
    x2 = x[part].clone().requires_grad_()
    y2 = mine(x2)
    (y2 * g[part]).sum().backward()
    what = f"{fold} {how}"
    close(y2, y1[part], f"{what}: y")
    close(x2.grad / average, x1.grad[part], f"{what}: dx")
    compare(whole, mine, lambda p: p.grad, f"{what}: gradient")
    norm = torch.nn.utils.clip_grad_norm_(whole.parameters(), 0.5)
    close(headgate.clip_grad_norm_(mine, 0.5).float(), norm, f"{what}: norm")
    for optimizer in optimizers:
        optimizer.step()
    compare(whole, mine, lambda p: p.detach(), f"{what}: after a step")


@check
def the_layer_under_every_fold():
    for sizes in Fold.possible(dist.get_world_size()):
        once(Fold.of(sizes))
