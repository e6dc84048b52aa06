"""A reader of torch.distributed.checkpoint that looks at every entry before one tensor of the module is changed."""

from __future__ import annotations

import io
import os
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from ...placement.careful import fault, open_regular
from .machine import read
from .metadata import DTYPES, WHO

_LARGEST_PICKLE = 4096  # bytes of what torch.save says about one tensor; it writes some 200
_MOST_RECORDS = 16
_PIECE = 1 << 20
_STORAGES = {
    "torch DoubleStorage": torch.float64, "torch FloatStorage": torch.float32, "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16, "torch LongStorage": torch.int64, "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16, "torch CharStorage": torch.int8, "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool, "torch ComplexFloatStorage": torch.complex64,
    "torch ComplexDoubleStorage": torch.complex128,
}  # fmt: skip
_CALLS = ("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3")


class CheckedReader(dcp.FileSystemReader):
    """Reads with metadata that were checked already. What a plan wants is checked on every rank before any reads:
    torch asks all ranks between the two. Both go by `_Entry`; torch's own loading of entries is not asked."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._folder, self._checked = folder, metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._checked

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        for entry, _ in self._entries({item.storage_index: [] for item in plan.items}):
            entry.check()
        return plan

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        wanted: dict[MetadataIndex, list[ReadItem]] = {}
        for item in plan.items:
            wanted.setdefault(item.storage_index, []).append(item)
        for entry, items in self._entries(wanted):
            whole = entry.tensor()
            for item in items:
                part = whole
                for dim, (begin, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                    part = part.narrow(dim, begin, length)
                target = planner.resolve_tensor(item).detach()
                target.copy_(part)
                planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _entries(self, wanted: Mapping[MetadataIndex, list[ReadItem]]) -> Iterator[tuple[_Entry, list[ReadItem]]]:
        """Each entry that is wanted, file by file, in the order in which they lie there."""
        places = self._checked.storage_data
        order = sorted(wanted, key=lambda index: (places[index].relative_path, places[index].offset))
        for name, indices in groupby(order, key=lambda index: places[index].relative_path):
            path = self._folder / name
            with open(open_regular(path, WHO), "rb") as file:
                for index in indices:
                    kept = self._checked.state_dict_metadata[index.fqn]
                    chunk = next(c for c in kept.chunks if c.offsets == index.offset)  # type: ignore[union-attr]
                    with _told(path, index.fqn):
                        entry = _Entry(file, places[index], chunk.sizes, kept.properties.dtype)  # type: ignore[union-attr]
                    with _told(path, index.fqn):
                        yield entry, wanted[index]


@contextmanager
def _told(path: Path, key: str) -> Iterator[None]:
    """What goes wrong inside is a ValueError that names the file; the disk's own words stay an OSError."""
    try:
        yield
    except Exception as error:  # zipfile has many ways to say that an archive is none
        if isinstance(error, OSError) and error.errno:
            raise
        raise fault(WHO, path, f"must hold {key} undamaged, got {type(error).__name__}: {error}") from error


class _Entry:
    """One tensor as torch.save writes it, an archive inside a file. Raises where it is anything else."""

    def __init__(self, file: io.BufferedReader, place: _StorageInfo, sizes: torch.Size, dtype: torch.dtype) -> None:
        self.archive = zipfile.ZipFile(io.BufferedReader(_Slice(file, place.offset, place.length)))
        self.records = {record.filename.partition("/")[2]: record for record in self.archive.infolist()}
        if len(self.records) != len(self.archive.infolist()) or len(self.records) > _MOST_RECORDS:
            raise ValueError("records of other names")
        for record in self.records.values():
            if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
                raise ValueError(f"{record.filename} compressed")
        if self._small("byteorder").decode() != sys.byteorder:
            raise ValueError("another byte order")
        self.sizes, self.dtype = sizes, dtype
        self.strides, self.offset, self.name, numel = _described(self._small("data.pkl"), sizes, dtype)
        if self.records[self.name].file_size != numel * dtype.itemsize:
            raise ValueError(f"{self.records[self.name].file_size} bytes for {numel} numbers")

    def check(self) -> None:
        """Reads all of it, and compares the checksums."""
        for record in self.records.values():
            with self.archive.open(record) as content:
                while content.read(_PIECE):
                    pass

    def tensor(self) -> Tensor:
        data = bytearray(self.records[self.name].file_size)
        with self.archive.open(self.records[self.name]) as content:
            at = memoryview(data)
            while got := content.readinto(at):  # type: ignore[attr-defined]
                at = at[got:]
        if not data:
            return torch.empty(self.sizes, dtype=self.dtype)
        return torch.frombuffer(data, dtype=self.dtype).as_strided(self.sizes, self.strides, self.offset)

    def _small(self, name: str) -> bytes:
        if self.records[name].file_size > _LARGEST_PICKLE:
            raise ValueError(f"{name} of {self.records[name].file_size} bytes")
        return self.archive.read(self.records[name])


def _described(data: bytes, sizes: torch.Size, dtype: torch.dtype) -> tuple[tuple[int, ...], int, str, int]:
    """(strides, offset, the record of the numbers, how many there are) from the pickle of a tensor."""
    made = read(data, _allowed)
    storage, offset, shape, strides, *more = made.args
    ((_, kind, name, _, numel),) = storage.args
    if made.name == _CALLS[0]:
        said = _STORAGES.get(kind.text)
    else:  # of a dtype without a storage of its own: numel counts bytes
        said, numel = DTYPES[more[2].text], numel // dtype.itemsize
    numbers = [offset, numel, *shape, *strides]
    if said != dtype or shape != tuple(sizes) or len(strides) != len(shape) or type(name) is not str:
        raise ValueError(f"{said} {shape}, where {dtype} {tuple(sizes)} was said")
    last = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if any(type(n) is not int or n < 0 for n in numbers) or (0 not in shape and offset + last >= numel):
        raise ValueError("numbers beyond its own")
    return strides, offset, f"data/{name}", numel


def _allowed(name: str) -> bool:
    module, _, what = name.partition(" ")
    storage = module in ("torch", "torch.storage") and what.endswith("Storage")
    return storage or name in _CALLS or name in DTYPES or name == "collections OrderedDict"


class _Slice(io.RawIOBase):
    """Part of a file as a file."""

    def __init__(self, file: io.BufferedReader, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, to: int, whence: int = os.SEEK_SET) -> int:
        at = to + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        if at < 0:
            raise ValueError(f"a place {at} before its beginning")
        self._at = at
        return at

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), max(0, self._length - self._at))
        got = os.preadv(self._file.fileno(), [memoryview(buffer)[:wanted]], self._offset + self._at)
        self._at += got
        return got
