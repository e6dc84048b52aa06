"""The directive `options`: what a subcommand of `headgate` does and takes, read from its own argparse parser."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from typing import Any

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from headgate import cli


def complete_parser(command: list[str]) -> argparse.ArgumentParser:
    """The parser of `headgate COMMAND...`, with its options."""
    whole = cli.parser() if hasattr(cli, "parser") else cli._parser(command)
    for word in command:
        whole = subcommands(whole)[word]
    return whole


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Name -> parser of the next word, empty where there is none."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


class Options(SphinxDirective):
    """`{options} place`: description, usage, a table of options, examples."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        parser = complete_parser(self.arguments[0].split())
        about = " ".join((parser.description or "").split())
        found: list[nodes.Node] = [nodes.paragraph("", about)] if about else []
        rows = list(rows_of(parser))
        if rows:
            found.append(_table(rows))
        if parser.epilog:
            text = re.sub(r"^examples:\n", "", parser.epilog.strip("\n"))
            lines = [line.removeprefix("  ") for line in text.splitlines()]
            found.append(nodes.literal_block("\n".join(lines), "\n".join(lines), language="sh"))
        return found


def rows_of(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    """(the option as it is written, what it means) of every argument, in the order of --help."""
    formatter = parser._get_formatter()
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction | argparse._SubParsersAction | argparse._VersionAction):
            continue
        if not action.option_strings:
            written = formatter._metavar_formatter(action, action.dest)(1)[0]
        else:
            written = ", ".join(action.option_strings)
            if action.nargs != 0:
                written += " " + formatter._format_args(action, action.dest.upper())
        meaning = formatter._expand_help(action) if action.help else ""
        yield written, f"{meaning} (required)" if action.required and action.option_strings else meaning


def _table(rows: list[tuple[str, str]]) -> nodes.table:
    group = nodes.tgroup("", nodes.colspec(colwidth=40), nodes.colspec(colwidth=60), cols=2)
    body = nodes.tbody("")
    for written, meaning in rows:
        cells = (nodes.paragraph("", "", nodes.literal(written, written)), nodes.paragraph("", meaning))
        body += nodes.row("", *(nodes.entry("", cell) for cell in cells))
    group += body
    return nodes.table("", group)


def setup(app: Any) -> dict[str, bool]:
    app.add_directive("options", Options)
    return {"parallel_read_safe": True}
