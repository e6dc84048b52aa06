"""Replicas: which experts the slots beyond one for each hold, and where, judged by what the tokens then do.

A replica pays where the tokens of an expert come from several GPUs: with `walk`'s rule "follow" each takes the one
that most of its choices before were on. How many do, and how the load then falls, follows from the tokens alone, so the
search moves them: a slot's expert is exchanged, its tokens choose anew, later layers' choices follow, and Metropolis'
rule decides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..placement import Placement
from ..problem import Objective, Problem
from ..walk import REPLICA, Foretold
from . import replica_loops
from .copies import transition_price
from .replica_loops import Replicas

ROUNDS, LAST = 100, 20  # of an annealing, and those of them that only go down
LOOK = 4  # rounds from one look at the score to the next
VISITS = 0.75  # of a home that moves, for each token and layer, with a good placement: a guess to start from
AT_ONCE = 2_500_000  # replicas looked at from one question to `stop` to the next, some hundredths of a second
SLACK = 0.05  # by how much a guess may be worse than allowed, in mean changes, and is still carried out


def replicate(
    problem: Problem,
    gpu_of_expert: NDArray[np.integer] | None = None,
    *,
    replica: str | None = None,
    seed: int = 0,
    proposals: int = 200_000,
    heat: float = 0.03,
    stop: Callable[[], bool] = lambda: False,
) -> NDArray[np.int32]:
    """int32 [L, S]: the expert of each slot, GPUs in order, by annealed exchanges.

    The start is `gpu_of_expert` [L, E] (None: experts in order) with the busiest experts in the slots left over. Then
    replicas give way to other experts, and slots exchange theirs. The score is the objective's (`score`), with homes
    that stay: where they move, transitions are taken at the price that `improve_copies` gives them. Loads are those of
    the tokens. With a `max_load` the load's weight follows the load while the search goes on, and the best that keeps
    to it is returned, else the one with the least load. Never worse than the start, in that order.

    replica    the rule of `walk` by which tokens choose; None: the objective's
    proposals  exchanges tried in all
    heat       the first temperature, in mean changes by an exchange
    stop       asked again and again: once true, the best so far is returned

    The same arguments give the same answer.

    Raises ValueError where the start does not fit slots, pins or groups, or a rule is not known.
    """
    replica = _rule(problem, replica)
    if problem.objective.home != "fixed":
        problem = replace(problem, objective=_staying(problem))
    start = with_spares(problem, gpu_of_expert)
    if stop():
        return start
    state = state_of(problem, start, replica, seed)
    best, rank, least = start, _rank(problem, state), state.weight[4]
    each = -(-proposals // (ROUNDS * problem.layers))
    size, _ = _round(state, 0.0, 0.0, min(20, each), stop)
    for turn in range(ROUNDS if proposals else 0):
        temperature = heat * size * 0.01 ** (turn / (ROUNDS - LAST)) if turn < ROUNDS - LAST else 0.0
        _, whole = _round(state, temperature, SLACK * size, each, stop)
        if state.rule == 2:
            foretell(problem, state)
        if turn % LOOK == LOOK - 1 or not whole:
            found = _rank(problem, state)
            if found < rank:
                best, rank = state.slot.copy(), found
            if problem.objective.max_load is not None:
                state.weight[4] = max(least, state.weight[4] * (1.15 if found[0] > 0 else 0.95))
        if not whole:
            break
    return best


def _round(
    state: Replicas, temperature: float, slack: float, proposals: int, stop: Callable[[], bool]
) -> tuple[float, bool]:
    """So many exchanges tried in each layer; the mean size of their guesses, and whether it came to its end."""
    (layers, tokens, top_k), experts, gpus = state.ids.shape, state.held.shape[1], state.held.shape[2]
    chunk = max(1, AT_ONCE * experts // max(1, tokens * top_k * gpus))
    size, tried = 0.0, 0
    for layer in range(layers):
        for done in range(0, proposals, chunk):
            if stop():
                return size / max(1, tried), False
            more, many = replica_loops.anneal(state, layer, temperature, slack, min(chunk, proposals - done))
            size, tried = size + more, tried + many
    return size / max(1, tried), True


def _staying(problem: Problem) -> Objective:
    """The objective with homes that stay and, for those that move, more worth in transitions that stay with them."""
    objective, top_k = problem.objective, max(1, problem.ids.shape[2])
    price = transition_price(top_k, VISITS)
    gpu, node = objective.gpu + price * objective.copies, objective.node + price * objective.node_copies
    return replace(objective, home="fixed", gpu=gpu, node=node)


def _rule(problem: Problem, replica: str | None) -> str:
    replica = problem.objective.replica if replica is None else replica
    if replica not in REPLICA:
        raise ValueError(f"replicate: replica must be one of {', '.join(REPLICA)}, got {replica!r}")
    return replica


def score(problem: Problem, expert_of_slot: NDArray[np.integer], replica: str | None = None) -> dict[str, float]:
    """What the objective weighs, on the problem's tokens, and its `score`: their sum. Homes stay;
    among equal replicas the token's number takes its turn. `replica`: as in `replicate`."""
    return _parts(problem, state_of(problem, expert_of_slot, _rule(problem, replica)))


def _rank(problem: Problem, state: Replicas) -> tuple[float, float]:
    """To be minimised: the load beyond what is wished for, then the score."""
    parts, most = _parts(problem, state), problem.objective.max_load
    return 0.0 if most is None else max(0.0, parts["load"] - most), parts["score"]


def _parts(problem: Problem, state: Replicas) -> dict[str, float]:
    pairs, gpu, node, rows, node_rows = replica_loops.counts(state).tolist()
    every = max(1, problem.ids.shape[0] * problem.ids.shape[1])
    parts = {
        "gpu": (pairs - gpu) / max(1, pairs),
        "node": (pairs - node) / max(1, pairs),
        "copies": 2 * rows / every,
        "node_copies": 2 * node_rows / every,
        "load": float(state.heaviest.mean()),
    }
    return parts | {"score": sum(getattr(problem.objective, name) * value for name, value in parts.items())}


def with_spares(problem: Problem, gpu_of_expert: NDArray[np.integer] | None) -> NDArray[np.int32]:
    """int32 [L, S]: each expert once, and in the slots left over those with most load for each replica.

    `gpu_of_expert` [L, E]; None: pins first, then the experts in order, each on the emptiest GPU (of its group's
    node). Raises ValueError where that does not fit slots, pins or groups.
    """
    slots, gpus, nodes = problem.slots_of_gpu, problem.topology.gpus, problem.topology.node_of_gpu
    found = np.empty((problem.layers, len(problem.gpu_of_slot)), np.int32)
    for layer in range(problem.layers):
        at = _first(problem, layer) if gpu_of_expert is None else np.asarray(gpu_of_expert)[layer]
        _check_start(problem, layer, at)
        held = np.eye(gpus, dtype=bool)[at]
        node, load, times = nodes[at], problem.loads[0, layer], np.ones(problem.num_experts)
        for g in np.repeat(np.arange(gpus), slots - held.sum(0)):
            may = ~held[:, g] & ((problem.groups == 1) | (node == nodes[g]))
            if not may.any():
                raise ValueError(
                    f"replicate: GPU {g} must have an expert for each slot in layer {layer}, got {slots[g]}"
                )
            most = np.argmax(np.where(may, load / times, -1.0))
            held[most, g] = True
            times[most] += 1
        found[layer] = np.nonzero(held.T)[1]
    return found


def _first(problem: Problem, layer: int) -> NDArray[np.int32]:
    """int32 [E]: a GPU for each expert of a layer."""
    topology, at = problem.topology, problem.pins[layer].astype(np.int32)
    room = problem.slots_of_gpu - np.bincount(at[at >= 0], minlength=topology.gpus)
    groups = at.reshape(problem.groups, -1)
    for number in np.argsort(-groups.max(1), kind="stable"):
        group, open_ = groups[number], np.ones(topology.gpus, bool)
        if problem.groups > 1:
            by_node = np.bincount(topology.node_of_gpu, room)
            open_ = topology.node_of_gpu == (
                topology.node_of_gpu[group.max()] if group.max() >= 0 else by_node.argmax()
            )
        for e in np.flatnonzero(group < 0):
            group[e] = np.argmax(np.where(open_, room, -1))
            room[group[e]] -= 1
    return at


def _check_start(problem: Problem, layer: int, at: NDArray[np.integer]) -> None:
    gpus, slots, pins = problem.topology.gpus, problem.slots_of_gpu, problem.pins[layer]
    if at.shape != (problem.num_experts,) or at.min() < 0 or at.max() >= gpus:
        raise ValueError(f"replicate: gpu_of_expert must be [L, E] of 0 .. {gpus - 1}, got {at} in layer {layer}")
    held = np.bincount(at, minlength=gpus)
    if (held > slots).any():
        raise ValueError(
            f"replicate: pins and gpu_of_expert must fit {slots.tolist()} slots in layer {layer}, got {held.tolist()}"
        )
    if ((pins >= 0) & (pins != at)).any():
        raise ValueError(f"replicate: gpu_of_expert must keep the pins, got others in layer {layer}")
    node = problem.topology.node_of_gpu[at].reshape(problem.groups, -1)
    if problem.groups > 1 and (node != node[:, :1]).any():
        raise ValueError(f"replicate: gpu_of_expert must keep groups on one node, got others in layer {layer}")


def state_of(problem: Problem, expert_of_slot: NDArray[np.integer], replica: str, seed: int = 0) -> Replicas:
    """All that the loops need."""
    topology, ids, slot = problem.topology, problem.ids, np.asarray(expert_of_slot, np.int32)
    (layers, tokens, _), experts = ids.shape, problem.num_experts
    gpus, speed = topology.gpus, topology.speed_of_gpu
    begin, choice = _choices_of(ids, experts)
    chosen = np.maximum((ids >= 0).sum((1, 2)), 1)
    pin_of_slot = np.take_along_axis(problem.pins, slot, 1)
    state = Replicas(
        slot=slot.copy(),
        gpu_of_slot=problem.gpu_of_slot,
        node_of_gpu=topology.node_of_gpu,
        fixed=pin_of_slot == problem.gpu_of_slot,
        grouped=problem.groups > 1,
        held=np.zeros((layers, experts, gpus), bool),
        copies=np.zeros((layers, experts), np.int32),
        ids=ids,
        home=problem.home,
        turn=_turns(problem.home),
        on=np.full(ids.shape, -1, np.int16),
        begin=begin,
        choice=choice,
        gpu_count=np.zeros((layers, tokens, gpus), np.uint8),
        node_count=np.zeros((layers, tokens, topology.nodes), np.uint8),
        load=np.zeros((layers, gpus)),
        pair=speed.sum() / speed / chosen[:, None],
        heaviest=np.zeros(layers),
        note=np.zeros((ids.size, 4), np.int32),
        noted=np.zeros(1, np.int64),
        weight=_weights(problem),
        rule=REPLICA.index(replica),
        ahead=np.zeros((layers, tokens, gpus) if replica == "foretold" else (0, 0, gpus)),
        random=np.random.default_rng(seed).integers(1, 2**63, 1, np.uint64),
    )
    foretell(problem, state)
    return state


def foretell(problem: Problem, state: Replicas) -> None:
    """Lets all tokens choose anew, after looking ahead where the rule does, as `Foretold` would for this placement."""
    if state.rule == REPLICA.index("foretold"):
        placement = Placement(state.slot, problem.num_experts, problem.topology, problem.slots_of_gpu)
        replica_loops.look_ahead(state, Foretold.of(problem.transitions, placement).on_gpu)
    replica_loops.fill(state)


def _turns(home: NDArray[np.int32]) -> NDArray[np.int32]:
    """int32 [T]: which of its home's tokens each is, plus the home."""
    order = np.argsort(home, kind="stable")
    turn = np.empty(len(home), np.int32)
    turn[order] = np.arange(len(home)) - np.searchsorted(home[order], home[order])
    return turn + home


def _choices_of(ids: NDArray[np.int16], experts: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """begin [L, E+1] and choice [L, T*K] of `Replicas`."""
    layers = len(ids)
    begin, choice = np.zeros((layers, experts + 1), np.int32), np.zeros((layers, ids[0].size), np.int32)
    for layer, chosen in enumerate(ids.reshape(layers, -1)):
        order = np.argsort(chosen, kind="stable")
        order = order[chosen[order] >= 0]
        choice[layer, : len(order)] = order
        begin[layer, 1:] = np.cumsum(np.bincount(chosen[order], minlength=experts))
    return begin, choice


def _weights(problem: Problem) -> NDArray[np.float64]:
    """`weight` of `Replicas`: the objective's, for one transition, row or layer."""
    objective, load = problem.objective, problem.objective.load
    if objective.max_load is not None and load == 0:  # something to be raised
        load = 0.01 * (objective.gpu + objective.node + objective.copies + objective.node_copies)
    layers, tokens, _ = problem.ids.shape
    pair = 1 / max(1.0, sum(float(counts.sum()) for counts in problem.transitions))
    row = 2 / max(1, layers * tokens)
    return np.array(
        [
            objective.gpu * pair,
            objective.node * pair,
            objective.copies * row,
            objective.node_copies * row,
            load / layers,
        ]
    )
