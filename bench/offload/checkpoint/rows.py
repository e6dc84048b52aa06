"""The table of a checkpoint: what is measured, what it is held to, and whether it is reached."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ... import machine
from ...hardware import describe
from ...placement.rows import Row
from . import make
from .parts import PARTS, Case, Line, remove
from .processes import command, job

__all__ = ["measure", "remove"]
HEAD = ("what", "measured", "reach", "stretch", "", "beside it")


def measure(
    folder: Path,
    *,
    parts: Sequence[str] = tuple(PARTS),
    scale: float = 1.0,
    threads: int | None = None,
    say: Callable[[str], object] = lambda line: None,
    case: Case | None = None,
) -> Row:
    """The parts of the table, in order, each in processes of its own. `folder`: for the checkpoint and what is made of
    it, used again where it is there. `scale`: of every size; the reaches are those of the whole."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = make.Sizes() if scale == 1 else make.Sizes().scaled(scale)
    if case is None:
        case = Case(folder, sizes, job(threads), lambda words: command(words, threads))
    total = sizes.expert_bytes + sizes.rest_bytes
    say(f"{total / 1e9:.2f} GB in {folder}, of it {sizes.expert_bytes / 1e9:.2f} GB of experts")
    _ = case.model
    found: list[Line] = []
    figures: dict[str, Any] = {"machine": describe(), "versions": _versions()}
    for part in parts:
        for line in PARTS[part](case):
            found.append(line)
            say(f"{line.what}: {_value(line)} ({line.note})" if line.note else f"{line.what}: {_value(line)}")
    figures |= {"load_1min_after": describe()["load_1min"], "scale": scale, "sizes": asdict(sizes)}
    figures |= {"lines": [asdict(line) | {"verdict": line.verdict} for line in found], "figures": case.figures}
    title = f"A checkpoint of {total / 1e9:.2f} GB, {sizes.layers} layers"
    return Row(title, HEAD, [_cells(line, scale) for line in found], figures)


def _cells(line: Line, scale: float) -> tuple[str, ...]:
    if line.value is None:
        return (line.what, "", "", "", "skipped", line.note)
    limits = (_limit(line, limit) for limit in (line.reach, line.stretch))
    return (line.what, _value(line), *limits, line.verdict if scale == 1 else "", line.note)


def _value(line: Line) -> str:
    return "skipped" if line.value is None else f"{line.value:.{line.digits}f} {line.unit}".strip()


def _limit(line: Line, limit: float | None) -> str:
    return "" if limit is None else f"{limit:g} {line.unit}".strip()


def _versions() -> dict[str, str | None]:
    names = ("headgate", "torch", "transformers", "accelerate", "llama-cpp-python", "gguf", "numba")
    return {name: machine.version(name) for name in names}
