"""What an experts module is to the offload: which of its parameters are which weights, and how they are stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.activation import Activation
from ..adapters import computing
from ..elsewhere import Absent, elsewhere_of
from ..experts import WEIGHTS, Experts
from ..hf import experts as boundary
from ..hf.gate import activation_of
from ..hf.swap import adapter_in
from ..shards import shards_of


@dataclass(frozen=True)
class Form:
    """`names`: what the operation calls a weight -> the module's parameter, [E, ...] each, which may be `transposed`,
    with gate and up rows `interleaved`. `straight`: outside of the module experts are neither; `turned`: they are not
    transposed."""

    names: dict[str, str]
    activation: Activation
    transposed: bool = False
    interleaved: bool = False
    straight: bool = False
    turned: bool = False

    @property
    def layout(self) -> dict[str, bool]:
        """How experts lie outside of the module, as the operation has it."""
        return {
            "transposed": self.transposed and not (self.straight or self.turned),
            "interleaved": self.interleaved and not self.straight,
        }

    def shapes(self, module: nn.Module) -> dict[str, Tensor]:
        """The experts' weights outside of the module [E, ...], without a number."""
        weights = {name: p.detach().to("meta") for name, p in self.weights(module).items()}
        return self.outside(weights)

    def inside(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights [n, ...] of outside as the module's parameters have them."""
        found, layout = merged(weights), self.layout
        for name in ("w_gate_up", "b_gate_up"):
            if self.interleaved and not layout["interleaved"] and name in found:
                found[name] = torch.stack(found[name].chunk(2, 1), 2).flatten(1, 2)
        for name in ("w_gate_up", "w_down"):
            if self.transposed and not layout["transposed"]:
                found[name] = found[name].transpose(1, 2)
        return found

    def outside(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights [n, ...] of the module's parameters as they lie outside."""
        found, layout = dict(weights), self.layout
        for name in ("w_gate_up", "w_down"):
            if self.transposed and not layout["transposed"]:
                found[name] = found[name].transpose(1, 2)
        for name in ("w_gate_up", "b_gate_up"):
            if self.interleaved and not layout["interleaved"] and name in found:
                found[name] = torch.cat((found[name][:, ::2], found[name][:, 1::2]), 1)
        return found

    def width(self, module: nn.Module) -> int:
        """D, the inputs of an expert."""
        return getattr(module, self.names["w_gate_up"]).shape[1 if self.transposed else 2]

    def weights(self, module: nn.Module) -> dict[str, nn.Parameter]:
        return {ours: getattr(module, theirs) for ours, theirs in self.names.items()}


def merged(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights [n, ...] with gate and up in one, gate rows above up rows."""
    found = dict(weights)
    if "w_gate" in found:
        found["w_gate_up"] = torch.cat((found.pop("w_gate"), found.pop("w_up")), 1)
    return found


def experts_in(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The experts modules that run through Headgate, by name: its own, and those of transformers models that are
    swapped or have headgate as their experts implementation."""
    for name, module in model.named_modules():
        if runs_here(module):
            yield name, module


def runs_here(module: nn.Module) -> bool:
    return isinstance(module, Experts) or adapter_in(module) is not None


def form_of(module: nn.Module, *, sliced: bool = False) -> Form | str:
    """The Form of an experts module; or, as a string, why its experts must stay where they are. `sliced`: they may be
    cut over etp, placed, or travel."""
    shards = shards_of(module)
    if not sliced and shards is not None and (shards.etp > 1 or shards.placement is not None or not shards.degree):
        return "its experts are cut over etp, placed, or travel as weights"
    if isinstance(module, Experts):
        return Form({name: name for name in WEIGHTS if getattr(module, name) is not None}, module.activation)
    adapter = adapter_in(module)
    assert adapter is not None
    if (why := adapter.refusal(module)) is not None:
        return why
    if adapter.forward is not boundary.experts_forward:
        return f"{type(module).__name__} is not called at transformers' experts boundary with stacked weights"
    gated, biased, transposed, interleaved, normed = boundary.flags(module)
    activation = activation_of(module, gated, interleaved, normed)
    if activation is None:
        return f"{type(module).__name__} has a gate of its own between two products"
    first = "gate_up_proj" if gated else "up_proj"
    names = {"w_gate_up": first, "w_down": "down_proj"}
    if biased:
        names |= {"b_gate_up": f"{first}_bias", "b_down": "down_proj_bias"}
    m: Any = module
    for name in names.values():
        if not isinstance(getattr(m, name), nn.Parameter):
            return f"{name} is computed, not a parameter ({type(getattr(m, name)).__name__})"
    return Form(names, activation, transposed, interleaved)


Found = list[tuple[str, nn.Module, Form]]  # of a model, the experts modules that can be moved, by name


def survey(model: nn.Module) -> tuple[Found, dict[str, str]]:
    """The experts modules of a model that can be moved, and why each of the others cannot: name -> reason.

    Raises ValueError where there is none to move, where one is elsewhere already, and where two share a parameter.
    """
    found: Found = []
    skipped: dict[str, str] = {}
    taken: dict[nn.Parameter, str] = {}
    for name, module in experts_in(model):
        if not isinstance(elsewhere_of(module), Absent | None):
            raise ValueError(f"offload: model must not be offloaded already, got one whose {name} is")
        form, adapted = form_of(module), computing(model, module)
        if adapted:
            form = (
                f"a LoRA adapter computes its {adapted}: merge the adapter into it first (PEFT's merge_and_unload or "
                "merge_adapter), or disable it"
            )
        if isinstance(form, str):
            skipped[name] = form
            continue
        found.append((name, module, form))
        for parameter in form.weights(module).values():
            if parameter in taken:
                raise ValueError(f"offload: experts must have their own weights, got {name} with {taken[parameter]}'s")
            taken[parameter] = name
    if not found:
        first = "run headgate.replace on a transformers model first, or choose headgate as its experts implementation"
        why = next(iter(skipped.values()), first)
        raise ValueError(f"offload: model must have experts that run through Headgate, got none to move: {why}")
    return found, skipped
