"""parallelize on models of transformers, run by test_models.py: loss and gradients of one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from transformers import GptOssConfig, GptOssForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import headgate
from headgate.bench.dispatch.traffic import Traffic
from headgate.dispatch import Fold
from headgate.moe.shards import shards_of

CHECKS = {}
SIZES = dict(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, head_dim=8, num_experts_per_tok=2, max_position_embeddings=32,
)  # fmt: skip


def check(function):
    CHECKS[function.__name__] = function
    return function


def qwen():
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(num_experts=8, moe_intermediate_size=8, **SIZES))


def gpt_oss():
    """Transposed weights, gate and up interleaved, biases."""
    torch.manual_seed(0)
    model = GptOssForCausalLM(GptOssConfig(num_local_experts=8, **SIZES))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "bias" in name:
                p.normal_(std=0.1)
    return model


def equal(make, fold: Fold) -> None:
    size, rank = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(1)
    ids = torch.randint(32, (2 * size, 7))
    whole, mine = make(), headgate.parallelize(make(), fold)
    whole(ids, labels=ids).loss.backward()
    part = slice(2 * rank, 2 * rank + 2)
    mine(ids[part], labels=ids[part]).loss.backward()
    ours = dict(mine.named_parameters())
    for name, p in whole.named_parameters():
        owner, _, leaf = name.rpartition(".")
        shards, expected = shards_of(mine.get_submodule(owner)), p.grad
        if shards is not None:
            expected = shards.cuts[leaf].of(expected, shards.held, shards.etp, shards.fold.rank("etp"))
        error, largest = (ours[name].grad - expected).abs().max().item(), expected.abs().max().item()
        assert error <= 1e-5 * max(largest, 1e-5), f"{fold}: {name}: {error} of {largest}"
    norm = torch.nn.utils.clip_grad_norm_(whole.parameters(), 1e9)
    assert abs(headgate.clip_grad_norm_(mine, 1e9) - norm) < 1e-5 * norm


@check
def models_under_folds_of_their_experts():
    size = dist.get_world_size()
    for make in (qwen, gpt_oss):
        for experts in ({"ep": size}, {"ep": size // 2, "etp": 2}, {"edp": 2, "ep": size // 2}):
            equal(make, Fold({"dp": size}, experts))


@check
def a_model_of_one_process_moves_to_many_and_back():
    size, rank = dist.get_world_size(), dist.get_rank()
    fold = Fold({"dp": size}, {"ep": size // 2, "etp": 2})
    for make in (qwen, gpt_oss):
        whole, mine = make(), headgate.parallelize(make(), fold)
        with torch.no_grad():
            for p in whole.parameters():
                p.add_(torch.arange(p.numel()).view_as(p) % 7 / 100)
        if rank == 0:
            headgate.save_checkpoint("whole", whole)
        dist.barrier()
        headgate.load_checkpoint("whole", mine)
        ids = torch.arange(14).view(2, 7) + rank
        with torch.no_grad():
            torch.testing.assert_close(mine(ids).logits, whole(ids).logits, rtol=1e-5, atol=1e-6)
        headgate.save_checkpoint("many", mine)
        again = make()
        headgate.load_checkpoint("many", again)
        for a, b in zip(whole.parameters(), again.parameters(), strict=True):
            assert torch.equal(a, b)


@check
def padding_costs_no_byte():
    size, rank = dist.get_world_size(), dist.get_rank()
    whole, mine = qwen(), qwen()
    headgate.replace(mine, skip_padding=True)
    headgate.parallelize(mine, Fold({"dp": size}, {"ep": size}))
    torch.manual_seed(1)
    ids, mask = torch.randint(32, (size, 7)), torch.arange(7) < torch.arange(1, size + 1)[:, None]
    here, sent = slice(rank, rank + 1), []
    with torch.no_grad():
        for live in (torch.ones_like(mask), mask, torch.zeros_like(mask)):
            with Traffic() as traffic:
                y = mine(ids[here], attention_mask=live[here]).logits
            there = live[here]
            torch.testing.assert_close(y[there], whole(ids[here], attention_mask=there).logits[there])
            sent.append(traffic.sent.sum())
    assert sent[0] > sent[1] >= sent[2] == 0


@check
def a_swap_cannot_be_undone_once_experts_are_cut():
    mine = headgate.parallelize(qwen(), Fold({"dp": dist.get_world_size()}, {"ep": dist.get_world_size()}))
    with pytest.raises(ValueError, match=r"restore: model.layers.0.mlp.experts must hold all its experts, got one"):
        headgate.restore(mine)
    assert shards_of(mine.model.layers[0].mlp.experts) is not None
