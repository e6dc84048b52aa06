"""One case on one device: every contestant checked, timed in turn, summed up for JSON.

On a GPU it runs in a process of its own: an illegal access there ends every later call of the process.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.chip import Chip, chip_of
from ...kernels.grouped_ffn import grouped_ffn_reference
from ..bounds import Matmuls
from ..check import TOLERANCE, WrongNumbers, _compare
from ..memory import saved_bytes
from ..rivals import Forward
from ..shapes import DTYPES, Problem, Shape, make_parameters
from . import packed, rivals
from .check import check, truth_of
from .rivals import RIVALS, NotServed
from .roofline import DECODE
from .shapes import choice_of, experts_hit, problem_on
from .timing import Clock, Entry, captured, interleave, statistics_of

KINDS = ("train", "decode", "layer", "packed")
MOST_COPIED_BYTES = 16e9


@dataclass(frozen=True)
class Case:
    """`kind`: train (forward and backward), decode (forward of few tokens), layer (headgate.MoE with its router),
    packed (weights of each format of few bits, see packed.py; forward, and backward to rows of more than a few)."""

    shape: Shape
    tokens: int
    kind: str
    contestants: tuple[str, ...] = tuple(RIVALS)
    budget_s: float = 2.0
    dtype: str = "bf16"

    @property
    def key(self) -> str:
        return f"{self.shape.name}/{self.tokens}/{self.kind}"


class Measurer:
    """Keeps the last weights between cases. `progress`: a file that names what is being run, for whoever finds this
    process dead."""

    def __init__(self, device: str, progress: Path | None = None) -> None:
        self.device, self.clock, self.progress = device, Clock(device), progress
        self._weights: tuple[Any, dict[str, nn.Parameter]] = (None, {})

    def run(self, case: Case, leave_out: dict[str, str] | None = None) -> dict[str, Any]:
        """The case's results: contestants (name -> times, or `absent`, `skipped`, `refused`, `failed` with the reason),
        saved and peak bytes. `leave_out`: name -> why it must not run."""
        begin = time.perf_counter()
        found: dict[str, Any] = {
            "shape": case.shape.name, "tokens": case.tokens, "pass": case.kind, "dtype": case.dtype,
            "sizes": case.shape.sizes(), "experts_hit": experts_hit(case.shape, case.tokens), "contestants": {},
        }  # fmt: skip
        try:
            with torch.inference_mode(False):
                {"train": self._train, "decode": self._decode, "layer": self._layer, "packed": self._packed}[case.kind](
                    case, found, leave_out or {}
                )
        except torch.OutOfMemoryError as error:
            found["failed"] = _said(error)
        self._say("")
        gc.collect()
        if self.clock.cuda:
            torch.cuda.synchronize()  # an error that no later call survives shows here
            torch.cuda.empty_cache()
        return found | {"seconds": time.perf_counter() - begin}

    def _say(self, what: str) -> None:
        if self.progress is not None:
            self.progress.write_text(what)

    def _failed(self, error: Exception) -> dict[str, str]:
        """The reason for JSON. After an error that takes the device with it this process is of no further use: it ends,
        and whoever waits for it reads in `progress` who ran."""
        if self.clock.cuda and _lost():
            os._exit(3)
        return _reason(error)

    def _problem(self, case: Case, calls: int) -> Problem:
        key, dtype = (case.shape, case.dtype), DTYPES[case.dtype]
        if self._weights[0] != key:
            self._weights = (None, {})
            self._free()
            self._weights = (key, make_parameters(case.shape, dtype, self.device))
        seed = time.time_ns() % 2**31
        return problem_on(self.device, case.shape, case.tokens, self._weights[1], calls=calls, seed=seed, dtype=dtype)

    def _free(self) -> None:
        gc.collect()
        if self.clock.cuda:
            torch.cuda.empty_cache()

    def _enter(
        self, case: Case, found: dict[str, Any], leave_out: dict[str, str], enter: Callable[[str], Entry]
    ) -> dict[str, Entry]:
        """Checks and warms up every contestant; what cannot take part is noted with the reason."""
        entries: dict[str, Entry] = {}
        for name in case.contestants:
            why = self._left_out(case, name, leave_out)
            if why is None:
                self._say(name)
                begin = time.perf_counter()
                try:
                    entries[name] = enter(name)
                    found["contestants"][name] = {}  # holds its place
                except Exception as error:
                    why = self._failed(error)
                found.setdefault("start_s", {})[name] = time.perf_counter() - begin
                self._free()
            if why is not None:
                found["contestants"][name] = why
        return entries

    def _left_out(self, case: Case, name: str, leave_out: dict[str, str]) -> dict[str, str] | None:
        if name in leave_out:
            return {"failed": leave_out[name]}
        if case.kind == "packed":
            return None
        rival, few = RIVALS[name], case.tokens <= DECODE
        reason = rivals.absent(name)
        if reason is not None:
            return {"absent": reason}
        if rival.most_tokens is not None and case.tokens > rival.most_tokens:
            return {"skipped": f"needs too much for more than {rival.most_tokens} tokens"}
        if case.tokens < rival.fewest_tokens:
            return {"skipped": f"is not made for fewer than {rival.fewest_tokens} tokens"}
        copied = case.tokens * case.shape.top_k * case.shape.expert_elements * DTYPES[case.dtype].itemsize
        if name == "hf-batched" and copied > MOST_COPIED_BYTES:
            return {"skipped": f"copies {copied / 1e9:.0f} GB of weights for each call"}
        if name == "hf-eager" and not few and case.shape.experts > 128:
            return {"skipped": "a loop over more than 128 experts on the host"}
        return None

    def _time(self, case: Case, found: dict[str, Any], entries: dict[str, Entry]) -> None:
        def failed(name: str, error: Exception) -> None:
            found["contestants"][name] = self._failed(error)

        found["rounds"] = interleave(entries, self.clock, case.budget_s, failed=failed, say=self._say)
        for name, entry in entries.items():
            if entry.samples and "failed" not in found["contestants"].get(name, {}):
                times = {step: statistics_of(samples) for step, samples in entry.samples.items()}
                more = {"note": entry.note} if entry.note else {}
                found["contestants"][name] = found["contestants"].get(name, {}) | times | more

    # --- training ---------------------------------------------------------------------------------------------------

    def _train(self, case: Case, found: dict[str, Any], leave_out: dict[str, str]) -> None:
        problem = self._problem(case, calls=1)
        truth = truth_of(problem, train=True)
        self._free()
        ids, weights = problem.routings[0]
        leaves = problem.leaves

        def enter(name: str) -> Entry:
            forward, trains = RIVALS[name].build(problem), RIVALS[name].trains
            check(problem, forward, truth, case.dtype, train=trains)
            self._memory(problem, name, forward, found, trains)

            def ahead(_: Any) -> Tensor:
                with torch.set_grad_enabled(trains):
                    return forward(problem.x, ids, weights)

            def back(y: Tensor) -> object:
                return torch.autograd.grad(y, leaves, problem.grad, allow_unused=True)

            return Entry({"forward": ahead, "backward": back} if trains else {"forward": ahead})

        entries = self._enter(case, found, leave_out, enter)
        self._add_dense(problem, entries, found)
        self._time(case, found, entries)
        found["expected_saved_bytes"] = problem.bytes_kept()

    def _add_dense(self, problem: Problem, entries: dict[str, Entry], found: dict[str, Any]) -> None:
        """The same FLOPs as one matmul of cuBLAS per projection."""
        try:
            dense = Matmuls(problem, train=True, dense=True)
        except torch.OutOfMemoryError as error:
            found["contestants"]["cublas"] = _reason(error)
            return
        ahead_only = Matmuls.__new__(Matmuls)
        ahead_only.__dict__.update(dense.__dict__ | {"train": False})

        def back(_: Any) -> None:
            with torch.no_grad():
                dense._backward(dense.calls[0])

        dense(0)
        entries["cublas"] = Entry({"forward": lambda _: ahead_only(0), "backward": back})

    def _memory(self, problem: Problem, name: str, forward: Forward, found: dict[str, Any], trains: bool) -> None:
        """Bytes that autograd keeps, exactly; the highest allocation of a step above what lies there before it."""
        if not trains:
            return
        found.setdefault("saved_bytes", {})[name] = saved_bytes(problem, forward)
        if not self.clock.cuda:
            return
        self._free()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y = forward(problem.x, *problem.routings[0])
        grads = torch.autograd.grad(y, problem.leaves, problem.grad, allow_unused=True)
        peak = torch.cuda.max_memory_allocated() - before
        given = sum(g.nbytes for g in grads if g is not None)
        found.setdefault("peak_bytes", {})[name] = {"step_bytes": peak, "gradient_bytes": given}

    # --- decoding ---------------------------------------------------------------------------------------------------

    def _decode(self, case: Case, found: dict[str, Any], leave_out: dict[str, str]) -> None:
        calls = 16 if case.tokens <= 8 else 8
        problem = self._problem(case, calls)
        truth = truth_of(problem)
        found["calls"] = calls
        found["weight_bytes"] = problem.bytes_hit()

        def enter(name: str) -> Entry:
            forward = RIVALS[name].build(problem)
            check(problem, forward, truth, case.dtype)

            def run(_: Any = None) -> object:
                with torch.no_grad():
                    return [forward(problem.x, *routing) for routing in problem.routings]

            return self._graph(run, calls, RIVALS[name].graphs)

        entries = self._enter(case, found, leave_out, enter)
        self._time(case, found, entries)

    def _graph(self, run: Callable[..., object], calls: int, may: bool) -> Entry:
        run()
        if not self.clock.cuda:
            return Entry({"forward": run}, calls)
        if not may:
            return Entry({"forward": run}, calls, note="waits for the GPU or its host: no CUDA graph")
        replay = captured(run)
        replay()
        torch.cuda.synchronize()
        return Entry({"forward": lambda _: replay()}, calls)

    def _layer(self, case: Case, found: dict[str, Any], leave_out: dict[str, str]) -> None:
        """headgate.MoE as decoding calls it: layer after layer, each with weights and a token of its own."""
        from ...moe.layer import MoE

        layers, calls = (4, 16) if self.clock.cuda else (2, 2)
        self._weights = (None, {})
        self._free()
        s, dtype = case.shape, DTYPES[case.dtype]
        options = {k: v for k, v in choice_of(s).options.items() if k != "score"}
        if choice_of(s).options.get("score") == "topk_softmax":
            options["order"] = "topk_softmax"
        where: dict[str, Any] = {"device": self.device, "dtype": dtype}
        stack = [
            MoE(
                s.hidden, s.intermediate, s.experts, s.top_k, activation=s.form, bias=s.bias, router="softmax",
                router_options=options, **where,
            ).eval()
            for _ in range(layers)
        ]  # fmt: skip
        xs = [torch.randn(case.tokens, s.hidden, **where) for _ in range(calls)]

        def run(_: Any = None) -> object:
            with torch.no_grad():
                return [stack[i % layers](x) for i, x in enumerate(xs)]

        def enter(_: str) -> Entry:
            _check_layer(stack[0], xs[0], case)
            return self._graph(run, calls, may=True)

        found["calls"] = calls
        entries = self._enter(replace(case, contestants=("headgate",)), found, leave_out, enter)
        self._time(case, found, entries)

    # --- weights in few bits ----------------------------------------------------------------------------------------

    def _packed(self, case: Case, found: dict[str, Any], leave_out: dict[str, str]) -> None:
        self._weights = (None, {})
        self._free()
        calls = 1 if case.tokens > DECODE else 16 if case.tokens <= 8 else 8
        shape, dtype = case.shape, DTYPES[case.dtype]
        drawn = problem_on(self.device, shape, case.tokens, {}, calls=calls, dtype=dtype)
        routings = [(ids, w.detach()) for ids, w in drawn.routings]
        found["calls"], grad = calls, drawn.grad if calls == 1 else None
        hit, sizes = sum(len(ids.unique()) for ids, _ in routings) / calls, {}

        def enter(name: str) -> Entry:
            forward, p = packed.few_bits(name, shape, case.tokens, case.dtype, self.device)
            packed.check(forward, p, shape, drawn.x, routings[0], case.dtype, grad)
            sizes[name] = {"weight_bytes": packed.bytes_of(p, hit, shape.experts)}
            if calls == 1:
                leaf = drawn.x.detach().requires_grad_()
                return Entry({
                    "forward": lambda _: forward(leaf, *routings[0]),
                    "backward": lambda y: torch.autograd.grad(y, leaf, drawn.grad),
                })  # fmt: skip

            def run(_: Any = None) -> object:
                with torch.no_grad():
                    return [forward(drawn.x, *routing) for routing in routings]

            return self._graph(run, calls, may=True)

        entries = self._enter(case, found, leave_out, enter)
        self._time(case, found, entries)
        for name, size in sizes.items():
            found["contestants"][name] |= size


def _check_layer(layer: Any, x: Tensor, case: Case) -> None:
    """The layer's output beside the reference on the layer's own choice."""
    with torch.no_grad():
        y = layer(x)
        routing, e = layer.last_routing, layer.experts
        hit, local = torch.unique(routing.expert_ids, return_inverse=True)
        w1, w2, b1, b2 = (None if t is None else t[hit].float() for t in _weights(e))
        assert w1 is not None
        assert w2 is not None
        weights = routing.weights.float()
        want = grouped_ffn_reference(x.float(), local, weights, w1, w2, b1, b2, activation=case.shape.form)
    _compare("output of the layer", y, want, TOLERANCE[case.dtype])


def _weights(experts: Any) -> tuple[Tensor | None, ...]:
    return experts.w_gate_up, experts.w_down, experts.b_gate_up, experts.b_down


def ceilings(device: str, size: int = 2**31) -> dict[str, Any]:
    """What this device really does: bytes copied per second (read and written both counted), and the matrix rate of the
    vendor's library on random data."""
    clock = Clock(device)
    side = 8192 if clock.cuda else 128
    size = size if clock.cuda else 2**22
    source, target = (torch.randn(size // 4, device=device) for _ in range(2))
    a, b = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))
    c = torch.empty_like(a)
    entries = {
        "copy": Entry({"forward": lambda _: target.copy_(source)}),
        "matmul": Entry({"forward": lambda _: torch.mm(a, b, out=c)}),
    }
    for entry in entries.values():
        entry.steps["forward"](None)
    interleave(entries, clock, 1.0, (10, 30) if clock.cuda else (3, 3))
    copy, matmul = (statistics_of(entries[n].samples["forward"]) for n in ("copy", "matmul"))
    return {
        "copy_GBps": 2 * size / copy["median_us"] / 1e3,
        "matmul_TFLOPs": 2 * side**3 / matmul["median_us"] / 1e6,
        "copy_bytes": size, "matmul_side": side, "copy": copy, "matmul": matmul,
    }  # fmt: skip


def about(device: str) -> dict[str, Any]:
    """The device and every contestant: version, or why it is not here."""
    found: dict[str, Any] = {"device": device, "present": {}, "absent": {}}
    if device.startswith("cuda"):
        p = torch.cuda.get_device_properties(0)
        found |= {
            "name": p.name, "capability": f"{p.major}.{p.minor}", "processors": p.multi_processor_count,
            "memory_bytes": p.total_memory, "l2_bytes": getattr(p, "L2_cache_size", None), "cuda": torch.version.cuda,
        }  # fmt: skip
    for name in RIVALS:
        why = rivals.absent(name)
        if why is None:
            found["present"][name] = rivals.version_of(name)
        else:
            found["absent"][name] = why
    return found


def chip_here(device: str) -> Chip | None:
    return chip_of(0) if device.startswith("cuda") else None


def _said(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def _reason(error: Exception) -> dict[str, str]:
    if isinstance(error, WrongNumbers):
        return {"refused": str(error)}
    if isinstance(error, NotServed):
        return {"skipped": str(error)}
    return {"failed": _said(error)}


# --- the process of its own ------------------------------------------------------------------------------------------

_HERE: dict[str, Measurer] = {}


def start(device: str, progress: str | None) -> None:
    """Makes this process the one that measures."""
    if not device.startswith("cuda"):
        torch.set_num_threads(1)  # tiny shapes: more threads wait for each other
    _HERE["it"] = Measurer(device, Path(progress) if progress else None)


def measure(case: Case, leave_out: dict[str, str]) -> dict[str, Any]:
    """`Measurer.run` in the process that `start` made. Ends the process where the device is lost."""
    try:
        return _HERE["it"].run(case, leave_out)
    except Exception as error:
        if _HERE["it"].clock.cuda and _lost():
            os._exit(3)
        return {
            "shape": case.shape.name, "tokens": case.tokens, "pass": case.kind, "sizes": case.shape.sizes(),
            "contestants": {}, "failed": _said(error),
        }  # fmt: skip


def _lost() -> bool:
    try:
        torch.cuda.synchronize()
        torch.ones(8, device="cuda").sum().item()
    except Exception:
        return True
    return False
