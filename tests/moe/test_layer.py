"""The whole layer against a double loop, and everything PyTorch does to modules done to it."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import headgate
from headgate.kernels.routing import Routing
from headgate.kernels.topk import topk
from headgate.moe.layer import MoE
from headgate.moe.losses import load_balancing_loss, z_loss

COEFS = {"load_balancing_coef": 0.3, "z_loss_coef": 0.2}
ROUTER_OPTIONS = {"softmax": {"renormalize": True}, "sigmoid": {"scale": 2.5}}


def naive(layer, x):
    """The layer in words of one syllable: for each token, for each of its best experts."""
    out, router = [], layer.router
    for token in x.reshape(-1, x.shape[-1]):
        logits = router.weight @ token
        if isinstance(router, headgate.moe.routers.SigmoidRouter):
            scores = logits.sigmoid()
            best = (scores + router.expert_bias).topk(router.top_k)[1].tolist()
        else:
            scores = logits.softmax(0)
            best = scores.topk(router.top_k)[1].tolist()
        total = sum(scores[e] for e in best) if router.renormalize else 1
        y = torch.zeros_like(token)
        for e in best:
            weight = scores[e] / total * router.scale
            gate, up = (layer.experts.w_gate_up[e] @ token).chunk(2)
            y = y + weight * (layer.experts.w_down[e] @ (nn.functional.silu(gate) * up))
        if layer.shared is not None:
            gate, up = (layer.shared.ffn.w_gate_up[0] @ token).chunk(2)
            z = layer.shared.ffn.w_down[0] @ (nn.functional.silu(gate) * up)
            y = y + (z if layer.shared.gate is None else layer.shared.gate(token).sigmoid() * z)
        out.append(y)
    return torch.stack(out).reshape(x.shape) if out else x * 1.0


def make(router="softmax", *, hidden=70, experts=5, k=2, **options):
    options = {"router_options": ROUTER_OPTIONS[router]} | options
    return headgate.MoE(hidden, 9, experts, k, router=router, **options)


def _compare(layer, twin, x, y, x2, y2, assert_close, scale=1.0):
    grad = torch.randn_like(y)
    y.backward(grad)
    y2.backward(grad.to(y2.dtype))
    dtype = y.dtype
    assert_close(y, y2, dtype=dtype, scale=scale)
    assert_close(x.grad, x2.grad, dtype=dtype, scale=scale)
    for (name, p), q in zip(layer.named_parameters(), twin.parameters(), strict=True):
        got, want = (torch.zeros_like(t) if t.grad is None else t.grad for t in (p, q))
        assert_close(got, want, dtype=dtype, name=name, scale=scale)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(0,), (1,), (33,), (3, 4)], ids=str)
@pytest.mark.parametrize("router", ROUTER_OPTIONS)
@pytest.mark.parametrize("shared", [None, False, True], ids=["no shared", "shared", "shared, gated"])
def test_equals_a_double_loop(shape, router, shared, dtype, assert_close):
    extra = {} if shared is None else {"shared_intermediate_size": 7, "shared_gate": shared}
    layer = make(router, dtype=dtype, **extra)
    if router == "sigmoid":
        layer.router.expert_bias.normal_(std=0.2)
    twin = copy.deepcopy(layer)
    x = torch.randn(*shape, 70, dtype=dtype, requires_grad=True)
    x2 = x.detach().clone().requires_grad_()
    _compare(layer, twin, x, layer(x), x2, naive(twin, x2), assert_close)


@pytest.mark.parametrize("favour", [+50.0, -50.0], ids=["all tokens to one expert", "an expert without tokens"])
@pytest.mark.parametrize("k", [1, 5])
def test_equals_a_double_loop_on_lopsided_and_full_routing(favour, k, assert_close):
    layer = make("sigmoid", k=k, dtype=torch.float64, router_options={"renormalize": k > 1})
    layer.router.expert_bias[3] = favour
    twin = copy.deepcopy(layer)
    x = torch.randn(33, 70, dtype=torch.float64, requires_grad=True)
    x2 = x.detach().clone().requires_grad_()
    y = layer(x)
    assert layer.last_routing.counts[3] == (33 if favour > 0 or k == 5 else 0)
    _compare(layer, twin, x, y, x2, naive(twin, x2), assert_close)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_follow_fp32(dtype, assert_close):
    layer = make(shared_intermediate_size=8, shared_gate=True).to(dtype)
    twin = copy.deepcopy(layer).float()
    x = torch.randn(33, 70).to(dtype).requires_grad_()
    x2 = x.detach().float().requires_grad_()
    y = layer(x)
    assert y.dtype == dtype
    _compare(layer, twin, x, y, x2, twin(x2), assert_close)


class TestLosses:
    @pytest.mark.parametrize("scope", ["batch", "sequence"])
    @pytest.mark.parametrize("router", ROUTER_OPTIONS)
    def test_ride_on_the_backward_pass_of_y(self, router, scope, assert_close):
        layer = make(router, dtype=torch.float64, load_balancing_scope=scope, **COEFS)
        twin = copy.deepcopy(layer)
        x = torch.randn(3, 11, 70, dtype=torch.float64)
        layer.aux_scale = 0.5
        layer(x).square().sum().backward()

        routing = twin.router(x.reshape(-1, 70))
        balance = load_balancing_loss(routing, sequences=3 if scope == "sequence" else 1)
        total = twin.experts(x.reshape(-1, 70), routing).square().sum()
        (total + 0.5 * (0.3 * balance + 0.2 * z_loss(routing))).backward()
        for p, q in zip(layer.parameters(), twin.parameters(), strict=True):
            assert_close(p.grad, q.grad)
        assert_close(layer.aux_losses["load_balancing"], balance)
        assert_close(layer.aux_losses["z_loss"], z_loss(routing))
        assert not any(loss.requires_grad for loss in layer.aux_losses.values())

    def test_train_the_router_alone_when_y_counts_for_nothing(self):
        layer = make(**COEFS)
        (layer(torch.randn(9, 70)) * 0).sum().backward()
        assert layer.router.weight.grad.abs().sum() > 0
        assert layer.experts.w_down.grad.eq(0).all()

    def test_are_left_out_of_evaluation_and_of_no_grad(self):
        layer = make(**COEFS)
        with torch.no_grad():
            assert not layer(torch.randn(9, 70)).requires_grad
        assert set(layer.aux_losses) == {"load_balancing", "z_loss"}
        layer.eval()
        (layer(torch.randn(9, 70)) * 0).sum().backward()
        assert layer.router.weight.grad.eq(0).all()

    def test_are_readable_without_coefficients_and_then_change_nothing(self, assert_close):
        layer, x = make(), torch.randn(9, 70)
        (layer(x) * 0).sum().backward()
        assert layer.router.weight.grad.eq(0).all()
        assert_close(layer.aux_losses["load_balancing"], load_balancing_loss(layer.router(x)))

    def test_balance_is_the_routers_own_where_it_has_one(self):
        class Half(nn.Linear):
            """Its balancing loss is half the sum of its weights, whatever it chose."""

            def forward(self, x):
                return topk(super().forward(x), 2)

            def balancing_loss(self, routing, *, sequences, ranks):
                assert (sequences, ranks) == (None, None)
                return self.weight.sum() / 2

        layer = MoE(70, 9, 5, 2, router=Half(70, 5), load_balancing_coef=0.5)
        (layer(torch.randn(9, 70)) * 0).sum().backward()
        assert layer.router.weight.grad.eq(0.25).all()
        assert layer.aux_losses["load_balancing"] == layer.router.weight.sum() / 2

    def test_level_the_load_when_minimised(self):
        layer = make(hidden=16, experts=8, load_balancing_coef=1.0)
        with torch.no_grad():
            layer.router.weight[:2] += 0.3
        x = torch.randn(256, 16) + 0.5
        layer(x)
        before = layer.last_routing.counts.max()
        optimizer = torch.optim.SGD(layer.router.parameters(), lr=0.5)
        for _ in range(60):
            optimizer.zero_grad()
            (layer(x) * 0).sum().backward()
            optimizer.step()
        assert before > 2.5 * 64
        assert layer.last_routing.counts.max() < 1.5 * 64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("router", ROUTER_OPTIONS)
def test_keeps_rows_preactivation_and_routing_for_backward_and_nothing_else(router, dtype):
    layer, x = make(router, dtype=dtype), torch.randn(33, 70, dtype=dtype, requires_grad=True)
    own = {p.untyped_storage().data_ptr() for p in layer.state_dict(keep_vars=True).values()}
    kept = {}

    def note(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y = layer(x)
    rows, h, size = 33 * 70, 33 * 2 * 2 * 9, dtype.itemsize
    ids_weights_scores = 4 * (33 * 2 + 33 * 2 + 33 * 5)
    assert sum(kept.values()) == size * (rows + h) + ids_weights_scores
    y.sum().backward()


class TestPyTorch:
    @pytest.mark.parametrize("router", ROUTER_OPTIONS)
    def test_compiles_whole_with_its_bookkeeping(self, router, assert_close):
        layer = make(router, shared_intermediate_size=8, shared_gate=True, **COEFS)
        twin = copy.deepcopy(layer)
        compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
        for tokens in (9, 33, 1, 0):
            x = torch.randn(2, tokens, 70, requires_grad=True)
            x2 = x.detach().clone().requires_grad_()
            _compare(layer, twin, x, layer(x), x2, compiled(x2), assert_close)
            assert torch.equal(twin.last_routing.expert_ids, layer.last_routing.expert_ids)
            assert_close(twin.aux_losses["z_loss"], layer.aux_losses["z_loss"])
            if router == "sigmoid":
                assert torch.equal(twin.router.load, layer.router.load)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_gradient_checkpointing_changes_nothing(self, reentrant, assert_close):
        layer = make("sigmoid", **COEFS)
        twin = copy.deepcopy(layer)
        x = torch.randn(33, 70, requires_grad=True)
        x2 = x.detach().clone().requires_grad_()
        _compare(layer, twin, x, layer(x), x2, checkpoint(twin, x2, use_reentrant=reentrant), assert_close)
        layer.router.update_bias()
        twin.router.update_bias()
        assert torch.equal(layer.router.expert_bias, twin.router.expert_bias)

    def test_autocast_runs_experts_in_its_dtype_and_scores_in_fp32(self, assert_close):
        layer, x = make(shared_intermediate_size=8, **COEFS), torch.randn(33, 70)
        y, scores = layer(x), layer.last_routing.scores
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y16 = layer(x)
        assert y16.dtype == torch.bfloat16
        assert_close(y16, y, dtype=torch.bfloat16)
        assert torch.equal(layer.last_routing.scores, scores)
        y16.float().sum().backward()
        assert layer.experts.w_down.grad.dtype == torch.float32

    def test_copies_pickles_and_state_round_trip(self):
        layer, x = make("sigmoid", shared_intermediate_size=8), torch.randn(9, 70)
        y = layer(x)
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        other = make("sigmoid", shared_intermediate_size=8)
        other.load_state_dict(layer.state_dict())
        for twin in (copy.deepcopy(layer), torch.load(file, weights_only=False), other):
            assert torch.equal(twin(x), y)
        assert list(layer.state_dict()) == [
            "router.weight",
            "router.expert_bias",
            "experts.w_gate_up",
            "experts.w_down",
            "shared.ffn.w_gate_up",
            "shared.ffn.w_down",
        ]

    def test_built_on_meta_then_loaded_or_reset(self):
        there = make("sigmoid", shared_intermediate_size=8, shared_gate=True)
        layer = make("sigmoid", shared_intermediate_size=8, shared_gate=True, device="meta")
        assert {p.device.type for p in layer.state_dict().values()} == {"meta"}
        layer.to_empty(device="cpu").load_state_dict(there.state_dict())
        x = torch.randn(3, 70)
        assert torch.equal(layer(x), there(x))
        layer = make("sigmoid", shared_intermediate_size=8, shared_gate=True, device="meta").to_empty(device="cpu")
        for module in layer.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        assert layer(x).isfinite().all()

    @pytest.mark.parametrize("router", ROUTER_OPTIONS)
    def test_runs_on_meta(self, router):
        layer = make(router, shared_intermediate_size=8, shared_gate=True, device="meta", **COEFS)
        y = layer(torch.randn(2, 3, 70, device="meta"))
        y.sum().backward()
        assert (y.device.type, y.shape) == ("meta", (2, 3, 70))
        assert all(p.grad.shape == p.shape for p in layer.parameters())

    def test_weights_from_outside(self, assert_close):
        """As torch.func.functional_call and optimizers of whole trees of parameters hand them in."""
        layer, x = make(shared_intermediate_size=8), torch.randn(9, 70)
        twice = {name: 2 * p.detach() for name, p in layer.named_parameters()}
        got = torch.func.functional_call(layer, twice, (x,))
        with torch.no_grad():
            for p in layer.parameters():
                p *= 2
        assert_close(got, layer(x))

    def test_any_leading_shape_and_layout(self, assert_close):
        layer = make()
        x = torch.randn(70, 3, 2).permute(2, 1, 0)
        assert_close(layer(x), layer(x.contiguous()))
        assert layer(x[0, 0]).shape == (70,)
        assert layer(torch.randn(2, 0, 70)).shape == (2, 0, 70)
        assert layer(torch.randn(2, 3, 4, 70)).shape == (2, 3, 4, 70)


class TestRouting:
    def test_last_routing_is_kept_detached(self):
        layer = make()
        assert layer.last_routing is None
        layer(torch.randn(3, 4, 70))
        seen = layer.last_routing
        assert (seen.expert_ids.shape, seen.scores.shape, seen.num_experts) == ((12, 2), (12, 5), 5)
        assert seen.counts.sum() == 24
        assert not seen.weights.requires_grad
        assert not seen.scores.requires_grad

    def test_a_router_module_of_ones_own(self, assert_close):
        class RoundRobin(nn.Module):
            def forward(self, x):
                ids = torch.arange(x.shape[0])[:, None] % 5
                return Routing.from_topk(ids, torch.ones(x.shape[0], 1, dtype=x.dtype), 5)

        layer, x = MoE(70, 9, 5, 1, router=RoundRobin()), torch.randn(7, 70)
        y = layer(x)
        gate, up = (x[6] @ layer.experts.w_gate_up[1].T).chunk(2)
        assert_close(y[6], (nn.functional.silu(gate) * up) @ layer.experts.w_down[1].T)
        assert layer.last_routing.counts is None
        assert layer.aux_losses == {}


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"top_k": 6}, ValueError, r"MoE: top_k must be between 1 and num_experts \(5\), got 6"),
            ({"top_k": 0}, ValueError, "MoE: top_k must be between 1"),
            ({"top_k": 2.0}, TypeError, r"MoE: top_k must be an integer, got 2\.0"),
            ({"num_experts": "5"}, TypeError, "MoE: num_experts must be an integer, got '5'"),
            ({"intermediate_size": 4.5}, TypeError, r"Experts: intermediate_size must be an integer, got 4\.5"),
            (
                {"router": "magic"},
                ValueError,
                "MoE: router must be one of softmax, sigmoid, .* or a module, got 'm",
            ),
            ({"router": 3}, TypeError, "MoE: router must be a name or a module, got int"),
            ({"router": nn.Identity(), "router_options": {"scale": 2.0}}, ValueError, "router_options must come with"),
            ({"router": headgate.moe.routers.SoftmaxRouter(8, 4, 2)}, ValueError, "num_experts must be .* got 4"),
            ({"router_options": {"scale": 0.0}}, ValueError, "scale must be positive and finite, got 0"),
            ({"activation": "swoosh"}, ValueError, r"activation must be one of silu, .*, got 'swoosh'"),
            ({"hidden_size": 0}, ValueError, "hidden_size must be at least 1, got 0"),
            ({"shared_intermediate_size": -1}, ValueError, "shared_intermediate_size must not be negative, got -1"),
            ({"shared_gate": True}, ValueError, "shared_gate must come with shared_intermediate_size > 0"),
            ({"load_balancing_coef": -1.0}, ValueError, "load_balancing_coef must be finite and not negative"),
            ({"z_loss_coef": float("nan")}, ValueError, "z_loss_coef must be finite and not negative, got nan"),
            ({"capacity": 0.0}, ValueError, r"Capacity: factor must be positive and finite, got 0\.0"),
            ({"capacity": "all"}, TypeError, "Capacity: factor must be a number, got 'all'"),
            (
                {"load_balancing_scope": "step"},
                ValueError,
                "scope must be one of batch, rank, .*, got 'step'",
            ),
            ({"load_balancing_scope": "global"}, ValueError, "load_balancing_group must be given with"),
        ],
        ids=str,
    )
    def test_bad_arguments_are_named(self, change, error, message):
        with pytest.raises(error, match=message):
            MoE(**{"hidden_size": 8, "intermediate_size": 4, "num_experts": 5, "top_k": 2} | change)

    def test_bad_x_is_named(self):
        layer = make()
        with pytest.raises(ValueError, match=r"MoE: x must be \[\.\.\., 70\], got \(3, 71\)"):
            layer(torch.randn(3, 71))
        with pytest.raises(TypeError, match=r"MoE: x must be a tensor \[\.\.\., 70\], got list"):
            layer([1.0, 2.0])
        with pytest.raises(ValueError, match=r"MoE: x must be \[\.\.\., 70\], got \(\)"):
            layer(torch.tensor(1.0))
        with pytest.raises(TypeError, match=r"w_gate_up must have the dtype of rows, got torch\.float32 and torch\."):
            layer(torch.randn(3, 70, dtype=torch.bfloat16))
        with pytest.raises(TypeError, match=r"w_gate_up must have the dtype of rows, got torch\.float32 and torch\."):
            layer(torch.zeros(3, 70, dtype=torch.long))
        assert layer.last_routing is None

    @pytest.mark.parametrize("router", ROUTER_OPTIONS)
    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_non_finite_scores_are_refused(self, router, bad):
        x = torch.randn(3, 70)
        x[1, 2] = bad
        layer = make(router)
        with pytest.raises(ValueError, match=r"router's scores.* must be finite, got .* for token 1"):
            layer(x)
        assert layer.last_routing is None

    def test_a_router_must_return_a_routing(self):
        with pytest.raises(TypeError, match="MoE: router must return a Routing, got Tensor"):
            MoE(70, 9, 5, 1, router=nn.Linear(70, 5))(torch.randn(3, 70))


@pytest.mark.filterwarnings("ignore")
def test_lora_on_its_experts(assert_close):
    """PEFT's adapter on the stacked weights: as the layer with base + scaling * B A of each expert."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    plain = torch.nn.Sequential(headgate.MoE(16, 8, 4, 2, shared_intermediate_size=8))
    x, before = torch.randn(5, 16), {name: w.detach().clone() for name, w in plain.named_parameters()}
    targets = ["experts.w_gate_up", "experts.w_down"]
    config = peft.LoraConfig(r=3, lora_alpha=6, init_lora_weights=False, target_parameters=targets)
    model = peft.get_peft_model(plain, config)
    got = model(x)
    got.square().sum().backward()
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(learning) == 4
    assert all(p.grad.any() for p in learning.values())
    whole = torch.nn.Sequential(headgate.MoE(16, 8, 4, 2, shared_intermediate_size=8))
    whole.load_state_dict(before)
    for wrapper in (m for m in model.modules() if hasattr(m, "parameter_name")):
        a, b = (side["default"].weight.detach() for side in (wrapper.lora_A, wrapper.lora_B))
        delta = torch.einsum("eri,ore->eoi", a.view(4, 3, -1), b.view(-1, 3, 4))
        getattr(whole[0].experts, wrapper.parameter_name).data += 2 * delta
    assert_close(got, whole(x))
    model.merge_adapter()
    assert_close(model(x), whole(x))
