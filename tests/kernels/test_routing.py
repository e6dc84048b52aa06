"""Routing: what it takes, what it turns it into, what it refuses."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from headgate.kernels import Routing


@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_ids_of_any_integer_type_become_int32(kind):
    r = Routing.from_topk(torch.tensor([[0, 3], [1, 2]], dtype=kind), torch.ones(2, 2), 4)
    assert r.expert_ids.dtype == torch.int32
    assert r.expert_ids.tolist() == [[0, 3], [1, 2]]
    assert r.num_experts == 4


def test_weights_stay_in_the_graph_and_in_their_type():
    w = torch.rand(3, 2, dtype=torch.bfloat16, requires_grad=True)
    r = Routing.from_topk(torch.zeros(3, 2, dtype=torch.long), w * 2, 4)
    assert r.weights.dtype == torch.bfloat16
    r.weights.sum().backward()
    assert torch.equal(w.grad, torch.full_like(w, 2))


def test_detach_drops_the_graph_of_every_field():
    fields = dict(weights=torch.rand(3, 2), counts=torch.ones(4, dtype=torch.int32), scores=torch.rand(3, 4))
    fields = {n: t.requires_grad_() * 1 if t.is_floating_point() else t for n, t in fields.items()}
    r = Routing(torch.zeros(3, 2, dtype=torch.int32), num_experts=4, capacity=6, **fields)
    assert r.scores.requires_grad
    for field in dataclasses.fields(r):
        before, after = getattr(r, field.name), getattr(r.detach(), field.name)
        if isinstance(before, torch.Tensor):
            assert not after.requires_grad, field.name
            assert torch.equal(before, after), field.name
        else:
            assert before == after, field.name


def test_is_frozen():
    r = Routing.from_topk(torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1), 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        r.num_experts = 2


@pytest.mark.parametrize(
    ("ids", "weights", "experts", "error", "message"),
    [
        (
            torch.zeros(4, dtype=torch.long),
            torch.ones(4),
            2,
            ValueError,
            r"must both be \[T, K\], got \(4,\) and \(4,\)",
        ),
        (torch.zeros(4, 2, dtype=torch.long), torch.ones(4, 3), 2, ValueError, r"got \(4, 2\) and \(4, 3\)"),
        (torch.zeros(4, 2), torch.ones(4, 2), 2, TypeError, r"expert_ids must be integers, got torch.float32"),
        (torch.zeros(4, 2).bool(), torch.ones(4, 2), 2, TypeError, r"expert_ids must be integers, got torch.bool"),
        (torch.zeros(4, 2).long(), torch.ones(4, 2).long(), 2, TypeError, r"weights must be floating point"),
        ([[0, 1]], [[0.5, 0.5]], 2, TypeError, "must both be tensors, got list and list"),
        (torch.zeros(4, 2).long(), torch.ones(4, 2, device="meta"), 2, ValueError, "on one device, got cpu and meta"),
        (torch.zeros(4, 2).long(), torch.ones(4, 2), 0, ValueError, r"num_experts must be at least 1, got 0"),
    ],
)
def test_bad_input_is_named(ids, weights, experts, error, message):
    with pytest.raises(error, match=message):
        Routing.from_topk(ids, weights, experts)
