"""Experts of a step that are there together, and what computes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...kernels.expert_gradients import expert_gradients
from ...kernels.expert_outputs import expert_outputs
from ...kernels.grouped_ffn import grouped_ffn
from ...kernels.grouped_ffn.thin_tiles import MAX_ROWS
from ...kernels.routing import Routing
from ...placement.caching.pools import Pools
from .loads import Use


class Group(NamedTuple):
    """Experts of a step that are there, of one kind: weights [S, ...] (tensors or Quantized), and each expert's slot
    among them [n], or one for each weight [weights, n]. `host`: in host memory, for the host to compute."""

    experts: list[int]
    slots: Sequence[int] | NDArray[np.int32]
    weights: Mapping[str, Any]
    host: bool = False


def distinct(expert_ids: Tensor, experts: int) -> tuple[Tensor, NDArray[np.int32], NDArray[np.int64]]:
    """The choices in host memory, the experts that somebody chose, rising, and how many did. The one wait for the
    device."""
    chosen = expert_ids.detach().cpu()
    ids = chosen.numpy()
    if ids.size and ids.min() < -1:
        raise IndexError(f"offload: expert_ids must be at least -1 (no expert), got {ids.min()}")
    counts = np.bincount(ids[(ids >= 0) & (ids < experts)], minlength=experts)
    distinct = np.flatnonzero(counts)
    return chosen, distinct.astype(np.int32), counts[distinct]


def window(places: Pools, layer: int, uses: Sequence[Use], slots: int) -> tuple[int, int]:
    """The slots, of so many, that a group's kernels are told of: a pool's, the spare ones, or all. Most kernels can
    count only so many experts."""
    if all(use.detour for use in uses):
        return places.slots, slots
    if any(use.detour for use in uses):
        return 0, slots
    pool = int(places.of[layer, uses[0].expert])
    return int(places.first[pool]), int(places.first[pool + 1])


FEW_ROWS = MAX_ROWS  # so few rows are served in one piece, where their experts are there: a GPU has kernels for them


def whole_step(group: Group, rows: Tensor, routing: Routing, ids: Tensor, form: Mapping[str, Any]) -> Tensor:
    """y [R, D] of a step whose experts are all in one group; `ids` are the routing's, in host memory. On a GPU, whose
    kernels for few rows order no experts, to the bit what grouped_ffn gives where all weights are at hand."""
    slots = np.full(routing.num_experts + 1, -1, np.int32)  # the last is nobody's
    slots[group.experts] = group.slots
    there = ids.numpy()
    local = slots[np.where((there >= 0) & (there < routing.num_experts), there, -1)]
    w = group.weights
    routing = Routing(_there(local, rows.device), routing.weights, w["w_down"].shape[0])
    return grouped_ffn(rows, routing, _first(w), w["w_down"], **_biases(w), **form)


def _there(numbers: np.ndarray, device: torch.device) -> Tensor:
    """On a device. From pageable memory the copy would wait for all that was handed over before."""
    t = torch.from_numpy(numbers)
    return t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t


def write_outputs(group: Group, rows: Tensor, routing: Routing, out: Tensor, form: Mapping[str, Any]) -> None:
    """`expert_outputs` of a group, to `out`. `form`: activation, gated, transposed, interleaved."""
    w, slots = group.weights, _slots(group, routing, rows.device)
    expert_outputs(rows, routing, _first(w), w["w_down"], slots, out, **_biases(w), **form)


def write_gradients(
    group: Group, grad: Tensor, rows: Tensor, routing: Routing, form: Mapping[str, Any], **outs: Any
) -> None:
    """`expert_gradients` of a group, to `outs`: d_rows, d_weights, or one of them."""
    w, slots = group.weights, _slots(group, routing, rows.device)
    expert_gradients(grad, rows, routing, _first(w), w["w_down"], slots, **outs, **_biases(w), **form)


def _slots(group: Group, routing: Routing, device: torch.device) -> Tensor:
    """Where each expert lies in the group's weights, -1: nowhere."""
    slots = np.full((*np.shape(group.slots)[:-1], routing.num_experts), -1, np.int32)
    slots[..., group.experts] = group.slots
    return _there(slots, device)


def _first(w: Mapping[str, Any]) -> Any:
    return w["w_gate_up"] if "w_gate_up" in w else (w["w_gate"], w["w_up"])


def _biases(w: Mapping[str, Any]) -> dict[str, Any]:
    return {name: w.get(name) for name in ("b_gate_up", "b_down")}
