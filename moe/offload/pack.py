"""headgate.pack: the experts of a checkpoint into one file, in few bits if wished, never more than one in memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from .arena import parse_size
from .file import FileStore
from .forms import Found
from .gguf_file import Gguf
from .gguf_pack import check_formats, is_gguf, write_gguf
from .lower import Formats, Groups, groups_of, layers_of, room_for
from .seen import Seen, seen, written

_WIDENING = 24  # bytes for each weight that is widened, at most


def pack(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    config: Any = None,
    formats: Formats | None = None,
    max_memory: str | int | None = None,
    tell: Callable[[int, int], object] = lambda done, total: None,
) -> None:
    """Writes the experts of a checkpoint into one file, which `headgate.load(path, disk=output, formats=formats)` uses
    for as long as the checkpoint stays the same. Experts are read, brought into few bits and written one by one.

    A file whose name ends in .gguf becomes a whole GGUF file, for `headgate.load(output)` and other programs: experts
    in GGUF's formats, the same for all of a layer ("Q8_0", "Q4_K", ...); the rest as it is, in llama.cpp's names,
    vectors and routers in fp32. Of a folder its metadata are those of the config, without a tokenizer (llama.cpp takes
    numbers of tokens then, no text), for the families qwen2_moe, qwen3_moe, mixtral, olmoe and gpt_oss. Of a GGUF file
    they are the file's own, with its tokenizer.

    path         a folder with a checkpoint, or a GGUF file, as `load` takes it
    output       the file, in a folder that is there. An older file of its kind is replaced when the new one is whole
    config       of a GGUF file, as in `load`
    formats      experts in few bits, "int4" or others, as in `offload`; None: as they are
    max_memory   bytes ("2GiB", 4096) that experts may take on the way, beside Python, torch and transformers. No more
                 is ever taken than the largest one needs; less than that is refused
    tell         called after each expert with how many are done, and of how many

    Raises OSError where a file cannot be read, or the disk has no room; ValueError where the checkpoint or `formats`
    will not do, `max_memory` is too small, or `output` is a file of another kind: all this before anything is written.
    When the writing is interrupted nothing is left, and what a killed process left goes with the next call.

    >>> headgate.pack("/models/Qwen3-30B-A3B", "/scratch/q.experts", formats="int8", max_memory="2GiB")
    """
    most = None if max_memory is None else parse_size(max_memory, "pack: max_memory")
    to = Path(output)
    _check_output(to)
    with seen(path, config) as what:
        _check_apart(to, what)
        found = [(n, m, replace(form, straight=True)) for n, m, form in what.found] if is_gguf(to) else what.found
        groups = groups_of(found, {} if formats is None else formats)
        if is_gguf(to):
            check_formats(groups)
        layers = layers_of(found, groups) if is_gguf(to) else what.layers_in(groups)
        if most is not None:
            _check_memory(what, found, groups, most, max_memory, is_gguf(to) and not isinstance(what.files, Gguf))
        if is_gguf(to):
            write_gguf(what, groups, to, tell)
            return
        written(what, layers, groups, to, page_cache=True, who="pack: output", tell=tell).close()


def _check_output(path: Path) -> None:
    """Raises ValueError where `path` is no place for a new file, and no experts file."""
    if not path.parent.is_dir():
        raise ValueError(f"pack: output must be in a folder that is there, got {path}")
    if not os.path.lexists(path):
        return
    kind = "a GGUF file" if is_gguf(path) else "an experts file"
    try:
        (Gguf(path) if is_gguf(path) else FileStore(path)).close()
    except (OSError, ValueError) as error:
        raise ValueError(f"pack: output must be a new file or {kind}, got {path} ({error})") from error


def _check_apart(path: Path, what: Seen) -> None:
    """Raises ValueError where `path` is one of the files that are read: it would be replaced."""
    for handle, file in what.files.files:
        if path.exists() and os.path.samestat(path.stat(), os.fstat(handle)):
            raise ValueError(f"pack: output must be another file than those of the checkpoint, got {path} ({file})")


def _check_memory(what: Seen, found: Found, groups: Groups, most: int, said: object, anew: bool) -> None:
    """`anew`: experts in few bits are widened where they keep no format, too."""
    for (name, module, form), of, layer in zip(found, groups, what.layers, strict=True):
        weights = form.shapes(module)
        need = max(room_for(weights, format) for _, format in of)
        if layer.kind(0).coded and (
            anew or any(format is not None for _, format in of)
        ):  # these are widened on the way
            sizes = [w[0].numel() for w in weights.values()]
            need += 4 * sum(sizes) + _WIDENING * max(sizes)
        if need > most:
            raise ValueError(f"pack: max_memory must be at least {need:,} bytes for an expert of {name}, got {said!r}")
