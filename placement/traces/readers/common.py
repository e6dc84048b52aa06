"""What the readers share: a recording opened by its kind, and a Trace or Statistics made of what was found."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...careful import Guard, folder, opened
from ..statistics import Statistics
from ..trace import Trace, id_type
from .torch_file import load_torch


@dataclass(frozen=True)
class Options:
    """What a recording may not say itself: K (`top_k`), E (`num_experts`); and `max_tokens` to read at most. `tell` is
    called with a line where a reader found something worth knowing. `max_bytes` of memory to fill (None: four times the
    file, or 64 MB)."""

    top_k: int | None = None
    num_experts: int | None = None
    max_tokens: int | None = None
    tell: Callable[[str], None] = lambda line: None
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in ("top_k", "num_experts", "max_tokens", "max_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"read: {name} must be at least 1, got {value}")


@dataclass(frozen=True, eq=False)
class Found:
    """A recording, opened: `content` is what the file holds as plain Python values and numpy arrays (.pt, .npy, .npz as
    a dict, .json, .jsonl as a list), or None where the reader reads the text, the columns or the folder itself."""

    file: Guard
    content: Any = None

    @property
    def path(self) -> Path:
        return self.file.path

    def rule(self, holds: bool | np.bool_, field: str, rule: str, value: object) -> None:
        """Raises the ValueError of all readers."""
        self.file.rule(holds, field, rule, value)

    def array(self, value: ArrayLike, field: str, *, dims: int, kinds: str = "iu") -> NDArray:
        """A numpy array with so many dimensions and numbers of such kinds; NaN, Inf, and 2**63 and more are refused."""
        with self.file.watched("an array of numbers", field):
            if isinstance(value, list | tuple):
                self.file.take(8 * _size(value), field)  # a pickle can name one list many times
            found = np.asarray(value)
        what = {"iu": "whole numbers", "iuf": "numbers", "f": "fractions"}[kinds]
        self.rule(found.dtype.kind in kinds, field, what, found.dtype)
        self.rule(found.ndim == dims, field, f"an array with {dims} dimensions", list(found.shape))
        if found.dtype.kind == "f":
            self.rule(bool(np.isfinite(found).all()), field, "finite", "NaN or Inf")
        if found.dtype == np.uint64:  # or 2**64 - 1 would become -1, which means no expert
            self.rule(not found.size or int(found.max()) < 2**63, field, "below 2**63", found.max(initial=0))
            found = found.astype(np.int64)
        return found


def _size(value: object) -> int:
    """Elements of the array that nested lists make, by the first of each."""
    size = 1
    for _ in range(64):  # numpy has no more dimensions
        if not isinstance(value, list | tuple) or not value:
            break
        size, value = size * len(value), value[0]
    return size


TABLES = (".csv", ".txt", ".tsv", ".parquet")  # read by their readers


def open_recording(path: Path, max_bytes: int | None = None) -> Found:
    """Raises OSError where it is missing, or ValueError where the content is not what the name says."""
    kind = path.suffix.lower()
    if path.is_dir():
        return Found(folder(path, "read", path.iterdir(), max_bytes))
    with opened(path, "read", max_bytes) as file:
        if kind in TABLES:
            return Found(file)
        if kind in (".pt", ".pth"):
            return Found(file, load_torch(file))
        if kind == ".npy":
            return Found(file, file.npy())
        if kind == ".npz":
            return Found(file, file.npz())
        if kind == ".json":
            return Found(file, file.json())
        if kind == ".jsonl":
            with file.watched("JSON in each line"):
                return Found(file, [json.loads(line) for line in file.lines() if line.strip()])
        kinds = ".pt, .pth, .npy, .npz, .json, .jsonl, .csv, .txt or .parquet"
        raise file.damaged(f"a folder or a {kinds} file", repr(kind))


def trace_of(
    found: Found,
    ids: NDArray[np.signedinteger],
    options: Options,
    *,
    layers: list[int] | None = None,
    sequence: NDArray | None = None,
    weights: NDArray | None = None,
    num_experts: int | None = None,
) -> Trace:
    """A Trace of ids [L, T, K], negative where there is no expert. `layers`: the numbers of the model's own.

    E is the option's, else `num_experts`, else one more than the largest id.
    """
    found.rule(ids.size > 0, "tokens", "at least one, with a choice in some layer", list(ids.shape))
    if options.max_tokens is not None:
        ids = ids[:, : options.max_tokens]
        sequence = None if sequence is None else sequence[: options.max_tokens]
        weights = None if weights is None else weights[:, : options.max_tokens]
    experts = options.num_experts or num_experts or int(ids.max()) + 1
    found.rule(experts < 2**32, "expert ids", "below 2**32 - 1", experts - 1)
    found.rule(experts >= 1, "expert ids", "not all negative", int(ids.max()))
    wrong = ids >= experts
    if wrong.any():
        layer, token, choice = (int(i) for i in np.argwhere(wrong)[0])
        number = layer if layers is None else layers[layer]
        value = int(ids[layer, token, choice])
        found.rule(False, f"expert id (layer {number}, token {token})", f"below num_experts={experts}", value)
    dtype = id_type(experts)
    none = ids < 0
    return Trace(
        np.where(none, np.iinfo(dtype).max, ids).astype(dtype),
        experts,
        weights=None if weights is None else np.where(none, 0, weights).astype(np.float16),
        sequence=None if sequence is None else sequence.astype(np.int32),
        layer_names=() if layers is None else tuple(f"layers.{n}" for n in layers),
    )


def statistics_of(found: Found, counts: NDArray, field: str, options: Options) -> Statistics:
    """The Statistics, loads only, of counts [L, E]; layers without any are left out (they have no experts).

    Where K is not given tokens count as top-1, one for each choice. Fractions, such as moving averages, are counted in
    1/1024: only the shares of experts mean something then.
    """
    found.rule(counts.size > 0, field, "[L, E], not empty", list(counts.shape))
    found.rule(counts.min() >= 0, field, "not negative", counts.min())
    used = np.flatnonzero(counts.any(axis=1))
    found.rule(used.size > 0, field, "more than zeros", "none")
    whole = np.rint(counts[used])
    if (whole != counts[used]).any():
        whole = np.rint(counts[used] * 1024.0)
    most = float(whole.sum())
    found.rule(most < 2**62, field, "below 2**62 in sum", most)
    load = whole.astype(np.int64)
    top_k = options.top_k or 1
    names = tuple(f"layers.{n}" for n in used.tolist())
    return Statistics(load.shape[1], -int(-load.sum(1).max() // top_k), top_k, load, (), layer_names=names)
