"""Small problems by what the walk itself counts: every placement tried out, or changes by chance and descents.

The other searches count what they can count fast. Here each placement that is looked at is walked by all tokens, with
replicas, homes and turns as they are, which pays where that takes microseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from math import comb
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..problem import Problem
from ..walk import HOME, REPLICA
from . import walk_loops
from .walk_loops import Walked

CHOICES = 100_000_000  # of tokens that all placements may take, about a second
LEAST = 200  # choices whose time one layer's walk takes even without tokens
AT_ONCE = 2_000_000  # choices from one look at the clock to the next
ROUNDS = 400  # descents in turn without a better end, after which there will be none


class Best(NamedTuple):
    """expert_of_slot int32 [L, S]; `proved`: all placements were tried out, and this is the best."""

    expert_of_slot: NDArray[np.int32]
    proved: bool


def best_of_all(problem: Problem, stop: Callable[[], bool] = lambda: False) -> Best | None:
    """The best by what a walk counts of all placements that pins and groups allow; None where there are too many.

    Where layers have nothing to do with each other, each for itself. `stop` ends it early, with the best so far.
    """
    length = max(problem.ids[0].size, LEAST)
    most = CHOICES // length
    states = []
    for layer in range(problem.layers):
        states.append(layouts(problem, layer, most))
        if not len(states[-1]):
            return None
    apart = not _coupled(problem) and (problem.objective.max_load is None or problem.layers == 1)
    blocks = [[layer] for layer in range(problem.layers)] if apart else [list(range(problem.layers))]
    ahead = 1 + _foretold(problem)
    if sum(ahead * float(np.prod([len(states[layer]) for layer in block])) for block in blocks) > most:
        return None
    walked, found = walked_of(problem), np.stack([ways[0] for ways in states])
    for block in blocks:
        if not _tried(_layers(walked, block), [states[layer] for layer in block], found, block[0], length, stop):
            return Best(found, False)
    return Best(found, True)


def _tried(
    walked: Walked, states: list[NDArray[np.int32]], found: NDArray[np.int32], at: int, length: int, stop: Callable
) -> bool:
    """Puts the best of states into the layers of `found` from `at` on; False where it was stopped."""
    number = np.array([len(ways) for ways in states])
    padded = np.zeros((len(states), number.max(), found.shape[1]), np.int32)
    for ways, row in zip(states, padded, strict=True):
        row[: len(ways)] = ways
    each = max(1, int(AT_ONCE // (length * np.prod(number[1:], dtype=float))))
    best, rows = np.full(2, np.inf), found[at : at + len(states)]
    for low in range(0, int(number[0]), each):
        if stop():
            return False
        high = min(low + each, int(number[0]))
        walk_loops.enumerate_all(walked, padded, number, low, high, best, rows)
    return True


def improve(
    problem: Problem,
    expert_of_slot: NDArray[np.integer],
    *,
    choices: int = CHOICES,
    seed: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> NDArray[np.int32]:
    """int32 [L, S]: `expert_of_slot` or better by what a walk counts, by changes in slots and descents after them.

    `choices`: of tokens walked, about; where one descent would take more, it stays as it is. The same arguments give
    the same answer, unless `stop` ends it early.
    """
    best = np.array(expert_of_slot, np.int32)
    (layers, slots), experts, coupled = best.shape, problem.num_experts, _coupled(problem)
    patience = 2 * layers * slots * max(slots, experts)
    length = max(problem.ids[0].size, LEAST)
    if patience * length * ((layers + 1) // 2 if coupled else 1) * 2 > choices or stop():
        return best
    walked, random = walked_of(problem), np.random.default_rng(seed).integers(1, 2**63, 1, np.uint64)
    each, rank, rounds = max(1, AT_ONCE // length), (np.inf, np.inf), 0
    while choices > 0 and rounds <= ROUNDS and not stop():
        slots_now, found, idle, kicks = best.copy(), rank, 0, min(rounds, 1 + rounds % 6)
        while idle < patience and choices > 0 and not stop():
            found, idle, done = walk_loops.descend(walked, slots_now, kicks, idle, patience, coupled, each, random)
            choices, kicks = choices - done * length, 0
        rounds = 1 if walk_loops.better(found, rank) else rounds + 1
        if not walk_loops.better(rank, found):
            best, rank = slots_now, found
    return best


def walked_of(problem: Problem) -> Walked:
    """The problem as the loops see it."""
    objective, topology, ids = problem.objective, problem.topology, problem.ids
    experts, used = problem.num_experts, problem.loads.any((0, 2))
    after = np.zeros((problem.layers - 1 if _foretold(problem) else 0, experts, experts))
    for layer in range(len(after)):
        counts = problem.transitions[layer]
        after[layer] = counts.toarray() if hasattr(counts, "toarray") else counts
    row = 1 / max(1, ids.shape[0] * ids.shape[1])
    pair = 1 / max(1.0, sum(float(counts.sum()) for counts in problem.transitions))
    alone = problem.counted and len(problem.loads) == 1
    return Walked(
        ids=ids.astype(np.uint16),
        none=np.iinfo(np.uint16).max,
        home=problem.home.astype(np.int32),
        experts=experts,
        gpu_of_slot=problem.gpu_of_slot,
        node_of_gpu=topology.node_of_gpu,
        after=after,
        share=np.ascontiguousarray(problem.loads[len(problem.loads) if alone else int(problem.counted) :]),
        own=problem.counted,
        used=np.asarray(used),
        pace=1 / topology.speed_of_gpu,
        weight=np.array(
            [
                objective.gpu * pair,
                objective.node * pair,
                objective.copies * row,
                objective.node_copies * row,
                objective.load,
            ]
        ),
        most=np.inf if objective.max_load is None else objective.max_load,
        rule=REPLICA.index(objective.replica),
        move=HOME.index(objective.home),
        pin=problem.pins,
        grouped=problem.groups > 1,
    )


def _coupled(problem: Problem) -> bool:
    """Whether a layer's worth depends on other layers."""
    objective = problem.objective
    return bool(objective.replica != "home" or objective.home != "fixed" or objective.gpu or objective.node)


def _foretold(problem: Problem) -> bool:
    return "foretold" in (problem.objective.replica, problem.objective.home)


def _layers(walked: Walked, block: list[int]) -> Walked:
    """Some layers of it. The mean of the loads stays that of all layers, of which each weighs the same."""
    if len(block) == len(walked.ids):
        return walked
    weight, used = walked.weight.copy(), walked.used[block]
    weight[4] *= used.sum() / max(1, walked.used.sum())
    share = np.ascontiguousarray(walked.share[:, block])
    return walked._replace(ids=walked.ids[block], share=share, used=used, weight=weight, pin=walked.pin[block])


def layouts(problem: Problem, layer: int, most: int) -> NDArray[np.int32]:
    """int32 [N, S]: all placements of one layer that pins and groups allow; N = 0 where they are more than `most`."""
    experts, slots = problem.num_experts, problem.slots_of_gpu.tolist()
    none = np.zeros((0, sum(slots)), np.int32)
    if experts > 62 or max(comb(experts, room) for room in slots) > most:
        return none
    found, held, left = np.zeros((1, 0), np.int32), np.zeros(1, np.int64), sum(slots)
    for g, room in enumerate(slots):
        ways = np.array(list(combinations(range(experts), room)), np.int32).reshape(-1, room)
        masks = (1 << ways.astype(np.int64)).sum(1)
        for e in np.flatnonzero(problem.pins[layer] == g):
            ways, masks = ways[masks >> e & 1 == 1], masks[masks >> e & 1 == 1]
        if len(held) * len(masks) > 8 * most:
            return none
        both, left = held[:, None] | masks, left - room
        many = sum(both >> e & 1 for e in range(experts))
        before, way = np.nonzero(experts - many <= left)
        found, held = np.concatenate([found[before], ways[way]], 1), both[before, way]
    if problem.groups > 1:
        node = problem.topology.node_of_gpu[problem.gpu_of_slot]
        size, kept = experts // problem.groups, np.ones(len(found), bool)
        for group in range(problem.groups):
            at = np.where(found // size == group, node, -1)
            kept &= at.max(1) == np.where(at < 0, problem.topology.nodes, at).min(1)
        found = found[kept]
    return found if len(found) <= most else none
