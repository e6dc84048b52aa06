"""What a parallelized module must have in common with the same module in one process."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from headgate.moe.shards import shards_of

TOLERANCE = 1e-5  # of the largest magnitude expected, in fp32


def close(actual: Tensor, expected: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if expected.numel():
        error, size = (actual - expected).abs().max().item(), expected.abs().max().item()
        assert error <= tolerance * max(size, 1e-30), f"{what}: error {error:.3g} of {size:.3g}"


def same_parameters(whole: nn.Module, mine: nn.Module, of: Callable[[Tensor], Tensor], what: str) -> None:
    """`of(parameter)`, its gradient or its value, of every parameter of `mine`: experts' parts, DTensors whole."""
    full = dict(whole.named_parameters())
    for name, p in mine.named_parameters():
        owner, _, leaf = name.rpartition(".")
        shards = shards_of(mine.get_submodule(owner))
        expected, actual = of(full[name]), of(p)
        if shards is not None:
            expected = shards.cuts[leaf].of(expected, shards.held, shards.etp, shards.fold.rank("etp"))
        close(actual.full_tensor() if isinstance(actual, DTensor) else actual, expected, f"{what}: {name}")


def norm(module: nn.Module) -> Tensor:
    return torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
