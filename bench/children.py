"""Processes that a command starts: none is left when it ends, and Ctrl-C in a terminal is for the command alone."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

PATIENCE_S = 3.0  # for a child to tidy up


@contextmanager
def starting() -> Iterator[None]:
    """Around the start of processes: signals wait until the caller can end them. The processes do not hear SIGINT."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {int(n): signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    before = {n: handler for n, handler in before.items() if handler is not None}  # None: not Python's to set again
    try:
        for number in before:
            signal.signal(number, lambda number, frame: came.append(number))
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # the processes inherit it
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


def tidy_on_sigterm() -> None:
    """For such a process, as the first thing it does: SIGTERM runs its `finally` clauses."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))


def run(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """A process's exit status. Where the wait is interrupted, it is given time to tidy up."""
    with starting():
        process = subprocess.Popen(command, env=environment)
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        try:
            process.wait(2 * PATIENCE_S)  # it has children of its own
        except subprocess.TimeoutExpired:
            process.kill()
        raise


def end(pool: ProcessPoolExecutor, patience_s: float = PATIENCE_S) -> None:
    """Ends a pool's processes, whatever they are doing; what has not begun is not done."""
    processes = list((getattr(pool, "_processes", None) or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes if patience_s else ():
        process.terminate()
    for process in processes:
        process.join(patience_s)
        process.kill()
