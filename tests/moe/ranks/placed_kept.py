"""The checks of migrations step by step, checkpoints and models of transformers, run by test_placed_kept.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from folds_cases import D, E, compare, folder, layer, make_fold, optimizer_of, some_folds, train
from placed_cases import messages, placement, random_migration, replicas_are_equal
from ranks_compare import close, same_parameters
from torch import nn
from transformers import OlmoeConfig, OlmoeForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import headgate
from headgate.dispatch.fold import Sizes
from headgate.moe.ranks.placed import placement_of
from headgate.moe.shards import shards_of
from headgate.placement.live.migrate import migrate as plan_of
from headgate.placement.traces.trace import Trace
from headgate.placement.walk import walk

CHECKS = {}
SIZES = dict(
    vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=3, num_attention_heads=2,
    num_key_value_heads=2, num_experts_per_tok=2, max_position_embeddings=32,
)  # fmt: skip


def check(function):
    CHECKS[function.__name__] = function
    return function


def olmoe() -> nn.Module:
    torch.manual_seed(0)
    return OlmoeForCausalLM(OlmoeConfig(num_experts=12, pad_token_id=None, eos_token_id=None, **SIZES))


def qwen() -> nn.Module:
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(num_experts=12, moe_intermediate_size=8, head_dim=8, **SIZES))


def everywhere():
    """A fold with ep over all ranks."""
    size = dist.get_world_size()
    return make_fold(Sizes(size, 1, 1, 1, size, 1))


@check
def every_step_of_a_migration_leaves_the_layer_right():
    """Between the steps the layer answers and trains as one process does; the bytes are those on the wire."""
    fold = everywhere()
    ep = fold.size("ep")
    whole, mine = layer(torch.float64), headgate.parallelize(layer(torch.float64), fold)
    headgate.place_experts(mine, placement(1, ep, E, 1))
    optimizers = [optimizer_of(m, 1e-2) for m in (whole, mine)]
    plan = random_migration(2, placement(1, ep, E, 1), 6)
    assert {len(step.moves) for step in plan.steps} == {1, 2}, "there must be replicas that go and experts that swap"
    moving = headgate.migrate(mine, plan, optimizer=optimizers[1])
    torch.manual_seed(dist.get_rank())
    x = torch.randn(9, D, dtype=torch.float64)
    for at in range(len(plan.steps) + 1):
        close(mine(x), whole(x), f"before step {at}", 1e-9)
        train(whole, optimizers[0], None, at)
        train(mine, optimizers[1], fold, at)
        compare(whole, mine, lambda p: p.grad, f"gradient before step {at}", 1e-9)
        compare(whole, mine, lambda p: p.detach(), f"before step {at}", 1e-9)
        replicas_are_equal(mine, f"before step {at}")
        optimizers[1].zero_grad()
        optimizers[0].zero_grad()
        with messages() as seen:
            moved = next(moving, None)
        assert (moved is None) == (at == len(plan.steps))
        if moved is not None:
            assert moved.sent_bytes == sum(sum(sent) * each for sent, _, each in seen)
            copies = sum(m.target_gpu == fold.rank("ep") != m.source_gpu for m in moved.moves)
            each = 3 * sum(p[0].nbytes for p in mine.experts.parameters())
            assert moved.received_bytes == copies * each
    assert (placement_of(mine).expert_of_slot == plan.target.expert_of_slot).all()


@check
def a_model_migrates_with_the_fewest_bytes():
    """From one random placement to another, in steps of three experts at most: logits stay, each rank gets what it
    lacks, and keeps what it has where it is."""
    fold, size, rank = everywhere(), dist.get_world_size(), dist.get_rank()
    mine, whole = headgate.parallelize(olmoe(), fold), olmoe()
    now, then = (placement(seed, size, 12, 1, layers=3) for seed in (3, 4))
    headgate.place_experts(mine, now)
    optimizer = torch.optim.SGD(mine.parameters(), lr=0.1, momentum=0.9)
    ids = torch.randint(32, (2, 7), generator=torch.Generator().manual_seed(rank))
    mine(ids).logits.square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    headgate.save_checkpoint(folder("migrating"), mine)
    headgate.load_checkpoint(folder("migrating"), whole)
    each = 2 * sum(p[0].nbytes for p in mine.model.layers[0].mlp.experts.parameters())
    pointers = [p.data_ptr() for p in mine.parameters()]
    received, biggest = 0, 0
    for moved in headgate.migrate(mine, then, optimizer=optimizer, max_bytes=3 * each):
        received += moved.received_bytes
        biggest = max(biggest, len(moved.moves))
        with torch.no_grad():
            torch.testing.assert_close(mine(ids).logits, whole(ids).logits, rtol=1e-5, atol=1e-6)
    lacking = 0
    for before, after in zip(now.expert_of_slot, then.expert_of_slot, strict=True):
        here, there = (set(slots.reshape(size, -1)[rank].tolist()) for slots in (before, after))
        lacking += len(there - here)
    assert received == lacking * each
    assert 1 < biggest < max(len(step.moves) for step in plan_of(now, then).steps)
    assert pointers == [p.data_ptr() for p in mine.parameters()]
    for a, b in zip(placement_of(mine).expert_of_slot, then.expert_of_slot, strict=True):
        assert (np.sort(a.reshape(size, -1), 1) == np.sort(b.reshape(size, -1), 1)).all()


@check
def a_checkpoint_moves_between_placements_and_folds():
    fold = everywhere()
    ep = fold.size("ep")
    ways = [placement(1, ep, E, 2), None, placement(2, ep, E)]
    reference = layer(torch.float64)
    reference_optimizer = optimizer_of(reference, 1e-2)
    for step in range(2):
        train(reference, reference_optimizer, None, step)
    saved = [p.detach().clone() for p in reference.parameters()]
    train(reference, reference_optimizer, None, 2)
    targets = [(None, None), (some_folds()[2], None), *((fold, way) for way in ways)]
    for way in ways[::2] if ep == 2 else ways[:1]:
        mine = headgate.place_experts(headgate.parallelize(layer(torch.float64), fold), way)
        optimizer = optimizer_of(mine, 1e-2)
        for step in range(2):
            train(mine, optimizer, fold, step)
        headgate.save_checkpoint(folder("placed"), mine, optimizer, extra={"step": 2})
        for target, there in targets:
            other = layer(torch.float64, seed=5)
            if target is not None:
                headgate.parallelize(other, target)
            if there is not None:
                headgate.place_experts(other, there)
            fresh = optimizer_of(other, 1.0)
            assert headgate.load_checkpoint(folder("placed"), other, fresh) == {"step": 2}
            if target is None:
                for a, b in zip(saved, other.parameters(), strict=True):
                    close(b.detach(), a, "one process", 1e-9)
            train(other, fresh, target, 2)
            compare(reference, other, lambda p: p.detach(), f"{way} -> {target} {there}", 1e-9)
            replicas_are_equal(other, f"{way} -> {target} {there}")
        dist.barrier()


@check
def a_checkpoint_holds_each_expert_once():
    fold = everywhere()
    mine = headgate.place_experts(headgate.parallelize(layer(), fold), placement(1, fold.size("ep"), E, 3))
    headgate.save_checkpoint(folder("once"), mine)
    found = dcp.FileSystemReader(folder("once")).read_metadata().state_dict_metadata
    held = {key: kept for key, kept in found.items() if key.startswith("model/") and "experts." in key}
    assert len(held) == 6  # gate and up rows apart, of weights and biases
    for key, kept in held.items():
        assert kept.size[0] == E
        assert sorted(chunk.offsets[0] for chunk in kept.chunks) == list(range(E)), key
        assert sum(chunk.sizes.numel() for chunk in kept.chunks) == kept.size.numel(), key
    dist.barrier()


@check
def models_of_transformers():
    """Loss, gradients and their norm of one process, placed with replicas."""
    fold, size, rank = everywhere(), dist.get_world_size(), dist.get_rank()
    for make in (olmoe, qwen):
        torch.manual_seed(1)
        ids = torch.randint(32, (2 * size, 7))
        whole, mine = make(), headgate.parallelize(make(), fold)
        headgate.place_experts(mine, placement(3, size, 12, 1, layers=3))
        whole(ids, labels=ids).loss.backward()
        part = slice(2 * rank, 2 * rank + 2)
        mine(ids[part], labels=ids[part]).loss.backward()
        same_parameters(whole, mine, lambda p: p.grad, make.__name__)
        norm = torch.nn.utils.clip_grad_norm_(whole.parameters(), 1e9)
        assert abs(headgate.clip_grad_norm_(mine, 1e9) - norm) < 1e-5 * norm


@check
def rows_on_the_wire_are_those_of_the_walk():
    """What each rank really sends each other, layer by layer, and what the walk of the recorded routing counts."""
    fold, size, rank = everywhere(), dist.get_world_size(), dist.get_rank()
    goal = placement(7, size, 12, 2, layers=3)
    mine = headgate.parallelize(olmoe(), fold, dispatcher="all_to_all")
    headgate.place_experts(mine, goal)
    ids = torch.randint(32, (3, 5 + rank), generator=torch.Generator().manual_seed(rank))
    with torch.no_grad():
        trace = headgate.record(mine, ids)
        with messages() as seen:
            mine(ids)
    assert len(seen) == 3 * 3  # in each layer the counts, rows there, rows back
    rows = np.array([sent for at, (sent, _, _) in enumerate(seen) if at % 3 == 1])
    everybody = [None] * size
    dist.all_gather_object(everybody, (trace.expert_ids, rows))
    tokens = np.concatenate([ids for ids, _ in everybody], 1)
    homes = np.repeat(np.arange(size), [ids.shape[1] for ids, _ in everybody])
    cost = walk(Trace(tokens, 12), goal, homes=homes)
    counted = np.stack([rows for _, rows in everybody], 1)  # [L, G, G]
    assert counted.sum() > 0
    np.testing.assert_array_equal(counted, cost.rows)
    back = np.array([received for at, (_, received, _) in enumerate(seen) if at % 3 == 2])
    np.testing.assert_array_equal(back, cost.back[:, :, rank])


@check
def a_model_restored_to_the_plain_layout():
    fold, size = everywhere(), dist.get_world_size()
    mine, plain = (headgate.parallelize(olmoe(), fold) for _ in range(2))
    headgate.place_experts(mine, placement(3, size, 12, 1, layers=3))
    headgate.place_experts(mine, None)
    for (name, a), b in zip(mine.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert shards_of(mine.model.layers[0].mlp.experts).placement is None
    assert (placement_of(mine).expert_of_slot == np.arange(12)).all()


@check
def a_backward_pass_to_come_is_noticed():
    """Its gradients would be those of other experts; with weights that travel too (r = 1), of which it has copies."""
    size = dist.get_world_size()
    cases = [(everywhere(), 0), (everywhere(), 1)]  # in place, and with new parameters
    if size > 2:
        sliced = make_fold(Sizes(size, 1, 1, 1, size // 2, 2))
        cases += [(sliced, 0), (sliced, 1)]
    for fold, spare in cases:
        mine = headgate.parallelize(layer(), fold)
        headgate.set_degree(mine, 1)
        y = mine(torch.randn(4, D))
        headgate.place_experts(mine, placement(1, fold.size("ep"), E, spare))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
        dist.barrier()


def compile_the_walk():
    walk(Trace(np.zeros((3, 4, 2), np.uint8), 12), placement(7, 2, 12, 2, layers=3), homes=np.array([0, 0, 1, 1]))


PREPARE = {"rows_on_the_wire_are_those_of_the_walk": compile_the_walk}
