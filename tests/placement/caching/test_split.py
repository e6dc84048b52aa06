"""The split between host and device against every subset in every order."""

import json
from dataclasses import replace
from itertools import compress, permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headgate.placement.caching.costs import FREE, Costs
from headgate.placement.caching.split import DEVICE, DISK, HOST, split
from headgate.placement.cluster.links import Link

COSTS = Costs((1, 4, 16), (1.0, 1.0, 2.5), (2.0, 3.0, 9.0), Link(0, 1), Link(0, 0.5), 10**9, start_s=0.25)  # 1 s, 2 s


def schedule(order, device_s, host_s, fetch_s, away, start_s):
    """The makespan of one schedule, written out: `order`, those fetched; what is away and not in it is the host's."""
    device = sum(device_s[e] for e in range(len(device_s)) if e not in away)
    rest = [host_s[e] for e in away if e not in order]
    host, link = sum(rest) + (start_s if rest else 0.0), 0.0
    for e in order:
        link += fetch_s[e]
        device = max(device, link) + device_s[e]
    return max(device, host)


def priced(rows, where, costs, sizes):
    """What `schedule` is told of a case."""
    reads = [costs.read_s(size) if at == DISK else 0.0 for size, at in zip(sizes, where, strict=True)]
    host = [float(costs.on_host(n)) + read for n, read in zip(rows, reads, strict=True)]
    fetch = [costs.copy_s(size) + read for size, read in zip(sizes, reads, strict=True)]
    away = [e for e, at in enumerate(where) if at != DEVICE]
    return [float(costs.on_device(n)) for n in rows], host, fetch, away, costs.start_s


def seconds(order, *case):
    return schedule(order, *priced(*case))


def best_of_all(*case):
    told = priced(*case)
    subsets = [list(compress(told[3], bits)) for bits in product((0, 1), repeat=len(told[3]))]
    return min(schedule(order, *told) for s in subsets for order in permutations(s))


@st.composite
def cases(draw):
    m = draw(st.integers(0, 6))
    rows = draw(st.lists(st.integers(1, 40), min_size=m, max_size=m))
    where = draw(st.lists(st.sampled_from([DEVICE, HOST, HOST, HOST, DISK]), min_size=m, max_size=m))
    sizes = draw(st.lists(st.sampled_from([0.0, 2.5e8, 1e9, 1.7e9]), min_size=m, max_size=m))
    rise = st.lists(st.floats(0, 3), min_size=3, max_size=3)
    device, host = (np.cumsum(draw(rise)) + 0.1 for _ in range(2))
    link = draw(st.sampled_from([FREE, Link(1e5, 0.4), Link(0, 1), Link(0, 8)]))
    start = draw(st.sampled_from([0.0, 0.3, 2.0]))
    return rows, where, sizes, Costs((1, 3, 10), tuple(device), tuple(host), link, Link(0, 2), 1, start)


@settings(max_examples=300, deadline=None)
@given(cases())
def test_no_split_in_any_order_is_faster(case):
    rows, where, sizes, costs = case
    found = split(rows, where, costs, size_bytes=sizes, tolerance=0)
    best = best_of_all(rows, where, costs, sizes)
    assert found.makespan_s == pytest.approx(best, rel=1e-12, abs=1e-12)
    assert found.bound_s == found.makespan_s
    assert seconds(found.fetch_order.tolist(), rows, where, costs, sizes) == pytest.approx(found.makespan_s, rel=1e-12)
    both = [*found.host, *found.fetch_order]
    assert sorted(both) == [e for e in range(len(rows)) if where[e] != DEVICE]
    assert found.host.tolist() == sorted(found.host)


@settings(max_examples=100, deadline=None)
@given(cases(), st.sampled_from([1, 2, 256]), st.sampled_from([0.0, 0.01, 0.3]))
def test_what_is_cut_short_says_how_far_off_it_may_be(case, states, tolerance):
    rows, where, sizes, costs = case
    found = split(rows, where, costs, size_bytes=sizes, tolerance=tolerance, states=states)
    best = best_of_all(rows, where, costs, sizes)
    assert found.bound_s <= best * (1 + 1e-12) <= found.makespan_s * (1 + 2e-12)
    if states == 256:
        assert found.bound_s >= found.makespan_s * (1 - tolerance) * (1 - 1e-12)


def test_many_experts_within_what_was_proved_and_never_slower_than_a_fixed_choice():
    rng = np.random.default_rng(0)
    for _ in range(30):
        m = int(rng.integers(20, 80))
        rows, where = rng.integers(1, 60, m), rng.choice([DEVICE, HOST, DISK], m)
        found = split(rows, where, COSTS)
        away = np.flatnonzero(where != DEVICE)
        sizes = [COSTS.expert_bytes] * m
        assert seconds(found.fetch_order, rows, where, COSTS, sizes) == pytest.approx(found.makespan_s, rel=1e-12)
        assert found.makespan_s * 0.99 <= found.bound_s <= found.makespan_s
        assert found.makespan_s <= seconds(away, rows, where, COSTS, sizes)
        assert found.makespan_s <= seconds([], rows, where, COSTS, sizes)


def test_seven_experts():
    rng = np.random.default_rng(2)
    for _ in range(10):
        case = rng.integers(1, 40, 7), rng.choice([HOST, DISK], 7), COSTS, rng.uniform(0, 2e9, 7)
        found = split(*case[:3], size_bytes=case[3], tolerance=0)
        assert found.makespan_s == pytest.approx(best_of_all(*case), rel=1e-12)


def test_by_hand():
    # four on one row each: the host takes 2.25 s for one, 4.25 for two; link and device 4 s for three
    found = split([1, 1, 1, 1], [HOST] * 4, COSTS, tolerance=0)
    assert (len(found.host), found.makespan_s) == (1, 4.0)
    # many rows are dear on the host, and each pays the transfer once
    found = split([16, 1, 1], [HOST] * 3, COSTS, tolerance=0)
    assert (found.host.tolist(), found.fetch_order.tolist(), found.makespan_s) == ([1, 2], [0], 4.25)
    # Johnson's order: the long computation travels first where all transfers are alike
    no_host = Costs((1, 4), (0.2, 0.8), None, Link(0, 1), FREE, 10**9)
    assert split([1, 4, 2], [HOST] * 3, no_host).fetch_order.tolist() == [1, 2, 0]
    assert split([1, 4, 2], [HOST] * 3, no_host).makespan_s == pytest.approx(3.2)
    # what is there needs nobody
    found = split([3, 5], [DEVICE, DEVICE], COSTS)
    assert (found.host.size, found.fetch_order.size, found.makespan_s) == (0, 0, 2 + 1 / 8)
    assert split([], [], COSTS).makespan_s == 0


def test_what_is_on_disk_is_read_by_either_side():
    costs = Costs((1,), (1.0,), (1.0,), Link(0, 1), Link(0, 0.25), 10**9)
    assert split([1], [DISK], costs, tolerance=0).makespan_s == 5  # read 4, computed where it was read to
    assert split([1], [HOST], costs, tolerance=0).makespan_s == 1


def test_the_same_every_time():
    rng = np.random.default_rng(1)
    rows, where = rng.integers(1, 60, 64), rng.choice([DEVICE, HOST], 64)
    first, second = (split(rows, where, COSTS) for _ in range(2))
    assert first.host.tolist() == second.host.tolist()
    assert first.fetch_order.tolist() == second.fetch_order.tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(rows=[0], where=[HOST]), "rows must be at least 1, got 0"),
        (dict(rows=[1, 2], where=[HOST]), r"must be \[M\] each, got shapes \(2,\), \(1,\), \(2,\)"),
        (dict(rows=[1], where=[3]), r"where must be DEVICE, HOST or DISK \(0, 1, 2\), got \[3\]"),
        (dict(rows=[1], where=[HOST], size_bytes=[-1]), "size_bytes must be finite and not negative"),
        (dict(rows=[1], where=[HOST], tolerance=1), "tolerance must be in 0 .. 1, got 1"),
        (dict(rows=[1], where=[HOST], states=0), "states must be at least 1, got 0"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=f"split: .*{message}"):
        split(**arguments, costs=COSTS)


def test_bad_types():
    with pytest.raises(TypeError, match="rows must be whole numbers, got float64"):
        split([1.5], [HOST], COSTS)


# --- costs -----------------------------------------------------------------------------------------------------------


def test_costs_between_and_beyond_the_table():
    assert COSTS.on_device([1, 2, 4, 10, 16, 20]).tolist() == [1, 1, 1, 1.75, 2.5, 3.0]
    assert COSTS.on_host([1, 2.5, 22]).tolist() == [2, 2.5, 12]
    assert Costs((4,), (2.0,), None, FREE, FREE, 1).on_device([1, 4, 8]).tolist() == [2, 2, 4]
    assert Costs((4,), (2.0,), None, FREE, FREE, 1).on_host([1, 4]).tolist() == [np.inf, np.inf]
    assert (COSTS.copy_s(), COSTS.read_s(), COSTS.read_s(5e8)) == (1.0, 2.0, 1.0)


@pytest.mark.parametrize("seconds", [0.5, 1.0, 1.1, 2.4, 2.5, 7.0])
def test_the_rows_that_fill_a_time(seconds):
    rows = COSTS.rows_in(seconds)
    if seconds < 1:
        assert rows == 0
    else:
        assert float(COSTS.on_device(rows)) == pytest.approx(seconds)
        assert float(COSTS.on_device(rows + 0.01)) > seconds
    assert Costs((1, 2), (1.0, 1.0), None, FREE, FREE, 1).rows_in(1) == np.inf


def test_costs_survive_json():
    for costs in (COSTS, Costs((4,), (2.0,), None, FREE, Link(3, 1), 1)):
        assert Costs.from_dict(json.loads(json.dumps(costs.to_dict()))) == costs


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(rows=()), "rows must be rising from 1 or more"),
        (dict(rows=(0, 1, 2)), "rows must be rising from 1 or more"),
        (dict(rows=(1, 3, 3)), "rows must be rising from 1 or more"),
        (dict(device_s=(1.0,)), "device_s must be as long as rows, 3, got 1"),
        (dict(host_s=(1.0, 0.5, 2.0)), "host_s must be positive and never falling"),
        (dict(device_s=(0.0, 0.5, 2.0)), "device_s must be positive and never falling"),
        (dict(device_s=(1.0, 2.0, float("inf"))), "device_s must be positive and never falling"),
        (dict(expert_bytes=0), "expert_bytes must be at least 1, got 0"),
        (dict(start_s=-1.0), "start_s must be finite and not negative, got -1.0"),
    ],
)
def test_bad_costs(changed, message):
    with pytest.raises(ValueError, match=f"Costs: {message}"):
        replace(COSTS, **changed)
