"""Hugging Face has a package `kernels` too, and this folder must not be taken for it.

`python -c` and `python -m` in the repository put its root on sys.path, where this folder answers to `import kernels`,
the name that transformers looks for. Console scripts, and an installed wheel, do not.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.machinery import PathFinder


def stand_aside() -> None:
    """Puts Hugging Face's `kernels` in our place; where there is none, gives a version too old for transformers."""
    root = os.path.realpath(os.path.join(os.path.dirname(__file__), os.pardir))
    spec = PathFinder.find_spec("kernels", [p for p in sys.path if os.path.realpath(p or os.curdir) != root])
    if spec is None or spec.loader is None:
        sys.modules["kernels"].__version__ = "0"  # type: ignore[attr-defined]
        return
    theirs = importlib.util.module_from_spec(spec)
    sys.modules["kernels"] = theirs
    spec.loader.exec_module(theirs)
