"""The chip a Triton kernel is built for, as data: what tile choice may ask, on any machine, with or without a GPU."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

OLDEST = 80  # Ampere: the first with bf16 matrix units and asynchronous copies into shared memory
MOST_EXPERTS = 1024  # a program that orders pairs holds a count of each expert in registers


@dataclass(frozen=True)
class Chip:
    """`capability` 10 * major + minor; `processors` multiprocessors; `shared_bytes` the most shared memory one program
    may have; `bandwidth_GBps` device memory, read; `bf16_TFLOPs` dense matrix rate. The last two are datasheet figures
    for floors and tables, and None where unknown; no kernel depends on them."""

    name: str
    capability: int
    processors: int
    shared_bytes: int
    bandwidth_GBps: float | None = None
    bf16_TFLOPs: float | None = None

    @property
    def tensor_maps(self) -> bool:
        """Whether tiles travel by the tensor memory accelerator (TMA)."""
        return self.capability >= 90


H200 = Chip("H200", 90, 132, 232448, 4800, 989)
H100 = Chip("H100", 90, 132, 232448, 3350, 989)
A100 = Chip("A100", 80, 108, 166912, 2039, 312)
RTX3090 = Chip("RTX3090", 86, 82, 101376, 936, 71)
RTX4090 = Chip("RTX4090", 89, 128, 101376, 1008, 165)
B200 = Chip("B200", 100, 148, 232448, 8000, 2250)
CHIPS = {c.name: c for c in (H200, H100, A100, RTX3090, RTX4090, B200)}


@functools.cache
def chip_of(index: int) -> Chip:
    """The CUDA device's own numbers; the datasheet's where its name is known."""
    p = torch.cuda.get_device_properties(index)
    known = next((c for n, c in CHIPS.items() if n in p.name.replace(" ", "")), None)
    return Chip(
        p.name,
        10 * p.major + p.minor,
        p.multi_processor_count,
        p.shared_memory_per_block_optin,  # type: ignore[attr-defined]  # the stubs lack it
        known.bandwidth_GBps if known else None,
        known.bf16_TFLOPs if known else None,
    )


@functools.cache
def why_not(index: int) -> str | None:
    """Why no Triton kernel can run on CUDA device `index`; None where they can."""
    if torch.version.hip:
        return "the Triton kernels were not written for ROCm"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'headgate[gpu]')"
    chip = chip_of(index)
    if chip.capability < OLDEST:
        return f"{chip.name} has compute capability {chip.capability / 10}, the Triton kernels need {OLDEST / 10}"
    return None


def why_no_grouped_gemm(rows: Tensor, num_experts: int) -> str | None:
    """Why no Triton form serves these rows (on a CUDA device) and so many experts; None where one does."""
    if rows.dtype == torch.float64:
        return "fp64 products have no Triton form"
    if num_experts > MOST_EXPERTS:
        return f"num_experts must be at most {MOST_EXPERTS} for the Triton form, got {num_experts}"
    return why_not(rows.device.index)


@functools.cache
def say_once(operation: str, why: str, instead: str) -> None:
    """The one warning for a slower path that is taken."""
    warnings.warn(f"headgate: {operation}: {why}; it runs as {instead}", stacklevel=4)
