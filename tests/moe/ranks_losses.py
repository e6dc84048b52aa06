"""The checks of losses and capacity on many ranks: what each rank runs (ranks_runner.py), for test_ranks_losses.py.

The truth is always one process that has all tokens, in rank order, and no group.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

from headgate.kernels.routing import Routing
from headgate.kernels.topk import topk
from headgate.moe import BilevelRouter, Capacity, MoE, SigmoidRouter, SoftmaxRouter, TokenRanks
from headgate.moe.capacity import DROPS, limit
from headgate.moe.losses import load_balancing_loss, z_loss

CHECKS: dict[str, Callable[[], None]] = {}
D, E, K = 6, 8, 2
BILEVEL = {"nodes": 4, "topk_nodes": 2, "node_coef": 0.3, "local_coef": 0.7}


def check(function):
    CHECKS[function.__name__] = function
    return function


ROUTERS = {
    "softmax": lambda: SoftmaxRouter(D, E, K, dtype=torch.float64),
    "sigmoid": lambda: SigmoidRouter(D, E, K, dtype=torch.float64),
    "bilevel": lambda: BilevelRouter(
        D, E, K, nodes=4, topk_nodes=2, node_coef=0.3, local_coef=0.7, dtype=torch.float64
    ),
}


def shares() -> dict[str, list[int]]:
    """Tokens of each rank."""
    size = dist.get_world_size()
    uneven = [5, 0, 9, 1][:size]
    return {"even": [6] * size, "uneven": uneven, "the last has all": [0] * (size - 1) + [7], "none": [0] * size}


def close(actual, expected, what, tolerance=1e-12):
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if expected.numel():
        error, size = (actual - expected).abs().max().item(), expected.abs().max().item()
        assert error <= tolerance * size, f"{what}: error {error:.3g} of {size:.3g}"


def summed(t: torch.Tensor) -> torch.Tensor:
    t = t.detach().clone()
    dist.all_reduce(t)
    return t


def same_everywhere(t: torch.Tensor) -> bool:
    everybody = [torch.empty_like(t) for _ in range(dist.get_world_size())]
    dist.all_gather(everybody, t.detach().contiguous())
    return all(torch.equal(t.detach(), other) for other in everybody)


def compare(router: nn.Module, loss: torch.Tensor, whole: torch.Tensor, average: int, what: str) -> None:
    """This rank's `loss` has the value of `whole`, and the ranks' gradients, summed and divided, are its gradient."""
    close(loss.detach(), whole.detach(), f"{what}: value")
    assert same_everywhere(loss), f"{what}: another value on another rank"
    parameters = list(router.parameters())
    got = torch.autograd.grad(loss, parameters, allow_unused=True)
    want = torch.autograd.grad(whole, parameters, allow_unused=True)
    for p, a, b in zip(parameters, got, want, strict=True):
        zero = torch.zeros_like(p)
        close(summed(zero if a is None else a) / average, zero if b is None else b, f"{what}: gradient")


def balance_of_the_whole_batch(name):
    router, rank = ROUTERS[name](), dist.get_rank()
    for average in (dist.get_world_size(), 3):
        ranks = TokenRanks(dist.group.WORLD, average)
        for what, tokens in shares().items():
            x = torch.randn(sum(tokens), D, dtype=torch.float64)
            mine, whole = router(x.split(tokens)[rank]), router(x)
            compare(router, router.balancing_loss(mine, ranks=ranks), router.balancing_loss(whole), average, what)


def balance_of_each_sequence(name):
    """As many sequences as a rank has, as long as they are there; on the first rank of a pair another number of them.

    With pairs: of each sequence a part on each of the two, of different lengths, and on one of them perhaps nothing.
    """
    size, rank, router = dist.get_world_size(), dist.get_rank(), ROUTERS[name]()
    pairs = [dist.new_group([i, i + 1]) for i in range(0, size, 2)]
    lone, paired = TokenRanks(dist.group.WORLD, size), TokenRanks(dist.group.WORLD, size, pairs[rank // 2])
    # holders of sequences -> (number of sequences, length of each part): one part on each rank of a holder
    layouts = {
        "whole": (lone, [(2, [5]), (3, [1]), (0, [0]), (1, [9])][:size]),
        "none": (lone, [(0, [0])] * size),
        "empty": (lone, [(2, [0])] * (size - 1) + [(2, [4])]),
        "cut": (paired, [(3, [4, 2]), (1, [0, 7])][: size // 2]),
        "cut, none here": (paired, [(2, [3, 3]), (0, [0, 0])][: size // 2]),
    }
    for what, (ranks, layout) in layouts.items():
        mine, losses = [], []
        for number, parts in layout:
            x = torch.randn(number, sum(parts), D, dtype=torch.float64)
            mine += [part.flatten(0, 1) for part in x.split(parts, 1)]
            losses += [router.balancing_loss(router(sequence)) for sequence in x if len(sequence)]
        whole = torch.stack(losses).mean() if losses else router.weight.sum() * 0
        number = layout[rank if ranks is lone else rank // 2][0]
        loss = router.balancing_loss(router(mine[rank]), sequences=number, ranks=ranks)
        compare(router, loss, whole, size, what)


@check
def z_loss_of_the_whole_batch():
    router, rank, size = ROUTERS["softmax"](), dist.get_rank(), dist.get_world_size()
    for what, tokens in shares().items():
        x = torch.randn(sum(tokens), D, dtype=torch.float64)
        loss = z_loss(router(x.split(tokens)[rank]), ranks=TokenRanks(dist.group.WORLD, size))
        compare(router, loss, z_loss(router(x)), size, what)


@check
def losses_in_fp32_count_exactly():
    """17 million tokens are more than fp32 can count one by one."""
    rank, tokens = dist.get_rank(), 2**24 + 1
    counts = torch.tensor([tokens, 0] if rank == 0 else [0, tokens], dtype=torch.int32)
    choice = Routing(torch.tensor([[min(rank, 1)]]), torch.ones(1, 1), 2, counts, torch.tensor([[0.25, 0.75]]))
    size = dist.get_world_size()
    loss = load_balancing_loss(choice, ranks=TokenRanks(dist.group.WORLD, size))
    assert loss.dtype == torch.float32
    share = 2 * (0.25 * tokens + 0.75 * tokens * (size - 1)) * size
    assert loss == torch.tensor(share / size**2, dtype=torch.float64).float()


@check
def a_loss_is_one_collective_and_sequences_that_are_cut_are_two():
    router, group = ROUTERS["bilevel"](), dist.group.WORLD
    routing = router(torch.randn(6, D, dtype=torch.float64))

    def collectives(loss, **options):
        with CommDebugMode() as mode:
            loss(routing, **options)
        return mode.get_total_counts()

    alone, cut = TokenRanks(group, 1), TokenRanks(group, 1, group)
    for loss in (router.balancing_loss, load_balancing_loss):
        assert collectives(loss, ranks=alone) == collectives(loss, ranks=cut) == 1
        assert collectives(loss, ranks=alone, sequences=3) == 1
        assert collectives(loss, ranks=cut, sequences=3) == 2
    assert collectives(z_loss, ranks=cut) == 1


# --- the layer ----------------------------------------------------------------------------------------------------


@check
def a_layer_under_ddp_trains_its_router_as_one_process_would():
    size, rank = dist.get_world_size(), dist.get_rank()
    losses = {"load_balancing_coef": 0.3, "z_loss_coef": 0.2, "dtype": torch.float64}
    forms = {  # x [B, S, D] of each rank
        "batch": ({}, [(1, 5), (2, 0), (3, 3), (1, 1)]),
        "global": ({"load_balancing_scope": "global", "load_balancing_group": dist.group.WORLD}, [(1, 5), (1, 2)] * 2),
        "sequence": ({"load_balancing_scope": "sequence"}, [(2, 4), (1, 4), (3, 4), (0, 4)]),
    }
    for router, options in (("softmax", {}), ("bilevel", BILEVEL)):
        for scope, (how, shapes) in forms.items():
            layer = MoE(D, 4, E, K, router=router, router_options=options, **losses, **how)
            ranks = TokenRanks(dist.group.WORLD, size)
            assert layer.token_ranks == (ranks if scope == "global" else None)
            layer.token_ranks = ranks
            one = copy.deepcopy(layer)
            one.token_ranks = None
            xs = [torch.randn(*shape, D, dtype=torch.float64) for shape in shapes[:size]]
            averaged = DistributedDataParallel(layer)
            (averaged(xs[rank]) * 0).sum().backward()
            x = torch.cat([x.reshape(-1, 4 if scope == "sequence" else 1, D) for x in xs])
            (one(x) * 0).sum().backward()
            for (name, p), q in zip(layer.named_parameters(), one.parameters(), strict=True):
                close(p.grad, q.grad, f"{router}, {scope}: {name}")
            for name, loss in one.aux_losses.items():
                close(layer.aux_losses[name], loss, f"{router}, {scope}: {name}")


@check
def a_loss_of_each_ranks_tokens_is_the_mean_of_theirs():
    """Scope "rank": each rank, or each pair that cuts sequences between them, has a batch and a loss of its own."""
    size, rank = dist.get_world_size(), dist.get_rank()
    pairs = [dist.new_group([i, i + 1]) for i in range(0, size, 2)]
    tokens = [5, 2, 9, 1][:size]
    for router, options in (("softmax", {}), ("bilevel", BILEVEL)):
        layer = MoE(D, 4, E, K, router=router, router_options=options, load_balancing_coef=0.3,
                    load_balancing_scope="rank", dtype=torch.float64)  # fmt: skip
        one = copy.deepcopy(layer)
        x = torch.randn(sum(tokens), D, dtype=torch.float64)
        for each, average in ((1, size), (2, size // 2), (2, size)):
            layer.token_ranks = TokenRanks(dist.group.WORLD, average, pairs[rank // 2] if each == 2 else None)
            layer.zero_grad()
            one.zero_grad()
            (layer(x.split(tokens)[rank]) * 0).sum().backward()
            whole = []
            for batch in x.split([sum(tokens[i : i + each]) for i in range(0, size, each)]):
                (one(batch) * 0).sum().backward()
                whole.append(one.aux_losses["load_balancing"])
            parts = size // each
            close(layer.aux_losses["load_balancing"], torch.stack(whole).mean(), f"{router}, {each}: value")
            for (name, p), q in zip(layer.router.named_parameters(), one.router.parameters(), strict=True):
                close(summed(p.grad) / average, q.grad / parts, f"{router}, {each} ranks, {average}: {name}")


@check
def a_layer_cut_along_its_sequences_has_their_losses():
    """The tokens of each sequence all over the ranks, as under context or sequence parallelism."""
    size, rank = dist.get_world_size(), dist.get_rank()
    coefs = {"load_balancing_coef": 0.3, "load_balancing_scope": "sequence", "dtype": torch.float64}
    layer = MoE(D, 4, E, K, **coefs)
    one = copy.deepcopy(layer)
    layer.token_ranks = TokenRanks(dist.group.WORLD, 1, dist.group.WORLD)
    parts = [3, 1, 0, 4][:size]
    x = torch.randn(2, sum(parts), D, dtype=torch.float64)
    (layer(x.split(parts, 1)[rank]) * 0).sum().backward()
    (one(x) * 0).sum().backward()
    close(summed(layer.router.weight.grad), one.router.weight.grad, "router")
    close(layer.aux_losses["load_balancing"], one.aux_losses["load_balancing"], "value")


@check
def ranks_that_make_no_sense_are_refused():
    rank, size = dist.get_rank(), dist.get_world_size()
    with pytest.raises(ValueError, match="TokenRanks: average must be at least 1, got 0"):
        TokenRanks(dist.group.WORLD, 0)
    groups = [dist.new_group([r]) for r in range(size)]
    other = groups[(rank + 1) % size]
    with pytest.raises(ValueError, match=f"TokenRanks: group must contain this rank, got one without rank {rank}"):
        TokenRanks(other, 1)
    with pytest.raises(ValueError, match=f"TokenRanks: sequence must contain this rank, got one without rank {rank}"):
        TokenRanks(dist.group.WORLD, 1, other)


# --- capacity -----------------------------------------------------------------------------------------------------


def choice(tokens: int, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """ids [T, 3] and weights of a lopsided router: many equal weights, some pairs without an expert."""
    ids = (torch.rand(tokens, E) * torch.arange(1, E + 1)).argsort(1, descending=True)[:, :3]
    ids[::5, 0], ids[2::7, 1] = -1, E
    return ids, (torch.rand(tokens, 3) * 6).round().to(dtype) / 6


def limited_by_the_batch(drop):
    size, rank = dist.get_world_size(), dist.get_rank()
    ranks = TokenRanks(dist.group.WORLD, size)
    for dtype in (torch.float64, torch.bfloat16):
        for what, tokens in (shares() | {"many": [40, 33, 0, 21][:size]}).items():
            ids, weights = choice(sum(tokens), dtype)
            for factor in (0.2, 0.75, 1.25):
                one, overflow = limit(Routing.from_topk(ids, weights, E), Capacity(factor, drop))
                own = weights.split(tokens)[rank].clone().requires_grad_()
                routing = Routing.from_topk(ids.split(tokens)[rank], own, E)
                mine, here = limit(routing, Capacity(factor, drop, scope="batch"), ranks)
                assert here.capacity == overflow.capacity, what
                assert torch.equal(mine.expert_ids, one.expert_ids.split(tokens)[rank]), what
                assert torch.equal(mine.weights, one.weights.split(tokens)[rank]), what
                assert torch.equal(summed(mine.counts), one.counts), what
                assert here.dropped == (mine.expert_ids != routing.expert_ids).sum(), what
                assert here.dropped_total == overflow.dropped == summed(here.dropped), what
                assert here.overflowed == overflow.overflowed, what
                if own.numel():
                    (mine.weights * 3).sum().backward()
                    assert torch.equal(own.grad != 0, mine.expert_ids == routing.expert_ids), what
                    assert set(own.grad.flatten().tolist()) <= {0.0, 3.0}, what


@check
def limited_rank_by_rank_counts_what_all_dropped():
    size, rank = dist.get_world_size(), dist.get_rank()
    tokens = [4, 0, 30, 9][:size]
    ids, weights = (t.split(tokens)[rank] for t in choice(sum(tokens)))
    routing = Routing.from_topk(ids, weights, E)
    one, alone = limit(routing, Capacity(0.75))
    mine, here = limit(routing, Capacity(0.75), TokenRanks(dist.group.WORLD, size))
    assert torch.equal(mine.expert_ids, one.expert_ids)
    assert here.dropped == alone.dropped
    assert here.dropped_total == summed(alone.dropped)
    assert here.dropped_total > 0
    assert here.overflowed


@check
def a_layer_hands_its_ranks_to_the_limit():
    size, rank = dist.get_world_size(), dist.get_rank()
    tokens = [9, 0, 30, 1][:size]
    layer = MoE(D, 4, E, K, capacity=Capacity(0.5, scope="batch"), load_balancing_coef=0.1, dtype=torch.float64)
    one = copy.deepcopy(layer)
    layer.token_ranks = TokenRanks(dist.group.WORLD, size)
    x = torch.randn(sum(tokens), D, dtype=torch.float64)
    y, whole = layer(x.split(tokens)[rank]), one(x)
    close(y, whole.split(tokens)[rank], "y")
    assert torch.equal(summed(layer.last_routing.counts), one.last_routing.counts)
    assert layer.last_overflow.dropped_total == one.last_overflow.dropped > 0
    before = load_balancing_loss(topk(one.router.logits(x), K))
    close(layer.aux_losses["load_balancing"], before.detach(), "the loss of the choice before")


for each_name in ROUTERS:
    for each_check in (balance_of_the_whole_batch, balance_of_each_sequence):
        CHECKS[f"{each_name}: {each_check.__name__}"] = lambda f=each_check, n=each_name: f(n)
for each_drop in DROPS:
    CHECKS[f"{each_drop}: limited_by_the_batch"] = lambda d=each_drop: limited_by_the_batch(d)
