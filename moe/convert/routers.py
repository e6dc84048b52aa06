"""Routers of a MoE model that was put together, trained on text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..record import inputs_of
from .families import gates

_WHO = "train_routers"


def train_routers(
    model: nn.Module,
    batches: Iterable[Tensor],
    *,
    lr: float = 1e-3,
    balance: float = 0.01,
    everything: bool = False,
) -> list[float]:
    """Trains the routers of a transformers MoE model on its own language loss, one step of AdamW for each of `batches`,
    token ids [B, S]; the rest stays as it is. Returns the loss (nats per token) of each step, before it.

    lr          learning rate
    balance     weight of the model's load-balancing loss
    everything  train all weights, not only the routers

    For models of `convert(method="merge")` (Branch-Train-MiX trains everything; routers alone need little memory).
    Which parameters ask for a gradient, and the training mode, are as before afterwards; gradients are
    gone. Raises ValueError / TypeError where the model has no routers or a batch is no tensor of ids.
    """
    found = gates(model)
    m: Any = model
    if not found or not hasattr(m, "router_aux_loss_coef"):
        raise ValueError(f"{_WHO}: model must be a transformers MoE model with routers, got a {type(model).__name__}")
    for name, value in (("lr", lr), ("balance", balance)):
        if not 0 <= value < float("inf"):
            raise ValueError(f"{_WHO}: {name} must be at least 0 and finite, got {value}")
    before = [(p, p.requires_grad) for p in model.parameters()]
    mode, coef = model.training, m.router_aux_loss_coef
    routers = {p for gate in found for p in gate.parameters()}
    losses = []
    try:
        m.router_aux_loss_coef = balance
        for p, _ in before:
            p.requires_grad_(everything or p in routers)
        adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
        model.train()
        for batch in batches:
            inputs = inputs_of(batch, next(model.parameters()).device)
            out = m(**inputs, labels=inputs["input_ids"], output_router_logits=True)
            adam.zero_grad()
            out.loss.backward()
            adam.step()
            losses.append(float(out.loss.detach() - balance * out.aux_loss.detach()))
    finally:
        m.router_aux_loss_coef = coef
        model.train(mode)
        for p, asked in before:
            p.requires_grad_(asked)
            p.grad = None
    return losses
