"""What expert_outputs and expert_gradients ask of their arguments, and how the operators are handed weights."""

from __future__ import annotations

import torch
from torch import Tensor

from ..grouped_ffn.quantized import form_of
from ..quantized import Quantized
from ..routing import Routing


def listed(w: Tensor | Quantized | None) -> list[Tensor]:
    """A weight as the operators take it."""
    if w is None:
        return []
    return [w.data, w.scale] if isinstance(w, Quantized) else [w]


def coding(
    w1: Tensor | Quantized, w_up: Tensor | Quantized | None, w_down: Tensor | Quantized
) -> tuple[list[str], list[int]]:
    """(formats, blocks) of weights that are Quantized; nothing of others."""
    if not (isinstance(w1, Quantized) and isinstance(w_down, Quantized)):
        return [], []
    return form_of(w1, w_up if isinstance(w_up, Quantized) else None, w_down)


def check_slots(op: str, slots: Tensor, routing: Routing, rows: Tensor, *given: Tensor | Quantized | None) -> None:
    """`given`: w_gate_up, w_up, w_down and the biases, those that there are."""
    if slots.dtype != torch.int32:
        raise TypeError(f"{op}: slot_of_expert must be int32, got {slots.dtype}")
    experts, weights = routing.num_experts, [w for w in given[:3] if w is not None]
    if slots.dim() == 2 and (
        rows.is_cuda or any(b is not None for b in given[3:]) or any(isinstance(w, Quantized) for w in weights)
    ):
        raise ValueError(
            f"{op}: slot_of_expert must be [E] on a GPU, with biases or Quantized weights, got {tuple(slots.shape)}"
        )
    if tuple(slots.shape) not in ((experts,), (len(weights), experts)):
        raise ValueError(
            f"{op}: slot_of_expert must be [E] with E={experts}, or [{len(weights)}, E], a row for each weight, got "
            f"{tuple(slots.shape)}"
        )
    if slots.device != rows.device:
        raise ValueError(f"{op}: slot_of_expert must be on the device of rows, got {slots.device} and {rows.device}")


def check_out(
    op: str, out: Tensor, routing: Routing, dtype: torch.dtype, width: int | None, device: torch.device,
    name: str = "out",
) -> None:  # fmt: skip
    pairs, wide = routing.expert_ids.numel(), torch.promote_types(dtype, torch.float32)
    if out.dim() != 2 or out.shape[0] != pairs or (width is not None and out.shape[1] != width):
        want = f"[R*K, D] with R*K={pairs}" + ("" if width is None else f", D={width}")
        raise ValueError(f"{op}: {name} must be {want}, got {tuple(out.shape)}")
    if out.dtype != wide:
        raise TypeError(f"{op}: {name} must be {wide} for {dtype} rows, got {out.dtype}")
    if not out.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous, got strides {out.stride()}")
    if out.device != device:
        raise ValueError(f"{op}: {name} must be on {device} as the rest is, got {out.device}")


def refuse_gradients(op: str, **tensors: Tensor | Quantized | None) -> None:
    if not torch.is_grad_enabled():
        return
    for name, t in tensors.items():
        if isinstance(t, Tensor) and t.requires_grad:
            raise ValueError(f"{op}: {name} must not ask for a gradient (this is forward only), got requires_grad=True")
