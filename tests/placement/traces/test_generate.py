"""Synthetic traces: distinct experts, the same for the same seed, with the skew, affinity and domains asked for."""

import doctest

import numpy as np
import pytest

from headgate.placement.traces import generate as module
from headgate.placement.traces.affinity import affinity, expert_load, imbalance
from headgate.placement.traces.drift import drift
from headgate.placement.traces.generate import generate, like_deepseek_v2_lite
from headgate.placement.traces.statistics import loads_of, statistics
from headgate.placement.traces.trace import Trace


def lift(trace):
    return np.mean([a.lift for a in affinity(trace)])


def halves(trace):
    middle = trace.shape[1] // 2
    return [
        Trace(trace.expert_ids[:, part], trace.num_experts, sequence=trace.sequence[part])
        for part in (slice(0, middle), slice(middle, None))
    ]


def test_examples():
    assert not doctest.testmod(module).failed


@pytest.mark.parametrize(("experts", "top_k"), [(8, 1), (8, 8), (256, 8), (300, 3)])
def test_every_choice_of_a_token_is_another_expert(experts, top_k):
    trace = generate(3, experts, top_k, 400, skew=1.5, affinity=0.9, length=50)
    assert trace.shape == (3, 400, top_k)
    assert trace.live.all()
    assert (np.diff(np.sort(trace.expert_ids, axis=2).astype(int), axis=2) > 0).all()
    assert trace.sequence.tolist() == np.repeat(np.arange(8), 50).tolist()


def test_same_seed_same_trace():
    sizes = (3, 16, 2, 100)
    first, again, other = (generate(*sizes, domains=2, drift=0.3, seed=s).expert_ids for s in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize("skew", [0.0, 0.5, 1.0])
def test_loads_are_zipfs_where_a_token_chooses_once(skew):
    load = np.sort(expert_load(generate(4, 32, 1, 100_000, skew=skew, affinity=0.0)), axis=1)[:, ::-1]
    zipf = np.arange(1, 33) ** -skew
    np.testing.assert_allclose(load / 100_000, np.tile(zipf / zipf.sum(), (4, 1)), atol=0.006)


def test_affinity_is_the_share_that_follows_the_topic():
    lifts = [lift(generate(4, 32, 2, 20_000, affinity=share, topics=8, hold=1.0)) for share in (0.0, 0.5, 0.9)]
    assert lifts[0] == pytest.approx(1, abs=0.03)
    assert lifts[0] + 0.3 < lifts[1] < lifts[2] - 0.5
    # all choices in a topic kept through the layers: 4 experts of 32 follow
    moves = statistics(generate(2, 32, 1, 20_000, skew=0.0, affinity=1.0, topics=8, hold=1.0)).transitions[0].toarray()
    assert ((moves > 0).sum(axis=1) == 4).all()


def test_a_topic_that_is_dropped_is_forgotten():
    kept, dropped = (generate(5, 32, 2, 20_000, affinity=0.8, topics=8, hold=hold) for hold in (1.0, 0.5))
    ends = [Trace(np.ascontiguousarray(t.expert_ids[[0, 4]]), 32) for t in (kept, dropped)]
    assert lift(ends[0]) > 1.5
    assert lift(ends[1]) < 1.15


def test_domains_stand_apart_and_drift_grows():
    alike, apart = (generate(3, 32, 2, 8192, domains=2, shift=shift, topics=8) for shift in (0.0, 0.8))
    near, far = (drift(*halves(t)) for t in (alike, apart))
    assert (near.load < 2 * near.load_by_chance).all()
    assert (far.load > 0.3).all()
    domain = np.asarray(apart.sequence, int) * 2 // (int(apart.sequence[-1]) + 1)
    np.testing.assert_array_equal(loads_of(apart, domain)[0], statistics(halves(apart)[0]).load)
    still, moving = (drift(*halves(generate(3, 32, 2, 8000, drift=d))) for d in (0.0, 1.0))
    assert (still.load < 1.5 * still.load_by_chance).all()
    assert (moving.load > 2 * moving.load_by_chance).all()


def test_the_preset_is_as_near_to_the_real_trace_as_it_says():
    """The figures in its docstring: loads 3.48, lift 1.62, companions .379, GPUs 4.53, domains .306, hits of an
    LRU cache of 8, 16, 32 slots a layer .347, .519, .730."""
    trace = like_deepseek_v2_lite(16_384)
    found = statistics(trace, co_activation=True)
    assert imbalance(found.load).mean() == pytest.approx(3.48, abs=0.1)
    assert lift(trace) == pytest.approx(1.62, abs=0.05)
    pairs = [c.toarray() - np.diag(c.diagonal()) for c in found.co_activation]
    assert np.mean([np.sort(p, axis=1)[:, -6:].sum() / p.sum() for p in pairs]) == pytest.approx(0.379, abs=0.01)
    gpu = np.random.default_rng(0).permutation(64) // 8
    on = np.sort(gpu[trace.expert_ids], axis=2)
    assert 1 + (np.diff(on, axis=2) != 0).sum(axis=2).mean() == pytest.approx(4.53, abs=0.1)
    assert drift(*halves(trace)).load.mean() == pytest.approx(0.306, abs=0.02)
    hits = [hits_of_lru(trace.expert_ids[:, :4000], slots) for slots in (8, 16, 32)]
    assert hits == pytest.approx([0.347, 0.519, 0.730], abs=0.02)


def hits_of_lru(expert_ids, slots):
    """The share of choices that find their expert in an LRU cache of `slots` experts for each layer, token by token."""
    hits = 0
    for layer in expert_ids.astype(int):
        resident: dict[int, None] = {}  # least recently used first
        for token in layer.tolist():
            hits += sum(e in resident for e in token)
            for e in token:
                resident.pop(e, None)
            for e in [*resident][: max(0, len(resident) + len(token) - slots)]:
                del resident[e]
            resident.update(dict.fromkeys(token))
    return hits / expert_ids.size


def test_tokens_take_over_from_the_one_before_them():
    def shared(trace):  # of a token's choices, those that the token before made too; and at the first of a sequence
        ids = trace.expert_ids
        same = (ids[:, 1:, :, None] == ids[:, :-1, None, :]).any(3).mean((0, 2))
        first = np.arange(1, ids.shape[1]) % 50 == 0
        return same[~first].mean(), same[first].mean()

    sizes = {"layers": 3, "experts": 32, "top_k": 4, "tokens": 4000, "length": 50}
    plain, carried, repeated = (shared(generate(**sizes, **m)) for m in ({}, {"carry": 0.9}, {"repeat": 0.5}))
    assert carried[0] > 1.3 * plain[0]
    assert repeated[0] > 0.5
    assert max(carried[1], repeated[1]) < 1.1 * plain[0]  # sequences have nothing to do with each other


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"tokens": 0}, "tokens must be at least 1"),
        ({"top_k": 9}, r"top_k must be 1 \.\. experts=8, got 9"),
        ({"topics": 9}, "topics must be"),
        ({"domains": 5, "topics": 4}, "domains must be at most topics=4, got 5"),
        ({"skew": float("nan")}, "skew must be finite and not negative, got nan"),
        ({"affinity": 1.1}, r"affinity must be 0 \.\. 1, got 1.1"),
        ({"hold": -0.1}, "hold must be"),
        ({"shift": float("nan")}, "shift must be"),
        ({"drift": 2}, "drift must be"),
        ({"carry": 1.5}, "carry must be"),
        ({"repeat": -1}, "repeat must be"),
        ({"length": 0}, "length must be"),
    ],
)
def test_what_cannot_be_generated_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        generate(**({"layers": 2, "experts": 8, "top_k": 2, "tokens": 10} | change))
