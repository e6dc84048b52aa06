"""Second floor: the nn.Modules that users put into models. `hf` swaps them into somebody else's."""

from .experts import Experts
from .layer import MoE
from .routers import ROUTERS, Router, SigmoidRouter, SoftmaxRouter

__all__ = ["ROUTERS", "Experts", "MoE", "Router", "SigmoidRouter", "SoftmaxRouter"]
