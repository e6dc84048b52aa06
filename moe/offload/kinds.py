"""What an expert is made of, and what a layer's experts are called: what stores, files and slots agree on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from ...kernels.quantized import BLOCKS, Quantized

Weights = Mapping[str, "Tensor | Quantized"]  # of n experts alike: name -> [n, ...]


@dataclass(frozen=True)
class Part:
    """One run of an expert's bytes: a tensor `shape` of `dtype`."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Kind:
    """Experts alike: their parts, and how weights in few bits are coded, (name, format, block) each. A Quantized
    weight w is two parts, w.data and w.scale; GGUF's blocks are one, w.data."""

    parts: tuple[Part, ...]
    coded: tuple[tuple[str, str, tuple[int, int]], ...] = ()

    @classmethod
    def of(cls, weights: Weights) -> Kind:
        """That of experts with these weights, [n, ...] each. Raises ValueError where their numbers n differ."""
        parts = split(weights)
        counts = {name: t.shape[0] if t.dim() else 0 for name, t in parts.items()}
        if len(set(counts.values())) != 1 or not all(counts.values()):
            raise ValueError(f"offload: weights must be [n, ...] with one n of at least 1, got {counts}")
        return cls(
            tuple(Part(name, tuple(t.shape[1:]), t.dtype) for name, t in parts.items()),
            tuple((name, w.format, w.block) for name, w in weights.items() if isinstance(w, Quantized)),
        )

    @cached_property
    def nbytes(self) -> int:
        """Of one expert."""
        return sum(part.nbytes for part in self.parts)

    def join(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor | Quantized]:
        """Weights [n, ...] from their parts [n, ...]; nothing is copied."""
        whole: dict[str, Tensor | Quantized] = dict(parts)
        for name, format, block in self.coded:
            whole.pop(f"{name}.data"), whole.pop(f"{name}.scale", None)
            data, scale = parts[f"{name}.data"], parts.get(f"{name}.scale")
            whole[name] = Quantized.from_gguf(data, format) if scale is None else Quantized(data, scale, format, block)
        return whole

    def __str__(self) -> str:
        return ", ".join(f"{p.name} {list(p.shape)} {str(p.dtype)[6:]}" for p in self.parts)


def split(weights: Weights) -> dict[str, Tensor]:
    """The parts [n, ...] of weights [n, ...]; nothing is copied."""
    parts: dict[str, Tensor] = {}
    for name, w in weights.items():
        if not isinstance(w, Quantized):
            parts[name] = w.detach()
            continue
        parts[f"{name}.data"] = w.data
        if w.format not in BLOCKS:
            parts[f"{name}.scale"] = w.scale
    return parts


def widened(weights: Weights, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights in few bits as tensors in `dtype`; the others as they are."""
    return {name: w.dequantize(dtype) if isinstance(w, Quantized) else w for name, w in weights.items()}


@dataclass(frozen=True)
class Layer:
    """The experts of one layer: `name` is the path of their module, each of the `groups` is (experts rising, Kind).

    >>> Layer.of("mlp", (range(4), {"w_down": torch.zeros(4, 8, 2)})).experts
    4
    """

    name: str
    groups: tuple[tuple[tuple[int, ...], Kind], ...]

    @classmethod
    def of(cls, name: str, *groups: tuple[Sequence[int], Weights]) -> Layer:
        """From the weights themselves, [n, ...] for the n experts of each group."""
        found = tuple((tuple(experts), Kind.of(weights)) for experts, weights in groups)
        for (experts, _), (_, weights) in zip(found, groups, strict=True):
            n = next(iter(split(weights).values())).shape[0]
            if len(experts) != n:
                raise ValueError(f"Layer: {name} must have weights for {len(experts)} experts, got {n}")
        return cls(name, found)

    def __post_init__(self) -> None:
        all_experts = sorted(e for experts, _ in self.groups for e in experts)
        rising = all(list(experts) == sorted(experts) for experts, _ in self.groups)
        if not all_experts or all_experts != list(range(len(all_experts))) or not rising:
            raise ValueError(
                f"Layer: {self.name} must have experts 0, 1, ... in groups, rising in each, got {all_experts}"
            )

    @cached_property
    def places(self) -> tuple[tuple[int, int], ...]:
        """(group, row in the group) of each expert."""
        where = {e: (g, i) for g, (experts, _) in enumerate(self.groups) for i, e in enumerate(experts)}
        return tuple(where[e] for e in range(len(where)))

    @property
    def experts(self) -> int:
        return len(self.places)

    def kind(self, expert: int) -> Kind:
        return self.groups[self.places[expert][0]][1]

    def outputs(self, transposed: bool) -> int:
        """The width of what the experts answer."""
        shapes = {part.name: part.shape for part in self.groups[0][1].parts}
        shape = shapes.get("w_down", shapes.get("w_down.data"))
        if shape is None:
            raise ValueError(f"offload: {self.name} must have a weight w_down, got {', '.join(shapes)}")
        return shape[1] if transposed else shape[0]

    @property
    def nbytes(self) -> int:
        return sum(len(experts) * kind.nbytes for experts, kind in self.groups)
