"""headgate.lora on parallelized models, run by test_lora.py: one process's numbers, put on before or after."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from folds_cases import folder, make_fold
from ranks_compare import close
from torch import Tensor, nn

import headgate
from headgate.dispatch import Fold
from headgate.dispatch.fold import Sizes
from headgate.moe.adapters import factors_of, wrappers_in
from headgate.moe.shards import shards_of

CHECKS = {}
D, F, E, K, R, LENGTH = 16, 8, 8, 2, 3, 6


def check(function):
    CHECKS[function.__name__] = function
    return function


class Layers(nn.Module):
    """Two of our own layers."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(32, D)
        self.layers = nn.ModuleList(headgate.MoE(D, F, E, K, bias=True) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for layer in self.layers:
            x = x + layer(x)
        return x


def built() -> nn.Module:
    torch.manual_seed(3)
    return Layers()


def adapted(model: nn.Module, seed: int = 5, fill: bool = True) -> headgate.moe.lora.lora.Lora:
    torch.manual_seed(seed)
    lora = headgate.lora(model, R, alpha=6)
    if fill:
        with torch.no_grad():
            for p in lora.parameters():
                p.normal_(std=0.3)
    return lora


def folds() -> list[tuple[Fold, dict]]:
    n = dist.get_world_size()
    experts = [{"ep": n}, {"etp": n}, {"ep": n // 2, "etp": 2}, {"edp": 2, "etp": n // 2}, {"edp": n // 2, "ep": 2}]
    found = [(make_fold(Sizes.of({"dp": n}, e, 1, n)), {}) for e in experts[: 5 if n > 2 else 2]]
    tp = make_fold(Sizes.of({"tp": n}, {"ep": n // 2, "etp": 2}, 1, n))
    return [*found, (tp, {"activations": "replicated"})]


def batch(fold: Fold) -> tuple[Tensor, Tensor, slice]:
    torch.manual_seed(11)
    n, at = fold.size("dp", "cp"), fold.rank("dp", "cp")
    return torch.randint(2, 32, (2 * n, LENGTH)), torch.randn(2 * n, LENGTH, D), slice(2 * at, 2 * at + 2)


def step(model: nn.Module, ids: Tensor, g: Tensor) -> Tensor:
    y = model(ids)
    (y * g).sum().backward()
    return y.detach()


def parts(whole: nn.Module, mine: nn.Module, of) -> None:
    """Each factor of `mine` beside this rank's part of the same of `whole`."""
    pairs = list(zip(wrappers_in(whole), wrappers_in(mine), strict=True))
    assert len(pairs) == 4
    for (_, theirs, experts), (name, wrapper, inside) in pairs:
        shards = shards_of(inside)
        for full, part in zip(factors_of(theirs, experts.cuts()), factors_of(wrapper, shards.cuts), strict=True):
            want = part.cut.of(full.by_expert(of(full.parameter)), shards.held, shards.etp, shards.fold.rank("etp"))
            close(part.by_expert(of(part.parameter)), want, f"{shards.fold}: {name}.{part.name}")


@check
def put_on_before():
    for fold, how in folds():
        whole, mine = built(), built()
        adapted(whole), adapted(mine)
        headgate.parallelize(mine, fold, **how)
        ids, g, part = batch(fold)
        want = step(whole, ids, g / fold.size("dp", "cp"))
        close(step(mine, ids[part], g[part]), want[part], f"{fold}: y")
        parts(whole, mine, lambda p: p.grad)
        norm = torch.nn.utils.clip_grad_norm_(whole.parameters(), 1e9)
        close(headgate.clip_grad_norm_(mine, 1e9).float(), norm, f"{fold}: norm")
        grads = [p.grad for p in mine.parameters() if p.grad is not None]
        assert len(grads) == 8, "experts learn nothing"


@check
def at_every_degree():
    n = dist.get_world_size()
    fold = make_fold(Sizes.of({"dp": n}, {"ep": n // 2, "etp": 2}, 1, n))
    for degree in (0, 1, 2):
        whole, mine = built(), built()
        adapted(whole), adapted(mine)
        headgate.parallelize(mine, fold)
        headgate.set_degree(mine, degree)
        ids, g, part = batch(fold)
        want = step(whole, ids, g / n)
        close(step(mine, ids[part], g[part]), want[part], f"r = {degree}: y")
        parts(whole, mine, lambda p: p.grad)


@check
def rows_that_travel_while_experts_compute():
    """A and B are gathered once a call, as weights are, not once a chunk."""
    n = dist.get_world_size()
    fold = make_fold(Sizes.of({"dp": n}, {"ep": n // 2, "etp": 2}, 1, n))
    for degree in (1, 2):
        whole, mine = built(), built()
        adapted(whole), adapted(mine)
        headgate.parallelize(mine, fold, overlap=3)
        headgate.set_degree(mine, degree)
        calls = []
        for layer in mine.layers:
            one = layer.experts.lora
            one.deltas = lambda *args, of=one.deltas, degree=degree, calls=calls: calls.append(degree) or of(*args)
        ids, g, part = batch(fold)
        want = step(whole, ids, g / n)
        close(step(mine, ids[part], g[part]), want[part], f"r = {degree}: y")
        parts(whole, mine, lambda p: p.grad)
        assert calls == [degree] * 2, "once for each layer"


@check
def put_on_after():
    """Every rank starts with its own values; those that hold the same of a matrix end with the same."""
    for fold, how in folds():
        mine = headgate.parallelize(built(), fold, **how)
        adapted(mine, seed=20 + dist.get_rank())
        ids, g, part = batch(fold)
        step(mine, ids[part], g[part])
        whole = built()
        adapted(whole)
        for (_, theirs, experts), (_, wrapper, inside) in zip(wrappers_in(whole), wrappers_in(mine), strict=True):
            shards = shards_of(inside)
            for full, own in zip(factors_of(theirs, experts.cuts()), factors_of(wrapper, shards.cuts), strict=True):
                put_together(full, own, shards)
        want = step(whole, ids, g / fold.size("dp", "cp"))
        with torch.no_grad():
            close(mine(ids[part]), want[part], f"{fold}: y")
        parts(whole, mine, lambda p: p.grad)


@torch.no_grad()
def put_together(full, own, shards) -> None:
    """The whole of a matrix, out of the parts that all ranks hold."""
    every = [None] * dist.get_world_size()
    mine = own.by_expert(own.parameter.detach())
    dist.all_gather_object(every, (list(shards.held), shards.fold.rank("etp"), own.cut, shards.etp, mine))
    whole = full.by_expert(full.parameter)
    for held, rank, cut, etp, part in every:
        if cut.everywhere:
            whole[held] = part
            continue
        blocks = whole.unflatten(cut.ffn, (cut.blocks, etp, -1))
        blocks.select(cut.ffn + 1, rank)[held] = part.unflatten(cut.ffn, (cut.blocks, -1))


@check
def checkpoints_between_folds_and_one_process():
    reference = built()
    adapted(reference)
    every = folds()
    for at, (fold, how) in enumerate(every):
        mine = built()
        adapted(mine)
        headgate.parallelize(mine, fold, **how)
        headgate.save_checkpoint(folder("lora"), mine)
        for target, options in (every[(at + 1) % len(every)], (None, None)):
            other = built()
            adapted(other, seed=9)
            if target is not None:
                headgate.parallelize(other, target, **options)
            headgate.load_checkpoint(folder("lora"), other)
            if target is not None:
                parts(reference, other, lambda p: p.detach())
            else:
                for p, q in zip(reference.parameters(), other.parameters(), strict=True):
                    close(q.detach(), p.detach(), f"{fold} -> one process")
        dist.barrier()


@check
def what_does_not_go_is_refused_by_name():
    n = dist.get_world_size()
    fold = make_fold(Sizes.of({"dp": n}, {"ep": n}, 1, n))
    some = built()
    headgate.lora(some, R, experts=[1, 2])
    with pytest.raises(ValueError, match=r"LoRA on experts must be on all of a layer, got 2 of layers.0.experts"):
        headgate.parallelize(some, fold)
    mine = built()
    lora = adapted(mine)
    headgate.parallelize(mine, fold)
    with pytest.raises(ValueError, match=r"save: experts must be whole, got layers.0.experts cut over ranks"):
        lora.save(folder("nowhere"))
    with pytest.raises(ValueError, match="place_experts: module must have no LoRA on its experts"):
        headgate.place_experts(mine, None)
    y = mine(torch.arange(2, 8)[None])
    lora.merge()  # an expert is whole on its rank
    close(mine(torch.arange(2, 8)[None]).detach(), y.detach(), "merged")
