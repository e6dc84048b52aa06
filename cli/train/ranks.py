"""The processes of a training: how they start, and how they fail together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ...dispatch import agreement

Found = TypeVar("Found")


@contextmanager
def process_group(seconds: float) -> Iterator[None]:
    """The process group of all ranks that torchrun started, or of this process alone; NCCL where torch sees GPUs."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    alone: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(
        backend, timeout=timedelta(seconds=seconds), **({} if "WORLD_SIZE" in os.environ else alone)
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def device() -> torch.device:
    """This rank's GPU, or the CPU. Raises ValueError where there are GPUs, but fewer than processes on this machine."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    at, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if here > there:
        raise ValueError(f"train: processes on a machine must be at most its GPUs, got {here} and {there} GPUs")
    torch.cuda.set_device(at)
    return torch.device("cuda", at)


def together(work: Callable[[], Found]) -> Found:
    """work() on every rank; where it raises ValueError or OSError on one, every rank raises ValueError in one line."""
    try:
        return agreement.together(work, dist.group.WORLD)
    except (ValueError, OSError) as error:
        raise ValueError(" ".join(str(error).split())) from error
