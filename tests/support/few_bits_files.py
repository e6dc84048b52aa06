"""Checkpoints in few bits, written from a dense one by the public definitions of their layouts, number by number.

`rewritten(folder, to, scheme)` writes the packed checkpoint into `to / "packed"` and the weights that it stands for, as
a dense one of the same model, into `to / "dense"`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_LINEAR = re.compile(r".*(self_attn\.[qkvo]_proj|experts\.\d+\.\w+)\.weight")
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def packed_words(numbers: np.ndarray, bits: int, axis: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Unsigned numbers into int32 along an axis, the first in the lowest bits, or those of `order` there."""
    per = 32 // bits
    numbers = np.moveaxis(numbers.astype(np.uint32), axis, 0)
    padded = np.zeros((-(-len(numbers) // per) * per, *numbers.shape[1:]), np.uint32)
    padded[: len(numbers)] = numbers
    words = np.zeros((len(padded) // per, *numbers.shape[1:]), np.uint32)
    for place, which in enumerate(order or range(per)):
        words |= padded[which::per] << np.uint32(bits * place)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(words, 0, axis)).view(np.int32))


def rounded(w: Tensor, bits: int, group: int, dtype: torch.dtype, asymmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(unsigned numbers [O, I], zeros [O, n], scales [O, n])."""
    top = 2**bits - 1
    rows, columns = w.shape
    groups = w.float().reshape(rows, columns // group, group)
    if asymmetric:
        low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
        scale = ((high - low) / top).to(dtype)
        zero = (-low / scale.float()).round().clamp(1, top)
    else:
        scale = (groups.abs().amax(2) / (top // 2)).to(dtype)
        zero = torch.full_like(scale, 2 ** (bits - 1)).float()
    q = (groups / scale.float()[..., None] + zero[..., None]).round().clamp(0, top)
    return q.reshape(rows, columns), zero, scale


def numbers_of(q: Tensor, zero: Tensor, scale: Tensor) -> Tensor:
    rows, columns = q.shape
    groups = q.reshape(rows, zero.shape[1], -1) - zero[..., None]
    return (groups * scale.float()[..., None]).reshape(rows, columns)


def mxfp4(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """gpt-oss: w [E, O, I] as (blocks [E, O, I/32, 16], scales [E, O, I/32], the weights that they stand for)."""
    groups = w.float().reshape(*w.shape[:2], -1, 32)
    exponent = torch.frexp(groups.abs().amax(3)).exponent - 3
    unit = torch.exp2(exponent.float())[..., None]
    table = torch.tensor([*_E2M1, *(-n for n in _E2M1)])
    codes = ((groups / unit)[..., None] - table).abs().argmin(-1)
    meant = (table[codes] * unit).reshape(w.shape)
    return (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8), (exponent + 127).to(torch.uint8), meant


def compressed(bits=4, group=32, asymmetric=False, dtype=torch.bfloat16, columnwise=False):
    def pack(stem: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        each = w.shape[1] if columnwise else group
        q, zero, scale = rounded(w, bits, each, dtype, asymmetric)
        found = {
            f"{stem}.weight_packed": packed_words(q.numpy(), bits, 1), f"{stem}.weight_scale": scale,
            f"{stem}.weight_shape": torch.tensor(w.shape),
        }  # fmt: skip
        if asymmetric:
            found[f"{stem}.weight_zero_point"] = packed_words(zero.numpy(), bits, 0)
        return found, numbers_of(q, zero, scale)

    weights = {"num_bits": bits, "type": "int", "symmetric": not asymmetric, "group_size": group, "strategy": "group"}
    config = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "format": "pack-quantized"}
    return pack, {"quant_method": "compressed-tensors", **config}


def naive(kind: str):
    """compressed-tensors without packing: int8 with a scale for a row, float8 with one for a row or for all."""

    def pack(stem: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        if kind == "int":
            q, zero, scale = rounded(w, 8, w.shape[1], torch.bfloat16, False)
            data = (q - 128).to(torch.int8)
            return {f"{stem}.weight": data, f"{stem}.weight_scale": scale}, numbers_of(q, zero, scale)
        top = w.float().abs().amax(1, keepdim=True) if kind == "rows" else w.float().abs().amax()[None]
        scale = top / 448
        data = (w.float() / scale).to(torch.float8_e4m3fn)
        return {f"{stem}.weight": data, f"{stem}.weight_scale": scale}, data.float() * scale

    weights = {"num_bits": 8, "type": "int" if kind == "int" else "float"}
    return pack, {
        "quant_method": "compressed-tensors",
        "config_groups": {"g": {"targets": ["Linear"], "weights": weights}},
    }


def e2m1():
    def pack(stem: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        blocks, scales, meant = (t[0] for t in mxfp4(w[None]))
        return {f"{stem}.weight_packed": blocks.flatten(1), f"{stem}.weight_scale": scales}, meant

    weights = {"num_bits": 4, "type": "float", "group_size": 32, "strategy": "group"}
    config = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}
    return pack, {"quant_method": "compressed-tensors", **config, "format": "mxfp4-pack-quantized"}


def gptq(version="gptq", group=32, desc_act=False, columnwise=False):
    def pack(stem: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        each = w.shape[1] if columnwise else group
        q, zero, scale = rounded(w, 4, each, torch.float16, True)
        stored = zero - 1 if version == "gptq" else zero
        found = {
            f"{stem}.qweight": packed_words(q.T.numpy(), 4, 0), f"{stem}.qzeros": packed_words(stored.T.numpy(), 4, 1),
            f"{stem}.scales": scale.T.contiguous(), f"{stem}.g_idx": (torch.arange(w.shape[1]) // each).int(),
        }  # fmt: skip
        return found, numbers_of(q, zero, scale)

    config = {"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": desc_act, "sym": False}
    return pack, {**config, "checkpoint_format": version}


def awq(group=64):
    def pack(stem: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        q, zero, scale = rounded(w, 4, group, torch.float16, True)
        found = {
            f"{stem}.qweight": packed_words(q.T.numpy(), 4, 1, _AWQ_ORDER),
            f"{stem}.qzeros": packed_words(zero.T.numpy(), 4, 1, _AWQ_ORDER),
            f"{stem}.scales": scale.T.contiguous(),
        }  # fmt: skip
        return found, numbers_of(q, zero, scale)

    return pack, {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}


def fp8(block=(32, 32), exponents=False):
    def pack(stem: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        down, across = block
        spread = torch.zeros(w.shape)
        scale = torch.zeros(-(-w.shape[0] // down), -(-w.shape[1] // across))
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                at = (slice(i * down, (i + 1) * down), slice(j * across, (j + 1) * across))
                scale[i, j] = w[at].float().abs().max() / 448
                if exponents:
                    scale[i, j] = torch.exp2(torch.log2(scale[i, j]).ceil())
                spread[at] = scale[i, j]
        data = (w.float() / spread).to(torch.float8_e4m3fn)
        stored = scale.to(torch.float8_e8m0fnu) if exponents else scale
        return {f"{stem}.weight": data, f"{stem}.weight_scale_inv": stored}, data.float() * spread

    return pack, {"quant_method": "fp8", "weight_block_size": list(block), "activation_scheme": "dynamic"}


SCHEMES: dict[str, tuple[Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor]], dict[str, Any]]] = {
    "compressed-tensors int4": compressed(),
    "compressed-tensors int4, rows": compressed(columnwise=True, dtype=torch.float32),
    "compressed-tensors int4 with zeros": compressed(asymmetric=True),
    "compressed-tensors int4 with zeros, rows": compressed(asymmetric=True, columnwise=True),
    "compressed-tensors int8": compressed(bits=8),
    "compressed-tensors int8 as it lies": naive("int"),
    "compressed-tensors fp8, rows": naive("rows"),
    "compressed-tensors fp8, one scale": naive("all"),
    "compressed-tensors mxfp4": e2m1(),
    "gptq": gptq(),
    "gptq_v2, rows": gptq("gptq_v2", columnwise=True),
    "awq": awq(),
    "fp8": fp8(),
    "fp8, blocks cut short": fp8((48, 48)),
    "fp8, exponents": fp8(exponents=True),
}


def dense_in(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def rewritten(folder: Path, to: Path, scheme: str) -> tuple[Path, Path]:
    """(the packed checkpoint, the dense one that it stands for), both of one file."""
    pack, config = SCHEMES[scheme]
    packed: dict[str, Tensor] = {}
    dense = dense_in(folder)
    for name, w in list(dense.items()):
        if not _LINEAR.fullmatch(name):
            packed[name] = w
            continue
        found, meant = pack(name.removesuffix(".weight"), w)
        packed |= found
        dense[name] = meant.to(w.dtype)
    return written(folder, to / "packed", packed, config), written(folder, to / "dense", dense, None)


def written(folder: Path, to: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None) -> Path:
    """A folder with config.json of another, a quantization_config, and these tensors in one file."""
    to.mkdir(parents=True)
    for name in ("config.json", "generation_config.json"):
        if (folder / name).exists():
            shutil.copy(folder / name, to)
    if config is not None:
        said = json.loads((to / "config.json").read_text())
        (to / "config.json").write_text(json.dumps({**said, "quantization_config": config}))
    save_file({name: t.contiguous() for name, t in tensors.items()}, to / "model.safetensors", {"format": "pt"})
    return to
