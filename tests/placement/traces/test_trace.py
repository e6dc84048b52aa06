"""Routing traces: the file, its errors, and what affinity reads from it."""

import numpy as np
import pytest

from headgate.placement.traces.affinity import affinity, co_activation, expert_load, imbalance, transition_counts
from headgate.placement.traces.trace import Trace, id_type


def make(layers=3, tokens=50, top_k=2, experts=8, seed=0, **more):
    rng = np.random.default_rng(seed)
    ids = rng.random((layers, tokens, experts)).argsort(-1)[..., :top_k].astype(id_type(experts))
    return Trace(ids, experts, **more)


def test_a_saved_trace_comes_back_whole(tmp_path):
    ids = make().expert_ids
    trace = Trace(
        ids,
        8,
        weights=np.full(ids.shape, 0.5, np.float16),
        sequence=np.repeat(np.arange(5, dtype=np.int32), 10),
        layer_names=("a", "b", "c"),
        experts_of_layer=np.array([8, 8, 8], np.int32),
    )
    trace.save(tmp_path / "t.npz")
    back = Trace.load(tmp_path / "t.npz")
    for name in ("expert_ids", "weights", "sequence", "experts_of_layer"):
        np.testing.assert_array_equal(getattr(back, name), getattr(trace, name))
        assert getattr(back, name).dtype == getattr(trace, name).dtype
    assert (back.num_experts, back.layer_names, back.version) == (8, ("a", "b", "c"), 1)
    assert [p.name for p in tmp_path.iterdir()] == ["t.npz"]


def test_a_trace_without_the_optional_fields(tmp_path):
    make().save(tmp_path / "t.npz")
    back = Trace.load(tmp_path / "t.npz")
    assert back.weights is None
    assert back.sequence is None
    assert back.layer_names == ()


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    make().save(tmp_path / "t.npz")
    before = (tmp_path / "t.npz").read_bytes()

    def full(file, **fields):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match="no space"):
        make(seed=1).save(tmp_path / "t.npz")
    assert (tmp_path / "t.npz").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": 0}, "num_experts must be 1 .. 255"),
        ({"num_experts": 256}, "num_experts must be 1 .. 255"),
        ({"num_experts": 4}, "expert_ids must be below num_experts=4"),
        ({"expert_ids": np.zeros((2, 3), np.uint8)}, "must be \\[L, T, K\\]"),
        ({"weights": np.zeros((3, 50, 1), np.float16)}, "weights must be"),
        ({"sequence": np.zeros(49, np.int32)}, "sequence must be"),
        ({"layer_names": ("a",)}, "layer_names must be 3 names"),
        ({"experts_of_layer": np.array([8, 2, 8], np.int32)}, "expert_ids of layer 1"),
    ],
)
def test_fields_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Trace(**{"expert_ids": make().expert_ids, "num_experts": 8, **change})


def test_types_that_do_not_fit_are_refused():
    with pytest.raises(TypeError, match="unsigned"):
        Trace(make().expert_ids.astype(np.int64), 8)
    with pytest.raises(TypeError, match="float16"):
        Trace(make().expert_ids, 8, weights=np.zeros((3, 50, 2)))


def test_broken_files_say_what_is_wrong(tmp_path):
    path = tmp_path / "t.npz"
    with pytest.raises(FileNotFoundError):
        Trace.load(path)
    for content in (b"", b"not a zip file at all"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"t\.npz must be a whole \.npz file"):
            Trace.load(path)
    make().save(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"must be a whole \.npz file"):
        Trace.load(path)
    np.savez(path, expert_ids=np.array([{"a": 1}], dtype=object), num_experts=3)
    with pytest.raises(ValueError, match=r"expert_ids of .* must be numbers or text, got object"):
        Trace.load(path)
    np.savez(path, expert_ids=make().expert_ids)
    with pytest.raises(ValueError, match=r"arrays of .* must be at least expert_ids, num_experts"):
        Trace.load(path)
    np.savez(path, expert_ids=make().expert_ids, num_experts=8, version=2)
    with pytest.raises(ValueError, match=r"version of .* must be 1, got 2"):
        Trace.load(path)
    np.savez(path, expert_ids=make().expert_ids, num_experts=3)
    with pytest.raises(ValueError, match=r"t\.npz must be a trace, got .*below num_experts=3"):
        Trace.load(path)


def test_a_file_with_fields_of_its_own_loads(tmp_path):
    np.savez(tmp_path / "t.npz", expert_ids=make().expert_ids, num_experts=8, domain=np.zeros(50, np.int8))
    assert Trace.load(tmp_path / "t.npz").num_experts == 8


def test_load_and_pairs_against_a_plain_count():
    ids = np.array([[[0, 1], [1, 2], [0, 255]], [[2, 0], [2, 1], [1, 2]]], np.uint8)
    trace = Trace(ids, 3)
    assert expert_load(trace).tolist() == [[2, 2, 1], [1, 2, 3]]
    np.testing.assert_allclose(imbalance(expert_load(trace)), [2 / (5 / 3), 1.5])
    want = np.zeros((3, 3), int)
    for before, after in zip(ids[0], ids[1], strict=True):
        for a in before[before < 3]:
            for b in after:
                want[a, b] += 1
    assert transition_counts(trace, 0).tolist() == want.tolist()
    pairs = co_activation(trace, 0)
    assert np.diag(pairs).tolist() == [2, 2, 1]
    assert (pairs == pairs.T).all()
    assert pairs[0, 1] == 1
    with pytest.raises(IndexError):
        transition_counts(trace, 1)


def test_affinity_of_layers_that_know_each_other_and_of_layers_that_do_not():
    rng = np.random.default_rng(0)
    first = rng.integers(0, 8, (20000, 1))
    follows = (first + 3) % 8
    ids = np.stack([first, follows, rng.integers(0, 8, (20000, 1))]).astype(np.uint8)
    known, unknown = affinity(Trace(ids, 8))
    assert known.predicted == 1.0
    assert known.independent == pytest.approx(1 / 8, abs=0.01)
    assert known.lift == pytest.approx(8, rel=0.1)
    assert unknown.lift == pytest.approx(1, abs=0.05)
    assert affinity(Trace(ids, 8), best=8)[1].predicted == 1.0
    with pytest.raises(ValueError, match="best must be"):
        affinity(Trace(ids, 8), best=0)


def test_nothing_to_count():
    trace = Trace(np.full((2, 0, 2), 255, np.uint8), 4)
    assert expert_load(trace).sum() == 0
    assert imbalance(expert_load(trace)).tolist() == [0, 0]
    assert affinity(trace)[0].lift == 0


@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_refused(odd):
    weights = np.full((3, 50, 2), 0.5, np.float16)
    weights[1, 7, 0] = odd
    with pytest.raises(ValueError, match=r"Trace: weights must be finite, got (nan|inf)"):
        make(weights=weights)
