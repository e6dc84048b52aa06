"""linear_memory, chunk by chunk, against the recurrence row by row."""

import pytest
import torch

from headgate.kernels import linear_memory, linear_memory_reference


def problem(lengths, heads=2, dk=3, dv=5, delta=True, dtype=torch.float64, beyond=2):
    n = sum(lengths) + beyond
    q, k = torch.randn(n, heads, dk, dtype=dtype), torch.randn(n, heads, dk, dtype=dtype)
    v, decay = torch.randn(n, heads, dv, dtype=dtype), -torch.rand(n, heads, dtype=dtype) * 2
    beta = torch.rand(n, heads, dtype=dtype) if delta else None
    k = torch.nn.functional.normalize(k, dim=2) if delta else k
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    return [q, k, v, decay, beta, offsets, torch.randn(len(lengths), heads, dk, dv, dtype=dtype)]


@pytest.mark.parametrize("lengths", [(), (0,), (1,), (0, 0), (5, 0, 17, 1), (33,), (16, 8, 8)], ids=str)
@pytest.mark.parametrize("delta", [False, True])
def test_equals_the_recurrence(lengths, delta, assert_close):
    given = problem(lengths, delta=delta)
    leaves = [t.requires_grad_() for t in given if t is not None and t.is_floating_point()]
    o, state = linear_memory(*given, chunk=8)
    expected, after = linear_memory_reference(*given)
    assert_close(o, expected)
    assert_close(state, after)
    if not sum(lengths):
        return
    weights = torch.randn_like(o), torch.randn_like(state)
    pairs = (torch.autograd.grad(t, leaves, weights) for t in ((o, state), (expected, after)))
    for i, (a, b) in enumerate(zip(*pairs, strict=True)):
        assert_close(a, b, name=f"gradient {i}", scale=10)


def test_any_chunk_gives_the_same_and_fp32_is_near(assert_close):
    given = problem((40, 3))
    o, state = linear_memory(*given)
    for chunk in (1, 7, 40):
        assert_close(linear_memory(*given, chunk=chunk)[0], o)
        assert_close(linear_memory(*given, chunk=chunk)[1], state)
    single = [t.float() if t is not None and t.is_floating_point() else t for t in given]
    assert_close(linear_memory(*single)[0], o.float(), torch.float32, scale=5)


def test_strong_decay_is_finite():
    given = problem((30,), delta=True)
    given[3] = torch.full_like(given[3], -200.0).requires_grad_()
    o, _ = linear_memory(*given, chunk=16)
    o.sum().backward()
    assert o.isfinite().all()
    assert given[3].grad.isfinite().all()


def test_a_state_that_is_forgotten_whole(assert_close):
    for dtype in (torch.float64, torch.float32):
        given = problem((11, 6), dtype=dtype)
        given[3][[2, 7, 11]] = -torch.inf
        for found, expected in zip(linear_memory(*given, chunk=4), linear_memory_reference(*given), strict=True):
            assert_close(found, expected, dtype, scale=5)


@pytest.mark.parametrize(
    ("error", "words", "place", "wrong"),
    [
        (TypeError, "v must be fp32 or fp64 as q is, got torch.float32", 2, torch.zeros(7, 2, 5)),
        (ValueError, r"q and k must both be \[N, H, dk\]", 1, torch.zeros(7, 2, 4, dtype=torch.float64)),
        (ValueError, r"beta must be \[7, 2\], got \(7,\)", 4, torch.zeros(7, dtype=torch.float64)),
        (ValueError, r"state must be \[2, 2, 3, 5\], got", 6, torch.zeros(1, 2, 3, 5, dtype=torch.float64)),
        (ValueError, r"offsets must be integers \[G\+1\]", 5, torch.zeros(3)),
        (
            ValueError,
            r"offsets must rise from 0 or more to at most N \(7\), got \[0, 3, 8\]",
            5,
            torch.tensor([0, 3, 8]),
        ),
        (ValueError, r"offsets must rise .*, got \[0, 3, 2\]", 5, torch.tensor([0, 3, 2])),
    ],
)
def test_what_is_refused(error, words, place, wrong):
    given = problem((3, 2))
    given[place] = wrong
    with pytest.raises(error, match=f"linear_memory: {words}"):
        linear_memory(*given)
