"""MoE models out of dense ones: by copies, by shards, by what is active together, by models trained apart."""

from ...placement.lookup import files_of
from .convert import METHODS, convert
from .ensemble import Ensemble, LearnedRouter, Posterior
from .methods import Copy, Granular, Merge
from .readme import Activations, pregated
from .routers import train_routers

__all__ = [
    "METHODS",
    "Activations",
    "Copy",
    "Ensemble",
    "Granular",
    "LearnedRouter",
    "Merge",
    "Posterior",
    "convert",
    "pregated",
    "train_routers",
]

__getattr__ = files_of(__name__)
