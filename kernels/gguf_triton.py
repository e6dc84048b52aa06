"""GGUF's blocks (gguf_blocks.py) in Triton: from bytes as they lie in the file to numbers, in registers.

Blocks of 17, 18, 34 or 210 bytes begin anywhere, and a load must begin at a multiple of its size. So bytes are read as
the aligned words that hold them, two for each, and shifted into place: neighbouring threads read neighbouring words,
each byte comes from memory once, and a word is wide enough for the asynchronous copies of a loop's pipeline, which a
load of 1 or 2 bytes is not. An aligned word that holds a byte of a tensor may hold others, too; nothing is made of
those.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gguf_blocks import BLOCKS

# format: (byte at which a block's nibbles begin, weights in a run: so many low halves, then as many high ones)
_NIBBLES = {"Q4_0": (2, 16), "gguf_mxfp4": (1, 16), "Q4_K": (16, 32), "Q5_K": (48, 32), "Q6_K": (0, 64)}


def at_words(data: Tensor, format: str) -> Tensor:
    """Blocks [E, O, bytes of a row] as kernels read them: rows without gaps, the first at a multiple of 4 bytes, and
    every one at a multiple of 16 where the blocks are. Copied only where they are not so."""
    each = 16 if BLOCKS[format][1] % 16 == 0 else 1
    first = 0 if data.device.type == "meta" else data.data_ptr()
    there = data.stride(2) == 1 and first % max(4, each) == 0 and all(n % each == 0 for n in data.stride()[:2])
    return data if there else data.clone(memory_format=torch.contiguous_format)


@triton.constexpr_function
def in_blocks(format):
    """Whether a format keeps scales among its numbers."""
    return format in BLOCKS


@triton.constexpr_function
def size_of(format):
    """Bytes of a block."""
    return BLOCKS[format][1]


@triton.constexpr_function
def begin_of(format):
    """The byte at which a block's nibbles begin."""
    return _NIBBLES[format][0]


@triton.constexpr_function
def span_of(format):
    """Weights in a run of nibbles, and the columns between a byte's two."""
    return _NIBBLES[format][1]


@triton.constexpr_function
def is_aligned(format):
    """Whether blocks begin at multiples of 16 bytes where rows do."""
    return BLOCKS[format][1] % 16 == 0


@triton.jit
def number(word, J: tl.constexpr, FORMAT: tl.constexpr):
    """fp32 number J of a word, before its scale. "Q8_0": of four bytes with a sign; "Q4_0", "Q4_K" and "gguf_mxfp4": of
    eight nibbles, the last 2^15 times too small; "Q5_K" and "Q6_K": of four bytes as `with_more_bits` makes them."""
    if FORMAT == "Q8_0":
        return ((word << (24 - 8 * J)) >> 24).to(tl.float32)
    elif FORMAT == "gguf_mxfp4":  # its bits in fp16's fields, subnormal numbers included; twice the number is meant
        bits = word >> (4 * J)
        bits = ((bits & 8) << 12) | ((bits & 7) << 9)
        return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    elif FORMAT == "Q4_0":  # the nibble as the last bits of 2^23
        return _above((word >> (4 * J)) & 15) - 8388616.0
    elif FORMAT == "Q4_K":
        return _above((word >> (4 * J)) & 15) - 8388608.0
    elif FORMAT == "Q5_K":
        return _above((word >> (8 * J)) & 255) - 8388608.0
    else:
        return _above((word >> (8 * J)) & 255) - 8388640.0


@triton.jit
def _above(bits):
    return (bits | 0x4B000000).to(tl.float32, bitcast=True)


@triton.jit
def with_more_bits(word, more, FORMAT: tl.constexpr):
    """Four bytes, a number each, from the low halves of a word's bytes and the lowest bits of `more`'s."""
    MASK: tl.constexpr = 0x01010101 if FORMAT == "Q5_K" else 0x03030303
    return (word & 0x0F0F0F0F) | ((more & MASK) << 4)


@triton.jit
def word_at(words, at, q, ok, FORMAT: tl.constexpr):
    """int32: the four bytes from byte at + 4 q on, of what begins at `words`. `at` and q have shapes that go together;
    at is a multiple of 16 where the format's blocks are."""
    if is_aligned(FORMAT):
        return tl.load(words + (at // 16 * 4 + q), mask=ok, other=0).to(tl.int32, bitcast=True)
    else:
        first, shift = (at >> 2) + q, ((at & 3) * 8).to(tl.uint32)
        low = tl.load(words + first, mask=ok, other=0)
        high = tl.load(words + (first + 1), mask=ok & (shift != 0), other=0)  # nothing of it, and it may not be there
        return ((low >> shift) | ((high << (24 - shift)) << 8)).to(tl.int32, bitcast=True)


@triton.jit
def piece_at(words, at, ok):
    """int32 whose lowest bits are the byte at `at`, or the two from an even `at` on, of what begins at `words`."""
    return (tl.load(words + (at >> 2), mask=ok, other=0) >> ((at & 3) * 8).to(tl.uint32)).to(tl.int32, bitcast=True)


@triton.jit
def half(bits):
    """fp32 of the fp16 in the lower half."""
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _power(piece):
    """fp32 2^(e - 128) of the exponent e in the lowest byte, which has no code for NaN."""
    e = piece & 255
    return tl.where(e < 2, 0x00200000 << (e & 1), (e - 1) << 23).to(tl.float32, bitcast=True)


@triton.jit
def scale_and_minimum(first, second, third, fourth, sub):
    """fp32 scale and minimum of part `sub` (0 to 7) of a block of "Q4_K" or "Q5_K" with these first four words."""
    by = (sub & 3) * 8
    scale, minimum, more = second >> by, third >> by, fourth >> by
    late = sub > 3
    scale = tl.where(late, (more & 15) | ((scale >> 2) & 48), scale & 63)
    minimum = tl.where(late, ((more >> 4) & 15) | ((minimum >> 2) & 48), minimum & 63)
    return half(first) * scale.to(tl.float32), half(first >> 16) * minimum.to(tl.float32)


@triton.jit
def plain_scale(words, at, ok, FORMAT: tl.constexpr):
    """fp32 scale of the blocks that begin at byte `at`, for formats with one of each; with what `number` leaves out."""
    piece = piece_at(words, at, ok)
    if FORMAT == "gguf_mxfp4":
        return _power(piece)
    else:
        return half(piece)


@triton.jit
def shift_in_blocks(FORMAT: tl.constexpr):
    """What `number` leaves out, as a factor."""
    return 32768.0 if FORMAT == "gguf_mxfp4" else 1.0


@triton.jit
def block_tile(
    w, e, o, i, o_end, i_end, stride_e, stride_o, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FORMAT: tl.constexpr
):
    """fp32 weights [ROWS, COLUMNS] of expert e from (o, i), zero from o_end and i_end on. `w` uint8 at a multiple of 4
    bytes (16 where blocks are), strides in bytes, i a multiple of COLUMNS, which is a power of 2 from 32 to 256."""
    PER: tl.constexpr = 16 if FORMAT == "Q6_K" else 32  # weights of a scale
    SIZE: tl.constexpr = size_of(FORMAT)
    SHORT: tl.constexpr = SIZE < 100  # blocks of 32 weights; of 256, a row of a tile is in one
    row = o + tl.arange(0, ROWS)
    begin = e.to(tl.int64) * stride_e + row.to(tl.int64) * stride_o
    if is_aligned(FORMAT):
        begin = begin // 16 * 16
    words = (w.to(tl.pointer_type(tl.uint32)) + (begin >> 2))[:, None]
    odd = (begin & 3).to(tl.int32)[:, None]  # where the row begins in its first word
    there = (row < o_end)[:, None]
    if is_aligned(FORMAT):
        odd = tl.zeros_like(odd)
    block = odd + (i // 256) * SIZE  # where the block begins, of the long ones
    group = i // PER + tl.arange(0, COLUMNS // PER)[None, :]
    inside = there & (group * PER < i_end)
    if SHORT:
        scale = plain_scale(words, odd + group * SIZE, inside, FORMAT)
    elif FORMAT == "Q6_K":
        scale = half(piece_at(words, block + 208 + 0 * group, inside))
        # shifted up, and down again with its sign
        scale *= ((piece_at(words, block + 192 + group % 16, inside) << 24) >> 24).to(tl.float32)
    else:
        head = tl.load(
            words[:, :, None] + ((block // 16 * 4 + 0 * group)[:, :, None] + tl.arange(0, 4)[None, None, :]),
            mask=inside[:, :, None], other=0,
        ).to(tl.int32, bitcast=True)  # fmt: skip
        even, uneven = tl.split(tl.reshape(head, (ROWS, COLUMNS // PER, 2, 2)))
        first, third = tl.split(even)
        second, fourth = tl.split(uneven)
        scale, minimum = scale_and_minimum(first, second, third, fourth, group % 8)
    x = _numbers(words, odd, block, there, i, i_end, ROWS, COLUMNS, FORMAT) * shift_in_blocks(FORMAT)
    x = tl.reshape(x, (ROWS, COLUMNS // PER, PER)) * scale[:, :, None]
    if FORMAT == "Q4_K" or FORMAT == "Q5_K":
        x -= minimum[:, :, None]
    return tl.reshape(x, (ROWS, COLUMNS))


@triton.jit
def _numbers(words, odd, block, there, i, i_end, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FORMAT: tl.constexpr):
    """`number` of block_tile's weights."""
    SIZE: tl.constexpr = size_of(FORMAT)
    if FORMAT == "Q8_0":
        m = tl.arange(0, COLUMNS // 4)[None, :]
        number_of_block = i // 32 + m // 8
        word = word_at(words, odd + number_of_block * SIZE + 2, m % 8, there & (number_of_block * 32 < i_end), FORMAT)
        return _four(word, 0, 1, FORMAT)
    else:
        SPAN: tl.constexpr = span_of(FORMAT)
        BOTH: tl.constexpr = COLUMNS >= 2 * SPAN  # whether a tile has the high halves of its bytes, too
        m = tl.arange(0, COLUMNS // 8 if BOTH else COLUMNS // 4)[None, :]
        if SIZE < 100:
            number_of_block = i // 32 + m // 4
            inside = there & (number_of_block * 32 < i_end)
            word = word_at(words, odd + number_of_block * SIZE + begin_of(FORMAT), m % 4, inside, FORMAT)
        else:
            inside = there & (i + 0 * m < i_end)
            first = (i % 256) // (2 * SPAN) * SPAN + i % SPAN  # of the bytes of nibbles
            word = word_at(words, block + begin_of(FORMAT) + first, m, inside, FORMAT)
        if not BOTH:
            word = word >> (i // SPAN % 2 * 4)
        low, high = word, word >> 4
        if FORMAT == "Q5_K" or FORMAT == "Q6_K":
            # the column of a word's first low half (where not BOTH: of its first number) in its block
            column = i % 256 + 4 * m
            if BOTH:
                column += m // (SPAN // 4) * SPAN
            part, q = column // 32, column % 32 // 4
            if FORMAT == "Q5_K":
                more = word_at(words, block + 16, q, inside, FORMAT) >> part
            else:
                more = word_at(words, block + 128 + part // 4 * 32, q, inside, FORMAT) >> (part % 4 * 2)
            low = with_more_bits(low, more, FORMAT)
            high = with_more_bits(high, more >> (SPAN // 32 * (1 if FORMAT == "Q5_K" else 2)), FORMAT)
            FIRST: tl.constexpr = 0
            STEP: tl.constexpr = 1
        else:
            FIRST: tl.constexpr = 1  # type: ignore[no-redef]
            STEP: tl.constexpr = 2  # type: ignore[no-redef]
            high = word
        x = _four(low, 0, STEP, FORMAT)
        if BOTH:
            RUNS: tl.constexpr = COLUMNS // (2 * SPAN)
            y = tl.reshape(_four(high, FIRST, STEP, FORMAT), (ROWS, RUNS, SPAN))
            x = tl.permute(tl.join(tl.reshape(x, (ROWS, RUNS, SPAN)), y), (0, 1, 3, 2))
        return tl.reshape(x, (ROWS, COLUMNS))


@triton.jit
def _four(word, J: tl.constexpr, STEP: tl.constexpr, FORMAT: tl.constexpr):
    """[rows, 4 * words]: numbers J, J + STEP and two more of each word."""
    even = tl.join(number(word, J, FORMAT), number(word, J + 2 * STEP, FORMAT))
    uneven = tl.join(number(word, J + STEP, FORMAT), number(word, J + 3 * STEP, FORMAT))
    return tl.reshape(tl.join(even, uneven), (word.shape[0], 4 * word.shape[1]))
