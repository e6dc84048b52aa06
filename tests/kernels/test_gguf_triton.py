"""GGUF's blocks in the Triton kernels, in its interpreter, against what the bytes mean in plain torch."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch

from headgate.kernels import GPT_OSS, Activation, chip
from headgate.kernels.chip import H200
from headgate.kernels.grouped_ffn import grouped_ffn_reference, quantized
from headgate.kernels.grouped_ffn.thin_tiles import ThinTile
from headgate.kernels.quantized import BLOCKS, Quantized, quantize
from headgate.kernels.tiles import Tile, Tiles

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from headgate.kernels.gguf_triton import at_words, block_tile  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="Triton's interpreter is off"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
SILU = Activation("silu")
FORMS = {"halves": (SILU, False, False), "gpt-oss": (GPT_OSS, True, False), "pair": (SILU, False, True)}
# few and large, for the interpreter pays by the step; one program walks over all tiles
TILES = {n: Tiles(*[Tile(16, n, n, 4, 2, 1)] * 4, Tile(16, 32, 32, 4, 3, 1)) for n in (128, 256)}
ONE = replace(H200, processors=1)
FEW = ThinTile(outputs=256, chunks=8, unroll=1, warps=4)


@pytest.fixture(autouse=True)
def _empty_is_nan():
    """What a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@triton.jit
def read(w, e, y, O, I, WIDTH, stride_e, stride_o, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FORMAT: tl.constexpr):
    """Every tile of the expert that `e` holds, side by side."""
    o, i = tl.program_id(0) * ROWS, tl.program_id(1) * COLUMNS
    tile = block_tile(w, tl.load(e), o, i, O, I, stride_e, stride_o, ROWS, COLUMNS, FORMAT)
    row, column = o + tl.arange(0, ROWS), i + tl.arange(0, COLUMNS)
    tl.store(y + row[:, None] * WIDTH + column[None, :], tile)


@pytest.mark.parametrize("columns", [32, 64, 128, 256])
@pytest.mark.parametrize("format", BLOCKS)
def test_a_tile_is_what_the_bytes_mean_to_the_bit(format, columns):
    """Any bytes, NaN among the scales included; rows begin at every place of a word where the format has it so."""
    weights, size = BLOCKS[format]
    data = torch.randint(0, 256, (2, 5, 3 * size), dtype=torch.uint8)
    wide = -(-3 * weights // columns) * columns
    y, e = torch.full((16, wide), torch.nan), torch.ones(1, dtype=torch.int32)
    read[(2, wide // columns)](
        data, e, y, 5, 3 * weights, wide, *data.stride()[:2], ROWS=8, COLUMNS=columns, FORMAT=format
    )
    want = torch.zeros_like(y)
    want[:5, : 3 * weights] = Quantized.from_gguf(data, format).dequantize(torch.float32)[1]
    torch.testing.assert_close(y, want, rtol=0, atol=0, equal_nan=True)


def case(format, rows, form, dtype=torch.float32):
    """The operator's arguments up to b2, and its form."""
    act, interleaved, pair = FORMS[form]
    first, last = (format, format) if isinstance(format, str) else format
    d, f = (256, 256) if max(BLOCKS[first][0], BLOCKS[last][0]) == 256 else (96, 160)

    def weight(outputs, inputs, kind):
        return quantize(torch.randn(3, outputs, inputs) / inputs**0.5, kind)

    w1, w_up, w2 = weight(f if pair else 2 * f, d, first), weight(f, d, first) if pair else None, weight(d, f, last)
    ids = torch.rand(rows, 3).argsort(1)[:, :2].int().masked_fill_(torch.rand(rows, 2) < 0.2, -1)
    b1 = None if pair else torch.randn(3, 2 * f).to(dtype)
    x, s, b2 = torch.randn(rows, d).to(dtype), torch.rand(rows, 2), torch.randn(3, d).to(dtype)
    return (x, ids, s, w1, w_up, w2, b1, b2), act, interleaved


def truth(tensors, act, interleaved, dtype):
    rows, ids, weights, w1, w_up, w2, b1, b2 = tensors
    leaves = [t if t is None else t.double().requires_grad_() for t in (rows, weights, b1, b2)]
    first, second, last = (None if w is None else w.dequantize(dtype).double() for w in (w1, w_up, w2))
    y = grouped_ffn_reference(
        leaves[0], ids, leaves[1], first if second is None else (first, second), last, leaves[2], leaves[3],
        activation=act, interleaved=interleaved,
    )  # fmt: skip
    return y, leaves


@pytest.mark.parametrize(
    ("format", "form", "dtype"),
    [
        ("Q8_0", "halves", torch.float32),
        ("Q4_0", "pair", torch.float32),
        ("gguf_mxfp4", "gpt-oss", torch.float16),
        (("Q4_K", "Q6_K"), "halves", torch.float32),
        (("Q6_K", "Q5_K"), "pair", torch.float16),
    ],
    ids=str,
)
def test_forward_and_gradients(format, form, dtype, assert_close):
    from headgate.kernels.grouped_ffn import on_triton

    tensors, act, interleaved = case(format, 9, form, dtype)
    rest, tiles = (act.kind, act.params, True, False, interleaved), TILES[128 if isinstance(format, str) else 256]
    y, h = on_triton.forward(*tensors, *rest, True, chip=ONE, tiles=tiles)
    grad, biased = torch.randn_like(y), tensors[6] is not None
    needs = [True, True, False, False, False, biased, True]
    out = on_triton.backward(grad, *tensors, h, *rest, needs, chip=ONE, tiles=tiles)
    want, leaves = truth(tensors, act, interleaved, dtype)
    assert_close(y, want, dtype=dtype, name="y")
    there = [i for i, t in enumerate(leaves) if t is not None]
    grads = torch.autograd.grad(want, [leaves[i] for i in there], grad.double())
    for i, g in zip(there, grads, strict=True):
        assert_close(out[(0, 1, 5, 6)[i]], g, dtype=dtype, scale=2.0 if dtype == torch.float16 else 1.0, name="xsbc"[i])


@pytest.mark.parametrize(
    ("format", "form"),
    [
        *((format, "halves") for format in BLOCKS),
        ("Q4_K", "pair"),
        ("gguf_mxfp4", "gpt-oss"),
        (("Q4_K", "Q6_K"), "gpt-oss"),
    ],
    ids=str,
)
def test_few_rows(format, form, assert_close):
    from headgate.kernels.grouped_ffn.thin import thin_forward

    tensors, act, interleaved = case(format, 1, form)
    y = thin_forward(*tensors, act, False, interleaved, chip=ONE, tiles=(FEW, FEW))
    assert_close(y, truth(tensors, act, interleaved, torch.float32)[0])


@pytest.mark.slow
def test_tiles_that_are_chosen_serve(assert_close):
    """Rows of an odd number of blocks, cut columns, few rows and more."""
    from headgate.kernels.grouped_ffn import on_triton

    for rows in (1, 5):
        tensors, act, interleaved = case("Q8_0", rows, "halves")
        y, _ = on_triton.forward(*tensors, act.kind, act.params, True, False, interleaved, False, chip=ONE)
        assert_close(y, truth(tensors, act, interleaved, torch.float32)[0], name=f"{rows} rows")


@pytest.mark.parametrize(
    ("format", "first", "stride", "copied"),
    [("Q6_K", 4, 1, False), ("Q6_K", 2, 1, True), ("Q4_K", 16, 1, False), ("Q4_K", 4, 1, True), ("Q8_0", 0, 2, True)],
)
def test_blocks_are_copied_only_where_no_word_begins(format, first, stride, copied):
    size = BLOCKS[format][1]
    data = torch.zeros(first + 6 * size * stride, dtype=torch.uint8)[first:].view(2, 3, size * stride)[:, :, ::stride]
    assert (at_words(data, format).data_ptr() != data.data_ptr()) is copied
    assert at_words(data.to("meta"), "Q8_0").shape == data.shape


def test_gate_and_up_in_two_formats_say_once_that_they_are_widened(monkeypatch):
    monkeypatch.setattr(quantized.chip, "why_no_grouped_gemm", lambda rows, experts: None)
    chip.say_once.cache_clear()
    w = [quantize(torch.randn(2, 32, 256), format) for format in ("Q4_K", "Q5_K", "Q6_K")]
    with pytest.warns(UserWarning, match="w_up must have w_gate's format for the Triton form, got 'Q5_K' and 'Q4_K'"):
        assert not quantized.triton_serves(torch.zeros(1, 256), tuple(w))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not quantized.triton_serves(torch.zeros(1, 256), tuple(w))
        assert quantized.triton_serves(torch.zeros(1, 256), (w[0], w[0], w[2]))
        assert quantized.triton_serves(torch.zeros(1, 256), (w[0], None, w[2]))
