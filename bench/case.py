"""One case: all implementations checked, timed in turn, and summed up as a dictionary for print and JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from . import memory
from .bounds import Matmuls
from .check import WrongNumbers, check_measured, check_small
from .hardware import READ_BYTES, Reader, available_bytes, touch_memory
from .measure import Contestant, interleave, sample
from .rivals import IMPLEMENTATIONS, TRANSFORMERS, Builder, Forward
from .shapes import DTYPES, Case, Problem, make_parameters, make_problem

GiB = 2**30


@dataclass
class Settings:
    """How to measure. `budget_s` per case, `limit_s` per call (estimated, for the two slow rivals), `memory_bytes` the
    most one implementation may need beyond the weights; `peaks` the implementations whose peak memory is taken."""

    rivals: tuple[str, ...] = ("eager", "batched_mm", "grouped_mm", "sorted")
    bounds: tuple[str, ...] = ("matmuls", "dense", "read")
    budget_s: float = 10.0
    limit_s: float = 20.0
    memory_bytes: int = 4 * GiB
    device: str = "cpu"
    clock: str = "wall"
    peaks: tuple[str, ...] = ()
    implementations: Mapping[str, Builder] = field(default_factory=lambda: IMPLEMENTATIONS)


class LeftOut(Exception):
    """A case or an implementation is not measured: `kind` skipped (too much time or memory) or refused (wrong)."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason


class Bench:
    """Runs cases one after another; keeps the last weights, the reader and the outcome of the small checks."""

    def __init__(self, settings: Settings, say: Callable[[str], None] = lambda _: None) -> None:
        self.settings, self.say = settings, say
        self._weights: tuple[Any, dict] = (None, {})
        self._checked: dict[tuple[str, str, str], str | None] = {}
        self._reader: Reader | None = None

    def run(self, case: Case, names: tuple[str, ...] | None = None) -> dict[str, Any]:
        """Measures `case`; `names` restricts the rivals. Returns a dictionary that json can write.

        implementations: name -> {median_s, min_s, max_s, samples_s} or {skipped: reason} or {refused: reason};
        ratios: see `_ratios`; memory: kept and peak bytes (training).
        """
        s = self.settings
        result: dict[str, Any] = {
            "shape": asdict(case.shape),
            "tokens": case.tokens,
            "dtype": case.dtype,
            "pass": case.kind,
        }
        try:
            problem = self.problem(case)
        except LeftOut as left:
            return result | {"skipped": left.reason, "implementations": {}, "ratios": {}, "memory": {}}
        contestants: dict[str, Contestant] = {}
        out: dict[str, dict[str, Any]] = {}
        for name in self._names(case, names):
            try:
                contestants[name] = self.enter(case, problem, name)
                out[name] = {}  # holds its place in the order
            except LeftOut as left:
                out[name] = {left.kind: left.reason}
        result["rounds"] = interleave(contestants, s.budget_s, s.clock, s.device)
        out |= {name: who.summary() for name, who in contestants.items()}
        result["implementations"] = out
        result["experts_hit"] = sum(c > 0 for c in problem.counts(0))
        result["pairs"] = case.tokens * case.shape.top_k
        result["bytes_hit"] = problem.bytes_hit()
        result["ratios"] = _ratios(result)
        result["memory"] = self._memory(case, problem, out) if case.kind == "train" else {}
        return result

    def problem(self, case: Case) -> Problem:
        """The case's tensors. Raises LeftOut where they would not fit."""
        need, free = _case_bytes(case), available_bytes()
        if self.settings.device == "cpu" and free is not None and need > 0.8 * free:
            raise LeftOut("skipped", f"needs about {need / GiB:.1f} GiB, {free / GiB:.1f} GiB are free")
        key = (case.shape, case.dtype)
        if self._weights[0] != key:
            self._weights = (None, {})  # let go of the old ones first
            self._weights = (key, make_parameters(case.shape, DTYPES[case.dtype], self.settings.device))
        dtype, device = DTYPES[case.dtype], self.settings.device
        return make_problem(case.shape, case.tokens, dtype, self._weights[1], device)

    def enter(self, case: Case, problem: Problem, name: str) -> Contestant:
        """Checks and warms up one implementation, or builds the bound. Raises LeftOut."""
        self.say(f"{case}: {name}")
        s = self.settings
        if name not in s.implementations:
            bound = self._bound(problem, case, name)
            bound.run(0)
            bound.first_s = sample(bound, 0, s.clock, s.device)
            return bound
        reason = self._wrong(name, case)
        if reason:
            raise LeftOut("refused", reason)
        reason = self._too_much(name, case, problem)
        if reason:
            raise LeftOut("skipped", reason)
        who = _contestant(problem, s.implementations[name](problem), case.kind == "train")
        fresh = _fresh_bytes(case)
        if s.device == "cpu" and fresh > 32 * 2**20:  # what malloc always takes from the system anew
            who.before = lambda: touch_memory(fresh)
        try:
            who.first_s = self._first(who, problem, case)
        except WrongNumbers as error:
            raise LeftOut("refused", str(error)) from error
        return who

    def _bound(self, problem: Problem, case: Case, name: str) -> Contestant:
        train, calls = case.kind == "train", len(problem.routings)
        if name == "read":
            self._reader = self._reader or Reader(self.settings.device)
            return Contestant(self._reader)
        matmuls = Matmuls(problem, train, dense=name == "dense")
        return Contestant(matmuls, rotate=calls) if train else Contestant(matmuls, calls=calls)

    def _names(self, case: Case, rivals: tuple[str, ...] | None) -> list[str]:
        """Who takes part. One dense matmul says nothing where few rows make reading the weights the work, and reading
        them is no bound where many rows share them or gradients are written."""
        s, few = self.settings, case.tokens <= 16
        bounds = {"matmuls": True, "dense": not few, "read": few and case.kind == "forward"}
        return ["headgate", *(s.rivals if rivals is None else rivals), *(b for b in s.bounds if bounds[b])]

    def _first(self, who: Contestant, problem: Problem, case: Case) -> float:
        """The warm-up sample, its numbers checked on the case's own tensors."""
        seen: list[torch.Tensor] = []

        def keep(call: int) -> None:
            seen.append(who.run(call))  # type: ignore[arg-type]

        watched = Contestant(keep, before=who.before)
        seconds = sample(watched, 0, self.settings.clock, self.settings.device)
        try:
            check_measured(problem, 0, seen[0], case.dtype, case.kind == "train")
        finally:
            who.after()  # the gradients of one must not add to the next one's
        if seconds < self.settings.budget_s / 3:  # the first call also builds caches: the second is the better estimate
            seconds = min(seconds, sample(who, 0, self.settings.clock, self.settings.device))
        return seconds

    def _wrong(self, name: str, case: Case) -> str | None:
        key = (name, case.shape.name, case.dtype)
        if key not in self._checked:
            self._checked[key] = None
            try:
                check_small(self.settings.implementations[name], case.shape, case.dtype, self.settings.device)
            except WrongNumbers as error:
                self._checked[key] = f"wrong numbers on a small case: {error}"
        return self._checked[key]

    def _too_much(self, name: str, case: Case, problem: Problem) -> str | None:
        """Why this implementation should not run here; None where it may. Times come from a probe with one token."""
        s, train, pairs = self.settings, case.kind == "train", case.tokens * case.shape.top_k
        if name == "batched_mm":
            need = pairs * case.shape.expert_elements * problem.x.element_size() * (2 if train else 1)
            if need > s.memory_bytes:
                limit = s.memory_bytes / GiB
                return f"its copies of {pairs:,} experts' weights need {need / GiB:.1f} GiB (limit {limit:.1f})"
            seconds = self._probe(name, case, train) * case.tokens
        elif name == "eager" and train:
            # a gradient the size of all experts for each expert hit
            hit = sum(c > 0 for c in problem.counts(0))
            seconds = self._probe(name, case, train) / case.shape.top_k * hit
        else:
            return None
        return f"a call would take about {seconds:.0f} s (limit {s.limit_s:.0f})" if seconds > s.limit_s else None

    def _probe(self, name: str, case: Case, train: bool) -> float:
        problem = make_problem(case.shape, 1, DTYPES[case.dtype], self._weights[1], self.settings.device)
        who = _contestant(problem, self.settings.implementations[name](problem), train)
        who.calls = 1
        sample(who, 0, self.settings.clock, self.settings.device)
        return sample(who, 1, self.settings.clock, self.settings.device)

    def _memory(self, case: Case, problem: Problem, out: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        s = self.settings
        kept = {}
        for name in out:
            if name in s.implementations and "median_s" in out[name]:
                kept[name] = memory.saved_bytes(problem, s.implementations[name](problem))
        found: dict[str, Any] = {"expected_kept_bytes": problem.bytes_kept(), "kept_bytes": kept, "peak": {}}
        del problem
        for name in s.peaks if s.device == "cpu" else ():
            if "median_s" in out.get(name, {}):
                self.say(f"{case}: peak memory of {name}")
                reason = memory.measurable()
                found["peak"][name] = (
                    {"skipped": reason}
                    if reason
                    else memory.peak(case.shape, case.tokens, case.dtype, name, torch.get_num_threads())
                )
        return found


def _contestant(problem: Problem, forward: Forward, train: bool) -> Contestant:
    def run_forward(call: int) -> torch.Tensor:
        ids, weights = problem.routings[call]
        with torch.no_grad():
            return forward(problem.x, ids, weights)

    def run_train(call: int) -> torch.Tensor:
        ids, weights = problem.routings[call]
        y = forward(problem.x, ids, weights)
        y.backward(problem.grad)
        return y.detach()

    calls = len(problem.routings)
    if train:
        return Contestant(run_train, problem.clear, rotate=calls)
    return Contestant(run_forward, calls=calls)


def _fresh_bytes(case: Case) -> int:
    """About what one call allocates: its gradients and a few arrays of the pairs' size."""
    s, size = case.shape, DTYPES[case.dtype].itemsize
    rows = case.tokens * s.top_k * (2 * s.hidden + 3 * s.intermediate) * size
    return rows + s.experts * s.expert_elements * size if case.kind == "train" else rows


def _case_bytes(case: Case) -> int:
    """A generous guess at what the whole case needs: weights, their gradients and the bound's, activations."""
    s, size, pairs = case.shape, DTYPES[case.dtype].itemsize, case.tokens * case.shape.top_k
    weights = s.experts * s.expert_elements * size
    rows = pairs * (3 * s.hidden + 6 * s.intermediate) * size
    return weights * (4 if case.kind == "train" else 1) + rows * (3 if case.kind == "train" else 2)


def _ratios(result: Mapping[str, Any]) -> dict[str, Any]:
    """times_headgate: each one's time over Headgate's; best: transformers' fastest, by name and ratio; share_of_X: the
    bound's time over Headgate's; read_GBps and read_s: the bandwidth measured and the time to read the experts hit."""
    times = {n: i["median_s"] for n, i in result["implementations"].items() if "median_s" in i}
    ours = times.get("headgate")
    ratios: dict[str, Any] = {}
    if "read" in times:
        ratios["read_GBps"] = READ_BYTES / times["read"] / 1e9
        ratios["read_s"] = result["bytes_hit"] / (ratios["read_GBps"] * 1e9)
    if ours is None:
        return ratios
    ratios["times_headgate"] = {n: t / ours for n, t in times.items() if n not in ("headgate", "read")}
    rivals = [n for n in TRANSFORMERS if n in times]
    if rivals:
        best = min(rivals, key=lambda n: times[n])
        ratios["best"] = {"name": best, "times_headgate": times[best] / ours}
    for bound in ("matmuls", "dense"):
        if bound in times:
            ratios[f"share_of_{bound}"] = times[bound] / ours
    if "read_s" in ratios:
        ratios["share_of_read"] = ratios["read_s"] / ours
    return ratios
