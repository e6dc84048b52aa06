"""When a new placement pays for its migration: decided on tokens that it was not fitted to."""

from __future__ import annotations

import numpy as np
import pytest

from headgate.placement.cluster.links import Link, Links
from headgate.placement.cluster.topology import Topology, Workload
from headgate.placement.live.rebalance import Rebalancer, simulate
from headgate.placement.placement import Placement
from headgate.placement.search.balance import balance
from headgate.placement.traces.affinity import expert_load
from headgate.placement.traces.trace import Trace
from headgate.placement.walk import walk

TOPOLOGY = Topology(1, 4, Links(Link(5, 100.0), Link(20, 25.0)))
LINEAR = Placement(np.tile(np.arange(8), (2, 1)), 8, TOPOLOGY)
WORK = Workload(tokens_per_gpu=64, dispatch_bytes=2.0, combine_bytes=2.0, pair_us=10.0)


def by_load(window: Trace, now: Placement) -> Placement:
    return Placement(balance(expert_load(window), now.slots_of_gpu), now.num_experts, now.topology)


def skewed(tokens: int, hot: list[int], seed: int = 0) -> Trace:
    """Two choices of 8, half of them among the hot experts."""
    rng = np.random.default_rng(seed)
    chance = np.full(8, 0.5 / 8)
    chance[hot] += 0.5 / len(hot)
    ids = np.argsort(rng.gumbel(size=(2, tokens, 8)) + np.log(chance), axis=2)[:, :, -2:]
    return Trace(ids.astype(np.uint8), 8)


def rebalancer(**more) -> Rebalancer:
    return Rebalancer(**{"propose": by_load, "expert_bytes": 1e6, "steps": 100, "workload": WORK, **more})


def test_two_hot_experts_on_one_gpu_are_worth_a_move():
    window = skewed(2000, [0, 1])
    found = rebalancer().decide(window, LINEAR)
    newer = window.select(slice(1500, None))
    assert found.now_s == walk(newer, LINEAR).seconds(WORK)
    assert found.then_s == walk(newer, found.migration.target).seconds(WORK)
    assert found.saved_s == 100 * (found.now_s - found.then_s) > found.migration_s > 0
    assert found.pays
    assert found.why().startswith("migrate: ")


def test_what_costs_more_than_it_saves_is_left():
    window = skewed(2000, [0, 1])
    one = rebalancer().decide(window, LINEAR)
    dear = 1e6 * one.saved_s / one.migration_s
    assert rebalancer(expert_bytes=0.99 * dear).decide(window, LINEAR).pays
    assert not rebalancer(expert_bytes=1.01 * dear).decide(window, LINEAR).pays
    assert not rebalancer(expert_bytes=0.51 * dear, hysteresis=2).decide(window, LINEAR).pays
    assert rebalancer(expert_bytes=1.01 * dear).decide(window, LINEAR).why().startswith("stay: ")


def test_a_gain_on_the_tokens_it_was_fitted_to_is_none():
    """The hot experts change where the window's older part ends: the plan for them does not help the newer part."""
    older, newer = skewed(1500, [0, 1]), skewed(500, [4, 6])
    window = Trace(np.concatenate([older.expert_ids, newer.expert_ids], 1), 8)
    gain = walk(older, LINEAR).seconds(WORK) - walk(older, by_load(older, LINEAR)).seconds(WORK)
    assert gain > 0
    found = rebalancer(expert_bytes=0).decide(window, LINEAR)
    assert found.migration.moved > 0
    assert found.saved_s < 100 * gain / 2


def test_a_proposal_that_changes_nothing_does_not_pay():
    assert not rebalancer(propose=lambda window, now: now, expert_bytes=0).decide(skewed(50, [0]), LINEAR).pays


def drifting(parts: int = 8, tokens: int = 1000) -> Trace:
    """The hot pair moves on every other part, always on one GPU of the linear placement."""
    ids = [skewed(tokens, [2 * (n // 2 % 4), 2 * (n // 2 % 4) + 1], seed=n).expert_ids for n in range(parts)]
    return Trace(np.concatenate(ids, 1), 8)


@pytest.mark.parametrize("expert_bytes", [0.0, 1e6, 1e9, 1e12])
def test_the_policy_is_never_far_from_the_better_of_never_and_always(expert_bytes):
    never, always, pays = simulate(drifting(), LINEAR, rebalancer(expert_bytes=expert_bytes), 1000)
    assert (never.migrations, never.moved, never.migrations_s) == (0, 0, 0)
    assert always.migrations > 0
    assert pays.seconds <= 1.05 * min(never.seconds, always.seconds)
    for outcome in (never, always, pays):
        assert sum(outcome.windows_s) == pytest.approx(outcome.seconds)
        assert len(outcome.windows_s) == 8


def test_a_free_migration_is_worth_while_and_a_dear_one_never():
    never, _, pays = simulate(drifting(), LINEAR, rebalancer(expert_bytes=0), 1000)
    assert pays.migrations > 0
    assert pays.seconds < never.seconds
    assert simulate(drifting(), LINEAR, rebalancer(expert_bytes=1e15), 1000, ["pays"])[0].migrations == 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"expert_bytes": -1}, "expert_bytes must not be negative, got -1"),
        ({"steps": float("nan")}, "steps must not be negative, got nan"),
        ({"fit": 1.0}, "fit must be between 0 and 1, got 1.0"),
    ],
)
def test_bad_fields(change, says):
    with pytest.raises(ValueError, match=f"Rebalancer: {says}"):
        rebalancer(**change)


def test_bad_windows_and_policies():
    with pytest.raises(ValueError, match="window must have at least 2 tokens, got 1"):
        rebalancer().decide(skewed(1, [0]), LINEAR)
    with pytest.raises(ValueError, match=r"window must be 2 \.\. T=50, got 51"):
        simulate(skewed(50, [0]), LINEAR, rebalancer(), 51)
    with pytest.raises(ValueError, match="policies must be among never, always, pays, got 'often'"):
        simulate(skewed(50, [0]), LINEAR, rebalancer(), 10, ["often"])
