"""Bits for each expert: never beaten by brute force where exact, and within the stated bound where not."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headgate.placement.caching import precision
from headgate.placement.caching.precision import assign


def brute(costs, sizes, *, budget_bytes=None, error_budget=None):
    """The least error, or the fewest bytes, over every choice; None where none meets the budget."""
    found = []
    for choice in itertools.product(range(costs.shape[1]), repeat=len(costs)):
        rows = np.arange(len(costs))
        error, size = costs[rows, list(choice)].sum(), sizes[rows, list(choice)].sum()
        if budget_bytes is not None and size <= budget_bytes:
            found.append(error)
        elif error_budget is not None and error <= error_budget * (1 + 1e-12):
            found.append(size)
    return min(found, default=None)


@st.composite
def problems(draw):
    x, b = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    errors = st.integers(0, 50).map(lambda n: n / 8)
    costs = np.array(draw(st.lists(st.lists(errors, min_size=b, max_size=b), min_size=x, max_size=x)))
    sizes = np.array(draw(st.lists(st.lists(st.integers(0, 30), min_size=b, max_size=b), min_size=x, max_size=x)))
    if draw(st.booleans()):
        sizes[:] = sizes[0]
    uses = np.array(draw(st.lists(st.integers(0, 3), min_size=x, max_size=x)), float)
    return costs, sizes, uses, draw(st.floats(0, 1))


def budget_of(weight, share):
    """Somewhere from the least to the most that there is."""
    return weight.min(1).sum() + share * (weight.max(1).sum() - weight.min(1).sum())


class TestAgainstBruteForce:
    @given(problems())
    @settings(max_examples=200, deadline=None)
    def test_the_table_is_exact(self, problem):
        costs, sizes, uses, share = problem
        weighted, rows = costs * uses[:, None], np.arange(len(costs))
        room = int(budget_of(sizes, share))
        got = assign(costs, sizes, budget_bytes=room, uses=uses)
        assert got.bytes == sizes[rows, got.choice].sum() <= room
        assert got.error == pytest.approx(weighted[rows, got.choice].sum())
        assert got.error == pytest.approx(brute(weighted, sizes, budget_bytes=room))
        assert got.gap == 0.0
        allowed = budget_of(weighted, share)
        got = assign(costs, sizes, error_budget=allowed, uses=uses)
        assert got.error <= allowed * (1 + 1e-9)
        assert got.bytes == brute(weighted, sizes, error_budget=allowed)
        assert got.gap == 0.0

    @given(problems())
    @settings(max_examples=200, deadline=None)
    def test_without_the_table_the_bound_holds_and_the_budget_is_kept(self, problem):
        costs, sizes, uses, share = problem
        weighted = costs * uses[:, None]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(precision, "_TABLE", 0)
            room, allowed = int(budget_of(sizes, share)), budget_of(weighted, share)
            least, fewest = (
                assign(costs, sizes, budget_bytes=room, uses=uses),
                assign(costs, sizes, error_budget=allowed, uses=uses),
            )
        best = brute(weighted, sizes, budget_bytes=room)
        assert least.bytes <= room
        assert least.bound - 1e-9 <= best <= least.error + 1e-9
        best = brute(weighted, sizes, error_budget=allowed)
        assert fewest.error <= allowed * (1 + 1e-9)
        assert fewest.bound - 1e-9 <= best <= fewest.bytes + 1e-9


def test_many_experts_are_within_a_thousandth_of_the_bound(monkeypatch):
    """26 layers of 64 experts in bf16, int8 and int4; and the table and the relaxation agree to that."""
    draw = np.random.default_rng(0)
    scale = draw.lognormal(0, 1, (26 * 64, 1))
    costs, sizes = scale * [0.0, 1e-4, 3e-2] * draw.uniform(0.7, 1.3, (26 * 64, 3)), np.array([64, 33, 17])
    uses = draw.zipf(1.6, 26 * 64).clip(max=1000).astype(float)
    room = 26 * 64 * 25
    exact = assign(costs, sizes, budget_bytes=room, uses=uses)
    assert exact.gap == 0.0
    monkeypatch.setattr(precision, "_TABLE", 0)
    quick = assign(costs, sizes, budget_bytes=room, uses=uses)
    assert quick.bound <= exact.error <= quick.error
    assert quick.gap < 1e-3
    assert np.array_equal(quick.choice, assign(costs, sizes, budget_bytes=room, uses=uses).choice)
    by_use = assign(costs, sizes, budget_bytes=room)  # who is used more gets more bits
    rows = np.arange(len(costs))
    assert exact.error < 0.8 * (costs * uses[:, None])[rows, by_use.choice].sum()


def test_pairs_of_changes_mend_what_single_steps_leave(monkeypatch):
    monkeypatch.setattr(precision, "_TABLE", 0)
    costs, sizes = np.array([[10.0, 0.0], [9.0, 0.0], [9.0, 0.0]]), np.array([[0, 6], [0, 5], [0, 5]])
    assert assign(costs, sizes, budget_bytes=10).choice.tolist() == [0, 1, 1]  # not the first, which pays as much


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"error": [1.0, 2.0]}, ValueError, r"error must be \[X, B\], at least one of each, got \(2,\)"),
        ({"error": [[np.nan, 1.0]]}, ValueError, "error must be finite and 0 or more, got nan"),
        ({"error": [[-1.0, 1.0]]}, ValueError, "error must be finite and 0 or more, got -1.0"),
        ({"bytes": [4.0, 1.0]}, TypeError, "bytes must be integers, got float64"),
        ({"bytes": [4, 2, 1]}, ValueError, r"bytes must be \[B\] or \[X, B\] for error \(1, 2\), got \(3,\)"),
        ({"bytes": [4, -1]}, ValueError, "bytes must be 0 or more, got -1"),
        ({"uses": [1.0, 2.0]}, ValueError, r"uses must be \[X\] for error \(1, 2\), got \(2,\)"),
        ({"uses": [-1.0]}, ValueError, "uses must be finite and 0 or more, got -1.0"),
        ({"budget_bytes": None}, ValueError, "one of budget_bytes and error_budget must be given, got None and None"),
        ({"error_budget": 1.0}, ValueError, "one of budget_bytes and error_budget must be given, got 9 and 1.0"),
        ({"budget_bytes": 0}, ValueError, "budget_bytes must be at least the least bytes there is, 1, got 0"),
        (
            {"budget_bytes": None, "error_budget": 0.5, "error": [[1.0, 1.0]]},
            ValueError,
            "error_budget must be at least the least error there is, 1, got 0.5",
        ),
    ],
)
def test_bad_input_is_named(change, error, message):
    good = {"error": [[0.0, 1.0]], "bytes": [4, 1], "budget_bytes": 9}
    assign(**good)
    with pytest.raises(error, match=f"assign: {message}"):
        assign(**(good | change))
