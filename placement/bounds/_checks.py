"""What is asked of arrays that come from outside."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def real(thing: str, name: str, value: ArrayLike, ndim: int, least: float) -> NDArray[np.float64]:
    """float64, finite, at least `least`, with `ndim` dimensions."""
    array = np.asarray(value)
    if array.dtype.kind not in "uifb":
        raise TypeError(f"{thing}: {name} must be real numbers, got {array.dtype}")
    if array.ndim != ndim:
        raise ValueError(f"{thing}: {name} must have {ndim} dimensions, got {array.shape}")
    array = array.astype(np.float64)
    if not (np.isfinite(array).all() and (array >= least).all()):
        wrong = array[~(array >= least) | ~np.isfinite(array)][0]
        raise ValueError(f"{thing}: {name} must be finite and at least {least:g}, got {wrong}")
    return array


def positive_whole(thing: str, name: str, value: ArrayLike) -> NDArray[np.int64]:
    """int64 [n], n >= 1, each at least 1."""
    array = np.asarray(value)
    if array.dtype.kind not in "ui":
        raise TypeError(f"{thing}: {name} must be whole numbers, got {array.dtype}")
    if array.ndim != 1 or not len(array) or array.min() < 1:
        raise ValueError(f"{thing}: {name} must be one number >= 1 for each, got {array.tolist()}")
    return array.astype(np.int64)
