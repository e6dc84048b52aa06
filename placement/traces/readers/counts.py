"""How often each expert was chosen, as a CSV: a row for each layer and expert, with or without a header.

SGLang's recorder wrote such files before it wrote .pt ones: "layer_id,expert_id,count". With a header the columns may
stand in any order and others beside them; without one they are layer, expert, count. Rows of the same expert add up.

There are no tokens in it: Statistics with loads and no transitions.
"""

from __future__ import annotations

import csv
from itertools import islice

import numpy as np

from ..statistics import Statistics
from .common import Found, Options, statistics_of

NAMES = (("layer", "layer_id", "layer_idx"), ("expert", "expert_id", "expert_idx"), ("count", "counts"))


def fits(found: Found) -> bool:
    return found.path.suffix.lower() == ".csv" and found.path.is_file() and _columns(_first(found)) is not None


def read(found: Found, options: Options) -> Statistics:
    first = _first(found)
    columns = _columns(first)
    found.rule(columns is not None, "first row", "a header with layer, expert and count, or three whole numbers", first)
    skip = 0 if all(cell.isdigit() for cell in first) else 1
    lines = found.path.read_text(encoding="utf-8", errors="replace").splitlines()[skip:]
    found.rule(any(line.strip() for line in lines), "rows", "at least one", 0)
    try:
        rows = np.loadtxt(lines, np.int64, delimiter=",", usecols=columns, ndmin=2)
    except (ValueError, IndexError, OverflowError) as error:
        raise ValueError(f"read: rows of {found.path} must be whole numbers, got {error}") from error
    layer, expert, count = rows.T
    for name, column in (("layer", layer), ("expert", expert), ("count", count)):
        found.rule(int(column.min()) >= 0, name, "not negative", int(column.min()))
    shape = int(layer.max()) + 1, int(expert.max()) + 1
    most = 64 * len(rows) + 4096  # a table with holes that large is none of these
    found.rule(shape[0] * shape[1] <= most, "layer and expert", f"dense, {most} pairs at most", list(shape))
    load = np.zeros((shape[0], options.num_experts or shape[1]), np.int64)
    found.rule(shape[1] <= load.shape[1], "expert", f"below num_experts={load.shape[1]}", shape[1] - 1)
    np.add.at(load, (layer, expert), count)
    return statistics_of(found, load, "count", options)


def _first(found: Found) -> list[str]:
    """The cells of the first row."""
    with open(found.path, encoding="utf-8", errors="replace", newline="") as file:
        line = next(islice(csv.reader(file), 1), [])
    return [cell.strip().lower() for cell in line]


def _columns(first: list[str]) -> tuple[int, ...] | None:
    """Where layer, expert and count stand; None where the row names no such columns and is not three whole numbers."""
    if len(first) == 3 and all(cell.isdigit() for cell in first):
        return 0, 1, 2
    found = tuple(next((first.index(name) for name in names if name in first), -1) for names in NAMES)
    return None if -1 in found else found
