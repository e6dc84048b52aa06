"""What a layer can do besides: forced balance, weights on the experts' input, a latent size around the experts."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import headgate
from headgate.kernels.routing import Routing
from headgate.moe import Experts
from headgate.moe.forced import FORCED

D, F, E, K = 20, 9, 8, 2


def make(**options):
    return headgate.MoE(D, F, E, K, **{"dtype": torch.float64} | options)


class TestForced:
    @pytest.mark.parametrize("how", FORCED)
    @pytest.mark.parametrize("router", ["softmax", "sigmoid", "bilevel"])
    def test_every_token_has_k_experts_and_the_load_is_even(self, how, router):
        layer = make(
            force_load_balancing=how, router=router, router_options={"nodes": 2} if router == "bilevel" else {}
        )
        with torch.no_grad():
            layer.router.weight[0] += 3.0  # a favourite
        x = (torch.randn(4, 128, D, dtype=torch.float64) + 1).requires_grad_()
        layer(x).sum().backward()
        ids, counts = layer.last_routing.expert_ids, layer.last_routing.counts
        assert all(len(set(row)) == K for row in ids.tolist())
        assert torch.equal(counts, torch.bincount(ids.flatten(), minlength=E).int())
        even = 512 * K / E
        assert counts.eq(even).all() if how == "round_robin" else (counts - even).abs().max() < even / 2
        assert layer.router.weight.grad.abs().sum() > 0
        assert x.grad.isfinite().all()

    def test_random_is_drawn_anew_and_round_robin_is_not(self):
        x = torch.randn(64, D, dtype=torch.float64)
        for how in FORCED:
            layer = make(force_load_balancing=how).eval()
            layer(x)
            first = layer.last_routing.expert_ids
            layer(x)
            assert torch.equal(first, layer.last_routing.expert_ids) == (how == "round_robin")

    def test_a_checkpointed_layer_draws_the_same_again(self, assert_close):
        layer, x = make(force_load_balancing="random"), torch.randn(33, D, dtype=torch.float64, requires_grad=True)
        torch.manual_seed(3)
        (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
        torch.manual_seed(3)
        y = checkpoint(layer, x, use_reentrant=False)
        assert_close(torch.autograd.grad(y.square().sum(), x)[0], expected)

    @pytest.mark.parametrize("how", FORCED)
    def test_compiles_whole(self, how, own_compilations):
        layer = headgate.MoE(D, F, E, K, force_load_balancing=how, capacity=headgate.Capacity(1.5, pad=True))
        x = torch.randn(32, D)
        torch.compile(layer, fullgraph=True, backend="aot_eager")(x).sum().backward()
        assert layer.last_routing.counts.sum() <= 32 * K
        if how == "round_robin":
            assert layer.last_routing.counts.eq(32 * K / E).all()

    def test_a_router_of_ones_own_without_scores(self):
        class Zeros(nn.Module):
            def forward(self, x):
                return Routing.from_topk(x.new_zeros(len(x), 1).long(), x.new_ones(len(x), 1), E)

        layer = headgate.MoE(D, F, E, 1, router=Zeros(), force_load_balancing="round_robin")
        layer(torch.randn(16, D))
        assert layer.last_routing.counts.tolist() == [2] * E


def plain_on_input(experts, x, ids, weights):
    """sum_k FFN_e(weight * x), pair by pair."""
    rows = []
    for t in range(len(x)):
        y = torch.zeros_like(x[t])
        for k in range(ids.shape[1]):
            e = ids[t, k].item()
            if 0 <= e < experts.num_experts:
                h = experts.w_gate_up[e] @ (weights[t, k] * x[t])
                h = h if experts.b_gate_up is None else h + experts.b_gate_up[e]
                gate, up = h.chunk(2)
                out = experts.w_down[e] @ (nn.functional.silu(gate) * up)
                y = y + (out if experts.b_down is None else out + experts.b_down[e])
        rows.append(y)
    return torch.stack(rows) if rows else x * 1.0


class TestWeightsOnInput:
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("k", [1, 3])
    @pytest.mark.parametrize("tokens", [0, 17])
    def test_equals_a_plain_loop(self, tokens, k, bias, cpu_form, assert_close):
        experts = Experts(E, D, F, bias=bias, weights_on_input=True, dtype=torch.float64)
        with torch.no_grad():
            for p in experts.parameters():
                p.normal_()
        x = torch.randn(tokens, D, dtype=torch.float64, requires_grad=True)
        weights = torch.rand(tokens, k, dtype=torch.float64, requires_grad=True)
        ids = torch.rand(tokens, E).argsort(1)[:, :k]
        ids[::5, 0] = -1
        y, want = experts(x, Routing.from_topk(ids, weights, E)), plain_on_input(experts, x, ids, weights)
        inputs, g = [x, weights, *experts.parameters()], torch.randn_like(want)
        got = torch.autograd.grad(y, inputs, g, allow_unused=True)
        expected = torch.autograd.grad(want, inputs, g, allow_unused=True)
        assert_close(y, want)
        for a, b, p in zip(got, expected, inputs, strict=True):
            zero = torch.zeros_like(p)
            assert_close(zero if a is None else a, zero if b is None else b)

    def test_the_layer_is_llama_4s_and_compiles(self, own_compilations, assert_close):
        options = {"router": "sigmoid", "shared_intermediate_size": 5, "weights_on_input": True}
        layer = headgate.MoE(D, F, E, 1, **options)
        twin = copy.deepcopy(layer)
        x = torch.randn(17, D)
        y = layer(x)
        routing = layer.router(x)
        assert_close(y, plain_on_input(layer.experts, x, routing.expert_ids, routing.weights) + layer.shared(x))
        y.sum().backward()
        compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
        y2 = compiled(x)
        assert_close(y2, y)
        y2.sum().backward()
        for p, q in zip(layer.parameters(), twin.parameters(), strict=True):
            assert_close(q.grad, p.grad)

    def test_half_types_and_autocast(self, assert_close):
        layer = headgate.MoE(D, F, E, K, weights_on_input=True)
        x = torch.randn(17, D)
        y = layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_close(layer(x), y, dtype=torch.bfloat16)
        half = copy.deepcopy(layer).to(torch.bfloat16)(x.to(torch.bfloat16))
        assert half.dtype == torch.bfloat16

    def test_offloaded(self, tmp_path, assert_close):
        layer = headgate.MoE(D, F, E, K, weights_on_input=True).eval()
        x = torch.randn(17, D)
        with torch.no_grad():
            y = layer(x)
            with headgate.offload(layer, budget=3 * (2 * F * D + D * F) * 4, disk=tmp_path):
                assert_close(layer(x), y)

    def test_sensitivity_measures_what_the_experts_make_of_it(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed, self.moe = nn.Embedding(50, D), headgate.MoE(D, F, E, K, weights_on_input=True)

            def forward(self, input_ids):
                self.seen = self.embed(input_ids).flatten(0, 1)
                return self.moe(self.seen)

        model = Model()
        with torch.no_grad():
            model.embed.weight.mul_(3)
        found = headgate.moe.offload.sensitivity(model, torch.randint(0, 50, (3, 9)), ("int8",))
        routing = model.moe.last_routing
        for e in range(E):
            size = torch.zeros(())
            for t, k in (routing.expert_ids == e).nonzero().tolist():
                chosen, weight = torch.tensor([[e]]), routing.weights[t, k].view(1, 1)
                size += plain_on_input(model.moe.experts, model.seen[t : t + 1], chosen, weight).square().sum()
            assert found.size[0, e] == pytest.approx(size.item(), rel=1e-4)


class TestLatent:
    @pytest.mark.parametrize("bias", [False, True])
    def test_equals_projections_around_the_experts(self, bias, assert_close):
        layer = make(latent_size=6, shared_intermediate_size=5, bias=bias)
        assert layer.experts.w_gate_up.shape == (E, 2 * F, 6)
        assert layer.router.weight.shape == (E, D)
        assert (layer.latent_down.bias is not None) == bias
        x = torch.randn(3, 11, D, dtype=torch.float64, requires_grad=True)
        flat = x.reshape(-1, D)
        want = layer.latent_up(layer.experts(layer.latent_down(flat), layer.router(flat))) + layer.shared(flat)
        inputs = [x, *layer.parameters()]
        g = torch.randn_like(x)
        y = layer(x)
        assert_close(y, want.view(x.shape))
        for a, b in zip(torch.autograd.grad(y, inputs, g), torch.autograd.grad(want.view(x.shape), inputs, g),
                        strict=True):  # fmt: skip
            assert_close(a, b)

    def test_compiles_copies_and_loads(self, own_compilations, assert_close):
        layer, x = make(latent_size=6), torch.randn(17, D, dtype=torch.float64)
        other = make(latent_size=6)
        other.load_state_dict(layer.state_dict())
        y = layer(x)
        assert_close(other(x), y)
        assert_close(torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")(x), y)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"force_load_balancing": "even"},
            ValueError,
            "force_load_balancing must be one of random, round_robin or None",
        ),
        ({"latent_size": -1}, ValueError, "latent_size must not be negative, got -1"),
        ({"latent_size": 2.5}, TypeError, r"latent_size must be an integer, got 2\.5"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=f"MoE: {message}"):
        make(**change)
