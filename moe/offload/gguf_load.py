"""A GGUF file as `load` sees it: the model without a weight, its experts in the file, and what fills the rest."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...placement.careful import Guard
from ..hf import swap
from ..hf.conversion import Conversion
from ..hf.gguf_names import EMBEDDING, Dense, check_architecture, config_of
from ..hf.pretrained import Tell, blank_of, config_in, fill_rest, missing_of
from .forms import Found, survey
from .gguf_experts import DTYPE_OF, Stored, say_widened, stored_of, tensor_of
from .gguf_file import Gguf

_WHO = "load"
_WRONG = "load: config must be a folder with config.json, a transformers config or None"


@dataclass(frozen=True)
class GgufModel:
    """The model on the meta device, swapped; its experts modules `found` and `skipped`; each one's experts `stored`;
    `fill` reads all the rest."""

    model: nn.Module
    found: Found
    skipped: Mapping[str, str]
    stored: list[Stored]
    fill: Callable[[Tell], None]


def model_in(gguf: Gguf, config: Any) -> GgufModel:
    """`config`: a folder with config.json, a transformers config, or None: the file's own metadata. Raises ValueError
    where file and config do not go together, before a weight is read."""
    guard = Guard(gguf.path, _WHO)
    check_architecture(guard, gguf.architecture)
    guard.rule(EMBEDDING in gguf.tensors, "tensors", f"there for each weight, {EMBEDDING} too", "none")
    config, path = _config(gguf, guard, config)
    with guard.watched("those of a model", "sizes"):
        model = blank_of(config, path, _dtype_of(gguf), guard)
    swap.replace(model)
    found, skipped = survey(model)
    found = [(name, module, replace(form, straight=True)) for name, module, form in found]
    dtype: torch.dtype = model.dtype  # type: ignore[assignment]
    stored = [stored_of(gguf, name, module, form, dtype) for name, module, form in found]
    left = {f"{name}.{theirs}" for name, _, form in found for theirs in form.names.values()}
    dense = Dense(guard, gguf.architecture, model, gguf.tensors, left)
    experts = set().union(*(one.keys for one in stored))
    dense.check_rest(gguf.tensors.keys() - experts)
    dense.check_shapes({key: t.shape for key, t in gguf.tensors.items()})
    conversion = Conversion({}, left | set(dense.names), [])
    missing = missing_of(model, conversion)
    guard.rule(not missing, "tensors", "there for each weight", f"none for {', '.join(missing[:2])}")
    say_widened(gguf, set().union(*(one.widened for one in stored)), dtype)
    types = {name: t.dtype for name, t in model.state_dict().items()}

    def read(name: str) -> Tensor:
        return dense.value(name, [tensor_of(gguf, key, types[name]) for key in dense.names[name]])

    def fill(tell: Tell) -> None:
        fill_rest(model, conversion, dense.names, read, left, tell)

    return GgufModel(model, found, skipped, stored, fill)


def _config(gguf: Gguf, guard: Guard, config: Any) -> tuple[Any, Path]:
    """The config, and where it comes from."""
    from transformers import PreTrainedConfig

    if config is None:
        shapes = {name: t.shape for name, t in gguf.tensors.items()}
        return config_of(guard, gguf.architecture, gguf.metadata, shapes), gguf.path
    if isinstance(config, str | os.PathLike):
        folder = Path(config)
        if not folder.is_dir():
            raise ValueError(
                f"load: config must be a folder with config.json, a transformers config or None, got {folder}"
            )
        found, path = config_in(folder), folder
    elif isinstance(config, PreTrainedConfig):
        found, path = copy.deepcopy(config), gguf.path
    else:
        raise TypeError(f"{_WRONG}, got a {type(config).__name__}")
    if getattr(found, "quantization_config", None) is not None:  # of the weights that the GGUF file was made of
        del found.quantization_config
    return found, path


def _dtype_of(gguf: Gguf) -> torch.dtype:
    """That of the experts where they are numbers, else bf16: for a model whose config says none."""
    types = {t.type for name, t in gguf.tensors.items() if "_exps.weight" in name}
    (one,) = types if len(types) == 1 else ("",)
    found = DTYPE_OF.get(one, torch.bfloat16)
    return found if found.is_floating_point and found.itemsize < 8 else torch.bfloat16
