"""Tiers of caches and the time a pass waits: by hand, against plain Python, and never below the bound."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headgate.placement.caching.pools import shared
from headgate.placement.caching.simulate import Prefetch, simulate
from headgate.placement.caching.steps import steps_of
from headgate.placement.caching.tiers import Times, loads_of, stall
from headgate.placement.traces.generate import generate
from headgate.placement.traces.trace import Trace


def in_python(device, times, host):
    """The timeline with lists: seconds until the last step ends."""
    size = device.steps.experts
    far = set()  # (number of the group of loads, expert) that come from disk
    if host is not None:
        events = zip(host.log.step.tolist(), host.log.expert.tolist(), host.log.gone.tolist(), strict=True)
        far = {(n, e) for n, e, gone in events if gone != -2}
    now, link, disk, arrival, waiting = 0.0, 0.0, 0.0, {}, []  # waiting: [expert, issued, from disk]
    group, last = -1, None

    def load(issued, from_disk):
        nonlocal link, disk
        if from_disk:
            issued = disk = max(disk, issued) + times.read_s
        link = max(link, issued) + times.load_s
        return link

    log = list(zip(*(field.tolist() for field in device.log), strict=True))
    for n in range(len(device.steps)):
        start = now + times.layer_s
        while waiting and max(disk if waiting[0][2] else link, waiting[0][1]) < start:
            e, issued, from_disk = waiting.pop(0)
            arrival[e] = load(issued, from_disk)
        now, wave, coming = start, 0, []

        def compute(coming, now):
            for a in sorted(coming):
                now = max(now, a) + times.expert_s
            return now

        for step, e, gone, of_wave, ahead in log:
            if step != n:
                continue
            if gone != -2 and (step, e // size, ahead) != last:
                group, last = group + 1, (step, e // size, ahead)
            waiting = [one for one in waiting if one[0] != gone]
            if ahead:
                waiting.append([e, start, (group, e) in far])
                continue
            if of_wave != wave:
                now, wave, coming = compute(coming, now), of_wave, []
            mine = [one for one in waiting if one[0] == e]
            if gone != -2:
                arrival[e] = load(now, (group, e) in far)
            elif mine:
                waiting.remove(mine[0])
                arrival[e] = load(now, mine[0][2])
            coming.append(arrival[e])
        now = compute(coming, now)
    return now


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rule=st.sampled_from(["lru", "lfru", "belady"]),
    batch=st.integers(1, 3),
    slots=st.integers(1, 6),
    below=st.booleans(),
    horizons=st.lists(st.integers(1, 3), max_size=2),
    scope=st.sampled_from(["layer", "shared"]),
)
def test_the_timeline_is_plain_pythons_and_not_below_the_bound(seed, rule, batch, slots, below, horizons, scope):
    rng = np.random.default_rng(seed)
    trace = generate(layers=2, experts=6, top_k=2, tokens=14, length=9, seed=seed)
    steps = steps_of(trace, batch)
    ahead = [Prefetch(rng.integers(0, 4, (len(steps), 1)) + np.arange(3), None, h, 2) for h in horizons]
    device = simulate(steps, rule, slots, scope=scope, prefetch=ahead, log=True)
    times = Times(1e9, rng.choice([1.0, 4.0]), rng.choice([0.5, 2.0]), rng.choice([0, 0.7]), rng.choice([0, 0.3]))
    host = simulate(loads_of(device), "lru", shared(2, 6, int(rng.integers(1, 12))), log=True) if below else None
    found = stall(device, times, host)
    sizes = np.diff(steps.offsets)
    assert found.compute_s == pytest.approx(len(steps) * times.layer_s + times.expert_s * sizes.sum())
    assert found.compute_s + found.stall_s == pytest.approx(in_python(device, times, host))
    assert found.stall_s >= found.bound_s - 1e-9
    if host is not None:
        assert host.accesses.sum() == device.transfers
        assert found.disk_s <= host.loads * times.read_s + 1e-9
    assert found.link_s <= device.transfers * times.load_s + 1e-9


def test_by_hand():
    """Two experts, one slot, four tokens: 0 1 1 0. Loading takes 2 s, computing 1 s, the rest of a layer 1 s."""
    trace = Trace(np.array([[[0], [1], [1], [0]]], np.uint8), 2)
    times = Times(2e9, 1.0, 1.0, layer_s=1.0, expert_s=1.0)
    device = simulate(trace, "lru", 1, log=True)
    found = stall(device, times)
    assert (found.compute_s, found.stall_s, found.link_s, found.disk_s) == (8.0, 6.0, 6.0, 0.0)
    # three loads one after the other from second 0 on, then the last expert computes: 7 s; or one load, one expert and
    # three steps: 9 s
    assert found.bound_s == 1.0
    host = simulate(loads_of(device), "lru", 1, log=True)
    assert host.hits.sum() == 0
    assert stall(device, times, host).stall_s == 12.0
    with_room = simulate(loads_of(device), "lru", 2, log=True)
    assert (with_room.hits.sum(), stall(device, times, with_room).stall_s) == (1, 10.0)


def test_fetching_ahead_hides_loads():
    """A new expert in every step, slots for two steps: with the next one known only the first load is waited for."""
    trace = Trace(np.arange(60, dtype=np.uint8)[None, :, None], 60)
    steps = steps_of(trace)
    times = Times(1e9, 1.0, layer_s=1.0, expert_s=0.5)
    wanted = Prefetch(steps.ids[:, None])
    plain = stall(simulate(steps, "lru", 2, log=True), times)
    ahead = stall(simulate(steps, "lru", 2, prefetch=wanted, log=True), times)
    assert plain.stall_s == pytest.approx(60.0)
    assert ahead.stall_s == pytest.approx(1.0)
    slow = stall(simulate(steps, "lru", 2, prefetch=wanted, log=True), Times(2e9, 1.0, layer_s=1.0, expert_s=0.5))
    assert slow.bound_s == pytest.approx(slow.stall_s, rel=0.1)  # the link is the limit, and nearly always busy


def test_the_tier_below_is_asked_for_what_is_loaded():
    trace = generate(layers=3, experts=8, top_k=2, tokens=120, length=30)
    device = simulate(trace, "lru", 3, log=True)
    below = loads_of(device)
    assert len(below.ids) == device.loads
    misses = sorted((n, e) for n, e, g in zip(*(f.tolist() for f in device.log[:3]), strict=True) if g != -2)
    asked = [(int(below.layer[n]) * 8 + e) for n in range(len(below)) for e in below.of(n).tolist()]
    assert asked == [e for _, e in misses]
    assert below.begins.sum() == 4
    everything = simulate(below, "lru", 8)
    assert everything.loads == len(np.unique(asked))
    assert simulate(below, "belady", 5).hit_rate >= simulate(below, "lru", 5).hit_rate


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda d: loads_of(simulate(d.steps, "lru", 2)), "must have kept its log"),
        (lambda d: stall(simulate(d.steps, "lru", 2), Times(1e6)), "must have kept its log"),
        (lambda d: stall(d, Times(1e6), simulate(d.steps, "lru", 2, log=True)), "host must be the simulation of"),
        (lambda d: Times(0), "expert_bytes must be finite and above 0, got 0"),
        (lambda d: Times(1, link_GBps=float("nan")), "link_GBps must be finite and above 0, got nan"),
        (lambda d: Times(1, layer_s=-1), "layer_s must be finite and not negative, got -1"),
    ],
)
def test_bad_input_is_refused(call, says):
    device = simulate(generate(layers=2, experts=4, top_k=2, tokens=20), "lru", 2, log=True)
    with pytest.raises(ValueError, match=says):
        call(device)
