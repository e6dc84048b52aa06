"""Which hardware and which versions measured numbers belong to, and how fast the memory can be read."""

from __future__ import annotations

import contextlib
import mmap
import os
from pathlib import Path
from typing import Any

import torch

from . import machine

_FLAGS = (
    *(
        "avx2",
        "fma",
        "f16c",
        "avx512f",
        "avx512bw",
        "avx512vl",
        "avx_vnni",
        "avx512_vnni",
        "avx512_bf16",
        "avx512_fp16",
    ),
    *("amx_tile", "amx_bf16", "amx_fp16", "asimd", "sve", "bf16", "i8mm"),
)
# Many times the last-level caches that such machines have, so that almost every byte comes from memory.
READ_BYTES = 256 * 2**20
_HUGE = 2**21


def _isa() -> list[str]:
    """The instruction sets among _FLAGS that the first processor of /proc/cpuinfo names."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    have = next((line.split(":", 1)[1].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return [f for f in _FLAGS if f in have]


def headgate_form() -> str:
    """Which CPU form of Headgate's operation runs here, in its own words."""
    from ..kernels import native

    if os.environ.get("HEADGATE_CPU") == "plain":
        return "plain: asked for by HEADGATE_CPU=plain"
    status = native.status()
    return f"{status.form}: {status.why}"


def _last_level_cache() -> int | None:
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text.endswith("K"):
            sizes.append(int(text[:-1]) * 1024)
    return max(sizes, default=None)


def describe(device: str = "cpu") -> dict[str, Any]:
    """The machine, its software and its load at this moment. Sizes in bytes."""
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    about: dict[str, Any] = {
        "cpu": machine.processor(),
        "isa": _isa(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "cpus": machine.cores(),
        "threads": torch.get_num_threads(),
        "last_level_cache_bytes": _last_level_cache(),
        "memory_bytes": machine.memory_bytes(),
        "transparent_hugepages": huge.read_text().strip() if huge.exists() else None,
        "load_1min": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "transformers": machine.version("transformers"),
        "headgate": machine.version("headgate"),
        "headgate_form": headgate_form(),
        "device": device,
    }
    if device.startswith("cuda"):
        about["gpu"] = torch.cuda.get_device_name(device)
    return about


def available_bytes() -> int | None:
    """Memory that can be had without swapping; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def touch_memory(size: int) -> None:
    """Touches `size` bytes of fresh memory (a quarter of the free memory at most) and gives them back.

    A virtual machine may get its memory from the host at first touch, 30 times slower than the kernel hands out a page
    it has, and may lose it again two seconds after it is freed. Whoever allocates next would pay. Huge pages are asked
    for, so that the kernel keeps the blocks whole.
    """
    size = min(size, (available_bytes() or 0) // 4) // _HUGE * _HUGE
    if size and hasattr(mmap, "MAP_PRIVATE"):
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared ones get no huge pages
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without huge pages: small ones are touched
                block.madvise(mmap.MADV_HUGEPAGE)
        torch.frombuffer(block, dtype=torch.int64).fill_(1)
        block.close()


class Reader:
    """Reads READ_BYTES of fp32 by torch.sum with the run's own threads: the fastest reader torch has (it equals dot and
    amax on the machines tried). Its rate bounds whatever must stream weights from memory."""

    def __init__(self, device: str = "cpu") -> None:
        self.data = torch.ones(READ_BYTES // 4, dtype=torch.float32, device=device)

    def __call__(self, _call: int) -> None:
        self.data.sum()
