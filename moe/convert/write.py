"""A checkpoint in safetensors files, written tensor by tensor into a folder that appears when it is whole."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from ...placement.files import whole_folder
from ..offload.checkpoint import INDEX, SINGLE
from ..offload.reads import DTYPES, bytes_of
from .recipe import Made

_WHO = "convert"
_BESIDE = 64 << 20  # bytes for config, tokenizer and headers
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
TOKENIZER = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
Tell = Callable[[int, int], object]


def check_output(output: Path, made: Sequence[Made]) -> None:
    """Raises ValueError where `output` is no place for a new folder, OSError where the disk has no room."""
    if not output.parent.is_dir():
        raise ValueError(f"{_WHO}: output must be in a folder that is there, got {output}")
    if output.name in ("", ".."):
        raise ValueError(f"{_WHO}: output must be a folder's name, got {str(output)!r}")
    if output.is_symlink() or (output.exists() and not (output.is_dir() and not any(output.iterdir()))):
        raise ValueError(f"{_WHO}: output must be a new or empty folder, got {output}")
    need, free = sum(map(_nbytes, made)) + _BESIDE, shutil.disk_usage(output.parent).free
    if need > free:
        why = f"{_WHO}: output must have {need:,} bytes for the model, got {free:,} free"
        raise OSError(errno.ENOSPC, why, str(output))


def write(output: Path, config: Any, made: Sequence[Made], beside: Path | None, most: int, tell: Tell) -> None:
    """Files of at most `most` bytes of tensors (or one tensor) each, config.json, and from the folder `beside` the
    tokenizer's files and generation_config.json."""
    shards = _shards(made, most)
    with whole_folder(output) as folder:
        config.save_pretrained(folder)
        for name in TOKENIZER if beside is not None else ():
            if (beside / name).is_file():  # type: ignore[operator]
                shutil.copyfile(beside / name, folder / name)  # type: ignore[operator]
        index, done = {}, 0
        for number, shard in enumerate(shards, 1):
            name = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            with open(folder / name, "wb") as file:
                for one in _file(file, shard):
                    index[one.key] = name
                    done += 1
                    tell(done, len(made))
        if len(shards) > 1:
            said = {"metadata": {"total_size": sum(map(_nbytes, made))}, "weight_map": index}
            (folder / INDEX).write_text(json.dumps(said, indent=2) + "\n")


def _file(file: BinaryIO, shard: Sequence[Made]):
    """Writes the shard; gives each tensor when it is written."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for one in shard:
        header[one.key] = {
            "dtype": _NAMES[one.dtype], "shape": list(one.shape), "data_offsets": [at, at + _nbytes(one)],
        }  # fmt: skip
        at += _nbytes(one)
    said = json.dumps(header, separators=(",", ":")).encode()
    said += b" " * (-len(said) % 8)
    file.write(len(said).to_bytes(8, "little") + said)
    for one in shard:
        tensor = one.make()
        assert (tuple(tensor.shape), tensor.dtype) == (one.shape, one.dtype), one.key
        if tensor.numel():
            file.write(bytes_of(tensor.detach().cpu().contiguous()))
        del tensor  # before the next is made
        yield one


def _shards(made: Sequence[Made], most: int) -> list[list[Made]]:
    shards: list[list[Made]] = [[]]
    room = most
    for one in made:
        if shards[-1] and _nbytes(one) > room:
            shards.append([])
            room = most
        shards[-1].append(one)
        room -= _nbytes(one)
    return shards


def _nbytes(one: Made) -> int:
    return prod(one.shape) * one.dtype.itemsize
