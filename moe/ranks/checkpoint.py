"""Checkpoints that move between folds: written under one, read under any other, with the optimizer's state."""

from __future__ import annotations

import os
import pickle
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from ...dispatch import collectives
from ...dispatch.agreement import together
from ...placement.careful import LONGEST, shown
from .kept import entries_of, pack, unpack
from .metadata import METADATA, metadata_of, sign
from .parallel import is_parallel, parallel_of
from .pieces import Piece, cuts_in, module_entries, pieces, plain
from .reading import CheckedReader

_MODEL, _STATE, _GROUPS, _EXTRA, _OTHER = "model", "optimizer", "optimizer_groups", "extra", "model_other"
_STATE_OTHER = "optimizer_other"  # what an optimizer keeps that is no tensor
Path_ = str | os.PathLike[str]


def save_checkpoint(
    path: Path_, module: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, extra: Any = None
) -> None:
    """Writes parameters, buffers, the optimizer's state and `extra` into the folder `path`.

    `extra` is None, bools, numbers, text, bytes, tensors, arrays of numbers, or lists, tuples and dicts of these, of
    which keys are text or numbers; of many ranks that of rank 0 is kept. Its tensors come back on the CPU. All that is
    no tensor is kept as JSON: reading a checkpoint runs nothing.

    Of a parallelized module every rank writes its own part, into a folder that all of them see, and all must come by;
    else this process alone writes. What
    stands at `path` is replaced only when the new checkpoint is whole: an interrupted save loses nothing.

    The format is torch.distributed.checkpoint's. Keys are "model/NAME" and "optimizer/FIELD/NAME" with the names and
    the shapes that one process would have, without torch.compile's `_orig_mod`; a weight with gate and up rows is kept
    as NAME.0 and NAME.1, but for that of a shared expert, which is one tensor. A LoRA matrix on experts is kept as
    [E, r, in or out].

    Raises, on every rank, ValueError where `extra`, or what module and optimizer keep, has something else in it, where
    the optimizer holds parameters that the module has not or keeps state of another shape for experts (Adafactor), or
    experts were given a dispatcher by hand; OSError and torch's CheckpointException where the folder cannot be written
    (what was there before is still there).
    """
    final = Path(path).absolute()
    partial, old = final.with_name(f"{final.name}.partial"), final.with_name(f"{final.name}.old")
    ranks = _ranks_of(module)
    first = ranks is None or dist.get_rank() == 0

    def begin() -> dict[str, Any]:
        state = _state_of(module, optimizer)
        packed = pack(_EXTRA, extra, "save_checkpoint: extra")
        if first:
            state |= packed
            final.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
        return state

    def end() -> None:
        sign(partial)
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
            final.rename(old)
        partial.rename(final)
        shutil.rmtree(old, ignore_errors=True)

    state = together(begin, ranks)
    if optimizer is not None:
        groups = _groups_of(module, optimizer)
        state |= together(lambda: pack(_GROUPS, groups, "save_checkpoint: optimizer.param_groups"), ranks)
    with _quietly(ranks):
        dcp.save(state, checkpoint_id=partial, no_dist=ranks is None)
    together(end if first else lambda: None, ranks)


def load_checkpoint(
    path: Path_, module: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, trusted: bool = False
) -> Any:
    """Reads into module and optimizer, in place, what save_checkpoint wrote under any fold; returns its `extra`.

    The optimizer may be a new one: its state is made. Its groups must hold the same parameters as those saved; their
    settings (learning rate, ...) are taken over.

    Nothing in the files is run, and all of them are checked first: sizes, paths, checksums (docs/trust.md).
    `trusted=True` leaves all of this to torch, which runs pickles: for a checkpoint of your own, written when extras
    were pickles.

    Raises FileNotFoundError where `path` holds no checkpoint or a file of it is missing; ValueError, in at most 300
    characters, before anything is changed, where a file is damaged or holds a pickle, where the checkpoint lacks a
    parameter or buffer of the module or has it in another shape, or the optimizer's groups differ; OSError where the
    disk fails. All on every rank.

    >>> headgate.save_checkpoint("step-100", model, optimizer, extra={"step": 100})  # under one fold
    >>> headgate.load_checkpoint("step-100", other_model, other_optimizer)           # under another
    {'step': 100}
    """
    ranks = _ranks_of(module)
    source, state = together(lambda: _begin(path, module, optimizer, trusted), ranks)
    values = _values(source, module, optimizer)
    if optimizer is None:
        _read(state, source)
        return _end(module, values)
    groups, mine = values[_GROUPS], _groups_of(module, optimizer)
    together(lambda: _check_groups(mine, groups), ranks)
    fresh = _fresh_state(module, optimizer, source.saved, values)
    cuts = cuts_in(module)
    for parameter, name in _named(module, optimizer):
        for field, value in fresh.get(parameter, {}).items():
            if isinstance(value, Tensor) and f"{_STATE_OTHER}/{field}/{name}" not in values:
                state |= dict(_optimizer_entries(cuts, name, parameter, field, value))
    _read(state, source)
    for parameter, _ in _named(module, optimizer):
        optimizer.state.pop(parameter, None)
        if parameter in fresh:
            optimizer.state[parameter] = fresh[parameter]
    for group, settings in zip(optimizer.param_groups, groups, strict=True):
        group.update({k: v for k, v in settings.items() if k not in ("names", "params")})
    return _end(module, values)


@dataclass(frozen=True)
class _Source:
    """A checkpoint that was found. `metadata`: checked; None: it is trusted."""

    folder: Path
    saved: Mapping[str, Any]
    metadata: Metadata | None
    ranks: dist.ProcessGroup | None


def _begin(
    path: Path_, module: nn.Module, optimizer: torch.optim.Optimizer | None, trusted: bool
) -> tuple[_Source, dict[str, Any]]:
    """(the checkpoint, this rank's tensors to be filled from it), all checked."""
    folder = Path(path).absolute()
    if not folder.exists() and folder.with_name(f"{folder.name}.old").exists():  # a save died between its two renames
        folder = folder.with_name(f"{folder.name}.old")
    if not (folder / METADATA).exists():
        raise FileNotFoundError(f"load_checkpoint: path must be a folder that save_checkpoint wrote, got {path}")
    metadata = None if trusted else metadata_of(folder)
    saved = (metadata or dcp.FileSystemReader(folder).read_metadata()).state_dict_metadata
    state = {f"{_MODEL}/{key}": t for key, t in module_entries(module)}
    _check_fits({**state, _EXTRA: None, _OTHER: None}, saved, path)
    if optimizer is not None:
        _named(module, optimizer)
        if _GROUPS not in saved:
            raise ValueError(f"load_checkpoint: path must hold an optimizer's state, got one without: {path}")
    return _Source(folder, saved, metadata, _ranks_of(module)), state


def _values(source: _Source, module: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """What the checkpoint holds for this rank that is no tensor, by key."""
    keys = [_EXTRA, _OTHER]
    if optimizer is not None:
        names = {name for _, name in _named(module, optimizer)}
        keys += [_GROUPS, *(k for k in source.saved if _is_other(k, source.saved) and k.split("/", 2)[2] in names)]
    kept: dict[str, Any] = {}
    for key in keys:
        for name in entries_of(key, source.saved):
            there = source.saved[name]
            tensor = isinstance(there, TensorStorageMetadata)
            kept[name] = torch.empty(there.size, dtype=there.properties.dtype) if tensor else None
    _read(kept, source)

    def values() -> dict[str, Any]:
        try:
            found = {key: _value(key, kept) for key in keys}
            if not isinstance(found[_OTHER], dict):
                raise ValueError(f"{_OTHER} must be a dict, got {type(found[_OTHER]).__name__}")
            return found
        except ValueError as error:
            raise ValueError(f"load_checkpoint: {error} in {source.folder}"[:LONGEST]) from error

    return together(values, source.ranks)


def _is_other(key: str, saved: Mapping[str, Any]) -> bool:
    """Whether it is the state of an optimizer that is no tensor: JSON, or a pickle where older ones are trusted."""
    pickled = key.startswith(f"{_STATE}/") and isinstance(saved[key], BytesStorageMetadata)
    return pickled or (key.startswith(f"{_STATE_OTHER}/") and saved[key].properties.dtype == torch.uint8)


def _value(key: str, kept: Mapping[str, Any]) -> Any:
    if isinstance(kept[key], Tensor):
        return unpack(key, kept)
    return pickle.loads(kept[key]) if key in (_EXTRA, _OTHER, _GROUPS) else kept[key]  # trusted, or not read at all


def _end(module: nn.Module, values: Mapping[str, Any]) -> Any:
    """Gives the module what is no tensor; the checkpoint's extra."""
    other = values[_OTHER]
    if other:
        own = {plain(name): name for name in module.state_dict()}
        module.load_state_dict({own.get(name, name): value for name, value in other.items()}, strict=False)
    return values[_EXTRA]


def _ranks_of(module: nn.Module) -> dist.ProcessGroup | None:
    """The ranks that have the module together, or None where this process has it to itself."""
    return dist.group.WORLD if any(is_parallel(part) for part in module.modules()) else None


def _read(state: dict[str, Any], source: _Source) -> None:
    reader = None if source.metadata is None else CheckedReader(source.folder, source.metadata)
    try:
        with _quietly(source.ranks):
            dcp.load(state, checkpoint_id=source.folder, storage_reader=reader, no_dist=source.ranks is None)
    except CheckpointException as error:
        if reader is None:
            raise
        rank, cause = min(((rank, e[0]) for rank, e in error.failures.items()), key=lambda found: found[0])
        where = "" if source.ranks is None else f" (on rank {rank})"
        if isinstance(cause, OSError):
            kind = FileNotFoundError if isinstance(cause, FileNotFoundError) else OSError
            raise kind(f"load_checkpoint: {cause}{where}") from error
        ours = str(cause).startswith("load_checkpoint: ")
        words = str(cause) if ours else f"load_checkpoint: {source.folder} must be undamaged, got {shown(cause, 120)}"
        raise ValueError(f"{words[: LONGEST - len(where)]}{where}") from error


@contextmanager
def _quietly(ranks: dist.ProcessGroup | None) -> Iterator[None]:
    """Without torch's word that it assumes a single process: that is what was asked for."""
    with warnings.catch_warnings():
        if ranks is None:
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


# --- what is kept under which key ---------------------------------------------------------------------------------


def _optimizer_entries(
    cuts: Mapping[str, Piece], name: str, parameter: Tensor, field: str, value: Any
) -> Iterator[tuple[str, Any]]:
    alike = isinstance(value, Tensor) and value.shape == parameter.shape
    if name in cuts and isinstance(value, Tensor) and value.dim() and not alike:
        raise ValueError(
            f"checkpoint: optimizer must keep numbers or tensors of the parameter's shape for experts, got {field} "
            f"{tuple(value.shape)} for {name} {tuple(parameter.shape)}"
        )
    if name in cuts and alike:
        for key, piece in pieces(name, value, cuts[name]):
            yield f"{_STATE}/{field}/{key}", piece
    elif isinstance(value, Tensor):
        yield f"{_STATE}/{field}/{name}", value
    else:
        yield from pack(f"{_STATE_OTHER}/{field}/{name}", value, f"save_checkpoint: optimizer.state.{field}").items()


def _state_of(module: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    state: dict[str, Any] = {f"{_MODEL}/{key}": t for key, t in module_entries(module)}
    other = {plain(k): v for k, v in module.state_dict().items() if not isinstance(v, Tensor)}
    state |= pack(_OTHER, other, "save_checkpoint: module.state_dict()")
    if optimizer is None:
        return state
    cuts = cuts_in(module)
    for parameter, name in _named(module, optimizer):
        for field, value in optimizer.state.get(parameter, {}).items():
            state |= dict(_optimizer_entries(cuts, name, parameter, field, value))
    return state


def _named(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[nn.Parameter, str]]:
    names = {parameter: plain(name) for name, parameter in module.named_parameters()}
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in held:
        if parameter not in names:
            raise ValueError(
                "checkpoint: optimizer must hold parameters of the module only, got another of shape "
                f"{tuple(parameter.shape)}: was it made before parallelize?"
            )
    return [(parameter, names[parameter]) for parameter in held]


def _groups_of(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The settings of the optimizer's groups, and the names of their parameters on all pipeline stages."""
    names = dict(_named(module, optimizer))
    held = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
    fold = next((parallel_of(part).fold for part in module.modules() if is_parallel(part)), None)
    if fold is not None and fold.size("pp") > 1:
        stages = collectives.all_gather_objects(held, fold.group("pp"))
        held = [[name for stage in group for name in stage] for group in zip(*stages, strict=True)]
    settings = ({k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups)
    return [{**kept, "names": sorted(group)} for kept, group in zip(settings, held, strict=True)]


# --- reading ---------------------------------------------------------------------------------------------------------


def _check_fits(state: Mapping[str, Any], saved: Mapping[str, Any], path: Path_) -> None:
    for key, here in state.items():
        what = key.partition("/")[2] or key
        if key not in saved:
            raise ValueError(f"load_checkpoint: path must hold {what}, got a checkpoint without it: {path}")
        there = getattr(saved[key], "size", None)
        if isinstance(here, Tensor) and there is not None and tuple(there) != tuple(here.shape):
            raise ValueError(f"load_checkpoint: {what} must be {tuple(here.shape)}, got {tuple(there)} from {path}")


def _check_groups(here: list[dict[str, Any]], saved: list[dict[str, Any]]) -> None:
    if not isinstance(saved, list) or not all(isinstance(g, dict) and _is_texts(g.get("names")) for g in saved):
        raise ValueError(f"load_checkpoint: optimizer_groups must be dicts with names, got {shown(saved)}")
    mine, theirs = [g["names"] for g in here], [g["names"] for g in saved]
    if mine != theirs:
        odd = sorted({n for g in mine for n in g} ^ {n for g in theirs for n in g})
        raise ValueError(
            f"load_checkpoint: optimizer must have the groups saved ({len(theirs)} of "
            f"{', '.join(str(len(g)) for g in theirs)} parameters), got {len(mine)} of "
            f"{', '.join(str(len(g)) for g in mine)}" + (f"; only in one of them: {', '.join(odd[:5])}" if odd else "")
        )


def _is_texts(x: object) -> bool:
    return isinstance(x, list) and all(isinstance(name, str) for name in x)


def _fresh_state(
    module: nn.Module, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], values: Mapping[str, Any]
) -> dict[nn.Parameter, dict[str, Any]]:
    """The optimizer's state for every field that the checkpoint has: tensors in this fold's shapes, to be filled, and
    the values that are no tensors."""
    cuts, fresh = cuts_in(module), dict[nn.Parameter, dict[str, Any]]()
    on_device = any(g.get("capturable") or g.get("fused") for g in optimizer.param_groups)
    fields = sorted({key.split("/")[1] for key in saved if key.startswith((f"{_STATE}/", f"{_STATE_OTHER}/"))})
    for parameter, name in _named(module, optimizer):
        keys = [name, f"{name}.0"] if name in cuts and cuts[name].cut.blocks > 1 else [name]
        state: dict[str, Any] = {}
        for field in fields:
            there = next((saved[k] for k in (f"{_STATE}/{field}/{key}" for key in keys) if k in saved), None)
            if isinstance(there, TensorStorageMetadata):
                dtype, alike = there.properties.dtype, name in cuts or there.size == parameter.shape
                if there.size and alike:
                    state[field] = torch.zeros_like(parameter, dtype=dtype)
                else:
                    device = parameter.device if on_device or there.size else "cpu"
                    state[field] = torch.zeros(there.size, dtype=dtype, device=device)
            other = next((k for k in (f"{t}/{field}/{name}" for t in (_STATE_OTHER, _STATE)) if k in values), None)
            if other is not None:
                state[field] = values[other]
        if state:
            fresh[parameter] = state
    return fresh
