"""Swapped models on a GPU: beside their own code there, at the experts' boundary in bf16, and with fp8 weights.

These few families are compared with their originals right here, so that an older transformers than `replace` takes
elsewhere will do. `pytest -m gpu`.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import headgate
from headgate.kernels import Activation
from headgate.kernels.grouped_ffn import grouped_ffn_reference
from headgate.moe.hf import interface

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:headgate")]
DEVICE = "cuda"
MODELS = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")


@pytest.fixture(autouse=True)
def _any_transformers(monkeypatch):
    monkeypatch.setattr(interface, "OLDEST", (5, 17))


def choice(tokens: int, experts: int, k: int) -> tuple[Tensor, Tensor]:
    """Ids [T, K], one of them a sentinel of expert parallelism, and weights."""
    ids = torch.rand(tokens, experts, device=DEVICE).argsort(1)[:, :k]
    ids[-1, -1] = experts
    return ids, torch.rand(tokens, k, device=DEVICE)


@pytest.mark.parametrize("name", MODELS)
def test_a_swapped_model_takes_the_same_step(name, build, assert_same_step):
    family = build(name)
    family.model.to(DEVICE)
    family.inputs = {n: t.to(DEVICE) for n, t in family.inputs.items()}
    want = family.step()
    report = headgate.replace(family.model)
    assert not report.skipped
    assert_same_step(family.step(), want)
    assert all(report.calls.values())


@pytest.mark.parametrize("tokens", [1, 200])
@pytest.mark.parametrize("name", MODELS)
def test_experts_in_bf16(name, tokens, build, assert_close, nothing_waits, captured):
    """Against the module's own code in fp32; without waiting, and as a graph replayed on other tokens."""
    module = build(name).experts()[0].to(DEVICE, torch.bfloat16)
    own = copy.deepcopy(module).float()
    experts = module.down_proj.shape[0]
    x, other = (torch.randn(tokens, 32, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    ids, w = choice(tokens, experts, 2)
    ids = ids % experts  # eager code takes no sentinels
    headgate.replace(module)
    with torch.no_grad():
        y = module(x, ids, w)
        assert_close(y, own(x.float(), ids, w), dtype=torch.bfloat16)
        with nothing_waits():
            module(x, ids, w)
        replay = captured(lambda: module(x, ids, w))
        x.copy_(other)
        assert torch.equal(replay(), module(other, ids, w))


def fp8_experts(hidden: int, inter: int, experts: int, block: tuple[int, int] | None, scale_fmt: str) -> nn.Module:
    """transformers' own module, with random weights and scales that keep outputs near one."""
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    from transformers.integrations.moe import use_experts_implementation

    class Small(fp8.FP8Experts):
        pass

    made = use_experts_implementation(Small, experts_interface=fp8.ALL_FP8_EXPERTS_FUNCTIONS, has_gate=True)
    sizes = dict(num_experts=experts, hidden_size=hidden, moe_intermediate_size=inter, hidden_act="silu")
    config = SimpleNamespace(**sizes, _experts_implementation="eager")
    module = made(config, block_size=block, scale_fmt=scale_fmt)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(((torch.rand(p.shape) + 0.5) / 16 if "scale" in name else torch.randn(p.shape)).to(p.dtype))
    return module.to(DEVICE)


class Counting(TorchDispatchMode):
    """How often the operation on weights of few bits runs."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.headgate.grouped_ffn_quantized.default
        return func(*args, **(kwargs or {}))


def wide(module: nn.Module, name: str) -> Tensor:
    """Weights in fp32 by transformers' rule: a scale for each block, the last of which may be cut short."""
    weight, scale = getattr(module, name).detach().float(), getattr(module, f"{name}_scale_inv").detach().float()
    for axis in (1, 2):
        size, parts = weight.shape[axis], scale.shape[axis]
        block = module.block_size[axis - 1] if module.block_size else -(-size // parts)
        scale = scale.repeat_interleave(block, dim=axis).narrow(axis, 0, size)
    return weight * scale


@pytest.mark.parametrize("tokens", [1, 200])
@pytest.mark.parametrize(
    ("block", "scales"), [((128, 128), "float"), ((128, 128), "ue8m0"), ((32, 64), "float"), (None, "float")], ids=str
)
def test_fp8_experts_are_read_as_stored(block, tokens, scales, assert_close, nothing_waits, captured):
    """Sizes that the blocks do not divide; forward, gradients, no waiting, and as a graph."""
    module = fp8_experts(288, 160, 8, block, scales)
    assert "read as stored" in str(headgate.replace(module))
    x = torch.randn(tokens, 288, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    ids, w = choice(tokens, 8, 2)
    w.requires_grad_()
    with Counting() as seen:
        y = module(x, ids, w)
    assert seen.count == 1
    grad = torch.randn_like(y)
    got = [y, *torch.autograd.grad(y, (x, w), grad)]
    wide_x, weights = x.detach().float().requires_grad_(), (wide(module, "gate_up_proj"), wide(module, "down_proj"))
    want = grouped_ffn_reference(wide_x, ids, w, *weights, activation=Activation("silu"))
    for a, b in zip(got, [want, *torch.autograd.grad(want, (wide_x, w), grad.float())], strict=True):
        assert_close(a, b, dtype=torch.bfloat16)
    x, w = x.detach(), w.detach()
    with torch.no_grad():
        once = module(x, ids, w)
        assert_close(once, want, dtype=torch.bfloat16)
        with nothing_waits():
            twice = module(x, ids, w)
        assert torch.equal(once, twice)
        replay, other = captured(lambda: module(x, ids, w)), torch.randn_like(x)
        x.copy_(other)
        assert torch.equal(replay(), module(other, ids, w))


def test_fp8_experts_compile_as_one_graph(assert_close):
    torch._dynamo.reset()
    module = fp8_experts(256, 128, 8, (128, 128), "float")
    headgate.replace(module)
    x, (ids, w) = torch.randn(40, 256, device=DEVICE, dtype=torch.bfloat16), choice(40, 8, 2)
    with torch.no_grad():
        assert_close(torch.compile(module, fullgraph=True)(x, ids, w), module(x, ids, w))
