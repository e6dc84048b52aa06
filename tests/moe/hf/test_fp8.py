"""Experts whose weights are float8 with block scales."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import headgate
import headgate.hf

fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
from transformers.integrations.moe import use_experts_implementation  # noqa: E402

from headgate.kernels import GPT_OSS, Activation  # noqa: E402
from headgate.kernels.chip import say_once  # noqa: E402
from headgate.kernels.grouped_ffn import grouped_ffn_reference  # noqa: E402
from headgate.moe.hf.fp8 import as_stored, widen  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:headgate")


def make(block, hidden=20, inter=12, gated=True, scale_fmt="float", **config):
    """An FP8Experts with random weights: blocks that divide the axes, are cut at their ends, or none at all."""

    class Small(fp8.FP8Experts):
        pass

    made = use_experts_implementation(Small, experts_interface=fp8.ALL_FP8_EXPERTS_FUNCTIONS, has_gate=gated)
    names = dict(num_experts=4, hidden_size=hidden, moe_intermediate_size=inter, hidden_act="silu", **config)
    config = SimpleNamespace(**names, _experts_implementation="headgate")
    module = made(config, block_size=block, has_gate=gated, scale_fmt=scale_fmt)
    for name, p in module.named_parameters():
        with torch.no_grad():
            p.copy_(((torch.rand(p.shape) + 0.5) if "scale" in name else torch.randn(p.shape)).to(p.dtype))
    return module


class Counting(TorchDispatchMode):
    """How often the operation on weights of few bits runs."""

    def __init__(self):
        super().__init__()
        self.forward = self.backward = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.forward += func is torch.ops.headgate.grouped_ffn_quantized.default
        self.backward += func is torch.ops.headgate.grouped_ffn_quantized_backward.default
        return func(*args, **(kwargs or {}))


IDS = torch.tensor([[0, 1], [1, 2], [2, 0], [4, 0], [0, 2], [2, 1]])  # 4 of 4 experts: one of another rank
FITS = {(4, 4): False, (8, 8): False, (8, 16): True, (7, 32): True, (128, 128): True, None: True}


def check(module, assert_close, activation=None, biases=(None, None), ran=True):
    """The swapped module, its gradients too, against the reference on its weights in fp32; whether the operation on
    weights of few bits ran."""
    gated = module.has_gate
    x, w = torch.randn(6, 20, requires_grad=True), torch.rand(6, 2, requires_grad=True)
    first, down = wide(module, "gate_up_proj" if gated else "up_proj"), wide(module, "down_proj")
    act = activation or Activation("silu", gated=gated)
    want = grouped_ffn_reference(x, IDS, w, first, down, *biases, activation=act)
    with Counting() as seen:
        got = module(x, IDS, w)
        grads = torch.autograd.grad(got.sum(), (x, w))
    assert_close(got, want)
    for a, b in zip(grads, torch.autograd.grad(want.sum(), (x, w)), strict=True):
        assert_close(a, b)
    assert (seen.forward, seen.backward) == ((1, 1) if ran else (0, 0))


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
@pytest.mark.parametrize("block", FITS, ids=str)
def test_equals_the_widened_weights(block, gated, way, assert_close):
    module = make(block, gated=gated)
    if way == "swap":
        report = headgate.replace(module)
        assert "fp8 weights" in str(report)
        assert ("as stored" in str(report)) == FITS[block]
    else:
        headgate.hf.register()
    check(module, assert_close, ran=FITS[block])
    assert list(headgate.hf.calls(module).values()) == [1]


@pytest.mark.parametrize("scales", ["float", "ue8m0"])
@pytest.mark.parametrize(
    ("block", "sizes"), [((8, 16), (20, 12)), ((16, 16), (40, 24)), ((128, 128), (200, 72))], ids=str
)
def test_weights_are_those_of_transformers(block, sizes, scales):
    """The same numbers as transformers widens them to for its own gradients, and as the loop over experts does."""
    own = pytest.importorskip("transformers.integrations.finegrained_fp8")
    if not hasattr(own, "_dequantize_fp8_weight"):
        pytest.skip("this transformers has no gradients through fp8 weights")
    module = make(block, *sizes, scale_fmt=scales)
    for name, view in zip(("gate_up_proj", "down_proj"), as_stored(module), strict=True):
        weight, scale = getattr(module, name), getattr(module, f"{name}_scale_inv")
        assert view.data.data_ptr() == weight.data_ptr()
        assert scales == "ue8m0" or view.scale.data_ptr() == scale.data_ptr()
        got = view.dequantize(torch.float32)
        if block[0] * (scale.shape[1] - 1) < weight.shape[1]:  # else gate and up have a scale each
            assert torch.equal(got, own._dequantize_fp8_weight(weight.detach(), scale.detach(), list(block), got.dtype))
        for e in range(4):
            assert torch.equal(got[e], widen(module, name, e, torch.float32))


def test_one_scale_for_each_row(assert_close):
    module = make(None)
    for name, rows in (("gate_up_proj", 24), ("down_proj", 20)):
        setattr(module, f"{name}_scale_inv", torch.nn.Parameter(torch.rand(4, rows, 1) + 0.5))
    headgate.replace(module)
    check(module, assert_close)


GATES = {
    "limit": (dict(swiglu_limit=1.0), Activation("silu", limit=1.0)),
    "gpt-oss": (dict(swiglu_limit=GPT_OSS.limit, swiglu_alpha=GPT_OSS.alpha), GPT_OSS),
}


@pytest.mark.parametrize("gate", GATES)
def test_its_own_gates(gate, assert_close):
    config, activation = GATES[gate]
    module = make((128, 128), **config)
    headgate.replace(module)
    check(module, assert_close, activation)


def test_a_gate_that_cannot_be_said_runs_around_the_loop(assert_close):
    module = make((128, 128), mlp_gate_softcap=2.0, mlp_up_softcap=3.0)
    with pytest.warns(UserWarning, match="a loop that widens one expert after another around it"):
        report = headgate.replace(module)
    assert "around their own gate" in str(report)
    x, w = torch.randn(6, 20), torch.rand(6, 2)
    with Counting() as seen:
        got = module(x, IDS, w)
    assert seen.forward == 0
    first, down, want = wide(module, "gate_up_proj"), wide(module, "down_proj"), torch.zeros(6, 20)
    for t, k in torch.cartesian_prod(torch.arange(6), torch.arange(2)).tolist():
        if (e := int(IDS[t, k])) < 4:
            want[t] += w[t, k] * (module._apply_gate(x[t] @ first[e].T) @ down[e].T)
    assert_close(got, want)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("block", [(4, 4), (128, 128)], ids=str)
def test_biases(block, gated, assert_close):
    """transformers gives FP8 experts none yet; the flag that would say so is heard."""
    module, first = make(block, gated=gated), "gate_up_proj" if gated else "up_proj"
    module.has_bias = True
    biases = torch.randn(4, 24 if gated else 12), torch.randn(4, 20)
    for name, b in zip((first, "down_proj"), biases, strict=True):
        setattr(module, f"{name}_bias", torch.nn.Parameter(b))
    headgate.replace(module)
    check(module, assert_close, biases=biases, ran=FITS[block])


@pytest.mark.parametrize("scales", ["float", "ue8m0"])
def test_compiles_as_one_graph(scales, assert_close):
    torch._dynamo.reset()
    module = make((8, 16), scale_fmt=scales)
    headgate.replace(module)
    x, w = torch.randn(6, 20, requires_grad=True), torch.rand(6, 2, requires_grad=True)

    def run(function):
        y = function(x, IDS, w)
        return [y, *torch.autograd.grad(y.square().sum(), (x, w))]

    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for got, want in zip(run(compiled), run(module), strict=True):
        assert_close(got, want)
    before = module(x, IDS, w)
    with torch.no_grad():
        module.down_proj_scale_inv.copy_(module.down_proj_scale_inv.float() * 2)
    assert_close(compiled(x, IDS, w), 2 * before)


def test_half_types_and_autocast(assert_close):
    module = make((128, 128))
    headgate.replace(module)
    x, w = torch.randn(6, 20), torch.rand(6, 2)
    want = module(x, IDS, w)
    with Counting() as seen:
        got = module(x.bfloat16(), IDS, w)
        with torch.autocast("cpu", torch.bfloat16):
            cast = module(x, IDS, w)
    assert (got.dtype, cast.dtype, seen.forward) == (torch.bfloat16, torch.float32, 2)
    assert_close(got, want)
    assert_close(cast, want, dtype=torch.bfloat16)


@pytest.mark.filterwarnings("default:headgate")
def test_what_is_slow_says_so():
    module = make((128, 128))
    with pytest.warns(UserWarning, match="CUDA devices read them as stored, but on cpu they are widened"):
        assert "read as stored on CUDA devices" in str(headgate.replace(module))
    say_once.cache_clear()
    module = make((4, 4))
    with pytest.warns(
        UserWarning, match=r"block must be positive, its columns a multiple of 16.*one expert after another"
    ):
        assert str(headgate.replace(module)).endswith("fp8 weights, widened expert by expert")
    say_once.cache_clear()
    with pytest.warns(UserWarning, match="one expert after another"):
        module(torch.randn(6, 20), IDS, torch.rand(6, 2))
    with warnings.catch_warnings():  # once
        warnings.simplefilter("error")
        module(torch.randn(6, 20), IDS, torch.rand(6, 2))


def test_the_other_float8_is_widened(assert_close):
    module = make((128, 128))
    for name in ("gate_up_proj", "down_proj"):
        weight = torch.randn(getattr(module, name).shape).to(torch.float8_e5m2)
        setattr(module, name, torch.nn.Parameter(weight, requires_grad=False))
    headgate.replace(module)
    check(module, assert_close, ran=False)


def test_packed_fp4_is_refused_by_name():
    module = make((4, 4))
    module.down_proj = torch.nn.Parameter(torch.zeros(4, 20, 6, dtype=torch.int8), requires_grad=False)
    assert headgate.replace(module).skipped == {"": "down_proj must be float8 beside its scales, got torch.int8"}
    headgate.hf.register()
    with pytest.raises(TypeError, match=r"fp8 experts: down_proj must be float8 beside its scales, got torch\.int8"):
        module(torch.randn(2, 20), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1))


def test_adapters_beside_the_experts_learn_and_on_them_are_refused(assert_close):
    peft = pytest.importorskip("peft")

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.experts = torch.nn.Linear(20, 20), make((8, 16))
            self.experts.requires_grad_(False)

        def forward(self, x, w):
            return self.experts(self.lin(x), IDS, w)

    net, x, w = Net(), torch.randn(6, 20), torch.rand(6, 2)
    adapted = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["lin"], init_lora_weights=False))
    headgate.replace(adapted)
    adapted(x, w).sum().backward()
    h = net.lin(x).detach().requires_grad_()
    weights = wide(net.experts, "gate_up_proj"), wide(net.experts, "down_proj")
    grouped_ffn_reference(h, IDS, w, *weights, activation=Activation("silu")).sum().backward()
    got = [p.grad.clone() for n, p in adapted.named_parameters() if "lora" in n]
    net.lin(x).backward(h.grad)
    for once, twice in zip(got, [p.grad for n, p in adapted.named_parameters() if "lora" in n], strict=True):
        assert_close(twice, 2 * once)

    net = Net()
    adapted = peft.get_peft_model(net, peft.LoraConfig(r=2, target_parameters=["experts.down_proj"]))
    headgate.replace(adapted)
    with pytest.raises(TypeError, match="down_proj must be frozen, got one that is computed with a gradient"):
        adapted(x, w)
