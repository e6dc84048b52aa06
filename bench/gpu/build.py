"""Builds Triton kernels ahead of time for a chip that is not there, and reads what the compiler made of them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from ...kernels.chip import Chip
from .. import children
from .record import Launched

Spec = tuple[Any, ...]
_WIDE = 2**31


@dataclass(frozen=True)
class Job:
    """One kernel as the compiler tells it from others: everything that changes the machine code, and nothing else."""

    module: str
    name: str
    chip: Chip
    warps: int
    stages: int
    arguments: tuple[tuple[str, Spec], ...]

    def __str__(self) -> str:
        constants = [f"{n}={v}" for n, (kind, *v) in self.arguments if kind == "constant" for v in v]
        return f"{self.name}[{self.warps} warps, {self.stages} stages; {', '.join(constants)}]"


def job_of(launched: Launched, chip: Chip) -> Job:
    kernel = launched.kernel
    constant = {p.name for p in kernel.params if p.is_constexpr}
    arguments = tuple(sorted((n, _spec(a, n in constant)) for n, a in launched.arguments.items()))
    return Job(kernel.fn.__module__, kernel.fn.__name__, chip, launched.warps, launched.stages, arguments)


def _spec(value: Any, constant: bool) -> Spec:
    if constant:
        return "constant", value
    if isinstance(value, torch.Tensor):
        return "tensor", str(value.dtype)[6:]
    if hasattr(value, "block_shape"):
        return "map", str(value.base.dtype)[6:], tuple(value.block_shape)
    if isinstance(value, int) and not isinstance(value, bool):  # 1 and multiples of 16 get code of their own
        return "int", 1 if value == 1 else (_WIDE if abs(value) >= _WIDE else 0) + (16 if value % 16 == 0 else 3)
    return type(value).__name__, value


def _value(spec: Spec) -> Any:
    kind, *rest = spec
    if kind == "tensor":
        return torch.empty(16, dtype=getattr(torch, rest[0]), device="meta")
    if kind == "map":
        from ...kernels.launch import tensor_map

        return tensor_map(
            torch.empty([max(16, n) for n in rest[1]], dtype=getattr(torch, rest[0]), device="meta"), rest[1]
        )
    return rest[0]


class _Driver:
    """Stands where Triton looks for a GPU. The device's number is the capability: Triton keeps kernels by device."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, _device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda")


def build(job: Job) -> dict[str, Any]:
    """Compiles one job in this process. {kernel, chip, sm, what, registers, stack_bytes, spill_bytes,
    shared_bytes, shared_limit, wgmma, mma, tcgen05, tma, cp_async, seconds}; the first three counts are None where no
    cuobjdump can tell; `error` where it does not compile."""
    begin = time.perf_counter()
    about = {"kernel": job.name, "chip": job.chip.name, "sm": job.chip.capability, "what": str(job)}
    try:
        compiled = _compile(job)
    except Exception as error:  # the compiler's errors have no common class
        said = " ".join(f"{type(error).__name__}: {error}".split())
        return about | {"error": said[-600:], "seconds": time.perf_counter() - begin}
    ptx = compiled.asm["ptx"]
    return about | _resources(compiled.asm["cubin"], ptx) | {
        "shared_bytes": compiled.metadata.shared,
        "shared_limit": job.chip.shared_bytes,
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma": len(re.findall(r"\bmma\.sync", ptx)),
        "tcgen05": ptx.count("tcgen05.mma"),
        "tma": ptx.count("cp.async.bulk.tensor"),
        "cp_async": len(re.findall(r"cp\.async\.c[ag]\.", ptx)),
        "seconds": time.perf_counter() - begin,
    }  # fmt: skip


def _compile(job: Job) -> Any:
    from triton.runtime import driver

    driver.set_active(_Driver(job.chip.capability))
    kernel = getattr(import_module(job.module), job.name)
    arguments = {name: _value(spec) for name, spec in job.arguments}
    compiled = kernel.warmup(grid=(1,), num_warps=job.warps, num_stages=job.stages, **arguments)
    return compiled.result() if hasattr(compiled, "result") else compiled


@cache
def _tool(name: str) -> str | None:
    """One of the compiler's tools: the one inside the triton wheel, else CUDA's own."""
    import triton

    inside = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return str(inside) if inside.exists() else shutil.which(name)


def cuobjdump() -> str | None:
    return _tool("cuobjdump")


def _resources(cubin: bytes, ptx: str) -> dict[str, int | None]:
    """Registers of a thread, bytes of its stack, and how many of them ptxas writes for want of registers (a stack
    without spills holds an array that is indexed)."""
    unknown: dict[str, int | None] = {"registers": None, "stack_bytes": None, "spill_bytes": None}
    tool = cuobjdump()
    if tool is None:
        return unknown
    found = re.search(r"REG:(\d+) STACK:(\d+)", _run_on(cubin, ".cubin", [tool, "-res-usage"]))
    if not found:
        return unknown
    registers, stack = int(found[1]), int(found[2])
    return {"registers": registers, "stack_bytes": stack, "spill_bytes": _spills(ptx, stack) if stack else 0}


def _spills(ptx: str, stack: int) -> int:
    """Bytes that ptxas says it stores for want of registers; all of the stack where it cannot be asked."""
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    blackwell = target is not None and target[1].removeprefix("sm_").rstrip("af") in (
        "100",
        "101",
        "103",
        "110",
        "120",
        "121",
    )
    tool = (_tool("ptxas-blackwell") if blackwell else None) or _tool("ptxas")
    if tool is None or target is None:
        return stack
    said = _run_on(ptx.encode(), ".ptx", [tool, "-v", f"-arch={target[1]}", "-o", os.devnull])
    found = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    return max(int(found[1]), int(found[2])) if found else stack


def _run_on(content: bytes, suffix: str, command: list[str]) -> str:
    """What a tool says about a file of this content."""
    with tempfile.NamedTemporaryFile(suffix=suffix) as file:
        file.write(content)
        file.flush()
        done = subprocess.run([*command, file.name], capture_output=True, text=True, timeout=120)
    return done.stdout + done.stderr


def build_all(jobs: Sequence[Job], processes: int) -> Iterator[dict[str, Any]]:
    """`build` of every job in processes of their own, in the order they finish. A compiler that dies with its process
    (a failed assertion) costs its own job alone."""
    left = dict.fromkeys(jobs)
    try:
        yield from _run(list(left), processes, left)
        return
    except BrokenProcessPool:
        pass
    for job in list(left):  # one of them kills its process: each on its own
        try:
            yield from _run([job], 1, left)
        except BrokenProcessPool:
            yield {
                "kernel": job.name, "chip": job.chip.name, "sm": job.chip.capability, "what": str(job),
                "error": "the compiler's process died (an assertion, or out of memory)", "seconds": 0.0,
            }  # fmt: skip


class Builder:
    """`build` in processes of their own, ahead of whoever waits for it. What they leave in Triton's cache is what a
    launch finds there."""

    def __init__(self, processes: int) -> None:
        self._pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_quiet)
        self._found: dict[Job, Future] = {}

    def ask(self, jobs: Iterable[Job]) -> None:
        """Has these built after what was asked for before."""
        for job in jobs:
            if job not in self._found:
                try:
                    with children.starting():
                        self._found[job] = self._pool.submit(build, job)
                except BrokenProcessPool as error:  # a compiler has died: `wait` goes on without the others
                    self._found[job] = Future()
                    self._found[job].set_exception(error)

    def wait(self, job: Job, timeout_s: float | None = None) -> dict[str, Any] | None:
        """The result of a job that was asked for; None if it takes longer. A job whose process died, or that was in
        line behind it, is built in a process of its own."""
        try:
            return self._found[job].result(timeout_s)
        except TimeoutError:
            return None
        except BrokenProcessPool:
            result = next(build_all([job], 1))
            self._found[job] = Future()
            self._found[job].set_result(result)
            return result

    def forget(self) -> None:
        """Leaves unbuilt what has not begun."""
        for job in [j for j, future in self._found.items() if future.cancel()]:
            del self._found[job]

    def close(self) -> None:
        children.end(self._pool)


def _run(jobs: Iterable[Job], processes: int, left: dict[Job, None]) -> Iterator[dict[str, Any]]:
    pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_quiet)
    try:
        with children.starting():
            running: dict[Future, Job] = {pool.submit(build, job): job for job in jobs}
        while running:
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                result = future.result()
                left.pop(running.pop(future), None)
                yield result
    finally:  # also where nobody asks for the rest
        children.end(pool)


def _quiet() -> None:
    """One thread a process: compiling needs no more; the compiler's advice on its own defaults is not ours to give."""
    children.tidy_on_sigterm()
    warnings.filterwarnings("ignore", module="triton")
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
