"""headgate.load: a model whose experts stay in the files of its checkpoint, and are never in memory all at once."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from torch import Tensor, nn

from ...placement.caching.predict import Predictor
from ...placement.careful import fault
from ...placement.files import remove_stale
from ...placement.traces.trace import Trace
from ..hf.conversion import Conversion, conversion_of
from ..hf.pretrained import blank_model, fill_rest, missing_of
from ..hf.swap import replace
from .checkpoint import Checkpoint
from .checksums import Verify, check_digests, check_verify
from .file import FileStore
from .forms import Form, Found, survey
from .host import Store
from .kinds import Layer, split
from .lower import FILE, Formats, Groups, coded, groups_of, layers_of
from .offload import Offload, Plan
from .reads import DTYPES
from .shards import WHAT_TO_DO, Laid, ShardStore, laid_out

Tell = Callable[[str, int, int], object]


def load(
    path: str | os.PathLike[str],
    budget: str | int | float = "8GiB",
    policy: str = "adaptive",
    prefetch: str | Predictor | None = "gate",
    disk: str | os.PathLike[str] | None = None,
    *,
    formats: Formats | None = None,
    device: torch.device | str = "cpu",
    scope: str = "layer",
    trace: Trace | None = None,
    readers: int | None = None,
    page_cache: bool = True,
    verify: Verify = "first",
    context: int | None = None,
    log: bool = False,
    tell: Tell = lambda what, done, total: None,
) -> tuple[nn.Module, Offload]:
    """A transformers MoE model from a folder, with its experts left in the folder's own safetensors files: they are
    never in memory all at once, and without `disk` nothing is written. Outputs are those of `from_pretrained` and
    `offload`.

    path      a folder with config.json and either model.safetensors.index.json with its files or model.safetensors, as
              save_pretrained and hub downloads have it; the files must stay as they are while the model is used
    budget    what the slots for experts may take on the device, see `offload`, or "auto". Beside it stand the rest of
              the model (attention, embeddings, norms, routers, shared experts) and the KV cache of a generation, for
              `context` tokens of which "auto" leaves room
    formats   experts in few bits, see `offload`; `disk` must be given
    disk      a folder for experts.safetensors, written expert by expert where it is not there yet; or a file that
              `headgate.pack` wrote. A file that is there is used if it was made of this very checkpoint with these
              formats, and refused if not
    device    where to compute
    verify    of an experts file (`disk`), an expert's checksum is compared when it is read for the "first" time, at
              each read (True) or never (False). The folder's own files have no checksums: no expert is read from one
              whose size or time of change is another than at first (unless False). True: files whose SHA-256 Hugging
              Face's client noted are read whole before anything else and compared, and each expert, at each read, with
              what it was at its first
    policy, prefetch, scope, trace, readers, page_cache, context, log   as in `offload`
    tell      called, from any thread, as the work goes on: with "experts", written to `disk`, or "tensors", read into
              memory; how many are done; and of how many

    Everything but the experts is read into memory, ties and buffers as from_pretrained makes them; which tensors of the
    files make which parameter is asked of transformers. The model is in evaluation mode and runs through Headgate.
    Without `disk` its experts' parameters are on the meta device: they have names and shapes, and no numbers.
    `Offload.close()` leaves them there, and the model can compute no more; `close(restore=True)` brings them into
    memory.

    Returns the model and its Offload.

    Raises OSError where a file is missing or cannot be read; ValueError where one is not what it should be, a tensor is
    missing or of another shape or dtype than the model's, the checkpoint is quantized, or transformers makes experts by
    more than stacking and concatenating; else as `offload`. All this is found out before a weight is read.

    >>> model, offloaded = headgate.load("/models/Qwen3-30B-A3B", budget="4GiB")
    >>> model.generate(**inputs)
    """
    where = torch.device(device)
    if formats not in (None, {}) and disk is None:
        raise ValueError(f"load: disk must be a folder for experts in few bits, got None with formats={formats!r}")
    check_verify(verify, "load")
    with seen(path) as what:
        model = what.model
        groups = groups_of(what.found, {} if formats is None else formats)
        layers = layers_of(what.found, groups)
        plan = Plan.of(
            model, what.found, what.skipped, layers, where, budget=budget, policy=policy, prefetch=prefetch,
            scope=scope, trace=trace, readers=readers, log=log, from_disk=True, context=context,
        )  # fmt: skip
        left = {f"{name}.{theirs}" for name, _, form in what.found for theirs in form.names.values()}
        experts = {key for name in left for keys in what.conversion.sources[name].keys.values() for key in keys}
        rest = [key for key in what.checkpoint.tensors if key not in experts]
        if verify is True:
            check_digests(what.checkpoint.files, "load")
        packed = None if disk is None else _packed(what, layers, groups, Path(disk), page_cache, verify, tell)
        read, count_of = count(1), len(rest)

        def one(key: str) -> Tensor:
            tensor = what.checkpoint.read(key)
            tell("tensors", next(read), count_of)
            return tensor

        try:
            fill_rest(model, what.conversion, rest, one, left)
        except BaseException:
            if packed is not None:
                packed.close()
            raise
        stamps = what.checkpoint.stamps
        store: Store = packed or ShardStore(
            layers, what.laid, what.checkpoint.take(), page_cache=page_cache, stamps=stamps, verify=verify
        )
    return model, plan.start(store)


def _packed(
    what: Seen,
    layers: Sequence[Layer],
    groups: Groups,
    disk: Path,
    page_cache: bool,
    verify: Verify,
    tell: Tell,
) -> FileStore:
    """The experts file in a folder, or the file itself; written now if it is not there. Raises OSError where the disk
    has no room, ValueError where the file is another checkpoint's."""
    path = disk if disk.exists() and not disk.is_dir() else disk / FILE
    if path.exists():
        return FileStore(path, layers, source=_source(what, groups), page_cache=page_cache, verify=verify)
    path.parent.mkdir(parents=True, exist_ok=True)
    return written(
        what, layers, groups, path, page_cache=page_cache, who="load: disk", verify=verify,
        tell=lambda *of: tell("experts", *of),
    )  # fmt: skip


def written(
    what: Seen,
    layers: Sequence[Layer],
    groups: Groups,
    path: Path,
    *,
    page_cache: bool,
    who: str,
    tell: Callable[[int, int], object] = lambda done, total: None,
    verify: Verify = "first",
) -> FileStore:
    """The experts file at `path`, written now, expert by expert. `who`: the argument that says where. `tell`: called
    with experts done and all experts. Raises OSError where the disk has no room."""
    remove_stale(path)
    size, free = sum(layer.nbytes for layer in layers), shutil.disk_usage(path.parent).free
    if size > free:
        raise OSError(errno.ENOSPC, f"{who} must have {size:,} bytes for the experts, got {free:,} free", str(path))
    format_of = [{e: format for some, format in of for e in some} for of in groups]
    done, total = count(1), sum(layer.experts for layer in layers)
    files = [(os.dup(handle), name) for handle, name in what.checkpoint.files]
    stamps = what.checkpoint.stamps
    with closing(ShardStore(what.layers, what.laid, files, page_cache=page_cache, stamps=stamps)) as shards:

        def expert(i: int, e: int) -> dict[str, Tensor]:
            whole = {p.name: torch.empty(1, *p.shape, dtype=p.dtype) for p in what.layers[i].kind(e).parts}
            shards.read(i, e, {name: t[0] for name, t in whole.items()})
            parts = split(coded(whole, format_of[i][e]))
            tell(next(done), total)
            return {name: t[0] for name, t in parts.items()}

        source = _source(what, groups)
        return FileStore.write_each(path, layers, expert, source=source, page_cache=page_cache, verify=verify)


def _source(what: Seen, groups: Groups) -> str:
    """The fingerprint of a checkpoint's experts in these formats."""
    said = f"{what.checkpoint.digest} {[[(len(some), some[0], format) for some, format in of] for of in groups]}"
    return hashlib.sha256(said.encode()).hexdigest()


@dataclass(frozen=True)
class Seen:
    """A folder that `load` can take, before a weight is read: the model on the meta device, swapped; its experts
    modules `found` and `skipped`; where everything lies in the files."""

    checkpoint: Checkpoint
    model: nn.Module
    found: Found
    skipped: Mapping[str, str]
    conversion: Conversion
    laid: Sequence[Mapping[str, Laid]]
    layers: Sequence[Layer]


@contextmanager
def seen(path: str | os.PathLike[str]) -> Iterator[Seen]:
    """What the files of a folder say, open for the length of a `with` unless somebody takes them. Raises as `load`."""
    folder = Path(path)
    checkpoint = Checkpoint(folder)
    try:
        dtypes = [DTYPES[t.dtype] for t in checkpoint.tensors.values()]
        model = blank_model(folder, next((d for d in dtypes if d.is_floating_point and d.itemsize > 1), None))
        replace(model)
        found, skipped = survey(model)
        conversion = conversion_of(model, checkpoint.tensors)
        _check_rest(model, conversion, checkpoint)
        laid = [_experts(one, conversion, checkpoint) for one in found]
        layers = layers_of(found, groups_of(found, {}))
        yield Seen(checkpoint, model, found, skipped, conversion, laid, layers)
    finally:
        checkpoint.close()


def _check_rest(model: nn.Module, conversion: Conversion, checkpoint: Checkpoint) -> None:
    """Raises ValueError where a tensor is missing, or one that is taken as it lies has another shape."""
    missing = missing_of(model, conversion)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise fault("load", checkpoint.folder, f"must have a tensor for each weight, got none for {missing[0]}{more}")
    wanted = model.state_dict()
    for name, source in conversion.sources.items():
        if not source.operations:
            (keys,) = source.keys.values()
            for key in keys:
                shape = checkpoint.tensors[key].shape
                if shape != tuple(wanted[name].shape):
                    rule = f"must have {key} of shape {list(wanted[name].shape)}, got {list(shape)}"
                    raise fault("load", checkpoint.folder, rule)


def _experts(one: tuple[str, nn.Module, Form], conversion: Conversion, checkpoint: Checkpoint) -> Mapping[str, Laid]:
    """Where the parts of a layer's experts lie. Raises ValueError where one is of another shape or dtype than the
    model's, or not in whole pieces."""
    name, module, form = one
    found = {}
    for ours, parameter in form.weights(module).items():
        whole = f"{name}.{form.names[ours]}"
        source = conversion.sources.get(whole)
        if source is None:
            why = "transformers makes it together with others"
            raise ValueError(f"load: {whole} must lie in the checkpoint for itself, {why}: {WHAT_TO_DO}")
        if len({len(keys) for keys in source.keys.values()}) > 1 or len(source.keys) < len(source.patterns):
            raise fault("load", checkpoint.folder, f"must have as many tensors of each kind for {whole}, got {source}")
        try:
            laid = laid_out(source, checkpoint)
        except ValueError as error:
            raise fault("load", checkpoint.folder, f"must have for {whole} {error}") from error
        if isinstance(laid, str):
            raise ValueError(
                f"load: {whole} must lie in the checkpoint as bytes that can be read in place, {laid}: {WHAT_TO_DO}"
            )
        if laid.shape != tuple(parameter.shape):
            rule = f"must make {whole} {list(parameter.shape)}, got {list(laid.shape)} from {source}"
            raise fault("load", checkpoint.folder, rule)
        if DTYPES[laid.dtype] != parameter.dtype:
            raise ValueError(
                f"load: {whole} must be stored in the model's {parameter.dtype}, got {laid.dtype}: {WHAT_TO_DO}"
            )
        found[ours] = laid
    return found
