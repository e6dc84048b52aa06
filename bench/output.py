"""Where a benchmark's results go: a file, whole or not at all, or standard output."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ..placement.files import write_whole


def write_json(where: str | None, report: Any) -> None:
    """To the file `where`; "-": to standard output; None: nowhere."""
    text = json.dumps(report, indent=1) + "\n"
    if where == "-":
        sys.stdout.write(text)
    elif where is not None:
        write_text(Path(where), text)


def write_text(path: Path, text: str) -> None:
    """The whole text or, on an error, the file as it was."""
    write_whole(path, lambda file: file.write(text.encode()))
