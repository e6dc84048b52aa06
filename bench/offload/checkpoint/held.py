"""A rival that maps its file, held to a memory without a cgroup: between tokens, the pages of the experts that were
used least recently are let go.

This is kinder than the system's own page cache under a limit: it forgets whole experts, exactly the one that was used
least recently, keeps everything else, takes none of the rival's time, and lets a token's own reads go over the limit.
"""

from __future__ import annotations

import ctypes
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .files import cached_bytes

_PAGE = os.sysconf("SC_PAGE_SIZE")
_DONTNEED = 4  # MADV_DONTNEED: of a mapped file, unmaps

Span = tuple[int, int]  # offset in the file, bytes


def spans_of(path: Path, experts: int) -> dict[tuple[int, int], list[Span]]:
    """(layer, expert) -> where its matrices lie in a GGUF file."""
    import gguf

    found: dict[tuple[int, int], list[Span]] = {}
    for tensor in gguf.GGUFReader(path).tensors:
        block, _, name = tensor.name.removeprefix("blk.").partition(".")
        if name.endswith("_exps.weight"):
            each = int(tensor.n_bytes) // experts
            for e in range(experts):
                found.setdefault((int(block), e), []).append((int(tensor.data_offset) + e * each, each))
    return found


@dataclass
class Held:
    """`most_bytes`: of `path`'s experts, `spans`, may stay in memory."""

    path: Path
    spans: Mapping[tuple[int, int], Sequence[Span]]
    most_bytes: int
    _used: OrderedDict[tuple[int, int], int] = field(default_factory=OrderedDict)
    _bytes: int = 0

    def __post_init__(self) -> None:
        self._file = os.open(self.path, os.O_RDONLY)
        for expert in self.spans:
            self._let_go(expert)

    def used(self, ids: NDArray[np.int32]) -> None:
        """Experts [L, K] or [L, T, K] have served a step; the least recently used go."""
        flat = ids.reshape(len(ids), -1)
        for layer, row in enumerate(flat.tolist()):
            for e in dict.fromkeys(row):
                expert = (layer, e)
                if expert in self._used:
                    self._used.move_to_end(expert)
                else:
                    self._used[expert] = sum(n for _, n in self.spans[expert])
                    self._bytes += self._used[expert]
        while self._bytes > self.most_bytes:
            expert, size = self._used.popitem(last=False)
            self._bytes -= size
            self._let_go(expert)

    def over_bytes(self, rest_bytes: int) -> int:
        """What of the file is in memory beyond the rest and the experts that may be."""
        return cached_bytes(self.path) - rest_bytes - self.most_bytes

    def close(self) -> None:
        os.close(self._file)

    def _let_go(self, expert: tuple[int, int]) -> None:
        mapped = _mapped(self.path)
        for offset, size in self.spans[expert]:
            _drop(self._file, mapped, -(-offset // _PAGE) * _PAGE, (offset + size) // _PAGE * _PAGE)


def let_go(path: Path) -> None:
    """A whole file out of this process's maps and of the page cache."""
    file = os.open(path, os.O_RDONLY)
    try:
        _drop(file, _mapped(path), 0, -(-os.fstat(file).st_size // _PAGE) * _PAGE)
    finally:
        os.close(file)


def _drop(file: int, mapped: Sequence[tuple[int, int, int]], begin: int, end: int) -> None:
    """Pages from `begin` to `end` of a file: what is mapped stays in the page cache, so it is unmapped first."""
    libc = ctypes.CDLL(None)
    for start, stop, at in mapped:
        low, high = max(begin, at), min(end, at + stop - start)
        if low < high:
            libc.madvise(ctypes.c_void_p(start + low - at), ctypes.c_size_t(high - low), _DONTNEED)
    if begin < end:
        os.posix_fadvise(file, begin, end - begin, os.POSIX_FADV_DONTNEED)


def _mapped(path: Path) -> list[tuple[int, int, int]]:
    """(first address, last, offset in the file) of a file's maps in this process."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] == str(path.resolve()) and "w" not in fields[1]:
            start, stop = (int(part, 16) for part in fields[0].split("-"))
            found.append((start, stop, int(fields[2], 16)))
    return found
