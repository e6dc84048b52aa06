"""Weights in few bits as other programs store them: which tensors of a checkpoint make one, and how they become ours.

    method               tensors of a Linear layer [O, I] called x                        becomes
    compressed-tensors   x.weight_packed int32 [O, I/8], x.weight_scale [O, groups]       "int4", as it lies
                         with x.weight_zero_point int32 [O/8, groups]                     "uint4"
                         x.weight_packed int32 [O, I/4], x.weight_scale                   "int8"
                         x.weight_packed uint8 [O, I/2], x.weight_scale uint8         "mxfp4", as it lies
                         x.weight int8 or float8 [O, I], x.weight_scale                   "int8", "fp8", as they lie
    gptq                 x.qweight int32 [I/8, O], x.qzeros [groups, O/8], x.scales       "uint4", turned
    awq                  x.qweight int32 [I, O/8], x.qzeros [groups, O/8], x.scales       "uint4", turned and sorted
    fp8                  x.weight float8 [O, I], x.weight_scale_inv, one for each block   "fp8", as they lie
    mxfp4                x_blocks uint8 [E, O, I/32, 16], x_scales uint8 [E, O, I/32]     "mxfp4", as they lie

The lowest bits of an int32 hold the first of its numbers (awq: numbers 0, 2, 4, 6, 1, 3, 5, 7). GPTQ's first version
stores a zero less one. What a tensor is, is told by its name, dtype and shape, not by lists of names in the config.
Sources: the documentation and files of compressed-tensors 0.20, GPTQModel, AutoAWQ, DeepSeek-V3 and gpt-oss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...kernels.quantized import Quantized
from ...placement.careful import Guard
from .checkpoint import Checkpoint
from .checkpoint import Stored as Plain
from .reads import DTYPES

METHODS = ("compressed-tensors", "gptq", "awq", "fp8", "mxfp4")
_GROUP = 128  # the most columns of one scale that products take
_SCALES = ("F32", "BF16", "F16")
_AWQ = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight columns the nibbles of an int32 are, lowest bits first


@dataclass(frozen=True)
class Made:
    """One tensor of a weight: the tensors of the checkpoint that hold it, what it is, and what makes it of them (None:
    they are it, byte by byte)."""

    keys: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[..., Tensor] | None = None


@dataclass(frozen=True)
class FewBits:
    """A weight [O, I], or [E, O, I], in few bits. `shape`: that of the parameter which it stands for, where it is
    `turned` [E, I, O]."""

    shape: tuple[int, ...]
    format: str
    block: tuple[int, int]
    data: Made
    scale: Made
    turned: bool = False

    def like(self, experts: int, pieces: int = 1) -> Quantized:
        """Weights of `experts` experts, each of so many pieces one below the other, without a number."""
        parts = [
            torch.empty((experts, pieces * one.shape[-2], one.shape[-1]), dtype=one.dtype, device="meta")
            for one in (self.data, self.scale)
        ]
        return Quantized(parts[0], parts[1], self.format, self.block)


Found = Mapping[str, Plain | FewBits]


class Translated:
    """The tensors of a checkpoint by the names and shapes of the weights that they stand for. `config`: its
    quantization_config, None where there is none. Raises ValueError where it is of no kind that is known."""

    def __init__(self, checkpoint: Checkpoint, config: Mapping[str, Any] | None) -> None:
        self.checkpoint = checkpoint
        self.tensors: Found = checkpoint.tensors
        if config is not None:
            self.tensors = _Reader(checkpoint, config).found()
            for key, few in self.tensors.items():
                if isinstance(few, FewBits):
                    with Guard(checkpoint.folder, "load").watched("weights in few bits", key):
                        few.like(1 if len(few.data.shape) == 2 else few.data.shape[0])

    def read(self, key: str, dtype: torch.dtype) -> Tensor:
        """The weight: as it is stored, or widened to `dtype`."""
        few = self.tensors[key]
        if not isinstance(few, FewBits):
            return self.checkpoint.read(key)
        data, scale = (self._made(one) for one in (few.data, few.scale))
        wide = Quantized(data, scale, few.format, few.block).dequantize(dtype)
        return (wide.transpose(1, 2) if few.turned else wide).reshape(few.shape)

    def _made(self, one: Made) -> Tensor:
        tensors = [self.checkpoint.read(key) for key in one.keys]
        made = one.make(*tensors) if one.make is not None else tensors[0].reshape(-1).view(one.dtype)
        return made.reshape(-1, *one.shape[-2:])


class _Reader:
    """Finds the weights of a checkpoint in few bits."""

    def __init__(self, checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
        self.checkpoint, self.stored, self.config = checkpoint, checkpoint.tensors, config
        self.guard = Guard(checkpoint.folder, "load")
        self.method = method_of(self.guard, config)

    def found(self) -> Found:
        find = {
            "compressed-tensors": self._compressed, "gptq": self._gptq, "awq": self._awq, "fp8": self._fp8,
            "mxfp4": self._mxfp4,
        }[self.method]  # fmt: skip
        found: dict[str, Plain | FewBits] = {}
        for key in self.stored:
            weight = find(key)
            if weight is not None:
                name, few = weight
                self.guard.rule(name not in found, name, "stored once", f"{key} too")
                found[name] = few
        return found

    # --- compressed-tensors ------------------------------------------------------------------------------------------

    def _compressed(self, key: str) -> tuple[str, Plain | FewBits] | None:
        stem, dot, role = key.rpartition(".")
        if role == "weight_packed":
            return f"{stem}{dot}weight", self._packed(stem)
        scale = self.stored.get(f"{stem}.weight_scale") if role == "weight" else None
        if scale is None:
            return self._plain(key)
        self._absent(stem, "weight_zero_point", "weight_g_idx", "weight_global_scale")
        t, format = self.stored[key], {"I8": "int8", "F8_E4M3": "fp8"}.get(self.stored[key].dtype)
        self.guard.rule(format is not None, f"dtype of {key}", "I8 or F8_E4M3 beside a weight_scale", t.dtype)
        assert format is not None
        rows, columns = self._matrix(key)
        if self._blocks(scale.shape, rows, columns):
            return key, self._in_blocks(key, f"{stem}.weight_scale")
        made, group = self._groups(f"{stem}.weight_scale", rows, columns, wide=format == "fp8")
        return key, FewBits(t.shape, format, (1, group), Made((key,), t.shape, DTYPES[t.dtype]), made)

    def _packed(self, stem: str) -> FewBits:
        key = f"{stem}.weight_packed"
        self._absent(stem, "weight_g_idx", "weight_global_scale")
        if self.stored[key].dtype == "U8":
            return self._e2m1(stem)
        rows, words = self._matrix(key, "I32")
        bits = self._bits(stem, rows, words)
        columns = words * (32 // bits)
        scale, group = self._groups(f"{stem}.weight_scale", rows, columns)
        block, zero = (1, group), f"{stem}.weight_zero_point"
        if bits == 8:
            self._absent(stem, "weight_zero_point")
            data = Made((key,), (rows, columns), torch.int8, _from_offset)
            return FewBits((rows, columns), "int8", block, data, scale)
        data = Made((key,), (rows, columns // 2), torch.uint8)
        if zero not in self.stored:
            return FewBits((rows, columns), "int4", block, data, scale)
        groups = self.stored[f"{stem}.weight_scale"].shape[-1]
        self._expect(zero, (-(-rows // 8), groups), "I32")
        scale = Made(
            (scale.keys[0], zero), (rows, 2 * scale.shape[1]), scale.dtype,
            partial(_with_zeros, rows=rows, groups=scale.shape[1]),
        )  # fmt: skip
        return FewBits((rows, columns), "uint4", block, data, scale)

    def _e2m1(self, stem: str) -> FewBits:
        key, scale = f"{stem}.weight_packed", f"{stem}.weight_scale"
        rows, half = self._matrix(key, "U8")
        self.guard.rule(half % 16 == 0, f"shape of {key}", "[O, I/2] with I a multiple of 32", [rows, half])
        self._expect(scale, (rows, half // 16), "U8")
        data = Made((key,), (rows, half), torch.uint8)
        return FewBits((rows, 2 * half), "mxfp4", (1, 32), data, Made((scale,), (rows, half // 16), torch.uint8))

    def _bits(self, stem: str, rows: int, words: int) -> int:
        """Of each number. Where the config's groups differ, `weight_shape` tells."""
        groups = self.config.get("config_groups")
        self.guard.rule(isinstance(groups, dict) and bool(groups), "config_groups", "an object of groups", groups)
        assert isinstance(groups, dict)
        of = [g.get("weights") if isinstance(g, dict) else None for g in groups.values()]
        said = {w["num_bits"] if isinstance(w, dict) and type(w.get("num_bits")) is int else None for w in of}
        if len(said) > 1:
            key = f"{stem}.weight_shape"
            self.guard.rule(key in self.stored, key, "there where groups have several num_bits", "none")
            t = self.stored[key]
            self.guard.rule(t.dtype in ("I32", "I64") and t.shape == (2,), key, "two whole numbers", t.dtype)
            shape = self.checkpoint.read(key).tolist()
            fit = [b for b in (4, 8) if [rows, words * (32 // b)] == shape]
            self.guard.rule(bool(fit), key, f"what {rows} rows of {words} words hold in 4 or 8 bits", shape)
            return fit[0]
        (bits,) = said
        self.guard.rule(bits in (4, 8), "num_bits", "4 or 8", bits)
        return int(bits)  # type: ignore[arg-type]

    def _groups(self, key: str, rows: int, columns: int, wide: bool = False) -> tuple[Made, int]:
        """The scales of rows of `columns`, and how many columns share one. Those of longer groups than products take
        (`wide`: they take whole rows) are repeated."""
        self.guard.rule(key in self.stored, key, "beside its weight", "none")
        t = self.stored[key]
        self.guard.rule(t.dtype in _SCALES, f"dtype of {key}", f"one of {', '.join(_SCALES)}", t.dtype)
        one = t.shape in ((), (1,), (1, 1))
        fits = one or (len(t.shape) == 2 and t.shape[0] == rows and t.shape[1] > 0 and columns % t.shape[1] == 0)
        self.guard.rule(fits, f"shape of {key}", f"[{rows}, a part of {columns}], or one number", list(t.shape))
        parts = 1 if one else t.shape[1]
        group = columns // parts
        dtype = DTYPES[t.dtype]
        if group in (32, 64, 128) or wide:
            make = None if not one or rows == 1 else partial(_spread, rows=rows, times=1, groups=1)
            return Made((key,), (rows, parts), dtype, make), group
        fits = parts == 1 or group % _GROUP == 0
        rule = f"of groups of 32, 64 or a multiple of {_GROUP} columns, or of whole rows"
        self.guard.rule(fits, key, rule, f"groups of {group}")
        groups = -(-columns // _GROUP)
        make = partial(_spread, rows=rows, times=groups if parts == 1 else group // _GROUP, groups=groups)
        return Made((key,), (rows, groups), dtype, make), _GROUP

    # --- gptq and awq ------------------------------------------------------------------------------------------------

    def _gptq(self, key: str) -> tuple[str, Plain | FewBits] | None:
        stem, dot, role = key.rpartition(".")
        if role != "qweight":
            return (
                None if role in ("qzeros", "scales", "g_idx") and f"{stem}.qweight" in self.stored else self._plain(key)
            )
        self._four("bits")
        first = self.config.get("checkpoint_format", "gptq")
        self.guard.rule(first in ("gptq", "gptq_v2"), "checkpoint_format", "gptq or gptq_v2", first)
        words, rows = self._matrix(key, "I32")
        columns = 8 * words
        group, groups = self._group(stem, columns)
        self._check_order(stem, columns, group)
        data = Made((key,), (rows, columns // 2), torch.uint8, _turned_words)
        return f"{stem}{dot}weight", self._asymmetric(
            stem, rows, columns, group, groups, data, 1 if first == "gptq" else 0
        )

    def _awq(self, key: str) -> tuple[str, Plain | FewBits] | None:
        stem, dot, role = key.rpartition(".")
        if role != "qweight":
            return None if role in ("qzeros", "scales") and f"{stem}.qweight" in self.stored else self._plain(key)
        self._four("bits", "w_bit")
        version = self.config.get("version", "gemm")
        self.guard.rule(str(version).lower() == "gemm", "version", "gemm", version)
        columns, words = self._matrix(key, "I32")
        rows = 8 * words
        group, groups = self._group(stem, columns)
        data = Made((key,), (rows, columns // 2), torch.uint8, _from_awq)
        return f"{stem}{dot}weight", self._asymmetric(stem, rows, columns, group, groups, data, None)

    def _asymmetric(
        self, stem: str, rows: int, columns: int, group: int, groups: int, data: Made, plus: int | None
    ) -> FewBits:
        """`plus`: what a stored zero lacks; None: AWQ's order."""
        scales, zeros = f"{stem}.scales", f"{stem}.qzeros"
        self._expect(zeros, (groups, rows // 8), "I32")
        self.guard.rule(rows % 8 == 0 and columns % 8 == 0, f"{stem}.qweight", "of multiples of 8", [rows, columns])
        self._expect(scales, (groups, rows), *_SCALES)
        ours = -(-columns // min(group, _GROUP))
        make = partial(
            _turned_scales, plus=plus, times=1 if group <= _GROUP else ours if groups == 1 else group // _GROUP
        )
        scale = Made((scales, zeros), (rows, 2 * ours), DTYPES[self.stored[scales].dtype], partial(make, groups=ours))
        return FewBits((rows, columns), "uint4", (1, min(group, _GROUP)), data, scale)

    def _four(self, *names: str) -> None:
        bits = next((self.config[name] for name in names if name in self.config), None)
        self.guard.rule(bits == 4, "bits", "4", bits)

    def _group(self, stem: str, columns: int) -> tuple[int, int]:
        """Columns that share a scale, and groups of a row."""
        key = f"{stem}.scales"
        self.guard.rule(key in self.stored and len(self.stored[key].shape) == 2, key, "[groups, O]", "none")
        groups = self.stored[key].shape[0]
        self.guard.rule(groups > 0 and columns % groups == 0, key, f"of groups that divide {columns}", groups)
        group = columns // groups
        if group not in (32, 64):
            rule = f"of groups of 32, 64 or a multiple of {_GROUP} columns, or of whole rows"
            self.guard.rule(group % _GROUP == 0 or groups == 1, key, rule, f"groups of {group}")
            group = _GROUP if groups == 1 and group < _GROUP else group
        return group, groups

    def _check_order(self, stem: str, columns: int, group: int) -> None:
        """Raises ValueError where groups are of columns that do not lie side by side."""
        key = f"{stem}.g_idx"
        if not self.config.get("desc_act") or key not in self.stored:
            return
        self._expect(key, (columns,), "I32", "I64")
        plain = torch.arange(columns) // group
        same = torch.equal(self.checkpoint.read(key).long(), plain)
        self.guard.rule(same, key, "rising (desc_act: false), for columns are read in their order", "another order")

    # --- fp8 and mxfp4 -----------------------------------------------------------------------------------------------

    def _fp8(self, key: str) -> tuple[str, Plain | FewBits] | None:
        scale = f"{key}_scale_inv"
        if key.endswith("_scale_inv") and key.removesuffix("_scale_inv") in self.stored:
            return None
        if scale not in self.stored:
            return self._plain(key)
        return key, self._in_blocks(key, scale)

    def _in_blocks(self, key: str, scale: str) -> FewBits:
        """Float8 weights [..., O, I] with a scale for each block of rows and columns, or for all."""
        t, s = self.stored[key], self.stored[scale]
        self.guard.rule(t.dtype == "F8_E4M3" and len(t.shape) in (2, 3), key, "F8_E4M3 [.., O, I]", t.dtype)
        self.guard.rule(s.dtype in (*_SCALES, "F8_E8M0"), f"dtype of {scale}", f"one of {', '.join(_SCALES)}", s.dtype)
        rows, columns = t.shape[-2:]
        parts = s.shape[-2:] if len(s.shape) == len(t.shape) else (1, 1)
        one = s.shape in ((), (1,))
        whole = one or (len(s.shape) == len(t.shape) and s.shape[:-2] == t.shape[:-2] and min(s.shape) > 0)
        self.guard.rule(whole, f"shape of {scale}", "one scale, or one of each block", list(s.shape))
        down, across = (
            n if p == 1 else b for n, p, b in zip((rows, columns), parts, self._block(rows, columns), strict=True)
        )
        fits = (-(-rows // down), -(-columns // across)) == tuple(parts)
        self.guard.rule(fits, f"shape of {scale}", f"one of each block of {down} x {across}", list(s.shape))
        dtype = DTYPES[s.dtype] if s.dtype != "F8_E8M0" else torch.float32
        data = Made((key,), t.shape, DTYPES[t.dtype])
        if not one and rows % down == 0 and dtype == DTYPES[s.dtype]:
            return FewBits(t.shape, "fp8", (down, across), data, Made((scale,), s.shape, dtype))
        # of weights that lie one below the other, blocks cut short would be in between: then each row has its own
        make = partial(_rows, rows=rows, down=down, dtype=dtype)
        return FewBits(t.shape, "fp8", (1, across), data, Made((scale,), (*t.shape[:-1], parts[1]), dtype, make))

    def _block(self, rows: int, columns: int) -> tuple[int, int]:
        said = self.config.get("weight_block_size") or (128, 128)
        fine = isinstance(said, list | tuple) and len(said) == 2 and all(type(n) is int and n > 0 for n in said)
        self.guard.rule(fine, "weight_block_size", "two whole numbers", said)
        return min(said[0], rows), min(said[1], columns)

    def _blocks(self, shape: tuple[int, ...], rows: int, columns: int) -> bool:
        """Whether scales of this shape are of blocks of several rows."""
        return len(shape) == 2 and 1 <= shape[0] < rows and shape != (1, 1)

    def _mxfp4(self, key: str) -> tuple[str, Plain | FewBits] | None:
        if key.endswith("_scales") and f"{key.removesuffix('_scales')}_blocks" in self.stored:
            return None
        if not key.endswith("_blocks"):
            return self._plain(key)
        name = key.removesuffix("_blocks")
        t = self.stored[key]
        fine = t.dtype == "U8" and len(t.shape) == 4 and t.shape[3] == 16 and min(t.shape) > 0
        self.guard.rule(fine, key, "U8 [E, O, I/32, 16]", f"{t.dtype} {list(t.shape)}")
        experts, rows, blocks, _ = t.shape
        self._expect(f"{name}_scales", (experts, rows, blocks), "U8")
        data = Made((key,), (experts, rows, 16 * blocks), torch.uint8)
        scale = Made((f"{name}_scales",), (experts, rows, blocks), torch.uint8)
        return name, FewBits((experts, 32 * blocks, rows), "mxfp4", (1, 32), data, scale, turned=True)

    # --- rules -------------------------------------------------------------------------------------------------------

    def _plain(self, key: str) -> tuple[str, Plain]:
        """A tensor that is a weight itself."""
        t = self.stored[key]
        alone = key.endswith("weight") and t.dtype in ("I8", "U8", "I32", "F8_E4M3", "F8_E5M2")
        self.guard.rule(not alone, f"dtype of {key}", f"a float's, or one of {self.method} with its scale", t.dtype)
        return key, t

    def _matrix(self, key: str, *dtypes: str) -> tuple[int, int]:
        t = self.stored[key]
        fine = len(t.shape) == 2 and min(t.shape) > 0 and (not dtypes or t.dtype in dtypes)
        self.guard.rule(fine, key, f"a matrix of {' or '.join(dtypes) or 'numbers'}", f"{t.dtype} {list(t.shape)}")
        return t.shape[0], t.shape[1]

    def _expect(self, key: str, shape: tuple[int, ...], *dtypes: str) -> None:
        self.guard.rule(key in self.stored, key, "beside its weight", "none")
        t = self.stored[key]
        rule = f"{' or '.join(dtypes)} {list(shape)}"
        self.guard.rule(t.shape == shape and t.dtype in dtypes, key, rule, f"{t.dtype} {list(t.shape)}")

    def _absent(self, stem: str, *roles: str) -> None:
        for role in roles:
            key = f"{stem}.{role}"
            self.guard.rule(key not in self.stored, key, f"absent: weights with a {role} are not taken", "one")


def method_of(guard: Guard, config: Any) -> str:
    """The kind of a quantization_config. Raises ValueError naming those that are taken."""
    guard.rule(isinstance(config, Mapping), "quantization_config", "an object", config)
    method = config.get("quant_method")
    rule = f"of one of the methods {', '.join(METHODS)} (or take a checkpoint in bf16, fp16 or fp32)"
    guard.rule(isinstance(method, str) and method in METHODS, "quantization_config", rule, method)
    return method


# ---- bytes into ours -----------------------------------------------------------------------------------------------


def _from_offset(words: Tensor) -> Tensor:
    """Bytes that are 128 too large."""
    return (words.reshape(-1).view(torch.uint8) ^ 0x80).view(torch.int8)


def _nibbles(words: Tensor) -> Tensor:
    """uint8 [..., 8] of int32 [...], lowest bits first."""
    b = words.contiguous().view(torch.uint8).view(*words.shape, 4)
    return torch.stack((b & 15, b >> 4), -1).flatten(-2)


def _spread(scale: Tensor, rows: int, times: int, groups: int) -> Tensor:
    """Scales [rows, n], or one, each `times` in a row: [rows, groups]."""
    return scale.reshape(-1, scale.shape[-1] if scale.dim() > 1 else 1).repeat_interleave(times, 1).expand(rows, groups)


def _with_zeros(scale: Tensor, zeros: Tensor, rows: int, groups: int) -> Tensor:
    """compressed-tensors: zeros int32 [O/8, n] packed along the rows."""
    zero = _nibbles(zeros).transpose(1, 2).flatten(0, 1)[:rows].to(scale.dtype)
    times = -(-groups // scale.shape[1])
    return torch.cat([_spread(t, rows, times, groups) for t in (scale, zero)], 1)


def _turned_words(words: Tensor) -> Tensor:
    """GPTQ: int32 [I/8, O] -> bytes [O, I/2]."""
    return words.T.contiguous().view(torch.uint8)


def _sorted(words: Tensor) -> Tensor:
    """AWQ: numbers [..., 8n] of int32 [..., n]."""
    return _nibbles(words)[..., torch.tensor(_AWQ).argsort()].flatten(-2)


def _from_awq(words: Tensor) -> Tensor:
    """AWQ: int32 [I, O/8] -> bytes [O, I/2]. Pairs of columns are joined as they lie, then turned as whole bytes."""
    even, odd = (words[i::2].contiguous().view(torch.uint8) for i in (0, 1))
    halves = (even & 15 | odd << 4, even >> 4 | odd & 0xF0)  # of the lower and of the upper nibbles of a word's bytes
    out = torch.empty(words.shape[1], 8, len(even), dtype=torch.uint8)
    for upper, half in enumerate(halves):
        turned = half.T.contiguous().view(-1, 4, len(even))
        for byte in range(4):
            out[:, _AWQ[2 * byte + upper]] = turned[:, byte]
    return out.view(-1, len(even))


def _turned_scales(scale: Tensor, zeros: Tensor, plus: int | None, times: int, groups: int) -> Tensor:
    """GPTQ and AWQ: scales [n, O] and zeros int32 [n, O/8] -> [O, scales and zeros]."""
    zero = _sorted(zeros) if plus is None else _nibbles(zeros).flatten(-2) + plus & 15
    rows = scale.shape[1]
    return torch.cat([_spread(t.T.to(scale.dtype), rows, times, groups) for t in (scale, zero)], 1)


def _rows(scale: Tensor, rows: int, down: int, dtype: torch.dtype) -> Tensor:
    """Scales [.., blocks, n], or one, for each of the rows."""
    scale = scale.to(dtype)
    if scale.dim() < 2:
        return scale.reshape(1, 1).expand(rows, 1)
    return scale.repeat_interleave(down, -2).narrow(-2, 0, rows)
