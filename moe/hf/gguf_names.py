"""What a GGUF file is to transformers: its metadata as a config, its tensors' names as parameters, its values undone.

Names are asked of the gguf package (llama.cpp's own tables), values and configs of transformers' GGUF tables, as far as
those know an architecture; what they lack stands here. Experts are not named here, see ../offload/gguf_experts.py.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ...placement.careful import Guard

_WHO = "load"
EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"


@dataclass(frozen=True)
class _Family:
    """An architecture of MoE models: its name in transformers, in transformers' table of GGUF keys, and keys beside
    those of the table. `given`: its config cannot be told from the metadata."""

    model_type: str
    table: str = ""
    keys: Mapping[str, str] = field(default_factory=dict)
    given: bool = False


_SIZES = {"expert_feed_forward_length": "moe_intermediate_size"}
_COUNTS = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
# Architectures of whose tensors we know what llama.cpp's converter does to them, by their names in the file. Mixtral is
# llama's with experts.
_FAMILIES = {
    "qwen2moe": _Family(
        "qwen2_moe", "qwen2_moe", {**_SIZES, "expert_shared_feed_forward_length": "shared_expert_intermediate_size"}
    ),
    "qwen3moe": _Family("qwen3_moe", "qwen3_moe", _SIZES),
    "llama": _Family("mixtral", "llama", _COUNTS),
    "olmoe": _Family("olmoe", "qwen2_moe", {"attention.clamp_kqv": "clip_qkv"}),
    "gpt-oss": _Family(
        "gpt_oss",
        "gpt_oss",
        {
            "attention.key_length": "head_dim",
            "attention.sliding_window": "sliding_window",
            "expert_feed_forward_length": "intermediate_size",
        },
    ),
    "deepseek2": _Family("deepseek_v3", given=True),
}  # fmt: skip
_ROPE = {
    "rope.scaling.factor": "factor", "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.yarn_beta_fast": "beta_fast", "rope.scaling.yarn_beta_slow": "beta_slow",
}  # fmt: skip
_TOKENS = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
_NO_WEIGHTS = re.compile(r"rope_(freqs|factors\w*)\.weight|blk\.(\d+)\..*")  # made from the config; or of a layer


def check_architecture(guard: Guard, architecture: str) -> None:
    """Raises ValueError where nobody here knows what the file's tensors have gone through."""
    guard.rule(architecture in _FAMILIES, "general.architecture", f"one of {', '.join(_FAMILIES)}", architecture)


def config_of(
    guard: Guard, architecture: str, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> Any:
    """The transformers config that a file's metadata and the shapes of its tensors say. Raises ValueError where they do
    not say enough."""
    from transformers import CONFIG_MAPPING
    from transformers.integrations.ggml import GGUF_CONFIG_DEFAULTS_MAPPING, GGUF_CONFIG_MAPPING

    family = _FAMILIES[architecture]
    blocks = len({name.split(".")[1] for name in shapes if name.startswith("blk.")})
    if family.given:
        raise guard.refusal("metadata", f"a whole config, which those of {architecture} are not: give config=", "None")
    said: dict[str, Any] = dict(GGUF_CONFIG_DEFAULTS_MAPPING.get(family.model_type, {}))
    table: Any = GGUF_CONFIG_MAPPING[family.table]
    for theirs, ours in {**table, **family.keys}.items():
        if ours is not None and f"{architecture}.{theirs}" in metadata:
            said[ours] = metadata[f"{architecture}.{theirs}"]
    scaling = metadata.get(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none":
        rope = {ours: metadata[k] for theirs, ours in _ROPE.items() if (k := f"{architecture}.{theirs}") in metadata}
        said["rope_scaling"] = {"rope_type": scaling, **rope}
        if family.model_type == "gpt_oss":
            said["rope_scaling"]["truncate"] = False
    tokens = {ours: metadata.get(f"tokenizer.ggml.{theirs}_token_id") for theirs, ours in _TOKENS.items()}
    said |= {"vocab_size": shapes[EMBEDDING][0], "tie_word_embeddings": OUTPUT not in shapes, **tokens}
    odd = [name for name in family.keys.values() if name not in said and name not in ("clip_qkv", "sliding_window")]
    missing = [name for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", *odd) if name not in said]
    if missing:
        raise guard.refusal("metadata", f"a whole config: give config=, or {missing[0]} in it", "none")
    layers = said["num_hidden_layers"]
    guard.rule(
        type(layers) is int and 1 <= layers <= blocks, "block_count", f"in 1 .. {blocks}, as tensors say", layers
    )
    with guard.watched("a config", "metadata"):
        return CONFIG_MAPPING[family.model_type](**said)


def architecture_of(config: Any) -> str:
    """The name in GGUF of a config's architecture. Raises ValueError where a file of it could not be written."""
    found = {family.model_type: name for name, family in _FAMILIES.items() if not family.given}
    if config.model_type not in found:
        raise ValueError(f"pack: model_type must be one of {', '.join(found)} for a GGUF file, got {config.model_type}")
    return found[config.model_type]


def metadata_of(config: Any) -> dict[str, Any]:
    """What a config says, in GGUF's keys: what `config_of` reads, and llama.cpp. There is no tokenizer in it."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    architecture = architecture_of(config)
    family = _FAMILIES[architecture]
    table: Any = GGUF_CONFIG_MAPPING[family.table]
    rope = dict(config.rope_parameters)
    said = {"rope.freq_base": float(rope["rope_theta"])}
    if rope.get("rope_type", "default") != "default":
        said |= {"rope.scaling.type": rope["rope_type"]}
        said |= {theirs: rope[ours] for theirs, ours in _ROPE.items() if rope.get(ours) is not None}
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    said |= dict.fromkeys(("attention.key_length", "attention.value_length", "rope.dimension_count"), head)
    for theirs, ours in {**table, **family.keys}.items():
        value = getattr(config, ours, None) if ours is not None else None
        if theirs not in said and isinstance(value, int | float):
            said[theirs] = value
    found = {"general.architecture": architecture, "general.quantization_version": 2}
    found |= {f"{architecture}.{key}": value for key, value in said.items()}
    found["tokenizer.ggml.model"] = "no_vocab"
    for theirs, ours in _TOKENS.items():
        value = getattr(config, ours, None)
        if isinstance(value, int):
            found[f"tokenizer.ggml.{theirs}_token_id"] = value
    return found


class Dense:
    """Where the parameters and buffers of a model, but its experts', come from in a GGUF file.

    `names`: parameter -> the tensors that make it, most often one. Raises ValueError naming a tensor that the model has
    no place for.
    """

    def __init__(
        self, guard: Guard, architecture: str, model: nn.Module, there: Collection[str], left: Collection[str]
    ) -> None:
        self._guard, self._architecture = guard, architecture
        m: Any = model
        self.config = m.config
        self._wanted = {name: t.shape for name, t in model.state_dict().items() if name not in left}
        table = _table(guard, architecture, self.config.num_hidden_layers)
        self.names: dict[str, tuple[str, ...]] = {}
        for name in self._wanted:
            found = next((some for some in _candidates(name, table) if all(key in there for key in some)), None)
            if found is not None:
                self.names[name] = found

    @classmethod
    def to_write(cls, model: nn.Module, left: Collection[str]) -> Dense:
        """Of a file that is to be written: every parameter has the name that llama.cpp gives it."""
        m: Any = model
        guard = Guard(Path(m.config.name_or_path), "pack")
        dense = cls(guard, architecture_of(m.config), model, _All(), left)
        nameless = sorted(dense._wanted.keys() - dense.names.keys())
        guard.rule(not nameless, "parameters", "such as a GGUF file has a name for", nameless[:1])
        return dense

    def written(self, name: str, t: Tensor) -> Tensor:
        """A parameter as llama.cpp's converter writes it, in one dimension less where there is but one row."""
        if self._architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = self.config.num_attention_heads if name.endswith("q_proj.weight") else None
            halves = t.reshape(heads or self.config.num_key_value_heads, 2, -1, *t.shape[1:])
            t = halves.transpose(1, 2).reshape(t.shape)
        return t.squeeze(0) if t.dim() == 2 else t

    def check_rest(self, rest: Collection[str]) -> None:
        """`rest`: the file's tensors that are no experts'. Raises ValueError where one would be left out."""
        taken = {key for keys in self.names.values() for key in keys}
        for key in sorted(set(rest) - taken):
            free = _NO_WEIGHTS.fullmatch(key)
            layer = free and free.group(2)  # of layers beyond the model's are those that foretell more tokens
            if free is None or (layer is not None and int(layer) < self.config.num_hidden_layers):
                rule = f"only tensors that {self._architecture}'s model and config have a place for"
                raise self._guard.refusal("tensors", rule, key)
        if "lm_head.weight" in self.names and self.config.tie_word_embeddings:
            raise self._guard.refusal("config", "without tied embeddings, as there is output.weight", "tied ones")

    def value(self, name: str, parts: list[Tensor]) -> Tensor:
        """The parameter, of its tensors: what llama.cpp's converter has done to them is undone."""
        if len(parts) == 2:  # DeepSeek's k_b [H, rank, k], turned there, and v_b [H, v, rank]
            t = torch.cat([parts[0].transpose(1, 2), parts[1]], 1).flatten(0, 1)
        else:
            from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

            made = TENSOR_PROCESSORS.get(self._architecture, TensorProcessor)(config=self.config.to_dict())
            t = torch.from_numpy(made.process(_plain(parts[0]), name=self.names[name][0]).weights)
            t = t.to(parts[0].dtype)
        return t.reshape(self._wanted[name])

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """`shapes`: of the file's tensors. Raises ValueError where one has another than its parameter."""
        for name, keys in self.names.items():
            if len(keys) == 1:
                want, got = (tuple(n for n in shape if n != 1) for shape in (self._wanted[name], shapes[keys[0]]))
                rule = f"{list(self._wanted[name])}, as the config says of {name}"
                self._guard.rule(want == got, f"shape of {keys[0]}", rule, list(shapes[keys[0]]))


class _All(Collection[str]):
    """Every name."""

    def __contains__(self, _: object) -> bool:
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def _plain(t: Tensor) -> Any:
    """As numpy, which has no bf16."""
    return (t.float() if t.dtype == torch.bfloat16 else t).numpy()


def _candidates(name: str, table: Any) -> Iterator[tuple[str, ...]]:
    """The tensors that a parameter can be made of, by their names in the file."""
    stem, dot, suffix = name.rpartition(".")
    if suffix.endswith("_bias"):  # a buffer of a router
        stem, suffix = f"{stem}{dot}{suffix[:-5]}", "bias"
    elif suffix not in ("weight", "bias"):
        stem, suffix = name, "weight"
    theirs = table.get_name(stem)
    if theirs is not None:
        yield (f"{theirs}.{suffix}",)
        if theirs.endswith(".attn_kv_b"):
            yield f"{theirs[:-4]}k_b.{suffix}", f"{theirs[:-4]}v_b.{suffix}"


def _table(guard: Guard, architecture: str, layers: int) -> Any:
    gguf = need_gguf("names of tensors")
    for arch, name in gguf.MODEL_ARCH_NAMES.items():
        if name == architecture:
            return gguf.get_tensor_name_map(arch, layers)
    _refuse(guard, architecture)


def _refuse(guard: Guard, architecture: str) -> NoReturn:
    raise guard.refusal("general.architecture", "one that the installed gguf package knows", architecture)


def need_gguf(what: str) -> Any:
    """The gguf package. Raises ImportError naming what to install."""
    try:
        import gguf
    except ImportError as error:
        why = f"load: gguf must be installed for {what} of a GGUF file: pip install 'headgate[gguf]'"
        raise ImportError(why) from error
    return gguf
