"""Memory of one training step.

Bytes kept for backward: what autograd packs, by `saved_tensors_hooks`; a storage counts once and whole, parameters not
at all. Exact.

Peak: the operation's C++ scratch and the matmul library's buffers are allocated outside torch, where its profiler is
blind, so the kernel's own account is read: in a fresh process per implementation, the high-water mark of resident
memory (VmHWM, reset through /proc/self/clear_refs) during the second step, less what was resident before that step.
malloc is told to give every block of 64 KiB and more back at once, so that resident means in use. Good to some hundred
KiB. The second step is taken because the first loads code and builds the matmul library's caches; memory that the first
step leaves behind is given beside as `left_bytes`, so that scratch kept between calls does not hide.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from .rivals import IMPLEMENTATIONS, Forward
from .shapes import DTYPES, SHAPES, UNSCALED, Problem, Shape, make_parameters, make_problem

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def saved_bytes(problem: Problem, forward: Forward) -> int:
    """Bytes that autograd keeps between forward and backward, the parameters aside."""
    parameters = {p.untyped_storage().data_ptr() for p in problem.parameters.values()}
    kept: dict[int, int] = {}
    alive = []  # a storage freed within forward must not lend its address to the next one

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters and storage.nbytes():
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(t)
        return t

    ids, weights = problem.routings[0]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        forward(problem.x, ids, weights)
    return sum(kept.values())


def _resident(entry: str) -> int:
    return next(int(line.split()[1]) * 1024 for line in _STATUS.read_text().splitlines() if line.startswith(entry))


def _mark() -> int:
    """Resets the high-water mark; returns what is resident now."""
    _CLEAR.write_text("5")
    return _resident("VmRSS")


def measurable() -> str | None:
    """None where this kernel lets a process reset its high-water mark, else the reason."""
    try:
        _mark()
    except OSError as error:
        return f"the high-water mark of resident memory cannot be reset here ({error})"
    return None


def peak(shape: Shape, tokens: int, dtype: str, name: str, threads: int, timeout_s: float = 300) -> dict[str, Any]:
    """Peak memory of one training step in a fresh process, all in bytes.

    backward_bytes  highest during backward, above the step's start: what was kept, gradients and scratch
    step_bytes      highest during forward + backward, above the step's start
    kept_bytes      resident growth from forward alone: the output and everything kept, by whomever
    left_bytes      what the first step left behind (scratch and caches kept between calls)
    gradient_bytes  the gradients, which every implementation must return
    """
    unscaled = UNSCALED.get(shape.name) == shape
    if not unscaled and SHAPES.get(shape.name) != shape:
        raise ValueError(f"peak: shape must be one of SHAPES or UNSCALED, got {shape}")
    job = {"shape": shape.name, "unscaled": unscaled, "tokens": tokens, "dtype": dtype, "name": name}
    env = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "MALLOC_MMAP_MAX_": "1000000",
    }
    # -P: a checkout's own folder must not come first on the path, where kernels/ would shadow another package
    command = [sys.executable, "-P", "-m", "headgate.bench.memory", json.dumps(job | {"threads": threads})]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout_s)
    if done.returncode:
        raise RuntimeError(f"memory of {name}: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _step(problem: Problem, forward: Forward) -> dict[str, int]:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    start, anonymous = _mark(), _resident("RssAnon")
    ids, weights = problem.routings[0]
    y = forward(problem.x, ids, weights)
    between, high = _resident("VmRSS"), _resident("VmHWM")
    _mark()
    y.backward(problem.grad)
    top = _resident("VmHWM")
    return {
        "backward_bytes": top - start,
        "step_bytes": max(high, top) - start,
        "kept_bytes": between - start,
        "start_bytes": anonymous,
    }


def _child(job: dict[str, Any]) -> dict[str, int]:
    torch.set_num_threads(job["threads"])
    shape = (UNSCALED if job["unscaled"] else SHAPES)[job["shape"]]
    dtype = DTYPES[job["dtype"]]
    problem = make_problem(shape, job["tokens"], dtype, make_parameters(shape, dtype))
    forward = IMPLEMENTATIONS[job["name"]](problem)
    torch.mm(problem.x.detach(), problem.x.detach().T)  # the thread pool and the matmul library, whoever is measured
    first = _step(problem, forward)
    problem.clear()
    second = _step(problem, forward)
    gradients = sum(t.grad.nbytes for t in problem.leaves if t.grad is not None)
    left = second.pop("start_bytes") - first["start_bytes"]
    return second | {"left_bytes": left, "gradient_bytes": gradients}


if __name__ == "__main__":
    print(json.dumps(_child(json.loads(sys.argv[1]))))
