"""topk's Triton form, run by Triton's interpreter, against the reference."""

import pytest
import torch

pytest.importorskip("triton")
import triton

from headgate.kernels.topk import SCORES, on_triton, topk_reference
from headgate.kernels.topk.on_triton import topk_on_triton, why_not_served

pytestmark = [
    pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="Triton's interpreter is off"),
    pytest.mark.filterwarnings("ignore:(invalid|All-NaN)"),  # numpy's, for rows past the last token
]

FORMS = [
    {"score": "softmax", "renormalize": True},
    {"score": "topk_softmax", "scale": 0.5},
    {"score": "sigmoid", "renormalize": True, "scale": 2.5},
    {"score": "sqrtsoftplus"},
]
SHAPES = [(0, 8, 2), (1, 1, 1), (1, 8, 8), (33, 5, 3), (33, 60, 4), (2, 128, 8), (3, 384, 32), (1, 1024, 10)]


@pytest.fixture(autouse=True)
def _outputs_start_as_rubbish(monkeypatch):
    """Memory that no kernel writes is seen."""
    empty = torch.Tensor.new_empty

    def rubbish(*args, **kwargs):
        t = empty(*args, **kwargs)
        return t.fill_(float("nan") if t.is_floating_point() else -77)

    monkeypatch.setattr(torch.Tensor, "new_empty", rubbish)


def run(logits, k, bias=None, *, score="softmax", renormalize=False, scale=1.0, **limit):
    """The operator's arguments."""
    groups, topk_groups = limit.get("groups", 1), limit.get("topk_groups", 1)
    return (logits, k, bias, score, groups, topk_groups, limit.get("group_score", "top2"), renormalize, scale)


@pytest.fixture
def check(assert_close):
    def check(*args, rows=None, **form):
        got, want = topk_on_triton(*run(*args, **form), _rows=rows), topk_reference(*run(*args, **form))
        assert torch.equal(got[2], want[2])
        assert torch.equal(got[3], want[3])
        for a, b in zip(got, want, strict=True):
            assert a.dtype == b.dtype
        assert_close(got[0], want[0], scale=0.2, name="weights")
        assert_close(got[1], want[1], scale=0.2, name="scores")
        return got

    return check


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=lambda f: f["score"])
def test_equals_its_reference_with_and_without_bias(shape, form, check):
    tokens, experts, k = shape
    logits = torch.randn(tokens, experts) * 3
    check(logits, k, **form)
    check(logits, k, torch.randn(experts) * 0.3, **form)


@pytest.mark.parametrize("k", range(1, 9))
def test_any_number_of_choices(k, check):
    check(torch.randn(5, 8), k, renormalize=True)


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f["score"])
@pytest.mark.parametrize("rows", [1, 4])
def test_many_programs_each_of_several_blocks(form, rows, check, monkeypatch):
    monkeypatch.setattr(on_triton, "_PROGRAMS", 3)
    check(torch.randn(27, 12), 3, torch.randn(12), rows=rows, **form)


def test_tokens_past_one_program_as_they_are_cut(check):
    assert not on_triton._cut(11, 1024)[-1]
    check(torch.randn(11, 1000), 6, score="sigmoid")


@pytest.mark.parametrize("group_score", ["top2", "max", 3])
@pytest.mark.parametrize(("experts", "groups", "topk_groups"), [(32, 8, 4), (60, 4, 1), (60, 5, 3), (21, 7, 2)])
@pytest.mark.parametrize("score", SCORES)
def test_choice_is_limited_to_the_best_groups(score, experts, groups, topk_groups, group_score, check):
    limit = {"groups": groups, "topk_groups": topk_groups, "group_score": group_score}
    check(torch.randn(9, experts), 4, torch.randn(experts) * 0.2, score=score, **limit)


def test_groups_of_one_expert(check):
    check(torch.randn(9, 6), 2, groups=6, topk_groups=3, group_score="max")


@pytest.mark.parametrize("score", SCORES)
def test_the_lowest_id_comes_first_among_equals(score, check):
    check(torch.randint(-1, 2, (17, 24)).float(), 7, score=score)
    check(torch.zeros(3, 24), 24, torch.zeros(24), score=score)
    check(torch.randint(-1, 2, (17, 24)).float(), 5, score=score, groups=6, topk_groups=2)


def test_the_signs_of_zero_are_equal(check):
    logits = torch.tensor([[-0.0, 0.0, -0.0, 0.0, -1.0]])
    assert check(logits, 4, score="topk_softmax")[2].tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=lambda f: f["score"])
def test_half_types_are_widened_first(form, dtype, check):
    check((torch.randn(9, 40) * 2).to(dtype), 6, **form)
    check(torch.randn(9, 40).to(dtype), 6, torch.randn(40).to(dtype), **form)


def test_layout_of_logits_and_bias_does_not_matter(check):
    bias = torch.randn(24)[::2]
    check(torch.randn(12, 33).T, 3, bias)
    check(torch.randn(33, 36)[:, ::3], 3, bias)
    check(torch.randn(33, 20)[:, 3:15], 3, bias[:1].expand(12))
    check(torch.randn(1, 12).expand(33, 12), 3, bias)


@pytest.mark.parametrize("score", SCORES)
def test_scores_of_great_and_small_logits_keep_their_digits(score):
    """Relative to each score itself, where the comparison above looks at the greatest."""
    logits = torch.tensor([[-60.0, -20.0, -9.0, -1e-3, 0.0, 1e-6, 3.0, 19.9, 20.1, 60.0]])
    for x in (logits, logits[:, :6], logits[:, :3]):
        got, want = topk_on_triton(*run(x, 2, score=score))[1], topk_reference(*run(x.double(), 2, score=score))[1]
        assert ((got - want).abs() <= 2e-5 * want + 1e-37).all()


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("limit", [{}, {"groups": 4, "topk_groups": 2}], ids=["free", "groups"])
def test_nan_and_infinity_give_distinct_ids_and_stay_in_their_rows(score, limit):
    clean = torch.randn(12, 8)
    logits = clean.clone()
    logits[0], logits[1], logits[2] = float("nan"), float("inf"), float("-inf")
    logits[3, 2:], logits[4, 5], logits[5, 5], logits[6, 5] = (float(x) for x in ("nan", "nan", "inf", "-inf"))
    got = topk_on_triton(*run(logits, 4, score=score, **limit))
    want = topk_on_triton(*run(clean, 4, score=score, **limit))
    for row in got[2].tolist():
        assert len(set(row)) == 4
        assert set(row) <= set(range(8))
    assert got[3].tolist() == torch.bincount(got[2].flatten(), minlength=8).tolist()
    for a, b in zip(got[:3], want[:3], strict=True):
        assert torch.equal(a[7:], b[7:])


def test_nan_is_chosen_last():
    logits = torch.tensor([[0.5, float("nan"), 2.0, -3.0]])
    for score in ("topk_softmax", "sigmoid", "sqrtsoftplus"):
        assert topk_on_triton(*run(logits, 4, score=score))[2].tolist() == [[2, 0, 3, 1]]


def test_two_runs_are_equal():
    logits = torch.randn(33, 60)
    a, b = (topk_on_triton(*run(logits, 6, score="softmax", renormalize=True), _rows=4) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("logits", "k", "bias", "why"),
    [
        (torch.zeros(1, 2048), 2, None, "at most 1024 experts"),
        (torch.zeros(1, 64), 33, None, "top_k must be at most 32"),
        (torch.zeros(1, 8, dtype=torch.float64), 2, None, "logits must be fp32, bf16 or fp16"),
        (torch.zeros(1, 8), 2, torch.zeros(8, dtype=torch.float64), "bias must be fp32, bf16 or fp16"),
        (torch.zeros(1, 1024), 32, torch.zeros(1024), None),
    ],
)
def test_says_what_it_cannot_serve(logits, k, bias, why):
    said = why_not_served(logits, k, bias)
    assert said is None if why is None else why in said


def test_launches_depend_on_shapes_alone_and_cover_every_token():
    for tokens in (1, 2, 64, 65, 4096, 65536, 2**24):
        for experts in (1, 8, 128, 384, 1024):
            seen = []
            logits = torch.empty(tokens, experts, device="meta")
            topk_on_triton(*run(logits, 1), launch=lambda kernel, grid, seen=seen, **a: seen.append((grid, a)))
            ((grid, a),) = seen
            assert a["blocks"] * a["BT"] >= tokens > (a["blocks"] - 1) * a["BT"]
            assert grid[0] == min(a["blocks"], on_triton._PROGRAMS)
            assert not a["ALONE"] or a["blocks"] == 1
