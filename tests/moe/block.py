"""Attention and experts together on many ranks, run by test_block.py: one process's numbers under every fold."""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks_compare import close, norm, same_parameters
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import headgate
from headgate.dispatch import Fold
from headgate.dispatch.ulysses import ulysses

CHECKS = {}
D, HEADS, FFN, E, K, B, S = 16, 8, 8, 8, 3, 8, 16
SOME_OF_8 = 4  # every so many of the 100 folds of 8 ranks, see the_model_under_every_fold


def check(function):
    CHECKS[function.__name__] = function
    return function


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        # A bias of keys has no gradient but rounding: softmax does not see it.
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(D, D, bias=letter != "k") for letter in "qkvo")
        self.cp = None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(2, (-1, D // HEADS)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        attend = partial(F.scaled_dot_product_attention, is_causal=True)
        y = attend(q, k, v) if self.cp is None else ulysses(q, k, v, attend, self.cp)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm_1, self.attention, self.norm_2 = nn.RMSNorm(D), Attention(), nn.RMSNorm(D)
        options = dict(shared_intermediate_size=4, shared_gate=True, router_options={"renormalize": True})
        self.moe = headgate.MoE(D, FFN, E, K, **options)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.moe(self.norm_2(x))


def model(layers: int = 2) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(*(Block() for _ in range(layers)))


def spread_attention(blocks: nn.Module, fold: Fold) -> None:
    """As PyTorch's tutorials do it; one norm as SequenceParallel, the other left as it is."""
    plan = {
        "norm_1": SequenceParallel(use_local_output=True),
        "attention": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
        "attention.o_proj": RowwiseParallel(output_layouts=Shard(1)),
        **{f"attention.{letter}_proj": ColwiseParallel() for letter in "qkv"},
    }
    for block in blocks:
        block.attention.cp = fold.group("cp")
        if fold.size("tp") > 1:
            parallelize_module(block, fold.attention["tp"], plan)


def mine_of(fold: Fold, batch: Tensor) -> Tensor:
    """This rank's part of a batch [B, S, ...]: sequences by dp, positions in a row by (cp, tp)."""
    rows = batch.chunk(fold.size("dp"), 0)[fold.rank("dp")]
    return rows.chunk(fold.size("cp", "tp"), 1)[fold.rank("cp", "tp")].contiguous()


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(11)
    return torch.randn(B, S, D), torch.randn(B, S, D)


def compare(whole: nn.Module, mine: nn.Module, what: str) -> None:
    """Gradients, their norm, and the weights one step later."""
    same_parameters(whole, mine, lambda p: p.grad, f"{what}: gradient")
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1) for m in (whole, mine)]
    total = norm(whole)
    torch.nn.utils.clip_grad_norm_(whole.parameters(), 0.5)
    close(headgate.clip_grad_norm_(mine, 0.5).float(), total, f"{what}: norm")
    for optimizer in optimizers:
        optimizer.step()
    same_parameters(whole, mine, lambda p: p.detach(), f"{what}: after a step")


def once(fold: Fold, layers: int = 2) -> None:
    x, g = batch()
    whole, mine = model(layers), model(layers)
    spread_attention(mine, fold)
    headgate.parallelize(mine, fold)
    average = fold.size("dp", "cp")
    x1, x2 = x.clone().requires_grad_(), mine_of(fold, x).requires_grad_()
    y1, y2 = whole(x1), mine(x2)
    ((y1 * g).sum() / average).backward()
    (y2 * mine_of(fold, g)).sum().backward()
    close(y2, mine_of(fold, y1), f"{fold}: y")
    close(x2.grad / average, mine_of(fold, x1.grad), f"{fold}: dx")
    compare(whole, mine, str(fold))


@check
def the_block_alone():
    world = dist.get_world_size()
    once(Fold({"cp": 2, "tp": world // 2}, {"ep": 2, "etp": world // 2}), layers=1)


@check
def the_model_under_every_fold():
    """Of 8 ranks some, in steps that no degree follows."""
    world = dist.get_world_size()
    for sizes in list(Fold.possible(world))[:: 1 if world <= 4 else SOME_OF_8]:
        once(Fold.of(sizes))
