"""Memory of each rank that the other ranks of its group read directly: one-sided copies in place of messages.

On CPUs it is a file in shared memory that each rank maps, on GPUs torch's symmetric memory, whose buffers lie in the
address space of every GPU that NVLink or PCIe reaches (torch.distributed._symmetric_memory, alpha in torch 2.13).
"""

from __future__ import annotations

import mmap
import os
import tempfile
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from . import collectives

LEAST = 2**20  # bytes: windows are multiples of it, so that small messages need not open a new one as they grow
_BARRIER_TIMEOUT_MS = 600_000  # torch's default for NCCL; after it the kernel traps, and its process with it


class Window(Protocol):
    """`parts[r]` uint8 [nbytes]: rank r's memory, to be written by r alone and read by all."""

    nbytes: int
    device: torch.device
    parts: list[Tensor]

    def barrier(self) -> None:
        """What any rank wrote before it, every rank sees after it; what any rank read before it, was read."""
        ...


class CPUWindow:
    """A file for each rank in `folder`, mapped by all, without a name once it is: nothing stays behind."""

    def __init__(self, group: dist.ProcessGroup, nbytes: int, folder: str) -> None:
        self.group, self.nbytes, self.device = group, nbytes, torch.device("cpu")
        mine, why = "", ""
        try:
            handle, mine = tempfile.mkstemp(prefix="headgate-", dir=folder)
            with open(handle, "r+b") as file:
                # A file with a hole would do, until a first write to it finds no memory and kills the process.
                os.posix_fallocate(file.fileno(), 0, nbytes)
        except OSError as error:
            why = str(error)
        try:
            told = collectives.all_gather_objects((mine, why), group)
            if not any(why for _, why in told):
                try:
                    self.parts = [_mapped(name, nbytes) for name, _ in told]
                except OSError as error:  # a rank of another machine
                    why = str(error)
                told = collectives.all_gather_objects((mine, why), group)
        finally:
            if mine:
                os.unlink(mine)
        for rank, (_, why) in zip(dist.get_process_group_ranks(group), told, strict=True):
            if why:
                rule = f"group must be ranks of one machine, each with {nbytes} bytes of shared memory"
                raise ValueError(f"{rule}, got on rank {rank}: {why}")

    def barrier(self) -> None:
        collectives.barrier(self.group)


class GPUWindow:
    """A symmetric buffer. Its barrier is a kernel on the current stream: nothing waits on the host."""

    def __init__(self, group: dist.ProcessGroup, nbytes: int, device: torch.device) -> None:
        import torch.distributed._symmetric_memory as symmetric_memory

        self.nbytes, self.device = nbytes, device
        try:
            self._memory = symmetric_memory.empty(nbytes, dtype=torch.uint8, device=device)
            self._handle = symmetric_memory.rendezvous(self._memory, group)
            self.parts = [self._handle.get_buffer(r, (nbytes,), torch.uint8) for r in range(group.size())]
        except RuntimeError as error:
            got = str(error).splitlines()[0]
            raise ValueError(f"group must be ranks whose GPUs reach each other's memory, got {got}") from error

    def barrier(self) -> None:
        self._handle.barrier(timeout_ms=_BARRIER_TIMEOUT_MS)


def open_window(group: dist.ProcessGroup, nbytes: int, device: torch.device) -> Window:
    """A new window of at least `nbytes` on `device`. Every rank of the group opens it at once, of the same size.

    Raises ValueError, on CPUs on every rank with the same words, where the ranks do not reach each other's memory.
    """
    why = why_not(device.type)
    if why:
        raise ValueError(f"x must be on a device whose memory ranks can share, got {device}: {why}")
    nbytes = -(-nbytes // LEAST) * LEAST
    return GPUWindow(group, nbytes, device) if device.type == "cuda" else CPUWindow(group, nbytes, shared_folder())


def why_not(kind: str) -> str | None:
    """Why no window can be opened on a device of this kind ("cpu", "cuda"); None where one can, as far as this rank
    can say alone."""
    if kind == "cpu":
        return None if hasattr(os, "posix_fallocate") else "this system has no posix_fallocate"
    if kind != "cuda":
        return f"there is no window for {kind}"
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def shared_folder() -> str:
    """Where the CPU's windows are: in memory on Linux, in the folder for temporary files elsewhere."""
    return "/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir()


def _mapped(name: str, nbytes: int) -> Tensor:
    with open(name, "r+b") as file:
        return torch.frombuffer(mmap.mmap(file.fileno(), nbytes), dtype=torch.uint8)
