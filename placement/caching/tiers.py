"""Caches below caches, and the time that a forward pass waits for what they do not hold.

Device memory holds the experts of one cache, host memory those of another, a disk holds all. What the device loads is
what the host's cache is asked for. Times come from two serial links, disk to host and host to device: the order of
events is the simulation's, whose decisions do not depend on time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..compiled import njit
from .pools import Pools, shared
from .simulate import Log, Simulation, least_loads
from .steps import Steps


def loads_of(above: Simulation) -> Steps:
    """What a cache loads, as the steps of the tier below it: one for each step's misses, and for each fetch ahead.

    Raises ValueError where the simulation kept no log.
    """
    log, steps = _logged(above), above.steps
    loaded = log.gone != -2
    step, expert, ahead = log.step[loaded], log.expert[loaded], log.ahead[loaded]
    layer = expert // steps.experts
    group, starts = _groups(step, layer, ahead)
    order = np.lexsort((expert, group))
    first = step[starts]
    sequence = np.cumsum(steps.begins)[first]  # which sequence a step belongs to
    begins = np.diff(sequence, prepend=0) > 0
    offsets = np.append(starts, len(step)).astype(np.int64)
    ids = (expert[order] % steps.experts).astype(np.int32)
    return Steps(layer[starts].astype(np.int32), offsets, ids, begins, steps.tokens[first], steps.layers, steps.experts)


def _groups(step: NDArray, layer: NDArray, ahead: NDArray) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Runs of events that belong together: the run of each, and where each begins."""
    new = np.ones(len(step), bool)
    if len(step):
        new[1:] = (np.diff(step) != 0) | (np.diff(layer) != 0) | (ahead[1:] != ahead[:-1])
    return np.cumsum(new) - 1, np.flatnonzero(new)


def _logged(simulation: Simulation) -> Log:
    if simulation.log is None:
        raise ValueError("tiers: the simulation must have kept its log (log=True), got none")
    return simulation.log


@dataclass(frozen=True)
class Times:
    """What things take. expert_bytes: of one expert; link_GBps, disk_GBps: host to device, disk to host, 1e9 bytes a
    second; layer_s: what a layer's step computes beside its experts; expert_s: what one expert computes in a step.

    Raises ValueError where a size or rate is not above 0, or a time is negative.
    """

    expert_bytes: float
    link_GBps: float = 25.0
    disk_GBps: float = 3.0
    layer_s: float = 0.0
    expert_s: float = 0.0

    def __post_init__(self) -> None:
        for name in ("expert_bytes", "link_GBps", "disk_GBps"):
            if not 0 < getattr(self, name) < np.inf:
                raise ValueError(f"Times: {name} must be finite and above 0, got {getattr(self, name)}")
        for name in ("layer_s", "expert_s"):
            if not 0 <= getattr(self, name) < np.inf:
                raise ValueError(f"Times: {name} must be finite and not negative, got {getattr(self, name)}")

    @property
    def load_s(self) -> float:
        """Host to device, one expert."""
        return self.expert_bytes / (1e9 * self.link_GBps)

    @property
    def read_s(self) -> float:
        """Disk to host, one expert."""
        return self.expert_bytes / (1e9 * self.disk_GBps)


@dataclass(frozen=True)
class Stall:
    """Seconds: `compute_s` with every expert at hand, `stall_s` beyond that, `bound_s` the least stall of any choice of
    what to keep and to fetch ahead, with the same slots and links; `link_s`, `disk_s`: how long the links are busy."""

    compute_s: float
    stall_s: float
    bound_s: float
    link_s: float
    disk_s: float


def stall(device: Simulation, times: Times, host: Simulation | None = None) -> Stall:
    """How long the passes of a simulation wait for experts.

    device  a simulation with a log
    host    the simulation of `loads_of(device)` with a log; None: host memory holds every expert

    A step begins with `layer_s`; then its misses go to the link, ahead of what was to be fetched ahead and has not
    begun. Experts are computed as they come, those at hand first. A miss of a later wave waits until the wave before it
    is computed. Raises ValueError where a log is missing or `host` belongs to another simulation.
    """
    log, steps = _logged(device), device.steps
    far = np.zeros(len(log.step), np.bool_)
    if host is not None:
        far = _from_disk(device, host)
    ends = np.searchsorted(log.step, np.arange(1, len(steps) + 1))
    costs = (times.layer_s, times.expert_s, times.load_s, times.read_s)
    loads = int((log.gone != -2).sum())
    total, link, disk = _timeline(log, ends, far, steps.layers * steps.experts, loads, costs)
    sizes = np.diff(steps.offsets)
    work = times.layer_s + times.expert_s * sizes
    floor = _floor(steps, device.places, work, times.load_s, times.expert_s)
    if host is not None:
        both = min(device.slots + host.slots, steps.layers * steps.experts)
        # an expert that must be read from disk is in neither cache
        above, last_s = shared(steps.layers, steps.experts, both), times.load_s + times.expert_s
        floor = max(floor, _floor(steps, above, work, times.read_s, last_s))
    compute = float(work.sum())
    return Stall(compute, max(0.0, total - compute), max(0.0, floor - compute), link, disk)


def _from_disk(device: Simulation, host: Simulation) -> NDArray[np.bool_]:
    """Which events of the device's log are loads that the host does not hold, [events]."""
    lower, kept = loads_of(device), _logged(host)
    same = len(lower) == len(host.steps) and np.array_equal(lower.ids, host.steps.ids)
    if not same or kept.ahead.any():
        raise ValueError("stall: host must be the simulation of loads_of(device), got another")
    log = _logged(device)
    loaded = np.flatnonzero(log.gone != -2)
    group, _ = _groups(log.step[loaded], log.expert[loaded] // device.steps.experts, log.ahead[loaded])
    size = device.steps.layers * device.steps.experts
    missing = kept.step[kept.gone != -2].astype(np.int64) * size + kept.expert[kept.gone != -2]
    far = np.zeros(len(log.step), np.bool_)
    far[loaded] = np.isin(group * size + log.expert[loaded], missing)
    return far


def _floor(steps: Steps, places: Pools, work: NDArray[np.float64], load_s: float, last_s: float) -> float:
    """Seconds that no order of loads can go below: for each step, the fewest loads that it and those before it need
    (least_loads), what follows the last of them, and the steps after it."""
    misses = np.cumsum(least_loads(steps, places))
    after = work.sum() - np.cumsum(work)
    return float(np.max(misses * load_s + last_s * (misses > 0) + after, initial=work.sum()))


@njit
def _load(clocks, issued, far, load_s, read_s):
    """One expert over the links; clocks: when link and disk are free, how long each was busy. Returns its arrival."""
    if far:
        issued = max(clocks[1], issued) + read_s
        clocks[1] = issued
        clocks[3] += read_s
    clocks[0] = max(clocks[0], issued) + load_s
    clocks[2] += load_s
    return clocks[0]


@njit
def _timeline(log, ends, far, size, loads, costs):
    """When the last step ends, and how long link and disk were busy. `ends` [N]: where each step's events end."""
    layer_s, expert_s, load_s, read_s = costs
    arrival, place = np.zeros(size), np.full(size, -1)  # place in the queue of fetches that have not begun
    queue, when, head, tail = np.empty(loads, np.int64), np.empty(loads), 0, 0
    clocks, coming = np.zeros(4), np.empty(size)
    now, i = 0.0, 0
    for n in range(len(ends)):
        start = now + layer_s
        while head < tail:  # what the links begin before this step asks
            event = queue[head]
            e = log.expert[event]
            if place[e] == head:
                if max(clocks[1] if far[event] else clocks[0], when[head]) >= start:
                    break
                arrival[e], place[e] = _load(clocks, when[head], far[event], load_s, read_s), -1
            head += 1
        now = start
        while i < ends[n] and not log.ahead[i]:  # a wave
            wave, count, issued = log.wave[i], 0, now
            while i < ends[n] and not log.ahead[i] and log.wave[i] == wave:
                e, gone = log.expert[i], log.gone[i]
                if gone >= 0:
                    place[gone] = -1
                if gone != -2:
                    arrival[e] = _load(clocks, issued, far[i], load_s, read_s)
                elif place[e] >= 0:
                    arrival[e] = _load(clocks, issued, far[queue[place[e]]], load_s, read_s)
                    place[e] = -1
                coming[count] = arrival[e]
                count += 1
                i += 1
            coming[:count].sort()
            for a in coming[:count]:
                now = max(now, a) + expert_s
        while i < ends[n]:
            e, gone = log.expert[i], log.gone[i]
            if gone >= 0:
                place[gone] = -1
            queue[tail], when[tail], place[e] = i, start, tail
            tail += 1
            i += 1
    return now, clocks[2], clocks[3]
