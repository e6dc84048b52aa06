"""Paths through shared modules: a path for each document, modules that seldom meet."""

from ...placement.lookup import files_of
from .coarse import CoarseRouter
from .outer import OuterSync
from .paths import Paths

__all__ = ["CoarseRouter", "OuterSync", "Paths"]

__getattr__ = files_of(__name__)
