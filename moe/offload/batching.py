"""Generation for many prompts, module by module: micro-batches of attention, one batch of experts.

The experts of a layer are fetched once in a step, whoever needs them: the more tokens there are, the less a fetch costs
each. Attention cannot take as many at once. So the prompts run in micro-batches, each by a `generate` of its own, and
where one comes to the experts of a layer its rows wait, until those of all others are there (Xu et al., MoE-Gen, 2025).
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import ceil, inf
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...placement.caching.costs import Costs
from ..hf.table import BOUNDARY, choice_of

_OURS = ("input_ids", "inputs", "attention_mask", "num_return_sequences", "return_dict_in_generate", "streamer")


@dataclass(frozen=True)
class BatchSizes:
    """`micro_batch` sequences in one pass of attention, `at_once` micro-batches whose rows meet at the experts.

    `rows`: what an expert then gets in a step; `hidden`: the share of a layer's fetches that its computation covers."""

    micro_batch: int
    at_once: int
    rows: float
    hidden: float


def batch_sizes(
    costs: Costs,
    *,
    experts: int,
    top_k: int,
    slots: int = 0,
    disk: bool = False,
    memory_bytes: int,
    sequence_bytes: int,
    work_bytes: int,
    work_share: float = 0.125,
) -> BatchSizes:
    """How many sequences make a decode step's computation as long as its fetches, or as many as fit.

    experts, top_k   of a layer, `slots` of whose experts stay on the device; the others are fetched in each step, from
                     host memory, or with `disk` from disk. Tokens are taken to be spread evenly
    memory_bytes     of the device that are left for sequences
    sequence_bytes   of one sequence between steps: its keys and values at its full length
    work_bytes       of one sequence while it is in attention, more than that
    work_share       of `memory_bytes`, at most, for the latter (unless one sequence needs more)

    Raises ValueError naming argument, rule and value, also where not even one sequence fits.

    >>> from headgate.placement.cluster.links import Link
    >>> costs = Costs((1, 64), (1e-4, 4e-4), None, Link(0, 25), Link(0, 5), 10**7)  # 0.4 ms to fetch an expert
    >>> batch_sizes(costs, experts=8, top_k=2, memory_bytes=10**10, sequence_bytes=10**7, work_bytes=10**7)
    BatchSizes(micro_batch=124, at_once=3, rows=93.0, hidden=1.0)
    """
    given = {"experts": experts, "top_k": top_k, "memory_bytes": memory_bytes, "sequence_bytes": sequence_bytes}
    for name, value in given.items():
        _rule(value >= 1, name, "at least 1", value)
    _rule(top_k <= experts, "top_k", f"at most experts={experts}", top_k)
    _rule(0 <= slots <= experts, "slots", f"in 0 .. experts={experts}", slots)
    _rule(work_bytes >= 0, "work_bytes", "not negative", work_bytes)
    _rule(0 < work_share <= 1, "work_share", "above 0 and at most 1", work_share)
    least = sequence_bytes + work_bytes
    _rule(memory_bytes >= least, "memory_bytes", f"at least {least}, one sequence's", memory_bytes)
    fetch_s = (experts - slots) * (costs.copy_s() + (costs.read_s() if disk else 0.0))
    rows = costs.rows_in(fetch_s / experts)
    wanted = max(1, ceil(rows * experts / top_k)) if rows < inf else memory_bytes
    micro = max(1, int(work_share * memory_bytes) // max(1, work_bytes))
    micro = min(micro, wanted, memory_bytes // least)
    fits = (memory_bytes - micro * work_bytes) // sequence_bytes
    at_once = max(1, min(ceil(wanted / micro), fits // micro))
    rows = at_once * micro * top_k / experts
    computed_s = experts * float(costs.on_device(rows))
    return BatchSizes(micro, at_once, rows, min(1.0, computed_s / fetch_s) if fetch_s else 1.0)


def generate_offline(
    model: nn.Module,
    prompts: Sequence[Sequence[int] | Tensor],
    *,
    micro_batch: int,
    at_once: int | None = None,
    **generate: Any,
) -> list[Tensor]:
    """The tokens that a transformers model generates for each prompt: a list of int64 [new], in the order of `prompts`.

    prompts      token ids, one run of any length each; runs of similar length share a micro-batch, padded on the left
    micro_batch  prompts in one pass of attention
    at_once      micro-batches under way together (None: all); where one ends the next begins, its prompt beside the
                 others' next tokens. Each keeps its cache on the device as long as it runs
    generate     for `model.generate`: max_new_tokens, eos_token_id, do_sample, ...

    Every layer's experts are called once in a step, with the rows of all: with `headgate.offload` each is fetched once.
    Works on unmodified models too, whose experts are called at transformers' boundary. Greedy tokens are those of one
    batch, as far as rounding does not depend on a batch's size; ends of sequences (eos) are included, what pads them
    is not.

    One micro-batch computes at a time, each in a thread of its own. An error in one ends all, and is raised here.

    Raises ValueError / TypeError naming argument, rule and value before anything runs.

    >>> texts = generate_offline(model, prompts, micro_batch=16, max_new_tokens=256)
    """
    tokens = _checked(model, prompts, micro_batch, at_once, generate)
    doors = [module for module in model.modules() if choice_of(module) is BOUNDARY]
    if not doors:
        raise ValueError(
            "generate_offline: model must have experts called at transformers' boundary, got none in a "
            f"{type(model).__name__}"
        )
    order = sorted(range(len(tokens)), key=lambda i: -len(tokens[i]))
    parts = [order[i : i + micro_batch] for i in range(0, len(order), micro_batch)]
    ends = _eos_of(model, generate)
    made: dict[int, Tensor] = {}

    def work(part: list[int]) -> None:
        for i, new in zip(part, _generated(model, [tokens[i] for i in part], generate), strict=True):
            end = torch.isin(new, ends).nonzero()
            made[i] = new[: int(end[0]) + 1] if len(end) else new

    meet(doors, [lambda part=part: work(part) for part in parts], at_once)  # type: ignore[misc]
    return [made[i] for i in range(len(tokens))]


def _checked(model, prompts, micro_batch, at_once, generate) -> list[Tensor]:
    if not isinstance(model, nn.Module) or not hasattr(model, "generate"):
        raise TypeError(f"generate_offline: model must be a transformers model, got {type(model).__name__}")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"generate_offline: model must be a decoder only, got {type(model).__name__}")
    for name, value in (("micro_batch", micro_batch), ("at_once", at_once)):
        if value is not None and value < 1:
            raise ValueError(f"generate_offline: {name} must be at least 1, got {value}")
    taken = sorted(generate.keys() & set(_OURS))
    if taken:
        raise ValueError(f"generate_offline: generate must not hold {', '.join(_OURS)}, got {', '.join(taken)}")
    tokens = [torch.as_tensor(p) for p in prompts]
    for i, t in enumerate(tokens):
        if t.dim() != 1 or not len(t) or t.is_floating_point():
            raise ValueError(
                f"generate_offline: prompts must be runs of token ids, one or more each, got {tuple(t.shape)} "
                f"{t.dtype} for prompt {i}"
            )
    return tokens


def _eos_of(model: Any, generate: dict[str, Any]) -> Tensor:
    config = generate.get("generation_config") or model.generation_config
    found = generate.get("eos_token_id", config.eos_token_id)
    found = [] if found is None else found
    return torch.as_tensor(found, dtype=torch.long).reshape(-1)


def _generated(model: Any, tokens: Sequence[Tensor], generate: dict[str, Any]) -> Tensor:
    """int64 [B, new] on the CPU: what one `generate` adds to these prompts."""
    config = generate.get("generation_config") or model.generation_config
    pad = generate.get("pad_token_id", config.pad_token_id)
    longest = max(map(len, tokens))
    ids = torch.full((len(tokens), longest), 0 if pad is None else int(pad), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, t in enumerate(tokens):
        ids[row, longest - len(t) :], mask[row, longest - len(t) :] = t, 1
    out = model.generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), **generate)
    return out[:, longest:].cpu()


# --- where micro-batches meet ----------------------------------------------------------------------------------------


class _Call(NamedTuple):
    """Rows that wait at the experts of a layer."""

    door: int
    rows: Tensor
    ids: Tensor
    weights: Tensor


class _Abandoned(BaseException):
    """Ends a micro-batch that waits for others, one of which has failed. Not an Exception: nobody may swallow it."""


class _Worker(threading.Thread):
    """A piece of work that runs only while `go` waits for it: to its next call of experts, or to its end."""

    def __init__(self, work: Callable[[], None], like: Callable[[], ExitStack]) -> None:
        super().__init__(daemon=True)
        self.call: _Call | None = None
        self.error: BaseException | None = None
        self.done = self.abandoned = False
        self._work, self._like = work, like
        self._given: Tensor | None = None
        self._mine, self._back = threading.Semaphore(0), threading.Semaphore(0)

    def run(self) -> None:
        self._mine.acquire()
        try:
            with self._like():
                if not self.abandoned:
                    self._work()
        except BaseException as error:
            self.error = error
        finally:
            self.done = True
            self._back.release()

    def go(self, given: Tensor | None = None) -> None:
        """Called by the conductor."""
        self._given, self.call = given, None
        self._mine.release()
        self._back.acquire()

    def wait(self, call: _Call) -> Tensor:
        """Called by the worker: its experts' outputs, when the conductor has them."""
        if self.abandoned:
            raise _Abandoned
        self.call = call
        self._back.release()
        self._mine.acquire()
        if self.abandoned:
            raise _Abandoned
        assert self._given is not None
        given, self._given = self._given, None
        return given

    def abandon(self) -> None:
        self.abandoned = True
        self._mine.release()


def meet(doors: Sequence[nn.Module], works: Sequence[Callable[[], None]], at_once: int | None = None) -> None:
    """Runs all works, `at_once` under way together, one computing at a time; experts modules `doors`, in the order of
    the model, are called with the rows of all that came to them.

    Those who wait at the earliest door are served first, so that one who is behind catches up. An error ends all and
    is raised here, where the experts run. Other threads may use the model meanwhile.
    """
    waiting = list(reversed(works))
    under_way: list[_Worker] = []
    with _doors(doors) as inner, torch.no_grad():
        like = _same_modes()
        try:
            while waiting or under_way:
                while waiting and (at_once is None or len(under_way) < at_once):
                    worker = _Worker(waiting.pop(), like)
                    worker.start()
                    under_way.append(worker)
                    _advance(worker)
                    if worker.done:
                        under_way.pop()
                calls = [(w, w.call) for w in under_way if w.call]
                door = min((call.door for _, call in calls), default=0)
                here = [(w, call) for w, call in calls if call.door == door]
                for (worker, _), rows in zip(here, _served(inner[door], [c for _, c in here]), strict=True):
                    _advance(worker, rows)
                under_way = [w for w in under_way if not w.done]
        finally:
            for worker in under_way:
                worker.abandon()
            for worker in under_way:
                worker.join()


def _advance(worker: _Worker, given: Tensor | None = None) -> None:
    worker.go(given)
    if worker.error is not None:
        raise worker.error


def _served(experts: Callable[..., Tensor], calls: Sequence[_Call]) -> Sequence[Tensor]:
    """The rows of every call, from one call of the experts."""
    if not calls:
        return []
    rows, ids, weights = (torch.cat(parts) for parts in list(zip(*calls, strict=True))[1:])
    return experts(rows, ids, weights).split([len(call.rows) for call in calls])


@contextmanager
def _doors(modules: Sequence[nn.Module]) -> Iterator[list[Callable[..., Tensor]]]:
    """Lets workers wait at these modules; yields what the modules themselves do."""
    inner = [module.forward for module in modules]
    before = [vars(module).get("forward") for module in modules]
    try:
        for number, module in enumerate(modules):
            vars(module)["forward"] = _door(number, module, inner[number])
        yield inner
    finally:
        for module, own in zip(modules, before, strict=True):
            vars(module).pop("forward", None)
            if own is not None:
                vars(module)["forward"] = own


def _door(number: int, module: nn.Module, inner: Callable[..., Tensor]) -> Callable[..., Tensor]:
    names = tuple(inspect.signature(type(module).forward).parameters)[1:4]

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        worker = threading.current_thread()
        if not isinstance(worker, _Worker):
            return inner(*args, **kwargs)
        given = dict(zip(names, args, strict=False)) | kwargs
        hidden, ids, weights = (given.pop(name) for name in names)
        if given or len(args) > len(names):
            raise TypeError(f"generate_offline: experts must be called with {', '.join(names)}, got more")
        rows = hidden.reshape(-1, hidden.shape[-1])
        return worker.wait(_Call(number, rows, ids, weights)).reshape(hidden.shape)

    return forward


def _same_modes() -> Callable[[], ExitStack]:
    """What PyTorch keeps for each thread, as it is in this one: (in a thread) -> a context of the same."""
    inference = torch.is_inference_mode_enabled()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    kinds = {"cpu"} if device is None else {"cpu", device.type}
    casts = {kind: torch.get_autocast_dtype(kind) for kind in kinds if torch.is_autocast_enabled(kind)}
    stream = torch.cuda.current_stream() if torch.cuda.is_available() else None
    threads = torch.get_num_threads()

    def same() -> ExitStack:
        torch.set_num_threads(threads)
        stack = ExitStack()
        stack.enter_context(torch.inference_mode(inference))
        stack.enter_context(torch.set_grad_enabled(False))
        for kind, dtype in casts.items():
            stack.enter_context(torch.autocast(kind, dtype))
        if stream is not None:  # of the current device, which it brings along
            stack.enter_context(torch.cuda.stream(stream))
        return stack

    return same


def _rule(holds: bool, name: str, rule: str, value: object) -> None:
    if not holds:
        raise ValueError(f"batch_sizes: {name} must be {rule}, got {value}")
