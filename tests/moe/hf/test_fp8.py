"""Experts whose weights are float8 with block scales."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import headgate
import headgate.hf

fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
from transformers.integrations.moe import use_experts_implementation  # noqa: E402

from headgate.kernels import Activation, Routing  # noqa: E402
from headgate.kernels.grouped_ffn import grouped_ffn_reference  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:headgate")


def make(block, hidden=20, inter=12, gated=True, **config):
    """An FP8Experts with random weights: blocks that divide the axes, are cut at their ends, or none at all."""

    class Small(fp8.FP8Experts):
        pass

    made = use_experts_implementation(Small, experts_interface=fp8.ALL_FP8_EXPERTS_FUNCTIONS, has_gate=gated)
    names = dict(num_experts=4, hidden_size=hidden, moe_intermediate_size=inter, hidden_act="silu", **config)
    module = made(SimpleNamespace(**names, _experts_implementation="headgate"), block_size=block, has_gate=gated)
    for name, p in module.named_parameters():
        with torch.no_grad():
            p.copy_(torch.rand(p.shape) + 0.5 if "scale" in name else torch.randn(p.shape).to(p.dtype))
    return module


def wide(module, name):
    """The weights in fp32, element by element."""
    w, s = getattr(module, name).float(), getattr(module, f"{name}_scale_inv").float()
    out = torch.empty_like(w)
    for e, i, j in torch.cartesian_prod(*map(torch.arange, w.shape)).tolist():
        if module.block_size is None or module.block_size[0] * (s.shape[1] - 1) >= w.shape[1]:
            row = i // -(-w.shape[1] // s.shape[1])
        else:
            row = i // module.block_size[0]
        column = 0 if module.block_size is None else j // module.block_size[1]
        out[e, i, j] = w[e, i, j] * s[e, row, column]
    return out


@pytest.mark.parametrize("way", ["swap", "experts implementation"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("block", [(4, 4), (8, 8), (128, 128), None], ids=str)
def test_equals_the_widened_weights(block, gated, way, assert_close):
    module = make(block, gated=gated)
    if way == "swap":
        report = headgate.replace(module)
        assert "fp8 weights" in str(report)
    else:
        headgate.hf.register()
    x = torch.randn(6, 20, requires_grad=True)
    ids, w = torch.tensor([[0, 1], [1, 2], [2, 0], [4, 0], [0, 2], [2, 1]]), torch.rand(6, 2, requires_grad=True)
    first = wide(module, "gate_up_proj" if gated else "up_proj")
    want = grouped_ffn_reference(
        x, ids, w, first, wide(module, "down_proj"), activation=Activation("silu", gated=gated)
    )
    got = module(x, ids, w)
    assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got.sum(), (x, w)), torch.autograd.grad(want.sum(), (x, w)), strict=True):
        assert_close(a, b)
    assert list(headgate.hf.calls(module).values()) == [1]
    assert Routing.from_topk(ids, w, 4).num_experts == 4


def test_packed_fp4_is_refused_by_name():
    module = make((4, 4))
    module.down_proj = torch.nn.Parameter(torch.zeros(4, 20, 6, dtype=torch.int8), requires_grad=False)
    assert headgate.replace(module).skipped == {"": "down_proj must be float8 beside its scales, got torch.int8"}
    headgate.hf.register()
    with pytest.raises(TypeError, match=r"fp8 experts: down_proj must be float8 beside its scales, got torch\.int8"):
        module(torch.randn(2, 20), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1))
