"""Routers: x [T, D] -> Routing. One file each, and one line in the table, which the contract test goes through."""

from .bilevel import BilevelRouter
from .given import Given
from .router import Router
from .sigmoid import SigmoidRouter
from .softmax import SoftmaxRouter

__all__ = ["ROUTERS", "BilevelRouter", "Given", "Router", "SigmoidRouter", "SoftmaxRouter"]

ROUTERS: dict[str, type[Router]] = {"softmax": SoftmaxRouter, "sigmoid": SigmoidRouter, "bilevel": BilevelRouter}
