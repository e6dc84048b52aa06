"""Headgate as one of transformers' own experts implementations, and which transformers that may be."""

from __future__ import annotations

import re
import sys

from .experts import experts_forward
from .fp8 import fp8_experts_forward

NAME = "headgate"
OLDEST = (5, 18)  # the oldest transformers whose families were all compared with their originals


def check_transformers(who: str) -> None:
    """Raises ImportError, in the name of `who`, where the transformers that is loaded is older than OLDEST."""
    version = str(getattr(sys.modules.get("transformers"), "__version__", ""))
    found = re.match(r"(\d+)\.(\d+)", version)
    if found and (int(found[1]), int(found[2])) < OLDEST:
        raise ImportError(
            f"{who}: transformers must be {'.'.join(map(str, OLDEST))} or newer, got {version}; "
            "pip install -U 'headgate[hf]'"
        )


def register() -> None:
    """Makes "headgate" an experts implementation of transformers, for prefill and decode, and for FP8 experts too.

    Families outside transformers' experts interface (Llama 4, DBRX, Switch, ...) ignore the choice silently and stay
    eager; `headgate.replace` takes them, and `headgate.hf.calls(model)` tells what has run. Twice is harmless.

    Raises ImportError where transformers is missing or older than 5.18.

    >>> headgate.hf.register()
    >>> model.set_experts_implementation("headgate")   # or from_pretrained(..., experts_implementation="headgate")
    """
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError("register: transformers must be installed; pip install 'headgate[hf]'") from error
    check_transformers("register")
    from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register(NAME, experts_forward)
    FP8ExpertsInterface.register(NAME, fp8_experts_forward)
