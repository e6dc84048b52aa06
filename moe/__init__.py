"""Second floor: the nn.Modules that users put into models. `hf` swaps them into somebody else's."""

from ..placement.lookup import files_of
from .capacity import Capacity, Overflow
from .experts import Experts
from .layer import MoE
from .losses import TokenRanks
from .routers import (
    ROUTERS,
    BilevelRouter,
    CosineRouter,
    ExpertChoiceRouter,
    GatedRouter,
    Given,
    HashRouter,
    QuantileRouter,
    ReLURouter,
    Router,
    SigmoidRouter,
    SinkhornRouter,
    SoftmaxRouter,
    SteeredRouter,
    TopPRouter,
    balanced_table,
)

__all__ = [
    "ROUTERS",
    "BilevelRouter",
    "Capacity",
    "CosineRouter",
    "ExpertChoiceRouter",
    "Experts",
    "GatedRouter",
    "Given",
    "HashRouter",
    "MoE",
    "Overflow",
    "QuantileRouter",
    "ReLURouter",
    "Router",
    "SigmoidRouter",
    "SinkhornRouter",
    "SoftmaxRouter",
    "SteeredRouter",
    "TokenRanks",
    "TopPRouter",
    "balanced_table",
]

__getattr__ = files_of(__name__)
