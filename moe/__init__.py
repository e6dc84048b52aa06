"""Second floor: the nn.Modules that users put into models. `hf` swaps them into somebody else's."""

from ..placement.lookup import files_of
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

__getattr__ = files_of(__name__)
