"""torch and transformers' models in a process of Headgate's own: with what a command takes, and no more."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_NEEDLESS = ("scipy", "triton")


def import_models(gpu: bool = False) -> None:
    """Imports what all of transformers' models stand on. Where no `gpu` computes it does so as if two packages were not
    installed that transformers and torch take where they are, and that nobody asks for here: scipy, for losses of
    object detection, and Triton. That is 100 MB and a second less.

    For the rest of the process torch then knows no Triton, and transformers no scipy; whoever else asks has both. So
    this is for a process that runs one command and ends. What is loaded already stays.

    Raises ImportError where transformers is not installed.
    """
    import torch  # noqa: F401  # which takes neither by itself

    with _without_collections():
        if not gpu:
            with suppress(ImportError), _absent(_NEEDLESS):  # another version of transformers may need them: see below
                _import()
        _import()


def _import() -> None:
    from transformers import GenerationMixin, PreTrainedModel  # noqa: F401


@contextmanager
def _absent(names: tuple[str, ...]) -> Iterator[None]:
    """Packages that are not loaded yet cannot be found for a while: Python's own way to say so is None."""
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            if sys.modules.get(name) is None:
                sys.modules.pop(name, None)


@contextmanager
def _without_collections() -> Iterator[None]:
    """What is imported stays: looking through it for garbage, again and again, takes half a second."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.collect()
        gc.freeze()
        if before:
            gc.enable()
