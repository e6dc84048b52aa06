"""Every MoE family of the installed transformers, found in its sources and built small.

A family is a model folder whose modeling file has a class under `@use_experts_implementation`, one that our table
names, or one called ...Experts. No list of families is kept: a new one is built by the same rules and fails here until
it works.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

from headgate.moe.hf.table import ADAPTERS, adapter_of  # noqa: E402

# What a configuration is shrunk to, wherever it has a field of that name.
_SIZES = {
    64: "vocab_size vocab_size_per_layer_input max_position_embeddings",
    32: "hidden_size d_model embed_dim",
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
          linear_num_key_heads num_experts_per_tok num_experts_per_token moe_k moe_topk moe_top_k top_k_experts n_group
          num_expert_group n_groups mamba_expand indexer_compress_ratio""",
    1: """topk_group mamba_n_groups n_shared_experts expert_layer_period indexer_kv_heads eos_token_id bos_token_id""",
    0: "pad_token_id expert_layer_offset num_dense_layers first_k_dense_replace",
}
_OFF = """dropout attention_dropout dropout_rate encoder_layerdrop decoder_layerdrop moe_token_dropout
          router_jitter_noise hidden_dropout_prob attention_probs_dropout_prob"""
SMALL = {name: size for size, names in _SIZES.items() for name in names.split()}
SMALL |= {**dict.fromkeys(_OFF.split(), 0.0), "mlp_layer_types": ["sparse", "sparse"]}
_MIXED = ["linear_attention", "full_attention"]
# What the names do not say: which layers are sparse or of which kind, and switches that are off by default.
SPECIAL = {
    "bailing_hybrid": {"layer_types": _MIXED},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 8, "moe_top_k": 2},
    },
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe"]},
    "diffusion_gemma": {"global_head_dim": 8},
    "doge": {"is_moe": True, "num_experts": 16},
    "ernie4_5_vl_moe": {
        "moe_intermediate_size": [16, 16],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    },
    "flint": {"mlp_only_layers": []},
    "gemma4": {"enable_moe_block": True, "global_head_dim": 8},
    "glm4v_moe": {
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2], "partial_rotary_factor": 1.0
        }
    },
    "glm5_next": {"num_key_value_heads": 4, "qk_rope_head_dim": 0, "layer_types": _MIXED},
    "granitemoehybrid": {"layer_types": _MIXED},
    "hy_v4": {"indexer_types": ["full", "full"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 0},
    "kimi_linear": {"layer_types": _MIXED},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"]},
    "llama4": {"num_experts_per_tok": 2},
    "nemotron_h": {"layers_block_type": ["moe", "full_attention"]},
    "nllb_moe": {"encoder_sparse_step": 1, "decoder_sparse_step": 1},
    "qwen3_5_moe": {"layer_types": _MIXED},
    "qwen3_next": {"layer_types": _MIXED},
    "qwen4_exp": {"layer_types": ["linear_attention", "indexed_attention"]},
    "switch_transformers": {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "expert_capacity": 2},
    "vitpose_backbone": {"part_features": 8, "num_experts": 3, "image_size": (32, 32)},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
# The model to build: text before towers, with a head before without.
_ENDINGS = ("ForCausalLM", "TextModel", "ForTokenClassification", "ForConditionalGeneration", "Backbone", "Model")


def families() -> dict[str, Path]:
    """Family -> its modeling file."""
    found = {}
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        if experts_classes(path):
            found[path.parent.name] = path
    return found


def experts_classes(path: Path) -> set[str]:
    text = path.read_text(encoding="utf-8")
    marked = re.findall(r"^@use_experts_implementation.*\n(?:@.*\n)*class (\w+)", text, re.M)
    named = [c for c in re.findall(r"^class (\w+)\(", text, re.M) if c in ADAPTERS or c.endswith("Experts")]
    helpers = {c for c, adapter in ADAPTERS.items() if adapter.helper}
    return {*marked, *(c for c in named if not c.endswith("SharedExperts") and c not in helpers)}


@dataclass
class Family:
    """A small model of one family and inputs for it."""

    name: str
    path: Path
    model: nn.Module
    inputs: dict

    def clone(self) -> nn.Module:
        return copy.deepcopy(self.model)

    def experts(self) -> list[nn.Module]:
        return [m for m in self.model.modules() if hasattr(m, "gate_up_proj") and hasattr(m, "down_proj")]

    def step(self, model: nn.Module | None = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss and gradients by name, of this model or another."""
        model = self.model if model is None else model
        model.zero_grad()
        loss = model(**self.inputs).loss
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _model_classes(path: Path) -> list[type]:
    module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
    all_of = [
        c
        for c in vars(module).values()
        if inspect.isclass(c)
        and issubclass(c, transformers.PreTrainedModel)
        and c.__module__ == module.__name__
        and c.config_class is not None
        and not re.search("PreTrainedModel$|Vision|Audio", c.__name__)
    ]
    has_text = any("Text" in c.config_class.__name__ for c in all_of)

    def rank(c: type) -> tuple[bool, int]:
        ending = next((i for i, e in enumerate(_ENDINGS) if c.__name__.endswith(e)), len(_ENDINGS))
        return has_text and "Text" not in c.config_class.__name__, ending

    return sorted(all_of, key=rank)


def small_config(config_class: type, family: str, **changes):
    aliases = getattr(config_class, "attribute_map", {})
    fields = {*config_class.__dataclass_fields__, *aliases}
    # an alias would overwrite what its field is changed to
    values = {name: value for name, value in SMALL.items() if name in fields and aliases.get(name) not in changes}
    if "kv_lora_rank" in fields:  # latent attention has as many keys as queries
        values["num_key_value_heads"] = 4
    return config_class(**{**values, **SPECIAL.get(family, {}), **changes})


def build_family(family: str, path: Path, **changes) -> Family:
    """The first of the family's model classes that holds experts. Weights are drawn so large that experts matter."""
    for cls in _model_classes(path):
        config = small_config(cls.config_class, family, **changes)
        with torch.device("meta"):
            size = sum(p.numel() for p in cls(config).parameters())
        assert size < 4e6, f"{cls.__name__} still has {size} parameters: shrink its configuration in SMALL or SPECIAL"
        model = cls(config)
        if any(adapter_of(m) for m in model.modules()):
            for p in model.parameters():
                if p.dim() > 1:
                    nn.init.normal_(p, std=p.shape[-1] ** -0.5)
            if hasattr(model, "set_experts_implementation"):
                model.set_experts_implementation("eager")
            return Family(family, path, model.train(), _inputs(model))
    raise AssertionError(f"{family}: no model class of {path.name} holds experts at its small size")


def _inputs(model: nn.Module) -> dict:
    takes = inspect.signature(model.forward).parameters
    if "pixel_values" in takes and "input_ids" not in takes:
        return {"pixel_values": torch.randn(3, 3, 32, 32), "dataset_index": torch.tensor([1, 0, 1])}
    ids = torch.randint(2, 64, (2, 7))
    inputs = {"input_ids": ids}
    if "decoder_input_ids" in takes:
        inputs["decoder_input_ids"] = torch.randint(2, 64, (2, 5))
    if "moe_mm_token_type_ids" in takes:
        inputs["moe_mm_token_type_ids"] = torch.randint(0, 2, (2, 7))
    if "labels" in takes:
        inputs["labels"] = inputs.get("decoder_input_ids", ids) % getattr(model, "num_labels", 64)
    return inputs


FAMILIES = families()


def pytest_generate_tests(metafunc):
    if "family_name" in metafunc.fixturenames:
        metafunc.parametrize("family_name", list(FAMILIES))


@pytest.fixture
def family(family_name) -> Family:
    torch.manual_seed(0)
    return build_family(family_name, FAMILIES[family_name])


@pytest.fixture
def build():
    """build(family name, **configuration) -> Family."""

    def make(name: str, **changes) -> Family:
        torch.manual_seed(0)
        return build_family(name, FAMILIES[name], **changes)

    return make


@pytest.fixture(autouse=True)
def _one_thread():
    """The order of torch's own sums depends on its threads, and some gradients here are what is left of large ones."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def families_on_meta():
    """Every family as (name, its experts classes, model without storage), built one after the other."""

    def each():
        for name, path in FAMILIES.items():
            with torch.device("meta"):
                yield name, experts_classes(path), build_family(name, path).model

    return each


@pytest.fixture
def assert_same_gradients(assert_close):
    """Parameter by parameter. Recurrent layers amplify rounding (scale); mere rounding does not count (floor)."""

    def check(got: dict, want: dict) -> None:
        floor = 1e-6 * max(g.abs().max() for g in want.values() if g is not None)
        assert got.keys() == want.keys()
        for name, g in want.items():
            assert (g is None) == (got[name] is None), name
            if g is not None and max(g.abs().max(), got[name].abs().max()) > floor:
                assert_close(got[name], g, scale=10, name=f"d {name}")

    return check


@pytest.fixture
def assert_same_step(assert_close, assert_same_gradients):
    """Two (loss, gradients by name) agree."""

    def check(got: tuple, want: tuple) -> None:
        assert_close(got[0], want[0], name="loss")
        assert_same_gradients(got[1], want[1])

    return check
