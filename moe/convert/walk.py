"""A dense model run layer by layer, one layer's weights in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..record import evaluating
from .dense import Dense

_TOKENS = 4096  # that run through a layer together, or one sequence
Note = Callable[[int, Tensor], Tensor]


class Walk:
    """`sequences` token ids [B, S] run through `dense`, some at a time."""

    def __init__(self, dense: Dense, ids: Sequence[Tensor]) -> None:
        self.dense = dense
        self.ids = [part for one in ids for part in one.split(max(1, _TOKENS // one.shape[1]))]
        self.sequences = sum(len(one) for one in ids)

    @torch.no_grad()
    def layers(self, note: Note = lambda _, mass: mass.flatten(0, 1)) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(layer, what its FFN takes [T, D], what is noted of what each neuron contributes): `note(layer, mass)`,
        called with some sequences at a time and joined, mass [B, S, F] fp32: |h| times the norm of its column of the
        down projection, in shares of their sum. In memory beside it: hidden states, and `mass` of _TOKENS tokens."""
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
            norms = weights["mlp.down_proj.weight"].float().norm(dim=0)
            taken, noted, inner = list[Tensor](), list[Tensor](), list[Tensor]()
            hooks = [_note(layer.mlp, taken), _note(layer.mlp.down_proj, inner)]
            try:
                with evaluating(layer):
                    for place, x in enumerate(xs):
                        xs[place] = _step(layer, weights, rotary, x)
                        mass = inner.pop().float().abs() * norms
                        noted.append(note(i, mass / mass.sum(-1, keepdim=True).clamp_min(1e-30)))
            finally:
                for hook in hooks:
                    hook.remove()
            yield i, torch.cat([x.flatten(0, 1) for x in taken]), torch.cat(noted)


def _note(module: nn.Module, into: list[Tensor]):
    return module.register_forward_pre_hook(lambda _, args: into.append(args[0]))


def _step(layer: Any, weights: dict[str, Tensor], rotary: nn.Module, x: Tensor) -> Tensor:
    """One layer on one batch [B, S, D], causal, within the layer's window."""
    positions = torch.arange(x.shape[1], device=x.device)
    behind = positions[:, None] - positions
    attention = layer.self_attn  # Mistral's says nothing: its config does, for all layers
    window = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))
    seen = (behind >= 0) & (behind < (window or x.shape[1]))
    mask = torch.zeros(seen.shape, dtype=x.dtype, device=x.device).masked_fill_(~seen, torch.finfo(x.dtype).min)
    given = {
        "attention_mask": mask[None, None], "position_ids": positions[None],
        "position_embeddings": rotary(x, positions[None]),
    }  # fmt: skip
    found = functional_call(layer, weights, (x,), given)
    return found[0] if isinstance(found, tuple) else found
