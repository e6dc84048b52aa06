"""headgate.replay: transformers' models follow recorded routes, swapped or not."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from router_cases import call, layer_of
from torch.utils.checkpoint import checkpoint

import headgate
from headgate.moe.routers import ROUTERS

# Routers that do not choose by one torch.topk over all experts.
REFUSED = {
    "dbrx",
    "deepseek_v4",
    "doge",
    "ernie4_5_vl_moe",
    "longcat_flash",
    "nllb_moe",
    "phimoe",
    "switch_transformers",
    "zaya",
}


def _batch(family):
    batch = {name: value for name, value in family.inputs.items() if name != "labels"}
    batch.pop("moe_mm_token_type_ids", None)
    if "decoder_input_ids" in batch:
        batch["decoder_input_ids"] = batch["input_ids"].flip(1)
    return batch


def _logits(model, batch):
    out = model(**batch)
    return out.logits if "logits" in out else out[0]


@pytest.mark.filterwarnings("ignore:headgate")
def test_every_family_follows_its_trace(family):
    if family.name == "vitpose_backbone":
        pytest.skip("its tokens choose no experts")
    model, batch = family.model.eval(), _batch(family)
    trace = headgate.record(model, batch)
    if family.name in REFUSED:
        with pytest.raises((RuntimeError, TypeError, ValueError), match="replay: "), headgate.replay(model, trace):
            model(**batch)
        return
    with torch.no_grad():
        want = _logits(model, batch)
        with headgate.replay(model, trace) as it:
            assert torch.equal(_logits(model, batch), want)  # to the bit: the live choice is the recorded one
        assert it.left == 0


@pytest.fixture
def olmoe(build):
    family = build("olmoe")
    return family.model.eval(), family.inputs["input_ids"]


def _other(trace, seed=0):
    """As many other experts for each token, none twice."""
    rng, ids = np.random.default_rng(seed), trace.expert_ids
    drawn = rng.random((*ids.shape[:2], trace.num_experts)).argsort(2)[:, :, : ids.shape[2]]
    return dataclasses.replace(trace, expert_ids=drawn.astype(ids.dtype))


def _steps(model, batches, again=False):
    """Loss of several batches before one backward pass, and gradients."""
    model.zero_grad()
    loss = 0
    for ids in batches:
        if again:
            loss = loss + checkpoint(lambda ids: model(input_ids=ids).logits, ids, use_reentrant=False).square().mean()
        else:
            loss = loss + model(input_ids=ids).logits.square().mean()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("swapped", [False, True])
def test_goes_where_it_is_told_and_the_gate_still_learns(olmoe, swapped):
    model, ids = copy.deepcopy(olmoe[0]), olmoe[1]
    if swapped:
        headgate.replace(model)
    told = _other(headgate.record(model, ids))
    with headgate.replay(model, told):
        heard = headgate.record(model, ids)
    np.testing.assert_array_equal(heard.expert_ids, told.expert_ids)
    with headgate.replay(model, told):
        model(input_ids=ids).logits.square().mean().backward()
    gate = next(p for name, p in model.named_parameters() if name.endswith("gate.weight"))
    assert gate.grad.abs().sum() > 0


def test_recomputed_batches_follow_their_own_routes(olmoe):
    """Two batches of other lengths before one backward pass, under activation checkpointing: as without it."""
    model, ids = copy.deepcopy(olmoe[0]), olmoe[1]
    batches = [ids, ids.flip(1)[:, :5]]
    told = _other(headgate.record(model, [{"input_ids": b} for b in batches]))
    found = []
    for again in (False, True):
        with headgate.replay(model, told):
            found.append(_steps(model, batches, again))
    (loss, gradients), (loss2, gradients2) = found
    assert torch.equal(loss, loss2)
    assert gradients.keys() == gradients2.keys()
    assert all(torch.equal(gradients[name], gradients2[name]) for name in gradients)


def test_padding_and_last_tokens_have_no_record(olmoe):
    model, ids = olmoe
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    trace = headgate.record(model, {"input_ids": ids, "attention_mask": mask})
    with torch.no_grad():
        want = model(input_ids=ids, attention_mask=mask).logits
        with headgate.replay(model, trace):
            assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, want)
        short = headgate.record(model, ids[:, :-1])
        with headgate.replay(model, short, last="live") as it:
            got = model(input_ids=ids).logits
        assert it.left == 0
        assert torch.equal(got, model(input_ids=ids).logits)


def test_a_trace_that_does_not_fit_is_named(olmoe):
    model, ids = olmoe
    trace = headgate.record(model, ids)
    layers = dataclasses.replace(trace, expert_ids=trace.expert_ids[:1], layer_names=())
    twice = dataclasses.replace(trace, expert_ids=np.zeros_like(trace.expert_ids))
    physical = dataclasses.replace(trace, expert_ids=trace.expert_ids + 100, num_experts=200)
    narrow = dataclasses.replace(trace, expert_ids=trace.expert_ids[:, :, :1])
    few = dataclasses.replace(trace, expert_ids=trace.expert_ids[:, :3], sequence=None)
    for wrong, message in (
        (layers, r"trace must have the \d+ MoE layers of the model, got 1"),
        (physical, "not physical ids of replicas, got 1"),
        (twice, "name an expert once for a token, got one twice for token 0"),
        (narrow, r"trace must have K = \d+ for .*, got 1"),
        (few, r"trace must have \d+ tokens more for .*, got 3 left"),
    ):
        with pytest.raises(ValueError, match=f"replay: .*{message}"), headgate.replay(model, wrong):
            model(input_ids=ids)
    with pytest.raises(TypeError, match="trace must be a Trace, got str"), headgate.replay(model, "trace.npz"):
        pass
    assert not model._forward_pre_hooks


class TestOwnLayers:
    @pytest.mark.parametrize("name", [n for n in ROUTERS if n not in ("moepp", "longcat", "soft")])
    def test_each_router_repeats_itself_to_the_bit(self, name):
        layer = layer_of(name, hidden=120, dtype=torch.float32)
        x = torch.randn(2, 9, 120)
        torch.manual_seed(1)
        call(layer, x)
        trace = _traced(layer)
        model = torch.nn.Sequential(layer)
        torch.manual_seed(1)
        want = call(layer, x)
        with headgate.replay(model, trace):
            torch.manual_seed(2)
            got = call(layer, x)
        assert torch.equal(got, want)
        assert torch.equal(layer.last_routing.counts, trace_counts(trace))

    def test_a_live_token_keeps_all_its_experts(self):
        """More of them than any recorded token has."""
        layer = layer_of("relu", dtype=torch.float32)
        with torch.no_grad():
            layer.router.weight.normal_()
        x = torch.randn(4, 120)
        x[3] = 20 * layer.router.weight.sum(0)
        call(layer, x)
        want = layer.last_routing.expert_ids[3]
        ids = layer.last_routing.expert_ids[:3, :1].numpy()
        trace = headgate.Trace(np.where(ids < 0, 255, ids).astype(np.uint8)[None], num_experts=8)
        with headgate.replay(layer, trace, last="live"):
            call(layer, x)
        assert (want >= 0).sum() > 4
        assert torch.equal(layer.last_routing.expert_ids[3], want)

    def test_a_pair_without_an_expert_stays_so(self):
        layer, x = layer_of("softmax", dtype=torch.float32), torch.randn(9, 120)
        call(layer, x)
        trace = _traced(layer)
        trace.expert_ids[0, 3, 1] = trace.none
        with headgate.replay(layer, trace):
            call(layer, x)
        assert layer.last_routing.expert_ids[3, 1] == -1
        assert layer.last_routing.weights[3, 1] == 0

    def test_slots_are_not_tokens(self):
        layer, told = layer_of("soft", dtype=torch.float32), layer_of("softmax", dtype=torch.float32)
        call(told, torch.randn(9, 120))
        refused = pytest.raises(TypeError, match="got a SoftRouter, whose experts have slots")
        with refused, headgate.replay(layer, _traced(told)):
            call(layer, torch.randn(9, 120))

    def test_what_a_trace_cannot_say_is_refused(self):
        layer = layer_of("longcat", dtype=torch.float32)
        call(layer, torch.randn(9, 120))
        refused = pytest.raises(TypeError, match="without experts that a trace does not know, got LongCatRouter")
        with refused, headgate.replay(layer, _traced(layer)):
            call(layer, torch.randn(9, 120))


def _traced(layer):
    ids = layer.last_routing.expert_ids
    none = np.where((ids < 0) | (ids >= 8), 255, ids.numpy()).astype(np.uint8)
    return headgate.Trace(none[None], num_experts=8)


def trace_counts(trace):
    return torch.bincount(
        torch.from_numpy(trace.expert_ids[trace.expert_ids != trace.none].astype(np.int64)), minlength=8
    ).int()
