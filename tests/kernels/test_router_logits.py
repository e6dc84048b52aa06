"""router_logits: the operator on CPU, its gradients, and its Triton form in the interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from headgate.kernels import router_logits
from headgate.kernels.chip import A100, CHIPS, H200

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.parametrize("shape", [(0, 8, 4), (1, 1, 1), (33, 70, 5), (7, 64, 128)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_is_the_product_of_the_numbers_as_they_are(shape, dtype, bias, assert_close):
    tokens, hidden, experts = shape
    x, w = torch.randn(tokens, hidden).to(dtype), torch.randn(experts, hidden).to(dtype)
    b = torch.randn(experts).to(dtype) if bias else None
    want = x.double() @ w.double().T + (b.double() if bias else 0)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            got = router_logits(x, w, b)
        assert got.dtype == wide(dtype)
        assert_close(got, want, dtype=wide(dtype))


def test_strides_and_mixed_dtypes(assert_close):
    x, w = torch.randn(70, 5).T, torch.randn(4, 140, dtype=torch.bfloat16)[:, ::2]
    assert_close(router_logits(x, w), x.double() @ w.double().T, dtype=torch.float32)


def test_gradients_and_second_gradients():
    x, w, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 5), (4, 5), (4,)))
    assert torch.autograd.gradcheck(router_logits, (x, w, b))
    assert torch.autograd.gradgradcheck(router_logits, (x, w, b))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_half_types_sum_in_fp32(dtype, assert_close):
    x, w, b = (torch.randn(s).to(dtype).requires_grad_() for s in ((33, 20), (8, 20), (8,)))
    grad = torch.randn(33, 8)
    got = torch.autograd.grad(router_logits(x, w, b), (x, w, b), grad)
    want = grad.double() @ w.double(), grad.double().T @ x.double(), grad.double().sum(0)
    for g, e in zip(got, want, strict=True):
        assert g.dtype == dtype
        assert_close(g, e, dtype=dtype)


def test_nothing_wider_is_kept_for_backward():
    x, w = torch.randn(9, 20, dtype=torch.bfloat16), torch.randn(8, 20, dtype=torch.bfloat16, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        router_logits(x, w)
    assert sorted(t.data_ptr() for t in kept) == sorted((x.data_ptr(), w.data_ptr()))


def test_untouched_by_autocast(assert_close):
    x, w = torch.randn(5, 20), torch.randn(8, 20, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = router_logits(x, w)
    assert torch.equal(inside, router_logits(x, w))


def test_the_operator_keeps_its_promises():
    x, w, b = torch.randn(5, 20), torch.randn(8, 20, requires_grad=True), torch.randn(8)
    torch.library.opcheck(torch.ops.headgate.router_logits.default, (x, w, b))
    torch.library.opcheck(torch.ops.headgate.router_logits.default, (x.bfloat16(), w, None))
    compiled = torch.compile(router_logits, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, w, b), router_logits(x, w, b))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(3), torch.ones(2, 3)), ValueError, r"x must be \[T, D\], got \(3,\)"),
        ((torch.ones(3, 4), torch.ones(2, 3)), ValueError, r"weight must be \[E, D\] with D=4, got \(2, 3\)"),
        ((torch.ones(3, 4), torch.ones(2, 4), torch.ones(3)), ValueError, r"bias must be \[E\] = \(2,\), got \(3,\)"),
        ((torch.ones(3, 4), torch.ones(2, 4).int()), TypeError, "weight must be floating point, got torch.int32"),
        ((torch.ones(3, 4), torch.ones(2, 4, device="meta")), ValueError, "weight must be on the device of x"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=f"router_logits: {message}"):
        router_logits(*arguments)


triton = pytest.importorskip("triton")

from headgate.kernels.router_logits.on_triton import choose_logits, router_logits_on_triton, serves  # noqa: E402


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="Triton's interpreter is off")
class TestTriton:
    @pytest.mark.parametrize("shape", [(1, 70, 5), (3, 64, 8), (9, 33, 13), (64, 40, 6)], ids=str)
    @pytest.mark.parametrize(
        "dtypes", [(torch.float32,) * 2, (torch.float16,) * 2, (torch.float32, torch.float16)], ids=str
    )
    def test_equals_the_product(self, shape, dtypes, assert_close):
        tokens, hidden, experts = shape
        x, w = torch.randn(tokens, hidden).to(dtypes[0]), torch.randn(experts, hidden).to(dtypes[1])
        b = torch.randn(experts).to(dtypes[1])
        for bias in (None, b):
            got = router_logits_on_triton(x, w, bias, chip=replace(A100, processors=4))
            want = x.double() @ w.double().T + (0 if bias is None else bias.double())
            assert got.dtype == torch.float32
            assert_close(got, want, dtype=torch.float32)
        assert torch.equal(got, router_logits_on_triton(x, w, b, chip=replace(A100, processors=4)))

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    def test_strides_and_nan_of_another_row(self, assert_close):
        x, w = torch.randn(20, 6).T, torch.randn(5, 40)[:, ::2]
        x[4], w[3] = torch.nan, torch.inf
        got = router_logits_on_triton(x, w, None, chip=H200)
        assert got[4].isnan().all()
        others = [0, 1, 2, 4]
        assert_close(got[:4][:, others], x[:4].double() @ w[others].double().T, dtype=torch.float32)

    def test_one_launch_on_meta_tensors(self):
        launches = []
        x, w = torch.empty(1, 2048, device="meta"), torch.empty(128, 2048, device="meta")
        y = router_logits_on_triton(x, w, None, chip=H200, launch=lambda k, grid, **_: launches.append(grid))
        assert (tuple(y.shape), launches) == ((1, 128), [(128, 1)])


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
@pytest.mark.parametrize("tokens", [1, 2, 7, 64])
@pytest.mark.parametrize(("experts", "hidden"), [(8, 4096), (128, 2048), (256, 7168), (512, 2048)])
def test_programs_cover_and_spread(chip, tokens, experts, hidden):
    tile = choose_logits(tokens, experts, hidden, 8, chip)
    programs = -(-tokens // tile.tokens) * -(-experts // tile.experts)
    assert tile.experts == 1 or programs >= chip.processors
    assert tile.tokens * tile.experts <= 32
    assert tile.chunks == 32 * tile.warps


def test_serves_what_it_can():
    assert serves(torch.empty(64, 8))
    assert not serves(torch.empty(65, 8))
    assert not serves(torch.empty(4, 8, dtype=torch.float64))
