"""A transformers model from a folder, in two steps: without any weight first, then with those that are asked for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...placement.careful import Guard, opened
from .conversion import Conversion

_WHO = "load"
Tell = Callable[[int, int], object]  # how many are done, and of how many
QUANTIZATION = ("quantization_config", "compression_config")  # names in config.json
_AUTO = (  # the first that knows a configuration builds its model
    "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForSeq2SeqLM", "AutoModelForTokenClassification",
    "AutoModel",
)  # fmt: skip


def blank_model(folder: Path, dtype: torch.dtype | None) -> nn.Module:
    """The model that config.json of a folder describes, all of it on the meta device, in the config's dtype or else in
    `dtype`, in no few bits. No code from the folder runs.

    Raises OSError and ValueError where config.json is not what it should be.
    """
    config = config_in(folder)
    for one in (config, config.get_text_config()):
        for name in QUANTIZATION:
            vars(one).pop(name, None)
    return blank_of(config, folder, dtype, Guard(folder / "config.json", _WHO))


def quantization_in(folder: Path) -> Any:
    """What config.json of a folder says of weights in few bits; None where it says nothing. Raises as `blank_model`."""
    with opened(folder / "config.json", _WHO) as file:
        said = file.json()
        file.rule(isinstance(said, dict), "config", "an object", type(said).__name__)
    text = said.get("text_config")
    some = [one[name] for one in (said, text) if isinstance(one, dict) for name in QUANTIZATION if name in one]
    return next((one for one in some if one is not None), None)


def config_in(folder: Path) -> Any:
    """The transformers config of a folder. Raises as `blank_model`."""
    import transformers

    with opened(folder / "config.json", _WHO) as file:
        said = file.json()
        file.rule(isinstance(said, dict), "config", "an object", type(said).__name__)
    return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def blank_of(config: Any, path: Path, dtype: torch.dtype | None, guard: Guard) -> nn.Module:
    """The model of a config, all of it on the meta device. `path`: where it comes from; `guard`: of what says so."""
    import transformers
    from transformers.initialization import no_init_weights

    for auto in (getattr(transformers, name) for name in _AUTO):
        if type(config) in auto._model_mapping:
            with torch.device("meta"), no_init_weights():
                model = auto.from_config(config, dtype=config.dtype or dtype, trust_remote_code=False)
            model.config.name_or_path = str(path)
            return model
    rule = "that of a model of the installed transformers"
    raise guard.refusal("model_type", rule, config.model_type)


def missing_of(model: nn.Module, conversion: Conversion) -> list[str]:
    """Parameters and buffers that a checkpoint must have and has not."""
    m: Any = model
    ties = m.all_tied_weights_keys
    tied = set(ties) | {source for target, source in ties.items() if target in conversion.made}
    optional = [re.compile(pattern) for pattern in m._keys_to_ignore_on_load_missing or ()]
    names = [name for name in m.state_dict() if name not in conversion.made and name not in tied]
    return [name for name in names if not any(pattern.search(name) for pattern in optional)]


class _Lazy:
    """A tensor of the checkpoint, read when transformers takes it."""

    def __init__(self, read: Callable[[], Tensor]) -> None:
        self._read = read

    def __getitem__(self, _: object) -> Tensor:
        return self._read()


def fill_rest(
    model: nn.Module,
    conversion: Conversion,
    keys: Iterable[str],
    read: Callable[[str], Tensor],
    left: set[str],
    tell: Tell = lambda done, total: None,
) -> None:
    """Real weights and buffers for all of a model but the parameters `left` out, which stay on the meta device: from
    `keys` of the checkpoint, as from_pretrained does it (ties, buffers that no checkpoint has). `tell`: called after
    each with how many are read, and of how many."""
    from transformers import GenerationConfig
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    m: Any = model
    folder, dtype = m.config.name_or_path, m.dtype
    plan = LoadStateDictConfig(
        pretrained_model_name_or_path=folder,
        dtype=dtype,
        dtype_plan=m._get_dtype_plan(dtype),
        weight_mapping=conversion.mapping,
    )
    keys = list(keys)
    done = count(1)

    def one(key: str) -> Tensor:
        tensor = read(key)
        tell(next(done), len(keys))
        return tensor

    lazy = {key: _Lazy(lambda key=key: one(key)) for key in keys}  # type: ignore[misc]
    info, _ = convert_and_load_state_dict_in_model(m, lazy, plan)
    info.missing_keys -= left
    for name in left:
        m.get_parameter(name)._is_hf_initialized = True
    m._finalize_model_loading(m, plan, info)
    m.eval()
    if m.can_generate() and (Path(folder) / "generation_config.json").exists():
        m.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
