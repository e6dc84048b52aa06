"""grouped_ffn for few rows in Triton: two launches, no order of pairs; weights as stored, of any type or Quantized.

Nothing here waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..activation import Activation
from ..activation_triton import form_of
from ..chip import Chip
from ..gguf_triton import at_words
from ..launch import Launch, launch, with_contiguous_rows
from ..quantized import BLOCKS, PER_BYTE, Quantized
from .thin_tiles import MAX_ROWS, ThinSize, ThinTile, choose_thin, power_of_2
from .triton_thin import thin_down_kernel, thin_up_kernel

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def serves(rows: Tensor) -> bool:
    """Whether these rows are few enough, and of a type of this form."""
    return rows.shape[0] <= MAX_ROWS and rows.dtype in _DTYPES


def thin_forward(
    rows: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    w1: Tensor | Quantized,
    w_up: Tensor | Quantized | None,
    w2: Tensor | Quantized,
    b1: Tensor | None,
    b2: Tensor | None,
    act: Activation,
    transposed: bool,
    interleaved: bool,
    *,
    chip: Chip,
    launch: Launch = launch,
    tiles: tuple[ThinTile, ThinTile] | None = None,
) -> Tensor:
    """y [R, D] of grouped_ffn; arguments as there, `expert_ids` int32. Between the two launches the activations
    [R*K, F] are in rows' dtype. `tiles`: of the up and of the down projection, chosen where not given."""
    rows = with_contiguous_rows(rows)
    expert_ids, weights = expert_ids.contiguous(), weights.contiguous()
    experts, (top_k, pairs) = w2.shape[0], (expert_ids.shape[1], expert_ids.numel())
    first, second = _Stored.pair(w1, w_up, transposed)
    down = _Stored.of(w2, transposed)
    sizes = _sizes(first, down, rows, top_k, w2, act, transposed)
    f, out = (size.outputs for size in sizes)
    a, y = rows.new_empty(pairs, f), rows.new_empty(rows.shape[0], out)
    up_tile, down_tile = tiles or (choose_thin(size, chip) for size in sizes)
    b1, b2 = (b if b is None else b.contiguous() for b in (b1, b2))
    layout = "single" if not act.gated else "pair" if second else "interleaved" if interleaved else "halves"
    launch(
        thin_up_kernel, grid=(-(-f // up_tile.outputs), pairs), warps=up_tile.warps, stages=1,
        x=rows, w=first.data, w_second=(second or first).data, s=first.scale, s_second=(second or first).scale,
        bias=a if b1 is None else b1, expert_ids=expert_ids, a=a, E=experts, F=f, stride_x=rows.stride(0),
        TOP_K=top_k, FORM=form_of(act), LAYOUT=layout, BIAS=b1 is not None, BF=up_tile.outputs, LENGTH=rows.shape[1],
        **first.arguments(up_tile),
    )  # fmt: skip
    launch(
        thin_down_kernel, grid=(-(-out // down_tile.outputs), rows.shape[0]), warps=down_tile.warps, stages=1,
        a=a, w=down.data, s=down.scale, bias=a if b2 is None else b2, expert_ids=expert_ids, weights=weights, y=y,
        E=experts, WIDTH=out, TOP_K=top_k, KP=power_of_2(top_k), BIAS=b2 is not None, BN=down_tile.outputs, LENGTH=f,
        **down.arguments(down_tile),
    )  # fmt: skip
    return y


def thin_sizes(
    rows: Tensor,
    top_k: int,
    w1: Tensor | Quantized,
    w_up: Tensor | Quantized | None,
    w2: Tensor | Quantized,
    act: Activation,
    transposed: bool,
) -> tuple[ThinSize, ThinSize]:
    """What `thin_forward` chooses its two tiles by."""
    first, _ = _Stored.pair(w1, w_up, transposed)
    return _sizes(first, _Stored.of(w2, transposed), rows, top_k, w2, act, transposed)


def _sizes(
    first: _Stored, down: _Stored, rows: Tensor, top_k: int, w2: Tensor | Quantized, act: Activation, transposed: bool
) -> tuple[ThinSize, ThinSize]:
    out, f = (w2.shape[2], w2.shape[1]) if transposed else (w2.shape[1], w2.shape[2])
    tokens = rows.shape[0]
    up = first.size(tokens * top_k, f, rows.shape[1], 1, 2 if act.gated else 1)
    return up, down.size(tokens, out, f, top_k, 1)


@dataclass(frozen=True)
class _Stored:
    """Weights as a kernel reads them. `strides` (expert, output, input) in elements of `data`; one of the last two
    is 1. `scale` is `data` where there is none."""

    data: Tensor
    strides: tuple[int, int, int]
    scale: Tensor
    block: tuple[int, int]
    format: str
    per_word: int  # weights in an element of data

    @classmethod
    def of(cls, w: Tensor | Quantized, transposed: bool) -> _Stored:
        if isinstance(w, Quantized):
            return cls._quantized(w)
        view = w.transpose(1, 2) if transposed else w
        if 1 not in view.stride()[1:]:
            view = view.contiguous()
        e, o, i = view.stride()
        return cls(view, (e, o, i), view, (1, 1), "none", 1)

    @classmethod
    def _quantized(cls, w: Quantized) -> _Stored:
        if w.format in BLOCKS:
            data = at_words(w.data, w.format)
            e, o, i = data.stride()
            return cls(data, (e, o, i), data, w.block, w.format, 1 if w.format == "Q8_0" else 2)
        data = w.data if w.data.stride(2) == 1 else w.data.contiguous()
        scale = w.scale if w.scale.stride(2) == 1 else w.scale.contiguous()
        data, per_byte = data.view(torch.uint8), PER_BYTE[w.format]
        whole = all(n % 16 == 0 for n in (data.shape[2], *data.stride()[:2], data.storage_offset()))
        if whole and (data.device.type == "meta" or data.data_ptr() % 16 == 0):
            data, per_byte = data.view(torch.int32), 4 * per_byte
        e, o, i = data.stride()
        return cls(data, (e, o, i), scale, w.block, w.format, per_byte)

    @classmethod
    def pair(
        cls, w: Tensor | Quantized, second: Tensor | Quantized | None, transposed: bool
    ) -> tuple[_Stored, _Stored | None]:
        """Both in one layout: a kernel steps through them together."""
        one = cls.of(w, transposed)
        if second is None:
            return one, None
        two = cls.of(second, transposed)
        if (one.strides, one.per_word, one.scale.stride()) == (two.strides, two.per_word, two.scale.stride()):
            return one, two
        if isinstance(w, Quantized) and isinstance(second, Quantized):
            return cls._quantized(w.copy()), cls._quantized(second.copy())
        assert isinstance(w, Tensor)
        assert isinstance(second, Tensor)
        return cls.of(w.contiguous(), transposed), cls.of(second.contiguous(), transposed)

    @property
    def rows_contiguous(self) -> bool:
        return self.strides[2] == 1

    @property
    def words(self) -> int:
        """Elements of `data` in a chunk: 16 bytes of them, or 4 bytes where quantized rows are not made of 16."""
        if self.format in BLOCKS:
            return 16
        return 4 if self.format != "none" else 16 // self.data.element_size()

    def size(self, programs: int, outputs: int, length: int, together: int, halves: int) -> ThinSize:
        per_chunk = self.words * self.per_word
        return ThinSize(programs, outputs, length, together, halves, per_chunk, self.rows_contiguous)

    def arguments(self, tile: ThinTile) -> dict[str, Any]:
        """What both kernels want to know of the weights and the tile. Where rows begin at whole 16 bytes, strides go in
        units of that, so that the compiler knows."""
        unit = 16 // self.data.element_size()
        aligned = self.data.device.type == "meta" or self.data.data_ptr() % 16 == 0
        if not aligned or any(n % unit for n in self.strides if n != 1):
            unit = 1
        e, o, i = (n if n == 1 else n // unit for n in self.strides)
        return {
            "UNIT": unit,
            "stride_e": e,
            "stride_out": o,
            "stride_in": i,
            "stride_se": self.scale.stride(0),
            "stride_so": self.scale.stride(1),
            "ROWS_PER_SCALE": self.block[0],
            "GROUP": self.block[1],
            "FORMAT": self.format,
            "C": tile.chunks,
            "Q": self.words if self.rows_contiguous else 0,
            "P": self.per_word,
            "UNROLL": tile.unroll,
        }
