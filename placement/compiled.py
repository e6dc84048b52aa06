"""numba's njit for functions that call one another across files.

numba keeps what it compiled beside the file and looks at that file alone: after a change of a policy, a simulator that
was compiled before would go on with the old one, and no longer agree with the live model. Here what is kept counts as
old once any file of the caches has changed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba

_CACHING = Path(__file__).parent / "caching"
_FILES = sorted(_CACHING.rglob("*.py"))
_STAMP = tuple((path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in _FILES)


def njit(function: Callable) -> Any:
    """`function` compiled at first use, and kept for later processes."""
    made: Any = numba.njit(cache=True)(function)
    kept: Any = getattr(getattr(made, "_cache", None), "_cache_file", None)  # numba has no public name for it
    if not hasattr(kept, "_source_stamp"):
        return numba.njit(function)
    kept._source_stamp = (kept._source_stamp, _STAMP)
    return made
