"""What a checkpoint says that it holds: torch's `.metadata`, read as data and compared with the files beside it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from ...placement.careful import fault, open_regular, read_regular, shown
from .machine import Name, Record, read

METADATA, OURS = ".metadata", "headgate.json"
WHO = "load_checkpoint"
_META, _FILES = "torch.distributed.checkpoint.metadata ", "torch.distributed.checkpoint.filesystem "
_SIZE, _BYTES = "torch Size", f"{_META}BytesStorageMetadata"
DTYPES = {f"torch {str(d)[6:]}": d for d in vars(torch).values() if isinstance(d, torch.dtype)}
_NAMES = {
    *(_META + name for name in ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata")),
    *(_META + name for name in ("MetadataIndex", "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    f"{_FILES}_StorageInfo", _SIZE, "torch.serialization _get_layout", *DTYPES,
    "pathlib PosixPath", "pathlib._local PosixPath", "pathlib WindowsPath", "pathlib._local WindowsPath",
}  # fmt: skip
_LARGEST_NOTE = 4096  # bytes of OURS


def sign(folder: Path) -> None:
    """Writes OURS beside `.metadata`: its size and digest."""
    data = (folder / METADATA).read_bytes()
    said = {"format": 2, "metadata_bytes": len(data), "metadata_sha256": hashlib.sha256(data).hexdigest()}
    (folder / OURS).write_text(json.dumps(said) + "\n")


def metadata_of(folder: Path) -> Metadata:
    """Made anew from what was checked. Raises ValueError where `.metadata` is damaged, holds anything but tensors, or
    does not fit the files' sizes; FileNotFoundError where a file that it names is not there."""
    path = folder / METADATA
    data = read_regular(path, WHO)
    signed = _check_digest(folder, data)
    try:
        top = _state(read(data, _NAMES.__contains__), f"{_META}Metadata")
        tensors, places = top["state_dict_metadata"], top["storage_data"]
        _check(type(tensors) is dict and type(places) is dict, "state_dict_metadata and storage_data must be dicts")
        for key, entry in tensors.items():
            if isinstance(entry, Record) and entry.name == _BYTES:
                raise _Pickled(key)
        _check(signed, f"{OURS} must be beside it, got none")
        entries = _entries(tensors, len(data))
        storage = dict(_storage(index, info) for index, info in places.items())
    except _Pickled as error:
        raise fault(
            WHO, path,
            f"must name tensors only, got {shown(error.key, 40)} as a pickle, which could run code: an older "
            "save_checkpoint wrote it; trusted=True reads it",
        ) from None  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        words = (
            str(error)
            if isinstance(error, ValueError)
            else f"its fields must be there, got {type(error).__name__}: {error}"
        )
        raise fault(WHO, path, f"must be undamaged: {words}") from error
    _check_files(folder, entries, storage)
    return Metadata(entries, None, storage, StorageMeta())


class _Pickled(Exception):
    def __init__(self, key: object) -> None:
        super().__init__(key)
        self.key = key


def _check(right: bool, rule: str) -> None:
    if not right:
        raise ValueError(rule)


def _check_digest(folder: Path, data: bytes) -> bool:
    """Whether the folder has OURS. Raises ValueError where it has and `data` is not what was written."""
    path = folder / OURS
    try:
        text = read_regular(path, WHO, _LARGEST_NOTE)
    except FileNotFoundError:
        return False
    try:
        said = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise fault(WHO, path, f"must be JSON, got {type(error).__name__}") from error
    want = {"format": 2, "metadata_bytes": len(data), "metadata_sha256": hashlib.sha256(data).hexdigest()}
    if not isinstance(said, dict) or said.get("format") != 2:
        raise fault(WHO, path, f"must say format 2, got {shown(said)}")
    if said != want:
        raise fault(WHO, folder / METADATA, f"must have the size and the digest that {OURS} says: it is damaged")
    return True


def _state(record: Any, name: str) -> Mapping[str, Any]:
    """The fields of a record, which must be of this name."""
    _check(
        isinstance(record, Record) and record.name == name, f"an entry must be {name.split()[1]}, got {shown(record)}"
    )
    _check(type(record.state) is dict, f"{name.split()[1]} must have fields")
    return record.state


def _whole(value: Any, what: str) -> int:
    _check(
        type(value) is int and 0 <= value < 2**62, f"{what} must be a whole number of at least 0, got {shown(value)}"
    )
    return value


def _size(record: Any, what: str) -> torch.Size:
    fits = isinstance(record, Record) and record.name == _SIZE and len(record.args) <= 1
    _check(fits, f"{what} must be a torch.Size, got {shown(record)}")
    (numbers,) = record.args or ((),)
    _check(type(numbers) in (tuple, list) and len(numbers) <= 64, f"{what} must be a torch.Size")
    return torch.Size([_whole(n, what) for n in numbers])


def _entries(tensors: Mapping[Any, Any], budget: int) -> dict[str, Any]:
    """Checked, and no more of chunks than the file has bytes: one list could stand in many entries."""
    found: dict[str, Any] = {}
    for key, entry in tensors.items():
        _check(type(key) is str, f"keys must be text, got {shown(key)}")
        state = _state(entry, f"{_META}TensorStorageMetadata")
        properties, size, chunks = state["properties"], _size(state["size"], f"size of {key}"), state["chunks"]
        fits = isinstance(properties, Record) and properties.name == f"{_META}TensorProperties"
        _check(fits and type(properties.state) is tuple, f"properties of {shown(key)} must be TensorProperties")
        dtype = properties.state[0] if properties.state else None
        _check(
            isinstance(dtype, Name) and dtype.text in DTYPES,
            f"dtype of {shown(key)} must be torch's, got {shown(dtype)}",
        )
        _check(type(chunks) is list, f"chunks of {shown(key)} must be a list")
        budget -= 1 + len(chunks)
        _check(budget >= 0, "each chunk must be written once")
        pieces = [_chunk(chunk, key) for chunk in chunks]
        inside = all(
            len(p.offsets) == len(p.sizes) == len(size)
            and all(o + s <= n for o, s, n in zip(p.offsets, p.sizes, size, strict=True))
            for p in pieces
        )
        apart = len({p.offsets for p in pieces}) == len(pieces) or not prod(size)
        covered = sum(prod(p.sizes) for p in pieces) == prod(size)
        _check(inside and apart and covered, f"{shown(key)} must have chunks that make up {shown(tuple(size))}")
        found[key] = TensorStorageMetadata(TensorProperties(dtype=DTYPES[cast(Name, dtype).text]), size, pieces)
    return found


def _chunk(record: Any, key: str) -> ChunkStorageMetadata:
    state = _state(record, f"{_META}ChunkStorageMetadata")
    return ChunkStorageMetadata(_size(state["offsets"], f"offsets of {key}"), _size(state["sizes"], f"sizes of {key}"))


def _storage(index: Any, info: Any) -> tuple[MetadataIndex, _StorageInfo]:
    at, place = _state(index, f"{_META}MetadataIndex"), _state(info, f"{_FILES}_StorageInfo")
    key, name = at["fqn"], place["relative_path"]
    _check(type(key) is str, f"fqn must be text, got {shown(key)}")
    fits = type(name) is str and name not in ("", ".", "..") and not {"/", "\\", "\0"} & set(name)
    _check(fits, f"relative_path must be the name of a file in the folder, got {shown(repr(name))}")
    _check(not place.get("transform_descriptors"), "transform_descriptors must not be there")
    offset = None if at.get("offset") is None else _size(at["offset"], f"offset of {key}")
    where = _StorageInfo(name, _whole(place["offset"], "offset"), _whole(place["length"], "length"))
    return MetadataIndex(key, offset), where


def _check_files(
    folder: Path, entries: Mapping[str, TensorStorageMetadata], storage: Mapping[MetadataIndex, _StorageInfo]
) -> None:
    """Each chunk has an entry of a file, large enough for it, inside the file, and shared with no other."""
    path = folder / METADATA
    by_file: dict[str, list[tuple[int, int]]] = {}
    for key, entry in entries.items():
        for chunk in entry.chunks:
            info = storage.get(MetadataIndex(key, chunk.offsets))
            if info is None:
                raise fault(
                    WHO, path, f"must say where {shown(key)} {tuple(chunk.offsets)} is, got no storage_data of it"
                )
            if prod(chunk.sizes) * entry.properties.dtype.itemsize > info.length:
                raise fault(WHO, path, f"must give {shown(key)} room for {tuple(chunk.sizes)}, got {info.length} bytes")
            by_file.setdefault(info.relative_path, []).append((info.offset, info.offset + info.length))
    for name, spans in by_file.items():
        file = open_regular(folder / name, WHO)
        size = os.fstat(file).st_size
        os.close(file)
        spans.sort()
        if spans[-1][1] > size:
            rule = f"must have entries inside the file {shown(name)} of {size} bytes, got {spans[-1]}"
            raise fault(WHO, path, rule)
        for (_, end), (begin, _) in pairwise(spans):
            if begin < end:
                raise fault(WHO, path, f"must have entries that do not overlap, got two at {begin} of {shown(name)}")
