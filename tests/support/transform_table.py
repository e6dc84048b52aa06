"""The operators under transforms: how each is called, its reference, and what is refused by name."""

from __future__ import annotations

import torch
from func_transforms import EACH, ONE

import headgate.kernels as kernels
from headgate.kernels import GPT_OSS, Activation, Routing
from headgate.kernels.activation import as_activation
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
