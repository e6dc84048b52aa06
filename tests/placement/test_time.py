"""The time limit: who is asked whether it is over, and what is left out then. No clock of the machine decides."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from swap_problems import problem_of, random_trace

from headgate.placement.bounds import chain, simple
from headgate.placement.cluster.topology import Topology
from headgate.placement.place import place
from headgate.placement.problem import Objective
from headgate.placement.search import balance as balance_module
from headgate.placement.search import ilp as ilp_module
from headgate.placement.search import replica_loops, token_loops, walk_loops
from headgate.placement.search.assign import assign
from headgate.placement.search.balance import balance
from headgate.placement.search.copies import improve_copies
from headgate.placement.search.exact import best_of_all, improve
from headgate.placement.search.ilp import ilp
from headgate.placement.search.methods import METHODS
from headgate.placement.search.recombine import Pool
from headgate.placement.search.replicate import replicate
from headgate.placement.search.search import search
from headgate.placement.search.state import Counts, score
from headgate.placement.traces.generate import generate

COPIES = Objective(copies=1.0, load=0.1)


class After:
    """A `stop` that is true once `work` has been called so often, and work that counts its calls."""

    def __init__(self, calls: int, work) -> None:
        self.most, self.calls, self.work = calls, 0, work

    def __call__(self, *args):
        self.calls += 1
        return self.work(*args)

    def stop(self) -> bool:
        return self.calls >= self.most


@pytest.mark.parametrize("calls", [1, 4])
def test_a_search_over_tokens_ends_between_two_layers(monkeypatch, calls):
    problem = problem_of(random_trace(1, 3, 8), Topology(1, 4), COPIES)
    seen = After(calls, token_loops.anneal)
    monkeypatch.setattr(token_loops, "anneal", seen)
    improve_copies(problem, proposals=100_000, stop=seen.stop)
    assert seen.calls == calls


@pytest.mark.parametrize("calls", [1, 2, 5])
def test_a_search_for_replicas_ends_inside_a_layer_of_many_tokens(monkeypatch, calls):
    slots = np.full(4, 3, np.int32)
    problem = problem_of(random_trace(1, 2, 8, tokens=300), Topology(1, 4), COPIES, slots_of_gpu=slots)
    seen = After(calls, replica_loops.anneal)
    monkeypatch.setattr(replica_loops, "anneal", seen)
    monkeypatch.setattr("headgate.placement.search.replicate.AT_ONCE", 1)  # exchanges one by one
    replicate(problem, proposals=100_000, stop=seen.stop)
    assert seen.calls == calls


def test_walked_descents_end_too(monkeypatch):
    problem = problem_of(random_trace(1, 2, 8), Topology(1, 4), slots_of_gpu=np.full(4, 3, np.int32))
    start = replicate(problem, proposals=0)
    for name in ("descend", "enumerate_all"):
        seen = After(2, getattr(walk_loops, name))
        monkeypatch.setattr(walk_loops, name, seen)
        monkeypatch.setattr("headgate.placement.search.exact.AT_ONCE", 1)
        if name == "descend":
            improve(problem, start, stop=seen.stop)
        else:
            small = problem_of(random_trace(1, 2, 4), Topology(1, 2))
            found = best_of_all(small, seen.stop)
            assert found is not None
            assert not found.proved
        assert seen.calls == 2


def test_a_swap_search_whose_time_is_over_hands_over_what_there_is():
    problem = problem_of(random_trace(1, 4, 8), Topology(1, 4))
    at = assign(problem, stop=lambda: True)
    assert (at == at[0]).all()  # the layer before, again and again
    assert (search(problem, stop=lambda: True) == at).all()
    pins = np.full((4, 8), -1, np.int32)
    pins[2, 5] = 3
    assert assign(replace(problem, pins=pins), stop=lambda: True)[2, 5] == 3
    assert not Pool(problem, Counts(problem), [at, at], lambda: True).whole


def test_a_model_that_is_not_written_down_in_time_is_not_solved(monkeypatch):
    monkeypatch.setattr(ilp_module, "milp", lambda *args, **more: pytest.fail("solved"))
    problem = problem_of(random_trace(1, 3, 8), Topology(1, 4))
    found = ilp(problem, stop=lambda: True)
    assert (found.source, found.proved) == ("search", False)
    at = np.argsort(found.expert_of_slot, 1) // 2
    assert found.bound <= score(problem, at).total


def test_layers_left_when_time_is_over_are_balanced_without_a_search(monkeypatch):
    kicks = []

    def seen(*args):
        kicks.append(args[-2])
        return known(*args)

    known = balance_module.search
    monkeypatch.setattr(balance_module, "search", seen)
    plan = balance(np.random.default_rng(0).random((4, 8)), [3, 3, 3], stop=lambda: len(kicks) >= 2)
    assert kicks == [kicks[0], kicks[0], -1, -1]
    assert kicks[0] > 0
    assert all(len(set(row.tolist())) == 8 for row in plan)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("objective", ["time", "transitions", "copies", "load"])
@pytest.mark.parametrize("per_gpu", [None, 12])
def test_a_limit_that_is_over_at_once_leaves_out_all_that_is_dear(monkeypatch, method, objective, per_gpu):
    if method == "ilp" and (per_gpu is not None or objective in ("time", "copies")):
        return  # it serves no copies
    for room, name in ((np.linalg, "eigh"), (np.linalg, "svd"), (chain.Chain, "step"), (simple, "matching"),
                       (token_loops, "anneal"), (replica_loops, "anneal"), (walk_loops, "descend")):  # fmt: skip
        monkeypatch.setattr(room, name, lambda *args, name=name, **more: pytest.fail(f"{name} was begun"))
    source = generate(layers=3, experts=40, top_k=2, tokens=300, seed=1)
    found = place(source, Topology(2, 2), per_gpu, method, objective=objective, time_limit=1e-9)
    assert found.bound["score"] <= found.cost["score"]
    if objective in ("time", "copies") and per_gpu is None:
        assert "without time for all counts" in found.bound["method"]
