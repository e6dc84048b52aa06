"""torch and transformers' models in a process of Headgate's own: with what a command takes, and no more."""

from __future__ import annotations

import gc
import linecache
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


def import_models(gpu: bool = False) -> None:
    """Imports what all of transformers' models stand on. It does so as if packages were not installed that it and torch
    take where they are, and that nobody asks for here: scipy, for losses of object detection, and, where no `gpu`
    computes, Triton. That is 100 MB and a second less.

    For the rest of the process torch then knows no Triton, and transformers no scipy; whoever else asks has both. So
    this is for a process that runs one command and ends. What is loaded already stays.

    Raises ImportError where transformers is not installed.
    """
    import torch  # noqa: F401  # which takes neither by itself

    def work() -> None:
        from transformers import GenerationMixin, PreTrainedModel  # noqa: F401

    with _without_collections():
        _without(("scipy",) if gpu else ("scipy", "triton"), work)


def import_engine() -> None:
    """Imports the engine of experts that are elsewhere, and compiles its steps or loads what was compiled. numba takes
    scipy's BLAS where it is there, which no step of ours calls: 14 MB less. It is for processes as `import_models`
    says."""

    def work() -> None:
        from ..moe.offload.ready import compile_steps

        compile_steps()

    with _without_collections():
        _without(("scipy",), work)


def _without(names: tuple[str, ...], work: Callable[[], None]) -> None:
    """Does `work` where these packages cannot be found, and with them where that fails: a later version may need what
    this one may lack."""
    with suppress(ImportError), _absent(names):
        work()
    work()


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
        linecache.clearcache()  # sources that decorators have read
        gc.collect()
        gc.freeze()
        if before:
            gc.enable()
