"""Experts of different sizes, skips and modules in one layer, beside a loop over experts in plain torch."""

import numpy as np
import pytest
import torch
from torch import nn

import headgate
from headgate.kernels.routing import Routing
from headgate.moe import MoE, SizedExperts, budget_loss
from headgate.moe.lora import attached

D, F64 = 16, torch.float64


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(D, D, dtype=F64)

    def forward(self, x):
        return self.a(x).tanh()


def sizes():
    return [8, 0, 24, Twice(), 8, 3]


def by_loop(experts, x, routing):
    """The truth: each pair for itself."""
    y = torch.zeros_like(x)
    for t, row in enumerate(routing.expert_ids.tolist()):
        for k, e in enumerate(row):
            if 0 <= e < experts.num_experts:
                y[t] = y[t] + routing.weights[t, k] * one(experts, e, x[t])
    return y


def one(experts, e, x):
    if str(e) in experts.whole:
        return experts.whole[str(e)](x[None])[0]
    for those, group in zip(experts.members, experts.groups, strict=True):
        if e in those:
            gate, up = (group.w_gate_up[those.index(e)] @ x).chunk(2)
            return group.w_down[those.index(e)] @ (nn.functional.silu(gate) * up)
    return torch.zeros_like(x)


@pytest.mark.parametrize("case", ["mixed", "none", "all on one", "no token"])
def test_a_loop_over_experts_agrees(case, assert_close):
    experts = SizedExperts(D, sizes(), dtype=F64)
    tokens = 0 if case == "no token" else 33
    x, g = torch.randn(tokens, D, dtype=F64, requires_grad=True), torch.randn(tokens, D, dtype=F64)
    ids = torch.stack([torch.randperm(6)[:2] for _ in range(tokens)]) if tokens else torch.empty(0, 2, dtype=torch.long)
    ids = {"none": torch.full_like(ids, -1), "all on one": torch.full_like(ids, -1)}.get(case, ids)
    if case == "all on one":
        ids[:, 1] = 3
    if case == "mixed":
        ids[5, 0], ids[6, 1] = -1, 6  # no expert either way
    weights = torch.rand(ids.shape, dtype=F64, requires_grad=True)
    found = []
    for run in (experts, lambda x, routing: by_loop(experts, x, routing)):
        for t in (x, weights, *experts.parameters()):
            t.grad = None
        y = run(x, Routing.from_topk(ids, weights, 6))
        (y * g + 0 * x).sum().backward()
        zero = [torch.zeros_like(t) if t.grad is None else t.grad for t in (x, weights, *experts.parameters())]
        found.append((y, *zero))
    for a, b in zip(*found, strict=True):
        assert_close(a, b)


def test_each_size_is_one_grouped_call_and_a_skip_none(monkeypatch):
    calls = []
    ffn = attached.grouped_ffn
    monkeypatch.setattr(
        attached, "grouped_ffn", lambda x, r, *w, **k: calls.append(r.num_experts) or ffn(x, r, *w, **k)
    )
    layer = MoE(D, sizes(), 6, 2, dtype=F64)
    layer(torch.randn(4, 5, D, dtype=F64))
    assert calls == [1, 2, 1]  # F = 3, 8, 24
    assert layer.experts.costs == [768, 0, 2304, 512, 768, 288]


def test_a_budget_moves_what_a_token_costs_to_it():
    torch.manual_seed(0)
    layer, x = MoE(D, [64, 4, 0], 3, 1, budget=0.25, budget_coef=1.0), torch.randn(256, D)
    optimizer = torch.optim.Adam(layer.router.parameters(), lr=0.05)
    before = None
    for _ in range(60):
        layer(x).sum().mul(0).backward()
        before = layer.aux_losses["budget"].item() if before is None else before
        optimizer.step()
        optimizer.zero_grad()
    assert layer.aux_losses["budget"] < 1e-3 < before


def test_the_budgets_value_and_gradient(assert_close):
    scores = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6], [9.0, 9.0, 9.0]], dtype=F64, requires_grad=True)
    ids = torch.zeros(3, 1, dtype=torch.int32)
    mask = torch.tensor([True, True, False])
    routing = Routing(ids, torch.ones(3, 1), 3, scores=scores, mask=mask)
    loss = budget_loss(routing, [8.0, 4.0, 0.0], 0.4)
    assert_close(loss, torch.tensor(((0.75 + 0.3) / 2 - 0.4) ** 2, dtype=F64))
    (grad,) = torch.autograd.grad(loss, scores)
    assert grad[2].eq(0).all()
    assert_close(grad[0, 0] - grad[0, 2], torch.tensor(2 * 0.125 * 0.5, dtype=F64))


def test_a_path_through_shared_modules_is_a_trace_of_their_numbers():
    """A walk of three steps through one pool, of DNA's kind: a layer of the trace is a step, an id a module."""
    pool = SizedExperts(D, [8, nn.Linear(D, D), 0, 24])
    model = Walk(pool)
    trace = headgate.record(model, [torch.randint(9, (2, 7))])
    assert trace.expert_ids.shape == (3, 14, 1)
    assert sum(p.numel() for p in model.steps.parameters()) - 3 * 4 * D == sum(p.numel() for p in pool.parameters())
    with headgate.replay(model, trace):
        model(torch.randint(9, (2, 7)))
    for step, ids in zip(model.steps, trace.expert_ids, strict=True):
        assert np.array_equal(step.last_routing.expert_ids.numpy(), ids.astype(np.int32))


class Walk(nn.Module):
    def __init__(self, pool):
        super().__init__()
        self.embed = nn.Embedding(9, D)
        self.steps = nn.ModuleList(MoE(D, pool, 4, 1) for _ in range(3))

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for step in self.steps:
            x = x + step(x)
        return x


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SizedExperts(D, [8, -1]), ValueError, r"sizes\[1\] must not be negative, got -1"),
        (lambda: SizedExperts(D, [8, "x"]), TypeError, r"sizes\[1\] must be an integer or a module, got 'x'"),
        (lambda: SizedExperts(D, []), ValueError, "sizes must name at least one expert, got none"),
        (lambda: MoE(D, [8, 8], 3, 1), ValueError, "intermediate_size must be .* num_experts 3, got 2"),
        (lambda: MoE(D, 8, 3, 1, budget=0.5), ValueError, "budget must come with experts of different sizes"),
        (lambda: MoE(D, [8, 4], 2, 1, budget=2.0), ValueError, "budget must be between 0 and 1, got 2.0"),
        (lambda: MoE(D, [0, 0], 2, 1, budget=0.5), ValueError, "an expert that costs something, got skips alone"),
        (lambda: MoE(D, [8, 4], 2, 1, budget=0.5, router="soft"), ValueError, "budget must be None for a SoftRouter"),
    ],
)
def test_what_makes_no_sense_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
