"""What the reader of a command sees: lines, headings, tables and one progress bar, by `rich`.

Colours and a moving bar are for terminals; NO_COLOR is respected. In a log the lines are plain and of any length, and
progress is a line every tenth of the way. A character that the stream cannot encode becomes a question mark.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Collection, Sequence
from datetime import timedelta
from typing import Any, TextIO, cast

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

ENDLESS = 10_000  # columns of a log: nothing is wrapped there


class Screen:
    """Lines go to `out`; progress goes there too where that is a terminal, and to `progress` elsewhere."""

    def __init__(self, out: TextIO | None = None, progress: TextIO | None = None) -> None:
        self.out = _console(sys.stdout if out is None else out)
        self.progress = self.out if _live(self.out) else _console(sys.stderr if progress is None else progress)

    def say(self, line: str = "") -> None:
        self.out.print(line, soft_wrap=True)

    def piece(self, text: str) -> None:
        """Text as it comes, without a line's end. A terminal gets no control characters that somebody else wrote."""
        if _live(self.out):
            text = "".join(c for c in text if c in "\n\t" or c.isprintable())
        self.out.file.write(text)
        self.out.file.flush()

    def heading(self, title: str) -> None:
        self.out.print()
        self.out.print(Text(title, style="bold cyan"), soft_wrap=True)

    def table(self, rows: Sequence[Sequence[str]], left: Collection[int] = (0,), rule: bool = False) -> None:
        """The first row is the head, with a `rule` below it if wished; the columns `left` are flush left, the others
        flush right."""
        self.out.print(_table(rows, left, rule))

    def bar(self, total: int) -> Bar:
        return Bar(total, self.progress)


class Bar:
    """In a `with`: a bar in place on a terminal, a line every tenth of the way elsewhere. What is said meanwhile stands
    above it."""

    def __init__(self, total: int, console: Console) -> None:
        self.total, self.console, self.shown = total, console, -1
        self.started = time.perf_counter()
        words = (BarColumn(28), MofNCompleteColumn(), TextColumn("{task.fields[note]}", markup=False))
        # no thread that redraws, and the streams of others are theirs
        self.moving = Progress(
            TextColumn(""), *words, TimeRemainingColumn(), console=console, transient=True, auto_refresh=False,
            redirect_stdout=False, redirect_stderr=False,
        )  # fmt: skip
        self.task = self.moving.add_task("", total=total, note="")

    def __enter__(self) -> Bar:
        if _live(self.console):
            self.moving.start()
        return self

    def update(self, done: int, note: str) -> None:
        if _live(self.console):
            self.moving.update(self.task, completed=done, note=note, refresh=True)
            return
        tenth = done * 10 // self.total
        if tenth != self.shown:
            self.shown = tenth
            left = (time.perf_counter() - self.started) / max(done, 1) * (self.total - done)
            self.console.print(f"  {done}/{self.total}  {note}  {timedelta(seconds=int(left))} left", soft_wrap=True)

    def __exit__(self, *_: object) -> None:
        if _live(self.console):
            self.moving.stop()


def lines(rows: Sequence[Sequence[str]], left: Collection[int] = (0,), rule: bool = False) -> list[str]:
    """A table as text: what `Screen.table` writes into a log."""
    text = io.StringIO()
    _console(text).print(_table(rows, left, rule))
    return [line.rstrip() for line in text.getvalue().splitlines()]


def _table(rows: Sequence[Sequence[str]], left: Collection[int], rule: bool) -> Table:
    frame = SIMPLE_HEAD if rule else None
    table = Table(box=frame, show_edge=False, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    for at, name in enumerate(rows[0]):
        table.add_column(f"  {name}" if not at else name, justify="left" if at in left else "right", overflow="fold")
    for first, *others in rows[1:]:
        table.add_row(f"  {first}", *others)
    return table


def _live(console: Console) -> bool:
    """Whether a person watches: a terminal, whatever FORCE_COLOR says of it."""
    return console.file.isatty() and console.is_interactive


def _console(stream: TextIO) -> Console:
    wide = None if stream.isatty() else ENDLESS
    return Console(file=cast(TextIO, _Safe(stream)), width=wide, markup=False, emoji=False, highlight=False)


class _Safe:
    """A stream that writes `?` for what its encoding lacks."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        return self.stream.write(text.encode(encoding, "replace").decode(encoding))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
