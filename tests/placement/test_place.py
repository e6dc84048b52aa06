"""`place`: every method gives a valid placement with its cost and a bound; what it promises and what it refuses."""

from __future__ import annotations

import os
import signal
import threading
import time
from functools import partial
from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import headgate
from headgate.placement.bounds import certify, crossing_bound
from headgate.placement.cluster.topology import Topology
from headgate.placement.place import open_source, place, problem_of, sampled
from headgate.placement.placement import Placement
from headgate.placement.problem import Objective
from headgate.placement.search.methods import METHODS
from headgate.placement.traces.file import TraceFile
from headgate.placement.traces.generate import generate
from headgate.placement.traces.scenarios import scenario_loads
from headgate.placement.traces.trace import Trace
from headgate.placement.walk import walk

ONE, TWO = Topology(1, 4), Topology(2, 2)
OBJECTIVES = ("time", "transitions", "copies", "load")
QUICK = {"effort": 0.002, "time_limit": 1.0}


@pytest.fixture(scope="module")
def trace() -> Trace:
    return generate(layers=3, experts=8, top_k=2, tokens=600, seed=1)


@pytest.fixture(params=[40, pytest.param(None, marks=pytest.mark.slow)], ids=["bounded soon", "bounded long"])
def length_of_the_bound(request, monkeypatch) -> None:
    """After so many iterations the dearest bound ends; None: when its time is up, or it gets no better."""
    if request.param is not None:
        monkeypatch.setattr(certify, "crossing_bound", partial(crossing_bound, iterations=request.param))


def rebuilt(source: Trace, topology: Topology, objective, per_gpu=None, **more):
    return problem_of(source, topology, per_gpu, objective, **more)


@pytest.mark.usefixtures("length_of_the_bound")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("topology", "per_gpu"), [(TWO, None), (ONE, 3)], ids=["single", "spare"])
def test_every_method_reports_what_the_walk_counts_and_stays_above_its_bound(
    trace, method, objective, topology, per_gpu
):
    if method == "ilp" and (per_gpu is not None or objective in ("time", "copies")):
        with pytest.raises(ValueError, match="ilp: "):
            place(trace, topology, per_gpu, method, objective=objective, **QUICK)
        return
    found = place(trace, topology, per_gpu, method, objective=objective, **QUICK)
    assert isinstance(found, Placement)  # checked as it was made
    problem = rebuilt(trace, topology, objective, per_gpu)
    cost = problem.walked(found)
    assert found.cost == {**cost.summary(), "score": problem.score(problem.parts(cost, found))}
    assert found.bound["score"] <= found.cost["score"]
    assert 0 <= found.bound["gap"] < 1
    for name, reached in found.bound["reached"].items():
        if name in found.bound:
            assert found.bound[name] <= reached * (1 + 1e-9)
    assert found.method["method"] == method


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_same_seed_same_answer(trace, objective):
    a, b = (place(trace, TWO, 3, objective=objective, effort=0.002, bound=False, seed=5) for _ in range(2))
    np.testing.assert_array_equal(a.expert_of_slot, b.expert_of_slot)
    assert a.cost == b.cost


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**31), load=st.sampled_from([0.0, 0.05, 1.0]))
def test_small_cases_are_proved_and_are_the_best_of_all(seed, load):
    """2 layers of 4 experts on 2 GPUs: all 36 placements, tried out."""
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permuted(np.tile(np.arange(4), (30, 1)), axis=1)[:, :2] for _ in range(2)]).astype(np.uint8)
    source, topology, objective = Trace(ids, 4), Topology(1, 2), Objective(gpu=1, load=load)
    found = place(source, topology, objective=objective, effort=0.001)
    problem = rebuilt(source, topology, objective)
    layouts = [p for p in permutations(range(4)) if p[0] < p[1] and p[2] < p[3]]
    scores = []
    for layers in product(layouts, repeat=2):
        other = Placement(np.array(layers), 4, topology)
        scores.append(problem.score(problem.parts(problem.walked(other), other)))
    assert found.cost["score"] == pytest.approx(min(scores), rel=1e-9)
    assert found.bound["proved"]
    assert found.bound["gap"] == 0


@pytest.mark.parametrize("objective", ["transitions", "copies", "time"])
def test_the_search_is_worth_it(objective):
    """On a trace with affinity it is better than any method that knows load alone."""
    source = generate(layers=4, experts=16, top_k=2, tokens=3000, affinity=0.8, seed=2)
    ours = place(source, TWO, objective=objective, effort=0.05, bound=False)
    for method in ("linear", "eplb", "balance", "random"):
        assert ours.cost["score"] < place(source, TWO, method=method, objective=objective, bound=False).cost["score"]


def test_more_slots_do_not_cost_more(trace):
    single = place(trace, ONE, objective="transitions", effort=0.01, bound=False)
    spare = place(trace, ONE, 3, objective="transitions", effort=0.01, bound=False)
    assert spare.cost["cross_gpu_share"] < single.cost["cross_gpu_share"]


@pytest.mark.parametrize("method", ["auto", "balance", "ilp"])
@pytest.mark.parametrize("per_gpu", [None, 3])
def test_pins_hold(trace, method, per_gpu):
    if method == "ilp" and per_gpu:
        return
    pins = [(0, 3, 2), (1, 0, 0), (2, 7, 3)]
    found = place(trace, TWO, per_gpu, method, objective="transitions", pins=pins, bound=False, **QUICK)
    for layer, expert, gpu in pins:
        assert gpu in found.gpus_of(layer, expert)


@pytest.mark.parametrize("objective", ["transitions", "copies", "load"])
@pytest.mark.parametrize("per_gpu", [None, 3])
def test_groups_stay_on_a_node(trace, objective, per_gpu):
    found = place(trace, TWO, per_gpu, objective=objective, groups=4, bound=False, **QUICK)
    node = TWO.node_of_gpu[found.gpu_of_slot]
    for experts in found.expert_of_slot:
        for group in range(4):
            assert len(set(node[experts // 2 == group].tolist())) == 1


def test_gpus_that_differ(trace):
    uneven = Topology(1, 3, slots=(1, 2, 5), speed=(1.0, 2.0, 5.0))
    found = place(trace, uneven, objective="transitions", bound=True, **QUICK)
    assert found.slots_of_gpu.tolist() == [1, 2, 5]
    assert found.bound["score"] <= found.cost["score"]


def test_a_start_is_not_made_worse(trace):
    good = place(trace, ONE, objective="transitions", effort=0.02, bound=False)
    again = place(trace, ONE, objective="transitions", effort=1e-9, start=good, bound=False)
    assert again.cost["score"] <= good.cost["score"]


# --- scenarios -----------------------------------------------------------------------------------------------------


def two_domains(tokens: int = 4000) -> Trace:
    """Experts 0 .. 3 in the first half of each sequence pair, 4 .. 7 in the other."""
    rng = np.random.default_rng(0)
    sequence = np.repeat(np.arange(tokens // 100, dtype=np.int32), 100)
    base = 4 * (sequence % 2)
    ids = np.stack([base[:, None] + rng.permuted(np.tile(np.arange(4), (tokens, 1)), axis=1)[:, :2] for _ in range(2)])
    return Trace(ids.astype(np.uint8), 8, sequence=sequence)


def test_scenarios_are_found_and_stood():
    source = two_domains()
    loads = scenario_loads(source, 2)
    assert loads.shape == (3, 2, 8)
    np.testing.assert_allclose(loads.sum(-1), 1)
    assert sorted(loads[1:, 0, :4].sum(-1).round(1).tolist()) == [0.0, 1.0]
    labels = scenario_loads(source, np.asarray(source.sequence) % 2)
    np.testing.assert_allclose(labels[1, 0, :4].sum(), 1, atol=0.02)
    objective = Objective(gpu=1, load=1.0)
    plain, robust = (
        place(source, Topology(1, 2), objective=objective, scenarios=q, effort=0.01, bound=False) for q in (None, 2)
    )
    first = source.select(np.asarray(source.sequence) % 2 == 0)
    assert walk(first, plain).imbalance > 1.9  # each domain on its own GPU
    assert walk(first, robust).imbalance < 1.1
    assert robust.bound == {}


def test_kinds_of_text_in_a_large_trace_are_told_by_some_layers(monkeypatch):
    import importlib

    module = importlib.import_module("headgate.placement.traces.scenarios")
    widths, known = [], module.kmeans2
    monkeypatch.setattr(module, "MOST", 1)
    monkeypatch.setattr(module, "kmeans2", lambda data, *args, **more: widths.append(data.shape[1]) or known(
        data, *args, **more))  # fmt: skip
    loads = scenario_loads(two_domains(), 2)
    assert widths == [8]  # one layer of two
    assert loads.shape == (3, 2, 8)
    assert sorted(loads[1:, 1, :4].sum(-1).round(1).tolist()) == [0.0, 1.0]


def test_scenarios_of_a_trace_without_sequences(trace):
    bare = Trace(trace.expert_ids, trace.num_experts)
    assert scenario_loads(bare, 2).shape[0] in (2, 3)
    assert scenario_loads(bare, None).shape == (1, 3, 8)
    for bad in (0, 1.5, "many"):
        with pytest.raises(ValueError, match="scenarios: must be labels"):
            scenario_loads(bare, bad)
    with pytest.raises(ValueError, match="labels"):
        scenario_loads(bare, np.zeros(3, np.int64))


@pytest.mark.parametrize("per_gpu", [None, 3])
def test_an_expected_load_takes_the_place_of_the_traces(trace, per_gpu):
    """Expert 0 is said to bring half of all load: no other stands beside it that need not."""
    load = np.ones((3, 8))
    load[:, 0] = 7
    found = place(trace, ONE, per_gpu, "balance", objective="load", load=load, **QUICK)
    beside = found.expert_of_slot.reshape(3, 4, -1)[(found.expert_of_slot.reshape(3, 4, -1) == 0).any(2)]
    assert beside.shape[0] >= 3
    problem = rebuilt(trace, ONE, "load", per_gpu, load=load)
    assert problem.parts(problem.walked(found), found)["load"] == pytest.approx(found.cost["score"])
    assert found.bound["load"] <= found.cost["score"]
    if per_gpu is None:
        assert found.cost["score"] == pytest.approx(4 * 8 / 14)  # two slots a GPU: one other has to
    for bad, says in ((np.ones((3, 7)), r"load must be \[L, E\]"), (-load, "not negative"), (load * np.nan, "finite")):
        with pytest.raises(ValueError, match=says):
            place(trace, ONE, load=bad)


# --- what once went wrong ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("per_gpu", [None, 3])
def test_choices_that_are_missing(objective, per_gpu):
    ids = np.tile(np.array([[[0, 1], [2, 255], [3, 255], [255, 255]]], np.uint8), (2, 20, 1))
    found = place(Trace(ids, 4), Topology(1, 2), per_gpu, objective=objective, **QUICK)
    assert found.bound["score"] <= found.cost["score"]


def test_a_load_that_cannot_be_kept_proves_nothing():
    rng = np.random.default_rng(0)
    ids = np.where(rng.random((3, 400, 1)) < 0.6, 0, rng.integers(0, 12, (3, 400, 1))).astype(np.uint8)
    topology = Topology(1, 4)
    for method in ("ilp", "auto"):
        objective = Objective.transitions(topology, 1.0)
        found = place(Trace(ids, 12), topology, method=method, objective=objective, effort=0.001, time_limit=1.5)
        assert found.bound["score"] <= found.cost["score"]
        assert found.bound["proved"] == (found.bound["gap"] == 0)


def test_a_layer_without_expected_load_counts_in_its_scenarios():
    ids = np.zeros((2, 400, 1), np.uint8)
    ids[1, :, 0] = np.arange(400) % 4
    labels = (np.arange(400) >= 200).astype(np.int64)
    load = np.array([[0] * 4, [1] * 4])
    found = place(Trace(ids, 4), Topology(1, 2), objective="load", load=load, scenarios=labels, **QUICK)
    assert found.bound["score"] <= found.cost["score"]


def test_load_alone_stands_scenarios():
    source = two_domains(2000)
    labels = np.asarray(source.sequence) % 2
    found = place(source, Topology(1, 2), objective="load", scenarios=labels, effort=0.01, bound=False)
    assert found.cost["score"] < 1.3  # by the mean alone, one domain might be on one GPU: 2


def test_spare_slots_leave_pins_and_groups_their_room():
    ids = np.tile(np.arange(4, dtype=np.uint8)[None, :, None], (1, 10, 1))
    pins = [(0, 0, 0), (0, 1, 0), (0, 2, 0)]
    found = place(Trace(ids, 4), Topology(1, 2), 4, objective="transitions", pins=pins, **QUICK)
    assert all(0 in found.gpus_of(0, expert) for expert in range(3))
    source = generate(layers=2, experts=12, top_k=2, tokens=200, seed=0)
    for topology, per_gpu, groups in ((Topology(2, 4), 2, 2), (Topology(2, 2), 4, 4), (Topology(2, 2), 5, 12)):
        found = place(source, topology, per_gpu, objective="transitions", groups=groups, **QUICK)
        node = topology.node_of_gpu[found.gpu_of_slot]
        for experts in found.expert_of_slot:
            for group in range(groups):
                assert len(set(node[experts // (12 // groups) == group].tolist())) == 1
    with pytest.raises(ValueError, match="place: slots must be such that nodes can hold whole groups of 6"):
        place(source, Topology(2, 2, slots=(1, 3, 5, 5)), objective="transitions", groups=2, **QUICK)


@pytest.mark.parametrize(
    ("method", "groups", "says"), [("linear", 2, "left out"), ("eplb", 4, "a multiple of the nodes")]
)
def test_groups_are_refused_where_they_would_be_split(method, groups, says):
    source = generate(layers=1, experts=24, top_k=2, tokens=50)
    with pytest.raises(ValueError, match=f"place: groups must be {says} with method '{method}'"):
        place(source, Topology(3, 2), method=method, groups=groups)


def test_one_layer_has_no_transitions_to_search_for():
    source = generate(layers=1, experts=8, top_k=2, tokens=50)
    assert place(source, ONE, objective=Objective(gpu=1.0)).bound["proved"]


def test_text_that_is_all_alike_has_one_kind(recwarn):
    source = Trace(np.zeros((2, 320, 1), np.uint8), 4)
    assert len(scenario_loads(source, 3)) == 1 + 1
    assert not recwarn.list


def test_labels_of_a_long_file_are_sampled_with_it(tmp_path, monkeypatch):
    import importlib

    monkeypatch.setattr(importlib.import_module("headgate.placement.place"), "TOKENS", 512)
    rng = np.random.default_rng(0)
    Trace(rng.integers(0, 4, (2, 3000, 1)).astype(np.uint8), 4).save(tmp_path / "t.npz")
    with TraceFile(tmp_path / "t.npz") as file:
        found = place(file, Topology(1, 2), objective="transitions", scenarios=np.arange(3000) % 2, **QUICK)
    assert found.cost["tokens"] == 512
    assert found.bound["score"] <= found.cost["score"]


# --- files, interruptions, errors ----------------------------------------------------------------------------------


def test_a_file_that_streams_gives_the_same(trace, tmp_path):
    trace.save(tmp_path / "t.npz")
    assert isinstance(open_source(tmp_path / "t.npz"), Trace)
    with TraceFile(tmp_path / "t.npz") as file:
        streamed = place(file, TWO, objective="transitions", bound=False, **QUICK)
    memory = place(trace, TWO, objective="transitions", bound=False, **QUICK)
    np.testing.assert_array_equal(streamed.expert_of_slot, memory.expert_of_slot)
    assert streamed.cost == memory.cost


def test_a_long_file_is_sampled_evenly(tmp_path):
    ids = np.tile((np.arange(5000) // 1000)[None, :, None], (2, 1, 1)).astype(np.uint8)
    Trace(ids, 5, sequence=np.arange(5000, dtype=np.int32)).save(tmp_path / "t.npz")
    with TraceFile(tmp_path / "t.npz") as file:
        some = sampled(file, 1280)
    assert some.shape == (2, 1280, 1)
    assert set(some.expert_ids[0, :, 0].tolist()) == {0, 1, 2, 3, 4}
    np.testing.assert_array_equal(some.expert_ids[1, :, 0], np.asarray(some.sequence) // 1000)


def test_ctrl_c_gives_the_best_so_far_with_its_bound():
    """Sent from another thread once the search is under way."""
    trace = generate(layers=3, experts=24, top_k=2, tokens=600, seed=1)  # too many placements to try them all
    before = signal.getsignal(signal.SIGINT)  # ignored, where the tests run in the background
    place(trace, TWO, objective="copies", **QUICK)  # compiled
    said = []
    sender = threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT))
    sender.start()
    began = time.perf_counter()
    found = place(trace, TWO, objective="copies", effort=20, time_limit=500, progress=said.append)
    sender.join()
    assert found.method["interrupted"]
    assert time.perf_counter() - began < 100
    assert found.bound["score"] <= found.cost["score"]
    assert signal.getsignal(signal.SIGINT) is before
    assert said


def test_it_works_off_the_main_thread(trace):
    found = []
    thread = threading.Thread(target=lambda: found.append(place(trace, ONE, objective="load", **QUICK)))
    thread.start()
    thread.join()
    assert found[0].bound["score"] <= found[0].cost["score"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"method": "gurobi"}, "place: method must be one of auto, ilp, balance, eplb, linear, random, got 'gurobi'"),
        ({"objective": "beauty"}, "place: objective must be an Objective or one of time, transitions, copies, load"),
        ({"time_limit": 0}, "place: time_limit must be above 0, got 0"),
        ({"effort": float("nan")}, "place: effort must be above 0, got nan"),
        ({"groups": 3}, "place: groups must divide the experts, 8, got 3"),
        ({"slots_per_gpu": 1}, "Topology: slots must be at least as many as experts, 8, got 4"),
        ({"slots_per_gpu": 9}, "Topology: a GPU's slots must be at most the experts, 8"),
        ({"pins": [(3, 0, 0)]}, r"place: pins must be \(layer, expert, gpu\) below \(3, 8, 4\), got \(3, 0, 0\)"),
        ({"pins": [(0, 1, 0), (0, 1, 2)]}, "place: pins must name one GPU for an expert"),
        ({"pins": [(0, e, 1) for e in range(3)]}, "place: pins must fit the 2 slots of GPU 1 in layer 0, got 3"),
        ({"method": "linear", "pins": [(0, 0, 0)]}, "place: pins must be left out with method 'linear'"),
    ],
)
def test_bad_arguments_are_named(trace, change, says):
    with pytest.raises(ValueError, match=says):
        place(trace, ONE, **{"bound": False, **change})


def test_traces_that_will_not_do():
    with pytest.raises(ValueError, match="place: source must have layers and tokens, got 2 and 0"):
        place(Trace(np.zeros((2, 0, 1), np.uint8), 4), ONE)
    ids = np.zeros((2, 3, 1), np.uint8)
    mixed = Trace(ids, 8, experts_of_layer=np.array([8, 4], np.int32))
    with pytest.raises(ValueError, match=r"place: source must have layers with equally many experts, got \[4, 8\]"):
        place(mixed, ONE)
    with pytest.raises(ValueError, match=r"place: topology must have few enough GPUs for tables .*, got 65536"):
        place(Trace(ids, 4), Topology(8192, 8), slots_per_gpu=1)
    start = Placement(np.array([[0, 1, 2, 3]] * 2), 4, Topology(1, 2))
    with pytest.raises(ValueError, match=r"place: start must have \[1, 1, 1, 1\] slots, got \[2, 2\]"):
        place(Trace(ids, 4), ONE, start=start)


def test_the_public_names():
    assert headgate.place is place
    assert headgate.Topology is Topology
    assert headgate.Placement is Placement
    assert headgate.Objective is Objective
