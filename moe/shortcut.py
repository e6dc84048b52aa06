"""A transformer block whose routed experts read what comes before its attention, so that rows travel beside it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .layer import MoE


class ShortcutBlock(nn.Module):
    """x [B, S, D] -> h + shared(h) + moe(norm(x)),    h = x + attention(x)

    The shortcut-connected MoE of Cai et al. (ScMoE, 2024; LongCat-Flash has it): the routed experts do not wait for the
    block's attention. With an `overlap` in `moe` (see Overlap) rows go to their experts while attention is computed and
    come home while the shared expert is; in the backward pass the other way round. Without one the numbers are equal.

    `attention(x, *args, **kwargs)` and `shared(h)` are any modules that give what is added to the residual stream, with
    norms of their own; of a tuple, as transformers' attention returns it, the first is taken. `shared` None: nothing.
    `norm`: of the experts' input; None: none. `mask` bool [B, S]: see MoE.

    Raises TypeError where a part is of a wrong kind; ValueError for a moe whose router carries a state.

    >>> block = headgate.ShortcutBlock(attention=nn.Linear(64, 64), moe=headgate.MoE(64, 32, num_experts=8, top_k=2))
    >>> block(torch.randn(2, 10, 64)).shape
    torch.Size([2, 10, 64])
    """

    def __init__(
        self, attention: nn.Module, moe: MoE, shared: nn.Module | None = None, norm: nn.Module | None = None
    ) -> None:
        super().__init__()
        if not isinstance(moe, MoE):
            raise TypeError(f"ShortcutBlock: moe must be a headgate.MoE, got {type(moe).__name__}")
        for name, part in {"attention": attention, "shared": shared, "norm": norm}.items():
            if not isinstance(part, nn.Module) and (part is not None or name == "attention"):
                raise TypeError(f"ShortcutBlock: {name} must be a module, got {type(part).__name__}")
        if getattr(moe.router, "carries_state", False):
            raise ValueError(f"ShortcutBlock: moe must have a router without state, got {type(moe.router).__name__}")
        self.attention, self.moe, self.shared, self.norm = attention, moe, shared, norm

    def forward(self, x: Tensor, *args: Any, mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        parts: list[Tensor] = []

        def attend() -> None:
            parts.append(x + _first(self.attention(x, *args, **kwargs)))

        def share() -> None:
            if self.shared is not None:
                parts.append(_first(self.shared(parts[0])))

        routed = self.moe(x if self.norm is None else self.norm(x), mask, beside=(attend, share))
        return sum(parts[1:], parts[0]) + routed


def _first(found: Any) -> Tensor:
    return found[0] if isinstance(found, tuple) else found
