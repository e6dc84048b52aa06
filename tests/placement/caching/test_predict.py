"""Predictors: planted structure found, regressions against their closed form, live steps against whole traces, chances
that come true, and what must be refused."""

from __future__ import annotations

import numpy as np
import pytest

from headgate.placement.caching.predict import PREDICTORS, fit, foretell, load, recall, reliability
from headgate.placement.caching.predictors.curve import KNOTS, fit_curve, none
from headgate.placement.caching.predictors.fitting import beginnings, held_back, ids_of, means_before, ridge
from headgate.placement.caching.predictors.linear import Linear
from headgate.placement.caching.predictors.ngram import find, hashes
from headgate.placement.traces.generate import generate
from headgate.placement.traces.trace import Trace

BY_EXPERTS = ("popular", "transition", "ridge", "path")


def trace_of(ids, experts=8, **more) -> Trace:
    return Trace(np.asarray(ids, np.uint8), experts, **more)


def choices(rng, tokens, experts=8, k=2):
    return np.array([rng.permutation(experts)[:k] for _ in range(tokens)])


def planted(tokens=400, seed=0) -> Trace:
    """Layers 1 and 2 use what two permutations make of the experts of layer 0."""
    rng = np.random.default_rng(seed)
    ids, follow = [choices(rng, tokens)], np.random.default_rng(9)
    for _ in range(2):
        ids.append(follow.permutation(8)[ids[-1]])
    return trace_of(ids)


def made(tokens=1200, seed=0, layers=4, experts=16, k=3, **more) -> Trace:
    return generate(layers, experts, k, tokens, skew=0.7, affinity=0.9, length=60, seed=seed, **more)


@pytest.fixture(scope="module")
def words() -> tuple[Trace, np.ndarray]:
    """A trace whose experts depend on the last two token ids."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, 6, 600)
    table = np.array([[choices(rng, 1)[0] for _ in range(36)] for _ in range(2)])
    pair = tokens * 6 + np.concatenate([[0], tokens[:-1]])
    return trace_of(table[:, pair]), tokens


# --- what is learned -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["transition", "ridge", "path"])
def test_planted_transitions_are_found_exactly(method):
    predictor, unseen = fit(planted(), method), planted(200, seed=1)
    found = recall(foretell(predictor, unseen), unseen, (2,))[0]
    assert (found[1:] == 1).all()
    assert found[0] < 0.6  # nothing foretells the first layer


def test_two_layers_ahead_skips_the_layer_between():
    rng = np.random.default_rng(0)
    ids = choices(rng, 400)
    trace = trace_of([ids, choices(rng, 400), (ids + 3) % 8])
    far = recall(foretell(fit(trace, horizon=2), trace), trace, (2,))[0]
    near = recall(foretell(fit(trace, reach=1), trace), trace, (2,))[0]
    assert far[2] == 1
    assert near[2] < 0.7  # the layer before tells nothing


def test_the_first_layer_follows_the_last_of_the_token_before():
    trace = planted()
    ids = trace.expert_ids.copy()
    ids[0, 1:] = np.random.default_rng(4).permutation(8)[ids[2, :-1]]
    turned = trace_of(ids, sequence=np.repeat(np.arange(4, dtype=np.int32), 100))
    late = np.arange(400) % 100 > 0
    for method in ("transition", "path"):
        found = foretell(fit(turned, method), turned)
        assert recall(found[:, late], turned.select(late), (2,))[0, 0] == 1
        assert recall(found[:, ~late], turned.select(~late), (2,))[0, 0] < 1


def test_the_last_token_is_found():
    rng = np.random.default_rng(0)
    start, turns = rng.integers(0, 8, 1), np.arange(500)
    jump = rng.permutation(8)
    ids = [start]
    for _ in turns[1:]:
        ids.append(jump[ids[-1]])
    trace = trace_of(np.array(ids)[None])
    found = foretell(fit(trace), trace)
    assert recall(found[:, 1:], trace.select(slice(1, None)), (1,))[0, 0] == 1


def test_words_are_found_and_unknown_words_fall_back(words):
    trace, tokens = words
    predictor = fit(trace, "ngram", tokens=tokens)
    found = recall(foretell(predictor, trace, tokens), trace, (2,))
    assert found.min() > 0.98
    predictor.start()
    predictor.token(99)
    share = np.bincount(trace.expert_ids[1].ravel(), minlength=8) / len(tokens)
    np.testing.assert_allclose(predictor.scores(1), share, atol=1e-6)
    predictor.token(tokens[5])  # a known word after an unknown one: what followed the word alone
    places = np.flatnonzero(tokens == tokens[5])[-64:]
    uses = np.bincount(trace.expert_ids[1, places].ravel(), minlength=8)
    np.testing.assert_allclose(predictor.scores(1), (uses + share) / (len(places) + 1), atol=1e-6)


def test_words_count_only_where_they_are_the_same():
    """Places whose hash is that of other words do not count."""
    tokens = np.array([1, 2, 1, 3, 1, 2])
    key = hashes(np.array([1, 2]), np.zeros(2, np.bool_), 2)[0]
    found = np.zeros(4, np.int64)
    n = find(np.repeat(key, 5), np.arange(1, 6), tokens, np.array([1, 2]), 2, found)
    assert found[:n].tolist() == [5, 1]


def test_words_of_another_sequence_are_not_the_last_words(words):
    trace, tokens = words
    cut = Trace(trace.expert_ids, 8, sequence=np.arange(len(tokens), dtype=np.int32))
    predictor = fit(cut, "ngram", tokens=tokens)
    assert predictor._model._sizes.tolist() == [len(tokens), 0, 0]


# --- against independent computations --------------------------------------------------------------------------------


def by_hand(trace, layer, horizon, reach, rates, penalty):
    """Ridge scores [T, E] of a layer in float64: features one by one, constant by centring, in plain Python. What the
    first token of a sequence cannot know adds nothing."""
    layers, tokens, _ = trace.shape
    experts, ids = trace.num_experts, ids_of(trace)
    hot = np.zeros((layers, tokens, experts))
    for l in range(layers):
        for t in range(tokens):
            hot[l, t, [e for e in ids[l, t] if e >= 0]] = 1
    first, features, unknown = beginnings(trace), [], []
    for source in range(layer - horizon, max(layer - horizon - reach, -5, layer - 5), -1):
        features.append(hot[source] if source >= 0 else np.roll(hot[source], 1, 0) * ~first[:, None])
        unknown.append(np.repeat(first[:, None] if source < 0 else 0 * first[:, None], experts, 1))
    for rate in rates:
        rows = np.zeros((tokens, experts))
        begin = 0
        for t in range(tokens):
            begin = t if first[t] else begin
            for age, past in enumerate(range(t - 1, begin - 1, -1)):
                rows[t] += hot[layer, past] * ((1 - rate) * rate**age if rate < 1 else 1 / (t - begin))
        features.append(rows)
    x, y = np.concatenate(features, 1), hot[layer]
    centred = x - x.mean(0)
    known = 1 - np.pad(np.concatenate(unknown, 1), ((0, 0), (0, len(rates) * experts)))
    weights = np.linalg.solve(centred.T @ centred + penalty * np.eye(x.shape[1]), centred.T @ (y - y.mean(0)))
    return (known * centred) @ weights + y.mean(0)


@pytest.mark.parametrize(("horizon", "reach"), [(1, 3), (1, 1), (2, 2), (1, 9)])
def test_ridge_is_the_closed_form(horizon, reach):
    trace, rates = made(300, drift=0.2), (0.0, 0.6, 1.0)
    none_held = np.zeros(300, np.bool_)
    _, full = ridge(trace, none_held, horizon, reach, rates, (5.0,))
    found = Linear(full, none(np.full(4, 16, np.int32))).walk(ids_of(trace), beginnings(trace), None)
    for layer in range(4):
        np.testing.assert_allclose(found[layer], by_hand(trace, layer, horizon, reach, rates, 5.0), atol=2e-4)


def test_the_penalty_is_the_best_on_tokens_held_back():
    trace, held = made(400), np.arange(400) % 4 == 3
    penalties = (0.5, 10.0, 3000.0)
    errors = []
    for penalty in penalties:
        part, _ = ridge(trace, held, 1, 2, (0.5,), (penalty,))
        errors.append(_error(part, trace, held))
    part, _ = ridge(trace, held, 1, 2, (0.5,), penalties)
    np.testing.assert_allclose(_error(part, trace, held), np.min(errors, 0), rtol=1e-4)
    assert set(np.argmin(errors, 0)) == {1, 2}  # layers differ


def _error(tables, trace, held) -> np.ndarray:
    """[L] squares left on the tokens held back; their means begin anew where parts change, as in `ridge`."""
    ids = ids_of(trace)
    change = np.concatenate([[True], held[1:] != held[:-1]])
    found = Linear(tables, none(np.full(len(ids), trace.num_experts, np.int32))).walk(
        ids, beginnings(trace) | change, None
    )
    used = np.zeros_like(found)
    for layer in range(len(ids)):
        np.put_along_axis(used[layer], ids[layer], 1, 1)
    return ((found - used)[:, held] ** 2).sum((1, 2))


def test_recall_and_reliability_count_as_plain_python_does():
    trace = made(50)
    scores = np.random.default_rng(0).random((4, 50, 16)).round(1).astype(np.float32)  # with ties
    for m in (1, 3, 16):
        for layer in range(4):
            right = 0
            for t in range(50):
                best = sorted(range(16), key=lambda e: (-scores[layer, t, e], e))[:m]
                right += len(set(best) & set(trace.expert_ids[layer, t].tolist()))
            assert recall(scores, trace, (m,))[0, layer] == pytest.approx(right / 150)
    table = reliability(scores, trace, bins=4)
    assert table[:, 0].sum() == scores.size
    pairs = [
        (scores[l, t, e], e in trace.expert_ids[l, t]) for l in range(4) for t in range(50) for e in range(16)
    ]  # fmt: skip
    for b in range(4):
        held = [(s, u) for s, u in pairs if min(int(s * 4), 3) == b]
        np.testing.assert_allclose(table[b, 1:], np.mean(held, 0), atol=1e-5)


def test_a_curve_rises_and_keeps_the_mean():
    rng = np.random.default_rng(0)
    scores = rng.random(200_000).astype(np.float32)
    used = rng.random(200_000) < scores**2
    knots, chance = fit_curve(scores, used)
    assert len(knots) == len(chance) == KNOTS
    assert (np.diff(knots) >= 0).all()
    assert (np.diff(chance) >= 0).all()
    assert abs(np.interp(0.7, knots, chance) - 0.49) < 0.02
    never = fit_curve(scores, np.zeros(200_000, np.bool_))
    assert (never[1] == 0).all()
    alike = fit_curve(np.full(10, 0.5, np.float32), np.arange(10) < 3)
    assert alike[1] == pytest.approx(np.full(KNOTS, 0.3))


# --- live ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", BY_EXPERTS)
@pytest.mark.parametrize("horizon", [1, 2])
def test_step_by_step_has_the_bits_of_the_whole_trace(method, horizon):
    trace = made(200)
    predictor = fit(made(300, seed=1), method, horizon=horizon)
    whole, first = foretell(predictor, trace), beginnings(trace)
    for t in range(200):
        if first[t]:
            predictor.start()
        for layer in range(4):
            assert np.array_equal(predictor.scores(layer), whole[layer, t])
            predictor.observe(layer, trace.expert_ids[layer, t])


def test_words_step_by_step(words):
    trace, tokens = words
    predictor = fit(trace.select(slice(0, 300)), "ngram", tokens=tokens[:300])
    whole = foretell(predictor, trace, tokens)
    predictor.start()
    for t in range(300, 340):
        predictor.start()
        for at in range(t - 2, t + 1):
            predictor.token(int(tokens[at]))
        assert np.array_equal(predictor.scores(1), whole[1, t])


def test_a_pass_of_many_tokens_tells_their_mean():
    predictor = fit(made(600), "ridge")
    predictor._model.curve = none(np.full(4, 16, np.int32))
    some = made(3, seed=5).expert_ids.astype(np.int64)
    each = []
    for t in range(3):
        predictor.start()
        predictor.observe(0, some[0, t])
        each.append(predictor.scores(1))
    predictor.start()
    predictor.observe(0, some[0])
    np.testing.assert_allclose(predictor.scores(1), np.mean(each, 0), atol=1e-5)
    predictor.observe(1, some[1])  # past tokens count one after the other
    means = means_before(
        np.concatenate([some[1], some[1][:1]]).astype(np.int32), np.zeros(4, np.bool_), np.array([0.8]), 16
    )
    np.testing.assert_allclose(predictor._model._memory.means[1], means[3], atol=1e-6)


def test_layers_of_the_last_pass_tell_nothing_of_the_next():
    predictor = fit(planted(), "path", reach=1)
    told = []
    for ids in ([1, 2], [5, 6]):
        predictor.start()
        predictor.observe(0, ids)
        before = predictor.scores(1)
        predictor.observe(1, [3, 4])
        predictor.observe(2, [0, 1])
        told.append((before, predictor.scores(1), predictor.scores(0)))
    assert not np.array_equal(told[0][0], told[1][0])  # layer 1 of this pass
    assert np.array_equal(told[0][1], told[1][1])  # layer 1 of the next: layer 0 of this one is over
    predictor.start()
    blank = predictor.scores(2)
    predictor.observe(0, [1, 2])  # one layer before is not the one before
    assert np.array_equal(predictor.scores(2), blank)
    assert not np.array_equal(predictor.scores(1), fit(planted(), "popular").scores(1))


def test_twins_share_what_was_learned_and_nothing_else():
    predictor = fit(planted(), "path")
    other = predictor.twin()
    blank = other.scores(1).copy()
    predictor.observe(0, [1, 2])
    assert np.array_equal(other.scores(1), blank)
    assert other._model.tables.path is predictor._model.tables.path


# --- chances ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", BY_EXPERTS)
def test_chances_come_true_on_tokens_not_seen(method):
    trace = made(6000, layers=3)
    predictor = fit(trace.select(slice(0, 3000)), method)
    unseen = trace.select(slice(3000, None))
    table = reliability(foretell(predictor, unseen), unseen)
    held = table[:, 0] > 300
    assert held.sum() >= 3
    assert np.abs(table[held, 1] - table[held, 2]).max() < 0.06


def test_more_is_known_more_is_recalled():
    trace = made(4000, experts=32, layers=6, carry=0.5, repeat=0.4)
    fitted, unseen = trace.select(slice(0, 3000)), trace.select(slice(3000, None))
    found = [recall(foretell(fit(fitted, m), unseen), unseen, (3,))[0, 1:].mean() for m in BY_EXPERTS]
    assert found[0] + 0.1 < found[1], found
    assert found[1] + 0.03 < found[2] < found[3], found


# --- odd traces ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", BY_EXPERTS)
def test_choices_left_out_and_layers_of_other_sizes(method):
    trace = made(400)
    ids = trace.expert_ids.copy()
    ids[1] %= 5
    ids[1][ids[1] == np.roll(ids[1], 1, 1)] = 255  # repeated: fewer choices
    ids[2, ::3, 1:] = 255
    ids[3, ::7] = 255
    odd = Trace(ids, 16, sequence=trace.sequence, experts_of_layer=np.array([16, 5, 16, 16], np.int32))
    scores = foretell(fit(odd, method), odd)
    assert np.isfinite(scores).all()
    assert (scores[1, :, 5:] == 0).all()
    assert (scores >= 0).all()
    assert (scores <= 1).all()


@pytest.mark.parametrize("method", BY_EXPERTS)
def test_sequences_of_one_token_and_few_tokens(method):
    ids = made(24).expert_ids
    alone = Trace(ids, 16, sequence=np.arange(24, dtype=np.int32))
    for trace in (alone, Trace(ids[:, :2], 16), Trace(ids[:1], 16)):
        scores = foretell(fit(trace, method), trace)
        assert np.isfinite(scores).all()
    means = means_before(ids_of(alone)[0], beginnings(alone), np.array([0.5, 1.0]), 16)
    assert not means.any()


def test_held_back_are_whole_sequences():
    trace = made(660)
    held = held_back(trace)
    assert np.unique(trace.sequence[held]).tolist() == [4, 9]
    assert not np.isin(trace.sequence[~held], [4, 9]).any()
    assert held_back(Trace(trace.expert_ids, 16)).nonzero()[0].tolist() == list(range(528, 660))


@pytest.mark.parametrize("method", BY_EXPERTS)
def test_same_trace_same_predictor_and_the_file_keeps_it(method, tmp_path):
    trace = made(300)
    one, two = fit(trace, method), fit(trace, method)
    one.save(tmp_path / "p.npz")
    scores = foretell(one, trace)
    assert np.array_equal(scores, foretell(two, trace))
    again = load(tmp_path / "p.npz")
    assert np.array_equal(scores, foretell(again, trace))
    assert (again.shape, again.horizon, again.bytes) == (one.shape, one.horizon, one.bytes)


def test_the_file_keeps_words(words, tmp_path):
    trace, tokens = words
    predictor = fit(trace, "ngram", tokens=tokens)
    predictor.save(tmp_path / "p.npz")
    again = load(tmp_path / "p.npz")
    assert np.array_equal(foretell(predictor, trace, tokens), foretell(again, trace, tokens))


# --- what is refused -------------------------------------------------------------------------------------------------


def test_bad_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "no.npz")
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    fit(planted(), "popular").save(tmp_path / "cut.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:-200])
    for name, says in (("text", "a whole .npz file"), ("other", "at least chance"), ("cut", "a whole .npz file")):
        with pytest.raises(ValueError, match=f"{name}.npz must be {says}"):
            load(tmp_path / f"{name}.npz")


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"method": "magic"}, ValueError, "method must be one of popular, "),
        ({"method": "gate"}, ValueError, "only a live model"),
        ({"horizon": 0}, ValueError, "horizon must be 1 .. 3"),
        ({"horizon": 4}, ValueError, "horizon must be 1 .. 3"),
        ({"reach": 0}, ValueError, "reach must be at least 1"),
        ({"method": "ngram"}, ValueError, "tokens must be the token ids"),
        ({"method": "ngram", "tokens": np.zeros(3, np.int64)}, ValueError, "tokens must be .T=400."),
        ({"method": "ngram", "tokens": np.zeros(400)}, TypeError, "tokens must be integers"),
    ],
)
def test_bad_options_are_refused(options, error, says):
    with pytest.raises(error, match=says):
        fit(planted(), **options)


def test_bad_steps_are_refused():
    predictor = fit(planted(), "popular")
    with pytest.raises(ValueError, match=r"layer must be 0 .. 2, got 3"):
        predictor.scores(3)
    with pytest.raises(ValueError, match=r"layer must be 0 .. 2, got -1"):
        predictor.observe(-1, [0])
    with pytest.raises(TypeError, match=r"ids must be integers"):
        predictor.observe(0, [0.5])
    with pytest.raises(ValueError, match=r"ids must be .K. or .T, K."):
        predictor.observe(0, np.zeros((1, 1, 1), int))
    with pytest.raises(ValueError, match=r"trace must have .L, E. = "):
        foretell(predictor, made(10))
    with pytest.raises(ValueError, match=r"scores must be .L, T, E. = "):
        recall(np.zeros((3, 400, 7)), planted())
    with pytest.raises(ValueError, match=r"fetched must be 1 .. 8"):
        recall(np.zeros((3, 400, 8)), planted(), (9,))
    with pytest.raises(ValueError, match="at least 2 tokens"):
        fit(planted(1))


def test_every_name_is_tested():
    assert set(PREDICTORS) == {*BY_EXPERTS, "ngram", "gate"}
