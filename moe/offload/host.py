"""What every lower tier is, and the one in host memory."""

from __future__ import annotations

import copy
import errno
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .kinds import Layer, Weights, split


class Store(Protocol):
    """A lower tier: it holds every expert of every layer."""

    @property
    def layers(self) -> Sequence[Layer]: ...

    def read(self, layer: int, expert: int, into: Mapping[str, Tensor]) -> None:
        """Fills `into`, an expert's parts by name, on any device; returns when the bytes are there. Any number of
        threads may read at once. Raises OSError where they cannot be had; `into` is then undefined."""

    def whole(self, layer: int) -> dict[str, Tensor]:
        """The weights [E, ...] of a layer by name, as views of this tier: no copy is made, and nobody may write into
        them. None for a layer whose experts are of several kinds or in few bits."""

    def close(self) -> None: ...


class HostStore:
    """Experts in host memory, page-locked where they go to a CUDA `device`.

    `weights(i)` gives the weights of layer i, one mapping for each of its groups: it is asked once for each layer, in
    order, so that what it hands over may be let go layer by layer. On CPUs the tensors are kept as they are.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        weights: Callable[[int], Sequence[Weights]],
        device: torch.device | str = "cpu",
    ) -> None:
        self.layers = tuple(layers)
        self.pinned = pin = torch.device(device).type == "cuda"
        self._parts: list[list[dict[str, Tensor]]] = []
        self._views: dict[tuple[int, int], dict[str, Tensor]] = {}
        for i, layer in enumerate(self.layers):
            parts = parts_of(layer, weights(i))
            self._parts.append([{k: _pinned(t) if pin else t for k, t in p.items()} for p in parts])

    def read(self, layer: int, expert: int, into: Mapping[str, Tensor]) -> None:
        fill(into, self.parts(layer, expert))

    def parts(self, layer: int, expert: int) -> dict[str, Tensor]:
        """An expert's parts by name, as views. Raises OSError where the store is closed."""
        if not self._parts:
            raise OSError(errno.EBADF, "the store of offloaded experts is closed")
        if (layer, expert) not in self._views:
            group, row = self.layers[layer].places[expert]
            self._views[layer, expert] = {name: t[row] for name, t in self._parts[layer][group].items()}
        return self._views[layer, expert]

    def whole(self, layer: int) -> dict[str, Tensor]:
        return dict(self._parts[layer][0]) if plain(self.layers[layer]) else {}

    def lend(self) -> HostStore:
        """The same experts, without a copy, for one more user: closing it leaves this store open. Of the memory, who
        closes last lets go."""
        lent = copy.copy(self)
        lent._parts, lent._views = list(self._parts), dict(self._views)
        return lent

    def close(self) -> None:
        self._parts.clear()
        self._views.clear()


def _pinned(t: Tensor) -> Tensor:
    """Straight into page-locked memory: from a device by DMA, from host memory in one copy."""
    return torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t)


def maps_files(store: Store) -> bool:
    """Whether what a store shows as `whole` are read-only maps of a file."""
    return not isinstance(getattr(store, "store", store), HostStore)


def plain(layer: Layer) -> bool:
    """Whether the experts of a layer are of one kind, none of it in few bits."""
    return len(layer.groups) == 1 and not layer.groups[0][1].coded


def parts_of(layer: Layer, weights: Sequence[Weights]) -> list[dict[str, Tensor]]:
    """The parts of each group of `layer`. Raises ValueError where the weights are not what the layer says."""
    got = Layer.of(layer.name, *((experts, w) for (experts, _), w in zip(layer.groups, weights, strict=True)))
    if got != layer:
        raise ValueError(f"offload: weights of {layer.name} must be {_kinds(layer)}, got {_kinds(got)}")
    return [split(w) for w in weights]


def _kinds(layer: Layer) -> str:
    return " | ".join(f"{len(experts)} of {kind}" for experts, kind in layer.groups)


def fill(into: Mapping[str, Tensor], parts: Mapping[str, Tensor]) -> None:
    """Copies an expert's parts, and waits for the copies; on CUDA they go on the stream that is current."""
    with torch.no_grad():
        for name, to in into.items():
            to.copy_(parts[name], non_blocking=True)
    devices = {t.device for t in into.values() if t.is_cuda}
    for device in devices:
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(device))
        done.synchronize()  # of these copies, not of what another reader has put behind them meanwhile
