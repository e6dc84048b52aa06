"""One router, one seed: some hundred steps, and what was counted in them and on held-out text."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.routing import pairs_of_experts
from ...kernels.topk import topk
from ...moe import LocMoERouter, MoE, ReinforceRouter, SoftRouter, SteeredRouter, reward
from ...moe.bias import update_biases
from ..corpus import Corpus
from ..olmoe import Model, Optimizer, Shape, learning_rate
from .cases import NODES, evaluating, made

RATE = 3e-3
ROWS = 4  # sequences of a step: half of them on either node
LAST = 20  # steps whose routing is counted
HELD_OUT = 16  # batches


def train(name: str, shape: Shape, seed: int, steps: int, corpus: Corpus) -> dict[str, Any]:
    """Every figure of one run, JSON as it is."""
    model, layers = made(name, shape, seed, corpus)
    optimizer = Optimizer(model, rate=0.0)
    batches = corpus.batches(ROWS, shape.length, seed)
    while_training, times = Tally(layers, shape), []
    model.train()
    for step in range(steps):
        began = time.process_time()
        batch = next(batches)
        for part in _parts(layers, batch, shape):
            entropy = _entropy(model, part)
            if any(isinstance(layer.router, ReinforceRouter) for layer in layers):
                reward(model, -F.pad(entropy.detach(), (0, 1)).flatten())
            (entropy.mean() * len(part) / len(batch)).backward()
            if step >= steps - LAST:
                while_training.see(_first_row(part, batch))
        optimizer.step(learning_rate(step / steps, RATE))
        if any(isinstance(layer.router, SteeredRouter) for layer in layers):
            update_biases(model)
        times.append(time.process_time() - began)
        if not math.isfinite(float(entropy.detach().mean())):
            raise RuntimeError(f"bench routers: {name} must stay finite, got a loss that is not at step {step}")
    held_out = Tally(layers, shape)
    total, count = 0.0, 0
    with evaluating(model):
        for batch in corpus.held_out_batches(ROWS, shape.length, HELD_OUT):
            for part in _parts(layers, batch, shape):
                total += float(_entropy(model, part).sum())
                count += part[:, 1:].numel()
                held_out.see(_first_row(part, batch))
    return {
        "router": name, "seed": seed, "steps": steps, "bits": total / count / math.log(2),
        "tokens_per_cpu_second": ROWS * shape.length / statistics.median(times),
        "training": while_training.figures(), "held_out": held_out.figures(),
        "flops_per_token": flops(layers, shape, held_out.figures()["rows_per_token"]),
    }  # fmt: skip


def _entropy(model: Model, batch: Tensor) -> Tensor:
    """[B, S - 1], nats of each byte but the first."""
    hidden = model.model(input_ids=batch).last_hidden_state
    logits = model.lm_head(hidden)[:, :-1].float()
    return F.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none")


def _parts(layers: Sequence[MoE], batch: Tensor, shape: Shape):
    """The batch, or where a router's loss is one of its node, each node's sequences in turn."""
    if not isinstance(layers[0].router, LocMoERouter):
        yield batch
        return
    each = shape.experts // NODES
    for node, part in enumerate(batch.chunk(NODES)):
        for layer in layers:
            router: Any = layer.router
            router.near = range(node * each, (node + 1) * each)
        yield part


def _first_row(part: Tensor, batch: Tensor) -> int:
    return (part.data_ptr() - batch.data_ptr()) // (batch.stride(0) * batch.element_size())


class Tally:
    """Counts over forward passes: what each layer's `last_routing` says."""

    def __init__(self, layers: Sequence[MoE], shape: Shape) -> None:
        self.layers, self.shape = layers, shape
        self.loads = torch.zeros(len(layers), shape.experts, dtype=torch.float64)
        self.each: list[float] = []  # the coefficient of variation of each layer and pass
        self.sums = dict.fromkeys(("tokens", "rows", "uncovered", "dropped", "local", "crossings"), 0.0)

    def see(self, first: int) -> None:
        for i, layer in enumerate(self.layers):
            routing, experts = layer.last_routing, self.shape.experts
            assert routing is not None
            ids = routing.expert_ids.long()
            there = (ids >= 0) & (ids < experts)
            load = pairs_of_experts(ids, experts).double()
            self.loads[i] += load
            self.each.append(_variation(load))
            router: Any = layer.router
            slots = router.slots
            tokens = len(ids) // (experts * router.slots_per_expert) * self.shape.length if slots else len(ids)
            self.sums["tokens"] += tokens
            self.sums["rows"] += float(there.sum())
            if slots:
                continue
            self.sums["uncovered"] += float((ids < 0).all(1).sum())
            self.sums["dropped"] += _dropped(layer, ids)
            row = first + torch.arange(tokens) // self.shape.length
            node = torch.where(there, ids * NODES // experts, -1)
            home = (row * NODES // ROWS)[:, None]
            self.sums["local"] += float((node == home).sum())
            crossed = torch.stack([((node == n) & (home != n)).any(1) for n in range(NODES)])
            self.sums["crossings"] += float(crossed.sum())

    def figures(self) -> dict[str, float]:
        s = self.sums
        tokens, rows = max(s["tokens"], 1), max(s["rows"], 1)
        return {
            "variation": statistics.mean(_variation(load) for load in self.loads),
            "variation_of_a_step": statistics.mean(self.each),
            "rows_per_token": s["rows"] / tokens,
            "uncovered": s["uncovered"] / tokens,
            "dropped": s["dropped"] / (tokens * self.shape.top_k),
            "local": s["local"] / rows,
            "crossings_per_token": s["crossings"] / tokens,
        }


def _variation(load: Tensor) -> float:
    """Standard deviation over mean of what the experts have."""
    return float(load.std(correction=0) / load.mean().clamp_min(1e-9))


def _dropped(layer: MoE, ids: Tensor) -> float:
    """Pairs that a token chose by its own scores and was not given: of routers that round or limit afterwards."""
    routing = layer.last_routing
    if not hasattr(layer.router, "rounded") or routing is None or routing.scores is None:
        return 0.0
    chosen = topk(routing.scores, layer.top_k, score="topk_softmax").expert_ids
    return float((chosen[:, :, None] != ids[:, None]).all(2).sum())


def flops(layers: Sequence[MoE], shape: Shape, rows: float) -> float:
    """Forward FLOPs of a token: attention and head as dense products, experts by the `rows` that were counted, routers
    by the sizes of their parameters (each number one multiplication and one sum)."""
    d, s = shape.hidden, shape.length
    attention = shape.layers * (8 * d * d + 2 * s * d)  # half of the scores are masked
    experts = shape.layers * rows * 6 * d * shape.ffn
    router = 2 * sum(p.numel() for layer in layers for p in layer.router.parameters() if p.dim() == 2)
    soft: list[Any] = [layer.router for layer in layers if isinstance(layer.router, SoftRouter)]
    mixing = sum(4 * router.weight.numel() for router in soft)  # into rows and back
    return attention + experts + router + mixing + 2 * d * 256
