"""Experts in a GGUF file: their weights as blocks in place, or, where no product takes a type, widened while read.

llama.cpp keeps a layer's experts in 3-D tensors, `blk.N.ffn_gate_exps.weight` [E, F, D], `ffn_up_exps` and
`ffn_down_exps` [E, D, F]; some files have gate and up as one, `ffn_gate_up_exps` [E, 2F, D], and old ones of Mixtral
have a tensor for each expert, `ffn_gate.E.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...kernels.chip import say_once
from ...kernels.gguf_blocks import BLOCKS, dequantize_blocks
from ...kernels.quantized import Quantized
from ...placement.careful import Guard
from ..hf.gguf_names import need_gguf
from .forms import Form
from .gguf_file import Gguf
from .kinds import Layer
from .shards import Laid, Run

_WHO = "load"
FORMAT_OF = {format.removeprefix("gguf_").upper(): format for format in BLOCKS}  # type in the file -> a format of ours
TYPE_OF = {format: type for type, format in FORMAT_OF.items()}
DTYPE_OF = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I8": torch.int8,
    "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip
_CHUNK = 1 << 20  # weights widened at a time
_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


class Piece(NamedTuple):
    """Some of the rows of an expert's weight: a type, rows [O, I] (or [O] of a bias), and where all experts' lie."""

    type: str
    shape: tuple[int, ...]
    laid: Laid
    keys: tuple[str, ...]


@dataclass
class Stored:
    """A layer's experts: weights [E, ...] without a number; each part as it lies; what makes a part of those bytes
    where it is not they themselves; the tensors that hold them."""

    weights: dict[str, Any] = field(default_factory=dict)
    laid: dict[str, Laid] = field(default_factory=dict)
    made: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    keys: set[str] = field(default_factory=set)
    widened: set[str] = field(default_factory=set)

    def layer(self, name: str) -> Layer:
        experts = len(next(iter(self.weights.values())).data)
        return Layer.of(name, (range(experts), self.weights))


def stored_of(gguf: Gguf, name: str, module: nn.Module, form: Form, dtype: torch.dtype) -> Stored:
    """The experts of `module`, called `name` in the model. Raises ValueError where a tensor of theirs is missing, or of
    another shape than the model's."""
    guard = Guard(gguf.path, _WHO)
    index = re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", f".{name}.")
    guard.rule(index is not None, "experts", "of a numbered layer", name)
    assert index is not None
    layer, down = int(index.group(1)), form.weights(module)["w_down"]
    experts, width = len(down), form.width(module)
    inner = down.shape[1 if form.transposed else 2]
    look = _Look(gguf, guard, layer, experts)
    matrices = {**_first(look, form, inner, width), "w_down": [look.weight("down", (width, inner))]}
    found = Stored()
    apart = "w_gate" in matrices and "b_gate_up" in form.names  # which no product takes
    if (apart or not _as_blocks(found, matrices)) and not _as_tensors(found, matrices, dtype):
        found.widened = {p.type for pieces in matrices.values() for p in pieces if p.type not in DTYPE_OF}
        first = [p for n, pieces in matrices.items() if n != "w_down" for p in pieces]
        _make(found, "w_gate_up", first, dtype)
        _make(found, "w_down", matrices["w_down"], dtype)
    if "b_gate_up" in form.names:
        kinds = ("gate", "up") if form.activation.gated else ("up",)
        _make(found, "b_gate_up", [look.bias(kind, (inner,)) for kind in kinds], dtype)
        _make(found, "b_down", [look.bias("down", (width,))], dtype)
    for pieces in (*matrices.values(), *look.biases):
        found.keys |= {key for piece in pieces for key in piece.keys}
    return found


def say_widened(gguf: Gguf, types: set[str], dtype: torch.dtype) -> None:
    if types:
        why = f"experts in {', '.join(sorted(types))} have no product of their own ({gguf.path.name})"
        say_once(_WHO, why, f"weights widened to {str(dtype)[6:]} whenever an expert is read")


class _Look:
    """Looks a layer's tensors up."""

    def __init__(self, gguf: Gguf, guard: Guard, layer: int, experts: int) -> None:
        self.gguf, self.guard, self.layer, self.experts = gguf, guard, layer, experts
        self.biases: list[list[Piece]] = []

    def has(self, kind: str) -> bool:
        return f"blk.{self.layer}.ffn_{kind}_exps.weight" in self.gguf.tensors

    def weight(self, kind: str, shape: tuple[int, int]) -> Piece:
        """`kind`: gate, up, down or gate_up; `shape`: an expert's."""
        one = f"blk.{self.layer}.ffn_{kind}_exps.weight"
        each = [f"blk.{self.layer}.ffn_{kind}.{e}.weight" for e in range(self.experts)]
        return self._piece([one] if one in self.gguf.tensors or each[0] not in self.gguf.tensors else each, shape)

    def bias(self, kind: str, shape: tuple[int]) -> Piece:
        piece = self._piece([f"blk.{self.layer}.ffn_{kind}_exps.bias"], shape)
        self.biases.append([piece])
        return piece

    def _piece(self, keys: Sequence[str], shape: tuple[int, ...]) -> Piece:
        """Of one tensor [E, ...], or of one [...] for each expert."""
        wanted = (self.experts, *shape) if len(keys) == 1 else shape
        runs, types = [], set()
        for key in keys:
            self.guard.rule(key in self.gguf.tensors, "tensors", f"there for each weight, {key} too", "none")
            t = self.gguf.tensors[key]
            same = tuple(n for n in t.shape if n != 1) == tuple(n for n in wanted if n != 1)
            self.guard.rule(same, f"shape of {key}", str(list(wanted)), list(t.shape))
            runs.append(Run(t.file, t.offset, t.nbytes))
            types.add(t.type)
        self.guard.rule(len(types) == 1, f"types of {keys[0]} and the other experts'", "one", sorted(types))
        laid = Laid((self.experts, sum(run.nbytes for run in runs) // self.experts), "U8", tuple(runs))
        return Piece(types.pop(), shape, laid, tuple(keys))


def _first(look: _Look, form: Form, inner: int, width: int) -> dict[str, list[Piece]]:
    """The pieces of gate and up: of one weight where they are of one type, else of two."""
    if not form.activation.gated:
        return {"w_gate_up": [look.weight("up", (inner, width))]}
    if look.has("gate_up"):
        return {"w_gate_up": [look.weight("gate_up", (2 * inner, width))]}
    gate, up = (look.weight(kind, (inner, width)) for kind in ("gate", "up"))
    return {"w_gate_up": [gate, up]} if gate.type == up.type else {"w_gate": [gate], "w_up": [up]}


def _as_blocks(found: Stored, matrices: Mapping[str, Sequence[Piece]]) -> bool:
    """Whether all weights are blocks that products take, or become such exactly."""
    types = {p.type for pieces in matrices.values() for p in pieces}
    if not all(type in FORMAT_OF or type in _EXACTLY for type in types):
        return False
    for name, pieces in matrices.items():
        type, experts = pieces[0].type, pieces[0].laid.shape[0]
        format, turn = _EXACTLY.get(type, (FORMAT_OF.get(type, ""), None))
        weights, size = BLOCKS[format]
        rows, columns = sum(p.shape[0] for p in pieces), pieces[0].shape[1] // weights * size
        data = torch.empty(experts, rows, columns, dtype=torch.uint8, device="meta")
        found.weights[name] = Quantized.from_gguf(data, format)
        found.laid[f"{name}.data"] = _beside(pieces)
        if turn is not None:
            found.made[f"{name}.data"] = lambda t, turn=turn, rows=rows: turn(t).reshape(rows, -1)  # type: ignore[misc]
    return True


def _as_tensors(found: Stored, matrices: Mapping[str, Sequence[Piece]], dtype: torch.dtype) -> bool:
    """Whether all weights are numbers in the model's own type."""
    if any(DTYPE_OF.get(p.type) != dtype for pieces in matrices.values() for p in pieces):
        return False
    for name, pieces in matrices.items():
        rows, experts = sum(p.shape[0] for p in pieces), pieces[0].laid.shape[0]
        found.weights[name] = torch.empty(experts, rows, *pieces[0].shape[1:], dtype=dtype, device="meta")
        found.laid[name] = _beside(pieces)
    return True


def _make(found: Stored, name: str, pieces: Sequence[Piece], dtype: torch.dtype) -> None:
    """A tensor in `dtype`, made of each expert's bytes."""
    sizes = [p.laid.shape[1] for p in pieces]
    rows, experts = sum(p.shape[0] for p in pieces), pieces[0].laid.shape[0]
    found.weights[name] = torch.empty(experts, rows, *pieces[0].shape[1:], dtype=dtype, device="meta")
    found.laid[name] = _beside(pieces)

    def make(data: Tensor) -> Tensor:
        parts = [widened(t, p.type, p.shape, dtype) for t, p in zip(data.split(sizes), pieces, strict=True)]
        return torch.cat(parts)

    found.made[name] = make


def _beside(pieces: Sequence[Piece]) -> Laid:
    """For each expert the bytes of all pieces, one after the other."""
    experts = pieces[0].laid.shape[0]
    rows = [p.laid.cut(experts) for p in pieces]
    runs = tuple(run for row in zip(*rows, strict=True) for some in row for run in some)
    return Laid((experts, sum(p.laid.shape[1] for p in pieces)), "U8", runs)


def widened(data: Tensor, type: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The numbers that bytes of whole rows of a type stand for, [...] of `shape` in `dtype`; some rows at a time."""
    out = torch.empty(tuple(shape), dtype=dtype)
    rows = out.view(-1, shape[-1])
    some = max(1, _CHUNK // shape[-1])
    for now, t in zip(rows.split(some), data.view(len(rows), -1).split(some), strict=True):
        now.copy_(_numbers(t, type).view(now.shape))
    return out


def _numbers(data: Tensor, type: str) -> Tensor:
    if type in DTYPE_OF:
        return data.view(DTYPE_OF[type])
    if type in FORMAT_OF:
        return dequantize_blocks(data, FORMAT_OF[type])
    gguf = need_gguf(f"weights in {type}")
    return torch.from_numpy(gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[type]))


def tensor_of(gguf: Gguf, key: str, dtype: torch.dtype) -> Tensor:
    """A tensor of the file in `dtype`, widened where it is in blocks; some of it at a time."""
    t = gguf.tensors[key]
    out = torch.empty(t.shape, dtype=dtype)
    rows = out.view(-1, t.shape[-1])
    size, some = t.bytes_shape[-1], max(1, _CHUNK // t.shape[-1])
    for first in range(0, len(rows), some):
        now = rows[first : first + some]
        data = gguf.read(key, first * size, (first + len(now)) * size)
        now.copy_(widened(data, t.type, now.shape, dtype))
    return out


# ---- blocks that are others exactly ---------------------------------------------------------------------------------


def _from_q5_0(data: Tensor) -> Tensor:
    """Q5_0, d * (q - 16) with five bits q, as Q8_0: the same d, q - 16 in eight."""
    b = data.view(-1, 22)
    places = torch.arange(8, dtype=torch.uint8)
    fifth = (b[:, 2:6].unsqueeze(2) >> places & 1).flatten(1)
    q = (torch.cat((b[:, 6:] & 15, b[:, 6:] >> 4), 1) | fifth << 4).view(torch.int8) - 16
    return torch.cat((b[:, :2], q.view(torch.uint8)), 1).flatten()


def _from_iq4_nl(data: Tensor) -> Tensor:
    """IQ4_NL, d * one of sixteen numbers of eight bits, as Q8_0 with these numbers."""
    b = data.view(-1, 18)
    q = torch.tensor(_IQ4_NL, dtype=torch.int8)[torch.cat((b[:, 2:] & 15, b[:, 2:] >> 4), 1).int()]
    return torch.cat((b[:, :2], q.view(torch.uint8)), 1).flatten()


_EXACTLY: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "Q5_0": ("Q8_0", _from_q5_0), "IQ4_NL": ("Q8_0", _from_iq4_nl),
}  # fmt: skip
