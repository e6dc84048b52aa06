"""What each router of the literature promises by itself, as its paper or its users state it."""

import math

import pytest
import torch
from router_cases import D, E, K, fitting, skewed

from headgate.kernels.routing import Routing
from headgate.moe import (
    CosineRouter,
    ExpertChoiceRouter,
    Given,
    HashRouter,
    LocMoERouter,
    MoE,
    QuantileRouter,
    ReinforceRouter,
    SinkhornRouter,
    SoftmaxRouter,
    SoftRouter,
    TileRouter,
    TopPRouter,
    balanced_table,
    bias,
    capacity_bound,
    parts_of,
    reward,
)
from headgate.moe.shared import SharedExpert


class TestExpertChoice:
    @pytest.mark.parametrize(("tokens", "capacity"), [(64, 16), (33, 9), (3, 1)])
    def test_every_expert_takes_its_share(self, tokens, capacity):
        routing = ExpertChoiceRouter(D, E, K)(skewed(tokens))
        assert routing.counts.tolist() == [capacity] * E
        for e in range(E):  # the best ones, as a loop finds them
            best = routing.scores[:, e].argsort(descending=True)[:capacity]
            assert set(best.tolist()) == set((routing.expert_ids == e).any(1).nonzero()[:, 0].tolist())

    def test_some_tokens_go_without(self):
        ids = ExpertChoiceRouter(D, E, 1)(skewed()).expert_ids
        assert (ids < 0).all(1).any()

    def test_padding_takes_no_place(self):
        router, x = ExpertChoiceRouter(D, E, K), skewed(64)
        mask = torch.arange(64) < 32
        assert torch.equal(router(x, Given(mask=mask)).counts, router(x[:32]).counts)

    def test_refuses_evaluation_until_told_how(self):
        layer = MoE(D, 8, E, K, router="expert_choice").eval()
        with pytest.raises(ValueError, match=r'inference must be "threshold" or "choice" outside .* got None'):
            layer(skewed(4))

    def test_its_thresholds_keep_the_load_and_are_causal(self):
        router = ExpertChoiceRouter(D, E, K, inference="threshold", rate=0.2)
        for seed in range(40):
            router(skewed(seed=seed))
            router.update_bias()
        x = skewed(seed=99)
        routing = router.eval()(x)
        assert (routing.counts - 256 * K / E).abs().max() < 0.25 * 256 * K / E
        assert router.causal
        assert torch.equal(router(x[:5]).expert_ids, routing.expert_ids[:5])


class TestSinkhorn:
    def test_the_plan_has_even_rows_and_columns(self):
        logits = 3 * torch.randn(256, E, dtype=torch.float64)
        c = SinkhornRouter(D, E, K, iterations=60).columns(logits, Given())
        plan = (logits + c).softmax(1)
        torch.testing.assert_close(plan.sum(0), torch.full((E,), 256 / E, dtype=torch.float64), rtol=1e-4, atol=0)

    @pytest.mark.parametrize("shift", [100.0, 1e4, -1e4])
    def test_a_constant_changes_nothing(self, shift):
        router, logits = SinkhornRouter(D, E, K), torch.randn(64, E, dtype=torch.float64)
        torch.testing.assert_close(router.columns(logits + shift, Given()), router.columns(logits, Given()))

    def test_levels_while_training_and_not_after(self):
        router, x = SinkhornRouter(D, E, 1), skewed(1024)
        trained, plain = router(x).counts, router.eval()(x).counts
        assert plain.max() > 2 * 1024 / E
        assert trained.max() < 0.6 * plain.max()
        assert torch.equal(plain, torch.bincount((x @ router.weight.T).argmax(1), minlength=E))

    def test_weights_are_the_routers_own(self, assert_close):
        x = skewed()
        for k, score in ((1, torch.sigmoid), (2, lambda t: t.softmax(1))):
            router = SinkhornRouter(D, E, k)
            routing = router(x)
            assert_close(routing.weights, score(x @ router.weight.T).gather(1, routing.expert_ids.long()))


class TestHash:
    def test_a_table_that_was_given_is_there_after_meta(self):
        table = balanced_table(torch.arange(50), E, K)
        router = HashRouter(D, E, K, vocab_size=50, table=table, device="meta").to_empty(device="cpu")
        router.reset_parameters()
        assert torch.equal(router.table, table)

    def test_an_id_has_its_experts_wherever_it_stands(self):
        router = HashRouter(D, E, K, vocab_size=50)
        ids = torch.randint(50, (200,))
        got = router(torch.randn(200, D), Given(ids=ids)).expert_ids
        assert torch.equal(got, router.table[ids])
        assert torch.equal(router.table, HashRouter(D, E, K, vocab_size=50).table)
        assert not torch.equal(router.table, HashRouter(D, E, K, vocab_size=50, seed=1).table)

    @pytest.mark.parametrize("k", [1, 3])
    def test_a_balanced_table_levels_its_corpus(self, k):
        counts = (1000 / torch.arange(1, 301)).round()  # as often as Zipf says
        table = balanced_table(counts, E, k)
        load = torch.zeros(E).index_add_(0, table.flatten().long(), counts.repeat_interleave(k))
        assert load.max() <= max(counts.max(), 1.05 * load.mean())
        assert all(len(set(row)) == k for row in table.tolist())

    def test_its_gate_scores_the_tables_experts(self, assert_close):
        router, x, ids = HashRouter(D, E, K, vocab_size=50, score="sigmoid"), torch.randn(9, D), torch.arange(9)
        routing = router(x, Given(ids=ids))
        assert_close(routing.weights, (x @ router.weight.T).sigmoid().gather(1, router.table[ids].long()))

    def test_what_does_not_fit_is_named(self):
        router = HashRouter(D, E, 1, vocab_size=50)
        with pytest.raises(ValueError, match="ids must be between 0 and 49, got 50"):
            router(torch.randn(2, D), Given(ids=torch.tensor([3, 50])))
        with pytest.raises(ValueError, match=r"table must name experts between 0 and 7, got 8"):
            HashRouter(D, E, 1, vocab_size=2, table=torch.tensor([[0], [8]]))
        with pytest.raises(ValueError, match=r"table must be integers \[V, K\] = \[3, 1\], got torch.int64 \(2, 1\)"):
            HashRouter(D, E, 1, vocab_size=3, table=torch.tensor([[0], [1]]))
        with pytest.raises(ValueError, match="different experts for each id, got one twice"):
            HashRouter(D, E, 2, vocab_size=1, table=torch.tensor([[4, 4]]))


def test_a_cosine_knows_no_length():
    router, x = CosineRouter(D, E, K), torch.randn(64, D)
    want = router(x)
    for c in (1e-3, 100.0):
        got = router(c * x)
        assert torch.equal(got.expert_ids, want.expert_ids)
        torch.testing.assert_close(got.weights, want.weights, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("p", [0.2, 0.5, 0.9, 1.0])
def test_top_p_is_the_smallest_set_with_the_mass(p):
    routing = TopPRouter(D, E, E, p=p)(3 * torch.randn(128, D))
    mass, last = routing.weights.sum(1), routing.weights.masked_fill(routing.expert_ids < 0, 1).amin(1)
    assert (mass >= p - 1e-6).all()
    assert (mass - last < p).all()
    if p < 0.9:
        assert (routing.expert_ids < 0).any()


def test_relus_controller_can_always_come_back():
    router = fitting("relu")(D, E, K)
    for pairs, low, high in ((0, 0, 1e-30), (64 * E, 1e30, math.inf), (0, 0, 1e-30)):
        for _ in range(1500):
            router.update_bias(torch.tensor([pairs, 64]))
        assert low < router.strength < high


def test_relu_becomes_as_sparse_as_was_asked():
    torch.manual_seed(0)
    layer = MoE(D, 8, E, K, router="relu", router_options={"strength": 1e-4}, load_balancing_coef=1.0)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    bias.update_biases(layer, optimizer)
    target = torch.randn(256, D)
    share = []
    for _ in range(250):
        optimizer.zero_grad()
        (layer(skewed()) - target).square().mean().backward()
        optimizer.step()
        share.append(layer.last_routing.counts.sum().item() / (256 * E))
    assert share[0] > 0.35
    assert abs(sum(share[-50:]) / 50 - K / E) < 0.03


class TestQuantile:
    def test_one_step_after_another_evens_the_load(self):
        router, x = QuantileRouter(D, E, K, rate=0.5), skewed(512)
        for _ in range(60):
            router(x)
            router.update_bias()
        router.eval()
        assert (router(x).counts - 512 * K / E).abs().max() <= 1

    def test_any_split_gives_the_same_bias(self):
        whole, parts = QuantileRouter(D, E, K), QuantileRouter(D, E, K)
        parts.load_state_dict(whole.state_dict())
        x = skewed(512)
        for _ in range(3):
            whole(x)
            for part in x.split([100, 1, 300, 111]):
                parts(part)
            parts(x, Given(mask=torch.zeros(512, dtype=torch.bool)))
            assert torch.equal(whole.load, parts.load)
            whole.update_bias()
            parts.update_bias()
        assert torch.equal(whole.expert_bias, parts.expert_bias)
        assert whole.expert_bias.abs().max() > 0

    def test_it_goes_where_the_formula_says(self):
        """The (T K / E + 1)-th largest of s - alpha, by a sort."""
        router, x = QuantileRouter(D, E, K), skewed(512)
        scores = (x @ router.weight.T).sigmoid()
        alpha = scores.sort(1, descending=True)[0][:, K : K + 1]
        share = 512 * K // E
        ordered = (scores - alpha).sort(0, descending=True)[0]
        low, high = -ordered[share - 1], -ordered[share]  # between these two, exactly `share` tokens are above
        router(x)
        router.update_bias()
        got = router.expert_bias - router.expert_bias.mean()
        middle = (low + high) / 2
        width = (high - low).abs().max() + 0.01 * middle.abs().max()
        assert (got - (middle - middle.mean())).abs().max() <= width


def test_coefficients_for_routers_that_need_none_are_refused():
    for name in ("expert_choice", "sinkhorn", "hash"):
        router = fitting(name)(D, E, K)
        with pytest.raises(ValueError, match=r"load_balancing_coef must be 0 for a \w+, which needs no balancing loss"):
            MoE(D, 8, E, K, router=router, load_balancing_coef=0.1)


class TestLocMoE:
    def test_its_gate_is_orthogonal(self):
        gate = LocMoERouter(D, E, 1).logits(torch.eye(D, dtype=torch.float64)).T  # [E, D]
        gram = gate @ gate.T
        assert torch.equal(gram, torch.eye(E, dtype=torch.float64) * gram[0, 0])
        with pytest.raises(ValueError, match=r"hidden_size must be a multiple of num_experts \(8\), got 20"):
            LocMoERouter(20, E, 1)

    def test_the_bound_is_that_of_angles(self):
        """P(cos >= delta) by drawing directions: an expert must take a share of 1 / E of its inverse."""
        d, delta = 64, 0.1
        drawn = torch.randn(200_000, d, generator=torch.Generator().manual_seed(0))
        cosine = drawn[:, 0] / drawn.norm(dim=1)
        chance = (cosine.abs() >= delta).float().mean().item()
        assert capacity_bound(E, d, delta) == pytest.approx(1 / (E * chance), rel=0.25)
        assert capacity_bound(E, d, delta) > math.exp(delta**2 * d / (2 - delta**2)) / E

    def test_its_loss_brings_tokens_near(self):
        share = {}
        for coef in (0.0, 1.0):
            torch.manual_seed(0)
            router = LocMoERouter(D, E, 1, near=range(2), locality_coef=coef)
            before = torch.nn.Linear(D, D)
            optimizer = torch.optim.Adam(before.parameters(), lr=0.05)
            x = torch.randn(256, D)
            for _ in range(60):
                optimizer.zero_grad()
                router.balancing_loss(router(before(x))).backward()
                optimizer.step()
            share[coef] = router(before(x)).counts[:2].sum().item() / 256
        assert share[0.0] < 0.5 < 0.8 < share[1.0]


class TestReinforce:
    def test_its_gradient_is_the_enumerated_one(self):
        """E = 3, T = 4: the mean over draws of what the backward pass gives is the gradient of the expected reward."""
        torch.manual_seed(0)
        router = ReinforceRouter(5, 3, 1, rate=0.0, scale=1.0, dtype=torch.float64)
        x, gain = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
        expected = (router(x).scores * gain).sum()
        want = -torch.autograd.grad(expected, router.weight)[0]
        n = 20_000
        many, gains = x.repeat(n, 1), gain.repeat(n, 1)
        routing = router(many)
        reward(router, gains.gather(1, routing.expert_ids.long())[:, 0])
        routing.weights.sum().backward()
        assert (router.weight.grad / n - want).abs().max() < 0.05 * want.abs().max()

    def test_nothing_is_learned_where_the_baseline_knows_the_reward(self):
        router = ReinforceRouter(D, E, K)
        router.baseline.fill_(2.0)
        routing = router(skewed())
        reward(router, torch.full((256,), 2.0))
        routing.weights.sum().backward()
        assert router.weight.grad.eq(0).all()

    def test_padding_is_no_token(self):
        """Its reward, whatever it is, moves neither gate nor baseline, and it is not divided by."""
        found = []
        for more in (0, 5):
            torch.manual_seed(3)
            router = ReinforceRouter(D, E, K, gate_bias=True, entropy_coef=0.3, dtype=torch.float64)
            x, gain = torch.randn(7, D, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
            x, gain = (torch.cat([t, t.new_full((more, *t.shape[1:]), torch.nan)]) for t in (x, gain))
            torch.manual_seed(4)
            routing = router(x, Given(mask=torch.arange(7 + more) < 7))
            reward(router, gain)
            routing.weights.sum().backward()
            found.append((router.weight.grad, router.gate_bias.grad, router.baseline))
        for alone, padded in zip(*found, strict=True):
            torch.testing.assert_close(padded, alone)

    def test_it_learns_which_expert_pays(self):
        torch.manual_seed(0)
        router, x = ReinforceRouter(D, E, 1, rate=0.2), skewed(128)
        optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
        for _ in range(60):
            optimizer.zero_grad()
            routing = router(x)
            reward(router, (routing.expert_ids[:, 0] == 5).float())
            routing.weights.sum().backward()
            optimizer.step()
        assert (router.eval()(x).expert_ids == 5).float().mean() > 0.9

    def test_what_does_not_fit_is_named(self):
        with pytest.raises(ValueError, match="model must have a ReinforceRouter, got a SoftmaxRouter without any"):
            reward(SoftmaxRouter(D, E, K), torch.zeros(3))
        router = ReinforceRouter(D, E, K)
        routing = router(skewed(4))
        with pytest.raises(ValueError, match="reward must be finite, got some that is not"):
            reward(router, torch.tensor([0.0, torch.nan, 0.0, 0.0]))
        reward(router, torch.zeros(3))
        with pytest.raises(ValueError, match="reward must be of 4 tokens, got 3"):
            routing.weights.sum().backward()


class TestSoft:
    def test_slots_and_tokens_are_means(self):
        """Rows are convex sums of tokens, y of outputs: the same number everywhere stays it."""
        router = SoftRouter(D, E, K, slots_per_expert=3)
        x = torch.randn(40, D)
        rows, routing, back = router.mix(x, Given(sequences=4))
        logits = router.logits(x).unflatten(0, (4, 10))
        want = torch.einsum("bsr,bsd->brd", logits.softmax(1), x.view(4, 10, D)).flatten(0, 1)
        torch.testing.assert_close(rows, want)
        assert routing.expert_ids.view(4, -1)[0].tolist() == [e for e in range(E) for _ in range(3)]
        y = torch.randn(len(rows), D)
        want = torch.einsum("bsr,brd->bsd", logits.softmax(2), y.view(4, -1, D)).flatten(0, 1)
        torch.testing.assert_close(back(y), want)
        torch.testing.assert_close(back(torch.ones(len(rows), 1)), torch.ones(40, 1))

    def test_sequences_do_not_mix_and_every_expert_learns(self):
        layer, x = MoE(D, 8, E, K, router="soft"), torch.randn(3, 7, D)
        alone, y = layer(x[1:2]), layer(x)
        torch.testing.assert_close(alone, y[1:2])
        y.square().sum().backward()
        assert (layer.experts.w_down.grad.flatten(1).abs().sum(1) > 0).all()
        assert layer.last_routing.counts.tolist() == [3] * E

    def test_a_sequence_of_padding_takes_no_slot(self):
        layer, x = MoE(D, 8, E, K, router="soft"), torch.randn(2, 5, D)
        mask = torch.tensor([[True] * 5, [False] * 5])
        y = layer(x, mask)
        assert layer.last_routing.counts.tolist() == [1] * E
        torch.testing.assert_close(y[:1], layer(x[:1]))

    def test_what_it_cannot_do_is_named(self):
        layer = MoE(D, 8, E, K, router="soft").eval()
        with pytest.raises(ValueError, match='inference must be "whole" outside training, because a slot holds'):
            layer(skewed(4))
        with pytest.raises(ValueError, match="capacity must be None for a SoftRouter, whose experts all have as many"):
            MoE(D, 8, E, K, router="soft", capacity=1.0)
        with pytest.raises(ValueError, match="SoftRouter: slots_per_expert must be a positive integer, got 0"):
            SoftRouter(D, E, K, slots_per_expert=0)


class TestParts:
    def test_all_of_them_are_the_dense_network(self, assert_close):
        dense = SharedExpert(D, 24, dtype=torch.float64)
        layer, x = MoE(D, 3, E, E, router="parts", dtype=torch.float64), torch.randn(9, D, dtype=torch.float64)
        up, down = parts_of(dense.ffn.w_gate_up.data[0], dense.ffn.w_down.data[0], E)
        layer.experts.w_gate_up.data, layer.experts.w_down.data = up, down
        assert_close(layer(x), dense(x))

    def test_its_gradient_is_that_of_the_scores(self, assert_close):
        layer, x = MoE(D, 3, E, K, router="parts", dtype=torch.float64), skewed(9).double()
        aim = torch.randn(9, D, dtype=torch.float64)
        (layer(x) * aim).sum().backward()
        got = layer.router.weight.grad.clone()
        assert layer.last_routing.weights.eq(1).all()
        scores = (x @ layer.router.weight.T).softmax(1)
        ids = layer.last_routing.expert_ids
        gain = torch.zeros(9, E, dtype=torch.float64)  # what a larger weight of each chosen part would give
        for e in range(E):
            only = Routing.from_topk(torch.full((9, 1), e), torch.ones(9, 1, dtype=torch.float64), E)
            gain[:, e] = (layer.experts(x, only) * aim).sum(1).detach() * (ids == e).any(1)
        (want,) = torch.autograd.grad((scores * gain).sum(), layer.router.weight)
        assert_close(got, want)

    def test_shapes_that_do_not_fit_are_named(self):
        with pytest.raises(ValueError, match=r"must be \[2F, D\] and \[D, F\], got \[24, 16\] and \[16, 11\]"):
            parts_of(torch.ones(24, 16), torch.ones(16, 11), 4)
        with pytest.raises(ValueError, match=r"num_experts must divide F \(12\), got 5"):
            parts_of(torch.ones(24, 16), torch.ones(16, 12), 5)


class TestTile:
    @pytest.mark.parametrize("rounding", ["nearest", "up", "down", "stochastic"])
    def test_counts_are_whole_tiles(self, rounding):
        router, x = TileRouter(D, E, K, tile=16, rounding=rounding), skewed(512)
        own = router.eval()(x)
        rounded = router.train()(x)
        assert (rounded.counts % 16).eq(0).all()
        apart = rounded.counts - own.counts
        low, high = {"nearest": (-8, 8), "up": (0, 15), "down": (-15, 0), "stochastic": (-15, 15)}[rounding]
        assert low <= apart.min() <= apart.max() <= high
        for e in range(E):  # who goes has the lowest scores of those who chose it, who comes the best of the others
            score, chose, took = own.scores[:, e], (own.expert_ids == e).any(1), (rounded.expert_ids == e).any(1)
            went, came, stayed = score[chose & ~took], score[took & ~chose], score[chose & took]
            assert not (len(went) and len(came))
            assert not len(went) or went.max() <= min(stayed.tolist(), default=1)
            assert not len(came) or came.min() >= max(score[~chose & ~took].tolist(), default=0)

    def test_a_chance_keeps_the_expected_count(self):
        router, x = TileRouter(D, E, K, tile=16, rounding="stochastic"), skewed(512)
        own = router.eval()(x).counts
        router.train()
        mean = torch.stack([router(x).counts for _ in range(200)]).double().mean(0)
        assert (mean - own).abs().max() < 16 / 2 / 200**0.5 * 4.5

    def test_no_expert_takes_more_than_there_are(self):
        router = TileRouter(D, E, K, tile=128, rounding="up")
        mask = torch.arange(40) < 30
        counts = router(skewed(40), Given(mask=mask)).counts
        assert set(counts.tolist()) <= {0, 30}

    @pytest.mark.parametrize(
        ("option", "message"),
        [({"tile": 0}, "tile must be a positive"), ({"rounding": "x"}, "rounding must be one of nearest, stochastic"),
         ({"most": 1}, "most must be an integer from 2 to 8")],
    )  # fmt: skip
    def test_options_out_of_range_are_named(self, option, message):
        with pytest.raises(ValueError, match=f"TileRouter: {message}"):
            TileRouter(D, E, K, **option)
