"""headgate.load: a model whose experts stay in the files of its checkpoint, and are never in memory all at once."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...placement.caching.predict import Predictor
from ...placement.files import remove_stale
from ...placement.traces.trace import Trace
from .checkpoint import Checkpoint
from .checksums import Verify, check_digests, check_verify
from .file import FileStore
from .forms import Found, merged
from .gguf_file import Gguf, gguf_in
from .gguf_load import model_in
from .host import Store
from .kinds import Layer, Weights, split, widened
from .lower import FILE, Formats, Groups, coded, groups_of, layers_of
from .offload import Offload, Plan
from .shards import Laid, ShardStore
from .shards_load import model_of

Tell = Callable[[str, int, int], object]


def load(
    path: str | os.PathLike[str],
    budget: str | int | float = "8GiB",
    policy: str = "adaptive",
    prefetch: str | Predictor | None = "gate",
    disk: str | os.PathLike[str] | None = None,
    *,
    config: Any = None,
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
              save_pretrained and hub downloads have it; or a GGUF file, the first of a split one, or a folder with one.
              The files must stay as they are while the model is used
    config    of a GGUF file: a folder with config.json, or a transformers config; None: what the file's metadata say
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
    files make which parameter is asked of transformers. Experts in few bits stay so, in slots and in products: those of
    compressed-tensors, GPTQ, AWQ, FP8 and MXFP4, and the blocks of a GGUF file where products take them (Q8_0, Q4_0,
    Q4_K, Q5_K, Q6_K, MXFP4, and Q5_0 and IQ4_NL, which become Q8_0 exactly). Others are widened to the model's dtype
    whenever one is read, and what else is in few bits once, when it is loaded; it says so. The model is in evaluation
    mode and runs through Headgate.
    Without `disk` its experts' parameters are on the meta device: they have names and shapes, and no numbers.
    `Offload.close()` leaves them there, and the model can compute no more; `close(restore=True)` brings them into
    memory.

    Returns the model and its Offload.

    Raises OSError where a file is missing or cannot be read; ValueError where one is not what it should be, a tensor is
    missing or of another shape or dtype than the model's, the checkpoint is quantized in a way that is not taken, or
    transformers makes experts by more than stacking, concatenating and turning; else as `offload`. All this is found
    out before a weight is read.

    >>> model, offloaded = headgate.load("/models/Qwen3-30B-A3B", budget="4GiB")
    >>> model.generate(**inputs)
    """
    where = torch.device(device)
    if formats not in (None, {}) and disk is None:
        raise ValueError(f"load: disk must be a folder for experts in few bits, got None with formats={formats!r}")
    check_verify(verify, "load")
    with seen(path, config) as what:
        model = what.model
        groups = groups_of(what.found, {} if formats is None else formats)
        layers = what.layers_in(groups)
        plan = Plan.of(
            model, what.found, what.skipped, layers, where, budget=budget, policy=policy, prefetch=prefetch,
            scope=scope, trace=trace, readers=readers, log=log, from_disk=True, context=context,
        )  # fmt: skip
        if verify is True:
            check_digests(what.files.files, "load")
        packed = None if disk is None else _packed(what, layers, groups, Path(disk), page_cache, verify, tell)
        try:
            what.fill(lambda *of: tell("tensors", *of))
            for (handle, name), stamp in zip(what.files.files, what.files.stamps, strict=True):
                if verify:
                    stamp.compare(handle, name)
        except BaseException:
            if packed is not None:
                packed.close()
            raise
        store: Store = packed or what.store(what.files.take(), page_cache, verify)
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
    files = [(os.dup(handle), name) for handle, name in what.files.files]
    with closing(what.store(files, page_cache)) as shards:

        def expert(i: int, e: int) -> dict[str, Tensor]:
            whole = {p.name: torch.empty(1, *p.shape, dtype=p.dtype) for p in what.layers[i].kind(e).parts}
            shards.read(i, e, {name: t[0] for name, t in whole.items()})
            parts = split(_recoded(what, i, whole, e, format_of[i][e]))
            tell(next(done), total)
            return {name: t[0] for name, t in parts.items()}

        source = _source(what, groups)
        return FileStore.write_each(path, layers, expert, source=source, page_cache=page_cache, verify=verify)


def _recoded(what: Seen, i: int, parts: Mapping[str, Tensor], e: int, format: str | None) -> Weights:
    """An expert's weights [1, ...] in a format, from its parts as they are stored."""
    joined = what.layers[i].kind(e).join(parts)
    if format is None:
        return joined
    return coded(merged(widened(joined, torch.float32)), format)


def _source(what: Seen, groups: Groups) -> str:
    """The fingerprint of a checkpoint's experts in these formats."""
    said = f"{what.files.digest} {[[(len(some), some[0], format) for some, format in of] for of in groups]}"
    return hashlib.sha256(said.encode()).hexdigest()


@dataclass(frozen=True)
class Seen:
    """What `load` can take, before a weight is read: open files; the model on the meta device, swapped; its experts
    modules `found` and `skipped`; the experts as they are stored, `laid` in the files or `made` of their bytes; `fill`
    reads all the rest."""

    files: Checkpoint | Gguf
    model: nn.Module
    found: Found
    skipped: Mapping[str, str]
    laid: Sequence[Mapping[str, Laid]]
    layers: Sequence[Layer]
    fill: Callable[[Callable[[int, int], object]], None]
    made: Sequence[Mapping[str, Callable[[Tensor], Tensor]]] | None = None
    keys: Sequence[set[str]] = ()  # of a GGUF file: the tensors of each layer's experts
    # else: a parameter of the rest -> the tensor that it is, or None where transformers makes it by more than taking it
    rest: Mapping[str, str | None] = field(default_factory=dict)

    def layers_in(self, groups: Groups) -> list[Layer]:
        """The experts in other formats; those without one are as they are stored."""
        made = layers_of(self.found, groups)
        return [
            Layer(new.name, tuple((some, old.kind(0) if format is None else kind) for (some, kind), (_, format) in zip(
                new.groups, of, strict=True
            )))
            for new, old, of in zip(made, self.layers, groups, strict=True)
        ]  # fmt: skip

    def store(self, files: Sequence[tuple[int, Path]], page_cache: bool, verify: Verify = "first") -> ShardStore:
        """The experts in these files, which it takes over."""
        return ShardStore(
            self.layers,
            self.laid,
            files,
            made=self.made,
            page_cache=page_cache,
            stamps=self.files.stamps,
            verify=verify,
        )


@contextmanager
def seen(path: str | os.PathLike[str], config: Any = None) -> Iterator[Seen]:
    """What the files of a model say, open for the length of a `with` unless somebody takes them. Raises as `load`."""
    if gguf_in(path):
        with closing(Gguf(path)) as gguf:
            m = model_in(gguf, config)
            layers = [one.layer(name) for one, (name, _, _) in zip(m.stored, m.found, strict=True)]
            laid, made = [one.laid for one in m.stored], [one.made for one in m.stored]
            yield Seen(gguf, m.model, m.found, m.skipped, laid, layers, m.fill, made, [one.keys for one in m.stored])
        return
    if config is not None:
        raise ValueError(f"load: config must be None for a folder with config.json, got a {type(config).__name__}")
    with closing(Checkpoint(path)) as checkpoint:
        s = model_of(checkpoint)
        laid, made = [one.laid for one in s.stored], [one.made for one in s.stored]
        layers = [one.layer(name) for one, (name, _, _) in zip(s.stored, s.found, strict=True)]
        yield Seen(checkpoint, s.model, s.found, s.skipped, laid, layers, s.fill, made, rest=s.rest)
