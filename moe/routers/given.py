"""What a layer knows of its tokens beside their hidden states, for the routers that ask."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..losses import TokenRanks


@dataclass(frozen=True)
class Given:
    """Of T tokens: `mask` bool [T], False for padding; `ids` int [T], token ids; `state` [T, n], what the router of the
    layer before said (`Routing.state`; None: this is the first one). `sequences` S: the tokens are S sequences of T / S
    each, one after the other. `ranks`: whose tokens make one batch; None: this rank's own. What nobody gave is None.
    """

    mask: Tensor | None = None
    ids: Tensor | None = None
    state: Tensor | None = None
    sequences: int = 1
    ranks: TokenRanks | None = None


NOTHING = Given()


def check_state(state: Tensor, width: int, who: str) -> Tensor:
    """The state of the layer before; ValueError where it is of another width, which another kind of router made."""
    if state.shape[-1] != width:
        raise ValueError(
            f"{who}: state must be [..., {width}], as a layer of the same sizes made it, got {list(state.shape)}"
        )
    return state
