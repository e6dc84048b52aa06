"""Slots that hold experts as they lie in their files, in whole pages: nothing is copied by a processor.

With the page cache a slot is a map of the file's own pages, which takes the place of the map before it; the system may
take pages back when memory is short, and reads them again. Past the page cache the disk writes into the slot. Either
way an expert begins in its first page where it begins in the file's, so each matrix has a place of its own, and
products take a table of places for each weight (see expert_outputs).
"""

from __future__ import annotations

import ctypes
import errno
import math
import mmap
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...kernels.chip import say_once
from .arena import LARGE, Arena, Layout
from .kinds import Kind, Part
from .reads import Piece, Reads, Run

_PAGE = mmap.PAGESIZE
_POPULATE_READ, _DONTNEED = 22, 4  # of madvise
_FIXED = 0x10  # of mmap: in place of what is there
_MOST_MAPS = 30_000  # of a process: Linux lets it have 65,530
_ROUNDED = 0.01  # of an expert, that its slot may be larger
_WEIGHTS = ("w_gate", "w_up", "w_gate_up", "w_down")
_HALVES = {"w_gate_up": ("w_gate", "w_up")}

Runs = Mapping[str, Sequence[Run]]


class Files(Protocol):
    """A lower tier in files."""

    reads: Reads

    def runs(self, layer: int, expert: int) -> Runs | None:
        """Where the bytes of each part lie, as they are in memory; None where an expert has to be made of them."""

    def check(self, layer: int, expert: int, read: Sequence[Piece]) -> None:
        """Of an expert that was read: raises OSError where it is another than it should be."""


class Matrix(NamedTuple):
    """A weight of an expert in a file."""

    name: str
    file: int
    offset: int
    nbytes: int


def matrices(kind: Kind, runs: Runs | None) -> list[Matrix] | None:
    """The weights of an expert, in the order of its parts; gate and up are two where they lie apart. None where they
    are no whole pieces, or there is more than weights."""
    found = []
    for part in kind.parts:
        pieces = () if runs is None else runs[part.name]
        names = _HALVES.get(part.name, ()) if len(pieces) == 2 else (part.name,)
        alike = len({piece.nbytes for piece in pieces}) == 1
        if part.name not in _WEIGHTS or len(names) != len(pieces) or not alike or part.shape[0] % len(pieces):
            return None
        found += [Matrix(name, *piece) for name, piece in zip(names, pieces, strict=True)]
    return found


class Extent(NamedTuple):
    """Whole pages of a file, `pages` of them from `begin` on, and the matrices in them, by number."""

    file: int
    begin: int
    pages: int
    inside: tuple[int, ...]


def extents(of: Sequence[Matrix]) -> list[Extent]:
    """The pages that matrices lie in, each page once."""
    found: list[Extent] = []
    for m in sorted(range(len(of)), key=lambda m: (of[m].file, of[m].offset)):
        _, file, offset, nbytes = of[m]
        begin, end = offset // _PAGE, -(-(offset + nbytes) // _PAGE)
        if found and found[-1].file == file and begin <= found[-1].begin // _PAGE + found[-1].pages:
            last = found.pop()
            begin, inside = last.begin // _PAGE, (*last.inside, m)
        else:
            inside = (m,)
        found.append(Extent(file, begin * _PAGE, end - begin, inside))
    return found


class Paged:
    """As Arena, for `store` in files. `of[layer][expert]`: its matrices; `pages`: of a slot; places are counted in
    steps of `step` bytes."""

    windows = False

    def __init__(self, kind: Kind, slots: int, store: Files, of: Sequence[Sequence[list[Matrix]]], pages: int) -> None:
        self.kinds, self.device, self.first = (kind,), torch.device("cpu"), [0, slots]
        self.mapped = store.reads.page_cache
        self._store, self._of, self._slot = store, of, pages * _PAGE
        self._extents = [[extents(expert) for expert in layer] for layer in of]
        self.nbytes = slots * self._slot
        self._parts = {m.name: _shape(kind, m) for m in of[0][0]}
        sizes = [m.nbytes for m in of[0][0]]
        self._smallest = min(sizes)
        self.step = math.gcd(_PAGE, *(m.offset for layer in of for expert in layer for m in expert))
        self._places = np.zeros((slots, len(sizes)), np.int64)  # of each slot's matrices, in bytes of the memory
        self._begins = [slot * self._slot for slot in range(slots)]
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        size = self.nbytes + max(sizes)  # views' last places reach further than slots
        self._memory: mmap.mmap | None = mmap.mmap(-1, size, flags=private)
        if not self.mapped:
            with suppress(OSError):  # a kernel without them
                self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = np.frombuffer(self._memory, np.uint8)
        self._buffer, self._address = memoryview(self._bytes.data), self._bytes.ctypes.data
        self._views = self._view() if self.step % kind.parts[0].dtype.itemsize == 0 else {}

    def kind_of(self, _slot: int) -> int:
        return 0

    def nbytes_of(self, _slot: int) -> int:
        return self.kinds[0].nbytes

    def load(self, _store: object, layer: int, expert: int, slot: int) -> None:
        """Brings an expert into a slot. Raises OSError where that cannot be done."""
        memory = self._memory  # stays until this is over
        reads, of, at = self._store.reads, self._of[layer][expert], self._begins[slot]
        reads.check_open()
        if memory is None:
            raise OSError(errno.EBADF, "the slots of offloaded experts are closed", str(reads.paths[0]))
        places = self._places[slot]
        for extent in self._extents[layer][expert]:
            end, there = max(of[m].offset + of[m].nbytes for m in extent.inside), reads.size(extent.file)
            if there < end:  # else what was in the slot, or zeros, would pass for the rest
                said = f"the file ends: {end} bytes wanted, got {there}"
                raise OSError(errno.EIO, said, str(reads.paths[extent.file]))
            if self.mapped:
                self._map(at, extent)
            else:
                size = min(extent.pages * _PAGE, there - extent.begin)
                reads.fill_one(Piece(self._buffer[at : at + size], extent.file, extent.begin))
            for m in extent.inside:
                places[m] = at + of[m].offset - extent.begin
            at += extent.pages * _PAGE
        read = [
            Piece(self._buffer[p : p + m.nbytes], m.file, m.offset) for p, m in zip(places.tolist(), of, strict=True)
        ]
        self._store.check(layer, expert, read)
        del memory

    def move(self, spare: int, slot: int) -> None:
        """What is in a spare slot, to its own: the two change their memory."""
        self._begins[spare], self._begins[slot] = self._begins[slot], self._begins[spare]
        self._places[[spare, slot]] = self._places[[slot, spare]]

    def group(self, slots: Sequence[int], _first: int, _last: int) -> tuple[NDArray[np.int32], dict[str, Tensor]]:
        """(places [weights, n], weights) of the experts in `slots`."""
        return (self._places[slots] // self.step).T.astype(np.int32), self._views

    def _view(self) -> dict[str, Tensor]:
        """Each weight as so many of its shape as there are places: they overlap."""
        views, memory = {}, torch.from_numpy(self._bytes)
        count = (self.nbytes - self._smallest) // self.step + 1
        for name, part in self._parts.items():
            flat = memory[: len(memory) // part.dtype.itemsize * part.dtype.itemsize].view(part.dtype)
            views[name] = flat.as_strided((count, *part.shape), (self.step // part.dtype.itemsize, part.shape[1], 1))
        return views

    def _map(self, at: int, extent: Extent) -> None:
        """The pages of a file in place of what is at `at`, read now: errors are heard here, not as a signal later."""
        address, length = self._address + at, extent.pages * _PAGE
        handle = self._store.reads.handles[extent.file]
        try:
            _call("mmap", address, length, mmap.PROT_READ, mmap.MAP_SHARED | _FIXED, handle, extent.begin)
        except OSError:
            with suppress(OSError):  # no hole, which others might fill
                private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _FIXED
                _call("mmap", address, length, mmap.PROT_READ | mmap.PROT_WRITE, private, -1, 0)
            raise
        self._store.reads.want(extent.file, extent.begin, length)
        try:
            _call("madvise", address, length, _POPULATE_READ)
        except OSError as error:
            if error.errno == errno.EINVAL:  # a kernel before 5.14
                self._bytes[at : at + length : _PAGE].max()
                return
            path = str(self._store.reads.paths[extent.file])
            raise OSError(errno.EIO, f"{length} bytes wanted at offset {extent.begin}: {error}", path) from error

    def close(self) -> None:
        """Lets the memory go, once nobody else holds a tensor of it."""
        self._views, self._bytes, self._memory = {}, np.empty(0, np.uint8), None
        self._buffer = memoryview(b"")


def _shape(kind: Kind, matrix: Matrix) -> Part:
    """A matrix as the part that it is, or is half of."""
    for part in kind.parts:
        if part.name == matrix.name:
            return part
        if matrix.name in _HALVES.get(part.name, ()):
            return Part(matrix.name, (part.shape[0] // 2, *part.shape[1:]), part.dtype)
    raise AssertionError(matrix.name)


def arena_for(store: Any, layout: Layout, device: torch.device, readers: int) -> Arena | Paged:
    """Slots of pages where experts can be computed as they lie in files: on a CPU, whole weights of one kind, large
    enough that rounding to pages is nothing. With verify=True what is computed is to be what was compared: a copy."""
    if device.type == "cpu" and readers and len(layout.kinds) == 1 and hasattr(store, "runs"):
        found = _laid_out(store, layout)
        if found is not None:
            return found
    return Arena(layout.kinds, layout.slots, device)


def _laid_out(store: Any, layout: Layout) -> Paged | None:
    (kind,), (slots,) = layout.kinds, layout.slots
    of: list[list[list[Matrix]]] = []
    names, pages = None, 0
    for i, layer in enumerate(store.layers):
        of.append([])
        for e in range(layer.experts):
            found = matrices(kind, store.runs(i, e))
            if found is None or [m.name for m in found] != (names := names or [m.name for m in found]):
                return None
            of[-1].append(found)
            pages = max(pages, sum(extent.pages for extent in extents(found)))
    if kind.nbytes < LARGE or pages * _PAGE > (1 + _ROUNDED) * kind.nbytes:
        return None
    reads = store.reads
    if reads.page_cache and (why := _why_no_maps(reads, slots * len(of[0][0]))) is not None:
        say_once("offload", why, "copies of what the page cache holds")
        return None
    paged, itemsize = Paged(kind, slots, store, of, pages), kind.parts[0].dtype.itemsize
    if paged.step % itemsize:
        why = f"weights of {itemsize} bytes begin in their files at multiples of {paged.step} bytes"
    elif paged.nbytes // paged.step >= 2**31:
        why = f"weights may begin at {paged.nbytes // paged.step} places, which is more than kernels can count"
    else:
        return paged
    say_once("offload", why, "copies of what the files hold")
    return None


def _why_no_maps(reads: Reads, maps: int) -> str | None:
    if sys.platform != "linux":
        return f"slots are maps of files on Linux only, this is {sys.platform}"
    if maps > _MOST_MAPS:
        return f"{maps} slots' matrices are more maps than a process may have"
    for handle, path in zip(reads.handles, reads.paths, strict=True):
        try:
            mmap.mmap(handle, 1, prot=mmap.PROT_READ).close()
        except (OSError, ValueError) as error:
            return f"{path} cannot be mapped ({error})"
    return None


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p


def _call(name: str, address: int, length: int, *more: int) -> None:
    kinds: Iterator[Any] = iter((ctypes.c_int,) * 3 + (ctypes.c_long,))
    given = [kind(value) for kind, value in zip(kinds, more, strict=False)]
    got = getattr(_libc, name)(ctypes.c_void_p(address), ctypes.c_size_t(length), *given)
    if got in (-1, ctypes.c_void_p(-1).value):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
