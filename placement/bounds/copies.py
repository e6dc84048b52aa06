"""How few rows any placement can copy: certified from below, layer by layer.

Of K choices spread over d places, m pairs share one. Few places need many such pairs: d is at least phi(m), the lower
convex hull over all ways to write K as a sum. Over tokens (Jensen), the mean of d is at least phi at the mean of m; and
the pairs of all tokens together are the co-activation inside the parts of a partition of the experts, which is bounded
from above in two ways, each valid whatever a solver did:

matching   an expert on a place of C slots has at most C - 1 partners; the dual of that linear program
spectral   the eigenvalues of the co-activation, its diagonal shifted at will (Donath and Hoffman, 1973); where places
           have equal slots, the vector of ones is known to be in the span of the parts, and is taken out first

Where homes are fixed, what is counted are the places but for them. A token with c choices at home and the others on q
places has q rows, and no fewer pairs than those that are as even as can be; of all choices no more can be at home than
the best assignment of experts to places has there, homes alone considered. The fewest rows with no more pairs and
choices at home than there can be are a linear program of few variables, bounded by its dual.

With replicas pairs say nothing. A home has no more experts than slots, so that at best those that its tokens choose
most are there; and of a token's other choices no more share a place than that has slots.

Loads are left out, so that a placement that has to balance them may be farther away than the bound says.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh
from scipy.optimize import linprog
from scipy.sparse import csr_array

from ..problem import Problem
from ..search.transport import transport
from ._pace import Pace

EXACT = 128  # experts up to which the matching's linear program is solved: beyond, a dual that costs nothing
FEW = 256  # experts up to which all eigenvalues cost no more than some
STEPS = 20  # of the search for a shift of the diagonal; any shift is valid


def copies_bound(problem: Problem, pace: Pace | None = None) -> dict[str, float]:
    """What `copies` and `node_copies` of the objective cannot be below, by the problem's tokens and homes; 0 for one
    without weight. A home that moves saves at most one row there and one back, and with replicas all.

    `pace` ends the search for a better bound: what does not fit any more is left out, and in its `missed`.
    """
    pace, slots, nodes = pace or Pace(), problem.slots_of_gpu, problem.topology.nodes
    on_node = problem.topology.node_of_gpu[problem.home]
    levels = {"copies": (problem.home, slots), "node_copies": (on_node, slots.reshape(nodes, -1).sum(1))}
    wanted = [name for name in levels if getattr(problem.objective, name)]
    found = dict.fromkeys(levels, 0.0)
    for left, name in zip(range(len(wanted), 0, -1), wanted, strict=True):
        found[name] = max(0.0, 2 * _least_rows(problem, *levels[name], pace.share(left)))
    return found


def _least_rows(problem: Problem, home: NDArray[np.integer], slots: NDArray[np.integer], pace: Pace) -> float:
    """One way, per token and layer, to other places than the home [T]."""
    fixed, experts, rows = problem.objective.home == "fixed", problem.num_experts, []
    if problem.spare and not fixed:
        return 0.0
    for left, ids in zip(range(problem.layers, 0, -1), problem.ids, strict=True):
        mine = pace.share(left)
        if problem.spare:
            rows.append(least_away(ids, home, experts, slots))
        elif fixed:
            rows.append(least_beside(ids, home, experts, slots, mine))
        else:
            rows.append(least_places(ids, experts, slots, mine) - float((ids >= 0).any(1).mean() if len(ids) else 0.0))
    return float(np.mean(rows))


def least_away(ids: NDArray[np.integer], home: NDArray[np.integer], experts: int, slots: NDArray[np.integer]) -> float:
    """What the mean number of places other than the home [T] that a token's experts are taken on cannot be below, with
    replicas. ids [T, K], below 0 for none; slots [P]: how many experts each place takes. 0 for no tokens."""
    if not len(ids):
        return 0.0
    most = np.sort(_at_home(_distinct(ids), home, experts, len(slots)), 1)[:, ::-1]
    away = sum(float(most[p, room:].sum()) for p, room in enumerate(slots.tolist()))
    return away / min(ids.shape[1], int(slots.max())) / len(ids)


def least_beside(
    ids: NDArray[np.integer],
    home: NDArray[np.integer],
    experts: int,
    slots: NDArray[np.integer],
    pace: Pace | None = None,
) -> float:
    """The same without replicas; slots [P] take E in all."""
    if not len(ids):
        return 0.0
    distinct = _distinct(ids)
    many, tokens = np.unique((distinct >= 0).sum(1), return_counts=True)
    most = np.array(
        [_most_pairs(distinct, experts, slots, pace or Pace()), _most_at_home(distinct, home, experts, slots)]
    )
    most = np.minimum(most, [tokens @ (many * (many - 1) // 2), tokens @ many])
    ways = [_ways_beside(choices) for choices in many.tolist()]
    rows, uses = np.concatenate([way[0] for way in ways]), np.concatenate([way[1] for way in ways])
    kind = np.repeat(np.arange(len(ways)), [len(way[0]) for way in ways])
    solved = linprog(rows, A_ub=uses.T, b_ub=most, A_eq=np.eye(len(ways))[kind].T, b_eq=tokens)
    price = np.zeros(2) if solved.ineqlin is None else np.maximum(0.0, -solved.ineqlin.marginals)
    each = np.full(len(ways), np.inf)
    np.minimum.at(each, kind, rows + uses @ price)
    return max(0.0, float(tokens @ each - most @ price) * (1 - 1e-12)) / len(ids)


def _ways_beside(choices: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(rows [W], [W, 2] pairs that share a place and choices at home) of all ways to spread a token's choices."""
    rows, uses = [], []
    for here in range(choices + 1):
        for parts in range(min(1, choices - here), choices - here + 1):
            size, more = divmod(choices - here, max(1, parts))
            rows.append(parts)
            uses.append((here * (here - 1) // 2 + parts * size * (size - 1) // 2 + more * size, here))
    return np.array(rows, float), np.array(uses, float)


def _most_at_home(
    distinct: NDArray[np.integer], home: NDArray[np.integer], experts: int, slots: NDArray[np.integer]
) -> float:
    """How many choices [T, K] can be at their token's home [T], at most: the dual of an assignment."""
    here = _at_home(distinct, home, experts, len(slots)).T.astype(np.float64)
    price = np.zeros(len(slots))
    transport(here, slots.astype(np.int64), price)
    return float((here - price).max(1).sum() + slots @ price)


def _at_home(distinct: NDArray[np.integer], home: NDArray[np.integer], experts: int, places: int) -> NDArray[np.int64]:
    """int64 [P, E]: how many tokens of each home choose each expert."""
    at = (home.astype(np.int64)[:, None] * experts + distinct)[distinct >= 0]
    return np.bincount(at, minlength=places * experts).reshape(places, experts)


def _distinct(ids: NDArray[np.integer]) -> NDArray[np.integer]:
    """ids [T, K] with -1 for what a token chooses again."""
    rising = np.sort(ids, 1)
    rising[:, 1:][rising[:, 1:] == rising[:, :-1]] = -1
    return rising


def least_places(ids: NDArray[np.integer], experts: int, slots: NDArray[np.integer], pace: Pace | None = None) -> float:
    """What the mean number of distinct places of a token's experts cannot be below. ids [T, K], below 0 for none;
    slots [P]: how many experts each place takes, E in all. 0 for no tokens."""
    if not len(ids):
        return 0.0
    distinct = _distinct(ids)
    pairs = _most_pairs(distinct, experts, slots, pace or Pace())
    choices, tokens = np.unique((distinct >= 0).sum(1), return_counts=True)
    total, steps = 0.0, []
    for many, n in zip(choices.tolist(), tokens.tolist(), strict=True):
        total += many * n  # every choice for itself, before pairs are handed out where they save most
        hull = fewest_parts(many)
        steps += [((b[1] - a[1]) / (b[0] - a[0]), (b[0] - a[0]) * n) for a, b in pairwise(hull)]
    for slope, width in sorted(steps):
        taken = min(width, pairs)
        total += slope * taken
        pairs -= taken
    return total / len(ids)


def _most_pairs(distinct: NDArray[np.integer], experts: int, slots: NDArray[np.integer], pace: Pace) -> float:
    """Of the tokens' pairs of choices, at most so many share a place."""
    work = distinct.size * distinct.shape[1] / 2 + experts**2
    if not pace.fits("counts", work):
        return float("inf")
    with pace.timed("counts", work):
        together = _together(distinct, experts)
        best = matching_bound(together, slots, pace.left_s)
    return min(best, spectral_bound(together, slots, pace))


def _together(distinct: NDArray[np.integer], experts: int) -> NDArray[np.float64]:
    """float64 [E, E]: how many tokens choose both, no diagonal."""
    first, second = np.triu_indices(distinct.shape[1], 1)
    a, b = distinct[:, first].astype(np.int64), distinct[:, second]
    both = (a >= 0) & (b >= 0)
    found = np.bincount(a[both] * experts + b[both], minlength=experts**2).reshape(experts, experts)
    return (found + found.T).astype(np.float64)


def fewest_parts(choices: int) -> list[tuple[int, int]]:
    """Corners (m, d) of the lower convex hull of the fewest parts d that K = `choices` fall into, m pairs sharing one.

    >>> fewest_parts(6)
    [(0, 6), (3, 3), (6, 2), (15, 1)]
    """
    points = {0: choices}
    for parts in range(1, choices):  # as even as can be: with d parts, no fewer pairs share one
        size, more = divmod(choices, parts)
        pairs = parts * size * (size - 1) // 2 + more * size
        points[pairs] = min(parts, points.get(pairs, parts))
    hull: list[tuple[int, int]] = []
    for m, d in sorted(points.items()):
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (m - hull[-2][0]) >= (d - hull[-2][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((m, d))
    return hull


def matching_bound(
    together: NDArray[np.float64], slots: NDArray[np.integer], time_limit: float = float("inf")
) -> float:
    """Co-activation [E, E] (symmetric, no diagonal) of pairs on one place, at most: each expert has C - 1 partners.
    `time_limit` in seconds, of the linear program."""
    experts, partners = len(together), int(slots.max()) - 1
    if not partners:
        return 0.0
    best = float(np.sort(together, 1)[:, -partners:].sum() / 2)  # each pair is counted by both, if by any
    if experts > EXACT or experts < 2:
        return best
    first, second = np.triu_indices(experts, 1)
    worth, count = together[first, second], len(first)
    ends = (np.ones(2 * count), (np.concatenate([first, second]), np.tile(np.arange(count), 2)))
    most = {"time_limit": time_limit} if np.isfinite(time_limit) else {}
    rows, room = csr_array(ends, (experts, count)), np.full(experts, partners)
    solved = linprog(-worth, A_ub=rows, b_ub=room, bounds=(0, 1), options=most)
    if solved.ineqlin is None:  # no solution within HiGHS's limits
        return best
    price = np.maximum(0.0, -solved.ineqlin.marginals)
    return min(best, float(partners * price.sum() + np.maximum(0.0, worth - price[first] - price[second]).sum()))


def spectral_bound(together: NDArray[np.float64], slots: NDArray[np.integer], pace: Pace | None = None) -> float:
    """The same by eigenvalues: with X [E, P] the parts, sum over parts of x' (A + diag u) x is twice the pairs and the
    sum of u, whatever u; and at most the sum of slots times eigenvalue, both falling. `pace` ends the search for u."""
    experts, places, pace = len(together), len(slots), pace or Pace()
    weight, even = np.sort(slots)[::-1].astype(float), bool((slots == slots[0]).all())
    ones = np.full((experts, 1), experts**-0.5)
    shift, best = -together.sum(1) / experts, np.inf
    slack = 1e-10 * max(1.0, float(np.abs(together).sum()))  # far above what rounding does to eigenvalues
    for step in range(STEPS):
        if not pace.fits("eigenvalues", experts**3):
            break
        shifted = together + np.diag(shift)
        with pace.timed("eigenvalues", experts**3):
            if even:
                inside = shifted - ones @ (ones.T @ shifted)
                inside -= (inside @ ones) @ ones.T
                top, of = _largest(inside, places - 1)
                total = weight[0] * (float((ones.T @ shifted @ ones)[0, 0]) + top.sum())
                slope = weight[0] * (ones[:, 0] ** 2 + (of**2).sum(1)) - 1
            else:
                top, of = _largest(shifted, places)
                total = float(weight @ top)
                slope = (of**2) @ weight - 1
        best = min(best, (total - shift.sum()) / 2)
        shift = shift - slope * 0.3 * np.abs(top).sum() / places / np.sqrt(step + 1)
    return best + slack


def _largest(matrix: NDArray[np.float64], many: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The `many` largest eigenvalues, falling, and their vectors [E, many]."""
    size = len(matrix)
    if size > FEW and 0 < many <= size // 4:  # twice as fast as all
        values, vectors = eigh(matrix, subset_by_index=(size - many, size - 1), check_finite=False)
    else:
        values, vectors = np.linalg.eigh(matrix)
    return values[::-1][:many], vectors[:, ::-1][:, :many]
