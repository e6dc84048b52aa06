"""Chapter: a few lines that the trained model writes."""

from __future__ import annotations

from ...bench import html
from .model import generate
from .tour import Tour

PROMPT = b"\n    def "
LENGTH = 240


def run(tour: Tour) -> None:
    prompt = PROMPT if tour.options.text is None else bytes(tour.corpus.held_out[:48])
    text = generate(tour.model, prompt, min(LENGTH, tour.options.shape.length), tour.options.seed)
    tour.metrics["sample"] = {
        "prompt": prompt.decode("utf-8", "replace"),
        "text": text[len(prompt) :].decode("utf-8", "replace"),
    }
    for line in text.decode("utf-8", "replace").splitlines():
        tour.screen.say(f"  │ {_printable(line)}")


def _printable(line: str) -> str:
    """Without control characters, which an untrained model writes and a terminal would obey."""
    return "".join(c if c.isprintable() or c == "\t" else "�" for c in line)


def section(tour: Tour) -> str:
    found = tour.metrics["sample"]
    return html.prose(
        "Written by transformers' own <code>generate</code> on the swapped model, byte by byte. After so few steps it "
        "has the look of the text and not its sense."
    ) + html.sample(_lines(found["prompt"]), _lines(found["text"]))


def _lines(text: str) -> str:
    return "\n".join(_printable(line) for line in text.split("\n"))
