"""What a fetch ahead costs, by what was measured: how busy the link is, and how long a layer leaves it idle."""

from __future__ import annotations

import threading
import time

import numpy as np

_FADE = 0.1  # weight of the newest measurement


class Pace:
    """`price` and `room` of placement/caching/prefetch.py for each layer.

    price  the share of time in which something is copied: on a link that is never idle a load in vain is a load waited
           for; on one that rests it costs little
    room   how many loads fit between the moment when a layer's misses are ordered and that when the next layer asks
    """

    def __init__(self, layers: int) -> None:
        self._idle_s = np.zeros(layers)
        self._issued: dict[tuple[int, int], tuple[float, float]] = {}  # (thread, layer): when, seconds of loads
        self._busy, self._last = 0.0, (time.perf_counter(), 0.0)

    def new_sequence(self) -> None:
        """What passes until the next layer asks is nobody's idle time."""
        me = threading.get_ident()
        for key in [key for key in self._issued if key[0] == me]:
            self._issued.pop(key, None)

    def asked(self, layer: int) -> None:
        """A layer asks for its experts: the time since `order` was idle, but for the loads that were waiting then."""
        issued = self._issued.pop((threading.get_ident(), layer), None)
        if issued is not None:
            idle = max(0.0, time.perf_counter() - issued[0] - issued[1])
            self._idle_s[layer] += _FADE * (idle - self._idle_s[layer])

    def order(self, layer: int, waiting: int, load_s: float, copy_s: float) -> tuple[float, float]:
        """(price, room) for fetches ahead of `layer`, now; `waiting` loads come before them, a load takes `load_s`, and
        `copy_s` seconds have gone into copies so far."""
        now = time.perf_counter()
        self._issued[threading.get_ident(), layer] = now, waiting * load_s
        passed, copied = now - self._last[0], copy_s - self._last[1]
        self._last = now, copy_s
        if passed > 0:
            self._busy += _FADE * (min(1.0, max(0.0, copied / passed)) - self._busy)
        return self._busy, float(self._idle_s[layer]) / load_s if load_s > 0 else np.inf
