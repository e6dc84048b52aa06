"""Timing: one after another in turn (A B C, B C A, ...), so that what disturbs the machine disturbs all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

CLOCKS: Mapping[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


@contextmanager
def threads(who: str, count: int | None, clock: str) -> Iterator[None]:
    """torch with `count` threads, inside; None: as it is. Raises ValueError, naming `who`, where the process's own time
    would be that of several."""
    before = torch.get_num_threads()
    if clock == "cpu" and (count or before) > 1:
        raise ValueError(f"{who}: --clock cpu must go with --threads 1")
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class Contestant:
    """`run(call)` is timed, `before()` and `after()` are not. A sample is the mean over `calls` consecutive calls."""

    run: Callable[[int], object]
    after: Callable[[], None] = lambda: None
    before: Callable[[], None] = lambda: None
    calls: int = 1  # calls timed as one sample
    rotate: int = 1  # else: how many different calls the samples take turns over
    first_s: float = 0.0  # seconds per call of the warm-up
    samples_s: list[float] = field(default_factory=list)
    note: str = ""

    def summary(self) -> dict[str, object]:
        s = self.samples_s
        out: dict[str, object] = {"median_s": statistics.median(s), "min_s": min(s), "max_s": max(s), "samples_s": s}
        return out | ({"note": self.note} if self.note else {})


def sample(who: Contestant, turn: int, clock: str = "wall", device: str = "cpu") -> float:
    """Seconds per call of one sample."""
    first = 0 if who.calls > 1 else turn % who.rotate
    who.before()
    if device.startswith("cuda"):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for i in range(who.calls):
            who.run(first + i)
        end.record()
        end.synchronize()
        seconds = start.elapsed_time(end) / 1e3
    else:
        now = CLOCKS[clock]
        begin = now()
        for i in range(who.calls):
            who.run(first + i)
        seconds = now() - begin
    who.after()
    return seconds / who.calls


def interleave(
    contestants: Mapping[str, Contestant],
    budget_s: float,
    clock: str = "wall",
    device: str = "cpu",
    rounds: tuple[int, int] = (3, 40),
) -> int:
    """Fills every contestant's samples and returns the number of rounds.

    The rounds are chosen from each one's `first_s`, so that the whole takes about
    `budget_s`. One that would take a tenth of the budget for each sample gets as many as half the budget holds, one to
    three; one that takes more than the budget keeps its warm-up as its one sample.
    """
    cost = {name: who.first_s * who.calls for name, who in contestants.items()}
    turns_of = {n: max(1, min(rounds[0], int(budget_s / 2 / c))) for n, c in cost.items() if c > budget_s / 10}
    if not contestants:
        return 0
    total = sum(c for n, c in cost.items() if n not in turns_of)
    turns = max(rounds[0], min(rounds[1], int(budget_s / total) if total else rounds[0]))
    for name, who in contestants.items():
        if cost[name] > budget_s:
            turns_of[name] = 0
            who.samples_s.append(who.first_s)
            who.note = "one sample, its first call"
    everyone = list(contestants.items())
    for turn in range(turns):
        first = turn % len(everyone)  # the order rotates: nobody always follows the same neighbour
        for name, who in everyone[first:] + everyone[:first]:
            if turn < turns_of.get(name, turns):
                who.samples_s.append(sample(who, turn, clock, device))
    return turns
