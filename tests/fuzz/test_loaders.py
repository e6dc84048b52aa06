"""Whatever stands in a file, a loader gives its content or one error: it does not crash, run, hang or fill the machine,
and nothing is lost in silence. Spoiled files by the thousand, in a process that may die (support/fuzz_child.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fuzz_loaders import LOADERS, predictors, trace_files

from headgate.placement.caching import predict
from headgate.placement.careful import SMALL_bytes, opened
from headgate.placement.cluster.topology import Topology
from headgate.placement.formats import import_map
from headgate.placement.placement import Placement
from headgate.placement.traces.readers import read
from headgate.placement.traces.trace import Trace

CHILD = Path(__file__).parents[1] / "support" / "fuzz_child.py"
FEW, MANY = 160, 4000  # files of each loader
STUCK_s = 300  # without an answer, on a machine that does other things too


@pytest.mark.parametrize(
    ("names", "first", "count"),
    [
        pytest.param(list(LOADERS), 0, FEW, id="all"),
        *(pytest.param([name], FEW, MANY, marks=pytest.mark.slow, id=name) for name in LOADERS),
    ],
)
def test_spoiled_files(tmp_path, names, first, count):
    command = [sys.executable, CHILD, tmp_path, str(first), str(count), *names]
    found = subprocess.run(command, capture_output=True, text=True, timeout=STUCK_s + count)
    assert found.returncode == 0, f"{(tmp_path / 'at').read_text()}: {found.stderr[-1000:]}"
    lines = [json.loads(line) for line in found.stdout.splitlines()]
    assert not [line for line in lines if "seed" in line]
    assert [line["loader"] for line in lines] == names
    for line in lines:
        done = sum(line["outcomes"].values())
        assert done == max(10, round(count * LOADERS[line["loader"]].share))
        assert line["outcomes"]["refused"] > done / 4, "hardly anything was spoiled"
    assert not found.stderr


# --- one case of each kind that has been met --------------------------------------------------------------------------


def placement_with(path: Path, **fields: object) -> Path:
    content = {
        "version": 1, "num_experts": 2, "topology": {"nodes": 1, "gpus_per_node": 4},
        "layers": [{"expert_of_slot": [0, 1, 0, 1]}],
    }  # fmt: skip
    path.write_text(json.dumps(content | fields))
    return path


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"slots_of_gpu": [2**62, 2**62, 2**62, 2**62 + 4]}, r"slots_of_gpu of .*p\.json must be in 0 \.\. 4"),
        ({"num_experts": 2 * 10**8}, "num_experts of .* must be at most S=4, got 200000000"),
        ({"num_experts": 2.0}, "num_experts of .* must be a whole number"),
        ({"num_experts": True}, "num_experts of .* must be a whole number"),
        ({"cost": "abc"}, "cost of .* must be an object, got abc"),
        ({"bound": {"copies": float("nan")}}, "must be without NaN and Inf in bound"),
        ({"slots_of_gpv": [1, 1, 1, 1]}, "content of .* must be an object of .* only, got .'slots_of_gpv'"),
    ],
)
def test_placements_that_lie(tmp_path, fields, says):
    with pytest.raises(ValueError, match=says):
        Placement.load(placement_with(tmp_path / "p.json", **fields))


def test_sums_that_wrap_are_no_sums():
    """By hand too, where no file is: numpy would add these to 4."""
    slots = np.array([2**62, 2**62, 2**62, 2**62 + 4])
    with pytest.raises(ValueError, match="slots_of_gpu must be whole numbers with the sum S=4"):
        Placement(np.array([[0, 1, 0, 1]]), 2, Topology(1, 4), slots)


@pytest.mark.parametrize(
    ("method", "change"),
    [
        ("ngram", {"ids": lambda a: a + 10**8}),
        ("ngram", {"places": lambda a: a + 10**10}),
        ("ngram", {"places": lambda a: a * 0}),
        ("ridge", {"first": lambda a: a * 10**9}),
        ("ridge", {"first": lambda a: a[::-1]}),
        ("ridge", {"horizon": lambda a: np.int64(10**9)}),
        ("ridge", {"past": lambda a: a[:, :, :2]}),
        ("ridge", {"experts": lambda a: a + 100}),
        ("ridge", {"bias": lambda a: a.astype(np.float64)}),
        ("ridge", {"score": lambda a: a * np.nan}),
    ],
)
def test_predictors_that_would_read_out_of_bounds(tmp_path, method, change):
    path = {p.stem: p for p in predictors(tmp_path)}[method]
    with np.load(path) as file:
        arrays = {name: change.get(name, np.asarray)(file[name]) for name in file.files}
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=rf"{next(iter(change))}.* of .*{method}\.npz must be"):
        predict.load(path)


def test_small_files_that_would_fill_the_machine(tmp_path):
    zeros = np.zeros((1, 10**8, 1), np.uint8)
    np.savez_compressed(tmp_path / "zeros.npz", expert_ids=zeros, num_experts=1)
    assert (tmp_path / "zeros.npz").stat().st_size < 10**6
    with pytest.raises(ValueError, match=r"small enough for .* bytes more .max_bytes= allows more., got 100,000,000"):
        Trace.load(tmp_path / "zeros.npz")
    assert Trace.load(tmp_path / "zeros.npz", max_bytes=2 * 10**8).shape == zeros.shape
    (tmp_path / "m.json").write_text("[[0, 1, 2, 1000000000]]")
    with pytest.raises(ValueError, match=r"num_experts of .* must be at most the S=4 slots"):
        import_map(tmp_path / "m.json", Topology(1, 2))
    (tmp_path / "turns.csv").write_text("".join(f"{layer},1\n" for layer in range(20_000, 0, -1)))
    with pytest.raises(ValueError, match=r"passes that leave out layers of .* must be small enough"):
        read(tmp_path / "turns.csv", top_k=1)
    (tmp_path / "digits.yaml").write_text("initial_global_assignments:\n  0: [" + "1" * 100_000 + "]\n")
    with pytest.raises(ValueError, match=r"digits\.yaml must be"):
        import_map(tmp_path / "digits.yaml", Topology(1, 2))
    (tmp_path / "alias.yaml").write_text("initial_global_assignments:\n  0: &a [0, 1]\n  1: *a\n")
    with pytest.raises(ValueError, match=r"text of .* must be YAML without aliases"):
        import_map(tmp_path / "alias.yaml", Topology(1, 2))


def test_a_row_of_a_million_choices_fills_a_child_only(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    flat = pa.array(np.zeros(4 * SMALL_bytes // 8, np.int16))
    pq.write_table(pa.table({"indices": pa.ListArray.from_arrays([0, len(flat)], flat)}), tmp_path / "layer_01.parquet")
    assert (tmp_path / "layer_01.parquet").stat().st_size < 10_000
    with pytest.raises(ValueError, match=r"layer_01\.parquet of .* must be a whole parquet file, got .*Memory"):
        read(tmp_path)


def test_an_id_that_is_too_large_is_not_no_expert(tmp_path):
    ids = np.zeros((3, 2, 1), np.uint64)
    ids[1, 1] = 2**64 - 1
    np.save(tmp_path / "v.npy", ids)
    with pytest.raises(ValueError, match=r"routed_experts of .*v\.npy must be below 2\*\*63"):
        read(tmp_path / "v.npy")


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.npz")
    for path in (tmp_path / "pipe.npz", tmp_path, Path("/dev/zero")):
        with pytest.raises(ValueError, match=r"must be a regular file, got a (pipe|folder)"):
            Trace.load(path)


def test_a_member_that_nobody_knows_is_a_damaged_name(tmp_path):
    path = trace_files(tmp_path)[0]
    good = path.read_bytes()
    path.write_bytes(good.replace(b"sequence.npy", b"sequenze.npy"))
    with pytest.raises(ValueError, match=r"arrays of .*whole\.npz must be none but .*, got .'sequenze'"):
        Trace.load(path)


def test_errors_are_short_and_name_the_file(tmp_path):
    path = tmp_path / f"{'long' * 50}.json"
    path.write_text(json.dumps({"x" * 5000: list(range(5000))}))
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the length is what is asked for
        Placement.load(path)
    assert len(str(error.value)) <= 300
    assert str(error.value).count("long") > 10


def test_the_disks_faults_are_not_the_files(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    with pytest.raises(OSError, match="Input/output"), opened(tmp_path / "f", "test"):
        raise OSError(5, "Input/output error")
