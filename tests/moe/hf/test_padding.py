"""replace(model, skip_padding=True): padding costs no row, and what is no padding gets the numbers it had."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

import headgate
from headgate.kernels.plan import plan
from headgate.moe.hf import experts as boundary

LENGTHS, WIDTH, K = (3, 7, 5), 7, 2


@pytest.fixture(scope="module")
def known():
    torch.manual_seed(0)
    sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
    more = dict(num_experts=8, num_experts_per_tok=K, pad_token_id=0, eos_token_id=None, initializer_range=0.3)
    return OlmoeForCausalLM(OlmoeConfig(**sizes, **more)).eval()


@pytest.fixture
def model(known):
    model = copy.deepcopy(known)
    headgate.replace(model, skip_padding=True)
    return model


@pytest.fixture
def rows(monkeypatch):
    """Rows of each grouped product that ran."""
    found = []

    def counted(module, x, routing, *args, **kwargs):
        found.append(int(plan(routing.expert_ids, routing.num_experts).offsets[-1]))
        return ffn(module, x, routing, *args, **kwargs)

    ffn = boundary.expert_ffn
    monkeypatch.setattr(boundary, "expert_ffn", counted)
    return found


def padded(left: bool, seed: int = 1):
    ids, mask = torch.zeros(len(LENGTHS), WIDTH, dtype=torch.long), torch.zeros(len(LENGTHS), WIDTH, dtype=torch.long)
    text = torch.randint(1, 32, ids.shape, generator=torch.Generator().manual_seed(seed))
    for row, n in enumerate(LENGTHS):
        where = slice(WIDTH - n, WIDTH) if left else slice(0, n)
        ids[row, where], mask[row, where] = text[row, :n], 1
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}


def test_left_and_right_padding_and_the_original_agree(known, model, rows, assert_close):
    answers = []
    for left in (False, True):
        batch = padded(left)
        live = batch["attention_mask"].bool()
        got = model(**batch).logits[live]
        assert rows == [sum(LENGTHS) * K] * 2
        rows.clear()
        assert_close(got, known(**batch).logits[live])
        answers.append(got)
    assert_close(*answers)


def test_all_forms_of_a_mask(model, rows):
    batch = padded(True)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    packed = torch.tensor([[1, 1, 1, 2, 2, 0, 0]] * 3)
    for given, live in ((mask.bool(), 15), (None, 21), (torch.ones_like(mask), 21), (packed, 15)):
        model(ids, attention_mask=given)
        assert rows == [live * K] * 2
        rows.clear()
    model(ids, mask)  # by position
    assert rows == [15 * K] * 2
    rows.clear()
    four = torch.ones(3, 1, WIDTH, WIDTH, dtype=torch.bool).tril()
    with pytest.warns(UserWarning, match=r"attention_mask is no \[B, S\], but one of 4 dimensions"):
        model(ids, attention_mask=four)
    assert rows == [21 * K] * 2
    with pytest.raises(TypeError, match=r"attention_mask \[B, S\] must be integers or bool, got torch.float32"):
        model(ids, attention_mask=mask.float())
    with pytest.raises(ValueError, match=r"must be \[3, 7\], or longer by what is cached, got \[3, 6\]"):
        model(ids, attention_mask=mask[:, 1:])
    rows.clear()
    model(ids)  # what failed left nothing behind
    assert rows == [21 * K] * 2


def test_the_base_model_alone_and_a_call_between(model, rows):
    batch = padded(True)
    model.model(**batch)
    assert rows == [15 * K] * 2
    rows.clear()
    model.model.layers[0].mlp(torch.randn(3, 7, 16))  # nobody's mask
    assert rows == [21 * K]


def test_cached_decoding(known, model, rows):
    batch = padded(True)
    del batch["position_ids"]
    options = {"max_new_tokens": 4, "do_sample": False}
    got = model.generate(**batch, **options)
    assert rows == [15 * K] * 2 + [3 * K] * 6
    assert torch.equal(got, known.generate(**batch, **options))


@pytest.mark.parametrize("reentrant", [False, True])
def test_two_micro_batches_run_again_before_one_backward_pass(known, model, reentrant, assert_close):
    """Each recomputed pass finds its own mask: the other's would give other numbers or none."""
    want = copy.deepcopy(known).train()
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    gradients = []
    for one in (want, model):
        total = 0
        for left, seed in ((True, 1), (False, 2)):
            batch = padded(left, seed)
            live = batch["attention_mask"].bool()
            total = total + one(**batch).logits[live].square().mean()
        total.backward()
        gradients.append([p.grad for p in one.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert_close(a, b)


def test_copies_know_it_and_restore_takes_it_off(known, model, rows):
    batch = padded(True)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin(**batch)
        assert rows == [15 * K] * 2
        rows.clear()
        headgate.restore(twin)
        assert not any((twin._forward_pre_hooks, twin._forward_hooks, twin.model._forward_pre_hooks))
        assert vars(twin.model.layers[0].mlp.experts).keys() == vars(known.model.layers[0].mlp.experts).keys()
    model(**batch)  # the original still does
    assert rows == [15 * K] * 2


def test_under_offload(model, tmp_path, assert_close):
    batch = padded(True)
    live = batch["attention_mask"].bool()
    want = model(**batch).logits[live]
    one = {"input_ids": batch["input_ids"], "attention_mask": torch.zeros_like(batch["attention_mask"])}
    one["attention_mask"][1, -1] = 1
    with headgate.offload(model, budget="50%", disk=tmp_path) as offloaded, torch.no_grad():
        assert_close(model(**batch).logits[live], want)
        before = offloaded.stats().accesses
        model(**one)
        assert offloaded.stats().accesses - before == 2 * K  # padding asks for no expert


def test_compiled(known, model, own_compilations, assert_close):
    batch = padded(True)
    live = batch["attention_mask"].bool()
    want = known(**batch).logits[live]
    got = torch.compile(model, backend="aot_eager")(**batch).logits
    assert_close(got[live], want)


def test_a_model_with_two_masks_is_refused(build):
    switch = build("switch_transformers").model
    with pytest.raises(ValueError, match="skip_padding must have a decoder-only model"):
        headgate.replace(switch, skip_padding=True)
