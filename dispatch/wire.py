"""What a row looks like between two ranks: number formats, and how a row and what belongs to it become one message.

| format | bytes of a row | largest error of an element a of a row whose largest magnitude is m |
|---|---|---|
| exact | D * size of its dtype | 0 |
| bf16 | 2 D | 2^-8 abs(a) (2^-134 where that is more) |
| fp8 | D + 4 | the larger of 2^-4 abs(a) and 2^-10 s, with s = m / 448 (at least 2^-126) |
| int8 | D + 4 | s / 2, with s = m / 127 (at least 2^-126) |

fp8 is e4m3 with one fp32 scale s per row, int8 is symmetric with one too. A row that holds an Inf or a NaN arrives as
NaN altogether, in fp8 and in int8: an overflow must be seen. To each bound comes the rounding of the arithmetic around
it, 2^-22 m. Sums are taken in fp32 (fp64 for fp64 rows), whatever the format.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FORMATS = ("exact", "bf16", "fp8", "int8")
_LARGEST = {"fp8": 448.0, "int8": 127.0}
_PAYLOAD = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
_SMALLEST_SCALE = 2.0**-126


@dataclass(frozen=True)
class Wires:
    """The formats of a dispatcher's four movements: dispatch, combine, and the backward pass of each."""

    dispatch: str = "exact"
    combine: str = "exact"
    dispatch_backward: str = "exact"
    combine_backward: str = "exact"

    @classmethod
    def of(cls, who: str, wire: str | tuple[str, str], backward_wire: str | tuple[str, str]) -> Wires:
        """From a dispatcher's arguments, each one format or a pair (of dispatch, of combine)."""
        named = {"wire": wire, "backward_wire": backward_wire}
        pairs = {k: (v, v) if isinstance(v, str) else tuple(v) for k, v in named.items()}
        for name, pair in pairs.items():
            if len(pair) != 2 or any(f not in FORMATS for f in pair):
                raise ValueError(
                    f"{who}: {name} must be one of {', '.join(FORMATS)}, or a pair of them for dispatch and combine, "
                    f"got {named[name]!r}"
                )
        return cls(*pairs["wire"], *pairs["backward_wire"])


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What rows of this dtype are summed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def pack(columns: Sequence[Tensor]) -> Tensor:
    """Tensors [N, c] of any dtypes -> uint8 [N, B]: row by row one message, so that one collective moves them all."""
    # contiguous() leaves the stride of a dimension of 0 or 1 as it is; a view of another dtype wants 1.
    dense = [c.contiguous() if c.stride(1) == 1 else c.clone(memory_format=torch.contiguous_format) for c in columns]
    parts = [c.view(torch.uint8) for c in dense]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def unpack(message: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The columns of a message [M, B] whose sender packed `like`."""
    if len(like) == 1:
        return [message.view(like[0].dtype)]
    widths = [c.shape[1] * c.element_size() for c in like]
    parts = message.split(widths, 1)
    # A copy even of a single row: a view of another dtype must not start in the middle of a number.
    return [p.clone(memory_format=torch.contiguous_format).view(c.dtype) for p, c in zip(parts, like, strict=True)]


def encode(rows: Tensor, wire: str) -> list[Tensor]:
    """rows [N, D] as they travel: the numbers, and their scale where the format has one."""
    if wire == "exact":
        return [rows]
    if wire == "bf16":
        return [rows.to(torch.bfloat16)]
    wide = rows.to(sum_dtype(rows.dtype))
    scale = (wide.abs().amax(1, keepdim=True) / _LARGEST[wire]).float().clamp_min(_SMALLEST_SCALE)
    scaled = (wide / scale).clamp(-_LARGEST[wire], _LARGEST[wire])
    if wire == "int8":
        scaled = scaled.round().nan_to_num()  # a NaN is no integer; the scale says it
    return [scaled.to(_PAYLOAD[wire]), scale]


def decode(parts: Sequence[Tensor], wire: str, dtype: torch.dtype) -> Tensor:
    """What `encode` made, as rows of `dtype`."""
    if wire in ("exact", "bf16"):
        return parts[0].to(dtype)
    numbers, scale = parts
    return (numbers.to(sum_dtype(dtype)) * scale).to(dtype)


Decode = Callable[[Tensor, torch.dtype | None], tuple[Tensor | None, list[Tensor]]]


def message(rows: Tensor | None, beside: Sequence[Tensor], wire: str) -> tuple[Tensor, Decode]:
    """uint8 [N, B] of rows [N, D] in the format `wire` and, exact, of what stands beside them; and its inverse.

    The inverse takes a message of any number of rows and the dtype that rows shall have (None: the one that came in),
    and gives back (rows, beside).
    """
    head = [] if rows is None else encode(rows, wire)
    columns = [*head, *beside]

    def inverse(received: Tensor, dtype: torch.dtype | None) -> tuple[Tensor | None, list[Tensor]]:
        parts = unpack(received, columns)
        if rows is None:
            return None, parts
        return decode(parts[: len(head)], wire, dtype or rows.dtype), parts[len(head) :]

    return pack(columns), inverse
