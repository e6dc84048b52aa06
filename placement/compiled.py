"""numba's njit for functions that call one another across files.

numba keeps what it compiled beside the file and looks at that file alone: after a change of a policy, a simulator that
was compiled before would go on with the old one, and no longer agree with the live model. Here what is kept counts as
old once any file of the functions' room has changed; for the loops of the search, the walk too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numba

_HERE = Path(__file__).parent


@cache
def _stamp(room: str) -> tuple:
    files = sorted((_HERE / room).rglob("*.py")) + ([_HERE / "walk.py"] if room == "search" else [])
    return tuple((path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in files)


def njit(function: Callable | None = None, *, inline: Literal["never", "always"] = "never") -> Any:
    """`function` compiled at first use, and kept for later processes. `inline`: as numba's."""
    if function is None:
        return partial(njit, inline=inline)
    made: Any = numba.njit(cache=True, inline=inline)(function)
    kept: Any = getattr(getattr(made, "_cache", None), "_cache_file", None)  # numba has no public name for it
    if not hasattr(kept, "_source_stamp"):
        return numba.njit(inline=inline)(function)
    room = Path(function.__code__.co_filename).relative_to(_HERE).parts[0]
    kept._source_stamp = (kept._source_stamp, _stamp(room))
    return made
