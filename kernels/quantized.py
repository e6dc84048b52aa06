"""Expert weights in few bits: the numbers, their scales, and how the two make a weight.

    format    data                                         a weight
    "fp8"     float8_e4m3fn [E, O, I]                       data * scale of its block
    "int8"    int8 [E, O, I]                                data * scale of its block
    "int4"    uint8 [E, O, I/2], low nibble = even column   (nibble - 8) * scale of its block
    "uint4"   uint8 [E, O, I/2], low nibble = even column   (nibble - zero) * scale of its block
    "mxfp4"   uint8 [E, O, I/2], low nibble = even column   e2m1(nibble) * 2^(scale - 127) of its block

    GGUF's    uint8 [E, O, bytes of a row], as in a file    as gguf_blocks.py says

`scale` is [E, ceil(O / bo), ceil(I / bi)] for blocks of (bo, bi) weights: uint8 exponents (e8m0, 255 is NaN) for
"mxfp4", floating point for the others. That of "uint4" is twice as wide: after a row's scales come its zeros, which are
whole numbers from 0 to 16. GGUF's blocks ("Q8_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K", "gguf_mxfp4") hold their scales
themselves: `scale` is empty there, uint8 [E, 0, 0]. O are an expert's output rows, I its input columns.
Sources: DeepSeek-V3 (2024), section 3.3 (blocks of 128 x 128); OCP Microscaling Formats (2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .gguf_blocks import BLOCKS, dequantize_blocks, quantize_blocks

PER_BYTE = {
    "fp8": 1,
    "int8": 1,
    "int4": 2,
    "uint4": 2,
    "mxfp4": 2,
}  # weights in a byte of data
FORMATS = (*PER_BYTE, *BLOCKS)
_DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, **dict.fromkeys(("int4", "uint4", "mxfp4"), torch.uint8)}
_BLOCKS = {"fp8": (128, 128), **dict.fromkeys(("int8", "int4", "uint4"), (1, 128)), "mxfp4": (1, 32)}  # by default
_GROUPS = (32, 64, 128)  # columns of one int8, int4 or uint4 scale
_SCALES = (torch.float32, torch.bfloat16, torch.float16)
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_TOP = {"fp8": 448.0, "int8": 127.0, "int4": 7.0}  # what the largest weight of a block becomes
_E2M1_MAX_EXPONENT = 2


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def columns_of(format: str, size: int) -> int:
    """I, from the columns of `data`."""
    if format in BLOCKS:
        weights, bytes_each = BLOCKS[format]
        return size // bytes_each * weights
    return PER_BYTE[format] * size


def _check_block(who: str, format: str, block: tuple[int, int], columns: int) -> None:
    whole = isinstance(block, tuple | list) and all(hasattr(n, "__index__") and not isinstance(n, bool) for n in block)
    if not whole or len(block) != 2:
        raise ValueError(f"{who}: block must be (rows, columns), two whole numbers, got {block!r}")
    down, across = block
    if format in BLOCKS:
        if block != (1, BLOCKS[format][0]):
            raise ValueError(f"{who}: block must be {(1, BLOCKS[format][0])} for {format!r}, got {block}")
    elif format == "fp8":
        if down < 1 or across < 1 or (across % 16 and across < columns):
            rule = f"positive, its columns a multiple of 16 or all of {columns}"
            raise ValueError(f"{who}: block must be {rule}, got {block}")
    elif down != 1 or across not in ((32,) if format == "mxfp4" else _GROUPS):
        rule = "(1, 32)" if format == "mxfp4" else "(1, 32), (1, 64) or (1, 128)"
        raise ValueError(f"{who}: block must be {rule} for {format!r}, got {block}")


@dataclass(frozen=True)
class Quantized:
    """Frozen weights [E, O, I] of E experts; see the module's table. `block` is (bo, bi), the rows and columns of one
    scale: (128, 128) in DeepSeek's checkpoints, (1, I) for a scale per row, (1, 32) in "mxfp4".

    Raises ValueError or TypeError naming argument, rule and value. Nothing is copied.

    >>> q = quantize(torch.randn(2, 64, 128), "mxfp4")
    >>> q.shape, q.nbytes, q.dequantize(torch.bfloat16).dtype
    (torch.Size([2, 64, 128]), 8704, torch.bfloat16)
    """

    data: Tensor
    scale: Tensor
    format: str
    block: tuple[int, int]

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"Quantized: format must be one of {', '.join(FORMATS)}, got {self.format!r}")
        for name, t in (("data", self.data), ("scale", self.scale)):
            if not isinstance(t, Tensor):
                raise TypeError(f"Quantized: {name} must be a tensor, got {type(t).__name__}")
            if t.dim() != 3:
                raise ValueError(f"Quantized: {name} must be 3-D [E, rows, columns], got {tuple(t.shape)}")
        if self.data.device != self.scale.device:
            raise ValueError(f"Quantized: scale must be on {self.data.device} as data is, got {self.scale.device}")
        want = _DTYPES.get(self.format, torch.uint8)
        if self.data.dtype != want:
            raise TypeError(f"Quantized: data must be {want} for {self.format!r}, got {self.data.dtype}")
        if min(self.data.shape) < 1:
            raise ValueError(f"Quantized: data must have at least one element, got {tuple(self.data.shape)}")
        if self.format == "mxfp4" or self.format in BLOCKS:
            if self.scale.dtype != torch.uint8:
                raise TypeError(f"Quantized: scale must be torch.uint8 for {self.format!r}, got {self.scale.dtype}")
        elif self.scale.dtype not in _SCALES:
            raise TypeError(f"Quantized: scale must be fp32, bf16 or fp16, got {self.scale.dtype}")
        self._check_block()

    def _check_block(self) -> None:
        rows, columns = self.shape[1:]
        _check_block("Quantized", self.format, self.block, columns)
        if self.format in BLOCKS:
            weights, size = BLOCKS[self.format]
            if self.data.shape[2] % size:
                rule = f"a multiple of {size} bytes ({weights} weights) for {self.format!r}"
                raise ValueError(f"Quantized: data must have rows of {rule}, got {self.data.shape[2]}")
            if tuple(self.scale.shape) != (self.shape[0], 0, 0):
                rule = f"empty [E, 0, 0] for {self.format!r}, whose blocks hold their scales"
                raise ValueError(f"Quantized: scale must be {rule}, got {tuple(self.scale.shape)}")
            return
        down, across = self.block
        each = 2 if self.format == "uint4" else 1
        want = (self.shape[0], _cdiv(rows, down), each * _cdiv(columns, across))
        if tuple(self.scale.shape) != want:
            raise ValueError(
                f"Quantized: scale must be {want} for weights {tuple(self.shape)} in blocks of {self.block}, "
                f"got {tuple(self.scale.shape)}"
            )

    @property
    def shape(self) -> torch.Size:
        """[E, O, I] of the weights, not of `data`."""
        e, rows, columns = self.data.shape
        return torch.Size((e, rows, columns_of(self.format, columns)))

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def nbytes(self) -> int:
        """Of data and scales."""
        return self.data.nbytes + self.scale.nbytes

    def to(self, device: torch.device | str) -> Quantized:
        return Quantized(self.data.to(device), self.scale.to(device), self.format, self.block)

    def copy(self) -> Quantized:
        """With data and scales contiguous and of their own."""
        data, scale = (t.clone(memory_format=torch.contiguous_format) for t in (self.data, self.scale))
        return Quantized(data, scale, self.format, self.block)

    def expert(self, e: int, dtype: torch.dtype) -> Tensor:
        """Weights [O, I] of one expert in `dtype`."""
        return dequantize(self.data[e : e + 1], self.scale[e : e + 1], self.format, self.block, dtype)[0]

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Weights [E, O, I]: products in fp32, rounded once to `dtype`."""
        return dequantize(self.data, self.scale, self.format, self.block, dtype)

    @classmethod
    def from_deepseek_fp8(cls, data: Tensor, scale_inv: Tensor, block: tuple[int, int] = (128, 128)) -> Quantized:
        """From float8_e4m3fn `weight` [E, O, I] and `weight_scale_inv` [E, ceil(O/128), ceil(I/128)]."""
        return cls(data, scale_inv, "fp8", block)

    @classmethod
    def from_gguf(cls, data: Tensor, format: str) -> Quantized:
        """From uint8 [E, O, bytes of a row] as they lie in a GGUF file; `format` is one of gguf_blocks.BLOCKS."""
        if format not in BLOCKS:
            raise ValueError(f"Quantized: format must be one of {', '.join(BLOCKS)} in GGUF, got {format!r}")
        if not isinstance(data, Tensor) or data.dim() != 3:
            got = tuple(data.shape) if isinstance(data, Tensor) else type(data).__name__
            raise ValueError(f"Quantized: data must be a tensor [E, O, bytes of a row], got {got}")
        scale = torch.empty(data.shape[0], 0, 0, dtype=torch.uint8, device=data.device)
        return cls(data, scale, format, (1, BLOCKS[format][0]))

    @classmethod
    def from_gpt_oss_mxfp4(cls, blocks: Tensor, scales: Tensor) -> Quantized:
        """From uint8 `*_blocks` [E, O, I/32, 16] and `*_scales` [E, O, I/32] of gpt-oss' checkpoints. Gate and up rows
        alternate there (`interleaved=True` for grouped_ffn)."""
        if blocks.dim() != 4 or blocks.shape[3] != 16:
            raise ValueError(f"Quantized: blocks must be [E, O, I/32, 16], got {tuple(blocks.shape)}")
        return cls(blocks.flatten(2), scales, "mxfp4", (1, 32))


def quantize(
    w: Tensor,
    format: str,
    *,
    block: tuple[int, int] | None = None,
    scale_dtype: torch.dtype = torch.float32,
) -> Quantized:
    """Weights w [E, O, I] to the nearest numbers of `format`. `block` is by default (128, 128) for "fp8", (1, 32)
    for "mxfp4", and (1, 128) for the others. Scales take the largest magnitude of each block to the format's largest
    ("mxfp4": to its largest power of two, as the OCP standard has it; "uint4": the least and the largest weight, or
    zero, to 0 and 15). Raises ValueError naming argument, rule
    and value; also where `scale_dtype` cannot hold a scale to one part in 16, as fp16 cannot that of weights near 1e30
    or 1e-6. A block so small beside its expert's largest that it is lost in that one's rounding may become zero.

    GGUF's blocks have one size and scales of fp16: `block` and `scale_dtype` change nothing there. "Q8_0", "Q4_0" and
    "gguf_mxfp4" are what the gguf package writes, to the bit; "Q4_K", "Q5_K" and "Q6_K" take the best of some 20
    scales and minima in least squares."""
    if format not in FORMATS:
        raise ValueError(f"quantize: format must be one of {', '.join(FORMATS)}, got {format!r}")
    if w.dim() != 3 or not w.dtype.is_floating_point:
        raise ValueError(f"quantize: w must be floating point [E, O, I], got {w.dtype} {tuple(w.shape)}")
    step = BLOCKS[format][0] if format in BLOCKS else PER_BYTE[format]
    if w.shape[2] % step:
        rule = "even" if step == 2 else f"a multiple of {step}"
        raise ValueError(f"quantize: I must be {rule} for {format!r}, got {w.shape[2]}")
    if w.device.type != "meta" and not w.isfinite().all():
        raise ValueError("quantize: w must be finite, got NaN or Inf among its weights")
    if min(w.shape) < 1:
        raise ValueError(f"quantize: w must have at least one element, got {tuple(w.shape)}")
    if scale_dtype not in _SCALES:
        raise TypeError(f"quantize: scale_dtype must be fp32, bf16 or fp16, got {scale_dtype}")
    block = _BLOCKS.get(format, (1, step)) if block is None else block
    _check_block("quantize", format, block, w.shape[2])
    w = w.detach().float().contiguous()
    if format in BLOCKS:
        return Quantized.from_gguf(quantize_blocks(w, format), format)
    if format == "uint4":
        least = _largest(-w, block).clamp(min=0)
        scale = _scales(_largest(w, block).clamp(min=0) + least, 15.0, scale_dtype)
        zero = (least / scale.float()).round().clamp(0, 15)
        by, up = (_spread(t, block, w.shape) for t in (scale.float(), zero))
        data = _pack(((w / by).round() + up).clamp(0, 15).to(torch.uint8))
        return Quantized(data, torch.cat((scale, zero.to(scale_dtype)), 2), format, block)
    largest = _largest(w.abs(), block)
    if format == "mxfp4":
        exponent = torch.frexp(largest).exponent - 1 - _E2M1_MAX_EXPONENT
        scale = torch.where(largest > 0, exponent + 127, 127).clamp(0, 254).to(torch.uint8)
        data = _pack(_nearest_e2m1(w / _spread(_powers(scale), block, w.shape)))
    else:
        scale = _scales(largest, _TOP[format], scale_dtype)
        data = _nearest(w / _spread(scale.float(), block, w.shape), format)
    return Quantized(data, scale, format, block)


def dequantize(data: Tensor, scale: Tensor, format: str, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The weights [E, O, I] of any number of experts; plain torch, any device, the truth."""
    if format in BLOCKS:
        return dequantize_blocks(data, format).to(dtype)
    by = _powers(scale) if format == "mxfp4" else scale.float()
    if PER_BYTE[format] == 1:
        values = data.float()
    else:
        nibbles = torch.stack((data & 15, data >> 4), -1).flatten(2)
        values = _e2m1(nibbles) if format == "mxfp4" else nibbles.float()
    if format == "int4":
        values = values - 8
    elif format == "uint4":
        by, zero = by.chunk(2, 2)
        values = values - _spread(zero, block, values.shape)
    return (values * _spread(by, block, values.shape)).to(dtype)


def _spread(scale: Tensor, block: tuple[int, int], shape: torch.Size) -> Tensor:
    """A scale for every weight, or for every row where one scale serves it."""
    for axis, (step, size) in enumerate(zip(block, shape[1:], strict=True), start=1):
        if scale.shape[axis] > 1:
            scale = scale.repeat_interleave(step, axis).narrow(axis, 0, size)
    return scale


def _largest(w: Tensor, block: tuple[int, int]) -> Tensor:
    """The largest number in each block, those of blocks cut short not below zero."""
    e, rows, columns = w.shape
    down, across = min(block[0], rows), min(block[1], columns)
    w = torch.nn.functional.pad(w, (0, -columns % across, 0, -rows % down))
    return w.reshape(e, _cdiv(rows, down), down, _cdiv(columns, across), across).amax((2, 4))


def _scales(largest: Tensor, top: float, dtype: torch.dtype) -> Tensor:
    """Those of blocks with these largest magnitudes; 1 where all weights are zero, or too small for any scale."""
    exact = largest / top
    scale = exact.to(dtype)
    meant = largest >= torch.finfo(torch.float32).tiny
    error = (scale.float() - exact).abs()
    seen = error * top > exact.amax((1, 2), keepdim=True) / 2  # more than half a step of the expert's largest block
    if scale.device.type != "meta" and ((error > exact / 16) & meant & seen).any():
        least, most = exact[exact > 0].min().item(), exact.max().item()
        raise ValueError(f"quantize: scale_dtype must hold scales of {least:.1e} to {most:.1e}, got {dtype}")
    return torch.where(scale > 0, scale, 1.0)


def _powers(scale: Tensor) -> Tensor:
    """2^(scale - 127) of e8m0 exponents; 255 is NaN."""
    return scale.view(torch.float8_e8m0fnu).float()


def _e2m1(nibbles: Tensor) -> Tensor:
    table = torch.tensor([*_E2M1, *(-v for v in _E2M1)], device=nibbles.device)
    return table[nibbles.int()]


def _nearest(w: Tensor, format: str) -> Tensor:
    """The nearest numbers of a format with scales in floating point, as they are stored."""
    top = _TOP[format]
    if format == "fp8":
        return w.clamp(-top, top).to(torch.float8_e4m3fn)
    if format == "int8":
        return w.round().clamp(-top, top).to(torch.int8)
    return _pack((w.round().clamp(-8, 7) + 8).to(torch.uint8))


def _nearest_e2m1(w: Tensor) -> Tensor:
    """The nibble of the nearest number; of two equally near, the one whose last bit is zero."""
    between = torch.tensor([(a + b) / 2 for a, b in pairwise(_E2M1)], device=w.device)
    low, high = torch.bucketize(w.abs(), between), torch.bucketize(w.abs(), between, right=True)
    code = torch.where(low % 2 == 0, low, high)
    return (code + 8 * (w < 0)).to(torch.uint8)


def _pack(nibbles: Tensor) -> Tensor:
    return nibbles[..., 0::2] | nibbles[..., 1::2] << 4
