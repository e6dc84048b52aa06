"""Replica choice against HiGHS: the linear program, and the program in whole numbers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from headgate.bench.placement.choice import measure
from headgate.placement.live.choice import Choice
from headgate.placement.search.eplb import eplb
from headgate.placement.slots import gpu_of_slot
from headgate.placement.traces.trace import Trace


def solved(expert, gpu, speed, counts, whole):
    """The least t by HiGHS, over x [S] and t."""
    slots = len(expert)
    sums = np.zeros((len(counts), slots + 1))
    sums[expert, np.arange(slots)] = 1
    work = np.zeros((len(speed), slots + 1))
    work[gpu, np.arange(slots)] = 1
    work[:, -1] = -np.asarray(speed)
    cost = np.append(np.zeros(slots), 1)
    kinds = np.append(np.full(slots, int(whole)), 0)
    rules = [LinearConstraint(sums, counts, counts), LinearConstraint(work, -np.inf, 0)]
    return milp(cost, integrality=kinds, constraints=rules, bounds=Bounds(0, np.inf)).fun


@st.composite
def cases(draw):
    experts, gpus = draw(st.integers(1, 7)), draw(st.integers(1, 5))
    extra = draw(st.lists(st.integers(0, experts - 1), max_size=8))
    expert = np.array([*range(experts), *extra])
    at = st.lists(st.integers(0, gpus - 1), min_size=len(expert), max_size=len(expert))
    speed = draw(st.none() | st.lists(st.sampled_from([0.5, 1.0, 1.7, 3.0]), min_size=gpus, max_size=gpus))
    largest = draw(st.sampled_from([3, 40, 100_000]))
    counts = draw(st.lists(st.integers(0, largest), min_size=experts, max_size=experts))
    return expert, np.array(draw(at)), speed, gpus, np.array(counts)


@settings(max_examples=300, deadline=None)
@given(cases())
def test_the_optimum_is_that_of_highs(case):
    expert, gpu, speed, gpus, counts = case
    choice = Choice(expert, gpu, speed or np.ones(gpus))
    want = solved(expert, gpu, speed or np.ones(gpus), counts, False)
    assert float(choice.least_time(counts)) == pytest.approx(want, rel=1e-9, abs=1e-9)


@settings(max_examples=200, deadline=None)
@given(cases())
def test_whole_rows_are_the_best_that_whole_rows_can_do(case):
    expert, gpu, speed, gpus, counts = case
    speed = np.ones(gpus) if speed is None else np.array(speed)
    rows = Choice(expert, gpu, speed).rows(counts)
    assert rows.dtype == np.int64
    assert (rows >= 0).all()
    assert (np.bincount(expert, rows, len(counts)) == counts).all()
    time = (np.bincount(gpu, rows, gpus) / speed).max()
    if (speed == 1).all():  # an integral flow fills whole limits
        assert time == np.ceil(float(Choice(expert, gpu, speed).least_time(counts)) - 1e-9)
    if counts.sum() < 300:  # where HiGHS's own tolerance of whole numbers cannot matter
        assert time == pytest.approx(solved(expert, gpu, speed, counts, True), rel=1e-6, abs=1e-6)


def test_rows_must_pass_over_a_gpu_between():
    # expert 0 on GPUs 0 and 1, expert 1 on 1 and 2: what is too much on 0 goes to 1, and what is there to 2
    choice = Choice([0, 0, 1, 1], [0, 1, 1, 2])
    assert np.bincount([0, 1, 1, 2], choice.rows([20, 1])).tolist() == [10, 10, 1]
    assert np.bincount([0, 1, 1, 2], choice.rows([18, 9])).tolist() == [9, 9, 9]
    assert choice.least_time([18, 8]) == 9
    assert choice.least_time([17, 9]) == pytest.approx(26 / 3)


def test_an_even_split_that_is_best_stays():
    assert Choice([0, 1, 0, 1], [0, 0, 1, 1]).rows([7, 8]).tolist() == [4, 4, 3, 4]
    assert Choice([0, 1, 0, 1], [0, 0, 1, 1]).rows([0, 0]).tolist() == [0, 0, 0, 0]


def test_no_more_moves_than_the_limit_asks_for():
    assert Choice([0, 1, 0, 2], [0, 0, 1, 2]).rows([10, 6, 9]).tolist() == [3, 6, 7, 9]


def test_many_layers_are_each_by_itself():
    load = np.random.default_rng(0).integers(0, 200, (5, 16))
    plan, gpu = eplb(load, [5] * 4), gpu_of_slot([5] * 4)
    counts = np.random.default_rng(1).integers(0, 60, (5, 16))
    every = Choice(plan, gpu)
    for layer in range(5):
        one = Choice(plan[layer], gpu)
        assert every.rows(counts)[layer].tolist() == one.rows(counts[layer]).tolist()
        assert every.least_time(counts)[layer] == one.least_time(counts[layer])


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: Choice([0, 2], [0, 1]), "expert_of_slot must hold each of 3 experts, got none of 1 in layer 0"),
        (lambda: Choice([[0, 1], [1, 1]], [0, 1]), "got none of 0 in layer 1"),
        (lambda: Choice([0, -1], [0, 1]), "expert_of_slot must be 0 or more"),
        (lambda: Choice([0, 1], [0, 1, 1]), "gpu_of_slot must be .* beside"),
        (lambda: Choice([0, 1], [0, 2], [1, 1]), "gpu_of_slot must be below the 2 speeds, got 2"),
        (lambda: Choice([0, 1], [0, 1], [1, -1]), "speed must be positive and finite"),
        (lambda: Choice([0, 1], [0, 1]).rows([1, 2, 3]), r"counts must have shape \(2,\), got \(3,\)"),
        (lambda: Choice([0, 1], [0, 1]).rows([1, -2]), "counts must not be negative, got -2"),
    ],
)
def test_bad_input(made, message):
    with pytest.raises(ValueError, match=message):
        made()


def test_bad_types():
    with pytest.raises(TypeError, match="expert_of_slot must be whole numbers, got float64"):
        Choice([0.0, 1.0], [0, 1])
    with pytest.raises(TypeError, match="counts must be whole numbers"):
        Choice([0, 1], [0, 1]).rows([1.0, 2.0])


def test_the_measurement_orders_its_figures():
    rng = np.random.default_rng(0)
    ids = np.minimum(rng.geometric(0.15, (2, 400, 2)) - 1, 15).astype(np.uint8)
    found = measure(Trace(ids[:, :200], 16), Trace(ids[:, 200:], 16), gpus=4, spare=4, batch=50, seed=0)
    assert 1 <= found["program"] <= found["whole_rows"] <= found["even"]
    assert found["program"] < found["even"]
    assert found["calls"] == 6
    with pytest.raises(ValueError, match="spare must make E"):
        measure(Trace(ids, 16), Trace(ids, 16), gpus=4, spare=3)
    with pytest.raises(ValueError, match="batch must be at most the 400 tokens, got 401"):
        measure(Trace(ids, 16), Trace(ids, 16), gpus=4, spare=4, batch=401)
