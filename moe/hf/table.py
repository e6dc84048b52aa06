"""Which adapter takes which module.

A new family needs a line here only if transformers gave it no experts interface."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from . import dbrx, dicts, doge, experts, fp8, jetmoe, llama4, longcat


def _never(_module: nn.Module) -> None:
    return None


def _modules(_module: nn.Module) -> str:
    return "each expert's own module on its rows"


@dataclass(frozen=True)
class Adapter:
    """`forward(module, ...)` stands in for the module's own. `refusal` says why a module cannot be taken (or None),
    `prepare` what will run. `helper`: the forward of a block that only calls its experts another way, not counted.
    `block`: the class of the helper without which these experts are not called at the boundary."""

    forward: Callable[..., Any]
    prepare: Callable[[nn.Module], str]
    refusal: Callable[[nn.Module], str | None] = _never
    helper: bool = False
    block: str | None = None


# By class, for the families outside transformers' experts interface. A subclass (a parametrised class too) is taken
# as its ancestor is.
ADAPTERS = {
    "DbrxExperts": Adapter(dbrx.dbrx_forward, dbrx.prepare),
    "DogeCDMoE": Adapter(doge.doge_forward, doge.prepare),
    "JetMoeParallelExperts": Adapter(jetmoe.parallel_experts_forward, jetmoe.prepare),
    "Llama4TextExperts": Adapter(llama4.experts_forward, llama4.prepare, experts.refusal, block="Llama4TextMoe"),
    "Llama4TextMoe": Adapter(llama4.block_forward, lambda _m: "hands its experts the choice", helper=True),
    "LongcatFlashExperts": Adapter(longcat.longcat_forward, longcat.prepare),
    "NllbMoeExperts": Adapter(dicts.nllb_forward, _modules),
    "Step3p7Experts": Adapter(experts.experts_forward, experts.prepare, experts.refusal),
    "SwitchTransformersExperts": Adapter(dicts.switch_forward, _modules),
    "VitPoseNaiveMoe": Adapter(dicts.vitpose_forward, _modules),
}
DECORATED = Adapter(experts.experts_forward, experts.prepare, experts.refusal)
FP8 = Adapter(fp8.fp8_experts_forward, fp8.prepare, fp8.refusal)


def adapter_of(module: nn.Module) -> Adapter | None:
    """The adapter that takes `module`, or None."""
    if fp8.matches(module):
        return FP8
    for cls in type(module).__mro__:
        if cls.__name__ in ADAPTERS:
            return ADAPTERS[cls.__name__]
    return DECORATED if experts.is_decorated(module) else None


def looks_like_experts(module: nn.Module) -> bool:
    """Whether a module that no adapter takes still seems to hold routed experts, so that a report must name it."""
    name = type(module).__name__
    if "Shared" in name:
        return False
    held = getattr(module, "experts", None)
    return name.endswith("Experts") or (isinstance(held, nn.ModuleList | nn.ModuleDict) and len(held) > 1)
