"""The text: bytes found on any machine with Python, split into what is trained on and what is held out."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import stat
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

VOCABULARY = 256  # a token is a byte: no tokenizer to train, and bits per byte need no conversion
MOST_BYTES = 6_000_000
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "encodings", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """uint8 arrays of bytes; `source` says in words where they come from."""

    train: NDArray[np.uint8]
    held_out: NDArray[np.uint8]
    source: str

    def batches(self, rows: int, length: int, seed: int) -> Iterator[Tensor]:
        """Endless int64 [rows, length] of random windows of the training text."""
        draw = np.random.default_rng(seed)
        while True:
            yield _windows(self.train, draw.integers(0, len(self.train) - length, rows), length)

    def held_out_batches(self, rows: int, length: int, count: int) -> list[Tensor]:
        """At most `count` batches int64 [rows, length] of held-out windows, evenly spread and never overlapping."""
        there = len(self.held_out) // length
        wanted = min(count * rows, there)
        starts = np.arange(wanted) * (there // wanted) * length
        return [_windows(self.held_out, starts[at : at + rows], length) for at in range(0, wanted, rows)]


def _windows(text: NDArray[np.uint8], starts: NDArray[np.integer], length: int) -> Tensor:
    return torch.from_numpy(text[starts[:, None] + np.arange(length)].astype(np.int64))


def least_bytes(length: int) -> int:
    """The smallest text that leaves something to hold out: forty windows."""
    return 40 * length


def read_corpus(path: Path | None, length: int, who: str = "demo") -> Corpus:
    """The corpus from a file (its last tenth is held out), or from the running Python's standard library (a tenth of
    its files, chosen by a hash of their names, is held out).

    Raises ValueError, in the name of `who`, where the text cannot be read or is too small.
    """
    corpus = _from_library(who) if path is None else _from_file(path, who)
    size = len(corpus.train) + len(corpus.held_out)
    if size < least_bytes(length):
        raise ValueError(
            f"{who}: the text must have at least {least_bytes(length):,} bytes, got {size:,} in {corpus.source}"
        )
    return corpus


def _from_file(path: Path, who: str) -> Corpus:
    try:
        with open(path, "rb", opener=_promptly) as file:
            content = np.frombuffer(file.read(MOST_BYTES), np.uint8)
    except OSError as error:
        raise ValueError(f"{who}: --text must be a file that can be read, got {path} ({error.strerror})") from error
    split = len(content) * 9 // 10
    return Corpus(content[:split], content[split:], str(path))


def _promptly(path: str, flags: int) -> int:
    """Opens a file, or a pipe without waiting for somebody who writes. Raises OSError for a device."""
    handle = os.open(path, flags | os.O_NONBLOCK)
    if stat.S_ISCHR(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "a device")
    os.set_blocking(handle, True)
    return handle


def _from_library(who: str) -> Corpus:
    root = Path(sysconfig.get_path("stdlib"))
    train: list[bytes] = []
    held_out: list[bytes] = []
    size = 0
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if LEFT_OUT & set(name.parts):
            continue
        try:
            content = path.read_bytes()
        except OSError:
            continue  # one unreadable file of hundreds does not matter
        if size + len(content) > MOST_BYTES:
            continue
        size += len(content)
        pick = hashlib.sha256(name.as_posix().encode()).digest()[0]
        (held_out if pick < 26 else train).append(content)
    if not held_out:
        raise ValueError(f"{who}: --text must be given, as {root} holds no standard library sources")
    return Corpus(
        np.frombuffer(b"".join(train), np.uint8),
        np.frombuffer(b"".join(held_out), np.uint8),
        f"the Python {sysconfig.get_python_version()} standard library, {len(train) + len(held_out)} files",
    )


def baselines(corpus: Corpus) -> dict[str, float]:
    """Bits per byte on the held-out text of what needs no network: no knowledge, byte counts, counts of byte pairs."""
    single = np.bincount(corpus.train, minlength=VOCABULARY) + 1.0
    pairs = corpus.train[:-1].astype(np.int64) * VOCABULARY + corpus.train[1:]
    double = np.bincount(pairs, minlength=VOCABULARY**2).reshape(VOCABULARY, VOCABULARY) + single / single.sum()
    text = corpus.held_out
    return {
        "uniform": math.log2(VOCABULARY),
        "unigram": float(-np.log2(single / single.sum())[text].mean()),
        "bigram": float(-np.log2(double / double.sum(1, keepdims=True))[text[:-1], text[1:]].mean()),
    }
