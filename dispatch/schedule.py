"""Rows travel while something else is computed: a layer's tokens in chunks, whose transfers run beside the experts.

A transfer is two nodes of autograd's graph, one where it starts and one where somebody waits for it. In the backward
pass they change places: what was waited for starts the adjoint transfer, and the start waits for it. Autograd runs what
was made last first, so the backward pass is the forward pass's schedule read from its end, and needs none of its own.

One thread (on CUDA one stream) carries a schedule's transfers, in the order in which the caller starts them: it is the
same on every rank, however long each takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.routing import Routing
from ..kernels.uncompiled import uncompiled
from . import collectives
from .agreement import Agreement
from .protocol import Dispatcher

Compute = Callable[[Tensor, Routing], Tensor]
Beside = Sequence[Callable[[], None]]
_STOP = "_StopRecomputationError"  # torch.utils.checkpoint has all that it recomputes for: no fault


class Overlap:
    """Cuts a call's T tokens into `degree` chunks: one is computed while another's rows travel (Tutel, FSMoE).

        wire        D0  D1      C0  D2   C1  D3   C2      C3        Di, Ci: rows of chunk i there, and back
        computed    (yours)  E0      E1       E2       E3           Ei: its experts

    Shared experts and what the caller hands over (`beside`) are computed beside transfers too. In the backward pass all
    of it is read from the end.

    Outputs and gradients are those without a schedule, to rounding: an expert's product is over fewer rows at a time,
    and gradients of weights are sums over chunks. The first and the last chunk are half as large as the others, from
    degree 3 on: nothing runs beside their ways in and out. A rank may have fewer tokens than chunks, or none. `degree`
    must be the same on every rank. Each chunk is a call of the dispatcher, with its collectives; one of a number at the
    end makes an error in one rank's experts an error on all of them.

    Layers whose dispatchers share a process group must share one Overlap, and nothing else may use that group
    meanwhile: `parallelize(..., overlap=...)` sees to both. There is no second derivative.

    Raises ValueError / TypeError where `degree` is not a positive integer.
    """

    def __init__(self, degree: int = 4) -> None:
        if not isinstance(degree, int) or isinstance(degree, bool):
            raise TypeError(f"Overlap: degree must be an integer, got {degree!r}")
        if degree < 1:
            raise ValueError(f"Overlap: degree must be at least 1, got {degree}")
        self.degree, self._wires = degree, dict[torch.device, Any]()

    @uncompiled
    def run(self, dispatcher: Dispatcher, x: Tensor, routing: Routing, compute: Compute, beside: Beside = ()) -> Tensor:
        """y [T, D] of x [T, D]: combine(compute(dispatch(x))).

        `compute`: local rows [R, D] and their routing -> [R, D]. `beside`: up to two functions. The first is called
        while rows go to their experts, the second while the last come home. Raises what `compute` or they raised, on
        the rank where they did, and RuntimeError naming that rank on the others.
        """
        there, home = (*beside, _nothing, _nothing)[:2]
        run = _Run(self, dispatcher, x, routing, compute)
        run.do(there)
        run.compute()
        run.do(home)
        return run.finish()

    def wire(self, device: torch.device) -> Any:
        if device not in self._wires:
            self._wires[device] = _Stream(device) if device.type == "cuda" else ThreadPoolExecutor(1, "headgate-wire")
        return self._wires[device]

    def __deepcopy__(self, memo: object) -> Overlap:
        return self  # copies of a layer have its dispatcher's group

    def __getstate__(self) -> dict[str, int]:
        return {"degree": self.degree}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __repr__(self) -> str:
        return f"Overlap(degree={self.degree})"


class _Run:
    """One call of a layer on its way."""

    def __init__(self, overlap: Overlap, dispatcher: Dispatcher, x: Tensor, routing: Routing, compute: Compute) -> None:
        self._wire, self._dispatcher, self._compute = overlap.wire(x.device), dispatcher, compute
        self._chunks = list(_chunks(x, routing, overlap.degree))
        self._there: list[Flight] = []
        self._home: list[Flight] = []
        self._wrong: Exception | None = None
        for _ in range(2):  # the second goes before the first comes home
            self._send()

    def do(self, work: Callable[[], None]) -> None:
        """What is beside; after an error nothing."""
        if self._wrong is None:
            try:
                work()
            except Exception as error:
                self._wrong = error

    def compute(self) -> None:
        """The experts, chunk by chunk, as rows arrive; the results go home behind them."""
        for there in self._there:  # which grows
            rows, weights = there.wait()
            (local, ticket), there.beside = there.beside, None
            y = self._experts(rows, replace(local, weights=weights))
            combine = partial(self._dispatcher.combine, ticket=ticket)
            self._home.append(Flight(self._wire, lambda y, combine=combine: ((combine(y),), None), y))
            self._send()

    def finish(self) -> Tensor:
        """Waits for the rest."""
        failed = self._wire.submit(_failed, self._dispatcher, self._wrong, self._home[0].device)
        y = [home.wait()[0] for home in self._home]
        rank = failed.result()
        wrong, self._wrong = self._wrong, None
        try:
            if wrong is not None:
                raise wrong
        finally:
            del wrong  # its traceback has this frame
        if rank is not None:
            said = f"the experts of rank {rank} failed, or what is computed beside them"
            raise RuntimeError(f"Overlap: {said}; its own error says why")
        return torch.cat(y)

    def _send(self) -> None:
        if self._chunks:
            x, routing = self._chunks.pop(0)

            def dispatch(x: Tensor, weights: Tensor) -> tuple[tuple[Tensor, ...], Any]:
                rows, local, ticket = self._dispatcher.dispatch(x, replace(routing, weights=weights))
                return (rows, local.weights), (local, ticket)

            self._there.append(Flight(self._wire, dispatch, x, routing.weights))

    def _experts(self, rows: Tensor, local: Routing) -> Tensor:
        """compute(rows, local); after an error zeros, so that every rank's transfers come to their end."""
        if self._wrong is None:
            try:
                return self._compute(rows, local)
            except Exception as error:
                self._wrong = error
        return torch.zeros_like(rows)


class Flight:
    """One transfer: `move` of differentiable tensors -> (differentiable tensors, anything else), run on the wire.

    The graph holds it for the backward pass. So it holds no rows once it has been waited for, and nothing of the
    graph that it is in, which Python could not see through to let both go.
    """

    def __init__(self, wire: Any, move: Callable[..., tuple[tuple[Tensor, ...], Any]], *tensors: Tensor) -> None:
        self.device, self._wire = tensors[0].device, wire
        self._move: Any = move
        self._grad = torch.is_grad_enabled()
        self._token: Any = _Start.apply(self, *tensors)

    def wait(self) -> tuple[Tensor, ...]:
        token, self._token = self._token, None
        return _Wait.apply(self, token)

    def start(self, tensors: tuple[Tensor, ...], wanted: tuple[bool, ...]) -> None:
        self._future: Any = self._wire.submit(self._go, tensors, wanted)

    def _go(self, tensors: tuple[Tensor, ...], wanted: tuple[bool, ...]) -> tuple[tuple[Tensor, ...], list[bool], Any]:
        move, self._move = self._move, None
        with torch.set_grad_enabled(self._grad):
            root = torch.empty(0, requires_grad=True)
            leaves = [_Root.apply(root, t) if w else t.detach() for t, w in zip(tensors, wanted, strict=True)]
            outs, beside = move(*leaves)
        self._from, self._to = ([_edge(t) for t in of] for of in (leaves, outs))
        return tuple(t.detach() for t in outs), [t.requires_grad for t in outs], beside

    def arrived(self) -> tuple[tuple[Tensor, ...], list[bool]]:
        """What came, and which of it has a gradient."""
        future, self._future = self._future, None
        outs, differ, self.beside = future.result()
        return outs, differ

    def start_back(self, grads: tuple[Tensor, ...]) -> None:
        self._back: Any = self._wire.submit(self._go_back, grads)

    def _go_back(self, grads: tuple[Tensor, ...]) -> list[Tensor | None]:
        pairs = [(edge, g) for edge, g in zip(self._to, grads, strict=True) if edge is not None]
        wanted = [edge for edge in self._from if edge is not None]
        outs, given = zip(*pairs, strict=True)
        # The graph is kept: it holds the ways of rows and no row, and there may be a second pass.
        found = iter(torch.autograd.grad(outs, wanted, given, retain_graph=True, allow_unused=True))
        return [None if edge is None else next(found) for edge in self._from]

    def came_back(self) -> list[Tensor | None]:
        future, self._back = self._back, None
        return future.result()


def _edge(t: Tensor) -> Any:
    """Where a tensor's gradient is in the graph; None where it has none."""
    return torch.autograd.graph.get_gradient_edge(t) if t.requires_grad else None


class _Root(torch.autograd.Function):
    """A tensor at the beginning of a graph. Unlike a leaf's, its edge does not hold it."""

    @staticmethod
    def forward(ctx: Any, root: Tensor, t: Tensor) -> Tensor:
        return t.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flight: Flight, *tensors: Tensor) -> Tensor:
        ctx.flight = flight
        flight.start(tensors, ctx.needs_input_grad[1:])
        return tensors[0].new_empty(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.flight.came_back()


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flight: Flight, token: Tensor) -> tuple[Tensor, ...]:
        ctx.flight = flight
        outs, differ = flight.arrived()
        ctx.mark_non_differentiable(*(t for t, d in zip(outs, differ, strict=True) if not d))
        return outs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        ctx.flight.start_back(grads)
        return None, grads[0].new_empty(0)


class _Stream:
    """The wire of a CUDA device: a stream of its own, fed by the caller, who does not wait for the device."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def submit(self, job: Callable[..., Any], *args: Any) -> _Done:
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            for t in _tensors(args):
                t.record_stream(self._stream)
            found = job(*args)
        return _Done(found, self._stream.record_event())


class _Done:
    def __init__(self, found: Any, event: torch.cuda.Event) -> None:
        self._found, self._event = found, event

    def result(self) -> Any:
        stream = torch.cuda.current_stream()
        stream.wait_event(self._event)
        for t in _tensors(self._found):
            t.record_stream(stream)
        return self._found


def _nothing() -> None:
    pass


def _tensors(things: Any) -> Iterator[Tensor]:
    if isinstance(things, Tensor):
        yield from [things] if things.is_cuda else []
    elif isinstance(things, tuple | list):
        for thing in things:
            yield from _tensors(thing)
    elif isinstance(things, Routing):
        yield from _tensors([getattr(things, field.name) for field in fields(things)])


def _chunks(x: Tensor, routing: Routing, degree: int) -> Iterator[tuple[Tensor, Routing]]:
    """The first and the last of three and more are half as large: nothing runs beside their ways in and out."""
    halves = [2] * degree if degree < 3 else [1, *[2] * (degree - 2), 1]
    ends = [len(x) * done // sum(halves) for done in accumulate(halves)][:-1]
    parts = (t.tensor_split(ends) for t in (x, routing.expert_ids, routing.weights))
    for rows, ids, weights in zip(*parts, strict=True):
        yield rows, Routing(ids, weights, routing.num_experts, capacity=routing.capacity)


def _failed(dispatcher: Dispatcher, wrong: Exception | None, device: torch.device) -> int | None:
    """A rank whose experts failed in this call, or None: of all ranks that share the dispatcher's groups."""
    groups = list(_groups(dispatcher))  # none of a dispatcher of one process, which need not have joined any
    failed = wrong is not None and type(wrong).__name__ != _STOP
    here = dist.get_rank() + 1 if failed and groups else 0
    for group in groups:
        found = collectives.all_gather(torch.tensor([here], device=device), group)
        here = int(found.max())
    return here - 1 if here else None


def _groups(dispatcher: Any) -> Iterator[dist.ProcessGroup]:
    """The groups of a dispatcher and of those that it is made of, the inner ones first."""
    if isinstance(dispatcher, Agreement):
        yield dispatcher.group
        return
    for name in ("agreement", "inside", "across", "inner", "outer", "dispatcher"):
        part = getattr(dispatcher, name, None)
        if part is not None:
            yield from _groups(part)
