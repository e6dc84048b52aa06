"""Read-ME's experts and routers, and whole models behind a router."""

from __future__ import annotations

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

from headgate.moe.clusters import kmeans  # noqa: E402
from headgate.moe.convert import Ensemble, LearnedRouter, Posterior, convert, pregated, walk  # noqa: E402
from headgate.moe.convert.dense import InMemory  # noqa: E402
from headgate.moe.convert.families import gates  # noqa: E402
from headgate.moe.convert.readme import fit_router  # noqa: E402
from headgate.moe.convert.walk import Walk  # noqa: E402

SHAPE = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}


def a_model(width: int = 32, layers: int = 2, seed: int = 0, **more):
    torch.manual_seed(seed)
    shape = {**SHAPE, "intermediate_size": width, "num_hidden_layers": layers, "initializer_range": 0.3, **more}
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shape, head_dim=8)).eval()


@pytest.fixture(scope="module")
def two_domains() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A dense model whose lower tokens wake the first half of its neurons, and the others the second; sequences of
    either kind [12, 10], and which."""
    model = a_model()
    halves = torch.arange(40) >= 20
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(0.1)
        model.model.embed_tokens.weight[:, 0] = torch.where(halves, 3.0, -3.0)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.01)
            layer.mlp.down_proj.weight.mul_(0.02)
            layer.mlp.down_proj.weight[0] = 0
            layer.mlp.gate_proj.weight.mul_(0.1)
            layer.mlp.gate_proj.weight[:, 0] = torch.where(torch.arange(32) < 16, -3.0, 3.0)
    kinds = torch.arange(12) % 2
    return model, torch.randint(1, 20, (12, 10)) + 20 * kinds[:, None], kinds


def in_windows():
    config = transformers.MistralConfig(**SHAPE, intermediate_size=32, num_hidden_layers=2, sliding_window=3)
    return transformers.MistralForCausalLM(config).eval()


@pytest.mark.parametrize("make", [a_model, in_windows])
def test_a_walk_is_the_models_own_forward_layer_by_layer(make, monkeypatch):
    monkeypatch.setattr(walk, "_TOKENS", 14)
    model, ids = make(), torch.randint(1, 40, (4, 7))
    seen: dict[str, list] = {"x": [], "h": []}
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda m, a: seen["x"].append(a[0].flatten(0, 1)))
        layer.mlp.down_proj.register_forward_pre_hook(lambda m, a: seen["h"].append(a[0].flatten(0, 1)))
    with torch.no_grad():
        model(ids)
    theirs = {name: list(some) for name, some in seen.items()}
    walked = list(Walk(InMemory(model), [ids[:1], ids[1:]]).layers())
    assert [layer for layer, _, _ in walked] == [0, 1]
    for (_, x, mass), x1, h1, layer in zip(walked, theirs["x"], theirs["h"], model.model.layers, strict=True):
        torch.testing.assert_close(x, x1, rtol=1e-4, atol=1e-4)
        parts = h1.abs() * layer.mlp.down_proj.weight.norm(dim=0)
        torch.testing.assert_close(mass, (parts / parts.sum(1, keepdim=True)).detach(), rtol=1e-3, atol=1e-5)


def test_experts_are_the_neurons_of_a_domain_and_routers_find_it(two_domains):
    model, ids, kinds = two_domains
    moe = convert(model, experts=2, top_k=1, method="activations", calibration=ids, keep=0.5, steps=60)
    for layer, dense in zip(moe.model.layers, model.model.layers, strict=True):
        experts, gate = layer.mlp.experts.gate_up_proj[:, :16], dense.mlp.gate_proj.weight
        halves = [torch.equal(expert, gate[some]) for expert in experts for some in (slice(0, 16), slice(16, 32))]
        assert halves in ([True, False, False, True], [False, True, True, False])
    chosen: list[torch.Tensor] = []
    for gate in gates(moe):
        gate.register_forward_hook(lambda m, a, out: chosen.append(out[2].view(12, 10)))
    with torch.no_grad():
        error = (moe(ids).logits - model(ids).logits).norm() / model(ids).logits.norm()
    for ids_of_layer in chosen:
        assert all(len(row.unique()) == 1 for row in ids_of_layer)
        assert len({(int(kind), int(row[0])) for kind, row in zip(kinds, ids_of_layer, strict=True)}) == 2
    assert error < 0.05
    given = convert(model, experts=2, top_k=1, method="activations", calibration=list(ids.split(5)), keep=16,
                    domains=kinds.tolist(), steps=0)  # fmt: skip
    lower = given.model.layers[1].mlp.experts.gate_up_proj[0, :16]
    assert torch.equal(lower, model.model.layers[1].mlp.gate_proj.weight[:16])


def test_a_pregate_chooses_for_all_layers(two_domains):
    model, ids, _ = two_domains
    moe = convert(model, experts=3, top_k=2, method="activations", calibration=ids, pregate=True, steps=20)
    chosen: list[torch.Tensor] = []
    hooks = [layer.mlp.experts.register_forward_pre_hook(lambda m, a: chosen.append(a[1]))
             for layer in moe.model.layers]  # fmt: skip
    with torch.no_grad():
        own = moe(ids).logits
        chosen.clear()
        with pregated(moe):
            moe(ids)
    assert torch.equal(*chosen)
    with pregated(moe):
        moe(ids, labels=ids).loss.backward()
    first, second = gates(moe)
    assert first.weight.grad.any()
    assert second.weight.grad is None
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        assert torch.equal(moe(ids).logits, own)
    with pytest.raises(ValueError, match="pregated: model must have routers of one E and K, got none"), pregated(model):
        pass


def test_a_router_is_distilled_from_which_expert_holds_most():
    torch.manual_seed(0)
    x, truth = torch.randn(400, 12) * 7, torch.randn(5, 12)
    target = (x @ truth.T / 7).softmax(1)
    weight = fit_router(x, target, 120, 0)
    assert ((x @ weight.T).argmax(1) == target.argmax(1)).float().mean() > 0.9


# --- ensembles -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_one_model_is_that_model_and_the_posterior_is_bayes_on_what_was_seen():
    """Models of different sizes; against the sum over models of p(model) p(text | model), written out."""
    models = [a_model(32, 2, 1), a_model(16, 1, 2), a_model(48, 2, 3)]
    ids = torch.randint(1, 40, (2, 6))
    one = Ensemble(models[:1], Posterior(1))(ids, labels=ids)
    torch.testing.assert_close(one.logits, models[0](ids).logits.log_softmax(-1))
    torch.testing.assert_close(one.loss, models[0](ids, labels=ids).loss)
    found = Ensemble(models, Posterior(3))(ids)
    logp = [model(ids).logits.double().log_softmax(-1) for model in models]
    for b in range(2):
        for t in range(6):
            weights = torch.tensor([1 / 3] * 3, dtype=torch.float64)
            for i in range(1, t + 1):
                weights *= torch.stack([p[b, i - 1, ids[b, i]].exp() for p in logp])
            mixed = sum(w * p[b, t].exp() for w, p in zip(weights / weights.sum(), logp, strict=True))
            torch.testing.assert_close(found.logits[b, t].exp().double(), mixed, rtol=1e-4, atol=1e-6)
    later = ids.clone()
    later[:, 4:] = 7
    torch.testing.assert_close(Ensemble(models, Posterior(3))(later).logits[:, :4], found.logits[:, :4])
    best = Ensemble(models, Posterior(3), top_k=1)(ids)
    picked = torch.stack(logp, 2).gather(2, found.weights.argmax(2)[..., None, None].expand(-1, -1, 1, 40))[:, :, 0]
    torch.testing.assert_close(best.logits, picked.float())


@torch.no_grad()
def test_a_prior_is_learned_from_text_of_a_domain():
    models = [a_model(seed=1), a_model(seed=2)]
    posterior = Posterior(2)
    ensemble = Ensemble(models, posterior)
    ids = torch.randint(1, 40, (4, 1))
    for _ in range(11):  # what the second model says
        ids = torch.cat([ids, torch.multinomial(models[1](ids).logits[:, -1].softmax(-1), 1)], 1)
    before = ensemble(ids, labels=ids).loss
    posterior.fit(ensemble, [ids])
    assert posterior.log_prior.argmax() == 1
    assert ensemble(ids, labels=ids).loss < before


class Denoiser(nn.Module):
    """The best velocity for x = (1 - t) noise + t data where data is normal around `mean` with deviation `std`."""

    def __init__(self, mean: torch.Tensor, std: float, label: int) -> None:
        super().__init__()
        self.mean, self.std, self.label, self.rows = mean, std, label, 0

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.rows += len(x)
        t = t[:, None]
        gain = (t * self.std**2 - (1 - t)) / (t**2 * self.std**2 + (1 - t) ** 2)
        return self.mean + gain * (x - t * self.mean)


def test_denoisers_of_parts_weighted_by_a_learned_router_are_the_denoiser_of_the_whole():
    """Decentralized diffusion: against the marginal velocity of a mixture in closed form; k-means finds the parts."""
    torch.manual_seed(0)
    means, std = torch.tensor([[2.0, 0.0], [-2.0, 1.0], [0.0, -3.0]]), 0.4
    truth = torch.randint(3, (1500,))
    data = means[truth] + std * torch.randn(1500, 2)
    centers, parts = kmeans(data, 3)
    experts = [Denoiser(center, std, e) for e, center in enumerate(centers)]
    t = torch.rand(1500)
    x = (1 - t[:, None]) * torch.randn(1500, 2) + t[:, None] * data
    features = torch.cat([x, t[:, None]], 1)
    router = LearnedRouter(3, 3, 32)
    losses = router.fit(features, parts, steps=300)
    assert losses[-1] < losses[0]
    var = t[:, None] ** 2 * std**2 + (1 - t[:, None]) ** 2
    chance = torch.stack([-((x - t[:, None] * c) ** 2).sum(1) / (2 * var[:, 0]) for c in centers], 1)
    chance = (chance + (torch.bincount(parts) / 1500).log()).softmax(1)
    whole = sum(chance[:, e, None] * expert(x, t) for e, expert in enumerate(experts))
    with torch.no_grad():
        ensemble = Ensemble(experts, router, mix="outputs")
        error = (ensemble(x, t, features=features) - whole).norm() / whole.norm()
        even = sum(expert(x, t) for expert in experts) / 3
        assert error < 0.3 * (even - whole).norm() / whole.norm()
        for expert in experts:
            expert.rows = 0
        sparse = Ensemble(experts, router, mix="outputs", top_k=1)
        found = sparse(x, t, features=features)
        assert sum(expert.rows for expert in experts) == 1500  # a row runs through its own model alone
        best = router(features).argmax(1)
        each = torch.stack([expert(x, t) for expert in experts], 1)
        torch.testing.assert_close(found, each[torch.arange(1500), best])
        alone = Ensemble(experts[:1], LearnedRouter(3, 1, 0), mix="outputs")
        assert torch.equal(alone(x, t, features=features), experts[0](x, t))
        assert ensemble(x[:0], t[:0], features=features[:0]).shape == (0, 2)


def test_a_learned_router_mixes_language_models_too():
    models, ids = [a_model(seed=1), a_model(16, 1, 2)], torch.randint(1, 40, (3, 5))
    router = LearnedRouter(4, 2, 0)
    features = torch.randn(3, 4)
    found = Ensemble(models, router)(ids, features=features, labels=ids)
    weights = router(features).softmax(1)[:, :, None, None]
    mixed = sum(weights[:, m] * model(ids).logits.softmax(-1) for m, model in enumerate(models))
    torch.testing.assert_close(found.logits, mixed.log(), rtol=1e-4, atol=1e-4)
    found.loss.backward()
    assert router.net[0].weight.grad.any()


def test_a_token_that_no_model_thinks_possible_has_a_finite_loss_and_gradient():
    models = [nn.Embedding.from_pretrained(torch.tensor([[0.0, last]] * 2), freeze=False) for last in (-150.0, -160.0)]
    router = nn.Linear(1, 2)
    ids = torch.ones(2, 3, dtype=torch.int64)
    for top_k in (1, 2):
        found = Ensemble(models, router, top_k=top_k)(ids, features=torch.ones(2, 1), labels=ids)
        found.loss.backward()
        assert 149 < found.loss < 162
        assert all(p.grad is None or p.grad.isfinite().all() for p in [router.weight, *models[0].parameters()])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Ensemble([], Posterior(1)), "models must be modules, at least one"),
        (lambda: Ensemble([nn.Linear(1, 1)], Posterior(2)), "router must be for 1 models that give probabilities"),
        (lambda: Ensemble([nn.Linear(1, 1)], nn.Linear(1, 1), top_k=2), "top_k must be in 1 .. 1, got 2"),
        (lambda: Ensemble([nn.Linear(1, 1)], nn.Linear(1, 1), mix="x"), "mix must be 'probabilities' or 'outputs'"),
        (lambda: Ensemble([a_model(), a_model(vocab_size=41)], Posterior(2)), r"a vocabulary, got sizes \[40, 41\]"),
        (lambda: Ensemble([nn.Linear(2, 2)], nn.Linear(2, 3), mix="outputs")(torch.ones(4, 2)),
         r"router must give logits \[4, 1\], got \[4, 3\]"),
        (lambda: LearnedRouter(2, 2).fit(torch.ones(3, 2), torch.tensor([0, 1, 2])), "in 0 .. 1, got up to 2"),
        (lambda: Posterior(0), "models must be at least 1, got 0"),
        (lambda: Posterior(2, 0), "temperature must be positive and finite, got 0"),
    ],
)  # fmt: skip
def test_odd_ensembles(make, says):
    with pytest.raises(ValueError, match=says):
        make()
