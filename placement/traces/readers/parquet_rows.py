"""The lists of a parquet column, read by a process of its own.

A run of one number takes no room in such a file: a row of 700 bytes can hold 10**8 choices. pyarrow has no bound on
memory, and ends its process where a file's statistics lie. So it runs in a child, which the parent gives a limit.

    python parquet_rows.py LIMIT_bytes ROWS COLUMN FILE...

The child writes to standard output, for the next ROWS rows of each FILE in turn: a line of JSON {"shape": [n, K]}, then
the numbers, int64. At the end {"done": true}; where a file will not do {"file": name, "field", "rule", "value"}. It
imports nothing of ours, so that it starts fast.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

ROOM_bytes = 64 << 20  # for pyarrow itself


def rows_of(
    files: Sequence[Path], column: str, rows: int, limit_bytes: int
) -> Iterator[list[NDArray[np.int64]] | dict[str, Any]]:
    """Arrays [n, K] of the next rows, n <= `rows`, one of each file; at last a dict with file, field, rule and value,
    where something will not do. The child fills `limit_bytes` of memory at most."""
    command = [sys.executable, "-P", __file__, str(limit_bytes), str(rows), column, *map(str, files)]
    alone = os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    alone["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # pyarrow from where this process has it
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=alone) as child:
        assert child.stdout is not None
        try:
            found: list[NDArray[np.int64]] = []
            while line := child.stdout.readline(1 << 16):
                said = json.loads(line)
                if "shape" not in said:
                    if "file" in said:
                        yield said
                    return
                size = 8 * said["shape"][0] * said["shape"][1]
                data = child.stdout.read(size)
                if len(data) < size:
                    break
                found.append(np.frombuffer(data, np.int64).reshape(said["shape"]))
                if len(found) == len(files):
                    yield found
                    found = []
            ended = child.wait()
            how = signal.Signals(-ended).name if ended < 0 else f"exit status {ended}"
            yield {"file": files[0].name, "field": "", "rule": "files that pyarrow can read", "value": how}
        finally:
            child.kill()


def main(limit_bytes: int, rows: int, column: str, names: Sequence[str], out: IO[bytes]) -> None:
    import resource

    import pyarrow as pa
    from pyarrow import parquet

    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    status = Path("/proc/self/statm")
    if status.exists():
        room = int(status.read_text().split()[0]) * resource.getpagesize() + limit_bytes + ROOM_bytes
        resource.setrlimit(resource.RLIMIT_AS, (room, room))
    name, field, rule = names[0], "", "a whole parquet file"
    try:
        streams, counts = [], []
        for name in names:
            sheet = parquet.ParquetFile(name, pre_buffer=False)
            held = sheet.schema_arrow.names
            if column not in held:
                return _say(out, name, f"columns in {Path(name).name}", f"{column} and others", held)
            counts.append(sheet.metadata.num_rows)
            streams.append(sheet.iter_batches(batch_size=rows, columns=[column], use_threads=False))
        if len(set(counts)) > 1:
            return _say(out, "", "layers", "of one number of rows", sorted(set(counts)))
        for start in range(0, counts[0], rows):
            here = []
            for name, stream in zip(names, streams, strict=True):
                field, rule = "", "a whole parquet file"
                batch = next(stream, None)
                if batch is None:
                    return _say(out, name, f"rows of {Path(name).name}", "as many as declared", "fewer")
                field, rule = f"{column} in {Path(name).name}", "lists of whole numbers, of one length"
                ids = _numbers(batch.column(0))
                if ids is None:
                    return _say(out, name, field, rule, batch.column(0).type)
                here.append(ids)
            if len({ids.shape for ids in here}) > 1:
                shapes = sorted({ids.shape for ids in here})
                return _say(out, "", f"{column} from row {start}", "alike in all layers", shapes)
            for ids in here:
                out.write(json.dumps({"shape": ids.shape}).encode() + b"\n")
                out.write(ids.tobytes())
        out.write(b'{"done": true}\n')
    except (Exception, MemoryError) as error:
        _say(out, name, field, rule, f"{type(error).__name__}: {error}")


def _numbers(column: Any) -> NDArray[np.int64] | None:
    """[n, K], None where the column holds something else."""
    flat = column.flatten().to_numpy(zero_copy_only=False)
    top_k = len(flat) // max(len(column), 1)
    even = len(column) * top_k == len(flat) and not column.null_count and flat.dtype.kind in "iu"
    if even and hasattr(column, "offsets"):
        even = bool((np.diff(column.offsets.to_numpy()) == top_k).all())
    return flat.reshape(len(column), top_k).astype(np.int64) if even else None


def _say(out: IO[bytes], name: str, field: str, rule: str, value: object) -> None:
    said = {"file": Path(name).name, "field": field, "rule": rule, "value": str(value)[:200]}
    out.write(json.dumps(said).encode() + b"\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:], sys.stdout.buffer)
