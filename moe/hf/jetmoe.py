"""JetMoE: each projection is a module of its own that takes rows sorted by expert, in its experts and its attention."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.grouped_linear import grouped_linear
from .counting import mark


def parallel_experts_forward(module: nn.Module, inputs: Tensor, expert_size: list[int]) -> Tensor:
    """inputs [N, in] sorted by expert, expert_size: rows of each of the E experts -> [N, out]."""
    mark(module)
    m: Any = module
    offsets = torch.tensor([0, *accumulate(expert_size)], dtype=torch.int32, device=inputs.device)
    return grouped_linear(inputs, offsets, m.weight)


def choice(module: nn.Module, output: tuple) -> tuple[Tensor, Tensor]:
    """(ids, weights) [T, K] of what a JetMoeTopKGating returns, whose last is the logits [T, E]."""
    m: Any = module
    best, ids = output[-1].topk(m.top_k, dim=1)
    return ids, best.softmax(1)


def prepare(module: nn.Module) -> str:
    return "one grouped matmul"
