"""The checks of every router over many ranks, which folds.py takes up: with padding, one process's numbers."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from folds_cases import check, compare, some_folds
from ranks_compare import close
from router_cases import fitting
from torch import Tensor, nn

import headgate
from headgate.bench.dispatch.traffic import Traffic
from headgate.dispatch import DISPATCHERS, Fold
from headgate.moe.routers import ROUTERS, SteeredRouter

RANK_BY_RANK = ("expert_choice", "tile", "soft")  # a choice among a rank's own tokens
D, E, K, S, F64 = 16, 8, 2, 5, torch.float64


class Chain(nn.Module):
    """Two layers; what the first one's router says of a token goes to the second one's."""

    def __init__(self, name: str, sizes=8):
        super().__init__()
        torch.manual_seed(3)
        balances = 0.3 * ROUTERS[name].balances * (name not in RANK_BY_RANK)
        z_loss = 0.1 * (name not in RANK_BY_RANK)  # whose batch is a rank here, and z-loss is of all
        options = {"load_balancing_coef": balances, "z_loss_coef": z_loss, "shared_intermediate_size": 4, "dtype": F64}
        self.layers = nn.ModuleList(
            headgate.MoE(D, sizes, E, K, router=fitting(name)(D, E, K, dtype=F64), shared_gate=True, **options)
            for _ in range(2)
        )
        for layer in self.layers:
            layer.budget = None if sizes == 8 else 0.3
            layer.router.train(not layer.router.draws)

    def forward(self, x: Tensor, mask: Tensor, ids: Tensor) -> Tensor:
        router, state = self.layers[0].router, None
        more = {"ids": ids} if router.needs_ids else {}
        for layer in self.layers:
            if router.carries_state:
                y, state = layer(x, mask, state=state)
            else:
                y = layer(x, mask, **more)
            x = x + y
        return x.masked_fill(~mask[..., None], 0)


def as_in_one_process(name: str, fold: Fold, sizes=8, **how) -> None:
    size, rank, average = dist.get_world_size(), dist.get_rank(), fold.size("dp", "cp")
    whole, mine = Chain(name, sizes), headgate.parallelize(Chain(name, sizes), fold, **how)
    torch.manual_seed(11)
    x, g = torch.randn(2, size, S, D, dtype=F64)
    mask, ids = torch.rand(size, S) < 0.7, torch.randint(50, (size, S))
    mask[0] = False  # a rank with nothing but padding
    x[~mask] = torch.nan
    parts = [slice(i, i + 1) for i in range(size)] if name in RANK_BY_RANK else [slice(None)]
    x1, here = x.clone().requires_grad_(), slice(rank, rank + 1)
    y1 = torch.cat([whole(x1[part], mask[part], ids[part]) for part in parts])
    ((y1 * g).sum() / average).backward()
    x2 = x[here].clone().requires_grad_()
    y2 = mine(x2, mask[here], ids[here])
    (y2 * g[here]).sum().backward()
    what = f"{name}, {fold} {how}"
    close(y2, y1[here], f"{what}: y")
    close(x2.grad / average, x1.grad[here], f"{what}: dx")
    zero = lambda p: torch.zeros_like(p) if p.grad is None else p.grad  # noqa: E731
    compare(whole, mine, zero, f"{what}: gradient")
    for one, ours in zip(whole.layers, mine.layers, strict=True):
        for loss, value in one.aux_losses.items():
            if name not in RANK_BY_RANK:
                close(ours.aux_losses[loss], value, f"{what}: {loss}")
    if issubclass(ROUTERS[name], SteeredRouter):
        for model in (whole, mine):
            headgate.update_biases(model)
        for one, ours in zip(whole.layers, mine.layers, strict=True):
            for buffer in one.router.steered:
                close(getattr(ours.router, buffer), getattr(one.router, buffer), f"{what}: {buffer}")


@check
def every_router_with_padding():
    folds = some_folds()
    whole = Fold({"dp": dist.get_world_size()}, {"ep": dist.get_world_size()})  # whose ranks have whole sequences
    for i, name in enumerate(ROUTERS):
        as_in_one_process(name, whole if name in RANK_BY_RANK else folds[i % len(folds)])


@check
def different_sizes_and_slots_of_whole_sequences():
    size = dist.get_world_size()
    as_in_one_process("softmax", Fold({"dp": size}, {"ep": size}), sizes=[8, 3] * 4)
    with pytest.raises(ValueError, match="sequences must be whole on a rank"):
        as_in_one_process("soft", Fold({"dp": size // 2, "cp": 2}, {"ep": size}))


@check
def a_baseline_of_rewards_is_that_of_all_tokens():
    size, rank = dist.get_world_size(), dist.get_rank()
    whole, mine = Chain("reinforce"), headgate.parallelize(Chain("reinforce"), some_folds()[0])
    torch.manual_seed(11)
    x, gain, mask = torch.randn(size, S, D, dtype=F64), torch.randn(size, S), torch.rand(size, S) < 0.6
    for model, part in ((whole, slice(None)), (mine, slice(rank, rank + 1))):
        for layer in model.layers:
            layer.router.train()
        model(x[part], mask[part], mask[part])
        headgate.moe.reward(model, gain[part].flatten())
    for one, ours in zip(whole.layers, mine.layers, strict=True):
        assert one.router.baseline != 0
        close(ours.router.baseline, one.router.baseline, "baseline")


@check
def every_dispatcher_with_every_router():
    """Each router with one of them in turn, and those that leave places empty with all."""
    size = dist.get_world_size()
    fold, names = Fold({"dp": size}, {"ep": size}), [n for n in DISPATCHERS if n not in ("local", "slice_all_reduce")]
    for i, router in enumerate(ROUTERS):
        for name in names if router in ("moepp", "relu") else names[i % len(names) :][:1]:
            as_in_one_process(router, fold, dispatcher=name, ranks_per_node=2)


@check
def experts_that_cost_nothing_send_nothing():
    size = dist.get_world_size()
    for free in (False, True):
        layer = headgate.MoE(D, 8, E, K, router="moepp", router_options={"gate_bias": True}, dtype=F64)
        with torch.no_grad():
            layer.router.gate_bias[:E] = -1e3 if free else 1e3
        layer = headgate.parallelize(layer, Fold({"dp": size}, {"ep": size})).eval()
        with Traffic() as traffic, torch.no_grad():
            y, _ = layer(torch.randn(1, S, D, dtype=F64))
        assert layer.last_routing.counts.sum() == (0 if free else S * K)
        assert y.abs().sum() > 0
        assert (traffic.sent.sum() == 0) == free
