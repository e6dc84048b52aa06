"""The routing traces of FLAME-MoE (data set CMU-FLAME/FLAME-MoE-Traces).

A folder actives/iter_N/ with a file layer_NN.parquet for each MoE layer; a row is a token, `indices` list<int16>[6] its
experts and `scores` list<float16>[6] their probabilities. There are 52 million tokens in a layer: `read` with
`max_tokens`, or `convert`. Needs pyarrow.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...careful import Missing, opened
from ..file import TraceFile, TraceWriter
from ..trace import Trace
from .common import Found, Options, trace_of

LAYER = re.compile(r"layer_(\d+)\.parquet")
ROWS = 65536
EXPERTS = 64
MOST = 1024  # choices of a token


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
    parquet = _pyarrow()
    with ExitStack() as stack:
        sheets = [_open(found, parquet, stack, files[layer]) for layer in sorted(files)]
        counts = {sheet.metadata.num_rows for sheet in sheets}
        found.rule(len(counts) == 1, "layers", "of one number of rows", sorted(counts))
        streams = [sheet.iter_batches(batch_size=rows, columns=["indices"]) for sheet in sheets]
        for start in range(0, next(iter(counts)), rows):
            sides = zip(sorted(files), streams, strict=True)
            ids = [_ids(found, files[layer], stream) for layer, stream in sides]
            widths = {i.shape for i in ids}
            found.rule(len(widths) == 1, f"indices from row {start}", "alike in all layers", sorted(widths))
            yield np.stack(ids)


def _files(path: Path) -> dict[int, Path]:
    """Layer number -> file."""
    several = path.iterdir() if path.is_dir() else [path]
    return {int(match[1]): file for file in several if (match := LAYER.fullmatch(file.name))}


def _open(found: Found, parquet: Any, stack: ExitStack, path: Path) -> Any:
    stream = stack.enter_context(opened(path, "read")).stream
    with found.file.watched("a whole parquet file", path.name):
        file = stack.enter_context(parquet.ParquetFile(stream))
        names = file.schema_arrow.names
        found.rule("indices" in names, f"columns in {path.name}", "indices and scores", names)
        column = next(
            i for i in range(file.metadata.num_columns) if file.schema.column(i).path.split(".")[0] == "indices"
        )
        for group in range(file.metadata.num_row_groups):
            part = file.metadata.row_group(group)
            most = MOST * part.num_rows  # a run of one number takes no room in the file
            values = part.column(column).num_values
            found.rule(0 <= values <= most, f"choices in {path.name}", f"at most {MOST} of each token", values)
    return file


def _ids(found: Found, path: Path, stream: Iterator[Any]) -> NDArray[np.int64]:
    with found.file.watched("a whole parquet file", path.name):
        batch = next(stream, None)
        found.rule(batch is not None, f"rows of {path.name}", "as many as declared", "fewer")
        assert batch is not None
        column = batch.column(0)
    with found.file.watched("lists of whole numbers, of one length", f"indices in {path.name}"):
        flat = column.flatten().to_numpy(zero_copy_only=False)
        ids = flat.reshape(len(column), -1)
        even = len(column) * ids.shape[1] == len(flat) and not column.null_count and ids.dtype.kind in "iu"
        if hasattr(column, "offsets"):
            even = even and bool((np.diff(column.offsets.to_numpy()) == ids.shape[1]).all())
    found.rule(even, f"indices in {path.name}", "lists of whole numbers, of one length", column.type)
    return ids.astype(np.int64)


def _pyarrow() -> Any:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise Missing("read: parquet files need pyarrow, which is not installed: pip install pyarrow") from error
    return parquet
