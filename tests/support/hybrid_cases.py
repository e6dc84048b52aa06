"""Costs that send experts to the host, to the device or to both; a store in host memory whose reads take a moment."""

from __future__ import annotations

import random
import threading
import time

import numpy as np
from offload_cases import layers_of

from headgate.moe.offload import HostStore
from headgate.placement.caching.costs import FREE, Costs
from headgate.placement.cluster.links import Link

NBYTES = 3 * 24 * 16 * 4  # of an expert


def costs(host_s: float, copy_s: float = 1e-3, device_s: float = 1e-4, start_s: float = 0.0) -> Costs:
    """Tables that grow from one row to 64 by as much again."""
    rows = (1, 64)
    return Costs(
        rows, (device_s, 2 * device_s), (host_s, 2 * host_s), Link(1e6 * copy_s, np.inf), FREE, NBYTES, start_s
    )


ALL, NONE, MIXED = costs(1e-9), costs(10.0), costs(1e-3)


class Slow(HostStore):
    """Reads take a moment, `trouble(layer, expert)` says how; the host needs none."""

    def __init__(self, made, trouble=lambda layer, expert: time.sleep(random.random() / 500)) -> None:
        super().__init__(layers_of(made), lambda i: [made[i]])
        self.trouble = trouble

    def read(self, layer, expert, into) -> None:
        self.trouble(layer, expert)
        super().read(layer, expert, into)


def host_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "headgate-offload-host"]
