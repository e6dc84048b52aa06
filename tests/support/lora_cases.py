"""Problems for lora_ffn: tensors, and the reference's answer to them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headgate.kernels import Routing
from headgate.kernels.activation import as_activation
from headgate.kernels.lora_ffn import Delta, lora_ffn_reference


class Case:
    """R rows for E experts, K each, of which some go nowhere; expert 1 has no row. `skills` adapters, with gates where
    there are several."""

    def __init__(
        self, rows=33, hidden=12, inner=10, experts=5, top_k=2, rank=3, *, dtype=torch.float32, activation="silu",
        gated=True, transposed=False, interleaved=False, bias=False, pair=False, skills=1, targets=("up", "down"),
        one_expert=False, factors=None,
    ):  # fmt: skip
        def new(*shape: int) -> Tensor:
            return (torch.randn(*shape, dtype=torch.float64) / 2).to(dtype)

        width = 2 * inner if gated else inner
        self.w1, self.w2 = new(experts, width, hidden), new(experts, hidden, inner)
        if transposed:
            self.w1, self.w2 = (w.transpose(1, 2).contiguous() for w in (self.w1, self.w2))
        self.b1, self.b2 = (new(experts, width), new(experts, hidden)) if bias else (None, None)
        n = experts * skills
        sizes = {"up": (hidden, width), "down": (inner, hidden)}
        self.deltas: dict[str, Any] = {"up": None, "down": None}
        for name in targets:
            fan_in, fan_out = sizes[name]
            a, b = new(n, rank, fan_in).to(factors or dtype), new(n, fan_out, rank).to(factors or dtype)
            self.deltas[name] = Delta(a.requires_grad_(), b.requires_grad_(), 1.5 if name == "up" else 0.7)
        ids = torch.rand(rows, experts).argsort(1)[:, :top_k]
        if one_expert:
            ids[:] = experts - 1
        elif experts > 1:
            ids[ids == 1] = -1
        self.ids, self.experts = ids.int(), experts
        self.weights = torch.rand(rows, top_k, dtype=dtype).requires_grad_()
        self.x = new(rows, hidden).requires_grad_()
        several = skills > 1
        self.skills = torch.randint(skills, (rows,)) if several else None
        self.gates = torch.rand(rows, dtype=dtype).requires_grad_() if several else None
        self.pair = pair
        self.form = {
            "activation": as_activation(activation, gated),
            "transposed": transposed,
            "interleaved": interleaved,
        }

    @property
    def first(self):
        return tuple(self.w1.chunk(2, 2 if self.form["transposed"] else 1)) if self.pair else self.w1

    @property
    def leaves(self) -> dict[str, Tensor]:
        found = {"x": self.x, "weights": self.weights}
        for name, delta in self.deltas.items():
            if delta is not None:
                found |= {f"a_{name}": delta.a, f"b_{name}": delta.b}
        return found if self.gates is None else found | {"gates": self.gates}

    def routing(self) -> Routing:
        return Routing(self.ids, self.weights, self.experts)

    def options(self) -> dict[str, Any]:
        gated = self.form["activation"].gated
        both = {"skill_of_row": self.skills, "gates": self.gates, "b_gate_up": self.b1, "b_down": self.b2}
        return {**both, **self.form, "gated": gated}

    def reference(self) -> Tensor:
        return lora_ffn_reference(
            self.x, self.ids, self.weights, self.w1, self.w2, self.deltas["up"], self.deltas["down"], self.b1, self.b2,
            skill_of_row=self.skills, gates=self.gates, **self.form,
        )  # fmt: skip

    def arguments(self, keep: bool) -> list[Any]:
        """The operator's."""
        up, down, act = self.deltas["up"], self.deltas["down"], self.form["activation"]
        first = self.first if self.pair else (self.w1, None)
        factors = [None if d is None else t.detach() for d in (up, down) for t in ((0, 0) if d is None else d[:2])]
        detached = [None if t is None else t.detach() for t in (self.x, self.ids, self.weights)]
        gates = None if self.gates is None else self.gates.detach()
        scales = [0.0 if d is None else d.scale for d in (up, down)]
        turned = self.form["transposed"], self.form["interleaved"]
        return [
            *detached, *(None if w is None else [w] for w in (*first, self.w2)), self.b1, self.b2, *factors, gates,
            self.skills, None, scales, 0.0, None, None, act.kind, act.params, act.gated, *turned, keep,
        ]  # fmt: skip
