"""PEFT's LoRA on the stacked weights of experts (`target_parameters`): which adapter is on which parameter.

A `ParamWrapper` stands around the experts module and makes the weight a computed one, base + scaling * B A, for the time
of a call. It is known here by what it has: PEFT itself is not imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


def wrappers_in(model: nn.Module) -> Iterator[tuple[str, Any, nn.Module]]:
    """(name, wrapper, the experts module inside) of each wrapper in a model; of several around one, outermost first."""
    for name, module in model.named_modules():
        if all(hasattr(module, attribute) for attribute in ("parameter_name", "get_base_layer", "lora_A", "lora_B")):
            yield name, module, module.get_base_layer()


def computing(model: nn.Module, experts: nn.Module) -> str | None:
    """The name of a parameter of `experts` that an adapter will compute in the next call, or None."""
    for _, wrapper, inside in wrappers_in(model):
        idle = wrapper.disable_adapters or wrapper.merged
        if inside is experts and not idle and any(adapter in wrapper.lora_A for adapter in wrapper.active_adapters):
            return wrapper.parameter_name
    return None
