"""The lower tier in a checkpoint's own files: experts are read piece by piece from where they lie, no copy is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ..hf.conversion import Source
from .checkpoint import Checkpoint
from .checksums import Checksums, Stamp, Verify, check_verify
from .kinds import Layer
from .reads import Piece, Reads, Run, bytes_of

WHAT_TO_DO = (
    "load the model with from_pretrained and use headgate.offload, or save it once with save_pretrained and load that"
)


@dataclass(frozen=True)
class Laid:
    """A tensor as runs of bytes, in the order of its elements."""

    shape: tuple[int, ...]
    dtype: str
    runs: tuple[Run, ...]

    def cut(self, n: int) -> list[tuple[Run, ...]]:
        """The runs of each of n equal parts."""
        size = sum(run.nbytes for run in self.runs) // n
        parts: list[list[Run]] = [[]]
        room = size
        for file, offset, nbytes in self.runs:
            while nbytes:
                some = min(nbytes, room)
                parts[-1].append(Run(file, offset, some))
                offset, nbytes, room = offset + some, nbytes - some, room - some
                if not room:
                    parts.append([])
                    room = size
        return [tuple(part) for part in parts[:n]]


def laid_out(source: Source, checkpoint: Checkpoint) -> Laid | str:
    """What a parameter is made of, as bytes of the checkpoint's files; as a string, why it cannot be said so."""
    found = {pattern: [_stored(checkpoint, key) for key in keys] for pattern, keys in source.keys.items()}
    for operation in source.operations:
        name, dim = type(operation).__name__, getattr(operation, "dim", None)
        if name == "MergeModulelist" and dim == 0:
            found = {pattern: [_stacked(some)] for pattern, some in found.items()}
        elif name == "Concatenate" and dim in (0, 1):
            found = {"": [_joined([one for pattern in source.patterns for one in found.get(pattern, ())], dim)]}
        else:
            return f"transformers makes it by {operation!r}, not of whole pieces of the checkpoint's tensors"
    if len(found) != 1 or any(len(some) != 1 for some in found.values()):
        return f"transformers makes it of {source} by no operation"
    return next(iter(found.values()))[0]


def _stored(checkpoint: Checkpoint, key: str) -> Laid:
    stored = checkpoint.tensors[key]
    return Laid(stored.shape, stored.dtype, (Run(stored.file, stored.offset, stored.nbytes),))


def _alike(some: Sequence[Laid], dim: int | None) -> None:
    """Raises ValueError where tensors to be joined differ in dtype, or in shape outside `dim`."""
    kinds = {(one.dtype, *(n for d, n in enumerate(one.shape) if d != dim)) for one in some}
    if len(kinds) != 1:
        raise ValueError(f"tensors of one dtype and shape, got {[(one.dtype, list(one.shape)) for one in some][:4]}")


def _stacked(some: Sequence[Laid]) -> Laid:
    _alike(some, None)
    return Laid((len(some), *some[0].shape), some[0].dtype, tuple(run for one in some for run in one.runs))


def _joined(some: Sequence[Laid], dim: int) -> Laid:
    _alike(some, dim)
    shape = list(some[0].shape)
    shape[dim] = sum(one.shape[dim] for one in some)
    rows = [one.cut(prod(shape[:dim])) for one in some]
    return Laid(
        tuple(shape), some[0].dtype, tuple(run for row in zip(*rows, strict=True) for runs in row for run in runs)
    )


class ShardStore:
    """The experts of `layers` in the files of a checkpoint. `laid[i]`: of layer i, each part [E, ...] as it lies;
    `made[i]`: what makes a part, by name, of an expert's bytes where it is not they themselves.

    `page_cache=False`: the kernel keeps no copy of what was read. `ways`: an expert is read in so many pieces at once.
    `stamps`: what the files were when their headers were read. Unless `verify` is False, a read fails where a file is
    no longer as it was; with True, also where an expert is another than when it was read first.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        laid: Sequence[Mapping[str, Laid]],
        files: Sequence[tuple[int, Path]],
        *,
        made: Sequence[Mapping[str, Callable[[Tensor], Tensor]]] | None = None,
        page_cache: bool = True,
        ways: int = 4,
        stamps: Sequence[Stamp] = (),
        verify: Verify = "first",
    ) -> None:
        check_verify(verify, "ShardStore")
        self.layers = tuple(layers)
        self._sums = Checksums(verify is True, self.layers)
        self._made = [{} for _ in layers] if made is None else made
        self._runs = [
            {n: one.cut(layer.experts) for n, one in of.items()} for layer, of in zip(layers, laid, strict=True)
        ]
        self.reads = Reads(files, page_cache=page_cache, ways=ways)
        self._stamps = list(stamps if verify else ())

    def read(self, layer: int, expert: int, into: Mapping[str, Tensor]) -> None:
        """See Store. What goes to a CUDA device passes through a page-locked buffer of this thread's own."""
        self.reads.check_open()
        wanted: list[Piece] = []
        with self.reads.staged(self.layers[layer].kind(expert), into) as parts:
            raw = {
                name: torch.empty(sum(run.nbytes for run in self._runs[layer][name][expert]), dtype=torch.uint8)
                for name in self._made[layer]
            }
            for name, runs in self._runs[layer].items():
                data, at = memoryview(bytes_of(raw.get(name, parts[name]))), 0
                for file, offset, nbytes in runs[expert]:
                    wanted.append(Piece(data[at : at + nbytes], file, offset))
                    at += nbytes
            self.reads.fill(wanted)
            self.check(layer, expert, wanted)
            for name, make in self._made[layer].items():
                parts[name].copy_(make(raw[name]))

    def runs(self, layer: int, expert: int) -> dict[str, tuple[Run, ...]] | None:
        """See paged.Files."""
        if self._made[layer] or self._sums.verify is True:
            return None
        return {name: runs[expert] for name, runs in self._runs[layer].items()}

    def check(self, layer: int, expert: int, read: Sequence[Piece]) -> None:
        """See paged.Files."""
        files = {piece.file for piece in read}
        for file in files if self._stamps else ():
            self._stamps[file].compare(self.reads.handles[file], self.reads.paths[file])
        self._sums.compare(layer, expert, read, self.reads.paths[min(files)])

    def whole(self, layer: int) -> dict[str, Tensor]:
        """Nothing: a layer's weights are in no one piece."""
        return {}

    def close(self) -> None:
        self.reads.close()
