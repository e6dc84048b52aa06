"""Placements and topologies: what they must be, their file, and their errors."""

from __future__ import annotations

import fcntl
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from placement_cases import random_case

from headgate.placement.cluster.links import H800_CX7, Link, Links
from headgate.placement.cluster.topology import Topology, Workload
from headgate.placement.files import write_whole
from headgate.placement.placement import Placement

TWO = Topology(nodes=1, gpus_per_node=2)
ON_TWO = '"topology": {"nodes": 1, "gpus_per_node": 2}'


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), nodes=st.integers(1, 3), per_node=st.integers(1, 3), spare=st.integers(0, 3))
def test_a_saved_placement_comes_back_whole(seed, nodes, per_node, spare, tmp_path_factory):
    _, placement = random_case(seed, 2, 3, nodes, per_node, spare, 2)
    path = tmp_path_factory.mktemp("p") / "placement.json"
    cost, bound = {"cross_gpu_share": 0.25}, {"score": 1.5, "gap": None}
    full = Placement(
        placement.expert_of_slot,
        placement.num_experts,
        placement.topology,
        placement.slots_of_gpu,
        cost,
        bound,
        {"x": 1},
    )
    full.save(path)
    back = Placement.load(path)
    np.testing.assert_array_equal(back.expert_of_slot, full.expert_of_slot)
    np.testing.assert_array_equal(back.slots_of_gpu, full.slots_of_gpu)
    assert (back.topology, back.num_experts) == (full.topology, full.num_experts)
    assert (back.cost, back.bound, back.method) == (cost, bound, {"x": 1})
    assert [p.name for p in path.parent.iterdir()] == ["placement.json"]


def test_the_file_is_the_promised_one(tmp_path):
    Placement(np.array([[0, 2, 1, 0]]), 3, TWO).save(tmp_path / "p.json")
    found = json.loads((tmp_path / "p.json").read_text())
    assert {"version", "num_experts", "topology", "layers", "cost", "bound"} <= found.keys()
    assert (found["version"], found["num_experts"]) == (1, 3)
    assert found["layers"] == [{"expert_of_slot": [0, 2, 1, 0]}]


def test_a_placement_file_by_somebody_else(tmp_path):
    """Only what api.md promises."""
    text = f'{{"version": 1, "num_experts": 2, {ON_TWO}, "layers": [{{"expert_of_slot": [1, 0]}}]}}'
    (tmp_path / "p.json").write_text(text)
    assert Placement.load(tmp_path / "p.json").gpus_of(0, 1) == [0]


def test_an_older_file_survives_a_failed_save(tmp_path):
    path = tmp_path / "p.json"
    path.write_text("old")
    broken = Placement(np.array([[0, 1]]), 2, TWO, cost={"seconds": float("nan")})
    with pytest.raises(ValueError, match="JSON"):
        broken.save(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_names_the_file(tmp_path):
    def full(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device: '.*p\.json'"):
        write_whole(tmp_path / "p.json", full)
    assert not list(tmp_path.iterdir())


def test_temporaries_of_killed_writers_go_and_those_of_living_ones_stay(tmp_path):
    stale, held_by_another = ".p.json-0123abcd.headgate", ".p.json-00000000.headgate"
    for name in (stale, held_by_another, ".p.json-mine", ".other.json-0123abcd.headgate", ".p.json-20261201"):
        (tmp_path / name).touch()
    before = {p.name for p in tmp_path.iterdir()}

    def twice(file):
        """While one writes, another writes the same."""
        writing = {p.name for p in tmp_path.iterdir()} - before
        write_whole(tmp_path / "p.json", lambda other: other.write(b"other"))
        assert writing < {p.name for p in tmp_path.iterdir()}
        file.write(b"one")

    with open(tmp_path / held_by_another, "rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        write_whole(tmp_path / "p.json", twice)
    assert {p.name for p in tmp_path.iterdir()} == {*before, "p.json"} - {stale}
    assert (tmp_path / "p.json").read_bytes() == b"one"


def test_a_temporary_that_is_taken_for_stale_at_birth_is_made_again(tmp_path, monkeypatch):
    lock, names = fcntl.flock, []

    def slow(file, how):
        """Between a file's birth and its lock another process comes by."""
        if not names:
            names.extend(p.name for p in tmp_path.iterdir())
            (tmp_path / names[0]).unlink()
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", slow)
    write_whole(tmp_path / "p.json", lambda file: file.write(b"whole"))
    assert len(names) == 1
    assert (tmp_path / "p.json").read_bytes() == b"whole"


def test_replicas_are_counted_and_found():
    placement = Placement(np.array([[0, 1, 2, 0]]), 3, TWO)
    assert placement.replicas.tolist() == [[2, 1, 1]]
    assert placement.gpus_of(0, 0) == [0, 1]
    assert placement.gpu_of_slot.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("slots", "experts", "of_gpu", "says"),
    [
        ([[0, 1, 1, 0]], 3, None, "every expert must have a slot in layer 0, got none for 2"),
        ([[0, 1], [1, 1]], 2, None, "every expert must have a slot in layer 1, got none for 0"),
        ([[0, 0, 1, 1]], 2, None, "replicas must be on distinct GPUs, got expert 0 of layer 0 2 times on GPU 0"),
        ([[0, 2]], 2, None, r"experts of layer 0 must be in 0 \.\. 1, got 2"),
        ([[0, -1]], 2, None, r"experts of layer 0 must be in 0 \.\. 1, got -1"),
        ([[0, 1, 2]], 3, None, "slots_of_gpu must be given where 3 slots are no multiple of 2 GPUs"),
        ([[0, 1, 2]], 3, [2, 2], r"slots_of_gpu must be whole numbers with the sum S=3, got \[2, 2\]"),
        ([[0, 1, 2]], 3, [3, 0, 0], r"slots_of_gpu must be \[G=2\]"),
        ([[0, 1]], 0, None, "num_experts must be at least 1, got 0"),
        ([0, 1], 2, None, r"expert_of_slot must be \[L, S\], got \(2,\)"),
    ],
)
def test_what_is_no_placement_is_refused(slots, experts, of_gpu, says):
    with pytest.raises(ValueError, match=f"Placement: {says}"):
        Placement(np.array(slots), experts, TWO, None if of_gpu is None else np.array(of_gpu))


def test_fractions_are_no_slots():
    with pytest.raises(TypeError, match="expert_of_slot must be integers, got float64"):
        Placement(np.array([[0.0, 1.0]]), 2, TWO)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "must be a saved placement"),
        ("[]", "content of .* must be an object with version"),
        ('{"version": 2}', "version of .* must be 1, got 2"),
        ('{"version": 1}', "must be an object with layers, num_experts, topology, version"),
        (
            '{"version": 1, "layers": [{"expert_of_slot": [0]}, {"expert_of_slot": [0, 1]}], '
            f'"num_experts": 1, {ON_TWO}}}',
            "equally many slots",
        ),
        (
            '{"version": 1, "layers": [{"expert_of_slot": [0]}], "num_experts": 1}',
            "must be an object with layers, num_experts, topology",
        ),
        (
            '{"version": 1, "layers": [{"expert_of_slot": [0]}], "num_experts": 1, "topology": {"racks": 1}}',
            "Topology: fields must be as they were saved",
        ),
        (
            f'{{"version": 1, "layers": [{{"expert_of_slot": ["a"]}}], "num_experts": 1, {ON_TWO}}}',
            "expert_of_slot of .* must be whole numbers",
        ),
    ],
)
def test_a_file_that_is_no_placement_is_named(text, says, tmp_path):
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(ValueError, match=says):
        Placement.load(tmp_path / "p.json")


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        Placement.load(tmp_path / "p.json")


def test_slots_are_shared_out():
    assert TWO.slots_of_gpu(5).tolist() == [3, 2]
    assert TWO.slots_of_gpu(5, 4).tolist() == [4, 4]
    assert Topology(1, 2, slots=(1, 4)).slots_of_gpu(5).tolist() == [1, 4]
    assert Topology(1, 2, speed=(1, 3)).speed_of_gpu.tolist() == [0.5, 1.5]
    assert Topology.preset("h800-cx7", 2, 8).links == H800_CX7.dispatch


@pytest.mark.parametrize(
    ("topology", "experts", "per_gpu", "says"),
    [
        (TWO, 5, 2, "slots must be at least as many as experts, 5, got 4"),
        (TWO, 3, 4, "a GPU's slots must be at most the experts, 3"),
        (TWO, 3, 0, "slots_per_gpu must be an integer of at least 1, got 0"),
        (TWO, 1, None, "slots_per_gpu must be given for fewer experts than GPUs, 1 on 2"),
        (Topology(1, 2, slots=(2, 2)), 4, 3, "slots_per_gpu must be left out where slots are given, got 3"),
    ],
)
def test_slots_that_will_not_do(topology, experts, per_gpu, says):
    with pytest.raises(ValueError, match=f"Topology: {says}"):
        topology.slots_of_gpu(experts, per_gpu)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"nodes": 0}, "nodes must be at least 1, got 0"),
        ({"nodes": 1.5}, "nodes must be an integer, got 1.5"),
        ({"gpus_per_node": True}, "gpus_per_node must be an integer, got True"),
        ({"slots": (1,)}, "slots must have one value for each of 2 GPUs, got 1"),
        ({"slots": (1, 0)}, "slots must be whole numbers of at least 1, got 0"),
        ({"speed": (1, float("nan"))}, "speed must be finite and above 0, got nan"),
        ({"speed": (1, 0)}, "speed must be finite and above 0, got 0"),
    ],
)
def test_a_topology_that_is_none(fields, says):
    with pytest.raises((ValueError, TypeError), match=f"Topology: {says}"):
        Topology(**{"nodes": 1, "gpus_per_node": 2, **fields})


def test_an_unknown_preset_names_the_known():
    with pytest.raises(ValueError, match="machine must be one of h800-cx7, got 'abacus'"):
        Topology.preset("abacus", 1, 1)


def test_a_topology_comes_back_from_json():
    topology = Topology(2, 2, Links(Link(1, 2), Link(3, 4)), slots=(1, 2, 3, 4), speed=(1, 2, 1, 2))
    assert Topology.from_json(json.loads(json.dumps(topology.to_json()))) == topology


def test_workload():
    assert Workload.of(4096, 1024, tflops=100).pair_us == pytest.approx(6 * 4096 * 1024 / 100e12 * 1e6)
    with pytest.raises(ValueError, match="Workload: tokens_per_gpu must be finite and above 0, got 0"):
        Workload(tokens_per_gpu=0)
