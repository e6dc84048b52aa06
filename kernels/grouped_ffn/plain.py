"""grouped_ffn as a loop over experts of plain torch matmuls: serves every dtype, device and machine without a compiler.

An expert's rows are gathered, multiplied, activated and multiplied again while they are hot; the pre-activation is the
one thing kept. Layout of h: [T*K, W], place i of the plan in row i, columns as the weights' rows are stored (gate then
up for a pair).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..activation import Activation
from ..plan import plan


def wide_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def views(w1: Tensor, w_up: Tensor | None, w2: Tensor, transposed: bool) -> tuple[list[Tensor], Tensor]:
    """Projections as [E, in, out] views (the right side of rows @ w), whatever is stored."""
    ups = [w1] if w_up is None else [w1, w_up]
    return [w if transposed else w.transpose(1, 2) for w in ups], w2 if transposed else w2.transpose(1, 2)


def split(h: Tensor, act: Activation, interleaved: bool) -> tuple[Tensor, ...]:
    if not act.gated:
        return (h,)
    return (h[:, 0::2], h[:, 1::2]) if interleaved else h.chunk(2, dim=1)


def join(parts: tuple[Tensor, ...], interleaved: bool) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    return torch.stack(parts, 2).flatten(1) if interleaved else torch.cat(parts, 1)


def live_pairs(expert_ids: Tensor, experts: int, op: str = "grouped_ffn") -> tuple[Tensor, list[int]]:
    """The pairs in the plan's order, and where each expert's begin."""
    if expert_ids.numel() and int(expert_ids.min()) < -1:
        raise IndexError(f"{op}: expert_ids must be at least -1 (no expert), got {int(expert_ids.min())}")
    order = plan(expert_ids, experts)
    return order.pair_of_row.long(), order.offsets.tolist()


def hidden(x, e, ups, b1) -> Tensor:
    """The pre-activation of the rows x of the expert whose weights are the e-th."""
    h = torch.cat([x @ u[e] for u in ups], 1) if len(ups) > 1 else x @ ups[0][e]
    if b1 is not None:
        h += b1[e]
    return h


def hidden_gradients(g, s, h, down, act, interleaved) -> tuple[Tensor, Tensor, Tensor]:
    """(dH, dA' = g W2^T, A) of an expert's rows with weights s [n, 1], the output's gradient g, the pre-activation h in
    the wide type, and `down` [F, D]."""
    parts = split(h, act, interleaved)
    a, da = act(*parts), (g @ down.T).to(h.dtype)
    return join(act.backward(da * s, *parts), interleaved), da, a


def one_expert(x, e, ups, down, b1, b2, act, interleaved) -> tuple[Tensor, Tensor]:
    """(pre-activation, output) of the rows x of the expert whose weights are the e-th."""
    h = hidden(x, e, ups, b1)
    out = act(*(s.to(wide_of(x.dtype)) for s in split(h, act, interleaved))).to(x.dtype) @ down[e]
    if b2 is not None:
        out += b2[e]
    return h, out


def forward(
    rows, expert_ids, weights, w1, w_up, w2, b1, b2, kind, params, gated, transposed, interleaved, keep
) -> tuple[Tensor, Tensor]:
    act = Activation.from_params(kind, gated, params)
    ups, down = views(w1, w_up, w2, transposed)
    wide, k = wide_of(rows.dtype), expert_ids.shape[1]
    pair, offsets = live_pairs(expert_ids, w2.shape[0])
    width = sum(u.shape[2] for u in ups)
    h_all = rows.new_empty(pair.numel() if keep else 0, width)
    y = torch.zeros(rows.shape[0], down.shape[2], dtype=wide, device=rows.device)
    scale = weights.reshape(-1).to(wide)
    for e in range(w2.shape[0]):
        lo, hi = offsets[e], offsets[e + 1]
        if lo == hi:
            continue
        p = pair[lo:hi]
        t = p // k
        h, out = one_expert(rows[t], e, ups, down, b1, b2, act, interleaved)
        if keep:
            h_all[lo:hi] = h
        y.index_add_(0, t, out.to(wide) * scale[p, None])
    return y.to(rows.dtype), h_all


def backward(
    grad, rows, expert_ids, weights, w1, w_up, w2, b1, b2, h_all, kind, params, gated, transposed, interleaved, needs
) -> tuple[Tensor, ...]:
    act = Activation.from_params(kind, gated, params)
    ups, down = views(w1, w_up, w2, transposed)
    wide, k, dtype = wide_of(rows.dtype), expert_ids.shape[1], rows.dtype
    pair, offsets = live_pairs(expert_ids, w2.shape[0])
    scale = weights.reshape(-1).to(wide)
    want_x, want_s, want_1, want_up, want_2, want_b1, want_b2 = needs
    dx = torch.zeros(rows.shape, dtype=wide, device=rows.device) if want_x else rows.new_empty(0)
    ds = torch.zeros(weights.numel(), dtype=wide, device=rows.device) if want_s else rows.new_empty(0)
    d1, du, d2, db1, db2 = (
        torch.zeros(t.shape, dtype=t.dtype, device=t.device) if t is not None and w else rows.new_empty(0)
        for t, w in ((w1, want_1), (w_up, want_up), (w2, want_2), (b1, want_b1), (b2, want_b2))
    )
    for e in range(w2.shape[0]):
        lo, hi = offsets[e], offsets[e + 1]
        if lo == hi:
            continue
        p = pair[lo:hi]
        t = p // k
        s = scale[p, None]
        g = grad[t]
        dh, da, a = hidden_gradients(g, s, h_all[lo:hi].to(wide), down[e], act, interleaved)
        if want_s:
            ds[p] = (da * a).sum(1)
            if b2 is not None:
                ds[p] += (g.to(wide) * b2[e].to(wide)).sum(1)
        if want_2:
            sa = (a * s).to(dtype)
            torch.mm(*((sa.T, g) if transposed else (g.T, sa)), out=d2[e])
        if want_b2:
            db2[e] = (g.to(wide) * s).sum(0)
        if want_b1:
            db1[e] = dh.sum(0)
        dhs = [dh.to(dtype)] if w_up is None else list(dh.to(dtype).chunk(2, dim=1))
        if want_x:
            for d, u in zip(dhs, ups, strict=True):
                dx.index_add_(0, t, (d @ u[e].T).to(wide))
        if want_1 or want_up:
            x = rows[t]
            for d, dw, want in zip(dhs, (d1, du), (want_1, want_up), strict=False):
                if want:
                    torch.mm(*((x.T, d) if transposed else (d.T, x)), out=dw[e])
    return (
        dx.to(dtype),
        ds.reshape(weights.shape).to(weights.dtype) if want_s else ds,
        d1,
        du,
        d2,
        db1,
        db2,
    )
