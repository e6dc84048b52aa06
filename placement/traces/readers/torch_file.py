"""Tensors out of the files that torch.save writes, as numpy arrays, without torch and without running what they name.

The format (torch 1.6 and later): a zip archive, uncompressed, with NAME/data.pkl, a pickle in which each tensor is a
call of torch._utils._rebuild_tensor_v2 on a storage, and NAME/data/KEY, the bytes of each storage. A pickle may call
anything that it can import: here only the few names that make up tensors mean something, as our own functions, and any
other is refused.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# torch's storage classes and dtypes -> numpy's; bfloat16 is widened when it is read
TYPES = {
    "Double": "f8", "Float": "f4", "Half": "f2", "BFloat16": "bf16", "Long": "i8", "Int": "i4", "Short": "i2",
    "Char": "i1", "Byte": "u1", "Bool": "?",
}  # fmt: skip
DTYPES = {
    "float64": "f8", "float32": "f4", "float16": "f2", "bfloat16": "bf16", "int64": "i8", "int32": "i4", "int16": "i2",
    "int8": "i1", "uint8": "u1", "uint16": "u2", "uint32": "u4", "uint64": "u8", "bool": "?",
}  # fmt: skip


def load_torch(path: str | Path) -> Any:
    """What was saved: dicts, lists, tuples, numbers, text, with every tensor a numpy array (bfloat16 as float32).

    Raises FileNotFoundError, or ValueError where the file is no such archive, is damaged, or names anything else than
    tensors.
    """
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"torch file: {path} must be a zip archive as torch.save writes it, got {error}") from error
    with archive:
        pickles = [name for name in archive.namelist() if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"torch file: {path} must hold one data.pkl, got {len(pickles)}")
        try:
            with archive.open(pickles[0]) as file:
                return _Unpickler(file, archive, pickles[0].removesuffix("data.pkl"), str(path)).load()
        except (pickle.UnpicklingError, EOFError, KeyError, IndexError, AttributeError, TypeError) as error:
            raise ValueError(f"torch file: {path} must be as torch.save writes it, got {error}") from error
        except (zipfile.BadZipFile, UnicodeDecodeError, OverflowError, MemoryError) as error:
            raise ValueError(f"torch file: {path} must be whole, got {error}") from error


class _Storage:
    def __init__(self, kind: str, data: bytes, little: bool) -> None:
        self.kind, self.data, self.little = kind, data, little

    def numbers(self, kind: str) -> NDArray:
        order = "<" if self.little else ">"
        if kind == "bf16":  # the upper half of a float32
            halves = np.frombuffer(self.data, order + "u2").astype(np.uint32)
            return (halves << np.uint32(16)).view(np.float32)
        found = np.frombuffer(self.data, order + kind)
        return found.astype(found.dtype.newbyteorder("="), copy=False)


class _Kind:
    """Stands for a storage class or a dtype of torch."""

    def __init__(self, kind: str) -> None:
        self.kind = kind


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, archive: zipfile.ZipFile, prefix: str, path: str) -> None:
        super().__init__(file)
        self.archive, self.prefix, self.path = archive, prefix, path
        names = archive.namelist()
        self.little = f"{prefix}byteorder" not in names or archive.read(f"{prefix}byteorder") == b"little"
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
        if (module, name) not in allowed:
            raise ValueError(
                f"torch file: {self.path} must hold tensors and plain Python values only, got {module}.{name}"
            )
        return allowed[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        """A storage: ("storage", class, key, location, number of elements)."""
        what, kind, key, _, numel = pid
        if what != "storage" or not isinstance(kind, _Kind) or not isinstance(numel, int):
            raise ValueError(f"torch file: a persistent id of {self.path} must be a storage, got {what}")
        if key not in self.storages:
            info = self.archive.getinfo(f"{self.prefix}data/{key}")
            size = numel * (2 if kind.kind == "bf16" else np.dtype(kind.kind).itemsize)
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != size:
                raise ValueError(
                    f"torch file: storage {key} of {self.path} must be {size} stored bytes, got {info.file_size}"
                )
            self.storages[key] = _Storage(kind.kind, self.archive.read(info), self.little)
        return self.storages[key]

    def _tensor(self, storage: _Storage, offset: int, size: tuple, stride: tuple, *_: Any) -> NDArray:
        return self._view(storage.numbers(storage.kind), offset, size, stride)

    def _tensor_v3(
        self, storage: _Storage, offset: int, size: tuple, stride: tuple, grad: bool, hooks: Any, dtype: _Kind, *_: Any
    ) -> NDArray:
        return self._view(storage.numbers(dtype.kind), offset, size, stride)

    def _view(self, numbers: NDArray, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> NDArray:
        count = prod([int(n) for n in size])
        fits = len(size) == len(stride) and min((offset, *size, *stride)) >= 0 and count <= len(numbers)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=False))
        if not fits or (count and last >= len(numbers)):
            raise ValueError(
                f"torch file: a tensor of {self.path} must lie inside its storage of {len(numbers)} elements, "
                f"got shape {tuple(size)}, strides {tuple(stride)}, offset {offset}"
            )
        steps = tuple(step * numbers.itemsize for step in stride)
        return np.lib.stride_tricks.as_strided(numbers[offset:], size, steps, writeable=False).copy()


def _parameter(data: NDArray, *_: Any) -> NDArray:
    return data
