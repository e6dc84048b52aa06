"""router_logits for few tokens in Triton: one launch, no matrix unit, weights read once per tile of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..chip import Chip
from ..launch import Launch, launch

MAX_TOKENS = 64  # beyond, matrix units pay


@dataclass(frozen=True)
class LogitsTile:
    """`tokens` x `experts` logits per program; a step takes `chunks` of 16 bytes of each row."""

    tokens: int
    experts: int
    chunks: int
    warps: int


def serves(x: Tensor) -> bool:
    return 0 < x.shape[0] <= MAX_TOKENS and x.dtype in (torch.float32, torch.bfloat16, torch.float16)


def choose_logits(tokens: int, experts: int, hidden: int, per_chunk: int, chip: Chip) -> LogitsTile:
    """One expert per program for one token, so that the experts spread over the chip; more of both where x, too, is
    read often. A program's threads lie along a row.

    >>> from headgate.kernels.chip import H200
    >>> choose_logits(1, 128, 2048, 8, H200)
    LogitsTile(tokens=1, experts=1, chunks=128, warps=4)
    """
    tile = min(4, triton.next_power_of_2(tokens))
    wide = 4
    while wide > 1 and -(-tokens // tile) * -(-experts // wide) < chip.processors:
        wide //= 2
    chunks = min(128, triton.next_power_of_2(-(-hidden // per_chunk)))
    return LogitsTile(tile, wide, chunks, max(1, chunks // 32))


@triton.jit
def logits_kernel(
    x, weight, bias, logits, T, E, stride_x, stride_w,
    D: tl.constexpr, BIAS: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, C: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """logits[t, e] = x[t] weight[e]^T + bias[e] for BT tokens and BE experts. Steps of C chunks of V columns; a chunk
    belongs to one thread, and chunks are summed when the loop has ended."""
    t, e = tl.program_id(1) * BT + tl.arange(0, BT), tl.program_id(0) * BE + tl.arange(0, BE)
    x_rows, w_rows = x + t.to(tl.int64)[:, None] * stride_x, weight + e.to(tl.int64)[:, None] * stride_w
    acc = tl.zeros((BT, BE, C), tl.float32)
    for first in tl.range(0, D, C * V, loop_unroll_factor=2):
        column = first + tl.arange(0, C * V)[None, :]
        ws = tl.load(w_rows + column, mask=(e < E)[:, None] & (column < D), other=0.0)
        xs = tl.load(x_rows + column, mask=(t < T)[:, None] & (column < D), other=0.0)
        xs, ws = tl.reshape(xs.to(tl.float32), (BT, 1, C, V)), tl.reshape(ws.to(tl.float32), (1, BE, C, V))
        acc += tl.sum(xs * ws, 3)
    out = tl.sum(acc, 2)
    if BIAS:
        out += tl.load(bias + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
    at = logits + t.to(tl.int64)[:, None] * E + e[None, :]
    tl.store(at, out, mask=(t < T)[:, None] & (e < E)[None, :])


def router_logits_on_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    chip: Chip,
    launch: Launch = launch,
    tile: LogitsTile | None = None,
) -> Tensor:
    """fp32 [T, E]; x and weight fp32, bf16 or fp16, see `serves`."""
    x = x if x.stride(1) == 1 else x.contiguous()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    (tokens, hidden), experts = x.shape, weight.shape[0]
    per_chunk = 16 // max(x.element_size(), weight.element_size())
    tile = tile or choose_logits(tokens, experts, hidden, per_chunk, chip)
    logits = x.new_empty(tokens, experts, dtype=torch.float32)
    launch(
        logits_kernel, grid=(-(-experts // tile.experts), -(-tokens // tile.tokens)), warps=tile.warps, stages=1,
        x=x, weight=weight, bias=logits if bias is None else bias.contiguous(), logits=logits, T=tokens, E=experts,
        stride_x=x.stride(0), stride_w=weight.stride(0), D=hidden, BIAS=bias is not None, BT=tile.tokens,
        BE=tile.experts, C=tile.chunks, V=per_chunk,
    )  # fmt: skip
    return logits
