"""The demo's model cut over a fold: stages, attention, experts, and a loss that is the same under every fold."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...bench.olmoe import Model, build
from ...dispatch import Fold
from ...kernels.routing import Routing
from ...moe.hf.attention import parallelize_attention
from ...moe.losses import TokenRanks, attach_loss, load_balancing_loss
from ...moe.ranks.parallel import parallelize
from ..demo.model import BALANCE
from .options import Options

NO_TARGET = -100


class Stage(nn.Module):
    """A part of the layers of an OlmoeForCausalLM, under the names they have there, as one pipeline stage of several.

    The first takes ids [B, S], the others what the one before gives: hidden states [B, S, D]; the last gives logits.
    """

    def __init__(self, model: Model, stage: int, stages: int) -> None:
        super().__init__()
        count, whole = len(model.model.layers), model.model
        held = range(stage * count // stages, (stage + 1) * count // stages)
        self.first, self.last = stage == 0, stage == stages - 1
        self.config = model.config
        self.model: Model = nn.Module()
        self.model.rotary_emb = whole.rotary_emb
        if self.first:
            self.model.embed_tokens = whole.embed_tokens
        self.model.layers = nn.ModuleDict({str(i): whole.layers[i] for i in held})
        if self.last:
            self.model.norm, self.lm_head = whole.norm, model.lm_head

    def forward(self, x: Tensor) -> Tensor:
        x = self.model.embed_tokens(x) if self.first else x
        positions = torch.arange(x.shape[1], device=x.device)[None]
        angles = self.model.rotary_emb(x, positions)
        for layer in self.model.layers.values():
            x = layer(x, position_embeddings=angles, attention_mask=None, position_ids=positions)
        return self.lm_head(self.model.norm(x)) if self.last else x


def build_stage(options: Options, fold: Fold, device: torch.device) -> Stage:
    """This rank's part of the model, ready to train."""
    model: Model = parallelize_attention(build(options.shape, options.seed), fold)
    stage = Stage(model, fold.stage, fold.size("pp")).to(device)
    _balance(stage, fold, options.parts)
    parallelize(stage, fold, dispatcher=options.dispatcher, wire=options.wire, backward_wire=options.wire)
    return stage.train()


def _balance(stage: Stage, fold: Fold, parts: int) -> None:
    """Every router's load-balancing loss rides on its weights: over the micro-batch of all ranks of the stage."""
    ranks = TokenRanks(fold.group("dp", "cp", "tp"), average=fold.size("dp", "cp"))
    coef = BALANCE / (stage.config.num_hidden_layers * parts)

    def attach(gate: nn.Module, args: tuple, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, ids = output
        scores = logits.float().softmax(-1)
        loss = load_balancing_loss(Routing(ids.int(), weights, scores.shape[1], scores=scores), ranks=ranks)
        return logits, attach_loss(weights, coef * loss), ids

    for layer in stage.model.layers.values():
        layer.mlp.gate.register_forward_hook(attach)


def cut(batch: Tensor, fold: Fold, parts: int) -> tuple[Tensor, Tensor]:
    """This rank's (ids, targets) of a batch [B, S] that all ranks have: of each of `parts` micro-batches its dp part,
    of each sequence its (cp, tp) part. A target is the next id; the last of a sequence has none."""
    targets = F.pad(batch[:, 1:], (0, 1), value=NO_TARGET)

    def mine(ids: Tensor) -> Tensor:
        rows = ids.unflatten(0, (parts, fold.size("dp"), -1))[:, fold.rank("dp")].flatten(0, 1)
        return rows.chunk(fold.size("cp", "tp"), 1)[fold.rank("cp", "tp")].contiguous()

    return mine(batch), mine(targets)


def entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum of the cross-entropies, in nats."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=NO_TARGET, reduction="sum")
