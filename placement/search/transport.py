"""Rows to columns with room for several, worth most in all: the assignment problem behind one layer's placement."""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True)
def transport(worth, room, price):
    """int32 [R]: the column of each row, column c taken room[c] times, with the largest sum of worth [R, C]. Exact.

    Shortest augmenting paths (Jonker and Volgenant, 1987) on columns with room, so that a GPU with many slots is one
    column and not many. The sum of `room` must be R. `price` float64 [C]: what the columns are thought to be worth, any
    numbers; the true ones afterwards, from which a slightly different problem is solved much sooner. O(R C^2 room).
    """
    rows, columns = worth.shape
    column_of = np.full(rows, -1, np.int32)
    most = max(1, room.max())
    taken, members = np.zeros(columns, np.int64), np.zeros((columns, most), np.int64)
    far, came, done = np.empty(columns), np.empty(columns, np.int64), np.empty(columns, np.bool_)
    for row in range(rows):
        for c in range(columns):  # the loss of each column, after its price, and the row through which it is reached
            far[c], came[c], done[c] = price[c] - worth[row, c], row, False
        while True:
            near = -1
            for c in range(columns):
                if not done[c] and room[c] > 0 and (near < 0 or far[c] < far[near]):
                    near = c
            if taken[near] < room[near]:
                break
            done[near] = True
            for i in range(taken[near]):
                other = members[near, i]
                base = far[near] - (price[near] - worth[other, near])
                for c in range(columns):
                    if not done[c] and base + price[c] - worth[other, c] < far[c]:
                        far[c], came[c] = base + price[c] - worth[other, c], other
        for c in range(columns):
            if done[c]:
                price[c] += far[near] - far[c]
        _move(column_of, members, taken, came, near, row)
    return column_of


@njit(cache=True)
def _move(column_of, members, taken, came, column, row):
    """Along the path that ends in `column`: each row into its column, its old column free for the one before it."""
    while True:
        mover = came[column]
        old = column_of[mover]
        column_of[mover] = column
        members[column, taken[column]] = mover
        taken[column] += 1
        if mover == row:
            return
        for i in range(taken[old]):
            if members[old, i] == mover:
                taken[old] -= 1
                members[old, i] = members[old, taken[old]]
                break
        column = old
