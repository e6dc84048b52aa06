"""What the files of a model say before a weight is read, and the experts file that is made of them."""

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

from ...placement.files import remove_stale
from .checkpoint import Checkpoint
from .checksums import Verify
from .file import FileStore
from .forms import Found, merged
from .gguf_file import Gguf, gguf_in
from .gguf_load import model_in
from .kinds import Layer, Weights, split, widened
from .lower import Groups, coded, layers_of
from .shards import Laid, ShardStore
from .shards_load import model_of


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

        source = source_of(what, groups)
        return FileStore.write_each(path, layers, expert, source=source, page_cache=page_cache, verify=verify)


def _recoded(what: Seen, i: int, parts: Mapping[str, Tensor], e: int, format: str | None) -> Weights:
    """An expert's weights [1, ...] in a format, from its parts as they are stored."""
    joined = what.layers[i].kind(e).join(parts)
    if format is None:
        return joined
    return coded(merged(widened(joined, torch.float32)), format)


def source_of(what: Seen, groups: Groups) -> str:
    """The fingerprint of a checkpoint's experts in these formats."""
    said = f"{what.files.digest} {[[(len(some), some[0], format) for some, format in of] for of in groups]}"
    return hashlib.sha256(said.encode()).hexdigest()
