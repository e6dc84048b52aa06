"""The bilevel router against a double loop, its two balancing losses against their formulas."""

import pytest
import torch

import headgate
from headgate.moe.losses import z_loss
from headgate.moe.routers import BilevelRouter

# experts, top_k, nodes, topk_nodes
FORMS = [(8, 1, 4, 1), (8, 2, 4, 2), (12, 4, 3, 2), (12, 3, 3, 1), (6, 6, 3, 3), (5, 2, 1, 1), (5, 3, 5, 3)]


def naive(router, x):
    """(ids, weights, p [T, N], q [T, N, g]) of a double loop over tokens and their nodes."""
    each, k = router.num_experts // router.nodes, router.top_k // router.topk_nodes
    ids, weights, ps, qs = [], [], [], []
    for token in x:
        p = (router.node_weight @ token + (0 if router.node_bias is None else router.node_bias)).softmax(0)
        local = router.weight @ token + (0 if router.gate_bias is None else router.gate_bias)
        q = torch.stack([part.softmax(0) for part in local.split(each)])
        chosen = []
        for i in p.sort(descending=True).indices[: router.topk_nodes].tolist():
            chosen += [(i, j) for j in q[i].sort(descending=True).indices[:k].tolist()]
        w = torch.stack([p[i] * q[i, j] for i, j in chosen])
        ids.append([i * each + j for i, j in chosen])
        weights.append((w / w.sum() if router.renormalize else w) * router.scale)
        ps.append(p)
        qs.append(q)
    return torch.tensor(ids), torch.stack(weights), torch.stack(ps), torch.stack(qs)


def losses(router, ids, p, q):
    """The two balancing losses, from their formulas, in loops."""
    tokens, (nodes, each), k = len(ids), q.shape[1:], router.top_k // router.topk_nodes
    over_nodes = inside = 0
    for i in range(nodes):
        own = [t for t in range(tokens) if any(e // each == i for e in ids[t].tolist())]
        over_nodes = over_nodes + nodes * len(own) / tokens * p[:, i].mean()
        for j in range(each):
            f = sum(i * each + j in ids[t].tolist() for t in own) / max(len(own), 1)
            mean = q[own, i, j].mean() if own else 0
            inside = inside + len(own) / tokens * each * f * mean
    assert sum(len(row) for row in ids) == tokens * k * router.topk_nodes
    return over_nodes, inside


def make(form, **options):
    experts, k, nodes, topk_nodes = form
    return BilevelRouter(20, experts, k, nodes=nodes, topk_nodes=topk_nodes, dtype=torch.float64, **options)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("options", [{}, {"renormalize": True, "scale": 2.5, "gate_bias": True}], ids=str)
@pytest.mark.parametrize("tokens", [1, 33])
def test_equals_a_double_loop(form, options, tokens, assert_close):
    router = make(form, **options)
    if router.gate_bias is not None:
        torch.nn.init.normal_(router.gate_bias)
        torch.nn.init.normal_(router.node_bias)
    x, x2 = (torch.randn(tokens, 20, generator=torch.Generator().manual_seed(3)).double() for _ in range(2))
    x, x2 = x.requires_grad_(), x2.requires_grad_()
    routing = router(x)
    ids, weights, p, q = naive(router, x2)
    assert torch.equal(routing.expert_ids.long(), ids)
    assert_close(routing.weights, weights)
    scores = (p[:, :, None] * q).flatten(1)
    assert_close(routing.scores, scores)
    assert_close(routing.scores.sum(1), torch.ones(tokens).double())
    g, h = torch.randn_like(weights), torch.randn_like(scores)
    parameters = list(router.parameters())
    got = torch.autograd.grad((routing.weights * g).sum() + (routing.scores * h).sum(), [x, *parameters])
    want = torch.autograd.grad((weights * g).sum() + (scores * h).sum(), [x2, *parameters])
    for a, b in zip(got, want, strict=True):
        # where all experts of a node are chosen and renormalised the gradients cancel out
        assert (a - b).abs().max() <= 1e-12 * max(1, b.abs().max())


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_token_reaches_so_many_nodes_and_experts_in_each(form):
    experts, k, nodes, topk_nodes = form
    ids = make(form)(10 * torch.randn(300, 20).double()).expert_ids
    reached = torch.nn.functional.one_hot((ids // (experts // nodes)).long(), nodes).sum(1)
    assert set(reached.flatten().tolist()) <= {0, k // topk_nodes}
    assert (reached > 0).sum(1).eq(topk_nodes).all()


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("coefs", [(1.0, 1.0), (0.3, 0.0), (0.0, 0.7)], ids=str)
def test_balancing_loss_is_its_formulas(form, coefs, assert_close):
    router = make(form, node_coef=coefs[0], local_coef=coefs[1])
    x = torch.randn(33, 20).double()
    ids, _, p, q = naive(router, x)
    over_nodes, inside = losses(router, ids, p, q)
    want = coefs[0] * over_nodes + coefs[1] * inside
    got = router.balancing_loss(router(x))
    assert_close(got, want)
    for name, parameter in router.named_parameters():
        a, b = (torch.autograd.grad(loss, parameter, retain_graph=True)[0] for loss in (got, want))
        assert (a - b).abs().max() <= 1e-12, name


def test_balancing_loss_of_sequences_is_the_mean_of_each(assert_close):
    router = make((12, 4, 3, 2))
    x = torch.randn(4 * 9, 20).double()
    each = torch.stack([router.balancing_loss(router(one)) for one in x.chunk(4)])
    assert_close(router.balancing_loss(router(x), sequences=4), each.mean())
    assert router.balancing_loss(router(x[:0])) == router.balancing_loss(router(x[:0]), sequences=0) == 0


def test_balancing_loss_of_even_load():
    """Each token to its own node and expert, all with the same probabilities: topk_nodes and top_k."""
    router = make((4, 1, 2, 1), node_coef=3.0, local_coef=5.0)
    with torch.no_grad():
        router.node_weight.zero_()
        router.weight.zero_()
        for t, (i, j) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):  # by hardly anything
            router.node_weight[i, t] = router.weight[2 * i + j, t] = 1e-9
    routing = router(torch.eye(4, 20, dtype=torch.float64))
    assert routing.expert_ids.flatten().tolist() == [0, 1, 2, 3]
    assert router.balancing_loss(routing).item() == pytest.approx(3.0 * 1 + 5.0 * 1)


def test_z_loss_is_that_of_both_levels_logits(assert_close):
    router, x = make((8, 2, 4, 2)), torch.randn(33, 20).double()
    both = torch.cat([x @ router.node_weight.T, x @ router.weight.T], 1)
    loss = z_loss(router(x))
    assert_close(loss, both.exp().sum(1).log().square().mean())
    loss.backward()
    assert router.node_weight.grad.abs().sum() > 0
    assert router.weight.grad.abs().sum() > 0


def test_in_a_layer_it_levels_nodes_and_experts():
    options = {"nodes": 4, "topk_nodes": 2}
    layer = headgate.MoE(16, 9, 8, 2, router="bilevel", router_options=options, load_balancing_coef=1.0)
    with torch.no_grad():
        layer.router.node_weight[:2] += 0.3
        layer.router.weight[::2] += 0.3
    x = torch.randn(256, 16) + 0.5
    layer(x)
    before = layer.last_routing.counts
    optimizer = torch.optim.SGD(layer.router.parameters(), lr=0.5)
    for _ in range(100):
        optimizer.zero_grad()
        (layer(x) * 0).sum().backward()
        optimizer.step()
    after = layer.last_routing.counts
    assert before.view(4, 2).sum(1).max() > 1.5 * 128
    assert before.max() > 2.5 * 64
    assert after.view(4, 2).sum(1).max() < 1.2 * 128
    assert after.max() < 1.5 * 64


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"nodes": 3}, ValueError, r"nodes must divide the number of experts \(8\), got 3"),
        ({"nodes": 2.0}, TypeError, r"nodes must be an integer, got 2\.0"),
        ({"nodes": 0}, ValueError, "nodes must divide .* got 0"),
        ({"topk_nodes": 5}, ValueError, r"topk_nodes must be between 1 and nodes \(4\), got 5"),
        (
            {"topk_nodes": 3},
            ValueError,
            r"topk_nodes must divide top_k \(4\) into at most the 2 experts",
        ),
        ({"topk_nodes": 1}, ValueError, "topk_nodes must divide .* at most the 2 experts of a node, got 1"),
        ({"node_coef": -1.0}, ValueError, r"node_coef must be finite and not negative, got -1\.0"),
        ({"local_coef": float("nan")}, ValueError, "local_coef must be finite and not negative, got nan"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=f"BilevelRouter: {message}"):
        BilevelRouter(**{"hidden_size": 20, "num_experts": 8, "top_k": 4, "nodes": 4, "topk_nodes": 2} | change)
