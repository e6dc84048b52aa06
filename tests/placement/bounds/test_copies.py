"""The bound on copies against every placement there is, and where it is met."""

import doctest
from itertools import combinations, permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import headgate.placement.bounds.copies as module
from headgate.placement.bounds._pace import Pace
from headgate.placement.bounds.copies import (
    STEPS,
    copies_bound,
    fewest_parts,
    least_away,
    least_places,
    matching_bound,
    spectral_bound,
)
from headgate.placement.cluster.topology import Topology
from headgate.placement.placement import Placement
from headgate.placement.problem import Objective, Problem
from headgate.placement.search.copies import score

SPLITS = {slots: sorted(set(permutations(np.repeat(range(len(slots)), slots).tolist()))) for slots in
          ((2, 2, 2), (3, 3), (3, 2, 1), (1, 1, 1, 1, 1, 1), (6,))}  # fmt: skip


def tokens_of(seed: int, tokens: int, top_k: int, even: float) -> np.ndarray:
    """int16 [T, K] of 6 experts, neighbours together unless `even`, some choices missing."""
    rng = np.random.default_rng(seed)
    at = rng.integers(0, 6, (tokens, 1)) + np.arange(top_k)
    ids = np.where(rng.random(at.shape) < even, rng.integers(0, 6, at.shape), at % 6)
    return np.where(rng.random(ids.shape) < 0.1, -1, ids).astype(np.int16)


def test_examples():
    assert doctest.testmod(module) == (0, 1)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    tokens=st.integers(0, 12),
    top_k=st.integers(1, 5),
    even=st.sampled_from([0.0, 0.3, 1.0]),
    slots=st.sampled_from(sorted(SPLITS)),
)
def test_never_above_the_best_of_all_placements(seed, tokens, top_k, even, slots):
    ids = tokens_of(seed, tokens, top_k, even)
    uses = np.zeros((tokens, 6))
    at, k = np.nonzero(ids >= 0)
    uses[at, ids[at, k]] = 1
    together = uses.T @ uses * (1 - np.eye(6))
    fewest, most = np.inf, 0.0
    for split in SPLITS[slots]:
        part = np.eye(len(slots))[list(split)]
        fewest = min(fewest, ((uses @ part) > 0).sum(1).mean() if tokens else 0.0)
        most = max(most, np.einsum("ep,ef,fp->", part, together, part) / 2)
    assert least_places(ids, 6, np.array(slots)) <= fewest + 1e-9
    assert matching_bound(together, np.array(slots)) >= most - 1e-9
    assert spectral_bound(together, np.array(slots)) >= most - 1e-9


def test_met_where_tokens_keep_to_their_part():
    ids = np.array([[0, 1], [2, 3], [4, 5], [0, 1]], np.int16)
    assert least_places(ids, 6, np.array([2, 2, 2])) == pytest.approx(1)
    assert least_places(np.tile(np.arange(6, dtype=np.int16), (3, 1)), 6, np.array([2, 2, 2])) == pytest.approx(3)
    assert least_places(ids, 6, np.ones(6, int)) == pytest.approx(2)


def test_without_the_linear_program_it_holds_too(monkeypatch):
    monkeypatch.setattr(module, "EXACT", 0)
    together = np.random.default_rng(0).integers(0, 9, (6, 6))
    together = (together + together.T) * (1 - np.eye(6))
    loose = matching_bound(together, np.array([2, 2, 2]))
    monkeypatch.undo()
    assert loose >= matching_bound(together, np.array([2, 2, 2]))
    assert loose >= max(
        sum(together[np.ix_(part, part)].sum() / 2 for part in np.argsort(split, kind="stable").reshape(3, 2))
        for split in SPLITS[2, 2, 2]
    )


@pytest.mark.parametrize("choices", range(1, 9))
def test_the_hull_lies_below_every_way_to_spread_choices(choices):
    corners = np.array(fewest_parts(choices), float)
    for counts in set(map(tuple, np.sort(np.random.default_rng(0).multinomial(choices, np.full(4, 0.25), 200)))):
        pairs = sum(c * (c - 1) // 2 for c in counts)
        assert np.interp(pairs, *corners.T) <= sum(c > 0 for c in counts) + 1e-12
    assert corners[0].tolist() == [0, choices]
    assert corners[-1].tolist() == [choices * (choices - 1) / 2, 1]


@pytest.mark.parametrize("home", ["fixed", "most", "foretold"])
def test_no_placement_copies_less_than_the_least(home):
    topology = Topology(2, 2)
    ids = np.stack([tokens_of(seed, 40, 3, 0.2) for seed in range(3)])
    problem = Problem(
        num_experts=6,
        transitions=tuple(np.ones((6, 6), int) for _ in range(2)),
        loads=np.full((1, 3, 6), 1 / 6),
        ids=ids,
        topology=topology,
        slots_of_gpu=np.array([2, 1, 2, 1], np.int32),
        objective=Objective(copies=1.0, node_copies=1.0, home=home),
        pins=np.full((3, 6), -1, np.int32),
    )
    least, rng = copies_bound(problem), np.random.default_rng(0)
    assert least["copies"] > 0.3
    for _ in range(50):
        found = score(problem, rng.permuted(np.tile([0, 0, 1, 2, 2, 3], (3, 1)), axis=1))
        assert found["copies"] >= least["copies"]
        assert found["node_copies"] >= least["node_copies"]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), tokens=st.integers(0, 30), top_k=st.integers(1, 3), spare=st.booleans())
def test_with_fixed_homes_none_copies_less_with_or_without_replicas(seed, tokens, top_k, spare):
    """All placements of 4 experts, walked: the least rows of each are not below the bound."""
    rng = np.random.default_rng(seed)
    topology, slots = Topology(2, 1), np.array([3, 3] if spare else [3, 1], np.int32)
    ids = np.where(rng.random((1, tokens, top_k)) < 0.1, -1, rng.integers(0, 4, (1, tokens, top_k))).astype(np.int16)
    problem = Problem(
        num_experts=4,
        transitions=(),
        loads=np.full((1, 1, 4), 1 / 4),
        ids=ids,
        topology=topology,
        slots_of_gpu=slots,
        objective=Objective(copies=1.0, node_copies=1.0),
        pins=np.full((1, 4), -1, np.int32),
        homes=rng.integers(0, 2, tokens).astype(np.int32),
    )
    least = copies_bound(problem)
    for first, second in product(combinations(range(4), int(slots[0])), combinations(range(4), int(slots[1]))):
        if len({*first, *second}) == 4:
            found = problem.walked(Placement(np.array([first + second]), 4, topology, slots))
            assert found.copies >= least["copies"] - 1e-9
            assert found.node_copies >= least["node_copies"] - 1e-9


def test_with_replicas_the_bound_is_met_where_one_expert_of_four_is_away():
    ids, home = np.tile(np.arange(4), 10)[:, None], np.repeat([0, 1], 20)
    assert least_away(ids, home, 4, np.array([3, 3])) == pytest.approx(1 / 4)
    assert least_away(np.tile(np.arange(4), (10, 1)), np.zeros(10, int), 4, np.array([3, 3])) == pytest.approx(1 / 3)


def test_eigenvalues_that_do_not_fit_are_left_out_and_the_bound_holds(monkeypatch):
    """Each decomposition takes a second of a clock of ours: no more are begun than fit, and any number proves."""
    now, done = [0.0], []
    eigh = np.linalg.eigh

    def slow(matrix):
        done.append(len(matrix))
        now[0] += 1.0
        return eigh(matrix)

    monkeypatch.setattr(np.linalg, "eigh", slow)
    ids = np.stack([tokens_of(seed, 40, 3, 0.2) for seed in range(2)])
    problem = Problem(
        num_experts=6,
        transitions=(np.ones((6, 6), int),),
        loads=np.full((1, 2, 6), 1 / 6),
        ids=ids,
        topology=Topology(2, 2),
        slots_of_gpu=np.array([2, 1, 2, 1], np.int32),
        objective=Objective(copies=1.0, node_copies=1.0),
        pins=np.full((2, 6), -1, np.int32),
    )
    found = {}
    for limit_s in (0.0, 8.5, 1000.0):
        now[0], done[:] = 0.0, []
        pace = Pace(limit_s, lambda: now[0])
        found[limit_s] = copies_bound(problem, pace)
        assert now[0] <= limit_s * 1.1
        assert ("eigenvalues" in pace.missed or "counts" in pace.missed) == (limit_s < 1000)
    assert done == [6] * (2 * 2 * STEPS)  # levels and layers
    assert 0 <= found[0.0]["copies"] <= found[8.5]["copies"] <= found[1000.0]["copies"]
    assert found[8.5]["copies"] > 0
