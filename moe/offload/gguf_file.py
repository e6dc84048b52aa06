"""GGUF files: what their headers say, and which tensor lies where. Nothing but headers is read at first.

Source: ggml's docs/gguf.md, versions 2 and 3, little-endian. The reader is our own: a file may be a stranger's, and
what its header declares is compared with the bytes that are there before memory or time is spent on it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...placement.careful import Guard, fault, open_regular
from .checksums import Stamp
from .reads import Piece, Reads, bytes_of, pread_all

_WHO = "load"
SUFFIX = ".gguf"
# number of a type in the file -> its name, weights in a block, bytes of a block (enum ggml_type)
TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4),
    27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}  # fmt: skip
SIZES = {name: (weights, nbytes) for name, weights, nbytes in TYPES.values()}
NUMBERS = {name: number for number, (name, _, _) in TYPES.items()}
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LARGEST_HEADER = 64 << 20  # the largest vocabularies and their merges take 15 MB
_LONGEST_LIST = 4096  # numbers of an array that is kept; of a longer one, and of one of text, its length is
_LONGEST_NAME, _LONGEST_TEXT = 256, 8 << 20  # bytes
_MOST_TEXTS = 1 << 21  # of an array; vocabularies have up to 300,000
_NUMBER, _TENSOR = 32, 512  # bytes that Python keeps for one
_LARGEST = 2**62
_WINDOW, _SAMPLE = 1 << 20, 4096  # bytes
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class GgufTensor:
    """A tensor in a file: the file's number, the name of its type, its shape as torch has it, its first byte."""

    file: int
    type: str
    shape: tuple[int, ...]
    offset: int

    @property
    def bytes_shape(self) -> tuple[int, ...]:
        """Its shape as bytes: rows of whole blocks."""
        weights, nbytes = SIZES[self.type]
        return (*self.shape[:-1], self.shape[-1] // weights * nbytes)

    @property
    def nbytes(self) -> int:
        return prod(self.bytes_shape)


class Gguf:
    """The tensors of a GGUF file, or of all files of a model that was split, by name, and the first file's metadata. Of
    an array of text its length is kept. Close it, or hand its `files` over (`take`).

    path   the file, one of the parts of a split one, or a folder with one model in such files

    Raises OSError where a file is missing or cannot be read; ValueError, in at most 300 characters, where one is not
    what it should be: cut short, of overlapping tensors, of another version or order of bytes.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.parts = _parts(Path(path))
        self.path = self.parts[0]
        self.files: list[tuple[int, Path]] = []
        self.stamps: list[Stamp] = []
        self.tensors: dict[str, GgufTensor] = {}
        self.metadata: dict[str, Any] = {}
        self._said: dict[str, tuple[int, int]] = {}
        self._digest = hashlib.sha256()
        try:
            for part in self.parts:
                self._add(part)
        except BaseException:
            self.close()
            raise

    @property
    def architecture(self) -> str:
        found = self.metadata.get("general.architecture")
        guard = Guard(self.path, _WHO)
        guard.rule(isinstance(found, str), "general.architecture", "a name", found)
        return str(found)

    def read(self, name: str, begin: int = 0, end: int | None = None) -> Tensor:
        """Bytes begin .. end of a tensor, as it lies."""
        stored = self.tensors[name]
        found = torch.empty((stored.nbytes if end is None else end) - begin, dtype=torch.uint8)
        if len(found):
            piece = Piece(memoryview(bytes_of(found)), stored.file, stored.offset + begin)
            Reads(self.files, ways=1).fill([piece])
        return found

    def said(self, key: str) -> bytes:
        """A key and its value, as the header has them."""
        begin, end = self._said[key]
        return pread_all(self.files[0][0], end - begin, begin)

    @property
    def digest(self) -> str:
        """Of names, sizes, headers and 16 samples of each file: another model or revision has another."""
        return self._digest.hexdigest()

    def take(self) -> list[tuple[int, Path]]:
        """The open files, which are the caller's from now on."""
        files, self.files = self.files, []
        return files

    def close(self) -> None:
        for handle, _ in self.take():
            os.close(handle)

    def _add(self, path: Path) -> None:
        """One more file."""
        handle = open_regular(path, _WHO)
        self.files.append((handle, path))
        self.stamps.append(Stamp.of(handle))
        size = os.fstat(handle).st_size
        guard = Guard(path, _WHO)
        with guard.watched("a GGUF file"):
            words = _Words(handle, guard, min(size, _LARGEST_HEADER))
            metadata, begin = self._header(words, size)
        if not self.metadata:
            self.metadata = metadata
        self._digest.update(f"{path.name} {size} ".encode())
        for at in range(0, begin, _WINDOW):
            self._digest.update(pread_all(handle, min(_WINDOW, begin - at), at))
        for at in range(begin, size, max(_SAMPLE, (size - begin) // 16)):
            self._digest.update(pread_all(handle, min(_SAMPLE, size - at), at))

    def _header(self, words: _Words, size: int) -> tuple[dict[str, Any], int]:
        """The metadata, and where the tensors' bytes begin; the tensors are added."""
        guard = words.guard
        magic = words.take(4, "magic")
        guard.rule(magic == b"GGUF", "magic", "GGUF", magic)
        version, tensors, keys = words.numbers("IQQ", "header")
        guard.rule(version in (2, 3), "version", "2 or 3, little-endian", version)
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            first, key = words.at, words.text(_LONGEST_NAME, "a key")
            guard.rule(key not in metadata, key, "there once", "a second one")
            metadata[key] = words.value(key)
            if len(self.files) == 1:
                self._said[key] = (first, words.at)
        got = metadata.get("split.no", 0), metadata.get("split.count", 1)
        here = len(self.files) - 1, len(self.parts)
        fine = got == here or (len(self.parts) == 1 and got[1] in (0, 1))
        rule = f"{here[0]} and {here[1]}, as its name says"
        guard.rule(fine, "split.no and split.count", rule, f"{got[0]} and {got[1]}")
        spans = []
        for _ in range(tensors):
            name = words.text(_LONGEST_NAME, "a tensor's name")
            words.spend(_TENSOR, name)
            guard.rule(name not in self.tensors, name, "there once", "a second one")
            self.tensors[name] = stored = _stored(words, name, len(self.files) - 1)
            spans.append((stored.offset, stored.offset + stored.nbytes, name))
        aligned = metadata.get("general.alignment", 32)
        fine = type(aligned) is int and 1 <= aligned <= _WINDOW and not aligned & (aligned - 1)
        guard.rule(fine, "general.alignment", f"a power of two of at most {_WINDOW}", aligned)
        begin, last = -(-words.at // aligned) * aligned, 0
        for start, end, name in sorted(spans):
            guard.rule(start % aligned == 0, f"offset of {name}", f"a multiple of {aligned}", start)
            guard.rule(start >= last, f"offset of {name}", f"at least {last:,}, where another ends", f"{start:,}")
            whole = f"at least {begin + end:,} bytes, for {name}"
            guard.rule(begin + end <= size, "size", whole, f"{size:,}")
            last = end
            there = self.tensors[name]
            self.tensors[name] = GgufTensor(there.file, there.type, there.shape, begin + start)
        return metadata, begin


class _Words:
    """What a header says, one thing after the other, up to byte `end`."""

    def __init__(self, handle: int, guard: Guard, end: int) -> None:
        self.guard, self.at = guard, 0
        self._handle, self._end = handle, end
        self._window, self._first = b"", 0

    def take(self, n: int, field: str) -> bytes:
        self._check(n, field)
        here = self.at - self._first
        if here < 0 or here + n > len(self._window):
            self._window = pread_all(self._handle, min(max(n, _WINDOW), self._end - self.at), self.at)
            self._first, here = self.at, 0
        self.at += n
        return self._window[here : here + n]

    def skip(self, n: int, field: str) -> None:
        self._check(n, field)
        self.at += n

    def _check(self, n: int, field: str) -> None:
        left = self._end - self.at
        self.guard.rule(n <= left, field, f"of at most {left:,} bytes, which are left of the header", f"{n:,}")

    def numbers(self, kinds: str, field: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{kinds}", self.take(struct.calcsize(f"<{kinds}"), field))

    def text(self, most: int, field: str) -> str:
        (n,) = self.numbers("Q", field)
        self.guard.rule(1 <= n <= most or (n == 0 and most == _LONGEST_TEXT), field, f"1 to {most} bytes long", n)
        self.spend(_NUMBER + 4 * n, field)
        return self.take(n, field).decode()

    def spend(self, nbytes: int, field: str) -> None:
        """Counts what is kept in memory."""
        rule = f"small enough for {self.guard.left:,} bytes of memory more"
        self.guard.rule(nbytes <= self.guard.left, field, rule, f"{nbytes:,} bytes")
        self.guard.left -= nbytes

    def value(self, key: str) -> Any:
        """A value of the metadata."""
        (kind,) = self.numbers("I", key)
        if kind in _SCALARS:
            return self.numbers(_SCALARS[kind], key)[0]
        if kind == _STRING:
            return self.text(_LONGEST_TEXT, key)
        self.guard.rule(kind == _ARRAY, f"type of {key}", "one of 0 .. 12", kind)
        kind, n = self.numbers("IQ", key)
        if kind == _STRING:
            self.guard.rule(n <= _MOST_TEXTS, key, f"at most {_MOST_TEXTS:,} texts", f"{n:,}")
            for _ in range(n):
                self.skip(int.from_bytes(self.take(8, key), "little"), key)
            return n
        self.guard.rule(kind in _SCALARS, f"type of the array {key}", "that of numbers or text", kind)
        if n > _LONGEST_LIST:
            self.skip(n * struct.calcsize(f"<{_SCALARS[kind]}"), key)
            return n
        self.spend(n * _NUMBER, key)
        return list(self.numbers(f"{n}{_SCALARS[kind]}", key))


def _stored(words: _Words, name: str, file: int) -> GgufTensor:
    """A tensor as the header says it; its offset is that among the tensors' bytes."""
    guard = words.guard
    (dims,) = words.numbers("I", name)
    guard.rule(1 <= dims <= 4, f"dimensions of {name}", "1 to 4", dims)
    shape = words.numbers(f"{dims}Q", name)[::-1]
    guard.rule(min(shape) >= 1 and prod(shape) < _LARGEST, f"shape of {name}", "of sizes of at least 1", list(shape))
    kind, offset = words.numbers("IQ", name)
    guard.rule(kind in TYPES, f"type of {name}", "one of ggml's that this version knows", kind)
    guard.rule(offset < _LARGEST, f"offset of {name}", f"below {_LARGEST}", offset)
    type, block, _ = TYPES[kind]
    rule = f"a multiple of {block}, for {type}"
    guard.rule(shape[-1] % block == 0, f"columns of {name}", rule, shape[-1])
    return GgufTensor(file, type, tuple(shape), offset)


def gguf_in(path: str | os.PathLike[str]) -> bool:
    """Whether a path means a model in GGUF: a file of that name, or a folder with such files and no safetensors."""
    path = Path(path)
    if not path.is_dir():
        return path.suffix == SUFFIX
    names = os.listdir(path)
    return any(_is_model(n) for n in names) and not any(n.endswith(".safetensors") for n in names)


def first_of(path: str | os.PathLike[str]) -> Path:
    """The file with the metadata: of a folder or a split file's part the first. Raises as `Gguf`."""
    return _parts(Path(path))[0]


def _is_model(name: str) -> bool:
    """Not that of an image encoder, which goes with a model."""
    return name.endswith(SUFFIX) and not name.startswith("mmproj")


def _parts(path: Path) -> list[Path]:
    """All files of the model, in order."""
    if path.is_dir():
        found = sorted(name for name in os.listdir(path) if _is_model(name))
        models = {_PART.sub(r"\1", name) for name in found}
        if len(models) != 1:
            raise fault(_WHO, path, f"must have one model in GGUF files, got {', '.join(found) or 'none'}: name a file")
        path = path / found[0]
    split = _PART.fullmatch(path.name)
    if split is None:
        return [path]
    stem, _, count = split.groups()
    parts = [path.with_name(f"{stem}-{n:05d}-of-{count}.gguf") for n in range(1, int(count) + 1)]
    missing = [part.name for part in parts if not part.exists()]
    if missing or not parts:
        why = f"load: all {count} parts must be there, {len(missing)} are missing: {', '.join(missing[:1])}"
        raise FileNotFoundError(errno.ENOENT, why, str(path))
    return parts
