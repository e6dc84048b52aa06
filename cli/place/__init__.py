"""`headgate place`: a placement beside the default and EPLB, explained, drawn, exported, and the way to it."""

from .command import add_arguments, run

__all__ = ["add_arguments", "run"]
