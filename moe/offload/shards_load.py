"""A folder of safetensors files as `load` sees it: the model without a weight, its experts, and what fills the rest."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.chip import say_once
from ...placement.careful import fault
from ..hf import swap
from ..hf.conversion import Conversion, Source, conversion_of
from ..hf.pretrained import Tell, blank_model, fill_rest, missing_of, quantization_in
from .checkpoint import Checkpoint
from .checkpoint import Stored as Plain
from .few_bits import FewBits, Made, Translated
from .forms import Form, Found, survey
from .kinds import Layer
from .reads import DTYPES
from .shards import WHAT_TO_DO, Laid, Run, laid_out

_WHO = "load"
Make = Callable[[Tensor], Tensor]


@dataclass
class Stored:
    """A layer's experts: weights [E, ...] without a number; each part as it lies; what makes a part of an expert's
    bytes where it is not they themselves. `turned`: matrices are [out, in], whatever the module has."""

    weights: dict[str, Any] = field(default_factory=dict)
    laid: dict[str, Laid] = field(default_factory=dict)
    made: dict[str, Make] = field(default_factory=dict)
    turned: bool = False

    def layer(self, name: str) -> Layer:
        experts = next(iter(self.weights.values())).shape[0]
        return Layer.of(name, (range(experts), self.weights))


@dataclass(frozen=True)
class ShardsModel:
    """The model on the meta device, swapped; its experts modules `found` and `skipped`; each one's experts `stored`;
    `fill` reads all the rest. `rest`: each parameter of it -> the tensor that it is, or None where more is done than
    taking it."""

    model: nn.Module
    found: Found
    skipped: Mapping[str, str]
    stored: list[Stored]
    fill: Callable[[Tell], None]
    rest: Mapping[str, str | None]


def model_of(checkpoint: Checkpoint) -> ShardsModel:
    """Raises OSError and ValueError where a file is not what it should be, or model and tensors do not go together,
    before a weight is read."""
    quantization = quantization_in(checkpoint.folder)
    there = Translated(checkpoint, quantization)
    if quantization is not None:
        checkpoint.note(json.dumps(quantization, sort_keys=True))
    dtypes = [DTYPES[t.dtype] for t in checkpoint.tensors.values()]
    model = blank_model(checkpoint.folder, next((d for d in dtypes if d.is_floating_point and d.itemsize > 1), None))
    swap.replace(model)
    found, skipped = survey(model)
    conversion = conversion_of(model, there.tensors)
    _check_rest(model, conversion, there)
    stored = [experts_in(one, conversion, there) for one in found]
    found = [(n, m, replace(f, turned=one.turned)) for (n, m, f), one in zip(found, stored, strict=True)]
    left = {f"{name}.{theirs}" for name, _, form in found for theirs in form.names.values()}
    experts = {key for name in left for keys in conversion.sources[name].keys.values() for key in keys}
    taken = {key for source in conversion.sources.values() for keys in source.keys.values() for key in keys}
    rest = [key for key in there.tensors if key in taken - experts]
    wide = [key for key in rest if isinstance(there.tensors[key], FewBits)]
    dtype: torch.dtype = model.dtype  # type: ignore[assignment]

    def fill(tell: Tell) -> None:
        if wide:
            why = f"{len(wide)} weights outside of the experts are stored in few bits ({wide[0]})"
            say_once(_WHO, why, f"these weights widened to {str(dtype)[6:]}, once")
        fill_rest(model, conversion, rest, lambda key: there.read(key, dtype), left, tell)

    plain: dict[str, str | None] = dict.fromkeys(conversion.made - left)
    for name, source in conversion.sources.items():
        if name in plain and not source.operations:
            ((key,),) = source.keys.values()
            plain[name] = None if isinstance(there.tensors[key], FewBits) else key
    return ShardsModel(model, found, skipped, stored, fill, plain)


def _check_rest(model: nn.Module, conversion: Conversion, there: Translated) -> None:
    """Raises ValueError where a tensor is missing, or one that is taken as it lies has another shape."""
    folder, missing = there.checkpoint.folder, missing_of(model, conversion)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise fault(_WHO, folder, f"must have a tensor for each weight, got none for {missing[0]}{more}")
    wanted = model.state_dict()
    for name, source in conversion.sources.items():
        for key in (key for keys in source.keys.values() for key in keys if wanted[name].is_floating_point()):
            t = there.tensors[key]
            if not isinstance(t, FewBits) and (not DTYPES[t.dtype].is_floating_point or DTYPES[t.dtype].itemsize < 2):
                rule = f"must have {key} in bf16, fp16 or fp32, or with a quantization_config, got {t.dtype}"
                raise fault(_WHO, folder, rule)
        if not source.operations:
            several = sorted(key for keys in source.keys.values() for key in keys)
            if len(several) > 1:
                raise fault(_WHO, folder, f"must have one tensor for {name}, got {several[0]} and {several[1]}")
            for key in several:
                want, got = tuple(wanted[name].shape), there.tensors[key]
                straight = isinstance(got, FewBits) and got.turned and (got.shape[0], *got.shape[:0:-1]) == want
                if got.shape != want and not straight:
                    raise fault(_WHO, folder, f"must have {key} of shape {list(want)}, got {list(got.shape)}")


def experts_in(one: tuple[str, nn.Module, Form], conversion: Conversion, there: Translated) -> Stored:
    """The experts of a layer. Raises ValueError where one is of another shape or dtype than the model's, or made in a
    way that is not taken."""
    name, module, form = one
    stored, few = Stored(), set[bool]()
    for ours, parameter in form.weights(module).items():
        whole = f"{name}.{form.names[ours]}"
        source = conversion.sources.get(whole)
        if source is None:
            why = "transformers makes it together with others"
            raise ValueError(f"load: {whole} must lie in the checkpoint for itself, {why}: {WHAT_TO_DO}")
        if len({len(keys) for keys in source.keys.values()}) > 1 or len(source.keys) < len(source.patterns):
            raise fault(
                _WHO, there.checkpoint.folder, f"must have as many tensors of each kind for {whole}, got {source}"
            )
        kinds = {isinstance(there.tensors[key], FewBits) for keys in source.keys.values() for key in keys}
        few |= kinds if ours.startswith("w_") else set()
        if kinds == {True}:
            _add_few(stored, ours, whole, parameter, source, there, form)
        elif kinds == {False}:
            _add_wide(stored, ours, whole, parameter, source, there)
    if len(few) > 1:
        raise fault(_WHO, there.checkpoint.folder, f"must have all matrices of {name} in few bits or none, got some")
    return stored


# ---- in the model's own dtype ----------------------------------------------------------------------------------------


def _add_wide(
    stored: Stored, ours: str, whole: str, parameter: nn.Parameter, source: Source, there: Translated
) -> None:
    folder = there.checkpoint.folder
    try:
        laid: Laid | str = laid_out(source, there.checkpoint)
        make = None
        if isinstance(laid, str):
            found = _converted(source, there.checkpoint, parameter)
            laid, make = found if found is not None else (laid, None)
    except ValueError as error:
        raise fault(_WHO, folder, f"must have for {whole} {error}") from error
    if isinstance(laid, str):
        raise ValueError(
            f"load: {whole} must lie in the checkpoint as bytes that can be read in place, {laid}: {WHAT_TO_DO}"
        )
    if laid.shape != tuple(parameter.shape):
        raise fault(_WHO, folder, f"must make {whole} {list(parameter.shape)}, got {list(laid.shape)} from {source}")
    if DTYPES[laid.dtype] != parameter.dtype:
        raise ValueError(
            f"load: {whole} must be stored in the model's {parameter.dtype}, got {laid.dtype}: {WHAT_TO_DO}"
        )
    stored.weights[ours], stored.laid[ours] = torch.empty_like(parameter, device="meta"), laid
    if make is not None:
        stored.made[ours] = make


# transformers' operations that treat each expert for itself, but along which dimension they must not go
_EACH_FOR_ITSELF = {
    "MergeModulelist": (),
    "Concatenate": ("dim",),
    "Transpose": ("dim0", "dim1"),
    "Interleave": ("dim",),
}


def _converted(source: Source, checkpoint: Checkpoint, parameter: nn.Parameter) -> tuple[Laid, Make | None] | None:
    """The bytes of each expert, and transformers' own operations on them, where these do with all experts what they do
    with each."""
    stored = {pattern: [checkpoint.tensors[key] for key in keys] for pattern, keys in source.keys.items()}
    kinds = {(t.shape, t.dtype) for some in stored.values() for t in some}
    stacked = not any(type(op).__name__ == "MergeModulelist" for op in source.operations)
    operations = [
        op for op in source.operations
        if not (getattr(op, "check_dims", False) and {shape for shape, _ in kinds} == {tuple(parameter.shape)})
    ]  # fmt: skip
    for at, op in enumerate(operations):
        axes = [getattr(op, name) for name in _EACH_FOR_ITSELF.get(type(op).__name__, ())]
        first = type(op).__name__ == "MergeModulelist" and at == 0 and op.dim == 0
        if not first and (not axes or any(type(n) is not int or n < 1 for n in axes)):
            return None
    if len({dtype for _, dtype in kinds}) != 1 or len({len(some) for some in stored.values()}) != 1:
        return None
    if stacked and any(len(some) != 1 or len(some[0].shape) != 3 for some in stored.values()):
        return None
    experts = next(iter(stored.values()))[0].shape[0] if stacked else len(next(iter(stored.values())))
    if any(stacked and some[0].shape[0] != experts for some in stored.values()) or not experts:
        return None
    if any(len({t.shape for t in some}) != 1 for some in stored.values()):
        return None
    dtype = next(iter(stored.values()))[0].dtype
    shapes = [some[0].shape[1:] if stacked else some[0].shape for some in stored.values()]
    sizes = [prod(shape) * DTYPES[dtype].itemsize for shape in shapes]
    runs: list[Run] = []
    for e in range(experts):
        for some, size in zip(stored.values(), sizes, strict=True):
            t = some[0] if stacked else some[e]
            runs.append(Run(t.file, t.offset + (e * size if stacked else 0), size))
    if not operations and stacked and len(stored) == 1:
        return Laid((experts, *shapes[0]), dtype, tuple(runs)), None
    names = list(stored)

    def make(data: Tensor) -> Tensor:
        parts = [t.view(DTYPES[dtype]).view(shape) for t, shape in zip(data.split(sizes), shapes, strict=True)]
        values: dict[str, Any] = {n: t[None] if stacked else [t] for n, t in zip(names, parts, strict=True)}
        for op in operations:
            values = _applied(op, values, source.patterns)
        (value,) = values.values()
        return value[0]

    empty = make(torch.empty(sum(sizes), dtype=torch.uint8, device="meta"))
    return Laid((experts, *empty.shape), dtype, tuple(runs)), make


def _applied(op: Any, values: dict[str, Any], patterns: Sequence[str]) -> dict[str, Any]:
    """An operation of transformers on one expert, [1, ...]."""
    match type(op).__name__:
        case "MergeModulelist":
            return {name: torch.stack(some) for name, some in values.items()}
        case "Transpose":
            return {name: t.transpose(op.dim0, op.dim1) for name, t in values.items()}
        case "Concatenate":
            return {"": torch.cat([values[p] for p in patterns if p in values], op.dim)}
        case _:
            (name,) = values
            return op.convert(values, [name], [name])


# ---- in few bits -----------------------------------------------------------------------------------------------------


def _add_few(
    stored: Stored, ours: str, whole: str, parameter: nn.Parameter, source: Source, there: Translated, form: Form
) -> None:
    folder = there.checkpoint.folder
    pieces: list[list[FewBits]] = [[there.tensors[key] for key in keys] for keys in source.keys.values()]  # type: ignore[misc]
    kinds = [
        (p.format, p.block, p.data.shape, p.data.dtype, p.scale.shape, p.scale.dtype) for some in pieces for p in some
    ]
    if len(set(kinds)) > 1:
        raise fault(_WHO, folder, f"must have one format and shape for all of {whole}, got {kinds[0]} and others")
    first = pieces[0][0]
    stacked = len(first.data.shape) == 3
    turned = first.turned if stacked else _turned(source)
    if turned is None or (stacked and (source.operations or len(pieces) > 1)):
        why = f"transformers makes it by {source.operations!r}"
        raise ValueError(f"load: {whole} must lie in few bits as matrices [out, in], {why}: {WHAT_TO_DO}")
    experts = first.data.shape[0] if stacked else len(pieces[0])
    weight = first.like(experts, len(pieces))
    shape = (experts, *weight.shape[:0:-1]) if turned else tuple(weight.shape)
    if shape != tuple(parameter.shape) or turned != form.transposed:
        raise fault(_WHO, folder, f"must make {whole} {list(parameter.shape)}, got {list(shape)} from {source}")
    stored.turned = turned
    stored.weights[ours] = weight
    for part in ("data", "scale"):
        of_expert = [[getattr(some[e], part) for some in pieces] for e in range(1 if stacked else experts)]
        stored.laid[f"{ours}.{part}"], make = _together(of_expert, experts, there.checkpoint)
        if make is not None:
            stored.made[f"{ours}.{part}"] = make


def _turned(source: Source) -> bool | None:
    """Whether experts [out, in] are turned on their way into the model; None where more is done than stacking, turning
    and putting one below the other."""
    turned = False
    for at, op in enumerate(source.operations):
        name = type(op).__name__
        if name == "Transpose" and at and {op.dim0, op.dim1} == {1, 2}:
            turned = not turned
        elif not (name == "MergeModulelist" and op.dim == 0 and not at) and not (
            name == "Concatenate" and op.dim == (2 if turned else 1)
        ):
            return None
    return turned if source.operations else None


def _together(of_expert: Sequence[Sequence[Made]], experts: int, checkpoint: Checkpoint) -> tuple[Laid, Make | None]:
    """A part of a weight, of pieces one below the other, for each expert; or, of one for all, of tensors [E, ...]."""
    stacked = len(of_expert) < experts

    def cut(t: Plain) -> bool:
        return stacked and t.shape[:1] == (experts,)  # else it is all experts' alike, as one scale

    runs: list[list[Run]] = [[] for _ in range(experts)]
    for e, pieces in enumerate(of_expert):
        for key in (key for piece in pieces for key in piece.keys):
            t = checkpoint.tensors[key]
            for i in range(experts) if stacked else (e,):
                size = t.nbytes // experts if cut(t) else t.nbytes
                runs[i].append(Run(t.file, t.offset + i * size * cut(t), size))
    pieces = of_expert[0]
    flat = tuple(run for some in runs for run in some)
    laid = Laid((experts, sum(run.nbytes for run in runs[0])), "U8", flat)
    if all(piece.make is None for piece in pieces):
        return laid, None
    kinds = []  # of each piece: (bytes, dtype, shape) of each of its tensors
    for piece in pieces:
        tensors = [checkpoint.tensors[key] for key in piece.keys]
        shapes = [t.shape[1:] if cut(t) else t.shape for t in tensors]
        kinds.append(
            [(prod(s) * DTYPES[t.dtype].itemsize, DTYPES[t.dtype], s) for t, s in zip(tensors, shapes, strict=True)]
        )
    sizes = [size for kind in kinds for size, _, _ in kind]

    def make(data: Tensor) -> Tensor:
        parts, made = iter(data.split(sizes)), []
        for piece, kind in zip(pieces, kinds, strict=True):
            tensors = [next(parts).view(dtype).view(shape) for _, dtype, shape in kind]
            t = piece.make(*tensors) if piece.make is not None else tensors[0].reshape(-1).view(piece.dtype)
            made.append(t.reshape(piece.shape[-2:]))
        return torch.cat(made)

    return laid, make
