"""record: run a model over batches and keep which experts every token went to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..placement.trace import Trace, id_type
from .hf.table import choice_of

Batch = Tensor | Mapping[str, Tensor]


def record(
    model: nn.Module, batches: Iterable[Batch] | Batch, *, weights: bool = False, max_tokens: int | None = None
) -> Trace:
    """The routing trace of `model` over `batches`, on the model's device, in eval mode and without gradients.

    model       a transformers MoE model, swapped or not, of any family that `headgate.replace` takes; or any model
                with `headgate.MoE` layers, or modules called (hidden_states, top_k_index, top_k_weights), inside
    batches     tensors of input ids [B, S], or dicts as a tokenizer returns them, or one of these; tokens with
                attention_mask 0 are left out, every row is a sequence of its own. The model is called with the dict,
                or with input_ids=
    weights     keep the router's weights too (float16)
    max_tokens  stop after so many tokens; the last batch is cut

    Returns a Trace of the layers in the order in which they ran; where layers differ in K the ids are filled up with
    "no expert", where they differ in E `experts_of_layer` says so. A layer has the name of the module that was heard:
    the experts, or the router where these are not told the choice (Llama 4; JetMoE, whose attention has one too).
    LongCat's identity experts, which have no weights, count as no expert. Memory: the trace itself, one to four bytes
    per choice. The model's training mode is restored and the hooks are removed, whatever happens.

    Raises ValueError where the model has no MoE layer that tokens choose from (ViTPose's go by data set), no batch
    holds a token, a layer runs twice in one pass, or sees other tokens than input_ids has (an image's; a decoder's
    where decoder_input_ids is longer or shorter). TypeError where a batch is neither tensor nor dict.

    >>> trace = headgate.record(model, [tokenizer("def main():", return_tensors="pt")])
    >>> trace.expert_ids.shape                                                    # L, T, K
    (16, 3, 8)
    """
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"record: max_tokens must be at least 1, got {max_tokens}")
    layers = dict(_moe_layers(model))
    if not layers:
        raise ValueError(f"record: model must have MoE layers, got a {type(model).__name__} without any")
    if isinstance(batches, Tensor | Mapping):
        batches = [batches]
    tape = _Tape(layers, keep_weights=weights)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    left = max_tokens
    with _evaluating(model), tape.listening(), torch.no_grad():
        for batch in batches:
            inputs = _inputs(batch, device)
            tape.begin()
            model(**inputs)
            left = tape.end(inputs["input_ids"], inputs.get("attention_mask"), left)
            if left == 0:
                break
    return tape.trace()


class _Tape:
    """What the hooks write: one list of chunks for each layer that ran."""

    def __init__(self, layers: Mapping[str, nn.Module], keep_weights: bool) -> None:
        self.layers = layers
        self.keep_weights = keep_weights
        self.experts = {name: _num_experts(module) for name, module in layers.items()}
        self.dtype = id_type(max(self.experts.values()))
        self.now: dict[str, tuple[Tensor, Tensor]] = {}
        self.ids: dict[str, list[NDArray]] = {}
        self.weights: dict[str, list[NDArray]] = {}
        self.sequence: list[NDArray[np.int32]] = []
        self.sequences = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        with ExitStack() as hooks:
            for name, module in self.layers.items():
                hooks.callback(self._attach(name, module).remove)
            yield

    def _attach(self, name: str, module: nn.Module):
        choice = _own_choice if hasattr(module, "last_routing") else choice_of(module)
        assert choice is not None

        def after(module, args, kwargs, output):
            self._hear(name, *choice(module, args, kwargs, output))

        return module.register_forward_hook(after, with_kwargs=True)

    def _hear(self, name: str, ids: Tensor, weights: Tensor) -> None:
        if name in self.now:
            raise ValueError(f"record: every MoE layer must run once in a forward pass, got a second run of {name}")
        self.now[name] = (ids.detach().flatten(0, -2), weights.detach().flatten(0, -2))

    def begin(self) -> None:
        self.now = {}

    def end(self, input_ids: Tensor, mask: Tensor | None, left: int | None) -> int | None:
        """Takes over one forward pass; returns how many tokens may still come."""
        rows, length = input_ids.shape
        keep = torch.ones(rows * length, dtype=torch.bool) if mask is None else mask.flatten().bool().cpu()
        if left is not None:
            keep &= keep.cumsum(0) <= left
        sequence = torch.arange(rows).repeat_interleave(length)[keep].numpy().astype(np.int32)
        if self.ids and self.now.keys() != self.ids.keys():
            odd = sorted(self.now.keys() ^ self.ids.keys())
            raise ValueError(f"record: every batch must run the same MoE layers, got {', '.join(odd)} in some only")
        for name, (ids, weights) in self.now.items():
            if len(ids) != rows * length:
                raise ValueError(
                    f"record: {name} must see the batch's tokens, got {len(ids)} for input_ids {tuple(input_ids.shape)}"
                )
            ids = ids.cpu()[keep]
            none = (ids < 0) | (ids >= self.experts[name])
            self.ids.setdefault(name, []).append(
                ids.masked_fill(none, np.iinfo(self.dtype).max).numpy().astype(self.dtype)
            )
            if self.keep_weights:
                kept = weights.cpu()[keep].float().masked_fill(none, 0).half().numpy()
                self.weights.setdefault(name, []).append(kept)
        self.now = {}
        self.sequence.append(sequence + np.int32(self.sequences))
        self.sequences += rows
        return None if left is None else left - len(sequence)

    def trace(self) -> Trace:
        tokens = sum(map(len, self.sequence))
        if not tokens or not self.ids:
            raise ValueError("record: batches must hold at least one token that reaches an MoE layer, got none")
        names = tuple(self.ids)
        experts = np.array([self.experts[name] for name in names], np.int32)
        return Trace(
            expert_ids=_stack([self.ids[name] for name in names], np.iinfo(self.dtype).max),
            num_experts=int(experts.max()),
            weights=_stack([self.weights[name] for name in names], 0) if self.keep_weights else None,
            sequence=np.concatenate(self.sequence),
            layer_names=names,
            experts_of_layer=experts if len(set(experts.tolist())) > 1 else None,
        )


def _stack(layers: list[list[NDArray]], fill: int) -> NDArray:
    """[L, T, K] of lists of chunks [t, k]; a layer with fewer choices is filled up on the right."""
    top_k = max(chunks[0].shape[1] for chunks in layers)
    tokens = sum(map(len, layers[0]))
    out = np.full((len(layers), tokens, top_k), fill, layers[0][0].dtype)
    for layer, chunks in enumerate(layers):
        at = 0
        for chunk in chunks:
            out[layer, at : at + len(chunk), : chunk.shape[1]] = chunk
            at += len(chunk)
    return out


def _moe_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if hasattr(module, "last_routing") or choice_of(module) is not None:
            yield name, module


def _own_choice(layer, _args, _kwargs, _output) -> tuple[Tensor, Tensor]:
    """What a headgate.MoE chose in its last forward."""
    return layer.last_routing.expert_ids, layer.last_routing.weights


def _num_experts(module: nn.Module) -> int:
    for declared in (getattr(module, name, None) for name in ("num_routed_experts", "num_experts")):
        if isinstance(declared, int):
            return declared
    for parameter in module.parameters():
        if parameter.dim() == 3:
            return parameter.shape[0]
    raise ValueError(f"record: a layer must have num_experts or weights [E, ., .], got {type(module).__name__}")


def _inputs(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch}
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"record: a batch must be a tensor of input ids or a dict of tensors, got {type(batch).__name__}"
        )
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        shape = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"record: input_ids must be a tensor [B, S], got {shape}")
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for the time being; each module gets its own mode back (a frozen part may be in eval on purpose)."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
