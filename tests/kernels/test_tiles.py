"""The choice of tiles: pure, printable, within every chip's shared memory for every size."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from headgate.kernels.chip import CHIPS, H200, Chip
from headgate.kernels.tiles import Size, Tile, candidates, choose, row_tile, shared_bytes

SIZES = [
    Size(pairs, d, f, experts, itemsize, gated, interleaved and gated, formats)
    for pairs, (d, f), experts, itemsize, gated, interleaved, formats in itertools.product(
        (0, 1, 40, 3000, 30_000, 2_000_000),
        ((1, 1), (33, 70), (2048, 768), (2880, 2880), (7168, 2048)),
        (1, 8, 256),
        (2, 4),
        (True, False),
        (True, False),
        ((), ("int4", "int4"), ("Q4_K", "Q6_K"), ("Q8_0", "Q8_0")),
    )
]


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda c: c.name)
def test_every_choice_fits_the_chip(chip):
    for size in SIZES:
        tiles = choose(size, chip)
        halves = 2 if size.gated else 1
        for name in ("up", "down", "back", "dx", "dw"):
            t = getattr(tiles, name)
            format = {"up": size.formats[:1], "dx": size.formats[:1], "dw": ()}.get(name, size.formats[1:])
            used = shared_bytes(t, size.itemsize, halves if name == "up" else 1, name == "dw", *format)
            if name == "dw" and chip.tensor_maps:  # a part of the result on its way out
                used += t.rows * t.columns * size.itemsize // t.parts
            assert used * t.resident <= chip.shared_bytes, (name, t, size)
            assert min(t.rows, t.columns, t.depth) >= 16, (name, t, size)
            along_rows = t.columns if name in ("back", "dx") else t.depth
            assert along_rows >= 32 or name == "dw" or "Q4_K" not in size.formats, "a part of a block has one scale"
            assert all(n & (n - 1) == 0 for n in (t.rows, t.columns, t.depth, t.warps, t.pieces)), (name, t, size)
            assert t.columns // t.pieces >= 16, (name, t, size)
        # an expert's rows are cut once for the forward pass and once for the backward pass
        assert tiles.up.rows == tiles.down.rows
        assert tiles.back.rows == tiles.dx.rows


def test_rows_of_a_tile_follow_the_rows_of_an_expert():
    rows = [row_tile(Size(pairs, 64, 64, 8, 2)) for pairs in (0, 8, 128, 129, 257, 513, 10_000)]
    assert rows == [16, 16, 16, 32, 64, 128, 128]


def test_it_prints_itself():
    text = str(choose(Size(262144, 2048, 768, 128, 2), H200))
    assert text.splitlines()[0] == "up   128x128x64, 8 warps, 4 stages, groups of 8, 1 per processor"
    assert [line.split()[0] for line in text.splitlines()] == ["up", "down", "back", "dx", "dw"]


def test_equal_questions_have_equal_answers():
    assert choose(SIZES[-1], H200) == choose(SIZES[-1], H200)


@pytest.mark.parametrize("pairs", [64, 262144])
def test_candidates_begin_with_the_choice_and_fit(pairs):
    size = Size(pairs, 2048, 768, 128, 2)
    chosen, found = choose(size, H200), candidates(size, H200)
    for name, tiles in found.items():
        assert tiles[0] == getattr(chosen, name)
        assert len(tiles) == len(set(tiles)) > 5
        halves = 2 if name == "up" else 1
        for t in tiles:
            leaving = t.rows * t.columns * 2 // t.parts if name == "dw" else 0
            assert (shared_bytes(t, 2, halves, indirect=name == "dw") + leaving) * t.resident <= H200.shared_bytes


def test_the_first_candidates_are_the_neighbours():
    """What is worth a minute on a GPU: other stages, groups, programs and shapes, one or two of them at a time."""
    first = {n: c[:20] for n, c in candidates(Size(262144, 4096, 1024, 128, 2), H200).items()}
    assert first["down"][0] == Tile(128, 256, 64, 8, 3)
    wanted = [
        Tile(128, 256, 64, 8, 4),
        Tile(128, 128, 64, 8, 3),
        Tile(128, 128, 64, 8, 4),
        Tile(128, 128, 64, 4, 3, resident=2),
        Tile(64, 256, 64, 8, 4),
    ]
    for name in ("down", "back", "dx"):
        grouped = [replace(first[name][0], group=g) for g in (4, 16, 32)]
        assert [t for t in [*wanted, *grouped] if t not in first[name]] == [], name
    few = {n: c[:24] for n, c in candidates(Size(64, 2048, 768, 128, 2), H200).items()}
    for name in ("up", "down"):
        assert all(t.rows <= 32 and t.group == 1 and t.stages >= 3 for t in few[name])
        for number, values in (("columns", {32, 64}), ("depth", {64, 128, 256}), ("resident", {2, 3, 4, 5})):
            assert values <= {getattr(t, number) for t in few[name]}, (name, number)


def test_candidates_leave_registers_to_the_rest():
    """At most 128 accumulators of a thread's 255 registers, and fewer where something else asks for them."""
    plain, parted = (candidates(Size(262144, 4096, 1024, 128, 2, interleaved=i), H200) for i in (False, True))

    def accumulators(tiles, halves=1):
        return {halves * t.rows * t.columns // (32 * t.warps) for t in tiles}

    assert max(accumulators(plain["back"])) == max(accumulators(plain["up"], 2)) == 128
    assert max(accumulators(parted["back"])) == 64
    assert all(t.columns <= 128 for t in parted["up"]), "both halves in one box of a tensor map"
    fp32 = candidates(Size(32768, 2048, 768, 128, 4), H200)
    assert all(t.depth <= fp32["up"][0].depth for t in fp32["up"])
    for t in plain["down"]:
        assert t.resident * t.warps * 32 * (64 + t.rows * t.columns // (32 * t.warps)) <= 65536


def test_products_of_one_pass_keep_one_list_of_row_tiles():
    chosen = choose(Size(262144, 2048, 768, 128, 2), H200)
    for name, partner in (("up", "down"), ("dx", "back")):
        other = chosen.using(name, replace(getattr(chosen, name), rows=64))
        assert getattr(other, partner) == replace(getattr(chosen, partner), rows=64)
    assert chosen.using("dw", replace(chosen.dw, rows=64)).back == chosen.back


def test_a_chip_without_room_is_refused_by_name():
    with pytest.raises(ValueError, match="no tile fits the 2000 bytes of shared memory of toy"):
        choose(SIZES[0], Chip("toy", 80, 1, 2000))
