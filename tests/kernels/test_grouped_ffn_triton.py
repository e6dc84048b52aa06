"""The Triton form of grouped_ffn in Triton's interpreter: the op's own forward and backward, on CPU tensors.

The interpreter's bf16 products are wrong, so the dots run in fp32 and fp16; bf16 is for the tests on a GPU.
"""

from __future__ import annotations

import functools
import math
import types
from dataclasses import replace

import pytest
import torch

from headgate.kernels import GPT_OSS, Activation
from headgate.kernels.chip import A100, H200
from headgate.kernels.grouped_ffn import on_cpu
from headgate.kernels.tiles import Tile, Tiles

triton = pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="Triton's interpreter is off"),
    pytest.mark.filterwarnings("ignore:headgate. grouped_ffn. expert weights whose", "ignore::RuntimeWarning"),
]

# Few processors, so that a program walks over many tiles. A100: pointers; H200: tensor maps.
CHIPS = {"pointers": replace(A100, processors=3), "maps": replace(H200, processors=3)}
# Tiles whose epilogues take their columns in two and four pieces, with groups that do not divide the row tiles.
WIDE = Tiles(
    up=Tile(16, 64, 32, 1, 3, group=3),
    down=Tile(16, 64, 32, 1, 3, group=3),
    back=Tile(32, 64, 32, 1, 3, group=2),
    dx=Tile(32, 32, 32, 1, 3, group=2),
    dw=Tile(32, 16, 16, 1, 3, group=3),
)


@pytest.fixture
def use(monkeypatch):
    """use(chip, tiles=None): puts the Triton form where the CPU's would take its plain one."""
    from headgate.kernels.grouped_ffn import on_triton

    def use(chip, tiles=None):
        form = {n: functools.partial(getattr(on_triton, n), chip=chip, tiles=tiles) for n in ("forward", "backward")}
        monkeypatch.setenv("HEADGATE_CPU", "plain")
        monkeypatch.setattr(on_cpu, "plain", types.SimpleNamespace(**form))

    return use


@pytest.fixture(params=CHIPS)
def on_triton(request, use):
    use(CHIPS[request.param])


@pytest.fixture
def by_pointers(use):
    """For what does not depend on how weights are loaded."""
    use(CHIPS["pointers"])


FORMS = {
    "gate first": {},
    "transposed": {"transposed": True},
    "interleaved": {"interleaved": True, "bias": True},
    "gpt-oss": {"transposed": True, "interleaved": True, "bias": True, "activation": GPT_OSS},
    "pair": {"pair": True},
    "ungated": {"gated": False, "activation": "relu2", "bias": True},
    "bias, transposed": {"bias": True, "transposed": True},
}


def quick(cases, chosen):
    """The cases as parameters: those chosen run in `make test`, the others are slow."""
    return [pytest.param(*case, marks=() if case in chosen else pytest.mark.slow) for case in cases]


@pytest.mark.usefixtures("by_pointers")
@pytest.mark.parametrize("form", quick([(form,) for form in FORMS], [("gpt-oss",), ("pair",), ("ungated",)]))
def test_every_form(problem, check, form):
    check(problem(21, 38, 35, 3, 2, **FORMS[form]))  # several tiles each way, the last one cut


EVEN, CUT = (17, 64, 32), (9, 24, 34)
# in `make test`: by maps what each form is made of
BY_MAPS = [
    *(("maps", form, EVEN) for form in ("gate first", "interleaved", "pair", "bias, transposed")),
    *(("maps", form, CUT) for form in ("gpt-oss", "ungated")),
]


@pytest.mark.usefixtures("on_triton")
@pytest.mark.parametrize(
    ("on_triton", "form", "size"),
    quick([(chip, form, size) for chip in CHIPS for form in FORMS for size in (EVEN, CUT)], BY_MAPS),
    indirect=["on_triton"],
    ids=str,
)
def test_every_form_at_sizes_that_tensor_maps_take(problem, check, form, size):
    check(problem(*size, 4, 2, **FORMS[form]))


@pytest.mark.parametrize(
    ("form", "chip"),
    quick(
        [(form, chip) for form in ("gate first", "gpt-oss", "ungated") for chip in CHIPS],
        [("gate first", "pointers"), ("gpt-oss", "maps")],
    ),
)
def test_epilogues_in_pieces_and_ragged_groups(use, problem, check, form, chip):
    use(CHIPS[chip], WIDE)
    check(problem(40, 24, 72, 3, 2, **FORMS[form]))


@pytest.mark.usefixtures("on_triton")
@pytest.mark.parametrize(
    ("on_triton", "form"),
    quick(
        [(chip, form) for chip in CHIPS for form in ("gate first", "gpt-oss")],
        [("pointers", "gpt-oss"), ("maps", "gate first")],
    ),
    indirect=["on_triton"],
)
def test_fp16(problem, check, form):
    check(problem(40, 72, 48, 5, 2, dtype=torch.float16, **FORMS[form]))


@pytest.mark.usefixtures("by_pointers")
@pytest.mark.parametrize(
    "activation",
    [
        *("gelu", Activation("identity"), Activation("silu", alpha=1.7)),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("gelu_tanh", "relu")),
        Activation("silu", limit=0.5),
        Activation("gelu", limit=0.3, clamp_after=True),
        Activation("silu", limit=0.4, clamp_after=True, up_shift=1.0),
    ],
    ids=str,
)
def test_activations(problem, check, activation):
    check(problem(9, 24, 16, 3, 2, activation=activation))


SHAPES = {
    "no rows": dict(R=0),
    "one row": dict(R=1, K=1, dead=0),
    "one expert": dict(R=20, E=1, K=1),
    "every expert": dict(R=5, E=4, K=4, dead=0),
    "one element": dict(R=1, D=1, F=1, E=1, K=1, dead=0),
    "all on one": dict(R=40, E=4, ids=torch.full((40, 1), 2)),
    "none at all": dict(R=6, E=3, ids=torch.full((6, 2), -1)),
    "sentinels": dict(R=4, E=3, ids=torch.tensor([[0, 3], [7, -1], [2, 0], [-1, 1]])),
    "other output size": dict(R=12, D=24, D_out=40, bias=True),
    "K past a tile": dict(R=3, D=8, F=8, E=40, K=33),
}
# in `make test`: each shape by one of the two at least
SHAPES_QUICK = [
    *(("pointers", shape) for shape in SHAPES if shape not in ("all on one", "other output size")),
    *(("maps", shape) for shape in ("no rows", "every expert", "all on one", "sentinels", "other output size")),
]


@pytest.mark.usefixtures("on_triton")
@pytest.mark.parametrize(
    ("on_triton", "shape"),
    quick([(chip, shape) for chip in CHIPS for shape in SHAPES], SHAPES_QUICK),
    indirect=["on_triton"],
)
def test_odd_shapes(problem, check, shape):
    check(problem(**{"D": 20, "F": 12, **SHAPES[shape]}))


@pytest.mark.usefixtures("by_pointers")
@pytest.mark.parametrize(
    "needs", [("rows",), ("weights",), ("w_gate_up",), ("w_down",), ("b_gate_up",), ("b_down",), ()]
)
def test_a_gradient_alone(problem, check, needs):
    check(replace(problem(20, 24, 16, 3, 2, bias=True), needs=needs))


@pytest.mark.usefixtures("on_triton")
def test_strides(problem, check):
    """Rows every other element; weights as transposed views, and with neither inner axis contiguous."""
    p = problem(20, 24, 16, 3, 2)
    t = dict(p.tensors)
    t["rows"] = t["rows"].repeat_interleave(2, dim=1)[:, ::2]
    t["w_gate_up"] = t["w_gate_up"].transpose(1, 2).contiguous().transpose(1, 2)
    t["w_down"] = t["w_down"].repeat_interleave(2, dim=2)[:, :, ::2]
    check(replace(p, tensors=t), grad=torch.randn(24, 20).T)


@pytest.mark.usefixtures("on_triton")
@pytest.mark.parametrize("transposed", [False, True])
def test_a_pair_of_different_strides(problem, check, transposed):
    p = problem(9, 16, 16, 3, 2, pair=True, transposed=transposed)
    t = {**p.tensors, "w_up": p.tensors["w_up"].transpose(1, 2).contiguous().transpose(1, 2)}
    check(replace(p, tensors=t))


@pytest.mark.usefixtures("by_pointers")
@pytest.mark.parametrize("router", [torch.float64, torch.bfloat16], ids=str)
def test_router_weights_of_another_type(problem, check, router):
    p = problem(12, 24, 16, 3, 2)
    check(replace(p, tensors={**p.tensors, "weights": p.tensors["weights"].to(router)}))


@pytest.mark.usefixtures("on_triton")
@pytest.mark.parametrize(
    ("on_triton", "value"),
    quick(
        [(chip, value) for chip in CHIPS for value in (math.nan, math.inf)],
        [("pointers", math.nan), ("maps", math.inf)],
    ),
    indirect=["on_triton"],
)
def test_what_is_bad_stays_where_it_is(problem, assert_close, value):
    """A bad row, an idle expert's bad weights, a dead pair's bad router weight: nobody else sees them."""
    ids = torch.tensor([[0, 2], [-1, 2], [2, 0], [-1, -1], [0, 5]])
    p = problem(5, 20, 12, 4, 2, ids=ids, bias=True)  # experts 1 and 3 are idle
    clean = p.run()
    t = {n: v.clone() for n, v in p.tensors.items()}
    for n in ("w_gate_up", "w_down", "b_gate_up", "b_down"):
        t[n][1] = t[n][3] = value
    t["weights"][1, 0] = t["weights"][4, 1] = value
    got = replace(p, tensors=t).run()
    for n in clean:
        assert_close(got[n], clean[n], name=n)
    t["rows"][2] = value
    got = replace(p, tensors=t).run()
    others = torch.tensor([0, 1, 3, 4])
    for n in ("y", "rows", "weights"):
        assert_close(got[n][others], clean[n][others], name=n)
    assert not got["y"][2].isfinite().any()


@pytest.mark.usefixtures("by_pointers")
@pytest.mark.parametrize("form", ["gpt-oss", "pair"])
def test_every_element_is_written(problem, assert_close, monkeypatch, form):
    p = problem(19, 20, 12, 5, 2, **FORMS[form])
    want = p.run()
    for owner, name in ((torch, "empty_like"), (torch, "empty"), (torch.Tensor, "new_empty")):
        allocate = getattr(owner, name)

        def poisoned(*args, allocate=allocate, **kwargs):
            t = allocate(*args, **kwargs)
            return t.fill_(math.nan if t.dtype.is_floating_point else 1_000_000)

        monkeypatch.setattr(owner, name, poisoned)
    for n, value in p.run().items():
        assert_close(value, want[n], name=n)


@pytest.mark.usefixtures("by_pointers")
def test_two_runs_agree_to_the_bit(problem):
    p = problem(33, 40, 24, 4, 3, bias=True)
    first, second = p.run(), p.run()
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_results_do_not_depend_on_how_many_programs_there_are(use, problem):
    p = problem(33, 40, 24, 4, 3, bias=True)
    runs = []
    for processors in (1, 5, 132):
        use(replace(A100, processors=processors))
        runs.append(p.run())
    assert all(torch.equal(runs[0][n], other[n]) for other in runs[1:] for n in other)


@pytest.mark.parametrize(("said", "precision"), [("none", "tf32x3"), ("ieee", "tf32x3"), ("tf32", "tf32")])
def test_fp32_products_follow_torchs_newer_switch(said, precision):
    """Where it was used, torch.get_float32_matmul_precision raises."""
    from headgate.kernels.gemm_triton import precision_of

    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    try:
        switch.fp32_precision = said
        assert precision_of(torch.float32) == precision
        assert precision_of(torch.bfloat16) == "ieee"
    finally:
        switch.fp32_precision = before
