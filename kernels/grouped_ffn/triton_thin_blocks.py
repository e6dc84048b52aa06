"""GGUF's blocks in the kernels for few rows: sums over a weight row, as row_sums of triton_thin.py.

A thread reads chunks of 16 bytes of numbers: 16 of "Q8_0", of the others 32 nibbles, of which the low halves are 16
neighbouring columns and the high ones as many, a little further. What it needs beside them (scales, more bits) it reads
itself, from the same cache lines.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..gguf_triton import (
    begin_of,
    half,
    is_aligned,
    number,
    piece_at,
    plain_scale,
    scale_and_minimum,
    shift_in_blocks,
    size_of,
    span_of,
    with_more_bits,
)


@triton.jit
def four_words(words, at, ok, FORMAT: tl.constexpr):
    """The 16 bytes from byte `at` on, as four int32; `words`, `at` and `ok` [N]."""
    if is_aligned(FORMAT):
        q = tl.arange(0, 4)[None, :]
        all_four = tl.load((words + at // 16 * 4)[:, None] + q, mask=ok[:, None], other=0).to(tl.int32, bitcast=True)
        even, uneven = tl.split(tl.reshape(all_four, (at.shape[0], 2, 2)))
        first, third = tl.split(even)
        second, fourth = tl.split(uneven)
        return first, second, third, fourth
    else:
        start, shift = words + (at >> 2), ((at & 3) * 8).to(tl.uint32)
        a, b = tl.load(start, mask=ok, other=0), tl.load(start + 1, mask=ok, other=0)
        c, d = tl.load(start + 2, mask=ok, other=0), tl.load(start + 3, mask=ok, other=0)
        e = tl.load(start + 4, mask=ok & (shift != 0), other=0)  # nothing of it, and it may not be there
        return _both(a, b, shift), _both(b, c, shift), _both(c, d, shift), _both(d, e, shift)


@triton.jit
def _both(low, high, shift):
    return ((low >> shift) | ((high << (24 - shift)) << 8)).to(tl.int32, bitcast=True)


@triton.jit
def _add_four(part, word, x, J: tl.constexpr, STEP: tl.constexpr, FORMAT: tl.constexpr):
    """part [BN, KP, C] + the sum of x's four columns [KP * C, 4] times numbers J, J + STEP, ... of a word."""
    even, uneven = tl.split(tl.reshape(x.to(tl.float32), (x.shape[0], 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(uneven)
    part += tl.reshape(first, (1, part.shape[1], part.shape[2])) * number(word, J, FORMAT)
    part += tl.reshape(second, (1, part.shape[1], part.shape[2])) * number(word, J + STEP, FORMAT)
    part += tl.reshape(third, (1, part.shape[1], part.shape[2])) * number(word, J + 2 * STEP, FORMAT)
    return part + tl.reshape(fourth, (1, part.shape[1], part.shape[2])) * number(word, J + 3 * STEP, FORMAT)


@triton.jit
def block_sums(
    x_rows, x_live, w, begin, w_live,
    LENGTH: tl.constexpr, FORMAT: tl.constexpr, BN: tl.constexpr, KP: tl.constexpr, C: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """[BN, KP] fp32: sum over LENGTH columns of x row k times weight row (n, k). For every chunk of a step, flat as in
    row_sums: where x's row begins and whether it is there [KP * C]; of `w` (uint8; see block_tile), the byte at which
    the weight row begins, and whether it is there [BN * KP * C]."""
    PER: tl.constexpr = 16 if FORMAT == "Q8_0" else 32
    if is_aligned(FORMAT):
        begin = begin // 16 * 16
    words, odd = w.to(tl.pointer_type(tl.uint32)) + (begin >> 2), (begin & 3).to(tl.int32)
    if is_aligned(FORMAT):
        odd = tl.zeros_like(odd)
    acc = tl.zeros((BN, KP, C), tl.float32)
    for first in tl.range(0, LENGTH // PER, C, loop_unroll_factor=UNROLL):
        chunk = first + tl.arange(0, BN * KP * C) % C
        x_chunk = first + tl.arange(0, KP * C) % C
        inside, x_inside = w_live & (chunk < LENGTH // PER), x_live & (x_chunk < LENGTH // PER)
        if FORMAT == "Q8_0":
            acc += _q8_sums(x_rows + x_chunk * 16, x_inside, words, odd, chunk, inside, FORMAT, BN, KP, C)
        else:
            SPAN: tl.constexpr = span_of(FORMAT)
            IN_RUN: tl.constexpr = SPAN // 16  # chunks
            x_at = x_rows + x_chunk // IN_RUN * (2 * SPAN) + x_chunk % IN_RUN * 16
            acc += _nibble_sums(x_at, x_inside, words, odd, chunk, inside, FORMAT, BN, KP, C)
    return tl.sum(acc, 2)


@triton.jit
def _q8_sums(
    x_at, x_inside, words, odd, chunk, inside, FORMAT: tl.constexpr, BN: tl.constexpr, KP: tl.constexpr, C: tl.constexpr
):
    """[BN, KP, C]: each chunk times its columns of x."""
    block = odd + chunk // 2 * size_of(FORMAT)
    first, second, third, fourth = four_words(words, block + 2 + chunk % 2 * 16, inside, FORMAT)
    part = tl.zeros((BN, KP, C), tl.float32)
    for q in tl.static_range(4):
        word = first if q == 0 else second if q == 1 else third if q == 2 else fourth
        x = tl.load(x_at[:, None] + (4 * q + tl.arange(0, 4))[None, :], mask=x_inside[:, None], other=0.0)
        part = _add_four(part, tl.reshape(word, (BN, KP, C)), x, 0, 1, FORMAT)
    return part * tl.reshape(plain_scale(words, block, inside, FORMAT), (BN, KP, C))


@triton.jit
def _nibble_sums(
    x_at, x_inside, words, odd, chunk, inside, FORMAT: tl.constexpr, BN: tl.constexpr, KP: tl.constexpr, C: tl.constexpr
):
    """[BN, KP, C]: each chunk times its columns of x, those of low halves and those of high ones, scales and minima
    included."""
    SPAN: tl.constexpr = span_of(FORMAT)
    MORE: tl.constexpr = FORMAT == "Q5_K" or FORMAT == "Q6_K"
    MINIMA: tl.constexpr = FORMAT == "Q4_K" or FORMAT == "Q5_K"
    FAR: tl.constexpr = 1 if FORMAT == "Q5_K" else 4  # places between the more bits of the two halves
    SHORT: tl.constexpr = size_of(FORMAT) < 100
    IN_BLOCK: tl.constexpr = 1 if SHORT else 8  # chunks
    block, r = odd + chunk // IN_BLOCK * size_of(FORMAT), chunk % IN_BLOCK
    first, second, third, fourth = four_words(words, block + begin_of(FORMAT) + 16 * r, inside, FORMAT)
    if FORMAT == "Q5_K":
        m1, m2, m3, m4 = four_words(words, block + 16 + r % 2 * 16, inside, FORMAT)
        bits = tl.reshape(r // 2 * 2, (BN, KP, C))
    elif FORMAT == "Q6_K":
        m1, m2, m3, m4 = four_words(words, block + 128 + r // 4 * 32 + r % 2 * 16, inside, FORMAT)
        bits = tl.reshape(r % 4 // 2 * 2, (BN, KP, C))
    low, high = tl.zeros((BN, KP, C), tl.float32), tl.zeros((BN, KP, C), tl.float32)
    x_low, x_high = tl.zeros((x_at.shape[0],), tl.float32), tl.zeros((x_at.shape[0],), tl.float32)
    for q in tl.static_range(4):
        word = tl.reshape(first if q == 0 else second if q == 1 else third if q == 2 else fourth, (BN, KP, C))
        at = x_at[:, None] + (4 * q + tl.arange(0, 4))[None, :]
        x, x_far = tl.load(at, mask=x_inside[:, None], other=0.0), tl.load(at + SPAN, mask=x_inside[:, None], other=0.0)
        if MORE:
            more = tl.reshape(m1 if q == 0 else m2 if q == 1 else m3 if q == 2 else m4, (BN, KP, C)) >> bits
            low = _add_four(low, with_more_bits(word, more, FORMAT), x, 0, 1, FORMAT)
            high = _add_four(high, with_more_bits(word >> 4, more >> FAR, FORMAT), x_far, 0, 1, FORMAT)
        else:
            low = _add_four(low, word, x, 0, 2, FORMAT)
            high = _add_four(high, word, x_far, 1, 2, FORMAT)
        if MINIMA:
            x_low += tl.sum(x.to(tl.float32), 1)
            x_high += tl.sum(x_far.to(tl.float32), 1)
    if SHORT:
        scale = plain_scale(words, block, inside, FORMAT)
        return (low + high) * shift_in_blocks(FORMAT) * tl.reshape(scale, (BN, KP, C))
    elif FORMAT == "Q6_K":
        d, at = half(piece_at(words, block + 208, inside)), block + 192 + r // 4 * 8 + r % 4
        one, two = _signed(piece_at(words, at, inside)), _signed(piece_at(words, at + 4, inside))
        return tl.reshape(d * one, (BN, KP, C)) * low + tl.reshape(d * two, (BN, KP, C)) * high
    else:
        h1, h2, h3, h4 = four_words(words, block, inside, FORMAT)
        one, less_one = scale_and_minimum(h1, h2, h3, h4, r // 2 * 2)
        two, less_two = scale_and_minimum(h1, h2, h3, h4, r // 2 * 2 + 1)
        low, high = tl.reshape(one, (BN, KP, C)) * low, tl.reshape(two, (BN, KP, C)) * high
        low -= tl.reshape(less_one, (BN, KP, C)) * tl.reshape(x_low, (1, KP, C))
        return low + (high - tl.reshape(less_two, (BN, KP, C)) * tl.reshape(x_high, (1, KP, C)))


@triton.jit
def _signed(piece):
    """fp32 of the lowest byte, which has a sign."""
    return ((piece << 24) >> 24).to(tl.float32)
