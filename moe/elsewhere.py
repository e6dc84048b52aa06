"""Where a forward pass learns that its experts are elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from ..kernels.routing import Routing

_OFFLOAD = "_headgate_offload"
Elsewhere = Callable[[Tensor, Routing], Tensor]  # (rows [R, D], routing) -> [R, D], instead of grouped_ffn


@dataclass(frozen=True)
class Absent:
    """Stands where the experts `name` were never in memory, and nobody serves them any more."""

    name: str

    def __call__(self, rows: Tensor, routing: Routing) -> Tensor:
        raise RuntimeError(
            f"offload: the experts of {self.name} must be in memory or served by an Offload, got them in files that it "
            "has closed; load the model again, or close with restore=True"
        )


def elsewhere_of(module: nn.Module) -> Elsewhere | None:
    """What computes an experts module's rows where its weights are offloaded, or None."""
    return vars(module).get(_OFFLOAD)


def send_elsewhere(module: nn.Module, elsewhere: Elsewhere | None) -> None:
    if elsewhere is None:
        vars(module).pop(_OFFLOAD, None)
    else:
        vars(module)[_OFFLOAD] = elsewhere
