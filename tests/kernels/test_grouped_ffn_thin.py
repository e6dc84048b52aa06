"""grouped_ffn's kernels for few rows in Triton's interpreter, against the reference on the same numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from headgate.kernels import GPT_OSS, Activation, Quantized, quantize
from headgate.kernels.activation import as_activation
from headgate.kernels.chip import A100, CHIPS, H200
from headgate.kernels.grouped_ffn import grouped_ffn_reference
from headgate.kernels.grouped_ffn.thin_tiles import ThinSize, ThinTile, choose_thin, thin_candidates
from headgate.kernels.quantized import PER_BYTE

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from headgate.kernels.grouped_ffn.thin import thin_forward  # noqa: E402
from headgate.kernels.grouped_ffn.triton_thin import element, is_nan  # noqa: E402

interpreted = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="Triton's interpreter is off")

FORMATS = {
    "fp8 in blocks": ("fp8", (32, 16)),
    "fp8 by row": ("fp8", (1, 1 << 20)),
    "int8": ("int8", (1, 32)),
    "int4": ("int4", (1, 32)),
    "uint4": ("uint4", (1, 32)),
    "mxfp4": ("mxfp4", (1, 32)),
}


WHOLE = [
    {},
    {"interleaved": True, "bias": True, "activation": GPT_OSS},
    {"pair": True},
    {"gated": False, "bias": True},
    {"transposed": True, "bias": True},
    {"transposed": True, "interleaved": True},
    {"transposed": True, "pair": True},
    {"D": 64, "F": 32},
    {"transposed": True, "D": 64, "F": 32},
]
FEW_BITS = [{}, {"interleaved": True, "bias": True}, {"pair": True}]
EVEN, CUT = (64, 32), (96, 34)
# `make test` has every format in every size and every form once; the rest of the product is slow
QUICK = [
    *((format, CUT, 0) for format in FORMATS),
    *((format, EVEN, 1) for format in FORMATS),
    ("int4", CUT, 2),
    ("fp8 by row", EVEN, 2),
]
# few programs, several steps, a cut last one: the interpreter pays by the program
COARSE = ThinTile(outputs=32, chunks=2, unroll=2, warps=1)


@pytest.fixture(autouse=True)
def _empty_is_nan():
    """What a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


class Case:
    """A problem of random weights; `run` gives y by the kernels, `truth` by the reference in fp64."""

    def __init__(self, R=3, D=70, F=33, E=5, K=3, *, dtype=torch.float32, format=None, block=None, pair=False,
                 transposed=False, interleaved=False, bias=False, activation="silu", gated=True, ids=None):  # fmt: skip
        self.act = activation if isinstance(activation, Activation) else as_activation(activation, gated)
        self.form = {"transposed": transposed, "interleaved": interleaved}
        width = F if pair or not self.act.gated else 2 * F

        def weight(rows, columns):
            w = (torch.randn(E, rows, columns) / columns**0.5).to(dtype)
            if format is not None:
                return quantize(w, format, block=block)
            return w.transpose(1, 2).contiguous() if transposed else w

        self.w1, self.w_up, self.w2 = weight(width, D), weight(F, D) if pair else None, weight(D, F)
        self.b1 = torch.randn(E, width).to(dtype) if bias and not pair else None
        self.b2 = torch.randn(E, D).to(dtype) if bias else None
        self.ids = torch.randint(0, E, (R, K), dtype=torch.int32) if ids is None else torch.tensor(ids).int()
        self.x, self.weights = torch.randn(self.ids.shape[0], D).to(dtype), torch.rand(self.ids.shape)
        self.tiles = (replace(COARSE, chunks=8 if transposed or format else 2),) * 2

    def run(self, chip=H200, tiles=()):
        tiles = self.tiles if tiles == () else tiles
        return thin_forward(
            self.x, self.ids, self.weights, self.w1, self.w_up, self.w2, self.b1, self.b2, self.act,
            self.form["transposed"], self.form["interleaved"], chip=chip, tiles=tiles,
        )  # fmt: skip

    def truth(self):
        def wide(w):
            w = w.dequantize(torch.float32) if isinstance(w, Quantized) else w
            return None if w is None else w.double()

        w1 = wide(self.w1) if self.w_up is None else (wide(self.w1), wide(self.w_up))
        return grouped_ffn_reference(
            self.x.double(), self.ids, self.weights.double(), w1, wide(self.w2), wide(self.b1), wide(self.b2),
            activation=self.act, **self.form,
        )  # fmt: skip


@triton.jit
def read(words, numbers, bad, FORMAT: tl.constexpr, P: tl.constexpr, N: tl.constexpr):
    """Every number of every word, and which words hold a NaN."""
    at = tl.arange(0, N)
    word = tl.load(words + at).to(tl.int32)
    for j in tl.static_range(P):
        tl.store(numbers + at * P + j, element(word, j, FORMAT))
    tl.store(bad + at, is_nan(word).to(tl.int32))


@interpreted
class TestThinKernels:
    @pytest.mark.parametrize(
        ("dtype", "form"),
        [
            *((torch.float32, form) for form in WHOLE),
            *(
                pytest.param(torch.float16, form, marks=() if i in (1, 4, 7) else pytest.mark.slow)
                for i, form in enumerate(WHOLE)
            ),
        ],
        ids=str,
    )
    def test_equals_the_reference(self, form, dtype, assert_close):
        case = Case(dtype=dtype, **form)
        y = case.run()
        assert y.dtype == dtype
        assert_close(y, case.truth(), dtype=dtype)

    @pytest.mark.parametrize(
        ("format", "size", "form"),
        [
            pytest.param(format, size, form, marks=() if (format, size, i) in QUICK else pytest.mark.slow)
            for format in FORMATS
            for size in (EVEN, CUT)
            for i, form in enumerate(FEW_BITS)
        ],
        ids=str,
    )
    def test_quantized_equals_the_reference_on_dequantized_weights(self, format, size, form, assert_close):
        name, block = FORMATS[format]
        case = Case(R=2, E=3, K=2, D=size[0], F=size[1], format=name, block=block, **form)
        assert_close(case.run(), case.truth())

    @pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "relu2", "quick_gelu"])
    def test_every_activation(self, activation, assert_close):
        case = Case(R=1, activation=activation)
        assert_close(case.run(), case.truth())

    @pytest.mark.parametrize("form", [{}, {"transposed": True}, {"format": "int4", "block": (1, 32), "D": 64, "F": 32}])
    def test_pairs_without_an_expert_add_nothing(self, form, assert_close):
        case = Case(ids=[[-1, 2, 9], [-1, -1, 5], [0, 1, -1]], bias=True, **form)
        case.weights[case.ids.lt(0) | case.ids.ge(5)] = torch.nan
        y = case.run()
        assert torch.equal(y[1], torch.zeros_like(y[1]))
        case.weights.nan_to_num_(0.0)
        assert_close(y, case.truth())

    def test_nan_stays_with_its_row_and_its_expert(self, assert_close):
        case = Case(ids=[[0, 1, 2], [0, 2, 1], [0, 1, 2]])
        clean = case.run()
        case.x[1], case.w1[3], case.w2[4], case.w2[3] = torch.nan, torch.nan, torch.inf, torch.nan
        y = case.run()
        assert y[1].isnan().all()
        assert torch.equal(y[[0, 2]], clean[[0, 2]])

    def test_an_fp8_nan_is_one_and_stays_in_its_row(self):
        case = Case(R=1, K=1, D=64, F=32, format="fp8", ids=[[2]])
        case.w2.data.view(torch.uint8)[2, 5, 3] = 0xFF
        assert case.run().isnan()[0].nonzero().flatten().tolist() == [5]

    @pytest.mark.parametrize("format", PER_BYTE)
    @pytest.mark.parametrize("words", [torch.uint8, torch.int32], ids=str)
    def test_every_code_is_read_exactly_as_dequantized(self, format, words):
        codes, per_byte = torch.arange(256, dtype=torch.uint8), PER_BYTE[format]
        per_word = per_byte * words.itemsize
        got, bad = torch.empty(256 * per_byte), torch.zeros(256 // words.itemsize, dtype=torch.int32)
        read[(1,)](codes.view(words), got, bad, FORMAT=format, P=per_word, N=256 // words.itemsize)
        if format == "fp8":
            want = codes.view(torch.float8_e4m3fn).float()
            assert torch.equal(bad.bool(), want.isnan().view(-1, words.itemsize).any(1))
            assert torch.equal(got[want.isfinite()] * 256, want[want.isfinite()])
        else:
            groups, data = 8 * per_byte, codes.view(torch.int8 if format == "int8" else torch.uint8).view(1, 1, 256)
            scale = torch.ones(1, 1, groups)
            if format == "mxfp4":
                scale = torch.full((1, 1, groups), 127, dtype=torch.uint8)
            elif format == "uint4":
                scale = torch.cat((scale, torch.zeros(1, 1, groups)), 2)
            want = Quantized(data, scale, format, (1, 32)).dequantize(torch.float32).flatten()
            assert torch.equal(got * (16384 if format == "mxfp4" else 1), want)

    @pytest.mark.parametrize(
        "change",
        [
            lambda c: {"x": torch.stack((c.x, c.x), 2)[:, :, 0]},
            lambda c: {"w1": torch.stack((c.w1, c.w1), 3)[..., 0]},
            lambda c: {"w2": torch.cat((c.w2, c.w2), 2)[:, :, 1 : 1 + c.w2.shape[2]]},
            lambda c: {"w1": c.w1.transpose(1, 2).contiguous().transpose(1, 2)},
            lambda c: {"ids": torch.stack((c.ids, c.ids), 2)[..., 0]},
        ],
    )
    def test_any_strides(self, change, assert_close):
        case = Case(R=2, D=36, F=16)
        for name, value in change(case).items():
            setattr(case, name, value)
        case.tiles = tuple(replace(t, outputs=8) for t in case.tiles)
        assert_close(case.run(), case.truth())

    @pytest.mark.parametrize("form", [{}, {"transposed": True}, {"format": "mxfp4", "block": (1, 32)}], ids=str)
    def test_the_chosen_tiles_serve_and_two_runs_are_equal(self, form, assert_close):
        case = Case(R=1, K=2, D=64, F=32, **form)
        few = replace(A100, processors=1)
        y = case.run(chip=few, tiles=None)
        assert_close(y, case.truth())
        assert torch.equal(y, case.run(chip=few, tiles=None))

    def test_two_launches_on_meta_tensors(self):
        case, names = Case(), []
        meta = [t if t is None else t.to("meta") for t in (case.x, case.ids, case.weights, case.w1, None, case.w2)]

        def recorder(kernel, grid, *, warps, stages, **arguments):
            names.append(kernel.__name__)
            assert all(t.device.type == "meta" for t in arguments.values() if isinstance(t, torch.Tensor))

        y = thin_forward(*meta, None, None, case.act, False, False, chip=H200, launch=recorder)
        assert (y.shape, names) == (case.x.shape, ["thin_up_kernel", "thin_down_kernel"])


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
@pytest.mark.parametrize("per_chunk", [8, 4, 16, 32], ids=["bf16", "fp32", "8 bits", "4 bits"])
@pytest.mark.parametrize(
    "model", [(2048, 768, 8), (2880, 2880, 4), (7168, 2048, 8), (4096, 14336, 2), (2048, 512, 10)], ids=str
)
def test_tiles_fill_the_chip_and_waste_little(chip, per_chunk, model):
    hidden, intermediate, top_k = model
    for tokens in (1, 2, 4):
        for size in (
            ThinSize(tokens * top_k, intermediate, hidden, 1, 2, per_chunk),
            ThinSize(tokens, hidden, intermediate, top_k, 1, per_chunk),
        ):
            tile = choose_thin(size, chip)
            assert size.programs_per_output * -(-size.outputs // tile.outputs) >= 2 * chip.processors
            assert -(-size.length // (tile.chunks * per_chunk)) * tile.chunks * per_chunk <= 1.35 * size.length
            rows = tile.outputs * size.halves * (1 << (size.together - 1).bit_length())
            assert rows * tile.chunks * tile.unroll <= 8 * 32 * tile.warps  # loads of 16 bytes, 8 a thread


@pytest.mark.parametrize("size", [
    ThinSize(8, 768, 2048, together=1, halves=2, per_chunk=8),
    ThinSize(1, 2048, 768, together=8, halves=1, per_chunk=32),
    ThinSize(4, 2880, 2880, together=1, halves=2, per_chunk=8, rows_contiguous=False),
])  # fmt: skip
def test_candidates_begin_with_the_choice_and_its_neighbours(size):
    found = thin_candidates(size, H200)
    assert found[0] == choose_thin(size, H200)
    assert len(found) == len(set(found)) > 20
    numbers = ("outputs", "chunks", "unroll", "warps")
    changed = [sum(getattr(t, n) != getattr(found[0], n) for n in numbers) for t in found]
    assert changed[:4] == [0, 1, 1, 1]
    for t in found[1:]:
        loads = size.together * t.chunks * t.outputs * size.halves / (32 * t.warps)
        assert 1 <= loads <= 64
        if size.rows_contiguous:
            assert loads * t.unroll <= 16, "registers for what is under way"
