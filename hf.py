"""`import headgate.hf; headgate.hf.register()`: the door to transformers, kept in moe/hf."""

from .moe.hf import *  # noqa: F403
