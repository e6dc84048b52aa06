"""A swapped model under the transforms of torch.func and under forward-mode AD, against transformers' own loop."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from func_transforms import EACH, ONE, batched, looped
from torch.func import functional_call
from torch.testing import assert_close
from torch.utils._pytree import tree_map

import headgate

T = 5
NOT_THEIRS = {"backward of a gradient with a tangent"}  # torch's silu_backward has no forward mode


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def both(build):
    """(the swapped MoE block, transformers' own) of a family as functions of x and weights, and these; in fp64."""

    def make(name):
        theirs = build(name).model.double().eval().model.layers[-1]
        theirs = getattr(theirs, "mlp", None) or theirs.feed_forward
        ours = copy.deepcopy(theirs)
        assert headgate.replace(ours).replaced
        weights = {n: p.detach() for n, p in theirs.named_parameters() if "shared" not in n}

        def of(block):
            def function(x, *values):
                y = functional_call(block, dict(zip(weights, values, strict=True)), (x,))
                return y[0] if isinstance(y, tuple) else y

            return function

        x = torch.randn(1, T, next(iter(weights.values())).shape[-1], dtype=torch.float64)
        return of(ours), of(theirs), (x, *weights.values())

    return make


def close(got, want):
    assert_close(got, want, rtol=1e-7, atol=1e-9)


CHEAP = [n for n in ONE if n not in ("jacrev", "jacfwd", "hessian", *NOT_THEIRS)]


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "llama4"])
@pytest.mark.parametrize("name", CHEAP)
def test_a_block_as_it_was(name, family, both):
    ours, theirs, args = both(family)
    close(ONE[name](ours, args), ONE[name](theirs, args))


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
@pytest.mark.parametrize("name", ["jacrev", "jacfwd", "hessian"])
def test_jacobians_of_a_block_by_its_input(name, family, both):
    (ours, theirs), (x, *weights) = (pair := both(family))[:2], pair[2]
    got, want = (ONE[name](lambda x, f=f: f(x, *weights), (x,)) for f in (ours, theirs))
    close(got, want)


@pytest.mark.parametrize("each", EACH)
def test_many_blocks_at_once(each, both):
    ours, theirs, args = both("olmoe")
    close(batched(each, ours, args), looped(each, theirs, args))


class TestModel:
    """A whole OLMoE: gradients of each sequence, and an ensemble of three models."""

    @pytest.fixture
    def models(self, build):
        theirs = build("olmoe").model.double().eval()
        theirs.set_attn_implementation("eager")  # torch has no forward mode for the others
        ours = copy.deepcopy(theirs)
        headgate.replace(ours)
        return ours, theirs

    @staticmethod
    def loss(model, parameters, embeds):
        out = functional_call(model, parameters, kwargs={"inputs_embeds": embeds, "use_cache": False})
        return out.logits.square().mean()

    def test_gradients_of_each_sequence(self, models):
        ours, theirs = models
        parameters = {n: p.detach() for n, p in ours.named_parameters()}
        embeds = torch.randn(3, 1, T, ours.config.hidden_size, dtype=torch.float64)
        got = torch.func.vmap(torch.func.grad(lambda p, x: self.loss(ours, p, x)), (None, 0))(parameters, embeds)
        grads = [torch.func.grad(lambda p: self.loss(theirs, p, x))(parameters) for x in embeds]  # noqa: B023
        close(got, tree_map(lambda *g: torch.stack(g), *grads))

    def test_an_ensemble(self, models):
        ours, theirs = models
        each = [{n: p.detach() * (1 + 0.1 * i) for n, p in ours.named_parameters()} for i in range(3)]
        embeds = torch.randn(1, T, ours.config.hidden_size, dtype=torch.float64)
        got = torch.func.vmap(lambda p: self.loss(ours, p, embeds))(tree_map(lambda *p: torch.stack(p), *each))
        close(got, torch.stack([self.loss(theirs, p, embeds) for p in each]))

    def test_a_direction_forward(self, models):
        x = torch.randn(1, T, models[0].config.hidden_size, dtype=torch.float64)
        got, want = (ONE["jvp"](lambda x, m=m: self.loss(m, dict(m.named_parameters()), x), (x,)) for m in models)
        assert want.abs() > 1e-3
        close(got, want)
