"""Hybrid execution: the host computes some of a step's experts where their weights are, while others travel.

Rows are small and weights large, so it can pay to send the rows (Fiddler, Kamahori et al., 2024; KTransformers, 2025).
Which experts, placement/caching/split.py says: the split of least makespan over link, device and host.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...placement.caching.costs import Costs
from ...placement.caching.split import DEVICE, HOST, split
from .groups import Group
from .host import HostStore, Store
from .loads import LOOK_S
from .stats import Timing

Pairs = tuple[Tensor, dict[str, Tensor]]  # numbers of pairs [n] int64, and what belongs to them, in host memory
_NAME = "headgate-offload-host"
_END_S = 60.0  # how long a closing Host waits for a computation to end


class Job:
    """What the host computes for one step, and what came of it."""

    __slots__ = ("begun", "error", "over", "result", "work")

    def __init__(self, work: Callable[[], Pairs | None]) -> None:
        self.work: Callable[[], Pairs | None] | None = work
        self.begun = self.over = False
        self.result: Pairs | None = None
        self.error: BaseException | None = None

    def end(self, result: Pairs | None, error: BaseException | None) -> None:
        self.result, self.error, self.work, self.over = result, error, None, True


class Host:
    """The host's part for one engine: a thread that begins with the first job and takes one after the other.

    A job that fails hands its error to who waits for it. A thread that has died is replaced by whoever orders or waits;
    what it was at has failed. Raises ValueError where experts of `store` are not plain tensors in host memory.
    """

    def __init__(self, store: Store, costs: Costs, timing: Timing) -> None:
        self.weights = [store.whole(i) for i in range(len(store.layers))] if isinstance(store, HostStore) else [{}]
        if not all(self.weights):
            raise ValueError(
                "Engine: costs must be None where experts are not plain tensors in host memory, which the host could "
                f"compute in place, got some for a {type(store).__name__}"
            )
        self.costs, self.closed = costs, False
        self._timing = timing
        self._turn = threading.Condition()
        self._jobs: deque[Job] = deque()  # the first is the one at work
        self._thread: threading.Thread | None = None
        split([1], [HOST], costs)  # compiled now, not within a step

    def part(self, ids: NDArray[np.int32], rows: NDArray[np.integer], here: NDArray[np.bool_]) -> NDArray[np.int32]:
        """Of a step's experts `ids`, rising, with so many `rows` [n] each and those that are `here` [n] in slots: the
        ones that the host is to compute, rising."""
        return ids[split(rows, np.where(here, DEVICE, HOST), self.costs).host]

    def order(self, work: Callable[[], Pairs | None]) -> Job:
        job = Job(work)
        with self._turn:
            self._open()
            self._jobs.append(job)
            self._revive()
            self._turn.notify_all()
        return job

    def wait(self, job: Job, patience_s: float) -> Pairs | None:
        """What came of a job, waited for. Raises its error, or TimeoutError."""
        end = time.perf_counter() + patience_s
        with self._turn:
            while not job.over:
                self._open()
                if time.perf_counter() > end:
                    raise TimeoutError(f"offload: waited {patience_s:g} s for experts that the host computes")
                if not self._turn.wait(min(LOOK_S, patience_s)):
                    self._revive()
        if isinstance(job.error, Exception):
            raise job.error
        if job.error is not None:
            raise RuntimeError(f"offload: experts could not be computed by the host: {job.error!r}") from job.error
        return job.result

    def close(self) -> None:
        """Ends the thread once it is through with what it is at; the rest is dropped, and who waits for it hears."""
        with self._turn:
            self.closed = True
            self._jobs.clear()
            self._turn.notify_all()
        if self._thread not in (None, threading.current_thread()):  # which may be the one that collects garbage
            self._thread.join(_END_S)
        self.weights = []

    def _open(self) -> None:
        if self.closed:
            raise RuntimeError("offload: the engine must be open, got one that is closed")

    def _revive(self) -> None:
        """Starts the thread where there is none."""
        if self._thread is not None and self._thread.is_alive():
            return
        if self._jobs and self._jobs[0].begun:
            self._jobs.popleft().end(None, RuntimeError("offload: the thread that computes on the host has died"))
            self._turn.notify_all()
        self._thread = threading.Thread(target=self._run, name=_NAME, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (work := self._next()) is not None:
            result: Pairs | None = None
            error: BaseException | None = None
            self._timing.begin_computing()
            try:
                result = work()
            except BaseException as e:
                error = e
            finally:
                self._timing.end_computing()
            with self._turn:
                if self._jobs:
                    self._jobs.popleft().end(result, error)
                self._turn.notify_all()
            del work, result, error

    def _next(self) -> Callable[[], Pairs | None] | None:
        """The next job's work, waited for; None: it is all over."""
        with self._turn:
            while not self.closed:
                if self._jobs:
                    self._jobs[0].begun = True
                    return self._jobs[0].work
                self._turn.wait(1.0)
        return None


def in_place(out: Tensor) -> bool:
    """Whether the host can write outputs where they belong."""
    return out.device.type == "cpu"


def work_of(
    group: Group, ids: Tensor, outs: Mapping[str, Tensor], write: Callable[..., None]
) -> Callable[[], Pairs | None]:
    """The host's work on a group of a step: write(**outs) puts what its pairs give into their rows of `outs`, by name.
    Where these are not in the host's memory it writes into others and returns the rows of its pairs. `ids` are the
    routing's, in host memory. Modes of gradients are the caller's."""
    inference, gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    direct = all(map(in_place, outs.values()))
    targets = outs if direct else {name: torch.empty(t.shape, dtype=t.dtype) for name, t in outs.items()}

    def work() -> Pairs | None:
        with torch.inference_mode(inference), torch.set_grad_enabled(gradients):
            write(**targets)
            if direct:
                return None
            pairs = torch.isin(ids.flatten(), torch.tensor(group.experts, dtype=ids.dtype)).nonzero().flatten()
            return pairs, {name: t[pairs] for name, t in targets.items()}

    return work


def put_pairs(outs: Mapping[str, Tensor], made: Pairs | None) -> None:
    """Brings what the host has returned to where it belongs."""
    if made is not None:
        pairs, found = made
        for name, out in outs.items():
            out.index_copy_(0, pairs.to(out.device), found[name].to(out.device))
