"""Which tiles the Triton kernels of grouped_ffn use: a pure function of the problem and the chip, and it prints itself.

There is no tuning at run time and no file of tuned numbers. `candidates` lists what a sweep may compare with the choice.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from ..chip import Chip


@dataclass(frozen=True)
class Size:
    """A problem as tile choice sees it. `itemsize` bytes per element of rows; `pairs` N = R * K, dead ones included."""

    pairs: int
    hidden: int
    intermediate: int
    experts: int
    itemsize: int
    gated: bool = True

    @property
    def rows_per_expert(self) -> float:
        """Rows an expert gets when every expert that can be hit is hit equally often."""
        return self.pairs / max(1, min(self.experts, self.pairs))


@dataclass(frozen=True)
class Tile:
    """One GEMM's tile: `rows` x `columns` of the result, `depth` of the contraction per step; `warps` and pipeline
    `stages` of a program; `group` row tiles that share their weights' tiles in L2; `resident` programs per processor
    for which a persistent grid is sized."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    group: int = 8
    resident: int = 1

    @property
    def pieces(self) -> int:
        """In how many pieces an epilogue takes its columns: what it holds of a large tile overflows the registers."""
        per_thread = self.rows * self.columns // (32 * self.warps)
        return max(1, min(per_thread // 16, self.columns // 32))

    def __str__(self) -> str:
        return (
            f"{self.rows}x{self.columns}x{self.depth}, {self.warps} warps, {self.stages} stages, "
            f"groups of {self.group}, {self.resident} per processor"
        )


@dataclass(frozen=True)
class Tiles:
    """The tiles of every GEMM of grouped_ffn. `up` and `down` have the same rows, and so have `back` and `dx`.

    up      A = act(X W1^T), both halves of a gated projection in one program: `columns` of each
    down    Y = A W2^T
    back    dA' = dO W2, with the activation's backward in its epilogue
    dx      dX = dH W1
    dw      dW = (rows of one expert)^T (rows of one expert), `depth` rows per step
    """

    up: Tile
    down: Tile
    back: Tile
    dx: Tile
    dw: Tile

    def __str__(self) -> str:
        return "\n".join(f"{f.name:<5}{getattr(self, f.name)}" for f in fields(self))


def operand_bytes(tile: Tile, itemsize: int, weights: int = 1) -> int:
    """Shared memory that the operands of all stages take; `weights` tiles of weights per step."""
    return tile.stages * tile.depth * (tile.rows + weights * tile.columns) * itemsize


def _fit(tile: Tile, chip: Chip, itemsize: int, weights: int = 1) -> Tile:
    """The tile with fewer stages, then less depth, then fewer columns, until its programs fit the shared memory.

    A processor has 1 KiB per program more than what one program may take at most; the epilogue stages the result
    through the same memory, which at `rows` x `columns` of fp32 may be more than the operands take.
    """
    while True:
        epilogue = tile.rows * tile.columns * 4
        need = max(operand_bytes(tile, itemsize, weights), epilogue) + 1024
        if need * tile.resident <= chip.shared_bytes:
            return tile
        if tile.resident > 1:
            tile = replace(tile, resident=1)
        elif tile.stages > 2:
            tile = replace(tile, stages=tile.stages - 1)
        elif tile.depth > 16:
            tile = replace(tile, depth=tile.depth // 2)
        elif tile.columns > 16:
            tile = replace(tile, columns=tile.columns // 2)
        else:
            return tile


def _narrow(tile: Tile, columns: int) -> Tile:
    """The tile with no more columns than the result has, and at least 16."""
    wide = tile.columns
    while wide > 16 and wide // 2 >= columns:
        wide //= 2
    return replace(tile, columns=wide)


def _shallow(tile: Tile, depth: int) -> Tile:
    """The tile with no more depth than the contraction has, and at least 16."""
    deep = tile.depth
    while deep > 16 and deep // 2 >= depth:
        deep //= 2
    return replace(tile, depth=deep)


def row_tile(size: Size) -> int:
    """Rows of a tile: as many as an expert has, for a tile's weights are read once however many rows it has."""
    mean = size.rows_per_expert
    return 128 if mean > 64 else 64 if mean > 32 else 32 if mean > 16 else 16


def choose(size: Size, chip: Chip) -> Tiles:
    """The tiles for a problem on a chip.

    From 64 rows on, sm_90 multiplies with whole warp groups (wgmma). Where the contraction is short, two small programs
    per processor overlap one's epilogue with the other's loop; where it is long, one large program reads less.

    >>> choose(Size(pairs=262144, hidden=2048, intermediate=768, experts=128, itemsize=2), H200).up
    Tile(rows=128, columns=128, depth=64, warps=8, stages=4, group=8, resident=1)
    """
    rows, d, f, b = row_tile(size), size.hidden, size.intermediate, size.itemsize
    halves = 2 if size.gated else 1
    wide = size.gated and chip.capability >= 90
    depth = 64 if b == 2 else 32
    big = chip.capability >= 90 and chip.shared_bytes > 200_000
    if rows == 128:
        up = Tile(128, 128, depth, 8, 4) if big else Tile(128, 64, depth // 2, 4 if not wide else 8, 3)
        if not size.gated:
            up = Tile(128, 256, depth, 8, 4) if big else Tile(128, 128, depth // 2, 8, 3)
        long = Tile(128, 256, depth, 8, 4) if big else Tile(128, 128, depth // 2, 8, 3)
        short = Tile(128, 128, depth, 4, 3, resident=2) if big else long
        back = Tile(128, 128, depth, 8, 3) if big else Tile(128, 64, depth // 2, 8, 3)
        dw = Tile(128, 256, depth, 8, 3) if big else Tile(128, 128, depth // 2, 8, 3)
        down, dx = (long if f >= 1024 else short), (long if halves * f >= 1024 else short)
    elif rows == 64:
        up = Tile(64, 64, depth, 4, 4, resident=2)
        down = dx = Tile(64, 128, depth, 4, 4, resident=2)
        back, dw = Tile(64, 64, depth, 4, 3, resident=2), Tile(128, 128, depth // 2, 8, 3)
    else:  # few rows: what counts is to have many bytes of weights on their way
        up = Tile(rows, 32, 2 * depth, 4, 4, group=1, resident=2)
        down = dx = Tile(rows, 64, 2 * depth, 4, 4, group=1, resident=2)
        back, dw = Tile(rows, 64, depth, 4, 3, group=1, resident=2), Tile(64, 64, 32, 4, 3, group=4, resident=2)
    if not chip.capability >= 90:  # no persistent programs of several per processor beyond what fits
        up, down, dx, back = (replace(t, stages=min(t.stages, 3)) for t in (up, down, dx, back))
    return Tiles(
        _fit(_shallow(_narrow(up, f), d), chip, b, halves),
        _fit(_shallow(_narrow(down, d), f), chip, b),
        _fit(_shallow(_narrow(back, f), d), chip, b),
        _fit(_shallow(_narrow(dx, d), halves * f), chip, b),
        _fit(_narrow(dw, d), chip, b),
    )
