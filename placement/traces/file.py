"""A trace file too big for memory: read by streams that decompress as they go, written chunk by chunk.

An .npz file is a zip archive of .npy arrays. The ids lie layer after layer, [L, T, K], in one compressed stream: a
reader of layer l has gone through the layers before it, so consecutive layers are read by two streams, one a layer
ahead, and the whole file is decompressed twice in all.
"""

from __future__ import annotations

import io
import os
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from ..careful import header, open_file
from ..files import write_whole
from .trace import OPTIONAL, REQUIRED, VERSION, Trace, check_shape, id_type

CHUNK = 65536  # tokens: about a megabyte of ids
SMALL_bytes = 1 << 24  # of a field that is read whole


class TraceFile:
    """A trace .npz as `Trace.save`, `record(path=)` or `TraceWriter` left it, of which only chunks are in memory.

    shape             (L, T, K)
    num_experts, none, layer_names, experts_of_layer       as in Trace
    sequence          as in Trace, 4 T bytes, read when asked for

    Opening reads the headers, and compares what they declare with what is there. Raises FileNotFoundError, or
    ValueError naming file, field, rule and value: there, and at the chunk where the data turn out short, damaged or
    out of range. `max_bytes` of memory that one array may fill: None for four times the file, or 64 MB. Use one object
    in one thread.

    >>> with TraceFile("trace.npz") as trace:
    ...     for layer in range(trace.shape[0] - 1):
    ...         for before, after in trace.pairs(layer):
    ...             ...
    """

    def __init__(self, path: str | os.PathLike[str], *, max_bytes: int | None = None) -> None:
        self.path = Path(path)
        self._file = open_file(path, "TraceFile", max_bytes)
        try:
            with self._file.watched("an .npz file"):
                self._open()
        except BaseException:
            self._file.close()
            raise

    def _open(self) -> None:
        held = self._file.names(REQUIRED, OPTIONAL)
        version = self._small("version") if "version" in held else np.array(VERSION)
        self._file.rule(version.shape == () and version == VERSION, "version", str(VERSION), version)
        self._ids = _Member(self, "expert_ids")
        self._file.rule(self._ids.dtype.kind == "u", "expert_ids", "unsigned integers", self._ids.dtype)
        check_shape(self._file, self._ids.shape)
        self.shape: tuple[int, int, int] = self._ids.shape  # type: ignore[assignment]
        self.none = int(np.iinfo(self._ids.dtype).max)
        experts = self._small("num_experts")
        self._file.rule(experts.size == 1 and experts.dtype.kind in "iu", "num_experts", "one whole number", experts)
        self.num_experts = int(experts)
        self._file.rule(0 < self.num_experts <= self.none, "num_experts", f"1 .. {self.none}", self.num_experts)
        layers, tokens, top_k = self.shape
        most = min(CHUNK, tokens) * top_k * self._ids.dtype.itemsize
        self._file.rule(most <= self._file.left, "a chunk of expert_ids", f"{self._file.left} bytes at most", most)
        self.layer_names = tuple(str(n) for n in self._small("layer_names")) if "layer_names" in held else ()
        count = len(self.layer_names)
        self._file.rule(count in (0, layers), "layer_names", f"{layers} names or none", count)
        self.experts_of_layer = self._small("experts_of_layer") if "experts_of_layer" in held else None
        of_layer = self.experts_of_layer
        if of_layer is not None:
            self._file.rule(of_layer.shape == (layers,), "experts_of_layer", f"[L={layers}]", of_layer.shape)
            fits = of_layer.dtype == np.int32 and of_layer.min() > 0 and of_layer.max() <= self.num_experts
            self._file.rule(fits, "experts_of_layer", f"int32, 1 .. {self.num_experts}", of_layer)
        self._sequence = _Member(self, "sequence") if "sequence" in held else None
        if self._sequence is not None:
            shape, dtype = self._sequence.shape, self._sequence.dtype
            fits = (shape, dtype) == ((tokens,), np.int32)
            self._file.rule(fits, "sequence", f"int32 [T={tokens}]", f"{dtype} {list(shape)}")
        self._streams = [_Stream(self._ids), _Stream(self._ids)]

    def _small(self, name: str) -> NDArray:
        member = _Member(self, name)
        self._file.rule(member.size_bytes <= SMALL_bytes, name, f"at most {SMALL_bytes} bytes", member.size_bytes)
        stream = _Stream(member)
        try:
            return member.numbers(stream.read(0, member.size_bytes)).reshape(member.shape)
        finally:
            stream.close()

    @property
    def sequence(self) -> NDArray[np.int32] | None:
        """int32 [T] or None, read from the file at each use."""
        if self._sequence is None:
            return None
        rule = f"small enough for {self._file.left:,} bytes (max_bytes= allows more)"
        self._file.rule(self._sequence.size_bytes <= self._file.left, "sequence", rule, self._sequence.size_bytes)
        stream = _Stream(self._sequence)
        try:
            data = stream.read(0, self._sequence.size_bytes)
        finally:
            stream.close()
        return self._sequence.numbers(data)

    def experts(self, layer: int) -> int:
        """The number of experts of one layer."""
        return self.num_experts if self.experts_of_layer is None else int(self.experts_of_layer[layer])

    def chunks(self, layer: int, tokens: int = CHUNK) -> Iterator[NDArray[np.unsignedinteger]]:
        """The ids of one layer, [t, K] at a time, t <= tokens. Cheap where layers are asked for in their order."""
        yield from self._chunks(layer, tokens, 0)

    def pairs(self, layer: int, tokens: int = CHUNK) -> Iterator[tuple[NDArray, NDArray]]:
        """The ids of `layer` and of `layer + 1` for the same tokens, [t, K] each at a time, t <= tokens."""
        yield from zip(self._chunks(layer, tokens, 0), self._chunks(layer + 1, tokens, 1), strict=True)

    def _chunks(self, layer: int, tokens: int, stream: int) -> Iterator[NDArray]:
        layers, every, top_k = self.shape
        if not 0 <= layer < layers:
            raise IndexError(f"TraceFile: layer must be 0 .. {layers - 1}, got {layer}")
        if tokens < 1:
            raise ValueError(f"TraceFile: tokens must be at least 1, got {tokens}")
        row_bytes = top_k * self._ids.dtype.itemsize
        for start in range(0, every, tokens):
            count = min(tokens, every - start)
            data = self._streams[stream].read((layer * every + start) * row_bytes, count * row_bytes)
            ids = self._ids.numbers(data).reshape(count, top_k)
            self._check(ids, layer, start)
            yield ids

    def _check(self, ids: NDArray, layer: int, start: int) -> None:
        wrong = (ids >= self.experts(layer)) & (ids != self.none)
        if wrong.any():
            token, choice = (int(i) for i in np.argwhere(wrong)[0])
            rule = f"below {self.experts(layer)}, or {self.none} for none"
            self._file.rule(False, f"expert_ids (layer {layer}, token {start + token})", rule, int(ids[token, choice]))

    def trace(self, *, max_bytes: int | None = None) -> Trace:
        """All of it, in memory; `max_bytes` as in Trace.load."""
        return Trace.load(self.path, max_bytes=max_bytes)

    def close(self) -> None:
        """Lets go of the file; the object is of no more use."""
        for stream in self._streams:
            stream.close()
        self._file.close()

    def __enter__(self) -> TraceFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Member:
    """One array of the archive: what its header declares, compared with the bytes that are there."""

    def __init__(self, file: TraceFile, name: str) -> None:
        self.file, self.name = file._file, name
        with self.file.watched("an .npy array", name), self.open() as stream:
            self.shape, fortran, self.dtype = header(self.file, stream, name, self.info.file_size)
            self.start = stream.tell()
        self.size_bytes = prod(self.shape) * self.dtype.itemsize
        rule = "in C order (load the trace and save it)"
        self.file.rule(not fortran or len(self.shape) < 2, name, rule, "Fortran order")

    def numbers(self, data: bytes) -> NDArray:
        """The array of these bytes, in the machine's own order of bytes: numba cannot tell another from it."""
        return np.frombuffer(data, self.dtype).astype(self.dtype.newbyteorder("="), copy=False)

    @property
    def info(self) -> zipfile.ZipInfo:
        assert self.file.archive is not None
        return self.file.archive.getinfo(f"{self.name}.npy")

    def open(self) -> IO[bytes]:
        assert self.file.archive is not None
        return self.file.archive.open(self.info)


class _Stream:
    """Reads bytes of a member's data at rising places; going back starts the decompression anew."""

    def __init__(self, member: _Member) -> None:
        self.member = member
        self.stream: IO[bytes] | None = None
        self.at = 0

    def read(self, place: int, size: int) -> bytes:
        member = self.member
        with member.file.watched("whole", member.name):
            if self.stream is None or self.at > place:
                self.close()
                self.stream, self.at = member.open(), -member.start
            while self.at < place:
                self._next(min(place - self.at, 1 << 18))
            parts = []
            while size:
                parts.append(self._next(size))
                size -= len(parts[-1])
            return parts[0] if len(parts) == 1 else b"".join(parts)

    def _next(self, size: int) -> bytes:
        assert self.stream is not None
        data = self.stream.read(size)
        if not data:
            raise EOFError(f"the end after byte {self.at} of {self.member.name}")
        self.at += len(data)
        return data

    def close(self) -> None:
        if self.stream is not None:
            self.stream.close()
            self.stream = None


class TraceWriter:
    """Writes a trace file of any length: chunks of tokens go to unnamed temporary files beside `path`, one for a layer;
    `close` puts them together. Memory does not depend on T; the disk holds the ids raw until then.

    path              the .npz, replaced when it is whole; a failure leaves what was there before
    num_experts       E
    layers, top_k     L, K
    weights           chunks come with router weights
    layer_names, experts_of_layer      as in Trace

    Raises ValueError where these do not fit together, OSError where the folder cannot be written or the disk is full.

    >>> with TraceWriter("trace.npz", num_experts=64, layers=26, top_k=6) as writer:
    ...     for ids in batches:
    ...         writer.append(ids)
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        num_experts: int,
        layers: int,
        top_k: int,
        *,
        weights: bool = False,
        layer_names: Sequence[str] = (),
        experts_of_layer: NDArray[np.int32] | None = None,
    ) -> None:
        self.path = Path(path)
        self.dtype = id_type(num_experts)
        ids = np.empty((layers, 0, top_k), self.dtype)
        # a Trace without tokens for its checks; every chunk goes through them too
        self.frame = Trace(ids, num_experts, None, None, tuple(layer_names), experts_of_layer)
        self.tokens = 0
        self._ids = [self._temporary() for _ in range(layers)]
        self._weights = [self._temporary() for _ in range(layers)] if weights else None
        self._sequence: IO[bytes] | None = None

    def _temporary(self) -> IO[bytes]:
        """A file without a name: whatever happens to the process, nothing is left of it."""
        return tempfile.TemporaryFile(dir=self.path.parent)

    def append(
        self,
        ids: NDArray[np.unsignedinteger],
        weights: NDArray[np.float16] | None = None,
        sequence: NDArray[np.int32] | None = None,
    ) -> None:
        """Adds tokens: ids [L, t, K] of the type that `id_type` gives for E, float16 weights [L, t, K], int32 [t].

        Raises ValueError / TypeError where they do not fit, before anything is written.
        """
        layers, _, top_k = self.frame.expert_ids.shape
        rule = f"{self.dtype} [L={layers}, t, K={top_k}]"
        fits = ids.dtype == self.dtype and ids.ndim == 3 and (ids.shape[0], ids.shape[2]) == (layers, top_k)
        _rule(fits, "ids", rule, f"{ids.dtype} {ids.shape}")
        _rule((weights is None) == (self._weights is None), "weights", "given always or never", weights)
        had = self.tokens == 0 or (self._sequence is not None) == (sequence is not None)
        _rule(had, "sequence", "given always or never", sequence)
        chunk = Trace(ids, self.frame.num_experts, weights, sequence, experts_of_layer=self.frame.experts_of_layer)
        if sequence is not None and self._sequence is None:
            self._sequence = self._temporary()
        for layer in range(layers):
            self._ids[layer].write(np.ascontiguousarray(chunk.expert_ids[layer]).data)
            if self._weights is not None and weights is not None:
                self._weights[layer].write(np.ascontiguousarray(weights[layer]).data)
        if self._sequence is not None and sequence is not None:
            self._sequence.write(np.ascontiguousarray(sequence).data)
        self.tokens += ids.shape[1]

    def close(self) -> TraceFile:
        """Puts the file together at `path` and opens it."""
        try:
            write_whole(self.path, self._assemble)
        finally:
            self.abandon()
        return TraceFile(self.path)

    def _assemble(self, file: IO[bytes]) -> None:
        frame, whole = self.frame, np.dtype(np.int64)
        layers, _, top_k = frame.expert_ids.shape
        shape = (layers, self.tokens, top_k)
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            _put(archive, "version", (), whole, [io.BytesIO(whole.type(VERSION).tobytes())])
            _put(archive, "num_experts", (), whole, [io.BytesIO(whole.type(frame.num_experts).tobytes())])
            names = np.array(frame.layer_names, np.str_) if frame.layer_names else None
            for name, value in (("layer_names", names), ("experts_of_layer", frame.experts_of_layer)):
                if value is not None:
                    _put(archive, name, value.shape, value.dtype, [io.BytesIO(value.tobytes())])
            _put(archive, "expert_ids", shape, self.dtype, self._ids)
            if self._weights is not None:
                _put(archive, "weights", shape, np.dtype(np.float16), self._weights)
            if self._sequence is not None:
                _put(archive, "sequence", (self.tokens,), np.dtype(np.int32), [self._sequence])

    def abandon(self) -> None:
        """Gives up what was written; `path` stays as it was."""
        for file in (*self._ids, *(self._weights or ()), *([self._sequence] if self._sequence else ())):
            file.close()

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.abandon()
        elif not self._ids[0].closed:
            self.close().close()


def _put(
    archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], dtype: np.dtype, files: Sequence[IO[bytes]]
) -> None:
    """One .npy member: the files' bytes, one after the other."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    with archive.open(f"{name}.npy", "w", force_zip64=True) as out:
        np.lib.format.write_array_header_1_0(out, header)
        for file in files:
            file.seek(0)
            while block := file.read(1 << 18):
                out.write(block)


def _rule(holds: bool, field: str, rule: str, value: object) -> None:
    if not holds:
        raise ValueError(f"TraceWriter: {field} must be {rule}, got {value}")
