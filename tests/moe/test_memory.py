"""headgate.Memory against exhaustive search over all keys; gradients, values elsewhere, statistics, bad input."""

import math
from functools import partial

import pytest
import torch

import headgate
from headgate.moe.memory import Memory


def exhaustive(memory: Memory, x):
    """(ids, weights) [T, H * K], y [T, Dv]: every sum of two halves; equal ones by the places of their halves."""
    n, k, heads = memory.num_keys, memory.top_k, memory.heads
    q = memory.query(x).unflatten(1, (heads, -1))
    q = q if memory.query_norm is None else memory.query_norm(q)
    q, keys = q.unflatten(2, (2, -1)).movedim(0, 2).flatten(0, 1), memory.keys.flatten(0, 1)
    scores = torch.bmm(q, keys.mT).unflatten(0, (heads, 2)).movedim(2, 0)  # [T, H, 2, n]
    ranked, order = scores.sort(dim=3, descending=True, stable=True)
    sums = (ranked[:, :, 0, :, None] + ranked[:, :, 1, None, :]).flatten(2)
    best, place = sums.sort(dim=2, descending=True, stable=True)
    first = order[:, :, 0].gather(2, place[..., :k] // n)
    ids = (first * n + order[:, :, 1].gather(2, place[..., :k] % n)).flatten(1)
    weights = best[..., :k].softmax(2).flatten(1)
    return ids, weights, (weights[..., None] * memory.values[ids]).sum(1)


@pytest.mark.parametrize(("n", "k", "heads"), [(1, 1, 1), (7, 5, 3), (40, 33, 1), (4, 16, 2), (3, 7, 2)])
@pytest.mark.parametrize("tied", [False, True])
def test_equals_exhaustive_search_ties_included(n, k, heads, tied, assert_close):
    memory = Memory(6, n, k, heads=heads, key_size=4, query_norm=not tied)
    x = torch.randn(33, 6)
    if tied:  # whole numbers: many equal sums and equal halves, exactly
        with torch.no_grad():
            for p in (memory.query.weight, memory.query.bias, memory.keys):
                p.copy_(torch.randint(-1, 2, p.shape))
        x = torch.randint(-1, 2, x.shape).float()
    ids, weights, expected = exhaustive(memory, x)
    y = memory(x)
    assert torch.equal(memory.last_routing.expert_ids.long(), ids)
    assert_close(memory.last_routing.weights, weights)
    assert_close(y, expected)
    names, parameters = zip(*memory.named_parameters(), strict=True)
    g = torch.randn_like(y)
    for name, a, b in zip(
        names, torch.autograd.grad(y, parameters, g), torch.autograd.grad(expected, parameters, g), strict=True
    ):
        assert_close(a, b, name=name, scale=3)


def test_few_of_the_pairs_are_looked_at():
    memory = Memory(6, 64, 32, heads=1, key_size=4)
    assert len(memory._first) == sum(32 // r for r in range(1, 33)) == 119  # not 1024


def test_gradients_against_finite_differences():
    memory = Memory(5, 4, 3, heads=2, key_size=3, value_size=2, gated=True, dtype=torch.float64)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(memory, (x,))
    names, parameters = zip(*memory.named_parameters(), strict=True)

    def of(*p):
        return torch.func.functional_call(memory, dict(zip(names, p, strict=True)), (x.detach(),))

    assert torch.autograd.gradcheck(of, parameters)


def test_gradient_touches_only_the_chosen_rows():
    dense, sparse = (Memory(6, 9, 2, heads=2, key_size=4, sparse_grad=s) for s in (False, True))
    sparse.load_state_dict(dense.state_dict())
    x = torch.randn(4, 6)
    for memory in (dense, sparse):
        memory(x).square().sum().backward()
    chosen = dense.last_routing.expert_ids.unique().long()
    rows = torch.zeros(81, dtype=torch.bool).index_fill_(0, chosen, True)
    assert (dense.values.grad[~rows] == 0).all()
    assert (dense.values.grad[rows] != 0).any(1).all()
    assert sparse.values.grad.is_sparse
    assert sparse.values.grad.coalesce().indices()[0].tolist() == chosen.tolist()
    assert torch.allclose(sparse.values.grad.to_dense(), dense.values.grad)
    before = sparse.values.detach().clone()
    torch.optim.SparseAdam([sparse.values], lr=0.1).step()
    assert torch.equal((sparse.values != before).any(1), rows)


def test_padding_takes_no_value():
    memory = Memory(6, 9, 2, key_size=4, gated=True)
    x, mask = torch.randn(2, 5, 6), torch.rand(2, 5) < 0.5
    x[~mask] = torch.nan
    y = memory(x, mask)
    assert (y[~mask] == 0).all()
    assert torch.equal(y[mask], memory(x[mask]))
    memory(x, mask).sum().backward()
    assert all(p.grad.isfinite().all() for p in memory.parameters())


def test_a_choice_of_no_value_adds_nothing_whatever_its_weight():
    memory = Memory(6, 3, 2, key_size=4)
    routing = headgate.Routing.from_topk(torch.tensor([[5, -1], [-1, -1]]), torch.full((2, 2), 0.5), 9)
    y = memory.look_up(routing)
    assert torch.equal(y[0], 0.5 * memory.values[5])
    assert (y[1] == 0).all()


def test_odd_numbers_of_tokens_and_half_types(assert_close):
    memory = Memory(6, 9, 2, key_size=4)
    assert memory(torch.randn(0, 6)).shape == (0, 6)
    assert memory(torch.randn(6)).shape == (6,)
    x = torch.randn(20, 6)
    expected = memory(x)
    y = memory.bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert memory.last_routing.weights.dtype == torch.float32
    assert (y.float() - expected).square().mean() < 0.05 * expected.square().mean()


def test_values_on_the_host_and_on_disk_give_the_same_bits(tmp_path):
    (tmp_path / "values.partial").write_text("somebody's own")
    for keep in (Memory.to_host, partial(Memory.to_disk, path=tmp_path / "values")):
        memory = Memory(6, 30, 3, key_size=4)
        x, y = (torch.randn(7, 6, requires_grad=True) for _ in range(2))
        expected = memory(x)
        expected.sum().backward()
        keep(memory)
        gradient, memory.query.weight.grad = memory.query.weight.grad.clone(), None
        assert "values" not in memory.state_dict()
        y = x.detach().clone().requires_grad_()
        out = memory(y)
        out.sum().backward()
        assert torch.equal(out, expected)
        assert torch.equal(y.grad, x.grad)
        assert torch.equal(memory.query.weight.grad, gradient)
        with pytest.raises(ValueError, match="values must be in the module for to_host, got a memory whose values"):
            memory.to_host()
    with pytest.raises(FileExistsError, match="path must be a new file"):
        Memory(6, 30, 3, key_size=4).to_disk(tmp_path / "values")
    assert {f.name for f in tmp_path.iterdir()} == {"values", "values.partial"}


def test_several_layers_share_values():
    one = Memory(6, 9, 2, key_size=4)
    two = Memory(6, 9, 3, key_size=4, values_of=one)
    model = torch.nn.Sequential(one, two)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in two.parameters()) + sum(
        p.numel() for n, p in one.named_parameters() if n != "values"
    )
    model(torch.randn(4, 6)).sum().backward()
    both = torch.cat([m.last_routing.expert_ids.flatten() for m in model]).unique()
    assert set((one.values.grad != 0).any(1).nonzero()[:, 0].tolist()) == set(both.tolist())


def test_usage_is_counted_where_it_is_asked_for():
    memory = Memory(6, 3, 1, heads=1, key_size=4)
    with memory.counting() as usage:
        memory(torch.randn(50, 6))
        memory(torch.randn(50, 6), torch.zeros(50, dtype=torch.bool))
    assert usage.weight.sum().item() == pytest.approx(50)
    memory(torch.randn(50, 6))
    assert usage.weight.sum().item() == pytest.approx(50)
    even, one = headgate.moe.memory.Usage(torch.ones(9)), headgate.moe.memory.Usage(torch.eye(9)[0])
    assert (even.share, one.share) == (1.0, pytest.approx(1 / 9))
    assert even.kl == pytest.approx(0, abs=1e-6)
    assert one.kl == pytest.approx(math.log(9))


def test_it_remembers():
    """Random targets for random tokens, which no linear layer fits."""
    memory = Memory(16, 32, 4, heads=2, key_size=8)
    x, target = torch.randn(64, 16), torch.randn(64, 16)
    optimizer = torch.optim.Adam(memory.parameters(), lr=0.03)
    for _ in range(60):
        optimizer.zero_grad()
        loss = (memory(x) - target).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 0.3


@pytest.mark.parametrize(
    ("error", "words", "given"),
    [
        (ValueError, "top_k must be at most the 16 values, got 17", {"num_keys": 4, "top_k": 17}),
        (ValueError, "num_keys must be below 46341: .* got 46341", {"num_keys": 46341}),
        (TypeError, "heads must be an integer, got 1.5", {"heads": 1.5}),
        (ValueError, "key_size must be at least 1, got 0", {"key_size": 0}),
        (TypeError, "values_of must be a Memory or None, got int", {"values_of": 3}),
    ],
)
def test_what_is_refused(error, words, given):
    with pytest.raises(error, match=f"Memory: {words}"):
        Memory(**{"hidden_size": 6, "num_keys": 9, "top_k": 2, **given})


def test_what_a_forward_refuses():
    memory = Memory(6, 9, 2, key_size=4)
    with pytest.raises(ValueError, match=r"x must be \[..., 6\], got \(3, 5\)"):
        memory(torch.randn(3, 5))
    with pytest.raises(ValueError, match=r"mask must be bool \[3\] as x is but for D, got torch.bool \[4\]"):
        memory(torch.randn(3, 6), torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="values_of must have 8 keys"):
        Memory(6, 8, 2, values_of=memory)
