"""A folder with a checkpoint in safetensors files: which tensor lies where. Nothing but headers is read at first."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...placement.careful import Guard, open_regular, opened, without_unknown
from .checksums import Stamp
from .reads import DTYPES, Piece, Reads, bytes_of, most_header, pread_all

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_WHO = "load"
_LARGEST = 2**62
_SAMPLE = 4096  # bytes


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: the file's number, the name that safetensors gives its dtype, its shape, its first byte."""

    file: int
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize


class Checkpoint:
    """The tensors of the checkpoint in `folder`, by key. Close it, or hand its `files` over (`take`).

    Raises OSError where a file is missing or cannot be read; ValueError, in at most 300 characters, where one is not
    what it should be: cut short, of overlapping tensors, without a tensor that the index says it has.
    """

    def __init__(self, folder: str | os.PathLike[str], *, single: str = SINGLE, who: str = _WHO) -> None:
        """`single`: the name of the file where there is no index, for a kind of its own; `who`: the first word of
        errors."""
        self.folder, self._who = Path(folder), who
        self.files: list[tuple[int, Path]] = []
        self.stamps: list[Stamp] = []
        self.tensors: dict[str, Stored] = {}
        self._digest = hashlib.sha256()
        try:
            index = _index(self.folder) if single == SINGLE else None
            for name in sorted(set(index.values())) if index is not None else [single]:
                self._add(self.folder / name)
            for key, name in (index or {}).items():
                stored = self.tensors.get(key)
                if stored is None or self.files[stored.file][1].name != name:
                    rule = f"{key} among others, as {INDEX} says"
                    raise Guard(self.folder / name, _WHO).refusal("tensors", rule, "none")
        except BaseException:
            self.close()
            raise

    def read(self, key: str) -> Tensor:
        """The tensor, in memory of its own."""
        stored = self.tensors[key]
        found = torch.empty(stored.shape, dtype=DTYPES[stored.dtype])
        if stored.nbytes:
            Reads(self.files, ways=1).fill([Piece(memoryview(bytes_of(found)), stored.file, stored.offset)])
        return found

    @property
    def digest(self) -> str:
        """Of names, sizes, headers and 16 samples of each file: another model or revision has another."""
        return self._digest.hexdigest()

    def note(self, said: str) -> None:
        """The digest is also of this."""
        self._digest.update(said.encode())

    def take(self) -> list[tuple[int, Path]]:
        """The open files, which are the caller's from now on."""
        files, self.files = self.files, []
        return files

    def close(self) -> None:
        for handle, _ in self.take():
            os.close(handle)

    def _add(self, path: Path) -> None:
        """One more file."""
        handle = open_regular(path, self._who)
        self.files.append((handle, path))
        self.stamps.append(Stamp.of(handle))
        size = os.fstat(handle).st_size
        guard = Guard(path, self._who)
        length = int.from_bytes(pread_all(handle, 8, 0), "little")
        rule = f"of at most {min(most_header(size), max(0, size - 8)):,} bytes"
        guard.rule(2 <= length <= min(most_header(size), size - 8), "header", rule, f"{length:,}")
        self._digest.update(f"{path.name} {size} ".encode() + pread_all(handle, 8 + length, 0))
        for at in range(8 + length, size, max(_SAMPLE, (size - 8 - length) // 16)):
            self._digest.update(pread_all(handle, min(_SAMPLE, size - at), at))
        with guard.watched("a safetensors file"):
            said = json.loads(pread_all(handle, length, 8))
            guard.rule(isinstance(said, dict), "header", "an object", type(said).__name__)
            said.pop("__metadata__", None)
            spans = []
            for key, about in said.items():
                guard.rule(key not in self.tensors, key, "in one file only", "a second one")
                stored, span = _stored(guard, key, about, len(self.files) - 1, 8 + length)
                self.tensors[key] = stored
                spans.append(span)
        spans = sorted(spans)
        ends = [(0, 0), *spans]
        whole = all(before[1] == after[0] for before, after in pairwise(ends)) and ends[-1][1] == size - 8 - length
        guard.rule(whole, "size", f"{8 + length + ends[-1][1]:,} bytes, with one tensor after the other", f"{size:,}")


def _index(folder: Path) -> dict[str, str] | None:
    """Key -> name of a file; None where one file holds the whole."""
    if not folder.is_dir():
        raise Guard(folder, _WHO).refusal("path", "a folder with config.json and safetensors files", "no folder")
    if not (folder / INDEX).exists():
        return None
    with opened(folder / INDEX, _WHO) as file:
        said = file.json("a JSON index of safetensors files")
        index: Any = said.get("weight_map") if isinstance(said, Mapping) else None
        file.rule(isinstance(index, dict), "weight_map", "an object", index)
        file.rule(bool(index), "weight_map", "of one tensor at least", "none")
        for key, name in index.items():
            plain = isinstance(name, str) and name == os.path.basename(name) and name.endswith(".safetensors")
            file.rule(plain, f"weight_map {key}", "the name of a safetensors file in this folder", name)
        missing = sorted(name for name in set(index.values()) if not (folder / name).exists())
        if missing:
            wanted = len(set(index.values()))
            why = f"load: all {wanted} files of the index must be there, {len(missing)} are missing: {missing[0]}"
            raise FileNotFoundError(errno.ENOENT, why, str(folder))
        return index


def _stored(guard: Guard, key: str, about: Any, file: int, base: int) -> tuple[Stored, tuple[int, int]]:
    """A tensor as the header says it, and its span."""
    about = without_unknown(guard, about, key, {"dtype", "shape", "data_offsets"}, set())
    shape, span = about["shape"], about["data_offsets"]
    for field, numbers, most in (("shape", shape, 8), ("data_offsets", span, 2)):
        fine = isinstance(numbers, list) and len(numbers) <= most
        guard.rule(
            fine and all(type(n) is int and 0 <= n < _LARGEST for n in numbers), f"{field} of {key}",
            "whole numbers of at least 0", numbers,
        )  # fmt: skip
    guard.rule(len(span) == 2 and span[0] <= span[1], f"data_offsets of {key}", "a begin and an end", span)
    known = isinstance(about["dtype"], str) and about["dtype"] in DTYPES
    guard.rule(known, f"dtype of {key}", f"one of {', '.join(DTYPES)}", about["dtype"])
    stored = Stored(file, about["dtype"], tuple(shape), base + span[0])
    fits = stored.nbytes == span[1] - span[0]
    guard.rule(fits, key, f"{stored.nbytes:,} bytes, as its shape {shape} says", f"{span[1] - span[0]:,}")
    return stored, (span[0], span[1])
