"""What a placement costs a trace: counts, and the times that they foretell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .cluster.topology import Topology, Workload


@dataclass(frozen=True, eq=False)
class Cost:
    """Counts of a walk (see `walk`), all of them int64.

    load         [L, G]     (token, expert) pairs computed on each GPU
    rows         [L, G, G]  rows that go from each home (first) to each GPU: one for each token with an expert there
    node_rows    [L, G, N]  the same to each node: one for each token with an expert on it
    back         [L, G, G]  reduced rows that go from each GPU to each home-to-be (last)
    node_back    [L, N, G]  the same, summed on the GPU's node first
    transitions  [L-1]      (expert, next layer's expert) pairs of the same token
    cross_gpu    [L-1]      those whose experts were computed on different GPUs; cross_node: on different nodes
    """

    tokens: int
    load: NDArray[np.int64]
    rows: NDArray[np.int64]
    node_rows: NDArray[np.int64]
    back: NDArray[np.int64]
    node_back: NDArray[np.int64]
    transitions: NDArray[np.int64]
    cross_gpu: NDArray[np.int64]
    cross_node: NDArray[np.int64]
    topology: Topology

    @property
    def cross_gpu_share(self) -> float:
        """Of all transitions."""
        return _share(self.cross_gpu.sum(), self.transitions.sum())

    @property
    def cross_node_share(self) -> float:
        return _share(self.cross_node.sum(), self.transitions.sum())

    @property
    def imbalance(self) -> float:
        """max / mean of the GPUs' expert time (load over speed), averaged over the layers that have any."""
        load = self.load[self.load.any(1)]
        if not len(load):
            return 1.0
        speed = self.topology.speed_of_gpu
        return float(np.mean((load / speed).max(1) / (load.sum(1) / speed.sum())))

    @property
    def copies(self) -> float:
        """Rows that leave their GPU, there and back, per token and layer."""
        here = np.arange(self.topology.gpus)
        moved = self.rows.sum() + self.back.sum() - self.rows[:, here, here].sum() - self.back[:, here, here].sum()
        return _share(moved, self.tokens * len(self.load))

    @property
    def node_copies(self) -> float:
        """Rows that leave their node, one for each token and node, there and back, per token and layer."""
        node, gpu = self.topology.node_of_gpu, np.arange(self.topology.gpus)
        there = self.node_rows.sum() - self.node_rows[:, gpu, node].sum()
        return _share(there + self.node_back.sum() - self.node_back[:, node, gpu].sum(), self.tokens * len(self.load))

    @property
    def gpus_per_token(self) -> float:
        """Distinct GPUs that a token's experts lie on, averaged over tokens and layers."""
        return _share(self.rows.sum(), self.tokens * len(self.load))

    def layer_seconds(self, workload: Workload | None = None) -> NDArray[np.float64]:
        """float64 [L, 3]: predicted seconds of dispatch, experts and combine in each layer, for one step of `workload`.

        Experts: the slowest GPU. Dispatch and combine: a latency, and the slowest GPU's rows, sent or received, over
        its link inside the node or across, whichever takes longer; a row crosses to each GPU for itself (all-to-all).
        """
        workload = Workload() if workload is None else workload
        topology, gpus = self.topology, self.topology.gpus
        steps = workload.tokens_per_gpu * gpus / max(self.tokens, 1)
        experts = steps * workload.pair_us * 1e-6 * (self.load / topology.speed_of_gpu).max(1)
        there = self._transfer_s(self.rows, steps * workload.dispatch_bytes)
        return np.stack([there, experts, self._transfer_s(self.back, steps * workload.combine_bytes)], 1)

    def seconds(self, workload: Workload | None = None) -> float:
        """Predicted seconds of one step through all layers' experts."""
        return float(self.layer_seconds(workload).sum())

    def _transfer_s(self, rows: NDArray[np.int64], row_bytes: float) -> NDArray[np.float64]:
        node, links = self.topology.node_of_gpu, self.topology.links
        near = node[:, None] == node[None, :]
        away = ~np.eye(self.topology.gpus, dtype=bool)
        total = np.zeros(len(rows))
        latency = 0.0
        for link, mask in ((links.inside, near & away), (links.across, ~near)):
            if not mask.any():
                continue
            latency = link.latency_s  # of the link that is farther away
            counted = rows * mask
            busiest = np.maximum(counted.sum(1).max(1), counted.sum(2).max(1))
            total = np.maximum(total, busiest * (row_bytes / (link.bandwidth_GBps * 1e9)))
        return total + latency

    def summary(self, workload: Workload | None = None) -> dict[str, Any]:
        """The figures, for people and JSON."""
        there, experts, back = self.layer_seconds(workload).sum(0).tolist()
        return {
            "tokens": self.tokens,
            "transitions": int(self.transitions.sum()),
            "cross_gpu": int(self.cross_gpu.sum()),
            "cross_node": int(self.cross_node.sum()),
            "cross_gpu_share": self.cross_gpu_share,
            "cross_node_share": self.cross_node_share,
            "imbalance": self.imbalance,
            "gpus_per_token": self.gpus_per_token,
            "copies": self.copies,
            "node_copies": self.node_copies,
            "dispatch_s": there,
            "experts_s": experts,
            "combine_s": back,
            "seconds": there + experts + back,
        }


def _share(part: Any, whole: Any) -> float:
    return float(part / whole) if whole else 0.0
