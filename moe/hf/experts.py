"""The one adapter for every experts module that uses transformers' experts interface.

It is called as transformers calls its own implementations, reads the module's flags and parameters by attribute at call
time (a PEFT adapter makes them computed tensors, expert parallelism makes them local ones) and keeps no weight.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...dispatch.local import Local
from ...kernels.activation import Activation
from ...kernels.autocast import under_autocast
from ...kernels.grouped_linear import grouped_linear
from ...kernels.plan import Plan, plan
from ...kernels.routing import Routing
from ..elsewhere import elsewhere_of
from ..lora.attached import Gathered, changes_of, expert_ffn
from ..lora.tuned import with_tuned
from ..shards import Cut, shards_of, weight_of
from .counting import mark
from .gate import activation_of

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_MARKS = ("has_bias", "is_transposed")  # the oldest of the decorator's flags


def experts_forward(
    module: nn.Module,
    hidden_states: Tensor,
    top_k_index: Tensor | None = None,
    top_k_weights: Tensor | None = None,
    *,
    router_indices: Tensor | None = None,
    routing_weights: Tensor | None = None,
) -> Tensor:
    """(hidden_states [T, D], top_k_index [T, K], top_k_weights [T, K]) -> [T, D], in the dtype of hidden_states.

    The rows take the weights' dtype, as in transformers' grouped_mm; ids >= E (off-rank experts) count as none. The
    last two names are gpt-oss's for the same arguments.
    """
    ids = router_indices if top_k_index is None else top_k_index
    weights = routing_weights if top_k_weights is None else top_k_weights
    if ids is None or weights is None:
        raise TypeError("experts: top_k_index and top_k_weights must both be given, got one or none of them")
    mark(module)
    m: Any = module
    first = "gate_up_proj" if flags(module)[0] else "up_proj"
    shards = shards_of(module)
    dispatcher, num_experts = (shards, shards.num_experts) if shards else (Local(), m.down_proj.shape[0])
    rows = as_rows(hidden_states, getattr(m, first))
    routing = Routing.from_topk(ids, weights, num_experts)
    if shards is not None and shards.overlap is not None:
        gathered = None if elsewhere_of(module) else (_weights(module), changes_of(module))
        compute = partial(_compute, module, gathered)
        y = shards.overlap.run(shards, rows, routing, compute)
    else:
        rows, routing, ticket = dispatcher.dispatch(rows, routing)
        y = dispatcher.combine(_compute(module, None, rows, routing), ticket)
    return y.reshape(hidden_states.shape).to(hidden_states.dtype)


def _weights(module: nn.Module) -> list[Tensor | None]:
    """First and second matrices, then their biases, as they are computed with."""
    gated, biased, *_ = flags(module)
    first = "gate_up_proj" if gated else "up_proj"
    biases = [weight_of(module, f"{name}_bias") if biased else None for name in (first, "down_proj")]
    return [weight_of(module, first), weight_of(module, "down_proj"), *biases]


def _compute(module: nn.Module, gathered: Gathered | None, rows: Tensor, routing: Routing) -> Tensor:
    """The weighted sums [R, D] of the experts that are here. `gathered`: weights, and what changes them."""
    return with_tuned(module, rows, routing, partial(_stacked, module, gathered))


def _stacked(module: nn.Module, gathered: Gathered | None, rows: Tensor, routing: Routing) -> Tensor:
    """The same of the module's stacked weights, or of those that are elsewhere."""
    elsewhere = elsewhere_of(module)
    if elsewhere is not None:  # headgate.offload
        return elsewhere(rows, routing)
    gated, _biased, transposed, interleaved, normed = flags(module)
    weights, changes = gathered or (_weights(module), None)  # after dispatch, which may choose another degree
    w1, w2, b1, b2 = weights
    assert w1 is not None
    assert w2 is not None
    activation = activation_of(module, gated, interleaved, normed)
    if activation is not None:
        return expert_ffn(
            module, rows, routing, w1, w2, changes, b_gate_up=b1, b_down=b2, activation=activation,
            gated=gated, transposed=transposed, interleaved=interleaved,
        )  # fmt: skip
    own: Any = module
    gate = own._apply_gate if gated else own.act_fn
    norm = own.post_expert_norm if normed else None
    return own_gate_forward(rows, routing, (w1, b1), (w2, b2), gate, transposed, norm)


def flags(module: nn.Module) -> tuple[bool, bool, bool, bool, bool]:
    """(gated, biased, transposed, interleaved, normed) as `use_experts_implementation` marks them, or its defaults."""
    return (
        getattr(module, "has_gate", True),
        getattr(module, "has_bias", False),
        getattr(module, "is_transposed", False),
        getattr(module, "has_gate", True) and not getattr(module, "is_concatenated", True),
        getattr(module, "has_post_expert_norm", False),
    )


def as_rows(hidden_states: Tensor, weight: Tensor) -> Tensor:
    """hidden_states [..., D] as rows [R, D] in the dtype of `weight`, or as they are where autocast will decide."""
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    return rows if under_autocast(rows.device) else rows.to(weight.dtype)


def own_gate_forward(
    rows: Tensor,
    routing: Routing,
    first: tuple[Tensor, Tensor | None],
    second: tuple[Tensor, Tensor | None],
    gate: Callable[[Tensor], Tensor],
    transposed: bool,
    norm: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The same with a module's own gate, and norm of each expert's output, around two grouped matmuls: [R, D]."""
    order = plan(routing.expert_ids, routing.num_experts)
    x = rows[(order.pair_of_row // routing.expert_ids.shape[1]).long()]
    h = grouped_linear(x, order.offsets, *first, transposed=transposed)
    y = grouped_linear(gate(h).to(h.dtype), order.offsets, *second, transposed=transposed)
    return combine(y if norm is None else norm(y), routing.weights, order)


def combine(y: Tensor, weights: Tensor, order: Plan) -> Tensor:
    """Rows y [T*K, D] in expert order and weights [T, K] -> weighted sums [T, D], added up in fp32."""
    live = torch.arange(y.shape[0], device=y.device) < order.offsets[-1]
    scale = weights.reshape(-1)[order.pair_of_row.long()].masked_fill(~live, 0)
    wide = torch.float64 if y.dtype == torch.float64 else torch.float32
    weighted = (y * scale[:, None])[order.row_of_pair.long()]
    return weighted.view(*weights.shape, y.shape[1]).sum(1, dtype=wide).to(y.dtype)


def is_decorated(module: nn.Module) -> bool:
    """Whether the module carries the marks of transformers' `use_experts_implementation`."""
    first = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
    return all(hasattr(module, name) for name in (*_MARKS, first, "down_proj"))


def refusal(module: nn.Module) -> str | None:
    """Why an experts module cannot be taken, or None."""
    m: Any = module
    for name in ("gate_up_proj" if flags(module)[0] else "up_proj", "down_proj"):
        w = getattr(m, name)
        if w.dim() != 3 or w.dtype not in FLOATS:
            return f"{name} must be floating point [E, ., .], got {tuple(w.shape)} {w.dtype}"
        # packed weights may call themselves bf16; a sharded one (DTensor) is whole again when it is called
        if hasattr(type(w), "__tensor_flatten__") and type(w).__name__ != "DTensor":
            return f"{name} must be a plain tensor, got a {type(w).__name__}"
    return None


def prepare(module: nn.Module) -> str:
    """Asks for the activation ahead of the first call, so that a warning comes with the swap; says what will run."""
    gated, _biased, _transposed, interleaved, normed = flags(module)
    return describe(activation_of(module, gated, interleaved, normed))


def describe(activation: Activation | None) -> str:
    if activation is None:
        return "own gate between two grouped matmuls"
    return f"{'gated ' if activation.gated else ''}{activation.kind}, fused"


def cuts_of_experts(name: str, module: nn.Module, etp: int) -> tuple[int, dict[str, Cut]]:
    """(E, how each parameter is cut over ranks). Raises ValueError for experts that cannot be spread."""
    m: Any = module
    if not is_decorated(module) or refusal(module) is not None:
        raise ValueError(f"parallelize: {name} must be experts behind transformers' interface in plain floating point, "
                         f"got {type(module).__name__}")  # fmt: skip
    gated, biased, transposed, interleaved, normed = flags(module)
    if normed:
        raise ValueError(f"parallelize: {name} must have no norm among its experts, got post_expert_norm")
    if etp > 1 and activation_of(module, gated, interleaved, normed) is None:
        raise ValueError(f"parallelize: {name} must have an activation that can be taken slice by slice, "
                         f"got a gate of its own with etp={etp}")  # fmt: skip
    first, blocks = ("gate_up_proj" if gated else "up_proj"), (2 if gated and not interleaved else 1)
    cuts = {first: Cut(2 if transposed else 1, blocks), "down_proj": Cut(1 if transposed else 2)}
    if biased:
        cuts |= {f"{first}_bias": Cut(1, blocks), "down_proj_bias": Cut(1, whole=True)}
    return m.down_proj.shape[0], cuts
