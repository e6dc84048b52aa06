"""Statistics: counts against those of a plain walk, streamed and in parts, and what is refused."""

import doctest

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from headgate.placement.traces import statistics as module
from headgate.placement.traces.file import TraceFile
from headgate.placement.traces.statistics import Moving, Statistics, loads_of, statistics
from headgate.placement.traces.trace import Trace, id_type


def random_trace(seed, layers, tokens, top_k, experts, empty=0.1):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, experts, (layers, tokens, top_k)).astype(id_type(experts))
    ids[rng.random(ids.shape) < empty] = np.iinfo(ids.dtype).max
    return Trace(ids, experts, sequence=np.sort(rng.integers(0, 4, tokens)).astype(np.int32))


def equal(a, b):
    np.testing.assert_array_equal(a.load, b.load)
    assert len(a.transitions) == len(b.transitions)
    for x, y in zip(
        (*a.transitions, *(a.co_activation or ())), (*b.transitions, *(b.co_activation or ())), strict=True
    ):
        np.testing.assert_array_equal(x.toarray(), y.toarray())
    assert (a.tokens, a.top_k, a.num_experts) == (b.tokens, b.top_k, b.num_experts)


def test_examples():
    names = {"Trace": Trace, "np": np}
    assert not doctest.run_docstring_examples(Statistics, {**vars(module), **names})
    finder = doctest.DocTestFinder(recurse=False).find(Statistics, globs={**vars(module), **names})
    assert not doctest.DocTestRunner().run(finder[0]).failed


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    layers=st.integers(1, 4),
    tokens=st.integers(0, 30),
    top_k=st.integers(1, 3),
    experts=st.sampled_from([3, 7, 300]),
)
def test_counts_are_those_of_a_walk(seed, layers, tokens, top_k, experts):
    trace = random_trace(seed, layers, tokens, top_k, experts)
    load = np.zeros((layers, experts), int)
    moves, pairs = np.zeros((max(layers - 1, 0), experts, experts), int), np.zeros((layers, experts, experts), int)
    for layer in range(layers):
        for token in range(tokens):
            chosen = [e for e in trace.expert_ids[layer, token].tolist() if e != trace.none]
            for a in chosen:
                load[layer, a] += 1
                for b in chosen:
                    pairs[layer, a, b] += 1
                if layer + 1 < layers:
                    for b in trace.expert_ids[layer + 1, token].tolist():
                        if b != trace.none:
                            moves[layer, a, b] += 1
    found = statistics(trace, co_activation=True)
    np.testing.assert_array_equal(found.load, load)
    assert [m.toarray().tolist() for m in found.transitions] == moves.tolist()
    assert [m.toarray().tolist() for m in found.co_activation] == pairs.tolist()
    assert (found.layers, found.tokens, found.top_k) == (layers, tokens, top_k)
    assert {m.dtype for m in (*found.transitions, *found.co_activation)} <= {np.dtype(np.int64)}
    assert statistics(trace).co_activation is None


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), layers=st.integers(1, 4), cut=st.integers(0, 200))
def test_streamed_and_in_parts_they_are_the_same(tmp_path_factory, seed, layers, cut):
    trace = random_trace(seed, layers, 200, 2, 9)
    path = tmp_path_factory.mktemp("t") / "t.npz"
    trace.save(path)
    expected = statistics(trace, co_activation=True)
    parts = [Trace(trace.expert_ids[:, part], 9) for part in (slice(0, cut), slice(cut, 200))]
    with TraceFile(path) as file:
        small = file.chunks
        file.chunks = lambda layer: small(layer, 33)
        pairs = file.pairs
        file.pairs = lambda layer: pairs(layer, 33)
        equal(statistics(file, co_activation=True), expected)
        labels = np.arange(200) % 3
        np.testing.assert_array_equal(loads_of(file, labels), loads_of(trace, labels))
        swapped = np.frombuffer(labels.astype(">i8").tobytes(), ">i8")
        np.testing.assert_array_equal(loads_of(file, swapped), loads_of(trace, labels))
        np.testing.assert_array_equal(loads_of(file), loads_of(trace))
    equal(statistics(parts, co_activation=True), expected)
    equal(statistics(parts[0], co_activation=True) + statistics(parts[1], co_activation=True), expected)
    assert (statistics(parts[0], co_activation=True) + statistics(parts[1])).co_activation is None


def test_names_and_sizes_come_along():
    ids = np.zeros((2, 3, 1), np.uint8)
    trace = Trace(ids, 4, layer_names=("a", "b"), experts_of_layer=np.array([4, 2], np.int32))
    found = statistics([trace, trace])
    assert found.layer_names == ("a", "b")
    assert found.experts_of_layer.tolist() == [4, 2]
    assert (found + statistics(Trace(ids, 4))).layer_names == ()


@pytest.mark.parametrize("change", [{"experts": 8}, {"top_k": 1}, {"layers": 2}])
def test_different_models_do_not_add_up(change):
    sizes = {"layers": 3, "tokens": 9, "top_k": 2, "experts": 7}
    a, b = (random_trace(0, **s) for s in (sizes, sizes | change))
    with pytest.raises(ValueError, match=r"must be .* in both terms of a sum, got"):
        statistics(a) + statistics(b)
    with pytest.raises(ValueError, match="in both terms of a sum"):
        statistics([a, b])
    with pytest.raises(ValueError, match="an empty list"):
        statistics([])


def make(**change):
    fields = {
        "num_experts": 3,
        "tokens": 4,
        "top_k": 2,
        "load": np.array([[3, 3, 2], [4, 4, 0]]),
        "transitions": (csr_array(np.eye(3, dtype=np.int64)),),
    }
    return Statistics(**(fields | change))


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"load": np.array([[np.nan] * 3] * 2)}, TypeError, "load must be int64, got float64"),
        ({"load": np.array([[3, -1, 2], [4, 4, 0]])}, ValueError, "load must be not negative, got -1"),
        ({"load": np.array([[3, 3], [4, 4]])}, ValueError, r"load must be \[L, E=3\], got \(2, 2\)"),
        ({"load": np.array([[9, 0, 0], [4, 4, 0]])}, ValueError, r"at most tokens \* top_k=8 a layer, got 9"),
        ({"top_k": 4}, ValueError, "top_k must be 1 .. num_experts=3, got 4"),
        ({"tokens": -1}, ValueError, "tokens must be at least 0, got -1"),
        ({"num_experts": 0}, ValueError, "num_experts must be at least 1, got 0"),
        ({"transitions": (csr_array(np.eye(3)),)}, TypeError, r"transitions\[0\] must be int64, got float64"),
        ({"transitions": (csr_array(np.eye(2, dtype=np.int64)),)}, ValueError, r"transitions\[0\] must be \[E, E\]"),
        ({"transitions": (csr_array(-np.eye(3, dtype=np.int64)),)}, ValueError, "must be not negative, got -1"),
        ({"transitions": (csr_array(99 * np.eye(3, dtype=np.int64)),)}, ValueError, "at most tokens .*=16 in all"),
        ({"transitions": (csr_array(np.eye(3, dtype=np.int64)),) * 2}, ValueError, "L - 1=1 matrices, or none, got 2"),
        ({"co_activation": ()}, ValueError, "co_activation must be L=2 matrices, or None, got 0"),
        ({"layer_names": ("a",)}, ValueError, "layer_names must be 2 names or none, got 1"),
    ],
)  # fmt: skip
def test_counts_that_cannot_be_are_refused(change, kind, message):
    make()
    with pytest.raises(kind, match=message):
        make(**change)


def test_loads_alone_are_statistics_too():
    only = make(transitions=())
    assert (only + only).load.tolist() == [[6, 6, 4], [8, 8, 0]]
    with pytest.raises(ValueError, match="transitions must be 1 matrices in both terms of a sum, got 0"):
        make() + only


def test_loads_of_sequences_and_of_any_groups():
    trace = random_trace(1, 2, 60, 2, 5)
    for labels in (None, np.arange(60) % 7):
        found = loads_of(trace, labels)
        groups = np.unique(trace.sequence, return_inverse=True)[1] if labels is None else labels
        for group in range(int(groups.max()) + 1):
            part = Trace(trace.expert_ids[:, groups == group], 5)
            np.testing.assert_array_equal(found[group], statistics(part).load)
    np.testing.assert_array_equal(found.sum(axis=0), statistics(trace).load)
    with pytest.raises(ValueError, match="labels must be given for a trace without sequences"):
        loads_of(Trace(trace.expert_ids, 5))
    with pytest.raises(ValueError, match=r"labels must be \[T=60\], got \(59,\)"):
        loads_of(trace, np.zeros(59, int))
    with pytest.raises(ValueError, match="not negative, got -1"):
        loads_of(trace, np.full(60, -1))
    with pytest.raises(TypeError, match="whole numbers, got float64"):
        loads_of(trace, np.zeros(60))


def test_moving_statistics_weigh_the_past_by_powers_of_decay():
    traces = [random_trace(seed, 3, 40, 2, 6) for seed in range(4)]
    parts = [statistics(t) for t in traces]
    for decay in (0.0, 0.5, 1.0):
        moving = Moving(decay)
        for trace in traces:
            moving.update(trace)
        found, weights = moving.statistics(), [decay ** (3 - i) for i in range(4)]
        load = sum(w * p.load for w, p in zip(weights, parts, strict=True))
        np.testing.assert_array_equal(found.load, (1024 * load).astype(int))
        for layer in range(2):
            moves = sum(w * p.transitions[layer].toarray() for w, p in zip(weights, parts, strict=True))
            np.testing.assert_array_equal(found.transitions[layer].toarray(), (1024 * moves).astype(int))
        assert found.tokens == 1024 * 40 * sum(weights)
        assert moving.updates == 4


def test_what_moving_statistics_refuse():
    for decay in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"decay must be 0 \.\. 1"):
            Moving(decay)
    moving = Moving()
    with pytest.raises(ValueError, match="updates must be at least 1"):
        moving.statistics()
    moving.update(random_trace(0, 3, 40, 2, 6))
    before = moving.statistics().load
    with pytest.raises(ValueError, match="num_experts must be 6 in an update as in those before, got 7"):
        moving.update(random_trace(0, 3, 40, 2, 7))
    np.testing.assert_array_equal(moving.statistics().load, before)
