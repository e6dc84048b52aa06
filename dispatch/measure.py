"""Measures the links of a process group: latency and bandwidth inside a node and between nodes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from math import inf
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from ..placement.cluster.links import Link, Links, fit
from . import collectives
from .hierarchical import Hierarchical

SIZES = (1 << 8, 1 << 16, 1 << 20)  # bytes for each other rank


def measure(
    levels: Hierarchical,
    *,
    device: torch.device | str = "cpu",
    sizes: Sequence[int] = SIZES,
    repeats: int = 5,
) -> Links:
    """The Links of the two groups of `levels`, which may be nodes of one rank, or one node: those links are free.

    All-to-alls of `sizes` bytes for each other rank, on `device`: inside all nodes at the same time, then between all
    nodes at the same time, so that ranks share a card as a dispatcher makes them share it. Each is timed `repeats`
    times, all ranks at once after a barrier, by the clock of the host (on CUDA by events). Of the medians of the ranks
    the longest counts, so that every rank has the same numbers. A latency is that of a whole collective, not of a
    message.

    Every rank must come by. Takes milliseconds; time it on an idle machine, and once, not for each layer.
    """
    if len(set(sizes)) < 2 or min(sizes) < 1:
        raise ValueError(f"measure: sizes must be two different positive numbers or more, got {tuple(sizes)}")
    if repeats < 1:
        raise ValueError(f"measure: repeats must be at least 1, got {repeats}")
    inside, across = levels.inside.group, levels.across.group
    found = []
    for group in (inside, across):
        ranks = dist.get_world_size(group)
        points = []
        for size in sizes:
            x = torch.zeros(ranks * size, dtype=torch.uint8, device=device)
            times = [_once(x, size, group, (inside, across)) for _ in range(repeats + 1)]
            points.append(((ranks - 1) * size, _longest(median(times[1:]), device, (inside, across))))
        found.append(fit(points) if ranks > 1 else Link(0.0, inf))
    return Links(*found)


def _once(x: Tensor, size: int, group: dist.ProcessGroup, everybody: Sequence[dist.ProcessGroup]) -> float:
    """Seconds of one all-to-all."""
    splits = [size] * dist.get_world_size(group)
    for level in everybody:  # a barrier over two levels is one over all
        collectives.all_reduce(torch.ones(1, device=x.device), level)
    if x.device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        collectives.all_to_all(x, splits, splits, group)
        end.record()
        end.synchronize()
        return 1e-3 * start.elapsed_time(end)
    start_s = time.perf_counter()
    collectives.all_to_all(x, splits, splits, group)
    return time.perf_counter() - start_s


def _longest(seconds: float, device: torch.device | str, everybody: Sequence[dist.ProcessGroup]) -> float:
    mine = torch.tensor([seconds], dtype=torch.float64, device=device)
    for level in everybody:
        mine = collectives.all_gather(mine, level).max()[None]
    return mine.item()
