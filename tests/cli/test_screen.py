"""The one screen of all commands: tables, progress, colours and encodings, in terminals and in logs."""

from __future__ import annotations

import io
import re
from collections import Counter

import pytest

from headgate.bench import screen
from headgate.bench.screen import Screen

ROWS = [("name", "us", "why"), ("headgate", "1.5", "[bold]no markup[/bold]"), ("a", "12,345.0", ":smile: is no emoji")]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    return Terminal()


def test_a_table_in_a_log_is_plain_text_of_any_width():
    log = io.StringIO()
    Screen(log).table([*ROWS, ("long", "0", "x" * 300)], left=(0, 2))
    lines = log.getvalue().splitlines()
    assert [line.split("   ")[0].strip() for line in lines] == ["name", "headgate", "a", "long"]
    assert "x" * 300 in lines[3]
    assert "[bold]no markup[/bold]" in lines[1]
    assert ":smile:" in lines[2]
    ends = {line.index(number) + len(number) for line, number in zip(lines[:3], ("us", "1.5", "12,345.0"), strict=True)}
    assert len(ends) == 1, "numbers are flush right"
    assert screen.lines(ROWS, left=(0, 2)) == [line.rstrip() for line in _shown(ROWS)]


def _shown(rows):
    log = io.StringIO()
    Screen(log).table(rows, left=(0, 2))
    return log.getvalue().splitlines()


def test_a_rule_stands_below_the_head():
    head, rule, *rest = screen.lines(ROWS, rule=True)
    assert "name" in head
    assert set(rule) == {"─"}
    assert len(rest) == 2


def test_a_narrow_terminal_loses_no_figure(terminal, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    Screen(terminal).table([("", "a", "b", "c"), ("row", "123456789", "987654321", "555555555")])
    shown = re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue())
    assert max(map(len, shown.splitlines())) <= 20
    assert Counter(c for c in shown if c.isdigit()) == Counter("123456789987654321555555555")


def test_colours_are_for_terminals_and_no_color_is_respected(terminal, monkeypatch):
    def heading(stream):
        Screen(stream).heading("Training")
        return stream.getvalue()

    assert "\x1b[1;36m" in heading(terminal)
    assert heading(io.StringIO()) == "\nTraining\n"
    monkeypatch.setenv("NO_COLOR", "1")
    assert "36" not in heading(Terminal())
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert heading(Terminal()) == "\nTraining\n"


def test_progress_moves_on_a_terminal_and_is_a_line_every_tenth_in_a_log(terminal, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as CI sets it: its log is no terminal for all that
    log = io.StringIO()
    for out in (log, terminal):
        with Screen(out, out).bar(100) as bar:
            for i in range(100):
                bar.update(i + 1, f"loss {i}")
    lines = log.getvalue().splitlines()
    assert len(lines) == 11
    assert lines[5].startswith("  50/100  loss 49  0:0")
    assert "\r" not in log.getvalue()
    assert "100/100" in terminal.getvalue()
    assert "loss 99" in terminal.getvalue()
    assert terminal.getvalue().count("\r") > 50


def test_what_is_said_during_progress_stands_above_the_bar(terminal):
    screen = Screen(terminal)
    with screen.bar(10) as bar:
        bar.update(5, "half")
        screen.say("a line")
        shown = terminal.getvalue()
        assert shown.index("half") < shown.index("a line\n") < shown.rindex("half"), "drawn again, below"


def test_progress_of_a_redirected_command_goes_to_the_other_stream(terminal):
    out = io.StringIO()
    screen = Screen(out, terminal)
    with screen.bar(10) as bar:
        bar.update(3, "going on")
        screen.say("figures")
    assert out.getvalue() == "figures\n"
    assert "going on" in terminal.getvalue()


def test_long_lines_are_not_broken(terminal):
    Screen(terminal).say("word " * 60)
    assert terminal.getvalue().count("\n") == 1


def test_a_stream_that_knows_no_blocks_gets_question_marks():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="latin-1")
    Screen(stream).say("load ▁█")
    assert raw.getvalue() == b"load ??\n"


def test_a_bar_that_is_interrupted_leaves_the_terminal_as_it_was(terminal):
    def interrupted():
        with Screen(terminal).bar(10) as bar:
            bar.update(3, "going on")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert terminal.getvalue().rindex("\x1b[?25h") > terminal.getvalue().rindex("\x1b[?25l"), "the cursor is back"
