"""record: run a model over batches and keep which experts every token went to."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..placement.traces.file import TraceFile, TraceWriter
from ..placement.traces.trace import Trace, id_type
from .hf.accelerated import device_of
from .hf.table import choice_of

Batch = Tensor | Mapping[str, Tensor]


@overload
def record(
    model: nn.Module,
    batches: Iterable[Batch] | Batch,
    *,
    weights: bool = False,
    max_tokens: int | None = None,
    sample: float = 1.0,
    seed: int = 0,
    path: None = None,
) -> Trace: ...
@overload
def record(
    model: nn.Module,
    batches: Iterable[Batch] | Batch,
    *,
    weights: bool = False,
    max_tokens: int | None = None,
    sample: float = 1.0,
    seed: int = 0,
    path: str | os.PathLike[str],
) -> TraceFile: ...
def record(
    model: nn.Module,
    batches: Iterable[Batch] | Batch,
    *,
    weights: bool = False,
    max_tokens: int | None = None,
    sample: float = 1.0,
    seed: int = 0,
    path: str | os.PathLike[str] | None = None,
) -> Trace | TraceFile:
    """The routing trace of `model` over `batches`, on the model's device, in eval mode and without gradients.

    model       a transformers MoE model, swapped or not, of any family that `headgate.replace` takes; or any model
                with `headgate.MoE` layers, or modules called (hidden_states, top_k_index, top_k_weights), inside
    batches     tensors of input ids [B, S], or dicts as a tokenizer returns them, or one of these; tokens with
                attention_mask 0 are left out, every row is a sequence of its own. The model is called with the dict,
                or with input_ids=
    weights     keep the router's weights too (float16)
    max_tokens  stop after so many tokens; the last batch is cut
    sample      the share of sequences to keep, drawn by `seed`: a batch without any is not run at all. A sequence
                keeps the number that it has among all
    path        stream to this .npz: what a batch brings goes to disk when it has run, so that memory does not grow with
                tokens; the file appears when it is whole, and a failure leaves nothing behind

    Returns a Trace, with `path` the TraceFile opened there, of the layers in the order in which they ran; where layers
    differ in K the ids are filled up with "no expert", where they differ in E `experts_of_layer` says so. A layer has
    the name of the module that was heard: the experts, or the router where these are not told the choice (Llama 4;
    JetMoE, whose attention has one too). LongCat's identity experts, which have no weights, count as no expert. Memory
    without `path`: the trace itself, one to four bytes per choice. The hooks only note tensors, which are fetched when
    the pass is over. The model's training mode is restored and the hooks are removed, whatever happens.

    Raises ValueError where `sample` is not above 0 and at most 1, or the model has no MoE layer that tokens choose from
    (ViTPose's go by data set), no batch holds a token, a layer runs twice in one pass, or sees other tokens than
    input_ids has (an image's; a decoder's where decoder_input_ids is longer or shorter). TypeError where a batch is
    neither tensor nor dict. OSError where `path` cannot be written.

    >>> trace = headgate.record(model, [tokenizer("def main():", return_tensors="pt")])
    >>> trace.expert_ids.shape                                                    # L, T, K
    (16, 3, 8)
    """
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"record: max_tokens must be at least 1, got {max_tokens}")
    if not 0 < sample <= 1:
        raise ValueError(f"record: sample must be above 0 and at most 1, got {sample}")
    layers = dict(_moe_layers(model))
    if not layers:
        raise ValueError(f"record: model must have MoE layers, got a {type(model).__name__} without any")
    if isinstance(batches, Tensor | Mapping):
        batches = [batches]
    tape = _Tape(layers, weights, path)
    device = device_of(model)
    draw, left = np.random.default_rng(seed), max_tokens
    with evaluating(model), tape.listening(), torch.no_grad():
        for batch in batches:
            inputs = inputs_of(batch, device)
            rows = torch.from_numpy(draw.random(len(inputs["input_ids"])) < sample)
            tape.begin()
            if rows.any():
                model(**inputs)
            left = tape.end(inputs["input_ids"].shape, inputs.get("attention_mask"), rows, left)
            if left == 0:
                break
        return tape.trace()


class _Tape:
    """What the hooks write: one list of chunks for each layer that ran, or a file."""

    def __init__(
        self, layers: Mapping[str, nn.Module], keep_weights: bool, path: str | os.PathLike[str] | None
    ) -> None:
        self.layers = layers
        self.keep_weights = keep_weights
        self.path = path
        self.experts = {name: _num_experts(module) for name, module in layers.items()}
        self.dtype = id_type(max(self.experts.values()))
        self.now: dict[str, tuple[Tensor, Tensor | None]] = {}
        self.names: tuple[str, ...] = ()  # of the layers, in the order in which they ran
        self.chunks: list[tuple[NDArray, NDArray | None, NDArray[np.int32]]] = []
        self.writer: TraceWriter | None = None
        self.sequences = 0
        self.tokens = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        with ExitStack() as hooks:
            for name, module in self.layers.items():
                hooks.callback(self._attach(name, module).remove)
            try:
                yield
            except BaseException:
                if self.writer is not None:
                    self.writer.abandon()
                raise

    def _attach(self, name: str, module: nn.Module):
        choice = _own_choice if hasattr(module, "last_routing") else choice_of(module)
        assert choice is not None

        def after(module, args, kwargs, output):
            self._hear(name, *choice(module, args, kwargs, output))

        return module.register_forward_hook(after, with_kwargs=True)

    def _hear(self, name: str, ids: Tensor, weights: Tensor) -> None:
        if name in self.now:
            raise ValueError(f"record: every MoE layer must run once in a forward pass, got a second run of {name}")
        kept = weights.detach().flatten(0, -2) if self.keep_weights else None
        self.now[name] = (ids.detach().flatten(0, -2), kept)

    def begin(self) -> None:
        self.now = {}

    def end(self, shape: torch.Size, mask: Tensor | None, rows: Tensor, left: int | None) -> int | None:
        """Takes over one forward pass over `shape` [B, S] of which `rows` [B] are kept; returns how many tokens may
        still come."""
        keep = rows.repeat_interleave(shape[1])
        if mask is not None:
            keep &= mask.flatten().bool().cpu()
        if left is not None:
            keep &= keep.cumsum(0) <= left
        sequence = torch.arange(shape[0]).repeat_interleave(shape[1])[keep].numpy().astype(np.int32)
        if rows.any():
            self._keep(shape, keep, sequence + np.int32(self.sequences))
        self.now = {}
        self.sequences += shape[0]
        self.tokens += len(sequence)
        return None if left is None else left - len(sequence)

    def _keep(self, shape: torch.Size, keep: Tensor, sequence: NDArray[np.int32]) -> None:
        if self.names and self.now.keys() != set(self.names):
            odd = sorted(self.now.keys() ^ set(self.names))
            raise ValueError(f"record: every batch must run the same MoE layers, got {', '.join(odd)} in some only")
        self.names = self.names or tuple(self.now)
        top_k = max((ids.shape[1] for ids, _ in self.now.values()), default=0)
        none = np.iinfo(self.dtype).max
        chunk = np.full((len(self.names), len(sequence), top_k), none, self.dtype)
        kept = np.zeros(chunk.shape, np.float16) if self.keep_weights else None
        for layer, name in enumerate(self.names):
            ids, weights = self.now[name]
            if len(ids) != shape.numel():
                raise ValueError(
                    f"record: {name} must see the batch's tokens, got {len(ids)} for input_ids {tuple(shape)}"
                )
            ids = ids.cpu()[keep]
            no = (ids < 0) | (ids >= self.experts[name])
            chunk[layer, :, : ids.shape[1]] = ids.masked_fill(no, none).numpy()
            if kept is not None and weights is not None:
                kept[layer, :, : ids.shape[1]] = weights.cpu()[keep].float().masked_fill(no, 0).half().numpy()
        if self.path is None:
            self.chunks.append((chunk, kept, sequence))
        elif chunk.size:
            self.writer = self.writer or TraceWriter(
                self.path, weights=self.keep_weights, **self._frame(), layers=len(chunk), top_k=top_k
            )
            self.writer.append(chunk, kept, sequence)

    def _frame(self) -> dict[str, Any]:
        """The fields that do not depend on tokens."""
        experts = np.array([self.experts[name] for name in self.names], np.int32)
        differ = len(set(experts.tolist())) > 1
        return {
            "num_experts": int(experts.max()),
            "layer_names": self.names,
            "experts_of_layer": experts if differ else None,
        }

    def trace(self) -> Trace | TraceFile:
        if not self.tokens or not self.names:
            raise ValueError("record: batches must hold at least one token that reaches an MoE layer, got none")
        if self.writer is not None:
            return self.writer.close()
        ids, weights, sequence = zip(*self.chunks, strict=True)
        return Trace(
            expert_ids=np.concatenate(ids, axis=1),
            weights=np.concatenate(weights, axis=1) if self.keep_weights else None,
            sequence=np.concatenate(sequence),
            **self._frame(),
        )


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


def inputs_of(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """A batch as the arguments that a model is called with. Raises TypeError / ValueError for what is none."""
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
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for the time being; each module gets its own mode back (a frozen part may be in eval on purpose)."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
