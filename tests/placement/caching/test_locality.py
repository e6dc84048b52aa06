"""SRP and SCH against their definitions in plain Python."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headgate.placement.caching.locality import sch, srp
from headgate.placement.caching.simulate import simulate
from headgate.placement.traces.generate import generate
from headgate.placement.traces.trace import Trace


def random_trace(seed, layers, experts, top_k, tokens):
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((layers, tokens, experts)) * np.arange(1, experts + 1), axis=2)[:, :, :top_k]
    ids = np.where(rng.random(ids.shape) < 0.1, 255, ids).astype(np.uint8)
    return Trace(ids, experts, sequence=np.sort(rng.integers(0, 3, tokens)).astype(np.int32))


def srp_by_definition(trace, s, layers, experts):
    """(value, theta, rho) with one theta for these layers and experts."""
    cells = []
    for start in range(trace.shape[1] - s + 1):
        if len(set(trace.sequence[start : start + s].tolist())) == 1:
            window = trace.expert_ids[:, start : start + s]
            cells += [int((window[l] == e).sum()) for l in layers for e in experts]
    acts, best = sum(cells), (0.0, 1, 0.0)
    for theta in range(1, s + 1):
        chosen = [c for c in cells if c >= theta]
        score = 2 * sum(chosen) / max(s * len(chosen) + acts, 1)
        if theta == 1 or score > best[0]:
            best = (score, theta, s * len(chosen) / max(acts, 1))
    return best


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), layers=st.integers(1, 3), tokens=st.integers(0, 12), s=st.integers(1, 6))
def test_srp_is_its_definition(seed, layers, tokens, s):
    trace = random_trace(seed, layers, 4, 2, tokens)
    every, experts = range(layers), range(4)
    found = srp(trace, s)
    assert (found.value, found.theta, found.rho) == pytest.approx(srp_by_definition(trace, s, every, experts))
    found = srp(trace, s, "layer")
    for l in every:
        got = (found.value[l], found.theta[l], found.rho[l])
        assert got == pytest.approx(srp_by_definition(trace, s, [l], experts))
    found = srp(trace, s, "expert")
    for l in every:
        for e in experts:
            got = (found.value[l, e], found.theta[l, e], found.rho[l, e])
            assert got == pytest.approx(srp_by_definition(trace, s, [l], [e]))


def sch_by_definition(trace, layer, s, m):
    """(hits, uses) of a cache of m experts that looks s tokens ahead."""
    there, last, hits, uses = set(), {}, 0, 0
    tokens = [[e for e in row if e != trace.none] for row in trace.expert_ids[layer].tolist()]
    for t, ids in enumerate(tokens):
        uses, hits = uses + len(ids), hits + len(there & set(ids))
        for e in ids:
            last[e] = t
        for e in ids:
            if e in there:
                continue
            if len(there) == m:
                ahead = {x: sum(x in later for later in tokens[t + 1 : t + 1 + s]) for x in there}
                there.remove(min(there - set(ids), key=lambda x: (ahead[x], last[x], x)))
            there.add(e)
    return hits, uses


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), tokens=st.integers(0, 16), s=st.integers(0, 20))
def test_sch_is_its_definition_for_every_size(seed, tokens, s):
    trace = random_trace(seed, 2, 6, 2, tokens)
    found = sch(trace, s)
    for layer in range(2):
        for m in range(2, 7):
            assert (found.hits[layer, m], found.uses[layer]) == sch_by_definition(trace, layer, s, m)
    assert (np.diff(found.hits) >= 0).all()


def test_sch_lies_between_lru_and_belady():
    trace = generate(layers=2, experts=16, top_k=2, tokens=600, length=100)
    for m in (3, 5, 11):
        assert sch(trace, 0).recall(m) == simulate(trace, "lru", m).hit_rate
        best = simulate(trace, "belady", m).hit_rate
        recalls = [sch(trace, s).recall(m) for s in (0, 4, 32)]
        assert recalls[0] < recalls[1] <= best
        assert recalls[2] <= best


def test_intervals_hold_the_value():
    trace = generate(layers=2, experts=16, top_k=2, tokens=3000, length=60)
    found = srp(trace, 8, resamples=200, seed=1)
    assert found.low < found.value < found.high
    assert found.high - found.low < 0.1
    again = srp(trace, 8, resamples=200, seed=1)
    assert (found.low, found.high) == (again.low, again.high)
    layers = srp(trace, 8, "layer", resamples=50)
    assert (layers.low <= layers.high).all()
    assert layers.low.shape == (2,)
    assert np.isnan(srp(trace, 8).low)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda t: srp(t, 0), "s must be 1 .. 65535, got 0"),
        (lambda t: srp(t, 4, "token"), "level must be one of model, layer, expert, got 'token'"),
        (lambda t: srp(t, 4, "expert", resamples=10), "resamples must come with several sequences"),
        (lambda t: srp(t.select(slice(0, 1)), 1, resamples=10), "resamples must come with several sequences"),
        (lambda t: sch(t, -1), "s must not be negative, got -1"),
    ],
)
def test_bad_input_is_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call(random_trace(0, 1, 4, 2, 10))
