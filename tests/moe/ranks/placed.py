"""The checks of placements on live models, run by test_placed.py: one process's numbers, wherever experts stand."""

from __future__ import annotations

import sys
from pathlib import Path

import folds_cases
import numpy as np
import torch
import torch.distributed as dist
from folds_cases import D, E, compare, layer, make_fold, optimizer_of, train
from placed_cases import CHECKS, check, messages, placement, replicas_are_equal
from ranks_compare import close

import headgate
from headgate.dispatch import Fold
from headgate.dispatch.balanced import Balanced
from headgate.dispatch.fold import Sizes
from headgate.moe.capacity import Capacity
from headgate.placement.live.allot import allot
from headgate.placement.live.choice import Choice

sys.path.append(str(Path(__file__).parent))
import placed_amiss  # noqa: F401  # it adds checks of its own

__all__ = ["CHECKS"]


def folds() -> list[Fold]:
    """ep over all ranks, and half of them with slices or copies of the experts; attention folded otherwise."""
    size = dist.get_world_size()
    sizes = [Sizes(size, 1, 1, 1, size, 1), Sizes(1, 1, size, 1, size // 2, 2), Sizes(1, size, 1, 2, size // 2, 1)]
    return [make_fold(s) for s in (sizes if size > 2 else sizes[:1])]


def once(fold: Fold, spare: int, options=None, replica: str = "home", **how) -> None:
    """Layer, its gradients, their norm and one optimizer step under a random placement, against one process."""
    where = placement(spare, fold.size("ep"), E, spare)

    def also(whole, mine, part, what, of) -> None:
        assert torch.equal(mine.last_routing.expert_ids, whole.last_routing.expert_ids[part]), what
        replicas_are_equal(mine, what, of)

    def prepare(mine) -> None:
        headgate.place_experts(mine, where, replica=replica)

    folds_cases.once(fold, options, prepare=prepare, also=also, **how)


@check
def the_layer_under_random_placements():
    for fold in folds():
        for spare in (0, 1, 3):
            once(fold, spare)


@check
def every_expert_on_every_rank():
    once(folds()[0], E)


@check
def every_dispatcher_by_name():
    for name in ("all_gather", "all_to_all", "hierarchical", "auto"):
        once(folds()[0], 2, dispatcher=name, ranks_per_node=2)


@check
def other_forms_of_layers():
    once(folds()[0], 1, {"gated": False, "activation": "gelu", "bias": False})
    once(folds()[-1], 1, {"capacity": Capacity(0.7, scope="batch")})
    once(folds()[0], 1, fsdp=True)


@check
def replicas_chosen_for_the_whole_batch():
    """The same numbers, and on each slot exactly the rows of the linear program for the counts of all ranks."""
    for fold in folds():
        once(fold, 2, replica="balanced")
    fold, size = folds()[0], dist.get_world_size()
    goal = placement(8, size, E, 3)
    mine = headgate.place_experts(headgate.parallelize(layer(), fold), goal, replica="balanced")
    with torch.no_grad():
        mine(torch.randn(50, D, generator=torch.Generator().manual_seed(dist.get_rank())))
    ids = mine.last_routing.expert_ids
    slots = mine.experts.dispatcher.replicas.slots(ids)
    assert torch.equal(torch.from_numpy(goal.expert_of_slot[0])[slots.long()], ids)
    counts = [torch.bincount(t.flatten(), minlength=n) for t, n in ((ids, E), (slots, goal.expert_of_slot.shape[1]))]
    for total in counts:
        dist.all_reduce(total)
    expected = Choice(goal.expert_of_slot[0], goal.gpu_of_slot).rows(counts[0].numpy())
    assert counts[1].tolist() == expected.tolist()
    headgate.migrate(mine, placement(9, size, E, 3)).__next__()
    assert isinstance(mine.experts.dispatcher.replicas, Balanced)


@check
def padded_shapes():
    """A capacity that makes all messages alike: what an expert takes bounds what a slot takes."""
    fold, options = folds()[0], {"capacity": Capacity(0.7, scope="rank", pad=True)}
    plain, mine = (headgate.parallelize(layer(**options), fold) for _ in range(2))
    headgate.place_experts(mine, placement(6, fold.size("ep"), E, 2))
    torch.manual_seed(dist.get_rank())
    x, g = torch.randn(6, D), torch.randn(6, D)
    results = []
    for m in (plain, mine):
        y = m(x)
        (y * g).sum().backward()
        assert m.last_overflow.dropped > 0
        results.append([y.detach(), m.router.weight.grad, *(p.grad for p in m.shared.parameters())])
    for a, b in zip(*results, strict=True):
        close(b, a, "padded")


@check
def every_degree():
    """What travels to the experts, rows or weights, changes no number."""
    fold = folds()[1 if dist.get_world_size() > 2 else 0]
    mine = headgate.place_experts(headgate.parallelize(layer(), fold), placement(4, fold.size("ep"), E, 2))
    torch.manual_seed(dist.get_rank())
    x, g = torch.randn(6, D, requires_grad=True), torch.randn(6, D)
    results = []
    for degree in sorted({0, 1, fold.size("etp")}):
        headgate.set_degree(mine, degree)
        mine.zero_grad()
        x.grad = None
        y = mine(x)
        (y * g).sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in mine.parameters())])
        for a, b in zip(results[0], results[-1], strict=True):
            close(b, a, f"{fold} r={degree}")


@check
def weights_and_optimizer_state_move_in_mid_training():
    """Plain, three placements with different numbers of slots, plain again: AdamW's steps are those of one process."""
    for fold in folds():
        ep = fold.size("ep")
        ways = [None, placement(1, ep, E), placement(2, ep, E, 2), placement(3, ep, E, 2), None]
        whole, mine = layer(torch.float64), headgate.parallelize(layer(torch.float64), fold)
        optimizers = [optimizer_of(m, 1e-2) for m in (whole, mine)]
        for at, way in enumerate(ways):
            headgate.place_experts(mine, way, optimizer=optimizers[1])
            for step in range(2):
                train(whole, optimizers[0], None, 10 * at + step)
                train(mine, optimizers[1], fold, 10 * at + step)
            what = f"{fold}, placement {at}"
            compare(whole, mine, lambda p: p.detach(), what, 1e-9)
            compare(whole, mine, lambda p: p.grad, f"{what}, gradient", 1e-9)
            for o, m in zip(optimizers, (whole, mine), strict=True):
                assert len(o.state) == len(list(m.parameters()))
            for field in ("exp_avg", "exp_avg_sq"):
                states = {p: kept[field] for o in optimizers for p, kept in o.state.items()}
                compare(whole, mine, states.__getitem__, f"{what}, {field}", 1e-9)
            replicas_are_equal(mine, what)
            optimizers[1].zero_grad()
            optimizers[0].zero_grad()


@check
def gradients_that_add_up():
    """Two backward passes to a step, each synchronised or only the last: the sum over replicas is taken once."""
    fold = folds()[-1]
    plain = {"load_balancing_coef": 0.0, "z_loss_coef": 0.0}
    torch.manual_seed(dist.get_rank())
    x, g = torch.randn(8, D), torch.randn(8, D)
    results = []
    for pause in (None, False, True):
        mine = headgate.parallelize(layer(**plain), fold)
        headgate.place_experts(mine, placement(5, fold.size("ep"), E, 3))
        if pause is None:
            (mine(x) * g).sum().backward()
        else:
            if pause:
                with headgate.no_sync(mine):
                    (mine(x[:4]) * g[:4]).sum().backward()
            else:
                (mine(x[:4]) * g[:4]).sum().backward()
            (mine(x[4:]) * g[4:]).sum().backward()
        results.append([p.grad for p in mine.parameters()])
        for a, b in zip(results[0], results[-1], strict=True):
            close(b, a, f"{fold} {pause}")


@check
def weights_travel_in_one_message():
    """What a rank lacks comes once, all of a layer in one all-to-all; what stands already does not travel."""
    fold = folds()[0]
    ep, rank = fold.size("ep"), fold.rank("ep")
    mine = headgate.parallelize(layer(), fold)
    optimizer = optimizer_of(mine, 1e-2)
    train_once(mine, optimizer)
    for goal in (placement(1, ep, E, 2), placement(2, ep, E, 2)):
        held = set(mine.experts.local_experts)
        with messages() as seen:
            headgate.place_experts(mine, goal, optimizer=optimizer)
        ((sent, received, each),) = seen
        lacking = set(goal.expert_of_slot[0].reshape(ep, -1)[rank].tolist()) - held
        assert sum(received) == len(lacking), (received, lacking)
        assert not sent[rank]
        if sum(sent):  # the weights, and two moments of each
            assert each == 3 * sum(p[0].nbytes for p in mine.experts.parameters())
    with messages() as seen:
        headgate.place_experts(mine, goal, optimizer=optimizer)
    assert seen == []


def train_once(mine, optimizer) -> None:
    mine(torch.randn(8, D)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def compile_the_choice():
    goal, counts = placement(8, 2, E, 3), np.ones((2, E), np.int64)
    rows = Choice(goal.expert_of_slot[0], goal.gpu_of_slot).rows(counts.sum(0))
    allot(counts, rows, goal.expert_of_slot[0], goal.gpu_of_slot, goal.topology.node_of_gpu)


PREPARE = {"replicas_chosen_for_the_whole_batch": compile_the_choice}
