"""`headgate cache`: every policy beside Belady's optimum on a trace, with the time that a model would wait."""

from .command import add_arguments, run

__all__ = ["add_arguments", "run"]
