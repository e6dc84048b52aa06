"""Which tiles the kernels for few rows take: a pure function of the sizes and the chip."""

from __future__ import annotations

import itertools
import math
from dataclasses import astuple, dataclass

from ..chip import Chip

MAX_ROWS = 4  # from more rows on, several share an expert often enough for matrix units to pay
_WARPS = 4
_WARPS_PER_PROCESSOR = 12  # at least, together with _LOADS: 48 KiB under way
_LOADS = 8  # of 16 bytes, that a thread should have under way at once


@dataclass(frozen=True)
class ThinTile:
    """`outputs` results per program; `chunks` of 16 bytes per weight row and step (or, where the outputs are
    contiguous, `chunks` inputs); `unroll` steps at a time, or under way at once."""

    outputs: int
    chunks: int
    unroll: int
    warps: int = _WARPS

    def __str__(self) -> str:
        return f"{self.outputs} outputs, {self.chunks} chunks, unrolled {self.unroll} times, {self.warps} warps"


@dataclass(frozen=True)
class ThinSize:
    """One product: `programs_per_output` tokens or pairs that need each of `outputs` results, of `length` inputs, with
    `together` experts at once; `halves` 2 where a result needs two weight rows. A chunk, which is one load of a thread,
    holds `per_chunk` weights; `rows_contiguous` says which axis of the weights is."""

    programs_per_output: int
    outputs: int
    length: int
    together: int
    halves: int
    per_chunk: int
    rows_contiguous: bool = True


def choose_thin(size: ThinSize, chip: Chip) -> ThinTile:
    """The tile: enough programs to fill the chip, then as many loads per thread as registers allow. A program's threads
    lie side by side along a weight row, or the rows of several experts, so that each holds its part of x for all rows.

    >>> from headgate.kernels.chip import H200
    >>> choose_thin(ThinSize(8, 768, 2048, together=1, halves=2, per_chunk=8), H200)
    ThinTile(outputs=4, chunks=128, unroll=1, warps=4)
    """
    threads, experts = 32 * _WARPS, power_of_2(size.together)
    if not size.rows_contiguous:
        outputs = _outputs(size, chip, 64 // size.halves, 16, 2)
        # with fewer values of x than threads, each thread reads those it needs instead of meeting the others
        inputs = min(max(1, threads // experts), power_of_2(size.length))
        loads = max(1, experts * inputs * outputs * size.halves // (size.per_chunk * 2 * threads))
        return ThinTile(outputs, inputs, _LOADS // loads + 1, 2 * _WARPS)
    most = _LOADS if size.per_chunk < 32 else _LOADS // 2  # numbers of 4 bits take more registers than their loads
    chunk_count = -(-size.length // size.per_chunk)
    chunks = min(max(1, threads // experts), power_of_2(chunk_count))
    while chunks > 4 and -(-chunk_count // chunks) * chunks > 1.2 * chunk_count:
        chunks //= 2
    warps = max(1, min(_WARPS, experts * chunks // 32))
    outputs = _outputs(size, chip, most // size.halves, 1, _WARPS_PER_PROCESSOR / warps)
    loads = max(1, outputs * size.halves * experts * chunks // (32 * warps))
    return ThinTile(outputs, chunks, max(1, min(most // loads, -(-chunk_count // chunks))), warps)


def thin_candidates(size: ThinSize, chip: Chip) -> list[ThinTile]:
    """Tiles that a sweep may try: the chosen one first, then the nearest by factors of two."""
    chosen = choose_thin(size, chip)
    around = itertools.product(*([n, n // 2, 2 * n, n // 4, 4 * n] for n in astuple(chosen)))
    tiles = [t for t in itertools.starmap(ThinTile, around) if t != chosen and _serves(t, size, chip)]

    def distance(tile: ThinTile) -> float:
        return sum(abs(math.log2(a / b)) for a, b in zip(astuple(tile), astuple(chosen), strict=True))

    return [chosen, *sorted(tiles, key=distance)]


def _serves(tile: ThinTile, size: ThinSize, chip: Chip) -> bool:
    """Whether every thread has something to load, and registers (columns: shared memory, too) for all its loads."""
    if min(astuple(tile)) < 1 or tile.warps > 2 * _WARPS:
        return False
    threads, at_once = 32 * tile.warps, power_of_2(size.together) * tile.chunks * tile.outputs * size.halves
    if not size.rows_contiguous:
        fills = size.per_chunk <= at_once // threads <= 64 and tile.outputs * size.halves >= size.per_chunk
        step = at_once * 16 // size.per_chunk  # bytes
        return fills and tile.chunks <= power_of_2(size.length) and 2 * step * tile.unroll <= chip.shared_bytes
    chunk_count = -(-size.length // size.per_chunk)
    most = 2 * _LOADS if size.per_chunk < 32 else _LOADS
    inside = tile.chunks <= power_of_2(chunk_count) and tile.unroll <= -(-chunk_count // tile.chunks)
    return inside and threads <= at_once and at_once * tile.unroll <= most * threads


def _outputs(size: ThinSize, chip: Chip, most: int, least: int, per_processor: float) -> int:
    """The most results per program, a power of two, that leave each processor its `per_processor` programs."""
    outputs = most
    while outputs > least and (
        size.programs_per_output * -(-size.outputs // outputs) < per_processor * chip.processors
    ):
        outputs //= 2
    return outputs


def counted(rows: int, experts: int, keep: bool) -> int:
    """The experts whose pairs a kernel must put in order: those for few rows order none."""
    return experts if keep or rows > MAX_ROWS else 0


def power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
