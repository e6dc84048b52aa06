"""headgate.lora: low-rank changes of a model's experts that learn, while the experts are frozen."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import computing
from ..elsewhere import elsewhere_of
from ..hf.experts import FLOATS
from ..offload.forms import Form, experts_in, form_of, runs_here
from ..shards import shards_of
from .attached import CHILD, TARGETS, ExpertLora, Target, lora_of, loras_in, switched_off
from .peft_files import Adapter, read_adapter, write_adapter
from .tuned import tuned_of

Chosen = str | Sequence[int] | Mapping[str, Sequence[int]]


def lora(
    model: nn.Module,
    rank: int = 16,
    alpha: float | None = None,
    *,
    dropout: float = 0.0,
    targets: Sequence[str] = TARGETS,
    experts: Chosen = "all",
    rslora: bool = False,
    dtype: torch.dtype | None = None,
) -> Lora:
    """Puts LoRA on the stacked experts of a model, in place, and freezes everything else.

    model     a transformers model after `headgate.replace` or with headgate as its experts implementation, or one with
              `headgate.MoE` layers; offloaded (also in few bits) or parallelized, before or after
    rank      r, at least 1; alpha: None is rank, so that the scale alpha / rank is 1 (alpha / sqrt(rank) with `rslora`)
    dropout   of what A takes, in training: [0, 1)
    targets   of "gate_up" and "down", the two projections of an expert
    experts   "all", the numbers of those that are changed in each layer, or layer name -> numbers (`tune_only(...)`'s)
    dtype     of A and B; None: fp32 for experts in half types, else the experts' own

    The experts' gradients are never computed: forward and backward keep the layer's rows and pre-activation, and add
    products of rank r (`headgate.kernels.lora_ffn`). Returns a Lora: its `parameters()` for an optimizer, `save`,
    `merge`, `remove`, `disabled`. A starts as nn.Linear's weights do and B at zero: outputs are the model's until the
    first step, to rounding.

    Raises ValueError / TypeError naming argument, rule and value; nothing is changed then.
    Source: Hu et al., LoRA (2021); files are PEFT's (`LoraConfig(target_parameters=...)`).

    >>> adapters = headgate.lora(model, rank=16)
    >>> optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-4)
    """
    _check_numbers("lora", rank, alpha, dropout)
    listed = isinstance(targets, Sequence) and not isinstance(targets, str) and len(targets) > 0
    if not listed or any(t not in TARGETS for t in targets):
        raise ValueError(f"lora: targets must be of {', '.join(TARGETS)}, got {targets!r}")
    found = _survey("lora", model)
    chosen = {name: _chosen(name, module, form, experts) for name, module, form in found}
    if isinstance(experts, Mapping) and (strange := [n for n in experts if n not in chosen]):
        raise ValueError(f"lora: experts must name layers of the model, such as {found[0][0]}, got {strange[0]!r}")
    if not any(one is None or one for one in chosen.values()):
        raise ValueError(f"lora: experts must be some of one layer at least, got {experts!r}")
    size = rank if alpha is None else alpha
    made = {}
    for name, module, form in found:
        if chosen[name] == []:
            continue
        made[name] = ExpertLora(
            targets_of(module, form, targets), rank, size, rslora=rslora, dropout=dropout, chosen=chosen[name],
            **_where("lora", model, module, form, dtype),
        )  # fmt: skip
    return Lora._put(model, made)


def load_lora(model: nn.Module, folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> Lora:
    """Puts the adapter of a folder as PEFT writes it on a model's experts: adapter_config.json with target_parameters,
    and adapter_model.safetensors. It must change experts only. `dtype`, model and result as in `lora`.

    Raises ValueError where the file's layers, shapes or orientation are not the model's, or it holds what is no LoRA on
    experts; OSError where it cannot be read; nothing is changed then.
    """
    found = {name: (module, form) for name, module, form in _survey("load_lora", model)}
    sizes = {name: targets_of(module, form, TARGETS) for name, (module, form) in found.items()}
    adapter, values = read_adapter(folder, sizes)
    made = {}
    for name, factors in values.items():
        module, form = found[name]
        targets = {t: sizes[name][t] for t in factors}
        made[name] = one = ExpertLora(
            targets,
            adapter.rank,
            adapter.alpha,
            rslora=adapter.rslora,
            **_where("load_lora", model, module, form, dtype),
        )
        with torch.no_grad():
            for target, (a, b) in factors.items():
                getattr(one, f"a_{target}").copy_(a)
                getattr(one, f"b_{target}").copy_(b)
    return Lora._put(model, made)


@dataclass(frozen=True, eq=False)
class Lora:
    """The changes on a model's experts. See `lora`."""

    model: nn.Module
    before: Mapping[nn.Parameter, bool]  # which parameters learned

    @classmethod
    def _put(cls, model: nn.Module, made: Mapping[str, ExpertLora]) -> Lora:
        before = {p: p.requires_grad for p in model.parameters()}
        for p in before:
            if p.requires_grad:
                p.requires_grad_(False)
        for name, one in made.items():
            module = model.get_submodule(name)
            elsewhere: Any = elsewhere_of(module)
            if hasattr(elsewhere, "freeze"):  # headgate.offload would let them learn when it brings them back
                before |= elsewhere.freeze()
            module.add_module(CHILD, one.train(module.training))
            one.hook = module.register_forward_pre_hook(_runs_here)
        return cls(model, before)

    @property
    def layers(self) -> dict[str, ExpertLora]:
        """What each experts module carries, by the module's name."""
        return {name: one for name, _, one in loras_in(self.model)}

    def parameters(self) -> Iterator[nn.Parameter]:
        for one in self.layers.values():
            yield from one.parameters()

    def disabled(self) -> AbstractContextManager[None]:
        """The model without the changes, inside a `with`."""
        return switched_off(self.model)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes adapter_config.json and adapter_model.safetensors as PEFT does, which PEFT and `load_lora` read. An
        expert that was not chosen has a change of zero there. Dropout is not written, which PEFT refuses there.

        Raises ValueError where experts are cut over ranks (see `save_checkpoint`), OSError where it cannot be written.
        """
        layers = self._layers("save")
        for name, module, _ in loras_in(self.model):
            if shards_of(module) is not None:
                raise ValueError(
                    f"Lora.save: experts must be whole, got {name} cut over ranks: write with headgate.save_checkpoint"
                )
        one = next(iter(layers.values()))
        adapter = Adapter(one.rank, one.alpha, one.rslora)
        write_adapter(folder, adapter, layers, [name for name, _ in self.model.named_parameters()])

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """Adds the changes to the weights, an expert at a time, takes them off, and returns the model: PEFT's
        merge_and_unload. Raises ValueError where experts are offloaded or cut over ranks; nothing is changed then."""
        self._layers("merge")
        for name, module, _ in loras_in(self.model):
            if elsewhere_of(module) is not None:
                raise ValueError(f"Lora.merge: experts must be in place, got {name} offloaded: close the Offload first")
            if (shards := shards_of(module)) is not None and shards.etp > 1:
                raise ValueError(f"Lora.merge: experts must be whole, got {name} cut over etp")
        for _, module, one in loras_in(self.model):
            for target, about in one.targets.items():
                weight, (a, b) = getattr(module, about.parameter), one.factors(target)
                for e in range(len(a)) if one.chosen is None else one.chosen:
                    w = weight.data[e]
                    wide = torch.promote_types(w.dtype, torch.float32)
                    change = one.scale * (b[e].to(wide) @ a[e].to(wide))
                    w.copy_(w.to(wide) + (change.T if about.transposed else change))
        return self.remove()

    def remove(self) -> nn.Module:
        """Takes the changes off and lets learn what learned before; returns the model."""
        self._layers("remove")
        learned_before = {p for p, learned in self.before.items() if learned}
        for _, module, one in list(loras_in(self.model)):
            one.hook.remove()
            delattr(module, CHILD)
            elsewhere: Any = elsewhere_of(module)
            if hasattr(elsewhere, "thaw"):  # those learn when headgate.offload brings them back
                elsewhere.thaw(learned_before)
        for p, learned in self.before.items():
            if learned and not isinstance(p, _frozen_kinds()):
                p.requires_grad_(True)
        return self.model

    def _layers(self, what: str) -> dict[str, ExpertLora]:
        layers = self.layers
        if not layers:
            raise ValueError(f"Lora.{what}: model must carry the changes, got one from which they were taken off")
        return layers

    def __repr__(self) -> str:
        numbers = sum(p.numel() for p in self.parameters())
        return f"Lora({len(self.layers)} layers, {numbers:,} numbers that learn)"


def targets_of(module: nn.Module, form: Form, targets: Sequence[str]) -> dict[str, Target]:
    """The weights of an experts module that are changed, by target."""
    found = {}
    for target in TARGETS:
        if target in targets:
            parameter = form.names[f"w_{target}"]
            experts, *shape = getattr(module, parameter).shape
            fan_out, fan_in = shape[::-1] if form.transposed else shape
            found[target] = Target(parameter, experts, fan_in, fan_out, form.transposed)
    return found


def _frozen_kinds() -> type:
    from ..offload.stand_in import StandIn

    return StandIn


def _runs_here(module: nn.Module, _args: Any) -> None:
    if not runs_here(module):
        raise RuntimeError(
            "lora: experts must run through Headgate while they carry LoRA, got another experts implementation; choose "
            "headgate again, or merge or remove the LoRA first"
        )


def _check_numbers(who: str, rank: object, alpha: object, dropout: object) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"{who}: rank must be a whole number of at least 1, got {rank!r}")
    if alpha is not None and (isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < 1e30):
        raise ValueError(f"{who}: alpha must be a positive number or None, got {alpha!r}")
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(f"{who}: dropout must be in [0, 1), got {dropout!r}")


def _survey(who: str, model: nn.Module) -> list[tuple[str, nn.Module, Form]]:
    """The experts modules that can carry LoRA, by name."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{who}: model must be a torch.nn.Module, got {type(model).__name__}")
    found, skipped = [], {}
    for name, module in experts_in(model):
        if lora_of(module) is not None:
            raise ValueError(f"{who}: model must carry no LoRA yet, got one on {name}: merge or remove it first")
        if tuned_of(module) is not None:
            raise ValueError(
                f"{who}: {name} must have no experts that learn apart (tune_only), got some: finish() first"
            )
        if (parameter := computing(model, module)) is not None:
            raise ValueError(f"{who}: {name} must have no adapter of PEFT's, got one on its {parameter}")
        form = form_of(module, sliced=True)
        if isinstance(form, str):
            skipped[name] = form
        else:
            found.append((name, module, form))
    if not found:
        first = "run headgate.replace on a transformers model first, or choose headgate as its experts implementation"
        why = next((f"{name}: {why}" for name, why in skipped.items()), first)
        raise ValueError(f"{who}: model must have experts that run through Headgate, got none to change: {why}")
    return found


def _chosen(name: str, module: nn.Module, form: Form, experts: Chosen) -> list[int] | None:
    """The experts of a layer that are changed; None: all."""
    if isinstance(experts, str):
        if experts != "all":
            raise ValueError(f'lora: experts must be "all", numbers or layer -> numbers, got {experts!r}')
        return None
    numbers: Any = experts.get(name, ()) if isinstance(experts, Mapping) else experts
    if not isinstance(numbers, Sequence) or isinstance(numbers, str):
        raise TypeError(f'lora: experts must be "all", numbers or layer -> numbers, got {experts!r}')
    there = getattr(module, form.names["w_down"]).shape[0]
    if shards_of(module) is not None:
        raise ValueError(f'lora: experts must be "all" where {name} is cut over ranks, got a choice of them')
    plain = all(isinstance(e, int) and not isinstance(e, bool) and 0 <= e < there for e in numbers)
    if not plain or len(set(numbers)) != len(numbers):
        raise ValueError(f"lora: experts of {name} must be distinct numbers in 0 .. {there - 1}, got {list(numbers)!r}")
    if not numbers and not isinstance(experts, Mapping):
        raise ValueError(f'lora: experts must be "all", numbers or layer -> numbers, got {experts!r}')
    return sorted(numbers)


def _where(who: str, model: nn.Module, module: nn.Module, form: Form, dtype: torch.dtype | None) -> dict[str, Any]:
    """Device and dtype of what is new."""
    weight: Tensor = getattr(module, form.names["w_down"])
    if dtype not in (None, *FLOATS):
        raise TypeError(f"{who}: dtype must be None or of {', '.join(map(str, FLOATS))}, got {dtype!r}")
    elsewhere = elsewhere_of(module)
    device = weight.device
    if elsewhere is not None and hasattr(elsewhere, "offloaded"):
        device = elsewhere.offloaded.engine.arena.device
        if elsewhere.offloaded.engine.hybrid:
            raise ValueError(f"{who}: experts must be offloaded without hybrid, got it: close the Offload first")
    return {"device": device, "dtype": dtype or (weight.dtype if weight.dtype.itemsize > 2 else torch.float32)}
