"""What the chapters of the demo share: what was asked for, and what has been found so far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...bench.corpus import Corpus
from ...bench.olmoe import Model, Shape
from ...bench.screen import Screen
from ...placement.placement import Placement
from ...placement.traces.trace import Trace


@dataclass(frozen=True)
class Options:
    """`steps` None: as many as fit in `train_seconds`, between 100 and 600, and fewer where the machine slows down on
    the way. Raises ValueError naming the rule."""

    text: Path | None = None
    output: Path = Path("headgate-demo")
    steps: int | None = None
    seed: int = 0
    rows: int = 4
    train_seconds: float = 90.0
    speed_seconds: float = 20.0
    learning_rate: float = 3e-3
    shape: Shape = field(default_factory=Shape)

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"demo: --steps must be at least 1, got {self.steps}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"demo: --seed must be 0 .. 2**32 - 1, got {self.seed}")


@dataclass
class Tour:
    """The state that chapters read and add to. `metrics` has one entry per chapter and ends up in metrics.json."""

    options: Options
    screen: Screen
    corpus: Corpus
    metrics: dict[str, Any] = field(default_factory=dict)
    model: Model = None  # until it is built
    trace: Trace | None = None
    placement: Placement | None = None
    interrupted: str | None = None  # the chapter in which Ctrl-C came


@dataclass(frozen=True)
class Chapter:
    """`run` does the work and fills `tour.metrics[name]`; `section` returns its part of the report, as HTML.

    `section` is called only when the entry is there, so that an interrupted demo reports what it has.
    """

    name: str
    title: str
    run: Callable[[Tour], None]
    section: Callable[[Tour], str]


def spoken(seconds: float) -> str:
    """2 min 31 s."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
