"""A checkpoint with random weights and the shape of Qwen3-30B-A3B: real names, several shards, a shard in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....placement.careful import opened
from ...output import write_text

MARK = "headgate-bench.json"  # written last: a folder without it is not whole
SHARD_bytes = 600_000_000
VERSION = 1
_MINE = ("config.json", "generation_config.json", "model.safetensors.index.json", MARK)


@dataclass(frozen=True)
class Sizes:
    """The published sizes, but for 7 layers of 48 and a small vocabulary: 8.7 GB, of which 97 % are experts."""

    layers: int = 7
    experts: int = 128
    top_k: int = 8
    hidden: int = 2048
    ffn: int = 768
    heads: int = 32
    kv_heads: int = 4
    head_dim: int = 128
    vocab: int = 4096

    def scaled(self, share: float) -> Sizes:
        """Each size that much smaller; widths stay multiples of 256, which blocks of few bits want."""

        def part(n: int, least: int, step: int = 1) -> int:
            return max(least, round(n * share / step) * step)

        return replace(
            self,
            layers=part(self.layers, 2),
            experts=part(self.experts, 2 * self.top_k),
            hidden=part(self.hidden, 256, 256),
            ffn=part(self.ffn, 256, 256),
            heads=part(self.heads, 2 * self.kv_heads, self.kv_heads),
            vocab=part(self.vocab, 512),
        )

    @property
    def expert_bytes(self) -> int:
        """Of all experts, in bf16."""
        return self.layers * self.experts * 3 * self.hidden * self.ffn * 2

    @property
    def rest_bytes(self) -> int:
        """Of everything else."""
        return sum(2 * t.numel() for name, t in _blank(self) if ".experts." not in name)

    def config(self):
        """As transformers has it."""
        from transformers import Qwen3MoeConfig

        said: dict[str, Any] = {
            "architectures": ["Qwen3MoeForCausalLM"],
            "dtype": "bfloat16",
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": 3 * self.hidden,
            "moe_intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "num_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "norm_topk_prob": True,
            "tie_word_embeddings": False,
            "rope_theta": 1e6,
            "max_position_embeddings": 4096,
            **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),
        }
        return Qwen3MoeConfig(**said)


def make(folder: Path, sizes: Sizes, seed: int = 0) -> Path:
    """The checkpoint in `folder`, written now unless it is there, with at most a shard of it in memory.

    Norms are near one, embeddings have standard deviation 1, all others 0.02: a router sees mostly the token, as in
    trained models, and no expert is preferred by much.

    Raises ValueError where the folder holds something else, OSError where the disk has no room.
    """
    if whole(folder, sizes, seed):
        return folder
    if folder.exists() and any(not _mine(each) for each in folder.iterdir()):
        raise ValueError(f"bench offload: --folder must be for this benchmark alone, got other files in {folder}")
    remove(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _write(folder, sizes, seed)
    except BaseException:
        remove(folder)
        raise
    return folder


def whole(folder: Path, sizes: Sizes, seed: int = 0) -> bool:
    """Whether the folder holds this very checkpoint."""
    if not (folder / MARK).is_file():
        return False
    with opened(folder / MARK, "bench offload") as file:
        said = file.json()
    return said == _mark(folder, sizes, seed)


def remove(folder: Path) -> None:
    """Removes what `make` writes, and the folder if nothing else is in it."""
    if not folder.is_dir():
        return
    for each in folder.iterdir():
        if _mine(each):
            each.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def shards(folder: Path) -> list[Path]:
    return sorted(each for each in folder.iterdir() if _shard(each))


def _mine(path: Path) -> bool:
    return path.name in _MINE or _shard(path) or path.name.startswith(".tmp")  # safetensors' own, of a killed run


def _shard(path: Path) -> bool:
    return path.name.startswith("model-") and path.suffix == ".safetensors"


def _mark(folder: Path, sizes: Sizes, seed: int) -> dict[str, object]:
    files = {each.name: each.stat().st_size for each in shards(folder)}
    return {"version": VERSION, "seed": seed, "sizes": asdict(sizes), "files": files}


def _write(folder: Path, sizes: Sizes, seed: int) -> None:
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    groups = list(_shards_of(sizes))
    where: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        save_file({key: _random(key, t, generator) for key, t in group.items()}, folder / name, {"format": "pt"})
        where |= dict.fromkeys(group, name)
    total = sizes.expert_bytes + sizes.rest_bytes
    index = {"metadata": {"total_size": total}, "weight_map": where}
    write_text(folder / "model.safetensors.index.json", json.dumps(index))
    sizes.config().save_pretrained(folder)
    write_text(folder / MARK, json.dumps(_mark(folder, sizes, seed)))


def _random(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    made = torch.empty(like.shape, dtype=torch.bfloat16)
    if "norm" in name:
        return made.normal_(1, 0.02, generator=generator)
    return made.normal_(0, 1.0 if "embed_tokens" in name else 0.02, generator=generator)


def _shards_of(sizes: Sizes) -> Iterator[dict[str, Tensor]]:
    group: dict[str, Tensor] = {}
    size = 0
    for name, t in _blank(sizes):
        if group and size + 2 * t.numel() > SHARD_bytes:
            yield group
            group, size = {}, 0
        group[name] = t
        size += 2 * t.numel()
    yield group


def _blank(sizes: Sizes) -> Iterator[tuple[str, Tensor]]:
    """(name as published, tensor on the meta device) of all weights, in the order of the model."""
    s, d = sizes, sizes.hidden

    def at(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    yield "model.embed_tokens.weight", at(s.vocab, d)
    for layer in range(s.layers):
        to = f"model.layers.{layer}"
        yield f"{to}.input_layernorm.weight", at(d)
        yield f"{to}.self_attn.q_proj.weight", at(s.heads * s.head_dim, d)
        yield f"{to}.self_attn.k_proj.weight", at(s.kv_heads * s.head_dim, d)
        yield f"{to}.self_attn.v_proj.weight", at(s.kv_heads * s.head_dim, d)
        yield f"{to}.self_attn.o_proj.weight", at(d, s.heads * s.head_dim)
        yield f"{to}.self_attn.q_norm.weight", at(s.head_dim)
        yield f"{to}.self_attn.k_norm.weight", at(s.head_dim)
        yield f"{to}.post_attention_layernorm.weight", at(d)
        yield f"{to}.mlp.gate.weight", at(s.experts, d)
        for e in range(s.experts):
            yield f"{to}.mlp.experts.{e}.gate_proj.weight", at(s.ffn, d)
            yield f"{to}.mlp.experts.{e}.up_proj.weight", at(s.ffn, d)
            yield f"{to}.mlp.experts.{e}.down_proj.weight", at(d, s.ffn)
    yield "model.norm.weight", at(d)
    yield "lm_head.weight", at(s.vocab, d)
