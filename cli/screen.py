"""What the reader sees while the demo runs: headings, lines, and one progress bar without a library."""

from __future__ import annotations

import sys
import time
from typing import TextIO


class Screen:
    """Lines go to `out`, the bar to `progress`; both may be any text stream."""

    def __init__(self, out: TextIO | None = None, progress: TextIO | None = None) -> None:
        self.out = sys.stdout if out is None else out
        self.progress = sys.stderr if progress is None else progress

    def heading(self, title: str) -> None:
        self.say(f"\n{_bold(title, self.out)}")

    def say(self, line: str = "") -> None:
        _write(self.out, f"{line}\n")

    def table(self, rows: list[tuple[str, ...]]) -> None:
        """Columns of equal width, the first flush left and the others flush right."""
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        for row in rows:
            cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
            self.say("  " + "   ".join(cells).rstrip())

    def bar(self, total: int) -> Bar:
        return Bar(total, self.progress)


class Bar:
    """A progress bar: redrawn in place on a terminal, a line every tenth of the way elsewhere (a log file)."""

    WIDTH = 28

    def __init__(self, total: int, stream: TextIO) -> None:
        self.total, self.stream = total, stream
        self.started = time.perf_counter()
        self.live = stream.isatty()
        self.shown = -1

    def update(self, done: int, note: str) -> None:
        tenth = done * 10 // self.total
        if not self.live and tenth == self.shown:
            return
        self.shown = tenth
        spent = time.perf_counter() - self.started
        left = spent / max(done, 1) * (self.total - done)
        full = self.WIDTH * done // self.total
        line = f"  {'█' * full}{'░' * (self.WIDTH - full)} {done}/{self.total}  {note}  {clock(left)} left"
        _write(self.stream, f"\r{line}\x1b[K" if self.live else f"{line}\n")

    def close(self) -> None:
        if self.live:
            _write(self.stream, "\r\x1b[K")


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def spoken(seconds: float) -> str:
    """2 min 31 s."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _write(stream: TextIO, text: str) -> None:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    stream.write(text.encode(encoding, "replace").decode(encoding))  # a terminal may lack the block characters
    stream.flush()


def _bold(text: str, stream: TextIO) -> str:
    return f"\x1b[1m{text}\x1b[0m" if stream.isatty() else text
