"""lora_ffn in Triton: the grouped products of gemm_triton.py on rows in expert order, for the weights and for A and B
alike. Nothing here waits for the device.

Layout of h: [N, W] in the plan's order, columns as the weights' rows are stored (gate then up for a pair). Places of
nobody, behind the last expert's, are zero wherever somebody reads them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..chip import Chip
from ..gemm_triton import Matrix, rows_gemm
from ..grouped_ffn.on_triton import combine
from ..grouped_ffn.plain import join, split
from ..launch import Launch, can_map, launch, with_contiguous_rows
from ..plan.on_triton import schedule, tiles_of
from ..tiles import Size, Tiles, choose
from ..weight_grad_triton import dw_gemm
from .task import Delta, Task


def forward(*args: Any, chip: Chip, launch: Launch = launch) -> tuple[Tensor, Tensor]:
    *given, keep = args
    run = Run(Task.of(*given), chip, launch)
    task = run.task
    x = run.gathered(task.rows)
    h = run.hidden(x)
    a = task.act(*split(h.to(task.wide), task.act, task.interleaved)).to(h.dtype)
    out = run.product(a, task.last, task.b2, task.transposed)
    if task.down is not None:
        run.add(out, a, task.down, 1)
    y = task.rows.new_empty(task.rows.shape[0], out.shape[1])
    combine(
        out, run.order.row_of_pair, run.order.offsets, run.experts * run.skills, task.weights.contiguous(), y,
        top_k=run.top_k, launch=launch,
    )  # fmt: skip
    return y, h if keep else task.rows.new_empty(0, task.width)


def backward(grad: Tensor, *args: Any, chip: Chip, launch: Launch = launch) -> tuple[Tensor, ...]:
    h, needs = args[15], args[-1]
    run = Run(Task.of(*args[:15], *args[16:-1]), chip, launch)
    task, empty = run.task, grad.new_empty(0)
    want_x, want_s, *want_factors, want_gates = needs
    wide, parts = task.wide, split(h.to(task.wide), task.act, task.interleaved)
    s, g, a = run.weights[:, None], run.gathered(grad), task.act(*parts)
    dgates = torch.zeros(task.rows.shape[0], dtype=wide, device=grad.device) if want_gates else None
    of = [empty] * 4
    da = run.product_back(g, task.last, task.transposed)
    if task.down is not None:
        of[2:] = run.back(da, (a * s).to(h.dtype), g, task.down, 1, want_factors[2:], dgates)
    ds = empty
    if want_s:
        each = (da.to(wide) * a).sum(1)
        if task.b2 is not None:
            each = each + (g.to(wide) * task.b2.to(wide)[run.expert_of_place()]).sum(1)
        each = torch.where(run.live, each, 0)
        ds = each[run.order.row_of_pair.long()].view(task.weights.shape).to(task.weights.dtype)
    dx = empty
    if want_x or want_gates or any(want_factors[:2]):
        dh = join(task.act.backward(da.to(wide) * s, *parts), task.interleaved).to(h.dtype)
        dx_rows = run.hidden_back(dh) if want_x else None
        if task.up is not None:
            of[:2] = run.back(dx_rows, run.gathered(task.rows), dh, task.up, 0, want_factors[:2], dgates)
        if dx_rows is not None:
            dx = torch.empty_like(task.rows, memory_format=torch.contiguous_format)
            combine(
                dx_rows, run.order.row_of_pair, run.order.offsets, run.experts * run.skills, None, dx,
                top_k=run.top_k, launch=launch,
            )  # fmt: skip
    return dx, ds, *of, empty if dgates is None else dgates.to(task.gates.dtype)  # type: ignore[union-attr]


class Run:
    """The order of one pass, and its products. `order` sorts by expert and adapter; the weights see experts only."""

    def __init__(self, task: Task, chip: Chip, launch: Launch) -> None:
        self.task, self.chip, self.launch = task, chip, launch
        self.experts, self.skills, self.top_k = task.last.shape[0], task.skills, task.expert_ids.shape[1]
        ids = task.ids(self.experts, self.skills)
        self.order = schedule(ids, self.experts * self.skills, 0, launch=launch)
        self.offsets = self.order.offsets[:: self.skills].contiguous()
        self.pair = self.order.pair_of_row.long()
        self.token = self.pair // self.top_k
        places = torch.arange(len(self.pair), device=ids.device)
        self.live = places < self.offsets[-1]
        self.weights = torch.where(self.live, task.weights.reshape(-1)[self.pair].to(task.wide), 0)
        self.gate = None if task.gates is None else task.gates[self.token, None].to(task.rows.dtype)

    def expert_of_place(self) -> Tensor:
        places = torch.arange(len(self.pair), device=self.offsets.device)
        return torch.searchsorted(self.offsets[1:].long(), places, right=True).clamp(max=self.experts - 1)

    def gathered(self, t: Tensor) -> Tensor:
        return t[self.token]

    def _tiles(self, x: Tensor, columns: int, depth: int, experts: int, format: str) -> Tiles:
        formats = () if format == "none" else (format, format)
        size = Size(x.shape[0], columns, depth, experts, x.element_size(), gated=False, formats=formats)
        return choose(size, self.chip)

    def _rows(self, x: Tensor, w: Any, b: Tensor | None, transposed: bool, back: bool, offsets: Tensor) -> Tensor:
        m, x = Matrix.of(w, transposed), with_contiguous_rows(x)
        operand = m.backward() if back else m.forward()
        columns = w.shape[2 if transposed != back else 1]
        y = x.new_zeros(x.shape[0], columns)
        tile = self._tiles(x, columns, x.shape[1], w.shape[0], m.format).down
        order = tiles_of(offsets, x.shape[0], tile.rows, launch=self.launch)
        mapped = self.chip.tensor_maps and m.can_map
        rows_gemm(
            x, [operand], b, y, order, tile, chip=self.chip, launch=self.launch, mapped=mapped,
            map_rows=mapped and can_map(x),
        )  # fmt: skip
        return y

    def product(self, x: Tensor, w: Any, b: Tensor | None, transposed: bool) -> Tensor:
        return self._rows(x, w, b, transposed, False, self.offsets)

    def product_back(self, g: Tensor, w: Any, transposed: bool) -> Tensor:
        return self._rows(g, w, None, transposed, True, self.offsets)

    def hidden(self, x: Tensor) -> Tensor:
        task = self.task
        ups = [w for w in (task.first, task.second) if w is not None]
        parts = [self.product(x, w, task.b1, task.transposed) for w in ups]
        h = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        if task.up is not None:
            self.add(h, x, task.up, 0)
        return h

    def hidden_back(self, dh: Tensor) -> Tensor:
        task = self.task
        ups = [w for w in (task.first, task.second) if w is not None]
        parts = [self.product_back(d, w, task.transposed) for d, w in zip(dh.chunk(len(ups), 1), ups, strict=True)]
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def _mask(self, x: Tensor, which: int) -> Tensor | None:
        """What dropout multiplies by, drawn for all places at once, the same forward and back."""
        task = self.task
        if task.seed is None or not task.dropout:
            return None
        generator = torch.Generator(x.device).manual_seed(int(task.seed) + which)  # of the host: nothing waits
        drawn = torch.rand(x.shape, generator=generator, device=x.device)
        return (drawn >= task.dropout).to(x.dtype) / (1 - task.dropout)

    def _narrow(self, x: Tensor, delta: Delta) -> Tensor:
        """x A^T."""
        return self._rows(x, delta.a.to(x.dtype), None, False, False, self.order.offsets)

    def add(self, y: Tensor, x: Tensor, delta: Delta, which: int) -> None:
        """y += scale * gate * (x A^T) B^T."""
        mask = self._mask(x, which)
        z = self._narrow(x if mask is None else x * mask, delta)
        z = z if self.gate is None else z * self.gate
        y.add_(self._rows(z, delta.b.to(z.dtype), None, False, False, self.order.offsets), alpha=delta.scale)

    def back(
        self, dx: Tensor | None, x: Tensor, g: Tensor, delta: Delta, which: int, wanted: list[bool],
        dgates: Tensor | None,
    ) -> list[Tensor]:  # fmt: skip
        """dx += what comes back through scale * gate * (x A^T) B^T; returns the gradients of A and B."""
        a, b, offsets = delta.a.to(x.dtype), delta.b.to(x.dtype), self.order.offsets
        mask = self._mask(x, which)
        x = x if mask is None else x * mask
        z = self._narrow(x, delta)
        dz = self._rows(g, b, None, False, True, offsets) * delta.scale
        if dgates is not None:
            each = (z.to(dgates.dtype) * dz.to(dgates.dtype)).sum(1)
            dgates.index_add_(0, self.token, torch.where(self.live, each, 0))
        zg, dz = (z, dz) if self.gate is None else (z * self.gate, dz * self.gate)
        found = [g.new_empty(0), g.new_empty(0)]
        if wanted[0]:
            found[0] = self._contract(dz, x, torch.empty_like(a)).to(delta.a.dtype)
        if wanted[1]:
            found[1] = (self._contract(g, zg, torch.empty_like(b)) * delta.scale).to(delta.b.dtype)
        if dx is not None:
            low = self._rows(dz, a, None, False, True, offsets)
            dx.add_(low if mask is None else low * mask)
        return found

    def _contract(self, left: Tensor, right: Tensor, out: Tensor) -> Tensor:
        """out [E, m, n] = left^T right, expert by expert."""
        tile = self._tiles(left, out.shape[2], out.shape[1], out.shape[0], "none").dw
        left, right = with_contiguous_rows(left), with_contiguous_rows(right)
        offsets = self.order.offsets
        dw_gemm(left, right, out, None, offsets, offsets, 1, tile, chip=self.chip, launch=self.launch)
        return out
