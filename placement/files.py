"""Files written whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Has `write` fill a temporary file beside `path`, then renames it. On an error an older file stays as it was.

    A device such as /dev/null and a pipe that somebody reads are written to as they are.
    """
    if path.exists() and not path.is_file():
        _write_into(path, write)
        return
    temporary = path.with_name(f".{path.name[:60]}-{secrets.token_hex(4)}")
    try:  # the name is known before the file is there: nothing that comes in between leaves it behind
        with open(temporary, "xb") as file:
            write(file)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename in (None, str(temporary)):
            error.filename = str(path)  # a full disk does not say which file
        raise


def _write_into(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Raises OSError for a folder, and for a pipe that nobody reads."""
    handle = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    os.set_blocking(handle, True)
    with open(handle, "wb") as file:
        write(file)
