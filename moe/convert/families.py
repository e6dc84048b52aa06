"""From which dense decoders to which MoE classes of transformers, and what becomes of the config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

_WHO = "convert"


@dataclass(frozen=True)
class Target:
    """A MoE class as its checkpoints have it.

    block     of a layer: where router and experts stand
    parts     names of an expert's gate, up and down projections
    width     the config's field for an expert's F
    some      whether single layers can stay dense
    shared    whether each block has a shared expert: it is made empty (0 neurons)
    """

    block: str = "mlp"
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    width: str = "intermediate_size"
    some: bool = False
    shared: bool = False


TARGETS = {
    "mixtral": Target("block_sparse_moe", ("w1", "w3", "w2")),
    "qwen2_moe": Target(width="moe_intermediate_size", some=True, shared=True),
    "qwen3_moe": Target(width="moe_intermediate_size", some=True),
    "flex_olmo": Target(),
}
DENSE = {  # a dense model's type -> the classes that compute the same attention, the usual one first
    "llama": ("mixtral", "qwen2_moe"),
    "mistral": ("mixtral",),
    "qwen2": ("qwen2_moe",),
    "qwen3": ("qwen3_moe",),
    "olmo2": ("flex_olmo",),
}
_HEADS = "it normalises the queries and keys of each head"
WHY_NOT = {  # what keeps a class from computing another model's attention
    "mixtral": "it has no bias on queries, keys and values and no norm on queries and keys",
    "qwen2_moe": "it has no norm on queries and keys",
    "qwen3_moe": _HEADS,
    "olmoe": "it normalises queries and keys over all heads at once, before its residual sum",
    "flex_olmo": "it normalises queries and keys over all heads at once, and what each block adds",
}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_OWN = {"model_type", "architectures", "transformers_version", "torch_dtype", "id2label", "label2id", "_name_or_path"}


def check_dense(config: Any) -> None:
    """Raises ValueError where a config is that of no dense decoder that can be converted."""
    kind = config.model_type
    experts = next((n for n in (getattr(config, name, None) for name in _EXPERTS) if isinstance(n, int) and n), 0)
    if experts:
        raise ValueError(f"{_WHO}: dense must be a dense model, got one of type {kind} with {experts} experts already")
    if kind not in DENSE:
        raise ValueError(f"{_WHO}: dense must be of a type in {', '.join(DENSE)}, got {kind!r}")
    for name in ("quantization_config", "compression_config"):
        if getattr(config, name, None) is not None:
            raise ValueError(f"{_WHO}: dense must have its weights as they were trained, got one with a {name}")
    for name in ("mlp_bias", "attention_bias"):
        if getattr(config, name, False) and (kind, name) != ("qwen3", "attention_bias"):
            raise ValueError(f"{_WHO}: dense must have no bias there ({name}), which no MoE class has, got {name}=True")


def target_of(config: Any, to: str | None, layers: Sequence[int] | None) -> str:
    """The MoE class to make. `layers`: those that become MoE, None for all."""
    kind = config.model_type
    able = [t for t in DENSE[kind] if layers is None or TARGETS[t].some]
    if to is None:
        if not able:
            rule = f"all of a {kind} model: {', '.join(DENSE[kind])} has no dense layers"
            raise ValueError(f"{_WHO}: layers must be {rule}, got {list(layers or ())}")
        return able[0]
    if to not in DENSE[kind]:
        why = f" ({WHY_NOT[to]})" if to in WHY_NOT else ""
        raise ValueError(f"{_WHO}: to must be one of {', '.join(DENSE[kind])} for a {kind} model, got {to!r}{why}")
    if to not in able:
        raise ValueError(f"{_WHO}: layers must be all for {to}, which has no dense layers, got {list(layers or ())}")
    windows = set(getattr(config, "layer_types", None) or ())
    if to == "qwen3_moe" and len(windows) > 1:
        raise ValueError(f"{_WHO}: dense must have one kind of attention in all layers for {to}, got {sorted(windows)}")
    return to


def config_for(config: Any, to: str, experts: int, top_k: int, width: int, sparse: Sequence[int]) -> Any:
    """The config of the MoE model. `sparse`: the layers with experts."""
    import transformers

    cls: Any = transformers.CONFIG_MAPPING[to]
    target, said = TARGETS[to], config.to_dict()
    known = {f.name for f in fields(cls)} - _OWN
    given = {name: value for name, value in said.items() if name in known}
    head = getattr(config, "head_dim", None)
    if head is not None and head != config.hidden_size // config.num_attention_heads:
        given["head_dim"] = head
    given |= {target.width: width, "num_experts_per_tok": top_k, "dtype": said.get("dtype")}
    given["num_local_experts" if to == "mixtral" else "num_experts"] = experts
    if to != "mixtral":
        given["norm_topk_prob"] = True
    if target.some:
        given |= {"mlp_only_layers": [i for i in range(config.num_hidden_layers) if i not in set(sparse)]}
        given |= {"decoder_sparse_step": 1}
    if target.shared:
        given |= {"shared_expert_intermediate_size": 0, "qkv_bias": config.model_type == "qwen2"}
    if to == "qwen3_moe" and "sliding_attention" not in (getattr(config, "layer_types", None) or ()):
        given["use_sliding_window"] = False  # it would have one in all layers
    made = cls(**given)
    model: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[cls]
    made.architectures = [model.__name__]
    return made


def gates(model: nn.Module) -> list[nn.Module]:
    """The routers of a transformers model of one of TARGETS' classes, or of one like them, layer by layer."""
    return [m.gate for m in model.modules() if hasattr(m, "experts") and hasattr(getattr(m, "gate", None), "top_k")]  # type: ignore[misc]
