"""headgate.convert: a MoE model of transformers' own classes out of dense ones, layer by layer."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from ...placement.careful import Guard
from ..hf.conversion import conversion_of
from ..hf.pretrained import blank_of, fill_rest
from ..offload.arena import parse_size
from .dense import Dense, dense_models
from .families import TARGETS, config_for, target_of
from .methods import Copy, Granular, Merge, Method, Order, check_number
from .readme import Activations
from .recipe import Made, tensors
from .write import check_output, write

_WHO = "convert"
METHODS: dict[str, type] = {"copy": Copy, "granular": Granular, "activations": Activations, "merge": Merge}
Model = str | os.PathLike[str] | nn.Module
_NOWHERE = Path(os.devnull)


def convert(
    dense: Model | Sequence[Model],
    output: str | os.PathLike[str] | None = None,
    *,
    experts: int | None = None,
    top_k: int = 2,
    method: str | Method = "copy",
    to: str | None = None,
    layers: Sequence[int] | None = None,
    router_std: float | None = None,
    seed: int = 0,
    shard: str | int = "5GB",
    tell: Callable[[int, int], object] = lambda done, total: None,
    **options: Any,
) -> nn.Module | None:
    """A MoE model out of a dense one: transformers' MoE class of the same attention, which `from_pretrained` loads
    without Headgate.

    dense       a folder with a checkpoint, or a transformers model, of Llama, Mistral, Qwen2, Qwen3 or OLMo2; for
                method "merge" several, of one shape
    output      the folder to write, new or empty: config.json, safetensors files, and the tokenizer's files of the
                (first) folder. None: nothing is written, and the model is returned, in eval mode; it then shares the
                weights outside of its experts with a `dense` that is in memory
    experts     E (default: 8; for "merge" the number of models)
    top_k       K
    method      how experts are made: "copy", "granular", "activations", "merge", or an object of METHODS' classes;
                `options` are the class's own: `shards=8` for "granular", `noise=0.01`, `calibration=ids`
    to          the class, where there is a choice: "mixtral", "qwen2_moe", "qwen3_moe", "flex_olmo"
    layers      which get experts (default: all); the others stay dense, which Mixtral and FlexOlmo have not
    router_std  of new router weights (default: the config's initializer_range). 0: all experts tie
    shard       most bytes of a file
    tell        called after each tensor with how many are done, and of how many

    Router weights of a token sum to 1 in the new model. Tensors are made one by one: beside Python, torch and
    transformers memory is one layer's FFN, a copy of one matrix, and what the method says. A folder is whole or not
    there; what a killed process left goes with the next call.

    Raises ValueError / TypeError naming argument, rule and value, OSError where a file is missing or the disk has no
    room: all this before anything is written.

    >>> headgate.convert("/models/Llama-3.2-1B", "/models/Llama-8x1B", experts=8, top_k=2)
    >>> moe = headgate.convert(model, experts=64, top_k=8, method="granular", shards=8)
    """
    how = _method(method, options)
    some = [dense] if isinstance(dense, str | os.PathLike | nn.Module) else list(dense)
    if not some:
        raise ValueError(f"{_WHO}: dense must be at least one model, got none")
    most = parse_size(shard, f"{_WHO}: shard")
    check_number("router_std", 0 if router_std is None else router_std)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"{_WHO}: seed must be a whole number in 0 .. 2**63 - 1, got {seed!r}")
    to_folder = None if output is None else Path(output)
    if experts is None:
        experts = len(some) if isinstance(how, Merge) else 8
    _check_choice(experts, top_k)
    if to_folder is not None:
        check_output(to_folder, [])
    with dense_models(some) as models:
        first = models[0]
        sparse = _sparse(layers, first.layers)
        kind = target_of(first.config, to, None if len(sparse) == first.layers else sparse)
        recipe = how.recipe(models, Order(experts, top_k, sparse, seed, router_std))
        config = config_for(first.config, kind, experts, top_k, recipe.width, sparse)
        if first.folder is None:
            config.dtype = first.model.dtype  # its own config says what it was before a cast
        made = tensors(models, recipe, TARGETS[kind], sparse, experts)
        if to_folder is None:
            return _built(first, config, made, tell)
        check_output(to_folder, made)
        write(to_folder, config, made, first.folder, most, tell)
    return None


def _built(dense: Dense, config: Any, made: Sequence[Made], tell: Callable[[int, int], object]) -> nn.Module:
    """The model in memory."""
    by_key = {one.key: one for one in made}
    where = dense.folder or _NOWHERE
    model: Any = blank_of(config, where, made[0].dtype, Guard(where, _WHO))
    fill_rest(model, conversion_of(model, by_key), by_key, lambda key: by_key[key].make(), set(), tell)
    model.config.name_or_path = dense.config.name_or_path
    theirs: Any = dense.model
    if dense.folder is None and theirs.can_generate():
        model.generation_config = theirs.generation_config
    return model


def _method(method: str | Method, options: dict[str, Any]) -> Method:
    if not isinstance(method, str):
        if not isinstance(method, tuple(METHODS.values())):
            raise TypeError(f"{_WHO}: method must be one of {', '.join(METHODS)}, got a {type(method).__name__}")
        if options:
            raise ValueError(f"{_WHO}: options must stand in the method's object, got {', '.join(options)} beside it")
        return method
    if method not in METHODS:
        raise ValueError(f"{_WHO}: method must be one of {', '.join(METHODS)}, got {method!r}")
    known = [f.name for f in fields(METHODS[method])]
    odd = sorted(options.keys() - set(known))
    if odd:
        takes = f"those of {method!r} ({', '.join(known) or 'none'})"
        raise TypeError(f"{_WHO}: options must be {takes}, got {', '.join(odd)}")
    return METHODS[method](**options)


def _check_choice(experts: int, top_k: int) -> None:
    for name, value in (("experts", experts), ("top_k", top_k)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{_WHO}: {name} must be a whole number of at least 1, got {value!r}")
    if experts > 65536:
        raise ValueError(f"{_WHO}: experts must be at most 65536, got {experts}")
    if top_k > experts:
        raise ValueError(f"{_WHO}: top_k must be at most experts ({experts}), got {top_k}")


def _sparse(layers: Sequence[int] | None, count: int) -> list[int]:
    if layers is None:
        return list(range(count))
    found = list(layers)
    if not found or len(set(found)) != len(found) or any(type(i) is not int or not 0 <= i < count for i in found):
        raise ValueError(f"{_WHO}: layers must be different numbers in 0 .. {count - 1}, at least one, got {found}")
    return sorted(found)
