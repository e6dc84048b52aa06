"""A placement: which expert stands in which slot of which GPU, layer by layer, and the JSON file that keeps it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .careful import Opened, opened, whole, without_unknown
from .cluster.topology import Topology
from .files import write_whole

VERSION = 1


@dataclass(frozen=True, eq=False)
class Placement:
    """Experts in slots, the slots in GPU order: GPU g has `slots_of_gpu[g]` of them in every layer.

    expert_of_slot  int32 [L, S]: also the physical-to-logical map of vLLM and SGLang
    num_experts     E
    topology        the GPUs
    slots_of_gpu    int32 [G], S in all
    cost            figures of `Cost.summary`, empty where nobody counted
    bound           what no placement can be below (see `place`), empty where nobody proved anything
    method          what found it, with what it was given

    Raises ValueError / TypeError unless `check` passes.

    >>> Placement(np.array([[0, 2, 1, 3]]), 4, Topology(nodes=1, gpus_per_node=2)).gpus_of(layer=0, expert=2)
    [0]
    """

    expert_of_slot: NDArray[np.int32]
    num_experts: int
    topology: Topology
    slots_of_gpu: NDArray[np.int32] = None  # type: ignore[assignment]  # None: slots shared out evenly
    cost: Mapping[str, Any] = field(default_factory=dict)
    bound: Mapping[str, Any] = field(default_factory=dict)
    method: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        slots = np.asarray(self.expert_of_slot)
        if slots.dtype.kind not in "iu":
            raise TypeError(f"Placement: expert_of_slot must be integers, got {slots.dtype}")
        if slots.ndim != 2 or not slots.size:
            raise ValueError(f"Placement: expert_of_slot must be [L, S], got {slots.shape}")
        shared = self.slots_of_gpu
        if shared is None:
            if slots.shape[1] % self.topology.gpus:
                raise ValueError(
                    f"Placement: slots_of_gpu must be given where {slots.shape[1]} slots are no multiple of "
                    f"{self.topology.gpus} GPUs"
                )
            shared = np.full(self.topology.gpus, slots.shape[1] // self.topology.gpus)
        check(slots, self.num_experts, np.asarray(shared), self.topology)
        object.__setattr__(self, "expert_of_slot", slots.astype(np.int32))
        object.__setattr__(self, "slots_of_gpu", np.asarray(shared).astype(np.int32))

    @property
    def gpu_of_slot(self) -> NDArray[np.int32]:
        """int32 [S]."""
        return np.repeat(np.arange(self.topology.gpus, dtype=np.int32), self.slots_of_gpu)

    @property
    def replicas(self) -> NDArray[np.int64]:
        """int64 [L, E]: how often each expert stands."""
        return np.stack([np.bincount(layer, minlength=self.num_experts) for layer in self.expert_of_slot])

    @property
    def standing(self) -> NDArray[np.bool_]:
        """bool [L, E, G]: where experts stand."""
        layers = len(self.expert_of_slot)
        table = np.zeros((layers, self.num_experts, self.topology.gpus), bool)
        table[np.arange(layers)[:, None], self.expert_of_slot, self.gpu_of_slot] = True
        return table

    def gpus_of(self, layer: int, expert: int) -> list[int]:
        """The GPUs that hold an expert, rising."""
        return self.gpu_of_slot[self.expert_of_slot[layer] == expert].tolist()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the JSON file, whole or not at all. Raises OSError; an older file then stays as it was."""
        found = {
            "version": VERSION,
            "num_experts": self.num_experts,
            "topology": self.topology.to_json(),
            "slots_of_gpu": self.slots_of_gpu.tolist(),
            "layers": [{"expert_of_slot": layer} for layer in self.expert_of_slot.tolist()],
            "cost": dict(self.cost),
            "bound": dict(self.bound),
            "method": dict(self.method),
        }
        text = json.dumps(found, allow_nan=False)
        write_whole(Path(path), lambda file: file.write(text.encode()))

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, max_bytes: int | None = None) -> Placement:
        """`max_bytes` of memory that it may fill: None for four times the file, or 64 MB.

        Raises OSError where it is missing or may not be read, or ValueError naming the file and what is wrong with it.
        """
        with opened(path, "Placement", max_bytes) as file:
            content = file.json("a saved placement")
            file.rule(isinstance(content, dict) and "version" in content, "content", "an object with version", content)
            file.rule(content["version"] == VERSION, "version", str(VERSION), content["version"])
            found = without_unknown(file, content, "content", NEEDED, {"slots_of_gpu", *FIGURES})
            experts = whole(file, found["num_experts"], "num_experts", 1, 2**31 - 1)
            rows = _rows(file, found["layers"])
            file.rule(experts <= rows.shape[1], "num_experts", f"at most S={rows.shape[1]}", experts)
            slots: Any = found.get("slots_of_gpu")
            if slots is not None:
                slots = file.integers(slots, "slots_of_gpu", shape=(None,), low=0, high=rows.shape[1]).astype(np.int32)
            for name in FIGURES:
                _figures(file, name, found.get(name, {}))
            try:
                topology = Topology.from_json(found["topology"])
                return cls(rows, experts, topology, slots, *(found.get(name, {}) for name in FIGURES))
            except (ValueError, TypeError) as error:
                raise file.damaged("a saved placement", str(error).removeprefix("Placement: ")) from error


NEEDED = {"version", "num_experts", "topology", "layers"}
FIGURES = ("cost", "bound", "method")


def _rows(file: Opened, layers: Any) -> NDArray[np.int32]:
    """expert_of_slot int32 [L, S]."""
    file.rule(isinstance(layers, list) and bool(layers), "layers", "a list, not empty", layers)
    rows = [without_unknown(file, layer, "a layer", {"expert_of_slot"}, set())["expert_of_slot"] for layer in layers]
    file.rule(all(isinstance(row, list) for row in rows), "expert_of_slot", "a list in each layer", rows)
    sizes = {len(row) for row in rows}
    file.rule(len(sizes) == 1, "layers", "with equally many slots", sorted(sizes))
    whole_ones = all(type(expert) is int for row in rows for expert in row)
    file.rule(whole_ones, "expert_of_slot", "whole numbers", rows[0])
    return file.integers(rows, "expert_of_slot", shape=(None, None), low=0, high=2**31 - 1).astype(np.int32)


def _figures(file: Opened, name: str, found: Any) -> None:
    """That `cost`, `bound` and `method` are objects which can be saved again."""
    file.rule(isinstance(found, dict), name, "an object", found)
    with file.watched(f"without NaN and Inf in {name}"):
        json.dumps(found, allow_nan=False)


def check(
    expert_of_slot: NDArray[np.integer], num_experts: int, slots_of_gpu: NDArray[np.integer], topology: Topology
) -> None:
    """What every placement must be, whoever found it: every expert somewhere, the slots of each GPU filled exactly,
    replicas of an expert on distinct GPUs. expert_of_slot [L, S]. Raises ValueError naming layer, rule and value."""
    _, slots = expert_of_slot.shape
    gpus = topology.gpus
    if num_experts < 1:
        raise ValueError(f"Placement: num_experts must be at least 1, got {num_experts}")
    if slots_of_gpu.shape != (gpus,):
        raise ValueError(f"Placement: slots_of_gpu must be [G={gpus}], got {slots_of_gpu.shape}")
    whole_ones = slots_of_gpu.dtype.kind in "iu" and not (slots_of_gpu < 0).any()
    if not whole_ones or (slots_of_gpu > slots).any() or sum(slots_of_gpu.tolist()) != slots:  # numpy's sum may wrap
        raise ValueError(
            f"Placement: slots_of_gpu must be whole numbers with the sum S={slots}, got {slots_of_gpu.tolist()}"
        )
    gpu_of_slot = np.repeat(np.arange(gpus), slots_of_gpu)
    for layer, experts in enumerate(expert_of_slot):
        if experts.min() < 0 or experts.max() >= num_experts:
            odd = experts[(experts < 0) | (experts >= num_experts)][0]
            raise ValueError(f"Placement: experts of layer {layer} must be in 0 .. {num_experts - 1}, got {odd}")
        missing = np.flatnonzero(np.bincount(experts, minlength=num_experts) == 0)
        if missing.size:
            raise ValueError(f"Placement: every expert must have a slot in layer {layer}, got none for {missing[0]}")
        seen, times = np.unique(gpu_of_slot * num_experts + experts, return_counts=True)
        if (times > 1).any():
            gpu, expert = divmod(int(seen[times > 1][0]), num_experts)
            raise ValueError(
                f"Placement: replicas must be on distinct GPUs, got expert {expert} of layer {layer} "
                f"{times.max()} times on GPU {gpu}"
            )
