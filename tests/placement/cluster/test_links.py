"""The alpha-beta model: fits, the time of each dispatcher written out, and what its parts say."""

import doctest
from math import inf, log2

import pytest

from headgate.placement.cluster import links as module
from headgate.placement.cluster.links import MACHINES, Case, Link, Links, fit, message_bytes, predict
from headgate.placement.cluster.volume import VOLUMES, distinct_parts

LINKS = Links(inside=Link(10, 100), across=Link(30, 25))
CASE = Case(
    ranks=32, ranks_per_node=8, tokens=1000, num_experts=64, top_k=4, dispatch_bytes=5000, combine_bytes=8000
)  # fmt: skip


def test_examples():
    assert not doctest.testmod(module).failed


def test_a_fit_is_exact_through_two_points_and_finds_the_line_of_many():
    line = Link(12.5, 40)
    points = [(x, line.latency_s + line.transfer_s(x)) for x in (1e3, 1e5, 3e6, 8e7)]
    for some in (points[:2], points[::3], points):
        found = fit(some)
        assert (found.latency_us, found.bandwidth_GBps) == pytest.approx((12.5, 40), rel=1e-6)


def test_a_fit_weighs_errors_relatively():
    """A small time counts as much as a large one: 10% off in the large point must not move the latency far."""
    line = Link(10, 10)
    sizes = (0, 1e4, 1e7, 1e8)
    points = [(x, (line.latency_s + line.transfer_s(x)) * (1.1 if x == 1e8 else 1)) for x in sizes]
    assert fit(points).latency_us == pytest.approx(10, rel=0.01)


def test_a_fit_of_noise_is_no_negative_link():
    falling = fit([(1e3, 2e-5), (1e6, 1e-5)])
    assert falling.bandwidth_GBps == inf
    assert 10 <= falling.latency_us <= 20
    steep = fit([(1e6, 1e-5), (2e6, 5e-5)])
    assert steep.latency_us == 0
    assert 20 < steep.bandwidth_GBps < 100
    with pytest.raises(ValueError, match="points must have two different sizes"):
        fit([(5, 1e-5), (5, 2e-5)])
    with pytest.raises(ValueError, match="seconds must be positive"):
        fit([(5, 1e-5), (6, 0)])


def test_links_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="latency_us must be finite and not negative, got -1"):
        Link(-1, 10)
    with pytest.raises(ValueError, match="bandwidth_GBps must be positive, got 0"):
        Link(1, 0)


def test_the_time_of_each_dispatcher_written_out():
    d32, d4 = distinct_parts(64, 4, 32), distinct_parts(64, 4, 4)
    there, back = 5000 * 1000, 8000 * 1000

    def us(rows: float, size: float, GBps: float) -> float:
        return rows * size / GBps / 1e3

    def all_to_all(size, each):
        return 30 + max(us(each * 7 / 32, size, 100), us(each * 24 / 32, size, 25))

    def two_levels(size):
        return 30 + us(d4 * 3 / 4, size, 25), 10 + us(d32 * 7 / 8, size, 100)

    rounds = log2(4) * 30 + log2(8) * 10
    expected = {
        "plain": (30 + all_to_all(there, 4), all_to_all(back, 4)),
        "all_to_all": (30 + all_to_all(there, d32), all_to_all(back, d32)),
        "hierarchical": (40 + sum(two_levels(there)), sum(two_levels(back))),
        "pipelined": (
            30 + 30 + max(us(d4 * 3 / 4, there, 25), us(d32 * 7 / 8, there, 100)),
            30 + max(us(d4 * 3 / 4, back, 25), us(d32 * 7 / 8, back, 100)),
        ),
        "all_gather": (
            2 * rounds + max(us(3, there, 25), us(4 * 7, there, 100)),
            rounds + max(us(3, back, 25), us(4 * 7, back, 100)),
        ),
        "slice_all_reduce": (rounds, 2 * rounds + max(us(2 * 3 / 32, back, 25), us(2 * 7 / 8, back, 100))),
    }
    assert set(expected) == set(VOLUMES)
    for name, (dispatch, combine) in expected.items():
        found = predict(name, CASE, LINKS)
        assert (1e6 * found.dispatch_s, 1e6 * found.combine_s) == pytest.approx((dispatch, combine), rel=1e-9), name


def test_without_counts_and_with_links_of_their_own_on_the_way_back():
    fast = Links(Link(1, 1000), Link(3, 250))
    slow, mixed = predict("all_to_all", CASE, LINKS), predict("all_to_all", CASE, LINKS, fast)
    assert mixed.dispatch_s == slow.dispatch_s
    assert mixed.combine_s == pytest.approx(slow.combine_s / 10)
    bare = predict("all_to_all", CASE, LINKS, counts=False)
    assert slow.dispatch_s - bare.dispatch_s == pytest.approx(30e-6)


def test_one_rank_and_one_node_use_no_link_they_do_not_have():
    for name in VOLUMES:
        alone = Case(1, 1, 100, 64, 4, 5000, 8000)
        assert predict(name, alone, LINKS).seconds == 0, name
        node = Case(8, 8, 100, 64, 4, 5000, 8000)
        assert predict(name, node, Links(LINKS.inside, Link(1e6, 1e-6))).seconds < 1e-2, name
        flat = Case(8, 1, 100, 64, 4, 5000, 8000)
        assert predict(name, flat, Links(Link(1e6, 1e-6), LINKS.across)).seconds < 1e-2, name


def test_why_names_the_link_that_takes_the_time():
    said = predict("hierarchical", CASE, LINKS).why()
    assert said.startswith("hierarchical: ")
    assert "modelled = 120 us of latency + " in said
    assert "us inside the node" in said
    assert "us between nodes" in said
    assert "inside" not in predict("all_to_all", CASE, LINKS).why()


def test_a_message_is_the_row_its_ids_and_its_weights():
    assert message_bytes(7168, 8, 2) == 7168 * 2 + 8 * 8
    assert message_bytes(5, 2, 8, weight_bytes=8) == 5 * 8 + 2 * 12


def test_machines_say_where_their_figures_stand():
    for machine in MACHINES.values():
        assert machine.source
        assert machine.name
