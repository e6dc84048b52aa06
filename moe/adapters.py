"""LoRA on the stacked weights of experts, PEFT's (`target_parameters`) and our own (lora/): which adapter is on which
parameter, and the part of it that belongs to some of the experts.

A `ParamWrapper` stands around the experts module and makes the weight a computed one, base + scaling * B A, while a
call lasts. It is known here by what it has: PEFT itself is not imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .lora.attached import ExpertLora, factor_cuts, lora_of
from .shards import Cut, Shards, shards_of


@dataclass(frozen=True)
class Own:
    """A weight that our own LoRA changes, as one more wrapper."""

    lora: ExpertLora
    target: str

    @property
    def parameter_name(self) -> str:
        return self.lora.targets[self.target].parameter


def wrappers_in(model: nn.Module) -> Iterator[tuple[str, Any, nn.Module]]:
    """(name, wrapper, the experts module inside) of each wrapper in a model; of several around one, outermost first."""
    for name, module in model.named_modules():
        own = lora_of(module)
        for target in () if own is None else own.targets:
            yield name, Own(own, target), module  # type: ignore[arg-type]
        if all(hasattr(module, attribute) for attribute in ("parameter_name", "get_base_layer", "lora_A", "lora_B")):
            yield name, module, module.get_base_layer()


def unwrapped(module: nn.Module) -> nn.Module:
    """What is inside the wrappers around a module, or the module."""
    base: Any = getattr(module, "get_base_layer", None)
    return module if base is None else base()


def computing(model: nn.Module, experts: nn.Module) -> str | None:
    """The name of a parameter of `experts` that an adapter will compute in the next call, or None."""
    for _, wrapper, inside in wrappers_in(model):
        if isinstance(wrapper, Own):
            continue
        idle = wrapper.disable_adapters or wrapper.merged
        if inside is experts and not idle and any(adapter in wrapper.lora_A for adapter in wrapper.active_adapters):
            return wrapper.parameter_name
    return None


@dataclass(frozen=True)
class Factor:
    """One of the two matrices of an adapter on a weight [E, ., .]: A [E * r, in], a row of blocks of one expert each,
    or B [out, r * E], of which neighbouring columns are different experts'. `cut`: how [E, r, in or out] is cut."""

    linear: Any  # an nn.Linear without bias
    is_a: bool
    experts: int
    cut: Cut

    @property
    def parameter(self) -> nn.Parameter:
        return self.linear.weight

    def by_expert(self, t: Tensor) -> Tensor:
        """[E, r, in or out]: a view of t, which has the parameter's shape."""
        return t.unflatten(0, (self.experts, -1)) if self.is_a else t.unflatten(1, (-1, self.experts)).permute(2, 1, 0)

    def keep(self, shards: Shards) -> None:
        """Leaves this rank's part of the matrix, as a new parameter."""
        full = self.parameter
        part = self.cut.of(self.by_expert(full.detach()), shards.held, shards.etp, shards.fold.rank("etp"))
        weight = part.flatten(0, 1) if self.is_a else part.permute(2, 1, 0).flatten(1).contiguous()
        self.linear.weight = nn.Parameter(weight, requires_grad=full.requires_grad)
        self.linear.out_features, self.linear.in_features = weight.shape


@dataclass(frozen=True)
class OwnFactor(Factor):
    """The same of our own LoRA: A [E, r, in] or B [E, out, r], the parameter `name` of `linear`."""

    name: str

    @property
    def parameter(self) -> nn.Parameter:
        return getattr(self.linear, self.name)

    def by_expert(self, t: Tensor) -> Tensor:
        return t if self.is_a else t.transpose(1, 2)

    def keep(self, shards: Shards) -> None:
        full = self.parameter
        part = self.cut.of(self.by_expert(full.detach()), shards.held, shards.etp, shards.fold.rank("etp"))
        part = self.by_expert(part).contiguous()
        setattr(self.linear, self.name, nn.Parameter(part, requires_grad=full.requires_grad))


def factors_of(wrapper: Any, cuts: Mapping[str, Cut]) -> list[Factor]:
    """A and B of each adapter in a wrapper around experts whose weights are cut so."""
    if isinstance(wrapper, Own):
        cut_a, cut_b = factor_cuts(cuts, wrapper.parameter_name)
        cut_b = Cut(2, cut_b.blocks, everywhere=cut_b.everywhere)  # as `by_expert` turns it
        lora, experts, at = wrapper.lora, wrapper.lora.targets[wrapper.target].experts, wrapper.target
        return [OwnFactor(lora, True, experts, cut_a, f"a_{at}"), OwnFactor(lora, False, experts, cut_b, f"b_{at}")]
    cut = cuts[wrapper.parameter_name]
    side = 2 if getattr(wrapper, "_did_swap_in_out_features", False) else 1  # the weight's dimension that A has
    found = []
    for is_a, linears in ((True, wrapper.lora_A), (False, wrapper.lora_B)):
        along = (side if is_a else 3 - side) == cut.ffn
        of = Cut(2, cut.blocks) if along else Cut(2, everywhere=True)
        found += [Factor(linear, is_a, wrapper.num_experts, of) for linear in linears.values()]
    return found


def cut_adapters(model: nn.Module, experts: Sequence[nn.Module]) -> None:
    """Leaves this rank the parts of adapters that belong to its part of the `experts` of a model."""
    for _, wrapper, inside in wrappers_in(model):
        if any(inside is each for each in experts):
            shards = shards_of(inside)
            assert shards is not None
            _cut_adapter(wrapper, shards)


def _cut_adapter(wrapper: Any, shards: Shards) -> None:
    factors = factors_of(wrapper, shards.cuts)
    for factor in factors:
        factor.keep(shards)
    if isinstance(wrapper, Own):
        return
    for factor in factors:
        if factor.is_a:
            wrapper.in_features = factor.linear.in_features
        else:
            wrapper.out_features = factor.linear.out_features
    wrapper.num_experts = len(shards.held)
