"""Search over the tokens themselves: experts of a layer change places until few rows have to be copied.

Transitions count pairs of choices; what travels are rows, one for each GPU that a token's experts lie on. Those are no
sum over pairs, so this search keeps the tokens (`Problem.ids`) and counts them anew for each swap.

A row stays where the token's home is. A fixed home counts as one more choice of the token, in each layer the same. A
home that moves is hit more often the more transitions stay on their GPU: of K choices that each lie at home with
probability p, none does with (1 - p)^K, so that
at v visits per token and layer one more per cent of transitions that stay is worth K (1 - v)^(1 - 1/K) per cent of
visits. The search takes transitions at that price, and v from walking the homes now and then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..problem import Objective, Problem
from ..walk import _move
from . import token_loops
from .search import search
from .token_loops import State

ROUNDS, LAST = 150, 20  # of an annealing, and those of them that only go down
LOOK = 15  # rounds from one look at the homes and the exact score to the next
HOT, MILD = 0.5, 0.15  # first temperatures, over what a swap changes on average
TUNINGS, SHORTER = 6, 8  # annealings that find the load's weight, and how much shorter they are


def improve_copies(
    problem: Problem,
    gpu_of_expert: NDArray[np.integer] | None = None,
    *,
    seed: int = 0,
    proposals: int = 4_000_000,
    heat: float | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> NDArray[np.int32]:
    """int32 [L, E]: the GPU of each expert, by annealed swaps from `gpu_of_expert`. None: one drawn from `seed` or,
    where homes move and nodes have to fit together over the layers, what `search` makes of the transitions.

    The score is the objective's (`score`). Where it has a `max_load`, the load's weight follows the load while the
    search goes on, and the best that keeps to it is returned, else the one with the least load. Never worse than the
    start, in that order. `proposals`: swaps tried in all; `heat`: the first temperature, in mean changes by a swap
    (None: hot for a start by chance, mild for another).
    `stop` is asked before each layer of 150 rounds: once true, the best so far is returned. The same arguments give the
    same answer. Cost: about T / 60 ns a proposal.

    Raises ValueError where slots are not as many as experts, or the start does not fit slots, pins or groups.
    """
    by_chance = gpu_of_expert is None and (problem.objective.home == "fixed" or problem.topology.nodes == 1)
    heat = (HOT if by_chance else MILD) if heat is None else heat
    start = first_places(problem, seed) if gpu_of_expert is None else np.array(gpu_of_expert, np.int32)
    if stop():
        _checked(problem, start)
        return start
    state = state_of(problem, start, seed)
    if gpu_of_expert is None and not by_chance and proposals:
        start = _by_transitions(problem, seed, proposals, stop)
        state = state_of(problem, start, seed)
    best = [(_look(problem, state), start)]
    if proposals and problem.objective.max_load is not None:
        state.weight[4] = _tuned(problem, start, seed, heat, proposals // SHORTER, stop)
    if proposals:
        _anneal(problem, state, heat, proposals, stop, best, problem.objective.max_load is not None)
    return best[0][1]


def _by_transitions(problem: Problem, seed: int, proposals: int, stop: Callable[[], bool]) -> NDArray[np.int32]:
    """Where homes move, rows follow transitions: a placement with few that cross."""
    objective = problem.objective
    near = Objective(
        gpu=objective.gpu + objective.copies,
        node=objective.node + objective.node_copies,
        load=objective.load,
        max_load=objective.max_load,
    )
    return search(replace(problem, objective=near), proposals=proposals, seed=seed, stop=stop)


def _anneal(
    problem: Problem,
    state: State,
    heat: float,
    proposals: int,
    stop: Callable[[], bool],
    best: list[tuple[tuple[float, float], NDArray[np.int32]]],
    adapt: bool,
) -> None:
    """Anneals the state in place. `best` holds one (rank, placement), replaced by what is better. With
    `adapt` the load's weight rises while the load is above `max_load`, from half the way on."""
    each = -(-proposals // (ROUNDS * problem.layers))
    first = heat * token_loops.mean_change(state, 200)
    for turn in range(ROUNDS):
        temperature = first * 0.01 ** (turn / (ROUNDS - LAST)) if turn < ROUNDS - LAST else 0.0
        for layer in range(problem.layers):
            if stop():
                return
            token_loops.anneal(state, layer, temperature, each)
        last = turn >= ROUNDS - LAST
        if turn % (3 if last else LOOK) == 0 or turn == ROUNDS - 1:
            found = _look(problem, state)
            if found < best[0][0]:
                best[0] = (found, state.gpu.copy())
            if adapt and turn > ROUNDS // 2:
                state.weight[4] *= (1.4 if last else 1.15) if found[0] > 0 else 0.95


def _tuned(
    problem: Problem, start: NDArray[np.int32], seed: int, heat: float, proposals: int, stop: Callable[[], bool]
) -> float:
    """The load's weight, per layer, at which a short annealing just keeps to `max_load`; the objective's at least."""
    objective, least = problem.objective, _weights(problem)[4]
    most = np.inf if objective.max_load is None else objective.max_load
    scale = objective.gpu + objective.node + objective.copies + objective.node_copies
    weight = max(least, scale / problem.layers)
    low, high = 0.0, 0.0  # 0: not known yet
    for _ in range(TUNINGS):
        if stop():
            break
        state = state_of(problem, start, seed)
        _look(problem, state)
        state.weight[4] = weight
        _anneal(problem, state, heat, proposals, stop, [((0.0, -np.inf), start)], False)
        if mean_load(state) > most:
            low = weight
        else:
            high = weight
            if weight == least:
                break
        weight = np.sqrt(low * high) if low and high else max(least, weight * (3 if low else 1 / 3))
    return high or 3 * low or least


def score(problem: Problem, gpu_of_expert: NDArray[np.integer]) -> dict[str, float]:
    """What the objective weighs, on the problem's tokens, transitions and loads, and its `score`: their sum.

    It is what a walk counts, from the problem's homes.
    """
    state = state_of(problem, np.array(gpu_of_expert, np.int32))
    return _parts(problem, state, _visits(problem, state))


def mean_load(state: State) -> float:
    """max / mean over GPUs in the worst scenario, averaged over layers."""
    return float(state.load.max((0, 2)).mean())


def _look(problem: Problem, state: State) -> tuple[float, float]:
    """To be minimised: the load beyond what is wished for, then the score. Prices transitions by the visits found."""
    most, visits = problem.objective.max_load, _visits(problem, state)
    state.weight[:2] = _transition_weights(problem, visits)
    over = 0.0 if most is None else max(0.0, mean_load(state) - most)
    return over, _parts(problem, state, visits)["score"]


def _parts(problem: Problem, state: State, visits: tuple[float, float]) -> dict[str, float]:
    objective, parts = problem.objective, {}
    total, every = _transitions(problem), max(1, problem.ids.shape[0] * problem.ids.shape[1])
    node = state.node_of_gpu[state.gpu]
    for name, on, at in (("gpu", state.on_gpu, state.gpu), ("node", state.on_node, node)):
        same = float(np.take_along_axis(on, at[:, :, None], 2).sum()) / 2  # each transition stands at both its ends
        parts[name] = (total - same) / total if total else 0.0
    served = int((problem.ids >= 0).any(2).sum())  # tokens that leave for experts, layers added up
    for name, any_, visited in (("copies", state.any, visits[0]), ("node_copies", state.node_any, visits[1])):
        rows = token_loops.ones(any_) / every
        if objective.home == "fixed":
            parts[name] = 2 * max(0.0, rows - 1)  # but for the home itself
        else:
            parts[name] = 2 * rows - visited - served / every
    parts["load"] = mean_load(state)
    return parts | {"score": sum(getattr(objective, name) * value for name, value in parts.items())}


def _visits(problem: Problem, state: State) -> tuple[float, float]:
    """How often a token and layer find a choice on the home GPU, and on the home's node, where homes move."""
    (layers, tokens, _), gpus = problem.ids.shape, problem.topology.gpus
    if problem.objective.home == "fixed" or not tokens:
        return 0.0, 0.0
    home, found = problem.home.copy(), np.zeros(2)
    for layer, ids in enumerate(problem.ids):
        on = np.where(ids < 0, -1, state.gpu[layer][ids]).astype(np.int32)
        node = np.where(ids < 0, -1, state.node_of_gpu[on])
        found += (on == home[:, None]).any(1).sum(), (node == state.node_of_gpu[home][:, None]).any(1).sum()
        tell = np.zeros((0, gpus))
        if problem.objective.home == "foretold" and layer + 1 < layers:
            counts = state.after[layer]
            tell = counts @ np.eye(gpus)[state.gpu[layer + 1]] / np.maximum(counts.sum(1), 1)[:, None]
        _move(ids, on, tell, home)
    return float(found[0]) / (layers * tokens), float(found[1]) / (layers * tokens)


def first_places(problem: Problem, seed: int) -> NDArray[np.int32]:
    """int32 [L, E]: experts on GPUs by chance, pins and groups kept. Groups go whole to the node with most room, those
    with pins first. Raises ValueError where pins leave no room.
    """
    rng, topology = np.random.default_rng(seed), problem.topology
    found = problem.pins.astype(np.int32)
    for layer, gpu in enumerate(found):
        room = problem.slots_of_gpu - np.bincount(gpu[gpu >= 0], minlength=topology.gpus)
        if room.min() < 0:
            raise ValueError(f"first_places: pins must fit {problem.slots_of_gpu.tolist()} slots in layer {layer}")
        groups = gpu.reshape(problem.groups, -1)
        for number in np.argsort(-groups.max(1), kind="stable"):
            group = groups[number]
            where = np.ones(topology.gpus, bool)
            if problem.groups > 1:
                by_node = np.bincount(topology.node_of_gpu, room)
                node = topology.node_of_gpu[group.max()] if group.max() >= 0 else by_node.argmax()
                where = topology.node_of_gpu == node
            missing, open_ = np.flatnonzero(group < 0), np.repeat(np.arange(topology.gpus), room * where)
            if len(open_) < len(missing):
                raise ValueError(
                    f"first_places: pins must leave {len(missing)} slots to the other experts"
                    f"{' of a group on a node' * (problem.groups > 1)} in layer {layer}, got {len(open_)}"
                )
            group[missing] = rng.permutation(open_)[: len(missing)]
            room -= np.bincount(group[missing], minlength=topology.gpus)
    return found


def _checked(problem: Problem, gpu_of_expert: NDArray[np.integer]) -> None:
    """ValueError unless `gpu_of_expert` is a placement of the problem without replicas."""
    shape, topology, slots = (problem.layers, problem.num_experts), problem.topology, problem.slots_of_gpu.tolist()
    if problem.spare:
        raise ValueError(f"copies: slots must be as many as experts, {problem.num_experts}, got {problem.spare} more")
    if gpu_of_expert.shape != shape:
        raise ValueError(f"copies: gpu_of_expert must be [L, E] = {shape}, got {gpu_of_expert.shape}")
    if gpu_of_expert.size and gpu_of_expert.min() < 0:
        raise ValueError(f"copies: gpu_of_expert must be GPUs from 0 on, got {gpu_of_expert.min()}")
    for layer, (gpu, pinned) in enumerate(zip(gpu_of_expert, problem.pins, strict=True)):
        held = np.bincount(gpu, minlength=topology.gpus).tolist()
        if held != slots:
            raise ValueError(f"copies: gpu_of_expert must fill {slots} slots in layer {layer}, got {held}")
        if ((pinned >= 0) & (pinned != gpu)).any():
            raise ValueError(f"copies: gpu_of_expert must keep the pins, got others in layer {layer}")
        node = topology.node_of_gpu[gpu].reshape(problem.groups, -1)
        if problem.groups > 1 and (node != node[:, :1]).any():
            raise ValueError(f"copies: gpu_of_expert must keep groups on one node, got others in layer {layer}")


def state_of(problem: Problem, gpu_of_expert: NDArray[np.int32], seed: int = 0) -> State:
    """All that the loops need. Raises ValueError as `improve_copies`."""
    _checked(problem, gpu_of_expert)
    topology, ids = problem.topology, problem.ids
    (layers, experts), words = gpu_of_expert.shape, ids.shape[1] // 64 + 1
    gpus, nodes = topology.gpus, topology.nodes
    slot = np.argsort(gpu_of_expert, 1, kind="stable").astype(np.int32)
    free = problem.pins < 0
    speed = topology.speed_of_gpu
    after = np.zeros((max(0, layers - 1), experts, experts))
    for layer, counts in enumerate(problem.transitions):
        after[layer] = counts.toarray() if hasattr(counts, "toarray") else counts
    home, node_home = _homes(problem, words)
    state = State(
        gpu=gpu_of_expert.copy(),
        slot=slot,
        place=np.argsort(slot, 1).astype(np.int32),
        start=np.concatenate([[0], np.cumsum(problem.slots_of_gpu)]).astype(np.int32),
        node_of_gpu=topology.node_of_gpu,
        free=np.argsort(~free, 1, kind="stable").astype(np.int32),
        movable=free.sum(1),
        grouped=problem.groups > 1,
        member=_members(ids, experts, words),
        home=home,
        node_home=node_home,
        one=np.zeros((layers, gpus, words), np.uint64),
        any=np.zeros((layers, gpus, words), np.uint64),
        node_one=np.zeros((layers, nodes, words), np.uint64),
        node_any=np.zeros((layers, nodes, words), np.uint64),
        share=problem.loads,
        load=np.zeros((len(problem.loads), layers, gpus)),
        scale=speed.sum() / speed,
        after=after,
        on_gpu=np.zeros((layers, experts, gpus)),
        on_node=np.zeros((layers, experts, nodes)),
        weight=_weights(problem),
        random=np.random.default_rng(seed).integers(1, 2**63, 1, np.uint64),
    )
    token_loops.fill(state)
    return state


def _members(ids: NDArray[np.integer], experts: int, words: int) -> NDArray[np.uint64]:
    """uint64 [L, E, W]: bit t of an expert is set where token t uses it."""
    member = np.zeros((len(ids), experts, words), np.uint64)
    for layer, chosen in enumerate(ids):
        uses = np.zeros((experts, words * 64), bool)
        token, k = np.nonzero(chosen >= 0)
        uses[chosen[token, k], token] = True
        member[layer] = _packed(uses)
    return member


def _homes(problem: Problem, words: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """uint64 [G, W] and [N, W]: bit t is set where token t's fixed home is; no bit where homes move."""
    home, topology = problem.home, problem.topology
    at = np.zeros((topology.gpus, words * 64), bool)
    if problem.objective.home == "fixed":
        at[home, np.arange(len(home))] = True
    on_node = np.logical_or.reduceat(at, np.arange(0, topology.gpus, topology.gpus_per_node))
    return _packed(at), _packed(on_node)


def _packed(bits: NDArray[np.bool_]) -> NDArray[np.uint64]:
    return np.packbits(bits, axis=1, bitorder="little").view("<u8")


def _transitions(problem: Problem) -> float:
    return sum(float(counts.sum()) for counts in problem.transitions)


def _weights(problem: Problem) -> NDArray[np.float64]:
    """`weight` of `State`: the objective's, for one transition, token or layer."""
    objective = problem.objective
    row = 2 / max(1, problem.ids.shape[0] * problem.ids.shape[1])
    rows = np.array([objective.copies, objective.node_copies]) * row
    return np.array([*_transition_weights(problem, (0.0, 0.0)), *rows, objective.load / problem.layers])


def _transition_weights(problem: Problem, visits: tuple[float, float]) -> NDArray[np.float64]:
    """The first two of them: what one transition that stays on its GPU, or node, is worth at that many visits."""
    objective, top_k = problem.objective, problem.ids.shape[2]
    worth = np.array([objective.gpu, objective.node])
    if objective.home != "fixed" and top_k:
        price = [transition_price(top_k, v) for v in visits]
        worth += np.array([objective.copies, objective.node_copies]) * price
    return worth / max(1.0, _transitions(problem))


def transition_price(top_k: int, visits: float) -> float:
    """How much a token's visits of its home, per layer, rise with the share of transitions that stay on their GPU."""
    return 2 * top_k * (1 - visits) ** (1 - 1 / top_k)
