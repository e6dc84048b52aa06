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
from transform_table import EXCEPT, OPERATORS, REFUSED, D, E, F, K, R, ffn, new

import headgate.kernels as kernels
from headgate.kernels import GPT_OSS, Activation, Routing
from headgate.kernels.chip import say_once


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
