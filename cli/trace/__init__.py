"""`headgate trace`: record where a model's tokens go, convert what others recorded, and show what a trace says."""

from .command import add_arguments, run

__all__ = ["add_arguments", "run"]
