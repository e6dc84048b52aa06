"""Ranks as processes: each runs the checks of a script such as ranks.py and writes down what came of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def run_ranks(tmp_path_factory):
    """run_ranks(script, size, *arguments, seconds=180, **environment) -> for each rank: check -> what went wrong ("" if
    nothing), and what the process printed."""

    def run(script: str, size: int, *arguments: str, seconds: float = 180, **environment: str):
        folder = tmp_path_factory.mktemp("ranks")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HEADGATE_CPU": "plain", **environment}
        processes = []
        for rank in range(size):
            command = [sys.executable, HERE / script, str(rank), str(size), folder / "store", folder / f"{rank}.json"]
            with open(folder / f"{rank}.log", "w") as log:
                both = {"stdout": log, "stderr": log}
                processes.append(subprocess.Popen([*command, *arguments], cwd=folder, env=environment, **both))
        deadline = time.monotonic() + seconds
        try:
            for process in processes:
                process.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            pass  # the checks that are missing say it
        finally:
            for process in processes:
                process.kill()
        found = []
        for rank in range(size):
            lines = folder / f"{rank}.json"
            done = dict(map(json.loads, lines.read_text().splitlines())) if lines.exists() else {}
            found.append((done, (folder / f"{rank}.log").read_text()))
        return found

    return run


@pytest.fixture(scope="session")
def all_is_well():
    """all_is_well(found, checks): every rank came to each of the checks and found nothing wrong."""

    def judge(found: list[tuple[dict[str, str], str]], checks: list[str]) -> None:
        assert checks
        for rank, (done, log) in enumerate(found):
            wrong = {check: why for check, why in done.items() if why}
            assert not wrong, f"rank {rank}: " + "\n".join(f"{check}\n{why}" for check, why in wrong.items())
            missing = [check for check in checks if check not in done]
            assert not missing, f"rank {rank} did not come to {missing[:1]}\n{log[-2000:]}"

    return judge


@pytest.fixture(scope="session")
def checks_of():
    """checks_of(script) -> the names of its checks, without running it."""

    def names(script: str) -> list[str]:
        code = f"import json, {Path(script).stem} as s; print(json.dumps(list(s.CHECKS)))"
        done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])

    return names
