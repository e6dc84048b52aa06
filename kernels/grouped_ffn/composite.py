"""grouped_ffn in operations of torch that every transform of torch.func can differentiate and batch (../transforms.py).

Where expert ids can be read an expert meets its own rows, as in reference.py. Where they cannot, under vmap or in a
traced graph, it meets all rows, of which others count as zero: E / K times the work, in shapes that depend on no data.
"""

from __future__ import annotations

from typing import Any

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
    y = rows.new_zeros(rows.shape[0], down.shape[2], dtype=wide_of(rows.dtype))
    first, last, b1, b2 = [_apart(u) for u in ups], _apart(down), _apart(b1), _apart(b2)
    with no_autocast(rows.device):
        y = _add(y, rows, expert_ids, weights, first, last, b1, b2, act, interleaved)
    return y.to(rows.dtype), rows.new_empty(0, sum(u.shape[2] for u in ups))


def _apart(w: Any) -> Any:
    """The experts' own weights: their gradients meet once, not an expert at a time in a tensor for all."""
    return w.unbind(0) if isinstance(w, Tensor) else w


def _add(y, rows, expert_ids, weights, ups, down, b1, b2, act, interleaved) -> Tensor:
    wide, own = y.dtype, readable(expert_ids)
    for e in range(len(down)):
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
    return y


def _one(x, e, ups, down, b1, b2, act, interleaved) -> Tensor:
    h = torch.cat([x @ u[e].to(x.dtype) for u in ups], 1)
    if b1 is not None:
        h = h + b1[e].to(x.dtype)
    out = act(*split(h, act, interleaved)) @ down[e].to(x.dtype)
    return out if b2 is None else out + b2[e].to(x.dtype)


def without_h(rows, expert_ids, weights, w1, w_up, w2, b1, b2, _h, *form) -> Tensor:
    """y of the arguments of grouped_ffn_backward."""
    return forward(rows, expert_ids, weights, w1, w_up, w2, b1, b2, *(*form, False))[0]
