"""Checkpoints that move between folds: written under one, read under any other, with the optimizer's state."""

from __future__ import annotations

import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from ...dispatch import collectives
from ...dispatch.agreement import together
from ..adapters import factors_of, wrappers_in
from ..experts import Experts
from ..hf.experts import cuts_of_experts, is_decorated
from ..hf.experts import refusal as refused
from ..shards import Cut, Shards, shards_of
from ..shared import SharedExpert
from .chunks import Chunks
from .parallel import is_parallel, parallel_of

_MODEL, _STATE, _GROUPS, _EXTRA, _OTHER = "model", "optimizer", "optimizer_groups", "extra", "model_other"
Path_ = str | os.PathLike[str]


def save_checkpoint(
    path: Path_, module: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, extra: Any = None
) -> None:
    """Writes parameters, buffers, the optimizer's state and `extra` (anything that pickles) into the folder `path`.

    Of a parallelized module every rank writes its own part, into a folder that all of them see, and all must come by;
    else this process alone writes. What
    stands at `path` is replaced only when the new checkpoint is whole: an interrupted save loses nothing.

    The format is torch.distributed.checkpoint's. Keys are "model/NAME" and "optimizer/FIELD/NAME" with the names and
    the shapes that one process would have, without torch.compile's `_orig_mod`; a weight with gate and up rows is kept
    as NAME.0 and NAME.1, but for that of a shared expert, which is one tensor. A LoRA matrix on experts is kept as
    [E, r, in or out].

    Raises, on every rank, ValueError where the optimizer holds parameters that the module has not or keeps state of
    another shape for experts (Adafactor), or experts were given a dispatcher by hand; OSError and torch's
    CheckpointException where the folder cannot be written (what was there before is still there).
    """
    final = Path(path).absolute()
    partial, old = final.with_name(f"{final.name}.partial"), final.with_name(f"{final.name}.old")
    ranks = _ranks_of(module)
    first = ranks is None or dist.get_rank() == 0

    def begin() -> dict[str, Any]:
        state = _state_of(module, optimizer)
        state[_EXTRA] = pickle.dumps(extra)  # as bytes: the format would take a dict apart
        if first:
            final.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
        return state

    def end() -> None:
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
            final.rename(old)
        partial.rename(final)
        shutil.rmtree(old, ignore_errors=True)

    state = together(begin, ranks)
    if optimizer is not None:
        state[_GROUPS] = pickle.dumps(_groups_of(module, optimizer))
    with _quietly(ranks):
        dcp.save(state, checkpoint_id=partial, no_dist=ranks is None)
    together(end if first else lambda: None, ranks)


def load_checkpoint(path: Path_, module: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Any:
    """Reads into module and optimizer, in place, what save_checkpoint wrote under any fold; returns its `extra`.

    The optimizer may be a new one: its state is made. Its groups must hold the same parameters as those saved; their
    settings (learning rate, ...) are taken over.

    Raises FileNotFoundError where `path` holds no checkpoint; ValueError, before anything is changed, where the
    checkpoint lacks a parameter or buffer of the module or has it in another shape, or the optimizer's groups differ;
    torch's CheckpointException where a file cannot be read. All on every rank.

    >>> headgate.save_checkpoint("step-100", model, optimizer, extra={"step": 100})  # under one fold
    >>> headgate.load_checkpoint("step-100", other_model, other_optimizer)           # under another
    {'step': 100}
    """
    ranks = _ranks_of(module)
    folder, saved, state = together(lambda: _begin(path, module, optimizer), ranks)
    if optimizer is None:
        _read(state, folder, ranks)
        return _end(module, state)
    kept: dict[str, Any] = {_GROUPS: b""}
    _read(kept, folder, ranks)
    groups, mine = pickle.loads(kept[_GROUPS]), _groups_of(module, optimizer)
    together(lambda: _check_groups(mine, groups), ranks)
    fresh = _fresh_state(module, optimizer, saved)
    cuts = _cuts(module)
    for parameter, name in _named(module, optimizer):
        for field, value in fresh.get(parameter, {}).items():
            state |= dict(_optimizer_entries(cuts, name, parameter, field, value))
    _read(state, folder, ranks)
    for parameter, name in _named(module, optimizer):
        optimizer.state.pop(parameter, None)
        if parameter in fresh:
            for field, value in fresh[parameter].items():
                if not isinstance(value, Tensor):
                    fresh[parameter][field] = state[f"{_STATE}/{field}/{name}"]
            optimizer.state[parameter] = fresh[parameter]
    for group, settings in zip(optimizer.param_groups, groups, strict=True):
        group.update({k: v for k, v in settings.items() if k != "names"})
    return _end(module, state)


def _begin(
    path: Path_, module: nn.Module, optimizer: torch.optim.Optimizer | None
) -> tuple[Path, Mapping[str, Any], dict[str, Any]]:
    """(the folder, what it says that it holds, this rank's tensors to be filled from it), all checked."""
    folder = Path(path).absolute()
    if not folder.exists() and folder.with_name(f"{folder.name}.old").exists():  # a save died between its two renames
        folder = folder.with_name(f"{folder.name}.old")
    if not (folder / ".metadata").exists():
        raise FileNotFoundError(f"load_checkpoint: path must be a folder that save_checkpoint wrote, got {path}")
    saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {f"{_MODEL}/{key}": t for key, t in _module_entries(module)}
    _check_fits(state, saved, path)
    if optimizer is not None:
        _named(module, optimizer)
        if _GROUPS not in saved:
            raise ValueError(f"load_checkpoint: path must hold an optimizer's state, got one without: {path}")
    return folder, saved, {**state, _EXTRA: b"", _OTHER: b""}


def _end(module: nn.Module, state: Mapping[str, Any]) -> Any:
    """Gives the module what is no tensor; the checkpoint's extra."""
    other = pickle.loads(state[_OTHER])
    if other:
        own = {_plain(name): name for name in module.state_dict()}
        module.load_state_dict({own.get(name, name): value for name, value in other.items()}, strict=False)
    return pickle.loads(state[_EXTRA])


def _ranks_of(module: nn.Module) -> dist.ProcessGroup | None:
    """The ranks that have the module together, or None where this process has it to itself."""
    return dist.group.WORLD if any(is_parallel(part) for part in module.modules()) else None


def _read(state: dict[str, Any], folder: Path, ranks: dist.ProcessGroup | None) -> None:
    with _quietly(ranks):
        dcp.load(state, checkpoint_id=folder, no_dist=ranks is None)


@contextmanager
def _quietly(ranks: dist.ProcessGroup | None) -> Iterator[None]:
    """Without torch's word that it assumes a single process: that is what was asked for."""
    with warnings.catch_warnings():
        if ranks is None:
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


# --- what is kept under which key ---------------------------------------------------------------------------------


def _plain(name: str) -> str:
    """The name that a parameter has without torch.compile, which puts `_orig_mod` before what it has wrapped."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


@dataclass(frozen=True)
class _Piece:
    """How a parameter with a dimension of experts is kept: `arrange` gives it, or a state of its shape, as [E, ...]."""

    cut: Cut
    shards: Shards | None
    arrange: Callable[[Tensor], Tensor] = lambda t: t


def _cuts(module: nn.Module) -> Mapping[str, _Piece]:
    """The parameters with a dimension of experts, by their full names: cut in this process or not."""
    shared = {id(part) for m in module.modules() if isinstance(m, SharedExpert) for part in m.modules()}
    found: dict[str, _Piece] = {}
    of_module: dict[int, tuple[Mapping[str, Cut], Shards | None]] = {}
    for name, m in module.named_modules():
        shards = shards_of(m)
        if shards is not None:
            cuts = shards.cuts
        elif isinstance(m, Experts) and id(m) not in shared:
            if len(m.local_experts) != m.num_experts:
                raise ValueError(
                    f"checkpoint: {name or 'the module'} must be cut by parallelize where ranks share its experts, "
                    f"got {m.dispatcher} given to it by hand"
                )
            cuts = m.cuts()
        elif isinstance(m, Experts):  # a shared expert that is whole: its adapters alone are arranged, in one tensor
            of_module[id(m)] = {weight: replace(cut, blocks=1) for weight, cut in m.cuts().items()}, None
            continue
        elif is_decorated(m) and refused(m) is None:
            cuts = cuts_of_experts(name, m, 1)[1]
        else:
            continue
        whole, of_module[id(m)] = _plain(name), (cuts, shards)
        pieces = {parameter: _Piece(cut, shards) for parameter, cut in cuts.items()}
        found |= {f"{whole}.{parameter}" if whole else parameter: piece for parameter, piece in pieces.items()}
    names = {parameter: _plain(name) for name, parameter in module.named_parameters()}
    for _, wrapper, inside in wrappers_in(module):
        of, shards = of_module.get(id(inside), ({}, None))
        for factor in factors_of(wrapper, of) if wrapper.parameter_name in of else ():
            found[names[factor.parameter]] = _Piece(factor.cut, shards, factor.by_expert)
    return found


def _pieces(name: str, t: Tensor, piece: _Piece) -> Iterator[tuple[str, Tensor]]:
    """t, this rank's part of a parameter or of a state of its shape: (key, view of t with its place in the whole)."""
    cut, shards = piece.cut, piece.shards
    held = piece.arrange(t.to_local() if isinstance(t, DTensor) else t)
    if shards is not None and shards.shared:  # one tensor, as where nobody has cut it
        here = shards.held if len(held) else []  # FSDP2 leaves the one expert to one rank
        rank, etp = (0, 1) if cut.everywhere else (shards.fold.rank("etp"), shards.etp)
        yield name, Chunks(held, here, 1, cut.ffn, rank, etp, cut.blocks)
        return
    for block, view in enumerate(held.unflatten(cut.ffn, (cut.blocks, -1)).unbind(cut.ffn)):
        key = name if cut.blocks == 1 else f"{name}.{block}"
        if shards is None:
            yield key, view
            continue
        if view.device.type != shards.fold.device_type:  # a DTensor would be made of a copy
            raise ValueError(
                f"checkpoint: {name} must be on the fold's device, {shards.fold.device_type}, got {view.device.type}"
            )
        if shards.placement is not None:
            yield key, Chunks(view, shards.held, shards.num_experts, cut.ffn, shards.fold.rank("etp"), shards.etp)
            continue
        over_edp: Placement = Shard(0) if isinstance(t, DTensor) else Replicate()
        shape = list(view.shape)
        shape[0], shape[cut.ffn] = shards.num_experts, shape[cut.ffn] * (1 if cut.everywhere else shards.etp)
        whole = torch.empty(shape, device="meta")
        places = [Shard(0), over_edp, Replicate() if cut.everywhere else Shard(cut.ffn)]
        sizes: dict[str, Any] = {"shape": whole.shape, "stride": whole.stride()}
        yield key, DTensor.from_local(view, shards.fold.experts, places, run_check=False, **sizes)


def _module_entries(module: nn.Module) -> Iterator[tuple[str, Any]]:
    cuts = _cuts(module)
    for own, value in module.state_dict().items():
        name = _plain(own)
        if name in cuts:
            yield from _pieces(name, value.detach(), cuts[name])
        elif isinstance(value, Tensor):
            yield name, value


def _optimizer_entries(
    cuts: Mapping[str, _Piece], name: str, parameter: Tensor, field: str, value: Any
) -> Iterator[tuple[str, Any]]:
    alike = isinstance(value, Tensor) and value.shape == parameter.shape
    if name in cuts and isinstance(value, Tensor) and value.dim() and not alike:
        raise ValueError(
            f"checkpoint: optimizer must keep numbers or tensors of the parameter's shape for experts, got {field} "
            f"{tuple(value.shape)} for {name} {tuple(parameter.shape)}"
        )
    if name in cuts and alike:
        for key, piece in _pieces(name, value, cuts[name]):
            yield f"{_STATE}/{field}/{key}", piece
    else:
        yield f"{_STATE}/{field}/{name}", value


def _state_of(module: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    state: dict[str, Any] = {f"{_MODEL}/{key}": t for key, t in _module_entries(module)}
    state[_OTHER] = pickle.dumps({_plain(k): v for k, v in module.state_dict().items() if not isinstance(v, Tensor)})
    if optimizer is None:
        return state
    cuts = _cuts(module)
    for parameter, name in _named(module, optimizer):
        for field, value in optimizer.state.get(parameter, {}).items():
            state |= dict(_optimizer_entries(cuts, name, parameter, field, value))
    return state


def _named(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[nn.Parameter, str]]:
    names = {parameter: _plain(name) for name, parameter in module.named_parameters()}
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
        what = key.partition("/")[2]
        if key not in saved:
            raise ValueError(f"load_checkpoint: path must hold {what}, got a checkpoint without it: {path}")
        there = getattr(saved[key], "size", None)
        if isinstance(here, Tensor) and there is not None and tuple(there) != tuple(here.shape):
            raise ValueError(f"load_checkpoint: {what} must be {tuple(here.shape)}, got {tuple(there)} from {path}")


def _check_groups(here: list[dict[str, Any]], saved: list[dict[str, Any]]) -> None:
    mine, theirs = [g["names"] for g in here], [g["names"] for g in saved]
    if mine != theirs:
        odd = sorted({n for g in mine for n in g} ^ {n for g in theirs for n in g})
        raise ValueError(
            f"load_checkpoint: optimizer must have the groups saved ({len(theirs)} of "
            f"{', '.join(str(len(g)) for g in theirs)} parameters), got {len(mine)} of "
            f"{', '.join(str(len(g)) for g in mine)}" + (f"; only in one of them: {', '.join(odd[:5])}" if odd else "")
        )


def _fresh_state(
    module: nn.Module, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]
) -> dict[nn.Parameter, dict[str, Any]]:
    """Empty state of the optimizer, in this fold's shapes, for every field that the checkpoint has."""
    cuts, fresh = _cuts(module), dict[nn.Parameter, dict[str, Any]]()
    on_device = any(g.get("capturable") or g.get("fused") for g in optimizer.param_groups)
    fields = sorted({key.split("/")[1] for key in saved if key.startswith(f"{_STATE}/")})
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
            elif there is not None:
                state[field] = None
        if state:
            fresh[parameter] = state
    return fresh
