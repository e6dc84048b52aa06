"""Placements as other systems write and read them. All of them want equally many slots on every GPU, in GPU order.

sglang   .json: `physical_to_logical_map` [layers, S], for --init-expert-location; it has a row for every layer of the
         model, those without experts too
vllm     .json: the maps of its EPLB state, `physical_to_logical_map` [L, S], `logical_to_physical_map` [L, E, most
         replicas] filled up with -1, and `logical_replica_count` [L, E]
trtllm   .yaml: `num_slots`, `layer_updates_per_iter`, and `initial_global_assignments`, S experts for each layer

Reading takes .json, .npy and .npz with a physical-to-logical map, and TensorRT-LLM's YAML.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .careful import Opened, opened
from .cluster.topology import Topology
from .files import write_whole
from .placement import Placement

MAP = "physical_to_logical_map"


def maps(placement: Placement) -> dict[str, NDArray[np.int64]]:
    """physical_to_logical_map [L, S], logical_to_physical_map [L, E, most replicas] with -1 for none, and
    logical_replica_count [L, E], all int64: the tensors that vLLM's and SGLang's expert maps hold."""
    slots, replicas = placement.expert_of_slot.astype(np.int64), placement.replicas
    table = np.full((*replicas.shape, int(replicas.max())), -1, np.int64)
    for layer, experts in enumerate(slots):
        order = np.argsort(experts, kind="stable")
        first = np.cumsum(replicas[layer]) - replicas[layer]
        table[layer, experts[order], np.arange(len(order)) - first[experts[order]]] = order
    return {MAP: slots, "logical_to_physical_map": table, "logical_replica_count": replicas}


def _sglang(placement: Placement, layers: Sequence[int], count: int) -> str:
    slots = np.tile(np.arange(placement.expert_of_slot.shape[1]) % placement.num_experts, (count, 1))
    slots[list(layers)] = placement.expert_of_slot
    return json.dumps({MAP: slots.tolist()})


def _vllm(placement: Placement, layers: Sequence[int], count: int) -> str:
    return json.dumps({name: table.tolist() for name, table in maps(placement).items()})


def _trtllm(placement: Placement, layers: Sequence[int], count: int) -> str:
    rows = [f"  {layer}: {row.tolist()}" for layer, row in zip(layers, placement.expert_of_slot, strict=True)]
    head = [f"num_slots: {placement.expert_of_slot.shape[1]}", "layer_updates_per_iter: 0"]
    return "\n".join([*head, "initial_global_assignments:", *rows, ""])


EXPORTS: dict[str, Callable[[Placement, Sequence[int], int], str]] = {
    "sglang": _sglang,
    "vllm": _vllm,
    "trtllm": _trtllm,
}


def export(
    placement: Placement,
    path: str | os.PathLike[str],
    system: str,
    *,
    layers: Sequence[int] | None = None,
    model_layers: int | None = None,
) -> None:
    """Writes `placement` for `system`, a name in EXPORTS, whole or not at all.

    `layers`: which of the model's layers the placement's are, rising (None: 0 .. L - 1); `model_layers`: how many the
    model has in all (None: as few as hold them). Raises ValueError naming argument and rule, OSError.
    """
    if system not in EXPORTS:
        raise ValueError(f"export: system must be one of {', '.join(EXPORTS)}, got {system!r}")
    if len(set(placement.slots_of_gpu.tolist())) > 1:
        raise ValueError(
            f"export: slots_of_gpu must be alike on every GPU for {system}, got {placement.slots_of_gpu.tolist()}"
        )
    own = len(placement.expert_of_slot)
    layers = range(own) if layers is None else list(layers)
    if len(layers) != own or any(b <= a for a, b in pairwise(layers)) or layers[0] < 0:
        raise ValueError(f"export: layers must be {own} rising numbers, got {list(layers)}")
    count = layers[-1] + 1 if model_layers is None else model_layers
    if count <= layers[-1]:
        raise ValueError(f"export: model_layers must be above layer {layers[-1]}, got {count}")
    text = EXPORTS[system](placement, layers, count)
    write_whole(Path(path), lambda file: file.write(text.encode()))


def import_map(
    path: str | os.PathLike[str],
    topology: Topology,
    *,
    num_experts: int | None = None,
    layers: Sequence[int] | None = None,
    max_bytes: int | None = None,
) -> Placement:
    """The placement in another system's file. `num_experts`: E, None for one more than the highest id in it; `layers`:
    which rows to take, None for all; `max_bytes` of memory that the file may fill: None for four times its size, or
    64 MB.

    Raises OSError where it is missing or may not be read, or ValueError naming the file, field, rule and value.
    """
    with opened(path, "import_map", max_bytes) as file:
        found = _read(file)
        if isinstance(found, list):
            fine = all(isinstance(row, list) and all(type(expert) is int for expert in row) for row in found)
            fine = fine and len({len(row) for row in found}) == 1
            file.rule(fine, MAP, "whole numbers [L, S]", found)
        table = file.integers(found, MAP, shape=(None, None), low=0, high=2**31 - 2)
        file.rule(table.size > 0, MAP, "[L, S], not empty", list(table.shape))
        if layers is not None:
            odd = [layer for layer in layers if not 0 <= layer < len(table)]
            file.rule(not odd, "layers", f"in 0 .. {len(table) - 1}", odd[0] if odd else None)
            table = table[list(layers)]
        experts = int(table.max()) + 1 if num_experts is None else num_experts
        rule = f"at most the S={table.shape[1]} slots, for every expert has one"
        file.rule(experts <= table.shape[1], "num_experts", rule, experts)
        try:
            return Placement(table, experts, topology)
        except (ValueError, TypeError) as error:
            raise file.damaged("another system's placement", error) from error


def _read(file: Opened) -> Any:
    kind = file.path.suffix.lower()
    if kind == ".npy":
        return file.npy()
    if kind == ".npz":
        return _map_of(file, file.npz(only=MAP))
    if kind in (".yaml", ".yml"):
        return _trtllm_rows(file, file.yaml())
    file.rule(kind == ".json", "ending", ".json, .npy, .npz or .yaml", kind or "nothing")
    found = file.json("another system's placement")
    return found if isinstance(found, list) else _map_of(file, found)


def _map_of(file: Opened, found: Any) -> Any:
    there = isinstance(found, dict) and MAP in found
    file.rule(
        there, "content", f"an object with {MAP}", list(found)[:9] if isinstance(found, dict) else type(found).__name__
    )
    return found[MAP]


def _trtllm_rows(file: Opened, found: Any) -> list[list[int]]:
    """The assignments of a TensorRT-LLM configuration, in the order of their layers."""
    rows = found.get("initial_global_assignments") if isinstance(found, dict) else None
    rule = "initial_global_assignments, with `layer: [expert, ...]` for each layer"
    fine = isinstance(rows, dict) and rows and all(type(layer) is int for layer in rows)
    file.rule(bool(fine), "content", rule, type(rows).__name__)
    assert isinstance(rows, dict)
    return [rows[layer] for layer in sorted(rows)]
