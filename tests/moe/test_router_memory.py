"""Routers with experts that cost nothing or with a memory, as their papers have them: MoE++, LongCat, RMoE, Read-ME."""

from dataclasses import replace

import pytest
import torch
from router_cases import D, E, K, skewed

from headgate.kernels.plan import plan
from headgate.kernels.routing import Routing
from headgate.kernels.topk import topk
from headgate.moe import (
    Given,
    LongCatRouter,
    MoE,
    MoEPPRouter,
    PregateRouter,
    RecurrentRouter,
    SoftmaxRouter,
    distillation_loss,
)
from headgate.moe.losses import load_balancing_loss


class TestMoEPP:
    def test_without_memory_and_free_experts_it_is_plain(self, assert_close):
        plain, router = SoftmaxRouter(D, E, K, renormalize=True), MoEPPRouter(D, E, K, zero=0, copy=0, constant=0)
        x, state = skewed(), torch.randn(256, E)
        with torch.no_grad():
            router.weight.copy_(plain.weight)
            router.memory.zero_()
        want, got = plain(x), router(x, Given(state=state))
        assert torch.equal(got.expert_ids, want.expert_ids)
        assert_close(got.weights, want.weights)

    def test_tau_one_is_the_loss_of_switch(self, assert_close):
        for tau, same in ((1.0, True), (0.75, False)):
            router = MoEPPRouter(D, E, K, tau=tau)
            routing = router(skewed())
            every = Routing.from_topk(routing.expert_ids, routing.weights, E + 4)
            switch = load_balancing_loss(replace(every, scores=routing.scores))
            if same:
                assert_close(router.balancing_loss(routing), switch)
            else:
                assert router.balancing_loss(routing) < switch

    def test_free_experts_answer_as_the_paper_says_and_cost_no_row(self, assert_close):
        layer = MoE(D, 8, E, K, router="moepp", dtype=torch.float64)
        x = skewed(64).double()
        y, _ = layer(x)
        routing, free = layer.last_routing, layer.router.free
        want = layer.experts(x, routing)
        for t in range(64):
            for e, w in zip(routing.expert_ids[t].tolist(), routing.weights[t], strict=True):
                if e == E + 1:
                    want[t] = want[t] + w * x[t]
                elif e > E + 1:
                    a = (free.mixes[e - E - 2] @ x[t]).softmax(0)
                    want[t] = want[t] + w * (a[0] * x[t] + a[1] * free.vectors[e - E - 2])
        assert_close(y, want)
        ffn = (routing.expert_ids < E).sum()
        assert routing.counts.sum() == ffn
        assert ffn < 64 * K
        assert plan(routing.expert_ids, E).offsets[-1] == ffn  # the rows of the grouped product

    def test_both_choices_zero_is_nothing(self):
        router = MoEPPRouter(D, 1, 1, zero=4, copy=0, constant=0)
        with torch.no_grad():
            router.weight[0] = -9
        layer = MoE(D, 8, 1, 1, router=router)
        x = torch.ones(5, D, requires_grad=True)
        y, _ = layer(x)
        y.sum().backward()
        assert y.eq(0).all()
        assert x.grad.isfinite().all()

    def test_capacity_is_the_papers(self):
        bound = MoEPPRouter(D, E, K, tau=0.5).capacity(1.1)
        assert bound.of(tokens=1000, top_k=K, num_experts=E) == round(1.1 * 0.5 * 1000 * K / (0.5 * E + 4))

    def test_a_state_of_other_sizes_is_refused(self):
        with pytest.raises(
            ValueError, match=r"MoEPPRouter: state must be \[\.\.\., 12\], as a layer of the same sizes"
        ):
            MoE(D, 8, E, K, router="moepp")(skewed(4), state=torch.zeros(4, 9))


class TestLongCat:
    def test_equals_transformers(self, assert_close):
        modeling = pytest.importorskip("transformers.models.longcat_flash.modeling_longcat_flash")
        config = modeling.LongcatFlashConfig(
            hidden_size=D, n_routed_experts=E, zero_expert_num=4, moe_topk=K, routed_scaling_factor=2.5,
            num_layers=1, num_attention_heads=2,
        )  # fmt: skip
        theirs = modeling.LongcatFlashTopkRouter(config)
        router = LongCatRouter(D, E, K, identity=4, scale=2.5)
        with torch.no_grad():
            theirs.classifier.weight.copy_(router.weight)
            theirs.e_score_correction_bias.zero_()
            theirs.e_score_correction_bias[:E] = router.expert_bias.uniform_(-0.1, 0.1)
        x = torch.randn(33, D)
        got, (weights, ids) = router(x), theirs(x)[-2:]
        if ids.dtype.is_floating_point:
            weights, ids = ids, weights
        order, order2 = ids.sort(1)[1], got.expert_ids.long().sort(1)[1]
        assert torch.equal(ids.gather(1, order), got.expert_ids.long().gather(1, order2))
        assert_close(got.weights.gather(1, order2), weights.gather(1, order))

    @pytest.mark.parametrize("aim", [1.0, 2.5])
    def test_a_token_has_so_many_ffn_experts_on_average(self, aim):
        router = LongCatRouter(D, E, 4, identity=4, ffn_k=aim, bias_rate=0.05)
        x = skewed(512)
        for _ in range(400):
            router(x)
            router.update_bias()
        counts = router(x).counts
        assert abs(counts.sum() / 512 - aim) < 0.1
        assert counts.max() < 1.5 * counts.float().mean()


class TestRecurrent:
    def _layers(self):
        cell = torch.nn.GRUCell(8, 8)
        return [MoE(D, 8, E, K, router="recurrent", router_options={"cell": cell}) for _ in range(3)]

    def test_its_cell_is_torchs(self, assert_close):
        layer = self._layers()[0]
        x, before = torch.randn(5, D), torch.randn(5, 8)
        _, state = layer(x, state=before)
        assert_close(state, layer.router.cell(x @ layer.router.projection.T, before))

    def test_the_last_layers_loss_reaches_the_first_ones_projection(self):
        layers, x = self._layers(), torch.randn(5, D)
        state = None
        for layer in layers:
            y, state = layer(x, state=state)  # all see x: nothing else joins them
        y.sum().backward()
        assert all(layer.router.projection.grad.abs().sum() > 0 for layer in layers)

    def test_tokens_are_apart_and_a_stage_takes_over(self):
        layers, x = self._layers(), torch.randn(6, D)
        y, state = x, None
        for layer in layers:
            y, state = layer(y, state=state)
        for part in (slice(0, 2), slice(2, 6)):
            z, held = x[part], None
            for layer in layers:
                z, held = layer(z, state=None if held is None else held.detach().clone())
            torch.testing.assert_close(z, y[part])

    def test_bad_cells_are_named(self):
        with pytest.raises(ValueError, match=r"cell must be an nn.GRUCell\(H, H\) with biases, got GRUCell\(8, 4\)"):
            RecurrentRouter(D, E, K, cell=torch.nn.GRUCell(8, 4))


class TestPregate:
    def test_every_layer_follows_the_first(self):
        layers = [MoE(D, 8, E, K, router="pregate") for _ in range(3)]
        x, state = layers[0](skewed(9))
        schedule = topk(state, K).expert_ids  # known before the second layer runs
        for layer in layers[1:]:
            x, state = layer(x, state=state)
            assert torch.equal(layer.last_routing.expert_ids, schedule)

    def test_distillation_teaches_it(self):
        router, x, target = PregateRouter(D, E, K), skewed(128), 3 * torch.randn(128, E)
        optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
        losses = []
        for _ in range(60):
            optimizer.zero_grad()
            losses.append(distillation_loss(router(x).logits, target, temperature=2.0))
            losses[-1].backward()
            optimizer.step()
        assert losses[-1] < 0.9 * losses[0]
        with pytest.raises(ValueError, match="hard must be between 0 and 1, got 2"):
            distillation_loss(target, target, hard=2)
