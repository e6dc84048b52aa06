"""`headgate bench --gpu-report`: everything that computes MoE experts on this GPU, side by side in one run of minutes.

The most important cases come first and every result is written as it comes, so that a run that is cut off has told what
it knew. The measuring process is a child: an illegal access or a hang costs one contestant of one case.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures import TimeoutError as OutOfTime
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ...kernels.chip import Chip
from ...kernels.grouped_ffn.thin_tiles import MAX_ROWS
from .. import children, machine
from ..arguments import device, number
from ..output import write_json
from ..screen import Screen
from . import figures, measure
from .measure import Case
from .packed import CONTESTANTS
from .rivals import RIVALS
from .roofline import Roof, summary
from .shapes import MODELS, SONIC, SONIC_TOKENS
from .text import case_lines, heading

RESULTS = Path(__file__).resolve().parents[1] / "results"
PATIENCE_S = 60.0  # the longest a case may take before its process is ended
STILL_S = 20.0  # the longest a contestant may be at one thing, compiling included, before its process is ended
SLOW_START_S = 15.0  # whoever takes longer to get going at one case takes part in no other


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `headgate bench` itself: --gpu-report and what goes with it."""
    parser.set_defaults(refuse=parser.error)
    add = parser.add_argument
    add("--gpu-report", action="store_true", help="measure everything on this machine's GPU, in minutes")
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="where the JSON and the plot go (default: bench/results of the checkout)",
    )
    add("--minutes", type=number, default=4.5, metavar="M", help="no case starts later (default: %(default)s)")
    add("--only", nargs="+", metavar="TEXT", help="cases whose name holds one of these, such as sonic or qwen3/8/")
    add("--contestants", nargs="+", choices=list(RIVALS), metavar="NAME", help=f"of {', '.join(RIVALS)}")
    add("--commit", metavar="TEXT", help="what is measured, where the tree has no git (default: what git says)")
    add("--no-build", action="store_true", help="do not build the kernels of all cases in parallel beforehand")
    add("--device", type=device, default="cuda", help=argparse.SUPPRESS)


def plan() -> list[Case]:
    """All cases, the most important first."""
    qwen, oss = MODELS["qwen3"], MODELS["gpt-oss"]
    cases = [Case(qwen, 1, "layer", budget_s=0.5)]
    cases += [Case(s, t, "decode", budget_s=0.5) for s in (qwen, oss) for t in (8, 64, 16, 32)]
    key = ("sonic-4096-1024-128-8", "sonic-4096-256-256-16")
    first = sorted(SONIC.values(), key=lambda s: s.name not in key)
    cases += [Case(s, SONIC_TOKENS[s.name], "train", budget_s=1.5) for s in first]
    cases += [Case(s, 4096, "train", budget_s=1.0) for s in MODELS.values()]
    cases += [Case(oss, 1, "layer", budget_s=0.5)]
    few_bits = [(qwen, t) for t in (1, 64, 4096)] + [(oss, t) for t in (1, 64)]
    cases += [Case(s, t, "packed", contestants=CONTESTANTS, budget_s=1.0) for s, t in few_bits]
    cases += [Case(s, 1, "decode", budget_s=0.3) for s in MODELS.values()]
    cases += [Case(MODELS[n], 16384, "train", budget_s=1.5) for n in ("qwen3", "olmoe", "gpt-oss", "mixtral")]
    cases += [Case(s, 64, "decode", budget_s=0.3) for s in MODELS.values() if s not in (qwen, oss)]
    cases += [Case(s, t, "train", budget_s=0.5) for t in (256, 1024) for s in (qwen, oss)]
    cases += [Case(s, 65536, "train", budget_s=2.0) for s in (qwen, MODELS["olmoe"], oss, MODELS["mixtral"])]
    return cases


def run(args: argparse.Namespace) -> int:
    """Measures, prints, writes. 0; 1 where Headgate's own numbers were refused or failed, or nothing was measured;
    130 after Ctrl-C."""
    if not args.gpu_report:
        args.refuse("one of --gpu-report and the benchmarks must be given; headgate bench --help lists them")
    cases = [c for c in plan() if not args.only or any(text in f"{c.key}/" for text in args.only)]
    if args.contestants:
        named = tuple(args.contestants)
        cases = [c if c.kind == "packed" else replace(c, contestants=named) for c in cases]
    if args.device.startswith("cuda"):
        _need_a_gpu()
    if not cases:
        raise ValueError(f"gpu-report: --only must name a case, got {' '.join(args.only)}; cases: {_keys()}")
    out = args.out or (RESULTS if RESULTS.is_dir() else Path("headgate-results"))
    out.mkdir(parents=True, exist_ok=True)
    report = Report(cases, out, args.device, 60 * args.minutes, build=not args.no_build)
    report.found["commit"] = args.commit or report.found["commit"]
    return report.run()


def _keys() -> str:
    return ", ".join(c.key for c in plan())


def _need_a_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("gpu-report: needs a GPU, and torch sees none; the kernels are looked at without one by "
                           "`headgate bench compile` and `headgate bench roofline`")  # fmt: skip


class Report:
    """One run: the child that measures, the deadline, and the file that grows."""

    def __init__(self, cases: list[Case], out: Path, device: str, seconds: float, build: bool = True) -> None:
        self.cases, self.device, self.seconds = cases, device, seconds
        self.build = build and device.startswith("cuda")
        self.began, self.screen = time.monotonic(), Screen()
        now = datetime.datetime.now(datetime.UTC)
        self.found: dict[str, Any] = {
            "version": 1, "kind": "gpu-report", "date": now.isoformat(timespec="seconds"), "commit": _commit(),
            "command": " ".join(sys.argv), "python": sys.version.split()[0], "host": machine.processor(),
            "versions": {n: machine.version(n) for n in ("headgate", "torch", "triton", "transformers", "numpy")},
            "complete": False, "cases": [],
        }  # fmt: skip
        self.out, self.stamp = out, now.strftime("%Y-%m-%d-%H%M")
        self.child: Child | None = None
        self.banned: dict[str, str] = {}  # who has cost too much time already, and why

    def run(self) -> int:
        interrupted = False
        try:
            self._measure()
        except KeyboardInterrupt:
            interrupted = True
            print("headgate: gpu-report: interrupted; what was measured is kept", file=sys.stderr)
        finally:
            if self.child is not None:
                self.child.end()
            self._write()
        self._finish()
        ours = [c.get("contestants", {}).get("headgate", {}) for c in self.found["cases"]]
        wrong = [c for c in ours if "refused" in c or "failed" in c]
        if interrupted:
            return 130
        return 1 if wrong or not any("forward" in c for c in ours) else 0

    def _measure(self) -> None:
        self.child = Child(self.device)
        self.found["device"] = self.child.call(measure.about, self.device)
        self.found["ceilings"] = self.child.call(measure.ceilings, self.device)
        chip = self.child.call(measure.chip_here, self.device)
        self.screen.say("\n".join(heading(self.found)))
        if self.build and chip is not None:
            self._build(chip)
        roof = Roof(self.found["ceilings"]["copy_GBps"], self.found["ceilings"]["matmul_TFLOPs"])
        for at, case in enumerate(self.cases):
            left = self.seconds - (time.monotonic() - self.began)
            if left < 3:
                self.found["left_out"] = [c.key for c in self.cases[at:]]
                self.screen.say(f"out of time; left out: {', '.join(self.found['left_out'])}")
                return
            result = self._one(case, min(PATIENCE_S, left + 30))
            result["copy_GBps"] = roof.bandwidth_GBps
            result["roofline"] = {k: summary(case.shape, case.tokens, k, roof) for k in _passes(case)}
            self.found["cases"].append(result)
            self.screen.say("\n".join(case_lines(result)))
            self._write()
        self.found["complete"] = True

    def _one(self, case: Case, patience_s: float) -> dict[str, Any]:
        """A case's results. Whoever kills or hangs the child is left out and the case is run again, twice at most."""
        leave_out = dict(self.banned)
        assert self.child is not None
        for _ in range(3):
            try:
                found = self.child.call(measure.measure, case, leave_out, patience_s=patience_s)
                slow = {n: s for n, s in found.get("start_s", {}).items() if s > SLOW_START_S and n != "headgate"}
                self.banned |= {n: f"left out after it took {s:.0f} s to start at {case.key}" for n, s in slow.items()}
                return found
            except (BrokenProcessPool, OutOfTime) as error:
                who = self.child.doing()
                died = isinstance(error, BrokenProcessPool)
                late = str(error) or f"no end after {patience_s:.0f} s"
                why = "the process died (an illegal access?)" if died else late
                print(f"{case.key}: {who or 'somebody'}: {why}", file=sys.stderr, flush=True)
                self.child.end()
                self.child = Child(self.device)
                if not who or who in leave_out:
                    break
                leave_out[who] = why
                if not died and who != "headgate":  # it would take as long at every other case
                    self.banned[who] = f"left out after {why} at {case.key}"
        return {
            "shape": case.shape.name, "tokens": case.tokens, "pass": case.kind, "sizes": case.shape.sizes(),
            "contestants": {n: {"failed": w} for n, w in leave_out.items()},
            "failed": "the case could not be measured", "seconds": 0.0,
        }  # fmt: skip

    def _build(self, chip: Chip) -> None:
        """Fills Triton's cache with what the cases need, on all cores: building at first use would eat the minutes."""
        from .build import Job, build_all
        from .compile import fault, jobs_of

        begin = time.monotonic()
        jobs: dict[Job, None] = {}
        for case in self.cases:
            passes = {
                "train": ("forward", "backward"),
                "decode": ("inference",),
                "layer": ("route", "inference"),
                "packed": ("inference", "quantized" if case.tokens <= MAX_ROWS else "widened"),
            }[case.kind]
            jobs |= dict.fromkeys(jobs_of([case.shape.name], [chip], [case.tokens], passes))
        kept: list[dict[str, Any]] = []
        try:
            for result in build_all(list(jobs), max(1, min(16, machine.cores()))):
                kept.append(result)
                if time.monotonic() - begin > self.seconds / 3:
                    break
        except Exception as error:  # building beforehand only saves time
            print(f"building beforehand stopped: {error}", file=sys.stderr)
        bad = [f"{r['what']}: {fault(r)}" for r in kept if fault(r)]
        self.found["builds"] = {
            "builds": len(kept),
            "of": len(jobs),
            "faults": bad,
            "seconds": time.monotonic() - begin,
        }
        took = time.monotonic() - begin
        self.screen.say(f"{len(kept)} of {len(jobs)} kernels built in {took:.0f} s, {len(bad)} at fault")

    def _write(self) -> None:
        self.found["seconds"] = time.monotonic() - self.began
        self.found["figures"] = figures.rows(self.found["cases"])
        name = self.found.get("device", {}).get("name", self.device).replace(" ", "-").lower()
        self.path = self.out / f"{self.stamp}-{name}-{self.found['commit'][:7]}.json"
        write_json(str(self.path), self.found)

    def _finish(self) -> None:
        self.screen.say("\n".join(["", *figures.lines(self.found["figures"])]))
        picture = self.path.with_suffix(".png")
        try:
            from .plot import draw

            draw(self.found, picture)
            self.screen.say(f"\n{self.path}\n{picture}")
        except Exception as error:  # a picture must not cost the run
            print(f"\n{self.path}\nno plot: {error}", file=sys.stderr)
        self.screen.say(f"{self.found['seconds']:.0f} s")


class Child:
    """The process that measures."""

    def __init__(self, device: str) -> None:
        handle, name = tempfile.mkstemp(prefix="headgate-report-")
        os.close(handle)
        self.progress = Path(name)
        self.pool = ProcessPoolExecutor(
            1, mp_context=get_context("spawn"), initializer=measure.start, initargs=(device, name)
        )

    def call(self, function: Callable[..., Any], *arguments: Any, patience_s: float = 120.0) -> Any:
        """Its result. Raises BrokenProcessPool where the child died, TimeoutError where it takes too long, in all or
        since its progress was last heard of."""
        with children.starting():
            future: Future = self.pool.submit(function, *arguments)
        end = time.monotonic() + patience_s
        while not future.done() and time.monotonic() < end:
            wait([future], timeout=min(1.0, patience_s))
            if self.doing() and time.time() - self.progress.stat().st_mtime > STILL_S and not future.done():
                raise OutOfTime(f"no sign of life for {STILL_S:.0f} s")
        return future.result(0)

    def doing(self) -> str:
        return self.progress.read_text()

    def end(self) -> None:
        children.end(self.pool, patience_s=0.0)  # it may hang in the driver; it has nothing to tidy up
        self.progress.unlink(missing_ok=True)


def _passes(case: Case) -> tuple[str, ...]:
    return {"train": ("forward", "backward"), "packed": ()}.get(case.kind, ("decode",))


def _commit() -> str:
    try:
        command = ["git", "describe", "--always", "--abbrev=40", "--dirty"]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=20, cwd=Path(__file__).parent, check=True
        )
        return done.stdout.strip() or "unknown"
    except (OSError, subprocess.SubprocessError):
        return "unknown"
