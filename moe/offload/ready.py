"""What is made ready while a model is loaded: compiled code, and OpenMP's threads, which are to sleep as they wait."""

from __future__ import annotations

import os
import threading
from contextlib import suppress

import numpy as np
import torch

from ...kernels import native
from ...placement.caching.cache import Cache
from ...placement.caching.policies import Setting, policy
from ...placement.caching.pools import per_layer
from ...placement.caching.prefetch import prefetch

_FEW_CPUS = 16


def compiling(device: torch.device) -> threading.Thread:
    """A thread that compiles what a step needs: nothing to do where an installation has run before; the first time it
    takes 20 s of processor time and more, for which the first token would wait otherwise."""

    def work() -> None:
        with suppress(Exception):  # whoever needs it hears of it
            if device.type == "cpu":
                native.library()
            compile_steps()

    thread = threading.Thread(target=work, name="headgate-compile")  # no daemon: LLVM dies of an exit
    thread.start()
    return thread


def compile_steps() -> None:
    """All that a live cache calls, for any policy."""
    cache = Cache(per_layer(1, 2, 1), policy("adaptive", Setting(1, 2, 1)))
    cache.step(0, [0])
    prefetch(cache, 0, np.ones((1, 2), np.float32))
    cache.prefetch(0, [0])
    cache.lose(0, 0)
    cache.new_sequence()


class Sleepers:
    """While it is open, threads of OpenMP that wait sleep, and leave their processors to those that read.

    libgomp lets them spin for milliseconds first, but for a moment only where it has more threads than there are
    processors. With readers there are more; but libgomp does not know of them. So it is given as many threads of its
    own as tell it, which do nothing. That is done on up to 16 processors, which computation takes all or nearly all of,
    and unless OMP_WAIT_POLICY or GOMP_SPINCOUNT say what to do. (Waking 64 threads for each operation costs more.)
    """

    def __init__(self) -> None:
        self._over, self._thread = threading.Event(), None
        team = team_size(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
        lib = native.library() if team else None
        if lib is not None:
            begun = threading.Event()
            self._thread = threading.Thread(
                target=_hold, args=(lib, team, begun, self._over), name="headgate-openmp", daemon=True
            )
            self._thread.start()
            begun.wait()

    def close(self) -> None:
        """They spin again."""
        self._over.set()
        if self._thread not in (None, threading.current_thread()):
            self._thread.join()  # type: ignore[union-attr]


def team_size(processors: int) -> int:
    """How many threads OpenMP must be given beside those of torch, the one that gives them included; 0: none."""
    computing = torch.get_num_threads()
    said = any(name in os.environ for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"))
    if said or computing == 1 or processors > _FEW_CPUS or computing < processors - 1:
        return 0
    return max(2, processors - computing + 2)


def _hold(lib, team: int, begun: threading.Event, over: threading.Event) -> None:
    lib.hg_team(team)
    begun.set()
    over.wait()
