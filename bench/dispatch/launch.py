"""Starts the ranks as processes of their own, reads what they find, and ends all of them when one fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .. import children

# -P: a checkout's own folder must not come first on the path, where kernels/ would shadow another package
RANK = (sys.executable, "-P", "-m", "headgate.bench.dispatch.rank")


def launch(job: dict[str, Any], tell: Callable[[dict[str, Any]], None], command: Sequence[str] = RANK) -> None:
    """Runs `command FOLDER RANK` for each of job["ranks"] ranks, one thread each; hands every line of news to `tell`.

    Raises RuntimeError with the error of the rank that failed first, or where no news come for job["timeout_s"]. No
    process outlives this call.
    """
    with tempfile.TemporaryDirectory(prefix="headgate-dispatch-") as name:
        folder = Path(name)
        (folder / "job.json").write_text(json.dumps(job))
        (folder / "news").touch()
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        processes = []
        try:
            for rank in range(job["ranks"]):
                with open(folder / f"{rank}.log", "w") as log, children.starting():
                    processes.append(
                        subprocess.Popen([*command, name, str(rank)], env=environment, stdout=log, stderr=log)
                    )
            _follow(job, folder, processes, tell)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.wait()


def _follow(job: dict[str, Any], folder: Path, processes: Sequence[subprocess.Popen], tell) -> None:
    heard = time.monotonic()
    with open(folder / "news") as news:
        while True:
            codes = [p.poll() for p in processes]  # before the news are read: none come after the end
            for line in _lines(news):
                heard = time.monotonic()
                tell(json.loads(line))
            if any(codes):
                raise RuntimeError(_why(folder, processes))
            if all(code == 0 for code in codes):
                return
            if time.monotonic() - heard > job["timeout_s"]:
                raise RuntimeError(f"bench dispatch: no news from the ranks for {job['timeout_s']:.0f} s")
            time.sleep(0.05)


def _lines(news) -> list[str]:
    """The whole lines that are new; half a line waits for its end."""
    found: list[str] = []
    while True:
        at = news.tell()
        line = news.readline()
        if not line.endswith("\n"):
            news.seek(at)
            return found
        found.append(line)


def _why(folder: Path, processes: Sequence[subprocess.Popen]) -> str:
    """The error of the rank that failed first: the others only lost it."""
    time.sleep(0.2)  # for those that are about to end
    said = []
    for rank, process in enumerate(processes):
        note = folder / f"{rank}.error"
        if process.poll() and note.exists():
            found = json.loads(note.read_text())
            said.append((found["when"], f"rank {rank} failed: {found['error']}"))
        elif process.poll():  # killed, or gone before it could say anything: nobody can have failed before it
            last = (folder / f"{rank}.log").read_text().strip().splitlines()[-1:]
            said.append((0.0, " ".join([f"rank {rank} ended with status {process.returncode}", *last])))
    return f"bench dispatch: {min(said)[1]}"
