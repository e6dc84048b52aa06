"""How placements are found: a name, and a function of a Problem and a Run; what it proved on the way, if anything."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cost import Cost
from ..placement import Placement
from ..problem import Problem
from .balance import balance
from .copies import improve_copies
from .eplb import apart, eplb
from .exact import best_of_all, improve
from .ilp import ilp
from .replicate import replicate
from .search import search
from .simple import linear, random
from .state import from_slots, score, to_slots

SWAPS, COPIES, EXCHANGES = 30_000_000, 5_000_000, 200_000  # proposals of the searches, a few seconds each
SINGLE = 0.5  # of the time left, at most, that each expert's first place takes where others are to come
BALANCE = 0.2  # the same, of a plan for load alone that others are measured by
WALKED = 40_000_000  # choices of tokens that the last descents walk, a few seconds
LOOSE = 1.5  # load that the search may leave to the replicas, at least
EXACT = 130  # binaries up to which HiGHS, too, is asked: beyond, it proves nothing in a minute


@dataclass
class Run:
    """What a method may spend, and whom it tells. `interrupted`: an event that Ctrl-C sets. `notes`: what the answer's
    `method` is to say beside its name. `walks`: what walks counted, by the slots' bytes; `walk_s`: how long one took.
    """

    deadline: float
    interrupted: Any
    seed: int
    effort: float
    start: Placement | None
    say: Callable[[str], None]
    notes: dict[str, Any] = field(default_factory=dict)
    walks: dict[bytes, Cost] = field(default_factory=dict)
    walk_s: float = 0.0

    def stop(self) -> bool:
        """Whether it is time to hand over what there is."""
        return self.interrupted.is_set() or time.perf_counter() > self.deadline

    def walked(self, problem: Problem, placement: Placement) -> Cost:
        """`Problem.walked`, once for each placement."""
        key = placement.expert_of_slot.tobytes()
        if key not in self.walks:
            began = time.perf_counter()
            self.walks[key] = problem.walked(placement)
            self.walk_s = time.perf_counter() - began
        return self.walks[key]

    def rank(self, problem: Problem, expert_of_slot: NDArray[np.integer]) -> tuple[float, float]:
        """`Problem.rank` of slots [L, S], walked."""
        placement = problem.placement(expert_of_slot)
        return problem.rank(problem.parts(self.walked(problem, placement), placement))

    def until(self, share: float) -> Callable[[], bool]:
        """`stop` after a share of the time that is left."""
        now = time.perf_counter()
        end = now + share * (self.deadline - now)
        return lambda: self.stop() or time.perf_counter() > end

    def proposals(self, usual: int) -> int:
        return max(1, round(usual * self.effort))


@dataclass(frozen=True)
class Proof:
    """A score that no placement of the problem is below, whether the answer is the best there is, and how it was
    found out."""

    score: float
    proved: bool
    method: str


Found = tuple[NDArray[np.integer], Proof | None]


def _auto(problem: Problem, run: Run) -> Found:
    """Small cases exactly; else the best of a search and of the methods that know load alone or nothing, by what a walk
    counts, made better by that where it is affordable."""
    exact = best_of_all(problem, run.stop)
    if exact is not None and exact.proved:
        slots, most = exact.expert_of_slot, problem.objective.max_load
        return slots, Proof(run.rank(problem, slots)[1], True, "every placement tried") if most is None else None
    others: list[tuple[tuple[float, float], int, NDArray[np.integer]]] = []
    for other in _simple(problem, run) + ([] if exact is None else [exact.expert_of_slot]):
        if run.stop() or time.perf_counter() + 4 * run.walk_s > run.deadline:
            break
        others.append((run.rank(problem, other), len(others), other))
    found, proof = _searched(problem, run)
    if others and min(others)[0] < run.rank(problem, found):
        found = min(others)[2]
    if proof is not None and proof.proved:
        return found, proof
    return improve(problem, found, choices=run.proposals(WALKED), seed=run.seed, stop=run.stop), proof


def _simple(problem: Problem, run: Run) -> list[NDArray[np.integer]]:
    """What methods that know load alone, or nothing, answer; without those that cannot keep pins, groups or slots."""
    now, found = time.perf_counter(), []
    quiet = replace(run, deadline=now + BALANCE * (run.deadline - now), notes={}, say=lambda line: None)
    for method in (_linear, _eplb, _balance):
        if run.stop():
            break
        try:
            slots, _ = method(problem, quiet)
        except ValueError:
            continue
        if _keeps_groups(problem, slots):
            found.append(slots)
    return found


def _searched(problem: Problem, run: Run) -> Found:
    """Search; small cases by the integer program too; replicas once every expert has a place."""
    affinity = problem.objective.counts_copies or problem.objective.gpu or problem.objective.node
    if not affinity and (problem.spare or len(problem.loads) == 1):
        return _balance(problem, run)
    single = _without_spare(problem) if problem.spare else problem
    if problem.spare and problem.objective.max_load is not None:  # replicas level it, and more cheaply
        loose = max(problem.objective.max_load, LOOSE)
        single = replace(single, objective=replace(problem.objective, max_load=loose))
    start, stop = None, run.until(SINGLE) if problem.spare else run.stop
    if run.start is not None and not problem.spare:
        start = from_slots(run.start.expert_of_slot, problem.gpu_of_slot)
    if problem.objective.counts_copies:
        at = improve_copies(single, start, seed=run.seed, proposals=run.proposals(COPIES), stop=stop)
    else:
        at = search(single, start, proposals=run.proposals(SWAPS), seed=run.seed, stop=stop)
    if problem.spare:
        fixed = replace(problem, objective=replace(problem.objective, home="fixed"))
        rule, proposals = problem.objective.replica, run.proposals(EXCHANGES)
        return replicate(fixed, at, replica=rule, seed=run.seed, proposals=proposals, stop=run.stop), None
    if problem.objective.counts_copies or problem.layers * problem.num_experts * problem.topology.gpus > EXACT:
        return to_slots(at), None
    exact, proof = _ilp(problem, run)
    better = score(problem, from_slots(exact, problem.gpu_of_slot)).order < score(problem, at).order
    return exact if better else to_slots(at), proof


def _ilp(problem: Problem, run: Run) -> Found:
    found = ilp(problem, max(run.deadline - time.perf_counter(), 0.1), seed=run.seed, stop=run.stop)
    if problem.objective.max_load is not None:  # what it proves, it proves of placements that keep to that alone
        return found.expert_of_slot, None
    return found.expert_of_slot, Proof(found.bound, found.proved, "integer program")


def _balance(problem: Problem, run: Run) -> Found:
    pins = [(layer, e, problem.pins[layer, e]) for layer, e in np.argwhere(problem.pins >= 0).tolist()]
    groups = problem.groups if problem.groups > 1 else None
    found = balance(
        problem.loads.mean(0),
        problem.slots_of_gpu,
        problem.topology.nodes,
        groups,
        problem.topology.speed_of_gpu,
        pins,
        run.seed,
        stop=run.stop,
    )
    return found, None


def _eplb(problem: Problem, run: Run) -> Found:
    _free("eplb", problem)
    load, slots = problem.loads[0], problem.slots_of_gpu
    plan, replaced = apart(eplb(load, slots, problem.topology.nodes, problem.groups), load, slots)
    if replaced:
        run.notes["copies_replaced"] = replaced
        run.say(f"eplb wants {replaced} copies beside another of the same expert: their slots hold other experts")
    return plan, None


def _linear(problem: Problem, run: Run) -> Found:
    _free("linear", problem)
    return linear(problem.layers, problem.num_experts, problem.slots_of_gpu), None


def _random(problem: Problem, run: Run) -> Found:
    _free("random", problem)
    return random(problem.layers, problem.num_experts, problem.slots_of_gpu, run.seed), None


METHODS: dict[str, Callable[[Problem, Run], Found]] = {
    "auto": _auto,
    "ilp": _ilp,
    "balance": _balance,
    "eplb": _eplb,
    "linear": _linear,
    "random": _random,
}


def _keeps_groups(problem: Problem, expert_of_slot: NDArray[np.integer]) -> bool:
    group = expert_of_slot // (problem.num_experts // problem.groups)
    at = problem.topology.node_of_gpu[problem.gpu_of_slot] + problem.topology.nodes * group
    return problem.groups == 1 or all(len(np.unique(row)) == problem.groups for row in at)


def _free(method: str, problem: Problem) -> None:
    if (problem.pins >= 0).any():
        raise ValueError(f"place: pins must be left out with method {method!r}, got {int((problem.pins >= 0).sum())}")
    if problem.groups > 1 and (method != "eplb" or problem.groups % problem.topology.nodes):
        rule = "a multiple of the nodes" if method == "eplb" else "left out"
        raise ValueError(f"place: groups must be {rule} with method {method!r}, got {problem.groups}")


def _without_spare(problem: Problem) -> Problem:
    """The problem with one slot for each expert: the GPUs with most slots give theirs up first, but none that a pin
    needs. With groups each node keeps whole groups, and no fewer experts than its largest GPU can then take."""
    nodes, slots = problem.topology.nodes, problem.slots_of_gpu.astype(np.int64)
    least = np.zeros(len(slots), np.int64)
    for pins in problem.pins:
        least = np.maximum(least, np.bincount(pins[pins >= 0], minlength=len(slots)))
    kept = _kept_of_node(problem, slots.reshape(nodes, -1), least.reshape(nodes, -1))
    for node, mine in enumerate(np.split(np.arange(len(slots)), nodes)):
        total = None if kept is None else kept[node]
        while total is not None and slots[mine].sum() > total:
            slots[_fullest(slots, least, mine)] -= 1
    while slots.sum() > problem.num_experts:
        slots[_fullest(slots, least, np.arange(len(slots)))] -= 1
    return replace(problem, slots_of_gpu=slots.astype(np.int32))


def _fullest(slots: NDArray[np.int64], least: NDArray[np.int64], among: NDArray[np.int64]) -> int:
    return int(among[np.argmax(np.where(slots[among] > least[among], slots[among], -1))])


def _kept_of_node(problem: Problem, slots: NDArray[np.int64], least: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """How many experts each node is to hold, whole groups of them; None where there are no groups."""
    if problem.groups == 1:
        return None
    size = problem.num_experts // problem.groups
    kept = slots.sum(1) // size * size
    floor = -(-np.maximum(slots.max(1), least.sum(1)) // size) * size
    while kept.sum() > problem.num_experts:
        node = int(np.argmax(np.where(kept - size >= floor, kept, -1)))
        if kept[node] - size < floor[node]:
            break
        kept[node] -= size
    if kept.sum() != problem.num_experts or (kept < floor).any():
        rule = f"such that nodes can hold whole groups of {size} experts, each as many as its largest GPU has slots"
        raise ValueError(f"place: slots must be {rule}, got {slots.tolist()}")
    return kept
