"""torch.compiler.disable, without torch's compiler where nobody compiles.

torch.compiler.disable imports torch._dynamo when it decorates: 145 MB and 1.5 s for everybody who imports a dispatcher.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, which torch.compile leaves alone, with all that it calls: a graph ends before it. It is disabled by
    the first call after torch's compiler came in, which may be a call that is being traced."""
    disabled: Callable[P, R] | None = None

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal disabled
        if disabled is None:
            if "torch._dynamo" not in sys.modules:
                return function(*args, **kwargs)
            disabled = torch.compiler.disable(function)
        return disabled(*args, **kwargs)

    return called
