"""The few pieces of HTML that chapters use."""

from __future__ import annotations

from html import escape


def prose(words: str) -> str:
    """A paragraph; `words` may hold markup."""
    return f"<p>{words}</p>\n"


def subtitle(words: str) -> str:
    return f"<h3>{escape(words)}</h3>\n"


def table(rows: list[list[str]], raw: bool = False) -> str:
    """The first row is the head; `raw` cells may hold markup."""
    safe = (lambda cell: cell) if raw else escape
    head = "".join(f"<th>{safe(cell)}</th>" for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{safe(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:])
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>\n'


def grid(pictures: list[str]) -> str:
    return f'<div class="grid">{"".join(pictures)}</div>\n'


def key(letter: str, note: str) -> str:
    return f'<span class="key"><kbd>{escape(letter)}</kbd><small>{escape(note)}</small></span>'


def sample(prompt: str, text: str) -> str:
    return f'<pre class="sample"><b>{escape(prompt)}</b>{escape(text)}</pre>\n'
