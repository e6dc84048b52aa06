"""plan's Triton form, run by Triton's interpreter: the order against the reference, the tile table against a loop."""

import pytest
import torch

pytest.importorskip("triton")
import triton

from headgate.kernels.plan import on_triton, plan_reference
from headgate.kernels.plan.on_triton import MOST_EXPERTS, plan_on_triton, schedule

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="Triton's interpreter is off")


@pytest.fixture(autouse=True)
def _outputs_start_as_rubbish(monkeypatch):
    """Memory that no kernel writes is seen."""
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: empty(*a, **k).fill_(-77))


def check(ids, experts, block_rows=16, **cut):
    got = schedule(ids, experts, block_rows, **cut)
    order, offsets, inverse = plan_reference(ids, experts)
    assert torch.equal(got.offsets, offsets)
    assert torch.equal(got.pair_of_row, order)
    assert torch.equal(got.row_of_pair, inverse)
    at = offsets.tolist()
    tiles = [(e, row) for e in range(experts) for row in range(at[e], at[e + 1], block_rows)]
    assert got.tiles.tolist() == [len(tiles)]
    most = -(-ids.numel() // block_rows) + min(experts, ids.numel())
    assert got.tile_expert.shape == got.tile_row.shape == (most,)
    past = [(0, 0)] * (most - len(tiles))
    assert list(zip(got.tile_expert.tolist(), got.tile_row.tolist(), strict=True)) == tiles + past
    assert {t.dtype for t in vars(got).values()} == {torch.int32}
    return got


SIZES = [(0, 2, 4), (1, 1, 1), (1, 8, 128), (3, 3, 5), (33, 4, 60), (17, 6, 384), (90, 2, 8), (5, 10, 1024)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_few_pairs_take_one_launch(size, dtype):
    tokens, k, experts = size
    ids = torch.randint(-1, experts + 1, (tokens, k)).to(dtype)  # -1 and experts: no expert
    check(ids, experts)


@pytest.mark.parametrize(("share", "block"), [(16, 16), (64, 32), (128, 128)])
@pytest.mark.parametrize("size", SIZES[1:], ids=str)
def test_many_pairs_take_two(size, share, block):
    """Shares of one block and of several, one program and many, the last ones partial."""
    tokens, k, experts = size
    check(torch.randint(-1, experts + 1, (tokens, k)), experts, block_rows=32, _share=share, _block=block)


@pytest.mark.parametrize("size", [(700, 3, 33)], ids=str)
def test_sizes_past_one_launch_as_they_are_cut(size):
    tokens, k, experts = size
    assert tokens * k > on_triton._ONE_LAUNCH
    check(torch.randint(-1, experts + 1, (tokens, k)), experts, block_rows=128)


@pytest.mark.parametrize("fill", [-1, 4, 0, 2, 3])
@pytest.mark.parametrize("cut", [{}, {"_share": 64, "_block": 32}], ids=["one", "two"])
def test_every_pair_at_one_expert_or_at_none(fill, cut):
    check(torch.full((100, 2), fill), 4, **cut)


@pytest.mark.parametrize("cut", [{}, {"_share": 32, "_block": 16}], ids=["one", "two"])
@pytest.mark.parametrize("block_rows", [1, 8, 128])
def test_tiles_of_any_height(block_rows, cut):
    check(torch.randint(-1, 6, (40, 3)), 5, block_rows=block_rows, **cut)


def test_one_expert_of_many_has_all_and_tiles_are_shared_by_programs():
    check(torch.full((60, 2), 100), 128, block_rows=1, _share=32, _block=16)


@pytest.mark.parametrize("cut", [{}, {"_share": 16, "_block": 16}], ids=["one", "two"])
def test_an_id_that_does_not_fit_32_bits_is_nobodys(cut):
    ids = torch.tensor([[2**32 + 1, 1], [-(2**32), 0], [2**63 - 1, -(2**63)], [1, 2**31]])
    got = check(ids, 2, **cut)
    assert got.offsets.tolist() == [0, 1, 3]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16])
def test_ids_of_any_width(dtype):
    check(torch.tensor([[1, 0], [5, 100]]).to(dtype), 300)


def test_layout_of_the_ids_does_not_matter():
    check(torch.randint(0, 4, (3, 26)).T, 4)
    check(torch.randint(0, 4, (13, 9))[:, ::2], 4)


def test_two_runs_are_equal():
    ids = torch.randint(-1, 9, (65, 3))
    for cut in ({}, {"_share": 64, "_block": 32}):
        a, b = (vars(schedule(ids, 8, 16, **cut)) for _ in range(2))
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_operators_form_gives_the_order_alone():
    ids = torch.randint(-1, 9, (65, 3))
    for got, want in zip(plan_on_triton(ids, 8), plan_reference(ids, 8), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("experts", [0, MOST_EXPERTS + 1])
def test_bad_arguments_are_named(experts):
    with pytest.raises(ValueError, match=f"plan: num_experts must be between 1 and {MOST_EXPERTS}.*got {experts}"):
        schedule(torch.zeros(1, 1, dtype=torch.int32), experts, 16)


def test_launches_and_their_sizes_depend_on_shapes_alone():
    """At most two launches, and a cut that covers every pair, for any size."""
    for n in (1, 7, 2048, 2049, 10_000, 524_288, 2**31 - 1):
        for experts in (1, 8, 128, 1024, MOST_EXPERTS):
            seen = []
            ids = torch.empty(n, 1, dtype=torch.int32, device="meta")
            schedule(ids, experts, 64, launch=lambda kernel, grid, seen=seen, **a: seen.append((grid, a)))
            assert len(seen) == (1 if n <= 2048 else 2)
            for grid, a in seen:
                if "share" in a:
                    assert grid[0] * a["share"] >= n > (grid[0] - 1) * a["share"]
                    assert a["share"] % a["BLOCK"] == 0
                    assert (experts + 1) * a["BLOCK"] < 2**31
