"""The checks of parallelize on many ranks, run by test_folds.py: one process's numbers under every fold."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from folds_cases import CHECKS, D, E, K, check, compare, layer, make_fold, once, parts, some_folds
from func_transforms import ONE
from ranks_compare import close
from torch.distributed.tensor.debug import CommDebugMode

import headgate
from headgate.dispatch import DISPATCHERS, Fold
from headgate.kernels.routing import Routing
from headgate.moe.capacity import Capacity
from headgate.moe.ranks.sync import local

sys.path.append(str(Path(__file__).parent))
import folds_amiss  # noqa: F401  # they add checks of their own
import folds_overlap  # noqa: F401
import folds_routers  # noqa: F401

__all__ = ["CHECKS"]


@check
def the_layer_under_every_fold():
    for sizes in Fold.possible(dist.get_world_size()):
        once(make_fold(sizes))


@check
def other_forms_of_layers():
    for options in (
        {"gated": False, "activation": "gelu"},
        {"bias": False, "shared_intermediate_size": 0},
        {"weights_on_input": True, "latent_size": 4},
    ):
        for fold in some_folds():
            once(fold, options)


@check
def tokens_dropped_or_not():
    """The capacity of the whole batch: the same pairs go as in one process."""
    for drop in ("weight", "choice"):
        for sizes in list(Fold.possible(dist.get_world_size()))[:: 1 if dist.get_world_size() < 4 else 5]:
            once(make_fold(sizes), {"capacity": Capacity(0.7, drop=drop, scope="batch")})


@check
def a_balancing_loss_of_each_tp_x_cp_group():
    """Megatron's aux_loss: the ranks of one dp have a batch of their own."""
    how = {"load_balancing_scope": "rank", "z_loss_coef": 0.0}
    for fold in some_folds():
        whole, mine = layer(**how), headgate.parallelize(layer(**how), fold)
        torch.manual_seed(11)
        x, dp, losses = torch.randn(dist.get_world_size(), 5, D), fold.size("dp"), []
        (mine(x[dist.get_rank()]) * 0).sum().backward()
        for tokens in x.view(dp, -1, D):
            (whole(tokens) * 0).sum().backward()
            losses.append(whole.aux_losses["load_balancing"])
        close(mine.aux_losses["load_balancing"], torch.stack(losses).mean(), f"{fold}: value")
        close(mine.router.weight.grad, whole.router.weight.grad / dp, f"{fold}: gradient")


@check
def two_levels_of_routing():
    for fold in some_folds():
        once(fold, {"router": "bilevel", "router_options": {"nodes": 4, "topk_nodes": 3}, "bias": False})


@check
def every_dispatcher_by_name():
    size = dist.get_world_size()
    on_input = {"weights_on_input": True, "bias": False}
    for fold, options in (
        (Fold({"dp": size}, {"ep": size}), on_input),
        (Fold({"tp": size}, {"ep": size // 2, "etp": 2}), {}),
    ):
        for name in DISPATCHERS:
            if name not in ("local", "slice_all_reduce"):
                once(fold, options, dispatcher=name, ranks_per_node=2)


@check
def biases_of_a_model_follow_the_load_of_all_ranks():
    """update_biases after each optimizer step: the steps of one process, in one all-reduce for all layers."""
    options = {"router": "sigmoid", "router_options": {"bias_rate": 0.1}}
    for fold in some_folds():
        models = [torch.nn.Sequential(layer(**options), layer(seed=4, **options)) for _ in range(2)]
        whole, mine = models[0], headgate.parallelize(models[1], fold)
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.0) for m in (whole, mine)]
        for model, optimizer in zip((whole, mine), optimizers, strict=True):
            headgate.update_biases(model, optimizer)
        torch.manual_seed(11)
        for _step in range(2):
            for _micro in range(2):
                x = torch.randn(dist.get_world_size(), 5, D)
                whole(x).sum().backward()
                mine(x[dist.get_rank()]).sum().backward()
            with CommDebugMode() as mode:
                optimizers[1].step()
            assert mode.get_total_counts() == 1
            optimizers[0].step()
            for one, here in zip(whole, mine, strict=True):
                assert one.router.expert_bias.abs().max() > 0
                assert torch.equal(one.router.expert_bias, here.router.expert_bias), f"{fold}"


@check
def biases_under_ddp_go_by_a_group_that_is_given():
    options = {"router": "sigmoid", "router_options": {"bias_rate": 0.1}}
    whole, mine = layer(**options), layer(**options)
    torch.manual_seed(11)
    x = torch.randn(dist.get_world_size(), 5, D)
    whole(x)
    mine(x[dist.get_rank()])
    headgate.update_biases(whole)
    headgate.update_biases(mine, group=dist.group.WORLD)
    assert torch.equal(whole.router.expert_bias, mine.router.expert_bias)


def replicated(fold: Fold, options=None, **how) -> None:
    """Every rank of tp passes the same tokens: gradients are those of one process with each token once."""
    tp, average = fold.size("tp"), fold.size("dp", "cp")
    torch.manual_seed(11)
    x, g = torch.randn(7 * average, D), torch.randn(7 * average, D)
    whole, mine = (layer(**(options or {})) for _ in range(2))
    headgate.parallelize(mine, fold, activations="replicated", **how)
    x1 = x.clone().requires_grad_()
    y1 = whole(x1)
    ((y1 * g).sum() / average).backward()
    part = parts([7] * average)[dist.get_rank() // tp]
    x2 = x[part].clone().requires_grad_()
    y2 = mine(x2)
    (y2 * g[part]).sum().backward()
    close(y2, y1[part], f"{fold}: y")
    close(x2.grad / average, x1.grad[part], f"{fold}: dx")
    compare(whole, mine, lambda p: p.grad, f"{fold}: gradient")
    norm = torch.nn.utils.clip_grad_norm_(whole.parameters(), 0.5)
    close(headgate.clip_grad_norm_(mine, 0.5).float(), norm, f"{fold}: norm")


@check
def replicated_activations():
    for sizes in Fold.possible(dist.get_world_size()):
        if sizes.ep * sizes.etp == sizes.tp:
            replicated(make_fold(sizes))
    size = dist.get_world_size()
    replicated(Fold({"tp": size}, {"ep": size}), {"weights_on_input": True, "latent_size": 4})


@check
def sharded_by_fsdp():
    for fold in some_folds():
        once(fold, fsdp=True)


def folds_with_tp() -> list[Fold]:
    return [fold for fold in map(make_fold, Fold.possible(dist.get_world_size())) if fold.size("tp") > 1]


@check
def shared_experts_cut_over_tp():
    """Each rank of tp has F / tp of the shared expert, whatever the fold of the routed ones: the ways take turns."""
    ways = ({}, {}), ({"shared_gate": True, "bias": False}, {}), ({}, {"fsdp": True})
    for i, fold in enumerate(folds_with_tp()):
        options, how = ways[i % len(ways)]
        once(fold, options, cut_shared=True, **how)
        s = fold.sizes
        if s.ep * s.etp == s.tp:
            replicated(fold, cut_shared=True)
    mine = headgate.parallelize(layer(), fold, cut_shared=True)
    assert mine.shared.ffn.w_down.shape == (1, D, 8 // fold.size("tp"))
    size = dist.get_world_size()
    whole = headgate.parallelize(layer(), Fold({"dp": size}, {"ep": size}), cut_shared=True)
    assert whole.shared.ffn.w_down.shape == (1, D, 8)


@check
def shared_experts_that_cannot_be_cut_are_refused():
    size = dist.get_world_size()
    fold = Fold({"tp": size}, {"ep": size})
    with pytest.raises(ValueError, match=r"tp must divide 5, a size of shared.ffn.w_gate_up, got tp="):
        headgate.parallelize(layer(shared_intermediate_size=5), fold, cut_shared=True)
    with pytest.raises(ValueError, match="cut_shared must come with shared experts, got a MoE without any"):
        headgate.parallelize(layer(shared_intermediate_size=0), fold, cut_shared=True)


@check
def a_switch_of_degree_moves_no_weight_and_changes_no_number():
    size = dist.get_world_size()
    for experts in ({"etp": size}, {"ep": size // 2, "etp": 2}, {"edp": size // 2, "etp": 2}, {"ep": size}):
        fold = Fold({"dp": size}, experts)
        mine = headgate.parallelize(layer(), fold)
        torch.manual_seed(dist.get_rank())
        x, g = torch.randn(6, D, requires_grad=True), torch.randn(6, D)
        before, results = [p.data_ptr() for p in mine.parameters()], []
        etp = fold.size("etp")
        for degree in (etp, *(r for r in range(etp) if r == 0 or etp % r == 0), etp):
            headgate.set_degree(mine, degree)
            mine.zero_grad()
            x.grad = None
            y = mine(x)
            (y * g).sum().backward()
            results.append([y.detach(), x.grad, *(p.grad for p in mine.parameters())])
            assert [p.data_ptr() for p in mine.parameters()] == before
            for a, b in zip(results[0], results[-1], strict=True):
                close(b, a, f"{fold} r={degree}")
        with pytest.raises(ValueError, match=f"set_degree: degree must be 0 or divide etp = {etp}, got 3"):
            headgate.set_degree(mine, 3)


@check
def transforms_are_refused_by_name():
    """Whether rows travel or weights, experts' or only the losses' numbers."""
    size, x = dist.get_world_size(), torch.randn(4, D)
    mine = headgate.parallelize(layer(), make_fold(Fold({"dp": size}, {"etp": size}).sizes))
    balanced = layer(load_balancing_scope="global", load_balancing_group=dist.group.WORLD)
    for who, made, degree in (("AllGather", mine, size), ("parallelize", mine, 0), ("TokenRanks", balanced, None)):
        if degree is not None:
            headgate.set_degree(made, degree)
        for name in ("grad", "jvp"):
            with pytest.raises(NotImplementedError, match=f"{who}: tensors must not be those of a transform"):
                ONE[name](made, (x,))


@check
def a_degree_says_what_travels():
    """r = 0: weights only; r = etp: rows only."""
    size = dist.get_world_size()
    mine = headgate.parallelize(layer(bias=False), Fold({"dp": size}, {"etp": size}))
    routing = Routing.from_topk(torch.zeros(4, K, dtype=torch.int64), torch.ones(4, K), E)
    for degree, expected in ((size, {"all_gather": 2, "reduce_scatter": 1}), (0, {"all_gather": 2})):
        headgate.set_degree(mine, degree)
        with CommDebugMode() as mode, torch.no_grad():
            mine.experts(torch.zeros(4, D), routing)
        found: dict[str, int] = {}
        for op, n in mode.get_comm_counts().items():
            name = str(op).split(".")[-1].replace("_into_tensor", "").replace("_tensor", "")
            found[name] = found.get(name, 0) + n
        assert found == expected, f"r={degree}: {found}"


@check
def the_degree_follows_the_rows():
    """Few rows travel themselves; many leave the weights to travel. All ranks choose alike, and say why."""
    size = dist.get_world_size()
    mine = headgate.parallelize(layer(), Fold({"dp": size}, {"etp": size}))
    shards = mine.experts.dispatcher
    shards._every = 1
    for tokens, expected in ((1 if dist.get_rank() else 3, size), (3000, 1), (0, size)):
        mine(torch.randn(tokens, D))
        assert shards.degree == expected, shards.why()
        assert f"taken: r = {expected}" in shards.why()
    whole = layer()
    torch.manual_seed(dist.get_rank())
    for tokens in (3, 3000):
        x = torch.randn(tokens, D)
        close(mine(x), whole(x), f"{tokens} tokens, r = {shards.degree}")


@check
def gradients_that_add_up():
    """Two backward passes to a step, synchronised each or only at the last: one with both batches."""
    whole, halves = [slice(0, 8)], [slice(0, 4), slice(4, 8)]
    plain = {"load_balancing_coef": 0.0, "z_loss_coef": 0.0}  # two half batches balance otherwise than a whole one
    for fold in some_folds():
        for how in ({}, {"fsdp": True}):
            torch.manual_seed(dist.get_rank())
            x, g = torch.randn(8, D), torch.randn(8, D)
            results = []
            for pause, pieces in ((False, whole), (False, halves), (True, halves)):
                mine = headgate.parallelize(layer(**plain), fold, **how)
                for piece in pieces:
                    quiet = pause and piece is not pieces[-1]
                    with headgate.no_sync(mine) if quiet else contextlib.nullcontext():
                        (mine(x[piece]) * g[piece]).sum().backward()
                results.append([local(p.grad) for p in mine.parameters()])
            for other in results[1:]:
                for a, b in zip(results[0], other, strict=True):
                    close(b, a, f"{fold} {how}")
