"""A job in a process of its own, watched from outside: peak memory, processor time, what it says at its end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...children import PATIENCE_S, starting

EVERY_S = 0.01
Run = Callable[[str, Mapping[str, Any]], "Done"]


@dataclass(frozen=True)
class Done:
    """`said`: the job's own figures. `peak_bytes`: most resident memory (VmHWM); `anonymous_bytes`: most of it that is
    no file's (RssAnon, looked at every 10 ms); `wall_s`, `cpu_s` (user and system, all threads) from start to end."""

    said: Mapping[str, Any]
    peak_bytes: int
    anonymous_bytes: int
    wall_s: float
    cpu_s: float


def job(threads: int | None, timeout_s: float = 3600.0) -> Run:
    """Runs a job of jobs.py or rivals.py by its name in a fresh interpreter."""

    def run(name: str, options: Mapping[str, Any]) -> Done:
        told = json.dumps({"job": name, "begun": time.time(), "threads": threads, **options})
        # -P: a checkout's own folder must not come first on the path, where kernels/ would shadow another package
        return watched([sys.executable, "-P", "-m", __package__ + ".jobs", told], threads, timeout_s)

    return run


def command(words: Sequence[str], threads: int | None, timeout_s: float = 3600.0) -> Done:
    """Runs a line of `headgate`."""
    code = "import sys; from headgate.cli import main; sys.exit(main())"
    return watched([sys.executable, "-P", "-c", code, *words], threads, timeout_s, said=False)


def watched(words: Sequence[str], threads: int | None, timeout_s: float, said: bool = True) -> Done:
    """Runs a process to its end. Its last line on standard output is JSON if it has something to say. Raises
    RuntimeError with its last line of error where it fails or takes too long."""
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        begin = time.perf_counter()
        with starting():
            process = subprocess.Popen(words, stdout=out, stderr=errors, env=environment, stdin=subprocess.DEVNULL)
        peak = anonymous = 0
        try:
            while True:
                now = memory_of(process.pid)
                peak, anonymous = max(peak, now.get("VmHWM", 0)), max(anonymous, now.get("RssAnon", 0))
                gone, status, usage = os.wait4(process.pid, os.WNOHANG)
                if gone:
                    process.returncode = os.waitstatus_to_exitcode(status)
                    break
                if time.perf_counter() - begin > timeout_s:
                    raise RuntimeError(f"{words[-1][:200]}: took more than {timeout_s:g} s")
                time.sleep(EVERY_S)
        except BaseException:
            if process.returncode is None:
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(PATIENCE_S)
                process.kill()
                process.wait()
            raise
        wall = time.perf_counter() - begin
        out.seek(0)
        errors.seek(0)
        told = out.read().decode(errors="replace").splitlines()
        if process.returncode:
            last = errors.read().decode(errors="replace").strip().splitlines()[-1:]
            raise RuntimeError(f"{words[-1][:200]}: ended with {process.returncode}: {''.join(last)}")
        return Done(json.loads(told[-1]) if said else {}, peak, anonymous, wall, usage.ru_utime + usage.ru_stime)


def memory_of(process: int | str = "self") -> dict[str, int]:
    """Entries of /proc/PID/status in bytes; nothing of a process that is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return {}
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}


def traffic() -> dict[str, int]:
    """Bytes that this process has had read from the disk (`read_bytes`) and written to it (`write_bytes`) so far."""
    pairs = (line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return {name: int(value) for name, value in pairs}
