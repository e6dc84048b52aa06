"""Prefetching: who is admitted, whom it displaces, against plain Python; and that it is never slower than none."""

from __future__ import annotations

import numpy as np
import pytest

from headgate.placement.caching.cache import Cache
from headgate.placement.caching.policies import Setting, policy
from headgate.placement.caching.pools import per_layer, shared
from headgate.placement.caching.predict import fit, foretell
from headgate.placement.caching.prefetch import Prefetcher, needed, prefetch, serve_trace
from headgate.placement.traces.generate import generate
from headgate.placement.traces.trace import Trace

LAYERS, EXPERTS = 3, 12


def cache_of(slots=4, together=False, name="lru", layers=LAYERS, experts=EXPERTS) -> Cache:
    places = (shared if together else per_layer)(layers, experts, slots)
    return Cache(places, policy(name, Setting(layers, experts, places.slots)))


def row(**chances) -> np.ndarray:
    """[L, E]: chances of layer 1's experts, named e0, e1, .."""
    out = np.zeros((LAYERS, EXPERTS), np.float32)
    for name, chance in chances.items():
        out[1, int(name[1:])] = chance
    return out


@pytest.fixture(scope="module")
def traces() -> tuple[Trace, Trace, np.ndarray]:
    """What is learned from, what is served, and what is foretold of it."""
    trace = generate(4, 32, 3, 3000, skew=0.7, affinity=0.9, carry=0.5, repeat=0.4, hold=0.98, length=60)
    fitted, served = trace.select(slice(0, 2100)), trace.select(slice(2100, None))
    return fitted, served, foretell(fit(fitted), served)


# --- one fetch -------------------------------------------------------------------------------------------------------


def test_free_slots_are_filled_by_chance_while_it_pays():
    ahead = prefetch(cache_of(), 1, row(e3=0.9, e5=0.6, e7=0.51, e9=0.5, e1=0.2), price=1.0)
    assert ahead.experts.tolist() == [3, 5, 7]  # 0.5 gains as much as it costs
    assert ahead.gone.tolist() == [-1, -1, -1]


def test_who_must_go_counts():
    cache = cache_of(slots=2)
    cache.step(1, [0, 1])
    cache.step(0, [0])
    assert prefetch(cache, 1, row(e3=0.9, e0=0.3, e1=0.41), price=1.0).gone.tolist() == [1 * EXPERTS + 0]
    cache = cache_of(slots=2)
    cache.step(1, [0])
    cache.step(1, [1])
    cache.step(0, [0])
    # expert 0 was used longest ago, but is too likely; 1 is not
    ahead = prefetch(cache, 1, row(e3=0.9, e0=0.45, e1=0.3), price=1.0)
    assert (ahead.experts.tolist(), ahead.gone.tolist()) == ([3], [1 * EXPERTS + 1])
    assert not len(prefetch(cache, 1, row(e4=0.8, e0=0.7), price=1.0).experts)  # 3 is promised, 0 too likely


def test_what_is_there_and_likely_stays():
    cache = cache_of(slots=2)
    cache.step(1, [0, 1])
    cache.step(0, [0])
    chance = row(e0=0.9, e1=0.9, e3=0.95)
    assert not len(prefetch(cache, 1, chance, price=0.1).experts)
    assert not len(prefetch(cache, 1, row(e3=1.0), price=0.0).experts)  # they were promised to the step to come
    cache.step(1, [])
    cache.step(0, [0])
    assert prefetch(cache, 1, row(e3=1.0), price=0.0).experts.tolist() == [3]


def test_the_step_in_hand_keeps_its_experts():
    cache = cache_of(slots=3, together=True)
    cache.step(0, [0, 1, 2])
    chance = row(e3=1.0)
    assert not len(prefetch(cache, 1, chance, price=0.0).experts)
    cache.step(2, [0])
    assert prefetch(cache, 1, chance, price=0.0).experts.tolist() == [3]


@pytest.mark.parametrize(("room", "expected"), [(0, []), (1, [3]), (1.3, [3, 5]), (2, [3, 5]), (9, [3, 5, 7])])
def test_room_on_the_link(room, expected):
    """The second load is late by 0.7 of its time where there is room for 1.3, the third by all of it with 2."""
    assert prefetch(cache_of(), 1, row(e3=0.9, e5=0.8, e7=0.75), 0.0, room).experts.tolist() == expected


def test_no_price_is_too_high_and_none_fetches_for_nothing():
    chance = row(e3=1.0, e4=0.999)
    assert not len(prefetch(cache_of(), 1, chance, price=np.inf).experts)
    assert prefetch(cache_of(), 1, chance, price=0.0).experts.tolist() == [3, 4]  # not those with no chance


def test_the_rule_is_plain_python():
    """Random states and chances, per layer and shared: the same fetches as a plain reading of the rule."""
    rng = np.random.default_rng(0)
    for case in range(200):
        cache = cache_of(int(rng.integers(2, 7)), together=bool(case % 2))
        for _ in range(int(rng.integers(1, 12))):
            cache.step(int(rng.integers(LAYERS)), np.sort(rng.permutation(EXPERTS)[: rng.integers(1, 3)]))
        chance = rng.random((LAYERS, EXPERTS)).astype(np.float32).round(1)
        price, room, layer = rng.choice([0.1, 0.3, 1.0]), rng.choice([0.5, 2.0, np.inf]), int(rng.integers(LAYERS))
        expected = in_python(cache, layer, chance, price, room)
        ahead = prefetch(cache, layer, chance, price, room)
        assert list(zip(ahead.experts.tolist(), ahead.gone.tolist(), strict=True)) == expected


def in_python(cache, layer, chance, price, room):
    table, value = cache.table, cache.policy.value
    holders = {s: int(h) for s, h in enumerate(table.holder)}
    frozen = {s for s in holders if table.step[s] == table.clock[0]}
    safe, found = set(), []
    for e in sorted(range(EXPERTS), key=lambda e: (-chance[layer, e], e)):
        me, p = layer * EXPERTS + e, np.float64(chance[layer, e])
        least = max(price / (1 + price), min(len(found) + 1 - room, 1.0))
        if p <= least:
            break
        if me in holders.values():
            safe.add(me)
            continue
        slots = [s for s in holders if table.first[table.pool[layer, e]] <= s < table.first[table.pool[layer, e] + 1]]
        free = [s for s in slots if holders[s] < 0]
        may = [s for s in slots if s not in frozen and holders[s] not in safe and holders[s] >= 0]
        may = [s for s in may if chance.ravel()[holders[s]] < p - least]
        if free or may:
            s = free[0] if free else min(may, key=lambda s: (value.ravel()[holders[s]], holders[s]))
            found.append((e, holders[s]))
            holders[s] = me
            safe.add(me)
    return found


# --- a whole trace ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("together", [False, True])
def test_compiled_and_live_agree_access_by_access(traces, together):
    fitted, served, chance = traces
    served = served.select(slice(0, 150))
    shape = {"layers": 4, "experts": 32, "slots": 16 if together else 8, "together": together}
    whole = serve_trace(cache_of(**shape), served, chance[:, :150], price=0.5)
    cache, hits, fetched = cache_of(**shape), 0, 0
    ahead = Prefetcher(cache, fit(fitted), price=0.5)
    for t in range(150):
        if t == 0 or served.sequence[t] != served.sequence[t - 1]:
            ahead.start()
            cache.new_sequence()
        for layer in range(4):
            fetched += len(ahead.fetch(layer).experts)
            ids = np.sort(served.expert_ids[layer, t].astype(np.int32))
            hits += cache.step(layer, ids).hits
            ahead.observe(layer, ids)
    assert (whole.hits, whole.fetched) == (hits, fetched)
    assert whole.accesses == 150 * 4 * 3
    assert fetched > 100


def test_without_chances_it_is_the_cache_alone(traces):
    _, served, chance = traces
    alone = serve_trace(cache_of(8, layers=4, experts=32), served, None)
    dear = serve_trace(cache_of(8, layers=4, experts=32), served, chance, price=np.inf)
    assert (alone.hits, alone.fetched, alone.loads) == (dear.hits, 0, alone.accesses - alone.hits)


def test_waiting_is_counted_on_one_link():
    """Two loads on demand, one after the other; what layer 1 is to need is asked for when they are there."""
    trace = Trace(np.array([[[0, 1]], [[2, 3]]], np.uint8), num_experts=4)
    chance = np.zeros((2, 1, 4), np.float32)
    chance[1, 0, [2, 0]] = 0.9, 0.8  # right, and wrong
    shape = {"slots": 4, "layers": 2, "experts": 4}
    alone = serve_trace(cache_of(**shape), trace, None, load=2.0)
    assert alone.waited == 8
    ahead = serve_trace(cache_of(**shape), trace, chance, price=0.0, load=2.0)
    # loads end at 2, 4 | 6, 8 ahead and 10 on demand; the step of layer 1 could begin at 5
    assert (ahead.hits, ahead.fetched, ahead.waited) == (1, 2, 9)
    held = serve_trace(cache_of(**shape), trace, chance, price=0.0, room=1.0, load=2.0)
    assert (held.hits, held.fetched, held.waited) == (1, 1, 7)


@pytest.mark.parametrize("load", [0.1, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("price", [0.0, 0.3, 1.0, 3.0])
def test_with_room_no_setting_is_slower_than_no_prefetch(traces, load, price):
    _, served, chance = traces
    for slots in (4, 8, 16):
        shape = {"slots": slots, "layers": 4, "experts": 32}
        alone = serve_trace(cache_of(**shape), served, None, load=load)
        ahead = serve_trace(cache_of(**shape), served, chance, price=price, room=1 / load, load=load)
        assert ahead.waited <= 1.001 * alone.waited  # a handful of fetches may have bad luck
        assert ahead.waited < 0.97 * alone.waited or load > 1 or price > 0.3


def test_a_higher_price_fetches_less_for_fewer_hits(traces):
    _, served, chance = traces
    shape = {"slots": 8, "layers": 4, "experts": 32}
    found = [serve_trace(cache_of(**shape), served, chance, price=price) for price in (0.1, 0.5, 2.0)]
    assert found[0].hits > found[1].hits > found[2].hits
    assert found[0].loads > found[1].loads > found[2].loads


def test_many_tokens_need_an_expert_more_surely():
    assert needed(np.array([0.5, 0.0, 1.0], np.float32), 3).tolist() == [0.875, 0.0, 1.0]


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"chance": np.zeros((2, 12))}, "chance must be .L, E. = .3, 12."),
        ({"layer": 3}, "layer must be 0 .. 2, got 3"),
        ({"price": -1.0}, "price must be a number and not negative, got -1"),
        ({"price": float("nan")}, "price must be a number and not negative, got nan"),
        ({"room": -0.5}, "room must be a number and not negative"),
    ],
)
def test_bad_input_is_refused_before_anything_changes(change, says):
    cache = cache_of()
    with pytest.raises(ValueError, match=says):
        prefetch(**{"cache": cache, "layer": 1, "chance": row(e1=1.0)} | change)
    assert (cache.table.holder < 0).all()


def test_what_does_not_fit_together_is_refused(traces):
    fitted, served, chance = traces
    with pytest.raises(ValueError, match=r"predictor must be for .L, E. = .3, 12., got .4, 32."):
        Prefetcher(cache_of(), fit(fitted, "popular"))
    with pytest.raises(ValueError, match=r"chance must be .L, T, E. = .4, 900, 32."):
        serve_trace(cache_of(8, layers=4, experts=32), served, chance[:, 1:])
