"""Slots: what every placement method is given, checked once, and how loaded a plan leaves the GPUs.

GPU g owns `slots_of_gpu[g]` consecutive slots, GPUs in order; a plan is `expert_of_slot`, int64 [S] for one layer or
[L, S]. Tokens of an expert with several replicas are split evenly between them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Pin = tuple[int, int, int]


def gpu_of_slot(slots_of_gpu: ArrayLike) -> NDArray[np.int64]:
    """int64 [S]: the GPU of each slot."""
    slots = np.asarray(slots_of_gpu, np.int64)
    return np.repeat(np.arange(len(slots)), slots)


def gpu_load(load: ArrayLike, expert_of_slot: ArrayLike, gpus: ArrayLike, num_gpus: int) -> NDArray[np.float64]:
    """float64 [L, G]: load [L, E] that each GPU gets, replicas sharing evenly. `gpus`: the GPU [S] of each slot."""
    plan, weight = np.asarray(expert_of_slot), np.asarray(load, np.float64)
    found = np.zeros((len(plan), num_gpus))
    for layer, row in enumerate(plan):
        share = weight[layer] / np.maximum(np.bincount(row, minlength=weight.shape[1]), 1)
        found[layer] = np.bincount(np.asarray(gpus), share[row], num_gpus)
    return found


def checked_load(who: str, load: ArrayLike) -> NDArray[np.float64]:
    """load as float64 [L, E]; ValueError where it is not a table of finite numbers that are not negative."""
    given = np.asarray(load)
    if given.ndim != 2 or given.shape[1] == 0:
        raise ValueError(f"{who}: load must be [L, E] with E > 0, got shape {given.shape}")
    if given.dtype.kind not in "iuf":
        raise TypeError(f"{who}: load must be numbers, got {given.dtype}")
    bad = ~np.isfinite(given) | (given < 0)
    if bad.any():
        layer, expert = np.argwhere(bad)[0]
        at = f"{given[layer, expert]} at layer {layer}, expert {expert}"
        raise ValueError(f"{who}: load must be finite and not negative, got {at}")
    return given.astype(np.float64)


def checked_slots(who: str, slots_of_gpu: ArrayLike, experts: int, distinct: bool = True) -> NDArray[np.int64]:
    """slots_of_gpu as int64 [G]; ValueError where the slots do not hold every expert, or, with `distinct`, where a GPU
    has more slots than there are experts, so that one would be there twice."""
    slots = np.asarray(slots_of_gpu)
    if slots.ndim != 1 or not slots.size:
        raise ValueError(f"{who}: slots_of_gpu must be [G] with G > 0, got shape {slots.shape}")
    if slots.dtype.kind not in "iu":
        raise TypeError(f"{who}: slots_of_gpu must be whole numbers, got {slots.dtype}")
    if slots.min() < 0:
        raise ValueError(f"{who}: slots_of_gpu must not be negative, got {slots.min()}")
    if slots.sum() < experts:
        raise ValueError(f"{who}: slots_of_gpu must hold each of {experts} experts, got {slots.sum()} slots")
    if distinct and slots.max() > experts:
        rule = f"at most E={experts}, or a GPU would hold an expert twice"
        raise ValueError(f"{who}: slots_of_gpu must be {rule}, got {slots.max()}")
    return slots.astype(np.int64)


def checked_nodes(who: str, nodes: int, gpus: int) -> int:
    """nodes; ValueError where it does not divide the GPUs, which stand node by node."""
    if nodes < 1 or gpus % nodes:
        raise ValueError(f"{who}: nodes must divide the {gpus} GPUs, got {nodes}")
    return nodes


def checked_speed(who: str, speed: ArrayLike | None, gpus: int) -> NDArray[np.float64]:
    """speed as float64 [G], all 1 for None; ValueError where one is not positive and finite."""
    if speed is None:
        return np.ones(gpus)
    given = np.asarray(speed, np.float64)
    if given.shape != (gpus,):
        raise ValueError(f"{who}: speed must be [G={gpus}], got shape {given.shape}")
    if not (np.isfinite(given) & (given > 0)).all():
        raise ValueError(f"{who}: speed must be positive and finite, got {given.tolist()}")
    return given


def checked_pins(
    who: str, pins: Sequence[Pin] | None, layers: int, experts: int, slots: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """bool [L, E, G]: the replicas that must be there. `pins`: triples (layer, expert, gpu).

    Raises ValueError where one names what is not there, or where the pins leave no room for the other experts.
    """
    pinned = np.zeros((layers, experts, len(slots)), np.bool_)
    for pin in pins or ():
        if len(pin) != 3 or not all(0 <= at < size for at, size in zip(pin, pinned.shape, strict=True)):
            rule = f"(layer, expert, gpu) below {pinned.shape}"
            raise ValueError(f"{who}: pins must be {rule}, got {tuple(pin)}")
        pinned[tuple(pin)] = True
    for layer, there in enumerate(pinned):
        full = np.flatnonzero(there.sum(0) > slots)
        if full.size:
            got = f"{there[:, full[0]].sum()} on GPU {full[0]} of {slots[full[0]]} slots in layer {layer}"
            raise ValueError(f"{who}: pins must fit the slots of their GPU, got {got}")
        free, homeless = slots.sum() - there.sum(), int((~there.any(1)).sum())
        if homeless > free:
            got = f"{free} free slots for {homeless} experts in layer {layer}"
            raise ValueError(f"{who}: pins must leave a slot for every other expert, got {got}")
    return pinned
