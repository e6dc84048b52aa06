"""`headgate bench offload`: caches, predictors and prefetch on a trace; generation with experts on disk."""

from .command import add_arguments, run

__all__ = ["add_arguments", "run"]
