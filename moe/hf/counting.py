"""How often a module's work really went through Headgate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

_CALLS = "_headgate_calls"


@dataclass(eq=False)
class Calls:
    """`count` of eager calls; of calls at the same instant in two threads one may be missed. A compiled graph cannot
    count without recompiling; it leaves `compiled` behind."""

    count: int = 0
    compiled: bool = False


def counter(module: nn.Module) -> Calls:
    return vars(module).setdefault(_CALLS, Calls())


def mark(module: nn.Module) -> None:
    """One call of `module` went through Headgate."""
    if not torch.compiler.is_compiling():
        counter(module).count += 1
    elif _CALLS in vars(module):
        vars(module)[_CALLS].compiled = True


def calls(model: nn.Module) -> dict[str, int]:
    """Module name -> eager calls that went through Headgate, swapped in or chosen as experts implementation."""
    return {name: vars(m)[_CALLS].count for name, m in model.named_modules() if _CALLS in vars(m)}


def forget(module: nn.Module) -> None:
    vars(module).pop(_CALLS, None)
