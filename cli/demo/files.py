"""Writing the demo's folder: checked before the work starts, every file and folder put in place whole."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

MARK = "metrics.json"  # written last: a folder that has it was written by a demo
PARTS = ("model", "trace.npz", "report.html", "report.png", MARK)


def prepare(folder: Path, need_bytes: int) -> None:
    """Makes the folder and makes sure that the results will fit in.

    Raises ValueError naming --output, the rule and the reason: not a folder, not writable, somebody else's files under
    the names that will be written, too little space.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"demo: --output must be a folder, got the file {folder}")
    foreign = [name for name in PARTS if (folder / name).exists()] if not (folder / MARK).exists() else []
    if foreign:
        raise ValueError(
            f"demo: --output must be new or written by an earlier demo, got {folder}, which holds {', '.join(foreign)}"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise ValueError(f"demo: --output must be writable, got {folder} ({error.strerror})") from error
    if free < need_bytes:
        raise ValueError(
            f"demo: --output needs {need_bytes / 1e6:,.0f} MB of free space, got {free / 1e6:,.0f} MB at {folder}"
        )


def write_folder(path: Path, fill: Callable[[Path], object]) -> None:
    """Lets `fill` write into a temporary folder beside `path`, then puts it in the place of `path`."""
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    old = temporary.with_name(temporary.name + "-old")
    try:
        temporary.mkdir()
        fill(temporary)
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        for folder in (temporary, old):
            shutil.rmtree(folder, ignore_errors=True)


def clear(folder: Path, keep: set[str]) -> None:
    """Takes away what an earlier demo left, so that the parts of two runs never stand side by side."""
    for name in set(PARTS) - keep:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
