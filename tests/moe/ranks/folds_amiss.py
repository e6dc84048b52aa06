"""Checks on many ranks: what does not fit, and what goes wrong. See folds.py."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from folds_cases import D, E, F, check, folder, layer, some_folds, trained
from torch import nn

import headgate
from headgate.dispatch import AllToAll, Fold
from headgate.moe import MoE


@check
def ranks_that_built_another_module_are_named():
    fold, size = some_folds()[1], dist.get_world_size()
    made = layer()
    if dist.get_rank() == size - 1:
        with torch.no_grad():
            made.shared.ffn.w_down[0, 0, 0] += 1
    with pytest.raises(
        ValueError, match=f"shared.ffn.w_down must be the same on every rank, .* on rank {size - 1} and"
    ):
        headgate.parallelize(made, fold)
    assert made.experts.w_down.shape[0] == E
    words = f"dispatcher must be the same on every rank, got 'all_gather' on rank {size - 1} and None on rank 0"
    with pytest.raises(ValueError, match=words):
        headgate.parallelize(layer(), fold, dispatcher="all_gather" if dist.get_rank() == size - 1 else None)


@check
def ranks_that_ask_for_different_folds_are_named():
    size = dist.get_world_size()
    odd = dist.get_rank() == size - 1
    with pytest.raises(
        ValueError, match=f"Fold: (tp|dp) must be .* on rank {size - 1} and {size if size > 2 else '.'} on rank 0"
    ):
        Fold({"tp": size} if odd else {"dp": size}, {"ep": size})
    with pytest.raises(
        ValueError, match=f"Fold: pp must be the same on every rank, got -1 on rank {size - 1} and 1 on"
    ):
        Fold({"dp": size}, {"ep": size}, pp="one" if odd else 1)


def two_with_the_same_weights() -> nn.Module:
    both = nn.Sequential(layer(), layer())
    both[1].experts.w_down = both[0].experts.w_down
    return both


@check
def what_one_rank_finds_amiss_every_rank_hears_of():
    size, odd = dist.get_world_size(), dist.get_rank() == dist.get_world_size() - 1
    fold = some_folds()[1]
    on = "" if odd else rf" \(on rank {size - 1}\)"
    with pytest.raises(ValueError, match=f"activations must be one of sharded, replicated, got 'mixed'{on}$"):
        headgate.parallelize(layer(), fold, activations="mixed" if odd else "sharded")
    frozen = layer()
    frozen.router.weight.requires_grad_(not odd)
    with pytest.raises(ValueError, match=rf"router.weight must be the same .* frozen with .* on rank {size - 1}"):
        headgate.parallelize(frozen, fold)
    turned = layer()
    if odd:
        with torch.no_grad():
            turned.router.weight.copy_(turned.router.weight.flip(0))
    with pytest.raises(ValueError, match=r"router.weight must be the same on every rank"):
        headgate.parallelize(turned, fold)
    mine, _ = trained(fold)
    headgate.save_checkpoint(folder("seen"), mine)
    with pytest.raises(OSError, match=f"path must be a folder that save_checkpoint wrote, got .*nowhere{on}$"):
        headgate.load_checkpoint(folder("nowhere" if odd else "seen"), mine)
    headgate.load_checkpoint(folder("seen"), mine)


@check
def a_backward_pass_that_fails_leaves_nothing_behind():
    fold = some_folds()[1]
    plain = {"load_balancing_coef": 0.0, "z_loss_coef": 0.0}
    mine, other = (headgate.parallelize(layer(**plain), fold) for _ in range(2))
    torch.manual_seed(dist.get_rank())
    x = torch.randn(5, D)

    def fail(grad):
        raise RuntimeError("on purpose")

    broken = mine.router.weight.register_hook(fail)  # after those of the experts and the shared expert
    with pytest.raises(RuntimeError, match="on purpose"):
        mine(x).sum().backward()
    broken.remove()
    mine.zero_grad()
    for m in (mine, other):
        m(x).sum().backward()
    for a, b in zip(mine.parameters(), other.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@check
def parameters_that_came_later_are_noticed():
    mine = headgate.parallelize(layer(), some_folds()[1])
    mine.load_state_dict(mine.state_dict(), assign=True)
    mine.router.weight = nn.Parameter(mine.router.weight.detach().clone())
    with pytest.raises(ValueError, match=r"clip_grad_norm_: module must have the parameters that parallelize saw, got"):
        headgate.clip_grad_norm_(mine, 1.0)
    with pytest.raises(ValueError, match="clip_grad_norm_: max_norm must be a positive number, got -1"):
        headgate.clip_grad_norm_(mine, -1)


@check
def what_cannot_be_cut_is_refused_whole():
    size = dist.get_world_size()
    fold, sliced = Fold({"dp": size}, {"ep": size}), Fold({"dp": size}, {"etp": size})
    trials = [
        (lambda: MoE(D, F, size + 1, 1), fold, {}, f"ep must divide the {size + 1} experts of experts, got ep={size}"),
        (lambda: MoE(D, 17, E, 1), sliced, {}, f"etp must divide 17, a size of experts.w_gate_up, got etp={size}"),
        (lambda: nn.Linear(3, 3), fold, {}, "module must hold experts .*, got a Linear without any"),
        (
            lambda: layer(),
            fold,
            {"dispatcher": "slice_all_reduce"},
            "slice_all_reduce for replicated activations and only",
        ),
        (lambda: layer(), fold, {"wire": "fp4"}, "wire must be one of exact, .*, got 'fp4'"),
        (lambda: layer(), fold, {"ranks_per_node": 0}, "ranks_per_node must be a positive integer or None, got 0"),
        (two_with_the_same_weights, fold, {}, "experts must not share parameters, got 0.experts and 1.experts"),
        (lambda: layer(), fold, {"activations": "mixed"}, "must be one of sharded, replicated, got 'mixed'"),
        (lambda: layer(), fold, {"dispatcher": "magic"}, "dispatcher must be one of .*, got 'magic'"),
        (lambda: layer(), fold, {"activations": "replicated"}, r"must come with ep \* etp == tp, got ep="),
        (lambda: layer(dispatcher=AllToAll()), fold, {}, "experts must have no dispatcher of its own, got AllToAll"),
        (lambda: headgate.parallelize(layer(), fold), fold, {}, "must not be parallelized already"),
    ]
    for make, over, how, words in trials:
        made = make()
        with pytest.raises(ValueError, match=f"^parallelize: .*{words}"):
            headgate.parallelize(made, over, **how)
    with pytest.raises(TypeError, match=r"fold must be a headgate\.Fold, got dict"):
        headgate.parallelize(layer(), {})
    with pytest.raises(TypeError, match="must be copied before"):
        copy.deepcopy(headgate.parallelize(layer(), fold))


@check
def an_impossible_fold_names_the_nearest():
    size = dist.get_world_size()
    rule = r"dp \* cp \* tp must equal edp \* ep \* etp, got dp=3 .* which is 3 and 1; possible: dp="
    with pytest.raises(ValueError, match=rule):
        Fold({"dp": 3})
    rule = f"must be the world's {size} ranks, got .* which is {2 * size}; possible: dp={size} "
    with pytest.raises(ValueError, match=rule):
        Fold({"dp": 2 * size}, {"ep": 2 * size})
    with pytest.raises(ValueError, match="attention must name dp, cp, tp only, got ep"):
        Fold({"ep": 2})
    with pytest.raises(TypeError, match=r"tp must be an integer, got 1\.5"):
        Fold({"tp": 1.5})
    with pytest.raises(ValueError, match="pp must be at least 1, got 0"):
        Fold(pp=0)
