"""What grouped_ffn promises beyond its numbers: an ordinary operator, deterministic, frugal, clear about bad input."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from headgate.kernels import GPT_OSS, Routing, grouped_ffn
from headgate.kernels.activation import as_activation
from headgate.kernels.grouped_ffn import grouped_ffn_reference

pytestmark = pytest.mark.usefixtures("cpu_form")

FORMS = {
    "plain": {},
    "biases": dict(bias=True),
    "pair": dict(pair=True),
    "gpt-oss": dict(bias=True, activation=GPT_OSS, interleaved=True, transposed=True),
    "ungated": dict(gated=False, activation="relu2"),
}


def name(dtype):
    return str(dtype)[6:]


IDS = torch.tensor([[0, 2], [-1, 2], [3, 0], [-1, -1], [2, 9]])  # expert 1 idle, expert 3 of 4 with one row, a sentinel


def op_args(p, keep=True):
    """The operator's own arguments, in its order."""
    t = p.leaves()
    act = p.form.get("activation", "silu")
    kind, params = (act, [1.0, 0.0, 0.0, 0.0, 1.0]) if isinstance(act, str) else (act.kind, act.params)
    names = ("rows", "ids", "weights", "w_gate_up", "w_up", "w_down", "b_gate_up", "b_down")
    tensors = [p.ids.int() if n == "ids" else t.get(n) for n in names]
    flags = [p.form.get("gated", True), p.form.get("transposed", False), p.form.get("interleaved", False)]
    return [*tensors, kind, params, *flags, keep]


@pytest.mark.parametrize("cpu_form", ["plain", pytest.param("native", marks=pytest.mark.slow)], indirect=True)
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(problem, form, cpu_form):
    """In float64, which is the plain form's either way."""
    p = problem(R=5, D=4, F=2, E=4, ids=IDS, dtype=torch.float64, **FORMS[form])
    leaves = p.leaves()
    names = list(leaves)
    function = lambda *values: p.call(dict(zip(names, values, strict=True)))  # noqa: E731
    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        *((form, torch.float32) for form in FORMS),
        *(pytest.param(form, torch.bfloat16, marks=() if form == "gpt-oss" else pytest.mark.slow) for form in FORMS),
    ],
)
def test_opcheck(problem, form, dtype):
    """With live pairs only: the places of h that belong to no pair are never written, and two runs may differ there."""
    p = problem(R=5, D=16, F=8, E=4, ids=IDS.clamp(0, 3), dtype=dtype, **FORMS[form])
    args = op_args(p)
    tolerances = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
    torch.library.opcheck(torch.ops.headgate.grouped_ffn.default, args, **tolerances)
    with torch.no_grad():
        y, h = torch.ops.headgate.grouped_ffn(*args)
        needs = [t is not None for t in (args[0], *args[2:8])]
        back = [torch.randn_like(y), *(t if t is None else t.detach() for t in args[:8]), h, *args[8:-1], needs]
    torch.library.opcheck(torch.ops.headgate.grouped_ffn_backward.default, back, **tolerances)


def compiled_equals_eager(p, assert_close, **how):
    def loss(*tensors):
        t = dict(zip(p.tensors, tensors, strict=True))
        return (p.call(t).float() ** 2).sum()

    def run(function):
        leaves = p.leaves()
        value = function(*leaves.values())
        return [value.detach(), *torch.autograd.grad(value, list(leaves.values()))]

    for got, want in zip(run(torch.compile(loss, fullgraph=True, **how)), run(loss), strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("form", FORMS)
def test_compiles_as_one_graph(problem, assert_close, form):
    torch._dynamo.reset()
    compiled_equals_eager(problem(R=5, ids=IDS, **FORMS[form]), assert_close, backend="aot_eager")


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
def test_compiles_with_inductor_and_any_number_of_rows(problem, assert_close):
    torch._dynamo.reset()
    p = problem(bias=True)
    compiled = torch.compile(grouped_ffn, fullgraph=True, dynamic=True)
    for rows in (33, 7, 300):
        x, ids = torch.randn(rows, 70, requires_grad=True), torch.randint(-1, 5, (rows, 2))
        routing = Routing.from_topk(ids, torch.rand(rows, 2), 5)
        args, biases = (routing, p.tensors["w_gate_up"], p.tensors["w_down"]), {"b_down": p.tensors["b_down"]}
        got, want = compiled(x, *args, **biases), grouped_ffn(x, *args, **biases)
        assert_close(got, want, name="y")
        grad = torch.randn_like(want)
        assert_close(*(torch.autograd.grad(y, x, grad)[0] for y in (got, want)), name="rows")


SIZES = [
    {},
    dict(R=300, D=128, F=96, E=3),
    dict(R=2, D=128, F=256, E=16, K=8),
    dict(R=1, D=64, F=96, E=5, K=4, transposed=True),
]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *((size, dtype) for size in SIZES for dtype in (torch.float32, torch.bfloat16)),
        *(pytest.param(size, torch.float16, marks=() if "K" in size else pytest.mark.slow) for size in SIZES),
    ],
)
def test_two_runs_agree_to_the_bit(problem, cpu_form, dtype, shape):
    """And with any number of threads in the compiled form; the plain one has the order of sums of torch's matmul."""
    p = problem(dtype=dtype, bias=True, **shape)
    grad, before = torch.randn_like(p.tensors["rows"]), torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 1, 2, 3) if cpu_form == "native" else (2, 2):
            torch.set_num_threads(threads)
            runs.append(p.run(grad))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        for n, value in runs[0].items():
            assert torch.equal(value, other[n]), n


def test_a_row_does_not_depend_on_its_neighbours_count(problem, assert_close):
    """One row computed alone is the row computed among 100: a prefill and a decode step agree."""
    p = problem(R=100, dead=0)
    t = p.tensors
    alone = []
    for i in range(0, 100, 9):
        routing = Routing.from_topk(p.ids[i : i + 1], t["weights"][i : i + 1], 5)
        alone.append(grouped_ffn(t["rows"][i : i + 1], routing, t["w_gate_up"], t["w_down"]))
    assert_close(torch.cat(alone), p.call(t)[::9])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
def test_several_python_threads_at_once(problem, dtype):
    problems = [problem(R=40 + i, dtype=dtype, bias=i % 2 == 0) for i in range(4)]
    expected = [p.run() for p in problems]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for got, want in zip(pool.map(lambda p: p.run(), problems), expected, strict=True):
                assert all(torch.equal(got[n], want[n]) for n in want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name)
@pytest.mark.parametrize(("form", "width"), [("plain", 66), ("biases", 66), ("pair", 66), ("ungated", 33)])
def test_keeps_rows_h_and_routing_to_the_byte(problem, dtype, form, width):
    p = problem(dtype=dtype, **FORMS[form])
    p.tensors["weights"] = p.tensors["weights"].float()
    leaves, kept = p.leaves(), {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        p.call(leaves)
    for n, t in leaves.items():
        if n.startswith(("w_", "b_")):
            kept.pop(t.untyped_storage().data_ptr())  # the weights are there anyway
    size, pairs = p.tensors["rows"].element_size(), 33 * 2
    assert sum(kept.values()) == 33 * 70 * size + pairs * width * size + pairs * (4 + 4)


def test_keeps_nothing_where_no_gradient_is_asked_for(problem):
    p = problem()
    with torch.no_grad():
        assert p.call(p.leaves()).grad_fn is None
        assert torch.ops.headgate.grouped_ffn(*op_args(p, keep=False))[1].numel() == 0
    with torch.inference_mode():
        assert p.call(p.leaves()).grad_fn is None
    with saved_tensors_hooks(lambda t: pytest.fail("kept a tensor"), lambda t: t):
        assert p.call(p.tensors).grad_fn is None


def test_gradient_checkpointing(problem):
    p = problem(bias=True)
    expected, leaves = p.run(), p.leaves()
    y = checkpoint(lambda *t: p.call(dict(zip(leaves, t, strict=True))), *leaves.values(), use_reentrant=False)
    y.sum().backward()
    for n, leaf in leaves.items():
        assert torch.equal(leaf.grad, expected[n]), n


def test_autocast_multiplies_in_its_own_type(problem, assert_close):
    p = problem(bias=True)
    leaves = p.leaves()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = p.call(leaves)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    for n, want in p.run(truth=True).items():
        got = y if n == "y" else leaves[n].grad
        assert got.dtype == (torch.bfloat16 if n == "y" else torch.float32)
        assert_close(got, want, dtype=torch.bfloat16, name=n)


def test_shapes_without_data(problem):
    with torch.device("meta"):
        y = grouped_ffn(
            torch.empty(9, 8, dtype=torch.bfloat16),
            Routing.from_topk(torch.zeros(9, 2, dtype=torch.long), torch.empty(9, 2), 4),
            torch.empty(4, 32, 8, dtype=torch.bfloat16),
            torch.empty(4, 8, 16, dtype=torch.bfloat16),
        )
    assert y.shape == (9, 8)
    assert y.dtype == torch.bfloat16


def test_the_reference_of_one_pair_is_the_formula(assert_close):
    """The reference itself against two matrix products written out."""
    x, w1, w2 = torch.randn(1, 6).double(), torch.randn(1, 8, 6).double(), torch.randn(1, 6, 4).double()
    h = w1[0] @ x[0]
    by_hand = 0.5 * (w2[0] @ (h[:4] * torch.sigmoid(h[:4]) * h[4:]))
    got = grouped_ffn_reference(
        x,
        torch.zeros(1, 1, dtype=torch.int),
        torch.full((1, 1), 0.5).double(),
        w1,
        w2,
        activation=as_activation("silu"),
    )
    assert_close(got[0], by_hand)


def call(**changes):
    """grouped_ffn with R=5, D=8, F=16, E=4, K=2 and one thing changed."""
    given = dict(
        rows=torch.randn(5, 8), ids=torch.zeros(5, 2, dtype=torch.long), weights=torch.rand(5, 2), experts=4,
        w_gate_up=torch.randn(4, 32, 8), w_down=torch.randn(4, 8, 16),
    ) | changes  # fmt: skip
    routing = Routing.from_topk(given.pop("ids"), given.pop("weights"), given.pop("experts"))
    return grouped_ffn(given.pop("rows"), routing, given.pop("w_gate_up"), given.pop("w_down"), **given)


PAIR = (torch.randn(4, 16, 8), torch.randn(4, 16, 8))
UNEQUAL = (torch.randn(4, 16, 8), torch.randn(4, 15, 8))
INTEGERS = dict(rows=torch.ones(5, 8).int(), w_gate_up=torch.ones(4, 32, 8).int(), w_down=torch.ones(4, 8, 16).int())
BAD = {
    "rows of three dimensions": (dict(rows=torch.randn(1, 5, 8)), r"rows must be \[R, D\], got \(1, 5, 8\)"),
    "one row too few": (dict(rows=torch.randn(4, 8)), r"one row of experts per row, got 5 for R=4"),
    "rows of another width": (dict(rows=torch.randn(5, 9)), r"w_gate_up must be \(4, 32, 9\).*got \(4, 32, 8\)"),
    "integer rows": (INTEGERS, r"rows must be fp64, fp32, bf16 or fp16, got torch.int32"),
    "weights of another type": (dict(w_down=torch.randn(4, 8, 16).half()), r"w_down must have the dtype of rows"),
    "weights of two dimensions": (dict(w_down=torch.randn(8, 16)), r"must be 3-D"),
    "weights stored untransposed": (dict(transposed=True), r"w_gate_up must be .*transposed=True, got \(4, 32, 8\)"),
    "no up rows": (dict(w_gate_up=torch.randn(4, 16, 8)), r"w_gate_up must be \(4, 32, 8\)"),
    "experts that disagree": (dict(w_gate_up=torch.randn(3, 32, 8)), r"w_gate_up must be .*E=4.*got \(3, 32, 8\)"),
    "a routing for others": (dict(experts=5), r"routing.num_experts must equal.*got 5 and 4"),
    "a bias of another size": (dict(b_down=torch.randn(4, 9)), r"b_down must be \(4, 8\), got \(4, 9\)"),
    "a pair with a bias": (dict(w_gate_up=PAIR, b_gate_up=torch.randn(4, 32)), r"a pair \(w_gate, w_up\) must be"),
    "a pair that is not gated": (dict(w_gate_up=PAIR, gated=False), r"a pair \(w_gate, w_up\) must be"),
    "a pair of two sizes": (dict(w_gate_up=UNEQUAL), r"w_up must be \(4, 16, 8\)"),
    "another device": (
        dict(w_down=torch.empty(4, 8, 16, device="meta")),
        r"w_down must be on the device of rows, got meta",
    ),
    "no such activation": (dict(activation="swiglue"), r"activation must be one of silu.*got 'swiglue'"),
    "an id below -1": (dict(ids=torch.full((5, 2), -2)), r"expert_ids must be at least -1.*got -2"),
}
ERRORS = {"integer rows": TypeError, "weights of another type": TypeError, "an id below -1": IndexError}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    changes, message = BAD[case]
    with pytest.raises(ERRORS.get(case, ValueError), match=message):
        call(**changes)
