"""lora_ffn in operations of torch that every transform of torch.func can differentiate and batch (../transforms.py), as
grouped_ffn/composite.py: where expert ids cannot be read, an expert meets all rows, of which others count as zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..autocast import no_autocast
from ..grouped_ffn.plain import split, views
from ..grouped_ffn.quantized import widened
from ..quantized import Quantized
from ..transforms import readable
from .task import Delta, Task


def forward(*args: Any) -> tuple[Tensor, Tensor]:
    task = Task.of(*args[:-1])
    if task.seed is not None and task.dropout:
        raise NotImplementedError("lora_ffn: dropout must be 0 under a transform of torch.func, got some")
    stored = (task.first, task.second, task.last)
    first, second, last = widened(task.wide, stored) if isinstance(task.last, Quantized) else stored
    ups, down = views(first, second, last, task.transposed)
    y = task.rows.new_zeros(task.rows.shape[0], down.shape[2], dtype=task.wide)
    with no_autocast(task.rows.device):
        for e in range(task.last.shape[0]):
            y = y + _expert(task, e, ups, down)
    return y.to(task.rows.dtype), task.rows.new_empty(0, task.width)


def without_h(*args: Any) -> Tensor:
    """y of the arguments of lora_ffn_backward."""
    return forward(*args[:15], *args[16:], False)[0]


def _expert(task: Task, e: int, ups: Any, down: Any) -> Tensor:
    """What expert e adds to y."""
    chosen, wide = task.expert_ids == e, task.wide
    here, scale = chosen.any(1), torch.where(chosen, task.weights.to(wide), 0).sum(1, keepdim=True)
    if readable(task.expert_ids):
        t = here.nonzero()[:, 0]
        out = _one(task, e, task.rows[t].to(wide), t, ups, down) * scale[t]
        return task.rows.new_zeros(task.rows.shape[0], out.shape[1], dtype=wide).index_add(0, t, out)
    x = torch.where(here[:, None], task.rows.to(wide), 0)
    return torch.where(here[:, None], _one(task, e, x, None, ups, down) * scale, 0)


def _one(task: Task, e: int, x: Tensor, t: Tensor | None, ups: Any, down: Any) -> Tensor:
    h = torch.cat([x @ u[e].to(x.dtype) for u in ups], 1) + _delta(task, e, x, t, task.up)
    if task.b1 is not None:
        h = h + task.b1[e].to(x.dtype)
    a = task.act(*split(h, task.act, task.interleaved))
    out = a @ down[e].to(x.dtype) + _delta(task, e, a, t, task.down)
    return out if task.b2 is None else out + task.b2[e].to(x.dtype)


def _delta(task: Task, e: int, x: Tensor, t: Tensor | None, delta: Delta | None) -> Tensor | float:
    """scale * gate * (x A^T) B^T, each row by its own adapter; `t`: which rows these are, None: all."""
    if delta is None:
        return 0.0
    skill = task.skill_of_row if task.skill_of_row is None or t is None else task.skill_of_row[t]
    gate = task.gates if task.gates is None or t is None else task.gates[t]
    y: Tensor | float = 0.0
    for s in range(task.skills):
        i = e * task.skills + s
        own = (x @ delta.a[i].to(x.dtype).T) @ delta.b[i].to(x.dtype).T * delta.scale
        y = y + (own if skill is None else torch.where((skill == s)[:, None], own, 0))
    return y if gate is None else y * gate[:, None].to(x.dtype)
