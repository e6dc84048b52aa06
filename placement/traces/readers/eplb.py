"""The weights that DeepSeek's EPLB takes (eplb.rebalance_experts): [L, E], the load of each logical expert.

.pt, .npy    the tensor
.npz         one array
.json        the nested list; or, as SGLang's --init-expert-location takes it, a dict with logical_count [L, E] or
             [steps, L, E]

There are no tokens in it: Statistics with loads and no transitions.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..statistics import Statistics
from .common import Found, Options, statistics_of


def fits(found: Found) -> bool:
    value = _weight(found.content)
    if isinstance(value, list):
        return bool(value) and all(isinstance(row, list) and row for row in value)
    return isinstance(value, np.ndarray) and value.ndim in (2, 3)


def read(found: Found, options: Options) -> Statistics:
    found.rule(fits(found), "content", "weights [L, E]", type(found.content).__name__)
    value = _weight(found.content)
    dims = 2
    if isinstance(value, list):
        dims += isinstance(value[0][0], list)
    else:
        dims = value.ndim
    counts = found.array(value, "weights", dims=dims, kinds="iuf")
    return statistics_of(found, counts.sum(axis=0) if dims == 3 else counts, "weights", options)


def _weight(content: Any) -> Any:
    if isinstance(content, dict):
        if "logical_count" in content:
            return content["logical_count"]
        return next(iter(content.values())) if len(content) == 1 else None
    return content
