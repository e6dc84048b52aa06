"""Experts of a step that are there together, and what computes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...kernels.expert_outputs import expert_outputs
from ...kernels.routing import Routing


class Group(NamedTuple):
    """Experts of a step that are there, of one kind: weights [S, ...] (tensors or Quantized), and each expert's slot
    among them. `host`: in host memory, for the host to compute."""

    experts: list[int]
    slots: list[int]
    weights: Mapping[str, Any]
    host: bool = False


def write_outputs(group: Group, rows: Tensor, routing: Routing, out: Tensor, form: Mapping[str, Any]) -> None:
    """`expert_outputs` of a group. `form`: activation, gated, transposed, interleaved."""
    slots = np.full(routing.num_experts, -1, np.int32)
    slots[group.experts] = group.slots
    w = group.weights
    first = w["w_gate_up"] if "w_gate_up" in w else (w["w_gate"], w["w_up"])
    table = torch.from_numpy(slots)
    if rows.is_cuda:  # from pageable memory the copy would wait for all that was handed over before
        table = table.pin_memory().to(rows.device, non_blocking=True)
    expert_outputs(
        rows, routing, first, w["w_down"], table, out,
        b_gate_up=w.get("b_gate_up"), b_down=w.get("b_down"), **form,
    )  # fmt: skip
