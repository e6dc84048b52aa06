"""No placement costs less than its bound: exhaustively, at random, with uneven parts, and with multipliers that lie."""

import doctest
from itertools import combinations, pairwise, permutations, product

import numpy as np
import pytest
import scipy.sparse
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from headgate.placement import bounds as module
from headgate.placement.bounds import METHODS, crossing_bound, dual, load, simple
from headgate.placement.bounds.chain import Chain, _level
from headgate.placement.bounds.triangles import Cuts, violated


def distinct(slots: list[int]) -> np.ndarray:
    """int [many, E]: every way to give E = sum(slots) experts their parts."""
    return np.array(sorted(set(permutations(np.repeat(np.arange(len(slots)), slots)))))


def cost(weights: np.ndarray, part: np.ndarray) -> float:
    """Weight across parts of a placement [L, E], the definition written out."""
    return sum(w[here[:, None] != there].sum() for w, here, there in zip(weights, part, part[1:], strict=False))


def cheapest(weights: np.ndarray, slots: list[int], node: np.ndarray, gpu_weight=1.0, node_weight=0.0) -> float:
    """The least cost of all placements, layer by layer: best[k] of those that end in way k."""
    ways = distinct(slots)
    here, there = ways[:, None, :, None], ways[None, :, None, :]
    across = gpu_weight * (here != there) + node_weight * (node[here] != node[there])
    best = np.zeros(len(ways))
    for w in weights:
        best = (best[:, None] + np.tensordot(across, w, 2)).min(0)
    return float(best.min())


def random_weights(rng, pairs: int, experts: int, whole: bool = True) -> np.ndarray:
    """Skewed, partly zero."""
    weights = rng.pareto(1.0, (pairs, experts, experts)) * (rng.random((pairs, experts, experts)) < 0.6)
    return np.floor(9 * weights) if whole else weights


def random_placement(rng, weights: np.ndarray, slots: list[int]) -> np.ndarray:
    """int [L, E]. Half of the layers follow the one before: good ones find what random ones do not."""
    part = np.array([rng.permutation(np.repeat(np.arange(len(slots)), slots)) for _ in range(len(weights) + 1)])
    for l, w in enumerate(weights):
        if rng.random() < 0.5:
            part[l + 1][np.argsort(part[l][w.argmax(0)], kind="stable")] = np.sort(part[l + 1])
    return part


def test_examples():
    for each in (module, load):
        assert not doctest.testmod(each, optionflags=doctest.ELLIPSIS).failed


SHAPES = [[2, 2], [1, 3], [1, 1, 2], [2, 2, 2], [1, 1, 1], [4], [1], [3, 3], [2, 1]]


@pytest.mark.parametrize(
    "methods", [*([m] for m in METHODS), pytest.param(list(METHODS), marks=pytest.mark.slow)], ids="+".join
)
@pytest.mark.parametrize("slots", SHAPES, ids=str)
def test_never_above_the_best_of_all_placements(slots, methods):
    rng, node = np.random.default_rng(sum(slots)), np.arange(len(slots)) // 2
    for trial in range(4):
        weights = random_weights(rng, 1 + trial, sum(slots), whole=trial % 2 == 0)
        for prices in ((1.0, 0.0), (1.0, 8.0), (0.0, 0.7)):
            found = crossing_bound(
                list(weights), slots, node, gpu_weight=prices[0], node_weight=prices[1], methods=methods, iterations=45
            )
            assert 0 <= found.value <= cheapest(weights, slots, node, *prices)


@pytest.mark.parametrize(("slots", "enough"), [([3, 3], 8), ([2, 3, 1], 5)], ids=str)
def test_small_cases_are_proved_optimal(slots, enough):
    """The relaxation with triangles has no gap on most cases so small: a bound that is right but useless fails here."""
    rng, proved = np.random.default_rng(5), 0
    for _ in range(10):
        weights = random_weights(rng, 2, 6)
        found = crossing_bound(list(weights), slots, iterations=200).value
        proved += found == cheapest(weights, slots, np.zeros(len(slots), int))
    assert proved >= enough


@examples(60, 1000, st.data())
def test_ten_thousand_random_placements(data):
    """10 placements of each case; ten thousand where the slow tests run too."""
    slots = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    layers, seed = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 2**32 - 1))
    methods = data.draw(st.sampled_from([["matching", "spectral"], ["matching", "spectral"], ["sdp"]]))
    rng, experts = np.random.default_rng(seed), sum(slots)
    node = rng.integers(0, 3, len(slots))
    weights = random_weights(rng, layers - 1, experts, whole=data.draw(st.booleans()))
    prices = rng.random(2).round(1)
    found = crossing_bound(
        list(weights), slots, node, gpu_weight=prices[0], node_weight=prices[1], methods=methods, iterations=6
    )
    for _ in range(10):
        part = random_placement(rng, weights, slots)
        true = prices[0] * cost(weights, part) + prices[1] * cost(weights, node[part])
        assert found.value <= true * (1 + 1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("slots", [[4, 4, 4], [8, 8]], ids=str)
def test_planted_blocks_are_proved_optimal(method, slots):
    """Experts of one part prefer each other, all else is even: nothing but the planted placement is best."""
    rng, layers = np.random.default_rng(0), 5
    part = np.array([rng.permutation(np.repeat(np.arange(len(slots)), slots)) for _ in range(layers)])
    weights = np.array([3 + 20 * (here[:, None] == there) for here, there in pairwise(part)])
    found = crossing_bound(list(weights), slots, methods=[method])
    assert found.value == cost(weights, part) == found.levels[0].crossing
    assert found.gap(cost(weights, part)) == 0
    assert found.levels[0].total == weights.sum()


@pytest.mark.parametrize("slots", [[4] * 4, [8, 8], [1] * 16], ids=str)
def test_matching_is_near_its_linear_program(slots):
    """max sum W x, rows and columns of x in 0 .. 1 at most the slots of a part: HiGHS, the independent truth."""
    rng, (experts, degree) = np.random.default_rng(1), (sum(slots), slots[0])
    sides = [np.kron(np.eye(experts), np.ones(experts)), np.kron(np.ones(experts), np.eye(experts))]
    for weights in random_weights(rng, 3, experts):
        done = linprog(-weights.ravel(), A_ub=np.vstack(sides), b_ub=np.full(2 * experts, degree), bounds=(0, 1))
        best = weights.sum() + done.fun
        found = simple.matching(weights[None], np.array(slots)).sum()
        assert best - 1e-3 * weights.sum() <= found <= best * (1 + 1e-9)


def test_each_dearer_method_proves_more_and_cuts_more_still():
    rng = np.random.default_rng(2)
    weights = random_weights(rng, 6, 16, whole=False)
    slots = np.array([4] * 4)
    cheap = max(simple.spectral(weights, slots).sum(), simple.matching(weights, slots).sum())
    seen = []
    found = crossing_bound(list(weights), slots, progress=lambda bound: seen.append(bound.value), iterations=200)
    assert cheap == pytest.approx(seen[0], rel=0.2)
    assert found.value > 1.1 * cheap
    assert seen == sorted(seen)
    assert found.value == seen[-1]
    without = crossing_bound(list(weights), slots, methods=["sdp"], iterations=30).value  # cuts come later
    assert found.value > 1.01 * without


# --- the certificate -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spoil", ["nothing", "noise", "scaled", "asymmetric", "zero", "huge", "nan", "prices"])
@pytest.mark.parametrize("slots", [[3, 3], [3, 2]], ids=str)
def test_multipliers_that_lie_prove_less_and_nothing_wrong(slots, spoil):
    rng = np.random.default_rng(3)
    weights = random_weights(rng, 3, sum(slots), whole=False)
    best = cheapest(weights, slots, np.zeros(2, int))
    fixed = np.repeat([0, 1], 3 - np.array(slots))  # what fills up the second part
    weights = np.pad(weights, ((0, 0), (0, len(fixed)), (0, len(fixed))))
    chain = Chain(weights, 3, 2, fixed)
    for iteration in range(150):
        assert chain.step(1.0, lambda: 0.0)
        if iteration % 15 == 14:
            chain.cut(1.0, lambda: 0.0)
    honest = chain.bound().sum()
    assert 0.97 * best <= honest <= best
    multipliers, cuts = chain.multipliers, chain.cuts
    assert len(cuts.priced())
    for _ in range(20):
        noise = rng.standard_normal(multipliers.shape) * weights.mean()
        lies = {
            "nothing": multipliers,
            "noise": multipliers + noise + noise.transpose(0, 2, 1),
            "scaled": multipliers * rng.uniform(-1, 3),
            "asymmetric": multipliers + noise,
            "zero": 0 * multipliers,
            "huge": multipliers * 1e200,
            "nan": np.where(noise > weights.mean(), np.nan, multipliers),
            "prices": multipliers,
        }[spoil]
        prices = cuts.price * rng.uniform(-2, 4, len(cuts)) if spoil == "prices" else cuts.price
        found = dual.crossing(weights, 3, 2, lies, Cuts(cuts.key, cuts.entry, prices), fixed).sum()
        assert found <= (honest if spoil == "nothing" else best)
        assert (found == -np.inf) == (spoil in ("huge", "nan"))


def test_a_negative_price_is_no_price():
    """One pair, two experts, two parts, all local: multipliers that prove it exactly, and a triangle with room to spare
    whose negative price would lower the local weight."""
    weights, inside, across = np.array([[[8.0, 0], [0, 8]]]), [[0, 1], [1, 0]], [[2, 1], [1, 2]]
    multipliers = np.block([[np.array(inside), np.array(across)], [np.array(across), np.array(inside)]])[None]
    assert dual.crossing(weights, 1, 2, multipliers).sum() == pytest.approx(0, abs=1e-9)
    for price in (-1.0, 0.0, 1.0):  # z_01 + z_03 - z_13 <= 1
        cuts = Cuts(np.array([28]), np.array([[1, 9, 11]]), np.array([price]))
        found = dual.crossing(weights, 1, 2, multipliers, cuts).sum()
        assert found == pytest.approx(-2 * max(price, 0), abs=1e-9)
        assert found <= 0


@pytest.mark.parametrize(("capacity", "parts"), [(1, 3), (2, 2), (3, 4), (4, 1), (8, 2)])
def test_the_spectral_maximum_is_one_and_no_placement_passes_it(capacity, parts):
    rng, experts = np.random.default_rng(capacity), capacity * parts
    s = rng.standard_normal((2 * experts, 2 * experts))
    s = s + s.T + rng.standard_normal()
    most, _ = dual.spectral_maximum(s, capacity, parts)
    values, vectors = np.linalg.eigh(dual.centre(s)[0])
    top = vectors[:, len(values) - (parts - 1) :]
    q = 2 * capacity * top @ top.T + 1 / parts
    np.testing.assert_allclose(q[:, :experts].sum(1), capacity, atol=1e-9)  # q is in the set: rows, trace
    assert np.trace(q) == pytest.approx(2 * experts)
    assert (s * q).sum() == pytest.approx(most)
    for _ in range(200):
        part = np.concatenate([rng.permutation(np.repeat(np.arange(parts), capacity)) for _ in range(2)])
        assert s[part[:, None] == part].sum() <= most + 1e-9


def test_margins_cover_the_roundings_of_large_sums():
    """Equal to within a rounding: the certificate must stay on the safe side of a value that it could reach."""
    rng = np.random.default_rng(4)
    for scale in (1e-9, 1.0, 1e15):
        part = np.array([rng.permutation(np.repeat(np.arange(4), 4)) for _ in range(6)])
        weights = scale * (0.1 + 0.7 * (part[:-1, :, None] == part[1:, None, :]))
        multipliers = np.zeros((5, 32, 32))
        multipliers[:, :16, 16:] = weights / 2
        multipliers += multipliers.transpose(0, 2, 1)
        found, true = dual.crossing(weights, 4, 4, multipliers).sum(), cost(weights, part)
        assert true * (1 - 1e-9) <= found < true


@pytest.mark.parametrize(("experts", "cliques", "parts"), [(3, 1, 3), (4, 2, 2), (4, 3, 2)])
def test_triangles_are_all_found_and_hold_for_every_placement(experts, cliques, parts):
    rng = np.random.default_rng(6)
    flat = np.zeros((2 * cliques + 1) * experts**2)
    inside, between = np.split(flat.reshape(-1, experts, experts), [cliques + 1])
    inside[:] = rng.random(inside.shape)
    inside += inside.transpose(0, 2, 1)
    between[:] = rng.random(between.shape)

    def piece(p):
        return np.block([[inside[p], between[p]], [between[p].T, inside[p + 1]]])

    for p in range(cliques):
        z, expected = piece(p), 0
        for i, j, k in combinations(range(2 * experts), 3):
            a, b, c = z[i, j], z[i, k], z[j, k]
            over = [a + b - c - 1, a + c - b - 1, b + c - a - 1] + [1 - a - b - c] * (parts == 2)
            expected += max(over) > 0.1 and not (p < cliques - 1 and i >= experts)
        key, entry = violated(z, p, cliques, parts, 0.1, 10_000)
        assert len(key) == expected == len(set(key.tolist())) > 0
        cuts = Cuts.none().joined(key, entry)
        cuts.price[:] = rng.random(len(cuts))
        left = -flat @ _left_sides(cuts, len(flat)).T  # the entries are those of z
        moved = flat.copy()
        right = cuts.subtract(moved, np.ones_like(flat))
        assert cuts.price @ -left - right == pytest.approx((flat - moved) @ flat - right)
        assert ((-left - np.array([1, 1, 1, -1])[cuts.key & 3]) > 0.1).all()
    for _ in range(100):
        part = rng.integers(0, parts, 2 * experts)
        z = (part[:, None] == part).astype(float)
        assert not len(violated(z, 0, cliques, parts, 0.0, 100)[0])


def _left_sides(cuts: Cuts, length: int) -> np.ndarray:
    """float64 [M, length]: the coefficients, from the signs written out."""
    rows = np.zeros((len(cuts), length))
    for row, key, entry in zip(rows, cuts.key, cuts.entry, strict=True):
        row[entry] = [(1, 1, -1), (1, -1, 1), (-1, 1, 1), (-1, -1, -1)][key & 3]
    return rows


def test_cuts_are_met_after_enough_projections():
    rng = np.random.default_rng(7)
    z = rng.random((8, 8))
    z = z + z.T
    cuts = Cuts.none().joined(*violated(z, 0, 1, 2, 0.0, 1000))
    flat = np.concatenate([z[:4, :4], z[4:, 4:], z[:4, 4:]]).ravel()
    before = flat.copy()
    cuts.project(flat, np.ones_like(flat), 3000)
    left = _left_sides(cuts, len(flat))
    right = np.array([1, 1, 1, -1])[cuts.key & 3]
    assert (left @ np.clip(flat, 0, 1) <= right + 1e-6).all()
    np.testing.assert_allclose(before - flat, left.T @ cuts.price, atol=1e-9)  # prices say how far it was moved


@settings(deadline=None)
@given(st.lists(st.floats(-10, 10), min_size=1, max_size=20), st.floats(0.1, 5), st.floats(0, 1))
def test_the_level_meets_its_total(values, most, share):
    values, total = np.sort(values), share * most * len(values)
    level = _level(values, most, total)
    assert np.clip(values - level, 0, most).sum() == pytest.approx(total, abs=1e-9)


# --- what goes in ----------------------------------------------------------------------------------------------------


def test_the_same_input_gives_the_same_bound_in_every_form():
    rng = np.random.default_rng(8)
    weights = random_weights(rng, 3, 8).astype(np.int64)
    forms = [list(weights), weights, [w.tolist() for w in weights], [scipy.sparse.csr_array(w) for w in weights]]
    found = [crossing_bound(w, [4, 2, 2], [5, 9, 9], node_weight=3, iterations=60) for w in forms]
    assert len({bound.value for bound in found}) == 1
    assert len({tuple(bound.levels[0].pairs) for bound in found}) == 1


def test_a_limit_a_word_and_a_clock_end_the_search():
    weights = random_weights(np.random.default_rng(9), 3, 12)
    some = crossing_bound(list(weights), [6, 6], time_limit=1e-3, clock=lambda: 0.0, methods=["matching"])
    assert some.value > 0  # the clock stands still, and what is left is enough
    ticks = iter(range(10**6))
    late = crossing_bound(list(weights), [6, 6], time_limit=0.5, clock=lambda: float(next(ticks)))
    assert (late.value, late.method) == (0, "gpu: none")
    seen = []
    first = crossing_bound(list(weights), [6, 6], progress=lambda bound: seen.append(bound) or True)
    assert len(seen) == 1
    assert first.value == seen[0].value < crossing_bound(list(weights), [6, 6], iterations=40).value


def test_no_piece_of_work_is_begun_that_would_not_end_in_time(monkeypatch):
    """Each piece of a level takes a second of a clock of ours: as many are begun as fit."""
    now, begun = [0.0], []

    def second(name, work):
        def does(*args):
            begun.append(name)
            now[0] += 1.0
            return work(*args)

        return does

    for method in ("matching", "spectral"):
        monkeypatch.setattr(simple, method, second(method, getattr(simple, method)))
    monkeypatch.setattr(Chain, "step", second("sdp", Chain.step))
    monkeypatch.setattr(Chain, "bound", second("sdp", Chain.bound))
    weights = list(random_weights(np.random.default_rng(9), 3, 12))
    for limit_s, many in ((0.0, 0), (0.5, 1), (1.5, 2), (3.5, 2), (4.5, 4)):
        now[0], begun[:] = 0.0, []
        crossing_bound(weights, [6, 6], time_limit=limit_s, clock=lambda: now[0])
        assert len(begun) >= many, limit_s
        assert now[0] <= limit_s + 1, limit_s  # the first of a kind is not known yet
    now[0], begun[:] = 0.0, []
    large = list(np.ones((2, 300, 300)))
    assert crossing_bound(large, [150, 150], time_limit=0.01, clock=lambda: now[0]).method == "gpu: none"
    assert not begun  # known to be longer than that


@pytest.mark.parametrize("slots", [[4], [2, 2], [1, 3]], ids=str)
def test_nothing_crosses_where_there_is_nothing(slots):
    zero = np.zeros((2, 4, 4), int)
    assert crossing_bound(list(zero), slots).value == 0
    assert crossing_bound([], slots).value == 0
    assert crossing_bound([np.ones((4, 4))] * 2, slots, gpu_weight=0.0).levels == ()


def test_even_weights_have_one_cost_and_it_is_proved():
    found = crossing_bound([np.full((6, 6), 1000)] * 2, [2, 2, 2], [0, 0, 1], node_weight=1.0)
    assert found.levels[0].crossing == 2 * 1000 * 6 * 4
    assert found.value <= 2 * 1000 * (6 * 4 + 2 * 2 * 4)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (dict(transitions=[[[1, 2]]]), ValueError, r"transitions\[0\] must be \[E, E\]"),
        (dict(transitions=[np.ones((2, 2)), np.ones((3, 3))]), ValueError, r"transitions\[1\] must be .* E=2"),
        (dict(transitions=[[1, 2]]), ValueError, r"transitions\[0\] must have 2 dimensions, got \(2,\)"),
        (dict(transitions=[[[1, -2], [0, 0]]]), ValueError, "at least 0, got -2"),
        (dict(transitions=[[[1, np.nan], [0, 0]]]), ValueError, "must be finite and at least 0, got nan"),
        (dict(transitions=[[["a", "b"], ["c", "d"]]]), TypeError, "must be real numbers"),
        (dict(slots_of_gpu=[1]), ValueError, "slots_of_gpu must sum to at least E=2, got 1"),
        (dict(slots_of_gpu=[2, 0]), ValueError, ">= 1"),
        (dict(slots_of_gpu=[1.0, 1.0]), TypeError, "slots_of_gpu must be whole numbers, got float64"),
        (dict(node_of_gpu=[0]), ValueError, r"node_of_gpu must be \[G=2\]"),
        (dict(node_of_gpu=[0.5, 1]), TypeError, "node_of_gpu must be whole numbers"),
        (dict(gpu_weight=-1.0), ValueError, "gpu_weight must be finite and not negative, got -1"),
        (dict(node_weight=np.inf), ValueError, "node_weight must be finite"),
        (dict(methods=["ilp"]), ValueError, "methods must be some of spectral, matching, sdp, got"),
        (dict(methods=[]), ValueError, "methods must be some of"),
        (dict(time_limit=np.nan), ValueError, "time_limit must be at least 0 s, got nan"),
        (dict(iterations=-1), ValueError, "iterations must be at least 0, got -1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_input_is_refused(arguments, error, says):
    good = dict(transitions=[np.ones((2, 2))], slots_of_gpu=[1, 1])
    with pytest.raises(error, match=f"crossing_bound: .*{says}"):
        crossing_bound(**{**good, **arguments})


# --- replicas --------------------------------------------------------------------------------------------------------


def with_replicas(slots: list[int], experts: int) -> list[tuple[frozenset, ...]]:
    """Every way to fill the slots so that each expert is somewhere: which experts each part holds."""
    held = [[frozenset(c) for c in combinations(range(experts), min(s, experts))] for s in slots]
    return [ways for ways in product(*held) if frozenset().union(*ways) == frozenset(range(experts))]


@pytest.mark.parametrize(
    ("slots", "experts", "useful"),
    [([2, 2], 3, False), ([2, 1, 1], 3, True), ([3, 2], 4, False), ([2, 1, 1, 1], 4, True), ([4, 4], 4, False)],
)
def test_replicas_never_beat_their_bound(slots, experts, useful):
    """Local: some part holds both experts of the transition, the most favourable reading."""
    rng, ways = np.random.default_rng(10), with_replicas(slots, experts)
    together = np.zeros((len(ways), len(ways), experts, experts), bool)
    for (a, here), (b, there) in product(enumerate(ways), repeat=2):
        for before, after in zip(here, there, strict=True):
            together[a, b][np.ix_(sorted(before), sorted(after))] = True
    reached = true = 0.0
    for _ in range(10):
        weights = random_weights(rng, 3, experts)
        best = np.zeros(len(ways))
        for w in weights:
            best = (best[:, None] + np.tensordot(~together, w, 2)).min(0)
        found = crossing_bound(list(weights), slots)
        assert 0 <= found.value <= best.min()
        reached += found.value
        true += best.min()
    assert (reached > 0.1 * true) == useful
