"""Which tensors of a checkpoint make up which parameter, as transformers' own conversion mapping says."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass
class Source:
    """What a parameter is made of: keys of the checkpoint by pattern, in order, and the operations that join them.

    `patterns`: in the order in which an operation takes them. No operation: the one tensor as it lies.
    """

    patterns: list[str]
    operations: list[Any]
    keys: dict[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        return ", ".join(f"{len(keys)} of {pattern}" for pattern, keys in self.keys.items())


@dataclass(frozen=True)
class Conversion:
    """`sources`: parameter -> what it is made of; of several parameters that are made together, only the first is
    named. `made`: all parameters that come out. `mapping`: transformers' transforms."""

    sources: dict[str, Source]
    made: set[str]
    mapping: list[Any]


def conversion_of(model: nn.Module, keys: Iterable[str]) -> Conversion:
    """What becomes of the keys of a checkpoint in `model`. Those that have no place in it are left out."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    m: Any = model
    mapping = get_model_conversion_mapping(m)
    renamings = [t for t in mapping if isinstance(t, WeightRenaming)]
    converters = [t for t in mapping if isinstance(t, WeightConverter)]
    by_pattern = {pattern: t for t in converters for pattern in t.source_patterns}
    names, prefix = model.state_dict(), m.base_model_prefix
    sources: dict[str, Source] = {}
    made: set[str] = set()
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, names)
        if name not in names and key in names:
            name, pattern = rename_source_key(key, [], [], prefix, names)
        if name not in names:
            continue
        converter = None if pattern is None else by_pattern[pattern]
        if converter is None:
            source = sources.setdefault(name, Source([key], []))
            made.add(name)
        else:
            source = sources.setdefault(name, Source(list(converter.source_patterns), list(converter.operations)))
            made |= {name.replace(converter.target_patterns[0], t, 1) for t in converter.target_patterns}
        source.keys.setdefault(pattern or key, []).append(key)
    return Conversion(sources, made, mapping)
