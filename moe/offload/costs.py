"""Measures what an expert costs here: computed on the device, computed by the host, copied, read from disk."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ...kernels.grouped_ffn import grouped_ffn
from ...kernels.quantized import Quantized
from ...kernels.routing import Routing
from ...placement.caching.costs import FREE, Costs
from ...placement.cluster.links import Link, fit
from .forms import Form
from .host import Store

ROWS = (1, 2, 4, 8, 16, 32, 64)
COLD_BYTES = 256 << 20  # what is larger than caches comes from memory each time
_LEAST, _MOST = 3, 100  # calls for each figure

Weights = Mapping[str, "Tensor | Quantized"]
Clock = Callable[[], float]


def measure_costs(
    weights: Weights,
    *,
    device: torch.device | str = "cpu",
    file: str | os.PathLike[str] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    rows: Sequence[int] = ROWS,
    seconds: float = 1.0,
    clock: Clock = time.perf_counter,
    **form: Any,
) -> Costs:
    """The Costs of one expert of `weights` on this machine, measured in about `seconds`.

    weights  of experts alike, [n, ...] each, in host memory, called as grouped_ffn's arguments are (w_gate and w_up for
             a pair). They are computed in turn, as many as make 256 MiB: where there are fewer, they stay in caches,
             and the figures are lower than a large model's
    device   where experts are cached. On "cpu" the host is the device, and copies are free
    file     read by parts of an expert's size, past the page cache where the system lets go of it. None: no disk
    dtype    of the rows
    form     activation, gated, transposed, interleaved as for grouped_ffn

    Each figure is the median of three calls or more, the first not counted. Measure once, on an idle machine. Raises as
    grouped_ffn does, ValueError where there are no weights or `file` is empty, OSError where it cannot be read.
    """
    if not weights:
        raise ValueError("measure_costs: weights must be those of an expert by name, got none")
    device = torch.device(device)
    n = next(iter(weights.values())).shape[0]
    size = sum(w.nbytes for w in weights.values()) // n
    experts = [{name: _part(w, e) for name, w in weights.items()} for e in range(min(n, -(-COLD_BYTES // size)))]
    share = seconds / (2 * len(rows) + 7)
    host = tabulate(_computing(experts, dtype, form), rows, share, clock)
    read = FREE if file is None else _reading(file, size, share, clock)
    if device.type == "cpu":
        return Costs(tuple(rows), host, None, FREE, read, size)
    there = [{name: w.to(device) for name, w in e.items()} for e in experts]

    def settled(work: Callable[[int], object]) -> Callable[[int], object]:
        def whole(n: int) -> None:
            work(n)
            torch.accelerator.synchronize(device)

        return whole

    computed = tabulate(settled(_computing(there, dtype, form)), rows, share, clock)
    source = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(size, dtype=torch.uint8, device=device)
    copy = rate(settled(lambda n: target[:n].copy_(source[:n], non_blocking=True)), _sizes(size), share, clock)
    sent = torch.ones(max(rows), _width(experts[0], form), dtype=dtype, device=device)
    start_s = timed(lambda: sent.copy_(sent.cpu()), share, clock)
    return Costs(tuple(rows), computed, host, copy, read, size, start_s)


def costs_of(hybrid: bool | Costs, store: Store, form: Form, device: torch.device) -> Costs | None:
    """What hybrid execution goes by; measured on the first layer, whose experts have this `form`."""
    if not hybrid or isinstance(hybrid, Costs):
        return hybrid or None
    weights = store.whole(0)
    return measure_costs(
        weights, device=device, dtype=weights["w_down"].dtype, activation=form.activation, gated=form.activation.gated,
        transposed=form.layout["transposed"], interleaved=form.layout["interleaved"],
    )  # fmt: skip


def timed(work: Callable[[], object], budget_s: float, clock: Clock) -> float:
    """Median seconds of `work`, called for about `budget_s`; the first call is not counted."""
    work()
    spent: list[float] = []
    end = clock() + budget_s
    while len(spent) < _LEAST or (len(spent) < _MOST and clock() < end):
        begin = clock()
        work()
        spent.append(clock() - begin)
    return median(spent)


def tabulate(work: Callable[[int], object], rows: Sequence[int], budget_s: float, clock: Clock) -> tuple[float, ...]:
    """Seconds of `work(n)` for each n of `rows`. More rows are never faster: what noise says otherwise is levelled."""
    table: list[float] = []
    for n in rows:
        table.append(max(timed(lambda n=n: work(n), budget_s, clock), *table[-1:], 0.0))  # type: ignore[misc]
    return tuple(table)


def rate(move: Callable[[int], object], sizes: Sequence[int], budget_s: float, clock: Clock) -> Link:
    """The Link nearest to the seconds of `move(bytes)` at these sizes."""
    return fit([(n, timed(lambda n=n: move(n), budget_s, clock)) for n in sizes])  # type: ignore[misc]


def _part(w: Tensor | Quantized, expert: int) -> Tensor | Quantized:
    """One expert's, as [1, ...]; nothing is copied."""
    here = slice(expert, expert + 1)
    return Quantized(w.data[here], w.scale[here], w.format, w.block) if isinstance(w, Quantized) else w.detach()[here]


def _width(expert: Weights, form: Mapping[str, Any]) -> int:
    first = expert["w_gate" if "w_gate" in expert else "w_gate_up"]
    return first.shape[1 if form.get("transposed") else 2]


def _computing(experts: Sequence[Weights], dtype: torch.dtype, form: Mapping[str, Any]) -> Callable[[int], object]:
    """work(n): the next of the experts on n rows."""
    width, turn = _width(experts[0], form), 0

    def work(n: int) -> Tensor:
        nonlocal turn
        turn = (turn + 1) % len(experts)
        w: dict[str, Any] = dict(experts[turn])
        device = w["w_down"].device
        first = (w.pop("w_gate"), w.pop("w_up")) if "w_gate" in w else w.pop("w_gate_up")
        ids = torch.zeros(n, 1, dtype=torch.int32, device=device)
        routing = Routing(ids, torch.ones(n, 1, device=device), 1)
        with torch.no_grad():
            return grouped_ffn(torch.ones(n, width, dtype=dtype, device=device), routing, first, **w, **form)

    return work


def _sizes(size: int) -> tuple[int, ...]:
    return max(1, size // 16), max(2, size // 4), size + 2


def _reading(file: str | os.PathLike[str], size: int, budget_s: float, clock: Clock) -> Link:
    """Reads at places that move on through the file, so that no two are the same until its end."""
    handle = os.open(file, os.O_RDONLY)
    try:
        length = os.fstat(handle).st_size
        if not length:
            raise ValueError(f"measure_costs: file must hold bytes to read, got an empty one, {file}")
        buffer, at = bytearray(size + 2), 0

        def read(n: int) -> None:
            nonlocal at
            left = memoryview(buffer)[:n]
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            while left:
                got = os.preadv(handle, [left], at)
                left, at = left[got:], (at + got) % length

        return rate(read, _sizes(size), budget_s, clock)
    finally:
        os.close(handle)
