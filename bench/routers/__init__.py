"""Every router in one small language model: held-out loss, load, rows, tokens per second."""

from .command import add_arguments, run

__all__ = ["add_arguments", "run"]
