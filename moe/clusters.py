"""k-means: how documents, activations and data are divided before modules are trained on the parts."""

from __future__ import annotations

import torch
from torch import Tensor


def kmeans(points: Tensor, clusters: int, *, seed: int = 0, rounds: int = 50) -> tuple[Tensor, Tensor]:
    """(centers [clusters, D] fp32, the cluster of each point [N] int64) of `points` [N, D], no cluster empty.

    Starts from k-means++ drawn by `seed`; ends when no point moves, or after `rounds`. A cluster that loses all its
    points takes the point that is farthest from its center, of a cluster that has others; so does each of equal points.
    Raises ValueError where there are fewer points than clusters, or values that are not finite.
    """
    if points.dim() != 2 or not 1 <= clusters <= len(points):
        raise ValueError(f"kmeans: clusters must be in 1 .. points ({list(points.shape)}), got {clusters}")
    x = points.detach().float()
    if not torch.isfinite(x).all():
        raise ValueError("kmeans: points must be finite, got NaN or Inf")
    draw = torch.Generator().manual_seed(seed)
    centers = _start(x, clusters, draw)
    of = torch.full((len(x),), -1, device=x.device)
    for _ in range(rounds):
        near = nearest(x, centers)
        near = _without_empty(x, centers, near)
        if torch.equal(near, of):
            break
        of = near
        sums = torch.zeros_like(centers).index_add_(0, of, x)
        centers = sums / torch.bincount(of, minlength=clusters)[:, None]
    return centers, of


def nearest(x: Tensor, centers: Tensor) -> Tensor:
    """The center [N] that each point of x [N, D] is nearest to; of equal ones the first."""
    return torch.cdist(x.float(), centers, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)


def _start(x: Tensor, clusters: int, draw: torch.Generator) -> Tensor:
    taken = [int(torch.randint(len(x), (1,), generator=draw))]
    far = (x - x[taken[0]]).square().sum(1)
    for _ in range(clusters - 1):
        far[taken] = 0
        weights = far.cpu().double() if far.sum() > 0 else torch.ones(len(x), dtype=torch.float64)
        weights[taken] = 0
        upto = weights.cumsum(0)  # torch.multinomial ends at 2**24 points
        at = torch.rand(1, dtype=torch.float64, generator=draw) * upto[-1]
        taken.append(int(torch.searchsorted(upto, at, right=True)))
        far = torch.minimum(far, (x - x[taken[-1]]).square().sum(1))
    return x[taken]


def _without_empty(x: Tensor, centers: Tensor, of: Tensor) -> Tensor:
    counts = torch.bincount(of, minlength=len(centers))
    for empty in (counts == 0).nonzero().flatten().tolist():
        off = (x - centers[of]).square().sum(1)
        off[counts[of] < 2] = -1
        moved = int(off.argmax())
        counts[of[moved]] -= 1
        of[moved], counts[empty] = empty, 1
    return of
