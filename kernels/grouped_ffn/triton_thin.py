"""The kernels of grouped_ffn for few rows, where all that counts is to read the weights once, at the memory's rate.

No order of pairs is made and no matrix unit is used: a program multiplies some weight rows with a row of x in fp32.
Weights arrive 16 bytes per thread. A tile of them is [BN rows, KP experts, C chunks, Q words]: a chunk's words
belong to one thread and to one scale, so that a chunk is summed in registers, then multiplied by its scale, and the
chunks are summed when the loop has ended. A word holds P elements: one of a floating type, or 4 fp8 or int8, or 8
nibbles of an int32 (of a byte, where rows are not made of whole 16 bytes: 1 or 2). Q is 4 for all but the floating
types.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..activation_triton import GATED, activate
from ..gguf_triton import in_blocks
from ..quantized_triton import element, is_nan, scale_of, shift_of, zeros_behind
from .triton_thin_blocks import block_sums


@triton.jit
def _dot(part, word, x, J: tl.constexpr, STEP: tl.constexpr, P: tl.constexpr, FORMAT: tl.constexpr):
    """part + sum of x's P columns times numbers J, J + STEP, ... of a word."""
    if P == 1:
        return part + tl.reshape(x, (1, part.shape[1], part.shape[2])).to(tl.float32) * element(word, J, FORMAT)
    else:
        HALF: tl.constexpr = P // 2
        NEXT: tl.constexpr = J + STEP
        TWICE: tl.constexpr = 2 * STEP
        even, odd = tl.split(tl.reshape(x, (part.shape[1] * part.shape[2], HALF, 2)))
        part = _dot(part, word, even, J, TWICE, HALF, FORMAT)
        return _dot(part, word, odd, NEXT, TWICE, HALF, FORMAT)


@triton.jit
def _chunk_sums(
    w, zero, x_rows, x_live, column,
    LENGTH: tl.constexpr, FORMAT: tl.constexpr, BN: tl.constexpr, KP: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """[BN, KP, C]: each chunk of four words w [BN * KP, C * 4] times its 4 P columns of x, from `column` on; `zero`
    [BN, KP, C] is taken from the numbers of "uint4" before; x_rows, x_live and column are [KP * C]. A word meets its P
    columns as they are loaded: nothing moves between threads."""
    part, x_sum = tl.zeros((BN, KP, C), tl.float32), tl.zeros((KP * C,), tl.float32)
    even, odd = tl.split(tl.reshape(w.to(tl.int32), (BN, KP, C, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    for q in tl.static_range(4):
        at = column[:, None] + q * P + tl.arange(0, P)[None, :]
        inside = (column < LENGTH)[:, None] if LENGTH % (4 * P) == 0 else at < LENGTH
        x = tl.load(x_rows[:, None] + at, mask=x_live[:, None] & inside, other=0.0)
        word = first if q == 0 else second if q == 1 else third if q == 2 else fourth
        part = _dot(part, word, x, 0, 1, P, FORMAT)
        if FORMAT == "uint4":
            x_sum += tl.sum(x.to(tl.float32), 1)
    if FORMAT == "uint4":
        part -= zero * tl.reshape(x_sum, (1, KP, C))
    if FORMAT == "fp8":
        bad = is_nan(first) | is_nan(second) | is_nan(third) | is_nan(fourth)
        part = tl.where(bad, float("nan"), part)
    return part


@triton.jit
def row_sums(
    x_rows, x_live, x_chunk, x_chunk_live, w_rows, w_live, s_rows, s_live,
    LENGTH: tl.constexpr, GROUP: tl.constexpr, FORMAT: tl.constexpr, BN: tl.constexpr, KP: tl.constexpr,
    C: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """[BN, KP] fp32: sum over LENGTH columns of x row k times weight row (n, k); GROUP columns have one scale.

    Where rows begin, and whether they are there: of x, x_rows [KP] and once more for each chunk [KP * C]; of weights,
    w_rows [BN * KP]; of scales, s_rows [BN * KP * C]. All are flat, because then every compiler puts neighbouring
    threads on neighbouring chunks of a row, and loads of the three meet in one thread.
    """
    CHUNK: tl.constexpr = Q * P
    WHOLE: tl.constexpr = LENGTH % CHUNK == 0
    acc = tl.zeros((BN, KP, C), tl.float32)
    words, word_chunk = tl.arange(0, C * Q), tl.arange(0, C * Q) // Q
    for first in tl.range(0, LENGTH, C * CHUNK, loop_unroll_factor=UNROLL):
        word = first // P + words
        there = first + word_chunk * CHUNK < LENGTH if WHOLE else word * P < LENGTH  # whole chunks keep loads whole
        w = tl.load(w_rows[:, None] + word[None, :], mask=w_live[:, None] & there[None, :], other=0)
        if FORMAT == "none":
            x = tl.load(x_rows[:, None] + word[None, :], mask=x_live[:, None] & there[None, :], other=0.0)
            w, x = tl.reshape(w, (BN, KP, C, Q)), tl.reshape(x, (1, KP, C, Q))
            acc += tl.sum(w.to(tl.float32) * x.to(tl.float32), 3)
        else:
            at_scale = first + (tl.arange(0, BN * KP * C) % C) * CHUNK
            s_in = s_live & (at_scale < LENGTH)
            s = tl.load(s_rows + at_scale // GROUP, mask=s_in, other=0)
            column = first + (tl.arange(0, KP * C) % C) * CHUNK
            zero = tl.zeros((BN, KP, C), tl.float32)
            if FORMAT == "uint4":
                z = tl.load(s_rows + (at_scale // GROUP + zeros_behind(LENGTH, GROUP)), mask=s_in, other=0)
                zero = tl.reshape(z.to(tl.float32), (BN, KP, C))
            part = _chunk_sums(w, zero, x_chunk, x_chunk_live, column, LENGTH, FORMAT, BN, KP, C, P)
            s, s_in = tl.reshape(scale_of(s, FORMAT), (BN, KP, C)), tl.reshape(s_in, (BN, KP, C))
            acc += tl.where(s_in, (part * shift_of(FORMAT)) * s, 0.0)
    return tl.sum(acc, 2)


@triton.jit
def column_sums(
    x_rows, x_live, w_columns, in_range, stride_in,
    LENGTH: tl.constexpr, BO: tl.constexpr, KP: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """[BO, KP] fp32, as row_sums, of weights whose output columns are contiguous and inputs `stride_in` apart. x_rows
    and x_live [KP * BK], w_columns [KP * BK, BO] at input 0, in_range [BO]. STAGES steps are under way at
    once, to shared memory: a thread sums several columns, so its registers hold few loads."""
    acc = tl.zeros((KP * BK, BO), tl.float32)
    ks = tl.arange(0, KP * BK) % BK
    for first in tl.range(0, LENGTH, BK, num_stages=STAGES):
        k = first + ks
        inside = x_live & (k < LENGTH)
        at = w_columns + k.to(tl.int64)[:, None] * stride_in
        w = tl.load(at, mask=inside[:, None] & in_range[None, :], other=0.0)
        x = tl.load(x_rows + k, mask=inside, other=0.0)
        acc += w.to(tl.float32) * x.to(tl.float32)[:, None]
    return tl.trans(tl.sum(tl.reshape(acc, (KP, BK, BO)), 1))


@triton.jit
def _up_row(i, first, F, LAYOUT: tl.constexpr, BF: tl.constexpr):
    """(weight row, whether it is there, whether it is in the second tensor of a pair) of row i of a tile."""
    if LAYOUT == "interleaved":
        row = 2 * first + i
        return row, row < 2 * F, row < 0
    else:
        f = first + i % BF
        row = f + (i // BF) * F if LAYOUT == "halves" else f
        return row, f < F, i >= BF


@triton.jit
def thin_up_kernel(
    x, w, w_second, s, s_second, bias, expert_ids, a,
    E, F, stride_x, stride_e, stride_out, stride_in, stride_se, stride_so,
    UNIT: tl.constexpr, TOP_K: tl.constexpr, FORM: tl.constexpr, LAYOUT: tl.constexpr, BIAS: tl.constexpr,
    LENGTH: tl.constexpr, ROWS_PER_SCALE: tl.constexpr, GROUP: tl.constexpr, FORMAT: tl.constexpr, BF: tl.constexpr,
    C: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """a[pair, f] = act(x[t] W1_e^T + b1_e) for BF values f of one (token, k) pair; nothing for one without an expert.

    Strides are in units of UNIT elements. LAYOUT says where the up projection's rows are: "interleaved" behind each
    gate row, "halves" F rows further, "pair" in w_second, "single" nowhere. Q 0: the weights' output columns are
    contiguous, and a step takes C inputs (see column_sums).
    """
    pair, first = tl.program_id(1), tl.program_id(0) * BF
    e = tl.load(expert_ids + pair).to(tl.int64)
    if (e >= 0) & (e < E):
        ROWS: tl.constexpr = 2 * BF if FORM[GATED] else BF
        row, inside, second = _up_row(tl.arange(0, ROWS), first, F, LAYOUT, BF)
        x_row, e_at = x + (pair // TOP_K).to(tl.int64) * stride_x, e * stride_e * UNIT
        if LAYOUT == "pair":
            base = tl.where(second, w_second, w)
            if UNIT > 1:  # the choice between two pointers loses what is known of both
                base = tl.multiple_of(base, 16)
        else:
            base = w
        if in_blocks(FORMAT):
            c_row, c_in, c_second = _up_row(tl.arange(0, ROWS * C) // C, first, F, LAYOUT, BF)
            c_base = tl.multiple_of(tl.where(c_second, w_second, w), 4 * UNIT) if LAYOUT == "pair" else w
            h = block_sums(
                x_row + tl.zeros((C,), tl.int32), tl.full((C,), 1, tl.int1),
                c_base, e_at + c_row.to(tl.int64) * (stride_out * UNIT), c_in, LENGTH, FORMAT, ROWS, 1, C, UNROLL,
            )  # fmt: skip
        elif Q > 0:
            s_row, s_in, s_second_half = _up_row(tl.arange(0, ROWS * C) // C, first, F, LAYOUT, BF)
            s_base = tl.where(s_second_half, s_second, s) if LAYOUT == "pair" else s
            h = row_sums(
                x_row + tl.zeros((1,), tl.int32), tl.full((1,), 1, tl.int1),
                x_row + tl.zeros((C,), tl.int32), tl.full((C,), 1, tl.int1),
                base + e_at + row.to(tl.int64) * (stride_out * UNIT), inside,
                s_base + e * stride_se + (s_row // ROWS_PER_SCALE).to(tl.int64) * stride_so, s_in,
                LENGTH, GROUP, FORMAT, ROWS, 1, C, Q, P, UNROLL,
            )  # fmt: skip
        else:
            w_columns = (base + e_at + row)[None, :]
            if LAYOUT == "pair" and UNIT > 1:
                w_columns = tl.max_contiguous(tl.multiple_of(w_columns, (1, 16)), (1, UNIT))
            h = column_sums(
                x_row + tl.zeros((C,), tl.int32), tl.full((C,), 1, tl.int1), w_columns, inside, stride_in * UNIT,
                LENGTH, ROWS, 1, C, UNROLL,
            )  # fmt: skip
        h = tl.reshape(h, (ROWS,))
        if BIAS:
            width = 2 * F if FORM[GATED] else F
            h += tl.load(bias + e * width + row, mask=inside, other=0.0).to(tl.float32)
        if LAYOUT == "interleaved":
            g, u = tl.split(tl.reshape(h, (BF, 2)))
        elif FORM[GATED]:
            g, u = tl.split(tl.trans(tl.reshape(h, (2, BF))))
        else:
            g, u = h, h
        at = first + tl.arange(0, BF)
        tl.store(a + pair.to(tl.int64) * F + at, activate(g, u, FORM).to(a.dtype.element_ty), mask=at < F)


@triton.jit
def thin_down_kernel(
    a, w, s, bias, expert_ids, weights, y,
    E, WIDTH, stride_e, stride_out, stride_in, stride_se, stride_so,
    UNIT: tl.constexpr, TOP_K: tl.constexpr, KP: tl.constexpr, BIAS: tl.constexpr, LENGTH: tl.constexpr,
    ROWS_PER_SCALE: tl.constexpr, GROUP: tl.constexpr, FORMAT: tl.constexpr, BN: tl.constexpr, C: tl.constexpr,
    Q: tl.constexpr, P: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """y[t, n] = sum_k weights[t, k] * (a[t, k] W2_e^T + b2_e) for BN columns n of one token, all its experts at once.
    KP is TOP_K's next power of two. A pair without an expert is not read."""
    t, first = tl.program_id(1), tl.program_id(0) * BN
    ks = tl.arange(0, KP)
    e, live = _expert(expert_ids, t, ks, E, TOP_K)
    part = tl.load(weights + t.to(tl.int64) * TOP_K + ks, mask=live, other=0.0).to(tl.float32)
    a_token = a + t.to(tl.int64) * TOP_K * LENGTH
    n = first + tl.arange(0, BN)
    if in_blocks(FORMAT):
        j, rc = tl.arange(0, KP * C) // C, tl.arange(0, BN * KP * C) // C
        e_row, row_live = _expert(expert_ids, t, rc % KP, E, TOP_K)
        _, chunk_live = _expert(expert_ids, t, j, E, TOP_K)
        n_row = first + rc // KP
        out = block_sums(
            a_token + j * LENGTH, chunk_live,
            w, e_row * (stride_e * UNIT) + n_row.to(tl.int64) * (stride_out * UNIT), row_live & (n_row < WIDTH),
            LENGTH, FORMAT, BN, KP, C, UNROLL,
        )  # fmt: skip
    elif Q > 0:
        r, j, rs = tl.arange(0, BN * KP), tl.arange(0, KP * C) // C, tl.arange(0, BN * KP * C) // C
        e_row, row_live = _expert(expert_ids, t, r % KP, E, TOP_K)
        _, chunk_live = _expert(expert_ids, t, j, E, TOP_K)
        n_row, n_scale = first + r // KP, first + rs // KP
        s_at, s_live = s + tl.zeros((BN * KP * C,), tl.int64), rs < 0
        if FORMAT != "none":
            e_scale, s_live = _expert(expert_ids, t, rs % KP, E, TOP_K)
            s_at += e_scale * stride_se + (n_scale // ROWS_PER_SCALE).to(tl.int64) * stride_so
        out = row_sums(
            a_token + ks * LENGTH, live, a_token + j * LENGTH, chunk_live,
            w + e_row * (stride_e * UNIT) + n_row.to(tl.int64) * (stride_out * UNIT), row_live & (n_row < WIDTH),
            s_at, s_live & (n_scale < WIDTH),
            LENGTH, GROUP, FORMAT, BN, KP, C, Q, P, UNROLL,
        )  # fmt: skip
    else:
        k = tl.arange(0, KP * C) // C
        e_row, row_live = _expert(expert_ids, t, k, E, TOP_K)
        w_columns = w + (e_row * (stride_e * UNIT))[:, None] + n[None, :]
        out = column_sums(
            a_token + k * LENGTH, row_live, w_columns, n < WIDTH, stride_in * UNIT, LENGTH, BN, KP, C, UNROLL
        )
    if BIAS:
        there = (n < WIDTH)[:, None] & live[None, :]
        out += tl.load(bias + e[None, :] * WIDTH + n[:, None], mask=there, other=0.0).to(tl.float32)
    y_row = y + t.to(tl.int64) * WIDTH + n
    tl.store(y_row, tl.sum(out * part[None, :], 1).to(y.dtype.element_ty), mask=n < WIDTH)


@triton.jit
def _expert(expert_ids, t, k, E, TOP_K: tl.constexpr):
    """(expert as int64, whether there is one) of pairs (t, k)."""
    e = tl.load(expert_ids + t.to(tl.int64) * TOP_K + k, mask=k < TOP_K, other=-1).to(tl.int64)
    live = (e >= 0) & (e < E)
    return tl.where(live, e, 0), live
