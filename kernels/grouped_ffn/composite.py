"""grouped_ffn in operations of torch that every transform of torch.func can differentiate and batch (../transforms.py).

Where expert ids can be read an expert meets its own rows, as in reference.py. Where they cannot, under vmap or in a
traced graph, it meets all rows, of which others count as zero: E / K times the work, in shapes that depend on no data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..activation import Activation
from ..autocast import no_autocast
from ..transforms import readable
from .plain import split, views, wide_of


def forward(
    rows, expert_ids, weights, w1, w_up, w2, b1, b2, kind, params, gated, transposed, interleaved, _keep
) -> tuple[Tensor, Tensor]:
    act = Activation.from_params(kind, gated, params)
    ups, down = views(w1, w_up, w2, transposed)
    with no_autocast(rows.device):
        y = _sum(rows, expert_ids, weights, ups, down, b1, b2, act, interleaved)
    return y, y.new_empty(0, sum(u.shape[2] for u in ups))


def _sum(rows, expert_ids, weights, ups, down, b1, b2, act, interleaved) -> Tensor:
    wide, own = wide_of(rows.dtype), readable(expert_ids)
    y = rows.new_zeros(rows.shape[0], down.shape[2], dtype=wide)
    for e in range(down.shape[0]):
        chosen = expert_ids == e
        scale = torch.where(chosen, weights.to(wide), 0).sum(1, keepdim=True)
        here = chosen.any(1)
        if own:
            t = here.nonzero()[:, 0]
            if t.numel():
                out = _one(rows[t].to(wide), e, ups, down, b1, b2, act, interleaved)
                y = y.index_add(0, t, out * scale[t])
        else:  # the rows of others are zero before and after: what overflows there has no gradient
            x = torch.where(here[:, None], rows.to(wide), 0)
            out = _one(x, e, ups, down, b1, b2, act, interleaved)
            y = y + torch.where(here[:, None], out * scale, 0)
    return y.to(rows.dtype)


def _one(x, e, ups, down, b1, b2, act, interleaved) -> Tensor:
    h = torch.cat([x @ u[e].to(x.dtype) for u in ups], 1)
    if b1 is not None:
        h = h + b1[e].to(x.dtype)
    out = act(*split(h, act, interleaved)) @ down[e].to(x.dtype)
    return out if b2 is None else out + b2[e].to(x.dtype)


def without_h(rows, expert_ids, weights, w1, w_up, w2, b1, b2, _h, *form) -> Tensor:
    """y of the arguments of grouped_ffn_backward."""
    return forward(rows, expert_ids, weights, w1, w_up, w2, b1, b2, *form, False)[0]
