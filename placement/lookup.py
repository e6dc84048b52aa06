"""A room's files by their names, without an import of their own: `headgate.placement.caching.locality`."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType


def files_of(package: str) -> Callable[[str], ModuleType]:
    """The `__getattr__` of a package."""

    def found(name: str) -> ModuleType:
        if not name.startswith("_") and find_spec(f"{package}.{name}"):
            return import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return found
