"""`headgate place`: a placement on the command line, beside the default and EPLB, explained, drawn, and the way to it."""

from .command import add_arguments, run

__all__ = ["add_arguments", "run"]
