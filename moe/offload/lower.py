"""The lower tier of a model's experts, with everything in it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ...kernels.quantized import BLOCKS, Quantized, quantize
from ..hf.accelerated import keeps_weights
from .checksums import Verify
from .file import FileStore
from .forms import Found
from .host import HostStore, Store
from .kinds import Layer, Weights, split

FILE = "experts.safetensors"
# module name -> the format of each expert; or one format for all experts
Formats = Mapping[str, Sequence[str | None]] | str

Groups = list[list[tuple[list[int], str | None]]]  # of each layer, (experts, their format)
# bytes for each weight that `quantize` takes at most: half in tensors, half that the allocator still keeps of others
_BETWEEN = {
    "fp8": 48, "int8": 40, "int4": 40, "uint4": 64, "mxfp4": 104, **dict.fromkeys(BLOCKS, 44), "gguf_mxfp4": 64,
}  # fmt: skip


def groups_of(found: Found, formats: Formats) -> Groups:
    """Of each layer, the experts of each format, rising."""
    if isinstance(formats, str):
        formats = {name: [formats] * len(form.weights(module)["w_down"]) for name, module, form in found}
    if not isinstance(formats, Mapping):
        raise TypeError(f"offload: formats must be a format, or a mapping of modules' names, got {formats!r}")
    unknown = sorted(formats.keys() - {name for name, _, _ in found})
    if unknown:
        raise ValueError(f"offload: formats must be for modules of experts that are moved, got {', '.join(unknown)}")
    groups = []
    for name, module, form in found:
        experts = len(form.weights(module)["w_down"])
        if isinstance(formats.get(name), str):
            raise TypeError(f"offload: formats must be a list for {name}, one of each expert, got {formats[name]!r}")
        of = list(formats.get(name, [None] * experts))
        if len(of) != experts:
            raise ValueError(
                f"offload: formats must have one for each of the {experts} experts of {name}, got {len(of)}"
            )
        if form.layout["transposed"] and any(of):
            raise ValueError(f"offload: formats must be None for transposed weights, got some for {name}")
        kinds = dict.fromkeys(of)
        groups.append([([e for e in range(experts) if of[e] == kind], kind) for kind in kinds])
    return groups


def coded(weights: Mapping[str, Tensor], format: str | None) -> Weights:
    """Weights [n, ...] in a format; biases stay as they are."""
    if format is None:
        return weights
    return {name: _quantized(w, format) if name.startswith("w_") else w for name, w in weights.items()}


def room_for(weights: Mapping[str, Tensor], format: str | None) -> int:
    """Bytes that one expert of weights [E, ...] takes on its way into a format: as it is, as it becomes, and what
    `quantize` takes between the two."""
    one = {name: w[:1] for name, w in weights.items()}
    became = 0 if format is None else sum(t.nbytes for t in split(coded(one, format)).values())
    largest = max(w.numel() for name, w in one.items() if name.startswith("w_"))
    return sum(w.nbytes for w in one.values()) + became + (0 if format is None else _BETWEEN[format] * largest)


def _quantized(w: Tensor, format: str) -> Quantized:
    """Expert by expert: on its way `quantize` takes several times the memory of what it is given."""
    if w.is_meta or len(w) == 1:
        return quantize(w, format)
    first = quantize(w[:1], format)
    data, scale = (t.new_empty(len(w), *t.shape[1:]) for t in (first.data, first.scale))
    for e in range(len(w)):
        one = quantize(w[e : e + 1], format)
        data[e], scale[e] = one.data[0], one.scale[0]
    return Quantized(data, scale, format, first.block)


def like(weights: Mapping[str, Tensor], n: int, format: str | None) -> Weights:
    """What `coded` would give of n experts, without a number in it."""
    empty = {name: torch.empty((n, *w.shape[1:]), dtype=w.dtype, device="meta") for name, w in weights.items()}
    return coded(empty, format)


def layers_of(found: Found, groups: Groups) -> list[Layer]:
    """What the experts are, without a number."""
    return [
        Layer.of(name, *((experts, like(form.shapes(module), len(experts), format)) for experts, format in parts))
        for (name, module, form), parts in zip(found, groups, strict=True)
    ]


def pieces_of(whole: Mapping[str, Tensor], groups: Sequence[tuple[list[int], str | None]]) -> list[Weights]:
    """A layer's weights [E, ...] as the weights of each group."""
    experts = len(whole["w_down"])
    return [
        coded(whole if len(some) == experts else {n: w[some] for n, w in whole.items()}, format)
        for some, format in groups
    ]


def check_there(model: nn.Module, found: Found) -> None:
    """Raises ValueError where weights of a model are not where they can be taken from: with accelerate, or on the meta
    device, other than all experts."""
    kept = next((name for name, module in model.named_modules() if keeps_weights(module)), None)
    if kept is not None:
        raise ValueError(
            f"offload: model must have its weights in memory, got {kept}, whose weights accelerate keeps elsewhere "
            "(device_map, cpu_offload or disk_offload): load the model without it, or call "
            "accelerate.hooks.remove_hook_from_module(model, recurse=True) first where they are on the host"
        )
    experts = {p: f"{name}.{form.names[n]}" for name, module, form in found for n, p in form.weights(module).items()}
    absent = [name for p, name in experts.items() if p.is_meta]
    if len(absent) not in (0, len(experts)):
        rule = f"all on the meta device or none, got {absent[0]} there and others not"
        raise ValueError(f"offload: experts must be {rule}: load all weights, or use headgate.load")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta and tensor not in experts:
            rule = f"in memory but for experts, got {name} on the meta device"
            raise ValueError(f"offload: weights and buffers must be {rule}: load them first, or use headgate.load")


def store_of(
    found: Found, layers: Sequence[Layer], groups: Groups, disk: str | os.PathLike[str] | None, device: torch.device,
    *, page_cache: bool, verify: Verify,
) -> Store:  # fmt: skip
    """The lower tier with everything in it; a file that is there already where experts are on the meta device."""
    absent = any(form.weights(module)["w_down"].is_meta for _, module, form in found)

    def weights(i: int) -> list[Weights]:
        _, module, form = found[i]
        whole = {name: p.detach() for name, p in form.weights(module).items()}
        return pieces_of(whole, groups[i])

    if disk is None:
        if absent:
            raise ValueError(f"offload: disk must be a folder with {FILE} for experts on the meta device, got None")
        return HostStore(layers, weights, device)
    folder, path = Path(disk), Path(disk) / FILE
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"offload: disk must be a folder, got the file {folder}")
    if absent:
        if not path.exists():
            raise ValueError(f"offload: disk must be a folder with {FILE} for experts on the meta device, got {folder}")
        return FileStore(path, layers, page_cache=page_cache, verify=verify)
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileStore.write(path, layers, weights, page_cache=page_cache, verify=verify)
