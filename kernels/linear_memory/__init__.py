"""linear_memory: many independent states of linear attention, each over the rows of its group, chunk by chunk."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .reference import linear_memory_reference

__all__ = ["linear_memory", "linear_memory_reference"]


_LEAST = {torch.float32: -110.0, torch.float64: -750.0}  # of log a: exp of it is 0, and differences of sums stay finite


def linear_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor | None,
    offsets: Tensor,
    state: Tensor,
    *,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """(o [N, H, dv], the states afterwards [G, H, dk, dv]): each of G groups of rows through a state of its own.

        S <- a S;   S <- S + k (beta (v - S^T k))^T   (gated delta rule; without beta S + k v^T);   o = S^T q

    Shapes:
        q, k       [N, H, dk]  rows of a group one after the other, in their order (see `Plan`)
        v          [N, H, dv]
        log_decay  [N, H]      log a, at most 0; -inf forgets everything
        beta       [N, H]      or None
        offsets    [G+1] int   rows offsets[g] <= i < offsets[g+1] are group g's; o of rows past offsets[G] is zero
        state      [G, H, dk, dv]

    All of one dtype, fp32 or fp64; differentiable. Groups may differ in length: all their c-th chunks of `chunk` rows
    are computed together, so that only a group's last chunk is padded, and the number of steps goes by the longest
    group. In a chunk the rows' new values u solve a triangular system (the delta rule), and outputs are two products.
    The host reads `offsets`.

    Raises ValueError / TypeError naming argument, rule and value. Cost per row and head: 4 dk dv + about
    2 chunk (dk + dv) FLOPs. Source: Yang et al., Gated Delta Networks (2024), sections 3.1 and 3.3.

    >>> q = k = v = torch.ones(3, 1, 1)
    >>> o, state = linear_memory(q, k, v, torch.zeros(3, 1), None, torch.tensor([0, 1, 3]), torch.zeros(2, 1, 1, 1))
    >>> o.flatten().tolist(), state.flatten().tolist()
    ([1.0, 1.0, 2.0], [1.0, 2.0])
    """
    _check(q, k, v, log_decay, beta, offsets, state, chunk)
    ends = offsets.tolist()
    lengths = [end - begin for begin, end in pairwise(ends)]
    if ends[0] < 0 or ends[-1] > len(q) or min(lengths, default=0) < 0:
        raise ValueError(f"linear_memory: offsets must rise from 0 or more to at most N ({len(q)}), got {ends}")
    log_decay = log_decay.clamp_min(_LEAST[q.dtype])
    longest = max(lengths, default=0)
    chunk = min(chunk, longest)
    if not longest:
        return torch.zeros_like(v), state
    rows = torch.arange(chunk, device=q.device)
    outs, places, now = [], [], state
    for begin in range(0, longest, chunk):
        groups = torch.tensor([g for g, n in enumerate(lengths) if n > begin], device=q.device)
        place = offsets.index_select(0, groups).long()[:, None] + begin + rows  # [A, C]
        there = place < offsets.index_select(0, groups + 1)[:, None]
        at = torch.where(there, place, 0)

        def taken(t: Tensor, at: Tensor = at, there: Tensor = there) -> Tensor:
            """Rows as [A, H, C, .], zeros where a chunk has ended."""
            gathered = t.index_select(0, at.flatten()).unflatten(0, at.shape)
            return gathered.masked_fill(~there.view(*there.shape, *[1] * (t.dim() - 1)), 0).movedim(2, 1)

        every = len(groups) == len(lengths)
        before = now if every else now.index_select(0, groups)
        strength = None if beta is None else taken(beta)
        o, after = _chunk(taken(q), taken(k), taken(v), taken(log_decay), strength, before)
        now = after if every else now.index_copy(0, groups, after)
        outs.append(o.movedim(1, 2)[there])
        places.append(place[there])
    return torch.zeros_like(v).index_copy(0, torch.cat(places), torch.cat(outs)), now


def _chunk(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One chunk of A groups: q, k [A, H, C, dk], v [A, H, C, dv], log_decay, beta [A, H, C]; state [A, H, dk, dv]."""
    total = log_decay.cumsum(2)
    size = q.shape[2]
    later = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(later, -torch.inf).exp()  # from j to i, j <= i
    since = total.exp()[..., None]
    if beta is not None:
        unseen = v - since * (k @ state)
        system = beta[..., None] * decay * (k @ k.mT)
        v = torch.linalg.solve_triangular(system, beta[..., None] * unseen, upper=False, unitriangular=True)
    o = since * (q @ state) + (decay * (q @ k.mT)) @ v
    to_end = (total[..., -1:] - total).exp()[..., None]
    return o, since[..., -1:, :] * state + (to_end * k).mT @ v


def _check(q, k, v, log_decay, beta, offsets, state, chunk) -> None:
    tensors = {"q": q, "k": k, "v": v, "log_decay": log_decay, "state": state}
    tensors |= {} if beta is None else {"beta": beta}
    for name, t in tensors.items():
        if not isinstance(t, Tensor) or t.dtype not in (torch.float32, torch.float64) or t.dtype != q.dtype:
            got = getattr(t, "dtype", type(t).__name__)
            raise TypeError(f"linear_memory: {name} must be fp32 or fp64 as q is, got {got}")
    if q.dim() != 3 or k.shape != q.shape:
        raise ValueError(f"linear_memory: q and k must both be [N, H, dk], got {tuple(q.shape)} and {tuple(k.shape)}")
    n, heads, width = q.shape
    if v.dim() != 3 or v.shape[:2] != (n, heads):
        raise ValueError(f"linear_memory: v must be [{n}, {heads}, dv], got {tuple(v.shape)}")
    for name in ("log_decay", "beta"):
        if name in tensors and tensors[name].shape != (n, heads):
            raise ValueError(f"linear_memory: {name} must be [{n}, {heads}], got {tuple(tensors[name].shape)}")
    if offsets.dim() != 1 or offsets.is_floating_point() or offsets.dtype == torch.bool or not len(offsets):
        raise ValueError(f"linear_memory: offsets must be integers [G+1], got {offsets.dtype} {tuple(offsets.shape)}")
    shape = (len(offsets) - 1, heads, width, v.shape[2])
    if state.shape != shape:
        raise ValueError(f"linear_memory: state must be {list(shape)}, got {list(state.shape)}")
    if not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"linear_memory: chunk must be at least 1, got {chunk!r}")
