"""The lower tier on disk: one safetensors file, read expert by expert.

Each part of a group of experts is one tensor [n, ...], called by the path of the experts' module and the part's name;
a layer's second group adds #1, and so on. `__metadata__` says which experts the groups are, and has a checksum (CRC-32)
for each. Nothing is mapped: what is read is in the reader's memory, and nowhere else in the process.
"""

from __future__ import annotations

import errno
import json
import os
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ...placement.careful import fault, open_regular, shown
from ...placement.files import write_whole
from .checksums import Checksums, Verify, check_verify
from .host import parts_of, plain
from .kinds import Kind, Layer, Part, Weights
from .reads import DTYPES, NAME, Piece, Reads, Run, bytes_of, most_header, pread_all

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PAGE = 4096
_LARGEST_SIZE = 2**62
_WHO = "FileStore"


class _Map:
    """A read-only map, for torch, which knows no tensor that is read-only and warns of it."""

    def __init__(self, data: np.memmap) -> None:
        self._data = data
        self.__array_interface__ = {**data.__array_interface__, "data": (data.ctypes.data, False)}


class FileStore:
    """The experts of a file that `FileStore.write` wrote. `layers`: what must be in it (None: whatever is).

    `source`: what it must have been written from (None: anything), as `write` was told.
    `verify`: an expert's checksum is compared when it is read for the "first" time, at each read (True) or never.
    `page_cache=False`: the kernel keeps no copy of what was read (O_DIRECT where the file system, offsets and sizes
    allow it; otherwise pages are let go after each read). `ways`: an expert is read in so many pieces at once.
    `opened`: the file, opened already, which is taken over.

    Raises OSError where the file cannot be read; ValueError, in at most 300 characters, where it is not such a file, is
    cut short, or holds other experts than `layers`. What its header says is compared with the file's size first.
    """

    def __init__(
        self,
        path: str | Path,
        layers: Sequence[Layer] | None = None,
        *,
        source: str | None = None,
        verify: Verify = "first",
        page_cache: bool = True,
        ways: int = 4,
        opened: int | None = None,
    ) -> None:
        if ways < 1:
            raise ValueError(f"FileStore: ways must be at least 1, got {ways}")
        check_verify(verify, "FileStore")
        self.path = Path(path)
        file = open_regular(self.path, _WHO) if opened is None else opened
        self.reads = Reads([(file, self.path)], page_cache=page_cache, ways=ways)
        try:
            self.layers, self._offsets, sums, wrote = _open(file, self.path)
            self._sums = Checksums(verify, self.layers, sums)
            if layers is not None:
                _compare(self.path, self.layers, layers)
            if source not in (None, wrote):
                rule = "must hold the experts of this very checkpoint and formats, got another's: remove it or choose "
                raise fault(_WHO, self.path, rule + "another folder")
        except BaseException:
            self.close()
            raise

    @classmethod
    def write(
        cls,
        path: str | Path,
        layers: Sequence[Layer],
        weights: Callable[[int], Sequence[Weights]],
        *,
        source: str = "",
        **options: Any,
    ) -> FileStore:
        """As `write_each`, layer by layer: `weights(i)` gives the weights of layer i, one mapping for each of its
        groups, on any device. It is asked once for each layer, in order.
        """
        held: list[tuple[int, list[dict[str, Tensor]]]] = []

        def expert(i: int, e: int) -> Mapping[str, Tensor]:
            if not held or held[0][0] != i:
                held.clear()  # before the next layer is made
                held.append((i, parts_of(layers[i], weights(i))))
            group, row = layers[i].places[e]
            return {name: t[row] for name, t in held[0][1][group].items()}

        return cls.write_each(path, layers, expert, source=source, **options)

    @classmethod
    def write_each(
        cls,
        path: str | Path,
        layers: Sequence[Layer],
        expert: Callable[[int, int], Mapping[str, Tensor]],
        *,
        source: str = "",
        **options: Any,
    ) -> FileStore:
        """Writes the experts of all layers, whole or not at all: on an error an older file stays as it was. Returns
        the store of this very file, whoever else writes one of its name meanwhile.

        `expert(i, e)` gives the parts of expert e of layer i by name, on any device; it is asked once for each, layer
        by layer, and what it gave before may be filled anew. `source`, kept in the header, says what they were made of.
        Raises OSError naming the file where the disk is full.
        """
        path, opened = Path(path), list[int]()

        def work(file: BinaryIO) -> None:
            _write(file, tuple(layers), expert, source)
            if os.path.exists(name := NAME.format(file.fileno())):
                opened.append(os.open(name, os.O_RDONLY | os.O_CLOEXEC))

        try:
            write_whole(path, work)
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # the new name, too, survives a power cut
            finally:
                os.close(folder)
        except BaseException:
            for handle in opened:
                os.close(handle)
            raise
        return cls(path, layers, opened=opened[0] if opened else None, **options)

    def read(self, layer: int, expert: int, into: Mapping[str, Tensor]) -> None:
        """See Store. What goes to a CUDA device passes through a page-locked buffer of this thread's own."""
        self.reads.check_open()
        group, row = self.layers[layer].places[expert]
        kind = self.layers[layer].groups[group][1]
        with self.reads.staged(kind, into) as parts:
            wanted = [
                Piece(memoryview(bytes_of(parts[part.name])), 0, begin + row * part.nbytes)
                for part, begin in zip(kind.parts, self._offsets[layer][group], strict=True)
            ]
            self.reads.fill(wanted)
            self.check(layer, expert, wanted)

    def runs(self, layer: int, expert: int) -> dict[str, tuple[Run, ...]] | None:
        """See paged.Files."""
        if self._sums.verify is True:
            return None
        group, row = self.layers[layer].places[expert]
        parts = zip(self.layers[layer].groups[group][1].parts, self._offsets[layer][group], strict=True)
        return {part.name: (Run(0, begin + row * part.nbytes, part.nbytes),) for part, begin in parts}

    def check(self, layer: int, expert: int, read: Sequence[Piece]) -> None:
        """See paged.Files."""
        self._sums.compare(layer, expert, read, self.path)

    def whole(self, layer: int, *, writable: bool = False) -> dict[str, Tensor]:
        """Maps of the file, which take no memory until they are read. To write into one ends the process, unless it is
        `writable`: what is written is then the process's own, and limits on memory count the whole map. Nothing, with a
        warning, where a limit leaves no addresses for it."""
        if not plain(self.layers[layer]):
            return {}
        ((experts, kind),) = self.layers[layer].groups
        self.reads.check_open()
        found = {}
        try:
            for part, begin in zip(kind.parts, self._offsets[layer][0], strict=True):
                with open(os.dup(self.reads.handles[0]), "rb") as file:  # its name may be another's by now
                    data = np.memmap(file, np.uint8, "c" if writable else "r", begin, (len(experts) * part.nbytes,))
                bytes_ = torch.from_numpy(data if writable else np.asarray(_Map(data)))
                found[part.name] = bytes_.view(part.dtype).view(len(experts), *part.shape)
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise
            why = "a limit (ulimit -v or -d) leaves no addresses for a map of"
            warnings.warn(f"offload: experts' parameters have no numbers: {why} {self.path}", stacklevel=2)
            return {}
        return found

    def close(self) -> None:
        self.reads.close()


def _tensors(layers: Sequence[Layer]) -> list[tuple[str, int, Part]]:
    """(name in the file, experts n, part) of each tensor, in the order of the file."""
    return [
        (f"{layer.name}.{part.name}" + (f"#{g}" if g else ""), len(experts), part)
        for layer in layers
        for g, (experts, kind) in enumerate(layer.groups)
        for part in kind.parts
    ]


def _header(layers: Sequence[Layer], sums: Sequence[Sequence[int]], source: str) -> bytes:
    """The header for these layers: its length does not depend on the checksums. The data begin on a page."""
    about = [
        {"name": layer.name, "groups": [[experts, [p.name for p in k.parts], k.coded] for experts, k in layer.groups]}
        for layer in layers
    ]
    crc = ["".join(f"{s:08x}" for s in of_layer) for of_layer in sums]
    said: dict[str, Any] = {"__metadata__": {"headgate.experts": json.dumps(about), "headgate.crc32": ",".join(crc)}}
    if source:
        said["__metadata__"]["headgate.source"] = source
    at = 0
    for name, n, part in _tensors(layers):
        if name in said:
            raise ValueError(f"FileStore: names of tensors must differ, got {name!r} twice")
        said[name] = {
            "dtype": _NAMES[part.dtype], "shape": [n, *part.shape], "data_offsets": [at, at + n * part.nbytes]
        }  # fmt: skip
        at += n * part.nbytes
    text = json.dumps(said, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _PAGE)
    return len(text).to_bytes(8, "little") + text


def _write(
    file: BinaryIO, layers: Sequence[Layer], expert: Callable[[int, int], Mapping[str, Tensor]], source: str
) -> None:
    sums = [[0] * layer.experts for layer in layers]
    header = _header(layers, sums, source)
    most = most_header(len(header) + sum(layer.nbytes for layer in layers))
    if len(header) > most:
        raise ValueError(f"FileStore: header must be at most {most} bytes, got {len(header)}")
    file.write(header)
    begin = len(header)  # of a group
    for i, layer in enumerate(layers):
        for experts, kind in layer.groups:
            for row, e in enumerate(experts):  # nothing of one expert is held while the next is made
                sums[i][e] = _write_expert(file, kind, expert(i, e), begin, row, len(experts))
            begin += len(experts) * kind.nbytes
    file.seek(0)
    file.write(_header(layers, sums, source))
    file.flush()
    os.fsync(file.fileno())


def _write_expert(file: BinaryIO, kind: Kind, parts: Mapping[str, Tensor], begin: int, row: int, n: int) -> int:
    """Writes one of the n experts of a group, and returns its checksum."""
    total = 0
    for part in kind.parts:
        one = bytes_of(parts[part.name].cpu().contiguous())
        total = zlib.crc32(one, total)
        file.seek(begin + row * part.nbytes)
        file.write(one)
        begin += n * part.nbytes
    return total


def _open(file: int, path: Path) -> tuple[tuple[Layer, ...], list[list[list[int]]], list[list[int]], str]:
    """(layers, offset in the file of each part by layer and group, checksum by layer and expert, source)."""

    def refuse(why: str) -> ValueError:
        return fault(_WHO, path, f"must be a file that FileStore.write wrote, {why}")

    size = os.fstat(file).st_size
    length = int.from_bytes(os.pread(file, 8, 0), "little")
    if size < 8 or not 2 <= length <= min(most_header(size), size - 8):
        raise refuse(f"got a header of {length} bytes in a file of {size}")
    try:
        said = json.loads(pread_all(file, length, 8))
        layers, sums = _layers(said)
        source = said["__metadata__"].get("headgate.source", "")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, RuntimeError) as error:
        raise refuse(f"got a header that does not say so ({type(error).__name__}: {error})") from error
    at, offsets = 8 + length, []
    for layer in layers:
        offsets.append([[0] * len(kind.parts) for _, kind in layer.groups])
        for g, (experts, kind) in enumerate(layer.groups):
            for p, part in enumerate(kind.parts):
                offsets[-1][g][p] = at
                at += len(experts) * part.nbytes
    wanted = json.loads(_header(layers, sums, source)[8:])
    if json.dumps(wanted, sort_keys=True) != json.dumps(said, sort_keys=True):  # as text: there 8 is not 8.0
        raise refuse("got tensors that are not where they should be")
    if size != at:
        raise refuse(f"whole, with {at} bytes, got {size}")
    return layers, offsets, sums, source


def _layers(said: Mapping[str, Any]) -> tuple[tuple[Layer, ...], list[list[int]]]:
    about = said["__metadata__"]
    layers = []
    for layer in json.loads(about["headgate.experts"]):
        groups = []
        for g, (experts, names, coded) in enumerate(layer["groups"]):
            tensors = [said[f"{layer['name']}.{name}" + (f"#{g}" if g else "")] for name in names]
            parts = tuple(
                Part(name, _sizes(t["shape"])[1:], DTYPES[t["dtype"]]) for name, t in zip(names, tensors, strict=True)
            )
            kind = Kind(parts, tuple((w, f, _block(block)) for w, f, block in coded))
            kind.join({p.name: torch.empty((1, *p.shape), dtype=p.dtype, device="meta") for p in parts})
            groups.append((_numbers(experts), kind))
        layers.append(Layer(layer["name"], tuple(groups)))
    crc = about["headgate.crc32"].split(",")
    sums = [[int(text[8 * e : 8 * e + 8], 16) for e in range(x.experts)] for text, x in zip(crc, layers, strict=True)]
    return tuple(layers), sums


def _numbers(found: Any) -> tuple[int, ...]:
    if not isinstance(found, list) or not all(type(n) is int and 0 <= n < _LARGEST_SIZE for n in found):
        raise ValueError(f"whole numbers of at least 0, got {shown(found)}")
    return tuple(found)


def _sizes(found: Any) -> tuple[int, ...]:
    sizes = _numbers(found)
    if not 1 <= len(sizes) <= 8 or prod(sizes) >= _LARGEST_SIZE:
        raise ValueError(f"sizes of 1 to 8 dimensions, got {shown(found)}")
    return sizes


def _block(found: Any) -> tuple[int, int]:
    down, across = _numbers(found)
    return down, across


def _compare(path: Path, got: Sequence[Layer], wanted: Sequence[Layer]) -> None:
    """Raises ValueError naming the first difference."""
    names = [[x.name for x in layers] for layers in (got, wanted)]
    if names[0] != names[1]:
        raise fault(_WHO, path, f"must hold the layers {shown(names[1], 70)}, got {shown(names[0], 70)}")
    for mine, theirs in zip(got, wanted, strict=True):
        if mine.experts != theirs.experts:
            raise fault(_WHO, path, f"must hold {theirs.experts} experts of {shown(theirs.name)}, got {mine.experts}")
        for e in range(mine.experts):
            if mine.kind(e) != theirs.kind(e):
                kinds = f"{shown(str(theirs.kind(e)), 60)}, got {shown(str(mine.kind(e)), 60)}"
                raise fault(_WHO, path, f"must hold expert {e} of {shown(theirs.name, 40)} as {kinds}")
