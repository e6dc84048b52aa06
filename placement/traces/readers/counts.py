"""How often each expert was chosen, as a CSV: a row for each layer and expert, with or without a header.

SGLang's recorder wrote such files before it wrote .pt ones: "layer_id,expert_id,count". With a header the columns may
stand in any order and others beside them; without one they are layer, expert, count. Rows of the same expert add up.

There are no tokens in it: Statistics with loads and no transitions.
"""

from __future__ import annotations

import csv

import numpy as np

from ...careful import opened
from ..statistics import Statistics
from .common import Found, Options, statistics_of

NAMES = (("layer", "layer_id", "layer_idx"), ("expert", "expert_id", "expert_idx"), ("count", "counts"))


def fits(found: Found) -> bool:
    return found.path.suffix.lower() == ".csv" and _columns(_first(found)) is not None


def read(found: Found, options: Options) -> Statistics:
    first = _first(found)
    columns = _columns(first)
    found.rule(columns is not None, "first row", "a header with layer, expert and count, or three whole numbers", first)
    skip = 0 if all(cell.isdecimal() for cell in first) else 1
    assert columns is not None
    with opened(found.path, "read", options.max_bytes) as file:
        layer, expert, count = file.table(("layer", "expert", "count"), columns, skip).T
    shape = int(layer.max()) + 1, int(expert.max()) + 1
    most = 64 * len(layer) + 4096  # a table with holes that large is none of these
    found.rule(shape[0] * shape[1] <= most, "layer and expert", f"dense, {most} pairs at most", list(shape))
    experts = options.num_experts or shape[1]
    found.rule(shape[1] <= experts, "expert", f"below num_experts={experts}", shape[1] - 1)
    found.rule(float(count.sum(dtype=np.float64)) < 2**62, "count", "below 2**62 in sum", count.max())
    found.file.take(8 * shape[0] * experts, "count")
    load = np.zeros((shape[0], experts), np.int64)
    np.add.at(load, (layer, expert), count)
    return statistics_of(found, load, "count", options)


def _first(found: Found) -> list[str]:
    """The cells of the first row."""
    with opened(found.path, "read") as file:
        return [cell.strip().lower() for cell in next(csv.reader(file.lines("replace")), [])]


def _columns(first: list[str]) -> tuple[int, ...] | None:
    """Where layer, expert and count stand; None where the row names no such columns and is not three whole numbers."""
    if len(first) == 3 and all(cell.isdecimal() for cell in first):
        return 0, 1, 2
    found = tuple(next((first.index(name) for name in names if name in first), -1) for names in NAMES)
    return None if -1 in found else found
