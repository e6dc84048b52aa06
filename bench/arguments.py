"""Types of options: what is no such value is refused by argparse, which names the option, before anything is loaded."""

from __future__ import annotations

import math
import os
import re
from argparse import ArgumentTypeError
from pathlib import Path

MOST = 2**31 - 1  # of a count: more is a mistake, and what compiled code cannot count

MOST_EFFORT = 1e6
MOST_WORKERS = 4096


def whole(text: str) -> int:
    """A whole number that compiled code can count to."""
    return _whole(text, -MOST, f"of at most {MOST}")


def positive(text: str) -> int:
    """A count of at least 1."""
    return _whole(text, 1, f"from 1 to {MOST}")


def workers(text: str) -> int:
    """How many threads or processes compute."""
    value = positive(text)
    if value > MOST_WORKERS:
        raise ArgumentTypeError(f"must be at most {MOST_WORKERS}, got {text!r}")
    return value


def seed(text: str) -> int:
    """What a random generator starts from."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value < 2**64:
        raise ArgumentTypeError(f"must be a whole number from 0 to 2**64 - 1, got {text!r}")
    return value


def number(text: str) -> float:
    """A finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ArgumentTypeError(f"must be a finite number, got {text!r}")
    return value


def limit(text: str) -> float:
    """A number, or inf: no limit."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise ArgumentTypeError(f"must be a number or inf, got {text!r}")
    return value


def effort(text: str) -> float:
    """How much longer than usual something is searched or repeated."""
    value = number(text)
    if not 0 < value <= MOST_EFFORT:
        raise ArgumentTypeError(f"must be above 0 and at most {MOST_EFFORT:.0f}, got {text!r}")
    return value


def device(text: str) -> str:
    """cpu, cuda, or cuda:0 and the like."""
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", text):
        raise ArgumentTypeError(f"must be cpu, cuda or cuda:N, got {text!r}")
    return text


def output(text: str) -> str:
    """A file that can be written, or - for standard output."""
    if text != "-":
        _check_output(text)
    return text


def output_file(text: str) -> Path:
    """A file that can be written."""
    _check_output(text)
    return Path(text)


def input_file(text: str) -> Path:
    """A file to read, no pipe or device. One that is missing is said when it is opened."""
    path = Path(text)
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ArgumentTypeError(f"must be a file, got the pipe or device {text!r}")
    return path


def _whole(text: str, least: int, rule: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if not least <= value <= MOST:
        raise ArgumentTypeError(f"must be a whole number {rule}, got {text!r}")
    return value


def _check_output(text: str) -> None:
    path = Path(text)
    fits = bool(text) and "\0" not in text and not path.is_dir()
    if fits:  # a device or a pipe is written to as it is, a file by a new one beside it
        where = path if path.exists() and not path.is_file() else path.absolute().parent
        fits = os.access(where, os.W_OK) and (where == path or where.is_dir())
    if not fits:
        raise ArgumentTypeError(f"must be a file in a folder that can be written to, got {text!r}")
