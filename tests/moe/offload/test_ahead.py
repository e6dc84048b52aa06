"""What is foreseen: the next layer's router asked early, how often it is right, and when a fetch ahead is worth it."""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import nn

from headgate.moe.offload.ahead import Gate, Router, ranks, router_of
from headgate.moe.offload.pace import Pace


def test_ranks():
    scores = torch.tensor([[0.1, 0.5, 0.3, 0.0], [0.9, 0.0, 0.2, 0.1]])
    assert ranks(scores[:1], 3).tolist() == [2, 0, 1, 3]
    assert ranks(scores, 2).tolist() == [0, 0, 1, 2]
    assert ranks(scores, 9).tolist() == [0, 0, 1, 2]


def test_the_router_beside_the_experts(stack):
    router = router_of(stack, "blocks.1.experts", 8, 32)
    x = torch.randn(5, 32)
    torch.testing.assert_close(router.scores(x), stack.blocks[1].router.logits(x))
    assert router_of(stack, "blocks.1.experts", 9, 32) is None
    assert router_of(stack, "blocks.1.experts", 8, 31) is None


def test_the_gate_counts_how_often_its_places_are_right():
    """Of two choices foreseen, the first comes true each time, the second never."""
    rows, ids = torch.ones(1, 2), torch.tensor([[0, 1]])
    linear = nn.Linear(2, 4, bias=False)
    linear.weight.data = torch.tensor([[3.0, 0], [2.0, 0], [1.0, 0], [0.0, 0]])
    gate = Gate([None, Router((linear, "weight"))])
    first = gate.guess(0, rows, ids)[1]
    np.testing.assert_array_equal(first, [0.5, 0.5, 0.5, 0.5])
    for _ in range(60):
        gate.guess(0, rows, ids)
        gate.came(1, np.array([0, 3]))
    to, chance = gate.guess(0, rows, ids)
    assert to == 1
    assert (chance > [0.95, 0, 0, 0.95]).all()
    assert (chance[1:3] < 0.05).all()
    np.testing.assert_array_equal(gate.guess(0, torch.ones(2, 2), ids)[1], 0.5)  # several tokens are counted apart
    assert gate.guess(1, rows, ids) is None


def test_pace():
    pace = Pace(2)
    assert pace.order(1, 0, 0.0, 0.0) == (0.0, np.inf)
    pace.asked(1)
    time.sleep(0.02)
    for n in range(60):
        pace.order(1, 0, 1e-3, n * 1e9)
        time.sleep(0.003)
        pace.asked(1)
    price, room = pace.order(1, 1, 1e-3, 1e12)
    assert price > 0.95  # something is always on the way
    assert room > 2  # three loads, at least
    pace.new_sequence()
    time.sleep(0.1)
    pace.asked(1)
    assert pace.order(1, 1, 1e-3, 1e12)[1] == room
    pace.asked(0)  # never ordered for
