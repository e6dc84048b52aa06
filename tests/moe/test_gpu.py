"""The layer on a GPU: beside the same layer on the CPU in fp32, in decode, in a graph, compiled. `pytest -m gpu`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import headgate
from headgate.kernels import GPT_OSS, Routing, grouped_ffn, quantize
from headgate.kernels.activation import as_activation
from headgate.kernels.grouped_ffn import grouped_ffn_reference
from headgate.moe import Capacity

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
COEFS = {"load_balancing_coef": 0.3, "z_loss_coef": 0.2}
# Few, as each compiles kernels of its own: the CPU's tests are the many.
LAYERS = {
    "softmax": dict(router_options={"renormalize": True}),
    "sigmoid, shared": dict(
        router="sigmoid",
        router_options={"scale": 2.5, "groups": 4, "topk_groups": 2},
        shared_intermediate_size=64,
        shared_gate=True,
    ),
    "gpt-oss": dict(router_options={"order": "topk_softmax", "gate_bias": True}, bias=True, activation=GPT_OSS),
    "ungated": dict(activation="relu2", gated=False),
}


def make(name: str, dtype: torch.dtype, **options) -> headgate.MoE:
    layer = headgate.MoE(128, 96, num_experts=8, top_k=2, device=DEVICE, dtype=dtype, **LAYERS[name], **options)
    with torch.no_grad():
        for parameter, p in layer.named_parameters():
            if parameter.split(".")[-1] in ("b_gate_up", "b_down", "gate_bias"):
                p.normal_(std=0.3)
        if name.startswith("sigmoid"):
            layer.router.expert_bias.normal_(std=0.1)
    return layer


def numbers(layer: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """y, the gradient of x and of every parameter, by name."""
    layer.zero_grad()
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(grad)
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in layer.named_parameters()}
    return {"y": y.detach(), "x": x.grad, **grads}


@pytest.mark.parametrize(
    ("name", "tokens", "dtype"),
    [
        ("softmax", 5, torch.bfloat16),
        ("softmax", 190, torch.bfloat16),
        ("sigmoid, shared", 190, torch.bfloat16),
        ("sigmoid, shared", 190, torch.float32),
        ("gpt-oss", 190, torch.bfloat16),
        ("ungated", 5, torch.bfloat16),
    ],
    ids=str,
)
def test_equals_the_layer_on_the_cpu(name, tokens, dtype, assert_close):
    layer = make(name, dtype, **COEFS)
    twin = copy.deepcopy(layer).float().cpu()
    x, grad = (torch.randn(tokens, 128, device=DEVICE).to(dtype) for _ in range(2))
    got, want = numbers(layer, x, grad), numbers(twin, x.float().cpu(), grad.float().cpu())
    assert torch.equal(layer.last_routing.counts.cpu(), twin.last_routing.counts)
    assert torch.equal(layer.last_routing.expert_ids.cpu(), twin.last_routing.expert_ids)
    for what, value in want.items():
        assert got[what].dtype == dtype
        assert_close(got[what], value, dtype=dtype, scale=2, name=what)
    for what, value in twin.aux_losses.items():
        assert_close(layer.aux_losses[what], value, name=what)


@pytest.mark.parametrize("capacity", [None, Capacity(1.0), Capacity(1.0, "position", pad=True)], ids=str)
def test_a_training_step_waits_for_nothing(capacity, nothing_waits):
    layer = make("sigmoid, shared", torch.bfloat16, capacity=capacity, **COEFS)
    x, grad = (torch.randn(2, 95, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))

    def step():
        numbers(layer, x, grad)
        layer.router.update_bias()

    step()
    with nothing_waits():
        step()


@pytest.mark.parametrize("tokens", [1, 2, 4, 16])
@pytest.mark.parametrize("name", LAYERS)
def test_decode(name, tokens, assert_close, nothing_waits, captured):
    """Right, without waiting, the same to the bit each time, and as a graph replayed on other tokens."""
    layer = make(name, torch.bfloat16).eval()
    twin = copy.deepcopy(layer).float().cpu()
    x, other = (torch.randn(tokens, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    with torch.no_grad():
        y = layer(x)
        assert_close(y, twin(x.float().cpu()), dtype=torch.bfloat16)
        with nothing_waits():
            again = layer(x)
        assert torch.equal(y, again)
        replay = captured(lambda: layer(x))
        x.copy_(other)
        assert torch.equal(replay(), layer(other))


@pytest.mark.parametrize("name", ["softmax", "sigmoid, shared"])
def test_compiles_as_one_graph(name, assert_close):
    torch._dynamo.reset()
    layer = make(name, torch.bfloat16, **COEFS)
    x, grad = (torch.randn(2, 95, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    want = numbers(layer, x, grad)
    compiled = torch.compile(layer, fullgraph=True)
    got = {what.removeprefix("_orig_mod."): value for what, value in numbers(compiled, x, grad).items()}
    for what, value in want.items():
        assert_close(got[what], value, name=what)
    layer.eval()
    with torch.no_grad():  # another graph
        assert_close(compiled(x[:1, :1]), layer(x[:1, :1]))


@pytest.mark.parametrize("tokens", [1, 4, 16])
@pytest.mark.parametrize("format", ["fp8", "int8", "int4", "mxfp4"])
def test_decode_with_weights_of_few_bits(format, tokens, assert_close, nothing_waits, captured):
    d, f, e, k = 256, 128, 8, 2
    w1, w2 = (quantize(torch.randn(e, *s, device=DEVICE) / s[1] ** 0.5, format) for s in ((2 * f, d), (d, f)))
    x, other = (torch.randn(tokens, d, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    ids = torch.rand(tokens, e, device=DEVICE).argsort(1)[:, :k]
    routing = Routing.from_topk(ids, torch.rand(tokens, k, device=DEVICE), e)

    def step() -> Tensor:
        return grouped_ffn(x, routing, w1, w2)

    wide = w1.dequantize(torch.float32), w2.dequantize(torch.float32)
    want = grouped_ffn_reference(x.float(), ids, routing.weights, *wide, activation=as_activation("silu", True))
    with torch.no_grad():
        y = step()
        assert_close(y, want, dtype=torch.bfloat16)
        with nothing_waits():
            assert step().shape == y.shape
        replay = captured(step)
        x.copy_(other)
        assert torch.equal(replay(), step())
