"""lora_ffn against its reference: forward, every gradient, odd shapes, few bits, dropout, as an operator, bad input."""

from __future__ import annotations

import pytest
import torch
from lora_cases import Case

from headgate.kernels import Routing, grouped_ffn
from headgate.kernels.lora_ffn import Delta, lora_ffn
from headgate.kernels.quantized import quantize

FORMS = {
    "plain": {},
    "transposed, interleaved, biases": dict(transposed=True, interleaved=True, bias=True, activation="gpt_oss"),
    "a pair": dict(pair=True),
    "ungated": dict(gated=False, activation="relu2", bias=True),
    "skills and gates": dict(skills=3, bias=True),
    "up only": dict(targets=("up",)),
    "down only": dict(targets=("down",), skills=2),
    "no row": dict(rows=0),
    "one row": dict(rows=1),
    "all rows on one expert": dict(one_expert=True, top_k=1, rows=70),
    "odd sizes": dict(rows=33, hidden=70, inner=7, rank=1),
}


def call(case: Case, **more):
    return lora_ffn(case.x, case.routing(), case.first, case.w2, *case.deltas.values(), **case.options(), **more)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_forward_and_gradients_equal_the_reference(form, dtype, assert_close):
    case = Case(dtype=dtype, factors=torch.float32 if dtype.itemsize == 2 else None, **form)
    y, want = call(case), case.reference()
    assert y.dtype == dtype
    assert_close(y, want)
    grad, leaves = torch.randn_like(y), case.leaves
    got = torch.autograd.grad(y, [*leaves.values()], grad)
    for (name, _), g, ref in zip(leaves.items(), got, torch.autograd.grad(want, [*leaves.values()], grad), strict=True):
        assert_close(g, ref, name=name, dtype=dtype)


def test_it_is_grouped_ffn_on_weights_with_the_change_added(assert_close):
    case = Case(bias=True)
    up, down = case.deltas.values()
    w1, w2 = (w + d.scale * d.b @ d.a for w, d in ((case.w1, up), (case.w2, down)))
    want = grouped_ffn(case.x, case.routing(), w1, w2, b_gate_up=case.b1, b_down=case.b2, activation="silu")
    assert_close(call(case), want)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_on_weights_in_few_bits(format, assert_close):
    case = Case(hidden=64, inner=32)
    packed = [quantize(w, format, block=(1, 32)) for w in (case.w1, case.w2)]
    case.w1, case.w2 = (q.dequantize(torch.float32) for q in packed)
    y = lora_ffn(case.x, case.routing(), *packed, *case.deltas.values(), activation="silu")
    want, leaves = case.reference(), case.leaves
    assert_close(y, want)
    grad = torch.randn_like(y)
    got = torch.autograd.grad(y, [*leaves.values()], grad)
    for g, ref in zip(got, torch.autograd.grad(want, [*leaves.values()], grad), strict=True):
        assert_close(g, ref)


def test_what_is_kept_is_rows_pre_activation_and_routing():
    case = Case(rows=40, hidden=16, inner=32, experts=8)
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call(case)
    here = [case.w1, case.w2, *(t for d in case.deltas.values() for t in d[:2])]
    for t in here:
        kept.pop(t.untyped_storage().data_ptr())
    assert sum(kept.values()) == sum(t.nbytes for t in (case.x, case.ids, case.weights)) + 4 * 40 * 2 * 64


def test_dropout_is_of_what_a_takes_the_same_forward_and_back():
    case = Case(dtype=torch.float64, rows=4, hidden=4, inner=3, experts=3, rank=2)

    def loss(*leaves):
        torch.manual_seed(7)
        return call(case, dropout=0.5)

    assert torch.autograd.gradcheck(loss, [*case.leaves.values()])
    torch.manual_seed(1)
    with torch.no_grad():
        only_down = Case(dtype=torch.float64, rows=4, targets=("down",))
        many = torch.stack([call(only_down, dropout=0.5) for _ in range(400)])
    assert not torch.equal(many[0], many[1])
    assert (many.mean(0) - call(only_down)).abs().max() < 0.2 * call(only_down).abs().max()


def test_only_the_gradients_asked_for_and_none_of_the_weights():
    case = Case()
    case.x.requires_grad_(False)
    case.deltas["up"].a.requires_grad_(False)
    call(case).sum().backward()
    assert case.x.grad is None
    assert case.deltas["up"].a.grad is None
    assert case.deltas["up"].b.grad is not None
    case.w1.requires_grad_()
    with pytest.raises(ValueError, match="lora_ffn: w_gate_up must be frozen, whose gradient is never computed"):
        call(case)


@pytest.mark.parametrize("skills", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_operator_is_well_formed(skills):
    case = Case(rows=4, skills=skills)
    args = case.arguments(True)
    for i in (0, 2, 8, 9, 10, 11, 12):
        if args[i] is not None:
            args[i].requires_grad_()
    torch.library.opcheck(torch.ops.headgate.lora_ffn.default, tuple(args))


def test_compiled_whole():
    case = Case()
    run = torch.compile(lambda: call(case), backend="aot_eager", fullgraph=True)
    assert torch.equal(run(), call(case))


def test_under_autocast_as_without_it_in_its_type(assert_close):
    case = Case(bias=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = call(case)
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    half = Case(bias=True)
    for name in ("x", "w1", "w2", "b1", "b2"):
        setattr(half, name, getattr(case, name).detach().bfloat16())
    half.ids, half.weights, half.deltas = case.ids, case.weights.detach(), case.deltas
    assert torch.equal(y, call(half))
    assert case.deltas["up"].a.grad.isfinite().all()


def test_skills_without_a_change_and_skills_that_are_not_there(assert_close):
    case = Case(skills=2, targets=())
    form = {**case.form, "b_gate_up": case.b1, "b_down": case.b2}
    want = grouped_ffn(case.x, case.routing(), case.w1, case.w2, **form)
    assert_close(call(case), want)
    case = Case(skills=2)
    for bad in (-1, 2):
        case.skills[3] = bad
        with pytest.raises(IndexError, match=rf"lora_ffn: skill_of_row must be in 0 \.\. 1, got {bad}"):
            call(case)


def test_bad_input_is_named():
    case = Case(skills=2)
    up, down = case.deltas.values()
    rows, routing, options = case.x, case.routing(), case.options()

    def fails(match, error=ValueError, up=up, down=down, **changed):
        with pytest.raises(error, match=match):
            lora_ffn(rows, routing, case.w1, case.w2, up, down, **options | changed)

    fails("lora_ffn: skill_of_row must be given for 2 skills, got None", skill_of_row=None)
    fails(r"lora_ffn: up must be a .* and b .*, got", up=Delta(up.b, up.a, 1.0))
    fails(r"lora_ffn: down must be a \[E\*S, r, in\]", down=Delta(down.a[:3], down.b, 1.0))
    fails("lora_ffn: up and down must have as many skills, got 2 and 1", down=Delta(down.a[:5], down.b[:5], 1.0))
    fails(r"lora_ffn: gates must be \[R\] with R=33, got \(3,\)", gates=torch.ones(3))
    fails("lora_ffn: skill_of_row must be integers", TypeError, skill_of_row=torch.ones(33))
    fails(r"lora_ffn: dropout must be in \[0, 1\), got 1", dropout=1)
    with pytest.raises(ValueError, match=r"routing\.num_experts must equal w_down's experts, got 4 and 5"):
        lora_ffn(rows, Routing(case.ids, case.weights, 4), case.w1, case.w2, up, down, **options)
