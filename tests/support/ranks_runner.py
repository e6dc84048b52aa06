"""Checks on many ranks: a script's CHECKS, all run by one start of the processes. Both ends of it are in this file.

The script, usually `ranks.py` beside its test, has a dict CHECKS of functions without arguments, which every rank calls
in order with a process group (gloo) over all ranks. The test has a fixture that starts the ranks and a case per check:

    @pytest.fixture(scope="module", params=[2, 4], ids="{}-ranks".format)
    def results(request, tmp_path_factory):
        return run_ranks(RANKS, request.param, tmp_path_factory.mktemp("ranks"))

    @pytest.mark.parametrize("check", checks_of(RANKS))
    def test_on_every_rank(results, check):
        passed_on_every_rank(results, check)

One rank is `python ranks_runner.py SCRIPT RANK SIZE FOLDER BACKEND ONLY`. It writes to FOLDER/RANK.json a line for each
check: its name and "" or what went wrong. After a failure the ranks are out of step: it stops there.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Rank:
    """What one rank did: check -> what went wrong ("" for nothing), and what the process printed."""

    checks: dict[str, str]
    log: str


def checks_of(script: Path) -> dict[str, Callable[[], None]]:
    """The CHECKS of a script. Skips the test module where torch has no gloo."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this torch has no gloo", allow_module_level=True)
    name = "headgate_test_" + "_".join(script.with_suffix("").parts[-2:])
    spec = importlib.util.spec_from_file_location(name, script)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.CHECKS


def run_ranks(
    script: Path,
    size: int,
    folder: Path,
    seconds: float = 180,
    backend: str = "gloo",
    only: str = "",
    **environment: str,
) -> list[Rank]:
    """Runs the checks of `script` on `size` ranks, in the empty folder `folder`; what came of it, rank by rank.

    `backend`: "gloo"; "cuda:gloo" (all ranks on one GPU, new tensors there) or "nccl" (each on its own). `only`: a
    pattern that the names of the checks to run begin with.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HEADGATE_CPU": "plain", **environment}
    processes = []
    for rank in range(size):
        command = [sys.executable, __file__, script, str(rank), str(size), folder, backend, only]
        with open(folder / f"{rank}.log", "w") as log:
            processes.append(subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log))
    deadline = time.monotonic() + seconds
    try:
        for process in processes:
            process.wait(max(deadline - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        pass  # the checks that are missing say it
    finally:
        for process in processes:
            process.kill()
            process.wait()
    found = []
    for rank in range(size):
        lines = folder / f"{rank}.json"
        done = dict(map(json.loads, lines.read_text().splitlines())) if lines.exists() else {}
        found.append(Rank(done, (folder / f"{rank}.log").read_text()))
    return found


def passed_on_every_rank(results: list[Rank], check: str) -> None:
    for rank, (done, log) in enumerate((r.checks, r.log) for r in results):
        assert check in done, f"rank {rank} did not come to it; its last check: {list(done)[-1:]}\n{log[-2000:]}"
        assert not done[check], f"rank {rank}:\n{done[check]}"


def main(script: Path, rank: int, size: int, folder: Path, backend: str, only: str) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=30)
    if backend != "gloo":
        device = rank if backend == "nccl" else 0
        torch.cuda.set_device(device)
        torch.set_default_device(f"cuda:{device}")
        timeout *= 4  # the first calls compile kernels
    files = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group(backend.removeprefix("cuda:"), store=files, rank=rank, world_size=size, timeout=timeout)
    with open(folder / f"{rank}.json", "w") as lines:
        for name, function in checks_of(script).items():
            if not re.match(only, name):
                continue
            torch.manual_seed(0)
            try:
                function()
                wrong = ""
            except Exception:
                wrong = traceback.format_exc()
            print(json.dumps([name, wrong]), file=lines, flush=True)
            if wrong:
                return
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), *sys.argv[5:])
