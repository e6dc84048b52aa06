"""What every form of lora_ffn works on: the operator's arguments, put together."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..activation import Activation
from ..grouped_ffn.plain import wide_of
from ..grouped_ffn.quantized import unpacked
from ..quantized import Quantized
from ..routing import narrow_ids


class Delta(NamedTuple):
    """The change scale * B_i A_i of an expert's matrix: `a` [E*S, r, in], `b` [E*S, out, r]. Index i is e * S + the
    skill; S is 1 where there is one adapter for all rows. Rows of `b` are in the order of the weight's own."""

    a: Tensor
    b: Tensor
    scale: float


def weights_of(w1: Any, w_up: Any, w2: Any, formats: Any, blocks: Any) -> tuple[Any, Any, Any]:
    """The weights out of the operator's lists: tensors, or Quantized; the second may be None."""
    return unpacked(w1, w_up, w2, formats, blocks) if formats else (w1[0], w_up[0] if w_up else None, w2[0])


def listed(w: Tensor | Quantized | None) -> list[Tensor] | None:
    """A weight as the operator takes it."""
    return None if w is None else [w.data, w.scale] if isinstance(w, Quantized) else [w]


@dataclass(frozen=True)
class Task:
    """One call. `first`, `second`, `last`: weights as stored, Quantized or not; `second` is the up projection of a
    pair, or None. `seed` int64 [1], where there is dropout."""

    rows: Tensor
    expert_ids: Tensor
    weights: Tensor
    first: Any
    second: Any
    last: Any
    b1: Tensor | None
    b2: Tensor | None
    up: Delta | None
    down: Delta | None
    gates: Tensor | None
    skill_of_row: Tensor | None
    seed: Tensor | None
    dropout: float
    act: Activation
    transposed: bool
    interleaved: bool

    @classmethod
    def of(
        cls, rows, expert_ids, weights, w1, w_up, w2, b1, b2, a_up, b_up, a_down, b_down, gates, skills, seed,
        scales, dropout, formats, blocks, kind, params, gated, transposed, interleaved,
    ) -> Task:  # fmt: skip
        stored = weights_of(w1, w_up, w2, formats, blocks)
        up = None if a_up is None else Delta(a_up, b_up, scales[0])
        down = None if a_down is None else Delta(a_down, b_down, scales[1])
        act = Activation.from_params(kind, gated, params)
        return cls(
            rows, expert_ids, weights, *stored, b1, b2, up, down, gates, skills, seed, dropout, act, transposed,
            interleaved,
        )  # fmt: skip

    @property
    def skills(self) -> int:
        """S, adapters that share the experts."""
        some, experts = self.up or self.down, self.last.shape[0]
        return 1 if some is None or self.skill_of_row is None else some.a.shape[0] // experts

    @property
    def width(self) -> int:
        """W, of the pre-activation."""
        return sum(w.shape[2 if self.transposed else 1] for w in (self.first, self.second) if w is not None)

    def ids(self, experts: int, skills: int) -> Tensor:
        """int32 [R, K]: which adapter of which expert a pair meets, e * S + skill, -1: none. A row of a skill that is
        not there meets no expert."""
        ids = narrow_ids(self.expert_ids, experts)
        if self.skill_of_row is None or not (self.up or self.down):
            return ids
        skill = self.skill_of_row.clamp(-1, skills).to(torch.int32)[:, None]
        there = (ids >= 0) & (ids < experts) & (skill >= 0) & (skill < skills)
        return torch.where(there, ids * skills + skill, torch.where(ids < -1, -2, -1)).to(torch.int32)

    @property
    def wide(self) -> torch.dtype:
        return wide_of(self.rows.dtype)


def kept(mask_seed: int, shape: tuple[int, ...], dropout: float, like: Tensor) -> Tensor:
    """What dropout multiplies by: 0, or 1 / (1 - dropout). The same numbers for the same seed and shape."""
    generator = torch.Generator(like.device).manual_seed(mask_seed)
    drawn = torch.rand(shape, generator=generator, device=like.device, dtype=torch.float32)
    return (drawn >= dropout).to(like.dtype).div_(1 - dropout)


def blocks_of(offsets: list[int], e: int, skills: int) -> list[tuple[int, int, int]]:
    """(i, first, end) of the rows of each adapter of expert e, counted from the expert's first; those with rows."""
    own = offsets[e * skills : (e + 1) * skills + 1]
    return [(e * skills + s, lo - own[0], hi - own[0]) for s, (lo, hi) in enumerate(pairwise(own)) if hi > lo]
