"""Regrouping against every partition, planted clusters, and its own bound."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from headgate.bench.offload.regroup import measure
from headgate.placement.caching.regroup import regroup, touched
from headgate.placement.traces.generate import generate


def counted(paths, batches):
    """Distinct experts expected, expert by expert."""
    total = 0.0
    for b in batches:
        for layer in range(paths.shape[1]):
            for e in range(paths.shape[2]):
                passed_by = 1.0
                for i in b:
                    passed_by *= 1 - float(paths[i, layer, e])
                total += 1 - passed_by
    return total


def partitions(n, batch):
    """Every way into as few batches as possible, none larger than `batch`."""
    places = [*range(n), *[None] * (-n % batch)]
    seen = set()
    for order in permutations(places):
        parts = [order[i : i + batch] for i in range(0, len(order), batch)]
        found = frozenset(frozenset(i for i in part if i is not None) for part in parts)
        if found not in seen:
            seen.add(found)
            yield [sorted(part) for part in found if part]


@st.composite
def cases(draw):
    shape = draw(st.integers(1, 6)), draw(st.integers(1, 2)), draw(st.integers(1, 5))
    kind = draw(st.sampled_from(["sets", "chances"]))
    numbers = st.booleans() if kind == "sets" else st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])
    return draw(arrays(bool if kind == "sets" else np.float64, shape, elements=numbers)), draw(st.integers(1, 4))


@settings(max_examples=60, deadline=None)
@given(cases())
def test_batches_are_whole_counted_and_between_the_bound_and_arrival(case):
    paths, batch = case
    n = len(paths)
    found = regroup(paths, batch)
    assert sorted(found.order.tolist()) == list(range(n))
    assert len(found.batches) <= -(-n // batch)
    assert all(1 <= len(b) <= batch and b.tolist() == sorted(b.tolist()) for b in found.batches)
    assert found.touched == pytest.approx(counted(paths, found.batches))
    assert touched(paths, found.batches) == pytest.approx(found.touched)
    arrival = [np.arange(i, min(i + batch, n)) for i in range(0, n, batch)]
    assert found.touched <= counted(paths, arrival) + 1e-6
    best = min(counted(paths, parts) for parts in partitions(n, batch))
    assert found.bound <= best + 1e-9
    assert best <= found.touched + 1e-9


def test_the_best_of_all_partitions_nearly_always():
    rng, reached = np.random.default_rng(0), 0
    for _ in range(30):
        paths, batch = rng.random((6, 2, 6)) < 0.35, int(rng.integers(2, 4))
        best = min(counted(paths, parts) for parts in partitions(6, batch))
        found = regroup(paths, batch).touched
        assert found <= 1.15 * best
        reached += found < best + 1e-9
    assert reached >= 24


def clusters(of, size, rng):
    """Requests of `of` clusters, shuffled; each uses most of its cluster's four experts in each of three layers."""
    owner = rng.permutation(np.repeat(np.arange(of), size))
    paths = np.zeros((of * size, 3, 4 * of), bool)
    for i, c in enumerate(owner):
        for layer in range(3):
            paths[i, layer, 4 * c + rng.choice(4, 3, replace=False)] = True
    return paths, owner


@pytest.mark.parametrize("seed", range(5))
def test_planted_clusters_are_found(seed):
    paths, owner = clusters(6, 4, np.random.default_rng(seed))
    for foreseen in (paths, 0.9 * paths):
        batches = regroup(foreseen, 4).batches
        assert len(batches) == 6
        assert all(len({owner[i] for i in b}) == 1 for b in batches)


def test_a_last_batch_may_be_short_and_any_batch_the_last():
    paths, owner = clusters(3, 3, np.random.default_rng(0))
    odd = np.flatnonzero(np.arange(9) != np.flatnonzero(owner == 0)[0])  # cluster 0 has two left
    found = regroup(paths[odd], 3)
    assert sorted(len(b) for b in found.batches) == [2, 3, 3]
    assert all(len({owner[odd][i] for i in b}) == 1 for b in found.batches)


def test_the_same_every_time_and_exchanges_help():
    paths = np.random.default_rng(3).random((40, 2, 32)) < 0.2
    first, second = regroup(paths, 8), regroup(paths, 8)
    assert [b.tolist() for b in first.batches] == [b.tolist() for b in second.batches]
    assert first.touched < regroup(paths, 8, exchanges=0).touched


def test_edges():
    empty = regroup(np.zeros((0, 3, 4)), 2)
    assert (empty.batches, empty.touched, empty.bound, empty.order.size) == ((), 0, 0, 0)
    one = regroup(np.ones((1, 2, 3), bool), 5)
    assert ([b.tolist() for b in one.batches], one.touched, one.bound) == ([[0]], 6, 6)
    assert regroup(np.zeros((5, 0, 4)), 2).touched == 0
    assert len(regroup(np.ones((5, 1, 2)), 1).batches) == 5


@pytest.mark.parametrize(
    ("paths", "batch", "message"),
    [
        (np.zeros((2, 3)), 1, r"paths must be \[N, L, E\], got shape \(2, 3\)"),
        (np.full((2, 1, 1), 1.5), 1, "paths must be in 0 .. 1, got 1.5 .. 1.5"),
        (np.full((2, 1, 1), np.nan), 1, "paths must be in 0 .. 1, got nan"),
        (np.zeros((2, 1, 1)), 0, "batch must be at least 1, got 0"),
    ],
)
def test_bad_input(paths, batch, message):
    with pytest.raises(ValueError, match=f"regroup: {message}"):
        regroup(paths, batch)
    with pytest.raises(ValueError, match="regroup: exchanges must not be negative, got -1"):
        regroup(np.zeros((2, 1, 1)), 1, exchanges=-1)
    with pytest.raises(TypeError, match="regroup: paths must be bool or floating point, got int64"):
        regroup(np.zeros((2, 1, 1), np.int64), 1)


def test_the_figure():
    found = measure(
        generate(layers=3, experts=16, top_k=2, tokens=600, domains=4, shift=0.9), requests=24, tokens=6, batch=4
    )
    assert found["bound"] <= found["regrouped"] < found["arrival"] <= 3 * 16
    assert found["judged"] < found["judged_arrival"]
    assert found["cpu_s"] > 0
