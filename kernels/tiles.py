"""Which tiles the Triton kernels of grouped_ffn use: a pure function of problem and chip, and it prints itself.

There is no tuning at run time and no file of tuned numbers. `candidates` lists what a sweep may compare with the
choice.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from .chip import Chip
from .gguf_blocks import BLOCKS

# Bytes that a step of a loop loads for each weight of few bits, scales included: of GGUF's blocks that begin anywhere
# (gguf_triton.py) twice what there is. The others: at most 1.
_LOADED = {"Q8_0": 2.25, "Q4_0": 1.25, "gguf_mxfp4": 1.25, "Q4_K": 1.0, "Q5_K": 1.5, "Q6_K": 2.5}


@dataclass(frozen=True)
class Size:
    """A problem as tile choice sees it. `itemsize` bytes per element of rows; `pairs` N = R * K, dead ones included;
    `formats` of the first and of the last weights, where these are in few bits."""

    pairs: int
    hidden: int
    intermediate: int
    experts: int
    itemsize: int
    gated: bool = True
    interleaved: bool = False
    formats: tuple[str, ...] = ()

    @property
    def quantized(self) -> bool:
        return bool(self.formats)

    @property
    def odd(self) -> bool:
        """Whether rows do not begin at multiples of 16 bytes of half types: narrow loads, and registers for them."""
        return bool(self.hidden % 8 or self.intermediate % 8)

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
        return max(1, min(per_thread // 16, self.columns // 16))

    @property
    def parts(self) -> int:
        """In how many parts of its columns dW goes through shared memory on its way out."""
        return 2 if self.columns >= 128 else 1

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
    dw      dW = (rows of one expert)^T (rows of one expert), `depth` rows per step; `rows` are columns of the side that
            is gathered
    """

    up: Tile
    down: Tile
    back: Tile
    dx: Tile
    dw: Tile

    def using(self, name: str, tile: Tile) -> Tiles:
        """These with another tile for one product; the one that works on the same list of row tiles takes its rows."""
        partner = {"up": "down", "down": "up", "back": "dx", "dx": "back"}.get(name)
        partners = {partner: replace(getattr(self, partner), rows=tile.rows)} if partner else {}
        return replace(self, **{name: tile, **partners})

    def __str__(self) -> str:
        return "\n".join(f"{f.name:<5}{getattr(self, f.name)}" for f in fields(self))


def shared_bytes(tile: Tile, itemsize: int, weights: int = 1, indirect: bool = False, format: str | None = None) -> int:
    """Shared memory that a program's pipeline takes: `weights` tiles of weights per step. An `indirect` loop, whose
    loads wait for loads of indices, keeps half as many steps in flight as it has stages. Weights of a `format` of
    few bits come as bytes, and one step of them is there widened, too."""
    buffers = (tile.stages + 1) // 2 if indirect else tile.stages
    wide = weights * tile.columns * itemsize
    if format is not None:
        come = math.ceil(weights * tile.columns * _LOADED.get(format, 1.0))
        return tile.depth * (buffers * (tile.rows * itemsize + come) + wide)
    return buffers * tile.depth * (tile.rows * itemsize + wide)


@dataclass(frozen=True)
class _Product:
    """A result of `columns`, a contraction of `depth`; `weights` tiles of weights a step, of this `format` if in few
    bits, their rows lying along the `inner` axis; `indirect`: see shared_bytes."""

    columns: int
    depth: int
    weights: int = 1
    format: str | None = None
    inner: str = "depth"
    indirect: bool = False

    def least(self, axis: str) -> int:
        """The least of a tile along an axis: what a matrix unit takes, or a scale's part of a block."""
        return 32 if self.format in BLOCKS and axis == self.inner else 16


def _products(size: Size) -> dict[str, _Product]:
    d, f = size.hidden, size.intermediate
    width, halves = (2 * f, 2) if size.gated else (f, 1)
    first, last = (size.formats[0], size.formats[-1]) if size.formats else (None, None)
    return {
        "up": _Product(f, d, halves, first),
        "down": _Product(d, f, 1, last),
        "back": _Product(f, d, 1, last, "columns"),
        "dx": _Product(d, width, 1, first, "columns"),
        "dw": _Product(d, 1 << 30, indirect=True),
    }


def _fit(tile: Tile, size: Size, chip: Chip, name: str) -> Tile:
    """The tile cut down to what the result and the contraction of a product need, and then to what fits the chip: fewer
    programs per processor, fewer stages, less depth, fewer columns, in this order.

    An epilogue passes the result through the same memory, a piece at a time; what leaves by a tensor map has memory of
    its own, for the next tile's loads do not wait for it; a processor keeps 1 KiB per program.
    """
    p = _products(size)[name]
    columns, depth = p.least("columns"), p.least("depth")
    tile = replace(tile, columns=max(columns, tile.columns), depth=max(depth, tile.depth))
    while tile.columns > columns and tile.columns // 2 >= p.columns:
        tile = replace(tile, columns=tile.columns // 2)
    while tile.depth > depth and tile.depth // 2 >= p.depth:
        tile = replace(tile, depth=tile.depth // 2)

    def fits(t: Tile) -> bool:
        epilogue = t.rows * t.columns * 4 // t.pieces
        used = shared_bytes(t, size.itemsize, p.weights, p.indirect, p.format)
        leaving = t.rows * t.columns * size.itemsize // t.parts if p.indirect and chip.tensor_maps else 0
        need = max(used + leaving, epilogue) + 2048
        return need * t.resident <= chip.shared_bytes

    while not fits(tile):
        if tile.resident > 1:
            tile = replace(tile, resident=tile.resident - 1)
        elif tile.stages > 2:
            tile = replace(tile, stages=tile.stages - 1)
        elif tile.depth > depth:
            tile = replace(tile, depth=tile.depth // 2)
        elif tile.columns > columns:
            tile = replace(tile, columns=tile.columns // 2)
        else:
            raise ValueError(f"grouped_ffn: no tile fits the {chip.shared_bytes} bytes of shared memory of {chip.name}")
    return tile


def row_tile(size: Size) -> int:
    """Rows of a tile: as many as an expert has, for a tile's weights are read once however many rows it has."""
    mean = size.rows_per_expert
    return 128 if mean > 64 else 64 if mean > 32 else 32 if mean > 16 else 16


@functools.lru_cache(maxsize=256)  # pure, and asked at every call
def choose(size: Size, chip: Chip) -> Tiles:
    """The tiles for a problem on a chip.

    From 64 rows on, sm_90 multiplies with whole warp groups (wgmma). Where the contraction is short, two small programs
    per processor overlap one's epilogue with the other's loop; where it is long, one large program reads less. With few
    rows per expert the weights are read once whatever the tile, and what counts is how many bytes are on their way.

    >>> print(choose(Size(pairs=262144, hidden=2048, intermediate=768, experts=128, itemsize=2), H200).up)
    128x128x64, 8 warps, 4 stages, groups of 8, 1 per processor
    """
    rows, f = row_tile(size), size.intermediate
    width = 2 * f if size.gated else f
    if rows == 128 and chip.capability >= 90 and chip.shared_bytes > 200_000:
        long, short = Tile(128, 256, 64, 8, 4), Tile(128, 128, 64, 4, 3, resident=2)
        up = Tile(128, 128, 64, 8, 4) if size.gated else long
        # with a stage less, products whose epilogue has much to write are 3 to 7 % faster on an H100
        down, dx = (replace(long, stages=3) if f >= 1024 else short), (long if width >= 1024 else short)
        # what an epilogue holds of interleaved columns on top of 256 accumulators overflows the registers
        back = replace(long, stages=3) if f >= 512 and not size.interleaved else Tile(128, 128, 64, 8, 4)
        if size.interleaved and chip.capability >= 100:  # whose accumulators come to the registers all at once
            back = replace(back, columns=64)
        dw = Tile(128, 256, 64, 8, 7)
    elif rows == 128:
        down = dx = dw = Tile(128, 128, 32, 8, 4)
        back = up = Tile(128, 64, 32, 8, 4)
        dw = replace(dw, stages=5)
    elif rows == 64:
        up, back = Tile(64, 64, 64, 4, 4, resident=2), Tile(64, 64, 64, 4, 3, resident=2)
        down = dx = Tile(64, 128, 64, 4, 4, resident=2)
        dw = Tile(128, 128, 32, 8, 5)
    else:
        up, down = Tile(rows, 32, 128, 4, 4, 1, resident=3), Tile(rows, 64, 128, 4, 4, 1, resident=3)
        back, dx, dw = Tile(rows, 64, 64, 4, 3, 1, resident=2), down, Tile(64, 64, 32, 4, 5, 4, resident=2)
    if size.itemsize > 2:  # as many bytes per step; and a product in three parts (tf32x3) holds operands in registers
        up, down, back, dx, dw = (_for_fp32(t) for t in (up, down, back, dx, dw))
    if size.odd:
        up, down, back, dx, dw = (_for_odd(t) for t in (up, down, back, dx, dw))
        back = replace(back, columns=min(32, back.columns), depth=min(32, back.depth))
    if size.quantized and rows < 64:
        down = replace(down, columns=32)
    if size.quantized and rows == 128:  # weights pass through registers on their way
        most = ((up, 64), (down, 128), (back, 64), (dx, 128))
        up, down, back, dx = (replace(t, columns=min(t.columns, c)) for t, c in most)
        down, dx = (replace(t, warps=8, resident=1) for t in (down, dx))
    tiles, products = {"up": up, "down": down, "back": back, "dx": dx, "dw": dw}, _products(size)
    return Tiles(**{n: _fit(_for_blocks(tile, products[n]), size, chip, n) for n, tile in tiles.items()})


def _for_blocks(tile: Tile, product: _Product) -> Tile:
    """For GGUF's blocks that begin anywhere: words that are shifted into place take twice the registers, so that a
    thread widens fewer weights a step. Those of 8 bits need half the depth for as many bytes under way."""
    if product.format not in _LOADED or BLOCKS[product.format][1] % 16 == 0:
        return tile
    few = tile.rows < 64
    if few and product.format == "Q8_0":
        tile = replace(tile, depth=min(64, tile.depth))
    most = 64 if few and product.inner == "depth" else 32
    if product.format == "Q6_K" and product.inner == "columns":  # two words for four weights
        most = 16
    while product.weights * tile.columns * tile.depth > most * 32 * tile.warps:
        if product.inner == "depth" or tile.depth <= 32:
            tile = replace(tile, columns=tile.columns // 2)
        else:
            tile = replace(tile, depth=tile.depth // 2)
    return tile


def _for_odd(tile: Tile) -> Tile:
    if tile.rows < 64:
        return replace(tile, columns=max(16, tile.columns // 2), depth=max(16, tile.depth // 2))
    return replace(tile, columns=min(64, tile.columns // 2), depth=max(16, tile.depth // 2), warps=8, resident=1)


def _for_fp32(tile: Tile) -> Tile:
    if tile.rows >= 64:
        return replace(tile, depth=tile.depth // 2, columns=max(32, tile.columns // 2))
    return replace(tile, depth=tile.depth // 4)


def candidates(size: Size, chip: Chip) -> dict[str, list[Tile]]:
    """Tiles that a sweep may try in place of the chosen ones, for each GEMM: the chosen one first, then the nearest
    (`_distance`), without those that would spill on sm_90. See Tiles.using."""
    chosen = choose(size, chip)
    found: dict[str, list[Tile]] = {}
    for name, product in list(_products(size).items())[:4]:
        weights = product.weights
        first = getattr(chosen, name)
        most, deepest_step = 128, 256  # accumulators of a thread: half of its 255 registers
        # something else asks for registers: narrow loads, weights widened on their way, products in three parts, an
        # epilogue that parts columns
        if size.odd or size.quantized or size.itemsize > 2 or (size.interleaved and name == "back"):
            most = max(32, weights * first.rows * first.columns // (32 * first.warps))
            deepest_step = first.depth
        stages = (2, 3, 4, 5, 6)[first.rows < 64 :]
        pool = [
            t
            for t in _around(first, stages)
            if t.depth <= deepest_step
            and weights * t.rows * t.columns <= 32 * t.warps * min(most, _spare_registers(t))
            and weights * t.columns <= 256  # of interleaved weights, one tensor map's box
            and _fit(t, size, chip, name) == t
        ]
        deepest: dict[Tile, int] = {}  # the most stages, up to the choice's, of tiles that differ in nothing else
        for t in pool:
            alike = replace(t, stages=0, group=0)
            deepest[alike] = min(first.stages, max(t.stages, deepest.get(alike, 0)))
        others = (t for t in pool if t != first)
        nearest = sorted(others, key=lambda t: _distance(t, first, deepest[replace(t, stages=0, group=0)]))
        found[name] = [first, *nearest]
    found["dw"] = _dw_candidates(size, chip, chosen.dw)
    return found


def _around(tile: Tile, stages: tuple[int, ...]) -> Iterator[Tile]:
    """Tiles in which each number is the given one's, or a factor of two or four from it."""
    fewest = 4 if tile.rows >= 64 else 2  # a warp group multiplies together
    choices = (
        [r for r in (tile.rows, tile.rows // 2, 2 * tile.rows) if 16 <= r <= 128],
        [c for c in (tile.columns, tile.columns // 2, 2 * tile.columns, tile.columns // 4) if 16 <= c <= 256],
        [k for k in (tile.depth, tile.depth // 2, 2 * tile.depth) if 16 <= k <= 256],
        [w for w in (tile.warps, tile.warps // 2, 2 * tile.warps) if fewest <= w <= 8],
        stages,
        [tile.group * g // 2 for g in (2, 1, 4, 8)] if tile.group > 1 else [1],
        range(1, 7),
    )
    return (Tile(*numbers) for numbers in itertools.product(*choices))


def _spare_registers(tile: Tile) -> int:
    """What a processor's 65536 registers leave each thread of its programs besides the 64 that every loop takes."""
    return 65536 // (32 * tile.warps * tile.resident) - 64


def _distance(tile: Tile, chosen: Tile, stages: int) -> float:
    """Factors of two between them. Of programs, how many warps a processor has, or with few rows how many bytes it has
    on their way. Of stages, the way from `stages`, the most that fit up to the chosen one's. Groups alone say nearly
    all that groups say with other tiles, so that there they come last."""
    few = chosen.rows < 64
    both = (
        (t.rows, t.columns, t.warps, (t.columns * t.depth if few else t.warps) * t.resident) for t in (tile, chosen)
    )
    far = sum(abs(math.log2(a / b)) for a, b in zip(*both, strict=True))
    far += (1 if few else 1.5) * abs(math.log2(tile.depth / chosen.depth)) + 2 * abs(math.log2(tile.stages / stages))
    return far + (3 if far else 1) * abs(math.log2(tile.group / chosen.group))


def _dw_candidates(size: Size, chip: Chip, chosen: Tile) -> list[Tile]:
    """Few, the likeliest first. Of 2n + 1 stages, n steps are under way beside the one that is multiplied."""
    shapes = (
        *((128, 256, 64, 8, 7, 1), (128, 256, 64, 8, 5, 1), (256, 128, 64, 8, 7, 1), (256, 128, 64, 8, 5, 1)),
        *((128, 256, 32, 8, 13, 1), (128, 256, 32, 8, 9, 1), (256, 128, 32, 8, 13, 1), (128, 256, 128, 8, 3, 1)),
        *((128, 128, 64, 8, 9, 1), (128, 128, 64, 8, 7, 1), (128, 128, 64, 4, 3, 2), (128, 128, 32, 4, 7, 2)),
        *((128, 128, 32, 8, 7, 1), (128, 128, 32, 8, 5, 1), (64, 256, 32, 4, 7, 2), (64, 128, 64, 4, 7, 2)),
        *((64, 128, 32, 4, 7, 2), (64, 64, 64, 4, 7, 2), (64, 64, 64, 4, 5, 3), (64, 64, 32, 4, 7, 3)),
    )
    tried = [chosen]
    for t in (*(replace(chosen, group=g) for g in (4, 16)), *(Tile(*s[:5], resident=s[5]) for s in shapes)):
        if _fit(t, size, chip, "dw") == t and t not in tried:
            tried.append(t)
    return tried
