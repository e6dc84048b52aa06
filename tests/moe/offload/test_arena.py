"""The slots: what a budget says, what it pays for, and the one piece of memory that they are."""

from __future__ import annotations

import re

import pytest
import torch
from offload_cases import D, F, host_store, layers_of, mixed, weights

from headgate.moe.offload.arena import Arena, arena_bytes, parse_budget, plan_slots


@pytest.mark.parametrize(
    ("budget", "size"),
    [
        ("8GiB", 8 << 30), ("1.5 MB", 1_500_000), ("64kib", 65536), ("12", 12), ("12B", 12), ("2T", 2 * 10**12),
        ("25%", 250), ("12.5 %", 125), ("100%", 1000), (0.25, 250), (1.0, 1000), (77, 77), ("0.5 kB", 500),
    ],
)  # fmt: skip
def test_budgets(budget, size):
    assert parse_budget(budget, 1000) == size


RULE = (
    r'budget must be bytes \("8GiB", "500 MB", 4096\) or a share of all experts, above 0 and at most 1 '
    r'\("25%", 0.25\), or "auto" for a model'
)


@pytest.mark.parametrize(
    ("budget", "error"),
    [
        ("", ValueError), ("much", ValueError), ("8 GiBs", ValueError), ("-1", ValueError), ("25%%", ValueError),
        (0, ValueError), (0.0, ValueError), (-0.5, ValueError), (float("nan"), ValueError), ("0%", ValueError),
        (1.5, ValueError), ("150%", ValueError), ("0.25", ValueError), ("1.5", ValueError), ("0.5 B", ValueError),
        ("9" * 400, ValueError), (None, TypeError), (True, TypeError), ([1], TypeError),
    ],
)  # fmt: skip
def test_bad_budgets(budget, error):
    with pytest.raises(error, match=f"^offload: {RULE}, got {re.escape(repr(budget))}$"):
        parse_budget(budget, 1000)


def test_a_number_that_may_have_been_meant_as_a_share():
    layers = layers_of(weights())
    with pytest.raises(ValueError, match=r'for 1 experts of each layer, got 25 bytes \(a share is "25%" or 0.25\)$'):
        plan_slots(layers, 25, 1, "layer")
    with pytest.raises(ValueError, match=r"for 1 experts of each layer, got 101$"):
        plan_slots(layers, 101, 1, "layer")


@pytest.mark.parametrize("scope", ["layer", "shared"])
@pytest.mark.parametrize("share", [0.4, 0.5, 0.77, 1.0])
def test_slots_take_the_budget_and_no_more(scope, share):
    """No pool has more slots than experts, no slot more would fit, shares differ by less than a slot."""
    layers, _ = mixed()
    size = int(share * sum(x.nbytes for x in layers)) + 64 * 6
    kinds, slots, places, _ = plan_slots(layers, size, 1, scope)
    assert arena_bytes(kinds, slots) <= size
    per_pool = (places.first[1:] - places.first[:-1]).tolist()
    assert sum(per_pool) == sum(slots) == places.slots
    experts = [0] * len(per_pool)
    kind_of = {}
    for l, layer in enumerate(layers):
        for e in range(layer.experts):
            experts[places.of[l, e]] += 1
            kind_of[places.of[l, e]] = layer.kind(e)
    assert all(1 <= s <= n for s, n in zip(per_pool, experts, strict=True))
    for p, (s, n) in enumerate(zip(per_pool, experts, strict=True)):
        one_more = [m + (kind == kind_of[p]) for kind, m in zip(kinds, slots, strict=True)]
        assert s == n or arena_bytes(kinds, one_more) > size
    if share == 1.0:
        assert per_pool == experts
    first = 0  # a pool's slots are those of its kind
    for kind, n in zip(kinds, slots, strict=True):
        for p in range(len(per_pool)):
            if first <= places.first[p] < first + n:
                assert kind_of[p] == kind
        first += n


def test_equal_layers_have_equal_slots():
    layers = layers_of(weights(layers=4, experts=64))
    _, slots, places, _ = plan_slots(layers, "25%", 6, "layer")
    assert slots == [64]
    assert places.first.tolist() == [0, 16, 32, 48, 64]
    assert plan_slots(layers, "25%", 6, "shared").places.first.tolist() == [0, 64]


@pytest.mark.parametrize("scope", ["layer", "shared"])
def test_spare_slots_take_nothing_that_is_needed(scope):
    """Out of the budget, one in 16 up to 9, and none before each layer has what it must have."""
    layers = layers_of(weights(layers=2, experts=40))
    expert, top_k = layers[0].kind(0).nbytes, 20
    least = expert * top_k * (2 if scope == "layer" else 1)
    for more in (0, 1, 2, 20):
        for detours in (False, True):
            found = plan_slots(layers, least + more * expert, top_k, scope, detours)
            assert arena_bytes(found.kinds, found.slots) <= least + more * expert
            assert found.spares == (min(more, (least // expert + more) // 16) if detours else 0)
            assert found.places.slots + found.spares == sum(found.slots) == least // expert + more
        with pytest.raises(ValueError, match=f"at least {least} bytes, .*, got {least - 1}$"):
            plan_slots(layers, least - 1, top_k, scope, detours=True)
    assert plan_slots(layers_of(weights(layers=2, experts=128)), 1.0, 1, scope, detours=True).spares == 9
    assert plan_slots(mixed()[0], 1.0, 1, scope, detours=True).spares == 0, "experts of several kinds share none"


def test_an_arena_is_one_piece_of_memory_on_a_page():
    layers, _ = mixed()
    kinds, slots, places, _ = plan_slots(layers, 1.0, 1, "layer")
    arena = Arena(kinds, slots, "cpu")
    every = [t for s in range(places.slots) for t in arena.slot(s).values()]
    begin, end = min(t.data_ptr() for t in every), max(t.data_ptr() + t.nbytes for t in every)
    assert begin % 4096 == 0
    assert end - begin <= arena.nbytes
    for i, t in enumerate(every):
        t.view(torch.uint8).fill_(i)
    assert all((t.view(torch.uint8) == i).all() for i, t in enumerate(every)), "slots overlap"
    assert arena.weights(arena.first[1], arena.first[2])["w_down"].format == "mxfp4"
    assert host_store(weights()).layers[0].kind(0).nbytes == 3 * F * D * 4
