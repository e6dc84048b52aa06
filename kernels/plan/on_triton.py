"""plan in Triton: the order of pairs by expert, and the row tiles of a grouped product over it.

Up to `_ONE_LAUNCH` pairs one launch does: each program ranks a few pairs against all of them. Beyond, a counting sort
in two: each program counts the experts of its share of the pairs, then each sums the counts, which tells it where its
own pairs go. There are no atomics on memory, and nothing waits for anything but the launch before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..chip import MOST_EXPERTS
from ..launch import Launch, launch

__all__ = ["MOST_EXPERTS", "Schedule", "plan_on_triton", "schedule", "tiles_of"]

_ONE_LAUNCH = 2048  # pairs
_COUNTS = 65536  # at most so many counts (programs * experts) are read again by every program


@dataclass(frozen=True)
class Schedule:
    """A `Plan`, and the row tiles of a grouped product: expert by expert, `block_rows` places each, the last partial.

    `pair_of_row` int32 [N], `offsets` int32 [E+1], `row_of_pair` int32 [N] as in `Plan`. With S = cdiv(N, block_rows) +
    min(E, N), the most tiles there can be: `tile_expert` int32 [S] the expert of a tile, `tile_row` int32 [S] its first
    place in the expert order, both zero past the `tiles` int32 [1] live ones.
    """

    pair_of_row: Tensor
    offsets: Tensor
    row_of_pair: Tensor
    tile_expert: Tensor
    tile_row: Tensor
    tiles: Tensor


@triton.jit
def _load_ids(ids, at, N, E):
    """Expert ids at places `at` int64; E for a pair without an expert or a place past N. Compared at full width."""
    there = at < N
    v = tl.load(ids + at, mask=there, other=0).to(tl.int64)
    return tl.where(there & (v >= 0) & (v < E), v, E).to(tl.int32)


@triton.jit
def _tile_table(
    counts, starts, tile_expert, tile_row, tiles, S, program, programs,
    BLOCK_ROWS: tl.constexpr, EP: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Writes this program's slots of the table, and program 0 the number of tiles. `counts`, `starts` int32 [EP]."""
    mine = counts // BLOCK_ROWS + (counts % BLOCK_ROWS != 0)
    ends = tl.cumsum(mine, 0)
    firsts = ends - mine
    if program == 0:
        tl.store(tiles, tl.sum(mine, 0))
    e = tl.arange(0, EP)
    for s0 in range(program * SLOTS, S, programs * SLOTS):
        s = s0 + tl.arange(0, SLOTS)
        # at most one expert owns a slot, so that a masked sum is a look-up
        owns = (firsts[None, :] <= s[:, None]) & (s[:, None] < ends[None, :])
        row = starts[None, :] + (s[:, None] - firsts[None, :]) * BLOCK_ROWS
        tl.store(tile_expert + s, tl.sum(tl.where(owns, e[None, :], 0), 1), mask=s < S)
        tl.store(tile_row + s, tl.sum(tl.where(owns, row, 0), 1), mask=s < S)


@triton.jit(do_not_specialize=["E", "S"])
def _rank(
    ids, pair_of_row, offsets, row_of_pair, tile_expert, tile_row, tiles, N, E, S,
    NP: tl.constexpr, BLOCK: tl.constexpr, AGAINST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, EP: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Program 0 counts: offsets and tile table. Program i ranks BLOCK pairs: a place is the number of lesser keys."""
    program = tl.program_id(0)
    if program == 0:
        counts = tl.zeros((EP,), tl.int32)
        for j0 in range(0, NP, AGAINST):
            id = _load_ids(ids, (j0 + tl.arange(0, AGAINST)).to(tl.int64), N, E)
            counts += tl.histogram(id, EP, mask=id < E)
        starts = tl.cumsum(counts, 0) - counts
        e = tl.arange(0, EP)
        tl.store(offsets + e, starts, mask=e < E)
        tl.store(offsets + E, tl.sum(counts, 0))
        if BLOCK_ROWS > 0:
            _tile_table(counts, starts, tile_expert, tile_row, tiles, S, 0, 1, BLOCK_ROWS, EP, SLOTS)
    else:
        pair = (program - 1) * BLOCK + tl.arange(0, BLOCK)
        key = _load_ids(ids, pair.to(tl.int64), N, E) * NP + pair  # unique, so that the order is stable
        less = tl.zeros((BLOCK, AGAINST), tl.int32)
        for j0 in range(0, NP, AGAINST):
            j = j0 + tl.arange(0, AGAINST)
            other = _load_ids(ids, j.to(tl.int64), N, E) * NP + j  # past N it is greater than every pair's
            less += (other[None, :] < key[:, None]).to(tl.int32)
        place = tl.sum(less, 1)
        tl.store(row_of_pair + pair, place, mask=pair < N)
        tl.store(pair_of_row + place, pair, mask=pair < N)


@triton.jit(do_not_specialize=["E"])
def _count(ids, hist, N, E, share, EP: tl.constexpr, BLOCK: tl.constexpr):
    """hist[program, :]: how many of this program's share of the pairs each expert has."""
    program = tl.program_id(0)
    first = program.to(tl.int64) * share
    counts = tl.zeros((EP,), tl.int32)
    for b in range(0, share, BLOCK):  # share is a multiple of BLOCK
        id = _load_ids(ids, first + b + tl.arange(0, BLOCK), N, E)
        counts += tl.histogram(id, EP, mask=id < E)
    tl.store(hist + program * EP + tl.arange(0, EP), counts)


@triton.jit(do_not_specialize=["E", "S"])
def _place(
    ids, hist, pair_of_row, offsets, row_of_pair, tile_expert, tile_row, tiles, N, E, S, share,
    EP: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, BLOCK_ROWS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Places this program's share of the pairs, block by block: sorted within the block, each run of one expert is
    written at once. The programs share the tile table; program 0 writes the offsets."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    e = tl.arange(0, EP)
    counts, before = tl.zeros((EP,), tl.int32), tl.zeros((EP,), tl.int32)  # of all programs, of those before this one
    for p0 in range(0, programs, ROWS):
        p = p0 + tl.arange(0, ROWS)
        h = tl.load(hist + p[:, None] * EP + e[None, :], mask=(p < programs)[:, None], other=0)
        counts += tl.sum(h, 0)
        before += tl.sum(tl.where((p < program)[:, None], h, 0), 0)
    starts = tl.cumsum(counts, 0) - counts
    live = tl.sum(counts, 0)
    if program == 0:
        tl.store(offsets + e, starts, mask=e < E)
        tl.store(offsets + E, live)
    if BLOCK_ROWS > 0:
        _tile_table(counts, starts, tile_expert, tile_row, tiles, S, program, programs, BLOCK_ROWS, EP, SLOTS)
    first = program.to(tl.int64) * share
    next_place = starts + before  # of each expert
    next_dead = (live + first - tl.sum(before, 0)).to(tl.int32)  # the pairs before this one that are not live are dead
    i = tl.arange(0, BLOCK)
    for b in range(0, share, BLOCK):
        at = first + b + i
        id = _load_ids(ids, at, N, E)
        own = tl.histogram(id, EP, mask=id < E)
        own_live = tl.sum(own, 0)
        shift = next_place - (tl.cumsum(own, 0) - own)  # from a place in this block's order to one in the whole order
        key = tl.sort(id * BLOCK + i)  # unique, so that the order is stable; places past N come last
        id, pair = key // BLOCK, first + b + key % BLOCK
        place = i + tl.where(id < E, tl.gather(shift, tl.minimum(id, EP - 1), 0), next_dead - own_live)
        tl.store(pair_of_row + place.to(tl.int64), pair.to(tl.int32), mask=pair < N)
        tl.store(row_of_pair + pair, place, mask=pair < N)
        next_place += own
        next_dead += BLOCK - own_live


def schedule(
    expert_ids: Tensor,
    num_experts: int,
    block_rows: int,
    *,
    launch: Launch = launch,
    _share: int | None = None,
    _block: int | None = None,
) -> Schedule:
    """The `Schedule` of `expert_ids` [T, K] (integers; < 0 or >= num_experts: no expert) in tiles of `block_rows`.

    One launch for few pairs, otherwise two. Raises ValueError for more than 1024 experts or 2^31 - 1 pairs.
    `block_rows` 0 leaves the tile table empty. `_share` and `_block` (powers of two) are for tests: the pairs of one
    program, and those that it sorts at once.
    """
    n, experts = expert_ids.numel(), num_experts
    if not 1 <= experts <= MOST_EXPERTS:
        raise ValueError(f"plan: num_experts must be between 1 and {MOST_EXPERTS} on this device, got {experts}")
    if n >= 2**31:
        raise ValueError(f"plan: T * K must be below 2^31 pairs, got {n}")

    def ints(size: int) -> Tensor:
        return expert_ids.new_empty(size, dtype=torch.int32)

    slots = triton.cdiv(n, block_rows) + min(experts, n) if block_rows else 0
    out = Schedule(ints(n), ints(experts + 1), ints(n), ints(slots), ints(slots), ints(1 if block_rows else 0))
    if n == 0:
        out.offsets.zero_()
        out.tiles.zero_()
        return out
    ids, width = expert_ids.contiguous(), max(32, triton.next_power_of_2(experts))
    result = dict(
        pair_of_row=out.pair_of_row, offsets=out.offsets, row_of_pair=out.row_of_pair,
        tile_expert=out.tile_expert, tile_row=out.tile_row, tiles=out.tiles, N=n, E=experts, S=slots,
        EP=width, BLOCK_ROWS=block_rows,
    )  # fmt: skip
    if n <= _ONE_LAUNCH and _share is None:
        padded = max(16, triton.next_power_of_2(n))
        against = min(padded, 128)
        block = min(padded, 2048 // against)
        grid = (1 + triton.cdiv(n, block),)
        table = max(1, min(64, 4096 // width))
        launch(_rank, grid, warps=4, stages=1, ids=ids, NP=padded, BLOCK=block, AGAINST=against, SLOTS=table, **result)
        return out
    share, block = _cut(n, width) if _share is None else (_share, _block or _share)
    grid, warps = (triton.cdiv(n, share),), max(1, min(16, max(block, width) // 128))
    hist = ints(grid[0] * width)
    launch(_count, grid, warps=warps, stages=1, ids=ids, hist=hist, N=n, E=experts, share=share, EP=width, BLOCK=block)
    held = min(warps * 512, 65536 // warps)  # numbers in registers: 16 a thread, but 8 where 16 warps share the file
    rows = max(1, min(triton.next_power_of_2(grid[0]), 32, held // width))
    cut = dict(share=share, BLOCK=block, ROWS=rows, SLOTS=rows)
    launch(_place, grid, warps=warps, stages=1, ids=ids, hist=hist, **cut, **result)
    return out


@triton.jit
def _tabulate(
    given, offsets, tile_expert, tile_row, tiles, E, S,
    BLOCK_ROWS: tl.constexpr, EP: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The tile table of offsets that are given, and the offsets as int32."""
    program, e = tl.program_id(0), tl.arange(0, EP)
    starts = tl.load(given + e, mask=e < E, other=0).to(tl.int32)
    ends = tl.load(given + e + 1, mask=e < E, other=0).to(tl.int32)
    if program == 0:
        tl.store(offsets + e, starts, mask=e < E)
        tl.store(offsets + E, tl.load(given + E).to(tl.int32))
    programs = tl.num_programs(0)
    _tile_table(ends - starts, starts, tile_expert, tile_row, tiles, S, program, programs, BLOCK_ROWS, EP, SLOTS)


def tiles_of(offsets: Tensor, rows: int, block_rows: int, *, launch: Launch = launch) -> Schedule:
    """The `Schedule` of `rows` rows that are in expert order already: `offsets` [E+1] any integers. It has no maps
    between pairs and places. One launch."""
    experts = offsets.numel() - 1
    if not 1 <= experts <= MOST_EXPERTS:
        raise ValueError(f"plan: num_experts must be between 1 and {MOST_EXPERTS} on this device, got {experts}")
    slots = triton.cdiv(rows, block_rows) + min(experts, rows)
    sizes = (0, experts + 1, 0, slots, slots, 1)
    out = Schedule(*(offsets.new_empty(size, dtype=torch.int32) for size in sizes))
    width = max(32, triton.next_power_of_2(experts))
    table = max(1, min(64, 4096 // width))
    launch(
        _tabulate, (max(1, min(32, triton.cdiv(slots, table))),), warps=4, stages=1, given=offsets.contiguous(),
        offsets=out.offsets, tile_expert=out.tile_expert, tile_row=out.tile_row, tiles=out.tiles, E=experts, S=slots,
        BLOCK_ROWS=block_rows, EP=width, SLOTS=table,
    )  # fmt: skip
    return out


def _cut(n: int, width: int) -> tuple[int, int]:
    """(pairs of one program, pairs sorted at once) for n pairs and `width` counts each."""
    programs = max(1, min(128, _COUNTS // width, triton.cdiv(n, 512)))
    share = triton.cdiv(n, programs)
    most = 2048 if width <= 256 else 1024  # they and the counts are in registers
    block = min(most, max(512, triton.next_power_of_2(share)))
    return triton.cdiv(share, block) * block, block


def plan_on_triton(expert_ids: Tensor, num_experts: int, *, launch: Launch = launch) -> tuple[Tensor, Tensor, Tensor]:
    """(pair_of_row, offsets, row_of_pair) of `expert_ids` [T, K]; see `Plan`."""
    s = schedule(expert_ids, num_experts, 0, launch=launch)
    return s.pair_of_row, s.offsets, s.row_of_pair
