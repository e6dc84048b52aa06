"""Bytes of open files into experts' parts: in several requests at once, with the kernel's copy or without it."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .host import fill
from .kinds import Kind

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAME = "/proc/self/fd/{}"  # of a file that is open, on Linux
_PAGE = 4096
_PIECE = 1 << 18  # bytes of one request, at least
_BUFFER = 1 << 19  # bytes of a buffer of whole pages: what a processor's own cache holds
_LARGEST_HEADER = 100_000_000  # safetensors' own limit
_SMALL_HEADER = 4 << 20  # as large a header may be in any file; reading it takes up to 35 times as much memory
_SHARE = 8  # of a larger file, the header may be one part in so many


class Run(NamedTuple):
    """Bytes of a file, one after the other."""

    file: int
    offset: int
    nbytes: int


class Piece(NamedTuple):
    """Memory to fill, and from where: the number of a file, and an offset in it."""

    data: memoryview
    file: int
    offset: int


class Reads:
    """Open `files`, (handle, path) each, which are taken over.

    `page_cache=False`: the kernel keeps no copy of what was read (O_DIRECT where the file system has it: straight into
    place where offset, size and memory allow it, else by a buffer of whole pages; without it pages are let go after
    each read, which takes ten times the processor time). `ways`: an expert is read in so many pieces at once.
    """

    def __init__(self, files: Sequence[tuple[int, Path]], *, page_cache: bool = True, ways: int = 4) -> None:
        self.page_cache, self._ways = page_cache, ways
        self.paths = [path for _, path in files]
        self.handles = [handle for handle, _ in files]
        self.direct = [-1] * len(files)
        self._staging = threading.local()
        self._pool = ThreadPoolExecutor(ways - 1, "headgate-file") if ways > 1 else None
        if not page_cache and hasattr(os, "O_DIRECT"):
            try:
                self.direct = [_direct(handle, path) for handle, path in files]
            except BaseException:
                self.close()
                raise

    def check_open(self) -> None:
        if self.handles[0] < 0:
            raise OSError(errno.EBADF, "the file of offloaded experts is closed", str(self.paths[0]))

    @contextmanager
    def staged(self, kind: Kind, into: Mapping[str, Tensor]) -> Iterator[Mapping[str, Tensor]]:
        """Where an expert's parts can be read to: `into` itself, or, for a CUDA device, a page-locked buffer of this
        thread's own, which is copied at the end."""
        if all(t.device.type == "cpu" and t.is_contiguous() for t in into.values()):
            yield into
            return
        parts = self._buffer(kind)
        yield parts
        fill(into, parts)

    def fill(self, wanted: Sequence[Piece]) -> None:
        """Fills each buffer from its offset, in pieces that are read at once: a disk wants several requests to be fast,
        and an expert that is waited for should not share it with one that is not."""
        total = sum(len(data) for data, _, _ in wanted)
        if self._pool is None or total < 2 * _PIECE:
            for piece in wanted:
                self._fill(piece)
            return
        size = max(_PIECE, -(-total // (self._ways * _PAGE)) * _PAGE)
        pieces = [
            Piece(data[at : at + size], file, offset + at)
            for data, file, offset in wanted
            for at in range(0, len(data), size)
        ]
        others = [self._pool.submit(self._fill, piece) for piece in pieces[1:]]
        try:
            self._fill(pieces[0])
        finally:
            wait(others)  # nobody writes into the buffers when this has returned
        for other in others:
            other.result()

    def fill_one(self, piece: Piece) -> None:
        """The same in one request, which costs least, and is fast where it is large."""
        self._fill(piece)

    def size(self, file: int) -> int:
        """Bytes of a file."""
        return os.fstat(self.handles[file]).st_size

    def want(self, file: int, offset: int, nbytes: int) -> None:
        """Has the system begin to read into the page cache, where first, middle and last page are not there already: to
        ask for all pages takes as long as to map them."""
        try:
            for at in (offset, offset + nbytes // 2, offset + nbytes - _PAGE):
                os.preadv(self.handles[file], [bytearray(1)], at, os.RWF_NOWAIT)
        except (OSError, AttributeError):  # not there, or a file system that does not say
            os.posix_fadvise(self.handles[file], offset, nbytes, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
        for handle in (*self.handles, *self.direct):
            if handle >= 0:
                os.close(handle)
        self.handles = self.direct = [-1] * len(self.paths)

    def _buffer(self, kind: Kind) -> Mapping[str, Tensor]:
        made = self._staging.__dict__.setdefault("parts", {})
        if kind not in made:
            pin = torch.cuda.is_available()
            made[kind] = {p.name: torch.empty(p.shape, dtype=p.dtype, pin_memory=pin) for p in kind.parts}
        return made[kind]

    def _fill(self, piece: Piece) -> None:
        """Reads until the piece is full: a read may be short."""
        data, file, offset = piece
        at = np.frombuffer(data, np.uint8).ctypes.data
        handle, direct = self.handles[file], self.direct[file]
        whole = direct >= 0 and not (offset % _PAGE or len(data) % _PAGE or at % _PAGE)
        got = 0 if whole or direct < 0 else self._fill_by_pages(piece)
        kept = False
        while got < len(data):
            past = whole and got % _PAGE == 0
            n = os.preadv(direct if past else handle, [data[got:]], offset + got)
            if not n:
                raise OSError(
                    errno.EIO,
                    f"the file ends: {len(data)} bytes wanted at offset {offset}, got {got}",
                    str(self.paths[file]),
                )
            got, kept = got + n, kept or not past
        if kept and not self.page_cache:
            os.posix_fadvise(handle, offset, len(data), os.POSIX_FADV_DONTNEED)

    def _fill_by_pages(self, piece: Piece) -> int:
        """Reads the pages that a piece lies in, past the page cache, into a buffer of this thread's own, and copies.
        Returns how many bytes came before a read was short: all of them, or the others are to be read otherwise."""
        data, file, offset = piece
        into, end, at = np.frombuffer(data, np.uint8), offset + len(data), offset
        if not hasattr(self._staging, "pages"):
            self._staging.pages = mmap.mmap(-1, _BUFFER)  # begins with a page
        pages = memoryview(self._staging.pages)
        while at < end:
            begin = at // _PAGE * _PAGE
            wanted = min(_BUFFER, -(-(end - begin) // _PAGE) * _PAGE)
            n = os.preadv(self.direct[file], [pages[:wanted]], begin)
            until = min(end, begin + n)
            if until > at:
                np.copyto(
                    into[at - offset : until - offset], np.frombuffer(pages, np.uint8)[at - begin : until - begin]
                )
                at = until
            if n < wanted:
                break
        return at - offset


def bytes_of(t: Tensor) -> Any:
    """A contiguous CPU tensor's memory, as a buffer."""
    return t.reshape(-1).view(torch.uint8).numpy()


def most_header(size: int) -> int:
    """Bytes that the safetensors header of a file of `size` bytes may have."""
    return min(_LARGEST_HEADER, max(_SMALL_HEADER, size // _SHARE))


def pread_all(file: int, length: int, offset: int) -> bytes:
    """`length` bytes, or fewer where the file ends."""
    got = b""
    while len(got) < length and (more := os.pread(file, length - len(got), offset + len(got))):
        got += more
    return got


def _direct(handle: int, path: Path) -> int:
    """The same file once more, for reads that pass by the page cache; -1 where its file system has none."""
    name = NAME.format(handle)
    try:
        return os.open(name if os.path.exists(name) else path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return -1
