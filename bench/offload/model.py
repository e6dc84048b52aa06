"""A transformers model of chosen size whose routers say what a trace says: real experts' traffic at any width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...moe.hf import replace
from ...placement.traces.trace import Trace


@dataclass(frozen=True)
class Size:
    """D hidden, F expert intermediate; the layers are the trace's first `layers`. An expert has 3 D F weights."""

    hidden: int = 1024
    ffn: int = 512
    layers: int = 6
    dtype: torch.dtype = torch.bfloat16


ON_GPU = {  # experts as these models have them, 64 to a layer
    "qwen3-235b": Size(4096, 1536, 8),  # an expert takes 37.7 MB, all together 19.3 GB
    "olmoe": Size(2048, 1024, 16),  # 12.6 MB, 12.9 GB
}


def build(trace: Trace, size: Size, seed: int = 0, device: torch.device | str = "cpu") -> nn.Module:
    """An OlmoeForCausalLM with random weights, made on `device`, swapped, its routers replaced by `Replay`."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    config = OlmoeConfig(
        vocab_size=256,
        hidden_size=size.hidden,
        intermediate_size=size.ffn,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 64,
        num_experts=trace.num_experts,
        num_experts_per_tok=trace.shape[2],
        pad_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        before = torch.get_default_dtype()
        torch.set_default_dtype(size.dtype)
        try:
            with torch.device(device):  # ten thousand million numbers take minutes on a CPU
                model = OlmoeForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(before)
    replace(model)
    return model


class Replay:
    """Sets the routers of a model built by `build` to the choices of a trace: each call of a layer's router takes the
    next tokens, weights 1 / K. `rewind` goes back to the first. A trace that is over raises IndexError."""

    def __init__(self, model: nn.Module, trace: Trace) -> None:
        ids = torch.from_numpy(trace.expert_ids.astype("int64"))
        self.ids = ids.masked_fill(ids >= trace.num_experts, -1).to(next(model.parameters()).device)
        self.routers: Sequence[Any] = [m for m in model.modules() if type(m).__name__ == "OlmoeTopKRouter"]
        self.rewind()
        for layer, router in enumerate(self.routers):
            router.forward = partial(self._choose, layer)

    def rewind(self) -> None:
        self.at = [0] * len(self.routers)

    def _choose(self, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, begin = hidden.reshape(-1, hidden.shape[-1]), self.at[layer]
        self.at[layer] = begin + len(rows)
        if self.at[layer] > self.ids.shape[1]:
            raise IndexError(f"Replay: trace must have {self.at[layer]} tokens, got {self.ids.shape[1]}")
        ids = self.ids[layer, begin : self.at[layer]]
        weights = torch.full(ids.shape, 1 / ids.shape[1], dtype=rows.dtype, device=rows.device)
        return rows.new_zeros(len(rows), int(self.routers[layer].num_experts)), weights, ids
