"""Timing on a GPU: CUDA events, contestants in turn, medians and quartiles. On "cpu" the wall clock stands in."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Step = Callable[[], object]


@dataclass
class Entry:
    """A contestant of one case. `steps` run one after another and are timed each (forward, backward): step i gets what
    step i-1 returned. `calls`: a sample is the mean over so many; `note` goes beside the result."""

    steps: Mapping[str, Callable[[Any], Any]]
    calls: int = 1
    note: str = ""
    samples: dict[str, list[float]] = field(default_factory=dict)


class Clock:
    """Times between marks on the device's own stream."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")

    def mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, a: Any, b: Any) -> float:
        return a.elapsed_time(b) / 1e3 if self.cuda else b - a

    def lead(self, seconds: float = 4e-4) -> None:
        """Keeps the device busy while the host runs ahead, so that its calls are not what is measured."""
        if self.cuda:
            torch.cuda._sleep(int(seconds * 1.9e9))

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def sample(entry: Entry, clock: Clock) -> float:
    """Takes one sample of every step; returns the whole sample's seconds."""
    clock.wait()
    begin = time.perf_counter()
    clock.lead()
    marks, carried = [clock.mark()], None
    for step in entry.steps.values():
        carried = step(carried)
        marks.append(clock.mark())
    clock.wait()
    del carried
    for name, a, b in zip(entry.steps, marks, marks[1:], strict=False):
        entry.samples.setdefault(name, []).append(clock.between(a, b) / entry.calls)
    if len(marks) > 2:
        entry.samples.setdefault("step", []).append(clock.between(marks[0], marks[-1]) / entry.calls)
    return time.perf_counter() - begin


def interleave(
    entries: Mapping[str, Entry],
    clock: Clock,
    budget_s: float,
    rounds: tuple[int, int] = (3, 25),
    failed: Callable[[str, Exception], None] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> int:
    """Rounds of one sample each, the order rotating, until the time is used up; the number of rounds. A contestant that
    raises is handed to `failed` and takes no further part; `say` hears who runs."""
    begin, done, living = time.perf_counter(), 0, list(entries)
    while living and done < rounds[1]:
        first = done % len(living)
        for name in living[first:] + living[:first]:
            say(name)
            try:
                sample(entries[name], clock)
            except Exception as error:
                if failed is None:
                    raise
                failed(name, error)
                living.remove(name)
        done += 1
        if done >= rounds[0] and time.perf_counter() - begin > budget_s * (1 - 1 / (done + 1)):
            break
    return done


def statistics_of(samples: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles, extremes, in microseconds, and every sample."""
    us = [1e6 * s for s in samples]
    low, _, high = statistics.quantiles(us, n=4, method="inclusive") if len(us) > 1 else (us[0],) * 3
    return {
        "median_us": statistics.median(us), "lower_quartile_us": low, "upper_quartile_us": high, "min_us": min(us),
        "max_us": max(us), "samples_us": us,
    }  # fmt: skip


def captured(run: Step) -> Step:
    """`run` as a CUDA graph; its replay. Runs it three times first, on a stream of its own, as capturing asks for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    def replay() -> object:
        graph.replay()
        return kept

    return replay
