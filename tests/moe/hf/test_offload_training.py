"""Learning around offloaded experts: PEFT's LoRA, transformers' Trainer, checkpointing; and experts that transformers'
own hook hands over."""

from __future__ import annotations

import pytest
import torch

import headgate

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.randint(2, 64, (4, 9), generator=torch.Generator().manual_seed(1))


def adapted(model, *targets):
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    config = peft.LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=list(targets))
    return peft.get_peft_model(model, config)


def step(model, ids=IDS):
    """(loss, gradients by name) of one step."""
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_step(got, want, assert_close):
    assert torch.equal(got[0], want[0])
    assert got[1].keys() == want[1].keys()
    assert any(g.any() for g in want[1].values())
    for name, grad in want[1].items():
        assert_close(got[1][name], grad.double(), name=name)


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpointing", "reentrant"])
@pytest.mark.parametrize("order", ["LoRA, then offload", "offload, then LoRA"])
def test_lora_around_experts(build, tmp_path, assert_close, order, checkpointing):
    """On attention, a shared expert and the head; every step needs more experts than there is room for."""
    family = build("qwen2_moe")
    model = family.model.train()
    where = ("q_proj", "v_proj", "shared_expert.gate_proj", "lm_head")
    headgate.replace(model)
    resident = family.clone().train()
    want = step(adapted(resident, *where))
    assert {n.split(".lora")[0].rpartition(".")[2] for n in want[1]} == {"q_proj", "v_proj", "gate_proj", "lm_head"}
    if order == "LoRA, then offload":
        model = adapted(model, *where)
    offloaded = headgate.offload(model, "25%", "lru", "gate", tmp_path)
    if order == "offload, then LoRA":
        model = adapted(model, *where)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    assert_same_step(step(model), want, assert_close)
    loads = offloaded.stats().loads
    assert_same_step(step(model), want, assert_close)
    assert offloaded.stats().loads > loads
    offloaded.close()


@pytest.mark.parametrize("name", ["gpt_oss", "mixtral"])
def test_a_plain_call_with_gradients_on(build, tmp_path, name, assert_close):
    """Everything but the experts learns, routers too."""
    family = build(name)
    model = family.model
    headgate.replace(model)
    want = step(model)
    with headgate.offload(model, "25%", "lru", "gate", tmp_path):
        got = step(model)
    experts = {n for n in want[1] if ".experts." in n}
    assert experts
    assert any("router" in n or "gate" in n for n in got[1])
    assert_same_step(got, (want[0], {n: g for n, g in want[1].items() if n not in experts}), assert_close)
    assert_same_step(step(model), want, assert_close)


def test_trainer(build, tmp_path, assert_close):
    """Two optimizer steps of two micro-batches each, checkpointed: the adapter of resident experts."""
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    family = build("olmoe")

    def train(model):
        settings = TrainingArguments(
            str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=1, gradient_accumulation_steps=2,
            gradient_checkpointing=True, learning_rate=1e-2, report_to=[], save_strategy="no", logging_steps=1,
            use_cpu=True, disable_tqdm=True, seed=0, optim="sgd",
        )  # fmt: skip
        data = [{"input_ids": ids, "labels": ids} for ids in IDS]
        trainer = Trainer(model=model, args=settings, train_dataset=data)
        trainer.train()
        return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    model = family.model
    headgate.replace(model)
    resident = family.clone()
    before = adapted(resident, "q_proj", "o_proj")
    first = {n: p.detach().clone() for n, p in before.named_parameters() if p.requires_grad}
    want = train(before)
    with headgate.offload(model, "25%", "lru", "gate", tmp_path) as offloaded:
        got = train(adapted(model, "q_proj", "o_proj"))
        assert offloaded.stats().loads
    assert got.keys() == want.keys() == first.keys()
    assert not any(torch.equal(first[n], w) for n, w in want.items())
    for name, w in want.items():
        assert_close(got[name], w.double(), name=name)


class TestTransformersHook:
    @pytest.fixture
    def chosen(self, build):
        headgate.hf.register()
        family = build("qwen3_moe")
        family.model.set_experts_implementation("headgate")
        return family.model

    def test_experts_move_and_come_back(self, chosen, tmp_path, assert_close):
        want, names = step(chosen), [n for n, _ in chosen.named_parameters()]
        with torch.no_grad():
            tokens = chosen.eval().generate(IDS, max_new_tokens=5, do_sample=False, pad_token_id=0)
        with headgate.offload(chosen, "25%", "lru", "gate", tmp_path) as offloaded:
            assert not offloaded.skipped
            with torch.no_grad():
                got = chosen.generate(IDS, max_new_tokens=5, do_sample=False, pad_token_id=0)
            assert torch.equal(got, tokens)
            assert offloaded.stats().loads
            loss, grads = step(chosen.train())
        assert torch.equal(loss, want[0])
        experts = {n: g for n, g in want[1].items() if ".experts." in n}
        assert_same_step((loss, grads), (loss, {n: g for n, g in want[1].items() if n not in experts}), assert_close)
        assert [n for n, _ in chosen.named_parameters()] == names
        assert_same_step(step(chosen), want, assert_close)

    def test_another_choice_while_offloaded_is_refused(self, chosen, tmp_path):
        with headgate.offload(chosen, "25%", "lru", None, tmp_path), torch.no_grad():
            chosen.set_experts_implementation("eager")
            with pytest.raises(RuntimeError, match=r"layers\.0\.mlp\.experts must run through Headgate while it is"):
                chosen(input_ids=IDS)
            chosen.set_experts_implementation("headgate")
            chosen(input_ids=IDS)

    def test_a_model_without_the_choice_is_told_both_ways(self, build, tmp_path):
        with pytest.raises(ValueError, match="or choose headgate as its experts implementation"):
            headgate.offload(build("olmoe").model, "25%", "lru", None, tmp_path)
