"""The activation of a stranger's experts: recognised where it can be said, left alone where it cannot."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import headgate
from headgate.kernels.activation import GPT_OSS, KINDS, Activation
from headgate.moe.hf.gate import activation_of, identify

FORMS = [
    *(Activation(kind) for kind in KINDS),
    *(Activation(kind, gated=False) for kind in KINDS),
    GPT_OSS,
    Activation("silu", limit=10.0),
    Activation("silu", limit=2.5, clamp_after=True),
    Activation("silu", alpha=1.3),
    Activation("gelu_tanh", limit=7.0, up_shift=1.0),
    Activation("silu", limit=2e5),  # only seen where the grid follows the numbers
]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form_is_recognised(form):
    numbers = [n for n in (form.limit, form.alpha, 3.0) if n < math.inf]
    function = form if form.gated else lambda g, _u: form(g)
    assert identify(function, form.gated, numbers) == form


STRANGERS = {
    "softcap": lambda g, u: F.silu(30 * torch.tanh(g / 30)) * u,
    "mish": lambda g, u: F.mish(g) * u,
    "dropout": lambda g, u: F.dropout(F.silu(g), 0.1) * u,
    "a clamp nobody told of": lambda g, u: F.silu(g.clamp(max=20.0)) * u,
    "a scale": lambda g, u: 1.001 * F.silu(g) * u,
    "up before gate": lambda g, u: F.silu(u) * g,
    "another shape": lambda g, u: (F.silu(g) * u)[:-1],
    "an error": lambda g, u: g @ u @ g,
}


@pytest.mark.parametrize("function", STRANGERS.values(), ids=STRANGERS.keys())
def test_what_cannot_be_said_is_left_alone(function):
    assert identify(function, True, [1.0, 2.0]) is None


def test_every_activation_of_transformers():
    """What is recognised is right on random numbers; the plain ones are recognised under all their names."""
    from transformers.activations import ACT2FN

    known = {}
    for name in ACT2FN:
        act = ACT2FN[name]
        form = identify(lambda g, _u, act=act: act(g), False)
        if form is not None:
            known[name] = form.kind
            x = torch.randn(4096) * 4
            torch.testing.assert_close(form(x), act(x), rtol=1e-4, atol=1e-5)
    plain = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_python": "gelu", "relu": "relu", "relu2": "relu2"}
    tanh = dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), "gelu_tanh")
    assert known.items() >= (plain | tanh | {"linear": "identity", "quick_gelu": "silu"}).items()


class Experts(nn.Module):
    """A module at transformers' boundary, made by hand, with a gate like gpt-oss's."""

    has_gate, has_bias, is_transposed, is_concatenated = True, False, False, True

    def __init__(self, limit=7.0):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 12, 8))
        self.down_proj = nn.Parameter(torch.randn(4, 8, 6))
        self.act_fn = nn.SiLU()
        self.limit = limit

    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate.clamp(max=self.limit)) * up.clamp(-self.limit, self.limit)

    def forward(self, hidden_states, top_k_index, top_k_weights):
        out = torch.zeros_like(hidden_states)
        for t, k in ((t, k) for t in range(len(out)) for k in range(top_k_index.shape[1])):
            e = top_k_index[t, k]
            y = self.down_proj[e] @ self._apply_gate(self.gate_up_proj[e] @ hidden_states[t])
            out[t] = out[t] + top_k_weights[t, k] * y
        return out


ARGS = torch.randn(5, 8), torch.randint(0, 4, (5, 2)), torch.rand(5, 2)


def test_a_changed_number_is_seen_at_the_next_call(assert_close):
    module = Experts()
    headgate.replace(module)
    assert_close(module(*ARGS), Experts.forward(module, *ARGS))
    module.limit = 0.5
    assert_close(module(*ARGS), Experts.forward(module, *ARGS))
    module.act_fn = nn.ReLU()
    assert_close(module(*ARGS), Experts.forward(module, *ARGS))
    assert activation_of(module, True) == Activation("relu", limit=0.5)


def test_one_compiled_function_asks_each_module(assert_close):
    torch._dynamo.reset()
    one, other = Experts(), Experts()
    other.act_fn = nn.ReLU()
    headgate.replace(one)
    headgate.replace(other)
    compiled = torch.compile(lambda module: module(*ARGS), fullgraph=True, backend="aot_eager")
    for module in (one, other, one):
        assert_close(compiled(module), Experts.forward(module, *ARGS))


def test_a_limit_kept_in_the_activation(assert_close):
    class Capped(nn.Module):
        def __init__(self):
            super().__init__()
            self.cap = 3.0

        def forward(self, x):
            return F.silu(self.cap * torch.tanh(x / self.cap))

    module = Experts()
    module.act_fn = Capped()
    with pytest.warns(UserWarning, match="Experts has something of its own between its matmuls .Capped."):
        report = headgate.replace(module)
    assert report.how == {"": "Experts: own gate between two grouped matmuls"}
    assert_close(module(*ARGS), Experts.forward(module, *ARGS))


def test_hooks_on_the_activation_are_heard():
    module = Experts()
    headgate.replace(module)
    assert activation_of(module, True) is not None
    heard = []
    hook = module.act_fn.register_forward_hook(lambda *_: heard.append(1))
    with pytest.warns(UserWarning, match="headgate"):
        module(*ARGS)
    assert heard == [1]
    hook.remove()
    module(*ARGS)
    assert heard == [1]
    assert activation_of(module, True) is not None


def test_what_is_learned_is_never_fused(assert_close):
    """At its first value it equals a plain form; trained on, it would not."""

    class Learned(Experts):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()), requires_grad=False)

        def _apply_gate(self, gate_up):
            return super()._apply_gate(gate_up) * self.scale

    module = Learned()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        headgate.replace(module)
        module(*ARGS)
        with torch.no_grad():
            module.scale.fill_(3.0)
        assert_close(module(*ARGS), Learned.forward(module, *ARGS))


def test_dropout_in_the_activation_is_never_fused():
    module = Experts()
    module.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(0.5)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        headgate.replace(module)
        quiet = module(*ARGS)
        module.act_fn.train()
        assert not torch.equal(module(*ARGS), quiet)
