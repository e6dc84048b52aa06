"""Small configurations of transformers' families, derived from what each configuration class says of itself.

`small_values(cls)` reads a default instance of the class and shrinks it by rules, first match first:

- Layers: a few of the default's own layers are kept, the fewest (two at least) that hold experts and show every kind of
  layer. A list with one kind for each layer is cut to them; a number that counts or points at layers scales with them.
- Sizes: a field of a name that many classes share gets its size from SIZES, another one from the ending of its name.
- What the class derives from other fields (None by default) is left to the class.
- Nested configurations are shrunk the same way; sections of rotary dimensions are cut to the head they belong to.

`smaller(config, shape)` helps where no name did: it finds the fields that made a parameter large.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from functools import cache
from typing import Any

_SIZES = {
    64: "vocab_size vocab_size_per_layer_input max_position_embeddings",
    32: "hidden_size d_model embed_dim out_hidden_size text_hidden_size projection_hidden_dim image_size",
    16: """intermediate_size ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim moe_intermediate_size q_lora_rank
           expert_ffn_hidden_size ffn_hidden_size shared_expert_intermediate_size moe_hidden_size index_head_dim
           moe_shared_expert_intermediate_size shared_experts_intermediate_size shared_intermediate_size
           intermediate_size_mlp router_hidden_size dense_intermediate_size qk_head_dim""",
    8: """head_dim d_kv kv_channels kv_lora_rank o_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim hc_lowrank
          linear_head_dim linear_key_head_dim linear_value_head_dim mamba_d_state mamba_d_head mamba_n_heads chunk_size
          mamba_num_heads mamba_head_dim mamba_chunk_size ssm_state_size sliding_window indexer_head_dim indexer_budget
          hidden_size_per_layer_input num_experts num_local_experts n_routed_experts moe_num_experts moe_experts""",
    4: """num_attention_heads n_heads num_heads encoder_attention_heads decoder_attention_heads linear_num_heads
          linear_num_value_heads index_n_heads index_topk indexer_n_heads index_kpool""",
    2: """num_hidden_layers num_layers n_layers encoder_layers decoder_layers num_decoder_layers num_key_value_heads
          kv_n_heads linear_num_key_heads num_experts_per_tok num_experts_per_token moe_k moe_topk moe_top_k
          top_k_experts n_group num_expert_group n_groups mamba_expand indexer_compress_ratio expert_capacity
          attn_layer_period""",
    1: """topk_group mamba_n_groups n_shared_experts expert_layer_period indexer_kv_heads eos_token_id bos_token_id
          encoder_sparse_step decoder_sparse_step""",
    0: "pad_token_id expert_layer_offset attn_layer_offset num_dense_layers first_k_dense_replace",
}
_OFF = """dropout attention_dropout dropout_rate encoder_layerdrop decoder_layerdrop moe_token_dropout
          router_jitter_noise hidden_dropout_prob attention_probs_dropout_prob"""
SIZES: dict[str, Any] = {name: size for size, names in _SIZES.items() for name in names.split()}
SIZES |= dict.fromkeys(_OFF.split(), 0.0)
# Other fields, by a part of their names; only ever made smaller.
_PARTS = (
    (r"vocab_size|max_position_embeddings", 64),
    (r"intermediate_size|ffn_dim", 16),
    (r"(key_value|kv)_?(n_)?heads$", 2),
    (r"_heads$", 4),
    (r"head_dim$|_rank$|^sliding_window|_extent$|_features$|(routed|local|num)_experts$", 8),
    (r"top_?k|experts_per_tok", 2),
)
_LAYERS = r"^(num_hidden_layers|num_layers|n_layers|encoder_layers|decoder_layers|num_decoder_layers)$"
_PARTS_OF_A_HEAD = ("qk_nope_head_dim", "qk_rope_head_dim")
_SWITCH = r"^(is|use|enable|has)_moe"


@cache
def default(cls: type) -> Any:
    """The configuration that the class makes of nothing."""
    return cls()


def small_values(cls: type, sections: bool = False, **changes: Any) -> dict[str, Any]:
    """The arguments of a small configuration of `cls`; `changes` go before the rules.

    `sections`: the model cuts its rotary dimensions in sections, which the class need not say.
    """
    aliases = getattr(cls, "attribute_map", {})
    base, values = default(cls), {}
    names = [f.name for f in dataclasses.fields(cls) if not f.name.startswith(("_", "base_model", "sub_configs"))]
    names += [alias for alias, field in aliases.items() if field not in changes]  # it would overwrite the change
    layers = _layers_to_keep(base, names)
    for name in names:
        value = _small(name, read(base, name), read(cls, name), base, layers)
        if value is not _KEEP:
            values[name] = value
    for name, sub in getattr(cls, "sub_configs", {}).items():
        if dataclasses.is_dataclass(sub) and name not in changes:
            values[name] = sub(**small_values(sub))
    if layers is not None and "num_hidden_layers" in names:
        values["num_hidden_layers"] = len(layers)
    if "num_key_value_heads" in values and (
        "kv_lora_rank" in names or read(base, "num_key_value_heads") == read(base, "num_attention_heads") is not None
    ):  # latent attention has as many keys as queries
        values["num_key_value_heads"] = 4
    single = _single_layers(base, names, values, layers) if layers is not None else {}
    return values | single | _rotary(base, sections) | changes


_KEEP = object()


def _small(name: str, value: Any, given: Any, base: Any, layers: list[int] | None) -> Any:
    """The small value of a field; _KEEP for its default. `given`: the class's default, None where it is derived."""
    if name == "mlp_layer_types" and value is None and layers is not None:
        return ["sparse"] * len(layers)
    if isinstance(value, bool):
        return True if re.search(_SWITCH, name) else _KEEP
    if isinstance(value, list | tuple):
        return _small_list(name, value, given, layers)
    if isinstance(value, int) and name.endswith("_token_id"):
        return SIZES.get(name, 1)
    if name in SIZES:
        return value if value == 0 and name.endswith("rope_head_dim") else _top_k(name, value, SIZES[name])
    if not isinstance(value, int) or given is None:
        return _KEEP
    if "layer" in name and layers is not None:  # counts or points at layers
        whole = _count(base)
        return max(1, round(value * len(layers) / whole)) if 1 < value <= whole else _KEEP
    return next((size for part, size in _PARTS if re.search(part, name) and value > size), _KEEP)


def _top_k(name: str, value: Any, size: Any) -> Any:
    """Never more experts of a token than the family takes by default."""
    return min(value, size) if re.search(_PARTS[-1][0], name) and isinstance(value, int) else size


def _small_list(name: str, value: list | tuple, given: Any, layers: list[int] | None) -> Any:
    kept = layers is not None and [value[i] for i in layers if i < len(value)]
    if layers is not None and _per_layer(value):
        return kept
    if name.endswith("mlp_only_layers"):
        return []
    sizes = next((size for part, size in _PARTS if re.search(part, name)), SIZES.get(name))
    if sizes is not None and value and all(isinstance(v, int) for v in value):
        return type(value)([sizes] * len(value))
    return _KEEP


def _per_layer(value: Any) -> bool:
    """Whether a list names a kind of layer in each place."""
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)


def _count(base: Any) -> int:
    return read(base, "num_hidden_layers") or read(base, "num_layers") or read(base, "n_layers") or 1


def _layers_to_keep(base: Any, names: list[str]) -> list[int] | None:
    """The default's layers that stay, rising, or None where it does not number them.

    Layers whose feed-forward part has no experts go first; of the others the earliest that show a new kind.
    """
    count = read(base, "num_hidden_layers")
    if not isinstance(count, int):
        return None
    kinds = [v for v in (read(base, name) for name in names if name.endswith(("types", "type"))) if _per_layer(v)]
    kinds = [v for v in kinds if len(v) == count]
    sparse = [i for i in range(count) if not any(v[i] == "dense" for v in kinds)] or list(range(count))
    seen: set[tuple[int, str]] = set()
    keep = []
    for i in sparse:
        new = {(n, v[i]) for n, v in enumerate(kinds)} - seen
        if new:
            keep.append(i)
            seen |= new
    keep += [i for i in sparse if i not in keep][: max(0, 2 - len(keep))]
    return sorted(keep)


def _single_layers(base: Any, names: list[str], values: dict[str, Any], layers: list[int]) -> dict[str, Any]:
    """What the default sets for single layers, for those that stay: fields that cannot be read for all at once."""
    odd = [name for name in names if _differs(base, name)]
    if not odd:
        return {}

    def small(layer: Any) -> dict[str, Any]:
        found = {n: _small(n, read(layer, n), read(layer, n), base, layers) for n in odd}
        found = {n: values.get(n, read(layer, n) if v is _KEEP else v) for n, v in found.items()}
        if _whole_head(lambda n: read(layer, n)):
            found["head_dim"] = sum(found.get(n, values.get(n, 0)) for n in _PARTS_OF_A_HEAD)
        return found

    return {"per_layer_config": {at: small(base.per_layer_config[i]) for at, i in enumerate(layers)}}


def _whole_head(of: Callable[[str], Any]) -> bool:
    """Whether a head is as wide as its parts with and without rotation."""
    parts = [of(name) for name in _PARTS_OF_A_HEAD]
    return None not in parts and of("head_dim") == sum(parts)


def _rotary(base: Any, sections: bool) -> dict[str, Any]:
    """The rotary parameters with sections (height, width, time) that fill half of a head of 8, or what of it turns."""
    rope = read(base, "rope_parameters")
    if not isinstance(rope, dict) or not (sections or "mrope_section" in rope):
        return {}
    half = max(1, int(8 * rope.get("partial_rotary_factor", 1.0) / 2))
    return {"rope_parameters": {**rope, "mrope_section": [half // 3, half // 3, half - 2 * (half // 3)]}}


def _differs(thing: Any, name: str) -> bool:
    """Whether a field is another one for single layers: reading it for all raises an error of transformers."""
    try:
        getattr(thing, name, None)
    except Exception:  # of a type that is not public
        return True
    return False


def read(thing: Any, name: str) -> Any:
    """An attribute; None where there is none for all layers."""
    return None if _differs(thing, name) else getattr(thing, name, None)


def smaller(config: Any, shape: tuple[int, ...]) -> dict[str, int]:
    """The fields to shrink so that a parameter of this shape becomes small: those whose value is in a dimension."""
    ints = {f.name: read(config, f.name) for f in dataclasses.fields(config)}
    ints = {n: v for n, v in ints.items() if isinstance(v, int) and not isinstance(v, bool) and v > 16}
    for dim in sorted(shape, reverse=True):
        equal = [n for n, v in ints.items() if v == dim] or [n for n, v in ints.items() if dim % v == 0]
        if equal:
            return dict.fromkeys(equal, 16)
    return {}
