"""The weight-gradient kernel alone, in Triton's interpreter, against one matrix product per expert."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from headgate.kernels.chip import A100, H200
from headgate.kernels.launch import launch
from headgate.kernels.tiles import Tile

triton = pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="Triton's interpreter is off"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

CHIPS = {"pointers": replace(A100, processors=3), "maps": replace(H200, processors=3)}
TILES = {"one part": Tile(16, 32, 16, 1, 3, group=2), "two parts": Tile(32, 128, 32, 1, 5, group=3)}
# none, fewer than a step of 16, one more, whole steps, and steps of which the last begins within the one before
COUNTS = [0, 5, 17, 32, 45, 1]
TOP_K = 2


def operands(m: int, n: int, dtype: torch.dtype, gathered: int | None):
    """left, right, offsets and, where a side is gathered, the pair of each place; two places belong to nobody."""
    places = sum(COUNTS) + 2
    offsets = torch.tensor([0, *COUNTS]).cumsum(0).int()
    pairs = torch.randperm(places + places % 2)[:places].int()
    sides = [torch.randn(places, m, dtype=dtype), torch.randn(places, n, dtype=dtype)]
    if gathered is not None:
        sides[gathered] = torch.randn((places + 1) // TOP_K, (m, n)[gathered], dtype=dtype)
    return sides, offsets, pairs


def rows_of(sides, pairs, places, gathered):
    """The rows of both sides at these places."""
    return [t[pairs[places].long() // TOP_K] if i == gathered else t[places] for i, t in enumerate(sides)]


def run(sides, offsets, pairs, gathered, tile, chip, started=launch):
    from headgate.kernels.weight_grad_triton import dw_gemm

    dw = torch.full((len(COUNTS), sides[0].shape[1], sides[1].shape[1]), torch.nan, dtype=sides[0].dtype)
    dw_gemm(*sides, dw, gathered, pairs, offsets, TOP_K, tile, chip=chip, launch=started)
    return dw


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("gathered", [0, 1, None])
@pytest.mark.parametrize(
    ("m", "n", "dtype", "tile"),
    [
        (32, 64, torch.float16, "one part"),
        (24, 37, torch.float32, "one part"),
        (37, 24, torch.float16, "one part"),
        (136, 136, torch.float32, "two parts"),
    ],
)
def test_it_is_one_product_per_expert(m, n, dtype, gathered, tile, chip, assert_close):
    sides, offsets, pairs = operands(m, n, dtype, gathered)
    got = run(sides, offsets, pairs, gathered, TILES[tile], CHIPS[chip])
    for e, (first, end) in enumerate(pairwise(offsets)):
        left, right = rows_of(sides, pairs, torch.arange(first, end), gathered)
        assert_close(got[e], left.double().T @ right.double(), dtype=dtype, name=f"expert {e}")


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("gathered", [0, 1, None])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_bad_in_other_rows_is_not_seen(value, gathered, chip):
    sides, offsets, pairs = operands(16, 32, torch.float16, gathered)
    clean = run(sides, offsets, pairs, gathered, TILES["one part"], CHIPS[chip])
    for e in (1, 2, 5):  # fewer places than a step, one more, one at the end
        places = torch.arange(offsets[e], offsets[e + 1])
        bad = []
        for i, t in enumerate(sides):
            own = pairs[places].long() // TOP_K if i == gathered else places
            bad.append(torch.full_like(t, value).index_copy(0, own, t[own]))
        got = run(bad, offsets, pairs, gathered, TILES["one part"], CHIPS[chip])
        assert torch.equal(got[e], clean[e]), f"expert {e}"


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
@pytest.mark.parametrize("gathered", [0, 1])
def test_neither_runs_nor_programs_change_a_bit(gathered, chip):
    sides, offsets, pairs = operands(40, 136, torch.float32, gathered)
    runs = [
        run(sides, offsets, pairs, gathered, TILES["two parts"], replace(chip, processors=p)) for p in (1, 1, 4, 132)
    ]
    assert all(torch.equal(runs[0], other) for other in runs[1:])


@pytest.mark.parametrize(
    ("m", "n", "gathered", "mapped", "map_dw"),
    [
        (40, 136, 0, True, True),
        (136, 40, 1, True, True),
        (40, 37, 0, False, False),
        (37, 40, 0, True, True),
        (40, 37, 1, True, False),  # dW's own rows are 37 long
        (40, 37, None, False, False),
    ],
)
def test_what_can_be_mapped_is(m, n, gathered, mapped, map_dw):
    """By pointers where rows do not begin at multiples of 16 bytes, and only there."""
    sides, offsets, pairs = operands(m, n, torch.float16, gathered)
    found = []
    run(sides, offsets, pairs, gathered, TILES["one part"], H200, lambda kernel, grid, **a: found.append(a))
    assert (found[0]["MAP"], found[0]["MAP_DW"]) == (mapped, map_dw)
    assert [hasattr(found[0][name], "block_shape") for name in ("b", "dw")] == [mapped, map_dw]
    run(sides, offsets, pairs, gathered, TILES["one part"], A100, lambda kernel, grid, **a: found.append(a))
    assert not found[1]["MAP"]
    assert not found[1]["MAP_DW"]
