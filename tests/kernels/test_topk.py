"""topk against its reference, torch.topk, finite differences, and its own contract about ties and errors."""

import pytest
import torch

from headgate.kernels.topk import SCORES, topk, topk_reference
from headgate.kernels.topk.reference import best_of

FORMS = [
    {"score": "softmax"},
    {"score": "softmax", "renormalize": True, "scale": 2.5},
    {"score": "softmax", "groups": 4, "topk_groups": 2, "group_score": "max", "scale": 16.0},
    {"score": "topk_softmax", "scale": 0.5},
    {"score": "sigmoid", "renormalize": True, "scale": 2.5, "groups": 4, "topk_groups": 2},
    {"score": "sqrtsoftplus", "renormalize": True},
]
SHAPES = [(0, 8, 2), (1, 8, 1), (7, 8, 4), (33, 64, 8), (5, 1024, 32), (40, 256, 32)]


def _reference(logits, k, bias=None, score="softmax", **form):
    return topk_reference(logits, k, bias, score, **form)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=lambda f: "-".join(map(str, f.values())))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_equals_its_reference_with_and_without_bias(shape, form, dtype, assert_close):
    tokens, experts, k = shape
    logits = torch.randn(tokens, experts).to(dtype)
    for bias in (None, torch.randn(experts) * 0.3):
        got = topk(logits, k, bias=bias, **form)
        weights, scores, ids, counts = _reference(logits, k, bias, **form)
        assert torch.equal(got.expert_ids, ids)
        assert torch.equal(got.counts, counts)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert (got.expert_ids.dtype, got.counts.dtype) == (torch.int32, torch.int32)
        assert (got.weights.dtype, got.scores.dtype) == (wide, wide)
        assert_close(got.weights, weights, dtype=wide)
        assert_close(got.scores, scores, dtype=wide)
        assert got.counts.sum() == tokens * k


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("renormalize", [False, True])
def test_gradients_equal_finite_differences_twice(score, renormalize):
    logits = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)

    def weights_and_scores(x):
        routing = topk(x, 3, score=score, renormalize=renormalize, scale=1.7)
        return routing.weights, routing.scores

    assert torch.autograd.gradcheck(weights_and_scores, logits)
    assert torch.autograd.gradgradcheck(weights_and_scores, logits)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_equal_the_references(score, dtype, assert_close):
    logits = (torch.randn(33, 16) * 2).to(dtype).requires_grad_()
    twin = logits.detach().clone().requires_grad_()
    got = topk(logits, 4, score=score, renormalize=True)
    weights, scores, _, _ = _reference(twin, 4, score=score, renormalize=True)
    a, b = torch.randn(33, 4), torch.randn(33, 16)
    ((got.weights * a).sum() + (got.scores * b).sum()).backward()
    ((weights * a).sum() + (scores * b).sum()).backward()
    assert logits.grad.dtype == dtype
    assert_close(logits.grad, twin.grad, dtype=dtype)


def test_gradient_through_one_output_alone_or_none():
    logits = torch.randn(4, 8, requires_grad=True)
    topk(logits, 2).scores.square().sum().backward()
    assert logits.grad.abs().sum() > 0
    logits.grad = None
    topk(logits, 2).weights.sum().backward()
    assert logits.grad.abs().sum() > 0
    routing = topk(logits, 2)
    assert not routing.expert_ids.requires_grad
    assert not routing.counts.requires_grad


@pytest.mark.parametrize("tokens", [1, 200], ids=["sorted at once", "selected, ties sorted again"])
def test_ties_go_to_the_lowest_id(tokens):
    flat = torch.zeros(tokens, 64)
    assert topk(flat, 5).expert_ids.tolist() == [[0, 1, 2, 3, 4]] * tokens
    flat[:, 40] = 1.0
    flat[: tokens // 2, 9] = 1.0
    ids = topk(flat, 3, score="sigmoid").expert_ids
    assert ids[: tokens // 2].tolist() == [[9, 40, 0]] * (tokens // 2)
    assert ids[tokens // 2 :].tolist() == [[40, 0, 1]] * (tokens - tokens // 2)


@pytest.mark.parametrize("tokens", [1, 50])
def test_all_experts_and_one_expert(tokens, assert_close):
    logits = torch.randn(tokens, 32)
    every = topk(logits, 32, renormalize=True)
    assert torch.equal(every.expert_ids.long().sort(1)[0], torch.arange(32).expand(tokens, 32))
    assert_close(every.weights, logits.softmax(1).gather(1, every.expert_ids.long()))
    one = topk(logits[:, :1], 1)
    assert one.expert_ids.eq(0).all()
    assert one.weights.eq(1).all()


def test_bias_moves_the_choice_and_nothing_else(assert_close):
    logits = torch.randn(50, 8, requires_grad=True)
    bias = torch.zeros(8, requires_grad=True)
    with torch.no_grad():
        bias[3] = 10.0
    routing = topk(logits, 2, score="sigmoid", bias=bias)
    assert routing.expert_ids[:, 0].eq(3).all()
    assert_close(routing.weights, logits.detach().sigmoid().gather(1, routing.expert_ids.long()))
    routing.weights.sum().backward()
    assert bias.grad is None


def test_groups_bound_how_many_groups_a_token_reaches():
    routing = topk(torch.randn(100, 32), 8, score="sigmoid", groups=8, topk_groups=2)
    reached = [len(set((row // 4).tolist())) for row in routing.expert_ids]
    assert max(reached) == 2


@pytest.mark.parametrize("best", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_a_group_is_as_good_as_the_sum_of_its_best_experts(best, score):
    """Megatron-Core's group_limited_topk with topk // group_topk = best."""
    logits, bias = torch.randn(100, 32, dtype=torch.float64), torch.randn(32, dtype=torch.float64)
    routing = topk(logits, 8, score=score, bias=bias, groups=4, topk_groups=2, group_score=best)
    choice = (logits.sigmoid() if score == "sigmoid" else logits.softmax(1)) + bias
    groups = choice.view(100, 4, 8).topk(best)[0].sum(2).topk(2)[1]
    inside = torch.zeros(100, 4).scatter(1, groups, 1).repeat_interleave(8, 1).bool()
    ids = choice.masked_fill(~inside, float("-inf")).topk(8)[1]
    assert torch.equal(routing.expert_ids.long(), ids)
    for name, number in (("max", 1), ("top2", 2)):
        if best == number:
            named = topk(logits, 8, score=score, bias=bias, groups=4, topk_groups=2, group_score=name)
            assert torch.equal(named.expert_ids, routing.expert_ids)


def test_layout_of_the_logits_does_not_matter():
    logits = torch.randn(16, 24)
    strided = torch.randn(24, 2, 16).transpose(0, 2)[:, 1]
    strided.copy_(logits)
    assert not strided.is_contiguous()
    a, b = topk(logits, 3), topk(strided, 3)
    assert torch.equal(a.expert_ids, b.expert_ids)
    assert torch.equal(a.weights, b.weights)


@pytest.mark.parametrize("form", FORMS, ids=lambda f: "-".join(map(str, f.values())))
def test_is_a_well_formed_operator(form):
    full = {
        "score": "softmax",
        "groups": 1,
        "topk_groups": 1,
        "group_score": 2,
        "renormalize": False,
        "scale": 1.0,
    } | form
    full["group_score"] = best_of(full["group_score"])  # the operator takes a number
    for bias in (None, torch.randn(8)):
        args = (torch.randn(5, 8, requires_grad=True), 2, bias, *full.values())
        torch.library.opcheck(torch.ops.headgate.topk.default, args)


def test_compiles_whole_forward_and_backward(assert_close):
    def f(x):
        routing = topk(x, 2, score="sigmoid", renormalize=True)
        return (routing.weights * torch.arange(2.0)).sum() + routing.scores[:, 0].sum(), routing.counts

    x = torch.randn(9, 8, requires_grad=True)
    y, counts = f(x)
    (expected,) = torch.autograd.grad(y, x)
    y2, counts2 = torch.compile(f, fullgraph=True, backend="aot_eager")(x)
    assert_close(torch.autograd.grad(y2, x)[0], expected)
    assert torch.equal(counts, counts2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_non_finite_scores_are_refused(bad, dtype):
    logits = torch.randn(6, 8, dtype=dtype)
    logits[4, 5] = bad
    with pytest.raises(ValueError, match=r"topk: logits .* must be finite, got .* for token 4, expert 5"):
        topk(logits, 2)


def test_large_finite_logits_are_not_refused():
    logits = torch.full((300, 300), 6e4, dtype=torch.float16)
    assert topk(logits, 2).weights.isfinite().all()
    assert topk(torch.full((4, 4), 3e38), 2).weights.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "top_k must be between 1 and the number of experts"),
        ({"k": 9}, r"top_k must be between 1 and the number of experts \(8\), got 9"),
        ({"score": "softplus"}, "score must be one of softmax, .* got 'softplus'"),
        ({"groups": 3}, r"groups must divide the number of experts \(8\), got 3"),
        ({"groups": 2, "topk_groups": 3}, "topk_groups must be between 1 and groups"),
        ({"groups": 4, "topk_groups": 1, "k": 3}, "must leave at least top_k = 3 experts, got 1 groups of 2"),
        ({"groups": 4, "topk_groups": 2, "group_score": "mean"}, "group_score must be 'max', 'top2' or a"),
        ({"groups": 4, "topk_groups": 2, "group_score": 0}, "group_score must be 'max', 'top2' or a positive .*got 0"),
        ({"groups": 4, "topk_groups": 2, "group_score": True}, "group_score must be .*, got True"),
        ({"groups": 4, "topk_groups": 2, "group_score": 1.5}, r"group_score must be .*, got 1\.5"),
        (
            {"groups": 4, "topk_groups": 2, "group_score": 3},
            "group_score 3 must have groups of at least 3 experts, got groups of 2",
        ),
        ({"groups": 8, "topk_groups": 4}, "must have groups of at least 2 experts"),
        ({"scale": 0.0}, "scale must be positive and finite"),
        ({"scale": float("nan")}, "scale must be positive and finite"),
        ({"bias": torch.zeros(7)}, r"bias must be \[E\] = \(8,\), got \(7,\)"),
        ({"bias": torch.zeros(8, device="meta")}, "bias must be on the device of logits, got meta and cpu"),
        ({"bias": torch.tensor([0.0] * 7 + [float("nan")])}, r"bias must be finite, got \[0.0, .*nan\]"),
        ({"logits": torch.zeros(2, 3, 8)}, r"logits must be \[T, E\], got \(2, 3, 8\)"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_bad_arguments_are_named(change, message):
    args = {"logits": torch.zeros(4, 8), "k": 2} | change
    with pytest.raises(ValueError, match=r"topk: .*" + message):
        topk(args.pop("logits"), args.pop("k"), **args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(5, 8, dtype=torch.long)}, r"logits must be floating point, got torch\.int64"),
        ({"k": 2.0}, r"top_k must be an integer, got 2\.0"),
        ({"groups": "4"}, "groups must be an integer, got '4'"),
        ({"bias": torch.zeros(8, dtype=torch.long)}, r"bias must be floating point, got torch\.int64"),
    ],
)
def test_bad_types_are_named(change, message):
    with pytest.raises(TypeError, match=message):
        topk(**{"logits": torch.zeros(5, 8), "k": 2} | change)
