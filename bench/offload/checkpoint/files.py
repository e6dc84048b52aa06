"""What of a file is in the page cache, into it and out of it, and how fast the disk is."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

_PAGE = mmap.PAGESIZE
_READ = 8 << 20


def cached_bytes(path: Path) -> int:
    """How much of a file is in the page cache, by mincore, which reads nothing."""
    size = path.stat().st_size
    if not size:
        return 0
    with open(path, "rb") as file, mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as mapped:
        return int((resident(np.frombuffer(mapped, np.uint8)) & 1).sum()) * _PAGE


def resident(memory: np.ndarray) -> np.ndarray:
    """uint8 [pages]: 1 where a page of mapped memory is in the page cache."""
    at, length = memory.ctypes.data, memory.nbytes
    assert at % _PAGE == 0, at
    state = np.zeros(-(-length // _PAGE), np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mincore(ctypes.c_void_p(at), ctypes.c_size_t(length), state.ctypes.data_as(ctypes.c_void_p)):
        raise OSError(ctypes.get_errno(), "mincore")
    return state & 1


def cached_share(paths: Sequence[Path]) -> float:
    """How much of files is in the page cache, from 0 to 1."""
    return min(1.0, sum(map(cached_bytes, paths)) / max(1, sum(path.stat().st_size for path in paths)))


def drop(paths: Sequence[Path]) -> float:
    """Out of the page cache, as far as nobody else uses them; what share stayed."""
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())  # what is not on the disk yet cannot be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return cached_share(paths)


def warm(paths: Sequence[Path]) -> float:
    """Into the page cache, as far as there is room; what share is there."""
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.read(_READ):
                pass
    return cached_share(paths)


def disk_GBps(path: Path, most: int = 1 << 30) -> float:
    """At what rate one reader reads a file from front to back, past the page cache."""
    drop([path])
    begin, got = time.perf_counter(), 0
    with open(path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while got < most and (some := file.read(_READ)):
            got += len(some)
    rate = got / (time.perf_counter() - begin) / 1e9
    drop([path])
    return rate
