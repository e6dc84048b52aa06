"""headgate.tune_only (ESFT): the smallest sets, nothing for the others, the same model afterwards, small files."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import headgate
from headgate.moe.lora.tune import experts_for, scores_of

D, F, E, K = 16, 8, 6, 2


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(32, D)
        self.layers = nn.ModuleList(headgate.MoE(D, F, E, K, bias=True) for _ in range(2))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.table(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        return x


IDS = torch.arange(24).view(2, 12)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Layers()


@pytest.fixture
def trace(model):
    return headgate.record(model, [IDS], weights=True)


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.8, 1.0])
def test_the_set_is_the_smallest_that_reaches_the_share(share):
    for seed in range(20):
        scores = np.random.default_rng(seed).dirichlet(np.full(7, 0.5))
        found = experts_for(scores, share)
        assert scores[found].sum() >= share - 1e-9
        smaller = (scores[list(c)].sum() for c in combinations(range(7), len(found) - 1))
        assert max(smaller, default=0.0) < share
    assert experts_for(np.full(4, 0.25), 0.5) == [0, 1], "of equal ones the lower"


def test_scores_are_counted_from_the_trace(trace):
    for by in ("tokens", "gates"):
        want = np.zeros((2, E))
        for layer, (ids, weights) in enumerate(zip(trace.expert_ids, trace.weights, strict=True)):
            for e, w in zip(ids.flatten(), weights.flatten(), strict=True):
                want[layer, e] += 1 if by == "tokens" else w
        np.testing.assert_allclose(scores_of(trace, by), want / want.sum(1, keepdims=True), rtol=1e-6)


def train(model, tuned, steps=3):
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(IDS).square().mean().backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("by", ["tokens", "gates"])
def test_chosen_experts_learn_and_nothing_is_made_for_the_others(model, trace, by, tmp_path, assert_close):
    base, before = model(IDS).detach(), {n: p.clone() for n, p in model.named_parameters()}
    names = [*model.state_dict()]
    tuned = headgate.tune_only(model, trace, 0.5, by=by)
    assert_close(model(IDS), base)
    chosen = tuned.chosen
    assert all(0 < len(c) < E for c in chosen.values())
    optimizer = train(model, tuned)
    for n, p in model.named_parameters():
        assert (p.grad is not None) == (".tuned." in n), n
    each = sum(p[0].numel() for n, p in before.items() if ".experts." in n and "layers.0" in n)
    state = sum(s["exp_avg"].numel() for s in optimizer.state.values())
    assert state == each * sum(map(len, chosen.values()))
    y = model(IDS).detach()
    tuned.save(tmp_path / "some.safetensors")
    assert tuned.finish() is model
    assert [*model.state_dict()] == names
    assert_close(model(IDS), y)
    for n, p in model.named_parameters():
        layer = n.rpartition(".")[0]
        moved = {e for e in range(E) if not torch.equal(p[e], before[n][e])} if layer in chosen else set()
        assert moved <= set(chosen.get(layer, ())), n
        assert p.requires_grad
        assert layer in chosen or torch.equal(p, before[n]), n
    torch.manual_seed(0)
    other = headgate.load_tuned(Layers(), tmp_path / "some.safetensors")
    assert torch.equal(other(IDS), model(IDS))
    whole = sum(p.nbytes for n, p in model.named_parameters() if ".experts." in n)
    assert (tmp_path / "some.safetensors").stat().st_size < whole


def test_the_frozen_ones_may_be_offloaded(model, trace, tmp_path, assert_close):
    tuned = headgate.tune_only(model, trace, 0.5)

    def step():
        model.zero_grad()
        y = model(IDS)
        y.square().mean().backward()
        return [y.detach(), *(p.grad.clone() for p in tuned.parameters())]

    want = step()
    with headgate.offload(model, budget="50%", disk=tmp_path):
        got = step()
        with pytest.raises(ValueError, match=r"Tuned\.finish: experts must be in place"):
            tuned.finish()
    for a, b in zip(got, want, strict=True):
        assert_close(a, b)
    tuned.finish()


def test_the_choice_is_loras_too(model, trace):
    chosen = headgate.tune_only(model, trace, 0.5)
    sets = chosen.chosen
    chosen.finish()
    lora = headgate.lora(model, 2, experts=sets)
    assert {name: one.chosen for name, one in lora.layers.items()} == sets


def test_bad_input_is_named_before_anything_changes(model, trace, tmp_path):
    names = [*model.state_dict()]

    def fails(match, error=ValueError, of=None, what=None, share=0.2, **options):
        with pytest.raises(error, match=match):
            headgate.tune_only(of or model, trace if what is None else what, share, **options)
        assert [*model.state_dict()] == names

    fails(r"tune_only: share must be above 0 and at most 1, got 0", share=0)
    fails("tune_only: by must be one of tokens, gates, got 'x'", by="x")
    fails("tune_only: trace must be a Trace, got str", TypeError, what="trace")
    bare = headgate.Trace(trace.expert_ids, E)
    fails('tune_only: trace must have weights for by="gates"', what=bare, by="gates")
    fails("tune_only: trace must have the 2 layers of the model, got 1", what=headgate.Trace(trace.expert_ids[:1], E))
    none = headgate.Trace(np.full((2, 3, 2), 255, np.uint8), E)
    fails("tune_only: trace must have choices of the 6 experts of layers.0.experts, got none", what=none)
    fails("must have experts that run through Headgate", of=nn.Linear(2, 2))
    tuned = headgate.tune_only(model, trace)
    with pytest.raises(ValueError, match="tune_only: model must have no experts that learn apart yet"):
        headgate.tune_only(model, trace)
    with pytest.raises(ValueError, match=r"lora: .* must have no experts that learn apart"):
        headgate.lora(model, 2)
    tuned.save(tmp_path / "t.safetensors")
    tuned.finish()
    small = nn.ModuleDict({"layers": nn.ModuleList(headgate.MoE(D, 4, E, K, bias=True) for _ in range(2))})
    with pytest.raises(ValueError, match=r"load_tuned: layers\.0\.experts\.w_gate_up of .* must be of shape"):
        headgate.load_tuned(small, tmp_path / "t.safetensors")
