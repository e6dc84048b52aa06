"""What one expert costs on one machine, as measured there: to compute it by rows, on either side, and to move it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from math import inf, isfinite
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..cluster.links import Link

FREE = Link(0.0, inf)


@dataclass(frozen=True)
class Costs:
    """Seconds of one expert, in tables over the number of rows: few rows wait for the weights, many for arithmetic.

    rows          rising numbers of rows at which the tables stand, the first at least 1
    device_s      seconds on the device for that many rows; never falling, as long as `rows`
    host_s        the same on the host, where the weights are in its memory; None: the host is the device
    copy          host memory -> device
    read          disk -> host memory
    expert_bytes  of one expert's weights
    start_s       once in a step that uses the host: rows there and back, and the hand-over

    Between two entries a cost is interpolated, below the first it is the first, above the last it goes on at the last
    slope (in proportion where there is one entry). Raises ValueError naming field, rule and value.

    >>> Costs((1, 4), (1e-3, 1e-3), (2e-3, 5e-3), Link(0, 10), FREE, 2 * 10**7).on_host([1, 2, 6])
    array([0.002, 0.003, 0.007])
    """

    rows: tuple[int, ...]
    device_s: tuple[float, ...]
    host_s: tuple[float, ...] | None
    copy: Link
    read: Link
    expert_bytes: int
    start_s: float = 0.0

    def __post_init__(self) -> None:
        rows = self.rows
        rising = all(a < b for a, b in pairwise(rows))
        _rule(len(rows) > 0 and rows[0] >= 1 and rising, "rows", "rising from 1 or more", rows)
        for name, table in (("device_s", self.device_s), ("host_s", self.host_s)):
            if table is None:
                continue
            _rule(len(table) == len(rows), name, f"as long as rows, {len(rows)}", len(table))
            fine = all(isfinite(t) and t > 0 for t in table)
            falls = any(a > b for a, b in pairwise(table))
            _rule(fine and not falls, name, "positive and never falling", table)
        _rule(self.expert_bytes >= 1, "expert_bytes", "at least 1", self.expert_bytes)
        _rule(isfinite(self.start_s) and self.start_s >= 0, "start_s", "finite and not negative", self.start_s)

    @cached_property
    def tables(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """rows, device_s and host_s as arrays [P]; a host that is the device costs infinity."""
        host = [inf] * len(self.rows) if self.host_s is None else self.host_s
        return np.array(self.rows, np.float64), np.array(self.device_s, np.float64), np.array(host, np.float64)

    def on_device(self, rows: ArrayLike) -> NDArray[np.float64]:
        """Seconds of one expert with `rows` [...] rows, weights on the device."""
        return _along(np.asarray(rows), *self.tables[:2])

    def on_host(self, rows: ArrayLike) -> NDArray[np.float64]:
        """Seconds of one expert with `rows` [...] rows, weights in its memory; infinity where it is the device."""
        if self.host_s is None:
            return np.full(np.shape(rows), inf)
        return _along(np.asarray(rows), self.tables[0], self.tables[2])

    def rows_in(self, seconds: float) -> float:
        """How many rows of one expert the device computes in `seconds`, as a fraction; inf where it never fills them,
        0 where the first row takes longer."""
        rows, device = self.tables[0], self.tables[1]
        if seconds < device[0]:
            return 0.0
        if seconds >= device[-1]:
            slope = _slope(rows, device)
            return float(rows[-1] + (seconds - device[-1]) / slope) if slope else inf
        at = int(np.searchsorted(device, seconds, "right"))
        return float(
            rows[at - 1] + (rows[at] - rows[at - 1]) * (seconds - device[at - 1]) / (device[at] - device[at - 1])
        )

    def copy_s(self, size_bytes: float | None = None) -> float:
        """Seconds from host memory to the device, of an expert or of `size_bytes`."""
        return self.copy.latency_s + self.copy.transfer_s(self.expert_bytes if size_bytes is None else size_bytes)

    def read_s(self, size_bytes: float | None = None) -> float:
        """Seconds from disk to host memory, of an expert or of `size_bytes`."""
        return self.read.latency_s + self.read.transfer_s(self.expert_bytes if size_bytes is None else size_bytes)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for JSON; `from_dict` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Costs:
        host = found["host_s"]
        return cls(
            rows=tuple(found["rows"]),
            device_s=tuple(found["device_s"]),
            host_s=None if host is None else tuple(host),
            copy=Link(**found["copy"]),
            read=Link(**found["read"]),
            expert_bytes=found["expert_bytes"],
            start_s=found["start_s"],
        )


def _slope(rows: NDArray[np.float64], seconds: NDArray[np.float64]) -> float:
    """Seconds of each row beyond the table."""
    if len(rows) == 1:
        return float(seconds[0] / rows[0])
    return float((seconds[-1] - seconds[-2]) / (rows[-1] - rows[-2]))


def _along(at: NDArray, rows: NDArray[np.float64], seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.interp(at, rows, seconds) + np.maximum(at - rows[-1], 0) * _slope(rows, seconds)


def _rule(holds: bool, field: str, rule: str, value: object) -> None:
    if not holds:
        raise ValueError(f"Costs: {field} must be {rule}, got {value}")
