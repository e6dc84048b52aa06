"""expert_outputs and combine_outputs: grouped_ffn bit for bit, however experts are shared out over calls and slots."""

from __future__ import annotations

import math
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from few_bits_experts import FewBits

from headgate.kernels import GPT_OSS, Routing, combine_outputs, expert_outputs, grouped_ffn, native, quantize
from headgate.kernels.activation import as_activation
from headgate.kernels.expert_outputs import combine_outputs_reference, expert_outputs_reference
from headgate.kernels.quantized import BLOCKS, PER_BYTE

pytestmark = pytest.mark.usefixtures("cpu_form")
HALF = [torch.bfloat16, torch.float16]
WEIGHTS = ("w_gate_up", "w_up", "w_down", "b_gate_up", "b_down")


def name(dtype):
    return str(dtype)[6:]


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def routing_of(p):
    return Routing.from_topk(p.ids, p.tensors["weights"], p.experts)


def empty(p):
    """An `out` full of NaN."""
    d_out = p.tensors["w_down"].shape[2 if p.form.get("transposed") else 1]
    return torch.full((p.ids.numel(), d_out), math.nan, dtype=wide(p.tensors["rows"].dtype))


def in_slots(p, experts, spare=1):
    """(weights by name, slot_of_expert) with `experts` in a random order, and NaN in the slots between."""
    where = torch.randperm(len(experts) + spare)[: len(experts)]
    slots = torch.full((p.experts,), -1, dtype=torch.int32)
    slots[experts] = where.int()
    arena = {}
    for n in WEIGHTS:
        if n in p.tensors:
            t = p.tensors[n]
            arena[n] = torch.full((len(experts) + spare, *t.shape[1:]), math.nan, dtype=t.dtype)
            arena[n][where] = t[experts]
    return arena, slots


def write(p, arena, slots, out):
    w1 = (arena["w_gate_up"], arena["w_up"]) if "w_up" in arena else arena["w_gate_up"]
    biases = {n: arena[n] for n in ("b_gate_up", "b_down") if n in arena}
    expert_outputs(p.tensors["rows"], routing_of(p), w1, arena["w_down"], slots, out, **biases, **p.form)


def cut(p, calls):
    """The experts in random order, in about equal parts."""
    order = torch.randperm(p.experts)
    return [part for part in (order[i::calls] for i in range(calls)) if len(part)]


def answer(p, parts):
    out = empty(p)
    for experts in parts:
        write(p, *in_slots(p, experts), out)
    return combine_outputs(out, routing_of(p), p.tensors["rows"].dtype)


# Sizes of whole 64 bytes: torch's matmul, in the plain form, may sum otherwise where an expert begins elsewhere.
SHAPES = {
    "no rows": dict(R=0),
    "one row, many experts": dict(R=1, E=32, K=8),
    "few rows of each": dict(R=9, E=5),
    "panels in slices": dict(R=70, E=3),
    "slices of many pairs": dict(R=150, E=40, K=4, dead=0),
    "blocks": dict(R=400, E=4, dead=0.05),
    "one expert": dict(R=70, E=1, K=1, dead=0),
    "empty experts": dict(ids=torch.tensor([[0, 6], [6, 3], [3, 0]]), R=3, E=8),
    "K = E": dict(E=4, K=4, dead=0),
    "the same expert twice in a row": dict(ids=torch.tensor([[1, 1], [2, 0], [0, 0]]).repeat(9, 1), R=27),
    "no expert at all": dict(ids=torch.full((33, 2), -1)),
    "sentinel ids": dict(ids=torch.tensor([[5, 0], [1, 7], [2**31 - 1, 5], [-1, 4]]), R=4),
    "no choices": dict(ids=torch.empty(33, 0, dtype=torch.long)),
    "another width out than in": dict(D_out=48),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=name)
@pytest.mark.parametrize("shape", SHAPES)
def test_any_partition_is_grouped_ffn_to_the_bit(problem, shape, dtype):
    p = problem(**{"D": 64, "F": 32, "bias": True, "dtype": dtype, **SHAPES[shape]})
    want = p.call(p.tensors)
    for calls in (1, 3, p.experts):
        got = answer(p, cut(p, calls))
        assert got.dtype == dtype
        assert torch.equal(got, want), calls


FORMS = {
    "transposed": dict(transposed=True),
    "interleaved": dict(interleaved=True, bias=True),
    "gpt-oss": dict(transposed=True, interleaved=True, bias=True, activation=GPT_OSS),
    "pair": dict(pair=True),
    "pair, transposed": dict(pair=True, transposed=True),
    "ungated": dict(gated=False, activation="relu2", bias=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=name)
@pytest.mark.parametrize("rows", [1, 40, 400])
@pytest.mark.parametrize("form", FORMS)
def test_every_form(problem, form, rows, dtype):
    p = problem(R=rows, D=64, F=32, E=4, dtype=dtype, **FORMS[form])
    assert torch.equal(answer(p, cut(p, 3)), p.call(p.tensors))


@pytest.mark.parametrize("seed", [*range(16), *(pytest.param(s, marks=pytest.mark.slow) for s in range(16, 40))])
def test_random_problems_with_any_number_of_threads(problem, cpu_form, seed):
    r, before = random.Random(seed), torch.get_num_threads()
    torch.manual_seed(seed)
    odd, experts = cpu_form == "native", r.choice([1, 2, 5, 20])  # as to SHAPES
    p = problem(
        R=r.choice([1, 2, 5, 16, 33, 65, 129, 300]),
        D=r.choice([2, 7, 31, 33, 96, 130]) if odd else r.choice([16, 32, 96, 128]),
        F=r.choice([1, 3, 8, 17, 33, 100]) if odd else r.choice([16, 48, 96]),
        E=experts,
        K=r.randint(1, min(experts, 8)),
        dtype=r.choice([torch.float32, *HALF]),
        bias=r.random() < 0.4,
        transposed=r.random() < 0.5,
        interleaved=r.random() < 0.3,
    )
    if seed % 2:  # experts twice in a row, and sentinels
        p.ids[:] = torch.randint(-1, experts + 1, p.ids.shape)
    try:
        torch.set_num_threads(r.choice([1, 2, 3]))
        want = p.call(p.tensors)
        if odd:
            torch.set_num_threads(r.choice([1, 2, 3]))
        assert torch.equal(answer(p, cut(p, r.choice([1, 2, 4]))), want)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=name)
@pytest.mark.parametrize("form", FORMS)
def test_each_output_and_the_sum_against_the_reference(problem, assert_close, form, dtype):
    """Odd sizes; and the rows of pairs whose expert is not here stay as they are."""
    p = problem(dtype=dtype, **FORMS[form])
    arena, slots = in_slots(p, torch.tensor([3, 0, 4]))
    out, want = empty(p), torch.full_like(empty(p), math.nan, dtype=torch.float64)
    write(p, arena, slots, out)
    exact = {n: t.double() for n, t in arena.items()}
    w1 = (exact["w_gate_up"], exact["w_up"]) if "w_up" in exact else exact["w_gate_up"]
    act = as_activation(p.form.get("activation", "silu"), p.form.get("gated", True))
    layout = {n: p.form.get(n, False) for n in ("transposed", "interleaved")}
    expert_outputs_reference(
        p.tensors["rows"].double(), p.ids, w1, exact["w_down"], slots, want,
        exact.get("b_gate_up"), exact.get("b_down"), activation=act, **layout,
    )  # fmt: skip
    here = torch.isin(p.ids.reshape(-1), torch.tensor([3, 0, 4]))
    assert 0 < here.sum() < here.numel()
    assert torch.equal(out.isnan().all(1), ~here)
    assert_close(out[here], want[here], dtype=dtype)
    filled = out.nan_to_num(0.5)
    got = combine_outputs(filled, routing_of(p), dtype)
    truth = combine_outputs_reference(filled.double(), p.ids, p.tensors["weights"].double(), p.experts, torch.float64)
    assert_close(got, truth, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=name)
def test_rows_ids_weights_and_arenas_of_any_strides(problem, dtype):
    p = problem(R=40, D=64, F=32, dtype=dtype, bias=True)
    want, parts = p.call(p.tensors), cut(p, 2)
    held = [in_slots(p, experts) for experts in parts]
    for n in ("rows", "weights"):
        p.tensors[n] = p.tensors[n].repeat_interleave(2, 1)[:, ::2]
    p = replace(p, ids=p.ids.T.contiguous().T)
    out = empty(p)
    for arena, slots in held:
        apart = {n: t.repeat_interleave(3, 0)[1::3] for n, t in arena.items()}  # slots with others' memory between
        assert not apart["w_down"].is_contiguous()
        write(p, apart, slots.repeat_interleave(2)[::2], out)
    assert torch.equal(combine_outputs(out, routing_of(p), dtype), want)


def strewn(p, experts):
    """As in_slots, but in one piece of memory, each matrix somewhere: slots are places in it, a few elements apart."""
    names = [n for n in ("w_gate_up", "w_up", "w_down") if n in p.tensors]
    matrices = [(n, e) for n in names for e in experts.tolist()]
    random.shuffle(matrices)
    sizes = {n: p.tensors[n][0].numel() for n in names}
    places, at, step = {}, 0, 4
    for n, e in matrices:
        at += step * random.randint(0, 5)
        places[n, e], at = at, at + -(-sizes[n] // step) * step
    memory = torch.full((at + max(sizes.values()),), math.nan, dtype=p.tensors["rows"].dtype)
    slots = torch.full((len(names), p.experts), -1, dtype=torch.int32)
    for (n, e), place in places.items():
        memory[place : place + sizes[n]] = p.tensors[n][e].reshape(-1)
        slots[names.index(n), e] = place // step
    shapes = {n: p.tensors[n].shape[1:] for n in names}
    return {n: memory.as_strided((at // step, *s), (step, s[1], 1)) for n, s in shapes.items()}, slots


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=name)
@pytest.mark.parametrize("rows", [1, 40, 400])
@pytest.mark.parametrize("form", [n for n in FORMS if not FORMS[n].get("bias")])
def test_matrices_strewn_over_memory(problem, assert_close, cpu_form, form, rows, dtype):
    p = problem(R=rows, D=64, F=32, E=5, dtype=dtype, **FORMS[form])
    out, want = empty(p), p.call(p.tensors)
    for experts in cut(p, 2):
        arena, slots = strewn(p, experts)
        write(p, arena, slots, out)
    got = combine_outputs(out, routing_of(p), dtype)
    if cpu_form == "native":
        assert torch.equal(got, want)
    assert_close(got, want.double(), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
def test_pairs_without_an_expert_may_hold_anything(problem, dtype):
    p = problem(R=40, D=64, F=32, dtype=dtype, dead=0.4)
    p.ids[3] = torch.tensor([5, 2**30])
    out = empty(p)
    write(p, *in_slots(p, torch.arange(5)), out)
    dead = (p.ids < 0) | (p.ids >= p.experts)
    assert torch.equal(out.isnan().all(1), dead.reshape(-1))
    p.tensors["weights"][dead] = math.nan
    got = combine_outputs(out, routing_of(p), dtype)
    assert torch.equal(got, p.call(p.tensors))
    assert got.isfinite().all()
    assert not got[dead.all(1)].any()


def test_the_form_is_chosen_by_the_whole_batch(problem, monkeypatch):
    """With matrix units bf16 leaves the C++ form from 32 pairs an expert on: of all experts, not of a call's."""
    monkeypatch.setattr(native, "_amx", lambda: True)
    for rows in (40, 150):  # 80 of 96 pairs, and 300
        p = problem(R=rows, D=64, F=32, E=3, dtype=torch.bfloat16, dead=0)
        assert torch.equal(answer(p, cut(p, 3)), p.call(p.tensors)), rows


@pytest.mark.parametrize("rows", [3, 21, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("format", [*PER_BYTE, "Q8_0", "Q4_K", "Q6_K"])
@pytest.mark.parametrize("pair", [False, True], ids=["one", "pair"])
def test_quantized_arenas(assert_close, cpu_form, format, pair, dtype, rows):
    d, f, experts = (256, 256, 3) if format in BLOCKS else (64, 96, 5)
    ids, x = torch.randint(-1, experts + 1, (rows, 3)), torch.randn(rows, d).to(dtype)
    routing = Routing.from_topk(ids, torch.rand(rows, 3), experts)
    weights = FewBits(experts, d, f, pair, format, (1, 32) if format == "int4" else None)

    def run(parts):
        out = torch.full((rows * 3, d), math.nan)
        for part in parts:
            slots = torch.full((experts,), -1, dtype=torch.int32)
            slots[part] = torch.arange(len(part)).int()
            expert_outputs(x, routing, *weights.of(part), slots, out)
        return combine_outputs(out, routing, x.dtype)

    want = grouped_ffn(x, routing, *weights.of(torch.arange(experts)))
    whole = run([torch.arange(experts)])
    apart = [torch.tensor([2, 1]), torch.tensor([0])] + ([torch.tensor([4, 3])] if experts == 5 else [])
    assert torch.equal(run(apart), whole)
    assert_close(whole, want)
    if cpu_form == "native" and format != "fp8":
        assert torch.equal(whole, want)


def test_several_threads_write_to_one_out(problem):
    p = problem(R=40, D=64, F=32, E=8, K=4)
    want, routing = p.call(p.tensors), routing_of(p)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            held, out = [in_slots(p, experts) for experts in cut(p, 4)], empty(p)
            list(pool.map(lambda h, out=out: write(p, *h, out), held))
            assert torch.equal(combine_outputs(out, routing, torch.float32), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
def test_opcheck(problem, dtype):
    p = problem(R=5, D=16, F=16, dtype=dtype, bias=True)
    arena, slots = in_slots(p, torch.tensor([2, 0]))
    lists = [arena["w_gate_up"]], [], [arena["w_down"]]
    act, out, ids = as_activation("silu"), torch.zeros_like(empty(p)), p.ids.int()
    args = (p.tensors["rows"], ids, *lists, arena["b_gate_up"], arena["b_down"], slots, out, [], [])
    ops = torch.ops.headgate
    torch.library.opcheck(ops.expert_outputs.default, (*args, act.kind, act.params, True, False, False))
    torch.library.opcheck(ops.combine_outputs.default, (out, ids, p.tensors["weights"], p.experts, dtype))


def test_compiles_as_one_graph(problem):
    torch._dynamo.reset()
    p = problem(R=33, D=64, F=32, bias=True)
    held, out = [in_slots(p, experts) for experts in cut(p, 2)], empty(p)

    def step(rows):
        q = replace(p, tensors={**p.tensors, "rows": rows})
        for arena, slots in held:
            write(q, arena, slots, out)
        return combine_outputs(out, routing_of(q), rows.dtype)

    with torch.no_grad():
        got = torch.compile(step, fullgraph=True, backend="aot_eager")(p.tensors["rows"])
    assert torch.equal(got, p.call(p.tensors))


def test_shapes_without_data():
    with torch.device("meta"):
        routing = Routing.from_topk(torch.zeros(9, 2, dtype=torch.long), torch.empty(9, 2), 4)
        out, slots = torch.empty(18, 8), torch.empty(4, dtype=torch.int32)
        half = dict(dtype=torch.bfloat16)
        expert_outputs(torch.empty(9, 8, **half), routing, torch.empty(2, 32, 8, **half), torch.empty(2, 8, 16, **half),
                       slots, out)  # fmt: skip
        y = combine_outputs(out, routing, torch.bfloat16)
    assert (y.shape, y.dtype) == ((9, 8), torch.bfloat16)


def test_no_gradient_is_asked_for_or_it_is_refused(problem):
    p = problem(R=5, D=64, F=32, bias=True)
    want, out, (arena, slots) = p.call(p.tensors), empty(p), in_slots(p, torch.arange(5))
    for n in ("rows", *arena):
        asks = {m: t.detach().requires_grad_(m == n) for m, t in (p.tensors | arena).items()}
        with pytest.raises(ValueError, match=rf"expert_outputs: {n} must not ask for a gradient"):
            write(replace(p, tensors=asks), asks, slots, out)
        with torch.no_grad():
            write(replace(p, tensors=asks), asks, slots, out)
    p.tensors["weights"].requires_grad_()
    with pytest.raises(ValueError, match="combine_outputs: weights must not ask for a gradient"):
        combine_outputs(out, routing_of(p), torch.float32)
    with torch.no_grad():
        assert torch.equal(combine_outputs(out, routing_of(p), torch.float32), want)


def call(**changes):
    """expert_outputs with R=5, D=8, F=16, E=4, K=2, S=3 and one thing changed."""
    given = dict(
        rows=torch.randn(5, 8), ids=torch.zeros(5, 2, dtype=torch.long), weights=torch.rand(5, 2), experts=4,
        w_gate_up=torch.randn(3, 32, 8), w_down=torch.randn(3, 8, 16),
        slots=torch.tensor([2, -1, 0, 1], dtype=torch.int32), out=torch.zeros(10, 8),
    ) | changes  # fmt: skip
    routing = Routing.from_topk(given.pop("ids"), given.pop("weights"), given.pop("experts"))
    before = given["out"].clone()
    positional = [given.pop(n) for n in ("rows", "w_gate_up", "w_down", "slots", "out")]
    try:
        expert_outputs(positional[0], routing, *positional[1:], **given)
    except Exception:
        assert torch.equal(positional[-1], before), "an error comes before anything is changed"
        raise


def table(*slots, dtype=torch.int32):
    return torch.tensor(slots, dtype=dtype)


BAD = {
    "rows of another width": (dict(rows=torch.randn(5, 9)), r"w_gate_up must be \(3, 32, 9\).*S=3.*got \(3, 32, 8\)"),
    "one row too few": (dict(rows=torch.randn(4, 8)), r"one row of experts per row, got 5 for R=4"),
    "slots that disagree": (dict(w_gate_up=torch.randn(2, 32, 8)), r"w_gate_up must be .*S=3.*got \(2, 32, 8\)"),
    "a bias of experts": (dict(b_down=torch.randn(4, 8)), r"b_down must be \(3, 8\), got \(4, 8\)"),
    "a weight of another type": (dict(w_down=torch.randn(3, 8, 16).half()), r"w_down must have the dtype of rows"),
    "half of it quantized": (dict(w_down=quantize(torch.randn(3, 8, 16), "fp8")), r"weights must be all Quantized"),
    "a table of too few": (
        dict(slots=table(0, 1, 2)),
        r"slot_of_expert must be \[E\] with E=4, or \[2, E\].*got \(3,\)",
    ),
    "a table for another pair": (dict(slots=table(0, 1, 2, -1).expand(3, 4)), r"or \[2, E\].* got \(3, 4\)"),
    "half of an expert": (dict(slots=torch.stack([table(0, 1, 2, -1), table(0, -1, 2, -1)])), r"all weights of an"),
    "tables with biases": (
        dict(slots=table(0, 1, 2, -1).expand(2, 4), b_down=torch.randn(3, 8)),
        r"must be \[E\] on a GPU, with biases",
    ),
    "a table of another type": (dict(slots=table(0, 1, 2, -1, dtype=torch.int64)), r"must be int32, got torch.int64"),
    "a slot too far": (dict(slots=table(0, 3, 2, -1)), r"must be -1 \(not here\) to S - 1 = 2, got 3"),
    "a slot below -1": (dict(slots=table(0, 1, -2, -1)), r"must be -1 \(not here\) to S - 1 = 2, got -2"),
    "a table elsewhere": (dict(slots=torch.empty(4, dtype=torch.int32, device="meta")), r"slot_of_expert must be on"),
    "out for rows": (dict(out=torch.zeros(5, 8)), r"out must be \[R\*K, D\] with R\*K=10, D=8, got \(5, 8\)"),
    "out of another width": (dict(out=torch.zeros(10, 9)), r"out must be \[R\*K, D\].* got \(10, 9\)"),
    "out of another type": (dict(out=torch.zeros(10, 8).half()), r"out must be torch.float32 for torch.float32 rows"),
    "out with gaps": (dict(out=torch.zeros(10, 16)[:, ::2]), r"out must be contiguous, got strides \(16, 2\)"),
    "no such activation": (dict(activation="swiglue"), r"activation must be one of silu.*got 'swiglue'"),
    "an id below -1": (dict(ids=torch.full((5, 2), -2)), r"expert_outputs: expert_ids must be at least -1.*got -2"),
}
TYPES = ("a weight of another type", "half of it quantized", "a table of another type", "out of another type")
ERRORS = {**dict.fromkeys(TYPES, TypeError), "an id below -1": IndexError}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    changes, message = BAD[case]
    with pytest.raises(ERRORS.get(case, ValueError), match=message):
        call(**changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(out=torch.zeros(9, 8)), ValueError, r"out must be \[R\*K, D\] with R\*K=10, got \(9, 8\)"),
        (dict(out=torch.zeros(10, 8).double()), TypeError, r"out must be torch.float32 for torch.bfloat16 rows"),
        (dict(out=torch.zeros(8, 10).T), ValueError, r"out must be contiguous"),
        (dict(out=torch.empty(10, 8, device="meta")), ValueError, r"out must be on cpu as the rest is, got meta"),
        (dict(dtype=torch.int32), TypeError, r"dtype must be fp64, fp32, bf16 or fp16, got torch.int32"),
        (dict(ids=torch.zeros(5, 3)), ValueError, r"must both be \[R, K\], got \(5, 3\) and \(5, 2\)"),
    ],
)
def test_bad_input_of_combine_is_named(changes, error, message):
    given = dict(out=torch.zeros(10, 8), ids=torch.zeros(5, 2, dtype=torch.int32), dtype=torch.bfloat16) | changes
    with pytest.raises(error, match=f"combine_outputs: .*{message}"):
        combine_outputs(given["out"], Routing(given["ids"], torch.rand(5, 2), 4), given["dtype"])
