"""A table of rows: measured one by one, printed as they come, written for machines."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

from .. import machine
from ..output import write_json
from ..screen import Screen
from .case import Case
from .rows import Row


def screen_for(case: Case, to: str | None) -> Screen:
    """Where the table goes, with the case in its first line: standard error where the JSON goes to standard output."""
    screen = Screen(out=sys.stderr if to == "-" else sys.stdout)
    screen.say(
        f"{case.name}: fitted on {case.fit.shape[1]:,} tokens, judged on {case.judge.shape[1]:,}; {machine.processor()}"
    )
    return screen


def fill(
    case: Case, names: Sequence[str], rows: Mapping[str, Callable[[Case, float], Row]], effort: float, screen: Screen
) -> dict[str, Row]:
    """Measures the named rows and shows each when it is done."""
    found = {}
    for name in names:
        row = found[name] = rows[name](case, effort)
        screen.heading(row.title)
        screen.table([row.head, *row.lines])
    return found


def write(case: Case, found: Mapping[str, Row], to: str | None) -> None:
    """Everything as JSON to the file `to`; "-": standard output; None: nowhere."""
    rows = {name: asdict(row) for name, row in found.items()}
    write_json(to, {"case": case.name, "machine": machine.processor(), "rows": rows})
