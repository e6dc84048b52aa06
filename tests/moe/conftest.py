"""What the GPU tests of modules share."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from hybrid_cases import host_threads
from offload_cases import offload_threads, soon
from torch import Tensor


@pytest.fixture
def nothing_waits():
    """with nothing_waits(): whatever makes the host wait for the device is an error."""

    @contextmanager
    def watch() -> Iterator[None]:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return watch


@pytest.fixture
def own_compilations():
    """torch.compile counts what it compiled of a function, over all tests: not here, and none of these elsewhere."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def captured():
    """captured(step) -> `step` as a CUDA graph: each call replays it and returns its output."""

    def capture(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

    return capture


@pytest.fixture
def no_thread_is_left() -> Iterator[None]:
    """The test leaves no thread of an offload: none that reads, none that computes on the host."""
    yield
    left = lambda: offload_threads() + host_threads()  # noqa: E731
    if left():
        gc.collect()
    assert soon(lambda: not left()), f"threads are left: {left()}"
