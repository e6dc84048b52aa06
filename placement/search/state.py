"""Placements without replicas, as the GPU of each expert: what they score, and what the search knows of them.

Everything here asks for S = E: as many slots as experts in every layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..problem import Problem
from .loops import add_rows, crossings


def to_slots(gpu_of_expert: NDArray[np.integer]) -> NDArray[np.int32]:
    """int32 [L, S]: the expert of each slot, of gpu_of_expert [L, E]; a GPU's experts rising."""
    return np.argsort(gpu_of_expert, axis=1, kind="stable").astype(np.int32)


def from_slots(expert_of_slot: NDArray[np.integer], gpu_of_slot: NDArray[np.integer]) -> NDArray[np.int32]:
    """int32 [L, E]: the GPU of each expert, of expert_of_slot [L, S] with S = E and gpu_of_slot [S]."""
    found = np.empty(expert_of_slot.shape, np.int32)
    np.put_along_axis(found, expert_of_slot, np.broadcast_to(gpu_of_slot, expert_of_slot.shape), axis=1)
    return found


def dense(matrix: Any) -> NDArray[np.int64]:
    """[E, E] of a matrix, sparse or not."""
    return matrix.toarray() if hasattr(matrix, "toarray") else np.asarray(matrix)


class Counts:
    """The transition counts, stacked as the loops take them: `after` [L-1, E, E], `before` transposed; `total` of all.

    int32 where no sum over an expert can overflow it, else int64.
    """

    def __init__(self, problem: Problem) -> None:
        experts = problem.num_experts
        after = np.zeros((problem.layers - 1, experts, experts), np.int64)
        for layer, matrix in enumerate(problem.transitions):
            after[layer] = dense(matrix)
        self.total = max(int(after.sum()), 1)
        small = self.total < 2**31 or max(after.sum(axis).max(initial=0) for axis in (1, 2)) < 2**30
        self.after = after.astype(np.int32) if small else after
        self.before = np.ascontiguousarray(self.after.transpose(0, 2, 1))

    def near(self, at: NDArray[np.int32], layer: int, gpus: int, ahead: bool = True) -> NDArray[np.integer]:
        """[G, E]: transitions between each expert of `layer` and the neighbours' experts on each GPU, at [L, E];
        without `ahead` those from the layer before alone."""
        found = np.zeros((gpus, at.shape[1]), self.after.dtype)
        if layer > 0:
            add_rows(self.after[layer - 1], at[layer - 1], found)
        if ahead and layer + 1 < len(at):
            add_rows(self.before[layer], at[layer + 1], found)
        return found


@dataclass(frozen=True)
class Score:
    """Shares of transitions that cross GPUs and nodes, the load as in `Objective`, and their weighted sum.

    `excess`: how far the load is above the objective's max_load, 0 where it is not or none is given.
    """

    gpu: float
    node: float
    load: float
    total: float
    excess: float

    @property
    def order(self) -> tuple[float, float]:
        """What of two placements is better: first the load that is allowed, then the score."""
        return (round(self.excess, 9), self.total)


def score(problem: Problem, gpu_of_expert: NDArray[np.integer], counts: Counts | None = None) -> Score:
    """Counted anew from the problem's numbers, or from `counts`, where they are at hand; gpu_of_expert [L, E]."""
    at, counts = gpu_of_expert, counts or Counts(problem)
    gpu, node = crossings(counts.after, np.ascontiguousarray(at, np.int32), problem.topology.node_of_gpu)
    peaks = times(problem, at).max((0, 2))
    used = problem.loads.any((0, 2))
    load = float(peaks[used].mean()) if used.any() else 1.0
    weights, total = problem.objective, counts.total
    worth = weights.gpu * gpu / total + weights.node * node / total + weights.load * load
    return Score(gpu / total, node / total, load, worth, max(0.0, load - (weights.max_load or np.inf)))


def times(problem: Problem, gpu_of_expert: NDArray[np.integer]) -> NDArray[np.float64]:
    """float64 [Q, L, G]: each GPU's load over its speed, over the mean; 0 in a layer without load."""
    gpus = problem.topology.gpus
    found = np.zeros((*problem.loads.shape[:2], gpus))
    for q, loads in enumerate(problem.loads):
        for layer, load in enumerate(loads):
            found[q, layer] = np.bincount(gpu_of_expert[layer], load, gpus)
    return found * gpus / problem.topology.speed_of_gpu


def check_problem(problem: Problem, who: str) -> None:
    """Raises ValueError where `who` cannot serve: spare slots, copies counted, pins or groups that cannot be kept."""
    layers, experts, gpus = problem.layers, problem.num_experts, problem.topology.gpus
    weights, node_of, slots = problem.objective, problem.topology.node_of_gpu, problem.slots_of_gpu
    if problem.spare:
        raise ValueError(f"{who}: slots must be as many as experts, {experts}, got {experts + problem.spare}")
    if weights.copies or weights.node_copies:
        raise ValueError(f"{who}: copies must have no weight, got {weights.copies} and {weights.node_copies}")
    if problem.pins.shape != (layers, experts):
        raise ValueError(f"{who}: pins must be [L={layers}, E={experts}], got {problem.pins.shape}")
    if problem.pins.min(initial=-1) < -1 or problem.pins.max(initial=-1) >= gpus:
        raise ValueError(
            f"{who}: pins must be GPUs below {gpus}, or -1, got {problem.pins.min()} .. {problem.pins.max()}"
        )
    for layer, pins in enumerate(problem.pins):
        held = np.bincount(pins[pins >= 0], minlength=gpus)
        if (held > slots).any():
            g = int(np.argmax(held - slots))
            raise ValueError(f"{who}: pins of layer {layer} must fit GPU {g}'s {slots[g]} slots, got {held[g]}")
    if problem.groups == 1:
        return
    if experts % problem.groups:
        raise ValueError(f"{who}: groups must divide the experts, {experts}, got {problem.groups}")
    size = experts // problem.groups
    room = np.bincount(node_of, slots)
    if (room % size).any():
        raise ValueError(
            f"{who}: groups must fill each node, {size} experts each, got {room.astype(int)} slots of nodes"
        )
    for layer, pins in enumerate(problem.pins):
        nodes = np.where(pins < 0, -1, node_of[pins]).reshape(problem.groups, size)
        wanted = nodes.max(1)
        if ((nodes >= 0) & (nodes != wanted[:, None])).any():
            raise ValueError(f"{who}: pins of a group must be on one node, got several in layer {layer}")
        if (np.bincount(wanted[wanted >= 0], minlength=len(room)) * size > room).any():
            raise ValueError(f"{who}: pins of layer {layer} must leave each node room for its groups, got too many")


def check_start(problem: Problem, at: NDArray[np.integer], who: str) -> NDArray[np.int32]:
    """`at` [L, E] as int32, if it is a placement that the problem allows. Raises ValueError / TypeError."""
    at = np.asarray(at)
    shape, gpus = (problem.layers, problem.num_experts), problem.topology.gpus
    if at.dtype.kind not in "iu":
        raise TypeError(f"{who}: start must be integers, got {at.dtype}")
    if at.shape != shape:
        raise ValueError(f"{who}: start must be [L, E] = {shape}, got {at.shape}")
    if at.min() < 0 or at.max() >= gpus:
        raise ValueError(f"{who}: start must have GPUs below {gpus}, got {at.min()} .. {at.max()}")
    for layer, row in enumerate(at):
        if (np.bincount(row, minlength=gpus) != problem.slots_of_gpu).any():
            raise ValueError(f"{who}: start must fill the slots of layer {layer}, got {np.bincount(row).tolist()}")
    if ((problem.pins >= 0) & (problem.pins != at)).any():
        raise ValueError(f"{who}: start must keep the pins, got others")
    if problem.groups > 1:
        nodes = problem.topology.node_of_gpu[at].reshape(problem.layers, problem.groups, -1)
        if (nodes != nodes[:, :, :1]).any():
            raise ValueError(f"{who}: start must keep each group on one node, got several")
    return at.astype(np.int32)
