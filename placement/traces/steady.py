"""The load that tokens yet to come are likely to bring, from a trace of a few sequences.

What a token uses depends on the text that it stands in, so that a long sequence is one witness and not a thousand.
Where its every token counts, its own taste passes for everybody's.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .trace import Trace


def steady_load(trace: Trace, labels: NDArray[np.integer] | None = None, most: int = 64) -> NDArray[np.float64]:
    """float64 [L, E], each layer adding up to 1 (0 if unused): a sequence counts for no more than `most` tokens.

    `labels` int [T], such as a token's domain, have the shares of tokens that they have in the trace. Without sequences
    every token counts. Raises ValueError where `most` is below 1 or labels are not [T].
    """
    layers, tokens, _ = trace.shape
    if most < 1:
        raise ValueError(f"steady_load: most must be at least 1 token, got {most}")
    labels = np.zeros(tokens, np.int64) if labels is None else np.asarray(labels)
    if labels.shape != (tokens,):
        raise ValueError(f"steady_load: labels must be [T={tokens}], got {labels.shape}")
    weight = np.ones(tokens)
    if trace.sequence is not None and tokens:
        _, part, length = np.unique([labels, trace.sequence], axis=1, return_inverse=True, return_counts=True)
        weight = (np.minimum(length, most) / length)[part.ravel()]
        _, kind = np.unique(labels, return_inverse=True)
        weight *= (np.bincount(kind) / np.bincount(kind, weight))[kind]
    loads = np.zeros((layers, trace.num_experts))
    for load, ids, live in zip(loads, trace.expert_ids, trace.live, strict=True):
        each = np.repeat(weight, live.sum(1))
        load[:] = np.bincount(ids[live], each, trace.num_experts)
    total = loads.sum(1, keepdims=True)
    return np.divide(loads, total, out=np.zeros_like(loads), where=total > 0)
