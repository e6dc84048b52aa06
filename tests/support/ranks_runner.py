"""Checks on many ranks: a script's CHECKS, all run by one start of the processes. The ranks' end is ranks_process.py.

The script, usually `ranks.py` beside its test, has a dict CHECKS of functions without arguments, which every rank calls
in order with a process group (gloo) over all ranks. The test has a fixture that starts the ranks, and a case for each
check and number of ranks; `slow` says on how many ranks a check is for `make test-all` alone:

    RANKS = Path(__file__).with_name("ranks.py")
    results = ranks_fixture(RANKS)

    @pytest.mark.parametrize(("size", "check"), cases_of(RANKS, [2, 4], {"a_check": (4,)}))
    def test_on_every_rank(results, size, check):
        passed_on_every_rank(results(size), check)

The ranks run the checks that are asked for: `-k`, `-m` and the name of one test leave out the others.

To import torch takes a process longer than most checks. So one process, the nursery, imports it once and forks the
ranks of every script and every world size; it lives as long as pytest. Each run has ranks of its own: what fails or
hangs in one script leaves the results of the others alone.
"""

from __future__ import annotations

import functools
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import processor_time
import pytest
import torch.distributed as dist
from ranks_process import load_checks

Slow = dict[str, tuple[int, ...]]  # check -> the numbers of ranks on which it is for `make test-all` alone
PROCESS = Path(__file__).with_name("ranks_process.py")


@dataclass(frozen=True)
class Rank:
    """What one rank did: check -> what went wrong ("" for nothing, None: it did not end), and what was printed."""

    checks: dict[str, str | None]
    log: str


def checks_of(script: Path) -> dict[str, Callable[[], None]]:
    """The CHECKS of a script. Skips the test module where torch has no gloo."""
    if not (dist.is_available() and dist.is_gloo_available() and hasattr(os, "fork")):
        pytest.skip("this torch has no gloo, or this system no fork", allow_module_level=True)
    return load_checks(script)


def cases_of(script: Path, sizes: list[int], slow: Slow | None = None, only: list[str] | None = None) -> list:
    """The cases (number of ranks, check) of a script, or of the checks in `only`, by number of ranks.

    ValueError: `slow` names no check.
    """
    checks, slow = list(checks_of(script)), slow or {}
    if strangers := slow.keys() - set(checks):
        raise ValueError(f"cases_of: slow must name checks of {script.name}, got {sorted(strangers)}")

    def case(size: int, check: str):
        marks = [pytest.mark.slow] if size in slow.get(check, ()) else []
        return pytest.param(size, check, id=f"{size}-ranks-{check}", marks=marks)

    return [case(size, check) for size in sizes for check in only or checks]


def ranks_fixture(script: Path, seconds: float = 180):
    """A fixture: size -> what came of the checks that this session asks for on so many ranks, started once."""

    @pytest.fixture(scope="module")
    def results(request, tmp_path_factory) -> Callable[[int], list[Rank]]:
        @functools.cache
        def of(size: int) -> list[Rank]:
            cases = [item.callspec.params for item in request.session.items if item.path == request.path
                     and "results" in item.fixturenames]  # fmt: skip
            chosen = [case["check"] for case in cases if case["size"] == size]
            return run_ranks(script, size, tmp_path_factory.mktemp(script.stem), chosen, seconds)

        return of

    return results


def run_ranks(
    script: Path,
    size: int,
    folder: Path,
    checks: list[str],
    seconds: float = 180,
    backend: str = "gloo",
    **environment: str,
) -> list[Rank]:
    """Runs `checks` of `script`, in its order, on `size` ranks, in the empty `folder`; what came of it, rank by rank.

    `backend`: "gloo"; "cuda:gloo" (all ranks on one GPU, new tensors there) or "nccl" (each on its own). After
    `seconds` the ranks are ended.
    """
    environment = {"OMP_NUM_THREADS": "1", "HEADGATE_CPU": "plain", **environment}
    run = {"script": str(script), "size": size, "folder": str(folder), "seconds": seconds}
    run |= {"backend": backend, "checks": checks, "environment": environment}
    if backend == "gloo":
        nursery().run(run)
    else:  # a nursery of its own: what its ranks do to the device ends with it
        alone = Nursery()
        alone.run(run)
        alone.end()
    found = []
    for rank in range(size):
        lines, log = folder / f"{rank}.json", folder / f"{rank}.log"
        done = dict(map(json.loads, lines.read_text().splitlines())) if lines.exists() else {}
        found.append(Rank(done, log.read_text(errors="replace") if log.exists() else "it was not started"))
    return found


def passed_on_every_rank(results: list[Rank], check: str) -> None:
    for rank, (done, log) in enumerate((r.checks, r.log) for r in results):
        log = log[-4000:]
        assert check in done, f"rank {rank} did not come to it; its last check: {list(done)[-1:]}\n{log}"
        assert done[check] is not None, f"rank {rank} began it, and died or was ended in it\n{log}"
        assert not done[check], f"rank {rank}:\n{done[check]}"


class Nursery:
    """The process that forks ranks: one run of a script at a time."""

    def __init__(self):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, PROCESS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment,
            start_new_session=True,
        )  # fmt: skip

    def run(self, run: dict) -> None:
        """Returns when the ranks have ended, whatever became of them. RuntimeError: the nursery itself has."""
        self.process.stdin.write(json.dumps(run).encode() + b"\n")
        self.process.stdin.flush()
        # it ends the ranks by itself, so this is for a machine on which even that takes long
        ready, _, _ = select.select([self.process.stdout], [], [], run["seconds"] + 120)
        answer = self.process.stdout.readline() if ready else b""
        if not answer:
            self.end()
            nursery.cache_clear()  # the next script gets a new one
            raise RuntimeError(f"ranks_runner: the nursery ended or hangs in {run['script']} on {run['size']} ranks")
        processor_time.elsewhere.append(json.loads(answer)["processor_s"])

    def end(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


@functools.cache
def nursery() -> Nursery:
    """One for all of this process's tests; it ends when pytest, by ending, closes its standard input."""
    return Nursery()
