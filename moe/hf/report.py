"""What a swap did, and what has run since."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from .counting import Calls


@dataclass(eq=False)
class Report:
    """`replaced`: module names; `skipped`: name -> reason; `how`: name -> class and what runs for it.

    `calls`: name -> calls that really went through Headgate, in eager mode; `compiled`: names that were traced into a
    torch.compile graph, whose calls cannot be counted.
    """

    model: str
    skipped: dict[str, str] = field(default_factory=dict)
    how: dict[str, str] = field(default_factory=dict)
    _counters: dict[str, Calls] = field(default_factory=dict, repr=False)

    def add(self, name: str, how: str, counter: Calls) -> None:
        self.how[name] = how
        self._counters[name] = counter

    @property
    def replaced(self) -> list[str]:
        return list(self.how)

    @property
    def calls(self) -> dict[str, int]:
        return {name: c.count for name, c in self._counters.items()}

    @property
    def compiled(self) -> list[str]:
        return [name for name, c in self._counters.items() if c.compiled]

    def __str__(self) -> str:
        taken, left = len(self.how), len(self.skipped)
        lines = [
            f"Headgate runs {taken} of {taken + left} MoE blocks of {self.model}, {left or 'none'} skipped, "
            f"{sum(self.calls.values())} calls so far"
        ]
        lines += [f"  {n} x {how}" for how, n in Counter(self.how.values()).items()]
        lines += [f"  skipped {name}: {why}" for name, why in self.skipped.items()]
        quiet = [name for name, n in self.calls.items() if not n and not self._counters[name].compiled]
        if quiet and len(quiet) < taken:
            lines.append(f"  never called: {', '.join(quiet)}")
        if self.compiled:
            lines.append(f"  {len(self.compiled)} run inside compiled graphs, whose calls are not counted")
        return "\n".join(lines)
