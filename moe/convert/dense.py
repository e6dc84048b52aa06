"""A dense decoder as `convert` reads it: its config, and its parameters one by one, from files or from memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..hf.conversion import conversion_of
from ..hf.pretrained import blank_model, config_in, missing_of, quantization_in
from ..offload.checkpoint import Checkpoint
from ..offload.reads import DTYPES
from .families import check_dense

_WHO = "convert"
FFN = ("gate_proj", "up_proj", "down_proj")


class Dense:
    """`config`; `shapes`: of each parameter by the name it has in the model, in the model's order; `dtypes` of them;
    `folder`: where it lies, None for one in memory; `model`: on the meta device where it lies in files; `device`: of
    what `read` gives."""

    device = torch.device("cpu")

    def __init__(self, model: nn.Module, dtypes: Mapping[str, torch.dtype], folder: Path | None) -> None:
        m: Any = model
        self.model, self.config, self.folder = model, m.config, folder
        tied = set(m.all_tied_weights_keys)
        self.shapes = {n: t.shape for n, t in model.state_dict().items() if n not in tied and n in dtypes}
        self.dtypes = dict(dtypes)

    def read(self, name: str) -> Tensor:
        raise NotImplementedError

    def close(self) -> None:
        """Lets go of files."""

    @property
    def layers(self) -> int:
        return self.config.num_hidden_layers

    @property
    def width(self) -> int:
        """F."""
        return self.config.intermediate_size

    def ffn(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Gate [F, D], up [F, D] and down [D, F] of a layer."""
        gate, up, down = (self.read(f"{mlp(layer)}.{part}.weight") for part in FFN)
        return gate, up, down


def mlp(layer: int) -> str:
    return f"model.layers.{layer}.mlp"


class InMemory(Dense):
    def __init__(self, model: nn.Module) -> None:
        config = getattr(model, "config", None)
        if config is None or not hasattr(model, "all_tied_weights_keys"):
            raise TypeError(f"{_WHO}: dense must be a folder or a transformers model, got a {type(model).__name__}")
        check_dense(config)
        self.state = model.state_dict()
        self.device = next(iter(self.state.values())).device
        if not any(name.startswith("model.layers.") for name in self.state):
            raise ValueError(f"{_WHO}: dense must be a model for causal language, got a {type(model).__name__}")
        if model.get_output_embeddings() is None:  # type: ignore[operator]
            raise ValueError(f"{_WHO}: dense must be a model for causal language, got a {type(model).__name__}")
        absent = next((name for name, t in self.state.items() if t.is_meta), None)
        if absent is not None:
            raise ValueError(f"{_WHO}: dense must have its weights, got {absent} on the meta device")
        super().__init__(model, {name: t.dtype for name, t in self.state.items()}, None)

    def read(self, name: str) -> Tensor:
        return self.state[name]


class InFiles(Dense):
    """Raises OSError and ValueError where a file is missing or is not what it should be."""

    def __init__(self, folder: Path) -> None:
        if folder.is_dir():
            if quantization_in(folder) is not None:
                raise ValueError(f"{_WHO}: dense must have its weights as they were trained, got {folder} in few bits")
            check_dense(config_in(folder))
        self.checkpoint = Checkpoint(folder)
        try:
            kinds = [DTYPES[t.dtype] for t in self.checkpoint.tensors.values()]
            model = blank_model(folder, next((d for d in kinds if d.is_floating_point), None))
            conversion = conversion_of(model, self.checkpoint.tensors)
            missing = missing_of(model, conversion)
            if missing:
                rule = "hold all weights of its config's model"
                raise ValueError(
                    f"{_WHO}: dense must {rule}, got {folder} without {missing[0]} and {len(missing)} in all"
                )
            self._keys = {name: next(iter(s.keys.values()))[0] for name, s in conversion.sources.items()}
            stored = {name: self.checkpoint.tensors[key] for name, key in self._keys.items()}
            for name, parameter in model.state_dict().items():
                if name in stored and stored[name].shape != tuple(parameter.shape):
                    shapes = f"{list(parameter.shape)}, as its config says, got {list(stored[name].shape)}"
                    raise ValueError(f"{_WHO}: {name} of {folder} must be {shapes}")
            super().__init__(model, {name: DTYPES[one.dtype] for name, one in stored.items()}, folder)
        except BaseException:
            self.close()
            raise

    def read(self, name: str) -> Tensor:
        return self.checkpoint.read(self._keys[name])

    def close(self) -> None:
        self.checkpoint.close()


@contextmanager
def dense_models(some: list[str | os.PathLike[str] | nn.Module]):
    """The models, open for the length of a `with`."""
    found: list[Dense] = []
    try:
        for one in some:
            found.append(InMemory(one) if isinstance(one, nn.Module) else InFiles(Path(one)))
        yield found
    finally:
        for model in found:
            model.close()
