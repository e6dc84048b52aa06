"""The small language model of the demo and of benchmarks: transformers' OLMoE on bytes, and how it is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .corpus import VOCABULARY

CLIP = 1.0
WARM_UP = 0.1

Model = Any  # a transformers model, whose attributes are its own


@dataclass(frozen=True)
class Shape:
    """The model: about 20 million parameters, nearly all of them in experts. `length` is the tokens of a sequence."""

    layers: int = 8
    hidden: int = 192
    ffn: int = 128
    experts: int = 32
    top_k: int = 4
    heads: int = 6
    length: int = 256


def build(shape: Shape, seed: int) -> Model:
    """An untrained OlmoeForCausalLM in fp32 with random weights; the same for the same seed."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    config = OlmoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
        initializer_range=0.05,  # the default, 0.02, is made for hidden sizes ten times as large
        max_position_embeddings=2 * shape.length,
        pad_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return OlmoeForCausalLM(config)


class Optimizer:
    """AdamW with clipped gradients; `step` moves the weights and clears the gradients."""

    def __init__(self, model: Model, rate: float) -> None:
        self.weights = list(model.parameters())
        self.adam = torch.optim.AdamW(self.weights, lr=rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True)

    def step(self, rate: float | None = None) -> None:
        nn.utils.clip_grad_norm_(self.weights, CLIP)
        for group in self.adam.param_groups:
            group["lr"] = group["lr"] if rate is None else rate
        self.adam.step()
        self.adam.zero_grad()


def learning_rate(done: float, peak: float) -> float:
    """`done` in 0 .. 1: up in a line over the first tenth, then down along a cosine to a twentieth of the peak."""
    if done < WARM_UP:
        return peak * (0.1 + 0.9 * done / WARM_UP)
    return peak * (0.525 + 0.475 * math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP)))
