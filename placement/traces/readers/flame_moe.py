"""The routing traces of FLAME-MoE (data set CMU-FLAME/FLAME-MoE-Traces).

A folder actives/iter_N/ with a file layer_NN.parquet for each MoE layer; a row is a token, `indices` list<int16>[6] its
experts and `scores` list<float16>[6] their probabilities. There are 52 million tokens in a layer: `read` with
`max_tokens`, or `convert`. Needs pyarrow.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...careful import Missing, opened
from ..file import TraceFile, TraceWriter
from ..trace import Trace
from .common import Found, Options, trace_of
from .parquet_rows import rows_of

LAYER = re.compile(r"layer_(\d+)\.parquet")
ROWS = 65536
EXPERTS = 64


def fits(found: Found) -> bool:
    return bool(_files(found.path))


def read(found: Found, options: Options) -> Trace:
    layers = sorted(_files(found.path))
    taken, pieces = 0, []
    for ids in chunks(found):
        pieces.append(ids)
        taken += ids.shape[1]
        if options.max_tokens is not None and taken >= options.max_tokens:
            break
    found.rule(bool(pieces), "rows", "at least one", 0)
    return trace_of(found, np.concatenate(pieces, axis=1), options, layers=layers)


def write(found: Found, options: Options, output: str | os.PathLike[str]) -> TraceFile:
    """Streams the folder to a trace file; E is 64, as in all these models, unless `num_experts` says otherwise."""
    layers = sorted(_files(found.path))
    experts, left = options.num_experts or EXPERTS, options.max_tokens
    names = [f"layers.{number}" for number in layers]
    writer = None
    try:
        for ids in chunks(found):
            ids = ids if left is None else ids[:, :left]
            part = trace_of(found, ids, Options(num_experts=experts))
            writer = writer or TraceWriter(output, experts, len(ids), ids.shape[2], layer_names=names)
            writer.append(part.expert_ids)
            left = None if left is None else left - ids.shape[1]
            if left == 0:
                break
        found.rule(writer is not None, "rows", "at least one", 0)
        assert writer is not None
        return writer.close()
    finally:
        if writer is not None:
            writer.abandon()


def chunks(found: Found, rows: int = ROWS) -> Iterator[NDArray[np.int64]]:
    """Ids [L, t, K], t <= rows, of the folder's layers side by side."""
    files = _files(found.path)
    found.rule(bool(files), "folder", "holding layer_NN.parquet", "none")
    if find_spec("pyarrow") is None:
        raise Missing("read: parquet files need pyarrow, which is not installed: pip install pyarrow")
    for path in files.values():
        with opened(path, "read"):  # a regular file that may be read
            pass
    layers = [files[layer] for layer in sorted(files)]
    for piece in rows_of(layers, "indices", rows, found.file.left):
        if isinstance(piece, dict):
            raise found.file.damaged(piece["rule"], piece["value"], piece["field"] or piece["file"])
        yield np.stack(piece)


def _files(path: Path) -> dict[int, Path]:
    """Layer number -> file."""
    several = path.iterdir() if path.is_dir() else [path]
    return {int(match[1]): file for file in several if (match := LAYER.fullmatch(file.name))}
