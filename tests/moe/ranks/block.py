"""Attention and experts together on many ranks, run by test_block.py: one process's numbers under every fold."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from folds_cases import make_fold
from ranks_compare import close, norm, same_parameters
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import headgate
from headgate.dispatch import Fold
from headgate.dispatch.fold import Sizes
from headgate.dispatch.ulysses import ulysses

CHECKS = {}
D, HEADS, FFN, E, K, B, S = 16, 8, 8, 8, 3, 8, 16
SOME_OF_8 = 3  # every so many of the 100 folds of 8 ranks: all were compared by hand, with 1


def fold_of(attention: dict[str, int], experts: dict[str, int], pp: int = 1) -> Fold:
    return make_fold(Sizes.of(attention, experts, pp, dist.get_world_size()))


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
        options = dict(shared_intermediate_size=4, shared_gate=True, load_balancing_coef=0.5, z_loss_coef=0.1)
        self.moe = headgate.MoE(D, FFN, E, K, router_options={"renormalize": True}, **options)

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
    for one, other in zip(whole, mine, strict=True):
        for name, loss in one.moe.aux_losses.items():
            close(other.moe.aux_losses[name], loss, f"{fold}: {name}")
    compare(whole, mine, str(fold))


@check
def the_block_alone():
    world = dist.get_world_size()
    once(fold_of({"cp": 2, "tp": world // 2}, {"ep": 2, "etp": world // 2}), layers=1)


@check
def the_model_under_some_folds():
    """Of 4 ranks: 6 ways of attention times 6 of experts, in steps of 5 that meet each of them."""
    every = list(Fold.possible(dist.get_world_size()))
    for sizes in every[::5]:
        once(make_fold(sizes))


@check
def the_model_under_every_fold():
    """Of 8 ranks some: 10 ways of attention times 10 of experts, in steps of 3 that meet each of them."""
    world = dist.get_world_size()
    for sizes in list(Fold.possible(world))[:: 1 if world <= 4 else SOME_OF_8]:
        once(make_fold(sizes))


def decoders() -> dict[str, nn.Module]:
    """Small transformers models: norms of q and k over all heads, over one, none, and fewer heads of keys."""

    def make(name: str, **more) -> nn.Module:
        torch.manual_seed(5)
        config = getattr(transformers, f"{name}Config")(
            vocab_size=32, hidden_size=D, num_hidden_layers=2, num_attention_heads=HEADS,
            num_experts_per_tok=2, initializer_range=0.3, attn_implementation="sdpa",
            pad_token_id=None, eos_token_id=None, bos_token_id=None, **more,
        )  # fmt: skip
        return transformers.AutoModelForCausalLM.from_config(config)

    sizes = dict(num_key_value_heads=4, intermediate_size=FFN, head_dim=8)
    return {
        "OLMoE": make("Olmoe", num_experts=E, num_key_value_heads=HEADS, intermediate_size=FFN),
        "Qwen3": make("Qwen3Moe", num_experts=E, moe_intermediate_size=FFN, norm_topk_prob=True, **sizes),
        "Mixtral": make("Mixtral", num_local_experts=E, sliding_window=None, **sizes),
    }


@check
def transformers_decoders():
    world = dist.get_world_size()
    folds = [fold_of({"cp": 2, "tp": 2, "dp": world // 4}, {"ep": world // 2, "edp": 2})]
    if world == 4:  # 4 heads of keys at most
        folds += [
            fold_of({"tp": 4}, {"ep": 2, "etp": 2}),
            fold_of({"cp": 4}, {"ep": 4}),
            fold_of({"dp": 2, "cp": 2}, {"etp": 4}),
        ]
    for fold in folds:
        for (name, whole), mine in zip(decoders().items(), decoders().values(), strict=True):
            headgate.parallelize(headgate.parallelize_attention(mine, fold), fold)
            torch.manual_seed(7)
            ids, g = torch.randint(32, (B, S)), torch.randn(B, S, 32)
            y1, y2 = whole(input_ids=ids).logits, mine(input_ids=mine_of(fold, ids)).logits
            close(y2, mine_of(fold, y1), f"{name} {fold}: logits")
            ((y1 * g).sum() / fold.size("dp", "cp")).backward()
            (y2 * mine_of(fold, g)).sum().backward()
            compare(whole, mine, f"{name} {fold}")


@check
def two_pipeline_stages():
    """Stages made by hand and torch's own schedule, in two micro-batches."""
    half = dist.get_world_size() // 2
    fold = fold_of({"tp": 2, "dp": half // 2}, {"ep": 2, "edp": half // 2}, pp=2)
    x, g = batch()
    whole, stages = model(), model()
    mine = nn.Sequential(stages[fold.stage])
    spread_attention(mine, fold)
    headgate.parallelize(mine, fold)
    average = fold.size("dp", "cp")
    micro = [torch.cat([rows.chunk(2)[at] for rows in t.chunk(average)]) for at in range(2) for t in (x, g)]
    for part, weight in zip(micro[::2], micro[1::2], strict=True):  # losses of balance are of a micro-batch
        ((whole(part) * weight).sum() / average).backward()
    between = mine_of(fold, x).chunk(2)[0].requires_grad_()
    first = between.detach() if fold.stage == 0 else between
    group = fold.group("pp")
    stage = PipelineStage(mine, fold.stage, 2, x.device, input_args=first, output_args=between, group=group)
    schedule = ScheduleGPipe(stage, 2, loss_fn=lambda y, g: (y * g).sum(), scale_grads=False)
    if fold.stage == 0:
        schedule.step(mine_of(fold, x))
    else:
        close(schedule.step(target=mine_of(fold, g)), mine_of(fold, whole(x)), "pp=2: y")
    same_parameters(nn.Sequential(whole[fold.stage]), mine, lambda p: p.grad, "pp=2: gradient")
    close(headgate.clip_grad_norm_(mine, float("inf")).float(), norm(whole), "pp=2: norm")


@check
def attention_that_cannot_be_spread_is_refused():
    world = dist.get_world_size()
    fold = fold_of({"tp": 2, "cp": 2, "dp": world // 4}, {"ep": world})
    made = decoders()

    def changed(**config) -> nn.Module:
        model = decoders()["Qwen3"]
        for name, value in config.items():
            setattr(model.config, name, value)
        return model

    spread = headgate.parallelize_attention(made["OLMoE"], fold)
    few = fold_of({"tp": world}, {"ep": world})
    trials = [
        (spread, fold, "model must not be parallelized already, got one whose model.layers.0.self_attn is"),
        (nn.Linear(3, 3), fold, "whose layers all have q_proj, k_proj, v_proj, o_proj, got Linear with 0 such of None"),
        (changed(num_hidden_layers=3), fold, "got Qwen3MoeForCausalLM with 2 such of 3 layers"),
        (
            changed(layer_types=["full_attention", "chunked_attention"]),
            fold,
            "got chunked_attention, full_attention by",
        ),
        (changed(_attn_implementation="eager"), fold, "attention must be full, .* got full_attention by 'eager'"),
        (made["Mixtral"], few, r"tp \* cp must divide the 4 heads of model.layers.0.self_attn.k_proj, got tp=8 cp=1"),
    ]
    for model_, over, words in trials[: None if world == 8 else -1]:
        with pytest.raises(ValueError, match=f"^parallelize_attention: .*{words}"):
            headgate.parallelize_attention(model_, over)
    assert not any(isinstance(p, DTensor) for p in made["Mixtral"].parameters())
    ids = torch.zeros(1, 4, dtype=torch.int64)
    for name in ("attention_mask", "position_ids"):
        with pytest.raises(ValueError, match=f"{name} must be None, as sequences are neither padded nor packed"):
            spread(input_ids=ids, **{name: ids})
    windowed = decoders()["Mixtral"]
    windowed.config.sliding_window = 4
    headgate.parallelize(headgate.parallelize_attention(windowed, fold), fold)
    with pytest.raises(ValueError, match="every token must see all before it, got a window of 4 and 16 tokens"):
        windowed(input_ids=ids)
    with pytest.raises(
        ValueError, match=r"fsdp must be False where parameters are DTensors, got True with .*self_attn"
    ):
        headgate.parallelize(spread, fold, fsdp=True)


@check
def ulysses_refuses_shapes_that_do_not_go_together():
    group, world, attend = dist.group.WORLD, dist.get_world_size(), F.scaled_dot_product_attention
    q, k = torch.zeros(2, 2 * world, 3, 4), torch.zeros(2, world + 1, 3, 4)
    with pytest.raises(ValueError, match=f"heads of k and v must be a multiple of the group's {world} ranks"):
        ulysses(q, k, k, attend, group)
    for odd in (q[:, :, :2], q[:1], q[0]):
        with pytest.raises(ValueError, match=r"ulysses: q, k and v must be \[B, H, S/G, d\], k and v alike"):
            ulysses(q, odd, odd, attend, group)
    with pytest.raises(NotImplementedError, match="ulysses: tensors must not be those of a transform"):
        torch.func.grad(lambda q: ulysses(q, q.detach(), q.detach(), attend, group).sum())(q)
