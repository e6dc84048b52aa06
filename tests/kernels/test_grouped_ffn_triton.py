"""The Triton form of grouped_ffn in Triton's interpreter: the op's own forward and backward, on CPU tensors.

The interpreter's bf16 products are wrong, so the dots run in fp32 and fp16; bf16 is for the tests on a GPU.
"""

from __future__ import annotations

import functools
import types

import pytest
import torch

from headgate.kernels import Activation
from headgate.kernels.chip import A100, H200
from headgate.kernels.grouped_ffn import on_cpu

pytest.importorskip("triton")


@pytest.fixture(params=["pointers", "maps"])
def on_triton(request, monkeypatch):
    """Puts the Triton form where the CPU form would take its plain one: by pointers (sm_80) or tensor maps (sm_90)."""
    import triton

    if not triton.knobs.runtime.interpret:
        pytest.skip("Triton's interpreter is off")
    from headgate.kernels.grouped_ffn import on_triton

    chip = {"pointers": A100, "maps": H200}[request.param]
    form = types.SimpleNamespace(
        forward=functools.partial(on_triton.forward, chip=chip),
        backward=functools.partial(on_triton.backward, chip=chip),
    )
    monkeypatch.setenv("HEADGATE_CPU", "plain")
    monkeypatch.setattr(on_cpu, "plain", form)
    return request.param


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"transposed": True},
        {"interleaved": True},
        {"transposed": True, "interleaved": True, "bias": True, "activation": "gpt_oss"},
        {"pair": True},
        {"gated": False, "activation": "relu2", "bias": True},
        {"bias": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(33, 70, 33), (17, 64, 32)], ids=str)
def test_every_form(on_triton, problem, check, form, size):
    check(problem(*size, 5, 2, **form))
