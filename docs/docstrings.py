"""The docstrings of this code are plain text; here they become what Sphinx reads.

A block of lines (between empty lines) is one of these:

    >>> an example          shown as it is
    name  what it is        a list of names, each with its explanation; further lines of one are indented
        indented lines      formulas, shapes and tables: shown as they are
    all else                a paragraph, in which `code` stands between single backticks
"""

from __future__ import annotations

import re
from typing import Any

NAME = re.compile(r"(\S+(?: \S+){0,3}?)\s{2,}(\S.*)")


def convert(lines: list[str]) -> list[str]:
    """The lines of a docstring, plain text, as lines of reStructuredText."""
    blocks: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            blocks[-1].append(line.rstrip())
        elif blocks[-1]:
            blocks.append([])
    return [line for block in blocks if block for line in (*_block(block), "")]


def _block(lines: list[str]) -> list[str]:
    if lines[0].startswith(">>>"):
        return lines
    if lines[0][0] in " |":
        return ["::", "", *(f"    {line}" for line in lines)]
    if all(NAME.fullmatch(line) or line.startswith("  ") for line in lines) and NAME.fullmatch(lines[0]):
        return _names(lines)
    end = next((i for i, line in enumerate(lines) if line[0] in " |" or line.startswith(">>>")), len(lines))
    found = [_text(line) for line in lines[:end]]
    if end == len(lines):
        return found
    again = next((i for i in range(end, len(lines)) if lines[i][0] not in " |>."), len(lines))
    rest = _block(lines[again:]) if again < len(lines) else []
    return [*found, "", *_block(lines[end:again]), "", *rest]


def _names(lines: list[str]) -> list[str]:
    """A list of names: a definition list, each name as code."""
    found: list[str] = []
    for line in lines:
        if match := NAME.fullmatch(line):
            found += [f"``{match[1]}``", f"    {_text(match[2])}"]
        else:
            found.append(f"    {_text(line.strip())}")
    return found


def _text(line: str) -> str:
    """Running text: what reStructuredText would take for a sign is escaped, `code` becomes ``code``."""
    parts = line.split("`")
    if len(parts) % 2 == 0:  # a backtick without its fellow: the code goes on in the next line
        return re.sub(r"([\\*_|`])", r"\\\1", line)
    plain = [re.sub(r"([\\*_|])", r"\\\1", part) for part in parts]
    found = plain[0]
    for i in range(1, len(parts), 2):  # code and a word must not touch: "\\ " parts them and is not shown
        before = "\\ " if found[-1:].isalnum() else ""
        after = "\\ " if plain[i + 1][:1].isalnum() else ""
        found += f"{before}``{parts[i]}``{after}{plain[i + 1]}"
    return re.sub(r"^([-+•]|\d+[.)])(?= )", r"\\\1", found)


def setup(app: Any) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", _on_docstring)
    return {"parallel_read_safe": True}


def _on_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    if getattr(obj, "__module__", "").startswith("headgate") or what == "module":
        lines[:] = convert(lines)
