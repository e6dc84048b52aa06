"""One careful way to read a file that a stranger may have written. Every loader goes through here.

    with opened(path, "Trace") as file:
        arrays = file.npz(required={"expert_ids"}, allowed={"sequence"})
        file.rule(arrays["expert_ids"].ndim == 3, "expert_ids", "[L, T, K]", arrays["expert_ids"].shape)

What comes out is plain: numbers, text, lists, dicts, numpy arrays. Nothing that a file names is executed. A size that a
file declares is compared with the bytes that are there before memory is taken. All memory is counted: a file may fill
`max_bytes`, by default four times its own size or 64 MB, whichever is larger. Whatever goes wrong is one ValueError of
at most 300 characters that names file, field, rule and value; a file that is missing, or may not be read, is OSError.
"""

from __future__ import annotations

import errno
import json
import os
import reprlib
import stat
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

SMALL_bytes = 64 << 20  # that any file may fill
TIMES = 4  # as much as itself
RATIO = 1032  # deflate compresses no better
LONGEST = 300  # characters of an error
_BLOCK = 1 << 18
_LARGEST_YAML = 4 << 20


class Refused(ValueError):
    """The error of every loader: its text names file, field, rule and value."""


class Missing(RuntimeError):
    """A package that a kind of file needs is not installed."""


@dataclass(eq=False)
class Guard:
    """A file, or a folder, that is being read: its rules, and the memory that it may still fill.

    path, what     which, and who reads: the first word of its errors
    left           bytes
    """

    path: Path
    what: str
    left: int = SMALL_bytes

    def rule(self, holds: bool | np.bool_, field: str, rule: str, value: object) -> None:
        if not holds:
            raise self.refusal(field, rule, value)

    def refusal(self, field: str, rule: str, value: object) -> Refused:
        whole = f"{self.what}: {_cut(field, 80)} of {self._name} must be {_cut(rule, 120)}, got {shown(value, 160)}"
        return Refused(_cut(whole, LONGEST))

    def damaged(self, kind: str, error: object, field: str = "") -> Refused:
        """That the file, or a field of it, is not what it should be, as somebody else's parser says it."""
        where = f"{_cut(field, 80)} of {self._name}" if field else self._name
        text = shown(error, 160) or type(error).__name__
        return Refused(_cut(f"{self.what}: {where} must be {_cut(kind, 120)}, got {text}", LONGEST))

    @property
    def _name(self) -> str:
        name = str(self.path)
        return name if len(name) <= 120 else f"...{name[-116:]}"

    def take(self, nbytes: int, field: str) -> None:
        """Counts memory before it is taken."""
        if nbytes > self.left:
            rule = f"small enough for {self.left:,} bytes more (max_bytes= allows more)"
            raise self.refusal(field, rule, f"{nbytes:,} bytes")
        self.left -= nbytes

    @contextmanager
    def watched(self, kind: str = "a whole file of its kind", field: str = "") -> Iterator[None]:
        """Whatever leaks out of a parser becomes the one error."""
        try:
            yield
        except (Refused, Missing):
            raise
        except OSError as error:
            if error.errno not in (None, errno.EINVAL, errno.EOVERFLOW):  # the disk's fault, not the file's
                raise
            raise self.damaged(kind, error, field) from error
        except Exception as error:
            raise self.damaged(kind, error, field) from error

    def integers(self, value: object, field: str, *, shape: tuple[int | None, ...], low: int, high: int) -> NDArray:
        """int64 of such a shape (None: any size), every number in low .. high. Compiled code may index by it."""
        found = np.asarray(value)
        self.rule(found.dtype.kind in "iu", field, "whole numbers", found.dtype)
        self._shape(found, field, shape)
        if found.size:
            least, most = int(found.min()), int(found.max())
            rule = str(low) if low == high else f"in {low} .. {high}"
            self.rule(low <= least and most <= high, field, rule, least if least < low else most)
        return found.astype(np.int64, order="C")

    def numbers(self, value: object, field: str, *, shape: tuple[int | None, ...], dtype: type) -> NDArray:
        """Fractions of such a shape and exactly such a type, finite."""
        found = np.asarray(value)
        self.rule(found.dtype == dtype, field, str(np.dtype(dtype)), found.dtype)
        self._shape(found, field, shape)
        self.rule(np.isfinite(found).all(), field, "finite", "NaN or Inf")
        return found.astype(dtype, order="C", copy=False)  # compiled code would be compiled for another order

    def _shape(self, found: NDArray, field: str, shape: tuple[int | None, ...]) -> None:
        fits = found.ndim == len(shape) and all(w in (None, n) for n, w in zip(found.shape, shape, strict=True))
        self.rule(fits, field, f"of shape {['any' if n is None else n for n in shape]}", list(found.shape))


@dataclass(eq=False)
class Opened(Guard):
    """A regular file, open: `size` bytes in `stream`."""

    stream: BinaryIO = None  # type: ignore[assignment]
    size: int = 0
    archive: zipfile.ZipFile | None = field(default=None, repr=False)

    def close(self) -> None:
        self.stream.close()

    # --- text ---

    def _bytes(self) -> bytes:
        self.rule(self.size <= max(self.left, self.size // TIMES), "size", f"at most {self.left:,} bytes", self.size)
        self.stream.seek(0)
        return self.stream.read(self.size + 1)[: self.size]

    def text(self) -> str:
        """All of it, UTF-8."""
        data = self._bytes()
        with self.watched("UTF-8 text"):
            return data.decode()

    def lines(self, errors: str = "strict") -> Iterator[str]:
        """Line by line, without the ends of lines."""
        with self.watched("UTF-8 text"):
            self.stream.seek(0)
            for line in self.stream:
                yield line.decode("utf-8", errors).rstrip("\r\n")

    def json(self, kind: str = "JSON") -> Any:
        """`kind`: what the file is, for errors."""
        data = self._bytes()
        with self.watched(kind):
            return json.loads(data)  # UTF-8, -16 or -32, with or without a mark of the order of bytes

    def yaml(self) -> Any:
        """Plain values only. A key stands once; no alias (a few bytes of them can stand for terabytes)."""
        import yaml

        self.rule(self.size <= _LARGEST_YAML, "size", f"at most {_LARGEST_YAML:,} bytes", self.size)
        text = self.text()
        with self.watched("YAML of plain values"):
            if "*" in text:  # an alias, or a comment
                aliases = [token.value for token in yaml.scan(text, _loader()) if isinstance(token, yaml.AliasToken)]
                self.rule(not aliases, "text", "YAML without aliases", aliases[:1])
            return yaml.load(text, _loader())

    def table(self, names: tuple[str, ...], columns: tuple[int, ...], skip: int = 0) -> NDArray[np.int64]:
        """Whole numbers, not negative, of a CSV: [rows, columns]. `names`: what a row holds, for errors."""
        lines = self.lines()
        self.rule(any(line.strip() for line in islice(lines, skip, None)), "rows", "at least one", 0)
        with self.watched("whole numbers", f"rows {','.join(names)}"):
            self.stream.seek(0)
            rows = np.loadtxt(
                self.stream, np.int64, comments=None, delimiter=",", skiprows=skip, usecols=columns, ndmin=2,
                encoding="utf-8",
            )  # fmt: skip
        for name, column in zip(names, rows.T, strict=False):
            self.rule(int(column.min()) >= 0, name, "not negative", int(column.min()))
        return rows

    # --- numpy ---

    def npy(self) -> NDArray:
        with self.watched("an .npy array"):
            self.stream.seek(0)
            shape, fortran, dtype = header(self, self.stream, "array", self.size)
            return self._array(self.stream, "array", shape, fortran, dtype)

    def names(self, required: Iterable[str] = (), allowed: Iterable[str] | None = None) -> dict[str, zipfile.ZipInfo]:
        """The arrays of an .npz file. `allowed`: what may stand there besides; None: anything. Any other is refused,
        for a damaged name would drop its array in silence."""
        needed = set(required)
        names = {name.removesuffix(".npy"): info for name, info in self.members("a whole .npz file").items()}
        self.rule(needed <= names.keys(), "arrays", f"at least {', '.join(sorted(needed))}", sorted(names))
        if allowed is not None:
            known = needed | set(allowed)
            odd = sorted(names.keys() - known)
            self.rule(not odd, "arrays", f"none but {', '.join(sorted(known))}", odd)
        return names

    def npz(
        self, required: Iterable[str] = (), allowed: Iterable[str] | None = None, *, only: str | None = None
    ) -> dict[str, NDArray]:
        """name -> array; see `names`. `only`: the one array that is read, where there is one of this name."""
        names = self.names(required, allowed)
        assert self.archive is not None
        found = {}
        for name, info in names.items():
            if only in names and name != only:
                continue
            with self.watched("a whole array of numbers or text", name), self.archive.open(info) as stream:
                shape, fortran, dtype = header(self, stream, name, info.file_size)
                found[name] = self._array(stream, name, shape, fortran, dtype)
        return found

    def _array(self, stream: Any, name: str, shape: tuple[int, ...], fortran: bool, dtype: np.dtype) -> NDArray:
        """The bytes after a header that was checked."""
        size = prod(shape) * dtype.itemsize
        self.take(size, name)
        flat = np.empty(size, np.uint8)
        at = 0
        while at < size:
            block = stream.read(min(_BLOCK, size - at))
            if not block:
                raise EOFError(f"{name} to end after {at} of {size} bytes")
            flat[at : at + len(block)] = np.frombuffer(block, np.uint8)
            at += len(block)
        if stream.read(1):  # at the end of a member its checksum is compared
            raise ValueError(f"more bytes than {name} declares")
        found = flat.view(dtype) if size else np.empty(0, dtype)
        found = found.reshape(shape[::-1]).T if fortran else found.reshape(shape)
        return found.astype(dtype.newbyteorder("="), copy=False)

    # --- archives ---

    def members(self, kind: str) -> Mapping[str, zipfile.ZipInfo]:
        """A zip archive's members by name: once each, stored or deflated, none larger than its bytes can hold. `kind`:
        what the archive is, for errors."""
        with self.watched(kind):
            self.archive = zipfile.ZipFile(self.stream)
            found = self.archive.infolist()
            by_name = {info.filename: info for info in found}
            self.rule(len(found) == self._declared(), "directory", f"{self._declared()} members long", len(found))
            self.rule(len(by_name) == len(found), "members", "of different names", sorted(by_name))
            for name, info in by_name.items():
                stored = info.compress_type == zipfile.ZIP_STORED
                fine = (stored or info.compress_type == zipfile.ZIP_DEFLATED) and not info.flag_bits & 1
                self.rule(fine, name, "stored or deflated, not encrypted", info.compress_type)
                most = info.compress_size * (1 if stored else RATIO)
                rule = f"no more than {info.compress_size} stored bytes can hold"
                self.rule(info.compress_size <= self.size and info.file_size <= most, name, rule, info.file_size)
        return by_name

    def _declared(self) -> int:
        """How many members the end of the archive declares."""
        tail = min(self.size, 65557)
        self.stream.seek(self.size - tail)
        end = self.stream.read(tail)
        at = end.rfind(b"PK\5\6")
        count = int.from_bytes(end[at + 10 : at + 12], "little")
        wide = end.rfind(b"PK\6\6", 0, at)
        return int.from_bytes(end[wide + 32 : wide + 40], "little") if count == 0xFFFF and wide >= 0 else count


@contextmanager
def opened(path: str | os.PathLike[str], what: str, max_bytes: int | None = None) -> Iterator[Opened]:
    """The file at `path`, for the length of a `with`. `what`: who reads, the first word of errors.

    Raises OSError where it is missing or may not be read, ValueError where it is no regular file (a pipe would wait for
    ever) or where the content is refused.
    """
    file = open_file(path, what, max_bytes)
    try:
        with file.watched():
            yield file
    finally:
        file.close()


def open_file(path: str | os.PathLike[str], what: str, max_bytes: int | None = None) -> Opened:
    """`opened` for who keeps the file open; close it."""
    handle = open_regular(path, what)
    size = os.fstat(handle).st_size
    left = max(TIMES * size, SMALL_bytes) if max_bytes is None else max_bytes
    return Opened(Path(path), what, left, os.fdopen(handle, "rb"), size)


def open_regular(path: str | os.PathLike[str], what: str) -> int:
    """The file, open for reading. Raises OSError, and ValueError at once where it is a pipe, a device or a folder."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would wait for its writer
    except ValueError as error:  # a NUL in the name
        raise fault(what, "path", f"must be a file's name, got {error}") from error
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, a device or a socket"
        raise fault(what, path, f"must be a regular file, got {kind}")
    os.set_blocking(handle, True)
    return handle


def read_regular(path: str | os.PathLike[str], what: str, most: int | None = None) -> bytes:
    """All of the file. Raises as open_regular, and ValueError where it has more than `most` bytes."""
    with open(open_regular(path, what), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if most is not None and size > most:
            raise fault(what, path, f"must have at most {most} bytes, got {size}")
        return file.read()


def folder(path: Path, what: str, files: Iterable[Path], max_bytes: int | None = None) -> Guard:
    """The guard of several files that are read together."""
    size = sum(file.stat().st_size for file in files)
    return Guard(path, what, max(TIMES * size, SMALL_bytes) if max_bytes is None else max_bytes)


def header(guard: Guard, stream: Any, name: str, size: int) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, whether in Fortran's order, dtype) of an .npy array of `size` bytes in all; `stream` stands behind it."""
    version = np.lib.format.read_magic(stream)
    guard.rule(version in ((1, 0), (2, 0)), name, ".npy version 1.0 or 2.0", version)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    guard.rule(all(type(n) is int and n >= 0 for n in shape), name, "of whole sizes", shape)
    guard.rule(dtype.kind in "biufU" and dtype.shape == (), name, "numbers or text", dtype)
    declared, there = stream.tell() + prod(shape) * dtype.itemsize, size
    guard.rule(declared == there, name, f"{declared} bytes, as its shape {shape} says", there)
    return shape, fortran, dtype


def without_unknown(guard: Guard, found: Any, field: str, required: Set[str], allowed: Set[str]) -> dict[str, Any]:
    """A JSON object with exactly such names."""
    guard.rule(isinstance(found, dict), field, "an object", type(found).__name__)
    guard.rule(required <= found.keys(), field, f"an object with {', '.join(sorted(required))}", sorted(found))
    odd = sorted(found.keys() - required - allowed)
    guard.rule(not odd, field, f"an object of {', '.join(sorted(required | allowed))} only", odd)
    return found


def whole(guard: Guard, value: Any, field: str, low: int, high: int) -> int:
    """A whole number of JSON, in low .. high: neither `true` nor 8.0."""
    guard.rule(type(value) is int and low <= value <= high, field, f"a whole number in {low} .. {high}", value)
    return value


def shown(value: object, most: int = 60) -> str:
    """A value as errors show it: in one short line that any terminal takes."""
    if isinstance(value, np.ndarray):
        value = value.tolist() if value.size < 9 else f"{value.dtype} {list(value.shape)}"
    if isinstance(value, str | BaseException):
        text = " ".join(str(value)[:1000].split())
    elif isinstance(value, int) and value.bit_length() > 128:  # Python writes no number of more than 4300 digits
        text = f"a number of {value.bit_length()} bits"
    else:
        text = str(value) if isinstance(value, int | float | np.generic | np.dtype) else _REPR.repr(value)
    return _cut("".join(c if c.isprintable() else "?" for c in text), most)


_REPR = reprlib.Repr()
_REPR.maxother = _REPR.maxstring = 80


def fault(what: str, path: str | os.PathLike[str], rule: str) -> Refused:
    """The error of a loader with rules of its own: `what: path rule`, in one line."""
    rule = shown(rule, 190)
    name, room = str(path), LONGEST - len(f"{what}: ... {rule}")
    return Refused(f"{what}: {name if len(name) <= room else '...' + name[-room:]} {rule}")


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _loader() -> Any:
    """PyYAML's safe loader (in C where it was built so), which takes no key twice."""
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> dict:
            found = super().construct_mapping(node, deep)
            if len(found) != len(node.value):
                raise ValueError("a key that stands twice")
            return found

    return Loader
