"""A dense model run layer by layer, one layer's weights in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..record import evaluating
from .dense import Dense, mlp


class Walk:
    """`sequences` token ids [B, S] run through `dense`. `lengths`: tokens of each sequence, in order."""

    def __init__(self, dense: Dense, ids: Sequence[Tensor]) -> None:
        self.dense, self.ids = dense, ids
        self.lengths = [one.shape[1] for one in ids for _ in range(len(one))]
        self.sequences = len(self.lengths)

    @torch.no_grad()
    def layers(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(layer, what its FFN takes [T, D], what each neuron contributes [T, F], fp32: |h| times the norm of its
        column of the down projection, in shares of their sum)."""
        dense, model = self.dense, self.dense.model
        m: Any = model
        whole = m.model
        table = dense.read("model.embed_tokens.weight")
        xs = [table[ids.to(table.device)] for ids in self.ids]
        rotary = type(whole.rotary_emb)(config=dense.config).to(table.device)
        del table
        for i, layer in enumerate(whole.layers):
            prefix = f"model.layers.{i}."
            weights = {n[len(prefix) :]: dense.read(n) for n in dense.shapes if n.startswith(prefix)}
            taken: dict[str, list[Tensor]] = {"x": [], "h": []}
            hooks = [_note(layer.mlp, taken["x"]), _note(layer.mlp.down_proj, taken["h"])]
            try:
                with evaluating(layer):
                    xs = [_step(layer, weights, rotary, x) for x in xs]
            finally:
                for hook in hooks:
                    hook.remove()
            norms = dense.read(f"{mlp(i)}.down_proj.weight").float().norm(dim=0)
            mass = torch.cat(taken["h"]).float().abs() * norms
            yield i, torch.cat(taken["x"]), mass / mass.sum(1, keepdim=True).clamp_min(1e-30)


def _note(module: nn.Module, into: list[Tensor]):
    return module.register_forward_pre_hook(lambda _, args: into.append(args[0].flatten(0, -2)))


def _step(layer: Any, weights: dict[str, Tensor], rotary: nn.Module, x: Tensor) -> Tensor:
    """One layer on one batch [B, S, D], causal, within the layer's window."""
    positions = torch.arange(x.shape[1], device=x.device)
    behind = positions[:, None] - positions
    window = getattr(layer.self_attn, "sliding_window", None)
    seen = (behind >= 0) & (behind < (window or x.shape[1]))
    mask = torch.zeros(seen.shape, dtype=x.dtype, device=x.device).masked_fill_(~seen, torch.finfo(x.dtype).min)
    given = {
        "attention_mask": mask[None, None], "position_ids": positions[None],
        "position_embeddings": rotary(x, positions[None]),
    }  # fmt: skip
    found = functional_call(layer, weights, (x,), given)
    return found[0] if isinstance(found, tuple) else found
