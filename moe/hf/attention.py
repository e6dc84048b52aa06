"""parallelize_attention: the attention of a transformers model over the tp and cp ranks of a Fold, in place.

Between attention modules every rank keeps its own part of each sequence, so that embeddings, norms, routers and the
head need no care at all. Inside them PyTorch's tensor parallelism cuts the projections, and dispatch/ulysses.py
exchanges heads and positions around scaled_dot_product_attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

from ...dispatch.fold import Fold
from ...dispatch.ulysses import ulysses
from ..shards import shards_of

NAME = "headgate_ulysses"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_SPREAD = "_headgate_attention"
_MUST_BE_NONE = ("attention_mask", "position_ids", "past_key_values")


@dataclass(frozen=True, eq=False)
class _Spread:
    """What a spread attention module remembers."""

    group: dist.ProcessGroup = field(repr=False)

    def __deepcopy__(self, memo: object) -> _Spread:
        return self  # a group cannot be copied, and need not be


def parallelize_attention(model: nn.Module, fold: Fold) -> nn.Module:
    """Spreads the attention of a transformers decoder over cp and tp, in place; call it before `parallelize`.

    Each rank then passes its own part of the sequences: of S tokens the S / (cp * tp) in a row that are its by its rank
    in (cp, tp), the same number on every rank. Projections are cut over tp by heads (DTensors over
    fold.attention["tp"]), heads and positions change places over cp; positions are counted here, and attention stays
    causal over the whole sequence. With cp == tp == 1 nothing is done.

    Serves models whose layers all have q_proj, k_proj, v_proj and o_proj, attend fully and run
    scaled_dot_product_attention, with norms of q and k over a head or over all of them (Qwen3, OLMoE, Mixtral and the
    like). Sequences must not be padded or packed: attention_mask, position_ids and past_key_values must be None. A
    loss of the model's own (`labels`) would miss the tokens beyond a rank's part: shift the labels before cutting them.

    Raises ValueError / TypeError before anything is changed: other attention, heads that tp * cp does not divide,
    experts parallelized already.

    >>> fold = headgate.Fold(attention=dict(dp=2, tp=2), experts=dict(ep=4))
    >>> model = headgate.parallelize(headgate.parallelize_attention(model, fold), fold)
    """
    if not isinstance(fold, Fold):
        raise TypeError(f"parallelize_attention: fold must be a headgate.Fold, got {type(fold).__name__}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"parallelize_attention: model must be a torch.nn.Module, got {type(model).__name__}")
    if fold.size("cp", "tp") == 1:
        return model
    found = list(_attention_of(model))
    _check(model, found, fold)
    plans = [_plan(name, attention) for name, attention in found] if fold.size("tp") > 1 else []
    owner, rotary = _rotary(model)
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attend)
    for _, attention in found:
        vars(attention)[_SPREAD] = _Spread(fold.group("cp"))
        attention.config._attn_implementation = NAME  # a name without a mask function: transformers makes no mask
    for (_, attention), plan in zip(found, plans, strict=bool(plans)):
        parallelize_module(attention, fold.attention["tp"], plan)
    owner.register_forward_pre_hook(_refuse, with_kwargs=True)
    rotary.register_forward_pre_hook(partial(_count, fold.rank("cp"), fold.size("tp")), with_kwargs=True)
    return model


def _attention_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if all(hasattr(module, p) for p in PROJECTIONS):
            yield name, module


def _check(model: Any, found: list[tuple[str, Any]], fold: Fold) -> None:
    for name, module in model.named_modules():
        if _SPREAD in vars(module) or shards_of(module) is not None:
            raise ValueError(f"parallelize_attention: model must not be parallelized already, got one whose {name} is")
    layers = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    if not found or layers != len(found):
        raise ValueError(
            "parallelize_attention: model must be a transformers decoder whose layers all have "
            f"{', '.join(PROJECTIONS)}, got {type(model).__name__} with {len(found)} such of {layers} layers"
        )
    config, s = model.config, fold.sizes
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or config._attn_implementation != "sdpa":
        raise ValueError(
            "parallelize_attention: attention must be full, by scaled_dot_product_attention ('sdpa'), "
            f"got {', '.join(sorted(kinds))} by {config._attn_implementation!r}"
        )
    for name, attention in found:
        for projection in PROJECTIONS:
            linear = getattr(attention, projection)
            if type(linear) is not nn.Linear:
                raise ValueError(
                    f"parallelize_attention: {name}.{projection} must be a torch.nn.Linear, got {type(linear).__name__}"
                )
        for projection in PROJECTIONS[:3]:
            heads = getattr(attention, projection).out_features // attention.head_dim
            if heads % (s.tp * s.cp):
                raise ValueError(
                    f"parallelize_attention: tp * cp must divide the {heads} heads of {name}.{projection}, "
                    f"got tp={s.tp} cp={s.cp}"
                )


def _plan(name: str, attention: Any) -> dict[str, ParallelStyle]:
    """The styles of an attention module's parts: positions cut outside, heads inside."""
    plan: dict[str, ParallelStyle] = {
        "": PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": Shard(1)},
            desired_input_kwarg_layouts={"hidden_states": Replicate()},
        ),
        "o_proj": RowwiseParallel(output_layouts=Shard(1)),
    }
    for letter in "qkv":
        linear, norm = getattr(attention, f"{letter}_proj"), getattr(attention, f"{letter}_norm", None)
        size = 0 if norm is None else sum(p.numel() for p in norm.parameters())
        over_heads = size == linear.out_features != attention.head_dim
        if size not in (0, attention.head_dim, linear.out_features):
            raise ValueError(
                f"parallelize_attention: {name}.{letter}_norm must be over a head ({attention.head_dim}) or over all "
                f"({linear.out_features}), got {size} weights"
            )
        plan[f"{letter}_proj"] = ColwiseParallel(use_local_output=not over_heads)
        if over_heads:
            plan[f"{letter}_norm"] = _NormOverHeads()
    return plan


class _NormOverHeads(ParallelStyle):
    """A norm whose mean runs over heads of all ranks: DTensors know that, where its weight is cut as they are."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(module, device_mesh, self._cut, output_fn=self._local)  # type: ignore[arg-type]

    @staticmethod
    def _cut(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for key, parameter in module.named_parameters(recurse=False):
            cut = distribute_tensor(parameter, mesh, [Shard(0)])
            module.register_parameter(key, nn.Parameter(cut, requires_grad=parameter.requires_grad))

    @staticmethod
    def _local(module: nn.Module, output: Any, mesh: DeviceMesh) -> Tensor:
        return output.redistribute(placements=[Shard(output.dim() - 1)]).to_local()


def _rotary(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The module with the rotary embedding of the whole decoder, and that."""
    owners = [m for m in model.modules() if isinstance(getattr(m, "rotary_emb", None), nn.Module)]
    if len(owners) != 1:
        raise ValueError(
            f"parallelize_attention: model must have one rotary_emb, whose positions can be counted, got {len(owners)}"
        )
    return owners[0], owners[0].rotary_emb  # type: ignore[return-value]


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any):
    """transformers' attention function: its sdpa between two exchanges of heads and positions."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    spread: _Spread = vars(module)[_SPREAD]
    window, length = options.get("sliding_window"), query.shape[2] * spread.group.size()
    if attention_mask is not None or (window is not None and window < length):
        what = f"a window of {window} and {length} tokens" if attention_mask is None else "an attention_mask"
        raise ValueError(f"parallelize_attention: every token must see all before it, got {what}")

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa_attention_forward(module, q, k, v, None, **options)[0].transpose(1, 2)

    return ulysses(query, key, value, sdpa, spread.group).transpose(1, 2).contiguous(), None


def _refuse(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    for name in _MUST_BE_NONE:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"parallelize_attention: {name} must be None, as sequences are neither padded nor packed, "
                f"got {type(kwargs[name]).__name__}"
            )


def _count(cp_rank: int, tp: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]):
    """The positions of the S / cp tokens that a tp group has together, for rotary_emb(x, position_ids)."""
    x = args[0] if args else kwargs["x"]
    held = x.shape[1] * tp
    positions = torch.arange(cp_rank * held, (cp_rank + 1) * held, device=x.device)[None]
    more = {k: v for k, v in kwargs.items() if k not in ("x", "position_ids")}
    return (x, positions, *args[2:]), more
