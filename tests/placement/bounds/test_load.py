"""No placement is more even than load_bound says, by exhaustive search; and it is reached where it should be."""

from itertools import combinations, permutations, product

import numpy as np
import pytest
from scipy.optimize import linprog

from headgate.placement.bounds import load_bound


def evenest(load: np.ndarray, slots: list[int], speed: np.ndarray) -> float:
    """The least mean over layers of (busiest GPU's time) / (even time), every way to place one layer tried."""
    ways = np.array(sorted(set(permutations(np.repeat(np.arange(len(slots)), slots)))))
    ratios = []
    for row in load:
        times = np.stack([np.where(ways == g, row, 0).sum(1) / speed[g] for g in range(len(slots))])
        even = row.sum() / speed.sum()
        ratios.append(times.max(0).min() / even if even else 1.0)
    return float(np.mean(ratios))


@pytest.mark.parametrize("slots", [[3, 3], [2, 2, 2], [1, 2, 3], [1, 1, 4], [6], [1] * 5, [4, 2]], ids=str)
@pytest.mark.parametrize("uneven", [False, True])
def test_no_placement_is_more_even(slots, uneven):
    rng, reached = np.random.default_rng(len(slots)), 0
    for _ in range(30):
        load = np.floor(10 * rng.pareto(1.0, (1, sum(slots))))
        speed = rng.uniform(0.5, 2, len(slots)) if uneven else np.ones(len(slots))
        found, true = load_bound(load, slots, speed), evenest(load, slots, speed)
        assert found <= true
        reached += found > true * 0.99
    assert reached >= 10  # a bound of 1 would be right as well


def test_layers_are_averaged_and_empty_ones_are_even():
    assert load_bound([[9, 1, 1, 1], [0, 0, 0, 0]], [2, 2]) == pytest.approx((10 / 6 + 1) / 2)
    assert load_bound(np.zeros((0, 4)), [2, 2]) == 1
    assert load_bound([[1, 1]], [1, 1], [1, 3]) == pytest.approx(2)  # one each, where 0.5 and 1.5 would be even


@pytest.mark.parametrize(("slots", "experts"), [([2, 2], 3), ([2, 1, 1], 3), ([1, 1, 1], 2)], ids=str)
def test_replicas_are_no_more_even_than_the_best_division(slots, experts):
    """Every way to fill the slots; the loads are divided by a linear program: least t, shares x[e, g] where e is."""
    rng, gpus = np.random.default_rng(0), len(slots)
    ways = [
        held
        for held in product(*(list(combinations(range(experts), min(s, experts))) for s in slots))
        if {e for each in held for e in each} == set(range(experts))
    ]
    above = 0
    for _ in range(5):
        load, speed = rng.pareto(1.0, experts), rng.uniform(0.5, 2, gpus)
        best = np.inf
        for held in ways:
            rooms = np.array([[e in each for each in held] for e in range(experts)])
            whole = np.kron(np.eye(experts), np.ones(gpus))
            of_gpu = np.kron(np.ones(experts), np.eye(gpus))
            done = linprog(
                np.r_[np.zeros(experts * gpus), 1],
                A_ub=np.c_[of_gpu, -speed],
                b_ub=np.zeros(gpus),
                A_eq=np.c_[whole, np.zeros(experts)],
                b_eq=load,
                bounds=[*((0, None if room else 0) for room in rooms.ravel()), (0, None)],
            )
            best = min(best, done.fun / (load.sum() / speed.sum()))
        found = load_bound(load[None], slots, speed)
        assert found <= best * (1 + 1e-9)
        above += found > 1
    assert above or len(slots) == 2


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (dict(load=[1, 2]), ValueError, r"load must have 2 dimensions, got \(2,\)"),
        (dict(load=[[1, -2]]), ValueError, "load must be finite and at least 0, got -2"),
        (dict(load=[["a", "b"]]), TypeError, "load must be real numbers"),
        (dict(slots_of_gpu=[1]), ValueError, "slots_of_gpu must sum to at least E=2, got 1"),
        (dict(slots_of_gpu=[]), TypeError, "slots_of_gpu must be whole numbers"),
        (dict(speed=[1.0]), ValueError, "speed must be positive, one for each of 2 GPUs"),
        (dict(speed=[1.0, 0.0]), ValueError, "speed must be positive"),
        (dict(speed=[1.0, np.inf]), ValueError, "speed must be finite"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_input_is_refused(arguments, error, says):
    good = dict(load=[[1, 2]], slots_of_gpu=[1, 1])
    with pytest.raises(error, match=f"load_bound: {says}"):
        load_bound(**{**good, **arguments})
