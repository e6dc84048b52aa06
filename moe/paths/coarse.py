"""Which path a document takes: product k-means of its features, then what its loss says."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..clusters import kmeans, nearest

_WHO = "CoarseRouter"


class CoarseRouter(nn.Module):
    """A path for each document, from features [N, D] of it: numbers of modules [N, L], one of `counts` for each level.

    At first by product k-means: the features are cut into L parts (D // L each, the first ones longer), each part has
    the k-means of its level. `reroute` replaces that by a linear classifier of the path on which documents had the
    least loss. Centers and classifier are buffers, so a state_dict keeps them.

    Source: Douillard et al., DiPaCo: Distributed Path Composition (2024), generative and discriminative routing.

    >>> router = CoarseRouter((4, 4), features)
    >>> paths = router(features)                                              # [N, 2]
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, counts: Sequence[int], features: Tensor, *, seed: int = 0) -> None:
        super().__init__()
        self.counts = check_counts(counts, _WHO)
        if features.dim() != 2 or features.shape[1] < len(self.counts) or len(features) < max(self.counts):
            rule = f"[N, D] with N >= {max(self.counts)} and D >= {len(self.counts)}"
            raise ValueError(f"{_WHO}: features must be {rule}, got {list(features.shape)}")
        for level, (count, part) in enumerate(zip(self.counts, self._parts(features), strict=True)):
            self.register_buffer(f"centers_{level}", kmeans(part, count, seed=seed + level)[0])
        self.features = features.shape[1]
        device = features.device
        self.register_buffer("weight", torch.zeros(prod(self.counts), self.features, device=device))
        self.register_buffer("bias", torch.zeros(prod(self.counts), device=device))
        self.register_buffer("learned", torch.tensor(False))

    @torch.no_grad()
    def forward(self, features: Tensor) -> Tensor:
        """[N, L] int64."""
        if features.dim() != 2 or features.shape[1] != self.features:
            raise ValueError(f"{_WHO}: features must be [N, {self.features}], got {list(features.shape)}")
        if self.learned:
            best = F.linear(features.float(), self.weight, self.bias).argmax(1)
            return torch.stack(torch.unravel_index(best, self.counts), 1)
        near = [nearest(part, getattr(self, f"centers_{i}")) for i, part in enumerate(self._parts(features))]
        return torch.stack(near, 1)

    def reroute(self, features: Tensor, losses: Tensor, *, steps: int = 300, seed: int = 0) -> float:
        """Learns from `losses` [N, P] of N documents on all P paths (in the order of `Paths.all`): the path with the
        least, by logistic regression. Returns the share of these documents whose path is then the best one."""
        if losses.shape != (len(features), prod(self.counts)) or not torch.isfinite(losses).all():
            shape = f"finite, [{len(features)}, {prod(self.counts)}]"
            raise ValueError(f"{_WHO}: losses must be {shape}, got {list(losses.shape)}")
        best, x = losses.argmin(1), features.detach().float()
        mean, scale = x.mean(0), x.std(0, correction=0).clamp_min(1e-6)
        x = (x - mean) / scale
        weight = torch.zeros_like(self.weight, requires_grad=True)
        bias = torch.zeros_like(self.bias, requires_grad=True)
        adam = torch.optim.Adam([weight, bias], lr=0.05)
        draw = torch.Generator().manual_seed(seed)
        with torch.enable_grad():
            for _ in range(steps):
                rows = torch.randint(len(x), (min(1024, len(x)),), generator=draw).to(x.device)
                adam.zero_grad()
                F.cross_entropy(F.linear(x[rows], weight, bias), best[rows]).backward()
                adam.step()
        with torch.no_grad():
            self.weight.copy_(weight / scale)
            self.bias.copy_(bias - self.weight @ mean)
            self.learned.fill_(True)  # type: ignore[operator]
        taken = self(features)
        index = torch.zeros(len(features), dtype=torch.int64, device=taken.device)
        for level, count in enumerate(self.counts):
            index = index * count + taken[:, level]
        return (index == best).float().mean().item()

    def _parts(self, features: Tensor) -> tuple[Tensor, ...]:
        return features.float().tensor_split(len(self.counts), 1)


def check_counts(counts: Sequence[int], who: str) -> tuple[int, ...]:
    found = tuple(counts)
    if not found or any(type(n) is not int or n < 1 for n in found):
        raise ValueError(f"{who}: counts must be numbers of modules of at least 1, one for each level, got {found}")
    return found


def all_paths(counts: Sequence[int]) -> list[tuple[int, ...]]:
    """The last level changes fastest."""
    return list(product(*(range(n) for n in counts)))
