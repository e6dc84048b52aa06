"""From one placement to another with the fewest bytes, in steps that each leave a valid placement.

A GPU's slots are alike, so experts that stay on a GPU keep their slots, and what must travel is, for every GPU and
layer, what it is to hold and does not: no plan moves less. Each comes from a GPU that holds it, of the own node where
there is one, so that no plan crosses nodes less either, unless experts are handed on; among equals the one that has
sent least so far. Where GPUs are alike, which of them is which is free too (`relabel`): the pairing of nodes, and of
GPUs inside nodes, that keeps most experts where they are is an assignment problem over all layers together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from ..placement import Placement


@dataclass(frozen=True)
class Move:
    """One expert of a layer from a slot to a slot of another GPU; slots count over all GPUs."""

    expert: int
    source_gpu: int
    source_slot: int
    target_gpu: int
    target_slot: int


@dataclass(frozen=True)
class Step:
    """Moves of one layer that happen together: all are read before any is written. After it the placement is valid."""

    layer: int
    moves: tuple[Move, ...]


@dataclass(frozen=True)
class Migration:
    """`steps` lead from `source` to `target`, whose slots may be ordered otherwise than those that were asked for."""

    source: Placement
    target: Placement
    steps: tuple[Step, ...]

    @property
    def moved(self) -> int:
        """Experts that travel."""
        return sum(len(step.moves) for step in self.steps)

    @property
    def across(self) -> int:
        """Those of them that travel between nodes."""
        node = self.target.topology.node_of_gpu
        return sum(bool(node[m.source_gpu] != node[m.target_gpu]) for step in self.steps for m in step.moves)

    def seconds(self, expert_bytes: float) -> float:
        """Predicted: the GPU that sends or receives most, over its link inside the node or across."""
        topology = self.target.topology
        node, gpus = topology.node_of_gpu, topology.gpus
        busiest = 0.0
        for link, across in ((topology.links.inside, False), (topology.links.across, True)):
            count = np.zeros((2, gpus))
            for move in (m for step in self.steps for m in step.moves):
                if bool(node[move.source_gpu] != node[move.target_gpu]) == across:
                    count[0, move.source_gpu] += 1
                    count[1, move.target_gpu] += 1
            busiest = max(busiest, link.transfer_s(float(count.max()) * expert_bytes))
        return busiest

    def placements(self) -> Iterator[NDArray[np.int32]]:
        """expert_of_slot [L, S] before the first step and after each."""
        now = self.source.expert_of_slot.copy()
        yield now.copy()
        for step in self.steps:
            for move in step.moves:
                now[step.layer, move.target_slot] = move.expert
            yield now.copy()


def migrate(source: Placement, target: Placement, *, most_moves: int | None = None, relabel: bool = False) -> Migration:
    """The plan from `source` to `target`.

    `most_moves`: experts that one step may move; a cycle of experts that wait for each other's slots stays in one step
    even so. `relabel`: the target's GPUs may change their names, inside nodes and nodes as wholes, where all have the
    same slots and speed: costs stay the same for homes that are spread evenly.

    Raises ValueError where the two are not placements of one model on one topology, or most_moves is below 1.
    """
    for name, one, other in (
        ("num_experts", source.num_experts, target.num_experts),
        ("layers", len(source.expert_of_slot), len(target.expert_of_slot)),
        ("nodes", source.topology.nodes, target.topology.nodes),
        ("gpus_per_node", source.topology.gpus_per_node, target.topology.gpus_per_node),
        ("slots_of_gpu", source.slots_of_gpu.tolist(), target.slots_of_gpu.tolist()),
    ):
        if one != other:
            raise ValueError(f"migrate: {name} of target must be those of source, {one}, got {other}")
    if most_moves is not None and most_moves < 1:
        raise ValueError(f"migrate: most_moves must be at least 1, got {most_moves}")
    if relabel:
        target = relabelled(source, target)
    target = replace(target, expert_of_slot=_kept(source, target))
    sent = np.zeros((2, target.topology.gpus), np.int64)  # inside the node, across
    steps: list[Step] = []
    for layer in range(len(target.expert_of_slot)):
        moves = _moves(source, target, layer, sent)
        steps += [Step(layer, part) for part in _parts(source, target, layer, moves, most_moves)]
    return Migration(source, target, tuple(steps))


def _kept(source: Placement, target: Placement) -> NDArray[np.int32]:
    """The target's experts, those that stay on their GPU in their slots, newcomers rising in what slots are left."""
    ends = np.cumsum(target.slots_of_gpu)
    slots = target.expert_of_slot.copy()
    for now, then in zip(source.expert_of_slot, slots, strict=True):
        for start, end in zip(ends - target.slots_of_gpu, ends, strict=True):
            wanted = then[start:end].copy()
            stays = np.isin(now[start:end], wanted)
            then[start:end] = np.where(stays, now[start:end], -1)
            then[start:end][~stays] = np.sort(wanted[~np.isin(wanted, now[start:end])])
    return slots


def _moves(source: Placement, target: Placement, layer: int, sent: NDArray[np.int64]) -> list[Move]:
    gpu, node = target.gpu_of_slot, target.topology.node_of_gpu
    now, then = source.expert_of_slot[layer], target.expert_of_slot[layer]
    found = []
    for slot in np.flatnonzero(now != then):
        expert, to = int(then[slot]), int(gpu[slot])
        options = np.flatnonzero(now == expert)
        far = node[gpu[options]] != node[to]
        first = np.lexsort((options, sent[far.astype(int), gpu[options]], far))[0]
        at = int(gpu[options[first]])
        sent[int(far[first]), at] += 1
        found.append(Move(expert, at, int(options[first]), to, int(slot)))
    return found


def _parts(
    source: Placement, target: Placement, layer: int, moves: list[Move], most: int | None
) -> Iterator[tuple[Move, ...]]:
    """Cuts a layer's moves into steps. What a step overwrites must stand elsewhere after it, and a source must not have
    been overwritten before: a move takes with it those that bring its slot's expert to where it is to be, unless
    another replica lives on, and it follows those that still read from its target."""
    if most is None or len(moves) <= most:
        if moves:
            yield tuple(moves)
        return
    now = source.expert_of_slot[layer].copy()
    gpu_of_slot = source.gpu_of_slot
    left = {move.target_slot: move for move in moves}
    batch: list[Move] = []
    held = now.copy()  # as it is when the batch is done
    while left:
        closed = min((_closure(slot, left, held) for slot in left), key=lambda part: (len(part), min(part)))
        if batch and len(batch) + len(closed) > most:
            yield tuple(batch)
            batch, now = [], held.copy()
        for slot in sorted(closed):
            move = left.pop(slot)
            batch.append(_from(move, now, gpu_of_slot, target.topology.node_of_gpu))
            held[slot] = move.expert
    yield tuple(batch)


def _closure(slot: int, left: dict[int, Move], held: NDArray[np.int32]) -> list[int]:
    """The target slots that must be written together with `slot`, so that no expert is lost."""
    part: list[int] = []
    after = held.copy()
    open_ = [slot]
    while open_:
        at = open_.pop()
        if at in part:
            continue
        part.append(at)
        lost = int(after[at])
        after[at] = left[at].expert
        if not (after == lost).any():
            open_.append(next(s for s, move in sorted(left.items()) if move.expert == lost and s not in part))
    return part


def _from(move: Move, now: NDArray[np.int32], gpu_of_slot: NDArray[np.int32], node: NDArray[np.int32]) -> Move:
    """The move with a source that still stands: its own, or else one of the expert's slots, of the own node first."""
    if now[move.source_slot] == move.expert:
        return move
    options = np.flatnonzero(now == move.expert)
    far = node[gpu_of_slot[options]] != node[move.target_gpu]
    slot = int(options[np.lexsort((options, far))[0]])
    return replace(move, source_gpu=int(gpu_of_slot[slot]), source_slot=slot)


def relabelled(source: Placement, target: Placement) -> Placement:
    """`target` with its GPUs renamed so that most experts stay where they are in `source`.

    Nodes stay together: GPUs are paired inside every pair of nodes, then nodes by what their best pairing keeps.
    Raises ValueError where GPUs differ in slots or speed.
    """
    topology = target.topology
    if len(set(target.slots_of_gpu.tolist())) > 1 or len(set(topology.speed_of_gpu.tolist())) > 1:
        raise ValueError(
            f"migrate: relabel must be left out where GPUs differ, got slots {target.slots_of_gpu.tolist()} and speeds "
            f"{topology.speed_of_gpu.tolist()}"
        )
    here, there = (p.standing.reshape(-1, topology.gpus).astype(np.int64) for p in (source, target))
    nodes, each = topology.nodes, topology.gpus_per_node
    kept = (there.T @ here).reshape(nodes, each, nodes, each)  # [target's GPU, name in source]
    name = np.zeros((nodes, nodes, each), np.int64)
    worth = np.zeros((nodes, nodes), np.int64)
    for a in range(nodes):
        for b in range(nodes):
            rows, columns = linear_sum_assignment(kept[a, :, b], maximize=True)
            name[a, b], worth[a, b] = columns, kept[a, rows, b, columns].sum()
    _, partner = linear_sum_assignment(worth, maximize=True)
    renamed = np.concatenate([partner[a] * each + name[a, partner[a]] for a in range(nodes)])
    layers = len(target.expert_of_slot)
    by_gpu = target.expert_of_slot.reshape(layers, topology.gpus, -1)
    slots = np.empty_like(by_gpu)
    slots[:, renamed] = by_gpu
    return replace(target, expert_of_slot=slots.reshape(layers, -1))
