"""Foresight: the values against a plain recomputation, planted structure, the guard, what is learned in files."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headgate.placement.caching.cache import Cache
from headgate.placement.caching.policies import Learned, Setting, policy
from headgate.placement.caching.policies import foresight as f
from headgate.placement.caching.pools import per_layer
from headgate.placement.caching.simulate import least_loads, simulate
from headgate.placement.caching.steps import steps_of
from headgate.placement.traces.generate import generate
from headgate.placement.traces.trace import Trace


def made_of(ids, experts: int) -> Trace:
    return Trace(np.asarray(ids, np.uint8), experts)


def phrases(tokens: int, seed: int, length: int = 10, kinds: int = 3, experts: int = 32) -> Trace:
    """Phrases of fixed words that follow each other by chance; a word is two experts at each of two layers."""
    rng = np.random.default_rng(0)  # the words are the same for every seed
    words = np.array([[rng.choice(experts, (kinds * length, 2))] for _ in range(2)])[:, 0]
    words[..., 1] = np.where(words[..., 1] == words[..., 0], (words[..., 0] + 1) % experts, words[..., 1])
    order = np.random.default_rng(seed).integers(kinds, size=tokens // length)
    said = (order[:, None] * length + np.arange(length)).ravel()
    return made_of(words[:, said], experts)


def recomputed(trace: Trace, slots: int) -> np.ndarray:
    """The values after each step [T, L, E] in float64, features from the whole past each time."""
    layers, tokens, _ = trace.shape
    experts = trace.num_experts
    used = np.zeros((layers, tokens, experts))
    for layer, t, ids in ((a, b, trace.expert_ids[a, b]) for a in range(layers) for b in range(tokens)):
        used[layer, t, ids[ids != trace.none]] = 1
    n = used.sum(2)
    loud = np.sqrt((1 - n / experts) / n)

    def mean(layer: int, t: int, rates: np.ndarray) -> np.ndarray:
        kept = np.append(np.cumprod((1 - rates[: t + 1])[::-1])[::-1][1:], 1.0)
        return (rates[: t + 1] * kept) @ used[layer, : t + 1]

    slow = np.maximum(f.SLOW, 1 / (np.arange(1, tokens + 1) + f.FIRST))
    weights, gain = np.zeros((layers, f.BLOCKS * experts, experts)), np.ones((layers, f.BLOCKS * experts))
    values, seen = np.zeros((tokens, layers, experts)), np.zeros((layers, f.BLOCKS * experts))
    for t in range(tokens):
        for layer in range(layers):
            often = mean(layer, t, slow)
            blocks = []
            for reach in f.REACH:
                other, at = layer + reach, t if reach <= 0 else t - 1
                blocks.append(loud[other, at] * used[other, at] if 0 <= other < layers and at >= 0 else 0 * often)
            for rate in f.RATES:
                recent = mean(layer, t, np.full(tokens, rate))
                blocks.append(loud[layer, t] * np.sqrt((2 - rate) / rate) * (recent - often))
            x, gamma = np.concatenate(blocks), np.clip(1 - n[layer, t] / (2 * slots), 0.5, 0.95)
            values[t, layer] = often / (1 - gamma * (1 - often)) + x @ weights[layer]
            u, later = used[layer, t], gamma * values[t, layer].clip(0, 1)
            error = u + (1 - u) * later - (values[t - 1, layer] if t else 0)
            old, g = seen[layer], gain[layer]
            step = g * old / (f.CALM + g @ old**2)
            weights[layer] += np.outer(step, error)
            gain[layer] = np.minimum(g - step * g * old + f.NOISE, 1)
            seen[layer] = x
    return values


@pytest.mark.parametrize("seed", [0, 1])
def test_values_equal_those_recomputed_from_the_whole_past(seed):
    trace = generate(layers=10, experts=12, top_k=3, tokens=60, carry=0.8, repeat=0.3, seed=seed)
    ids = trace.expert_ids.copy()
    ids[2, 7, 1] = trace.none
    trace = Trace(ids, 12)
    wanted = recomputed(trace, slots=5)
    adaptive = policy("adaptive", Setting(10, 12, 50, options={"guard": 0}))
    cache = Cache(per_layer(10, 12, 5), adaptive)
    for t in range(60):
        for layer in range(10):
            cache.step(layer, np.setdiff1d(ids[layer, t], [trace.none]))
            np.testing.assert_allclose(adaptive.value[layer], wanted[t, layer], atol=2e-5)
    assert np.abs(wanted[-1] - wanted[0]).max() > 0.2


def test_planted_phrases_are_learned():
    """What follows a word is certain inside a phrase: values that know it come near to Belady, recency does not."""
    once, again = phrases(3000, seed=1), phrases(1500, seed=2)
    lru, belady = (simulate(again, name, 6).hit_rate for name in ("lru", "belady"))
    cold, warm = (simulate(again, name, 6, fit=once).hit_rate for name in ("adaptive", "learned"))
    assert warm > lru + 0.85 * (belady - lru)
    assert lru + 0.6 * (belady - lru) < cold < warm <= belady


def test_a_loop_longer_than_the_cache():
    """Least recently used is always wrong there."""
    loop = made_of(np.arange(3000).reshape(1, -1, 1) % 12, 12)
    adaptive, belady = (simulate(loop, name, 6).hit_rate for name in ("adaptive", "belady"))
    assert simulate(loop, "lru", 6).hit_rate == 0
    assert adaptive > 0.9 * belady


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_least_is_never_beaten(data):
    experts, top_k = data.draw(st.integers(2, 6)), data.draw(st.integers(1, 2))
    tokens, batch = data.draw(st.integers(1, 25)), data.draw(st.integers(1, 3))
    order = st.permutations(range(experts)).map(lambda each: each[:top_k])
    ids = [[data.draw(order) for _ in range(tokens)] for _ in range(2)]
    trace, slots = made_of(ids, experts), data.draw(st.integers(1, experts))
    steps = steps_of(trace, batch)
    least = least_loads(steps, per_layer(2, experts, slots)).sum()
    for name in ("adaptive", "learned"):
        assert simulate(steps, name, slots, fit=trace).loads >= least


def test_same_trace_same_values_and_nothing_is_shared():
    trace = phrases(300, seed=3)
    taught = Learned.fit(trace, slots=12)
    again = Learned.fit(trace, slots=12)
    kept = taught.weights.copy()
    runs = []
    for known in (taught, again, taught):
        state = known.begin(Setting(2, 32, 12))
        runs.append((simulate(trace, state, 6).hits.tolist(), state.value.tobytes()))
    assert runs[0] == runs[1] == runs[2]
    assert (taught.weights == kept).all()
    assert kept.any()


def test_a_step_that_needs_every_expert_teaches_nothing():
    """A prompt of many tokens: what all experts share says nothing about any of them."""
    state = policy("adaptive", Setting(1, 32, 6))
    cache = Cache(per_layer(1, 32, 6), state)
    for t in range(50):
        cache.step(0, [t % 5, 5 + t % 7])
    before = state.tables.copy()
    cache.step(0, np.arange(32))  # still a lesson about the step before
    after = state.tables.copy()
    assert (after != before).any()
    cache.step(0, [1, 2])
    assert (state.tables == after).all()


def test_the_guards_caches_are_caches():
    """Its hits by the foretold values equal, step by step, those of a real cache that goes by them, and keeps what a
    step has just used."""
    trace = generate(layers=1, experts=16, top_k=3, tokens=400, carry=0.8, repeat=0.3)
    state = policy("adaptive", Setting(1, 16, 6, options={"guard": 0}))._replace(frank=False)
    cache, here, hits = Cache(per_layer(1, 16, 6), state), np.zeros(16), 0
    steps = steps_of(trace)
    for n in range(len(steps)):
        ids = steps.of(n)
        hits += cache.step(0, ids).hits
        f._hits(here, state.memory[f.FORETOLD, 0], np.isin(np.arange(16), ids) * 1.0, ids, 6.0)
        assert (here > 0).tolist() == (cache.table.slot_of[0] >= 0).tolist()
    assert hits > 400


def test_the_guard_leaves_false_teaching():
    """Taught that the experts of the step before come at once again, where in truth they never do."""
    rng = np.random.default_rng(5)
    words = np.array([rng.permutation(24)[:2] for _ in range(400)])
    lie = made_of(np.repeat(words, 4, axis=0)[None], 24)
    truth = generate(layers=1, experts=24, top_k=2, tokens=1500, skew=1.2, affinity=0.0, seed=2)
    taught = Learned.fit(lie, slots=6, passes=5)
    rates = [simulate(truth, taught.begin(Setting(1, 24, 6, options={"guard": guard})), 6).hit_rate for guard in (0, 1)]
    assert rates[1] > rates[0]


def test_saved_and_loaded(tmp_path):
    trace = phrases(200, seed=4)
    taught = Learned.fit(trace, slots=12)
    taught.save(tmp_path / "learned.npz")
    back = Learned.load(tmp_path / "learned.npz")
    for name in ("weights", "gain", "often", "recent"):
        assert (getattr(back, name) == getattr(taught, name)).all()
    setting = Setting(2, 32, 12)
    assert (simulate(trace, back.begin(setting), 6).hits == simulate(trace, taught.begin(setting), 6).hits).all()


def _spoiled(kind: str, fields: dict) -> dict:
    changes = {
        "version": {"version": np.int64(9)},
        "missing": {"gain": None},
        "shape": {"weights": fields["weights"][:, 1:]},
        "dtype": {"often": fields["often"].astype(np.float32)},
        "nan": {"recent": np.full_like(fields["recent"], np.nan)},
        "empty": {"often": np.zeros((0, 4))},
    }
    return {name: value for name, value in (fields | changes[kind]).items() if value is not None}


@pytest.mark.parametrize(
    ("kind", "message", "error"),
    [
        ("version", "version of .* must be 1, got 9", ValueError),
        ("missing", "must be at least gain, often", ValueError),
        ("shape", r"weights must be \(2, 288, 32\), got \(2, 287, 32\)", ValueError),
        ("dtype", "often must be float64, got float32", ValueError),
        ("nan", "recent must be finite, got nan", ValueError),
        ("empty", r"often must be \[L, E\] and not empty, got \(0, 4\)", ValueError),
    ],
)
def test_spoiled_files_are_refused(tmp_path, kind, message, error):
    path = tmp_path / "learned.npz"
    Learned.fit(phrases(50, seed=5), slots=12).save(path)
    with np.load(path) as file:
        fields = {name: file[name] for name in file.files}
    np.savez(path, **_spoiled(kind, fields))
    with pytest.raises(error, match=message):
        Learned.load(path)


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError):
        Learned.load(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("text")
    with pytest.raises(ValueError, match=r"must be a whole \.npz file"):
        Learned.load(tmp_path / "text.npz")
    with pytest.raises(FileNotFoundError):
        Learned.fit(phrases(50, seed=5), slots=12).save(tmp_path / "no" / "folder.npz")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: policy("learned", Setting(2, 32, 12)), "learned must be given a trace"),
        (lambda: policy("learned", Setting(3, 32, 12, phrases(20, 1))), r"must have L, E = \(3, 32\), got \(2, 32\)"),
        (lambda: policy("adaptive", Setting(2, 32, 12, options={"gamma": 1.0})), "gamma of adaptive must be 0 .. 1"),
        (lambda: policy("adaptive", Setting(2, 32, 12, options={"horizon": 1})), "options of adaptive must be among"),
        (lambda: policy("adaptive", Setting(2, 32, 0)), "slots of adaptive must be at least 1, got 0"),
        (lambda: Learned.fit(phrases(20, 1), 12, passes=0), "passes must be at least 1, got 0"),
        (
            lambda: Learned.fit(phrases(20, 1), 12).begin(Setting(2, 31, 12)),
            r"must have L, E = \(2, 32\), got \(2, 31\)",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
