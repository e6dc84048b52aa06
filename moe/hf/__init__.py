"""The drop-in: MoE blocks of transformers models run through Headgate, by a swap or as an experts implementation."""

from .counting import calls
from .interface import register
from .report import Report
from .swap import replace, restore

__all__ = ["Report", "calls", "register", "replace", "restore"]
