"""Routers: x [T, D] -> Routing. One file each, and one line in the table, which the contract test goes through."""

from .bilevel import BilevelRouter
from .cosine import CosineRouter
from .expert_choice import ExpertChoiceRouter
from .given import Given
from .hash import HashRouter, balanced_table
from .locmoe import LocMoERouter, capacity_bound
from .longcat import LongCatRouter
from .moepp import MoEPPRouter
from .parts import PartsRouter, parts_of
from .pregate import PregateRouter, distillation_loss
from .quantile import QuantileRouter
from .recurrent import RecurrentRouter
from .reinforce import ReinforceRouter, reward
from .relu import ReLURouter
from .router import GatedRouter, Router
from .sigmoid import SigmoidRouter
from .sinkhorn import SinkhornRouter
from .soft import SoftRouter
from .softmax import SoftmaxRouter
from .steered import SteeredRouter
from .tile import TileRouter
from .top_p import TopPRouter

__all__ = [
    "ROUTERS",
    "BilevelRouter",
    "CosineRouter",
    "ExpertChoiceRouter",
    "GatedRouter",
    "Given",
    "HashRouter",
    "LocMoERouter",
    "LongCatRouter",
    "MoEPPRouter",
    "PartsRouter",
    "PregateRouter",
    "QuantileRouter",
    "ReLURouter",
    "RecurrentRouter",
    "ReinforceRouter",
    "Router",
    "SigmoidRouter",
    "SinkhornRouter",
    "SoftRouter",
    "SoftmaxRouter",
    "SteeredRouter",
    "TileRouter",
    "TopPRouter",
    "balanced_table",
    "capacity_bound",
    "distillation_loss",
    "parts_of",
    "reward",
]

ROUTERS: dict[str, type[Router]] = {
    "softmax": SoftmaxRouter,
    "sigmoid": SigmoidRouter,
    "bilevel": BilevelRouter,
    "expert_choice": ExpertChoiceRouter,
    "sinkhorn": SinkhornRouter,
    "hash": HashRouter,
    "cosine": CosineRouter,
    "top_p": TopPRouter,
    "relu": ReLURouter,
    "quantile": QuantileRouter,
    "moepp": MoEPPRouter,
    "longcat": LongCatRouter,
    "recurrent": RecurrentRouter,
    "pregate": PregateRouter,
    "locmoe": LocMoERouter,
    "reinforce": ReinforceRouter,
    "soft": SoftRouter,
    "parts": PartsRouter,
    "tile": TileRouter,
}
