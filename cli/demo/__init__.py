"""`headgate demo`: the tour. A small MoE language model is swapped, measured, trained and looked into, on real text.

A chapter is one file with `run` and `section`, and one line in CHAPTERS (chapters.py).
"""

from .command import add_arguments, run

__all__ = ["add_arguments", "run"]
