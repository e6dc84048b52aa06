"""Every operator under the transforms of torch.func and under forward-mode AD, against its reference in a loop."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from func_transforms import EACH, ONE, batched, looped
from torch.autograd import forward_ad
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import headgate.kernels as kernels
from headgate.kernels import GPT_OSS, Activation, Routing
from headgate.kernels.activation import as_activation
from headgate.kernels.chip import say_once
from headgate.kernels.expert_gradients import combine_gradients_reference
from headgate.kernels.expert_outputs import combine_outputs_reference
from headgate.kernels.grouped_ffn import grouped_ffn_reference
from headgate.kernels.grouped_linear import grouped_linear_reference
from headgate.kernels.lora_ffn import Delta, lora_ffn, lora_ffn_reference
from headgate.kernels.plan import plan_reference
from headgate.kernels.router_logits import router_logits_reference
from headgate.kernels.topk import topk_reference

R, D, F, E, K = 4, 3, 2, 4, 2


def new(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def chosen(scores):
    """(ids, weights) of scores [R, E]: under vmap the ids are a batch, too."""
    ids = scores.detach().argsort(1)[:, :K]
    return torch.where(ids == 1, -1, ids), scores.gather(1, ids)


def ffn(**form):
    """(the operator, its reference, floats) of grouped_ffn in one form."""
    act = as_activation(form.get("activation", "silu"), form.get("gated", True))
    pair, bias = form.pop("pair", False), form.pop("bias", False)
    turned = {n: form[n] for n in ("transposed", "interleaved") if n in form}
    wide = 2 * F if act.gated and not pair else F

    def parts(scores, rows, w2, *rest):
        w1, rest = ((rest[0], rest[1]), rest[2:]) if pair else (rest[0], rest[1:])
        return (*chosen(scores), rows, w1, w2, dict(zip(("b_gate_up", "b_down"), rest, strict=False)))

    def operator(*args):
        ids, weights, rows, w1, w2, biases = parts(*args)
        return kernels.grouped_ffn(rows, Routing(ids.int(), weights, E), w1, w2, **biases, **form)

    def reference(*args):
        ids, weights, rows, w1, w2, biases = parts(*args)
        return grouped_ffn_reference(rows, ids, weights, w1, w2, **biases, activation=act, **turned)

    weights = [new(E, D, F), *(new(E, wide, D) for _ in range(1 + pair))]
    if form.get("transposed"):
        weights = [w.mT.contiguous() for w in weights]
    biases = [new(E, wide), new(E, D)] if bias else []
    return operator, reference, (new(R, E), new(R, D), *weights, *biases)


def ffn_backward():
    """The operator of the backward pass, as a graph from a file calls it."""
    form = ("silu", Activation().params, True, False, False)

    def inputs(scores, rows, w2, w1):
        ids, weights = chosen(scores)
        return rows, ids.int(), weights, w1, None, w2, None, None

    def operator(grad, *args):
        with torch.no_grad():  # h, which the transform finds anew
            h = torch.ops.headgate.grouped_ffn(*inputs(*args), *form, True)[1]
        needs = [True, True, True, False, True, False, False]
        out = torch.ops.headgate.grouped_ffn_backward(grad, *inputs(*args), h, *form, needs)
        return torch.cat([t.flatten() for t in out])

    def reference(grad, *args):
        rows, ids, weights, w1, _, w2, _, _ = inputs(*args)

        def y(rows, weights, w1, w2):
            return grouped_ffn_reference(rows, ids, weights, w1, w2, activation=Activation())

        return torch.cat([t.flatten() for t in torch.func.vjp(y, rows, weights, w1, w2)[1](grad)])

    return operator, reference, (new(R, D), new(R, E), new(R, D), new(E, D, F), new(E, 2 * F, D))


def quantized(backward=False):
    w1, w2 = (kernels.quantize(torch.randn(E, o, 32), "int8", block=(1, 32)) for o in (64, 32))
    dense1, dense2 = (w.dequantize(torch.float32).double() for w in (w1, w2))

    def operator(scores, rows, b2):
        ids, weights = chosen(scores)
        return kernels.grouped_ffn(rows, Routing(ids.int(), weights, E), w1, w2, b_down=b2)

    def reference(scores, rows, b2):
        return grouped_ffn_reference(rows, *chosen(scores), dense1, dense2, None, b2, activation=Activation())

    return operator, reference, (new(R, E), 0.1 * new(R, 32), new(E, 32))


def quantized_backward():
    operator, reference, (scores, rows, b2) = quantized()

    def pulled(f):
        return lambda grad, *args: torch.cat([t.flatten() for t in torch.func.vjp(f, *args)[1](grad)])

    return pulled(operator), pulled(reference), (new(R, 32), scores, rows, b2)


def lora(**form):
    """lora_ffn on frozen weights, one adapter or two with gates."""
    skills = form.pop("skills", 1)
    w1, w2 = new(E, 2 * F, D), new(E, D, F)
    which = torch.randint(skills, (R,)) if skills > 1 else None

    def parts(scores, rows, a1, b1, a2, b2, *gates):
        several = {"skill_of_row": which, "gates": gates[0]} if gates else {}
        return (*chosen(scores), rows, Delta(a1, b1, 0.7), Delta(a2, b2, 1.5), several)

    def operator(*args):
        ids, weights, rows, up, down, several = parts(*args)
        return lora_ffn(rows, Routing(ids.int(), weights, E), w1, w2, up, down, **several)

    def reference(*args):
        ids, weights, rows, up, down, several = parts(*args)
        return lora_ffn_reference(rows, ids, weights, w1, w2, up, down, activation=Activation(), **several)

    n = E * skills
    factors = new(n, 2, D), new(n, 2 * F, 2), new(n, 2, F), new(n, D, 2)
    return operator, reference, (new(R, E), new(R, D), *factors, *([new(R)] if skills > 1 else []))


def lora_backward():
    operator, reference, args = lora()

    def pulled(f):
        return lambda grad, *args: torch.cat([t.flatten() for t in torch.func.vjp(f, *args)[1](grad)])

    return pulled(operator), pulled(reference), (new(R, D), *args)


def linear():
    offsets = torch.tensor([0, 1, 1, 3, 4], dtype=torch.int32)
    return (
        lambda x, w, b: kernels.grouped_linear(x, offsets, w, b),
        lambda x, w, b: grouped_linear_reference(x, offsets, w, b),
        (new(R + 1, D), new(E, F, D), new(E, F)),
    )


def linear_planned(scores, x, w, form):
    """Offsets that come from floats: under vmap they are a batch."""
    order, offsets, inverse = form[0](scores.detach().argsort(1)[:, :K].int(), E)
    return form[1](x[(order // K).long()], offsets, w)[inverse.long()] * scores.sum()


def planned():
    mine = (lambda ids, e: tuple(vars(kernels.plan(ids, e)).values()), kernels.grouped_linear)
    theirs = (plan_reference, grouped_linear_reference)
    return (
        lambda scores, x, w: linear_planned(scores, x, w, mine),
        lambda scores, x, w: linear_planned(scores, x, w, theirs),
        (new(R, E), new(R, D), new(E, F, D)),
    )


def choice(**form):
    def operator(logits):
        routing = kernels.topk(logits, K, **form)
        return torch.cat([routing.weights, routing.scores, routing.counts.expand(R, E)], 1)

    def reference(logits):
        weights, scores, _ids, counts = topk_reference(logits, K, **form)
        return torch.cat([weights, scores, counts.expand(R, E)], 1)

    return operator, reference, (new(R, E),)


def logits():
    return kernels.router_logits, router_logits_reference, (new(R, D), new(E, D), new(E))


def combined():
    ids = torch.rand(R, E).argsort(1)[:, :K].int()
    return (
        lambda out, weights: kernels.combine_outputs(out, Routing(ids, weights, E), torch.float64),
        lambda out, weights: combine_outputs_reference(out, ids, weights, E, torch.float64),
        (new(R * K, D), new(R, K)),
    )


def summed():
    ids = torch.rand(R, E).argsort(1)[:, :K].int()
    return (
        lambda d_rows: kernels.combine_gradients(d_rows, Routing(ids, torch.ones(R, K), E), torch.float64),
        lambda d_rows: combine_gradients_reference(d_rows, ids, E, torch.float64),
        (new(R * K, D),),
    )


# Operator -> the forms in which it is called here: each a function that makes (the call, its reference, floats). A new
# operator is to be listed; what none of torch.func can do with it is in REFUSED.
OPERATORS = {
    "grouped_ffn": {
        "silu": ffn,
        "gpt-oss": lambda: ffn(activation=GPT_OSS, bias=True, interleaved=True, transposed=True),
        "pair": lambda: ffn(pair=True, activation="gelu"),
        "ungated": lambda: ffn(gated=False, activation="gelu_tanh", bias=True),
    },
    "grouped_ffn_backward": {"silu": ffn_backward},
    "grouped_ffn_quantized": {"int8": quantized},
    "grouped_ffn_quantized_backward": {"int8": quantized_backward},
    "grouped_linear": {"bias": linear},
    "grouped_linear_backward": {"planned": planned},
    "lora_ffn": {"one": lora, "two with gates": lambda: lora(skills=2)},
    "lora_ffn_backward": {"one": lora_backward},
    "plan": {"planned": planned},
    "topk": {
        "softmax": lambda: choice(renormalize=True),
        "sigmoid": lambda: choice(score="sigmoid", groups=2, topk_groups=1, scale=2.5),
    },
    "router_logits": {"bias": logits},
    "combine_outputs": {"weighted": combined},
    "combine_gradients": {"summed": summed},
}
REFUSED = ("expert_outputs", "expert_gradients")
# What is refused by name instead: (operator, transform) -> what the error says.
_GRADIENT = (ValueError, "combine_.*: (out|d_rows) must not ask for a gradient")
_SUMS = ("combine_outputs", "combine_gradients")
EXCEPT = {
    **{(op, name): _GRADIENT for op in _SUMS for name in ONE if name not in ("jvp", "jacfwd", "forward_ad")},
    **{(op, each): _GRADIENT for op in _SUMS for each in EACH if each not in ("value", "jvp")},
    ("grouped_ffn_backward", "forward_ad"): (NotImplementedError, "headgate::grouped_ffn.*: tensors must carry no tan"),
    # torch's vmap of before torch.func knows no operator with lists of tensors
    **{
        (op, "backward of a batch of gradients"): (RuntimeError, "Batching rule not implemented")
        for op in ("grouped_ffn_quantized", "lora_ffn")
    },
}


def cases(names):
    for name in names:
        for op, forms in OPERATORS.items():
            for form, make in forms.items():
                yield pytest.param(name, make, EXCEPT.get((op, name)), id=f"{name}, {op} {form}")


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def close(got, want):
    assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("name", "make", "refused"), cases(ONE))
def test_as_the_reference(name, make, refused):
    operator, reference, args = make()
    if refused:
        with pytest.raises(refused[0], match=refused[1]):
            ONE[name](operator, args)
    else:
        close(ONE[name](operator, args), ONE[name](reference, args))


@pytest.mark.parametrize(("each", "make", "refused"), cases(EACH))
def test_many_at_once_as_one_after_the_other(each, make, refused):
    operator, reference, args = make()
    if refused:
        with pytest.raises(refused[0], match=refused[1]):
            batched(each, operator, args)
    else:
        close(batched(each, operator, args), looped(each, reference, args))


def test_every_operator_is_in_the_table():
    there = {n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if n.startswith("headgate::")}
    assert there == {*OPERATORS, *REFUSED}


@pytest.mark.parametrize(
    "transformed",
    [
        lambda f, x: ONE["jvp"](f, (x,)),
        lambda f, x: ONE["grad"](f, (x,)),
        lambda f, x: ONE["forward_ad"](f, (x,)),
        lambda f, x: batched("value", f, (x,)),
        lambda f, x: ONE["jvp"](torch.func.vmap(f), (x[None],)),
    ],
    ids=["jvp", "grad", "forward_ad", "vmap", "jvp of vmap"],
)
@pytest.mark.parametrize("itself", [False, True])
def test_what_is_forward_only_refuses_a_transform_by_name(transformed, itself):
    routing, w1, w2 = kernels.topk(torch.randn(R, E), K), new(E, 2 * F, D), new(E, D, F)
    slots = torch.arange(E, dtype=torch.int32)

    def f(x):
        out = torch.zeros(R * K, D, dtype=torch.float64)
        if itself:
            form = ([], [], "silu", Activation().params, True, False, False)
            torch.ops.headgate.expert_outputs(x, routing.expert_ids, [w1], [], [w2], None, None, slots, out, *form)
        else:
            kernels.expert_outputs(x, routing, w1, w2, slots, out)
        return out

    words = r"expert_outputs: (tensors must .*grouped_ffn|tensors must carry no tangent|rows must not ask)"
    with pytest.raises((NotImplementedError, ValueError), match=words):
        transformed(f, new(R, D))


def test_gradients_of_experts_refuse_a_transform_by_name():
    routing, w1, w2, rows = kernels.topk(torch.randn(R, E), K), new(E, 2 * F, D), new(E, D, F), new(R, D)
    slots = torch.arange(E, dtype=torch.int32)

    def f(grad):
        d_rows = torch.zeros(R * K, D, dtype=torch.float64)
        kernels.expert_gradients(grad, rows, routing, w1, w2, slots, d_rows=d_rows)
        return d_rows

    words = r"expert_gradients: (tensors must .*grouped_ffn|tensors must carry no tangent|grad must not ask)"
    for transformed in (lambda: ONE["jvp"](f, (new(R, D),)), lambda: batched("value", f, (new(R, D),))):
        with pytest.raises((NotImplementedError, ValueError), match=words):
            transformed()


def test_the_operator_itself_refuses_a_tangent():
    """Its kernels would lose it, and the derivative would be zero. torch.func finds the operator's other form."""
    x, w = new(R, D), new(E, D)
    with pytest.raises(NotImplementedError, match="headgate::router_logits: tensors must carry no tangent"):
        ONE["forward_ad"](lambda x: torch.ops.headgate.router_logits(x, w, None), (x,))
    got, want = (ONE["jvp"](lambda x, f=f: f(x, w, None), (x,)) for f in (torch.ops.headgate.router_logits, F_LINEAR))
    close(got, want)


F_LINEAR = torch.nn.functional.linear


def test_tensors_beside_a_transform_keep_the_kernels():
    """A frozen part of what is differentiated runs as it would alone: to the bit, and nothing is said."""
    w1, w2, rows = torch.randn(E, 2 * F, D), torch.randn(E, D, F), torch.randn(R, D)
    routing = kernels.topk(torch.randn(R, E), K)

    def loss(scale):
        y = kernels.grouped_ffn(rows + 0, routing, w1, w2)  # rows of the transform's level, but not of its graph
        seen.append(y)
        slots, out = torch.arange(E, dtype=torch.int32), torch.empty(R * K, D)
        kernels.expert_outputs(rows, routing, w1, w2, slots, out)
        return (scale * y).sum()

    seen = []
    want = kernels.grouped_ffn(rows, routing, w1, w2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = torch.func.grad(loss)(torch.tensor(2.0))
        with forward_ad.dual_level():
            loss(torch.tensor(2.0))
    assert all(torch.equal(y, want) for y in seen)
    assert_close(got, want.sum())


def test_parameters_beside_a_transform_still_learn():
    """torch.func lets no operator add to a graph outside of it: the parameters are reached in plain torch."""
    operator, reference, args = ffn(bias=True)
    found = []
    for f in (operator, reference):
        leaves = [t.clone().requires_grad_() for t in args]
        slope, y = torch.func.grad_and_value(lambda s, f=f, leaves=leaves: (s * f(*leaves)).sum())(torch.tensor(2.0))
        (slope + y).backward()
        found.append([t.grad for t in leaves])
    close(*found)


def test_says_once_that_it_is_slower():
    say_once.cache_clear()
    with pytest.warns(UserWarning, match="grouped_ffn: a transform of torch.func is at work"):
        ONE["grad"](*(lambda f, _, args: (f, args))(*ffn()))


def test_what_overflows_for_others_leaves_no_trace():
    """Under vmap every expert meets all rows; what becomes infinite for rows that are not its own must not count."""
    operator, reference, (scores, rows, w2, w1) = ffn(activation="relu2")
    w1 = w1.clone()
    w1[1] = 1e200  # nobody's expert
    args = (scores, rows, w2, w1)
    close(batched("gradient", operator, args), looped("gradient", reference, args))


@pytest.mark.parametrize("cpu_form", ["plain", "native"], indirect=True)
def test_second_derivatives_after_the_kernels(cpu_form):
    operator, reference, args = ffn(activation=GPT_OSS, bias=True)
    args = tuple(t.float() for t in args)
    got, want = (ONE["double backward"](f, args) for f in (operator, reference))
    assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["grad", "jvp", "forward over reverse"])
def test_compiled_whole(name):
    operator, _, args = ffn()
    compiled = torch.compile(lambda *args: ONE[name](operator, args), fullgraph=True, backend="aot_eager")
    close(compiled(*args), ONE[name](operator, args))


class _Floats(TorchDispatchMode):
    """The numbers that operators of ours are called with."""

    def __init__(self):
        super().__init__()
        self.seen, self.empty = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "headgate":
            self.seen += [a for a in tree_leaves(args) if isinstance(a, float)]
            self.empty += [func for a in args if isinstance(a, list) and not a and "expert_outputs" not in str(func)]
        return func(*args, **(kwargs or {}))


def outputs():
    routing, slots = kernels.topk(torch.randn(R, E), K), torch.arange(E, dtype=torch.int32)
    return (
        lambda x, w1, w2: kernels.expert_outputs(x, routing, w1, w2, slots, new(R * K, D)),
        None,
        (new(R, D), new(E, 2 * F, D), new(E, D, F)),
    )


@pytest.mark.parametrize("make", [*(p.values[1] for p in cases(["value"])), outputs])
def test_numbers_in_a_graph_are_finite(make):
    """A graph in a file is JSON, which knows no infinity; and AOTInductor forgets a list that is empty."""
    operator, _, args = make()
    with _Floats() as floats:
        operator(*args)
    assert all(map(math.isfinite, floats.seen))
    assert not floats.empty


@pytest.mark.parametrize("name", ["grouped_ffn", "grouped_linear"])
def test_second_derivatives_as_torch_checks_them(name):
    """Undefined gradients, too: a sum of derivatives may have none of some output."""
    torch.manual_seed(0)
    ids = torch.tensor([[0, 1], [2, 0], [1, 3]], dtype=torch.int32)
    weights, rows, w2, w1 = (t.requires_grad_() for t in (new(3, 2), new(3, D), new(E, D, F), new(E, 2 * F, D)))

    def ffn(rows, weights, w1, w2):
        return kernels.grouped_ffn(rows, Routing(ids, weights, E), w1, w2)

    def linear(rows, w1):
        return kernels.grouped_linear(rows, torch.tensor([0, 1, 1, 2, 3], dtype=torch.int32), w1)

    call, args = (ffn, (rows, weights, w1, w2)) if name == "grouped_ffn" else (linear, (rows, w1))
    assert torch.autograd.gradgradcheck(call, args)
