"""headgate.pack into a GGUF file: the experts in blocks, all the rest as it is, by the names that llama.cpp has.

Of a folder with a checkpoint the metadata are those of its config, and there is no tokenizer; of a GGUF file they are
the file's own, and so is every tensor that keeps its type.
"""

from __future__ import annotations

import errno
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

from ...kernels.gguf_blocks import BLOCKS
from ...kernels.quantized import quantize
from ...placement.files import remove_stale, write_whole
from ..hf.gguf_names import Dense, metadata_of
from .gguf_experts import DTYPE_OF, TYPE_OF
from .gguf_file import NUMBERS, SIZES, SUFFIX, Gguf, GgufTensor
from .kinds import widened
from .reads import bytes_of

if TYPE_CHECKING:
    from .lower import Groups
    from .seen import Seen

_ALIGNED = 32
_CHUNK = 8 << 20  # bytes copied at a time
_TYPE_OF = {dtype: type for type, dtype in DTYPE_OF.items()}
_NOT_KEPT = ("split.", "general.alignment", "general.file_type")  # what the new file has otherwise


@dataclass
class _Plan:
    """A file to be: its metadata; the format of each layer's experts, and which layers' are read; name -> (type, shape)
    of each tensor, in order; what gives the bytes of all other tensors."""

    said: list[bytes]
    formats: list[str | None]
    experts: Sequence[int]
    tensors: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    rest: dict[str, Callable[[], Iterable[Tensor]]] = field(default_factory=dict)


def is_gguf(path: Path) -> bool:
    return path.suffix == SUFFIX


def check_formats(groups: Groups) -> None:
    """Raises ValueError where a layer's experts could not be one tensor of blocks."""
    for of in groups:
        kinds = [format for _, format in of]
        if len(kinds) > 1 or not set(kinds) <= {None, *BLOCKS}:
            rule = f"one of {', '.join(BLOCKS)} for all experts of a layer in a GGUF file"
            raise ValueError(f"pack: formats must be {rule}, got {', '.join(map(str, kinds))}")


def write_gguf(what: Seen, groups: Groups, path: Path, tell: Callable[[int, int], object]) -> None:
    """Writes the file, whole or not at all, one expert at a time. Raises OSError where the disk has no room."""
    remove_stale(path)
    formats = [of[0][1] for of in groups]
    plan = _again(what, what.files, formats) if isinstance(what.files, Gguf) else _anew(what, formats)
    begins, size = _layout(plan)
    free = shutil.disk_usage(path.parent).free
    if size > free:
        why = f"pack: output must have {size:,} bytes for the file, got {free:,} free"
        raise OSError(errno.ENOSPC, why, str(path))

    def work(file: BinaryIO) -> None:
        file.write(_header(plan, begins))
        for name, parts in plan.rest.items():
            file.seek(begins[name])
            for part in parts():
                file.write(bytes_of(part))
        _write_experts(what, plan, begins, file, tell)
        file.truncate(size)
        file.flush()
        os.fsync(file.fileno())

    write_whole(path, work)


def _anew(what: Seen, formats: list[str | None]) -> _Plan:
    """Of a folder with a checkpoint."""
    model: Any = what.model
    left = {f"{name}.{theirs}" for name, _, form in what.found for theirs in form.names.values()}
    dense = Dense.to_write(model, left)
    said = metadata_of(model.config)
    said[f"{said['general.architecture']}.vocab_size"] = model.config.vocab_size
    whole = model.state_dict()
    plan = _Plan([_key(key, value) for key, value in said.items()], formats=list(formats), experts=range(len(formats)))
    for name, (key, *_) in dense.names.items():
        if name not in what.rest or name in model.all_tied_weights_keys:
            continue
        source, t = what.rest[name], whole[name]
        if source is None:
            raise ValueError(
                f"pack: {name} must be a tensor of the checkpoint, got one that transformers makes of others"
            )
        type = "F32" if t.dim() < 2 or 1 in t.shape or ".ffn_gate_inp." in key else _TYPE_OF[t.dtype]
        lies = dense.written(name, t.new_empty(t.shape, device="meta")).shape

        def parts(name: str = name, type: str = type, source: str = source) -> Iterator[Tensor]:
            yield dense.written(name, what.files.read(source)).to(DTYPE_OF[type]).contiguous()

        plan.tensors[key], plan.rest[key] = (type, tuple(lies)), parts
    for (name, module, form), format in zip(what.found, formats, strict=True):
        down = form.weights(module)["w_down"]
        width, (experts, *sides) = form.width(module), down.shape
        inner = sides[0 if form.transposed else 1]
        type = _TYPE_OF[down.dtype] if format is None else TYPE_OF[format]
        for kind, shape in _shapes(form, experts, inner, width):
            plan.tensors[f"blk.{_number(name)}.ffn_{kind}"] = ("F32" if kind.endswith("bias") else type, shape)
    return plan


def _again(what: Seen, gguf: Gguf, formats: list[str | None]) -> _Plan:
    """Of a GGUF file."""
    said = [gguf.said(key) for key in gguf.metadata if not key.startswith(_NOT_KEPT)]
    plan = _Plan(said, formats, [i for i, format in enumerate(formats) if format is not None])
    changed = set[str]()
    for (name, module, form), keys, format in zip(what.found, what.keys, formats, strict=True):
        if format is None:
            continue
        changed |= {key for key in keys if not key.endswith(".bias")}
        down = form.weights(module)["w_down"]
        inner = down.shape[1 if form.transposed else 2]
        for kind, shape in _shapes(form, len(down), inner, form.width(module)):
            if kind.endswith("weight"):
                plan.tensors[f"blk.{_number(name)}.ffn_{kind}"] = (TYPE_OF[format], shape)
    for key, t in gguf.tensors.items():
        if key not in changed:
            plan.tensors[key] = (t.type, t.shape)
            plan.rest[key] = lambda key=key, t=t: _copied(gguf, key, t)  # type: ignore[misc]
    return plan


def _copied(gguf: Gguf, key: str, t: GgufTensor) -> Iterator[Tensor]:
    for at in range(0, t.nbytes, _CHUNK):
        yield gguf.read(key, at, min(at + _CHUNK, t.nbytes))


def _shapes(form: Any, experts: int, inner: int, width: int) -> list[tuple[str, tuple[int, ...]]]:
    """The tensors of a layer's experts."""
    first = ("gate", "up") if form.activation.gated else ("up",)
    found: list[tuple[str, tuple[int, ...]]] = [(f"{kind}_exps.weight", (experts, inner, width)) for kind in first]
    found.append(("down_exps.weight", (experts, width, inner)))
    if "b_gate_up" in form.names:
        found += [(f"{kind}_exps.bias", (experts, inner)) for kind in first]
        found.append(("down_exps.bias", (experts, width)))
    return found


def _write_experts(
    what: Seen, plan: _Plan, begins: Mapping[str, int], file: BinaryIO, tell: Callable[[int, int], object]
) -> None:
    done, total = count(1), sum(what.layers[i].experts for i in plan.experts)
    store = what.store([(os.dup(handle), name) for handle, name in what.files.files], True)
    try:
        for i in plan.experts:
            form, format = what.found[i][2], plan.formats[i]
            straight = replace(form, straight=True)
            layer = f"blk.{_number(what.found[i][0])}.ffn_"
            for e in range(what.layers[i].experts):
                kind = what.layers[i].kind(e)
                parts = {p.name: torch.empty(1, *p.shape, dtype=p.dtype) for p in kind.parts}
                store.read(i, e, {name: t[0] for name, t in parts.items()})
                weights = straight.outside(form.inside(widened(kind.join(parts), torch.float32)))
                for name, t in _named(weights, form.activation.gated):
                    key = f"{layer}{name}"
                    if key in plan.rest:
                        continue  # a bias of a GGUF file
                    data = _coded(t, plan.tensors[key][0], format)
                    file.seek(begins[key] + e * data.nbytes)
                    file.write(bytes_of(data))
                tell(next(done), total)
    finally:
        store.close()


def _named(weights: Mapping[str, Tensor], gated: bool) -> Iterator[tuple[str, Tensor]]:
    for letter, suffix in (("w", "weight"), ("b", "bias")):
        if f"{letter}_gate_up" in weights:
            first = weights[f"{letter}_gate_up"]
            for kind, t in zip(("gate", "up"), first.chunk(2, 1), strict=True) if gated else [("up", first)]:
                yield f"{kind}_exps.{suffix}", t
            yield f"down_exps.{suffix}", weights[f"{letter}_down"]


def _coded(t: Tensor, type: str, format: str | None) -> Tensor:
    """One expert's bytes."""
    if type in DTYPE_OF:
        return t.to(DTYPE_OF[type]).contiguous()
    assert format is not None
    return quantize(t, format).data


def _number(name: str) -> str:
    """The layer of an experts module."""
    return next(word for word in name.split(".") if word.isdigit())


def _layout(plan: _Plan) -> tuple[dict[str, int], int]:
    """Where each tensor's bytes begin, and the file's size."""
    at = -(-len(_header(plan, dict.fromkeys(plan.tensors, 0))) // _ALIGNED) * _ALIGNED
    begins = {}
    for name, (type, shape) in plan.tensors.items():
        begins[name] = at
        at += -(-GgufTensor(0, type, shape, 0).nbytes // _ALIGNED) * _ALIGNED
    return begins, at


def _header(plan: _Plan, begins: Mapping[str, int]) -> bytes:
    first = min(begins.values(), default=0)
    found = [b"GGUF", struct.pack("<IQQ", 3, len(plan.tensors), len(plan.said)), *plan.said]
    for name, (type, shape) in plan.tensors.items():
        assert shape[-1] % SIZES[type][0] == 0
        dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        found += [_text(name), dims, struct.pack("<IQ", NUMBERS[type], begins[name] - first)]
    return b"".join(found)


def _text(words: str) -> bytes:
    data = words.encode()
    return struct.pack("<Q", len(data)) + data


def _key(key: str, value: bool | int | float | str) -> bytes:
    kind, data = (
        (7, struct.pack("<?", value)) if isinstance(value, bool)
        else (4, struct.pack("<I", value)) if isinstance(value, int)
        else (6, struct.pack("<f", value)) if isinstance(value, float)
        else (8, _text(value))
    )  # fmt: skip
    return _text(key) + struct.pack("<I", kind) + data
