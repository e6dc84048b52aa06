"""Weights of few bits (quantized.py) in Triton: from stored words to numbers, in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from .gguf_triton import block_tile, in_blocks


@triton.jit
def element(word, J: tl.constexpr, FORMAT: tl.constexpr):
    """fp32 number J of a word, before its scale; fp8 comes 2^8 and mxfp4 2^14 times too small, for it is the number's
    bits placed in fp16's fields, subnormal numbers included. An fp8 NaN comes as a number: see `is_nan`."""
    if FORMAT == "fp8":
        bits = word >> (8 * J)
        return _fp16(((bits & 0x80) << 8) | ((bits & 0x7F) << 7))
    elif FORMAT == "mxfp4":
        bits = word >> (4 * J)
        return _fp16(((bits & 8) << 12) | ((bits & 7) << 9))
    elif FORMAT == "int4":  # the nibble as the last bits of 2^23
        return (((word >> (4 * J)) & 15) | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0
    elif FORMAT == "uint4":
        return (((word >> (4 * J)) & 15) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
    elif FORMAT == "int8":  # the last byte of what is shifted up, and down again with its sign
        return ((word << (24 - 8 * J)) >> 24).to(tl.float32)
    else:
        return word.to(tl.float32)


@triton.jit
def _fp16(bits):
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def is_nan(word):
    """Whether any of a word's fp8 numbers is NaN: 127 without its sign, the one code from which adding 1 carries."""
    return (((word & 0x7F7F7F7F) + 0x01010101) & -0x7F7F7F80) != 0


@triton.jit
def scale_of(s, FORMAT: tl.constexpr):
    """fp32 scale from what is stored, and what `element` leaves out."""
    if FORMAT == "mxfp4":
        bits = s.to(tl.int32)
        bits = tl.where(bits == 0, 0x00400000, tl.where(bits == 255, 0x7FC00000, bits << 23))
        return bits.to(tl.float32, bitcast=True)
    else:
        return s.to(tl.float32)


@triton.jit
def zeros_behind(columns, block):
    """How far the zero of a block of "uint4" lies behind its scale, in a row of so many weights."""
    return (columns + block - 1) // block


@triton.jit
def shift_of(FORMAT: tl.constexpr):
    """What `element` leaves out of a number, as a factor."""
    return 256.0 if FORMAT == "fp8" else (16384.0 if FORMAT == "mxfp4" else 1.0)


@triton.jit
def quantized_tile(
    w, s, e, o, i, o_end, i_end, stride_e, stride_o, stride_se, stride_so,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    FORMAT: tl.constexpr,
):  # fmt: skip
    """fp32 weights [ROWS, COLUMNS] of expert e from (o, i), zero from o_end and i_end on. `w` uint8, `s` the scales;
    BLOCK_ROWS x BLOCK_COLUMNS of them share one, and COLUMNS is a part or a multiple of BLOCK_COLUMNS."""
    if in_blocks(FORMAT):
        return block_tile(w, e, o, i, o_end, i_end, stride_e, stride_o, ROWS, COLUMNS, FORMAT)
    else:
        return _scaled_tile(
            w, s, e, o, i, o_end, i_end, stride_e, stride_o, stride_se, stride_so, ROWS, COLUMNS, BLOCK_ROWS,
            BLOCK_COLUMNS, FORMAT,
        )  # fmt: skip


@triton.jit
def _scaled_tile(
    w, s, e, o, i, o_end, i_end, stride_e, stride_o, stride_se, stride_so,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    FORMAT: tl.constexpr,
):  # fmt: skip
    """quantized_tile of formats whose scales lie beside the numbers."""
    PER: tl.constexpr = 1 if FORMAT == "fp8" or FORMAT == "int8" else 2
    # a block that is no power of two is all of a row (on_triton's caller sees to it): one scale, however short the row
    MANY: tl.constexpr = COLUMNS > BLOCK_COLUMNS and BLOCK_COLUMNS & (BLOCK_COLUMNS - 1) == 0
    GROUPS: tl.constexpr = COLUMNS // BLOCK_COLUMNS if MANY else 1
    row, byte = o + tl.arange(0, ROWS), i // PER + tl.arange(0, COLUMNS // PER)
    # counted in bytes, for only then is it known that neighbours are inside together: loads of many bytes, not of one
    inside = (row < o_end)[:, None] & (byte < i_end // PER)[None, :]
    at = w + e.to(tl.int64) * stride_e + row.to(tl.int64)[:, None] * stride_o + byte[None, :]
    NOTHING: tl.constexpr = 0x88 if FORMAT == "int4" else 0  # two numbers zero
    word = tl.load(at, mask=inside, other=NOTHING).to(tl.int32)
    if PER == 1:
        x = element(word, 0, FORMAT)
        if FORMAT == "fp8":
            x = tl.where((word & 127) == 127, float("nan"), x)
    else:
        x = tl.reshape(tl.join(element(word, 0, FORMAT), element(word, 1, FORMAT)), (ROWS, COLUMNS))
    group = i // BLOCK_COLUMNS + tl.arange(0, GROUPS)
    there = (row < o_end)[:, None] & (group * BLOCK_COLUMNS < i_end)[None, :]
    s_at = s + e.to(tl.int64) * stride_se + (row // BLOCK_ROWS).to(tl.int64)[:, None] * stride_so + group[None, :]
    scale = tl.where(there, scale_of(tl.load(s_at, mask=there, other=0), FORMAT), 0.0)
    # in this order, for the largest scales times the shift are infinite
    x = tl.reshape(x * shift_of(FORMAT), (ROWS, GROUPS, COLUMNS // GROUPS))
    if FORMAT == "uint4":
        x -= tl.load(s_at + zeros_behind(i_end, BLOCK_COLUMNS), mask=there, other=0).to(tl.float32)[:, :, None]
    return tl.reshape(x * scale[:, :, None], (ROWS, COLUMNS))
