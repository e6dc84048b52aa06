"""Tokens per second of a model whose experts are on disk: beside loads on demand, MoE-Infinity's policy, all resident.

Routing is replayed from a trace, so that experts are asked for as a real model asks, at any width; policies and
predictors learn from the trace's first part and serve the second.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...moe.elsewhere import send_elsewhere
from ...moe.offload import Arena, FileStore
from ...moe.offload.forms import experts_in, form_of
from ...moe.offload.lower import FILE
from ...moe.offload.offload import offload
from ...placement.trace import Trace
from .model import Replay, Size, build
from .rivals import OnDemand

BUDGET = 0.25
SETTINGS: dict[str, dict[str, Any]] = {  # options of headgate.offload; a format is for all experts
    "lru": {"policy": "lru", "prefetch": None},
    "sequence (MoE-Infinity)": {"policy": "sequence", "prefetch": None},
    "adaptive": {"policy": "adaptive", "prefetch": None},
    "adaptive + path": {"policy": "adaptive", "prefetch": "path"},
    "learned + path": {"policy": "learned", "prefetch": "path"},
    "adaptive + path, int8": {"policy": "adaptive", "prefetch": "path", "format": "int8"},
    "adaptive + path, int4": {"policy": "adaptive", "prefetch": "path", "format": "int4"},
}
WARM, TOKENS, ROUNDS = 24, 48, 3


@dataclass(frozen=True)
class Speed:
    """Medians over rounds; `hit_rate`, `MB` read for a token, `overlap` and `GBps` of reading in the last round."""

    tokens_per_s: float
    hit_rate: float
    MB: float
    overlap: float | None = None
    GBps: float | None = None


def layers_of(trace: Trace, layers: int) -> Trace:
    """The first layers of a trace."""
    return Trace(trace.expert_ids[:layers], trace.num_experts, sequence=trace.sequence)


def measure(
    fit: Trace, judge: Trace, size: Size, *, settings: dict[str, dict[str, Any]], folder: Path | None = None
) -> dict[str, Any]:
    """Speeds by name, "on demand" and "resident" beside the `settings` (name -> options of headgate.offload), and what
    plain reads of experts reach ("plain_read_GBps", by the number of threads). Tokens are compared, but of few bits.

    The page cache is kept out of it: reads go to the disk.
    """
    fit, judge = layers_of(fit, size.layers), layers_of(judge, size.layers)
    model = build(judge, size)
    replay = Replay(model, judge)
    with tempfile.TemporaryDirectory(dir=folder) as to:
        run = _Run(model, replay, Path(to), fit)
        found: dict[str, Any] = {"resident": run.resident()}
        whole = {name: options for name, options in settings.items() if "format" not in options}
        for name, options in whole.items():
            found[name] = run.offloaded(**options)
        found["on demand"] = run.on_demand(round(BUDGET * judge.num_experts))
        found["plain_read_GBps"] = {str(n): run.plain_read(n) for n in (1, 4)}
        for name in [name for name in settings if name not in whole]:  # rounded weights come back rounded: last
            found[name] = run.offloaded(**settings[name])
    return found


class _Run:
    def __init__(self, model: Any, replay: Replay, folder: Path, fit: Trace) -> None:
        self.model, self.replay, self.folder, self.fit = model, replay, folder, fit
        self.want: Tensor | None = None
        self.expert_bytes = 0

    def resident(self) -> Speed:
        self.want, seconds = self._rounds(lambda: None)
        return Speed(TOKENS / seconds, 1.0, 0.0)

    def offloaded(self, format: str | None = None, **options: Any) -> Speed:
        options = {"trace": self.fit, "page_cache": False, **options}
        if format is not None:
            experts = self.fit.num_experts
            options["formats"] = {name: [format] * experts for name, _ in experts_in(self.model)}
        with offload(self.model, BUDGET, disk=self.folder, **options) as offloaded:
            seen = [offloaded.stats()]
            got, seconds = self._rounds(lambda: seen.append(offloaded.stats()))
            if format is None:
                self._same(got)
            before, after = seen[-2], seen[-1]
        moved, copy_s = after.bytes - before.bytes, after.copy_s - before.copy_s
        shorter = min(copy_s, after.compute_s - before.compute_s)
        return Speed(
            TOKENS / seconds,
            (after.hits - before.hits) / (after.accesses - before.accesses),
            moved / TOKENS / 1e6,
            (after.both_s - before.both_s) / shorter if shorter else None,
            moved / copy_s / 1e9 if copy_s else None,
        )

    def on_demand(self, slots: int) -> Speed:
        with self._rival(slots) as rival:
            seen = [(0, 0)]
            got, seconds = self._rounds(lambda: seen.append((rival.accesses, rival.loads)))
            self._same(got)
        accesses, loads = (after - before for before, after in zip(seen[-2], seen[-1], strict=True))
        return Speed(TOKENS / seconds, 1 - loads / accesses, loads * self.expert_bytes / TOKENS / 1e6)

    def plain_read(self, threads: int, experts: int = 200) -> float:
        """GB/s of experts read in random order by so many threads, and nothing else."""
        store = FileStore(self.folder / FILE, page_cache=False)
        order = np.random.default_rng(0).integers(0, [len(store.layers), store.layers[0].experts], (experts, 2))
        kind = store.layers[0].kind(0)

        def work(mine) -> None:
            into = Arena([kind], [1], "cpu").slot(0)
            for layer, e in mine.tolist():
                store.read(layer, e, into)

        workers = [threading.Thread(target=work, args=(order[i::threads],)) for i in range(threads)]
        begun = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        seconds = time.perf_counter() - begun
        store.close()
        return experts * kind.nbytes / seconds / 1e9

    @contextmanager
    def _rival(self, slots: int):
        store = FileStore(self.folder / FILE, page_cache=False)
        self.expert_bytes = store.layers[0].kind(0).nbytes
        rival = OnDemand(store, slots)
        modules = [(module, form_of(module)) for _, module in experts_in(self.model)]
        for index, (module, form) in enumerate(modules):
            assert not isinstance(form, str)
            send_elsewhere(module, partial(rival.compute, index, activation=form.activation))
        try:
            yield rival
        finally:
            for module, _ in modules:
                send_elsewhere(module, None)
            store.close()

    def _rounds(self, between: Callable[[], None]) -> tuple[Tensor, float]:
        """(tokens of the first round, median seconds of a round): every round generates further along the trace."""
        self.replay.rewind()
        first, seconds = None, []
        with torch.no_grad():
            self._generate(WARM)
            between()
            for _ in range(ROUNDS):
                begun = time.perf_counter()
                made = self._generate(TOKENS)
                seconds.append(time.perf_counter() - begun)
                first = made if first is None else first
                between()
        assert first is not None
        return first, float(np.median(seconds))

    def _generate(self, tokens: int) -> Tensor:
        return self.model.generate(torch.tensor([[65]]), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)

    def _same(self, got: Tensor) -> None:
        if self.want is not None and not torch.equal(got, self.want):
            raise AssertionError("generation: tokens must be those of the resident model, got others")
