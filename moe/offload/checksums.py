"""Whether what is read is what was written: a checksum of each expert, the digest of a whole file, its time of change.

A checkpoint has no checksums of its own. Where Hugging Face's client downloaded a file, it noted the file's SHA-256: as
the name of a blob in its cache, or in `.cache/huggingface/download/NAME.metadata` of a folder of its own.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from ...placement.careful import Guard, opened
from .kinds import Layer
from .reads import Piece

Verify = bool | Literal["first"]
_BLOCK = 1 << 20  # bytes
_SHA256 = re.compile(r"[0-9a-f]{64}")


def check_verify(verify: object, who: str) -> None:
    """Raises ValueError where it is none of the three."""
    if not isinstance(verify, bool) and verify != "first":
        raise ValueError(f'{who}: verify must be "first", True or False, got {verify!r}')


class Checksums:
    """CRC-32 of each expert of `layers`. `known[layer][expert]`: what they must be; None: they are taken when an expert
    is read for the first time. `verify`: True compares at each read, "first" at the first of each expert, False never.
    """

    def __init__(self, verify: Verify, layers: Sequence[Layer], known: Sequence[Sequence[int]] | None = None) -> None:
        self.verify = verify
        self._sums: list[list[int | None]] = [
            [None] * layer.experts if known is None else list(known[i]) for i, layer in enumerate(layers)
        ]
        self._compared = [bytearray(layer.experts) for layer in layers]

    def compare(self, layer: int, expert: int, read: Sequence[Piece], path: Path) -> None:
        """Of an expert that has just been read. Raises OSError where it is another than it should be."""
        if not self.verify or (self.verify == "first" and self._compared[layer][expert]):
            return
        got, want = 0, self._sums[layer][expert]
        for data, _, _ in read:
            got = zlib.crc32(data, got)
        if want is None:
            self._sums[layer][expert] = got
        elif got != want:
            rule = f"layer {layer}, expert {expert} must have the checksum {want:08x}, got {got:08x}"
            raise OSError(errno.EIO, rule, str(path))
        self._compared[layer][expert] = 1


class Stamp(NamedTuple):
    """What tells that a file was written to: it costs a microsecond to ask."""

    size: int
    changed_ns: int

    @classmethod
    def of(cls, handle: int) -> Stamp:
        about = os.fstat(handle)
        return cls(about.st_size, about.st_mtime_ns)

    def compare(self, handle: int, path: Path) -> None:
        """Raises OSError where an open file is no longer as it was."""
        if Stamp.of(handle) != self:
            raise OSError(
                errno.ESTALE, "the file must stay as it is while it is used, got one that was changed", str(path)
            )


def check_digests(files: Sequence[tuple[int, Path]], who: str) -> None:
    """Reads whole files, (handle, path) each, whose SHA-256 was noted when they were downloaded. Raises ValueError
    where one has another; warns where none was noted."""
    without = []
    for handle, path in files:
        noted = noted_digest(path)
        if noted is None:
            without.append(path.name)
            continue
        digest, at = hashlib.sha256(), 0
        while block := os.pread(handle, _BLOCK, at):
            digest.update(block)
            at += len(block)
        rule = f"{noted}, as it was noted at the download"
        Guard(path, who).rule(digest.hexdigest() == noted, "SHA-256", rule, digest.hexdigest())
    if without:
        warnings.warn(
            f"{who}: verify: {len(without)} of {len(files)} files have no SHA-256 that was noted at a download, "
            f"{without[0]} for one: what is in them is taken as it is, and compared when it is read again",
            stacklevel=3,
        )


def noted_digest(path: Path) -> str | None:
    """The SHA-256 that Hugging Face's client noted of a file; None where it did not."""
    real = Path(os.path.realpath(path))
    if real.parent.name == "blobs" and _SHA256.fullmatch(real.name):
        return real.name
    note = path.parent / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"
    if not note.exists():
        return None
    with opened(note, "load") as file:
        lines = file.text().split("\n")  # commit, ETag (of a large file, its SHA-256), time
    return lines[1] if len(lines) > 1 and _SHA256.fullmatch(lines[1]) else None
