"""grouped_linear in operations of torch that every transform of torch.func can differentiate and batch
(../transforms.py): where offsets cannot be read, every expert meets all rows, of which others count as zero."""

from __future__ import annotations

import torch
from torch import Tensor

from ..autocast import no_autocast
from ..transforms import readable
from .reference import grouped_linear_reference


def composite(x: Tensor, offsets: Tensor, w: Tensor, b: Tensor | None, transposed: bool) -> Tensor:
    with no_autocast(x.device):
        if readable(offsets):
            return grouped_linear_reference(x, offsets, w, b, transposed)
        wide = torch.promote_types(x.dtype, torch.float32)
        w = w if transposed else w.transpose(1, 2)
        y = x.new_zeros(x.shape[0], w.shape[2], dtype=wide)
        place = torch.arange(x.shape[0], device=x.device)
        for e, right in enumerate(w.unbind(0)):
            here = ((place >= offsets[e]) & (place < offsets[e + 1]))[:, None]
            own = torch.where(here, x.to(wide), 0) @ right.to(wide)
            y = y + torch.where(here, own if b is None else own + b[e].to(wide), 0)
        return y.to(x.dtype)
