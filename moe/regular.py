"""Files that others made, opened with care."""

from __future__ import annotations

import os
import stat
from pathlib import Path

LONGEST = 300  # characters of an error about a file


def open_regular(path: str | os.PathLike[str], who: str) -> int:
    """The file, open for reading. Raises OSError, and ValueError at once where it is a pipe, a device or a folder."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would wait for its writer
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise fault(who, path, "must be a regular file")
    os.set_blocking(file, True)
    return file


def read_regular(path: Path, who: str, most: int | None = None) -> bytes:
    """All of the file. Raises as open_regular, and ValueError where it has more than `most` bytes."""
    with open(open_regular(path, who), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if most is not None and size > most:
            raise fault(who, path, f"must have at most {most} bytes, got {size}")
        return file.read()


def fault(who: str, path: str | os.PathLike[str], rule: str) -> ValueError:
    """The error about a file, in one line of at most LONGEST characters; the end of a long path says most."""
    rule = shown(rule, 190)
    name = str(path)
    room = LONGEST - len(f"{who}: ... {rule}")
    return ValueError(f"{who}: {name if len(name) <= room else '...' + name[-room:]} {rule}")


def shown(value: object, most: int = 60) -> str:
    """The value as errors show it: text as it is, anything else by its name or digits, in one short line."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    text = value if isinstance(value, str) else repr(value)
    text = "".join(c if c.isprintable() else "?" for c in text[: most + 1])
    return text if len(text) <= most else text[: most - 3] + "..."
