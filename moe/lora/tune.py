"""headgate.tune_only: the fewest experts that a task goes to learn, all others stay as they are (ESFT)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...placement.careful import Guard
from ...placement.files import write_whole
from ...placement.traces.trace import Trace
from ..adapters import computing
from ..elsewhere import elsewhere_of
from ..offload.checkpoint import Checkpoint
from ..offload.forms import Form, experts_in, form_of
from ..shards import shards_of
from .attached import lora_of
from .peft_files import FLOATING
from .tuned import CHILD, TunedExperts, tuned_in, tuned_of

BY = ("tokens", "gates")
_WHO = "load_tuned"


def experts_for(scores: NDArray[np.floating], share: float) -> list[int]:
    """The smallest set of experts whose scores [E] (which sum to 1) reach `share`, rising. Of equal ones the lower.

    >>> experts_for(np.array([0.1, 0.5, 0.15, 0.25]), 0.7)
    [1, 3]
    """
    order = np.argsort(-scores, kind="stable")
    reached = np.cumsum(scores[order])
    count = int(np.searchsorted(reached, share - 1e-12)) + 1
    return sorted(order[:count].tolist())


def scores_of(trace: Trace, by: str) -> NDArray[np.float64]:
    """[L, E]: what part of each layer's choices ("tokens"), or of its router weights ("gates"), an expert has."""
    layers = trace.expert_ids.shape[0]
    found = np.zeros((layers, trace.num_experts))
    for i, ids in enumerate(trace.expert_ids):
        live = ids != trace.none
        each = None if by == "tokens" else np.asarray(trace.weights)[i][live].astype(np.float64)
        found[i] = np.bincount(ids[live].astype(np.int64), each, minlength=trace.num_experts)
    total = found.sum(1, keepdims=True)
    return found / np.where(total > 0, total, 1)


def tune_only(model: nn.Module, trace: Trace, share: float = 0.2, *, by: str = "tokens") -> Tuned:
    """Lets the experts learn that a task goes to, and nothing else of the model, in place.

    model   a transformers model after `headgate.replace` or with headgate as its experts implementation, or one with
            `headgate.MoE` layers; its frozen experts may be offloaded afterwards
    trace   of the task's text, from `headgate.record(model, batches, weights=True)`
    share   in each layer the fewest experts are taken whose scores sum to this share, (0, 1]
    by      "tokens": how many of the layer's choices an expert has (the paper's share: 0.2); "gates": its part of the
            router weights (the paper's: 0.1), for which the trace needs weights

    What learns are copies [n, ...] of those experts; the stacked weights of all are frozen, so that neither a gradient
    nor an optimizer's state is ever made for the others. Outputs are the model's until the first step, to rounding: a
    token's sum is taken in two parts. Returns a Tuned: its `parameters()`, what was `chosen`, `save`, and `finish`,
    which writes the experts back into the model.

    Raises ValueError / TypeError naming argument, rule and value; nothing is changed then.
    Source: Wang et al., Let the Expert Stick to His Last (ESFT, 2024), section 3.2.

    >>> tuned = headgate.tune_only(model, headgate.record(model, batches), share=0.2)
    >>> optimizer = torch.optim.AdamW(tuned.parameters(), lr=1e-5)
    """
    if not isinstance(trace, Trace):
        raise TypeError(f"tune_only: trace must be a Trace, got {type(trace).__name__}")
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise ValueError(f"tune_only: share must be above 0 and at most 1, got {share!r}")
    if by not in BY:
        raise ValueError(f"tune_only: by must be one of {', '.join(BY)}, got {by!r}")
    if by == "gates" and trace.weights is None:
        raise ValueError('tune_only: trace must have weights for by="gates" (record(..., weights=True)), got none')
    found = _survey("tune_only", model)
    lines = _lines(trace, found)
    scores = scores_of(trace, by)
    chosen = {}
    for name, module, form in found:
        experts = getattr(module, form.names["w_down"]).shape[0]
        line = scores[lines[name]]
        if line[experts:].any() or not line.any():
            got = "none" if not line.any() else f"expert {int(np.flatnonzero(line)[-1])}"
            raise ValueError(f"tune_only: trace must have choices of the {experts} experts of {name}, got {got}")
        chosen[name] = experts_for(line, share)
    return _put(model, found, chosen)


def load_tuned(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Writes the experts of a file by `Tuned.save` into a model's stacked weights; returns the model.

    Raises ValueError where the file is not one, or of another model; OSError where it cannot be read; nothing is
    changed then."""
    found = {name: (module, form) for name, module, form in _survey("load_tuned", model)}
    where = Path(path)
    guard = Guard(where, _WHO)
    file = Checkpoint(where.parent, single=where.name, who=_WHO)
    try:
        left, new = set(file.tensors), []
        for name, (module, form) in found.items():
            key = f"{name}.experts"
            if key not in left:
                continue
            left.discard(key)
            guard.rule(
                file.tensors[key].dtype == "I64" and len(file.tensors[key].shape) == 1, key, "int64 [n]", "other"
            )
            experts = getattr(module, form.names["w_down"]).shape[0]
            low_high = {"low": 0, "high": experts - 1}
            numbers = guard.integers(file.read(key).numpy(), key, shape=(None,), **low_high).tolist()
            guard.rule(sorted(set(numbers)) == numbers, key, "rising", numbers[:4])
            for parameter in form.names.values():
                key, weight = f"{name}.{parameter}", getattr(module, parameter)
                guard.rule(key in left, key, "there", "none")
                want = (len(numbers), *weight.shape[1:])
                guard.rule(file.tensors[key].shape == want, key, f"of shape {list(want)}", file.tensors[key].shape)
                guard.rule(file.tensors[key].dtype in FLOATING, key, "floating point", file.tensors[key].dtype)
                left.discard(key)
                new.append((weight, numbers, file.read(key)))
        guard.rule(not left, "tensors", "those of the model's experts", sorted(left)[:1])
        guard.rule(bool(new), "tensors", "of one layer at least", "none")
    finally:
        file.close()
    with torch.no_grad():
        for weight, numbers, values in new:
            weight[numbers] = values.to(weight.device, weight.dtype)
    return model


@dataclass(frozen=True, eq=False)
class Tuned:
    """The experts of a model that learn. See `tune_only`."""

    model: nn.Module
    before: Mapping[nn.Parameter, bool]  # which parameters learned

    @property
    def layers(self) -> dict[str, TunedExperts]:
        return {name: one for name, _, one in tuned_in(self.model)}

    @property
    def chosen(self) -> dict[str, list[int]]:
        """Layer -> its experts that learn; `headgate.lora(model, experts=...)` takes it."""
        return {name: list(one.chosen) for name, one in self.layers.items()}

    def parameters(self) -> Iterator[nn.Parameter]:
        for one in self.layers.values():
            yield from one.parameters()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes these experts, and no others, to a safetensors file, which `load_tuned` reads: "<layer>.experts" int64
        [n], and "<layer>.<parameter>" [n, ...]. Raises OSError where it cannot be written."""
        from safetensors.torch import save

        tensors: dict[str, Tensor] = {}
        for name, one in self._layers("save").items():
            tensors[f"{name}.experts"] = torch.tensor(one.chosen)
            tensors |= {f"{name}.{leaf}": p.detach().cpu().contiguous() for leaf, p in one.named_parameters()}
        write_whole(Path(path), lambda file: file.write(save(tensors, {"format": "pt"})))

    @torch.no_grad()
    def finish(self) -> nn.Module:
        """Writes the experts back into the model's stacked weights and lets learn what learned before; returns the
        model, which is built as it was. Raises ValueError where experts are offloaded; nothing is changed then."""
        self._layers("finish")
        for name, module, _ in tuned_in(self.model):
            if elsewhere_of(module) is not None:
                raise ValueError(
                    f"Tuned.finish: experts must be in place, got {name} offloaded: close the Offload first"
                )
        for _, module, one in list(tuned_in(self.model)):
            for leaf, p in one.named_parameters():
                getattr(module, leaf).data[one.chosen] = p.to(getattr(module, leaf).dtype)
            delattr(module, CHILD)
        for p, learned in self.before.items():
            p.requires_grad_(learned)
        return self.model

    def _layers(self, what: str) -> dict[str, TunedExperts]:
        layers = self.layers
        if not layers:
            raise ValueError(f"Tuned.{what}: model must have experts that learn apart, got one that has finished")
        return layers

    def __repr__(self) -> str:
        layers = self.layers.values()
        count, of = sum(len(one.chosen) for one in layers), sum(one.experts for one in layers)
        return f"Tuned({count} of {of} experts in {len(layers)} layers)"


def _put(model: nn.Module, found: list[tuple[str, nn.Module, Form]], chosen: Mapping[str, list[int]]) -> Tuned:
    before = {p: p.requires_grad for p in model.parameters()}
    made = []
    for name, module, form in found:
        act = form.activation
        how: dict[str, Any] = {"activation": act, "gated": act.gated}
        how |= {"transposed": form.transposed, "interleaved": form.interleaved}
        made.append((module, TunedExperts(module, chosen[name], dict(form.names), how)))
    for p in before:
        p.requires_grad_(False)
    for module, one in made:
        module.add_module(CHILD, one)
    return Tuned(model, before)


def _survey(who: str, model: nn.Module) -> list[tuple[str, nn.Module, Form]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{who}: model must be a torch.nn.Module, got {type(model).__name__}")
    found = []
    for name, module in experts_in(model):
        if tuned_of(module) is not None:
            raise ValueError(f"{who}: model must have no experts that learn apart yet, got {name}: finish() first")
        if lora_of(module) is not None or computing(model, module) is not None:
            raise ValueError(f"{who}: {name} must carry no LoRA, got one: merge or remove it first")
        if shards_of(module) is not None or elsewhere_of(module) is not None:
            raise ValueError(f"{who}: {name} must have its experts whole and in place, got them cut or offloaded")
        form = form_of(module)
        if isinstance(form, str):
            raise ValueError(f"{who}: {name} must have experts in stacked weights with a known activation: {form}")
        found.append((name, module, form))
    if not found:
        first = "run headgate.replace on a transformers model first"
        raise ValueError(f"{who}: model must have experts that run through Headgate, got none: {first}")
    return found


def _lines(trace: Trace, found: list[tuple[str, nn.Module, Form]]) -> dict[str, int]:
    """Which layer of the trace belongs to which experts."""
    names, there = [name for name, _, _ in found], list(trace.layer_names)
    if there and all(name in there for name in names):
        return {name: there.index(name) for name in names}
    if len(names) != trace.expert_ids.shape[0]:
        raise ValueError(
            f"tune_only: trace must have the {len(names)} layers of the model, got {trace.expert_ids.shape[0]}"
        )
    return {name: i for i, name in enumerate(names)}
