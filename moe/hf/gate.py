"""Which activation a module's experts really use, found by asking the module.

Configurations lie about it (gpt-oss says `silu` and means a clamped one with a slope and a shift), so the module's own
gate is evaluated on a grid and compared with every form that `Activation` can say. What agrees everywhere is run by the
fused operation; anything else (a softcap, dropout, learned slopes, hooks) keeps its own code.
"""

from __future__ import annotations

import ctypes
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.activation import KINDS, Activation

# Attributes whose names hold one of these words may be a limit or a slope: `limit`, `swiglu_limit`, `swiglu_alpha`, ...
_WORDS = ("limit", "alpha", "clamp", "clip", "slope", "beta")
_GRID = (0.0, 1e-3, 0.1, 0.5, 1.0, 2.0, 3.0, 5.0, 7.5, 12.0, 40.0, 300.0, 1e4)
_CACHE = "_headgate_gate"


def identify(
    function: Callable[[Tensor, Tensor], Tensor], gated: bool, numbers: Iterable[float] = ()
) -> Activation | None:
    """The Activation that equals `function` (gate [n], up [n]) -> [n] on a grid in fp32, or None.

    Ungated functions get the same first argument and ignore the second. `numbers` are candidates for limit and slope.
    """
    numbers = sorted({float(n) for n in numbers if 0 < n < math.inf})
    points = sorted({*_GRID, *(f * n for n in numbers for f in (0.5, 0.99, 1.0, 1.01, 2.0))})
    points = [-p for p in points if p] + points
    gate, up = torch.tensor(list(product(points, points)), dtype=torch.float32, device="cpu").unbind(1)
    try:
        with torch.enable_grad(), torch.autocast("cpu", enabled=False), torch.random.fork_rng(devices=[]):
            wanted = function(gate, up)
        if not isinstance(wanted, Tensor) or wanted.shape != gate.shape or wanted.device != gate.device:
            return None
        if wanted.requires_grad:  # by something learned: the inputs ask for no gradient
            return None
    except Exception:  # whatever a stranger's function raises outside its model: it keeps its own code
        return None
    allowed = 1e-6 * (1 + gate.abs()) * ((1 + up.abs()) if gated else 1) + 2e-6 * wanted.abs()
    for form in _forms(gated, numbers):
        got = form(gate, up) if gated else form(gate)
        if bool(((got - wanted).abs() <= allowed).all()):
            return form
    return None


def _forms(gated: bool, numbers: list[float]) -> Iterator[Activation]:
    """Every form there is, plain ones first."""
    alphas = {"silu": (1.0, 1.702, *numbers)}
    if not gated:
        yield from (Activation(kind, False, alpha) for kind in KINDS for alpha in alphas.get(kind, (1.0,)))
        return
    for limit, shift, kind in product((math.inf, *numbers), (0.0, 1.0), KINDS):
        for alpha in alphas.get(kind, (1.0,)):
            for after in (False, True) if limit < math.inf else (False,):
                yield Activation(kind, True, alpha, limit, shift, after)


def hooked(module: Any) -> bool:
    """Whether somebody listens to this module's calls, so that its work must go through it."""
    return isinstance(module, nn.Module) and bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _holds_tensors(module: Any) -> bool:
    """Whether the activation has parameters or buffers: a learned form may equal a plain one only today."""
    return isinstance(module, nn.Module) and any(True for _ in (*module.parameters(), *module.buffers()))


def _strange_tensors(module: nn.Module) -> bool:
    """Whether a module with a gate of its own holds tensors besides its projections, which that gate may read."""
    own = {*module._parameters, *module._buffers}
    return any(not re.fullmatch(r"(gate_up|up|down)_proj(_bias|_scale_inv|_activation_scale)?", name) for name in own)


def _numbers(thing: Any) -> dict[str, float]:
    state = vars(thing) if isinstance(thing, nn.Module) else {}
    return {k: v for k, v in state.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def activation_of(
    module: nn.Module,
    gated: bool,
    interleaved: bool = False,
    normed: bool = False,
    function: str = "act_fn",
    instead: str = "two grouped matmuls around it",
) -> Activation | None:
    """The Activation of an experts module, or None where its own gate must run (`instead`); says the latter once.

    The gate is `module._apply_gate` (transformers' contract) where there is one and `gated`, else `module.<function>`
    on the gate times up. `normed`: each expert's output is normalised before it is weighted, which no fused form does.
    The answer is kept on the module beside what it was read from (the functions, every number among the attributes,
    training or not), and found anew when one of these has changed. A compiled graph keeps the one it was traced with.
    """
    asked = (gated, interleaved, normed, function, instead)
    return _at(id(module), *asked) if torch.compiler.is_compiling() else _find(module, *asked)


@torch.compiler.assume_constant_result
def _at(address: int, *asked) -> Activation | None:
    """`_find` while a graph is traced. torch 2.11 takes no module as a constant, but its id, and guards that it stays
    the same; CPython's id is the address of the module, which the trace keeps alive."""
    return _find(ctypes.cast(address, ctypes.py_object).value, *asked)


def _find(
    module: nn.Module, gated: bool, interleaved: bool, normed: bool, function: str, instead: str
) -> Activation | None:
    act = getattr(module, function, None)
    apply_gate = getattr(module, "_apply_gate", None) if gated else None
    own_gate = getattr(apply_gate, "__func__", apply_gate)
    source = (own_gate, act, gated, interleaved, normed, hooked(act), _numbers(module), _numbers(act))
    modes = (module.training, *(m.training for m in act.modules())) if isinstance(act, nn.Module) else module.training
    kept = vars(module).setdefault(_CACHE, {})
    if modes in kept and kept[modes][0] == source:
        return kept[modes][1]
    own = "a norm after each expert" if normed else _name(own_gate if act is None else act)
    found = None
    default = own_gate is None or own_gate.__name__ == "_default_apply_gate"
    if not (normed or hooked(act) or _holds_tensors(act) or (not default and _strange_tensors(module))):
        numbers = {**_numbers(act), **_numbers(module)}
        hints = [n for name, n in numbers.items() if any(word in name for word in _WORDS)]
        found = identify(_caller(apply_gate, act, gated, interleaved), gated, hints)
    if found is None:
        warnings.warn(
            f"headgate: {type(module).__name__} has something of its own between its matmuls ({own}); its experts run "
            f"as {instead}, which is slower than the fused operation",
            stacklevel=4,
        )
    kept[modes] = (source, found)
    return found


def _caller(apply_gate, act, gated: bool, interleaved: bool) -> Callable[[Tensor, Tensor], Tensor]:
    if not gated:
        return lambda gate, _up: act(gate)
    if apply_gate is None:
        return lambda gate, up: act(gate) * up
    if interleaved:
        return lambda gate, up: apply_gate(torch.stack([gate, up], -1).flatten()[None])[0]
    return lambda gate, up: apply_gate(torch.cat([gate, up])[None])[0]


def _name(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)


def forget_gate(module: nn.Module) -> None:
    vars(module).pop(_CACHE, None)
