"""Which forward calls still have their backward pass before them."""

from __future__ import annotations

from weakref import WeakSet

from torch import Tensor


class Pending:
    """True while the graph of a noted tensor lives and has not run backward.

    What is chosen anew from time to time must not change in between: with activation checkpointing the backward pass
    calls forward again, and must find what it found before. (A checkpointed graph that runs backward twice is not seen
    the second time.)
    """

    def __init__(self) -> None:
        self._graphs: WeakSet[_Graph] = WeakSet()

    def note(self, t: Tensor) -> None:
        if t.grad_fn is not None:
            graph, graphs = _Graph(), self._graphs
            graphs.add(graph)
            t.grad_fn.register_hook(lambda *_: graphs.discard(graph))

    def __bool__(self) -> bool:
        return len(self._graphs) > 0

    def __deepcopy__(self, memo: object) -> Pending:
        return Pending()


class _Graph:
    """Stands for one call's graph; the graph holds it."""
