"""Files written whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_LONGEST = 60  # characters of a name that its temporary files keep
_SUFFIX = ".headgate"  # so that they are nobody else's: a date is eight digits too
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Has `write` fill a temporary file beside `path`, then renames it. On an error an older file stays as it was, and
    what killed processes left behind goes (`remove_stale`).

    A device such as /dev/null and a pipe that somebody reads are written to as they are.
    """
    if path.exists() and not path.is_file():
        _write_into(path, write)
        return
    remove_stale(path)
    temporary = _beside(path)
    try:  # the name is known before the file is there: nothing that comes in between leaves it behind
        with _held(temporary) as file:
            write(file)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename in (None, str(temporary)):
            error.filename = str(path)  # a full disk does not say which file
        raise


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, to be filled in the `with` block; then it gets that name. `path` must be new or
    an empty folder. On an error nothing is left, and what killed processes left behind goes (`remove_stale`)."""
    remove_stale(path)
    temporary = _beside(path)
    try:
        with _held_folder(temporary):
            yield temporary
            os.rename(temporary, path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and _inside(error, temporary):
            error.filename = str(path)  # a full disk does not say which file; what it says is gone
        raise


def _beside(path: Path) -> Path:
    """A name for what `path` is to be: what is left of it can be removed by that."""
    return path.with_name(f".{path.name[:_LONGEST]}-{secrets.token_hex(4)}{_SUFFIX}")


def _inside(error: OSError, folder: Path) -> bool:
    """Whether it is about `folder`, as far as it says."""
    if error.filename is None:
        return error.errno in _FULL
    return isinstance(error.filename, str) and folder in (Path(error.filename), *Path(error.filename).parents)


def remove_stale(path: Path) -> None:
    """Removes the temporary files and folders for `path` whose writers were killed: nobody holds their locks."""
    ours = re.compile(re.escape(f".{path.name[:_LONGEST]}-") + "[0-9a-f]{8}" + re.escape(_SUFFIX))
    with suppress(OSError):
        for name in os.listdir(path.parent):
            if ours.fullmatch(name):
                _remove_unheld(path.parent / name)


def _remove_unheld(temporary: Path) -> None:
    with suppress(OSError):
        ways = os.O_RDONLY | os.O_DIRECTORY if temporary.is_dir() else os.O_RDWR
        handle = os.open(temporary, ways | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if temporary.is_dir():
                shutil.rmtree(temporary)
            else:
                temporary.unlink()
        finally:
            os.close(handle)


@contextmanager
def _held(temporary: Path) -> Iterator[BinaryIO]:
    """A new file, locked for as long as it is open: the lock ends with the process, however that ends."""
    while True:
        with open(temporary, "xb") as file:
            with suppress(OSError):  # a file system without locks: nothing is removed there either
                fcntl.flock(file, fcntl.LOCK_EX)
            if os.path.exists(temporary):  # nobody took it for stale between the two lines above
                yield file
                return


@contextmanager
def _held_folder(temporary: Path) -> Iterator[None]:
    """A new folder, locked in the same way."""
    while True:
        temporary.mkdir()
        try:
            handle = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
            if os.path.exists(temporary):
                yield
                return
        finally:
            os.close(handle)


def _write_into(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Raises OSError for a folder, and for a pipe that nobody reads."""
    handle = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    os.set_blocking(handle, True)
    with open(handle, "wb") as file:
        write(file)
