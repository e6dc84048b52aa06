"""LoRA on parallelized models, run by test_adapters.py: one process's numbers, put on before or after."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist
from folds_cases import folder, make_fold
from ranks_compare import close
from torch import Tensor, nn

import headgate
from headgate.dispatch import Fold
from headgate.dispatch.fold import Sizes
from headgate.moe.shards import shards_of

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
warnings.filterwarnings("ignore")

CHECKS = {}
D, F, E, K, R, LENGTH = 16, 8, 8, 2, 3, 6
SMALL = dict(
    vocab_size=32, hidden_size=D, intermediate_size=F, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=32, num_experts_per_tok=K,
)  # fmt: skip
BOTH = dict(target_modules=["q_proj", "o_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
ATTENTION = dict(target_modules=["q_proj", "o_proj"])
OURS = dict(target_parameters=["experts.w_gate_up", "experts.w_down"])


def check(function):
    CHECKS[function.__name__] = function
    return function


class Layers(nn.Module):
    """Two of our own layers."""

    def __init__(self, **options):
        super().__init__()
        self.table = nn.Embedding(32, D)
        self.layers = nn.ModuleList(headgate.MoE(D, F, E, K, bias=True, **options) for _ in range(2))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.table(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        return x


def olmoe() -> nn.Module:
    return transformers.OlmoeForCausalLM(transformers.OlmoeConfig(num_experts=E, **SMALL))


def gpt_oss() -> nn.Module:
    config = transformers.GptOssConfig(num_local_experts=E, head_dim=8, **SMALL)
    return transformers.GptOssForCausalLM(config)


FORMS = ((olmoe, BOTH), (gpt_oss, BOTH), (Layers, OURS))  # [E, out, in]; interleaved [E, in, out]; ours


def built(make, seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    model = make()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(std=p.shape[-1] ** -0.5)
    if not isinstance(model, Layers):
        headgate.replace(model)
    return model


def adapted(model: nn.Module, targets: dict, seed: int = 5, name: str = "default") -> nn.Module:
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=R, lora_alpha=6, init_lora_weights=False, **targets)
    return peft.get_peft_model(model, config, adapter_name=name)


def folds() -> list[tuple[Fold, dict]]:
    n = dist.get_world_size()
    experts = [{"ep": n}, {"etp": n}, {"ep": n // 2, "etp": 2}, {"edp": 2, "etp": n // 2}, {"edp": n // 2, "ep": 2}]
    found = [(make_fold(Sizes.of({"dp": n}, e, 1, n)), {}) for e in experts[: 5 if n > 2 else 2]]
    tp = make_fold(Sizes.of({"tp": n}, {"ep": n // 2, "etp": 2}, 1, n))
    return [*found, (tp, {"activations": "replicated"})]


def batch(fold: Fold) -> tuple[Tensor, Tensor, slice]:
    """Ids and what their outputs are multiplied by, for all data-parallel ranks, and this one's part."""
    torch.manual_seed(11)
    n = fold.size("dp", "cp")
    at = fold.rank("dp", "cp")
    return torch.randint(2, 32, (2 * n, LENGTH)), torch.randn(2 * n, LENGTH, 1), slice(2 * at, 2 * at + 2)


def answer(model: nn.Module, ids: Tensor) -> Tensor:
    out = model(input_ids=ids)
    return out if isinstance(out, Tensor) else out.logits


def step(model: nn.Module, ids: Tensor, g: Tensor) -> Tensor:
    y = answer(model, ids)
    (y * g).sum().backward()
    return y.detach()


def part_of(name: str, whole: Tensor, mine: nn.Module) -> Tensor:
    """What this rank holds of one process's parameter: PEFT keeps A [E r, in] and B [out, r E]."""
    owner = name.rpartition(".")[0]
    if ".lora_" not in name:
        shards = shards_of(mine.get_submodule(owner))
        if shards is None:
            return whole
        return shards.cuts[name.rpartition(".")[2]].of(whole, shards.held, shards.etp, shards.fold.rank("etp"))
    wrapper = mine.get_submodule(owner.partition(".lora_")[0])
    shards = shards_of(wrapper.get_base_layer())
    if shards is None:
        return whole
    is_a, ffn = ".lora_A." in name, "down" in wrapper.parameter_name
    experts = shards.num_experts
    t = whole.view(experts, R, -1) if is_a else whole.view(whole.shape[0], R, experts).permute(2, 1, 0)
    t = t[shards.held.start : shards.held.stop]
    if is_a == ffn:  # A of the second weight and B of the first have F
        cut = shards.cuts[wrapper.parameter_name]
        t = t.unflatten(2, (cut.blocks, shards.etp, -1))[:, :, :, shards.fold.rank("etp")].flatten(2)
    return t.flatten(0, 1) if is_a else t.permute(2, 1, 0).flatten(1)


def same(whole: nn.Module, mine: nn.Module, of, what: str) -> None:
    ours = dict(mine.named_parameters())
    learning = {name: p for name, p in whole.named_parameters() if p.requires_grad}
    assert learning.keys() == {name for name, p in ours.items() if p.requires_grad}
    for name, p in learning.items():
        close(of(ours[name]), part_of(name, of(p), mine), f"{what}: {name}")


def compare(fold: Fold, whole: nn.Module, mine: nn.Module, what: str) -> None:
    """Outputs, gradients, their norm, and a step."""
    ids, g, part = batch(fold)
    average = fold.size("dp", "cp")
    want = step(whole, ids, g / average)
    close(step(mine, ids[part], g[part]), want[part], f"{what}: y")
    same(whole, mine, lambda p: p.grad, f"{what}: gradient")
    norm = torch.nn.utils.clip_grad_norm_(whole.parameters(), 0.5)
    close(headgate.clip_grad_norm_(mine, 0.5).float(), norm, f"{what}: norm")
    for model in (whole, mine):
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
        model.zero_grad()
    same(whole, mine, lambda p: p.detach(), f"{what}: after a step")
    with torch.no_grad():
        close(answer(mine, ids[part]), answer(whole, ids)[part], f"{what}: y after a step")


@check
def lora_before():
    """On attention and on experts, of each form of weights: cut with the experts."""
    for make, targets in FORMS:
        for fold, how in folds()[0 if make is olmoe else -3 :]:
            whole, mine = (adapted(built(make), targets) for _ in range(2))
            headgate.parallelize(mine, fold, **how)
            compare(fold, whole, mine, f"{make.__name__} {fold}")


@check
def lora_on_experts_at_every_degree():
    n = dist.get_world_size()
    fold = make_fold(Sizes.of({"dp": n}, {"ep": n // 2, "etp": 2}, 1, n))
    for degree in (0, 1, 2):
        whole, mine = (adapted(built(olmoe), BOTH) for _ in range(2))
        headgate.parallelize(mine, fold)
        headgate.set_degree(mine, degree)
        compare(fold, whole, mine, f"degree {degree}")


@check
def lora_after():
    """Each rank draws other values: those of the first count. Gradients are one process's."""
    for fold, how in folds():
        mine = headgate.parallelize(built(olmoe), fold, **how)
        whole = adapted(built(olmoe), ATTENTION, seed=20)
        mine = adapted(mine, ATTENTION, seed=20 + dist.get_rank())
        compare(fold, whole, mine, f"{fold}")


@check
def lora_after_and_gradients_that_add_up():
    """The first of two backward passes, which no_sync holds back, finds the adapters; so does the model around."""
    for fold, how in folds():
        whole = adapted(built(olmoe), ATTENTION, seed=20)
        mine = headgate.parallelize(built(olmoe), fold, **how)
        mine = adapted(mine, ATTENTION, seed=20 + dist.get_rank())
        ids, g, part = batch(fold)
        for _ in range(2):
            step(whole, ids, g / fold.size("dp", "cp"))
        with headgate.no_sync(mine):
            step(mine, ids[part], g[part])
        step(mine, ids[part], g[part])
        same(whole, mine, lambda p: p.grad, f"{fold}: gradient")


@check
def lora_on_experts_after():
    """Ranks with the same experts agree; with one process's values, so do the gradients."""
    for make, targets in FORMS:
        for fold, how in folds()[0 if make is olmoe else -3 :]:
            mine = adapted(headgate.parallelize(built(make), fold, **how), targets, seed=20 + dist.get_rank())
            ids, g, part = batch(fold)
            step(mine, ids[part], g[part])
            for p in mine.parameters():
                if p.requires_grad:
                    p.grad = None
            whole = adapted(built(make), targets)
            with torch.no_grad():
                full = dict(whole.named_parameters())
                for name, p in mine.named_parameters():
                    if p.requires_grad:
                        p.copy_(part_of(name, full[name], mine))
            compare(fold, whole, mine, f"{make.__name__} {fold}")


def with_shared() -> nn.Module:
    return Layers(shared_intermediate_size=8)


@check
def lora_on_shared_experts_cut_over_tp():
    """Whose ranks have tokens of their own, or the same."""
    n = dist.get_world_size()
    targets = {"target_parameters": [*OURS["target_parameters"], "ffn.w_gate_up", "ffn.w_down"]}
    for tokens in ("sharded", "replicated"):
        experts = {"ep": n} if tokens == "sharded" else {"edp": n // 2, "ep": 2}
        fold = make_fold(Sizes.of({"dp": n // 2, "tp": 2}, experts, 1, n))
        for order in ("before", "after"):
            whole, mine = built(with_shared), built(with_shared)
            how = {"activations": tokens, "cut_shared": True}
            if order == "before":
                mine = headgate.parallelize(adapted(mine, targets), fold, **how)
            else:
                mine = adapted(headgate.parallelize(mine, fold, **how), targets)
            whole = adapted(whole, targets)
            torch.manual_seed(11)
            ids, g = torch.randint(2, 32, (2 * n, LENGTH)), torch.randn(2 * n, LENGTH, 1)
            parts = n if tokens == "sharded" else n // 2
            part = slice(*(2 * n // parts * (i + dist.get_rank() * parts // n) for i in (0, 1)))
            if order == "after":
                with torch.no_grad():
                    answer(mine, ids[part])
                step(mine, ids[part], g[part])
                for p in mine.parameters():
                    p.grad = None
                full = dict(whole.named_parameters())
                with torch.no_grad():
                    for name, p in mine.named_parameters():
                        if p.requires_grad:
                            p.copy_(part_of(name, full[name], mine))
            want = step(whole, ids, g * 2 / n)
            close(step(mine, ids[part], g[part]), want[part], f"{tokens} {order}: y")
            same(whole, mine, lambda p: p.grad, f"{tokens} {order}: gradient")
            if order == "before":
                headgate.save_checkpoint(folder("shared"), mine)
                other = adapted(built(with_shared, seed=4), targets, seed=8)
                headgate.load_checkpoint(folder("shared"), other)
                same(other, mine, lambda p: p.detach(), f"{tokens}: checkpoint")
                dist.barrier()


@check
def experts_on_several_ranks_start_alike():
    n = dist.get_world_size()
    for fold in (make_fold(Sizes.of({"dp": n}, e, 1, n)) for e in ({"edp": n}, {"etp": n})):
        mine = adapted(headgate.parallelize(built(olmoe), fold), BOTH, seed=20 + dist.get_rank())
        ids, g, part = batch(fold)
        step(mine, ids[part], g[part])
        for name, p in mine.named_parameters():
            cut = fold.size("etp") > 1 and ("experts" in name)
            if p.requires_grad and not cut:
                every = [torch.empty_like(p) for _ in range(n)]
                dist.all_gather(every, p.detach())
                assert all(torch.equal(t, every[0]) for t in every), name


@check
def what_is_unfrozen_or_exchanged_later_is_synchronised():
    for fold, how in folds():
        whole, mine = built(olmoe), built(olmoe)
        for p in mine.parameters():
            p.requires_grad_(False)
        headgate.parallelize(mine, fold, **how)
        for p in mine.parameters():
            p.requires_grad_(True)
        mine.load_state_dict(mine.state_dict(), assign=True)
        with pytest.raises(ValueError, match="run a forward pass first, from which on its gradients are made right"):
            headgate.clip_grad_norm_(mine, 1.0)
        compare(fold, whole, mine, f"{fold}")


@check
def merging_and_unmerging():
    for fold, how in folds():
        whole, mine = (adapted(built(olmoe), BOTH) for _ in range(2))
        headgate.parallelize(mine, fold, **how)
        ids, _, part = batch(fold)
        with torch.no_grad():
            want, base = answer(whole, ids)[part], answer(built(olmoe), ids)[part]
            assert not torch.allclose(want, base, atol=1e-2)
            for change in (mine.merge_adapter, mine.unmerge_adapter):
                change()
                close(answer(mine, ids[part]), want, f"{fold}: {change.__name__}")
            with mine.disable_adapter():
                close(answer(mine, ids[part]), base, f"{fold}: disabled")
            close(answer(mine.merge_and_unload(), ids[part]), want, f"{fold}: unloaded")


@check
def checkpoints_between_folds_and_one_process():
    """Weights, adapters and the optimizer's state, whatever they were saved under."""

    def make(fold=None, how=None, seed=5):
        model = adapted(built(olmoe), BOTH, seed=seed)
        if fold is not None:
            headgate.parallelize(model, fold, **how)
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    def train(model, optimizer, fold):
        ids, g, part = batch(every[0][0])
        if fold is None:
            step(model, ids, g)
        else:
            at = slice(None) if fold.size("dp", "cp") == 1 else part
            step(model, ids[at], g[at] * fold.size("dp", "cp"))
        optimizer.step()
        optimizer.zero_grad()

    every = folds()
    reference = make()
    for _ in range(3):
        train(*reference, None)
    for at, (fold, how) in enumerate(every):
        mine = make(fold, how)
        for _ in range(2):
            train(*mine, fold)
        headgate.save_checkpoint(folder("adapters"), *mine)
        for target, options in (every[(at + 3) % len(every)], (None, None)):
            other = make(target, options, seed=9)
            headgate.load_checkpoint(folder("adapters"), *other)
            train(*other, target)
            same(reference[0], other[0], lambda p: p.detach(), f"{fold} -> {target}")
        dist.barrier()


def longer(model: Layers, seed: int) -> Layers:
    torch.manual_seed(seed)
    model.layers[0] = nn.Sequential(nn.Linear(D, D), model.layers[0])
    return model


@check
def compiled():
    """Parameters that are new to a compiled model are found as well."""
    n = dist.get_world_size()
    fold = make_fold(Sizes.of({"dp": n}, {"ep": n}, 1, n))
    mine = headgate.parallelize(built(Layers), fold)
    run = torch.compile(mine, backend="eager")
    ids, g, part = batch(fold)
    (run(ids[part]) * g[part]).sum().backward()
    mine.zero_grad()
    whole = built(Layers)
    longer(whole, 0), longer(mine, dist.get_rank())
    step(whole, ids, g / n)
    (run(ids[part]) * g[part]).sum().backward()
    same(whole, mine, lambda p: p.grad, "compiled")


@check
def what_does_not_go_is_refused_by_name():
    n = dist.get_world_size()
    fold = make_fold(Sizes.of({"dp": n}, {"ep": n}, 1, n))
    with pytest.raises(ValueError, match=r"lora_A.default.weight must be the same on every rank"):
        headgate.parallelize(adapted(built(olmoe), BOTH, seed=dist.get_rank()), fold)
    biases = adapted(built(Layers), {"target_parameters": ["experts.b_down"]})
    with pytest.raises(ValueError, match=r"LoRA on experts must be on weights \[E, ., .\], got it on .*b_down"):
        headgate.parallelize(biases, fold)
    copies = make_fold(Sizes.of({"dp": n}, {"edp": n}, 1, n))
    with pytest.raises(ValueError, match="fsdp must be False, or edp 1, where LoRA is on the experts, got True with"):
        headgate.parallelize(adapted(built(olmoe), BOTH), copies, fsdp=True)
    mine = headgate.parallelize(adapted(built(olmoe), BOTH), fold)
    with pytest.raises(ValueError, match="place_experts: module must have no LoRA on its experts, got one on"):
        headgate.place_experts(mine, None)


@check
def fsdp_beside_lora():
    """Adapters come before, those on experts where experts stand once; a plain layer may come later."""
    n = dist.get_world_size()
    trials = [
        (Fold({"dp": n}, experts), lambda targets=targets: adapted(built(olmoe), targets), lambda model: model)
        for experts, targets in (({"edp": n}, ATTENTION), ({"ep": n}, BOTH), ({"etp": n}, BOTH))
    ]
    trials.append((Fold({"dp": n}, {"edp": n}), lambda: built(Layers), lambda model: longer(model, dist.get_rank())))
    for fold, make, later in trials:
        whole = make()
        mine = later(headgate.parallelize(make(), fold, fsdp=True))
        if make is trials[-1][1]:
            longer(whole, 0)
        ids, g, part = batch(fold)
        for _ in range(2):
            want = step(whole, ids, g / n)
            with torch.no_grad():  # leaves FSDP2's parameters whole
                answer(mine, ids[part])
            close(step(mine, ids[part], g[part]), want[part], f"{fold}: y")
        norm = torch.nn.utils.clip_grad_norm_(whole.parameters(), 0.5)
        close(headgate.clip_grad_norm_(mine, 0.5).float(), norm, f"{fold}: norm")
