"""Tokens per second of a model whose experts are on disk, or in host memory beside a GPU, and of its rivals: loads on
demand, MoE-Infinity's policy, all resident.

Routing is replayed from a trace, so that experts are asked for as a real model asks, at any width; policies and
predictors learn from the trace's first part and serve the second.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...moe.elsewhere import send_elsewhere
from ...moe.offload import Arena, Engine, FileStore, HostStore
from ...moe.offload.ahead import foresight_of
from ...moe.offload.forms import experts_in, form_of, survey
from ...moe.offload.kinds import Layer
from ...moe.offload.lower import FILE, groups_of, store_of
from ...moe.offload.offload import Offload, offload
from ...placement.caching.predict import Predictor
from ...placement.caching.predict import fit as fit_path
from ...placement.traces.trace import Trace
from .model import Replay, Size, build
from .on_device import plain_copy, watch
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
    same: bool | None = None  # tokens are those of the resident model


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


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def measure_on_gpu(
    fit: Trace,
    judge: Trace,
    size: Size,
    *,
    settings: dict[str, dict[str, Any]],
    device: torch.device | str = "cuda",
    say: Callable[[str], None] = _to_stderr,
) -> dict[str, Any]:
    """The same with experts in page-locked host memory, and `plain_copy_GBps`, for settings without a format. Each is
    said as it is done, so that what is known is not lost when time is up."""
    fit, judge, device = layers_of(fit, size.layers), layers_of(judge, size.layers), torch.device(device)
    whole = {name: options for name, options in settings.items() if "format" not in options}
    path = fit_path(fit) if any(o["prefetch"] == "path" for o in whole.values()) else None
    say("building")
    model = build(judge, size, device=device)
    run = _OnDevice(model, Replay(model, judge), Path(), fit)
    found: dict[str, Any] = {}

    def done(name: str, what: Any) -> None:
        found[name] = what
        say(f"{name}: {what}")

    with torch.inference_mode(False):
        done("resident", run.resident())
        run.send_away(device)
        if device.type == "cuda":
            done("plain_copy_GBps", plain_copy(run.store, run.device))
        done("on demand", run.on_demand(round(BUDGET * judge.num_experts)))
        ways = {n: o | {"prefetch": path if o["prefetch"] == "path" else None} for n, o in whole.items()}
        for name, options in ways.items():
            done(name, run.offloaded(**options))
        if device.type == "cuda":  # last: once a profiler has been at work, every launch takes longer
            for name, options in ways.items():
                done(name, run.watched(found[name], **options))
    run.store.close()
    return found


class _Run:
    def __init__(self, model: Any, replay: Replay, folder: Path, fit: Trace) -> None:
        self.model, self.replay, self.folder, self.fit = model, replay, folder, fit
        self.device = next(model.parameters()).device
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

    def _lower(self) -> FileStore | HostStore:
        """The tier below the rival's slots, its to close."""
        return FileStore(self.folder / FILE, page_cache=False)

    @contextmanager
    def _rival(self, slots: int):
        store = self._lower()
        self.expert_bytes = store.layers[0].kind(0).nbytes
        rival = OnDemand(store, slots, self.device)
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
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                seconds.append(time.perf_counter() - begun)
                first = made if first is None else first
                between()
        assert first is not None
        return first, float(np.median(seconds))

    def _generate(self, tokens: int) -> Tensor:
        first = torch.tensor([[65]], device=self.device)
        return self.model.generate(first, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)

    def _same(self, got: Tensor) -> None:
        if self.want is not None and not torch.equal(got, self.want):
            raise AssertionError("generation: tokens must be those of the resident model, got others")


class _OnDevice(_Run):
    """Experts in host memory: page-locked once, with an engine of its own for each setting; they never come back."""

    def send_away(self, device: torch.device) -> None:
        self.found, _ = survey(self.model)
        groups = groups_of(self.found, {})
        layers = [
            Layer.of(name, (range(len(form.weights(module)["w_down"])), form.weights(module)))
            for name, module, form in self.found
        ]
        store = store_of(self.found, layers, groups, None, device, page_cache=True, verify=False)
        assert isinstance(store, HostStore)
        self.store = store
        for index, (_, module, form) in enumerate(self.found):  # the device's memory goes before slots are made
            for ours, parameter in form.weights(module).items():
                parameter.data = store.whole(index)[ours]
                parameter.requires_grad_(False)
        if device.type == "cuda":
            torch.cuda.empty_cache()

    @contextmanager
    def _offload(self, policy: str, prefetch: str | Predictor | None) -> Iterator[Offload]:
        engine = Engine(self.store.lend(), BUDGET, policy=policy, trace=self.fit, device=self.device)
        foresight = foresight_of(prefetch, self.model, self.found, self.fit)
        offloaded = Offload(self.model, self.found, {}, engine, engine.store, foresight, self.device)
        try:
            yield offloaded
        finally:
            offloaded.close(restore=False)

    def offloaded(self, format: str | None = None, **options: Any) -> Speed:
        assert format is None
        with self._offload(**options) as offloaded:
            seen = [offloaded.stats()]
            got, seconds = self._rounds(lambda: seen.append(offloaded.stats()))
        before, after = seen[-2], seen[-1]
        return Speed(
            TOKENS / seconds,
            (after.hits - before.hits) / (after.accesses - before.accesses),
            (after.bytes - before.bytes) / TOKENS / 1e6,
            same=self._agree(got),
        )

    def watched(self, speed: Speed, **options: Any) -> Speed:
        """The overlap and the rate of copying too, by the device's own records of some tokens more."""
        with self._offload(**options) as offloaded, torch.no_grad():
            self.replay.rewind()
            self._generate(WARM)
            before = offloaded.stats().bytes
            seen = watch(lambda: self._generate(TOKENS // 3))
            copied = offloaded.stats().bytes - before
        return replace(speed, overlap=seen.overlap, GBps=copied / seen.copy_s / 1e9 if seen.copy_s else None)

    def _lower(self) -> HostStore:
        return self.store.lend()

    def _same(self, got: Tensor) -> None:
        self._agree(got)

    def _agree(self, got: Tensor) -> bool:
        """Whether tokens are the resident model's: a difference is told, it does not end the measurement."""
        return self.want is not None and torch.equal(got, self.want)
