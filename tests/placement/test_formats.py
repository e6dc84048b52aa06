"""Other systems' placement files: what is written comes back, and says what its readers look for."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from placement_cases import random_slots

from headgate.placement.cluster.topology import Topology
from headgate.placement.formats import EXPORTS, export, import_map, maps
from headgate.placement.placement import Placement

TWO = Topology(1, 2)
SMALL = Placement(np.array([[0, 2, 1, 0], [2, 1, 0, 1]]), 3, TWO)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), spare=st.integers(0, 2), system=st.sampled_from(sorted(EXPORTS)))
def test_what_is_written_comes_back(seed, spare, system, tmp_path_factory):
    slots = np.full(4, 2 + spare)
    topology = Topology(2, 2)
    placement = Placement(random_slots(np.random.default_rng(seed), 3, 8, slots), 8, topology)
    path = tmp_path_factory.mktemp("f") / ("p.yaml" if system == "trtllm" else "p.json")
    export(placement, path, system)
    np.testing.assert_array_equal(import_map(path, topology).expert_of_slot, placement.expert_of_slot)


def test_the_maps_are_inverse_to_each_other():
    found = maps(SMALL)
    assert found["logical_replica_count"].tolist() == [[2, 1, 1], [1, 2, 1]]
    assert found["logical_to_physical_map"].tolist() == [[[0, 3], [2, -1], [1, -1]], [[2, -1], [1, 3], [0, -1]]]


def test_sglang_gets_a_row_for_every_layer_of_the_model(tmp_path):
    export(SMALL, tmp_path / "p.json", "sglang", layers=[1, 3], model_layers=5)
    rows = json.loads((tmp_path / "p.json").read_text())["physical_to_logical_map"]
    assert rows == [[0, 1, 2, 0], [0, 2, 1, 0], [0, 1, 2, 0], [2, 1, 0, 1], [0, 1, 2, 0]]
    back = import_map(tmp_path / "p.json", TWO, layers=[1, 3])
    np.testing.assert_array_equal(back.expert_of_slot, SMALL.expert_of_slot)


def test_trtllm_names_the_layers(tmp_path):
    export(SMALL, tmp_path / "p.yaml", "trtllm", layers=[3, 4])
    assert (tmp_path / "p.yaml").read_text() == (
        "num_slots: 4\nlayer_updates_per_iter: 0\ninitial_global_assignments:\n  3: [0, 2, 1, 0]\n  4: [2, 1, 0, 1]\n"
    )


def test_yaml_over_several_lines(tmp_path):
    text = (
        "num_slots: 4\ninitial_global_assignments:\n  4: [2, 1,\n    0, 1]\n  3: [0, 2,\n   1, 0]\nlayer_updates: 0\n"
    )
    (tmp_path / "p.yaml").write_text(text)
    np.testing.assert_array_equal(import_map(tmp_path / "p.yaml", TWO).expert_of_slot, SMALL.expert_of_slot)


def test_yaml_with_stars_that_are_no_aliases(tmp_path):
    export(SMALL, tmp_path / "p.yaml", "trtllm")
    text = "# 2 * 2 slots\nfiles: '*.json'\n" + (tmp_path / "p.yaml").read_text()
    (tmp_path / "p.yaml").write_text(text)
    np.testing.assert_array_equal(import_map(tmp_path / "p.yaml", TWO).expert_of_slot, SMALL.expert_of_slot)


def test_arrays(tmp_path):
    np.save(tmp_path / "p.npy", SMALL.expert_of_slot)
    beside = {"other": np.zeros(3), "note": np.array([b"x"]), "objects": np.array([{}])}
    np.savez(tmp_path / "p.npz", physical_to_logical_map=SMALL.expert_of_slot, **beside)
    (tmp_path / "p.json").write_text(json.dumps(SMALL.expert_of_slot.tolist()))
    (tmp_path / "marked.json").write_text((tmp_path / "p.json").read_text(), "utf-8-sig")
    for name in ("p.npy", "p.npz", "p.json", "marked.json"):
        np.testing.assert_array_equal(import_map(tmp_path / name, TWO).expert_of_slot, SMALL.expert_of_slot)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("p.json", "{}", "content of .* must be an object with physical_to_logical_map"),
        ("p.json", "{", "must be another system's placement"),
        ("p.json", '{"physical_to_logical_map": [[0, 1], [1]]}', "must be whole numbers"),
        ("p.json", '{"physical_to_logical_map": [[0, 0, 1, 1]]}', "replicas must be on distinct GPUs"),
        ("p.json", '{"physical_to_logical_map": [[0, 1, 2]]}', "no multiple of 2 GPUs"),
        ("p.json", '{"physical_to_logical_map": [[0.5, 1]]}', "must be whole numbers"),
        ("p.yaml", "num_slots: 3\n", "content of .* must be initial_global_assignments"),
        ("p.txt", "", "ending of .* must be .json, .npy"),
        ("p.npz", "PK\x03\x04", "must be a whole .npz file"),
        ("p.json", "[" * 100_000, "must be another system's placement"),
        ("p.npy", "", "must be an .npy array"),
    ],
)
def test_files_that_hold_none(name, text, says, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=says):
        import_map(tmp_path / name, TWO)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"system": "megatron"}, "system must be one of sglang, vllm, trtllm, got 'megatron'"),
        ({"layers": [1]}, r"layers must be 2 rising numbers, got \[1\]"),
        ({"layers": [3, 1]}, "layers must be 2 rising numbers"),
        ({"model_layers": 1}, "model_layers must be above layer 1, got 1"),
    ],
)
def test_what_cannot_be_exported(change, says, tmp_path):
    with pytest.raises(ValueError, match=f"export: {says}"):
        export(SMALL, tmp_path / "p", **{"system": "sglang", **change})
    assert not list(tmp_path.iterdir())


def test_uneven_slots_are_for_nobody_else(tmp_path):
    uneven = Placement(np.array([[0, 1, 2, 0]]), 3, TWO, np.array([3, 1]))
    with pytest.raises(ValueError, match="slots_of_gpu must be alike on every GPU for vllm"):
        export(uneven, tmp_path / "p.json", "vllm")


def test_rows_that_are_not_there(tmp_path):
    export(SMALL, tmp_path / "p.json", "sglang")
    with pytest.raises(ValueError, match=r"layers of .* must be in 0 \.\. 1, got 2"):
        import_map(tmp_path / "p.json", TWO, layers=[2])
    with pytest.raises(FileNotFoundError):
        import_map(tmp_path / "q.json", TWO)
