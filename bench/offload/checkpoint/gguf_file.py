"""The benchmark's checkpoint as a GGUF file for llama.cpp, by the `gguf` package, a layer's matrix at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ....placement.files import remove_stale
from .make import Sizes

_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate_inp": "mlp.gate",
}
_EXPERTS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}


def names(sizes: Sizes) -> Iterator[tuple[str, list[str]]]:
    """(tensor of the GGUF file, those of the checkpoint that it is made of): one, or all experts' of a layer."""
    yield "token_embd.weight", ["model.embed_tokens.weight"]
    for n in range(sizes.layers):
        for theirs, ours in _LAYER.items():
            yield f"blk.{n}.{theirs}.weight", [f"model.layers.{n}.{ours}.weight"]
        for theirs, ours in _EXPERTS.items():
            each = [f"model.layers.{n}.mlp.experts.{e}.{ours}.weight" for e in range(sizes.experts)]
            yield f"blk.{n}.{theirs}.weight", each
    yield "output_norm.weight", ["model.norm.weight"]
    yield "output.weight", ["lm_head.weight"]


def write(sizes: Sizes, read: Callable[[str], Tensor], path: Path) -> None:
    """The file, in bf16 (norms and routers in fp32, as llama.cpp's converter has them). `read`: name -> a tensor."""
    import gguf

    remove_stale(path)
    writer = gguf.GGUFWriter(path, "qwen3moe")
    try:
        _say(writer, sizes, gguf)
        wide = gguf.GGMLQuantizationType.BF16
        shapes = {}
        for name, parts in names(sizes):
            shape = tuple(read(parts[0]).shape)
            shapes[name] = (len(parts), *shape) if len(parts) > 1 else shape
            plain = _plain(name)
            size = 4 if plain else 2
            count = torch.Size(shapes[name]).numel()
            kind = torch.float32 if plain else torch.bfloat16
            dtype = torch.empty(0, dtype=kind if plain else torch.uint8).numpy().dtype
            bytewise = shapes[name] if plain else (*shapes[name][:-1], shapes[name][-1] * size)
            writer.add_tensor_info(name, bytewise, dtype, count * size, None if plain else wide)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, parts in names(sizes):
            t = torch.stack([read(part) for part in parts]) if len(parts) > 1 else read(parts[0])
            data = t.float().numpy() if _plain(name) else t.contiguous().view(torch.uint8).numpy()
            writer.write_tensor_data(data)
    except BaseException:
        writer.close()
        path.unlink(missing_ok=True)
        raise
    writer.close()


def _plain(name: str) -> bool:
    return "norm" in name or "ffn_gate_inp" in name


def _say(writer, s: Sizes, gguf) -> None:
    writer.add_name("headgate bench")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_block_count(s.layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(s.hidden)
    writer.add_feed_forward_length(3 * s.hidden)
    writer.add_expert_feed_forward_length(s.ffn)
    writer.add_head_count(s.heads)
    writer.add_head_count_kv(s.kv_heads)
    writer.add_key_length(s.head_dim)
    writer.add_value_length(s.head_dim)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_expert_count(s.experts)
    writer.add_expert_used_count(s.top_k)
    writer.add_vocab_size(s.vocab)
    writer.add_tokenizer_model("no_vocab")
