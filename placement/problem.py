"""What a placement is to be good at, and the numbers that solvers see of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .cluster.topology import Topology, Workload
from .cost import Cost
from .placement import Placement
from .slots import gpu_load
from .traces.trace import Trace
from .walk import Foretold, equal_runs, walk

MOVES = ("fixed", "most", "foretold")


@dataclass(frozen=True)
class Objective:
    """The score of a placement, to be minimised: a weighted sum of

    gpu          the share of transitions that cross GPUs;  node  ... that cross nodes
    copies       rows that leave their GPU, there and back, per token and layer;  node_copies  ... their node
    load         max / mean of the GPUs' expert time, averaged over layers, in the worst of the scenarios

    `max_load`: the load that is wished for at most; `load` is then raised until that holds, if it can. `home`: whether
    a token's home stays or moves, and where to (see `walk`), which is what copies are counted by.

    Raises ValueError naming field, rule and value.
    """

    gpu: float = 0.0
    node: float = 0.0
    copies: float = 0.0
    node_copies: float = 0.0
    load: float = 0.0
    max_load: float | None = None
    home: str = "fixed"

    def __post_init__(self) -> None:
        for name in ("gpu", "node", "copies", "node_copies", "load"):
            value = getattr(self, name)
            if not (isfinite(value) and value >= 0):
                raise ValueError(f"Objective: {name} must be finite and not negative, got {value}")
        if self.max_load is not None and not (isfinite(self.max_load) and self.max_load >= 1):
            raise ValueError(f"Objective: max_load must be at least 1 (max over mean), got {self.max_load}")
        if self.home not in MOVES:
            raise ValueError(f"Objective: home must be one of {', '.join(MOVES)}, got {self.home!r}")
        if not any((self.gpu, self.node, self.copies, self.node_copies, self.load)):
            raise ValueError("Objective: one weight at least must be above 0, got none")

    @property
    def counts_copies(self) -> bool:
        """Whether rows on the wire count, which only tokens know."""
        return bool(self.copies or self.node_copies)

    @property
    def replica(self) -> str:
        """The walk's rule for replicas that the score goes by: near the token's home where that stays and rows are
        counted, or nothing but load, else near its last experts."""
        near_home = self.home == "fixed" and self.counts_copies
        return "home" if near_home or not (self.gpu or self.node or self.counts_copies) else "follow"

    @classmethod
    def transitions(cls, topology: Topology, max_load: float | None = None, load: float = 0.01) -> Objective:
        """Crossings of GPUs and, where there are several nodes, 7 times as dear, of nodes."""
        return cls(gpu=1.0, node=7.0 if topology.nodes > 1 else 0.0, load=load, max_load=max_load)

    @classmethod
    def copied(
        cls, topology: Topology, home: str = "fixed", max_load: float | None = None, load: float = 0.1
    ) -> Objective:
        """Rows on the wire, those between nodes 7 times as dear."""
        return cls(copies=1.0, node_copies=7.0 if topology.nodes > 1 else 0.0, load=load, max_load=max_load, home=home)

    @classmethod
    def time(cls, topology: Topology, workload: Workload, layers: int, top_k: int) -> Objective:
        """Predicted seconds of a step with fixed homes (see `Cost.layer_seconds`), the links' mean in place of their
        slowest: rows there and back over the link inside the node, those to other nodes over the link across."""
        links, tokens = topology.links, layers * workload.tokens_per_gpu
        row = tokens * (workload.dispatch_bytes + workload.combine_bytes) / 2
        inside, across = row / (links.inside.bandwidth_GBps * 1e9), row / (links.across.bandwidth_GBps * 1e9)
        return cls(
            copies=inside if topology.gpus > 1 else 0.0,
            node_copies=across if topology.nodes > 1 else 0.0,
            load=tokens * top_k * workload.pair_us * 1e-6,
        )


@dataclass(frozen=True, eq=False)
class Problem:
    """Numbers for solvers.

    transitions   L - 1 sparse matrices int64 [E, E]: counts of (expert, next layer's expert)
    loads         float64 [Q, L, E]: expert loads of Q scenarios, each layer's adding up to 1; the first are the trace's
                  own where `counted`, and else those that are expected
    ids           int16 [L, T, K]: tokens (a sample, where the trace is long) that copies are counted by, -1 for none
    homes         int32 [T]: each token's home, the first where it moves; None: equal runs of tokens
    slots_of_gpu  int32 [G];  pins  int32 [L, E]: the GPU that an expert must be on, -1 where it is free
    groups        experts 0 .. E/groups - 1 and so on are to stay on one node each; 1: no groups
    """

    num_experts: int
    transitions: tuple[Any, ...]
    loads: NDArray[np.float64]
    ids: NDArray[np.int16]
    topology: Topology
    slots_of_gpu: NDArray[np.int32]
    objective: Objective
    pins: NDArray[np.int32]
    groups: int = 1
    counted: bool = True
    homes: NDArray[np.int32] | None = None

    @property
    def home(self) -> NDArray[np.int32]:
        """int32 [T]: `homes`, whatever they were given as."""
        return equal_runs(self.ids.shape[1], self.topology.gpus) if self.homes is None else self.homes

    @property
    def layers(self) -> int:
        return self.loads.shape[1]

    @property
    def gpu_of_slot(self) -> NDArray[np.int32]:
        """int32 [S]."""
        return np.repeat(np.arange(self.topology.gpus, dtype=np.int32), self.slots_of_gpu)

    @cached_property
    def trace(self) -> Trace:
        """The tokens."""
        return Trace(self.ids.astype(np.uint16), self.num_experts)  # -1 is the largest number, which means none

    def walked(self, placement: Placement) -> Cost:
        """The walk of the tokens from their homes, by the rules that the objective counts by."""
        replica, home = self.objective.replica, self.objective.home
        told = Foretold.of(self.transitions, placement) if "foretold" in (replica, home) else None
        return walk(self.trace, placement, homes=self.home, replica=replica, home=home, foretold=told)

    def parts(self, cost: Cost, placement: Placement) -> dict[str, float]:
        """What the objective weighs, of a placement and what `walked` counted: gpu, node, copies, node_copies, load."""
        return {
            "gpu": cost.cross_gpu_share,
            "node": cost.cross_node_share,
            "copies": cost.copies,
            "node_copies": cost.node_copies,
            "load": self._load(cost, placement),
        }

    def placement(self, expert_of_slot: NDArray[np.integer]) -> Placement:
        """Of slots [L, S]."""
        return Placement(expert_of_slot.astype(np.int32), self.num_experts, self.topology, self.slots_of_gpu)

    def rank(self, parts: Mapping[str, float]) -> tuple[float, float]:
        """To be minimised: the load beyond what is wished for, then the score."""
        most = self.objective.max_load
        return 0.0 if most is None else round(max(0.0, parts["load"] - most), 9), self.score(parts)

    def _load(self, cost: Cost, placement: Placement) -> float:
        if self.counted and len(self.loads) == 1:
            return cost.imbalance
        gpus = self.topology.gpus
        worst = np.zeros(self.layers)
        for loads in self.loads[1 if self.counted else 0 :]:
            shared = gpu_load(loads, placement.expert_of_slot, placement.gpu_of_slot, gpus)
            worst = np.maximum(worst, gpus * (shared / self.topology.speed_of_gpu).max(1))
        if self.counted:
            own = cost.load / np.maximum(cost.load.sum(1, keepdims=True), 1) / self.topology.speed_of_gpu
            worst = np.maximum(worst, gpus * own.max(1))
        used = self.loads.any((0, 2))
        return float(worst[used].mean()) if used.any() else 1.0

    def score(self, parts: Mapping[str, float]) -> float:
        """The objective's weighted sum of `parts`."""
        return sum(getattr(self.objective, name) * value for name, value in parts.items())

    @property
    def spare(self) -> int:
        """Slots of a layer beyond one for each expert."""
        return int(self.slots_of_gpu.sum()) - self.num_experts
