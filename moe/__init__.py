"""Second floor: the nn.Modules that users put into models. `hf` swaps them into somebody else's."""

from .capacity import Capacity, Overflow
from .experts import Experts
from .layer import MoE
from .losses import TokenRanks
from .routers import ROUTERS, BilevelRouter, Router, SigmoidRouter, SoftmaxRouter

__all__ = [
    "ROUTERS",
    "BilevelRouter",
    "Capacity",
    "Experts",
    "MoE",
    "Overflow",
    "Router",
    "SigmoidRouter",
    "SoftmaxRouter",
    "TokenRanks",
]


def __getattr__(name: str):
    """A room or file of this folder by its name, without an import of its own: `headgate.moe.offload`."""
    from importlib import import_module
    from importlib.util import find_spec

    if not name.startswith("_") and find_spec(f"{__name__}.{name}"):
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
