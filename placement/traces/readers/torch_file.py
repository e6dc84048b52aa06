"""Tensors out of the files that torch.save writes, as numpy arrays, without torch and without running what they name.

The format (torch 1.6 and later): a zip archive, uncompressed, with NAME/data.pkl, a pickle in which each tensor is a
call of torch._utils._rebuild_tensor_v2 on a storage, and NAME/data/KEY, the bytes of each storage. A pickle may call
anything that it can import: here only the few names that make up tensors mean something, as our own functions, and any
other is refused.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from math import prod
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ...careful import Opened

# torch's storage classes and dtypes -> numpy's; bfloat16 is widened when it is read
TYPES = {
    "Double": "f8", "Float": "f4", "Half": "f2", "BFloat16": "bf16", "Long": "i8", "Int": "i4", "Short": "i2",
    "Char": "i1", "Byte": "u1", "Bool": "?",
}  # fmt: skip
DTYPES = {
    "float64": "f8", "float32": "f4", "float16": "f2", "bfloat16": "bf16", "int64": "i8", "int32": "i4", "int16": "i2",
    "int8": "i1", "uint8": "u1", "uint16": "u2", "uint32": "u4", "uint64": "u8", "bool": "?",
}  # fmt: skip


def load_torch(file: Opened) -> Any:
    """What was saved: dicts, lists, tuples, numbers, text, with every tensor a numpy array (bfloat16 as float32).

    Raises ValueError where the file is no such archive, is damaged, or names anything else than tensors.
    """
    members = file.members("a zip archive, whole, as torch.save writes it")
    pickles = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
    file.rule(len(pickles) == 1, "archive", "holding one data.pkl, as torch.save writes it", len(pickles))
    stored = members[pickles[0]].compress_type == zipfile.ZIP_STORED
    file.rule(stored, "data.pkl", "stored as it is, as torch.save writes it", "compressed")
    with file.watched("as torch.save writes it"):
        text = _read(file, pickles[0])
        _scan(file, text)
        return _Unpickler(io.BytesIO(text), file, members, pickles[0].removesuffix("data.pkl")).load()


def _read(file: Opened, name: str) -> bytes:
    """A member whole."""
    assert file.archive is not None
    file.take(file.archive.getinfo(name).file_size, name)
    return file.archive.read(name)


def _scan(file: Opened, text: bytes) -> None:
    """Refuses what would fill the memory: the C unpickler keeps a table up to the largest number that a PUT names."""
    for count, (code, argument, _) in enumerate(pickletools.genops(text)):
        if "PUT" in code.name and argument is not None:
            file.rule(0 <= int(argument) <= count, "data.pkl", "numbering its objects in order", argument)


class _Storage:
    def __init__(self, kind: str, data: bytes, little: bool) -> None:
        self.kind, self.data, self.little = kind, data, little

    def numbers(self, kind: str) -> NDArray:
        """All of it, not copied; bfloat16 as the whole numbers of its bits."""
        return np.frombuffer(self.data, ("<" if self.little else ">") + ("u2" if kind == "bf16" else kind))


class _Kind:
    """Stands for a storage class or a dtype of torch."""

    def __init__(self, kind: str) -> None:
        self.kind = kind


class _Unpickler(pickle.Unpickler):
    def __init__(self, text: BinaryIO, file: Opened, members: Mapping[str, zipfile.ZipInfo], prefix: str) -> None:
        super().__init__(text)
        self.file, self.members, self.prefix = file, members, prefix
        order = f"{prefix}byteorder"
        self.little = order not in members or _read(file, order) == b"little"
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        kind = name.removesuffix("Storage")
        if module == "torch" and name.endswith("Storage") and kind in TYPES:
            return _Kind(TYPES[kind])
        if module == "torch" and name in DTYPES:
            return _Kind(DTYPES[name])
        allowed = {
            ("torch.storage", "UntypedStorage"): _Kind("u1"),
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_tensor_v3"): self._tensor_v3,
            ("torch._utils", "_rebuild_parameter"): _parameter,
            ("collections", "OrderedDict"): OrderedDict,
        }
        rule = "of tensors and plain Python values only"
        self.file.rule((module, name) in allowed, "data.pkl", rule, f"{module}.{name}")
        return allowed[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        """A storage: ("storage", class, key, location, number of elements)."""
        what, kind, key, _, numel = pid
        fine = what == "storage" and isinstance(kind, _Kind) and type(numel) is int and isinstance(key, str)
        self.file.rule(fine, "a persistent id", "a storage", pid)
        if key not in self.storages:
            name = f"{self.prefix}data/{key}"
            self.file.rule(name in self.members, f"storage {key}", "in the archive", "none")
            info = self.members[name]
            size = numel * (2 if kind.kind == "bf16" else np.dtype(kind.kind).itemsize)
            stored = info.compress_type == zipfile.ZIP_STORED and info.file_size == size
            self.file.rule(stored, f"storage {key}", f"{size} stored bytes", info.file_size)
            self.storages[key] = _Storage(kind.kind, _read(self.file, name), self.little)
        return self.storages[key]

    def _tensor(self, storage: _Storage, offset: int, size: tuple, stride: tuple, *_: Any) -> NDArray:
        return self._view(storage, storage.kind, offset, size, stride)

    def _tensor_v3(
        self, storage: _Storage, offset: int, size: tuple, stride: tuple, grad: bool, hooks: Any, dtype: _Kind, *_: Any
    ) -> NDArray:
        return self._view(storage, dtype.kind, offset, size, stride)

    def _view(
        self, storage: _Storage, kind: str, offset: int, size: tuple[int, ...], stride: tuple[int, ...]
    ) -> NDArray:
        numbers = storage.numbers(kind)
        fits = len(size) == len(stride) and min((offset, *size, *stride)) >= 0 and prod(size) <= len(numbers)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=False))
        inside = fits and not (prod(size) and last >= len(numbers))
        where = f"shape {tuple(size)}, strides {tuple(stride)}, offset {offset}"
        self.file.rule(inside, "a tensor", f"inside its storage of {len(numbers)} elements", where)
        self.file.take(prod(size) * max(4, numbers.itemsize), "a tensor")
        steps = tuple(step * numbers.itemsize for step in stride)
        found = np.lib.stride_tricks.as_strided(numbers[offset:], size, steps, writeable=False)
        if kind == "bf16":  # the upper half of a float32
            return (found.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return found.astype(numbers.dtype.newbyteorder("="))


def _parameter(data: NDArray, *_: Any) -> NDArray:
    return data
