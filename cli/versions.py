"""Which versions of the packages that Headgate stands on are known to work: the one place that says so.

docs/versions.md tells how that was found, and what to do after a new release.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

# distribution -> (oldest, newest) minor version known to work, both included with all their patches
KNOWN = {
    "torch": ((2, 11), (2, 14)),
    "transformers": ((5, 18), (5, 24)),
    "peft": ((0, 15), (0, 21)),
    "triton": ((3, 6), (3, 9)),
}


def written(minor: tuple[int, int]) -> str:
    """(2, 14) -> "2.14"."""
    return f"{minor[0]}.{minor[1]}"


def known_ranges() -> dict[str, dict[str, str]]:
    """KNOWN as `headgate doctor --json` prints it."""
    return {name: {"oldest": written(old), "newest": written(new)} for name, (old, new) in KNOWN.items()}


def outside(versions: Mapping[str, str | None]) -> list[str]:
    """A sentence for each installed version that is outside of its range; packages not installed are none.

    `versions`: distribution -> version, or None where it is not installed.
    """
    said = []
    for name, (old, new) in KNOWN.items():
        version = versions.get(name)
        found = re.match(r"(\d+)\.(\d+)", version) if version is not None else None
        if version is not None and (found is None or not old <= (int(found[1]), int(found[2])) <= new):
            said.append(f"{name} {version} was not tested; versions known to work: {written(old)} to {written(new)}")
    return said
