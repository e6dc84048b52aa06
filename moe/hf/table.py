"""Which adapter takes which module, and where a module says which experts its tokens go to.

A new family needs a line here only if transformers gave it no experts interface."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..experts import Experts
from . import dbrx, dicts, doge, experts, fp8, jetmoe, llama4, longcat


def _never(_module: nn.Module) -> None:
    return None


def _modules(_module: nn.Module) -> str:
    return "each expert's own module on its rows"


@dataclass(frozen=True)
class Adapter:
    """`forward(module, ...)` stands in for the module's own. `refusal` says why a module cannot be taken (or None),
    `prepare` what will run. `helper`: the forward of a block that only calls its experts another way, not counted.
    `block`: the class of the helper without which these experts are not called at the boundary. `skips`: it is called
    with the ids and weights of each token, and an id of -1 is no expert."""

    forward: Callable[..., Any]
    prepare: Callable[[nn.Module], str]
    refusal: Callable[[nn.Module], str | None] = _never
    helper: bool = False
    block: str | None = None
    skips: bool = False


# By class, for the families outside transformers' experts interface. A subclass (a parametrised class too) is taken
# as its ancestor is.
ADAPTERS = {
    "DbrxExperts": Adapter(dbrx.dbrx_forward, dbrx.prepare, skips=True),
    "DogeCDMoE": Adapter(doge.doge_forward, doge.prepare),
    "JetMoeParallelExperts": Adapter(jetmoe.parallel_experts_forward, jetmoe.prepare),
    "Llama4TextExperts": Adapter(
        llama4.experts_forward, llama4.prepare, experts.refusal, block="Llama4TextMoe", skips=True
    ),
    "Llama4TextMoe": Adapter(llama4.block_forward, lambda _m: "hands its experts the choice", helper=True),
    "LongcatFlashExperts": Adapter(longcat.longcat_forward, longcat.prepare, skips=True),
    "NllbMoeExperts": Adapter(dicts.nllb_forward, _modules),
    "Step3p7Experts": Adapter(experts.experts_forward, experts.prepare, experts.refusal, skips=True),
    "SwitchTransformersExperts": Adapter(dicts.switch_forward, _modules),
    "VitPoseNaiveMoe": Adapter(dicts.vitpose_forward, _modules),
}
DECORATED = Adapter(experts.experts_forward, experts.prepare, experts.refusal, skips=True)
FP8 = Adapter(fp8.fp8_experts_forward, fp8.prepare, fp8.refusal, skips=True)


def adapter_of(module: nn.Module) -> Adapter | None:
    """The adapter that takes `module`, or None."""
    if fp8.matches(module):
        return FP8
    for cls in type(module).__mro__:
        if cls.__name__ in ADAPTERS:
            return ADAPTERS[cls.__name__]
    return DECORATED if experts.is_decorated(module) else None


def by_interface(module: nn.Module) -> bool:
    """Whether transformers' experts interface says what runs in `module`."""
    return adapter_of(module) in (DECORATED, FP8)


def looks_like_experts(module: nn.Module) -> bool:
    """Whether a module that no adapter takes still seems to hold routed experts, so that a report must name it."""
    name = type(module).__name__
    if "Shared" in name or isinstance(module, Experts):  # ours already
        return False
    held = getattr(module, "experts", None)
    return name.endswith("Experts") or (isinstance(held, nn.ModuleList | nn.ModuleDict) and len(held) > 1)


# (module, positional and named arguments of a call, what it returned) -> (ids [T, K], weights [T, K])
Choice = Callable[[nn.Module, tuple, Mapping[str, Any], Any], tuple[Tensor, Tensor]]


def _in_the_call(read: Callable[..., tuple[Tensor, Tensor]]) -> Choice:
    """The choice is handed over: the second and third argument, under whatever names the module's class gives them."""

    def choice(module, args, kwargs, _output):
        names = arguments_of(module)[:3]
        given = dict(zip(names, args, strict=False)) | kwargs
        return read(module, given[names[1]], given[names[2]])

    return choice


def _in_the_output(read: Callable[..., tuple[Tensor, Tensor]]) -> Choice:
    return lambda module, _args, _kwargs, output: read(module, output)


BOUNDARY = _in_the_call(lambda _module, ids, weights: (ids, weights))
_NAMES = {("top_k_index", "top_k_weights"), ("router_indices", "routing_weights")}
# By class, where the choice is not in a call at transformers' boundary. None: there is no choice to hear, because a
# router hears of it (Llama 4, JetMoE) or tokens have none (ViTPose: one expert per data set).
CHOICES: dict[str, Choice | None] = {
    "DogeCDMoE": _in_the_output(doge.choice),
    "JetMoeParallelExperts": None,
    "JetMoeTopKGating": _in_the_output(jetmoe.choice),
    "Llama4Router": _in_the_output(llama4.choice),
    "Llama4TextExperts": None,
    "NllbMoeExperts": _in_the_call(dicts.nllb_choice),
    "SwitchTransformersExperts": _in_the_call(dicts.switch_choice),
    "VitPoseNaiveMoe": None,
}


def choice_of(module: nn.Module) -> Choice | None:
    """How to read the experts that tokens go to from a call of `module`, swapped or not; None where it does not say."""
    for cls in type(module).__mro__:
        if cls.__name__ in CHOICES:
            return CHOICES[cls.__name__]
    adapter = adapter_of(module)
    if adapter is not None:
        return None if adapter.helper else BOUNDARY
    return BOUNDARY if arguments_of(module)[1:3] in _NAMES else None


def arguments_of(module: nn.Module) -> tuple[str, ...]:
    """What the class's forward calls its arguments (a swap sets the instance's); none where it does not say."""
    try:
        return tuple(inspect.signature(type(module).forward).parameters)[1:]
    except (AttributeError, TypeError, ValueError):  # TorchScript's classes, forwards written in C
        return ()
