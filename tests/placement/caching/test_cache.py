"""The cache's decisions, access by access, against the same rules written out in plain Python."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
from cache_model import Model, rules
from hypothesis import given, settings
from hypothesis import strategies as st

from headgate.placement.caching.cache import Cache
from headgate.placement.caching.policies import NEED_TRACE, POLICIES, Setting, policy
from headgate.placement.caching.pools import per_layer, pools, shared
from headgate.placement.traces.trace import Trace

OPTIONS = {"lfu decayed": {"decay": 0.5}}


def driven(seed, name, layers, experts, scope, steps, ahead, busy, apart):
    """A Cache and a Model through the same random steps; both must decide alike every time."""
    rng = np.random.default_rng(seed)
    if scope == "pools":
        count = int(rng.integers(1, 4))
        of = rng.integers(0, count, (layers, experts))
        places = pools(of, rng.integers(1, experts + 2, count))
    else:
        places = {"layer": per_layer, "shared": shared}[scope](layers, experts, int(rng.integers(1, experts + 2)))
    saw, value, left, begins = rules(name, layers, experts)
    frank = name.endswith(" frank")
    model = Model(places.of.tolist(), np.diff(places.first).tolist(), saw, value, left, frank)
    setting = Setting(layers, experts, places.slots, options=OPTIONS.get(name, {}))
    cache = Cache(places, policy(name.split()[0], setting)._replace(frank=frank))
    for n in range(steps):
        if rng.random() < 0.1:
            cache.new_sequence()
            begins()
        if busy:
            hold = rng.choice(places.slots, int(rng.integers(0, places.slots + 1)), replace=False)
            cache.table.busy[:] = 0
            cache.table.busy[hold] = 1
            model.held = set(hold.tolist())
        layer = n % layers
        ids = np.sort(rng.choice(experts, int(rng.integers(0, experts + 1)), replace=False))
        elsewhere = ids[rng.random(len(ids)) < 0.4] if apart else ids[:0]
        here = np.setdiff1d(ids, elsewhere)
        missing = {places.of[layer, e] for e in here if (layer, e) not in model.where}
        slots_of = [set(range(a, b)) for a, b in zip(places.first[:-1], places.first[1:], strict=True)]
        assert cache.ready(layer, here) == all(slots_of[p] - model.held for p in missing)
        if not cache.ready(layer, here):
            before = pickle.dumps((cache.table, cache.policy))
            with pytest.raises(ValueError, match="a pool must have a slot that nobody holds"):
                cache.step(layer, ids, elsewhere)
            assert pickle.dumps((cache.table, cache.policy)) == before
            continue
        found = cache.step(layer, ids, elsewhere)
        served, hits = model.step(layer, ids.tolist(), elsewhere.tolist())
        lists = (found.experts.tolist(), found.slots.tolist(), found.gone.tolist(), found.waves.tolist())
        assert list(zip(*lists, strict=True)) == served
        assert found.hits == hits
        if ahead:
            to = int(rng.integers(0, layers))
            wanted = rng.permutation(experts)[: int(rng.integers(0, experts + 1))]
            worth = (
                None
                if rng.random() < 0.5 or name in ("lfu", "lfu frank", "lfu-cached", "ring")
                else rng.random(len(wanted)) * n
            )
            most = int(rng.integers(0, 4)) if rng.random() < 0.5 else None
            got = cache.prefetch(to, wanted, worth, most)
            endless = [math.inf] * len(wanted) if worth is None else worth.tolist()
            expected = model.prefetch(to, wanted.tolist(), endless, len(wanted) if most is None else most)
            assert list(zip(got.experts.tolist(), got.slots.tolist(), got.gone.tolist(), strict=True)) == expected
        assert {
            (h // experts, h % experts): s for s, h in enumerate(cache.table.holder.tolist()) if h >= 0
        } == model.where


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    name=st.sampled_from(["lru", "lfu", "lfu frank", "lfu decayed", "lfu-cached", "lfru", "ring"]),
    layers=st.integers(1, 3),
    experts=st.integers(1, 6),
    scope=st.sampled_from(["layer", "shared", "pools"]),
    ahead=st.booleans(),
    busy=st.booleans(),
    apart=st.booleans(),
)
def test_every_decision_is_the_models(seed, name, layers, experts, scope, ahead, busy, apart):
    driven(seed, name, layers, experts, scope, 25, ahead, busy, apart)


def a_trace(layers=2, experts=4):
    rng = np.random.default_rng(5)
    ids = np.argsort(rng.random((layers, 40, experts)), axis=2)[:, :, :2].astype(np.uint8)
    return Trace(ids, experts, sequence=np.repeat(np.arange(4, dtype=np.int32), 10))


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_is_deterministic_and_sees_only_its_own_past(name):
    """Two caches by one name decide alike, and neither changes what the other remembers."""

    def run(cache, seed):
        rng, said = np.random.default_rng(seed), []
        for n in range(60):
            ids = np.sort(rng.choice(4, 2, replace=False))
            found = cache.step(n % 2, ids)
            said.append((found.experts.tolist(), found.slots.tolist(), found.gone.tolist()))
        return said

    def fresh():
        return Cache(per_layer(2, 4, 3), policy(name, Setting(2, 4, 6, a_trace())))

    one, other = fresh(), fresh()
    expected = run(fresh(), 1)
    run(other, 2)
    assert run(one, 1) == expected
    assert np.isfinite(one.policy.value).all()


def test_slots_are_taken_in_waves():
    cache = Cache(per_layer(1, 6, 2), policy("lru", Setting(1, 6, 2)))
    cache.step(0, [3, 5])
    found = cache.step(0, [0, 1, 2, 3, 4])
    assert found.hits == 1
    assert found.experts.tolist() == [3, 0, 1, 2, 4]
    assert found.waves.tolist() == [0, 0, 1, 1, 2]
    assert found.gone.tolist() == [-2, 5, 0, 3, 1]


def test_what_is_computed_apart_becomes_worth_keeping():
    """Without a slot, and without anybody going for it; then it stays where others go."""
    cache = Cache(per_layer(1, 6, 2), policy("lfu", Setting(1, 6, 2)))
    cache.step(0, [0, 1])
    for _ in range(3):
        found = cache.step(0, [1, 5], apart=[5])
        assert (found.experts.tolist(), found.hits, found.gone.tolist()) == ([1], 1, [-2])
        assert cache.table.slot_of[0, 5] == -1
    assert cache.step(0, [5]).gone.tolist() == [0]
    assert cache.step(0, [4]).gone.tolist() == [1]  # four uses each, 5's the later
    assert cache.table.slot_of[0, 5] >= 0


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda c: c.step(0, [1, 2], [3]), r"apart must be some of ids \[1, 2\], got \[3\]"),
        (lambda c: c.step(0, [1, 2], [2, 2]), r"apart must be some of ids \[1, 2\], got \[2, 2\]"),
        (lambda c: c.step(2, [0]), "layer must be 0 .. 1, got 2"),
        (lambda c: c.step(0, [1, 1]), r"ids must be distinct and rising, got \[1, 1\]"),
        (lambda c: c.step(0, [0, 4]), r"ids must be \[n\], 0 .. 3, got \[0, 4\]"),
        (lambda c: c.step(0, [[0]]), r"ids must be \[n\]"),
        (lambda c: c.prefetch(0, [-1]), r"ids must be \[n\], 0 .. 3"),
        (lambda c: c.prefetch(0, [1], [1.0, 2.0]), r"worth must have one number for each of 1 ids, got \(2,\)"),
        (lambda c: Cache(per_layer(1, 4, 2), c.policy), r"policy must be for \[L, E\] = \(1, 4\), got \(2, 4\)"),
        (lambda c: pools(np.array([[0, 1]]), np.array([1])), "of must be 0 .. 0, got 0 .. 1"),
        (lambda c: pools(np.array([[0]]), np.array([0])), "slots must be .P. and at least 1 each"),
        (lambda c: pools(np.zeros((0, 4)), np.array([1])), "of must be .L, E. and not empty"),
        (lambda c: policy("fifo", Setting(1, 4, 2)), "name must be one of lru, .*, got 'fifo'"),
        (lambda c: policy("lru", Setting(1, 4, 2, options={"decay": 1})), "options of lru must be among"),
        (lambda c: policy("lfu", Setting(1, 4, 2, options={"decay": 0})), "decay of lfu must be above 0"),
        (lambda c: policy("sequence", Setting(2, 4, 2, a_trace(), {"own": 2})), "own of sequence must be 0 .. 1"),
        (lambda c: policy("affinity", Setting(2, 4, 2, a_trace(), {"decay": 1})), "decay of affinity must be"),
    ],
)
def test_bad_input_is_refused(call, says):
    cache = Cache(per_layer(2, 4, 2), policy("lru", Setting(2, 4, 4)))
    with pytest.raises(ValueError, match=says):
        call(cache)
    assert (cache.table.holder == -1).all()


@pytest.mark.parametrize("name", NEED_TRACE)
def test_policies_that_learn_say_so(name):
    with pytest.raises(ValueError, match=f"policy: {name} must be given a trace to learn from, got none"):
        policy(name, Setting(2, 4, 4))
    with pytest.raises(ValueError, match=rf"the trace of {name} must have L, E = \(3, 4\), got \(2, 4\)"):
        policy(name, Setting(3, 4, 4, a_trace()))
