"""topk in Triton: from the logits to weights, scores, ids and counts in one kernel.

A row of scores is held by one warp (where few tokens are all one program's, by a few), and its K best are taken one by
one. Each score becomes an integer of the same order, so that a maximum and the first place that has it are two integer
reductions, for which the chip has an instruction; NaN ranks as -inf, and whatever the logits are, the ids are K
different ones.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Launch, launch
from .reference import EPS, best_of

__all__ = ["topk_on_triton", "why_not_served"]

MOST_EXPERTS, MOST_CHOICES = 1024, 32
_PROGRAMS = 2048  # at most; each takes several blocks of rows, so that they meet seldom at the counts
_NOT_THERE = tl.constexpr(-(2**31))  # below every score: taken, or past the last expert
_CUT = tl.constexpr(-(2**31) + 1)  # an expert outside the best groups


@triton.jit
def _ordered(x):
    """fp32 as int32 of the same order; -0.0 equals 0.0, NaN equals -inf."""
    x = tl.where(x == x, x, float("-inf"))
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _score(x, peak, share, SCORE: tl.constexpr):
    """The score of fp32 logits x; for softmax, `peak` is the row's greatest and `share` one over the sum."""
    if SCORE == "sigmoid":
        return 1 / (1 + tl.exp(-x))
    elif SCORE == "sqrtsoftplus":
        # log(1 + exp(x)) = max(x, 0) + log(1 + e), e = exp(-|x|), and log(1 + e) = 2 atanh(z), z = e / (2 + e) <= 1/3:
        # a series, as the chip's logarithm keeps no digits near 1
        e = tl.exp(-tl.abs(x))
        z = e / (2 + e)
        y = z * z
        s = 1 + y * (1 / 3 + y * (1 / 5 + y * (1 / 7 + y * (1 / 9 + y * (1 / 11 + y * (1 / 13 + y * (1 / 15)))))))
        return tl.sqrt(tl.maximum(x, 0.0) + 2 * z * s)
    else:
        return tl.exp(x - peak) * share


@triton.jit
def _take(key, column, WIDTH: tl.constexpr):
    """The first column of each row's greatest key [BT], and the keys [BT, WIDTH] without it."""
    best = tl.max(key, 1)
    first = tl.min(tl.where(key == best[:, None], column[None, :], WIDTH - 1), 1)
    return first, tl.where(column[None, :] == first[:, None], _NOT_THERE, key)


@triton.jit
def _cut_to_groups(
    key, choice, real, BT: tl.constexpr, GROUPS: tl.constexpr, GP: tl.constexpr, SP: tl.constexpr,
    TOPK_GROUPS: tl.constexpr, BEST: tl.constexpr,
):  # fmt: skip
    """`key` [BT, GP * SP] with `_CUT` at the experts outside the best groups."""
    choice = tl.reshape(tl.where(real & (choice == choice), choice, float("-inf")), (BT, GP, SP))
    best = tl.max(choice, 2)
    value = best
    j = tl.arange(0, SP)[None, None, :]
    for _ in range(BEST - 1):
        first = tl.min(tl.where(choice == best[:, :, None], j, SP - 1), 2)
        choice = tl.where(j == first[:, :, None], float("-inf"), choice)
        best = tl.max(choice, 2)
        value += best
    g = tl.arange(0, GP)
    rank = tl.where(g[None, :] < GROUPS, _ordered(value), _NOT_THERE)
    for _ in range(TOPK_GROUPS):
        _first, rank = _take(rank, g, GP)
    inside = tl.broadcast_to((rank == _NOT_THERE)[:, :, None], (BT, GP, SP))
    return tl.where(tl.reshape(inside, (BT, GP * SP)), key, _CUT)  # K experts or more are inside, so no _CUT is taken


@triton.jit(do_not_specialize=["T", "blocks"])  # one build for many numbers of tokens
def _topk(
    logits, bias, weights, scores, ids, counts, T, blocks, stride_t, stride_e, stride_bias, scale,
    E: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BT: tl.constexpr,
    GROUPS: tl.constexpr, GP: tl.constexpr, SP: tl.constexpr, TOPK_GROUPS: tl.constexpr, BEST: tl.constexpr,
    SCORE: tl.constexpr, RENORMALIZE: tl.constexpr, EPS: tl.constexpr, BIAS: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    """Chooses for every `num_programs`-th block of BT rows. Columns are GP groups of SP, both padded; an expert has
    the same order among the columns as among the experts."""
    SIZE: tl.constexpr = E // GROUPS
    column = tl.arange(0, GP * SP)
    e = column if SIZE == SP else column // SP * SIZE + column % SP
    there = (column // SP < GROUPS) & (column % SP < SIZE)
    k = tl.arange(0, KP)[None, :]
    chosen = tl.zeros((BT, GP * SP), tl.int32)
    if BIAS:
        shift = tl.load(bias + e * stride_bias, mask=there, other=0.0).to(tl.float32)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        t = (block + tl.zeros((BT,), tl.int64)) * BT + tl.arange(0, BT)
        row = logits + t[:, None] * stride_t
        real = (t < T)[:, None] & there[None, :]
        x = tl.load(row + e[None, :].to(tl.int64) * stride_e, mask=real, other=float("-inf")).to(tl.float32)
        if SCORE == "sigmoid" or SCORE == "sqrtsoftplus":
            peak, share = 0.0, 0.0
        else:
            peak = tl.max(x, 1)[:, None]
            share = 1 / tl.sum(tl.exp(x - peak), 1)[:, None]
        s = _score(x, peak, share, SCORE)
        tl.store(scores + t[:, None] * E + e[None, :], s, mask=real)
        choice = x if SCORE == "topk_softmax" else s
        if BIAS:
            choice += shift[None, :]
        key = tl.where(real, _ordered(choice), _NOT_THERE)
        if TOPK_GROUPS < GROUPS:
            key = _cut_to_groups(key, choice, real, BT, GROUPS, GP, SP, TOPK_GROUPS, BEST)
        place = tl.zeros((BT, KP), tl.int32)
        for i in range(K):
            first, key = _take(key, column, GP * SP)
            place = tl.where(k == i, first[:, None], place)
        chosen += (real & (key == _NOT_THERE)).to(tl.int32)
        id = place if SIZE == SP else place // SP * SIZE + place % SP
        given = (t < T)[:, None] & (k < K)
        x = tl.load(row + id.to(tl.int64) * stride_e, mask=given, other=float("-inf")).to(tl.float32)
        if SCORE == "topk_softmax":
            w = tl.exp(x - tl.max(x, 1)[:, None])
            w /= tl.sum(w, 1)[:, None]
        else:
            w = tl.where(given, _score(x, peak, share, SCORE), 0.0)
            if RENORMALIZE:
                w /= tl.sum(w, 1)[:, None] + EPS
        tl.store(weights + t[:, None] * K + k, w * scale, mask=given)
        tl.store(ids + t[:, None] * K + k, id, mask=given)
    total = tl.sum(chosen, 0)
    if ALONE:
        tl.store(counts + e, total, mask=there)
    else:
        tl.atomic_add(counts + e, total, mask=there & (total > 0), sem="relaxed")  # integers: no order decides


def why_not_served(logits: Tensor, k: int, bias: Tensor | None) -> str | None:
    """What the kernel cannot do of this, or None."""
    if logits.shape[1] > MOST_EXPERTS:
        return f"logits must have at most {MOST_EXPERTS} experts for the Triton kernel, got {logits.shape[1]}"
    if k > MOST_CHOICES:
        return f"top_k must be at most {MOST_CHOICES} for the Triton kernel, got {k}"
    for name, t in (("logits", logits), ("bias", bias)):
        if t is not None and t.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"{name} must be fp32, bf16 or fp16 for the Triton kernel, got {t.dtype}"
    return None


def topk_on_triton(
    logits: Tensor,
    k: int,
    bias: Tensor | None,
    score: str,
    groups: int,
    topk_groups: int,
    group_score: str | int,
    renormalize: bool,
    scale: float,
    *,
    launch: Launch = launch,
    _rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(weights, scores, ids, counts) of fp32, bf16 or fp16 `logits` [T, E]; see `topk`. `_rows` of a block: for tests.

    Few tokens are one launch; for more, the counts are zeroed before.
    """
    tokens, experts = logits.shape
    if topk_groups == groups:
        groups = topk_groups = 1
    group_columns = triton.next_power_of_2(groups)
    per_group = max(8 // group_columns, triton.next_power_of_2(experts // groups), 1)
    rows, warps, alone = _cut(tokens, group_columns * per_group)
    if _rows is not None:
        rows, alone = _rows, tokens <= _rows
    weights, scores = (logits.new_empty(tokens, n, dtype=torch.float32) for n in (k, experts))
    ids = logits.new_empty(tokens, k, dtype=torch.int32)
    counts = logits.new_empty(experts, dtype=torch.int32)
    if not alone or tokens == 0:
        counts.zero_()
    blocks = triton.cdiv(tokens, rows)
    launch(
        _topk, (min(blocks, _PROGRAMS),), warps=warps, stages=1,
        logits=logits, bias=logits if bias is None else bias, weights=weights, scores=scores, ids=ids, counts=counts,
        T=tokens, blocks=blocks, stride_t=logits.stride(0), stride_e=logits.stride(1),
        stride_bias=0 if bias is None else bias.stride(0), scale=float(scale),
        E=experts, K=k, KP=triton.next_power_of_2(k), BT=rows,
        GROUPS=groups, GP=group_columns, SP=per_group, TOPK_GROUPS=topk_groups, BEST=best_of(group_score),
        SCORE=score, RENORMALIZE=renormalize, EPS=EPS, BIAS=bias is not None, ALONE=alone,
    )  # fmt: skip
    return weights, scores, ids, counts


def _cut(tokens: int, columns: int) -> tuple[int, int, bool]:
    """(rows of a block, warps of a program, whether one program takes all) for rows of `columns` scores.

    One program that takes all needs no zeroed counts: worth it as long as their warps hold the scores in registers.
    """
    all_rows = triton.next_power_of_2(max(tokens, 1))
    if all_rows * columns <= 8192:
        return all_rows, max(1, min(16 if columns > 64 else 8, all_rows * columns // 128, all_rows)), True
    return max(1, 512 // columns), max(1, columns // 512), False
