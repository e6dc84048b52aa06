"""The transforms that people apply to a function of tensors, by name: what an operator, a layer and a swapped model are
compared with their plain loops under.

`ONE` maps (f, args) to tensors. `EACH` maps f to a function of one sample, which `batched` calls for all samples at
once and `looped` for one after the other.
"""

from __future__ import annotations

import torch
from torch import func
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map


def _all(args):
    return tuple(range(len(args)))


def _along(t):
    """A direction for `t`: no symmetry, no draw."""
    return torch.arange(1.0, t.numel() + 1, dtype=t.dtype).sin().view(t.shape)


def _scalar(f):
    return lambda *args: f(*args).square().sum()


def _gradient(f, args):
    return func.grad(_scalar(f), argnums=_all(args))(*args)


def _jvp(f, args):
    return func.jvp(f, args, tuple(map(_along, args)))[1]


def _forward_ad(f, args):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(*(forward_ad.make_dual(t, _along(t)) for t in args))).tangent


def _forward_over_reverse(f, args):
    return func.jvp(lambda *a: _gradient(f, a), args, tuple(map(_along, args)))[1]


def _reverse_over_reverse(f, args):
    def along(*a):
        return sum((g * _along(g)).sum() for g in _gradient(f, a))

    return func.grad(along, argnums=_all(args))(*args)


def _double_backward(f, args):
    args = [t.detach().requires_grad_() for t in args]
    slopes = torch.autograd.grad(_scalar(f)(*args), args, create_graph=True)
    return torch.autograd.grad(sum((g * _along(g)).sum() for g in slopes), args)


def _backward_in(f, args, take):
    """The graph was made outside of any transform; its backward pass runs in one."""
    args = [t.detach().requires_grad_() for t in args]
    y = f(*args)
    return take(y, args)


def _grads_batched(y, args):
    grads = torch.stack([_along(y), _along(y).flip(0)])
    return torch.autograd.grad(y, args, grads, is_grads_batched=True)


def _grad_dual(y, args):
    with forward_ad.dual_level():
        grads = torch.autograd.grad(y, args, forward_ad.make_dual(_along(y), _along(y).flip(0)))
        return [forward_ad.unpack_dual(g).tangent for g in grads]


ONE = {
    "grad": _gradient,
    "vjp": lambda f, args: func.vjp(f, *args)[1](_along(f(*args).detach())),
    "jvp": _jvp,
    "jacrev": lambda f, args: func.jacrev(f, argnums=_all(args))(*args),
    "jacfwd": lambda f, args: func.jacfwd(f, argnums=_all(args))(*args),
    "forward_ad": _forward_ad,
    "forward over reverse": _forward_over_reverse,
    "reverse over reverse": _reverse_over_reverse,
    "hessian": lambda f, args: func.hessian(_scalar(f))(*args),
    "double backward": _double_backward,
    "backward of a batch of gradients": lambda f, args: _backward_in(f, args, _grads_batched),
    "backward of a gradient with a tangent": lambda f, args: _backward_in(f, args, _grad_dual),
}

EACH = {
    "value": lambda f: f,
    "gradient": lambda f: lambda *args: _gradient(f, args),
    "jvp": lambda f: lambda *args: _jvp(f, args),
    "hessian times vector": lambda f: lambda *args: _forward_over_reverse(f, args),
}


def _samples(args):
    return [tuple(t * (1 + 0.3 * i) + 0.1 * i * _along(t) for t in args) for i in range(3)]


def batched(each, f, args):
    return func.vmap(EACH[each](f))(*map(torch.stack, zip(*_samples(args), strict=True)))


def looped(each, f, args):
    results = [EACH[each](f)(*sample) for sample in _samples(args)]
    return tree_map(lambda *same: torch.stack(same), *results)
