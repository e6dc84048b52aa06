"""Second floor: the nn.Modules that users put into models. `hf` swaps them into somebody else's."""

from ..placement.lookup import files_of
from .capacity import Capacity, Overflow
from .experts import Experts
from .free import FreeExperts
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
    LocMoERouter,
    LongCatRouter,
    MoEPPRouter,
    PartsRouter,
    PregateRouter,
    QuantileRouter,
    RecurrentRouter,
    ReinforceRouter,
    ReLURouter,
    Router,
    SigmoidRouter,
    SinkhornRouter,
    SoftmaxRouter,
    SoftRouter,
    SteeredRouter,
    TileRouter,
    TopPRouter,
    balanced_table,
    capacity_bound,
    distillation_loss,
    parts_of,
    reward,
)
from .shortcut import ShortcutBlock
from .sized import SizedExperts, budget_loss

__all__ = [
    "ROUTERS",
    "BilevelRouter",
    "Capacity",
    "CosineRouter",
    "ExpertChoiceRouter",
    "Experts",
    "FreeExperts",
    "GatedRouter",
    "Given",
    "HashRouter",
    "LocMoERouter",
    "LongCatRouter",
    "MoE",
    "MoEPPRouter",
    "Overflow",
    "PartsRouter",
    "PregateRouter",
    "QuantileRouter",
    "ReLURouter",
    "RecurrentRouter",
    "ReinforceRouter",
    "Router",
    "ShortcutBlock",
    "SigmoidRouter",
    "SinkhornRouter",
    "SizedExperts",
    "SoftRouter",
    "SoftmaxRouter",
    "SteeredRouter",
    "TileRouter",
    "TokenRanks",
    "TopPRouter",
    "balanced_table",
    "budget_loss",
    "capacity_bound",
    "distillation_loss",
    "parts_of",
    "reward",
]

__getattr__ = files_of(__name__)
