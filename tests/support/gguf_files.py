"""Small GGUF files with random weights, as llama.cpp's converter writes them, and the transformers models they mean.

Names are spelled out here once more, and written by the gguf package: the library's reader must agree with both.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as Type

from headgate.kernels.quantized import quantize

D = F = 256
E = 4
_SIZES = {
    "hidden_size": D, "intermediate_size": F, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "max_position_embeddings": 128,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3moe": ("Qwen3Moe", {"moe_intermediate_size": F, "num_experts": E, "num_experts_per_tok": 2, "head_dim": 32,
                              "norm_topk_prob": True}),
    "qwen2moe": ("Qwen2Moe", {"moe_intermediate_size": F, "shared_expert_intermediate_size": 64, "num_experts": E,
                              "num_experts_per_tok": 2}),
    "llama": ("Mixtral", {"num_local_experts": E, "num_experts_per_tok": 2}),
    "olmoe": ("Olmoe", {"num_experts": E, "num_experts_per_tok": 2, "num_key_value_heads": 4}),
    "gpt-oss": ("GptOss", {"num_local_experts": E, "num_experts_per_tok": 2, "head_dim": 32, "sliding_window": 8}),
    "deepseek2": ("DeepseekV3", {
        "n_routed_experts": E, "num_experts_per_tok": 2, "moe_intermediate_size": F, "n_group": 2, "topk_group": 1,
        "first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32, "v_head_dim": 32, "num_key_value_heads": 4,
    }),
}  # fmt: skip
_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "self_attn.sinks": "attn_sinks",
    "self_attn.q_a_proj": "attn_q_a", "self_attn.q_b_proj": "attn_q_b", "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa", "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b", "mlp.gate": "ffn_gate_inp", "mlp.router": "ffn_gate_inp",
    "mlp.gate.e_score_correction_bias": "exp_probs_b", "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}  # fmt: skip
for _one in ("gate", "up", "down"):
    _NAMES[f"mlp.{_one}_proj"] = f"ffn_{_one}"
    _NAMES[f"mlp.shared_expert.{_one}_proj"] = _NAMES[f"mlp.shared_experts.{_one}_proj"] = f"ffn_{_one}_shexp"


def small(family: str, dtype: torch.dtype = torch.float32, **more: Any) -> torch.nn.Module:
    """A random model."""
    name, sizes = FAMILIES[family]
    torch.manual_seed(7)
    config = getattr(transformers, f"{name}Config")(**{**_SIZES, **sizes, **more}, dtype=dtype)
    model = getattr(transformers, f"{name}ForCausalLM")(config).to(dtype).eval()
    with torch.no_grad():
        for name, t in model.state_dict().items():
            norm = "norm" in name
            t.normal_(1.0 if norm else 0.0, 0.1 if norm or t.dim() < 2 else t.shape[-1] ** -0.5)
    return model


def _turned(w: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q and k as llama.cpp has llama's: the two halves of a head's rows alternate."""
    return w.reshape(heads, 2, -1, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def write(
    path: Path, family: str, model: Any, type_of: Callable[[str], str] = lambda name: "F32", *, merged: bool = False,
    each: bool = False, split_kv: bool = False, split_files: int = 0,
) -> None:  # fmt: skip
    """Writes `model`, and rounds its weights to what the file says. `type_of`: the type of a tensor of two dimensions
    or more, by its name in the file. `merged`: gate and up in one tensor; `each`: a tensor for each expert; `split_kv`:
    DeepSeek's attn_kv_b in two."""
    config = model.config
    file = gguf.GGUFWriter(path, family, split_max_tensors=split_files)
    _metadata(file, family, config)
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}

    def add(name: str, w: torch.Tensor) -> torch.Tensor:
        """Into the file; the numbers that it says."""
        plain = w.dim() < 2 or "ffn_gate_inp" in name or name.endswith(".bias")
        raw, kind = _coded(w.detach().float().contiguous(), "F32" if plain else type_of(name))
        file.add_tensor(name, raw, raw_dtype=kind)
        read = raw if raw.dtype == np.float32 else gguf.quants.dequantize(raw, kind)
        return torch.from_numpy(np.ascontiguousarray(read)).reshape(w.shape).to(w.dtype)

    with torch.no_grad():
        for name, t in model.state_dict().items():
            if ".experts." in name:
                continue
            layer, theirs, suffix = _name_of(name, family)
            if config.tie_word_embeddings and theirs == "output":
                continue
            full = f"{layer}{theirs}.{suffix}"
            if split_kv and theirs == "attn_kv_b":
                k, v = t.view(heads["q"], -1, t.shape[1]).split([config.qk_nope_head_dim, config.v_head_dim], 1)
                k.copy_(add(f"{layer}attn_k_b.weight", k.transpose(1, 2)).transpose(1, 2))
                v.copy_(add(f"{layer}attn_v_b.weight", v))
            elif family == "llama" and theirs in ("attn_q", "attn_k"):
                order = _turned(torch.arange(len(t)), heads[theirs[-1]])
                t[order] = add(full, t[order])
            else:
                t.copy_(add(full, t.squeeze()).reshape(t.shape))
        for name, module in model.named_modules():
            if name.endswith(".experts"):
                _experts(f"blk.{re.search(r'layers.(.)', name)[1]}.", module, add, merged, each)  # type: ignore[index]
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def _experts(layer: str, module: Any, add: Callable, merged: bool, each: bool) -> None:
    turned, mixed = getattr(module, "is_transposed", False), not getattr(module, "is_concatenated", True)

    def parts(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (t[:, ::2], t[:, 1::2]) if mixed else t.chunk(2, 1)  # type: ignore[return-value]

    first, down = (t.transpose(1, 2) if turned else t for t in (module.gate_up_proj.data, module.down_proj.data))
    if merged:
        gate_up = add(f"{layer}ffn_gate_up_exps.weight", torch.cat(parts(first), 1))
        for w, read in zip(parts(first), gate_up.chunk(2, 1), strict=True):
            w.copy_(read)
    else:
        for name, w in zip(("gate", "up"), parts(first), strict=True):
            w.copy_(_added(f"{layer}ffn_{name}", w, add, each))
    down.copy_(_added(f"{layer}ffn_down", down, add, each))
    if hasattr(module, "gate_up_proj_bias"):
        for name, b in zip(("gate", "up"), parts(module.gate_up_proj_bias.data), strict=True):
            b.copy_(add(f"{layer}ffn_{name}_exps.bias", b))
        module.down_proj_bias.data.copy_(add(f"{layer}ffn_down_exps.bias", module.down_proj_bias.data))


def _added(name: str, w: torch.Tensor, add: Callable, each: bool) -> torch.Tensor:
    if not each:
        return add(f"{name}_exps.weight", w)
    return torch.stack([add(f"{name}.{e}.weight", one) for e, one in enumerate(w)])


def _name_of(name: str, family: str) -> tuple[str, str, str]:
    """(blk.N., the name there, weight or bias)."""
    layer = re.match(r"model\.layers\.(\d+)\.(.*)", name)
    stem = layer[2] if layer else name
    suffix = "bias" if stem.endswith("bias") else "weight"
    stem = re.sub(r"\.(weight|bias)$", "", stem)
    if family == "gpt-oss" and stem == "post_attention_layernorm":
        return f"blk.{layer[1]}.", "post_attention_norm", suffix  # type: ignore[index]
    return f"blk.{layer[1]}." if layer else "", _NAMES[stem], suffix


def _coded(w: torch.Tensor, type: str) -> tuple[np.ndarray, Type]:
    if type == "F32":
        return w.numpy(), Type.F32
    if type.endswith("_K"):  # which the gguf package can only read
        whole = w if w.dim() == 3 else w[None]
        data = quantize(whole, type).data
        return (data if w.dim() == 3 else data[0]).numpy(), Type[type]
    if type == "IQ4_NL":
        blocks = np.random.default_rng(3).integers(0, 256, (*w.shape[:-1], w.shape[-1] // 32, 18), np.uint8)
        blocks[..., :2] = np.frombuffer(np.float16(0.0005).tobytes(), np.uint8)
        return blocks.reshape(*w.shape[:-1], -1), Type.IQ4_NL
    return gguf.quants.quantize(w.numpy(), Type[type]), Type[type]


def _metadata(file: Any, family: str, config: Any) -> None:
    file.add_name("a small one")
    file.add_context_length(config.max_position_embeddings)
    file.add_block_count(config.num_hidden_layers)
    file.add_embedding_length(config.hidden_size)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_head_count(config.num_attention_heads)
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_rope_freq_base(config.rope_parameters["rope_theta"])
    file.add_expert_count(E)
    file.add_expert_used_count(config.num_experts_per_tok)
    if family in ("qwen3moe", "gpt-oss"):
        file.add_key_length(config.head_dim)
        file.add_value_length(config.head_dim)
    if family not in ("llama", "olmoe"):
        file.add_expert_feed_forward_length(F)
    if family == "qwen2moe":
        file.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if family == "gpt-oss":
        file.add_sliding_window(config.sliding_window)
        file.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        file.add_rope_scaling_factor(config.rope_parameters["factor"])
        file.add_rope_scaling_orig_ctx_len(config.rope_parameters["original_max_position_embeddings"])
    file.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)
    file.add_pad_token_id(0)
