"""Checks on many ranks: placements that do not fit, and ranks that disagree. See placed.py."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from folds_cases import D, E, layer, make_fold, optimizer_of
from placed_cases import check, placement, random_migration
from torch import nn

import headgate
from headgate.dispatch.fold import Sizes
from headgate.placement.cluster.topology import Topology
from headgate.placement.live.migrate import Migration, Step, migrate
from headgate.placement.placement import Placement


def placed(seed=1, spare=1, **how):
    size = dist.get_world_size()
    mine = headgate.parallelize(layer(), make_fold(Sizes(size, 1, 1, 1, size, 1)), **how)
    return headgate.place_experts(mine, placement(seed, size, E, spare))


def state(mine) -> list:
    return [*(p.detach().clone() for p in mine.parameters()), torch.tensor(list(mine.experts.local_experts))]


@check
def what_does_not_fit_is_refused_before_anything_moves():
    size = dist.get_world_size()
    good = placement(2, size, E, 1)
    uneven = np.concatenate([[0], np.arange(E)])
    slots = np.full(size, E // size)
    slots[0] += 1
    if 0 in uneven[1 : slots[0]]:
        uneven = np.concatenate([[E - 1], np.arange(E)])
    trials = [
        (placement(2, size, E, layers=2), "placement must have the module's 1 layers of experts, got 2"),
        (placement(2, size, 2 * E), f"placement must have {E} experts, got {2 * E}"),
        (placement(2, 2 * size, E), f"placement must have ep = {size} GPUs, got {2 * size}"),
        (
            Placement(uneven[None], E, Topology(1, size), slots),
            r"placement must have as many slots on each GPU, got \[",
        ),
    ]
    mine = placed()
    before = state(mine)
    for bad, words in trials:
        with pytest.raises(ValueError, match=f"^place_experts: {words}"):
            headgate.place_experts(mine, bad)
    with pytest.raises(TypeError, match=r"^place_experts: placement must be a Placement or None, got dict"):
        headgate.place_experts(mine, {})
    with pytest.raises(ValueError, match=r"^place_experts: replica must be one of home, balanced, got 'follow'"):
        headgate.place_experts(mine, good, replica="follow")
    with pytest.raises(TypeError, match=r"^place_experts: optimizer must be a torch\.optim\.Optimizer, got dict"):
        headgate.place_experts(mine, good, optimizer={})
    with pytest.raises(ValueError, match=r"must hold the module's experts, got one without experts\.w_gate_up"):
        headgate.place_experts(mine, good, optimizer=torch.optim.SGD(mine.router.parameters()))
    mine(torch.randn(3, D)).sum().backward()
    with pytest.raises(ValueError, match=r"gradients must be None \(zero_grad\), got one of experts.w_gate_up"):
        headgate.place_experts(mine, good)
    adafactor = torch.optim.Adafactor(mine.parameters())
    adafactor.step()
    before = state(mine)
    adafactor.zero_grad()
    with pytest.raises(ValueError, match="optimizer must keep numbers or tensors of the parameter's shape for experts"):
        headgate.place_experts(mine, good, optimizer=adafactor)
    for a, b in zip(before, state(mine), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="must be parallelized"):
        headgate.place_experts(layer(), good)


@check
def replicas_need_tokens_of_their_own():
    size = dist.get_world_size()
    fold = make_fold(Sizes(1, 1, size, 1, size, 1))
    mine = headgate.parallelize(layer(), fold, activations="replicated")
    with pytest.raises(ValueError, match="placement must have no replicas where activations are replicated, got some"):
        headgate.place_experts(mine, placement(1, size, E, 1))
    torch.manual_seed(1)
    x = torch.randn(5, D)
    whole = layer()
    headgate.place_experts(mine, placement(1, size, E))
    torch.testing.assert_close(mine(x), whole(x), rtol=1e-5, atol=1e-6)


@check
def experts_sharded_over_edp_are_refused():
    size = dist.get_world_size()
    fold = make_fold(Sizes(size, 1, 1, size // 2, 2, 1))
    mine = headgate.parallelize(layer(), fold, fsdp=True)
    if size > 2:
        with pytest.raises(ValueError, match=r"experts must not be sharded by fsdp over edp, got experts.w_gate_up"):
            headgate.place_experts(mine, placement(1, 2, E))
    else:  # one copy of the experts: nothing of them is sharded
        headgate.place_experts(mine, placement(1, 2, E, 1))
        x = torch.randn(5, D)
        torch.testing.assert_close(mine(x), layer()(x), rtol=1e-5, atol=1e-6)


@check
def a_rank_with_another_placement_is_named():
    size, odd = dist.get_world_size(), dist.get_rank() == dist.get_world_size() - 1
    mine = placed()
    before = state(mine)
    words = rf"^place_experts: placement must be the same on every rank, got another on rank {size - 1} than on rank 0$"
    with pytest.raises(ValueError, match=words):
        headgate.place_experts(mine, placement(3 if odd else 2, size, E, 1))
    with pytest.raises(ValueError, match=words):
        headgate.place_experts(mine, placement(2, size, E, 1), replica="balanced" if odd else "home")
    on = "" if odd else rf" \(on rank {size - 1}\)"
    with pytest.raises(ValueError, match=f"^place_experts: placement must have {E} experts, got {2 * E}{on}$"):
        headgate.place_experts(mine, placement(2, size, 2 * E if odd else E, 1))
    optimizer = optimizer_of(mine, 1e-2)
    mine(torch.randn(3, D)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    before = state(mine)
    with pytest.raises(ValueError, match=f"optimizer must be the same on every rank, got another on rank {size - 1}"):
        headgate.place_experts(mine, placement(2, size, E, 1), optimizer=None if odd else optimizer)
    plan = migrate(placement(1, size, E, 1), placement(2, size, E, 1))
    turned = replace(plan, steps=(Step(0, plan.steps[0].moves[::-1]),))
    with pytest.raises(ValueError, match=f"placement must be the same on every rank, got another on rank {size - 1}"):
        headgate.migrate(mine, turned if odd else plan)
    for a, b in zip(before, state(mine), strict=True):
        assert torch.equal(a, b)


@check
def plans_that_do_not_fit_are_refused():
    size = dist.get_world_size()
    mine = placed()
    before = state(mine)
    now, then = placement(1, size, E, 1), placement(2, size, E, 1)
    plan = migrate(now, then)
    first = plan.steps[0].moves[0]
    wrong = replace(first, expert=(first.expert + 1) % E)
    nowhere = replace(first, source_gpu=first.target_gpu)
    trials = [
        (
            replace(plan, source=then),
            "target must be a plan that starts where the experts stand, got one from",
        ),
        (replace(plan, steps=()), "steps must lead to the plan's target, got others"),
        (replace(plan, steps=(Step(0, (wrong,)),)), "moves must take experts from where they stand .*, got Move"),
        (replace(plan, steps=(Step(0, (nowhere,)),)), "moves must take experts from where they stand .*, got Move"),
        (placement(2, size, E, 2), "slots_of_gpu of target must be those of source"),
        (Placement(then.expert_of_slot, E, Topology(size, 1)), "nodes of target must be those of source, .* got"),
    ]
    for target, words in trials:
        with pytest.raises(ValueError, match=f"^migrate: {words}"):
            headgate.migrate(mine, target)
    with pytest.raises(TypeError, match=r"^migrate: target must be a Placement or a Migration, got NoneType"):
        headgate.migrate(mine, None)
    with pytest.raises(ValueError, match=r"^migrate: max_bytes must be at least an expert's \d+, got 1"):
        headgate.migrate(mine, then, max_bytes=1)
    lost = Migration(now, then, (Step(0, tuple(m for m in plan.steps[0].moves if m is not first)),))
    with pytest.raises(ValueError, match=r"(Placement: |migrate: steps must lead)"):
        headgate.migrate(mine, lost)
    for a, b in zip(before, state(mine), strict=True):
        assert torch.equal(a, b)
    both = nn.Sequential(layer(), headgate.MoE(D, 4, 2 * E, 2))
    headgate.parallelize(both, make_fold(Sizes(size, 1, 1, 1, size, 1)))
    with pytest.raises(ValueError, match=r"layers must be alike in experts and slots, got \[\(16, 16\), \(32, 32\)\]"):
        headgate.place_experts(both, placement(1, size, E, layers=2))


@check
def what_happens_between_two_steps_is_seen():
    """Gradients that stand there when the next step comes are an error on every rank, and nothing is lost."""
    size = dist.get_world_size()
    whole, mine = layer(), placed()
    moving = headgate.migrate(mine, random_migration(1, placement(1, size, E, 1), 2))
    next(moving)
    mine(torch.randn(3, D)).sum().backward()
    with pytest.raises(ValueError, match=r"gradients must be None \(zero_grad\), got one of experts\.w_gate_up"):
        next(moving)
    x = torch.randn(5, D)
    torch.testing.assert_close(mine(x), whole(x), rtol=1e-5, atol=1e-6)
    mine.zero_grad()
    moving = headgate.migrate(mine, placement(5, size, E, 1))
    headgate.place_experts(mine, placement(6, size, E, 1))
    with pytest.raises(ValueError, match="migrate: experts must stand where the step before left them, got others in"):
        next(moving)
