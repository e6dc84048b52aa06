"""Levels of modules, and the paths through them: each one a dense model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .coarse import all_paths

_WHO = "Paths"
Path = tuple[int, ...]


class Paths(nn.Module):
    """`levels`: for each level its modules, of which a path takes one; each gives what the next level's take. A level
    of one module is shared by all paths. A document runs through its path alone, at a dense model's cost.

    `paths(x, (1, 0))` runs a path; `paths.model((1, 0))` is it, as a model that shares the weights. Which document
    takes which: CoarseRouter. How ranks train paths apart and keep shared modules together: OuterSync.

    Source: Douillard et al., DiPaCo: Distributed Path Composition (2024).

    >>> paths = headgate.Paths([[embed], [block(), block()], [block(), block()], [head]])
    >>> logits = paths(ids, (0, 1, 0, 0))
    """

    def __init__(self, levels: Sequence[Sequence[nn.Module]]) -> None:
        super().__init__()
        if not levels or not all(len(level) for level in levels):
            raise ValueError(f"{_WHO}: levels must hold a module each, got {[len(level) for level in levels]}")
        if any(not isinstance(module, nn.Module) for level in levels for module in level):
            raise TypeError(f"{_WHO}: levels must hold modules only")
        whole = [p for level in levels for module in level for p in module.parameters()]
        if len({id(p) for p in whole}) != len(whole):
            raise ValueError(f"{_WHO}: levels must hold modules that share no parameter, got some that do")
        self.levels = nn.ModuleList(nn.ModuleList(level) for level in levels)

    @property
    def counts(self) -> Path:
        return tuple(len(level) for level in self.levels)  # type: ignore[arg-type]

    @property
    def all(self) -> list[Path]:
        """Every path, the last level changing fastest."""
        return all_paths(self.counts)

    def model(self, path: Sequence[int]) -> nn.Sequential:
        found = tuple(path)
        fits = len(found) == len(self.counts) and all(0 <= i < n for i, n in zip(found, self.counts, strict=True))
        if not fits:
            raise ValueError(f"{_WHO}: path must be a number below {self.counts} for each level, got {found}")
        return nn.Sequential(*(level[i] for level, i in zip(self.levels, found, strict=True)))  # type: ignore[index]

    def forward(self, x: Tensor, path: Sequence[int]) -> Tensor:
        for module in self.model(path):
            x = module(x)
        return x

    @torch.no_grad()
    def losses(self, x: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
        """[N, P]: `loss` [N] of what each path gives for the documents x [N, ...]: for `CoarseRouter.reroute`."""
        return torch.stack([loss(self(x, path)) for path in self.all], 1)
