"""lora_ffn as a loop over experts of plain torch matmuls: the form for CPUs, and for every device without a kernel.

An expert's rows are gathered, multiplied and activated while they are hot, the low-rank products between. The
pre-activation is the one thing kept; products of rank r are made anew in the backward pass. Layout of h: [R*K, W],
place i of the plan in row i, columns as the weights' rows are stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..autocast import no_autocast
from ..grouped_ffn.plain import join as joined
from ..grouped_ffn.plain import live_pairs, split, views
from ..grouped_ffn.quantized import widened
from ..native import product_type
from ..quantized import Quantized
from .task import Delta, Task, blocks_of, kept


class Scratch:
    """Memory that one expert after another computes in: what is fresh from the system costs more than the copy."""

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        self.like, self.dtype, self.held = like, dtype, dict[str, Tensor]()

    def room(self, name: str, *shape: int) -> Tensor:
        """An uninitialised tensor, which lasts until the next call of this name."""
        size, held = math.prod(shape), self.held.get(name)
        if held is None or held.numel() < size:
            held = self.held[name] = self.like.new_empty(size, dtype=self.dtype)
        return held[:size].view(shape)

    def of(self, name: str, t: Tensor) -> Tensor:
        """t in the type of products."""
        return t if t.dtype == self.dtype else self.room(name, *t.shape).copy_(t)


class _As:
    """Weights [S, in, out] of which an expert is brought to the type of products when it is asked for."""

    def __init__(self, name: str, weights: Any, scratch: Scratch) -> None:
        self.name, self.weights, self.scratch, self.shape = name, weights, scratch, weights.shape

    def __getitem__(self, e: int) -> Tensor:
        one = self.weights[e]
        turned = one.stride(0) == 1  # copied as it is stored
        return self.scratch.of(self.name, one.T).T if turned else self.scratch.of(self.name, one)


@dataclass(frozen=True)
class Rows:
    """The rows of one expert: `e` its number, `slots` its place in all weights or in each, `pairs` [n] in the plan's
    order, `blocks` which adapter's each are (see blocks_of), `x` [n, D] for products, `gate` [n, 1] or None."""

    e: int
    slots: tuple[int, ...]
    first: int
    pairs: Tensor
    tokens: Tensor
    blocks: list[tuple[int, int, int]]
    x: Tensor
    gate: Tensor | None


class Loop:
    """A task with all that its experts share, and one expert's step forward and back. `slots` [E], or [weights, E] with
    a table for each: where each expert lies in the weights, -1: nowhere; None: all are there, each in its place. E is
    the routing's number."""

    def __init__(self, task: Task, slots: Tensor | None = None, experts: int | None = None) -> None:
        self.task, self.dtype = task, product_type(task.rows)
        stored = (task.first, task.second, task.last)
        first, second, last = widened(self.dtype, stored) if isinstance(task.last, Quantized) else stored
        ups, down = views(first, second, last, task.transposed)
        self.scratch = Scratch(task.rows, self.dtype)
        self.ups = [_As(f"up{i}", u, self.scratch) for i, u in enumerate(ups)]
        self.down = _As("down", down, self.scratch)
        self.b1, self.b2 = (None if b is None else b.to(self.dtype) for b in (task.b1, task.b2))
        self.slots = slots
        self.experts = task.last.shape[0] if experts is None else experts
        some = task.up or task.down
        self.skills = 1 if some is None or task.skill_of_row is None else some.a.shape[0] // self.experts
        _check_skills(task, self.skills)
        ids = task.ids(self.experts, self.skills)
        self.pair, self.offsets = live_pairs(ids, self.experts * self.skills, "lora_ffn")
        self.seed = None if task.seed is None or not task.dropout else int(task.seed)

    def __iter__(self) -> Iterator[Rows]:
        task, k = self.task, self.task.expert_ids.shape[1]
        tables = [[*range(self.experts)]] if self.slots is None else self.slots.view(-1, self.experts).tolist()
        for e in range(self.experts):
            slots = tuple(table[e] for table in tables)
            lo, hi = self.offsets[e * self.skills], self.offsets[(e + 1) * self.skills]
            if slots[0] < 0 or lo == hi:
                continue
            pairs = self.pair[lo:hi]
            tokens = pairs // k
            gate = None if task.gates is None else task.gates[tokens, None].to(self.dtype)
            blocks = blocks_of(self.offsets, e, self.skills)
            yield Rows(e, slots, lo, pairs, tokens, blocks, self.scratch.of("x", task.rows[tokens]), gate)

    def hidden(self, own: Rows) -> Tensor:
        """The pre-activation [n, W], rounded to the rows' dtype as it is kept."""
        widths = [u.shape[2] for u in self.ups]
        h = self.scratch.room("h", len(own.x), sum(widths))
        for i, (part, u) in enumerate(zip(h.split(widths, 1), self.ups, strict=True)):
            torch.mm(own.x, u[own.slots[min(i, len(own.slots) - 1)]], out=part)
        if self.b1 is not None:
            h += self.b1[own.slots[0]]
        if self.task.up is not None:
            self._add(h, own.x, own, self.task.up, 0)
        return h.to(self.task.rows.dtype)

    def output(self, own: Rows, h: Tensor) -> Tensor:
        """The un-weighted outputs [n, D] in the wide type."""
        task = self.task
        a = task.act(*split(h.to(task.wide), task.act, task.interleaved)).to(self.dtype)
        out = torch.mm(a, self.down[own.slots[-1]], out=self.scratch.room("out", len(a), self.down.shape[2]))
        if self.b2 is not None:
            out += self.b2[own.slots[-1]]
        if task.down is not None:
            self._add(out, a, own, task.down, 1)
        return out.to(task.wide)

    def _add(self, y: Tensor, x: Tensor, own: Rows, delta: Delta, which: int) -> None:
        """y += scale * gate * (x A^T) B^T."""
        x = x if self.seed is None else x * self._mask(x, own, which)
        for i, lo, hi in own.blocks:
            z = x[lo:hi] @ delta.a[i].to(self.dtype).T
            z = z if own.gate is None else z * own.gate[lo:hi]
            y[lo:hi].addmm_(z, delta.b[i].to(self.dtype).T, alpha=delta.scale)

    def _mask(self, x: Tensor, own: Rows, which: int) -> Tensor:
        assert self.seed is not None
        return kept(self.seed + 2 * own.e + which, tuple(x.shape), self.task.dropout, x)

    def back(self, own: Rows, h: Tensor, grad: Tensor, out: Gradients) -> tuple[Tensor | None, Tensor | None]:
        """(gradient of x [n, D], gradient of the router weights [n]) in the wide type, those that are wanted; those of
        adapters and gates go to `out`. `grad` [n, D] of the rows' weighted outputs."""
        task, wide = self.task, self.task.wide
        s = task.weights.reshape(-1)[own.pairs, None].to(wide)
        g, parts = self.scratch.of("g", grad), split(h.to(wide), task.act, task.interleaved)
        a = task.act(*parts)
        da = torch.mm(g, self.down[own.slots[-1]].T, out=self.scratch.room("a", len(g), self.down.shape[1]))
        if task.down is not None:
            self._back(da, (a * s).to(self.dtype), g, own, task.down, 1, out)
        da = da.to(wide)
        ds = None
        if out.want_weights:
            ds = (da * a).sum(1)
            if self.b2 is not None:
                ds += (g * self.b2[own.slots[-1]]).sum(1, dtype=wide)
        if not out.want_hidden:
            return None, ds
        dh = self._slopes(da.mul_(s), parts)
        widths = [u.shape[2] for u in self.ups]
        dx = None
        if out.want_rows:
            dx = self.scratch.room("out", *own.x.shape)
            for i, (d, u) in enumerate(zip(dh.split(widths, 1), self.ups, strict=True)):
                torch.addmm(dx, d, u[own.slots[min(i, len(own.slots) - 1)]].T, beta=int(i > 0), out=dx)
        if task.up is not None:
            self._back(dx, own.x, dh, own, task.up, 0, out)
        return None if dx is None else dx.to(wide), ds

    def _slopes(self, da: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
        """dH [n, W] of the activation's gradient. A plain silu in torch's fused operations."""
        act = self.task.act
        simple = act.gated and act.kind == "silu" and act.alpha == 1 and act.limit == math.inf and not act.up_shift
        if not simple or self.task.interleaved or self.dtype != da.dtype:
            return joined(act.backward(da, *parts), self.task.interleaved).to(self.dtype)
        gate, up = parts
        dh = self.scratch.room("dh", len(da), 2 * da.shape[1])
        of_gate, of_up = dh.chunk(2, 1)
        torch.mul(da, torch.nn.functional.silu(gate), out=of_up)
        torch.ops.aten.silu_backward(da.mul_(up), gate, grad_input=of_gate)
        return dh

    def _back(
        self, dx: Tensor | None, x: Tensor, g: Tensor, own: Rows, delta: Delta, which: int, out: Gradients
    ) -> None:
        """dx += what comes back through scale * gate * (x A^T) B^T; and the gradients of A, B and gate."""
        mask = None if self.seed is None else self._mask(x, own, which)
        kept_x = x if mask is None else x * mask
        da, db = out.of[which]
        for i, lo, hi in own.blocks:
            a, b = delta.a[i].to(self.dtype), delta.b[i].to(self.dtype)
            gate = None if own.gate is None else own.gate[lo:hi]
            z = kept_x[lo:hi] @ a.T
            dz = (g[lo:hi] @ b).mul_(delta.scale)
            if out.gates is not None:
                out.gates.index_add_(0, own.tokens[lo:hi], (z * dz).sum(1, dtype=out.gates.dtype))
            zg = z if gate is None else z * gate
            dz = dz if gate is None else dz * gate
            if db is not None:
                db[i] = (g[lo:hi].T @ zg).mul_(delta.scale).to(db.dtype)
            if da is not None:
                da[i] = (dz.T @ kept_x[lo:hi]).to(da.dtype)
            if dx is not None:
                if mask is None:
                    dx[lo:hi].addmm_(dz, a)
                else:
                    dx[lo:hi].addcmul_(dz @ a, mask[lo:hi])


def _check_skills(task: Task, skills: int) -> None:
    """As expert ids: where they can be read without waiting for a device."""
    skill = task.skill_of_row
    if skill is None or skill.device.type != "cpu" or not skill.numel() or not (task.up or task.down):
        return
    low, high = (int(s) for s in skill.aminmax())
    if low < 0 or high >= skills:
        raise IndexError(f"lora_ffn: skill_of_row must be in 0 .. {skills - 1}, got {low if low < 0 else high}")


@dataclass
class Gradients:
    """Where gradients go: `of` (dA, dB) of the up and of the down projection, each None where it is not wanted or not
    there; `gates` [R] or None; and which others are wanted."""

    of: tuple[tuple[Tensor | None, Tensor | None], tuple[Tensor | None, Tensor | None]]
    gates: Tensor | None
    want_rows: bool
    want_weights: bool

    @property
    def want_hidden(self) -> bool:
        return self.want_rows or self.gates is not None or any(t is not None for t in self.of[0])


def forward(*args: Any) -> tuple[Tensor, Tensor]:
    *given, keep = args
    task = Task.of(*given)
    loop, rows = Loop(task), task.rows
    width = task.width
    h_all = rows.new_empty(task.expert_ids.numel() if keep else 0, width)
    h_all[loop.offsets[-1] :] = 0  # places of nobody
    y = torch.zeros(rows.shape[0], loop.down.shape[2], dtype=task.wide, device=rows.device)
    scale = task.weights.reshape(-1).to(task.wide)
    with no_autocast(rows.device):  # which would have products of other types than their sums
        for own in loop:
            h = loop.hidden(own)
            if keep:
                h_all[own.first : own.first + len(h)] = h
            y.index_add_(0, own.tokens, loop.output(own, h).mul_(scale[own.pairs, None]))
    return y.to(rows.dtype), h_all


def backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    h_all, needs = args[15], args[-1]
    task = Task.of(*args[:15], *args[16:-1])
    loop, rows = Loop(task), task.rows
    want_x, want_s, *want_factors, want_gates = needs
    empty = rows.new_empty(0)
    factors = [t for d in (task.up, task.down) for t in ((None, None) if d is None else (d.a, d.b))]
    found = [
        torch.zeros_like(t, memory_format=torch.contiguous_format) if t is not None and want else None
        for t, want in zip(factors, want_factors, strict=True)
    ]
    dgates = torch.zeros(rows.shape[0], dtype=task.wide, device=rows.device) if want_gates else None
    dx = torch.zeros(rows.shape, dtype=task.wide, device=rows.device) if want_x else empty
    ds = torch.zeros(task.weights.numel(), dtype=task.wide, device=rows.device) if want_s else empty
    out = Gradients(((found[0], found[1]), (found[2], found[3])), dgates, want_x, want_s)
    with no_autocast(rows.device):
        for own in loop:
            n = len(own.pairs)
            d_rows, d_weights = loop.back(own, h_all[own.first : own.first + n], grad[own.tokens], out)
            if d_rows is not None:
                dx.index_add_(0, own.tokens, d_rows)
            if d_weights is not None:
                ds[own.pairs] = d_weights
    return (
        dx.to(rows.dtype),
        ds.view(task.weights.shape).to(task.weights.dtype) if want_s else ds,
        *(empty if t is None else t for t in found),
        empty if dgates is None else dgates.to(task.gates.dtype),  # type: ignore[union-attr]
    )
