"""replay: a model follows recorded routes, with gates recomputed from what its routers say now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..placement.traces.trace import Trace
from .forced import follow
from .layer import MoE
from .record import _moe_layers, _num_experts

_COMPOSED = {"DogeCDMoE": "which composes its choice of two halves"}


@contextmanager
def replay(model: nn.Module, trace: Trace, *, last: str = "recorded") -> Iterator[Replay]:
    """`with replay(model, trace):` every forward pass of `model` sends its tokens to the experts of `trace`,
    whatever its routers would choose now.

    model   a transformers MoE model, swapped or not, whose routers choose by torch.topk; or any model with
            `headgate.MoE` layers; or a part of one, as a pipeline stage has it, where the trace has the layers' names
    trace   of this model's layers, as `headgate.record` makes it, or `Trace` reads it from SGLang or vLLM. The first
            forward pass takes its first tokens, the next one those that follow; each passes the batch [B, S] that was
            recorded, or another number of whole sequences. Tokens with attention_mask 0 are not in the trace
    last    "live": a sequence's last token has no record, as a rollout's has not, and goes where its router says

    Weights are recomputed: from the live scores at the recorded experts, so that a gradient reaches the router as it
    does without replay, and where the live choice is the recorded one nothing changes, to the bit. A pair without an
    expert (the trace's "none") stays so in `headgate.MoE` layers. A forward pass that activation checkpointing runs
    again follows the same routes, in any order of several batches. Not under torch.compile.

    Gives the Replay, whose `left` says how many tokens of the trace were not yet used.

    Raises ValueError / TypeError naming argument, rule and value, at the start where the trace does not fit the model
    (layers, experts, physical ids of replicas) and in a forward pass where it does not fit the tokens (their number, K,
    an expert twice); RuntimeError where a router does not choose by one
    torch.topk over all experts (of 72 families in transformers 5.23: DBRX, DeepSeek-V4's hash layers, Doge, LongCat,
    NLLB, PhiMoE, Switch, Zaya).

    >>> trace = headgate.record(model, batch)
    >>> with headgate.replay(model, trace):
    ...     model(**batch, labels=batch["input_ids"]).loss.backward()
    """
    if not isinstance(trace, Trace):
        raise TypeError(f"replay: trace must be a Trace, got {type(trace).__name__}")
    if last not in ("recorded", "live"):
        raise ValueError(f"replay: last must be 'recorded' or 'live', got {last!r}")
    layers = dict(_moe_layers(model))
    if not layers:
        raise ValueError(f"replay: model must have MoE layers, got a {type(model).__name__} without any")
    for name, module in layers.items():
        why = _COMPOSED.get(type(module).__name__)
        if why is not None:
            raise TypeError(f"replay: {name} must choose among its experts, got {type(module).__name__}, {why}")
    lines = _lines(layers, trace)
    it = Replay(trace, last == "live", {name: _Line(name, n, _num_experts(layers[name])) for name, n in lines.items()})
    for line in it.lines.values():
        if trace.num_experts > line.experts and _highest(trace, line.index) >= line.experts:
            raise ValueError(
                f"replay: trace must name experts below {line.experts} in {line.name}, not physical ids of replicas, "
                f"got {_highest(trace, line.index)}"
            )
    with ExitStack() as stack:
        stack.enter_context(it.watching(model))
        for name, module in layers.items():
            if isinstance(module, MoE):
                stack.enter_context(follow(module, it.route_of(it.lines[name])))
            else:
                stack.enter_context(_Listener.around(_chooser(model, name, module), it, it.lines[name]))
        yield it


@dataclass
class _Line:
    """A layer: its place in the trace, how far it has come, and what is still to be run again."""

    name: str
    index: int
    experts: int
    at: int = 0
    taken: list[tuple[tuple[float, ...], Tensor]] = field(default_factory=list)


class Replay:
    """What a `replay` is at: see there."""

    def __init__(self, trace: Trace, live: bool, lines: Mapping[str, _Line]) -> None:
        self.lines = lines
        self._live = live
        self._mask: Tensor | None = None
        self._shape: torch.Size | None = None
        ids = trace.expert_ids.astype(np.int64)
        ids[trace.expert_ids == trace.none] = -1
        self._ids = torch.from_numpy(ids)

    @property
    def left(self) -> int:
        """Tokens of the trace that the slowest layer has not used."""
        return self._ids.shape[1] - min(line.at for line in self.lines.values())

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Notes the attention mask of each forward pass, and how many sequences it has."""

        def before(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            given = (kwargs.get("attention_mask"), kwargs.get("input_ids", args[0] if args else None))
            mask, ids = (t if isinstance(t, Tensor) and t.dim() == 2 else None for t in given)
            self._mask, self._shape = mask, None if ids is None else ids.shape

        handle = model.register_forward_pre_hook(before, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def ids_for(self, line: _Line, seen: Tensor, top_k: int, sequences: int) -> Tensor:
        """Recorded ids [T, K] of the tokens that a layer sees, which `seen` [T, .] tells apart from others'; -2 where a
        token has no record, -1 where it has no expert."""
        key = _key(seen)
        if torch._C._current_graph_task_id() != -1:  # run again, inside a backward pass
            for i, (known, ids) in enumerate(line.taken):
                if known == key:
                    line.taken.pop(i)
                    return ids.to(seen.device)
            raise RuntimeError(
                f"replay: {line.name} must run again with what it saw in its forward pass, got other rows"
            )
        here = torch.ones(len(seen), dtype=torch.bool)
        if self._mask is not None and self._mask.numel() == len(seen):
            here = self._mask.flatten().bool().cpu()
            sequences = len(self._mask)
        elif self._shape is not None and self._shape.numel() == len(seen):
            sequences = self._shape[0]
        if self._live:
            here = _without_last(here, sequences)
        tokens = int(here.sum())
        if line.at + tokens > self._ids.shape[1]:
            left = self._ids.shape[1] - line.at
            raise ValueError(f"replay: trace must have {tokens} tokens more for {line.name}, got {left} left of it")
        if self._ids.shape[2] < top_k or (self._ids[line.index, :, top_k:] >= 0).any():
            raise ValueError(f"replay: trace must have K = {top_k} for {line.name}, got {self._ids.shape[2]}")
        found = self._ids[line.index, line.at : line.at + tokens, :top_k]
        self._check(line, found)
        ids = torch.full((len(seen), top_k), -2)
        ids[here] = found
        line.at += tokens
        if torch.is_grad_enabled() or seen.requires_grad:
            line.taken.append((key, ids))
        else:
            line.taken = [*line.taken[-63:], (key, ids)]  # reentrant checkpointing runs forward without gradients
        return ids.to(seen.device)

    def _check(self, line: _Line, ids: Tensor) -> None:
        ordered = ids.sort(1).values
        twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(1).nonzero()
        if len(twice):
            token = line.at + int(twice[0])
            raise ValueError(
                f"replay: trace must name an expert once for a token, got one twice for token {token} of {line.name}"
            )

    def route_of(self, line: _Line):
        """What a MoE layer does with its Routing."""

        def route(layer: MoE, routing, tokens: Tensor, sequences: int):
            router: Any = layer.router
            if not hasattr(router, "at") or getattr(router, "free", None) is not None:
                rule = "a router with a method `at`, and without experts that a trace does not know"
                raise TypeError(f"replay: {line.name} must have {rule}, got {type(router).__name__}")
            ids = self.ids_for(line, tokens, self._width(line, layer), sequences)
            return router.at(routing, ids)

        return route

    def _width(self, line: _Line, layer: MoE) -> int:
        """K of the layer; of a router that takes as many as it likes, what the trace has."""
        return layer.top_k if getattr(layer.router, "fixed_k", True) else self._ids.shape[2]


class _Listener(TorchFunctionMode):
    """Inside the forward pass of a block: its torch.topk over all experts answers with the recorded ones."""

    def __init__(self, replay: Replay, line: _Line) -> None:
        super().__init__()
        self.replay, self.line, self.answered = replay, line, 0

    @classmethod
    @contextmanager
    def around(cls, chooser: nn.Module, replay: Replay, line: _Line) -> Iterator[None]:
        open_now: list[_Listener] = []

        def before(*_: object) -> None:
            open_now.append(cls(replay, line))
            open_now[-1].__enter__()

        def after(*_: object) -> None:
            mode = open_now.pop()
            mode.__exit__(None, None, None)
            if mode.answered != 1:
                rule = "choose its experts by one torch.topk over all of them"
                raise RuntimeError(f"replay: {line.name} must {rule}, got {mode.answered}")

        handles = [chooser.register_forward_pre_hook(before), chooser.register_forward_hook(after)]
        try:
            yield
        finally:
            while open_now:
                open_now.pop().__exit__(None, None, None)
            for handle in handles:
                handle.remove()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.topk, Tensor.topk):
            scores = args[0] if args else kwargs["input"]
            k = args[1] if len(args) > 1 else kwargs["k"]
            if scores.shape[-1] == self.line.experts and k <= scores.shape[-1] and scores.dim() in (2, 3):
                self.answered += 1
                return self._answer(func(*args, **kwargs), scores, k)
        return func(*args, **kwargs)

    def _answer(self, live, scores: Tensor, k: int):
        indices = live[1]
        flat = scores.reshape(-1, scores.shape[-1])
        ids = self.replay.ids_for(self.line, flat.detach(), k, scores.shape[0] if scores.dim() == 3 else 1)
        ids = ids.view(indices.shape)
        if (ids == -1).any():
            raise ValueError(
                f"replay: trace must name all {k} experts of a token in {self.line.name}, got none for some"
            )
        ids = torch.where(ids < 0, indices, ids)
        return torch.return_types.topk((scores.gather(-1, ids), ids))


def _chooser(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """The module inside whose forward pass the choice of the layer `name` is made: the block around the experts, or the
    router itself, where it is the router that was heard."""
    held = any(parameter.dim() == 3 for parameter in module.parameters())
    return model.get_submodule(name.rpartition(".")[0]) if held else module


def _lines(layers: Mapping[str, nn.Module], trace: Trace) -> dict[str, int]:
    """Which layer of the trace belongs to which of the model."""
    count, names = trace.expert_ids.shape[0], list(trace.layer_names)
    if names and all(name in names for name in layers):
        return {name: names.index(name) for name in layers}
    if len(layers) != count:
        known = f" named {', '.join(names[:2])}, ..." if names else ""
        raise ValueError(f"replay: trace must have the {len(layers)} MoE layers of the model, got {count}{known}")
    return {name: i for i, name in enumerate(layers)}


def _highest(trace: Trace, layer: int) -> int:
    ids = trace.expert_ids[layer]
    ids = ids[ids != trace.none]
    return int(ids.max()) if ids.size else -1


def _key(seen: Tensor) -> tuple[float, ...]:
    """Tells one batch's rows at a layer from another's; the same rows, run again, give the same."""
    rows = seen.detach().double()
    return (*map(float, seen.shape), float(rows.sum()), *rows.flatten()[:4].tolist(), *rows.flatten()[-4:].tolist())


def _without_last(here: Tensor, sequences: int) -> Tensor:
    """`here` bool [T] of S sequences without the last one of each that is there."""
    rows = here.view(max(sequences, 1), -1)
    last = rows.int().cumsum(1) == rows.int().sum(1, keepdim=True)
    return (rows & ~last).flatten()
