"""What a device did meanwhile: copies to it, kernels, both at once; and what a plain pinned copy reaches."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ...moe.offload import Arena, HostStore
from ...moe.offload.stats import common, length, merged

_LEAST_NS = 10_000  # copies below this are tables of slots and the like, no experts


class Seen(NamedTuple):
    """Seconds of the device: experts were copied to it, kernels ran, both at once."""

    copy_s: float
    compute_s: float
    both_s: float

    @property
    def overlap(self) -> float | None:
        """Of the shorter of the two, the share that went on beside the other."""
        shorter = min(self.copy_s, self.compute_s)
        return self.both_s / shorter if shorter else None


def watch(work: Callable[[], object]) -> Seen:
    """What the device did in `work`, by its own clock (CUPTI's records); all zero where nothing was recorded."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize()
    copies, kernels = [], []
    for e in seen.profiler.kineto_results.events():  # type: ignore[union-attr]
        if e.device_type() != DeviceType.CUDA:
            continue
        if "annotation" in getattr(e, "activity_type", str)():
            continue
        name, span = e.name(), (e.start_ns(), e.start_ns() + e.duration_ns())
        if name.startswith("Memcpy HtoD"):
            if e.duration_ns() >= _LEAST_NS:
                copies.append(span)
        elif not name.startswith(("Memcpy", "Memset")):
            kernels.append(span)
    copies, kernels = merged(copies), merged(kernels)
    return Seen(length(copies) / 1e9, length(kernels) / 1e9, common(copies, kernels) / 1e9)


def plain_copy(store: HostStore, device: torch.device, experts: int = 200) -> float:
    """GB/s of experts copied out of page-locked memory one after another, and nothing else; the best of four times."""
    kind = store.layers[0].kind(0)
    into = Arena([kind], [1], device).slot(0)
    places = [(n % len(store.layers), (n * 7) % store.layers[0].experts) for n in range(experts)]
    parts = [{name: t[e] for name, t in store.whole(layer).items()} for layer, e in places]
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    seconds = []
    for _ in range(4):  # the first time pages are met takes longer
        torch.cuda.synchronize()
        begin.record()
        for expert in parts:
            for name, t in expert.items():
                into[name].copy_(t, non_blocking=True)
        end.record()
        torch.cuda.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return experts * kind.nbytes / min(seconds) / 1e9
