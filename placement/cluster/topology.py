"""The machine that experts are placed on, and the work that it does with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .links import H800_CX7, MACHINES, Link, Links

MOST_GPUS = 2**16


@dataclass(frozen=True)
class Topology:
    """`nodes` of `gpus_per_node` GPUs each; GPU g is number g % gpus_per_node of node g // gpus_per_node.

    links  latency and bandwidth of one GPU, inside its node and across
    slots  how many expert slots of a layer each GPU has, where they differ (its memory); None: alike
    speed  how fast each GPU is, as a multiple of any one unit, where they differ; None: alike

    Raises ValueError / TypeError naming field, rule and value.

    >>> Topology(nodes=2, gpus_per_node=4).node_of_gpu
    array([0, 0, 0, 0, 1, 1, 1, 1], dtype=int32)
    """

    nodes: int
    gpus_per_node: int
    links: Links = H800_CX7.dispatch
    slots: tuple[int, ...] | None = None
    speed: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for field in ("nodes", "gpus_per_node"):
            value = getattr(self, field)
            if not hasattr(value, "__index__") or isinstance(value, bool):
                raise TypeError(f"Topology: {field} must be an integer, got {value!r}")
            if value < 1:
                raise ValueError(f"Topology: {field} must be at least 1, got {value}")
        if self.gpus > MOST_GPUS:
            raise ValueError(f"Topology: nodes * gpus_per_node must be at most {MOST_GPUS}, got {self.gpus}")
        for field in ("slots", "speed"):
            values = getattr(self, field)
            if values is None:
                continue
            if len(values) != self.gpus:
                raise ValueError(
                    f"Topology: {field} must have one value for each of {self.gpus} GPUs, got {len(values)}"
                )
            for value in values:
                if not (isfinite(value) and value > 0) or (field == "slots" and value != int(value)):
                    rule = "whole numbers of at least 1" if field == "slots" else "finite and above 0"
                    raise ValueError(f"Topology: {field} must be {rule}, got {value}")
        if self.slots is not None:
            object.__setattr__(self, "slots", tuple(int(s) for s in self.slots))
        if self.speed is not None:
            object.__setattr__(self, "speed", tuple(float(s) for s in self.speed))

    @classmethod
    def preset(cls, machine: str, nodes: int, gpus_per_node: int) -> Topology:
        """The links of a machine in MACHINES ("h800-cx7")."""
        if machine not in MACHINES:
            raise ValueError(f"Topology: machine must be one of {', '.join(MACHINES)}, got {machine!r}")
        return cls(nodes, gpus_per_node, MACHINES[machine].dispatch)

    @property
    def gpus(self) -> int:
        """G."""
        return self.nodes * self.gpus_per_node

    @property
    def node_of_gpu(self) -> NDArray[np.int32]:
        """int32 [G]."""
        return (np.arange(self.gpus) // self.gpus_per_node).astype(np.int32)

    @property
    def speed_of_gpu(self) -> NDArray[np.float64]:
        """float64 [G], with mean 1."""
        speed = np.ones(self.gpus) if self.speed is None else np.array(self.speed)
        return speed / speed.mean()

    def slots_of_gpu(self, num_experts: int, slots_per_gpu: int | None = None) -> NDArray[np.int32]:
        """int32 [G]: slots of each GPU in one layer. They are `slots`, or `slots_per_gpu` each, or just enough for
        every expert once, the first GPUs taking one more where E is no multiple of G.

        Raises ValueError where slots are fewer than experts, or a GPU's more than E (replicas stand on distinct GPUs).
        """
        if self.slots is not None and slots_per_gpu is not None:
            raise ValueError(f"Topology: slots_per_gpu must be left out where slots are given, got {slots_per_gpu}")
        if self.slots is not None:
            found = np.array(self.slots, np.int32)
        elif slots_per_gpu is not None:
            if not hasattr(slots_per_gpu, "__index__") or slots_per_gpu < 1:
                raise ValueError(f"Topology: slots_per_gpu must be an integer of at least 1, got {slots_per_gpu!r}")
            found = np.full(self.gpus, slots_per_gpu, np.int32)
        else:
            found = (num_experts // self.gpus + (np.arange(self.gpus) < num_experts % self.gpus)).astype(np.int32)
            if not found.all():
                raise ValueError(
                    f"Topology: slots_per_gpu must be given for fewer experts than GPUs, {num_experts} on {self.gpus}"
                )
        if found.sum() < num_experts:
            raise ValueError(f"Topology: slots must be at least as many as experts, {num_experts}, got {found.sum()}")
        if found.max() > num_experts:
            raise ValueError(
                f"Topology: a GPU's slots must be at most the experts, {num_experts}, since replicas stand on distinct "
                f"GPUs, got {found.max()}"
            )
        return found

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Topology:
        """Raises ValueError naming what is missing or unknown."""
        fields = dict(found)
        try:
            if "links" in fields:
                fields["links"] = Links(Link(**fields["links"]["inside"]), Link(**fields["links"]["across"]))
            for name in ("slots", "speed"):
                if name in fields:
                    fields[name] = tuple(fields[name])
            return cls(**fields)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"Topology: fields must be as they were saved, got {sorted(fields)} ({error})") from error


@dataclass(frozen=True)
class Workload:
    """One step of a layer, for predicted times: the batch, the bytes of a row on its way, the work of one expert.

    tokens_per_gpu   tokens whose home a GPU is, in one step
    dispatch_bytes   of one row to an expert's GPU; combine_bytes of one row back
    pair_us          microseconds of a GPU of speed 1 for one (token, expert) pair

    The default is a layer of DeepSeek-V3 (D 7168, F 2048, rows in fp8 there and bf16 back) in batches of 4096 tokens
    at 400 TFLOP/s.
    """

    tokens_per_gpu: int = 4096
    dispatch_bytes: float = 7168 * 1.03125  # fp8 and a scale of 4 bytes for each 128
    combine_bytes: float = 7168 * 2
    pair_us: float = 6 * 7168 * 2048 / 400e6

    def __post_init__(self) -> None:
        for field, value in vars(self).items():
            if not (isfinite(value) and value > 0):
                raise ValueError(f"Workload: {field} must be finite and above 0, got {value}")

    @classmethod
    def of(
        cls, hidden_size: int, intermediate_size: int, *, tokens_per_gpu: int = 4096, tflops: float = 400.0
    ) -> Workload:
        """Gated experts of D and F in bf16, at `tflops` 1e12 operations per second."""
        pair_us = 6 * hidden_size * intermediate_size / (tflops * 1e6)
        return cls(tokens_per_gpu, 2.0 * hidden_size, 2.0 * hidden_size, pair_us)
