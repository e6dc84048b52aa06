"""Routers with numbers that no gradient moves: a step after each optimizer step, from what was counted before it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ...dispatch import collectives
from .router import GatedRouter


class SteeredRouter(GatedRouter):
    """Abstract: a GatedRouter that counts while training (`saw` adds to `load`) and moves by it (`_step`).

    `load` [*load_shape] or None adds up over the training forwards since the last `update_bias`, so that it works over
    accumulated micro-steps, of any sizes: call that once after each optimizer step, or let `headgate.update_biases` do
    so for a whole model. What activation checkpointing runs again does not count. The buffers named in `steered` are
    saved with the model and stay fp32 when it is cast: their steps are smaller than bf16 can tell apart.
    """

    steered: tuple[str, ...]
    load: Tensor | None = None

    @property
    def load_shape(self) -> tuple[int, ...]:
        return (self.num_experts,)

    def _step(self, load: Tensor) -> None:
        """Moves by what was counted, fp64 [*load_shape], on the buffers' device."""
        raise NotImplementedError

    def _add(self, load: Tensor) -> None:
        self.load = load if self.load is None else self.load + load

    @torch.no_grad()
    def update_bias(self, counts: Tensor | None = None, group: dist.ProcessGroup | None = None) -> None:
        """One step; no gradient is involved. `counts` [..., *load_shape] is added up over its leading axes; None takes
        `load`. `group` adds the counts of its ranks, so that all of them take the same step. `load` starts again from
        nothing.

        Raises ValueError where `counts` does not end in the shape of `load`, or is None and no training forward was
        seen.
        """
        who, shape = f"{type(self).__name__}.update_bias", self.load_shape
        counts = self.load if counts is None else counts
        if counts is None:
            raise ValueError(f"{who}: counts must be given before any training forward, got None")
        if counts.shape[-len(shape) :] != shape:
            raise ValueError(f"{who}: counts must be [..., {', '.join(map(str, shape))}], got {tuple(counts.shape)}")
        load = counts.detach().reshape(-1, *shape).sum(0, dtype=torch.float64).to(getattr(self, self.steered[0]).device)
        if group is not None:
            load = collectives.all_reduce(load, group)
        self._step(load)
        self.load = None

    def _apply(self, fn, recurse=True):
        before = {name: getattr(self, name) for name in self.steered}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            now = getattr(self, name)
            if now.dtype != torch.float32:
                setattr(self, name, buffer.to(now.device))
        self.load = None
        return self
