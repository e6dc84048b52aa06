"""grouped_ffn on CUDA devices: the Triton form, or the plain one where that cannot serve, which says so once."""

from __future__ import annotations

from ..chip import chip_of, say_once, why_no_grouped_gemm
from . import plain
from .thin_tiles import counted


def forward(rows, *rest):
    why = why_no_grouped_gemm(rows, counted(len(rows), rest[4].shape[0], keep=rest[-1]))
    if why is not None:
        say_once("grouped_ffn", why, "a loop of matmuls over experts, which waits for the device")
        return plain.forward(rows, *rest)
    from . import on_triton

    return on_triton.forward(rows, *rest, chip=chip_of(rows.device.index))


def backward(grad, rows, *rest):
    if why_no_grouped_gemm(rows, rest[4].shape[0]) is not None:
        return plain.backward(grad, rows, *rest)
    from . import on_triton

    return on_triton.backward(grad, rows, *rest, chip=chip_of(rows.device.index))
