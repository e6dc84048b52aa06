"""Headgate as one of transformers' own experts implementations."""

from __future__ import annotations

from .experts import experts_forward
from .fp8 import fp8_experts_forward

NAME = "headgate"


def register() -> None:
    """Makes "headgate" an experts implementation of transformers, for prefill and decode, and for FP8 experts too.

    Families outside transformers' experts interface (Llama 4, DBRX, Switch, ...) ignore the choice silently and stay
    eager; `headgate.replace` takes them, and `headgate.hf.calls(model)` tells what has run. Twice is harmless.

    Raises ImportError where transformers is missing or older than its experts interface (5.0).

    >>> headgate.hf.register()
    >>> model.set_experts_implementation("headgate")   # or from_pretrained(..., experts_implementation="headgate")
    """
    try:
        from transformers.integrations.moe import ExpertsInterface
    except ImportError as error:
        raise ImportError(
            "register: needs transformers >= 5.0 with its experts interface; pip install 'headgate[hf]'"
        ) from error
    ExpertsInterface.register(NAME, experts_forward)
    try:
        from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
    except ImportError:  # releases without a registry of its own for FP8
        return
    FP8ExpertsInterface.register(NAME, fp8_experts_forward)
