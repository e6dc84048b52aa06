"""The balancer and the placements that look at no load: always valid, never worse than EPLB, best on small cases."""

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headgate.placement.search.balance import balance
from headgate.placement.search.eplb import eplb
from headgate.placement.search.simple import linear, random
from headgate.placement.slots import gpu_load, gpu_of_slot

EXAMPLE = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]


def busiest(load, plan, slots, speed=1.0):
    """[L]: the largest load / speed of a GPU, summed slot by slot."""
    found = []
    for weight, row in zip(load, plan, strict=True):
        work = np.zeros(len(slots))
        for expert, gpu in zip(row.tolist(), gpu_of_slot(slots), strict=True):
            work[gpu] += weight[expert] / row.tolist().count(expert)
        found.append((work / speed).max())
    return np.array(found)


def parts(row, slots):
    return [part.tolist() for part in np.split(row, np.cumsum(slots)[:-1])]


def assert_valid(plan, slots, experts):
    for row in plan:
        assert set(row.tolist()) == set(range(experts))
        assert all(len(set(part)) == len(part) for part in parts(row, slots))


def every_plan(experts, slots):
    for choice in product(*(combinations(range(experts), n) for n in slots)):
        if set().union(*choice) == set(range(experts)):
            yield np.array([e for part in choice for e in part])


def test_load_of_gpus_against_a_sum_slot_by_slot():
    plan = eplb(EXAMPLE, [2] * 8)
    np.testing.assert_allclose(gpu_load(EXAMPLE, plan, gpu_of_slot([2] * 8), 8).max(1), busiest(EXAMPLE, plan, [2] * 8))


@pytest.mark.parametrize(
    ("nodes", "groups", "ours", "theirs"),
    [(1, None, [136, 172], [138.5, 172]), (2, 4, [156, 179.5], [156, 179.5])],
)
def test_not_worse_than_eplb_on_its_published_example(nodes, groups, ours, theirs):
    plan = balance(EXAMPLE, [2] * 8, nodes, groups)
    assert_valid(plan, [2] * 8, 12)
    assert busiest(EXAMPLE, plan, [2] * 8).tolist() == ours
    assert busiest(EXAMPLE, eplb(EXAMPLE, [2] * 8, nodes, groups or 1), [2] * 8).tolist() == theirs


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_valid_and_not_worse_than_eplb(data):
    groups, each = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    nodes = data.draw(st.sampled_from([n for n in (1, 2, 4) if groups % n == 0]))
    experts, gpus = groups * each, nodes * data.draw(st.integers(1, 4))
    least = -(-experts // gpus)
    room = data.draw(st.integers(least, max(least, experts // nodes)))
    load = np.array(data.draw(st.lists(st.integers(0, 99), min_size=experts, max_size=experts)))[None]
    slots = [room] * gpus
    kind = groups if data.draw(st.booleans()) else None
    plan = balance(load, slots, nodes, kind, kicks=20)
    assert_valid(plan, slots, experts)
    if kind:
        node = gpu_of_slot(slots) // (gpus // nodes)
        assert all(len(set(node[plan[0] // each == g])) == 1 for g in range(groups))
    theirs = eplb(load, slots, nodes if kind else 1, kind or 1)
    if all(len(set(part)) == len(part) for part in parts(theirs[0], slots)):
        assert busiest(load, plan, slots) <= busiest(load, theirs, slots) * (1 + 1e-12)


@pytest.mark.parametrize(
    ("experts", "slots", "nodes", "groups"), [(64, [9] * 8, 1, None), (64, [9] * 8, 2, 8), (96, [4] * 32, 4, 4)]
)
def test_not_worse_than_eplb_on_random_loads_even_where_it_doubles_replicas(experts, slots, nodes, groups):
    rng = np.random.default_rng(0)
    load = rng.dirichlet(np.full(experts, 0.3), 30) * 1e5
    plan = balance(load, slots, nodes, groups)
    assert_valid(plan, slots, experts)
    theirs = eplb(load, slots, nodes, groups or 1)
    assert any(len(set(part)) < len(part) for row in theirs for part in parts(row, slots))
    assert (busiest(load, plan, slots) <= busiest(load, theirs, slots)).all()


@pytest.mark.parametrize(
    ("experts", "slots", "speed"),
    [(4, [3, 3], None), (5, [2, 2, 2], None), (5, [4, 2, 1], None), (4, [2, 2, 2], [1, 2, 4]), (3, [2, 0, 3], None)],
)
def test_the_best_of_all_plans_on_small_cases(experts, slots, speed):
    load = np.random.default_rng(1).integers(1, 100, (12, experts))
    found = busiest(load, balance(load, slots, speed=speed, kicks=1000), slots, speed or 1.0)
    every = list(every_plan(experts, slots))
    for layer in range(len(load)):
        best = min(busiest(load[layer][None], plan[None], slots, speed or 1.0)[0] for plan in every)
        assert found[layer] == pytest.approx(best)


def test_a_case_in_which_only_doubled_replicas_reach_eplb():
    load, slots = np.array([[90, 20, 10, 0.1]]), [3, 3]
    best = min(busiest(load, plan[None], slots)[0] for plan in every_plan(4, slots))
    assert busiest(load, eplb(load, slots), slots)[0] == pytest.approx(60.1)
    assert busiest(load, balance(load, slots), slots)[0] == pytest.approx(best) == pytest.approx(65)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_pins_uneven_slots_and_speeds(data):
    experts, gpus = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 5))
    slots = data.draw(
        st.lists(st.integers(0, experts), min_size=gpus, max_size=gpus).filter(lambda s: sum(s) >= experts)
    )
    load = np.random.default_rng(0).integers(0, 9, (2, experts))
    speed = data.draw(st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=gpus, max_size=gpus))
    pin = st.tuples(st.integers(0, 1), st.integers(0, experts - 1), st.integers(0, gpus - 1))
    pins = data.draw(st.lists(pin, max_size=4))
    try:
        plan = balance(load, slots, speed=speed, pins=pins, kicks=5)
    except ValueError as error:
        assert pins and "pins must" in str(error)  # noqa: PT017, PT018
        return
    assert_valid(plan, slots, experts)
    for layer, expert, gpu in pins:
        assert expert in parts(plan[layer], slots)[gpu]


def test_groups_with_pins_and_uneven_nodes():
    load = np.random.default_rng(0).integers(1, 99, (3, 8))
    plan = balance(load, [3, 2, 4, 4], 2, 4, speed=[1, 1, 2, 2], pins=[(1, 7, 0), (1, 7, 1)])
    node = gpu_of_slot([3, 2, 4, 4]) // 2
    assert_valid(plan, [3, 2, 4, 4], 8)
    assert set(node[plan[1] // 2 == 3]) == {0}
    assert all(7 in parts(plan[1], [3, 2, 4, 4])[gpu] for gpu in (0, 1))
    assert all(len(set(node[row // 2 == g])) == 1 for row in plan for g in range(4))


def test_a_pinned_group_is_not_swapped_away():
    plan = balance([[9, 9, 8, 8, 7, 7, 1, 1]], [2] * 4, 2, 4, pins=[(0, 0, 0), (0, 6, 2)])
    assert 0 in parts(plan[0], [2] * 4)[0]
    assert 6 in parts(plan[0], [2] * 4)[2]


def test_the_same_seed_the_same_plan_and_kicks_that_pay():
    load = np.random.default_rng(0).dirichlet(np.full(64, 0.5), 10)
    plan = balance(load, [9] * 8, seed=3)
    assert (plan == balance(load, [9] * 8, seed=3)).all()
    assert (busiest(load, plan, [9] * 8) <= busiest(load, balance(load, [9] * 8, kicks=0), [9] * 8)).all()
    assert busiest(load, plan, [9] * 8).mean() * 8 < 1.001
    assert balance(np.zeros((2, 4)), [2, 3]).shape == (2, 5)
    assert balance(np.zeros((0, 4)), [2, 3]).shape == (0, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"load": [[1, np.inf, 1, 1]]}, "balance: load must be finite"),
        ({"slots_of_gpu": [5, 2]}, "slots_of_gpu must be at most E=4, or a GPU would hold an expert twice, got 5"),
        ({"slots_of_gpu": [4, -1]}, "slots_of_gpu must not be negative, got -1"),
        ({"speed": [1, 0]}, r"speed must be positive and finite, got \[1.0, 0.0\]"),
        ({"speed": [1]}, r"speed must be \[G=2\]"),
        ({"nodes": 2, "groups": 1}, "groups must be a multiple of nodes=2 that divides the 4 experts, got 1"),
        ({"nodes": 2, "groups": 2}, r"slots_of_gpu must be at least the 2 experts of a node.*got \[3\] on node 0"),
        ({"pins": [(0, 4, 0)]}, r"pins must be \(layer, expert, gpu\) below \(1, 4, 2\), got \(0, 4, 0\)"),
        ({"kicks": -1}, "kicks must be 0 or more, got -1"),
        ({"pins": [(0, 0)]}, r"pins must be \(layer, expert, gpu\)"),
        ({"pins": [(0, e, 0) for e in range(4)]}, "pins must fit the slots of their GPU, got 4 on GPU 0 of 3 slots"),
        (
            {"pins": [(0, e, g) for e in (0, 1) for g in (0, 1)], "slots_of_gpu": [2, 3]},
            "got 1 free slots for 2 experts",
        ),
        ({"pins": [(0, 0, 0), (0, 1, 1)], "nodes": 2, "groups": 2, "slots_of_gpu": [2, 2]}, "got group 0 on 2"),
        (
            {"pins": [(0, 0, 0), (0, 2, 0)], "nodes": 2, "groups": 2, "slots_of_gpu": [2, 2]},
            "at most 1 groups on a node",
        ),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        balance(**{"load": [[1, 2, 3, 4]], "slots_of_gpu": [3, 3], **change})


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_linear_and_random_are_valid(data):
    experts, gpus = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 5))
    slots = data.draw(
        st.lists(st.integers(0, experts), min_size=gpus, max_size=gpus).filter(lambda s: sum(s) >= experts)
    )
    for plan in (linear(2, experts, slots), random(2, experts, slots, seed=5)):
        assert_valid(plan, slots, experts)
    assert (random(2, experts, slots, seed=5) == random(2, experts, slots, seed=5)).all()


def test_linear_keeps_experts_in_order():
    assert linear(2, 6, [2, 2, 2]).tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    assert linear(1, 6, [3, 3, 3]).tolist() == [[0, 1, 2, 2, 3, 4, 4, 5, 0]]
    assert not (random(1, 64, [8] * 8) == linear(1, 64, [8] * 8)).all()
    with pytest.raises(ValueError, match="linear: slots_of_gpu must hold each of 6 experts"):
        linear(1, 6, [2, 2])
