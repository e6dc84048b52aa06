"""What a placement costs a trace: every token is walked through its layers, and everything that moves is counted.

The walk's rules, all of them deterministic. A token starts at its home GPU. An expert with replicas is taken

    replica="home"     at the home GPU, if it stands there; else from those on the home's node, else from all, in turn
    replica="follow"   where most of the token's choices in the layer before were; among equals on the node where most
                       were; among equals as above
    replica="foretold" where most were, and by `Foretold` will be in the next layer, on the GPU and on its node
                       together; among equals as above

"in turn": the n-th time that the tokens of home h fall back on replicas of an expert they take number (n + h) of them,
GPUs rising. With "follow" the first layer is taken as with "home". After the layer the token's home

    home="fixed"       stays (what a dispatcher with data parallelism does)
    home="most"        moves to the GPU with most of its choices; among equals stays, else the lowest
    home="foretold"    moves to that of its GPUs where the next layer's experts are most likely to be, by `Foretold`

Moving homes need attention that finds the token's context anywhere (Yao et al., ExFlow, 2024, section 4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from .cost import Cost
from .placement import Placement
from .traces.trace import Trace

REPLICA = ("home", "follow", "foretold")
HOME = ("fixed", "most", "foretold")


def homes_of(trace: Trace, gpus: int) -> NDArray[np.int32]:
    """int32 [T]: whole sequences to GPUs in turn; without sequences, equal runs of tokens."""
    tokens = trace.expert_ids.shape[1]
    if trace.sequence is None:
        return equal_runs(tokens, gpus)
    starts = np.concatenate([[0], np.cumsum(trace.sequence[1:] != trace.sequence[:-1])]) if tokens else np.zeros(0)
    return (starts % gpus).astype(np.int32)


def equal_runs(tokens: int, gpus: int) -> NDArray[np.int32]:
    """int32 [T]: the first T / G tokens to GPU 0, and so on."""
    return (np.arange(tokens) * gpus // max(tokens, 1)).astype(np.int32)


@dataclass(frozen=True, eq=False)
class Foretold:
    """float64 [L-1, E, G]: how likely a choice of the next layer, after this expert, lies on each GPU."""

    on_gpu: NDArray[np.float64]

    @classmethod
    def of(cls, transitions: Any, placement: Placement) -> Foretold:
        """By transition counts, L - 1 matrices [E, E], dense or sparse. An expert lies on each GPU that holds it."""
        table = placement.standing.astype(np.float64)
        found = np.zeros((len(table) - 1, *table.shape[1:]))
        for layer, counts in enumerate(transitions):
            to = np.asarray(counts @ table[layer + 1])
            found[layer] = to / np.maximum(np.asarray(counts.sum(1)).reshape(-1, 1), 1)
        return cls(found)


def walk(
    trace: Trace,
    placement: Placement,
    *,
    homes: NDArray[np.integer] | None = None,
    replica: str = "home",
    home: str = "fixed",
    foretold: Foretold | None = None,
    chosen: NDArray[np.int32] | None = None,
) -> Cost:
    """Counts what `placement` costs `trace`. `homes` [T]: each token's first home; None: `homes_of`.

    `chosen` int32 [L, T, K]: receives the slot of every choice, -1 for none. `foretold` is what home="foretold" and
    replica="foretold" go by: counted on another trace, they choose without knowing what comes.

    Raises ValueError where placement and trace do not fit, or a rule or home is not known.
    """
    homes = _checked(trace, placement, homes, replica, home, foretold, chosen)
    topology, ids = placement.topology, trace.expert_ids
    layers, tokens, top_k = ids.shape
    gpus, nodes = topology.gpus, topology.nodes
    slots = placement.expert_of_slot
    order = np.argsort(slots, axis=1, kind="stable").astype(np.int32)  # slots by expert, GPUs rising
    first = np.zeros((layers, placement.num_experts + 1), np.int32)
    np.cumsum(placement.replicas, axis=1, out=first[:, 1:])
    cost = Cost(
        tokens,
        load=np.zeros((layers, gpus), np.int64),
        rows=np.zeros((layers, gpus, gpus), np.int64),
        node_rows=np.zeros((layers, gpus, nodes), np.int64),
        back=np.zeros((layers, gpus, gpus), np.int64),
        node_back=np.zeros((layers, nodes, gpus), np.int64),
        transitions=np.zeros(layers - 1, np.int64),
        cross_gpu=np.zeros(layers - 1, np.int64),
        cross_node=np.zeros(layers - 1, np.int64),
        topology=topology,
    )
    at, before = homes.astype(np.int32), np.full((tokens, top_k), -1, np.int32)
    for layer in range(layers):
        tell = np.zeros((0, gpus)) if foretold is None or layer == layers - 1 else foretold.on_gpu[layer]
        picked = np.full((tokens, top_k), -1, np.int32)
        _choose(
            ids[layer], trace.none, first[layer], order[layer], placement.gpu_of_slot, topology.node_of_gpu, at, before,
            REPLICA.index(replica), tell, np.zeros((gpus, placement.num_experts), np.int64), picked,
        )  # fmt: skip
        on = np.where(picked < 0, -1, placement.gpu_of_slot[picked]).astype(np.int32)
        then = at.copy()
        if home != "fixed":
            _move(ids[layer], on, tell if home == "foretold" else tell[:0], then)
        _count(on, at, then, topology.node_of_gpu, cost.load[layer], cost.rows[layer], cost.node_rows[layer],
               cost.back[layer], cost.node_back[layer])  # fmt: skip
        if layer:
            found = _crossings(before, on, topology.node_of_gpu)
            cost.transitions[layer - 1], cost.cross_gpu[layer - 1], cost.cross_node[layer - 1] = found
        if chosen is not None:
            chosen[layer] = picked
        at, before = then, on
    return cost


def _checked(trace, placement, homes, replica, home, foretold, chosen) -> NDArray[np.integer]:
    layers, tokens, _ = trace.expert_ids.shape
    gpus = placement.topology.gpus
    if len(placement.expert_of_slot) != layers:
        raise ValueError(f"walk: placement must have the trace's {layers} layers, got {len(placement.expert_of_slot)}")
    if placement.num_experts != trace.num_experts:
        raise ValueError(f"walk: placement must have {trace.num_experts} experts, got {placement.num_experts}")
    for name, value, known in (("replica", replica, REPLICA), ("home", home, HOME)):
        if value not in known:
            raise ValueError(f"walk: {name} must be one of {', '.join(known)}, got {value!r}")
    if ("foretold" in (home, replica)) != (foretold is not None):
        raise ValueError(
            f"walk: foretold must be given with home or replica 'foretold' and only then, got {home!r}, {replica!r}"
        )
    if chosen is not None and (chosen.shape != trace.expert_ids.shape or chosen.dtype != np.int32):
        raise ValueError(f"walk: chosen must be int32 {trace.expert_ids.shape}, got {chosen.dtype} {chosen.shape}")
    homes = homes_of(trace, gpus) if homes is None else np.asarray(homes)
    if homes.shape != (tokens,) or homes.dtype.kind not in "iu":
        raise ValueError(f"walk: homes must be integers [T={tokens}], got {homes.dtype} {homes.shape}")
    if tokens and (homes.min() < 0 or homes.max() >= gpus):
        raise ValueError(f"walk: homes must be in 0 .. {gpus - 1}, got {homes.min()} .. {homes.max()}")
    return homes


@njit(cache=True)
def _choose(ids, none, first, order, gpu_of_slot, node_of_gpu, at, before, rule, tell, turns, picked):
    """picked [T, K]: the slot of each choice. `rule`: its number in REPLICA. tell [E, G], or [0, G] in the last layer.
    turns [G, E] counts how often a home fell back on replicas in turn."""
    tokens, top_k = ids.shape
    gpus = len(node_of_gpu)
    rank = np.zeros(gpus)  # where a replica is best; the same everywhere with "home"
    for t in range(tokens):
        home, ranked = at[t], rule == 0
        for k in range(top_k):
            e = np.int64(ids[t, k])
            if e == none:
                continue
            begin, end = first[e], first[e + 1]
            if end - begin == 1:
                picked[t, k] = order[begin]
                continue
            if not ranked:
                _rank(ids[t], none, before[t], node_of_gpu, rule, tell, rank)
                ranked = True
            best, here, near, among = -1.0, -1, 0, 0
            for i in range(begin, end):
                best = max(best, rank[gpu_of_slot[order[i]]])
            for i in range(begin, end):  # of the best, the home's, else those of its node, else all
                gpu = gpu_of_slot[order[i]]
                if rank[gpu] != best:
                    continue
                among += 1
                if gpu == home:
                    here = order[i]
                if node_of_gpu[gpu] == node_of_gpu[home]:
                    near += 1
            if here >= 0:
                picked[t, k] = here
                continue
            if near > 0:
                among = near
            turn = 0
            if among > 1:
                turn = (turns[home, e] + home) % among
                turns[home, e] += 1
            for i in range(begin, end):
                gpu = gpu_of_slot[order[i]]
                if rank[gpu] != best or (near > 0 and node_of_gpu[gpu] != node_of_gpu[home]):
                    continue
                if turn == 0:
                    picked[t, k] = order[i]
                    break
                turn -= 1


@njit(cache=True)
def _rank(ids, none, before, node_of_gpu, rule, tell, rank):
    """rank [G]: how much of one token's layer before, and with rule 2 of its next, is on each GPU and on its node."""
    gpus, top_k = len(node_of_gpu), len(ids)
    rank[:] = 0
    for k in range(top_k):
        if rule == 2 and len(tell) and ids[k] != none:
            rank += tell[ids[k]]
        if before[k] >= 0:
            rank[before[k]] += 1
    node = np.zeros(node_of_gpu.max() + 1)
    for g in range(gpus):
        node[node_of_gpu[g]] += rank[g]
    for g in range(gpus):
        rank[g] = rank[g] * (top_k * gpus + 1 if rule == 1 else 1) + node[node_of_gpu[g]]


@njit(cache=True)
def _move(ids, on, tell, home):
    """Each token's next home, in place. `tell` [E, G], or [0, G] for the GPU with most choices."""
    tokens, top_k = on.shape
    gpus = tell.shape[1]
    score = np.zeros(gpus)
    for t in range(tokens):
        score[:] = 0
        for k in range(top_k):
            if on[t, k] >= 0:
                score[on[t, k]] += 1
        if tell.shape[0] > 0:
            for g in range(gpus):
                if score[g] > 0:  # only where the token has been: the row comes home for nothing
                    score[g] = 1e-9 * score[g] + 1e-12
                    for k in range(top_k):
                        if on[t, k] >= 0:
                            score[g] += tell[ids[t, k], g]
        best = home[t]
        for g in range(gpus):
            if score[g] > score[best]:
                best = g
        home[t] = best


@njit(cache=True)
def _count(on, at, then, node_of_gpu, load, rows, node_rows, back, node_back):
    tokens, top_k = on.shape
    seen = np.full(len(node_of_gpu), -1, np.int64)
    seen_node = np.full(node_of_gpu.max() + 1, -1, np.int64)
    for t in range(tokens):
        for k in range(top_k):
            g = on[t, k]
            if g < 0:
                continue
            load[g] += 1
            if seen[g] != t:
                seen[g] = t
                rows[at[t], g] += 1
                back[g, then[t]] += 1
            n = node_of_gpu[g]
            if seen_node[n] != t:
                seen_node[n] = t
                node_rows[at[t], n] += 1
                node_back[n, then[t]] += 1


@njit(cache=True)
def _crossings(before, on, node_of_gpu):
    tokens, top_k = on.shape
    pairs, gpu, node = 0, 0, 0
    for t in range(tokens):
        for a in range(top_k):
            if before[t, a] < 0:
                continue
            for b in range(top_k):
                if on[t, b] < 0:
                    continue
                pairs += 1
                gpu += before[t, a] != on[t, b]
                node += node_of_gpu[before[t, a]] != node_of_gpu[on[t, b]]
    return pairs, gpu, node
