"""Every MoE family of the installed transformers, found in its sources and built small.

A family is a model folder whose modeling file has a class under `@use_experts_implementation`, one that our table
names, or one called ...Experts. No list of families is kept: a new one is built by the same rules and fails here until
it works.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import math
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from small_configs import small_values, smaller
from torch import nn

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

from headgate.moe.hf.table import ADAPTERS, adapter_of  # noqa: E402

# What no configuration class says: kinds of layers without a default, and where a test wants more than the default.
SPECIAL = {
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 8, "moe_top_k": 2},
    },
    "doge": {"num_experts": 16},  # product keys: a square number
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"]},
    "llama4": {"num_experts_per_tok": 2},
}
_LIMIT = 4e6  # parameters of a small model
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


def small_config(model_class: type, family: str, path: Path, **changes):
    """A configuration with which the model has few parameters. Raises ValueError where no rule leads there."""
    changes = {"sections": "mrope_section" in path.read_text(encoding="utf-8"), **SPECIAL.get(family, {}), **changes}
    while True:
        config = model_class.config_class(**small_values(model_class.config_class, **changes))
        with torch.device("meta"):
            shapes = [tuple(p.shape) for p in model_class(copy.deepcopy(config)).parameters()]
        size, largest = sum(map(math.prod, shapes)), max(shapes, key=math.prod)
        if size < _LIMIT:
            return config
        fields = {name: to for name, to in smaller(config, largest).items() if name not in changes}
        if not fields:
            raise ValueError(f"{model_class.__name__} has {size} parameters, one of {largest}: see small_configs.py")
        changes |= fields


def build_family(family: str, path: Path, **changes) -> Family:
    """The first of the family's model classes that holds experts. Weights are drawn so large that experts matter."""
    for cls in _model_classes(path):
        model = cls(small_config(cls, family, path, **changes))
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


def kinds(path: Path) -> set[str]:
    """What tells a modeling file's experts from others': the adapters' classes, or the flags of the decorator."""
    text = path.read_text(encoding="utf-8")
    flags = re.findall(r"^@use_experts_implementation(.*)\n", text, re.M)
    return {*flags, *(c for c in experts_classes(path) if c in ADAPTERS)}


def one_of_each_kind() -> set[str]:
    """The first family of each kind: these run in every role in `make test`, the others in `make test-all`."""
    chosen, seen = set(), set()
    for name, path in FAMILIES.items():
        if new := kinds(path) - seen:
            chosen.add(name)
            seen |= new
    return chosen


def pytest_generate_tests(metafunc):
    """`family`: the first family of each kind, the others marked slow; `each_family`: all of them, none marked."""
    if "each_family" in metafunc.fixturenames:
        metafunc.parametrize("family_name", list(FAMILIES))
    elif "family_name" in metafunc.fixturenames:
        quick = one_of_each_kind()
        marked = [pytest.param(n, marks=() if n in quick else pytest.mark.slow) for n in FAMILIES]
        metafunc.parametrize("family_name", marked)


@cache
def _built(name: str) -> Family:
    torch.manual_seed(0)
    return build_family(name, FAMILIES[name])


def _own(name: str) -> Family:
    """The family with a model of the test's own, copied from the one that was built once."""
    kept = _built(name)
    torch.manual_seed(0)
    return Family(name, kept.path, kept.clone(), {n: t.clone() for n, t in kept.inputs.items()})


@pytest.fixture
def family(family_name) -> Family:
    return _own(family_name)


@pytest.fixture
def each_family(family_name) -> Family:
    return _own(family_name)


@pytest.fixture
def build():
    """build(family name, **configuration) -> Family."""

    def make(name: str, **changes) -> Family:
        if not changes:
            return _own(name)
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
