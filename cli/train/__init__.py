"""`headgate train`: the demo's language model trained over every rank that torchrun starts, under any fold."""

from .command import run
from .options import Options, add_arguments

__all__ = ["Options", "add_arguments", "run"]
