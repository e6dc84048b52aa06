"""Trace files as streams: what they give is what a Trace holds, in bounded memory, or an error that says where."""

import io
import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headgate.placement.place import open_source
from headgate.placement.traces.file import TraceFile, TraceWriter
from headgate.placement.traces.statistics import statistics
from headgate.placement.traces.trace import Trace, id_type


def random_trace(layers=3, tokens=50, top_k=2, experts=8, seed=0, **more):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, experts, (layers, tokens, top_k)).astype(id_type(experts))
    ids[rng.random(ids.shape) < 0.1] = np.iinfo(ids.dtype).max
    return Trace(ids, experts, **more)


def whole(file, layer, **more):
    return np.concatenate([*file.chunks(layer, **more), np.empty((0, file.shape[2]), np.uint8)])


def read_all(path):
    with TraceFile(path) as file:
        for layer in range(file.shape[0] - 1):
            for _ in file.pairs(layer, 7):
                pass
        for layer in range(file.shape[0]):
            for _ in file.chunks(layer, 7):
                pass
        return file.sequence


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    layers=st.integers(1, 5),
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    top_k=st.integers(1, 4),
    experts=st.sampled_from([1, 5, 255, 256, 70000]),
    extras=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
    step=st.integers(1, 64),
)
def test_what_is_written_in_chunks_comes_back(tmp_path_factory, seed, layers, sizes, top_k, experts, extras, step):
    rng, path = np.random.default_rng(seed), tmp_path_factory.mktemp("t") / "t.npz"
    weighted, in_sequences, named, uneven = extras
    tokens = sum(sizes)
    trace = random_trace(layers, tokens, top_k, experts, seed)
    more = {}
    if named:
        more["layer_names"] = tuple(f"layer {i} é" for i in range(layers))
    if uneven:
        more["experts_of_layer"] = np.full(layers, experts, np.int32)
    trace = Trace(
        trace.expert_ids,
        experts,
        weights=rng.random(trace.expert_ids.shape).astype(np.float16) if weighted else None,
        sequence=np.sort(rng.integers(0, 5, tokens)).astype(np.int32) if in_sequences else None,
        **more,
    )
    with TraceWriter(path, experts, layers, top_k, weights=weighted, **more) as writer:
        at = 0
        for size in sizes:
            part = slice(at, at + size)
            writer.append(
                trace.expert_ids[:, part],
                trace.weights[:, part] if weighted else None,
                trace.sequence[part] if in_sequences else None,
            )
            at += size
    for file in (path, path.with_name("saved.npz")):
        if file != path:
            trace.save(file)
        back = Trace.load(file)
        with TraceFile(file) as stream:
            assert stream.shape == back.shape == trace.shape
            assert (stream.num_experts, stream.layer_names) == (trace.num_experts, trace.layer_names)
            for name in ("expert_ids", "weights", "sequence", "experts_of_layer"):
                np.testing.assert_array_equal(getattr(back, name), getattr(trace, name))
            np.testing.assert_array_equal(stream.sequence, trace.sequence)
            for layer in range(layers):
                np.testing.assert_array_equal(whole(stream, layer, tokens=step), trace.expert_ids[layer])
            np.testing.assert_array_equal(stream.trace().expert_ids, trace.expert_ids)
    assert sorted(p.name for p in path.parent.iterdir()) == ["saved.npz", "t.npz"]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_layers_in_any_order_and_two_readers_at_once(tmp_path, save):
    trace = random_trace(layers=4, tokens=1000)
    save(tmp_path / "t.npz", expert_ids=trace.expert_ids, num_experts=8)
    with TraceFile(tmp_path / "t.npz") as file:
        for layer in (2, 0, 3, 3, 1):
            np.testing.assert_array_equal(whole(file, layer, tokens=300), trace.expert_ids[layer])
        for (before, after), third in zip(file.pairs(0, 90), file.chunks(3, 90), strict=True):
            assert len(before) == len(after) == len(third) <= 90
        both = [np.concatenate(side) for side in zip(*file.pairs(1, 77), strict=True)]
        np.testing.assert_array_equal(both, trace.expert_ids[1:3])
        with pytest.raises(IndexError, match=r"layer must be 0 \.\. 3, got 4"):
            next(file.chunks(4))
        with pytest.raises(IndexError, match="got 4"):
            list(file.pairs(3))
        with pytest.raises(ValueError, match="tokens must be at least 1, got 0"):
            next(file.chunks(0, 0))


def test_a_file_cut_off_or_damaged_anywhere_is_refused(tmp_path):
    path = tmp_path / "t.npz"
    random_trace(tokens=2000, sequence=np.zeros(2000, np.int32)).save(path)
    good = path.read_bytes()
    read_all(path)
    for length in [0, 1, 30, *range(50, len(good), 97), len(good) - 1]:
        path.write_bytes(good[:length])
        with pytest.raises(ValueError, match=r"t\.npz must be"):
            read_all(path)
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        info = archive.getinfo("expert_ids.npy")
    data = range(info.header_offset + 100, info.header_offset + info.compress_size, 61)
    assert len(data) > 30
    for place in data:
        path.write_bytes(good[:place] + bytes([good[place] ^ 0x10]) + good[place + 1 :])
        with pytest.raises(ValueError, match=r"expert_ids.* of .*t\.npz must be"):
            read_all(path)
        with pytest.raises(ValueError, match=r"expert_ids of .*t\.npz must be a whole array"):
            Trace.load(path)


def archive_of(path, **members):
    """A zip with .npy members: an array, or bytes that stand for the whole member."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, value in members.items():
            if not isinstance(value, bytes):
                out = io.BytesIO()
                np.save(out, value)
                value = out.getvalue()
            archive.writestr(f"{name}.npy", value)


def header(shape, descr="|u1", fortran=False):
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": descr, "fortran_order": fortran, "shape": shape})
    return out.getvalue()


GOOD = {"expert_ids": np.zeros((2, 3, 1), np.uint8), "num_experts": np.int64(4)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expert_ids": None}, r"arrays of .* must be at least expert_ids, num_experts, got \['num_experts'\]"),
        ({"num_experts": None}, r"must be at least expert_ids, num_experts"),
        ({"version": np.int64(2)}, "version of .* must be 1, got 2"),
        ({"expert_ids": np.zeros((2, 3, 1), np.int64)}, "expert_ids of .* must be unsigned integers, got int64"),
        ({"expert_ids": np.zeros((2, 3), np.uint8)}, r"expert_ids of .* must be \[L, T, K\], got \(2, 3\)"),
        ({"expert_ids": np.zeros((3, 2, 4), np.uint8).T}, "expert_ids of .* must be in C order"),
        ({"expert_ids": header((4, 10**12, 8)) + b"few"}, r"must be 320{9}\d{3} bytes, as its shape .* says, got \d+$"),
        ({"expert_ids": header((2, 3, 1)) + b"too many bytes"}, "must be 134 bytes, as its shape"),
        ({"expert_ids": header((2, 3, 1), "|O") + b"000000"}, "must be numbers or text"),
        ({"expert_ids": b"nonsense"}, "expert_ids of .* must be an .npy array"),
        ({"num_experts": np.int64(0)}, r"num_experts of .* must be 1 .. 255, got 0"),
        ({"num_experts": np.int64(256)}, r"num_experts of .* must be 1 .. 255, got 256"),
        ({"num_experts": np.float64(4)}, "num_experts of .* must be one whole number"),
        ({"num_experts": header((10**9,), "<i8") + bytes(8 * 10**5)}, "num_experts of .* must be"),
        ({"layer_names": np.array(["a"])}, "layer_names of .* must be 2 names or none, got 1"),
        ({"experts_of_layer": np.array([4, 4, 4], np.int32)}, r"experts_of_layer of .* must be \[L=2\]"),
        ({"experts_of_layer": np.array([4, 5], np.int32)}, r"experts_of_layer of .* must be int32, 1 .. 4"),
        ({"sequence": np.zeros(3, np.int64)}, r"sequence of .* must be int32 \[T=3\], got int64"),
        ({"sequence": np.zeros(4, np.int32)}, r"sequence of .* must be int32 \[T=3\]"),
    ],
)
def test_headers_that_do_not_fit_are_refused_on_opening(tmp_path, change, message):
    archive_of(tmp_path / "t.npz", **{k: v for k, v in (GOOD | change).items() if v is not None})
    with pytest.raises(ValueError, match=message):
        TraceFile(tmp_path / "t.npz")


def test_an_absurd_shape_is_no_crash_of_what_reads_it_whole(tmp_path):
    for shape in ((4, 10**14, 8), (10**9, 10**9, 10**9)):
        archive_of(tmp_path / "t.npz", **(GOOD | {"expert_ids": header(shape) + b"few"}))
        for reads in (Trace.load, TraceFile):
            with pytest.raises(ValueError, match=r"t\.npz must be"):
                reads(tmp_path / "t.npz")


def test_a_member_that_says_it_is_larger_than_it_can_be(tmp_path):
    """The archive's own directory may lie too: more bytes than deflate could ever make of those that are there."""
    path = tmp_path / "t.npz"
    archive_of(path, num_experts=np.int64(4), expert_ids=header((4, 10**8, 8)) + b"abc")
    size = len(header((4, 10**8, 8))) + 4 * 10**8 * 8
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\x01\x02")
    content[entry + 24 : entry + 28] = size.to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"expert_ids.npy of .* must be no more than \d+ stored bytes can hold, got 32"
    ):
        TraceFile(path)


def test_a_directory_of_other_length_than_its_end_says(tmp_path):
    """A damaged name or length there would drop an array in silence."""
    path = tmp_path / "t.npz"
    random_trace().save(path)
    data = bytearray(path.read_bytes())
    at = data.rfind(b"PK\5\6") + 10
    data[at] += 1
    path.write_bytes(data)
    for opened in (TraceFile, Trace.load):
        with pytest.raises(ValueError, match=r"directory of .*t\.npz must be 4 members long, got 3"):
            opened(path)


def test_what_is_no_trace_at_all(tmp_path):
    with pytest.raises(FileNotFoundError):
        TraceFile(tmp_path / "none.npz")
    (tmp_path / "t.npz").write_text("no zip")
    with pytest.raises(ValueError, match=r"t\.npz must be a whole \.npz file"):
        TraceFile(tmp_path / "t.npz")


def test_ids_out_of_range_are_found_where_they_are(tmp_path):
    ids = np.zeros((3, 100, 2), np.uint8)
    ids[1, 63, 1] = 9
    archive_of(tmp_path / "t.npz", expert_ids=ids, num_experts=np.int64(9))
    with TraceFile(tmp_path / "t.npz") as file:
        assert len(whole(file, 0, tokens=10)) == 100
        with pytest.raises(ValueError, match=r"\(layer 1, token 63\) of .* must be below 9, or 255 for none, got 9"):
            whole(file, 1, tokens=10)
        with pytest.raises(ValueError, match="layer 1, token 63"):
            statistics(file)
    archive_of(
        tmp_path / "t.npz", expert_ids=ids, num_experts=np.int64(10), experts_of_layer=np.array([10, 9, 10], np.int32)
    )
    with TraceFile(tmp_path / "t.npz") as file, pytest.raises(ValueError, match=r"layer 1, token 63.* below 9, or 255"):
        statistics(file)


def test_a_writer_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "t.npz"
    path.write_bytes(b"old")
    ids = np.zeros((2, 5, 1), np.uint8)

    def stop():
        with TraceWriter(path, 4, 2, 1) as writer:
            writer.append(ids)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stop()
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(FileNotFoundError):
        TraceWriter(tmp_path / "none" / "t.npz", 4, 2, 1)


def test_chunks_that_do_not_fit_are_refused_and_nothing_of_them_is_written(tmp_path):
    ids = np.zeros((2, 5, 1), np.uint8)
    with TraceWriter(tmp_path / "t.npz", 4, 2, 1) as writer:
        writer.append(ids, sequence=np.zeros(5, np.int32))
        for wrong, more, message in (
            (ids.astype(np.uint16), {}, r"ids must be uint8 \[L=2, t, K=1\], got uint16"),
            (ids[:1], {}, r"\[L=2, t, K=1\], got uint8 \(1, 5, 1\)"),
            (ids, {}, "sequence must be given always or never"),
            (ids, {"sequence": np.zeros(4, np.int32)}, r"sequence must be \[T=5\]"),
            (ids, {"weights": np.zeros((2, 5, 1), np.float16)}, "weights must be given always or never"),
            (ids + 4, {"sequence": np.zeros(5, np.int32)}, "below num_experts=4"),
        ):
            with pytest.raises(ValueError, match=message):
                writer.append(wrong, **more)
    assert Trace.load(tmp_path / "t.npz").shape == (2, 5, 1)
    with pytest.raises(ValueError, match=r"num_experts must be 1 \.\. 255 for uint8, got 0"):
        TraceWriter(tmp_path / "t.npz", 0, 2, 1)


def peak_bytes(run):
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_tokens(tmp_path):
    rng = np.random.default_rng(0)
    block = rng.integers(0, 32, (6, 20_000, 4)).astype(np.uint8)

    def write(path, blocks):
        with TraceWriter(path, 32, 6, 4) as writer:
            for _ in range(blocks):
                writer.append(block, sequence=np.zeros(20_000, np.int32))

    def count(path):
        with TraceFile(path) as file:
            assert statistics(file).load.sum() == np.prod(file.shape)

    few, many = tmp_path / "few.npz", tmp_path / "many.npz"
    write(few, 1)
    count(few)  # everything is compiled and imported
    writing = [peak_bytes(lambda p=p, n=n: write(p, n)) for p, n in ((few, 10), (many, 30))]
    reading = [peak_bytes(lambda p=p: count(p)) for p in (few, many)]
    assert 30 * block.nbytes > 14e6
    assert writing[1] < writing[0] + 1e5
    assert reading[1] < reading[0] + 1e5
    assert max(writing + reading) < 4e6
    assert peak_bytes(lambda: Trace.load(many)) > 14e6


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "<u4", ">u4"])
def test_ids_in_any_order_of_bytes_count_alike(tmp_path, dtype):
    trace = random_trace(experts=300)
    ids = np.where(trace.live, trace.expert_ids.astype(np.uint32), np.iinfo(dtype).max)
    same = [Trace(ids.astype(np.dtype(dtype).newbyteorder("=")), 300) for _ in range(2)]
    same[0].expert_ids.flags.writeable = False
    for one in same:
        want = statistics(one)  # compiled for this machine's order first
    ids = ids.astype(dtype)
    np.savez(tmp_path / "t.npz", expert_ids=ids, num_experts=300)
    ids.flags.writeable = False
    with TraceFile(tmp_path / "t.npz") as file:
        for found in (Trace(ids, 300), Trace.load(tmp_path / "t.npz"), file):
            got = statistics(found)
            np.testing.assert_array_equal(got.load, want.load)
            assert all((a != b).nnz == 0 for a, b in zip(got.transitions, want.transitions, strict=True))


def test_tokens_without_choices(tmp_path):
    Trace(np.zeros((2, 10, 0), np.uint8), 8).save(tmp_path / "t.npz")
    assert Trace.load(tmp_path / "t.npz").shape == (2, 10, 0)
    with TraceFile(tmp_path / "t.npz") as file:
        assert [ids.shape for ids in file.chunks(1)] == [(10, 0)]


def test_a_trace_that_compresses_well_is_loaded_by_who_allows_it(tmp_path):
    shape = (1, 3_000_000, 24)
    Trace(np.zeros(shape, np.uint8), 8).save(tmp_path / "t.npz")
    with TraceFile(tmp_path / "t.npz") as file:
        with pytest.raises(ValueError, match="max_bytes= allows more"):
            file.trace()
        assert file.trace(max_bytes=1 << 28).shape == shape
    assert open_source(tmp_path / "t.npz").shape == shape


def test_a_long_sequence_of_few_bytes_hinders_only_who_asks_for_it(tmp_path):
    tokens = 17_000_000
    with TraceWriter(tmp_path / "t.npz", 4, layers=1, top_k=1) as writer:
        writer.append(np.zeros((1, tokens, 1), np.uint8), sequence=np.zeros(tokens, np.int32))
    with TraceFile(tmp_path / "t.npz") as file:
        assert sum(len(ids) for ids in file.chunks(0)) == tokens
        with pytest.raises(ValueError, match=r"sequence of .*t\.npz must be small enough .*max_bytes= allows more"):
            file.sequence  # noqa: B018
    with TraceFile(tmp_path / "t.npz", max_bytes=1 << 28) as file:
        assert len(file.sequence) == tokens
