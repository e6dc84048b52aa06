"""PEFT's own files of a LoRA on experts: adapter_config.json with target_parameters, and adapter_model.safetensors.

PEFT wraps an experts module once for each parameter that it changes, in the module's order of parameters: the last is
outermost, and each one further in has `base_layer` more in its keys, which do not name the parameter. Gate and up come
first in every family; PEFT itself changes the order of a module that it has computed with, so that shapes tell. Both
matrices are flat there: A [E * r, in], a block of r rows for each expert, and B [out, r * E], of which column i * E + e
is expert e's i-th. `in` and `out` are what the weight takes and gives, whichever way it is stored (PEFT 0.21,
ParamWrapper).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...placement.careful import Guard, opened
from ...placement.files import write_whole
from ..offload.checkpoint import Checkpoint

if TYPE_CHECKING:
    from .attached import ExpertLora, Target

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
FLOATING = ("F32", "F16", "BF16", "F64")  # safetensors' names
_WHO = "load_lora"
# what changes a LoRA's meaning, and what it must be for ours
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none", None), "fan_in_fan_out": (False, None), "use_dora": (False, None), "lora_bias": (False, None),
    "modules_to_save": (None, []), "rank_pattern": ({}, None), "alpha_pattern": ({}, None),
    "layer_replication": (None,), "use_qalora": (False, None), "use_bdlora": (None, False), "velora_config": (None,),
    "kasa_config": (None,), "alora_invocation_tokens": (None,), "arrow_config": (None,),
    "trainable_token_indices": (None,),
}  # fmt: skip


@dataclass(frozen=True)
class Adapter:
    """What adapter_config.json says: scale is alpha / rank, or alpha / sqrt(rank) with `rslora`."""

    rank: int
    alpha: float
    rslora: bool


Values = dict[str, dict[str, tuple[Tensor, Tensor]]]  # layer -> target -> (A [E, r, in], B [E, out, r])


def write_adapter(
    folder: str | os.PathLike[str],
    adapter: Adapter,
    layers: Mapping[str, ExpertLora],
    parameters: Sequence[str],
) -> None:
    """`parameters`: the names of all of the model's."""
    from safetensors.torch import save  # a user of transformers or PEFT has it

    tensors: dict[str, Tensor] = {}
    full = []
    for name, one in layers.items():
        for depth, (target, about) in enumerate(reversed(one.targets.items())):
            a, b = (t.detach().cpu() for t in one.factors(target))
            key = f"{PREFIX}{name}{'.base_layer' * depth}"
            tensors[f"{key}.lora_A.weight"] = a.flatten(0, 1).contiguous()
            tensors[f"{key}.lora_B.weight"] = b.permute(1, 2, 0).flatten(1).contiguous()
            full.append(f"{name}.{about.parameter}")
    ends = sorted({".".join(key.split(".")[-2:]) for key in full})
    matched = [p for p in parameters if any(p.endswith(f".{end}") for end in ends)]
    said = {
        "peft_type": "LORA", "r": adapter.rank, "lora_alpha": adapter.alpha, "lora_dropout": 0.0, "bias": "none",
        "use_rslora": adapter.rslora, "target_modules": [], "inference_mode": True, "task_type": None,
        "target_parameters": ends if set(matched) == set(full) else sorted(full),
    }  # fmt: skip
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    write_whole(path / WEIGHTS, lambda file: file.write(save(tensors, {"format": "pt"})))
    text = json.dumps(said, indent=2, sort_keys=True) + "\n"
    write_whole(path / CONFIG, lambda file: file.write(text.encode()))


def read_adapter(
    folder: str | os.PathLike[str],
    sizes: Mapping[str, Mapping[str, Target]],
) -> tuple[Adapter, Values]:
    """`sizes`: the weights that can be changed, layer -> target -> Target. Raises ValueError, in at most 300
    characters, where the files are not PEFT's or do not fit these."""
    path = Path(folder)
    adapter, wanted = _config(path / CONFIG, sizes)
    guard = Guard(path / WEIGHTS, _WHO)
    file = Checkpoint(path, single=WEIGHTS, who=_WHO)
    try:
        left = set(file.tensors)
        values: Values = {}
        for name, targets in wanted.items():
            _check_rank(guard, file, name, [sizes[name][t] for t in targets], adapter.rank)
            outer = targets[::-1]
            outermost = tuple(file.tensors.get(f"{PREFIX}{name}.lora_{x}.weight") for x in "AB")
            stored = tuple(t and tuple(t.shape) for t in outermost)
            first, last = (_shapes(sizes[name][t], adapter.rank) for t in (outer[0], outer[-1]))
            if stored != first and stored == last:
                outer = targets
            for depth, target in enumerate(outer):
                about, key = sizes[name][target], f"{PREFIX}{name}{'.base_layer' * depth}"
                keys = f"{key}.lora_A.weight", f"{key}.lora_B.weight"
                for k, shape in zip(keys, _shapes(about, adapter.rank), strict=True):
                    guard.rule(k in left, k, f"there, as target_parameters says in {CONFIG}", "none")
                    there = file.tensors[k]
                    turned = tuple(there.shape) in _shapes_turned(about, adapter.rank)
                    rule = f"{list(shape)}, by {CONFIG} [E*r, in] or [out, r*E] of {about.parameter}"
                    got = f"{list(there.shape)}" + (" (in and out have changed places)" if turned else "")
                    guard.rule(tuple(there.shape) == shape, k, rule, got)
                    guard.rule(there.dtype in FLOATING, k, "floating point", there.dtype)
                    left.discard(k)
                a, b = (file.read(k) for k in keys)
                values.setdefault(name, {})[target] = (
                    a.unflatten(0, (about.experts, -1)),
                    b.unflatten(1, (-1, about.experts)).permute(2, 0, 1),
                )
        guard.rule(not left, "tensors", f"those of the experts in target_parameters of {CONFIG}", sorted(left)[:1])
    finally:
        file.close()
    return adapter, values


def _check_rank(guard: Guard, file: Checkpoint, name: str, targets: Sequence[Target], rank: int) -> None:
    """The configuration's r is the matrices' own. What else is wrong with them is told with their shapes."""
    pair = tuple(file.tensors.get(f"{PREFIX}{name}.lora_{x}.weight") for x in "AB")
    if pair[0] is None or pair[1] is None or not pair[0].shape:
        return
    stored, experts = tuple(tuple(t.shape) for t in pair if t), targets[0].experts
    own = pair[0].shape[0] // experts
    if own != rank and any(stored == _shapes(about, own) for about in targets):
        rule = f"{own}, as of the {experts} experts in {WEIGHTS}"
        raise Guard(guard.path.with_name(CONFIG), _WHO).refusal("r", rule, rank)


def _shapes(about: Target, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    return (about.experts * rank, about.fan_in), (about.fan_out, rank * about.experts)


def _shapes_turned(about: Target, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """As PEFT before 0.18 read weights [E, out, in]."""
    return (about.experts * rank, about.fan_out), (about.fan_in, rank * about.experts)


def _config(path: Path, sizes: Mapping[str, Mapping[str, Target]]) -> tuple[Adapter, dict[str, list[str]]]:
    """What the file says, and which targets of which layers it changes."""
    with opened(path, _WHO) as file:
        said = file.json("PEFT's configuration")
        file.rule(isinstance(said, dict), "the file", "a JSON object", type(said).__name__)
        file.rule(said.get("peft_type") == "LORA", "peft_type", '"LORA"', said.get("peft_type"))
        for key, plain in _PLAIN.items():
            file.rule(said.get(key) in plain, key, f"{plain[0]!r}, or absent", said.get(key))
        targets = said.get("target_modules")
        rule = "empty: LoRA on experts only (PEFT reads the rest)"
        file.rule(targets in (None, [], ""), "target_modules", rule, targets)
        rank, alpha, rslora = said.get("r"), said.get("lora_alpha", 8), said.get("use_rslora", False)
        file.rule(type(rank) is int and 1 <= rank <= 1 << 20, "r", "a whole number of at least 1", rank)
        file.rule(type(alpha) in (int, float) and 0 < alpha < 1e30, "lora_alpha", "a positive number", alpha)
        file.rule(type(rslora) is bool, "use_rslora", "true or false", rslora)
        names = said.get("target_parameters")
        listed = isinstance(names, list) and all(isinstance(n, str) and n for n in names) and names
        file.rule(bool(listed), "target_parameters", "a list of parameters' names", names)
        wanted: dict[str, list[str]] = {}
        met = set()
        for layer, targets_there in sizes.items():
            for target, about in targets_there.items():
                key = f"{layer}.{about.parameter}"
                found = [n for n in names if key == n or key.endswith(f".{n}")]
                met |= set(found)
                if found:
                    wanted.setdefault(layer, []).append(target)
        for n in names:
            file.rule(n in met, "target_parameters", f"of the model's experts, as {_example(sizes)}", n)
        return Adapter(rank, alpha, rslora), wanted


def _example(sizes: Mapping[str, Mapping[str, Target]]) -> str:
    layer, targets = next(iter(sizes.items()))
    return f"{layer}.{next(iter(targets.values())).parameter}"
