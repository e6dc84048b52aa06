"""Quantized weights: what they mean, by definition and in transformers; grouped_ffn on them and its gradients."""

from __future__ import annotations

import pytest
import torch

from headgate.kernels import GPT_OSS, Quantized, Routing, grouped_ffn, quantize
from headgate.kernels.quantized import BLOCKS, FORMATS, PER_BYTE

FORMS = [
    ("fp8", None),
    ("fp8", (1, 1 << 20)),
    ("fp8", (70, 1 << 20)),
    ("fp8", (32, 16)),
    ("int8", (1, 32)),
    ("int8", None),
    ("int4", (1, 32)),
    ("int4", (1, 64)),
    ("int4", None),
    ("uint4", (1, 32)),
    ("uint4", None),
    ("mxfp4", None),
]


class TestMeaning:
    def test_fp8_is_transformers_own(self):
        from transformers.integrations.finegrained_fp8 import Fp8Dequantize

        data = torch.randn(3, 256, 384).to(torch.float8_e4m3fn)
        scale = torch.rand(3, 2, 3) + 0.1
        theirs = Fp8Dequantize(None)._dequantize_one(data, scale, torch.bfloat16)
        assert torch.equal(Quantized.from_deepseek_fp8(data, scale).dequantize(torch.bfloat16), theirs)

    def test_mxfp4_is_transformers_own(self):
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        blocks = torch.randint(0, 256, (3, 10, 4, 16), dtype=torch.uint8)
        scales = torch.randint(100, 140, (3, 10, 4), dtype=torch.uint8)
        theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)  # [E, I, O]
        ours = Quantized.from_gpt_oss_mxfp4(blocks, scales).dequantize(torch.bfloat16)
        assert torch.equal(ours.transpose(1, 2), theirs)

    def test_a_block_cut_short_has_its_own_scale(self):
        data, scale = torch.ones(1, 130, 200).to(torch.float8_e4m3fn), torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
        w = Quantized.from_deepseek_fp8(data, scale).dequantize(torch.float32)[0]
        assert w[[0, 127, 0, 129, 129], [0, 127, 128, 127, 199]].tolist() == [1.0, 1.0, 2.0, 3.0, 4.0]

    def test_bytes_have_a_sign(self):
        data = torch.tensor([-127, -1, 0, 1, 127] + [0] * 59, dtype=torch.int8).view(1, 1, 64)
        w = Quantized(data, torch.tensor([[[0.5, 8.0]]]), "int8", (1, 32))
        assert w.dequantize(torch.float32)[0, 0, :5].tolist() == [-63.5, -0.5, 0.0, 0.5, 63.5]
        assert w.shape == (1, 1, 64)
        q = quantize(torch.tensor([[[-3.0, 3.0, 1.0]]]), "int8")  # symmetric: -128 is not used, and I may be odd
        assert q.data.flatten().tolist() == [-127, 127, 42]

    def test_nibbles_and_exponents(self):
        data = torch.tensor([0x10, 0x8F, 0xF7] + [0x88] * 13, dtype=torch.uint8).view(1, 1, 16)
        int4 = Quantized(data, torch.tensor([[[0.5]]]), "int4", (1, 32)).dequantize(torch.float32)
        assert int4[0, 0, :7].tolist() == [-4.0, -3.5, 3.5, 0.0, -0.5, 3.5, 0.0]
        fp4 = Quantized(data, torch.tensor([[[126]]], dtype=torch.uint8), "mxfp4", (1, 32)).dequantize(torch.float32)
        assert fp4[0, 0, :6].tolist() == [0.0, 0.25, -3.0, -0.0, 3.0, -3.0]
        zeros = torch.tensor([[[0.5, 7.0]]])  # a scale, then its zero
        uint4 = Quantized(data, zeros, "uint4", (1, 32)).dequantize(torch.float32)
        assert uint4[0, 0, :7].tolist() == [-3.5, -3.0, 4.0, 0.5, 0.0, 4.0, 0.5]
        for exponent, power in ((0, 2.0**-127), (1, 2.0**-126), (127, 1.0), (254, 2.0**127)):
            two = torch.full((1, 1, 16), 0x22, dtype=torch.uint8)  # ones
            w = Quantized(two, torch.tensor([[[exponent]]], dtype=torch.uint8), "mxfp4", (1, 32))
            assert w.dequantize(torch.float64).unique().tolist() == [power]
        nan = Quantized(two, torch.tensor([[[255]]], dtype=torch.uint8), "mxfp4", (1, 32))
        assert nan.dequantize(torch.float32).isnan().all()


class TestQuantize:
    @pytest.mark.parametrize(("format", "block"), FORMS)
    def test_takes_the_nearest_number(self, format, block):
        w = torch.randn(3, 70, 128)
        q = quantize(w, format, block=block)
        back = q.dequantize(torch.float32)
        scale = (q.scale.view(torch.float8_e8m0fnu) if format == "mxfp4" else q.scale).float()
        scale = scale.chunk(2, 2)[0] if format == "uint4" else scale
        for axis, step in enumerate(q.block, start=1):
            scale = scale.repeat_interleave(min(step, w.shape[axis]), axis).narrow(axis, 0, w.shape[axis])
        # half the distance to the next number: relative for fp8 (3 bits), by binade for e2m1 (which ends at 6)
        units = (w / scale).abs()
        if format == "fp8":
            allowed = (units / 16).clamp(min=2.0**-10)
        elif format in ("int8", "int4", "uint4"):
            allowed = torch.full_like(units, 0.5)
        else:
            allowed = torch.where(units > 6, units - 6, torch.where(units > 4, 1.0, torch.where(units > 2, 0.5, 0.25)))
        assert ((back - w).abs() <= allowed * scale * (1 + 1e-5)).all()
        again = quantize(back, format, block=block).dequantize(torch.float32)
        assert torch.equal(again, back) if format != "uint4" else torch.allclose(again, back, rtol=1e-6)

    def test_zeros_and_sizes(self):
        sizes = {"fp8": 64 * 64 + 4, "int8": 64 * 64 + 64 * 4, "int4": 64 * 32 + 64 * 4, "uint4": 64 * 32 + 64 * 8}
        for format, each in {**sizes, "mxfp4": 64 * 34}.items():
            q = quantize(torch.zeros(2, 64, 64), format)
            assert (tuple(q.shape), q.nbytes) == ((2, 64, 64), 2 * each)
            assert not q.dequantize(torch.float32).any()
            assert torch.equal(q.expert(1, torch.float16), torch.zeros(64, 64, dtype=torch.float16))

    def test_half_scales_are_the_ones_divided_by(self):
        w = torch.randn(2, 8, 64)
        q = quantize(w, "int4", block=(1, 32), scale_dtype=torch.bfloat16)
        assert q.scale.dtype == torch.bfloat16
        assert (q.dequantize(torch.float32) - w).abs().max() <= 0.51 * q.scale.float().max()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"format": "fp4"}, ValueError, "format must be one of fp8, int8, int4, uint4, mxfp4, Q8_0, .*, got 'fp4'"),
        ({"data": torch.zeros(2, 4, 16)}, TypeError, "data must be torch.uint8 for 'int4', got torch.float32"),
        ({"format": "int8"}, TypeError, "data must be torch.int8 for 'int8', got torch.uint8"),
        ({"data": torch.zeros(4, 16).byte()}, ValueError, r"data must be 3-D .*, got \(4, 16\)"),
        ({"scale": torch.zeros(2, 4, 1).int()}, TypeError, "scale must be fp32, bf16 or fp16, got torch.int32"),
        ({"scale": torch.zeros(2, 4, 2)}, ValueError, r"scale must be \(2, 4, 1\) for weights \(2, 4, 32\)"),
        ({"block": (1, 16)}, ValueError, r"block must be \(1, 32\), \(1, 64\) or \(1, 128\) for 'int4', got \(1, 16\)"),
        ({"scale": torch.zeros(2, 4, 1, device="meta")}, ValueError, "scale must be on cpu as data is, got meta"),
        ({"data": torch.zeros(0, 4, 16).byte()}, ValueError, "data must have at least one element"),
    ],
)
def test_bad_tensors_are_named(change, error, message):
    good = {"data": torch.zeros(2, 4, 16).byte(), "scale": torch.zeros(2, 4, 1), "format": "int4", "block": (1, 32)}
    Quantized(**good)
    with pytest.raises(error, match=f"Quantized: {message}"):
        Quantized(**(good | change))


def test_odd_columns_and_wrong_blocks_are_refused():
    with pytest.raises(ValueError, match="quantize: I must be even for 'mxfp4', got 33"):
        quantize(torch.zeros(1, 4, 33), "mxfp4")
    with pytest.raises(ValueError, match=r"block must be positive, its columns a multiple of 16 or all of 64"):
        quantize(torch.zeros(1, 4, 64), "fp8", block=(1, 24))
    with pytest.raises(ValueError, match=r"blocks must be \[E, O, I/32, 16\], got \(2, 3, 16\)"):
        Quantized.from_gpt_oss_mxfp4(torch.zeros(2, 3, 16).byte(), torch.zeros(2, 3, 1).byte())


class TestGroupedFfn:
    """Against grouped_ffn on the dequantised weights, value and every gradient."""

    D, F, E = 64, 48, 5

    def problem(self, format, *, pair=False, dtype=torch.float32, block=None):
        if format in BLOCKS:
            self.D, self.F = 256, 256
        wide = self.F if pair else 2 * self.F
        shapes = [(wide, self.D), (self.F, self.D), (self.D, self.F)]
        w1, w_up, w2 = (quantize(torch.randn(self.E, *s) / s[1] ** 0.5, format, block=block) for s in shapes)
        leaves = {
            "rows": torch.randn(11, self.D).to(dtype),
            "weights": torch.rand(11, 3),
            "b_down": torch.randn(self.E, self.D).to(dtype),
        }
        if not pair:
            leaves["b_gate_up"] = torch.randn(self.E, wide).to(dtype)
        ids = torch.randint(-1, self.E, (11, 3))
        return (w1, w_up) if pair else w1, w2, {n: t.requires_grad_() for n, t in leaves.items()}, ids

    def run(self, w1, w2, t, ids, **form):
        routing = Routing.from_topk(ids, t["weights"], self.E)
        biases = {n: t[n] for n in ("b_gate_up", "b_down") if n in t}
        return grouped_ffn(t["rows"], routing, w1, w2, **biases, **form)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(
        ("format", "block"),
        [
            ("fp8", None),
            ("int8", None),
            ("int4", (1, 32)),
            ("mxfp4", None),
            ("Q8_0", None),
            ("Q4_K", None),
            ("Q6_K", None),
        ],
    )
    @pytest.mark.parametrize("form", [{}, {"pair": True}, {"interleaved": True, "activation": GPT_OSS}], ids=str)
    def test_value_and_gradients(self, format, block, form, dtype, assert_close):
        form = dict(form)
        pair = form.pop("pair", False)
        w1, w2, leaves, ids = self.problem(format, pair=pair, dtype=dtype, block=block)
        wide = {n: t.detach().double().requires_grad_() for n, t in leaves.items()}
        d1 = tuple(w.dequantize(dtype).double() for w in w1) if pair else w1.dequantize(dtype).double()
        got, want = (
            self.run(w1, w2, leaves, ids, **form),
            self.run(d1, w2.dequantize(dtype).double(), wide, ids, **form),
        )
        assert got.dtype == dtype
        assert_close(got, want, dtype=dtype)
        grad = torch.randn(got.shape, dtype=torch.float64)
        ours = torch.autograd.grad(got, list(leaves.values()), grad.to(dtype))
        for name, a, e in zip(leaves, ours, torch.autograd.grad(want, list(wide.values()), grad), strict=True):
            assert a.dtype == leaves[name].dtype
            assert_close(a, e, dtype=max(dtype, a.dtype, key=lambda d: torch.finfo(d).eps), scale=2, name=name)

    def test_different_formats_and_only_some_gradients(self, assert_close):
        w1, _, leaves, ids = self.problem("mxfp4")
        w2 = quantize(torch.randn(self.E, self.D, self.F), "fp8")
        leaves["b_down"].requires_grad_(False)
        leaves["weights"].requires_grad_(False)
        y = self.run(w1, w2, leaves, ids)
        want = self.run(w1.dequantize(torch.float32), w2.dequantize(torch.float32), leaves, ids)
        ours, theirs = (torch.autograd.grad(t.square().sum(), leaves["rows"])[0] for t in (y, want))
        assert_close(y, want)
        assert_close(ours, theirs)

    def test_the_operator_keeps_its_promises(self):
        w1, w2, leaves, ids = self.problem("mxfp4")
        args = (leaves["rows"], ids.int(), leaves["weights"], [w1.data, w1.scale], [], [w2.data, w2.scale], None, None)
        form = (["mxfp4", "mxfp4"], [1, 32, 1, 32], "silu", [1.0, 0.0, 0.0, 0.0, 1.0], True, False, True)
        tests = ("test_schema", "test_faketensor", "test_autograd_registration")
        for w_up in (None, []):  # the second as in graphs of before
            args = (*args[:4], w_up, *args[5:])
            torch.library.opcheck(torch.ops.headgate.grouped_ffn_quantized.default, (*args, *form), test_utils=tests)

    @pytest.mark.slow  # C++ is compiled
    @pytest.mark.filterwarnings("ignore")
    def test_ahead_of_time_package(self, tmp_path):
        w1, w2, leaves, ids = self.problem("int8")
        leaves = {n: t.detach() for n, t in leaves.items()}

        class Call(torch.nn.Module):
            def forward(_, rows):
                return self.run(w1, w2, {**leaves, "rows": rows}, ids)

        exported = torch.export.export(Call(), (leaves["rows"],), strict=False)
        path = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "call.pt2"))
        with torch.no_grad():
            got = torch._inductor.aoti_load_package(path)(leaves["rows"])
        torch.testing.assert_close(got, self.run(w1, w2, leaves, ids))

    def test_compiles_whole(self):
        w1, w2, leaves, ids = self.problem("fp8")
        compiled = torch.compile(lambda: self.run(w1, w2, leaves, ids), fullgraph=True, backend="aot_eager")
        y, want = compiled(), self.run(w1, w2, leaves, ids)
        assert torch.equal(y, want)
        rows = leaves["rows"]
        assert torch.equal(torch.autograd.grad(y.sum(), rows)[0], torch.autograd.grad(want.sum(), rows)[0])

    def test_one_expert_at_a_time_is_widened(self, monkeypatch):
        from headgate.kernels import quantized

        w1, w2, leaves, ids = self.problem("fp8")
        widened, own = [], quantized.dequantize
        monkeypatch.setattr(quantized, "dequantize", lambda data, *rest: widened.append(len(data)) or own(data, *rest))
        with torch.no_grad():
            self.run(w1, w2, leaves, ids.clamp(max=1))
        assert widened == [1] * 4  # two matrices of each of the two experts with rows

    def test_under_autocast(self, assert_close):
        w1, w2, leaves, ids = self.problem("fp8")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.run(w1, w2, leaves, ids)
        assert y.dtype == torch.bfloat16
        assert_close(y, self.run(w1, w2, leaves, ids))

    def test_what_does_not_go_together_is_refused(self):
        w1, w2, leaves, ids = self.problem("fp8")
        with pytest.raises(TypeError, match="weights must be all Quantized or all tensors, got Quantized, Tensor"):
            self.run(w1, w2.dequantize(torch.float32), leaves, ids)
        with pytest.raises(ValueError, match="transposed must be False for Quantized weights"):
            self.run(w1, w2, leaves, ids, transposed=True)
        with pytest.raises(ValueError, match=r"w_gate_up must be \(5, 96, 64\)"):
            self.run(quantize(torch.zeros(5, 90, 64), "fp8"), w2, leaves, ids)
        pair = quantize(torch.zeros(5, 48, 64), "fp8"), quantize(torch.zeros(5, 48, 64), "mxfp4")
        del leaves["b_gate_up"]
        with pytest.raises(ValueError, match="w_up must have w_gate's format, block and scales"):
            self.run(pair, w2, leaves, ids)
        for one, two in (("int8", "Q8_0"), ("Q8_0", "Q4_K")):
            pair = tuple(
                quantize(torch.zeros(5, 256, 256), f, block=(1, 32) if f == "int8" else None) for f in (one, two)
            )
            leaves["rows"] = torch.zeros(11, 256)
            with pytest.raises(ValueError, match="w_up must have w_gate's format, block and scales"):
                self.run(pair, quantize(torch.zeros(5, 256, 256), "Q4_K"), leaves, ids)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(format, value):
    w = torch.randn(1, 4, 256)
    w[0, 1, 2] = value
    with pytest.raises(ValueError, match="w must be finite"):
        quantize(w, format)


@pytest.mark.parametrize("block", [(0, 0), (-1, 128), (128, 0), (1.0, 32.0), (1,), (1, 2, 3), 128, (True, 128), "ab"])
@pytest.mark.parametrize("format", FORMATS)
def test_a_block_that_is_none_is_refused(format, block):
    with pytest.raises(ValueError, match="quantize: block must be "):
        quantize(torch.randn(2, 4, 256), format, block=block)


@pytest.mark.parametrize("shape", [(0, 4, 256), (2, 0, 256), (2, 4, 0)])
@pytest.mark.parametrize("format", FORMATS)
def test_weights_without_an_element_are_refused(format, shape):
    with pytest.raises(ValueError, match="quantize: w must have at least one element, got"):
        quantize(torch.empty(shape), format)


@pytest.mark.parametrize("format", ["fp8", "int8", "int4"])
def test_scales_that_their_type_cannot_hold_are_refused(format):
    w = torch.randn(2, 8, 128)
    for factor in (1e30, 1e-7):
        with pytest.raises(ValueError, match=r"quantize: scale_dtype must hold scales of .*, got torch.float16"):
            quantize(w * factor, format, scale_dtype=torch.float16)
        for dtype in (torch.float32, torch.bfloat16):
            got = quantize(w * factor, format, scale_dtype=dtype).dequantize(torch.float32)
            assert (got - w * factor).abs().max() < 0.1 * (w * factor).abs().max()
    with pytest.raises(TypeError, match=r"quantize: scale_dtype must be fp32, bf16 or fp16, got torch.int32"):
        quantize(w, format, scale_dtype=torch.int32)


@pytest.mark.parametrize("format", ["fp8", "int8", "int4"])
def test_a_dead_row_beside_others_takes_scales_in_fp16(format):
    w = torch.randn(2, 8, 128) * 0.02
    w[0, 3] *= 1e-6
    got = quantize(w, format, block=(1, 128), scale_dtype=torch.float16).dequantize(torch.float32)
    assert (got - w)[0, 3].abs().max() < 1e-6
    assert (got - w).abs().max() < 0.1 * w.abs().max()
    w[1] = w[0, 3]  # an expert of such rows alone
    with pytest.raises(ValueError, match="quantize: scale_dtype must hold scales"):
        quantize(w, format, block=(1, 128), scale_dtype=torch.float16)


@pytest.mark.parametrize("format", PER_BYTE)
@pytest.mark.parametrize("factor", [1e-45, 1e-41, 1e-38, 1e37])
def test_the_smallest_and_the_largest_weights_stay_numbers(format, factor):
    """A block of a dead expert beside others."""
    w = torch.zeros(2, 8, 256)
    w[0] = torch.randn(8, 256).clamp(-3, 3)
    w[1, :, ::2] = w[0, :, ::2].sign() * factor
    got = quantize(w, format).dequantize(torch.float32)
    assert got.isfinite().all()
    assert (got - w).abs().amax((1, 2)).le(torch.tensor([0.6, max(0.3 * factor, 1e-38)])).all()
