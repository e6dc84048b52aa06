"""What torch.func's transforms and forward-mode AD find in place of an operator.

An operator's kernels see plain numbers: torch would hand them no tangent (so that a derivative came out as zero) and
takes no gradient of theirs inside torch.func. So every operator also has a composite form: operations of torch, which
any transform can differentiate and batch. It runs where a transform is at work; elsewhere nothing of it is asked.

    register_composite        torch.func: grad, vjp, jvp, vmap and what is made of them; of the operator itself, too
    run                       forward-mode AD without torch.func (torch.autograd.forward_ad), in public functions
    implement                 a kernel, which refuses a tensor that carries a tangent
    backward_of               the composite form of a backward operator, from that of its operator
    register_second_backward  second derivatives, by the composite form
    refuse_transforms         for what has no such form
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from .chip import say_once

_FUNC = "FuncTorchDynamicLayerFrontMode"  # the dispatch key at which torch.func takes up a call


def _in_forward_mode() -> bool:
    return getattr(forward_ad, "_current_level", -1) >= 0


def under_transform() -> bool:
    """Whether a transform of torch.func, or a level of forward-mode AD, is at work: a tensor may be more than it shows,
    and must not be kept beyond the call."""
    return _in_forward_mode() or torch._C._are_functorch_transforms_active()


def _tensors(args: Any) -> list[Tensor]:
    return [t for t in tree_leaves(args) if isinstance(t, Tensor)]


def _has_tangent(t: Tensor) -> bool:
    return t.is_floating_point() and forward_ad.unpack_dual(t).tangent is not None


def _any_tangent(args: Any) -> bool:
    return any(map(_has_tangent, _tensors(args)))


def _is_transformed(t: Tensor) -> bool:
    """Whether a transform is at work on t: a batch or a graph at any of torch.func's levels, or a tangent; or a graph
    below them, of which torch.func lets an operator make no node.

    Whatever is made inside a transform is a tensor of its level, but need not have any of these. A tangent below
    another level does not show: with one about, every such tensor counts.
    """
    while torch._C._functorch.is_functorch_wrapped_tensor(t):
        if _in_forward_mode() or torch._C._functorch.is_batchedtensor(t) or t.requires_grad:
            return True
        t = torch._C._functorch.get_unwrapped(t)
    return t.requires_grad or (_in_forward_mode() and _has_tangent(t))


def _any_transformed(args: Any) -> bool:
    return any(map(_is_transformed, _tensors(args)))


def _inside(t: Any) -> Any:
    """A tensor without torch.func's levels."""
    while isinstance(t, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(t):
        t = torch._C._functorch.get_unwrapped(t)
    return t


def refuse_transforms(who: str, instead: str, *args: Any) -> None:
    """Raises NotImplementedError, in the name of `who`, inside torch.func and where one of `args` carries a tangent."""
    if torch._C._are_functorch_transforms_active() or (_in_forward_mode() and _any_tangent(args)):
        raise NotImplementedError(
            f"{who}: tensors must not be those of a transform (torch.func, forward-mode AD), got some; {instead}"
        )


def register_composite(op: str, composite: Callable[..., Any]) -> None:
    """Makes headgate::`op` `composite`, of the same arguments, for tensors of a transform of torch.func."""

    def under_func(*args: Any) -> Any:
        if not _any_transformed(args):  # one is at work, but on other tensors
            with torch._C._DisableFuncTorch():
                return getattr(torch.ops.headgate, op)(*tree_map(_inside, args))
        say_once(op, "a transform of torch.func is at work", "operations of torch that it can take apart")
        return composite(*args)

    torch.library.impl(f"headgate::{op}", _FUNC, under_func)


def run(op: Callable[..., Any], composite: Callable[..., Any], *args: Any) -> Any:
    """op(*args), or composite(*args) where one of args carries a tangent; in a graph, where one may."""
    carried = _in_forward_mode() and (torch.compiler.is_compiling() or _any_tangent(args))
    return composite(*args) if carried else op(*args)


def implement(op: str, key: str, kernel: Callable[..., Any]) -> None:
    """Registers a kernel of headgate::`op` for dispatch key `key`."""

    def of_plain_numbers(*args: Any) -> Any:
        if _in_forward_mode() and _any_tangent(args):
            raise NotImplementedError(
                f"headgate::{op}: tensors must carry no tangent, which the kernel would lose, got one that does"
            )
        return kernel(*args)

    torch.library.impl(f"headgate::{op}", key, of_plain_numbers)


def readable(t: Tensor) -> bool:
    """Whether the values of integers `t` can be looked at: not under vmap, nor where a graph is traced or captured."""
    if torch.compiler.is_compiling() or (t.is_cuda and torch.cuda.is_current_stream_capturing()):
        return False
    try:
        return type(t.sum().item()) is int
    except RuntimeError:
        return False


def backward_of(function: Callable[..., Any], places: Sequence[int]) -> Callable[..., tuple[Tensor, ...]]:
    """(grad, *args, needs) -> the gradients of function(*args) for the args at `places`, empty where not needed."""

    def backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
        *inputs, needs = args
        found = _pull_back(function, inputs, [p for p, need in zip(places, needs, strict=True) if need], grad)
        return tuple(grad.new_empty(0) if d is None else d for d in map(found.get, places))

    return backward


def register_second_backward(op: str, composite: Callable[..., Any], places: Sequence[int]) -> None:
    """Makes headgate::`op` (grad, *args, needs) differentiable, in grad and the args at `places`, as `composite` is."""
    behind = (0, *(p + 1 for p in places))  # `places` are those of args

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        leaves, ctx.form = tree_flatten(inputs)
        ctx.save_for_backward(*(t if isinstance(t, Tensor) else None for t in leaves))
        ctx.others = [None if isinstance(t, Tensor) else t for t in leaves]
        ctx.set_materialize_grads(False)

    def second_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        leaves = [o if t is None else t for t, o in zip(ctx.saved_tensors, ctx.others, strict=True)]
        args = tree_unflatten(leaves, ctx.form)
        asked = [i for i, grad in enumerate(grads) if grad is not None]
        if not asked:
            return tuple(map(_none_for, args))

        def function(*args: Any) -> tuple[Tensor, ...]:
            out = composite(*args)
            return tuple(out[i] for i in asked)

        wanted = [p for p in behind if ctx.needs_input_grad[p]]
        found = _pull_back(function, args, wanted, tuple(grads[i] for i in asked))
        return tuple(found.get(i, _none_for(arg)) for i, arg in enumerate(args))

    torch.library.register_autograd(f"headgate::{op}", second_backward, setup_context=setup_context)


def _pull_back(
    function: Callable[..., Any], args: Sequence[Any], places: Sequence[int], grads: Any
) -> dict[int, Tensor]:
    """The gradients of the args at `places` that are there, for `grads` of function(*args); in plain torch, to be
    differentiated again."""
    places = [p for p in places if args[p] is not None]

    def of_them(*values: Tensor) -> Any:
        given = dict(zip(places, values, strict=True))
        return function(*(given.get(i, arg) for i, arg in enumerate(args)))

    pull: Any = torch.func.vjp(of_them, *(args[p] for p in places))[1]
    return dict(zip(places, pull(grads), strict=True))


def _none_for(arg: Any) -> Any:
    """No gradient, as autograd wants it for an argument of an operator: one None for each of a list of tensors."""
    tensors = isinstance(arg, list) and all(isinstance(t, Tensor) for t in arg)
    return [None] * len(arg) if tensors else None
