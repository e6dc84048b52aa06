"""plan against a naive loop, on every shape that has ever hurt."""

import pytest
import torch

from headgate.kernels.plan import plan


def naive(expert_ids, experts):
    pairs = list(enumerate(expert_ids.flatten().tolist()))
    order = [i for e in range(experts) for i, at in pairs if at == e]
    offsets = [sum(at in range(e) for _, at in pairs) for e in range(experts + 1)]
    return order, offsets


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "k", "experts"), [(0, 2, 4), (1, 1, 1), (1, 3, 3), (33, 4, 8), (50, 8, 64), (7, 2, 300)]
)
def test_is_a_stable_order_by_expert_with_its_inverse(tokens, k, experts, dtype):
    ids = torch.randint(-1, experts + 1, (tokens, k)).to(dtype)  # -1 and experts: no expert
    got = plan(ids, experts)
    order, offsets = naive(ids, experts)
    live = got.offsets[-1].item()
    assert got.pair_of_row[:live].tolist() == order
    assert got.offsets.tolist() == offsets
    assert got.pair_of_row.sort()[0].tolist() == list(range(tokens * k))
    assert got.pair_of_row[got.row_of_pair.long()].tolist() == list(range(tokens * k))
    assert {t.dtype for t in (got.pair_of_row, got.offsets, got.row_of_pair)} == {torch.int32}


@pytest.mark.parametrize(
    ("fill", "offsets"),
    [(-1, [0, 0, 0, 0, 0]), (9, [0, 0, 0, 0, 0]), (0, [0, 10, 10, 10, 10]), (2, [0, 0, 0, 10, 10])],
)
def test_every_pair_at_one_expert_or_at_none(fill, offsets):
    got = plan(torch.full((5, 2), fill), 4)
    assert got.offsets.tolist() == offsets
    assert got.pair_of_row.tolist() == list(range(10))


def test_layout_of_the_ids_does_not_matter():
    ids = torch.randint(0, 4, (3, 6)).T
    a, b = plan(ids, 4), plan(ids.contiguous(), 4)
    assert torch.equal(a.pair_of_row, b.pair_of_row)


def test_is_a_well_formed_operator_and_compiles():
    ids = torch.randint(-1, 4, (6, 2))
    torch.library.opcheck(torch.ops.headgate.plan.default, (ids, 4))
    compiled = torch.compile(lambda i: plan(i, 4).pair_of_row, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids), plan(ids, 4).pair_of_row)


@pytest.mark.parametrize(
    ("ids", "experts", "error", "message"),
    [
        (torch.zeros(2, 2), 4, TypeError, r"plan: expert_ids must be integers, got torch\.float32"),
        (torch.zeros(2, 2, dtype=torch.bool), 4, TypeError, r"plan: expert_ids must be integers, got torch\.bool"),
        (torch.zeros(4, dtype=torch.int32), 4, ValueError, r"plan: expert_ids must be \[T, K\], got \(4,\)"),
        (torch.zeros(2, 2, dtype=torch.int32), 0, ValueError, "plan: num_experts must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(ids, experts, error, message):
    with pytest.raises(error, match=message):
        plan(ids, experts)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int64])
def test_ids_of_any_width(dtype):
    ids = torch.tensor([[1, 0], [5, 1]]).to(dtype)
    assert plan(ids, 3).pair_of_row.tolist() == [1, 0, 3, 2]
    assert plan(ids, 300).offsets[-1] == 4
