"""GGUF's blocks: what the gguf package reads and writes, to the bit; how near K's blocks come; what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from headgate.kernels import Quantized, quantize
from headgate.kernels.gguf_blocks import BLOCKS

# The relative error that llama.cpp's own quantiser leaves of normal weights (ggml_quantize_chunk of ggml 0.25.3, 512 x
# 2048 of them).
ERROR = {"Q8_0": 0.00535, "Q4_0": 0.0860, "Q4_K": 0.07135, "Q5_K": 0.03609, "Q6_K": 0.01774, "gguf_mxfp4": 0.1141}


def theirs(format):
    gguf = pytest.importorskip("gguf")
    return gguf, getattr(gguf.GGMLQuantizationType, "MXFP4" if format == "gguf_mxfp4" else format)


def bits(t) -> np.ndarray:
    return np.asarray(t, np.float32).view(np.int32)


@pytest.mark.parametrize("format", BLOCKS)
class TestMeaning:
    @pytest.mark.filterwarnings("ignore")  # numpy's, of infinite scales
    def test_any_bytes_are_read_as_gguf_reads_them(self, format):
        gguf, kind = theirs(format)
        data = torch.randint(0, 256, (3, 33, 2 * BLOCKS[format][1]), dtype=torch.uint8)
        want = gguf.dequantize(data.flatten(0, 1).numpy(), kind)
        got = Quantized.from_gguf(data, format).dequantize(torch.float32)
        assert got.shape == (3, 33, 2 * BLOCKS[format][0])
        numbers = ~np.isnan(want)
        assert numbers.mean() > 0.8
        assert np.array_equal(bits(got).reshape(want.shape)[numbers], bits(want)[numbers])
        assert np.array_equal(np.isnan(got.numpy().reshape(want.shape)), ~numbers)

    def test_what_gguf_can_write_is_written_alike(self, format):
        gguf, kind = theirs(format)
        w = torch.randn(2, 17, 512) * 0.02
        w[0, 0], w[0, 1, 3], w[1, 2, ::2] = 0.0, 40.0, 0.0
        w[1, 3, :32] = torch.tensor([1.0, -1.0] * 16)  # of two largest alike, the first decides
        ours = quantize(w, format)
        assert (ours.shape, tuple(ours.scale.shape)) == (w.shape, (2, 0, 0))
        assert ours.nbytes == w.numel() // BLOCKS[format][0] * BLOCKS[format][1]
        back = gguf.dequantize(ours.data.flatten(0, 1).numpy(), kind)
        assert np.array_equal(back, ours.dequantize(torch.float32).flatten(0, 1).numpy())
        if format.endswith("_K"):
            with pytest.raises(NotImplementedError):  # the day they can, the bits may be compared
                gguf.quantize(w.flatten(0, 1).numpy(), kind)
        else:
            assert np.array_equal(gguf.quantize(w.flatten(0, 1).numpy(), kind), ours.data.flatten(0, 1).numpy())

    def test_it_comes_near_and_stays(self, format):
        w = torch.randn(2, 200, 512) * 0.02
        once = quantize(w, format).dequantize(torch.float32)
        assert (
            0.9 * ERROR[format] < (once - w).norm() / w.norm() < (1 if format.endswith("_K") else 1.01) * ERROR[format]
        )
        again = quantize(once, format).dequantize(torch.float32)
        assert (again - once).norm() <= 0.003 * w.norm()
        shifted = quantize(w.abs(), format).dequantize(torch.float32)  # all of one sign: no minimum below zero
        assert (shifted - w.abs()).norm() / w.norm() < 1.2 * ERROR[format]
        assert not quantize(torch.zeros(1, 2, 256), format).dequantize(torch.float32).any()

    def test_experts_one_by_one_and_in_chunks(self, format, monkeypatch):
        w = torch.randn(3, 5, 768)
        q = quantize(w, format)
        monkeypatch.setattr("headgate.kernels.gguf_blocks._CHUNK", 1024)
        for e in range(3):
            assert torch.equal(quantize(w[e : e + 1], format).data, q.data[e : e + 1])
            assert torch.equal(q.expert(e, torch.bfloat16), q.dequantize(torch.bfloat16)[e])
        copy = Quantized.from_gguf(q.data.repeat(1, 2, 1)[:, ::2], format).copy()
        assert copy.data.is_contiguous()
        assert torch.equal(copy.to("cpu").dequantize(), q.dequantize().repeat(1, 2, 1)[:, ::2])
        like = quantize(torch.empty(3, 5, 768, device="meta"), format)
        assert (like.data.shape, like.data.dtype) == (q.data.shape, q.data.dtype)

    def test_what_is_no_row_of_blocks_is_refused(self, format):
        weights, size = BLOCKS[format]
        with pytest.raises(ValueError, match=f"quantize: I must be a multiple of {weights} for '{format}', got 16"):
            quantize(torch.zeros(1, 4, 16), format)
        rule = (
            rf"data must have rows of a multiple of {size} bytes \({weights} weights\) for '{format}', got {size + 1}"
        )
        with pytest.raises(ValueError, match=f"Quantized: {rule}"):
            Quantized.from_gguf(torch.zeros(2, 4, size + 1, dtype=torch.uint8), format)
        data = torch.zeros(2, 4, size, dtype=torch.uint8)
        with pytest.raises(TypeError, match=f"data must be torch.uint8 for '{format}', got torch.int8"):
            Quantized.from_gguf(data.view(torch.int8), format)
        with pytest.raises(ValueError, match=rf"scale must be empty \[E, 0, 0\] for '{format}'"):
            Quantized(data, torch.zeros(2, 4, 1, dtype=torch.uint8), format, (1, weights))
        with pytest.raises(ValueError, match=rf"block must be \(1, {weights}\) for '{format}', got \(1, 64\)"):
            quantize(torch.zeros(1, 4, 256), format, block=(1, 64))


def test_other_formats_and_shapes_are_named():
    with pytest.raises(ValueError, match=r"format must be one of Q8_0, .* in GGUF, got 'int4'"):
        Quantized.from_gguf(torch.zeros(1, 4, 34, dtype=torch.uint8), "int4")
    with pytest.raises(ValueError, match=r"data must be a tensor \[E, O, bytes of a row\], got \(4, 34\)"):
        Quantized.from_gguf(torch.zeros(4, 34, dtype=torch.uint8), "Q8_0")


@pytest.mark.parametrize("format", [f for f in BLOCKS if f != "gguf_mxfp4"])
def test_weights_that_fp16_cannot_scale_are_refused(format):
    w = torch.randn(2, 4, 256)
    with pytest.raises(ValueError, match="quantize: w must have weights whose scales fp16 can hold"):
        quantize(w * 1e30, format)
    with pytest.raises(ValueError, match=f"w must have a weight of at least .* for the fp16 scales of '{format}'"):
        quantize(w * 1e-7, format)
    w[0, 1] *= 1e-9  # beside others, a dead row may become zero
    assert not quantize(w, format).dequantize(torch.float32)[0, 1].abs().gt(1e-7).any()
