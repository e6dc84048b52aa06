"""grouped_ffn on weights of few bits in C++: few rows as integers and as floats, many rows widened, against the
reference on the same weights in fp64."""

from __future__ import annotations

import random

import pytest
import torch

from headgate.kernels import GPT_OSS, Activation, Quantized, Routing, grouped_ffn, native, quantize
from headgate.kernels.activation import as_activation
from headgate.kernels.grouped_ffn import grouped_ffn_reference, quantized, quantized_on_cpu
from headgate.kernels.quantized import BLOCKS

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no compiled form: {native.status().why}")
FORMATS = ("int8", "int4", "uint4", "mxfp4")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _native(monkeypatch):
    """Each test runs the C++ form, and nothing else."""
    monkeypatch.delenv("HEADGATE_CPU", raising=False)
    monkeypatch.setattr(native, "_amx", lambda: False)  # where torch's matmul drives it, many bf16 rows are plain

    def plain(*_):
        raise AssertionError("the plain form ran")

    monkeypatch.setattr(quantized.plain, "forward", plain)


class Case:
    """A problem of random weights; `run` gives y, `truth` the reference's in fp64."""

    def __init__(self, R=3, D=70, F=34, E=5, K=2, *, dtype=torch.float32, format="int8", down=None, group=32,
                 pair=False, interleaved=False, gated=True, bias=True, activation="silu",
                 scale_dtype=torch.float32):  # fmt: skip
        self.experts, self.interleaved, self.activation, self.gated = E, interleaved, activation, gated

        def weight(kind, *shape):
            more = {} if kind == "mxfp4" or kind in BLOCKS else {"block": (1, group), "scale_dtype": scale_dtype}
            return quantize(torch.randn(E, *shape) / shape[1] ** 0.5, kind, **more)

        wide = 2 * F if gated and not pair else F
        first, up = format.split("+") if "+" in format else (format, format)
        self.w1, self.w_up = weight(first, wide, D), weight(up, F, D) if pair else None
        self.w2 = weight(down or format, D, F)
        self.x, self.weights = torch.randn(R, D).to(dtype), torch.rand(R, K)
        self.ids = torch.randint(-1, E + 1, (R, K))
        self.b1 = torch.randn(E, wide).to(dtype) if bias and not pair else None
        self.b2 = torch.randn(E, D).to(dtype) if bias else None

    def run(self):
        first = self.w1 if self.w_up is None else (self.w1, self.w_up)
        routing = Routing.from_topk(self.ids, self.weights, self.experts)
        form = {"activation": self.activation, "gated": self.gated, "interleaved": self.interleaved}
        with torch.no_grad():
            return grouped_ffn(self.x, routing, first, self.w2, b_gate_up=self.b1, b_down=self.b2, **form)

    def truth(self):
        w1, w_up, w2 = (None if w is None else w.dequantize(torch.float64) for w in (self.w1, self.w_up, self.w2))
        x, b1, b2 = (None if t is None else t.double() for t in (self.x, self.b1, self.b2))
        act = as_activation(self.activation, self.gated)
        return grouped_ffn_reference(
            x, self.ids, self.weights.double(), w1 if w_up is None else (w1, w_up), w2, b1, b2,
            activation=act, interleaved=self.interleaved,
        )  # fmt: skip


SIZES = {
    "one row": dict(R=1, E=8, K=4),
    "columns that end within a unit": dict(R=3, D=70, F=34),
    "a row of less than a unit": dict(R=3, D=8, F=6),
    "whole units": dict(R=4, D=128, F=96),
    "several passes": dict(R=11, D=96, F=160, E=1, K=1),
    "cuts of several tasks": dict(R=2, D=64, F=600, E=2),
    "many rows": dict(R=120, D=70, F=34, E=3),
    "some of few and some of many": dict(R=40, D=40, F=66, E=4, K=1),
    "more rows than a panel": dict(R=330, D=40, F=66, E=2),
    "no rows": dict(R=0),
}


class TestAgainstTheReference:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("format", FORMATS)
    @pytest.mark.parametrize("size", SIZES)
    def test_sizes(self, size, format, dtype, assert_close):
        case = Case(**SIZES[size], format=format, dtype=dtype)
        assert_close(case.run(), case.truth(), dtype=dtype)

    @pytest.mark.parametrize("rows", [5, 90])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(
        "form",
        [
            {"pair": True},
            {"interleaved": True, "activation": GPT_OSS},
            {"gated": False, "activation": "relu2"},
            {"format": "int4", "down": "int8"},
            {"format": "mxfp4", "down": "int4", "group": 64},
        ],
        ids=str,
    )
    def test_forms(self, form, dtype, rows, assert_close):
        case = Case(R=rows, dtype=dtype, **form)
        assert_close(case.run(), case.truth(), dtype=dtype)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("format", BLOCKS)
    def test_blocks_of_gguf(self, format, dtype, assert_close):
        """Three blocks of 256 and one; an expert without rows, of one row, of few, of several passes, of many."""
        case = Case(R=70, D=768, F=256, E=5, K=1, format=format, dtype=dtype)
        case.ids[:, 0] = torch.tensor([1] + [2] * 5 + [3] * 13 + [4] * 40 + [-1] * 11)[torch.randperm(70)]
        y = case.run()
        assert_close(y, case.truth(), dtype=dtype)
        assert torch.equal(case.run(), y)

    @pytest.mark.parametrize("rows", [5, 60])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(
        "form",
        [
            {"format": "Q4_K", "down": "Q6_K"},
            {"format": "Q4_K+Q6_K", "down": "Q8_0", "pair": True, "bias": False},
            {"format": "Q8_0+gguf_mxfp4", "down": "Q5_K", "pair": True},
            {"format": "int4", "down": "Q4_K"},
            {"format": "Q5_K", "down": "mxfp4", "interleaved": True, "activation": GPT_OSS},
        ],
        ids=str,
    )
    def test_blocks_of_gguf_together(self, form, dtype, rows, assert_close):
        case = Case(R=rows, D=256, F=512, E=3, dtype=dtype, **form)
        assert_close(case.run(), case.truth(), dtype=dtype)

    @pytest.mark.parametrize("rows", [2, 60])
    @pytest.mark.parametrize("scale_dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("group", [32, 64, 128])
    def test_groups_and_scales(self, group, scale_dtype, rows, assert_close):
        case = Case(R=rows, D=200, F=136, E=2, group=group, scale_dtype=scale_dtype, dtype=torch.bfloat16)
        assert_close(case.run(), case.truth(), dtype=torch.bfloat16)

    @pytest.mark.parametrize("seed", range(20))
    def test_random_problems_with_any_number_of_threads(self, seed, assert_close):
        r, before = random.Random(seed), torch.get_num_threads()
        torch.manual_seed(seed)
        dtype, format = r.choice(DTYPES), r.choice((*FORMATS, *BLOCKS))
        step, most = (BLOCKS[format][0], 640 // BLOCKS[format][0]) if format in BLOCKS else (2, 90)
        sizes = {
            "R": r.choice([1, 2, 7, 16, 17, 33, 100]),
            "D": step * r.randint(1, most),
            "F": step * r.randint(1, most),
        }
        case = Case(**sizes, E=r.choice([1, 3, 9]), K=r.choice([1, 2, 4]), dtype=dtype, format=format,
                    group=r.choice([32, 64, 128]), bias=r.random() < 0.5)  # fmt: skip
        try:
            torch.set_num_threads(1)
            y = case.run()
            torch.set_num_threads(r.choice([2, 3]))
            assert torch.equal(case.run(), y)
        finally:
            torch.set_num_threads(before)
        assert_close(y, case.truth(), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("format", FORMATS)
def test_every_code_is_read_as_dequantized(format, rows, dtype):
    """Row t of an identity picks a column: the products are the weights themselves, to the type's rounding."""
    codes = torch.arange(256, dtype=torch.uint8).view(1, -1, 1)  # a row for each byte
    data = codes.expand(1, 256, 16).contiguous()
    data = data.view(torch.int8) if format == "int8" else data
    columns = 16 if format == "int8" else 32
    scale = torch.full((1, 256, 1), 126, dtype=torch.uint8) if format == "mxfp4" else torch.full((1, 256, 1), 0.5)
    scale = torch.cat((scale, torch.arange(256.0).view(1, -1, 1) % 17), 2) if format == "uint4" else scale
    w1 = Quantized(data, scale, format, (1, 32))
    x = torch.eye(columns)[torch.arange(rows) % columns].to(dtype)
    eye = quantize(torch.eye(256)[None], "int8", block=(1, 32))
    routing = Routing.from_topk(torch.zeros(rows, 1, dtype=torch.long), torch.ones(rows, 1), 1)
    with torch.no_grad():
        y = grouped_ffn(x, routing, w1, eye, activation=Activation("identity", gated=False))
    want = w1.dequantize(torch.float32)[0].T[torch.arange(rows) % columns]
    half = dtype != torch.float32  # neighbouring codes are half apart
    torch.testing.assert_close(y.float(), want, rtol=2**-8 if half else 1e-5, atol=2e-3 if half else 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("format", BLOCKS)
def test_every_byte_of_a_block_is_read_as_dequantized(format, rows, dtype):
    """Random bytes, so all scales, minima and codes; scales in fp16 stay moderate. As above, weight by weight."""
    weights, size = BLOCKS[format]
    data = torch.randint(0, 256, (1, 96, size), dtype=torch.uint8)
    halves = {"Q8_0": (0,), "Q4_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "gguf_mxfp4": ()}
    for at in halves[format]:
        data[0, :, at : at + 2] = (torch.rand(96, 1) + 0.5).half().view(torch.uint8)
    if format == "gguf_mxfp4":
        data[0, :, 0] = torch.randint(110, 140, (96,))
    w1 = Quantized.from_gguf(data, format)
    columns = torch.randperm(weights)[:rows]
    eye = quantize(torch.eye(96)[None], "int8", block=(1, 32))
    routing = Routing.from_topk(torch.zeros(rows, 1, dtype=torch.long), torch.ones(rows, 1), 1)
    with torch.no_grad():
        y = grouped_ffn(
            torch.eye(weights)[columns].to(dtype), routing, w1, eye, activation=Activation("identity", False)
        )
    want = w1.dequantize(torch.float32)[0].T[columns]
    rtol, atol = {torch.bfloat16: (2**-8, 1e-4), torch.float16: (2**-10, 1e-4), torch.float32: (1e-5, 1e-6)}[dtype]
    torch.testing.assert_close(y.float(), want, rtol=rtol, atol=atol * want.abs().max().item())


@pytest.mark.parametrize("format", ["Q8_0", "Q6_K"])  # of these a column of zeros has a code
@pytest.mark.parametrize("rows", [2, 40])
def test_nan_and_large_inputs_among_blocks(format, rows, assert_close):
    """Beside one input as large as language models have them, the others still count: 8 bits would lose them."""
    case = Case(R=rows, D=512, F=256, E=1, K=1, format=format, dtype=torch.bfloat16)
    case.ids.zero_()
    clean = case.run()
    case.x[1, 300] = torch.inf
    y = case.run()
    assert not y[1].isfinite().any()
    assert torch.equal(y[[i for i in range(rows) if i != 1]], clean[[i for i in range(rows) if i != 1]])
    case.x[1, 300], case.w1 = (
        500.0,
        quantize(case.w1.dequantize(torch.float32).index_fill(2, torch.tensor(300), 0), format),
    )
    lone = case.run()
    case.x[1, 300] = 0.0
    assert_close(lone, case.run(), dtype=torch.bfloat16, scale=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [2, 40])
def test_nan_and_large_inputs_stay_with_their_row(rows, dtype, assert_close):
    case = Case(R=rows, E=1, K=1, dtype=dtype)
    case.ids.zero_()
    clean = case.run()
    case.x[1, 3] = torch.nan
    y = case.run()
    assert y[1].isnan().all()
    assert torch.equal(y[[i for i in range(rows) if i != 1]], clean[[i for i in range(rows) if i != 1]])
    case.x[1] = 1e-3
    case.x[1, 5], case.x[0] = 200.0, 0.0  # beside one large input the others still count
    assert_close(case.run(), case.truth(), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [2, 60])
def test_strides(rows, dtype):
    case = Case(R=rows, D=64, F=32, format="int4", dtype=dtype)
    want = case.run()
    case.x = torch.stack((case.x, case.x), 1)[:, 1]
    for name in ("w1", "w2"):
        w = getattr(case, name)
        data = torch.cat((w.data, w.data), 1)[:, : w.data.shape[1]]
        scale = torch.stack((w.scale, w.scale), 3)[..., 0]
        setattr(case, name, Quantized(data, scale, w.format, w.block))
    assert torch.equal(case.run(), want)


def test_what_it_does_not_serve():
    fp8, int8 = (quantize(torch.randn(2, 64, 32), kind) for kind in ("fp8", "int8"))
    assert quantized_on_cpu.serves(torch.float32, 1, 2, (int8, None, int8)) is not None
    assert quantized_on_cpu.serves(torch.float64, 1, 2, (int8, None, int8)) is None
    assert quantized_on_cpu.serves(torch.float32, 1, 2, (int8, None, fp8)) is None
    case = Case()
    case.ids[0, 0] = -2
    with pytest.raises(IndexError, match="grouped_ffn: expert_ids must be at least -1"):
        case.run()
